"""The ways to a Hessian that are compared. Each prepares a call of no arguments, whose return means that the result is there.

Nothing of the result is kept from call to call. JAX compiles while it prepares; nobody else has anything to prepare.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from problems import Instance, Problem, jax
from torch import Tensor

import functional_hess

__all__ = ["CONTENDERS", "LOOP", "OURS", "TORCH_FUNC", "relative_error"]

Run = Callable[[], Any]
LOOP, TORCH_FUNC, OURS = "torch.autograd loop", "torch.func.hessian", "functional_hess"


def _tensors(instance: Instance) -> tuple[Any, list[Tensor]]:
    x = {name: torch.from_numpy(leaf) for name, leaf in instance.x.items()} if isinstance(instance.x, dict) else None
    return x or torch.from_numpy(instance.x), [torch.from_numpy(array) for array in instance.data]


def _autograd(problem: Problem, instance: Instance, *, vectorize: bool) -> Run:
    """``torch.autograd.functional.hessian`` knows tuples, not dicts, and no ``vmap`` around it: many Hessians are a loop."""
    x, data = _tensors(instance)

    def of_leaves(*leaves: Tensor) -> Tensor:
        return problem.torch(dict(zip(x, leaves, strict=True)), *data)

    of_tensor = functools.partial(_with_data, problem.torch, data)
    hessian = functools.partial(torch.autograd.functional.hessian, vectorize=vectorize)
    if instance.batch is not None:
        return lambda: [hessian(of_tensor, point) for point in x]
    return lambda: hessian(of_leaves, tuple(x.values())) if isinstance(x, dict) else hessian(of_tensor, x)


def _with_data(f: Callable[..., Tensor], data: list[Tensor], x: Tensor) -> Tensor:
    return f(x, *data)


def _torch_func(problem: Problem, instance: Instance) -> Run:
    x, data = _tensors(instance)
    if instance.batch is not None:
        return lambda: torch.func.vmap(torch.func.hessian(problem.torch))(x)
    return lambda: torch.func.hessian(problem.torch)(x, *data)


def _ours(problem: Problem, instance: Instance, **options: Any) -> Run:
    x, data = _tensors(instance)
    if instance.batch is not None:
        return lambda: functional_hess.vmap(functional_hess.hessian(problem.torch, **options))(x)
    return lambda: functional_hess.hessian(problem.torch, **options)(x, *data)


def _jax(problem: Problem, instance: Instance) -> Run:
    hessian = jax.hessian(problem.jax)
    if instance.batch is not None:
        hessian = jax.vmap(hessian)
    arguments = jax.tree.map(jax.numpy.asarray, (instance.x, *instance.data))
    compiled = jax.jit(hessian).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


CONTENDERS: dict[str, Callable[[Problem, Instance], Run]] = {
    OURS: _ours,
    f"{OURS}, forward-over-reverse": functools.partial(_ours, mode="forward-over-reverse"),
    f"{OURS}, reverse-over-reverse": functools.partial(_ours, mode="reverse-over-reverse"),
    LOOP: functools.partial(_autograd, vectorize=False),
    "torch.autograd vectorized": functools.partial(_autograd, vectorize=True),
    TORCH_FUNC: _torch_func,
    **({"jax.hessian, compiled": _jax} if jax is not None else {}),
}


def relative_error(H: np.ndarray, truth: np.ndarray) -> float:
    """The largest error of an entry, as a part of the largest entry."""
    return float(np.abs(H - truth).max() / np.abs(truth).max())
