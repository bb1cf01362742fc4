"""Hessian-vector products: right in every mode that has the rules, and an error that helps where none has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Network, network, numbers
from oracles import derivative_by_differences, gradient, hessian_by_differences, relative_error
from scenarios import SCENARIOS, Scenario, by_name, dense_hessian, rebuild, tensors
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from functional_hess import (
    MissingDerivativeError,
    RandomnessError,
    explain,
    grad,
    grad_and_hvp,
    hessian,
    hvp,
    jvp,
    levels,
    value_grad_and_hessian,
)
from functional_hess.products import MODES

FORWARD, REVERSE, DOUBLE, DIFFERENCE = MODES
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
every_mode = pytest.mark.parametrize("mode", ["auto", *MODES])
exact_mode = pytest.mark.parametrize("mode", ["auto", FORWARD, REVERSE, DOUBLE])


def tangent(x: Any, generator: torch.Generator) -> Any:
    """A random tree like x, its carried leaves carried along."""
    return rebuild(x, iter([torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors(x)]))


def product_by_hand(scenario: Scenario, v: Any) -> Any:
    """H v from the hand-written H, like the gradient."""
    parts = (dense_hessian(scenario) @ torch.cat([t.double().flatten() for t in tensors(v)])).split(
        [t.numel() for t in tensors(scenario.x)]
    )
    shapes = [t.shape for t in tensors(scenario.x)]
    return rebuild(scenario.gradient, (part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))


def single(tree: Any) -> Any:
    return rebuild(tree, (t.float() for t in tensors(tree)))


def narrowed(scenario: Scenario) -> tuple[Callable[..., Tensor], Any, tuple[Any, ...]]:
    """The function, its point and its arguments in float32; what f holds itself stays in float64."""

    def f(x: Any, *args: Any) -> Tensor:
        holds_a_matrix = scenario.name in ("quadratic_form", "linear")
        return scenario.f(x.double() if holds_a_matrix else x, *args).float()

    return f, single(scenario.x), single(scenario.args)


# The table ------------------------------------------------------------------------------------------------------------


@every_scenario
@every_mode
def test_hvp_is_the_hessian_times_the_vector(scenario, mode, generator, inputs_unchanged):
    v = tangent(scenario.x, generator)
    inputs_unchanged(v)
    product = hvp(scenario.f, scenario.x, v, *scenario.args, mode=mode)
    assert relative_error(product, product_by_hand(scenario, v)) < (1e-8 if mode == DIFFERENCE else 1e-13)


@every_scenario
@every_mode
def test_grad_and_hvp_is_the_gradient_and_the_product(scenario, mode, generator, inputs_unchanged):
    v = tangent(scenario.x, generator)
    inputs_unchanged(v)
    g, product = grad_and_hvp(scenario.f, scenario.x, v, *scenario.args, mode=mode)
    assert relative_error(g, scenario.gradient) < 1e-13
    assert relative_error(product, product_by_hand(scenario, v)) < (1e-8 if mode == DIFFERENCE else 1e-13)


@every_scenario
@exact_mode
def test_products_in_float32_have_float32_accuracy_and_dtype(scenario, mode, generator):
    f, x, args = narrowed(scenario)
    v = tangent(x, generator)
    g, product = grad_and_hvp(f, x, v, *args, mode=mode)
    assert all(t.dtype == torch.float32 for t in (*tensors(g), *tensors(product)))
    assert relative_error(g, scenario.gradient) < 1e-5
    assert relative_error(product, product_by_hand(scenario, v)) < 1e-5
    assert relative_error(hvp(f, x, v, *args, mode=mode), product) < 1e-6


@every_scenario
def test_differences_in_float32_keep_a_few_digits(scenario, generator):
    f, x, args = narrowed(scenario)
    v = tangent(x, generator)
    product = hvp(f, x, v, *args, mode=DIFFERENCE)
    assert relative_error(product, product_by_hand(scenario, v)) < 2e-2


@exact_mode
def test_results_are_plain_contiguous_tensors(mode, generator):
    for scenario in SCENARIOS:
        g, product = grad_and_hvp(scenario.f, scenario.x, tangent(scenario.x, generator), *scenario.args, mode=mode)
        for t in (*tensors(g), *tensors(product)):
            assert type(t) is Tensor and t.is_contiguous() and not t._is_zerotensor() and not t.is_neg()
            assert not t.requires_grad and t.untyped_storage().nbytes() >= t.numel() * t.element_size()


@exact_mode
def test_results_are_plain_where_derivatives_are_views(mode):
    x, v = numbers(2, 3), numbers(2, 3, seed=1)
    for f in (lambda x: x.sum() ** 2, lambda x: (x.T @ x).sum(), lambda x: x.sum(), lambda x: (x.T.flip(0) ** 2)[0].sum()):
        for t in (hvp(f, x, v, mode=mode), *grad_and_hvp(f, x, v, mode=mode)):
            assert t.is_contiguous() and not t._is_zerotensor() and t.untyped_storage().nbytes() >= 8 * t.numel()


def test_a_tangent_may_hold_none_or_the_leaf_at_carried_leaves(generator):
    scenario = by_name("leaves_carried_along")
    v = tangent(scenario.x, generator)
    bare = {name: part if name == "weights" else None for name, part in v.items()}
    assert relative_error(hvp(scenario.f, scenario.x, bare), product_by_hand(scenario, v)) < 1e-13


def test_extra_arguments_follow_the_vector():
    def f(x: Tensor, a: Tensor, power: int, *, scale: float = 1.0) -> Tensor:
        return scale * (a * x**power).sum()

    x, v, a = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0]), torch.tensor([3.0, 4.0])
    assert torch.equal(hvp(f, x, v, a, 3), 6 * a * x * v)
    assert torch.equal(grad_and_hvp(f, x, v, a, 3)[0], 3 * a * x**2)


AUX = {
    "string": "text",
    "none": None,
    "number": 3,
    "tree": {"name": ("a", [1, None]), "empty": (), "tensor": torch.tensor([1, 2])},
    "object": object(),
}


@every_mode
@pytest.mark.parametrize("aux", AUX.values(), ids=AUX)
def test_aux_of_any_kind_comes_back(mode, aux):
    def f(x: Tensor) -> tuple[Tensor, Any]:
        return (x**3).sum(), (aux, x * 2)

    x, v = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    product, (kept, doubled) = hvp(f, x, v, mode=mode, has_aux=True)
    assert relative_error(product, 6 * x * v) < 1e-8 and torch.equal(doubled, 2 * x) and not doubled.requires_grad
    assert kept is aux or repr(kept) == repr(aux)
    (g, (kept, doubled)), product = grad_and_hvp(f, x, v, mode=mode, has_aux=True)
    assert relative_error(g, 3 * x**2) < 1e-13 and relative_error(product, 6 * x * v) < 1e-8
    assert (kept is aux or repr(kept) == repr(aux)) and torch.equal(doubled, 2 * x)


def test_aux_that_is_missing_is_an_error():
    with pytest.raises(TypeError, match=r"has_aux=True f must return \(value, aux\), got a tensor"):
        hvp(lambda x: x.sum(), torch.ones(2), torch.ones(2), has_aux=True)


# Wrong calls ----------------------------------------------------------------------------------------------------------

POINT = {"w": torch.ones(2), "b": (torch.ones(()), None)}
WRONG_TANGENTS = {
    "shape": ({"w": torch.ones(3), "b": (torch.ones(()), None)}, r"tangent\['w'\].*\(2,\).*\(3,\)"),
    "deep shape": ({"w": torch.ones(2), "b": (torch.ones(1), None)}, r"tangent\['b'\]\[0\].*\(\).*\(1,\)"),
    "dtype": ({"w": torch.ones(2).double(), "b": (torch.ones(()), None)}, r"tangent\['w'\].*float32.*float64"),
    "device": ({"w": torch.ones(2, device="meta"), "b": (torch.ones(()), None)}, r"tangent\['w'\].*cpu.*meta"),
    "missing": ({"w": torch.ones(2), "b": (None, None)}, r"tangent\['b'\]\[0\] must be a tensor, got NoneType"),
    "a number": ({"w": torch.ones(2), "b": (1.0, None)}, r"tangent\['b'\]\[0\] must be a tensor, got float"),
    "keys": ({"v": torch.ones(2), "b": (torch.ones(()), None)}, "tangent.*'w'"),
    "structure": ({"w": torch.ones(2), "b": [torch.ones(()), None]}, "tangent"),
    "length": ({"w": torch.ones(2), "b": (torch.ones(()),)}, "tangent"),
    "a tensor": (torch.ones(3), "tangent"),
}


@pytest.mark.parametrize(("v", "message"), WRONG_TANGENTS.values(), ids=WRONG_TANGENTS)
def test_a_wrong_tangent_is_refused_by_its_path(v, message):
    calls = []

    def f(x: Any) -> Tensor:
        calls.append(x)
        return (x["w"] ** 2).sum() * x["b"][0]

    for verb in (hvp, grad_and_hvp):
        with pytest.raises(TypeError if "be a tensor" in message else ValueError, match=message):
            verb(f, POINT, v)
    assert not calls  # at the door


@pytest.mark.parametrize("mode", ["reverse-over-forward", "fast", "", None])
def test_an_unknown_mode_is_refused_with_the_modes_there_are(mode):
    with pytest.raises(ValueError, match=r"hvp: mode must be .*forward-over-reverse.*finite-difference"):
        hvp(lambda x: x.sum(), torch.ones(2), torch.ones(2), mode=mode)


@pytest.mark.parametrize(
    ("f", "message"), [(lambda x: x, r"shape \(2,\)"), (lambda x: (x.sum(), 1), "has_aux"), (lambda x: 3.0, "float")]
)
def test_a_function_that_is_not_scalar_is_refused(f, message):
    with pytest.raises(TypeError, match=rf"hvp: f must return a scalar.*{message}"):
        hvp(f, torch.ones(2), torch.ones(2))


def test_a_point_without_floating_tensors_is_refused():
    with pytest.raises(TypeError, match=r"hvp: x holds no floating tensor.*int64"):
        hvp(lambda x: x.sum(), torch.tensor([1, 2]), torch.tensor([1, 2]))


# What torch lacks rules for -------------------------------------------------------------------------------------------


class OldStyleCube(torch.autograd.Function):
    """x^3 without setup_context: no functorch level can enter it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cotangent * 3 * x**2


class Head(nn.Module):
    """Linear, a bend, linear: something for a loss or a checkpoint to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class OldStyle(Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(OldStyleCube.apply(self.first(x)))


class ScaledDotProduct(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project, self.options = nn.Linear(3, 12), options

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.project(x).chunk(3, -1), **self.options)


def attention(need_weights: bool, **options: Any) -> Callable[..., Network]:
    sequence = numbers(2, 3, 4)
    return lambda dtype: network(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, **options),
        *[sequence] * 3,
        loss=lambda out: torch.sin(out[0]).sum() + (out[1].square().sum() if need_weights else 0),
        dtype=dtype,
        need_weights=need_weights,
    )


def encoder(train: bool) -> Callable[..., Network]:
    make = lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)  # noqa: E731
    return lambda dtype: network(make, numbers(2, 3, 4), dtype=dtype, train=train)


def checkpointed(dtype: torch.dtype) -> Network:
    """Written out: what functional_call swaps in is gone by the time a checkpoint is recomputed."""
    net = network(Head, numbers(5, 3), dtype=dtype)
    data = numbers(5, 3).to(dtype)

    def f(x: dict[str, Tensor]) -> Tensor:
        def hidden(weight: Tensor, bias: Tensor) -> Tensor:
            return torch.tanh(F.linear(data, weight, bias))

        h = checkpoint(hidden, x["first.weight"], x["first.bias"], use_reentrant=False)
        return torch.sin(F.linear(h, x["second.weight"], x["second.bias"])).sum()

    return Network(f, net.x)


def against(criterion: Callable[..., Tensor]) -> Callable[..., Network]:
    target = numbers(5, 2, seed=3)
    return lambda dtype: network(Head, numbers(5, 3), loss=lambda out: criterion(out, target.to(out.dtype)), dtype=dtype)


def recurrent(make: Callable[[], nn.Module]) -> Callable[..., Network]:
    return lambda dtype: network(make, numbers(4, 2, 3), loss=lambda out: torch.sin(out[0]).sum(), dtype=dtype)


# name: (network of a dtype, the modes of which one must do it in "auto")
WITHOUT_RULES: dict[str, tuple[Callable[..., Network], tuple[str, ...]]] = {
    "mse_loss": (against(nn.MSELoss(reduction="mean")), (FORWARD, REVERSE)),
    "mse_loss of a sum": (against(nn.MSELoss(reduction="sum")), (FORWARD, REVERSE)),
    "huber_loss": (against(nn.HuberLoss(delta=0.7)), (FORWARD, REVERSE)),
    "smooth_l1_loss": (against(nn.SmoothL1Loss(beta=0.7)), (FORWARD, REVERSE)),
    "lstm": (recurrent(lambda: nn.LSTM(3, 2)), (FORWARD, REVERSE)),
    "lstm of two layers, both ways": (recurrent(lambda: nn.LSTM(3, 2, 2, bidirectional=True)), (FORWARD, REVERSE)),
    "gru": (recurrent(lambda: nn.GRU(3, 2)), (FORWARD, REVERSE)),
    "scaled_dot_product_attention": (lambda dtype: network(ScaledDotProduct, numbers(2, 5, 3), dtype=dtype), (FORWARD, REVERSE)),
    "causal attention": (
        lambda dtype: network(lambda: ScaledDotProduct(is_causal=True), numbers(2, 5, 3), dtype=dtype),
        (FORWARD, REVERSE),
    ),
    "attention with weights": (attention(True), (FORWARD, REVERSE)),
    "attention without weights": (attention(False), (FORWARD, REVERSE)),
    "encoder layer in training": (encoder(True), (FORWARD, REVERSE)),
    "encoder layer in evaluation": (encoder(False), (FORWARD, REVERSE)),
    "checkpoint": (checkpointed, (DOUBLE,)),
    "old-style Function": (lambda dtype: network(OldStyle, numbers(5, 3), dtype=dtype), (DOUBLE,)),
}
every_gap = pytest.mark.parametrize("name", WITHOUT_RULES)
_truth: dict[str, Tensor] = {}


def true_product(name: str, v: Tensor) -> Tensor:
    """H v by differences of the gradient along v; attention by its written-out kernel."""
    if name not in _truth:
        net = WITHOUT_RULES[name][0](torch.float64)

        def gradient_along(t: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return gradient(net.of_vector, [net.vector + t * v])[0]

        _truth[name] = derivative_by_differences(gradient_along, torch.zeros((), dtype=torch.float64), 5e-4)[0]
    return _truth[name]


@every_gap
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_what_torch_lacks_rules_for_is_right_and_its_mode_is_reported(name, dtype, caplog):
    make, modes = WITHOUT_RULES[name]
    net = make(dtype)
    v = numbers(net.vector.numel(), seed=5)
    with caplog.at_level(logging.DEBUG, logger="functional_hess"):
        product = hvp(net.f, net.x, {key: part.to(dtype) for key, part in net.tree(v).items()})
    assert relative_error(product, net.tree(true_product(name, v))) < (1e-8 if dtype == torch.float64 else 2e-5)
    reported = [record.getMessage() for record in caplog.records if record.getMessage().startswith("hvp: mode ")]
    assert reported in [[f"hvp: mode {mode}"] for mode in modes]


@every_gap
def test_the_hessian_of_what_torch_lacks_rules_for_tells_its_mode(name, caplog):
    make, modes = WITHOUT_RULES[name]
    net = make(torch.float64)
    told = explain(hessian(net.f), net.x)
    assert told.mode in modes and told.mode in str(told)
    with caplog.at_level(logging.DEBUG, logger="functional_hess"):
        H = hessian(net.f)(net.x)
    assert {f"hessian: mode {told.mode}"} == {r.getMessage() for r in caplog.records if "hessian: mode" in r.getMessage()}
    v = numbers(net.vector.numel(), seed=5)
    names = sorted(net.x)
    rows = {p: sum(torch.tensordot(H[p][q], net.tree(v)[q], net.x[q].dim()) for q in names) for p in names}
    assert relative_error(rows, net.tree(true_product(name, v))) < 1e-8


def test_differences_do_what_no_rule_does():
    net = WITHOUT_RULES["mse_loss"][0](torch.float64)
    v = numbers(net.vector.numel(), seed=5)
    assert relative_error(hvp(net.f, net.x, net.tree(v), mode=DIFFERENCE), net.tree(true_product("mse_loss", v))) < 1e-8


def test_the_mode_that_works_is_remembered(caplog):
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(x)
        return OldStyleCube.apply(x).sum()

    x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
    counts = []
    for _ in range(2):
        calls.clear()
        assert torch.equal(hvp(f, x, v), 6 * x * v)
        counts.append(len(calls))
    assert counts[0] > counts[1] == 1


def test_inside_another_derivative_a_product_avoids_the_modes_that_torch_has_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reverse over forward mode takes the LU factors that log |det| saves for constants, and so does forward over forward."""
    for table in ("REPAIRS", "FIRST_ORDER_REPAIRS", "MAPPED_REPAIRS"):
        monkeypatch.setattr(levels, table, {})
    x, v = numbers(3, 3) + 3 * torch.eye(3, dtype=torch.float64), numbers(3, 3, seed=1)

    def curvature(x: Tensor, mode: str = "auto") -> Tensor:
        return (hvp(lambda a: torch.linalg.slogdet(a).logabsdet.sin(), x, v, mode=mode) * v).sum()

    truth = derivative_by_differences(lambda t: curvature(x + t * v), torch.zeros(1, dtype=torch.float64))[0].squeeze()
    for derivative in (lambda f: (grad(f)(x) * v).sum(), lambda f: jvp(f, (x,), (v,))[1]):
        assert (derivative(curvature) - truth).abs() < 1e-7 * truth.abs()
        assert (derivative(lambda x: curvature(x, FORWARD)) - truth).abs() > 1e-2 * truth.abs()


@pytest.mark.parametrize("verb", [lambda f, w: grad(f)(w), lambda f, w: hvp(f, w, w), lambda f, w: hvp(f, w, w, mode=DOUBLE)])
@pytest.mark.parametrize("front", [F.embedding, F.embedding_bag])
def test_an_embedding_that_scales_its_rows_in_place_is_refused_and_leaves_the_point_alone(verb: Any, front: Any) -> None:
    w, rows = 3 * numbers(3, 2), torch.tensor([[0, 2]])
    before = w.clone()
    with pytest.raises(NotImplementedError, match=r"max_norm writes into weight.*torch\.renorm"):
        verb(lambda w: front(rows, w, max_norm=1.0).sin().sum(), w)
    assert torch.equal(w, before)
    bounded = hvp(lambda w: front(rows, torch.renorm(w, 2.0, 0, 1.0)).sin().sum(), w, w)
    held = hvp(lambda x: (front(rows, w.clone(), max_norm=1.0) * x).sin().sum(), x := numbers(2), x)
    assert bool(bounded.isfinite().all()) and bool(held.isfinite().all())


def test_what_only_plain_autograd_can_enter_has_its_gradient_and_its_graph_too():
    def f(x: Tensor) -> tuple[Tensor, str]:
        return OldStyleCube.apply(x).sum(), "text"

    x, v = numbers(4), numbers(4, seed=1)
    (g, aux), product = grad_and_hvp(f, x, v, has_aux=True)
    assert aux == "text" and relative_error((g, product), (3 * x**2, 6 * x * v)) < 1e-14
    (value, aux), g, H = value_grad_and_hessian(f, has_aux=True)(x)
    assert aux == "text" and relative_error((value, g, H), ((x**3).sum(), 3 * x**2, torch.diag(6 * x))) < 1e-14
    assert not any(t.requires_grad for t in (value, g, H, product))
    watched = x.clone().requires_grad_()
    (g, _), product = grad_and_hvp(f, watched, v, has_aux=True)
    _, again, H = value_grad_and_hessian(f, has_aux=True)(watched)
    for result, slope in ((g, 6 * x), (again, 6 * x), (product, 6 * v), (H, torch.full_like(x, 6.0))):
        assert relative_error(torch.autograd.grad(result.sum(), watched)[0], slope) < 1e-14


def test_plain_autograd_is_refused_inside_another_transform():
    def f(x: Tensor) -> Tensor:
        return (x**3).sum()

    with pytest.raises(NotImplementedError, match="mode='double-backward' is plain autograd"):
        torch.func.vmap(lambda x: hvp(f, x, x, mode=DOUBLE))(torch.ones(2, 3))


# Exceptions -----------------------------------------------------------------------------------------------------------


class UserError(RuntimeError):
    pass


EXCEPTIONS = [
    UserError("mine"),
    ValueError("mine"),
    KeyError("mine"),
    StopIteration(),
    NotImplementedError("mine"),
    RuntimeError("shape mismatch of mine"),
    MemoryError("mine"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    ),
    KeyboardInterrupt(),
]


@every_mode
@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: f"{type(error).__name__}: {error}"[:30])
def test_an_exception_of_the_function_comes_out_untouched(mode, error):
    def f(x: Tensor) -> Tensor:
        raise error

    for call in (
        lambda: hvp(f, torch.ones(2), torch.ones(2), mode=mode),
        lambda: grad_and_hvp(f, torch.ones(2), torch.ones(2), mode=mode),
        lambda: hessian(f, mode=mode)(torch.ones(2)),
    ):
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error and error.__cause__ is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), UserError("late"), MemoryError()])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_an_exception_of_a_later_evaluation_comes_out_untouched(error, when):
    """On the way down the chain, too: here forward and reverse have no rule, and memory runs out behind them."""
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == when:
            raise error
        return OldStyleCube.apply(x).sum()

    for call in (lambda: hvp(f, torch.ones(2), torch.ones(2)), lambda: hessian(f)(torch.ones(2))):
        calls.clear()
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error


def test_an_exception_is_raised_once_not_once_a_mode():
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(x)
        raise UserError

    with pytest.raises(UserError):
        hvp(f, torch.ones(2), torch.ones(2))
    assert len(calls) == 1


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * 3 * ctx.saved_tensors[0] ** 2


def connectionist(x: Tensor) -> Tensor:
    lengths = torch.tensor([4])  # the kernel itself is not repaired, F.ctc_loss is
    return torch._ctc_loss(x.reshape(4, 1, 3).log_softmax(-1), torch.tensor([[1, 2]]), lengths, torch.tensor([2]))[0].sum()


def cube_once(x: Tensor) -> Tensor:
    return OnceDifferentiable.apply(x).sum()


@pytest.mark.parametrize(
    ("f", "op"), [(connectionist, "_ctc_loss_backward"), (cube_once, "once_differentiable|OnceDifferentiable")]
)
def test_a_rule_that_no_mode_has_is_an_error_that_names_op_modes_line_and_remedy(f, op):
    x, v = numbers(12, seed=1), numbers(12, seed=2)
    line = f.__code__.co_firstlineno + (2 if f is connectionist else 1)
    for call in (lambda: hvp(f, x, v), lambda: grad_and_hvp(f, x, v), lambda: hessian(f)(x)):
        with pytest.raises(MissingDerivativeError, match=op) as caught:
            call()
        text = str(caught.value)
        assert all(mode in text for mode in (FORWARD, REVERSE, DOUBLE)) and "mode='finite-difference'" in text
        assert f"{Path(__file__).name}:{line}" in text
    H = hessian_by_differences(f, [x])[0][0]
    assert relative_error(hvp(f, x, v, mode=DIFFERENCE), H @ v) < 1e-7
    assert relative_error(hessian(f, mode=DIFFERENCE)(x), H) < 1e-7


def test_what_is_differentiable_once_is_not_taken_for_a_zero_beside_what_is_differentiable_twice():
    with pytest.raises(MissingDerivativeError):
        hvp(lambda x: cube_once(x) + (x**3).sum(), torch.ones(3), torch.ones(3))


def test_a_mode_given_by_name_does_not_fall_back():
    with pytest.raises(MissingDerivativeError, match="forward-over-reverse") as caught:
        hvp(lambda x: OldStyleCube.apply(x).sum(), torch.ones(2), torch.ones(2), mode=FORWARD)
    assert REVERSE not in str(caught.value)


# Randomness -----------------------------------------------------------------------------------------------------------


def dropped(x: Tensor) -> Tensor:
    return torch.sin(F.dropout(x * x.roll(1), 0.5)).sum()


@every_mode
@pytest.mark.parametrize("verb", [hvp, grad_and_hvp])
def test_a_random_function_is_refused_and_the_generator_left_as_it_was(mode, verb):
    x, v = numbers(9), numbers(9, seed=1)
    before = torch.get_rng_state()
    with pytest.raises(RandomnessError, match=r"draws random numbers.*randomness='same'.*eval mode"):
        verb(dropped, x, v, mode=mode)
    assert torch.equal(torch.get_rng_state(), before)


@every_mode
def test_one_draw_gives_the_same_bits_twice_and_leaves_the_generator_as_it_was(mode):
    x, v = numbers(9), numbers(9, seed=1)
    before = torch.get_rng_state()
    first, second = (hvp(dropped, x, v, mode=mode, randomness="same") for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


@exact_mode
def test_one_draw_is_one_function_so_its_products_are_symmetric(mode):
    x, u, v = numbers(9), numbers(9, seed=1), numbers(9, seed=2)
    left, right = u @ hvp(dropped, x, v, mode=mode, randomness="same"), v @ hvp(dropped, x, u, mode=mode, randomness="same")
    assert abs(float(left - right)) < 1e-12 * abs(float(left)) and float(left) != 0


def test_one_draw_is_the_same_draw_in_all_modes():
    x, v = numbers(9), numbers(9, seed=1)
    products = [hvp(dropped, x, v, mode=mode, randomness="same") for mode in (FORWARD, REVERSE, DOUBLE)]
    assert all(relative_error(product, products[0]) < 1e-13 for product in products)
    g, product = grad_and_hvp(dropped, x, v, mode=REVERSE, randomness="same")
    assert relative_error(product, products[0]) < 1e-13
    assert relative_error(g, grad_and_hvp(dropped, x, v, mode=FORWARD, randomness="same")[0]) < 1e-13


def test_different_draws_go_on_drawing():
    x, v = numbers(40), numbers(40, seed=1)
    with torch.random.fork_rng():
        first, second = (hvp(dropped, x, v, randomness="different") for _ in range(2))
    assert not torch.equal(first, second)


def test_a_function_that_draws_nothing_is_not_refused_whatever_the_mode_is():
    net = network(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)), numbers(5, 3), train=False)
    v = net.tree(numbers(net.vector.numel()))
    assert relative_error(hvp(net.f, net.x, v), hvp(net.f, net.x, v, mode=DOUBLE)) < 1e-12


def test_a_retry_replays_the_draw():
    """Forward and reverse fail after dropout has drawn; what double backward sees must be the first draw still."""

    def f(x: Tensor) -> Tensor:
        return OldStyleCube.apply(F.dropout(x, 0.5)).sum()

    x, v = numbers(9), numbers(9, seed=1)
    with torch.random.fork_rng():
        mask = F.dropout(torch.ones_like(x), 0.5)
    assert relative_error(hvp(f, x, v, randomness="same"), 6 * mask**3 * x * v) < 1e-13


def test_an_unknown_kind_of_randomness_is_refused():
    with pytest.raises(ValueError, match="hvp: randomness must be 'error', 'same' or 'different', got 'none'"):
        hvp(lambda x: x.sum(), torch.ones(2), torch.ones(2), randomness="none")


class Checkpointed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=False).sum()


def test_a_checkpoint_that_computes_again_with_other_parameters_is_refused():
    """functional_call puts the module's own parameters back before the backward pass runs the checkpointed part again."""
    net, data = Checkpointed(), numbers(4, 3)
    x = {name: 2 * p.detach() for name, p in net.named_parameters()}

    def f(x: Any) -> Tensor:
        return torch.func.functional_call(net, x, (data,))

    for call in (lambda: hvp(f, x, x), lambda: grad_and_hvp(f, x, x), lambda: hessian(f)(x)):
        with pytest.raises(MissingDerivativeError, match="computes again with other parameters"):
            call()


def test_repairs_are_active_where_a_checkpoint_computes_again():
    def hidden(x: Tensor, w: Tensor) -> Tensor:
        return F.layer_norm(x * x.roll(1), (3,), w).sin()

    def f(x: Tensor) -> Tensor:
        return (checkpoint(hidden, x, x[0], use_reentrant=False) ** 2).sum()

    x, v = numbers(2, 3), numbers(2, 3, seed=1)
    H = hessian_by_differences(f, [x])[0][0].reshape(6, 6)
    assert relative_error(hvp(f, x, v), (H @ v.flatten()).reshape(2, 3)) < 1e-8
