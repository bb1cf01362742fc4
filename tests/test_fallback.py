"""Operators for which torch has no forward-mode rule: every verb is right in another mode, or refuses by name.

Truth is a closed form: with y = op(x_i), f(x) = sum of sin y, g = y' cos y and H_ii = y'' cos y - y'^2 sin y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from networks import numbers
from oracles import relative_error
from torch import Tensor

import functional_hess as fh
from functional_hess import testing

X = torch.tensor([0.7, 1.9, 1.2], dtype=torch.float64)
V = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
BATCH = torch.stack([X, 1.3 * X])
Formula = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def density(x: Tensor, a: float) -> Tensor:
    """x^(a-1) e^-x / Gamma(a), the derivative of the regularized lower incomplete gamma function."""
    return x ** (a - 1) * (-x).exp() / math.gamma(a)


def zeta(s: float, x: Tensor) -> Tensor:
    return torch.special.zeta(torch.full_like(x, s), x)


OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], Formula]] = {  # the operator; y' and y''
    "igamma": (
        lambda x: torch.igamma(torch.full_like(x, 1.3), x),
        lambda x: (torch.igamma(torch.full_like(x, 1.3), x), density(x, 1.3), density(x, 1.3) * (0.3 / x - 1)),
    ),
    "igammac": (
        lambda x: torch.igammac(torch.full_like(x, 0.6), x),
        lambda x: (torch.igammac(torch.full_like(x, 0.6), x), -density(x, 0.6), -density(x, 0.6) * (-0.4 / x - 1)),
    ),
    "special_zeta": (lambda x: zeta(2.3, x), lambda x: (zeta(2.3, x), -2.3 * zeta(3.3, x), 2.3 * 3.3 * zeta(4.3, x))),
}
operators = pytest.mark.parametrize("name", OPERATORS)


class Function:
    """f of one operator, what its derivatives are, and nothing remembered from another test."""

    def __init__(self, name: str) -> None:
        self.op, self.formula = OPERATORS[name]

    def __call__(self, x: Tensor) -> Tensor:
        return self.op(x).sin().sum()

    def gradient(self, x: Tensor) -> Tensor:
        y, slope, _ = self.formula(x)
        return slope * y.cos()

    def diagonal(self, x: Tensor) -> Tensor:
        y, slope, bend = self.formula(x)
        return bend * y.cos() - slope**2 * y.sin()

    def hessian(self, x: Tensor) -> Tensor:
        return torch.diag_embed(self.diagonal(x))

    def product(self, x: Tensor) -> Tensor:
        return self.diagonal(x) * V


def of_samples(f: Function) -> Any:
    return fh.empirical_risk(lambda w, a: f(w * a).sum(), reduction="sum")


def rows_of(f: Function) -> Tensor:
    return torch.cat([rows for _, rows in fh.hessian_rows(f, chunk_size=2)(X)])


def passed(f: Function, law: Callable[..., Any], *args: Any) -> Tensor:
    law(f, *args)
    return X


ONES = torch.ones(2, 3, dtype=torch.float64)
RIGHT: dict[str, tuple[Callable[[Function], Any], Callable[[Function], Any]]] = {  # what is called, and what it is
    "grad": (lambda f: fh.grad(f)(X), lambda f: f.gradient(X)),
    "value_and_grad": (lambda f: fh.value_and_grad(f)(X), lambda f: (f(X), f.gradient(X))),
    "vjp": (lambda f: fh.vjp(f, X)[1](torch.ones((), dtype=X.dtype)), lambda f: (f.gradient(X),)),
    "linearize": (lambda f: fh.linearize(f, X)[1](V), lambda f: f.gradient(X) @ V),
    "jacrev": (lambda f: fh.jacrev(f)(X), lambda f: f.gradient(X)),
    "jacrev of grad": (lambda f: fh.jacrev(fh.grad(f))(X), lambda f: f.hessian(X)),
    "hvp": (lambda f: fh.hvp(f, X, V), lambda f: f.product(X)),
    "hvp, reverse over reverse": (lambda f: fh.hvp(f, X, V, mode="reverse-over-reverse"), lambda f: f.product(X)),
    "hvp by double backward": (lambda f: fh.hvp(f, X, V, mode="double-backward"), lambda f: f.product(X)),
    "hvp by differences": (lambda f: fh.hvp(f, X, V, mode="finite-difference"), lambda f: f.product(X)),
    "grad_and_hvp": (lambda f: fh.grad_and_hvp(f, X, V), lambda f: (f.gradient(X), f.product(X))),
    "hessian": (lambda f: fh.hessian(f)(X), lambda f: f.hessian(X)),
    "hessian, the fastest mode": (lambda f: fh.hessian(f, mode="fastest")(X), lambda f: f.hessian(X)),
    "value_grad_and_hessian": (
        lambda f: fh.value_grad_and_hessian(f)(X),
        lambda f: (f(X), f.gradient(X), f.hessian(X)),
    ),
    "hessian_rows": (rows_of, lambda f: f.hessian(X)),
    "hessian_blocks": (lambda f: fh.hessian_blocks(f)(X), lambda f: f.hessian(X)),
    "hessian_diagonal": (lambda f: fh.hessian_diagonal(f)(X), lambda f: f.diagonal(X)),
    "hessian of a risk": (lambda f: fh.hessian(of_samples(f))(X, ONES), lambda f: 2 * f.hessian(X)),
    "diagonal of a risk": (lambda f: fh.hessian_diagonal(of_samples(f))(X, ONES), lambda f: 2 * f.diagonal(X)),
    "sample_gradients": (
        lambda f: fh.sample_gradients(of_samples(f))(X, ONES),
        lambda f: torch.stack([f.gradient(X), f.gradient(X)]),
    ),
    "sample_gradient_norms": (
        lambda f: fh.sample_gradient_norms(of_samples(f))(X, ONES),
        lambda f: f.gradient(X).norm().expand(2).clone(),
    ),
    "prepared hessian": (lambda f: fh.prepare(fh.hessian(f), X)(X), lambda f: f.hessian(X)),
    "sparse_hessian": (lambda f: fh.sparse_hessian(f, X)(X).to_dense(), lambda f: f.hessian(X)),
    "sparse_hessian of a given pattern": (
        lambda f: fh.sparse_hessian(f, X, pattern="tridiagonal")(X).to_dense(),
        lambda f: f.hessian(X),
    ),
    "check_hessian": (lambda f: passed(f, testing.check_hessian, X), lambda f: X),
    "check_derivatives": (lambda f: passed(f, testing.check_derivatives, X), lambda f: X),
    "vmap": (lambda f: fh.vmap(f)(BATCH), lambda f: torch.stack([f(x) for x in BATCH])),
    "vmap of grad": (lambda f: fh.vmap(fh.grad(f))(BATCH), lambda f: f.gradient(BATCH)),
    "vmap of hvp over points": (lambda f: fh.vmap(lambda x: fh.hvp(f, x, V))(BATCH), lambda f: f.product(BATCH)),
    "vmap of hvp over directions": (
        lambda f: fh.vmap(lambda v: fh.hvp(f, X, v))(torch.diag(V)),
        lambda f: f.hessian(X) * V,
    ),
    "vmap of hessian": (lambda f: fh.vmap(fh.hessian(f))(BATCH), lambda f: f.hessian(BATCH)),
    "vmap of value_grad_and_hessian": (
        lambda f: fh.vmap(lambda x: fh.value_grad_and_hessian(f)(x)[2])(BATCH),
        lambda f: f.hessian(BATCH),
    ),
    "vmap of hessian_diagonal": (lambda f: fh.vmap(fh.hessian_diagonal(f))(BATCH), lambda f: f.diagonal(BATCH)),
    "vmap of hessian_blocks": (lambda f: fh.vmap(fh.hessian_blocks(f))(BATCH), lambda f: f.hessian(BATCH)),
    "hessian of vmap": (
        lambda f: fh.hessian_diagonal(lambda x: fh.vmap(f)(x).sum())(BATCH),
        lambda f: f.diagonal(BATCH),
    ),
    "grad of a trace": (
        lambda f: fh.grad(lambda x: fh.hessian_diagonal(f)(x).sum())(X),
        lambda f: fh.grad(lambda x: f.diagonal(x).sum())(X),
    ),
    "grad of hvp": (
        lambda f: fh.grad(lambda x: fh.hvp(f, x, V).sum())(X),
        lambda f: fh.grad(lambda x: f.product(x).sum())(X),
    ),
}
NAMED: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: fh.jvp(f, (X,), (V,)),
    "jacfwd": lambda f: fh.jacfwd(f)(X),
    "vmap of jvp": lambda f: fh.vmap(lambda v: fh.jvp(f, (X,), (v,))[1])(torch.diag(V)),
    "jvp of grad": lambda f: fh.jvp(fh.grad(f), (X,), (V,)),
    "jvp of hvp": lambda f: fh.jvp(lambda x: fh.hvp(f, x, V), (X,), (V,)),
    "hvp, forward over reverse": lambda f: fh.hvp(f, X, V, mode="forward-over-reverse"),
    "hessian, forward over reverse": lambda f: fh.hessian(f, mode="forward-over-reverse")(X),
    "mapped hvp, forward over reverse": lambda f: fh.vmap(lambda x: fh.hvp(f, x, V, mode="forward-over-reverse"))(BATCH),
}


@operators
@pytest.mark.parametrize("verb", RIGHT)
def test_an_operator_without_a_forward_rule_is_right_by_reverse_mode(name: str, verb: str) -> None:
    call, truth = RIGHT[verb]
    f = Function(name)
    assert relative_error(call(f), truth(f)) < (1e-9 if verb == "hvp by differences" else 1e-13)


@operators
@pytest.mark.parametrize("verb", NAMED)
def test_where_forward_mode_is_asked_for_the_error_names_the_operator_the_line_and_the_remedy(name: str, verb: str) -> None:
    with pytest.raises(fh.MissingDerivativeError, match=rf"forward AD with {name} .*test_fallback.py:\d+\. Write that op as"):
        NAMED[verb](Function(name))


def test_complex_singular_values_are_right_where_their_check_cannot_be_mapped_and_vectors_are_refused_by_name() -> None:
    """Their gradient asks whether the function is one of the subspaces, and does not ask under `vmap`."""

    def values(x: Tensor) -> Tensor:
        return torch.linalg.svdvals(torch.complex(x, x.cos())).sin().sum()

    def vectors(x: Tensor) -> Tensor:
        return torch.linalg.svd(torch.complex(x, x.cos()))[0].abs().sin().sum()

    xs = torch.stack([numbers(2, 2), numbers(2, 2, seed=1)])
    for f in (values, vectors):
        truth = torch.stack([oracles.hessian(f, (x,))[0][0] for x in xs])
        assert relative_error(fh.hessian(f)(xs[0]), truth[0]) < 1e-12
        assert relative_error(fh.hvp(f, xs[0], xs[1]), (truth[0] * xs[1]).sum((2, 3))) < 1e-12
    products = fh.vmap(lambda x: fh.hvp(values, x, xs[1]))(xs)
    assert relative_error(products, (torch.stack([oracles.hessian(values, (x,))[0][0] for x in xs]) * xs[1]).sum((3, 4))) < 1e-12
    for call in (fh.vmap(fh.grad(vectors)), fh.vmap(fh.hessian(vectors)), fh.vmap(lambda x: fh.hvp(vectors, x, xs[1]))):
        with pytest.raises(fh.MissingDerivativeError, match=r"vmap over torch.allclose isn't supported"):
            call(xs)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_writes_in_place_that_forward_mode_cannot_map_lead_on_to_reverse_mode(reduction: str) -> None:
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return F.hinge_embedding_loss(x, signs, margin=2.0, reduction=reduction).sin().sum()

    truth = torch.stack([oracles.hessian(f, (x,))[0][0] @ V for x in BATCH])
    assert relative_error(fh.vmap(lambda x: fh.hvp(f, x, V))(BATCH), truth) < 1e-12
    assert relative_error(fh.vmap(lambda x: fh.hessian(f)(x) @ V)(BATCH), truth) < 1e-12


def test_a_check_of_values_cannot_be_mapped_and_is_refused_with_the_line() -> None:
    """`gaussian_nll_loss` branches on the sign of its variances."""

    def f(x: Tensor) -> Tensor:
        return F.gaussian_nll_loss(x, V, x**2)

    assert relative_error(fh.hvp(f, X, V), oracles.hessian(f, (X,))[0][0] @ V) < 1e-12
    assert relative_error(fh.hessian(f)(X), oracles.hessian(f, (X,))[0][0]) < 1e-12
    for call in (fh.vmap(f), fh.vmap(fh.grad(f)), fh.vmap(fh.hessian(f)), fh.hessian(lambda x: fh.vmap(f)(x).sum())):
        with pytest.raises(fh.MissingDerivativeError, match=r"vmap: It looks like .*test_fallback.py:\d+.* or use torch.where"):
            call(BATCH)


@operators
def test_inside_checked_the_product_and_the_hessian_are_verified(name: str) -> None:
    f = Function(name)
    with fh.checked() as record:
        fh.hvp(f, X, V)
        fh.hessian(f)(X)
        fh.hessian_diagonal(f)(X)
    assert [check.status for check in record] == ["right"] * 3


@operators
def test_explain_says_which_mode_is_taken(name: str) -> None:
    assert fh.explain(fh.hessian(Function(name)), X).mode == "reverse-over-reverse"
