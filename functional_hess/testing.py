r"""Laws that derivatives must keep, as functions a user can call on functions of their own.

Truth here is a central difference along a random direction, in float64 wherever the function takes it, with the doubt that
:mod:`functional_hess.differences` has of it. A derivative is wrong where the doubt can't explain the disagreement, and
inconclusive where it can, as near a kink.

A wrong derivative raises :class:`LawError`; everything else returns a :class:`Verdict`. One random direction finds a wrong
linear map with probability one; a leaf whose part in the direction's derivative is below the tolerance goes unseen, so check
such a leaf alone. The checks are measurements at one point: they prove nothing elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.differences import (
    BY_DIFFERENCES,
    INCONCLUSIVE,
    RIGHT,
    Comparison,
    Flat,
    Ladder,
    LawError,
    Slope,
    along,
    comparison,
    direction,
    drawn_by,
    finite,
    in_double,
    largest,
    measured_along,
    settled,
    tolerances_for,
)
from functional_hess.guards import MissingDerivativeError, missing_rule, no_mode_left
from functional_hess.impurity import value_watched
from functional_hess.products import hvp
from functional_hess.transforms import Bound, bind, grad, jvp, vjp
from functional_hess.tree import Space, dot, norm

__all__ = [
    "LawError",
    "Verdict",
    "check_adjoint",
    "check_derivatives",
    "check_hessian",
    "check_symmetric",
]

Tree = Any
Tensors = tuple[Tensor, ...]
_BY_IDENTITY = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check found where nothing was wrong.

    Attributes:
        status: ``"right"``, or ``"inconclusive"`` where differences can't tell, as near a kink.
        errors: for each law the largest disagreement, relative to the size of what was compared.
        without_rule: laws left unchecked because an op of f has no rule in that mode.
    """

    status: str
    errors: dict[str, float]
    without_rule: tuple[str, ...] = ()


class _Findings:
    """Collects what the laws of one check say; raises at the first that is broken."""

    def __init__(self, verb: str, cause: str = "An op of f, or a backward written for it, has a wrong derivative.") -> None:
        self.verb, self.cause = verb, cause
        self.errors: dict[str, float] = {}
        self.doubtful = False
        self.without_rule: list[str] = []

    def verdict(self) -> Verdict:
        return Verdict(INCONCLUSIVE if self.doubtful else RIGHT, self.errors, tuple(self.without_rule))

    def note(self, law: str, comparison: Comparison) -> None:
        self.errors[law] = max(self.errors.get(law, 0.0), comparison.relative)
        self.doubtful = self.doubtful or comparison.outcome == INCONCLUSIVE

    def broken(self, law: str, place: str, comparison: Comparison) -> LawError:
        c = comparison
        return LawError(
            f"{self.verb}: {law} along a random direction: at {place} got {c.got:.9g}, expected {c.expected:.9g}; the largest "
            f"disagreement there is {c.error:.3g}, more than the tolerance {c.tolerance:.3g}. {self.cause}"
        )


# ---------------------------------------------------------------------------------------------------- derivatives


def check_derivatives(
    f: Callable[..., Any],
    *args: Any,
    order: int = 2,
    argnums: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    rtol: float | None = None,
    atol: float = 1e-12,
) -> Verdict:
    """The derivatives of f, forward and reverse, against central differences along a random direction, up to an order.

    With f_1 = f and f_{k+1}(x) = J_k(x)^T u_k, the pullback of a random cotangent, the laws at order k are

        J_k v = D,        <J_k^T u, v> = <u, D>,        D = d/dt f_k(x + t v) at t = 0,

    so that order 2 compares forward-over-reverse and reverse-over-reverse with differences of the gradient. For a scalar f
    ``grad`` is held to the same law.

    Args:
        f: any function of trees that returns a tree.
        args: its arguments; every floating leaf moves, unless ``argnums`` chooses among the arguments.
        order: how often to differentiate.
        generator: draws the directions; a fresh one of fixed seed by default, never the global one.
        rtol: relative to the size of what is compared. By default 1e-6 in float64, 1e-3 in float32, 2e-2 in float16, 1e-1 in
            bfloat16, the worst of the dtypes of the arguments.
        atol: absolute.

    Returns:
        a :class:`Verdict`; inconclusive where f or a derivative has a kink within a step of the point. Costs six evaluations of
        f, and at order k about 5 * 3^(k-1) more, three times that where the first step leaves
        it open; when a law is broken, that for every leaf.

    Raises:
        LawError: a derivative is wrong.
        ImpurityError: f does more than compute its value: see :mod:`functional_hess.impurity`.
        MissingDerivativeError: neither forward nor reverse mode has a rule.
        DependenceError: f does not depend on its arguments by differentiable operations.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.5, -1.0], dtype=torch.float64)
        >>> check_derivatives(lambda x: {"sin": x.sin(), "norm": x.norm()}, x, order=3).status
        'right'
        >>> check_derivatives(torch.relu, torch.zeros(2), order=1).status
        'inconclusive'
    """
    if order < 1:
        raise ValueError(f"check_derivatives: order must be at least 1, got {order}.")
    bound = bind("check_derivatives", f, args, {}, tuple(range(len(args))) if argnums is None else argnums)
    chosen = "x" if isinstance(argnums, int) else "args"
    findings, draw = _Findings("check_derivatives"), drawn_by(generator)
    x = tuple(t.detach() for t in bound.x)
    value_watched(bound.verb, bound.call, x, lambda leaf: bound.space.name_of(leaf, chosen))
    first = _floating_outputs(bound, x)
    wide = in_double(first, x)
    tolerances = tolerances_for(BY_DIFFERENCES, bound.space.dtypes, rtol, atol)

    current, name_out = first, lambda o: _output_name(bound, x, o)
    for k in range(1, order + 1):
        v = direction(bound.space, x, draw)
        outputs = current(*x)
        u = tuple(torch.randn(t.shape, generator=draw, device=draw.device, dtype=t.dtype).to(t.device) for t in outputs)
        point = _Point(findings, current, bound.space, x, wide, chosen, name_out, tolerances)
        _check_order(point, k, u, v)
        current, name_out = _pulled_back(current, u), lambda o: bound.space.name_of(o, chosen)
    return findings.verdict()


@dataclasses.dataclass(frozen=True)
class _Point:
    """Everything that the laws of one order share."""

    findings: _Findings
    f: Flat
    space: Space
    x: Tensors
    wide: Tensors
    name: str
    name_out: Callable[[int], str]
    tolerances: tuple[float, float]


def _floating_outputs(bound: Bound, x: Tensors) -> Flat:
    def first(*tensors: Tensor) -> Tensors:
        out = bound.call(*tensors)
        space = Space.of(out, "f(x)")
        if not space.shapes:
            raise TypeError(
                f"{bound.verb}: f must return at least one floating tensor, got {type(out).__name__}. Return the tensor itself, "
                "not .item() or float(...) of it."
            )
        return space.pack(out, "f(x)")

    return first


def _output_name(bound: Bound, x: Tensors, o: int) -> str:
    return Space.of(bound.call(*x), "f(x)").name_of(o, "f(x)")


def _pulled_back(f: Flat, u: Tensors) -> Flat:
    """x -> J(x)^T u."""

    def next_order(*x: Tensor) -> Tensors:
        outputs, pullback = vjp(f, *x)
        return pullback(tuple(c.to(out.dtype) for c, out in zip(u, outputs, strict=True)))

    return next_order


def _check_order(point: _Point, k: int, u: Tensors, v: Tensors) -> None:
    ladder = measured_along(point.f, point.wide, v)
    missing: list[tuple[str, BaseException]] = []
    for mode, law in (("jvp", _jvp_law), ("vjp", _vjp_law)):
        try:
            law(point, k, u, v, ladder)
        except RuntimeError as error:
            if not missing_rule(error):
                raise
            missing.append((mode, error))
            point.findings.without_rule.append(_title(mode, k))
    if len(missing) == 2:
        raise no_mode_left("check_derivatives", missing) from missing[-1][1]


def _title(mode: str, k: int) -> str:
    return f"{mode} of f" if k == 1 else f"{mode} of the derivative of order {k - 1}"


def _jvp_law(point: _Point, k: int, u: Tensors, v: Tensors, ladder: Ladder) -> None:
    _, tangents = jvp(point.f, point.x, v)
    _compare_leaves(point.findings, f"the {_title('jvp', k)}", tangents, ladder, point.tolerances, point.name_out)


def _vjp_law(point: _Point, k: int, u: Tensors, v: Tensors, ladder: Ladder) -> None:
    outputs, pullback = vjp(point.f, *point.x)
    gradients = {f"the {_title('vjp', k)}": (u, _detached(pullback(u)))}
    if k == 1 and len(outputs) == 1 and outputs[0].dim() == 0:
        one = (torch.ones_like(outputs[0]),)
        gradients["the grad of f"] = (one, _detached(grad(lambda p: point.f(*p)[0])(point.x)))
    for law, (cotangent, gradient) in gradients.items():
        terms = [(g.double() * d.double()) for g, d in zip(gradient, v, strict=True)]
        compared = _compare_sums(terms, ladder, cotangent, point.tolerances)
        point.findings.note(law, compared)
        if compared.wrong:
            place, worst = _worst_leaf(point, cotangent, v, terms, compared)
            raise point.findings.broken(_against_differences(law), place, worst)


def _detached(tensors: Tensors) -> Tensors:
    """Without the graphs that come from what f closes over."""
    return tuple(t.detach() for t in tensors)


def _against_differences(law: str) -> str:
    return f"{law} disagrees with central differences"


def _compare_sums(terms: Sequence[Tensor], ladder: Ladder, u: Tensors, tolerances: tuple[float, float]) -> Comparison:
    total = torch.stack([t.sum() for t in terms]).sum()
    size = float(torch.stack([t.square().sum() for t in terms]).sum().sqrt())

    def compare(slopes: Sequence[Slope]) -> Comparison:
        slope = along(slopes, u)
        return comparison(total, slope, *tolerances, max(size, largest([finite(slope.value)])))

    return settled(ladder, compare)


def _worst_leaf(point: _Point, u: Tensors, v: Tensors, terms: Sequence[Tensor], whole: Comparison) -> tuple[str, Comparison]:
    """The law along one leaf after the other: where the disagreement is largest."""
    place, worst = point.name, whole
    for leaf, term in enumerate(terms):
        alone = tuple(d if i == leaf else torch.zeros_like(d) for i, d in enumerate(v))
        compared = _compare_sums([term], measured_along(point.f, point.wide, alone), u, point.tolerances)
        if compared.wrong and (worst is whole or not compared.error <= worst.error):
            place, worst = point.space.name_of(leaf, point.name), compared
    return place, worst


def _compare_leaves(
    findings: _Findings,
    law: str,
    got: Sequence[Tensor],
    ladder: Ladder,
    tolerances: tuple[float, float],
    name: Callable[[int], str],
) -> None:
    """Leaf by leaf, each held to its own size and to a hundredth of the largest."""

    def compare(leaf: int, slopes: Sequence[Slope]) -> Comparison:
        size = max(largest([finite(slopes[leaf].value)]), largest([finite(s.value) for s in slopes]) / 100)
        return comparison(got[leaf], slopes[leaf], *tolerances, size)

    for leaf in range(len(got)):
        compared = settled(ladder, functools.partial(compare, leaf))
        findings.note(law, compared)
        if compared.wrong:
            raise findings.broken(_against_differences(law), name(leaf), compared)


# ---------------------------------------------------------------------------------------------------- the Hessian


def check_hessian(
    f: Callable[..., Any],
    x: Any,
    *args: Any,
    generator: torch.Generator | None = None,
    rtol: float | None = None,
    atol: float = 1e-12,
) -> Verdict:
    """The Hessian-vector product of a scalar f at x: against differences of the gradient, against itself, in two modes.

    With g the gradient of f(., \\*args) and u, v two independent random directions, the laws are

        H v = d/dt g(x + t v) at t = 0,        <u, H v> = <v, H u>,        forward-over-reverse = reverse-over-reverse.

    The last is checked where both modes have a rule for every op. Symmetry is that of two products, computed apart.

    Args:
        f: a scalar function of ``(x, *args)``.
        x: the point, any tree.
        args: further arguments of f, fixed.
        generator, rtol, atol: as in :func:`check_derivatives`; without ``rtol`` the last two laws, which hold up to rounding, are
            held to 1e-9 in float64 and 1e-4 in float32.

    Returns:
        a :class:`Verdict`; inconclusive where the gradient has a kink within a step of x. Costs 5 gradients (15 near
        a kink) and 4 products.

    Raises:
        LawError: a law is broken.
        ImpurityError: f does more than compute its value: see :mod:`functional_hess.impurity`.
        MissingDerivativeError: an op of f has a second derivative in no mode.
        DependenceError: f(x) does not depend on x by differentiable operations.

    Example:
        >>> import torch
        >>> x = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor(3.0, dtype=torch.float64)}
        >>> check_hessian(lambda x: (x["a"] ** 3).sum() * x["b"], x).status
        'right'
    """
    verb = "check_hessian"
    bound = bind(verb, f, (x, *args), {}, 0)
    findings, draw, scalar = _Findings(verb), drawn_by(generator), bound.scalar()
    p = tuple(t.detach() for t in bound.x)
    value_watched(verb, bound.call, p, bound.space.name_of)
    v, u = direction(bound.space, p, draw), direction(bound.space, p, draw)

    def value(point: Tensors) -> Tensor:
        return scalar(*point)[0]

    def gradient(*point: Tensor) -> Tensors:
        return _detached(grad(value)(point))

    def product(w: Tensors) -> Tensors:
        return _detached(hvp(value, p, w))

    name = bound.space.name_of
    Hv, Hu = product(v), product(u)
    ladder = measured_along(gradient, in_double(gradient, p), v)
    by_differences = tolerances_for(BY_DIFFERENCES, bound.space.dtypes, rtol, atol)
    _compare_leaves(findings, "H v", Hv, ladder, by_differences, name)
    by_identity = tolerances_for(_BY_IDENTITY, bound.space.dtypes, rtol, atol)
    _check_pairing(findings, "<u, H v> = <v, H u>", product, (u, v), (Hv, Hu), by_identity, Space.of(p), name)
    _check_modes(findings, value, p, v, by_identity, name)
    return findings.verdict()


def _check_modes(
    findings: _Findings,
    value: Callable[..., Tensor],
    p: Tensors,
    v: Tensors,
    tolerances: tuple[float, float],
    name: Callable[[int], str],
) -> None:
    products = []
    for mode in ("forward-over-reverse", "reverse-over-reverse"):
        try:
            products.append(_detached(hvp(value, p, v, mode=mode)))
        except MissingDerivativeError:
            findings.without_rule.append(mode)
    if len(products) < 2:
        return
    law, size = "forward-over-reverse = reverse-over-reverse", max(map(largest, products))
    for leaf, (forward, reverse) in enumerate(zip(*products, strict=True)):
        compared = comparison(forward, Slope.exactly(reverse), *tolerances, size)
        if not bool(reverse.isfinite().all()):  # a singular point: only forward mode may have a number there
            compared = dataclasses.replace(compared, outcome=INCONCLUSIVE, error=float("inf"))
        findings.note(law, compared)
        if compared.wrong:
            raise findings.broken(f"{law} fails", name(leaf), compared)


# ---------------------------------------------------------------------------------------------------- linear maps


def check_symmetric(
    product: Callable[[Tree], Tree],
    like: Tree,
    *,
    generator: torch.Generator | None = None,
    rtol: float | None = None,
    atol: float = 1e-12,
) -> Verdict:
    """A linear map of trees into the same space is symmetric: <u, A v> = <v, A u> for random u and v.

    Args:
        product: v -> A v, a callable on trees.
        like: any point of the space; only its structure, shapes and dtypes matter.
        generator: draws u and v; a fresh one of fixed seed by default, never the global one.
        rtol: relative to |u| |A v| + |v| |A u|, by default 1e-9 in float64, 1e-4 in float32, 2e-2 in float16, 1e-1 in bfloat16.
        atol: absolute.

    Returns:
        a :class:`Verdict`. Costs two products; when the law is broken, one more for every leaf.

    Raises:
        LawError: the map is not symmetric; the leaf where it is least so is named.
        ValueError: ``product`` returns a tree of another space.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> check_symmetric(lambda v: A @ v, torch.zeros(2)).status
        'right'
        >>> check_symmetric(lambda v: torch.tril(A) @ v, torch.zeros(2))
        Traceback (most recent call last):
            ...
        functional_hess.differences.LawError: check_symmetric: <u, A v> = <v, A u> fails ...
    """
    space, findings, draw = Space.of(like, "like"), _Findings("check_symmetric"), drawn_by(generator)
    u, v = space.random(draw), space.random(draw)
    tolerances = tolerances_for(_BY_IDENTITY, space.dtypes, rtol, atol)
    products = (product(u), product(v))
    for name, result in zip(("product(u)", "product(v)"), products, strict=True):
        space.pack(result, name)
    law = "<u, A v> = <v, A u>"
    _check_pairing(findings, law, product, (u, v), (products[1], products[0]), tolerances, space, lambda k: space.name_of(k, "v"))
    return findings.verdict()


def check_adjoint(
    forward: Callable[[Tree], Tree],
    transpose: Callable[[Tree], Tree],
    x: Tree,
    y: Tree,
    *,
    generator: torch.Generator | None = None,
    rtol: float | None = None,
    atol: float = 1e-12,
) -> Verdict:
    """Two linear maps between trees are each other's transpose: <u, A v> = <A^T u, v> for random v like x and u like y.

    Args:
        forward: v -> A v, from trees like x to trees like y.
        transpose: u -> A^T u, back.
        x, y: any points of the two spaces.
        generator, rtol, atol: as in :func:`check_symmetric`.

    Returns:
        a :class:`Verdict`. Costs one application of each; when the law is broken, one more of A for every leaf of x.

    Raises:
        LawError: the maps are not adjoint; the leaf of x where they disagree most is named.
        ValueError: a map returns a tree of another space.

    Example:
        >>> import torch
        >>> A = torch.arange(6.0).reshape(2, 3)
        >>> check_adjoint(lambda v: A @ v, lambda u: A.T @ u, torch.zeros(3), torch.zeros(2)).status
        'right'
    """
    spaces, draw = (Space.of(x, "x"), Space.of(y, "y")), drawn_by(generator)
    findings = _Findings("check_adjoint", "One of the two maps is not the transpose of the other, or not linear.")
    v, u = (space.random(draw) for space in spaces)
    tolerances = tolerances_for(_BY_IDENTITY, spaces[0].dtypes + spaces[1].dtypes, rtol, atol)
    images = (forward(v), transpose(u))
    spaces[1].pack(images[0], "forward(v)")
    spaces[0].pack(images[1], "transpose(u)")
    law = "<u, A v> = <A^T u, v>"
    _check_pairing(findings, law, forward, (u, v), images, tolerances, spaces[0], lambda k: spaces[0].name_of(k, "v"))
    return findings.verdict()


def _check_pairing(
    findings: _Findings,
    law: str,
    forward: Callable[[Tree], Tree],
    vectors: tuple[Tree, Tree],
    images: tuple[Tree, Tree],
    tolerances: tuple[float, float],
    space: Space,
    name: Callable[[int], str],
) -> None:
    """<u, A v> = <w, v> for the images (A v, w) of the vectors (u, v), v in ``space``."""
    (u, v), (Av, w) = vectors, images
    size = float(norm(u)) * float(norm(Av)) + float(norm(w)) * float(norm(v))
    compared = _equal(dot(u, Av), dot(w, v), tolerances, size)
    findings.note(law, compared)
    if not compared.wrong:
        return
    place, worst = "a random vector", compared
    parts = space.pack(v, "v")
    for leaf in space.leaves:
        alone = space.unpack([t if k == leaf else torch.zeros_like(t) for k, t in enumerate(parts)])
        one = _equal(dot(u, forward(alone)), dot(w, alone), tolerances, size)
        if one.wrong and (worst is compared or not one.error <= worst.error):
            place, worst = name(leaf), one
    raise findings.broken(f"{law} fails", place, worst)


def _equal(got: Tensor, expected: Tensor, tolerances: tuple[float, float], size: float) -> Comparison:
    """Two numbers that should agree up to rounding."""
    return comparison(got, Slope.exactly(expected), *tolerances, size)
