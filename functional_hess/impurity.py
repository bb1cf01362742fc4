"""What a function does beside computing its value, found by one evaluation that is watched.

A derivative is that of the map x -> f(x). A function is more than its map where it takes numbers out of torch, hides a part of
itself from differentiation, or leaves something behind for its next evaluation; then the modes disagree, or the derivative is of
another function, and no formula is to blame. :func:`value_watched` evaluates f once, one level of reverse differentiation deep so
that it is known which tensors depend on x (they are *traced*), under a ``TorchFunctionMode`` that sees every call f makes.

* A number taken from a traced tensor (``item``, ``float``, ``tolist``, ``numpy``, ``torch.tensor``) is an error at once, for
  where it goes cannot be followed.
* What is computed from a traced tensor under ``no_grad``, behind ``detach`` or ``data``, or in a narrower dtype is followed:
  if f's value depends on it, the first is an error and the others are warnings.
* A write into a tensor that f did not make, be it an argument, a captured tensor or the buffer of a module, is an error, and so
  is a traced tensor that is still alive when the evaluation is over, in a list, a cache or an attribute.

Nothing is said of what this library itself does, nor seen of what a custom ``autograd.Function`` does inside, nor
of a function that no level of torch.func can enter, nor of a risk beyond the parts that fit one microbatch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functional_hess.guards import called_by_package, missing_rule, outside_frame, outside_place
from functional_hess.levels import flat_vjp
from functional_hess.nesting import at_depth, depth, is_tracked_at, is_wrapped, outside_transforms
from functional_hess.tree import tensors_of

__all__ = ["ImpurityError", "ImpurityWarning", "value_watched"]

Tensors = tuple[Tensor, ...]
Call = Callable[..., Any]

_TAKES_NUMBERS: dict[Any, str] = {
    Tensor.item: ".item()",
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.__array__: "numpy",
    Tensor.__float__: "float(...)",
    Tensor.__int__: "int(...)",
    Tensor.__complex__: "complex(...)",
    Tensor.new_tensor: ".new_tensor(...)",
    torch.tensor: "torch.tensor(...)",
}
_DETACHES: dict[Any, str] = {
    Tensor.detach: ".detach()",
    torch.detach: ".detach()",
    Tensor.detach_: ".detach_()",
    torch.detach_: ".detach_()",
    Tensor.data.__get__: ".data",  # type: ignore[attr-defined]
}
_CASTS = {"to", "float", "half", "bfloat16", "type", "type_as", "_to_copy"}
_NO_WRITES = {"requires_grad_", "detach_", "share_memory_", "rename_", "retain_grad"}
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__"}
_SEARCHED = 4  # how deep captured objects are searched for the name of a tensor


class ImpurityError(ValueError):
    """f does more than compute its value: its derivative is not that of what it computes, or its next value another."""


class ImpurityWarning(UserWarning):
    """f hides a part of its value from differentiation, or rounds it."""


def value_watched(verb: str, call: Call, x: Tensors, name: Callable[[int], str]) -> Any:
    """``call(*x)``, evaluated once; ``None`` where f cannot be entered by a level of torch.func.

    Args:
        verb: names the call in errors.
        call: f as a function of its leaves; its captured objects are searched for names.
        x: those leaves, without graphs.
        name: what errors call a leaf.

    Raises:
        ImpurityError: the message names what was done, the line of f that does it, and the cure.
    """
    found: list[tuple[_Watch, Callable[[Sequence[Any]], Any]]] = []
    names = {_storage(t): name(leaf) for leaf, t in enumerate(x)}

    def of_tensors(*tensors: Tensor) -> tuple[Tensors, Tensors]:
        with _Watch(verb, call, names, depth()) as watch:
            out = call(*tensors)
        watch.hold_to(out)
        kept, rebuild = tensors_of(out)
        found.append((watch, rebuild))
        return (torch.zeros(()),), kept

    try:
        _, pullback, kept = flat_vjp(of_tensors, x)
    except RuntimeError as error:
        if not missing_rule(error):
            raise
        return None
    del pullback  # and with it the graph
    watch, rebuild = found.pop()
    watch.require_nothing_kept()
    return rebuild(kept)


# ---------------------------------------------------------------------------------------------------- the watch


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A place where the value stops to depend on x, or loses digits; ``fatal`` if modes of differentiation disagree on it."""

    what: str
    why: str
    cure: str
    place: str
    fatal: bool = False


class _Watch(TorchFunctionMode):
    """Sees the operations of f, follows what is cut off from x, and knows the tensors that f made."""

    def __init__(self, verb: str, call: Call, names: Mapping[int, str], level: int) -> None:
        super().__init__()
        self.verb, self.call, self.level, self.arguments = verb, call, level, names
        self.made: set[int] = set()  # storages; one that is freed and used again was not f's to begin with
        self.cuts: dict[int, tuple[weakref.ref[Tensor], _Cut]] = {}
        self.deeper: list[_Cut] = []  # in a transform of f's own, whose tensors cannot be followed out of it
        self.traced: list[tuple[weakref.ref[Tensor], str, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, by_f = kwargs or {}, not called_by_package()
        given = list(_tensors((*args, *kwargs.values())))
        traced = [t for t in given if self._is_traced(t)]
        with self._unwritten(func, args, kwargs, given) if by_f else contextlib.nullcontext():
            if by_f and traced and func in _TAKES_NUMBERS:
                raise ImpurityError(_number_taken(self.verb, _TAKES_NUMBERS[func]))
            out = func(*args, **kwargs)
        results = [args[0]] if _name(func) == "__setitem__" else list(_tensors((out,)))
        self._follow(results, given, lambda t: _cut(func, kwargs, traced, t, self._is_traced(t)) if by_f and traced else None)
        for t in results:
            if t.is_floating_point() and (self._is_traced(t) or is_wrapped(t, self.level)):
                self.traced.append((weakref.ref(t), _name(func), outside_place()))
        return out

    def _follow(self, results: Sequence[Tensor], given: Sequence[Tensor], cut_in: Callable[[Tensor], _Cut | None]) -> None:
        """Which of the results are f's own, and which are cut off from x, here or before."""
        held = {_storage(t) for t in given}
        before = next((cut for t in given if (cut := self._cut_of(t))), None)
        for t in results:
            if _storage(t) not in held:
                self.made.add(_storage(t))
            cut = cut_in(t) if t.is_floating_point() else None
            if cut and is_wrapped(t, self.level):
                self.deeper.append(cut)
            elif t.is_floating_point() and (cut := cut or before):
                self.cuts[id(t)] = weakref.ref(t), cut

    @contextlib.contextmanager
    def _unwritten(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Sequence[Tensor]) -> Iterator[None]:
        """Refuse a call that writes into a tensor that was there before f was called."""
        for t in _written(func, args, kwargs):
            if (key := self._foreign(t)) is not None:
                raise ImpurityError(self._write(key, t, func))
        before = {key: (t, _state(t, func)) for t in given if (key := self._foreign(t)) is not None}
        yield
        for key, (t, state) in before.items():
            if not _same(state, _state(t, func)):
                raise ImpurityError(self._write(key, t, func))

    def _is_traced(self, t: Tensor) -> bool:
        return is_tracked_at(t, self.level)

    def _cut_of(self, t: Tensor) -> _Cut | None:
        reference, cut = self.cuts.get(id(t), (None, None))
        return cut if reference is not None and reference() is t else None

    def _foreign(self, t: Tensor) -> int | None:
        """The storage of a tensor that was there before f was called."""
        key = _storage(t)
        return key if key in self.arguments or (key not in self.made and not self._is_traced(t)) else None

    # ------------------------------------------------------------------------------------------------ what is concluded

    def _write(self, storage: int, t: Tensor, func: Any) -> str:
        how = f"{_name(func)}, at {outside_place()}"
        if storage in self.arguments:
            return (
                f"{self.verb}: f writes into its argument {self.arguments[storage]} ({how}), so its next evaluation is at "
                "another point. Write into a clone."
            )
        name, module = _name_of(self.call, storage)
        of = f"the captured {name}" if name else f"a captured tensor of shape {tuple(at_depth(t, 0).shape)}"
        cure = (
            "Take apply, params, buffers = functionalize_module(module), which clones its buffers, or call module.eval()"
            if module
            else "Make the tensor inside f, clone it there, or return its new values as aux (has_aux=True)"
        )
        return f"{self.verb}: f writes into {of} ({how}), so each evaluation may be of another function. {cure}."

    def hold_to(self, out: Any) -> None:
        """Refuse, or warn of, a cut on which the value of f depends."""
        outputs = tensors_of(out)[0]
        whole = any(map(self._is_traced, outputs))  # else the graph is broken, which is another error
        cuts = [*self.deeper, *(cut for t in outputs if (cut := self._cut_of(t)) and (whole or cut.fatal))]
        for cut in sorted(set(cuts), key=lambda cut: not cut.fatal):
            told = f"{self.verb}: the value of f depends on x through {cut.what} (at {cut.place}), {cut.why}. {cut.cure}."
            if cut.fatal:
                raise ImpurityError(told)
            warnings.warn(told, ImpurityWarning, stacklevel=outside_frame())

    def require_nothing_kept(self) -> None:
        """No traced tensor is left now that its graph is gone."""
        if not any(reference() is not None for reference, _, _ in self.traced):
            return
        gc.collect()  # what only a cycle holds
        for reference, name, place in self.traced:
            if (t := reference()) is not None:
                raise ImpurityError(
                    f"{self.verb}: f keeps a tensor that depends on x, of shape {tuple(at_depth(t, 0).shape)} ({name}, at "
                    f"{place}), in a list, cache or attribute: it is of no use outside the transform, and what f does "
                    "with it next time is not its value at x. Return it as aux (has_aux=True), or keep a detached copy of "
                    "what does not depend on x."
                )


def _cut(func: Any, kwargs: Mapping[str, Any], traced: Sequence[Tensor], result: Tensor, still_traced: bool) -> _Cut | None:
    """Whether, and how, an operation on traced tensors cuts its result off from x."""
    name = _name(func)
    if not still_traced:
        if not torch.is_grad_enabled() and not (name.endswith("_like") or name.startswith("new_")):
            return _Cut(
                f"{name} under no_grad",
                "which one mode of differentiation takes for a constant and another does not",
                "Move it out of the no_grad block, or write .detach() if a constant is meant",
                outside_place(),
                fatal=True,
            )
        if func in _DETACHES:
            return _Cut(
                _DETACHES[func],
                "a constant for derivatives",
                "Leave it out, if H is to be that of the value; a straight-through estimate is meant to differ",
                outside_place(),
            )
        return None
    narrows = name in _CASTS or kwargs.get("dtype") is not None
    eps = torch.finfo(result.dtype).eps
    if narrows and any(t.is_floating_point() and torch.finfo(t.dtype).eps < eps for t in traced):
        return _Cut(
            f"a cast to {str(result.dtype).removeprefix('torch.')}",
            f"which rounds value and derivatives to {eps:.0e}",
            "Cast the other operands up instead, or pass x in the narrower dtype",
            outside_place(),
        )
    return None


def _number_taken(verb: str, how: str) -> str:
    return (
        f"{verb}: f takes numbers out of a tensor that depends on x by {how} (at {outside_place()}); they are constants for "
        "derivatives. Compute with the tensor itself; what is only to be shown, return as aux (has_aux=True), or detach it first."
    )


# ---------------------------------------------------------------------------------------------------- tensors


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (tuple, list)):
            yield from _tensors(arg)


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call is going to write into, as far as its name tells."""
    name = _name(func)
    if name in _WRITES or (name.endswith("_") and not name.startswith("__") and name not in _NO_WRITES):
        yield from _tensors(args[:1])
    yield from _tensors((kwargs.get("out"),))


def _storage(t: Tensor) -> int:
    """What tells the memory of a tensor from that of another, below all transforms; the tensor's own id if it has none."""
    inside = at_depth(t, 0)
    with contextlib.suppress(RuntimeError, NotImplementedError):
        return inside.untyped_storage()._cdata
    return id(inside)


def _state(t: Tensor, func: Any) -> tuple[int, Tensor | None]:
    """What a write changes: the version of a tensor, or its numbers where the kernel writes without counting (batch_norm)."""
    inside = at_depth(t, 0)
    with outside_transforms():
        numbers = inside.clone() if "norm" in _name(func) else None
    return 0 if inside.is_inference() else inside._version, numbers


def _same(before: tuple[int, Tensor | None], after: tuple[int, Tensor | None]) -> bool:
    with outside_transforms():
        numbers = all(a is None or b is None or torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in [(before[1], after[1])])
    return before[0] == after[0] and numbers


def _name_of(call: Call, storage: int) -> tuple[str, bool]:
    """How f calls a captured tensor, and whether it belongs to a module; no name if it isn't found."""
    seen: set[int] = set()

    def search(node: Any, name: str, of_module: bool, left: int) -> tuple[str, bool] | None:
        if isinstance(node, Tensor):
            return (name, of_module) if _storage(node) == storage else None
        if not left or id(node) in seen:
            return None
        seen.add(id(node))
        each = (
            search(child, told, of_module or isinstance(node, torch.nn.Module), left - 1) for told, child in _inside(node, name)
        )
        return next((found for found in each if found), None)

    return search(call, "", False, _SEARCHED + 2) or ("", False)


def _inside(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What an object of a program holds, with names as the program would write them."""
    dot = f"{name}." if name else ""
    if isinstance(node, torch.nn.Module):
        yield from ((f"buffer {dot}{path}", t) for path, t in node.named_buffers())
        yield from ((f"parameter {dot}{path}", t) for path, t in node.named_parameters())
    elif isinstance(node, functools.partial):
        yield from (("", part) for part in (node.func, *node.args, *node.keywords.values()))
    elif isinstance(node, Mapping):
        yield from ((f"{name}[{key!r}]", child) for key, child in node.items())
    elif isinstance(node, (list, tuple)):
        yield from ((f"{name}[{i}]", child) for i, child in enumerate(node))
    elif isinstance(node, FunctionType):
        code, cells = node.__code__, node.__closure__ or ()
        for free, cell in zip(code.co_freevars, cells, strict=True):
            with contextlib.suppress(ValueError):  # a cell not filled yet
                yield free, cell.cell_contents
        yield from ((used, node.__globals__[used]) for used in code.co_names if used in node.__globals__)
    elif isinstance(node, MethodType):
        yield from (("self", node.__self__), ("", node.__func__))
    elif hasattr(node, "__dict__") and not isinstance(node, (type, ModuleType)):
        yield from ((f"{dot}{key}", child) for key, child in vars(node).items())
