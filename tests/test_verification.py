"""`checked()` passes what is right, names what is wrong, says where it can't tell, and costs what it says."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Network, network, numbers
from oracles import assert_unchanged, snapshot
from scenarios import SCENARIOS, VECTOR_SCENARIOS, Scenario, by_name, rebuild, tensors
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import functional_hess as fh
from functional_hess import blocks, levels, products, rows, second_order, vector_valued
from functional_hess.products import MODES
from functional_hess.testing import LawError

FORWARD, REVERSE, DOUBLE, _ = MODES
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

Verb = Callable[..., Any]
VERBS: dict[str, Verb] = {
    "hvp": lambda f, x, *args, **options: fh.hvp(f, x, tangent(x), *args, **options),
    "grad_and_hvp": lambda f, x, *args, **options: fh.grad_and_hvp(f, x, tangent(x), *args, **options),
    "hessian": lambda f, x, *args, **options: fh.hessian(f, **options)(x, *args),
    "value_grad_and_hessian": lambda f, x, *args, **options: fh.value_grad_and_hessian(f, **options)(x, *args),
    "hessian_rows": lambda f, x, *args, **options: [*fh.hessian_rows(f, **options)(x, *args)],
    "hessian_blocks": lambda f, x, *args, **options: fh.hessian_blocks(f, **options)(x, *args),
    "hessian_diagonal": lambda f, x, *args, **options: fh.hessian_diagonal(f, **options)(x, *args),
}
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


def tangent(x: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    return rebuild(x, iter([torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors(x)]))


def statuses(record: fh.Record) -> set[str]:
    return {call.status for call in record}


# No false alarm -------------------------------------------------------------------------------------------------------


@every_scenario
@pytest.mark.parametrize("mode", ["auto", FORWARD, DOUBLE])
def test_what_is_right_is_found_right(scenario: Scenario, mode: str) -> None:
    with fh.checked() as record:
        for verb in VERBS.values():
            verb(scenario.f, scenario.x, *scenario.args, mode=mode)
    assert len(record) == len(VERBS) and statuses(record) == {"right"}
    assert max(call.error for call in record) < 1e-6


@pytest.mark.parametrize("scenario", VECTOR_SCENARIOS, ids=str)
def test_the_hessian_of_several_outputs_is_found_right(scenario: Scenario) -> None:
    with fh.checked() as record:
        fh.hessian(scenario.f)(scenario.x, *scenario.args)
        fh.hessian(lambda *x: {"b": scenario.f(*x), "a": (scenario.f(*x).sum() ** 2, 7)})(scenario.x, *scenario.args)
    assert [call.status for call in record] == ["right", "right"]


class OldStyleCube(torch.autograd.Function):
    """No functorch level can enter it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * 3 * x**2


class Checkpointed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(torch.tanh, x, use_reentrant=False)


class OldStyle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OldStyleCube.apply(x)


def first_output(out: Any) -> Tensor:
    return torch.sin(out[0]).sum()


NETWORKS: dict[str, Callable[[torch.dtype], Network]] = {
    "layer norm": lambda dtype: network(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)), numbers(5, 3), dtype=dtype
    ),
    "batch norm": lambda dtype: network(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.SiLU()),
        numbers(5, 3),
        dtype=dtype,
    ),
    "group norm": lambda dtype: network(
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.GELU()), numbers(2, 2, 4), dtype=dtype
    ),
    "instance norm": lambda dtype: network(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Softplus()), numbers(2, 2, 5), dtype=dtype
    ),
    "weight norm": lambda dtype: network(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), numbers(5, 3), dtype=dtype
    ),
    "attention": lambda dtype: network(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), *[numbers(2, 3, 4)] * 3, loss=first_output, dtype=dtype
    ),
    "encoder layer": lambda dtype: network(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), numbers(2, 3, 4), dtype=dtype
    ),
    "lstm": lambda dtype: network(lambda: nn.LSTM(3, 2), numbers(4, 2, 3), loss=first_output, dtype=dtype),
    "gru": lambda dtype: network(lambda: nn.GRU(3, 2), numbers(4, 2, 3), loss=first_output, dtype=dtype),
    "mean squares": lambda dtype: network(
        lambda: nn.Linear(3, 2), numbers(5, 3), loss=lambda out: F.mse_loss(out, torch.ones_like(out)), dtype=dtype
    ),
    "checkpoint": lambda dtype: network(
        lambda: nn.Sequential(nn.Linear(3, 2), Checkpointed(), nn.Tanh()), numbers(5, 3), dtype=dtype
    ),
    "old-style function": lambda dtype: network(lambda: nn.Sequential(nn.Linear(3, 2), OldStyle()), numbers(5, 3), dtype=dtype),
    "max pooling": lambda dtype: network(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.Tanh()), numbers(2, 1, 5, 5), dtype=dtype
    ),
}


@dtypes
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_found_right(name: str, dtype: torch.dtype) -> None:
    net = NETWORKS[name](dtype)
    with fh.checked() as record:
        for verb in VERBS.values():
            verb(net.f, net.x)
    assert statuses(record) == {"right"}, str(record)


def rectified(seed: int, *, zeros: bool = False) -> Network:
    """A float32 ReLU network with its data, 200 samples; with zeros in a layer every unit behind it sits on its kink."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    x = {"w1": draw(6, 16), "b1": draw(16), "w2": draw(16, 16) / 4, "b2": draw(16), "w3": draw(16, 1) / 4}
    if zeros:
        x["w2"].zero_(), x["b2"].zero_()
    inputs, targets = draw(200, 6), draw(200, 1)

    def f(x: dict[str, Tensor]) -> Tensor:
        h = F.relu(F.relu(inputs @ x["w1"] + x["b1"]) @ x["w2"] + x["b2"])
        return F.mse_loss(h @ x["w3"], targets)

    return Network(f, x)


def test_rectified_networks_in_float32_give_no_alarm_and_are_found_right() -> None:
    with fh.checked() as record:
        for seed in range(20):
            net = rectified(seed)
            for verb in (VERBS["hvp"], VERBS["grad_and_hvp"], VERBS["hessian_diagonal"]):
                verb(net.f, net.x)
    assert [call.status for call in record].count("right") >= 55 and statuses(record) <= {"right", "inconclusive"}


@every_verb
def test_a_kink_at_the_point_is_inconclusive_and_no_alarm(verb: Verb) -> None:
    with fh.checked() as record:
        for seed in range(3):
            net = rectified(seed, zeros=True)
            verb(net.f, net.x)
    assert "inconclusive" in statuses(record) and statuses(record) <= {"right", "inconclusive"}


def test_functions_that_take_float32_alone_give_no_alarm_at_kinks() -> None:
    for seed in range(8):
        net = rectified(seed)

        def narrow(x: dict[str, Tensor], net: Network = net) -> Tensor:
            if x["w1"].dtype != torch.float32:
                raise TypeError("float32 alone")
            return net.f(x)

        with fh.checked() as record:
            for verb in (VERBS["hvp"], VERBS["grad_and_hvp"], VERBS["hessian_diagonal"]):
                verb(narrow, net.x)
        assert statuses(record) <= {"right", "inconclusive"}


# Every wrong pair -----------------------------------------------------------------------------------------------------

EYE = 2 * torch.eye(3, dtype=torch.float64)
PLACE = torch.tensor([[0, 1], [1, 1], [0, 0]])


def bent(y: Tensor) -> Tensor:
    """A nonlinear function of every output, so that no derivative vanishes."""
    return (torch.sin(1.1 * y + 0.2) * torch.linspace(0.3, 1.1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


def leaves(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: numbers(*shape, seed=k) for k, (name, shape) in enumerate(zip("abc", shapes, strict=False))}


def normed_gradients(x: dict[str, Tensor], norm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return bent(vmap(grad(lambda r: torch.sin(norm(r, x["b"])).sum()))(x["a"]))


# name: (f, x, the modes in which torch alone has second derivatives wrong)
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor], tuple[str, ...]]] = {
    "weight_norm": (lambda x: bent(torch._weight_norm(x["a"], x["b"], 0)), leaves((3, 2), (3, 1)), (REVERSE, DOUBLE)),
    "cholesky_inverse": (lambda x: bent(torch.cholesky_inverse(x["a"].tril() + EYE.to(x["a"]))), leaves((3, 3)), (FORWARD,)),
    "cholesky_inverse of a full matrix": (
        lambda x: bent(torch.cholesky_inverse(0.3 * x["a"] + EYE.to(x["a"]))),
        leaves((2, 3, 3)),
        (FORWARD, REVERSE, DOUBLE),
    ),
    "cholesky_solve of a full matrix": (
        lambda x: bent(torch.cholesky_solve(x["b"], 0.3 * x["a"] + EYE.to(x["a"]))),
        leaves((2, 3, 3), (2, 3, 2)),
        (FORWARD, REVERSE, DOUBLE),
    ),
    "triangular_solve": (
        lambda x: bent(torch.triangular_solve(x["b"], x["a"].triu() + EYE.to(x["a"]))[0]),
        leaves((3, 3), (3, 2)),
        (FORWARD,),
    ),
    "scatter_reduce of products": (
        lambda x: bent(x["a"].scatter_reduce(0, PLACE, x["b"], "prod")),
        leaves((4, 3), (3, 2)),
        (FORWARD,),
    ),
    "a vmapped select_scatter": (
        lambda x: bent(vmap(lambda a, b: torch.select_scatter(a, b, 0, -1))(x["a"], x["b"])),
        leaves((2, 3, 3), (2, 3)),
        (FORWARD, REVERSE, DOUBLE),
    ),
    "layer_norm in a vmapped gradient": (
        lambda x: normed_gradients(x, lambda r, w: F.layer_norm(r, (3,), w)),
        leaves((4, 3), (3,)),
        (FORWARD, REVERSE, DOUBLE),
    ),
    "batch_norm in a vmapped gradient": (
        lambda x: normed_gradients(x, lambda r, w: F.batch_norm(r, None, None, w, None, True)),
        leaves((2, 4, 3), (3,)),
        (FORWARD, REVERSE, DOUBLE),
    ),
    "_native_batch_norm_legit in a vmapped gradient": (
        lambda x: normed_gradients(x, lambda r, w: torch._native_batch_norm_legit(r, w, None, True, 0.1, 1e-5)[0]),
        leaves((2, 4, 3), (3,)),
        (FORWARD, REVERSE, DOUBLE),
    ),
    "det in a vmapped gradient": (
        lambda x: bent(vmap(grad(lambda a: torch.linalg.det(a + EYE.to(a)).sin()))(x["a"])),
        leaves((2, 3, 3)),
        (FORWARD, REVERSE),
    ),
    "as_strided_scatter": (
        lambda x: bent(torch.as_strided_scatter(x["a"], x["b"], (2,), (2,), 1)),
        leaves((4,), (2,)),
        (REVERSE, DOUBLE),
    ),
    "logcumsumexp after -inf": (
        lambda x: bent(torch.logcumsumexp(F.pad(x["a"], (1, 0), value=-torch.inf), 0)[1:]),
        leaves((3,)),
        (FORWARD,),
    ),
}
wrong = pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, (_, _, modes) in WRONG.items() for mode in modes])
deprecated = pytest.mark.filterwarnings(
    "ignore:torch.triangular_solve is deprecated:UserWarning", "ignore:There is a performance drop:UserWarning"
)


@pytest.fixture
def no_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "REPAIRS", {})
    monkeypatch.setattr(levels, "FIRST_ORDER_REPAIRS", frozenset())
    monkeypatch.setattr(levels, "MAPPED_REPAIRS", frozenset())


@wrong
@every_verb
@deprecated
@pytest.mark.usefixtures("no_repairs")
def test_every_known_wrong_pair_is_caught(name: str, mode: str, verb: Verb) -> None:
    f, x, _ = WRONG[name]
    dtype = torch.float32 if verb is VERBS["hessian"] else torch.float64
    x = {path: t.to(dtype) for path, t in x.items()}
    with pytest.raises(LawError, match=r"disagrees with central differences: at x(\['[ab]'\])? got"), fh.checked() as record:
        verb(f, x, mode=mode)
    assert record.calls[0].status == "wrong" and not record.calls[0].error <= 1e-3  # NaN, too


@dtypes
@deprecated
@pytest.mark.parametrize("name", WRONG)
def test_repaired_pairs_are_found_right(name: str, dtype: torch.dtype) -> None:
    f, x, _ = WRONG[name]
    x = {path: t.to(dtype) for path, t in x.items()}
    with fh.checked() as record:
        for verb, mode in itertools.product(VERBS.values(), (FORWARD, REVERSE)):
            verb(f, x, mode=mode)
    assert statuses(record) == {"right"}


SINGULAR = {
    "the square of a norm": (lambda x: x.norm() ** 2, torch.zeros(3, dtype=torch.float64)),
    "the square of a deviation": (lambda x: x.std() ** 2, torch.ones(3, dtype=torch.float64)),
    "the square of an absolute value": (lambda x: (x.abs() ** 2).sum(), torch.zeros(3, dtype=torch.float64)),
}


@every_verb
@pytest.mark.parametrize("mode", [FORWARD, REVERSE])
@pytest.mark.parametrize("name", SINGULAR)
def test_a_wrong_zero_or_nan_at_a_singular_point_is_caught(name: str, mode: str, verb: Verb) -> None:
    f, x = SINGULAR[name]
    with pytest.raises(LawError, match=r"got (0|nan), expected"), fh.checked():
        verb(f, x, mode=mode)


class WrongCube(torch.autograd.Function):
    """x^3 whose backward says 4 x^2 where 3 x^2 is right; its own derivative is that of 4 x^2."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * 4 * x**2


@every_verb
def test_a_wrong_gradient_is_caught_though_the_hessian_is_its_derivative(verb: Verb) -> None:
    x = {"good": numbers(3), "bad": numbers(2, seed=1)}
    with pytest.raises(LawError, match=r"the gradient g, as <g, w>, .* at x\['bad'\] got"), fh.checked():
        verb(lambda x: (x["good"] ** 3).sum() + bent(WrongCube.apply(x["bad"])), x, mode=REVERSE)


# The checker objects to what is wrong by a little, whoever computed it ------------------------------------------------

TREE = {"first": numbers(2, 3), "second": numbers(4, seed=1), "third": numbers(3, seed=2)}


def smooth(x: dict[str, Tensor]) -> Tensor:
    return torch.sin(x["first"].sum(0) * x["third"]).sum() * x["second"].exp().sum() + (x["second"] ** 3).sum()


def off(leaf: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A product that is off by one part in ten thousand on one leaf."""

    def wrapped(product_at: Callable[..., Any]) -> Callable[..., Any]:
        def wrongly(f: Any, x: Any, mode: str, rows: Any, columns: Any, **options: Any) -> Any:
            product = product_at(f, x, mode, rows, columns, **options)
            return lambda v: tuple(t * 1.0001 if column == leaf else t for column, t in zip(columns, product(v), strict=True))

        return wrongly

    return wrapped


@every_verb
@pytest.mark.parametrize("leaf", range(3))
def test_a_result_that_is_a_little_wrong_on_one_leaf_is_caught_and_the_leaf_named(
    leaf: int, verb: Verb, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (products, rows):
        monkeypatch.setattr(module, "product_at", off(leaf)(module.product_at))
    named = "first", "second", "third"
    with (
        pytest.raises(LawError, match=r"(H v|H w) along .* at x\['\w+'\] got .*; the largest disagreement there is \d") as raised,
        fh.checked() as record,
    ):
        verb(smooth, TREE, mode=REVERSE)
    assert record.calls[0].status == "wrong"
    if verb in (VERBS["hvp"], VERBS["grad_and_hvp"]):  # what one leaf of a row shows elsewhere is in the columns
        assert f"at x['{named[leaf]}'] got" in str(raised.value)


def test_a_gradient_that_is_a_little_wrong_is_caught_and_the_leaf_named(monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass = products._one_pass

    def wrongly(*args: Any) -> Any:
        g, *others = one_pass(*args)
        return (g[0], 1.0001 * g[1], g[2]), *others

    monkeypatch.setattr(products, "_one_pass", wrongly)
    with pytest.raises(LawError, match=r"grad_and_hvp: the gradient along .* at x\['second'\] got"), fh.checked():
        VERBS["grad_and_hvp"](smooth, TREE)


@pytest.mark.parametrize("verb", [VERBS["hessian"], VERBS["value_grad_and_hessian"]])
def test_blocks_put_in_the_wrong_place_are_caught(verb: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks.Blocks.block
    monkeypatch.setattr(
        blocks.Blocks, "block", lambda self, p, q: 2 * block(self, p, q) if (p, q) == (1, 2) else block(self, p, q)
    )
    with pytest.raises(LawError, match=r"hessian: H w along .* at x\['second'\] got"), fh.checked():
        verb(smooth, TREE)


def test_the_wrong_hessian_of_several_outputs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = by_name("scaled_direction")
    right = fh.hessian(scenario.f)(scenario.x)
    with fh.checked():
        fh.hessian(scenario.f)(scenario.x)
    monkeypatch.setattr(vector_valued, "_blocks_of", lambda *_: rebuild(right, (1.001 * t for t in tensors(right))))
    with pytest.raises(LawError, match="hessian: H w along"), fh.checked():
        fh.hessian(scenario.f)(scenario.x)


def test_a_wrong_row_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = second_order._stream
    monkeypatch.setattr(second_order, "_stream", lambda plan: ((r, part * (1 + 1e-4 * (r[0] >= 4))) for r, part in stream(plan)))
    taken = []
    with pytest.raises(LawError, match=r"hessian_rows: H w along .* at x\['first'\] got"), fh.checked() as record:
        for numbered, _ in fh.hessian_rows(smooth, chunk_size=2)(TREE):
            taken.append(numbered)
    assert taken == [range(2), range(2, 4)] and [call.status for call in record] == ["wrong"]


# What it costs --------------------------------------------------------------------------------------------------------


class Counted:
    """A function that knows how often it was asked for a gradient, and how often for a value."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f, self.gradients, self.values = f, 0, 0

    def __call__(self, x: Any, *args: Any) -> Tensor:
        tracked = any(torch._C._functorch.is_functorch_wrapped_tensor(t) or t.requires_grad for t in tensors(x))
        self.gradients += tracked
        self.values += not tracked
        return self.f(x, *args)


def calls_of(verb: Verb, f: Callable[..., Tensor], x: Any) -> tuple[int, int]:
    counted = Counted(f)
    verb(counted, x)
    return counted.gradients, counted.values


@every_verb
@dtypes
def test_a_check_costs_four_gradients_and_two_values(verb: Verb, dtype: torch.dtype) -> None:
    x = {name: t.to(dtype) for name, t in TREE.items()}
    outside = calls_of(verb, smooth, x)
    with fh.checked() as record:
        inside = calls_of(verb, smooth, x)
    assert (inside[0] - outside[0], inside[1] - outside[1]) == (
        5,
        1,
    )  # a value is taken one level deep, to see what f does beside
    assert (record.calls[0].gradients, record.calls[0].values) == (4, 2)


@every_verb
def test_outside_nothing_is_called_that_was_not_called_before(verb: Verb) -> None:
    before = calls_of(verb, smooth, TREE)
    with fh.checked():
        pass
    assert calls_of(verb, smooth, TREE) == before


def test_without_a_functorch_level_a_check_costs_one_failed_call_more() -> None:
    net = NETWORKS["old-style function"](torch.float64)
    with fh.checked() as record:
        counted = Counted(net.f)
        fh.hvp(counted, net.x, tangent(net.x), mode=DOUBLE)
    assert counted.gradients - 1 == record.calls[0].gradients + 1 == 5


def test_what_raises_in_a_check_leaves_the_block_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), fh.checked() as record:
        fh.hvp(lambda x: x.sum() / 0 * (1 // 0), TREE["third"], TREE["third"])
    assert [call.status for call in record] == ["not checked"] and "ZeroDivisionError" in record.calls[0].note
    fh.hvp(lambda x: (x**2).sum(), TREE["third"], TREE["third"])
    assert len(record) == 1


# Where it holds -------------------------------------------------------------------------------------------------------


def test_another_thread_is_not_checked() -> None:
    counted = Counted(smooth)
    with fh.checked() as record:
        thread = threading.Thread(target=lambda: VERBS["hvp"](counted, TREE))
        thread.start()
        thread.join()
    assert not record.calls and counted.values == 0


def test_threads_have_blocks_of_their_own() -> None:
    records: list[fh.Record] = []
    barrier = threading.Barrier(3)

    def run() -> None:
        with fh.checked() as record:
            barrier.wait()
            VERBS["hessian_diagonal"](smooth, TREE)
            records.append(record)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[call.status for call in record] for record in records] == [["right"]] * 3


def test_blocks_nest_and_a_call_is_checked_once() -> None:
    counted = Counted(smooth)
    with fh.checked() as outer:
        VERBS["hvp"](smooth, TREE)
        with fh.checked() as inner:
            VERBS["hvp"](counted, TREE)
        assert [call.verb for call in inner] == ["hvp"] and len(outer) == 2
        VERBS["hessian"](smooth, TREE)
    assert counted.values == 1 and len(inner) == 1 and [call.verb for call in outer] == ["hvp", "hvp", "hessian"]


def test_a_function_that_takes_derivatives_itself_is_checked_once() -> None:
    def f(x: Tensor) -> Tensor:
        return fh.hvp(lambda z: (z**4).sum(), x, x).sum() + fh.grad(lambda z: (z**3).sum())(x).sum()

    x = numbers(3)
    with fh.checked() as record:
        product = fh.hvp(f, x, x)
    outermost = [call for call in record if call.status != "not checked"]
    assert [(call.verb, call.status) for call in outermost] == [("hvp", "right")]
    assert {call.note for call in record} == {"", "called inside another transform"}
    torch.testing.assert_close(product, 72 * x**2 + 6 * x)


def test_under_another_transform_a_call_is_recorded_as_not_checked() -> None:
    x = numbers(4, 3)

    def trace(x: Tensor) -> Tensor:
        return fh.hessian(lambda z: (z**3).sum())(x).trace()

    with fh.checked() as record:
        fh.vmap(trace)(x)
        fh.grad(trace)(x[0])
        vmap(lambda r: fh.hvp(lambda z: (z**3).sum(), r, r))(x)
        fh.jvp(lambda r: fh.hessian_diagonal(lambda z: (z**3).sum())(r), (x[0],), (x[1],))
    assert [call.verb for call in record] == ["hessian", "hessian", "hvp", "hessian_diagonal"]
    assert statuses(record) == {"not checked"} and {call.note for call in record} == {"called inside another transform"}


def test_plain_autograd_outside_is_no_obstacle_and_keeps_its_graph() -> None:
    x = numbers(3).requires_grad_()
    with fh.checked() as record:
        trace = fh.hessian(lambda z: (z**3).sum())(x).trace()
    (third,) = torch.autograd.grad(trace, x)
    torch.testing.assert_close(third, torch.full_like(x, 6.0))
    assert statuses(record) == {"right"}


@every_verb
def test_checks_hold_under_no_grad_and_inference_mode(verb: Verb) -> None:
    with fh.checked() as record:
        with torch.no_grad():
            verb(smooth, TREE)
        with torch.inference_mode():
            verb(smooth, TREE)
    assert [call.status for call in record] == ["right", "right"]


# Randomness -----------------------------------------------------------------------------------------------------------


def dropped(x: dict[str, Tensor]) -> Tensor:
    return smooth({**x, "second": F.dropout(x["second"], 0.5)}) + (x["second"] ** 2).sum()


@every_verb
@dtypes
def test_one_draw_is_checked_by_the_same_draw_and_the_generator_left_alone(verb: Verb, dtype: torch.dtype) -> None:
    x = {name: t.to(dtype) for name, t in TREE.items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with fh.checked() as record:
        verb(dropped, x, randomness="same")
    assert statuses(record) == {"right"} and torch.equal(torch.get_rng_state(), state)


def test_draws_that_differ_are_not_checked() -> None:
    with fh.checked() as record:
        VERBS["hvp"](dropped, TREE, randomness="different")
    assert statuses(record) == {"not checked"} and "randomness='different'" in record.calls[0].note


def test_directions_come_from_the_generator_given_and_never_from_the_global_one() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def errors(generator: torch.Generator | None) -> list[float]:
        with fh.checked(generator=generator) as record:
            for _ in range(3):
                VERBS["hessian"](smooth, TREE)
        return [call.error for call in record]

    default = errors(None)
    assert default == errors(None) and len(set(default)) == 3  # anew for each call
    seeded = errors(torch.Generator().manual_seed(9))
    assert seeded == errors(torch.Generator().manual_seed(9)) != default
    assert torch.equal(torch.get_rng_state(), state)


# Every kind of call ---------------------------------------------------------------------------------------------------


def test_options_of_calls_are_honored() -> None:
    def f(a: Tensor, x: dict[str, Any], *, power: int) -> tuple[Tensor, str]:
        return (a * x["w"] ** power).sum() * x["b"] ** x["n"], "aux"

    a, x = numbers(3), {"w": numbers(3, seed=1), "b": numbers(seed=2), "n": 2, "none": None}
    with fh.checked() as record:
        for verb in (fh.hessian, fh.value_grad_and_hessian, fh.hessian_blocks, fh.hessian_diagonal):
            verb(f, argnums=1, has_aux=True)(a, x, power=3)
            verb(f, argnums=(0, 1), has_aux=True, mode="fastest", chunk_size=2)(a, x, power=3)
        [*fh.hessian_rows(f, argnums=(1, 0), has_aux=True, rows=[5, 0, 2], chunk_size=1)(a, x, power=3)]
        [*fh.hessian_rows(f, argnums=1, has_aux=True, rows=range(3, 0, -1))(a, x, power=3)]
        fh.hessian_blocks(f, argnums=1, has_aux=True, pairs=[("w", "b"), ("b", "b")])(a, x, power=3)
        fh.hessian(lambda x: f(a, x, power=3)[0], out=torch.empty(4, 4, dtype=torch.float64))(x)
        fh.hessian(lambda x: f(a, x, power=3)[0], symmetric=False)(x)
    assert statuses(record) == {"right"} and len(record) == 13


def test_parameters_of_two_dtypes_and_empty_leaves_are_checked() -> None:
    x = {"a": numbers(3).float(), "b": numbers(2, seed=1), "c": torch.zeros(0, 2)}
    with fh.checked() as record:
        for verb in VERBS.values():
            verb(lambda x: (x["a"].double() ** 3).sum() * x["b"].exp().sum() + x["c"].sum(), x)
    assert statuses(record) == {"right"}


def test_chosen_rows_are_checked_alone_and_rows_never_taken_not_at_all() -> None:
    with fh.checked() as record:
        stream = fh.hessian_rows(smooth, chunk_size=2)(TREE)
        next(stream)
        stream.close()
        next(iter(fh.hessian_rows(smooth, rows=[])(TREE)), None)
    assert [call.status for call in record] == ["right", "not checked"]


def test_a_stream_opened_inside_is_checked_where_it_is_read() -> None:
    with fh.checked() as record:
        stream = fh.hessian_rows(smooth, chunk_size=4)(TREE)
    assert not record.calls
    [*stream]
    assert [(call.status, call.gradients, call.values) for call in record] == [("right", 4, 2)]


def test_the_diagonal_of_leaves_in_several_groups_is_checked_one_group_a_call() -> None:
    x = {"a": numbers(30), "b": numbers(40, seed=1), "c": numbers(50, seed=2)}

    def f(x: dict[str, Tensor]) -> Tensor:
        return (x["a"].exp().sum() * (x["b"] ** 2).sum() + torch.sin(x["c"].sum() * x["a"]).sum()) / 100

    with fh.checked() as record:
        for _ in range(12):
            fh.hessian_diagonal(f, chunk_size=5)(x)
    assert statuses(record) == {"right"} and {call.place for call in record} >= {"x['a']", "x['b']", "x['c']"}


def test_a_product_of_an_asymmetric_hessian_is_inconclusive_with_a_note() -> None:
    class Swirling(torch.autograd.Function):
        """|y|^2, whose gradient is right where y = (1, 2) and turns aside around it."""

        @staticmethod
        def forward(y: Tensor) -> Tensor:
            return y.square().sum()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return u * (2 * y + torch.stack([y[1] - 2, 1 - y[0]]))

    x, v = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    with fh.checked() as record:
        product = fh.hvp(Swirling.apply, x, v, mode="finite-difference")
        transposed = fh.hvp(Swirling.apply, x, v)
    torch.testing.assert_close(product, torch.tensor([1.0, -3.0], dtype=torch.float64))
    torch.testing.assert_close(transposed, torch.tensor([3.0, -1.0], dtype=torch.float64))
    assert [call.status for call in record] == ["inconclusive", "right"]
    assert "H is not symmetric" in record.calls[0].note


def test_f_that_cannot_be_evaluated_beside_the_point_is_not_checked() -> None:
    def f(x: Tensor) -> Tensor:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x) and float(x.detach()[0]) != 1.0:
            raise ValueError("outside the domain")
        if float(x.detach()[0]) != 1.0:
            raise ValueError("outside the domain")
        return (x**3).sum()

    with fh.checked() as record:
        fh.hvp(f, torch.ones(2), torch.ones(2))
        fh.hessian(f)(torch.ones(2))
        assert len([*fh.hessian_rows(f, chunk_size=1)(torch.ones(2))]) == 2
    assert statuses(record) == {"not checked"}
    assert record.calls[0].note == "f raised ValueError near x: outside the domain"


def test_running_out_of_memory_in_a_check_is_not_silenced() -> None:
    calls = itertools.count()

    def f(x: Tensor) -> Tensor:
        if next(calls) > 3:
            raise torch.OutOfMemoryError("no more")
        return (x**3).sum()

    with pytest.raises(torch.OutOfMemoryError, match="no more"), fh.checked():
        fh.hvp(f, numbers(2), numbers(2))


def test_inputs_and_results_are_left_as_they_were() -> None:
    before = snapshot(TREE)
    for verb in VERBS.values():
        outside = verb(smooth, TREE, mode=REVERSE)
        with fh.checked():
            inside = verb(smooth, TREE, mode=REVERSE)
        for a, b in zip(fh.tree.tensors_of(outside)[0], fh.tree.tensors_of(inside)[0], strict=True):
            assert torch.equal(a, b)
    assert_unchanged(before)


def test_a_module_is_checked_with_its_constants_in_double_precision() -> None:
    """float32 data and buffers that f holds meet float64 parameters: only so is a kink out of reach."""
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 1)).eval()
    inputs = numbers(50, 3).float()
    with fh.checked() as record:
        f = lambda p: functional_call(net, p, (inputs,)).square().mean()  # noqa: E731
        fh.hvp(f, dict(net.named_parameters()), dict(net.named_parameters()))
    assert record.calls[0].status == "right" and record.calls[0].error < 1e-5


def test_a_record_prints_what_was_found() -> None:
    with fh.checked() as record:
        assert str(record) == "no call was checked"
        fh.hvp(lambda x: (x**3).sum(), numbers(2), numbers(2))
        fh.vmap(lambda r: fh.hvp(lambda z: (z**3).sum(), r, r))(numbers(2, 2))
    first, second = str(record).splitlines()
    assert first.startswith("hvp: right, at most ") and first.endswith(" off, at x (4 gradients, 2 values)")
    assert second == "hvp: not checked; called inside another transform"
    assert [*record] == record.calls
