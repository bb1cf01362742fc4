"""The table of the project's own: losses in every reduction, layers, and functions, each at a point away from kinks.

``names()`` are the cases, ``cases(name)`` builds one. Numbers come from a generator seeded with the name. A leaf is an argument
that is differentiated, a constant one that is not.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from sweep.problems import Case

__all__ = ["cases", "names"]

Spec = Callable[[Generator], Tensor]
_table: dict[str, tuple[Callable[..., Any], tuple[Spec, ...], tuple[Spec, ...], bool]] = {}


def names() -> list[str]:
    return list(_table)


def cases(name: str) -> Iterator[Case]:
    op, leaves, constants, random = _table[name]
    generator = Generator().manual_seed(zlib.crc32(name.encode()))
    yield Case(name, op, tuple(s(generator) for s in leaves), tuple(s(generator) for s in constants), random)


def _add(name: str, op: Callable[..., Any], *leaves: Spec, constants: tuple[Spec, ...] = (), random: bool = False) -> None:
    assert name not in _table, name
    _table[name] = op, leaves, constants, random


# Numbers --------------------------------------------------------------------------------------------------------------


def _normal(*shape: int) -> Spec:
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64)


def _between(low: float, high: float, *shape: int) -> Spec:
    return lambda g: low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)


def _positive(*shape: int) -> Spec:
    return _between(0.5, 2.0, *shape)


def _probability(*shape: int) -> Spec:
    return _between(0.1, 0.9, *shape)


def _apart(*shape: int) -> Spec:
    """Distinct numbers in random order, 0.3 apart: no ties for sorting and maxima, no zero."""

    def made(g: Generator) -> Tensor:
        n = torch.Size(shape).numel()
        return (0.3 * (torch.randperm(n, generator=g).double() - n // 2) + 0.11).reshape(shape)

    return made


def _labels(classes: int, *shape: int) -> Spec:
    return lambda g: torch.randint(classes, shape, generator=g)


def _signs(*shape: int) -> Spec:
    return lambda g: 2.0 * torch.randint(2, shape, generator=g).double() - 1


def _fixed(values: Any) -> Spec:
    return lambda g: torch.tensor(values)


def _spd(n: int, *batch: int) -> Spec:
    def made(g: Generator) -> Tensor:
        A = torch.randn(*batch, n, n, generator=g, dtype=torch.float64)
        return A @ A.mT / n + torch.eye(n, dtype=torch.float64)

    return made


def _well(n: int, *batch: int) -> Spec:
    """A matrix without symmetry that is far from singular."""
    return lambda g: 0.4 * torch.randn(*batch, n, n, generator=g, dtype=torch.float64) + 2 * torch.eye(n, dtype=torch.float64)


def _symmetric(A: Tensor) -> Tensor:
    return (A + A.mT) / 2


# Losses ---------------------------------------------------------------------------------------------------------------

_reductions = ("none", "mean", "sum")


def _loss(name: str, loss: Callable[..., Tensor], *leaves: Spec, constants: tuple[Spec, ...] = (), **options: Any) -> None:
    for reduction in _reductions:
        op = functools.partial(loss, reduction=reduction, **options)
        _add(f"{name}[{reduction}]", op, *leaves, constants=constants)


_loss("mse_loss", F.mse_loss, _normal(4, 3), constants=(_normal(4, 3),))
_loss("mse_loss of both", F.mse_loss, _normal(2, 3), _normal(2, 3))
_loss("l1_loss", F.l1_loss, _normal(4, 3), constants=(_normal(4, 3),))
_loss("smooth_l1_loss", F.smooth_l1_loss, _normal(4, 3), constants=(_normal(4, 3),))
_loss("smooth_l1_loss beta", F.smooth_l1_loss, _normal(4, 3), _normal(4, 3), beta=0.4)
_loss("huber_loss", F.huber_loss, _normal(4, 3), constants=(_normal(4, 3),))
_loss("huber_loss delta", F.huber_loss, _normal(2, 3), _normal(2, 3), delta=0.7)
_loss("cross_entropy", F.cross_entropy, _normal(4, 3), constants=(_labels(3, 4),))
_loss("cross_entropy of probabilities", F.cross_entropy, _normal(2, 3), _probability(2, 3))
_loss(
    "cross_entropy weighted, smoothed",
    lambda x, t, w, reduction: F.cross_entropy(x, t, w, label_smoothing=0.1, ignore_index=1, reduction=reduction),
    _normal(4, 3),
    constants=(_fixed([0, 1, 2, 2]), _positive(3)),
)
_loss("cross_entropy 2d", F.cross_entropy, _normal(2, 3, 2, 2), constants=(_labels(3, 2, 2, 2),))
_loss(
    "nll_loss",
    lambda x, t, reduction: F.nll_loss(x.log_softmax(1), t, reduction=reduction),
    _normal(4, 3),
    constants=(_labels(3, 4),),
)
_loss("binary_cross_entropy", F.binary_cross_entropy, _probability(4, 2), constants=(_probability(4, 2),))
_loss("binary_cross_entropy of both", F.binary_cross_entropy, _probability(2, 3), _probability(2, 3))
_loss("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, _normal(4, 2), constants=(_probability(4, 2),))
_loss(
    "binary_cross_entropy_with_logits weighted",
    lambda x, t, w, p, reduction: F.binary_cross_entropy_with_logits(x, t, w, pos_weight=p, reduction=reduction),
    _normal(4, 2),
    constants=(_probability(4, 2), _positive(4, 2), _positive(2)),
)
_loss("kl_div", F.kl_div, _normal(4, 2), constants=(_probability(4, 2),))
_loss("kl_div log target", F.kl_div, _normal(2, 3), _normal(2, 3), log_target=True)
_loss("poisson_nll_loss", F.poisson_nll_loss, _normal(4, 2), constants=(_positive(4, 2),))
_loss(
    "poisson_nll_loss full",
    F.poisson_nll_loss,
    _positive(4, 2),
    constants=(_between(2.0, 5.0, 4, 2),),
    log_input=False,
    full=True,
)
_loss("gaussian_nll_loss", F.gaussian_nll_loss, _normal(4), _normal(4), _positive(4))
_loss("soft_margin_loss", F.soft_margin_loss, _normal(4, 2), constants=(_signs(4, 2),))
_loss("hinge_embedding_loss", F.hinge_embedding_loss, _apart(4, 2), constants=(_signs(4, 2),))
_loss("margin_ranking_loss", F.margin_ranking_loss, _apart(4), _normal(4), constants=(_signs(4),), margin=0.2)
_loss("cosine_embedding_loss", F.cosine_embedding_loss, _normal(3, 2), _normal(3, 2), constants=(_signs(3),))
_loss("triplet_margin_loss", F.triplet_margin_loss, _normal(3, 2), _normal(3, 2), _normal(3, 2), margin=3.0)
_loss("triplet_margin_loss swapped", F.triplet_margin_loss, _normal(3, 2), _normal(3, 2), _normal(3, 2), margin=3.0, swap=True)
_loss(
    "triplet_margin_with_distance_loss",
    F.triplet_margin_with_distance_loss,
    _normal(3, 2),
    _normal(3, 2),
    _normal(3, 2),
    margin=3.0,
)
_loss("multi_margin_loss", F.multi_margin_loss, _normal(4, 3), constants=(_labels(3, 4),))
_loss("multi_margin_loss p=2", F.multi_margin_loss, _normal(4, 3), constants=(_labels(3, 4),), p=2)
_loss("multilabel_margin_loss", F.multilabel_margin_loss, _normal(2, 4), constants=(_fixed([[3, 0, -1, 1], [1, -1, 0, 2]]),))
_loss(
    "multilabel_soft_margin_loss",
    F.multilabel_soft_margin_loss,
    _normal(2, 4),
    constants=(_fixed([[1.0, 0, 1, 0], [0, 1.0, 1, 1]]),),
)
for _reduction in ("mean", "sum"):
    _add(
        f"ctc_loss[{_reduction}]",
        lambda x, reduction=_reduction: F.ctc_loss(
            x.log_softmax(2), torch.tensor([[1, 2], [2, 1]]), torch.tensor([5, 4]), torch.tensor([2, 1]), reduction=reduction
        ),
        _normal(5, 2, 3),
    )

# Normalization --------------------------------------------------------------------------------------------------------

_add("layer_norm", lambda x, w, b: F.layer_norm(x, (3,), w, b), _normal(2, 3), _normal(3), _normal(3))
_add("layer_norm without weights", lambda x: F.layer_norm(x, (2, 3)), _normal(2, 2, 3))
_add("layer_norm of two dimensions", lambda x, w: F.layer_norm(x, (2, 3), w), _normal(2, 2, 3), _normal(2, 3))
_add("rms_norm", lambda x, w: F.rms_norm(x, (3,), w), _normal(2, 3), _normal(3))
_add("rms_norm without weights", lambda x: F.rms_norm(x, (3,)), _normal(2, 3))
_add("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), _normal(2, 4, 3), _normal(4), _normal(4))
_add("group_norm without weights", lambda x: F.group_norm(x, 2), _normal(2, 4, 3))
_add("batch_norm in training", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), _normal(4, 2), _normal(2), _normal(2))
_add("batch_norm in training 2d", lambda x, w: F.batch_norm(x, None, None, w, None, True), _normal(3, 2, 2, 2), _normal(2))
_add(
    "batch_norm with running statistics",
    lambda x, w, m, v: F.batch_norm(x, m.clone(), v.clone(), w, None, True),
    _normal(4, 2),
    _normal(2),
    constants=(_normal(2), _positive(2)),
)
_add(
    "batch_norm in evaluation",
    lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, False),
    _normal(4, 2),
    _normal(2),
    _normal(2),
    constants=(_normal(2), _positive(2)),
)
_add("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), _normal(2, 2, 4), _normal(2), _normal(2))
_add("instance_norm without weights", lambda x: F.instance_norm(x), _normal(2, 2, 4))
_add("local_response_norm", lambda x: F.local_response_norm(x, 2), _normal(2, 3, 2))
_add("normalize", lambda x: F.normalize(x, dim=1), _normal(3, 2))
_add("normalize p=3", lambda x: F.normalize(x, p=3.0, dim=0), _normal(3, 2))
_add("weight_norm", lambda v, g: torch._weight_norm(v, g, 0), _normal(3, 2), _positive(3, 1))
_add("renorm", lambda x: torch.renorm(x, 2, 0, 1.0), _normal(3, 2))

# Activations ----------------------------------------------------------------------------------------------------------

for _name, _activation in {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, beta=3.0, threshold=2.0),
    "softsign": F.softsign,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": lambda x: F.softshrink(x, 0.3),
    "threshold": lambda x: F.threshold(x, 0.2, -1.0),
    "softmax": lambda x: F.softmax(x, 1),
    "softmin": lambda x: F.softmin(x, 0),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "glu": lambda x: F.glu(x, 0),
    "rrelu in evaluation": lambda x: F.rrelu(x, training=False),
}.items():
    _add(_name, _activation, _apart(4, 3))
_add("prelu", F.prelu, _apart(4, 2), _positive(2))
_add("dropout", lambda x: F.dropout(x, 0.4), _normal(4, 2), random=True)
_add("alpha_dropout", lambda x: F.alpha_dropout(x, 0.4, training=True), _normal(4, 2), random=True)
_add("gumbel_softmax", lambda x: F.gumbel_softmax(x, tau=0.7), _normal(4, 2), random=True)

# Convolution, pooling, interpolation ------------------------------------------------------------------------------------

_add("linear", F.linear, _normal(3, 2), _normal(2, 2), _normal(2))
_add("bilinear", F.bilinear, _normal(2, 2), _normal(2, 3), _normal(2, 2, 3), _normal(2))
_add("conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=1), _normal(2, 2, 5), _normal(3, 2, 3), _normal(3))
_add("conv1d strided, dilated", lambda x, w: F.conv1d(x, w, stride=2, dilation=2), _normal(1, 2, 7), _normal(2, 2, 2))
_add("conv2d", lambda x, w, b: F.conv2d(x, w, b), _normal(1, 2, 4, 4), _normal(2, 2, 3, 3), _normal(2))
_add("conv2d grouped", lambda x, w: F.conv2d(x, w, groups=2, padding=1), _normal(1, 4, 3, 3), _normal(4, 2, 2, 2))
_add("conv2d same", lambda x, w: F.conv2d(x, w, padding="same"), _normal(1, 2, 3, 3), _normal(2, 2, 2, 2))
_add("conv3d", lambda x, w, b: F.conv3d(x, w, b), _normal(1, 2, 3, 3, 3), _normal(2, 2, 2, 2, 2), _normal(2))
_add("conv_transpose1d", lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2), _normal(1, 2, 4), _normal(2, 2, 3), _normal(2))
_add("conv_transpose2d", lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), _normal(1, 2, 3, 3), _normal(2, 2, 3, 3))
_add("conv_transpose3d", lambda x, w: F.conv_transpose3d(x, w), _normal(1, 2, 2, 2, 2), _normal(2, 1, 2, 2, 2))
for _d in (1, 2, 3):
    _shape = (1, 2, *(4,) * _d)
    for _kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool"):
        _pool = getattr(F, f"{_kind}{_d}d")
        _call = {"lp_pool": lambda x, pool: pool(x, 2.0, 2)}.get(_kind, lambda x, pool: pool(x, 2))
        _spec = _positive(*_shape) if _kind == "lp_pool" else _apart(*_shape)
        _add(f"{_kind}{_d}d", functools.partial(_call, pool=_pool), _spec)
_add("max_pool2d overlapping", lambda x: F.max_pool2d(x, 3, 1, padding=1), _apart(1, 1, 4, 4))
_add("max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), _apart(1, 1, 4, 4))
_add(
    "fractional_max_pool2d",
    lambda x, s: F.fractional_max_pool2d(x, 2, 2, _random_samples=s),
    _apart(1, 1, 5, 5),
    constants=(_probability(1, 1, 2),),
)
for _mode, _shape in {
    "nearest": (1, 2, 4),
    "linear": (1, 2, 4),
    "bilinear": (1, 1, 3, 4),
    "bicubic": (1, 1, 4, 4),
    "trilinear": (1, 1, 2, 3, 2),
    "area": (1, 1, 4, 4),
    "nearest-exact": (1, 1, 3, 3),
}.items():
    _add(f"interpolate {_mode}", functools.partial(F.interpolate, scale_factor=1.5, mode=_mode), _normal(*_shape))
_add("interpolate antialias", lambda x: F.interpolate(x, size=(2, 3), mode="bilinear", antialias=True), _normal(1, 1, 4, 4))
for _mode in ("bilinear", "nearest", "bicubic"):
    _add(
        f"grid_sample {_mode}",
        functools.partial(F.grid_sample, mode=_mode, align_corners=False),
        _normal(1, 1, 4, 4),
        _between(-0.8, 0.8, 1, 2, 2, 2),
    )
_add(
    "grid_sample 3d",
    functools.partial(F.grid_sample, align_corners=True),
    _normal(1, 1, 3, 3, 3),
    _between(-0.8, 0.8, 1, 1, 2, 2, 3),
)
for _mode in ("border", "reflection"):
    _add(
        f"grid_sample {_mode}",
        functools.partial(F.grid_sample, padding_mode=_mode, align_corners=True),
        _normal(1, 1, 4, 4),
        _between(-1.3, 1.3, 1, 2, 2, 2),
    )
_add("affine_grid", lambda t: F.affine_grid(t, [1, 1, 2, 3], align_corners=False), _normal(1, 2, 3))
for _mode in ("constant", "reflect", "replicate", "circular"):
    _add(f"pad {_mode}", functools.partial(F.pad, pad=(1, 2), mode=_mode), _normal(1, 2, 4))
_add("unfold", lambda x: F.unfold(x, 2), _normal(1, 2, 3, 3))
_add("fold", lambda x: F.fold(x, (3, 3), 2), _normal(1, 4, 4))
_add("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), _normal(1, 4, 2, 2))

# Embeddings, attention, recurrence ----------------------------------------------------------------------------------------

_add("embedding", lambda w, i: F.embedding(i, w), _normal(4, 2), constants=(_labels(4, 3, 2),))
_add(  # whose padding row is a constant, as torch's gradient has it
    "embedding padded",
    lambda w, p, i: F.embedding(i, torch.cat([w[:1], p, w[1:]]), padding_idx=1),
    _normal(3, 2),
    constants=(_normal(1, 2), _labels(4, 5)),
)
_add("embedding scaled", lambda w, i: F.embedding(i, w, scale_grad_by_freq=True), _normal(4, 2), constants=(_labels(4, 9),))
for _mode in ("sum", "mean", "max"):
    _add(
        f"embedding_bag {_mode}",
        lambda w, i, o, mode=_mode: F.embedding_bag(i, w, o, mode=mode),
        _apart(4, 2),
        constants=(_labels(4, 6), _fixed([0, 2, 3])),
    )
_add(
    "embedding_bag weighted",
    lambda w, s, i: F.embedding_bag(i, w, per_sample_weights=s, mode="sum"),
    _normal(4, 2),
    _normal(2, 3),
    constants=(_labels(4, 2, 3),),
)
_heads = (_normal(1, 2, 3, 2), _normal(1, 2, 4, 2), _normal(1, 2, 4, 2))
_add("attention", F.scaled_dot_product_attention, *_heads)
_add("attention masked", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), *_heads, _normal(3, 4))
_add("attention causal", functools.partial(F.scaled_dot_product_attention, is_causal=True), *_heads)
_add("attention with dropout", functools.partial(F.scaled_dot_product_attention, dropout_p=0.3), *_heads, random=True)


def _module(name: str, make: Callable[[], nn.Module], *inputs: Spec, random: bool = False) -> None:
    """(inputs, then parameters) are leaves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        net = make().double()
    keys = [key for key, _ in net.named_parameters()]
    values = [p.detach().clone() for p in net.parameters()]
    buffers = {key: b.detach().clone() for key, b in net.named_buffers()}

    def op(*args: Tensor) -> Any:
        given = dict(zip(keys, args[len(inputs) :], strict=True))
        kept = {key: b.clone().to(args[0].dtype) if b.is_floating_point() else b.clone() for key, b in buffers.items()}
        return functional_call(net, {**given, **kept}, args[: len(inputs)])

    _add(name, op, *inputs, *(lambda g, p=p: p for p in values), random=random)


class _SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


class _Packed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        out, state = self.layer(nn.utils.rnn.pack_padded_sequence(x, [3, 2]))
        return nn.utils.rnn.pad_packed_sequence(out)[0], state


_module("MultiheadAttention", _SelfAttention, _normal(1, 3, 4))
_module("MultiheadAttention with biases", lambda: _SelfAttention(add_bias_kv=True), _normal(1, 3, 4))
_module("TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.0, "gelu", batch_first=True), _normal(1, 2, 4))
_module(
    "TransformerEncoderLayer, norm first",
    lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.0, "gelu", norm_first=True),
    _normal(2, 1, 4),
)
_module("TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(4, 2, 3, 0.0, "gelu"), _normal(2, 1, 4), _normal(2, 1, 4))
_module("RNN", lambda: nn.RNN(2, 2), _normal(3, 2, 2))
_module("RNN relu", lambda: nn.RNN(2, 2, nonlinearity="relu"), _normal(3, 2, 2))
_module("LSTM", lambda: nn.LSTM(2, 2), _normal(3, 2, 2))
_module(
    "LSTM of two layers, both ways", lambda: nn.LSTM(2, 2, num_layers=2, bidirectional=True, batch_first=True), _normal(1, 3, 2)
)
_module("LSTM projected", lambda: nn.LSTM(2, 3, proj_size=2), _normal(3, 2, 2))
_module("GRU", lambda: nn.GRU(2, 2), _normal(3, 2, 2))
_module("GRU both ways", lambda: nn.GRU(2, 2, bidirectional=True), _normal(3, 2, 2))
_module("LSTM packed", lambda: _Packed(nn.LSTM(2, 2)), _normal(3, 2, 2))
_module("GRU packed", lambda: _Packed(nn.GRU(2, 2)), _normal(3, 2, 2))
_module("RNNCell", lambda: nn.RNNCell(2, 2), _normal(2, 2))
_module("LSTMCell", lambda: nn.LSTMCell(2, 2), _normal(2, 2))
_module("GRUCell", lambda: nn.GRUCell(2, 2), _normal(2, 2))
_module("BatchNorm1d module", lambda: nn.BatchNorm1d(3), _normal(4, 3))
_module("spectral_norm", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).eval(), _normal(2, 3))
_module("weight_norm module", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), _normal(2, 3))
_module("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)), _normal(2, 2))
_module(
    "convolutional network",
    lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2)),
    _normal(2, 1, 4, 4),
)

# Linear algebra -------------------------------------------------------------------------------------------------------

_linalg = torch.linalg
_add("det", _linalg.det, _well(3))
_add("det batched", _linalg.det, _well(2, 2))
_add("slogdet", lambda A: _linalg.slogdet(A)[1], _well(3))
_add("logdet", torch.logdet, _spd(3))
_add("inv", _linalg.inv, _well(3))
_add("inv batched", _linalg.inv, _well(2, 2))
_add("pinv", _linalg.pinv, _normal(3, 2))
_add("pinv hermitian", lambda A: _linalg.pinv(_symmetric(A), hermitian=True), _spd(3))
_add("solve", _linalg.solve, _well(3), _normal(3, 2))
_add("solve vector", _linalg.solve, _well(3), _normal(3))
_add("solve batched", _linalg.solve, _well(2, 2), _normal(2, 2, 1))
_add("solve from the right", functools.partial(_linalg.solve, left=False), _well(2), _normal(3, 2))
_add("solve_triangular", lambda A, B: _linalg.solve_triangular(A, B, upper=True), _well(3), _normal(3, 2))
_add("triangular_solve", lambda B, A: torch.triangular_solve(B, A).solution, _normal(3, 2), _well(3))
_add("tensorsolve", lambda A, b: _linalg.tensorsolve(A.reshape(2, 2, 4), b), _well(4), _normal(2, 2))
_add("tensorinv", lambda A: _linalg.tensorinv(A.reshape(2, 2, 4), ind=2), _well(4))
_add("cholesky", lambda A: _linalg.cholesky(_symmetric(A)), _spd(3))
_add("cholesky upper", lambda A: _linalg.cholesky(_symmetric(A), upper=True), _spd(2, 2))
_add("cholesky_solve", lambda B, A: torch.cholesky_solve(B, _linalg.cholesky(_symmetric(A))), _normal(3, 2), _spd(3))
_add("cholesky_solve of a full matrix", torch.cholesky_solve, _normal(3, 2), _well(3))
_add("cholesky_solve batched", torch.cholesky_solve, _normal(2, 2, 1), _well(2, 2))
_add("cholesky_inverse", lambda A: torch.cholesky_inverse(_linalg.cholesky(_symmetric(A))), _spd(3))
_add("cholesky_inverse of a full matrix", torch.cholesky_inverse, _well(3))
_add("cholesky_inverse batched", torch.cholesky_inverse, _well(2, 2))
_add("qr", lambda A: tuple(_linalg.qr(A)), _normal(3, 2))
_add("lu", lambda A: _linalg.lu(A)[1:], _well(3))
_add("lu_factor", lambda A: _linalg.lu_factor(A)[0], _well(3))
_add("lu_solve", lambda A, B: _linalg.lu_solve(*_linalg.lu_factor(A), B), _well(3), _normal(3, 2))
_add("lu_unpack", lambda A: torch.lu_unpack(*_linalg.lu_factor(A))[1:], _well(3))
_add("eigh", lambda A: (_linalg.eigh(_symmetric(A))[0], _linalg.eigh(_symmetric(A))[1].square()), _spd(3))
_add("eigvalsh", lambda A: _linalg.eigvalsh(_symmetric(A)), _spd(3))
_add("eigvals", lambda A: _linalg.eigvals(A).real.square().sum() + _linalg.eigvals(A).imag.pow(4).sum(), _normal(3, 3))
_add("eig", lambda A: _linalg.eig(A)[1].abs(), _normal(3, 3))
_add("svdvals", _linalg.svdvals, _normal(3, 2))
_add("svd", lambda A: (lambda U, S, V: (U.square(), S, V.square()))(*_linalg.svd(A, full_matrices=False)), _normal(3, 2))
_add("lstsq", lambda A, B: _linalg.lstsq(A, B)[0], _normal(3, 2), _normal(3, 1))
_add("matrix_exp", _linalg.matrix_exp, _normal(3, 3))
_add("matrix_power", lambda A: _linalg.matrix_power(A, 3), _normal(3, 3))
_add("matrix_power inverse", lambda A: _linalg.matrix_power(A, -2), _well(3))
_add("multi_dot", lambda *m: _linalg.multi_dot(m), _normal(2, 3), _normal(3, 2), _normal(2, 2))
_add("householder_product", _linalg.householder_product, _normal(3, 2), _between(0.1, 0.5, 2))
_add("ormqr", torch.ormqr, _normal(3, 2), _between(0.1, 0.5, 2), _normal(3, 2))
_add("norm", _linalg.norm, _normal(3, 2))
_add("vector_norm p=3", lambda x: _linalg.vector_norm(x, 3, dim=0), _normal(3, 2))
_add("vector_norm p=1", lambda x: _linalg.vector_norm(x, 1), _normal(3, 2))
_add("vector_norm inf", lambda x: _linalg.vector_norm(x, torch.inf), _apart(3, 2))
_add("vector_norm p=0.5", lambda x: _linalg.vector_norm(x, 0.5), _positive(3, 2))
_add("matrix_norm nuclear", lambda A: _linalg.matrix_norm(A, "nuc"), _normal(3, 2))
_add("matrix_norm 2", lambda A: _linalg.matrix_norm(A, 2), _normal(3, 2))
_add("matrix_norm 1", lambda A: _linalg.matrix_norm(A, 1), _normal(3, 2))
_add("cond", _linalg.cond, _well(2))
_add("vecdot", _linalg.vecdot, _normal(3, 2), _normal(3, 2))
_add("cross", lambda a, b: _linalg.cross(a, b), _normal(2, 3), _normal(2, 3))
_add("vander", _linalg.vander, _normal(3))
_add("matmul", torch.matmul, _normal(2, 3), _normal(3, 2))
_add("matmul batched", torch.matmul, _normal(2, 2, 3), _normal(3, 2))
_add("bmm", torch.bmm, _normal(2, 2, 2), _normal(2, 2, 2))
_add("addmm", torch.addmm, _normal(2, 2), _normal(2, 3), _normal(3, 2))
_add("baddbmm", torch.baddbmm, _normal(2, 2, 2), _normal(2, 2, 1), _normal(2, 1, 2))
_add("addcmul", torch.addcmul, _normal(3), _normal(3), _normal(3))
_add("addcdiv", torch.addcdiv, _normal(3), _normal(3), _positive(3))
_add("einsum", lambda a, b, c: torch.einsum("ij,jk,ki->i", a, b, c), _normal(2, 2), _normal(2, 2), _normal(2, 2))
_add("kron", torch.kron, _normal(2, 2), _normal(2, 2))
_add("outer", torch.outer, _normal(3), _normal(2))
_add("tensordot", lambda a, b: torch.tensordot(a, b, 1), _normal(2, 3), _normal(3, 2))
_add("cdist", torch.cdist, _normal(3, 2), _normal(3, 2))
_add("cdist p=1", lambda a, b: torch.cdist(a, b, p=1.0), _normal(3, 2), _normal(3, 2))
_add("cdist p=3", lambda a, b: torch.cdist(a, b, p=3.0), _normal(3, 2), _normal(3, 2))
_add("cdist p=inf", lambda a, b: torch.cdist(a, b, p=torch.inf), _normal(3, 2), _normal(3, 2))
_add("cdist by products", lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"), _normal(3, 2), _normal(3, 2))
_add("pdist", F.pdist, _normal(4, 2))
_add("pairwise_distance", F.pairwise_distance, _normal(3, 2), _normal(3, 2))
_add("cosine_similarity", F.cosine_similarity, _normal(3, 2), _normal(3, 2))

# Reductions, cumulative functions, order ------------------------------------------------------------------------------

for _name, _reduce in {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(0),
    "prod": lambda x: x.prod(1),
    "prod of everything": torch.prod,
    "std": lambda x: x.std(0),
    "var": torch.var,
    "var uncorrected": lambda x: x.var(1, correction=0),
    "var_mean": lambda x: torch.var_mean(x, 0),
    "std_mean": lambda x: torch.std_mean(x, 1),
    "logsumexp": lambda x: x.logsumexp(1),
    "max": lambda x: x.max(1).values,
    "min of everything": torch.min,
    "amax": lambda x: x.amax(0),
    "median": lambda x: x.median(0).values,
    "nanmedian": torch.nanmedian,
    "mode": lambda x: x.mode(1).values,
    "quantile": lambda x: x.quantile(0.3, 0),
    "nanquantile": lambda x: x.nanquantile(0.6, 1),
    "kthvalue": lambda x: x.kthvalue(2, 1).values,
    "topk": lambda x: x.topk(2, 1).values,
    "sort": lambda x: x.sort(0).values,
    "msort": torch.msort,
    "aminmax": lambda x: tuple(x.aminmax(dim=0)),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(1),
    "cummax": lambda x: x.cummax(0).values,
    "cummin": lambda x: x.cummin(1).values,
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "trapezoid": lambda x: torch.trapezoid(x, dx=0.3),
    "cumulative_trapezoid": torch.cumulative_trapezoid,
    "diff": torch.diff,
    "gradient": lambda x: torch.gradient(x, dim=0)[0],
    "cov": torch.cov,
    "corrcoef": torch.corrcoef,
    "norm by dimension": lambda x: x.norm(dim=1),
    "dist": lambda x: torch.dist(x[0], x[1], 3),
    "nansum": torch.nansum,
    "renorm of rows": lambda x: x.renorm(2, 0, 0.7),
    "count by softmax": lambda x: x.softmax(0).cumsum(0),
}.items():
    _add(_name, _reduce, _apart(3, 3))

# Indexing and shapes --------------------------------------------------------------------------------------------------

_place = _fixed([[0, 1, 1], [2, 0, 1]])
_add("gather", lambda x, i: x.gather(0, i), _normal(3, 3), constants=(_place,))
_add("index_select", lambda x, i: x.index_select(1, i), _normal(3, 3), constants=(_fixed([2, 0, 2]),))
_add("take", lambda x, i: x.take(i), _normal(3, 3), constants=(_fixed([2, 0, 2, 5]),))
_add("take_along_dim", lambda x, i: x.take_along_dim(i, 0), _normal(3, 3), constants=(_place,))
_add("indexing", lambda x, i: x[i, 1:], _normal(3, 3), constants=(_fixed([2, 0, 2]),))
_add("masked_select", lambda x: x[torch.tensor([[True, False, True], [False, True, True]])], _normal(2, 3))
_add("masked_fill", lambda x, v: x.masked_fill(torch.eye(3, dtype=torch.bool), v), _normal(3, 3), _normal())
_add("masked_scatter", lambda x, s: x.masked_scatter(torch.eye(3, dtype=torch.bool), s), _normal(3, 3), _normal(3))
_add("scatter", lambda x, s, i: x.scatter(0, i, s), _normal(3, 3), _normal(2, 3), constants=(_fixed([[0, 1, 2], [1, 2, 0]]),))
_add("scatter_add", lambda x, s, i: x.scatter_add(0, i, s), _normal(3, 3), _normal(2, 3), constants=(_place,))
for _mode in ("sum", "mean", "amax", "amin", "prod"):
    _add(
        f"scatter_reduce {_mode}",
        lambda x, s, i, how=_mode: x.scatter_reduce(0, i, s, how),
        _apart(3, 3),
        _normal(2, 3),
        constants=(_place,),
    )
    if _mode != "sum":
        _add(
            f"index_reduce {_mode}",
            lambda x, s, i, how=_mode: x.index_reduce(0, i, s, how),
            _apart(3, 2),
            _normal(3, 2),
            constants=(_fixed([0, 2, 0]),),
        )
_add("index_add", lambda x, s, i: x.index_add(0, i, s), _normal(3, 2), _normal(3, 2), constants=(_fixed([0, 2, 0]),))
_add("index_copy", lambda x, s, i: x.index_copy(0, i, s), _normal(3, 2), _normal(2, 2), constants=(_fixed([2, 0]),))
_add("index_fill", lambda x, i: x.index_fill(0, i, 0.3), _normal(3, 2), constants=(_fixed([2, 0]),))
_add(
    "index_put",
    lambda x, s, i: x.index_put((i,), s, accumulate=True),
    _normal(3, 2),
    _normal(3, 2),
    constants=(_fixed([0, 2, 0]),),
)
_add("put", lambda x, s, i: x.put(i, s, accumulate=True), _normal(3, 2), _normal(3), constants=(_fixed([0, 5, 0]),))
_add("select_scatter", lambda x, s: x.select_scatter(s, 0, 1), _normal(3, 2), _normal(2))
_add("slice_scatter", lambda x, s: x.slice_scatter(s, 0, 1, 3), _normal(4, 2), _normal(2, 2))
_add("diagonal_scatter", lambda x, s: x.diagonal_scatter(s), _normal(3, 3), _normal(3))
_add("where", lambda x, y: torch.where(x > 0.05, x.exp(), y), _apart(3, 2), _normal(3, 2))
_add("segment_reduce sum", lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 1])), _apart(3, 2))
_add("segment_reduce max", lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([2, 1])), _apart(3, 2))
_add("roll", lambda x: x.roll(1, 0), _normal(3, 2))
_add("flip", lambda x: x.flip(0), _normal(3, 2))
_add("repeat_interleave", lambda x: x.repeat_interleave(2, 0), _normal(3, 2))
_add("cat", lambda a, b: torch.cat([a, b]), _normal(2, 2), _normal(1, 2))
_add("stack", lambda a, b: torch.stack([a, b], 1), _normal(2, 2), _normal(2, 2))
_add("tril", torch.tril, _normal(3, 3))
_add("diag_embed", torch.diag_embed, _normal(2, 2))
_add("block_diag", lambda a, b: torch.block_diag(a, b), _normal(2, 2), _normal(1, 2))
_add("as_strided", lambda x: x.contiguous().as_strided((2, 2), (1, 2)), _normal(6))
_add("cartesian_prod", lambda a, b: torch.cartesian_prod(a, b), _normal(2), _normal(3))
_add("combinations", torch.combinations, _normal(3))
_add("clone written in place", lambda x: x.clone().mul_(x).add_(1.0), _normal(3, 2))
_add("slices written in place", lambda x: _written(x), _normal(3, 2))


def _written(x: Tensor) -> Tensor:
    y = x.sin()
    y[1] = x[0] * x[2]
    y[:, 0] += x[:, 1] ** 2
    y[0].mul_(2.0)
    return y


# Elementwise functions --------------------------------------------------------------------------------------------------

for _name, _elementwise in {
    "abs": torch.abs,
    "square": torch.square,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asinh": torch.asinh,
    "atan": torch.atan,
    "sinc": torch.sinc,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfcx": torch.special.erfcx,
    "sgn": torch.sgn,
    "frac": torch.frac,
    "clamp": lambda x: x.clamp(-0.6, 0.6),
    "nan_to_num": torch.nan_to_num,
    "log_ndtr": torch.special.log_ndtr,
    "ndtr": torch.special.ndtr,
    "i0": torch.i0,
    "i0e": torch.special.i0e,
    "i1": torch.special.i1,
    "i1e": torch.special.i1e,
    "pow 3": lambda x: x**3,
    "2 to the power": lambda x: 2.0**x,
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(3)),
    "logit of a sigmoid": lambda x: torch.logit(torch.sigmoid(x)),
    "complex modulus": lambda x: torch.complex(x, x * x).abs(),
    "view_as_complex": lambda x: torch.view_as_complex(torch.stack([x, x.sin()], -1)).exp(),
    "polar": lambda x: torch.polar(x.exp(), x),
}.items():
    _add(_name, _elementwise, _apart(3, 2))
for _name, _elementwise in {
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "lgamma": torch.lgamma,
    "digamma": torch.digamma,
    "polygamma": lambda x: torch.polygamma(1, x),
    "mvlgamma": lambda x: torch.mvlgamma(x + 1, 2),
    "entr": torch.special.entr,
    "acosh": lambda x: torch.acosh(1.2 + x),
    "pow 2.5": lambda x: x**2.5,
    "pow of itself": lambda x: x**x,
    "xlogy": lambda x: torch.xlogy(x, 1 + x),
    "xlog1py": lambda x: torch.special.xlog1py(x, x * x),
    "float_power": lambda x: torch.float_power(x, 1.5),
}.items():
    _add(_name, _elementwise, _positive(3, 2))
for _name, _elementwise in {
    "asin": torch.asin,
    "acos": torch.acos,
    "atanh": torch.atanh,
    "erfinv": torch.erfinv,
    "ndtri": torch.special.ndtri,
    "logit": torch.logit,
}.items():
    _add(_name, _elementwise, _probability(3, 2))
_add("zeta", lambda q, s: torch.special.zeta(s, q), _positive(3, 2), constants=(_between(2.0, 3.0, 3, 2),))
for _name, _binary in {
    "mul": torch.mul,
    "div": torch.div,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "pow of two": torch.pow,
    "xlogy of two": torch.xlogy,
    "logaddexp": torch.logaddexp,
    "logaddexp2": torch.logaddexp2,
    "maximum": torch.maximum,
    "fmin": torch.fmin,
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "lerp": lambda a, b: torch.lerp(a, b, a * b),
    "copysign": torch.copysign,
    "ldexp of two": torch.ldexp,
}.items():
    _add(_name, _binary, _positive(3, 2), _positive(3, 2))

_masked = torch.tensor([[True, False], [False, False], [False, True]])
_add(
    "logaddexp with nothing to add",
    lambda a, b: torch.logaddexp(a.masked_fill(_masked, -torch.inf), b.masked_fill(_masked, -torch.inf)),
    _normal(3, 2),
    _normal(3, 2),
)
_add("masked_select of a scalar", lambda x: x.masked_select(torch.tensor([True, False, True])) ** 2, _positive())

# Fourier transforms -----------------------------------------------------------------------------------------------------

for _name, _transform in {
    "fft": torch.fft.fft,
    "rfft": torch.fft.rfft,
    "ihfft": torch.fft.ihfft,
    "fft2": torch.fft.fft2,
    "rfft2": torch.fft.rfft2,
    "irfft of fft": lambda x: torch.fft.irfft(torch.fft.fft(x) ** 2, 4),
    "hfft": lambda x: torch.fft.hfft(torch.complex(x, x * x)),
    "fftshift": torch.fft.fftshift,
    "power spectrum": lambda x: torch.fft.rfft(x).abs() ** 2,
    "convolution by fft": lambda x: torch.fft.irfft(torch.fft.rfft(x[0]) * torch.fft.rfft(x[1]), 4),
    "stft": lambda x: torch.stft(x.flatten(), 4, window=torch.ones(4, dtype=x.dtype), return_complex=True),
    "istft": lambda x: torch.istft(
        torch.stft(x.flatten(), 4, window=torch.ones(4, dtype=x.dtype), return_complex=True) ** 2,
        4,
        window=torch.ones(4, dtype=x.dtype),
    ),
}.items():
    _add(_name, _transform, _normal(2, 4))
