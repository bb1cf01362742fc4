"""What is checked around a function before its derivatives are believed.

* :func:`missing_rule` tells an op without a derivative rule in one mode (another mode may have it) from every other exception,
  which must pass untouched: an error of the user's own function, running out of memory. :func:`value_and_gradient` goes around
  such an op by plain autograd.
* :class:`MissingDerivativeError` is what remains when no mode has the rule: it names the op, the modes and the line of the
  user's program.
* :class:`Replay` keeps random functions honest: every evaluation of f sees the same state of the generators, or randomness is
  refused; the caller's generators are left as they were found.
* :func:`warn_of_low_precision` says what float16, bfloat16 and autocast are worth in a second derivative.

The check that f depends on its argument at all lives with the levels of differentiation, inside which alone it can be asked.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_hess.levels import (
    Generators,
    flat_plain_value_and_grad,
    flat_value_and_grad,
    flat_vmap,
    generators_in_use,
    repaired,
)
from functional_hess.nesting import is_outermost
from functional_hess.repaired_refusals import MissingDerivativeError
from functional_hess.tree import Space

__all__ = [
    "LowPrecisionWarning",
    "MissingDerivativeError",
    "RandomnessError",
    "Replay",
    "called_by_package",
    "missing_rule",
    "named_errors",
    "no_mode_left",
    "outside_frame",
    "outside_place",
    "randomness_message",
    "value_and_gradient",
    "warn_of_low_precision",
]

Tensors = tuple[Tensor, ...]
Scalar = Callable[..., tuple[Tensor, Any]]

_NO_SETUP_CONTEXT = "must override the setup_context staticmethod"
_MISSING = tuple(
    re.compile(pattern)
    for pattern in (
        r"Trying to use forward AD with",
        r"ZeroTensors are immutable",
        r"derivative for '?[\w: ]+'? is not implemented",
        r"derivative of '?[\w:]+'? is not implemented",
        r"does not support (automatic )?double backward|cannot be differentiated twice",
        r"Batching rule not implemented for|does not yet have a batching rule|vmap: we do not yet support aten::",
        r"vmap over torch\.\w+ isn't supported|vmap: It looks like you're|vmap: inplace arithmetic\(self",
        r"Batch norm got a batched tensor as input",
        r"NYI: .* inside (of )?vmap|required rank \d tensor to use channels_last",
        r"Trying to set a forward gradient that has a different size|batching rule gave \d+ results",
        r"Could not run 'aten::\w+' with arguments from the 'Sparse",
        _NO_SETUP_CONTEXT,
        r"generate_vmap_rule|does not (have|support) (a )?vmap|must override the vmap",
        r"only supports? once_differentiable|once_differentiable",
        r"don't yet support saved tensor hooks",
        r"does not implement (the )?jvp|Legacy autograd function|must implement (either )?the (jvp|forward)",
        r"checkpoint computes again with other parameters",
        r"You are attempting to call Tensor\.\w+\(\) .*functorch",
    )
)
_CURES = {
    _NO_SETUP_CONTEXT: "move what its forward keeps for the backward into a setup_context staticmethod",
    "vmap: It looks like you're": "use torch.where in the place of a branch on a mapped number",
    "Batch norm got a batched tensor": "make the module with track_running_stats=False",
}
_PACKAGE = str(Path(__file__).parent)
_SOURCES = (str(Path(torch.__file__).parent), _PACKAGE, contextlib.__file__)


# ---------------------------------------------------------------------------------------------------- missing rules


def missing_rule(error: BaseException) -> bool:
    """Whether ``error`` says that an op lacks a rule in this mode, so that another mode is worth trying."""
    if out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return any(pattern.search(str(error)) for pattern in _MISSING)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: an error for the caller to see, wherever it is met and whatever else could be tried."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def no_mode_left(
    verb: str, tried: Sequence[tuple[str, BaseException]], *, task: str = "differentiate f twice"
) -> MissingDerivativeError:
    """The error that tells what each mode lacked, and where in the user's program."""
    told = "; ".join(f"{mode}: {_first_sentence(error)}" for mode, error in tried)
    where = next((place for place in map(_place, (error for _, error in tried)) if place), None)
    called = f", called at {where}" if where else ""
    cures = ["Write that op as a composition of differentiable ones"]
    cures += [cure for sign, cure in _CURES.items() if any(sign in str(error) for _, error in tried)]
    if task == "differentiate f twice":
        cures.append("pass mode='finite-difference'")
    elif task == "map f":
        cures.append("loop over the mapped dimension and torch.stack the results")
    cure = cures[0] + "".join(f", or {other}" for other in cures[1:])
    return MissingDerivativeError(f"{verb}: cannot {task} ({told}){called}. {cure}.")


def _first_sentence(error: BaseException) -> str:
    if isinstance(error, MissingDerivativeError) and error.__cause__ is not None:  # of a first derivative inside
        error = error.__cause__
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".")[:200]


def _place(error: BaseException) -> str | None:
    """The innermost line of a file that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(_SOURCES)]
    return f"{Path(outside[-1].filename).name}:{outside[-1].lineno}" if outside else None


def value_and_gradient(
    f: Scalar, x: Tensors, verb: str, wrt: Sequence[int] | None = None, *, strict: Space | None = None
) -> tuple[tuple[Tensor, Any], Tensors]:
    """``((value, aux), gradient)``; by plain autograd where no functorch level can enter f and none is active."""
    try:
        return flat_value_and_grad(f, x, wrt, verb=verb, strict=strict)
    except RuntimeError as error:
        if not (missing_rule(error) and is_outermost()):
            raise
    return flat_plain_value_and_grad(f, x, wrt, verb=verb, strict=strict)


# ---------------------------------------------------------------------------------------------------- randomness


class RandomnessError(RuntimeError):
    """f draws random numbers, so that two evaluations are two functions."""


class Replay:
    """One state of the random generators for all evaluations of f in a call; a context manager.

    ``"error"`` refuses a function that draws, ``"same"`` gives every evaluation the same numbers, ``"different"`` lets it draw.
    Unless they are to differ, the generators are left as they were found, after an exception too. Nothing is set while f draws
    nothing, so that another thread's numbers are its own.

    Seen are torch's generators of the CPU, of every CUDA device in use and of every other device of x, and each
    ``torch.Generator`` that an op of f is given. With ``"same"`` the global generators of ``random`` and ``numpy.random`` are
    rewound too; under ``"error"`` what they draw goes unnoticed, for asking costs more than many a product. A
    ``numpy.random.Generator`` of the function's own is seen by nobody.
    """

    def __init__(self, randomness: str, x: Sequence[Tensor], verb: str) -> None:
        if randomness not in ("error", "same", "different"):
            raise ValueError(f"{verb}: randomness must be 'error', 'same' or 'different', got {randomness!r}.")
        self.randomness, self.verb = randomness, verb
        self._sources = _sources({t.device.type for t in x}, everything=randomness == "same")
        self._start = [get() for get, _ in self._sources]
        self._met: Generators = generators_in_use()
        self._found = {generator: generator.get_state() for generator in self._met}  # by a call around this one
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Replay:
        self._stack.enter_context(repaired())
        self._met = generators_in_use()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        if self.randomness == "same" or (kind is not None and self.randomness == "error"):
            self._restore()
        self._stack.__exit__(kind, *details)

    def _moved(self) -> list[tuple[torch.Generator, Tensor]]:
        """The generators given to ops of f whose state is no longer what it was at first, and that state."""
        starts = {g: self._found.get(g, first) for g, first in self._met.items()}
        return [(g, start) for g, start in starts.items() if not torch.equal(g.get_state(), start)]

    def _restore(self) -> None:
        for (get, put), start in zip(self._sources, self._start, strict=True):
            if not _same_state(get(), start):
                put(start)
        for generator, start in self._moved():
            generator.set_state(start)

    def rewind(self) -> None:
        """Back to the state at the start, before an evaluation that is to see the same numbers."""
        if self.randomness == "same":
            self._restore()

    def each(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """``f``, every evaluation of which sees the same numbers, if it is to."""

        @functools.wraps(f)
        def replayed(*args: Any) -> Any:
            self.rewind()
            return f(*args)

        return replayed

    def finish(self, f: Callable[..., Any], x: Sequence[Tensor]) -> None:
        """Refuse randomness if it is to be refused: called after f has been evaluated."""
        if self.randomness != "error":
            return
        if not all(_same_state(get(), start) for (get, _), start in zip(self._sources, self._start, strict=True)):
            self._require_deterministic(f, x)
        elif moved := self._moved():
            self._require_seeded(f, x, dict(moved))

    def _require_deterministic(self, f: Callable[..., Any], x: Sequence[Tensor]) -> None:
        """Another thread may have drawn: ask f alone, under a vmap that refuses random ops."""

        def alone(one: Tensor) -> tuple[Tensor]:
            f(*x)
            return (one,)

        try:
            flat_vmap(alone)(torch.zeros(1))
        except RuntimeError as error:
            if "random" in str(error):
                raise RandomnessError(randomness_message(self.verb)) from error
            raise

    def _require_seeded(self, f: Callable[..., Any], x: Sequence[Tensor], first: dict[torch.Generator, Tensor]) -> None:
        """A generator that outlives the evaluation is the function's own affair only if each evaluation seeds it anew."""
        before = dict(self._met)
        self._met.clear()
        f(*x)
        again = dict(self._met)
        self._met.update(before)
        if any(g in again and not torch.equal(again[g], start) for g, start in first.items()):
            raise RandomnessError(
                f"{self.verb}: f draws from a torch.Generator that goes on from evaluation to evaluation, so each product would "
                "belong to another function. Pass randomness='same' to fix one draw for the whole call, or seed it inside f."
            )


def _sources(kinds: set[str], everything: bool) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How to get and to set the state of every generator that f might draw from."""
    sources: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [(torch.get_rng_state, torch.set_rng_state)]
    for kind in sorted(kinds | ({"cuda"} if torch.cuda.is_available() and torch.cuda.is_initialized() else set())):
        module: Any = None if kind in ("cpu", "meta") else torch.get_device_module(kind)
        for index in range(module.device_count() if hasattr(module, "get_rng_state") else 0):
            sources.append((functools.partial(module.get_rng_state, index), functools.partial(_put, module, index)))
    if everything:
        sources.append((random.getstate, random.setstate))
        sources.append((np.random.get_state, np.random.set_state))
    return sources


def _put(module: Any, index: int, state: Tensor) -> None:
    module.set_rng_state(state, index)


def _same_state(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(map(_same_state, a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def randomness_message(verb: str) -> str:
    """What to do about a random f."""
    return (
        f"{verb}: f draws random numbers (dropout?), so each product would belong to another function. Pass "
        "randomness='same' to fix one draw for the whole call, or switch the module to eval mode."
    )


@contextlib.contextmanager
def named_errors(verb: str, mode: str) -> Iterator[None]:
    """What lacks a rule for a first derivative or a batch, and a random op in a vmap, are errors that name verb and cure.

    Inside other transforms torch's own words pass, for the outermost call to know them by.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, (MissingDerivativeError, RandomnessError)) or not is_outermost():
            raise
        if "vmap: called random operation" in str(error):
            raise RandomnessError(randomness_message(verb)) from error
        if missing_rule(error):
            raise no_mode_left(verb, [(mode, error)], task="map f" if mode == "batched" else "differentiate f once") from error
        raise


# ---------------------------------------------------------------------------------------------------- precision


class LowPrecisionWarning(UserWarning):
    """A second derivative is asked for in float16 or bfloat16, or under autocast."""


def warn_of_low_precision(verb: str, space: Space) -> None:
    """Say once for each line that calls what accuracy to expect of half precision."""
    if not is_outermost():
        return
    low = next((leaf for leaf, dtype in enumerate(space.dtypes) if dtype in (torch.float16, torch.bfloat16)), None)
    if low is not None:
        told, dtype = f"{space.name_of(low, 'x')} is {_short(space.dtypes[low])}", space.dtypes[low]
        cure = "Pass float32 parameters"
    else:
        kind = next((d.type for d in space.devices if torch.is_autocast_enabled(d.type)), None)
        if kind is None:
            return
        dtype = torch.get_autocast_dtype(kind)
        told, cure = f"autocast to {_short(dtype)} is on", f"Leave it, as in torch.autocast({kind!r}, enabled=False)"
    eps = torch.finfo(dtype).eps
    overflow = "; results beyond 65504 overflow" if dtype == torch.float16 else ""
    message = f"{verb}: {told}: expect errors of {eps:.0e} of the result, more where terms cancel{overflow}. {cure} for more."
    warnings.warn(message, LowPrecisionWarning, stacklevel=outside_frame())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def outside_frame() -> int:
    """The stacklevel, for ``warnings.warn`` in the caller, of the innermost frame that is neither torch's nor ours."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SOURCES):
        level, frame = level + 1, frame.f_back
    return level


def outside_place() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SOURCES):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def called_by_package() -> bool:
    """Whether the caller of the caller, torch's own frames left out, is code of this package."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_SOURCES[0], contextlib.__file__)):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(_PACKAGE)
