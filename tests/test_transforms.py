"""Every transform has the hand-written value on every tree, nests in any order, and refuses what would silently be zero."""

from __future__ import annotations

import functools
import inspect
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_unchanged, relative_error, snapshot
from scenarios import SCENARIOS, VECTOR_SCENARIOS, Scenario, by_name, dense_gradient, dense_hessian, flat_function, t, tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import functional_hess as fh
from functional_hess import DependenceError, grad, hvp, jacfwd, jacrev, jvp, levels, linearize, value_and_grad, vjp, vmap
from functional_hess.levels import repaired
from functional_hess.tree import Space

ALL = SCENARIOS + VECTOR_SCENARIOS
every = pytest.mark.parametrize("scenario", ALL, ids=str)
scalar = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
vector = pytest.mark.parametrize("scenario", VECTOR_SCENARIOS, ids=str)
EXACT = 1e-12

x3, y3 = t([0.5, -1.0, 2.0]), t([1.5, 0.25, -0.75])


def at(scenario: Scenario) -> Callable[[Any], Any]:
    """f as a function of the point alone."""
    return lambda x: scenario.f(x, *scenario.args)


def close(actual: Any, expected: Any) -> bool:
    return relative_error(actual, expected) < EXACT


def dense(scenario: Scenario, jacobian: Any) -> Tensor:
    """A tree of blocks out.shape + leaf.shape as one tensor of shape out.shape + (n,)."""
    shape = scenario.value.shape
    return torch.cat([leaf.reshape(*shape, -1) for leaf in tensors(jacobian)], -1)


# ---------------------------------------------------------------------------------------------------- values


@scalar
def test_grad_is_the_hand_written_gradient(scenario: Scenario) -> None:
    assert close(grad(scenario.f)(scenario.x, *scenario.args), scenario.gradient)


@scalar
def test_value_and_grad_gives_both(scenario: Scenario) -> None:
    value, gradient = value_and_grad(scenario.f)(scenario.x, *scenario.args)
    assert close(value, scenario.value) and close(gradient, scenario.gradient)


@scalar
def test_grad_is_the_oracles_gradient(scenario: Scenario) -> None:
    gradient = grad(scenario.f)(scenario.x, *scenario.args)
    assert relative_error(tensors(gradient), oracles.gradient(flat_function(scenario), tensors(scenario.x))) < EXACT


@every
def test_jvp_is_the_jacobian_times_a_direction(scenario: Scenario, generator: torch.Generator) -> None:
    space = Space.of(scenario.x)
    v = space.random(generator)
    out, tangent = jvp(at(scenario), (scenario.x,), (v,))
    assert close(out, scenario.value)
    assert close(tangent, dense_gradient(scenario) @ space.ravel(v))


@every
def test_vjp_is_the_transposed_jacobian_times_a_cotangent(scenario: Scenario, generator: torch.Generator) -> None:
    u = torch.randn(scenario.value.shape, generator=generator, dtype=torch.float64)
    out, pullback = vjp(at(scenario), scenario.x)
    expected = torch.tensordot(u, dense_gradient(scenario), u.dim())
    assert close(out, scenario.value)
    for _ in range(2):  # as often as one likes
        (gradient,) = pullback(u)
        assert close(Space.of(scenario.x).ravel(gradient), expected)


@every
@pytest.mark.parametrize("transform", [jacfwd, jacrev])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_jacobians_are_the_hand_written_ones(scenario: Scenario, transform: Any, chunk_size: int | None) -> None:
    assert close(transform(scenario.f, chunk_size=chunk_size)(scenario.x, *scenario.args), scenario.gradient)


@every
def test_linearize_is_the_jacobian(scenario: Scenario, generator: torch.Generator) -> None:
    space = Space.of(scenario.x)
    out, pushforward = linearize(at(scenario), scenario.x)
    assert close(out, scenario.value)
    for _ in range(2):
        v = space.random(generator)
        assert close(pushforward(v), dense_gradient(scenario) @ space.ravel(v))


@scalar
def test_jacobians_of_the_gradient_are_the_hessian(scenario: Scenario) -> None:
    for outer, inner in itertools.product((jacfwd, jacrev), (grad, jacfwd, jacrev)):
        H = outer(inner(scenario.f))(scenario.x, *scenario.args)
        assert relative_error(H, scenario.hessian) < EXACT, (outer, inner)


@vector
def test_jacobians_nest_on_vector_valued_functions(scenario: Scenario) -> None:
    n, shape = scenario.n, scenario.value.shape
    for outer, inner in itertools.product((jacfwd, jacrev), repeat=2):
        H = outer(inner(scenario.f))(scenario.x, *scenario.args)
        rows = iter(tensors(H))
        points = tensors(scenario.x)
        got = torch.cat([torch.cat([next(rows).reshape(*shape, p.numel(), -1) for _ in points], -1) for p in points], -2)
        assert got.shape == (*shape, n, n) and close(got, dense_hessian(scenario))


@scalar
def test_vmap_of_grad_is_a_loop(scenario: Scenario) -> None:
    space = Space.of(scenario.x)
    factors = t([1.0, 0.9, 1.1])
    batch = space.at([factors.reshape(-1, *[1] * p.dim()) * p for p in space.pack(scenario.x)])
    single = [space.at([f * p for p in space.pack(scenario.x)]) for f in factors]
    dims = (space.unpack([0] * len(space.shapes)), *[None] * len(scenario.args))
    got = vmap(grad(scenario.f), dims)(batch, *scenario.args)
    for k, x in enumerate(single):
        row = fh.tree.tree_map(lambda leaf: leaf[k], got)
        assert close(row, grad(scenario.f)(x, *scenario.args))


# ---------------------------------------------------------------------------------------------------- arguments


def three(x: Tensor, y: dict[str, Tensor], scale: float = 1.0, *, power: int = 2) -> Tensor:
    return scale * (x**power * y["a"]).sum()


POINT = (x3, {"a": y3})


@pytest.mark.parametrize("transform", [grad, jacfwd, jacrev])
def test_argnums_choose_the_arguments(transform: Any) -> None:
    dx, dy = 2 * x3 * y3, {"a": x3**2}
    assert close(transform(three)(*POINT), dx)
    assert close(transform(three, 0)(*POINT), dx)
    assert close(transform(three, argnums=1)(*POINT), dy)
    assert close(transform(three, argnums=-1)(*POINT), dy)
    assert close(transform(three, argnums=-2)(*POINT), dx)
    assert close(transform(three, argnums=(0,))(*POINT), (dx,))
    assert close(transform(three, argnums=(1, 0))(*POINT), (dy, dx))
    assert close(transform(three, argnums=(0, -1))(*POINT), (dx, dy))
    assert close(transform(three, argnums=[0, 1])(*POINT), (dx, dy))


@pytest.mark.parametrize("transform", [grad, jacfwd, jacrev])
def test_keyword_arguments_reach_the_function(transform: Any) -> None:
    assert close(transform(three)(*POINT, scale=3.0, power=3), 9 * x3**2 * y3)
    assert close(transform(three)(*POINT, 2.0), 4 * x3 * y3)


@pytest.mark.parametrize("transform", [grad, value_and_grad, jacfwd, jacrev])
@pytest.mark.parametrize("argnums", [2, -3, (0, 5)], ids=str)
def test_argnums_out_of_range_are_refused(transform: Any, argnums: Any) -> None:
    with pytest.raises(ValueError, match=r"argnums must be in range\(2\), the positional arguments of the call, got -?\d"):
        transform(three, argnums=argnums)(*POINT)


@pytest.mark.parametrize("transform", [grad, value_and_grad, jacfwd, jacrev])
def test_argnums_that_are_no_ints_or_not_different_are_refused(transform: Any) -> None:
    for argnums in (x3, None, 1.0, "x", (), (0, None)):
        with pytest.raises(TypeError, match=r"argnums must be an int or a tuple of ints, got"):
            transform(three, argnums)
    for argnums in ((1, 1), (1, -1)):
        with pytest.raises(ValueError, match=r"argnums must be different arguments, got \(1, "):
            transform(three, argnums)(*POINT)


def with_aux(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return (x**3).sum(), {"name": "cube", "none": None, "square": x**2, "count": 3, "pair": (x.argmax(), [True])}


def is_aux(aux: Any) -> None:
    assert aux["name"] == "cube" and aux["none"] is None and aux["count"] == 3 and aux["pair"][1] == [True]
    assert torch.equal(aux["square"], x3**2) and int(aux["pair"][0]) == 2
    assert not torch._C._functorch.is_functorch_wrapped_tensor(aux["square"])


def test_aux_may_hold_anything() -> None:
    gradient, aux = grad(with_aux, has_aux=True)(x3)
    assert close(gradient, 3 * x3**2)
    is_aux(aux)
    (value, aux), gradient = value_and_grad(with_aux, has_aux=True)(x3)
    assert close((value, gradient), ((x3**3).sum(), 3 * x3**2))
    is_aux(aux)
    out, tangent, aux = jvp(with_aux, (x3,), (y3,), has_aux=True)
    assert close((out, tangent), ((x3**3).sum(), (3 * x3**2 * y3).sum()))
    is_aux(aux)
    out, pullback, aux = vjp(with_aux, x3, has_aux=True)
    assert close((out, *pullback(t(2.0))), ((x3**3).sum(), 6 * x3**2))
    is_aux(aux)
    for transform in (jacfwd, jacrev):
        jacobian, aux = transform(with_aux, has_aux=True)(x3)
        assert close(jacobian, 3 * x3**2)
        is_aux(aux)


def test_aux_survives_chunks_and_nesting() -> None:
    jacobian, aux = jacfwd(with_aux, has_aux=True, chunk_size=1)(x3)
    is_aux(aux)

    def outer(x: Tensor) -> tuple[Tensor, Any]:
        gradient, aux = grad(with_aux, has_aux=True)(x)
        return gradient.sum(), aux

    gradient, aux = grad(outer, has_aux=True)(x3)
    assert close(gradient, 6 * x3) and close(jacobian, 3 * x3**2)
    is_aux(aux)


def test_aux_is_differentiated_by_the_outer_level() -> None:
    """The square that the inner gradient hands out is a function of x to the outer one."""

    def outer(x: Tensor) -> Tensor:
        return grad(with_aux, has_aux=True)(x)[1]["square"].sum()

    assert close(grad(outer)(x3), 2 * x3)
    assert close(jvp(outer, (x3,), (y3,))[1], (2 * x3 * y3).sum())


@pytest.mark.parametrize("transform", [grad, value_and_grad, jacfwd, jacrev])
def test_has_aux_needs_a_pair(transform: Any) -> None:
    with pytest.raises(TypeError, match=r"with has_aux=True f must return \(value, aux\), got a tensor of shape \(\)"):
        transform(lambda x: x.sum(), has_aux=True)(x3)
    with pytest.raises(TypeError, match="with has_aux=True f must return"):
        transform(lambda x: (x.sum(), 1, 2), has_aux=True)(x3)


@pytest.mark.parametrize(
    ("f", "told"),
    [
        (lambda x: x, r"got a tensor of shape \(3,\). Reduce it"),
        (lambda x: (x.sum(), x), "got tuple. If f returns"),
        (lambda x: x.sum().item(), "got float. Return the tensor itself"),
        (lambda x: {"loss": x.sum()}, "got dict. Return the tensor itself"),
        (lambda x: None, "got NoneType"),
        (lambda x: x.sum()[None], r"got a tensor of shape \(1,\)"),
    ],
)
def test_a_gradient_needs_a_scalar(f: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        grad(f)(x3)


def test_a_gradient_of_a_complex_scalar_is_refused() -> None:
    with pytest.raises(TypeError, match="must return a real scalar"):
        grad(lambda x: torch.complex(x, x).sum())(x3)


@pytest.mark.parametrize("transform", [grad, jacfwd, jacrev])
def test_there_must_be_something_to_differentiate(transform: Any) -> None:
    with pytest.raises(TypeError, match=r"x holds no floating tensor to differentiate, only torch.int64.* Convert it"):
        transform(lambda x: x.sum())(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"args\[1\] holds no floating tensor to differentiate, only float"):
        transform(lambda x, y: x.sum(), argnums=1)(x3, 3.0)
    with pytest.raises(TypeError, match="f must be callable, got Tensor"):
        transform(x3)(x3)


def test_jvp_and_vjp_check_their_vectors_by_path() -> None:
    def f(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": x["w"] * 2}

    x = {"w": x3}
    with pytest.raises(ValueError, match=r"tangents\[0\]\['w'\] must have shape \(3,\), got \(2,\)"):
        jvp(f, (x,), ({"w": t([1.0, 2.0])},))
    with pytest.raises(ValueError, match=r"tangents\[0\]\['w'\] must have dtype torch.float64, got torch.float32"):
        jvp(f, (x,), ({"w": x3.float()},))
    with pytest.raises(ValueError, match=r"missing tangents\[0\]\['w'\]; unexpected tangents\[0\]\['v'\]"):
        jvp(f, (x,), ({"v": x3},))
    with pytest.raises(TypeError, match=r"jvp: primals must be a tuple of arguments, got dict. Write \(primal,\)"):
        jvp(f, x, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="jvp: tangents must be a tuple"):
        jvp(f, (x,), x)  # type: ignore[arg-type]
    _, pullback = vjp(f, x)
    with pytest.raises(ValueError, match=r"cotangent\['out'\] must have shape \(3,\), got \(\)"):
        pullback({"out": t(1.0)})
    _, pushforward = linearize(f, x)
    with pytest.raises(ValueError, match=r"tangents\[0\]\['w'\] must have shape"):
        pushforward({"w": t(1.0)})


@pytest.mark.parametrize("transform", [jacfwd, jacrev])
def test_a_chunk_holds_at_least_one(transform: Any) -> None:
    with pytest.raises(ValueError, match="chunk_size must be a positive int or None, got 0"):
        transform(lambda x: x**2, chunk_size=0)(x3)


# ---------------------------------------------------------------------------------------------------- trees out


class Named(NamedTuple):
    first: Any
    second: Any


def many(x: dict[str, Any]) -> dict[str, Any]:
    """Outputs of every kind: an unsorted dict, a named tuple, an int, a string, None, integer and empty tensors."""
    w, s = x["w"], x["s"]
    return {"z": Named(w * s, s**2), "n": 7, "a": (w.sum(), None, "text"), "i": w.argmax(), "e": w[:0]}


TREE = {"w": x3, "s": t(2.0), "k": 5, "e": torch.zeros(0, dtype=torch.float64)}


def test_trees_go_in_and_come_out() -> None:
    v = {"w": y3, "s": t(10.0), "k": None, "e": TREE["e"]}
    for out, tangent in (jvp(many, (TREE,), (v,)), (lambda lin: (lin[0], lin[1](v)))(linearize(many, TREE))):
        assert out["n"] == 7 and out["a"][1:] == (None, "text") and int(out["i"]) == 2
        assert close(out["z"], Named(2 * x3, t(4.0)))
        assert tangent["n"] is None and tangent["i"] is None and tangent["a"][1:] == (None, None)
        assert close(tangent["z"], Named(2 * y3 + 10 * x3, t(40.0))) and tangent["e"].shape == (0,)
    out, pullback = vjp(many, TREE)
    assert out["n"] == 7 and int(out["i"]) == 2
    u = {"z": Named(y3, t(1.0)), "n": None, "a": (t(3.0), None, None), "i": None, "e": TREE["e"]}
    (gradient,) = pullback(u)
    assert close(gradient, {"w": 2 * y3 + 3, "s": (x3 * y3).sum() + 4.0, "k": None, "e": TREE["e"]})
    for transform in (jacfwd, jacrev):
        J = transform(many)(TREE)
        assert J["n"] is None and J["i"] is None and J["a"][1] is None
        assert close(J["z"].first, {"w": 2 * torch.eye(3, dtype=torch.float64), "s": x3, "k": None, "e": x3.new_zeros(3, 0)})
        assert close(J["z"].second, {"w": torch.zeros(3), "s": t(4.0), "k": None, "e": TREE["e"]})
        assert J["e"]["w"].shape == (0, 3) and J["e"]["e"].shape == (0, 0)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
def test_derivatives_keep_the_dtypes_of_their_leaves(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x = {"a": x3.to(dtypes[0]), "b": y3.to(dtypes[1])}
    g = grad(lambda x: (x["a"] * x["b"]).sum())(x)
    assert (g["a"].dtype, g["b"].dtype) == dtypes
    for transform in (jacfwd, jacrev):
        J = transform(lambda x: x["a"] * x["b"])(x)
        assert relative_error(J, {"a": torch.diag(x["b"]), "b": torch.diag(x["a"])}) < 1e-2
        wider = torch.promote_types(*dtypes)  # a pullback has the dtype of its leaf, a tangent that of its output
        assert (J["a"].dtype, J["b"].dtype) == (dtypes if transform is jacrev else (wider, wider))


@pytest.mark.parametrize("transform", [jacfwd, jacrev])
def test_jacobians_of_empty_things_are_empty(transform: Any) -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert transform(lambda x: x * 2)(empty).shape == (0, 0)
    assert transform(lambda x: x.sum())(empty).shape == (0,)
    assert transform(lambda x: x[:0])(x3).shape == (0, 3)


def test_a_jacobian_of_no_tensor_is_refused() -> None:
    for transform in (jacfwd, jacrev):
        with pytest.raises(TypeError, match="f must return at least one floating tensor, got dict"):
            transform(lambda x: {"n": 3})(x3)


# ---------------------------------------------------------------------------------------------------- drop-in for torch.func


def mlp(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]


P = {"b1": t([0.1, -0.2]), "w1": t([[0.5, -1.0], [0.25, 0.75], [1.0, 0.5]]), "w2": t([[1.0, 0.3], [-0.5, 2.0]])}

CALLS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda m: m.grad(lambda p, x: mlp(p, x).sum())(P, x3),
    "grad argnums": lambda m: m.grad(lambda p, x: mlp(p, x).sum(), argnums=(0, 1))(P, x3),
    "grad aux": lambda m: m.grad(lambda p, x: (mlp(p, x).sum(), x), has_aux=True)(P, x3),
    "jvp": lambda m: m.jvp(mlp, (P, x3), (P, y3)),
    "jvp aux": lambda m: m.jvp(lambda x: (x.sin(), x.cos()), (x3,), (y3,), has_aux=True),
    "vjp": lambda m: m.vjp(mlp, P, x3)[1](t([1.0, -2.0])),
    "vjp out": lambda m: m.vjp(mlp, P, x3)[0],
    "jacfwd": lambda m: m.jacfwd(mlp)(P, x3),
    "jacfwd positional": lambda m: m.jacfwd(mlp, 1)(P, x3),
    "jacfwd aux": lambda m: m.jacfwd(lambda x: (x**2, x.sin()), has_aux=True)(x3),
    "jacfwd tuple": lambda m: m.jacfwd(mlp, (0, 1))(P, x3),
    "jacfwd randomness": lambda m: m.jacfwd(mlp, randomness="same")(P, x3),
    "jacrev": lambda m: m.jacrev(mlp)(P, x3),
    "jacrev chunk": lambda m: m.jacrev(mlp, (1, 0), chunk_size=1)(P, x3),
    "jacrev aux": lambda m: m.jacrev(lambda x: (x**2, x.sin()), has_aux=True)(x3),
    "jacrev tree": lambda m: m.jacrev(lambda x: {"a": x.sum(), "b": (x**2, x[0])})(x3),
    "vmap": lambda m: m.vmap(torch.dot)(P["w1"], P["w1"]),
    "vmap dims": lambda m: m.vmap(torch.mul, (1, None), 1)(P["w1"], x3),
    "vmap negative": lambda m: m.vmap(torch.mul, in_dims=(-1, None), out_dims=-1)(P["w1"], x3),
    "vmap tree": lambda m: m.vmap(lambda p: (p["w"].sum(), p["b"]), ({"w": 0, "b": None},), (0, 0))({"w": P["w1"], "b": x3}),
    "vmap chunk": lambda m: m.vmap(torch.sin, chunk_size=2)(P["w1"]),
    "vmap constant": lambda m: m.vmap(lambda x: torch.ones(2))(P["w1"]),
    "vmap nested": lambda m: m.vmap(m.vmap(torch.mul, (0, None)), (None, 0))(x3, y3),
    "vmap grad": lambda m: m.vmap(m.grad(lambda p, x: mlp(p, x).sum()), (None, 0))(P, P["w1"].T),
    "hessian by hand": lambda m: m.jacfwd(m.jacrev(lambda x: mlp(P, x).prod()))(x3),
    "hessian by hand, reversed": lambda m: m.jacrev(m.jacfwd(lambda x: mlp(P, x).prod()))(x3),
    "product": lambda m: m.jvp(m.grad(lambda x: mlp(P, x).prod()), (x3,), (y3,))[1],
    "grad of vmap": lambda m: m.grad(lambda x: m.vmap(torch.sin)(x).sum())(x3),
    "grad aux by position": lambda m: m.grad(lambda x: ((x**3).sum(), x), 0, True)(x3),
    "jacfwd aux by position": lambda m: m.jacfwd(lambda x: (x**3, x), 0, True)(x3),
    "vmap randomness by position": lambda m: m.vmap(torch.sin, 0, 0, "same")(P["w1"]),
    "vmap one place": lambda m: m.vmap(torch.sin, (0,), (1,))(P["w1"]),
    "vmap places": lambda m: m.vmap(lambda x: (x, x.sum()), 0, (1, 0))(P["w1"]),
    "vmap lists": lambda m: m.vmap(lambda a, b: a * b[0] * b[1], (0, [0, None]))(P["w1"].T, [P["w1"].T, x3]),
    "vmap of nothing": lambda m: m.vmap(torch.sin)(torch.zeros(0, 3)),
    "vmap of ints": lambda m: m.vmap(lambda i: x3 * i)(torch.arange(3)),
    "vmap of a named tuple out": lambda m: tuple(m.vmap(lambda x: x.max(0))(P["w1"])),
    "vmap of aux": lambda m: m.vmap(m.grad(lambda x: ((x**3).sum(), x * 2), has_aux=True))(P["w1"]),
    "grad negative": lambda m: m.grad(lambda a, b: (a * b**2).sum(), -1)(x3, y3),
    "grad tuple negative": lambda m: m.grad(lambda a, b: (a * b**2).sum(), (-1, 0))(x3, y3),
    "grad keywords": lambda m: m.grad(lambda x, k=1: (k * x**2).sum())(x3, k=3),
    "grad beside no tensor": lambda m: m.grad(lambda x, n, kind: (x**n).sum() if kind == "power" else x)(x3, 3, "power"),
    "grad of a partial": lambda m: m.grad(functools.partial(lambda a, x: (a * x**2).sum(), 3.0))(x3),
    "grad of a builtin": lambda m: m.grad(torch.sum)(x3),
    "grad of a list": lambda m: m.grad(lambda x: (x[0] * x[1]).sum())([x3, y3]),
    "grad of nothing": lambda m: m.grad(torch.sum)(x3[:0]),
    "grad in place": lambda m: m.grad(lambda x: x.clone().mul_(2).pow(2).sum())(x3),
    "grad of an expanded point": lambda m: m.grad(lambda x: (x**3).sum())(x3[:1].expand(4)),
    "jacrev of a module": lambda m: m.jacrev(MODULE)(x3),
    "hessian of a module": lambda m: m.hessian(MODULE)(x3),
    "vjp of many": lambda m: m.vjp(lambda a, b: (a * b, a.sum()), x3, y3)[1]((y3, t(1.0))),
    "jvp of many": lambda m: m.jvp(lambda a, b: (a * b, a.sum()), (x3, y3), (y3, x3)),
    "jvp strict": lambda m: m.jvp(torch.sin, (x3,), (y3,), strict=True),
    "jacobian by a number": lambda m: (m.jacrev(lambda s: s * y3)(x3[0]), m.jacfwd(lambda s: s * y3)(x3[0])),
    "jacfwd of a tuple out": lambda m: m.jacfwd(lambda x: (x**2, x.sum()))(x3),
    "jacobian of eigenvalues": lambda m: m.jacrev(lambda x: torch.linalg.eigvalsh(x @ x.T))(P["w1"].T),
    "gradient of a hessian": lambda m: m.grad(lambda x: m.hessian(lambda x: mlp(P, x).prod())(x).trace())(x3),
    "vmap of a hessian": lambda m: m.vmap(m.hessian(lambda x: mlp(P, x).prod()))(P["w1"].T),
    "hessian of a hessian": lambda m: m.hessian(lambda x: m.hessian(lambda x: (x**2).sum() ** 2)(x).sum())(x3),
}
MODULE = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double().requires_grad_(False)


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_torch_func_give_the_same_here(call: str) -> None:
    ours, theirs = CALLS[call](fh), CALLS[call](torch.func)
    assert relative_error(ours, theirs) < EXACT


@pytest.mark.parametrize("name", ["grad", "jvp", "vjp", "linearize", "jacfwd", "jacrev", "vmap", "hessian"])
def test_options_stand_where_torch_func_has_them(name: str) -> None:
    """What goes by position there goes by the same position here, and no option of theirs is missing."""

    def options(function: Any) -> tuple[list[str], set[str]]:
        parameters = [p for p in inspect.signature(function).parameters.values() if not p.name.startswith("_")][1:]
        places = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
        return places, {p.name for p in parameters}

    (ours, all_ours), (theirs, all_theirs) = options(getattr(fh, name)), options(getattr(torch.func, name))
    assert ours == theirs and all_ours >= all_theirs


def test_jacobians_by_a_negative_argnum_are_right_where_torchs_jacfwd_is_zero() -> None:
    """A canary too: when torch mends it, these two calls belong into the table above."""
    f = lambda a, b: a * b**2  # noqa: E731
    expected = torch.diag(2 * x3 * y3)
    assert close(jacfwd(f, -1)(x3, y3), expected) and close(jacrev(f, -1)(x3, y3), expected)
    assert close(fh.hessian(lambda a, b: f(a, b).sum(), -1)(x3, y3), torch.diag(2 * x3))
    assert not torch.func.jacfwd(f, -1)(x3, y3).any()


def test_value_and_grad_is_grad_and_value_turned_round() -> None:
    gradient, value = torch.func.grad_and_value(lambda p: mlp(p, x3).sum())(P)
    assert close(value_and_grad(lambda p: mlp(p, x3).sum())(P), (value, gradient))


LEVELS = {
    "grad": lambda m, f: lambda x: m.grad(lambda x: f(x).sum())(x),
    "jvp": lambda m, f: lambda x: m.jvp(f, (x,), (y3,))[1],
    "vjp": lambda m, f: lambda x: m.vjp(f, x)[1](y3)[0],
    "jac": lambda m, f: lambda x: m.jacrev(f)(x).sum(0),
    "vmap": lambda m, f: lambda x: m.vmap(lambda s: f(s * x))(t([0.5, 1.0])).sum(0),
}


def chained(x: Tensor) -> Tensor:
    """Not separable, smooth, all derivatives alive."""
    return torch.sin(x) * x.roll(1) ** 2 + torch.exp(x.mean() / 2) * x


@pytest.mark.parametrize(
    "levels", ["grad grad grad", "jvp grad vjp", "vjp jac jvp", "vmap jvp grad", "grad vmap jac", "jvp jvp jvp", "jac grad vmap"]
)
def test_ours_and_torchs_transforms_nest_in_any_order(levels: str) -> None:
    """Three levels, each ours or torch's: eight ways, one result."""
    results = []
    for modules in itertools.product((fh, torch.func), repeat=3):
        f: Callable[[Tensor], Tensor] = chained
        for level, module in zip(levels.split(), modules, strict=True):
            f = LEVELS[level](module, f)
        results.append(f(x3))
    assert all(r.shape == (3,) and close(r, results[-1]) for r in results)
    assert float(results[-1].abs().max()) > 0.01


# ---------------------------------------------------------------------------------------------------- vmap


def test_in_dims_are_a_prefix_of_the_arguments() -> None:
    tree = {"a": torch.arange(6.0).reshape(2, 3), "b": (torch.arange(3.0), "text", 4)}

    def f(x: Any, y: Tensor) -> Tensor:
        assert x["b"][1:] == ("text", 4)
        return x["a"] * x["b"][0] + y

    y = torch.tensor(10.0)
    expected = tree["a"].T * tree["b"][0][:, None] + 10
    assert torch.equal(vmap(f, ({"a": 1, "b": 0}, None))(tree, y), expected)
    assert torch.equal(vmap(f, ({"a": -1, "b": (0, None, None)}, None))(tree, y), expected)
    assert torch.equal(vmap(f, [{"a": 1, "b": 0}, None])(tree, y), expected)
    assert torch.equal(vmap(f, ({"a": 1, "b": 0}, None), 1)(tree, y), expected.T)


def test_out_dims_are_a_prefix_of_the_result() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    constant = torch.tensor([7.0, 8.0])

    def f(row: Tensor) -> Any:
        return {"row": row, "pair": (row.sum(), {"twice": torch.stack([row, row])}), "fixed": constant, "name": "f", "n": 3}

    out = vmap(f, out_dims={"row": -1, "pair": (0, 1), "fixed": None, "name": 0, "n": None})(x)
    assert torch.equal(out["row"], x.T) and torch.equal(out["pair"][0], x.sum(1))
    assert torch.equal(out["pair"][1]["twice"], torch.stack([x, x]))
    assert torch.equal(out["fixed"], constant) and out["name"] == "f" and out["n"] == 3
    assert out["row"].is_contiguous()


def test_a_result_that_is_mapped_needs_a_place() -> None:
    with pytest.raises(ValueError, match=r"out_dims must be a place for .*which depends on the mapped dimension, got None"):
        vmap(lambda x: x * 2, out_dims=None)(x3)
    assert torch.equal(vmap(lambda x: y3, out_dims=None)(x3), y3)


def test_sizes_that_differ_are_told_by_path() -> None:
    with pytest.raises(
        ValueError, match=r"vmap: the mapped dimensions must have one size: args\[0\]\['a'\] has 3, args\[1\] has 2"
    ):
        vmap(lambda x, y: x["a"] * y)({"a": x3}, t([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"in_dims must be a dimension of args\[0\], of shape \(3,\), got 1"):
        vmap(torch.sin, 1)(x3)
    with pytest.raises(ValueError, match=r"in_dims must be a dimension of args\[0\], of shape \(\), got 0"):
        vmap(torch.sin)(t(1.0))
    with pytest.raises(ValueError, match=r"in_dims must be a dimension of args\[0\], of shape \(3,\), got 'a'"):
        vmap(torch.sin, "a")(x3)
    with pytest.raises(ValueError, match="in_dims must map at least one tensor"):
        vmap(torch.sin, None)(x3)
    with pytest.raises(ValueError, match="in_dims must be an int, None or a prefix"):
        vmap(torch.mul, (0, 0, 0))(x3, x3)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, None])
def test_chunks_are_all_at_once(chunk_size: int | None) -> None:
    x = torch.arange(21.0).reshape(7, 3)
    out = vmap(lambda x: {"s": x.sum(), "x": x.sin()}, out_dims={"s": 0, "x": 1}, chunk_size=chunk_size)(x)
    assert torch.equal(out["s"], x.sum(1)) and torch.equal(out["x"], x.sin().T)


def test_a_chunk_is_one_evaluation() -> None:
    calls: list[int] = []
    vmap(lambda x: calls.append(1) or x.sin(), chunk_size=3)(torch.zeros(7))
    assert len(calls) == 3


def test_randomness_is_torchs() -> None:
    draws = {kind: vmap(lambda x: x + torch.rand(2), randomness=kind)(torch.zeros(3)) for kind in ("same", "different")}
    assert torch.equal(draws["same"][0], draws["same"][2])
    assert not torch.equal(draws["different"][0], draws["different"][2])
    with pytest.raises(RuntimeError, match="random"):
        vmap(lambda x: x + torch.rand(2))(torch.zeros(3))


def test_keyword_arguments_are_not_mapped() -> None:
    assert torch.equal(vmap(lambda x, *, y: x * y)(x3, y=y3), x3[:, None] * y3)


# ---------------------------------------------------------------------------------------------------- nesting


def quartic(x: Tensor) -> Tensor:
    return (x**4).sum() + x.prod()


def test_third_and_fourth_derivatives_come_by_nesting() -> None:
    x = t(1.5)
    derivative: Callable[[Tensor], Tensor] = torch.sin
    for expected in (x.cos(), -x.sin(), -x.cos(), x.sin(), x.cos()):
        derivative = grad(derivative)
        assert close(derivative(x), expected)
    derivative = lambda x: x**5  # noqa: E731
    for k, factor in enumerate((5, 20, 60, 120)):
        derivative = (lambda g: lambda x: jvp(g, (x,), (t(1.0),))[1])(derivative) if k % 2 else grad(derivative)
        assert close(derivative(x), factor * x ** (4 - k))


def test_the_third_derivative_of_a_cubic_form_is_its_tensor(rng: Any) -> None:
    A = torch.from_numpy(rng.normal(size=(3, 3, 3)))
    expected = sum(A.permute(p) for p in itertools.permutations(range(3)))

    def cubic(x: Tensor) -> Tensor:
        return torch.einsum("ijk,i,j,k", A, x, x, x)

    for outer, middle in itertools.product((jacfwd, jacrev), repeat=2):
        assert relative_error(outer(middle(grad(cubic)))(x3), expected) < EXACT
    assert close(jacfwd(jacrev(jacfwd(grad(cubic))))(x3), torch.zeros(3, 3, 3, 3))


def test_linearize_composes_with_every_transform() -> None:
    def slope(x: Tensor) -> Tensor:
        """<grad f, y>, through a pushforward."""
        return linearize(quartic, x)[1](y3)

    H = torch.diag(12 * x3**2) + t([[0, x3[2], x3[1]], [x3[2], 0, x3[0]], [x3[1], x3[0], 0]])
    assert close(grad(slope)(x3), H @ y3)
    assert close(jvp(slope, (x3,), (x3,))[1], y3 @ H @ x3)
    assert close(vmap(slope)(torch.stack([x3, y3])), torch.stack([slope(x3), slope(y3)]))
    assert close(jacfwd(jacrev(slope))(x3), fh.hessian(slope)(x3))
    assert float(fh.hessian(slope)(x3).abs().max()) > 1
    assert close(torch.func.grad(slope)(x3), H @ y3)
    assert close(torch.func.jvp(slope, (x3,), (x3,))[1], y3 @ H @ x3)
    assert close(torch.func.vmap(slope)(torch.stack([x3, y3])), torch.stack([slope(x3), slope(y3)]))
    assert close(torch.func.vmap(torch.func.grad(slope))(torch.stack([x3, x3]))[1], H @ y3)
    _, product = linearize(grad(quartic), x3)
    assert close(product(y3), H @ y3) and close(vmap(product)(torch.eye(3, dtype=torch.float64)), H)
    assert close(grad(lambda v: v @ product(v) / 2)(y3), H @ y3)


def test_linearize_evaluates_the_function_once() -> None:
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    _, pushforward = linearize(f, x3)
    for _ in range(3):
        pushforward(y3)
    assert len(calls) == 1


def test_a_gradient_penalty_is_a_gradient_of_a_norm_of_a_gradient() -> None:
    w = {"a": t([[1.0, 0.5, -0.3], [0.2, -1.0, 0.7]]), "b": t([0.4, 1.1])}

    def critic(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(w["a"] @ x) @ w["b"]

    def penalty(w: dict[str, Tensor]) -> Tensor:
        return (grad(critic, argnums=1)(w, x3).norm() - 1) ** 2

    def by_hand(a: Tensor, b: Tensor) -> Tensor:
        return ((a.T @ ((1 - torch.tanh(a @ x3) ** 2) * b)).norm() - 1) ** 2

    expected = oracles.gradient(by_hand, (w["a"], w["b"]))
    assert relative_error(tensors(grad(penalty)(w)), expected) < EXACT


# ---------------------------------------------------------------------------------------------------- broken graphs

warns = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return (x**2).sum()


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: (x.detach() ** 2).sum(),
    "item": lambda x: torch.tensor(x.sum().item()),
    "float": lambda x: torch.tensor([float(z) for z in x.detach()]).sum(),
    "tolist": lambda x: torch.tensor(x.tolist()).sum(),
    "data": lambda x: (x.data**2).sum(),
    "argmax": lambda x: x.argmax().double(),
    "bucketize": lambda x: torch.bucketize(x, t([0.0, 1.0])).double().sum(),
    "comparison": lambda x: (x > 0).double().sum(),
    "count_nonzero": lambda x: torch.count_nonzero(x).double(),
    "long": lambda x: x.long().double().sum(),
    "constant": lambda x: t(3.0),
    "shape": lambda x: torch.zeros_like(x).sum(),
    "no_grad": without_grad,
}

FIRST_ORDER: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda f: grad(f)(x3),
    "value_and_grad": lambda f: value_and_grad(f)(x3),
    "jvp": lambda f: jvp(f, (x3,), (y3,)),
    "vjp": lambda f: vjp(f, x3),
    "linearize": lambda f: linearize(f, x3),
    "jacfwd": lambda f: jacfwd(f)(x3),
    "jacrev": lambda f: jacrev(f)(x3),
}
first_order = pytest.mark.parametrize("transform", FIRST_ORDER)


@first_order
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_graph_is_an_error_not_a_zero(broken: str, transform: str) -> None:
    f = BROKEN[broken]
    if broken == "no_grad" and transform in ("jvp", "jacfwd"):  # forward mode does not look at no_grad, and is right
        assert close(jvp(f, (x3,), (y3,))[1], 2 * x3 @ y3) and close(jacfwd(f)(x3), 2 * x3)
        return
    with pytest.raises(DependenceError, match=r"f\(x\) does not depend on x through differentiable operations"):
        FIRST_ORDER[transform](f)


@warns
@first_order
def test_a_copy_by_torch_tensor_breaks_the_graph(transform: str) -> None:
    with pytest.raises(DependenceError):
        FIRST_ORDER[transform](lambda x: torch.tensor(x).sum())


@pytest.mark.parametrize("broken", ["detach", "argmax", "constant"])
def test_a_broken_graph_is_an_error_at_every_depth(broken: str) -> None:
    f = BROKEN[broken]
    for call in (
        lambda: grad(grad(f))(t(1.0)) if broken == "constant" else grad(lambda x: grad(f)(x).sum())(x3),
        lambda: vmap(grad(f))(torch.stack([x3, y3])),
        lambda: hvp(f, x3, y3),
        lambda: jvp(grad(f), (x3,), (y3,)),
        lambda: torch.func.grad(lambda x: grad(f)(x).sum())(x3),
    ):
        with pytest.raises(DependenceError):
            call()


SOUND: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "second derivative of a linear function": (lambda x: grad(lambda x: (y3 * x).sum())(x).sum(), torch.zeros(3)),
    "the same with torch.func inside": (lambda x: torch.func.grad(lambda x: (y3 * x).sum())(x).sum(), torch.zeros(3)),
    "jvp of a linear function": (lambda x: jvp(lambda x: (y3 * x).sum(), (x,), (y3,))[1], torch.zeros(3)),
    "vjp of a linear function": (lambda x: vjp(lambda x: y3 * x, x)[1](x3)[0].sum(), torch.zeros(3)),
    "jacobian of a linear function": (lambda x: jacrev(lambda x: y3 * x)(x).sum(), torch.zeros(3)),
    "torch's jacobian of a linear function": (lambda x: torch.func.jacfwd(lambda x: y3 * x)(x).sum(), torch.zeros(3)),
    "third derivative of a quadratic": (lambda x: grad(lambda x: grad(lambda x: (x**2).sum())(x).sum())(x).sum(), torch.zeros(3)),
    "a constant inside a sum": (lambda x: (x * y3).sum() + x.detach().sum() + 3.0, y3),
    "a stopped gradient": (lambda x: (x * x.detach()).sum(), x3),
    "a zero that depends": (lambda x: 0 * x.sum(), torch.zeros(3)),
    "a step with a derivative of zero": (lambda x: x.round().sum(), torch.zeros(3)),
    "a mask": (lambda x: (x * (x > 0)).sum(), t([1.0, 0.0, 1.0])),
    "a clamp that holds everywhere": (lambda x: x.clamp(5.0, 6.0).sum(), torch.zeros(3)),
    "a branch": (lambda x: x.sum() if x[0] > 0 else -x.sum(), torch.ones(3)),
}


@pytest.mark.parametrize("sound", SOUND)
def test_zeros_that_are_right_are_no_error(sound: str) -> None:
    f, expected = SOUND[sound]
    assert close(grad(f)(x3), expected)
    assert close(jacrev(f)(x3), expected) and close(jacfwd(f)(x3), expected)
    assert close(jvp(f, (x3,), (y3,))[1], (expected.double() * y3).sum())
    assert close(vjp(f, x3)[1](t(1.0))[0], expected)
    assert close(linearize(f, x3)[1](y3), (expected.double() * y3).sum())


def test_some_leaf_or_output_without_influence_is_no_error() -> None:
    f = lambda x: {"used": x["a"] * 2, "constant": t([1.0])}  # noqa: E731
    x = {"a": x3, "b": y3}
    zero = torch.zeros(1)
    assert close(jvp(f, (x,), (x,))[1], {"used": 2 * x3, "constant": zero})
    assert close(jacrev(f)(x)["constant"], {"a": torch.zeros(1, 3), "b": torch.zeros(1, 3)})
    assert close(jacfwd(f)(x), jacrev(f)(x))
    assert close(vjp(f, x)[1]({"used": y3, "constant": t([9.0])})[0], {"a": 2 * y3, "b": torch.zeros(3)})


def test_strict_asks_for_every_leaf() -> None:
    x = {"a": x3, "b": [y3]}
    f = lambda x: (x["a"] ** 2).sum()  # noqa: E731
    assert close(grad(f)(x)["b"], [torch.zeros(3)])
    for call in (
        lambda: grad(f, strict=True)(x),
        lambda: value_and_grad(f, strict=True)(x),
        lambda: vjp(f, x, strict=True),
    ):
        with pytest.raises(DependenceError, match=r"f does not depend on .*\['b'\]\[0\] \(strict=True\)"):
            call()
    with pytest.raises(DependenceError, match=r"f\(x\)\['fixed'\] does not depend on x \(strict=True\)"):
        jvp(lambda x: {"moves": x * 2, "fixed": y3}, (x3,), (y3,), strict=True)
    whole = lambda x: (x["a"] * x["b"][0]).sum()  # noqa: E731
    assert close(grad(whole, strict=True)(x), grad(whole)(x))
    assert close(vjp(whole, x, strict=True)[1](t(1.0))[0], grad(whole)(x))
    assert close(jvp(whole, (x,), (x,), strict=True)[1], 2 * (x3 @ y3))


# ---------------------------------------------------------------------------------------------------- repairs


def normed(x: Tensor) -> Tensor:
    """A LayerNorm with weights, and nothing of it vanishes."""
    return (torch.sin(F.layer_norm(x, (3,), t([0.5, 1.5, -1.0]), t([0.1, 0.2, 0.3]))) * t([1.0, 2.0, -0.7])).sum()


def curvature_along(x: Tensor) -> Tensor:
    """y'H(x)y by plain double backward, of which torch has the right formula."""
    return y3 @ oracles.hessian(normed, [x])[0][0] @ y3


def third(make: Any, inner: Any) -> Tensor:
    """The gradient of trace-like y'H y through a vmapped backward."""

    def curvature(x: Tensor) -> Tensor:
        return y3 @ inner.jacrev(inner.grad(normed))(x) @ y3

    return make.grad(curvature)(x3)


@pytest.mark.parametrize("outer", [fh, torch.func], ids=["ours outside", "torch's outside"])
def test_the_third_derivative_through_a_layer_norm_is_right(outer: Any) -> None:
    expected, doubt = oracles.derivative_by_differences(curvature_along, x3)
    assert relative_error(third(outer, fh), expected) < 1e-6, doubt
    hand_composed = outer.grad(lambda x: jvp(jvp_of_grad, (x,), (y3,))[1] @ y3)(x3)
    assert hand_composed.shape == (3,)


def jvp_of_grad(x: Tensor) -> Tensor:
    return grad(normed)(x)


def test_torch_alone_has_that_third_derivative_wrong() -> None:
    """A canary: when it fails, the repair of layer_norm may go."""
    expected, _ = oracles.derivative_by_differences(curvature_along, x3)
    assert relative_error(third(torch.func, torch.func), expected) > 1e-2


def test_torchs_transforms_inside_ours_are_repaired() -> None:
    expected, _ = oracles.derivative_by_differences(curvature_along, x3)
    assert relative_error(third(fh, torch.func), expected) < 1e-6


def test_plain_autograd_outside_is_a_level_too() -> None:
    x = x3.clone().requires_grad_()
    with repaired(fresh=True) as used:
        curvature = y3 @ jacrev(grad(normed))(x) @ y3
    (gradient,) = torch.autograd.grad(curvature, x)
    expected, _ = oracles.derivative_by_differences(curvature_along, x3)
    assert relative_error(gradient, expected) < 1e-6 and "layer_norm" in used
    with repaired(fresh=True) as used:
        grad(normed)(x)
    assert "layer_norm" in used
    with repaired(fresh=True) as used, torch.no_grad():
        grad(normed)(x.detach())
    assert not used


class Seen(TorchFunctionMode):
    """Which functions reach torch once our own mode is through with them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", [lambda: grad(normed)(x3), lambda: vjp(normed, x3), lambda: vmap(grad(normed))(x3[None])])
def test_one_derivative_keeps_the_fused_op(call: Any) -> None:
    with Seen() as seen, repaired(fresh=True) as used:
        call()
    assert not used and "layer_norm" in seen.names


def test_two_derivatives_swap_it() -> None:
    for call in (
        lambda: hvp(normed, x3, y3),
        lambda: grad(lambda x: grad(normed)(x).sum())(x3),
        lambda: jacfwd(grad(normed))(x3),
    ):
        with repaired(fresh=True) as used:
            call()
        assert "layer_norm" in used


def test_a_first_derivative_in_forward_mode_is_right_where_torchs_rule_is_wrong() -> None:
    A = t([[2.0, 0.0], [1.0, 1.5]])
    V = t([[0.3, 0.0], [-0.2, 0.4]])
    expected, _ = oracles.derivative_by_differences(lambda s: torch.cholesky_inverse(A + s * V), t(0.0))
    assert relative_error(jvp(torch.cholesky_inverse, (A,), (V,))[1], expected) < 1e-8


def test_a_first_derivative_in_forward_mode_of_a_product_by_index_is_right() -> None:
    index = torch.tensor([0, 1, 0])

    def product(x: Tensor) -> Tensor:
        return torch.scatter_reduce(torch.ones(2, dtype=x.dtype), 0, index, x, "prod")

    assert close(jvp(product, (x3,), (y3,))[1], torch.stack([y3[0] * x3[2] + x3[0] * y3[2], y3[1]]))


def test_a_first_derivative_in_reverse_mode_is_right_where_torchs_batching_rule_is_wrong() -> None:
    rows, slices = torch.stack([x3, y3]), t([1.0, 2.0])

    def total(rows: Tensor, slices: Tensor) -> Tensor:
        return (vmap(lambda row, s: torch.select_scatter(row, s, 0, 1))(rows, slices) ** 2).sum()

    expected = (2 * rows * t([1.0, 0.0, 1.0]), 2 * slices)
    assert close(grad(total, (0, 1))(rows, slices), expected)


def test_torchs_transforms_inside_our_vmap_are_repaired() -> None:
    def third_of(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: y3 @ torch.func.jacrev(torch.func.grad(normed))(x) @ y3)(x)

    expected, _ = oracles.derivative_by_differences(curvature_along, x3)
    assert relative_error(vmap(third_of)(torch.stack([x3, x3]))[1], expected) < 1e-6


# ---------------------------------------------------------------------------------------------------- results


def is_plain(tensor: Tensor) -> bool:
    bytes_of = tensor.untyped_storage().nbytes()
    return tensor.is_contiguous() and not tensor._is_zerotensor() and bytes_of >= tensor.numel() * tensor.element_size()


def test_derivatives_are_plain_tensors() -> None:
    wide = torch.ones(3, 4, dtype=torch.float64)
    results = [
        grad(lambda x: x.sum())(wide),
        grad(lambda x: x.T.sum(0).mean())(wide),
        grad(lambda x: (x.T @ t([1.0, 2.0, 3.0])).sum())(wide),
        jvp(lambda x: x[0].sum().expand(3), (wide,), (wide,))[1],
        jvp(lambda x: {"a": x * 2, "c": y3}, (wide,), (wide,))[1]["c"],
        vjp(lambda x: x.T, wide)[1](wide.T)[0],
        vjp(lambda x: x.sum(), wide)[1](t(1.0))[0],
        jacrev(lambda x: x.sum())(wide),
        jacfwd(lambda x: x.sum())(wide),
        jacfwd(lambda x: x.T)(wide),
        jacrev(lambda x: x.T)(wide),
        linearize(lambda x: x.T, wide)[1](wide),
        vmap(lambda x: x.sum().expand(3), out_dims=1)(wide),
        vmap(lambda x: x, in_dims=1)(wide),
    ]
    assert [is_plain(r) for r in results] == [True] * len(results)
    for result in results:
        result.add_(1)  # one may write to it


def test_leaves_of_a_derivative_share_no_storage() -> None:
    """The gradients of f(a + b) in a and b are equal, and writing to one must not write to the other."""
    x = {"a": x3, "b": y3, "e": torch.zeros(0), "f": torch.zeros(0)}

    def f(x: dict[str, Tensor]) -> Tensor:
        return ((x["a"] + x["b"]) ** 2).sum()

    for g in (grad(f)(x), vjp(f, x)[1](t(1.0))[0], jacrev(f)(x), jacfwd(f)(x), hvp(f, x, x)):
        before = g["b"].clone()
        g["a"].zero_()
        assert torch.equal(g["b"], before) and float(before.abs().sum()) > 0
    _, tangent = jvp(lambda x: (x["a"] * 2, {"again": x["a"] * 2}), (x,), (x,))
    assert tangent[0].data_ptr() != tangent[1]["again"].data_ptr()


def test_carried_leaves_share_nothing_with_inner_levels() -> None:
    out, _ = vjp(lambda x: {"i": (x > 0), "y": x * 2}, x3)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(out["i"])
    assert out["i"].tolist() == [True, False, True]


@every
def test_inputs_are_left_alone(scenario: Scenario, inputs_unchanged: Callable[..., None], generator: torch.Generator) -> None:
    f, x = at(scenario), scenario.x
    v = Space.of(x).random(generator)
    u = torch.ones_like(scenario.value)
    inputs_unchanged(x, scenario.args, v, u)
    jvp(f, (x,), (v,))
    vjp(f, x)[1](u)
    linearize(f, x)[1](v)
    jacfwd(f)(x)
    jacrev(f)(x)
    if scenario.value.dim() == 0:
        value_and_grad(f)(x)
        hvp(f, x, v)


GRAPHS: dict[str, Callable[[Tensor], Any]] = {
    "grad": lambda x: grad(quartic)(x),
    "value_and_grad": lambda x: value_and_grad(quartic)(x),
    "jvp": lambda x: jvp(quartic, (x,), (y3,)),
    "vjp": lambda x: (lambda out, pull: (out, pull(t(1.0))[0]))(*vjp(quartic, x)),
    "linearize": lambda x: linearize(quartic, x)[1](y3),
    "jacfwd": lambda x: jacfwd(quartic)(x),
    "jacrev": lambda x: jacrev(quartic)(x),
    "vmap": lambda x: vmap(lambda s: quartic(s * x))(y3),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_result_has_a_graph_exactly_when_a_leaf_asks_for_it(name: str) -> None:
    call = GRAPHS[name]
    bare, watched = call(x3), call(x3.clone().requires_grad_())
    assert not any(r.requires_grad for r in tensors(bare))
    assert all(r.requires_grad for r in tensors(watched))
    with torch.no_grad():
        assert not any(r.requires_grad for r in tensors(call(x3.clone().requires_grad_())))
    assert close(tensors(fh.tree.tree_map(Tensor.detach, watched)), tensors(bare))


@pytest.mark.parametrize("name", GRAPHS)
def test_that_graph_is_right(name: str) -> None:
    """Backward through the result is the derivative of the result."""

    def total(x: Tensor) -> Tensor:
        return torch.stack([(r * 1.5).sum() for r in tensors(GRAPHS[name](x))]).sum()

    x = x3.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(x), x)
    expected, _ = oracles.derivative_by_differences(total, x3)
    assert relative_error(gradient, expected) < 1e-7


@pytest.mark.parametrize("name", GRAPHS)
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    assert all(torch.equal(p, q) for p, q in zip(tensors(GRAPHS[name](x3)), tensors(GRAPHS[name](x3)), strict=True))


def test_transformed_functions_keep_their_name() -> None:
    for transform in (grad, value_and_grad, vmap, jacfwd, jacrev):
        assert transform(quartic).__name__ == "quartic"


def test_errors_of_the_function_pass_untouched() -> None:
    class Mine(Exception):
        pass

    def f(x: Tensor) -> Tensor:
        raise Mine

    for call in FIRST_ORDER.values():
        with pytest.raises(Mine):
            call(f)
    assert levels.is_outermost()
    assert close(grad(quartic)(x3), grad(quartic)(x3))


# ---------------------------------------------------------------------------------------------------- threads and processes


def network() -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    return (lambda p: (mlp(p, x3) ** 2).sum()), P


@pytest.mark.parametrize("kind", ["hvp", "jvp"])
def test_eight_threads_have_480_right_products(kind: str) -> None:
    f, x = network()
    product = {"hvp": lambda v: hvp(f, x, v), "jvp": lambda v: jvp(grad(f), (x,), (v,))[1]}[kind]
    space = Space.of(x)
    vectors = [space.random(torch.Generator().manual_seed(k)) for k in range(8)]
    expected = [product(v) for v in vectors]

    def work(k: int) -> int:
        return sum(relative_error(product(vectors[k]), expected[k]) < EXACT for _ in range(60))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 480


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :1].expand(3, 3), lambda x: x.reshape(-1)[:5].unfold(0, 3, 1), lambda x: x.T, lambda x: x[:, ::2]],
    ids=range(4),
)
def test_points_whose_entries_share_memory_have_tangents_of_their_own(view: Callable[[Tensor], Tensor]) -> None:
    """torch lays a tangent out like its primal, so that it overlaps where the primal does."""
    x = view(torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3))
    v = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).reshape(x.shape)
    assert close(jvp(lambda x: (x**3).sum(), (x,), (v,))[1], (3 * x**2 * v).sum())
    assert close(jvp(grad(lambda x: (x**3).sum()), (x,), (v,))[1], 6 * x * v)
    assert close(hvp(lambda x: (x**3).sum(), x, v), 6 * x * v)
    assert close(jacfwd(lambda x: x**3)(x).flatten(2).flatten(0, 1), (3 * x**2).flatten().diag())
    assert close(vmap(lambda v: jvp(torch.sin, (x,), (v,))[1])(torch.stack([v, -v])), x.cos() * torch.stack([v, -v]))


def test_a_worker_inside_forward_mode_gets_an_error_that_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "FORWARD_MODE_TIMEOUT", 0.2)

    def f(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            factor = pool.submit(lambda: jvp(torch.sin, (x3,), (y3,))[1].sum()).result()
        return x * factor

    with pytest.raises(RuntimeError, match=r"waited 0 s for another thread to leave forward-mode .* starts a thread"):
        jvp(f, (x3,), (y3,))
    assert close(jvp(torch.sin, (x3,), (y3,))[1], x3.cos() * y3)


def test_the_lock_waits_for_the_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        inside.set()
        assert go.wait(10)
        return x.sin()

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: jvp(slow, (x3,), (y3,))[1])
        assert inside.wait(10)
        monkeypatch.setattr(levels, "FORWARD_MODE_TIMEOUT", 0.05)
        with pytest.raises(RuntimeError, match="waited"):
            jvp(torch.sin, (x3,), (y3,))
        assert close(grad(quartic)(x3), GRAPHS["grad"](x3))  # reverse mode asks for no lock
        go.set()
        assert close(first.result(), x3.cos() * y3)
    assert close(jvp(torch.sin, (x3,), (y3,))[1], x3.cos() * y3)


def test_the_lock_is_reentrant() -> None:
    assert close(jvp(lambda x: jvp(torch.sin, (x,), (y3,))[1], (x3,), (y3,))[1], -x3.sin() * y3**2)


FORKED = """
import os, threading, torch, warnings
from functional_hess import jvp, levels
levels.FORWARD_MODE_TIMEOUT = 5.0
inside, go = threading.Event(), threading.Event()
def slow(x):
    inside.set(); go.wait(30)
    return x.sin()
one = torch.tensor(1.0)
worker = threading.Thread(target=lambda: jvp(slow, (one,), (one,)))
worker.start(); inside.wait(30)
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
if child == 0:
    try:
        with levels._FORWARD_MODE:
            os._exit(7)
    except RuntimeError:
        os._exit(1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
go.set(); worker.join()
raise SystemExit(status)
"""


@pytest.mark.filterwarnings("error")
def test_a_forked_child_gets_a_lock_of_its_own() -> None:
    """The parent's other thread holds the lock at the fork, and will never release it in the child."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr


def test_buffers_of_modules_are_only_read() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double().eval()
    state = dict(net.state_dict())
    before = snapshot(state)
    params = {k: p.detach() for k, p in net.named_parameters()}
    X = torch.stack([x3, y3])

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, p, (X,)).square().sum()

    v = Space.of(params).random(torch.Generator().manual_seed(0))
    hvp(loss, params, v)
    jvp(loss, (params,), (v,))
    assert_unchanged(before)


def test_scenarios_can_be_found_by_name() -> None:
    assert close(grad(by_name("bilinear").f)(by_name("bilinear").x), by_name("bilinear").gradient)
