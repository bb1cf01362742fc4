"""Rows of a Hessian: which, against which columns, how many at once, in which mode.

A row of H is a Hessian-vector product with a unit vector. This floor turns wanted rows into chunks of rows: it looks at f once
(:class:`Problem`), groups the leaves that share one kept graph and chooses the chunk that fits the memory (:class:`Plan`), and
evaluates the plan chunk by chunk, each a ``vmap`` of products (:func:`evaluate`). What becomes of the rows (blocks, a diagonal,
a stream) is for the floor above.

Unit vectors live on the leaves they touch; no n x n identity is ever made.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import (
    FEWEST_FOR_SPEED,
    MEASURED_ROWS,
    Estimate,
    Survey,
    chunk_for,
    closed_bound,
    measured,
    progress_bar,
    survey,
)
from functional_hess.extrapolation import ByDifferences, Estimated, warn_of_doubt
from functional_hess.guards import (
    MissingDerivativeError,
    Replay,
    out_of_memory,
    value_and_gradient,
    warn_of_low_precision,
)
from functional_hess.nesting import is_outermost, is_traced
from functional_hess.products import (
    FINITE_DIFFERENCE,
    FORWARD_OVER_REVERSE,
    MANY_PRODUCTS,
    MODES,
    REVERSE_OVER_REVERSE,
    first_mode_that_works,
    no_such_mode,
    product_at,
    rows_of,
)
from functional_hess.resuming import InPlace, Record, said_of_call
from functional_hess.transforms import Bound, bind, repaired
from functional_hess.tree import Piece, Space, tensors_of
from functional_hess.verification import Check, begin, unchecked

__all__ = [
    "BY_COLUMNS",
    "Chunk",
    "Group",
    "Options",
    "Plan",
    "Problem",
    "chunks_of",
    "evaluate",
    "look",
    "plan_rows",
    "product_along",
    "recorded",
    "refined",
    "rows_only",
    "try_one_row",
]

Tensors = tuple[Tensor, ...]
Scalar = Callable[..., tuple[Tensor, Any]]
Wanted = Sequence[tuple[Piece, tuple[int, ...]]]
BY_COLUMNS = (FORWARD_OVER_REVERSE, FINITE_DIFFERENCE)  # these differentiate the gradient along v; the others pull v back
_estimates: weakref.WeakKeyDictionary[Any, dict[Any, Estimate]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Options:
    """What the calls of the dense family share; each is documented in ``hessian``."""

    has_aux: bool = False
    mode: str = "auto"
    chunk_size: int | str | None = "auto"
    memory_limit: int | float | str | None = None
    randomness: str = "error"
    strict: bool = False
    progress: bool = False
    symmetric: bool = True
    resume: str | os.PathLike[str] | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function at a point, evaluated once: ``scalar(*tensors)`` is ``(value, aux)``, ``seen`` what the evaluation showed."""

    f: Callable[..., Any]
    bound: Bound
    scalar: Scalar
    seen: Survey
    options: Options
    check: Check | None = None

    @property
    def space(self) -> Space:
        return self.bound.space

    @property
    def verb(self) -> str:
        return self.bound.verb

    @property
    def is_scalar(self) -> bool:
        """Whether f returns a scalar tensor."""
        return isinstance(self.seen.value, Tensor) and self.seen.value.dim() == 0

    def replay(self) -> Replay:
        return Replay(self.options.randomness, self.bound.x, self.verb)


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves whose rows are computed from one kept graph, and the leaves they are differentiated with respect to."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows of H: ``values[j]`` has shape (k, *shape of leaf columns[j]); row i belongs to the i-th coordinate of ``pieces``.

    ``by_columns`` tells that the values are columns of the derivative of the gradient (forward mode), not rows of it; the two
    differ only where H is not symmetric.
    """

    pieces: tuple[Piece, ...]
    columns: tuple[int, ...]
    values: Tensors
    by_columns: bool

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call is going to do: which rows against which columns, how many at once, in how much memory (bytes).

    ``columns`` has the leaves that are wanted for each leaf with rows; the groups may compute more beside them. Rows that are
    finished according to ``record`` are in no group.
    """

    problem: Problem
    columns: Mapping[int, tuple[int, ...]]
    groups: tuple[Group, ...]
    chunk: int
    estimate: Estimate
    output: int
    held: int
    route: str = "dense rows"
    record: Record | None = None

    @property
    def rows(self) -> int:
        return sum(map(len, self.groups))

    @property
    def chunks(self) -> int:
        return sum(-(-len(group) // self.chunk) for group in self.groups)


# ---------------------------------------------------------------------------------------------------- the plan


def look(
    verb: str, f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], argnums: Any, options: Options
) -> Problem:
    """Evaluate f once, watched: its value, which leaf it uses first, how much its graph will weigh."""
    if options.mode not in ("auto", "fastest", *MODES):
        raise no_such_mode(verb, options.mode)
    bound = bind(verb, f, args, kwargs, argnums)
    warn_of_low_precision(verb, bound.space)
    scalar = bound.scalar(options.has_aux)
    check = begin(bound, options.has_aux, options.randomness)
    with Replay(options.randomness, bound.x, verb) as replay, unchecked():
        seen = survey(lambda *x: bound.split(x, options.has_aux), bound.x)
        replay.finish(bound.call, bound.x)
        if options.strict:
            replay.rewind()
            value_and_gradient(scalar, bound.x, verb, strict=bound.space)
    return Problem(f, bound, scalar, seen, options, check)


def rows_only(problem: Problem, args: Sequence[Any], *, of_any_numbers: bool = False) -> str:
    """Why rows must be computed as they are, whatever the structure of f(*args); ``""`` if they need not.

    ``of_any_numbers`` says that the structure does not depend on numbers, so that a trace may rely on it.
    """
    options, x = problem.options, problem.bound.x
    if options.resume is not None:
        return "resume= keeps rows"
    if options != Options(has_aux=options.has_aux, strict=options.strict, progress=options.progress):
        return "an option says how rows are computed"
    if not is_outermost():
        return "a transform is outside"
    if is_traced() and not of_any_numbers:
        return "the call is being traced, for other numbers too"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(tuple(args))[0]):
        return "an argument requires grad"
    if len({(t.dtype, t.device) for t in x}) != 1 or torch.finfo(x[0].dtype).bits < 32:
        return "the leaves differ in dtype or device, or are of low precision"
    return ""


def recorded(
    problem: Problem, args: Sequence[Any], kwargs: Mapping[str, Any], argnums: Any, in_place: InPlace | None = None
) -> Record | None:
    """The record that ``resume`` names, with the rows that are finished.

    Args:
        problem: the function at a point; ``args``, ``kwargs`` and ``argnums`` are those of the call.
        in_place: see :class:`functional_hess.resuming.Record`.
    """
    options = problem.options
    if options.resume is None:
        return None
    if not isinstance(options.resume, (str, os.PathLike)):
        raise TypeError(f"{problem.verb}: resume must be the path of a file, got {type(options.resume).__name__}.")
    if not is_outermost() or is_traced():
        raise ValueError(
            f"{problem.verb}: resume= belongs to the outermost call, not inside another transform or a trace. Leave it out here."
        )
    said = {
        "argnums": str(argnums),
        "mode": options.mode,
        "randomness": options.randomness,
        "symmetric": options.symmetric,
        "order": ", ".join(problem.space.paths[leaf] for leaf in problem.seen.order),
    }
    product = functools.partial(product_along, problem)
    return Record(options.resume, said_of_call(problem.bound, args, kwargs, said), problem.space, product, in_place)


def plan_rows(problem: Problem, wanted: Wanted, output: int, *, copies: int = 1, held: int = 0) -> Plan:
    """Group the wanted rows, in order, and choose the chunk.

    Args:
        problem: what :func:`look` saw.
        wanted: coordinates of one leaf each, with the leaves they are to be differentiated against.
        output: bytes that the call allocates for its result.
        copies: how many functions share a row (the outputs of a vector-valued f).
        held: bytes of a row that are held beside it, by the verb or by whoever takes the rows from it.

    Raises:
        MemoryLimitError: see :func:`functional_hess.chunking.chunk_for`.
    """
    options, seen, x = problem.options, problem.seen, problem.bound.x
    total = sum(len(piece) for piece, _ in wanted)
    columns = {piece.leaf: leaves for piece, leaves in wanted}
    if not is_outermost():
        chunk = options.chunk_size if isinstance(options.chunk_size, int) else max(total, 1)
        left = Estimate(0, 0, "left to the outermost call")
        return Plan(problem, columns, _grouped(wanted, chunk), chunk, left, output, held)
    bound = closed_bound(sum(t.numel() * t.element_size() for t in x), seen.saved, seen.held)
    bound = dataclasses.replace(bound, per_row=bound.per_row * copies + held)
    groups = _grouped(wanted, FEWEST_FOR_SPEED)
    chunk, estimate = chunk_for(
        problem.verb,
        rows=total,
        output=output,
        mean_result=copies * seen.saved / seen.calls,
        bound=bound,
        refine=(lambda spare: refined(problem, groups, bound, held, spare)) if copies == 1 and total else None,
        device=problem.space.device,
        memory_limit=options.memory_limit,
        chunk_size=options.chunk_size,
    )
    return Plan(problem, columns, _grouped(wanted, chunk), chunk, estimate, output, held)


def _grouped(wanted: Wanted, chunk: int) -> tuple[Group, ...]:
    """Neighbours share a group while what joins is smaller than a chunk, up to four chunks: few calls for many small leaves."""
    groups: list[list[tuple[Piece, tuple[int, ...]]]] = []
    for piece, columns in wanted:
        if groups and len(piece) < chunk and sum(len(p) for p, _ in groups[-1][1:]) + len(piece) <= 4 * chunk:
            groups[-1].append((piece, columns))
        elif len(piece):
            groups.append([(piece, columns)])
    return tuple(
        Group(
            rows=tuple(dict.fromkeys(piece.leaf for piece, _ in group)),
            columns=tuple(sorted({leaf for _, columns in group for leaf in columns})),
            pieces=tuple(piece for piece, _ in group if len(piece)),
        )
        for group in groups
    )


def refined(
    problem: Problem, groups: Sequence[Group], bound: Estimate, held: int, spare: float, chunk: int | None = None
) -> Estimate:
    """What the group that needs most was measured to need; the bound where nothing can be measured.

    Measuring allocates no more than ``spare`` bytes, unless f does not take fake tensors: then as much as two rows at a time.
    What rows need depends on how many they are and on the leaves that they touch: here those of the first ``chunk`` rows, or of
    all rows.
    """
    if problem.seen.forward or problem.options.mode not in ("auto", REVERSE_OVER_REVERSE, "fastest"):
        return bound  # forward mode cannot be run under a counter
    try:
        first, *others = [_measured(problem, group, bound, held, spare, chunk) for group in _largest(groups)]
    except Exception as error:  # f leaves torch, or another mode will have to do; the bound is all there is
        if out_of_memory(error):
            raise
        return bound
    return first.or_else(others)


def _largest(groups: Sequence[Group]) -> list[Group]:
    """Those that may need most: the first, which is differentiated against most leaves, and any with more rows than before."""
    chosen: list[Group] = []
    for group in groups:
        if not chosen or len(group) > len(chosen[-1]):
            chosen.append(group)
    return chosen


def _measured(problem: Problem, group: Group, bound: Estimate, held: int, spare: float, chunk: int | None) -> Estimate:
    """Reverse-over-reverse rows of a group, run: on fake tensors if that is no trifle or f takes them, else on x."""

    def run(x: Sequence[Tensor], k: int) -> Tensors:
        product = product_at(problem.scalar, tuple(x), REVERSE_OVER_REVERSE, group.rows, group.columns, verb=problem.verb)
        return rows_of(product, REVERSE_OVER_REVERSE, {leaf: x[leaf].new_zeros(k, *x[leaf].shape) for leaf in touched})

    touched = tuple(dict.fromkeys(piece.leaf for piece in next(chunks_of(group.pieces, chunk or len(group)))))
    known, key = _estimates_of(problem.f), (group.rows, group.columns, len(group), touched, problem.seen.saved, _shapes(problem))
    if key not in known:
        trifle = bound.working(MEASURED_ROWS[-1]) <= spare
        x = tuple(t.detach() for t in problem.bound.x)
        with problem.replay(), torch.no_grad():
            try:
                known[key] = measured(run, x, len(group), fake=not trifle)
            except Exception as error:
                if trifle or out_of_memory(error):
                    raise
                known[key] = measured(run, x, len(group), fake=False, at=(1, 2))
    return known[key].holding(held)


def _shapes(problem: Problem) -> tuple[Any, ...]:
    return tuple((t.shape, t.dtype, t.device) for t in tensors_of((problem.bound.x, problem.space.carried))[0])


def _estimates_of(f: Callable[..., Any]) -> dict[Any, Estimate]:
    try:
        return _estimates.setdefault(f, {})
    except TypeError:  # a callable without weak references
        return {}


# ---------------------------------------------------------------------------------------------------- the rows


def chunks_of(pieces: Sequence[Piece], k: int) -> Iterator[tuple[Piece, ...]]:
    """Pieces cut and joined to k coordinates at a time."""
    chunk: list[Piece] = []
    room = k
    for piece in pieces:
        start = 0
        while start < len(piece):
            part = piece.indices[start : start + room]
            chunk.append(Piece(piece.leaf, part))
            start, room = start + len(part), room - len(part)
            if room == 0:
                yield tuple(chunk)
                chunk, room = [], k
    if chunk:
        yield tuple(chunk)


def evaluate(plan: Plan) -> Iterator[Chunk]:
    """All rows of a plan, chunk by chunk. Between two chunks, when other code runs, no mode is active."""
    problem, replay = plan.problem, plan.problem.replay()
    with progress_bar(problem.verb, plan.rows, problem.options.progress) as advance:
        runner = _Runner(problem, replay)
        if plan.record is not None and plan.record.by_columns is not None:
            runner.keep_to(plan.record.by_columns)
        for group in plan.groups:
            runner.enter(group)
            for pieces in chunks_of(group.pieces, plan.chunk):
                yield runner.chunk(pieces)  # no name here holds on to it while the next is computed
                advance(sum(map(len, pieces)))


def try_one_row(plan: Plan) -> tuple[str, tuple[str, ...], Estimated | None]:
    """The mode in which the first row of a plan could be computed, the ops that were repaired on the way, and by differences
    what is thought of the row."""
    group = plan.groups[0]
    first = Piece(group.pieces[0].leaf, group.pieces[0].indices[:1])
    with repaired(fresh=True) as used, plan.problem.replay() as replay:
        runner = _Runner(plan.problem, replay)
        runner.enter(group)
        mode, _ = runner.rows(plan.problem.space.one_hot([first]))
    product = runner.products.get(mode)
    return mode, tuple(sorted(used)), product.worst if isinstance(product, ByDifferences) else None


def product_along(problem: Problem, v: Mapping[int, Tensor]) -> Tensors:
    """H v at every leaf, in the mode in which rows are computed."""
    leaves = tuple(problem.space.leaves)
    with problem.replay() as replay:
        runner = _Runner(problem, replay)
        runner.enter(Group(leaves, leaves, ()))
        _, products = runner.rows({leaf: t[None] for leaf, t in v.items()})
    return tuple(t[0] for t in products)


class _Runner:
    """Runs chunks in the mode that works, or with ``"fastest"`` in the one that won on the first two chunks."""

    def __init__(self, problem: Problem, replay: Replay) -> None:
        self.problem, self.replay = problem, replay
        self.chain: tuple[str, ...] = MANY_PRODUCTS
        self.mode = problem.options.mode
        if self.mode == "fastest" and not problem.options.symmetric:
            self.mode = "auto"  # the modes to be raced fill an asymmetric matrix in different directions
        self.seconds: dict[str, float] = {}
        self.products: dict[str, Any] = {}
        self.group: Group

    def enter(self, group: Group) -> None:
        """The next rows are of ``group``: graphs kept for the last one go."""
        self.group = group
        self.products.clear()

    def chunk(self, pieces: tuple[Piece, ...]) -> Chunk:
        """The rows of ``pieces``, which are of the group entered."""
        with self.replay:
            mode, values = self.rows(self.problem.space.one_hot(pieces))
        warn_of_doubt(self.products.get(mode), self.problem.space)
        return Chunk(pieces, self.group.columns, values, mode in BY_COLUMNS)

    def rows(self, v: dict[int, Tensor]) -> tuple[str, Tensors]:
        """The mode used, and H v for the stacked vectors v."""
        if self.mode == "fastest":
            return self._race(v)
        used, values = self._run(v, self.mode)
        if self.mode == "auto":
            self.chain = (used, *(m for m in self.chain if m != used))
            self.keep_to(used in BY_COLUMNS)
        return used, values

    def keep_to(self, by_columns: bool) -> None:
        """Rows and columns of an asymmetric matrix cannot be mixed."""
        if not self.problem.options.symmetric:
            self.chain = tuple(mode for mode in self.chain if (mode in BY_COLUMNS) == by_columns)

    def _run(self, v: dict[int, Tensor], mode: str) -> tuple[str, Tensors]:
        problem, group = self.problem, self.group

        def attempt(candidate: str) -> tuple[str, Tensors]:
            if candidate not in self.products:
                self.replay.rewind()
                x = problem.bound.x
                f = self.replay.each(problem.scalar)
                self.products[candidate] = product_at(f, x, candidate, group.rows, group.columns, verb=problem.verb)
            self.replay.rewind()
            return candidate, rows_of(self.products[candidate], candidate, v, problem.options.randomness)

        return first_mode_that_works(problem.verb, problem.f, problem.bound.x, mode, self.chain, attempt)

    def _race(self, v: dict[int, Tensor]) -> tuple[str, Tensors]:
        """One chunk each, and every one a chunk of the answer; then the winner. A mode without a rule loses."""
        candidate = MANY_PRODUCTS[len(self.seconds)]
        start = time.perf_counter()
        try:
            used, values = self._run(v, candidate)
            _synchronize(values)
            self.seconds[candidate] = (time.perf_counter() - start) / len(next(iter(v.values())))
        except MissingDerivativeError:
            self.seconds[candidate] = float("inf")
            used, values = self._run(v, "auto")
        if len(self.seconds) == 2:
            best = min(self.seconds, key=self.seconds.__getitem__)
            self.mode = best if self.seconds[best] < float("inf") else "auto"
        return used, values


def _synchronize(values: Tensors) -> None:
    for device in {t.device for t in values if t.device.type == "cuda"}:
        torch.cuda.synchronize(device)
