"""Linear algebra as compositions of factorizations and triangular solves, which torch differentiates right.

MATRICES : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["MATRICES"]


def _cholesky_inverse(input: Tensor, upper: bool = False) -> Any:
    """(L L')^-1 = L'^-1 L^-1 from one triangle: forward mode is wrong; gradients too if the other triangle is not 0."""
    if input.dim() < 2 or input.shape[-1] != input.shape[-2]:
        return NotImplemented
    L = input.mH if upper else input  # of which solve_triangular reads one triangle
    inverse = torch.linalg.solve_triangular(L, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L), upper=False)
    return inverse.mH @ inverse


def _cholesky_solve(input: Tensor, input2: Tensor, upper: bool = False) -> Any:
    """L'^-1 (L^-1 B) from one triangle of L: gradients are wrong if the other triangle is not zero."""
    if min(input.dim(), input2.dim()) < 2:
        return NotImplemented
    L = input2.mH if upper else input2  # of which solve_triangular reads one triangle
    return torch.linalg.solve_triangular(L.mH, torch.linalg.solve_triangular(L, input, upper=False), upper=True)


def _triangular_solve(input: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False) -> Any:
    """A^-1 B, or A'^-1 B, from one triangle of A: forward over reverse is wrong."""
    if min(input.dim(), A.dim()) < 2:
        return NotImplemented
    matrix, is_upper = (A.mT, not upper) if transpose else (A, upper)
    solution = torch.linalg.solve_triangular(matrix, input, upper=is_upper, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((solution, A.clone()))


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Any:
    """A^-1 B by P A = L U: reverse over forward mode, which third derivatives take, is wrong."""
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or B.dim() == 0 or not (A.is_floating_point() and B.dtype == A.dtype):
        return NotImplemented
    is_vector = B.dim() == 1 or B.shape == A.shape[:-1]
    right_side = B.unsqueeze(-1) if is_vector else B
    if right_side.shape[-2 if left or is_vector else -1] != A.shape[-1] or (is_vector and not left):
        return NotImplemented
    try:
        factors = torch.linalg.lu_factor(A)
    except RuntimeError:  # singular
        return NotImplemented
    solution = torch.linalg.lu_solve(*factors, right_side, left=left)
    return solution.squeeze(-1) if is_vector else solution


def _log_abs_det(A: Tensor) -> tuple[Tensor, Tensor]:
    """(sign det A, sum log |U_ii|) by P A = L U; the sign is locally constant."""
    diagonal = torch.linalg.lu_factor_ex(A).LU.diagonal(dim1=-2, dim2=-1)
    return torch.linalg.slogdet(A.detach()).sign, diagonal.abs().log().sum(-1)


def _slogdet(input: Tensor) -> Any:
    """(sign det A, log |det A|): reverse over forward mode is wrong, as in `_solve`."""
    if input.dim() < 2 or input.shape[-1] != input.shape[-2] or not input.is_floating_point():
        return NotImplemented
    named: Any = torch.return_types
    return named.linalg_slogdet(_log_abs_det(input))


def _logdet(input: Tensor) -> Any:
    """log det A, NaN where det A < 0: as `_slogdet`."""
    answer = _slogdet(input)
    return answer if answer is NotImplemented else torch.where(answer[0] < 0, math.nan, answer[1])


MATRICES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "cholesky_inverse": _cholesky_inverse,
        "cholesky_solve": _cholesky_solve,
        "triangular_solve": _triangular_solve,
        "linalg_solve": _solve,
        "slogdet": _slogdet,
        "linalg_slogdet": _slogdet,
        "logdet": _logdet,
    }
)
