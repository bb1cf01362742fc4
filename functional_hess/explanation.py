"""What a call of the dense family would do, before it does it.

``hessian(f)`` and its kin bear the function that plans a call. :func:`explain` makes the plan and does not carry it out: it tells
the route (rows, lifted, colored) and why, the mode of differentiation of the first row, the repairs, the chunks, the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import NOT_WORTH_ASKING, WORKING_SET, megabytes
from functional_hess.colored import Colored
from functional_hess.lifting import Lift, repairs_of
from functional_hess.nesting import is_outermost
from functional_hess.products import FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE
from functional_hess.rows import Plan, refined, try_one_row
from functional_hess.tree import Space

__all__ = ["Explanation", "explain"]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would do; printable. Sizes are bytes.

    ``row_error`` is the estimated error of the first row and ``row_size`` its largest entry; both are ``None`` but in mode
    ``"finite-difference"``.
    """

    verb: str
    dim: int
    rows: int
    route: str
    mode: str
    repairs: tuple[str, ...]
    chunk_size: int
    chunks: int
    groups: int
    output_bytes: int
    working_bytes: float
    estimate: str
    row_error: float | None = None
    row_size: float | None = None

    def __str__(self) -> str:
        lines = [
            ("rows", f"{self.rows:,} of {self.dim:,} coordinates, route {self.route}"),
            ("mode", self.mode),
            ("repairs", ", ".join(self.repairs) or "none needed"),
            ("chunks", f"{self.chunks:,} of up to {self.chunk_size:,} rows, in {self.groups} groups of leaves"),
            ("result", megabytes(self.output_bytes)),
            ("working set", f"{megabytes(self.working_bytes)} ({self.estimate})"),
        ]
        if self.row_error is not None:
            lines.append(
                ("error", f"estimated {self.row_error:.1e} in the first row, whose largest entry is {self.row_size:.3g}")
            )
        return "\n".join([self.verb, *(f"  {name:<12}{text}" for name, text in lines)])


def explain(transformed: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What ``transformed(*args)`` would do: mode, repairs, chunk, rows, memory. Computes a single row, to know the mode.

    Args:
        transformed: a result of ``hessian``, ``hessian_rows``, ``hessian_blocks``, ``hessian_diagonal`` or
            ``value_grad_and_hessian``.

    Raises:
        TypeError: ``transformed`` is something else.

    Example:
        >>> import torch
        >>> from functional_hess import hessian
        >>> explain(hessian(lambda x: (x**3).sum()), torch.ones(5)).mode
        'reverse-over-reverse'
    """
    planned = getattr(transformed, "planned", None)
    if planned is None:
        raise TypeError(
            "explain: transformed must be what hessian, hessian_rows, hessian_blocks or hessian_diagonal return, got "
            f"{type(transformed).__name__}. Write explain(hessian(f), x)."
        )
    plan: Plan | Lift | Colored = planned(*args, **kwargs)
    if isinstance(plan, Lift):
        return _explained_lift(plan)
    if isinstance(plan, Colored):
        return _explained_coloring(plan)
    problem = plan.problem
    row = try_one_row(plan if problem.is_scalar else _of_the_sum(plan)) if plan.groups else (problem.options.mode, (), None)
    mode, repairs, by_differences = row
    estimate = plan.estimate
    if mode == REVERSE_OVER_REVERSE and problem.is_scalar and is_outermost():
        spare = max(plan.estimate.working(plan.chunk), NOT_WORTH_ASKING if problem.options.memory_limit is None else 0)
        estimate = refined(problem, plan.groups, plan.estimate, plan.held, spare, plan.chunk)
    return Explanation(
        verb=problem.verb,
        dim=problem.space.dim,
        rows=plan.rows,
        route=plan.route,
        mode=mode,
        repairs=repairs,
        chunk_size=plan.chunk,
        chunks=plan.chunks,
        groups=len(plan.groups),
        output_bytes=plan.output,
        working_bytes=estimate.working(plan.chunk),
        estimate=estimate.source,
        row_error=by_differences.error if by_differences else None,
        row_size=by_differences.size if by_differences else None,
    )


def _of_the_sum(plan: Plan) -> Plan:
    """The plan of the sum of all outputs of f, which takes the mode and the repairs that each of them takes."""
    problem = plan.problem

    def summed(*x: Tensor) -> tuple[Tensor, None]:
        out = problem.bound.split(x, problem.options.has_aux)[0]
        return torch.stack([t.sum() for t in Space.of(out, "f(x)").pack(out, "f(x)")]).sum(), None

    return dataclasses.replace(plan, problem=dataclasses.replace(problem, scalar=summed))


def _explained_lift(plan: Lift) -> Explanation:
    """Rows are directions here: units of affine sites, and entries of the leaves that are seeded directly."""
    return Explanation(
        verb=plan.problem.verb,
        dim=plan.problem.space.dim,
        rows=plan.directions,
        route="lifted",
        mode=FORWARD_OVER_REVERSE,
        repairs=repairs_of(plan),
        chunk_size=min(plan.at_once, plan.directions),
        chunks=-(-plan.directions // plan.at_once),
        groups=len(plan.groups),
        output_bytes=plan.output,
        working_bytes=WORKING_SET,
        estimate="bound kept by microbatches",
    )


def _explained_coloring(plan: Colored) -> Explanation:
    """Rows are products here."""
    return Explanation(
        verb=plan.problem.verb,
        dim=plan.problem.space.dim,
        rows=plan.products,
        route="colored",
        mode=REVERSE_OVER_REVERSE,
        repairs=plan.repairs,
        chunk_size=plan.chunk,
        chunks=-(-plan.products // plan.chunk),
        groups=1,
        output_bytes=plan.output,
        working_bytes=WORKING_SET,
        estimate="bound",
    )
