"""Normalizations as compositions of differentiable operators: y = w (x - m) r + b, and w = g v / |v|.

The batching rules of torch's backward kernels take the saved mean m and reciprocal deviation r for constants (functorch#534),
so that `hessian = jacfwd(jacrev)` and every derivative through a vmapped backward are wrong; nested forward mode too
(pytorch#196699). Here m and r are functions of x like any other.

    NORMS : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from functional_hess.nesting import constant

__all__ = ["NORMS"]


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - m) r, m and r = (mean (x - m)^2 + eps)^(-1/2) over `dims`; half precision by float32, as in the kernels."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(dims, keepdim=True)
    centered = wide - mean
    rstd = torch.rsqrt((centered * centered).mean(dims, keepdim=True) + eps)
    return centered * rstd, mean, rstd


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """w y + b with w and b viewed as `shape`, in the dtype asked for."""
    y = y if weight is None else y * weight.reshape(shape)
    return (y if bias is None else y + bias.reshape(shape)).to(dtype)


def _saved(statistic: Tensor, x: Tensor, *parameters: Tensor | None) -> Tensor:
    """A statistic as the kernels give it: without derivative, and in half precision where the CPU saves it so."""
    mixed = any(p is not None and p.dtype != x.dtype for p in parameters)
    return statistic.detach().to(x.dtype if x.device.type == "cpu" and not mixed else statistic.dtype)


def _fits(parameters: Sequence[Tensor | None], shape: Sequence[int]) -> bool:
    return all(p is None or tuple(p.shape) == tuple(shape) for p in parameters)


def _native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    """((x - m) r w + b, m, r) over the last dimensions, m and r constants, as torch has it (functorch#534)."""
    shape = tuple(normalized_shape)
    if (
        not shape
        or not input.is_floating_point()
        or tuple(input.shape[-len(shape) :]) != shape
        or not _fits((weight, bias), shape)
    ):
        return NotImplemented
    y, mean, rstd = _standardized(input, tuple(range(-len(shape), 0)), eps)
    return (
        _affine(y, weight, bias, shape, input.dtype),
        _saved(mean, input, weight, bias),
        _saved(rstd, input, weight, bias),
    )


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """(x - m) r w + b over the last dimensions (functorch#534)."""
    answer = _native_layer_norm(input, normalized_shape, weight, bias, eps)
    return answer if answer is NotImplemented else answer[0]


def _channel_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: tuple[int, ...], eps: float) -> Any:
    """(x - m) r w + b with statistics over `dims` and one weight per channel (dimension 1); also m and r."""
    if x.dim() < 2 or not x.is_floating_point() or not _fits((weight, bias), x.shape[1:2]):
        return NotImplemented
    y, mean, rstd = _standardized(x, dims, eps)
    return _affine(y, weight, bias, (1, -1) + (1,) * (x.dim() - 2), x.dtype), mean, rstd


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """((x - m) r w + b, m, r) per channel, m and r constants (functorch#534); with given statistics torch is right."""
    if not training:
        return NotImplemented
    answer = _channel_norm(input, weight, bias, tuple(d for d in range(input.dim()) if d != 1), eps)
    if answer is NotImplemented:
        return answer
    if (
        running_mean is not None or running_var is not None
    ):  # the kernel updates them, with its own rules about who may be written
        torch.native_batch_norm(input.detach(), None, None, running_mean, running_var, True, momentum, eps)
    return answer[0], *(_saved(s.flatten(), input, weight, bias) for s in answer[1:])


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """(x - m) r w + b per channel over batch and space (functorch#534)."""
    answer = _native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return answer if answer is NotImplemented else answer[0]


def _batch_norm_of(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A variant of batch norm: its value composed, its statistics and its other outputs the kernel's."""

    def composed(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any, **named: Any) -> Any:
        options = [*rest, *named.values()]
        training = next((option for option in options if isinstance(option, bool)), True)
        eps = named.get("eps", [option for option in options if type(option) is float][-1])
        if not training:
            return NotImplemented
        answer = _channel_norm(input, weight, bias, tuple(d for d in range(input.dim()) if d != 1), eps)
        if answer is NotImplemented:
            return answer
        return answer[0], *kernel(*(None if t is None else constant(t) for t in (input, weight, bias)), *rest, **named)[1:]

    return composed


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """(x - m) r w + b per sample and channel over space (functorch#534)."""
    if not use_input_stats or input.dim() < 3:
        return NotImplemented
    answer = _channel_norm(input, weight, bias, tuple(range(2, input.dim())), eps)
    if answer is NotImplemented:
        return answer
    if running_mean is not None or running_var is not None:
        torch.instance_norm(input.detach(), None, None, running_mean, running_var, True, momentum, eps, cudnn_enabled)
    return answer[0]


def _weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """(g v / |v|, |v|), the norm over all dimensions but `dim` (all for -1): no forward mode, wrong double backward."""
    norm = (v * v).sum([d for d in range(v.dim()) if d != dim], keepdim=dim != -1).sqrt()
    return v * (g / norm), norm


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """g v / |v|."""
    return _weight_norm_interface(v, g, dim)[0]


NORMS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "native_layer_norm": _native_layer_norm,
        "layer_norm": _layer_norm,
        "native_batch_norm": _native_batch_norm,
        "batch_norm": _batch_norm,
        **{
            name: _batch_norm_of(getattr(torch.ops.aten, name))
            for name in (
                "_batch_norm_impl_index",
                "_native_batch_norm_legit",
                "_native_batch_norm_legit_functional",
                "_batch_norm_with_update",
                "_batch_norm_with_update_functional",
            )
        },
        "instance_norm": _instance_norm,
        "_weight_norm_interface": _weight_norm_interface,
        "_weight_norm": _weight_norm,
    }
)
