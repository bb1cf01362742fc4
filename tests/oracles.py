"""Slow truth: derivatives by plain double backward, entry by entry, and by differences that say how good they are.

It shares no code with the package and knows nothing of `torch.func`. Functions take their tensors one by one,
`f(*tensors)`, and return a tensor of any shape; results are nested tuples, `gradient[p]` of shape out.shape + p.shape
and `hessian[p][q]` of shape out.shape + p.shape + q.shape. Everything is meant for float64 and few coordinates.

The two kinds of truth fail differently: plain double backward trusts torch's formulas but no batching rule and no
forward rule; differences of the gradient trust the first derivative alone, and `derivative_by_differences` trusts
nothing but the function.

Beside them stands what compares: `relative_error` of two trees, and `assert_unchanged` of tensors with a `snapshot`
taken before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Snapshot",
    "assert_unchanged",
    "derivative_by_differences",
    "gradient",
    "hessian",
    "hessian_by_differences",
    "matrix",
    "relative_error",
    "snapshot",
]

Function = Callable[..., Tensor]
Snapshot = list[tuple[Tensor, Tensor, int, bool]]


def gradient(f: Function, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """df/dp for every tensor p, an output entry at a time."""
    points = _fresh(tensors)
    return tuple(row.detach() for row in _jacobian(f(*points), points))


def hessian(f: Function, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """d2f/dp dq for every pair, an entry of the gradient at a time."""
    points = _fresh(tensors)
    rows = _jacobian(f(*points), points, create_graph=True)
    return tuple(tuple(block.detach() for block in _jacobian(row, points)) for row in rows)


def hessian_by_differences(f: Function, tensors: Sequence[Tensor], h: float = 2e-3) -> tuple[tuple[Tensor, ...], ...]:
    """d2f/dp dq as the central differences of the gradient, extrapolated from the steps h and h/2: error O(h^4).

    Differences run over q, so the blocks are not made symmetric: a wrong gradient shows as an asymmetry.
    """

    def row(p: int, q: int) -> Tensor:
        def gradient_in_q(moved: Tensor) -> Tensor:
            return gradient(f, [moved if k == q else tensor for k, tensor in enumerate(tensors)])[p]

        return derivative_by_differences(gradient_in_q, tensors[q], h)[0]

    return tuple(tuple(row(p, q) for q in range(len(tensors))) for p in range(len(tensors)))


def derivative_by_differences(function: Callable[[Tensor], Tensor], x: Tensor, h: float = 2e-3) -> tuple[Tensor, float]:
    """d function / dx of shape out.shape + x.shape, and an estimate of its error (the largest over all entries).

    With D(h) = (f(x + h e) - f(x - h e)) / 2h the derivative is (4 D(h/2) - D(h)) / 3 + O(h^4), the step scaled to
    the coordinate. The estimate is |D(h/2) - D(h)|: far more than extrapolation leaves where the function is smooth,
    and of the order of the error at a kink.
    """
    with torch.no_grad():
        out_shape = _evaluate(function, x).shape
        coarse, fine = (torch.empty(*out_shape, x.numel(), dtype=torch.float64) for _ in range(2))
        for j, coordinate in enumerate(x.detach().double().flatten().tolist()):
            step = h * max(1.0, abs(coordinate))
            coarse[..., j] = _central_difference(function, x, j, step)
            fine[..., j] = _central_difference(function, x, j, step / 2)
        error = float((fine - coarse).abs().max()) if fine.numel() else 0.0
        return ((4 * fine - coarse) / 3).reshape(out_shape + x.shape), error


def matrix(blocks: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor]) -> Tensor:
    """Blocks as one tensor of shape out.shape + (n, n)."""
    out_shape = blocks[0][0].shape[: blocks[0][0].ndim - 2 * tensors[0].ndim]
    rows = [
        torch.cat([block.reshape(*out_shape, p.numel(), q.numel()) for q, block in zip(tensors, row, strict=True)], dim=-1)
        for p, row in zip(tensors, blocks, strict=True)
    ]
    return torch.cat(rows, dim=-2)


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected|| over all tensors of two trees alike; ||actual|| where all expected are zero.

    Trees that differ in structure, keys, shapes or in the places of their `None`s are a failure of the test, not a
    number. Anything that is not finite is infinitely wrong.
    """
    pairs = list(_pairs(actual, expected, "result"))
    off = sum(float((a.detach().double() - b.detach().double()).square().sum()) for a, b in pairs) ** 0.5
    size = sum(float(b.detach().double().square().sum()) for _, b in pairs) ** 0.5
    error = off / size if size > 0 else off
    return error if error == error else float("inf")


def snapshot(*trees: Any) -> Snapshot:
    """What `assert_unchanged` compares with: bits, version counter and `requires_grad` of every tensor in the trees."""
    tensors = [leaf for leaf in _leaves(trees) if isinstance(leaf, Tensor)]
    return [(tensor, tensor.detach().clone(), tensor._version, tensor.requires_grad) for tensor in tensors]


def assert_unchanged(before: Snapshot) -> None:
    """Fail if a tensor was written to (even with the same bits), was made to require grad, or was given a `.grad`."""
    for tensor, copy, version, requires_grad in before:
        what = f"a tensor of shape {tuple(tensor.shape)} that belongs to the caller"
        same_bits = torch.equal(_bits(tensor), _bits(copy))
        assert same_bits, f"{what} holds {tensor.detach()}, and held {copy}"
        assert tensor._version == version, f"{what} was written to in place"
        assert tensor.requires_grad == requires_grad, f"{what} had its requires_grad changed"
        assert not tensor.is_leaf or tensor.grad is None, f"{what} was given a .grad"


# ----------------------------------------------------------------------------------------------------------------------


def _fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _jacobian(out: Tensor, points: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """d out / dp for every p, zeros where nothing connects them."""
    rows: list[list[Tensor]] = []
    for entry in out.reshape(-1):
        row: Sequence[Tensor | None] = [None] * len(points)
        if entry.requires_grad:
            row = torch.autograd.grad(entry, points, retain_graph=True, create_graph=create_graph, allow_unused=True)
        rows.append([torch.zeros_like(p) if d is None else d for p, d in zip(points, row, strict=True)])
    return [
        torch.stack(column).reshape(out.shape + p.shape) if column else p.new_zeros(out.shape + p.shape)
        for p, column in zip(points, zip(*rows, strict=True) if rows else [()] * len(points), strict=True)
    ]


def _evaluate(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The value, with gradients allowed inside: the function may be a gradient itself."""
    with torch.enable_grad():
        return torch.as_tensor(function(x)).detach().double()


def _central_difference(function: Callable[[Tensor], Tensor], x: Tensor, j: int, step: float) -> Tensor:
    def moved(by: float) -> Tensor:
        point = x.detach().clone(memory_format=torch.contiguous_format)
        point.view(-1)[j] += by
        return _evaluate(function, point)

    return (moved(step) - moved(-step)) / (2 * step)


def _pairs(actual: Any, expected: Any, path: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors at equal places of two trees, which must be alike."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict) and actual.keys() == expected.keys(), (
            f"{path}: {_what(actual)}, expected {_what(expected)}"
        )
        for key in expected:
            yield from _pairs(actual[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        alike = type(actual) is type(expected) and len(actual) == len(expected)
        assert alike, f"{path}: {_what(actual)}, expected {_what(expected)}"
        for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
            yield from _pairs(a, b, f"{path}[{k}]")
    elif expected is None:
        assert actual is None, f"{path}: {_what(actual)}, expected None"
    else:
        alike = isinstance(actual, Tensor) and actual.shape == expected.shape
        assert alike, f"{path}: {_what(actual)}, expected {_what(expected)}"
        yield actual, expected


def _what(node: Any) -> str:
    if isinstance(node, Tensor):
        return f"a tensor of shape {tuple(node.shape)}"
    if isinstance(node, dict):
        return f"a dict with keys {sorted(node)}"
    return f"a {type(node).__name__} of {len(node)}" if isinstance(node, (list, tuple)) else repr(node)


def _bits(tensor: Tensor) -> Tensor:
    """Bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (dict, list, tuple)):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(child)
    else:
        yield tree
