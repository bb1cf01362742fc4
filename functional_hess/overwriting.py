"""Graphs that write over what they no longer need.

An operation entry by entry, on a tensor that nothing reads afterwards, may put its result where that tensor was: no memory is
asked for, and what is written is what was read, which is cheaper wherever arithmetic costs less than memory. And to add the
gradient of a slice, y + pad(g), no pad(g) of zeros needs to be made: it is y, with g added to a slice.

A tensor is written over only if the graph itself has made its memory, if all that lies there has been used for the last time,
and if it is laid out as the result is. So neither arguments, nor constants, nor results, nor what a view of them shows are ever
written to. Numbers are the same to the bit, but for the sign of zeros to which zeros were added.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from functional_hess.tree import tensors_of

__all__ = ["overwrite"]

Values = dict[fx.Node, Any]
aten = torch.ops.aten
COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})
FOREVER = 2**62


def overwrite(graph: fx.Graph, values: Values) -> None:
    """Let the operations of ``graph`` write over dead tensors; ``values`` has what one run made of every node."""
    for node in list(graph.nodes):
        if node.target is aten.add.Tensor and not node.kwargs:
            _add_to_slice(graph, node, values)
    lives = _Lives(graph, values)
    for number, node in enumerate(list(graph.nodes)):
        if node.target is aten.clone.default and lives.is_over(node.args[0], number, values[node]):
            lives.replace(node, node.args[0])
        elif isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            _write_over(graph, node, lives, number)


# ---------------------------------------------------------------------------------------------------- when a tensor is dead


class _Lives:
    """Of every memory that the graph makes, the number of the operation that uses it last."""

    def __init__(self, graph: fx.Graph, values: Values) -> None:
        self.values = values
        self.last: dict[Any, int] = {}
        self.moved: dict[Any, Any] = {}
        for number, node in enumerate(graph.nodes):
            fresh = _is_fresh(node)
            for memory in _memories(values.get(node)):
                if fresh == (memory in self.last):  # of an argument or a constant; or shared, whatever the schema says
                    self.last[memory] = FOREVER
                self.last.setdefault(memory, number)
            for memory in _memories([values.get(read) for read in node.all_input_nodes]):
                self.last[memory] = max(self.last[memory], number)

    def memory(self, node: Any) -> Any:
        """Where the value of a node lies by now."""
        memory = self.values[node].untyped_storage()._cdata
        while memory in self.moved:
            memory = self.moved[memory]
        return memory

    def is_over(self, node: Any, number: int, like: Tensor) -> bool:
        """Whether operation ``number`` is the last to use a node, and may put a result like ``like`` there."""
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, Tensor) or self.last[self.memory(node)] != number:
            return False
        alike = (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device)
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return alike and whole and value.is_contiguous() and like.is_contiguous()

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """``by`` takes the place of a node, in the memory that it has, and lives as long."""
        here, there = self.memory(by), self.memory(node)
        self.last[here] = self.last[there]
        self.moved[there] = here
        node.replace_all_uses_with(by)
        node.graph.erase_node(node)


def _memories(value: Any) -> set[Any]:
    return {t.untyped_storage()._cdata for t in tensors_of(value)[0]}


def _is_fresh(node: fx.Node) -> bool:
    """Whether the schema says that the operation makes a new tensor, and changes nothing."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return not schema.is_mutable and all(result.alias_info is None for result in schema.returns)


# ---------------------------------------------------------------------------------------------------- what is written over


def _write_over(graph: fx.Graph, node: fx.Node, lives: _Lives, number: int) -> None:
    """The operation in place of its first argument; of its second, where they commute."""
    target = _in_place(node.target)
    if target is None or not isinstance(lives.values[node], Tensor):
        return
    swapped = [node.args[1::-1]] if node.target in COMMUTATIVE and not node.kwargs else []
    for args in (node.args, *swapped):
        over: Any = args[0]
        others = [read for read in node.all_input_nodes if read is not over]
        if not lives.is_over(over, number, lives.values[node]) or lives.memory(over) in map(lives.memory, others):
            continue
        with graph.inserting_before(node):
            written = graph.call_function(target, args, dict(node.kwargs))
        lives.values[written] = lives.values[over]
        lives.replace(node, written)
        return


@functools.cache
def _in_place(target: Any) -> Any:
    """The operation that writes into its first argument and is the same otherwise, if there is one."""
    packet = getattr(aten, f"{target.overloadpacket.__name__}_", None)
    for overload in packet.overloads() if packet is not None else ():
        variant = getattr(packet, overload)
        if _signature(variant) == _signature(target) and variant._schema.arguments[0].is_write:
            return variant
    return None


def _signature(target: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def _add_to_slice(graph: fx.Graph, node: fx.Node, values: Values) -> None:
    """y + pad(g) as a copy of y, to a slice of which g is added."""
    for y, padded in (node.args, node.args[::-1]):
        if not (isinstance(padded, fx.Node) and isinstance(y, fx.Node) and y is not padded):
            continue
        like, alone = values[node], len(padded.users) == 1
        plain = all((values[n].shape, values[n].dtype) == (like.shape, like.dtype) for n in (y, padded))
        if padded.target is not aten.slice_backward.default or not (alone and plain and values[y].is_contiguous()):
            continue
        g, _, *where = padded.args
        with graph.inserting_before(node):
            total = graph.call_function(aten.clone.default, (y,))
            part = graph.call_function(aten.slice.Tensor, (total, *where))
            added = graph.call_function(aten.add_.Tensor, (part, g))
        shown = aten.slice.Tensor(like, *where)
        values |= {total: like, part: shown, added: shown}
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        graph.erase_node(padded)
        return
