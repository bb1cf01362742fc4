"""Putting numbers at places of another tensor, and taking them from there, as compositions of differentiable operators.

PLACES : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["PLACES"]


def _placed(x: Tensor, place: Tensor, source: Tensor) -> Tensor:
    """x with s_i at place_i along the last dimension; of several numbers for one place the last stays."""
    order = torch.arange(place.shape[-1], device=place.device).expand_as(place)
    last = torch.full_like(x, -1, dtype=torch.long).scatter_reduce(-1, place, order, "amax")
    return torch.where(last < 0, x, source.gather(-1, last.clamp(min=0)))


def _max_unpool(input: Tensor, indices: Tensor, output_size: Sequence[int], *strides_and_padding: Any) -> Any:
    """Zeros with x_i at place_i of each channel: torch's gradient goes to every x_i where a place has several."""
    dims, size = len(output_size), torch.Size(output_size).numel()
    if indices.dtype is not torch.long or indices.shape != input.shape or input.dim() not in (dims + 1, dims + 2):
        return NotImplemented
    if not input.numel() or not size or not _holds_or_is_mapped(lambda: bool((indices >= 0).all() & (indices < size).all())):
        return NotImplemented
    x, place = input.flatten(-dims), indices.flatten(-dims)
    return _placed(x.new_zeros((*x.shape[:-1], size)), place, x).unflatten(-1, tuple(output_size))


def _holds_or_is_mapped(condition: Callable[[], bool]) -> bool:
    """Whether the condition holds, or has no one answer because `vmap` maps what it asks about."""
    try:
        return condition()
    except RuntimeError:
        return True


def _masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Any:
    """x with its entries under the mask replaced by s_0, s_1, ...: the forward mode of its backward has another shape."""
    if mask.dtype is not torch.bool or source.dtype != input.dtype or not source.numel():
        return NotImplemented
    input, mask = torch.broadcast_tensors(input, mask)
    order = mask.reshape(-1).cumsum(0) - 1
    if _holds_or_is_mapped(lambda: bool(mask.sum() > source.numel())):
        return NotImplemented
    return torch.where(mask, source.reshape(-1)[order.clamp(min=0)].reshape(mask.shape), input)


def _masked_select(input: Tensor, mask: Tensor) -> Any:
    """The entries under the mask: under `vmap` the backward forgets that a smaller x was expanded."""
    if mask.dtype is not torch.bool:
        return NotImplemented
    input, mask = torch.broadcast_tensors(input, mask)
    return input[mask] if input.dim() else input.reshape(1)[mask.reshape(1)]


def _tensor_split(input: Tensor, tensor_indices_or_sections: Any, dim: int = 0) -> Any:
    """The parts between the places that a tensor names: the kernel does not run under torch.func."""
    places = tensor_indices_or_sections
    if not isinstance(places, Tensor) or places.dtype is not torch.long or places.dim() > 1:
        return NotImplemented
    return input.tensor_split(places.tolist(), dim)


PLACES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "max_unpool2d": _max_unpool,
        "max_unpool3d": _max_unpool,
        "masked_scatter": _masked_scatter,
        "masked_select": _masked_select,
        "tensor_split": _tensor_split,
    }
)
