"""A linear whose frozen weight is held in codes, made dense only for the moment of a product."""

import math
from collections.abc import Iterable
from typing import Any

from ..engine.backend import device_of, xp_of
from ..engine.check import expect_finite
from ..engine.errors import AdapterError, QuantError
from ..engine.fused import frozen_linear
from ..engine.rules import wide
from ..engine.tensor import Tensor
from ..lora.lora import LoRALinear, is_adapter
from ..lora.variants import SplitLinear
from ..model.layers import Linear, Rng
from ..model.module import freeze, module, rebuild, to_device, walk
from ..model.targets import ALL_LINEAR, select
from .blockwise import QuantizedArray, quantize_array
from .codes import Code
from .codes import code as code_named
from .double import DoubleScales, double_quantize


@module
class QuantizedLinear:
    """y = x Ŵᵀ + b, where Ŵ is what the codes mean.

    Nothing trains here; under an adapter this is QLoRA's base.  The dense weight is made on
    the way out and again on the way back, and never kept.  (Dettmers et al. 2023, eq. 5.)
    """

    weight: QuantizedArray  # (d_out, d_in)
    bias: Tensor | None = None  # (d_out,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def __call__(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        return frozen_linear(x, base=self)

    def dense(self, out: Any = None) -> Any:
        """Ŵ as an array; written into `out` where that is given."""
        return self.weight.dense(out)


def quantize(
    model: Any,
    targets: str | Iterable[str] = ALL_LINEAR,
    *,
    code: str = "nf4",
    block: int = 64,
    double: bool = True,
) -> Any:
    """A new tree: the model frozen, each Linear that is targeted held as codes.

    `double` quantizes the scales too.  `adapt` works on the result unchanged: that is QLoRA.
    Errors: `QuantError` naming the linear whose weights cannot be quantized, and for a model
    that has adapters or is quantized already.
    """
    for path, node in walk(model):
        if is_adapter(node) or isinstance(node, QuantizedLinear):
            raise QuantError(
                f"quantize: expected a plain model, found a {type(node).__name__} at {path}"
            )
    chosen = set(select(model, targets))
    tables: dict[str, Code] = {}  # one copy of the code's tables a device, not one a weight

    def convert(path: str, node: Any) -> Any:
        if path not in chosen:
            return node
        data = node.weight.data
        device = device_of(data)
        if device not in tables:
            tables[device] = to_device(code_named(code), device)
        try:
            weight = quantize_array(data, tables[device], block)
        except QuantError as error:
            raise QuantError(f"{path}: {error}") from None
        return QuantizedLinear(double_quantize(weight) if double else weight, node.bias)

    return rebuild(freeze(model), convert)


def dequantize(model: Any) -> Any:
    """A new tree in which every QuantizedLinear is a plain Linear over its dense weight."""

    def convert(path: str, node: Any) -> Any:
        if isinstance(node, QuantizedLinear):
            return Linear(Tensor(node.dense()), node.bias)
        return node

    return rebuild(model, convert)


WAYS = ("dequantized", "original", "requantized")


def merge_quantized(
    adapted: Any, way: str = "dequantized", original: Any = None
) -> tuple[Any, dict[str, float]]:
    """Merge adapters, at least one on a quantized base; the model without adapters, and the
    error made, path by path.

        "dequantized"   Ŵ + s B A        what was trained, in full precision
        "original"      W0 + ΔW          onto the weights of `original`, never quantized
        "requantized"   Q(Ŵ + s B A)     four bits again

    The error is ‖merged - (Ŵ + s B A)‖ / ‖Ŵ + s B A‖: how far the result is from the
    weights that the adapter was trained with.  `adapted` is left as it is; weights in codes that
    had no adapter stay and are shared.
    Errors: `NumericsError` naming the module whose merged weight would not be finite;
    `QuantError` for another way, no quantized base, or an `original` that is missing or does
    not fit; `AdapterError` for a mixed batch, whose rows have no one weight, and "original"
    where the adapter has a part of that weight (see `SplitLinear`).
    """
    if way not in WAYS:
        raise QuantError(f"way: expected one of {', '.join(WAYS)}; found {way!r}")
    originals = {path: n for path, n in walk(original) if isinstance(n, Linear)}
    errors: dict[str, float] = {}

    def fold(path: str, node: Any) -> Any:
        if isinstance(node, LoRALinear) and isinstance(node.base, QuantizedLinear):
            base = node.base
            trained = wide(base.dense()) + node.delta()
            expect_finite(f"merge_quantized: {path}", trained)
            bias = None if base.bias is None else Tensor(base.bias.data.copy())
            if way == "original":
                if isinstance(node, SplitLinear):
                    raise AdapterError(
                        f"original: {path} began by splitting its weight, which would be there "
                        "twice: merge put(original, learned(start, adapted))"
                    )
                if path not in originals or originals[path].shape != base.shape:
                    raise QuantError(f"original: expected a Linear {base.shape} at {path}")
                merged = Linear(Tensor(wide(originals[path].weight.data) + node.delta()), bias)
            elif way == "requantized":
                weight = quantize_array(trained, base.weight.code, base.weight.block)
                if isinstance(base.weight.scales, DoubleScales):
                    weight = double_quantize(weight)
                merged = QuantizedLinear(weight, bias)
            else:
                merged = Linear(Tensor(trained), bias)
            errors[path] = distance(wide(merged.dense()), trained)
            return merged
        if hasattr(node, "merged"):  # an adapter, or a mixed batch, which refuses
            plain = node.merged()
            expect_finite(f"merge_quantized: {path}", plain.weight.data)
            return plain
        return type(node)(node.data.copy()) if isinstance(node, Tensor) else node

    model = rebuild(adapted, fold)
    if not errors:
        raise QuantError("merge_quantized: expected adapters on quantized linears, found none")
    return model, errors


def distance(a: Any, b: Any) -> float:
    """‖a - b‖ / ‖b‖ over all entries; 0 where they are equal, both zero too."""
    xp = xp_of(a)
    gap, whole = (float(xp.sqrt(xp.square(v).sum())) for v in (a - b, b))
    if whole == 0:
        return math.inf if gap else 0.0
    return gap / whole
