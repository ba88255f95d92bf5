"""Blocks of GGUF with their values by the `gguf` package: `python tests/golden_gguf.py`.

Writes golden_gguf.json: for each type drawn bytes and what they mean, as hexadecimal float32.
"""

import json
from pathlib import Path

import numpy as np

SEED, BLOCKS = 11, 3
KINDS = {"F16": 1, "BF16": 1, "Q4_0": 32, "Q4_1": 32, "Q8_0": 32, "Q4_K": 256, "Q6_K": 256}


def drawn(rng, name, size):
    """Bytes whose scales are ordinary numbers: a float16 or bfloat16 never NaN or infinite."""
    raw = rng.integers(0, 256, (BLOCKS * (16 if KINDS[name] == 1 else 1), size), np.uint8)
    halves = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
    for start in halves.get(name, (0,)):
        scale = rng.standard_normal(len(raw))
        if name == "BF16":
            bits = (scale.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            bits = scale.astype(np.float16).view(np.uint16)
        raw[:, start : start + 2] = bits[:, None].view(np.uint8)
    return raw.reshape(-1)


def main():
    import gguf

    rng = np.random.default_rng(SEED)
    golden = {}
    for name in KINDS:
        kind = gguf.GGMLQuantizationType[name]
        raw = drawn(rng, name, gguf.GGML_QUANT_SIZES[kind][1])
        values = gguf.quants.dequantize(raw, kind).astype(np.float32)
        golden[name] = {"type": int(kind), "raw": raw.tobytes().hex(),
                        "values": values.tobytes().hex()}  # fmt: skip
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"gguf": "0.19.0", "seed": SEED, "types": golden}, indent=1) + "\n")


if __name__ == "__main__":
    main()
