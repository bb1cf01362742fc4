"""Attention, recurrent layers, convolutions in time, transforms and alignments as compositions of differentiable operators.

The fused kernels have no second derivative (attention: pytorch#116350; CTC), or go to a library (oneDNN for a float32 LSTM on the
CPU, cuDNN) without a forward-mode rule and, for cuDNN, without a double backward (pytorch#5261). The compositions need the
memory that those kernels are there to save: all scores of an attention, all gates of all steps.

    SEQUENCES : the name of an aten operator -> its composition, by the contract of :mod:`functional_hess.repairs`
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_hess.nesting import outside_transforms
from functional_hess.repaired_singular import log_of_sum

__all__ = ["SEQUENCES"]


# Attention.


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


def _safe_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """exp(s_j) / sum exp(s_k), and 0 where every s_k is -inf: reverse over forward mode is NaN there."""
    scores = input if dtype is None else input.to(dtype)
    if not scores.is_floating_point() or not scores.dim():
        return NotImplemented
    return _softmax_or_zero(scores.movedim(dim, -1)).movedim(-1, dim)


# Recurrent layers.

_State = tuple[Tensor, ...]  # (h,) or (h, c), each (batch, features)


def _lstm_step(from_x: Tensor, state: _State, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None) -> _State:
    """c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = W_hr sigmoid(o) tanh(c')."""
    i, f, g, o = (from_x + F.linear(state[0], w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else F.linear(h, w_hr)), c


def _lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    """One step: no batching rule."""
    return _lstm_step(F.linear(input, w_ih, b_ih), tuple(hx), w_hh, b_hh, None)


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


def _layers(step: Callable[..., _State]) -> Callable[..., Any]:
    """Both signatures, (input, hx, params, ..., batch_first) and (data, batch_sizes, hx, params, ...)."""

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

    return either


def _pack_padded_sequence(input: Tensor, lengths: Tensor, batch_first: bool) -> Any:
    """The rows of step 0, of step 1, ... still running: no forward-mode rule; the backward fails under torch.func."""
    steps = input.transpose(0, 1) if batch_first else input
    ends = lengths.tolist()
    if len(ends) != steps.shape[1] or ends != sorted(ends, reverse=True) or not ends or ends[-1] < 1 or ends[0] > steps.shape[0]:
        return NotImplemented
    sizes = [sum(end > t for end in ends) for t in range(ends[0])]
    return torch.cat([steps[t, :size] for t, size in enumerate(sizes)]), _integers(sizes)


def _pad_packed_sequence(data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int) -> Any:
    """The rows put back in their (step, sequence), padding elsewhere: the kernel does not run under torch.func."""
    sizes = batch_sizes.tolist()
    if not sizes or sum(sizes) != data.shape[0]:
        return NotImplemented
    batch, steps = sizes[0], max(total_length, len(sizes))
    place = torch.tensor([t * batch + row for t, size in enumerate(sizes) for row in range(size)], device=data.device)
    rows = data.new_full((steps * batch, *data.shape[1:]), padding_value).index_copy(0, place, data)
    padded = rows.unflatten(0, (steps, batch))
    ends = [sum(size > row for size in sizes) for row in range(batch)]
    return padded.transpose(0, 1) if batch_first else padded, _integers(ends)


def _integers(numbers: Sequence[int]) -> Tensor:
    """A tensor on the CPU that no transform wraps, for kernels that read it by address."""
    with outside_transforms():
        return torch.tensor(numbers, device="cpu")


# Alignments.


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Any:
    """-log of the probability of all paths that spell the target (Graves et al., 2006, eq. 6-8): no second derivative.

    torch's gradient supposes that the probabilities of a step are a softmax; this is that of the value, whatever they are.
    """
    batched = log_probs.dim() == 3
    if not batched:
        log_probs, targets = log_probs.unsqueeze(1), targets.unsqueeze(0)
    steps, ends = (t.reshape(-1).tolist() if isinstance(t, Tensor) else list(t) for t in (input_lengths, target_lengths))
    labels = _labels(log_probs, targets, steps, ends, blank)
    if labels is None or reduction not in (0, 1, 2):
        return NotImplemented
    long = torch.tensor(ends, device=log_probs.device)
    loss = -_log_probability(log_probs, labels, steps, long, blank)
    loss = torch.where(loss == math.inf, 0.0, loss) if zero_infinity else loss
    if reduction:
        return loss.sum() if reduction == 2 else (loss / long.clamp(min=1)).mean()
    return loss if batched else loss.squeeze(0)


def _labels(log_probs: Tensor, targets: Tensor, steps: Sequence[int], ends: Sequence[int], blank: int) -> Tensor | None:
    """The targets as (batch, longest), the blank behind the end; None where torch has an error to raise."""
    if log_probs.dim() != 3 or targets.dim() not in (1, 2) or targets.is_floating_point() or not log_probs.is_floating_point():
        return None
    time, batch, classes = log_probs.shape
    if (
        not (len(steps) == len(ends) == batch > 0)
        or min(steps) < 1
        or max(steps) > time
        or min(ends) < 0
        or not 0 <= blank < classes
    ):
        return None
    if (sum(ends) != targets.shape[0]) if targets.dim() == 1 else (targets.shape[0] != batch or targets.shape[1] < max(ends)):
        return None
    rows = targets.split(list(ends)) if targets.dim() == 1 else [row[:end] for row, end in zip(targets, ends, strict=True)]
    return torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True, padding_value=blank)


def _log_probability(log_probs: Tensor, labels: Tensor, steps: Sequence[int], ends: Tensor, blank: int) -> Tensor:
    """log of the sum over paths through blank, l_1, blank, l_2, ..., blank, a step forward or two at a time."""
    batch, count = labels.shape
    states = torch.stack([torch.full_like(labels, blank), labels], -1).flatten(1)
    states = torch.cat([states, states.new_full((batch, 1), blank)], 1)  # (batch, 2 count + 1)
    leaps = torch.cat([torch.zeros_like(states[:, :2], dtype=torch.bool), states[:, 2:] != states[:, :-2]], 1)[:, : 2 * count + 1]
    leaps = leaps & (states != blank)
    heard = log_probs.gather(2, states.expand(len(log_probs), -1, -1))
    paths = heard[0].masked_fill(torch.arange(2 * count + 1, device=labels.device) > 1, -math.inf)
    last = torch.tensor(steps, device=labels.device).unsqueeze(1)
    for t in range(1, max(steps)):
        one = F.pad(paths, (1, 0), value=-math.inf)[:, :-1]
        two = F.pad(paths, (2, 0), value=-math.inf)[:, :-2].masked_fill(~leaps, -math.inf)
        paths = torch.where(t < last, log_of_sum(log_of_sum(paths, one), two) + heard[t], paths)
    end = 2 * ends.unsqueeze(1)
    before = paths.gather(1, (end - 1).clamp(min=0)).masked_fill(end == 0, -math.inf)
    return log_of_sum(paths.gather(1, end), before).squeeze(1)


def _conv_tbc(self: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """A convolution along the first dimension, of (time, batch, channels): the kernel has no forward and no batching rule."""
    return F.conv1d(self.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)


def _hfft(input: Tensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
    """The real transform of half of a Hermitian signal, irfft of the conjugate: its backward has no batching rule."""
    scaled = {None: "forward", "backward": "forward", "forward": "backward", "ortho": "ortho"}
    if not input.is_complex() or norm not in scaled:
        return NotImplemented
    parts = torch.view_as_real(input.resolve_conj())
    conjugate = torch.view_as_complex(torch.stack([parts[..., 0], -parts[..., 1]], -1))
    return torch.fft.irfft(conjugate, n, dim, scaled[norm])


SEQUENCES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "scaled_dot_product_attention": _attention,
        "_safe_softmax": _safe_softmax,
        "lstm_cell": _lstm_cell,
        "lstm": _layers(_lstm_step),
        "gru": _layers(_gru_step),
        "rnn_tanh": _layers(_elman_step(torch.tanh)),
        "rnn_relu": _layers(_elman_step(torch.relu)),
        "conv_tbc": _conv_tbc,
        "fft_hfft": _hfft,
        "ctc_loss": _ctc_loss,
        "_pack_padded_sequence": _pack_padded_sequence,
        "_pad_packed_sequence": _pad_packed_sequence,
    }
)
