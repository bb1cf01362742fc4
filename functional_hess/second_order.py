"""The Hessian and its parts: rows, blocks, diagonal.

For a scalar f of a tree with leaves x_1, ..., x_L,

    H[p][q] = d^2 f / dx_p dx_q,    a block of shape x_p.shape + x_q.shape.

Every part is a ``vmap`` of Hessian-vector products over unit vectors, in chunks whose memory is known beforehand
(:mod:`functional_hess.rows`); this floor says which rows, and puts them where they belong. Because H is symmetric, a pair of
leaves is computed once: leaves are ordered as f uses them first, and rows of a leaf are differentiated only with respect to the
leaves after it, so that rows of the last layers never run through the first ones.

At the outermost level chunks are written into preallocated blocks (or ``out``). Under another transform, or where plain autograd
watches an argument, they are concatenated instead, since neither can follow a write into a buffer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from functional_hess.blocks import Blocks, require_out
from functional_hess.colored import Colored, color, colored_blocks, colored_diagonal
from functional_hess.guards import value_and_gradient
from functional_hess.lifting import Lift, lift, lifted_blocks, lifted_diagonal
from functional_hess.nesting import derived_from
from functional_hess.resuming import Record, runs_of
from functional_hess.rows import (
    Chunk,
    Options,
    Plan,
    Problem,
    evaluate,
    look,
    plan_rows,
    recorded,
    rows_only,
)
from functional_hess.transforms import Output, plain, require_argnums
from functional_hess.tree import Piece, Space, flat
from functional_hess.vector_valued import hessian_of_each_output

__all__ = [
    "hessian",
    "hessian_blocks",
    "hessian_diagonal",
    "hessian_rows",
    "value_grad_and_hessian",
]

Tree = Any
Tensors = tuple[Tensor, ...]
CHECKED = "checked() holds every row to differences"


# ---------------------------------------------------------------------------------------------------- the public calls


def hessian(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    mode: str = "auto",
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    symmetric: bool = True,
    randomness: str = "error",
    strict: bool = False,
    out: Tensor | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Callable[..., Any]:
    """The Hessian of f: a function of the same arguments, whose result is a tree of trees of blocks.

    Args:
        f: a function that returns a scalar (or any tree of tensors: then blocks have shape
            ``out.shape + x[p].shape + x[q].shape``), or with ``has_aux`` ``(value, aux)``.
        argnums: the argument to differentiate; a tuple gives tuples of tuples of blocks.
        has_aux: the result is ``(H, aux)``.
        mode: ``"auto"``, one of ``functional_hess.products.MODES``, or ``"fastest"``: one chunk of each, then the winner.
            ``"finite-difference"`` takes 6 gradients a row or more, in a loop, and warns as :func:`~functional_hess.hvp` does.
        chunk_size: rows at a time: ``"auto"`` (bounded memory), an int, or ``None`` for all at once.
        memory_limit: bytes, or ``"4GiB"``; by default 60 % of what is available. ``out`` does not count towards it.
        symmetric: compute each pair of leaves once and mirror it. ``False`` for a function whose custom derivative rules make H
            asymmetric: then ``H[p][q]`` is the derivative of the p-th gradient with respect to ``x[q]``.
        randomness: ``"error"`` refuses a random f, ``"same"`` fixes one draw for all rows.
        strict: refuse a leaf on which f does not depend.
        out: an (n, n) tensor to write into, in the coordinates of ``Space``; it may be memory-mapped
            (``torch.from_file``). The blocks are then views of it. An exception that interrupts the call, ``KeyboardInterrupt``
            and a lack of memory included, tells by its attribute ``finished_rows`` and a note which rows it holds.
        resume: the path of a small file beside a memory-mapped ``out``, in which finished rows are recorded. After an
            interruption of any kind the same call takes up the rows that the file names and ``out`` holds, and computes the
            others; ``chunk_size`` and ``memory_limit`` may be others. Rows are then computed as rows, whatever f's structure.
        progress: show a bar (needs tqdm).

    Returns:
        blocks ``H[p][q]`` of shape ``x[p].shape + x[q].shape``, contiguous unless they are views of ``out``, ``None`` at carried
        leaves. Costs one plain evaluation of f, one gradient graph a group of leaves, and n backward passes, batched; or, where
        that is much and the parameters enter through layers whose samples are proved not to read each other, about as many
        products as there are units (:mod:`functional_hess.lifting`), or as colors where most entries are proved to be zero
        (:mod:`functional_hess.colored`); ``explain`` says which. Memory is
        at most the output + max(64 MiB, output / 10). ``Space.of(x).matrix(H)`` is one (n, n) matrix.

    Raises:
        MemoryLimitError: it cannot fit; nothing has been allocated.
        MissingDerivativeError: an op has a second derivative in no mode.
        DependenceError: f(x) does not depend on x by differentiable operations.
        ValueError: ``out`` does not fit; or ``resume`` comes without ``out``, names a file of another kind, or the record of a
            call with other arguments, other options or another f; the message says what differs.
        OSError: the file that ``resume`` names cannot be read and written, or another call, of any process, is at it.

    At kinks and where an operation has no second derivative the result is what :func:`~functional_hess.products.hvp` tells under
    *Singular points*: right, NaN, or the Hessian of one piece.

    Example:
        f(x) = x1^2 x2:

        >>> import torch
        >>> hessian(lambda x: x[0] ** 2 * x[1])(torch.tensor([3.0, 5.0]))
        tensor([[10.,  6.],
                [ 6.,  0.]])
    """
    require_argnums("hessian", argnums)
    options = Options(has_aux, mode, chunk_size, memory_limit, randomness, strict, progress, symmetric, resume)

    def planned(*args: Any, **kwargs: Any) -> Plan | Lift | Colored:
        problem = look("hessian", f, args, kwargs, argnums, options)
        if out is not None:
            require_out(problem, out)
        elif resume is not None:
            raise ValueError(
                "hessian: resume= keeps a record of the rows that out= holds, so it needs one: a memory-mapped tensor, as "
                "torch.from_file makes it. hessian_rows takes resume= without."
            )
        output = 0 if out is not None else _dense_bytes(problem.space)
        lifted = lift(problem, args, argnums, output)
        if isinstance(lifted, Lift):
            return lifted
        colored = color(problem, args, output)
        if colored:
            return colored
        record = functools.partial(recorded, problem, args, kwargs, argnums)
        reason = lifted or (rows_only(problem, args) if resume is not None else "")
        return _because(_dense_plan(problem, symmetric, out, record), reason)

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        plan = planned(*args, **kwargs)
        H = _dense(plan, symmetric, out)
        if plan.problem.check:
            plan.problem.check.hessian(H)
        return (H, plan.problem.seen.aux) if has_aux else H

    return _explainable(transformed, planned)


def value_grad_and_hessian(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    mode: str = "auto",
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    symmetric: bool = True,
    randomness: str = "error",
    strict: bool = False,
    out: Tensor | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Callable[..., Any]:
    """Value, gradient and Hessian: ``(value, g, H)``, with ``has_aux`` ``((value, aux), g, H)``.

    Options, errors and cost are those of :func:`hessian`, and one gradient more.

    Example:
        >>> import torch
        >>> value_grad_and_hessian(lambda x: x**3)(torch.tensor(2.0))
        (tensor(8.), tensor(12.), tensor(12.))
    """
    second = hessian(
        f,
        argnums,
        has_aux=has_aux,
        mode=mode,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        symmetric=symmetric,
        randomness=randomness,
        strict=strict,
        out=out,
        resume=resume,
        progress=progress,
    )

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        plan: Plan | Lift | Colored = second.planned(*args, **kwargs)  # type: ignore[attr-defined]
        problem = plan.problem
        _require_scalar_value(problem)
        with problem.replay():
            (value, aux), gradient = value_and_gradient(problem.scalar, problem.bound.x, problem.verb)
        g, H = problem.space.unpack(plain(gradient)), _dense(plan, symmetric, out)
        if problem.check:
            problem.check.hessian(H, gradient)
        return ((value, aux), g, H) if has_aux else (value, g, H)

    return _explainable(transformed, second.planned)  # type: ignore[attr-defined]


def hessian_rows(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    rows: Sequence[int] | None = None,
    has_aux: bool = False,
    mode: str = "auto",
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    randomness: str = "error",
    strict: bool = False,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Callable[..., Iterator[tuple[Sequence[int], Tensor]]]:
    """Rows of the Hessian as a stream: an iterator of ``(rows, tensor of shape (k, n))``.

    ``rows`` chooses coordinates in the order of ``Space``: a range, a slice of one, or any ints; all by default. A chunk that is
    evenly spaced comes with a range, any other with a list. Nothing larger than a chunk is held, so H may be larger than memory.
    With ``has_aux`` the auxiliary result is dropped. Where custom derivative rules make H asymmetric, mode
    ``"forward-over-reverse"`` gives its columns instead. The other options are those of :func:`hessian`.

    ``resume`` is the path of a small file in which rows are recorded as finished when the next ones are asked for, or the end.
    After an interruption the same call goes on with the rows that are not: those that the caller was at come again, and what is
    kept of the others is the caller's affair.

    Raises:
        IndexError: a row is out of range.
        TypeError: f returns no scalar, or ``rows`` are no ints. Other errors are those of :func:`hessian`.

    Example:
        >>> import torch
        >>> for rows, H in hessian_rows(lambda x: (x**3).sum(), rows=range(1, 3))(torch.tensor([1.0, 2.0, 3.0])):
        ...     print(rows, H.tolist())
        range(1, 3) [[0.0, 12.0, 0.0], [0.0, 0.0, 18.0]]
    """
    require_argnums("hessian_rows", argnums)
    options = Options(has_aux, mode, chunk_size, memory_limit, randomness, strict, progress, symmetric=False, resume=resume)

    def planned(*args: Any, **kwargs: Any) -> Plan:
        problem = look("hessian_rows", f, args, kwargs, argnums, options)
        _require_scalar_value(problem)
        every = tuple(problem.space.leaves)
        chosen = range(problem.space.dim) if rows is None else _checked(rows, problem.space.dim)
        row = problem.space.dim * problem.space.dtype.itemsize
        record = recorded(problem, args, kwargs, argnums)
        pieces = [piece for part in _left(chosen, record) for piece in problem.space.pieces(part)]
        plan = plan_rows(problem, [(piece, every) for piece in pieces], output=0, held=2 * row)  # joined; the caller's last one
        return _taken_up(plan, record)

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Iterator[tuple[Sequence[int], Tensor]]:
        plan = planned(*args, **kwargs)
        return plan.problem.check.rows(_stream(plan)) if plan.problem.check else _stream(plan)

    return _explainable(transformed, planned)


def _stream(plan: Plan) -> Iterator[tuple[Sequence[int], Tensor]]:
    space, record = plan.problem.space, plan.record
    with record.open() if record else contextlib.nullcontext():
        for chunk in evaluate(plan):
            stacked = [flat(values).to(space.device, space.dtype) for values in chunk.values]
            rows = _numbers(space, chunk.pieces)
            yield rows, plain([torch.cat(stacked, 1)])[0]
            if record:  # the next rows are asked for
                record.add(rows, chunk.by_columns)


def _left(rows: Sequence[int], record: Record | None) -> list[Sequence[int]]:
    """Those of the chosen rows that are not finished."""
    if record is None or not record.done.any():
        return [rows]
    if isinstance(rows, range) and rows.step == 1:
        left = ~record.done
        left[: rows.start], left[rows.stop :] = False, False
        return list(runs_of(left))
    return [[row for row in rows if not record.done[row]]]


def _taken_up(plan: Plan, record: Record | None) -> Plan:
    """The plan of the rows that are left."""
    if record is None:
        return plan
    finished, n = int(record.done.sum()), record.space.dim
    return dataclasses.replace(
        plan, record=record, route=f"{plan.route} ({finished:,} of {n:,} finished)" if finished else plan.route
    )


def _numbers(space: Space, pieces: Sequence[Piece]) -> Sequence[int]:
    numbers = [space.offsets[piece.leaf] + i for piece in pieces for i in piece.indices]
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    even = range(numbers[0], numbers[-1] + (1 if step > 0 else -1), step or 1)
    return even if list(even) == numbers else numbers


def _ints(rows: Any) -> list[int]:
    """Ints from any sequence of them; a mask or numbers with a fraction would be another choice of rows than was meant."""
    is_mask = isinstance(rows, Tensor) and rows.dtype == torch.bool
    try:
        found = [None if is_mask or isinstance(row, bool) else operator.index(row) for row in rows]
    except TypeError:
        found = [None]
    if None in found:
        got = f"a tensor of dtype {rows.dtype}" if isinstance(rows, Tensor) else repr(rows)
        raise TypeError(f"hessian_rows: rows must be a range or a sequence of ints, got {got}.")
    return cast(list[int], found)


def _checked(rows: Sequence[int], n: int) -> Sequence[int]:
    rows = rows if isinstance(rows, range) else _ints(rows)
    outside = [row for row in ((rows[0], rows[-1]) if isinstance(rows, range) and rows else rows) if not 0 <= row < n]
    if outside:
        raise IndexError(f"hessian_rows: row {outside[0]} is out of range for {n} coordinates, which are numbered from 0.")
    return rows


def hessian_diagonal(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    mode: str = "auto",
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    randomness: str = "error",
    strict: bool = False,
    progress: bool = False,
) -> Callable[..., Any]:
    """The exact diagonal of the Hessian, a tree like x: entry i is d^2 f / dx_i^2.

    n products, in chunks, each against its own leaf only; memory is the diagonal's and one chunk's. Options and errors are those
    of :func:`hessian`, and a TypeError where f returns no scalar.

    Example:
        >>> import torch
        >>> x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(1.0)}
        >>> hessian_diagonal(lambda x: (x["a"] ** 3).sum() + x["b"] * x["a"][0])(x)
        {'a': tensor([ 6., 12.]), 'b': tensor(0.)}
    """
    require_argnums("hessian_diagonal", argnums)
    options = Options(has_aux, mode, chunk_size, memory_limit, randomness, strict, progress)

    def planned(*args: Any, **kwargs: Any) -> Plan | Lift | Colored:
        problem = look("hessian_diagonal", f, args, kwargs, argnums, options)
        _require_scalar_value(problem)
        output = sum(t.numel() * t.element_size() for t in problem.bound.x)
        lifted = CHECKED if problem.check else lift(problem, args, argnums, output, diagonal=True)
        if isinstance(lifted, Lift):
            return lifted
        colored = None if problem.check else color(problem, args, output, diagonal=True)
        if colored:
            return colored
        wanted = [(_whole(problem.space, leaf), (leaf,)) for leaf in problem.seen.order]
        return _because(plan_rows(problem, wanted, output=output), lifted)

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        plan = planned(*args, **kwargs)
        space = plan.problem.space
        if not isinstance(plan, Plan):
            leaves = lifted_diagonal(plan) if isinstance(plan, Lift) else colored_diagonal(plan)
            diagonal = space.unpack(plain(leaves))
            return (diagonal, plan.problem.seen.aux) if has_aux else diagonal
        parts: dict[int, list[Tensor]] = {leaf: [] for leaf in space.leaves}
        check = plan.problem.check
        for chunk in check.chunks(plan.groups, evaluate(plan)) if check else evaluate(plan):
            for leaf, part in _diagonals(chunk):
                parts[leaf].append(part)
            del chunk
        empty = [[torch.zeros(0, dtype=t.dtype, device=t.device)] for t in plan.problem.bound.x]
        joined = [torch.cat(parts[leaf] or empty[leaf]).reshape(space.shapes[leaf]) for leaf in space.leaves]
        diagonal = space.unpack(plain(joined))
        return (diagonal, plan.problem.seen.aux) if has_aux else diagonal

    return _explainable(transformed, planned)


def _diagonals(chunk: Chunk) -> Iterator[tuple[int, Tensor]]:
    row = 0
    for piece in chunk.pieces:
        values = flat(chunk.values[chunk.columns.index(piece.leaf)][row : row + len(piece)])
        yield piece.leaf, values[:, piece.indices[0] : piece.indices[-1] + 1].diagonal().clone()  # not a view: the chunk goes
        row += len(piece)


def hessian_blocks(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    has_aux: bool = False,
    mode: str = "auto",
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    randomness: str = "error",
    strict: bool = False,
    progress: bool = False,
) -> Callable[..., Any]:
    """Chosen blocks of the Hessian.

    Without ``pairs``: the block diagonal by leaf, a tree like x whose entry p has shape ``x[p].shape + x[p].shape``. With
    ``pairs`` of globs, matched against ``Space.of(x).paths``: a dict ``{(path_p, path_q): block}``. Only the blocks asked for are
    computed, at the cost of one product for each coordinate of the smaller leaf of a pair. Options are those of :func:`hessian`.

    Raises:
        ValueError: a glob matches no leaf.
        TypeError: f returns no scalar, or ``pairs`` are no pairs. Other errors are those of :func:`hessian`.

    Example:
        >>> import torch
        >>> x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
        >>> f = lambda x: x["b"] ** 2 * x["a"].sum()
        >>> hessian_blocks(f)(x)["b"], hessian_blocks(f, pairs=[("a", "b")])(x)
        (tensor(6.), {('a', 'b'): tensor([6., 6.])})
    """
    require_argnums("hessian_blocks", argnums)
    options = Options(has_aux, mode, chunk_size, memory_limit, randomness, strict, progress)

    def planned(*args: Any, **kwargs: Any) -> Plan | Lift | Colored:
        problem = look("hessian_blocks", f, args, kwargs, argnums, options)
        _require_scalar_value(problem)
        space = problem.space
        chosen = [(leaf, leaf) for leaf in space.leaves] if pairs is None else _matching(space, pairs)
        output = sum(_bytes_of(space, p, q) for p, q in chosen)
        lifted = CHECKED if problem.check else lift(problem, args, argnums, output)
        if isinstance(lifted, Lift):
            return lifted
        colored = None if problem.check else color(problem, args, output)
        if colored:
            return colored
        against: dict[int, set[int]] = {}
        for p, q in chosen:
            row, column = sorted((p, q), key=lambda leaf: (space.sizes[leaf], leaf))
            against.setdefault(row, set()).add(column)
        wanted = [(_whole(space, leaf), tuple(sorted(against[leaf]))) for leaf in problem.seen.order if leaf in against]
        return _because(plan_rows(problem, wanted, output=output), lifted)

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        plan = planned(*args, **kwargs)
        space = plan.problem.space
        chosen = sorted({(leaf, leaf) for leaf in space.leaves} if pairs is None else set(_matching(space, pairs)))
        if isinstance(plan, Lift):
            found = lifted_blocks(plan, chosen)
        elif isinstance(plan, Colored):
            found = colored_blocks(plan, chosen)
        else:
            blocks = Blocks(plan.problem, plan.columns)
            check = plan.problem.check
            for chunk in check.chunks(plan.groups, evaluate(plan)) if check else evaluate(plan):
                blocks.add(chunk)
                del chunk
            found = {(p, q): blocks.block(p, q) for p, q in chosen}
        if pairs is None:
            result = space.unpack([found[leaf, leaf] for leaf in space.leaves])
        else:
            result = {(space.paths[p], space.paths[q]): block for (p, q), block in found.items()}
        return (result, plan.problem.seen.aux) if has_aux else result

    return _explainable(transformed, planned)


def _matching(space: Space, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    found = []
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(glob, str) for glob in pair)):
            raise TypeError(f"hessian_blocks: pairs must hold pairs of globs, as in [('w', 'b')], got {pair!r} among them.")
        sides = [[leaf for leaf in space.leaves if fnmatch.fnmatchcase(space.paths[leaf], glob)] for glob in pair]
        for glob, side in zip(pair, sides, strict=True):
            if not side:
                raise ValueError(
                    f"hessian_blocks: pairs must match paths of x, got {glob!r}, which matches no leaf; the paths are "
                    f"{', '.join(space.paths)}."
                )
        found += [(p, q) for p in sides[0] for q in sides[1]]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------------- the dense Hessian


def _explainable(transformed: Any, planned: Callable[..., Plan | Lift | Colored]) -> Any:
    transformed.planned = planned
    return transformed


def _require_scalar_value(problem: Problem) -> None:
    value = problem.seen.value
    if not problem.is_scalar:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"{problem.verb}: f must return a scalar tensor (shape ()), got {got}. hessian takes vector-valued f too."
        )


def _whole(space: Space, leaf: int) -> Piece:
    return Piece(leaf, range(space.sizes[leaf]))


def _bytes_of(space: Space, p: int, q: int) -> int:
    return space.sizes[p] * space.sizes[q] * torch.promote_types(space.dtypes[p], space.dtypes[q]).itemsize


def _dense_bytes(space: Space) -> int:
    return sum(_bytes_of(space, p, q) for p in space.leaves for q in space.leaves)


def _because(plan: Plan, reason: str) -> Plan:
    """The plan by rows, and why a risk is not lifted."""
    return dataclasses.replace(plan, route=f"{plan.route} because {reason}") if reason else plan


def _dense_plan(problem: Problem, symmetric: bool, out: Tensor | None, recorded: Callable[..., Record | None]) -> Plan:
    space, order = problem.space, problem.seen.order
    output = _dense_bytes(space)
    if not problem.is_scalar:
        outputs = Output.of(problem.verb, problem.seen.value, has_aux=False)[0].space.dim
        wanted = [(_whole(space, leaf), tuple(space.leaves)) for leaf in space.leaves]
        plan = plan_rows(problem, wanted, output=output * outputs, copies=max(1, outputs))
        return dataclasses.replace(plan, route="dense rows of each output")
    columns = {leaf: tuple(order[i if symmetric else 0 :]) for i, leaf in enumerate(order)}
    record = recorded(Blocks(problem, columns, symmetric=symmetric, out=out).held)
    wanted = [(piece, columns[leaf]) for leaf in order for piece in (record.missing(leaf) if record else [_whole(space, leaf)])]
    plan = plan_rows(problem, wanted, output=0 if out is not None else output)
    return _taken_up(dataclasses.replace(plan, columns=columns), record)


def _dense(plan: Plan | Lift | Colored, symmetric: bool, out: Tensor | None) -> Tree:
    problem, space = plan.problem, plan.problem.space
    if isinstance(plan, Plan) and not problem.is_scalar:
        return hessian_of_each_output(plan)
    pairs = [(p, q) for p in space.leaves for q in space.leaves]
    blocks = Blocks(problem, plan.columns if isinstance(plan, Plan) else {}, symmetric=symmetric, out=out)
    with blocks.told():
        if isinstance(plan, Lift):
            found = lifted_blocks(plan, pairs, out)
        elif isinstance(plan, Colored):
            found = colored_blocks(plan, pairs, out)
        else:
            _fill(blocks, plan)
            found = {(p, q): blocks.block(p, q) for p, q in pairs}
    return space.unpack([space.unpack([found[p, q] for q in space.leaves]) for p in space.leaves])


def _fill(blocks: Blocks, plan: Plan) -> None:
    record = plan.record
    with record.open() if record else contextlib.nullcontext():
        if record:
            blocks.take_up(record.done, bool(record.by_columns))
        for chunk in evaluate(plan):
            blocks.add(chunk)
            if record:
                record.add(_numbers(plan.problem.space, chunk.pieces), blocks.by_columns)
            del chunk  # before the next is computed
