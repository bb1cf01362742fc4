"""Products H v from values of the gradient alone, extrapolated, with an estimate of how far they are off.

With g = grad f and steps h_k = h_0 / 4^k, central differences are even in h and one-sided remainders are odd,

    D(h) = (g(x + h v) - g(x - h v)) / 2h          = H v + a_2 h^2 + a_4 h^4 + ...,
    B(h) = (g(x + h v) + g(x - h v) - 2 g(x)) / 2h = b_0 + b_1 h + b_3 h^3 + ...,      b_0 = 0 where g is smooth.

Three steps eliminate two powers of each. Of D there remain, by Romberg's scheme,

    R_1 = (16 D(h/4) - D(h)) / 15 = H v + O(h^4),        R_2 = (256 R_1(h/4) - R_1(h)) / 255 = H v + O(h^6),

and R_2 is the answer. Of B there remains b_0, half the jump of the slope at a kink; where there is none, it is the rounding of
g and whatever else makes g rough. The estimate of an entry's error is the sum of

    |R_2 - R_1(h/4)|, or |D(h/4) - D(h)| where those differences do not shrink as powers of h do,
    |b_0|, and 2 eps max |g| / (h/16) + eps max |H v| |x| / |h v/16| for the rounding of g and of x.

The first step is that at which truncation and rounding balance for a function that varies on the scale of its argument. Where
the estimate stays large, four times smaller steps follow, two gradients each, for functions that vary faster or end nearby,
until one is good, or rounding must spoil the next, or f itself stands still. For each entry the three steps with the smallest
estimate win.

Nothing is known between the points of evaluation: a part of f that goes through bfloat16 stands still for such steps, and
beside a part that moves this goes unnoticed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from functional_hess.differences import BY_DIFFERENCES, InDouble, agree, finite, largest, tolerances_for
from functional_hess.guards import out_of_memory, outside_frame, value_and_gradient
from functional_hess.nesting import is_outermost
from functional_hess.tree import Space

__all__ = ["ByDifferences", "Estimated", "FiniteDifferenceWarning", "warn_of_doubt"]

Tensors = tuple[Tensor, ...]
Scalar = Callable[..., tuple[Tensor, Any]]

_RATIO = 4
_WINDOW = 3
_MOST_STEPS = 10  # the last is 4^9 = 262,144 times smaller than the first
_GOOD = 1e-3  # of the tolerance: below it no further step is tried
_BY_ROUNDING = 100.0  # an error up to this many times what rounding explains is none to warn of

_log = logging.getLogger("functional_hess")


class FiniteDifferenceWarning(UserWarning):
    """A product by differences may be farther off than its dtype would have it: at a kink, or where f is rough."""


@dataclasses.dataclass(frozen=True)
class Estimated:
    """A product and what is thought of it.

    Attributes:
        product: H v, one tensor a leaf, in float64.
        doubts: the estimated error of each entry; infinite where the product is not finite.
        step: the smallest step, as a multiple of v.
        noise: the part of the doubts that rounding explains.
        still: the smallest step is none for f.
    """

    product: Tensors
    doubts: Tensors
    step: float
    noise: float
    still: bool

    @functools.cached_property
    def size(self) -> float:
        """The largest entry of the product."""
        return largest([*map(finite, self.product)])

    @functools.cached_property
    def error(self) -> float:
        """The largest doubt."""
        return largest(self.doubts)

    @property
    def leaf(self) -> int:
        """Where that is, as a position among the columns."""
        return max(range(len(self.doubts)), key=lambda leaf: largest([self.doubts[leaf]]))

    @property
    def relative(self) -> float:
        return self.error / self.size if self.size > 0 else self.error

    def excess(self, rtol: float) -> float:
        """The error as a multiple of what is to be expected; above 1 it is worth a warning."""
        expected = rtol * self.size + _BY_ROUNDING * self.noise
        return self.error / expected if expected > 0 else self.error

    def improved(self, by: Estimated) -> Estimated:
        """Entry by entry the one with less doubt; but a slope once found does not vanish without one.

        Rounding makes g a staircase, where steps small enough find no slope, and no doubt. Only a slope that was doubtful itself
        may vanish, where a kink nearby is out of reach at last.
        """
        product, doubts = [], []
        for old, old_doubt, new, new_doubt in zip(self.product, self.doubts, by.product, by.doubts, strict=True):
            vanished = (old_doubt < old.abs()) & (new.abs() <= new_doubt)
            doubt = torch.where(vanished, torch.maximum(new_doubt, (new - old).abs()), new_doubt)
            product.append(torch.where(doubt < old_doubt, new, old))
            doubts.append(torch.minimum(doubt, old_doubt))
        both = dataclasses.replace(by, product=tuple(product), doubts=tuple(doubts))
        return both if both.error < self.error else dataclasses.replace(both, step=self.step, noise=self.noise)


@dataclasses.dataclass(frozen=True)
class _Quotient:
    """D(h) and B(h), one tensor a column each; the largest entry of g; h, and h v as a part of the size of x.

    ``still`` tells that f did not change at all between x + h v and x - h v, though g says that it should have.
    """

    even: Tensors
    odd: Tensors
    size: float
    step: float
    part: float
    still: bool = False


class ByDifferences:
    """The map v -> H v at x by differences of the gradient in the columns ``columns``; it remembers its least certain product.

    At the outermost level x is made float64 if f then has the same gradient, products are estimated and steps chosen. Inside
    another transform, where no number can be looked at, there are the first three steps in the dtype of x and no estimate.
    """

    def __init__(self, f: Scalar, x: Tensors, columns: Sequence[int], verb: str) -> None:
        self.f, self.x, self.columns, self.verb = f, x, columns, verb
        self.dtypes = tuple(t.dtype for t in x)
        self.rtol, _ = tolerances_for(BY_DIFFERENCES, self.dtypes, None, 0.0)
        self.gradients, self.widened, self.told = 0, False, False
        self.worst: Estimated | None = None
        self.center: Tensors | None = None
        self.value = 0.0
        if is_outermost() and get_proxy_mode() is None and not any(isinstance(t, FakeTensor) for t in x):
            self.value, self.center = self._gradient(x)
            self._widen()

    def __call__(self, v: dict[int, Tensor]) -> Tensors:
        quotients = self._quotients(v)
        if self.center is None:
            return self._narrowed(_extrapolated([next(quotients).even for _ in range(_WINDOW)])[-1])
        best = self._remembered(self._best(quotients))
        return self._narrowed(best.product)

    # ------------------------------------------------------------------------------------------------ the gradient

    def _gradient(self, x: Tensors) -> tuple[float, Tensors]:
        """f where a number can be looked at, and g."""
        self.gradients += 1
        with InDouble() if self.widened else contextlib.nullcontext():
            (value, _), g = value_and_gradient(self.f, x, self.verb, self.columns)
        looked_at = is_outermost() and not isinstance(value, FakeTensor) and get_proxy_mode() is None
        return float(value.detach()) if looked_at else 0.0, tuple(t.double() for t in g)

    def _widen(self) -> None:
        """x in float64, if f takes it there and has the gradient that it has here."""
        if self.center is None or all(dtype == torch.float64 for dtype in self.dtypes):
            return
        narrow, value, x, eps = self.center, self.value, self.x, self.eps
        self.x, self.widened = tuple(t.double() for t in x), True
        try:
            self.value, self.center = self._gradient(self.x)
        except Exception as error:
            if out_of_memory(error):
                raise
            self.center = None
        if self.center is None or not agree(narrow, self.center, eps):
            self.x, self.widened, self.value, self.center = x, False, value, narrow

    @property
    def eps(self) -> float:
        return max(torch.finfo(t.dtype).eps for t in self.x)

    def _narrowed(self, product: Tensors) -> Tensors:
        return tuple(t.to(self.dtypes[column]) for column, t in zip(self.columns, product, strict=True))

    # ------------------------------------------------------------------------------------------------ the steps

    def _quotients(self, v: dict[int, Tensor]) -> Iterator[_Quotient]:
        """The first step is 4 eps^(1/7) of the size of a leaf: there truncation h^6 and rounding eps / h balance."""
        reach = [v[leaf].detach().abs().max().cpu().double() / _scale(self.x[leaf]) for leaf in v if v[leaf].numel()]
        longest = torch.stack(reach or [torch.ones(())]).max()
        longest = torch.where(longest > 0, longest, 1.0)
        part = _RATIO * self.eps ** (1 / 7)
        for _ in range(_MOST_STEPS):
            yield self._quotient(v, part / longest, part)
            part /= _RATIO

    def _quotient(self, v: dict[int, Tensor], h: Tensor, part: float) -> _Quotient:
        def moved(signed: Tensor) -> Tensors:
            return tuple(t + (signed * v[leaf]).to(t.dtype) if leaf in v else t for leaf, t in enumerate(self.x))

        (f_right, right), (f_left, left) = self._gradient(moved(h)), self._gradient(moved(-h))
        even = tuple((a - b) / (2 * h) for a, b in zip(right, left, strict=True))
        if self.center is None:
            return _Quotient(even, (), 0.0, 0.0, part)
        odd = tuple((a + b - 2 * c) / (2 * h) for a, b, c in zip(right, left, self.center, strict=True))
        size = largest([*map(finite, right), *map(finite, left)])
        return _Quotient(
            even,
            odd,
            size,
            float(h),
            part,
            still=f_right == f_left and self._slope(v) * float(h) > 32 * self.eps * abs(self.value),
        )

    def _slope(self, v: dict[int, Tensor]) -> float:
        """|<g, v>|, as far as g is known."""
        known = [(g, v[leaf].detach()) for leaf, g in zip(self.columns, self.center or (), strict=True) if leaf in v]
        return abs(sum(float((g * t).sum()) for g, t in known))

    def _best(self, quotients: Iterator[_Quotient]) -> Estimated:
        window: collections.deque[_Quotient] = collections.deque(maxlen=_WINDOW)
        best: Estimated | None = None
        for quotient in quotients:
            window.append(quotient)
            if len(window) < _WINDOW:
                continue
            one = _estimated(window, self.eps)
            if best and one.still:
                break
            best = best.improved(one) if best else one
            if best.error <= _GOOD * self.rtol * best.size or best.error <= _RATIO * one.noise:
                break
        assert best is not None
        return best

    def _remembered(self, best: Estimated) -> Estimated:
        """With the rounding to the dtype of the result; the worst is kept."""
        rounding = [
            torch.finfo(self.dtypes[column]).eps / 2 * p.abs() for column, p in zip(self.columns, best.product, strict=True)
        ]
        doubts = tuple(doubt + r for doubt, r in zip(best.doubts, rounding, strict=True))
        best = dataclasses.replace(best, doubts=doubts, noise=best.noise + largest(rounding))
        if self.worst is None or best.excess(self.rtol) > self.worst.excess(self.rtol):
            self.worst = best
        told = self.verb, best.step, best.error, best.size, self.gradients
        _log.debug("%s: differences down to a step of %.1e v: estimated error %.1e of %.1e; %d gradients so far", *told)
        return best


def warn_of_doubt(product: Any, space: Space) -> None:
    """Say once of a map by differences that a product of it may be far off, where it may, and what to do."""
    if not isinstance(product, ByDifferences) or product.told or product.worst is None:
        return
    worst = product.worst
    if worst.excess(product.rtol) <= 1:
        return
    product.told = True
    where = space.name_of(product.columns[worst.leaf], "x")
    warnings.warn(
        f"{product.verb}: mode='finite-difference': the product is {worst.size:.3g} at its largest, with an estimated error of "
        f"{worst.error:.1e} at {where}, more than {product.rtol:.0e} of it and rounding explain: the gradient of f has a kink at "
        "x or is rough near it (an inner loop that stops early, noise, low precision inside f). Move x off the kink or smooth f, "
        "tighten its tolerances and compute it in float64; or give the op without a rule an autograd.Function and leave "
        "mode='finite-difference' out.",
        FiniteDifferenceWarning,
        stacklevel=outside_frame(),
    )


# ---------------------------------------------------------------------------------------------------- extrapolation


def _scale(t: Tensor) -> Tensor:
    """The size of a leaf, within bounds; 1 where it is zero; on the host, since leaves may live on several devices."""
    size = t.detach().abs().max().cpu().double() if t.numel() else torch.zeros((), dtype=torch.float64)
    return torch.where(size > 0, size.clamp(1e-3, 1e3), 1.0)


def _extrapolated(D: Sequence[Tensors]) -> tuple[Tensors, Tensors]:
    """R_1 by the last two of three quotients, and R_2 by all."""
    coarse, fine = ([(16 * near - far) / 15 for far, near in zip(*pair, strict=True)] for pair in (D[:2], D[1:]))
    return tuple(fine), tuple((256 * near - far) / 255 for far, near in zip(coarse, fine, strict=True))


def _infinite_at_nan(t: Tensor) -> Tensor:
    return torch.where(t.isnan(), torch.inf, t)


def _constant_part(B: Sequence[Tensor]) -> Tensor:
    """b_0 of b_0 + b_1 h + b_3 h^3, by three steps."""
    coarse, fine = ((4 * near - far) / 3 for far, near in (B[:2], B[1:]))
    return (64 * fine - coarse) / 63


def _estimated(window: Sequence[_Quotient], eps: float) -> Estimated:
    first, second = _extrapolated([q.even for q in window])
    size, last = largest([*map(finite, second)]), window[-1]
    noise = 2 * eps * max(q.size for q in window) / last.step + eps * size / last.part
    doubts: list[Tensor] = []
    for leaf, (one, two) in enumerate(zip(first, second, strict=True)):
        far, middle, near = (q.even[leaf] for q in window)
        moved = (near - middle).abs()
        truncation = torch.where(8 * moved > (middle - far).abs(), moved, (two - one).abs())
        jump = _constant_part([q.odd[leaf] for q in window]).abs()
        doubts.append(_infinite_at_nan(truncation + jump + noise + 0 * two))
    return Estimated(second, tuple(doubts), last.step, noise, last.still)
