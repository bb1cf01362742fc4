"""Affine sites: where a parameter enters a function of one sample only through z = W h + b, found by watching it run.

:func:`find_sites` runs the function once under a ``TorchFunctionMode`` that recognizes products with an operand that *is* a leaf,
or a view of one: linear layers, matrix products, plain einsums, convolutions, embeddings, whatever module or closure they are
called from. Three ideas make that a proof and not a guess:

* A recognized use is handed the leaf *detached*. So a leaf is used at its sites alone exactly if the graph of the loss does not
  reach it; no list of other uses is needed.
* Sums ``z + b`` and ``z + z'`` are one site with what they add, if nothing else reads z. Each z carries a zero *probe*, and that
  of a z which was absorbed into a sum must not be reached either.
* The function runs again later (:class:`Lifted`) with a perturbation eps added to every site, and hands out the features h. It
  must meet the same sites in the same order.

What this module does not do: it takes no second derivatives, and it does not see into Python composites such as
``multi_head_attention_forward``, scripted functions, and transforms inside the function. Leaves used there are simply reached.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functional_hess.affine import Product, recognized
from functional_hess.levels import reached_variables
from functional_hess.nesting import is_outermost, outside_transforms, untraced
from functional_hess.tree import tensors_of

__all__ = ["Discovery", "Entry", "Key", "Lifted", "Site", "SitesChanged", "find_sites"]

Tensors = tuple[Tensor, ...]
Loss = Callable[[Sequence[Tensor]], Tensor]
Key = Any

VIEWS = frozenset(
    (
        *("T", "mT", "t", "transpose", "permute", "swapaxes", "movedim", "view", "reshape", "flatten", "unflatten"),
        *("unsqueeze", "squeeze", "contiguous", "clone", "chunk", "split", "unbind", "select", "narrow", "expand", "__getitem__"),
    )
)
SUMS = frozenset(("add", "__add__", "__radd__"))


class SitesChanged(RuntimeError):
    """The function met other sites than when it was watched first."""


# ---------------------------------------------------------------------------------------------------- what is found


@dataclasses.dataclass(frozen=True)
class Entry:
    """Coordinates of a leaf at a site: ``index[i, j]`` is the place in the leaf, flattened, of the weight from h_j to unit i."""

    leaf: int
    index: Tensor
    is_bias: bool

    @functools.cached_property
    def lattice(self) -> tuple[int, int, int] | None:
        """(start, step, step) if index[i, j] = start + i step + j step and no two are equal, as in a matrix and its transpose."""
        with untraced():
            return _lattice(self.index)

    def part(self, units: slice = slice(None), features: slice = slice(None)) -> Entry:
        """Some units and features alone."""
        part = Entry(self.leaf, self.index[units, features], self.is_bias)
        if self.lattice:
            start, down, right = self.lattice
            part.__dict__["lattice"] = start + down * (units.start or 0) + right * (features.start or 0), down, right
        return part


def _lattice(index: Tensor) -> tuple[int, int, int] | None:
    m, n = index.shape
    if not m * n:
        return None
    start = int(index[0, 0])
    down, right = (int(index[1, 0]) - start if m > 1 else n, int(index[0, 1]) - start if n > 1 else 1)
    apart = min(down, right) > 0 and (m == 1 or n == 1 or down >= n * right or right >= m * down)
    count = functools.partial(torch.arange, device=index.device)
    return (start, down, right) if apart and index.equal(start + count(m)[:, None] * down + count(n) * right) else None


@dataclasses.dataclass(frozen=True)
class Site:
    """A place for one perturbation of shape (positions, out) in z = sum over entries of W h; the features of a bias are 1.

    ``units`` says where in z, flattened, each of them is added; ``shape`` is that of z.
    """

    key: Key
    units: Tensor
    entries: tuple[Entry, ...]
    shape: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        return self.units.shape[0]

    @property
    def out(self) -> int:
        return self.units.shape[1]

    @property
    def size(self) -> int:
        """Directions that seed this site."""
        return self.units.numel()

    @functools.cached_property
    def order(self) -> Tensor | None:
        """Where each number of z, flattened, has its perturbation; ``None`` where they are in one order."""
        with untraced(), outside_transforms():
            places = self.units.flatten()
            return None if places.equal(torch.arange(places.numel(), device=places.device)) else places.argsort()

    @property
    def width(self) -> int:
        """Features of all entries, side by side."""
        return sum(entry.index.shape[1] for entry in self.entries)

    @property
    def leaves(self) -> frozenset[int]:
        return frozenset(entry.leaf for entry in self.entries)

    @property
    def weights(self) -> frozenset[int]:
        return frozenset(entry.leaf for entry in self.entries if not entry.is_bias)

    def slices(self) -> Iterator[tuple[slice, Entry]]:
        """The features of each entry."""
        start = 0
        for entry in self.entries:
            yield slice(start, start + entry.index.shape[1]), entry
            start += entry.index.shape[1]


@dataclasses.dataclass(frozen=True)
class Discovery:
    """The sites of a function in the order in which it meets them, and the leaves that are used elsewhere too.

    ``reads[t]`` says on which of the sites (by key) and direct leaves (by ``("leaf", k)``) the features of site t depend;
    ``inputs[t]`` on which its output depends without going through another site, where ``None`` is the loss. Those ``beside``
    have something added to their output that is no part of their features.
    """

    sites: tuple[Site, ...]
    direct: tuple[int, ...]
    tracked: frozenset[int]
    forbidden: frozenset[Key]
    reads: dict[Key, frozenset[Key]]
    inputs: dict[Key, frozenset[Key]]
    beside: frozenset[Key]
    every: dict[Key, Site]
    calls: int


class _Watch(TorchFunctionMode):
    """What discovery and lifting share: leaves are followed through views, and products and sums recognized."""

    def __init__(self, leaves: Sequence[Tensor], tracked: frozenset[int], forbidden: frozenset[Key]) -> None:
        super().__init__()
        self.forbidden = forbidden
        self.seen: dict[int, tuple[int, Any, Tensor]] = {id(leaves[k]): (k, self.numbered(leaves[k]), leaves[k]) for k in tracked}
        self.at: dict[int, tuple[Key, Tensor, int]] = {}
        self.features: dict[Key, list[Tensor]] = {}
        self.absorbed: set[Key] = set()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
        if name in VIEWS and args and self.is_leaf(args[0]) and not tensors_of((tuple(args[1:]), kwargs))[0]:
            return self.view(func, args, kwargs)
        product = None if name == "embedding" and func is not F.embedding else recognized(name, args, kwargs, self.is_leaf)
        if product is not None and self.accepts(product) and sum(a is product.weight for a in args) == 1:
            return self.product(product, func, args, kwargs)
        if name in SUMS and len(args) == 2 and not kwargs and all(isinstance(a, Tensor) for a in args):
            a, b = args if self.is_free(args[0]) else (args[1], args[0])
            if self.is_free(a) and a is not b and torch.broadcast_shapes(a.shape, b.shape) == a.shape:
                return self.sum(a, b, func, args)
        return func(*args, **kwargs)

    def is_leaf(self, t: Any) -> bool:
        return isinstance(t, Tensor) and id(t) in self.seen

    def is_free(self, t: Tensor) -> bool:
        """Whether t is the output of a site as it came, which a sum may absorb."""
        if id(t) not in self.at:
            return False
        key, _, version = self.at[id(t)]
        return key not in self.absorbed and key not in self.forbidden and t._version == version

    def accepts(self, product: Product) -> bool:
        raise NotImplementedError

    def numbered(self, leaf: Tensor) -> Any:
        raise NotImplementedError

    def view(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def product(self, product: Product, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def sum(self, a: Tensor, b: Tensor, func: Any, args: Sequence[Any]) -> Tensor:
        raise NotImplementedError

    def put(self, key: Key, z: Tensor, features: list[Tensor]) -> Tensor:
        """z is the output of the site ``key``."""
        self.at[id(z)] = key, z, z._version
        self.features[key] = features
        return z

    def own_bias(self, product: Product) -> bool:
        """Whether the bias of a product is a leaf of its own, to be seeded with it."""
        leaf = self.seen[id(product.weight)][0]
        return self.is_leaf(product.bias) and self.seen[id(product.bias)][0] != leaf

    def sum_key(self, a: Tensor, b: Tensor) -> tuple[Key, Key | None]:
        """The key of the sum; the key of b, if that is a site which the sum absorbs too."""
        other = self.at[id(b)][0] if self.is_free(b) else None
        added = other if other is not None else ("bias", self.seen[id(b)][0]) if self.is_leaf(b) else None
        return (self.at[id(a)][0], added), other


def _several(out: Any) -> Sequence[Any]:
    return out if isinstance(out, (tuple, list)) else (out,)


def _ones(features: Tensor) -> Tensor:
    return features.new_ones(features.shape[0], 1)


class _Discover(_Watch):
    """One run by plain autograd, of leaves that require grad; a recognized use gets its leaf detached, and z a probe."""

    def __init__(self, leaves: Sequence[Tensor], tracked: frozenset[int], forbidden: frozenset[Key]) -> None:
        super().__init__(leaves, tracked, forbidden)
        self.sites: dict[Key, Site] = {}
        self.raw: dict[Key, Tensor] = {}
        self.probes: dict[Key, Tensor] = {}
        self.beside: set[Key] = set()

    def numbered(self, leaf: Tensor) -> Tensor:
        return torch.arange(leaf.numel(), device=leaf.device).view(leaf.shape)

    def view(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        leaf, index, _ = self.seen[id(args[0])]
        out = func(*args, **kwargs)
        for view, shadow in zip(_several(out), _several(func(index, *args[1:], **kwargs)), strict=True):
            self.seen[id(view)] = leaf, shadow, view  # the view is held: ids must not be used again
        return out

    def accepts(self, product: Product) -> bool:
        """Its features can leave (no transform of the function's own is active), and the leaf is not multiplied by itself."""
        return is_outermost() and product.weight.dtype.is_floating_point

    def product(self, product: Product, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        leaf, index, _ = self.seen[id(product.weight)]
        own = self.own_bias(product)
        cut = {id(product.weight)} | ({id(product.bias)} if own else set())

        def detached(given: Any) -> Any:
            return given.detach() if id(given) in cut else given

        z = func(*map(detached, args), **{name: detached(value) for name, value in kwargs.items()})
        h = product.features()
        numbers = product.units(torch.arange(z.numel(), device=z.device).view(z.shape))
        entries = [Entry(leaf, product.matrix(index), False)]
        if own:
            places = self.seen[id(product.bias)][1]
            bias = product.units(places.view(*places.shape, *[1] * product.trailing).expand(z.shape))
            if not bool((bias == bias[:1]).all()):
                return func(*args, **kwargs)
            entries.append(Entry(self.seen[id(product.bias)][0], bias[0][:, None], True))
        self.calls += 1
        self.beside |= set() if own or product.bias is None else {self.calls}
        site = Site(self.calls, numbers, tuple(entries), tuple(z.shape))
        return self.place(site, z, [h, *([_ones(h)] if own else [])])

    def sum(self, a: Tensor, b: Tensor, func: Any, args: Sequence[Any]) -> Tensor:
        key, other = self.sum_key(a, b)
        first = self.sites[key[0]]
        entries, added, more = first.entries, b, []
        if other is not None:
            second = self.sites[other]
            if not first.units.equal(second.units):
                return func(*args)
            entries, added, more = entries + second.entries, self.raw[other], self.features[other]
        elif self.is_leaf(b):
            leaf, index, _ = self.seen[id(b)]
            bias = index.expand(a.shape).flatten()[first.units]
            if not bool((bias == bias[:1]).all()) or leaf in first.leaves:
                return func(*args)
            entries, added = (*entries, Entry(leaf, bias[0][:, None], True)), b.detach()
            more = [_ones(self.features[key[0]][0])]
        self.absorbed |= {key[0]} | ({other} if other is not None else set())
        self.beside |= {key} if key[1] is None or {key[0], other} & self.beside else set()
        site = Site(key, first.units, entries, first.shape)
        return self.place(site, self.raw[key[0]] + added, self.features[key[0]] + more)

    def place(self, site: Site, z: Tensor, features: list[Tensor]) -> Tensor:
        self.sites[site.key], self.raw[site.key] = site, z
        self.probes[site.key] = torch.zeros_like(z, requires_grad=True)
        return self.put(site.key, z + self.probes[site.key], features)


class Lifted(_Watch):
    """The same run with perturbations: ``features`` holds h of every site afterwards, ``kept`` z without its perturbation.

    Args:
        leaves: the point; tracked leaves are constants, direct ones may be perturbed themselves.
        found: what discovery found.
        eps: perturbations by key of a site, each of shape (positions, out), or a function that gives it from the features.
        severed: tensors, of that shape too, that sites go on with in place of z: then nothing depends on an earlier site but
            by way of them, and a product that nobody asks for is not computed.
        outputs: the sites whose z is kept.
        features: the sites whose features are wanted; by default all.

    Raises:
        SitesChanged: on leaving, if the sites met are not those found.
    """

    def __init__(
        self,
        leaves: Sequence[Tensor],
        found: Discovery,
        eps: Mapping[Key, Any],
        severed: Mapping[Key, Tensor] = MappingProxyType({}),
        *,
        outputs: Collection[Key] = (),
        features: Collection[Key] | None = None,
    ) -> None:
        super().__init__(leaves, found.tracked, found.forbidden)
        self.found, self.eps, self.severed, self.outputs = found, eps, severed, outputs
        self.shown = found.every if features is None else {part for key in features for part in _summands(key)}
        self.instead = {part: key for key in severed if key not in outputs for part in _summands(key)}
        self.kept: dict[Key, Tensor] = {}

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and (self.calls != self.found.calls or self.features.keys() != self.found.every.keys()):
            raise SitesChanged("the loss met other products than when it was watched")

    def numbered(self, leaf: Tensor) -> None:
        return None

    def is_free(self, t: Tensor) -> bool:
        if id(t) not in self.at:
            return False
        key = self.at[id(t)][0]
        return key not in self.absorbed and key not in self.forbidden

    def accepts(self, product: Product) -> bool:
        return self.calls + 1 in self.found.every

    def view(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        leaf = self.seen[id(args[0])][0]
        out = func(*args, **kwargs)
        self.seen |= {id(view): (leaf, None, view) for view in _several(out)}
        return out

    def product(self, product: Product, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        self.calls += 1
        features = []
        if self.calls in self.shown:
            h = product.features()
            features = [h, *([_ones(h)] if self.own_bias(product) else [])]
        return self.place(self.calls, lambda: func(*args, **kwargs), features)

    def sum(self, a: Tensor, b: Tensor, func: Any, args: Sequence[Any]) -> Tensor:
        key, other = self.sum_key(a, b)
        if key not in self.found.every:
            return func(*args)
        self.absorbed |= {key[0]} | ({other} if other is not None else set())
        features = self.features[key[0]]
        more = self.features[other] if other is not None else [_ones(features[0])] if self.is_leaf(b) and features else []
        return self.place(key, lambda: func(*args), features + more if features and (more or other is None) else [])

    def place(self, key: Key, compute: Callable[[], Tensor], features: list[Tensor]) -> Tensor:
        site = self.found.every[key]
        if key in self.instead:
            z = _as_output(self.severed[self.instead[key]], site).clone()  # another operation may write to it
        else:
            z = compute()
        if key in self.outputs:
            self.kept[key] = _as_units(z, site)
            z = _as_output(self.severed[key], site).clone() if key in self.severed else z
        if key in self.eps:
            eps: Any = self.eps[key]
            moved: Any = eps(torch.cat(features, 1)) if callable(eps) else eps
            z = z + _as_output(moved, site)
        return self.put(key, z, features)


def _summands(key: Key) -> Iterator[Key]:
    """A site and those whose sum it is."""
    yield key
    if isinstance(key, tuple) and key[0] != "bias":
        for part in key:
            yield from _summands(part)


def _as_units(z: Tensor, site: Site) -> Tensor:
    """z in the shape (positions, out) of its perturbation."""
    if site.order is None:
        return z.clone().reshape(site.units.shape)  # another operation may write to z
    return z.flatten()[site.units]


def _as_output(eps: Tensor, site: Site) -> Tensor:
    """A perturbation of shape (positions, out) in the shape of z."""
    flat = eps.flatten()
    return (flat if site.order is None else flat[site.order]).view(site.shape)


# ---------------------------------------------------------------------------------------------------- finding them


def find_sites(
    loss: Loss,
    leaves: Sequence[Tensor],
    drop: Callable[[Sequence[Site], frozenset[int]], frozenset[int]] = lambda sites, direct: frozenset(),
    known: Discovery | None = None,
) -> Discovery | str:
    """The sites of ``loss(leaves)``, a function of one sample, or a reason why they cannot be had.

    Args:
        loss: a function of one sample, of flat leaves; it runs by plain autograd, one time or several.
        leaves: the point.
        drop: chooses leaves that are better seeded directly, from the sites found and the leaves that are direct already.
        known: a discovery of the same function, to be confirmed in one run.
    """
    tracked = known.tracked if known else frozenset(range(len(leaves)))
    forbidden: frozenset[Key] = known.forbidden if known else frozenset()
    for _ in itertools.count():
        fresh = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.inference_mode(False), torch.enable_grad(), _Discover(fresh, tracked, forbidden) as watch:
            value = loss(fresh)
        if not value.requires_grad:
            return "the loss depends on no leaf by differentiable operations"
        reached = reached_variables([value])
        own = {id(t) for t in (*fresh, *watch.probes.values())}
        if reached - own:
            return "the loss closes over a tensor that requires grad"
        used = frozenset(k for k, leaf in enumerate(fresh) if id(leaf) in reached)
        read = frozenset(key for key in watch.absorbed if id(watch.probes[key]) in reached)
        sites = [s for s in watch.sites.values() if s.key not in watch.absorbed and id(watch.probes[s.key]) in reached]
        if read - forbidden:  # z is read elsewhere too: it needs a perturbation of its own
            forbidden |= read
        elif gone := (used & tracked) or drop(sites, used):
            tracked, forbidden = tracked - gone, frozenset()
        else:
            return _found(watch, value, sites, fresh, sorted(used), tracked, forbidden)
    raise AssertionError


def _found(
    watch: _Discover,
    value: Tensor,
    sites: Sequence[Site],
    fresh: Sequence[Tensor],
    direct: Sequence[int],
    tracked: Any,
    forbidden: Any,
) -> Discovery:
    probes = {id(watch.probes[s.key]): s.key for s in sites}
    names = {id(fresh[k]): ("leaf", k) for k in direct} | probes

    def named(outputs: Sequence[Tensor], until: Any = ()) -> frozenset[Key]:
        reached = reached_variables(outputs, until)
        return frozenset(name for t, name in names.items() if t in reached)

    reads = {site.key: named(watch.features[site.key]) for site in sites}
    inputs = {site.key: named([watch.raw[site.key]], probes) for site in sites} | {None: named([value], probes)}
    return Discovery(
        tuple(sites), tuple(direct), tracked, forbidden, reads, inputs, frozenset(watch.beside), dict(watch.sites), watch.calls
    )
