"""The Hessian of a function whose value is any tree of tensors: one Hessian for each of its m outputs.

    H[o][p][q] = d^2 f_o / dx_p dx_q,    a block of shape f_o.shape + x_p.shape + x_q.shape,

is made of rows of the Hessians of <u, f> for unit vectors u. No structure is looked for: what is lifted or colored is scalar.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import progress_bar
from functional_hess.extrapolation import warn_of_doubt
from functional_hess.products import (
    DOUBLE_BACKWARD,
    FINITE_DIFFERENCE,
    MANY_PRODUCTS,
    first_mode_that_works,
    product_at,
    rows_of,
)
from functional_hess.rows import BY_COLUMNS, Plan, chunks_of
from functional_hess.transforms import flat_vmap, plain
from functional_hess.tree import Space, flat

__all__ = ["hessian_of_each_output"]

Tree = Any
Tensors = tuple[Tensor, ...]


def hessian_of_each_output(plan: Plan) -> Tree:
    """The Hessian of every output of f: a tree like f(x) of trees of trees of blocks, from the rows that a plan wants.

    All unit vectors u share one ``vmap``, where the mode takes one, so a row costs what it costs for as many scalar functions.
    """
    problem, space = plan.problem, plan.problem.space
    outputs = Space.of(problem.seen.value, "f(x)")
    units = outputs.one_hot(outputs.pieces(range(outputs.dim)))
    leaves, options = tuple(space.leaves), problem.options

    def rows(mode: str, v: dict[int, Tensor], *u: Tensor) -> Tensors:
        def contracted(*x: Tensor) -> tuple[Tensor, None]:
            values = outputs.pack(problem.bound.split(x, options.has_aux)[0], "f(x)")
            return torch.stack([(a * values[i]).sum() for i, a in zip(units, u, strict=True)]).sum(), None

        product = product_at(replay.each(contracted), problem.bound.x, mode, leaves, leaves, verb=problem.verb)
        values = rows_of(product, mode, v, options.randomness)
        warn_of_doubt(product, space)
        return values

    def attempt(mode: str) -> tuple[str, Tensors]:
        replay.rewind()
        run = functools.partial(rows, mode, v)
        if mode in (DOUBLE_BACKWARD, FINITE_DIFFERENCE):
            each = [run(*u) for u in zip(*units.values(), strict=True)]
            return mode, tuple(torch.stack(column) for column in zip(*each, strict=True))
        return mode, flat_vmap(run, randomness=options.randomness)(*units.values())

    parts: list[list[Tensor]] = []
    chain: tuple[str, ...] = MANY_PRODUCTS
    mode = "auto" if options.mode == "fastest" else options.mode
    with problem.replay() as replay, progress_bar(problem.verb, space.dim, options.progress) as advance:
        for pieces in chunks_of(space.pieces(range(space.dim if units else 0)), plan.chunk):
            v = space.one_hot(pieces)
            used, values = first_mode_that_works(problem.verb, problem.f, problem.bound.x, mode, chain, attempt)
            chain = (used,)  # rows and columns cannot be mixed
            parts.append([flat(t, 2) for t in values])  # (m, k, size of leaf) each
            advance(sum(map(len, pieces)))
    if not parts:  # x or f(x) has no coordinates
        parts.append([torch.zeros(outputs.dim, space.dim, t.numel(), dtype=t.dtype, device=t.device) for t in problem.bound.x])
    whole = [torch.cat(column, 1) for column in zip(*parts, strict=True)]  # (m, n, size of leaf) each
    by_columns = chain[0] in BY_COLUMNS
    return outputs.unpack([_blocks_of(space, outputs, o, whole, by_columns) for o in outputs.leaves])


def _blocks_of(space: Space, outputs: Space, o: int, whole: Sequence[Tensor], by_columns: bool) -> Tree:
    """The blocks of one leaf of f(x), whose rows are ``whole``: (m, n, size) for each leaf of x."""
    first, last = outputs.offsets[o], outputs.offsets[o] + outputs.sizes[o]
    shape = outputs.shapes[o]

    def rows_against(p: int, q: int) -> Tensor:
        return whole[q][first:last, space.offsets[p] : space.offsets[p] + space.sizes[p]]

    def block(p: int, q: int) -> Tensor:
        part = rows_against(q, p).mT if by_columns else rows_against(p, q)
        return plain([part.reshape(shape + space.shapes[p] + space.shapes[q])])[0]

    return space.unpack([space.unpack([block(p, q) for q in space.leaves]) for p in space.leaves])
