"""What a program of tensor ops did: enough to tell whether another run of it is the same program.

Where numbers can go in a program (:mod:`functional_hess.sparsity`) is worked out op by op, which takes longer than running it.
But it is a matter of the ops alone, of the memory they read and write, and of the integers and booleans that say where. A
transcript is a record of just that, op by op:

    (op, arguments),    a tensor as (number of its storage, geometry, a digest of what it holds if that says where).

Storages are numbered in the order in which they are met, and a storage that is freed gives up its number. Floating numbers do not
enter, but those that are arguments by themselves do. Two runs with equal transcripts connect the same elements, whatever
came between: a function that branches, reads the clock or was given other data has another transcript when its ops differ.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functional_hess.connections import says_where, tensors_in

__all__ = ["Transcript", "storage_of", "transcript"]

Tensors = tuple[Tensor, ...]
Transcript = tuple[Hashable, ...]


class _UntoldError(Exception):
    """A tensor has no memory that could be told from other memory."""


def transcript(product: Callable[[Tensors], Tensors], vector: Tensors, labels: Tensors) -> Transcript | None:
    """The program that ``product(vector)`` runs, as a key that equals no other program's; nothing if it cannot be told.

    Example:
        >>> x = (torch.ones(3),)
        >>> told = [transcript(lambda x: (f(x[0]),), x, ()) for f in (torch.sin, torch.sin, torch.cos)]
        >>> told[0] == told[1], told[0] == told[2]
        (True, False)
    """
    recorder = _Recorder()
    recorder.lines.append((recorder.told(vector), tuple(map(_digest, labels))))
    try:
        with recorder:
            result = product(vector)
        recorder.lines.append(recorder.told(result))
    except _UntoldError:
        return None
    return tuple(recorder.lines)


class _Recorder(TorchDispatchMode):
    """Writes down what is called, on what."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Hashable] = []
        self.numbers: dict[int, int] = {}  # of storages alive
        self.met = 0
        self.outside: list[Tensor] = []  # held, so that no other storage takes their address

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        digested = says_where(func)
        named = tuple((name, self.told(value, digested)) for name, value in (kwargs or {}).items())
        self.lines.append((func, self.told(args, digested), named))
        out = func(*args, **(kwargs or {}))
        for t in tensors_in(out):
            self._enter(t)
        return out

    def told(self, value: Any, digested: bool = False) -> Hashable:
        """An argument, in words that can be compared."""
        if isinstance(value, Tensor):
            return self._tensor(value, digested)
        if isinstance(value, (list, tuple)):
            return tuple([self.told(entry, digested) for entry in value])
        return type(value), value

    def _tensor(self, t: Tensor, digested: bool) -> Hashable:
        held = _digest(t) if digested and not (t.is_floating_point() or t.is_complex()) else None
        return self._number(t), t.dtype, t.device, t.shape, t.stride(), t.storage_offset(), t.is_conj(), t.is_neg(), held

    def _number(self, t: Tensor) -> int:
        key = storage_of(t)
        if key is None:
            if t._is_zerotensor():
                return -1
            raise _UntoldError
        if key not in self.numbers:
            self._next(key)
            self.outside.append(t)
        return self.numbers[key]

    def _enter(self, t: Tensor) -> None:
        """A result: of a storage that is known, or of a new one."""
        key = storage_of(t)
        if key is not None and key not in self.numbers:
            self._next(key)
            weakref.finalize(t.untyped_storage(), self.numbers.pop, key, None).atexit = False

    def _next(self, key: int) -> None:
        self.met += 1
        self.numbers[key] = self.met


def storage_of(t: Tensor) -> int | None:
    """The address by which a storage is known; nothing for a tensor that has none."""
    if t.layout is not torch.strided or t._is_zerotensor():
        return None
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _digest(t: Tensor) -> Hashable:
    with torch._C.DisableTorchFunction():  # whoever watches for values that leave torch is not meant
        held = t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return t.shape, t.dtype, hashlib.blake2b(held.data).digest()
