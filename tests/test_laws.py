"""Laws that hold across the modules: what must be equal, what must compose, what must not change."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinds import KINDS
from networks import network, numbers
from oracles import derivative_by_differences, matrix, relative_error
from oracles import gradient as oracle_gradient
from oracles import hessian as oracle_hessian
from scenarios import SCENARIOS, by_name, dense_hessian, flat_function, is_differentiated, leaves, rebuild, tensors
from torch import Tensor, nn

import functional_hess as fh
from functional_hess.products import MODES

FORWARD, REVERSE, DOUBLE, _ = MODES
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
exact_mode = pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE, DOUBLE])
nested_mode = pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE])


def tangent(x: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return rebuild(x, iter([torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors(x)]))


def combination(a: float, u: Any, b: float, v: Any) -> Any:
    return rebuild(u, (a * s + b * t for s, t in zip(tensors(u), tensors(v), strict=True)))


def inner(u: Any, v: Any) -> Tensor:
    return sum((s * t).sum() for s, t in zip(tensors(u), tensors(v), strict=True))


def energy(x: Tensor) -> Tensor:
    """A smooth function with every derivative and no symmetry."""
    return torch.sin(x[0] * x[1]) + torch.exp(0.3 * x[2] * x[0]) + (x**4).sum() * 0.1 + x[1] ** 2 * x[2] ** 3


X, U, V = numbers(3), numbers(3, seed=1), numbers(3, seed=2)


def true_hessian(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return oracle_hessian(f, [x])[0][0]


# Products -------------------------------------------------------------------------------------------------------------


@every_scenario
@exact_mode
def test_hvp_is_linear(scenario, mode):
    u, v = tangent(scenario.x, 1), tangent(scenario.x, 2)
    Hu, Hv, both = (fh.hvp(scenario.f, scenario.x, t, *scenario.args, mode=mode) for t in (u, v, combination(2.5, u, -0.7, v)))
    assert relative_error(both, combination(2.5, Hu, -0.7, Hv)) < 1e-12


@every_scenario
@exact_mode
def test_independent_products_are_symmetric(scenario, mode):
    u, v = tangent(scenario.x, 3), tangent(scenario.x, 4)
    left = float(inner(u, fh.hvp(scenario.f, scenario.x, v, *scenario.args, mode=mode)))
    right = float(inner(v, fh.hvp(scenario.f, scenario.x, u, *scenario.args, mode=mode)))
    assert abs(left - right) <= 1e-12 * float(dense_hessian(scenario).norm()) * 10


@every_scenario
def test_hvp_is_the_matrix_times_the_vector(scenario):
    space = fh.Space.of(scenario.x)
    v = tangent(scenario.x, 5)
    H = space.matrix(fh.hessian(scenario.f)(scenario.x, *scenario.args))
    product = fh.hvp(scenario.f, scenario.x, v, *scenario.args)
    assert relative_error(space.ravel(product), H @ space.ravel(v)) < 1e-12


@every_scenario
def test_a_kept_pullback_of_the_gradient_is_the_product(scenario):
    v = tangent(scenario.x, 6)
    _, pullback = fh.vjp(lambda x: fh.grad(scenario.f)(x, *scenario.args), scenario.x)
    carried_as_none = rebuild(scenario.gradient, iter(tensors(v)))
    for _ in range(2):
        (product,) = pullback(carried_as_none)
        assert relative_error(product, fh.hvp(scenario.f, scenario.x, v, *scenario.args)) < 1e-12


def test_products_of_different_modes_agree_on_a_network():
    net = network(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)), numbers(5, 3))
    v = net.tree(numbers(net.vector.numel(), seed=3))
    products = [fh.hvp(net.f, net.x, v, mode=mode) for mode in (FORWARD, REVERSE, DOUBLE)]
    assert all(relative_error(product, products[0]) < 1e-12 for product in products)


# The dense family -----------------------------------------------------------------------------------------------------


@exact_mode
@pytest.mark.parametrize("verb", [fh.hessian, fh.hessian_diagonal, fh.hessian_blocks], ids=lambda verb: verb.__name__)
def test_chunks_are_all_at_once(verb, mode):
    net = network(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), numbers(5, 3))
    whole = verb(net.f, mode=mode, chunk_size=None)(net.x)
    for k in (1, 2, 3, 7, 16, 1000):
        assert relative_error(verb(net.f, mode=mode, chunk_size=k)(net.x), whole) < 1e-13


def test_parts_are_parts_of_the_whole():
    net = network(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), numbers(5, 3))
    space, H = fh.Space.of(net.x), fh.hessian(net.f)(net.x)
    matrix = space.matrix(H)
    rows = torch.cat([part for _, part in fh.hessian_rows(net.f)(net.x)])
    assert relative_error(rows, matrix) < 1e-13
    assert relative_error(space.ravel(fh.hessian_diagonal(net.f)(net.x)), matrix.diagonal()) < 1e-13
    blocks = fh.hessian_blocks(net.f)(net.x)
    assert all(relative_error(blocks[p], H[p][p]) < 1e-13 for p in net.x)
    value, g, again = fh.value_grad_and_hessian(net.f)(net.x)
    assert relative_error(again, H) < 1e-13 and relative_error(value, net.f(net.x)) < 1e-14
    assert relative_error(g, fh.grad(net.f)(net.x)) < 1e-13


@exact_mode
@pytest.mark.parametrize("chunk_size", [3, None, "auto"])
def test_the_same_call_twice_has_the_same_bits(mode, chunk_size):
    net = network(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), numbers(5, 3))
    options = {"mode": mode, "chunk_size": chunk_size}
    for call in (
        lambda: fh.hvp(net.f, net.x, net.x, mode=mode),
        lambda: fh.grad_and_hvp(net.f, net.x, net.x, mode=mode),
        lambda: fh.hessian(net.f, **options)(net.x),
        lambda: fh.value_grad_and_hessian(net.f, **options)(net.x),
        lambda: fh.hessian_diagonal(net.f, **options)(net.x),
        lambda: fh.hessian_blocks(net.f, **options)(net.x),
        lambda: [part for _, part in fh.hessian_rows(net.f, **options)(net.x)],
    ):
        first, second = tensors(call()), tensors(call())
        assert len(first) == len(second) > 0
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@exact_mode
def test_inputs_are_left_as_they_are(mode, inputs_unchanged):
    for scenario in SCENARIOS:
        v = tangent(scenario.x, 7)
        inputs_unchanged(v)  # the scenarios themselves are always watched
        run_all(scenario.f, scenario.x, v, *scenario.args, mode=mode)
    x, v = {"a": X.clone().requires_grad_(), "b": U.clone()}, {"a": V.clone(), "b": V.clone().requires_grad_()}
    inputs_unchanged(x, v)
    run_all(lambda x: energy(x["a"]) * (x["b"] ** 2).sum(), x, v, mode=mode)


def run_all(f: Callable[..., Any], x: Any, v: Any, *args: Any, mode: str) -> list[Any]:
    """Every call of the second order at a point."""
    verbs = (fh.hessian, fh.value_grad_and_hessian, fh.hessian_diagonal, fh.hessian_blocks)
    stream = [part for _, part in fh.hessian_rows(f, mode=mode, chunk_size=2)(x, *args)]
    dense = [verb(f, mode=mode, chunk_size=2)(x, *args) for verb in verbs]
    g, product = fh.grad_and_hvp(f, x, v, *args, mode=mode)
    return [fh.hvp(f, x, v, *args, mode=mode), product, stream, *dense, g]


@exact_mode
def test_a_result_has_a_graph_exactly_where_a_leaf_requires_grad_and_grad_mode_is_on(mode):
    watched = X.clone().requires_grad_()
    assert all(t.requires_grad for t in tensors(run_all(energy, watched, V, mode=mode)))
    assert not any(t.requires_grad for t in tensors(run_all(energy, X, V, mode=mode)))
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert not any(t.requires_grad for t in tensors(run_all(energy, watched, V, mode=mode)))
    tree = {"a": watched, "b": U}
    results = run_all(lambda x: energy(x["a"] * x["b"]), tree, {"a": V, "b": V}, mode=mode)
    assert all(t.requires_grad for t in tensors(results))


@exact_mode
def test_results_are_right_where_grad_mode_is_off(mode):
    with torch.no_grad():
        results = run_all(energy, X, V, mode=mode)
    H = true_hessian(energy, X)
    assert relative_error(results[0], H @ V) < 1e-12 and relative_error(results[3], H) < 1e-12


@pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE, DOUBLE])
def test_a_result_can_be_differentiated_with_respect_to_what_f_closes_over(mode):
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return energy(w * x)

    def differentiated(result: Tensor) -> Tensor:
        return torch.autograd.grad(result.sum(), w)[0]

    def sums(w: Tensor) -> Tensor:
        H = w**2 * true_hessian(energy, w * X)
        g = w * oracle_gradient(energy, [w * X])[0]
        return torch.stack([H.sum(), (H @ V).sum(), H.diagonal().sum(), g.sum()])

    truth, _ = derivative_by_differences(sums, w.detach(), 1e-3)
    assert relative_error(differentiated(fh.hessian(f, mode=mode)(X)), truth[0]) < 1e-8
    assert relative_error(differentiated(fh.hvp(f, X, V, mode=mode)), truth[1]) < 1e-8
    assert relative_error(differentiated(fh.grad_and_hvp(f, X, V, mode=mode)[1]), truth[1]) < 1e-8
    assert relative_error(differentiated(fh.grad_and_hvp(f, X, V, mode=mode)[0]), truth[3]) < 1e-8
    assert relative_error(differentiated(fh.hessian_diagonal(f, mode=mode)(X)), truth[2]) < 1e-8


# Composition ----------------------------------------------------------------------------------------------------------

BATCH = numbers(4, 3, seed=8)


@nested_mode
@pytest.mark.parametrize("vmap", [fh.vmap, torch.func.vmap], ids=["fh.vmap", "torch.func.vmap"])
def test_vmap_is_a_loop(vmap, mode):
    loop = torch.stack([true_hessian(energy, x) for x in BATCH])
    assert relative_error(vmap(fh.hessian(energy, mode=mode))(BATCH), loop) < 1e-12
    assert relative_error(vmap(fh.hessian(energy, mode=mode, chunk_size=2))(BATCH), loop) < 1e-12
    assert relative_error(vmap(fh.hessian_diagonal(energy, mode=mode))(BATCH), loop.diagonal(dim1=1, dim2=2)) < 1e-12
    assert relative_error(vmap(fh.hessian_blocks(energy, mode=mode))(BATCH), loop) < 1e-12
    assert relative_error(vmap(lambda x: fh.hvp(energy, x, V, mode=mode))(BATCH), loop @ V) < 1e-12
    assert relative_error(vmap(lambda v: fh.hvp(energy, X, v, mode=mode))(BATCH), BATCH @ true_hessian(energy, X)) < 1e-12
    value, g, H = vmap(fh.value_grad_and_hessian(energy, mode=mode))(BATCH)
    assert relative_error(H, loop) < 1e-12 and relative_error(value, torch.stack([energy(x) for x in BATCH])) < 1e-14
    assert relative_error(g, torch.stack([oracle_gradient(energy, [x])[0] for x in BATCH])) < 1e-13


@pytest.mark.parametrize("vmap", [fh.vmap, torch.func.vmap], ids=["fh.vmap", "torch.func.vmap"])
def test_vmap_over_data_at_one_point_is_a_loop(vmap):
    scenario = by_name("logistic_regression")
    X, y = scenario.args

    def loss(x: Any, row: Tensor, label: Tensor) -> Tensor:
        return scenario.f(x, row[None], label[None])

    each = vmap(fh.hessian(loss), (None, 0, 0))(scenario.x, X, y)
    mean = {p: {q: t.mean(0) for q, t in row.items()} for p, row in each.items()}
    assert relative_error(mean, scenario.hessian) < 1e-13


def cube_of_hessian(f: Callable[..., Tensor], **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: (fh.hessian(f, **options)(x) ** 3).sum()


@nested_mode
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_a_function_of_the_hessian_is_right_by_every_way_of_taking_it(mode, symmetric):
    truth, _ = derivative_by_differences(lambda x: (true_hessian(energy, x) ** 3).sum(), X, 1e-3)
    for chunk_size in ("auto", 2):
        of = cube_of_hessian(energy, mode=mode, symmetric=symmetric, chunk_size=chunk_size)
        assert relative_error(fh.grad(of)(X), truth) < 1e-8
        assert relative_error(torch.func.grad(of)(X), truth) < 1e-8
        watched = X.clone().requires_grad_()
        of(watched).backward()
        assert relative_error(watched.grad, truth) < 1e-8


def test_plain_double_backward_can_be_differentiated_by_plain_autograd():
    truth, _ = derivative_by_differences(lambda x: (true_hessian(energy, x) ** 3).sum(), X, 1e-3)
    watched = X.clone().requires_grad_()
    cube_of_hessian(energy, mode=DOUBLE)(watched).backward()
    assert relative_error(watched.grad, truth) < 1e-8


@every_scenario
def test_the_gradient_of_a_function_of_the_hessian_is_right_over_trees(scenario):
    """The trace of H squared, whose gradient is taken at every leaf of the tree."""
    squares = fh.grad(lambda x: sum((t**2).sum() for t in leaves(fh.hessian(scenario.f)(x, *scenario.args)) if t is not None))
    f, points = flat_function(scenario), tensors(scenario.x)
    truth = []
    for k, point in enumerate(points):

        def of_one(moved: Tensor, k: int = k) -> Tensor:
            at = [moved if i == k else t for i, t in enumerate(points)]
            return sum((block**2).sum() for row in oracle_hessian(f, at) for block in row)

        truth.append(derivative_by_differences(of_one, point, 1e-3)[0])
    expected = rebuild(scenario.gradient, iter(truth))
    assert relative_error(squares(scenario.x), expected) < 1e-8


@nested_mode
def test_jvp_and_vjp_of_a_product_are_third_derivatives(mode):
    def product(x: Tensor) -> Tensor:
        return fh.hvp(energy, x, V, mode=mode)

    third, _ = derivative_by_differences(lambda x: true_hessian(energy, x) @ V, X, 1e-3)
    for jvp in (fh.jvp, torch.func.jvp):
        out, moved = jvp(product, (X,), (U,))
        assert relative_error(out, true_hessian(energy, X) @ V) < 1e-12 and relative_error(moved, third @ U) < 1e-9
    for vjp in (fh.vjp, torch.func.vjp):
        _, pullback = vjp(product, X)
        assert relative_error(pullback(U)[0], U @ third) < 1e-9
    assert relative_error(fh.jacfwd(product)(X), third) < 1e-9
    assert relative_error(fh.jacrev(product)(X), third) < 1e-9


def test_a_product_is_linear_in_its_vector_so_its_derivative_by_the_vector_is_the_matrix():
    H = true_hessian(energy, X)
    assert relative_error(fh.jvp(lambda v: fh.hvp(energy, X, v), (V,), (U,))[1], H @ U) < 1e-12
    assert relative_error(fh.jacrev(lambda v: fh.hvp(energy, X, v))(V), H) < 1e-12


def quartic(x: Tensor) -> Tensor:
    """x_0^4 x_1 + x_0 x_1^3: derivatives to fourth order by hand."""
    return x[0] ** 4 * x[1] + x[0] * x[1] ** 3


def test_third_derivatives_by_nesting():
    a, b = 1.5, -0.5
    x = torch.tensor([a, b], dtype=torch.float64)
    aaa, aab, abb, bbb = 24 * a * b, 12 * a**2, 6 * b, 6 * a
    third = torch.tensor([[[aaa, aab], [aab, abb]], [[aab, abb], [abb, bbb]]], dtype=torch.float64)
    assert relative_error(fh.jacfwd(fh.hessian(quartic))(x), third) < 1e-13
    assert relative_error(fh.jacrev(fh.hessian(quartic))(x), third) < 1e-13
    assert relative_error(fh.hessian(fh.grad(quartic))(x), third) < 1e-13
    assert relative_error(torch.func.jacrev(fh.hessian(quartic))(x), third) < 1e-13


@nested_mode
def test_fourth_derivatives_by_nesting(mode):
    a, b = 1.5, -0.5
    x = torch.tensor([a, b], dtype=torch.float64)
    by_count = {0: 24 * b, 1: 24 * a, 2: 0.0, 3: 6.0, 4: 0.0}  # how many of the four are with respect to x_1
    fourth = torch.tensor(
        [[[[by_count[i + j + k + l] for l in (0, 1)] for k in (0, 1)] for j in (0, 1)] for i in (0, 1)], dtype=torch.float64
    )
    assert relative_error(fh.hessian(fh.hessian(quartic, mode=mode), mode=mode)(x), fourth) < 1e-13
    assert relative_error(fh.hessian(fh.hessian(quartic, symmetric=False))(x), fourth) < 1e-13
    assert relative_error(fh.jacfwd(fh.jacrev(fh.hessian(quartic)))(x), fourth) < 1e-13


@nested_mode
def test_hessian_of_a_product_and_product_of_a_trace(mode):
    truth, _ = derivative_by_differences(lambda x: oracle_gradient(lambda x: trace_by_loops(x), [x])[0], X, 1e-3)
    assert relative_error(fh.hessian(lambda x: torch.trace(fh.hessian(energy, mode=mode)(x)), mode=mode)(X), truth) < 1e-8
    assert relative_error(fh.hvp(lambda x: fh.hessian_diagonal(energy)(x).sum(), X, V, mode=mode), truth @ V) < 1e-8


def trace_by_loops(x: Tensor) -> Tensor:
    """The trace of H with a graph, by plain autograd."""
    (g,) = torch.autograd.grad(energy(x), x, create_graph=True)
    return sum(torch.autograd.grad(g[i], x, create_graph=True)[0][i] for i in range(len(x)))


def validated(eta: Tensor, gradient: Callable[..., Any]) -> Tensor:
    """The loss after three steps of descent with a step size and a weight decay."""
    X, y = by_name("logistic_regression").args

    def loss(w: Tensor, decay: Tensor) -> Tensor:
        return (F.softplus(X @ w) - y * (X @ w)).mean() + decay * (w**2).sum()

    w = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
    for _ in range(3):
        w = w - eta[0] * gradient(loss, w, eta[1])
    return loss(w, torch.zeros((), dtype=torch.float64)) + (w**4).sum()


def by_autograd(loss: Callable[..., Tensor], w: Tensor, decay: Tensor) -> Tensor:
    w = w if w.requires_grad else w.detach().requires_grad_()
    return torch.autograd.grad(loss(w, decay), w, create_graph=True)[0]


@nested_mode
def test_the_hessian_of_an_inner_loop_of_gradient_steps(mode):
    eta = torch.tensor([0.5, 0.1], dtype=torch.float64)
    inner_loop = lambda eta: validated(eta, lambda loss, w, decay: fh.grad(loss)(w, decay))  # noqa: E731
    truth = true_hessian(lambda eta: validated(eta, by_autograd), eta)
    assert relative_error(fh.hessian(inner_loop, mode=mode)(eta), truth) < 1e-12
    assert relative_error(fh.hvp(inner_loop, eta, eta, mode=mode), truth @ eta) < 1e-12


def critic() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Softplus(), nn.Linear(4, 1)).double()
    return net, numbers(5, 3, seed=9)


def penalty_by_autograd(net: nn.Module, data: Tensor) -> Tensor:
    data = data.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(data).sum(), data, create_graph=True)
    return ((g.norm(2, dim=1) - 1) ** 2).mean()


def test_a_gradient_penalty_is_differentiated_with_respect_to_the_critic():
    net, data = critic()
    truth = torch.autograd.grad(penalty_by_autograd(net, data), list(net.parameters()), allow_unused=True)
    truth = {name: torch.zeros_like(p) if t is None else t for (name, p), t in zip(net.named_parameters(), truth, strict=True)}
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def penalty(parameters: Any) -> Tensor:
        def score(sample: Tensor) -> Tensor:
            return torch.func.functional_call(net, parameters, (sample,)).sum()

        g = fh.vmap(fh.grad(score))(data)
        return ((g.norm(2, dim=1) - 1) ** 2).mean()

    def penalty_at_once(parameters: Any) -> Tensor:
        g = fh.grad(lambda data: torch.func.functional_call(net, parameters, (data,)).sum())(data)
        return ((g.norm(2, dim=1) - 1) ** 2).mean()

    for of in (penalty, penalty_at_once):
        assert relative_error(fh.grad(of)(parameters), truth) < 1e-12
        assert relative_error(torch.func.grad(of)(parameters), truth) < 1e-12


@pytest.mark.parametrize("mapped", [False, True], ids=["at once", "by sample"])
def test_a_gradient_penalty_goes_backward_to_the_parameters_of_a_module(mapped):
    net, data = critic()
    truth = torch.autograd.grad(penalty_by_autograd(net, data), list(net.parameters()), allow_unused=True)
    g = fh.vmap(fh.grad(lambda sample: net(sample).sum()))(data) if mapped else fh.grad(lambda data: net(data).sum())(data)
    ((g.norm(2, dim=1) - 1) ** 2).mean().backward()
    for p, expected in zip(net.parameters(), truth, strict=True):
        assert expected is None or relative_error(p.grad, expected) < 1e-12


def by_autograd_along(x: Tensor, v: Tensor) -> Tensor:
    """The directional derivative with a graph, by plain autograd."""
    return torch.autograd.grad(energy(x), x, create_graph=True)[0] @ v


def test_torch_func_goes_inside_and_outside():
    H = true_hessian(energy, X)
    assert (
        relative_error(fh.hessian(lambda x: torch.func.grad(energy)(x) @ V)(X), fh.hessian(lambda x: fh.grad(energy)(x) @ V)(X))
        < 1e-13
    )
    assert relative_error(torch.func.jacfwd(fh.grad(energy))(X), H) < 1e-13
    assert relative_error(fh.jacfwd(torch.func.grad(energy))(X), H) < 1e-13
    assert relative_error(torch.func.vmap(lambda v: fh.jvp(fh.grad(energy), (X,), (v,))[1])(torch.eye(3).double()), H) < 1e-13


def weighted(H: Tensor) -> Tensor:
    """A function of the entries of a matrix or a vector that tells them apart."""
    return (torch.cos(1.3 * torch.arange(H.numel(), dtype=torch.float64)).reshape(H.shape) * H**2).sum()


def looped(x: Tensor) -> Tensor:
    """H with a graph, by plain autograd, an entry of the gradient at a time."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    (g,) = torch.autograd.grad(energy(x), x, create_graph=True)
    return torch.stack([torch.autograd.grad(entry, x, create_graph=True)[0] for entry in g])


# quantity: (how it is computed here, what it is as a function of H)
QUANTITIES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hessian": (lambda x: fh.hessian(energy)(x), lambda H: H),
    "asymmetric hessian": (lambda x: fh.hessian(energy, symmetric=False, chunk_size=2)(x), lambda H: H),
    "torch's hessian": (lambda x: torch.func.hessian(energy)(x), lambda H: H),
    "hessian of a tree": (lambda x: fh.hessian(lambda z: energy(z["a"]))({"a": x})["a"]["a"], lambda H: H),
    "hessian of a vector": (lambda x: fh.hessian(lambda z: energy(z)[None])(x)[0], lambda H: H),
    "value_grad_and_hessian": (lambda x: fh.value_grad_and_hessian(energy)(x)[2], lambda H: H),
    "hessian_rows": (lambda x: torch.cat([part for _, part in fh.hessian_rows(energy, chunk_size=2)(x)]), lambda H: H),
    "hessian_blocks": (lambda x: fh.hessian_blocks(energy)(x), lambda H: H),
    "hessian_diagonal": (lambda x: fh.hessian_diagonal(energy)(x), lambda H: H.diagonal()),
    "hvp": (lambda x: fh.hvp(energy, x, V), lambda H: H @ V),
    "grad_and_hvp": (lambda x: fh.grad_and_hvp(energy, x, V)[1], lambda H: H @ V),
    "jvp of grad": (lambda x: fh.jvp(fh.grad(energy), (x,), (V,))[1], lambda H: H @ V),
    "a kept pullback": (lambda x: fh.vjp(fh.grad(energy), x)[1](V)[0], lambda H: H @ V),
    "a kept pushforward": (lambda x: fh.linearize(fh.grad(energy), x)[1](V), lambda H: H @ V),
}

HALVES = torch.tensor([0.5, 1.0], dtype=torch.float64)
# transform: (from a module and a function, from the oracle's value, gradient and Hessian at a point)
AROUND: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[..., Tensor]]] = {
    "grad": (lambda m, f: m.grad(f)(X), lambda at: at(X)[1]),
    "jacrev": (lambda m, f: m.jacrev(f)(X), lambda at: at(X)[1]),
    "jacfwd": (lambda m, f: m.jacfwd(f)(X), lambda at: at(X)[1]),
    "jvp": (lambda m, f: m.jvp(f, (X,), (U,))[1], lambda at: at(X)[1] @ U),
    "vjp": (lambda m, f: m.vjp(f, X)[1](torch.ones_like(X[0]))[0], lambda at: at(X)[1]),
    "vmap": (lambda m, f: m.vmap(f)(BATCH), lambda at: torch.stack([at(x)[0] for x in BATCH])),
    "vmap of grad": (lambda m, f: m.vmap(m.grad(f))(BATCH), lambda at: torch.stack([at(x)[1] for x in BATCH])),
    "grad of vmap": (
        lambda m, f: m.grad(lambda x: m.vmap(lambda s: f(s * x))(HALVES).sum())(X),
        lambda at: sum(s * at(s * X)[1] for s in HALVES),
    ),
    "jvp of vmap": (
        lambda m, f: m.jvp(lambda x: m.vmap(lambda s: f(s * x))(HALVES).sum(), (X,), (U,))[1],
        lambda at: sum(s * at(s * X)[1] @ U for s in HALVES),
    ),
    "hessian": (lambda m, f: m.hessian(f)(X), lambda at: at(X)[2]),
    "jvp of grad": (lambda m, f: m.jvp(m.grad(f), (X,), (U,))[1], lambda at: at(X)[2] @ U),
    "grad of their jvp": (lambda m, f: m.grad(lambda x: torch.func.jvp(f, (x,), (U,))[1])(X), lambda at: at(X)[2] @ U),
    "grad of our jvp": (lambda m, f: m.grad(lambda x: fh.jvp(f, (x,), (U,))[1])(X), lambda at: at(X)[2] @ U),
}


@functools.cache
def derivatives_of(quantity: str, x: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Value, gradient and Hessian of the weighted squares of a quantity: derivatives of ``energy`` up to the fourth."""
    point, part = torch.tensor(x, dtype=torch.float64), QUANTITIES[quantity][1]
    of = lambda x: weighted(part(looped(x)))  # noqa: E731
    return of(point).detach(), oracle_gradient(of, [point])[0], true_hessian(of, point)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("module", [fh, torch.func], ids=["ours outside", "torch's outside"])
def test_every_transform_goes_around_every_second_derivative(module, quantity):
    """So all of third order, and the last four of fourth, ours inside torch's and torch's inside ours."""
    for name, (transform, expected) in AROUND.items():
        got = transform(module, lambda x: weighted(QUANTITIES[quantity][0](x)))
        truth = expected(lambda x: derivatives_of(quantity, tuple(x.tolist())))
        assert relative_error(got, truth) < 1e-11, name


# Trees ----------------------------------------------------------------------------------------------------------------

low = pytest.mark.filterwarnings("ignore::functional_hess.LowPrecisionWarning")  # a kind holds bfloat16
every_kind = pytest.mark.parametrize("kind", KINDS)


def of_coordinates(*points: Tensor) -> Tensor:
    """A function of the leaves that couples all of them, with no two alike."""
    sums = [(k + 1) * (t.double() ** 3).sum() / 4 for k, t in enumerate(points)]
    return torch.stack([*sums, torch.stack(sums).sum() ** 2]).sum()


def of_a_tree(x: Any) -> Tensor:
    return of_coordinates(*fh.Space.of(x).pack(x))


@low
@every_kind
def test_every_kind_of_tree_goes_through_every_transform_and_comes_out(kind):
    x = KINDS[kind][0]
    space = fh.Space.of(x)
    points = [t.detach().double() for t in space.pack(x)]
    v = space.unpack([torch.cos(torch.arange(float(t.numel()))).reshape(t.shape).to(t.dtype) for t in space.pack(x)])
    g = torch.cat([t.reshape(-1) for t in oracle_gradient(of_coordinates, points)])
    H = matrix(oracle_hessian(of_coordinates, points), points)
    along, tolerance = space.ravel(v).double(), max(4 * torch.finfo(dtype).eps for dtype in space.dtypes)
    one = torch.ones((), dtype=torch.float64)

    def is_like_x(tree: Any, expected: Tensor) -> None:
        """In the structure of x, `None` at carried leaves, every leaf in the dtype of its own, the numbers right."""
        assert [t.dtype for t in space.pack(tree)] == list(space.dtypes)
        assert list(map(is_differentiated, fh.tree._flatten(tree)[0])) == list(map(is_differentiated, fh.tree._flatten(x)[0]))
        assert relative_error(space.ravel(tree), expected) < tolerance

    is_like_x(fh.grad(of_a_tree)(x), g)
    is_like_x(fh.value_and_grad(of_a_tree)(x)[1], g)
    is_like_x(fh.vjp(of_a_tree, x)[1](one)[0], g)
    is_like_x(fh.jacrev(of_a_tree)(x), g)
    columns = torch.cat([t.reshape(-1) for t in space._entries(fh.jacfwd(of_a_tree)(x), "J")])  # in the dtype of the output
    assert relative_error(columns, g) < tolerance
    assert relative_error(fh.jvp(of_a_tree, (x,), (v,))[1], g @ along) < tolerance
    assert relative_error(fh.linearize(of_a_tree, x)[1](v), g @ along) < tolerance
    is_like_x(fh.hvp(of_a_tree, x, v), H @ along)
    is_like_x(fh.grad_and_hvp(of_a_tree, x, v)[1], H @ along)
    is_like_x(fh.hessian_diagonal(of_a_tree)(x), H.diagonal())
    assert relative_error(space.matrix(fh.hessian(of_a_tree)(x)), H) < tolerance
    assert relative_error(torch.cat([rows for _, rows in fh.hessian_rows(of_a_tree)(x)]), H) < tolerance
    blocks, whole = fh.hessian_blocks(of_a_tree)(x), fh.hessian(of_a_tree)(x)
    for leaf, (block, row) in enumerate(zip(space._entries(blocks, "blocks"), space._entries(whole, "H"), strict=True)):
        assert relative_error(block, space._entries(row, "H")[leaf]) < tolerance
    batched = fh.vmap(lambda s: space.matrix(fh.hessian(lambda x: s * of_a_tree(x))(x)))(torch.stack([one, 2 * one]))
    assert relative_error(batched, torch.stack([H, 2 * H])) < tolerance


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", REVERSE])
def test_products_in_eight_threads_are_all_right(mode):
    points = [numbers(3, seed=i) for i in range(8)]
    truth = [true_hessian(energy, x) for x in points]
    right: list[bool] = []
    failures: list[BaseException] = []
    start = threading.Barrier(8)

    def work(i: int) -> None:
        try:
            start.wait(60)
            for j in range(60):
                v = numbers(3, seed=100 * i + j)
                right.append(relative_error(fh.hvp(energy, points[i], v, mode=mode), truth[i] @ v) < 1e-12)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures and len(right) == 480 and all(right)


def test_hessians_in_eight_threads_are_all_right():
    right: list[bool] = []

    def work(i: int) -> None:
        net = network(lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), numbers(4, 2, seed=i))
        whole = fh.hessian(net.f, mode=DOUBLE)(net.x)
        right.extend(
            relative_error(fh.hessian(net.f, mode=mode, chunk_size=4)(net.x), whole) < 1e-12 for mode in (FORWARD, REVERSE) * 3
        )

    nets = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in nets:
        worker.start()
    for worker in nets:
        worker.join()
    assert len(right) == 48 and all(right)


# The package ----------------------------------------------------------------------------------------------------------

HEAVY = (
    "matplotlib",
    "sklearn",
    "tqdm",
    "scipy",
    "sympy",
    "pandas",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "IPython",
)


def test_importing_the_package_brings_nothing_heavy_beyond_torch():
    program = "import sys, torch; before = set(sys.modules); import functional_hess; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    brought = done.stdout.split()
    assert "functional_hess.second_order" in brought
    assert [name for name in brought if any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY)] == []


def test_every_public_name_is_there_and_documented():
    assert len(set(fh.__all__)) == len(fh.__all__)
    for name in fh.__all__:
        public = getattr(fh, name)
        assert public.__doc__
        assert ">>> " in public.__doc__ or not isinstance(public, types.FunctionType), f"{name} shows no example"
    for name in (
        *fh.testing.__all__,
        "paths",
        "written",
        "add",
        "sub",
        "scale",
        "dot",
        "norm",
        "tree_map",
        "partition",
        "register",
    ):
        public = getattr(fh.testing, name, None) or getattr(fh.tree, name)
        assert ">>> " in public.__doc__ or isinstance(public, type), f"{name} shows no example"


def test_a_stream_is_an_iterator():
    assert isinstance(fh.hessian_rows(energy)(X), Iterator)
