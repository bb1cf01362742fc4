"""From second derivatives in perturbations of affine sites to those in parameters: matrix products alone.

With eps_s added to z_s = W_s h_s, a pair of sites s <= t of N samples gives

    H[(s,i,j),(t,k,p)] = sum_n  h_s[j] A_st[i,k] h_t[p]  +  sum_n  h_s[j] g_t[k] D_ts[p,i],

summed over the positions of a site too, where A_st = d2L/deps_s deps_t, g_t = dL/deps_t and D_ts = dh_t/deps_s. The products are
ordered by what is small: Khatri-Rao where a sample has one position, and of s = t little more than the half that symmetry leaves:
of (i, k) the upper triangle, of (j, p) the panels on and above the diagonal.

No derivative is taken here, and nothing is known of how A and D were found.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from functional_hess.chunking import MIB, WORKING_SET
from functional_hess.nesting import untraced
from functional_hess.sites import Entry, Site

__all__ = ["Pair", "diagonal_of", "product_of", "put_pair"]

ENOUGH = 128  # samples from which on half of the products are worth putting the other half in its places
PANELS = 4  # at least, of a symmetric block that is not small: more of them save little
PANEL = 4 * MIB  # bytes, so that it is read again while it is in the cache


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the sites s and t give for N samples, S and T their positions.

    ``hs`` (N, S, f), ``A`` (S, i, N, T, k), ``ht`` (N, T, f'), ``g`` (N, T, k), ``D`` (S, i, N, T, f') or ``None`` where it
    vanishes. Where unit i of s moves feature i of t and no other, as through an elementwise function, ``slope`` (N, i) is all
    of D, which is left out.
    """

    s: Site
    t: Site
    same: bool
    hs: Tensor
    A: Tensor
    ht: Tensor
    g: Tensor
    D: Tensor | None
    slope: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether this is all of a site with itself: then it is symmetric."""
        return self.same and self.s.units.shape == self.t.units.shape

    def split(self, count: int) -> Iterator[Pair]:
        """The same for ``count`` samples at a time."""
        none = itertools.repeat(None)
        slopes = (none if self.D is None else self.D.split(count, 2), none if self.slope is None else self.slope.split(count))
        parts = (self.hs.split(count), self.A.split(count, 2), self.ht.split(count), self.g.split(count), *slopes)
        for hs, A, ht, g, D, slope in zip(*parts, strict=False):
            yield dataclasses.replace(self, hs=hs, A=A, ht=ht, g=g, D=D, slope=slope)

    def rows(self, units: slice) -> Pair:
        """Some units of s alone."""
        D = None if self.D is None else self.D[:, units]
        return dataclasses.replace(self, s=_units(self.s, units), A=self.A[:, units], D=D)

    def columns(self, units: slice) -> Pair:
        """Some units of t alone."""
        return dataclasses.replace(self, t=_units(self.t, units), A=self.A[..., units], g=self.g[..., units])


def _units(site: Site, units: slice) -> Site:
    return Site(site.key, site.units[:, units], tuple(entry.part(units=units) for entry in site.entries))


# ---------------------------------------------------------------------------------------------------- blocks


Blocks = Mapping[tuple[int, int], Tensor]


def put_pair(blocks: Blocks, pair: Pair, *, add: bool) -> set[tuple[int, int]]:
    """Write all that a pair gives into the blocks of H by leaves, (rows, columns), or add it; returns the blocks it met."""
    met = set()
    for a, b, values, again in _values(pair):
        if (a.leaf, b.leaf) in blocks:
            _put(blocks[a.leaf, b.leaf], a, b, values, add=add or again)
            met.add((a.leaf, b.leaf))
    if pair.slope is not None:
        _add_slope(blocks, pair)
    return met


def _values(pair: Pair) -> Iterator[tuple[Entry, Entry, Tensor, bool]]:
    """The entries of two leaves and values (i, j, k, p), with the mirror image where it is another.

    The last says whether it comes on top of values of the same pair. Values lie in memory in the order that suits the entries.
    """
    if pair.whole and pair.s.positions == 1 and _panel_row(pair) <= WORKING_SET / 4:
        yield from _in_panels(pair)
        return
    for some, mirrored in _in_parts(pair):
        for number, values in enumerate(_terms(some)):
            for (sa, a), (sb, b) in itertools.product(some.s.slices(), some.t.slices()):
                yield a, b, values[:, sa, :, sb], number > 0
                if mirrored:
                    yield b, a, values[:, sa, :, sb].permute(2, 3, 0, 1), number > 0


def _in_parts(pair: Pair) -> Iterator[tuple[Pair, bool]]:
    """A pair in parts of units whose blocks fit the working set, and whether the mirror image of the part is wanted too."""
    block = pair.hs.shape[2] * pair.t.out * pair.ht.shape[2] * pair.hs.element_size()
    step = max(1, int(WORKING_SET / 4 / max(1, block)))
    if step >= pair.s.out:
        yield pair, not pair.same
        return
    for first in range(0, pair.s.out, step):
        rows = pair.rows(slice(first, first + step))
        if not pair.whole:
            yield rows, not pair.same
            continue
        yield rows.columns(slice(first, first + step)), False
        if first + step < pair.t.out:
            yield dataclasses.replace(rows.columns(slice(first + step, None)), same=False), True


def _terms(pair: Pair) -> Iterator[Tensor]:
    """The block of H between the entries of two sites, (i, j, k, p): both terms of the formula above."""
    few = list(pair.split(_fit(pair)))
    yield functools.reduce(Tensor.add_, map(_curvature, few))
    if pair.D is not None:
        yield functools.reduce(Tensor.add_, map(_slope, few))


def _fit(pair: Pair) -> int:
    """How many samples at a time, so that no product on the way to a block exceeds the working set."""
    (_, S, J), (_, T, P), o, q = pair.hs.shape, pair.ht.shape, pair.s.out, pair.t.out
    curvature = J * P if _by_rows(pair) else J * o * T * q
    slope = 0 if pair.D is None else S * (J * q + o * P) if T == 1 else q * o * P * S
    return max(1, int(WORKING_SET / 4 / (max(curvature, slope) * pair.hs.element_size())))


def _by_rows(pair: Pair) -> bool:
    """Whether products of features, in a row for each sample, are smaller than those of units with features."""
    return pair.hs.shape[1] == pair.ht.shape[1] == 1 and 4 * pair.s.out * pair.t.out >= pair.ht.shape[2]


def _units_innermost(site: Site) -> bool:
    """Whether units are neighbors in memory rather than features: as in W^T, where W h is written h @ W^T."""
    entry = next((e for e in site.entries if not e.is_bias), site.entries[0])
    return entry.lattice is not None and entry.lattice[1] < entry.lattice[2]


def _curvature(pair: Pair) -> Tensor:
    """sum over n, a, b of hs[n,a,j] A[a,i,n,b,k] ht[n,b,p] -> (i, j, k, p)"""
    hs, A, ht = pair.hs, pair.A, pair.ht
    (N, S, J), (_, T, P), o, q = hs.shape, ht.shape, A.shape[1], A.shape[4]
    if _by_rows(pair):  # Khatri-Rao
        pairs = (hs[:, 0].T.contiguous()[:, None] * ht[:, 0].T.contiguous()).reshape(J * P, N)
        units = A.reshape(o, N, q).transpose(0, 1).reshape(N, o * q)
        if _units_innermost(pair.t):
            return (pairs @ units).view(J, P, o, q).permute(2, 0, 3, 1)
        return (units.T @ pairs.T).view(o, q, J, P).permute(0, 2, 1, 3)
    if S == T == 1:  # few units, many features: a scaled product for each pair of units
        weighted = A.reshape(o, N, q).permute(0, 2, 1).reshape(o * q, N, 1) * hs.reshape(1, N, J)
        return (weighted.mT @ ht.reshape(N, P)).view(o, q, J, P).permute(0, 2, 1, 3)
    half = hs.mT @ A.permute(2, 0, 1, 3, 4).reshape(N, S, o * T * q)  # (n, j, (i b k))
    return (half.view(N, J, o, T, q).permute(2, 1, 4, 0, 3).reshape(o * J * q, N * T) @ ht.reshape(N * T, P)).view(o, J, q, P)


def _slope(pair: Pair) -> Tensor:
    """sum over n, a, b of hs[n,a,j] g[n,b,k] D[a,i,n,b,p] -> (i, j, k, p)"""
    hs, g, D = pair.hs, pair.g, pair.D
    assert D is not None
    (N, S, J), (_, T, q), o, P = hs.shape, g.shape, D.shape[1], D.shape[4]
    if T == 1:
        pairs = (hs[:, :, :, None] * g[:, :, None, :]).reshape(N * S, J * q)
        slopes = D.permute(1, 4, 2, 0, 3).reshape(o * P, N * S)
        if _units_innermost(pair.t):
            return (slopes @ pairs).view(o, P, J, q).permute(0, 2, 3, 1)
        return (pairs.T @ slopes.T).view(J, q, o, P).permute(2, 0, 1, 3)
    half = g.mT @ D.permute(2, 3, 0, 1, 4).reshape(N, T, S * o * P)  # (n, k, (a i p))
    turned = half.view(N, q, S, o, P).permute(0, 2, 3, 1, 4).reshape(N * S, o * q * P)
    return (hs.reshape(N * S, J).T @ turned).view(J, o, q, P).transpose(0, 1)


def _add_slope(blocks: Blocks, pair: Pair) -> None:
    """sum over n of hs[n,j] slope[n,i] g[n,k] at the places (i, j), (k, i), and their mirror images."""
    o, q = pair.s.out, pair.t.out
    count = max(1, int(WORKING_SET / 4 / (o * q * pair.hs.element_size())))

    def of(some: Pair) -> Tensor:
        assert some.slope is not None
        return some.hs[:, 0].T @ (some.slope[:, :, None] * some.g).flatten(1)

    values = functools.reduce(Tensor.add_, map(of, pair.split(count))).view(-1, o, q).transpose(0, 1)  # (i, j, k)
    for (sa, a), (sb, b) in itertools.product(pair.s.slices(), pair.t.slices()):
        units = slice(sb.start, min(sb.stop, o))
        rows, columns = a.index[units, :, None], b.index[:, : max(0, units.stop - units.start)].T[:, None]
        for block in (blocks.get((a.leaf, b.leaf)), blocks[b.leaf, a.leaf].T if (b.leaf, a.leaf) in blocks else None):
            if block is not None and units.start < units.stop:
                block.index_put_((rows, columns), values[units, sa], accumulate=True)


def _put(block: Tensor, a: Entry, b: Entry, values: Tensor, *, add: bool) -> None:
    """Write values (i, j, k, p) to the places a (i, j) and b (k, p) of two leaves, or add them to what is there."""
    if a.lattice and b.lattice:
        row, column = block.stride()
        strides = (a.lattice[1] * row, a.lattice[2] * row, b.lattice[1] * column, b.lattice[2] * column)
        start = block.storage_offset() + a.lattice[0] * row + b.lattice[0] * column
        there = block.as_strided(values.shape, strides, start)
        there.add_(values) if add else there.copy_(values)
    else:
        rows, columns = a.index.flatten()[:, None], b.index.flatten()
        block.index_put_((rows, columns), values.reshape(len(rows), -1), accumulate=add)


# ---------------------------------------------------------------------------------------------------- a site with itself


def _in_panels(pair: Pair) -> Iterator[tuple[Entry, Entry, Tensor, bool]]:
    """The blocks of a site of one position with itself, symmetric in (i, k) and in (j, p)."""
    for first, last, values in _panels(pair):
        rows, columns = _entries(pair.s, first, last, first), _entries(pair.s, first, pair.s.width, first)
        for (sa, a), (sb, b) in itertools.product(rows, columns):
            yield a, b, values[:, sa, :, sb], False
        for (sa, a), (sb, b) in itertools.product(rows, _entries(pair.s, last, pair.s.width, first)):
            yield b, a, values[:, sa, :, sb].permute(0, 3, 2, 1), False


def _entries(site: Site, first: int, last: int, start: int) -> list[tuple[slice, Entry]]:
    """The entries of some features, each with their places counted from ``start``."""
    found = []
    for part, entry in site.slices():
        a, b = max(part.start, first), min(part.stop, last)
        if a < b:
            found.append((slice(a - start, b - start), entry.part(features=slice(a - part.start, b - part.start))))
    return found


def _panels(pair: Pair) -> Iterator[tuple[int, int, Tensor]]:
    """sum over n of h[n,j] A[i,n,k] h[n,p] -> (i, j, k, p) for j from a first feature to a last one, and p from the first on."""
    J, row = pair.s.width, _panel_row(pair)
    step = J if J * row <= MIB else max(1, min(-(-J // PANELS), int(PANEL / row)))
    panel = _rows_panel(pair, step) if _by_rows(pair) else _units_panel(pair)
    for first in range(0, J, step):
        last = min(first + step, J)
        yield first, last, panel(first, last)


def _panel_row(pair: Pair) -> int:
    """Bytes of the values of one feature with all others."""
    return pair.s.width * pair.s.out**2 * pair.hs.element_size()


def _rows_panel(pair: Pair, step: int) -> Callable[[int, int], Tensor]:
    """By products of features, a row for each sample; of the units the upper triangle, where samples are so many that it pays."""
    (N, _, J), o = pair.hs.shape, pair.s.out
    (i, k), half = torch.triu_indices(o, o, device=pair.hs.device), N >= ENOUGH
    units = pair.A.reshape(o, N, o).transpose(1, 2)
    units = units[i, k] if half else units.reshape(o * o, N)
    count = max(1, int(PANEL / (step * J * pair.hs.element_size())))
    operands = list(zip(pair.hs[:, 0].T.split(count, 1), units.split(count, 1), strict=True))
    operands = [(h.contiguous(), few) for h, few in operands]
    spread = _places(i, k, o) if half else i
    turned = _units_innermost(pair.s)

    def panel(first: int, last: int) -> Tensor:
        products = (((h[first:last, None] * h[first:]).flatten(0, 1), few) for h, few in operands)
        total = functools.reduce(Tensor.add_, (rows @ few.T if turned else few @ rows.T for rows, few in products))
        total = total.index_select(int(turned), spread) if half else total
        shape = (last - first, J - first)
        return total.view(*shape, o, o).permute(2, 0, 3, 1) if turned else total.view(o, o, *shape).transpose(1, 2)

    return panel


def _units_panel(pair: Pair) -> Callable[[int, int], Tensor]:
    """By features scaled for each pair of units, where those are few."""
    (N, _, J), o = pair.hs.shape, pair.s.out
    h, A = pair.hs[:, 0], pair.A.reshape(o, N, o)

    def panel(first: int, last: int) -> Tensor:
        values = h.new_empty(o, o, last - first, J - first)
        for i, k in itertools.combinations_with_replacement(range(o), 2):
            values[i, k] = (A[i, :, k, None] * h[:, first:last]).T @ h[:, first:]
            if k > i:
                values[k, i] = values[i, k]
        return values.transpose(1, 2)

    return panel


def _places(i: Tensor, k: Tensor, m: int) -> Tensor:
    """Where each of the m x m entries of a symmetric matrix is among those of its upper triangle (i, k)."""
    places = i.new_zeros(m, m)
    places[i, k] = places[k, i] = torch.arange(len(i), device=i.device)
    return places.flatten()


# ---------------------------------------------------------------------------------------------------- products


def product_of(pair: Pair, Vs: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    """What a pair adds to H v at the entries of s, and by its mirror image at those of t; v is Vs (i, j) and Vt (k, p)."""
    ws, wt = pair.hs @ Vs.T, pair.ht @ Vt.T
    on_s = torch.einsum("ainbk,nbk->nai", pair.A, wt)  # two factors at a time: more would be multiplied out first
    on_t = torch.einsum("ainbk,nai->nbk", pair.A, ws)
    moved = torch.zeros_like(pair.ht)
    if pair.D is not None:
        on_s = on_s + torch.einsum("ainbp,nbp->nai", pair.D, pair.g @ Vt)
        moved = torch.einsum("ainbp,nai->nbp", pair.D, ws)
    if pair.slope is not None:
        units = slice(pair.s.out)
        on_s = on_s + pair.slope[:, None] * (pair.g @ Vt)[..., units]
        moved[..., units] = pair.slope[:, None] * ws
    at_s = torch.einsum("naj,nai->ij", pair.hs, on_s)
    at_t = torch.einsum("nbk,nbp->kp", on_t, pair.ht) + torch.einsum("nbk,nbp->kp", pair.g, moved)
    return at_s, torch.zeros_like(at_t) if pair.same else at_t


# ---------------------------------------------------------------------------------------------------- the diagonal


def diagonal_of(pair: Pair) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The diagonal entries that a pair of sites adds to: leaf, their places in it, values."""
    for (sa, ea), (sb, eb) in itertools.product(pair.s.slices(), pair.t.slices()):
        if ea.leaf != eb.leaf:
            continue
        a, b, D = pair.hs[..., sa], pair.ht[..., sb], None if pair.D is None else pair.D[..., sb]
        with untraced():
            where = _rows_in_common(ea.index, eb.index)
        if where is not None:  # row i of the first is row where[i] of the second, every feature in its place
            A = pair.A[..., where].diagonal(0, 1, 4)  # (S, N, T, i)
            if a.shape[1] == b.shape[1] == 1:
                values = A[0, :, 0].T @ (a * b)[:, 0]
            else:
                values = torch.einsum("naj,anbi,nbj->ij", a, A, b)
            if D is not None:
                values = values + torch.einsum("naj,nbi,ainbj->ij", a, pair.g[..., where], D)
            yield ea.leaf, ea.index.flatten(), values.flatten()
            continue
        with untraced():
            x, y = (ea.index.flatten()[:, None] == eb.index.flatten()).nonzero(as_tuple=True)  # seen differently: tied, sliced
        i, j, k, p = x // ea.index.shape[1], x % ea.index.shape[1], y // eb.index.shape[1], y % eb.index.shape[1]
        values = torch.einsum("nae,anbe,nbe->e", a[..., j], _picked(pair.A, i, k), b[..., p])
        if D is not None:
            values = values + torch.einsum("nae,nbe,anbe->e", a[..., j], pair.g[..., k], _picked(D, i, p))
        yield ea.leaf, ea.index.flatten()[x], values


def _picked(M: Tensor, i: Tensor, k: Tensor) -> Tensor:
    return M.permute(0, 2, 3, 1, 4)[..., i, k]


def _rows_in_common(a: Tensor, b: Tensor) -> Tensor | None:
    """Which rows of b the rows of a are, if they are rows of b."""
    if a.shape[1] != b.shape[1]:
        return None
    if a.shape == b.shape and a.equal(b):
        return torch.arange(a.shape[0], device=a.device)
    found = (a[:, None, 0] == b[None, :, 0]).nonzero()
    if len(found) != len(a) or not b[found[:, 1]].equal(a):
        return None
    return found[:, 1]
