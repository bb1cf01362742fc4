"""Dense Hessians of functions that couple each variable with few others: few products, every entry; and when rows are taken."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import numbers
from oracles import hessian as oracle_hessian
from oracles import matrix, relative_error
from torch import Tensor

import functional_hess as fh
from functional_hess import Space, colored, explain

PLACES = torch.randperm(40, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def everything_is_worth_a_look(monkeypatch):
    monkeypatch.setattr(colored, "WORTH_A_LOOK", 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Energy:
    """A function, its point, and how many products serve for its Hessian and for the diagonal of that."""

    name: str
    f: Callable[[Any], Tensor]
    x: Any
    products: int
    of_diagonal: int

    def __str__(self) -> str:
        return self.name

    @functools.cache  # noqa: B019
    def truth(self) -> Tensor:
        """By double backward, entry by entry."""
        space = Space.of(self.x)
        points = list(space.pack(self.x, "x"))
        return matrix(oracle_hessian(lambda *t: self.f(space.at(t)), points), points)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def membrane(x):
    u = x.view(8, 8)
    return ((u[1:] - u[:-1]) ** 4).sum() + ((u[:, 1:] - u[:, :-1]) ** 4).sum() + u.exp().sum()


def two_chains(x):
    """Two leaves, coupled entry by entry, and a third that is alone."""
    return (x["b"][1:] * x["b"][:-1] ** 3).sum() + (x["a"] ** 2 * x["b"].view(6, 5)).sum() + (x["c"] ** 3).sum()


ENERGIES = [
    Energy("chain", rosenbrock, numbers(40), 3, 2),
    Energy("scattered chain", lambda x: rosenbrock(x[PLACES]), numbers(40), 3, 2),
    Energy("separable", lambda x: x.sin().sum(), numbers(40), 1, 1),
    Energy("linear", lambda x: (3 * x).sum(), numbers(40), 0, 1),
    Energy("membrane", membrane, numbers(64), 6, 2),
    Energy("two chains", two_chains, {"b": numbers(30), "a": numbers(6, 5, seed=1), "c": numbers(20, seed=2), "n": 3}, 4, 3),
    Energy("squared residual", lambda x: torch.nn.functional.mse_loss(x[1:], x[:-1] ** 2), numbers(40), 3, 2),
]
every_energy = pytest.mark.parametrize("energy", ENERGIES, ids=str)


@every_energy
def test_hessian_blocks_and_diagonal_are_exact_from_few_products(energy, inputs_unchanged):
    inputs_unchanged(energy.x)
    space, H = Space.of(energy.x), energy.truth()
    told = explain(fh.hessian(energy.f), energy.x)
    assert told.route == "colored" and told.rows <= energy.products
    assert relative_error(space.matrix(fh.hessian(energy.f)(energy.x)), H) < 1e-13
    told = explain(fh.hessian_diagonal(energy.f), energy.x)
    assert told.route == "colored" and told.rows <= energy.of_diagonal
    assert relative_error(space.ravel(fh.hessian_diagonal(energy.f)(energy.x)), H.diagonal()) < 1e-13
    for (p, q), block in fh.hessian_blocks(energy.f, pairs=[("*", "*")])(energy.x).items():
        i, j = space.paths.index(p), space.paths.index(q)
        rows = H[space.offsets[i] :, space.offsets[j] :][: space.sizes[i], : space.sizes[j]]
        assert float((block.reshape(rows.shape) - rows).abs().max()) < 1e-11 and block.is_contiguous()


@every_energy
def test_single_precision_too(energy):
    x = (
        {k: t.float() if isinstance(t, Tensor) else t for k, t in energy.x.items()}
        if isinstance(energy.x, dict)
        else energy.x.float()
    )
    assert explain(fh.hessian(energy.f), x).route == "colored"
    assert relative_error(Space.of(x).matrix(fh.hessian(energy.f)(x)), energy.truth()) < 1e-5


def test_values_gradients_aux_and_out_come_along():
    energy = ENERGIES[0]
    value, g, H = fh.value_grad_and_hessian(rosenbrock)(energy.x)
    assert torch.equal(value, rosenbrock(energy.x)) and torch.equal(g, fh.grad(rosenbrock)(energy.x))
    assert relative_error(H, energy.truth()) < 1e-13
    out = torch.full((40, 40), torch.nan, dtype=torch.float64)
    H, aux = fh.hessian(lambda x: (rosenbrock(x), "aux"), has_aux=True, out=out)(energy.x)
    assert aux == "aux" and relative_error(out, energy.truth()) < 1e-13
    assert H.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    diagonal, aux = fh.hessian_diagonal(lambda x: (rosenbrock(x), "aux"), has_aux=True)(energy.x)
    assert aux == "aux" and relative_error(diagonal, energy.truth().diagonal()) < 1e-13


@pytest.mark.parametrize("chunk", [1, 2])
def test_products_may_come_in_any_portions(chunk, monkeypatch):
    monkeypatch.setattr(colored, "chunk_of_colors", lambda *_: chunk)
    energy = ENERGIES[4]
    assert relative_error(fh.hessian(energy.f)(energy.x), energy.truth()) < 1e-13


# Where rows are taken ----------------------------------------------------------------------------------------------------


def dense(x):
    return (x.sum() ** 2) ** 2


def hidden(x):
    """Rows 0, 13, 26 and 39, which are looked at, are sparse; the others are not."""
    return rosenbrock(x) + x[torch.tensor([k for k in range(40) if k % 13])].sum() ** 4


@pytest.mark.parametrize("f", [dense, hidden])
def test_full_hessians_are_computed_by_rows(f):
    x = numbers(40)
    assert explain(fh.hessian(f), x).route == "dense rows"
    assert relative_error(fh.hessian(f)(x), matrix(oracle_hessian(f, [x]), [x])) < 1e-12


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


def test_a_function_whose_derivative_is_asymmetric_goes_by_rows():
    x = numbers(40)
    f = lambda x: (Skewed.apply(x[1:], x[:-1]) + x[1:] ** 3).sum()  # noqa: E731
    assert explain(fh.hessian(f), x).route == "dense rows"
    assert explain(fh.hessian_diagonal(f), x).route == "colored"
    assert relative_error(fh.hessian_diagonal(f)(x), torch.cat([x.new_zeros(1), 6 * x[1:]])) < 1e-13


def test_the_entries_are_held_to_one_more_product(monkeypatch):
    monkeypatch.setattr(colored, "_compressions", weakref.WeakKeyDictionary())
    honest = colored.recovery
    monkeypatch.setattr(colored, "recovery", lambda *args: honest(*args)[::-1].copy())
    energy = ENERGIES[0]
    assert explain(fh.hessian(energy.f), energy.x).route == "dense rows"
    assert relative_error(fh.hessian(energy.f)(energy.x), energy.truth()) < 1e-13


def test_a_structure_that_changes_is_seen():
    """Nothing is believed of an earlier call."""
    step = [1]

    def f(x):
        return (x[step[-1] :] * x[: -step[-1]] ** 3).sum()

    x = numbers(40)
    for k in (1, 7):
        step.append(k)
        assert explain(fh.hessian(f), x).route == "colored"
        assert relative_error(fh.hessian(f)(x), matrix(oracle_hessian(f, [x]), [x])) < 1e-13


def test_a_tensor_that_requires_grad_keeps_its_graph():
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    H = fh.hessian(lambda x: weight * rosenbrock(x))(ENERGIES[0].x)
    (slope,) = torch.autograd.grad(H.trace(), weight)
    assert relative_error(slope, ENERGIES[0].truth().trace()) < 1e-12


def test_transforms_outside_and_options_are_obeyed(monkeypatch):
    energy = ENERGIES[0]
    stacked = fh.vmap(fh.hessian(rosenbrock))(torch.stack([energy.x, -energy.x]))
    assert relative_error(stacked[0], energy.truth()) < 1e-13
    assert explain(fh.hessian(rosenbrock, chunk_size=7), energy.x).route == "dense rows"
    monkeypatch.undo()
    assert explain(fh.hessian(rosenbrock), energy.x).route == "dense rows"  # too small to be looked at


def test_singular_points_keep_their_nans():
    """Where the product has NaN nothing can be compared, and rows tell which entries are."""

    def f(x):
        return (x**2).sqrt().sum()

    x = torch.zeros(40, dtype=torch.float64)
    assert explain(fh.hessian(f), x).route == "dense rows"


def test_a_dense_hessian_is_looked_at_once(monkeypatch):
    """Until f is another program, or its arguments are of another kind."""
    looks = []
    original = colored.detect_reached
    monkeypatch.setattr(colored, "detect_reached", lambda *given, **options: looks.append(0) or original(*given, **options))
    coupled = True

    def f(x):
        return x.sum().sin() * x.square().sum() if coupled else (x[1:] * x[:-1] ** 3).sum()

    x = numbers(40)
    for expected in (1, 1):
        assert relative_error(fh.hessian(f)(x), matrix(oracle_hessian(f, [x]), [x])) < 1e-12 and len(looks) == expected
    fh.hessian(f)(numbers(41))
    assert len(looks) == 2
    coupled = False
    assert explain(fh.hessian(f), x).route == "colored"
