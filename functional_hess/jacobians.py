"""Jacobians of functions of trees: transforms mapped over unit vectors.

    jacfwd    column j of J is J e_j, a forward pass           jacrev    row i of J is J^T e_i, a pullback

Unit vectors live on the leaves they touch: a pass over the coordinates of some leaves leaves the others without a tangent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.guards import Replay, named_errors
from functional_hess.levels import flat_jvp, flat_vjp, flat_vmap, plain, replaced, require_dependence, require_movement
from functional_hess.nesting import derived_from, moves
from functional_hess.transforms import Output, bind, require_argnums
from functional_hess.tree import Space, flat

__all__ = ["jacfwd", "jacrev"]

Tree = Any
Tensors = tuple[Tensor, ...]


def jacfwd(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The Jacobian of f by columns: one forward pass for each coordinate of x, ``chunk_size`` at a time (all by default).

    Args:
        f: a function of trees that returns a tree.
        argnums: the argument to differentiate; a tuple gives tuples of blocks.
        has_aux: f returns ``(out, aux)``.
        chunk_size: how many columns at a time.
        randomness: ``"error"`` refuses a random f, ``"same"`` fixes one draw for all columns, ``"different"`` does not care.

    Returns:
        a function whose result is a tree of trees: the block of output leaf o and argument leaf p has shape
        ``o.shape + p.shape``. With ``has_aux`` the result is ``(jacobian, aux)``. Costs n forward passes as one batch, with the
        memory of ``chunk_size`` of them; f runs once a chunk. Choose it over :func:`jacrev` when f has more outputs than inputs.

    Raises:
        DependenceError: no output depends on x by differentiable operations.
        MissingDerivativeError: an op of f has no derivative in forward mode.
        RandomnessError: f draws random numbers.
        TypeError: f returns no floating tensor, or x holds none.

    Example:
        >>> import torch
        >>> jacfwd(lambda x: x**2)(torch.tensor([1.0, 3.0]))
        tensor([[2., 0.],
                [0., 6.]])
    """
    require_argnums("jacfwd", argnums)

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        bound = bind("jacfwd", f, args, kwargs, argnums)
        seen: list[tuple[Output, Tensors]] = []
        moved: list[bool] = []  # a leaf that f does not use has columns of zeros, and that is right while another is used

        def columns(touched: tuple[int, ...], *v: Tensor) -> Tensors:
            def of_touched(*tensors: Tensor) -> tuple[Tensors, Tensors]:
                output, outputs = Output.of("jacfwd", bound.call(*replaced(bound.x, touched, tensors)), has_aux)
                moved.extend(moves(outputs))
                seen.append((output, ()))
                return outputs, output.kept

            _, tangents, kept = flat_jvp(of_touched, tuple(bound.x[leaf] for leaf in touched), v)
            seen[-1] = (seen[-1][0], kept)
            return tangents

        parts = []
        with Replay(randomness, bound.x, "jacfwd") as replay, named_errors("jacfwd", "forward"):
            for pieces in _chunks("jacfwd", bound.space, chunk_size):
                basis = bound.space.one_hot(pieces)
                replay.rewind()
                parts.append(flat_vmap(functools.partial(columns, tuple(basis)), randomness=randomness)(*basis.values()))
        if not parts:  # x has no coordinates
            output, outputs = Output.of("jacfwd", bound.call(*bound.x), has_aux)
            seen.append((output, output.kept))
            parts.append(tuple(t.new_zeros((0, *t.shape)) for t in outputs))
        else:
            require_movement("jacfwd", moved, bound.call, bound.x)
        output, kept = seen[-1]
        stacked = [torch.cat(column) for column in zip(*parts, strict=True)]  # (n, *out.shape) each
        jacobian = _jacobian(output.space, bound.space, [t.movedim(0, -1).split(bound.space.sizes, -1) for t in stacked])
        return (jacobian, output.aux_value(kept)) if has_aux else jacobian

    return transformed


def jacrev(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The Jacobian of f by rows: f once, then one pullback for each coordinate of f(x), ``chunk_size`` at a time.

    Results, of shape ``o.shape + p.shape``, and errors are those of :func:`jacfwd`. Costs one evaluation of f, whose graph is
    kept, and a backward pass for each entry of f(x) as one batch, with the memory of ``chunk_size`` of them. Choose it when f
    has fewer outputs than inputs.

    Example:
        >>> import torch
        >>> jacrev(lambda x: {"sum": x.sum(), "count": 2})(torch.ones(3))
        {'sum': tensor([1., 1., 1.]), 'count': None}
    """
    require_argnums("jacrev", argnums)

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        bound = bind("jacrev", f, args, kwargs, argnums)
        seen: list[Output] = []

        def of_tensors(*tensors: Tensor) -> tuple[Tensors, Tensors]:
            output, outputs = Output.of("jacrev", bound.call(*tensors), has_aux)
            require_dependence("jacrev", outputs, bound.call, tensors)
            seen.append(output)
            return outputs, output.kept

        with named_errors("jacrev", "reverse"):
            outputs, pullback, kept = flat_vjp(of_tensors, bound.x)
        output = seen[-1]

        def rows(touched: tuple[int, ...], *u: Tensor) -> Tensors:
            given = dict(zip(touched, u, strict=True))
            return pullback(tuple(given.get(o, torch.zeros_like(t)) for o, t in enumerate(outputs)))

        parts = []
        for pieces in _chunks("jacrev", output.space, chunk_size):
            basis = output.space.one_hot(pieces)
            run = functools.partial(rows, tuple(basis))
            with named_errors("jacrev", "reverse"):
                parts.append(flat_vmap(run, randomness=randomness)(*basis.values()))
        if not parts:  # f(x) has no coordinates
            parts.append(tuple(t.new_zeros((0, *t.shape)) for t in bound.x))
        by_leaf = [flat(torch.cat(row)) for row in zip(*parts, strict=True)]  # (m, size of leaf) each
        by_output = zip(*(leaf.split(output.space.sizes) for leaf in by_leaf), strict=True)
        jacobian = _jacobian(output.space, bound.space, by_output)
        return (jacobian, output.aux_value(kept)) if has_aux else jacobian

    return transformed


def _chunks(verb: str, space: Space, chunk_size: int | None) -> Iterator[list[Any]]:
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{verb}: chunk_size must be a positive int or None, got {chunk_size!r}.")
    step = space.dim if chunk_size is None else chunk_size
    for start in range(0, space.dim, max(step, 1)):
        yield space.pieces(range(start, min(start + step, space.dim)))


def _jacobian(rows: Space, columns: Space, parts: Iterable[Iterable[Tensor]]) -> Tree:
    """The tree of trees of blocks from the entries of each, in order: output leaves, and for each the leaves of x."""
    blocks = []
    for row, shape in zip(parts, rows.shapes, strict=True):
        like = zip(row, columns.shapes, strict=True)
        blocks.append(columns.unpack(plain(part.reshape(shape + inner) for part, inner in like)))
    return rows.unpack(blocks)
