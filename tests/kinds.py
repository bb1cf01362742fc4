"""The kinds of tree that a person may hold parameters in, each with the paths of its coordinates in their order."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import torch
from scenarios import t
from torch import Tensor, nn

from functional_hess.tree import register

__all__ = ["KINDS", "Layer", "Pair", "Ring", "Stranger", "TorchOnly", "a", "b", "c"]


class Pair(NamedTuple):
    first: Any
    second: Any


@register
@dataclasses.dataclass
class Layer:
    weight: Tensor
    bias: Tensor
    activation: str = "tanh"


class Ring:
    """Registered with two functions; the name is auxiliary."""

    def __init__(self, atoms: list[Any], name: str) -> None:
        self.atoms, self.name = atoms, name


register(Ring, lambda ring: (tuple(ring.atoms), ring.name), lambda name, atoms: Ring(list(atoms), name))


@dataclasses.dataclass
class Stranger:
    weight: Tensor


class TorchOnly:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


torch.utils._pytree.register_pytree_node(TorchOnly, lambda node: ([node.weight], None), lambda leaves, _: TorchOnly(*leaves))

a, b, c = t([1.0, 2.0]), t([[3.0, 4.0, 5.0]]), t(6.0)

# name -> (tree, paths in the order of the coordinates)
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bare": (b, ("",)),
    "number": (c, ("",)),
    "dict": ({"a": a, "b": b}, ("a", "b")),
    "dict in another order": ({"b": b, "a": a}, ("a", "b")),
    "ordered dict": (collections.OrderedDict([("b", b), ("a", a)]), ("b", "a")),
    "default dict": (collections.defaultdict(list, {"b": b, "a": a}), ("a", "b")),
    "integer keys": ({10: a, 9: b}, ("9", "10")),
    "tuple": ((a, b), ("0", "1")),
    "list": ([a, b, c], ("0", "1", "2")),
    "deque": (collections.deque([a, b]), ("0", "1")),
    "nested tuple": ((a, (b, (c,))), ("0", "1.0", "1.1.0")),
    "named tuple": (Pair(b, a), ("first", "second")),
    "dataclass": (Layer(b, a), ("weight", "bias")),
    "class with functions": (Ring([a, {"x": c}], "benzene"), ("0", "1.x")),
    "None": ({"a": a, "b": None}, ("a",)),
    "ints": ((3, a, 4), ("1",)),
    "strings": ({"name": "cube", "w": b}, ("w",)),
    "integer and bool tensors": ([torch.tensor([1, 2]), a, torch.tensor(True)], ("1",)),
    "empty leaf": ({"a": torch.zeros(0), "b": torch.zeros(2, 0, 3), "c": c}, ("a", "b", "c")),
    "mixed dtypes": ({"d": a, "f": a.float(), "h": a.bfloat16()}, ("d", "f", "h")),
    "parameters": (nn.ParameterList([nn.Parameter(a), nn.Parameter(b)]).state_dict(), ("0", "1")),
    "empty containers": ({"a": (), "b": {}, "c": c, "d": []}, ("c",)),
    "requires grad": ({"w": nn.Parameter(a), "x": b}, ("w", "x")),
}
