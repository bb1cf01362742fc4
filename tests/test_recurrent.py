"""Recurrent layers mapped over samples, over parameters or both: every product and Hessian is that of a loop over them.

Truth is double backward by plain autograd through torch's own layer, an entry at a time, a sample at a time, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import functional_hess as fh

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
Params = dict[str, Tensor]

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": lambda **options: nn.LSTM(2, 2, **options),
    "GRU": lambda **options: nn.GRU(2, 2, **options),
    "RNN tanh": lambda **options: nn.RNN(2, 2, **options),
    "RNN relu": lambda **options: nn.RNN(2, 2, nonlinearity="relu", **options),
    "LSTM with projections": lambda **options: nn.LSTM(2, 2, proj_size=1, **options),
    "GRU both ways": lambda **options: nn.GRU(2, 1, bidirectional=True, **options),
    "LSTM of two layers": lambda **options: nn.LSTM(2, 1, 2, **options),
}
LAYOUTS = ("time first", "batch first", "one sequence", "packed", "packed batch first, padded again")
SHAPES = {"batch first": (2, 3, 2), "one sequence": (3, 2), "packed batch first, padded again": (2, 3, 2)}
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5}
layers = pytest.mark.parametrize("kind", LAYERS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem(kind: str, layout: str) -> tuple[Callable[..., Tensor], Params, Tensor, Tensor]:
    """``loss(params, x)`` of one sample, parameters, three samples, and three sets of directions in one vector each."""
    draw = torch.Generator().manual_seed(4)
    net = LAYERS[kind](batch_first="batch first" in layout).double()
    params = {name: 0.8 * torch.randn(p.shape, generator=draw, dtype=torch.float64) for name, p in net.named_parameters()}
    xs = torch.randn(3, *SHAPES.get(layout, (3, 2, 2)), generator=draw, dtype=torch.float64)

    def run(params: Params, x: Tensor) -> list[Tensor]:
        if "packed" not in layout:
            out, state = functional_call(net, params, (x,))
        else:
            first = "batch first" in layout
            rows = pack_padded_sequence(x, [2, 3], batch_first=first, enforce_sorted=False)
            out, state = functional_call(net, params, (rows,))
            out = pad_packed_sequence(out, first, 0.3)[0] if "again" in layout else out.data
        return [out, *((state,) if isinstance(state, Tensor) else state)]

    def loss(params: Params, x: Tensor) -> Tensor:
        parts = [(y.sin() * torch.linspace(0.4, 1.2, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in run(params, x)]
        return torch.stack(parts).sum()

    v = torch.randn(3, sum(p.numel() for p in params.values()), generator=draw, dtype=torch.float64)
    return loss, params, xs, v


def true_hessian(loss: Callable[..., Tensor], params: Params, x: Tensor) -> Tensor:
    """(n, n), parameters in the order of the dict."""
    names, tensors = list(params), tuple(params.values())
    return oracles.matrix(oracles.hessian(lambda *p: loss(dict(zip(names, p, strict=True)), x), tensors), tensors)


def split(vector: Tensor, like: Params) -> Params:
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def joined(tree: Params, names: Any) -> Tensor:
    return torch.cat([tree[name].flatten() for name in names])


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return {name: p.to(dtype) for name, p in tree.items()} if isinstance(tree, dict) else tree.to(dtype)


@layers
@layouts
@dtypes
def test_a_product_mapped_over_samples_and_directions_is_that_of_a_loop(kind: str, layout: str, dtype: torch.dtype) -> None:
    loss, params, xs, v = problem(kind, layout)
    truth = torch.stack([true_hessian(loss, params, x) @ u for x, u in zip(xs, v, strict=True)])
    w, xs, v = cast(params, dtype), xs.to(dtype), v.to(dtype)

    def product(x: Tensor, u: Tensor) -> Tensor:
        return joined(fh.hvp(loss, w, split(u, w), x), w)

    assert oracles.relative_error(fh.vmap(product)(xs, v), truth) < DTYPES[dtype]


@layers
@dtypes
def test_hessians_mapped_over_samples_and_over_parameters_are_those_of_a_loop(kind: str, dtype: torch.dtype) -> None:
    loss, params, xs, _ = problem(kind, "batch first")
    scales = (1.0, 0.9, 1.2)
    truth = torch.stack([true_hessian(loss, {k: s * p for k, p in params.items()}, x) for s, x in zip(scales, xs, strict=True)])
    many = {k: torch.stack([s * p for s in scales]).to(dtype) for k, p in params.items()}

    def matrix(w: Params, x: Tensor) -> Tensor:
        H = fh.hessian(loss)(w, x)
        return torch.cat([torch.cat([H[p][q].reshape(w[p].numel(), -1) for q in params], 1) for p in params])

    def diagonal(w: Params, x: Tensor) -> Tensor:
        return joined(fh.hessian_diagonal(loss)(w, x), params)

    assert oracles.relative_error(fh.vmap(matrix)(many, xs.to(dtype)), truth) < DTYPES[dtype]
    assert oracles.relative_error(fh.vmap(diagonal)(many, xs.to(dtype)), truth.diagonal(dim1=1, dim2=2)) < DTYPES[dtype]
    if dtype is torch.float64:  # torch.func's own vmap, of parameters alone
        found = torch.func.vmap(matrix, (0, None))(many, xs[0])
        assert oracles.relative_error(found[0], truth[0]) < DTYPES[dtype]


@layers
@pytest.mark.parametrize("layout", ["time first", "packed"])
@dtypes
def test_derivatives_of_a_mapped_mean_are_means_of_derivatives(kind: str, layout: str, dtype: torch.dtype) -> None:
    """`vmap` inside f, which is how a batch is written; and by the sequences, not by the parameters."""
    loss, params, xs, v = problem(kind, layout)
    truth = torch.stack([true_hessian(loss, params, x) for x in xs]).mean(0) @ v[0]
    w, points = cast(params, dtype), xs.to(dtype)
    by_points = torch.stack([oracles.hessian(lambda x: loss(params, x), (x,))[0][0].reshape(x.numel(), -1) for x in xs])

    def mean(w: Params) -> Tensor:
        return fh.vmap(loss, (None, 0))(w, points).mean()

    assert oracles.relative_error(joined(fh.hvp(mean, w, split(v[0].to(dtype), w)), w), truth) < DTYPES[dtype]
    slope = oracles.gradient(
        lambda *p: torch.stack([loss(dict(zip(w, p, strict=True)), x) for x in xs]).mean(), [*params.values()]
    )
    assert oracles.relative_error(fh.grad(mean)(w), dict(zip(w, slope, strict=True))) < DTYPES[dtype]
    product = fh.hvp(lambda x: fh.vmap(loss, (None, 0))(w, x).sum(), points, torch.ones_like(points))
    assert oracles.relative_error(product.reshape(3, -1), by_points.sum(-1)) < DTYPES[dtype]
