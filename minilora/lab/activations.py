"""What the way back needs, op by op, and the most that is alive at once: shapes, no arrays.

The forward pass is walked with sizes instead of arrays.  For each op it is noted what its
pullback closes over under the fast NumPy rules (the buffers that `engine.check.retained` finds
in a real graph, to the byte), and which cotangents it makes; the walk back then plays the
engine's own order of making and freeing.
"""

from dataclasses import dataclass, field

from .memory import TILE, Setting, adapted, linears


@dataclass(eq=False)
class Value:
    """A value on the way: how many bytes its buffer has, and whether a gradient is owed to it."""

    nbytes: int
    wants: bool


@dataclass(eq=False)
class Step:
    """An op on the way: what its pullback keeps, and what it makes when it runs.

    `inputs` get a cotangent each: a new array, or with `alias` the one that arrives.  `extra`
    are bytes made and dropped at once: gradients of weights on their way to the flat buffer.
    """

    kept: list[Value]
    inputs: list[Value]
    outputs: list[Value]
    alias: bool = False
    extra: int = 0
    inner: "Tape | None" = None  # recomputed: the block's own tape


@dataclass
class Tape:
    """Buffers that pullbacks keep, each once, for the first op that holds it; and the steps."""

    setting: Setting
    sizes: dict[str, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    alive: list = field(default_factory=list)  # so that no id is used twice
    steps: list[Step] = field(default_factory=list)
    averages: Value = field(init=False)  # the row of 1/C, one for all norms of a model

    def __post_init__(self) -> None:
        self.averages = Value(self.setting.number * self.setting.config.width, False)

    def op(self, name: str, inputs: list[Value], output: Value, kept: tuple = (), **more) -> Value:
        """Note an op; `output` comes back.  Nothing is noted where nothing wants a gradient."""
        if not output.wants:
            return output
        for value in kept:
            if id(value) not in self.seen:
                self.seen.add(id(value))
                self.alive.append(value)
                self.sizes[name] = self.sizes.get(name, 0) + value.nbytes
        wanting = list({id(v): v for v in inputs if v.wants}.values())
        outputs = more.pop("outputs", [output])
        self.steps.append(Step(list(kept), wanting, outputs, **more))
        return output

    def sizes_of(self, values: list[Value]) -> int:
        """Bytes of those of `values` that are kept here too."""
        return sum(value.nbytes for value in values if id(value) in self.seen)

    def value(self, width: int, wants: bool) -> Value:
        """One number of `width` for every token."""
        return Value(self.setting.number * self.setting.tokens * width, wants)

    def linear(self, x: Value, path: str, shape: tuple[int, int], chosen: set[str]) -> Value:
        """y = x Wᵀ + b: keeps x where W trains; x and x Aᵀ under an adapter."""
        d_out, d_in = shape
        full, b = self.setting.method == "full", self.setting.number
        y = self.value(d_out, x.wants or full or path in chosen)
        if full:
            return self.op("linear", [x], y, (x,), extra=b * d_out * d_in)
        if path in chosen:
            kept, rank = (x, self.value(self.setting.rank, False)), self.setting.rank
            return self.op("lora_linear", [x], y, kept, extra=b * rank * (d_in + d_out))
        return self.op("linear", [x], y)

    def norm(self, x: Value) -> Value:
        """Keeps n, 1/√, and the row of 1/C."""
        config = self.setting.config
        name = "rms_norm" if config.norm == "rms" else "layer_norm"
        wants = x.wants or self.setting.method == "full"
        kept = (self.value(config.width, False), self.value(1, False), self.averages)
        return self.op(name, [x], self.value(config.width, wants), kept)

    def add(self, a: Value, b: Value) -> Value:
        """The residual sum keeps nothing, and hands its cotangent on as it is."""
        return self.op("add", [a, b], Value(a.nbytes, a.wants or b.wants), alias=True)


def forward(setting: Setting) -> Tape:
    """The whole pass, from the ids to the loss."""
    config, chosen = setting.config, adapted(setting)
    shapes, tape = linears(config), Tape(setting)
    full = setting.method == "full"
    ids = Value(8 * setting.tokens, False)
    table = Value(0, full)
    x = tape.op("embedding", [table], tape.value(config.width, full), (ids,),
                extra=setting.number * config.vocab * config.width)  # fmt: skip
    turns = Value(2 * setting.number * setting.length * config.head_width, False)
    for i in range(config.layers):
        inner = Tape(setting) if setting.recompute else tape
        y = block(inner, x, i, shapes, chosen, turns)
        if setting.recompute:
            y = tape.op("recompute", [x], Value(y.nbytes, y.wants), (x,), inner=inner)
        x = y
    head_loss(tape, tape.norm(x))
    return tape


def block(tape: Tape, x: Value, i: int, shapes: dict, chosen: set[str], turns: Value) -> Value:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    setting, config = tape.setting, tape.setting.config
    names = [path for path in shapes if path.startswith(f"blocks.{i}.")]
    by_name = {path.rpartition(".")[2]: path for path in names}

    def linear(x: Value, name: str) -> Value:
        return tape.linear(x, by_name[name], shapes[by_name[name]], chosen)

    n = tape.norm(x)
    kv = config.kv * config.head_width
    if config.packed:
        packed = linear(n, "qkv")
        # Three views of one buffer; their cotangents are joined into one.
        q, k, v = (Value(setting.number * setting.tokens * w, packed.wants)
                   for w in (config.width, kv, kv))  # fmt: skip
        tape.op("split_heads", [packed], packed, outputs=[q, k, v])
        held = (packed,)
    else:
        q, k, v = linear(n, "query"), linear(n, "key"), linear(n, "value")
        held = (q, k, v)
    if config.rope_theta is not None:
        turned = []
        for a in (q, k):
            turned.append(tape.op("rope", [a], Value(a.nbytes, a.wants), (turns,)))
        q, k = turned
        held = (q, k, held[0] if config.packed else v)
    out = tape.value(config.width, q.wants or k.wants or v.wants)
    lse = tape.value(config.heads, False)
    above = Value(setting.number * TILE * TILE, False)
    tape.op("attention", [q, k, v], out, (*held, out, lse, above))
    x = tape.add(x, linear(out, "output"))
    n = tape.norm(x)
    if config.mlp == "gelu":
        up = linear(n, "up")
        h = tape.value(config.inner, up.wants)
        tape.op("gelu", [up], h, (tape.value(config.inner, False),))
    else:
        gate, up = linear(n, "gate"), linear(n, "up")
        h = tape.value(config.inner, gate.wants or up.wants)
        tape.op("swiglu", [gate, up], h, (gate, up))
    return tape.add(x, linear(h, "down"))


def head_loss(tape: Tape, x: Value) -> None:
    """Gradients that are formed on the way out: dx of the scored tokens, and dW of the head."""
    setting, config = tape.setting, tape.setting.config
    scored = setting.tokens if setting.scored is None else setting.scored
    table = setting.number * config.vocab * config.width
    kept = [Value(setting.number * scored * config.width, False)] if x.wants else []
    full = setting.method == "full"
    if full:
        kept.append(Value(table, False))
    if kept:
        kept.append(Value(8 * scored, False))
        tape.op("head_cross_entropy", [x], Value(0, True), tuple(kept), extra=table * full)


def saved_activations(setting: Setting) -> dict[str, int]:
    """Bytes kept for the way back, op by op, under the fast NumPy rules in float32."""
    return forward(setting).sizes


def transient_peak(setting: Setting) -> int:
    """The most bytes alive on the way back beyond what stays from step to step and scratch:
    saved activations not yet freed, and cotangents.
    """
    tape = forward(setting)
    return walk_back(tape, sum(tape.sizes.values()))


def walk_back(tape: Tape, live: int, gather: bool = False) -> int:
    """Play the steps from the last to the first; the largest number of bytes alive at once.

    With `gather` gradients of weights stay alive, as they do where they are returned.

    As in `engine.graph.pull`: an op's kept arrays and its cotangent go once its pullback has
    run; a second cotangent for a value is added out of place, a third in place.
    """
    peak, holders = live, {}
    for step in tape.steps:
        for value in step.kept:
            holders[id(value)] = holders.get(id(value), 0) + 1
    waiting: dict[int, list] = {}  # id of a value: its cotangent, [bytes, how many names it has]
    for step in reversed(tape.steps):
        arrived = [waiting.pop(id(output), [0, 1]) for output in step.outputs]
        g = arrived[0]
        if step.inner is not None:
            inside = step.inner
            # Its input is held already; its output, and all its gradients, live until it ends.
            saved = sum(inside.sizes.values()) + step.outputs[0].nbytes
            saved -= inside.sizes_of(step.kept)
            peak = max(peak, walk_back(inside, live + saved, gather=True))
        for value in step.inputs:
            new = g if step.alias else [value.nbytes, 0]
            if not step.alias:
                live += value.nbytes
            old = waiting.get(id(value))
            if old is None:
                new[1] += 1
                waiting[id(value)] = new
            else:  # out of place: a third array, and then both go
                peak = max(peak, live + step.extra + value.nbytes)
                live += value.nbytes - (0 if step.alias else value.nbytes)
                old[1] -= 1
                live -= old[0] if old[1] == 0 else 0
                waiting[id(value)] = [value.nbytes, 1]
        peak = max(peak, live + step.extra)
        live += step.extra * gather
        for cotangent in arrived:
            cotangent[1] -= 1
            live -= cotangent[0] if cotangent[1] == 0 else 0
        for value in step.kept:
            holders[id(value)] -= 1
            if holders[id(value)] == 0:
                live -= value.nbytes
    return peak
