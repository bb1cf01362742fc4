"""One level of differentiation over flat tuples of tensors, made safe to nest.

What this floor adds to torch.func:

* **Repairs.** One ``TorchFunctionMode`` is active inside every transform. When two or more levels of differentiation meet at an
  op whose second derivative torch has wrong or lacks, the op is swapped for a composition that differentiates well
  (:mod:`functional_hess.repairs`). A first-order gradient keeps the fused op. The levels counted are those of torch.func,
  whoever opened them, and plain autograd where an argument requires grad.
* **No silent zero.** A function whose value does not depend on its argument by differentiable operations is an error, unless
  derivatives were taken inside it (the second derivative of a linear function is zero, and right).
* **Threads.** Forward mode is process-wide in torch: one re-entrant lock is held around forward-mode regions.
* **Plain autograd.** Double backward without torch.func, for functions that no level of it can enter.
* **Plain results.** At the outermost level derivatives are contiguous tensors that share no storage by expansion.

This is the only module that differentiates by torch.func or torch.autograd. It knows nothing of trees: the floor above has them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from functional_hess.nesting import (
    derivative_levels,
    innermost,
    is_mapped,
    is_outermost,
    is_tracked,
    moves,
    requires_grad_outside,
)
from functional_hess.repairs import FIRST_ORDER_REPAIRS, MAPPED_REPAIRS, REPAIRS, WRITTEN
from functional_hess.tree import Space, tensors_of

__all__ = [
    "DependenceError",
    "Generators",
    "constant_where_unused",
    "flat_double_backward",
    "flat_jvp",
    "flat_plain_value_and_grad",
    "flat_remat",
    "flat_value_and_grad",
    "flat_vjp",
    "flat_vmap",
    "generators_in_use",
    "plain",
    "reached_variables",
    "repaired",
    "replaced",
    "require_dependence",
    "require_every_leaf",
    "require_movement",
]

Tensors = tuple[Tensor, ...]
Generators = weakref.WeakKeyDictionary[torch.Generator, Tensor]
FORWARD_MODE_TIMEOUT = 300.0  # seconds


class DependenceError(ValueError):
    """The value of a function does not depend on its argument through differentiable operations."""


# ---------------------------------------------------------------------------------------------------- nesting and repairs


class _Repairs(TorchFunctionMode):
    """Swaps the ops of the table while derivatives nest, and remembers which it swapped, and which generators were drawn from."""

    def __init__(self, always: bool, generators: Generators) -> None:
        super().__init__()
        self.always = always
        self.used: set[str] = set()
        self.generators = generators

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if (generator := kwargs.get("generator")) is not None:
            self.generators.setdefault(generator, generator.get_state())
        if func in WRITTEN:
            WRITTEN[func](*args, **kwargs)
        composition = REPAIRS.get(func)
        if composition is None or not self._needed(func, args, kwargs):
            return func(*args, **kwargs)
        self.used.add(getattr(func, "__name__", str(func)))
        return composition(*args, **kwargs)

    def _needed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Levels nest; or one level is forward mode, which lacks first derivatives of such ops too."""
        levels = derivative_levels()
        if self.always or len(levels) >= 2 or "forward" in levels:
            return True
        if not levels:
            return False
        mapped = func in MAPPED_REPAIRS and is_mapped()
        return mapped or func in FIRST_ORDER_REPAIRS or requires_grad_outside((*args, *kwargs.values()))


@contextlib.contextmanager
def repaired(*, always: bool = False, fresh: bool = False) -> Iterator[set[str]]:
    """Ops with wrong or missing second derivatives are swapped inside, once derivatives nest.

    Args:
        always: swap at every depth (for plain double backward, whose levels can't be counted).
        fresh: start a new record of swapped ops even where the mode is active already.

    Yields:
        the names of the ops swapped so far.
    """
    active = _active_repairs()
    if active and not fresh and (active.always or not always):
        yield active.used
        return
    with _Repairs(always, active.generators if active else weakref.WeakKeyDictionary()) as mode:
        yield mode.used


def _active_repairs() -> _Repairs | None:
    """The innermost mode, or one that swaps at every depth."""
    active = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Repairs)]
    return next((mode for mode in active if mode.always), active[-1] if active else None)


def generators_in_use() -> Generators:
    """The generators that ops inside :func:`repaired` were given, with the states they had when they were met first."""
    active = _active_repairs()
    return active.generators if active else weakref.WeakKeyDictionary()


class _ForwardModeLock:
    """One re-entrant lock around forward-mode regions; a forked child gets a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def renew(self) -> None:
        """In a forked child the thread that held the lock is gone, unless f forked, and the child goes on within it."""
        if not self._lock._is_owned():  # type: ignore[attr-defined]
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


# ---------------------------------------------------------------------------------------------------- dependence


class _DepthWatch(TorchFunctionMode):
    """Notices a level of differentiation beyond those that were active when it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.deeper = len(derivative_levels()), False

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.deeper = self.deeper or len(derivative_levels()) > self.start
        return func(*args, **(kwargs or {}))


def _differentiates_inside(call: Callable[..., Any], tensors: Sequence[Tensor]) -> bool:
    with _DepthWatch() as watch:
        call(*tensors)
    return watch.deeper


def require_dependence(verb: str, outputs: Sequence[Tensor], call: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """Some output depends on the variables of the current reverse level, or derivatives are taken inside ``call``."""
    require_movement(verb, list(map(is_tracked, outputs)), call, tensors)


def require_movement(verb: str, moved: Iterable[bool], call: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    """The same where it is known already which outputs depend on the variables."""
    if not any(moved) and not _differentiates_inside(call, tensors):
        raise DependenceError(_independence(verb))


def _depends_on_any(f: Callable[..., tuple[Tensor, Any]], x: Tensors) -> bool:
    """Whether the value depends on some leaf; asked where it does not depend on those of the moment, so that zero is right."""
    answer: list[bool] = []

    def of_all(*tensors: Tensor) -> Tensor:
        value = f(*tensors)[0]
        answer.append(is_tracked(value))
        return value

    torch.func.vjp(of_all, *x)
    return answer[-1]


def _independence(verb: str) -> str:
    return (
        f"{verb}: f(x) does not depend on x through differentiable operations, so its derivative would silently be zero. "
        "Look for .detach(), .item(), torch.tensor(...), .data, no_grad, rounding, argmax, comparisons or an op without a "
        "derivative between x and the result."
    )


def _graph(outputs: Sequence[Tensor], until: Collection[int] = ()) -> set[Any]:
    """The nodes of the graph of the current level behind ``outputs``.

    Behind an operation on one of the variables whose ids are in ``until`` only these are looked at.
    """
    reached, stack = set(), [t.grad_fn for t in outputs if t.requires_grad]
    while stack:
        node = stack.pop()
        if node is not None and node not in reached:
            reached.add(node)
            parents = [parent for parent, _ in node.next_functions]
            ends = [parent for parent in parents if until and id(getattr(parent, "variable", None)) in until]
            stack.extend(ends or parents)
    return reached


def _require_twice_differentiable(values: Sequence[Tensor]) -> None:
    """A backward marked ``once_differentiable`` breaks the graph of the gradient without a word, if the cotangent needs none."""
    for node in _graph(values):
        for cls in _written_by_user(getattr(node, "_forward_cls", None)):
            code = getattr(getattr(cls, "backward", None), "__code__", None)
            if code is not None and code.co_filename == torch.autograd.function.__file__ and code.co_name == "wrapper":
                raise NotImplementedError(f"the backward of {getattr(cls, '__name__', cls)} is marked once_differentiable")


def _written_by_user(function: Any) -> set[Any]:
    """A custom function and those that it stands for: torch.func wraps one around it for every transform."""
    found, stack = set(), [function]
    while stack:
        cls = stack.pop()
        if cls not in found:
            found.add(cls)
            cells = getattr(getattr(cls, "backward", None), "__closure__", None) or ()
            stack.extend(cell.cell_contents for cell in cells if isinstance(cell.cell_contents, type))
    return found


def require_every_leaf(verb: str, outputs: Sequence[Tensor], tensors: Sequence[Tensor], space: Space, name: str = "x") -> None:
    """strict=True: every leaf is reached from the outputs in the graph of the current level."""
    reached = _graph(outputs)
    for leaf, t in enumerate(tensors):
        if torch.autograd.graph.get_gradient_edge(t).node not in reached:
            where = space.name_of(leaf, name)
            raise DependenceError(
                f"{verb}: f does not depend on {where} (strict=True); its derivative is zero. Leave strict out if that is right."
            )


# ---------------------------------------------------------------------------------------------------- one level


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
    rebuild: list[Callable[..., Any]] = []

    def of_variables(*variables: Tensor) -> tuple[Tensor, Tensors]:
        value, aux = f(*replaced(x, wrt, variables))
        if not is_tracked(value) and not (len(variables) < len(x) and _depends_on_any(f, x)):
            require_dependence(verb, [value], lambda *v: f(*replaced(x, wrt, v)), variables)
        if strict is not None:
            require_every_leaf(verb, [value], variables, strict)
        if twice:
            _require_twice_differentiable([value])
        kept, back = tensors_of(aux)
        rebuild.append(back)
        return value, kept

    with repaired():
        argnums = tuple(range(len(variables)))
        gradient, (value, kept) = torch.func.grad_and_value(of_variables, argnums, has_aux=True)(*variables)
    return (value, rebuild[-1](kept)), gradient


def replaced(x: Tensors, where: Sequence[int], values: Sequence[Tensor]) -> list[Tensor]:
    """``x`` with other tensors at the leaves ``where``."""
    filled = list(x)
    for i, value in zip(where, values, strict=True):
        filled[i] = value
    return filled


def flat_jvp(f: Callable[..., tuple[Tensors, Tensors]], x: Tensors, v: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """``(outputs, tangents, aux)`` of ``f(*x) -> (outputs, aux)`` along ``v``."""
    with repaired(), _FORWARD_MODE:
        _load_forward_rules()
        x = tuple(map(_without_overlap, x))
        outputs, tangents, aux = cast(tuple[Tensors, Tensors, Tensors], torch.func.jvp(f, x, v, has_aux=True))
    # a mixed-dtype formula may promote a tangent beyond its primal
    return outputs, tuple(t.to(y.dtype) for y, t in zip(outputs, tangents, strict=True)), aux


def _without_overlap(t: Tensor) -> Tensor:
    """The same numbers, each in a place of its own.

    torch lays a tangent out like its primal. Where entries of the primal share memory, as those of ``expand`` and ``unfold`` do,
    so would those of the tangent: it refuses the one and writes them over each other in the other.
    """
    reach = 0  # the farthest that steps along the dimensions so far lead
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return t.contiguous()
        reach += (size - 1) * stride
    return t


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


def flat_vmap(
    f: Callable[..., Tensors],
    *,
    in_dims: int | tuple[int | None, ...] = 0,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., Tensors]:
    """``f`` of flat tensors, batched over a dimension of the arguments and the first of every result."""
    batched = torch.func.vmap(f, in_dims=in_dims, randomness=randomness, chunk_size=chunk_size)

    def mapped(*tensors: Tensor) -> Tensors:
        with repaired():
            results = batched(*tensors)
        dims = (in_dims,) * len(tensors) if isinstance(in_dims, int) else in_dims
        _require_one_each(results, next(t.shape[d] for t, d in zip(tensors, dims, strict=True) if d is not None))
        return results

    return mapped


def _require_one_each(results: Iterable[Tensor], n: int) -> None:
    """As many results as arguments: torch does not look, and a batching rule that is wrong may give another number of them."""
    for result in results:
        if result.shape[0] != n:
            raise NotImplementedError(f"a batching rule gave {result.shape[0]} results for {n} arguments")


# ---------------------------------------------------------------------------------------------------- plain autograd


def flat_plain_value_and_grad(
    f: Callable[..., tuple[Tensor, Any]],
    x: Tensors,
    wrt: Sequence[int] | None = None,
    *,
    verb: str,
    strict: Space | None = None,
) -> tuple[tuple[Tensor, Any], Tensors]:
    """``((value, aux), gradient)`` by plain autograd, for functions that no functorch level can enter."""
    grad_mode = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        alias = _variables(x, grad_mode)
        with _Recomputation() as recomputation:
            value, aux = f(*alias)
        _require_watched(value, verb)
        if strict is not None:
            require_every_leaf(verb, [value], alias, strict)
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
        _require_twice_differentiable([value])
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
                        "has put the module's own back); use functionalize_module instead"
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


# ---------------------------------------------------------------------------------------------------- computing again


def flat_remat(f: Callable[..., Tensors], parts: Callable[[], Iterable[Any]] = lambda: ((),)) -> Callable[..., Tensors]:
    """``x -> sum of f(part, *x) over parts()``, whose derivatives compute each part again instead of keeping its graph.

    Between a pass and its derivative only x is held, at every order, because derivatives are sums of the same kind: the pullback
    is the sum of (x, u) -> f'(part, x)^T u, the pushforward that of (x, v) -> f'(part, x) v. torch's own checkpointing is refused
    under its function transforms; this nests under all of them. Each level of differentiation costs one evaluation more.

    Args:
        f: takes a part and tensors of any dtype, returns floating tensors. Whatever it closes over is a constant.
        parts: gives the same parts whenever it is called; they are constants, and not kept.
    """

    class Sum(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*x: Tensor) -> Tensors:  # pyright: ignore[reportIncompatibleMethodOverride]
            with repaired():
                return _sum(f(part, *x) for part in parts())

        @staticmethod
        def setup_context(ctx: Any, inputs: Tensors, output: Tensors) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *u: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

            def pull(part: Any, *xu: Tensor) -> Tensors:
                x = xu[: -len(u)]

                def of_wanted(*y: Tensor) -> Tensors:
                    outputs = f(part, *replaced(x, wanted, y))
                    if len(derivative_levels()) > 1:
                        _require_twice_differentiable(outputs)
                    return outputs

                return cast(Tensors, torch.func.vjp(of_wanted, *(x[i] for i in wanted))[1](xu[-len(u) :]))

            found = dict(zip(wanted, flat_remat(pull, parts)(*ctx.saved_tensors, *u), strict=True))
            return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))

        @staticmethod
        def jvp(ctx: Any, *v: Tensor | None) -> Tensors:  # pyright: ignore[reportIncompatibleMethodOverride]
            moved = {i: tangent for i, tangent in enumerate(v) if tangent is not None}

            def push(part: Any, *xv: Tensor) -> Tensors:
                x, point = xv[: len(v)], tuple(xv[i] for i in moved)
                return torch.func.jvp(lambda *y: f(part, *replaced(x, tuple(moved), y)), point, xv[len(v) :])[1]

            return flat_remat(push, parts)(*ctx.saved_tensors, *moved.values())

    return cast(Callable[..., Tensors], Sum.apply)


def _sum(terms: Iterable[Tensors]) -> Tensors:
    return functools.reduce(lambda a, b: tuple(s + t for s, t in zip(a, b, strict=True)), terms)


def constant_where_unused(outputs: Sequence[Tensor], x: Tensors) -> Tensors:
    """``x``, with those tensors on which no output depends at the current level made constants of that level."""
    level = innermost()
    if level == "forward":
        return x if any(moves(tuple(outputs))) else tuple(forward_ad.unpack_dual(t).primal for t in x)
    variable = [t.requires_grad and (not level or is_tracked(t)) for t in x]
    reached = _graph(outputs) if any(variable) else set()
    edge = torch.autograd.graph.get_gradient_edge
    return tuple(t.detach() if v and edge(t).node not in reached else t for v, t in zip(variable, x, strict=True))


def reached_variables(outputs: Sequence[Tensor], until: Collection[int] = ()) -> set[int]:
    """The ids of the tensors in which the graph behind ``outputs`` ends: leaves of plain autograd.

    ``until`` holds ids of such tensors that bar the way: what an operation has beside one of them is not looked at.
    """
    return {id(node.variable) for node in _graph(outputs, until) if hasattr(node, "variable")} | {
        id(t) for t in outputs if t.requires_grad and t.grad_fn is None
    }
