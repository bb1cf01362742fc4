"""What a function holds beside its arguments, and whether that is still the same.

A function is more than its arguments: it closes over variables, reads globals, has defaults, is a method of an object, calls a
module. What was written down of it once (a trace, a pattern) holds for what it held then. This floor lists the places where it
holds something, each with what was there, so that a later look tells what has been put there instead:

    cells of closures, globals and defaults that its code names, what ``partial`` binds, attributes of its object, parameters,
    buffers and the mode of modules, entries of lists, tuples and dicts; of functions that are found on the way the same again.

It sees replacement, not a change in place: a tensor that is written to is the same tensor. Out of sight are attributes of Python
modules, values behind properties and slots, and what a library's own functions hold.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Held", "held_by"]

DEPTH = 6
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
LIBRARIES = {"torch", "numpy", "scipy", "optree", "functional_hess", *sys.stdlib_module_names}  # whose globals do not change
_GONE = object()


@dataclasses.dataclass(frozen=True)
class Held:
    """A place within reach of a function: its name as a program would write it, what was there, and how to look again."""

    name: str
    value: Any
    look: Callable[[], Any]

    @property
    def replaced(self) -> bool:
        """Whether something else is there now."""
        try:
            now = self.look()
        except (ValueError, KeyError, AttributeError):  # an emptied cell, a key or an attribute that is gone
            now = _GONE
        return not _same(self.value, now)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors there."""
        for value in self.value if isinstance(self.value, tuple) else (self.value,):
            if isinstance(value, Tensor):
                yield value


def held_by(function: Any) -> tuple[Held, ...]:
    """The places where ``function`` holds a tensor, an array, a number, a text, another function or an object, each once.

    Example:
        >>> def scaled(by):
        ...     return lambda x: by * x
        >>> [place] = held_by(scaled(3.0))
        >>> place.name, place.value, place.replaced
        ('by', 3.0, False)
    """
    chain, seen = [function], set()
    while hasattr(chain[-1], "__wrapped__") and len(chain) < DEPTH:
        chain.append(chain[-1].__wrapped__)
    return tuple(held for one in reversed(chain) for held in _held(one, "", DEPTH, seen))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and isinstance(a, PLAIN) and a == b


def _held(holder: Any, name: str, depth: int, seen: set[int]) -> Iterator[Held]:
    """What is found in a holder: a function, a method, a ``partial``, a module, any object with attributes."""
    if id(holder) in seen or not depth:
        return
    seen.add(id(holder))
    for key, value, look in _places(holder):
        yield from _found(f"{name}.{key}".strip("."), value, look, depth - 1, seen)


def _found(name: str, value: Any, look: Callable[[], Any], depth: int, seen: set[int]) -> Iterator[Held]:
    if isinstance(value, (Tensor, np.ndarray, np.generic, *PLAIN)):
        yield Held(name, value, look)
    elif isinstance(value, (list, tuple, dict)):
        if id(value) in seen or not depth:
            return
        seen.add(id(value))
        entries = _entries_of(value)
        yield Held(name, entries, lambda: _entries_of(look()))
        for i, entry in enumerate(entries):
            if not isinstance(entry, (Tensor, np.ndarray, np.generic, *PLAIN)):
                yield from _found(name, entry, lambda i=i: _entries_of(look())[i], depth - 1, seen)
    elif _is_followed(value):
        yield Held(name, value, look)
        yield from _held(value, name, depth, seen)


def _entries_of(container: Any) -> tuple[Any, ...]:
    return (*container.keys(), *container.values()) if isinstance(container, dict) else tuple(container)


def _is_followed(value: Any) -> bool:
    """Functions, modules and objects of the user's own; no classes, no Python modules, nothing of a library's."""
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return False
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial, torch.nn.Module)):
        return True
    return hasattr(value, "__dict__") and (_library(type(value)) not in LIBRARIES or callable(value))


def _library(of: Any) -> str:
    return str(getattr(of, "__module__", "")).partition(".")[0]


Places = Iterator[tuple[str, Any, Callable[[], Any]]]


def _places(holder: Any) -> Places:
    if isinstance(holder, types.FunctionType):
        yield from _places_of_function(holder)
    elif isinstance(holder, types.MethodType):
        yield "", holder.__func__, lambda: holder.__func__
        yield "", holder.__self__, lambda: holder.__self__
    elif isinstance(holder, functools.partial):
        yield "", holder.func, lambda: holder.func
        yield "args", holder.args, lambda: holder.args
        yield from _places_in(holder.keywords, holder.keywords)
    elif isinstance(holder, torch.nn.Module):
        yield from _places_of_module(holder)
    else:
        attributes = getattr(holder, "__dict__", {})
        yield from _places_in(attributes, list(attributes))
        call = vars(type(holder)).get("__call__")
        if isinstance(call, types.FunctionType):
            yield "", call, lambda: call


def _places_of_function(function: types.FunctionType) -> Places:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        look = functools.partial(operator.attrgetter("cell_contents"), cell)
        try:
            yield name, look(), look
        except ValueError:  # never filled
            continue
    if function.__defaults__:
        yield "defaults", function.__defaults__, lambda: function.__defaults__
    if function.__kwdefaults__:
        yield from _places_in(function.__kwdefaults__, list(function.__kwdefaults__))
    if _library(function) not in LIBRARIES:
        yield from _places_in(function.__globals__, _names_in(function.__code__))


def _names_in(code: types.CodeType) -> list[str]:
    """The names of globals and attributes in a function and in those written inside it."""
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names_in(c)]
    return list(dict.fromkeys((*code.co_names, *inner)))


def _places_of_module(module: torch.nn.Module) -> Places:
    for path, part in module.named_modules():
        for entries in (part._parameters, part._buffers):
            for key, value, look in _places_in(entries, list(entries)):
                yield f"{path}.{key}".strip("."), value, look
        yield f"{path}.training".strip("."), part.training, functools.partial(operator.attrgetter("training"), part)


def _places_in(entries: dict[str, Any], names: Iterable[str]) -> Places:
    for name in names:
        if name in entries:
            yield name, entries[name], functools.partial(entries.__getitem__, name)
