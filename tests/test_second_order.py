"""The Hessian and its parts: every entry where it belongs, in every mode, in chunks of every size."""

from __future__ import annotations

import builtins
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import network, numbers
from oracles import hessian as oracle_hessian
from oracles import matrix, relative_error
from scenarios import (
    SCENARIOS,
    VECTOR_SCENARIOS,
    by_name,
    dense_hessian,
    leaves,
    rebuild,
    tensors,
)
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from functional_hess import (
    DependenceError,
    RandomnessError,
    Space,
    explain,
    grad,
    hessian,
    hessian_blocks,
    hessian_diagonal,
    hessian_rows,
    value_grad_and_hessian,
)
from functional_hess.products import MODES

FORWARD, REVERSE, DOUBLE, DIFFERENCE = MODES
CHUNKS: tuple[Any, ...] = (1, 2, 7, None, "auto")
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
every_vector_scenario = pytest.mark.parametrize("scenario", VECTOR_SCENARIOS, ids=str)
every_mode = pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE, DOUBLE, "fastest"])
VERBS = (hessian, value_grad_and_hessian, hessian_rows, hessian_blocks, hessian_diagonal)
every_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)


def run(verb: Callable[..., Any], f: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of a verb, a stream exhausted."""
    result = verb(f, **options)(*args)
    return [*result] if isinstance(result, Iterator) else result


def assembled(stream: Sequence[tuple[Sequence[int], Tensor]], n: int) -> tuple[list[int], Tensor]:
    """The row numbers of a stream in the order they came, and the rows."""
    numbers = [i for rows, _ in stream for i in rows]
    return numbers, torch.cat([values for _, values in stream]) if stream else torch.zeros(0, n, dtype=torch.float64)


def cube(x: Tensor) -> Tensor:
    return (x**3).sum()


class OldStyle(torch.autograd.Function):
    """x^3 without setup_context: only plain autograd can enter it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * 3 * ctx.saved_tensors[0] ** 2


# The table ------------------------------------------------------------------------------------------------------------


@every_scenario
@every_mode
def test_hessian_is_the_hessian_by_hand_whatever_the_chunk(scenario, mode):
    for chunk_size in CHUNKS:
        H = hessian(scenario.f, mode=mode, chunk_size=chunk_size)(scenario.x, *scenario.args)
        assert relative_error(H, scenario.hessian) < 1e-13


@every_scenario
@every_mode
def test_every_block_is_computed_where_symmetry_is_not_assumed(scenario, mode):
    for chunk_size in (2, None):
        H = hessian(scenario.f, mode=mode, chunk_size=chunk_size, symmetric=False)(scenario.x, *scenario.args)
        assert relative_error(H, scenario.hessian) < 1e-13


@every_scenario
@every_mode
def test_value_gradient_and_hessian_are_all_three(scenario, mode):
    for chunk_size in (2, "auto"):
        value, g, H = value_grad_and_hessian(scenario.f, mode=mode, chunk_size=chunk_size)(scenario.x, *scenario.args)
        assert relative_error(value, scenario.value) < 1e-13 and relative_error(g, scenario.gradient) < 1e-13
        assert relative_error(H, scenario.hessian) < 1e-13 and not value.requires_grad


@every_scenario
@every_mode
def test_rows_are_the_rows_of_the_matrix_in_order(scenario, mode):
    for chunk_size in CHUNKS:
        stream = run(hessian_rows, scenario.f, scenario.x, *scenario.args, mode=mode, chunk_size=chunk_size)
        order, rows = assembled(stream, scenario.n)
        assert order == list(range(scenario.n)) and all(len(which) == len(values) for which, values in stream)
        assert relative_error(rows, dense_hessian(scenario)) < 1e-13
        if isinstance(chunk_size, int):
            assert all(len(which) <= chunk_size for which, _ in stream)


@every_scenario
@every_mode
def test_diagonal_is_the_diagonal_of_the_matrix(scenario, mode):
    parts = iter(dense_hessian(scenario).diagonal().split([t.numel() for t in tensors(scenario.x)]))
    expected = rebuild(scenario.gradient, (next(parts).reshape(t.shape) for t in tensors(scenario.x)))
    for chunk_size in CHUNKS:
        diagonal = hessian_diagonal(scenario.f, mode=mode, chunk_size=chunk_size)(scenario.x, *scenario.args)
        assert relative_error(diagonal, expected) < 1e-13


@every_scenario
@every_mode
def test_blocks_are_the_diagonal_blocks_and_any_pair(scenario, mode):
    points, dense = tensors(scenario.x), dense_hessian(scenario)
    names = Space.of(scenario.x).paths
    sizes = [t.numel() for t in points]
    by_pair = {
        (names[p], names[q]): block.reshape(points[p].shape + points[q].shape)
        for p, rows in enumerate(dense.split(sizes))
        for q, block in enumerate(rows.split(sizes, 1))
    }
    diagonal = rebuild(scenario.gradient, iter([by_pair[name, name] for name in names]))
    for chunk_size in CHUNKS:
        blocks = hessian_blocks(scenario.f, mode=mode, chunk_size=chunk_size)(scenario.x, *scenario.args)
        assert relative_error(blocks, diagonal) < 1e-13
        every = hessian_blocks(scenario.f, pairs=[("*", "*")], mode=mode, chunk_size=chunk_size)(scenario.x, *scenario.args)
        assert relative_error(every, by_pair) < 1e-13


@every_scenario
def test_differences_are_close(scenario):
    H = hessian(scenario.f, mode=DIFFERENCE, chunk_size=2)(scenario.x, *scenario.args)
    assert relative_error(H, scenario.hessian) < 1e-8


@every_vector_scenario
@pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE, "fastest"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_vector_valued_function_has_a_hessian_for_each_output(scenario, mode, symmetric):
    for chunk_size in CHUNKS:
        H = hessian(scenario.f, mode=mode, chunk_size=chunk_size, symmetric=symmetric)(scenario.x, *scenario.args)
        assert relative_error(H, scenario.hessian) < 1e-13


@every_vector_scenario
@pytest.mark.parametrize(("mode", "tolerance"), [(DOUBLE, 1e-13), (DIFFERENCE, 1e-8)])
def test_a_vector_valued_function_has_them_in_the_modes_that_no_batch_can_enter(scenario, mode, tolerance):
    for chunk_size in (2, "auto"):
        H = hessian(scenario.f, mode=mode, chunk_size=chunk_size)(scenario.x, *scenario.args)
        assert relative_error(H, scenario.hessian) < tolerance


def test_a_vector_valued_function_falls_back_as_a_scalar_one_does(caplog):
    x = numbers(3)
    expected = torch.zeros(3, 3, 3, dtype=torch.float64)
    expected[range(3), range(3), range(3)] = 6 * x
    for f in (OldStyle.apply, lambda x: checkpoint(lambda x: x**3, x, use_reentrant=False)):
        assert relative_error(hessian(lambda x, f=f: f(x), chunk_size=2)(x), expected) < 1e-14
        assert explain(hessian(lambda x, f=f: f(x)), x).mode == DOUBLE
    told = explain(hessian(lambda x: F.layer_norm(x, (3,), x)), x)
    assert told.mode == REVERSE and told.repairs == ("layer_norm",)


@every_scenario
@pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE])
def test_blocks_have_their_places_under_a_batch_and_with_a_graph_too(scenario, mode):
    points = tensors(scenario.x)

    def of_leaves(*given: Tensor) -> Any:
        H = hessian(scenario.f, mode=mode, chunk_size=2)(rebuild(scenario.x, iter(given)), *scenario.args)
        return tensors(H)

    expected = tensors(scenario.hessian)
    batched = torch.func.vmap(of_leaves)(*(torch.stack([t, t]) for t in points))
    assert relative_error(tuple(block[1] for block in batched), expected) < 1e-13
    watched = of_leaves(*(t.clone().requires_grad_() for t in points))
    assert relative_error(watched, expected) < 1e-13


def test_a_function_that_returns_a_tree_has_a_hessian_for_each_leaf_of_it():
    two, scaled = by_name("two_monomials"), by_name("weighted_gram_matrix")

    def f(x: Any) -> Any:
        return {"name": "carried", "b": (two.f(x["two"]), scaled.f(x["gram"])), "a": cube(x["two"])}

    H = hessian(f)({"two": two.x, "gram": scaled.x})
    assert H["name"] is None and set(H) == {"name", "a", "b"}
    assert relative_error(H["b"][0]["two"]["two"], two.hessian) < 1e-13
    assert relative_error(H["b"][1]["gram"]["gram"], scaled.hessian) < 1e-13
    assert relative_error(H["b"][0]["two"]["gram"], torch.zeros(2, 3, 2, 3, dtype=torch.float64)) == 0
    assert relative_error(H["a"]["two"]["two"], torch.diag(6 * two.x)) < 1e-13


@every_verb
@every_vector_scenario
def test_the_parts_of_a_hessian_belong_to_a_scalar_function(verb, scenario):
    if verb is hessian:
        assert run(verb, scenario.f, scenario.x) is not None
        return
    with pytest.raises(TypeError, match=r"f must return a scalar tensor \(shape \(\)\), got a tensor of shape"):
        run(verb, scenario.f, scenario.x)


def test_the_matrix_of_the_blocks_is_the_matrix_by_hand():
    for scenario in SCENARIOS:
        H = hessian(scenario.f)(scenario.x, *scenario.args)
        assert relative_error(Space.of(scenario.x).matrix(H), dense_hessian(scenario)) < 1e-13


# Orientation ----------------------------------------------------------------------------------------------------------

FIELD = torch.tensor([[1.0, 2.0, 3.0], [4.0, -5.0, 6.0], [-7.0, 8.0, 9.0]], dtype=torch.float64)


class Field(torch.autograd.Function):
    """A function whose derivative is declared to be Ax with an asymmetric A: the derivative of entry p by x_q is A_pq."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * (FIELD @ ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return (FIELD @ ctx.saved_tensors[0]) @ tangent


@every_mode
def test_an_asymmetric_hessian_has_the_derivative_of_the_gradient_of_its_first_leaf(mode):
    def f(x: Any) -> Tensor:
        return Field.apply(torch.cat([x["b"], x["a"].reshape(1)]))

    x = {"b": numbers(2), "a": numbers(1, seed=1)[0]}
    expected = {
        "b": {"b": FIELD[:2, :2], "a": FIELD[:2, 2]},
        "a": {"b": FIELD[2, :2], "a": FIELD[2, 2]},
    }
    for chunk_size in CHUNKS:
        assert relative_error(hessian(f, symmetric=False, mode=mode, chunk_size=chunk_size)(x), expected) < 1e-14
        out = torch.full((3, 3), float("nan"), dtype=torch.float64)
        hessian(f, symmetric=False, mode=mode, chunk_size=chunk_size, out=out)(x)
        by_key = FIELD[[2, 0, 1]][:, [2, 0, 1]]  # a before b
        assert relative_error(out, by_key) < 1e-14


@pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE])
def test_an_asymmetric_hessian_keeps_its_orientation_under_a_batch_and_with_a_graph(mode):
    def f(x: Any) -> Tensor:
        return Field.apply(torch.cat([x["b"], x["a"].reshape(1)]))

    x = {"b": numbers(2), "a": numbers(1, seed=1)[0]}
    expected = {"b": {"b": FIELD[:2, :2], "a": FIELD[:2, 2]}, "a": {"b": FIELD[2, :2], "a": FIELD[2, 2]}}
    batched = {key: t.expand(2, *t.shape) for key, t in x.items()}
    H = torch.func.vmap(hessian(f, symmetric=False, mode=mode))(batched)
    assert relative_error({p: {q: H[p][q][1] for q in x} for p in x}, expected) < 1e-14
    watched = {key: t.clone().requires_grad_() for key, t in x.items()}
    assert relative_error(hessian(f, symmetric=False, mode=mode, chunk_size=1)(watched), expected) < 1e-14


@pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE])
def test_a_vector_of_asymmetric_hessians_keeps_its_orientation(mode):
    def f(x: Tensor) -> Tensor:
        return torch.stack([Field.apply(x), 2 * Field.apply(x)])

    H = hessian(f, symmetric=False, mode=mode)(numbers(3))
    assert relative_error(H, torch.stack([FIELD, 2 * FIELD])) < 1e-14


@pytest.mark.parametrize("mode", ["auto", REVERSE, DOUBLE])
def test_rows_of_an_asymmetric_hessian_are_its_rows_in_reverse(mode):
    rows = torch.cat([values for _, values in hessian_rows(Field.apply, mode=mode, chunk_size=2)(numbers(3))])
    assert relative_error(rows, FIELD) < 1e-14


# Rows -----------------------------------------------------------------------------------------------------------------

CHOICES = {
    "a range": range(1, 4),
    "a range with a step": range(0, 6, 2),
    "a range downwards": range(5, -1, -2),
    "a slice of a range": range(6)[1:5:3],
    "a list in no order": [4, 0, 5, 1],
    "a list with repeats": [2, 2, 0, 2],
    "one": [3],
    "a tensor": torch.tensor([5, 1, 3]),
    "an array": np.array([0, 4]),
    "all": None,
    "nothing": [],
    "an empty range": range(3, 3),
}


@pytest.mark.parametrize("rows", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_rows_are_those_asked_for_in_the_order_asked(rows, chunk_size):
    scenario = by_name("exponential_of_a_mixed_tree")
    wanted = list(range(6)) if rows is None else [int(i) for i in rows]
    stream = run(hessian_rows, scenario.f, scenario.x, rows=rows, chunk_size=chunk_size)
    order, values = assembled(stream, scenario.n)
    assert order == wanted
    assert relative_error(values, dense_hessian(scenario)[wanted]) < 1e-13
    assert all(t.shape == (len(which), 6) and t.is_contiguous() for which, t in stream)


def test_evenly_spaced_rows_come_with_a_range():
    stream = run(hessian_rows, cube, numbers(7), chunk_size=3)
    assert [which for which, _ in stream] == [range(3), range(3, 6), range(6, 7)]
    stream = run(hessian_rows, cube, numbers(7), rows=[0, 2, 4, 5], chunk_size=3)
    assert [which for which, _ in stream] == [range(0, 6, 2), range(5, 6)]
    stream = run(hessian_rows, cube, numbers(7), rows=[6, 4, 2, 1], chunk_size=3)
    assert [which for which, _ in stream] == [range(6, 0, -2), range(1, 2)]
    stream = run(hessian_rows, cube, numbers(7), rows=[0, 2, 3], chunk_size=3)
    assert [which for which, _ in stream] == [[0, 2, 3]]


@pytest.mark.parametrize("rows", [[7], range(5, 8), [-1], range(2, -2, -1)])
def test_a_row_out_of_range_is_refused(rows):
    with pytest.raises(IndexError, match=r"hessian_rows: row -?\d is out of range for 7 coordinates"):
        run(hessian_rows, cube, numbers(7), rows=rows)


@pytest.mark.parametrize(
    "rows", [3, 1.5, "all", slice(0, 2), [0.5], [True, False], torch.tensor([True] * 7), torch.tensor([1.0]), [None], [[0, 1]]]
)
def test_rows_that_are_no_ints_are_refused(rows):
    """A mask would be rows 0 and 1, half a row row 0."""
    with pytest.raises(TypeError, match=r"hessian_rows: rows must be a range or a sequence of ints, got"):
        run(hessian_rows, cube, numbers(7), rows=rows)


def test_rows_of_one_chunk_are_not_written_over_by_the_next():
    stream = run(hessian_rows, cube, numbers(5), chunk_size=2)
    assert relative_error(torch.cat([values for _, values in stream]), torch.diag(6 * numbers(5))) < 1e-14


def test_a_stream_may_be_left_before_its_end():
    first = next(iter(hessian_rows(cube, chunk_size=2)(numbers(5))))
    assert first[0] == range(2)
    assert relative_error(hessian(cube)(numbers(5)), torch.diag(6 * numbers(5))) < 1e-14


# Blocks ---------------------------------------------------------------------------------------------------------------


def coupled(x: Any) -> Tensor:
    return (x["enc"][0] ** 2).sum() * x["enc"][1] + (x["enc"][0] * x["dec"]).sum() ** 2 * x["enc"][1]


COUPLED = {"enc": [numbers(3, seed=1), numbers(1, seed=2)[0]], "dec": numbers(3, seed=3)}


def test_pairs_of_globs_choose_blocks():
    names = ("dec", "enc.0", "enc.1")
    assert Space.of(COUPLED).paths == names
    points = (COUPLED["dec"], *COUPLED["enc"])
    H = oracle_hessian(lambda d, a, b: coupled({"enc": [a, b], "dec": d}), points)
    every = {(p, q): H[i][j] for i, p in enumerate(names) for j, q in enumerate(names)}
    for pairs, chosen in (
        ([("dec", "enc.0")], [("dec", "enc.0")]),
        ([("enc.0", "dec")], [("enc.0", "dec")]),
        ([("enc.*", "dec")], [("enc.0", "dec"), ("enc.1", "dec")]),
        ([("enc.*", "enc.*")], [("enc.0", "enc.0"), ("enc.0", "enc.1"), ("enc.1", "enc.0"), ("enc.1", "enc.1")]),
        ([("dec", "dec"), ("dec", "*")], [("dec", "dec"), ("dec", "enc.0"), ("dec", "enc.1")]),
        ([("dec", "enc.1"), ("enc.1", "dec")], [("dec", "enc.1"), ("enc.1", "dec")]),
        ([], []),
    ):
        for chunk_size in CHUNKS:
            blocks = hessian_blocks(coupled, pairs=pairs, chunk_size=chunk_size)(COUPLED)
            assert relative_error(blocks, {pair: every[pair] for pair in chosen}) < 1e-13


@pytest.mark.parametrize("pairs", [["dec"], ("dec", "dec"), "dec", [("dec",)], [("dec", "dec", "dec")], [(0, 1)], [None]])
def test_pairs_that_are_none_are_refused(pairs):
    with pytest.raises(TypeError, match=r"hessian_blocks: pairs must hold pairs of globs, as in \[\('w', 'b'\)\], got"):
        hessian_blocks(coupled, pairs=pairs)(COUPLED)


def test_a_glob_that_matches_nothing_is_refused_with_the_paths():
    with pytest.raises(
        ValueError,
        match=r"pairs must match paths of x, got 'head\.\*', which matches no leaf; the paths are dec, enc\.0, enc\.1",
    ):
        hessian_blocks(coupled, pairs=[("dec", "head.*")])(COUPLED)


# Arguments ------------------------------------------------------------------------------------------------------------


def weighted(a: Tensor, b: Any, c: Tensor, power: int = 2) -> Tensor:
    return (a**power).sum() * b["b"] + (a * c).sum() ** 2


A, B, C = numbers(2), {"b": numbers(1)[0], "kind": "carried"}, numbers(2, seed=7)


@pytest.mark.parametrize(
    "argnums", [0, 2, -1, -3, (0,), (0, 2), (2, 0), (1, 0), [0, 1]], ids=lambda argnums: str(argnums).replace(" ", "")
)
def test_argnums_choose_the_arguments(argnums):
    H = oracle_hessian(lambda a, b, c: weighted(a, {"b": b}, c, power=3), (A, B["b"], C))
    chosen = [i % 3 for i in ((argnums,) if isinstance(argnums, int) else argnums)]

    def block(p: int, q: int) -> Any:
        part = {"b": H[p][q], "kind": None} if q == 1 else H[p][q]
        return part

    def row(p: int) -> Any:
        columns = tuple(block(p, q) for q in chosen)
        return {"b": columns, "kind": None} if p == 1 else columns

    expected: Any = block(chosen[0], chosen[0]) if isinstance(argnums, int) else tuple(row(p) for p in chosen)
    assert relative_error(hessian(weighted, argnums)(A, B, C, power=3), expected) < 1e-13
    assert relative_error(value_grad_and_hessian(weighted, argnums)(A, B, C, power=3)[2], expected) < 1e-13
    if isinstance(argnums, int):
        diagonal = hessian_diagonal(weighted, argnums)(A, B, C, power=3)
        assert relative_error(diagonal, H[chosen[0]][chosen[0]].diagonal()) < 1e-13


@pytest.mark.parametrize("argnums", [3, -4, (0, 5)])
@every_verb
def test_argnums_out_of_range_are_refused(verb, argnums):
    with pytest.raises(ValueError, match=r"argnums must be in range\(3\), the positional arguments of the call, got"):
        run(verb, weighted, A, B, C, argnums=argnums)


@every_verb
@pytest.mark.parametrize(
    "argnums", [numbers(2), None, 1.0, "x", (), (0, "x"), {0: 1}], ids=lambda argnums: type(argnums).__name__
)
def test_argnums_that_are_no_ints_are_refused_where_the_transform_is_made(verb, argnums):
    """Before there is a function that a user of `hessian(f, x)` would take for the result."""
    with pytest.raises(TypeError, match=r"argnums must be an int or a tuple of ints, got .* as in \w+\(f\)\(x\)\."):
        verb(cube, argnums)


@every_verb
@pytest.mark.parametrize("argnums", [(0, 0), (0, 1, -3)])
def test_an_argument_chosen_twice_is_refused(verb, argnums):
    """The gradients of f(x, x) by both would be needed, where only the last place is filled."""
    with pytest.raises(ValueError, match=r"argnums must be different arguments, got \(0, "):
        run(verb, weighted, A, B, C, argnums=argnums)


@pytest.mark.parametrize("f", [lambda x: cube(x).item(), lambda x: None, lambda x: {"n": 3}, lambda x: "text", lambda x: x > 0])
def test_a_function_that_returns_no_floating_tensor_is_refused(f):
    for verb in VERBS:
        with pytest.raises(TypeError, match=r"f must return (a scalar tensor|at least one floating tensor)"):
            run(verb, f, numbers(3))


@pytest.mark.parametrize("aux", ["text", None, {"a": (1, [None, "b"])}, (), torch.ones(3, dtype=torch.int64)], ids=repr)
def test_aux_of_any_kind_comes_back(aux):
    def f(x: Tensor) -> tuple[Tensor, Any]:
        return cube(x), (aux, 2 * x)

    x, H = numbers(3), torch.diag(6 * numbers(3))
    for mode in ("auto", FORWARD, REVERSE, DOUBLE, DIFFERENCE):
        for got, (kept, doubled), expected in (
            (*hessian(f, has_aux=True, mode=mode)(x), H),
            (*hessian_diagonal(f, has_aux=True, mode=mode)(x), 6 * x),
            (*hessian_blocks(f, has_aux=True, mode=mode)(x), H),
        ):
            assert relative_error(got, expected) < 1e-8
            assert (kept is aux or repr(kept) == repr(aux)) and torch.equal(doubled, 2 * x)
        (value, (kept, doubled)), g, got = value_grad_and_hessian(f, has_aux=True, mode=mode)(x)
        assert relative_error((value, g, got), (cube(x), 3 * x**2, H)) < 1e-8
        assert (kept is aux or repr(kept) == repr(aux)) and torch.equal(doubled, 2 * x)


def test_aux_of_a_vector_valued_function_comes_back():
    H, aux = hessian(lambda x: (x**3, "text"), has_aux=True)(numbers(2))
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    expected[[0, 1], [0, 1], [0, 1]] = 6 * numbers(2)
    assert aux == "text" and relative_error(H, expected) < 1e-14


def test_mixed_dtypes_promote_block_by_block():
    x = {"a": numbers(2).float(), "b": numbers(3), "c": numbers(1).float()[0]}

    def f(x: Any) -> Tensor:
        return torch.exp(x["a"].sum() * 0.3 + (x["b"] * x["b"].flip(0)).sum() * 0.2 + x["c"]) * x["c"]

    truth = oracle_hessian(lambda a, b, c: f({"a": a, "b": b, "c": c}), [t.double() for t in (x["a"], x["b"], x["c"])])
    for mode in ("auto", FORWARD, REVERSE, DOUBLE):
        for options in ({}, {"symmetric": False}, {"chunk_size": 1}):
            H = hessian(f, mode=mode, **options)(x)
            for i, p in enumerate("abc"):
                for j, q in enumerate("abc"):
                    assert H[p][q].dtype == torch.promote_types(x[p].dtype, x[q].dtype)
                    assert relative_error(H[p][q], truth[i][j]) < 1e-5
        dense = matrix(truth, (x["a"], x["b"], x["c"]))
        rows = torch.cat([values for _, values in hessian_rows(f, mode=mode, chunk_size=4)(x)])
        assert rows.dtype == torch.float64 and relative_error(rows, dense) < 1e-5
        out = torch.zeros(6, 6, dtype=torch.float64)
        hessian(f, mode=mode, out=out)(x)
        assert relative_error(out, dense) < 1e-5
        diagonal = hessian_diagonal(f, mode=mode)(x)
        assert {key: t.dtype for key, t in diagonal.items()} == {key: t.dtype for key, t in x.items()}


@every_verb
def test_carried_leaves_are_none(verb):
    scenario = by_name("leaves_carried_along")
    result = run(verb, scenario.f, scenario.x)
    if verb in (hessian, value_grad_and_hessian):
        H = result if verb is hessian else result[2]
        assert all(H[name] is None and H["weights"][name] is None for name in scenario.x if name != "weights")
    elif verb is not hessian_rows:
        assert all(result[name] is None for name in scenario.x if name != "weights")


@every_verb
def test_results_are_plain_contiguous_tensors(verb):
    for scenario in SCENARIOS:
        for mode in ("auto", FORWARD):
            result = run(verb, scenario.f, scenario.x, *scenario.args, mode=mode, chunk_size=2)
            for t in (leaf for leaf in leaves(result) if isinstance(leaf, Tensor)):
                assert type(t) is Tensor and t.is_contiguous() and not t.requires_grad
                assert not t._is_zerotensor() and not t.is_neg()
                assert t.untyped_storage().nbytes() >= t.numel() * t.element_size()


@every_verb
@pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE, DOUBLE])
def test_results_are_plain_where_derivatives_are_views(verb, mode):
    x = numbers(2, 3)
    for f in (lambda x: x.sum() ** 2, lambda x: (x.T @ x).sum(), lambda x: x.sum(), lambda x: (x.T.flip(0) ** 2)[0].sum()):
        for t in tensors(run(verb, f, x, mode=mode)):
            assert t.is_contiguous() and not t._is_zerotensor() and t.untyped_storage().nbytes() >= 8 * t.numel()


def test_blocks_share_no_storage_so_that_one_may_be_written():
    scenario = by_name("bilinear")
    H = hessian(scenario.f)(scenario.x)
    before = H["v"]["w"].clone()
    H["w"]["v"].fill_(7.0)
    assert torch.equal(H["v"]["w"], before)


# out= -----------------------------------------------------------------------------------------------------------------


def make_plain(n: int, path: Any) -> Tensor:
    return torch.full((n, n), float("nan"), dtype=torch.float64)


def make_mapped(n: int, path: Any) -> Tensor:
    return torch.from_file(str(path / "hessian.bin"), shared=True, size=n * n, dtype=torch.float64).view(n, n)


def make_strided(n: int, path: Any) -> Tensor:
    return torch.full((2 * n, n + 3), float("nan"), dtype=torch.float64)[::2, 1 : n + 1].T


@pytest.mark.parametrize("make", [make_plain, make_mapped, make_strided])
@every_scenario
def test_out_holds_the_matrix_and_the_blocks_are_views_of_it(scenario, make, tmp_path):
    for mode in ("auto", FORWARD):
        for chunk_size in (2, "auto"):
            out = make(scenario.n, tmp_path)
            H = hessian(scenario.f, out=out, mode=mode, chunk_size=chunk_size)(scenario.x, *scenario.args)
            assert relative_error(out, dense_hessian(scenario)) < 1e-13 and relative_error(H, scenario.hessian) < 1e-13
            storage = out.untyped_storage()
            blocks = [t for t in tensors(H) if t.numel()]
            assert all(t.untyped_storage().data_ptr() == storage.data_ptr() for t in blocks)
            blocks[0].zero_()
            assert (out == 0).sum() >= blocks[0].numel()


def test_a_memory_mapped_out_is_the_file(tmp_path):
    scenario = by_name("chained_rosenbrock")
    out = make_mapped(scenario.n, tmp_path)
    hessian(scenario.f, out=out)(scenario.x)
    held = np.fromfile(tmp_path / "hessian.bin").reshape(scenario.n, scenario.n)
    assert relative_error(torch.from_numpy(held), scenario.hessian) < 1e-13


def test_out_serves_value_gradient_and_hessian_as_well():
    scenario = by_name("log_sum_exp")
    out = torch.zeros(4, 4, dtype=torch.float64)
    _, _, H = value_grad_and_hessian(scenario.f, out=out)(scenario.x)
    assert relative_error(out, scenario.hessian) < 1e-13 and H.data_ptr() == out.data_ptr()


@pytest.mark.parametrize(
    ("out", "got"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), r"\(3, 4\)"),
        (torch.zeros(16, dtype=torch.float64), r"\(16,\)"),
        (torch.zeros(4, 4), "torch.float32"),
        (torch.zeros(4, 4, dtype=torch.float64, device="meta"), "meta"),
        (np.zeros((4, 4)), "ndarray"),
        ("hessian.bin", "str"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(out, got):
    with pytest.raises(ValueError, match=rf"hessian: out must have shape \(4, 4\), torch.float64, cpu, got .*{got}"):
        hessian(cube, out=out)(numbers(4))


def test_an_out_that_must_carry_a_batch_or_a_graph_or_many_outputs_is_refused():
    out = torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="out= cannot carry a graph or a batch"):
        torch.func.vmap(hessian(cube, out=out))(numbers(2, 4))
    with pytest.raises(ValueError, match="out= cannot carry a graph or a batch"):
        hessian(cube, out=out)(numbers(4).requires_grad_())
    with pytest.raises(ValueError, match=r"out= holds one \(n, n\) matrix, so f must return a scalar"):
        hessian(lambda x: x**3, out=out)(numbers(4))
    assert not out.any()
    with torch.no_grad():
        hessian(cube, out=out)(numbers(4).requires_grad_())
    assert relative_error(out, torch.diag(6 * numbers(4))) < 1e-14


def test_an_out_is_refused_where_f_itself_holds_what_requires_grad():
    """The matrix would carry a graph through a tensor that f closes over."""
    w, out = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="out= cannot carry a graph"):
        hessian(lambda x: w * cube(x), out=out)(numbers(4))
    assert not out.requires_grad


# Options --------------------------------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize("chunk_size", [0, -3, 1.5, "all"])
def test_a_chunk_that_is_no_number_of_rows_is_refused(verb, chunk_size):
    with pytest.raises(ValueError, match=r"chunk_size must be 'auto', a positive int or None"):
        run(verb, cube, numbers(3), chunk_size=chunk_size)


@every_verb
def test_an_unknown_mode_is_refused(verb):
    with pytest.raises(ValueError, match=r"mode must be 'auto', 'fastest' \(for rows\) or one of .*reverse-over-reverse"):
        run(verb, cube, numbers(3), mode="jacfwd")


@every_verb
def test_strict_refuses_a_leaf_without_influence_by_its_path(verb):
    scenario = by_name("leaf_without_influence")
    assert run(verb, scenario.f, scenario.x) is not None
    with pytest.raises(DependenceError, match=r"f does not depend on x\[1\] \(strict=True\)"):
        run(verb, scenario.f, scenario.x, strict=True)


@every_verb
@pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE, DOUBLE])
def test_a_broken_graph_is_an_error_not_a_zero(verb, mode):
    with pytest.raises(DependenceError, match="does not depend on x through differentiable operations"):
        run(verb, lambda x: cube(x.detach()), numbers(3), mode=mode)


@every_verb
def test_a_random_function_is_refused_or_drawn_once(verb):
    def f(x: Tensor) -> Tensor:
        return torch.sin(F.dropout(x * x.roll(1), 0.5)).sum()

    x, before = numbers(9), torch.get_rng_state()
    for mode in ("auto", FORWARD, DOUBLE):
        with pytest.raises(RandomnessError, match=r"draws random numbers"):
            run(verb, f, x, mode=mode, chunk_size=2)
        first, second = (run(verb, f, x, mode=mode, chunk_size=2, randomness="same") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
        assert torch.equal(torch.get_rng_state(), before)


def test_one_draw_is_one_function_so_its_hessian_is_the_same_in_every_mode_and_chunk():
    def f(x: Tensor) -> Tensor:
        return torch.sin(F.dropout(x * x.roll(1), 0.5)).sum()

    x = numbers(9)
    options = [{"mode": mode, "chunk_size": k} for mode in (FORWARD, REVERSE, DOUBLE) for k in (2, None)]
    Hs = [hessian(f, randomness="same", symmetric=False, **option)(x) for option in options]
    assert all(relative_error(H, Hs[0]) < 1e-13 for H in Hs) and relative_error(Hs[0].T, Hs[0]) < 1e-13
    assert float(Hs[0].norm()) > 0.1


@every_verb
def test_progress_is_a_bar_over_the_rows(verb, capsys):
    run(verb, cube, numbers(6), chunk_size=4, progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "row" in shown and (verb.__name__ in shown or verb is value_grad_and_hessian)


def test_progress_of_a_vector_valued_function_is_a_bar_too(capsys):
    hessian(lambda x: x**3, chunk_size=4, progress=True)(numbers(6))
    assert "6/6" in capsys.readouterr().err


@every_verb
def test_progress_without_tqdm_names_the_extra(verb, monkeypatch):
    ordinary = builtins.__import__

    def without_tqdm(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "tqdm":
            raise ImportError(name)
        return ordinary(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install 'functional_hess\[progress\]'"):
        run(verb, cube, numbers(6), progress=True)
    assert run(verb, cube, numbers(6)) is not None


def test_fastest_keeps_a_mode_that_has_the_rules(caplog):
    with caplog.at_level(logging.DEBUG, logger="functional_hess"):
        H = hessian(lambda x: OldStyle.apply(x).sum(), mode="fastest", chunk_size=2)(numbers(9))
    assert relative_error(H, torch.diag(6 * numbers(9))) < 1e-14
    assert "hessian: mode double-backward" in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("mode", [FORWARD, REVERSE, DOUBLE])
def test_a_graph_of_some_blocks_alone_is_kept_where_f_closes_over_what_requires_grad(mode):
    """The block of a has no graph; that of b begins to have one in its second chunk."""
    c = torch.tensor([0.0, 2.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)

    def f(x: Any) -> Tensor:
        return (x["a"] ** 2).sum() + (x["b"][:2] ** 2).sum() + (c[1:] * x["b"][2:] ** 3).sum() + x["a"][0] * x["b"][0]

    x = {"a": numbers(4), "b": numbers(5, seed=1)}
    for chunk_size, symmetric in itertools.product((1, 2, None), (True, False)):
        H = hessian(f, mode=mode, chunk_size=chunk_size, symmetric=symmetric)(x)
        expected = torch.cat([torch.full((2,), 2.0, dtype=torch.float64), 6 * c.detach()[1:] * x["b"][2:]])
        assert relative_error(H["b"]["b"].detach(), torch.diag(expected)) < 1e-13
        assert relative_error(H["a"]["a"].detach(), 2 * torch.eye(4, dtype=torch.float64)) < 1e-13
        assert relative_error(H["a"]["b"].detach(), H["b"]["a"].detach().T) == 0 and float(H["a"]["b"].detach().sum()) == 1
        (of_c,) = torch.autograd.grad(H["b"]["b"].trace(), c)
        assert relative_error(of_c, torch.cat([torch.zeros(1, dtype=torch.float64), 6 * x["b"][2:]])) < 1e-13


# What a call costs ----------------------------------------------------------------------------------------------------


class Counted:
    """A function that counts its evaluations, of which the last may raise an error."""

    def __init__(self, f: Callable[..., Tensor], last: int = 0, error: Exception | None = None) -> None:
        self.f, self.calls, self.last, self.error = f, 0, last, error

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        if self.error is not None and self.calls == self.last:
            raise self.error
        return self.f(*args)


@pytest.mark.parametrize("mode", ["auto", REVERSE, DOUBLE])
def test_f_is_called_once_to_look_and_once_a_graph_however_many_rows(mode):
    for chunk_size in (1, 7, None):
        f = Counted(cube)
        hessian(f, mode=mode, chunk_size=chunk_size)(numbers(40))
        assert f.calls == 2


def test_forward_over_reverse_calls_f_once_a_chunk():
    f = Counted(cube)
    hessian(f, mode=FORWARD, chunk_size=8)(numbers(40))
    assert f.calls == 1 + 5


def test_f_is_called_at_most_once_a_leaf_for_a_tree():
    scenario = by_name("bilinear")
    for verb in VERBS:
        f = Counted(scenario.f)
        run(verb, f, scenario.x)
        assert f.calls <= 2 + len(scenario.x)


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def chain(x: Any) -> Tensor:
    return sum((torch.sin(a * b.flip(0)).sum() for a, b in itertools.pairwise(x)), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("chunk_size", ["auto", 8, None])
@every_verb
def test_no_identity_of_all_coordinates_is_ever_made(verb, chunk_size):
    x = [numbers(10, seed=i) for i in range(24)]  # n = 240
    with Largest() as largest:
        run(verb, chain, x, chunk_size=chunk_size)
    if verb is hessian_rows:  # whose results are (k, n)
        assert largest.numel <= (240 * 240 if chunk_size != 8 else 8 * 240)
    else:
        assert largest.numel <= 240 * 10


def test_a_pair_of_leaves_is_computed_once():
    x = {"a": numbers(6), "b": numbers(6, seed=1)}
    pulled = []

    class Watched(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            pulled.append(cotangent)
            return cotangent

    def f(x: Any) -> Tensor:
        return (torch.sin(Watched.apply(x["a"])) * x["b"]).sum() + (torch.exp(x["a"]) * x["b"] ** 2).sum()

    counts = {}
    for symmetric in (True, False):
        pulled.clear()
        hessian(f, mode=REVERSE, chunk_size=6, symmetric=symmetric)(x)
        counts[symmetric] = len(pulled)
    assert counts[True] < counts[False]


OUT_OF_MEMORY = {
    "of the accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "of the processor": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    "of Python": MemoryError(),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_memory_that_runs_out_in_any_evaluation_is_said_to_have_run_out(error):
    """In those that only measure what rows will need, too: here the bound does not fit, and fake tensors are no help."""
    x = numbers(20)

    def wide(x: Tensor) -> Tensor:
        float(x.detach().sum())  # which no fake tensor has
        return torch.tanh(x[:, None] * torch.linspace(0, 1, 4000, dtype=x.dtype)).sum() ** 2

    calls: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
        **{verb.__name__: lambda f, verb=verb: run(verb, f, x, memory_limit="12MB") for verb in VERBS},
        "explain": lambda f: explain(hessian(f, memory_limit="12MB"), x),
    }
    for name, call in calls.items():
        counted = Counted(wide)
        call(counted)
        assert counted.calls >= 4, name

        for last in range(1, counted.calls + 1):
            with pytest.raises(type(error)) as caught:
                call(Counted(wide, last, error))
            assert caught.value is error, (name, last)


# Explain --------------------------------------------------------------------------------------------------------------


@every_verb
def test_explain_tells_what_a_call_would_do(verb):
    told = explain(verb(cube, chunk_size=4), numbers(10))
    assert told.dim == told.rows == 10 and told.chunk_size == 4 and told.chunks == 3 and told.mode == REVERSE
    assert told.repairs == () and told.working_bytes > 0
    text = str(told)
    for word in ("10 of 10", "mode", REVERSE, "none needed", "3 of up to 4 rows", "MB", "working set"):
        assert word in text
    assert text.startswith(told.verb)


def test_explain_names_the_repairs():
    net = network(lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)), numbers(5, 3))
    told = explain(hessian(net.f), net.x)
    assert told.repairs == ("layer_norm",) and "layer_norm" in str(told)


def test_explain_tells_the_size_of_the_result():
    assert explain(hessian(cube), numbers(100)).output_bytes == 100 * 100 * 8
    assert explain(hessian(cube), numbers(100).float()).output_bytes == 100 * 100 * 4
    assert explain(hessian(lambda x: x**3), numbers(10)).output_bytes == 10 * 10 * 10 * 8


def test_explain_computes_a_single_row():
    f = Counted(cube)
    explain(hessian(f, chunk_size=1, mode=FORWARD), numbers(50))
    assert f.calls == 2


def test_explain_of_rows_counts_those_asked_for():
    told = explain(hessian_rows(cube, rows=range(3), chunk_size=2), numbers(10))
    assert (told.rows, told.dim, told.chunks) == (3, 10, 2) and "3 of 10" in str(told)


def test_explain_of_something_else_is_refused():
    with pytest.raises(TypeError, match=r"explain: transformed must be what hessian.* return, got function"):
        explain(cube, numbers(3))
    with pytest.raises(TypeError, match=r"explain: transformed must be what hessian.* return, got function"):
        explain(grad(cube), numbers(3))


# In the place of torch.func.hessian -----------------------------------------------------------------------------------


def shapes(tree: Any) -> Any:
    """The tree with shapes and dtypes for tensors, the order of keys included."""
    if isinstance(tree, dict):
        return type(tree), [(key, shapes(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return type(tree), [shapes(child) for child in tree]
    return (tuple(tree.shape), tree.dtype) if isinstance(tree, Tensor) else tree


CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "a tensor": (cube, (numbers(3),), {}),
    "a matrix": (cube, (numbers(2, 3),), {}),
    "a number": (cube, (numbers(1)[0],), {}),
    "a dict": (lambda x: cube(x["b"]) * x["a"], ({"b": numbers(2), "a": numbers(1)[0]},), {}),
    "nested": (lambda x: cube(x[0]["b"][0]) * x[1], (({"b": [numbers(2)]}, numbers(1)[0]),), {}),
    "argnums": (lambda a, b: cube(a) * cube(b), (numbers(2), numbers(3)), {"argnums": 1}),
    "a tuple of argnums": (lambda a, b: cube(a) * cube(b), (numbers(2), numbers(3)), {"argnums": (0, 1)}),
    "a tuple of one argnum": (lambda a, b: cube(a) * cube(b), (numbers(2), numbers(3)), {"argnums": (1,)}),
    "argnums of trees": (lambda a, b: cube(a["x"]) * cube(b), ({"x": numbers(2)}, numbers(3)), {"argnums": (1, 0)}),
    "a vector": (lambda x: x**3, (numbers(3),), {}),
    "a vector of one": (lambda x: cube(x)[None], (numbers(3),), {}),
    "a matrix of outputs": (lambda x: x[:, None] * x**2, (numbers(3),), {}),
    "a vector of a dict": (lambda x: x["b"] ** 3 * x["a"], ({"b": numbers(2), "a": numbers(1)[0]},), {}),
    "a dict of outputs": (lambda x: {"u": cube(x), "s": x**2}, (numbers(3),), {}),
    "a tuple of outputs": (lambda x: (cube(x), x**2), (numbers(3),), {}),
    "float32": (cube, (numbers(3).float(),), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_hessian_stands_in_the_place_of_the_one_of_torch_func(name):
    f, args, options = CALLS[name]
    ours, theirs = hessian(f, **options)(*args), torch.func.hessian(f, **options)(*args)
    assert shapes(ours) == shapes(theirs)
    assert relative_error(ours, theirs) < (1e-6 if name == "float32" else 1e-13)


def test_hessian_takes_argnums_where_torch_func_takes_it():
    assert hessian(lambda a, b: cube(a) * cube(b), 1)(numbers(2), numbers(3)).shape == (3, 3)


@every_verb
def test_a_transformed_function_keeps_its_name_and_docstring(verb):
    def energy(x: Tensor) -> Tensor:
        """Of a system."""
        return cube(x)

    transformed = verb(energy)
    assert transformed.__name__ == "energy" and transformed.__doc__ == "Of a system."


def test_a_callable_without_a_name_is_a_function_too():
    assert relative_error(hessian(Counted(cube))(numbers(3)), torch.diag(6 * numbers(3))) < 1e-14


def test_a_function_that_is_none_is_refused():
    with pytest.raises(TypeError, match="callable"):
        hessian(3)(numbers(2))  # type: ignore[arg-type]


def test_a_function_or_a_point_without_coordinates_has_empty_blocks():
    assert hessian(lambda x: x[:0] ** 2)(torch.ones(3)).shape == (0, 3, 3)
    assert hessian(lambda x: torch.stack([x.sum(), x.sum()]))(torch.ones(0)).shape == (2, 0, 0)
    H = hessian(lambda x: {"a": x["b"].sum(0), "b": x["a"]})({"a": torch.ones(2, 0), "b": torch.ones(0, 3)})
    assert H["a"]["a"]["b"].shape == (3, 2, 0, 0, 3) and H["b"]["b"]["b"].shape == (2, 0, 0, 3, 0, 3)


def test_a_mode_that_does_not_exist_is_refused_even_where_there_is_nothing_to_compute():
    with pytest.raises(ValueError, match=r"hessian: mode must be 'auto'.* got 'sideways'"):
        hessian(lambda x: x.sum(), mode="sideways")(torch.ones(0))


def test_a_stream_that_waits_leaves_no_mode_and_no_draw_behind():
    x = numbers(4)
    streams = [hessian_rows(lambda x: (F.dropout(x, 0.5) ** 3).sum(), chunk_size=1, randomness="same")(x) for _ in range(2)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for stream in streams:
        next(stream)
        assert not _get_current_function_mode_stack() and torch.equal(torch.get_rng_state(), state)
    for stream in streams:
        stream.close()
    assert not _get_current_function_mode_stack()
