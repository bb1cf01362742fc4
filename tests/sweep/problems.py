"""What a case is, and the scalar function of small tensors that is made of it.

A case is an operation with floating tensors that it is differentiated with respect to (leaves) and others (constants). From it

    f(z_1, ..., z_L) = readout(op(x_1 + B_1 z_1, ..., x_L + B_L z_L)),

a large leaf being moved along a few fixed random directions B_i, a small one being z_i itself, so that a Hessian has few
entries and a leaf stays a leaf. The readout ``"curved"`` is a fixed smooth function with a second derivative in every entry of
every output; ``"plain"`` is the sum, or the value itself where it is a scalar, as a user takes it.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["READOUTS", "Case", "Problem", "float_leaves", "problem_of"]

READOUTS = ("curved", "plain")
SMALL = 8  # a leaf of up to so many entries is differentiated entry by entry,
DIRECTIONS = 5  # a larger one along so many directions


@dataclasses.dataclass(frozen=True)
class Case:
    """``op(*leaves, *constants)`` returns a tensor or any nest of lists, tuples and dicts of them.

    ``random`` says that it draws numbers: then every evaluation starts from one seed. ``by_convention`` says that torch
    defines the gradient to leave something out (a padding row is a constant), so that values say nothing about it.
    """

    name: str
    op: Callable[..., Any]
    leaves: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()
    random: bool = False
    by_convention: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """A scalar ``f(*x)`` in one dtype, at the point ``x``.

    ``seed`` is for an f that draws numbers. ``rounds`` says that f goes through a narrower dtype: it is a staircase then, about
    which differences say nothing. ``by_convention`` is that of the case.
    """

    f: Callable[..., Tensor]
    x: tuple[Tensor, ...]
    seed: int | None = None
    rounds: bool = False
    by_convention: bool = False


def problem_of(case: Case, readout: str, dtype: torch.dtype) -> Problem:
    """The problem in ``dtype``, at numbers that float32 holds: in every dtype it is one point."""

    def cast(t: Tensor) -> Tensor:
        if t.is_complex():
            return t.detach().to(torch.complex64).to(dtype.to_complex())
        return t.detach().float().to(dtype) if t.is_floating_point() else t

    at = [cast(t) for t in case.leaves]
    constants = [cast(t) for t in case.constants]
    few = len(at) > 2
    insides = [_inside(t, SMALL // 2 if few else SMALL, DIRECTIONS // 2 if few else DIRECTIONS) for t in at]
    seed = zlib.crc32(case.name.encode()) if case.random else None

    def out(*z: Tensor) -> Any:
        return case.op(*(place(u) for (_, place), u in zip(insides, z, strict=True)), *constants)

    start = tuple(z for z, _ in insides)
    if seed is not None:
        torch.manual_seed(seed)
    sample = out(*(z.detach().clone().requires_grad_() for z in start))
    finish = _finishes(sample, readout)
    narrow = any(torch.finfo(y.dtype).eps > torch.finfo(dtype).eps for y in float_leaves(sample))

    def f(*z: Tensor) -> Tensor:
        return finish(out(*z))

    return Problem(f, start, seed, narrow, case.by_convention)


def _inside(x: Tensor, small: int, directions: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A few coordinates z, and z -> x + B z with |B| <= 1; x itself where it is small."""
    if x.numel() <= small:
        return x, lambda z: z
    k = torch.arange(x.numel() * directions, dtype=torch.float64).reshape(directions, -1)
    B = torch.sin(1 + 2.7 * k + 0.01 * k * k).to(x.dtype)  # any fixed numbers without a pattern
    return torch.zeros(directions, dtype=x.dtype), lambda z: x + (z @ B).reshape(x.shape)


def float_leaves(out: Any) -> list[Tensor]:
    """The floating and complex tensors of a nest, complex ones as real ones."""
    if isinstance(out, Tensor):
        if out.is_complex():
            return [torch.view_as_real(out.resolve_conj())]
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        out = tuple(out.values())
    return [y for part in out for y in float_leaves(part)] if isinstance(out, (list, tuple)) else []


def _finishes(sample: Any, readout: str) -> Callable[[Any], Tensor]:
    """The readout for outputs like ``sample``, of those that torch calls differentiable.

    Entries that are not finite there are left out, large ones scaled down.
    """
    chosen: list[tuple[int, Tensor | None, float]] = []
    for k, y in enumerate(float_leaves(sample)):
        finite = y.detach().isfinite()
        if y.requires_grad and finite.any():
            index = None if finite.all() else finite.reshape(-1).nonzero().squeeze(1)
            chosen.append((k, index, 1 / max(1.0, float(y.detach()[finite].abs().max()))))

    def kept(out: Any) -> list[Tensor]:
        every = float_leaves(out)
        return [every[k] if index is None else every[k].reshape(-1)[index] for k, index, _ in chosen]

    def plain(out: Any) -> Tensor:
        total = [y if y.dim() == 0 else y.sum() for y in kept(out)]
        return total[0] if len(total) == 1 else sum(total)  # type: ignore[return-value]

    def curved(out: Any) -> Tensor:
        parts = [_curve(y.reshape(-1) * s, k) for y, (k, _, s) in zip(kept(out), chosen, strict=True)]
        return sum(parts)  # type: ignore[return-value]

    return {"plain": plain, "curved": curved}[readout]


def _curve(u: Tensor, k: int) -> Tensor:
    """sum_i c_i sin(1.1 u_i + 0.2 + 0.1 k), c_i in (0.7, 1.3): second derivative -1.21 c_i sin(...), not zero at u_i = 0."""
    i = torch.arange(u.numel(), dtype=torch.float64)
    return (torch.sin(1.1 * u + (0.2 + 0.1 * k)) * (1 + 0.3 * torch.sin(1 + 2.3 * i)).to(u.dtype)).sum()
