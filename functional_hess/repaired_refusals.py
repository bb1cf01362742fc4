"""Operators whose gradient torch defines to be something else than the derivative, refused by name.

Such a gradient may be what first-order training wants. Derivatives of it are those of no function, so that there is no right
number to return. The error, which passes all modes of differentiation untouched, says what to write instead.

    REFUSALS : the name of an aten operator -> what raises or declines, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from functional_hess.nesting import is_watched

__all__ = ["REFUSALS", "MissingDerivativeError"]


class MissingDerivativeError(NotImplementedError):
    """No mode of differentiation has a rule for an op of f."""


def _normal(mean: Any, std: Any = 1.0, *rest: Any, **options: Any) -> Any:
    """A sample, which torch takes for a constant; under `no_grad` it is one."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and is_watched(t, mapped=False) for t in (mean, std)):
        raise MissingDerivativeError(
            "normal: torch takes the sample for a constant, so that its derivative would silently be zero. Write mean + std * "
            "torch.randn_like(mean), or draw it under torch.no_grad()."
        )
    return NotImplemented


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    """Rows of a table, whose gradient may be divided by how often a row was taken."""
    if scale_grad_by_freq and is_watched(weight, mapped=False):
        raise MissingDerivativeError(
            "embedding: with scale_grad_by_freq=True the gradient is that of no function, so that it has no derivative to "
            "return. Leave the option out."
        )
    return NotImplemented


REFUSALS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "normal": _normal,
        "embedding": _embedding,
    }
)
