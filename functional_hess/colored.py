"""Dense Hessians of functions whose entries are mostly zero, from as many products as there are colors.

A function of many variables often couples each with few others. Its Hessian, asked for as a dense matrix, is still what a few
products tell, if it is known where it may differ from zero. So where rows would cost much, four of them are looked at, the first
time. If those are mostly zero, the product H v is run once under watch with index sets
(:func:`functional_hess.sparsity.detect_reached`), which proves where H may differ from zero at this point; columns that share no
row are multiplied together (:mod:`functional_hess.coloring`), and entries are put in their places.

Every call proves anew, if only that it runs a program that was judged before, and holds the entries to one more product with a
random vector, which exposes derivatives that are not symmetric. Where there is nothing to be gained :func:`color` says so, and
rows are computed. A plan that is kept, and sparse results, are for :mod:`functional_hess.sparse`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_hess.chunking import MIB, WORKING_SET, fits
from functional_hess.coloring import distance_1_coloring, recovery, recovery_of_diagonal, star_coloring
from functional_hess.compressed import Compression, chunk_of_colors, joined, summed_units
from functional_hess.guards import missing_rule
from functional_hess.levels import repaired
from functional_hess.patterns import SparsityPattern
from functional_hess.products import REVERSE_OVER_REVERSE, Product, product_at, rows_of
from functional_hess.rows import Problem, rows_only
from functional_hess.sparsity import PROOF, detect_reached
from functional_hess.tree import Space, tensors_of

__all__ = ["Colored", "color", "colored_blocks", "colored_diagonal"]

Tensors = tuple[Tensor, ...]
WORTH_A_LOOK = 48 * MIB  # bytes that rows would write, some ten milliseconds
FEW = 1 / 8  # of the entries may differ from zero, and as many products as this part of the rows may be taken
_dense: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()
_compressions: weakref.WeakKeyDictionary[SparsityPattern, dict[bool, Compression]] = weakref.WeakKeyDictionary()
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the certificate, as a part of |H| |v|


@dataclasses.dataclass(frozen=True)
class Colored:
    """How the entries of H are computed: ``entries[e]`` stands at row ``pattern.rows[e]`` and column ``pattern.indices[e]``."""

    problem: Problem
    compression: Compression
    entries: Tensor
    chunk: int
    output: int
    repairs: tuple[str, ...]

    @property
    def products(self) -> int:
        """How many there were, but for the certificate's."""
        return self.compression.coloring.count


def color(problem: Problem, args: Sequence[Any], output: int, *, diagonal: bool = False) -> Colored | None:
    """The entries of the Hessian, or those of its diagonal, from few products; nothing where rows are as good.

    Args:
        problem: the function at a point.
        args: its arguments.
        output: bytes that the call allocates for its result.
    """
    saved, n = problem.seen.saved, problem.space.dim
    if rows_only(problem, args) or not problem.is_scalar or n * saved < WORTH_A_LOOK:
        return None
    if PROOF * saved > 1.1 * output + WORKING_SET or not fits(output, problem.space.device):
        return None
    kind = (diagonal, problem.seen.calls, *((t.shape, t.dtype) for t in tensors_of((problem.bound.x, tuple(args)))[0]))
    dense = _found_dense(problem.f)
    if kind in dense:
        return None
    leaves = tuple(problem.space.leaves)
    with problem.replay(), repaired(fresh=True) as used:
        try:
            product = product_at(problem.scalar, problem.bound.x, REVERSE_OVER_REVERSE, leaves, leaves, verb=problem.verb)
            compression = _compression(problem.space, product, problem.bound.x, diagonal)
            if compression is None:
                dense.add(kind)
                return None
            chunk = chunk_of_colors(problem, compression.coloring.count + 1, output)
            entries = _entries(problem.space, product, compression, chunk)
        except RuntimeError as error:
            if not missing_rule(error):
                raise
            return None
    return None if entries is None else Colored(problem, compression, entries, chunk, output, tuple(sorted(used)))


def _found_dense(f: Any) -> set[Any]:
    """The kinds of arguments at which f was looked at in vain: rows are right there, whatever has changed."""
    try:
        return _dense.setdefault(f, set())
    except TypeError:  # a callable without weak references or hash
        return set()


def _compression(space: Space, product: Product, x: Tensors, diagonal: bool) -> Compression | None:
    """What is multiplied together, if H is nowhere near full at x."""
    few = sorted({0, space.dim // 3, 2 * space.dim // 3, space.dim - 1})

    def mostly_zero() -> bool:
        rows = rows_of(product, REVERSE_OVER_REVERSE, space.one_hot(space.pieces(few)))
        return sum(int(t.count_nonzero()) for t in rows) <= FEW * len(few) * space.dim

    found = detect_reached(lambda v: product(dict(enumerate(v))), x, worth=mostly_zero)
    if found is None or found.full_because is not None or found.pattern.nonzeros > FEW * space.dim**2:
        return None
    compression = _colored(found.pattern, diagonal)
    return compression if compression.coloring.count <= FEW * space.dim else None


def _colored(reached: SparsityPattern, diagonal: bool) -> Compression:
    """Worked out once for a pattern, as long as that is remembered."""
    known = _compressions.setdefault(reached, {})
    if diagonal not in known:
        if diagonal:  # of the map as it is, symmetric or not
            pattern = reached | reached.transpose
            coloring = distance_1_coloring(pattern)
            places = recovery_of_diagonal(pattern, coloring)
        else:
            pattern = reached & reached.transpose
            coloring = star_coloring(pattern)
            places = recovery(pattern, coloring)
        known[diagonal] = Compression(pattern, coloring, places)
    return known[diagonal]


def _entries(space: Space, product: Product, compression: Compression, chunk: int) -> Tensor | None:
    """The wanted entries; nothing if those of all of H disagree with the product of H with a random vector.

    Nothing either where f closes over a tensor that is watched: the graph of H must lead to it, as that of rows does.
    """
    colors, _, places = compression.on(space.device)
    v = torch.randn(space.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(space.device, space.dtype)
    one = {leaf: part.view(1, *space.shapes[leaf]) for leaf, part in enumerate(v.split(space.sizes))}
    count, parts = compression.coloring.count, []
    for first in range(0, count + 1, chunk):
        here = range(first, min(first + chunk, count))
        sums = summed_units(space, colors, here) if here else {}
        if first + chunk > count:
            sums = {leaf: torch.cat([sums[leaf], t]) if here else t for leaf, t in one.items()}
        parts.append(joined(space, rows_of(product, REVERSE_OVER_REVERSE, sums)))
    B = torch.cat(parts) if len(parts) > 1 else parts[0]  # (colors + 1, n)
    if B.requires_grad:
        return None
    entries = B.reshape(-1)[places]
    whole = len(places) == compression.pattern.nonzeros
    return entries if not whole or _agree(compression.pattern, entries, v, B[-1]) else None


def _agree(pattern: SparsityPattern, entries: Tensor, v: Tensor, product: Tensor) -> bool:
    rows, columns = _places(pattern, entries.device)
    terms = entries * v[columns]
    mine, size = (torch.zeros_like(v).index_add_(0, rows, t) for t in (terms, terms.abs()))
    return bool((mine - product).norm() <= TOLERANCE[v.dtype] * size.norm())


def _places(pattern: SparsityPattern, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(np.array(index)).to(device) for index in (pattern.rows, pattern.indices))  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------- what comes of it


def colored_blocks(plan: Colored, pairs: Iterable[tuple[int, int]], out: Tensor | None = None) -> dict[tuple[int, int], Tensor]:
    """The blocks of the Hessian of the given pairs of leaves, in their shapes: contiguous, or views of an (n, n) ``out``."""
    space = plan.problem.space
    rows, columns = _places(plan.compression.pattern, space.device)
    starts = torch.tensor(space.offsets, device=space.device)
    p_of, q_of = (torch.searchsorted(starts, index, right=True) - 1 for index in (rows, columns))
    found = {}
    for p, q in pairs:
        here = ((p_of == p) & (q_of == q)).nonzero()[:, 0] if len(space.leaves) > 1 else slice(None)
        place = (rows[here] - space.offsets[p], columns[here] - space.offsets[q])
        block = _zeros(space, p, q, out).index_put_(place, plan.entries[here])
        found[p, q] = space.shaped(block, p, q)
    return found


def _zeros(space: Space, p: int, q: int, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.zeros(space.sizes[p], space.sizes[q], dtype=space.dtype, device=space.device)
    return out[space.offsets[p] :, space.offsets[q] :][: space.sizes[p], : space.sizes[q]].zero_()


def colored_diagonal(plan: Colored) -> Tensors:
    """The diagonal of the Hessian, by leaf."""
    space = plan.problem.space
    return tuple(part.view(shape) for part, shape in zip(plan.entries.split(space.sizes), space.shapes, strict=True))
