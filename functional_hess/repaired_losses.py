"""Losses and activations, applied entry by entry, as compositions of differentiable operators.

Their backward kernels lack a derivative in one mode or in all. At a kink a composition takes one of the one-sided derivatives.
`reduction` is aten's number: 0 none, 1 mean, 2 sum.

    LOSSES : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES"]


def _reduced(loss: Tensor, reduction: int) -> Any:
    return {0: lambda: loss, 1: loss.mean, 2: loss.sum}[reduction]() if reduction in (0, 1, 2) else NotImplemented


def _mse_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Any:
    """mean (x - t)^2: forward over reverse writes into a ZeroTensor (pytorch#123996)."""
    difference = input - target
    return _reduced(difference * difference, reduction)


def _huber_loss(input: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Any:
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2): the backward has no forward-mode rule."""
    if delta <= 0:
        return NotImplemented
    difference = input - target
    size = difference.abs()
    return _reduced(torch.where(size <= delta, 0.5 * difference * difference, delta * (size - 0.5 * delta)), reduction)


def _soft_margin_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Any:
    """log(1 + exp(-t x)), without torch's overflow: the backward has no forward-mode rule."""
    return _reduced(-F.logsigmoid(target * input), reduction)


def _multi_margin_loss(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None, reduction: int = 1
) -> Any:
    """sum over j != t of w_t max(0, margin - x_t + x_j)^p / C: no second derivative in any mode."""
    if not input.dim():  # one class
        input, target = input.reshape(1), target.reshape(())
    classes = input.shape[-1] if input.dim() else 1
    fits = input.dim() in (1, 2) and target.dim() == input.dim() - 1 and (weight is None or tuple(weight.shape) == (classes,))
    if not fits or p not in (1, 2):
        return NotImplemented
    index = target.unsqueeze(-1)
    hinge = torch.relu(margin - input.gather(-1, index) + input) ** p
    hinge = hinge if weight is None else hinge * weight[index]
    others = torch.arange(classes, device=input.device) != index
    return _reduced(torch.where(others, hinge, 0.0).sum(-1) / classes, reduction)


def _multilabel_margin_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Any:
    """sum of max(0, 1 - x_k + x_j) / C, k the labels before the first -1, j the others: no second derivative at all."""
    if input.dim() > 2 or target.shape != input.shape:
        return NotImplemented
    input, target = (t if t.dim() else t.reshape(1) for t in (input, target))
    classes = input.shape[-1]
    valid = (target < 0).cumsum(-1) == 0
    index = target.clamp(min=0)
    labelled = ((index.unsqueeze(-1) == torch.arange(classes, device=input.device)) & valid.unsqueeze(-1)).any(-2)
    hinge = torch.relu(1 - input.gather(-1, index).unsqueeze(-1) + input.unsqueeze(-2))
    counted = valid.unsqueeze(-1) & ~labelled.unsqueeze(-2)
    return _reduced(torch.where(counted, hinge, 0.0).sum((-2, -1)) / classes, reduction)


def _hardsigmoid(input: Tensor) -> Any:
    """clip((x + 3) / 6, 0, 1) with derivative 0 at the kinks: its backward has no derivative."""
    if not input.is_floating_point():
        return NotImplemented
    return torch.where(input <= -3, 0.0, torch.where(input >= 3, 1.0, (input + 3) / 6))


def _glu(input: Tensor, dim: int = -1) -> Any:
    """a sigmoid(b), (a, b) the halves of x: the forward-mode rule of its backward has no derivative."""
    if not input.dim() or input.shape[dim] % 2:
        return NotImplemented
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def _rrelu(input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None) -> Any:
    """x where it is positive, else (lower + upper) x / 2, in evaluation: the kernel has no batching rule."""
    if training or not input.is_floating_point():
        return NotImplemented
    return F.leaky_relu(input, (lower + upper) / 2)


def _ldexp(input: Tensor, other: Tensor) -> Any:
    """x 2^n: forward over reverse under a dispatch mode ends the process."""
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return NotImplemented
    if not input.is_floating_point() or other.is_floating_point():
        return input * torch.exp2(other)
    wide = torch.promote_types(input.dtype, torch.float32)
    return (input * torch.exp2(other.to(wide))).to(input.dtype)


LOSSES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "mse_loss": _mse_loss,
        "huber_loss": _huber_loss,
        "soft_margin_loss": _soft_margin_loss,
        "multi_margin_loss": _multi_margin_loss,
        "multilabel_margin_loss": _multilabel_margin_loss,
        "hardsigmoid": _hardsigmoid,
        "glu": _glu,
        "rrelu": _rrelu,
        "ldexp": _ldexp,
    }
)
