"""Sparse Hessians and Jacobians: a plan made once, and as many products as there are colors at every point.

A function that couples each variable with few others has a matrix of derivatives that is mostly zero, and few products tell all
of it. Making a plan finds where the matrix may differ from zero (:mod:`functional_hess.sparsity`, unless the pattern is given),
and which columns may be multiplied together (:mod:`functional_hess.coloring`):

    detect, color:  plan = sparse_hessian(f, x)         multiply, recover:  H = plan(x)

What a plan computes, and how it is certified, is told in :mod:`functional_hess.plans`. A plan can be saved and read again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import require_room
from functional_hess.coloring import Coloring
from functional_hess.levels import flat_vjp, require_dependence
from functional_hess.nesting import is_outermost
from functional_hess.plans import DETECTED, GIVEN, LOADED, WHOLE, Memo, SparsePlan, leaves_of
from functional_hess.prepared import BACKENDS
from functional_hess.rows import Options, Problem
from functional_hess.sparsity import PROOF, Detection, SparsityError, detect_hessian, detect_jacobian
from functional_hess.structure import given_coloring, given_pattern, read_structure
from functional_hess.tasks import HESSIAN, JACOBIAN, Task
from functional_hess.transforms import Output, require_argnums
from functional_hess.tree import tensors_of
from functional_hess.verification import unchecked

__all__ = ["load_plan", "sparse_hessian", "sparse_jacobian"]

Tree = Any
Tensors = tuple[Tensor, ...]


def sparse_hessian(
    f: Callable[..., Any],
    x: Tree,
    *args: Any,
    pattern: Any = None,
    coloring: str | Coloring | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    mode: str = "auto",
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    randomness: str = "error",
    progress: bool = False,
    backend: str = "graph",
) -> SparsePlan:
    """A plan for the Hessian of f, where most of its entries are zero: ``plan(x, *args)`` is a sparse matrix.

    Args:
        f: a scalar function of ``(x, *args)``.
        x: a point, any tree. The plan is for points like it; its numbers do not matter.
        args: further arguments of f. Floating numbers among them may change from call to call, and integers too (a call then
            certifies its result); everything that is no tensor is fixed.
        pattern: where H may differ from zero, if that is known: a scipy matrix, a tensor or an array (its nonzeros),
            ``"diagonal"``, ``"tridiagonal"``, ``banded(r)``, ``blocks(sizes)`` or a
            :class:`~functional_hess.patterns.SparsityPattern`, symmetric, in the coordinates of ``Space``. By default detected.
        coloring: a star coloring of your own.
        argnums: the argument to differentiate by; for several the coordinates are those of the tuple of them.
        has_aux: f returns ``(value, aux)``; aux is dropped.
        mode: ``"auto"`` or one of ``functional_hess.products.MODES``.
        chunk_size, memory_limit: products at a time, as in :func:`~functional_hess.second_order.hessian`.
        randomness: as there; a random function is computed eagerly.
        progress: show a bar where products come in several chunks (needs tqdm).
        backend: ``"graph"``, or ``"inductor"`` to compile the products (seconds to minutes, needs a C++ compiler).

    Returns:
        a :class:`SparsePlan`. Making it costs one evaluation of f, one product run under watch (detection) and two more to write
        the products down; a call costs the arithmetic of as many products as there are colors, all at once. A function that
        cannot be written down (it asks for a value of x, draws random numbers) is computed eagerly, and ``print`` says so. If
        detection cannot judge the program, the pattern is full; where that is too much it is refused.

    Raises:
        SparsityError: the pattern cannot be found and is too large to be taken to be full.
        MemoryLimitError: the products do not fit.
        ValueError: the pattern has another shape, is not symmetric, or does not fit the coloring.

    Source:
        Gebremedhin, Tarafdar, Manne and Pothen (2007), New acyclic and star coloring algorithms with application to computing
        Hessians.

    Example:
        f(x) = sum (x_{i+1} - x_i)^2 / 2 has the second differences for its Hessian, which takes three products whatever n:

        >>> import torch
        >>> def chain(x):
        ...     return ((x[1:] - x[:-1]) ** 2).sum() / 2
        >>> plan = sparse_hessian(chain, torch.zeros(5))
        >>> plan.nonzeros, plan.colors, plan.origin
        (13, 3, 'detected')
        >>> plan(torch.zeros(5)).to_dense()
        tensor([[ 1., -1.,  0.,  0.,  0.],
                [-1.,  2., -1.,  0.,  0.],
                [ 0., -1.,  2., -1.,  0.],
                [ 0.,  0., -1.,  2., -1.],
                [ 0.,  0.,  0., -1.,  1.]])
        >>> plan.diagonal(torch.zeros(5)), plan.trace(torch.zeros(5))
        (tensor([1., 2., 2., 2., 1.]), tensor(8.))
    """
    options = Options(has_aux, mode, chunk_size, memory_limit, randomness, progress=progress)
    return _planned(HESSIAN, f, (x, *args), pattern, coloring, argnums, options, backend)


def sparse_jacobian(
    f: Callable[..., Any],
    x: Tree,
    *args: Any,
    pattern: Any = None,
    coloring: str | Coloring | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    progress: bool = False,
    backend: str = "graph",
) -> SparsePlan:
    """A plan for the Jacobian of f, an (m, n) matrix over the coordinates of f(x) and of x, where most of it is zero.

    Columns that share no row are multiplied together in forward mode, or rows that share no column in reverse mode, whichever
    takes fewer products; where both take many, some rows and some columns.

    Args:
        f: a function of ``(x, *args)`` whose result is any tree with floating tensors.
        coloring: ``"column"``, ``"row"``, ``"bidirectional"``, or a :class:`~functional_hess.coloring.Coloring` of one of these
            kinds. By default the one with fewest products.

    Other arguments, the result and errors are those of :func:`sparse_hessian`.

    Raises:
        DependenceError: f(x) does not depend on x by differentiable operations.

    Source:
        Curtis, Powell and Reid (1974), On the estimation of sparse Jacobian matrices; Coleman and Verma (1998).

    Example:
        >>> import torch
        >>> plan = sparse_jacobian(lambda x: x[1:] * x[:-1], torch.ones(4))
        >>> plan(torch.tensor([1.0, 2.0, 3.0, 4.0])).to_dense()
        tensor([[2., 1., 0., 0.],
                [0., 3., 2., 0.],
                [0., 0., 4., 3.]])
        >>> plan.coloring
        column coloring with 2 colors
    """
    options = Options(has_aux, chunk_size=chunk_size, memory_limit=memory_limit, progress=progress)
    return _planned(JACOBIAN, f, (x, *args), pattern, coloring, argnums, options, backend)


def _planned(
    verb: str, f: Any, args: tuple[Any, ...], pattern: Any, coloring: Any, argnums: Any, options: Options, backend: str
) -> SparsePlan:
    require_argnums(verb, argnums)
    if backend not in BACKENDS:
        raise ValueError(f"{verb}: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")
    if not is_outermost():
        raise SparsityError(
            f"{verb}: a plan cannot be made inside another transform. Make it outside, and call plan.values there."
        )
    task = Task(verb, f, argnums if isinstance(argnums, int) else tuple(argnums), options, backend)
    problem = task.look(args)
    shape, found, notes, symmetric = _shape_of(task, problem), None, (), verb == HESSIAN
    if pattern is None:
        cure = "Pass pattern=, if it is known."
        require_room(verb, "finding the pattern", PROOF * problem.seen.saved, problem.space.device, options.memory_limit, cure)
        with unchecked(), torch.no_grad():
            found = _detected(task, problem, args)
        structure, notes = found.pattern, _notes(found)
    else:
        structure = given_pattern(verb, pattern, shape, symmetric=symmetric)
    origin = GIVEN if pattern is not None or coloring is not None else DETECTED
    colors = given_coloring(verb, structure, coloring, symmetric=symmetric)
    plan = SparsePlan(verb, structure, colors, origin, notes, task, leaves_of(problem.space), Memo())
    plan.begin(args, found)
    plan.routed(WHOLE, args, problem)
    return plan


def _shape_of(task: Task, problem: Problem) -> tuple[int, int]:
    n = problem.space.dim
    if task.verb == HESSIAN:
        problem.scalar(*problem.bound.x)  # refuses what is no scalar
        return n, n
    codomain = Output.of(task.verb, problem.seen.value, False)[0].space

    def outputs(*x: Tensor) -> tuple[Tensors, Tensors]:
        out = codomain.pack(problem.bound.split(x, task.options.has_aux)[0], "f(x)")
        require_dependence(task.verb, out, problem.bound.call, x)
        return out, ()

    flat_vjp(outputs, problem.bound.x)
    return codomain.dim, n


def _detected(task: Task, problem: Problem, args: Sequence[Any]) -> Detection:
    taken = {id(t) for t in problem.bound.x}
    others = tuple(t for t in tensors_of(tuple(args))[0] if id(t) not in taken)
    with problem.replay():
        if task.verb == HESSIAN:
            return detect_hessian(task.verb, task.f, problem.scalar, problem.bound.x, others)
        codomain = Output.of(task.verb, problem.seen.value, False)[0].space

        def outputs(*x: Tensor) -> Tensors:
            return codomain.pack(problem.bound.split(x, task.options.has_aux)[0], "f(x)")

        return detect_jacobian(task.verb, outputs, problem.bound.x, others)


def _notes(found: Detection) -> tuple[str, ...]:
    notes = [f"taken to be full: {found.full_because}"] if found.full_because else []
    if found.widened:
        notes.append(f"without a rule, so taken to connect everything: {', '.join(found.widened)}")
    return tuple(notes)


def load_plan(
    path: str | Path,
    f: Callable[..., Any],
    *,
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    progress: bool = False,
    backend: str = "graph",
) -> SparsePlan:
    """The plan that ``plan.save(path)`` wrote, for the function f, which a file cannot hold.

    Nothing in the file is run when it is read. That its pattern is one of f is certified in every call, as it is of a pattern
    that was given. The first call needs more time than the others: it writes the products down.

    Raises:
        ValueError: the file is no plan, is damaged, or is for other leaves than those of x (at the first call).

    Example:
        >>> import os, tempfile, torch
        >>> f = lambda x: (x[1:] * x[:-1]).sum()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "chain.plan")
        ...     sparse_hessian(f, torch.zeros(4)).save(path)
        ...     plan = load_plan(path, f)
        >>> plan(torch.ones(4)).to_dense()[0], plan.origin
        (tensor([0., 1., 0., 0.]), 'loaded')
    """
    pattern, coloring, header = read_structure("load_plan", path)
    options = Options(header["has_aux"], header["mode"], chunk_size, memory_limit, header["randomness"], progress=progress)
    argnums = header["argnums"]
    task = Task(header["verb"], f, argnums if isinstance(argnums, int) else tuple(argnums), options, backend)
    leaves = tuple((leaf, tuple(shape)) for leaf, shape in header["leaves"])
    return SparsePlan(header["verb"], pattern, coloring, LOADED, (), task, leaves, Memo())
