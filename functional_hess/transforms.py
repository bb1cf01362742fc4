"""The transforms of torch.func over trees.

Arguments and results are any tree of :mod:`functional_hess.tree`; leaves that are not floating tensors are carried along. Every
transform flattens at its door (:func:`bind`), hands a flat tuple of tensors to a level of differentiation
(:mod:`functional_hess.levels`, where they are made safe to nest), and unflattens inside f and on the way out.

Jacobians, which are transforms mapped over unit vectors, stand on the next floor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.guards import named_errors, value_and_gradient
from functional_hess.levels import (
    DependenceError,
    flat_double_backward,
    flat_jvp,
    flat_plain_value_and_grad,
    flat_value_and_grad,
    flat_vjp,
    flat_vmap,
    plain,
    repaired,
    require_dependence,
    require_every_leaf,
    require_movement,
)
from functional_hess.nesting import derived_from, eagerly, is_mapped_here, is_outermost, moves
from functional_hess.tree import Space, broadcast_prefix, tensors_of, written

__all__ = [
    "Bound",
    "DependenceError",
    "Output",
    "bind",
    "flat_double_backward",
    "flat_jvp",
    "flat_plain_value_and_grad",
    "flat_value_and_grad",
    "flat_vjp",
    "flat_vmap",
    "grad",
    "is_outermost",
    "jvp",
    "linearize",
    "plain",
    "repaired",
    "require_argnums",
    "value_and_grad",
    "vjp",
    "vmap",
]

Tree = Any
Tensors = tuple[Tensor, ...]


# ---------------------------------------------------------------------------------------------------- functions of trees


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
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{verb}: argnums must be different arguments, got {argnums}.")
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


def require_argnums(verb: str, argnums: Any) -> None:
    """Refuse ``argnums`` that are no ints, where a transform is made: the point of ``hessian(f, x)`` is no number."""
    chosen = (argnums,) if isinstance(argnums, int) else argnums
    if not (isinstance(chosen, (tuple, list)) and chosen and all(isinstance(i, int) for i in chosen)):
        raise TypeError(
            f"{verb}: argnums must be an int or a tuple of ints, got {_described(argnums)}. The point goes to what {verb} "
            f"returns, as in {verb}(f)(x)."
        )


def _argument(verb: str, i: int, count: int) -> int:
    if not -count <= i < count:
        raise ValueError(f"{verb}: argnums must be in range({count}), the positional arguments of the call, got {i}.")
    return i % count


def _nothing_to_differentiate(verb: str, tree: Tree, name: str) -> str:
    tensors, _ = tensors_of(tree)
    if tensors:
        kinds, cure = ", ".join(sorted({str(t.dtype) for t in tensors})), "Convert it, as in x.double()"
    elif isinstance(tree, torch.nn.Module):
        kinds, cure = type(tree).__name__, "Differentiate by the params of apply, params, buffers = functionalize_module(module)"
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


# ---------------------------------------------------------------------------------------------------- the transforms


def value_and_grad(
    f: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, *, strict: bool = False
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
    require_argnums("grad", argnums)

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        bound = bind("grad", f, args, kwargs, argnums)
        with named_errors("grad", "reverse"):
            scalar, every_leaf = bound.scalar(has_aux), bound.space if strict else None
            (value, aux), gradient = value_and_gradient(scalar, bound.x, "grad", strict=every_leaf)
        result = bound.space.unpack(plain(gradient))
        return ((value, aux), result) if has_aux else (value, result)

    return transformed


def grad(
    f: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, *, strict: bool = False
) -> Callable[..., Any]:
    """The gradient of a scalar function: x -> df/dx, a tree like x.

    Arguments, errors and cost are those of :func:`value_and_grad`; with ``has_aux`` the result is ``(gradient, aux)``.

    Example:
        >>> import torch
        >>> grad(grad(lambda x: x**3))(torch.tensor(2.0))
        tensor(12.)
    """
    both = value_and_grad(f, argnums, has_aux=has_aux, strict=strict)

    @derived_from(f)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return transformed


@dataclasses.dataclass
class Output:
    """What f returned, apart from its floating tensors: where they belong, what is carried, the auxiliary tree."""

    space: Space
    carried: Tensors
    aux: Tensors
    rebuild_aux: Callable[[Sequence[Any]], Tree]

    @staticmethod
    def of(verb: str, out: Any, has_aux: bool) -> tuple[Output, Tensors]:
        out, aux = _aux_split(verb, out, has_aux)
        space = Space.of(out, "f(x)")
        if not space.shapes:
            raise TypeError(f"{verb}: f must return at least one floating tensor, got {_described(out)}.")
        carried = tuple(leaf for leaf in space.carried if isinstance(leaf, Tensor))
        aux_tensors, rebuild = tensors_of(aux)
        return Output(space, carried, aux_tensors, rebuild), space.pack(out, "f(x)")

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
        Costs about two evaluations of f, and keeps no graph.

    Raises:
        ValueError: a tangent differs from its primal in structure, shape, dtype or device; the leaf is named.
        DependenceError: no output depends on the primals by differentiable operations.

    Example:
        >>> import torch
        >>> jvp(torch.sin, (torch.tensor(0.0),), (torch.tensor(2.0),))
        (tensor(0.), tensor(2.))
    """
    return _jvp(f, primals, tangents, has_aux, strict)


@eagerly
def _jvp(
    f: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], has_aux: bool, strict: bool
) -> tuple[Any, ...]:
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"jvp: {name} must be a tuple of arguments, got {type(given).__name__}. Write ({name[:-1]},).")
    bound = bind("jvp", f, tuple(primals), {}, tuple(range(len(primals))))
    v = bound.space.pack(tuple(tangents), "tangents")
    seen: list[Output] = []

    def of_tensors(*tensors: Tensor) -> tuple[Tensors, Tensors]:
        output, outputs = Output.of("jvp", bound.call(*tensors), has_aux)
        _require_tangents(output.space, outputs, bound.call, tensors, strict)
        seen.append(output)
        return outputs, output.kept

    with named_errors("jvp", "forward"):
        outputs, out_tangents, kept = flat_jvp(of_tensors, bound.x, v)
    out, out_tangent = seen[-1].value(outputs, kept), seen[-1].space.unpack(plain(out_tangents))
    return (out, out_tangent, seen[-1].aux_value(kept)) if has_aux else (out, out_tangent)


def _require_tangents(space: Space, outputs: Tensors, call: Callable[..., Any], tensors: Sequence[Tensor], strict: bool) -> None:
    moved = moves(outputs)
    if strict and not all(moved):
        where = space.name_of(moved.index(False), "f(x)")
        raise DependenceError(f"jvp: {where} does not depend on x (strict=True). Leave strict out if that is right.")
    require_movement("jvp", moved, call, tensors)


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


@eagerly
def _vjp(f: Callable[..., Any], primals: tuple[Any, ...], has_aux: bool, strict: bool, guard: bool) -> tuple[Any, ...]:
    bound = bind("vjp", f, primals, {}, tuple(range(len(primals))))
    seen: list[Output] = []

    def of_tensors(*tensors: Tensor) -> tuple[Tensors, Tensors]:
        output, outputs = Output.of("vjp", bound.call(*tensors), has_aux)
        if guard:
            require_dependence("vjp", outputs, bound.call, tensors)
        if strict:
            require_every_leaf("vjp", outputs, tensors, bound.space, "primals")
        seen.append(output)
        return outputs, output.kept

    with named_errors("vjp", "reverse"):
        outputs, pull, kept = flat_vjp(of_tensors, bound.x)
    output = seen[-1]

    @eagerly
    def pullback(cotangents: Tree) -> tuple[Any, ...]:
        return bound.space.unpack(plain(pull(output.space.pack(cotangents, "cotangent"))))

    out = output.value(outputs, kept)
    return (out, pullback, output.aux_value(kept)) if has_aux else (out, pullback)


def linearize(f: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """f at ``primals`` and its derivative there as a linear function of tangents.

    The transpose of a kept pullback: v -> J v is the derivative of u -> J^T u, transposed. Each call is one backward pass
    through the graph of the pullback; f itself ran once. Unlike ``torch.func.linearize`` it composes with every transform.

    Returns:
        ``(out, pushforward)``; ``pushforward(*tangents)`` is a tree like ``out``, ``None`` in the place of carried leaves. The
        graph of the pullback is kept as long as the pushforward lives.

    Raises:
        ValueError: a tangent differs from its primal in structure, shape, dtype or device; the leaf is named.
        DependenceError: no output depends on the primals by differentiable operations.

    Example:
        >>> import torch
        >>> out, pushforward = linearize(lambda x: x["a"] * x["b"], {"a": torch.tensor(2.0), "b": torch.tensor(5.0)})
        >>> pushforward({"a": torch.tensor(1.0), "b": torch.tensor(10.0)})
        tensor(25.)
    """
    return _linearize(f, primals)


@eagerly
def _linearize(f: Callable[..., Any], primals: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
    out, pullback = vjp(f, *primals)
    space, x_space = Space.of(out, "f(x)"), Space.of(primals, "primals")
    zero = space.unpack([torch.zeros_like(t) for t in space.pack(out, "f(x)")])
    _, transpose = _vjp(pullback, (zero,), has_aux=False, strict=False, guard=False)

    @eagerly
    def pushforward(*tangents: Any) -> Any:
        x_space.pack(tangents, "tangents")
        return transpose(tangents)[0]

    return out, pushforward


def vmap(
    f: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: str = "error",
    *,
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

    Returns:
        a function whose results have one dimension more, at ``out_dims``. Costs one evaluation of f on batches, ``chunk_size``
        at a time, and their memory.

    Raises:
        MissingDerivativeError: an op of f cannot run on batches, or lacks a derivative that f takes.
        ValueError: ``in_dims`` or ``out_dims`` do not fit the arguments or the results, or mapped sizes differ; by path.

    Example:
        >>> import torch
        >>> vmap(grad(lambda w, x: (w * x) ** 2), (None, 0))(torch.tensor(3.0), torch.tensor([1.0, 2.0]))
        tensor([ 6., 24.])
    """

    @derived_from(f)
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
            _require_unmapped(out, whole)
            return tuple(t for i, t in enumerate(results) if i not in whole)

        with named_errors("vmap", "batched"):
            mapped = flat_vmap(of_tensors, in_dims=dims, randomness=randomness, chunk_size=chunk_size)(*tensors)
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
        if not isinstance(dim, int) or not -leaf.dim() <= dim < leaf.dim():
            where = written(args, "args")[i]
            raise ValueError(f"vmap: in_dims must be a dimension of {where}, of shape {tuple(leaf.shape)}, got {dim!r}.")
        sizes[i] = leaf.shape[dim]
    if not sizes:
        raise ValueError("vmap: in_dims must map at least one tensor; all are None, or no argument holds a tensor.")
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{written(args, 'args')[i]} has {size}" for i, size in sizes.items())
        raise ValueError(f"vmap: the mapped dimensions must have one size: {told}.")
    return tuple(dims)


def _out_dims(out_dims: Any, out: Tree) -> list[int | None]:
    """The place of the mapped dimension for each tensor of ``out``."""
    if isinstance(out, Tensor) and isinstance(out_dims, (tuple, list)) and len(out_dims) == 1:
        (out_dims,) = out_dims  # as torch.func takes it
    leaves = broadcast_prefix(out, out, "f(x)")
    spread = [out_dims] * len(leaves) if isinstance(out_dims, int) else broadcast_prefix(out_dims, out, "out_dims")
    return [d for d, leaf in zip(spread, leaves, strict=True) if isinstance(leaf, Tensor)]


def _require_unmapped(out: Tree, whole: Mapping[int, Tensor]) -> None:
    """None of the tensors of ``out`` that are to have no mapped dimension, here by their number, has one."""
    names = [
        name
        for name, leaf in zip(written(out, "f(x)"), broadcast_prefix(out, out, "f(x)"), strict=True)
        if isinstance(leaf, Tensor)
    ]
    for i, t in whole.items():
        if is_mapped_here(t):
            raise ValueError(
                f"vmap: out_dims must be a place for {names[i]}, which depends on the mapped dimension, got None. Give it, as "
                "in 0."
            )
