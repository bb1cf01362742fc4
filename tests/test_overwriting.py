"""Graphs that write over what they no longer need give the same numbers, and touch nothing that anyone else can see."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import functional_hess as fh
from functional_hess.overwriting import overwrite
from functional_hess.prepared import _Storages
from functional_hess.tree import tensors_of

aten = torch.ops.aten
CONSTANT = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
X = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)


def traced(f, *args):
    """The graph of f, written over, and the operations that write in place."""
    graph = make_fx(f)(*args)
    graph.graph.eliminate_dead_code()
    overwrite(graph.graph, _Storages.of(graph, args).env)
    graph.graph.lint()
    graph.recompile()
    return graph, [node.target for node in graph.graph.nodes if "_." in str(node.target)]


def same_as(f, *args):
    """The prepared f is f to the bit, call after call, and leaves what it is given as it was."""
    prepared, before = fh.prepare(f, *args), [t.clone() for t in (*args, CONSTANT)]
    for scale in (1, 3, 1):
        given = [t * scale for t in args]
        kept = [t.clone() for t in given]
        expected, got = f(*given), prepared(*given)
        for a, b in zip(tensors_of(expected)[0], tensors_of(got)[0], strict=True):
            assert torch.equal(a, b)
        assert all(map(torch.equal, given, kept))
    assert all(map(torch.equal, (*args, CONSTANT), before))


def test_a_chain_of_operations_takes_one_tensor():
    _, written = traced(lambda x: (((x * 2).sin() + x).exp() - 1) ** 2, X)
    assert written == [aten.sin_.default, aten.add_.Tensor, aten.exp_.default, aten.sub_.Tensor, aten.pow_.Scalar]


def test_the_second_of_two_that_commute_is_written_over():
    assert traced(lambda x: x * x.exp(), X)[1] == [aten.mul_.Tensor]
    assert traced(lambda x: x - x.exp(), X)[1] == []


ALIVE = {
    "an argument": lambda x: x + 1,
    "a constant": lambda x: CONSTANT * x,
    "read later": lambda x: (lambda y: y.sin() + y)(x * 2),
    "a result": lambda x: (lambda y: (y, y.sin()))(x * 2),
    "a result by a view": lambda x: (lambda y: (y[1:], y.sin()))(x * 2),
    "a view of an argument": lambda x: x.view(2, 2).exp(),
    "read later by a view": lambda x: (lambda y: (lambda v: y.sin() + v.sum())(y[1:]))(x * 2),
    "smaller than the result": lambda x: (x[:1] * 2) + x,
    "another type": lambda x: (x * 2) > 0,
    "laid out otherwise": lambda x: (x.view(2, 2) * 2).T.exp(),
    "a part of a larger one": lambda x: (x * 2)[1:].exp(),
    "both sides": lambda x: (lambda y: y * y)(x * 2),
    "a view on the other side": lambda x: (lambda y: y * y.flip(0))(x * 2),
    "an overlapping view on the other side": lambda x: (lambda y: y * y.view(2, 2).T.reshape(4))(x * 2),
    "expanded": lambda x: (x.sum() * 2).expand(4).exp(),
    "a matrix and its transpose": lambda x: (lambda y: y + y.T)(x.view(2, 2) * 2),
    "in place already": lambda x: (x * 2).sin_().add_(x).exp(),
    "a padded tensor that is read twice": lambda x: (lambda y: (y + x * 2, y * 2))(aten.slice_backward(x[:2], [4], 0, 1, 3, 1)),
    "a scalar": lambda x: (x.sum() * 2 + 1).exp(),
    "two results of one": lambda x: (lambda y, z: (y.sin(), z.cos(), y))(*(x * 2).split(2)),
}


@pytest.mark.parametrize("f", ALIVE.values(), ids=ALIVE)
def test_what_someone_can_still_see_is_left_alone(f):
    same_as(f, X)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x[1:] * x[:-1]).sum() + (x**3).sum(),
        lambda x: ((x[1:] - x[:-1] ** 2) ** 2).sum(),
        lambda x: (x[::2].exp() * x[1::2]).sum() + x[1:].sin().sum() + x[1:3].prod(),
        lambda x: (x[:3] * CONSTANT[:3]).square().sum() * x.sum(),
    ],
)
def test_gradients_of_slices_are_added_where_they_belong(f):
    same_as(torch.func.grad(f), X)
    same_as(torch.func.hessian(f), X)


def test_no_padded_gradient_is_made():
    graph, written = traced(torch.func.grad(lambda x: (x[1:].sin() * x[:-1]).sum() + x.exp().sum()), X)
    assert written.count(aten.add_.Tensor) >= 1
    assert sum(node.target is aten.slice_backward.default for node in graph.graph.nodes) <= 1


OPERATIONS = (
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: a - b,
    lambda a, b: a.sin(),
    lambda a, b: -b,
    lambda a, b: a.view(2, 3).T.reshape(6),
    lambda a, b: torch.cat([a[3:], b[:3]]),
    lambda a, b: a.flip(0),
    lambda a, b: a.view(6),
    lambda a, b: (a.view(2, 3) * b[:3]).view(6),
    lambda a, b: a.clone(),
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: aten.slice_backward(a[:4], [6], 0, 1, 5, 1) + b,
    lambda a, b: a + aten.slice_backward(b[::2], [6], 0, 0, 6, 2),
    lambda a, b: a.mul(0.5).add_(b),
)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_are_what_they_were(seed):
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2**30, (14, 3), generator=g).tolist()
    shown = torch.randint(16, (3,), generator=g).tolist()
    constant = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def program(x):
        made = [x, constant]
        for operation, a, b in drawn:
            made.append(OPERATIONS[operation % len(OPERATIONS)](made[a % len(made)], made[b % len(made)]))
        return [made[2 + i % 14].clone() if i % 3 else made[2 + i % 14] + 0 for i in shown], made[-1] * 1

    same_as(program, torch.randn(6, generator=g, dtype=torch.float64))
    assert torch.equal(constant, torch.linspace(-1, 1, 6, dtype=torch.float64))
