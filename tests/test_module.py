"""Trees: walked, rebuilt with sharing, frozen as live views, printed."""

import numpy as np
import pytest

from minilora import (
    Parameter,
    Tensor,
    TransformerConfig,
    count,
    freeze,
    init_transformer,
    module,
    parameters,
    rebuild,
    summary,
    to_device,
    unfreeze,
    walk,
)
from minilora.engine.errors import AdapterError
from minilora.lora.lora import is_adaptable
from minilora.model.module import cast, tensors
from minilora.model.targets import select


@module
class Leaf:
    w: Tensor
    size: int = 3


@module
class Tree:
    first: Leaf
    rest: tuple
    table: list
    other: Tensor | None = None


@pytest.fixture
def tree(dev):
    array = lambda *shape: dev(np.ones(shape, np.float32))
    tied = Parameter(array(2, 3))
    return Tree(Leaf(tied), (Leaf(Tensor(array(4))), Leaf(tied)), [Tensor(array(1))])


def test_paths_read_as_one_would_write_them(tree):
    paths = [path for path, node in walk(tree) if isinstance(node, Tensor)]
    assert paths == ["first.w", "rest.0.w", "rest.1.w", "table.0"]
    assert list(tensors(tree)) == ["first.w", "rest.0.w", "table.0"]  # a tied one once
    assert list(parameters(tree)) == ["first.w"]
    assert count(tree) == 6 + 4 + 1
    assert count(tree, trainable=True) == 6


def test_rebuild_shares_what_it_does_not_replace_and_keeps_ties(tree):
    assert rebuild(tree, lambda _, node: node) is tree
    tied = tree.first.w
    new = Parameter(tied.data * 2)
    visits = []

    def visit(path, node):
        visits.append(path)
        return new if node is tied else node

    other = rebuild(tree, visit)
    assert other.first.w is other.rest[1].w is new
    assert other.rest[0] is tree.rest[0]
    assert other.table is tree.table
    assert tree.first.w is tied
    assert len(visits) == len(set(visits))
    assert visits.count("first.w") + visits.count("rest.1.w") == 1


def test_a_replaced_node_is_not_entered(tree):
    visits = []

    def visit(path, node):
        visits.append(path)
        return None if path == "rest" else node

    assert rebuild(tree, visit).rest is None
    assert not any(path.startswith("rest.") for path in visits)


def test_modules_are_frozen_and_compared_by_identity(tree):
    with pytest.raises(AttributeError):
        tree.first = None
    assert tree.first != Leaf(tree.first.w)
    assert len({tree.first, Leaf(tree.first.w)}) == 2


def test_freeze_is_a_live_view_and_unfreeze_goes_back(tree):
    frozen = freeze(tree)
    assert not parameters(frozen)
    assert frozen.first.w is frozen.rest[1].w
    tree.first.w.data[...] = 7
    assert frozen.first.w.data[0, 0] == 7
    again = unfreeze(frozen)
    assert set(parameters(again)) == {"first.w", "rest.0.w", "table.0"}
    assert again.first.w.data is tree.first.w.data
    assert set(parameters(unfreeze(frozen, lambda path: "table" in path))) == {"table.0"}


def test_moving_and_casting_keep_ties_and_kinds(tree, device):
    for moved in (to_device(tree, "cpu"), to_device(to_device(tree, "cpu"), device)):
        assert moved.first.w is moved.rest[1].w
        assert isinstance(moved.first.w, Parameter)
    assert to_device(tree, device).first.w.data is tree.first.w.data  # nothing to move
    wide = cast(tree, np.float64)
    assert {t.dtype for t in tensors(wide).values()} == {np.dtype(np.float64)}
    assert wide.first.w is wide.rest[1].w
    assert tree.first.w.dtype == np.float32


def test_summary_shows_shapes_counts_and_what_trains():
    config = TransformerConfig(vocab=7, width=8, layers=3, heads=2)
    model = init_transformer(config, np.random.default_rng(0))
    text = summary(model)
    assert repr(model) == text
    assert f"Transformer: {count(model):,} ({count(model):,} train)" in text
    assert "0 Block x 3" in text
    assert "weight (8, 8) float32 trains" in text
    assert f"Transformer: {count(model):,} (0 train)" in summary(freeze(model))
    assert "frozen" in summary(freeze(model))
    assert all(len(line) <= 100 for line in text.splitlines())


def test_summary_keeps_neighbors_of_another_kind_apart():
    """By the type of a module, by dtype, and by arrays that are no Tensors, as codes are."""

    @module
    class One:
        weight: Tensor
        codes: np.ndarray | None = None

    @module
    class Other:
        weight: Tensor
        codes: np.ndarray | None = None

    single, double = (Tensor(np.ones(2, kind)) for kind in (np.float32, np.float64))
    assert "One x 2" in summary([One(single), One(single)])
    for pair in (
        [One(single), Other(single)], [One(single), One(double)],
        [One(single, np.zeros(2, np.uint8)), One(single, np.zeros(3, np.uint8))],
    ):  # fmt: skip
        assert " x 2" not in summary(pair)


def test_summary_line_by_line(tree):
    assert summary(tree).splitlines() == [
        "Tree: 11 (6 train)",
        "  first Leaf: 6 (6 train)",
        "    w (2, 3) float32 trains",
        "  rest tuple: 10 (6 train)",
        "    0 Leaf: 4 (0 train)",
        "      w (4,) float32 frozen",
        "    1 Leaf: 6 (6 train)",
        "      w (2, 3) float32 trains",
        "  table list: 1 (0 train)",
        "    0 (1,) float32 frozen",
    ]


# ----------------------------------------------------------------------------- targets


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(vocab=7, width=8, layers=2, heads=2)
    return freeze(init_transformer(config, np.random.default_rng(0)))


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("all-linear", 14),
        ("query", 2),
        (["query", "value"], 4),
        ("attention.query", 2),
        ("blocks.1.mlp.up", 1),
        ("blocks.*.up", 2),
        ("blocks.0.*", 7),
        ("*", 15),
        ("head", 1),
        (["all-linear", "head"], 15),
    ],
)
def test_targets(targets, expected, model):
    chosen = select(model, targets)
    assert len(chosen) == expected
    assert chosen == [path for path, _ in walk(model) if path in set(chosen)]


def test_all_linear_is_no_embedding_where_those_fit(model):
    assert select(model, "all-linear", is_adaptable) == select(model, "all-linear")
    assert select(model, ["query", "embedding"], is_adaptable) == [
        "embedding", "blocks.0.attention.query", "blocks.1.attention.query",
    ]  # fmt: skip


@pytest.mark.parametrize("targets", [
    "quer", "ery", "blocks.9.mlp.up", "que?y", "[q]uery", "*que?y", "*[q]uery", "",
])  # fmt: skip
def test_targets_that_match_nothing_list_what_there_is(targets, model):
    there = r"matches nothing; there are: down, gate, head, key, output, query, up, value \(as in "
    with pytest.raises(AdapterError, match=there + r"blocks\.0\.attention\.query\)$"):
        select(model, targets)
    with pytest.raises(AdapterError, match="there are: none at all"):
        select(Leaf(Tensor(np.ones(1))), targets)
    with pytest.raises(AdapterError, match="at least one"):
        select(model, [])
