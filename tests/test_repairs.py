"""Every repair has the operator's value, and derivatives to third order that differences confirm.

Truth: the gradient of the bare operator by plain `torch.autograd.grad`, and central differences of it. The canaries say
what torch alone gets wrong, and fail when torch mends it: then the repair may go.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode

import functional_hess as fh
from functional_hess import repairs
from functional_hess.repairs import FIRST_ORDER_REPAIRS, MAPPED_REPAIRS, REPAIRS

pytestmark = [  # what some of the operators say of themselves
    pytest.mark.filterwarnings("ignore:index_reduce.. is in beta:UserWarning"),
    *(
        pytest.mark.filterwarnings(f"ignore:torch.{name} is deprecated:UserWarning")
        for name in ("triangular_solve", "lu_solve", "cholesky", "chain_matmul")
    ),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop.*glu:UserWarning"),
]
torch_dtypes = (torch.float64, torch.float32)
aten = torch.ops.aten


class Swapped(TorchFunctionMode):
    """Always swaps, whatever the nesting."""

    def __init__(self, table: Mapping[Any, Any] = REPAIRS) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


class Watched(TorchFunctionMode):
    """Swaps nothing, remembers every function that arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def repaired(f: Callable[..., Any]) -> Callable[..., Any]:
    def g(*args: Any, **kwargs: Any) -> Any:
        with Swapped():
            return f(*args, **kwargs)

    return g


def tensors(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


# ----------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    name: str
    op: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    alone: Mapping[str, str] = field(default_factory=dict)  # what torch alone does wrong: mode -> "wrong" or "raises"
    tolerance: float = 1e-8

    def loss(self, x: Tensor) -> Tensor:
        """A nonlinear function of every output, so that no derivative vanishes."""
        parts = [part.reshape(shape) for part, shape in zip(x.split([*map(numel, self.shapes)]), self.shapes, strict=True)]
        return sum(  # type: ignore[return-value]
            (torch.sin(1.1 * y + 0.2) * torch.linspace(0.3, 1.1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()
            for y in leaves(self.op(*parts))
        )

    def point(self) -> Tensor:
        return torch.cat([t.flatten() for t in tensors(*self.shapes, seed=1)])


def numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def leaves(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [y for part in out if part is not None for y in leaves(part)]


def module(make: Callable[[], nn.Module], *shapes: tuple[int, ...], **call: Any) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    """(inputs, then parameters) -> the module's output, in float64."""
    net = make().double()
    names = [name for name, _ in net.named_parameters()]

    def op(*args: Tensor) -> Any:
        return functional_call(net, dict(zip(names, args[len(shapes) :], strict=True)), args[: len(shapes)], call)

    return op, (*shapes, *(tuple(p.shape) for p in net.parameters()))


def packed(net: nn.Module, lengths: list[int]) -> Callable[..., Any]:
    names = [name for name, _ in net.named_parameters()]

    def op(x: Tensor, *parameters: Tensor) -> Any:
        rows = nn.utils.rnn.pack_padded_sequence(x, lengths)
        out, state = functional_call(net, dict(zip(names, parameters, strict=True)), (rows,))
        return out.data, state

    return op


NORMS = {"hessian": "wrong", "third": "wrong"}
FORWARD_RAISES = {"forward over reverse": "raises"}
IN_PLACE = {"third": "raises"}
NO_SECOND = {"forward over reverse": "raises", "reverse over reverse": "raises"}
NO_BATCHING = {"gradient of vmap": "raises"}
NO_FIRST = {**NO_SECOND, "gradient": "raises"}
FACTORS = {"third": "wrong", "pullbacks of mapped points": "wrong"}
(TARGET,) = tensors((4, 3), seed=5)
SIGNS = TARGET.sign()
LABELS = torch.tensor([0, 2, 1, 1])
BAG, OFFSETS = torch.tensor([0, 2, 1, 1, 3, 0]), torch.tensor([0, 2, 2, 5])
PLACE = torch.tensor([[0, 1], [1, 1], [0, 0]])
EYE = 2 * torch.eye(3, dtype=torch.float64)
FOUR = 3 * torch.eye(4, dtype=torch.float64)
RANK_THREE = (
    torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0, -3.0], dtype=torch.float64)) - tensors((5, 5), seed=1)[0]
)  # plus the point
FIRST_AT_ZERO = tensors((4,), seed=1)[0] * torch.tensor([1.0, 0.0, 0.0, 0.0])  # to be taken from the point
TWO_AT_ZERO = tensors((4,), seed=1)[0] * torch.tensor([1.0, 0.0, 1.0, 0.0])
BOOL_MASK = torch.tensor([[True, False, True], [False, False, False]])
FLOAT_MASK = torch.tensor([[0.0, 0.3, float("-inf")], [1.0, 0.0, -0.5]], dtype=torch.float64)
DEAD_ROW = torch.tensor([[0.0, 0.0, 0.0], [-torch.inf] * 3], dtype=torch.float64)
HEADS = ((1, 2, 2, 2), (1, 2, 3, 2), (1, 2, 3, 2))
small_gru = nn.GRU(1, 2, bias=False, bidirectional=True).double()
small_lstm = nn.LSTM(1, 2).double()

CASES = [
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (3,), w, b), ((4, 3), (3,), (3,)), NORMS),
    Case("layer_norm of two dimensions", lambda x, w: torch.layer_norm(x, (2, 3), w), ((2, 2, 3), (2, 3)), NORMS),
    Case("layer_norm without weights", lambda x: F.layer_norm(x, (3,)), ((4, 3),), {"third": "wrong"}),
    Case("native_layer_norm", lambda x, w: torch.native_layer_norm(x, (3,), w, None, 1e-5), ((4, 3), (3,)), NORMS),
    Case(
        "layer_norm of a vmapped gradient",
        lambda x, w: vmap(grad(lambda r: torch.sin(F.layer_norm(r, (3,), w)).sum()))(x),
        ((2, 3), (3,)),
    ),
    Case("batch_norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), ((4, 3), (3,), (3,)), NORMS),
    Case(
        "batch_norm of images",
        lambda x, w: torch.batch_norm(x, w, None, None, None, True, 0.1, 1e-5, False),
        ((2, 2, 2, 2), (2,)),
        NORMS,
    ),
    Case(
        "native_batch_norm",
        lambda x, w, b: torch.native_batch_norm(x, w, b, None, None, True, 0.1, 1e-5),
        ((4, 2), (2,), (2,)),
        NORMS,
    ),
    *(
        Case(
            name,
            lambda x, w, b, call=call: call(x, w, b, torch.zeros_like(x[0]), torch.ones_like(x[0]))[0],
            ((4, 2), (2,), (2,)),
            {"third": "wrong"},
        )
        for name, call in {
            "_batch_norm_impl_index": lambda *args: torch._batch_norm_impl_index(*args, True, 0.1, 1e-5, False),
            "_native_batch_norm_legit": lambda *args: torch._native_batch_norm_legit(*args, True, 0.1, 1e-5),
            "_native_batch_norm_legit without statistics": lambda *args: torch._native_batch_norm_legit(
                *args[:3], True, 0.1, 1e-5
            ),
            "_native_batch_norm_legit_functional": lambda *args: aten._native_batch_norm_legit_functional(*args, True, 0.1, 1e-5),
            "_batch_norm_with_update_functional": lambda *args: aten._batch_norm_with_update_functional(*args, 0.1, 1e-5),
        }.items()
    ),
    Case("instance_norm", lambda x, w, b: F.instance_norm(x, None, None, w, b), ((2, 2, 3), (2,), (2,)), NORMS),
    Case("mse_loss", lambda x: F.mse_loss(x, TARGET.to(x)), ((4, 3),), FORWARD_RAISES),
    Case("mse_loss of both", lambda x, y: F.mse_loss(x, y, reduction="sum"), ((4, 3), (4, 3))),
    Case("mse_loss without reduction", lambda x: F.mse_loss(x, TARGET.to(x), reduction="none"), ((4, 3),)),
    Case("huber_loss", lambda x, y: F.huber_loss(x, y, delta=0.7), ((4, 3), (4, 3)), FORWARD_RAISES),
    Case(
        "weighted huber_loss",
        lambda x: F.huber_loss(x, TARGET.to(x), weight=TARGET.to(x).exp()),
        ((4, 3),),
        FORWARD_RAISES,
    ),
    Case("soft_margin_loss", lambda x: F.soft_margin_loss(x, SIGNS.to(x)), ((4, 3),), FORWARD_RAISES),
    Case("multi_margin_loss", lambda x: F.multi_margin_loss(x, LABELS, weight=SIGNS[0].exp().to(x)), ((4, 3),), NO_SECOND),
    Case(
        "squared multi_margin_loss",
        lambda x: F.multi_margin_loss(x, LABELS, p=2, reduction="none"),
        ((4, 3),),
        NO_SECOND,
    ),
    Case(
        "multilabel_margin_loss",
        lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 2, -1], [1, -1, 0]])),
        ((2, 3),),
        NO_SECOND,
    ),
    # torch's own gradient of hardsigmoid multiplies by 1/6 in single precision, whatever the dtype
    Case("hardsigmoid", lambda x: F.hardsigmoid(3 * x), ((7,),), NO_SECOND, tolerance=1e-7),
    Case("hardsigmoid in place", lambda x: F.hardsigmoid(3 * x, inplace=True), ((7,),), NO_SECOND, tolerance=1e-7),
    Case("glu", lambda x: F.glu(x), ((2, 4),), {"third": "raises"}),
    Case("attention", F.scaled_dot_product_attention, HEADS, NO_SECOND),
    Case(
        "attention with a boolean mask and a row without keys",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BOOL_MASK, scale=0.4),
        HEADS,
        NO_SECOND,
    ),
    Case(
        "attention with a float mask",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, FLOAT_MASK.to(m) + m),
        (*HEADS, (2, 3)),
    ),
    Case(
        "causal attention of grouped queries",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        ((1, 2, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2)),
        NO_SECOND,
    ),
    Case(
        "multi-head attention",
        *module(lambda: nn.MultiheadAttention(2, 1), (3, 1, 2), (3, 1, 2), (3, 1, 2), need_weights=False),
        NO_SECOND,
    ),
    Case("_safe_softmax", lambda x: torch._safe_softmax(x + FLOAT_MASK.to(x), 1), ((2, 3),)),
    Case("_safe_softmax with a dead row", lambda x: torch._safe_softmax(x + DEAD_ROW.to(x), 1), ((2, 3),), {"third": "wrong"}),
    Case("lstm_cell", *module(lambda: nn.LSTMCell(1, 2), (2, 1)), NO_BATCHING),
    Case("lstm", *module(lambda: nn.LSTM(1, 2), (3, 2, 1)), NO_BATCHING),
    Case("lstm with projections", *module(lambda: nn.LSTM(1, 2, 2, proj_size=1, batch_first=True), (1, 2, 1))),
    Case(
        "packed lstm",
        packed(small_lstm, [3, 1]),
        ((3, 2, 1), *(tuple(p.shape) for p in small_lstm.parameters())),
        NO_SECOND,
    ),
    Case(
        "packed bidirectional gru",
        packed(small_gru, [3, 1]),
        ((3, 2, 1), *(tuple(p.shape) for p in small_gru.parameters())),
        NO_SECOND,
    ),
    Case("gru", *module(lambda: nn.GRU(1, 2), (3, 2, 1)), NO_BATCHING),
    Case("rnn", *module(lambda: nn.RNN(1, 2, 2, bidirectional=True), (2, 1, 1)), NO_BATCHING),
    Case("rnn with relu", *module(lambda: nn.RNN(2, 2, nonlinearity="relu"), (2, 1, 2)), NO_BATCHING),
    Case(
        "conv_tbc",
        lambda x, w, b: torch.conv_tbc(x, w, b, 1),
        ((4, 2, 2), (2, 2, 2), (2,)),
        FORWARD_RAISES,
    ),
    Case(
        "hfft",
        lambda x, y: torch.fft.hfft(torch.complex(x, y), norm="ortho"),
        ((2, 3), (2, 3)),
        {"pullbacks of mapped points": "raises"},
    ),
    Case(
        "ctc_loss",
        lambda x: F.ctc_loss(x.log_softmax(2), torch.tensor([[1, 1], [2, 0]]), [4, 3], [2, 1], reduction="none"),
        ((4, 2, 3),),
        NO_SECOND,
    ),
    Case("pack_padded_sequence", lambda x: nn.utils.rnn.pack_padded_sequence(x, [3, 1]).data, ((3, 2, 2),), NO_FIRST),
    Case(
        "weight_norm",
        lambda v, g: torch._weight_norm(v, g, 0),
        ((3, 2), (3, 1)),
        {**FORWARD_RAISES, "reverse over reverse": "wrong"},
    ),
    Case(
        "weight_norm of the last dimension",
        lambda v, g: torch._weight_norm(v, g, 1),
        ((3, 2), (1, 2)),
        {"reverse over reverse": "wrong"},
    ),
    Case(
        "the kernel of weight_norm",
        lambda v, g: torch._weight_norm_interface(v, g, 0)[0],
        ((3, 2), (3, 1)),
        {**FORWARD_RAISES, "reverse over reverse": "wrong"},
    ),
    Case(
        "cholesky_inverse",
        lambda x: torch.cholesky_inverse(x.tril() + EYE.to(x)),
        ((3, 3),),
        {"forward over reverse": "wrong"},
    ),
    Case(
        "upper cholesky_inverse",
        lambda x: (x.triu() + EYE.to(x)).cholesky_inverse(upper=True),
        ((2, 3, 3),),
        {"forward over reverse": "wrong"},
    ),
    Case(
        "cholesky_solve",
        lambda b, x: torch.cholesky_solve(b, x.tril() + EYE.to(x)),
        ((3, 2), (3, 3)),
    ),
    Case(
        "triangular_solve",
        lambda b, x: torch.triangular_solve(b, x.triu() + EYE.to(x))[0],
        ((3, 2), (3, 3)),
        {"forward over reverse": "wrong"},
    ),
    Case("solve", lambda x, b: torch.linalg.solve(x + 2 * EYE.to(x), b), ((3, 3), (3, 2)), FACTORS),
    Case(
        "solve from the right",
        lambda x, b: torch.linalg.solve(x + 2 * EYE.to(x), b, left=False),
        ((3, 3), (2, 3)),
        FACTORS,
    ),
    Case("solve of a vector", lambda x, b: torch.linalg.solve(x + 2 * EYE.to(x), b), ((3, 3), (3,)), FACTORS),
    Case(
        "solve of complex numbers",
        lambda x, b: torch.view_as_real(torch.linalg.solve(torch.complex(x, x.mT) + 2 * EYE.to(x), torch.complex(b, b**2))),
        ((3, 3), (3, 1)),
        FACTORS,
    ),
    Case("solve_ex", lambda x, b: torch.linalg.solve_ex(x + 2 * EYE.to(x), b)[0], ((3, 3), (3, 2)), FACTORS),
    Case(
        "tensorsolve",
        lambda x, b: torch.linalg.tensorsolve((x + FOUR.to(x)).reshape(2, 2, 4), b),
        ((4, 4), (2, 2)),
        FACTORS,
    ),
    *(
        Case(
            f"lu_solve {left=} {adjoint=}",
            lambda x, b, o={"left": left, "adjoint": adjoint}: torch.linalg.lu_solve(
                *torch.linalg.lu_factor(x + 2 * EYE.to(x)), b, **o
            ),
            ((3, 3), (3, 2) if left else (2, 3)),
            {"mapped rows": "wrong", "pullbacks of mapped points": "wrong"},
        )
        for left in (True, False)
        for adjoint in (True, False)
    ),
    Case(
        "lu_solve by its old name",
        lambda x, b: b.lu_solve(*torch.linalg.lu_factor(x + 2 * EYE.to(x))),
        ((3, 3), (3, 1)),
        {"mapped rows": "wrong", "pullbacks of mapped points": "wrong"},
    ),
    Case("det", lambda x: torch.linalg.det(0.3 * x + EYE.to(x)), ((3, 3),), FACTORS),
    Case("det of one and of two rows", lambda x, y: (torch.det(x), y.det()), ((1, 1), (2, 2)), FACTORS),
    Case("det of four rows", lambda x: torch.det((x + FOUR.to(x)) / 3), ((4, 4),), FACTORS),
    Case(
        "det of complex numbers",
        lambda x: torch.view_as_real(torch.linalg.det(torch.complex(x, x.mT) / 3 + FOUR.to(x) / 3)),
        ((4, 4),),
        FACTORS,
    ),
    Case(
        "slogdet of complex numbers",
        lambda x: [torch.view_as_real(t + 0j) for t in torch.linalg.slogdet(torch.complex(x, x.mT) + 2 * EYE.to(x))],
        ((3, 3),),
        FACTORS,
    ),
    Case("householder_product", torch.linalg.householder_product, ((4, 2), (2,)), {"third": "wrong"}),
    Case("orgqr", torch.orgqr, ((3, 3), (2,)), {"third": "wrong"}),
    *(
        Case(
            f"ormqr {left=} {transpose=}",
            lambda x, t, c, left=left, transpose=transpose: torch.ormqr(x, t, c, left, transpose),
            ((3, 2), (2,), (3, 1) if left else (1, 3)),
            FORWARD_RAISES,
        )
        for left in (True, False)
        for transpose in (True, False)
    ),
    Case("cholesky by its old name", lambda x: torch.cholesky(x @ x.mT + EYE.to(x)), ((3, 3),), FORWARD_RAISES),
    Case("upper cholesky", lambda x: torch.linalg.cholesky(x @ x.mT + EYE.to(x), upper=True), ((3, 3),)),
    Case("cholesky_ex", lambda x: torch.linalg.cholesky_ex(x @ x.mT + EYE.to(x))[0], ((2, 3, 3),)),
    Case("eigh", lambda x: [t**2 for t in torch.linalg.eigh(x + x.mT)], ((3, 3),), {"third": "wrong"}),
    Case("eigvalsh", lambda x: torch.linalg.eigvalsh(x + x.mT, "U"), ((3, 3),), {"third": "wrong"}),
    Case("eig", lambda x: [t.abs() for t in torch.linalg.eig(x)], ((3, 3),), {"mapped rows": "wrong", "third": "wrong"}),
    Case(
        "eigvals",
        lambda x: torch.view_as_real(torch.linalg.eigvals(x)),
        ((3, 3),),
        {"mapped rows": "wrong", "third": "wrong"},
    ),
    Case("chain_matmul", lambda x, y, z: torch.chain_matmul(x, y, z), ((2, 3), (3, 2), (2, 1)), NO_BATCHING),
    Case("slogdet by its old name", lambda x: torch.slogdet(x + 2 * EYE.to(x)), ((3, 3),), FACTORS),
    Case("slogdet", lambda x: torch.linalg.slogdet(x + 2 * EYE.to(x)), ((3, 3),), FACTORS),
    Case("logdet", lambda x: torch.logdet(x + 2 * EYE.to(x)), ((3, 3),), FACTORS),
    Case("cdist", torch.cdist, ((3, 2), (2, 2)), NO_SECOND),
    Case(
        "cdist by products",
        lambda x, y: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"),
        ((3, 2), (2, 2)),
        FORWARD_RAISES,
    ),
    *(
        Case(f"cdist with p={p}", lambda x, y, p=p: torch.cdist(x, y, p=p), ((3, 2), (2, 2)), NO_SECOND)
        for p in (1.0, 1.5, 3.0, 4.0, float("inf"))
    ),
    Case("pdist", F.pdist, ((4, 2),), NO_SECOND),
    *(
        Case(f"vector_norm with p={p}", lambda x, p=p: torch.linalg.vector_norm(x, p, 1), ((3, 2),), IN_PLACE if p > 1 else {})
        for p in (0.5, 1.5, 2, 3, 4)
    ),
    Case("norm of everything", lambda x: torch.linalg.norm(x), ((2, 2, 2),), IN_PLACE),
    Case("norm of rows", lambda x: x.norm(3, 0), ((3, 2),), IN_PLACE),
    Case("Frobenius norm", lambda x: torch.linalg.matrix_norm(x, keepdim=True), ((2, 3, 2),), IN_PLACE),
    Case("norm of complex numbers", lambda x, y: torch.linalg.vector_norm(torch.complex(x, y)), ((3,), (3,)), IN_PLACE),
    Case("normalize", lambda x: F.normalize(x, 3.0), ((3, 2),), IN_PLACE),
    Case("dist", lambda x, y: torch.dist(x, y, 2), ((3, 2), (3, 2)), IN_PLACE),
    Case("pairwise_distance", lambda x, y: F.pairwise_distance(x, y, 3.0), ((3, 2), (2,)), IN_PLACE),
    Case("std", lambda x: x.std(1, correction=0), ((2, 3),), IN_PLACE),
    Case("std_mean", lambda x: torch.std_mean(x, (0, 1), keepdim=True), ((2, 3),), IN_PLACE),
    *(Case(f"renorm with p={p}", lambda x, p=p: torch.renorm(x, p, 0, 1.1), ((3, 2),), IN_PLACE) for p in (1.5, 2, 3)),
    Case("renorm in place", lambda x: (1.0 * x).renorm_(2, -1, 1.1), ((3, 2),), IN_PLACE),
    Case("cosine_similarity", lambda x, y: F.cosine_similarity(x, y, -1), ((3, 2), (2,)), IN_PLACE),
    Case("prod", lambda x: (x.prod(), x.prod(1), x.prod(0, keepdim=True)), ((3, 3),)),
    Case("prod with a zero", lambda x: (x - FIRST_AT_ZERO.to(x)).prod(), ((4,),), {"third": "wrong"}),
    Case("prod with two zeros", lambda x: (x - TWO_AT_ZERO.to(x)).reshape(1, 4).prod(1), ((4,),), {"third": "wrong"}),
    Case("cumprod with two zeros", lambda x: (x - TWO_AT_ZERO.to(x)).cumprod(0), ((4,),), {"third": "wrong"}),
    Case("cumprod in place", lambda x: (x - TWO_AT_ZERO.to(x)).cumprod_(0), ((4,),), {"third": "wrong"}),
    Case("logcumsumexp", lambda x: x.logcumsumexp(-1), ((2, 5),), {"third by reverse mode": "wrong"}),
    Case("sinc", lambda x: torch.sinc(3 * x), ((4,),)),
    *(
        Case(name, lambda x, op=op: op(x - FIRST_AT_ZERO.to(x)), ((4,),), {"forward over reverse": "wrong"})
        for name, op in (("sinc at 0", torch.sinc), ("sinc in place at 0", torch.Tensor.sinc_))
    ),
    Case("embedding_bag", lambda w: F.embedding_bag(BAG, w, OFFSETS, padding_idx=1), ((4, 3),), NO_SECOND),
    Case(
        "embedding_bag of weighted samples",
        lambda w, s: F.embedding_bag(BAG.view(2, 3), w, mode="sum", per_sample_weights=s),
        ((4, 3), (2, 3)),
        NO_SECOND,
    ),
    Case(
        "embedding_bag of maxima",
        lambda w: F.embedding_bag(BAG, w, OFFSETS, mode="max", padding_idx=-1),
        ((4, 3),),
        NO_SECOND,
    ),
    Case(
        "scatter_reduce",
        lambda x, s: x.scatter_reduce(0, PLACE, s, "prod"),
        ((4, 3), (3, 2)),
        {"forward over reverse": "wrong"},
    ),
    Case(
        "scatter_reduce in place",
        lambda x, s: (1.0 * x).scatter_reduce_(0, PLACE, s, "prod"),
        ((4, 3), (3, 2)),
        FORWARD_RAISES,
    ),
    Case(
        "scatter_reduce with a zero",
        lambda s: s.new_ones(2).scatter_reduce(0, torch.tensor([0, 0, 1, 0]), s - FIRST_AT_ZERO.to(s), "prod"),
        ((4,),),
        {"third": "wrong"},
    ),
    Case(
        "scatter_reduce over what is there",
        lambda x, s: torch.scatter_reduce(x, 1, PLACE, s, "prod", include_self=False),
        ((3, 3), (3, 2)),
        {"forward over reverse": "wrong"},
    ),
    Case("index_reduce in place", lambda x, s: (1.0 * x).index_reduce_(0, PLACE[0], s, "prod"), ((2, 2), (2, 2)), FORWARD_RAISES),
    *(
        Case(
            f"index_reduce {how}",
            lambda x, s, how=how: x.index_reduce(0, PLACE[0], s, how),
            ((2, 2), (2, 2)),
            FORWARD_RAISES,
        )
        for how in ("prod", "mean", "amax", "amin")
    ),
    Case(
        "select_scatter",
        lambda x, s: torch.select_scatter(x, s, 0, -1),
        ((2, 3), (3,)),
        {"gradient of vmap": "wrong"},
    ),
    *(
        Case(
            f"grid_sample {mode} {padding} {corners}",
            lambda x, g, mode=mode, padding=padding, corners=corners: F.grid_sample(x, 0.6 * g, mode, padding, corners),
            ((1, 2, 3, 2), (1, 1, 2, 2)),
            FORWARD_RAISES,
        )
        for mode, padding, corners in (
            ("bilinear", "zeros", True),
            ("bilinear", "reflection", False),
            ("nearest", "border", True),
            ("bicubic", "zeros", False),
            ("bicubic", "reflection", True),
        )
    ),
    Case(
        "grid_sample in three dimensions",
        lambda x, g: F.grid_sample(x, 0.6 * g, padding_mode="border", align_corners=False),
        ((1, 1, 2, 2, 3), (1, 1, 1, 2, 3)),
        FORWARD_RAISES,
    ),
    *(
        Case(
            f"the kernel of grid_sample, {axes}d",
            lambda x, g, kernel=kernel: kernel(x, 0.6 * g, 0, 0, True),
            ((1, 1, *(2,) * axes), (1, *(1,) * axes, axes)),
            FORWARD_RAISES,
        )
        for axes, kernel in ((2, torch.grid_sampler_2d), (3, torch.grid_sampler_3d))
    ),
    *(
        Case(
            f"segment_reduce {how}",
            lambda x, how=how: torch.segment_reduce(x, how, lengths=torch.tensor([2, 1]), initial=0.3),
            ((3, 2),),
            NO_SECOND,
        )
        for how in ("sum", "mean", "max", "min", "prod")
    ),
    Case(
        "segment_reduce of rows",
        lambda x: torch.segment_reduce(x, "mean", offsets=torch.tensor([[0, 1, 3], [0, 2, 3]]), axis=1),
        ((2, 3, 2),),
        NO_SECOND,
    ),
    Case("masked_scatter", lambda x, s: x.masked_scatter(BOOL_MASK, s), ((2, 3), (2,)), FORWARD_RAISES),
    Case("masked_scatter in place", lambda x, s: (1.0 * x).masked_scatter_(BOOL_MASK, s), ((2, 3), (2,)), FORWARD_RAISES),
    Case(
        "masked_scatter from more than is needed", lambda x, s: x.masked_scatter(BOOL_MASK, s), ((2, 3), (2, 2)), FORWARD_RAISES
    ),
    Case("masked_select", lambda x: torch.masked_select(x, BOOL_MASK[0]), ((2, 3),)),
    Case("max_unpool1d", lambda x: F.max_unpool1d(x, torch.tensor([[[3, 1]], [[0, 2]]]), 2), ((2, 1, 2),)),
    Case("max_unpool2d", lambda x: F.max_unpool2d(x, torch.tensor([[[[0, 7], [2, 5]]]]), (2, 2)), ((1, 1, 2, 2),)),
    Case("max_unpool3d", lambda x: F.max_unpool3d(x, torch.tensor([[[[3]]]]), 2), ((1, 1, 1, 1),)),
    Case("tensor_split", lambda x: torch.tensor_split(x, torch.tensor([1, 2])), ((3, 2),), NO_FIRST),
    Case(
        "pad_packed_sequence",
        lambda x: nn.utils.rnn.pad_packed_sequence(nn.utils.rnn.PackedSequence(x, torch.tensor([2, 2, 1])), True, 0.3, 4),
        ((5, 2),),
        NO_FIRST,
    ),
    Case("rrelu", lambda x: F.rrelu(x), ((2, 3),), {"vmapped rows": "raises"}),
    Case("rrelu in place", lambda x: F.rrelu(1.0 * x, inplace=True), ((2, 3),), {"vmapped rows": "raises"}),
    Case("logaddexp", torch.logaddexp, ((2, 3), (3,))),
    Case("logaddexp2", torch.logaddexp2, ((2, 3), (3,))),
    Case(
        "linear_cross_entropy in chunks",
        lambda x, w: F.linear_cross_entropy(x, w, LABELS[:2], options=nn.LinearCrossEntropyOptions(batch_chunk_size=1)),
        ((2, 3), (3, 3)),
        NO_SECOND,
    ),
    Case("ldexp", lambda x, n: torch.ldexp(x, n), ((2, 3), (3,))),
]
table = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))


RAISED = re.compile(
    "forward AD|not implemented|ZeroTensors|data pointer|support aten::|different size|setup_context|inplace oper|proper Tensor"
)

# --------------------------------------------------------------------------------------------------------------- truth


def bare_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def difference(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float = 2e-4) -> Tensor:
    """d/dt f(x + t v) at 0, to fourth order in h."""
    near, far = f(x + h * v) - f(x - h * v), f(x + 2 * h * v) - f(x - 2 * h * v)
    return (8 * near - far) / (12 * h)


def true_hessian(case: Case) -> Tensor:
    x = case.point()
    return torch.stack([difference(lambda y: bare_gradient(case.loss, y), x, e) for e in torch.eye(len(x), dtype=x.dtype)])


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-4))


def trace_of_hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return vmap(lambda e: jvp(grad(f), (x,), (e,))[1] @ e)(torch.eye(len(x), dtype=x.dtype)).sum()


def third_by(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return grad(lambda y: trace_of_hessian(f, y))(x)


MODES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "forward over reverse": lambda f, x: torch.stack([jvp(grad(f), (x,), (e,))[1] for e in torch.eye(len(x), dtype=x.dtype)]),
    "reverse over reverse": lambda f, x: torch.stack([vjp(grad(f), x)[1](e)[0] for e in torch.eye(len(x), dtype=x.dtype)]),
    "vmapped rows": lambda f, x: vmap(lambda e: jvp(grad(f), (x,), (e,))[1])(torch.eye(len(x), dtype=x.dtype)),
    "hessian": lambda f, x: hessian(f)(x),
}


def two_points(x: Tensor) -> Tensor:
    return torch.stack([x, 1.01 * x])


def mapped_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return vmap(lambda y: vmap(lambda e: jvp(grad(f), (y,), (e,))[1])(torch.eye(len(x), dtype=x.dtype)))(two_points(x))


def third_by_reverse(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return grad(lambda y: (vjp(grad(f), y)[1](x.cos())[0] * x.sin()).sum())(x)


@torch.no_grad()
def pullbacks_of_mapped_points(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of several cotangents at each of several points; without a graph torch reuses a factorization, with one it does not."""
    cotangents = torch.linspace(0.5, 2.0, 3, dtype=x.dtype)
    return vmap(lambda y: vmap(vjp(f, y)[1])(cotangents)[0])(two_points(x))


# What else torch alone is asked for; its truth is what the repair says, which the tests of all repairs confirm.
OTHERS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "third": third_by,
    "third by reverse mode": third_by_reverse,
    "gradient of vmap": lambda f, x: grad(lambda z: vmap(f)(z).sum())(two_points(x)),
    "mapped rows": mapped_rows,
    "gradient": lambda f, x: grad(f)(x),
    "pullbacks of mapped points": pullbacks_of_mapped_points,
}
AT_ONE_LEVEL = ("gradient", "gradient of vmap", "pullbacks of mapped points")
# ------------------------------------------------------------------------------------------------- values, derivatives


@table
@pytest.mark.parametrize("dtype", torch_dtypes, ids=str)
def test_a_repair_has_the_value_and_dtype_of_the_operator(case: Case, dtype: torch.dtype) -> None:
    args = tensors(*case.shapes, seed=2, dtype=dtype)
    theirs, ours = leaves(case.op(*args)), leaves(repaired(case.op)(*args))
    same_values(ours, theirs)


def same_values(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not (b.is_floating_point() or b.is_complex()):
            assert torch.equal(a, b)
            continue
        digits = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[b.dtype.to_real()]
        torch.testing.assert_close(a, b, rtol=digits, atol=digits, equal_nan=True)


@table
def test_second_derivatives_of_a_repair_agree_with_differences_of_torchs_gradient(case: Case) -> None:
    x, truth = case.point(), true_hessian(case)
    assert truth.abs().max() > 1e-4
    for name, mode in MODES.items():
        assert relative_error(mode(repaired(case.loss), x), truth) < case.tolerance, name


@table
def test_third_derivatives_of_a_repair_agree_with_differences_of_the_trace(case: Case) -> None:
    x, f = case.point(), repaired(case.loss)
    (v,) = tensors(x.shape, seed=3)
    truth = difference(lambda y: trace_of_hessian(f, y), x, v)
    assert abs(third_by(f, x) @ v - truth) < 1e-6 * (truth.abs() + 1e-2)


@table
def test_the_gradient_of_a_vmapped_repair_is_the_gradient_row_by_row(case: Case) -> None:
    x = torch.stack([case.point(), 1.01 * case.point()])
    together = grad(lambda z: vmap(repaired(case.loss))(z).sum())(x)
    assert relative_error(together, torch.stack([grad(repaired(case.loss))(row) for row in x])) < 1e-12


def test_every_case_is_one_of_a_repair() -> None:
    for case in CASES:
        with Watched() as mode:
            case.op(*tensors(*case.shapes))
        assert any(func in REPAIRS for func in mode.seen), case.name


# ------------------------------------------------------------------------------------------------------------ canaries


@pytest.mark.parametrize(
    ("case", "mode"), [(c, m) for c in CASES for m in c.alone], ids=lambda p: getattr(p, "name", p).replace(" ", "-")
)
def test_torch_alone_still_has_it_wrong_or_raises(case: Case, mode: str) -> None:
    x = case.point()
    derivative = {**MODES, **OTHERS}[mode]
    if case.alone[mode] == "raises":
        with pytest.raises(RuntimeError, match=RAISED):
            derivative(case.loss, x)
        return
    truth = OTHERS[mode](repaired(case.loss), x) if mode in OTHERS else true_hessian(case)
    assert truth.isfinite().all()
    assert not relative_error(derivative(case.loss, x), truth) < 1e-5


ELSEWHERE: dict[str, bool] = {}  # operators whose canary is a test of its own, and whether it is of one gradient


def canary(*names: str, at_one_level: bool = False) -> Callable[[Any], Any]:
    """The test fails when torch mends the operators of these names."""
    ELSEWHERE.update(dict.fromkeys(names, at_one_level))
    return lambda test: test


class Consulted(dict[Any, Any]):
    """The table, which remembers the names of what was looked up in it and found."""

    names: set[str]

    def get(self, op: Any, default: Any = None) -> Any:
        if op in self:
            self.names.add(name_of(op))
        return super().get(op, default)


def name_of(op: Any) -> str:
    """One for all the objects by which a Python caller reaches an operator."""
    return op.__name__.split(".")[0]


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The modes in which an operator is known to be wrong or to raise, by its name."""
    consulted = Consulted(REPAIRS)
    monkeypatch.setattr(repairs, "_repairs", consulted)  # the kernels inside torch's fronts are looked up there
    found: dict[str, set[str]] = {name: {"gradient" if one else "other"} for name, one in ELSEWHERE.items()}
    for case in filter(lambda case: case.alone, CASES):
        consulted.names = set()
        with Swapped(consulted):
            case.op(*tensors(*case.shapes))
        for name in consulted.names:
            found.setdefault(name, set()).update(case.alone)
    return found


def test_every_operator_of_the_table_has_a_canary_and_of_one_gradient_where_it_is_repaired_for_that(canaries: Any) -> None:
    table, first = ({name_of(op) for op in part} for part in (REPAIRS, FIRST_ORDER_REPAIRS | MAPPED_REPAIRS))
    assert canaries.keys() == table
    assert {name for name in first if not canaries[name].intersection(AT_ONE_LEVEL)} == set()


@canary("cholesky_inverse", "cholesky_solve", at_one_level=True)
@pytest.mark.parametrize("upper", [True, False])
def test_torch_alone_counts_the_triangle_that_cholesky_kernels_do_not_read_and_the_repair_does_not(upper: bool) -> None:
    (b,) = tensors((2, 3, 2), seed=3)
    for op in (torch.cholesky_inverse, functools.partial(torch.cholesky_solve, b)):

        def f(x: Tensor, op: Callable[..., Tensor] = op) -> Tensor:
            return op(0.3 * x.view(2, 3, 3) + EYE, upper=upper).sin().sum()

        (x,) = tensors((18,), seed=6)
        truth = torch.stack([difference(f, x, e) for e in torch.eye(18, dtype=x.dtype)])
        assert relative_error(bare_gradient(f, x), truth) > 0.1
        assert relative_error(grad(repaired(f))(x), truth) < 1e-9
    assert {torch.cholesky_inverse, torch.Tensor.cholesky_solve} < FIRST_ORDER_REPAIRS


def test_torch_alone_solves_wrong_where_factors_and_right_sides_are_batched_apart_and_the_repair_does_not() -> None:
    """So `vmap` of every derivative that reuses an LU factorization is wrong: a canary for all of them."""
    A, B = tensors((2, 3, 3), (4, 3, 2))
    factors = torch.linalg.lu_factor(A + EYE / 2)
    truth = torch.linalg.inv(A + EYE / 2).unsqueeze(1) @ B

    def each(solve: Callable[..., Tensor]) -> Tensor:
        return vmap(lambda LU, pivots: vmap(lambda b: solve(LU, pivots, b))(B))(*factors)

    assert relative_error(each(torch.linalg.lu_solve), truth) > 0.1
    assert relative_error(each(repaired(torch.linalg.lu_solve)), truth) < 1e-12


@pytest.mark.parametrize(
    "f",
    [
        lambda a: torch.linalg.solve(a + EYE, TARGET[:3]).sin().sum(),
        lambda a: torch.linalg.slogdet(a + EYE)[1].sin(),
        lambda a: torch.linalg.det(a + EYE).sin(),
        lambda a: torch.view_as_real(torch.linalg.eigvals(a + EYE)).sin().sum(),
    ],
    ids=["solve", "slogdet", "det", "eigvals"],
)
def test_torch_alone_has_mapped_jacobians_of_linear_algebra_wrong_and_the_repair_right(f: Callable[..., Tensor]) -> None:
    (x,) = tensors((2, 3, 3))
    basis = torch.eye(9, dtype=x.dtype).view(9, 3, 3)

    def mapped(f: Callable[..., Tensor]) -> Tensor:
        return vmap(lambda a: vmap(lambda e: jvp(grad(f), (a,), (e,))[1])(basis))(x)

    truth = torch.stack([torch.stack([vjp(grad(repaired(f)), a)[1](e)[0] for e in basis]) for a in x])
    assert not relative_error(mapped(f), truth) < 1e-3
    assert relative_error(mapped(repaired(f)), truth) < 1e-10


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    ("of_matrices", "of_right_sides"),
    [
        ((2, 3, 3), (2, 3, 2)),
        ((3, 3), (5, 3, 2)),
        ((2, 1, 3, 3), (5, 3, 2)),
        ((2, 3, 3), (3, 1)),
        ((2, 3, 3), (2, 3)),
        ((3, 3), (3,)),
    ],
    ids=str,
)
def test_jacobians_of_solves_are_right_however_they_are_batched_and_mapped(
    of_matrices: tuple[int, ...], of_right_sides: tuple[int, ...], graph: bool
) -> None:
    A, B = tensors(of_matrices, of_right_sides)
    A = A / 2 + EYE

    def f(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.solve(A, B), torch.linalg.solve_ex(A, B)[0]

    def pushed(A: Tensor) -> Any:  # a pullback, transposed
        _, push = fh.linearize(lambda A: f(A, B)[0], A)
        return fh.vmap(push)(torch.eye(A.numel(), dtype=A.dtype).view(-1, *A.shape))

    with torch.set_grad_enabled(graph):
        for at in (0, 1):
            by_rows, by_columns = fh.jacrev(f, at)(A, B), fh.jacfwd(f, at)(A, B)
            torch.testing.assert_close(by_rows, by_columns, rtol=1e-10, atol=1e-12)
            each = fh.vmap(lambda A, B, at=at: fh.jacrev(f, at)(A, B))(torch.stack([A, A.mT]), torch.stack([B, B.cos()]))
            torch.testing.assert_close(each[0][0], by_columns[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(each[1][1], fh.jacfwd(f, at)(A.mT, B.cos())[1], rtol=1e-10, atol=1e-12)
        columns = fh.jacfwd(f)(A, B)[0].flatten(-A.dim()).movedim(-1, 0)
        torch.testing.assert_close(pushed(A), columns, rtol=1e-10, atol=1e-12)


def test_torch_alone_raises_where_several_right_sides_are_solved_with_one_matrix_and_the_repair_does_not() -> None:
    A, B = tensors((3, 3), (5, 3, 2))
    with pytest.raises(RuntimeError, match="size of tensor"):
        jacrev(torch.linalg.solve, 1)(A, B)
    assert jacrev(repaired(torch.linalg.solve), 1)(A, B).shape == (5, 3, 2, 5, 3, 2)


def leibniz(A: Tensor) -> Tensor:
    """det A = sum over permutations s of sgn(s) a_1s(1) ... a_ns(n): a polynomial of plain products."""
    total = A.new_zeros(())
    for order in itertools.permutations(range(A.shape[0])):
        inversions = sum(order[i] > order[j] for i, j in itertools.combinations(range(A.shape[0]), 2))
        term = A[0, order[0]] * (-1) ** inversions
        for i in range(1, A.shape[0]):
            term = term * A[i, order[i]]
        total = total + term
    return total


@pytest.mark.parametrize("rank", [4, 3, 2, 1])
def test_determinants_of_singular_matrices_have_the_derivatives_of_the_polynomial(rank: int) -> None:
    u, v, direction = tensors((5, 5), (5, 5), (5, 5), seed=4)
    A = u[:, :rank] @ v[:rank]
    for derivative in (
        lambda f: jvp(grad(f), (A,), (direction,))[1],
        lambda f: grad(lambda a: (jvp(grad(f), (a,), (direction,))[1] * v).sum())(A),
    ):
        found, truth = derivative(repaired(torch.linalg.det)), derivative(leibniz)
        assert (found - truth).abs().max() < 1e-9 * truth.abs().max().clamp(min=1)
    assert (repaired(torch.linalg.det)(A)).abs() < 1e-10


@canary("linalg_cholesky", "linalg_cholesky_ex", "linalg_eigvalsh")
@pytest.mark.parametrize(
    "op",
    [torch.linalg.cholesky, lambda a: torch.linalg.cholesky_ex(a)[0], torch.linalg.eigvalsh],
    ids=["cholesky", "cholesky_ex", "eigvalsh"],
)
def test_what_reads_one_triangle_has_one_hessian_in_both_modes_that_of_the_symmetric_part(op: Callable[..., Tensor]) -> None:
    def f(a: Tensor) -> Tensor:
        return op(a).sin().sum()

    (x, v) = tensors((3, 3), (3, 3))
    a = x @ x.mT + EYE
    truth = jvp(grad(lambda a: f((a + a.mT) / 2)), (a,), (v + v.mT,))[1] / 2
    for product in (jvp(grad(repaired(f)), (a,), (v,))[1], vjp(grad(repaired(f)), a)[1](v)[0]):
        assert relative_error((product + product.mT) / 2, truth) < 1e-12 and relative_error(product, product.mT) < 1e-12
    assert relative_error(jvp(grad(f), (a,), (v,))[1], truth) > 1e-3  # a canary


def test_torch_alone_has_the_gradient_of_a_vmapped_select_scatter_wrong_and_the_repair_right() -> None:
    def f(x: Tensor, s: Tensor) -> Tensor:
        return vmap(lambda a, b: torch.sin(torch.select_scatter(a, b, 0, 1)).sum())(x, s).sum()

    x, s = tensors((2, 2, 3), (2, 3))
    assert relative_error(grad(f, 1)(x, s), torch.cos(s)) > 0.1
    torch.testing.assert_close(grad(repaired(f), 1)(x, s), torch.cos(s))
    assert torch.select_scatter in FIRST_ORDER_REPAIRS and REPAIRS.keys() >= FIRST_ORDER_REPAIRS


@canary("as_strided_scatter", at_one_level=True)
def test_torch_alone_has_the_gradient_of_as_strided_scatter_wrong_and_the_repair_right() -> None:
    def f(x: Tensor, s: Tensor) -> Tensor:
        return torch.sin(torch.as_strided_scatter(x, s, (2,), (2,), 1)).sum()

    x, s = tensors((2, 4), (2, 2))
    truth = torch.cos(x) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert relative_error(grad(f)(x[0], s[0]), truth[0]) > 0.1
    torch.testing.assert_close(grad(repaired(f), (0, 1))(x[0], s[0]), (truth[0], torch.cos(s[0])))
    torch.testing.assert_close(vmap(grad(repaired(f), (0, 1)))(x, s), (truth, torch.cos(s)))
    v = torch.ones(4, dtype=x.dtype)
    torch.testing.assert_close(jvp(grad(lambda x: repaired(f)(x, s[0])), (x[0],), (v,))[1], -torch.sin(x[0]) * truth[0].ne(0))
    assert torch.as_strided_scatter in FIRST_ORDER_REPAIRS
    with pytest.raises(NotImplementedError, match="contiguous"):
        grad(lambda x: repaired(f)(x.view(2, 2).T, s[0]))(x[0])


TWICE = torch.tensor([[[0, 3], [3, 5]]])


@canary("max_unpool1d", "max_unpool2d", "max_unpool3d", at_one_level=True)
@pytest.mark.parametrize(
    ("unpool", "places"),
    [(F.max_unpool1d, TWICE.view(1, 1, 4)), (F.max_unpool2d, TWICE.unsqueeze(0)), (F.max_unpool3d, TWICE[None, None])],
    ids=["1d", "2d", "3d"],
)
def test_torch_alone_has_the_gradient_of_unpooling_to_a_place_taken_twice_wrong_and_the_repair_right(
    unpool: Callable[..., Tensor], places: Tensor
) -> None:
    case = Case("", lambda x: unpool(x, places, 2), (tuple(places.shape),))
    x = case.point()
    truth = torch.stack([difference(case.loss, x, e) for e in torch.eye(len(x), dtype=x.dtype)])
    assert relative_error(bare_gradient(case.loss, x), truth) > 0.1
    assert relative_error(grad(repaired(case.loss))(x), truth) < 1e-9
    assert_same_call(case.op, *tensors(*case.shapes))
    assert {torch._C._nn.max_unpool2d, torch._C._nn.max_unpool3d} < FIRST_ORDER_REPAIRS


@canary("masked_select")
@pytest.mark.filterwarnings("ignore:There is a performance drop.*masked_scatter_backward:UserWarning")
def test_torch_alone_forgets_under_vmap_that_masked_select_has_expanded_its_argument_and_the_repair_does_not() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.masked_select(x, BOOL_MASK).square().sum()

    x, ones = torch.tensor(0.5, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    theirs, ours = (vmap(vjp(grad(how), x)[1])(ones)[0] for how in (f, repaired(f)))
    assert theirs.shape != (3,) and torch.equal(ours, 4 * ones)


@canary("logaddexp", "logaddexp2")
def test_torch_alone_has_second_derivatives_of_logaddexp_nan_where_one_number_is_infinite_and_the_repair_zero() -> None:
    x = torch.tensor([0.3, -torch.inf], dtype=torch.float64)
    for op in (torch.logaddexp, torch.logaddexp2):
        assert_same_call(op, x, x.flip(0))
        assert_same_call(op, x, torch.full_like(x, -torch.inf))

        def f(z: Tensor, op: Any = op) -> Tensor:
            return op(z[0], z[1])

        theirs, ours = (MODES["reverse over reverse"](how, x) for how in (f, repaired(f)))
        assert torch.equal(ours, torch.zeros_like(ours)) and theirs.isnan().any()


def test_float32_lstms_go_to_a_library_without_a_forward_rule_and_the_repair_does_not() -> None:
    case = next(case for case in CASES if case.name == "lstm")
    x, (v,) = case.point(), tensors(case.point().shape, seed=3)
    truth = jvp(grad(case.loss), (x,), (v,))[1]
    if torch.backends.mkldnn.is_available():
        with pytest.raises(NotImplementedError, match="forward AD"):
            jvp(grad(case.loss), (x.float(),), (v.float(),))
    assert relative_error(jvp(grad(repaired(case.loss)), (x.float(),), (v.float(),))[1].double(), truth) < 1e-5


@canary("_batch_norm_with_update")
def test_the_batch_norm_that_returns_its_update_has_third_derivatives_wrong_in_torch_alone_and_right_repaired() -> None:
    """Apart from the table above, for torch cannot map it."""

    def f(x: Tensor) -> Tensor:
        return aten._batch_norm_with_update(x.view(4, 2), W[:2], B[:2], R[:2].clone(), V[:2].clone(), 0.1, 1e-5)[0].sin().sum()

    x, v = tensors((8,), (8,))
    truth = difference(lambda y: trace_of_hessian(repaired(f), y), x, v)
    assert abs(third_by(repaired(f), x) @ v - truth) < 1e-7 * truth.abs()
    assert abs(third_by(f, x) @ v - truth) > 1e-3 * truth.abs()


@canary("_grid_sampler_2d_cpu_fallback")
def test_the_kernel_that_float32_images_may_be_sampled_by_has_no_forward_mode_in_torch_alone() -> None:
    x, g = tensors((1, 1, 3, 3), (1, 2, 2, 2), dtype=torch.float32)

    def f(kernel: Callable[..., Tensor], x: Tensor, g: Tensor) -> Tensor:
        return kernel(x, 0.6 * g, 0, 0, True).sin().sum()

    fallback = functools.partial(f, torch._grid_sampler_2d_cpu_fallback)
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(grad(fallback), (x, g), (x, g))
    truth = jvp(grad(functools.partial(f, repaired(torch.grid_sampler))), (x.double(), g.double()), (x.double(), g.double()))[1]
    assert relative_error(jvp(grad(repaired(fallback)), (x, g), (x, g))[1].double(), truth) < 1e-5


KILLED = """
import sys, torch, torch.nn.functional as F
from torch.func import grad, jvp
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from functional_hess.repairs import REPAIRS
class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
class Swapped(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (REPAIRS.get(func, func) if sys.argv[2] == "repaired" else func)(*args, **(kwargs or {}))
x, n = torch.ones(3), torch.tensor([1, 2, 3])
f = {
    "ldexp": lambda x: torch.ldexp(x, n).sin().sum(),
    "ldexp_": lambda x: (1 * x).ldexp_(n).sin().sum(),
    "mse_loss": lambda x: F.mse_loss(x, torch.zeros(3)),
}[sys.argv[1]]
with Swapped(), Dispatch():
    jvp(grad(f), (x,), (x,))
"""


@canary("ldexp", "ldexp_")
@pytest.mark.slow
@pytest.mark.parametrize("op", ["ldexp", "ldexp_", "mse_loss"])
def test_torch_alone_ends_the_process_under_a_dispatch_mode_and_the_repair_does_not(op: str) -> None:
    bare, mended = (subprocess.run([sys.executable, "-c", KILLED, op, how], capture_output=True) for how in ("bare", "repaired"))
    assert bare.returncode < 0 and mended.returncode == 0, mended.stderr


# ------------------------------------------------------------------------------------------------ arguments of the ops


def assert_same_call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Same value, or an error of the same kind, on two copies of the arguments, which must end up alike too."""
    mine, theirs = copy.deepcopy((args, kwargs)), copy.deepcopy((args, kwargs))
    answers = []
    for call in (
        repaired(lambda: op(*mine[0], **mine[1])),
        lambda: op(*theirs[0], **theirs[1]),
    ):
        torch.manual_seed(0)
        try:
            answers.append(leaves(call()))
        except Exception as error:
            answers.append(type(error))
    if isinstance(answers[1], type):
        assert answers[0] is answers[1]
    else:
        same_values(answers[0], answers[1])
    for a, b in zip([*mine[0], *mine[1].values()], [*theirs[0], *theirs[1].values()], strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, equal_nan=True)


X, Y = tensors((4, 3), (4, 3), seed=7)
W, B, R, V = (t.abs() + 0.5 for t in tensors((3,), (3,), (3,), (3,), seed=8))
IMAGES = tensors((2, 3, 2, 2), seed=9)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_norms_have_torchs_arguments_statistics_and_errors(dtype: torch.dtype) -> None:
    x, images, w, b = (t.to(dtype) for t in (X, IMAGES, W, B))
    r, v = R.to(dtype), V.to(dtype)
    for call in (F.layer_norm, torch.layer_norm, aten.layer_norm, aten.layer_norm.default):
        assert_same_call(call, x, [3], w, b, 1e-2)
        assert_same_call(call, x, [4], w, b)
    assert_same_call(F.layer_norm, x, normalized_shape=[4, 3], eps=0.1)
    for call in (torch.native_layer_norm, aten.native_layer_norm):
        assert_same_call(call, x, [3], w, b, 1e-2)
    for training in (True, False):
        assert_same_call(F.batch_norm, x, r, v, w, b, training, momentum=0.3, eps=1e-2)
        assert_same_call(F.batch_norm, images, r, v, training=training)
        assert_same_call(F.instance_norm, images, r, v, w, b, training, 0.3, 1e-2)
        for call in (torch.native_batch_norm, aten.native_batch_norm.default, torch._native_batch_norm_legit):
            assert_same_call(call, x, w, b, r, v, training, 0.2, 1e-3)
    assert_same_call(torch._native_batch_norm_legit, x, w, b, True, momentum=0.2, eps=1e-3)
    if dtype.itemsize >= 4:
        assert_same_call(aten._batch_norm_with_update, x, w, b, r, v, 0.2, 1e-3)
        assert_same_call(aten._batch_norm_with_update_functional, x, w, b, r, v, 0.2, 1e-3)
        assert_same_call(aten._native_batch_norm_legit_functional, x, w, b, r, v, True, 0.2, 1e-3)
    assert_same_call(F.batch_norm, x, None, None, weight=w)  # neither statistics nor training: an error
    assert_same_call(F.batch_norm, x[:1], None, None, training=True)  # one value per channel: an error
    assert_same_call(F.batch_norm, x, None, None, w[:2], training=True)
    assert_same_call(F.batch_norm, x, None, None, training=True, eps=0.0)
    assert_same_call(F.instance_norm, images[..., :1, :1])


def test_running_statistics_are_updated_once_under_derivatives_too() -> None:
    def f(mean: Tensor, var: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.batch_norm(x, mean, var, W, B, True).sin().sum()

    (v,) = tensors((4, 3), seed=4)
    ours, theirs = (R.clone(), V.clone()), (R.clone(), V.clone())
    jvp(grad(repaired(f(*ours))), (X,), (v,))
    jvp(grad(f(*theirs)), (X,), (v,))
    F.batch_norm(X, R.clone(), V.clone(), training=True)
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours[0], R)
    with pytest.raises(RuntimeError, match="not batched"):
        vmap(repaired(f(*ours)))(torch.stack([X, X]))


@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning", "ignore:Using a target size:UserWarning")
def test_losses_have_torchs_arguments_and_errors() -> None:
    for how in ("none", "mean", "sum", "median"):
        for loss in (F.mse_loss, F.huber_loss, F.soft_margin_loss):
            assert_same_call(loss, X, Y.sign(), reduction=how)
        assert_same_call(F.mse_loss, X, Y, reduction=how, weight=Y.exp())
        assert_same_call(F.huber_loss, X, Y, how, 0.3, Y.exp())
        assert_same_call(F.multi_margin_loss, X, LABELS, 2, 0.4, W, reduction=how)
        assert_same_call(F.multi_margin_loss, X[0], LABELS[1], reduction=how)
        assert_same_call(F.multilabel_margin_loss, X[:2], torch.tensor([[0, -1, 2], [2, 1, 1]]), reduction=how)
        assert_same_call(F.multilabel_margin_loss, X[0], torch.tensor([-1, 0, 2]), reduction=how)
    for size_average, reduce in ((True, None), (False, None), (None, False)):
        assert_same_call(F.mse_loss, X, Y, size_average, reduce)
        assert_same_call(F.soft_margin_loss, X, Y.sign(), size_average=size_average, reduce=reduce)
    assert_same_call(F.mse_loss, X, Y[:, :1])
    assert_same_call(F.huber_loss, X, Y, delta=-1.0)
    assert_same_call(F.huber_loss, X, Y[:, :2])
    assert_same_call(F.multi_margin_loss, X, LABELS, p=3)
    assert_same_call(F.multi_margin_loss, X, LABELS[:2])
    assert_same_call(F.multilabel_margin_loss, X, LABELS)
    assert_same_call(aten.mse_loss, self=X, target=Y)
    assert_same_call(aten.mse_loss.default, X, Y, 2)
    assert_same_call(torch._C._nn.huber_loss, X, Y, 0, 0.3)


def test_ctc_loss_has_torchs_arguments_and_errors() -> None:
    x = tensors((5, 3, 4), seed=14)[0].log_softmax(2)
    padded, joined = torch.tensor([[1, 2, 2], [3, 3, 1], [2, 1, 3]]), torch.tensor([1, 2, 2, 3, 1])
    for how in ("none", "mean", "sum", "median"):
        for infinite in (True, False):
            assert_same_call(F.ctc_loss, x, padded, (5, 4, 3), (3, 2, 0), reduction=how, zero_infinity=infinite)
            assert_same_call(F.ctc_loss, x, padded, (5, 1, 3), (3, 3, 3), reduction=how, zero_infinity=infinite)
        assert_same_call(F.ctc_loss, x, joined, torch.tensor([5, 4, 5]), torch.tensor([3, 1, 1]), reduction=how)
        assert_same_call(F.ctc_loss, x[:, 0], padded[0], torch.tensor(5), torch.tensor(3), reduction=how)
        assert_same_call(F.ctc_loss, x, padded - 1, (5, 5, 5), (2, 2, 2), 3, how)
    assert_same_call(F.ctc_loss, x, padded, (6, 4, 3), (3, 2, 0))
    assert_same_call(F.ctc_loss, x, padded, (5, 4), (3, 2, 0))
    assert_same_call(F.ctc_loss, x, joined, (5, 4, 3), (3, 2, 0), 4)
    assert_same_call(F.ctc_loss, x, padded.double(), (5, 4, 3), (3, 2, 0))
    assert_same_call(torch.ctc_loss, x, joined, (5, 4, 3), (3, 2, 2))


def test_a_deprecated_or_doubtful_argument_still_warns() -> None:
    with pytest.warns(UserWarning, match="target size"):
        repaired(F.mse_loss)(X, Y[:, :1])
    with pytest.warns(UserWarning, match="deprecated"):
        repaired(F.mse_loss)(X, Y, size_average=False)


Q, K, VAL = tensors((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 2), seed=11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_has_torchs_arguments_and_errors(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in (Q, K, VAL))
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[1] = False
    for options in (
        {},
        {"is_causal": True},
        {"attn_mask": mask},
        {"attn_mask": torch.zeros(3, 5, dtype=dtype).masked_fill(~mask, float("-inf"))},
        {"scale": 0.3},
        {"scale": -0.3},
        {"attn_mask": mask, "is_causal": True},
    ):
        assert_same_call(F.scaled_dot_product_attention, q, k, v, **options)
    assert_same_call(F.scaled_dot_product_attention, q, k[:, :1], v[:, :1], enable_gqa=True)
    assert_same_call(F.scaled_dot_product_attention, q, k[..., :2], v)
    assert_same_call(F.scaled_dot_product_attention, q, k[:, :, :3], v)
    assert_same_call(F.scaled_dot_product_attention, q[0, 0], k[0, 0], v[0, 0])
    if dtype is torch.float64:
        assert_same_call(F.scaled_dot_product_attention, q, k, v, dropout_p=0.4)  # the same bits


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_has_torchs_values_under_every_mask(need_weights: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, dropout=0.3, add_bias_kv=True, batch_first=batch_first).double()
    plain = nn.MultiheadAttention(4, 2, batch_first=batch_first).double().eval()
    (x,) = tensors((3, 3, 4), seed=12)
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    padding = torch.tensor([[False, False, True], [False, False, False], [True, True, True]])
    for net_, options in (
        (net, {}),
        (net, {"key_padding_mask": padding}),
        (plain, {"key_padding_mask": padding, "attn_mask": torch.isinf(causal)}),
        (plain, {"attn_mask": causal, "is_causal": True}),
        (plain, {"is_causal": True}),
        (plain, {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True}),
        (plain, {"attn_mask": causal[:2]}),
    ):
        options = {
            k: v.double().masked_fill(v, -torch.inf) if v is padding and "is_causal" in options else v for k, v in options.items()
        }
        assert_same_call(net_, x, x, x, need_weights=need_weights, **options)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("dtype", torch_dtypes, ids=str)
def test_recurrent_layers_have_torchs_values_in_every_layout(kind: str, dtype: torch.dtype) -> None:
    (x,) = tensors((4, 3, 2), seed=13, dtype=dtype)
    rows = nn.utils.rnn.pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False)
    for options in (
        {},
        {"num_layers": 3, "bidirectional": True, "batch_first": True},
        {"num_layers": 2, "dropout": 0.5},
        {"bias": False, "bidirectional": True},
        *([{"proj_size": 1, "num_layers": 2, "bidirectional": True}] if kind == "LSTM" else []),
        *([{"nonlinearity": "relu"}] if kind == "RNN" else []),
    ):
        torch.manual_seed(1)
        net = getattr(nn, kind)(2, 3, **options).to(dtype)
        if dtype is torch.float64 or "dropout" not in options:
            assert_same_call(net, x)
            assert_same_call(lambda net, rows: (net(rows)[0].data, net(rows)[1]), net, rows)
            start = [torch.cos(state).detach() for state in leaves(net(x.transpose(0, 1) if net.batch_first else x)[1])]
            start = tuple(start) if kind == "LSTM" else start[0]
            assert_same_call(lambda net, rows, start: (net(rows, start)[0].data, net(rows, start)[1]), net, rows, start)
        assert_same_call(net.eval(), x[:, 0])
        assert_same_call(net, x[..., :1])


def test_the_remaining_operators_have_torchs_arguments_and_errors() -> None:
    square = X[:3] + EYE
    assert_same_call(F.hardsigmoid, 4 * X, inplace=True)
    assert_same_call(F.hardsigmoid, torch.tensor([-3.0, 3.0, -torch.inf, torch.inf, torch.nan]))
    assert_same_call(F.glu, X, 0)
    assert_same_call(F.glu, X, 1)
    for dim in (0, 1, -1):
        assert_same_call(torch._weight_norm, X, X.norm() if dim == -1 else X.norm(dim=1 - dim, keepdim=True), dim)
    for upper in (True, False):
        assert_same_call(torch.cholesky_inverse, square, upper)
        assert_same_call(square.expand(2, 3, 3).cholesky_inverse, upper=upper)
        assert_same_call(torch.cholesky_solve, X.T, square, upper=upper)
        for transpose in (True, False):
            assert_same_call(torch.triangular_solve, X.T, square, upper, transpose, unitriangular=upper)
    assert_same_call(torch.cholesky_inverse, X)
    assert_same_call(torch.cholesky_solve, X, square)
    for right_side in (W, X.T, X.expand(2, 4, 3).mT, X):
        assert_same_call(torch.linalg.solve, square, right_side)
    batched = square.expand(2, 3, 3)
    for right_side in (W, W.expand(2, 3), X.T.expand(2, 3, 4)):
        assert_same_call(torch.linalg.solve, batched, right_side)
    assert_same_call(torch.linalg.solve, square, X, left=False)
    assert_same_call(torch.linalg.solve, torch.zeros_like(square), W)
    for matrix in (square, -square, batched, 0 * square, X):
        for op in (torch.slogdet, torch.linalg.slogdet, torch.logdet, torch.Tensor.slogdet):
            assert_same_call(op, matrix)
    for p in (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, torch.inf, -1.0):
        assert_same_call(torch.cdist, X, Y[:2], p)
        assert_same_call(torch.pdist, X, p)
    assert_same_call(torch.cdist, X.expand(2, 1, 4, 3), Y.expand(3, 4, 3), compute_mode="donot_use_mm_for_euclid_dist")
    assert_same_call(torch.cdist, X, Y, compute_mode="no such mode")
    assert_same_call(torch.cdist, X, Y[:, :2])
    assert_same_call(torch.cdist, X[:0], Y)
    assert_same_call(torch.cdist, X[:, :0], Y[:, :0], torch.inf)
    for n in (torch.tensor([1, -2, 17]), torch.tensor([0.5, 1.0, 2.0]), 3):
        assert_same_call(torch.ldexp, X, n)
        assert_same_call(torch.Tensor.ldexp_, X.half(), n)
    assert_same_call(torch.ldexp, torch.tensor([1, 2]), torch.tensor([3, 4]))


def test_linear_algebra_has_torchs_arguments_and_errors() -> None:
    square, linalg = X[:3] + EYE, torch.linalg
    batched = torch.stack([square, square.mT @ square])
    LU, pivots = linalg.lu_factor(batched)
    for left, adjoint in itertools.product((True, False), repeat=2):
        B = X.T if left else X
        assert_same_call(linalg.lu_solve, LU, pivots, B.contiguous(), left=left, adjoint=adjoint)
        assert_same_call(linalg.lu_solve, LU=LU[1], pivots=pivots[1], B=B, left=left, adjoint=adjoint)
    assert_same_call(torch.lu_solve, X.T, LU, pivots)
    assert_same_call(X.T.lu_solve, LU_data=LU[0], LU_pivots=pivots[0])
    assert_same_call(linalg.lu_solve, LU, pivots, X)
    for right_side in (W, X.T, X):
        assert_same_call(linalg.solve_ex, square, right_side)
        assert_same_call(linalg.solve_ex, A=square, B=right_side, check_errors=True)
    assert_same_call(linalg.tensorsolve, (X @ X.T + torch.eye(4)).view(2, 2, 2, 2), X[:2, :2], (3, 2))
    assert_same_call(linalg.tensorsolve, (X @ X.T + torch.eye(4)).view(2, 1, 4, 2), X[:2, :2], (0, 2))
    assert_same_call(linalg.tensorsolve, X, W)
    big = torch.block_diag(square, square)
    for op in (torch.det, linalg.det, torch.Tensor.det, aten.det.default):
        for matrix in (square, batched, -big, 0 * big, big[:0, :0], X, big.to(torch.complex128) * 1j, big.float()):
            assert_same_call(op, matrix)
    assert_same_call(linalg.det, A=square)
    assert_same_call(linalg.slogdet, A=square.to(torch.complex128) * 1j)
    assert_same_call(torch.logdet, square.to(torch.complex128) * 1j)
    for tau in (W[:2], W, W[:1]):
        assert_same_call(linalg.householder_product, X[:, :2], tau)
        assert_same_call(torch.orgqr, X, tau)
        assert_same_call(torch.ormqr, X, tau, X, transpose=True)
        assert_same_call(torch.ormqr, X, tau, X.T, left=False)
        assert_same_call(X.ormqr, tau, X.T)
    spd = X @ X.mT + torch.eye(4)
    for matrix in (spd, spd.tril(), spd.triu(), torch.stack([spd, 2 * spd]), -spd, X, spd.to(torch.complex128)):
        for upper in (True, False):
            assert_same_call(linalg.cholesky, matrix, upper=upper)
            assert_same_call(linalg.cholesky_ex, matrix, upper=upper)
            assert_same_call(torch.cholesky, matrix, upper)
        for side in ("L", "U", "x"):
            assert_same_call(linalg.eigvalsh, matrix, side)
            assert_same_call(lambda a, side: linalg.eigh(a, side)[0], matrix, side)
            assert_same_call(lambda a, side: linalg.eigh(a, side)[1].abs(), matrix, side)
    for matrix in (square, batched, X, spd, torch.eye(3)):
        assert_same_call(lambda a: sorted(linalg.eigvals(a).real.flatten().tolist()) and linalg.eigvals(a).abs(), matrix)
        assert_same_call(lambda a: linalg.eig(a)[1].abs(), matrix)
    for factors in ((X, X.T), (X, X.T, X), (X,), (X, X)):
        assert_same_call(torch.chain_matmul, *factors)


@pytest.mark.filterwarnings("ignore:Default grid_sample:UserWarning")
@pytest.mark.parametrize("dtype", torch_dtypes, ids=str)
def test_sampling_has_torchs_arguments_and_errors(dtype: torch.dtype) -> None:
    images, points = tensors((2, 3, 4, 5), (2, 3, 2, 2), seed=14, dtype=dtype)
    volumes, places = tensors((2, 1, 2, 3, 4), (2, 1, 2, 3, 3), seed=15, dtype=dtype)
    for mode, padding, corners in itertools.product(
        ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (True, False)
    ):
        assert_same_call(F.grid_sample, images, 1.5 * points, mode, padding, corners)
        assert_same_call(F.grid_sample, images[:, :, :1, :1], points, mode, padding, corners)
        assert_same_call(F.grid_sample, volumes, 1.5 * places, mode=mode, padding_mode=padding, align_corners=corners)
    assert_same_call(F.grid_sample, images, points)
    assert_same_call(F.grid_sample, images, points[:1])
    assert_same_call(F.grid_sample, images, places)
    assert_same_call(F.grid_sample, images, points, "cubic")
    assert_same_call(torch.grid_sampler, images, points, 0, 0, False)
    assert_same_call(torch.grid_sampler_3d, volumes, places, 1, 2, False)


def test_norms_products_and_deviations_have_torchs_arguments_and_errors() -> None:
    for p in (0, 0.5, 1, 2, 3, 4.0, torch.inf, -torch.inf, -1, "fro", "nuc"):
        for dim, keepdim in ((None, False), (0, False), ((0, 1), True), ((), False), (3, False)):
            assert_same_call(torch.linalg.vector_norm, X, p, dim, keepdim)
            assert_same_call(torch.linalg.norm, X, p, dim, keepdim)
            assert_same_call(torch.norm, X, p, dim, keepdim)
            assert_same_call(X.norm, p, dim, keepdim)
        assert_same_call(torch.linalg.matrix_norm, IMAGES, p, (0, -1), True)
        assert_same_call(torch.linalg.norm, W, p)
        assert_same_call(torch.dist, X, X[0], p)
        assert_same_call(F.pairwise_distance, X, X[0], p, 0.1, True)
        assert_same_call(F.normalize, X, p)
        if not isinstance(p, str):
            assert_same_call(torch.renorm, IMAGES, p, 1, 1.5)
            assert_same_call(torch.Tensor.renorm_, X.clone(), p, -1, 0.7)
    assert_same_call(F.cosine_similarity, X, X[0], -1)
    assert_same_call(F.cosine_similarity, x1=0 * X, x2=X.float(), eps=1e-2)
    assert_same_call(torch.renorm, X, 2, 2, 1.0)
    assert_same_call(torch.linalg.vector_norm, x=X.half(), dtype=torch.float64)
    assert_same_call(torch.linalg.vector_norm, 1e3 * X.half())
    assert_same_call(torch.linalg.vector_norm, X[:0], torch.inf)
    assert_same_call(torch.linalg.vector_norm, torch.ones(3, dtype=torch.int64))
    for op in (torch.prod, torch.Tensor.prod):
        for options in ({}, {"dim": 0}, {"dim": -1, "keepdim": True}, {"dtype": torch.float32}, {"dim": 4}):
            assert_same_call(op, X, **options)
        assert_same_call(op, torch.tensor([2, 3]))
        assert_same_call(op, torch.tensor([2, 3]), dtype=torch.float64)
        assert_same_call(op, X[:0], 0)
        assert_same_call(op, X[0, 0], 0, True)
    for op in (torch.cumprod, torch.Tensor.cumprod, torch.Tensor.cumprod_):
        for dim in (0, -1, 2):
            assert_same_call(op, X, dim)
        assert_same_call(op, X[0, 0], 0)
        assert_same_call(op, X[:0], 0)
        assert_same_call(op, torch.tensor([2, 3]), 0)
    assert_same_call(torch.logcumsumexp, X[0, 0], 0)


def test_places_and_segments_have_torchs_arguments_and_errors() -> None:
    mask = X > 0
    for m in (mask, mask[0], mask.expand(2, 4, 3), torch.tensor(True), mask.int()):
        for op in (torch.masked_select, torch.Tensor.masked_select):
            assert_same_call(op, X, m)
        for source in (Y, Y[:2], torch.tensor(0.3), Y.float()):
            assert_same_call(torch.masked_scatter, X, m, source)
            if m.dim() < 3:
                assert_same_call(torch.Tensor.masked_scatter_, X, m, source)
    assert_same_call(torch.masked_select, torch.tensor(0.5), torch.tensor(True))
    for places in (torch.tensor([1, 3]), torch.tensor(2), torch.tensor(5), torch.tensor([2.0]), [1, 3], 2):
        assert_same_call(torch.tensor_split, X, places)
        assert_same_call(torch.Tensor.tensor_split, X, places, 1)
    pooled, indices = F.max_pool2d(IMAGES, 2, return_indices=True)
    for output_size in (None, (2, 2), (3, 3), (2, 3, 2, 2), (9, 9)):
        assert_same_call(F.max_unpool2d, pooled, indices, 2, output_size=output_size)
    assert_same_call(F.max_unpool2d, pooled[0], indices[0], 2)
    assert_same_call(F.max_unpool2d, pooled, indices + 4, 2)
    assert_same_call(F.max_unpool2d, pooled, indices[:1], 2)
    assert_same_call(F.max_unpool2d, pooled[:0], indices[:0], 2)
    for how in ("sum", "mean", "max", "min", "prod", "median"):
        for options in (
            {"lengths": torch.tensor([1, 0, 3])},
            {"lengths": torch.tensor([1, 0, 3]), "initial": 0.3},
            {"lengths": torch.tensor([1, 1])},
            {"lengths": torch.tensor([[1, 2], [3, 0], [0, 3], [1, 2]]), "axis": 1},
            {"offsets": torch.tensor([0, 2, 4])},
            {},
        ):
            assert_same_call(torch.segment_reduce, X, how, **options)


def test_a_hermitian_transform_has_torchs_arguments_and_errors() -> None:
    for z in (torch.complex(X, Y), torch.complex(X, Y).conj(), X, torch.complex(X, Y)[:0], torch.complex(X, Y)[0, 0]):
        for n, dim in itertools.product((None, 1, 3, 9, 0), (-1, 0, 2)):
            assert_same_call(torch.fft.hfft, z, n, dim)
        for norm in ("forward", "backward", "ortho", "none"):
            assert_same_call(torch.fft.hfft, input=z, norm=norm)


def test_maxima_that_are_put_back_are_mapped_with_their_places() -> None:
    def f(x: Tensor) -> Tensor:
        return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2).sin().sum()

    x, v = tensors((3, 1, 1, 4, 4), (3, 1, 1, 4, 4))
    assert_same_call(vmap(lambda x: F.max_pool2d(x, 2)), x)
    together = vmap(lambda x, v: jvp(grad(repaired(f)), (x,), (v,))[1])(x, v)
    alone = torch.stack([jvp(grad(f), (y,), (u,))[1] for y, u in zip(x, v, strict=True)])
    torch.testing.assert_close(together, alone)
    with pytest.raises(RuntimeError, match=r"index|bounds|range"):
        vmap(lambda x, i: repaired(F.max_unpool2d)(x, i, 2))(x[..., :2, :2], torch.full((3, 1, 1, 2, 2), 16))


def test_losses_of_scalars_and_leaky_units_have_torchs_arguments_and_errors() -> None:
    one, zero = torch.tensor(0.5), torch.tensor(0)
    for how in ("none", "mean"):
        assert_same_call(F.multi_margin_loss, one, zero, reduction=how)
        assert_same_call(F.multilabel_margin_loss, one, zero, reduction=how)
    for training in (True, False):
        assert_same_call(F.rrelu, X, 0.2, 0.3, training)
        assert_same_call(F.rrelu, X, training=training, inplace=True)
        assert_same_call(torch.rrelu_, X, 0.1, 0.5, training)
    options = nn.LinearCrossEntropyOptions()
    for how in ("none", "mean", "sum"):
        assert_same_call(F.linear_cross_entropy, X, Y[:2], LABELS % 2, reduction=how, options=options)
    assert_same_call(F.linear_cross_entropy, X, Y[:, :2], LABELS, options=options)


def test_gathering_and_scattering_have_torchs_arguments_and_errors() -> None:
    for mode in ("sum", "mean", "max", "median"):
        for options in (
            {},
            {"padding_idx": 1},
            {"padding_idx": -1},
            {"include_last_offset": True},
            {"scale_grad_by_freq": True},
            {"per_sample_weights": tensors((6,))[0]},
        ):
            assert_same_call(F.embedding_bag, BAG, X, OFFSETS, mode=mode, **options)
        assert_same_call(F.embedding_bag, BAG.view(3, 2), X, mode=mode, padding_idx=0)
        assert_same_call(F.embedding_bag, BAG.view(3, 2), X, OFFSETS, mode=mode)
        assert_same_call(F.embedding_bag, BAG, X, max_norm=0.1, offsets=OFFSETS, mode=mode)
    for include_self in (True, False):
        for how in ("prod", "mean", "amax", "median"):
            assert_same_call(torch.scatter_reduce, X, 0, PLACE, Y, how, include_self=include_self)
            assert_same_call(X.scatter_reduce, -1, PLACE, Y, how, include_self=include_self)
            assert_same_call(torch.Tensor.scatter_reduce_, X, 0, PLACE, Y, how, include_self=include_self)
            assert_same_call(torch.index_reduce, X, 0, PLACE[:, 0], Y[:3], how, include_self=include_self)
            assert_same_call(torch.Tensor.index_reduce_, X, 1, PLACE[0], Y[:, :2], how, include_self=include_self)
    assert_same_call(torch.scatter_reduce, X, 0, PLACE.T, Y[:1], "prod")
    assert_same_call(torch.index_reduce, X, 0, PLACE[:, 0], Y, "prod")
    for dim, index in ((0, 1), (0, -4), (1, 2), (-2, 3), (0, 4), (2, 0)):
        assert_same_call(torch.select_scatter, X, W if dim in (0, -2) else X[:, 0], dim, index)
    assert_same_call(torch.select_scatter, X, W[:2], 0, 1)
    for lengths in ([3, 2, 2], [4, 4, 1], [1, 2, 3], [5, 1, 1], [2, 1, 0], [2, 1]):
        assert_same_call(lambda x, n: nn.utils.rnn.pack_padded_sequence(x, n), X.expand(3, 4, 3).transpose(0, 1), lengths)
        assert_same_call(lambda x, n: nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True), X.expand(3, 4, 3), lengths)
    for sizes in ([2, 1, 1], [4], [1, 1, 1, 1], [3, 2]):
        for options in ((), (True,), (False, 0.3, 5), (True, 0.0, 1)):
            rows = nn.utils.rnn.PackedSequence(X, torch.tensor(sizes))
            assert_same_call(nn.utils.rnn.pad_packed_sequence, rows, *options)


# ------------------------------------------------------------------------------------------------------------ refusals


@canary("normal", at_one_level=True)
def test_torch_alone_has_the_derivative_of_a_sample_zero_without_a_word() -> None:
    """By its mean, of which the derivative is 1."""

    def f(mean: Tensor) -> Tensor:
        return torch.normal(mean, 1.0, generator=torch.Generator().manual_seed(0)).sum()

    assert difference(f, X, torch.ones_like(X)) > 1
    assert torch.equal(bare_gradient(f, X), torch.zeros_like(X))


@canary("embedding")
def test_torch_alone_has_a_scaled_embedding_whose_gradient_is_that_of_no_function() -> None:
    def f(table: Tensor) -> Tensor:
        return F.embedding(BAG, table, scale_grad_by_freq=True).sin().sum()

    assert relative_error(bare_gradient(f, X), torch.autograd.functional.jacobian(lambda w: w[BAG].sin().sum(), X)) > 0.1


def test_a_sample_is_refused_only_where_its_parameters_are_differentiated() -> None:
    def drawn(x: Tensor, **options: Any) -> Tensor:
        return (torch.normal(x.detach(), 1.0, **options) * x).sum()

    def scored(x: Tensor) -> Tensor:
        with torch.no_grad():
            sample = torch.distributions.Normal(x, 1.0).sample()
        return torch.distributions.Normal(x, 1.0).log_prob(sample).sum()

    def noisy(x: Tensor) -> Tensor:
        return vmap(lambda row: (torch.normal(row.detach(), 1.0) * row).sum(), randomness="different")(x).sum()

    for f in (drawn, noisy, scored):
        assert fh.grad(f)(X).isfinite().all()
    for f in (lambda x: torch.normal(x, 1.0).sum(), lambda x: torch.normal(0.0, std=x.exp()).sum()):
        calls: tuple[Any, ...] = (
            fh.grad(f),
            functools.partial(fh.jvp, f, (X,)),
            functools.partial(fh.hvp, f, X, randomness="same"),
            fh.hessian(f, randomness="same"),
        )
        for call, argument in zip(calls, (X, (X,), X, X), strict=True):
            with pytest.raises(fh.MissingDerivativeError, match="normal: torch takes the sample for a constant"):
                call(argument)


def test_a_scaled_embedding_is_refused_only_where_it_is_differentiated_twice() -> None:
    def f(table: Tensor, scale: bool = True) -> Tensor:
        return F.embedding(BAG, table, scale_grad_by_freq=scale).square().sum()

    assert torch.equal(fh.grad(f)(X), bare_gradient(f, X))
    with pytest.raises(fh.MissingDerivativeError, match="scale_grad_by_freq"):
        fh.hvp(f, X, X)
    assert fh.hvp(lambda w: f(X) * (w**2).sum(), W, W).isfinite().all()  # a constant
    torch.testing.assert_close(fh.hvp(lambda x: f(x, False), X, X), fh.grad(lambda x: f(x, False))(X))


# ----------------------------------------------------------------------------------------------------- singular points


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0, float("inf")])
def test_distances_of_coincident_points_have_derivatives_zero(p: float) -> None:
    x = X.clone()
    x[1] = x[0]

    def f(x: Tensor) -> Tensor:
        return torch.cdist(x[:1], x[1:2], p=p).sum() + F.pdist(x[:2], p).sum()

    for derivative in (grad(repaired(f))(x), jvp(grad(repaired(f)), (x,), (Y,))[1]):
        assert torch.equal(derivative, torch.zeros_like(x))
    assert torch.equal(bare_gradient(f, x), torch.zeros_like(x))


def test_masked_attention_and_empty_bags_have_finite_derivatives() -> None:
    q = tensors((1, 1, 4, 2))[0]
    q = torch.cat([q[:, :, :2], q[:, :, :2]], 2)

    mask = torch.zeros(2, 3, dtype=q.dtype).masked_fill(~BOOL_MASK, -torch.inf)

    def g(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, :2], q[:, :, :3], q[:, :, :3], mask).sin().sum()

    for function in (g, lambda q: F.embedding_bag(BAG, q[0, 0], OFFSETS, mode="max").sin().sum()):
        assert jvp(grad(repaired(function)), (q,), (q.flip(2),))[1].isfinite().all()


def test_soft_margins_do_not_overflow_in_value_or_derivatives() -> None:
    x, y = torch.tensor([-2000.0, 2000.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    f = repaired(lambda x: F.soft_margin_loss(x, y, reduction="sum"))
    torch.testing.assert_close(f(x), torch.tensor(2000.0, dtype=torch.float64))
    torch.testing.assert_close(jvp(grad(f), (x,), (y,))[1], torch.zeros_like(x))


def test_the_table_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        REPAIRS[torch.sin] = torch.cos  # type: ignore[index]
