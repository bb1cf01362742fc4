"""What is checked around a function, and what its errors say."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import numbers
from oracles import relative_error
from torch import Tensor

import functional_hess as fh
from functional_hess import DependenceError, MissingDerivativeError, RandomnessError
from functional_hess.guards import Replay, missing_rule, no_mode_left

X = numbers(3)

SAYINGS = [  # of torch, where an op lacks a rule and another mode may have it
    "Trying to use forward AD with _cdist_forward that does not support it because it has not been implemented yet.",
    "ZeroTensors are immutable. Please use the materialized zero tensor",
    "derivative for aten::_ctc_loss_backward is not implemented",
    "the derivative of '_ctc_loss_backward' is not implemented.",
    "Batching rule not implemented for aten::foo; the fallback path doesn't work on out= or view ops.",
    "In order to use an autograd.Function with functorch transforms, it must override the setup_context staticmethod.",
    "torch.func.{grad, vjp, jacrev, hessian} don't yet support saved tensor hooks.",
    "trying to differentiate twice a function that was marked with @once_differentiable",
]
OTHERS = [
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "CUDA out of memory. Tried to allocate 20.00 GiB.",
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
    "CUDA error: device-side assert triggered",
    "Expected all tensors to be on the same device",
    "",
]


@pytest.mark.parametrize("text", SAYINGS)
def test_a_missing_rule_is_known_by_what_torch_says(text):
    assert missing_rule(RuntimeError(text)) and missing_rule(NotImplementedError(text))


@pytest.mark.parametrize("text", OTHERS)
def test_what_torch_says_otherwise_is_no_missing_rule(text):
    assert not missing_rule(RuntimeError(text))


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, MemoryError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_exception_of_another_kind_is_no_missing_rule(kind):
    assert not missing_rule(kind("mine"))


def test_running_out_of_memory_is_no_missing_rule_whatever_it_says():
    assert not missing_rule(torch.OutOfMemoryError(f"CUDA out of memory while: {SAYINGS[0]}"))


def raised(text: str) -> RuntimeError:
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        return error


def test_the_last_error_names_every_mode_what_it_lacked_the_line_and_the_remedy():
    tried = [("forward-over-reverse", raised("Trying to use forward AD with foo. More.")), ("double-backward", raised("no bar"))]
    error = no_mode_left("hvp", tried)
    line = raised.__code__.co_firstlineno + 2
    assert isinstance(error, MissingDerivativeError) and isinstance(error, NotImplementedError)
    assert str(error) == (
        "hvp: cannot differentiate f twice (forward-over-reverse: Trying to use forward AD with foo; double-backward: no bar), "
        f"called at {Path(__file__).name}:{line}. Write that op as a composition of differentiable ones, or pass "
        "mode='finite-difference'."
    )


# Dependence -----------------------------------------------------------------------------------------------------------

BROKEN = {
    "detached": lambda x: (x.detach() ** 2).sum(),
    "data": lambda x: (x.data**2).sum(),
    "no_grad": lambda x: torch.no_grad()(lambda: (x**2).sum())(),
    "argmax": lambda x: x.argmax().double(),
    "rounded": lambda x: (x > 0).double().sum(),
    "bucketized": lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0], dtype=torch.float64)).double().sum(),
    "constant": lambda x: torch.tensor(3.0, dtype=torch.float64),
}
WHOLE = {
    "linear": (lambda x: x.sum(), torch.zeros(3, 3)),
    "partly detached": (lambda x: (x * x.detach()).sum(), torch.zeros(3, 3)),
    "one coordinate": (lambda x: x[0] ** 2, torch.diag(torch.tensor([2.0, 0.0, 0.0]))),
    "times zero": (lambda x: 0.0 * (x**2).sum(), torch.zeros(3, 3)),
    "relu where it is off": (lambda x: F.relu(x - 100).sum(), torch.zeros(3, 3)),
}
VERBS = (fh.hessian, fh.value_grad_and_hessian, fh.hessian_blocks, fh.hessian_diagonal, fh.grad)


@pytest.mark.parametrize("f", BROKEN.values(), ids=BROKEN)
def test_a_broken_graph_is_an_error(f):
    for verb in VERBS:
        with pytest.raises(DependenceError, match=r"does not depend on x through differentiable operations.*\.detach\(\)"):
            verb(f)(X)
    with pytest.raises(DependenceError, match="hvp: f"):
        fh.hvp(f, X, X)
    with pytest.raises(DependenceError):
        [*fh.hessian_rows(f)(X)]


@pytest.mark.parametrize(("f", "expected"), WHOLE.values(), ids=WHOLE)
def test_a_zero_that_is_right_is_no_error(f, expected):
    for mode in ("auto", "forward-over-reverse", "reverse-over-reverse", "double-backward"):
        assert relative_error(fh.hessian(f, mode=mode)(X), expected) == 0
        assert relative_error(fh.hvp(f, X, X, mode=mode), expected.double() @ X) == 0


def test_a_derivative_of_a_linear_function_is_constant_and_no_error():
    assert relative_error(fh.hessian(lambda x: fh.grad(lambda x: x.sum())(x).sum())(X), torch.zeros(3, 3)) == 0
    assert relative_error(fh.hvp(lambda x: torch.trace(fh.hessian(lambda x: (x**2).sum())(x)), X, X), torch.zeros(3)) == 0


def test_a_broken_graph_in_one_leaf_is_a_zero_unless_strict():
    def f(x: Any) -> Tensor:
        return (x["a"] ** 2).sum() + (x["b"].detach() ** 2).sum()

    x = {"a": X, "b": X}
    assert relative_error(fh.hessian(f)(x)["b"]["b"], torch.zeros(3, 3)) == 0
    for verb in (fh.hessian, fh.hessian_diagonal, fh.hessian_blocks):
        with pytest.raises(DependenceError, match=r"f does not depend on x\['b'\] \(strict=True\)"):
            verb(f, strict=True)(x)


# Randomness -----------------------------------------------------------------------------------------------------------


def test_replay_gives_every_evaluation_the_same_numbers_and_goes_back():
    before = torch.get_rng_state()
    with Replay("same", [X], "hvp") as replay:
        first = torch.rand(3)
        replay.rewind()
        assert torch.equal(torch.rand(3), first)
        replay.finish(lambda x: x.sum(), (X,))
    assert torch.equal(torch.get_rng_state(), before)


def test_replay_refuses_a_function_that_draws():
    before = torch.get_rng_state()
    replay = Replay("error", [X], "hvp")
    torch.rand(3)
    with pytest.raises(RandomnessError, match="hvp: f draws random numbers"):
        replay.finish(lambda x: (x * torch.rand(3)).sum(), (X,))
    torch.set_rng_state(before)


def test_replay_forgives_a_draw_that_was_not_the_functions():
    before = torch.get_rng_state()
    replay = Replay("error", [X], "hvp")
    torch.rand(3)  # of another thread, say
    replay.finish(lambda x: x.sum(), (X,))
    torch.set_rng_state(before)


def test_replay_lets_different_draws_be():
    with torch.random.fork_rng():
        replay = Replay("different", [X], "hvp")
        first = torch.rand(3)
        replay.rewind()
        assert not torch.equal(torch.rand(3), first)
        replay.finish(lambda x: (x * torch.rand(3)).sum(), (X,))


@pytest.mark.parametrize("verb", [fh.hessian, fh.hessian_diagonal, fh.hessian_blocks, fh.value_grad_and_hessian])
@pytest.mark.parametrize("mode", ["auto", "forward-over-reverse", "reverse-over-reverse", "double-backward"])
def test_every_mode_refuses_a_random_function(verb, mode):
    def f(x: Tensor) -> Tensor:
        return torch.sin(F.dropout(x * x.roll(1), 0.5)).sum()

    before = torch.get_rng_state()
    with pytest.raises(RandomnessError, match="draws random numbers"):
        verb(f, mode=mode)(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_is_left_as_it_was_after_an_exception_too():
    def f(x: Tensor) -> Tensor:
        torch.rand(3)
        raise KeyError("mine")

    before = torch.get_rng_state()
    for call in (lambda: fh.hvp(f, X, X), lambda: fh.hessian(f)(X)):
        with pytest.raises(KeyError):
            call()
        assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_the_functions_own_is_its_own_affair():
    """Seeded inside f, it draws the same numbers each time."""

    def f(x: Tensor) -> Tensor:
        weights = torch.rand(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return (weights * x**3).sum()

    weights = torch.rand(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert relative_error(fh.hvp(f, X, X, randomness="same"), 6 * weights * X * X) < 1e-14


# Threads --------------------------------------------------------------------------------------------------------------


def test_a_thread_that_f_starts_and_awaits_in_forward_mode_is_named_as_the_cause(monkeypatch):
    monkeypatch.setattr("functional_hess.levels.FORWARD_MODE_TIMEOUT", 0.05)
    seen: list[BaseException] = []

    def inner() -> None:
        try:
            fh.jvp(lambda x: (x**2).sum(), (X,), (X,))
        except RuntimeError as error:
            seen.append(error)

    def f(x: Tensor) -> Tensor:
        worker = threading.Thread(target=inner)
        worker.start()
        worker.join()
        return (x**3).sum()

    fh.hvp(f, X, X, mode="forward-over-reverse")
    assert len(seen) == 1 and "another thread" in str(seen[0]) and "reverse-over-reverse" in str(seen[0])
