"""Networks: the layers whose second derivatives torch has wrong, and those that people use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Network, network, numbers
from oracles import derivative_by_differences, gradient, hessian_by_differences, relative_error
from oracles import hessian as oracle_hessian
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from functional_hess import Space, grad, hessian, hessian_blocks, hessian_diagonal, hessian_rows, hvp, jvp
from functional_hess import vmap as fh_vmap
from functional_hess.products import MODES

FORWARD, REVERSE, DOUBLE, _ = MODES


def net(norm: Callable[[], nn.Module], *shape: int, features: int = 3) -> Network:
    """Linear, the norm over its features, a bend, linear."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(2, features), norm()
            self.last = nn.Linear(features, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            channels_last = h.dim() == 3  # norms over channels take them second
            h = self.norm(h.transpose(1, 2)).transpose(1, 2) if channels_last else self.norm(h)
            return self.last(torch.tanh(h))

    return network(Normed, numbers(*shape, 2, seed=11))


NORMS: dict[str, Callable[[], Network]] = {
    "LayerNorm": lambda: net(lambda: nn.LayerNorm(3), 4),
    "BatchNorm": lambda: net(lambda: nn.BatchNorm1d(3, track_running_stats=False), 5),
    "GroupNorm": lambda: net(lambda: nn.GroupNorm(2, 4), 4, features=4),
    "RMSNorm": lambda: net(lambda: nn.RMSNorm(3), 4),
    "InstanceNorm": lambda: net(lambda: nn.InstanceNorm1d(3, affine=True), 2, 4),
}
every_norm = pytest.mark.parametrize("name", NORMS)


@functools.cache
def true_hessian(name: str) -> Tensor:
    """(n, n) by differences of the gradient."""
    of = NORMS[name]()
    return hessian_by_differences(of.of_vector, [of.vector], 5e-4)[0][0]


def blocks_of(of: Network, matrix: Tensor) -> dict[str, dict[str, Tensor]]:
    names = sorted(of.x)
    sizes = [of.x[p].numel() for p in names]
    return {
        p: {q: part.reshape(of.x[p].shape + of.x[q].shape) for q, part in zip(names, rows.split(sizes, 1), strict=True)}
        for p, rows in zip(names, matrix.split(sizes), strict=True)
    }


# Norms: second order --------------------------------------------------------------------------------------------------


@every_norm
@pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE, DOUBLE])
def test_norms_are_right_in_products_rows_diagonal_blocks_and_hessian(name, mode):
    of, H = NORMS[name](), true_hessian(name)
    v = numbers(len(H), seed=2)
    assert relative_error(hvp(of.f, of.x, of.tree(v), mode=mode), of.tree(H @ v)) < 1e-8
    blocks = hessian(of.f, mode=mode)(of.x)
    assert relative_error(blocks, blocks_of(of, H)) < 1e-8
    rows = torch.cat([part for _, part in hessian_rows(of.f, mode=mode, chunk_size=5)(of.x)])
    assert relative_error(rows, H) < 1e-8
    assert relative_error(hessian_diagonal(of.f, mode=mode)(of.x), of.tree(H.diagonal())) < 1e-8
    assert relative_error(hessian_blocks(of.f, mode=mode)(of.x), {p: blocks_of(of, H)[p][p] for p in of.x}) < 1e-8


def test_norms_are_right_where_torch_func_is_more_than_a_percent_off():
    wrong = []
    for name in NORMS:
        of, H = NORMS[name](), true_hessian(name)
        space = Space.of(of.x)
        assert relative_error(space.matrix(hessian(of.f)(of.x)), H) < 1e-8
        if relative_error(space.matrix(torch.func.hessian(of.f)(of.x)), H) > 0.01:
            wrong.append(name)
    assert len(wrong) >= 2, wrong


@every_norm
def test_norms_are_right_in_a_hand_composed_product(name):
    of, H = NORMS[name](), true_hessian(name)
    v = numbers(len(H), seed=2)
    assert relative_error(jvp(grad(of.f), (of.x,), (of.tree(v),))[1], of.tree(H @ v)) < 1e-8
    assert relative_error(torch.func.jvp(grad(of.f), (of.x,), (of.tree(v),))[1], of.tree(H @ v)) < 1e-8


@every_norm
def test_norms_are_right_where_f_itself_maps_over_gradients(name):
    """f holds vmap(grad(.)): the loss is the squared gradient at two points."""
    of = NORMS[name]()

    def squared_gradient(x: dict[str, Tensor]) -> Tensor:
        near = {key: torch.stack([t, 1.1 * t]) for key, t in x.items()}
        return sum((t**2).sum() for t in torch.func.vmap(grad(of.f))(near).values())

    def by_loops(vector: Tensor) -> Tensor:
        """Its gradient, 2 (H(x) g(x) + 1.1 H(1.1 x) g(1.1 x)), by plain autograd."""
        total = torch.zeros_like(vector)
        for factor in (1.0, 1.1):
            point = (factor * vector).detach().requires_grad_()
            (g,) = torch.autograd.grad(of.of_vector(point), point, create_graph=True)
            (part,) = torch.autograd.grad((g**2).sum(), point)
            total = total + factor * part
        return total

    assert relative_error(grad(squared_gradient)(of.x), of.tree(by_loops(of.vector))) < 1e-10
    v = numbers(len(of.vector), seed=3)
    truth, _ = derivative_by_differences(lambda t: by_loops(of.vector + t * v), torch.zeros((), dtype=torch.float64), 5e-4)
    assert relative_error(hvp(squared_gradient, of.x, of.tree(v)), of.tree(truth)) < 1e-7


@every_norm
@pytest.mark.parametrize("vmap", [fh_vmap, torch.func.vmap], ids=["ours", "torch's"])
def test_norms_are_right_in_a_batch_of_points(name, vmap):
    of, factors = NORMS[name](), (1.0, 1.1)
    batch = {key: torch.stack([factor * t for factor in factors]) for key, t in of.x.items()}
    far = hessian_by_differences(of.of_vector, [factors[1] * of.vector], 5e-4)[0][0]
    H, v = torch.stack([true_hessian(name), far]), numbers(len(far), seed=2)
    space = Space.of(of.x)
    for mode in ("auto", FORWARD, REVERSE):
        product = vmap(lambda x, mode=mode: space.ravel(hvp(of.f, x, of.tree(v), mode=mode)))(batch)
        assert relative_error(product, H @ v) < 1e-8
        assert relative_error(vmap(lambda x, mode=mode: space.matrix(hessian(of.f, mode=mode)(x)))(batch), H) < 1e-8
        diagonal = vmap(lambda x, mode=mode: space.ravel(hessian_diagonal(of.f, mode=mode)(x)))(batch)
        assert relative_error(diagonal, H.diagonal(dim1=1, dim2=2)) < 1e-8
        rows = vmap(lambda x, mode=mode: torch.cat([t for _, t in hessian_rows(of.f, mode=mode, chunk_size=5)(x)]))(batch)
        assert relative_error(rows, H) < 1e-8


# Norms: third order ---------------------------------------------------------------------------------------------------


DIRECTIONS = 4


@functools.cache
def true_slopes_of_the_trace(name: str) -> Tensor:
    """The derivative of the trace of H along each of some random directions, by differences; H by plain autograd."""
    of = NORMS[name]()

    def trace(t: Tensor) -> Tensor:
        return torch.trace(oracle_hessian(of.of_vector, [of.vector + t @ directions(of)])[0][0])

    return derivative_by_differences(trace, torch.zeros(DIRECTIONS, dtype=torch.float64), 1e-3)[0]


def directions(of: Network) -> Tensor:
    return numbers(DIRECTIONS, len(of.vector), seed=13) / len(of.vector) ** 0.5


def slopes(of: Network, gradient: dict[str, Tensor]) -> Tensor:
    assert gradient.keys() == of.x.keys() and all(gradient[key].shape == t.shape for key, t in of.x.items())
    return directions(of) @ torch.cat([gradient[key].reshape(-1) for key in sorted(gradient)])


def trace_of_blocks(f: Callable[..., Tensor], x: dict[str, Tensor]) -> Tensor:
    H = hessian(f)(x)
    return sum(torch.trace(H[p][p].reshape(t.numel(), t.numel())) for p, t in x.items())


def sum_of_diagonal(f: Callable[..., Tensor], x: dict[str, Tensor]) -> Tensor:
    return sum(part.sum() for part in hessian_diagonal(f)(x).values())


@every_norm
@pytest.mark.parametrize("trace", [trace_of_blocks, sum_of_diagonal])
def test_the_gradient_of_the_trace_of_the_hessian_is_right_through_norms(name, trace):
    of = NORMS[name]()
    truth = true_slopes_of_the_trace(name)
    assert float(truth.abs().min()) > 1e-3
    assert relative_error(slopes(of, grad(lambda x: trace(of.f, x))(of.x)), truth) < 1e-6
    assert relative_error(slopes(of, torch.func.grad(lambda x: trace(of.f, x))(of.x)), truth) < 1e-6
    watched = {key: t.clone().requires_grad_() for key, t in of.x.items()}
    trace(of.f, watched).backward()
    assert relative_error(slopes(of, {key: t.grad for key, t in watched.items()}), truth) < 1e-6


@every_norm
@pytest.mark.parametrize("trace", [trace_of_blocks, sum_of_diagonal])
@pytest.mark.parametrize("vmap", [fh_vmap, torch.func.vmap], ids=["ours", "torch's"])
def test_that_gradient_is_right_in_a_batch_of_points(name, trace, vmap):
    """The batch inside the gradient and outside of it, ours and torch's."""
    of, truth = NORMS[name](), true_slopes_of_the_trace(name)
    batch = {key: torch.stack([0.9 * t, t]) for key, t in of.x.items()}
    for derivative in (grad, torch.func.grad):
        outside = vmap(derivative(lambda x: trace(of.f, x)))(batch)
        inside = derivative(lambda batch: vmap(lambda x: trace(of.f, x))(batch).sum())(batch)
        for found in (outside, inside):
            assert relative_error(slopes(of, {key: t[1] for key, t in found.items()}), truth) < 1e-6


def test_the_third_order_oracle_stands_on_a_second_that_differences_confirm():
    for name in NORMS:
        of = NORMS[name]()
        assert relative_error(oracle_hessian(of.of_vector, [of.vector])[0][0], true_hessian(name)) < 1e-8


# Networks that people use ---------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(torch.tanh(self.first(x)), 2)
        return self.head(F.softplus(self.second(h)).mean((-2, -1)))


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(2, 6), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.scaled_dot_product_attention(*self.project(x).chunk(3, -1)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][-1])


def classified(out: Tensor) -> Tensor:
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[-1], label_smoothing=0.1)


def regressed(out: Tensor) -> Tensor:
    return F.mse_loss(out, torch.ones_like(out))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Any], Tensor]]] = {
    "convolutional": (Convolutional, (3, 1, 6, 6), classified),
    "attention": (Attentive, (3, 4, 2), regressed),
    "LSTM": (Recurrent, (3, 3, 2), classified),
    "perceptron": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), (5, 3), classified),
    "deep perceptron with a norm": (
        lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.SiLU(), nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1)),
        (4, 2),
        regressed,
    ),
}


@functools.cache
def true_matrix(name: str) -> Tensor:
    make, shape, loss = NETWORKS[name]
    of = network(make, numbers(*shape, seed=4), loss=loss)
    with sdpa_kernel(SDPBackend.MATH):
        return hessian_by_differences(of.of_vector, [of.vector], 5e-4)[0][0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=["float64", "float32"])
def test_hessians_of_networks_are_those_of_differences(name, dtype, tolerance):
    make, shape, loss = NETWORKS[name]
    of = network(make, numbers(*shape, seed=4), loss=loss, dtype=dtype)
    # differences are taken where the float32 network is: its parameters are the float64 ones, rounded
    assert relative_error(of.vector, network(make, numbers(*shape, seed=4), loss=loss).vector) < 1e-6
    H = Space.of(of.x).matrix(hessian(of.f)(of.x))
    assert H.dtype == dtype
    assert relative_error(H, true_matrix(name)) < tolerance
    u, v = of.tree(numbers(len(H), seed=6)), of.tree(numbers(len(H), seed=7))
    u, v = ({key: t.to(dtype) for key, t in tree.items()} for tree in (u, v))
    Hu, Hv = hvp(of.f, of.x, u), hvp(of.f, of.x, v)
    left, right = (sum(float((a[k] * b[k]).double().sum()) for k in of.x) for a, b in ((u, Hv), (v, Hu)))
    assert abs(left - right) < tolerance * max(abs(left), 1e-3)


def test_the_gradient_of_a_network_is_that_of_plain_autograd():
    for name, (make, shape, loss) in NETWORKS.items():
        of = network(make, numbers(*shape, seed=4), loss=loss)
        assert relative_error(grad(of.f)(of.x), of.tree(gradient(of.of_vector, [of.vector])[0])) < 1e-12, name
