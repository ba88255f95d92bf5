"""Every array that stays from step to step, and all scratch, predicted from a config alone."""

from dataclasses import dataclass

from ..engine.backend import is_array
from ..engine.errors import MiniloraError, expect_whole
from ..fast.cpu import BLOCK as CACHED
from ..fast.cpu import LEAST
from ..fast.cpu_quant import CHUNK as QUANTIZED
from ..model.module import children
from ..model.targets import ALL_LINEAR, matches
from ..model.transformer import TransformerConfig
from ..optim.adam8bit import BLOCK, SMALL
from ..optim.flat import CONTROL
from ..quant.blockwise import BLOCKS
from ..quant.codes import code as code_named

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
# Bytes of a number, by what it is.  "bf16" is the arithmetic of the papers: 16 bits for weights,
# activations and the gradients of full fine-tuning (12 bytes a parameter with Adam's two float32
# moments), float32 for adapters, their gradients and all moments.
BYTES = {
    "float32": {"weight": 4, "activation": 4, "gradient": 4, "adapter": 4, "moment": 4},
    "bf16": {"weight": 2, "activation": 2, "gradient": 2, "adapter": 4, "moment": 4},
}
TILE, CHUNK = 64, 256  # query rows of attention, tokens of head and loss
OFFSET = 4  # bytes of the mean of a weight's scales, a float32 (kept on the host)
RULES = "fast NumPy rules"  # what activations and scratch are those of


@dataclass(frozen=True)
class Setting:
    """A training run, as far as its memory goes."""

    config: TransformerConfig
    method: str = "full"
    rank: int = 8
    targets: str | tuple[str, ...] = ALL_LINEAR
    batch: int = 1
    length: int = 512
    scored: int | None = None  # tokens that count in the loss; None: all
    optimizer: str = "adamw"
    recompute: bool = False
    dtype: str = "float32"  # or "bf16": see `BYTES`
    code: str = "nf4"
    block: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        for name, known in (
            ("method", METHODS), ("optimizer", OPTIMIZERS), ("dtype", tuple(BYTES)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise MiniloraError(
                    f"{name}: expected one of {', '.join(known)}; found {getattr(self, name)!r}"
                )
        for name in ("rank", "batch", "length"):
            expect_whole(name, getattr(self, name), 1)
        if self.scored is not None:
            expect_whole("scored", self.scored, 0)
        if self.block not in BLOCKS:
            raise MiniloraError(f"block: expected one of {BLOCKS}, found {self.block}")
        if self.length > self.config.context:
            raise MiniloraError(
                f"length: expected at most {self.config.context}, found {self.length}"
            )

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def number(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.dtype]["activation"]


# ------------------------------------------------------------------- what stays between steps


def linears(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """`{path: (d_out, d_in)}` of every linear in the blocks, and of an untied head."""
    C, D, kv = config.width, config.head_width, config.kv
    if config.packed:
        attention = {"qkv": ((config.heads + 2 * kv) * D, C)}
    else:
        attention = {"query": (C, C), "key": (kv * D, C), "value": (kv * D, C)}
    mlp = {"gate": (config.inner, C)} if config.mlp == "swiglu" else {}
    mlp |= {"up": (config.inner, C), "down": (C, config.inner)}
    found = {}
    for i in range(config.layers):
        found |= {f"blocks.{i}.attention.{n}": s for n, s in attention.items()}
        found[f"blocks.{i}.attention.output"] = (C, C)
        found |= {f"blocks.{i}.mlp.{n}": s for n, s in mlp.items()}
    return found | ({} if config.tied else {"head": (config.vocab, C)})


def other_weights(config: TransformerConfig) -> dict[str, int]:
    """Numbers in the embeddings, norms and biases, by kind."""
    C = config.width
    per_norm = C if config.norm == "rms" else 2 * C
    biases = sum(d_out for path, (d_out, _) in linears(config).items() if config.biased(path))
    return {
        "embedding": config.vocab * C,
        "positions": config.context * C if config.rope_theta is None else 0,
        "norms": (2 * config.layers + 1) * per_norm,
        "biases": biases,
    }


def parameter_count(config: TransformerConfig) -> int:
    """Numbers in the plain model, a tied head counted once."""
    return sum(a * b for a, b in linears(config).values()) + sum(other_weights(config).values())


def code_bytes(n: int, code: str, block: int, double: bool) -> dict[str, int]:
    """Bytes of `n` weights in a code: packed codes, scales, and scales of scales.

    bits / 8 + 4 / block, or bits / 8 + 1 / block + 4 / (256 block), blocks rounded up.
    """
    bits, scales = code_named(code).bits, -(-n // block)
    if not double:
        return {"codes": (n * bits + 7) // 8, "scales": 4 * scales}
    return {"codes": (n * bits + 7) // 8, "scales": scales, "nested scales": 4 * -(-scales // 256)}


def table_bytes(name: str) -> int:
    """Bytes of a code's tables: levels, thresholds, order, and levels as they are stored."""
    return sum(part.nbytes for _, part in children(code_named(name)) if is_array(part))


def persistent(setting: Setting) -> dict[str, int]:
    """Bytes that stay from step to step, by kind: weights, codes, adapters, gradients, moments."""
    config, size = setting.config, BYTES[setting.dtype]
    shapes, chosen = linears(config), adapted(setting)
    held = {"weights": size["weight"] * sum(other_weights(config).values())}
    for path, (d_out, d_in) in shapes.items():
        if setting.method == "qlora" and path in chosen:
            sizes = code_bytes(d_out * d_in, setting.code, setting.block, setting.double)
            for kind, n in sizes.items():
                held[kind] = held.get(kind, 0) + n
        else:
            held["weights"] += size["weight"] * d_out * d_in
    if setting.method == "qlora":
        names = [setting.code] + (["dynamic"] if setting.double else [])
        held["code tables"] = sum(table_bytes(name) for name in names)
        if setting.double:
            held["offsets"] = OFFSET * len(chosen)
    trainable = trainable_count(setting)
    if setting.method != "full":
        held["adapters"] = size["adapter"] * trainable
    held["gradients"] = size["gradient" if setting.method == "full" else "adapter"] * trainable
    held["optimizer"] = sum(moment_bytes(setting, n) for n in trainable_sizes(setting))
    held["control"] = 8 * CONTROL
    return held


def moment_bytes(setting: Setting, n: int) -> int:
    """Bytes of the moments of one Parameter of `n` entries.

    Adam's two float32, one for SGD; in 8 bits two bytes and two float32 scales a block of 256,
    but for small tensors, which keep float32.
    """
    if setting.optimizer == "adamw8bit" and n >= SMALL:
        return 2 * n + 2 * 4 * -(-n // BLOCK)
    return BYTES[setting.dtype]["moment"] * (1 if setting.optimizer == "sgd" else 2) * n


def trainable_sizes(setting: Setting) -> list[int]:
    """Entries of each Parameter: of every weight, or of the A and B of the adapted linears."""
    config, shapes = setting.config, linears(setting.config)
    if setting.method != "full":
        return [setting.rank * side for path in adapted(setting) for side in shapes[path]]
    other = other_weights(config)
    sizes = [a * b for a, b in shapes.values()] + [other["embedding"], other["positions"]]
    sizes += [d_out for path, (d_out, _) in shapes.items() if config.biased(path)]
    per_norm = 1 if config.norm == "rms" else 2
    return sizes + [config.width] * (2 * config.layers + 1) * per_norm


def trainable_count(setting: Setting) -> int:
    """Numbers that train: all of them, or Σ r (d_in + d_out) over the adapted linears."""
    return sum(trainable_sizes(setting))


def adapted(setting: Setting) -> set[str]:
    """Paths of the linears that carry an adapter (and, in QLoRA, are quantized).

    Errors: `MiniloraError` for targets that mean none, or the head or a table.
    """
    if setting.method == "full":
        return set()
    targets = setting.targets
    wanted = (targets,) if isinstance(targets, str) else targets
    blocks = [path for path in linears(setting.config) if path != "head"]
    found = {path for path in blocks if any(matches(path, target) for target in wanted)}
    others = {  # for which there is no ledger
        path for path in ("head", "embedding", "positions")
        if any(target != ALL_LINEAR and matches(path, target) for target in wanted)
    }  # fmt: skip
    if others or not found:
        raise MiniloraError(f"targets: expected linears of blocks, found {targets!r}")
    return found


def scratch(setting: Setting) -> dict[str, int]:
    """The scratch of one thread under the fast rules: buffers that live inside a call, by name."""
    config, b = setting.config, setting.number
    shapes, chosen = linears(config), adapted(setting)
    largest = max((d_out * d_in for p, (d_out, d_in) in shapes.items() if p in chosen), default=0)
    scored = setting.tokens if setting.scored is None else setting.scored
    T, H, D = setting.length, config.heads, config.head_width
    tile = min(T, TILE)
    group = min(setting.batch, max(1, 2 * CACHED // (H * tile * T)))  # sequences at a time
    found = {
        "logits": b * min(CHUNK, scored) * config.vocab,
        "adapted weight": b * largest if setting.tokens >= LEAST else 0,
        "attention": b * group * H * (2 * tile * T + tile * D + T * D),
        "optimizer": 2 * b * min(CACHED, max(trainable_count(setting), 1)),
    }
    found["norm"] = b * min(setting.tokens, max(1, CACHED // config.width)) * config.width
    if setting.method == "qlora":
        found["dense weight"] = found["adapted weight"]
        # From when the codes were made: v, and a byte for each threshold.
        code = code_named(setting.code)
        each = 4 if code.bits == 8 else 4 + len(code.thresholds) + 1
        found["quantizer"] = each * min(QUANTIZED, largest)
    if setting.method == "qlora" and setting.double:
        found["decoded scales"] = 4 * -(-largest // setting.block)
    inner = b * min(CACHED, setting.tokens * config.inner)
    found |= {"gelu": 2 * inner} if config.mlp == "gelu" else {"swiglu": inner}
    if config.rope_theta is not None:
        found["rope"] = b * setting.tokens * config.width
    return found
