"""The truth about a Hessian, by central differences of the gradient, and the verdict on an answer.

The gradient is plain ``torch.autograd.grad`` in float64, with nothing repaired. With D(h) = (g(x + h e) - g(x - h e)) / 2h the
truth is (4 D(h/2) - D(h)) / 3, whose error |D(h/2) - D(h)| bounds from above where g is smooth. An entry is *known* where that
is small against the matrix, where the next h agrees (a kink nearby can make h and h/2 alike by chance), and where the one-sided
differences meet, too: at a kink of the gradient D(h) may be the same for all h, but (g(x + h) + g(x - h) - 2 g(x)) / h does not
shrink with h.

A gradient that is wrong itself would make such a truth wrong, so it is held against differences of values in the same way. Where
it fails, the truth is second differences of values.

A verdict is over all entries that are known: one of them wrong is wrong, whatever the others are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sweep.problems import Problem

__all__ = ["VERDICTS", "NoGradient", "Truth", "compare", "truth_of"]

VERDICTS = ("right", "refused", "inconclusive", "wrong", "crash")
STEPS = (2e-3, 2e-4, 2e-5)
KNOWN = 1e-4  # disagreement of two steps, relative to the entry's scale, up to which an entry is known


class NoGradient(Exception):
    """Plain autograd has no gradient of this function: it makes no case."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """H, n x n in the coordinates of the leaves one after another; ``error`` bounds, NaN where nothing is known.

    ``scale`` is what an error is relative to, entry by entry. ``lost`` says how many roundings of the dtype an answer may be
    off, ``amplified`` how many times the relative rounding. ``by_values`` says that the gradient was found wrong, ``draws`` that
    f draws other numbers in float32.
    """

    H: Tensor
    error: Tensor
    scale: Tensor
    lost: float = 0.0
    amplified: float = 0.0
    by_values: bool = False
    draws: bool = False

    @property
    def known(self) -> Tensor:
        return self.error <= KNOWN * self.scale

    @property
    def diagonal(self) -> Truth:
        parts = {name: getattr(self, name).diagonal() for name in ("H", "error", "scale")}
        return dataclasses.replace(self, **parts)

    def allowed(self, dtype: torch.dtype) -> tuple[float, float]:
        """What rounding may do to an answer: relative to its scale, and absolutely.

        In float64 1e-6 relatively: no wrong formula is that close. In float32 at least 2e-4, a few thousand roundings.
        """
        eps = torch.finfo(dtype).eps
        relative = 1e-6 if dtype is torch.float64 else min(max(2e-4, self.amplified * eps), 0.1)
        return max(relative, 1e-4) if self.by_values else relative, self.lost * eps


def truth_of(problem: Problem, single: Problem) -> Truth:
    """The Hessian of a float64 problem; ``single`` is the same one in float32, for what it loses there.

    Raises:
        NoGradient: plain autograd raises, or no leaf is reached.
    """
    x = torch.cat([t.reshape(-1) for t in problem.x])
    value, gradient = _flat_value(problem), _flat_gradient(problem)
    f, g = value(x), gradient(x)
    low = _flat_value(single)(torch.cat([t.reshape(-1) for t in single.x])).double()
    draws = problem.seed is not None and not bool((low - f).abs() <= 1e-3 * (1 + f.abs()))
    losses = _losses(single, g, f)
    if problem.rounds:
        nothing = torch.full((x.numel(), x.numel()), torch.nan, dtype=torch.float64)
        return Truth(nothing, nothing, torch.ones_like(nothing))
    slope = _differences(lambda at: value(at).reshape(1), x, f, lambda D, error: _value_scale(D, error, f))
    known = slope.known[0]
    wrong = known & ((g - slope.D[0]).abs() > 1e-5 * slope.scale[0] + 3 * slope.error[0])
    if wrong.any() and not problem.by_convention:
        H, error = _second_differences(value, x)
        return Truth(H, error, _scale(H, error, g, f), *losses, by_values=True, draws=draws)
    bend = _differences(gradient, x, f, lambda D, error: _scale(D, error, g, f))
    unknown = ~(known & bend.linear & g.isfinite())  # at a kink of f, or a pole of its gradient, the gradient is a convention
    error = bend.error.masked_fill(unknown.unsqueeze(0) | unknown.unsqueeze(1), torch.nan)
    truth = Truth(bend.D, error, bend.scale, *losses, draws=draws)
    return dataclasses.replace(truth, lost=max(truth.lost, 10 * _lost_by_plain_autograd(problem, single, truth)))


def compare(answer: Tensor, truth: Truth, dtype: torch.dtype, v: Tensor | None = None) -> tuple[str, str]:
    """Verdict and detail on H, or with ``v`` on H v, computed in ``dtype``."""
    H, error, scale, known = truth.H, truth.error, truth.scale, truth.known
    if v is not None:
        H, error, scale = H @ v, error.nan_to_num() @ v.abs(), scale @ v.abs()
        known = known.all(1)
    if answer.shape != H.shape or answer.dtype != dtype:
        return "wrong", f"shape {tuple(answer.shape)}, {answer.dtype}, not {tuple(H.shape)}, {dtype}"
    if truth.draws and dtype is torch.float32:
        return "inconclusive", "other random numbers are drawn in float32"
    relative, absolute = truth.allowed(dtype)
    off = (answer.detach().double() - H).abs() / scale
    bad = known & ~(off <= relative + (absolute + 3 * error) / scale)
    if bad.any():
        worst = off.masked_fill(~known, 0).nan_to_num(torch.inf).max()
        return "wrong", f"off by {worst:.1e} of the scale in {int(bad.sum())} of {bad.numel()} entries"
    if not known.all():
        return "inconclusive", f"{int((~known).sum())} of {known.numel()} entries unknown"
    return "right", ""


def _flat_value(problem: Problem) -> Callable[[Tensor], Tensor]:
    def value(at: Tensor) -> Tensor:
        if problem.seed is not None:
            torch.manual_seed(problem.seed)
        return problem.f(*_split(at, problem.x)).detach()

    return value


def _flat_gradient(problem: Problem) -> Callable[[Tensor], Tensor]:
    def gradient(at: Tensor) -> Tensor:
        leaves = [t.clone().requires_grad_() for t in _split(at, problem.x)]
        if problem.seed is not None:
            torch.manual_seed(problem.seed)
        try:
            value = problem.f(*leaves)
            parts: Sequence[Tensor | None] = torch.autograd.grad(value, leaves, allow_unused=True)
        except RuntimeError as error:
            raise NoGradient(str(error)) from error
        if all(part is None for part in parts):
            raise NoGradient("no leaf is used")
        return torch.cat(
            [
                torch.zeros(t.numel(), dtype=t.dtype) if p is None else p.detach().reshape(-1)
                for t, p in zip(leaves, parts, strict=True)
            ]
        )

    return gradient


def _split(at: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [part.reshape(t.shape).clone() for part, t in zip(at.split([t.numel() for t in like]), like, strict=True)]


def _losses(single: Problem, exact: Tensor, value: Tensor) -> tuple[float, float]:
    """How many roundings an answer may be off, absolutely and relatively.

    The gradient in float32 tells how many an operation loses: its error e, for a gradient of size |g|. The next derivative loses
    about as many again, hence a factor of 100: 100 e / |g| relatively, and 100 e absolutely, for derivatives that cancel, of
    which 100 roundings of f are the least.
    """
    try:
        shown = _flat_gradient(single)(torch.cat([t.reshape(-1) for t in single.x])).double()
        off = float((shown - exact).abs().nan_to_num(0.0, 0.0, 0.0).max())
    except NoGradient:
        off = 0.0
    off /= torch.finfo(torch.float32).eps
    size = float(exact.abs().max())
    return 100 * max(off, 1 + float(value.abs())), 100 * off / size if size > 0 else 0.0


def _lost_by_plain_autograd(problem: Problem, single: Problem, truth: Truth) -> float:
    """How many roundings a product H v by plain double backward is off in float32, if the one in float64 is right.

    Terms that cancel may be far larger than the Hessian, its gradient and its value, all of which may be zero.
    """
    v = torch.cos(0.3 + 1.7 * torch.arange(len(truth.H), dtype=torch.float64))
    try:
        exact, shown = _plain_product(problem, v), _plain_product(single, v.float())
    except RuntimeError:
        return 0.0
    if truth.draws or compare(exact, truth, torch.float64, v)[0] != "right":
        return 0.0
    off = float((shown.double() - exact).abs().max()) / torch.finfo(torch.float32).eps
    return off if off < 1e5 else 0.0  # that is no rounding


def _plain_product(problem: Problem, v: Tensor) -> Tensor:
    leaves = [t.clone().requires_grad_() for t in problem.x]
    if problem.seed is not None:
        torch.manual_seed(problem.seed)
    gradient = torch.autograd.grad(problem.f(*leaves), leaves, create_graph=True, materialize_grads=True)
    slope = sum((g.reshape(-1) @ u for g, u in zip(gradient, v.split([t.numel() for t in leaves]), strict=True)), v.new_zeros(()))
    if not slope.requires_grad:
        return torch.zeros_like(v)
    product = torch.autograd.grad(slope, leaves, materialize_grads=True)
    return torch.cat([p.reshape(-1) for p in product])


@dataclasses.dataclass(frozen=True)
class _Slope:
    """The Jacobian D by differences, with error bounds and scales; ``linear`` tells by row whether it is a derivative at all.

    At a singular point derivatives along all axes may exist, and meet no plane: they must give the one along another direction.
    """

    D: Tensor
    error: Tensor
    scale: Tensor
    linear: Tensor

    @property
    def known(self) -> Tensor:
        return (self.error <= KNOWN * self.scale) & self.linear.unsqueeze(1)


def _differences(
    function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor, scale_of: Callable[[Tensor, Tensor], Tensor]
) -> _Slope:
    """Each entry from the two steps that know it best. ``value`` is that of f, which tells the size of roundings."""
    n, at = x.numel(), function(x)
    v = torch.sin(2.0 + 1.3 * torch.arange(n, dtype=torch.float64))
    directions = torch.cat([torch.eye(n, dtype=torch.float64), v.unsqueeze(0)])
    D = torch.full((at.numel(), n + 1), torch.nan, dtype=torch.float64)
    error, last = torch.full_like(D, torch.nan), None
    for h in STEPS:
        found = _at_step(function, x, at, directions, h, 1 + float(value.abs()))
        if last is not None:
            both, off = _agreed(last, found)
            better = ~(error <= off) & off.isfinite()
            D, error = torch.where(better, both, D), torch.where(better, off, error)
        last = found
        scale = scale_of(D[:, :n], error[:, :n])
        if bool((error[:, :n] <= KNOWN / 10 * scale).all()):
            break
    allowed = 10 * KNOWN * (scale @ v.abs()) + 3 * error[:, :n].nan_to_num() @ v.abs()
    off = (D[:, n] - D[:, :n] @ v).abs() + error[:, n]
    linear = (off <= allowed) | D[:, :n].isnan().any(1)
    return _Slope(D[:, :n], error[:, :n], scale, linear)


def _agreed(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The better of two results with their error bounds, whose bound is what they differ by beyond the bound of the other."""
    first = ~(a[1] > b[1])
    D, off = (torch.where(first, p, q) for p, q in zip(a, b, strict=True))
    return D, torch.maximum(off, (a[0] - b[0]).abs() - torch.where(first, b[1], a[1]))


def _at_step(
    function: Callable[[Tensor], Tensor], x: Tensor, at: Tensor, directions: Tensor, h: float, size: float
) -> tuple[Tensor, Tensor]:
    D, error = (torch.empty(at.numel(), len(directions), dtype=torch.float64) for _ in range(2))
    for j, e in enumerate(h * directions):
        far = function(x + e), function(x - e)
        near = function(x + e / 2), function(x - e / 2)
        coarse, fine = (far[0] - far[1]) / (2 * h), (near[0] - near[1]) / h
        bend, bend_near = (far[0] + far[1] - 2 * at) / h, 2 * (near[0] + near[1] - 2 * at) / h
        still = (near[0] == near[1]) & (far[0] == far[1]) & (near[0] == at) & (far[0] == at)  # then there are no roundings
        rounding = (1e-14 * (at.abs() + far[0].abs()) + 1e-15 * size).masked_fill(still, 0.0) / h
        kinked = (bend_near.abs() > 0.75 * bend.abs()) & (bend_near.abs() > 10 * rounding)
        D[:, j] = (4 * fine - coarse) / 3
        # At a kink the one-sided derivatives differ by the bend.
        error[:, j] = (fine - coarse).abs() + rounding + torch.where(kinked, bend_near.abs(), 0.0)
    return D, error


def _scale(H: Tensor, error: Tensor, g: Tensor, value: Tensor) -> Tensor:
    """sqrt(r_i r_j), r_i the largest entry of row and column i: leaves may differ in size by much.

    Where H is small or zero, the gradient and the value say what size a wrong entry would have.
    """
    size = torch.where(error.isfinite(), H.abs(), 0.0)
    r = torch.maximum(size.amax(0), size.amax(1))
    least = 1e-4 * float(r.max()) + 1e-7 * (1 + float(value.abs()))
    r = torch.maximum(r, 1e-2 * g.abs().nan_to_num(0.0, 0.0, 0.0)).clamp(min=least)
    return (r.unsqueeze(0) * r.unsqueeze(1)).sqrt()


def _value_scale(dv: Tensor, error: Tensor, value: Tensor) -> Tensor:
    largest = torch.where(error.isfinite(), dv.abs(), 0.0).max()
    return (largest + 1e-6 * (1 + value.abs())).expand_as(dv)


def _second_differences(value: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """d2f/dx_i dx_j from values alone at two steps."""

    def at_step(h: float) -> Tensor:
        n, f0 = x.numel(), value(x)
        e = h * torch.eye(n, dtype=torch.float64)
        H = torch.empty(n, n, dtype=torch.float64)
        for i in range(n):
            H[i, i] = (value(x + e[i]) + value(x - e[i]) - 2 * f0) / h**2
            for j in range(i):
                mixed = value(x + e[i] + e[j]) - value(x + e[i] - e[j]) - value(x - e[i] + e[j]) + value(x - e[i] - e[j])
                H[i, j] = H[j, i] = mixed / (4 * h**2)
        return H

    coarse, fine = at_step(4e-3), at_step(2e-3)
    return (4 * fine - coarse) / 3, (fine - coarse).abs()
