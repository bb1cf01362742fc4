"""Every error that the library raises and every warning, with the call that raises it and the whole of its message.

A message names the argument by its path, says what was expected and what came, and what to do. The table is complete: the
`raise` statements of the package are found by reading its sources, and each must be where some row's error came from. A new
`raise` needs a row: `Row(what the message names, error, message, call)`. In a message `...` stands for what differs from one
machine, or one random direction, to the next.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import dataclasses
import functools
import re
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import functional_hess as fh
from functional_hess import __main__, coloring, levels, patterns, plots, report, sparsity, testing
from functional_hess.differences import LawError
from functional_hess.prepared import PrepareError

PACKAGE = Path(fh.__file__).parent
Patch = pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Row:
    """``call`` raises ``error`` with the message; ``names`` is how it calls what is wrong."""

    names: str
    error: type[BaseException]
    message: str
    call: Callable[[Patch], Any]


# What the calls are made of ---------------------------------------------------------------------------------------------

W = torch.tensor([1.0, 2.0])
B = torch.tensor(3.0)
X = {"w": W, "b": B}


def cubes(x: Any) -> Tensor:
    """sum w^3 b."""
    return (x["w"] ** 3).sum() * x["b"]


def cube(x: Tensor) -> Tensor:
    return (x**3).sum()


def kinked(x: Any) -> Tensor:
    """Its slope has kinks at W."""
    return ((x["w"] - 1).relu() ** 2 + (x["w"] - 2).relu() ** 2).sum()


def scaled(table: Tensor) -> Tensor:
    return nn.functional.embedding(torch.tensor([0, 0, 1]), table, scale_grad_by_freq=True).square().sum()


def selected(patch: Patch) -> Any:
    patch.setattr(levels, "REPAIRS", {})

    def f(b: Tensor) -> Tensor:
        return (torch.masked_select(b, torch.tensor([True, True])) ** 2).sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        return fh.hessian(f, mode="reverse-over-reverse")(B)


def drawn(x: Tensor) -> Tensor:
    return (x**2 * torch.rand(2)).sum()


def branch(x: Tensor) -> Tensor:
    return x.sum() if x[0] > 0 else x.prod()


def counting(calls: Iterator[int]) -> Callable[[Tensor], Tensor]:
    def counted(x: Tensor) -> Tensor:
        return x * next(calls)

    return counted


def doubled_in_place(x: Tensor) -> Tensor:
    return x.mul_(2).sum()


@dataclasses.dataclass
class Unknown:
    weight: Tensor


GOES_ON = torch.Generator()


class Unentered(torch.autograd.Function):
    """2x without setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


class Cube(torch.autograd.Function):
    """x^3, with rules by hand; those below it have a wrong one, or lack one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class WrongBackward(Cube):
    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 4 * ctx.saved_tensors[0] ** 2 * cotangent


class WrongForward(Cube):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 4 * ctx.saved_tensors[0] ** 2 * tangent


class Twisted(Cube):
    """A gradient that is none: its derivative is not symmetric."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (3 * x**2 + x.roll(1)) * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 0 * tangent


class Frozen(Cube):
    """A right first derivative that forgets to depend on x."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].detach() ** 2 * cotangent


class TwoMinds(torch.autograd.Function):
    """The identity, which doubles cotangents and not tangents."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class CubeOfTwoMinds(Cube):
    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * TwoMinds.apply(ctx.saved_tensors[0]) ** 2 * cotangent


class NoRule(torch.autograd.Function):
    """No rule forward, and a backward that fails as torch's own do."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        raise RuntimeError("derivative for aten::none is not implemented")


class Once(torch.autograd.Function):
    """A backward that must not be differentiated, and no rule forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(self.layer(x)), x, use_reentrant=False).sum()


def checkpointed(_: Patch) -> None:
    net = Checkpointed()
    x = {name: 2 * p.detach() for name, p in net.named_parameters()}
    fh.hvp(lambda x: torch.func.functional_call(net, x, (torch.ones(3, 2),)), x, x)


def waiting(patch: Patch) -> None:
    patch.setattr("functional_hess.levels.FORWARD_MODE_TIMEOUT", 0.01)
    inside, go, held = threading.Event(), threading.Event(), []

    def slow(x: Tensor) -> Tensor:
        inside.set()
        held.append(go.wait(60))
        return x.sin()

    worker = threading.Thread(target=lambda: fh.jvp(slow, (W,), (W,)))
    worker.start()
    assert inside.wait(60)
    try:
        fh.jvp(torch.sin, (W,), (W,))
    finally:
        go.set()
        worker.join()


def resumed(first: Callable[[Any], Any] | bytes | None, *args: Any, **options: Any) -> Callable[[Patch], Any]:
    """A call that finds the record of ``first``, a function of ``W``, or a file of those bytes, or a folder."""

    def call(_: Patch) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows")
            if callable(first):
                fh.hessian(first, out=torch.zeros(2, 2), resume=path)(W)
            elif first is None:
                path.mkdir()
            else:
                path.write_bytes(first)
            fh.hessian(cube, **{"out": torch.zeros(2, 2), "resume": path, **options})(*(args or (W,)))

    return call


def of_samples(loss: Callable[[Tensor], Tensor]) -> Callable[[Patch], Any]:
    return lambda _: fh.vmap(fh.grad(loss))(torch.eye(2) + 1)


def gaussian(x: Tensor) -> Tensor:
    return nn.functional.gaussian_nll_loss(x, B, x**2)


def in_use(_: Patch) -> None:
    """A call on the record that an iterator over rows is at."""
    with tempfile.TemporaryDirectory() as folder:
        rows = fh.hessian_rows(cube, resume=Path(folder, "rows"), chunk_size=1)
        first = rows(W)
        next(first)
        try:
            next(rows(W))
        finally:
            first.close()


def without(name: str, call: Callable[[], Any]) -> Callable[[Patch], Any]:
    """The call where a package is missing."""

    def patched(patch: Patch) -> Any:
        patch.setitem(sys.modules, name, None)
        return call()

    return patched


def axis() -> Any:
    from matplotlib.figure import Figure

    return Figure().subplots()


def checked_wrong() -> None:
    with fh.checked():
        fh.hvp(lambda x: Frozen.apply(x).sum(), W.double(), W.double(), mode="reverse-over-reverse")


def in_checked(f: Callable[[Tensor], Tensor]) -> Callable[[Patch], Any]:
    def call(_: Patch) -> None:
        x = W.double()
        with fh.checked():
            fh.hvp(f, x, x)

    return call


def scaled_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.exp()
    return (x * scale).sum()


RUNNING = torch.zeros(2, dtype=torch.float64)
NORM = nn.BatchNorm1d(2, track_running_stats=True).double()
HELD: list[Tensor] = []


def held(x: Tensor) -> Tensor:
    HELD[:] = [x**3]
    return HELD[0].sum()


def normed_by_statistics(x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x[:, None] * x, RUNNING, torch.ones(2).double(), training=True).square().sum()


def unknown_pattern(patch: Patch) -> None:
    patch.setattr("functional_hess.sparsity.LARGEST_FULL", 3)
    x = (W.double(),)
    sparsity.detect_jacobian("sparse_jacobian", lambda x: (x * float(x[0]),), x, ())


def squares(w: Tensor, x: Tensor) -> Tensor:
    return ((w - x) ** 2).sum()


class Batches:
    """A loader whose passes may differ: one list for each, of what fills a batch."""

    def __init__(self, *passes: list[float]) -> None:
        self.passes = list(passes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.full((2, 2), fill) for fill in self.passes.pop(0)])


# Modules ----------------------------------------------------------------------------------------------------------------


class Of(nn.Module):
    """A linear layer with a forward of one's own."""

    def __init__(self, forward: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("same", self.mean)
        self.run = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def applied(module: nn.Module, params: Any = None, buffers: Any = None, **options: Any) -> Any:
    apply, own, state = fh.functionalize_module(module, **options)
    return apply(own if params is None else {**own, **params}, state if buffers is None else buffers, torch.ones(3, 2))


def clamped(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.linear.weight.clamp_(min=0)
    return net.linear(x)


def split(net: nn.Module, x: Tensor) -> Tensor:
    net.same = net.mean + 1
    return x


def closed_over() -> Any:
    net = Of(lambda _, x: net.linear(x))
    return applied(net)


def cached() -> Any:
    with parametrize.cached():
        return applied(parametrizations.weight_norm(nn.Linear(2, 1)))


class OptimizedModule(nn.Module):
    """What torch.compile returns is called so."""


def traced() -> nn.Module:
    with pytest.warns(DeprecationWarning):
        return torch.jit.trace(nn.Linear(2, 1), torch.ones(1, 2))


# The report -------------------------------------------------------------------------------------------------------------


def problem(name: str, made: Any = None) -> Callable[[Patch], Any]:
    """A report on ``problems:name``, a function that returns ``made``."""

    def reported(patch: Patch) -> Any:
        module = types.ModuleType("problems")
        module.value = 3
        module.made = lambda: made
        patch.setitem(sys.modules, "problems", module)
        with tempfile.TemporaryDirectory() as folder:
            return report.model_report(report.load_problem(name), folder, progress=False)

    return reported


def on(f: Callable[..., Any], params: Any, folder: str | None = None, **options: Any) -> Callable[[Patch], Any]:
    def reported(patch: Patch) -> Any:
        if folder == "":
            patch.setattr("os.access", lambda *_: False)
        with tempfile.TemporaryDirectory() as made:
            return report.model_report(report.Problem("p", f, params), folder or made, progress=False, **options)

    return reported


# The table --------------------------------------------------------------------------------------------------------------

P = fh.Space.of(X)
CHAIN = torch.zeros(3, dtype=torch.float64)


def chain(x: Tensor) -> Tensor:
    return (x[1:] * x[:-1]).sum()


def planned(**options: Any) -> fh.SparsePlan:
    return fh.sparse_hessian(chain, CHAIN, **options)


def dense_beyond_the_limit() -> Any:
    x = torch.zeros(500, dtype=torch.float64)
    plan = fh.sparse_hessian(chain, x, memory_limit="1 MB")
    return plan(x, layout=torch.strided)


def saved(f: Callable[[Path], Any]) -> Callable[[Patch], Any]:
    """``f`` of a file that holds a plan."""

    def call(_: Patch) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            planned().save(path := Path(folder) / "plan")
            return f(path)

    return call


def damaged(path: Path, **changed: Any) -> Any:
    with np.load(path) as file:
        arrays = {**file, **changed}
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return fh.load_plan(path, chain)


def no_plan(path: Path) -> Any:
    path.write_text("nothing")
    return fh.load_plan(path, chain)


PATTERN = patterns.banded(1)(3)
ONE_ROW = patterns.SparsityPattern.of_entries([0], [1], (2, 2))

ROWS: dict[str, list[Row]] = {
    "trees": [
        Row(
            "tangent['w']",
            ValueError,
            "tangent['w'] must have shape (2,), got (3,).",
            lambda _: fh.hvp(cubes, X, {"w": torch.ones(3), "b": B}),
        ),
        Row(
            "v['b']",
            ValueError,
            "v['b'] must be on cpu, got meta; v['w'] must have shape (2,), got (1,); v['w'] must have dtype "
            "torch.float32, got torch.float64.",
            lambda _: P.pack({"w": W.double()[:1], "b": B.to("meta")}, "v"),
        ),
        Row(
            "tangent['w']",
            TypeError,
            "tangent['b'] must have shape (), got (1,); tangent['w'] must be a tensor, got float.",
            lambda _: fh.hvp(cubes, X, {"w": 2.0, "b": torch.ones(1)}),
        ),
        Row(
            "tangent['n']",
            ValueError,
            "tangent['n'] must be None, got a tensor: that leaf of x is not a floating tensor.",
            lambda _: fh.hvp(cubes, {**X, "n": 3}, {**X, "n": B}),
        ),
        Row(
            "tangent['w']",
            ValueError,
            "tangent must have the same structure as the point: missing tangent['w']; unexpected tangent['v']; "
            "tangent['b'] must have shape (), got (1,).",
            lambda _: fh.hvp(cubes, X, {"v": W, "b": torch.ones(1)}),
        ),
        Row(
            "v['w']",
            ValueError,
            "v must have the same structure as the point: v['w'] must be a tuple, got list.",
            lambda _: fh.Space.of({"w": (W, B)}).pack({"w": [W, B]}, "v"),
        ),
        Row(
            "v",
            ValueError,
            "v must have the same structure as the point: v[1] must be a tuple, got dict; missing v[2]['b']; unexpected "
            "v[2]['c'].",
            lambda _: fh.Space.of((W, (), {"b": ()})).pack((W, {}, {"c": ()}), "v"),
        ),
        Row(
            "v",
            ValueError,
            "v must have the structure ..., got ...: what its containers hold beside leaves differs.",
            lambda _: fh.Space.of(collections.deque([W], maxlen=2)).pack(collections.deque([W]), "v"),
        ),
        Row(
            "x['z']",
            TypeError,
            "x['z'] is complex; derivatives here are real. Pass torch.view_as_real(...) of it.",
            lambda _: fh.grad(cubes)({"z": torch.ones(2, dtype=torch.complex64)}),
        ),
        Row(
            "x['z']",
            TypeError,
            "x['z'] has layout torch.sparse_coo; pass a dense tensor (.to_dense()).",
            lambda _: fh.grad(cubes)({"z": torch.eye(2).to_sparse()}),
        ),
        Row(
            "x['z']",
            TypeError,
            "x['z'] is a Unknown, which trees here do not know, so its tensors would not be differentiated. Enter the "
            "class once with functional_hess.register(Unknown).",
            lambda _: fh.grad(cubes)({"z": Unknown(W)}),
        ),
        Row(
            "Module",
            TypeError,
            "register: Module must be a dataclass, or come with flatten= and unflatten= functions.",
            lambda _: fh.register(nn.Module),
        ),
        Row("vector", ValueError, "vector must have shape (3,), got (4,).", lambda _: P.unravel(torch.ones(4))),
        Row("matrix", ValueError, "matrix must have shape (3, 3), got (3, 4).", lambda _: P.blocks(torch.ones(3, 4))),
        Row(
            "H['b']['w']",
            ValueError,
            "H['b']['w'] must have shape (2,), got ().",
            lambda _: P.matrix({p: {q: torch.ones(()) for q in X} for p in X}),
        ),
        Row(
            "H['b']",
            ValueError,
            "H['b'] must have the structure of x: dictionary key mismatch; expected key(s): ['b', 'w'], got key(s): "
            "['w'], missing key(s): ['b'].",
            lambda _: P.matrix({"b": {"w": W}, "w": {}}),
        ),
        Row("row 3", IndexError, "row 3 is out of range for 3 coordinates, which are numbered from 0.", lambda _: P.leaf_of(3)),
        Row("'v*'", ValueError, "partition: 'v*' chose no leaf; the paths are 'b', 'w'.", lambda _: fh.partition(X, "v*")),
        Row(
            "chosen['v']",
            ValueError,
            "chosen must have the same structure as the point: missing chosen['w']; unexpected chosen['v'].",
            lambda _: fh.partition(X, "w")[1]({"v": W, "b": None}),
        ),
        Row(
            "in_dims",
            ValueError,
            "in_dims must be an int, None or a prefix of the tree that it describes: dictionary key mismatch; expected "
            "key(s): ['v', 'w'], got key(s): ['b', 'w'], missing key(s): ['v'], extra key(s): ['b'].",
            lambda _: fh.vmap(cubes, ({"w": 0, "v": 0},))(X),
        ),
    ],
    "transforms": [
        Row("f", TypeError, "grad: f must be callable, got int.", lambda _: fh.grad(3)(W)),
        Row(
            "x",
            TypeError,
            "grad: x holds no floating tensor to differentiate, only torch.int64. Convert it, as in x.double().",
            lambda _: fh.grad(cube)(torch.ones(2, dtype=torch.long)),
        ),
        Row(
            "x",
            TypeError,
            "grad: x holds no floating tensor to differentiate, only Linear. Differentiate by the params of apply, "
            "params, buffers = functionalize_module(module).",
            lambda _: fh.grad(cube)(nn.Linear(2, 1)),
        ),
        Row(
            "x",
            TypeError,
            "grad: x holds no floating tensor to differentiate, only generator. Pass a tuple or a dict of tensors, as "
            "in tuple(module.parameters()).",
            lambda _: fh.grad(cube)(nn.Linear(2, 1).parameters()),
        ),
        Row(
            "args[1]",
            TypeError,
            "grad: args[1] holds no floating tensor to differentiate, only float. Make it a tensor, as in "
            "torch.tensor(2.0) or torch.from_numpy(array).",
            lambda _: fh.grad(cube, 1)(W, 2.0),
        ),
        Row(
            "argnums",
            ValueError,
            "hessian: argnums must be in range(1), the positional arguments of the call, got 2.",
            lambda _: fh.hessian(cube, 2)(W),
        ),
        Row(
            "argnums",
            ValueError,
            "hessian: argnums must be different arguments, got (0, -2).",
            lambda _: fh.hessian(torch.dot, (0, -2))(W, W),
        ),
        Row(
            "argnums",
            TypeError,
            "hessian: argnums must be an int or a tuple of ints, got a tensor of shape (2,). The point goes to what hessian "
            "returns, as in hessian(f)(x).",
            lambda _: fh.hessian(cube, W),  # type: ignore[arg-type]
        ),
        Row(
            "f",
            TypeError,
            "grad: with has_aux=True f must return (value, aux), got a tensor of shape ().",
            lambda _: fh.grad(cube, has_aux=True)(W),
        ),
        Row(
            "f",
            TypeError,
            "grad: f must return a real scalar, got torch.complex64. Take .real or .abs() of it.",
            lambda _: fh.grad(lambda x: x * (1 + 2j))(B),
        ),
        Row(
            "f",
            TypeError,
            "grad: f must return a scalar tensor (shape ()), got a tensor of shape (2,). Reduce it with .sum() or "
            ".mean(), or use jacrev.",
            lambda _: fh.grad(lambda x: x**2)(W),
        ),
        Row(
            "f",
            TypeError,
            "grad: f must return a scalar tensor (shape ()), got tuple. If f returns (value, aux), pass has_aux=True.",
            lambda _: fh.grad(lambda x: (cube(x), x))(W),
        ),
        Row(
            "f",
            TypeError,
            "grad: f must return a scalar tensor (shape ()), got float. Return the tensor itself, not .item(), "
            "float(...) or a container of it.",
            lambda _: fh.grad(lambda x: float(x.sum().detach()))(W),
        ),
        Row(
            "f", TypeError, "jvp: f must return at least one floating tensor, got int.", lambda _: fh.jvp(lambda x: 3, (W,), (W,))
        ),
        Row(
            "primals",
            TypeError,
            "jvp: primals must be a tuple of arguments, got Tensor. Write (primal,).",
            lambda _: fh.jvp(cube, W, (W,)),
        ),
        Row(
            "tangents",
            TypeError,
            "jvp: tangents must be a tuple of arguments, got Tensor. Write (tangent,).",
            lambda _: fh.jvp(cube, (W,), W),
        ),
        Row("tangents[0]", ValueError, "tangents[0] must have shape (2,), got ().", lambda _: fh.jvp(cube, (W,), (B,))),
        Row(
            "cotangent[1]",
            ValueError,
            "cotangent[1] must have shape (2,), got ().",
            lambda _: fh.vjp(lambda x: (x.sum(), x), W)[1]((B, B)),
        ),
        Row(
            "f(x)",
            fh.DependenceError,
            "grad: f(x) does not depend on x through differentiable operations, so its derivative would silently be "
            "zero. Look for .detach(), .item(), torch.tensor(...), .data, no_grad, rounding, argmax, comparisons or an "
            "op without a derivative between x and the result.",
            lambda _: fh.grad(lambda x: torch.tensor(1.0))(W),
        ),
        Row(
            "f(x)",
            fh.DependenceError,
            "jvp: f(x) does not depend on x through differentiable operations, so its derivative would silently be "
            "zero. Look for .detach(), .item(), torch.tensor(...), .data, no_grad, rounding, argmax, comparisons or an "
            "op without a derivative between x and the result.",
            lambda _: fh.jvp(lambda x: torch.tensor(1.0), (W,), (W,)),
        ),
        Row(
            "x['b']",
            fh.DependenceError,
            "grad: f does not depend on x['b'] (strict=True); its derivative is zero. Leave strict out if that is right.",
            lambda _: fh.grad(lambda x: cube(x["w"]), strict=True)(X),
        ),
        Row(
            "f(x)[1]",
            fh.DependenceError,
            "jvp: f(x)[1] does not depend on x (strict=True). Leave strict out if that is right.",
            lambda _: fh.jvp(lambda x: (x, torch.ones(1)), (W,), (W,), strict=True),
        ),
        Row(
            "f(x)",
            fh.DependenceError,
            "hvp: f(x) does not depend on x through differentiable operations, so its derivative would silently be "
            "zero. Look for .detach(), .item(), torch.tensor(...), .data, no_grad, rounding, argmax, comparisons or an "
            "op without a derivative between x and the result.",
            lambda _: fh.hvp(lambda x: torch.tensor(1.0), W, W, mode="double-backward"),
        ),
        Row(
            "thread",
            RuntimeError,
            "jvp: waited 0 s for another thread to leave forward-mode differentiation, which is process-wide in torch. "
            "If f starts a thread that differentiates and waits for it, do that outside f, or use "
            "mode='reverse-over-reverse'.",
            waiting,
        ),
        Row(
            "input",
            NotImplementedError,
            "as_strided_scatter: torch has its derivatives wrong, and they are repaired where input is contiguous in memory; "
            "pass input.contiguous(), or write it by index_put.",
            lambda _: fh.grad(lambda x: torch.as_strided_scatter(x.view(2, 2).T, W, (2,), (1,)).sum())(torch.ones(4)),
        ),
        Row(
            "weight",
            NotImplementedError,
            "embedding: max_norm writes into weight, whose rows it scales without a derivative; leave it out and pass "
            "torch.renorm(weight, norm_type, 0, max_norm) for weight, or differentiate by another argument.",
            lambda _: fh.hvp(
                lambda w: torch.nn.functional.embedding(torch.tensor([0]), w, max_norm=1.0).sum(), torch.eye(2), torch.eye(2)
            ),
        ),
        Row(
            "args[0]['b']",
            ValueError,
            "vmap: in_dims must be a dimension of args[0]['b'], of shape (), got 1.",
            lambda _: fh.vmap(cubes, 1)(X),
        ),
        Row(
            "in_dims",
            ValueError,
            "vmap: in_dims must map at least one tensor; all are None, or no argument holds a tensor.",
            lambda _: fh.vmap(cube)(2),
        ),
        Row(
            "args[0]['w']",
            ValueError,
            "vmap: the mapped dimensions must have one size: args[0]['b'] has 3, args[0]['w'] has 2.",
            lambda _: fh.vmap(cubes)({"w": W, "b": torch.ones(3)}),
        ),
        Row(
            "f(x)[1]",
            ValueError,
            "vmap: out_dims must be a place for f(x)[1], which depends on the mapped dimension, got None. Give it, as in 0.",
            lambda _: fh.vmap(lambda x: (x, x.sin()), out_dims=(0, None))(W),
        ),
        Row(
            "chunk_size",
            ValueError,
            "jacrev: chunk_size must be a positive int or None, got 0.",
            lambda _: fh.jacrev(torch.sin, chunk_size=0)(W),
        ),
    ],
    "products": [
        Row(
            "mode",
            ValueError,
            "hvp: mode must be 'auto', 'fastest' (for rows) or one of 'forward-over-reverse', 'reverse-over-reverse', "
            "'double-backward', 'finite-difference', got 'forward'.",
            lambda _: fh.hvp(cube, W, W, mode="forward"),
        ),
        Row(
            "mode",
            NotImplementedError,
            "hvp: mode='double-backward' is plain autograd and cannot run inside another transform; call it outside.",
            lambda _: fh.grad(lambda x: fh.hvp(cube, x, W, mode="double-backward").sum())(W),
        ),
        Row(
            "aten::none",
            fh.MissingDerivativeError,
            "hvp: cannot differentiate f twice (forward-over-reverse: You must implement the jvp function for custom "
            "autograd.Function to use it with forward mode AD; reverse-over-reverse: derivative for aten::none is not "
            "implemented; double-backward: derivative for aten::none is not implemented), called at .... Write that op "
            "as a composition of differentiable ones, or pass mode='finite-difference'.",
            lambda _: fh.hvp(lambda x: NoRule.apply(x).sum(), W, W),
        ),
        Row(
            "Once",
            fh.MissingDerivativeError,
            "hessian: cannot differentiate f twice (reverse-over-reverse: the backward of Once is marked "
            "once_differentiable; forward-over-reverse: You must implement the jvp function for custom "
            "autograd.Function to use it with forward mode AD; double-backward: the backward of Once is marked "
            "once_differentiable), called at .... Write that op as a composition of differentiable ones, or pass "
            "mode='finite-difference'.",
            lambda _: fh.hessian(lambda x: Once.apply(x).sum())(W),
        ),
        Row(
            "checkpoint",
            fh.MissingDerivativeError,
            "hvp: cannot differentiate f twice (forward-over-reverse: torch.func.{grad, vjp, jacrev, hessian} don't "
            "yet support saved tensor hooks; reverse-over-reverse: torch.func.{grad, vjp, jacrev, hessian} don't yet "
            "support saved tensor hooks; double-backward: a checkpoint computes again with other parameters than f was "
            "called with (torch.func.functional_call has put the module's own back); use functionalize_module "
            "instead), called at .... Write that op as a composition of differentiable ones, or pass "
            "mode='finite-difference'.",
            checkpointed,
        ),
        Row(
            "2 results",
            fh.MissingDerivativeError,
            "hessian: cannot differentiate f twice (reverse-over-reverse: a batching rule gave 2 results for 1 arguments). Write "
            "that op as a composition of differentiable ones, or pass mode='finite-difference'.",
            selected,
        ),
        Row(
            "normal",
            fh.MissingDerivativeError,
            "normal: torch takes the sample for a constant, so that its derivative would silently be zero. Write mean + std * "
            "torch.randn_like(mean), or draw it under torch.no_grad().",
            lambda _: fh.grad(lambda w: torch.normal(w, 1.0).sum())(W),
        ),
        Row(
            "embedding",
            fh.MissingDerivativeError,
            "embedding: with scale_grad_by_freq=True the gradient is that of no function, so that it has no derivative to "
            "return. Leave the option out.",
            lambda _: fh.hessian(scaled)(torch.ones(2, 2)),
        ),
        Row(
            "randomness",
            ValueError,
            "hvp: randomness must be 'error', 'same' or 'different', got 'some'.",
            lambda _: fh.hvp(cube, W, W, randomness="some"),
        ),
        Row(
            "f",
            fh.RandomnessError,
            "hvp: f draws random numbers (dropout?), so each product would belong to another function. Pass "
            "randomness='same' to fix one draw for the whole call, or switch the module to eval mode.",
            lambda _: fh.hvp(drawn, W, W),
        ),
        Row(
            "f",
            fh.RandomnessError,
            "hvp: f draws random numbers (dropout?), so each product would belong to another function. Pass "
            "randomness='same' to fix one draw for the whole call, or switch the module to eval mode.",
            lambda _: fh.vmap(lambda v: fh.hvp(drawn, W, v))(torch.eye(2)),
        ),
        Row(
            "f",
            fh.RandomnessError,
            "hvp: f draws from a torch.Generator that goes on from evaluation to evaluation, so each product would belong to "
            "another function. Pass randomness='same' to fix one draw for the whole call, or seed it inside f.",
            lambda _: fh.hvp(lambda x: (x**2 * torch.rand(2, generator=GOES_ON)).sum(), W, W),
        ),
        Row(
            "f",
            fh.RandomnessError,
            "jacfwd: f draws random numbers (dropout?), so each product would belong to another function. Pass "
            "randomness='same' to fix one draw for the whole call, or switch the module to eval mode.",
            lambda _: fh.jacfwd(drawn)(W),
        ),
        Row(
            "that op",
            fh.MissingDerivativeError,
            "vjp: cannot differentiate f once (reverse: In order to use an autograd.Function with functorch transforms (vmap, "
            "grad, jvp, jacrev, ...), it must override the setup_context staticmethod), called at test_errors.py:.... Write that "
            "op as a composition of differentiable ones, or move what its forward keeps for the backward into a setup_context "
            "staticmethod.",
            lambda _: fh.vjp(lambda x: Unentered.apply(x), W),
        ),
        Row(
            "aten::none",
            fh.MissingDerivativeError,
            "vmap: cannot map f (batched: derivative for aten::none is not implemented), called at test_errors.py:.... Write "
            "that op as a composition of differentiable ones, or loop over the mapped dimension and torch.stack the results.",
            of_samples(lambda x: NoRule.apply(NoRule.apply(x)).sum()),
        ),
        Row(
            "a branch on a mapped number",
            fh.MissingDerivativeError,
            "vmap: cannot map f (batched: vmap: It looks like you're either (1) calling .item() on a Tensor or (2) attempting to "
            "use a Tensor in some data-dependent control flow or (3) encountering this error in PyTorch internals), called at "
            "test_errors.py:.... Write that op as a composition of differentiable ones, or use torch.where in the place of a "
            "branch on a mapped number, or loop over the mapped dimension and torch.stack the results.",
            of_samples(gaussian),
        ),
        Row(
            "track_running_stats",
            fh.MissingDerivativeError,
            "vmap: cannot map f (batched: Batch norm got a batched tensor as input while the running_mean or running_var, which "
            "will be updated in place, were not batched). Write that op as a composition of "
            "differentiable ones, or make the module with track_running_stats=False, or loop over the mapped dimension and "
            "torch.stack the results.",
            lambda _: fh.vmap(nn.BatchNorm1d(2))(torch.ones(2, 3, 2)),
        ),
    ],
    "Hessians": [
        Row(
            "mode",
            ValueError,
            "hessian: mode must be 'auto', 'fastest' (for rows) or one of 'forward-over-reverse', "
            "'reverse-over-reverse', 'double-backward', 'finite-difference', got 'forward'.",
            lambda _: fh.hessian(cube, mode="forward")(W),
        ),
        Row(
            "out=",
            ValueError,
            "hessian: out= holds one (n, n) matrix, so f must return a scalar tensor (shape ()), got a tensor of shape (2,). "
            "Leave it out for such an f.",
            lambda _: fh.hessian(torch.sin, out=torch.zeros(2, 2))(W),
        ),
        Row(
            "out=",
            ValueError,
            "hessian: out= cannot carry a graph or a batch, so it belongs to the outermost call. Leave it out here, or "
            "call under torch.no_grad() if a leaf, or a tensor that f closes over, requires grad.",
            lambda _: fh.hessian(cube, out=torch.zeros(2, 2))(W.clone().requires_grad_()),
        ),
        Row(
            "out=",
            ValueError,
            "hessian: out= cannot carry a graph or a batch, so it belongs to the outermost call. Leave it out here, or "
            "call under torch.no_grad() if a leaf, or a tensor that f closes over, requires grad.",
            lambda _: fh.hessian(lambda x: cube(x) * B.clone().requires_grad_(), out=torch.zeros(2, 2))(W),
        ),
        Row(
            "out",
            ValueError,
            "hessian: out must have shape (2, 2), torch.float32, cpu, got shape (2, 3), torch.float32, cpu.",
            lambda _: fh.hessian(cube, out=torch.zeros(2, 3))(W),
        ),
        Row(
            "resume",
            ValueError,
            "hessian: resume= keeps a record of the rows that out= holds, so it needs one: a memory-mapped tensor, as "
            "torch.from_file makes it. hessian_rows takes resume= without.",
            lambda _: fh.hessian(cube, resume="rows")(W),
        ),
        Row(
            "resume",
            TypeError,
            "hessian: resume must be the path of a file, got bool.",
            lambda _: fh.hessian(cube, out=torch.zeros(2, 2), resume=True)(W),  # type: ignore[arg-type]
        ),
        Row(
            "resume",
            ValueError,
            "hessian_rows: resume= belongs to the outermost call, not inside another transform or a trace. Leave it out here.",
            lambda _: fh.vmap(lambda x: next(fh.hessian_rows(cube, resume="rows")(x))[1])(W[None]),
        ),
        Row(
            "resume",
            ValueError,
            "hessian: resume='...rows' cannot be taken up: it is no record of finished rows. Pass another path, or delete the "
            "file to begin anew.",
            resumed(b"one\ntwo\n"),
        ),
        Row(
            "resume",
            ValueError,
            "hessian: resume='...rows' cannot be taken up: the first line of a record is damaged. Pass another path, or delete "
            "the file to begin anew.",
            resumed(b'{"functional_hess": "finished rows", "n": 2} 00000000\n'),
        ),
        Row(
            "args[0]",
            ValueError,
            "hessian: resume='...rows' is the record of another call: mode is double-backward, was auto; args[0] has other "
            "numbers. Pass another path, or delete the file to begin anew.",
            resumed(cube, 2 * W, mode="double-backward"),
        ),
        Row(
            "f",
            ValueError,
            "hessian: resume='...rows' is the record of another call: f is another function or draws other numbers, for its "
            "Hessian times a fixed vector has changed. Pass another path, or delete the file to begin anew.",
            resumed(lambda x: 2 * cube(x)),
        ),
        Row(
            "resume",
            OSError,
            "hessian: resume='...rows' cannot be read and written (Is a directory). Pass the path of a file that is there or "
            "can be made.",
            resumed(None),
        ),
        Row(
            "resume",
            BlockingIOError,
            "hessian_rows: resume='...rows' is in use by another call, of this process or another. Call again when that has "
            "ended (an iterator over rows ends by .close()), or pass another path.",
            in_use,
        ),
        Row(
            "chunk_size",
            ValueError,
            "hessian: chunk_size must be 'auto', a positive int or None, got 0.",
            lambda _: fh.hessian(cube, chunk_size=0)(W),
        ),
        Row(
            "memory_limit",
            ValueError,
            "memory_limit must be bytes or a text such as '4GiB', got 'much'.",
            lambda _: fh.hessian(cube, memory_limit="much")(W),
        ),
        Row(
            "memory_limit",
            fh.MemoryLimitError,
            "hessian: 100 rows need ... MB (... MB of result and ... MB to work with, 1 row at a time), but "
            "memory_limit is ... MB. Stream them with hessian_rows (rows= takes any part), write into a memory-mapped "
            "out=, take hessian_diagonal or hessian_blocks, or use products with hvp, which need no matrix.",
            lambda _: fh.hessian(cube, memory_limit=1000)(torch.ones(100)),
        ),
        Row(
            "tqdm",
            ImportError,
            "hessian: progress=True needs tqdm: pip install 'functional_hess[progress]'.",
            without("tqdm.auto", lambda: fh.hessian(cube, progress=True)(W)),
        ),
        Row(
            "row 2",
            IndexError,
            "hessian_rows: row 2 is out of range for 2 coordinates, which are numbered from 0.",
            lambda _: fh.hessian_rows(cube, rows=[0, 2])(W),
        ),
        Row(
            "rows",
            TypeError,
            "hessian_rows: rows must be a range or a sequence of ints, got a tensor of dtype torch.bool.",
            lambda _: fh.hessian_rows(cube, rows=W > 1)(W),  # type: ignore[arg-type]
        ),
        Row(
            "pairs",
            TypeError,
            "hessian_blocks: pairs must hold pairs of globs, as in [('w', 'b')], got 'w' among them.",
            lambda _: fh.hessian_blocks(cubes, pairs=["w"])(X),  # type: ignore[list-item]
        ),
        Row(
            "pairs",
            ValueError,
            "hessian_blocks: pairs must match paths of x, got 'v', which matches no leaf; the paths are b, w.",
            lambda _: fh.hessian_blocks(cubes, pairs=[("w", "v")])(X),
        ),
        Row(
            "f",
            TypeError,
            "hessian_diagonal: f must return a scalar tensor (shape ()), got a tensor of shape (2,). hessian takes "
            "vector-valued f too.",
            lambda _: fh.hessian_diagonal(torch.sin)(W),
        ),
        Row(
            "explain",
            TypeError,
            "explain: transformed must be what hessian, hessian_rows, hessian_blocks or hessian_diagonal return, got function. "
            "Write explain(hessian(f), x).",
            lambda _: fh.explain(cube, W),
        ),
    ],
    "prepared": [
        Row(
            "args[0]['w']",
            ValueError,
            "prepare(cubes): prepared for other arguments: args[0]['w'] must be a tensor of shape (2,), torch.float32, cpu, got "
            "a tensor of shape (3,), torch.float32, cpu. Call prepare again for these.",
            lambda _: fh.prepare(cubes, X)({"w": torch.ones(3), "b": B}),
        ),
        Row(
            "prepare(cube)",
            PrepareError,
            "prepare(cube): a prepared function cannot run inside another transform; prepare the whole of it.",
            lambda _: fh.vmap(fh.prepare(cube, W))(torch.ones(3, 2)),
        ),
        Row(
            "prepare(cube)",
            PrepareError,
            "prepare(cube): a prepared function carries no graph, but an argument requires grad. Pass it detached, call under "
            "torch.no_grad(), or prepare the derivative that is wanted.",
            lambda _: fh.prepare(cube, W)(torch.ones(2, requires_grad=True)),
        ),
        Row(
            "backend",
            ValueError,
            "prepare(cube): backend must be one of 'graph', 'inductor', got 'xla'.",
            lambda _: fh.prepare(cube, W, backend="xla"),
        ),
        Row(
            "prepare(cube)",
            PrepareError,
            "prepare(cube): cannot be prepared inside another transform; prepare the whole of it.",
            lambda _: fh.vmap(lambda x: fh.prepare(cube, x)(x))(torch.ones(3, 2)),
        ),
        Row(
            "an argument",
            PrepareError,
            "prepare(branch): the function looks at the value of an argument (if, float(), .item()), so it takes another course "
            "for other values and cannot be written down. Use torch.where, or call it unprepared.",
            lambda _: fh.prepare(branch, W),
        ),
        Row(
            "aten.rand.default",
            PrepareError,
            "prepare(drawn): the function draws random numbers (aten.rand.default), which would differ from call to call. Pass "
            "them as an argument.",
            lambda _: fh.prepare(drawn, W),
        ),
        Row(
            "an argument",
            PrepareError,
            "prepare(doubled_in_place): the function writes in place to an argument, so that each call would meet another one. "
            "Let it return what it changes (functionalize_module does so for buffers).",
            lambda _: fh.prepare(doubled_in_place, torch.ones(2)),
        ),
        Row(
            "prepare(counted)",
            PrepareError,
            "prepare(counted): the first prepared result differs from the eager one, so the function is not the same twice: it "
            "changes something that it uses. Call it unprepared.",
            lambda _: fh.prepare(counting(iter(range(9))), torch.ones(2)),
        ),
    ],
    "modules": [
        Row(
            "module",
            TypeError,
            "functionalize_module: module must be a torch.nn.Module, got builtin_function_or_method.",
            lambda _: fh.functionalize_module(torch.tanh),
        ),
        Row(
            "module",
            TypeError,
            "functionalize_module: module is TorchScript (TopLevelTracedModule), whose parameters live outside Python; "
            "pass the module that it was made from.",
            lambda _: fh.functionalize_module(traced()),
        ),
        Row(
            "module.0",
            TypeError,
            "functionalize_module: module.0 is a DataParallel, which holds replicas of the module; pass its .module.",
            lambda _: fh.functionalize_module(nn.Sequential(nn.DataParallel(nn.Tanh()))),
        ),
        Row(
            "module.0",
            TypeError,
            "functionalize_module: module.0 is the result of torch.compile, which holds on to the parameters it was "
            "made with; pass its ._orig_mod.",
            lambda _: fh.functionalize_module(nn.Sequential(OptimizedModule())),
        ),
        Row(
            "module.0",
            TypeError,
            "functionalize_module: module.0 has 'weight' without a shape yet; call the module once on an example, then "
            "functionalize it.",
            lambda _: fh.functionalize_module(nn.Sequential(nn.LazyLinear(2))),
        ),
        Row(
            "module.parametrizations.weight.0",
            TypeError,
            "functionalize_module: module.parametrizations.weight.0 normalizes by spectral_norm in train mode "
            "(_SpectralNorm), whose power iteration has no derivative, so that second derivatives would be wrong; call "
            "module.eval() first, which holds its vectors still.",
            lambda _: fh.functionalize_module(parametrizations.spectral_norm(nn.Linear(2, 2))),
        ),
        Row(
            "module.lock",
            TypeError,
            "functionalize_module: module.lock must be something that copies, got a lock (cannot pickle '_thread.lock' "
            "object). Keep it outside of the module, or give its class a __deepcopy__ that returns self.",
            lambda _: fh.functionalize_module(Of(clamped, lock=threading.Lock())),
        ),
        Row(
            "only='v*'",
            ValueError,
            "functionalize_module: only='v*' chose no parameter; the paths are 'weight', 'bias'.",
            lambda _: fh.functionalize_module(nn.Linear(2, 1), "v*"),
        ),
        Row(
            "params['weight']",
            ValueError,
            "apply: unexpected params['wieght']; params['weight'] must have shape (1, 2), got (2,); unexpected "
            "buffers['b']. Start from the dicts that functionalize_module returned.",
            lambda _: applied(nn.Linear(2, 1), {"weight": W, "wieght": W}, {"b": B}),
        ),
        Row(
            "buffers",
            ValueError,
            "apply: params['bias'] must be a tensor, got float; buffers must be a dict of tensors, got Tensor. Start "
            "from the dicts that functionalize_module returned.",
            lambda _: applied(nn.Linear(2, 1), {"bias": 2.0}, W),
        ),
        Row(
            "cached()",
            RuntimeError,
            "apply: torch.nn.utils.parametrize.cached() is active, which remembers parametrized tensors by the "
            "identity of a module; every call here has modules of its own. Call outside of it.",
            lambda _: cached(),
        ),
        Row(
            "params['linear.weight']",
            RuntimeError,
            "apply: forward must not write into a parameter, and has written into params['linear.weight'] in place. "
            "Make it a buffer, or compute a new tensor from it.",
            lambda _: applied(Of(clamped)),
        ),
        Row(
            "'linear.weight'",
            RuntimeError,
            "apply: forward must compute with the tensors it is called with, and has reached 'linear.weight' of the "
            "module itself: a closure, a hook or a global leads there. Let it take what it needs from self or its "
            "arguments.",
            lambda _: closed_over(),
        ),
        Row(
            "buffers['mean']",
            RuntimeError,
            "apply: buffers['mean'] must be one tensor after the call, got a tensor of shape (2,), a tensor of shape "
            "(2,): forward has taken it away, or given the submodules that share it different ones. Let forward write "
            "into it in place.",
            lambda _: applied(Of(split), return_buffers=True),
        ),
    ],
    "risks": [
        Row(
            "reduction",
            ValueError,
            "empirical_risk: reduction must be 'mean' or 'sum', got 'max'.",
            lambda _: fh.empirical_risk(squares, reduction="max"),
        ),
        Row(
            "batch_size",
            ValueError,
            "empirical_risk: batch_size must be 'auto', a positive int or None, got 0.",
            lambda _: fh.empirical_risk(squares, batch_size=0),
        ),
        Row(
            "loss",
            TypeError,
            "empirical_risk: loss must be a function of the parameters, got the module Linear. Take apply, params, "
            "buffers = functionalize_module(module), and pass lambda params, x: apply(params, buffers, x).",
            lambda _: fh.empirical_risk(nn.Linear(2, 1)),
        ),
        Row(
            "criterion",
            TypeError,
            "empirical_risk: criterion must be callable, got int.",
            lambda _: fh.empirical_risk(squares, 3),
        ),
        Row(
            "risk",
            TypeError,
            "sample_gradient_norms: risk must be made by empirical_risk, got function. Write the loss of one sample and pass "
            "empirical_risk(loss).",
            lambda _: fh.sample_gradient_norms(squares),
        ),
        Row(
            "batch",
            TypeError,
            "empirical_risk: batch must hold tensors with samples along their first dimension, got int.",
            lambda _: fh.empirical_risk(squares)(W, 3),
        ),
        Row(
            "batch[0]",
            ValueError,
            "empirical_risk: batch[0] has shape (); its first dimension must count the samples.",
            lambda _: fh.empirical_risk(squares)(W, B),
        ),
        Row(
            "parts of a batch",
            ValueError,
            "empirical_risk: the parts of a batch must have the same number of samples: batch[0] has 3, batch[1] has 2.",
            lambda _: fh.empirical_risk(squares)(W, torch.ones(3), torch.ones(2)),
        ),
        Row(
            "batch",
            ValueError,
            "empirical_risk: batch holds no samples. Leave empty batches out.",
            lambda _: fh.empirical_risk(squares)(W, torch.ones(0, 2)),
        ),
        Row(
            "the loss",
            TypeError,
            "empirical_risk: the loss of one sample must be a scalar tensor (shape ()), got a tensor of shape (2,). Reduce it.",
            lambda _: fh.empirical_risk(lambda w, x: w * x)(W, torch.ones(3, 2)),
        ),
        Row(
            "the loss",
            fh.RandomnessError,
            "empirical_risk: the loss of a sample draws random numbers (dropout?), so each derivative would belong to "
            "another function. Switch the module to eval mode, or draw the numbers beforehand and pass them as part of "
            "the batch.",
            lambda _: fh.empirical_risk(lambda w, x: drawn(w))(W, torch.ones(3, 2)),
        ),
        Row(
            "generator",
            TypeError,
            "empirical_risk: the generator gives its batches only once, but derivatives read them again. Pass an "
            "object that starts anew whenever it is iterated, such as a DataLoader.",
            lambda _: fh.empirical_risk(squares)(W, (torch.ones(2, 2) for _ in range(2))),
        ),
        Row(
            "Batches",
            ValueError,
            "empirical_risk: the Batches gave no batches. Pass an object that holds some.",
            lambda _: fh.empirical_risk(squares)(W, Batches([], [])),
        ),
        Row(
            "Batches",
            ValueError,
            "empirical_risk: the Batches gives other data from pass to pass (random augmentation, or drop_last with "
            "shuffle?), so each derivative would belong to another function. Draw the data once, beforehand.",
            lambda _: fh.empirical_risk(squares)(W, Batches([1.0], [2.0])),
        ),
        Row(
            "Batches",
            ValueError,
            "empirical_risk: the Batches gave 4 samples, and 2 when it was first read. Leave it as it is, and make another "
            "object for other data.",
            lambda _: fh.empirical_risk(squares)(W, Batches([1.0], [1.0], [1.0, 1.0])),
        ),
        Row(
            "Batches",
            ValueError,
            "empirical_risk: the Batches gave a batch of another kind than when it was first read (shapes, dtypes, or what is no "
            "tensor). Leave it as it is, and make another object for other data.",
            lambda _: fh.empirical_risk(squares)(W, Batches([1.0], [1.0], [1])),
        ),
    ],
    "coloring": [
        Row(
            "rows",
            ValueError,
            "pattern: rows must be in range(2), for the shape is (2, 2), got 3.",
            lambda _: patterns.SparsityPattern.of_entries([0, 3], [0, 0], (2, 2)),
        ),
        Row(
            "columns",
            ValueError,
            "pattern: columns must be in range(2), for the shape is (2, 2), got -1.",
            lambda _: patterns.SparsityPattern.of_entries([0], [-1], (2, 2)),
        ),
        Row(
            "pattern",
            ValueError,
            "pattern: a matrix has two dimensions, got an array of shape (3,).",
            lambda _: patterns.SparsityPattern.of_matrix(np.ones(3)),
        ),
        Row("half_width", ValueError, "banded: half_width must be at least 0, got -1.", lambda _: patterns.banded(-1)),
        Row("sizes", ValueError, "blocks: the sizes must add up to 3, got 2.", lambda _: patterns.blocks([1, 1])(3)),
        Row(
            "order",
            ValueError,
            "order must be one of 'natural', 'largest-first', 'smallest-last', got 'random'.",
            lambda _: coloring.ordered(PATTERN, "random"),
        ),
        Row(
            "pattern",
            ValueError,
            "star_coloring: the pattern must be symmetric; take pattern | pattern.transpose, or color its columns.",
            lambda _: coloring.star_coloring(ONE_ROW),
        ),
        Row(
            "(0, 0)",
            ValueError,
            "the coloring does not belong to the pattern: entry (0, 0) cannot be read from any product. Color this pattern.",
            lambda _: coloring.recovery(PATTERN, coloring.column_coloring(patterns.banded(0)(3))),
        ),
    ],
    "laws": [
        Row(
            "H v",
            LawError,
            "hvp: H v along a random direction disagrees with central differences: at x got 0, expected 24; the largest "
            "disagreement there is 24, more than the tolerance .... An op of f, or a backward written for it, has a wrong "
            "derivative: another mode= may have a right one.",
            lambda _: checked_wrong(),
        ),
        Row(
            ".item()",
            fh.ImpurityError,
            "hvp: f takes numbers out of a tensor that depends on x by .item() (at test_errors.py:...); they are constants for "
            "derivatives. Compute with the tensor itself; what is only to be shown, return as aux (has_aux=True), or detach it "
            "first.",
            in_checked(lambda x: (x**3).sum() * x[0].item()),
        ),
        Row(
            "exp under no_grad",
            fh.ImpurityError,
            "hvp: the value of f depends on x through exp under no_grad (at test_errors.py:...), which one mode of "
            "differentiation takes for a constant and another does not. Move it out of the no_grad block, or write .detach() if "
            "a constant is meant.",
            in_checked(scaled_without_grad),
        ),
        Row(
            "its argument x",
            fh.ImpurityError,
            "hvp: f writes into its argument x (mul_, at test_errors.py:...), so its next evaluation is at another point. Write "
            "into a clone.",
            in_checked(doubled_in_place),
        ),
        Row(
            "the captured buffer NORM.num_batches_tracked",
            fh.ImpurityError,
            "hvp: f writes into the captured buffer NORM.num_batches_tracked (add_, at test_errors.py:...), so each evaluation "
            "may be of another function. Take apply, params, buffers = functionalize_module(module), which clones its buffers, "
            "or call module.eval().",
            in_checked(lambda x: NORM(x[:, None] * x).square().sum()),
        ),
        Row(
            "the captured RUNNING",
            fh.ImpurityError,
            "hvp: f writes into the captured RUNNING (batch_norm, at test_errors.py:...), so each evaluation may be of another "
            "function. Make the tensor inside f, clone it there, or return its new values as aux (has_aux=True).",
            in_checked(normed_by_statistics),
        ),
        Row(
            "a tensor that depends on x",
            fh.ImpurityError,
            "hvp: f keeps a tensor that depends on x, of shape (2,) (pow, at test_errors.py:...), in a list, cache or "
            "attribute: it is of no use outside the transform, and what f does with it next time is not its value at x. "
            "Return it as aux (has_aux=True), or keep a detached copy of what does not depend on x.",
            in_checked(held),
        ),
        Row(
            "order",
            ValueError,
            "check_derivatives: order must be at least 1, got 0.",
            lambda _: testing.check_derivatives(torch.sin, W, order=0),
        ),
        Row(
            "f",
            TypeError,
            "check_derivatives: f must return at least one floating tensor, got int. Return the tensor itself, not .item() or "
            "float(...) of it.",
            lambda _: testing.check_derivatives(lambda x: 3, W),
        ),
        Row(
            "aten::none",
            fh.MissingDerivativeError,
            "check_derivatives: cannot differentiate f twice (jvp: You must implement the jvp function for custom "
            "autograd.Function to use it with forward mode AD; vjp: derivative for aten::none is not implemented), "
            "called at .... Write that op as a composition of differentiable ones, or pass mode='finite-difference'.",
            lambda _: testing.check_derivatives(NoRule.apply, W),
        ),
        Row(
            "at args[0]",
            LawError,
            "check_derivatives: the vjp of f disagrees with central differences along a random direction: at args[0] got ..., "
            "expected ...; the largest disagreement there is ..., more than the tolerance .... An op of f, or a backward "
            "written for it, has a wrong derivative.",
            lambda _: testing.check_derivatives(WrongBackward.apply, W.double()),
        ),
        Row(
            "at f(x)",
            LawError,
            "check_derivatives: the jvp of f disagrees with central differences along a random direction: at f(x) got ..., "
            "expected ...; the largest disagreement there is ..., more than the tolerance .... An op of f, or a backward "
            "written for it, has a wrong derivative.",
            lambda _: testing.check_derivatives(WrongForward.apply, W.double()),
        ),
        Row(
            "at x",
            LawError,
            "check_hessian: <u, H v> = <v, H u> fails along a random direction: at x got ..., expected ...; the largest "
            "disagreement there is ..., more than the tolerance .... An op of f, or a backward written for it, has a wrong "
            "derivative.",
            lambda _: testing.check_hessian(lambda x: Twisted.apply(x).sum(), torch.arange(3.0).double()),
        ),
        Row(
            "at x",
            LawError,
            "check_hessian: forward-over-reverse = reverse-over-reverse fails along a random direction: at x got ..., expected "
            "...; the largest disagreement there is ..., more than the tolerance .... An op of f, or a backward written for it,"
            " has a wrong derivative.",
            lambda _: testing.check_hessian(lambda x: CubeOfTwoMinds.apply(x).sum(), W.double()),
        ),
    ],
    "warnings": [
        Row(
            "x['w']",
            fh.FiniteDifferenceWarning,
            "hvp: mode='finite-difference': the product is 6 at its largest, with an estimated error of ... at x['w'], more than "
            "1e-06 of it and rounding explain: the gradient of f has a kink at x or is rough near it (an inner loop that stops "
            "early, noise, low precision inside f). Move x off the kink or smooth f, tighten its tolerances and compute it in "
            "float64; or give the op without a rule an autograd.Function and leave mode='finite-difference' out.",
            lambda _: fh.hvp(kinked, {"w": W.double()}, {"w": W.double()}, mode="finite-difference"),
        ),
        Row(
            "x['w']",
            fh.LowPrecisionWarning,
            "hvp: x['w'] is bfloat16: expect errors of 8e-03 of the result, more where terms cancel. Pass float32 parameters for "
            "more.",
            lambda _: fh.hvp(lambda x: cube(x["w"]), {"w": W.bfloat16()}, {"w": W.bfloat16()}),
        ),
        Row(
            "f",
            fh.ImpurityWarning,
            "hvp: the value of f depends on x through .detach() (at test_errors.py:...), a constant for derivatives. Leave it "
            "out, if H is to be that of the value; a straight-through estimate is meant to differ.",
            in_checked(lambda x: (x * x.detach()).sum()),
        ),
        Row(
            "f",
            fh.ImpurityWarning,
            "hvp: the value of f depends on x through a cast to float32 (at test_errors.py:...), which rounds value and "
            "derivatives to 1e-07. Cast the other operands up instead, or pass x in the narrower dtype.",
            in_checked(lambda x: cube(x.float())),
        ),
        Row(
            "the Batches",
            UserWarning,
            "empirical_risk: the Batches gives its samples in another order at every pass. Sums over them agree up to rounding, "
            "but not bit for bit; pass shuffle=False for that.",
            lambda _: fh.empirical_risk(squares)(W, Batches([1.0, 2.0], [2.0, 1.0], [1.0, 2.0])),
        ),
    ],
    "sparse": [
        Row(
            "layout",
            ValueError,
            "sparse_hessian: layout must be one of torch.sparse_csr, torch.sparse_coo, torch.strided, got torch.sparse_csc.",
            lambda _: planned()(CHAIN, layout=torch.sparse_csc),
        ),
        Row(
            "plan.values",
            fh.SparsityError,
            "sparse_hessian: inside another transform there are no sparse tensors. Take plan.values(...), which has the entries "
            "in the order of plan.pattern, or layout=torch.strided.",
            lambda _: fh.vmap(planned())(CHAIN[None]),
        ),
        Row(
            "functional_hess[sparse]",
            ImportError,
            "sparse_hessian: to_scipy needs scipy: pip install 'functional_hess[sparse]'.",
            lambda patch: (patch.setitem(sys.modules, "scipy.sparse", None), planned().to_scipy(CHAIN)),
        ),
        Row(
            "diagonal",
            TypeError,
            "sparse_jacobian: diagonal is for plans of sparse_hessian. Read it off plan(x).to_dense() of a square matrix.",
            lambda _: fh.sparse_jacobian(lambda x: x**2, CHAIN).diagonal(CHAIN),
        ),
        Row(
            "args[0]",
            ValueError,
            "sparse_hessian: the plan was made for other arguments: args[0] must be a tensor of shape (3,), torch.float64, cpu, "
            "got a tensor of shape (4,), torch.float64, cpu. Make a new plan for these.",
            lambda _: planned()(torch.zeros(4, dtype=torch.float64)),
        ),
        Row(
            "x (3,)",
            ValueError,
            "sparse_hessian: the plan is for x with leaves x (3,), got w (2,). Make a new plan for this x.",
            saved(lambda path: fh.load_plan(path, chain)({"w": W})),
        ),
        Row(
            "new plan",
            fh.SparsityError,
            "sparse_hessian: inside another transform entries cannot be certified, and this plan needs it (its pattern was not "
            "detected and never certified, or what it rests on has changed). Call it once outside, or make a new plan.",
            lambda _: fh.vmap(planned(pattern="tridiagonal").values)(CHAIN[None]),
        ),
        Row(
            "x[0]",
            fh.SparsityError,
            "sparse_hessian: A v along a random v disagrees with a product: at x[0] the entries give ..., the product .... "
            "Either the pattern that was given lacks entries: leave it out to have it detected; or its derivatives are not "
            "symmetric (a custom backward, no_grad inside): take sparse_jacobian(grad(f), x).",
            lambda _: planned(pattern="diagonal")(CHAIN),
        ),
        Row(
            "backend",
            ValueError,
            "sparse_hessian: backend must be one of 'graph', 'inductor', got 'xla'.",
            lambda _: planned(backend="xla"),
        ),
        Row(
            "plan.values",
            fh.SparsityError,
            "sparse_hessian: a plan cannot be made inside another transform. Make it outside, and call plan.values there.",
            lambda _: fh.vmap(lambda x: fh.sparse_hessian(chain, x).values(x))(CHAIN[None]),
        ),
        Row(
            "pattern",
            ValueError,
            "sparse_hessian: pattern must be one of 'diagonal', 'tridiagonal', a matrix, banded(r) or blocks(sizes), got 'band'.",
            lambda _: planned(pattern="band"),
        ),
        Row(
            "pattern",
            TypeError,
            "sparse_hessian: pattern must be a scipy matrix, a tensor, 'tridiagonal', banded(r), blocks(sizes) or a "
            "SparsityPattern, got int.",
            lambda _: planned(pattern=3),
        ),
        Row(
            "pattern",
            ValueError,
            "sparse_hessian: pattern must have shape (3, 3), got (4, 4).",
            lambda _: planned(pattern=np.eye(4)),
        ),
        Row(
            "pattern",
            ValueError,
            "sparse_hessian: pattern must be symmetric. Pass p | p.transpose of p = SparsityPattern.of_matrix(pattern).",
            lambda _: planned(pattern=np.triu(np.ones((3, 3)))),
        ),
        Row(
            "coloring",
            ValueError,
            "sparse_hessian: coloring must be a Coloring of kind 'star', or that name, got 'column'.",
            lambda _: planned(coloring="column"),
        ),
        Row(
            "coloring",
            ValueError,
            "sparse_hessian: coloring must have 3 columns or 3 rows, got 4 columns and 0 rows.",
            lambda _: planned(coloring=coloring.star_coloring(patterns.banded(1)(4))),
        ),
        Row(
            "is no plan",
            ValueError,
            "load_plan: ... is no plan: it must be a file that plan.save wrote (...).",
            saved(no_plan),
        ),
        Row(
            "is damaged",
            ValueError,
            "load_plan: ... is damaged: its contents and their sum differ. Make the plan anew.",
            saved(lambda path: damaged(path, indices=np.zeros(4, dtype=np.int64))),
        ),
        Row(
            "version",
            ValueError,
            "load_plan: ... is of another version, 'functional_hess plan 2'. Make the plan anew.",
            saved(lambda path: damaged(path, header=np.array('{"format": "functional_hess plan 2"}'))),
        ),
        Row(
            "layout=",
            fh.MemoryLimitError,
            "sparse_hessian: the dense matrix needs 2.0 MB, but memory_limit is 1.0 MB. Leave layout= out for a sparse tensor, "
            "or take plan.diagonal or plan.values.",
            lambda _: dense_beyond_the_limit(),
        ),
    ],
    "sparsity": [
        Row(
            "pattern=",
            sparsity.SparsityError,
            "sparse_jacobian: the pattern could not be found (f asks for a value that depends on x, by "
            "aten._local_scalar_dense.default), and 2 x 2 entries are too many to compute all. Pass pattern=: a scipy "
            "matrix, 'tridiagonal', banded(r), blocks(sizes) or a SparsityPattern.",
            unknown_pattern,
        ),
    ],
    "pictures": [
        Row(
            "matplotlib",
            ImportError,
            "plots: pictures need matplotlib: pip install 'functional_hess[plot]'.",
            without("matplotlib", lambda: plots.spectrum(None, W)),
        ),
        Row(
            "H", ValueError, "heat_map: H must have shape (3, 3), got (2, 2).", lambda _: plots.heat_map(axis(), torch.eye(2), P)
        ),
        Row(
            "norms",
            ValueError,
            "block_norms: norms must have shape (2, 2), got (3, 3).",
            lambda _: plots.block_norms(axis(), torch.eye(3), P),
        ),
        Row(
            "eigenvalues",
            ValueError,
            "spectrum: eigenvalues must have shape (n,) with n > 0, got (2, 2).",
            lambda _: plots.spectrum(axis(), torch.eye(2)),
        ),
    ],
    "report": [
        Row(
            "matplotlib",
            report.ReportError,
            "the report needs matplotlib, which is not installed: pip install 'functional_hess[report]'.",
            without("matplotlib", lambda: report.require_extras("matplotlib")),
        ),
        Row(
            "'problems'", report.ReportError, "a problem is named as package.module:problem, got 'problems'.", problem("problems")
        ),
        Row(
            "'absent'",
            report.ReportError,
            "'absent:problem' must name a module that can be imported, but there is no module 'absent', looked for from ... on."
            " Run the command where the module is, or install it.",
            problem("absent:problem"),
        ),
        Row(
            "'problems:absent'",
            report.ReportError,
            "'problems:absent' must name a function of the module, but 'problems' has no attribute 'absent'. Write it as "
            "package.module:problem.",
            problem("problems:absent"),
        ),
        Row(
            "'problems:value'",
            report.ReportError,
            "'problems:value' must be a function that returns (f, params), but is of type int.",
            problem("problems:value"),
        ),
        Row(
            "'problems:made'",
            report.ReportError,
            "'problems:made' must return (f, params) or (f, params, args), got a tuple of 1.",
            problem("problems:made", (cube,)),
        ),
        Row(
            "the f",
            report.ReportError,
            "the f that 'problems:made' returns must be callable, got int.",
            problem("problems:made", (3, W)),
        ),
        Row(
            "the args",
            report.ReportError,
            "the args that 'problems:made' returns must be a tuple, got Tensor.",
            problem("problems:made", (cube, W, W)),
        ),
        Row(
            "folder",
            report.ReportError,
            "cannot make the folder /dev/null/report (Not a directory). Pass another one, as in --out=DIR.",
            on(cube, W, "/dev/null/report"),
        ),
        Row(
            "folder", report.ReportError, "cannot write into the folder .... Pass another one, as in --out=DIR.", on(cube, W, "")
        ),
        Row(
            "params['z']",
            report.ReportError,
            "params['z'] is complex; derivatives here are real. Pass torch.view_as_real(...) of it.",
            on(cube, {"z": torch.ones(2, dtype=torch.complex64)}),
        ),
        Row(
            "params",
            report.ReportError,
            "params holds no floating tensor with entries, but must be a tree of tensors (got dict), such as "
            "dict(module.named_parameters()).",
            on(cube, {"n": 3}),
        ),
        Row(
            "f",
            report.ReportError,
            "f must return a scalar, a floating tensor of shape (), got one of shape (2,), torch.float32.",
            on(torch.sin, W),
        ),
        Row(
            "f",
            report.ReportError,
            "f must be finite at params, got -inf. Choose params at which it is.",
            on(lambda x: x.log().sum(), torch.zeros(2)),
        ),
        Row(
            "eigenvalues",
            fh.MemoryLimitError,
            "report: 100 eigenvalues need 0 MB, but 0 MB may be taken. Raise --memory-limit, or take fewer parameters.",
            on(cube, torch.ones(100), memory_limit=100_000),
        ),
        Row(
            "block w x w",
            report.ReportError,
            "the Hessian has 4 entries that are not finite, the first in the block w x w. Choose params at which f has second "
            "derivatives.",
            on(lambda x: x["w"].norm(), {"w": torch.zeros(2)}),
        ),
        Row(
            "'0'",
            argparse.ArgumentTypeError,
            "must be 'auto' or a positive number of rows, got '0'",
            lambda _: __main__._rows("0"),
        ),
        Row(
            "'much'",
            argparse.ArgumentTypeError,
            "must be a number of bytes or a text such as 4GiB, got 'much'",
            lambda _: __main__._bytes("much"),
        ),
    ],
}
EVERY = [row for rows in ROWS.values() for row in rows]
NUMBERED = [pytest.param(row, id=f"{group}-{k}-{row.names}") for group, rows in ROWS.items() for k, row in enumerate(rows)]


@functools.cache
def raised_by(row: Row) -> BaseException | None:
    """The error, or the warning, of a row's call."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            row.call(patch)
        except BaseException as error:
            return error
    return None


@pytest.mark.parametrize("row", NUMBERED)
def test_message_is_the_one_in_the_table(row):
    error = raised_by(row)
    assert type(error) is row.error, f"{type(error).__name__}: {error}"
    pattern = ".*".join(map(re.escape, row.message.split("...")))
    assert re.fullmatch(pattern, str(error), re.DOTALL), f"\n{error}\nis not\n{row.message}"


@pytest.mark.parametrize("row", NUMBERED)
def test_message_names_the_argument_and_is_a_sentence(row):
    assert row.names in row.message
    assert row.message.endswith((".", "...")) or row.error is argparse.ArgumentTypeError  # argparse ends that sentence itself


def test_a_tree_that_differs_in_many_places_is_told_all_of_them_at_once():
    x = {"a": W, "b": (W, B), "c": W, "d": W, "e": B, "f": W}
    v = {"a": torch.ones(3), "b": [W, B], "c": W.double(), "e": 1.0, "f": W.to("meta"), "g": B}
    expected = (
        "tangent must have the same structure as the point: tangent['b'] must be a tuple, got list; missing tangent['d']; "
        "unexpected tangent['g']; tangent['a'] must have shape (2,), got (3,); tangent['c'] must have dtype torch.float32, got "
        "torch.float64; tangent['e'] must be a tensor, got float; tangent['f'] must be on cpu, got meta."
    )
    for verb in (fh.hvp, fh.grad_and_hvp):
        with pytest.raises(ValueError) as error:
            verb(cubes, x, v)
        assert str(error.value) == expected


# The table is complete --------------------------------------------------------------------------------------------------


SIGNALS = {"SitesChanged", "TooManyError"}  # one part of the package tells another; so do private classes
NEVER = {"NotImplementedError", "AssertionError"}  # without a message: a method that subclasses supply, a place never reached


def statements(sources: dict[str, str]) -> dict[tuple[str, int], range]:
    """The lines of every statement that raises an error of its own, or warns: `raise` alone passes on another's."""
    return {
        (name, node.lineno): range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for name, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Raise) and node.exc is not None and not is_signal(node.exc)) or warns(node)
    }


def warns(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"


def is_signal(raised: ast.expr) -> bool:
    name = ast.unparse(raised.func if isinstance(raised, ast.Call) else raised).split(".")[-1]
    return (
        name in SIGNALS or (name.startswith("_") and name[1:2].isupper()) or (name in NEVER and not isinstance(raised, ast.Call))
    )


def caught(sources: dict[str, str]) -> set[str]:
    """The names of the classes that some `except` of the package names."""
    handlers = [node for text in sources.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ExceptHandler)]
    return {inner.id for handler in handlers if handler.type for inner in ast.walk(handler.type) if isinstance(inner, ast.Name)}


def origins(error: BaseException | None) -> Iterator[tuple[str, int]]:
    """Where in the package an error was raised, and those that it came from."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and Path(frames[-1].filename).parent == PACKAGE:
            yield Path(frames[-1].filename).name, frames[-1].lineno or 0
        error = error.__cause__ or error.__context__


def without_a_row(sources: dict[str, str], reached: set[tuple[str, int]]) -> list[str]:
    every = statements(sources)
    missed = [(name, line) for (name, line), lines in every.items() if not any((name, k) in reached for k in lines)]
    return [f"{name}:{line}: {sources[name].splitlines()[line - 1].strip()}" for name, line in sorted(missed)]


def test_every_raise_and_every_warning_of_the_package_has_a_row():
    sources = {path.name: path.read_text() for path in sorted(PACKAGE.glob("*.py"))}
    reached = {place for row in EVERY for place in origins(raised_by(row))}
    assert without_a_row(sources, reached) == []


def test_signals_are_caught_inside_and_reach_nobody():
    sources = {path.name: path.read_text() for path in sorted(PACKAGE.glob("*.py"))}
    trees = map(ast.parse, sources.values())
    raised = [node.exc for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    names = {ast.unparse(e.func if isinstance(e, ast.Call) else e) for e in raised if is_signal(e)}
    assert names - NEVER <= caught(sources)
    assert not any(is_signal(ast.Name(type(raised_by(row)).__name__)) for row in EVERY if row.error.__name__ not in NEVER)


def test_a_raise_without_a_row_is_noticed():
    sources = {"a.py": "def f():\n    raise ValueError(\n        'one')\n\ndef g():\n    raise KeyError('two')\n"}
    assert without_a_row(sources, {("a.py", 2)}) == ["a.py:6: raise KeyError('two')"]
    assert without_a_row(sources, {("a.py", 3), ("a.py", 6)}) == []
    assert statements({"a.py": "try:\n    f()\nexcept KeyError:\n    raise\n"}) == {}
    assert statements({"a.py": "raise _Signal('x')\nraise TooManyError\nraise NotImplementedError\n"}) == {}
    assert len(statements({"a.py": "warnings.warn('x', UserWarning)\nwarnings.catch_warnings()\n"})) == 1
    assert len(statements({"a.py": "raise NotImplementedError('x')\nraise no_mode_left()\nraise _made()\n"})) == 3
    assert caught({"a.py": "try:\n    f()\nexcept (KeyError, _Signal):\n    pass\n"}) == {"KeyError", "_Signal"}


def test_origins_are_those_of_the_package_and_of_causes():
    def wrapped():
        try:
            P.unravel(torch.ones(4))
        except ValueError as error:
            raise KeyError("ours") from error

    with pytest.raises(KeyError) as caught:
        wrapped()
    ((name, line),) = origins(caught.value)
    assert name == "tree.py" and "vector must have shape" in (PACKAGE / name).read_text().splitlines()[line - 1]
