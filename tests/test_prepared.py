"""A prepared function is the function at other numbers, or a named error."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from functional_hess import (
    colored,
    explain,
    grad,
    hessian,
    hessian_diagonal,
    hvp,
    jacfwd,
    jacrev,
    lifting,
    prepare,
    vmap,
)
from functional_hess.prepared import PrepareError
from tests import oracles


def energy(x):
    return (x[1:] * x[:-1].sin()).sum() ** 2 + (x**4).sum()


def points(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


VERBS = {
    "hessian": (hessian(energy), lambda s: (points(5, seed=s),)),
    "hessian-in-chunks": (hessian(energy, chunk_size=2), lambda s: (points(5, seed=s),)),
    "forward-over-reverse": (hessian(energy, mode="forward-over-reverse"), lambda s: (points(5, seed=s),)),
    "hessian_diagonal": (hessian_diagonal(energy), lambda s: (points(5, seed=s),)),
    "hvp": (lambda x, v: hvp(energy, x, v), lambda s: (points(5, seed=s), points(5, seed=s + 9))),
    "many hessians": (vmap(hessian(energy)), lambda s: (points(7, 5, seed=s),)),
    "grad": (grad(energy), lambda s: (points(5, seed=s),)),
    "jacfwd": (jacfwd(torch.sin), lambda s: (points(5, seed=s),)),
    "jacrev of a hessian": (jacrev(hessian(energy)), lambda s: (points(4, seed=s),)),
    "torch.func": (torch.func.jacfwd(torch.func.grad(energy)), lambda s: (points(5, seed=s),)),
    "aux": (hessian(lambda x: (energy(x), (None, x * 2)), has_aux=True), lambda s: (points(5, seed=s),)),
    "tree": (
        hessian(lambda p, k: (p["b"] ** k).sum() * p["a"][0].exp()),
        lambda s: ({"b": points(2, seed=s), "a": (points(1, seed=s + 1)[0], None)}, 3),
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_prepared_function_is_the_function_at_other_numbers(verb):
    transformed, make = VERBS[verb]
    prepared = prepare(transformed, *make(0))
    for seed in (0, 1, 2):
        got, want = prepared(*make(seed)), transformed(*make(seed))
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prepared_hessians_agree_with_the_autograd_loop(dtype):
    prepared = prepare(hessian(energy), points(5, dtype=dtype))
    x = points(5, dtype=dtype, seed=3)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert oracles.relative_error(prepared(x), oracles.hessian(energy, (x,))[0][0]) < tolerance


def test_a_function_that_torch_compile_cannot_take_is_prepared():
    xs = points(7, 5)
    with pytest.raises(Exception):  # noqa: B017  whatever the compiler says
        torch.compile(vmap(hessian(energy)), backend="eager", fullgraph=True)(xs)
    assert torch.equal(prepare(vmap(hessian(energy)), xs)(xs), vmap(hessian(energy))(xs))


def test_what_is_no_tensor_in_a_result_comes_along():
    prepared = prepare(hessian(lambda x: (energy(x), {"name": "e", "x": x * 2}), has_aux=True), points(3))
    _, aux = prepared(points(3, seed=1))
    assert aux["name"] == "e" and torch.equal(aux["x"], 2 * points(3, seed=1))


def test_dead_operations_are_dropped_and_equal_ones_joined():
    def wasteful(x):
        (x.exp() * 3).cos()  # reaches nothing
        return x.sin() + x.sin() + torch.arange(4, dtype=x.dtype).sqrt()

    prepared = prepare(wasteful, points(4))
    assert prepared.operations == 3  # one sine, two sums; the root of a constant is kept
    x = points(4, seed=1)
    assert torch.equal(prepared(x), wasteful(x))


def test_what_is_written_to_in_place_is_left_alone():
    def build(x):
        a, b = torch.zeros(3, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)
        a[0], b[1] = x[0], x[1]
        a[1:].add_(1)
        return a, b, torch.zeros(3, dtype=x.dtype)

    prepared = prepare(build, points(2))
    for seed in (1, 2, 1):
        for got, want in zip(prepared(points(2, seed=seed)), build(points(2, seed=seed)), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("trifle", [0, 2**40])
def test_graphs_are_simplified_alike_on_fake_tensors_and_on_real_ones(trifle, monkeypatch):
    monkeypatch.setattr("functional_hess.prepared.TRIFLE", trifle)
    data, x = points(4), points(4, seed=1)
    mask = data > 0

    def f(x):
        return torch.where(mask, (data * x**3).cumsum(0), x**1 * torch.ones_like(x)).sum() + (x**2).sum()

    free, told = prepare(hessian(f), points(4)), prepare(hessian(f), points(4), constants=(data, mask))
    for prepared in (free, told):
        torch.testing.assert_close(prepared(x), hessian(f)(x), rtol=1e-14, atol=0)
    assert told.captured == () and len(free.captured) == 2 and told.operations <= free.operations
    assert free.operations < 40
    with pytest.raises(PrepareError, match="writes in place to a tensor that it closes over"):
        prepare(lambda x: x * data.view(2, 2).add_(x[0] * 0).view(4), points(4))


@pytest.mark.parametrize("trifle", [0, 2**40])
def test_constants_made_of_constants_are_all_kept(trifle, monkeypatch):
    monkeypatch.setattr("functional_hess.prepared.TRIFLE", trifle)

    def f(x):
        a = torch.ones_like(x).cos()
        b = a.sin()
        return x + a, x - b, b.exp() / x

    prepared = prepare(f, points(4))
    for got, want in zip(prepared(points(4, seed=1)), f(points(4, seed=1)), strict=True):
        assert torch.equal(got, want)
    assert prepared.operations == 3


def test_results_do_not_share_memory_from_call_to_call():
    prepared = prepare(lambda x: (torch.ones(2, dtype=x.dtype), x + 1), points(2))
    ones, _ = prepared(points(2))
    ones.zero_()
    assert torch.equal(prepared(points(2))[0], torch.ones(2, dtype=torch.float64))


def test_captured_tensors_are_listed_and_their_replacement_is_not_seen():
    weight = points(3)
    prepared = prepare(hessian(lambda x: (weight * x**3).sum()), points(3))
    assert prepared.captured == ("weight of shape (3,), torch.float64, cpu",)
    assert "captured weight of shape (3,)" in repr(prepared)
    x, before = points(3, seed=1), weight.clone()
    weight = points(3, seed=8)
    assert torch.allclose(prepared(x), torch.diag(6 * before * x))


def test_a_captured_tensor_changed_in_place_is_seen():
    weight = points(3)
    prepared = prepare(hessian(lambda x: (weight * x**3).sum()), points(3))
    weight.mul_(2)
    x = points(3, seed=1)
    assert torch.allclose(prepared(x), torch.diag(6 * weight * x))


def test_the_parameters_of_a_captured_module_are_named():
    layer = torch.nn.Linear(2, 1, dtype=torch.float64)
    prepared = prepare(grad(lambda x: layer(x).tanh().sum()), points(2))
    assert sorted(what.split(" of ")[0] for what in prepared.captured) == ["layer.bias", "layer.weight"]


GUARDS = {
    "shape": ((points(4),), r"args\[0\] must be a tensor of shape \(3,\), torch.float64, cpu, got a tensor of shape \(4,\)"),
    "dtype": ((points(3).float(),), r"args\[0\] must be .* torch.float64, cpu, got .* torch.float32"),
    "device": ((torch.empty(3, dtype=torch.float64, device="meta"),), r"args\[0\] must be .*, cpu, got .*, meta"),
    "no tensor": (([1.0, 2.0, 3.0],), r"args must have the same structure as the example"),
    "too many": ((points(3), points(3)), r"args must have the same structure as the example: unexpected args\[1\]"),
    "too few": ((), r"args must have the same structure as the example: missing args\[0\]"),
}


@pytest.mark.parametrize("what", GUARDS)
def test_other_arguments_are_refused_by_name(what):
    prepared = prepare(hessian(energy), points(3))
    args, message = GUARDS[what]
    with pytest.raises(ValueError, match=r"prepared for other arguments: " + message):
        prepared(*args)


def test_another_value_that_is_no_tensor_is_refused_and_all_differences_are_told():
    prepared = prepare(lambda x, k: (x["a"] ** k).sum() + x["b"], {"a": points(2), "b": points(1)[0]}, 3)
    with pytest.raises(ValueError) as told:
        prepared({"a": points(3), "b": points(1)[0].float()}, 2)
    for part in ("args[0]['a'] must be", "args[0]['b'] must be", "args[1] must be 3, got 2"):
        assert part in str(told.value)


def test_strides_follow_the_example():
    prepared = prepare(lambda x: x.view(6) * 2, points(2, 3))
    x = points(3, 2, seed=1).T
    assert torch.equal(prepared(x), x.reshape(6) * 2)


@pytest.mark.parametrize("branch", [lambda x: x.sum() if x[0] > 0 else x.prod(), lambda x: x.sum() * float(x[0])])
def test_a_branch_on_a_value_is_an_error(branch):
    with pytest.raises(PrepareError, match="looks at the value of an argument"):
        prepare(branch, points(3).abs())


def test_random_numbers_are_refused():
    with pytest.raises(PrepareError, match=r"draws random numbers \(aten.rand"):
        prepare(lambda x: x * torch.rand(3, dtype=x.dtype), points(3))
    drop = hessian(lambda x: torch.nn.functional.dropout(x**3).sum(), randomness="same")
    with pytest.raises(PrepareError, match="draws random numbers"):
        prepare(drop, points(3))


def test_writing_to_a_captured_tensor_or_an_argument_is_refused():
    counter = torch.zeros(3, dtype=torch.float64)

    def counting(x):
        counter.add_(x)
        return x * counter

    with pytest.raises(PrepareError, match="writes in place to a tensor that it closes over"):
        prepare(counting, points(3))
    with pytest.raises(PrepareError, match="writes in place to an argument"):
        prepare(lambda x: x.add_(1) * 2, points(3))


def test_a_function_that_is_another_each_time_is_caught_by_its_first_result():
    calls = iter(range(100))
    with pytest.raises(PrepareError, match="first prepared result differs from the eager one"):
        prepare(lambda x: x * next(calls), points(3))


def test_a_prepared_function_is_the_end_of_the_line():
    prepared = prepare(grad(energy), points(3))
    with pytest.raises(PrepareError, match="cannot run inside another transform"):
        vmap(prepared)(points(2, 3))
    with pytest.raises(PrepareError, match="cannot be prepared inside another transform"):
        vmap(lambda x: prepare(energy, x)(x))(points(2, 3))
    with pytest.raises(PrepareError, match="an argument requires grad"):
        prepared(points(3).requires_grad_())
    with torch.no_grad():
        assert not prepared(points(3).requires_grad_()).requires_grad


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend must be one of 'graph', 'inductor', got 'xla'"):
        prepare(energy, points(3), backend="xla")


def test_inputs_are_bitwise_unchanged():
    x = points(5)
    before = x.clone()
    prepare(hessian(energy), x)(x)
    assert torch.equal(x, before) and not x.requires_grad


def test_kept_numbers_that_are_equal_are_one_number_for_the_compiler(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compiled.append(forward.__self__) or forward)
    x = torch.linspace(0, 1, 4, dtype=torch.float64)

    def f(x):
        return (3 * torch.ones_like(x)) * x * torch.arange(4, dtype=x.dtype)

    assert torch.equal(prepare(f, x, backend="inductor")(2 * x), f(2 * x))
    kept = [getattr(compiled[0], node.target) for node in compiled[0].graph.find_nodes(op="get_attr")]
    assert [t.tolist() for t in kept] == [[0, 1, 2, 3]]


def test_the_inductor_backend_computes_the_same():
    prepared = prepare(vmap(hessian(energy)), points(7, 5), backend="inductor")
    x = points(7, 5, seed=4)
    torch.testing.assert_close(prepared(x), vmap(hessian(energy))(x), rtol=1e-12, atol=1e-12)


KILLERS = {  # each ends the process in torch 2.13 when it is traced without repairs
    "mean squared error": "torch.nn.functional.mse_loss(x * x, y)",
    "ldexp": "torch.ldexp(x * x, y).sum()",
}


@pytest.mark.parametrize("kind", KILLERS)
def test_functions_that_kill_a_tracing_process_are_prepared(kind):
    program = f"""
        import torch
        from functional_hess import grad, hessian, hvp, jvp, prepare
        torch.manual_seed(0)
        x, y, v = torch.randn(3, 4, dtype=torch.float64).unbind()
        f = lambda x: {KILLERS[kind]}
        for mode in ("forward-over-reverse", "reverse-over-reverse", "auto"):
            H = hessian(f, mode=mode)
            assert torch.allclose(prepare(H, x)(2 * x), H(2 * x), rtol=1e-13)
            p = lambda x, v: hvp(f, x, v, mode=mode)
            assert torch.allclose(prepare(p, x, v)(2 * x, v), p(2 * x, v), rtol=1e-13)
        by_hand = lambda x, v: jvp(grad(f), (x,), (v,))[1]
        assert torch.allclose(prepare(by_hand, x, v)(2 * x, v), p(2 * x, v), rtol=1e-13)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# Structure ---------------------------------------------------------------------------------------------------------------


def test_what_is_proved_of_numbers_is_prepared_by_rows(monkeypatch):
    """What a call proves of its own numbers is no basis for other numbers. (That samples of a risk are apart needs no proof.)"""
    monkeypatch.setattr(lifting, "WORTH_A_PROOF", 0)
    monkeypatch.setattr(colored, "WORTH_A_LOOK", 0)
    X, w = points(8, 5), points(5, 4, seed=1)

    def network(w):
        return torch.tanh(X @ w).square().sum()

    def chain(x):
        return (x[1:] * x[:-1] ** 3).sum()

    for route, f, args in (("lifted", network, (w,)), ("colored", chain, (points(40),))):
        assert explain(hessian(f), *args).route == route
        prepared = prepare(hessian(f), *args)
        moved = (2 * args[0], *args[1:])
        torch.testing.assert_close(prepared(*moved), hessian(f)(*moved), rtol=1e-11, atol=1e-12)
