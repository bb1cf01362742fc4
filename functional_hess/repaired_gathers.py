"""Gathering, scattering and reducing by index as compositions of differentiable operators.

GATHERS : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from functional_hess.repaired_singular import product

__all__ = ["GATHERS"]


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sum (0), mean (1) or maximum (2) of each bag's rows, `padding_idx` left out: no second derivative in any mode.

    None stands for each of the kernel's other three outputs, which are bookkeeping for its backward.
    """
    if scale_grad_by_freq or sparse or indices.dim() != 1 or offsets.dim() != 1 or (per_sample_weights is not None and mode):
        return NotImplemented
    bags = offsets.shape[0] - include_last_offset
    bag = (
        torch.searchsorted(offsets[:bags].contiguous(), torch.arange(len(indices), device=indices.device).to(offsets), right=True)
        - 1
    )
    rows = weight[indices]
    rows = rows if per_sample_weights is None else rows * per_sample_weights.unsqueeze(-1)
    counted = torch.ones_like(indices, dtype=torch.bool) if padding_idx is None else indices != padding_idx % weight.shape[0]
    zeros = rows.new_zeros((bags, weight.shape[1]))
    counts = rows.new_zeros(bags).index_add(0, bag, counted.to(rows.dtype)).unsqueeze(-1)
    if mode == 2:
        rows = rows.masked_fill(~counted.unsqueeze(-1), -math.inf)
        largest = (zeros - math.inf).scatter_reduce(0, bag.unsqueeze(-1).expand_as(rows), rows, "amax")
        return largest.masked_fill(counts == 0, 0.0), None, None, None
    total = zeros.index_add(0, bag, rows.masked_fill(~counted.unsqueeze(-1), 0.0))
    return (total / counts.clamp(min=1) if mode else total), None, None, None


def _scatter_reduce(input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """y_j = x_j prod of s_k over index_k = j, by masks of j times k: the kernel's forward mode is wrong."""
    if reduce != "prod" or not input.dim() or index.dim() != input.dim() or src.dim() != input.dim():
        return NotImplemented
    dim, sizes = dim % input.dim(), index.shape
    if any(sizes[d] > src.shape[d] or (d != dim and sizes[d] > input.shape[d]) for d in range(input.dim())):
        return NotImplemented
    source, place = (
        src[tuple(slice(n) for n in sizes)].movedim(dim, -1).unsqueeze(-2),
        index.movedim(dim, -1).unsqueeze(-2),
    )
    hit = place == torch.arange(input.shape[dim], device=input.device).unsqueeze(-1)
    factor = (product(torch.where(hit, source, 1.0)) if source.shape[-1] else hit.all(-1).to(src)).movedim(-1, dim)
    touched = hit.any(-1).movedim(-1, dim)
    for d in range(input.dim()):  # beyond the index nothing is scattered
        rest = (*factor.shape[:d], input.shape[d] - factor.shape[d], *factor.shape[d + 1 :])
        factor, touched = (
            torch.cat([factor, factor.new_ones(rest)], d),
            torch.cat([touched, touched.new_zeros(rest)], d),
        )
    return input * factor if include_self else torch.where(touched, factor, input)


def _index_reduce(input: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """`scatter_reduce` with one index for whole slices: the kernel has no forward-mode rule."""
    if not input.dim() or index.dim() != 1 or source.dim() != input.dim() or index.shape[0] != source.shape[dim]:
        return NotImplemented
    place = index.reshape([-1 if d == dim % input.dim() else 1 for d in range(input.dim())]).expand_as(source)
    answer = _scatter_reduce(input, dim, place, source, reduce, include_self=include_self)
    return input.scatter_reduce(dim, place, source, reduce, include_self=include_self) if answer is NotImplemented else answer


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Any:
    """x with its slice `index` along `dim` replaced by s: reverse mode over its batching rule is wrong."""
    if not input.dim() or not -input.shape[dim] <= index < input.shape[dim] or input.select(dim, index).shape != src.shape:
        return NotImplemented
    place = [1] * input.dim()
    place[dim] = input.shape[dim]
    chosen = torch.arange(input.shape[dim], device=input.device).reshape(place) == index % input.shape[dim]
    return torch.where(chosen, src.unsqueeze(dim), input)


def _as_strided_scatter(
    input: Tensor, src: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    """x with s in the places that a strided view has in its memory: torch has the gradient by x in just those places."""
    if tuple(src.shape) != tuple(size) or len(size) != len(stride):
        return NotImplemented
    if not input.is_contiguous():
        raise NotImplementedError(
            "as_strided_scatter: torch has its derivatives wrong, and they are repaired where input is contiguous in memory; "
            "pass input.contiguous(), or write it by index_put."
        )
    offset = 0 if storage_offset is None else int(storage_offset - input.storage_offset())
    place = torch.full(tuple(size), offset, device=input.device)
    for d, (n, step) in enumerate(zip(size, stride, strict=True)):
        place = place + (step * torch.arange(n, device=input.device)).reshape([-1 if k == d else 1 for k in range(len(size))])
    if place.numel() and not 0 <= int(place.min()) <= int(place.max()) < input.numel():
        return NotImplemented
    return input.reshape(-1).index_put((place.reshape(-1),), src.reshape(-1)).reshape(input.shape)


def _segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
) -> Any:
    """Sum, mean, maximum, minimum or product over runs of `lengths` along `axis`: no second derivative in any mode.

    The runs of all rows (the dimensions before `axis`) lie one after another, each row's ending where the next one's begin.
    """
    if lengths is None and offsets is not None:
        lengths = offsets.diff(dim=-1)
    if lengths is None or indices is not None or lengths.dim() != axis + 1 or data.dim() <= axis or not data.is_floating_point():
        return NotImplemented
    if reduce not in _EMPTY_RUN or lengths.shape[:-1] != data.shape[:axis] or (lengths.sum(-1) != data.shape[axis]).any():
        return NotImplemented
    counts, rows = lengths.reshape(-1), data.flatten(0, axis)
    run = torch.arange(len(counts), device=data.device).repeat_interleave(counts)
    start = rows.new_full((len(counts), *rows.shape[1:]), _EMPTY_RUN[reduce] if initial is None else initial)
    if reduce in ("sum", "mean"):
        total = start.index_add(0, run, rows)
        counts = counts.reshape(-1, *[1] * (rows.dim() - 1))
        empty = math.nan if initial is None else initial
        answer = total if reduce == "sum" else torch.where(counts == 0, empty, total / counts.clamp(min=1))
    else:
        answer = _index_reduce(start, 0, run, rows, {"max": "amax", "min": "amin"}.get(reduce, reduce))
    return answer.unflatten(0, lengths.shape)


_EMPTY_RUN = {"sum": 0.0, "mean": 0.0, "max": -math.inf, "min": math.inf, "prod": 1.0}


GATHERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "embedding_bag": _embedding_bag,
        "scatter_reduce": _scatter_reduce,
        "index_reduce": _index_reduce,
        "select_scatter": _select_scatter,
        "as_strided_scatter": _as_strided_scatter,
        "segment_reduce": _segment_reduce,
    }
)
