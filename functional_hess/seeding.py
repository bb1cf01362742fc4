"""The loss as a function of perturbations at affine sites, for many samples at once, and its derivatives along seeds.

A :class:`Lift` says where every leaf of a risk is seeded: a site perturbs z_s by eps_s, every sample by its own; a direct leaf is
perturbed itself, by the same eps for all. :meth:`Lift.run` evaluates that, and :func:`swept` takes the second derivatives of
pairs of sites along one-hot seeds, which the samples share, in portions that fit the working set.

Samples are mapped over inside of everything: what is differentiated is one function of a batch, made of matrix products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import WORKING_SET
from functional_hess.contraction import Pair
from functional_hess.levels import flat_jvp, flat_value_and_grad, flat_vmap
from functional_hess.risk import EmpiricalRisk, Part
from functional_hess.rows import Problem
from functional_hess.sites import Discovery, Entry, Key, Lifted, Site

__all__ = ["DIRECTIONS", "Lift", "Run", "Wanted", "samples_at_once", "swept"]

Tensors = tuple[Tensor, ...]
DIRECTIONS = 64  # at once


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation: the scaled sum of losses; by site the features (copies, positions, width) and the output, where kept."""

    value: Tensor
    features: dict[Key, Tensor]
    outputs: dict[Key, Tensor]


@dataclasses.dataclass(frozen=True)
class Lift:
    """Where every leaf of a risk at a point is seeded. ``groups``: direct leaves, then sites, each after what it reads.

    The positions of a site fall into copies that do not read each other, the samples of a risk or the ``parts`` of a function
    that is one ``whole``; the site in ``groups`` has the positions of one copy.
    """

    problem: Problem
    risk: EmpiricalRisk
    at: Callable[[Sequence[Tensor]], Any]
    samples: Part
    found: Discovery
    parts: int
    whole: bool
    groups: tuple[Site, ...]
    saved: int
    output: int

    @property
    def x(self) -> Tensors:
        return self.problem.bound.x

    @property
    def directions(self) -> int:
        return sum(group.size for group in self.groups)

    def is_site(self, group: Site) -> bool:
        return group.key in self.found.reads

    def zeros(self, group: Site, samples: Part) -> Tensor:
        """No perturbation, of all copies."""
        copies = 1 if not self.is_site(group) else self.parts if self.whole else len(samples)
        return self.x[0].new_zeros(copies, *group.units.shape)

    @property
    def at_once(self) -> int:
        """How many directions of one sample fit the working set."""
        kept = sum(self.parts * (g.size + g.positions * g.width) for g in self.groups) * self.x[0].element_size()
        return max(1, min(DIRECTIONS, int(WORKING_SET / (3 * self.saved + kept + 1))))

    @property
    def scale(self) -> float:
        return 1 / len(self.samples) if self.risk.reduction == "mean" else 1.0

    def run(
        self,
        samples: Part,
        eps: Mapping[Key, Tensor],
        moves: Callable[[Key], Any] | None = None,
        severed: Mapping[Key, Tensor] = MappingProxyType({}),
        *,
        apart: bool = False,
        outputs: Collection[Key] = (),
        features: Collection[Key] | None = None,
    ) -> Run:
        """The loss with perturbations by group.

        Args:
            samples: some of the samples.
            eps: the perturbations, shaped as :meth:`zeros`.
            moves: gives for a group what is added to its perturbation, as a function of the features.
            severed: tensors, shaped as :meth:`zeros`, with which sites go on (:class:`functional_hess.sites.Lifted`).
            apart: every sample perturbs the direct leaves by its own, too.
            outputs: the sites whose output is wanted.
            features: the sites whose features are wanted; by default all.
        """
        leaves = [("leaf", k) for k in self.found.direct if ("leaf", k) in eps]
        shifted = [*(site.key for site in self.found.sites if site.key in eps), *(leaves if apart else [])]
        copies = (*(eps[key] for key in shifted), *severed.values())
        shared = {} if apart else {name: eps[name][0] for name in leaves}
        wanted = [site.key for site in self.found.sites] if features is None else features
        met: list[tuple[Key, str]] = []

        def moved(key: Key, e: Tensor) -> Any:
            move = moves and moves(key)
            return (lambda h: e + move(h)) if move else e

        def of_copy(*given: Tensor) -> Tensors:
            x = [t.view_as(t) for t in self.x]  # an alias each, so that a tensor in two leaves is two
            shifts = {key: moved(key, e) for key, e in (*zip(shifted, given, strict=False), *shared.items())}
            for name in leaves:
                shift: Any = shifts.pop(name)
                shift = shift(x[name[1]].new_ones(1, 1)) if callable(shift) else shift
                x[name[1]] = x[name[1]] + shift.view(x[name[1]].shape)
            cut = dict(zip(severed, given[len(shifted) :], strict=False))
            with Lifted(x, self.found, shifts, cut, outputs=outputs, features=features) as run:
                value = self.risk.sample_loss(self.at(x), *samples.rebuild(given[len(copies) :]))
            shown = {key: parts for key, parts in run.features.items() if parts and key in wanted}
            met[:] = [*((key, "h") for key in shown), *((key, "z") for key in run.kept)]
            h = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in shown.values())
            return value, *h, *run.kept.values()

        if self.whole:
            value, *found = of_copy(*(t.flatten(0, 1) for t in copies), *(t[0] for t in samples.tensors))
            found = [t.unflatten(0, (self.parts, -1)) for t in found]
        else:
            values, *found = flat_vmap(of_copy)(*copies, *samples.tensors)
            value = values.sum()
        by_name = dict(zip(met, found, strict=True))
        h, z = ({key: t for (key, what), t in by_name.items() if what == which} for which in "hz")
        return Run(value * self.scale, h, z)


def samples_at_once(plan: Lift) -> int:
    """So many that a chunk of directions fits the working set."""
    largest = max((_step(g, plan.at_once) for g in plan.groups if g.positions > 1), default=1)
    width = max(min(plan.at_once, plan.directions), largest)
    item = plan.x[0].element_size()
    kept = sum((g.size + g.positions * g.width) * item for g in plan.groups)
    return max(1, int(WORKING_SET / (width * (3 * plan.saved + kept) + 1)))


# ---------------------------------------------------------------------------------------------------- seeds


Wanted = Callable[[Site, Site], bool]


def swept(plan: Lift, samples: Part, wanted: Wanted) -> Iterator[Pair]:
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
    plan: Lift, samples: Part, now: range, targets: Sequence[int], rows: range, count: int, wanted: Wanted
) -> Iterator[Pair]:
    groups, like = plan.groups, plan.x[0]
    moved = {groups[t].key for t in now}
    zeros = [plan.zeros(groups[t], samples) for t in targets]
    names = [groups[t].key for t in targets]
    reads = {t: plan.is_site(groups[t]) and bool(plan.found.reads[groups[t].key] & moved) for t in targets}
    dependent = [groups[t].key for t in targets if reads[t]]
    used = list(dict.fromkeys(groups[t].key for t in (*now, *targets) if plan.is_site(groups[t])))

    def along(*v: Tensor) -> Tensors:
        def gradient(*head: Tensor) -> tuple[Tensors, Tensors]:
            def loss(*eps: Tensor) -> tuple[Tensor, Any]:
                run = plan.run(samples, dict(zip(names, eps, strict=True)))
                return run.value, ([run.features[k] for k in dependent], [run.features[k] for k in used])

            (_, (changing, fixed)), g = flat_value_and_grad(loss, (*head, *zeros[len(now) :]), verb="hessian")
            return (*g, *changing), tuple(fixed)

        everywhere = tuple(u.repeat(len(zero), 1, 1) for zero, u in zip(zeros, v, strict=False))
        outputs, tangents, fixed = flat_jvp(gradient, tuple(zeros[: len(now)]), everywhere)
        return (*outputs[: len(targets)], *tangents, *fixed)

    eye = torch.eye(count, dtype=like.dtype, device=like.device)[rows.start : rows.stop]
    units = eye.split([groups[s].size for s in now], 1)
    every = flat_vmap(along)(*(part.reshape(len(rows), *groups[s].units.shape) for s, part in zip(now, units, strict=True)))
    m, d = len(targets), len(dependent)
    g, A = [e[0] for e in every[:m]], every[m : 2 * m]
    D = dict(zip(dependent, every[2 * m : 2 * m + d], strict=True))
    features = {key: f[0] for key, f in zip(used, every[2 * m + d :], strict=True)}
    first = 0

    def features_of(s: int, count: int) -> Tensor:
        """(n, positions, f), where a direct leaf has feature 1 for all samples."""
        found = features.get(groups[s].key)
        return like.new_ones(count, 1, 1) if found is None else found

    for s in now:
        begin, end = max(first, rows.start) - rows.start, min(first + groups[s].size, rows.stop) - rows.start
        for i, t in enumerate(targets):
            if t < s or end <= begin or not wanted(groups[s], groups[t]):
                continue
            here = range(begin + rows.start - first, end + rows.start - first)
            part, positions = _cut(groups[s], here)
            hs, ht = features_of(s, len(g[i]))[:, positions], features_of(t, len(g[i]))
            d = D[groups[t].key][begin:end].unflatten(0, part.units.shape) if reads[t] and t > s else None
            yield Pair(part, groups[t], s == t, hs, A[i][begin:end].unflatten(0, part.units.shape), ht, g[i], d)
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
