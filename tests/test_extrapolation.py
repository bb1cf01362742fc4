"""Products by differences are as right as they say, say so where it can be seen, and warn where they are not."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import network, numbers
from oracles import relative_error
from sweep import cases
from sweep.judge import compare, truth_of
from sweep.problems import problem_of
from torch import Tensor, nn

import functional_hess as fh
from functional_hess import levels
from functional_hess.extrapolation import ByDifferences

DIFFERENCE = "finite-difference"
X = numbers(6)
RANDOM = numbers(6, seed=1)
FIRST = torch.eye(6, dtype=torch.float64)[0]


# The estimate is honest -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
    """A function at X; some take X as a constant besides, so that something happens near it."""

    f: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float64
    relative: float = 1e-8  # the estimate may be that large, at most, relative to the product
    exact: Callable[[Tensor], Tensor] | None = None  # the same in float64, where f does not take it


def product_by_double_backward(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(z), z, create_graph=True)
    if not g.requires_grad:
        return torch.zeros_like(x)
    (product,) = torch.autograd.grad(g, z, v, materialize_grads=True)
    return product


def near(shift: float) -> Callable[[Tensor], Tensor]:
    """x + shift - X."""
    return lambda x: x - X.to(x.dtype) + shift


def layered(x: Tensor) -> Tensor:
    return (F.layer_norm(torch.tanh(x.outer(x)), (6,)) ** 4).sum()


def eigen(x: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(x.outer(x) + torch.diag(torch.arange(6.0, dtype=x.dtype))).exp().sum().log()


def single(f: Callable[[Tensor], Tensor]) -> Trial:
    return Trial(f, torch.float32, 1e-5)


def only_single(f: Callable[[Tensor], Tensor]) -> Trial:
    """f, made to take float32 alone."""

    def narrow(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 alone")
        return f(x)

    return Trial(narrow, torch.float32, 1e-3, exact=f)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


TRIALS: dict[str, Trial] = {
    "quartic": Trial(lambda x: (x**4).sum()),
    "quadratic": Trial(lambda x: x.outer(x).sum() + (x**2).sum()),
    "exponential": Trial(lambda x: x.exp().sum() * x[0]),
    "rosenbrock": Trial(rosenbrock),
    "product": Trial(lambda x: x.prod() + x.cos().sum()),
    "softmax": Trial(lambda x: (x.softmax(0) ** 2).sum()),
    "logsumexp": Trial(lambda x: (3 * x).logsumexp(0)),
    "log": Trial(lambda x: (x**2 + 1e-2).log().sum()),
    "reciprocal": Trial(lambda x: (1 / (x**2 + 1e-3)).sum()),
    "layer norm": Trial(layered),
    "eigenvalues": Trial(eigen),
    "above a large constant": Trial(lambda x: 1e8 + (x**3).sum()),
    "with a large slope": Trial(lambda x: (1e4 * x).sum() + (x**3).sum()),
    "with a small curvature": Trial(lambda x: x.sum() + 1e-3 * (x**3).sum()),
    "of wavelength 1/2": Trial(lambda x: (12 * x).sin().sum()),
    "of wavelength 1/20": Trial(lambda x: (120 * x).sin().sum()),
    "of wavelength 1/2000": Trial(lambda x: (12000 * x).sin().sum()),
    "two wavelengths": Trial(lambda x: x.sin().sum() + 1e-4 * (1000 * x).sin().sum(), relative=1e-6),
    "stiff": Trial(lambda x: (torch.logspace(0, 6, 6, dtype=x.dtype) * x**2).sum() + x.cos().prod(), relative=1e-6),
    "stiff and curved": Trial(lambda x: (torch.logspace(0, 3, 6, dtype=x.dtype) * x).sin().sum()),
    "a steep step": Trial(lambda x: torch.sigmoid(50 * x).sum()),
    "a narrow peak": Trial(lambda x: torch.exp(-1e4 * near(-0.003)(x) ** 2).sum()),
    "an end of the domain nearby": Trial(lambda x: near(1e-3)(x).log().sum()),
    "a root nearby": Trial(lambda x: near(1e-2)(x).sqrt().sum()),
    "a kink nearby": Trial(lambda x: (F.relu(near(1e-3)(x)) ** 2).sum()),
    "a kink very near": Trial(lambda x: (F.relu(near(1e-5)(x)) ** 2).sum() + (x**3).sum()),
    "float32": single(lambda x: (x.sin() * x.exp()).sum() ** 2),
    "float32, stiff": single(lambda x: (torch.logspace(0, 3, 6) * x).sin().sum()),
    "float32, a kink nearby": single(lambda x: (F.relu(near(1e-3)(x)) ** 2).sum() + (x**3).sum()),
    "float32 alone": only_single(lambda x: (x.sin() * x.exp()).sum() ** 2),
    "float32 alone, quartic": only_single(lambda x: (x**4).sum()),
    "float32 inside": Trial(lambda x: (x.float() ** 3).sum().double(), relative=1e-3, exact=lambda x: (x**3).sum()),
    "bfloat16": Trial(lambda x: (x**3).sum(), torch.bfloat16, 1e-2),
}


def estimated(trial: Trial, v: Tensor) -> tuple[float, ByDifferences]:
    """The true error of a product, and the map that has its estimate."""
    x, v = X.to(trial.dtype), v.to(trial.dtype)
    linear = ByDifferences(lambda x: (trial.f(x), None), (x,), (0,), "hvp")
    (product,) = linear({0: v})
    assert product.dtype == trial.dtype
    truth = product_by_double_backward(trial.exact or trial.f, x.double(), v.double())
    return float((product.double() - truth).abs().max()), linear


@pytest.mark.parametrize("v", [RANDOM, FIRST, 1e-3 * RANDOM], ids=["random", "unit", "short"])
@pytest.mark.parametrize("name", TRIALS)
def test_the_true_error_is_below_ten_times_the_estimate_and_the_estimate_is_no_excuse(name: str, v: Tensor) -> None:
    error, linear = estimated(TRIALS[name], v)
    assert linear.worst is not None
    assert error <= 10 * linear.worst.error
    assert linear.worst.relative <= TRIALS[name].relative
