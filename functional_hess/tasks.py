"""The function whose matrix of derivatives is wanted, and how that matrix is multiplied with vectors.

A :class:`Task` is bound to arguments when it is asked for products: a Hessian by Hessian-vector products in the first mode that
has every rule, a Jacobian by columns in forward mode and by rows in reverse. What is done with the products is told in
:mod:`functional_hess.compressed`, and what is believed of them in :mod:`functional_hess.plans`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from functional_hess.compressed import Factors, pushed
from functional_hess.guards import Replay
from functional_hess.levels import flat_vjp, flat_vmap
from functional_hess.products import MANY_PRODUCTS, first_mode_that_works, product_at, rows_of
from functional_hess.rows import Options, Problem, look
from functional_hess.transforms import Bound, Output, bind
from functional_hess.verification import unchecked

__all__ = ["HESSIAN", "JACOBIAN", "Task"]

Tensors = tuple[Tensor, ...]
T = TypeVar("T")
HESSIAN, JACOBIAN = "sparse_hessian", "sparse_jacobian"


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A function, and how the matrix of its derivatives is multiplied with vectors."""

    verb: str
    f: Callable[..., Any]
    argnums: int | tuple[int, ...]
    options: Options
    backend: str

    def bound(self, args: Sequence[Any]) -> Bound:
        return bind(self.verb, self.f, args, {}, self.argnums)

    def look(self, args: Sequence[Any]) -> Problem:
        with unchecked():
            return look(self.verb, self.f, args, {}, self.argnums, self.options)

    def with_factors(self, args: Sequence[Any], use: Callable[[Factors], T], by: int = 0) -> T:
        """``use`` of the products with the matrix at ``args``, in the first mode that has every rule.

        ``by`` moves x by so many units in its last place, some up and some down.
        """
        bound, options = self.bound(args), self.options
        if by:
            bound = dataclasses.replace(bound, x=tuple(_nudged(t.detach(), by) for t in bound.x))
        with unchecked(), Replay(options.randomness, bound.x, self.verb) as replay:
            if self.verb == JACOBIAN:
                result = use(_of_jacobian(bound, options.has_aux))
            else:

                def attempt(mode: str) -> T:
                    replay.rewind()
                    return use(_of_hessian(bound, mode, replay, options))

                result = first_mode_that_works(self.verb, self.f, bound.x, options.mode, MANY_PRODUCTS, attempt)
            replay.finish(bound.call, bound.x)
        return result


def _nudged(t: Tensor, by: int) -> Tensor:
    sign = torch.arange(t.numel(), device=t.device).view(t.shape) % 3 - 1
    return t * (1 + sign.to(t.dtype) * by * torch.finfo(t.dtype).eps)


def _of_hessian(bound: Bound, mode: str, replay: Replay, options: Options) -> Factors:
    leaves = tuple(bound.space.leaves)
    scalar = replay.each(bound.scalar(options.has_aux))

    def columns(v: dict[int, Tensor]) -> Tensors:
        replay.rewind()
        return rows_of(product, mode, v, options.randomness)

    product = product_at(scalar, bound.x, mode, leaves, leaves, verb=bound.verb)
    return Factors(bound.space, bound.space, columns, None)


def _of_jacobian(bound: Bound, has_aux: bool) -> Factors:
    codomain = Output.of(bound.verb, bound.split(bound.x, has_aux)[0], False)[0].space

    def outputs(*x: Tensor) -> Tensors:
        return codomain.pack(bound.split(x, has_aux)[0], "f(x)")

    @functools.cache
    def pullback() -> Callable[[Tensors], Tensors]:
        return flat_vjp(lambda *x: (outputs(*x), ()), bound.x)[1]

    def rows(u: dict[int, Tensor]) -> Tensors:
        pull = pullback()
        return flat_vmap(lambda *t: pull(t))(*u.values())

    return Factors(bound.space, codomain, pushed(outputs, bound.x), rows)
