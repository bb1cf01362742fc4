"""Which positions of affine sites do not read each other: a proof, by index sets, that a batch is one.

A loss of a whole batch, ``f(params)`` with the data held by f, has at each of its sites z_s = W_s h_s as many positions as there
are samples, or a multiple. If samples do not read each other, the positions fall into N parts such that

    d2L / d eps_s[a] d eps_t[b] = 0    and    d h_t[b] / d eps_s[a] = 0      for positions a and b of different parts,

and one seed serves all parts at once. Whether they do is a question of connections alone. The pullback of (gradient in eps,
features) is run once with every position labelled (:func:`functional_hess.sparsity.detect_reached`), and the labels that reach
each position tell the parts. An op without a rule connects everything: then there is one part, and nothing is gained or lost.
What is proved holds at the point; every call proves it anew, if only that it runs a program that was judged before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_hess.levels import flat_value_and_grad, flat_vjp
from functional_hess.sites import Discovery, Lifted, Site
from functional_hess.sparsity import detect_reached

__all__ = ["common_positions", "independent_parts"]

Tensors = tuple[Tensor, ...]


def common_positions(sites: Sequence[Site]) -> int:
    """The finest parts that the positions of all sites could fall into."""
    return math.gcd(*(site.positions for site in sites))


def independent_parts(loss: Callable[[Sequence[Tensor]], Tensor], x: Tensors, found: Discovery) -> int:
    """N such that the positions of every site fall into N runs of equal length that do not read each other.

    Args:
        loss: the function in which the sites were found, of flat leaves.
        x: the point.
        found: its sites. The leaves that are used otherwise too are shared by all parts and not asked about.

    Returns:
        the largest N; 1 where nothing can be proved.
    """
    sites = found.sites
    changing = [site.key for site in sites if found.reads[site.key] & {other.key for other in sites}]
    finest = common_positions(sites)
    if finest <= 1:
        return 1

    def gradient_and_features(*eps: Tensor) -> tuple[Tensors, Tensors]:
        def of(*eps: Tensor) -> tuple[Tensor, Any]:
            leaves = [t.view_as(t) for t in x]
            with Lifted(leaves, found, {site.key: e for site, e in zip(sites, eps, strict=True)}) as run:
                value = loss(leaves)
            return value, [torch.cat(run.features[key], 1) for key in changing]

        (_, features), gradient = flat_value_and_grad(of, eps, verb="hessian")
        return (*gradient, *features), ()

    def labels(tensors: Tensors) -> Tensors:
        return tuple(_labels(t.shape, finest) for t in tensors)

    zeros = tuple(x[0].new_zeros(site.units.shape) for site in sites)
    outputs, pullback, _ = flat_vjp(gradient_and_features, zeros)
    reached = detect_reached(pullback, outputs, labels)
    if reached is None or reached.full_because is not None:
        return 1
    rows = torch.cat([t.flatten() for t in labels(zeros)]).numpy()[reached.pattern.rows]
    return _coarsest(rows, reached.pattern.indices, finest)


def _labels(shape: torch.Size, count: int) -> Tensor:
    """Numbers below ``count`` for positions along the first dimension, in runs of equal length."""
    runs = torch.arange(count).repeat_interleave(shape[0] // count)
    return runs[:, None].expand(shape).contiguous()


def _coarsest(a: np.ndarray, b: np.ndarray, finest: int) -> int:
    """The largest divisor N of ``finest`` such that no pair of labels (a, b) lies in two of N runs of equal length.

    Example:
        >>> _coarsest(np.array([0, 2, 3]), np.array([1, 3, 3]), 4)
        2
    """
    for length in range(1, finest + 1):
        if finest % length == 0 and bool((a // length == b // length).all()):
            return finest // length
    raise AssertionError
