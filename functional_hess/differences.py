"""Derivatives by central differences, with the doubt that is left, and what it takes to call a number wrong.

Along a direction v, with D(h) = (g(x + h v) - g(x - h v)) / 2h at the steps h and h/2,

    D = (4 D(h/2) - D(h)) / 3 + O(h^4),        doubt = |D(h/2) - D(h)| + |2 c(h/2) - c(h)|,

c(h) = (g(x + h v) - 2 g(x) + g(x - h v)) / 2h. Where g is smooth both terms of the doubt are far smaller than any wrong
formula; at a kink of g one of them is of the size of the kink (c is half the jump of the slope). A number that disagrees
with D by more than its tolerance is tried again with steps 16 and 256 times smaller, since kinks spoil large steps first; it is
wrong where the doubt of the smallest steps can't explain the disagreement, and inconclusive where it can.

Where evaluations are counted, a :class:`Line` takes four gradients, at two steps that lie a factor of some hundred apart: its
doubt is the difference of the two.

This floor knows no derivatives but these, so that it can judge all others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functional_hess.tree import Space

__all__ = [
    "BY_DIFFERENCES",
    "INCONCLUSIVE",
    "PATIENCE",
    "RIGHT",
    "Comparison",
    "Flat",
    "InDouble",
    "Ladder",
    "Line",
    "LawError",
    "Slope",
    "agree",
    "along",
    "comparison",
    "direction",
    "drawn_by",
    "finite",
    "in_double",
    "measured_along",
    "largest",
    "line_through",
    "scale_of",
    "settled",
    "slopes_at",
    "tolerances_for",
    "value_slopes",
]

Tensors = tuple[Tensor, ...]
Flat = Callable[..., Tensors]
Ladder = Callable[[int], "list[Slope]"]

RIGHT = "right"
INCONCLUSIVE = "inconclusive"
PATIENCE = 8.0  # a disagreement is inconclusive up to this many times its doubt
BY_DIFFERENCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SHRINK = (1.0, 1 / 16, 1 / 256)  # the steps tried, in units of the first
_CLEARLY = 1000.0  # a kink is one where its jump is that many tolerances


class LawError(AssertionError):
    """A derivative or a linear map breaks a law; the message names the law, the leaf and both numbers."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two tensors at their worst entry. ``outcome`` is right, inconclusive or wrong."""

    outcome: str
    got: float
    expected: float
    error: float
    tolerance: float
    size: float

    @property
    def relative(self) -> float:
        return self.error / self.size if self.size > 0 else self.error

    @property
    def wrong(self) -> bool:
        return self.outcome == "wrong"


@dataclasses.dataclass(frozen=True)
class Slope:
    """A derivative by differences in float64: entrywise with its doubt and what looks like a kink; the noise of rounding."""

    value: Tensor
    doubt: Tensor
    kink: Tensor
    noise: float
    anywhere: float  # the largest doubt along the direction: a kink that shows in one entry hides in another

    @staticmethod
    def exactly(value: Tensor) -> Slope:
        wide = value.detach().double()
        return Slope(wide, torch.zeros_like(wide), torch.zeros_like(wide), 0.0, 0.0)


def comparison(got: Tensor, slope: Slope, rtol: float, atol: float, size: float) -> Comparison:
    """``got`` against a slope, entry by entry, within ``atol + rtol * size`` and the noise."""
    got, expected = got.detach().double().reshape(-1), slope.value.reshape(-1)
    error, tolerance = (got - expected).abs(), atol + rtol * size + slope.noise
    unsure = ~expected.isfinite() & (slope.anywhere != 0)  # nothing to compare with; a doubt of zero says that these are exact
    wrong = ~unsure & ~(error <= tolerance)  # a NaN in `got` is wrong
    explained = error <= PATIENCE * slope.anywhere
    unsure = unsure | (slope.kink.reshape(-1) > _CLEARLY * tolerance)
    outcome = "wrong" if bool((wrong & ~explained).any()) else INCONCLUSIVE if bool((wrong | unsure).any()) else RIGHT
    if not len(got):
        return Comparison(RIGHT, 0.0, 0.0, 0.0, tolerance, size)
    rank = torch.where(wrong & ~explained, error.nan_to_num(nan=torch.inf) + tolerance, error.nan_to_num(nan=0.0, posinf=0.0))
    worst = int(rank.argmax())
    return Comparison(outcome, float(got[worst]), float(expected[worst]), float(error[worst]), tolerance, size)


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude of an entry."""
    return max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)


def tolerances_for(
    table: dict[torch.dtype, float], dtypes: Sequence[torch.dtype], rtol: float | None, atol: float
) -> tuple[float, float]:
    """``(rtol, atol)``, by default what the table has for the worst of the dtypes."""
    return (max((table.get(d, 1e-1) for d in dtypes), default=1e-6) if rtol is None else rtol), atol


def drawn_by(generator: torch.Generator | None) -> torch.Generator:
    """The caller's generator, or a fresh one of fixed seed; never the global one."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def direction(space: Space, x: Tensors, generator: torch.Generator) -> Tensors:
    """Normal coordinates times the size of their leaf, so that no step leaves the scale of the parameters."""
    v = space.pack(space.random(generator), "direction")
    return tuple(t * scale_of(leaf) for t, leaf in zip(v, x, strict=True))


def scale_of(leaf: Tensor) -> float:
    """The size of a leaf, within bounds; 1 where it is zero."""
    size = largest([leaf])
    return min(max(size, 1e-3), 1e3) if size > 0 else 1.0


def in_double(f: Flat, x: Tensors) -> Tensors:
    """``x`` in float64 if f takes it, else as it is (a float32 weight held by f would not mix with float64)."""
    wide = tuple(t.double() for t in x)
    try:
        f(*wide)
    except (RuntimeError, TypeError, ValueError):
        return x
    return wide


def agree(narrow: Sequence[Tensor], wide: Sequence[Tensor], eps: float) -> bool:
    """Whether floating results rounded to ``eps`` are those of float64, to half of their digits."""
    rtol = eps**0.5
    return len(narrow) == len(wide) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol, rtol * largest([a]), equal_nan=True)
        for a, b in zip(narrow, wide, strict=True)
        if a.is_floating_point()
    )


def measured_along(f: Flat, x: Tensors, v: Tensors) -> Ladder:
    """The derivatives of the outputs of f at x along v, by steps ever smaller, computed when asked for."""
    return functools.cache(lambda rung: slopes_at(f, x, v, _SHRINK[rung]))


def settled(ladder: Ladder, compare: Callable[[Sequence[Slope]], Comparison], rungs: int = len(_SHRINK)) -> Comparison:
    """The comparison at the first step, unless a smaller one contradicts it.

    A kink close by spoils the large steps alone, so right at a smaller step is right, and wrong must be so at the two smallest
    steps whose rounding noise leaves a say.
    """
    first = compare(ladder(0))
    if first.outcome == RIGHT:
        return first
    heard = [first]
    for rung in range(1, rungs):
        smaller = compare(ladder(rung))
        if smaller.outcome == RIGHT and smaller.tolerance <= 2 * first.tolerance:
            return smaller
        if rung == 1 or not smaller.tolerance > first.error / 4:
            heard.append(smaller)
    if all(one.wrong for one in heard[-2:]):
        return heard[-1]
    return dataclasses.replace(first, outcome=INCONCLUSIVE)


def slopes_at(f: Flat, x: Tensors, v: Tensors, shrink: float) -> list[Slope]:
    """The slope of every output of f at x along v, by the first step times ``shrink``."""
    outputs = tuple(t.detach() for t in f(*x))
    eps = max(torch.finfo(t.dtype).eps for t in (*x, *outputs))
    h = eps**0.2 * shrink

    def at(t: float) -> Tensors:
        return tuple(out.detach().double() for out in f(*(p + t * d.to(p) for p, d in zip(x, v, strict=True))))

    center = tuple(out.double() for out in outputs)
    noise = 8 * eps * largest(center) / h
    around = (at(h), at(-h), at(h / 2), at(-h / 2))
    found = [_slope(*five, h, noise) for five in zip(center, *around, strict=True)]
    anywhere = largest([s.doubt.nan_to_num(nan=torch.inf) for s in found])
    return [dataclasses.replace(s, anywhere=anywhere) for s in found]


def _slope(center: Tensor, right: Tensor, left: Tensor, near_right: Tensor, near_left: Tensor, h: float, noise: float) -> Slope:
    coarse, fine = (right - left) / (2 * h), (near_right - near_left) / h
    bend, near_bend = (right - 2 * center + left) / (2 * h), (near_right - 2 * center + near_left) / h
    gap = (2 * near_bend - bend).abs()
    kink = torch.where(gap > bend.abs() / 2, gap, 0.0)  # where g is smooth the bend halves with the step
    return Slope((4 * fine - coarse) / 3, (fine - coarse).abs() + gap, kink, noise, 0.0)


def along(slopes: Sequence[Slope], u: Tensors) -> Slope:
    """The slope of <u, f>; doubts add up without cancelling."""
    pairs = list(zip(slopes, (t.double() for t in u), strict=True))
    value = torch.stack([(s.value * t).sum() for s, t in pairs]).sum()
    doubt = torch.stack([(s.doubt * t.abs()).sum() for s, t in pairs]).sum()
    kink = torch.stack([(s.kink * t.abs()).sum() for s, t in pairs]).sum()
    anywhere = float(doubt.nan_to_num(nan=torch.inf))
    return Slope(value, doubt, kink, sum(s.noise * float(t.norm()) for s, t in pairs), anywhere)


def finite(t: Tensor) -> Tensor:
    """``t`` with zeros where it is not finite."""
    return t.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


# ---------------------------------------------------------------------------------------------------- four gradients


@dataclasses.dataclass(frozen=True)
class Line:
    """A function f and its gradient g on the line x + t w, by differences at a far and a near step.

    Attributes:
        w: the direction, one tensor a leaf.
        curvature: d/dt g at t = 0 by the far step and by the near one, one slope a leaf.
        gradient: g at t = 0, one slope a leaf (its mean over both sides).
        value: d/dt f at t = 0, by the far step and by the near one.
    """

    w: Tensors
    curvature: tuple[list[Slope], list[Slope]]
    gradient: list[Slope]
    value: tuple[Slope, Slope]

    def settled(self, compare: Callable[[Sequence[Slope]], Comparison]) -> Comparison:
        """The comparison with the curvature at the far step, unless the near one contradicts it."""
        return settled(self.curvature.__getitem__, compare, 2)


def line_through(at: Callable[[float], tuple[Tensor, Tensors]], w: Tensors, eps: float) -> Line:
    """The line along ``w`` from ``at(t) = (f, g)`` at x + t w, in float64, rounded to ``eps``; calls ``at`` four times."""
    far, near = _two_steps(eps)
    values, gradients = {}, {}
    for t in (far, -far, near, -near):
        values[t], gradients[t] = at(t)
    pairs = [list(zip(gradients[h], gradients[-h], strict=True)) for h in (far, near)]
    noise = 8 * eps * largest([g for each in gradients.values() for g in each])
    curvature = [[(a - b) / (2 * h) for a, b in pair] for h, pair in zip((far, near), pairs, strict=True)]
    means = [[(a + b) / 2 for a, b in pair] for pair in pairs]
    doubt = [(a - b).abs() for a, b in zip(*curvature, strict=True)]
    jumps = [near * d for d in doubt]  # where g jumps between x - near w and x + near w, this is half the jump
    unsure = [(a - b).abs() + jump for a, b, jump in zip(*means, jumps, strict=True)]
    return Line(
        w,
        (_doubted(curvature[0], doubt, noise / far), _doubted(curvature[1], doubt, noise / near)),
        _doubted(means[1], unsure, noise),
        _value_slopes(values, eps),
    )


def value_slopes(at: Callable[[float], Tensor], eps: float) -> tuple[Slope, Slope]:
    """d/dt of ``at(t) = f(x + t w)`` by the far step and by the near one; calls ``at`` four times."""
    return _value_slopes({sign * h: at(sign * h) for h in _two_steps(eps) for sign in (1, -1)}, eps)


def _two_steps(eps: float) -> tuple[float, float]:
    """Far, where rounding is harmless; and near, where most kinks are out of reach."""
    return eps**0.3, eps**0.4


def _value_slopes(values: dict[float, Tensor], eps: float) -> tuple[Slope, Slope]:
    steps = _two_steps(eps)
    far, near = ((values[h] - values[-h]) / (2 * h) for h in steps)
    noise = 8 * eps * largest(list(values.values()))
    (far_slope,), (near_slope,) = (
        _doubted([d], [(far - near).abs()], noise / h) for d, h in zip((far, near), steps, strict=True)
    )
    return far_slope, near_slope


def _doubted(values: Sequence[Tensor], doubts: Sequence[Tensor], noise: float) -> list[Slope]:
    anywhere = largest([d.nan_to_num(nan=torch.inf) for d in doubts])
    return [Slope(v, d, torch.zeros_like(v), noise, anywhere) for v, d in zip(values, doubts, strict=True)]


class InDouble(TorchFunctionMode):
    """Inside it every floating tensor that meets an op is float64, constants that f holds included, and so is every result.

    A float32 function is evaluated in float64 this way, but for what it does outside torch. What it writes into a narrow tensor
    of its own is lost, so compare a value before believing another.
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        wide = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return _widened(_WIDE_CASTS.get(func, func)(*map(_widened, args), **wide))


_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_WIDE_CASTS: dict[Any, Any] = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)


def _widened(value: Any) -> Any:
    if type(value) in (Tensor, torch.nn.Parameter):
        return value.double() if value.dtype in _NARROW else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value
