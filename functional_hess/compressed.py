"""A matrix from as many products as there are colors.

With S the sums of unit vectors of one color each (:mod:`functional_hess.coloring`), B = A S holds every wanted entry of A in a
known place. This floor makes the sums, multiplies them in chunks that fit the memory, and reads the entries off:

    values[e] = B[places[e]],    B the products with columns, then those with rows, laid end to end.

It knows of A only what it is told: how to multiply with stacked vectors of a space. The sums are made from colors where they are
needed, k of n numbers at a time, so that no n x n identity is ever made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from functional_hess.chunking import Estimate, chunk_for, closed_bound
from functional_hess.coloring import Coloring
from functional_hess.guards import missing_rule
from functional_hess.levels import flat_jvp, flat_vjp, flat_vmap
from functional_hess.patterns import SparsityPattern
from functional_hess.rows import Group, Problem, refined
from functional_hess.tree import Space, flat

__all__ = ["Compression", "Factors", "chunk_of_colors", "colors_at_once", "joined", "pushed", "summed_units"]

Tensors = tuple[Tensor, ...]
Multiply = Callable[[dict[int, Tensor]], Tensors]


@dataclasses.dataclass(frozen=True, eq=False)
class Compression:
    """What is multiplied, and where entries are read: ``places`` of each wanted entry, or ``None`` where all of B is wanted."""

    pattern: SparsityPattern
    coloring: Coloring
    places: np.ndarray | None

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Colors of the columns, colors of the rows, places; on the CPU."""
        places = np.empty(0, dtype=np.int64) if self.places is None else self.places
        short = np.int32 if places.max(initial=0) < 2**31 else np.int64
        return _tensor(self.coloring.columns, np.int32), _tensor(self.coloring.rows, np.int32), _tensor(places, short)

    @functools.cached_property
    def _moved(self) -> dict[torch.device, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def read(self, B: Tensor) -> Tensor:
        """The wanted entries, from the products laid end to end."""
        return B if self.places is None else B.index_select(0, self.on(B.device)[2])

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The same on a device, moved there once."""
        if device.type == "cpu":
            return self.tensors
        if device not in self._moved:
            columns, rows, places = self.tensors
            self._moved[device] = (columns.to(device), rows.to(device), places.to(device))
        return self._moved[device]


def _tensor(array: np.ndarray, dtype: type) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=dtype))  # a copy, which torch may own


@dataclasses.dataclass(frozen=True)
class Factors:
    """How to multiply with A: ``columns`` takes stacked vectors v of ``domain`` to A v, ``rows`` u of ``codomain`` to A^T u."""

    domain: Space
    codomain: Space
    columns: Multiply | None
    rows: Multiply | None

    def entries(self, compression: Compression, chunk: int) -> Tensor:
        """The wanted entries of A: as many products as there are colors, ``chunk`` at a time."""
        return compression.read(self.products(compression, chunk))

    def products(self, compression: Compression, chunk: int) -> Tensor:
        """All of B, laid end to end."""
        of_columns, of_rows, _ = compression.on(self.domain.device)
        count = compression.coloring
        parts = [*_products(self.columns, self.domain, of_columns, count.column_colors, self.codomain, chunk)]
        parts += _products(self.rows, self.codomain, of_rows, count.row_colors, self.domain, chunk)
        if not parts:
            return torch.zeros(0, dtype=self.domain.dtype, device=self.domain.device)
        return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1).to(parts[0].dtype) for part in parts])


def _products(multiply: Multiply | None, space: Space, colors: Tensor, count: int, into: Space, chunk: int) -> Iterator[Tensor]:
    for first in range(0, count, chunk):
        assert multiply is not None
        yield joined(into, multiply(summed_units(space, colors, range(first, min(first + chunk, count)))))


def summed_units(space: Space, colors: Tensor, numbers: Sequence[int]) -> dict[int, Tensor]:
    """``{leaf: tensor of shape (k, *shape)}``: vector i is the sum of the unit vectors whose color is the i-th of ``numbers``."""
    wanted = torch.arange(numbers[0], numbers[-1] + 1, dtype=colors.dtype, device=colors.device)
    sums: dict[int, Tensor] = {}
    for leaf, part in enumerate(colors.split(space.sizes)):
        shape = space.shapes[leaf]
        chosen = part.view(shape) == wanted.view(-1, *(1 for _ in shape))
        sums[leaf] = chosen.to(space.devices[leaf], space.dtypes[leaf])
    return sums


def joined(space: Space, stacked: Sequence[Tensor]) -> Tensor:
    """Stacked vectors of a space as one (k, n) tensor in its coordinates."""
    parts = [flat(t).to(space.device, space.dtype) for t in stacked]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def pushed(f: Callable[..., Tensors], x: Tensors) -> Multiply:
    """v -> J v for stacked vectors: forward mode, or the derivative of the pullback where a forward rule is missing."""

    def forward(v: dict[int, Tensor]) -> Tensors:
        return flat_vmap(lambda *u: flat_jvp(lambda *p: (f(*p), ()), x, u)[1])(*v.values())

    def twice_back(v: dict[int, Tensor]) -> Tensors:
        outputs, pull, _ = flat_vjp(lambda *p: (f(*p), ()), x)
        _, push, _ = flat_vjp(lambda *u: (pull(u), ()), tuple(map(torch.zeros_like, outputs)))
        return flat_vmap(lambda *u: push(u))(*v.values())

    def multiply(v: dict[int, Tensor]) -> Tensors:
        try:
            return forward(v)
        except RuntimeError as error:
            if not missing_rule(error):
                raise
        return twice_back(v)

    return multiply


def chunk_of_colors(problem: Problem, colors: int, output: int) -> int:
    """How many products at once; each is against all of x.

    Raises:
        MemoryLimitError: see :func:`functional_hess.chunking.chunk_for`.
    """
    return colors_at_once(problem, colors, output)[0]


def colors_at_once(problem: Problem, colors: int, output: int) -> tuple[int, Estimate]:
    """How many products at once, and the memory that so many take; as :func:`chunk_of_colors`."""
    options, seen, space = problem.options, problem.seen, problem.space
    bound = closed_bound(sum(t.numel() * t.element_size() for t in problem.bound.x), seen.saved, seen.held)
    leaves = tuple(space.leaves)
    group = Group(leaves, leaves, tuple(space.pieces(range(min(colors, space.dim)))))
    return chunk_for(
        problem.verb,
        rows=colors,
        output=output,
        mean_result=seen.saved / seen.calls,
        bound=bound,
        refine=(lambda spare: refined(problem, [group], bound, 0, spare)) if len(group) and problem.is_scalar else None,
        device=space.device,
        memory_limit=options.memory_limit,
        chunk_size=options.chunk_size,
    )
