"""Plans of sparse Hessians and Jacobians: exact at every point, few products, and never a wrong number without an error."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from networks import numbers
from oracles import gradient as oracle_gradient
from oracles import hessian as oracle_hessian
from oracles import matrix, relative_error
from scenarios import SCENARIOS, VECTOR_SCENARIOS, Scenario, dense_hessian
from torch import Tensor

import functional_hess as fh
from functional_hess import SparsePlan, SparsityError, coloring, plans, sparse_hessian, sparse_jacobian, tasks
from functional_hess.patterns import SparsityPattern, banded, blocks
from functional_hess.products import MODES

INDEX = torch.tensor([0, 2, 2, 5, 1])
MASK = torch.tensor([True, False, True, True, False, True, False, True])
LAYOUTS = [torch.sparse_csr, torch.sparse_coo, torch.strided]


def truth(f: Callable[..., Tensor], x: Any, *args: Any) -> Tensor:
    """The Hessian by double backward, entry by entry, as one matrix in the coordinates of ``Space``."""
    space = fh.Space.of(x)
    points = [t.double() for t in space.pack(x, "x")]
    return matrix(oracle_hessian(lambda *t: f(space.at(t), *args), points), points)


def dense(t: Tensor) -> Tensor:
    return t if t.layout == torch.strided else t.to_dense()


def moved(x: Any, seed: int) -> Any:
    """Other numbers in a tree like x."""
    space = fh.Space.of(x)
    return fh.tree.add(x, space.random(torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------------------------------------------- functions


class StraightThrough(torch.autograd.Function):
    """Rounds on the way, and has the derivative of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def in_place_through_a_view(x):
    y = x.clone()
    y.view(2, 4)[0].mul_(x[4:])
    y[1:3] += x[5:7] ** 2
    return (y**3).sum()


def shared_weights(x):
    w = x[:4].view(2, 2)
    return torch.tanh(w @ torch.tanh(w @ x[4:6])).sum() + x[6] ** 3


def membrane(u):
    return ((u[1:] - u[:-1]) ** 4).sum() + ((u[:, 1:] - u[:, :-1]) ** 4).sum() + u.exp().sum()


def two_chains(x):
    return (x["b"][1:] * x["b"][:-1] ** 3).sum() + (x["a"] ** 2 * x["b"].view(2, 3)).sum() + (x["c"] ** 3).sum() * x["n"]


def inner_gradient(x):
    g = torch.func.grad(lambda z: (z[1:] * z[:-1] ** 2).sum())(x)
    return (g**2).sum()


FUNCTIONS: dict[str, tuple[Callable[[Any], Tensor], Any]] = {
    "chain": (rosenbrock, numbers(12)),
    "separable": (lambda x: x.sin().sum(), numbers(8)),
    "linear": (lambda x: (3 * x).sum(), numbers(8)),
    "one number": (lambda x: x[0] ** 4, numbers(1)),
    "zero-dimensional": (lambda x: x.exp() * x, numbers(1)[0]),
    "full": (lambda x: x.sum() ** 4, numbers(5)),
    "arrow": (lambda x: (x[0] * x[1:]).sin().sum(), numbers(9)),
    "second neighbors": (lambda x: (x[2:] * x[:-2]).exp().sum() + (x**4).sum(), numbers(11)),
    "pairs": (lambda x: (x[::2] ** 2 * x[1::2]).sum(), numbers(8)),
    "membrane": (membrane, numbers(4, 5)),
    "trees": (two_chains, {"b": numbers(6), "a": numbers(2, 3, seed=1), "c": numbers(4, seed=2), "n": 3}),
    "a scalar leaf": (lambda x: (x["s"] * x["w"] ** 2).sum(), {"w": numbers(5), "s": numbers(1)[0], "name": None}),
    "an empty leaf": (lambda x: (x[0] ** 3).sum() + x[1].sum(), (numbers(4), numbers(0))),
    "a leaf without influence": (lambda x: (x[0] ** 3).sum(), (numbers(4), numbers(3))),
    "mean squared error": (lambda x: F.mse_loss(x[1:], x[:-1] ** 2), numbers(8)),
    "convolution": (lambda x: F.conv1d(x.view(1, 1, 8), x.new_ones(1, 1, 3), padding=1).exp().sum(), numbers(8)),
    "softmax of rows": (lambda x: x.view(4, 2).softmax(1).pow(2).sum(), numbers(8)),
    "layer norm of rows": (lambda x: F.layer_norm(x.view(2, 4), (4,)).pow(3).sum(), numbers(8)),
    "batch norm": (lambda x: F.batch_norm(x.view(4, 2), None, None, training=True).pow(3).sum(), numbers(8)),
    "gather": (lambda x: (x.gather(0, INDEX) ** 2 * x[3:]).sum(), numbers(8)),
    "mask": (lambda x: (x[MASK] ** 3).sum() + x[~MASK].sum(), numbers(8)),
    "shared weights": (shared_weights, numbers(8)),
    "in place through a view": (in_place_through_a_view, numbers(8)),
    "straight-through": (lambda x: (StraightThrough.apply(3 * x) ** 2 * x.roll(1)).sum(), numbers(8)),
    "inner gradient": (inner_gradient, numbers(8)),
    "products of rows": (lambda x: x.view(4, 2).prod(1).sum(), numbers(8)),
    "data-dependent branch": (lambda x: (x**3).sum() if x.sum() > 0 else (x[0] * x) @ x, numbers(6)),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def single(x: Any) -> Any:
    return fh.tree.tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, x)


@every_function
def test_a_plan_gives_the_hessian_its_diagonal_and_trace_at_any_point(name, inputs_unchanged):
    f, x = FUNCTIONS[name]
    inputs_unchanged(x)
    plan, space = sparse_hessian(f, x), fh.Space.of(x)
    for seed in (1, 2):
        y = moved(x, seed)
        inputs_unchanged(y)
        H = truth(f, y)
        for layout in LAYOUTS:
            found = plan(y, layout=layout)
            assert found.layout == layout and found.shape == H.shape
            assert relative_error(dense(found), H) < 1e-13
        assert np.abs(plan.to_scipy(y).toarray() - H.numpy()).max(initial=0) <= 1e-12 * float(H.abs().max())
        assert float((space.ravel(plan.diagonal(y)) - H.diagonal()).abs().max()) <= 1e-13 * float(H.abs().max())
        assert abs(float(plan.trace(y) - H.trace())) <= 1e-12 * max(float(H.diagonal().abs().sum()), 1)
    assert plan.nonzeros == len(plan.values(x)) and plan.origin == "detected"


@every_function
def test_single_precision_has_the_digits_of_single_precision(name):
    f, x = FUNCTIONS[name]
    plan = sparse_hessian(f, single(x))
    y = single(moved(x, 1))
    H = truth(f, y)
    assert plan(y).dtype == torch.float32
    assert relative_error(dense(plan(y)), H) < 2e-4
    assert float((fh.Space.of(y).ravel(plan.diagonal(y)) - H.diagonal()).abs().max()) <= 2e-4 * float(H.abs().max())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_the_hessian_is_that_written_by_hand(scenario: Scenario):
    plan = sparse_hessian(scenario.f, scenario.x, *scenario.args)
    assert relative_error(dense(plan(scenario.x, *scenario.args)), dense_hessian(scenario)) < 1e-12
    there = np.zeros((scenario.n, scenario.n), dtype=bool)
    there[plan.pattern.rows, plan.pattern.indices] = True
    assert not (scenario.pattern & ~there).any()


def test_leaves_of_several_precisions_are_promoted():
    x = {"a": numbers(4).float(), "b": numbers(4, seed=1)}
    plan = sparse_hessian(lambda x: (x["a"] ** 2 * x["b"] ** 2).sum(), x)
    assert plan(x).dtype == torch.float64
    assert relative_error(dense(plan(x)), truth(lambda x: (x["a"] ** 2 * x["b"] ** 2).sum(), x)) < 1e-6


def test_arguments_and_argnums():
    def f(a, x, power):
        return (a[1:] * x[:-1] ** power).sum() + (a**3).sum()

    a, x = numbers(5), numbers(5, seed=1)
    plan = sparse_hessian(f, a, x, 3, argnums=1)
    assert relative_error(dense(plan(2 * a, x + 1, 3)), truth(lambda x: f(2 * a, x, 3), x + 1)) < 1e-13
    both = sparse_hessian(f, a, x, 3, argnums=(0, 1))
    assert relative_error(dense(both(a, x, 3)), truth(lambda both: f(*both, 3), (a, x))) < 1e-13
    assert [t.shape for t in both.diagonal(a, x, 3)] == [a.shape, x.shape]
    aux = sparse_hessian(lambda x: (rosenbrock(x), "aux"), x, has_aux=True)
    assert relative_error(dense(aux(x)), truth(rosenbrock, x)) < 1e-13


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same(mode):
    x = numbers(9)
    plan = sparse_hessian(rosenbrock, x, mode=mode)
    assert relative_error(dense(plan(2 * x)), truth(rosenbrock, 2 * x)) < (1e-7 if mode == "finite-difference" else 1e-13)
    assert relative_error(plan.diagonal(2 * x), truth(rosenbrock, 2 * x).diagonal()) < 1e-7


# ---------------------------------------------------------------------------------------------------- how many products


def tridiagonal(x):
    return (x[1:] * x[:-1] ** 2).sum()


def band_of_3(x):
    return sum((x[k:] * x[: len(x) - k] ** 3).sum() for k in range(4))


def test_colors_are_those_known_in_closed_form():
    x = numbers(40)
    assert sparse_hessian(tridiagonal, x).colors == 3
    assert sparse_hessian(band_of_3, x).colors == 2 * 3 + 1
    assert sparse_hessian(lambda x: (x[0] * x[1:]).sin().sum(), x).colors == 2
    assert sparse_hessian(lambda x: (x**3).sum(), x).colors == 1
    assert sparse_hessian(lambda x: x.sum(), x).colors == 0
    assert sparse_hessian(membrane, numbers(9, 9)).colors <= 6
    assert sparse_hessian(lambda x: x.view(10, 4).sum(1).pow(4).sum(), x).colors == 4


@pytest.mark.parametrize("n", [50, 500])
def test_a_call_makes_as_many_products_as_there_are_colors(n, monkeypatch):
    taken: list[int] = []
    honest = tasks.rows_of

    def counted(product, mode, v, randomness="error"):
        taken.append(len(next(iter(v.values()))))
        return honest(product, mode, v, randomness)

    monkeypatch.setattr(tasks, "rows_of", counted)
    monkeypatch.setattr(plans, "prepare", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no graph")))
    plan = sparse_hessian(rosenbrock, numbers(n))
    plan(numbers(n))
    taken.clear()
    plan(numbers(n))
    assert taken == [3]
    plan.diagonal(numbers(n))
    taken.clear()
    plan.diagonal(numbers(n))
    assert taken == [2]
    assert "no graph" in repr(plan)


@pytest.mark.parametrize("chunk", [1, 2, 4, 100, None])
@pytest.mark.parametrize("origin", ["detected", "given"])
def test_products_may_come_in_any_portions(chunk, origin):
    x = numbers(30)
    plan = sparse_hessian(band_of_3, x, chunk_size=chunk, pattern=None if origin == "detected" else banded(3))
    assert plan.origin == origin
    for y in (x, 2 * x):
        assert relative_error(dense(plan(y)), truth(band_of_3, y)) < 1e-13
        assert relative_error(plan.diagonal(y), truth(band_of_3, y).diagonal()) < 1e-13


class Counter:
    """Counts where no plan looks."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return rosenbrock(x)


def test_a_call_repeats_a_graph_and_leaves_f_alone():
    counter, x = Counter(), numbers(9, seed=4)
    plan = sparse_hessian(lambda x: counter(x), numbers(9))
    plan(x)
    before = counter.count
    assert relative_error(dense(plan(x)), truth(rosenbrock, x)) < 1e-13 and counter.count == before


def test_memory_is_linear_in_n():
    """n = 100,000, whose dense Hessian would be 80 GB."""
    program = """
        import json, resource, torch
        import functional_hess as fh
        def f(x):
            return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        fh.sparse_hessian(f, torch.zeros(10, dtype=torch.float64))(torch.ones(10, dtype=torch.float64))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x = torch.linspace(-1, 1, 100_000, dtype=torch.float64)
        plan = fh.sparse_hessian(f, x)
        H = plan(x)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        expected = 200 * torch.ones(100_000, dtype=torch.float64)
        expected[:-1] += 1200 * x[:-1] ** 2 - 400 * x[1:] + 2
        expected[0] -= 200
        expected[1:-1] += 0
        diagonal = plan.diagonal(x)
        print(json.dumps([(after - before) / 1024, H.values().numel(), float((diagonal[1:-1] - expected[1:-1]).abs().max())]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    grown, nonzeros, error = json.loads(done.stdout)
    assert nonzeros == 3 * 100_000 - 2 and error < 1e-9
    assert grown < 400  # MiB: a few hundred vectors of n numbers


def test_a_dense_matrix_that_does_not_fit_is_refused_before_it_is_allocated():
    x = torch.zeros(10_000, dtype=torch.float64)
    plan = sparse_hessian(rosenbrock, x, memory_limit="40MiB")
    assert plan(x).values().numel() == 29_998
    with pytest.raises(fh.MemoryLimitError, match=r"the dense matrix needs 800.0 MB, but memory_limit is 41.9 MB"):
        plan(x, layout=torch.strided)
    with pytest.raises(fh.MemoryLimitError, match="sparse_hessian: 4 rows need"):
        sparse_hessian(rosenbrock, x, memory_limit=1000, pattern="tridiagonal")
    with pytest.raises(fh.MemoryLimitError, match=r"finding the pattern needs .* Pass pattern=, if it is known"):
        sparse_hessian(rosenbrock, x, memory_limit=1000)


# ---------------------------------------------------------------------------------------------------- patterns of the user


BAND = np.abs(np.subtract.outer(np.arange(9), np.arange(9))) <= 1
PATTERNS: dict[str, Any] = {
    "tridiagonal": "tridiagonal",
    "banded": banded(1),
    "wider": banded(2),
    "pattern": banded(1)(9),
    "array": BAND,
    "scipy csr": scipy.sparse.csr_array(BAND.astype(float)),
    "scipy coo matrix": scipy.sparse.coo_matrix(BAND.astype(float)),
    "tensor": torch.from_numpy(BAND),
    "sparse tensor": torch.from_numpy(BAND.astype(float)).to_sparse(),
}


@pytest.mark.parametrize("form", PATTERNS)
def test_a_known_pattern_is_taken_in_any_form(form, monkeypatch):
    monkeypatch.setattr("functional_hess.sparse.detect_hessian", lambda *_: pytest.fail("detected"))
    plan = sparse_hessian(rosenbrock, numbers(9), pattern=PATTERNS[form])
    assert plan.origin == "given" and plan.colors == (5 if form == "wider" else 3)
    for x in (numbers(9), numbers(9, seed=1)):
        assert relative_error(dense(plan(x)), truth(rosenbrock, x)) < 1e-13
        assert relative_error(plan.diagonal(x), truth(rosenbrock, x).diagonal()) < 1e-13


def test_blocks_and_a_coloring_of_ones_own():
    f = lambda x: x[:2].prod() ** 2 + x[2:5].prod()  # noqa: E731
    x = numbers(5)
    assert relative_error(dense(sparse_hessian(f, x, pattern=blocks([2, 3]))(x)), truth(f, x)) < 1e-13
    mine = coloring.Coloring("star", np.arange(9) % 3, np.empty(0, dtype=np.int64))
    plan = sparse_hessian(rosenbrock, numbers(9), coloring=mine)
    assert plan.coloring is mine and relative_error(dense(plan(numbers(9))), truth(rosenbrock, numbers(9))) < 1e-13
    wrong = coloring.Coloring("star", np.arange(9) % 2, np.empty(0, dtype=np.int64))
    with pytest.raises(ValueError, match="the coloring does not belong to the pattern"):
        sparse_hessian(rosenbrock, numbers(9), coloring=wrong)


# ---------------------------------------------------------------------------------------------------- broken plans


Broken = Callable[[pytest.MonkeyPatch, Path], Any]
BROKEN: dict[str, Broken] = {}


def broken(call: Broken, *, name: str = "") -> Broken:
    BROKEN[name or call.__name__.replace("_", " ")] = call
    return call


def without(pattern: SparsityPattern, *entries: tuple[int, int]) -> SparsityPattern:
    there = pattern.dense()
    for i, j in entries:
        there[i, j] = there[j, i] = False
    return SparsityPattern.of_matrix(there)


def rolled(pattern: SparsityPattern, by: int) -> SparsityPattern:
    return SparsityPattern.of_matrix(np.roll(pattern.dense(), (by, by), (0, 1)))


def narrowed(f: Any, x: Any, pattern: SparsityPattern, colors: Any = None) -> SparsePlan:
    """A detected plan into which another pattern has been put."""
    found = sparse_hessian(f, x)
    return dataclasses.replace(found, pattern=pattern, coloring=colors or coloring.star_coloring(pattern), _memo=plans.Memo())


def trusting(patch: pytest.MonkeyPatch) -> None:
    """Recovery that does not look whether an entry can be read."""
    patch.setattr(coloring, "_checked", lambda places, *_: places)


CHAIN = banded(1)(9)
for entry in [(0, 1), (4, 5), (7, 8), (3, 3), (0, 0), (8, 8)]:
    broken(
        lambda _, __, entry=entry: sparse_hessian(rosenbrock, numbers(9), pattern=without(CHAIN, entry))(numbers(9)),
        name=f"given, without {entry}",
    )
    broken(
        lambda _, __, entry=entry: narrowed(rosenbrock, numbers(9), without(CHAIN, entry))(numbers(9)),
        name=f"detected, then without {entry}",
    )
for given in ("diagonal", banded(2), blocks([3, 3, 3]), blocks([4, 5])):
    broken(
        lambda _, __, given=given: sparse_hessian(band_of_3, numbers(9), pattern=given)(numbers(9)),
        name=f"given too narrow {given if isinstance(given, str) else given(9).nonzeros}",
    )
for by in (1, 4):
    arrow = SparsityPattern.of_entries([0] * 9 + list(range(9)) * 2, list(range(9)) + [0] * 9 + list(range(9)), (9, 9))
    arrow = rolled(arrow, by)
    broken(
        lambda _, __, arrow=arrow: sparse_hessian(FUNCTIONS["arrow"][0], numbers(9), pattern=arrow)(numbers(9)),
        name=f"shifted by {by}",
    )
for modulus in (1, 2):

    def too_few_colors(patch: pytest.MonkeyPatch, _: Path, modulus: int = modulus) -> Any:
        trusting(patch)
        colors = coloring.Coloring("star", np.arange(9) % modulus, np.empty(0, dtype=np.int64))
        return narrowed(rosenbrock, numbers(9), CHAIN, colors)(numbers(9))

    broken(too_few_colors, name=f"{modulus} colors for three")


@broken
def two_columns_of_one_color(patch: pytest.MonkeyPatch, _: Path) -> Any:
    trusting(patch)
    colors = np.arange(9) % 3
    colors[4] = colors[5]
    return narrowed(rosenbrock, numbers(9), CHAIN, coloring.Coloring("star", colors, np.empty(0, dtype=np.int64)))(numbers(9))


@broken
def places_read_backwards(patch: pytest.MonkeyPatch, _: Path) -> Any:
    honest = plans.recovery
    patch.setattr(plans, "recovery", lambda *args: honest(*args)[::-1].copy())
    return sparse_hessian(rosenbrock, numbers(9))(numbers(9))


@broken
def one_place_off(patch: pytest.MonkeyPatch, _: Path) -> Any:
    honest = plans.recovery
    patch.setattr(plans, "recovery", lambda *args: np.roll(honest(*args), 1))
    return sparse_hessian(rosenbrock, numbers(9))(numbers(9))


@broken
def diagonal_from_one_color(patch: pytest.MonkeyPatch, _: Path) -> Any:
    trusting(patch)
    one = coloring.Coloring("distance-1", np.zeros(9, dtype=np.int64), np.empty(0, dtype=np.int64))
    patch.setattr(plans, "distance_1_coloring", lambda _: one)
    return sparse_hessian(rosenbrock, numbers(9)).diagonal(numbers(9))


for given in ("diagonal", banded(2)):
    broken(
        lambda _, __, given=given: sparse_hessian(band_of_3, numbers(9), pattern=given).diagonal(numbers(9)),
        name=f"diagonal of a pattern given too narrow {given if isinstance(given, str) else given(9).nonzeros}",
    )
    broken(
        lambda _, __, given=given: sparse_hessian(band_of_3, numbers(9), pattern=given).trace(numbers(9)),
        name=f"trace of a pattern given too narrow {given if isinstance(given, str) else given(9).nonzeros}",
    )


@broken
def captured_index_changed_in_place(_: Any, __: Any) -> Any:
    index = torch.tensor([1, 2, 3])
    plan = sparse_hessian(lambda x: (x[index] * x[:3] ** 2).sum(), numbers(9))
    assert relative_error(dense(plan(numbers(9))), truth(lambda x: (x[index] * x[:3] ** 2).sum(), numbers(9))) < 1e-13
    index += 4
    return plan(numbers(9))


@broken
def captured_index_replaced(_: Any, __: Any) -> Any:
    index = torch.tensor([1, 2, 3])
    plan = sparse_hessian(lambda x: (x[index] * x[:3] ** 2).sum(), numbers(9))
    plan(numbers(9))
    index = torch.tensor([5, 6, 7])
    return plan(numbers(9))


@broken
def captured_step_changed(_: Any, __: Any) -> Any:
    step = 1
    plan = sparse_hessian(lambda x: (x[step:] * x[:-step] ** 2).sum(), numbers(9))
    plan(numbers(9))
    step = 3
    return plan(numbers(9))


@broken
def captured_list_appended_to(_: Any, __: Any) -> Any:
    steps = [1]
    plan = sparse_hessian(lambda x: (x[steps[-1] :] * x[: -steps[-1]] ** 2).sum(), numbers(9))
    plan(numbers(9))
    steps.append(2)
    return plan(numbers(9))


@broken
def captured_function_replaced(_: Any, __: Any) -> Any:
    couple = tridiagonal
    plan = sparse_hessian(lambda x: couple(x), numbers(9))
    plan(numbers(9))
    couple = band_of_3
    return plan(numbers(9))


@broken
def captured_mask_changed_in_place(_: Any, __: Any) -> Any:
    mask = torch.zeros(8, dtype=torch.bool)
    mask[:4] = True
    plan = sparse_hessian(lambda x: (x[1:][mask] * x[:-1][mask] ** 2).sum(), numbers(9))
    plan(numbers(9))
    mask.logical_not_()
    return plan(numbers(9))


@broken
def captured_number_that_decides_changed_in_place(_: Any, __: Any) -> Any:
    switch = torch.ones(())
    plan = sparse_hessian(lambda x: tridiagonal(x) if switch > 0 else band_of_3(x), numbers(9))
    plan(numbers(9))
    switch.neg_()
    return plan(numbers(9))


@broken
def attribute_of_an_object_replaced(_: Any, __: Any) -> Any:
    class Energy:
        step = 1

        def __init__(self) -> None:
            self.step = 1

        def value(self, x: Tensor) -> Tensor:
            return (x[self.step :] * x[: -self.step] ** 2).sum()

    energy = Energy()
    plan = sparse_hessian(energy.value, numbers(9))
    plan(numbers(9))
    energy.step = 4
    return plan(numbers(9))


@broken
def other_integers_as_arguments(_: Any, __: Any) -> Any:
    def pairs(x: Tensor, i: Tensor) -> Tensor:
        return (x[i] * x[:3] ** 2).sum()

    plan = sparse_hessian(pairs, numbers(9), torch.tensor([1, 2, 3]))
    plan(numbers(9), torch.tensor([1, 2, 3]))
    return plan(numbers(9), torch.tensor([4, 5, 8]))


@broken
def an_argument_that_decides(_: Any, __: Any) -> Any:
    plan = sparse_hessian(lambda x, s: tridiagonal(x) if s > 0 else band_of_3(x), numbers(9), torch.tensor(1.0))
    plan(numbers(9), torch.tensor(2.0))
    return plan(numbers(9), torch.tensor(-1.0))


@broken
def loaded_for_another_function(_: Any, path: Path) -> Any:
    sparse_hessian(tridiagonal, numbers(9)).save(path / "plan")
    return fh.load_plan(path / "plan", band_of_3)(numbers(9))


@broken
def loaded_diagonal_of_another_function(_: Any, path: Path) -> Any:
    sparse_hessian(lambda x: (x**3).sum(), numbers(9)).save(path / "plan")
    return fh.load_plan(path / "plan", band_of_3).diagonal(numbers(9))


@broken
def given_and_right_at_zero_alone(_: Any, __: Any) -> Any:
    """The far couplings vanish at the first point."""
    plan = sparse_hessian(lambda x: (x**2).sum() + (x[2:] ** 2 * x[:-2] ** 2).sum(), numbers(9), pattern="diagonal")
    plan(torch.zeros(9, dtype=torch.float64))
    return plan(numbers(9))


@broken
def given_and_right_on_one_side_of_a_branch(_: Any, __: Any) -> Any:
    plan = sparse_hessian(lambda x: tridiagonal(x) if x.sum() > 0 else band_of_3(x), numbers(9), pattern="tridiagonal")
    plan(numbers(9).abs())
    return plan(-numbers(9).abs())


class Skewed(torch.autograd.Function):
    """x y, where the derivative by y forgets how it depends on x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, y = ctx.saved_tensors
        return g * y, g * x.detach()


def skewed(x: Tensor) -> Tensor:
    return (Skewed.apply(x[1:], x[:-1]) + x[1:] ** 3).sum()


@broken
def derivatives_that_are_not_symmetric(_: Any, __: Any) -> Any:
    return sparse_hessian(skewed, numbers(9), pattern="tridiagonal")(numbers(9))


def differences(x: Tensor) -> Tensor:
    return x[1:] ** 2 * x[:-1]


def given_jacobian(pattern: SparsityPattern, kind: str) -> Tensor:
    return sparse_jacobian(differences, numbers(9), pattern=pattern, coloring=kind)(numbers(9))


UPPER = SparsityPattern.of_matrix(np.eye(8, 9) + np.eye(8, 9, 1))
for kind in ("column", "row", "bidirectional"):
    lacking = SparsityPattern.of_matrix(np.eye(8, 9))
    broken(
        lambda _, __, kind=kind, lacking=lacking: given_jacobian(lacking, kind),
        name=f"Jacobian by {kind} without a diagonal",
    )
    shifted = SparsityPattern.of_matrix(np.roll(UPPER.dense(), 1, 1))
    broken(
        lambda _, __, kind=kind, shifted=shifted: given_jacobian(shifted, kind),
        name=f"Jacobian by {kind} with shifted columns",
    )


@broken
def jacobian_of_a_captured_index_replaced(_: Any, __: Any) -> Any:
    index = torch.tensor([1, 2, 3])
    plan = sparse_jacobian(lambda x: x[index] ** 2, numbers(9))
    plan(numbers(9))
    index = torch.tensor([5, 6, 7])
    return plan(numbers(9))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plan_is_caught(name, monkeypatch, tmp_path):
    with pytest.raises(SparsityError, match=r"disagrees with a product: at .* Either .*: (make a new plan|leave it out|take)"):
        BROKEN[name](monkeypatch, tmp_path)


def test_forty_broken_plans_at_least():
    assert len(BROKEN) >= 40


# ---------------------------------------------------------------------------------------------------- what f holds


def test_numbers_that_f_holds_may_change_in_place():
    weight = numbers(9, 9) * 1.0
    f = lambda x: torch.tanh(weight @ x).sum()  # noqa: E731
    plan, x = sparse_hessian(f, numbers(9)), numbers(9, seed=3)
    assert "captured weight of shape (9, 9)" in repr(plan)
    for _ in range(2):
        assert relative_error(dense(plan(x)), truth(f, x)) < 1e-13
        weight.mul_(-2)


def test_what_f_holds_may_be_replaced_at_the_price_of_the_graph():
    scale, power = numbers(9), 3
    f = lambda x: (scale * x**power).sum()  # noqa: E731
    plan, x = sparse_hessian(f, numbers(9)), numbers(9, seed=3)
    assert relative_error(dense(plan(x)), truth(f, x)) < 1e-13
    scale, power = numbers(9, seed=5), 4
    assert relative_error(dense(plan(x)), truth(f, x)) < 1e-13
    assert "computed eagerly: power, scale replaced" in repr(plan)
    assert relative_error(plan.diagonal(x), truth(f, x).diagonal()) < 1e-13


def test_other_integers_are_right_where_the_pattern_still_holds():
    f = lambda x, i: (x[i] ** 3).sum() + tridiagonal(x)  # noqa: E731
    i, j = torch.tensor([1, 2]), torch.tensor([1, 5])
    plan = sparse_hessian(f, numbers(9), i)
    for index in (i, j, i.clone()):
        assert relative_error(dense(plan(numbers(9), index)), truth(f, numbers(9), index)) < 1e-13


def test_a_module_that_is_put_into_another_mode():
    class Coupled(torch.nn.Module):
        def forward(self, x):
            return band_of_3(x) if self.training else tridiagonal(x)

    module = Coupled().eval()
    f = lambda x: module(x)  # noqa: E731
    plan, x = sparse_hessian(f, numbers(8)), numbers(8, seed=1)
    assert plan.colors == 3 and relative_error(dense(plan(x)), truth(f, x)) < 1e-13
    module.train()
    with pytest.raises(SparsityError, match="f is not what it was"):
        plan(x)


def test_a_tensor_that_requires_grad_keeps_its_graph():
    x = numbers(9)
    plan = sparse_hessian(rosenbrock, x)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(dense(plan(x)).trace(), x)
    x.requires_grad_(False)
    assert relative_error(slope, oracle_gradient(lambda x: truth_trace(x), [x])[0]) < 1e-12
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    held = sparse_hessian(lambda x: weight * rosenbrock(x), x)
    (slope,) = torch.autograd.grad(held.trace(x), weight)
    assert relative_error(slope, truth(rosenbrock, x).trace()) < 1e-12
    with torch.no_grad():
        assert not held(x).requires_grad


def truth_trace(x: Tensor) -> Tensor:
    """The trace of the Hessian of Rosenbrock's function, by hand."""
    return (1200 * x[:-1] ** 2 - 400 * x[1:] + 2).sum() + 200 * (len(x) - 1)


def test_results_share_no_values_and_survive_a_write_to_their_indices():
    x = numbers(9)
    plan = sparse_hessian(rosenbrock, x)
    first, second = plan(x), plan(x)
    first.values().zero_()
    first.col_indices().zero_()
    second.crow_indices().numpy()[:] = 0
    third = plan(x)
    third.col_indices().detach().view(-1)[:2] = 0
    assert (second.col_indices() > 0).any()
    assert (third.crow_indices() > 0).any()
    assert relative_error(dense(plan(x)), truth(rosenbrock, x)) < 1e-13
    assert torch.equal(plan.values(x), plan.values(x))


# ---------------------------------------------------------------------------------------------------- traps


def test_zero_times_infinity_is_in_the_pattern_and_spoils_no_certificate():
    def f(x):
        return (x[:2] * x[2:] * torch.tensor([0.0, torch.inf], dtype=x.dtype)).sum() + (x**3).sum()

    plan = sparse_hessian(f, numbers(4))
    assert plan.nonzeros == 8
    H = dense(plan(numbers(4)))
    assert torch.equal(H.isnan() | H.isinf(), truth(f, numbers(4)).isinf() | H.isnan())


def test_singular_points_have_no_certificate_and_the_next_call_has():
    f = lambda x: (x**2).sqrt().sum()  # noqa: E731
    plan = sparse_hessian(f, numbers(5))
    assert plan.values(torch.zeros(5, dtype=torch.float64)).isnan().all()
    assert not plan._memo.certified
    assert dense(plan(numbers(5))).abs().max() < 1e-14 and plan._memo.certified


def test_a_branch_on_a_value_is_dense_and_computed_eagerly():
    f, x = FUNCTIONS["data-dependent branch"]
    plan = sparse_hessian(f, x)
    assert plan.nonzeros == 36 and plan.colors == 6
    assert "taken to be full: f asks for a value that depends on x" in repr(plan)
    assert "computed eagerly: the function looks at the value of an argument" in repr(plan)
    for y in (x.abs(), -x.abs()):
        assert relative_error(dense(plan(y)), truth(f, y)) < 1e-13


def test_too_large_to_be_taken_to_be_full(monkeypatch):
    monkeypatch.setattr("functional_hess.sparsity.LARGEST_FULL", 35)
    f, x = FUNCTIONS["data-dependent branch"]
    with pytest.raises(SparsityError, match=r"sparse_hessian: the pattern could not be found .* Pass pattern="):
        sparse_hessian(f, x)


def test_a_random_function_is_refused_or_replayed():
    f = lambda x: F.dropout(x**3).sum()  # noqa: E731
    with pytest.raises(fh.RandomnessError):
        sparse_hessian(f, numbers(9))
    plan = sparse_hessian(f, numbers(9), randomness="same")
    assert "draws random numbers" in repr(plan)
    state = torch.get_rng_state()
    H = dense(plan(numbers(9)))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(H, torch.diag(H.diagonal()))
    assert {round(float(v), 6) for v in H.diagonal() / (6 * numbers(9))} <= {0.0, 2.0}


def test_skewed_derivatives_are_told_and_a_jacobian_of_the_gradient_takes_them():
    x = numbers(9)
    J = dense(sparse_jacobian(fh.grad(skewed), x)(x))
    rows = torch.stack([fh.vjp(fh.grad(skewed), x)[1](e)[0] for e in torch.eye(9, dtype=torch.float64)])
    assert torch.equal(J, rows) and not torch.equal(J, J.T)


# ---------------------------------------------------------------------------------------------------- transforms


def test_values_compose_with_transforms():
    x, xs = numbers(9), numbers(4, 9, seed=2)
    plan = sparse_hessian(rosenbrock, x)
    assert torch.equal(fh.vmap(plan.values)(xs), torch.stack([plan.values(x) for x in xs]))
    stacked = fh.vmap(lambda x: plan(x, layout=torch.strided))(xs)
    for H, y in zip(stacked, xs, strict=True):
        assert relative_error(H, truth(rosenbrock, y)) < 1e-13
    slope = oracle_gradient(truth_trace, [x])[0]
    assert relative_error(fh.grad(plan.trace)(x), slope) < 1e-12
    assert relative_error(fh.grad(lambda x: plan(x, layout=torch.strided).trace())(x), slope) < 1e-12
    assert relative_error(fh.jvp(plan.trace, (x,), (xs[0],))[1], slope @ xs[0]) < 1e-12
    assert relative_error(fh.hessian(plan.trace)(x), 2400 * torch.diag((torch.arange(9) < 8).double())) < 1e-12
    with pytest.raises(SparsityError, match="inside another transform there are no sparse tensors"):
        fh.vmap(plan)(xs)
    with pytest.raises(SparsityError, match="a plan cannot be made inside another transform"):
        fh.vmap(lambda x: sparse_hessian(rosenbrock, x).values(x))(xs)


def test_a_plan_that_is_not_known_to_hold_is_refused_inside_a_transform():
    xs = numbers(2, 9)
    plan = sparse_hessian(rosenbrock, xs[0], pattern="tridiagonal")
    with pytest.raises(SparsityError, match="inside another transform entries cannot be certified"):
        fh.vmap(plan.values)(xs)
    plan(xs[0])
    assert torch.equal(fh.vmap(plan.values)(xs)[1], plan.values(xs[1]))


def test_what_was_written_to_is_refused_inside_a_transform_until_it_is_certified():
    index, xs = torch.tensor([1, 2, 3]), numbers(2, 9)
    plan = sparse_hessian(lambda x: (x[index] ** 3).sum() + tridiagonal(x), xs[0])
    index += 2
    with pytest.raises(SparsityError, match="inside another transform entries cannot be certified"):
        fh.vmap(plan.values)(xs)
    plan(xs[0])
    assert torch.equal(fh.vmap(plan.values)(xs)[1], plan.values(xs[1]))


def test_inside_checked_every_call_is_held_to_differences():
    plan, x = sparse_hessian(rosenbrock, numbers(9)), numbers(9)
    with fh.checked() as record:
        plan(x)
        plan.diagonal(x)
    assert [(call.verb, call.status) for call in record] == [("sparse_hessian", "right")] * 2
    assert relative_error(plan.diagonal(x), truth(rosenbrock, x).diagonal()) < 1e-13

    class Wrong(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0].detach() ** 2

    wrong = sparse_hessian(lambda x: (Wrong.apply(x) + x**2).sum(), x)
    with fh.checked(), pytest.raises(AssertionError, match="disagrees with central differences"):
        wrong(x)


# ---------------------------------------------------------------------------------------------------- printing and files


def test_printing_shows_what_a_plan_is():
    told = repr(sparse_hessian(tridiagonal, numbers(6)))
    assert told.splitlines() == [
        "sparse_hessian(tridiagonal): 6 x 6, 15 nonzeros (0.42 of all)",
        "  pattern detected; star coloring with 3 colors",
        "  whole: 3 products, up to 3 at a time; result 0.0 MB, working set 0.0 MB (closed bound)",
        *[line for line in told.splitlines() if "prepared:" in line],
        "x x . . . .",
        "x x x . . .",
        ". x x x . .",
        ". . x x x .",
        ". . . x x x",
        ". . . . x .",
    ]


@pytest.mark.parametrize("kind", ["hessian", "tree", "jacobian"])
def test_a_plan_is_read_as_it_was_written(kind, tmp_path):
    f, x = {"hessian": (rosenbrock, numbers(9)), "tree": FUNCTIONS["trees"], "jacobian": (differences, numbers(9))}[kind]
    verb = sparse_jacobian if kind == "jacobian" else sparse_hessian
    plan = verb(f, x)
    plan.save(tmp_path / "a plan")
    loaded = fh.load_plan(tmp_path / "a plan", f)
    assert loaded.pattern == plan.pattern and loaded.origin == "loaded"
    assert np.array_equal(loaded.coloring.columns, plan.coloring.columns)
    for seed in (1, 2):
        y = moved(x, seed)
        assert relative_error(dense(loaded(y)), dense(plan(y))) < 1e-13
    if kind != "jacobian":
        y = moved(x, 3)
        assert relative_error(loaded.diagonal(y), plan.diagonal(y)) < 1e-13


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "plan"
    sparse_hessian(rosenbrock, numbers(9)).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["indices"] = arrays["indices"][::-1]
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match="is damaged: its contents and their sum differ"):
        fh.load_plan(path, rosenbrock)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no plan"):
        fh.load_plan(path, rosenbrock)
    sparse_hessian(rosenbrock, numbers(9)).save(path)
    with pytest.raises(ValueError, match=r"the plan is for x with leaves x \(9,\), got x \(8,\)"):
        fh.load_plan(path, rosenbrock)(numbers(8))


def test_other_arguments_are_refused_by_name():
    plan = sparse_hessian(lambda x, k: (x["w"] ** k).sum(), {"w": numbers(3)}, 2)
    with pytest.raises(ValueError, match=r"made for other arguments: args\[0\]\['w'\] must be .* \(3,\).*; args\[1\] must be 2"):
        plan({"w": numbers(4)}, 3)


# ---------------------------------------------------------------------------------------------------- Jacobians


def arrow_map(x: Tensor) -> Tensor:
    """A full row, a full column and a diagonal."""
    return torch.cat([x.sin().sum()[None], x[0] * x[1:] ** 2])


JACOBIANS: dict[str, tuple[Callable[[Any], Any], Any, int]] = {
    "neighbors": (differences, numbers(9), 2),
    "elementwise": (lambda x: x**2, numbers(9), 1),
    "sums": (lambda x: x.view(3, 4).sin().sum(1), numbers(12), 1),
    "one output": (lambda x: x.sin().sum()[None], numbers(9), 1),
    "zero-dimensional output": (lambda x: x.sin().sum(), numbers(9), 1),
    "arrow": (arrow_map, numbers(30), 3),
    "tree": (lambda x: {"u": x["a"] * x["b"], "n": 3, "v": x["b"][0] ** 2}, {"a": numbers(4), "b": numbers(4, seed=1)}, 2),
}


def jacobian_truth(f: Callable[[Any], Any], x: Any) -> Tensor:
    space = fh.Space.of(x)

    def flat(*t: Tensor) -> Tensor:
        out = f(space.at(t))
        return torch.cat([o.reshape(-1) for o in fh.Space.of(out).pack(out)])

    rows = oracle_gradient(flat, space.pack(x, "x"))
    return torch.cat([g.reshape(len(g), -1) for g in rows], 1)


@pytest.mark.parametrize("name", JACOBIANS)
@pytest.mark.parametrize("kind", [None, "column", "row", "bidirectional"])
def test_jacobians_are_exact_by_every_coloring(name, kind, inputs_unchanged):
    f, x, products = JACOBIANS[name]
    inputs_unchanged(x)
    plan = sparse_jacobian(f, x, coloring=kind)
    assert kind is not None or plan.colors == products
    for seed in (1, 2):
        y = moved(x, seed)
        assert relative_error(dense(plan(y)), jacobian_truth(f, y)) < 1e-13
    assert np.allclose(plan.to_scipy(x).toarray(), jacobian_truth(f, x))


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("kind", ["column", "row", "bidirectional"])
@pytest.mark.parametrize("given", [False, True])
def test_jacobians_in_portions(chunk, kind, given):
    f, x, _ = JACOBIANS["arrow"]
    pattern = SparsityPattern.of_matrix(jacobian_truth(f, x).numpy()) if given else None
    plan = sparse_jacobian(f, x, coloring=kind, chunk_size=chunk, pattern=pattern)
    for y in (x, 2 * x):
        assert relative_error(dense(plan(y)), jacobian_truth(f, y)) < 1e-13


@pytest.mark.parametrize("scenario", VECTOR_SCENARIOS, ids=str)
def test_the_jacobian_is_that_written_by_hand(scenario: Scenario):
    plan = sparse_jacobian(scenario.f, scenario.x, *scenario.args)
    got = dense(plan(scenario.x, *scenario.args))
    want = jacobian_truth(lambda x: scenario.f(x, *scenario.args), scenario.x)
    assert relative_error(got, want) < 1e-13


def test_jacobians_compose_with_transforms():
    plan, xs = sparse_jacobian(differences, numbers(9)), numbers(3, 9)
    assert torch.equal(fh.vmap(plan.values)(xs), torch.stack([plan.values(x) for x in xs]))
    with pytest.raises(TypeError, match=r"diagonal is for plans of sparse_hessian"):
        plan.diagonal(xs[0])
    with pytest.raises(fh.DependenceError, match="sparse_jacobian: f"):
        sparse_jacobian(lambda x: x.round().detach() * 1.0, numbers(3))


@pytest.mark.cuda
def test_plans_on_an_accelerator():
    x = {"b": numbers(6).cuda(), "a": numbers(2, 3, seed=1).cuda(), "c": numbers(4, seed=2).cuda(), "n": 3}
    y = {name: t.cpu() if isinstance(t, Tensor) else t for name, t in x.items()}
    for pattern in (None, sparse_hessian(two_chains, y).pattern):
        plan = sparse_hessian(two_chains, x, pattern=pattern)
        assert plan(x).is_cuda and relative_error(dense(plan(x)).cpu(), truth(two_chains, y)) < 1e-12
        assert (
            relative_error(
                fh.Space.of(y).ravel(fh.tree.tree_map(lambda t: t.cpu(), plan.diagonal(x))), truth(two_chains, y).diagonal()
            )
            < 1e-12
        )


def test_progress_is_shown_over_chunks(capsys):
    plan = sparse_hessian(rosenbrock, numbers(9), chunk_size=1, progress=True)
    plan(numbers(9))
    assert "3/3" in capsys.readouterr().err
