"""What is checked around a function before its derivatives are believed.

* :func:`missing_rule` tells an op without a derivative rule in one mode (another mode may have it) from every other exception,
  which must pass untouched: an error of the user's own function, running out of memory.
* :class:`MissingDerivativeError` is what remains when no mode has the rule: it names the op, the modes and the line of the
  user's program.
* :class:`Replay` keeps random functions honest: every evaluation of f sees the same state of the generator, or randomness is
  refused; the caller's generator is left as it was found.

The check that f depends on its argument at all lives with the levels of differentiation, inside which alone it can be asked.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_hess.levels import flat_vmap

__all__ = [
    "MissingDerivativeError",
    "RandomnessError",
    "Replay",
    "missing_rule",
    "no_mode_left",
    "randomness_message",
]

_MISSING = tuple(
    re.compile(pattern)
    for pattern in (
        r"Trying to use forward AD with",
        r"ZeroTensors are immutable",
        r"derivative for '?[\w:]+'? is not implemented",
        r"derivative of '?[\w:]+'? is not implemented",
        r"does not support (automatic )?double backward|cannot be differentiated twice",
        r"Batching rule not implemented for",
        r"must override the setup_context staticmethod",
        r"generate_vmap_rule|does not (have|support) (a )?vmap|must override the vmap",
        r"only supports? once_differentiable|once_differentiable",
        r"don't yet support saved tensor hooks",
        r"does not implement (the )?jvp|Legacy autograd function|must implement (either )?the (jvp|forward)",
        r"checkpoint computes again with other parameters",
        r"You are attempting to call Tensor\.\w+\(\) .*functorch",
    )
)
_SOURCES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class MissingDerivativeError(NotImplementedError):
    """No mode of differentiation has a rule for an op of f."""


class RandomnessError(RuntimeError):
    """f draws random numbers, so that two evaluations are two functions."""


def missing_rule(error: BaseException) -> bool:
    """Whether ``error`` says that an op lacks a rule in this mode, so that another mode is worth trying."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return any(pattern.search(str(error)) for pattern in _MISSING)


def no_mode_left(verb: str, tried: Sequence[tuple[str, BaseException]]) -> MissingDerivativeError:
    """The error that tells what each mode lacked, and where in the user's program."""
    told = "; ".join(f"{mode}: {_first_sentence(error)}" for mode, error in tried)
    where = next((place for place in map(_place, (error for _, error in tried)) if place), None)
    called = f", called at {where}" if where else ""
    return MissingDerivativeError(
        f"{verb}: cannot differentiate f twice ({told}){called}. Write that op as a composition of differentiable ones, or pass "
        "mode='finite-difference'."
    )


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".")[:200]


def _place(error: BaseException) -> str | None:
    """The innermost line of a file that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith(_SOURCES)]
    return f"{Path(outside[-1].filename).name}:{outside[-1].lineno}" if outside else None


class Replay:
    """One state of the random generators for all evaluations of f in a call; a context manager.

    ``"error"`` refuses a function that draws, ``"same"`` gives every evaluation the same numbers, ``"different"`` lets it draw.
    Unless they are to differ, the generators are left as they were found, after an exception too. Nothing is set while f draws
    nothing, so that another thread's numbers are its own.
    """

    def __init__(self, randomness: str, x: Sequence[Tensor], verb: str) -> None:
        if randomness not in ("error", "same", "different"):
            raise ValueError(f"{verb}: randomness must be 'error', 'same' or 'different', got {randomness!r}.")
        self.randomness, self.verb = randomness, verb
        self._cuda = sorted({t.device.index or 0 for t in x if t.device.type == "cuda"})
        self._start = self._state()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.randomness == "same" or (kind is not None and self.randomness == "error"):
            self._restore()

    def _state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in self._cuda)]

    def _moved(self) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(self._start, self._state(), strict=True))

    def _restore(self) -> None:
        if self._moved():
            torch.set_rng_state(self._start[0])
            for i, state in zip(self._cuda, self._start[1:], strict=True):
                torch.cuda.set_rng_state(state, i)

    def rewind(self) -> None:
        """Back to the state at the start, before an evaluation that is to see the same numbers."""
        if self.randomness == "same":
            self._restore()

    def finish(self, f: Callable[..., Any], x: Sequence[Tensor]) -> None:
        """Refuse randomness if it is to be refused: called after f has been evaluated."""
        if self.randomness == "error" and self._moved():
            self._require_deterministic(f, x)

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


def randomness_message(verb: str) -> str:
    """What to do about a random f."""
    return (
        f"{verb}: f draws random numbers (dropout?), so each product would belong to another function. Pass "
        "randomness='same' to fix one draw for the whole call, or switch the module to eval mode."
    )
