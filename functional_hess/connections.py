"""Which elements of an op's result depend on which elements of its arguments, for the ops that linear maps are made of.

A linear map v -> L v, written as a program of tensor ops, connects v_j to an element of an intermediate tensor where that element
may change with v_j. With S(t)[i] the set of all j that are connected to element i of t, each op has a rule, whatever the values:

    elementwise            S(y)[i] = S(a)[i] u S(b)[i]
    data movement          S(y) is moved as y is: the op itself runs on the numbers of sets
    sums, norms            the union over what is summed
    products               S(AB)[i, k] = u_j S(A)[i, j] u u_j S(B)[j, k],    convolutions likewise, window by window
    writes at an index     the union of what is written there, and of what was there unless it is replaced
    softmax, scans, ...    the union along the dimension, for all of it

An op that no rule knows connects all its results with all its arguments, which loses nothing. Where an index depends on the
point at which the map was made, so that another point moves other elements, the rule is widened to the whole dimension, or to
everything.

Every rule is a function of a :class:`Call`; :func:`connected` finds it. Sets are numbers of :class:`IndexSets`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.index_sets import IndexSets

__all__ = ["Call", "base_name", "connected", "says_where", "tensors_in", "widened"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, in lists too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op: arguments by the names of its schema, results as they came, and what is known of its arguments.

    ``known`` has the sets of each argument that depends on anything, by ``id``; ``varying`` the ``id`` of those whose values
    depend on the point.
    """

    sets: IndexSets
    func: Any
    arguments: dict[str, Any]
    results: tuple[Any, ...]
    known: dict[int, Tensor]
    varying: frozenset[int]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def of(self, t: Tensor | None) -> Tensor:
        """The sets of an argument, in its shape."""
        if t is None:
            return torch.zeros((), dtype=torch.int64)
        return self.known[id(t)] if id(t) in self.known else torch.zeros(t.shape, dtype=torch.int64)

    def depends(self, t: Any) -> bool:
        return isinstance(t, Tensor) and id(t) in self.known

    @property
    def dependent(self) -> list[Tensor]:
        return list({id(t): t for t in tensors_in(list(self.arguments.values())) if self.depends(t)}.values())

    @property
    def index_varies(self) -> bool:
        """Whether an argument that says where (not what) depends on the point."""
        return any(
            id(t) in self.varying and not t.is_floating_point() and not t.is_complex()
            for t in tensors_in(list(self.arguments.values()))
        )

    @property
    def index_depends(self) -> bool:
        """Whether such an argument depends on the vector itself, as in no linear map."""
        return any(not t.is_floating_point() and not t.is_complex() for t in self.dependent)

    def union(self, a: Tensor, b: Tensor) -> Tensor:
        if not a.dim() and not a:
            return b
        one, other = torch.broadcast_tensors(a, b)
        return torch.from_numpy(self.sets.union(one.numpy(), other.numpy()))

    def over(self, sets: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
        """The unions over ``dims``."""
        dims = sorted({d % max(sets.dim(), 1) for d in dims}) if sets.dim() else []
        if not dims:
            return sets
        rest = [d for d in range(sets.dim()) if d not in dims]
        last = sets.permute(*rest, *dims).reshape(*(sets.shape[d] for d in rest), math.prod(sets.shape[d] for d in dims))
        joined = torch.from_numpy(self.sets.union_last(last.numpy()).reshape(tuple(last.shape[:-1])))
        return joined.reshape([1 if d in dims else s for d, s in enumerate(sets.shape)]) if keepdim else joined

    def everything(self, t: Tensor) -> Tensor:
        """The union of all sets of an argument."""
        return self.over(self.of(t), range(t.dim()))

    def put(self, before: Tensor | None, where: Tensor, written: Tensor, shape: Sequence[int]) -> Tensor:
        """The sets of a tensor of ``shape`` with ``written`` at the positions ``where``, over or instead of what was there.

        ``before`` is ``None`` where what was there is replaced by nothing that counts; several writes to a place all count.
        """
        count = math.prod(shape)
        added = torch.broadcast_to(written, where.shape).reshape(-1).numpy()
        joined = torch.from_numpy(self.sets.union_by(where.reshape(-1).numpy(), added, count)).reshape(tuple(shape))
        return joined if before is None else self.union(before, joined)


Rule = Callable[[Call], Any]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return enter


@functools.cache
def base_name(func: Any) -> str:
    """The name of an op of torch without the underscore of its in-place variant; with its library if that is another."""
    library, _, name = func._schema.name.partition("::")
    in_place = name.endswith("_") and not name.endswith("__")
    return name[:-1] if library == "aten" and in_place else name if library == "aten" else f"{library}::{name}"


def connected(call: Call) -> tuple[list[Tensor | None], bool]:
    """The sets of each result, ``None`` for a result that is no tensor, and whether a rule was found; else they are widened."""
    found = _find(call.func)
    if found is not None and not (found in _BY_INDEX and call.index_depends):
        try:
            answer = found(call)
        except RuntimeError:  # arguments of another kind than the rule expects
            answer = NotImplemented
        if answer is not NotImplemented:
            answers: list[Tensor | None] = list(answer) if isinstance(answer, (list, tuple)) else [answer]
            if len(answers) == len(call.results) and all(map(_fits, answers, call.results)):
                return answers, True
    return widened(call), False


def says_where(func: Any) -> bool:
    """Whether what integers and booleans among its arguments hold may decide what an op connects."""
    return _find(func) is not _elementwise


def _fits(sets: Tensor | None, result: Any) -> bool:
    return not isinstance(result, Tensor) or (sets is not None and sets.shape == result.shape)


@functools.cache
def _find(func: Any) -> Rule | None:
    name = base_name(func)
    if name in _RULES:
        return _RULES[name]
    if torch.Tag.pointwise in func.tags:
        return _elementwise
    spatial = re.fullmatch(r"_?(?:adaptive_)?(?:avg_pool|max_pool|upsample_\w+?)(\d)d(?:_with_indices|_aa)?(?:_backward)?", name)
    return functools.partial(_spatial, int(spatial[1])) if spatial else None


def widened(call: Call) -> list[Tensor | None]:
    """Every result depends on everything."""
    joined = torch.zeros((), dtype=torch.int64)
    for t in call.dependent:
        joined = call.union(joined, call.everything(t))
    return [joined.expand(t.shape) if isinstance(t, Tensor) else None for t in call.results]


# ---------------------------------------------------------------------------------------------------- elementwise

_ELEMENTWISE = (
    *("tanh_backward", "sigmoid_backward", "threshold_backward", "softplus_backward", "elu_backward"),
    *("leaky_relu_backward", "hardtanh_backward", "mish_backward", "silu_backward", "gelu_backward", "hardswish_backward"),
    *("hardsigmoid_backward", "log_sigmoid_backward", "logit_backward", "softshrink_backward", "hardshrink_backward"),
    *("native_dropout_backward", "mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward"),
    *("soft_margin_loss_backward", "binary_cross_entropy_backward", "_prelu_kernel_backward", "rsub", "bernoulli"),
    *(f"prims::{name}" for name in ("add", "sub", "mul", "div", "neg", "pow", "exp", "sqrt", "abs", "convert_element_type")),
)


@_rule(*_ELEMENTWISE)
def _elementwise(call: Call) -> Any:
    shapes = {t.shape for t in call.results if isinstance(t, Tensor)}
    if len(shapes) != 1:
        return NotImplemented
    joined = functools.reduce(call.union, map(call.of, call.dependent), call.of(None))
    return [joined.expand(t.shape) for t in call.results]


@_rule("where", "masked_fill")
def _chosen(call: Call) -> Any:
    """One of two, where a condition from outside says which; else both."""
    first, second = ("self", "other") if "condition" in call.arguments else ("value", "self")
    condition = call["condition"] if "condition" in call.arguments else call["mask"]
    if call.index_varies or call.depends(condition):
        return _elementwise(call)
    sets = [call.of(t) if isinstance(t := call[name], Tensor) else call.of(None) for name in (first, second)]
    return torch.where(condition.cpu(), *sets).expand(call.results[0].shape)


@_rule("copy", "fill")
def _copied(call: Call) -> Any:
    source = call["src"] if "src" in call.arguments else call["value"]
    return call.of(source if isinstance(source, Tensor) else None).expand(call.results[0].shape)


@_rule(
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"),
    *("new_empty", "new_empty_strided", "zero", "empty_permuted", "normal", "uniform", "exponential", "random"),
)
def _nothing(call: Call) -> Any:
    return [torch.zeros(t.shape, dtype=torch.int64) for t in call.results]


# ---------------------------------------------------------------------------------------------------- data movement

_MOVED = (
    *("cat", "stack", "flip", "roll", "repeat", "index_select", "gather", "index", "_unsafe_index", "take", "tril", "triu"),
    *("slice_backward", "select_backward", "diagonal_backward", "slice_scatter", "select_scatter", "diagonal_scatter"),
    *("as_strided_scatter", "diag_embed", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "masked_select", "rot90", "block_diag", "narrow_copy"),
    *("clone", "_to_copy", "contiguous", "lift_fresh_copy", "alias_copy", "detach_copy", "to", "view_copy", "index_fill"),
    *("permute_copy", "transpose_copy", "t_copy", "expand_copy", "slice_copy", "select_copy", "diagonal_copy", "unsqueeze_copy"),
    *("squeeze_copy", "unfold_copy", "as_strided_copy", "split_copy", "split_with_sizes_copy", "unbind_copy"),
)
_SAME = {"clone", "_to_copy", "contiguous", "lift_fresh_copy", "alias_copy", "detach_copy", "to"}
_ABOUT_MEMORY = {"dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking", "out"}


@_rule(*_MOVED)
def _moved(call: Call) -> Any:
    """The op itself, run on numbers of sets; floating constants have the empty set."""
    name = base_name(call.func)
    if name in _SAME:
        return call.of(call["self"])
    if call.index_varies:
        return _moved_somewhere(call, name)
    swapped = {key: _swapped(call, value) for key, value in call.arguments.items() if key not in _ABOUT_MEMORY}
    if not isinstance(swapped.get("value", 0.0), Tensor):
        swapped["value"] = 0  # the constant that padding is made of
    packet = getattr(torch.ops.aten, name)
    swapped = {key: value for key, value in swapped.items() if key in call.arguments}
    by_place = [swapped.pop(a.name) for a in call.func._schema.arguments if not a.kwarg_only and a.name in swapped]
    try:
        moved = packet(*by_place, **swapped)
    except (RuntimeError, NotImplementedError):  # no kernel for integers; doubles hold these numbers exactly
        moved = packet(*map(_doubled, by_place), **swapped)
    every = moved if isinstance(moved, (list, tuple)) else [moved]
    return [t.to(torch.int64) for t in every]


def _swapped(call: Call, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_swapped(call, entry) for entry in value]
    if not isinstance(value, Tensor):
        return value
    return call.of(value) if value.is_floating_point() or value.is_complex() or call.depends(value) else value.cpu()


def _doubled(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_doubled(entry) for entry in value]
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.int64 else value


def _moved_somewhere(call: Call, name: str) -> Any:
    """An index that may be another at another point: each element may come from anywhere along its dimension."""
    if name not in ("gather", "index_select"):
        return NotImplemented
    sets, shape = call.over(call.of(call["self"]), [call["dim"]], keepdim=True), call.results[0].shape
    for d, extent in enumerate(shape):
        if d != call["dim"] % len(shape):
            sets = sets.narrow(d, 0, extent)
    return sets.expand(shape)


# ---------------------------------------------------------------------------------------------------- sums and products


@_rule(
    *("sum", "mean", "nansum", "prod", "amax", "amin", "logsumexp", "var", "std", "norm", "linalg_vector_norm", "any", "all"),
    *("max", "min", "trace", "count_nonzero", "median", "nanmedian"),
)
def _reduced(call: Call) -> Any:
    sets = call.of(call["self"])
    dim = call["dim"]
    dims = range(sets.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    if "other" in call.arguments:  # the larger of two tensors
        return _elementwise(call)
    return [call.over(sets, dims, bool(call["keepdim"]))] * len(call.results)


def _multiplied(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Matrices (or vectors) in the last dimensions."""
    shape = torch.empty(0).new_empty(a.shape, device="meta") @ torch.empty(0).new_empty(b.shape, device="meta")
    joined = torch.zeros(shape.shape, dtype=torch.int64)
    if call.depends(a):
        left = call.over(call.of(a), [-1])
        joined = call.union(joined, left if b.dim() == 1 else left[..., None])
    if call.depends(b):
        right = call.over(call.of(b), [-1 if b.dim() == 1 else -2])
        joined = call.union(joined, right if a.dim() == 1 or b.dim() == 1 else right[..., None, :])
    return joined


@_rule("mm", "bmm", "dot", "vdot", "mv")
def _product(call: Call) -> Any:
    a, b = (value for value in call.arguments.values() if isinstance(value, Tensor))
    return _multiplied(call, a, b)


@_rule("addmm", "baddbmm", "addmv", "addbmm", "addr")
def _added_product(call: Call) -> Any:
    added, a, b = (value for value in call.arguments.values() if isinstance(value, Tensor))
    if base_name(call.func) == "addr":
        product = call.union(call.of(a)[:, None], call.of(b))
    else:
        product = _multiplied(call, a, b)
    product = call.over(product, [0]) if base_name(call.func) == "addbmm" else product
    return call.union(call.of(added), product)


# ---------------------------------------------------------------------------------------------------- along dimensions


def _along(call: Call, dims: Sequence[int]) -> Any:
    """All of a dimension depends on all of it."""
    joined = torch.zeros((), dtype=torch.int64)
    for t in call.dependent:
        joined = call.union(joined, call.over(call.of(t), dims, keepdim=True))
    return [joined.expand(t.shape) for t in call.results]


@_rule(
    *("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "cumsum", "cumprod", "logcumsumexp"),
    *("sort", "topk", "kthvalue", "mode", "glu_backward", "cummax", "cummin"),
)
def _along_dim(call: Call) -> Any:
    return _along(call, [call["dim"] if call["dim"] is not None else -1])


@_rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _along_dims(call: Call) -> Any:
    return _along(call, call["dim"])


@_rule("linalg_solve_triangular", "triangular_solve", "linalg_inv_ex", "_linalg_solve_ex", "linalg_lu_solve", "cholesky_inverse")
def _along_matrices(call: Call) -> Any:
    return _along(call, [-2, -1]) if all(t.dim() >= 2 for t in call.dependent) else NotImplemented


def _spatial(dims: int, call: Call) -> Any:
    """Pooling and interpolation: all places of a channel."""
    return _along(call, range(-dims, 0))


@_rule("nll_loss_backward", "nll_loss2d_backward")
def _chosen_class(call: Call) -> Any:
    gradient, t = call.of(call["grad_output"]), call.results[0]
    if gradient.dim() and t.dim() > 1:
        gradient = gradient.unsqueeze(1)
    return gradient.expand(t.shape) if call.dependent == [call["grad_output"]] else NotImplemented


# ---------------------------------------------------------------------------------------------------- writes at an index


def _places(shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.arange(math.prod(shape), dtype=dtype).reshape(tuple(shape))


def _written(call: Call, where: Tensor, written: Tensor, adds: bool) -> Any:
    before, shape = call.of(call["self"]), call["self"].shape
    if not adds:
        replaced = torch.zeros(math.prod(shape), dtype=torch.bool)
        replaced[where.reshape(-1)] = True
        before = torch.where(replaced.reshape(shape), 0, before)
    return call.put(before, where, written, shape)


@_rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(call: Call) -> Any:
    values, shape = call["values"], call["self"].shape
    if call.index_varies:
        if values.numel() == 1:  # one number, at some places
            return call.union(call.of(call["self"]), call.everything(values))
        return NotImplemented
    where = torch.ops.aten.index(_places(shape), [None if i is None else i.cpu() for i in call["indices"]])
    return _written(call, where, torch.broadcast_to(call.of(values), where.shape), bool(call["accumulate"]))


@_rule("index_add", "index_copy")
def _index_add(call: Call) -> Any:
    source, dim, shape = call["source"], call["dim"], call["self"].shape
    if call.index_varies:
        return _somewhere_along(call, source)
    where = _places(shape).index_select(dim, call["index"].cpu()) if shape else _places(shape)
    return _written(call, where, call.of(source), base_name(call.func) == "index_add")


@_rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(call: Call) -> Any:
    source, index, shape = call["src"], call["index"], call["self"].shape
    if call.index_varies:
        return _somewhere_along(call, source)
    where = _places(shape).gather(call["dim"], index.cpu())
    written = torch.zeros((), dtype=torch.int64)
    if isinstance(source, Tensor):
        written = call.of(source)[tuple(slice(extent) for extent in index.shape)]
    return _written(call, where, written, base_name(call.func) != "scatter" or call["reduce"] is not None)


def _somewhere_along(call: Call, source: Any) -> Any:
    """Written at an index that may be another at another point: anything may be anywhere along the dimension."""
    before, dim, shape = call.of(call["self"]), call["dim"], call["self"].shape
    if not isinstance(source, Tensor) or not call.depends(source) or not shape:
        return call.union(before, call.everything(source)) if isinstance(source, Tensor) else before
    joined, padded = call.over(call.of(source), [dim], keepdim=True), [0] * (2 * len(shape))
    for d, extent in enumerate(shape):
        if d != dim % len(shape):
            padded[2 * (len(shape) - 1 - d) + 1] = extent - joined.shape[d]
    return call.union(before, torch.nn.functional.pad(joined, padded).expand(shape))


@_rule("masked_scatter")
def _masked_scatter(call: Call) -> Any:
    before, source = call.of(call["self"]), call.of(call["source"])
    if call.index_varies:
        return call.union(before, call.everything(call["source"]))
    mask = torch.broadcast_to(call["mask"].cpu(), before.shape)
    where = mask.reshape(-1).nonzero()[:, 0]
    return _written(call, where, source.reshape(-1)[: len(where)], adds=False)


@_rule("masked_scatter_backward")
def _masked_scatter_backward(call: Call) -> Any:
    shape, gradient = call["sizes"], call.of(call["grad_output"])
    if call.index_varies:
        return call.everything(call["grad_output"]).expand(shape)
    picked = gradient[torch.broadcast_to(call["mask"].cpu(), gradient.shape)]
    return torch.nn.functional.pad(picked, [0, math.prod(shape) - len(picked)]).reshape(shape)


@_rule("embedding")
def _embedded(call: Call) -> Any:
    rows = call.of(call["weight"])
    if call.index_varies:
        return call.over(rows, [0]).expand(call.results[0].shape)
    return rows[call["indices"].cpu()]


@_rule("embedding_dense_backward")
def _embedding(call: Call) -> Any:
    gradient, indices, shape = call.of(call["grad_output"]), call["indices"], call.results[0].shape
    if call.index_varies:
        return call.over(gradient.reshape(-1, shape[1]), [0]).expand(shape)
    return call.put(None, _places(shape)[indices.cpu()], gradient, shape)


@_rule("unfold_backward")
def _unfolded(call: Call) -> Any:
    shape = call["input_sizes"]
    where = _places(shape).unfold(call["dim"], call["size"], call["step"])
    return call.put(None, where, call.of(call["grad_in"]), shape)


@_rule("col2im")
def _from_columns(call: Call) -> Any:
    places, sets = _places([1, 1, *call["output_size"]], torch.float64) + 1, call.of(call["self"])  # padding is 0
    windows = torch.ops.aten.im2col(places, call["kernel_size"], call["dilation"], call["padding"], call["stride"])
    channels = math.prod(call.results[0].shape[:-2])
    where = windows.to(torch.int64) - 1 + torch.arange(channels)[:, None, None] * math.prod(call["output_size"])
    inside = (windows > 0).expand(where.shape)
    return call.put(None, where[inside], sets.reshape(where.shape)[inside], call.results[0].shape)


@_rule(*(f"{kind}_pad{d}d_backward" for kind in ("reflection", "replication") for d in (1, 2, 3)))
def _padded(call: Call) -> Any:
    forward = getattr(torch.ops.aten, base_name(call.func).removesuffix("_backward"))
    where = forward(_places(call["self"].shape, torch.float64), call["padding"]).to(torch.int64)
    return call.put(None, where, call.of(call["grad_output"]), call["self"].shape)


@_rule(*(f"upsample_nearest{d}d_backward" for d in (1, 2, 3)))
def _repeated(call: Call) -> Any:
    forward, shape = getattr(torch.ops.aten, base_name(call.func).removesuffix("_backward")), call["input_size"]
    scales = [value for name, value in call.arguments.items() if name.startswith("scale")]
    where = forward(_places(shape, torch.float64), call["output_size"], *scales).to(torch.int64)
    return call.put(None, where, call.of(call["grad_output"]), shape)


# ---------------------------------------------------------------------------------------------------- convolutions


class _Convolution:
    """How the places of the large side (input, or output of a transposed one) and the small side meet, window by window."""

    def __init__(self, call: Call, large: Tensor, weight: Tensor) -> None:
        self.call, self.groups = call, int(call["groups"])
        self.large = tuple(large.shape[2:])
        windows = torch.arange(1, math.prod(self.large) + 1).reshape(self.large)
        options = [self._each(call[name]) for name in ("padding", "stride", "dilation")]
        padding = [p for p in reversed(options[0]) for _ in range(2)]
        windows = torch.nn.functional.pad(windows, padding)
        for d, (size, step, dilation) in enumerate(zip(weight.shape[2:], *options[1:], strict=True)):
            windows = windows.unfold(d, (size - 1) * dilation + 1, step)[..., ::dilation]
        self.windows = windows.reshape(-1, math.prod(weight.shape[2:]))  # (small places, kernel), 0 where there is padding

    def _each(self, option: Sequence[int]) -> list[int]:
        return [option[d if len(option) > 1 else 0] for d in range(len(self.large))]

    def _by_group(self, sets: Tensor) -> Tensor:
        """(batch, channels, *places) -> (batch, group, places): a channel of a group is as good as another."""
        grouped = sets.reshape(sets.shape[0], self.groups, -1, math.prod(sets.shape[2:]))
        return self.call.over(grouped, [2])

    def _spread(self, sets: Tensor, result: Tensor) -> Tensor:
        """(batch, group, places) -> the channels of each group, alike."""
        batch, channels = result.shape[:2]
        return sets[:, :, None].expand(-1, -1, channels // self.groups, -1).reshape(batch, channels, *result.shape[2:])

    def gathered(self, sets: Tensor, result: Tensor) -> Tensor:
        """From the large side to the small one."""
        grouped = torch.nn.functional.pad(self._by_group(sets), [1, 0])
        return self._spread(self.call.over(grouped[..., self.windows], [-1]), result)

    def scattered(self, sets: Tensor, result: Tensor) -> Tensor:
        """From the small side to the large one."""
        grouped, places = self._by_group(sets), math.prod(self.large)
        batch = grouped.shape[0] * self.groups
        where = torch.arange(batch)[:, None, None] * places + self.windows - 1
        inside = (self.windows > 0).expand(where.shape)
        written = grouped.reshape(batch, -1, 1).expand(where.shape)
        joined = self.call.put(None, where[inside], written[inside], (batch, places))
        return self._spread(joined.reshape(-1, self.groups, places), result)


def _of_channels(call: Call, sets: Tensor) -> Tensor:
    """(batch, channels, *places) -> (channels,)"""
    return call.over(sets, [0, *range(2, sets.dim())])


def _of_outputs(call: Call, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """The sets of a weight by output channel."""
    sets = call.of(weight)
    if not transposed:
        return call.over(sets, range(1, sets.dim()))
    grouped = sets.reshape(groups, -1, *sets.shape[1:])  # (group, inputs of it, outputs of it, *kernel)
    return call.over(grouped, [1, *range(3, grouped.dim())]).reshape(-1)


def _channelwise(sets: Tensor, result: Tensor) -> Tensor:
    return sets.reshape(-1, *[1] * (result.dim() - 2)).expand(result.shape)


@_rule("convolution", "_convolution")
def _convolution(call: Call) -> Any:
    source, weight, bias, result = call["input"], call["weight"], call["bias"], call.results[0]
    transposed = bool(call["transposed"])
    joined = torch.zeros(result.shape, dtype=torch.int64)
    if call.depends(source):
        windows = _Convolution(call, result if transposed else source, weight)
        joined = (windows.scattered if transposed else windows.gathered)(call.of(source), result)
    if call.depends(weight):
        joined = call.union(joined, _channelwise(_of_outputs(call, weight, transposed, int(call["groups"])), result))
    return call.union(joined, _channelwise(call.of(bias), result)) if call.depends(bias) else joined


@_rule("convolution_backward")
def _convolution_backward(call: Call) -> Any:
    gradient, source, weight, groups = call["grad_output"], call["input"], call["weight"], int(call["groups"])
    transposed = bool(call["transposed"])
    to_source, to_weight, to_bias = call.results
    sets: list[Tensor | None] = [None, None, None]
    if to_source is not None:
        windows = _Convolution(call, gradient if transposed else source, weight)
        joined = (windows.gathered if transposed else windows.scattered)(call.of(gradient), to_source)
        by_input = _of_outputs(call, weight, not transposed, groups)
        sets[0] = call.union(joined, _channelwise(by_input, to_source))
    if to_weight is not None:
        outer, inner = (source, gradient) if transposed else (gradient, source)
        rows = _of_channels(call, call.of(outer)).reshape(groups, -1, 1)
        columns = _of_channels(call, call.of(inner)).reshape(groups, 1, -1)
        both = call.union(rows, columns).reshape(to_weight.shape[:2])
        sets[1] = both.reshape(*both.shape, *[1] * (to_weight.dim() - 2)).expand(to_weight.shape)
    if to_bias is not None:
        sets[2] = _of_channels(call, call.of(gradient))
    return sets


_BY_INDEX = frozenset(
    {_moved, _index_put, _index_add, _scatter, _embedded, _embedding, _masked_scatter, _masked_scatter_backward}
)
