"""What is checked around a function, and what its errors say."""

from __future__ import annotations

import inspect
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import network, numbers
from oracles import relative_error
from torch import Tensor, nn

import functional_hess as fh
from functional_hess import DependenceError, LowPrecisionWarning, MissingDerivativeError, RandomnessError
from functional_hess.guards import Replay, missing_rule, no_mode_left
from functional_hess.products import MODES

X = numbers(3)

SAYINGS = [  # of torch, where an op lacks a rule and another mode may have it
    "Trying to use forward AD with _cdist_forward that does not support it because it has not been implemented yet.",
    "ZeroTensors are immutable. Please use the materialized zero tensor",
    "derivative for aten::_ctc_loss_backward is not implemented",
    "the derivative of '_ctc_loss_backward' is not implemented.",
    "Batching rule not implemented for aten::foo; the fallback path doesn't work on out= or view ops.",
    "Error: aten::foo requires special handling, and does not yet have a batching rule. Feel free to file a github issue!",
    "vmap: we do not yet support aten::rrelu_with_noise. Please file an issue",
    "NYI: querying is_contiguous inside of vmap for memory_format other than torch.contiguous_format",
    "required rank 4 tensor to use channels_last format",
    "the derivative for 'igamma: input' is not implemented.",
    "vmap over torch.allclose isn't supported yet. Please file an issue at https://github.com/pytorch/pytorch/issues",
    "vmap: It looks like you're attempting to use a Tensor in some data-dependent control flow. We don't support that yet",
    "vmap: It looks like you're either (1) calling .item() on a Tensor or (2) attempting to use a Tensor in some data-dependent",
    "vmap: inplace arithmetic(self, *extra_args) is not possible because there exists a Tensor `other` in extra_args that has",
    "Batch norm got a batched tensor as input while the running_mean or running_var, which will be updated in place, were not",
    "Trying to set a forward gradient that has a different size than that of the original Tensor, this is not supported.",
    "a batching rule gave 3 results for 1 arguments",
    "Could not run 'aten::view' with arguments from the 'SparseCPU' backend.",
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
    "rebuilt from numbers": lambda x: torch.tensor(x.tolist(), dtype=torch.float64).square().sum(),
    "a function without a derivative": lambda x: torch.special.airy_ai(x).sum(),
    "one-hot places": lambda x: F.one_hot(x.argsort()).double().square().sum(),
}
WHOLE = {
    "linear": (lambda x: x.sum(), torch.zeros(3, 3)),
    "partly detached": (lambda x: (x * x.detach()).sum(), torch.zeros(3, 3)),
    "one coordinate": (lambda x: x[0] ** 2, torch.diag(torch.tensor([2.0, 0.0, 0.0]))),
    "times zero": (lambda x: 0.0 * (x**2).sum(), torch.zeros(3, 3)),
    "relu where it is off": (lambda x: F.relu(x - 100).sum(), torch.zeros(3, 3)),
}
VERBS = (fh.hessian, fh.value_grad_and_hessian, fh.hessian_blocks, fh.hessian_diagonal, fh.grad, fh.value_and_grad)
BY_REVERSE = (
    lambda f: fh.hvp(f, X, X),
    lambda f: fh.grad_and_hvp(f, X, X),
    lambda f: [*fh.hessian_rows(f)(X)],
    lambda f: fh.vjp(f, X),
    lambda f: fh.linearize(f, X),
    lambda f: fh.jacrev(f)(X),
)
BY_FORWARD = (lambda f: fh.jvp(f, (X,), (X,)), lambda f: fh.jacfwd(f)(X))


@pytest.mark.parametrize("f", BROKEN.values(), ids=BROKEN)
def test_a_broken_graph_is_an_error(f):
    for verb in VERBS:
        with pytest.raises(DependenceError, match=r"does not depend on x through differentiable operations.*\.detach\(\)"):
            verb(f)(X)
    for call in BY_REVERSE:
        with pytest.raises(DependenceError, match=r": f\(x\) does not depend on x"):
            call(f)


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "no_grad"])
def test_a_broken_graph_is_an_error_in_forward_mode(name):
    for call in BY_FORWARD:
        with pytest.raises(DependenceError, match=r"(jvp|jacfwd): f\(x\) does not depend on x"):
            call(BROKEN[name])


def test_no_grad_does_not_break_forward_mode():
    assert relative_error(fh.jacfwd(BROKEN["no_grad"])(X), 2 * X) == 0


def test_eight_broken_graphs_are_refused_and_four_whole_ones_are_not():
    assert len(BROKEN) >= 8 and len(WHOLE) >= 4


@pytest.mark.parametrize(("f", "expected"), WHOLE.values(), ids=WHOLE)
def test_a_zero_that_is_right_is_no_error(f, expected):
    for mode in ("auto", "forward-over-reverse", "reverse-over-reverse", "double-backward"):
        assert relative_error(fh.hessian(f, mode=mode)(X), expected) == 0
        assert relative_error(fh.hvp(f, X, X, mode=mode), expected.double() @ X) == 0


def test_a_derivative_of_a_linear_function_is_constant_and_no_error():
    assert relative_error(fh.hessian(lambda x: fh.grad(lambda x: x.sum())(x).sum())(X), torch.zeros(3, 3)) == 0
    assert relative_error(fh.hvp(lambda x: torch.trace(fh.hessian(lambda x: (x**2).sum())(x)), X, X), torch.zeros(3)) == 0


BROKEN_IN_B: dict[str, Callable[[Tensor], Tensor]] = {
    "unused": lambda b: torch.zeros(3, dtype=torch.float64),
    "detached": lambda b: b.detach() ** 2,
    "data": lambda b: b.data**2,
    "no_grad": lambda b: torch.no_grad()(lambda: b**2)(),
    "argmax": lambda b: b.argmax().double(),
    "compared": lambda b: (b > 0).double(),
    "bucketized": lambda b: torch.bucketize(b, torch.tensor([0.0, 1.0], dtype=torch.float64)).double(),
    "rebuilt": lambda b: torch.zeros(3, dtype=torch.float64).copy_(b.detach()),
}
WHOLE_IN_B: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda b: b,
    "partly detached": lambda b: b * b.detach(),
    "times zero": lambda b: 0.0 * b**2,
    "relu where it is off": lambda b: F.relu(b - 100),
}
STRICT = {
    "grad": lambda f, x, **how: fh.grad(f, **how)(x),
    "value_and_grad": lambda f, x, **how: fh.value_and_grad(f, **how)(x)[1],
    "vjp": lambda f, x, **how: fh.vjp(f, x, **how)[1](torch.ones((), dtype=torch.float64))[0],
    "hvp": lambda f, x, **how: fh.hvp(f, x, x, **how),
    "grad_and_hvp": lambda f, x, **how: fh.grad_and_hvp(f, x, x, **how)[1],
    "hessian": lambda f, x, **how: fh.hessian(f, **how)(x),
    "value_grad_and_hessian": lambda f, x, **how: fh.value_grad_and_hessian(f, **how)(x)[2],
    "hessian_blocks": lambda f, x, **how: fh.hessian_blocks(f, **how)(x),
    "hessian_diagonal": lambda f, x, **how: fh.hessian_diagonal(f, **how)(x),
    "hessian_rows": lambda f, x, **how: [*fh.hessian_rows(f, **how)(x)],
}
SECOND = [name for name in STRICT if name not in ("grad", "value_and_grad", "vjp")]
in_two_leaves = pytest.mark.parametrize("verb", STRICT)


def of_a_and(part: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    return lambda x: (x["a"] ** 2).sum() + part(x["b"]).sum()


@in_two_leaves
@pytest.mark.parametrize("part", BROKEN_IN_B.values(), ids=BROKEN_IN_B)
def test_a_broken_graph_in_one_leaf_is_a_zero_unless_strict(part, verb):
    f, x = of_a_and(part), {"a": X, "b": X}
    STRICT[verb](f, x)  # zeros in b, and no error
    with pytest.raises(DependenceError, match=r"f does not depend on (x|primals\[0\])\['b'\] \(strict=True\)"):
        STRICT[verb](f, x, strict=True)


@in_two_leaves
@pytest.mark.parametrize("part", WHOLE_IN_B.values(), ids=WHOLE_IN_B)
def test_a_leaf_whose_derivative_is_rightly_zero_is_not_refused_by_strict(part, verb):
    f, x = of_a_and(part), {"a": X, "b": X}
    strict, loose = STRICT[verb](f, x, strict=True), STRICT[verb](f, x)
    if verb == "hessian_rows":
        strict, loose = strict[0][1], loose[0][1]
    assert relative_error(strict, loose) == 0


@pytest.mark.parametrize("part", [part for name, part in BROKEN_IN_B.items() if name != "no_grad"])
def test_a_broken_graph_of_one_output_is_a_tangent_of_zeros_unless_strict(part):
    """Forward mode knows of each output whether it depends on the primals, not of each primal."""

    def f(x: Tensor) -> dict[str, Tensor]:
        return {"a": x**2, "b": part(x)}

    _, tangent = fh.jvp(f, (X,), (X,))
    assert relative_error(tangent["a"], 2 * X * X) == 0 and not tangent["b"].any()
    with pytest.raises(DependenceError, match=r"jvp: f\(x\)\['b'\] does not depend on x \(strict=True\)"):
        fh.jvp(f, (X,), (X,), strict=True)


@pytest.mark.parametrize("part", WHOLE_IN_B.values(), ids=WHOLE_IN_B)
def test_an_output_whose_tangent_is_rightly_zero_is_not_refused_by_strict(part):
    f = lambda x: {"a": x**2, "b": part(x)}  # noqa: E731
    strict, loose = (fh.jvp(f, (X,), (X,), strict=strict) for strict in (True, False))
    assert relative_error(strict, loose) == 0


def test_every_verb_that_takes_strict_is_in_a_table():
    public = {name: getattr(fh, name) for name in fh.__all__}
    takes = {name for name, verb in public.items() if inspect.isfunction(verb) and "strict" in inspect.signature(verb).parameters}
    assert takes == {*STRICT, "jvp"}


@pytest.mark.parametrize("verb", SECOND)
@pytest.mark.parametrize("mode", MODES)
def test_strict_holds_in_every_mode(verb, mode):
    x = {"a": X, "b": X}
    with pytest.raises(DependenceError, match=r"does not depend on x\['b'\]"):
        STRICT[verb](of_a_and(BROKEN_IN_B["detached"]), x, strict=True, mode=mode)
    STRICT[verb](of_a_and(WHOLE_IN_B["linear"]), x, strict=True, mode=mode)


class Twice(torch.autograd.Function):
    """2x without setup_context, which no level of torch.func can enter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


def test_strict_is_asked_of_plain_autograd_where_no_level_can_enter():
    x = {"a": X, "b": X}
    for name in STRICT:
        if name == "vjp":
            continue
        STRICT[name](lambda x: (Twice.apply(x["a"]) ** 2).sum() + x["b"].sum(), x, strict=True)
        with pytest.raises(DependenceError, match=r"does not depend on x\['b'\]"):
            STRICT[name](lambda x: (Twice.apply(x["a"]) ** 2).sum(), x, strict=True)


# First derivatives without a rule -------------------------------------------------------------------------------------


def of_twice(x: Tensor) -> Tensor:
    return (Twice.apply(x) ** 3).sum()


def test_a_gradient_goes_around_a_missing_rule_by_plain_autograd():
    assert relative_error(fh.grad(of_twice)(X), 24 * X**2) < 1e-14
    value, gradient = fh.value_and_grad(of_twice)(X)
    assert relative_error((value, gradient), ((8 * X**3).sum(), 24 * X**2)) < 1e-14


FIRST = {
    "vjp": lambda: fh.vjp(of_twice, X),
    "linearize": lambda: fh.linearize(of_twice, X),
    "jvp": lambda: fh.jvp(of_twice, (X,), (X,)),
    "jacfwd": lambda: fh.jacfwd(of_twice)(X),
    "jacrev": lambda: fh.jacrev(of_twice)(X),
}


@pytest.mark.parametrize("call", FIRST.values(), ids=FIRST)
def test_a_first_derivative_without_a_rule_is_a_named_error_with_the_remedy(call):
    with pytest.raises(
        MissingDerivativeError, match=r"cannot differentiate f once \(.*setup_context.*test_guards.py:\d+\."
    ) as told:
        call()
    assert "or move what its forward keeps for the backward into a setup_context staticmethod." in str(told.value)


def test_inside_another_transform_the_outer_call_finds_its_way():
    """The inner gradient has no level to enter, the outer product takes plain autograd for both."""
    assert (
        relative_error(fh.hvp(lambda x: of_twice(x) + fh.grad(lambda x: (x**4).sum())(x).sum(), X, X), 48 * X**2 + 24 * X**2)
        < 1e-14
    )
    with pytest.raises(MissingDerivativeError, match="cannot differentiate f once"):
        fh.jvp(lambda x: fh.grad(of_twice)(x), (X,), (X,))


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
    for randomness in ("error", "same"):
        for mode in MODES:
            assert relative_error(fh.hvp(f, X, X, randomness=randomness, mode=mode), 6 * weights * X * X) < 1e-9


def draws_from(source: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function with a random Hessian: sum w_i x_i^3 with w drawn at each evaluation."""
    return lambda x: (source() * x**3).sum()


def numbers_of(state: Any) -> Any:
    """Something that compares with ==."""
    return tuple(map(numbers_of, state)) if isinstance(state, tuple) else state.tolist() if hasattr(state, "tolist") else state


OWN = torch.Generator()
SOURCES: dict[str, tuple[Callable[[], Tensor], Callable[[], Any]]] = {
    "torch": (lambda: torch.rand(3, dtype=torch.float64), torch.get_rng_state),
    "a generator": (lambda: torch.rand(3, generator=OWN, dtype=torch.float64), OWN.get_state),
    "python": (lambda: torch.tensor([random.random() for _ in range(3)], dtype=torch.float64), random.getstate),
    "numpy": (lambda: torch.from_numpy(np.random.rand(3)), np.random.get_state),  # noqa: NPY002
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_one_draw_serves_every_evaluation_of_a_call_and_is_put_back(name, mode):
    source, state = SOURCES[name]
    f, before = draws_from(source), numbers_of(state())
    for call in (
        lambda: fh.hvp(f, X, X, mode=mode, randomness="same"),
        lambda: fh.grad_and_hvp(f, X, X, mode=mode, randomness="same"),
        lambda: fh.hessian(f, mode=mode, randomness="same")(X),
        lambda: fh.hessian(f, mode=mode, chunk_size=1, randomness="same")(X),
        lambda: fh.hessian_diagonal(f, mode=mode, chunk_size=1, randomness="same")(X),
    ):
        first, second = call(), call()
        assert relative_error(first, second) == 0
        assert numbers_of(state()) == before
    weights = source()
    expected = torch.diag(6 * weights * X)
    H = fh.hessian(f, mode=mode, chunk_size=1, randomness="same")(X)
    assert not torch.equal(H, expected)  # the state has moved on, and so has the draw
    assert relative_error(torch.stack([fh.hvp(f, X, e, mode=mode, randomness="same") for e in torch.eye(3).double()]), H) < 1e-8


def test_a_generator_that_goes_on_is_refused_and_left_as_it_was():
    f, before = draws_from(SOURCES["a generator"][0]), OWN.get_state()
    for call in (
        lambda: fh.hvp(f, X, X),
        lambda: fh.grad_and_hvp(f, X, X, mode="reverse-over-reverse"),
        lambda: fh.hvp(f, X, X, mode="double-backward"),
    ):
        with pytest.raises(RandomnessError, match=r"draws from a torch.Generator that goes on .*seed it inside f"):
            call()
        assert torch.equal(OWN.get_state(), before)
    with pytest.raises(RandomnessError):
        fh.hessian(f)(X)
    assert torch.equal(OWN.get_state(), before)


def test_a_generator_that_f_seeds_each_time_is_not_refused():
    def f(x: Tensor) -> Tensor:
        OWN.manual_seed(3)
        return (torch.rand(3, generator=OWN, dtype=torch.float64) * x**3).sum()

    OWN.manual_seed(3)
    weights = torch.rand(3, generator=OWN, dtype=torch.float64)
    assert relative_error(fh.hvp(f, X, X), 6 * weights * X * X) < 1e-14


def test_a_draw_around_a_call_is_not_the_functions():
    """The outer function draws from a generator, the inner product of another function does not."""

    def outer(x: Tensor) -> Tensor:
        weights = torch.rand(3, generator=OWN, dtype=torch.float64)
        return (weights * fh.hvp(lambda x: (x**4).sum(), x, x)).sum()

    with pytest.raises(RandomnessError, match="hvp: f draws from"):
        fh.hvp(outer, X, X)
    fh.hvp(outer, X, X, randomness="same")


def test_a_call_inside_puts_a_generator_back_to_where_the_call_began():
    draws = []

    def outer(x: Tensor) -> Tensor:
        draws.append(torch.rand(3, generator=OWN))
        inside = fh.hvp(lambda x: (x**4).sum(), x, x, randomness="same")
        draws.append(torch.rand(3, generator=OWN))
        return inside.sum()

    fh.hvp(outer, X, X, randomness="same", mode="forward-over-reverse")
    assert not torch.equal(*draws)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_jacobian_by_columns_sees_one_draw(chunk_size):
    def f(x: Tensor) -> Tensor:
        return torch.rand(3, dtype=torch.float64) * x**2

    before = torch.get_rng_state()
    J = fh.jacfwd(f, chunk_size=chunk_size, randomness="same")(X)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        assert relative_error(J, torch.diag(2 * torch.rand(3, dtype=torch.float64) * X)) < 1e-14
    with pytest.raises(RandomnessError, match="jacfwd: f draws random numbers"):
        fh.jacfwd(f, chunk_size=chunk_size)(X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["auto", *MODES[:3]])
def test_the_hessian_of_one_draw_is_symmetric_and_its_products_are_those_of_hvp(mode):
    def f(x: Tensor) -> Tensor:
        return torch.sin(F.dropout(x * x.roll(1), 0.5) * x.roll(2)).sum()

    x = numbers(9)
    H = fh.hessian(f, mode=mode, symmetric=False, randomness="same")(x)
    assert torch.equal(H, fh.hessian(f, mode=mode, symmetric=False, randomness="same")(x))
    assert relative_error(H, H.T) < 1e-12 and float(H.norm()) > 0
    products = torch.stack([fh.hvp(f, x, e, mode=mode, randomness="same") for e in torch.eye(9, dtype=torch.float64)])
    assert relative_error(products, H) < 1e-12


@pytest.mark.cuda
def test_the_generator_of_a_device_is_put_back():
    x, before = numbers(9).cuda(), torch.cuda.get_rng_state()

    def f(x: Tensor) -> Tensor:
        return torch.sin(F.dropout(x * x.roll(1), 0.5)).sum()

    first, second = (fh.hvp(f, x, x, randomness="same") for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.cuda.get_rng_state(), before)
    with pytest.raises(RandomnessError):
        fh.hvp(f, x, x)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# Precision ------------------------------------------------------------------------------------------------------------

SECOND_CALLS = {
    "hvp": lambda f, x: fh.hvp(f, x, x),
    "grad_and_hvp": lambda f, x: fh.grad_and_hvp(f, x, x),
    "hessian": lambda f, x: fh.hessian(f)(x),
    "value_grad_and_hessian": lambda f, x: fh.value_grad_and_hessian(f)(x),
    "hessian_diagonal": lambda f, x: fh.hessian_diagonal(f)(x),
    "hessian_blocks": lambda f, x: fh.hessian_blocks(f)(x),
    "hessian_rows": lambda f, x: [*fh.hessian_rows(f)(x)],
}
second_calls = pytest.mark.parametrize("call", SECOND_CALLS.values(), ids=SECOND_CALLS)


def cubes(x: Any) -> Tensor:
    return (x["w"] ** 3).sum() + (x["b"] ** 2).sum()


@second_calls
@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        (torch.bfloat16, r"x\['w'\] is bfloat16: expect errors of 8e-03 of the result, more where terms cancel. Pass float32"),
        (torch.float16, r"x\['w'\] is float16: expect errors of 1e-03 .*; results beyond 65504 overflow"),
    ],
    ids=str,
)
def test_half_precision_is_warned_of_at_the_line_that_calls(call, dtype, told):
    x = {"w": X.to(dtype), "b": X.float()}
    with pytest.warns(LowPrecisionWarning, match=told) as caught:
        call(cubes, x)
    assert [w.filename for w in caught] == [__file__]


def test_half_precision_is_warned_of_once_a_line():
    x = {"w": X.bfloat16(), "b": X.float()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            fh.hvp(cubes, x, x)
        assert len(caught) == 1
        fh.hvp(cubes, x, x)
    assert len(caught) == 2


@second_calls
def test_autocast_is_warned_of(call):
    x = {"w": X.float(), "b": X.float()}
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(LowPrecisionWarning, match=r"autocast to bfloat16 is on.*8e-03.*'cpu'"),
    ):
        call(cubes, x)


def test_a_first_derivative_in_half_precision_is_everyday_work():
    x = {"w": X.bfloat16(), "b": X.float()}
    fh.grad(cubes)(x)
    fh.jvp(cubes, (x,), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_accuracy_told_of_is_what_a_network_has(dtype):
    net = network(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), numbers(8, 6), dtype=torch.float64)
    low = network(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), numbers(8, 6), dtype=dtype)
    v = numbers(net.vector.numel())
    rounded = {name: t.to(dtype).double() for name, t in net.x.items()}
    with pytest.warns(LowPrecisionWarning):
        product = fh.hvp(low.f, low.x, {name: t.to(dtype) for name, t in net.tree(v).items()})
    error = relative_error(product, fh.hvp(net.f, rounded, net.tree(v)))
    assert 0.05 < error / torch.finfo(dtype).eps < 10


@second_calls
def test_a_complex_leaf_is_refused_by_name(call):
    with pytest.raises(TypeError, match=r"x\['z'\] is complex.*view_as_real"):
        call(lambda x: x["z"].abs().sum() + (x["w"] ** 2).sum(), {"w": X, "z": torch.complex(X, X)})


def test_a_complex_result_is_refused():
    with pytest.raises(TypeError, match="hvp: f must return a real scalar"):
        fh.hvp(lambda x: torch.complex(x, x).sum(), X, X)


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
