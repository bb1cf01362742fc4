"""The table of repairs: right compositions for operators whose higher derivatives torch has wrong or lacks.

torch differentiates most operators as often as one likes, because their derivatives are again compositions of
differentiable operators. Some fused operators break the chain: a backward kernel without a derivative, a forward-mode
rule that is wrong, a batching rule that takes saved statistics for constants. Wherever an operator is a composition,

    op(x) = e_k(... e_2(e_1(x))),        e_i differentiable to every order,

the chain rule gives all its derivatives, so the fused operator may be replaced by the composition while derivatives
nest, and kept where one derivative is asked for. The compositions are written family by family in the `repaired_*`
modules, on the floors below. What torch differentiates by a convention, and no composition could mean, is refused there. This
module makes the table:

    REPAIRS : the function that torch hands to ``__torch_function__`` of a mode -> one with the same signature
    FIRST_ORDER_REPAIRS : its keys that need the composition even for one gradient
    MAPPED_REPAIRS : its keys that need it for one gradient where a `vmap` is active
    WRITTEN : functions that write into an argument -> what raises, by name and with the remedy, where that is differentiated

In forward mode most of these operators have no rule, and three a wrong one (`cholesky_inverse`, `triangular_solve`,
products of `scatter_reduce`), at first order already: a transform should swap as soon as one level of forward mode is
active, or two of any. Wrong far more often is reverse over forward mode, which the gradient of a product
H v passes through: a forward-mode rule takes what its operator has saved, such as the factors of a matrix, for a constant.

The contract of a composition: it takes its arguments in the order of the aten schema, has the operator's value (up to
rounding), dtype and side effects, and works under any nesting of `vmap`, `grad`, `jvp` and `vjp`. Two rules keep that
short. A composition that can't honor its arguments returns `NotImplemented`, and the operator itself answers, with
torch's own rule or torch's own error. And the Python fronts of `torch.nn.functional` are not rewritten: `_opened` runs
their own code, argument checks, warnings and deprecated options included, and swaps only the kernels that it calls.

What this module does not do: it installs nothing (a transform enters the mode and decides when derivatives nest); it
does not touch operators that torch has right; it sees neither TorchScript bodies nor ``out=`` variants, sparse
gradients, nested and quantized tensors. At kinks (ties of a maximum, the hinge of a margin) a composition takes one of
the one-sided derivatives, and 0 at coincident points. Composed attention, alignments, distances and products of
`scatter_reduce` need the memory that their kernels are there to save.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functional_hess.nesting import is_outermost, is_watched, is_wrapped
from functional_hess.repaired_distances import DISTANCES
from functional_hess.repaired_gathers import GATHERS
from functional_hess.repaired_losses import LOSSES
from functional_hess.repaired_matrices import MATRICES
from functional_hess.repaired_norms import NORMS
from functional_hess.repaired_places import PLACES
from functional_hess.repaired_refusals import REFUSALS
from functional_hess.repaired_sampling import SAMPLING
from functional_hess.repaired_sequences import SEQUENCES
from functional_hess.repaired_singular import SINGULAR

__all__ = ["REPAIRS", "FIRST_ORDER_REPAIRS", "MAPPED_REPAIRS", "WRITTEN"]

_repairs: dict[Callable[..., Any], Callable[..., Any]] = {}
REPAIRS: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType(_repairs)


# How an operator gets into the table.

_C: Any = torch._C  # its stubs leave out where the functions live
_HOMES = (torch, _C._nn, _C._VariableFunctions, _C._linalg, _C._fft, torch.linalg, torch.Tensor)


def _entry_points(name: str) -> Iterator[Callable[..., Any]]:
    """Every object by which a Python caller reaches the kernel `name`, ``out=`` overloads excepted."""
    for home in _HOMES:
        if home is torch.linalg and not name.startswith("linalg_"):
            continue
        entry = getattr(home, name.removeprefix("linalg_") if home is torch.linalg else name, None)
        if callable(entry) and not isinstance(entry, FunctionType):
            yield entry
    packet = getattr(torch.ops.aten, name, None)
    if packet is not None:
        yield packet
        for overload in (getattr(packet, o) for o in packet.overloads()):
            if not any(argument.is_out for argument in overload._schema.arguments):
                yield overload


def _compose_or_decline(composition: Callable[..., Any], op: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The composition's answer, or the operator's own where the composition declines."""
    if kwargs.get("out") is None and all(type(a) is not Tensor or a.layout is torch.strided for a in args):
        answer = composition(*args, **_renamed(composition, {k: v for k, v in kwargs.items() if k != "out"}))
        if answer is not NotImplemented:
            return answer
    return op(*args, **kwargs)


def _renamed(composition: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, the first by the name that it has here: it has several in torch."""
    own = list(inspect.signature(composition).parameters) if kwargs else []
    return {own[0] if name not in own and name in ("self", "input", "A", "x") else name: kwargs[name] for name in kwargs}


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
        answer = composition(input.clone(), *args, **kwargs)  # for derivatives, which need it as it was
        return answer if answer is NotImplemented else input.copy_(answer)

    return written


def _unchunked_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Any:
    """All logits at once: in chunks, the gradient is computed with the value, and has no derivative or a wrong one."""
    return F.linear_cross_entropy(*args, **kwargs)


# The table.

_IN_PLACE = ("hardsigmoid", "cumprod", "renorm", "ldexp", "sinc", "scatter_reduce", "index_reduce", "masked_scatter", "rrelu")
_FIRST_ORDER = (
    "linalg_solve",
    "linalg_solve_ex",
    "linalg_lu_solve",
    "lu_solve",
    "linalg_tensorsolve",
    "select_scatter",
    "as_strided_scatter",
    "max_unpool2d",
    "max_unpool3d",
    "tensor_split",
    "normal",
    "_pack_padded_sequence",
    "_pad_packed_sequence",
    "cholesky_inverse",
    "cholesky_solve",
)
_MAPPED = (
    *("det", "linalg_det", "slogdet", "linalg_slogdet", "logdet"),
    *("lstm", "lstm_cell", "gru", "rnn_tanh", "rnn_relu", "fft_hfft"),
)
_FRONTS: tuple[Any, ...] = (  # torch's own code around the kernels above
    *(F.mse_loss, F.huber_loss, F.soft_margin_loss, F.multi_margin_loss, F.multilabel_margin_loss, F.hardsigmoid, F.glu, F.rrelu),
    *(F.max_unpool1d, F.max_unpool2d, F.max_unpool3d, F.embedding, F.ctc_loss),
    *(torch.functional.norm, torch.Tensor.norm, F.normalize, F.grid_sample, torch.functional.chain_matmul),
    *(F.layer_norm, F.batch_norm, F.instance_norm, F.embedding_bag, F.multi_head_attention_forward, torch.functional.cdist),
)


def _table() -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    compositions = {**NORMS, **LOSSES, **SEQUENCES, **MATRICES, **DISTANCES, **GATHERS, **PLACES, **SAMPLING, **SINGULAR}
    compositions |= REFUSALS
    compositions |= {f"{name}_": _in_place(compositions[name]) for name in _IN_PLACE}
    for name, composition in compositions.items():
        for op in _entry_points(name):
            yield op, functools.partial(_compose_or_decline, composition, op)
    for front in _FRONTS:
        yield front, _opened(front)
    if hasattr(F, "linear_cross_entropy"):
        yield F.linear_cross_entropy, _unchunked_cross_entropy


_repairs.update(_table())
FIRST_ORDER_REPAIRS: frozenset[Callable[..., Any]] = frozenset(op for name in _FIRST_ORDER for op in _entry_points(name))
MAPPED_REPAIRS: frozenset[Callable[..., Any]] = frozenset(op for name in _MAPPED for op in _entry_points(name)) | {
    torch.functional.chain_matmul
}


# What is refused.


def _refuse_max_norm(front: FunctionType, *args: Any, **kwargs: Any) -> None:
    """Rows above a bound are scaled in place, without a derivative: in the caller's own tensor, if that is differentiated."""
    given = inspect.signature(front).bind(*args, **kwargs).arguments
    weight = given["weight"]
    if given.get("max_norm") is not None and (is_wrapped(weight, 0) or is_outermost()) and is_watched(weight):
        raise NotImplementedError(
            f"{front.__name__}: max_norm writes into weight, whose rows it scales without a derivative; leave it out and pass "
            "torch.renorm(weight, norm_type, 0, max_norm) for weight, or differentiate by another argument."
        )


WRITTEN: Mapping[Callable[..., Any], Callable[..., None]] = MappingProxyType(
    {front: functools.partial(_refuse_max_norm, front) for front in (F.embedding, F.embedding_bag)}
)
