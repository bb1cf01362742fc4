"""Norms, deviations and distances as compositions of differentiable operators: |z|_p = (sum |z_k|^p)^(1/p).

The kernels of `cdist` and `pdist` have no second derivative in any mode (pytorch#83510); the composition holds all differences at
once, which they avoid. A norm has all derivatives, but reverse over forward mode raises, because the forward-mode rule writes
into what it has saved.

The 2-norm and the standard deviation have a slope everywhere but at 0, where torch takes the slope 0. A chain rule through
that slope,

    d^2 phi(|z|) = phi''(|z|) (d|z|)^2 + phi'(|z|) d^2|z|,

then gives 0 at z = 0 where |z|^2 has the Hessian 2 I, and forward over reverse gives it without a word. Here the slope at 0 is 0
for the innermost derivative, so that gradients are torch's, and NaN for those around it: a second derivative that needs it is NaN
in every mode, and one that does not (a norm below the floor of a `clamp`) is as it was. In `cdist` and `pdist`, and for other p,
all derivatives at 0 are 0.

    DISTANCES : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from functional_hess.nesting import constant_of_innermost, derivative_levels, requires_grad_outside

__all__ = ["DISTANCES"]

_Dim = Any  # int, several or None


def _root(total: Tensor, p: float) -> Tensor:
    """t^(1/p), and 0 with derivative 0 where t = 0."""
    zero = total == 0
    safe = torch.where(zero, 1.0, total)
    return torch.where(zero, 0.0, safe.sqrt() if p == 2 else safe ** (1 / p))


def _minkowski(z: Tensor, p: float, dim: _Dim = -1, keepdim: bool = False) -> Tensor:
    """(sum |z|^p)^(1/p) along ``dim``; p = 0 counts, p = inf takes the largest."""
    size = z.abs()
    if p == 0:
        return (size != 0).to(size.dtype).sum(dim, keepdim)
    if p == math.inf:
        return size.amax(() if dim is None else dim, keepdim) if size.numel() else size.sum(dim, keepdim)
    if p == 1:
        return size.sum(dim, keepdim)
    if p % 2 == 0 and not z.is_complex():
        return _root((z ** int(p)).sum(dim, keepdim), p)
    zero = size == 0  # |z|^p at 0 has infinite derivatives of high order, which a factor of 0 would turn into NaN
    return _root(torch.where(zero, 0.0, torch.where(zero, 1.0, size) ** p).sum(dim, keepdim), p)


# Norms.


def _norm_of(z: Tensor, p: float, dim: _Dim, keepdim: bool) -> Tensor:
    """|z|_p, in half precision by float32, as in the kernels, and by a kernel where no third derivative is taken."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    levels = len(derivative_levels())
    if levels == 0 or (levels <= 2 and not requires_grad_outside((z,))):
        norm = torch.linalg.vector_norm(wide, p, dim, keepdim)
    else:
        norm = _euclidean(wide, dim, keepdim) if p == 2 else _minkowski(wide, p, dim, keepdim)
    return (norm + _slope_at_zero(wide, norm, dim, keepdim) if p == 2 else norm).to(z.dtype.to_real())


def _euclidean(z: Tensor, dim: _Dim, keepdim: bool) -> Tensor:
    """|z|, with the slope 0 at z = 0."""
    total = _square(z).sum(dim, keepdim)
    # A factor, for `where` would hide from a gradient that its cotangent has a NaN for a derivative.
    zero = (total == 0).to(total.dtype)
    return (total + zero).sqrt() * (1 - zero)


def _slope_at_zero(z: Tensor, norm: Tensor, dim: _Dim, keepdim: bool) -> Tensor | float:
    """0, whose slope where z = 0 is 0 at the innermost level of differentiation and NaN at the others."""
    constant, zero = constant_of_innermost(z), norm == 0
    if constant is None:  # plain autograd, whose second derivative at 0 is NaN
        return 0.0
    return torch.where(zero, torch.where(zero, _square(constant).sum(dim, keepdim), 1.0).sqrt(), 0.0)


def _square(z: Tensor) -> Tensor:
    return torch.view_as_real(z.resolve_conj()).square().sum(-1) if z.is_complex() else z * z


def _is_right(x: Tensor, p: float) -> bool:
    """Of real numbers torch has these norms right to every order: they are linear but for kinks."""
    return p in (1, math.inf) and not x.is_complex()


def _vector_norm(x: Tensor, ord: Any = 2, dim: _Dim = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """(sum |x|^p)^(1/p): reverse over forward mode raises."""
    x = x if dtype is None else x.to(dtype)
    inexact = x.is_floating_point() or x.is_complex()
    if not inexact or isinstance(ord, str) or not ord > 0 or not x.numel() or dim == () or _is_right(x, ord):
        return NotImplemented
    return _norm_of(x, float(ord), dim, keepdim)


def _norm(A: Tensor, ord: Any = None, dim: _Dim = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The norm of what `torch.linalg.norm` takes for a vector, and the Frobenius norm of a matrix."""
    dim = (dim,) if isinstance(dim, int) else dim
    vector = (A.dim() if dim is None else len(dim)) == 1
    frobenius = ord == "fro" and not vector and (A.dim() if dim is None else len(dim)) == 2
    if not vector and not frobenius and ord is not None:
        return NotImplemented
    return _vector_norm(A, 2 if ord is None or frobenius else ord, dim, keepdim, dtype=dtype)


def _matrix_norm(
    A: Tensor, ord: Any = "fro", dim: Sequence[int] = (-2, -1), keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The Frobenius norm."""
    if ord != "fro" or A.dim() < 2 or len(dim) != 2:
        return NotImplemented
    return _vector_norm(A, 2, dim, keepdim, dtype=dtype)


def _dist(input: Tensor, other: Tensor, p: Any = 2) -> Any:
    """|x - y|_p."""
    return _vector_norm(input - other, p)


def _pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    """|x - y + eps|_p along the last dimension."""
    return _vector_norm(x1 - x2 + eps, p, -1, keepdim)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    """<x, y> / (max(|x|, eps) max(|y|, eps))."""
    if not (x1.is_floating_point() and x2.is_floating_point()) or not max(x1.dim(), x2.dim()):
        return NotImplemented
    x1, x2 = torch.broadcast_tensors(*(t.to(torch.promote_types(x1.dtype, x2.dtype)) for t in (x1, x2)))
    unit = (t / _norm_of(t, 2.0, dim, True).clamp(min=eps) for t in (x1, x2))
    return torch.mul(*unit).sum(dim)


def _renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Any:
    """Slices along ``dim`` of a p-norm above the bound, scaled down to it."""
    places = range(-input.dim(), input.dim())
    if not input.is_floating_point() or not p > 0 or input.dim() < 2 or dim not in places or maxnorm < 0 or not input.numel():
        return NotImplemented
    if _is_right(input, p):
        return NotImplemented
    norm = _norm_of(input, float(p), [d for d in range(input.dim()) if d != dim % input.dim()], True)
    return input * torch.where(norm > maxnorm, maxnorm / (norm + 1e-7), 1.0)


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
    spread = _norm_of(centered, 2.0, dim, keepdim) / math.sqrt(max(count, 0.0))
    mean = mean if keepdim or dim is None else mean.squeeze(dim)
    return spread, mean


# Distances between all points of two sets, or of one.


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Any:
    """|x1_i - x2_j|_p (pytorch#83510)."""
    if min(x1.dim(), x2.dim()) < 2 or x1.shape[-1] != x2.shape[-1] or x1.dtype != x2.dtype or not x1.is_floating_point() or p < 0:
        return NotImplemented
    return _minkowski(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Any:
    """|x_i - x_j|_p for i < j."""
    if input.dim() != 2 or not input.is_floating_point() or p < 0:
        return NotImplemented
    i, j = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return _minkowski(input[i] - input[j], p)


DISTANCES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "linalg_vector_norm": _vector_norm,
        "linalg_norm": _norm,
        "linalg_matrix_norm": _matrix_norm,
        "dist": _dist,
        "pairwise_distance": _pairwise_distance,
        "cosine_similarity": _cosine_similarity,
        "renorm": _renorm,
        "std": _std,
        "std_mean": _std_mean,
        "cdist": _cdist,
        "pdist": _pdist,
    }
)
