"""A module as a pure function: its numbers, its derivatives, its names, and that nobody touches it."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import functional_hess as fh
from functional_hess import functionalize_module

DTYPES = (torch.float64, torch.float32)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def data(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Every object in a module and its bits: what must not change."""
    told: dict[str, Any] = {}
    for path, part in module.named_modules():
        told[path, "class"], told[path, "training"] = type(part), part.training
        for name, value in part.__dict__.items():
            told[path, name] = id(value)
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            told[path, name, "items"] = [(key, id(item)) for key, item in items]
            for key, t in [(None, value), *items]:
                if isinstance(t, Tensor):
                    grad = id(t.grad) if t.is_leaf else None
                    told[path, name, key] = (t._version, t.requires_grad, t.grad_fn, grad, t.data_ptr(), t.detach().tolist())
    return told


# Modules in many shapes ------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """y = W2 tanh(W1 x) with W2 = W1: one parameter in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class Shared(nn.Module):
    """One submodule in two places (pytorch#164759)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.last = nn.Sequential(nn.Tanh(), self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


class Stateful(nn.Module):
    """Writes wherever a forward can write, and reads the state it had when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)
        self.calls, self.log, self.cache = 0, [], {}
        self.constant = torch.tensor([1.0, -1.0])
        self.nested = {"by name": [torch.tensor(0.5)], "self": self}
        self.bound, self.holder = self._scaled, Holder(self)

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        assert self.calls == 0 and self.log == [] and self.cache == {} and self.nested["self"] is self
        assert self.holder.module is self and self.bound.__self__ is self and float(self.constant[0]) == 1.0
        self.calls += 1
        self.log.append(x)
        self.cache["last"] = x
        self.steps += 1
        self.constant.add_(1)
        self.nothing = x.sum()
        self.hook = self.register_forward_hook(lambda *_: None)
        out = self.bound(x) + self.nested["by name"][0] * self.holder.module.scale**2
        return 2 * out if twice else out


class Holder:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.tensor = module, torch.ones(2)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(lambda z: torch.tanh(self.inner(z)), x, use_reentrant=False))


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 2))


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.Tanh()))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.ones(3), torch.zeros(3)])
        self.by_name = nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(())})
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for weight, layer in zip(self.weights, self.layers, strict=True):
            x = torch.sin(layer(x)) * weight + self.by_name["a"]
        return x * self.by_name["b"]


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (5, 3)),
    "sequential with batch norm": (normalized, (5, 3)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Softplus()), (2, 2, 5)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2), nn.GELU()), (5, 3)),
    "attention": (attention, (2, 3, 4)),
    "lstm": (lambda: nn.LSTM(3, 2, num_layers=2), (4, 2, 3)),
    "tied": (Tied, (5, 3)),
    "shared": (Shared, (5, 3)),
    "lists": (Lists, (5, 3)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), (5, 3)),
    "weight norm by a hook": (old_weight_norm, (5, 3)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), (5, 3)),
    "spectral norm in eval mode": (lambda: parametrizations.spectral_norm(nn.Linear(3, 2)).eval(), (5, 3)),
    "torch.fx": (traced, (5, 3)),
}
each_module = pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)


def first(out: Any) -> Tensor:
    """The tensor among what a module returns."""
    return out[0] if isinstance(out, tuple) else out


# Values ----------------------------------------------------------------------------------------------------------------


@each_module
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_is_the_module(make, shape, dtype):
    net, x = made(make, dtype), data(*shape, dtype=dtype)
    apply, params, buffers = functionalize_module(net)
    torch.testing.assert_close(
        first(apply(params, buffers, x)), first(net(x)).detach(), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


@each_module
def test_names_are_those_of_the_module(make, shape):
    net = made(make)
    _, params, buffers = functionalize_module(net)
    assert list(params) == [name for name, _ in net.named_parameters()]
    assert list(buffers) == [name for name, _ in net.named_buffers()]
    assert all(torch.equal(params[name], p) for name, p in net.named_parameters())


def test_tensors_are_clones_without_a_graph():
    net = made(normalized)
    _, params, buffers = functionalize_module(net)
    for given, own in ((params, net.named_parameters()), (buffers, net.named_buffers())):
        for name, t in own:
            assert given[name].data_ptr() != t.data_ptr() and not given[name].requires_grad and type(given[name]) is Tensor


def test_apply_takes_other_points_dtypes_and_keywords():
    net = made(Stateful, torch.float32)
    apply, _, buffers = functionalize_module(net)
    scale, x = torch.tensor([5.0, 7.0], dtype=torch.float64), data(2)
    got = apply({"scale": scale}, buffers, x, twice=True)
    torch.testing.assert_close(got, 2 * (x * scale + 0.5 * scale**2), rtol=1e-14, atol=0)


def test_module_without_parameters_is_a_function_of_its_input():
    apply, params, buffers = functionalize_module(nn.Sequential(nn.Tanh(), nn.Flatten()))
    assert (params, buffers) == ({}, {})
    x = data(2, 3)
    torch.testing.assert_close(fh.grad(lambda x: apply({}, {}, x).sum())(x), 1 - x.tanh() ** 2)


# Derivatives -----------------------------------------------------------------------------------------------------------


def loss_of(net: nn.Module, *args: Tensor, **options: Any) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    apply, params, buffers = functionalize_module(net, **options)
    return (lambda p: torch.sin(1.3 * first(apply(p, buffers, *args)) + 0.4).sum()), params


def error_along(f: Callable[..., Tensor], params: dict[str, Tensor], v: dict[str, Tensor], *modes: str) -> float:
    """How far H v is from the difference of gradients that plain autograd finds, at worst over the modes."""
    names = sorted(params)

    def gradient(t: Tensor) -> Tensor:
        moved = [(params[name] + t * v[name]).requires_grad_() for name in names]
        found = torch.autograd.grad(f(dict(zip(names, moved, strict=True))), moved, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(moved, found, strict=True)])

    expected, _ = oracles.derivative_by_differences(gradient, torch.zeros((), dtype=torch.float64), h=2e-4)
    space = fh.Space.of(params)
    products = [space.matrix(fh.hessian(f, mode=mode)(params)) @ space.ravel(v) for mode in modes]
    return max(oracles.relative_error(product, expected) for product in products)


@each_module
def test_hessian_of_a_module_is_that_of_differences(make, shape, generator):
    f, params = loss_of(made(make), data(*shape))
    for _ in range(2):
        v = fh.Space.of(params).random(generator)
        if make is MODULES["orthogonal"][0]:  # the signs on this diagonal are rounded to integers: the value jumps there
            v["parametrizations.weight.original"].fill_diagonal_(0)
        assert error_along(f, params, v, "auto", "forward-over-reverse", "double-backward") < 1e-8


@each_module
def test_float32_hessian_is_that_of_float64(make, shape):
    wide, narrow = (loss_of(made(make).to(dtype), data(*shape, dtype=dtype)) for dtype in DTYPES)
    expected, got = (fh.Space.of(params).matrix(fh.hessian(f)(params)).double() for f, params in (wide, narrow))
    assert oracles.relative_error(got, expected) < 2e-3


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley"])
def test_orthogonal_parametrization_has_right_hessians(orthogonal_map, generator):
    net = made(lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map=orthogonal_map))
    f, params = loss_of(net, data(5, 3))
    assert error_along(f, params, fh.Space.of(params).random(generator), "auto", "forward-over-reverse") < 1e-8


def test_tied_weight_is_one_parameter():
    net = made(Tied)
    f, params = loss_of(net, x := data(5, 3))
    assert list(params) == ["encoder.weight", "decoder.bias"]

    def by_hand(bias: Tensor, weight: Tensor) -> Tensor:
        return torch.sin(1.3 * (torch.tanh(x @ weight.T) @ weight.T + bias) + 0.4).sum()

    leaves = [params["decoder.bias"], params["encoder.weight"]]
    expected = oracles.matrix(oracles.hessian(by_hand, leaves), leaves)
    assert oracles.relative_error(fh.Space.of(params).matrix(fh.hessian(f)(params)), expected) < 1e-12


def test_shared_submodule_is_called_with_the_same_parameters_twice_and_keeps_its_own():
    net = made(Shared)
    f, params = loss_of(net, x := data(5, 3))
    assert list(params) == ["first.weight", "first.bias"]

    def by_hand(bias: Tensor, weight: Tensor) -> Tensor:
        return torch.sin(1.3 * (torch.tanh(x @ weight.T + bias) @ weight.T + bias) + 0.4).sum()

    leaves = [params["first.bias"], params["first.weight"]]
    expected = oracles.matrix(oracles.hessian(by_hand, leaves), leaves)
    assert oracles.relative_error(fh.Space.of(params).matrix(fh.hessian(f)(params)), expected) < 1e-12
    assert net.first is net.last[1] and isinstance(net.first.weight, nn.Parameter)


def test_checkpoint_in_a_module_computes_again_with_the_parameters_of_the_call(generator):
    """functional_call has put the module's own back by then; see levels._Recomputation."""
    f, params = loss_of(made(Checkpointed), data(5, 3))
    params = {name: 1.5 * p + 0.1 for name, p in params.items()}
    assert error_along(f, params, fh.Space.of(params).random(generator), "auto", "double-backward") < 1e-8


def test_every_transform_takes_apply(generator):
    net, x = made(normalized), data(5, 3)
    f, params = loss_of(net, x)
    space = fh.Space.of(params)
    H, v = space.matrix(fh.hessian(f)(params)), space.random(generator)
    torch.testing.assert_close(space.ravel(fh.hvp(f, params, v)), H @ space.ravel(v))
    torch.testing.assert_close(space.ravel(fh.hessian_diagonal(f)(params)), H.diagonal())
    torch.testing.assert_close(torch.cat([rows for _, rows in fh.hessian_rows(f)(params)]), H)
    g = space.ravel(fh.grad(f)(params))
    torch.testing.assert_close(fh.jvp(f, (params,), (v,))[1], g @ space.ravel(v))
    torch.testing.assert_close(space.ravel(fh.vjp(f, params)[1](torch.ones((), dtype=torch.float64))[0]), g)
    third = fh.grad(lambda p: fh.tree.dot(fh.hvp(f, p, v), v))(params)
    h = 1e-4

    def curvature(t: float) -> Tensor:
        moved = space.unravel(space.ravel(params) + t * space.ravel(v))
        return fh.tree.dot(fh.hvp(f, moved, v), v)

    slope = (8 * (curvature(h) - curvature(-h)) - (curvature(2 * h) - curvature(-2 * h))) / (12 * h)
    torch.testing.assert_close(fh.tree.dot(third, v), slope, rtol=1e-6, atol=1e-8)


def test_ensemble_is_a_vmap_over_stacked_parameters_and_buffers():
    members = [functionalize_module(made(normalized, seed=seed), return_buffers=True) for seed in range(3)]
    x = data(5, 3)
    params, buffers = ({name: torch.stack([m[k][name] for m in members]) for name in members[0][k]} for k in (1, 2))
    apply = members[0][0]
    outputs, after = fh.vmap(apply, (0, 0, None))(params, buffers, x)
    for k, (_, p, b) in enumerate(members):
        out, own = apply(p, b, x)
        torch.testing.assert_close(outputs[k], out)
        torch.testing.assert_close({name: t[k] for name, t in after.items()}, own)


# Buffers ---------------------------------------------------------------------------------------------------------------


def test_batch_norm_in_train_mode_has_the_right_hessian():
    net, x = made(normalized), data(5, 3)
    f, params = loss_of(net, x)

    def by_hand(w0: Tensor, b0: Tensor, gamma: Tensor, beta: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
        h = x @ w0.T + b0
        h = (h - h.mean(0)) / ((h - h.mean(0)).square().mean(0) + 1e-5).sqrt() * gamma + beta
        return torch.sin(1.3 * (torch.tanh(h) @ w3.T + b3) + 0.4).sum()

    names = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    space, leaves = fh.Space.of(params), [params[name] for name in names]
    blocks = oracles.hessian(by_hand, leaves)
    tree = {p: {q: blocks[i][j] for j, q in enumerate(names)} for i, p in enumerate(names)}
    for mode in ("auto", "forward-over-reverse", "reverse-over-reverse", "double-backward"):
        H = space.matrix(fh.hessian(f, mode=mode)(params))
        assert oracles.relative_error(H, space.matrix(tree)) < 1e-10


def test_updated_buffers_are_those_of_the_module_step_by_step(inputs_unchanged):
    net, x = made(normalized), data(5, 3)
    apply, params, buffers = functionalize_module(net, return_buffers=True)
    inputs_unchanged(params, buffers, x)
    state = buffers
    for _ in range(3):
        out, state = apply(params, state, x)
        assert torch.equal(out, net(x))
    assert list(state) == list(buffers)
    assert all(torch.equal(state[name], t) for name, t in net.named_buffers())


def test_updated_buffers_are_aux_of_a_gradient_and_a_hessian():
    net, x = made(normalized), data(5, 3)
    apply, params, buffers = functionalize_module(net, return_buffers=True)

    def f(params):
        out, state = apply(params, buffers, x)
        return out.square().sum(), state

    expected = apply(params, buffers, x)[1]
    for aux in (fh.grad(f, has_aux=True)(params)[1], fh.hessian(f, has_aux=True)(params)[1]):
        torch.testing.assert_close(aux, expected)


def test_buffers_that_forward_binds_anew_are_returned():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
            return x - self.mean

    apply, params, buffers = functionalize_module(Running(), return_buffers=True)
    out, state = apply(params, buffers, torch.tensor([10.0, 20.0]))
    assert float(state["mean"]) == 1.5 and out.tolist() == [8.5, 18.5] and float(buffers["mean"]) == 0.0


def test_shared_buffer_is_one_buffer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2, affine=False)
            self.again = nn.BatchNorm1d(2, affine=False)
            self.again.running_mean = self.norm.running_mean

        def forward(self, x):
            return self.again(self.norm(x) + 1)

    net, x = Twice(), data(5, 2, dtype=torch.float32)
    apply, params, buffers = functionalize_module(net, return_buffers=True)
    assert "again.running_mean" not in buffers
    state = apply(params, buffers, x)[1]
    net(x)
    assert torch.equal(state["norm.running_mean"], net.again.running_mean)


# Chosen parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "only", ["3.*", ["3.weight", "3.bi*"], lambda path, p: path.startswith("3"), lambda path, p: p.shape[0] == 2]
)
def test_chosen_parameters_are_arguments_and_the_others_constants(only):
    net, x = made(normalized), data(5, 3)
    f, part = loss_of(net, x, only=only)
    whole, params = loss_of(net, x)
    assert list(part) == ["3.weight", "3.bias"]
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    pairs = {(p, q): block for (p, q), block in fh.hessian_blocks(whole, pairs=[("3.*", "3.*")])(params).items()}
    H = fh.hessian(f)(part)
    for (p, q), block in pairs.items():
        torch.testing.assert_close(H[p][q], block)


def test_predicate_sees_the_parameters_of_the_module():
    net = made(normalized)
    net[0].requires_grad_(False)
    _, params, _ = functionalize_module(net, lambda path, p: p.requires_grad)
    assert list(params) == ["1.weight", "1.bias", "3.weight", "3.bias"]


def test_any_path_of_a_tied_weight_chooses_it():
    assert list(functionalize_module(made(Tied), "decoder.*")[1]) == ["encoder.weight", "decoder.bias"]
    assert list(functionalize_module(made(Shared), "last.1.*")[1]) == ["first.weight", "first.bias"]


# The module is never touched -------------------------------------------------------------------------------------------


@each_module
def test_ids_and_bits_of_the_module_are_unchanged_after_a_hundred_calls(make, shape):
    net, x = made(make), data(*shape)
    before = fingerprint(net)
    apply, params, buffers = functionalize_module(net)
    held = oracles.snapshot(params, buffers)
    f = loss_of(net, x)[0]
    for _ in range(100):
        apply(params, buffers, x)
    fh.hessian_diagonal(f)(params)
    assert fingerprint(net) == before
    oracles.assert_unchanged(held)


def test_what_forward_writes_ends_with_the_call():
    net = made(Stateful)
    before = fingerprint(net)
    apply, params, buffers = functionalize_module(net)
    x = data(2)
    values = [apply(params, buffers, x) for _ in range(3)]
    assert all(torch.equal(value, values[0]) for value in values)
    f = lambda p: apply(p, buffers, x).square().sum()  # noqa: E731
    scale = params["scale"]
    by_hand = (2 * (x + scale) ** 2 + 2 * (x * scale + 0.5 * scale**2)).diag()
    torch.testing.assert_close(fh.hessian(f)(params)["scale"]["scale"], by_hand)
    assert fingerprint(net) == before


def test_module_is_unchanged_after_an_exception_in_the_middle():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear, self.log = nn.BatchNorm1d(3), nn.Linear(3, 3), []

        def forward(self, x, fail=True):
            self.log.append(1)
            out = self.linear(self.norm(x))
            if fail:
                raise KeyError("in the middle")
            return out

    net, x = made(Fails), data(5, 3)
    before = fingerprint(net)
    apply, params, buffers = functionalize_module(net)
    for f in (lambda p: apply(p, buffers, x), fh.grad(lambda p: apply(p, buffers, x).sum())):
        with pytest.raises(KeyError, match="in the middle"):
            f(params)
    assert fingerprint(net) == before
    assert torch.equal(apply(params, buffers, x, fail=False), made(Fails)(x, fail=False))


def test_eight_threads_have_eight_modules():
    barrier = threading.Barrier(8, timeout=60)

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = normalized()
            self.seen = []

        def forward(self, x, wait=True):
            self.seen.append(float(self.inner[0].weight.detach().flatten()[0]))
            if wait:
                barrier.wait()  # every thread is in the middle of its call
            assert len(self.seen) == 1 and float(self.inner[0].weight.detach().flatten()[0]) == self.seen[0]
            return self.inner(x)

    net, x = made(Waits), data(5, 3)
    before = fingerprint(net)
    apply, params, buffers = functionalize_module(net)
    expected = [apply({name: p + k for name, p in params.items()}, buffers, x, wait=False) for k in range(8)]
    found: dict[int, Tensor] = {}
    unchanged: list[bool] = []

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = apply({name: p + k for name, p in params.items()}, buffers, x)
            unchanged.append(fingerprint(net) == before)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(unchanged) == 40 and all(unchanged)
    assert all(torch.equal(found[k], expected[k]) for k in range(8))


def test_eight_threads_take_hessians_of_one_module():
    net, x = made(normalized), data(5, 3)
    f, params = loss_of(net, x)
    points = [{name: p + 0.1 * k for name, p in params.items()} for k in range(8)]
    space = fh.Space.of(params)
    expected = [space.matrix(fh.hessian(f)(point)) for point in points]
    before, found = fingerprint(net), {}

    def work(k: int) -> None:
        found[k] = [space.matrix(fh.hessian(f)(points[k])) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(H, expected[k]) for k in range(8) for H in found[k])
    assert fingerprint(net) == before


def test_apply_is_a_snapshot_of_the_module():
    net, x = made(normalized), data(5, 3)
    apply, params, buffers = functionalize_module(net)
    expected = apply(params, buffers, x)
    net.eval()
    net[3] = nn.Linear(4, 7)
    net[1].momentum = 0.0
    net[1].eps = 10.0
    with torch.no_grad():
        net[0].weight.zero_()
        net[1].running_mean.fill_(5.0)
    assert torch.equal(apply(params, buffers, x), expected)


def test_attributes_are_part_of_the_snapshot():
    net, x = made(Stateful), data(2)
    apply, params, buffers = functionalize_module(net)
    expected = apply(params, buffers, x)
    net.constant.zero_()
    net.nested["by name"][0].fill_(9.0)
    net.log.append("later")
    assert torch.equal(apply(params, buffers, x), expected)


def test_a_module_that_was_compiled_in_place_runs_uncompiled():
    """`module.compile()` leaves behind what holds on to the parameters of the module itself."""
    net = nn.Linear(3, 2)
    net._compiled_call_impl = lambda *_: pytest.fail("the module itself was called")
    apply, _, buffers = functionalize_module(net)
    assert apply({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, buffers, torch.ones(3)).tolist() == [3.0, 3.0]


def test_a_list_that_two_submodules_share_is_one_list_in_a_call():
    class Notes(nn.Module):
        def __init__(self, notes):
            super().__init__()
            self.notes = notes

        def forward(self, x):
            self.notes.append(x)
            return x + len(self.notes)

    notes: list[Any] = []
    apply, params, buffers = functionalize_module(nn.Sequential(Notes(notes), Notes(notes), Notes([])))
    assert [float(apply(params, buffers, torch.zeros(()))) for _ in range(2)] == [4.0, 4.0] and notes == []


def test_parameters_that_a_module_does_not_know_of_are_constants_without_a_graph():
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.hidden = nn.Linear(2, 2), [nn.Linear(2, 2)]
            self.holder = Holder(nn.Linear(2, 1))

        def forward(self, x):
            return self.holder.module(self.hidden[0](self.linear(x)))

    net = Hides()
    apply, params, buffers = functionalize_module(net)
    out = apply(params, buffers, torch.ones(2))
    assert list(params) == ["linear.weight", "linear.bias"] and not out.requires_grad and torch.equal(out, net(torch.ones(2)))


def test_the_graph_of_a_traced_module_is_not_copied(monkeypatch):
    net = traced()
    apply, params, buffers = functionalize_module(net)
    monkeypatch.setattr(torch.fx.Graph, "__deepcopy__", lambda *_: pytest.fail("the graph was copied"))
    assert torch.equal(apply(params, buffers, torch.ones(3)), net(torch.ones(3)))


def test_a_tensor_that_is_parameter_and_buffer_is_a_parameter():
    net = nn.Linear(2, 1)
    net.register_buffer("again", net.weight)
    apply, params, buffers = functionalize_module(net)
    assert list(params) == ["weight", "bias"] and buffers == {}
    assert torch.equal(apply(params, buffers, torch.ones(2)), net(torch.ones(2)))


def test_apply_keeps_no_tensor_of_a_call_and_not_the_module(inputs_unchanged):
    net, x = made(normalized), data(5, 3)
    f, params = loss_of(net, x)
    fh.hessian_diagonal(f)(params)
    before = living()
    for _ in range(20):
        fh.hessian_diagonal(f)(params)
    assert living() <= before
    del net
    assert living() < before


def living() -> int:
    gc.collect()
    return sum(issubclass(type(t), Tensor) for t in gc.get_objects())


# What cannot be done is refused ----------------------------------------------------------------------------------------


def test_wrong_names_and_shapes_are_listed_at_once():
    apply, params, buffers = functionalize_module(made(normalized))
    wrong = {name: p for name, p in params.items() if name != "0.bias"}
    wrong |= {"weight": torch.ones(1), "3.weight": torch.ones(2, 5), "1.bias": None}
    with pytest.raises(ValueError) as caught:
        apply(wrong, {**buffers, "1.running_mean": torch.zeros(3)}, data(5, 3))
    assert str(caught.value) == (
        "apply: missing params['0.bias']; unexpected params['weight']; params['1.bias'] must be a tensor, got NoneType; "
        "params['3.weight'] must have shape (2, 4), got (2, 5); buffers['1.running_mean'] must have shape (4,), got (3,). "
        "Start from the dicts that functionalize_module returned."
    )


def test_arguments_in_the_wrong_places_are_named():
    apply, params, _ = functionalize_module(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"^apply: buffers must be a dict of tensors, got Tensor\."):
        apply(params, torch.ones(2))


class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.act = lambda x: torch.tanh(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        assert self.linear.weight.dtype == torch.float64
        return self.act(x)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.linear.register_forward_hook(lambda part, args, out: out * self.linear.weight.sum())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("make", [Closure, Hooked])
def test_a_way_to_the_module_itself_is_found_at_the_first_call(make):
    net, x = made(make), data(5, 3)
    apply, params, buffers = functionalize_module(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has reached 'linear\.(weight|bias)' of the module itself: a closure, a hook"):
            apply(params, buffers, x)


def test_the_modules_own_parameters_may_be_given_and_may_be_asked_for_their_shape():
    net = made(Hooked)
    net.linear._forward_hooks.clear()
    net.linear.register_forward_hook(lambda part, args, out: out * net.linear.weight.shape[0] * net.linear.weight.size(1))
    apply, params, buffers = functionalize_module(net)
    x = data(5, 3)
    assert torch.equal(apply(dict(net.named_parameters()), buffers, x), net(x))
    assert torch.equal(apply(params, buffers, x), net(x))


def test_forward_that_writes_into_a_parameter_is_refused():
    class Clamps(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([-1.0, 2.0]))

        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(min=0)
            return x * self.weight

    net = Clamps()
    apply, params, buffers = functionalize_module(net)
    with pytest.raises(RuntimeError, match=r"has written into params\['weight'\] in place"):
        apply(params, buffers, torch.ones(2))
    assert net.weight.tolist() == [-1.0, 2.0]


def test_shared_buffer_that_forward_splits_is_refused():
    class Splits(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(2))
            self.register_buffer("b", self.a)

        def forward(self, x):
            self.b = self.a + 1
            return x

    apply, params, buffers = functionalize_module(Splits(), return_buffers=True)
    with pytest.raises(
        RuntimeError, match=r"^apply: buffers\['a'\] must be one tensor after the call, got a tensor of shape \(2,\), "
    ):
        apply(params, buffers, torch.ones(2))


def test_cache_of_parametrizations_is_refused():
    apply, params, buffers = functionalize_module(made(MODULES["weight norm"][0]))
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"parametrize\.cached\(\) is active"):
        apply(params, buffers, data(5, 3))


def refused() -> Iterator[tuple[str, Callable[[], Any], str]]:
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    class OptimizedModule(nn.Module):
        """What torch.compile returns is called so; compiling takes seconds."""

    yield "no module", lambda: torch.tanh, r"module must be a torch\.nn\.Module, got builtin_function_or_method\."
    yield "lazy", lambda: nn.Sequential(nn.LazyLinear(2)), r"module\.0 has 'weight' without a shape yet; call the module once"
    yield "replicas", lambda: nn.DataParallel(nn.Linear(1, 1)), r"module is a DataParallel, .* pass its \.module\."
    yield "compiled", lambda: nn.Sequential(OptimizedModule()), r"module\.0 is the result of torch\.compile, .* \._orig_mod\."
    yield "lock", lambda: nn.Sequential(Locked()), r"module\.0\.lock must be something that copies, got a lock \("
    train = parametrizations.spectral_norm(nn.Linear(2, 2))
    yield "spectral norm", lambda: nn.Sequential(train), r"module\.0\.parametrizations\.weight\.0 normalizes by spectral_norm in"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.spectral_norm(nn.Linear(2, 2))
    yield "old spectral norm", lambda: old, r"module normalizes by spectral_norm in train mode \(Linear\), .* module\.eval\(\)"


@pytest.mark.parametrize(("make", "message"), [row[1:] for row in refused()], ids=[row[0] for row in refused()])
def test_what_cannot_serve_is_refused_by_name(make, message):
    with pytest.raises(TypeError, match="^functionalize_module: " + message):
        functionalize_module(make())


def test_torchscript_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Linear(2, 1), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"module is TorchScript \(TopLevelTracedModule\)"):
        functionalize_module(scripted)


def test_choice_of_nothing_is_refused_with_the_paths():
    with pytest.raises(ValueError) as caught:
        functionalize_module(nn.Linear(2, 1), "wieght")
    assert str(caught.value) == ("functionalize_module: only='wieght' chose no parameter; the paths are 'weight', 'bias'.")


# The checks see what they are there for --------------------------------------------------------------------------------


def test_fingerprint_sees_a_module_that_was_touched():
    def touched(touch: Callable[[nn.Module], Any]) -> bool:
        net = made(normalized)
        before = fingerprint(net)
        touch(net)
        return fingerprint(net) != before

    assert not touched(lambda net: None)
    assert touched(lambda net: net(data(5, 3)))  # the running statistics
    assert touched(lambda net: net.eval())
    assert touched(lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach())))
    assert touched(lambda net: net.register_forward_hook(lambda *_: None))
    assert touched(lambda net: torch.func.functional_call(net, functionalize_module(copy.deepcopy(net))[1], (data(5, 3),)))
    assert touched(lambda net: net(data(5, 3)).sum().backward())
