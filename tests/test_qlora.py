"""QLoRA: the numbers of LoRA over the weights that the codes mean, and a base that never moves."""

import json
from dataclasses import replace

import numpy as np
import pytest

from minilora import (
    AdamW,
    Data,
    MiniloraError,
    TransformerConfig,
    adapt,
    fit,
    freeze,
    init_transformer,
    merge,
    parameters,
    to_device,
)
from minilora.engine.backend import device_of, is_array
from minilora.engine.backend import to_device as array_to_device
from minilora.engine.check import retained
from minilora.engine.errors import AdapterError, NumericsError, QuantError
from minilora.engine.rules import reference_rules
from minilora.engine.tensor import Tensor
from minilora.files.safetensors import write
from minilora.lab.quantize import (
    QuantizeConfig,
    codes_figure,
    errors,
    frontier,
    levels_figure,
    quantize_lab,
    quantize_report,
)
from minilora.lora.adapters import mix, take
from minilora.lora.lora import LoRALinear, is_adapter
from minilora.model.layers import Linear
from minilora.model.module import rebuild, tensors, walk
from minilora.quant.double import DoubleScales
from minilora.quant.linear import QuantizedLinear, dequantize, distance, merge_quantized, quantize

CONFIG = TransformerConfig(vocab=11, width=64, layers=2, heads=4, context=32)


def base(device="cpu"):
    return to_device(freeze(init_transformer(CONFIG, np.random.default_rng(0), 0.2)), device)


def adapted(model, seed=1, fill=True):
    """Adapters with B away from zero."""
    model = adapt(model, rank=3, alpha=6.0, rng=np.random.default_rng(seed))
    rng = np.random.default_rng(2)
    for path, p in parameters(model).items():
        if path.endswith(".B") and fill:
            values = rng.standard_normal(p.shape).astype(np.float32) * 0.1
            p.data[...] = array_to_device(values, device_of(p.data))
    return model


def ids(dev, shape=(4, 20)):
    return dev(np.random.default_rng(3).integers(0, 11, shape))


def codes(model, host):
    return {p: host(a).tobytes() for p, a in walk(model) if is_array(a)}


@pytest.mark.parametrize("name", ["nf4", "fp4", "e2m1", "int4", "int4_max", "int8"])
@pytest.mark.parametrize("double", [False, True])
def test_logits_and_gradients_are_those_over_the_dequantized_weights(
    name, double, device, dev, host
):
    """The same products are formed: equal to the bit."""
    quantized = quantize(base(device), code=name, double=double)
    q, plain = adapted(quantized), adapted(dequantize(quantized))
    x = ids(dev)
    a, b = q.loss(x, x), plain.loss(x, x)
    assert host(q(x).data).tobytes() == host(plain(x).data).tobytes()
    assert a.item() == b.item()
    ga, gb = a.backward(), b.backward()
    pa, pb = parameters(q), parameters(plain)
    assert pa.keys() == pb.keys()
    for path in pa:
        assert host(ga[pa[path]]).tobytes() == host(gb[pb[path]]).tobytes()


def test_the_specification_says_the_same(device, dev, host):
    q = adapted(quantize(base(device)))
    x = ids(dev)
    fast = q.loss(x, x)
    with reference_rules():
        slow = q.loss(x, x)
    assert abs(fast.item() - slow.item()) <= 1e-4 * abs(slow.item())


def test_training_never_touches_the_base(device, host):
    model = quantize(base(device))
    before = codes(model, host)
    a = np.random.default_rng(3).integers(0, 11, (32, 12))
    loss = lambda m, batch, rng: m.loss(batch["ids"], batch["targets"])
    trained = fit(AdamW(adapted(model, fill=False), lr=1e-2), loss, Data({"ids": a, "targets": a}),
                  steps=5, batch=8)  # fmt: skip
    assert codes(model, host) == before
    bases = {p: n.base for p, n in walk(trained.model) if isinstance(n, LoRALinear)}
    assert len(bases) == 14
    assert all(isinstance(b, QuantizedLinear) for b in bases.values())
    losses = [entry["loss"] for entry in trained.history]
    assert losses[-1] < 2.6


def test_four_bits_are_one_forward_scratch_and_no_dense_weight(dev, device):
    q, plain = adapted(quantize(base(device))), adapted(base(device))
    x = ids(dev)
    kept = []
    for model in (q, plain):
        weights = [t.data for t in tensors(model).values()]
        kept.append(sum(retained(model.loss(x, x), besides=weights).values()))
    assert kept[0] == kept[1]  # no dense weight is kept for the way back


# ------------------------------------------------------------------------------- merging


def test_three_ways_to_merge(device, dev, host):
    original = base(device)
    q = adapted(quantize(original))
    before = codes(q, host)
    x = ids(dev)
    trained = host(q(x).data)
    results = {}
    for way in ("dequantized", "original", "requantized"):
        model, made = merge_quantized(q, way, original)
        assert len(made) == 14
        assert not parameters(model)
        results[way] = (model, made, np.abs(host(model(x).data) - trained).max())
    assert codes(q, host) == before  # nothing is requantized in place
    assert max(results["dequantized"][1].values()) <= 1e-6
    assert results["dequantized"][2] <= 1e-4
    for way in ("original", "requantized"):
        assert min(results[way][1].values()) > 0.01
        assert results[way][2] > 10 * results["dequantized"][2]
        node, plain = (m.blocks[1].mlp.up for m in (q, results[way][0]))
        wanted, found = host(node.base.dense() + node.delta()), host(plain.dense())
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert results[way][1]["blocks.1.mlp.up"] == pytest.approx(error, rel=1e-4)
    same = host(adapted(original)(x).data)  # those factors on the weights that were never codes
    np.testing.assert_allclose(host(results["original"][0](x).data), same, rtol=0, atol=1e-4)
    assert all(
        isinstance(n, Linear) for p, n in walk(merge(q)) if p.endswith(("query", "up", "down"))
    )


@pytest.mark.parametrize("options", [{}, {"double": False}, {"double": True, "block": 128}])
def test_scales_are_codes_too_unless_that_is_refused(options, device):
    """And what is requantized is as it was."""
    q = quantize(base(device), **options)
    again, _ = merge_quantized(adapted(q), "requantized")
    for model in (q, again):
        held = [n.weight for _, n in walk(model) if isinstance(n, QuantizedLinear)]
        assert len(held) == 14
        assert {isinstance(w.scales, DoubleScales) for w in held} == {options != {"double": False}}
        assert {(w.block, w.code.name) for w in held} == {(options.get("block", 64), "nf4")}


def test_adapters_on_other_modules_are_merged_too(dev, host):
    """The embedding's, say; and what would not be finite is named."""
    q = adapt(quantize(base()), ["all-linear", "embedding"], rank=2, rng=np.random.default_rng(0))
    for path, p in parameters(q).items():
        if path == "embedding.A":  # B of an embedding is the random one
            p.data[...] = 0.1
    model, made = merge_quantized(q)
    assert len(made) == 14
    assert not any(is_adapter(node) for _, node in walk(model))
    x = np.arange(11)[None]
    np.testing.assert_allclose(model(x).data, q(x).data, rtol=0, atol=1e-4)
    for path in ("blocks.1.mlp.up", "embedding"):
        for name, p in parameters(q).items():
            if name.startswith(path):
                p.data[0, 0] = np.inf
        with (
            np.errstate(invalid="ignore"),
            pytest.raises(NumericsError, match=f"merge_quantized: {path}"),
        ):
            merge_quantized(q)
        for name, p in parameters(q).items():
            if name.startswith(path):
                p.data[0, 0] = 0


@pytest.mark.parametrize("way, original", [("sideways", None), ("original", None)])
def test_merges_that_cannot_be_made(way, original):
    with pytest.raises(QuantError, match="expected"):
        merge_quantized(adapted(quantize(base())), way, original)
    small = init_transformer(replace(CONFIG, width=32), np.random.default_rng(0))
    with pytest.raises(QuantError, match=r"a Linear \(64, 64\) at blocks\.0\.attention\.query"):
        merge_quantized(adapted(quantize(base())), "original", small)
    with pytest.raises(QuantError, match="found none"):
        merge_quantized(adapted(base()), "dequantized")


def test_rows_with_adapters_of_their_own_are_not_merged():
    """The factors were merged one by one, into a tree that could no longer be called."""
    q = adapted(quantize(base()))
    with pytest.raises(AdapterError, match="one adapter for all rows, found 2 groups"):
        merge_quantized(mix(quantize(base()), [take(q), None]))


def test_weights_of_zero_are_merged_without_an_error(device, dev, host):
    def zero(path, node):
        return Tensor(node.data * 0) if isinstance(node, Tensor) else node

    nothing = rebuild(freeze(base(device)), zero)
    q = adapt(quantize(nothing), rank=2, rng=np.random.default_rng(0))  # B is zero, too
    for way in ("dequantized", "original", "requantized"):
        assert set(merge_quantized(q, way, nothing)[1].values()) == {0.0}
    assert distance(dev(np.ones(3, np.float32)), dev(np.zeros(3, np.float32))) == np.inf


@pytest.mark.parametrize("model", ["adapted", "quantized"])
def test_what_quantize_refuses(model):
    start = adapted(base()) if model == "adapted" else quantize(base())
    with pytest.raises(QuantError, match="expected a plain model"):
        quantize(start)


def test_a_weight_that_is_not_finite_is_named():
    model = base()
    model.blocks[1].mlp.up.weight.data[3, 5] = np.nan
    with pytest.raises(QuantError, match=r"blocks\.1\.mlp\.up: .*nan at flat 197"):
        quantize(model)


# ------------------------------------------------------------------------ the laboratory

FACTS = {  # block: mean |e|, mean |e| / |x|, RMSE (facts.md 2.4; 7 of them from bitsandbytes)
    "nf4": {32: (0.067746, 0.189726, 0.0873), 64: (0.072798, 0.203339, 0.0920),
            128: (0.076831, 0.215237, 0.0956), 4096: (0.092547, 0.262473, 0.1098)},
    "fp4": {32: (0.088925, 0.242443, None), 64: (0.096543, 0.260125, None),
            128: (0.102969, 0.275817, None), 4096: (0.129536, 0.337169, None)},
    "int4": {64: (None, None, 0.1077)},
    "int4_max": {32: (0.0717, None, 0.0859), 64: (0.0804, None, 0.0950)},
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_errors_on_a_bell_curve_are_the_published_ones(name):
    x = np.random.default_rng(0).standard_normal(1 << 21, np.float32)
    for block, wanted in FACTS[name].items():
        found = errors(x, name, block, double=False)
        for key, value in zip(("l1", "relative", "rmse"), wanted, strict=True):
            if value is not None:
                assert abs(found[key] / value - 1) <= 0.01, (block, key)


def test_usage_is_near_equal_and_its_entropy_is_the_published_one():
    x = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    for name, bits in (("nf4", 3.884), ("fp4", 3.709), ("int4", 3.499)):
        assert abs(errors(x, name, 64, False)["entropy"] - bits) <= 0.01


def test_equal_bits_are_told_honestly(tmp_path):
    """At 4.5 bits 16 integers in blocks of 32 beat NF4; at 4.13 NF4 beats them."""
    record = quantize_lab(QuantizeConfig(samples=1 << 18))
    by = {(e["code"], e["block"], e["scales"]): e for e in record["equal_bits"]}
    q40, nf4 = by["int4_max", 32, "float16"], by["nf4", 64, "float32"]
    assert q40["bits"] == nf4["bits"] == 4.5
    assert q40["rmse"] < nf4["rmse"]
    double = by["nf4", 64, "double"]
    assert abs(double["bits"] - 4.126953125) < 1e-3
    assert double["rmse"] < by["int4_max", 128, "float16"]["rmse"]
    front = frontier(record["equal_bits"])
    points = [(e["bits"], e["rmse"]) for e in record["equal_bits"]]
    assert (q40["bits"], q40["rmse"]) in front
    assert (nf4["bits"], nf4["rmse"]) not in front
    for bits, rmse in points:  # on the front, or beaten by one that is
        assert any(b <= bits and r <= rmse for b, r in front)
        assert ((bits, rmse) in front) == (not any(
            b <= bits and r <= rmse and (b, r) != (bits, rmse) for b, r in points
        ))  # fmt: skip
    text = quantize_report(record)
    assert "int4_max" in text
    assert "mlp.up.weight" in text
    for draw in (levels_figure, codes_figure):
        assert draw(record, tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"code": "nf5"}, "nf5"),
        ({"block": 63}, "63"),
        ({"tensor": "nowhere.safetensors:x"}, "nowhere"),
    ],
)
def test_laboratory_settings_of_no_meaning(options, message):
    with pytest.raises(MiniloraError, match=message):
        quantize_lab(QuantizeConfig(samples=1024, **options))


def test_a_code_with_numbers_to_spare_is_recorded_by_its_levels(tmp_path):
    """int4 has 15 levels: what no level has was NaN in the record, which then is no JSON."""
    record = quantize_lab(QuantizeConfig(code="int4", samples=1 << 12))
    json.dumps(record, allow_nan=False)
    assert len(record["levels"]) == len(record["usage"]) == 15
    assert sum(record["usage"]) == 1 << 12
    levels_figure(record, tmp_path / "q.png")


def test_a_tensor_of_whole_numbers_is_no_weight(tmp_path):
    write(tmp_path / "t.safetensors", {"w": np.arange(9, dtype=np.uint8)})
    tensor = f"{tmp_path / 't.safetensors'}:w"
    with pytest.raises(QuantError, match="expected floats in w, found uint8"):
        quantize_lab(QuantizeConfig(samples=1024, tensor=tensor))


@pytest.mark.parametrize("shape", [(0, 4), (4, 64)])
def test_a_tensor_without_a_number_but_zero_has_no_relative_error(shape, tmp_path):
    """It was NaN in the table, and in the record, which then is no JSON."""
    write(tmp_path / "t.safetensors", {"w": np.zeros(shape, np.float32)})
    tensor = f"{tmp_path / 't.safetensors'}:w"
    with pytest.raises(QuantError, match="some number but zero in w"):
        quantize_lab(QuantizeConfig(samples=1024, tensor=tensor))
