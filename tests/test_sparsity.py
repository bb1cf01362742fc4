"""Patterns found by running a product once, against dense truth at several points: no nonzero may be missed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from networks import network, numbers
from scenarios import SCENARIOS, VECTOR_SCENARIOS, Scenario, flat_function, rebuild, tensors
from torch import Tensor, nn

from functional_hess import sparsity
from functional_hess.patterns import SparsityPattern, banded, blocks
from functional_hess.sparsity import Detection, SparsityError, detect_hessian, detect_jacobian

Function = Callable[..., Tensor]


def detected(f: Function, *x: Tensor, args: tuple[Tensor, ...] = ()) -> Detection:
    return detect_hessian("sparse_hessian", f, lambda *point: (f(*point), None), x, args)


def truth(f: Function, *x: Tensor) -> np.ndarray:
    """Where the Hessian differs from zero at one point, by more than rounding."""
    H = oracles.matrix(oracles.hessian(f, x), x).abs()
    return (1e-14 * H.max() < H).numpy()


def missed(pattern: SparsityPattern, there: np.ndarray) -> int:
    return int((there & ~pattern.dense()).sum())


# ---------------------------------------------------------------------------------------------------- functions

INDEX = torch.tensor([0, 2, 2, 5, 1])
MATRIX = numbers(4, 8, seed=5) * (numbers(4, 8, seed=6) > 0.5)  # with zeros
POSITIVE = numbers(8, 8, seed=7) @ numbers(8, 8, seed=7).T + 8 * torch.eye(8, dtype=torch.float64)


class StraightThrough(torch.autograd.Function):
    """Rounds on the way, and has the derivative of the identity."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def vmap(info, in_dims, x):
        return StraightThrough.apply(x), in_dims[0]


class ByNumpy(torch.autograd.Function):
    """The sine, computed where no dispatch mode sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if g.requires_grad or x.requires_grad:
            return ByNumpyCosine.apply(g, x)
        return torch.from_numpy(g.numpy() * np.cos(x.numpy()))


class ByNumpyCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return torch.from_numpy(g.detach().numpy() * np.cos(x.detach().numpy()))

    @staticmethod
    def backward(ctx, gg):
        g, x = (t.detach().numpy() for t in ctx.saved_tensors)
        return torch.from_numpy(gg.detach().numpy() * np.cos(x)), torch.from_numpy(-gg.detach().numpy() * g * np.sin(x))


def in_place_through_a_view(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(2, 4)[0].mul_(x[4:])
    y[1:3] += x[5:7] ** 2
    return (y**3).sum()


def in_place_through_a_reshaped_diagonal(x: Tensor) -> Tensor:
    a = x[:4].view(2, 2).clone()
    a.diagonal().mul_(x[4:6])
    a.t()[0].add_(x[6:] ** 3)
    return (a**2).sum()


def written_with_an_index(x: Tensor) -> Tensor:
    y = torch.zeros(6, dtype=x.dtype)
    y[INDEX] = x[:5] ** 2
    y.index_add_(0, torch.tensor([1, 1, 4]), x[5:])
    return (y**2).sum()


def recurrence(x: Tensor) -> Tensor:
    h = x[0]
    for k in range(1, 8):
        h = torch.sin(h * x[k]) if k != 4 else x[k] ** 2
    return h


def shared_weights(x: Tensor) -> Tensor:
    w = x[:4].view(2, 2)
    return torch.tanh(w @ torch.tanh(w @ x[4:6])).sum() + x[6] ** 3


def attention(x: Tensor) -> Tensor:
    q = x.view(1, 2, 4)
    return F.scaled_dot_product_attention(q, q, q)[0, 0].sum()


def inner_gradient(x: Tensor) -> Tensor:
    g = torch.func.grad(lambda z: (z[1:] * z[:-1] ** 2).sum())(x)
    return (g**2).sum()


def laplacian_inside(x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(torch.func.grad(lambda z: torch.sin(z) * z**2)))(x).pow(2).sum()


def stencil(x: Tensor) -> Tensor:
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=x.dtype)[None, None]
    return (F.conv2d(x.view(1, 1, 3, 4), kernel, padding=1).exp()).sum()


def scattered_by_itself(x: Tensor) -> Tensor:
    rows = x.view(2, 4)
    return torch.zeros(2, 4, dtype=x.dtype).scatter(1, rows.argsort(1), rows**2).prod(0).sum()


def sampled(x: Tensor) -> Tensor:
    return F.grid_sample(x[:4].view(1, 1, 2, 2), x[4:6].view(1, 1, 1, 2).tanh(), align_corners=True).pow(3).sum()


def cases() -> list[tuple[str, Function, int]]:
    """Functions of a vector of that many numbers, for which the pattern is exact."""
    return [
        # elementwise, and neighbors
        ("cube", lambda x: (x**3).sum(), 8),
        ("linear", lambda x: (2 * x).sum() + 0 * (x**1).sum(), 8),
        ("rosenbrock", lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), 8),
        ("softplus", lambda x: F.softplus(x[::2] * x[1::2]).sum(), 8),
        ("gelu", lambda x: F.gelu(x).sum(), 8),
        ("silu", lambda x: F.silu(x * x.flip(0)).sum(), 8),
        ("elu", lambda x: F.elu(x).pow(2).sum(), 8),
        ("leaky_relu", lambda x: (F.leaky_relu(x, 0.1) ** 3).sum(), 8),
        ("mish", lambda x: F.mish(x).sum(), 8),
        ("hardtanh", lambda x: (F.hardtanh(x, -9, 9) ** 3).sum(), 8),
        ("logsigmoid", lambda x: F.logsigmoid(x[:4] - x[4:]).sum(), 8),
        ("clamp", lambda x: (x.clamp(-9, 9) ** 2).sum(), 8),
        ("maximum of a constant", lambda x: torch.maximum(x**2, numbers(8)).pow(2).sum(), 8),
        ("prelu", lambda x: (F.prelu(x[:6], x[6:7].abs()) ** 2).sum(), 8),
        ("xlogy", lambda x: torch.xlogy(x[:4] ** 2, x[4:] ** 2 + 1).sum(), 8),
        ("two leaves of a product", lambda x: (x[:4] * x[4:]).sum(), 8),
        ("mse_loss", lambda x: F.mse_loss(torch.sin(x), numbers(8)), 8),
        ("huber_loss", lambda x: F.huber_loss(x**2, numbers(8) * 9, delta=100.0), 8),
        ("smooth_l1_loss", lambda x: F.smooth_l1_loss(x**2, numbers(8), beta=100.0), 8),
        ("ldexp", lambda x: torch.ldexp(x**2, torch.tensor([1, 2, 0, 1, 3, 1, 2, 1])).sum(), 8),
        # data movement
        ("flip", lambda x: (x * x.flip(0)).pow(2).sum(), 8),
        ("roll", lambda x: (x * x.roll(3)).sin().sum(), 8),
        ("permuted", lambda x: (x.view(2, 4).t().reshape(-1) * x).sin().sum(), 8),
        ("stack", lambda x: torch.stack([x[:4], x[4:] ** 2]).prod(0).sum(), 8),
        ("cat", lambda x: torch.cat([x[2:5] ** 2, x[:2] * x[6:]]).sin().sum(), 8),
        ("repeat", lambda x: (x[:4].repeat(2) * x).sin().sum(), 8),
        ("repeat_interleave", lambda x: (x[:4].repeat_interleave(2) * x).sin().sum(), 8),
        ("expand", lambda x: (x[:2, None].expand(2, 3) * x[2:5]).sin().sum(), 8),
        ("gather", lambda x: (x.gather(0, INDEX) ** 2 * x[3:]).sum(), 8),
        ("index", lambda x: (x[INDEX] * x[[4, 4, 0, 1, 7]]).sin().sum(), 8),
        ("index of two", lambda x: x.view(2, 4)[torch.tensor([0, 1, 1]), torch.tensor([3, 0, 3])].pow(3).sum(), 8),
        ("boolean constant mask", lambda x: (x[numbers(8) > 0] ** 3).sum(), 8),
        ("masked_select", lambda x: x.masked_select(numbers(8) > 0).sin().sum(), 8),
        ("index_select", lambda x: x.view(4, 2).index_select(0, torch.tensor([3, 0, 3])).prod(1).sum(), 8),
        ("take_along_dim", lambda x: torch.take_along_dim(x.view(2, 4), torch.tensor([[1], [2]]), 1).pow(3).sum(), 8),
        ("col2im", lambda x: F.fold(x[:6].view(1, 3, 2), (1, 4), (1, 3)).pow(3).sum(), 8),
        ("masked_scatter", lambda x: x.masked_scatter(numbers(8) > 0, x[:4] ** 2).pow(2).sum(), 8),
        ("nearest upsampling", lambda x: F.interpolate(x.view(1, 2, 4), scale_factor=2, mode="nearest").pow(3).sum(), 8),
        ("diag_embed", lambda x: (torch.diag_embed(x[:4]) * x[4:]).pow(2).sum(), 8),
        ("diagonal", lambda x: (x[:4].view(2, 2).diagonal() ** 2 * x[6:]).sum(), 8),
        ("constant pad", lambda x: (F.pad(x, (1, 2), value=3.0)[2:10] * x).sin().sum(), 8),
        ("reflection pad", lambda x: (F.pad(x.view(1, 1, 8), (2, 2), mode="reflect")[0, 0, :8] * x).sin().sum(), 8),
        ("replication pad", lambda x: (F.pad(x.view(1, 1, 8), (2, 2), mode="replicate")[0, 0, :8] * x).sin().sum(), 8),
        ("circular pad", lambda x: (F.pad(x.view(1, 1, 8), (2, 2), mode="circular")[0, 0, :8] * x).sin().sum(), 8),
        ("windows", lambda x: x.unfold(0, 3, 2).prod(1).sin().sum(), 8),
        ("as_strided", lambda x: x.as_strided((3, 2), (2, 3)).prod(1).sum(), 8),
        ("im2col", lambda x: F.unfold(x.view(1, 1, 2, 4), (2, 2)).prod(1).sum(), 8),
        ("pixel_shuffle", lambda x: F.pixel_shuffle(x.view(1, 4, 1, 2), 2).pow(3).sum(), 8),
        ("complex view", lambda x: (torch.view_as_complex(x.view(4, 2)).abs() ** 4).sum(), 8),
        (
            "split and unbind",
            lambda x: sum((a * b).sin().sum() for a, b in zip(*(p.unbind() for p in x.split(4)), strict=True)),
            8,
        ),
        ("embedding", lambda x: F.embedding(torch.tensor([[0, 3], [3, 1]]), x.view(4, 2)).prod(1).sin().sum(), 8),
        (
            "triangle",
            lambda x: x[torch.triu_indices(4, 4, 1)[0]].mul(x[torch.triu_indices(4, 4, 1)[1]]).sin().sum() + x[7] ** 2,
            8,
        ),
        # in place
        ("in place through a view", in_place_through_a_view, 8),
        ("in place through a diagonal", in_place_through_a_reshaped_diagonal, 8),
        ("written with an index", written_with_an_index, 8),
        ("scatter_add", lambda x: torch.zeros(4, dtype=x.dtype).scatter_add(0, INDEX % 4, x[:5]).pow(2).sum(), 8),
        ("scatter", lambda x: (x.scatter(0, torch.tensor([1, 3]), x[6:] ** 2) ** 2).sum(), 8),
        ("index_copy", lambda x: (x.index_copy(0, torch.tensor([1, 3]), x[6:] ** 2) ** 2).sum(), 8),
        ("index_fill", lambda x: (x.index_fill(0, torch.tensor([1, 3]), 2.0) ** 3).sum(), 8),
        ("slice_scatter", lambda x: (torch.slice_scatter(x, x[:2] ** 2, 0, 4, 6) ** 2).sum(), 8),
        # sums and products
        ("constant", lambda x: x.sum() * 0 + 1, 4),
        ("sum of squares of sums", lambda x: x.view(2, 4).sum(1).pow(2).sum(), 8),
        ("mean", lambda x: x.view(2, 4).mean(0, keepdim=True).exp().sum(), 8),
        ("norm", lambda x: x.view(2, 4).norm(dim=1).sum(), 8),
        ("variance", lambda x: x.view(2, 4).var(1).sum(), 8),
        ("logsumexp", lambda x: x.view(2, 4).logsumexp(0).sum(), 8),
        ("products of rows", lambda x: x.view(4, 2).prod(1).sum(), 8),
        ("matrix with zeros", lambda x: torch.tanh(numbers(4, 4) @ x[:4]).sum() + (x[4:] ** 3).sum(), 8),
        ("matrix product", lambda x: (x[:4].view(2, 2) @ x[4:].view(2, 2)).sum(), 8),
        ("batched product", lambda x: torch.bmm(x[:4].view(2, 1, 2), x[4:].view(2, 2, 1)).sin().sum(), 8),
        ("dot", lambda x: x[:3] @ x[3:6] + x[6] ** 2, 8),
        ("einsum", lambda x: torch.einsum("ij,ij->i", x.view(2, 4), x.view(2, 4).flip(0)).pow(2).sum(), 8),
        ("outer", lambda x: torch.outer(x[:2], x[2:4]).pow(2).sum() + x[5] ** 3, 8),
        ("addmm", lambda x: torch.addmm(x[:2], x[2:4, None], x[4:6][None]).sin().sum(), 8),
        (
            "quadratic form of blocks",
            lambda x: (x[:4] @ POSITIVE[:4, :4] @ x[:4]) * 0.5 + (x[4:] @ POSITIVE[4:, 4:] @ x[4:]) ** 2,
            8,
        ),
        ("distances", lambda x: (x.view(4, 2)[:2, None] - x.view(4, 2)[None, 2:]).norm(dim=-1).sum(), 8),
        ("one conv1d", lambda x: F.conv1d(x.view(1, 1, 8), numbers(1, 1, 3), padding=1).exp().sum(), 8),
        ("strided, dilated conv1d", lambda x: F.conv1d(x.view(1, 1, 8), numbers(2, 1, 3), stride=2, dilation=2).exp().sum(), 8),
        ("grouped conv1d", lambda x: F.conv1d(x.view(1, 2, 4), numbers(4, 1, 2), groups=2).exp().sum(), 8),
        ("conv_transpose1d", lambda x: F.conv_transpose1d(x.view(1, 2, 4), numbers(2, 1, 3), stride=2).exp().sum(), 8),
        ("layer norm of rows", lambda x: F.layer_norm(x.view(2, 4), (4,)).pow(3).sum(), 8),
        ("softmax of rows", lambda x: x.view(2, 4).softmax(1).pow(2).sum(), 8),
        ("log_softmax of columns", lambda x: x.view(2, 4).log_softmax(0)[0].exp().sum(), 8),
        ("cross entropy of rows", lambda x: F.cross_entropy(x.view(2, 4), torch.tensor([1, 3])), 8),
        # composition
        ("recurrence", recurrence, 8),
        ("inner gradient", inner_gradient, 8),
        ("inner second derivatives", laplacian_inside, 8),
        ("vmap inside", lambda x: torch.func.vmap(lambda r: r.prod())(x.view(4, 2)).sin().sum(), 8),
        ("double detach", lambda x: (x * x.detach().roll(1)).sin().sum(), 8),
        ("straight-through estimator", lambda x: (StraightThrough.apply(9 * x) ** 2 * x.roll(1)).sum(), 8),
    ]


def wide_cases() -> list[tuple[str, Function, int]]:
    """Functions for which the pattern may be wider than need be."""
    return [
        ("tril", lambda x: (torch.tril(x[:4].view(2, 2)) @ torch.triu(x[4:].view(2, 2))).diagonal().pow(2).sum(), 8),
        ("where", lambda x: torch.where(numbers(8) > 0, x**3, x.roll(1) * x).sum(), 8),
        ("masked fill", lambda x: (x.masked_fill(numbers(8) > 0, 0.0) * x.roll(2)).sin().sum(), 8),
        ("stencil", stencil, 12),
        ("cumsum", lambda x: x.cumsum(0).sin().sum(), 8),
        ("triangular sums", lambda x: (x.cumsum(0) * torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).double()).sin().sum(), 8),
        ("cumprod", lambda x: x.cumprod(0)[4], 8),
        ("sort", lambda x: (x.sort().values * torch.arange(8)).pow(2).sum(), 8),
        ("largest", lambda x: x.view(2, 4).max(1).values.pow(3).sum(), 8),
        ("amax", lambda x: x.view(2, 4).amax(1).pow(3).sum(), 8),
        ("topk", lambda x: x.topk(3).values.prod(), 8),
        ("median", lambda x: x[:7].median() ** 3, 8),
        ("argmax as an index", lambda x: (x[x.argmax()[None]] ** 3).sum() * x[0], 8),
        ("argsort as an index", lambda x: (x[x.argsort()][:3] ** 2 * x[:3]).sum(), 8),
        ("gather where x says", lambda x: x.view(2, 4).gather(1, x.view(2, 4).argmin(1, keepdim=True)).pow(3).sum(), 8),
        ("scatter where x says", scattered_by_itself, 8),
        ("index_add where x says", lambda x: torch.zeros(8).double().index_add(0, x.argsort(), x**2).mul(x).sum(), 8),
        ("index_put where x says", lambda x: x.clone().index_put((x.argmax(),), x[0] ** 2).pow(2).sum(), 8),
        ("relu", lambda x: (F.relu(x) ** 3 * x.roll(1)).sum(), 8),
        ("max pool", lambda x: F.max_pool1d(x.view(1, 2, 4), 2).pow(3).sum(), 8),
        ("average pool", lambda x: F.avg_pool2d(x.view(1, 2, 2, 2), 2).pow(3).sum(), 8),
        ("bilinear upsampling", lambda x: F.interpolate(x.view(1, 2, 2, 2), scale_factor=2, mode="bilinear").pow(3).sum(), 8),
        ("fourier", lambda x: torch.fft.fft(x.view(2, 4)).abs().pow(4).sum(), 8),
        ("real fourier", lambda x: torch.fft.irfft(torch.fft.rfft(x.view(2, 4)) * numbers(3)).sin().sum(), 8),
        ("solve", lambda x: torch.linalg.solve(POSITIVE + torch.diag(x), numbers(8)).pow(2).sum(), 8),
        ("triangular solve", lambda x: torch.linalg.solve_triangular(POSITIVE, x[:, None] ** 2, upper=True).sum(), 8),
        ("logdet", lambda x: torch.logdet(POSITIVE[:4, :4] + torch.diag(x[:4])) + (x[4:] ** 3).sum(), 8),
        ("matrix_exp", lambda x: torch.matrix_exp(x.view(2, 2, 2)).sum(), 8),
        ("glu", lambda x: F.glu(x.view(2, 4)).pow(2).sum(), 8),
        ("captured matrix with zeros", lambda x: torch.tanh(MATRIX @ x).pow(2).sum(), 8),
        ("sparse matrix", lambda x: torch.sparse.mm(MATRIX.to_sparse(), x[:, None]).pow(3).sum(), 8),
        ("batch norm", lambda x: F.batch_norm(x.view(4, 2), None, None, x[:2] ** 2, x[2:4], training=True).pow(3).sum(), 8),
        ("group norm", lambda x: F.group_norm(x.view(1, 4, 2), 2).pow(3).sum(), 8),
        ("shared weights", shared_weights, 8),
        ("attention", attention, 8),
        ("weight and input of a convolution", lambda x: F.conv1d(x[:6].view(1, 2, 3), x[4:].view(1, 2, 2)).pow(3).sum(), 8),
        ("cdist", lambda x: torch.cdist(x[:4].view(2, 2), x[4:].view(2, 2), compute_mode="use_mm_for_euclid_dist").sum(), 8),
        ("cosine similarity", lambda x: F.cosine_similarity(x[:4].view(2, 2), x[4:].view(2, 2)).sum(), 8),
        ("grid_sample", sampled, 8),
        ("nll of chosen", lambda x: F.nll_loss(x.view(2, 4).sin(), torch.tensor([0, 2])), 8),
    ]


def points(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [scale * numbers(n, seed=seed).to(dtype) for seed, scale in enumerate((1.0, 0.3, 2.0, 1.0, 1.0))]


@pytest.mark.parametrize(("name", "f", "n"), cases() + wide_cases(), ids=[c[0] for c in cases() + wide_cases()])
def test_no_nonzero_is_missed(name, f, n):
    found = detected(f, numbers(n, seed=99))
    assert found.full_because is None
    there = np.logical_or.reduce([truth(f, x) for x in points(n)])
    assert missed(found.pattern, there) == 0
    if name in [c[0] for c in cases()]:
        assert np.array_equal(found.pattern.dense(), there) and not found.widened


@pytest.mark.parametrize(("name", "f", "n"), cases() + wide_cases(), ids=[c[0] for c in cases() + wide_cases()])
def test_float32_has_the_same_pattern(name, f, n):
    def narrow(x: Tensor) -> Tensor:
        return f(x.double())

    assert detected(narrow, numbers(n, seed=99).float()).pattern == detected(f, numbers(n, seed=99)).pattern


def test_there_are_enough_functions():
    assert len(cases() + wide_cases()) >= 120


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_pattern_of_a_tree_is_that_written_by_hand(scenario: Scenario):
    found = detected(flat_function(scenario), *tensors(scenario.x))
    assert missed(found.pattern, scenario.pattern) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: network(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), numbers(5, 3)),
        lambda: network(
            lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 1)),
            numbers(5, 3),
        ),
        lambda: network(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), numbers(2, 1, 5, 5)),
        lambda: network(lambda: nn.Sequential(nn.Embedding(5, 2), nn.LayerNorm(2), nn.Linear(2, 2)), torch.tensor([0, 3, 3])),
        lambda: network(lambda: nn.LSTM(2, 2), numbers(3, 1, 2), loss=lambda out: out[0].pow(2).sum()),
    ],
    ids=["mlp", "batch norm", "convolution", "embedding", "lstm"],
)
def test_networks(make):
    net = make()
    names = sorted(net.x)
    leaves = tuple(net.x[name] for name in names)

    def f(*p: Tensor) -> Tensor:
        return net.f(dict(zip(names, p, strict=True)))

    found = detected(f, *leaves)
    assert found.full_because is None and missed(found.pattern, truth(f, *leaves)) == 0


# ---------------------------------------------------------------------------------------------------- random expressions


def random_expression(rng: np.random.Generator, n: int) -> Function:
    """A scalar function of n numbers, drawn from a grammar.

    It has elementwise ops, views and data movement, indexing, gathers and scatters, sums, products, matrix products, convolution,
    norms, softmax, sorting, maxima, ``where``, cumulative sums and writes in place through views.
    """
    unary: list[Callable[[Tensor], Tensor]] = [torch.sin, torch.tanh, torch.square, F.softplus, torch.exp, torch.neg, torch.relu]
    steps: list[Callable[[list[Tensor]], Tensor]] = []

    def pick() -> int:
        return int(rng.integers(0, 10**6))

    def chosen(values: list[Tensor], i: int) -> Tensor:
        return values[-1 - i % min(len(values), 4)]

    def resized(t: Tensor, like: int) -> Tensor:
        return t.repeat(-(-like // len(t)))[:like]

    for _ in range(int(rng.integers(3, 9))):
        kind, i, j, k = int(rng.integers(0, 24)), pick(), pick(), pick()
        index = torch.from_numpy(rng.integers(0, 10**6, int(rng.integers(2, 7))))
        matrix = torch.from_numpy(rng.standard_normal((int(rng.integers(2, 6)), 3)) * (rng.random((1, 3)) < 0.7))
        step: Callable[[list[Tensor]], Tensor] = [
            lambda v, i=i, j=j: unary[j % len(unary)](chosen(v, i)),
            lambda v, i=i, j=j: chosen(v, i) * resized(chosen(v, j), len(chosen(v, i))),
            lambda v, i=i, j=j: chosen(v, i) + resized(chosen(v, j), len(chosen(v, i))) ** 2,
            lambda v, i=i, j=j: torch.cat([chosen(v, i)[::2], chosen(v, j).flip(0)])[: 2 * n],
            lambda v, i=i, index=index: chosen(v, i)[index % len(chosen(v, i))],
            lambda v, i=i, matrix=matrix: matrix @ resized(chosen(v, i), 3),
            lambda v, i=i: resized(chosen(v, i), 6).view(2, 3).sum(0),
            lambda v, i=i: resized(chosen(v, i), 6).view(3, 2).prod(1),
            lambda v, i=i, k=k: resized(chosen(v, i), 6).view(2, 3).softmax(k % 2).reshape(-1),
            lambda v, i=i: F.conv1d(resized(chosen(v, i), 6).view(1, 1, 6), torch.ones(1, 1, 2, dtype=torch.float64)).view(-1),
            lambda v, i=i, j=j: _written_between(chosen(v, i), chosen(v, j)),
            lambda v, i=i: resized(chosen(v, i), 4).sort().values,
            lambda v, i=i, index=index: torch.zeros(5).double().index_add(0, index % 5, resized(chosen(v, i), len(index))),
            lambda v, i=i, k=k: chosen(v, i).roll(k % 5) * chosen(v, i),
            lambda v, i=i: resized(chosen(v, i), 4).view(2, 2).transpose(0, 1).reshape(-1).cumsum(0),
            lambda v, i=i, j=j: torch.where(
                resized(chosen(v, i), 4) > 0, resized(chosen(v, j), 4), resized(chosen(v, i), 4) ** 2
            ),
            lambda v, i=i: resized(chosen(v, i), 6).view(3, 2).norm(dim=1),
            lambda v, i=i: F.layer_norm(resized(chosen(v, i), 6).view(2, 3), (3,)).reshape(-1),
            lambda v, i=i: resized(chosen(v, i), 6).view(2, 3).max(1).values,
            lambda v, i=i, k=k: resized(chosen(v, i), 6).view(2, 3).logsumexp(k % 2),
            lambda v, i=i, index=index: resized(chosen(v, i), 5).gather(0, index % 5),
            lambda v, i=i, j=j: resized(chosen(v, i), 4).gather(0, resized(chosen(v, j), 4).argsort()),
            lambda v, i=i, index=index: torch.zeros(4).double().scatter_add(0, index % 4, resized(chosen(v, i), len(index))),
            lambda v, i=i, j=j: (resized(chosen(v, i), 4).view(2, 2) @ resized(chosen(v, j), 4).view(2, 2)).reshape(-1),
        ][kind]
        steps.append(step)

    def f(x: Tensor) -> Tensor:
        values = [x]
        for step in steps:
            values.append(step(values).clamp(-3, 3))
        return sum((torch.sin(v) * v).sum() for v in values[-2:])  # type: ignore[return-value]

    return f


def _written_between(a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    half = len(y) // 2
    y[:half] *= b.repeat(len(y))[:half]
    return y


@pytest.mark.parametrize("seed", range(300))
def test_random_expressions(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 9))
    f = random_expression(rng, n)
    found = detected(f, numbers(n, seed=99))
    assert found.full_because is None
    there = np.logical_or.reduce([truth(f, x) for x in points(n)[1:4]])
    assert missed(found.pattern, there) == 0


def test_random_expressions_are_not_all_dense():
    """The test above would pass for a detection that says full every time."""
    shares = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(3, 9))
        shares.append(detected(random_expression(rng, n), numbers(n, seed=99)).pattern.nonzeros / n**2)
    assert np.mean(shares) < 0.8 and sum(share < 0.7 for share in shares) > 15


# ---------------------------------------------------------------------------------------------------- traps


def test_zero_times_infinity_counts():
    """At the point of detection the product is with zero; elsewhere, with anything."""

    def f(x: Tensor) -> Tensor:
        return (x[:2] * x[2:] * torch.tensor([0.0, torch.inf], dtype=torch.float64)).sum() + 0 * x[0] * x[1]

    assert detected(f, torch.zeros(4, dtype=torch.float64)).pattern == SparsityPattern.of_entries(
        [0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 1, 0], (4, 4)
    )


def test_values_at_the_point_do_not_matter():
    x = numbers(6)
    x[2:4] = 0
    f = lambda x: (x[1:] ** 2 * x[:-1] ** 2).sum()  # noqa: E731
    assert detected(f, x).pattern == detected(f, numbers(6)).pattern == banded(1)(6)


def test_captured_matrix_may_change():
    """Zeros of a captured matrix are not read, so that writing to it afterwards is safe."""
    captured = torch.zeros(4, 4, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(captured @ x).sum()

    found = detected(f, numbers(4))
    assert found.pattern == SparsityPattern.full(4, 4)
    assert [c.changed for c in found.captured] == [False]
    captured.add_(1.0)
    assert missed(found.pattern, truth(f, numbers(4))) == 0 and [c.changed for c in found.captured] == [True]


def test_captured_integers_are_reported():
    index = torch.tensor([0, 1])
    found = detected(lambda x: (x[index] ** 3).sum(), numbers(4))
    assert found.pattern.nonzeros == 2 and any(c.tensor is index for c in found.captured)


class Branches:
    """Functions that ask for a value of x."""

    @staticmethod
    def scalar(x):
        return (x**2).sum() if x.sum() > 0 else (x[0] * x) @ x

    @staticmethod
    def item(x):
        return (x**3).sum() * round(x[0].item())

    @staticmethod
    def boolean_mask(x):
        return (x[x > 0] ** 3).sum()

    @staticmethod
    def nonzero(x):
        return (x[(x > 0).nonzero()] ** 3).sum()

    @staticmethod
    def masked_select(x):
        return x.masked_select(x > 0).pow(3).sum()

    @staticmethod
    def unique(x):
        return (x**3).sum() * len(x.detach().unique())

    @staticmethod
    def equal(x):
        return (x**3).sum() if torch.equal(x, x.sort().values) else (x[:2] ** 3).sum()


@pytest.mark.parametrize(
    "f", [f.__func__ for name, f in vars(Branches).items() if not name.startswith("_")], ids=lambda f: f.__name__
)
def test_a_question_about_x_makes_the_pattern_full(f):
    found = detected(f, numbers(4))
    assert found.pattern == SparsityPattern.full(4, 4)
    assert found.full_because is not None and "asks for a value that depends on x" in found.full_because


def test_values_that_leave_torch_make_the_pattern_full():
    found = detected(lambda x: ByNumpy.apply(x).sum() + (x**3).sum(), numbers(4))
    assert found.pattern == SparsityPattern.full(4, 4)
    assert found.full_because == "f asks for a value that depends on x, by numpy"
    assert np.array_equal(truth(lambda x: ByNumpy.apply(x).sum(), numbers(4)), np.eye(4, dtype=bool))


def test_a_question_about_a_constant_is_no_question():
    found = detected(lambda x: (x**3).sum() if MATRIX.sum() > 0 else (x**2).sum(), numbers(4))
    assert found.full_because is None and found.pattern == banded(0)(4) and not found.rests_on_args


def test_a_question_about_an_argument_is_noted():
    y = numbers(4)
    for f in (
        lambda x: (x**3).sum() * y.sum().item(),
        lambda x: (x[y > 0] ** 3).sum(),
        lambda x: (x[y.argsort()[:2]] ** 3).sum(),
    ):
        found = detected(f, numbers(4), args=(y,))
        assert found.full_because is None and found.rests_on_args
    assert not detected(lambda x: (x * y).sin().sum(), numbers(4), args=(y,)).rests_on_args


def test_a_function_without_a_rule_in_reverse_mode_is_taken_to_be_full():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0] ** 2

    found = detected(lambda x: Once.apply(x).sum(), numbers(3))
    assert found.pattern == SparsityPattern.full(3, 3) and "no reverse mode has a rule" in str(found.full_because)


def test_too_large_to_be_taken_to_be_full(monkeypatch):
    monkeypatch.setattr(sparsity, "LARGEST_FULL", 15)
    with pytest.raises(
        SparsityError, match=r"could not be found \(f asks for a value .* and 4 x 4 entries are too many .* Pass pattern="
    ):
        detected(Branches.scalar, numbers(4))


def test_too_many_entries_on_the_way_make_the_pattern_full(monkeypatch):
    monkeypatch.setattr("functional_hess.index_sets.IndexSets.pattern.__defaults__", (10,))
    found = detected(lambda x: (x**2).sum() ** 2, numbers(6))
    assert found.pattern == SparsityPattern.full(6, 6) and "too many" in str(found.full_because)


def test_an_op_without_a_rule_connects_everything():
    @torch.library.custom_op("functional_hess_tests::cube", mutates_args=())
    def cube(x: Tensor) -> Tensor:
        return x**3

    cube.register_autograd(
        lambda ctx, g: g * square(ctx.x), setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0])
    )

    @torch.library.custom_op("functional_hess_tests::square", mutates_args=())
    def square(x: Tensor) -> Tensor:
        return 3 * x**2

    square.register_autograd(
        lambda ctx, g: double(g, ctx.x), setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0])
    )

    @torch.library.custom_op("functional_hess_tests::double", mutates_args=())
    def double(g: Tensor, x: Tensor) -> Tensor:
        return 6 * g * x

    found = detected(lambda x: cube(x[:3]).sum() + (x[3:] ** 2).sum(), numbers(5))
    assert found.pattern == blocks([3, 1, 1])(5)
    assert found.widened == ("functional_hess_tests.double.default",)


def test_no_memory_is_held():
    """Storages made on the way are forgotten as they are freed."""
    trackers: list[Any] = []
    before = sparsity._Tracker.__init__

    def noted(self):
        before(self)
        trackers.append(self)

    sparsity._Tracker.__init__ = noted
    try:
        detected(lambda x: sum(((x * k) ** 3).sin().sum() for k in range(50)), numbers(8))
    finally:
        sparsity._Tracker.__init__ = before
    gc.collect()
    assert len(trackers[0].marks) <= 3 and len(trackers[0].memory) <= 1


# ---------------------------------------------------------------------------------------------------- Jacobians


def jacobian_truth(f: Function, x: Tensor) -> np.ndarray:
    return (oracles.gradient(f, [x])[0] != 0).numpy()


@pytest.mark.parametrize(
    ("f", "n"),
    [
        (lambda x: x**2, 5),
        (lambda x: x[1:] * x[:-1], 5),
        (lambda x: numbers(3, 5) @ x, 5),
        (lambda x: x.view(2, 3).sum(1), 6),
        (lambda x: x.view(2, 3).softmax(1).reshape(-1), 6),
        (lambda x: torch.stack([x.sum(), *x.sin()]), 5),
        (lambda x: x[INDEX] ** 2, 6),
        (lambda x: F.conv1d(x.view(1, 1, 6), numbers(1, 1, 3)).view(-1), 6),
        (lambda x: torch.cat([x, x.new_ones(2)]), 3),
    ],
)
def test_pattern_of_a_jacobian(f, n):
    found = detect_jacobian("sparse_jacobian", lambda x: (f(x),), (numbers(n),), ())
    there = np.logical_or.reduce([jacobian_truth(f, x) for x in points(n)])
    assert np.array_equal(found.pattern.dense(), there)


def test_pattern_of_a_jacobian_of_many_outputs_and_leaves():
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a * b[:2], b**2

    found = detect_jacobian("sparse_jacobian", f, (numbers(2), numbers(3)), ())
    assert found.pattern == SparsityPattern.of_matrix(
        np.array([[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
    )


@pytest.mark.parametrize("scenario", VECTOR_SCENARIOS, ids=str)
def test_pattern_of_the_jacobian_of_a_scenario(scenario: Scenario):
    f, x = flat_function(scenario), tensors(scenario.x)
    found = detect_jacobian("sparse_jacobian", lambda *p: (f(*p),), x, ())
    gradient = torch.cat([g.reshape(scenario.value.numel(), -1) for g in oracles.gradient(f, x)], 1)
    assert missed(found.pattern, (gradient != 0).numpy()) == 0


def test_a_question_makes_the_pattern_of_a_jacobian_full():
    found = detect_jacobian("sparse_jacobian", lambda x: (x[:2] ** 2 if x.sum() > 0 else x[:2],), (numbers(3),), ())
    assert found.pattern == SparsityPattern.full(2, 3)


def test_inputs_are_left_alone():
    x, captured = numbers(4), numbers(4, 4)
    before = oracles.snapshot(x, captured)
    detected(lambda x: (captured @ x).sin().sum(), x)
    oracles.assert_unchanged(before)
    _ = rebuild
