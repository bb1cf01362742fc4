"""Plans of sparse matrices: what a plan holds, how it computes, and when it looks again.

A plan has a pattern and a coloring, and the products of its function written down once (:mod:`functional_hess.prepared`).
Calling it computes

    B = A S,    S the (n, k) sums of unit vectors of one color each,        values[e] = B[places[e]],

k products and a copy, whatever n. No n x n matrix is ever made, unless it is asked for.

What a plan believes, and when it looks again. A pattern that was detected is a property of the program, so it holds at every
x; it is held to a product with a random vector (the *certificate*) at the plan's first call. The certificate is computed anew by
the program as it then is, so it also exposes a graph that has gone stale. It is repeated whenever something that the pattern or
the graph rests on may be another: a captured tensor was written to or replaced, a captured number changed, integers among the
arguments differ from those that the pattern was detected for. A pattern that was given, or read from a file, is held to a random
product in every call; and so is every result inside ``checked()``, there to differences of the gradient too. A result that is not
what it should be is a :class:`~functional_hess.sparsity.SparsityError`.

Not seen is the replacement of what lies beyond :mod:`functional_hess.captures`, such as an attribute of a Python module: pass it
as an argument, or make the plan anew.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_hess.captures import Held, held_by
from functional_hess.chunking import Estimate, megabytes, progress_bar, require_room
from functional_hess.coloring import Coloring, distance_1_coloring, recovery, recovery_of_diagonal
from functional_hess.compressed import Compression, Factors, Multiply, colors_at_once, joined, summed_units
from functional_hess.guards import out_of_memory
from functional_hess.nesting import is_outermost
from functional_hess.patterns import SparsityPattern
from functional_hess.prepared import Prepared, prepare
from functional_hess.rows import Problem
from functional_hess.sparsity import Captured, Detection, SparsityError
from functional_hess.structure import write_structure
from functional_hess.tasks import HESSIAN, Task
from functional_hess.tree import Space, signature, signature_differences, tensors_of
from functional_hess.verification import begin, inside_checked, unchecked

__all__ = ["DETECTED", "GIVEN", "LOADED", "WHOLE", "Memo", "SparsePlan", "leaves_of"]

Tree = Any
Tensors = tuple[Tensor, ...]
DETECTED, GIVEN, LOADED = "detected", "given", "loaded"
WHOLE, DIAGONAL = "whole", "diagonal"
LAYOUTS = (torch.sparse_csr, torch.sparse_coo, torch.strided)
# How far an entry of A v may be off: a part of what it is the sum of, and a part of the largest such sum.
TOLERANCES = {torch.float64: (1e-8, 1e-10), torch.float32: (1e-3, 1e-4)}
ROUGH = (5e-2, 5e-2)  # for the shorter formats
NOISE = 100  # times what a change of x in its last place does is no disagreement


# ---------------------------------------------------------------------------------------------------- plans


@dataclasses.dataclass(frozen=True)
class _Route:
    """How entries are computed: what is multiplied, how many products at once, and the graph that was written down of it."""

    compression: Compression
    chunk: int
    estimate: Estimate
    output: int
    run: Callable[[Tensors], Tensors] | None
    graphs: tuple[Prepared, ...] = ()
    eager_because: str = ""


class Memo:
    """What a plan has worked out, and what it has met so far."""

    def __init__(self) -> None:
        self.signature: tuple[Any, tuple[Any, ...]] | None = None
        self.routes: dict[str, _Route] = {}
        self.certified: set[str] = set()
        self.fixed: tuple[tuple[int, Captured, Tensor], ...] = ()
        self.held: tuple[Held, ...] = ()
        self.captured: tuple[Captured, ...] = ()
        self.replaced: tuple[str, ...] = ()
        self.indices: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self.probes: dict[tuple[torch.dtype, torch.device], Tensor] = {}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SparsePlan:
    """What :func:`sparse_hessian` and :func:`sparse_jacobian` return: call it at points like the one it was made at.

    ``pattern`` says where the matrix may differ from zero, ``coloring`` which columns (or rows) are multiplied together, and
    ``origin`` whether the pattern was ``"detected"``, ``"given"`` or ``"loaded"``. ``print`` shows all that, and a small picture.
    """

    verb: str
    pattern: SparsityPattern
    coloring: Coloring
    origin: str
    notes: tuple[str, ...]
    _task: Task
    _leaves: tuple[tuple[str, tuple[int, ...]], ...]  # paths and shapes of the leaves of x
    _memo: Memo

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self.pattern.shape

    @property
    def nonzeros(self) -> int:
        """How many entries may differ from zero."""
        return self.pattern.nonzeros

    @property
    def colors(self) -> int:
        """How many products a call takes."""
        return self.coloring.count

    # ------------------------------------------------------------------------------------------------ results

    def __call__(self, *args: Any, layout: torch.layout = torch.sparse_csr) -> Tensor:
        """The matrix at ``args``, in the coordinates of :class:`~functional_hess.tree.Space`.

        Args:
            args: x, and further arguments of f: like those that the plan was made with, with other numbers.
            layout: ``torch.sparse_csr``, ``torch.sparse_coo``, or ``torch.strided`` for a dense matrix.

        Raises:
            SparsityError: the entries do not agree with a product with a random vector; or the call is inside another transform,
                where ``values`` and ``layout=torch.strided`` are for.
            ValueError: the arguments differ in structure, shape, dtype or device from those that the plan was made with.
            MemoryLimitError: a dense matrix, or the products, do not fit.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"{self.verb}: layout must be one of {', '.join(map(str, LAYOUTS))}, got {layout}.")
        m, n = self.shape
        if layout == torch.strided:
            self._require_room_for_all(self._task.bound(args).space)
        elif not is_outermost():
            raise SparsityError(
                f"{self.verb}: inside another transform there are no sparse tensors. Take plan.values(...), which has the "
                "entries in the order of plan.pattern, or layout=torch.strided."
            )
        values = self.values(*args)
        crow, columns, rows = self._indices(values.device)
        if layout == torch.strided:
            return values.new_zeros(m * n).index_copy(0, rows * n + columns, values).view(m, n)
        if layout == torch.sparse_coo:
            both = torch.stack([rows, columns])
            return torch.sparse_coo_tensor(both, values, (m, n), is_coalesced=True, check_invariants=False)
        return _csr(_copied_late(crow), _copied_late(columns), values, (m, n))

    def _require_room_for_all(self, space: Space) -> None:
        cure = "Leave layout= out for a sparse tensor, or take plan.diagonal or plan.values."
        size = self.shape[0] * self.shape[1] * space.dtype.itemsize
        require_room(self.verb, "the dense matrix", size, space.device, self._task.options.memory_limit, cure)

    def values(self, *args: Any) -> Tensor:
        """The entries alone, a tensor of shape (nonzeros,): entry e stands at ``pattern.rows[e], pattern.indices[e]``.

        Composes with every transform: ``vmap(plan.values)(xs)``. Inside one nothing can be certified, so there a plan must be of
        a detected pattern, or have been called outside before.
        """
        return self._computed(WHOLE, args)

    def diagonal(self, *args: Any) -> Tree:
        """The diagonal of the Hessian, a tree like x, from a distance-1 coloring: often fewer products than the whole.

        Raises:
            TypeError: the plan is of a Jacobian.
        """
        return self._task.bound(args).space.unravel(self._diagonal(args, "diagonal"))

    def trace(self, *args: Any) -> Tensor:
        """The sum of the diagonal, as :meth:`diagonal`."""
        return self._diagonal(args, "trace").sum()

    def to_scipy(self, *args: Any) -> Any:
        """The matrix as a ``scipy.sparse.csr_array``, for the solvers of scipy (the extra ``sparse``)."""
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ImportError(f"{self.verb}: to_scipy needs scipy: pip install 'functional_hess[sparse]'.") from error
        values = self.values(*args).detach().cpu().numpy()
        narrow = np.int32 if max(*self.shape, self.nonzeros) < 2**31 else np.int64
        return csr_array((values, self.pattern.indices.astype(narrow), self.pattern.indptr.astype(narrow)), shape=self.shape)

    def save(self, path: str | Path) -> None:
        """Write the pattern, the coloring and the options to a file, for :func:`load_plan`; the function is not written."""
        task = self._task
        header = {"verb": self.verb, "argnums": task.argnums, "leaves": self._leaves}
        header |= {"has_aux": task.options.has_aux, "mode": task.options.mode, "randomness": task.options.randomness}
        write_structure(path, self.pattern, self.coloring, header)

    def _diagonal(self, args: Sequence[Any], what: str) -> Tensor:
        if self.verb != HESSIAN:
            raise TypeError(
                f"{self.verb}: {what} is for plans of sparse_hessian. Read it off plan(x).to_dense() of a square matrix."
            )
        if inside_checked() and is_outermost():
            values = self.values(*args)
            _, columns, rows = self._indices(values.device)
            return values.new_zeros(self.shape[0]).index_add(0, rows, torch.where(rows == columns, values, 0))
        return self._computed(DIAGONAL, args)

    def __repr__(self) -> str:
        (m, n), nonzeros = self.shape, self.nonzeros
        name, share = getattr(self._task.f, "__name__", type(self._task.f).__name__), nonzeros / max(m * n, 1)
        lines = [
            f"{self.verb}({name}): {m:,} x {n:,}, {nonzeros:,} nonzero{'' if nonzeros == 1 else 's'} ({share:.2g} of all)",
            f"  pattern {self.origin}; {self.coloring!r}",
            *(f"  {note}" for note in self.notes),
        ]
        for what, route in self._memo.routes.items():
            lines += _told(what, route)
        if self._memo.replaced:
            lines.append(f"  computed eagerly: {', '.join(self._memo.replaced)} replaced since the plan was made")
        return "\n".join([*lines, self.pattern.picture()])

    # ------------------------------------------------------------------------------------------------ one call

    def _computed(self, what: str, args: Sequence[Any]) -> Tensor:
        """The entries of the whole or of the diagonal, certified where they are not known to be right."""
        memo, tensors = self._memo, tensors_of(tuple(args))[0]
        self._require_alike(args)
        if not is_outermost():
            self._require_trust(tensors)
            return self._eagerly(what, args, None, evidence=False)[0]
        check = begin(self._task.bound(args), self._task.options.has_aux, self._task.options.randomness) if self._checks else None
        route = memo.routes.get(what) or self.routed(what, args)
        doubted = self._doubted(tensors)
        first = doubted or check is not None or what not in memo.certified
        watched = torch.is_grad_enabled() and any(t.requires_grad for t in itertools.chain(tensors, self._captured_tensors))
        if route.run is None or memo.replaced or watched:
            entries, *evidence = self._eagerly(what, args, route, evidence=first or self.origin != DETECTED)
        else:
            B, *evidence = route.run(tensors)
            entries = route.compression.read(B)
            if first:
                evidence = self._task.with_factors(args, functools.partial(self._evidence, what, route.compression, route.chunk))
        if evidence and self._agree(what, args, entries.detach(), [t.detach() for t in evidence]):
            memo.certified.add(what)
            memo.captured = tuple(Captured.of(c.tensor) for c in memo.captured)
        if check is not None:
            self._tell(check, entries.detach(), self._task.bound(args).space)
        return entries

    @property
    def _checks(self) -> bool:
        return self.verb == HESSIAN and inside_checked()

    def _tell(self, check: Any, values: Tensor, space: Space) -> None:
        """H v, of the values, held to the laws of a product."""
        v = self._probe(space)
        _, columns, rows = self._indices(values.device)
        product = torch.zeros_like(v).index_add_(0, rows, values * v[columns])
        parts = [dict(enumerate(space.pack(space.unravel(t)))) for t in (v, product)]
        check.product(parts[0], tuple(parts[1].values()))

    def _require_alike(self, args: Sequence[Any]) -> None:
        memo = self._memo
        if memo.signature is None:
            self.begin(args, None)
            return
        differences = signature_differences(memo.signature, tuple(args), "args")
        if differences:
            told = "; ".join(differences)
            raise ValueError(f"{self.verb}: the plan was made for other arguments: {told}. Make a new plan for these.")

    def begin(self, args: Sequence[Any], found: Detection | None) -> None:
        """Remember what the plan is made for."""
        memo, space = self._memo, self._task.bound(args).space
        leaves = leaves_of(space)
        if self._leaves != leaves:
            raise ValueError(
                f"{self.verb}: the plan is for x with leaves {_listed(self._leaves)}, got {_listed(leaves)}. Make a new plan for "
                "this x."
            )
        memo.signature = signature(tuple(args))
        memo.held = held_by(self._task.f)
        tensors = tensors_of(tuple(args))[0]
        if found is not None:
            memo.fixed = tuple(
                (i, Captured.of(t), t.detach().clone())
                for i, t in enumerate(tensors)
                if found.rests_on_args or not t.is_floating_point()
            )
        captured = [*(found.captured if found else ()), *(Captured.of(t) for held in memo.held for t in held.tensors())]
        memo.captured = tuple({id(c.tensor): c for c in captured}.values())

    @property
    def _captured_tensors(self) -> Sequence[Tensor]:
        return [c.tensor for c in self._memo.captured]

    def _doubted(self, tensors: Tensors) -> bool:
        """Whether something is not as it was when the pattern was found and the graph was written down."""
        memo = self._memo
        if not memo.replaced:
            memo.replaced = tuple(held.name for held in memo.held if held.replaced)
        return bool(memo.replaced) or any(c.changed for c in memo.captured) or self._other_integers(tensors)

    def _other_integers(self, tensors: Tensors) -> bool:
        """Whether arguments that the pattern rests on are others."""
        for i, seen, copy in self._memo.fixed:
            if (tensors[i] is not seen.tensor or seen.changed) and not torch.equal(tensors[i], copy):
                return True
        return False

    def _require_trust(self, tensors: Tensors) -> None:
        memo = self._memo
        others = any(tensors[i] is not seen.tensor or seen.changed for i, seen, _ in memo.fixed)
        others = others or any(c.changed for c in memo.captured) or any(held.replaced for held in memo.held)
        if others or (self.origin != DETECTED and WHOLE not in memo.certified):
            raise SparsityError(
                f"{self.verb}: inside another transform entries cannot be certified, and this plan needs it (its pattern was not "
                "detected and never certified, or what it rests on has changed). Call it once outside, or make a new plan."
            )

    # ------------------------------------------------------------------------------------------------ how it is computed

    def routed(self, what: str, args: Sequence[Any], problem: Problem | None = None) -> _Route:
        """The route, made at the first call that needs it."""
        problem, space = problem or self._task.look(args), self._task.bound(args).space
        compression = self._compression(what)
        entries = self.nonzeros if what == WHOLE else self.shape[0]
        output = entries * (space.dtype.itemsize + 2 * 8)  # values, and where they stand
        more = 1 if self.origin != DETECTED else 0
        chunk, estimate = colors_at_once(problem, compression.coloring.count + more, output)
        route = self._written_down(what, args, _Route(compression, chunk, estimate, output, None))
        self._memo.routes[what] = route
        return route

    def _compression(self, what: str) -> Compression:
        if what in self._memo.routes:
            return self._memo.routes[what].compression
        if what == WHOLE:
            return Compression(self.pattern, self.coloring, recovery(self.pattern, self.coloring))
        coloring = distance_1_coloring(self.pattern)
        return Compression(self.pattern, coloring, recovery_of_diagonal(self.pattern, coloring))

    def _use(self, what: str, route: _Route | None, evidence: bool) -> Callable[[Factors], Tensors]:
        """What is asked of the factors: all products, end to end, and what their entries are held to."""
        compression = route.compression if route else self._compression(what)
        chunk = route.chunk if route else max(compression.coloring.count, 1)

        def use(factors: Factors) -> Tensors:
            B = factors.products(compression, chunk)
            return (B, *(self._evidence(what, compression, chunk, factors) if evidence else ()))

        return use

    def _eagerly(self, what: str, args: Sequence[Any], route: _Route | None, *, evidence: bool) -> Tensors:
        use = self._use(what, route, evidence)
        count = route.compression.coloring.count if route else 0
        shown = self._task.options.progress and route is not None and count > route.chunk
        with progress_bar(self.verb, count, shown) as advance:
            B, *others = self._task.with_factors(args, lambda factors: use(_counted(factors, advance) if shown else factors))
        return ((route.compression if route else self._compression(what)).read(B), *others)

    def _written_down(self, what: str, args: Sequence[Any], route: _Route) -> _Route:
        """The route with a graph that repeats its arithmetic; as it is, and why, where there can be none."""
        use, space = self._use(what, route, self.origin != DETECTED), self._task.bound(args).space
        own = (*route.compression.on(space.device), self._probe(space))
        write = functools.partial(prepare, backend=self._task.backend, constants=own)
        try:
            with unchecked():
                if route.compression.coloring.count <= route.chunk:
                    graph = write(_named(self._task.f, lambda *given: self._task.with_factors(given, use)), *args)
                    return dataclasses.replace(route, run=graph.repeated, graphs=(graph,))
                return self._written_in_chunks(args, route, write, use)
        except Exception as error:
            if out_of_memory(error):
                raise
            text = " ".join(str(error).split()).partition(": ")[2] or str(error)
            return dataclasses.replace(route, eager_because=text.split(". ")[0].rstrip("."))

    def _written_in_chunks(
        self, args: Sequence[Any], route: _Route, write: Callable[..., Prepared], use: Callable[[Factors], Tensors]
    ) -> _Route:
        """A graph of one chunk of products, and another with the transpose where rows are colored."""
        domain, codomain = self._task.with_factors(args, lambda factors: (factors.domain, factors.codomain))
        of_columns, of_rows, _ = route.compression.on(domain.device)
        if not len(of_columns) and self.origin != DETECTED:  # the certificate multiplies with columns
            of_columns = torch.zeros(domain.dim, dtype=torch.int32, device=domain.device)
        graphs: dict[str, Prepared] = {}
        for side, space, colors in (("columns", domain, of_columns), ("rows", codomain, of_rows)):
            if len(colors):
                multiply = functools.partial(self._multiplied, side)
                v = summed_units(space, colors, range(route.chunk))
                graphs[side] = write(_named(self._task.f, multiply), tuple(args), v)

        def run(tensors: Tensors) -> Tensors:
            sides = {side: _padded(graph, tensors, route.chunk) for side, graph in graphs.items()}
            shown = self._task.options.progress
            with progress_bar(self.verb, route.compression.coloring.count, shown) as advance:
                factors = Factors(domain, codomain, sides.get("columns"), sides.get("rows"))
                return use(_counted(factors, advance) if shown else factors)

        return dataclasses.replace(route, run=run, graphs=tuple(graphs.values()))

    def _multiplied(self, side: str, args: Sequence[Any], v: dict[int, Tensor]) -> Tensors:
        return self._task.with_factors(args, lambda factors: tuple(getattr(factors, side)(v)))

    # ------------------------------------------------------------------------------------------------ the certificate

    def _probe(self, space: Space) -> Tensor:
        """A random vector, of entries between 1 and 2 in magnitude."""
        key = (space.dtype, space.device)
        if key not in self._memo.probes:
            generator = torch.Generator().manual_seed(0)
            size, sign = (torch.rand(space.dim, generator=generator, dtype=torch.float64) for _ in range(2))
            self._memo.probes[key] = torch.where(sign < 0.5, -1 - size, 1 + size).to(space.device, space.dtype)
        return self._memo.probes[key]

    def _evidence(self, what: str, compression: Compression, chunk: int, factors: Factors) -> Tensors:
        """What the entries are held to: A v for a random v; and of the diagonal of H that of V^-1 H V, which is the same.

        Where columns of one color share a row, what leaks from one into the other depends on v.
        """
        space, columns = factors.domain, factors.columns
        assert columns is not None
        v = self._probe(space)
        parts = {
            leaf: part.to(space.devices[leaf], space.dtypes[leaf]).view(1, *space.shapes[leaf])
            for leaf, part in enumerate(v.split(space.sizes))
        }
        product = joined(factors.codomain, columns(parts))[0]
        if what == WHOLE:
            return (product,)

        def scaled(s: dict[int, Tensor]) -> Tensors:
            rows = columns({leaf: t * parts[leaf] for leaf, t in s.items()})
            return tuple(t / parts[leaf] for leaf, t in enumerate(rows))

        return Factors(space, space, scaled, None).entries(compression, chunk), product

    def _agree(self, what: str, args: Sequence[Any], entries: Tensor, evidence: Sequence[Tensor]) -> bool:
        """Whether the entries are what they should be; not, without an error, where numbers are not finite.

        Raises:
            SparsityError: they are not.
        """
        rtol, floor = self._tolerances(self._task.bound(args).space)
        if what == WHOLE:
            v = self._memo.probes[entries.dtype, entries.device]
            _, columns, rows = self._indices(entries.device)
            terms = entries * v[columns]
            got, size = (torch.zeros_like(evidence[0]).index_add_(0, rows, t) for t in (terms, terms.abs()))
            largest = size
        else:
            got, size, largest = entries, entries.abs(), torch.maximum(entries.abs(), evidence[1].abs())
        expected = evidence[0]
        if not expected.numel():
            return True
        finite = got.isfinite() & expected.isfinite()
        allowed = rtol * size + floor * torch.where(finite, largest, 0).max()
        off = torch.where(finite, (got - expected).abs() - allowed, 0)
        if bool((off > 0).any()) and float(off.max()) > NOISE * self._noise(what, args, evidence):
            row = int(off.argmax())
            raise SparsityError(self._disagreement(what, row, float(got[row]), float(expected[row])))
        return bool(finite.all())

    def _tolerances(self, space: Space) -> tuple[float, float]:
        """Those of the shortest format among the leaves; wider by differences."""
        pairs = [TOLERANCES.get(dtype, ROUGH) for dtype in space.dtypes]
        if self._task.options.mode == "finite-difference":
            pairs.append((1e-4, 1e-4))
        return max(pairs)

    def _noise(self, what: str, args: Sequence[Any], evidence: Sequence[Tensor]) -> float:
        """How far rounding moves what entries are held to: by x changed in its last place.

        An entry that is the difference of large numbers, or should be zero, is off by more than its size tells.
        """
        compression = self._memo.routes[what].compression
        use = functools.partial(self._evidence, what, compression, max(compression.coloring.count, 1))
        with torch.no_grad():
            moved = [self._task.with_factors(args, use, by)[0] - evidence[0] for by in (1, 2, 4)]
        return max(float(t.nan_to_num(0, 0, 0).abs().max()) for t in moved)

    def _disagreement(self, what: str, row: int, got: float, expected: float) -> str:
        name = f"row {row}"
        if self.verb == HESSIAN:
            name = next(itertools.islice(_coordinates(self._leaves), row, None))
        law = "A v along a random v" if what == WHOLE else "the diagonal"
        cause = {
            DETECTED: "f is not what it was (something that it holds, or integers among its arguments): make a new plan",
            GIVEN: "the pattern that was given lacks entries: leave it out to have it detected",
            LOADED: "the file is of another function: make a new plan",
        }[self.origin]
        skew = "its derivatives are not symmetric (a custom backward, no_grad inside): take sparse_jacobian(grad(f), x)"
        return (
            f"{self.verb}: {law} disagrees with a product: at {name} the entries give {got:.6g}, the product {expected:.6g}. "
            f"Either {cause}{f'; or {skew}' if self.verb == HESSIAN else ''}."
        )

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Row starts, columns and rows of the entries."""
        if device not in self._memo.indices:
            arrays = (self.pattern.indptr, self.pattern.indices, self.pattern.rows)
            crow, columns, rows = (torch.tensor(a, dtype=torch.int64, device=device) for a in arrays)
            self._memo.indices[device] = (_copied_late(crow), _copied_late(columns), rows)
        return self._memo.indices[device]


def _copied_late(t: Tensor) -> Tensor:
    """The same numbers: they are copied when one of the two is written to, which hardly anyone ever does with indices."""
    return torch.ops.aten._lazy_clone.default(t)


def _csr(crow: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _announce_csr()
    return torch.sparse_csr_tensor(crow, columns, values, shape, check_invariants=False)


@functools.cache
def _announce_csr() -> None:
    """torch says once a process that the layout is in beta, which is no user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)


def _counted(factors: Factors, advance: Callable[[int], Any]) -> Factors:
    def count(multiply: Multiply | None) -> Multiply | None:
        def counted(v: dict[int, Tensor]) -> Tensors:
            assert multiply is not None
            result = multiply(v)
            advance(len(next(iter(v.values()))))
            return result

        return counted if multiply else None

    return dataclasses.replace(factors, columns=count(factors.columns), rows=count(factors.rows))


def _padded(graph: Prepared, tensors: Tensors, chunk: int) -> Multiply:
    """Products by a graph that was written down for ``chunk`` vectors, of as many or fewer."""

    def multiply(v: dict[int, Tensor]) -> Tensors:
        k = len(next(iter(v.values())))
        full = [t if k == chunk else torch.cat([t, t.new_zeros(chunk - k, *t.shape[1:])]) for t in v.values()]
        return tuple(t[:k] for t in graph.repeated((*tensors, *full)))

    return multiply


def _named(f: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` under the name of f, whose captured tensors are told by name."""
    return functools.wraps(f, updated=())(call)


def leaves_of(space: Space) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((path, tuple(shape)) for path, shape in zip(space.paths, space.shapes, strict=True))


def _listed(leaves: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{path or 'x'} {tuple(shape)}" for path, shape in leaves)


def _coordinates(leaves: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[str]:
    for path, shape in leaves:
        for index in np.ndindex(*shape):
            yield (path or "x") + (f"[{', '.join(map(str, index))}]" if shape else "")


def _told(what: str, route: _Route) -> list[str]:
    count = route.compression.coloring.count
    at_once = min(route.chunk, max(count, 1))
    products = f"{count:,} product{'' if count == 1 else 's'}, up to {at_once:,} at a time"
    working = f"working set {megabytes(route.estimate.working(at_once))} ({route.estimate.source})"
    lines = [f"  {what}: {products}; result {megabytes(route.output)}, {working}"]
    if route.eager_because:
        lines.append(f"    computed eagerly: {route.eager_because}")
    for graph in route.graphs:
        lines.append(f"    prepared: {graph.operations} operations ({graph.backend})")
        lines += [f"    captured {captured}" for captured in graph.captured]
    return lines
