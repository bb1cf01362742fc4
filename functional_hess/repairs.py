"""Right compositions for operators whose higher derivatives torch has wrong or lacks.

torch differentiates most operators as often as one likes, because their derivatives are again compositions of
differentiable operators. Some fused operators break the chain: a backward kernel without a derivative, a forward-mode
rule that is wrong, a batching rule that takes saved statistics for constants. Wherever an operator is a composition,

    op(x) = e_k(... e_2(e_1(x))),        e_i differentiable to every order,

the chain rule gives all its derivatives, so the fused operator may be replaced by the composition while derivatives
nest, and kept where one derivative is asked for. This module adds that table:

    REPAIRS : the function that torch hands to ``__torch_function__`` of a mode -> one with the same signature
    FIRST_ORDER_REPAIRS : its keys that need the composition even for one gradient

In forward mode most of these operators have no rule, and three a wrong one (`cholesky_inverse`, `triangular_solve`,
products of `scatter_reduce`), at first order already: a transform should swap as soon as one level of forward mode is
active, or two of any.

A composition has the operator's value (up to rounding), dtype, arguments and side effects, and works under any nesting
of `vmap`, `grad`, `jvp` and `vjp`. Two rules keep that short. A composition that can't honor its arguments returns
`NotImplemented`, and the operator itself answers, with torch's own rule or torch's own error. And the Python fronts of
`torch.nn.functional` are not rewritten: `_opened` runs their own code, argument checks, warnings and deprecated options
included, and swaps only the kernels that it calls.

What this module does not do: it installs nothing (a transform enters the mode and decides when derivatives nest); it
does not touch operators that torch has right; it sees neither TorchScript bodies nor ``out=`` variants, sparse
gradients, nested and quantized tensors. At kinks (ties of a maximum, the hinge of a margin) a composition takes one of
the one-sided derivatives, and 0 at coincident points. Composed attention, distances and products of `scatter_reduce`
need the memory that their kernels are there to save.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["REPAIRS", "FIRST_ORDER_REPAIRS"]

_repairs: dict[Callable[..., Any], Callable[..., Any]] = {}
REPAIRS: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType(_repairs)


# How an operator gets into the table.

_C: Any = torch._C  # its stubs leave out where the functions live
_HOMES = (torch, _C._nn, _C._VariableFunctions, _C._linalg, torch.linalg, torch.Tensor)


def _entry_points(name: str) -> Iterator[Callable[..., Any]]:
    """Every object by which a Python caller reaches the kernel `name`, ``out=`` overloads excepted."""
    for home in _HOMES:
        entry = getattr(home, name.removeprefix("linalg_") if home in (torch.linalg, torch.Tensor) else name, None)
        if callable(entry) and not isinstance(entry, FunctionType):
            yield entry
    packet = getattr(torch.ops.aten, name, None)
    if packet is not None:
        yield packet
        for overload in (getattr(packet, o) for o in packet.overloads()):
            if not any(argument.is_out for argument in overload._schema.arguments):
                yield overload


def _repair(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a composition, arguments in the order of the aten schema, under all entry points of `names`."""

    def enter(composition: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            for op in _entry_points(name):
                _repairs[op] = functools.partial(_compose_or_decline, composition, op)
        return composition

    return enter


def _compose_or_decline(composition: Callable[..., Any], op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The composition's answer, or the operator's own where the composition declines."""
    if kwargs.get("out") is None and all(type(a) is not Tensor or a.layout is torch.strided for a in args):
        renamed = {"input" if name == "self" else name: value for name, value in kwargs.items() if name != "out"}
        answer = composition(*args, **renamed)
        if answer is not NotImplemented:
            return answer
    return op(*args, **kwargs)


class _SwapKernels(TorchFunctionMode):
    """Inside it every kernel of the table is composed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _repairs.get(func, func)(*args, **(kwargs or {}))


def _opened(front: FunctionType) -> Callable[..., Any]:
    """`front`, a Python function of torch, run by its own code but not handed to a mode as a whole: its kernels are."""
    unseen = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False)
    inside = FunctionType(front.__code__, {**front.__globals__, **unseen}, front.__name__, front.__defaults__)
    inside.__kwdefaults__ = front.__kwdefaults__

    @functools.wraps(front)
    def opened(*args: Any, **kwargs: Any) -> Any:
        with _SwapKernels():
            return inside(*args, **kwargs)

    return opened


def _in_place(composition: Callable[..., Any]) -> Callable[..., Any]:
    """The variant with an underscore: the composition's value is written into its first argument."""

    def written(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = composition(input, *args, **kwargs)
        return answer if answer is NotImplemented else input.copy_(answer)

    return written


# Normalization. The batching rules of the backward kernels take the saved mean and deviation for constants
# (functorch#534), so that hessian = jacfwd(jacrev) and every derivative through a vmapped backward are wrong; nested
# forward mode too (pytorch#196699).


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


@_repair("native_layer_norm")
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


@_repair("layer_norm")
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


@_repair("native_batch_norm")
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


@_repair("batch_norm")
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


@_repair("instance_norm")
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


@_repair("_weight_norm_interface")
def _weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """(g v / |v|, |v|), the norm over all dimensions but `dim` (all for -1): no forward mode, wrong double backward."""
    norm = (v * v).sum([d for d in range(v.dim()) if d != dim], keepdim=dim != -1).sqrt()
    return v * (g / norm), norm


@_repair("_weight_norm")
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """g v / |v|."""
    return _weight_norm_interface(v, g, dim)[0]


# Losses. `reduction` is aten's number: 0 none, 1 mean, 2 sum.


def _reduced(loss: Tensor, reduction: int) -> Any:
    return {0: lambda: loss, 1: loss.mean, 2: loss.sum}[reduction]() if reduction in (0, 1, 2) else NotImplemented


@_repair("mse_loss")
def _mse_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Any:
    """mean (x - t)^2: forward over reverse writes into a ZeroTensor (pytorch#123996)."""
    difference = input - target
    return _reduced(difference * difference, reduction)


@_repair("huber_loss")
def _huber_loss(input: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Any:
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2): the backward has no forward-mode rule."""
    if delta <= 0:
        return NotImplemented
    difference = input - target
    size = difference.abs()
    return _reduced(torch.where(size <= delta, 0.5 * difference * difference, delta * (size - 0.5 * delta)), reduction)


@_repair("soft_margin_loss")
def _soft_margin_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Any:
    """log(1 + exp(-t x)), without torch's overflow: the backward has no forward-mode rule."""
    return _reduced(-F.logsigmoid(target * input), reduction)


@_repair("multi_margin_loss")
def _multi_margin_loss(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None, reduction: int = 1
) -> Any:
    """sum over j != t of w_t max(0, margin - x_t + x_j)^p / C: no second derivative in any mode."""
    classes = input.shape[-1] if input.dim() else 1
    if input.dim() not in (1, 2) or target.dim() != input.dim() - 1 or p not in (1, 2) or not _fits((weight,), (classes,)):
        return NotImplemented
    index = target.unsqueeze(-1)
    hinge = torch.relu(margin - input.gather(-1, index) + input) ** p
    hinge = hinge if weight is None else hinge * weight[index]
    others = torch.arange(classes, device=input.device) != index
    return _reduced(torch.where(others, hinge, 0.0).sum(-1) / classes, reduction)


@_repair("multilabel_margin_loss")
def _multilabel_margin_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Any:
    """sum of max(0, 1 - x_k + x_j) / C, k the labels before the first -1, j the others: no second derivative at all."""
    if input.dim() not in (1, 2) or target.shape != input.shape:
        return NotImplemented
    classes = input.shape[-1]
    valid = (target < 0).cumsum(-1) == 0
    index = target.clamp(min=0)
    labelled = ((index.unsqueeze(-1) == torch.arange(classes, device=input.device)) & valid.unsqueeze(-1)).any(-2)
    hinge = torch.relu(1 - input.gather(-1, index).unsqueeze(-1) + input.unsqueeze(-2))
    counted = valid.unsqueeze(-1) & ~labelled.unsqueeze(-2)
    return _reduced(torch.where(counted, hinge, 0.0).sum((-2, -1)) / classes, reduction)


@_repair("hardsigmoid")
def _hardsigmoid(input: Tensor) -> Any:
    """clip((x + 3) / 6, 0, 1) with derivative 0 at the kinks: its backward has no derivative."""
    if not input.is_floating_point():
        return NotImplemented
    return torch.where(input <= -3, 0.0, torch.where(input >= 3, 1.0, (input + 3) / 6))


_repair("hardsigmoid_")(_in_place(_hardsigmoid))


@_repair("glu")
def _glu(input: Tensor, dim: int = -1) -> Any:
    """a sigmoid(b), (a, b) the halves of x: the forward-mode rule of its backward has no derivative."""
    if not input.dim() or input.shape[dim] % 2:
        return NotImplemented
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


# Attention.


@_repair("scaled_dot_product_attention")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(s Q K' + M) V, 0 in rows without a key: the kernels have no second derivative (pytorch#116350)."""
    tensors = (query, key, value)
    if (is_causal and attn_mask is not None) or any(t.dim() < 2 or t.is_nested or t.dtype != query.dtype for t in tensors):
        return NotImplemented
    query, key, value = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else abs(scale))  # on both sides, against overflow
    sign = -1.0 if scale is not None and scale < 0 else 1.0
    scores = (query * (root * sign)) @ (key * root).mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
    weights = _softmax_or_zero(scores) if attn_mask is not None else scores.softmax(-1)
    return (torch.dropout(weights, dropout_p, True) @ value).to(tensors[0].dtype)


def _softmax_or_zero(scores: Tensor) -> Tensor:
    """exp(s_j) / sum exp(s_k) along the last dimension, and 0 with derivative 0 where every s_k is -inf."""
    dead = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


# Recurrent layers. oneDNN (float32 LSTM on the CPU) and cuDNN have no forward-mode rule, and cuDNN no double backward
# (pytorch#5261).

_State = tuple[Tensor, ...]  # (h,) or (h, c), each (batch, features)


def _lstm_step(from_x: Tensor, state: _State, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None) -> _State:
    """c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = W_hr sigmoid(o) tanh(c')."""
    i, f, g, o = (from_x + F.linear(state[0], w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else F.linear(h, w_hr)), c


def _gru_step(from_x: Tensor, state: _State, w_hh: Tensor, b_hh: Tensor | None, w_hr: None) -> _State:
    """n = tanh(x_n + sigmoid(r) h_n), h' = n + sigmoid(z) (h - n)."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, -1), F.linear(state[0], w_hh, b_hh).chunk(3, -1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + torch.sigmoid(x_z + h_z) * (state[0] - n),)


def _elman_step(nonlinearity: Callable[[Tensor], Tensor]) -> Callable[..., _State]:
    """h' = phi(x + W_hh h + b_hh)."""
    return lambda from_x, state, w_hh, b_hh, w_hr: (nonlinearity(from_x + F.linear(state[0], w_hh, b_hh)),)


def _sweep(step: Callable[..., _State], steps: Sequence[Tensor], start: _State) -> tuple[list[Tensor], _State]:
    """Outputs of every step and the last state of every row; steps may have fewer and fewer rows (a packed batch)."""
    state, ended, outputs = start, [], []
    for x in steps:
        if (rows := x.shape[0]) < state[0].shape[0]:
            ended.append(tuple(s[rows:] for s in state))
            state = tuple(s[:rows] for s in state)
        state = step(x, state)
        outputs.append(state[0])
    return outputs, tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))


def _sweep_back(step: Callable[..., _State], steps: Sequence[Tensor], start: _State) -> tuple[list[Tensor], _State]:
    """As `_sweep` from the last step to the first: rows enter, with their own start, where they end."""
    state, outputs = tuple(s[:0] for s in start), []
    for x in reversed(steps):
        held, rows = state[0].shape[0], x.shape[0]
        if rows > held:
            state = tuple(torch.cat([s, s0[held:rows]]) for s, s0 in zip(state, start, strict=True))
        state = step(x, state)
        outputs.append(state[0])
    return outputs[::-1], state


def _recurrent(
    step: Callable[..., _State],
    data: Tensor,
    batch_sizes: Sequence[int],
    start: tuple[Tensor, ...],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """All layers and directions: data (sum of batch_sizes, features), start (layers * directions, batch, features)."""
    directions, finals = 1 + bidirectional, []
    per_cell = len(params) // (num_layers * directions)
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *rest = params[k * per_cell : (k + 1) * per_cell]
            b_ih, b_hh = rest[:2] if has_biases else (None, None)
            w_hr = rest[-1] if len(rest) in (1, 3) else None
            cell = functools.partial(_cell, step, w_hh, b_hh, w_hr)
            rows = F.linear(data, w_ih, b_ih).split(list(batch_sizes))
            out, final = (_sweep_back if direction else _sweep)(cell, rows, tuple(s[k] for s in start))
            outputs.append(torch.cat(out))
            finals.append(final)
        data = torch.cat(outputs, -1)
        if dropout and train and layer < num_layers - 1:
            data = torch.dropout(data, dropout, True)
    return data, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def _cell(
    step: Callable[..., _State], w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None, x: Tensor, state: _State
) -> _State:
    return step(x, state, w_hh, b_hh, w_hr)


def _enter_recurrent(name: str, step: Callable[..., _State]) -> None:
    """Enter both signatures, (input, hx, params, ..., batch_first) and (data, batch_sizes, hx, params, ...)."""

    def packed(data: Tensor, batch_sizes: Tensor, hx: Any, params: Sequence[Tensor], *options: Any) -> Any:
        start = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        return _recurrent(step, data, batch_sizes.tolist(), start, params, *options)

    def padded(input: Tensor, hx: Any, params: Sequence[Tensor], *settings: Any) -> Any:
        *options, batch_first = settings
        time_first = input.transpose(0, 1) if batch_first else input
        if input.dim() != 3 or not time_first.shape[0]:
            return NotImplemented
        sizes, start = time_first.shape[:2], (hx,) if isinstance(hx, Tensor) else tuple(hx)
        data, *finals = _recurrent(step, time_first.flatten(0, 1), [sizes[1]] * sizes[0], start, params, *options)
        out = data.unflatten(0, sizes)
        return out.transpose(0, 1) if batch_first else out, *finals

    def either(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 9:
            return NotImplemented
        return (padded if isinstance(args[-2], bool) and isinstance(args[3], bool) else packed)(*args)

    _repair(name)(either)


_enter_recurrent("lstm", _lstm_step)
_enter_recurrent("gru", _gru_step)
_enter_recurrent("rnn_tanh", _elman_step(torch.tanh))
_enter_recurrent("rnn_relu", _elman_step(torch.relu))


# Linear algebra.


@_repair("cholesky_inverse")
def _cholesky_inverse(input: Tensor, upper: bool = False) -> Any:
    """(L L')^-1 = L'^-1 L^-1 from one triangle: forward mode is wrong; gradients too if the other triangle is not 0."""
    if input.dim() < 2 or input.shape[-1] != input.shape[-2]:
        return NotImplemented
    L = input.mH if upper else input  # of which solve_triangular reads one triangle
    inverse = torch.linalg.solve_triangular(L, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L), upper=False)
    return inverse.mH @ inverse


@_repair("cholesky_solve")
def _cholesky_solve(input: Tensor, input2: Tensor, upper: bool = False) -> Any:
    """L'^-1 (L^-1 B) from one triangle of L: gradients are wrong if the other triangle is not zero."""
    if min(input.dim(), input2.dim()) < 2:
        return NotImplemented
    L = input2.mH if upper else input2  # of which solve_triangular reads one triangle
    return torch.linalg.solve_triangular(L.mH, torch.linalg.solve_triangular(L, input, upper=False), upper=True)


@_repair("triangular_solve")
def _triangular_solve(input: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False) -> Any:
    """A^-1 B, or A'^-1 B, from one triangle of A: forward over reverse is wrong."""
    if min(input.dim(), A.dim()) < 2:
        return NotImplemented
    matrix, is_upper = (A.mT, not upper) if transpose else (A, upper)
    solution = torch.linalg.solve_triangular(matrix, input, upper=is_upper, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((solution, A.clone()))


@_repair("linalg_solve")
def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Any:
    """A^-1 B by P A = L U: reverse over forward mode, which third derivatives take, is wrong."""
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or B.dim() == 0 or not (A.is_floating_point() and B.dtype == A.dtype):
        return NotImplemented
    is_vector = B.dim() == 1 or B.shape == A.shape[:-1]
    right_side = B.unsqueeze(-1) if is_vector else B
    if right_side.shape[-2 if left or is_vector else -1] != A.shape[-1] or (is_vector and not left):
        return NotImplemented
    try:
        factors = torch.linalg.lu_factor(A)
    except RuntimeError:  # singular
        return NotImplemented
    solution = torch.linalg.lu_solve(*factors, right_side, left=left)
    return solution.squeeze(-1) if is_vector else solution


def _log_abs_det(A: Tensor) -> tuple[Tensor, Tensor]:
    """(sign det A, sum log |U_ii|) by P A = L U; the sign is locally constant."""
    diagonal = torch.linalg.lu_factor_ex(A).LU.diagonal(dim1=-2, dim2=-1)
    return torch.linalg.slogdet(A.detach()).sign, diagonal.abs().log().sum(-1)


@_repair("slogdet", "linalg_slogdet")
def _slogdet(input: Tensor) -> Any:
    """(sign det A, log |det A|): reverse over forward mode is wrong, as in `_solve`."""
    if input.dim() < 2 or input.shape[-1] != input.shape[-2] or not input.is_floating_point():
        return NotImplemented
    named: Any = torch.return_types
    return named.linalg_slogdet(_log_abs_det(input))


@_repair("logdet")
def _logdet(input: Tensor) -> Any:
    """log det A, NaN where det A < 0: as `_slogdet`."""
    answer = _slogdet(input)
    return answer if answer is NotImplemented else torch.where(answer[0] < 0, math.nan, answer[1])


# Distances. No second derivative in any mode (pytorch#83510).


def _root(total: Tensor, p: float) -> Tensor:
    """t^(1/p), and 0 with derivative 0 where t = 0."""
    zero = total == 0
    safe = torch.where(zero, 1.0, total)
    return torch.where(zero, 0.0, safe.sqrt() if p == 2 else safe ** (1 / p))


def _minkowski(difference: Tensor, p: float) -> Tensor:
    """(sum |d|^p)^(1/p) along the last dimension; p = 0 counts, p = inf takes the largest."""
    size = difference.abs()
    if p == 0:
        return (size != 0).to(size.dtype).sum(-1)
    if p == math.inf:
        return size.amax(-1) if size.shape[-1] else size.sum(-1)
    if p == 1:
        return size.sum(-1)
    if p % 2 == 0:
        return _root((difference ** int(p)).sum(-1), p)
    zero = size == 0  # |d|^p at 0 has infinite derivatives of high order, which a factor of 0 would turn into NaN
    return _root(torch.where(zero, 0.0, torch.where(zero, 1.0, size) ** p).sum(-1), p)


@_repair("cdist")
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Any:
    """|x1_i - x2_j|_p (pytorch#83510)."""
    if min(x1.dim(), x2.dim()) < 2 or x1.shape[-1] != x2.shape[-1] or x1.dtype != x2.dtype or not x1.is_floating_point() or p < 0:
        return NotImplemented
    return _minkowski(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


@_repair("pdist")
def _pdist(input: Tensor, p: float = 2.0) -> Any:
    """|x_i - x_j|_p for i < j."""
    if input.dim() != 2 or not input.is_floating_point() or p < 0:
        return NotImplemented
    i, j = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return _minkowski(input[i] - input[j], p)


# Packing, gathering, scattering.


@_repair("_pack_padded_sequence")
def _pack_padded_sequence(input: Tensor, lengths: Tensor, batch_first: bool) -> Any:
    """The rows of step 0, of step 1, ... still running: no forward-mode rule; the backward fails under torch.func."""
    steps = input.transpose(0, 1) if batch_first else input
    ends = lengths.tolist()
    if len(ends) != steps.shape[1] or ends != sorted(ends, reverse=True) or not ends or ends[-1] < 1 or ends[0] > steps.shape[0]:
        return NotImplemented
    sizes = [sum(end > t for end in ends) for t in range(ends[0])]
    return torch.cat([steps[t, :size] for t, size in enumerate(sizes)]), torch.tensor(sizes, device="cpu")


@_repair("embedding_bag")
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


@_repair("scatter_reduce")
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
    factor = torch.where(hit, source, 1.0).prod(-1).movedim(-1, dim)
    touched = hit.any(-1).movedim(-1, dim)
    for d in range(input.dim()):  # beyond the index nothing is scattered
        rest = (*factor.shape[:d], input.shape[d] - factor.shape[d], *factor.shape[d + 1 :])
        factor, touched = (
            torch.cat([factor, factor.new_ones(rest)], d),
            torch.cat([touched, touched.new_zeros(rest)], d),
        )
    return input * factor if include_self else torch.where(touched, factor, input)


_repair("scatter_reduce_")(_in_place(_scatter_reduce))


@_repair("index_reduce")
def _index_reduce(input: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True) -> Any:
    """`scatter_reduce` with one index for whole slices: the kernel has no forward-mode rule."""
    if not input.dim() or index.dim() != 1 or source.dim() != input.dim() or index.shape[0] != source.shape[dim]:
        return NotImplemented
    place = index.reshape([-1 if d == dim % input.dim() else 1 for d in range(input.dim())]).expand_as(source)
    answer = _scatter_reduce(input, dim, place, source, reduce, include_self=include_self)
    return input.scatter_reduce(dim, place, source, reduce, include_self=include_self) if answer is NotImplemented else answer


_repair("index_reduce_")(_in_place(_index_reduce))


@_repair("select_scatter")
def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Any:
    """x with its slice `index` along `dim` replaced by s: reverse mode over its batching rule is wrong."""
    if not input.dim() or not -input.shape[dim] <= index < input.shape[dim] or input.select(dim, index).shape != src.shape:
        return NotImplemented
    place = [1] * input.dim()
    place[dim] = input.shape[dim]
    chosen = torch.arange(input.shape[dim], device=input.device).reshape(place) == index % input.shape[dim]
    return torch.where(chosen, src.unsqueeze(dim), input)


@_repair("ldexp")
def _ldexp(input: Tensor, other: Tensor) -> Any:
    """x 2^n: forward over reverse under a dispatch mode ends the process."""
    if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return NotImplemented
    if not input.is_floating_point() or other.is_floating_point():
        return input * torch.exp2(other)
    wide = torch.promote_types(input.dtype, torch.float32)
    return (input * torch.exp2(other.to(wide))).to(input.dtype)


_repair("ldexp_")(_in_place(_ldexp))

FIRST_ORDER_REPAIRS: frozenset[Callable[..., Any]] = frozenset(
    op for name in ("select_scatter", "_pack_padded_sequence", "cholesky_inverse", "cholesky_solve") for op in _entry_points(name)
)


# The Python fronts: torch's own code around the kernels above.

_LOSSES = (F.mse_loss, F.huber_loss, F.soft_margin_loss, F.multi_margin_loss, F.multilabel_margin_loss)
_LAYERS = (F.layer_norm, F.batch_norm, F.instance_norm, F.hardsigmoid, F.glu, F.embedding_bag)
for _front in (*_LOSSES, *_LAYERS, F.multi_head_attention_forward, torch.functional.cdist):
    _repairs[_front] = _opened(_front)
