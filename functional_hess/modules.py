r"""A pure function from an ``nn.Module``.

A module is a function that keeps its parameters p and buffers b inside itself; taken out of it, they are arguments:

    apply(p, b, *args)  =  forward(*args) of a module like this one, whose parameters are p and whose buffers are b.

``torch.func.functional_call`` has the same purpose and swaps tensors inside the module itself while it runs. Two threads then
see each other's parameters, a part that a checkpoint computes again sees the module's own, a shared submodule loses its
parameters (pytorch#164759), unknown names are ignored and wrong shapes accepted. Here the module is read once, when
:func:`functionalize_module` is called, and never again. What is kept is a skeleton: the submodules as plain records of
attributes, with a stand-in wherever a submodule or a tensor was. Every call builds new modules from the skeleton, with its own
tensors in the places of the stand-ins, runs the outermost one, and forgets them. Whatever ``forward`` writes (attributes, lists,
caches, running statistics) is written on those.

This module knows no derivatives, and copies no code: classes and functions are shared with the module. A function that reaches
the module itself by another way, as a closure does, is found at the first call.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode

from functional_hess.tree import chooser, tensors_of

__all__ = ["functionalize_module"]

Tensors = dict[str, Tensor]


def functionalize_module(
    module: nn.Module,
    only: Callable[[str, Any], bool] | str | Sequence[str] | None = None,
    *,
    return_buffers: bool = False,
) -> tuple[Callable[..., Any], Tensors, Tensors]:
    """A pure function from a module, and the tensors to call it with: ``apply, params, buffers``.

    Args:
        module: any module. It is read now and never touched: not its tensors, flags, mode or hooks, and not by a call either.
        only: the parameters to take out, in the words of :func:`functional_hess.partition`: a glob (``"layers.2.*"``), several,
            or a predicate ``(path, parameter) -> bool``, asked about the paths of ``module.named_parameters()``. The others are
            constants of ``apply``. A parameter with several paths (tied weights, a shared submodule) is taken when one of them
            is chosen. All parameters by default.
        return_buffers: ``apply`` returns ``(output, buffers)``, the buffers as this call has left them: the running statistics
            of a BatchNorm in train mode. This is the shape of ``(value, aux)``. Without it, what a call does to its buffers
            ends with the call.

    Returns:
        ``(apply, params, buffers)``. ``params`` and ``buffers`` are dicts with the names of ``named_parameters()`` and
        ``named_buffers()``, tied ones once, whose values are detached clones: training the module changes nothing in them, nor
        in ``apply``, which stays in the mode (train or eval) that the module was in. ``apply(params, buffers, *args,
        **kwargs)`` is the output of the module. Names must be complete and shapes equal; dtypes and devices are free, so
        ``{name: p.double() for name, p in params.items()}`` is a point too. Each call costs a copy of the buffers and some
        microseconds for each submodule. It may run in any number of threads and inside any transform. ``params`` or
        ``params | buffers`` go back with ``module.load_state_dict(..., strict=False)``.

    Raises:
        TypeError: ``module`` is no module, or has a part that cannot serve, which is named: TorchScript, a result of
            ``torch.compile``, replicas, lazy parameters, ``spectral_norm`` in train mode, an attribute that does not copy.
        ValueError: ``only`` chooses no parameter; or, from ``apply``, names or shapes differ: all differences are listed.
        RuntimeError: from ``apply``: ``forward`` wrote into a parameter in place, or reached the module itself, by a closure.

    Example:
        f(w) = (3 w + b)^2 has the second derivative 18:

        >>> import torch, functional_hess as fh
        >>> apply, params, buffers = functionalize_module(torch.nn.Linear(1, 1), only="weight")
        >>> f = lambda p: apply(p, buffers, torch.tensor([3.0])).square().sum()
        >>> fh.hessian(f)(params)["weight"]["weight"].flatten()
        tensor([18.])
    """
    named = _submodules(module)
    params, buffers = _tensors_in(named, "_parameters"), _tensors_in(named, "_buffers")
    buffers = {name: t for name, t in buffers.items() if all(t is not p for p in params.values())}
    chosen = _chosen(module, params, only)
    skeleton, first_call = _Skeleton.of(named, params | buffers), _FirstCall(params | buffers)
    constants = _clones({name: p for name, p in params.items() if name not in chosen})
    own_params, own_buffers = _clones({name: params[name] for name in params if name in chosen}), _clones(buffers)
    shapes, buffer_shapes = ({name: t.shape for name, t in tensors.items()} for tensors in (own_params, own_buffers))

    def apply(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
        _require_alike(("params", params, shapes), ("buffers", buffers, buffer_shapes))
        _require_no_cache()
        held = {**constants, **params}
        versions = _versions(held)
        modules = skeleton.built({**held, **{name: t.clone() for name, t in buffers.items()}})
        with first_call.watched(dict(params), args, kwargs):
            out = modules[0](*args, **kwargs)
        _require_unwritten(held, versions)
        return (out, skeleton.buffers_of(modules, buffers)) if return_buffers else out

    return apply, own_params, own_buffers


def _clones(tensors: Tensors) -> Tensors:
    return {name: t.detach().clone() for name, t in tensors.items()}


# ---------------------------------------------------------------------------------------------------- what is in a module

_Named = dict[str, nn.Module]


def _submodules(module: nn.Module) -> _Named:
    """Every submodule once, by its first path; the module itself is ``""``."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"functionalize_module: module must be a torch.nn.Module, got {type(module).__name__}.")
    named = dict(module.named_modules())
    for path, part in named.items():
        reason = _why_not(part)
        if reason:
            raise TypeError(f"functionalize_module: {_spelled(path)} {reason}.")
    return named


def _why_not(part: nn.Module) -> str | None:
    kind = type(part).__name__
    if isinstance(part, torch.jit.ScriptModule):
        return f"is TorchScript ({kind}), whose parameters live outside Python; pass the module that it was made from"
    if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return f"is a {kind}, which holds replicas of the module; pass its .module"
    if kind == "OptimizedModule":
        return "is the result of torch.compile, which holds on to the parameters it was made with; pass its ._orig_mod"
    if part.training and _iterates(part):
        return (
            f"normalizes by spectral_norm in train mode ({kind}), whose power iteration has no derivative, so that second "
            "derivatives would be wrong; call module.eval() first, which holds its vectors still"
        )
    lazy = [name for name, t in (*part._parameters.items(), *part._buffers.items()) if t is not None and nn.parameter.is_lazy(t)]
    if lazy:
        return f"has {lazy[0]!r} without a shape yet; call the module once on an example, then functionalize it"
    return None


def _iterates(part: nn.Module) -> bool:
    old_style = any(isinstance(hook, SpectralNorm) for hook in part._forward_pre_hooks.values())
    return old_style or isinstance(part, parametrizations._SpectralNorm)


def _spelled(path: str, name: str = "") -> str:
    """How errors call a place in the module."""
    return ".".join(filter(None, ("module", path, name)))


def _tensors_in(named: _Named, field: str) -> Tensors:
    """The tensors that ``field`` of the submodules holds, each once, by its first path."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for path, part in named.items():
        for name, t in getattr(part, field).items():
            if t is not None:
                tensors.setdefault(id(t), (f"{path}.{name}" if path else name, t))
    return dict(tensors.values())


def _chosen(module: nn.Module, params: Tensors, only: Any) -> set[str]:
    """Names of the parameters that are chosen, by any of their paths."""
    if only is None:
        return set(params)
    chooses, every = chooser(only), module.named_parameters(remove_duplicate=False)
    taken = {id(p) for path, p in every if chooses(path, p)}
    if not taken:
        told = ", ".join(map(repr, params)) or "none"
        raise ValueError(f"functionalize_module: only={only!r} chose no parameter; the paths are {told}.")
    return {name for name, p in params.items() if id(p) in taken}


# ---------------------------------------------------------------------------------------------------- the skeleton


class _Stand:
    """Stands in a skeleton for a submodule or a tensor; a call tells what for."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class _Part:
    """One submodule: its class, and its attributes by how a call copies them."""

    cls: type
    shared: dict[str, Any]  # a copy would be the thing itself: numbers, strings, functions
    simple: dict[str, Any]  # lists, dicts and sets of such things
    filled: dict[str, Any]  # stand-ins; lists, dicts and sets that hold some
    deep: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Skeleton:
    """A module without its tensors, from which every call builds modules of its own.

    ``parts[i]`` is a submodule, the first one the whole; ``stands[i]`` stands for it. ``tensors`` are the stand-ins of parameters
    and buffers by name; ``plain`` are tensors that are neither, which the skeleton owns; ``places`` tells where a buffer is: the
    number of the submodule, and the name there.
    """

    stands: tuple[_Stand, ...]
    parts: tuple[_Part, ...]
    tensors: dict[str, _Stand]
    plain: tuple[tuple[_Stand, Tensor], ...]
    places: dict[str, list[tuple[int, str]]]

    @staticmethod
    def of(named: _Named, tensors: Tensors) -> _Skeleton:
        stands = {id(part): _Stand() for part in named.values()}
        stands |= {id(t): _Stand() for t in tensors.values()}
        plain = {id(t): t for t in _plain_tensors(named) if id(t) not in stands}
        plain |= _copied(named, {**stands, **{i: _Stand() for i in plain}})[1]
        stands |= {i: _Stand() for i in plain}
        attributes, _ = _copied(named, stands)
        counts = Counter(id(value) for its in attributes for value in its.values())
        repeated = {i for i, count in counts.items() if count > 1}
        names = {id(t): name for name, t in tensors.items()}
        places: dict[str, list[tuple[int, str]]] = {}
        for number, part in enumerate(named.values()):
            for own, t in part._buffers.items():
                if t is not None:
                    places.setdefault(names[id(t)], []).append((number, own))
        return _Skeleton(
            tuple(stands[id(part)] for part in named.values()),
            tuple(_part(type(part), its, repeated) for part, its in zip(named.values(), attributes, strict=True)),
            {name: stands[id(t)] for name, t in tensors.items()},
            tuple((stands[i], t.detach().clone()) for i, t in plain.items()),
            places,
        )

    def built(self, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, ...]:
        """New submodules that hold these parameters and buffers; the first is the whole."""
        modules = tuple(object.__new__(part.cls) for part in self.parts)
        memo: dict[int, Any] = {id(stand): module for stand, module in zip(self.stands, modules, strict=True)}
        memo.update((id(stand), tensors[name]) for name, stand in self.tensors.items())
        memo.update((id(stand), t.clone()) for stand, t in self.plain)
        each = [(part, module.__dict__) for part, module in zip(self.parts, modules, strict=True)]
        for part, attributes in each:
            attributes.update(part.shared)
            for name, value in part.simple.items():
                attributes[name] = memo[id(value)] = value.copy()
        for part, attributes in each:
            for name, value in part.filled.items():
                attributes[name] = _filled(value, memo)
        for part, attributes in each:
            for name, value in part.deep.items():
                attributes[name] = copy.deepcopy(value, memo)
        return modules

    def buffers_of(self, modules: Sequence[nn.Module], names: Iterable[str]) -> Tensors:
        """The buffers as a call has left them: written in place, or others bound in their place."""
        left: Tensors = {}
        for name in names:
            values = [modules[number]._buffers.get(own) for number, own in self.places[name]]
            if values[0] is None or any(value is not values[0] for value in values):
                raise RuntimeError(
                    f"apply: buffers[{name!r}] must be one tensor after the call, got {', '.join(map(_kind, values))}: forward "
                    "has taken it away, or given the submodules that share it different ones. Let forward write into it in place."
                )
            left[name] = values[0]
        return left


def _kind(value: Tensor | None) -> str:
    return "None" if value is None else f"a tensor of shape {tuple(value.shape)}"


def _plain_tensors(named: _Named) -> Iterator[Tensor]:
    """Tensors in the attributes, and in lists, tuples and dicts there."""
    for part in named.values():
        yield from tensors_of(dict(part.__dict__))[0]


def _copied(named: _Named, stands: Mapping[int, _Stand]) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """The attributes of each submodule, copied with stand-ins; and the tensors that had none, by id."""
    memo: dict[int, Any] = dict(stands)
    attributes = []
    for path, part in named.items():
        kept = {name: value for name, value in part.__dict__.items() if name != "_compiled_call_impl"}
        attributes.append({name: _copy_of(value, memo, _spelled(path, name)) for name, value in kept.items()})
    originals = memo.get(id(memo), ())  # deepcopy keeps alive here whatever it has copied
    return attributes, {id(t): t for t in originals if isinstance(t, Tensor)}


def _copy_of(value: Any, memo: dict[int, Any], where: str) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise TypeError(
            f"functionalize_module: {where} must be something that copies, got a {type(value).__name__} ({error}). Keep it "
            "outside of the module, or give its class a __deepcopy__ that returns self."
        ) from error


def _part(cls: type, attributes: dict[str, Any], repeated: Container[int]) -> _Part:
    part = _Part(cls, {}, {}, {}, {})
    for name, value in attributes.items():
        items = _items(value)
        if _is_atomic(value):
            part.shared[name] = value
        elif type(value) in _CONTAINERS and id(value) not in repeated and all(map(_is_atomic, items)):
            part.simple[name] = value
        elif all(isinstance(item, _Stand) or _is_atomic(item) for item in items):
            part.filled[name] = value
        else:
            part.deep[name] = value
    return part


def _items(value: Any) -> list[Any]:
    """What a plain container with plain keys holds; the value itself, if it is none."""
    if type(value) in (list, set):
        return list(value)
    return list(value.values()) if type(value) in _CONTAINERS and all(map(_is_atomic, value)) else [value]


_CONTAINERS = (dict, OrderedDict, list, set)


def _is_atomic(value: Any) -> bool:
    """Whether a copy is the thing itself; the graph that a class of torch.fx was generated from runs no more, and need not be."""
    return isinstance(value, torch.fx.Graph) or copy.deepcopy(value) is value


def _filled(value: Any, memo: dict[int, Any]) -> Any:
    known = memo.get(id(value))
    if known is not None:
        return known
    if isinstance(value, dict):
        fresh = type(value)((key, memo.get(id(item), item)) for key, item in value.items())
    else:
        fresh = type(value)(memo.get(id(item), item) for item in value)
    memo[id(value)] = fresh
    return fresh


# ---------------------------------------------------------------------------------------------------- around a call


def _require_alike(*arguments: tuple[str, Any, Mapping[str, torch.Size]]) -> None:
    """Names and shapes of all dicts at once."""
    told = [difference for argument in arguments for difference in _differences(*argument)]
    if told:
        raise ValueError(f"apply: {'; '.join(told)}. Start from the dicts that functionalize_module returned.")


def _differences(argument: str, given: Any, shapes: Mapping[str, torch.Size]) -> Iterator[str]:
    if not isinstance(given, Mapping):
        yield f"{argument} must be a dict of tensors, got {type(given).__name__}"
        return
    missing = [f"{argument}[{name!r}]" for name in shapes if name not in given]
    unexpected = [f"{argument}[{name!r}]" for name in given if name not in shapes]
    if missing:
        yield f"missing {', '.join(missing)}"
    if unexpected:
        yield f"unexpected {', '.join(unexpected)}"
    for name, shape in shapes.items():
        t = given.get(name, shape)
        if isinstance(t, Tensor) and t.shape != shape:
            yield f"{argument}[{name!r}] must have shape {tuple(shape)}, got {tuple(t.shape)}"
        elif t is not shape and not isinstance(t, Tensor):
            yield f"{argument}[{name!r}] must be a tensor, got {type(t).__name__}"


def _require_no_cache() -> None:
    if parametrize._cache_enabled:
        raise RuntimeError(
            "apply: torch.nn.utils.parametrize.cached() is active, which remembers parametrized tensors by the identity of a "
            "module; every call here has modules of its own. Call outside of it."
        )


def _versions(params: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: t._version for name, t in params.items() if not t.is_inference()}


def _require_unwritten(params: Mapping[str, Tensor], versions: Mapping[str, int]) -> None:
    written = [f"params[{name!r}]" for name, version in versions.items() if params[name]._version != version]
    if written:
        raise RuntimeError(
            f"apply: forward must not write into a parameter, and has written into {', '.join(written)} in place. Make it a "
            "buffer, or compute a new tensor from it."
        )


class _FirstCall:
    """Until one call has come to its end, looks for tensors of the module itself among those that torch is called with."""

    def __init__(self, tensors: Tensors) -> None:
        self.own = {id(t): (weakref.ref(t), name) for name, t in tensors.items()}

    @contextlib.contextmanager
    def watched(self, *given: Any) -> Iterator[None]:
        if not self.own:
            yield
            return
        passed = set(map(id, tensors_of(given)[0]))
        with _Lookout({i: known for i, known in self.own.items() if i not in passed}):
            yield
        self.own = {}


class _Lookout(TorchFunctionMode):
    """Raises where a tensor is computed from one of ``own``; asking one for its shape or dtype is harmless."""

    def __init__(self, own: Mapping[int, tuple[Callable[[], Any], str]]) -> None:
        super().__init__()
        self.own = own

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) or (isinstance(out, (tuple, list)) and any(isinstance(t, Tensor) for t in out)):
            self._look((*args, *(kwargs or {}).values()))
        return out

    def _look(self, args: Iterable[Any]) -> None:
        for arg in args:
            if isinstance(arg, (tuple, list)):
                self._look(arg)
            elif id(arg) in self.own and self.own[id(arg)][0]() is arg:
                name = self.own[id(arg)][1]
                raise RuntimeError(
                    f"apply: forward must compute with the tensors it is called with, and has reached {name!r} of the module "
                    "itself: a closure, a hook or a global leads there. Let it take what it needs from self or its arguments."
                )
