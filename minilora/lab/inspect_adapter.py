"""What an adapter on disk is: its ranks and norms, its singular values, what it was made for.

No base model is needed: ΔW = s B A has the singular values of s R_B R_Aᵀ, an r x r matrix.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import AdapterError
from ..files.peft import BASE_DIGEST, WEIGHTS, decoded, letters_of, parsed, read_weights
from ..files.peft_config import pattern_value, read_adapter_config
from ..lora.lora import scale_of
from .report import size, table


def inspect_adapter(directory: str | os.PathLike) -> dict[str, Any]:
    """A record of an adapter's directory: its settings, and each module's shape and spectrum.

    Errors: `MissingAdapterError`, `AdapterError` as `load_adapter`, as far as they can be told
    without the base.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    stored = read_weights(directory, config, allow_nonfinite=False)
    letters = letters_of(config)
    pairs: dict[str, dict[str, str]] = {}
    for name in stored:
        module, letter, _ = parsed(name)
        if letter is not None and letter in letters:
            pairs.setdefault(module, {})[letter] = name
    modules = []
    for module, pair in sorted(pairs.items()):
        if not {"A", "B"} <= set(pair):
            continue  # told as "odd" below
        if len(pair) < len(letters):
            raise AdapterError(f"{directory / WEIGHTS}: {module}: DoRA's magnitude is missing")
        A, B, *m = (decoded(directory, stored, pair[x]).astype(np.float64) for x in letters)
        r = pattern_value(config["rank_pattern"], module, config["r"])
        if A.ndim != 2 or B.ndim != 2 or not len(A) == B.shape[1] == r:
            raise AdapterError(
                f"{directory / WEIGHTS}: {module}: expected A ({r}, d_in) and B (d_out, {r}), "
                f"found {A.shape} and {B.shape}"
            )
        if m and m[0].shape != (len(B),):
            raise AdapterError(
                f"{directory / WEIGHTS}: {module}: expected a magnitude ({len(B)},), "
                f"found {m[0].shape}"
            )
        alpha = float(pattern_value(config["alpha_pattern"], module, config["lora_alpha"]))
        s = scale_of(len(A), alpha, config["use_rslora"])
        values = s * singular_values(A, B)
        modules.append({
            "module": module, "shape": [B.shape[0], A.shape[1]], "rank": len(A), "scale": s,
            "norm": float(np.sqrt(np.square(values).sum())), "singular": values.tolist(),
            "effective_rank": effective_rank(values),
        })  # fmt: skip
    paired = {name for pair in pairs.values() if {"A", "B"} <= set(pair) for name in pair.values()}
    return {
        "kind": "adapter",
        "directory": os.path.basename(os.path.abspath(directory)),  # of "." too
        "base": config.get("base_model_name_or_path"),
        "base_sha256": stored.metadata.get(BASE_DIGEST),
        "verified": stored.verified,
        "settings": {k: config.get(k) for k in (
            "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern",
            "alpha_pattern",
        )},
        "numbers": sum(int(np.prod(stored.entries[n].shape)) for n in paired),
        "bytes": (directory / WEIGHTS).stat().st_size,
        "odd": sorted(set(stored) - paired),
        "modules": modules,
    }  # fmt: skip


def singular_values(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Those of B A, from two small QR factorizations."""
    return np.linalg.svd(np.linalg.qr(B)[1] @ np.linalg.qr(A.T)[1].T, compute_uv=False)


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of σ² / Σ σ²: how many directions carry it; 0 for no update."""
    share = np.square(values)
    if not share.sum():
        return 0.0
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def inspect_report(record: dict[str, Any]) -> str:
    """The settings, and one line a kind of module: norms and spectra over the blocks."""
    settings, kinds = record["settings"], {}
    for entry in record["modules"]:
        kinds.setdefault(entry["module"].rpartition(".")[2], []).append(entry)
    rows = [["module", "count", "shape", "rank", "s", "‖ΔW‖", "largest σ", "effective rank"]]
    for kind, entries in sorted(kinds.items()):
        told = {name: sorted({str(e[name]) for e in entries}) for name in ("shape", "rank")}
        rows.append([
            kind, str(len(entries)), told["shape"][0] if len(told["shape"]) == 1 else "various",
            ", ".join(told["rank"]), ", ".join(sorted({f"{e['scale']:g}" for e in entries})),
            span([e["norm"] for e in entries]), span([max(e["singular"]) for e in entries]),
            span([e["effective_rank"] for e in entries]),
        ])  # fmt: skip
    fingerprint = record["base_sha256"]
    lines = [
        f"{record['directory']}: {record['numbers']:,} numbers, {size(record['bytes'])}, "
        f"rank {settings['r']}, alpha {settings['lora_alpha']}"
        + (", rank-stabilized" if settings["use_rslora"] else "")
        + (", DoRA: norms and spectra are of s B A alone" if settings["use_dora"] else ""),
        f"made for {record['base'] or 'a base that it does not name'}"
        + (f", embedding table sha256 {fingerprint[:12]}" if fingerprint else ", no fingerprint"),
        "every tensor matches its sha256" if record["verified"] else
        "tensors carry no sha256: nothing to compare with",
        "", table(rows),
    ]  # fmt: skip
    if record["odd"]:
        lines += ["", f"tensors that are no pair of factors: {', '.join(record['odd'][:4])}"]
    return "\n".join(lines)


def span(values: list[float]) -> str:
    low, high = (f"{v:.3g}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
