"""``with checked():``, inside which second derivatives are held to differences of the gradient.

For every call of ``hvp``, ``grad_and_hvp``, ``hessian``, ``value_grad_and_hessian``, ``hessian_rows``, ``hessian_blocks`` and
``hessian_diagonal`` inside, a random direction w is drawn, and with g the gradient of f

    D(h) = (g(x + h w) - g(x - h w)) / 2h,        d(h) = (f(x + h w) - f(x - h w)) / 2h

are measured at two steps h, in float64 wherever f takes it. What the call returned must keep the laws

    H w = D                  entry by entry, on the rows and columns that were computed,
    <w, H v> = <v, D>        for a product H v,
    <g, w> = d               for the gradient that all of this trusts.

Where g is smooth the two steps agree far better with each other than any wrong formula does with either; near a kink they
disagree. So a number is *wrong* if it disagrees with both steps by more than they and rounding explain, *right* if it agrees
with one, and else *inconclusive*, which is recorded and never an alarm.

A random direction finds a wrong linear map with probability one. What is measured at one point along one direction proves
nothing elsewhere; a leaf whose share is below the tolerance goes unseen; and of ``hessian_diagonal`` and of chosen blocks only
the leaves of one group of rows, drawn anew for each call, are held to their law.

The first evaluation of f is watched besides: no difference can tell a function that takes numbers out of torch, or leaves
something behind, from another that does not (:mod:`functional_hess.impurity`).

Nothing here runs outside a ``checked()`` block, or in another thread than the one that opened it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from functional_hess.differences import (
    BY_DIFFERENCES,
    INCONCLUSIVE,
    RIGHT,
    Comparison,
    InDouble,
    LawError,
    Line,
    Slope,
    agree,
    along,
    comparison,
    direction,
    drawn_by,
    finite,
    largest,
    line_through,
    scale_of,
    settled,
    tolerances_for,
    value_slopes,
)
from functional_hess.guards import Replay, missing_rule, out_of_memory
from functional_hess.impurity import ImpurityError, ImpurityWarning, value_watched
from functional_hess.levels import flat_plain_value_and_grad, flat_value_and_grad, is_outermost, repaired
from functional_hess.transforms import Bound
from functional_hess.tree import Piece, Space, flat, tensors_of

__all__ = ["Check", "CheckedCall", "Record", "begin", "checked", "inside_checked", "unchecked"]

Tensors = tuple[Tensor, ...]
Scalar = Callable[..., tuple[Tensor, Any]]
Rows = tuple[Sequence[int], Tensor]
NOT_CHECKED = "not checked"
WRONG = "wrong"


# ---------------------------------------------------------------------------------------------------- the block


@dataclasses.dataclass(frozen=True)
class CheckedCall:
    """What was found about one call.

    Attributes:
        verb: the call, as errors name it.
        status: ``"right"``, ``"inconclusive"`` (differences can't tell, as near a kink), ``"not checked"``, or ``"wrong"``, which
            was raised too.
        error: the largest disagreement found, relative to the size of what was compared.
        place: the leaf where that was.
        note: why a call was not checked, or what else is to be known about it.
        gradients, values: how many of them the check took.
    """

    verb: str
    status: str
    error: float = 0.0
    place: str = ""
    note: str = ""
    gradients: int = 0
    values: int = 0

    def __str__(self) -> str:
        where = f", at most {self.error:.1e} off, at {self.place}" if self.place else ""
        cost = f" ({self.gradients} gradients, {self.values} values)" if self.gradients or self.values else ""
        return f"{self.verb}: {self.status}{where}{cost}{f'; {self.note}' if self.note else ''}"


@dataclasses.dataclass(frozen=True)
class Record:
    """The calls inside a ``checked()`` block so far, in order; printable."""

    calls: list[CheckedCall] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[CheckedCall]:
        return iter(self.calls)

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "no call was checked"


@dataclasses.dataclass(frozen=True)
class _Block:
    record: Record
    draw: torch.Generator


class _OfThisThread(threading.local):
    blocks: tuple[_Block, ...] = ()


_here = _OfThisThread()


@contextlib.contextmanager
def _within(blocks: tuple[_Block, ...]) -> Iterator[None]:
    outside = _here.blocks
    _here.blocks = blocks
    try:
        yield
    finally:
        _here.blocks = outside


def unchecked() -> contextlib.AbstractContextManager[None]:
    """Inside it nothing is verified: for an evaluation of f that is not the call's own, in which f may differentiate."""
    return _within(())


@contextlib.contextmanager
def checked(*, generator: torch.Generator | None = None) -> Iterator[Record]:
    """Verify every second derivative computed inside against differences of the gradient, as ``detect_anomaly`` does with NaN.

    Holds for ``hvp``, ``grad_and_hvp``, ``hessian``, ``value_grad_and_hessian``, ``hessian_rows``, ``hessian_blocks`` and
    ``hessian_diagonal``, called in the thread that entered the block. Blocks nest: a call is verified once, and recorded in each
    block around it. A call inside another transform is recorded as not checked, and so is one with
    ``randomness="different"``. Of ``hessian_diagonal`` and ``hessian_blocks`` each call verifies only some leaves, drawn at
    random; of everything else, all. No check proves anything about another point.

    Args:
        generator: draws the directions; a fresh one of fixed seed by default, never the global one.

    Yields:
        a :class:`Record` of the calls, each ``"right"``, ``"inconclusive"`` (as near a kink) or ``"not checked"``.

    Each call costs 4 gradients and 2 values of f more; one of the values keeps its graph until it is known, to see what f does
    beside computing it (:mod:`functional_hess.impurity`). Rows from ``hessian_rows`` are verified chunk by chunk, before they are
    handed out. Only where a law is broken f is evaluated further, to name the leaf.

    Raises:
        LawError: a result is wrong. The message names the law, the leaf where the disagreement is largest, both numbers and the
            tolerance.
        ImpurityError: f takes numbers out of a tensor that depends on x, computes a part of its value under ``no_grad``, writes
            into a tensor that it did not make, or keeps one that depends on x. ``detach`` and narrowing casts on the way to the
            value are an :class:`ImpurityWarning`.

    Example:
        >>> import torch
        >>> from functional_hess import hvp
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> with checked() as record:
        ...     product = hvp(lambda x: (x**3).sum(), x, torch.ones_like(x))
        >>> [(call.verb, call.status, call.gradients, call.values) for call in record]
        [('hvp', 'right', 4, 2)]
    """
    block = _Block(Record(), drawn_by(generator))
    with _within((*_here.blocks, block)):
        yield block.record


def inside_checked() -> bool:
    """Whether this thread is inside a ``checked()`` block."""
    return bool(_here.blocks)


def begin(bound: Bound, has_aux: bool, randomness: str) -> Check | None:
    """The check of a call that is about to be made; ``None`` outside ``checked()``, and where the call can't be checked."""
    return _begun(_here.blocks, bound, has_aux, randomness) if _here.blocks else None


def _begun(blocks: tuple[_Block, ...], bound: Bound, has_aux: bool, randomness: str) -> Check | None:
    if not is_outermost():
        note = "called inside another transform"
    elif any(isinstance(t, FakeTensor) or t.is_meta for t in bound.x):
        note = "x holds no numbers"
    elif randomness == "different":
        note = "with randomness='different' every evaluation is of another function"
    else:
        try:
            return Check(blocks, bound, has_aux, randomness)
        except _CannotMeasure as error:  # the call itself is about to fail, and to say more
            note = str(error)
    for block in blocks:
        block.record.calls.append(CheckedCall(bound.verb, NOT_CHECKED, note=note))
    return None


# ---------------------------------------------------------------------------------------------------- f near x


class _CannotMeasure(Exception):
    """f cannot be evaluated near x."""


class _Probe:
    """f near x: its values and gradients, in float64 wherever f takes it, and counted."""

    def __init__(self, bound: Bound, has_aux: bool, randomness: str) -> None:
        self.bound, self.has_aux = bound, has_aux
        self.replay = Replay(randomness, bound.x, bound.verb)
        self.x = tuple(t.detach() for t in bound.x)
        self.gradients = self.values = 0
        self.widened = self.plainly = False
        self.output = self._first_value()

    @functools.cached_property
    def point(self) -> Tensors:
        """x, in float64 if f takes it there: the second value tells."""
        wide = tuple(t.double() for t in self.x)
        self.widened = any(t.dtype != torch.float64 for t in self.x)
        try:
            second = self._value(wide)
        except _CannotMeasure:
            second = None
        eps = max(torch.finfo(t.dtype).eps for t in self.x)
        if second is not None and agree(tensors_of(self.output)[0], tensors_of(second)[0], eps):
            return wide
        self.widened = False
        return self.x

    @property
    def eps(self) -> float:
        return max(torch.finfo(t.dtype).eps for t in self.point)

    def scalar(self) -> Scalar:
        return self.bound.scalar(self.has_aux)

    def moved(self, w: Tensors, t: float) -> Tensors:
        return tuple(p + (t * d).to(p.dtype) for p, d in zip(self.point, w, strict=True))

    def _first_value(self) -> Any:
        """f(x), watched for what f does beside; or as it is, where no level of torch.func can enter f."""
        value, name = lambda *x: self.bound.split(x, self.has_aux)[0], self.bound.space.name_of
        self.values += 1
        watched = self._evaluated(lambda: value_watched(self.bound.verb, value, self.x, name))
        self.plainly = watched is None
        return self._value(self.x) if self.plainly else watched

    def _value(self, x: Tensors) -> Any:
        self.values += 1
        return self._evaluated(lambda: self.bound.split(x, self.has_aux)[0])

    def value_along(self, w: Tensors, t: float) -> Tensor:
        """f at x + t w."""
        x = self.moved(w, t)
        self.values += 1
        return self._evaluated(lambda: self.scalar()(*x)[0]).double()

    def along(self, scalar: Scalar, w: Tensors, t: float) -> tuple[Tensor, Tensors]:
        """Value and gradient at x + t w."""
        x = self.moved(w, t)
        self.gradients += 1
        value, gradient = self._evaluated(functools.partial(self._value_and_gradient, scalar, x))
        return value.detach().double(), tuple(g.detach().double() for g in gradient)

    def _value_and_gradient(self, scalar: Scalar, x: Tensors) -> tuple[Tensor, Tensors]:
        if not self.plainly:
            try:
                (value, _), gradient = flat_value_and_grad(scalar, x, verb=self.bound.verb)
                return value, gradient
            except RuntimeError as error:
                if not missing_rule(error):
                    raise
                self.plainly = True
        (value, _), gradient = flat_plain_value_and_grad(scalar, x, verb=self.bound.verb)
        return value, gradient

    def _evaluated(self, evaluate: Callable[[], Any]) -> Any:
        self.replay.rewind()
        in_double = InDouble() if self.widened else contextlib.nullcontext()
        try:
            with self.replay, _within(()), torch.no_grad(), in_double, repaired():
                return evaluate()
        except Exception as error:
            if out_of_memory(error) or isinstance(error, (ImpurityError, ImpurityWarning)):
                raise
            text = str(error).partition("\n")[0]
            raise _CannotMeasure(f"f raised {type(error).__name__} near x: {text}") from error


# ---------------------------------------------------------------------------------------------------- one call


class _Chunk(Protocol):
    """Rows of H as :mod:`functional_hess.rows` computes them."""

    @property
    def pieces(self) -> Sequence[Piece]: ...

    @property
    def columns(self) -> tuple[int, ...]: ...

    @property
    def values(self) -> Tensors: ...


class _Group(Protocol):
    @property
    def rows(self) -> tuple[int, ...]: ...

    @property
    def columns(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class _Heard:
    """What one law says at one place; as text, of a law that is broken."""

    law: str
    place: str
    compared: Comparison

    def __str__(self) -> str:
        c = self.compared
        return (
            f"{self.law} along a random direction disagrees with central differences: at {self.place} got {c.got:.9g}, expected "
            f"{c.expected:.9g}; the largest disagreement there is {c.error:.3g}, more than the tolerance {c.tolerance:.3g}. "
            "An op of f, or a backward written for it, has a wrong derivative: another mode= may have a right one."
        )


Laws = Iterator[_Heard]


class Check:
    """The check of one call: made before it, and told its result by the method that fits."""

    def __init__(self, blocks: tuple[_Block, ...], bound: Bound, has_aux: bool, randomness: str) -> None:
        self.blocks, self.space, self.verb = blocks, bound.space, bound.verb
        self.draw = blocks[-1].draw
        self.tolerances = tolerances_for(BY_DIFFERENCES, bound.space.dtypes, None, 1e-12)
        self.probe = _Probe(bound, has_aux, randomness)
        self.heard: list[_Heard] = []
        self.note, self.given_up = "", False

    def product(self, v: dict[int, Tensor], product: Tensors, gradient: Tensors | None = None) -> None:
        """H v for tangents v by leaf, and the gradient if that was asked for."""
        with self._recorded():
            self._hear(self._laws_of_product(tuple(v[leaf].detach() for leaf in self.space.leaves), product, gradient))

    def hessian(self, H: Any, gradient: Tensors | None = None) -> None:
        """The tree of trees of blocks, of a scalar f or of one with several outputs."""
        with self._recorded():
            self._hear(self._laws_of_hessian(tensors_of(H)[0], gradient))

    def chosen(self, blocks: dict[tuple[int, int], Tensor]) -> None:
        """Chosen blocks by their pairs of leaves."""
        with self._recorded():
            self._hear(self._laws_of_blocks(blocks, self.probe.scalar(), None))

    def rows(self, stream: Iterable[Rows]) -> Iterator[Rows]:
        """A stream of rows, handed on as they are found right."""
        lines: list[Line] = []
        every = tuple(self.space.leaves)
        with self._recorded():
            for rows, part in stream:
                values = part.detach().split(self.space.sizes, 1)
                self._hear(self._laws_of_rows(lines, self.space.pieces(rows), every, values))
                yield rows, part

    def chunks(self, groups: Sequence[_Group], chunks: Iterable[_Chunk]) -> Iterator[Any]:
        """Chunks of rows, each against some columns; those of one group are held to their law."""
        lines: list[Line] = []
        group = groups[self._draw_below(len(groups))] if groups else None
        with self._recorded():
            for chunk in chunks:
                if group is not None and chunk.pieces[0].leaf in group.rows:
                    self._hear(self._laws_of_rows(lines, chunk.pieces, chunk.columns, tuple(map(flat, chunk.values))))
                yield chunk

    # ------------------------------------------------------------------------------------------------ the verdict

    def _hear(self, laws: Laws) -> None:
        """Listen until one law is broken, or f can't be evaluated near x."""
        if self.given_up:
            return
        try:
            for heard in laws:
                self.heard.append(heard)
                if heard.compared.wrong:
                    raise LawError(f"{self.verb}: {heard}")
        except _CannotMeasure as error:
            self.note, self.given_up = str(error), True

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        try:
            yield
        finally:
            call = self._verdict()
            for block in self.blocks:
                block.record.calls.append(call)

    def _verdict(self) -> CheckedCall:
        outcomes = {heard.compared.outcome for heard in self.heard}
        status = next((outcome for outcome in (WRONG, INCONCLUSIVE, RIGHT) if outcome in outcomes), NOT_CHECKED)
        if self.given_up and status == RIGHT:
            status = NOT_CHECKED
        of_status = [heard for heard in self.heard if heard.compared.outcome == status]
        worst = max(of_status, key=lambda heard: heard.compared.relative, default=None)
        error, place = (worst.compared.relative, worst.place) if worst else (0.0, "")
        return CheckedCall(self.verb, status, error, place, self.note, self.probe.gradients, self.probe.values)

    # ------------------------------------------------------------------------------------------------ laws of results

    def _laws_of_product(self, v: Tensors, product: Tensors, gradient: Tensors | None) -> Laws:
        line = self._line(self.space.leaves, self.probe.scalar())
        yield self._law_of_values(line)
        yield from self._laws_of_gradient(line, gradient)
        terms = [w * p.detach().double() for w, p in zip(line.w, product, strict=True)]

        def compare(slopes: Sequence[Slope]) -> Comparison:
            slope = along(slopes, v)
            return comparison(_sum(terms), slope, *self.tolerances, max(_size(terms), largest([finite(slope.value)])))

        compared = line.settled(compare)
        if not compared.wrong:
            yield _Heard("H v", "x", compared)
            return
        each = [*self._laws_along(v, product)]
        yield from each
        if not any(heard.compared.wrong for heard in each):
            self.note = "H v agrees with differences along v, but <w, H v> not with <v, H w>: H is not symmetric"
            yield _Heard("H v", "x", dataclasses.replace(compared, outcome=INCONCLUSIVE))

    def _laws_along(self, v: Tensors, product: Tensors) -> Laws:
        """H v = d/dt g(x + t v), entry by entry: four gradients more, to name the leaf and to be sure."""
        size = max(largest([t]) / scale_of(p) for t, p in zip(v, self.probe.x, strict=True))
        unit = 1 / size if size > 0 else 1.0
        line = line_through(*self._through(self.probe.scalar(), tuple(unit * t.double() for t in v)))
        yield from self._laws_of_leaves("H v", line, {leaf: unit * p.detach().double() for leaf, p in enumerate(product)})

    def _laws_of_hessian(self, blocks: Tensors, gradient: Tensors | None) -> Laws:
        pairs = [(p, q) for p in self.space.leaves for q in self.space.leaves]
        outputs = Space.of(self.probe.output, "f(x)")
        if outputs.shapes == (torch.Size(()),) and isinstance(self.probe.output, Tensor):
            yield from self._laws_of_blocks(dict(zip(pairs, blocks, strict=True)), self.probe.scalar(), gradient)
            return
        u = outputs.pack(outputs.random(self.draw))

        def contracted(*x: Tensor) -> tuple[Tensor, None]:
            values = Space.of(out := self.probe.bound.split(x, self.probe.has_aux)[0], "f(x)").pack(out)
            return torch.stack([(a * value).sum().double() for a, value in zip(u, values, strict=True)]).sum(), None

        summed = {}
        for number, pair in enumerate(pairs):
            each = zip(u, blocks[number :: len(pairs)], strict=True)
            summed[pair] = torch.stack([a.reshape(-1) @ block.detach().reshape(a.numel(), -1).to(a) for a, block in each]).sum(0)
        yield from self._laws_of_blocks(summed, contracted, gradient)

    def _laws_of_blocks(self, blocks: dict[tuple[int, int], Tensor], scalar: Scalar, gradient: Tensors | None) -> Laws:
        sizes, leaves = self.space.sizes, self.space.leaves
        line = self._line(leaves, scalar)
        yield self._law_of_values(line)
        yield from self._laws_of_gradient(line, gradient)
        for p in leaves:
            row = [blocks[p, q].detach().reshape(sizes[p], sizes[q]) for q in leaves]
            yield from self._laws_of_leaves("H w", line, {p: _times(row, line.w)})

    def _laws_of_rows(self, lines: list[Line], pieces: Sequence[Piece], columns: tuple[int, ...], values: Tensors) -> Laws:
        if not lines:
            lines.append(self._line(columns, self.probe.scalar()))
            yield self._law_of_values(lines[0])
        got, start = _times(values, [lines[0].w[q] for q in columns]), 0
        for piece in pieces:
            part = got[start : start + len(piece)]
            yield self._law_of_entries("H w", lines[0], piece.leaf, torch.tensor(piece.indices, device=got.device), part)
            start += len(piece)

    def _laws_of_leaves(self, law: str, line: Line, got: dict[int, Tensor]) -> Laws:
        for leaf, values in got.items():
            yield self._law_of_entries(law, line, leaf, slice(None), values)

    def _law_of_entries(self, law: str, line: Line, leaf: int, entries: Any, values: Tensor) -> _Heard:
        """Some entries on one leaf, held to the leaf's own size and to a hundredth of the largest."""

        def compare(slopes: Sequence[Slope]) -> Comparison:
            whole = slopes[leaf]
            part = dataclasses.replace(whole, value=flat(whole.value, 0)[entries], kink=flat(whole.kink, 0)[entries])
            return comparison(values, part, *self.tolerances, _size_of(leaf, [slope.value for slope in slopes]))

        return _Heard(law, self.space.name_of(leaf), line.settled(compare))

    # ------------------------------------------------------------------------------------------------ laws of the gradient

    def _laws_of_gradient(self, line: Line, gradient: Tensors | None) -> Laws:
        """The gradient that was returned."""
        for leaf, g in enumerate(gradient or ()):
            size = _size_of(leaf, [slope.value for slope in line.gradient])
            compared = comparison(g, line.gradient[leaf], *self.tolerances, size)
            yield _Heard("the gradient", self.space.name_of(leaf), compared)

    def _law_of_values(self, line: Line) -> _Heard:
        """<g, w> = d/dt f(x + t w); where that is broken, w leaf by leaf names the leaf."""
        law, place, worst = "the gradient g, as <g, w>,", "x", self._against_values(line, line.w, line.value)
        if not worst.wrong:
            return _Heard(law, place, worst)
        for leaf in self.space.leaves:
            alone = tuple(w if k == leaf else torch.zeros_like(w) for k, w in enumerate(line.w))
            slopes = value_slopes(functools.partial(self.probe.value_along, alone), self.probe.eps)
            one = self._against_values(line, alone, slopes)
            if one.wrong and (place == "x" or one.error > worst.error):
                place, worst = self.space.name_of(leaf), one
        return _Heard(law, place, worst)

    def _against_values(self, line: Line, w: Tensors, slopes: tuple[Slope, Slope]) -> Comparison:
        terms = [slope.value * t for slope, t in zip(line.gradient, w, strict=True)]
        doubt = float(_sum([slope.doubt * t.abs() for slope, t in zip(line.gradient, w, strict=True)]))

        def compare(slopes: Sequence[Slope]) -> Comparison:
            unsure = dataclasses.replace(slopes[0], anywhere=slopes[0].anywhere + doubt)
            return comparison(_sum(terms), unsure, *self.tolerances, max(_size(terms), largest([finite(unsure.value)])))

        return settled(lambda rung: [slopes[rung]], compare, 2)

    # ------------------------------------------------------------------------------------------------ directions

    def _line(self, columns: Iterable[int], scalar: Scalar) -> Line:
        """Differences along a random direction in the leaves ``columns``."""
        w = (t.double() for t in direction(self.space, self.probe.x, self.draw))
        moved = set(columns)
        return line_through(*self._through(scalar, tuple(t if k in moved else torch.zeros_like(t) for k, t in enumerate(w))))

    def _through(self, scalar: Scalar, w: Tensors) -> tuple[Callable[[float], tuple[Tensor, Tensors]], Tensors, float]:
        return functools.partial(self.probe.along, scalar, w), w, self.probe.eps

    def _draw_below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.draw, device=self.draw.device))


def _times(values: Sequence[Tensor], w: Sequence[Tensor]) -> Tensor:
    """The rows ``values``, one tensor a leaf, times w; in the dtype of the rows, since they may be large."""
    products = [(part @ flat(t, 0).to(part)).to(w[0].device, torch.float64) for part, t in zip(values, w, strict=True)]
    return torch.stack(products).sum(0)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.sum().cpu() for t in terms]).sum()


def _size(terms: Sequence[Tensor]) -> float:
    """The root of the sum of squares: what a sum of random terms amounts to."""
    return float(finite(torch.stack([t.square().sum().cpu() for t in terms]).sum().sqrt()))


def _size_of(leaf: int, values: Sequence[Tensor]) -> float:
    every = [finite(value) for value in values]
    return max(largest([every[leaf]]), largest(every) / 100)
