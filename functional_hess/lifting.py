"""Exact second derivatives from pre-activations: directions are units, not parameters.

Where parameters enter the loss of a sample only through affine sites z_s = W_s h_s (a bias is a column of W_s with feature 1),
perturb z_s by eps_s. With the loss L(eps) of sample n, g_t = dL/deps_t, A_st = d2L/deps_s deps_t and D_ts = dh_t/deps_s,

    H[(s,i,j),(t,k,p)] = sum_n  h_s[j] A_st[i,k] h_t[p]
                       + sum_n  h_s[j] g_t[k] D_ts[p,i]        if t comes after s,    and the mirror image,

exactly, with a sum over positions where a site has several. Samples do not read each other, so all of them share one set of
directions: as many as there are units, however many parameters there are. What remains is matrix products. A leaf that is used
in other ways too is perturbed itself, as if h = 1; each leaf is seeded in the cheaper way. Bishop (1992) has the feed-forward
case; :mod:`functional_hess.sites` finds the sites of any function.

The samples are those of an empirical risk, or the parts of a batch that a plain function of the whole batch is proved not to mix
(:mod:`functional_hess.independence`); such a function is taken as a risk of one sample, whose positions share seeds in N parts.

A plan is believed after a certificate: the first time, its product with a random vector is compared with H v and with H^T v by
automatic differentiation of the risk itself. Where lifting cannot be done, or does not pay, :func:`lift` says why.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import MIB, WORKING_SET, fits, megabytes, survey
from functional_hess.guards import missing_rule, out_of_memory
from functional_hess.independence import common_positions, independent_parts
from functional_hess.levels import flat_jvp, flat_value_and_grad, flat_vmap, repaired
from functional_hess.products import FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE, product_at
from functional_hess.risk import EmpiricalRisk, Part, samples_of
from functional_hess.rows import Problem, rows_only
from functional_hess.sites import Discovery, Entry, Lifted, Site, SitesChanged, find_sites
from functional_hess.tree import tensors_of

__all__ = ["DIRECTIONS", "Lift", "lift", "lifted_blocks", "lifted_diagonal", "lifted_product", "repairs_of"]

Tensors = tuple[Tensor, ...]
DIRECTIONS = 64  # at once
WORTH = 0.7  # directions, as a part of the rows they serve for, beyond which rows are as good
WORTH_A_PROOF = (
    256 * MIB
)  # bytes that rows would write, about a tenth of a second, before a plain function is asked for its parts
PROOF = 12  # bytes that a proof takes at its peak for one of the intermediate results of f
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
_plans: weakref.WeakKeyDictionary[Any, dict[Any, Discovery]] = weakref.WeakKeyDictionary()
_certified: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Lift:
    """Where every leaf of a risk at a point is seeded. ``groups``: direct leaves, then sites, each after what it reads.

    The positions of a site fall into ``parts`` that do not read each other; the site in ``groups`` has those of one part.
    """

    problem: Problem
    risk: EmpiricalRisk
    at: Callable[[Sequence[Tensor]], Any]
    samples: Part
    found: Discovery
    parts: int
    groups: tuple[Site, ...]
    saved: int
    output: int

    @property
    def x(self) -> Tensors:
        return self.problem.bound.x

    @property
    def directions(self) -> int:
        return sum(group.size for group in self.groups)

    def copies(self, group: Site) -> int:
        """How many parts share the seeds of a group: a direct leaf is one for all."""
        return 1 if group.key not in self.found.reads else self.parts

    def zeros(self, group: Site) -> Tensor:
        """No perturbation, at all positions of all parts."""
        return self.x[0].new_zeros(self.copies(group) * group.positions, group.out)

    @property
    def at_once(self) -> int:
        """How many directions of one sample fit the working set."""
        kept = sum(self.copies(g) * (g.size + g.positions * g.width) for g in self.groups) * self.x[0].element_size()
        return max(1, min(DIRECTIONS, int(WORKING_SET / (3 * self.saved + kept + 1))))

    @property
    def scale(self) -> float:
        return 1 / len(self.samples) if self.risk.reduction == "mean" else 1.0


def lift(problem: Problem, args: Sequence[Any], argnums: Any, output: int, *, diagonal: bool = False) -> Lift | str:
    """How the Hessian (or its diagonal) of a risk is lifted, or why it is not: ``""`` for a function that is no risk.

    Args:
        problem: the function at a point.
        args: its arguments.
        argnums: those that are differentiated.
        output: bytes that the call allocates for its result.
    """
    why_not = rows_only(problem, args) or ("" if fits(output, problem.space.device) else "the result would not fit")
    if not isinstance(problem.f, EmpiricalRisk):
        rows = problem.space.dim * (problem.seen.saved + problem.seen.held / 32)  # products with data cost less for a byte
        return "" if why_not or rows < WORTH_A_PROOF or not problem.is_scalar else _of_plain(problem, args, output, diagonal)
    if argnums not in (0, (0,)):
        return "other arguments than the parameters are differentiated"
    if not why_not and not tensors_of(tuple(args[1:]))[0]:
        why_not = "the samples come from a loader"
    return why_not or _of_risk(problem, samples_of(tuple(args[1:])), isinstance(argnums, tuple), output, diagonal)


def _of_plain(problem: Problem, args: Sequence[Any], output: int, diagonal: bool) -> Lift | str:
    """A function of a whole batch is a risk of one sample; its positions are asked whether they read each other."""
    if PROOF * problem.seen.saved > 1.1 * output + WORKING_SET:  # before the output is allocated
        return "a proof that its samples are independent would take more memory than its rows do"
    scalar = problem.scalar
    risk = EmpiricalRisk(lambda leaves, _: scalar(*leaves)[0], "sum", None)
    sample = samples_of((problem.bound.x[0].new_zeros(1),))
    kind = tuple((t.shape, t.dtype) for t in tensors_of(tuple(args))[0])
    return _planned(problem, risk, sample, tuple, output, independent_parts, (diagonal, kind))


def _of_risk(problem: Problem, samples: Part, in_tuple: bool, output: int, diagonal: bool) -> Lift | str:
    def at(leaves: Sequence[Tensor]) -> Any:
        tree = problem.space.at(leaves)
        return tree[0] if in_tuple else tree

    kind = (diagonal, samples.kind, *((t.shape, t.dtype) for t in problem.bound.x))
    return _planned(problem, problem.f, samples, at, output, lambda *_: 1, kind)  # type: ignore[arg-type]


Asked = Callable[[Callable[[Sequence[Tensor]], Tensor], Tensors, Discovery], int]


def _planned(
    problem: Problem,
    risk: EmpiricalRisk,
    samples: Part,
    at: Callable[[Sequence[Tensor]], Any],
    output: int,
    parts_of: Asked,
    kind: Any,
) -> Lift | str:
    x = problem.bound.x

    def loss(leaves: Sequence[Tensor]) -> Tensor:
        return risk.sample_loss(at(leaves), *samples.rebuild([t[0] for t in samples.tensors]))

    plans = _of_function(_plans, problem.f)
    try:
        found, parts = _in_parts(loss, x, problem.space.sizes, parts_of, plans.get(kind))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if out_of_memory(error):
            raise
        return f"the loss could not be watched on one sample ({type(error).__name__}: {error})"
    if isinstance(found, str):
        return found
    plans[kind] = found
    saved = survey(lambda *leaves: (loss(leaves), None), x).saved
    plan = Lift(problem, risk, at, samples, found, parts, _groups(found, x, parts), saved, output)
    if not found.sites:
        return "no leaf enters through affine sites alone"
    if plan.directions > WORTH * problem.space.dim:
        return f"{plan.directions:,} directions for {problem.space.dim:,} rows do not pay"
    if not fits(output + _working(plan), x[0].device):
        return f"lifting would work with {megabytes(_working(plan))} beside the result, and there is less"
    return _certify(plan, (kind, found.tracked, found.forbidden, parts)) or plan


def _in_parts(
    loss: Callable[[Sequence[Tensor]], Tensor], x: Tensors, sizes: Sequence[int], parts_of: Asked, known: Discovery | None
) -> tuple[Discovery | str, int]:
    """The sites, and the parts that their positions fall into: which leaves are worth a site depends on those."""
    parts = 0
    while True:
        found = find_sites(loss, x, functools.partial(_dear, sizes, parts), known)
        if isinstance(found, str) or not found.sites:
            return found, 1
        hoped = parts or common_positions(found.sites)
        if sum(group.size for group in _groups(found, x, hoped)) > WORTH * sum(sizes):
            return found, hoped  # not worth asking
        parts = parts_of(loss, x, found)
        if parts >= hoped:
            return found, parts
        known = None


def _of_function(kept: weakref.WeakKeyDictionary[Any, dict[Any, Any]], f: Any) -> dict[Any, Any]:
    """What is kept of f; nothing of a callable without weak references or hash."""
    try:
        return kept.setdefault(f, {})
    except TypeError:
        return {}


def _groups(found: Discovery, x: Tensors, parts: int) -> tuple[Site, ...]:
    """The direct leaves, small ones first, and the sites in their order, with the positions of one part."""
    direct = []
    for k in found.direct:
        places = torch.arange(x[k].numel(), device=x[k].device)
        direct.append(Site(("leaf", k), places[None], (Entry(k, places[:, None], True),)))
    sites = (dataclasses.replace(site, units=site.units[: site.positions // parts]) for site in found.sites)
    return (*sorted(direct, key=lambda group: group.size), *sites)


def _working(plan: Lift) -> int:
    """Bytes that are worked with."""
    return WORKING_SET * min(plan.at_once, plan.directions) // plan.at_once


def _dear(sizes: Sequence[int], parts: int, sites: Sequence[Site], direct: frozenset[int]) -> frozenset[int]:
    """Leaves that cost less seeded directly: one leaf, or all weights that share a site with it (one find at a time).

    ``parts`` share the seeds of a site; 0 hopes for as many as there can be.
    """
    parts = parts or common_positions(sites)
    for k in sorted(frozenset().union(*(site.weights for site in sites))):
        together = frozenset().union(*(site.weights for site in sites if k in site.weights))
        for drop in (frozenset({k}), together):
            gone = [site for site in sites if site.weights <= drop]
            leaves = drop.union(*(site.leaves for site in gone))
            if sum(site.size for site in gone) > parts * sum(sizes[leaf] for leaf in leaves):
                return drop
    return frozenset()


# ---------------------------------------------------------------------------------------------------- derivatives of samples


@dataclasses.dataclass(frozen=True)
class Pair:
    """What the sites s and t give for N samples, S and T their positions.

    ``hs`` (N, S, f), ``A`` (S, i, N, T, k), ``ht`` (N, T, f'), ``g`` (N, T, k), ``D`` (S, i, N, T, f') or ``None`` where it
    vanishes.
    """

    s: Site
    t: Site
    same: bool
    hs: Tensor
    A: Tensor
    ht: Tensor
    g: Tensor
    D: Tensor | None

    def split(self, count: int) -> Iterator[Pair]:
        """The same for ``count`` samples at a time."""
        slopes = itertools.repeat(None) if self.D is None else self.D.split(count, 2)
        parts = (self.hs.split(count), self.A.split(count, 2), self.ht.split(count), self.g.split(count), slopes)
        for hs, A, ht, g, D in zip(*parts, strict=False):
            yield dataclasses.replace(self, hs=hs, A=A, ht=ht, g=g, D=D)


def _perturbed(plan: Lift, eps: dict[Any, Any], sample: Sequence[Tensor]) -> tuple[Tensor, dict[Any, Tensor]]:
    """The loss of one sample with perturbations by group (tensors, or functions of the features), and all features."""
    leaves = [t.view_as(t) for t in plan.x]  # an alias each, so that a tensor in two leaves is two
    for k in plan.found.direct:
        if ("leaf", k) in eps:
            given: Any = eps["leaf", k]
            move: Any = given(plan.x[0].new_ones(1, 1)) if callable(given) else given
            leaves[k] = leaves[k] + move.view(leaves[k].shape)
    with Lifted(leaves, plan.found, eps) as run:
        value = plan.risk.sample_loss(plan.at(leaves), *plan.samples.rebuild(sample))
    return value, {key: torch.cat(parts, 1) for key, parts in run.features.items()}


def _sweep(plan: Lift, samples: Part, wanted: Callable[[Site, Site], bool]) -> Iterator[Pair]:
    """All pairs s <= t that are wanted, seeds of small neighbors together."""
    groups, start = plan.groups, 0
    while start < len(groups):
        stop, count = start + 1, groups[start].size
        while stop < len(groups) and count + groups[stop].size <= plan.at_once:
            count, stop = count + groups[stop].size, stop + 1
        now = range(start, stop)
        targets = [t for t in range(start, len(groups)) if t < stop or any(wanted(groups[s], groups[t]) for s in now)]
        step = _step(groups[start], plan.at_once) if stop == start + 1 else count
        for first in range(0, count, step):
            yield from _seeded(plan, samples, now, targets, range(first, min(first + step, count)), count, wanted)
        start = stop


def _step(site: Site, at_once: int) -> int:
    """Seeds of a large site at a time: units where it has one position, else whole positions."""
    return at_once if site.positions == 1 else max(1, at_once // site.out) * site.out


def _seeded(
    plan: Lift,
    samples: Part,
    now: range,
    targets: Sequence[int],
    rows: range,
    count: int,
    wanted: Callable[[Site, Site], bool],
) -> Iterator[Pair]:
    groups, like = plan.groups, plan.x[0]
    moved = {groups[t].key for t in now}
    reads = {t: groups[t].key in plan.found.reads and bool(plan.found.reads[groups[t].key] & moved) for t in targets}
    zeros = [plan.zeros(groups[t]) for t in targets]
    used = [groups[t].key for t in (*now, *targets) if groups[t].key in plan.found.reads]
    constant = list(dict.fromkeys(key for key in used))
    dependent = [groups[t].key for t in targets if reads[t]]

    def of_sample(v: Tensors, *sample: Tensor) -> Tensors:
        def gradient(*head: Tensor) -> tuple[Tensors, Tensors]:
            def loss(*eps: Tensor) -> tuple[Tensor, Any]:
                value, features = _perturbed(plan, {groups[t].key: e for t, e in zip(targets, eps, strict=True)}, sample)
                return value * plan.scale, ([features[k] for k in dependent], [features[k] for k in constant])

            (_, (changing, fixed)), g = flat_value_and_grad(loss, (*head, *zeros[len(now) :]), verb="hessian")
            return (*g, *changing), tuple(fixed)

        everywhere = tuple(u.repeat(plan.copies(groups[s]), 1) for s, u in zip(now, v, strict=True))
        outputs, tangents, fixed = flat_jvp(gradient, tuple(zeros[: len(now)]), everywhere)
        return (*outputs[: len(targets)], *tangents, *fixed)

    def apart(values: Tensor, t: int) -> Tensor:
        """(..., n, positions of all parts, f) -> (..., n and part, positions of one, f)"""
        return values.unflatten(-2, (plan.copies(groups[t]), -1)).flatten(-4, -3)

    eye = torch.eye(count, dtype=like.dtype, device=like.device)[rows.start : rows.stop]
    units = eye.split([groups[s].size for s in now], 1)
    seeds = [part.reshape(len(rows), *groups[s].units.shape) for s, part in zip(now, units, strict=True)]
    every = flat_vmap(lambda *v: flat_vmap(functools.partial(of_sample, v))(*samples.tensors))(*seeds)
    m = len(targets)
    g, A = ([apart(values, t) for values, t in zip(some, targets, strict=True)] for some in (every[:m], every[m : 2 * m]))
    D = dict(zip(dependent, every[2 * m : 2 * m + len(dependent)], strict=True))
    features = {key: f[0] for key, f in zip(constant, every[2 * m + len(dependent) :], strict=True)}
    first = 0

    def features_of(s: int, like: Tensor) -> Tensor:
        """(n, positions, f), where a direct leaf has feature 1 in all parts."""
        found = features.get(groups[s].key)
        return like.new_ones(like.shape[0], 1, 1) if found is None else apart(found, s)

    for s in now:
        begin, end = max(first, rows.start) - rows.start, min(first + groups[s].size, rows.stop) - rows.start
        for i, t in enumerate(targets):
            if t < s or end <= begin or not wanted(groups[s], groups[t]):
                continue
            d = apart(D[groups[t].key], t)[begin:end] if reads[t] and t > s else None
            here = range(begin + rows.start - first, end + rows.start - first)
            part, positions = _cut(groups[s], here)
            hs, ht = features_of(s, g[i][0])[:, positions], features_of(t, g[i][0])
            shape = part.units.shape
            d = None if d is None else d.unflatten(0, shape)
            yield Pair(part, groups[t], s == t, hs, A[i][begin:end].unflatten(0, shape), ht, g[i][0], d)
        first += groups[s].size


def _cut(site: Site, rows: range) -> tuple[Site, slice]:
    """The part of a site that some of its seeds belong to, and its positions."""
    if len(rows) == site.size:
        return site, slice(None)
    if site.positions == 1:
        entries = tuple(Entry(e.leaf, e.index[rows.start : rows.stop], e.is_bias) for e in site.entries)
        return Site(site.key, site.units[:, rows.start : rows.stop], entries), slice(None)
    positions = slice(rows.start // site.out, rows.stop // site.out)
    return dataclasses.replace(site, units=site.units[positions]), positions


# ---------------------------------------------------------------------------------------------------- matrix products


def _contracted(pair: Pair) -> Tensor:
    """The block of H between the entries of two sites, (i, j, k, p): both terms of the formula above."""
    terms = []
    for few in pair.split(_fit(pair)):
        terms = [*terms, _curvature(few.hs, few.A, few.ht), *([] if few.D is None else [_slope(few.hs, few.g, few.D)])]
        terms = [functools.reduce(Tensor.add_, terms)]
    return terms[0]


def _fit(pair: Pair) -> int:
    """How many samples at a time, so that no product on the way to a block exceeds the working set."""
    (_, S, J), (_, T, P), o, q = pair.hs.shape, pair.ht.shape, pair.s.out, pair.t.out
    largest = max(J * P if S == T == 1 and 4 * o * q >= P else 0, J * o * T * q, J * q * S, q * o * P * S)
    return max(1, int(WORKING_SET / 4 / (largest * pair.hs.element_size())))


def _curvature(hs: Tensor, A: Tensor, ht: Tensor) -> Tensor:
    """sum over n, a, b of hs[n,a,j] A[a,i,n,b,k] ht[n,b,p] -> (i, j, k, p)"""
    (N, S, J), (_, T, P), o, q = hs.shape, ht.shape, A.shape[1], A.shape[4]
    if S == T == 1 and 4 * o * q >= P:
        pairs = (hs[:, 0, :, None] * ht[:, 0, None, :]).reshape(N, J * P)  # Khatri-Rao: a row for each sample
        return (A.reshape(o, N, q).transpose(1, 2).reshape(o * q, N) @ pairs).view(o, q, J, P).permute(0, 2, 1, 3)
    if S == T == 1:  # few units, many features: a scaled product for each pair of units
        weighted = A.reshape(o, N, q).permute(0, 2, 1).reshape(o * q, N, 1) * hs.reshape(1, N, J)
        return (weighted.mT @ ht.reshape(N, P)).view(o, q, J, P).permute(0, 2, 1, 3)
    half = hs.mT @ A.permute(2, 0, 1, 3, 4).reshape(N, S, o * T * q)  # (n, j, (i b k))
    return (half.view(N, J, o, T, q).permute(2, 1, 4, 0, 3).reshape(o * J * q, N * T) @ ht.reshape(N * T, P)).view(o, J, q, P)


def _slope(hs: Tensor, g: Tensor, D: Tensor) -> Tensor:
    """sum over n, a, b of hs[n,a,j] g[n,b,k] D[a,i,n,b,p] -> (i, j, k, p)"""
    (N, S, J), (_, T, q), o, P = hs.shape, g.shape, D.shape[1], D.shape[4]
    if T == 1:
        pairs = (hs[:, :, :, None] * g[:, :, None, :]).reshape(N * S, J * q)
        return (D.permute(1, 4, 2, 0, 3).reshape(o * P, N * S) @ pairs).view(o, P, J, q).permute(0, 2, 3, 1)
    half = g.mT @ D.permute(2, 3, 0, 1, 4).reshape(N, T, S * o * P)  # (n, k, (a i p))
    turned = half.view(N, q, S, o, P).permute(0, 2, 3, 1, 4).reshape(N * S, o * q * P)
    return (hs.reshape(N * S, J).T @ turned).view(J, o, q, P).transpose(0, 1)


def _diagonal_of(pair: Pair) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The diagonal entries that a pair of sites adds to: leaf, their places in it, values."""
    for (sa, ea), (sb, eb) in itertools.product(pair.s.slices(), pair.t.slices()):
        if ea.leaf != eb.leaf:
            continue
        a, b, D = pair.hs[..., sa], pair.ht[..., sb], None if pair.D is None else pair.D[..., sb]
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


# ---------------------------------------------------------------------------------------------------- what comes of it


def lifted_blocks(plan: Lift, pairs: Collection[tuple[int, ...]], out: Tensor | None = None) -> dict[tuple[int, ...], Tensor]:
    """The blocks of the Hessian of the given pairs of leaves, in their shapes: contiguous, or views of an (n, n) ``out``."""
    space = plan.problem.space
    upper = {(min(pair), max(pair)) for pair in pairs}
    matrices = {(p, q): _matrix(plan, p, q, out).zero_() for p, q in upper}

    def needed(s: Site, t: Site) -> bool:
        return any((min(p, q), max(p, q)) in upper for p in s.leaves for q in t.leaves)

    def add(a: Entry, b: Entry, values: Tensor) -> None:
        if (a.leaf, b.leaf) in matrices:
            _add(matrices[a.leaf, b.leaf], a.index, b.index, values)

    for part in plan.samples.split(_samples_at_once(plan)):
        for pair in _sweep(plan, part, needed):
            for some in _few_units(pair):
                values = _contracted(some)
                for (sa, a), (sb, b) in itertools.product(some.s.slices(), some.t.slices()):
                    add(a, b, values[:, sa, :, sb])
                    if not pair.same:
                        add(b, a, values[:, sa, :, sb].permute(2, 3, 0, 1))
    for p, q in pairs:
        if p > q:
            matrices[p, q] = _matrix(plan, p, q, out).copy_(matrices[q, p].T)
    return {(p, q): space.shaped(matrices[p, q], p, q) for p, q in pairs}


def _matrix(plan: Lift, p: int, q: int, out: Tensor | None) -> Tensor:
    space = plan.problem.space
    if out is None:
        return torch.empty(space.sizes[p], space.sizes[q], dtype=space.dtypes[p], device=space.devices[p])
    return out[space.offsets[p] :, space.offsets[q] :][: space.sizes[p], : space.sizes[q]]


def _few_units(pair: Pair) -> Iterator[Pair]:
    """A pair in parts of units of s whose blocks fit the working set."""
    block = pair.hs.shape[2] * pair.t.out * pair.ht.shape[2] * pair.hs.element_size()
    step = max(1, int(WORKING_SET / 4 / max(1, block)))
    for first in range(0, pair.s.out, step):
        units = slice(first, first + step)
        entries = tuple(Entry(e.leaf, e.index[units], e.is_bias) for e in pair.s.entries)
        site = Site(pair.s.key, pair.s.units[:, units], entries)
        yield dataclasses.replace(pair, s=site, A=pair.A[:, units], D=None if pair.D is None else pair.D[:, units])


def lifted_diagonal(plan: Lift) -> Tensors:
    """The diagonal of the Hessian, by leaf."""

    def needed(s: Site, t: Site) -> bool:
        return bool(s.leaves & t.leaves)

    diagonal = [torch.zeros(t.numel(), dtype=t.dtype, device=t.device) for t in plan.x]
    for part in plan.samples.split(_samples_at_once(plan)):
        for pair in _sweep(plan, part, needed):
            for leaf, where, values in _diagonal_of(pair):
                diagonal[leaf].index_add_(0, where, values, alpha=1 if pair.same else 2)
    return tuple(d.view(t.shape) for d, t in zip(diagonal, plan.x, strict=True))


def _samples_at_once(plan: Lift) -> int:
    """So many that a chunk of directions fits the working set."""
    largest = max((_step(g, plan.at_once) for g in plan.groups if g.positions > 1), default=1)
    width = max(min(plan.at_once, plan.directions), largest)
    item = plan.x[0].element_size()
    kept = sum((g.size + g.positions * g.width) * item for g in plan.groups)
    return max(1, int(WORKING_SET / (width * (3 * plan.saved + kept) + 1)))


def _add(block: Tensor, a: Tensor, b: Tensor, values: Tensor) -> None:
    """Add values (i, j, k, p) at the places a (i, j) and b (k, p) of two leaves."""
    first, second = _layout(a, block.shape[0]), _layout(b, block.shape[1])
    if first and second:
        target = block.unflatten(1, second[1]).unflatten(0, first[1])
        target.add_(values.permute(*first[0], 2 + second[0][0], 2 + second[0][1]))
    else:
        block.index_put_((a.flatten()[:, None], b.flatten()), values.reshape(a.numel(), -1), accumulate=True)


def _layout(index: Tensor, numel: int) -> tuple[tuple[int, int], torch.Size] | None:
    """How (out, in) lies in its leaf: the permutation to the leaf's order and the two sizes; ``None`` for a selection."""
    if index.numel() != numel:
        return None
    for permutation, m in (((0, 1), index), ((1, 0), index.T)):
        if m.flatten().equal(torch.arange(numel, device=index.device)):
            return permutation, m.shape
    return None


# ---------------------------------------------------------------------------------------------------- the certificate


def _certify(plan: Lift, key: Any) -> str:
    """Why a plan is not to be believed, or ``""``: asked once for a function and its kind of arguments."""
    known = _of_function(_certified, plan.problem.f)
    if key not in known:
        try:
            known[key] = _compared(plan)
        except SitesChanged as error:
            known[key] = str(error)
        except RuntimeError as error:
            if not missing_rule(error):
                raise
            known[key] = f"lifting lacks a rule: {error}"
    return known[key]


def _compared(plan: Lift) -> str:
    """The lifted H v against H v and H^T v by automatic differentiation of the risk itself, for a random v."""
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in plan.x]
    few = dataclasses.replace(plan, samples=plan.samples.holding(tuple(t[:32] for t in plan.samples.tensors)))
    mine = lifted_product(few, v)
    leaves = range(len(plan.x))
    args = few.samples.rebuild(few.samples.tensors)
    for mode in (FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE):
        product = product_at(lambda *x: (plan.risk(plan.at(x), *args), None), plan.x, mode, leaves, leaves)
        theirs = product(dict(enumerate(v)))
        size = torch.stack([t.double().norm() for t in theirs]).norm()
        off = torch.stack([(a - b).double().norm() for a, b in zip(mine, theirs, strict=True)]).norm()
        if not bool(off <= TOLERANCE[plan.x[0].dtype] * size + 1e-30) and not (bool(size.isnan()) and bool(off.isnan())):
            return f"the certificate failed: H v is off by {float(off / size):.1e} from that of {mode}"
    return ""


def lifted_product(plan: Lift, v: Sequence[Tensor]) -> Tensors:
    """H v by way of the sites: the derivative of g_s h_s^T in r at 0, where z_s moves by eps_s + r V_s h_s and g_s = dL/deps_s.

    V_s are the entries of v at a site.
    """
    keys = [group.key for group in plan.groups]
    zeros = tuple(map(plan.zeros, plan.groups))
    matrices = [torch.cat([v[e.leaf].flatten()[e.index] for e in group.entries], 1) for group in plan.groups]  # (out, width)
    one = plan.x[0].new_ones(1, 1)

    def of_sample(*sample: Tensor) -> Tensors:
        def products(r: Tensor) -> tuple[Tensors, Tensors]:
            def loss(*eps: Tensor) -> tuple[Tensor, Any]:
                moves = {key: _moving(e, r, V) for key, e, V in zip(keys, eps, matrices, strict=True)}
                value, features = _perturbed(plan, moves, sample)
                return value * plan.scale, [features.get(key, one) for key in keys]

            (_, features), g = flat_value_and_grad(loss, zeros, verb="hessian")
            return tuple(a.mT @ h for a, h in zip(g, features, strict=True)), ()

        return flat_jvp(products, (one.new_zeros(()),), (one.new_ones(()),))[1]

    totals = [t.sum(0) for t in flat_vmap(of_sample)(*plan.samples.tensors)]
    result = [torch.zeros(t.numel(), dtype=t.dtype, device=t.device) for t in plan.x]
    for group, total in zip(plan.groups, totals, strict=True):
        for part, entry in group.slices():
            result[entry.leaf].index_add_(0, entry.index.flatten(), total[:, part].flatten())
    return tuple(r.view(t.shape) for r, t in zip(result, plan.x, strict=True))


def _moving(eps: Tensor, r: Tensor, V: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda features: eps + r * (features @ V.T)


def repairs_of(plan: Lift) -> tuple[str, ...]:
    """The ops that are repaired when the plan is carried out."""
    with repaired(fresh=True) as used:
        lifted_product(dataclasses.replace(plan, samples=plan.samples.first()), plan.x)
    return tuple(sorted(used))
