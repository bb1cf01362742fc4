"""Programs that are the same have the same transcript, and programs that connect other elements have another."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from networks import numbers
from torch import Tensor

import functional_hess as fh
from functional_hess import sparsity
from functional_hess.sparsity import detect_reached
from functional_hess.transcripts import transcript

PLACES = torch.tensor([2, 0, 3, 1])
SCALE = numbers(4, seed=1)


def told(f, n: int = 4):
    return transcript(lambda v: (f(v[0]),), (torch.ones(n, dtype=torch.float64),), ())


def chained(v: Tensor) -> Tensor:
    a = v * SCALE
    return a + a.flip(0)


def of_two_memories(v: Tensor) -> Tensor:
    a, b = v * SCALE, v * SCALE
    return a + b.flip(0)


def a_slice_written(first: int):
    def f(v: Tensor) -> Tensor:
        y = v.clone()
        y[first : first + 2] += v[:2]
        return y

    return f


def placed(places: Tensor):
    return lambda v: v[places]


def masked(mask: Tensor):
    return lambda v: torch.where(mask, v, v.flip(0))


def test_a_program_run_twice_has_one_transcript():
    for f in (chained, of_two_memories, a_slice_written(1), placed(PLACES), masked(SCALE > 0)):
        assert told(f) is not None and told(f) == told(f)


def both(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b]).flatten()


def written_outside(first: int):
    memory = torch.zeros(6, dtype=torch.float64)
    part = memory[first : first + 4]
    return lambda v: both(part.copy_(v), memory[:4])


OTHERS = {
    "operand": (lambda v: both(v * 2, v.flip(0))[:4] + v, lambda v: both(v * 2, v.flip(0))[:4] + v.detach().clone()),
    "one of two": (lambda v: (v * 2, v.flip(0))[0], lambda v: (v * 2, v.flip(0))[1]),
    "the same one": (lambda v: (v * 2, v.flip(0))[0], lambda v: (v.flip(0), v * 2)[0]),
    "twice": (lambda v: sum(2 * [(v * 2, v.flip(0))[0]]), lambda v: sum([*(v * 2, v.flip(0))])),
    "a view from outside": (written_outside(0), written_outside(2)),
    "op": (lambda v: v.cumsum(0), lambda v: v.cummax(0)[0]),
    "dimension": (lambda v: v.view(2, 2).sum(0).sum(0), lambda v: v.view(2, 2).sum(1).sum(0)),
    "kind of number": (lambda v: v * 1, lambda v: v * 1.0),
    "slice": (a_slice_written(0), a_slice_written(2)),
    "memory": (chained, of_two_memories),
    "alias": (lambda v: v.clone().add_(v), lambda v: v.add(v)),
    "stride": (lambda v: v.view(2, 2) * 2, lambda v: v.view(2, 2).t() * 2),
    "index": (placed(PLACES), placed(PLACES.flip(0))),
    "condition": (masked(SCALE > 0), masked(SCALE <= 0)),
    "result": (lambda v: (v * 2)[:2], lambda v: (v * 2)[2:]),
    "two results": (lambda v: v[:2] * 2, lambda v: v[2:] * 2),
    "length": (lambda v: v * 2, lambda v: v * 2 * 2),
}


@pytest.mark.parametrize("one, other", OTHERS.values(), ids=OTHERS)
def test_what_connects_other_elements_has_another_transcript(one, other):
    def of(f):
        return transcript(lambda v: (f(v[0]),), (torch.ones(4, dtype=torch.float64),), ())

    assert of(one) != of(other)


def test_labels_are_part_of_it():
    vector = (torch.ones(4),)
    one, other = (transcript(lambda v: (v[0] * 2,), vector, (labels,)) for labels in (PLACES, PLACES.flip(0)))
    assert one != other


def test_floating_numbers_and_conditions_that_only_multiply_are_not():
    weights = [numbers(4, seed=k) for k in (1, 2)]
    assert told(lambda v: v * weights[0]) == told(lambda v: v * weights[1])
    assert told(lambda v: v * (weights[0] > 0)) == told(lambda v: v * (weights[1] > 0))


def test_a_tensor_without_strided_memory_cannot_be_told():
    assert told(lambda v: v.to_sparse().coalesce().values()) is None


# What is made of it -----------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch) -> list[int]:
    """One entry for every program that is judged."""
    calls: list[int] = []
    judge = sparsity._watched
    monkeypatch.setattr(sparsity, "_judged", sparsity._Judged())
    monkeypatch.setattr(sparsity, "_watched", lambda *args: calls.append(1) or judge(*args))
    return calls


def pattern(f, n: int = 4):
    return detect_reached(lambda v: (f(v[0]),), (torch.ones(n, dtype=torch.float64),)).pattern


def test_a_program_is_judged_once(watched):
    first = pattern(placed(PLACES))
    assert pattern(placed(PLACES.clone())) == first and len(watched) == 1
    assert pattern(placed(PLACES.flip(0))) != first and len(watched) == 2


def test_an_index_written_to_in_place_is_seen(watched):
    places = PLACES.clone()
    f = placed(places)
    first = pattern(f)
    places.copy_(PLACES.flip(0))
    assert pattern(f) == pattern(placed(PLACES.flip(0))) != first and len(watched) == 2


def test_what_is_remembered_is_what_would_be_found(watched):
    for f in (chained, of_two_memories, a_slice_written(1), placed(PLACES), masked(SCALE > 0), *sum(OTHERS.values(), ())):
        assert pattern(f) == pattern(f)
        like = (torch.ones(4, dtype=torch.float64),)
        assert (
            pattern(f) == sparsity._watched(lambda _, f=f: (like, lambda v: (f(v[0]),)), (), (), sparsity._each_its_own).pattern
        )


def test_values_that_leave_torch_are_judged_each_time(watched):
    def by_numpy(v: Tensor) -> Tensor:
        return torch.from_numpy(v.numpy() * 2)

    assert all(detect_reached(lambda v: (by_numpy(v[0]),), (torch.ones(4),)).full_because for _ in range(2))
    assert len(watched) == 2


def test_the_latest_programs_are_remembered(watched, monkeypatch):
    monkeypatch.setattr(sparsity, "PROGRAMS", 2)
    for k in (1, 2, 1, 3, 1, 2):  # 2 is forgotten for 3
        pattern(lambda v, k=k: v * k)
    assert len(watched) == 4
    monkeypatch.setattr(sparsity, "REMEMBERED", 3)
    pattern(lambda v: v * 9)
    pattern(lambda v: v * 9)
    assert len(watched) == 6


def test_no_tensor_is_kept_alive(watched):
    weight = numbers(4)
    alive = weakref.ref(weight.untyped_storage())
    pattern(weight.mul), pattern(weight.mul)
    del weight
    gc.collect()
    assert alive() is None


def test_a_hessian_that_is_computed_again_watches_nothing(watched):
    x = numbers(2000)
    energy = lambda x: (x[1:] * x[:-1] ** 3).sum()  # noqa: E731
    H = fh.hessian(energy)
    assert fh.explain(H, x).route == "colored" and len(watched) == 1
    first, again = H(x), H(2 * x)
    assert len(watched) == 1 and torch.allclose(4 * first, again, rtol=1e-14)
