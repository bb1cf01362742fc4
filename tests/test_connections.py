"""The rule of every op, against perturbing its arguments one element at a time and looking what changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import numbers
from torch import Tensor

from functional_hess.connections import base_name
from functional_hess.sparsity import _each_its_own, _Tracker

A = torch.ops.aten
INDEX = torch.tensor([2, 0, 2])
MASK = torch.tensor([[True, False, True], [False, True, True]])
EXACT, WIDE = True, False


def connections(op: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """For each result, an (elements of it, elements of all arguments) array of booleans, by the rules."""
    arguments = tuple(numbers(*shape, seed=k) for k, shape in enumerate(shapes))
    tracker = _Tracker()
    with tracker:
        tracker.seed(arguments, _each_its_own(arguments))
        out = op(*(t.clone() for t in arguments))
        results = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if t is not None]
        sets = [tracker.sets_in(t).reshape(-1).numpy() for t in results]
    return [tracker.sets.pattern(s).dense() for s in sets], tuple(tracker.widened)


def changes(op: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    """The same by trying: an element of a result depends on one of the arguments if it moves when that moves."""
    flat = torch.cat([numbers(*shape, seed=k).reshape(-1) for k, shape in enumerate(shapes)])
    found: list[np.ndarray] | None = None

    def run(vector: Tensor) -> list[Tensor]:
        parts = vector.split([int(np.prod(shape)) for shape in shapes])
        out = op(*(part.reshape(shape).clone() for part, shape in zip(parts, shapes, strict=True)))
        return [t.reshape(-1).clone() for t in (out if isinstance(out, (tuple, list)) else [out]) if t is not None]

    base = run(flat)
    for step in (0.1, -0.3, 2.5):
        columns = []
        for j in range(len(flat)):
            moved = flat.clone()
            moved[j] += step
            columns.append([((a - b).abs() > 1e-12).numpy() for a, b in zip(run(moved), base, strict=True)])
        tried = [np.stack(column, 1) for column in zip(*columns, strict=True)]
        found = tried if found is None else [a | b for a, b in zip(found, tried, strict=True)]
    assert found is not None
    return found


def convolution_backward(*, transposed: bool, groups: int) -> Callable[..., Any]:
    def op(gradient: Tensor, source: Tensor, weight: Tensor) -> Any:
        options = ([2], [1], [1], transposed, [0], groups, [True, True, True])
        return A.convolution_backward(gradient, source, weight, [gradient.shape[1]], *options)

    return op


def written_through_a_view(a: Tensor, b: Tensor) -> Tensor:
    a.t()[1:].mul_(b)
    a.view(-1)[0:2].copy_(b.reshape(-1)[2:4])
    return a


def written_over(a: Tensor, b: Tensor) -> Tensor:
    a[0].zero_()
    a[1].fill_(b[0])
    return a


def added_to_a_list(a: Tensor, b: Tensor) -> list[Tensor]:
    torch._foreach_add_([a, b], [b, a])
    return [a, b]


def as_bytes(a: Tensor) -> Tensor:
    return a.view(torch.complex128).conj_physical().view(torch.float64) * 2


CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], bool]] = {
    "sum of two": (lambda a, b: a + b, ((2, 3), (3,)), EXACT),
    "product of two": (lambda a, b: a * b, ((2, 1), (1, 3)), EXACT),
    "where": (lambda a, b: torch.where(MASK, a, b), ((2, 3), (2, 3)), EXACT),
    "where scalar": (lambda a: torch.where(MASK, a, 2.0), ((2, 3),), EXACT),
    "masked_fill": (lambda a, b: a.masked_fill(MASK, b), ((2, 3), ()), EXACT),
    "tanh_backward": (A.tanh_backward, ((4,), (4,)), EXACT),
    "mse_loss_backward": (lambda g, a, b: A.mse_loss_backward(g, a, b, 1), ((), (4,), (4,)), EXACT),
    "mm": (torch.mm, ((2, 3), (3, 2)), EXACT),
    "bmm": (torch.bmm, ((2, 2, 3), (2, 3, 1)), EXACT),
    "mv": (torch.mv, ((2, 3), (3,)), EXACT),
    "dot": (torch.dot, ((3,), (3,)), EXACT),
    "addmm": (torch.addmm, ((2,), (3, 2), (2, 2)), EXACT),
    "addmv": (torch.addmv, ((3,), (3, 2), (2,)), EXACT),
    "baddbmm": (torch.baddbmm, ((2, 1, 2), (2, 1, 2), (2, 2, 2)), EXACT),
    "addbmm": (torch.addbmm, ((1, 2), (2, 1, 2), (2, 2, 2)), EXACT),
    "addr": (torch.addr, ((2, 3), (2,), (3,)), EXACT),
    "sum": (lambda a: a.sum((0, 2)), ((2, 3, 2),), EXACT),
    "mean": (lambda a: a.mean(1, keepdim=True), ((2, 3),), EXACT),
    "all of it": (torch.sum, ((2, 3),), EXACT),
    "norm": (lambda a: torch.linalg.vector_norm(a, dim=0), ((2, 3),), EXACT),
    "trace": (torch.trace, ((3, 3),), WIDE),
    "max": (lambda a: a.max(1).values, ((2, 3),), WIDE),
    "larger of two": (torch.maximum, ((3,), (3,)), WIDE),
    "cumsum": (lambda a: a.cumsum(1), ((2, 3),), WIDE),
    "softmax_backward": (lambda g, y: A._softmax_backward_data(g, y, 1, torch.float64), ((2, 3), (2, 3)), EXACT),
    "sort": (lambda a: a.sort(1).values, ((2, 3),), WIDE),
    "topk": (lambda a: a.topk(2, 0).values, ((3, 2),), WIDE),
    "fft": (lambda a: torch.view_as_real(torch.fft.rfft(a)), ((2, 4),), WIDE),
    "cat": (lambda a, b: torch.cat([a, b, a], 1), ((2, 2), (2, 1)), EXACT),
    "stack": (lambda a, b: torch.stack([a, b], 1), ((2,), (2,)), EXACT),
    "roll": (lambda a: a.roll((1, 2), (0, 1)), ((2, 3),), EXACT),
    "flip": (lambda a: a.flip(1), ((2, 3),), EXACT),
    "tril": (torch.tril, ((3, 3),), EXACT),
    "pad": (lambda a: F.pad(a, (1, -1, 0, 2), value=7.0), ((2, 3),), EXACT),
    "reflection": (lambda a: F.pad(a, (1, 1), mode="reflect"), ((1, 3),), EXACT),
    "reflection back": (lambda g: A.reflection_pad1d_backward(g, numbers(1, 3), [1, 2]), ((1, 6),), EXACT),
    "replication back": (lambda g: A.replication_pad2d_backward(g, numbers(1, 2, 2), [1, 0, 0, 2]), ((1, 4, 3),), EXACT),
    "slice_backward": (lambda g: A.slice_backward(g, [2, 5], 1, 1, 5, 2), ((2, 2),), EXACT),
    "select_backward": (lambda g: A.select_backward(g, [3, 2], 0, 1), ((2,),), EXACT),
    "diagonal_backward": (lambda g: A.diagonal_backward(g, [3, 3], 1, 0, 1), ((2,),), EXACT),
    "diag_embed": (torch.diag_embed, ((2, 2),), EXACT),
    "unfold_backward": (lambda g: A.unfold_backward(g, [5], 0, 3, 1), ((3, 3),), EXACT),
    "gather": (lambda a: a.gather(0, INDEX[None]), ((3, 3),), EXACT),
    "index": (lambda a: a[:, INDEX], ((2, 3),), EXACT),
    "index_select": (lambda a: a.index_select(1, INDEX), ((2, 3),), EXACT),
    "index_put": (lambda a, b: a.index_put((INDEX,), b), ((3, 2), (3, 2)), WIDE),
    "index_put of one": (lambda a, b: a.index_put((INDEX[:2],), b), ((3, 2), ()), EXACT),
    "index_put, adding": (lambda a, b: a.index_put((INDEX,), b, accumulate=True), ((3, 2), (2,)), EXACT),
    "index_add": (lambda a, b: a.index_add(0, INDEX, b), ((3, 2), (3, 2)), EXACT),
    "index_copy": (lambda a, b: a.index_copy(1, INDEX[:2], b), ((2, 3), (2, 2)), EXACT),
    "index_fill": (lambda a, b: a.index_fill(0, INDEX, b), ((3, 2), ()), EXACT),
    "scatter": (lambda a, b: a.scatter(1, torch.tensor([[0, 2]]), b), ((2, 3), (2, 2)), EXACT),
    "scatter of a number": (lambda a: a.scatter(1, torch.tensor([[0, 2]]), 1.0), ((2, 3),), EXACT),
    "scatter_add": (lambda a, b: a.scatter_add(0, torch.tensor([[0, 2], [0, 1]]), b), ((3, 2), (3, 2)), EXACT),
    "masked_select": (lambda a: a.masked_select(MASK), ((2, 3),), EXACT),
    "masked_scatter": (lambda a, b: a.masked_scatter(MASK, b), ((2, 3), (5,)), EXACT),
    "masked_scatter_backward": (lambda g: A.masked_scatter_backward(g, MASK, [2, 3]), ((2, 3),), EXACT),
    "embedding": (lambda w: F.embedding(INDEX, w), ((3, 2),), EXACT),
    "embedding back": (lambda g: A.embedding_dense_backward(g, INDEX, 4, -1, False), ((3, 2),), EXACT),
    "nll_loss back": (lambda g: A.nll_loss_backward(g, numbers(2, 3), INDEX[:2], None, 0, -100, numbers()), ((2,),), WIDE),
    "im2col": (lambda a: F.unfold(a, (2, 2), padding=1), ((1, 2, 2, 2),), EXACT),
    "col2im": (lambda a: F.fold(a, (2, 3), (2, 2), padding=1), ((2, 8, 12),), EXACT),
    "nearest": (lambda a: F.interpolate(a, 5), ((1, 2, 3),), EXACT),
    "nearest back": (lambda g: A.upsample_nearest1d_backward(g, [5], [1, 1, 3]), ((1, 1, 5),), EXACT),
    "pooling": (lambda a: F.avg_pool2d(a, 2), ((1, 2, 2, 4),), WIDE),
    "convolution": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), ((2, 2, 5), (2, 2, 3), (2,)), WIDE),
    "convolution of the input": (lambda x: F.conv1d(x, numbers(4, 1, 2), groups=2, dilation=2), ((1, 2, 5),), EXACT),
    "two-dimensional convolution": (lambda x: F.conv2d(x, numbers(1, 2, 2, 3), padding=(0, 1)), ((1, 2, 3, 3),), EXACT),
    "transposed convolution": (
        lambda x, w: F.conv_transpose1d(x, w, stride=2, padding=1, output_padding=1),
        ((1, 2, 3), (2, 1, 3)),
        WIDE,
    ),
    "transposed convolution of the input": (
        lambda x: F.conv_transpose2d(x, numbers(2, 2, 2, 2), groups=2, dilation=(1, 2)),
        ((1, 2, 2, 3),),
        EXACT,
    ),
    "convolution back": (convolution_backward(transposed=False, groups=2), ((1, 2, 3), (1, 4, 5), (2, 2, 3)), WIDE),
    "transposed convolution back": (convolution_backward(transposed=True, groups=2), ((1, 4, 5), (1, 2, 3), (2, 2, 3)), WIDE),
    "in place through views": (written_through_a_view, ((2, 3), (2, 2)), EXACT),
    "replaced in place": (written_over, ((2, 2), (1,)), EXACT),
    "lists in place": (added_to_a_list, ((2,), (2,)), WIDE),
    "other widths": (as_bytes, ((2, 2),), WIDE),
    "expanded": (lambda a: a.expand(3, 2).contiguous() + a[:, :1].expand(3, 2), ((1, 2),), EXACT),
    "copied onto": (lambda a, b: torch.zeros(2, 3, dtype=a.dtype).copy_(a).add_(b), ((3,), (2, 1)), EXACT),
    "out": (lambda a, b: torch.add(a, b, out=torch.empty(0, dtype=a.dtype)), ((3,), (3,)), EXACT),
    "triangular solve": (
        lambda b: torch.linalg.solve_triangular(numbers(2, 3, 3) + 4 * torch.eye(3), b, upper=True),
        ((2, 3, 1),),
        WIDE,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_connects_what_changes(name):
    op, shapes, exact = CASES[name]
    found, widened = connections(op, shapes)
    there = changes(op, shapes)
    assert len(found) == len(there)
    for pattern, truth in zip(found, there, strict=True):
        assert not (truth & ~pattern).any()
        if exact:
            assert np.array_equal(pattern, truth)
    assert not exact or not widened


@pytest.mark.parametrize("kind", ["gather", "index_select", "scatter", "scatter_add", "index_add", "embedding", "masked_scatter"])
def test_an_index_that_varies_widens_the_rule(kind):
    """The index is made from a tensor marked as the point: what it picks at any other point must be connected too."""
    point, values = numbers(3), numbers(3, seed=1)
    ops: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "gather": lambda i, v: v.gather(0, i),
        "index_select": lambda i, v: v.index_select(0, i),
        "scatter": lambda i, v: torch.zeros(3, dtype=v.dtype).scatter(0, i, v),
        "scatter_add": lambda i, v: torch.zeros(4, dtype=v.dtype).scatter_add(0, i, v),
        "index_add": lambda i, v: torch.zeros(4, dtype=v.dtype).index_add(0, i, v),
        "embedding": lambda i, v: A.embedding_dense_backward(v[:, None], i, 3, -1, False),
        "masked_scatter": lambda i, v: torch.zeros(3, dtype=v.dtype).masked_scatter(i > 0, v),
    }
    tracker = _Tracker()
    tracker.give((point,), 1)
    with tracker:
        tracker.seed((values,), _each_its_own((values,)))
        result = ops[kind](point.argsort(), values)
        sets = tracker.sets_in(result).reshape(-1).numpy()
    assert tracker.sets.pattern(sets).dense().all()


def test_names_of_ops():
    assert base_name(A.add_.Tensor) == base_name(A.add.Tensor) == "add"
    assert base_name(A._index_put_impl_.default) == "_index_put_impl"
    assert base_name(torch.ops.prims.add.default) == "prims::add"
