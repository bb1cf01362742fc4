"""Where the rows of a Hessian go: the blocks of pairs of leaves.

Of a symmetric pair of leaves only one block is computed; the other is its mirror image. Blocks are preallocated and written
chunk by chunk, in memory of their own or as views of one (n, n) tensor ``out``. Where a graph or a batch must follow, which a
write into a buffer would lose, parts are kept and joined instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from functional_hess.nesting import is_outermost
from functional_hess.resuming import runs_of
from functional_hess.rows import Chunk, Problem
from functional_hess.transforms import plain
from functional_hess.tree import Piece, flat

__all__ = ["Blocks", "may_write", "require_out", "tell_finished"]


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
        self.done = np.zeros(problem.space.dim if out is not None else 0, dtype=bool)
        self.whole = {leaf for leaf, size in enumerate(self.space.sizes) if not size}  # whose rows are done, and mirrored

    def add(self, chunk: Chunk) -> None:
        """Put the rows of a chunk in their places."""
        row = 0
        self.by_columns = chunk.by_columns and not self.symmetric
        for piece in chunk.pieces:
            for column, values in zip(chunk.columns, chunk.values, strict=True):
                if column in self.wanted[piece.leaf]:
                    self._add(piece, column, flat(values[row : row + len(piece)]))
            row += len(piece)
            if self.out is not None:
                self._finish([self.space.offsets[piece.leaf] + i for i in piece.indices], [piece.leaf])

    def take_up(self, done: np.ndarray, by_columns: bool) -> None:
        """Rows that ``out`` holds already: (n,) which."""
        self.by_columns = by_columns and not self.symmetric
        for leaf, columns in self.wanted.items():
            for column in columns:
                self._rows((leaf, column))
        self._finish(np.flatnonzero(done), self.space.leaves)

    def held(self, pieces: Sequence[Piece], by_columns: bool) -> Iterator[Tensor]:
        """What ``out`` holds of computed rows; their mirror images are written later."""
        self.by_columns = by_columns and not self.symmetric
        for piece in pieces:
            for column in self.wanted[piece.leaf]:
                yield self._rows((piece.leaf, column))[piece.indices[0] : piece.indices[-1] + 1]

    def _finish(self, rows: Sequence[int] | np.ndarray, leaves: Sequence[int]) -> None:
        """Note computed rows of some leaves. A leaf is mirrored as soon as it is whole, so that later rows are finished."""
        self.done[rows] = True
        for p in leaves:
            first = self.space.offsets[p]
            if p not in self.whole and self.done[first : first + self.space.sizes[p]].all():
                for q in self.space.leaves:
                    if p not in self.wanted.get(q, ()) and q in self.wanted.get(p, ()):
                        self._matrix(q, p).copy_(self._matrix(p, q).T)
                self.whole.add(p)

    def finished(self) -> list[range]:
        """The rows of ``out`` that are as they will be: computed, with the mirror images of other leaves' rows beside them."""
        done = self.done.copy()
        for p in self.space.leaves:
            if not all(q in self.wanted.get(p, ()) or q in self.whole for q in self.space.leaves):
                done[self.space.offsets[p] :][: self.space.sizes[p]] = False
        return runs_of(done)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Whatever interrupts what is done inside tells which rows ``out`` holds."""
        try:
            yield
        except BaseException as error:
            if self.out is not None:
                tell_finished(error, self.verb, self.finished(), "columns" if self.by_columns else "rows")
            raise

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


def tell_finished(error: BaseException, verb: str, finished: list[range], name: str = "rows") -> None:
    """Add to an error, as the attribute ``finished_rows`` (or ``finished_columns``) and as a note, what ``out`` holds."""
    what = ", ".join(f"{run.start}:{run.stop}" for run in finished) or "none"
    with contextlib.suppress(AttributeError):  # an error that lets nothing be added to it; notes came with Python 3.11
        setattr(error, f"finished_{name}", finished)
        error.add_note(f"{verb}: interrupted; finished {name} of out: {what}.")  # type: ignore[attr-defined]


def may_write(problem: Problem) -> bool:
    """Whether rows may be written into a buffer: no transform is outside, and plain autograd watches no argument."""
    return is_outermost() and not (torch.is_grad_enabled() and any(t.requires_grad for t in problem.bound.x))


def require_out(problem: Problem, out: Tensor) -> None:
    """Refuse an ``out`` into which the Hessian of ``problem`` cannot be written."""
    verb, space = problem.verb, problem.space
    want = (space.dim, space.dim)
    if not problem.is_scalar:
        value = problem.seen.value
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{verb}: out= holds one (n, n) matrix, so f must return a scalar tensor (shape ()), got {got}. "
            "Leave it out for such an f."
        )
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
