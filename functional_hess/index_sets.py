"""Many index sets at once, by number, so that a tensor of sets is a tensor of integers.

Which of n inputs an element of a tensor depends on is a set of indices. A program moves such sets far more often than it joins
them. So sets are numbered in one table,

    0 the empty set,    1, ..., n the sets {0}, ..., {n - 1},    larger numbers unions of sets with smaller ones,

and whoever holds an array of numbers may index, transpose or copy it like any array. A union only notes its parts. What the sets
hold is worked out once, at the end, for the numbers that are asked for, in vectorized passes over the notes: the time is
proportional to the entries of the sets on the way, plus sorting.

Integers only: this module knows numpy and no derivatives.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from functional_hess.patterns import SparsityPattern

__all__ = ["IndexSets", "TooManyError"]

ENTRIES = 2**25  # entries of all sets worked out together: 256 MiB
SAMPLE = 256


class TooManyError(Exception):
    """The sets that were asked for hold more entries than there is patience for."""


@dataclasses.dataclass(frozen=True)
class _Unions:
    """Sets ``start``, ``start + 1``, ...: number i is the union of ``parts[indptr[i] : indptr[i + 1]]``."""

    start: int
    indptr: np.ndarray
    parts: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1


class IndexSets:
    """A table of sets of indices below n, which only grows.

    Example:
        >>> sets = IndexSets(3)
        >>> both = sets.union(np.array([1, 1, 0]), np.array([3, 1, 2]))
        >>> sets.pattern(both, limit=100)
        3 x 3, 4 nonzeros
        x . x
        x . .
        . x .
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.count = n + 1
        self.notes: list[_Unions] = []

    def union(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The unions of two arrays of sets of one shape, element by element."""
        result = np.where(a == 0, b, a)
        new = (a != b) & (a != 0) & (b != 0)
        if new.any():
            pairs = np.stack([np.minimum(a[new], b[new]), np.maximum(a[new], b[new])], 1)
            result[new] = self._noted(np.arange(len(pairs) + 1, dtype=np.int64) * 2, pairs.reshape(-1))
        return result

    def union_by(self, labels: np.ndarray, sets: np.ndarray, count: int) -> np.ndarray:
        """(count,) sets: number m is the union of all ``sets`` whose label is m."""
        present = sets != 0
        keys = np.unique(labels[present] * self.count + sets[present])
        labels, parts = keys // self.count, keys % self.count
        sizes = np.bincount(labels, minlength=count)
        result = np.zeros(count, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        result[sizes == 1] = parts[starts[sizes == 1]]
        many = sizes > 1
        if many.any():
            kept = np.repeat(many, sizes)
            indptr = np.concatenate([[0], np.cumsum(sizes[many])]).astype(np.int64)
            result[many] = self._noted(indptr, parts[kept])
        return result

    def union_last(self, sets: np.ndarray) -> np.ndarray:
        """The unions over the last dimension."""
        if sets.shape[-1] == 1:
            return sets[..., 0]
        if (sets == sets[..., :1]).all():
            return np.zeros(sets.shape[:-1], dtype=np.int64) if sets.shape[-1] == 0 else sets[..., 0].copy()
        rows = sets.size // sets.shape[-1]
        return self.union_by(np.repeat(np.arange(rows), sets.shape[-1]), sets.reshape(-1), rows).reshape(sets.shape[:-1])

    def _noted(self, indptr: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """Numbers for new unions; equal lists of parts share one."""
        first, same = _distinct(indptr, parts)
        sizes = np.diff(indptr)[first]
        chosen = _ranges(indptr[first], sizes)
        self.notes.append(_Unions(self.count, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), parts[chosen]))
        numbers = self.count + same
        self.count += len(first)
        return numbers

    def pattern(self, sets: np.ndarray, limit: int = ENTRIES) -> SparsityPattern:
        """What the sets hold: row r of the pattern is the set number ``sets[r]``.

        Raises:
            TooManyError: they, or the sets that they are unions of, hold more than ``limit`` entries.
        """
        pool = _Pool(self.n, self.count, limit)
        for unions, wanted in zip(self.notes, self._wanted(sets), strict=True):
            if wanted.any():
                pool.add(unions, np.flatnonzero(wanted))
        sizes = pool.size[sets]
        if sizes.sum() > limit:
            raise TooManyError
        indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return SparsityPattern((len(sets), self.n), indptr, pool.elements[_ranges(pool.start[sets], sizes)])

    def _wanted(self, sets: np.ndarray) -> list[np.ndarray]:
        """For each note, which of its unions are needed for ``sets``."""
        needed = np.zeros(self.count, dtype=bool)
        needed[sets] = True
        found = []
        for unions in reversed(self.notes):
            mine = needed[unions.start : unions.start + len(unions)].copy()
            needed[unions.parts[np.repeat(mine, np.diff(unions.indptr))]] = True
            found.append(mine)
        return found[::-1]


class _Pool:
    """The elements of sets, end to end: set s has ``elements[start[s] : start[s] + size[s]]``, increasing.

    It begins with 0, ..., n - 1, which serves all singletons, and every set that holds everything.
    """

    def __init__(self, n: int, count: int, limit: int) -> None:
        self.n, self.limit, self.used = n, limit, n
        self.elements = np.arange(n, dtype=np.int64)
        self.start, self.size = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self.start[1 : n + 1], self.size[1 : n + 1] = np.arange(n), 1

    def add(self, unions: _Unions, which: np.ndarray) -> None:
        lengths = np.diff(unions.indptr)[which]
        parts = unions.parts[_ranges(unions.indptr[which], lengths)]
        owner = np.repeat(np.arange(len(which)), lengths)
        full = np.zeros(len(which), dtype=bool)
        full[owner[self.size[parts] == self.n]] = True
        self.size[unions.start + which[full]] = self.n
        parts, owner = parts[~full[owner]], owner[~full[owner]]
        sizes = self.size[parts]
        total = int(sizes.sum())
        if self.used + total > self.limit:
            raise TooManyError
        keys = np.repeat(owner, sizes) * self.n + self.elements[_ranges(self.start[parts], sizes)]
        keys.sort()
        keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
        self._keep(unions.start + which[~full], np.flatnonzero(~full), keys)

    def _keep(self, numbers: np.ndarray, owners: np.ndarray, keys: np.ndarray) -> None:
        if self.used + len(keys) > len(self.elements):
            more = np.empty(max(2 * len(self.elements), self.used + len(keys)), dtype=np.int64)
            more[: self.used] = self.elements[: self.used]
            self.elements = more
        self.elements[self.used : self.used + len(keys)] = keys % self.n
        bounds = np.searchsorted(keys, np.append(owners, owners[-1:] + 1) * self.n)
        sizes = np.diff(bounds)
        whole = sizes == self.n
        self.start[numbers] = np.where(whole, 0, self.used + bounds[:-1])
        self.size[numbers] = sizes
        self.used += len(keys)


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (sizes[0] of them), starts[1], ...

    Example:
        >>> _ranges(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)


def _distinct(indptr: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of each kind among lists of parts, and for each list the number of its kind.

    Lists are grouped by a hash and compared part by part, so that a collision only costs a number. Where a sample shows no two
    lists alike, none are looked for.
    """
    sizes = np.diff(indptr)
    hashes = np.add.reduceat(_scattered(parts), indptr[:-1]) + _scattered(sizes)
    every = np.arange(len(sizes))
    sample = np.concatenate([hashes[:SAMPLE], hashes[:: max(1, len(hashes) // SAMPLE)][1:]])
    if len(hashes) > SAMPLE and len(np.unique(sample)) >= len(sample) - SAMPLE // 64:
        return every, every
    _, first, same = np.unique(hashes, return_index=True, return_inverse=True)
    likeness = first[same]
    alike = sizes == sizes[likeness]
    alike[alike] = _alike(indptr, parts, every[alike], likeness[alike])
    if not alike.all():
        return every, every
    return first, same.reshape(-1)


def _alike(indptr: np.ndarray, parts: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether lists ``one`` and ``other``, of equal sizes, agree in all parts."""
    sizes = np.diff(indptr)[one]
    agree = parts[_ranges(indptr[one], sizes)] == parts[_ranges(indptr[other], sizes)]
    return np.logical_and.reduceat(agree, np.cumsum(sizes) - sizes)


def _scattered(numbers: np.ndarray) -> np.ndarray:
    """A hash of each number: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    bits = numbers.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))
