"""Operators that torch differentiates right but at single points, where it gives a clean number that is wrong.

The 2-norm and the standard deviation have a slope everywhere but at 0, where torch takes the slope 0. A chain rule through
that slope,

    d^2 phi(|z|) = phi''(|z|) (d|z|)^2 + phi'(|z|) d^2|z|,

then gives 0 at z = 0 where |z|^2 has the Hessian 2 I, and forward over reverse gives it without a word. Here the slope at 0 is 0
for the innermost derivative, so that gradients are torch's, and NaN for those around it: a second derivative that needs it is NaN
in every mode, and one that does not (a norm below the floor of a `clamp`) is as it was.

`sinc` is analytic at 0, where the quotient sin(pi x) / (pi x) loses its derivatives to rounding: its series has them all.
`logcumsumexp` has a forward-mode rule that is wrong after an entry of -inf: sums of pairs, over spans twice as long at each
step, do without.

    SINGULAR : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from functional_hess.nesting import constant_of_innermost

__all__ = ["SINGULAR"]

_Dim = Any  # int, several or None
_TERMS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(11))  # of sin(u) / u in u^2, enough for |u| < 2


def _without_slope_at_zero(root: Tensor, z: Tensor, dim: _Dim, keepdim: bool) -> Tensor:
    """``root``, the root of a sum of z^2 over ``dim``, whose slope at z = 0 is NaN at all levels but the innermost."""
    constant = constant_of_innermost(z)
    if constant is None:
        return root
    z, zero = constant, root == 0
    total = (z * z).sum(dim, keepdim=keepdim).to(root.dtype)
    return root + torch.where(zero, torch.where(zero, total, 1.0).sqrt(), 0.0)


def _vector_norm(x: Tensor, ord: Any = 2, dim: _Dim = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """(sum x^2)^(1/2)."""
    if ord != 2 or not x.is_floating_point():
        return NotImplemented
    norm = torch.linalg.vector_norm(x, ord, dim, keepdim, dtype=dtype)
    return _without_slope_at_zero(norm, x, dim, keepdim)


def _norm(A: Tensor, ord: Any = None, dim: _Dim = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The 2-norm of what `torch.linalg.norm` takes for a vector, and the Frobenius norm of a matrix."""
    vector = A.dim() == 1 if dim is None else isinstance(dim, int) or len(dim) == 1
    euclidean = ord is None or (ord == 2 and vector) or (ord == "fro" and not vector)
    if not euclidean or not A.is_floating_point():
        return NotImplemented
    norm = torch.linalg.norm(A, ord, dim, keepdim, dtype=dtype)
    return _without_slope_at_zero(norm, A, dim, keepdim)


def _matrix_norm(
    A: Tensor, ord: Any = "fro", dim: Sequence[int] = (-2, -1), keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The Frobenius norm."""
    if ord != "fro" or not A.is_floating_point():
        return NotImplemented
    norm = torch.linalg.matrix_norm(A, ord, dim, keepdim, dtype=dtype)
    return _without_slope_at_zero(norm, A, dim, keepdim)


def _dist(input: Tensor, other: Tensor, p: Any = 2) -> Any:
    """|x - y|."""
    if p != 2 or not input.is_floating_point():
        return NotImplemented
    return _without_slope_at_zero(torch.dist(input, other, p), input - other, None, False)


def _pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    """|x - y + eps| along the last dimension."""
    if p != 2 or not x1.is_floating_point():
        return NotImplemented
    distance = torch.pairwise_distance(x1, x2, p, eps, keepdim)
    return _without_slope_at_zero(distance, x1 - x2 + eps, -1, keepdim)


def _std(
    input: Tensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    """(sum (x - m)^2 / (n - correction))^(1/2)."""
    answer = _std_mean(input, dim, unbiased, keepdim, correction=correction)
    return answer if answer is NotImplemented else answer[0]


def _std_mean(
    input: Tensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    """The same and the mean m."""
    if not input.is_floating_point():
        return NotImplemented
    if isinstance(dim, bool):  # std(x, unbiased)
        dim, unbiased = None, dim
    if unbiased is not None:
        correction = float(unbiased)
    mean = input.mean(dim, keepdim=True) if dim is not None else input.mean()
    centered = input - mean
    count = input.numel() // max(mean.numel(), 1) - (1.0 if correction is None else correction)
    spread = torch.linalg.vector_norm(centered, 2, dim, keepdim) / math.sqrt(max(count, 0.0))
    mean = mean if keepdim or dim is None else mean.squeeze(dim)
    return _without_slope_at_zero(spread, centered, dim, keepdim), mean


def _sinc(input: Tensor) -> Any:
    """sin(u) / u with u = pi x; its series in u^2 where |u| < 2."""
    if not input.is_floating_point():
        return NotImplemented
    near = input.abs() < 2 / math.pi
    square = torch.where(near, math.pi * input, 0.0).square()
    series = torch.zeros_like(square)
    for term in reversed(_TERMS):
        series = series * square + term
    far = math.pi * torch.where(near, 1.0, input)
    return torch.where(near, series, far.sin() / far)


def _logcumsumexp(input: Tensor, dim: int) -> Any:
    """log of the sums of exp(x_j) over j <= i, by pairs: y_i <- log(exp(y_i) + exp(y_(i-s))) for s = 1, 2, 4, ..."""
    if not input.is_floating_point() or not input.dim():
        return NotImplemented
    n, step, y = input.shape[dim], 1, input
    while step < n:
        longer = _log_of_sum(y.narrow(dim, step, n - step), y.narrow(dim, 0, n - step))
        y, step = torch.cat([y.narrow(dim, 0, step), longer], dim), 2 * step
    return y


def _log_of_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), and -inf without derivatives where both are -inf."""
    top = torch.maximum(a, b).detach()
    top = torch.where(top == -math.inf, 0.0, top)  # any constant will do
    total = (a - top).exp() + (b - top).exp()
    return torch.where(total == 0, -math.inf, torch.where(total == 0, 1.0, total).log() + top)


SINGULAR: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "linalg_vector_norm": _vector_norm,
        "linalg_norm": _norm,
        "linalg_matrix_norm": _matrix_norm,
        "dist": _dist,
        "pairwise_distance": _pairwise_distance,
        "std": _std,
        "std_mean": _std_mean,
        "sinc": _sinc,
        "logcumsumexp": _logcumsumexp,
    }
)
