"""Where among the transforms a computation stands, and what a tensor is from there.

torch.func keeps a stack of levels, ours and its own alike: each is a ``vmap``, a reverse derivative or a forward one, and wraps
the tensors that it follows. This floor reads that stack and those wrappers for the floors above; it differentiates nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

__all__ = [
    "at_depth",
    "constant",
    "constant_of_innermost",
    "depth",
    "derivative_levels",
    "derived_from",
    "eagerly",
    "innermost",
    "is_mapped",
    "is_mapped_here",
    "is_outermost",
    "is_traced",
    "is_tracked",
    "is_tracked_at",
    "is_watched",
    "is_wrapped",
    "moves",
    "outside_transforms",
    "requires_grad_outside",
    "untraced",
    "unwatched",
]

Call = TypeVar("Call", bound=Callable[..., Any])
_Kind = _functorch.TransformType
_KINDS = {_Kind.Grad: "reverse", _Kind.Jvp: "forward", _Kind.Vmap: "vmap"}


# ---------------------------------------------------------------------------------------------------- the stack


def is_outermost() -> bool:
    """Whether no transform, ours or torch.func's, is active."""
    return depth() == 0


def depth() -> int:
    """How many transforms, ours or torch.func's, are active."""
    return _functorch.get_dynamic_layer_stack_depth()


def at_depth(t: Tensor, depth: int) -> Tensor:
    """``t`` without what transforms deeper than ``depth`` have wrapped around it."""
    while _functorch.is_functorch_wrapped_tensor(t) and _functorch.maybe_get_level(t) > depth:
        t = _functorch.get_unwrapped(t)
    return t


def constant_of_innermost(t: Tensor) -> Tensor | None:
    """``t`` as a constant of the innermost level of differentiation, mapped as it is; ``None`` where there is no such level."""
    levels = [level.level() for level in _functorch.get_interpreter_stack() or () if level.key() in (_Kind.Grad, _Kind.Jvp)]
    return _without(t, levels[-1]) if levels else None


def constant(t: Tensor) -> Tensor:
    """``t`` as a constant of every level of differentiation and of plain autograd, mapped as it is.

    ``t.detach()`` is none: the innermost level of forward mode moves it.
    """
    for level in reversed(_functorch.get_interpreter_stack() or ()):
        if level.key() in (_Kind.Grad, _Kind.Jvp):
            t = _without(t, level.level())
    return t.detach()


def _without(t: Tensor, level: int) -> Tensor:
    """``t`` less its wrapper of that level; those of deeper levels, all of them vmaps, are kept."""
    if not _functorch.is_functorch_wrapped_tensor(t) or _functorch.maybe_get_level(t) < level:
        return t
    inside, own = _functorch.get_unwrapped(t), _functorch.maybe_get_level(t)
    if own == level:
        return inside
    return _functorch._add_batch_dim(_without(inside, level), _functorch.maybe_get_bdim(t), own)


def derivative_levels() -> list[str]:
    """The active levels of differentiation from the outermost in: ``"forward"`` or ``"reverse"``."""
    kinds = (_KINDS.get(level.key(), "") for level in _functorch.get_interpreter_stack() or ())
    return [kind for kind in kinds if kind in ("forward", "reverse")]


def innermost() -> str:
    """The innermost level: ``"forward"``, ``"reverse"``, ``"vmap"``, or nothing where no transform is active."""
    stack = _functorch.get_interpreter_stack()
    return _KINDS.get(stack[-1].key(), "other") if stack else ""


def eagerly(call: Call) -> Call:
    """``call``, at which ``torch.compile`` breaks its graph: the levels inside cannot be traced, and f in them would not be."""

    @functools.wraps(call)
    def eager(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(call)(*args, **kwargs)  # under fullgraph=True this line is the error's
        return call(*args, **kwargs)

    return cast(Call, eager)


def derived_from(f: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for the function that a transform of f returns: it bears f's name and runs eagerly."""
    return lambda transformed: functools.wraps(f, updated=())(eagerly(transformed))


# ---------------------------------------------------------------------------------------------------- a tensor


def requires_grad_outside(args: Iterable[Any]) -> bool:
    """Whether a tensor among ``args``, seen from outside all transforms, is watched by plain autograd."""
    for arg in args:
        if isinstance(arg, (list, tuple)) and requires_grad_outside(arg):
            return True
        if isinstance(arg, Tensor):
            while _functorch.is_functorch_wrapped_tensor(arg):
                arg = _functorch.get_unwrapped(arg)
            if arg.requires_grad:
                return True
    return False


def is_tracked(t: Tensor) -> bool:
    """Whether ``t`` depends on the variables of the current reverse level."""
    return _functorch.maybe_get_level(t) == _functorch.current_level() and t.requires_grad


def is_tracked_at(t: Tensor, level: int) -> bool:
    """Whether ``t`` depends on the variables of the reverse level of that depth, whatever deeper transforms have made of it."""
    t = at_depth(t, level)
    return _functorch.maybe_get_level(t) == level and t.requires_grad


def is_wrapped(t: Tensor, depth: int) -> bool:
    """Whether ``t`` is of a transform deeper than ``depth``, and of no use outside it."""
    return _functorch.is_functorch_wrapped_tensor(t) and _functorch.maybe_get_level(t) > depth


def moves(outputs: Sequence[Tensor]) -> list[bool]:
    """Which outputs have a tangent at the current forward level."""
    return [forward_ad.unpack_dual(t).tangent is not None for t in outputs]


def is_mapped() -> bool:
    """Whether a ``vmap``, ours or torch.func's, is active."""
    return any(level.key() == _Kind.Vmap for level in _functorch.get_interpreter_stack() or ())


def is_mapped_here(t: Tensor) -> bool:
    """Whether ``t`` depends on the dimension that the innermost ``vmap`` maps."""
    return bool(_functorch.is_batchedtensor(t)) and _functorch.maybe_get_level(t) == _functorch.current_level()


def is_watched(t: Tensor, *, mapped: bool = True) -> bool:
    """Whether a derivative, ours, torch.func's or plain autograd's, follows ``t``, or with ``mapped`` a ``vmap``."""
    with contextlib.ExitStack() as lowered:
        for level in reversed(_functorch.get_interpreter_stack() or ()):
            if _functorch.is_functorch_wrapped_tensor(t) and _functorch.maybe_get_level(t) == level.level():
                if level.key() == _Kind.Vmap:
                    if mapped:
                        return True
                elif t.requires_grad or (level.key() == _Kind.Jvp and moves((t,))[0]):
                    return True
                t = _functorch.get_unwrapped(t)
            lowered.callback(_functorch.push_dynamic_layer_stack, _functorch.pop_dynamic_layer_stack())
    return t.requires_grad and torch.is_grad_enabled()


def unwatched(t: Tensor) -> Tensor:
    """The value of ``t``, or its first value where a ``vmap`` has many, for nobody to follow."""
    mapped = []
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            mapped.append(_functorch.maybe_get_bdim(t))
        t = _functorch.get_unwrapped(t)
    with outside_transforms():
        for dim in reversed(mapped):
            t = t.select(dim, 0)
        return t.detach()


def is_traced() -> bool:
    """Whether operations are being written down (``make_fx``), for other numbers too."""
    return get_proxy_mode() is not None


def untraced() -> contextlib.AbstractContextManager[Any]:
    """What is computed inside is not written down, and a constant of the trace: for what does not depend on numbers."""
    return disable_proxy_modes_tracing()


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """No transform sees what is done inside: for data that are read or drawn while transforms are active."""
    return torch._C._DisableFuncTorch()
