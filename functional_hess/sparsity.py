"""Where a Hessian or a Jacobian may differ from zero, found by running its product once.

The pullback of a gradient, u -> H u, and that of a function, u -> J^T u, are linear in u. So which entries of the matrix may
differ from zero is a matter of connections alone: entry (i, j) may, if u_i reaches element j of the result through some chain of
ops. The product is run once, at one point, under a dispatch mode that attaches to every element of memory the set of all i that
reach it (:mod:`functional_hess.connections`). What the point's own values were does not enter: a product with zero counts. Nor do
floating numbers from outside; integers and booleans from outside, which say where, do.

* Sets belong to the elements of storages, so that views share them and writes through a view are seen by all.
* The program that is watched is the one that differentiation runs, so custom rules (a straight-through estimator) count as they
  are, and so does what a repair swaps in.
* An op without a rule connects everything with everything. A program that asks for a value (``if x.sum() > 0``, a boolean mask of
  x, numpy inside) might be another at another point: it is not judged, and its matrix is taken to be full.

Reverse mode over reverse mode is watched, never forward mode, which under a dispatch mode can end the process in torch.

Source:
    The idea of pushing index sets through a program: Griewank and Walther (2008), Evaluating derivatives, section 7.1.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from functional_hess.connections import Call, base_name, connected, tensors_in, widened
from functional_hess.guards import MissingDerivativeError
from functional_hess.index_sets import IndexSets, TooManyError
from functional_hess.levels import flat_vjp
from functional_hess.patterns import SparsityPattern
from functional_hess.products import DOUBLE_BACKWARD, REVERSE_OVER_REVERSE, first_mode_that_works, product_at
from functional_hess.transcripts import Transcript, storage_of, transcript

__all__ = ["Captured", "Detection", "Linear", "SparsityError", "detect_hessian", "detect_jacobian", "detect_reached"]

Tensors = tuple[Tensor, ...]
Linear = Callable[[Tensors], tuple[Tensors, Callable[[Tensors], Tensors]]]
PROOF = 12  # bytes that the watched product takes at its peak for one of the intermediate results of f
LARGEST_FULL = 2**25  # entries of a matrix that is taken to be full
PROGRAMS, REMEMBERED = 16, 2**20  # programs that are remembered, nonzeros of their patterns together


class SparsityError(ValueError):
    """A sparsity pattern cannot be found, or does not hold."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """A tensor that f uses without having been given it, and its version then."""

    tensor: Tensor
    version: int

    @staticmethod
    def of(tensor: Tensor) -> Captured:
        return Captured(tensor, _version(tensor))

    @property
    def changed(self) -> bool:
        """Whether it has been written to since."""
        return _version(self.tensor) != self.version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclasses.dataclass(frozen=True)
class Detection:
    """A pattern, and what is to be known of how it was found.

    ``full_because`` says why the matrix was taken to be full, if it was; ``widened`` names ops that were taken to connect
    everything with everything; ``captured`` are tensors from outside, and ``rests_on_args`` tells of further arguments of f, on
    whose values the pattern may rest.
    """

    pattern: SparsityPattern
    full_because: str | None = None
    widened: tuple[str, ...] = ()
    captured: tuple[Captured, ...] = dataclasses.field(default=(), repr=False)
    rests_on_args: bool = False


# ---------------------------------------------------------------------------------------------------- the two questions


def detect_hessian(
    verb: str, f: Callable[..., Any], scalar: Callable[..., tuple[Tensor, Any]], x: Tensors, args: Tensors
) -> Detection:
    """The pattern of the Hessian of ``scalar(*x) -> (value, aux)``; ``args`` are the tensors among f's further arguments.

    Raises:
        SparsityError: the program cannot be judged, and the Hessian is too large to be taken to be full.
    """
    leaves = tuple(range(len(x)))

    def product(point: Tensors, mode: str) -> tuple[Tensors, Callable[[Tensors], Tensors]]:
        linear = product_at(scalar, point, mode, leaves, leaves, verb=verb)
        return point, lambda u: linear(dict(enumerate(u)))

    def attempt(mode: str) -> Detection:
        return _watched(lambda point: product(point, mode), x, args)

    try:
        found = first_mode_that_works(verb, f, x, "auto", (REVERSE_OVER_REVERSE, DOUBLE_BACKWARD), attempt)
    except MissingDerivativeError as error:
        found = _not_judged(f"no reverse mode has a rule for it: {error}")
    found = _full_if_not_judged(verb, found, (_size(x), _size(x)))
    return dataclasses.replace(found, pattern=found.pattern & found.pattern.transpose)


def detect_jacobian(verb: str, f: Callable[..., Tensors], x: Tensors, args: Tensors) -> Detection:
    """The pattern of the Jacobian of ``f(*x) -> outputs``, an (m, n) matrix.

    Raises:
        SparsityError: the program cannot be judged, and the Jacobian is too large to be taken to be full.
    """
    sizes: list[int] = []

    def pullback(point: Tensors) -> tuple[Tensors, Callable[[Tensors], Tensors]]:
        outputs, pull, _ = flat_vjp(lambda *p: (f(*p), ()), point)
        sizes.append(_size(outputs))
        return outputs, pull

    found = _full_if_not_judged(verb, _watched(pullback, x, args), (_size(x), sizes[-1] if sizes else _size(f(*x))))
    return dataclasses.replace(found, pattern=found.pattern.transpose)


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _not_judged(why: str) -> Detection:
    return Detection(SparsityPattern.full(0, 0), full_because=why)


def _full_if_not_judged(verb: str, found: Detection, shape: tuple[int, int]) -> Detection:
    if found.full_because is None:
        return found
    if shape[0] * shape[1] > LARGEST_FULL:
        raise SparsityError(
            f"{verb}: the pattern could not be found ({found.full_because}), and {shape[0]:,} x {shape[1]:,} entries are too "
            "many to compute all. Pass pattern=: a scipy matrix, 'tridiagonal', banded(r), blocks(sizes) or a SparsityPattern."
        )
    return dataclasses.replace(found, pattern=SparsityPattern.full(*shape))


def detect_reached(
    product: Callable[[Tensors], Tensors],
    like: Tensors,
    labels: Callable[[Tensors], Tensors] | None = None,
    worth: Callable[[], bool] = lambda: True,
) -> Detection | None:
    """Which labels of a vector reach which elements of the result of a linear map, as it is at one point.

    Args:
        product: the map, made at a point beforehand: what its making asked of the point is no matter here.
        like: tensors like the vector.
        labels: gives each element of the vector, by tensors like it, a number from 0 up; by default one of its own.
        worth: asked before a program is judged for the first time.

    Returns:
        a pattern with a row for each element of the result and a column for each label; ``full_because`` is set, and the pattern
        means nothing, where the map cannot be judged. ``None`` if it was not worth it.

    A program that has been judged before is recognized by its :func:`~functional_hess.transcripts.transcript`, which takes little
    longer than running it.
    """
    number = labels or _each_its_own
    told = _told(product, like, number)
    found = _judged.find(told)
    if found is None and worth():
        found = _watched(lambda _: (like, product), (), (), number)
        _judged.keep(told, found)
    return found


def _told(product: Callable[[Tensors], Tensors], like: Tensors, labels: Callable[[Tensors], Tensors]) -> Transcript | None:
    """The program that judging would watch; nothing where it would be refused, or cannot be told from another."""
    vector = _ones(like)
    try:
        with _Leaks(lambda t: True):
            return transcript(product, vector, labels(vector))
    except _NotJudgedError:
        return None


class _Judged:
    """Patterns of programs, by transcript: the latest few."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: dict[Transcript, Detection] = {}

    def find(self, told: Transcript | None) -> Detection | None:
        with self.lock:
            found = self.found.pop(told, None) if told is not None else None
            if told is not None and found is not None:
                self.found[told] = found  # the latest stands last
            return found

    def keep(self, told: Transcript | None, found: Detection) -> None:
        if told is None or found.full_because is not None or found.pattern.nonzeros > REMEMBERED:
            return
        with self.lock:
            self.found[told] = dataclasses.replace(found, captured=())  # no tensor is kept alive
            while len(self.found) > PROGRAMS or sum(d.pattern.nonzeros for d in self.found.values()) > REMEMBERED:
                del self.found[next(iter(self.found))]


_judged = _Judged()


def _each_its_own(vector: Tensors) -> Tensors:
    sizes = [t.numel() for t in vector]
    parts = torch.arange(sum(sizes)).split(sizes)
    return tuple(part.reshape(t.shape) for part, t in zip(parts, vector, strict=True))


def _ones(like: Tensors) -> Tensors:
    return tuple(torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in like)


def _watched(linear: Linear, x: Tensors, args: Tensors, labels: Callable[[Tensors], Tensors] = _each_its_own) -> Detection:
    """Rows are elements of the result, columns those of the vector: what ``linear(x)`` maps, called once on a vector."""
    point = tuple(t.detach().clone() for t in x)  # of storages of their own
    tracker = _Tracker()
    tracker.give(point, _VARIES)
    tracker.give(args, _FROM_ARGS)
    try:
        with _Leaks(tracker.depends), tracker:
            like, product = linear(point)
            vector = _ones(like)
            tracker.seed(vector, labels(vector))
            result = product(vector)
        sets = torch.cat([tracker.sets_in(t).reshape(-1) for t in result])
        pattern = tracker.sets.pattern(sets.numpy())
    except _NotJudgedError as error:
        return _not_judged(str(error))
    except TooManyError:
        return _not_judged("its entries are too many, or the sets on the way to them are")
    return Detection(pattern, None, tuple(tracker.widened), tuple(tracker.captured.values()), tracker.rests_on_args)


# ---------------------------------------------------------------------------------------------------- the watch


class _NotJudgedError(Exception):
    """The program asks for a value, so that it may be another at another point."""


_VARIES, _FROM_ARGS = 1, 2  # marks of storages: their values depend on x, on further arguments
_ABOUT_SHAPE = {"t", "transpose", "squeeze", "unsqueeze", "as_strided", "swapaxes", "swapdims", "detach", "resize", "resize_as"}


class _Memory:
    """The sets of the elements of one storage, each ``itemsize`` bytes wide."""

    def __init__(self, sets: IndexSets, nbytes: int, itemsize: int) -> None:
        self.sets, self.itemsize = sets, itemsize
        self.elements = torch.zeros(nbytes // itemsize, dtype=torch.int64)

    def of(self, t: Tensor) -> Tensor:
        """The part that ``t`` sees, in its shape."""
        self._widened_to(t)
        return self.elements.as_strided(t.shape, t.stride(), t.storage_offset())

    def write(self, t: Tensor, sets: Tensor) -> None:
        part = self.of(t)
        if torch._debug_has_internal_overlap(part) == 0:  # pyright: ignore[reportPrivateImportUsage]
            part.copy_(sets)
            return
        where = torch.arange(len(self.elements)).as_strided(t.shape, t.stride(), t.storage_offset()).reshape(-1)
        joined = self.sets.union_by(where.numpy(), sets.reshape(-1).numpy(), len(self.elements))
        self.elements[where] = torch.from_numpy(joined)[where]

    def _widened_to(self, t: Tensor) -> None:
        """Elements as wide as those of ``t``, and as many as its storage has by now."""
        wide, now = self.itemsize, t.element_size()
        if wide > now:
            self.elements = self.elements.repeat_interleave(wide // now)
        elif wide < now:
            whole = torch.nn.functional.pad(self.elements, [0, -len(self.elements) % (now // wide)])
            self.elements = torch.from_numpy(self.sets.union_last(whole.reshape(-1, now // wide).numpy()))
        self.itemsize = now
        missing = t.untyped_storage().nbytes() // now - len(self.elements)
        if missing > 0:
            self.elements = torch.nn.functional.pad(self.elements, [0, missing])


class _Tracker(TorchDispatchMode):
    """Attaches to every element of memory the set of elements of the vector that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.sets = IndexSets(0)
        self.memory: dict[int, _Memory] = {}  # by storage, where anything reaches it
        self.marks: dict[int, int] = {}  # by storage: what its values depend on; every storage that is known
        self.captured: dict[int, Captured] = {}
        self.widened: dict[str, None] = {}
        self.rests_on_args = False

    def give(self, tensors: Tensors, mark: int) -> None:
        for t in tensors:
            key = storage_of(t)
            if key is not None:
                self.marks[key] = self.marks.get(key, 0) | mark

    def seed(self, vector: Tensors, labels: Tensors) -> None:
        """An element of the vector is reached by its label alone."""
        self.sets = IndexSets(max((int(t.max()) + 1 for t in labels if t.numel()), default=0))
        for t, numbers in zip(vector, labels, strict=True):
            self._assign(t, numbers + 1)

    def sets_in(self, t: Tensor) -> Tensor:
        key = storage_of(t)
        return self.memory[key].of(t) if key in self.memory and t.numel() else torch.zeros(t.shape, dtype=torch.int64)

    def depends(self, t: Tensor) -> bool:
        """Whether a value depends on the point or on the vector."""
        key = storage_of(t)
        return key is None or bool(self.marks.get(key, 0) & _VARIES) or bool(self.sets_in(t).any())

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        schema = _schema_of(func)
        arguments = {**schema.defaults, **dict(zip(schema.names, args, strict=False)), **(kwargs or {})}
        inputs = {id(t): t for t in tensors_in(list(arguments.values()))}
        places = {i: storage_of(t) for i, t in inputs.items()}
        for i, t in inputs.items():
            self._meet(t, places[i])
        reached = {i: self.memory[key].of(inputs[i]) for i, key in places.items() if key in self.memory and inputs[i].numel()}
        known = {i: sets for i, sets in reached.items() if sets.any()}
        marks = {i: self.marks.get(key or 0, 0) for i, key in places.items()}
        if schema.answers:
            self._require_no_question(func, arguments, known, marks)
        out = func(*args, **(kwargs or {}))
        results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        written = [t for name in schema.written for t in tensors_in(arguments[name])]
        before = {*places.values()}
        fresh = [t for t in tensors_in(results) if storage_of(t) not in before]
        for t in fresh:
            self._own(t)
        if not schema.about_shape and (written or fresh):
            varying = frozenset(i for i, mark in marks.items() if mark & _VARIES)
            self._connect(Call(self.sets, func, arguments, results, known, varying), written, fresh)
        self._mark([*fresh, *written], marks, inputs.values())
        return out

    def _connect(self, call: Call, written: Sequence[Tensor], fresh: Sequence[Tensor]) -> None:
        if not call.known:
            for t in [*written, *fresh] if self.memory else ():
                self._assign(t, None)
            return
        connections, has_rule = connected(call)
        if not has_rule:
            self.widened[str(call.func)] = None
        places = {id(t) for t in [*written, *fresh]}
        answered = set()
        for t, sets in zip(call.results, connections, strict=True):
            for one in tensors_in(t):
                if id(one) in places:
                    self._assign(one, sets)
                    answered.add(id(one))
        self._assign_everything(call, [t for t in [*written, *fresh] if id(t) not in answered])

    def _assign_everything(self, call: Call, tensors: Sequence[Tensor]) -> None:
        """Written to without being a result (statistics, lists of tensors): all that reaches the op."""
        if tensors:
            whole = dataclasses.replace(call, results=tuple(tensors), func=None)
            for t, sets in zip(tensors, widened(whole), strict=True):
                self._assign(t, sets)

    def _assign(self, t: Tensor, sets: Tensor | None) -> None:
        key = storage_of(t)
        if key is None and sets is not None and bool(sets.any()) and not t._is_zerotensor():
            raise _NotJudgedError(f"a tensor of layout {t.layout} depends on the vector")
        if key is None or not t.numel():
            return
        if key not in self.memory:
            if sets is None or not sets.any():
                return
            self.memory[key] = _Memory(self.sets, t.untyped_storage().nbytes(), t.element_size())
        self.memory[key].write(t, torch.zeros(t.shape, dtype=torch.int64) if sets is None else sets)

    def _mark(self, tensors: Sequence[Tensor], marks: dict[int, int], inputs: Iterable[Tensor]) -> None:
        mark = 0
        for one in marks.values():
            mark |= one
        for t in tensors:
            key = storage_of(t)
            if key is not None:
                self.marks[key] = self.marks.get(key, 0) | mark
            elif mark & _VARIES and not t._is_zerotensor():
                raise _NotJudgedError(f"a tensor of layout {t.layout} depends on x")
            if mark == _FROM_ARGS and not t.is_floating_point() and any(i.is_floating_point() for i in inputs):
                self.rests_on_args = True

    def _require_no_question(self, func: Any, arguments: dict[str, Any], known: dict[int, Any], marks: dict[int, int]) -> None:
        for t in _deciding(base_name(func), arguments):
            if id(t) in known or marks[id(t)] & _VARIES:
                raise _NotJudgedError(f"f asks for a value that depends on x, by {func}")
            self.rests_on_args = self.rests_on_args or bool(marks[id(t)])

    def _meet(self, t: Tensor, key: int | None) -> None:
        if key is not None and key not in self.marks:
            self.marks[key] = 0
            self.captured[key] = Captured.of(t)

    def _own(self, t: Tensor) -> None:
        key = storage_of(t)
        if key is not None and key not in self.marks:
            self.marks[key] = 0
            weakref.finalize(t.untyped_storage(), self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.marks.pop(key, None)
        self.memory.pop(key, None)


_ANSWERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclasses.dataclass(frozen=True)
class _Schema:
    """What is to be known of an op before it is called: ``answers`` tells of a result that depends on values beyond numbers."""

    names: tuple[str, ...]
    defaults: dict[str, Any]
    written: tuple[str, ...]
    answers: bool
    about_shape: bool


@functools.cache
def _schema_of(func: Any) -> _Schema:
    arguments = func._schema.arguments
    return _Schema(
        tuple(a.name for a in arguments),
        {a.name: a.default_value for a in arguments if a.has_default_value()},
        tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write),
        bool(_ANSWERS & set(func.tags)),
        base_name(func) in _ABOUT_SHAPE,
    )


def _deciding(name: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The arguments whose values decide the answer, or the shape of the result, of an op that gives such."""
    if name == "index":
        return [t for t in tensors_in(arguments["indices"]) if t.dtype in (torch.bool, torch.uint8)]
    return [arguments["mask"]] if name == "masked_select" else list(tensors_in(list(arguments.values())))


class _Leaks(TorchFunctionMode):
    """Notices values that leave torch, where no op tells of it."""

    def __init__(self, matters: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.matters = matters

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _LEAKS and self.matters(args[0]):
            raise _NotJudgedError(f"f asks for a value that depends on x, by {getattr(func, '__name__', func)}")
        return func(*args, **(kwargs or {}))


_LEAKS = {
    *(torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.data_ptr, torch.Tensor.__dlpack__),
    torch.to_dlpack,
}
