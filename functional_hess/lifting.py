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
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import MIB, WORKING_SET, fits, megabytes
from functional_hess.contraction import diagonal_of, product_of, put_pair
from functional_hess.elimination import (
    chained,
    diagonal_by_stages,
    pairs_by_stages,
    samples_of_a_stage,
    samples_of_all_stages,
)
from functional_hess.guards import missing_rule, out_of_memory
from functional_hess.independence import common_positions, independent_parts
from functional_hess.levels import flat_jvp, flat_value_and_grad, repaired
from functional_hess.nesting import is_traced, untraced
from functional_hess.products import FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE, product_at
from functional_hess.risk import EmpiricalRisk, Part, bytes_of_a_sample, loaded_samples, samples_of
from functional_hess.rows import Problem, rows_only
from functional_hess.seeding import Lift, samples_at_once, swept
from functional_hess.sites import Discovery, Entry, Site, SitesChanged, find_sites
from functional_hess.tree import tensors_of

__all__ = ["Lift", "lift", "lifted_blocks", "lifted_diagonal", "lifted_product", "repairs_of"]

Tensors = tuple[Tensor, ...]
WORTH = 0.7  # directions, as a part of the rows they serve for, beyond which rows are as good
COSTLY = 256 * MIB  # bytes that rows would write, below which no other route is weighed against them
DEARER = 5  # rows that cost as much as a direction through a graph of sites that is no chain
WORTH_A_PROOF = 128 * MIB  # bytes that rows would write, before a plain function is asked for its parts
PROOF = 12  # bytes that a proof takes at its peak for one of the intermediate results of f
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
_plans: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Discovery, int]]] = weakref.WeakKeyDictionary()
_certified: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()  # rows are right, whatever has changed


def lift(problem: Problem, args: Sequence[Any], argnums: Any, output: int, *, diagonal: bool = False) -> Lift | str:
    """How the Hessian (or its diagonal) of a risk is lifted, or why it is not: ``""`` for a function that is no risk.

    Args:
        problem: the function at a point.
        args: its arguments.
        argnums: those that are differentiated.
        output: bytes that the call allocates for its result.
    """
    is_risk = isinstance(problem.f, EmpiricalRisk)
    why_not = rows_only(problem, args, of_any_numbers=is_risk)
    why_not = why_not or ("" if fits(output, problem.space.device) else "the result would not fit")
    if not is_risk:
        rows = problem.space.dim * (problem.seen.saved + problem.seen.held / 32)  # products with data cost less for a byte
        return "" if why_not or rows < WORTH_A_PROOF or not problem.is_scalar else _of_plain(problem, args, output, diagonal)
    if argnums not in (0, (0,)):
        return "other arguments than the parameters are differentiated"
    if why_not:
        return why_not
    batch = tuple(args[1:])
    samples = samples_of(batch) if tensors_of(batch)[0] else loaded_samples(batch)
    if samples is None:
        return "the batches of the loader are of several kinds"
    return _of_risk(problem, samples, isinstance(argnums, tuple), output, diagonal)


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
    if is_traced() and kind not in _of_function(_plans, problem.f):
        return "the call is being traced, and was not made before"
    with untraced():
        return _planned(problem, problem.f, samples, at, output, None, kind)  # type: ignore[arg-type]


Asked = Callable[[Callable[[Sequence[Tensor]], Tensor], Tensors, Discovery], int]


def _planned(
    problem: Problem,
    risk: EmpiricalRisk,
    samples: Part,
    at: Callable[[Sequence[Tensor]], Any],
    output: int,
    parts_of: Asked | None,
    kind: Any,
) -> Lift | str:
    x, whole = problem.bound.x, parts_of is not None

    def loss(leaves: Sequence[Tensor]) -> Tensor:
        return risk.sample_loss(at(leaves), *samples.rebuild([t[0] for t in samples.tensors]))

    refused = _of_function(_refused, problem.f)
    if (kind, len(samples)) in refused:
        return refused[kind, len(samples)]
    plans = _of_function(_plans, problem.f)
    known, saved = plans.get(kind, (None, None))
    try:
        found, parts = _in_parts(loss, x, problem.space.sizes, parts_of or (lambda *_: 1), known)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if out_of_memory(error):
            raise
        return f"the loss could not be watched on one sample ({type(error).__name__}: {error})"
    if isinstance(found, str):
        return found
    saved = problem.seen.saved if whole else saved or bytes_of_a_sample(risk, at(x), samples)
    plans[kind] = found, saved
    plan = Lift(problem, risk, at, samples, found, parts, whole, _groups(found, x, parts), saved, output)
    reason = _not_worth(plan)
    if reason:
        refused[kind, len(samples)] = reason
        return reason
    if not fits(output + _working(plan), x[0].device):
        return f"lifting would work with {megabytes(_working(plan))} beside the result, and there is less"
    return _certify(plan, (kind, found.tracked, found.forbidden, parts)) or plan


def _not_worth(plan: Lift) -> str:
    """Why rows are no dearer, or ``""``."""
    if not plan.found.sites:
        return "no leaf enters through affine sites alone"
    directions, rows = plan.directions, plan.problem.space.dim
    if directions > WORTH * rows:
        return f"{directions:,} directions for {rows:,} rows do not pay"
    costly = plan.saved * len(plan.samples) * rows > COSTLY
    if costly and directions * DEARER > rows and not chained(plan):
        return f"{directions:,} directions through the whole function for {rows:,} rows do not pay"
    return ""


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


# ---------------------------------------------------------------------------------------------------- what comes of it


def lifted_blocks(plan: Lift, pairs: Collection[tuple[int, ...]], out: Tensor | None = None) -> dict[tuple[int, ...], Tensor]:
    """The blocks of the Hessian of the given pairs of leaves, in their shapes: contiguous, or views of an (n, n) ``out``."""
    space = plan.problem.space
    upper = {(min(pair), max(pair)) for pair in pairs}
    matrices = {(p, q): _matrix(plan, p, q, out) for p, q in upper}
    by_stages = chained(plan) and _held_once(plan, "pairs", _pairs_agree)
    count, of_samples = (samples_of_all_stages(plan), pairs_by_stages) if by_stages else (samples_at_once(plan), swept)

    def needed(s: Site, t: Site) -> bool:
        return any((min(p, q), max(p, q)) in upper for p in s.leaves for q in t.leaves)

    once = by_stages and _each_entry_once(plan)
    unmet = set(upper) if once else set()
    for matrix in [] if once else matrices.values():
        matrix.zero_()
    for number, part in enumerate(plan.samples.split(count)):
        for pair in of_samples(plan, part, needed):
            unmet -= put_pair(matrices, pair, add=number > 0 or not once)
    for where in unmet:
        matrices[where].zero_()
    for p, q in pairs:
        if p > q:
            matrices[p, q] = _matrix(plan, p, q, out).copy_(matrices[q, p].T)
    return {(p, q): space.shaped(matrices[p, q], p, q) for p, q in pairs}


def _each_entry_once(plan: Lift) -> bool:
    """Whether the pairs of some samples meet every entry of the blocks of two leaves exactly once, or none of them."""
    met = [entry for group in plan.groups for entry in group.entries]
    whole = all(e.lattice is not None and e.index.numel() == plan.x[e.leaf].numel() for e in met)
    return whole and len({e.leaf for e in met}) == len(met)


def _matrix(plan: Lift, p: int, q: int, out: Tensor | None) -> Tensor:
    space = plan.problem.space
    if out is None:
        return torch.empty(space.sizes[p], space.sizes[q], dtype=space.dtypes[p], device=space.devices[p])
    return out[space.offsets[p] :, space.offsets[q] :][: space.sizes[p], : space.sizes[q]]


def lifted_diagonal(plan: Lift) -> Tensors:
    """The diagonal of the Hessian, by leaf."""

    def needed(s: Site, t: Site) -> bool:
        return bool(s.leaves & t.leaves)

    if _goes_by_stages(plan):
        return _by_stages(plan)
    diagonal = [torch.zeros(t.numel(), dtype=t.dtype, device=t.device) for t in plan.x]
    for part in plan.samples.split(samples_at_once(plan)):
        for pair in swept(plan, part, needed):
            for leaf, where, values in diagonal_of(pair):
                diagonal[leaf].index_add_(0, where, values, alpha=1 if pair.same else 2)
    return tuple(d.view(t.shape) for d, t in zip(diagonal, plan.x, strict=True))


def _by_stages(plan: Lift) -> Tensors:
    diagonal = [torch.zeros(t.numel(), dtype=t.dtype, device=t.device) for t in plan.x]
    for part in plan.samples.split(samples_of_a_stage(plan)):
        for entry, values in diagonal_by_stages(plan, part):
            if entry.lattice is None:
                diagonal[entry.leaf].index_add_(0, entry.index.flatten(), values.flatten())
            else:
                start, down, right = entry.lattice
                diagonal[entry.leaf].as_strided(values.shape, (down, right), start).add_(values)
    return tuple(d.view(t.shape) for d, t in zip(diagonal, plan.x, strict=True))


def _goes_by_stages(plan: Lift) -> bool:
    """Whether the diagonal is that of a chain; the first time, an entry of every leaf is held to automatic differentiation.

    What its stages look at in every call is of these numbers, and nothing that could be written down for others.
    """
    return not is_traced() and chained(plan) and _held_once(plan, "diagonal", _entries_agree)


def _held_once(plan: Lift, what: str, agree: Callable[[Lift], bool]) -> bool:
    known = _of_function(_certified, plan.problem.f)
    key = (what, plan.samples.kind, plan.parts, plan.found.tracked, plan.found.forbidden)
    if key not in known:
        with untraced():
            known[key] = agree(_few(plan))
    return known[key]


def _pairs_agree(plan: Lift) -> bool:
    """Whether H v by the pairs of a chain, for a random v, is that of the sites."""
    v = _random(plan)
    V = {group.key: _at_entries(group, v) for group in plan.groups}
    mine = {key: torch.zeros_like(matrix) for key, matrix in V.items()}
    for part in plan.samples.split(samples_of_all_stages(plan)):
        for pair in pairs_by_stages(plan, part, lambda s, t: True):
            for key, added in zip((pair.s.key, pair.t.key), product_of(pair, V[pair.s.key], V[pair.t.key]), strict=True):
                mine[key] += added
    theirs = lifted_product(plan, v)
    return _off(_of_leaves(plan, mine), theirs) <= TOLERANCE[plan.x[0].dtype] * max(float(t.abs().max()) for t in theirs)


def _off(a: Tensors, b: Tensors) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True) if p.numel())


def _few(plan: Lift) -> Lift:
    return dataclasses.replace(plan, samples=plan.samples.holding(tuple(t[:32] for t in plan.samples.tensors)))


def _entries_agree(plan: Lift) -> bool:
    args, generator = plan.samples.rebuild(plan.samples.tensors), torch.Generator().manual_seed(0)
    diagonal = _by_stages(plan)
    size = max(float(d.abs().max()) for d in diagonal if d.numel())
    for leaf, d in enumerate(diagonal):
        if not d.numel():
            continue
        product = product_at(lambda *x: (plan.risk(plan.at(x), *args), None), plan.x, FORWARD_OVER_REVERSE, [leaf], [leaf])
        place = int(torch.randint(d.numel(), (), generator=generator))
        unit = torch.zeros_like(d).flatten()
        unit[place] = 1
        (column,) = product({leaf: unit.view(d.shape)})
        if not abs(float(column.flatten()[place] - d.flatten()[place])) <= TOLERANCE[d.dtype] * size:
            return False
    return True


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
    v = _random(plan)
    few = _few(plan)
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


def _random(plan: Lift) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in plan.x]


def _at_entries(group: Site, v: Sequence[Tensor]) -> Tensor:
    """The entries of v at a site, (out, width)."""
    return torch.cat([v[e.leaf].flatten()[e.index] for e in group.entries], 1)


def _of_leaves(plan: Lift, totals: Mapping[Any, Tensor]) -> Tensors:
    """Sums by group, (out, width), in the shapes of the leaves."""
    result = [torch.zeros(t.numel(), dtype=t.dtype, device=t.device) for t in plan.x]
    for group in plan.groups:
        for part, entry in group.slices():
            result[entry.leaf].index_add_(0, entry.index.flatten(), totals[group.key][:, part].flatten())
    return tuple(r.view(t.shape) for r, t in zip(result, plan.x, strict=True))


def lifted_product(plan: Lift, v: Sequence[Tensor]) -> Tensors:
    """H v by way of the sites: the derivative of g_s h_s^T in r at 0, where z_s moves by eps_s + r V_s h_s and g_s = dL/deps_s.

    V_s are the entries of v at a site.
    """
    keys = [group.key for group in plan.groups]
    zeros = tuple(plan.zeros(group, plan.samples) for group in plan.groups)
    matrices = {group.key: _at_entries(group, v) for group in plan.groups}
    one = plan.x[0].new_ones(1, 1, 1)

    def products(r: Tensor) -> tuple[Tensors, Tensors]:
        def loss(*eps: Tensor) -> tuple[Tensor, Any]:
            run = plan.run(plan.samples, dict(zip(keys, eps, strict=True)), lambda key: lambda h: r * (h @ matrices[key].T))
            return run.value, [run.features.get(key, one) for key in keys]

        (_, features), g = flat_value_and_grad(loss, zeros, verb="hessian")
        return tuple((a.mT @ h).sum(0) for a, h in zip(g, features, strict=True)), ()

    totals = flat_jvp(products, (one.new_zeros(()),), (one.new_ones(()),))[1]
    return _of_leaves(plan, dict(zip(keys, totals, strict=True)))


def repairs_of(plan: Lift) -> tuple[str, ...]:
    """The ops that are repaired when the plan is carried out."""
    with repaired(fresh=True) as used:
        lifted_product(dataclasses.replace(plan, samples=plan.samples.first()), plan.x)
    return tuple(sorted(used))
