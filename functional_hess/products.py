"""Hessian-vector products, in whichever mode of differentiation has the rules.

With g = grad f, the product H v at x is computed as

    forward-over-reverse    H v = d/dt g(x + t v) at t = 0                 jvp(grad(f))
    reverse-over-reverse    H v = d/dx <g(x), v>                           vjp(grad(f)), the graph of g kept for many v
    double-backward         the same by plain autograd, for what no torch.func level can enter
    finite-difference       H v by extrapolated differences of g (functional_hess.extrapolation), on request only

``mode="auto"`` takes the first of a chain that has a rule for every op. For one product the chain begins forward-over-reverse,
which keeps no graph. For many products at one point (rows of the Hessian) it begins reverse-over-reverse: the gradient's graph
is built once and every row is one backward pass through it, which was 1.5 to 5 times faster than forward-over-reverse on
every function measured, needs no process-wide lock, and has rules for more ops. Modes known to be wrong for norms and linear
algebra (forward-over-forward, reverse-over-forward) do not exist here; and inside another derivative, which would make one of
them of forward-over-reverse, one product begins reverse-over-reverse too.

For many vectors at one point, keep a pullback of the gradient: ``_, product = vjp(grad(f), x)``.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.extrapolation import ByDifferences, warn_of_doubt
from functional_hess.guards import (
    RandomnessError,
    Replay,
    missing_rule,
    no_mode_left,
    randomness_message,
    value_and_gradient,
    warn_of_low_precision,
)
from functional_hess.levels import flat_double_backward, flat_jvp, flat_value_and_grad, flat_vjp, flat_vmap, plain
from functional_hess.nesting import derivative_levels, eagerly, is_outermost
from functional_hess.transforms import Bound, bind
from functional_hess.tree import Space, tensors_of
from functional_hess.verification import begin

__all__ = ["MODES", "Product", "first_mode_that_works", "grad_and_hvp", "hvp", "no_such_mode", "product_at", "rows_of"]

Tensors = tuple[Tensor, ...]
Scalar = Callable[..., tuple[Tensor, Any]]
Product = Callable[[dict[int, Tensor]], Tensors]

FORWARD_OVER_REVERSE = "forward-over-reverse"
REVERSE_OVER_REVERSE = "reverse-over-reverse"
DOUBLE_BACKWARD = "double-backward"
FINITE_DIFFERENCE = "finite-difference"
MODES = (FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE, DOUBLE_BACKWARD, FINITE_DIFFERENCE)
ONE_PRODUCT = (FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE, DOUBLE_BACKWARD)
MANY_PRODUCTS = (REVERSE_OVER_REVERSE, FORWARD_OVER_REVERSE, DOUBLE_BACKWARD)

_log = logging.getLogger("functional_hess")
_remembered: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()


def product_at(f: Scalar, x: Tensors, mode: str, rows: Sequence[int], columns: Sequence[int], *, verb: str = "hvp") -> Product:
    """The linear map v -> H v at x, from tangents at the leaves ``rows`` to the leaves ``columns``.

    ``f(*x)`` returns ``(value, aux)``. The map takes ``{leaf: tangent}``; leaves left out have a zero tangent, which costs
    nothing forward-over-reverse. Work that all products share is done here, once.
    """
    if mode == FORWARD_OVER_REVERSE:
        return _forward_over_reverse(f, x, columns, verb)
    if mode == REVERSE_OVER_REVERSE:
        return _reverse_over_reverse(f, x, rows, columns, verb)
    if mode == DOUBLE_BACKWARD:
        _require_outermost(mode, verb)
        linear = flat_double_backward(f, x, rows, columns, verb=verb)
        return lambda v: linear(_filled(x, rows, v))
    if mode == FINITE_DIFFERENCE:
        return ByDifferences(f, x, columns, verb)
    raise no_such_mode(verb, mode)


def no_such_mode(verb: str, mode: Any) -> ValueError:
    """The error about a mode that does not exist."""
    names = ", ".join(map(repr, MODES))
    return ValueError(f"{verb}: mode must be 'auto', 'fastest' (for rows) or one of {names}, got {mode!r}.")


def _require_outermost(mode: str, verb: str) -> None:
    if not is_outermost():
        raise NotImplementedError(
            f"{verb}: mode={mode!r} is plain autograd and cannot run inside another transform; call it outside."
        )


def _filled(x: Tensors, rows: Sequence[int], v: dict[int, Tensor]) -> Tensors:
    return tuple(v[i] if i in v else torch.zeros_like(x[i]) for i in rows)


def _forward_over_reverse(f: Scalar, x: Tensors, columns: Sequence[int], verb: str) -> Product:
    def product(v: dict[int, Tensor]) -> Tensors:
        touched = tuple(v)

        def gradient(*moved: Tensor) -> tuple[Tensors, Tensors]:
            point = list(x)
            for leaf, tensor in zip(touched, moved, strict=True):
                point[leaf] = tensor
            return flat_value_and_grad(f, tuple(point), columns, verb=verb)[1], ()

        return flat_jvp(gradient, tuple(x[leaf] for leaf in touched), tuple(v.values()))[1]

    return product


def _reverse_over_reverse(f: Scalar, x: Tensors, rows: Sequence[int], columns: Sequence[int], verb: str) -> Product:
    def gradient(*moved: Tensor) -> tuple[Tensors, Tensors]:
        point = list(x)
        for leaf, tensor in zip(columns, moved, strict=True):
            point[leaf] = tensor
        return flat_value_and_grad(f, tuple(point), rows, verb=verb, twice=True)[1], ()

    _, pullback, _ = flat_vjp(gradient, tuple(x[leaf] for leaf in columns))
    return lambda v: pullback(_filled(x, rows, v))


def rows_of(product: Product, mode: str, v: dict[int, Tensor], randomness: str = "error") -> Tensors:
    """H v for vectors stacked along the first dimension: one ``vmap``, or a loop in the modes that no ``vmap`` can enter."""
    touched = tuple(v)
    if mode in (FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE):
        return flat_vmap(lambda *u: product(dict(zip(touched, u, strict=True))), randomness=randomness)(*v.values())
    each = [product(dict(zip(touched, u, strict=True))) for u in zip(*v.values(), strict=True)]
    return tuple(torch.stack(column) for column in zip(*each, strict=True))


def first_mode_that_works(
    verb: str, f: Callable[..., Any], x: Tensors, mode: str, chain: Sequence[str], attempt: Callable[[str], Any]
) -> Any:
    """``attempt(mode)`` for the given mode, or with ``"auto"`` for the first of the chain that has every rule.

    Only an error that says a rule is missing leads on to the next mode; every other exception passes untouched. The mode
    that worked is remembered for ``f`` and logged at debug level.
    """
    modes = _order(f, x, chain) if mode == "auto" else (mode,)
    tried: list[tuple[str, BaseException]] = []
    for candidate in modes:
        if candidate == DOUBLE_BACKWARD and mode == "auto" and not is_outermost():
            continue
        try:
            result = attempt(candidate)
        except RuntimeError as error:
            if "vmap: called random operation" in str(error):
                raise RandomnessError(randomness_message(verb)) from error
            if not missing_rule(error):
                raise
            tried.append((candidate, error))
            _log.debug("%s: %s lacks a rule: %s", verb, candidate, error)
            continue
        if tried:
            _remember(f, x, candidate)
        _log.debug("%s: mode %s", verb, candidate)
        return result
    raise no_mode_left(verb, tried) from tried[-1][1]


def _order(f: Callable[..., Any], x: Tensors, chain: Sequence[str]) -> tuple[str, ...]:
    known = None
    with contextlib.suppress(TypeError):  # a callable without weak references or hash
        known = _remembered.get(f, {}).get(_key(x))
    first = tuple(mode for mode in chain if mode == known)
    return (*first, *(mode for mode in chain if mode != known))


def _remember(f: Callable[..., Any], x: Tensors, mode: str) -> None:
    with contextlib.suppress(TypeError):
        _remembered.setdefault(f, {})[_key(x)] = mode


def _key(x: Tensors) -> tuple[Any, ...]:
    return (is_outermost(), *((t.dtype, t.device) for t in x))


def hvp(
    f: Callable[..., Any],
    x: Any,
    v: Any,
    *args: Any,
    mode: str = "auto",
    has_aux: bool = False,
    strict: bool = False,
    randomness: str = "error",
) -> Any:
    """The product of the Hessian of f at x with v: H v, a tree like x.

    Args:
        f: a scalar function of ``(x, *args)``.
        x: the point, any tree; only this argument is differentiated.
        v: a tree like x; ``None`` at carried leaves.
        args: further arguments of f.
        mode: ``"auto"`` or one of ``MODES``: see this module's docstring. ``"finite-difference"`` is for an op without a rule in
            any other: 7 gradients (8 in float32), 2 more for each smaller step that f needs, 21 at a kink. Its error is
            estimated, logged at debug level, and warned of above rounding and 1e-6 of the product (1e-3 in float32).
        has_aux: f returns ``(value, aux)``; the result is ``(H v, aux)``.
        strict: refuse a leaf on which f does not depend, instead of zeros in the product.
        randomness: ``"error"`` refuses a random f; ``"same"`` gives each evaluation the same draw; ``"different"`` does not care.

    Returns:
        H v with the structure of x, ``None`` at carried leaves. Costs the arithmetic of about two gradients and their memory; no
        graph is kept unless a leaf requires grad. Composes with every transform, itself included.

    Raises:
        ValueError: v differs from x in structure, shape, dtype or device; the leaf is named.
        MissingDerivativeError: an op of f has a second derivative in no mode.
        DependenceError: f(x) does not depend on x by differentiable operations.

    Warns:
        FiniteDifferenceWarning: the gradient has a kink at x, or is rough near it; in mode ``"finite-difference"`` alone.

    Singular points:
        An operation without a second derivative at x leaves one of three results, in every call that differentiates twice:

        * *the right number* where f has a Hessian and the operation's own formula holds: powers, products, ``prod``, ``sinc``,
          ``xlogy`` and determinants of rank n - 1 at 0; ``var`` of equal numbers; ``logsumexp`` and ``softmax`` with
          entries of -inf; a division under ``torch.where`` whose divisor is masked too.
        * *NaN or an infinity* where it needs a slope that does not exist: the norm of 0 and the ``std`` of equal numbers, squared
          or not, ``sqrt`` and ``log`` of 0, ``atan2`` at the origin, equal eigenvalues and singular values, determinants of lower
          rank, a division by 0 that is masked afterwards. Forward over reverse may have a number where reverse over reverse has
          NaN: the right one where f has a Hessian, the convention 0 where it has none. Write a sum of squares, not the
          square of its root, and sqrt(var + eps), not std + eps.
        * *the Hessian of one piece* at kinks. Of ``relu``, ``clamp``, ``where`` and sorting it is the piece that torch takes for
          the gradient, of ties in ``max``, ``min`` and ``median`` of all entries the mean, and of ``abs``, ``cdist`` and
          ``pdist`` at 0 a slope of 0. So a function that is smooth only as a whole has another Hessian than is returned:
          ``x.abs() ** 2`` gives 0 at 0, and so does ``cdist(x, y) ** 2`` where points coincide. Write x^2; inside
          ``checked()`` such a result is an error.

    Source:
        Pearlmutter (1994), Fast exact multiplication by the Hessian.

    Example:
        f(x) = x1^2 x2 has the Hessian [[2 x2, 2 x1], [2 x1, 0]]:

        >>> import torch
        >>> hvp(lambda x: x[0] ** 2 * x[1], torch.tensor([3.0, 5.0]), torch.tensor([1.0, 0.0]))
        tensor([10.,  6.])
    """
    _, product, aux = _both("hvp", f, x, v, args, mode, has_aux, strict, randomness, with_gradient=False)
    return (product, aux) if has_aux else product


def grad_and_hvp(
    f: Callable[..., Any],
    x: Any,
    v: Any,
    *args: Any,
    mode: str = "auto",
    has_aux: bool = False,
    strict: bool = False,
    randomness: str = "error",
) -> Any:
    """The gradient and the product H v in one pass: ``(g, H v)``, with ``has_aux`` ``((g, aux), H v)``.

    Everything else is as in :func:`hvp`.

    Example:
        >>> import torch
        >>> grad_and_hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        (tensor([ 3., 12.]), tensor([ 6., 12.]))
    """
    gradient, product, aux = _both("grad_and_hvp", f, x, v, args, mode, has_aux, strict, randomness, with_gradient=True)
    return ((gradient, aux), product) if has_aux else (gradient, product)


@eagerly
def _both(
    verb: str,
    f: Callable[..., Any],
    x: Any,
    v: Any,
    args: tuple[Any, ...],
    mode: str,
    has_aux: bool,
    strict: bool,
    randomness: str,
    with_gradient: bool,
) -> tuple[Any, Any, Any]:
    bound = bind(verb, f, (x, *args), {}, 0)
    tangents = dict(enumerate(bound.space.pack(v, "tangent")))
    warn_of_low_precision(verb, bound.space)
    check = begin(bound, has_aux, randomness)
    scalar, every_leaf = bound.scalar(has_aux), bound.space if strict else None
    used: list[Product] = []

    def attempt(candidate: str) -> tuple[Tensors | None, Tensors, Any]:
        replay.rewind()
        if candidate == FORWARD_OVER_REVERSE:
            return _one_pass(bound, scalar, tangents, every_leaf)
        leaves = tuple(bound.space.leaves)
        linear = product_at(replay.each(scalar), bound.x, candidate, leaves, leaves, verb=verb)
        product, used[:] = linear(tangents), [linear]
        if not (with_gradient or has_aux or strict):
            return None, product, None
        replay.rewind()
        (_, aux), gradient = value_and_gradient(scalar, bound.x, verb, strict=every_leaf)
        return gradient, product, aux

    with Replay(randomness, bound.x, verb) as replay:
        chain = MANY_PRODUCTS if derivative_levels() else ONE_PRODUCT
        gradient, product, aux = first_mode_that_works(verb, f, bound.x, mode, chain, attempt)
        replay.finish(bound.call, bound.x)
    for linear in used:
        warn_of_doubt(linear, bound.space)
    if check:
        check.product(tangents, product, gradient)
    return bound.space.unpack(plain(gradient)) if with_gradient else None, bound.space.unpack(plain(product)), aux


def _one_pass(
    bound: Bound, scalar: Scalar, tangents: dict[int, Tensor], every_leaf: Space | None
) -> tuple[Tensors, Tensors, Any]:
    """Forward-over-reverse: gradient, product and aux of one evaluation."""
    rebuild: list[Any] = []

    def gradient(*moved: Tensor) -> tuple[Tensors, Tensors]:
        (_, aux), g = flat_value_and_grad(scalar, moved, verb=bound.verb, strict=every_leaf)
        kept, back = tensors_of(aux)
        rebuild.append(back)
        return g, kept

    g, product, kept = flat_jvp(gradient, bound.x, tuple(tangents.values()))
    return g, product, rebuild[-1](kept)
