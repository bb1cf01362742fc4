"""What a function does beside computing its value is named where it is checked, and harmless doings are not."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import numbers
from oracles import relative_error
from torch import Tensor, nn
from torch.func import functional_call

import functional_hess as fh
from functional_hess import ImpurityError, ImpurityWarning
from functional_hess.testing import check_derivatives, check_hessian

X = numbers(3)
C = numbers(3, seed=5)
HERE = Path(__file__).name

CALLS: dict[str, Callable[..., Any]] = {
    "hvp": lambda f, x: fh.hvp(f, x, x),
    "grad_and_hvp": lambda f, x: fh.grad_and_hvp(f, x, x),
    "hessian": lambda f, x: fh.hessian(f)(x),
    "value_grad_and_hessian": lambda f, x: fh.value_grad_and_hessian(f)(x),
    "hessian_rows": lambda f, x: [*fh.hessian_rows(f)(x)],
    "hessian_blocks": lambda f, x: fh.hessian_blocks(f)(x),
    "hessian_diagonal": lambda f, x: fh.hessian_diagonal(f)(x),
}


def in_checked(call: Callable[..., Any], f: Callable[..., Any], x: Any) -> None:
    with fh.checked():
        call(f, x)


CHECKS: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    **{name: functools.partial(in_checked, call) for name, call in CALLS.items()},
    "check_hessian": check_hessian,
    "check_derivatives": check_derivatives,
}
in_every_check = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


# What is an error -------------------------------------------------------------------------------------------------------


def with_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.norm()
    return (x**3).sum() * scale


@torch.no_grad()
def frozen(x: Tensor) -> Tensor:
    return (2 * x).exp()


def into_a_new_tensor(x: Tensor) -> Tensor:
    kept = torch.zeros(3, dtype=x.dtype)
    with torch.no_grad():
        kept[:] = x**2
    return (x * kept).sum()


def inside_a_transform(x: Tensor) -> Tensor:
    def g(y: Tensor) -> Tensor:
        with torch.no_grad():
            weight = x.exp().sum()
        return weight * (y**2).sum()

    return (fh.grad(g)(C) * x).sum()


def mapped_item(x: Tensor) -> Tensor:
    return torch.stack([row.sum() * row.max().item() for row in torch.outer(x, x)]).sum()


BUFFER = torch.zeros(3, dtype=torch.float64)
CALLED = torch.zeros((), dtype=torch.int64)
KEPT: list[Tensor] = []
CACHE: dict[str, Tensor] = {}


def counting(x: Tensor) -> Tensor:
    CALLED.add_(1)
    return (x**3).sum()


def running(x: Tensor) -> Tensor:
    BUFFER.mul_(0.9)
    return ((x - BUFFER) ** 3).sum()


def by_index(x: Tensor) -> Tensor:
    BUFFER[1] = 2.0
    return (x**3 * BUFFER).sum()


def with_out(x: Tensor) -> Tensor:
    torch.add(C, 1.0, out=BUFFER)
    return (x**3 * BUFFER).sum()


def through_a_view(x: Tensor) -> Tensor:
    BUFFER.view(3, 1)[0].fill_(2.0)
    return (x**3 * BUFFER).sum()


def its_argument(x: Tensor) -> Tensor:
    return (x.mul_(2.0) ** 3).sum()


def its_argument_behind_data(x: Tensor) -> Tensor:
    x.data.add_(1.0)
    return (x**3).sum()


NORM = nn.BatchNorm1d(3).double()


def batch_norm(x: Tensor) -> Tensor:
    return (NORM(torch.outer(C, x) + C) ** 3).sum()


def statistics(x: Tensor) -> Tensor:
    """The kernel writes, no method whose name would tell."""
    y = F.batch_norm(torch.outer(C, x) + C, BUFFER, torch.ones(3, dtype=torch.float64), training=True)
    return (y**3).sum()


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(3, seed=2))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.weight * x)
        return self.last.square().sum()


REMEMBERS = Remembers()


def appended(x: Tensor) -> Tensor:
    KEPT.append(x**2)
    return (KEPT[-1] * x).sum()


def cached_in_vmap(x: Tensor) -> Tensor:
    def of_one(row: Tensor) -> Tensor:
        if "square" not in CACHE:
            CACHE["square"] = row**2
        return CACHE["square"].sum()

    return fh.vmap(of_one)(torch.outer(C, C)).sum() * (x**3).sum()


ERRORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a factor under no_grad": (with_no_grad, r"through \w+ under no_grad"),
    "a function under no_grad": (lambda x: (x * frozen(x)).sum(), "through exp under no_grad|through mul under no_grad"),
    "written under no_grad": (into_a_new_tensor, "under no_grad"),
    "no_grad in a transform": (inside_a_transform, "under no_grad"),
    "set_grad_enabled": (lambda x: torch.set_grad_enabled(False)(lambda: (x**2).sum())() * x.sum(), "under no_grad"),
    "item": (lambda x: (x**3).sum() * x[0].item(), r"by \.item\(\)"),
    "float": (lambda x: (x**3).sum() * float(x[0]), r"by float\(\.\.\.\)"),
    "int": (lambda x: (x**3).sum() * int(3 * x[0]), r"by int\(\.\.\.\)"),
    "tolist": (lambda x: (x**3).sum() * sum(x.tolist()), r"by \.tolist\(\)"),
    "numpy": (lambda x: (x * torch.from_numpy(np.sin(x.numpy()))).sum(), r"by \.numpy\(\)"),
    "a function of numpy": (lambda x: (x * torch.from_numpy(np.asarray(x))).sum(), "by numpy"),
    "math": (lambda x: x.sum() * math.exp(x[1]), r"by float\(\.\.\.\)"),
    "torch.tensor": (lambda x: (x**3 * torch.tensor([x[0], 1.0, 2.0])).sum(), r"by torch\.tensor|by float|by \.item"),
    "item of a row": (mapped_item, r"by \.item\(\)"),
    "a counter": (counting, r"the captured CALLED \(add_"),
    "a running mean": (running, r"the captured BUFFER \(mul_"),
    "an entry": (by_index, r"the captured BUFFER \(__setitem__"),
    "out=": (with_out, r"the captured BUFFER \(add,"),
    "a view": (through_a_view, r"the captured BUFFER \(fill_"),
    "its argument": (its_argument, r"its argument (x|args\[0\]) \(mul_.*Write into a clone"),
    "its argument behind data": (its_argument_behind_data, r"its argument (x|args\[0\]) \(add_"),
    "batch_norm in train mode": (batch_norm, r"the captured buffer NORM\.num_batches_tracked .*functionalize_module"),
    "statistics of batch_norm": (statistics, r"the captured BUFFER \(batch_norm"),
    "an attribute": (lambda x: REMEMBERS(x), r"keeps a tensor that depends on x, of shape \(3,\) \(tanh"),
    "a list": (appended, r"keeps a tensor that depends on x, of shape \(3,\) \(pow|\(__pow__"),
    "a cache filled in vmap": (cached_in_vmap, r"keeps a tensor"),
}


@pytest.fixture(autouse=True)
def as_before() -> Any:
    """The functions above leave things behind: that is what they are for."""
    yield
    BUFFER.zero_()
    CALLED.zero_()
    KEPT.clear()
    CACHE.clear()
    REMEMBERS.last = None
    NORM.reset_running_stats()


@in_every_check
@pytest.mark.parametrize("name", ERRORS)
def test_what_makes_f_another_function_is_an_error_that_names_it_and_the_line(name: str, check: Callable[..., Any]) -> None:
    f, told = ERRORS[name]
    before = X.clone()
    with pytest.raises(ImpurityError, match=told) as error:
        check(f, before)
    assert f"at {HERE}:" in str(error.value)
    assert torch.equal(before, X)


def test_the_line_named_is_that_of_the_operation() -> None:
    line = with_no_grad.__code__.co_firstlineno + 2
    with pytest.raises(ImpurityError, match=rf"\(at {HERE}:{line}\)"), fh.checked():
        fh.hvp(with_no_grad, X, X)


# What is a warning ------------------------------------------------------------------------------------------------------

WARNINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "detach": (lambda x: (x * x.detach() ** 2).sum(), r"through \.detach\(\)"),
    "torch.detach": (lambda x: (x * torch.detach(x)).sum(), r"through \.detach\(\)"),
    "data": (lambda x: (x * x.data).sum(), r"through \.data"),
    "detach of a result": (lambda x: (x * (x**2).sum().detach()).sum(), r"through \.detach\(\)"),
    "a straight-through estimate": (lambda x: ((x + (x.round() - x).detach()) ** 2).sum(), r"through \.detach\(\)"),
    "detach in vmap": (lambda x: fh.vmap(lambda r: (r * r.detach()).sum())(torch.outer(x, x)).sum(), r"through \.detach\(\)"),
    "float": (lambda x: (x.float() ** 3).sum(), "through a cast to float32"),
    "to": (lambda x: (x.to(torch.bfloat16).double() ** 3).sum(), "through a cast to bfloat16"),
    "type_as": (lambda x: (x.type_as(torch.zeros(1)) ** 3).sum(), "through a cast to float32"),
    "a dtype of a sum": (lambda x: (x**3).sum(dtype=torch.float32), "through a cast to float32"),
}


@in_every_check
@pytest.mark.parametrize("name", WARNINGS)
def test_what_hides_a_part_of_f_is_a_warning_at_the_line_that_calls(name: str, check: Callable[..., Any]) -> None:
    f, told = WARNINGS[name]
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(AssertionError):  # H is indeed not that of the value
        warnings.simplefilter("always")
        check(f, X)
    ours = [w for w in caught if w.category is ImpurityWarning]
    assert len(ours) == 1 and ours[0].filename == __file__
    assert re.search(told + rf" \(at {HERE}:\d+\)", str(ours[0].message))


def test_troublesome_functions_are_many_and_harmless_ones_too() -> None:
    assert len(ERRORS) + len(WARNINGS) >= 22 and len(HARMLESS) >= 4


# What is neither --------------------------------------------------------------------------------------------------------


def metric_beside(x: Tensor) -> tuple[Tensor, Tensor]:
    loss = (x**3).sum()
    with torch.no_grad():
        accuracy = ((2 * x).exp() > 1).double().mean()
    return loss, accuracy


def constant_work(x: Tensor) -> Tensor:
    with torch.no_grad():
        weights = torch.softmax(C, 0) * torch.ones_like(x)
    return (weights * x**3).sum()


def in_a_tensor_of_its_own(x: Tensor) -> Tensor:
    y = torch.zeros(4, dtype=x.dtype)
    y[1:] = x**2
    y[0] = x[0]
    y.mul_(2.0).add_(1.0)
    return (y * y.roll(1)).sum()


def tabulated(x: Tensor) -> Tensor:
    """A table made once, of numbers that do not depend on x."""
    if "table" not in CACHE:
        CACHE["table"] = torch.arange(3, dtype=torch.float64).sin()
    return (CACHE["table"] * x**3).sum()


class Counts:
    calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x**3).sum()


PARAMETER = nn.Parameter(numbers(3, seed=7))
EVALUATED = nn.BatchNorm1d(3).double().eval()
NET = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
APPLY, PARAMS, BUFFERS = fh.functionalize_module(nn.BatchNorm1d(3).double())

HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "detach of a constant": lambda x: (C.detach() * x**3).sum(),
    "detach of a parameter that is a constant here": lambda x: (PARAMETER.detach() * PARAMETER * x**3).sum(),
    "item of a constant": lambda x: (x**3).sum() * C[0].item() * float(C.max()),
    "no_grad around constants": constant_work,
    "a cast of a constant": lambda x: (C.float().double() * x**3).sum(),
    "a cast up": lambda x: (x.double() ** 3).sum(),
    "a buffer that is read": lambda x: ((x - BUFFER) ** 3).sum(),
    "batch_norm in eval mode": lambda x: (EVALUATED(torch.outer(C, x)) ** 3).sum(),
    "batch_norm made a function": lambda x: (APPLY(PARAMS, BUFFERS, torch.outer(C, x) + C) ** 3).sum(),
    "writes into a tensor of its own": in_a_tensor_of_its_own,
    "a branch on the sign": lambda x: (x**3).sum() if x[0] > 0 else (x**4).sum(),
    "a mask": lambda x: torch.where(x > 0, x**3, x**2).sum() + x[x.argmax()] ** 2,
    "the shape": lambda x: (x**3).sum() * x.shape[0] * len(x) / x.numel(),
    "noise in the likeness of x": lambda x: (x**3 * torch.ones_like(x) * x.new_full((3,), 2.0)).sum(),
    "a table of constants kept": tabulated,
    "a count of calls": Counts(),
    "derivatives inside": lambda x: (
        (fh.grad(lambda y: (y**3).sum())(x) ** 2).sum() + torch.trace(fh.hessian(lambda y: y.prod())(x))
    ),
    "a map inside": lambda x: fh.vmap(lambda r: (r**3).sum())(torch.outer(x, x)).sum(),
    "a risk": lambda x: fh.empirical_risk(lambda w, c: (w * c).sum() ** 3)(x, torch.outer(C, C)),
    "a risk by parts": lambda x: fh.empirical_risk(lambda w, c: (w * c).sum() ** 3, batch_size=2)(x, torch.outer(C, C)),
    "a module": lambda x: functional_call(NET, {"0.bias": x}, C).sum(),
}


@pytest.mark.filterwarnings("error")
@in_every_check
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_functions_are_not_flagged(name: str, check: Callable[..., Any]) -> None:
    check(HARMLESS[name], X)


def test_a_metric_beside_the_loss_is_not_the_value() -> None:
    with fh.checked() as record:
        _, accuracy = fh.hvp(lambda x: metric_beside(x), X, X, has_aux=True)
        fh.hvp(lambda x: ((x**3).sum(), x.detach().sum().item()), X, X, has_aux=True)
    assert [call.status for call in record] == ["right", "right"] and float(accuracy) >= 0


# Where, and how ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a factor under no_grad", "item", "a list", "a cache filled in vmap"])
def test_outside_a_check_nothing_is_said(name: str) -> None:
    fh.hvp(ERRORS[name][0], X, X)


@pytest.mark.filterwarnings("error")
def test_another_thread_and_the_time_after_are_not_watched() -> None:
    with pytest.raises(ImpurityError), fh.checked():
        fh.hvp(with_no_grad, X, X)
    fh.hvp(with_no_grad, X, X)


def test_leaves_and_buffers_are_named_by_their_paths() -> None:
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))}).double()
    params = dict(net.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(net["a"], {name[2:]: t for name, t in p.items()}, torch.outer(C, C)).square().sum()

    with pytest.raises(ImpurityError, match=r"the captured buffer net\.a\.1\.num_batches_tracked"), fh.checked():
        fh.hvp(loss, params, params)

    def shifts(p: dict[str, Any]) -> Tensor:
        p["u"][0].add_(1.0)
        return (p["u"][0] ** 2).sum()

    with pytest.raises(ImpurityError, match=r"its argument x\['u'\]\[0\]"), fh.checked():
        fh.hvp(shifts, {"u": (X.clone(),)}, {"u": (X,)})


def test_a_function_that_no_level_can_enter_is_checked_as_before() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * u

    with fh.checked() as record:
        product = fh.hvp(lambda x: Cube.apply(x).sum(), X, X)
    assert relative_error(product, 6 * X * X) < 1e-12 and record.calls[0].status == "right"


def test_inside_a_custom_function_no_grad_is_torchs_own() -> None:
    class Cube(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.detach() ** 3

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * u

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fh.checked() as record:
            fh.hvp(lambda x: Cube.apply(x).sum(), X, X, mode="reverse-over-reverse")
    assert record.calls[0].status == "right"


def test_an_error_of_fs_own_comes_out_untouched() -> None:
    def broken(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), fh.checked():
        fh.hvp(broken, X, X)
    with pytest.raises(KeyError, match="mine"):
        check_hessian(broken, X)
