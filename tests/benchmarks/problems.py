"""The functions that are timed: each written for torch and for JAX in the way natural to either, once where that is one way.

A problem is a scalar function ``f(x, *data)``, whose Hessian in x is wanted, and a point. Numbers come as numpy arrays from
a generator of fixed seed, so that both libraries see the same. Each problem comes in two sizes: the one that is timed, and a
tiny one to warm up with.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import jax
    import jax.numpy as jnp
except ImportError:  # everything else is still measured
    jax = jnp = None
else:
    jax.config.update("jax_enable_x64", True)

__all__ = ["PROBLEMS", "Instance", "Problem", "jax", "matrix"]

Point = Any  # an array, or a dict of arrays


@dataclasses.dataclass(frozen=True)
class Instance:
    """The arguments of f in one size. ``batch`` says how many Hessians: then the first dimension of ``x`` counts points."""

    x: Point
    data: tuple[np.ndarray, ...] = ()
    batch: int | None = None

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        return self.x if isinstance(self.x, dict) else {"x": self.x}

    @property
    def n(self) -> int:
        """Rows of one Hessian."""
        return sum(leaf.size for leaf in self.leaves.values()) // (self.batch or 1)

    @property
    def output_bytes(self) -> int:
        return (self.batch or 1) * self.n**2 * next(iter(self.leaves.values())).itemsize


@dataclasses.dataclass(frozen=True)
class Problem:
    """``tolerance`` bounds the relative error of every contender; those in ``wrong`` are known to exceed it."""

    title: str
    torch: Callable[..., Tensor]
    jax: Callable[..., Any]
    make: Callable[..., Instance]
    size: tuple[int, ...]
    tiny: tuple[int, ...]
    tolerance: float
    wrong: frozenset[str] = frozenset()

    def instance(self, tiny: bool = False) -> Instance:
        return self.make(np.random.default_rng(0), *(self.tiny if tiny else self.size))


def matrix(H: Any, instance: Instance) -> np.ndarray:
    """The Hessian of any library, a tree of trees of blocks, as one (n, n) array, or (batch, n, n)."""
    n, names = instance.n, tuple(instance.leaves)
    if instance.batch is not None:
        return np.stack([np.asarray(h) for h in H]).reshape(instance.batch, n, n)
    if not isinstance(instance.x, dict):
        return np.asarray(H).reshape(n, n)
    keys = names if isinstance(H, dict) else range(len(names))
    sizes = [leaf.size for leaf in instance.leaves.values()]
    numbered = list(zip(keys, sizes, strict=True))
    return np.block([[np.asarray(H[p][q]).reshape(rows, columns) for q, columns in numbered] for p, rows in numbered])


# ---------------------------------------------------------------------------------------------------- Rosenbrock's function


def _rosenbrock(x: Any) -> Any:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def _point(rng: np.random.Generator, n: int) -> Instance:
    return Instance(rng.standard_normal(n))


def _points(rng: np.random.Generator, batch: int, n: int) -> Instance:
    return Instance(rng.standard_normal((batch, n)), batch=batch)


# ---------------------------------------------------------------------------------------------------- Lennard-Jones cluster


def _lennard_jones(x: Any, i: Any, j: Any) -> Any:
    r6 = ((x[i] - x[j]) ** 2).sum(-1) ** -3
    return 4 * (r6**2 - r6).sum()


def _cluster(rng: np.random.Generator, a: int, b: int, c: int) -> Instance:
    """Atoms on a disturbed lattice of a x b x c places, and all pairs of them."""
    lattice = np.stack(np.meshgrid(np.arange(a), np.arange(b), np.arange(c), indexing="ij"), -1).reshape(-1, 3)
    x = 1.12 * lattice + 0.05 * rng.standard_normal(lattice.shape)
    return Instance(x, np.triu_indices(len(x), 1))


# ---------------------------------------------------------------------------------------------------- classifiers


def _mlp_torch(w: dict[str, Tensor], X: Tensor, y: Tensor) -> Tensor:
    h = torch.tanh(X @ w["w1"] + w["b1"])
    h = torch.tanh(h @ w["w2"] + w["b2"])
    return torch.nn.functional.cross_entropy(h @ w["w3"] + w["b3"], y)


def _mlp_jax(w: dict[str, Any], X: Any, y: Any) -> Any:
    h = jnp.tanh(X @ w["w1"] + w["b1"])
    h = jnp.tanh(h @ w["w2"] + w["b2"])
    return _cross_entropy(h @ w["w3"] + w["b3"], y)


def _cross_entropy(logits: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def _mlp(rng: np.random.Generator, samples: int, *widths: int) -> Instance:
    x = {}
    for layer, (rows, columns) in enumerate(itertools.pairwise(widths), 1):
        x[f"w{layer}"] = (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        x[f"b{layer}"] = (0.1 * rng.standard_normal(columns)).astype(np.float32)
    return Instance(x, _labelled(rng, samples, widths[0], widths[-1]))


def _labelled(rng: np.random.Generator, samples: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal((samples, features)).astype(np.float32), rng.integers(0, classes, samples)


def _normed_torch(w: dict[str, Tensor], X: Tensor, y: Tensor) -> Tensor:
    h = torch.nn.functional.layer_norm(X @ w["w1"] + w["b1"], w["gain"].shape, w["gain"], w["shift"])
    return torch.nn.functional.cross_entropy(torch.tanh(h) @ w["w2"] + w["b2"], y)


def _normed_jax(w: dict[str, Any], X: Any, y: Any) -> Any:
    h = X @ w["w1"] + w["b1"]
    h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)
    return _cross_entropy(jnp.tanh(h * w["gain"] + w["shift"]) @ w["w2"] + w["b2"], y)


def _normed(rng: np.random.Generator, samples: int, *widths: int) -> Instance:
    mlp = _mlp(rng, samples, *widths)
    gain, shift = (0.1 * rng.standard_normal((2, widths[1]))).astype(np.float32)
    return dataclasses.replace(mlp, x={**mlp.x, "gain": 1 + gain, "shift": shift})


def _logistic_torch(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y)


def _logistic_jax(w: Any, X: Any, y: Any) -> Any:
    z = X @ w
    return (jnp.logaddexp(0, z) - y * z).mean()


def _regression(rng: np.random.Generator, samples: int, n: int) -> Instance:
    X = rng.standard_normal((samples, n))
    return Instance(rng.standard_normal(n) / np.sqrt(n), (X, rng.integers(0, 2, samples).astype(np.float64)))


# ---------------------------------------------------------------------------------------------------- the table

_rosenbrock_problem = functools.partial(Problem, torch=_rosenbrock, jax=_rosenbrock, tolerance=1e-11)

PROBLEMS: dict[str, Problem] = {
    "rosenbrock-1000": _rosenbrock_problem("Rosenbrock, n = 1,000, float64", make=_point, size=(1000,), tiny=(4,)),
    "rosenbrock-4608": _rosenbrock_problem("Rosenbrock, n = 4,608, float64", make=_point, size=(4608,), tiny=(4,)),
    "lennard-jones": Problem(
        "Lennard-Jones cluster of 100 atoms, n = 300, float64",
        _lennard_jones,
        _lennard_jones,
        _cluster,
        size=(5, 5, 4),
        tiny=(1, 1, 2),
        tolerance=1e-10,
    ),
    "mlp": Problem(
        "MLP 64-20-20-10, 512 samples, n = 1,930, float32",
        _mlp_torch,
        _mlp_jax,
        _mlp,
        size=(512, 64, 20, 20, 10),
        tiny=(4, 3, 2, 2, 2),
        tolerance=1e-4,
    ),
    "layernorm": Problem(
        "LayerNorm MLP 64-20-LN-10, 512 samples, n = 1,550, float32",
        _normed_torch,
        _normed_jax,
        _normed,
        size=(512, 64, 20, 10),
        tiny=(4, 3, 2, 2),
        tolerance=1e-4,
        wrong=frozenset({"torch.func.hessian"}),
    ),
    "logistic": Problem(
        "logistic regression, 2,000 x 500, float64",
        _logistic_torch,
        _logistic_jax,
        _regression,
        size=(2000, 500),
        tiny=(4, 3),
        tolerance=1e-10,
    ),
    "many-small": _rosenbrock_problem("1,000 Hessians of size 6 (vmap), float64", make=_points, size=(1000, 6), tiny=(2, 3)),
    "one-small": _rosenbrock_problem("one Hessian of size 10, float64", make=_point, size=(10,), tiny=(3,)),
}
