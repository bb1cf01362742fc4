"""Where a sparse matrix may differ from zero: patterns, row by row, and what is done with them.

A pattern holds integers only: which entries there are, never what they are. Patterns are made of lists of entries, of matrices,
or by name (:func:`banded`, :func:`blocks`); they are transposed, united and intersected, and drawn in characters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["SparsityPattern", "banded", "blocks"]

PICTURE = (20, 40)  # rows and columns of characters


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparsityPattern:
    """Where an (m, n) matrix may differ from zero, row by row: row i has ``indices[indptr[i] : indptr[i + 1]]``, increasing.

    Made by :meth:`of_entries`, :meth:`of_matrix`, :meth:`full`, :func:`banded` or :func:`blocks`; ``print`` draws it.

    Example:
        >>> SparsityPattern.of_entries([0, 1, 1], [0, 0, 2], (2, 3))
        2 x 3, 3 nonzeros
        x . .
        x . x
    """

    shape: tuple[int, int]
    indptr: np.ndarray  # (m + 1,)
    indices: np.ndarray  # (nonzeros,)

    def __post_init__(self) -> None:
        for array in (self.indptr, self.indices):
            array.setflags(write=False)

    @staticmethod
    def of_entries(rows: Any, columns: Any, shape: tuple[int, int]) -> SparsityPattern:
        """The pattern with the given entries, in any order, repeated or not.

        Raises:
            ValueError: an entry lies outside the shape.
        """
        m, n = (int(extent) for extent in shape)
        rows, columns = (np.asarray(index, dtype=np.int64).reshape(-1) for index in (rows, columns))
        for name, index, extent in (("row", rows, m), ("column", columns, n)):
            if index.size and not (index.min() >= 0 and index.max() < extent):
                wrong = index.max() if index.min() >= 0 else index.min()
                raise ValueError(f"pattern: {name}s must be in range({extent}), for the shape is ({m}, {n}), got {wrong}.")
        return SparsityPattern._of_keys(np.unique(rows * n + columns), (m, n))

    @staticmethod
    def _of_keys(keys: np.ndarray, shape: tuple[int, int]) -> SparsityPattern:
        """From the numbers i n + j of the entries, increasing."""
        m, n = shape
        indptr = np.searchsorted(keys, np.arange(m + 1, dtype=np.int64) * n)
        return SparsityPattern(shape, indptr.astype(np.int64), keys % max(n, 1))

    @staticmethod
    def of_matrix(matrix: Any) -> SparsityPattern:
        """The stored entries of a scipy sparse matrix (or any object with ``tocoo``), or the nonzeros of an array.

        Raises:
            ValueError: ``matrix`` has not two dimensions.
        """
        if hasattr(matrix, "tocoo"):
            entries = matrix.tocoo()
            return SparsityPattern.of_entries(entries.row, entries.col, matrix.shape)
        array = np.asarray(matrix)
        if array.ndim != 2:
            raise ValueError(f"pattern: a matrix has two dimensions, got an array of shape {array.shape}.")
        rows, columns = np.nonzero(array)
        return SparsityPattern.of_entries(rows, columns, array.shape)

    @staticmethod
    def full(m: int, n: int) -> SparsityPattern:
        """Every entry."""
        return SparsityPattern((m, n), np.arange(m + 1, dtype=np.int64) * n, np.tile(np.arange(n, dtype=np.int64), m))

    @property
    def nonzeros(self) -> int:
        """How many entries there are."""
        return len(self.indices)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The row of each entry."""
        rows = np.repeat(np.arange(self.shape[0], dtype=np.int64), np.diff(self.indptr))
        rows.setflags(write=False)
        return rows

    @property
    def keys(self) -> np.ndarray:
        """The number i n + j of each entry: increasing."""
        return self.rows * self.shape[1] + self.indices

    @functools.cached_property
    def transpose(self) -> SparsityPattern:
        """The pattern of the transposed matrix."""
        m, n = self.shape
        return SparsityPattern._of_keys(np.sort(self.indices * m + self.rows), (n, m))

    @functools.cached_property
    def is_symmetric(self) -> bool:
        """Whether (j, i) is there with every (i, j)."""
        return self.shape[0] == self.shape[1] and self == self.transpose

    def __and__(self, other: SparsityPattern) -> SparsityPattern:
        """Entries of both."""
        return SparsityPattern._of_keys(np.intersect1d(self.keys, other.keys, assume_unique=True), self.shape)

    def __or__(self, other: SparsityPattern) -> SparsityPattern:
        """Entries of either."""
        return SparsityPattern._of_keys(np.union1d(self.keys, other.keys), self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        alike = self.shape == other.shape and np.array_equal(self.indptr, other.indptr)
        return alike and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((self.shape, self.nonzeros))

    def dense(self) -> np.ndarray:
        """The pattern as an (m, n) array of booleans."""
        dense = np.zeros(self.shape, dtype=bool)
        dense[self.rows, self.indices] = True
        return dense

    def picture(self) -> str:
        """The pattern in characters: ``x`` where there is an entry, ``.`` where there is none.

        A large pattern is drawn smaller; then ``x`` marks a cell with an entry in it and ``#`` one that is full.
        """
        (m, n), (high, wide) = self.shape, PICTURE
        if not m * n:
            return ""
        high, wide = min(high, m), min(wide, n) if n > PICTURE[0] else n
        cells = np.zeros((high, wide), dtype=np.int64)
        np.add.at(cells, (self.rows * high // m, self.indices * wide // n), 1)
        per_row = np.bincount(np.arange(m) * high // m, minlength=high)
        per_column = np.bincount(np.arange(n) * wide // n, minlength=wide)
        room = per_row[:, None] * per_column
        marks = np.where(cells == 0, ".", np.where((cells == room) & (room > 1), "#", "x"))
        apart = " " if n <= PICTURE[0] else ""
        return "\n".join(apart.join(row) for row in marks)

    def __repr__(self) -> str:
        m, n = self.shape
        return f"{m:,} x {n:,}, {self.nonzeros:,} nonzeros\n{self.picture()}"


def banded(half_width: int) -> Callable[[int], SparsityPattern]:
    """n -> the entries of an (n, n) matrix with |i - j| <= half_width; 1 is tridiagonal, 0 diagonal.

    Example:
        >>> banded(1)(4)
        4 x 4, 10 nonzeros
        x x . .
        x x x .
        . x x x
        . . x x
    """
    if half_width < 0:
        raise ValueError(f"banded: half_width must be at least 0, got {half_width}.")

    def pattern(n: int) -> SparsityPattern:
        every = np.arange(n, dtype=np.int64)
        near = every[:, None] + np.arange(-half_width, half_width + 1)
        inside = (near >= 0) & (near < n)
        indptr = np.concatenate([[0], np.cumsum(inside.sum(1))]).astype(np.int64)
        return SparsityPattern((n, n), indptr, near[inside])

    return pattern


def blocks(sizes: Sequence[int]) -> Callable[[int], SparsityPattern]:
    """n -> full square blocks of the given sizes along the diagonal; the sizes must add up to n.

    Example:
        >>> blocks([2, 1])(3)
        3 x 3, 5 nonzeros
        x x .
        x x .
        . . x
    """
    extents = np.asarray(sizes, dtype=np.int64).reshape(-1)

    def pattern(n: int) -> SparsityPattern:
        if extents.sum() != n or (extents < 0).any():
            raise ValueError(f"blocks: the sizes must add up to {n}, got {int(extents.sum())}.")
        stops = np.cumsum(extents)
        width = np.repeat(extents, extents)  # of the block that each row belongs to
        indptr = np.concatenate([[0], np.cumsum(width)]).astype(np.int64)
        indices = np.arange(indptr[-1]) - np.repeat(indptr[:-1] - np.repeat(stops - extents, extents), width)
        return SparsityPattern((n, n), indptr, indices)

    return pattern
