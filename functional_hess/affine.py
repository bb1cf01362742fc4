"""Products with a leaf: which calls of torch are z = W h + b with W a view of it, and how z, h and W are seen as matrices.

Linear layers, matrix products, plain einsums, convolutions and embeddings are the same thing at this floor: with the positions
of z in rows, each row of z is W times a row of features. A convolution is a product with patches, an embedding one with one-hot
features. A call that is none of these, or of which W is more than a permutation of a leaf, is not recognized.

Nothing is computed here but on demand: the features of a product, its output or its weight in the shape of a matrix.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Product", "recognized"]

PRODUCTS = frozenset(("matmul", "__matmul__", "mm", "mv", "dot"))
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
POSITIONS = string.ascii_lowercase


@dataclasses.dataclass(frozen=True)
class Product:
    """z = W h + b with W a view of a leaf: how z, h and W are seen as (positions, out), (positions, in) and (out, in).

    ``trailing`` dimensions of z come after those of b: those of a convolution.
    """

    weight: Tensor
    bias: Tensor | None
    trailing: int
    features: Callable[[], Tensor]
    units: Callable[[Tensor], Tensor]
    matrix: Callable[[Tensor], Tensor]


def recognized(name: str, args: Sequence[Any], kwargs: dict[str, Any], is_leaf: Callable[[Any], bool]) -> Product | None:
    """The product that a call is, if one operand is a leaf or a view of one."""
    if name in CONVOLUTIONS:
        return _convolution(CONVOLUTIONS[name], _bound(("input", "weight", *_CONVOLUTION), args, kwargs), is_leaf)
    if name == "embedding":
        return _embedding(_bound(("input", "weight", *_EMBEDDING), args, kwargs), is_leaf)
    if name == "__getitem__" and len(args) == 2 and is_leaf(args[0]):
        return _embedding({"weight": args[0], "input": args[1]}, is_leaf)
    if name == "linear":
        given = _bound(("input", "weight", "bias"), args, kwargs)
        if is_leaf(given["weight"]) and given["weight"].dim() == 2 and given["input"].dim():
            lead = POSITIONS[: given["input"].dim() - 1]
            return _einsum(given["weight"], given["input"], "OI", lead + "I", lead + "O", given.get("bias"))
        return None
    if kwargs:
        return None
    if name in ("addmm", "addmv") and len(args) == 3:
        product = recognized("matmul", args[1:], {}, is_leaf)
        return product and dataclasses.replace(product, bias=args[0])
    if name in PRODUCTS and len(args) == 2:
        return _matmul(args[0], args[1], is_leaf)
    if name == "einsum" and len(args) == 3 and isinstance(args[0], str) and "->" in args[0] and "." not in args[0]:
        (left, out), (a, b) = args[0].replace(" ", "").split("->"), args[1:]
        la, _, lb = left.partition(",")
        if is_leaf(b):
            return _einsum(b, a, lb, la, out)
        return _einsum(a, b, la, lb, out) if is_leaf(a) else None
    return None


_CONVOLUTION = ("bias", "stride", "padding", "dilation", "groups")
_EMBEDDING = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def _bound(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _matmul(a: Any, b: Any, is_leaf: Callable[[Any], bool]) -> Product | None:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() and b.dim()):
        return None
    if is_leaf(b) and b.dim() <= 2:
        lead = POSITIONS[: a.dim() - 1]
        return _einsum(b, a, "IO"[: b.dim()], lead + "I", lead + "O"[: b.dim() - 1])
    if is_leaf(a) and a.dim() <= 2:
        out, lead, last = "O"[: a.dim() - 1], POSITIONS[: max(b.dim() - 2, 0)], "z"[: b.dim() - 1]
        return _einsum(a, b, out + "I", lead + "I" + last, lead + out + last)
    return None


def _einsum(weight: Tensor, x: Tensor, lw: str, lx: str, out: str, bias: Any = None) -> Product | None:
    """The product with letters ``lw,lx->out``, if every letter of the weight is summed against x or stays."""
    ins = [c for c in lw if c in lx]
    outs, positions = [c for c in lw if c not in lx], [c for c in lx if c not in lw]
    plain = len({*lw}) == len(lw) == weight.dim() and len({*lx}) == len(lx) == x.dim() and len({*out}) == len(out)
    if not plain or {*ins} & {*out} or {*outs, *positions} != {*out}:
        return None
    if any(weight.shape[lw.index(c)] != x.shape[lx.index(c)] for c in ins) or (bias is not None and not isinstance(bias, Tensor)):
        return None
    wide = math.prod(weight.shape[lw.index(c)] for c in ins)
    tall = math.prod(weight.shape[lw.index(c)] for c in outs)
    return Product(
        weight,
        bias,
        0,
        features=lambda: x.permute([lx.index(c) for c in positions + ins]).reshape(-1, wide),
        units=lambda z: z.permute([out.index(c) for c in positions + outs]).reshape(-1, tall),
        matrix=lambda w: w.permute([lw.index(c) for c in outs + ins]).reshape(tall, wide),
    )


def _embedding(given: dict[str, Any], is_leaf: Callable[[Any], bool]) -> Product | None:
    """Rows of a table chosen by integers: the product with one-hot features."""
    table, ids = given["weight"], given["input"]
    if not is_leaf(table) or table.dim() != 2 or not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        return None
    if given.get("padding_idx") is not None or given.get("max_norm") is not None or given.get("scale_grad_by_freq"):
        return None

    def features() -> Tensor:
        hot = (ids % table.shape[0])[..., None] == torch.arange(table.shape[0], device=table.device)
        return hot.to(table.dtype).reshape(-1, table.shape[0])

    return Product(table, None, 0, features, lambda z: z.reshape(-1, table.shape[1]), lambda w: w.T)


def _convolution(dims: int, given: dict[str, Any], is_leaf: Callable[[Any], bool]) -> Product | None:
    """A convolution is a product with patches, whose positions are those of its output."""
    x, w, padding = given["input"], given["weight"], given.get("padding", 0)
    if not is_leaf(w) or given.get("groups", 1) != 1 or not isinstance(x, Tensor) or w.dim() != dims + 2:
        return None
    kernel, lead = w.shape[2:], x.dim() - dims - 1
    stride, dilation = (_each(given.get(name, 1), dims) for name in ("stride", "dilation"))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]

    def features() -> Tensor:
        patches = F.pad(x, [p for pair in reversed(pads) for p in pair])
        for i in range(dims):
            patches = patches.unfold(lead + 1 + i, dilation[i] * (kernel[i] - 1) + 1, stride[i])
        patches = patches[(..., *(slice(None, None, d) for d in dilation))]  # (lead, channels, positions, kernel)
        where = [*range(lead), *range(lead + 1, lead + 1 + dims), lead, *range(lead + 1 + dims, lead + 1 + 2 * dims)]
        return patches.permute(where).reshape(-1, math.prod(w.shape[1:]))

    return Product(
        w,
        given.get("bias"),
        dims,
        features,
        units=lambda z: z.movedim(lead, -1).reshape(-1, w.shape[0]),
        matrix=lambda index: index.reshape(w.shape[0], -1),
    )


def _each(value: Any, dims: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value
