"""What second derivatives are where an operation has none: right, not a number, or the documented slope of a kink.

Every point of the table is gone through by `hvp` (forward over reverse), rows, the Hessian and its diagonal. Hessians are
written by hand. What is never allowed is a finite number that is neither the Hessian nor the documented one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import functional_hess as fh
from functional_hess.testing import LawError

INF = math.inf


def point(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def diagonal(*numbers: float) -> Tensor:
    return torch.diag(point(*numbers))


def rows(*numbers: tuple[float, float, float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


ORIGIN, ONES = point(0, 0, 0), point(1, 1, 1)
I, ZERO = diagonal(1, 1, 1), torch.zeros(3, 3, dtype=torch.float64)
CENTERED = I - torch.ones(3, 3, dtype=torch.float64) / 3  # (n - 1) times the Hessian of half the variance
MASK = torch.tensor([True, False, False])


@dataclasses.dataclass(frozen=True)
class Point:
    """f at x has the Hessian H, or none (then H is what torch's conventions say); ``nan`` allows what is not finite instead."""

    f: Callable[[Tensor], Tensor]
    x: Tensor
    H: Tensor
    nan: bool = False


def halves(*places: int) -> Tensor:
    """The Hessian of the square of a mean of the entries at these places, times 1."""
    e = torch.zeros(3, dtype=torch.float64)
    e[list(places)] = 1 / len(places)
    return 2 * torch.outer(e, e)


def masked(x: Tensor) -> Tensor:
    return x.masked_fill(MASK, -INF)


# The Hessian exists and is found, though an operation is singular there ---------------------------------------------------

RIGHT: dict[str, Point] = {
    "sinc at 0": Point(lambda x: torch.sinc(x).sum(), ORIGIN, -(math.pi**2) / 3 * I),
    "sinc beside 0": Point(lambda x: torch.sinc(x).sum(), ORIGIN + 1e-9, -(math.pi**2) / 3 * I),
    "variance of equal numbers": Point(lambda x: x.var(), ONES, CENTERED),
    "x^2 at 0": Point(lambda x: (x**2).sum(), ORIGIN, 2 * I),
    "x^1 at 0": Point(lambda x: (x**1).sum(), ORIGIN, ZERO),
    "x^0 at 0": Point(lambda x: (x**0).sum() + x.sum(), ORIGIN, ZERO),
    "x^2.5 at 0": Point(lambda x: (x**2.5).sum(), ORIGIN, ZERO),
    "x to a tensor at 0": Point(lambda x: (x ** point(2, 2, 2)).sum(), ORIGIN, 2 * I),
    "float_power at 0": Point(lambda x: torch.float_power(x, 2).sum(), ORIGIN, 2 * I),
    "|x|^3 at 0": Point(lambda x: (x.abs() ** 3).sum(), ORIGIN, ZERO),
    "4-norm to the 4 at an axis": Point(lambda x: x.norm(4) ** 4, point(0, 1, 2), diagonal(0, 12, 48)),
    "3-norm to the 3 at an axis": Point(lambda x: x.norm(3) ** 3, point(0, 1, 2), diagonal(0, 6, 12)),
    "product with one zero": Point(lambda x: x.prod(), point(0, 2, 3), rows((0, 3, 2), (3, 0, 0), (2, 0, 0))),
    "product with two zeros": Point(lambda x: x.prod(), point(0, 0, 3), rows((0, 3, 0), (3, 0, 0), (0, 0, 0))),
    "product with three zeros": Point(lambda x: x.prod(), ORIGIN, ZERO),
    "cumulative product": Point(lambda x: x.cumprod(0).sum(), point(0, 0, 3), rows((0, 4, 0), (4, 0, 0), (0, 0, 0))),
    "determinant of rank n - 1": Point(
        lambda x: torch.linalg.det(torch.diag(x)), point(0, 2, 3), rows((0, 3, 2), (3, 0, 0), (2, 0, 0))
    ),
    "xlogy where x is 0": Point(lambda x: torch.xlogy(x, point(2, 3, 4)).sum(), ORIGIN, ZERO),
    "xlog1py at 0": Point(lambda x: torch.special.xlog1py(x, x).sum(), ORIGIN, 2 * I),
    "logaddexp of equals": Point(
        lambda x: torch.logaddexp(x[0], x[1]), ORIGIN, rows((0.25, -0.25, 0), (-0.25, 0.25, 0), (0, 0, 0))
    ),
    "logaddexp with -inf": Point(lambda x: torch.logaddexp(x[0] ** 2, point(-INF)[0]), point(1, 2, 3), diagonal(2, 0, 0)),
    "logsumexp with -inf": Point(lambda x: torch.logsumexp(torch.cat([x, point(-INF)]), 0), ORIGIN, I / 3 - 1 / 9),
    "logcumsumexp after -inf": Point(lambda x: torch.logcumsumexp(torch.cat([point(-INF), x]), 0)[3], ORIGIN, I / 3 - 1 / 9),
    "masked softmax": Point(lambda x: torch.softmax(masked(x), 0)[1], ORIGIN, ZERO),  # s(1 - s)(1 - 2s) = 0 at s = 1/2
    "masked log_softmax": Point(
        lambda x: torch.log_softmax(masked(x), 0)[1:].sum(), ORIGIN, rows((0, 0, 0), (0, -0.5, 0.5), (0, 0.5, -0.5))
    ),
    "division masked twice": Point(
        lambda x: torch.where(x == 0, 1 - x**2 / 6, torch.where(x == 0, 1.0, x).sin() / torch.where(x == 0, 1.0, x)).sum(),
        ORIGIN,
        -I / 3,
    ),
    "kl_div of a target with 0": Point(lambda x: F.kl_div(x, point(0, 0.5, 0.5), reduction="sum"), -ONES, ZERO),
    "asin at 0": Point(lambda x: torch.asin(x).sum(), ORIGIN, ZERO),
    "i0 at 0": Point(lambda x: torch.i0(x).sum(), ORIGIN, I / 2),
    "i1 at 0": Point(lambda x: torch.special.i1(x).sum(), ORIGIN, ZERO),
    "lgamma at 1": Point(lambda x: torch.lgamma(x).sum(), ONES, math.pi**2 / 6 * I),
    "gelu at 0": Point(lambda x: F.gelu(x).sum(), ORIGIN, math.sqrt(2 / math.pi) * I),
    "logsigmoid at 0": Point(lambda x: F.logsigmoid(x).sum(), ORIGIN, -I / 4),
    "huber_loss at 0": Point(lambda x: F.huber_loss(x, ORIGIN, reduction="sum"), ORIGIN, I),
    "distances of a set from itself": Point(
        lambda x: (torch.cdist(x[:, None], x[:, None]) ** 2).sum(), point(1, 2, 4), 4 * (3 * I - 1)
    ),
}

# It exists; some calls find it, others say NaN, none says another number --------------------------------------------------

RIGHT_OR_NAN: dict[str, Point] = {
    "square of a norm": Point(lambda x: x.norm() ** 2, ORIGIN, 2 * I, nan=True),
    "square of a vector norm": Point(lambda x: torch.linalg.vector_norm(x) ** 2, ORIGIN, 2 * I, nan=True),
    "square of linalg.norm": Point(lambda x: torch.linalg.norm(x) ** 2, ORIGIN, 2 * I, nan=True),
    "square of a Frobenius norm": Point(lambda x: torch.linalg.matrix_norm(x[None]) ** 2, ORIGIN, 2 * I, nan=True),
    "square of a spectral norm": Point(lambda x: torch.linalg.matrix_norm(x[None], 2) ** 2, ORIGIN, 2 * I, nan=True),
    "squares of norms of rows": Point(lambda x: (torch.stack([x, x + 1]).norm(dim=1) ** 2).sum(), ORIGIN, 4 * I, nan=True),
    "cube of a norm": Point(lambda x: x.norm() ** 3, ORIGIN, ZERO, nan=True),
    "square of a distance": Point(lambda x: torch.dist(x, ONES) ** 2, ONES, 2 * I, nan=True),
    "square of a pairwise distance": Point(
        lambda x: (F.pairwise_distance(x[None], ONES[None], eps=0.0) ** 2).sum(), ONES, 2 * I, nan=True
    ),
    "square of a deviation": Point(lambda x: x.std() ** 2, ONES, CENTERED, nan=True),
    "square of a deviation along a dimension": Point(
        lambda x: (torch.std_mean(torch.stack([x, 2 * x]), 1)[0] ** 2).sum(), ONES, 5 * CENTERED, nan=True
    ),
    "square of a hypotenuse": Point(lambda x: torch.hypot(x[0], x[1]) ** 2, ORIGIN, diagonal(2, 2, 0), nan=True),
    "square of a gradient's norm": Point(lambda x: fh.grad(lambda y: (y**4).sum())(x).norm() ** 2, ORIGIN, ZERO, nan=True),
    "normalize at 0": Point(lambda x: (F.normalize(x, dim=0) * point(1, 2, 3)).sum(), ORIGIN, ZERO, nan=True),
    "cosine_similarity at 0": Point(lambda x: F.cosine_similarity(x, point(1, 2, 3), 0), ORIGIN, ZERO, nan=True),
    "renorm below its bound": Point(lambda x: (torch.renorm(x[None], 2, 0, 1.0) ** 2).sum(), ORIGIN, 2 * I, nan=True),
    "squares of equal eigenvalues": Point(lambda x: (torch.linalg.eigvalsh(torch.diag(x)) ** 2).sum(), ONES, 2 * I, nan=True),
    "squares of eigenvalues, with vectors": Point(
        lambda x: (torch.linalg.eigh(torch.diag(x)).eigenvalues ** 2).sum(), ONES, 2 * I, nan=True
    ),
    "squares of equal singular values": Point(lambda x: (torch.linalg.svdvals(torch.diag(x)) ** 2).sum(), ONES, 2 * I, nan=True),
    "determinant of rank n - 2": Point(
        lambda x: torch.linalg.det(torch.diag(x)), point(0, 0, 3), rows((0, 3, 0), (3, 0, 0), (0, 0, 0)), nan=True
    ),
    "determinant of rank 0": Point(lambda x: torch.linalg.det(torch.diag(x)), ORIGIN, ZERO, nan=True),
    "a constant 0 to the power x": Point(lambda x: (ORIGIN**x).sum() + x.sum(), ONES, ZERO, nan=True),
    "xlogy where both are 0": Point(lambda x: torch.xlogy(ORIGIN, x).sum() + x.sum(), ORIGIN, ZERO, nan=True),
    "division masked once": Point(lambda x: torch.where(x == 0, 1.0, x.sin() / x).sum(), ORIGIN, -I / 3, nan=True),
    "logit below its bound": Point(lambda x: torch.logit(x, eps=1e-6).sum(), point(0, 1, 0.5), ZERO, nan=True),
}

# It does not exist: NaN, an infinity, or 0 where torch takes a slope of 0 -------------------------------------------------

NONE: dict[str, Point] = {
    "norm": Point(lambda x: x.norm(), ORIGIN, ZERO, nan=True),
    "deviation": Point(lambda x: x.std(), ONES, ZERO, nan=True),
    "nuclear norm": Point(lambda x: torch.linalg.matrix_norm(x[None], "nuc"), ORIGIN, ZERO, nan=True),
    "root": Point(lambda x: x.sqrt().sum(), ORIGIN, ZERO, nan=True),
    "root of a square": Point(lambda x: (x * x).sum().sqrt(), ORIGIN, ZERO, nan=True),
    "reciprocal root": Point(lambda x: x.rsqrt().sum(), ORIGIN, ZERO, nan=True),
    "reciprocal": Point(lambda x: (1 / x).sum(), ORIGIN, ZERO, nan=True),
    "x^0.5": Point(lambda x: (x**0.5).sum(), ORIGIN, ZERO, nan=True),
    "x^1.5": Point(lambda x: (x**1.5).sum(), ORIGIN, ZERO, nan=True),
    "x^x": Point(lambda x: (x**x).sum(), ORIGIN, ZERO, nan=True),
    "log": Point(lambda x: x.log().sum(), ORIGIN, ZERO, nan=True),
    "x log x": Point(lambda x: (x * x.log()).sum(), ORIGIN, ZERO, nan=True),
    "xlogy of x and x": Point(lambda x: torch.xlogy(x, x).sum(), ORIGIN, ZERO, nan=True),
    "entropy": Point(lambda x: torch.special.entr(x).sum(), ORIGIN, ZERO, nan=True),
    "atan2 at the origin": Point(lambda x: torch.atan2(x[0], x[1]) + x[2], ORIGIN, ZERO, nan=True),
    "acos at 1": Point(lambda x: torch.acos(x).sum(), ONES, ZERO, nan=True),
    "slogdet of a singular matrix": Point(
        lambda x: torch.linalg.slogdet(torch.diag(x)).logabsdet, point(0, 2, 3), ZERO, nan=True
    ),
    "condition number of I": Point(lambda x: torch.linalg.cond(torch.diag(x)), ONES, ZERO, nan=True),
    "logsumexp of -inf alone": Point(lambda x: torch.logsumexp(x - INF, 0) + x.sum(), ORIGIN, ZERO, nan=True),
}

# Kinks of an operation: the Hessian is that of the slope that torch takes -------------------------------------------------

KINKS: dict[str, Point] = {
    "abs": Point(lambda x: x.abs().sum(), ORIGIN, ZERO),
    "x |x|": Point(lambda x: (x * x.abs()).sum(), ORIGIN, ZERO),
    "l1_loss": Point(lambda x: F.l1_loss(x, ORIGIN), ORIGIN, ZERO),
    "square of relu": Point(lambda x: (F.relu(x) ** 2).sum(), ORIGIN, ZERO),
    "square of leaky_relu": Point(lambda x: (F.leaky_relu(x, 0.5) ** 2).sum(), ORIGIN, 0.5 * I),
    "square of relu6 at 6": Point(lambda x: (F.relu6(x) ** 2).sum(), 6 * ONES, ZERO),
    "square of hardtanh at 1": Point(lambda x: (F.hardtanh(x) ** 2).sum(), ONES, ZERO),
    "square of softshrink at its edge": Point(lambda x: (F.softshrink(x) ** 2).sum(), ONES / 2, ZERO),
    "square of threshold at its edge": Point(lambda x: (F.threshold(x, 0.0, 0.0) ** 2).sum(), ORIGIN, ZERO),
    "hardswish at 3": Point(lambda x: F.hardswish(x).sum(), 3 * ONES, ZERO),
    "square of clamp at both edges": Point(lambda x: (x.clamp(0, 1) ** 2).sum(), point(0, 1, 0.5), 2 * I),
    "square of the largest of two": Point(lambda x: x.max() ** 2, point(1, 1, 0), halves(0, 1)),
    "square of amax": Point(lambda x: x.amax() ** 2, ONES, halves(0, 1, 2)),
    "square of the smallest of two": Point(lambda x: x.min() ** 2, point(1, 1, 3), halves(0, 1)),
    "square of a median of two": Point(lambda x: x.median() ** 2, point(1, 1, 0), halves(0, 1)),
    "square of max along a dimension": Point(lambda x: x.max(0).values ** 2, point(1, 1, 0), halves(0)),
    "square of maximum": Point(lambda x: (torch.maximum(x, ORIGIN) ** 2).sum(), ORIGIN, I / 2),
    "square of the largest norm": Point(lambda x: x.norm(INF) ** 2, point(1, 1, 0), halves(0, 1)),
    "sorted equals": Point(lambda x: (x.sort().values ** 2 * point(1, 2, 3)).sum(), ONES, diagonal(2, 4, 6)),
    "huber_loss at its edge": Point(lambda x: F.huber_loss(x, ORIGIN, reduction="sum"), point(1, 0, -1), I),
    "smooth_l1_loss at its edge": Point(
        lambda x: F.smooth_l1_loss(x, ORIGIN, reduction="sum"), point(1, 0, -1), diagonal(0, 1, 0)
    ),
    "square of a remainder": Point(lambda x: (torch.remainder(x, 1.0) ** 2).sum(), point(1, 2, 0.5), 2 * I),
}

# ... and then a function that is smooth only as a whole has another; `checked` says so ------------------------------------

UNSEEN: dict[str, Point] = {
    "square of abs": Point(lambda x: (x.abs() ** 2).sum(), ORIGIN, ZERO),
    "both squares of relu": Point(lambda x: (F.relu(x) ** 2 + F.relu(-x) ** 2).sum(), ORIGIN, ZERO),
    "square of cdist": Point(lambda x: (torch.cdist(x[None], ONES[None]) ** 2).sum(), ONES, ZERO),
    "square of pdist": Point(lambda x: (F.pdist(torch.stack([x, ONES])) ** 2).sum(), ONES, ZERO),
    "square of copysign": Point(lambda x: (torch.copysign(x, ONES) ** 2).sum(), ORIGIN, ZERO, nan=True),
}

POINTS = {**RIGHT, **RIGHT_OR_NAN, **NONE, **KINKS, **UNSEEN}


def by_products(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([fh.hvp(f, x, e) for e in I])


CALLS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "hvp": by_products,
    "hessian_rows": lambda f, x: torch.cat([part for _, part in fh.hessian_rows(f)(x)]),
    "hessian": lambda f, x: fh.hessian(f)(x),
    "hessian_diagonal": lambda f, x: fh.hessian_diagonal(f)(x),
    "forward over reverse": lambda f, x: fh.hessian(f, mode="forward-over-reverse")(x),
    "double backward": lambda f, x: fh.hessian(f, mode="double-backward")(x),
}


def allowed(found: Tensor, of: Point) -> bool:
    """Every number is that of the table, or none at all where that is allowed."""
    expected = of.H.diagonal() if found.dim() == 1 else of.H
    return bool(((found - expected).abs() < 1e-8).logical_or(~found.isfinite() & of.nan).all())


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("call", CALLS)
def test_a_singular_point_is_right_or_not_a_number_or_as_documented(name: str, call: str) -> None:
    of = POINTS[name]
    assert allowed(CALLS[call](of.f, of.x), of)


# The page in the docstring of hvp: what it says, and the points that show it ---------------------------------------------

PAGE: dict[str, dict[str, tuple[str, ...]]] = {
    "the right number": {
        "``prod``": ("product with one zero", "product with two zeros", "product with three zeros"),
        "powers": ("x^2 at 0", "x^2.5 at 0", "x to a tensor at 0", "float_power at 0"),
        "``sinc``": ("sinc at 0", "sinc beside 0"),
        "``xlogy``": ("xlogy where x is 0",),
        "determinants of rank n - 1": ("determinant of rank n - 1",),
        "``var`` of equal numbers": ("variance of equal numbers",),
        "``logsumexp``": ("logsumexp with -inf", "logcumsumexp after -inf"),
        "``softmax``": ("masked softmax", "masked log_softmax"),
        "divisor is masked too": ("division masked twice",),
    },
    "NaN or an infinity": {
        "the norm of 0": ("norm", "square of a norm"),
        "``std`` of equal numbers": ("deviation", "square of a deviation"),
        "``sqrt``": ("root", "root of a square"),
        "``log`` of 0": ("log", "x log x"),
        "``atan2`` at the origin": ("atan2 at the origin",),
        "equal eigenvalues": ("squares of equal eigenvalues",),
        "singular values": ("squares of equal singular values",),
        "determinants of lower": ("determinant of rank n - 2", "determinant of rank 0"),
        "masked afterwards": ("division masked once",),
    },
    "the Hessian of one piece": {
        "``relu``": ("square of relu",),
        "``clamp``": ("square of clamp at both edges",),
        "sorting": ("sorted equals",),
        "``max``": ("square of the largest of two",),
        "``min``": ("square of the smallest of two",),
        "``median``": ("square of a median of two",),
        "``abs``": ("abs", "square of abs"),
        "``cdist``": ("square of cdist",),
        "``pdist``": ("square of pdist",),
        "``x.abs() ** 2`` gives 0": ("square of abs",),
    },
}
TOLD = {"the right number": (RIGHT,), "NaN or an infinity": (RIGHT_OR_NAN, NONE), "the Hessian of one piece": (KINKS, UNSEEN)}


@pytest.mark.parametrize("section", PAGE)
def test_the_page_in_the_docstring_of_hvp_is_that_of_the_table(section: str) -> None:
    page = " ".join((fh.hvp.__doc__ or "").split())
    start = page.index(f"* *{section}*")
    part = page[start : page.find(" * *", start + 1) if " * *" in page[start + 1 :] else None]
    for phrase, names in PAGE[section].items():
        assert phrase in part
        assert all(any(name in group for group in TOLD[section]) for name in names), names


def test_the_table_is_large_and_distinct() -> None:
    assert len(POINTS) >= 60 and len(POINTS) == sum(map(len, (RIGHT, RIGHT_OR_NAN, NONE, KINKS, UNSEEN)))


@pytest.mark.parametrize("name", UNSEEN)
def test_a_smooth_function_of_kinks_is_caught_where_it_is_checked(name: str) -> None:
    of = UNSEEN[name]
    with pytest.raises(LawError, match=r"got (0|nan), expected"), fh.checked():
        fh.hvp(of.f, of.x, I[0])


@pytest.mark.parametrize(
    "of",
    [
        RIGHT_OR_NAN["square of a norm"],
        RIGHT_OR_NAN["square of a deviation"],
        RIGHT["sinc at 0"],
        RIGHT["logcumsumexp after -inf"],
    ],
)
def test_torch_alone_is_wrong_without_a_word(of: Point) -> None:
    """A canary: where torch mends one of these, its repair may go."""
    alone = torch.stack([torch.func.jvp(torch.func.grad(of.f), (of.x,), (e,))[1] for e in I])
    assert bool(alone.isfinite().all()) and (alone - of.H).abs().max() > 0.1


def test_what_needs_the_slope_of_a_norm_at_0_is_nan_and_gradients_are_torchs() -> None:
    for name in ("square of a norm", "square of a deviation", "square of linalg.norm", "squares of norms of rows"):
        of = RIGHT_OR_NAN[name]
        assert bool(fh.hvp(of.f, of.x, I[0]).isnan().all()), name
        gradient, _ = fh.grad_and_hvp(of.f, of.x, I[0])
        assert bool(gradient.isfinite().all()), name
    gradient, _ = fh.grad_and_hvp(lambda x: x.norm() + x.std(), ORIGIN, I[0])
    assert torch.equal(gradient, ORIGIN)


def test_a_floor_under_the_norm_needs_no_slope() -> None:
    """F.normalize and clamped norms of rows of zeros leave the other rows their products."""

    def f(x: Tensor) -> Tensor:
        y = torch.stack([x, x + 1])
        return (y / y.norm(dim=1, keepdim=True).clamp(min=1e-12))[1, 0]

    e = math.sqrt(3)  # of y_0 / |y| at (1, 1, 1): H = (3 y y^T y_0 / |y|^5 - (e_0 y^T + y e_0^T + y_0 I) / |y|^3)
    first = I[0]
    outer = torch.outer(first, ONES)
    H = 3 * torch.ones(3, 3, dtype=torch.float64) / e**5 - (outer + outer.T + I) / e**3
    assert (by_products(f, ORIGIN) - H).abs().max() < 1e-12


def test_points_mapped_together_are_as_they_are_alone() -> None:
    f, xs = RIGHT_OR_NAN["square of a norm"].f, torch.stack([ORIGIN, ONES])
    found = fh.vmap(lambda x: fh.hvp(f, x, I[0]))(xs)
    assert bool(found[0].isnan().all()) and torch.allclose(found[1], 2 * I[0])


def test_the_third_derivative_of_sinc_and_norms_is_that_of_differences() -> None:
    x, v = point(0.3, -0.2, 0.9), point(1, 2, -1)

    def f(x: Tensor) -> Tensor:
        return torch.sinc(x).prod() * x.std() + torch.dist(x, ONES) * x.norm() + torch.logcumsumexp(x, 0).prod()

    def along(t: float) -> Tensor:
        return fh.hvp(f, x + t * v, v)

    h = 1e-3
    D = [(along(k * h) - along(-k * h)) / (2 * k * h) for k in (1, 2)]
    third = fh.jvp(lambda x: fh.hvp(f, x, v), (x,), (v,))[1]
    assert (third - (4 * D[0] - D[1]) / 3).abs().max() < 1e-8 * third.abs().max()
