"""Operators that torch differentiates right but at single points, where it gives a clean number that is wrong, or none.

Products have polynomials for derivatives, also where factors are 0; torch divides by the factors, which reverse over forward mode
cannot undo. `sinc` is analytic at 0, where the quotient sin(pi x) / (pi x) loses its derivatives to rounding: its series has
them all. `logcumsumexp` has a forward-mode rule that is wrong after an entry of -inf, and `logaddexp` of one
-inf NaN for a second derivative. Here products and sums are those of pairs,
then of pairs of pairs, and so on.

    SINGULAR : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["SINGULAR", "log_of_sum", "product"]

_TERMS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(11))  # of sin(u) / u in u^2, enough for |u| < 2


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


def _prod(input: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """x_1 ... x_n, the halves multiplied entry by entry until one is left: reverse over forward mode is NaN where x_i = 0."""
    x = input if dtype is None else input.to(dtype)
    if not (x.is_floating_point() or x.is_complex()) or not (dim is None or isinstance(dim, int)):
        return NotImplemented
    x = x.reshape(-1) if dim is None or not x.dim() else x.movedim(dim, -1)
    if not x.shape[-1]:
        return NotImplemented
    y = product(x)
    return y if dim is None or not keepdim or not input.dim() else y.unsqueeze(dim)


def product(x: Tensor) -> Tensor:
    """x_1 ... x_n along the last dimension, which is not empty."""
    while (n := x.shape[-1]) > 1:
        x = torch.cat([x[..., : n // 2] * x[..., n // 2 : n // 2 * 2], x[..., n // 2 * 2 :]], -1)
    return x.squeeze(-1)


def _cumprod(input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """The products of x_j over j <= i: as `_prod`."""
    x = input if dtype is None else input.to(dtype)
    return _scan(torch.mul, x, dim) if x.is_floating_point() or x.is_complex() else NotImplemented


def _logcumsumexp(input: Tensor, dim: int) -> Any:
    """log of the sums of exp(x_j) over j <= i."""
    return _scan(log_of_sum, input, dim) if input.is_floating_point() else NotImplemented


def _scan(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, dim: int) -> Any:
    """What an associative operation makes of x_1 ... x_i for each i: y_i <- y_i * y_(i-s) for s = 1, 2, 4, ..."""
    if not isinstance(dim, int) or not x.dim():
        return NotImplemented
    n, step = x.shape[dim], 1
    while step < n:
        longer = combine(x.narrow(dim, step, n - step), x.narrow(dim, 0, n - step))
        x, step = torch.cat([x.narrow(dim, 0, step), longer], dim), 2 * step
    return x


def log_of_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), and -inf without derivatives where both are -inf."""
    top = torch.maximum(a, b).detach()
    top = torch.where(top == -math.inf, 0.0, top)  # any constant will do
    total = (a - top).exp() + (b - top).exp()
    return torch.where(total == 0, -math.inf, torch.where(total == 0, 1.0, total).log() + top)


def _logaddexp(input: Tensor, other: Tensor) -> Any:
    """log(exp(x) + exp(y)) = u + log(1 + exp(v - u)), u >= v; where one of them is infinite, u."""
    if input.dtype != other.dtype or not input.is_floating_point():
        return NotImplemented
    first = input >= other
    larger, smaller = torch.where(first, input, other), torch.where(first, other, input)
    alone = larger.isinf() | smaller.isinf()
    return larger + torch.where(alone, 0.0, torch.where(alone, 0.0, smaller - larger).exp().log1p())


def _logaddexp2(input: Tensor, other: Tensor) -> Any:
    """The same to base 2."""
    scale = math.log(2)
    natural = _logaddexp(input * scale, other * scale) if isinstance(input, Tensor) else NotImplemented
    return natural if natural is NotImplemented else natural / scale


SINGULAR: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "prod": _prod,
        "cumprod": _cumprod,
        "sinc": _sinc,
        "logcumsumexp": _logcumsumexp,
        "logaddexp": _logaddexp,
        "logaddexp2": _logaddexp2,
    }
)
