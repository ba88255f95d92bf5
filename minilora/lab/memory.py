"""Every array that training holds, predicted from a config alone, and counted in a real step.

The prediction walks through the model's forward pass with shapes instead of arrays, and notes
for each op what its pullback would close over under the fast NumPy rules: the same buffers
that `engine.check.retained` finds in a real graph, to the byte.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..engine.errors import MiniloraError
from ..model.targets import ALL_LINEAR, matches
from ..model.transformer import TransformerConfig
from ..quant.codes import code as code_named

METHODS = ("full", "lora", "qlora")
OPTIMIZERS = {"sgd": 1, "adamw": 2}  # arrays of moments
# Bytes of a number, by what it is.  "bf16" is the arithmetic of the papers: 16 bits for weights,
# activations and the gradients of full fine-tuning (12 bytes a parameter with Adam's two float32
# moments), float32 for adapters, their gradients and all moments.
BYTES = {
    "float32": {"weight": 4, "activation": 4, "gradient": 4, "adapter": 4, "moment": 4},
    "bf16": {"weight": 2, "activation": 2, "gradient": 2, "adapter": 4, "moment": 4},
}
TILE, CHUNK = 64, 256  # query rows of attention, tokens of head and loss
FEW = 64  # an adapter's fast rule takes no fewer tokens


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
            ("method", METHODS), ("optimizer", tuple(OPTIMIZERS)), ("dtype", tuple(BYTES)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise MiniloraError(
                    f"{name}: expected one of {', '.join(known)}; found {getattr(self, name)!r}"
                )
        for name in ("rank", "batch", "length"):
            if getattr(self, name) < 1:
                raise MiniloraError(f"{name}: expected a whole number >= 1")

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
    biases = sum(d_out for path, (d_out, _) in linears(config).items() if path != "head")
    return {
        "embedding": config.vocab * C,
        "positions": config.context * C if config.rope_theta is None else 0,
        "norms": (2 * config.layers + 1) * per_norm,
        "biases": biases if config.bias else 0,
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
    trainable = trainable_count(setting)
    if setting.method != "full":
        held["adapters"] = size["adapter"] * trainable
    held["gradients"] = size["gradient" if setting.method == "full" else "adapter"] * trainable
    held["optimizer"] = size["moment"] * OPTIMIZERS[setting.optimizer] * trainable
    return held


def trainable_count(setting: Setting) -> int:
    """Numbers that train: all of them, or Σ r (d_in + d_out) over the adapted linears."""
    if setting.method == "full":
        return parameter_count(setting.config)
    shapes = linears(setting.config)
    return sum(setting.rank * sum(shapes[path]) for path in adapted(setting))


def adapted(setting: Setting) -> set[str]:
    """Paths of the linears that carry an adapter (and, in QLoRA, are quantized)."""
    if setting.method == "full":
        return set()
    targets = setting.targets
    wanted = (targets,) if isinstance(targets, str) else targets
    paths = list(linears(setting.config)) + (["head"] if setting.config.tied else [])
    return {path for path in paths if any(matches(path, target) for target in wanted)}


# ------------------------------------------------------------------ what the way back needs


@dataclass(eq=False)
class Value:
    """A value on the way: how many bytes its buffer has, and whether a gradient is owed to it."""

    nbytes: int
    wants: bool


@dataclass
class Tape:
    """Buffers that pullbacks keep, each once, for the first op that holds it."""

    setting: Setting
    sizes: dict[str, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    alive: list = field(default_factory=list)  # so that no id is used twice

    def keep(self, op: str, *values: Value) -> None:
        for value in values:
            if id(value) not in self.seen:
                self.seen.add(id(value))
                self.alive.append(value)
                self.sizes[op] = self.sizes.get(op, 0) + value.nbytes

    def value(self, width: int, wants: bool) -> Value:
        """One number of `width` for every token."""
        return Value(self.setting.number * self.setting.tokens * width, wants)

    def linear(self, x: Value, path: str, shape: tuple[int, int], chosen: set[str]) -> Value:
        """y = x Wᵀ + b: keeps x where W trains; x and x Aᵀ under an adapter."""
        d_out, _ = shape
        full = self.setting.method == "full"
        y = self.value(d_out, x.wants or full or path in chosen)
        if full:
            self.keep("linear", x)
        elif path in chosen:
            self.keep("lora_linear", x, self.value(self.setting.rank, False))
        return y

    def norm(self, x: Value) -> Value:
        """Keeps n, 1/√, and a row of 1/C."""
        config = self.setting.config
        name = "rms_norm" if config.norm == "rms" else "layer_norm"
        wants = x.wants or self.setting.method == "full"
        if wants:
            row = Value(self.setting.number * config.width, False)
            self.keep(name, self.value(config.width, False), self.value(1, False), row)
        return self.value(config.width, wants)


def saved_activations(setting: Setting) -> dict[str, int]:
    """Bytes kept for the way back, op by op, under the fast NumPy rules in float32."""
    config, chosen = setting.config, adapted(setting)
    shapes, tape = linears(config), Tape(setting)
    full = setting.method == "full"
    ids = Value(8 * setting.tokens, False)
    if full:
        tape.keep("embedding", ids)
    x = tape.value(config.width, full)
    turns = Value(2 * setting.number * setting.length * config.head_width, False)
    for i in range(config.layers):
        inner = Tape(setting) if setting.recompute else tape
        y = block(inner, x, i, shapes, chosen, turns)
        if setting.recompute and y.wants:
            tape.keep("recompute", x)
        x = y
    x = tape.norm(x)
    head_loss(tape, x, chosen)
    return tape.sizes


def block(tape: Tape, x: Value, i: int, shapes: dict, chosen: set[str], turns: Value) -> Value:
    """x + attention(norm(x)), then x + mlp(norm(x)): the residual sums keep nothing."""
    setting, config = tape.setting, tape.setting.config
    names = [path for path in shapes if path.startswith(f"blocks.{i}.")]
    by_name = {path.rpartition(".")[2]: path for path in names}

    def linear(x: Value, name: str) -> Value:
        return tape.linear(x, by_name[name], shapes[by_name[name]], chosen)

    n = tape.norm(x)
    if config.packed:
        packed = linear(n, "qkv")
        q = k = v = packed  # three views of one buffer
    else:
        q, k, v = linear(n, "query"), linear(n, "key"), linear(n, "value")
    if config.rope_theta is not None:
        if q.wants or k.wants:
            tape.keep("rope", turns)
        q, k = Value(q.nbytes, q.wants), Value(k.nbytes, k.wants)
        if config.packed:  # the rotated heads are new buffers of their own size
            q = tape.value(config.width, q.wants)
            k = tape.value(config.kv * config.head_width, k.wants)
    wants = q.wants or k.wants or v.wants
    out = tape.value(config.width, wants)
    if wants:
        lse = tape.value(config.heads, False)
        above = Value(setting.number * TILE * TILE, False)
        tape.keep("attention", q, k, v, out, lse, above)
    y = linear(out, "output")
    x = tape.value(config.width, x.wants or y.wants)
    n = tape.norm(x)
    if config.mlp == "gelu":
        up = linear(n, "up")
        if up.wants:
            tape.keep("gelu", tape.value(config.inner, False))
        h = tape.value(config.inner, up.wants)
    else:
        gate, up = linear(n, "gate"), linear(n, "up")
        if gate.wants or up.wants:
            tape.keep("swiglu", gate, up)
        h = tape.value(config.inner, gate.wants or up.wants)
    y = linear(h, "down")
    return tape.value(config.width, x.wants or y.wants)


def head_loss(tape: Tape, x: Value, chosen: set[str]) -> None:
    """Gradients that are formed on the way out: dx of the scored tokens, and dW of the head."""
    setting, config = tape.setting, tape.setting.config
    scored = setting.tokens if setting.scored is None else setting.scored
    if "head" in chosen:
        raise MiniloraError("memory: an adapter on the head is not in the ledger")
    kept = []
    if x.wants:
        kept.append(Value(setting.number * scored * config.width, False))
    if setting.method == "full":
        kept.append(Value(setting.number * config.vocab * config.width, False))
    if kept:
        tape.keep("head_cross_entropy", *kept, Value(8 * scored, False))


def scratch(setting: Setting) -> dict[str, int]:
    """The declared scratch of one thread: buffers that live inside a call, by name."""
    config, b = setting.config, setting.number
    shapes = linears(config)
    chosen = adapted(setting)
    largest = max((d_out * d_in for p, (d_out, d_in) in shapes.items() if p in chosen), default=0)
    scored = setting.tokens if setting.scored is None else setting.scored
    return {
        "logits": b * min(CHUNK, scored) * config.vocab,
        "dense weight and change": 2 * b * largest,
    }


def totals(parts: Iterable[dict[str, int]]) -> int:
    return sum(sum(part.values()) for part in parts)


def ledger(setting: Setting) -> dict[str, Any]:
    """The whole prediction as a record: what stays, what is saved by op, scratch, the sum."""
    parts = {
        "persistent": persistent(setting),
        "saved": saved_activations(setting),
        "scratch": scratch(setting),
    }
    return parts | {"total": totals(parts.values())}
