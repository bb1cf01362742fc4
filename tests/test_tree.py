"""Spaces of trees: every kind of tree has coordinates, in one order, and what does not fit is told by its path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kinds import KINDS, Layer, Pair, Ring, Stranger, TorchOnly, a, b, c
from scenarios import SCENARIOS, VECTOR_SCENARIOS, Scenario, dense_hessian, t, tensors
from torch import Tensor, nn

from functional_hess import tree as trees
from functional_hess.tree import Piece, Space, partition, register, tree_map

kinds = pytest.mark.parametrize("kind", KINDS)


def same(x: Any, y: Any) -> bool:
    """Equal structure, and equal leaves up to identity of tensors' bits."""
    xs, xspec = trees._flatten(x)
    ys, yspec = trees._flatten(y)
    alike = all(torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in zip(xs, ys, strict=True))
    return xspec == yspec and alike


# ---------------------------------------------------------------------------------------------------- what a space is


def test_twenty_kinds_of_tree_are_covered() -> None:
    assert len(KINDS) >= 20


@kinds
def test_paths_come_in_the_order_of_the_coordinates(kind: str) -> None:
    tree, paths = KINDS[kind]
    assert Space.of(tree).paths == paths


@kinds
def test_a_point_is_packed_and_put_back(kind: str) -> None:
    tree, paths = KINDS[kind]
    space = Space.of(tree)
    packed = space.pack(tree)
    assert len(packed) == len(paths)
    assert all(p.shape == s and p.dtype == d for p, s, d in zip(packed, space.shapes, space.dtypes, strict=True))
    assert same(space.at(packed), tree)
    assert type(space.at(packed)) is type(tree)


@kinds
def test_ravel_and_unravel_are_inverse(kind: str) -> None:
    tree, _ = KINDS[kind]
    space = Space.of(tree)
    vector = space.ravel(tree)
    assert vector.shape == (space.dim,) and vector.dtype == space.dtype
    back = space.unravel(vector)
    assert all(torch.equal(p, q) for p, q in zip(space.pack(back), space.pack(tree), strict=True))
    assert torch.equal(space.ravel(back), vector)


@kinds
def test_a_vector_holds_none_where_a_leaf_is_carried(kind: str) -> None:
    tree, paths = KINDS[kind]
    space = Space.of(tree)
    zeros = space.unravel(torch.zeros(space.dim, dtype=space.dtype))
    leaves = trees._flatten(zeros)[0]
    assert sum(leaf is not None for leaf in leaves) == len(paths)
    assert all(leaf is None or leaf.is_floating_point() for leaf in leaves)


@kinds
def test_matrix_and_blocks_are_inverse(kind: str) -> None:
    tree, _ = KINDS[kind]
    space = Space.of(tree)
    n = space.dim
    matrix = torch.arange(n * n, dtype=space.dtype).reshape(n, n)
    blocks = space.blocks(matrix)
    assert torch.equal(space.matrix(blocks), matrix)


@kinds
def test_coordinate_names_are_n_different_ones(kind: str) -> None:
    space = Space.of(KINDS[kind][0])
    names = list(space.coordinate_names())
    assert len(names) == len(set(names)) == space.dim


@kinds
def test_equal_trees_have_equal_spaces(kind: str) -> None:
    tree, _ = KINDS[kind]
    space = Space.of(tree)
    assert space == Space.of(space.at(space.pack(tree)))
    assert hash(space) == hash(Space.of(tree))


def test_the_order_of_the_keys_of_a_dict_does_not_matter() -> None:
    one, other = {"a": a, "b": b}, {"b": b, "a": a}
    assert torch.equal(Space.of(one).ravel(one), Space.of(one).ravel(other))
    assert torch.equal(Space.of(one).ravel(one), torch.cat([a, b.flatten()]))


def test_sizes_offsets_and_dimension_count_coordinates() -> None:
    space = Space.of({"c": c, "b": b, "e": torch.zeros(0), "a": a})
    assert (space.sizes, space.offsets, space.dim) == ((2, 3, 1, 0), (0, 2, 5, 6), 6)
    assert list(space.leaves) == [0, 1, 2, 3]


def test_a_tree_without_floating_tensors_has_dimension_zero() -> None:
    space = Space.of({"a": None, "b": 3, "c": torch.tensor([1])})
    assert space.dim == 0
    assert space.ravel({"a": None, "b": 3, "c": None}).shape == (0,)
    assert space.matrix({"a": None, "b": None, "c": None}).shape == (0, 0)
    assert list(space.coordinate_names()) == []


def test_mixed_dtypes_are_promoted_in_matrices_alone() -> None:
    tree = {"half": a.bfloat16(), "single": a.float(), "double": a}
    space = Space.of(tree)
    assert space.dtype == torch.float64
    assert Space.of({"half": a.bfloat16(), "single": a.float()}).dtype == torch.float32
    assert space.ravel(tree).dtype == torch.float64
    assert {p.dtype for p in space.pack(space.unravel(space.ravel(tree)))} == {torch.bfloat16, torch.float32, torch.float64}


def test_coordinate_names_count_row_by_row() -> None:
    space = Space.of({"w": torch.zeros(2, 2), "b": torch.zeros(()), "l": [torch.zeros(1)]})
    assert list(space.coordinate_names()) == ["b", "l.0[0]", "w[0, 0]", "w[0, 1]", "w[1, 0]", "w[1, 1]"]


def test_a_leaf_is_spelled_as_a_program_would() -> None:
    space = Space.of({"w": [a, Pair(b, c)], "layer": Layer(b, a)})
    assert [space.name_of(leaf, "v") for leaf in space.leaves] == [
        "v['layer'].weight",
        "v['layer'].bias",
        "v['w'][0]",
        "v['w'][1].first",
        "v['w'][1].second",
    ]


# ---------------------------------------------------------------------------------------------------- refusals


def error_of(call: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_a_wrong_shape_is_told_by_path() -> None:
    space = Space.of({"w": a, "l": (b, c)})
    told = error_of(lambda: space.pack({"w": t([1.0, 2.0, 3.0]), "l": (b, c)}, "tangent"))
    assert told == "tangent['w'] must have shape (2,), got (3,)."
    assert error_of(lambda: space.pack({"w": a, "l": (b, c[None])}, "tangent")) == "tangent['l'][1] must have shape (), got (1,)."


def test_a_wrong_dtype_is_told_by_path() -> None:
    told = error_of(lambda: Space.of({"w": a}).pack({"w": a.float()}, "v"))
    assert told == "v['w'] must have dtype torch.float64, got torch.float32."


def test_a_wrong_device_is_told_by_path() -> None:
    told = error_of(lambda: Space.of({"w": a}).pack({"w": a.to("meta")}, "v"))
    assert told == "v['w'] must be on cpu, got meta."


@pytest.mark.parametrize("leaf", [None, 3.0, "text", np.zeros(2)], ids=lambda leaf: type(leaf).__name__)
def test_what_is_no_tensor_is_told_by_path(leaf: Any) -> None:
    told = error_of(lambda: Space.of({"w": a}).pack({"w": leaf}, "v"), TypeError)
    assert told == f"v['w'] must be a tensor, got {type(leaf).__name__}."


def test_all_differences_of_structure_are_told_at_once() -> None:
    space = Space.of({"a": a, "b": b, "c": {"d": c}})
    told = error_of(lambda: space.pack({"a": a, "x": b, "c": {"e": c, "f": c}}, "v"))
    assert told == (
        "v must have the same structure as the point: missing v['b'], v['c']['d']; unexpected v['c']['e'], v['c']['f'], v['x']."
    )


def test_all_differences_of_leaves_are_told_at_once() -> None:
    space = Space.of({"a": a, "b": b, "n": 3})
    wrong = {"a": a[:1].float(), "b": b.float(), "n": a}
    expected = (
        f"v['a'] must have shape {tuple(a.shape)}, got (1,); v['a'] must have dtype torch.float64, got torch.float32; "
        "v['b'] must have dtype torch.float64, got torch.float32; "
        "v['n'] must be None, got a tensor: that leaf of x is not a floating tensor"
    )
    assert error_of(lambda: space.pack(wrong, "v")) == f"{expected}."
    told = error_of(lambda: space.pack({**wrong, "c": c}, "v"))
    assert told == f"v must have the same structure as the point: unexpected v['c']; {expected}."
    assert (
        error_of(lambda: space.pack({**wrong, "b": 1.0}, "v"), TypeError).split("; ")[2] == "v['b'] must be a tensor, got float"
    )


def test_containers_that_differ_are_told() -> None:
    told = error_of(lambda: Space.of((a, {"in": (b, c)})).pack([a, {"in": [b, c]}], "v"))
    assert (
        told == "v must have the same structure as the point: v must be a tuple, got list; v[1]['in'] must be a tuple, got list."
    )
    assert "v[1] must be a tuple, got dict" in error_of(lambda: Space.of((a, ())).pack((a, {}), "v"))
    assert "what its containers hold beside leaves differs" in error_of(
        lambda: Space.of(Ring([a], "one")).pack(Ring([a], "two"), "v")
    )


def test_a_tangent_of_a_carried_leaf_is_refused() -> None:
    told = error_of(lambda: Space.of({"n": 3, "w": a}).pack({"n": t(1.0), "w": a}, "v"))
    assert told == "v['n'] must be None, got a tensor: that leaf of x is not a floating tensor."


@pytest.mark.parametrize("stand_in", [None, 7, "other", torch.tensor([1, 2])], ids=str)
def test_anything_else_may_stand_for_a_carried_leaf(stand_in: Any) -> None:
    (w,) = Space.of({"n": torch.tensor([3, 4]), "w": a}).pack({"n": stand_in, "w": a})
    assert w is a


def test_a_complex_leaf_is_refused_by_path() -> None:
    told = error_of(lambda: Space.of({"z": [torch.zeros(2, dtype=torch.complex64)]}), TypeError)
    assert told.startswith("x['z'][0] is complex") and "view_as_real" in told


def test_a_sparse_leaf_is_refused_by_path() -> None:
    told = error_of(lambda: Space.of({"s": torch.eye(2).to_sparse()}, "params"), TypeError)
    assert told.startswith("params['s'] has layout torch.sparse_coo") and "to_dense" in told


def test_an_unregistered_dataclass_is_refused() -> None:
    told = error_of(lambda: Space.of({"s": Stranger(a)}), TypeError)
    assert told.startswith("x['s'] is a Stranger") and "functional_hess.register(Stranger)" in told


def test_a_class_that_only_torch_knows_is_refused() -> None:
    told = error_of(lambda: Space.of((TorchOnly(a),)), TypeError)
    assert told.startswith("x[0] is a TorchOnly") and "functional_hess.register(TorchOnly)" in told


def test_register_needs_a_dataclass_or_two_functions() -> None:
    class Plain:
        pass

    assert "flatten= and unflatten=" in error_of(lambda: register(Plain), TypeError)
    assert "flatten= and unflatten=" in error_of(lambda: register(Plain, flatten=lambda p: ((), None)), TypeError)


def test_register_leaves_out_fields_that_init_does_not_take() -> None:
    @register
    @dataclasses.dataclass
    class WithCount:
        w: Tensor
        count: int = dataclasses.field(init=False, default=0)

    space = Space.of(WithCount(a))
    assert space.paths == ("w",)
    assert torch.equal(space.at((2 * a,)).w, 2 * a)


def test_a_class_object_is_an_ordinary_leaf() -> None:
    assert Space.of({"kind": Layer, "w": a}).paths == ("w",)


def test_vectors_and_matrices_of_another_dimension_are_refused() -> None:
    space = Space.of({"w": a})
    assert error_of(lambda: space.unravel(torch.zeros(3))) == "vector must have shape (2,), got (3,)."
    assert error_of(lambda: space.blocks(torch.zeros(2, 3))) == "matrix must have shape (2, 2), got (2, 3)."
    told = error_of(lambda: space.matrix({"w": {"w": torch.zeros(2, 3)}}))
    assert told == "H['w']['w'] must have shape (2, 2), got (2, 3)."
    assert error_of(lambda: space.matrix({"w": {"w": None}})) == "H['w']['w'] must have shape (2, 2), got NoneType."
    assert error_of(lambda: space.matrix({"w": {"v": None}})).startswith("H['w'] must have the structure of x")
    assert error_of(lambda: space.matrix(torch.zeros(2))).startswith("H must have the structure of x")


# ---------------------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_the_matrix_of_hand_written_blocks_is_the_dense_hessian(scenario: Scenario) -> None:
    space = Space.of(scenario.x)
    assert torch.equal(space.matrix(scenario.hessian), dense_hessian(scenario))
    blocks = space.blocks(dense_hessian(scenario))
    assert same(blocks, scenario.hessian)


def test_blocks_are_views_of_the_matrix() -> None:
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    blocks = Space.of({"w": a, "c": c}).blocks(matrix)
    matrix[0, 2] = 5.0
    assert torch.equal(blocks["c"]["w"], t([0.0, 5.0]))
    assert blocks["c"]["c"].shape == () and blocks["w"]["c"].shape == (2,)


def test_blocks_of_a_mixed_space_have_the_wider_dtype_of_their_leaves() -> None:
    blocks = Space.of({"f": a.float(), "h": a.bfloat16()}).blocks(torch.eye(4))
    assert {p: {q: blocks[p][q].dtype for q in "fh"} for p in "fh"} == {
        "f": {"f": torch.float32, "h": torch.float32},
        "h": {"f": torch.float32, "h": torch.bfloat16},
    }


# ---------------------------------------------------------------------------------------------------- vectors

SPACE = Space.of({"w": torch.zeros(2, 3), "e": torch.zeros(0), "b": torch.zeros(()), "u": torch.zeros(4)})  # b, e, u, w: n = 11


@pytest.mark.parametrize(
    "rows",
    [range(11), range(0), range(3, 8), range(0, 11, 2), range(1, 11, 3), range(4, 11, 7), range(1), [10, 0, 3], [5, 5, 1], []],
    ids=str,
)
def test_one_hot_vectors_are_rows_of_the_identity(rows: Any) -> None:
    pieces = SPACE.pieces(rows)
    assert sum(map(len, pieces)) == len(rows)
    one_hot = SPACE.one_hot(pieces)
    assert set(one_hot) == {SPACE.leaf_of(row) for row in rows}
    dense = torch.zeros(len(rows), 11)
    for leaf, vector in one_hot.items():
        assert vector.shape == (len(rows), *SPACE.shapes[leaf])
        dense[:, SPACE.offsets[leaf] : SPACE.offsets[leaf] + SPACE.sizes[leaf]] = vector.reshape(len(rows), -1)
    assert torch.equal(dense, torch.eye(11)[list(rows)])


def test_backward_ranges_are_rows_too() -> None:
    rows = range(10, -1, -1)
    one_hot = SPACE.one_hot(SPACE.pieces(rows))
    assert torch.equal(torch.cat([one_hot[leaf].reshape(11, -1) for leaf in sorted(one_hot)], 1), torch.eye(11).flip(0))


def test_pieces_are_cut_where_the_leaf_changes() -> None:
    assert SPACE.pieces(range(6)) == [Piece(0, range(1)), Piece(2, range(4)), Piece(3, range(1))]
    assert SPACE.pieces([4, 2, 5]) == [Piece(2, [3, 1]), Piece(3, [0])]
    assert SPACE.pieces(range(2, 11, 4)) == [Piece(2, range(1, 4, 4)), Piece(3, range(1, 6, 4))]


@pytest.mark.parametrize("row", [-1, 11])
def test_a_row_out_of_range_is_refused(row: int) -> None:
    told = error_of(lambda: SPACE.pieces([row]), IndexError)
    assert told == f"row {row} is out of range for 11 coordinates, which are numbered from 0."


@pytest.mark.parametrize("span", [(0, None), (0, 11), (2, 7), (5, 5), (9, 40)], ids=str)
def test_the_basis_is_the_identity(span: tuple[int, int | None]) -> None:
    basis = SPACE.basis(*span)
    dense = torch.cat([leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None] for leaf in SPACE_LEAVES(basis)], 1)
    assert torch.equal(dense, torch.eye(11)[slice(*span)])


def SPACE_LEAVES(tree: dict[str, Tensor]) -> list[Tensor]:
    return [tree[k] for k in sorted(tree)]


def test_the_basis_of_a_mixed_space_has_the_dtypes_of_the_leaves() -> None:
    basis = Space.of({"d": a, "h": a.bfloat16(), "n": 3}).basis()
    assert basis["d"].dtype == torch.float64 and basis["h"].dtype == torch.bfloat16 and basis["n"] is None


def test_random_vectors_come_from_their_generator_alone(generator: torch.Generator) -> None:
    before = torch.get_rng_state()
    space = Space.of({"w": b, "n": 3, "h": a.bfloat16(), "e": torch.zeros(0)})
    draws = [space.random(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert same(draws[0], draws[1]) and not same(draws[0], draws[2])
    assert draws[0]["n"] is None and draws[0]["h"].dtype == torch.bfloat16
    assert torch.equal(before, torch.get_rng_state())
    many = Space.of(torch.zeros(20000, dtype=torch.float64)).random(generator)
    assert abs(float(many.mean())) < 0.05 and abs(float(many.std()) - 1) < 0.05


class Odd(nn.Module):
    """Parameters whose names do not come in sorted order."""

    def __init__(self) -> None:
        super().__init__()
        self.zeta = nn.Linear(3, 2)
        self.alpha = nn.Parameter(torch.arange(4.0))
        self.mid = nn.ModuleList([nn.Linear(1, 1) for _ in range(11)])


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 2),
        nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)]),
        nn.LSTM(2, 3),
        nn.MultiheadAttention(4, 2),
        Odd(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_parameter_order_leads_to_parameters_to_vector(module: nn.Module) -> None:
    params = {k: p.detach() for k, p in module.named_parameters()}
    space = Space.of(params)
    vector = torch.nn.utils.parameters_to_vector(list(module.parameters())).detach()
    assert torch.equal(space.ravel(params)[space.parameter_order()], vector)


@kinds
def test_parameter_order_is_a_permutation(kind: str) -> None:
    space = Space.of(KINDS[kind][0])
    assert sorted(space.parameter_order().tolist()) == list(range(space.dim))


def test_parameter_order_sees_dicts_inside_other_nodes() -> None:
    tree = ({"b": t([1.0]), "a": t([2.0, 3.0])}, Layer(t([4.0]), t([5.0])), Pair({"z": c, "y": c}, 3))
    assert Space.of(tree).parameter_order().tolist() == [2, 0, 1, 3, 4, 6, 5]


# ---------------------------------------------------------------------------------------------------- partition


NET = {"body": [{"w": a, "b": c}, {"w": b, "b": c}], "head": {"w": b, "b": a}, "steps": 3}


@pytest.mark.parametrize(
    ("choose", "chosen"),
    [
        ("head.*", {"head.b", "head.w"}),
        ("*.w", {"body.0.w", "body.1.w", "head.w"}),
        (["body.0.*", "head.b"], {"body.0.b", "body.0.w", "head.b"}),
        ("body.[01].b", {"body.0.b", "body.1.b"}),
        (lambda path, leaf: isinstance(leaf, Tensor) and leaf.dim() == 2, {"body.1.w", "head.w"}),
        (lambda path, leaf: path.startswith("steps"), {"steps"}),
    ],
    ids=["glob", "suffix", "globs", "class", "predicate", "an int"],
)
def test_partition_chooses_leaves_and_merge_puts_them_back(choose: Any, chosen: set[str]) -> None:
    part, merge = partition(NET, choose)
    paths, leaves = trees.paths(part), trees._flatten(part)[0]
    assert {path for path, leaf in zip(paths, leaves, strict=True) if leaf is not None} == chosen
    assert same(merge(part), NET)
    doubled = merge(tree_map(lambda leaf: 2 * leaf, part))
    for path, new, old in zip(paths, trees._flatten(doubled)[0], trees._flatten(NET)[0], strict=True):
        assert torch.equal(torch.as_tensor(new), torch.as_tensor(2 * old if path in chosen else old))


def test_a_partition_that_chooses_nothing_is_refused() -> None:
    told = error_of(lambda: partition({"w": a, "b": c}, "*.weight"))
    assert told == "partition: '*.weight' chose no leaf; the paths are 'b', 'w'."


def test_merge_refuses_another_structure() -> None:
    _, merge = partition({"w": a, "b": c}, "w")
    assert "missing chosen['b']" in error_of(lambda: merge({"w": a}))


def test_merge_ignores_what_stands_in_places_not_chosen() -> None:
    _, merge = partition({"w": a, "b": c}, "w")
    assert same(merge({"w": b, "b": t(100.0)}), {"w": b, "b": c})


# ---------------------------------------------------------------------------------------------------- arithmetic


def test_arithmetic_is_leaf_by_leaf() -> None:
    x, y = {"w": a, "n": None, "p": (c,)}, {"w": 3 * a, "n": None, "p": (t(1.0),)}
    assert same(trees.add(x, y), {"w": 4 * a, "n": None, "p": (t(7.0),)})
    assert same(trees.sub(x, y), {"w": -2 * a, "n": None, "p": (t(5.0),)})
    assert same(trees.scale(2.0, x), {"w": 2 * a, "n": None, "p": (t(12.0),)})
    assert same(trees.scale(t(0.5), x), {"w": a / 2, "n": None, "p": (t(3.0),)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_from_a_point_along_a_vector_is_a_point(kind: str) -> None:
    """Whose carried leaves are the point's: a vector holds `None` there, or anything else that is no coordinate."""
    x = KINDS[kind][0]
    space = Space.of(x)
    ones = [torch.ones_like(t) for t in space.pack(x)]
    for v in (space.unpack(ones), space.at(ones)):
        moved, back = trees.add(x, trees.scale(0.5, v)), trees.sub(x, trees.scale(0.5, v))
        assert same(moved, space.at([t + 0.5 for t in space.pack(x)])) and same(back, space.at([t - 0.5 for t in space.pack(x)]))
    assert same(trees.scale(3.0, space.unpack(ones)), space.unpack([3 * t for t in ones]))


def test_dot_and_norm_run_over_all_coordinates() -> None:
    x, y = {"w": a, "n": 3, "p": (c,)}, {"w": t([10.0, 100.0]), "n": None, "p": (t(0.5),)}
    assert float(trees.dot(x, y)) == 10.0 + 200.0 + 3.0
    assert float(trees.norm({"w": t([3.0]), "v": t([[0.0, 4.0]])})) == 5.0
    assert float(trees.dot({"n": 3}, {"n": 4})) == 0.0
    assert "b['w'] must have shape" in error_of(lambda: trees.dot({"w": a}, {"w": b}))


def test_tree_map_keeps_none_and_refuses_other_structures() -> None:
    assert tree_map(lambda p, q: p + q, [1, None, (2,)], [10, None, (20,)]) == [11, None, (22,)]
    with pytest.raises(ValueError):
        tree_map(lambda p, q: p, (1, 2), (1,))


def test_a_prefix_speaks_for_its_subtrees() -> None:
    tree = {"a": (1, 2), "b": [3, {"c": 4}]}
    assert trees.broadcast_prefix({"a": 0, "b": None}, tree, "in_dims") == [0, 0, None, None]
    assert trees.broadcast_prefix({"a": (0, 1), "b": 5}, tree, "in_dims") == [0, 1, 5, 5]
    assert error_of(lambda: trees.broadcast_prefix({"a": 0}, tree, "in_dims")).startswith(
        "in_dims must be an int, None or a prefix"
    )


def test_tensors_of_takes_every_dtype_and_lets_go_of_the_tree() -> None:
    tree = {"n": torch.tensor([1]), "w": a, "s": "text", "z": torch.zeros(1, dtype=torch.complex64)}
    found, rebuild = trees.tensors_of(tree)
    assert len(found) == 3
    assert same(rebuild(found), tree)
    assert same(rebuild((1, 2, 3)), {"n": 1, "w": 2, "s": "text", "z": 3})


def test_flat_keeps_leading_dimensions() -> None:
    x = torch.zeros(2, 3, 0, 4)
    assert trees.flat(x).shape == (2, 0) and trees.flat(x, 2).shape == (2, 3, 0)
    assert trees.flat(torch.zeros(5)).shape == (5, 1)


@pytest.mark.parametrize("scenario", SCENARIOS + VECTOR_SCENARIOS, ids=str)
def test_coordinates_come_in_the_order_of_the_table(scenario: Scenario) -> None:
    space = Space.of(scenario.x)
    assert space.dim == scenario.n
    assert torch.equal(space.ravel(scenario.x), torch.cat([leaf.flatten() for leaf in tensors(scenario.x)]))
