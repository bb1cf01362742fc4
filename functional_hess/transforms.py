"""The transforms of torch.func over trees, made safe to nest.

What this floor adds to torch.func:

* **Trees.** Arguments and results are any tree of :mod:`functional_hess.tree`; leaves that are not floating tensors are
  carried along. Every transform flattens at its door, hands torch.func a flat tuple of tensors, and unflattens inside f.
* **Repairs.** One ``TorchFunctionMode`` is active inside every transform. When two or more levels of differentiation meet at an
  op whose second derivative torch has wrong or lacks, the op is swapped for a composition that differentiates well
  (:mod:`functional_hess.repairs`). A first-order gradient keeps the fused op. The levels counted are those of torch.func,
  whoever opened them, and plain autograd where an argument requires grad.
* **No silent zero.** A function whose value does not depend on its argument by differentiable operations is an error, unless
  derivatives were taken inside it (the second derivative of a linear function is zero, and right).
* **Threads.** Forward mode is process-wide in torch: one re-entrant lock is held around forward-mode regions.
* **Plain results.** At the outermost level derivatives are contiguous tensors that share no storage by expansion.

This is the only module that touches torch.func or torch.autograd. The functions called ``flat_...`` are the same transforms on
flat tuples of tensors without checks, for the floors above.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from functional_hess.repairs import FIRST_ORDER_REPAIRS, REPAIRS
from functional_hess.tree import Space, broadcast_prefix, flat, paths, tensors_of

__all__ = [
    "Bound",
    "DependenceError",
    "bind",
    "flat_double_backward",
    "flat_jvp",
    "flat_plain_value_and_grad",
    "flat_value_and_grad",
    "flat_vjp",
    "flat_vmap",
    "grad",
    "is_outermost",
    "jacfwd",
    "jacrev",
    "jvp",
    "linearize",
    "plain",
    "repaired",
    "value_and_grad",
    "vjp",
    "vmap",
]

Tree = Any
Tensors = tuple[Tensor, ...]
FORWARD_MODE_TIMEOUT = 300.0  # seconds
_DIFFERENTIATES = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


class DependenceError(ValueError):
    """The value of a function does not depend on its argument through differentiable operations."""


# ---------------------------------------------------------------------------------------------------- nesting and repairs


def is_outermost() -> bool:
    """Whether no transform, ours or torch.func's, is active."""
    return _functorch.get_dynamic_layer_stack_depth() == 0


def _depth() -> int:
    """How many levels of differentiation are active."""
    return sum(level.key() in _DIFFERENTIATES for level in _functorch.get_interpreter_stack() or ())


def _requires_grad_outside(args: Iterable[Any]) -> bool:
    """Whether a tensor among ``args``, seen from outside all transforms, is watched by plain autograd."""
    for arg in args:
        if isinstance(arg, (list, tuple)) and _requires_grad_outside(arg):
            return True
        if isinstance(arg, Tensor):
            while _functorch.is_functorch_wrapped_tensor(arg):
                arg = _functorch.get_unwrapped(arg)
            if arg.requires_grad:
                return True
    return False


class _Repairs(TorchFunctionMode):
    """Swaps the ops of the table while derivatives nest, and remembers which it swapped."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always
        self.used: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        composition = REPAIRS.get(func)
        if composition is None or not self._needed(func, args, kwargs):
            return func(*args, **kwargs)
        self.used.add(getattr(func, "__name__", str(func)))
        return composition(*args, **kwargs)

    def _needed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Levels nest; or one level is forward mode, which lacks first derivatives of such ops too."""
        levels = [level.key() for level in _functorch.get_interpreter_stack() or () if level.key() in _DIFFERENTIATES]
        if self.always or len(levels) >= 2 or _functorch.TransformType.Jvp in levels:
            return True
        return bool(levels) and (func in FIRST_ORDER_REPAIRS or _requires_grad_outside((*args, *kwargs.values())))


@contextlib.contextmanager
def repaired(*, always: bool = False, fresh: bool = False) -> Iterator[set[str]]:
    """Ops with wrong or missing second derivatives are swapped inside, once derivatives nest.

    Args:
        always: swap at every depth (for plain double backward, whose levels can't be counted).
        fresh: start a new record of swapped ops even where the mode is active already.

    Yields:
        the names of the ops swapped so far.
    """
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, _Repairs) and not fresh and (mode.always or not always):
            yield mode.used
            return
    with _Repairs(always) as mode:
        yield mode.used


class _ForwardModeLock:
    """One re-entrant lock around forward-mode regions; a forked child gets a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=FORWARD_MODE_TIMEOUT):
            raise RuntimeError(
                f"jvp: waited {FORWARD_MODE_TIMEOUT:.0f} s for another thread to leave forward-mode differentiation, which is "
                "process-wide in torch. If f starts a thread that differentiates and waits for it, do that outside f, or use "
                "mode='reverse-over-reverse'."
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_FORWARD_MODE = _ForwardModeLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_FORWARD_MODE.renew)


def plain(tensors: Iterable[Tensor]) -> Tensors:
    """The same tensors without expanded views, zero tensors, strides or shared storage, if this is the outermost level."""
    if not is_outermost():
        return tuple(tensors)
    fresh: list[Tensor] = []
    taken: set[tuple[Any, Any]] = set()
    for t in map(_plain, tensors):
        place = (t.untyped_storage()._cdata, t.storage_offset())
        fresh.append(t.clone() if place in taken and t.numel() else t)  # the gradients of a + b are one tensor
        taken.add(place)
    return tuple(fresh)


def _plain(t: Tensor) -> Tensor:
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    return t.resolve_neg().contiguous()


# ---------------------------------------------------------------------------------------------------- functions of tensors


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function at a point: ``call(*tensors)`` evaluates it where the coordinates ``x`` in ``space`` are ``tensors``."""

    verb: str
    space: Space
    x: Tensors
    call: Callable[..., Any]

    def split(self, tensors: Sequence[Tensor], has_aux: bool) -> tuple[Any, Any]:
        """``(f(x), aux)`` at other coordinates; ``aux`` is ``None`` without ``has_aux``."""
        return _aux_split(self.verb, self.call(*tensors), has_aux)

    def scalar(self, has_aux: bool = False) -> Callable[..., tuple[Tensor, Any]]:
        """The function as ``(*tensors) -> (value, aux)``, checked to be a scalar; ``aux`` is ``None`` without ``has_aux``."""

        def value_and_aux(*tensors: Tensor) -> tuple[Tensor, Any]:
            value, aux = self.split(tensors, has_aux)
            _require_scalar(self.verb, value, has_aux)
            return value, aux

        return value_and_aux


def bind(verb: str, f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], argnums: int | Sequence[int]) -> Bound:
    """Fix every argument of ``f`` but those that ``argnums`` chooses; ``verb`` names the caller in errors.

    Raises:
        TypeError: there is no floating tensor to differentiate, or ``f`` is no function.
        ValueError: ``argnums`` is out of range.
    """
    if not callable(f):
        raise TypeError(f"{verb}: f must be callable, got {type(f).__name__}.")
    single = isinstance(argnums, int)
    chosen = [_argument(verb, i, len(args)) for i in ([argnums] if single else argnums)]
    tree = args[chosen[0]] if single else tuple(args[i] for i in chosen)
    name = ("x" if chosen[0] == 0 else f"args[{chosen[0]}]") if single else "args"
    space = Space.of(tree, name)
    if not space.shapes:
        raise TypeError(_nothing_to_differentiate(verb, tree, name))

    def call(*tensors: Tensor) -> Any:
        point = space.at(tensors)
        filled = list(args)
        for i, part in zip(chosen, (point,) if single else point, strict=True):
            filled[i] = part
        return f(*filled, **kwargs)

    return Bound(verb, space, space.pack(tree, name), call)


def _argument(verb: str, i: int, count: int) -> int:
    if not -count <= i < count:
        raise ValueError(f"{verb}: argnums={i}, but f was called with {count} positional arguments.")
    return i % count


def _nothing_to_differentiate(verb: str, tree: Tree, name: str) -> str:
    tensors, _ = tensors_of(tree)
    if tensors:
        kinds, cure = ", ".join(sorted({str(t.dtype) for t in tensors})), "Convert it, as in x.double()"
    elif isinstance(tree, torch.nn.Module):
        kinds, cure = type(tree).__name__, "Pass dict(module.named_parameters()) and a function that calls the module with it"
    elif isinstance(tree, Iterator):
        kinds, cure = type(tree).__name__, "Pass a tuple or a dict of tensors, as in tuple(module.parameters())"
    else:
        kinds, cure = type(tree).__name__, "Make it a tensor, as in torch.tensor(2.0) or torch.from_numpy(array)"
    return f"{verb}: {name} holds no floating tensor to differentiate, only {kinds}. {cure}."


def _aux_split(verb: str, out: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{verb}: with has_aux=True f must return (value, aux), got {_described(out)}.")
    return out


def _described(out: Any) -> str:
    return f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"{type(out).__name__}"


def _require_scalar(verb: str, value: Any, has_aux: bool) -> None:
    if isinstance(value, Tensor) and value.dim() == 0:
        if value.is_complex():
            raise TypeError(f"{verb}: f must return a real scalar, got {value.dtype}. Take .real or .abs() of it.")
        return
    if isinstance(value, Tensor):
        cure = "Reduce it with .sum() or .mean(), or use jacrev"
    elif isinstance(value, tuple) and not has_aux:
        cure = "If f returns (value, aux), pass has_aux=True"
    else:
        cure = "Return the tensor itself, not .item(), float(...) or a container of it"
    raise TypeError(f"{verb}: f must return a scalar tensor (shape ()), got {_described(value)}. {cure}.")


class _DepthWatch(TorchFunctionMode):
    """Notices a level of differentiation beyond those that were active when it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.deeper = _depth(), False

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.deeper = self.deeper or _depth() > self.start
        return func(*args, **(kwargs or {}))


def _differentiates_inside(call: Callable[..., Any], tensors: Sequence[Tensor]) -> bool:
    with _DepthWatch() as watch:
        call(*tensors)
    return watch.deeper


def _tracked(t: Tensor) -> bool:
    """Whether ``t`` depends on the variables of the current reverse level."""
    return _functorch.maybe_get_level(t) == _functorch.current_level() and t.requires_grad


def _require_dependence(verb: str, outputs: Sequence[Tensor], call: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    if not any(map(_tracked, outputs)) and not _differentiates_inside(call, tensors):
        raise DependenceError(_independence(verb))


def _depends_on_any(f: Callable[..., tuple[Tensor, Any]], x: Tensors) -> bool:
    """Whether the value depends on some leaf; asked where it does not depend on those of the moment, so that zero is right."""
    answer: list[bool] = []

    def of_all(*tensors: Tensor) -> Tensor:
        value = f(*tensors)[0]
        answer.append(_tracked(value))
        return value

    torch.func.vjp(of_all, *x)
    return answer[-1]


def _independence(verb: str) -> str:
    return (
        f"{verb}: f(x) does not depend on x through differentiable operations, so its derivative would silently be zero. "
        "Look for .detach(), .item(), torch.tensor(...), .data, no_grad, rounding, argmax, comparisons or an op without a "
        "derivative between x and the result."
    )


def _graph(outputs: Sequence[Tensor]) -> set[Any]:
    """The nodes of the graph of the current level behind ``outputs``."""
    reached, stack = set(), [t.grad_fn for t in outputs if t.requires_grad]
    while stack:
        node = stack.pop()
        if node is not None and node not in reached:
            reached.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return reached


def _require_twice_differentiable(value: Tensor) -> None:
    """A backward marked ``once_differentiable`` breaks the graph of the gradient without a word, if the cotangent needs none."""
    for node in _graph([value]):
        function = getattr(node, "_forward_cls", None)
        cells = getattr(getattr(function, "backward", None), "__closure__", None) or ()
        inside = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, type)]
        for cls in (function, *inside):
            code = getattr(getattr(cls, "backward", None), "__code__", None)
            if code is not None and code.co_filename == torch.autograd.function.__file__ and code.co_name == "wrapper":
                raise NotImplementedError(f"the backward of {getattr(cls, '__name__', cls)} is marked once_differentiable")


def _require_every_leaf(verb: str, outputs: Sequence[Tensor], tensors: Sequence[Tensor], space: Space | None) -> None:
    """strict=True: every leaf is reached from the outputs in the graph of the current level."""
    reached = _graph(outputs)
    for leaf, t in enumerate(tensors):
        if torch.autograd.graph.get_gradient_edge(t).node not in reached:
            where = space.name_of(leaf) if space else f"x[{leaf}]"
            raise DependenceError(f"{verb}: f does not depend on {where} (strict=True); its derivative is zero.")


def flat_value_and_grad(
    f: Callable[..., tuple[Tensor, Any]],
    x: Tensors,
    wrt: Sequence[int] | None = None,
    *,
    verb: str = "grad",
    strict: Space | None = None,
    twice: bool = False,
) -> tuple[tuple[Tensor, Any], Tensors]:
    """``((value, aux), gradient)`` of ``f(*x) -> (value, aux)``, with respect to the leaves ``wrt`` (all by default).

    ``twice`` refuses what reverse mode cannot differentiate again.
    """
    wrt = range(len(x)) if wrt is None else wrt
    variables = tuple(x[i] for i in wrt)
    rebuild: list[Callable[..., Tree]] = []

    def of_variables(*variables: Tensor) -> tuple[Tensor, Tensors]:
        value, aux = f(*_replaced(x, wrt, variables))
        if not _tracked(value) and not (len(variables) < len(x) and _depends_on_any(f, x)):
            _require_dependence(verb, [value], lambda *v: f(*_replaced(x, wrt, v)), variables)
        if strict is not None:
            _require_every_leaf(verb, [value], variables, strict)
        if twice:
            _require_twice_differentiable(value)
        kept, back = tensors_of(aux)
        rebuild.append(back)
        return value, kept

    with repaired():
        argnums = tuple(range(len(variables)))
        gradient, (value, kept) = torch.func.grad_and_value(of_variables, argnums, has_aux=True)(*variables)
    return (value, rebuild[-1](kept)), gradient


def _replaced(x: Tensors, where: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    filled = list(x)
    for i, value in zip(where, values, strict=True):
        filled[i] = value
    return filled


def flat_jvp(f: Callable[..., tuple[Tensors, Tensors]], x: Tensors, v: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """``(outputs, tangents, aux)`` of ``f(*x) -> (outputs, aux)`` along ``v``."""
    with repaired(), _FORWARD_MODE:
        _load_forward_rules()
        outputs, tangents, aux = cast(tuple[Tensors, Tensors, Tensors], torch.func.jvp(f, x, v, has_aux=True))
    # a mixed-dtype formula may promote a tangent beyond its primal
    return outputs, tuple(t.to(y.dtype) for y, t in zip(outputs, tangents, strict=True)), aux


@functools.cache
def _load_forward_rules() -> None:
    """torch loads these at its first forward-mode derivative, with deprecation warnings of its own that are no user's concern."""
    with warnings.catch_warnings(), _FORWARD_MODE:
        warnings.simplefilter("ignore", DeprecationWarning)
        one = torch.ones(())
        torch.func.jvp(torch.sin, (one,), (one,))


def flat_vjp(f: Callable[..., tuple[Tensors, Tensors]], x: Tensors) -> tuple[Tensors, Callable[[Tensors], Tensors], Tensors]:
    """``(outputs, pullback, aux)`` of ``f(*x) -> (outputs, aux)``; the graph is kept for any number of cotangents."""
    with repaired():
        outputs, pull, aux = cast(tuple[Tensors, Any, Tensors], torch.func.vjp(f, *x, has_aux=True))

    def pullback(cotangents: Tensors) -> Tensors:
        with repaired():
            return pull(tuple(cotangents))

    return outputs, pullback, aux


def flat_vmap(f: Callable[..., Tensors], *, randomness: str = "error", chunk_size: int | None = None) -> Callable[..., Tensors]:
    """``f`` of flat tensors, batched over the first dimension of every argument and result."""
    batched = torch.func.vmap(f, randomness=randomness, chunk_size=chunk_size)

    def mapped(*tensors: Tensor) -> Tensors:
        with repaired():
            return batched(*tensors)

    return mapped


def flat_plain_value_and_grad(
    f: Callable[..., tuple[Tensor, Any]], x: Tensors, wrt: Sequence[int] | None = None, *, verb: str
) -> tuple[tuple[Tensor, Any], Tensors]:
    """``((value, aux), gradient)`` by plain autograd, for functions that no functorch level can enter."""
    grad_mode = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        alias = _variables(x, grad_mode)
        with _Recomputation() as recomputation:
            value, aux = f(*alias)
        _require_watched(value, verb)
        outside = grad_mode and _reaches_beyond(value, x, alias)
        variables = alias if wrt is None else [alias[i] for i in wrt]
        with recomputation.watched():
            gradient = torch.autograd.grad(value, variables, create_graph=outside, retain_graph=True, materialize_grads=True)
    return (value if outside else value.detach(), aux), gradient


def flat_double_backward(
    f: Callable[..., tuple[Tensor, Any]], x: Tensors, rows: Sequence[int], columns: Sequence[int], *, verb: str
) -> Callable[[Tensors], Tensors]:
    """The linear map from tangents at leaves ``rows`` to H v at leaves ``columns``, by plain autograd with its graph kept.

    It serves functions that no functorch level can enter: checkpointing, an old-style ``autograd.Function``.
    """
    grad_mode = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), repaired(always=True):
        alias = _variables(x, grad_mode)
        with _Recomputation() as recomputation:
            value, _ = f(*alias)
        _require_watched(value, verb)
        _require_twice_differentiable(value)
        outside = grad_mode and _reaches_beyond(value, x, alias)
        with recomputation.watched():
            gradient = _backward([value], [alias[i] for i in rows], [torch.ones_like(value)], create_graph=True)

    def product(v: Tensors) -> Tensors:
        pairs = [(g, u) for g, u in zip(gradient, v, strict=True) if g.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(x[i]) for i in columns)
        with torch.inference_mode(False), torch.enable_grad(), repaired(always=True), recomputation.watched():
            cotangents = [u.clone() if u.is_inference() else u for _, u in pairs]
            return _backward([g for g, _ in pairs], [alias[i] for i in columns], cotangents, create_graph=outside)

    return product


def _backward(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, create_graph: bool
) -> Tensors:
    """``torch.autograd.grad`` with the graph kept, but with our modes active inside, for parts that are computed again there."""
    found = torch.autograd.graph._engine_run_backward(
        tuple(outputs), tuple(cotangents), True, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))


class _Recomputation(TorchFunctionMode):
    """Refuses checkpointing that computes again with other parameters than f used.

    A checkpointed function runs again during the backward pass, when ``functional_call`` has put the module's own parameters
    back; torch then differentiates at those, without a word. Parameters that f never met give it away.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[int, Tensor] = {}
        self.again = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.again = True
        with self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self._meet((*args, *(kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def _meet(self, args: Iterable[Any]) -> None:
        for arg in args:
            if isinstance(arg, (tuple, list)):
                self._meet(arg)
            elif isinstance(arg, torch.nn.Parameter):
                if self.again and id(arg) not in self.met:
                    raise NotImplementedError(
                        "a checkpoint computes again with other parameters than f was called with (torch.func.functional_call "
                        "has put the module's own back); checkpoint functions of their parameters instead"
                    )
                self.met[id(arg)] = arg


def _variables(x: Tensors, keep_graph: bool) -> Tensors:
    """Tensors to differentiate by, one for each leaf: views where the outer graph is to go on, else detached."""
    fresh = (t.clone() if t.is_inference() else t for t in x)
    return tuple(t.view_as(t) if keep_graph and t.requires_grad else t.detach().requires_grad_() for t in fresh)


def _require_watched(value: Tensor, verb: str) -> None:
    if not value.requires_grad:
        raise DependenceError(_independence(verb))


def _reaches_beyond(value: Tensor, x: Tensors, alias: Tensors) -> bool:
    """Whether plain autograd watches more than the aliases: a leaf of x, or a tensor that f closes over."""
    own = {id(t) for t in alias}
    ends = [node.variable for node in _graph([value]) if hasattr(node, "variable")]
    return any(t.requires_grad for t in x) or any(id(t) not in own for t in ends)


# ---------------------------------------------------------------------------------------------------- the transforms


def value_and_grad(
    f: Callable[..., Any], argnums: int | Sequence[int] = 0, *, has_aux: bool = False, strict: bool = False
) -> Callable[..., Any]:
    """The function x -> (f(x), gradient of f at x), for a scalar f.

    The order is JAX's, where ``torch.func.grad_and_value`` has it the other way round.

    Args:
        f: a function that returns a scalar tensor, or ``(scalar, aux)``.
        argnums: the argument to differentiate, or several; a tuple gives a tuple of gradients.
        has_aux: f returns ``(value, aux)``; the result is ``((value, aux), gradient)``. ``aux`` is any tree.
        strict: refuse a leaf on which f does not depend, instead of a gradient of zeros.

    Returns:
        a function of the same arguments. The gradient has the structure of the argument, with ``None`` at carried leaves.
        Costs about three evaluations of f.

    Raises:
        DependenceError: f(x) does not depend on x by differentiable operations.
        TypeError: f does not return a scalar, or x holds no floating tensor.

    Example:
        >>> import torch
        >>> value_and_grad(lambda x: (x["a"] ** 3).sum())({"a": torch.tensor([1.0, 2.0]), "step": 7})
        (tensor(9.), {'a': tensor([ 3., 12.]), 'step': None})
    """

    @functools.wraps(f, updated=())
    def transformed(*args: Any, **kwargs: Any) -> Any:
        bound = bind("grad", f, args, kwargs, argnums)
        (value, aux), gradient = flat_value_and_grad(bound.scalar(has_aux), bound.x, strict=bound.space if strict else None)
        result = bound.space.unpack(plain(gradient))
        return ((value, aux), result) if has_aux else (value, result)

    return transformed


def grad(
    f: Callable[..., Any], argnums: int | Sequence[int] = 0, *, has_aux: bool = False, strict: bool = False
) -> Callable[..., Any]:
    """The gradient of a scalar function: x -> df/dx, a tree like x.

    Arguments, errors and cost are those of :func:`value_and_grad`; with ``has_aux`` the result is ``(gradient, aux)``.

    Example:
        >>> import torch
        >>> grad(grad(lambda x: x**3))(torch.tensor(2.0))
        tensor(12.)
    """
    both = value_and_grad(f, argnums, has_aux=has_aux, strict=strict)

    @functools.wraps(f, updated=())
    def transformed(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return transformed


@dataclasses.dataclass
class _Output:
    """What f returned, apart from its floating tensors: where they belong, what is carried, the auxiliary tree."""

    space: Space
    carried: Tensors
    aux: Tensors
    rebuild_aux: Callable[[Sequence[Any]], Tree]

    @staticmethod
    def of(verb: str, out: Any, has_aux: bool) -> tuple[_Output, Tensors]:
        out, aux = _aux_split(verb, out, has_aux)
        space = Space.of(out, "f(x)")
        if not space.shapes:
            raise TypeError(f"{verb}: f must return at least one floating tensor, got {_described(out)}.")
        carried = tuple(leaf for leaf in space.carried if isinstance(leaf, Tensor))
        aux_tensors, rebuild = tensors_of(aux)
        return _Output(space, carried, aux_tensors, rebuild), space.pack(out, "f(x)")

    @property
    def kept(self) -> Tensors:
        return self.carried + self.aux

    def value(self, tensors: Tensors, kept: Tensors) -> Tree:
        fresh = iter(kept)
        carried = tuple(next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in self.space.carried)
        return dataclasses.replace(self.space, carried=carried).at(tensors)

    def aux_value(self, kept: Tensors) -> Tree:
        return self.rebuild_aux(kept[len(self.carried) :])


def jvp(
    f: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], *, has_aux: bool = False, strict: bool = False
) -> tuple[Any, ...]:
    """The derivative of f at ``primals`` along ``tangents``: (f(x), J v), in one forward pass.

    Args:
        f: a function of ``len(primals)`` trees.
        primals: a tuple of arguments.
        tangents: a tuple of trees like them; ``None`` at carried leaves.
        has_aux: f returns ``(out, aux)``; the result is ``(out, out_tangent, aux)``.
        strict: refuse an output that does not depend on the primals.

    Returns:
        ``(out, out_tangent)``; the tangent has the structure of ``out`` with ``None`` at leaves that are not floating tensors.

    Raises:
        ValueError: a tangent differs from its primal in structure, shape, dtype or device; the leaf is named.
        DependenceError: no output depends on the primals by differentiable operations.

    Example:
        >>> import torch
        >>> jvp(torch.sin, (torch.tensor(0.0),), (torch.tensor(2.0),))
        (tensor(0.), tensor(2.))
    """
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"jvp: {name} must be a tuple of arguments, got {type(given).__name__}. Write ({name[:-1]},).")
    bound = bind("jvp", f, tuple(primals), {}, tuple(range(len(primals))))
    v = bound.space.pack(tuple(tangents), "tangents")
    seen: list[_Output] = []

    def of_tensors(*tensors: Tensor) -> tuple[Tensors, Tensors]:
        output, outputs = _Output.of("jvp", bound.call(*tensors), has_aux)
        _require_tangents(output.space, outputs, bound.call, tensors, strict)
        seen.append(output)
        return outputs, output.kept

    outputs, out_tangents, kept = flat_jvp(of_tensors, bound.x, v)
    out, out_tangent = seen[-1].value(outputs, kept), seen[-1].space.unpack(plain(out_tangents))
    return (out, out_tangent, seen[-1].aux_value(kept)) if has_aux else (out, out_tangent)


def _moves(outputs: Tensors) -> list[bool]:
    """Which outputs have a tangent at the current forward level."""
    return [forward_ad.unpack_dual(t).tangent is not None for t in outputs]


def _require_tangents(space: Space, outputs: Tensors, call: Callable[..., Any], tensors: Sequence[Tensor], strict: bool) -> None:
    moves = _moves(outputs)
    if strict and not all(moves):
        raise DependenceError(f"jvp: {space.name_of(moves.index(False), 'f(x)')} does not depend on x (strict=True).")
    if not any(moves) and not _differentiates_inside(call, tensors):
        raise DependenceError(_independence("jvp"))


def vjp(f: Callable[..., Any], *primals: Any, has_aux: bool = False, strict: bool = False) -> tuple[Any, ...]:
    """f at ``primals`` and its pullback u -> J^T u, which may be called any number of times.

    Returns:
        ``(out, pullback)``, with ``has_aux`` ``(out, pullback, aux)``. ``pullback(u)`` takes a tree like ``out`` (``None`` at
        leaves that are not floating tensors) and returns a tuple with one tree for each primal. Each call costs about two
        evaluations of f; the graph is kept as long as the pullback lives.

    Raises:
        ValueError: a cotangent differs from the output in structure, shape, dtype or device.
        DependenceError: no output depends on the primals by differentiable operations.

    Example:
        A pullback of the gradient, kept at a point, is the cheap way to many Hessian-vector products:

        >>> import torch
        >>> _, product = vjp(grad(lambda x: (x**3).sum()), torch.tensor([1.0, 2.0]))
        >>> product(torch.tensor([1.0, 1.0]))
        (tensor([ 6., 12.]),)
    """
    return _vjp(f, primals, has_aux, strict, guard=True)


def _vjp(f: Callable[..., Any], primals: tuple[Any, ...], has_aux: bool, strict: bool, guard: bool) -> tuple[Any, ...]:
    bound = bind("vjp", f, primals, {}, tuple(range(len(primals))))
    seen: list[_Output] = []

    def of_tensors(*tensors: Tensor) -> tuple[Tensors, Tensors]:
        output, outputs = _Output.of("vjp", bound.call(*tensors), has_aux)
        if guard:
            _require_dependence("vjp", outputs, bound.call, tensors)
        if strict:
            _require_every_leaf("vjp", outputs, tensors, bound.space)
        seen.append(output)
        return outputs, output.kept

    outputs, pull, kept = flat_vjp(of_tensors, bound.x)
    output = seen[-1]

    def pullback(cotangents: Tree) -> tuple[Any, ...]:
        return bound.space.unpack(plain(pull(output.space.pack(cotangents, "cotangent"))))

    out = output.value(outputs, kept)
    return (out, pullback, output.aux_value(kept)) if has_aux else (out, pullback)


def linearize(f: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """f at ``primals`` and its derivative there as a linear function of tangents.

    The transpose of a kept pullback: v -> J v is the derivative of u -> J^T u, transposed. Each call is one backward pass
    through the graph of the pullback; f itself ran once. Unlike ``torch.func.linearize`` it composes with every transform.

    Returns:
        ``(out, pushforward)``; ``pushforward(*tangents)`` is a tree like ``out``.

    Example:
        >>> import torch
        >>> out, pushforward = linearize(lambda x: x["a"] * x["b"], {"a": torch.tensor(2.0), "b": torch.tensor(5.0)})
        >>> pushforward({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
        tensor(25.)
    """
    out, pullback = vjp(f, *primals)
    space, x_space = Space.of(out, "f(x)"), Space.of(primals, "primals")
    zero = space.unpack([torch.zeros_like(t) for t in space.pack(out, "f(x)")])
    _, transpose = _vjp(pullback, (zero,), has_aux=False, strict=False, guard=False)

    def pushforward(*tangents: Any) -> Any:
        x_space.pack(tangents, "tangents")
        return transpose(tangents)[0]

    return out, pushforward


def vmap(
    f: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """f, mapped over a dimension of its arguments, in one pass.

    Args:
        f: any function of trees that returns a tree.
        in_dims: the dimension to map over, for all arguments or as a tree prefix of the tuple of arguments; ``None`` leaves a
            part unmapped. Leaves that are not tensors are carried.
        out_dims: where the mapped dimension goes in the results, likewise; ``None`` for a result that does not depend on it.
        randomness: ``"error"``, ``"same"`` or ``"different"``, as in torch.func.
        chunk_size: how many at once; all by default.

    Example:
        >>> import torch
        >>> vmap(grad(lambda w, x: (w * x) ** 2), (None, 0))(torch.tensor(3.0), torch.tensor([1.0, 2.0]))
        tensor([ 6., 24.])
    """

    @functools.wraps(f, updated=())
    def transformed(*args: Any, **kwargs: Any) -> Any:
        tensors, rebuild = tensors_of(args)
        dims = _in_dims(in_dims, args, tensors)
        seen: list[tuple[Callable[..., Tree], list[Any], dict[int, Tensor]]] = []

        def of_tensors(*batched: Tensor) -> Tensors:
            out = f(*rebuild(batched), **kwargs)
            results, rebuild_out = tensors_of(out)
            spots = _out_dims(out_dims, out)
            whole = {i: t for i, t in enumerate(results) if spots[i] is None}
            seen.append((rebuild_out, spots, whole))
            _require_unmapped(whole.values())
            return tuple(t for i, t in enumerate(results) if i not in whole)

        with repaired():
            mapped = torch.func.vmap(of_tensors, in_dims=dims, randomness=randomness, chunk_size=chunk_size)(*tensors)
        rebuild_out, spots, whole = seen[-1]
        fresh = iter(plain(t.movedim(0, d) for t, d in zip(mapped, (d for d in spots if d is not None), strict=True)))
        return rebuild_out([whole[i] if i in whole else next(fresh) for i in range(len(spots))])

    return transformed


def _in_dims(in_dims: Any, args: tuple[Any, ...], tensors: Tensors) -> tuple[int | None, ...]:
    if isinstance(in_dims, list):
        in_dims = tuple(in_dims)
    leaves = broadcast_prefix(args, args, "args")
    spread = broadcast_prefix(in_dims, args, "in_dims") if not isinstance(in_dims, int) else [in_dims] * len(leaves)
    dims, sizes = [], {}
    for i, (leaf, dim) in enumerate(zip(leaves, spread, strict=True)):
        if not isinstance(leaf, Tensor):
            continue
        dims.append(dim)
        if dim is None:
            continue
        if not -leaf.dim() <= dim < leaf.dim():
            raise ValueError(f"vmap: in_dims={dim} is out of range for args.{paths(args)[i]} of shape {tuple(leaf.shape)}.")
        sizes[i] = leaf.shape[dim]
    if not sizes:
        raise ValueError("vmap: in_dims must map at least one tensor; all are None, or no argument holds a tensor.")
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"args.{paths(args)[i]} has {size}" for i, size in sizes.items())
        raise ValueError(f"vmap: the mapped dimensions must have one size: {told}.")
    return tuple(dims)


def _out_dims(out_dims: Any, out: Tree) -> list[int | None]:
    """The place of the mapped dimension for each tensor of ``out``."""
    leaves = broadcast_prefix(out, out, "f(x)")
    spread = [out_dims] * len(leaves) if isinstance(out_dims, int) else broadcast_prefix(out_dims, out, "out_dims")
    return [d for d, leaf in zip(spread, leaves, strict=True) if isinstance(leaf, Tensor)]


def _require_unmapped(tensors: Iterable[Tensor]) -> None:
    for t in tensors:
        if _functorch.is_batchedtensor(t) and _functorch.maybe_get_level(t) == _functorch.current_level():
            raise ValueError("vmap: out_dims is None for a result that depends on the mapped dimension; give its place.")


# ---------------------------------------------------------------------------------------------------- Jacobians


def jacfwd(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The Jacobian of f by columns: one forward pass for each coordinate of x, ``chunk_size`` at a time (all by default).

    Returns:
        a function whose result is a tree of trees: the block of output leaf o and argument leaf p has shape
        ``o.shape + p.shape``. With ``has_aux`` the result is ``(jacobian, aux)``. Choose it over :func:`jacrev` when f has more
        outputs than inputs.

    Example:
        >>> import torch
        >>> jacfwd(lambda x: x**2)(torch.tensor([1.0, 3.0]))
        tensor([[2., 0.],
                [0., 6.]])
    """

    @functools.wraps(f, updated=())
    def transformed(*args: Any, **kwargs: Any) -> Any:
        bound = bind("jacfwd", f, args, kwargs, argnums)
        seen: list[tuple[_Output, Tensors]] = []
        moved: list[bool] = []  # a leaf that f does not use has columns of zeros, and that is right while another is used

        def columns(touched: tuple[int, ...], *v: Tensor) -> Tensors:
            def of_touched(*tensors: Tensor) -> tuple[Tensors, Tensors]:
                output, outputs = _Output.of("jacfwd", bound.call(*_replaced(bound.x, touched, tensors)), has_aux)
                moved.extend(_moves(outputs))
                seen.append((output, ()))
                return outputs, output.kept

            _, tangents, kept = flat_jvp(of_touched, tuple(bound.x[leaf] for leaf in touched), v)
            seen[-1] = (seen[-1][0], kept)
            return tangents

        parts = []
        for pieces in _chunks(bound.space, chunk_size):
            basis = bound.space.one_hot(pieces)
            run = functools.partial(columns, tuple(basis))
            parts.append(flat_vmap(run, randomness=randomness)(*basis.values()))
        if not parts:  # x has no coordinates
            output, outputs = _Output.of("jacfwd", bound.call(*bound.x), has_aux)
            seen.append((output, output.kept))
            parts.append(tuple(t.new_zeros((0, *t.shape)) for t in outputs))
        elif not any(moved) and not _differentiates_inside(bound.call, bound.x):
            raise DependenceError(_independence("jacfwd"))
        output, kept = seen[-1]
        stacked = [torch.cat(column) for column in zip(*parts, strict=True)]  # (n, *out.shape) each
        jacobian = _jacobian(output.space, bound.space, [t.movedim(0, -1) for t in stacked])
        return (jacobian, output.aux_value(kept)) if has_aux else jacobian

    return transformed


def jacrev(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """The Jacobian of f by rows: f once, then one pullback for each coordinate of f(x), ``chunk_size`` at a time.

    Results are those of :func:`jacfwd`. Choose it when f has fewer outputs than inputs.

    Example:
        >>> import torch
        >>> jacrev(lambda x: {"sum": x.sum(), "count": 2})(torch.ones(3))
        {'sum': tensor([1., 1., 1.]), 'count': None}
    """

    @functools.wraps(f, updated=())
    def transformed(*args: Any, **kwargs: Any) -> Any:
        bound = bind("jacrev", f, args, kwargs, argnums)
        seen: list[_Output] = []

        def of_tensors(*tensors: Tensor) -> tuple[Tensors, Tensors]:
            output, outputs = _Output.of("jacrev", bound.call(*tensors), has_aux)
            _require_dependence("jacrev", outputs, bound.call, tensors)
            seen.append(output)
            return outputs, output.kept

        outputs, pullback, kept = flat_vjp(of_tensors, bound.x)
        output = seen[-1]

        def rows(touched: tuple[int, ...], *u: Tensor) -> Tensors:
            given = dict(zip(touched, u, strict=True))
            return pullback(tuple(given.get(o, torch.zeros_like(t)) for o, t in enumerate(outputs)))

        parts = []
        for pieces in _chunks(output.space, chunk_size):
            basis = output.space.one_hot(pieces)
            run = functools.partial(rows, tuple(basis))
            parts.append(flat_vmap(run, randomness=randomness)(*basis.values()))
        if not parts:  # f(x) has no coordinates
            parts.append(tuple(t.new_zeros((0, *t.shape)) for t in bound.x))
        by_leaf = [flat(torch.cat(row)) for row in zip(*parts, strict=True)]  # (m, size of leaf) each
        by_output = zip(*(leaf.split(output.space.sizes) for leaf in by_leaf), strict=True)
        stacked = [torch.cat(o, 1).unflatten(0, s or (1,)) for o, s in zip(by_output, output.space.shapes, strict=True)]
        stacked = [t if s else t.squeeze(0) for t, s in zip(stacked, output.space.shapes, strict=True)]
        jacobian = _jacobian(output.space, bound.space, stacked)
        return (jacobian, output.aux_value(kept)) if has_aux else jacobian

    return transformed


def _chunks(space: Space, chunk_size: int | None) -> Iterator[list[Any]]:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive int or None, got {chunk_size}.")
    step = space.dim if chunk_size is None else chunk_size
    for start in range(0, space.dim, max(step, 1)):
        yield space.pieces(range(start, min(start + step, space.dim)))


def _jacobian(rows: Space, columns: Space, stacked: Sequence[Tensor]) -> Tree:
    """The tree of trees of blocks from one tensor of shape ``out.shape + (n,)`` for each output leaf."""
    blocks = []
    for whole, shape in zip(stacked, rows.shapes, strict=True):
        parts = whole.split(columns.sizes, -1)
        like = zip(parts, columns.shapes, strict=True)
        blocks.append(columns.unpack(plain(part.reshape(shape + inner) for part, inner in like)))
    return rows.unpack(blocks)
