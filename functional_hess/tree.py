"""Spaces of trees: the coordinates in which every derivative of this library is written.

A tree of parameters whose floating tensors have the shapes s_1, ..., s_L is a point of a real vector space of dimension
n = prod(s_1) + ... + prod(s_L). :class:`Space` is that space: it turns a tree into a flat tuple of tensors and back, and it
fixes the order of the coordinates of every matrix,

    (leaf 1, row-major), (leaf 2, row-major), ...,    leaves in the order of optree, which sorts the keys of a dict.

Leaves that are not floating tensors (ints, strings, ``None``, integer tensors) are carried along and never differentiated;
``None`` stands in their place in a vector of the space. Parameters are never concatenated before they are differentiated:
a direction along one leaf leaves the tangents of all others structurally zero, which is most of the speed of a Hessian by rows.

This module knows no derivatives. It is the only importer of optree; every tree goes through it, because torch's own pytree
disagrees with optree on the order of a dict, on ``None`` and on dataclasses, and mixing the two swaps leaves of equal shape.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

__all__ = [
    "Piece",
    "Space",
    "add",
    "broadcast_prefix",
    "chooser",
    "dot",
    "flat",
    "norm",
    "paths",
    "partition",
    "register",
    "scale",
    "signature",
    "signature_differences",
    "sub",
    "tensors_of",
    "tree_map",
    "written",
]

Tree = Any
T = TypeVar("T")
NAMESPACE = "functional_hess"
_flatten = functools.partial(optree.tree_flatten, none_is_leaf=True, namespace=NAMESPACE)


class _Coordinates:
    """Marks a differentiated leaf among the carried ones."""

    def __repr__(self) -> str:
        return "coordinates"


_COORDINATES = _Coordinates()


def register(
    cls: type[T],
    flatten: Callable[[T], tuple[Sequence[Any], Any]] | None = None,
    unflatten: Callable[[Any, Sequence[Any]], T] | None = None,
) -> type[T]:
    """Enter a class of the user's as a node of trees; works as a decorator of a dataclass.

    A dataclass needs nothing else: its fields become the children, in the order they are declared. Any other class comes
    with ``flatten(node) -> (children, auxiliary)`` and ``unflatten(auxiliary, children) -> node``.

    Raises:
        TypeError: ``cls`` is no dataclass and the two functions are missing.

    Example:
        >>> import dataclasses, torch
        >>> @register
        ... @dataclasses.dataclass
        ... class Line:
        ...     slope: torch.Tensor
        ...     name: str
        >>> Space.of(Line(torch.zeros(3), "ridge")).paths
        ('slope',)
    """
    if flatten is not None and unflatten is not None:
        optree.register_pytree_node(cls, flatten, unflatten, namespace=NAMESPACE)  # type: ignore[arg-type]
        return cls
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"register: {cls.__name__} must be a dataclass, or come with flatten= and unflatten= functions.")
    names = tuple(field.name for field in dataclasses.fields(cls) if field.init)

    def fields_of(node: Any) -> tuple[tuple[Any, ...], None, tuple[str, ...]]:
        return tuple(getattr(node, name) for name in names), None, names

    def node_of(_: None, children: Sequence[Any]) -> Any:
        return cls(**dict(zip(names, children, strict=True)))

    optree.register_pytree_node(cls, fields_of, node_of, path_entry_type=optree.GetAttrEntry, namespace=NAMESPACE)  # type: ignore[arg-type]
    return cls


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some coordinates of one leaf: ``indices`` counts within the leaf, flattened row-major."""

    leaf: int
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)


@dataclasses.dataclass(frozen=True)
class Space:
    """The finite-dimensional space of trees of one structure, with its coordinates.

    Made by :meth:`of`. ``shapes``, ``dtypes`` and ``devices`` have one entry for each differentiated leaf; ``carried`` has one
    entry for each leaf of the tree: the carried leaf itself, or a mark for a differentiated one.

    Example:
        >>> import torch
        >>> space = Space.of({"w": torch.zeros(2, 3), "b": torch.zeros(2), "steps": 5})
        >>> space.dim, space.paths, space.shapes
        (8, ('b', 'w'), (torch.Size([2]), torch.Size([2, 3])))
    """

    structure: optree.PyTreeSpec
    carried: tuple[Any, ...] = dataclasses.field(compare=False, repr=False)
    differentiated: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]

    @staticmethod
    def of(tree: Tree, name: str = "x") -> Space:
        """The space in which ``tree`` is a point.

        Args:
            tree: any tree; its floating tensors are the coordinates.
            name: how errors call the tree.

        Raises:
            TypeError: a complex or sparse tensor, or a container that this library does not know, named by its path.
        """
        leaves, structure = _flatten(tree)
        where, carried = [], []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout == torch.strided:
                where.append(i)
                carried.append(_COORDINATES)
            else:
                _require_carriable(leaf, structure, i, name)
                carried.append(leaf)
        tensors = [leaves[i] for i in where]
        return Space(
            structure,
            tuple(carried),
            tuple(where),
            tuple(t.shape for t in tensors),
            tuple(t.dtype for t in tensors),
            tuple(t.device for t in tensors),
        )

    # ------------------------------------------------------------------------------------------------ what it is

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each leaf."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """First coordinate of each leaf."""
        return tuple(sum(self.sizes[:k]) for k in range(len(self.sizes)))

    @property
    def dim(self) -> int:
        """The dimension n."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which a matrix over this space is promoted."""
        return functools.reduce(torch.promote_types, self.dtypes) if self.dtypes else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """The device of a matrix over this space: that of the first leaf."""
        return self.devices[0] if self.devices else torch.device("cpu")

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """Path of each leaf, its steps joined by dots: ``"layers.0.weight"``."""
        every = self.structure.accessors()
        return tuple(_path(every[i]) for i in self.differentiated)

    def name_of(self, leaf: int, name: str = "x") -> str:
        """How a program would write leaf number ``leaf`` of a tree called ``name``: ``x['w'][0]``."""
        return _spelled(self.structure, self.differentiated[leaf], name)

    def coordinate_names(self) -> Iterator[str]:
        """A name for each of the n coordinates, in order: ``'w[0, 2]'``.

        Example:
            >>> import torch
            >>> list(Space.of({"w": torch.zeros(1, 2), "b": torch.zeros(())}).coordinate_names())
            ['b', 'w[0, 0]', 'w[0, 1]']
        """
        for path, shape in zip(self.paths, self.shapes, strict=True):
            for flat in range(math.prod(shape)):
                index = []
                for extent in reversed(shape):
                    flat, i = divmod(flat, extent)
                    index.append(i)
                yield path + (f"[{', '.join(map(str, reversed(index)))}]" if shape else "")

    # ------------------------------------------------------------------------------------------------ in and out

    def pack(self, tree: Tree, name: str = "x") -> tuple[Tensor, ...]:
        """The coordinates of ``tree`` as a flat tuple of tensors, one for each differentiated leaf.

        In the place of a carried leaf ``tree`` may hold ``None`` or any leaf that is not a floating tensor.

        Raises:
            ValueError: structure, shape, dtype or device differs; all differences are listed, with paths.
            TypeError: a leaf that must be a tensor is none; everything else that differs is listed too.
        """
        leaves, structure = _flatten(tree)
        alike = structure == self.structure
        told = self._differences(leaves if alike else self._in_places(leaves, structure), name)
        if not alike:
            raise ValueError("; ".join([_structure_difference(self.structure, structure, name), *told]) + ".")
        tensors = tuple(leaves[i] for i in self.differentiated)
        if told:
            kind = ValueError if all(isinstance(t, Tensor) for t in tensors) else TypeError
            raise kind("; ".join(told) + ".")
        return tensors

    def _in_places(self, leaves: Sequence[Any], structure: optree.PyTreeSpec) -> list[Any]:
        """The leaves of another structure in the places of this one; a missing one is as it should be."""
        found = dict(zip(structure.paths(), leaves, strict=True))
        return [found.get(path, _COORDINATES) for path in self.structure.paths()]

    def _differences(self, leaves: Sequence[Any], name: str) -> list[str]:
        """What is wrong with leaves in the places of this structure."""
        told = []
        for i, (leaf, kept) in enumerate(zip(leaves, self._expected, strict=True)):
            if leaf is not _COORDINATES and (wrong := _wrong(leaf, kept)):
                told += [f"{_spelled(self.structure, i, name)} {what}" for what in wrong]
        return told

    @functools.cached_property
    def _expected(self) -> tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]:
        """Shape, dtype and device of each leaf of the tree; ``None`` for a carried one."""
        like = dict(zip(self.differentiated, zip(self.shapes, self.dtypes, self.devices, strict=True), strict=True))
        return tuple(like.get(i) for i in range(len(self.carried)))

    def unpack(self, entries: Sequence[Any]) -> Tree:
        """The vector with the given coordinates (or any objects, one a leaf); ``None`` in the place of carried leaves."""
        return self._unflatten(entries, [None] * len(self.carried))

    def at(self, tensors: Sequence[Tensor]) -> Tree:
        """The point with the given coordinates: carried leaves are put back."""
        return self._unflatten(tensors, list(self.carried))

    def _unflatten(self, entries: Sequence[Any], leaves: list[Any]) -> Tree:
        for i, entry in zip(self.differentiated, entries, strict=True):
            leaves[i] = entry
        return optree.tree_unflatten(self.structure, leaves)

    def ravel(self, tree: Tree, name: str = "x") -> Tensor:
        """The coordinates of ``tree`` as one tensor of shape (n,), promoted to :attr:`dtype`.

        Example:
            >>> import torch
            >>> x = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
            >>> Space.of(x).ravel(x)
            tensor([3., 1., 2.])
        """
        tensors = self.pack(tree, name)
        if not tensors:
            return torch.empty(0, dtype=self.dtype)
        return torch.cat([t.reshape(-1).to(self.device, self.dtype) for t in tensors])

    def unravel(self, vector: Tensor) -> Tree:
        """The vector of this space whose coordinates are ``vector`` of shape (n,); inverse of :meth:`ravel`."""
        if tuple(vector.shape) != (self.dim,):
            raise ValueError(f"vector must have shape ({self.dim},), got {tuple(vector.shape)}.")
        parts = vector.split(self.sizes)
        like = zip(parts, self.shapes, self.dtypes, self.devices, strict=True)
        return self.unpack([part.reshape(shape).to(device, dtype) for part, shape, dtype, device in like])

    # ------------------------------------------------------------------------------------------------ matrices

    def matrix(self, blocks: Tree) -> Tensor:
        """One (n, n) matrix from a tree of trees of blocks, ``blocks[p][q]`` of shape ``x[p].shape + x[q].shape``.

        Mixed dtypes are promoted. Costs one copy of the matrix; ``out=`` of ``hessian`` avoids it.

        Example:
            >>> import torch
            >>> H = {"a": {"a": torch.tensor(2.0), "b": torch.ones(2)}, "b": {"a": torch.ones(2), "b": 3 * torch.eye(2)}}
            >>> Space.of({"a": torch.tensor(0.0), "b": torch.zeros(2)}).matrix(H)
            tensor([[2., 1., 1.],
                    [1., 3., 0.],
                    [1., 0., 3.]])
        """
        rows = []
        for p, row in enumerate(self._entries(blocks, "H")):
            parts = []
            for q, block in enumerate(self._entries(row, self.name_of(p, "H"))):
                want = self.shapes[p] + self.shapes[q]
                if not isinstance(block, Tensor) or block.shape != want:
                    got = tuple(block.shape) if isinstance(block, Tensor) else type(block).__name__
                    raise ValueError(f"{self.name_of(q, self.name_of(p, 'H'))} must have shape {tuple(want)}, got {got}.")
                parts.append(block.reshape(self.sizes[p], self.sizes[q]).to(self.device, self.dtype))
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows) if rows else torch.empty(0, 0, dtype=self.dtype)

    def blocks(self, matrix: Tensor) -> Tree:
        """The tree of trees of blocks of an (n, n) matrix, as views of it where dtypes agree; inverse of :meth:`matrix`."""
        if tuple(matrix.shape) != (self.dim, self.dim):
            raise ValueError(f"matrix must have shape ({self.dim}, {self.dim}), got {tuple(matrix.shape)}.")
        return self.unpack([self.unpack([self._block(matrix, p, q) for q in self.leaves]) for p in self.leaves])

    def _block(self, matrix: Tensor, p: int, q: int) -> Tensor:
        part = self.shaped(matrix[self.offsets[p] :, self.offsets[q] :][: self.sizes[p], : self.sizes[q]], p, q)
        return part.to(self.devices[p], torch.promote_types(self.dtypes[p], self.dtypes[q]))

    def shaped(self, block: Tensor, p: int, q: int) -> Tensor:
        """A (size of leaf p, size of leaf q) matrix as a view of shape ``x[p].shape + x[q].shape``."""
        block = block.unflatten(0, self.shapes[p] or (1,)).unflatten(-1, self.shapes[q] or (1,))
        block = block if self.shapes[q] else block.squeeze(-1)
        return block if self.shapes[p] else block.squeeze(0)

    def _entries(self, tree: Tree, name: str) -> list[Any]:
        try:
            every = self.structure.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} must have the structure of x: {_without_dump(error)}.") from None
        return [every[i] for i in self.differentiated]

    @property
    def leaves(self) -> range:
        """Numbers of the differentiated leaves."""
        return range(len(self.shapes))

    # ------------------------------------------------------------------------------------------------ vectors

    def pieces(self, rows: Sequence[int]) -> list[Piece]:
        """The coordinates ``rows``, cut where the leaf changes."""
        return [Piece(leaf, run) for leaf, run in self._runs(rows)]

    def _runs(self, rows: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        if isinstance(rows, range) and rows.step > 0:
            for leaf, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
                skipped = max(0, -(-(offset - rows.start) // rows.step))
                first = rows.start + skipped * rows.step - offset
                inside = range(first, min(size, rows.stop - offset), rows.step)
                if len(inside):
                    yield leaf, inside
            return
        run: list[int] = []
        last = None
        for row in rows:
            leaf = self.leaf_of(row)
            if last is not None and leaf != last:
                yield last, run
                run = []
            run.append(row - self.offsets[leaf])
            last = leaf
        if last is not None:
            yield last, run

    def leaf_of(self, row: int) -> int:
        """The leaf that holds coordinate ``row``."""
        for leaf in self.leaves:
            if 0 <= row - self.offsets[leaf] < self.sizes[leaf]:
                return leaf
        raise IndexError(f"row {row} is out of range for {self.dim} coordinates, which are numbered from 0.")

    def one_hot(self, pieces: Sequence[Piece]) -> dict[int, Tensor]:
        """Unit vectors of the given coordinates, stacked: ``{leaf: tensor of shape (k, *shape)}``.

        Leaves that no coordinate touches are absent, so that their tangents stay structurally zero.
        """
        k = sum(map(len, pieces))
        vectors: dict[int, Tensor] = {}
        row = 0
        for piece in pieces:
            leaf = piece.leaf
            if leaf not in vectors:
                vectors[leaf] = torch.zeros(k, self.sizes[leaf], dtype=self.dtypes[leaf], device=self.devices[leaf])
            ones = vectors[leaf][row : row + len(piece)]
            if isinstance(piece.indices, range) and piece.indices.step == 1:
                ones.diagonal(piece.indices.start).fill_(1)
            else:
                ones.scatter_(1, torch.tensor(list(piece.indices), device=ones.device)[:, None], 1)
            row += len(piece)
        return {leaf: vector.view(k, *self.shapes[leaf]) for leaf, vector in vectors.items()}

    def basis(self, start: int = 0, stop: int | None = None) -> Tree:
        """Unit vectors ``start`` to ``stop``, stacked along a new first dimension of every leaf.

        Example:
            >>> import torch
            >>> Space.of((torch.zeros(2), torch.zeros(()))).basis(1, 3)
            (tensor([[0., 1.],
                    [0., 0.]]), tensor([0., 1.]))
        """
        rows = range(self.dim)[start:stop]
        touched = self.one_hot(self.pieces(rows))
        return self.unpack([touched.get(leaf, self._zeros(leaf, len(rows))) for leaf in self.leaves])

    def _zeros(self, leaf: int, *batch: int) -> Tensor:
        return torch.zeros(*batch, *self.shapes[leaf], dtype=self.dtypes[leaf], device=self.devices[leaf])

    def random(self, generator: torch.Generator) -> Tree:
        """A vector of independent standard normal coordinates, drawn from ``generator`` (no global seed is read)."""
        draw = functools.partial(torch.randn, generator=generator, device=generator.device)
        like = zip(self.shapes, self.dtypes, self.devices, strict=True)
        return self.unpack([draw(shape, dtype=dtype).to(device) for shape, dtype, device in like])

    def parameter_order(self) -> Tensor:
        """The permutation to the order in which torch flattens the tree: insertion order of its dicts.

        With ``order = space.parameter_order()``, ``space.ravel(x)[order]`` is what
        ``torch.nn.utils.parameters_to_vector(dict(module.named_parameters()).values())`` gives, and
        ``H[order][:, order]`` is a Hessian in those coordinates.

        Example:
            >>> import torch
            >>> Space.of({"w": torch.zeros(2), "b": torch.zeros(1)}).parameter_order()
            tensor([1, 2, 0])
        """
        numbered = self.unpack([range(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True)])
        ranges = [leaf for leaf in _insertion_leaves(numbered) if leaf is not None]
        return torch.tensor([i for r in ranges for i in r], dtype=torch.long)


def _insertion_leaves(tree: Tree) -> Iterator[Any]:
    """Leaves in the order of construction: dicts as inserted, everything else as optree."""
    if isinstance(tree, dict):
        children: Sequence[Any] = list(tree.values())
    else:
        children, structure = optree.tree_flatten(
            tree, is_leaf=lambda node: node is not tree, none_is_leaf=True, namespace=NAMESPACE
        )
        if structure.is_leaf():
            yield tree
            return
    for child in children:
        yield from _insertion_leaves(child)


def _require_carriable(leaf: Any, structure: optree.PyTreeSpec, i: int, name: str) -> None:
    if isinstance(leaf, Tensor):
        if leaf.is_complex():
            raise TypeError(
                f"{_spelled(structure, i, name)} is complex; derivatives here are real. Pass torch.view_as_real(...) of it."
            )
        if leaf.is_floating_point():
            raise TypeError(f"{_spelled(structure, i, name)} has layout {leaf.layout}; pass a dense tensor (.to_dense()).")
        return
    kind = type(leaf)
    if kind in torch_pytree.SUPPORTED_NODES or (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)):
        raise TypeError(
            f"{_spelled(structure, i, name)} is a {kind.__name__}, which trees here do not know, so its tensors would not be "
            f"differentiated. Enter the class once with functional_hess.register({kind.__name__})."
        )


def _path(accessor: optree.PyTreeAccessor) -> str:
    by_field = (optree.NamedTupleEntry, optree.StructSequenceEntry)
    return ".".join(str(step.field if isinstance(step, by_field) else step.entry) for step in accessor)


def _spelled(structure: optree.PyTreeSpec, i: int, name: str) -> str:
    return structure.accessors()[i].codify(name)


def _wrong(leaf: Any, expected: tuple[torch.Size, torch.dtype, torch.device] | None) -> list[str]:
    """What is wrong with a leaf, in words that follow its name."""
    if expected is None:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return ["must be None, got a tensor: that leaf of x is not a floating tensor"] if floating else []
    if not isinstance(leaf, Tensor):
        return [f"must be a tensor, got {type(leaf).__name__}"]
    shape, dtype, device = expected
    wrong = []
    if leaf.shape != shape:
        wrong.append(f"must have shape {tuple(shape)}, got {tuple(leaf.shape)}")
    if leaf.dtype != dtype:
        wrong.append(f"must have dtype {dtype}, got {leaf.dtype}")
    if leaf.device != device:
        wrong.append(f"must be on {device}, got {leaf.device}")
    return wrong


def _structure_difference(expected: optree.PyTreeSpec, got: optree.PyTreeSpec, name: str, like: str = "the point") -> str:
    """Containers of another type, and leaves and empty containers that are missing or too many; all of them."""
    wanted, had = (dict(_containers(s, name)) for s in (expected, got))
    told = [
        f"{path} must be a {_named_kind(node)}, got {_named_kind(had[path])}"
        for path, node in wanted.items()
        if path in had and had[path].type is not node.type
    ]
    want, have = (
        [accessor.codify(name) for accessor in s.accessors()] + [path for path, node in nodes.items() if not node.num_leaves]
        for s, nodes in ((expected, wanted), (got, had))
    )
    missing, extra = [p for p in want if p not in have], [p for p in have if p not in want]
    told += ([f"missing {', '.join(missing)}"] if missing else []) + ([f"unexpected {', '.join(extra)}"] if extra else [])
    if not told:
        return f"{name} must have the structure {expected}, got {got}: what its containers hold beside leaves differs"
    return f"{name} must have the same structure as {like}: {'; '.join(told)}"


def _without_dump(error: Exception) -> str:
    """What optree says, without the tree that it prints behind."""
    text = re.sub(r"(; \w+: (?!\d)|(?<=[\w.]), got (?!key|:)).*$", "", str(error), flags=re.DOTALL)
    return text[:1].lower() + text[1:].rstrip(".")


def _named_kind(node: optree.PyTreeSpec) -> str:
    return (node.type or object).__name__


def _containers(structure: optree.PyTreeSpec, name: str) -> Iterator[tuple[str, optree.PyTreeSpec]]:
    """Every node but leaves, by how a program would write it."""
    accessors = structure.accessors()

    def below(node: optree.PyTreeSpec, first: int, depth: int, empty: str) -> Iterator[tuple[str, optree.PyTreeSpec]]:
        if node.is_leaf():
            return
        path = accessors[first][:depth].codify(name) if node.num_leaves else empty
        yield path, node
        for entry, child in zip(node.entries(), node.children(), strict=True):
            yield from below(child, first, depth + 1, f"{path}[{entry!r}]")  # no leaf tells the way to an empty one
            first += child.num_leaves

    yield from below(structure, 0, 0, name)


# ---------------------------------------------------------------------------------------------------- functions of trees


def tensors_of(tree: Tree) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Any]], Tree]]:
    """All tensors of a tree, of any dtype, and the function that puts others in their place."""
    leaves, structure = _flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: Sequence[Any]) -> Tree:
        filled = list(leaves)
        for i, tensor in zip(where, tensors, strict=True):
            filled[i] = tensor
        return optree.tree_unflatten(structure, filled)

    tensors = tuple(leaves[i] for i in where)
    for i in where:
        leaves[i] = None  # the tree of an inner level must not outlive it
    return tensors, rebuild


def signature(tree: Tree) -> tuple[Any, tuple[Any, ...]]:
    """What stays when the numbers of a tree change: its structure, and for every leaf shape, dtype and device, or the leaf."""
    leaves, structure = _flatten(tree)
    return structure, tuple((t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves)


def signature_differences(expected: tuple[Any, tuple[Any, ...]], tree: Tree, name: str) -> list[str]:
    """A sentence for everything in which ``tree`` departs from a :func:`signature`; none where it does not."""
    structure, leaves = signature(tree)
    if structure != expected[0]:
        return [_structure_difference(expected[0], structure, name, "the example")]
    pairs = enumerate(zip(expected[1], leaves, strict=True))
    return [
        f"{_spelled(structure, i, name)} must {_kind(want)}, got {_kind(got, '')}"
        for i, (want, got) in pairs
        if _differ(want, got)
    ]


def _differ(a: Any, b: Any) -> bool:
    plain = (tuple, bool, int, float, complex, str, bytes, type(None))
    return a is not b and not (type(a) is type(b) and isinstance(a, plain) and a == b)


def _kind(of: Any, verb: str = "be ") -> str:
    if isinstance(of, tuple) and len(of) == 3 and isinstance(of[1], torch.dtype):
        return f"{verb}a tensor of shape {tuple(of[0])}, {of[1]}, {of[2]}"
    return f"{verb}{of!r}"


def broadcast_prefix(prefix: Tree, tree: Tree, name: str) -> list[Any]:
    """One entry of ``prefix`` for each leaf of ``tree``; a leaf of the prefix serves the whole subtree in its place.

    Raises:
        ValueError: ``prefix`` is no prefix of ``tree``.
    """
    try:
        spread = optree.tree_broadcast_prefix(prefix, tree, none_is_leaf=True, namespace=NAMESPACE)
    except ValueError as error:
        raise ValueError(
            f"{name} must be an int, None or a prefix of the tree that it describes: {_without_dump(error)}."
        ) from None
    return _flatten(spread)[0]


def flat(t: Tensor, batch: int = 1) -> Tensor:
    """``t`` with all but its first ``batch`` dimensions joined to one."""
    return t.reshape(*t.shape[:batch], math.prod(t.shape[batch:]))


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``function`` of the leaves of one or several trees of the same structure; a ``None`` of the first stays ``None``.

    Example:
        >>> tree_map(lambda a, b: a + b, {"x": 1, "y": None}, {"x": 10, "y": None})
        {'x': 11, 'y': None}
    """

    def keep_none(leaf: Any, *others: Any) -> Any:
        return None if leaf is None else function(leaf, *others)

    return optree.tree_map(keep_none, tree, *rest, none_is_leaf=True, namespace=NAMESPACE)


def paths(tree: Tree) -> tuple[str, ...]:
    """The path of every leaf, its steps joined by dots; as globs see them in :func:`partition`.

    Example:
        >>> paths({"w": (1, 2), "b": None})
        ('b', 'w.0', 'w.1')
    """
    return tuple(map(_path, optree.tree_accessors(tree, none_is_leaf=True, namespace=NAMESPACE)))


def written(tree: Tree, name: str) -> tuple[str, ...]:
    """How a program would write every leaf of a tree called ``name``; as errors name them.

    Example:
        >>> written({"w": (1, 2)}, "x")
        ("x['w'][0]", "x['w'][1]")
    """
    return tuple(accessor.codify(name) for accessor in optree.tree_accessors(tree, none_is_leaf=True, namespace=NAMESPACE))


def add(a: Tree, b: Tree) -> Tree:
    """a + b in all coordinates; carried leaves are those of a.

    Example:
        A step from a point, which holds an int, along a vector, which holds ``None`` in its place:

        >>> import torch
        >>> add({"w": torch.tensor([1.0, 2.0]), "power": 3}, {"w": torch.tensor([0.5, 0.0]), "power": None})
        {'w': tensor([1.5000, 2.0000]), 'power': 3}
    """
    return tree_map(lambda s, t: s + t if _moves(s) else s, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """a - b in all coordinates; carried leaves are those of a.

    Example:
        >>> import torch
        >>> sub([torch.tensor(3.0), "name"], [torch.tensor(1.0), None])
        [tensor(2.), 'name']
    """
    return tree_map(lambda s, t: s - t if _moves(s) else s, a, b)


def scale(factor: float | Tensor, a: Tree) -> Tree:
    """factor * a in all coordinates; carried leaves are those of a.

    Example:
        >>> import torch
        >>> scale(0.5, (torch.tensor(3.0), None, 7))
        (tensor(1.5000), None, 7)
    """
    return tree_map(lambda leaf: factor * leaf if _moves(leaf) else leaf, a)


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def dot(a: Tree, b: Tree) -> Tensor:
    """The inner product sum_i a_i b_i over all coordinates; carried leaves do not count.

    Example:
        >>> import torch
        >>> dot({"w": torch.tensor([1.0, 2.0]), "n": None}, {"w": torch.tensor([3.0, 4.0]), "n": None})
        tensor(11.)
    """
    space = Space.of(a, "a")
    products = [(s * t).sum() for s, t in zip(space.pack(a, "a"), space.pack(b, "b"), strict=True)]
    return functools.reduce(operator.add, products) if products else torch.zeros(())


def norm(a: Tree) -> Tensor:
    """The Euclidean norm of all coordinates.

    Example:
        >>> import torch
        >>> norm({"w": torch.tensor([3.0]), "v": torch.tensor([[4.0]]), "n": 2})
        tensor(5.)
    """
    return dot(a, a).sqrt()


def chooser(choose: Callable[[str, Any], bool] | str | Sequence[str]) -> Callable[[str, Any], bool]:
    """The predicate ``(path, leaf) -> bool`` that a choice of leaves means: a predicate itself, a glob or several globs."""
    if callable(choose):
        return lambda path, leaf: bool(choose(path, leaf))
    globs = (choose,) if isinstance(choose, str) else tuple(choose)
    return lambda path, leaf: any(fnmatch.fnmatchcase(path, glob) for glob in globs)


def partition(tree: Tree, choose: Callable[[str, Any], bool] | str | Sequence[str]) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Split off chosen leaves, so that any transform acts on them alone.

    Args:
        tree: any tree.
        choose: a predicate ``(path, leaf) -> bool``, or a glob, or several, matched against the paths of :func:`paths`.

    Returns:
        ``(chosen, merge)``: ``chosen`` has the structure of ``tree`` with ``None`` where a leaf was not chosen;
        ``merge(chosen)`` is the full tree again, with the leaves of its argument in the chosen places.

    Raises:
        ValueError: nothing was chosen.

    Example:
        >>> import torch
        >>> x = {"body": {"w": torch.ones(2)}, "head": {"w": torch.zeros(2)}}
        >>> head, merge = partition(x, "head.*")
        >>> head
        {'body': {'w': None}, 'head': {'w': tensor([0., 0.])}}
        >>> merge(head)["body"]["w"]
        tensor([1., 1.])
    """
    leaves, structure = _flatten(tree)
    names, chooses = paths(tree), chooser(choose)
    taken = [chooses(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    if not any(taken):
        raise ValueError(f"partition: {choose!r} chose no leaf; the paths are {', '.join(map(repr, names))}.")
    chosen = [leaf if take else None for leaf, take in zip(leaves, taken, strict=True)]

    def merge(part: Tree) -> Tree:
        given, got = _flatten(part)
        if got != structure:
            raise ValueError(f"{_structure_difference(structure, got, 'chosen')}.")
        merged = [new if take else old for new, old, take in zip(given, leaves, taken, strict=True)]
        return optree.tree_unflatten(structure, merged)

    return optree.tree_unflatten(structure, chosen), merge
