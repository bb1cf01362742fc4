"""Where the rows of a Hessian go: the blocks of pairs of leaves.

Of a symmetric pair of leaves only one block is computed; the other is its mirror image. Blocks are preallocated and written
chunk by chunk, in memory of their own or as views of one (n, n) tensor ``out``. Where a graph or a batch must follow, which a
write into a buffer would lose, parts are kept and joined instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from functional_hess.nesting import is_outermost
from functional_hess.rows import Chunk, Problem
from functional_hess.transforms import plain
from functional_hess.tree import Piece, flat

__all__ = ["Blocks", "may_write", "require_out"]


class Blocks:
    """Blocks of H by pair of leaves: preallocated where they may be written, lists of parts where a graph must follow.

    Args:
        problem: what is differentiated, for its space and its point.
        wanted: for each leaf p with rows the leaves q whose blocks (p, q) are kept; a block (q, p) that is wanted from neither
            side is the mirror image.
        symmetric: whether a chunk by columns may stand for one by rows.
        out: one (n, n) tensor to write into, as :func:`require_out` asks for.
    """

    def __init__(
        self, problem: Problem, wanted: Mapping[int, tuple[int, ...]], *, symmetric: bool = True, out: Tensor | None = None
    ) -> None:
        self.verb, self.space, self.wanted = problem.verb, problem.space, wanted
        self.symmetric, self.out = symmetric, out
        self.in_place = may_write(problem)
        self.written: dict[tuple[int, int], Tensor] = {}
        self.parts: dict[tuple[int, int], list[Tensor]] = {}
        self.by_columns = False

    def add(self, chunk: Chunk) -> None:
        """Put the rows of a chunk in their places."""
        row = 0
        self.by_columns = chunk.by_columns and not self.symmetric
        for piece in chunk.pieces:
            for column, values in zip(chunk.columns, chunk.values, strict=True):
                if column in self.wanted[piece.leaf]:
                    self._add(piece, column, flat(values[row : row + len(piece)]))
            row += len(piece)

    def _add(self, piece: Piece, column: int, rows: Tensor) -> None:
        if rows.requires_grad and self.out is not None:
            raise ValueError(_out_cannot(self.verb))
        key = (piece.leaf, column)
        start, stop = piece.indices[0], piece.indices[-1] + 1
        if self.in_place and not rows.requires_grad and key not in self.parts:
            self._rows(key)[start:stop].copy_(rows)
            return
        if key not in self.parts:  # a graph may begin in the middle of a block, where f closes over what requires grad
            self.parts[key] = [self._rows(key)[:start]] if self.in_place and start else []
        self.parts[key].append(rows)

    def _rows(self, key: tuple[int, int]) -> Tensor:
        """The buffer whose row i belongs to coordinate i of the first leaf of ``key``."""
        return self._matrix(key[1], key[0]).T if self.by_columns else self._matrix(*key)

    def _matrix(self, p: int, q: int) -> Tensor:
        """The block (p, q) as a matrix that can be written."""
        space = self.space
        if (p, q) not in self.written:
            if self.out is not None:
                rows = self.out[space.offsets[p] : space.offsets[p] + space.sizes[p]]
                self.written[p, q] = rows[:, space.offsets[q] : space.offsets[q] + space.sizes[q]]
            else:
                dtype = torch.promote_types(space.dtypes[p], space.dtypes[q])
                self.written[p, q] = torch.empty(space.sizes[p], space.sizes[q], dtype=dtype, device=space.devices[p])
        return self.written[p, q]

    def block(self, p: int, q: int) -> Tensor:
        """The finished block in its shape; mirrored from (q, p) if only that was computed."""
        space = self.space
        shape = space.shapes[p] + space.shapes[q]
        if 0 in shape:
            return torch.zeros(shape, dtype=torch.promote_types(space.dtypes[p], space.dtypes[q]), device=space.devices[p])
        turned = self.by_columns or q not in self.wanted.get(p, ())
        key = (q, p) if turned else (p, q)
        if key in self.parts:
            joined = torch.cat(self.parts[key]).to(torch.promote_types(space.dtypes[p], space.dtypes[q]))
            return plain([joined.T if turned else joined])[0].reshape(shape)
        if (p, q) not in self.written:
            self._matrix(p, q).copy_(self.written[q, p].T)
        block = self.written[p, q].unflatten(0, space.shapes[p] or (1,)).unflatten(-1, space.shapes[q] or (1,))
        block = block if space.shapes[q] else block.squeeze(-1)
        return block if space.shapes[p] else block.squeeze(0)


def may_write(problem: Problem) -> bool:
    """Whether rows may be written into a buffer: no transform is outside, and plain autograd watches no argument."""
    return is_outermost() and not (torch.is_grad_enabled() and any(t.requires_grad for t in problem.bound.x))


def require_out(problem: Problem, out: Tensor) -> None:
    """Refuse an ``out`` into which the Hessian of ``problem`` cannot be written."""
    verb, space = problem.verb, problem.space
    want = (space.dim, space.dim)
    if not problem.is_scalar:
        raise ValueError(f"{verb}: out= holds one (n, n) matrix, so f must return a scalar. Leave it out for other f.")
    if not may_write(problem):
        raise ValueError(_out_cannot(verb))
    is_tensor = isinstance(out, Tensor)
    if not is_tensor or tuple(out.shape) != want or out.dtype != space.dtype or out.device != space.device:
        got = f"shape {tuple(out.shape)}, {out.dtype}, {out.device}" if is_tensor else type(out).__name__
        raise ValueError(f"{verb}: out must have shape {want}, {space.dtype}, {space.device}, got {got}.")


def _out_cannot(verb: str) -> str:
    return (
        f"{verb}: out= cannot carry a graph or a batch, so it belongs to the outermost call. Leave it out here, or call under "
        "torch.no_grad() if a leaf, or a tensor that f closes over, requires grad."
    )
