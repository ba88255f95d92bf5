"""What bitsandbytes answers for fixed weights, and the weights.

`python tests/golden_quant.py` (with torch and bitsandbytes) writes golden_quant.json.  Large
answers are kept as SHA-256 digests of their bytes.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
SEED = 20231124
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ODD = (1, 63, 65, 441)  # 441 = 7 × 63
DOUBLE = 1 << 16  # weights of the double-quantized example: 1024 scales
KINDS = ("normal", "heavy")


def weights(n: int, kind: str = "normal") -> np.ndarray:
    """(n,) float32, nearly normal (or their cubes), from raw bits: the same for ever.

    Sums of twelve 16-bit numbers, in units of their standard deviation: exact in float32.
    """
    parts = np.random.PCG64(SEED).random_raw(3 * n).astype("<u8").view("<u2").reshape(n, 12)
    w = ((parts.sum(axis=1, dtype=np.int64) - 12 * 32768) / 65536).astype(np.float32)
    return w * w * w if kind == "heavy" else w


def near_midpoints(levels: np.ndarray) -> np.ndarray:
    """One block of 64: a 1, then the 15 midpoints, and their neighbors below and above."""
    middle = (levels[1:] + levels[:-1]) / np.float32(2)
    below, above = (np.nextafter(middle, np.float32(end)) for end in (-2, 2))
    block = np.zeros(64, np.float32)
    block[0] = 1
    block[1:46] = np.concatenate([middle, below, above])
    return block


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def read() -> dict:
    return json.loads(FILE.read_text())


def make() -> dict:
    """Ask bitsandbytes."""
    import bitsandbytes
    import torch
    from bitsandbytes import functional as F

    def ask(w: np.ndarray, name: str, block: int) -> dict:
        packed, state = F.quantize_4bit(torch.from_numpy(w), quant_type=name, blocksize=block)
        packed, scales = packed.numpy().ravel(), state.absmax.numpy()
        stored = np.stack([packed >> 4, packed & 15], axis=1).ravel()[: w.size]
        dense = state.code.numpy()[stored] * np.repeat(scales, block)[: w.size]
        return {"packed": digest(packed), "scales": digest(scales), "dense": digest(dense)}

    answers: dict = {
        "versions": {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "seed": SEED,
        "tables": {
            "nf4": F.get_4bit_type("nf4", device="cpu").tolist(),
            "fp4": F.get_4bit_type("fp4", device="cpu").tolist(),
            "dynamic": digest(F.create_dynamic_map().numpy()),
            "dynamic_unsigned": digest(F.create_dynamic_map(signed=False).numpy()),
        },
    }
    for name in ("nf4", "fp4"):
        levels = np.sort(F.get_4bit_type(name, device="cpu").numpy())
        packed, _ = F.quantize_4bit(torch.from_numpy(near_midpoints(levels)), quant_type=name)
        answers[name] = {
            "midpoints": packed.numpy().tobytes().hex(),
            "odd": {n: ask(weights(n), name, 64) for n in ODD},
        }
        for kind in KINDS:
            answers[name][kind] = {b: ask(weights(64 * b, kind), name, b) for b in BLOCKS}
    _, state = F.quantize_4bit(
        torch.from_numpy(weights(DOUBLE)), quant_type="nf4", compress_statistics=True
    )
    answers["double"] = {
        "offset": state.offset.item(),
        "stored": state.absmax.numpy().tobytes().hex(),
        "scales": state.state2.absmax.tolist(),
    }
    return answers


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=1) + "\n")
