"""Distances as compositions of differentiable operators: |x - y|_p = (sum |x_k - y_k|^p)^(1/p).

The kernels have no second derivative in any mode (pytorch#83510). The compositions hold all differences at once, which the
kernels avoid. Coincident points have derivatives 0.

    DISTANCES : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["DISTANCES"]


def _root(total: Tensor, p: float) -> Tensor:
    """t^(1/p), and 0 with derivative 0 where t = 0."""
    zero = total == 0
    safe = torch.where(zero, 1.0, total)
    return torch.where(zero, 0.0, safe.sqrt() if p == 2 else safe ** (1 / p))


def _minkowski(difference: Tensor, p: float) -> Tensor:
    """(sum |d|^p)^(1/p) along the last dimension; p = 0 counts, p = inf takes the largest."""
    size = difference.abs()
    if p == 0:
        return (size != 0).to(size.dtype).sum(-1)
    if p == math.inf:
        return size.amax(-1) if size.shape[-1] else size.sum(-1)
    if p == 1:
        return size.sum(-1)
    if p % 2 == 0:
        return _root((difference ** int(p)).sum(-1), p)
    zero = size == 0  # |d|^p at 0 has infinite derivatives of high order, which a factor of 0 would turn into NaN
    return _root(torch.where(zero, 0.0, torch.where(zero, 1.0, size) ** p).sum(-1), p)


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
        "cdist": _cdist,
        "pdist": _pdist,
    }
)
