"""Tables of sets, against Python's own sets."""

from __future__ import annotations

import numpy as np
import pytest

from functional_hess import index_sets
from functional_hess.index_sets import IndexSets, TooManyError


class Truth:
    """The same table with sets for sets."""

    def __init__(self, n: int) -> None:
        self.sets: dict[int, frozenset[int]] = {0: frozenset()} | {i + 1: frozenset([i]) for i in range(n)}

    def note(self, numbers: np.ndarray, truth: list[frozenset[int]]) -> None:
        for number, one in zip(numbers.reshape(-1).tolist(), truth, strict=True):
            assert self.sets.setdefault(number, one) == one

    def of(self, numbers: np.ndarray) -> list[frozenset[int]]:
        return [self.sets[number] for number in numbers.reshape(-1).tolist()]


def rows(sets: IndexSets, numbers: np.ndarray, limit: int = 10**6) -> list[frozenset[int]]:
    pattern = sets.pattern(numbers.reshape(-1), limit)
    return [frozenset(np.flatnonzero(row).tolist()) for row in pattern.dense()]


@pytest.mark.parametrize("sample", [2, 256])
def test_random_programs_of_unions_agree_with_sets(sample, rng, monkeypatch):
    monkeypatch.setattr(index_sets, "SAMPLE", sample)
    for _ in range(40):
        n = int(rng.integers(1, 12))
        sets, truth = IndexSets(n), Truth(n)
        arrays = [np.arange(n + 1)]
        for _ in range(int(rng.integers(1, 9))):
            pool = np.concatenate([array.reshape(-1) for array in arrays])
            kind = rng.integers(3)
            if kind == 0:
                a, b = rng.choice(pool, (2, 3, 5))
                new = sets.union(a, b)
                truth.note(new, [one | other for one, other in zip(truth.of(a), truth.of(b), strict=True)])
            elif kind == 1:
                a, labels = rng.choice(pool, 20), rng.integers(0, 6, 20)
                new = sets.union_by(labels, a, 7)
                members = [truth.of(a[labels == label]) for label in range(7)]
                truth.note(new, [frozenset().union(*group) for group in members])
            else:
                a = rng.choice(pool, (4, int(rng.integers(0, 4))))
                new = sets.union_last(a)
                truth.note(new, [frozenset().union(*truth.of(row)) for row in a])
            arrays.append(new)
        asked = rng.choice(np.concatenate([array.reshape(-1) for array in arrays]), 30)
        assert rows(sets, asked) == truth.of(asked)


def test_pattern_has_increasing_indices():
    sets = IndexSets(5)
    pattern = sets.pattern(sets.union(np.array([5, 2]), np.array([1, 4])), limit=100)
    assert pattern.indices.tolist() == [0, 4, 1, 3] and pattern.shape == (2, 5)


def test_equal_unions_share_a_number():
    sets = IndexSets(4)
    numbers = sets.union(np.array([1, 2, 1, 4]), np.array([2, 1, 2, 3]))
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3] and sets.count == 4 + 1 + 2


def test_a_collision_of_hashes_loses_nothing(monkeypatch):
    monkeypatch.setattr(index_sets, "_scattered", lambda numbers: np.zeros(len(numbers), dtype=np.uint64))
    sets = IndexSets(4)
    assert rows(sets, sets.union(np.array([1, 2, 1]), np.array([2, 3, 2]))) == [{0, 1}, {1, 2}, {0, 1}]


def test_sets_of_everything_cost_nothing():
    n = 1000
    sets = IndexSets(n)
    everything = sets.union_last(np.arange(1, n + 1))
    larger = sets.union(np.full(n, everything), np.arange(1, n + 1))
    assert sets.pattern(larger[:3], limit=4 * n + n).nonzeros == 3 * n


def test_too_many_entries_are_refused():
    sets = IndexSets(100)
    halves = sets.union_last(np.arange(1, 51))
    apart = sets.union(np.full(50, halves), np.arange(51, 101))
    with pytest.raises(TooManyError):
        sets.pattern(apart, limit=1000)
    assert sets.pattern(apart, limit=6000).nonzeros == 50 * 51
    with pytest.raises(TooManyError):
        sets.pattern(np.ones(200, dtype=np.int64), limit=199)


def test_no_inputs_and_no_sets():
    assert IndexSets(0).pattern(np.zeros(3, dtype=np.int64)).nonzeros == 0
    assert IndexSets(2).pattern(np.zeros(0, dtype=np.int64)).shape == (0, 2)
