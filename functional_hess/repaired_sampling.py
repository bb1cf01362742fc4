"""Sampling of images at points between pixels as a composition of differentiable operators.

With the corners c of the cell in which a point p lies,

    y(p) = sum over c of  prod over axes k of (1 - |p_k - c_k|)  x[c]

for linear interpolation; cubic interpolation sums over four pixels an axis, with the weights of cubic convolution (Keys 1981).
The kernels have no forward-mode rule, and no batching rule of their second derivatives. Where padding reflects or clips a point,
derivatives are those of the piece. The composition holds the pixels of all corners of all points at once.

    SAMPLING : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["SAMPLING"]

_LINEAR, _NEAREST, _CUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)
_A = -0.75  # the free parameter of cubic convolution

_Taps = list[tuple[Tensor, Tensor]]  # (pixel along an axis, an integer; its weight)


def _grid_sampler(input: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Any:
    """Values of images (N, C, *sizes) at points (N, *out, axes), the last axis first, of which (-1, 1) spans an image."""
    axes = input.dim() - 2
    fits = axes in (2, 3) and grid.dim() == input.dim() and grid.shape[-1] == axes and grid.shape[0] == input.shape[0]
    known = interpolation_mode in ((_LINEAR, _NEAREST, _CUBIC) if axes == 2 else (_LINEAR, _NEAREST)) and padding_mode in range(3)
    if not fits or not known or not input.is_floating_point() or input.dtype != grid.dtype or not input.numel():
        return NotImplemented
    taps = [
        _taps(_unnormalized(u, n, align_corners), n, interpolation_mode, padding_mode, align_corners)
        for u, n in zip(reversed(grid.unbind(-1)), input.shape[2:], strict=True)
    ]
    parts = [_pixels(input, [p for p, _ in each]) * _weight(input, each) for each in itertools.product(*taps)]
    return functools.reduce(torch.add, parts)


def _weight(input: Tensor, taps: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The product of the weights of the axes, 0 outside of the image: (N, 1, *out)."""
    inside = functools.reduce(torch.logical_and, ((p >= 0) & (p < n) for (p, _), n in zip(taps, input.shape[2:], strict=True)))
    return torch.where(inside, functools.reduce(torch.mul, (w for _, w in taps)), 0.0).unsqueeze(1)


def _pixels(input: Tensor, place: Sequence[Tensor]) -> Tensor:
    """x[n, c, place], (N, C, *out); whatever lies outside of the image is another pixel of it."""
    flat = torch.zeros_like(place[0])
    for p, n in zip(place, input.shape[2:], strict=True):
        flat = flat * n + p.clamp(0, n - 1)
    index = flat.flatten(1).unsqueeze(1).expand(-1, input.shape[1], -1)
    return input.flatten(2).gather(2, index).reshape(*input.shape[:2], *place[0].shape[1:])


def _taps(p: Tensor, n: int, interpolation: int, padding: int, align_corners: bool) -> _Taps:
    """The pixels along an axis of n of which the value at p is made, with their weights."""
    if interpolation == _CUBIC:
        first = p.floor().detach()
        weights = _cubic_weights(p - first)
        return [(_padded(first + k, n, padding, align_corners).long(), w) for k, w in zip(range(-1, 3), weights, strict=True)]
    p = _padded(p, n, padding, align_corners)
    if interpolation == _NEAREST:
        return [(p.round().long(), torch.ones_like(p))]
    first = p.floor()
    t = p - first.detach()
    return [(first.long(), 1 - t), (first.long() + 1, t)]


def _cubic_weights(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the pixels at -1, 0, 1, 2, for a point at t in (0, 1)."""

    def near(s: Tensor) -> Tensor:
        return ((_A + 2) * s - (_A + 3)) * s * s + 1

    def far(s: Tensor) -> Tensor:
        return ((_A * s - 5 * _A) * s + 8 * _A) * s - 4 * _A

    return far(t + 1), near(t), near(1 - t), far(2 - t)


def _unnormalized(u: Tensor, n: int, align_corners: bool) -> Tensor:
    """(-1, 1) in pixels: from the center of the first to that of the last, or from edge to edge."""
    return (u + 1) / 2 * (n - 1) if align_corners else ((u + 1) * n - 1) / 2


def _padded(p: Tensor, n: int, padding: int, align_corners: bool) -> Tensor:
    if padding == _REFLECTION:
        p = _reflected(p, *((0.0, n - 1.0) if align_corners else (-0.5, n - 0.5)))
    return p if padding == _ZEROS else p.clamp(0, n - 1)


def _reflected(p: Tensor, low: float, high: float) -> Tensor:
    """p thrown back at both ends, as often as it takes."""
    if high <= low:
        return torch.zeros_like(p)
    distance = (p - low).abs()
    flips = (distance / (high - low)).floor().detach()
    rest = distance - flips * (high - low)
    return torch.where(flips % 2 == 0, low + rest, high - rest)


SAMPLING: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "grid_sampler": _grid_sampler,
        "grid_sampler_2d": _grid_sampler,
        "grid_sampler_3d": _grid_sampler,
        "_grid_sampler_2d_cpu_fallback": _grid_sampler,
    }
)
