"""Linear algebra as compositions of factorizations and triangular solves, which torch differentiates right.

MATRICES : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from functional_hess.nesting import constant, derivative_levels, is_mapped, requires_grad_outside

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


def _lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Any:
    """A^-1 B, or A'^-1 B, from P A = L U by two triangular solves: the kernel misreads batches, values included."""
    if min(LU.dim(), B.dim()) < 2 or LU.shape[-1] != B.shape[-2 if left else -1] or LU.dtype != B.dtype:
        return NotImplemented
    if not left:  # X A = B is A' X' = B'
        return _lu_solve(LU, pivots, B.mH, adjoint=not adjoint).mH
    P = torch.lu_unpack(constant(LU), pivots, unpack_data=False)[0]
    if adjoint:
        y = torch.linalg.solve_triangular(LU.mH, B, upper=False)
        return P @ torch.linalg.solve_triangular(LU.mH, y, upper=True, unitriangular=True)
    y = torch.linalg.solve_triangular(LU, P.mT @ B, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(LU, y, upper=True)


def _old_lu_solve(b: Tensor, LU_data: Tensor, LU_pivots: Tensor) -> Any:
    """The same with other names."""
    return _lu_solve(LU_data, LU_pivots, b)


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Any:
    """A^-1 B by P A = L U: reverse over forward mode, which third derivatives take, is wrong; so is `vmap`, as in `_lu_solve`.

    Of one gradient torch has it right, and several times cheaper, where nothing is mapped and each matrix has its own right side.
    """
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or B.dim() == 0 or not (_is_inexact(A) and B.dtype == A.dtype):
        return NotImplemented
    is_vector = B.dim() == 1 or B.shape == A.shape[:-1]
    right_side = B.unsqueeze(-1) if is_vector else B
    if (
        derivative_levels() == ["reverse"]
        and right_side.shape[:-2] == A.shape[:-2]
        and not (is_mapped() or requires_grad_outside((A, B)))
    ):
        return NotImplemented
    if right_side.shape[-2 if left or is_vector else -1] != A.shape[-1] or (is_vector and not left):
        return NotImplemented
    try:
        LU, pivots = torch.linalg.lu_factor(A)
    except RuntimeError:  # singular
        return NotImplemented
    solution = _lu_solve(LU, pivots, right_side, left=left)
    return solution.squeeze(-1) if is_vector else solution


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    """The same and LAPACK's report, that all went well."""
    X = _solve(A, B, left=left)
    if X is NotImplemented:
        return X
    named: Any = torch.return_types
    return named.linalg_solve_ex((X, torch.zeros(A.shape[:-2], dtype=torch.int32, device=A.device)))


def _tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Any:
    """The same of tensors taken for matrices."""
    A = A if dims is None else torch.movedim(A, tuple(dims), tuple(range(-len(dims), 0)))
    shape = A.shape[B.dim() :]
    if not shape.numel() == B.numel() == A.numel() // max(B.numel(), 1):
        return NotImplemented
    X = _solve(A.reshape(B.numel(), B.numel()), B.reshape(-1))
    return X if X is NotImplemented else X.reshape(shape)


def _is_inexact(A: Tensor) -> bool:
    return A.is_floating_point() or A.is_complex()


def _is_square(A: Tensor) -> bool:
    return A.dim() >= 2 and A.shape[-1] == A.shape[-2] and _is_inexact(A)


def _log_abs_det(A: Tensor) -> tuple[Tensor, Tensor]:
    """(sign det A, sum log |U_ii|) by P A = L U; the sign of a real matrix is locally constant."""
    LU, pivots, _ = torch.linalg.lu_factor_ex(A)
    diagonal = LU.diagonal(dim1=-2, dim2=-1)
    if A.is_complex():
        return _sign(pivots, LU) * torch.prod(diagonal / diagonal.abs(), -1), diagonal.abs().log().sum(-1)
    return torch.linalg.slogdet(constant(A)).sign, diagonal.abs().log().sum(-1)


def _sign(pivots: Tensor, LU: Tensor) -> Tensor:
    """det P: an interchange for each pivot that is not in its place."""
    place = torch.arange(1, LU.shape[-1] + 1, dtype=pivots.dtype, device=pivots.device)
    return 1.0 - 2.0 * ((pivots != place).sum(-1) % 2).to(LU.dtype)


def _slogdet(input: Tensor) -> Any:
    """(sign det A, log |det A|): reverse over forward mode is wrong, as in `_solve`."""
    if not _is_square(input):
        return NotImplemented
    named: Any = torch.return_types
    return named.linalg_slogdet(_log_abs_det(input))


def _logdet(input: Tensor) -> Any:
    """log det A, NaN where det A < 0: as `_slogdet`."""
    answer = _slogdet(input)
    if answer is NotImplemented:
        return answer
    sign, logarithm = answer
    return sign.log() + logarithm if input.is_complex() else torch.where(sign < 0, math.nan, logarithm)


def _det(A: Tensor) -> Any:
    """det A: reverse over forward mode is wrong, `vmap` too, and higher derivatives of a singular matrix are NaN.

    With A = Q S R' at the point and M = Q' A R, of constant Q and R, det A = det Q det M det R', and in blocks
    det M = det M_11 det (M_22 - M_21 M_11^-1 M_12), the second a matrix of three rows whose determinant is a polynomial. That is
    right wherever three derivatives exist that are not 0: where the rank is at least n - 3.
    """
    if not _is_square(A):
        return NotImplemented
    n = A.shape[-1]
    if n <= 3:
        return _det_of_few(A)
    fixed = constant(A)
    Q, S, R = torch.linalg.svd(fixed)
    M, k = Q.mH @ A @ R.mH, n - 3
    nearly_zero = S[..., k - 1] <= n * torch.finfo(A.dtype).eps * S[..., 0]
    M11 = torch.where(nearly_zero[..., None, None], torch.eye(k, dtype=A.dtype, device=A.device), M[..., :k, :k])
    LU, pivots, _ = torch.linalg.lu_factor_ex(M11)
    rest = M[..., k:, k:] - M[..., k:, :k] @ _lu_solve(LU, pivots, M[..., :k, k:])
    unitary = torch.linalg.det(Q) * torch.linalg.det(R) * _sign(pivots, LU)
    det = unitary * torch.prod(LU.diagonal(dim1=-2, dim2=-1), -1) * _det_of_few(rest)
    return torch.where(nearly_zero, torch.linalg.det(fixed), det)


def _det_of_few(A: Tensor) -> Tensor:
    """The determinant of up to three rows, expanded by the first."""
    if A.shape[-1] == 0:
        return A.new_ones(A.shape[:-2])
    if A.shape[-1] == 1:
        return A[..., 0, 0]
    if A.shape[-1] == 2:
        return A[..., 0, 0] * A[..., 1, 1] - A[..., 0, 1] * A[..., 1, 0]
    first, second, third = A.unbind(-2)
    return (first * torch.linalg.cross(second, third)).sum(-1)


def _reflected(C: Tensor, reflectors: Tensor, tau: Tensor, *, backwards: bool) -> Tensor:
    """H_1 ... H_k C, or H_k' ... H_1' C, with H_i = 1 - tau_i v_i v_i', v_i the column i below its own 1 on the diagonal."""
    m, k = reflectors.shape[-2], tau.shape[-1]
    V = reflectors[..., :k].tril(-1) + torch.eye(m, k, dtype=reflectors.dtype, device=reflectors.device)
    for i in range(k) if backwards else reversed(range(k)):
        v, t = V[..., i : i + 1], tau[..., i, None, None]
        C = C - (t.conj() if backwards else t) * v @ (v.mH @ C)
    return C


def _householder_product(A: Tensor, tau: Tensor) -> Any:
    """The first columns of H_1 ... H_k: reverse over forward mode is wrong."""
    if A.dim() < 2 or not tau.dim() or A.shape[-2] < A.shape[-1] or tau.shape[:-1] != A.shape[:-2] or tau.shape[-1] > A.shape[-1]:
        return NotImplemented
    m, n = A.shape[-2:]
    return _reflected(torch.eye(m, n, dtype=A.dtype, device=A.device).expand_as(A), A, tau, backwards=False)


def _orgqr(input: Tensor, input2: Tensor) -> Any:
    """The same by its old name."""
    return _householder_product(input, input2)


def _ormqr(input: Tensor, input2: Tensor, input3: Tensor, left: bool = True, transpose: bool = False) -> Any:
    """H_1 ... H_k C, its adjoint times C, or C times either: no forward mode."""
    if min(input.dim(), input3.dim()) < 2 or not input2.dim():
        return NotImplemented
    rows = input3.shape[-2 if left else -1]
    if input.shape[-2] != rows or input2.shape[-1] != min(rows, input.shape[-1]) or input2.shape[:-1] != input.shape[:-2]:
        return NotImplemented
    if left:
        return _reflected(input3, input, input2, backwards=transpose)
    return _reflected(input3.mH, input, input2, backwards=not transpose).mH


def _eig(A: Tensor) -> Any:
    """Eigenvalues and eigenvectors: `vmap` of forward mode is wrong, as in `_lu_solve`."""
    if not _is_square(A):
        return NotImplemented
    d, V = torch.linalg.eig(constant(A))
    values, X = _eigen_near(torch.linalg.inv_ex(V).inverse @ A.to(V.dtype) @ V, d)
    named: Any = torch.return_types
    return named.linalg_eig((values, _unit_columns(V @ X)))


def _eigen_near(M: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, and eigenvectors with ones on the diagonal, of a matrix that is diag(d) at the point, but not around it.

    They are the fixed point of x_ij <- x_ij + (M X - X D)_ij / (d_j - d_i). From X = 1 each step makes one more derivative right.
    """
    one = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    gap = d.unsqueeze(-2) - d.unsqueeze(-1) + one
    X, equal = one.expand_as(M), gap == 0
    for _ in range(max(4, len(derivative_levels()) + 1)):
        MX = M @ X
        rest = MX - X * MX.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        X = X + rest / torch.where(equal, 1.0, gap) + _without_slope(rest, equal)
    return (M @ X).diagonal(dim1=-2, dim2=-1), X


def _without_slope(z: Tensor, where: Tensor) -> Tensor:
    """0, whose derivatives are NaN in the places chosen: what equal eigenvalues have."""
    return torch.where(where, torch.where(where, _squares(z - constant(z)), 1.0).sqrt(), 0.0).to(z.dtype)


def _unit_columns(X: Tensor) -> Tensor:
    return X / _squares(X).sum(-2, keepdim=True).sqrt()


def _squares(z: Tensor) -> Tensor:
    """|z_i|^2; `imag` has no batching rule for its backward."""
    return torch.view_as_real(z.resolve_conj()).square().sum(-1) if z.is_complex() else z * z


def _eigvals(A: Tensor) -> Any:
    """The eigenvalues alone."""
    answer = _eig(A)
    return answer if answer is NotImplemented else answer[0]


def _as_symmetric(A: Tensor, upper: bool) -> Tensor:
    """The matrix of which a kernel reads one triangle: its value, with the derivatives of (A + A') / 2, as gradients have it.

    Forward mode takes the triangle for a derivative, or mixes both: along V that is not symmetric reverse mode says otherwise.
    """
    half, fixed = (A + A.mH) / 2, constant(A)
    triangle = fixed.triu() if upper else fixed.tril()
    strict = fixed.triu(1) if upper else fixed.tril(-1)
    return half + (triangle + strict.mH - (fixed + fixed.mH) / 2)


def _cholesky(input: Tensor, upper: bool = False) -> Any:
    """L with L L' = A, or L' of it; the old name has no forward mode."""
    return _linalg_cholesky(input, upper=upper)


def _linalg_cholesky(input: Tensor, *, upper: bool = False) -> Any:
    """L with L L' = A, or L' of it."""
    return torch.linalg.cholesky(_as_symmetric(input, upper), upper=upper) if _is_square(input) else NotImplemented


def _cholesky_ex(input: Tensor, *, upper: bool = False, check_errors: bool = False) -> Any:
    """The same and LAPACK's report."""
    if not _is_square(input):
        return NotImplemented
    return torch.linalg.cholesky_ex(_as_symmetric(input, upper), upper=upper, check_errors=check_errors)


def _eigh(A: Tensor, UPLO: str = "L") -> Any:
    """Eigenvalues and eigenvectors of a symmetric matrix: reverse over forward mode is NaN."""
    if not _is_square(A) or UPLO not in ("L", "U", "l", "u"):
        return NotImplemented
    d, V = torch.linalg.eigh(constant(A), UPLO)
    values, X = _eigen_near(V.mH @ _as_symmetric(A, UPLO in "Uu") @ V, d)
    named: Any = torch.return_types
    real = torch.view_as_real(values.resolve_conj())[..., 0] if values.is_complex() else values
    return named.linalg_eigh((real, _unit_columns(V @ X)))


def _eigvalsh(A: Tensor, UPLO: str = "L") -> Any:
    """The eigenvalues alone."""
    answer = _eigh(A, UPLO)
    return answer if answer is NotImplemented else answer[0]


def _chain_matmul(matrices: Sequence[Tensor]) -> Any:
    """A B C ...: no batching rule."""
    return torch.linalg.multi_dot(list(matrices)) if len(matrices) > 1 else NotImplemented


MATRICES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "cholesky_inverse": _cholesky_inverse,
        "cholesky_solve": _cholesky_solve,
        "triangular_solve": _triangular_solve,
        "linalg_solve": _solve,
        "linalg_solve_ex": _solve_ex,
        "linalg_lu_solve": _lu_solve,
        "lu_solve": _old_lu_solve,
        "linalg_tensorsolve": _tensorsolve,
        "slogdet": _slogdet,
        "linalg_slogdet": _slogdet,
        "logdet": _logdet,
        "det": _det,
        "linalg_det": _det,
        "linalg_householder_product": _householder_product,
        "orgqr": _orgqr,
        "ormqr": _ormqr,
        "linalg_eig": _eig,
        "linalg_eigvals": _eigvals,
        "linalg_eigh": _eigh,
        "linalg_eigvalsh": _eigvalsh,
        "linalg_cholesky": _linalg_cholesky,
        "linalg_cholesky_ex": _cholesky_ex,
        "cholesky": _cholesky,
        "chain_matmul": _chain_matmul,
    }
)
