"""A transformed function traced once and called again: its arithmetic without its interpreter.

A Hessian of a small problem costs more in opening levels of differentiation than in arithmetic. :func:`prepare` runs the
function once on example arguments, writes down the operations that reach the result (``make_fx``), drops what does not, computes
what depends on no argument once, and gives back a callable that repeats the rest on new values:

    prepare(F, *example)(*args) = F(*args)        for args of the example's structure, shapes, dtypes and devices

What is not an argument is as it was at the example: tensors that F closes over (listed when the result is printed; their numbers
may change in place, another tensor in their name is not seen), the mode of a module, sizes of chunks, the branch taken on a
Python value. A branch on the value of an argument cannot be written down and is an error, as are random numbers.

A prepared function is the end of the line: it cannot be differentiated or mapped. Prepare the derivative, not the function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from functional_hess.captures import held_by
from functional_hess.levels import is_outermost, repaired
from functional_hess.overwriting import overwrite
from functional_hess.tree import signature, signature_differences, tensors_of

__all__ = ["BACKENDS", "PrepareError", "Prepared", "prepare"]

BACKENDS = ("graph", "inductor")
TRIFLE = 16 * 2**20  # bytes of all results together that are held while a graph is looked at
KEPT = 64 * 2**20  # bytes of results that depend on no argument, kept from call to call
KEPT_AS = "_kept"  # the start of their names
AGREEMENT = 1024  # times eps, relative to the largest entry


class PrepareError(RuntimeError):
    """The function cannot be written down once and for all."""


@dataclasses.dataclass(frozen=True, repr=False)
class Prepared:
    """What :func:`prepare` returns. Call it like the function it was made from; print it to see what it holds.

    ``captured`` describes the tensors that it uses and that are no arguments, ``operations`` counts what a call does.
    """

    name: str
    backend: str
    operations: int
    captured: tuple[str, ...]
    arguments: tuple[Any, tuple[Any, ...]]
    _strides: tuple[tuple[int, ...], ...]
    _run: Callable[..., Sequence[Tensor]]
    _rebuild: Callable[[Sequence[Tensor]], Any]

    def repeated(self, tensors: Sequence[Tensor]) -> Any:
        """The value at arguments whose tensors are these, in order: for a caller who knows that they are as in the example."""
        with torch.no_grad():
            return self._rebuild(self._run(*map(_restrided, tensors, self._strides)))

    def __call__(self, *args: Any) -> Any:
        """The value at ``args``.

        Raises:
            ValueError: the arguments differ from the example in structure, shape, dtype, device or a value that is no tensor.
            PrepareError: called inside another transform, or with a tensor that requires grad.
        """
        differences = signature_differences(self.arguments, args, "args")
        if differences:
            told = "; ".join(differences)
            raise ValueError(f"{self.name}: prepared for other arguments: {told}. Call prepare again for these.")
        tensors, _ = tensors_of(args)
        self._require_end_of_the_line(tensors)
        return self.repeated(tensors)

    def _require_end_of_the_line(self, tensors: Sequence[Tensor]) -> None:
        if not is_outermost():
            raise PrepareError(f"{self.name}: a prepared function cannot run inside another transform; prepare the whole of it.")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise PrepareError(
                f"{self.name}: a prepared function carries no graph, but an argument requires grad. Pass it detached, call under "
                "torch.no_grad(), or prepare the derivative that is wanted."
            )

    def __repr__(self) -> str:
        lines = [f"{self.name}, prepared: {self.operations} operations ({self.backend})"]
        lines += [f"  captured {what}" for what in self.captured]
        return "\n".join(lines)


def prepare(
    transformed: Callable[..., Any], *example_args: Any, backend: str = "graph", constants: Sequence[Tensor] = ()
) -> Prepared:
    """Trace ``transformed(*example_args)`` once, for many calls with other numbers.

    Args:
        transformed: any function of trees of tensors: ``hessian(f)``, ``vmap(hessian(f))``, ``lambda x, v: hvp(f, x, v)``. It is
            evaluated twice, eagerly and while it is traced.
        example_args: arguments of the structure, shapes, dtypes and devices of those to come; what is no tensor is fixed.
        backend: ``"graph"`` repeats the operations one by one; ``"inductor"`` compiles them as well (needs a C++ compiler, takes
            seconds to minutes, and pays for functions of many small operations).
        constants: tensors that ``transformed`` closes over and that are never written to: what depends on them alone is computed
            once, and they are not listed among the captured.

    Returns:
        a :class:`Prepared`. A call costs the operations alone: no level of differentiation is opened, no memory predicted. Chunks
        are those of the example: a matrix that needed chunks there is still computed by chunks. The Hessian, blocks and diagonal
        of an empirical risk, ``hessian(risk)``, are lifted where the example's are; what a call proves of its own numbers is no
        basis for others, so any other function goes by rows. Results carry no graph.

    Raises:
        PrepareError: f branches on a value or draws random numbers; or the traced result differs from the eager one.

    Example:
        f(x) = sum x^3 has the Hessian 6 diag(x):

        >>> import torch
        >>> from functional_hess import hessian
        >>> H = prepare(hessian(lambda x: (x**3).sum()), torch.zeros(2))
        >>> H(torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    name = f"prepare({getattr(transformed, '__name__', type(transformed).__name__)})"
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")
    if not is_outermost():
        raise PrepareError(f"{name}: cannot be prepared inside another transform; prepare the whole of it.")
    tensors, fill = tensors_of(example_args)
    tensors = tuple(t.detach() for t in tensors)
    own = {t.untyped_storage()._cdata for t in constants}
    with torch.no_grad():
        expected = transformed(*fill(tensors))
        traced = _traced(name, transformed, tensors, fill)
        graph = _simplified(name, traced.graph, tensors, own)
        run = _compiled(graph, tensors) if backend == "inductor" else _overwriting(graph, tensors).forward
        _require_agreement(name, tensors_of(expected)[0], run(*tensors))
    return Prepared(
        name=name,
        backend=backend,
        operations=sum(node.op == "call_function" for node in graph.graph.nodes),
        captured=tuple(_described(transformed, [t for t in traced.captured if t.untyped_storage()._cdata not in own])),
        arguments=signature(example_args),
        _strides=tuple(t.stride() for t in tensors),
        _run=run,
        _rebuild=traced.rebuild,
    )


def _restrided(t: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``t`` laid out as the example was, since views of it were written down as such."""
    return t if t.stride() == stride else torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)


# ---------------------------------------------------------------------------------------------------- writing down


@dataclasses.dataclass(frozen=True)
class _Trace:
    graph: fx.GraphModule
    captured: tuple[Tensor, ...]
    rebuild: Callable[[Sequence[Tensor]], Any]


def _traced(name: str, transformed: Callable[..., Any], tensors: Sequence[Tensor], fill: Callable[..., Any]) -> _Trace:
    rebuilds: list[Callable[[Sequence[Tensor]], Any]] = []

    def flat(*inner: Tensor) -> tuple[Tensor, ...]:
        out, rebuild = tensors_of(transformed(*fill(inner)))
        rebuilds.append(rebuild)
        return out

    try:
        with repaired():  # a mean squared error in forward mode would end the process here
            graph = make_fx(flat, tracing_mode="real")(*tensors)
    except Exception as error:
        if "value out of a tracing tensor" in str(error) or "data-dependent" in str(error).lower():
            raise PrepareError(
                f"{name}: the function looks at the value of an argument (if, float(), .item()), so it takes another course for "
                "other values and cannot be written down. Use torch.where, or call it unprepared."
            ) from error
        raise
    random = [node for node in graph.graph.nodes if _tagged(node, torch.Tag.nondeterministic_seeded)]
    if random:
        raise PrepareError(
            f"{name}: the function draws random numbers ({random[0].target}), which would differ from call to call. Pass them as "
            "an argument."
        )
    graph.graph.eliminate_dead_code()
    attributes = dict.fromkeys(node.target for node in graph.graph.nodes if node.op == "get_attr")
    return _Trace(graph, tuple(getattr(graph, attribute) for attribute in attributes), rebuilds[-1])


def _tagged(node: fx.Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and tag in node.target.tags


def _described(transformed: Callable[..., Any], captured: Sequence[Tensor]) -> Iterator[str]:
    names = {t.untyped_storage().data_ptr(): held.name for held in held_by(transformed) for t in held.tensors()}
    for t in captured:
        name = names.get(t.untyped_storage().data_ptr(), "a tensor")
        yield f"{name} of shape {tuple(t.shape)}, {t.dtype}, {t.device}"


# ---------------------------------------------------------------------------------------------------- less to do


class _Storages(fx.Interpreter):
    """Runs a graph once and notes the value of every node, to tell which of them share storage.

    It runs on fake tensors, which take no memory; on real ones where that is a trifle, or an op takes no others.
    """

    def __init__(self, graph: fx.GraphModule, fake: FakeTensorMode | None) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.fake = fake
        self.reals: dict[fx.Node, Any] = {}

    @staticmethod
    def of(graph: fx.GraphModule, tensors: Sequence[Tensor]) -> _Storages:
        made = (node.meta.get("val") for node in graph.graph.nodes)
        if sum(t.numel() * t.element_size() for t in made if isinstance(t, Tensor)) > TRIFLE:
            # whatever an op says that knows no fake tensors: it runs on real ones
            with contextlib.suppress(Exception), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
                run = _Storages(graph, mode)
                run.run(*map(mode.from_tensor, tensors), enable_io_processing=False)
                return run
        run = _Storages(graph, None)
        with torch.no_grad():
            run.run(*(t.clone() for t in tensors), enable_io_processing=False)
        return run

    def get_attr(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.fake.from_tensor(value) if self.fake and isinstance(value, Tensor) else value

    def real(self, node: fx.Node) -> Any:
        """The value of a constant node."""
        if self.fake is None:
            return self.env[node]
        if node not in self.reals:
            like = self.env[node]
            if node.op == "get_attr":
                self.reals[node] = super().get_attr(str(node.target), (), {})
            elif node.target in _OF_A_SHAPE or _is_power(node, 0):
                fill = 1 if node.target not in _ZEROS else 0
                self.reals[node] = torch.full(like.shape, fill, dtype=like.dtype, device=like.device)
            else:
                args, kwargs = (fx.map_arg(given, self.real) for given in (node.args, node.kwargs))
                with torch.no_grad():
                    self.reals[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.reals[node]

    def storage_of(self, node: Any) -> int | None:
        value = self.env.get(node)
        return value.untyped_storage()._cdata if isinstance(value, Tensor) else None

    def storages_of(self, node: Any) -> set[int]:
        return {t.untyped_storage()._cdata for t in tensors_of(self.env.get(node))[0]}


def _simplified(name: str, graph: fx.GraphModule, tensors: Sequence[Tensor], constants: set[int]) -> fx.GraphModule:
    """Equal operations become one, and what depends on no argument is computed here; nothing that is written to is touched."""
    run = _Storages.of(graph, tensors)
    touched = {run.storage_of(node) for write in graph.graph.nodes for node in _written(write)}
    outside = [node for node in graph.graph.nodes if node.op in ("placeholder", "get_attr") and run.storage_of(node) in touched]
    if outside:
        raise PrepareError(
            f"{name}: the function writes in place to {_role(outside[0])}, so that each call would meet another one. Let it "
            "return what it changes (functionalize_module does so for buffers)."
        )
    free = [node for node in graph.graph.nodes if _is_pure(node) and run.storage_of(node) not in {*touched, None}]
    _drop_detach(free)
    _join_equal(free)
    attributes = [node for node in graph.graph.nodes if node.op == "get_attr"]
    known = {node for node in attributes if run.real(node).untyped_storage()._cdata in constants}
    _find_constants(graph.graph, known, run, touched)
    _drop_ones(graph, free, known, run, touched)
    _keep_constants(graph, known, run)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph


def _role(node: fx.Node) -> str:
    return "an argument" if node.op == "placeholder" else "a tensor that it closes over"


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose numbers an operation changes in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
            yield from (v for v in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(v, fx.Node))


def _is_pure(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable


def _drop_detach(nodes: Sequence[fx.Node]) -> None:
    for node in nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.all_input_nodes[0])


def _join_equal(nodes: Sequence[fx.Node]) -> None:
    known: dict[Any, fx.Node] = {}
    for node in nodes:
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(value[key])) for key in sorted(value))
    return (type(value), value)  # 1, 1.0 and True are three things


_EMPTY = frozenset({torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default})
_OF_A_SHAPE = frozenset({torch.ops.aten.ones_like.default, torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default})
_ZEROS = frozenset({torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default})
_POWER = torch.ops.aten.pow.Tensor_Scalar
_PRODUCTS = frozenset({torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar})


def _is_power(node: fx.Node, exponent: int) -> bool:
    return node.target is _POWER and bool(node.args[1] == exponent)


def _find_constants(graph: fx.Graph, known: set[fx.Node], run: _Storages, touched: set[Any]) -> None:
    """Results that are the same for all arguments, into ``known``, which has the tensors that never change."""
    for node in graph.nodes:
        if not (_is_pure(node) or node.target is operator.getitem) or not touched.isdisjoint(run.storages_of(node)):
            continue
        of_a_shape = node.target in _OF_A_SHAPE or _is_power(node, 0)  # NaN to the 0 is 1 too
        if of_a_shape or (node.target not in _EMPTY and all(parent in known for parent in node.all_input_nodes)):
            known.add(node)


def _drop_ones(graph: fx.GraphModule, free: Sequence[fx.Node], known: set[fx.Node], run: _Storages, touched: set[Any]) -> None:
    """y^1 and products of y with ones are y, to the bit; derivatives of powers are full of both."""
    kept = {run.storage_of(node) for node in _results(graph.graph)} | touched  # a result must have memory of its own
    for node in free:
        if _is_power(node, 1):
            candidates: list[Any] = [node.args[0]]
        elif node.target in _PRODUCTS:
            a, b = node.args
            candidates = [y for y, one in ((a, b), (b, a)) if isinstance(y, fx.Node) and _is_one(one, known, run)]
        else:
            continue
        for y in candidates:
            was, is_now = run.env[node], run.env[y]
            alike = was.shape == is_now.shape and was.dtype == is_now.dtype and was.stride() == is_now.stride()
            if alike and run.storage_of(node) not in kept and run.storage_of(y) not in touched:
                node.replace_all_uses_with(y)
                break


def _is_one(factor: Any, known: set[fx.Node], run: _Storages) -> bool:
    if isinstance(factor, fx.Node):
        return factor in known and bool((run.real(factor) == 1).all())
    return factor == 1


def _keep_constants(graph: fx.GraphModule, known: set[fx.Node], run: _Storages) -> None:
    """Constant results become attributes, up to ``KEPT`` bytes."""
    shown = {run.storage_of(node) for node in _results(graph.graph)}
    room, values = KEPT, {}
    for node in [node for node in graph.graph.nodes if node in known and any(user not in known for user in node.users)]:
        value = run.env[node]
        if not isinstance(value, Tensor) or node.op == "get_attr" or run.storage_of(node) in shown:
            continue
        if value.numel() * value.element_size() <= room:
            room -= value.numel() * value.element_size()
            values[node] = run.real(node).contiguous()
    for number, (node, value) in enumerate(values.items()):
        graph.register_buffer(f"{KEPT_AS}{number}", value, persistent=False)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"{KEPT_AS}{number}"))


def _results(graph: fx.Graph) -> Sequence[fx.Node]:
    return next(iter(graph.find_nodes(op="output"))).all_input_nodes


# ---------------------------------------------------------------------------------------------------- running


def _overwriting(graph: fx.GraphModule, tensors: Sequence[Tensor]) -> fx.GraphModule:
    overwrite(graph.graph, _Storages.of(graph, tensors).env)
    graph.graph.lint()
    graph.recompile()
    return graph


def _compiled(graph: fx.GraphModule, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    _write_out_equal_numbers(graph)
    run = torch.compile(graph.forward, backend="inductor", fullgraph=True, dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own: they concern no user
        run(*tensors)
    return run


def _write_out_equal_numbers(graph: fx.GraphModule) -> None:
    """A kept tensor of equal numbers is one number for the compiler, which need not be read."""
    for node in graph.graph.find_nodes(op="get_attr"):
        kept = getattr(graph, str(node.target))
        if not str(node.target).startswith(KEPT_AS) or not kept.numel() or not bool((kept == kept.flatten()[0]).all()):
            continue
        number, like = kept.flatten()[0].item(), {"dtype": kept.dtype, "device": kept.device}
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.call_function(torch.ops.aten.full.default, (list(kept.shape), number), like))
        graph.graph.erase_node(node)
    graph.recompile()


def _require_agreement(name: str, expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """The first result, eager against prepared: the same operations, so equal but for the order of sums."""
    for a, b in zip(expected, got, strict=True):
        if not a.is_floating_point():
            agree = torch.equal(a, b)
        else:
            scale = a.abs().nan_to_num(0, 0, 0).max().item() if a.numel() else 0.0
            agree = torch.allclose(a, b, rtol=0, atol=scale * AGREEMENT * torch.finfo(a.dtype).eps, equal_nan=True)
        if not agree or a.shape != b.shape or a.dtype != b.dtype:
            raise PrepareError(
                f"{name}: the first prepared result differs from the eager one, so the function is not the same twice: it "
                "changes something that it uses. Call it unprepared."
            )
