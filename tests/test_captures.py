"""Where a function holds something, and that its replacement is seen."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

from functional_hess.captures import held_by

SCALE = 2.0


def replaced(function):
    return [held.name for held in held_by(function) if held.replaced]


def test_cells_globals_defaults_and_bound_arguments():
    weight, steps = torch.ones(2), [1, 2]

    def f(x, by=3.0, *, shift=4):
        return SCALE * weight * x * steps[-1] * by + shift

    names = {held.name: held.value for held in held_by(functools.partial(f, shift=5))}
    assert names["SCALE"] == 2.0 and names["weight"] is weight and names["steps"] == (1, 2)
    assert names["defaults"] == (3.0,) and names["shift"] == 5
    assert [t is weight for held in held_by(f) if held.name == "weight" for t in held.tensors()] == [True]


def test_replacement_is_seen_and_a_change_in_place_is_not():
    weight, steps, table = torch.ones(2), [torch.ones(1)], {"a": 1}
    f = lambda x: (weight * x * steps[-1]).sum() * table["a"]  # noqa: E731
    places = held_by(f)
    weight.add_(1)
    steps[0].mul_(2)
    assert not any(held.replaced for held in places)
    weight = torch.ones(2)
    steps.append(torch.ones(1))
    table["b"] = 2
    assert sorted(held.name for held in places if held.replaced) == ["steps", "table", "weight"]


def test_globals_are_looked_up_again(monkeypatch):
    places = held_by(lambda x: SCALE * x)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert [held.name for held in places if held.replaced] == ["SCALE"]
    monkeypatch.delitem(globals(), "SCALE")
    assert all(held.replaced for held in places)


class Energy:
    def __init__(self):
        self.power = 2

    def value(self, x):
        return (x**self.power).sum()

    def __call__(self, x):
        return self.value(x) * SCALE


@pytest.mark.parametrize("how", ["method", "callable", "closure"])
def test_attributes_of_objects(how):
    energy = Energy()
    places = held_by({"method": energy.value, "callable": energy, "closure": lambda x: energy(x)}[how])
    assert not any(held.replaced for held in places)
    energy.power = 3
    assert [held.name.rpartition(".")[2] for held in places if held.replaced] == ["power"]


def test_parameters_buffers_and_the_mode_of_modules():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    places = held_by(lambda x: net(x))
    assert {"net.0.weight", "net.1.running_mean", "net.1.training"} <= {held.name for held in places}
    net[0].weight = torch.nn.Parameter(torch.ones(2, 2))
    net.eval()
    assert {"net.0.weight", "net.training", "net.0.training", "net.1.training"} == {h.name for h in places if h.replaced}


def test_functions_within_reach_are_followed():
    inner_scale = 2.0

    def inner(x):
        return inner_scale * x

    outer = functools.wraps(inner)(lambda x: inner(x) + 1)
    places = held_by(lambda x: outer(x))
    inner_scale = 3.0
    assert any(held.replaced for held in places)
    assert len({id(held.look) for held in places}) == len(places)


def test_what_cannot_be_looked_into_is_left_alone():
    @dataclasses.dataclass
    class Node:
        other: object = None

    node = Node()
    node.other = node  # a circle

    def empty():
        return node

    assert replaced(lambda x: (node, np.sin, torch.sin, len, empty)) == []
    assert held_by(torch.sin) == () and held_by(len) == ()
