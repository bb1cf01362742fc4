"""Curvature stage by stage, where each affine site is read by the next one alone; of the diagonal, in few columns.

In a chain of sites, z_t is a function Phi_t of z_s, the site before it, and of the direct leaves that enter there. With
J = dz_t/dz_s and g_t = dL/dz_t, the Hessian of the loss of a sample in z_s is

    A_s = J^T A_t J + R_s,        R_s = sum_k g_t[k] d2 Phi_t[k] / dz_s^2,

from the last site, whose A is that of the loss, to the first. Where Phi_t acts on each unit by itself R_s is diagonal, whatever
follows, and one direction shows it. So A_s is a sum of terms V^T M V with few columns V, as many as the loss has inputs, and a
diagonal, which becomes columns only at the next site. Dangel, Kunstner and Hennig (2020) have this for layers of known type.

That R_s is diagonal is not assumed: in every call it is held, for every sample, to three random directions whose entries are
powers of two, for which equality is exact but for the order of sums. Where it fails all of R_s is computed. J is W_t times the
derivative of the features of t in z_s, which is held to the same directions: where that is diagonal no column is differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import WORKING_SET
from functional_hess.contraction import Pair
from functional_hess.levels import flat_jvp, flat_value_and_grad, flat_vjp, flat_vmap
from functional_hess.nesting import is_traced
from functional_hess.risk import Part
from functional_hess.seeding import DIRECTIONS, Lift, Wanted
from functional_hess.sites import Entry, Key, Site

__all__ = ["chained", "diagonal_by_stages", "pairs_by_stages", "samples_of_a_stage", "samples_of_all_stages"]

Tensors = tuple[Tensor, ...]
Contribution = tuple[Entry, Tensor]
PROBES = 3  # random directions
MANY_COLUMNS = 2  # times the units
SLACK = 64  # times eps: two ways to the same number


def chained(plan: Lift) -> bool:
    """Whether every site is read by the next alone, every direct leaf enters at one of them, and every leaf is at one site."""
    found, before = plan.found, None
    keys = {site.key for site in found.sites}
    for key in (*(site.key for site in found.sites), None):
        if found.inputs[key] & keys != ({before} if before is not None else set()):
            return False
        before = key
    entered = [name for names in found.inputs.values() for name in names if name not in keys]
    placed = [entry.leaf for site in found.sites for entry in site.entries]
    return all(len(set(each)) == len(each) for each in (entered, placed))


def samples_of_a_stage(plan: Lift) -> int:
    """So many that what a stage makes fits the working set."""
    sites = _sites(plan)
    stages = [min(t.size, s.size) * (t.size + 4 * max(s.size, t.width)) for s, t in itertools.pairwise(sites)]
    last = sites[-1].size * (sites[-1].size + 3 * sites[-1].size)
    kept = max([last, *stages]) + sum(site.positions * site.width + 4 * site.size for site in sites)
    return max(1, int(WORKING_SET / (kept * plan.x[0].element_size() + 3 * (PROBES + 1) * plan.saved)))


def _sites(plan: Lift) -> list[Site]:
    return [group for group in plan.groups if plan.is_site(group)]


# ---------------------------------------------------------------------------------------------------- curvature at a site


@dataclasses.dataclass(frozen=True)
class Term:
    """V^T M V of N samples, V = columns * scale: ``core`` (N, c, c), or (N, c) where M is diagonal, ``scale`` (N, u) or 1.

    ``columns`` are (c, N, u), or (c, 1, u) where the samples share them, or ``None`` for the unit matrix.
    """

    columns: Tensor | None
    core: Tensor
    scale: Tensor | None = None

    @property
    def count(self) -> int:
        return self.core.shape[1]

    def spread(self) -> Tensor:
        """V (c, N, u), for columns that are no unit matrix."""
        assert self.columns is not None
        V = self.columns if self.scale is None else self.columns * self.scale
        return V.expand(-1, len(self.core), -1)

    def times(self, V: Tensor) -> Tensor:
        """M V for V of shape (c, N, ...)."""
        if self.core.dim() == 2:
            return self.core.T.reshape(*V.shape[:2], *[1] * (V.dim() - 2)) * V
        return (self.core @ V.transpose(0, 1).flatten(2)).transpose(0, 1).reshape(V.shape)

    def dense(self) -> Tensor:
        """(N, u, u)"""
        if self.columns is None:
            return torch.diag_embed(self.core) if self.core.dim() == 2 else self.core
        if self.scale is None:
            V = self.spread().transpose(0, 1)
            return V.mT @ (self.core[..., None] * V if self.core.dim() == 2 else self.core @ V)
        C = self.columns[:, 0]
        half = self.core[..., None] * C if self.core.dim() == 2 else self.core @ C
        return self.scale[:, :, None] * (half.mT @ C) * self.scale[:, None]

    def diagonal(self) -> Tensor:
        """(N, u)"""
        if self.columns is None:
            return self.core if self.core.dim() == 2 else self.core.diagonal(dim1=1, dim2=2)
        if self.scale is None:
            V = self.spread()
            return (V * self.times(V)).sum(0)
        C = self.columns[:, 0]
        return self.scale.square() * (self.core @ C.square() if self.core.dim() == 2 else ((self.core @ C) * C).sum(1))


def _united(terms: Sequence[Term], units: int) -> list[Term]:
    """The same sum, as one matrix where its columns are so many that to make one costs less than to take them on."""
    columns = sum(term.count for term in terms if term.columns is not None)
    matrices = [term for term in terms if term.columns is None and term.core.dim() == 3]
    if columns < MANY_COLUMNS * units and not (matrices and len(terms) > 1):
        return list(terms)
    total = terms[0].dense().clone()
    for term in terms[1:]:
        if term.columns is None and term.core.dim() == 2:
            total.diagonal(dim1=1, dim2=2).add_(term.core)
        else:
            total += term.dense()
    return [Term(None, total)]


def _diagonal_of(terms: Sequence[Term], h: Tensor, units: int) -> Tensor:
    """sum over n, a, b of h[n,a,j] A[n,(a,i),(b,i)] h[n,b,j] -> (i, j), where A is the sum of terms, a, b run over positions."""
    if h.shape[1] == 1:
        return functools.reduce(torch.add, [term.diagonal() for term in terms]).T @ h[:, 0].square()
    return functools.reduce(torch.add, [_over_positions(term, h, units) for term in terms])


def _over_positions(term: Term, h: Tensor, units: int) -> Tensor:
    N, S, J = h.shape
    if term.columns is None and term.core.dim() == 2:
        return term.core.reshape(N * S, units).T @ h.reshape(N * S, J).square()
    if term.columns is None:
        within = term.core.view(N, S, units, S, units).diagonal(0, 2, 4)  # (n, a, b, i)
        return torch.einsum("nabi,naj,nbj->ij", within, h, h)
    y = term.spread().reshape(-1, N, S, units).mT @ h  # (c, n, i, j)
    return (y * term.times(y)).sum((0, 1))


# ---------------------------------------------------------------------------------------------------- a stage


Reading = tuple[Key, str]  # "h", the features of a site, or "z", its output; of None, the loss


@dataclasses.dataclass(frozen=True)
class _Stages:
    """A chain at a point, for some samples: outputs z, features h and gradients g of its sites.

    ``flat`` are those of one position whose output is W h, no more: what goes back to h is shared by the samples.
    """

    plan: Lift
    samples: Part
    z: dict[Key, Tensor]
    h: dict[Key, Tensor]
    g: dict[Key, Tensor]
    flat: frozenset[Key]

    @classmethod
    def of(cls, plan: Lift, samples: Part) -> _Stages:
        sites = _sites(plan)
        keys = [site.key for site in sites]

        def loss(*eps: Tensor) -> tuple[Tensor, Any]:
            run = plan.run(samples, dict(zip(keys, eps, strict=True)), outputs=keys)
            return run.value, (run.features, run.outputs)

        (_, (h, z)), g = flat_value_and_grad(loss, tuple(plan.zeros(s, samples) for s in sites), verb="hessian_diagonal")
        flat = frozenset(s.key for s in sites if s.positions == 1 and s.key not in plan.found.beside)
        return cls(plan, samples, z, h, dict(zip(keys, g, strict=True)), flat)

    def read(self, readings: Sequence[Reading], variables: Mapping[Key, Tensor]) -> Tensors:
        """What stands at ``readings`` if outputs of sites, or perturbations of direct leaves, are ``variables``."""
        reads = self.plan.found.reads
        run = self.plan.run(
            self.samples,
            {name: t for name, t in variables.items() if name not in reads},
            severed=self.z | {name: t for name, t in variables.items() if name in reads},
            outputs=[key for key, what in readings if key is not None and what == "z"],
            features=[key for key, what in readings if key is not None and what == "h"],
        )
        found = {"z": run.outputs, "h": run.features}
        return tuple(run.value if key is None else found[what][key] for key, what in readings)

    def reading(self, key: Key) -> Reading:
        """What is read of a site by the one before it; see :attr:`flat`."""
        return key, "h" if key in self.flat else "z"

    def cotangent(self, reading: Reading) -> Tensor:
        """The derivative of the loss in what is read."""
        key, what = reading
        if key is None:
            return self.plan.x[0].new_ones(())
        return self.g[key] @ self.matrix(key) if what == "h" else self.g[key]

    def pushed(
        self, names: Sequence[Key], paired: Sequence[Reading], seeds: Sequence[Tensor], kept: Sequence[Reading] = ()
    ) -> Tensors:
        """Derivatives along stacked seeds of ``names``, outputs of sites or perturbations of direct leaves.

        First those of the gradients of what is ``paired`` with its cotangents, then those of all that is read, ``kept`` too.
        """
        cotangents = tuple(map(self.cotangent, paired))

        def gradients(*variables: Tensor) -> tuple[Tensors, Tensors]:
            def found(*variables: Tensor) -> tuple[Tensors, Tensors]:
                seen = self.read([*paired, *kept], dict(zip(names, variables, strict=True)))
                return seen[: len(paired)], seen[len(paired) :]

            seen, pull, others = flat_vjp(found, variables)
            return (*pull(cotangents), *seen, *others), ()

        at = tuple(self.z[name] if name in self.z else self.zeros(name) for name in names)
        copies = 1 if self.plan.whole else len(self.samples)
        step = max(1, int(WORKING_SET / (3 * self.plan.saved * copies + 1)))
        along = flat_vmap(lambda *v: flat_jvp(gradients, at, v)[1])
        parts = [along(*some) for some in zip(*(seed.split(step) for seed in seeds), strict=True)]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def zeros(self, name: Key) -> Tensor:
        return self.plan.zeros(next(group for group in self.plan.groups if group.key == name), self.samples)

    def units(self, name: Key) -> Tensor:
        """One-hot seeds (size, copies, positions, out), the same for all samples."""
        zero = self.zeros(name)
        eye = torch.eye(zero[0].numel(), dtype=zero.dtype, device=zero.device)
        return eye.view(-1, 1, *zero.shape[1:]).expand(-1, *zero.shape).contiguous()

    def residuals(self, sites: Sequence[Site]) -> tuple[list[Term | None], list[Tensor | None]]:
        """Of each site but the last R, by one direction where it is diagonal, ``None`` where it vanishes.

        And the diagonal (N, u) of dh/dz, h the features that are read there, if nothing else differs from zero.
        """
        names, readings = [site.key for site in sites[:-1]], [self.reading(site.key) for site in sites[1:]]
        seeds = [_probes(self.z[name]) for name in names]
        moved = self.pushed(names, readings, seeds) if names else ()
        found: list[Term | None] = []
        slopes: list[Tensor | None] = []
        for name, reading, seed, along, read in zip(names, readings, seeds, moved, moved[len(names) :], strict=False):
            if _acts_by_unit(along, seed):
                found.append(Term(None, along[0].flatten(1)) if bool(along[0].any()) else None)
            else:
                R = self.pushed([name], [reading], [self.units(name)])[0]
                found.append(Term(None, R.flatten(2).transpose(0, 1)))
            slopes.append(_slope(read.flatten(2), seed.flatten(2)) if reading[1] == "h" else None)
        return found, slopes

    def pulled(self, term: Term, s: Site, t: Site, slope: Tensor | None) -> Term:
        """A term at t as one at s, the site before it: the same with columns V J, where J may have a diagonal ``slope``."""
        columns = self._at_reading(term, t)
        if slope is None:
            zero = self.z[s.key]
            _, pull, _ = flat_vjp(lambda z: (self.read([self.reading(t.key)], {s.key: z}), ()), (zero,))
            cotangents = columns.expand(-1, len(zero), -1).unflatten(-1, (t.positions, -1))
            return Term(flat_vmap(lambda v: pull((v,)))(cotangents)[0].flatten(2), term.core)
        columns = columns[..., : s.size]
        return Term(columns, term.core, slope) if columns.shape[1] == 1 else Term(columns * slope, term.core)

    def _at_reading(self, term: Term, t: Site) -> Tensor:
        """The columns of a term at t as those of what is read there, (c, N, w) or (c, 1, w)."""
        if term.columns is None:
            W = self.matrix(t.key) if t.key in self.flat else torch.eye(t.size, dtype=term.core.dtype, device=term.core.device)
            return W[:, None]
        V = term.spread() if term.scale is not None else term.columns
        return V @ self.matrix(t.key) if t.key in self.flat else V

    def matrix(self, key: Key) -> Tensor:
        """W of a site, (out, width)."""
        site = next(site for site in self.plan.groups if site.key == key)
        return torch.cat([self.plan.x[entry.leaf].flatten()[entry.index] for entry in site.entries], 1)


def _probes(z: Tensor) -> Tensor:
    """Ones, and directions whose entries are random powers of two: products with them are exact. No two samples have the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (PROBES, len(z) + z[0].numel() - 1)
    powers = torch.randint(-16, 16, shape, generator=generator)
    signs = 2 * torch.randint(2, shape, generator=generator) - 1
    drawn = (signs * torch.exp2(powers.float())).to(z)
    return torch.cat([torch.ones_like(z)[None], drawn.unfold(1, z[0].numel(), 1).reshape(PROBES, *z.shape)])


def _acts_by_unit(along: Tensor, seed: Tensor) -> bool:
    """Whether a matrix whose products with probes are ``along`` is diagonal, for every sample."""
    ones, others = along[0], along[1:]
    off = (others - seed[1:] * ones).abs() / seed[1:].abs()
    return bool(off.max() <= SLACK * torch.finfo(ones.dtype).eps * ones.abs().max())


def _slope(along: Tensor, seed: Tensor) -> Tensor | None:
    """The diagonal of dh/dz from its products with probes, if h has a feature for each unit and nothing else that moves."""
    u = seed.shape[-1]
    alike = along.shape[-1] >= u and _acts_by_unit(along[..., :u], seed) and not bool(along[..., u:].any())
    return along[0, :, :u] if alike else None


# ---------------------------------------------------------------------------------------------------- all stages


def diagonal_by_stages(plan: Lift, samples: Part) -> Iterator[Contribution]:
    """What some samples add to the diagonal of the Hessian: entries, and values at these; the plan must be :func:`chained`."""
    sites, inputs = _sites(plan), plan.found.inputs
    stages = _Stages.of(plan, samples)
    last = sites[-1]
    A = stages.pushed([last.key], [(None, "")], [stages.units(last.key)])[0]
    terms = [Term(None, A.flatten(2).transpose(0, 1))]
    residuals, slopes = stages.residuals(sites)
    yield from _of_direct(stages, None, [], inputs[None])
    for number in reversed(range(len(sites))):
        site = sites[number]
        values = _diagonal_of(terms, stages.h[site.key], site.out)
        for part, entry in site.slices():
            yield entry, values[:, part]
        if number or any(name not in plan.found.reads for name in inputs[site.key]):
            terms = _united(terms, site.size)
        yield from _of_direct(stages, site, terms, inputs[site.key])
        if number:
            before, residual = sites[number - 1], residuals[number - 1]
            terms = [stages.pulled(term, before, site, slopes[number - 1]) for term in terms]
            terms += [residual] if residual else []


def _of_direct(stages: _Stages, site: Site | None, terms: Sequence[Term], inputs: Any) -> Iterator[Contribution]:
    """The direct leaves that enter at a site, or in the loss: J^T A J + R, along every coordinate."""
    for name in sorted(name for name in inputs if name not in stages.plan.found.reads):
        R, *J = stages.pushed([name], [(site and site.key, "z")], [stages.units(name)])
        values = R.flatten(1).diagonal()
        for moved in J if site else ():
            z = moved.flatten(2).permute(2, 1, 0)  # (unit, n, coordinate)
            for term in terms:
                y = z if term.columns is None else torch.einsum("unm,cnu->cnm", z, term.spread())
                values = values + (y * term.times(y)).sum((0, 1))
        group = next(group for group in stages.plan.groups if group.key == name)
        (entry,) = group.entries
        yield entry, values.view(entry.index.shape)


# ---------------------------------------------------------------------------------------------------- all pairs


def pairs_by_stages(plan: Lift, samples: Part, wanted: Wanted) -> Iterator[Pair]:
    """All pairs s <= t that are wanted: seeds go no farther than the next site, matrix products the rest of the way."""
    stages = _Stages.of(plan, samples)
    A: dict[tuple[Key, Key], Tensor] = {}
    D: dict[tuple[Key, Key], Tensor] = {}
    slopes: dict[tuple[Key, Key], Tensor | None] = {}
    done: list[Key] = []
    for (t, names), (R, J, own) in reversed(_local(stages)):
        for a in names:
            for u in done if t is not None else ():
                A[a, u] = J[a].mT @ A[t, u]
                A[u, a] = A[a, u].mT
                if (u, t) in D:
                    D[u, a] = D[u, t] @ J[a][:, None]
        for i, a in enumerate(names):
            for b in names[i:]:
                A[a, b] = R[a, b] if t is None else _added(J[a].mT @ A[t, t] @ J[b], R[a, b])
                A[b, a] = A[a, b].mT
            if t is not None:
                D[t, a] = own[a]
                slopes[t, a] = _unit_by_unit(own[a])
        done += names
    yield from _pairs(stages, A, D, slopes, wanted)


def _unit_by_unit(D: Tensor) -> Tensor | None:
    """The diagonal (n, v) of dh/deps (n, positions, f, v), if there is one position and no unit moves another feature.

    A trace, which goes on to other numbers, does not look.
    """
    if is_traced() or D.shape[1] > 1 or D.shape[2] < D.shape[3]:
        return None
    rest = D[:, 0].clone()
    diagonal = rest.diagonal(0, 1, 2).clone()
    rest.diagonal(0, 1, 2).zero_()
    return None if bool(rest.any()) else diagonal


def _added(curvature: Tensor, R: Tensor) -> Tensor:
    """What two direct leaves have in common is summed over the samples already."""
    return (curvature if len(curvature) == len(R) else curvature.sum(0, keepdim=True)) + R


def _local(stages: _Stages) -> list[tuple[tuple[Key, list[Key]], _Local]]:
    """The derivatives of every stage; those of few directions are taken side by side."""
    entering = _entering(stages.plan)
    size = [sum(stages.zeros(name)[0].numel() for name in names) for _, names in entering]
    found: list[_Local] = []
    for small, group in itertools.groupby(range(len(entering)), lambda i: size[i] <= DIRECTIONS):
        together = [entering[i] for i in group]
        for some in [together] if small else [[one] for one in together]:
            found += _side_by_side(stages, some)
    return list(zip(entering, found, strict=True))


def _entering(plan: Lift) -> list[tuple[Key, list[Key]]]:
    """What is perturbed just before each site, and before the loss, ``None``: direct leaves, and the site before."""
    before: list[Key] = []
    found = []
    for t in (*(site.key for site in _sites(plan)), None):
        names = [*sorted(name for name in plan.found.inputs[t] if name not in plan.found.reads), *before]
        before = [t]
        found += [(t, names)] if names else []
    return found


_Local = tuple[dict[tuple[Key, Key], Tensor], dict[Key, Tensor], dict[Key, Tensor]]


def _side_by_side(stages: _Stages, entering: Sequence[tuple[Key, list[Key]]]) -> Iterator[_Local]:
    """Of what enters at each t: R by pairs (n, u, v), dz/deps (n, u, v), dh/deps (n, positions, f, v).

    No stage reads what enters at another, so all of them share directions.
    """
    zeros = {name: stages.zeros(name) for _, names in entering for name in names}
    sizes = [[zeros[name][0].numel() for name in names] for _, names in entering]
    seeds: list[Tensor] = []
    for (_, names), of in zip(entering, sizes, strict=True):
        eye = torch.eye(max(map(sum, sizes)), sum(of), dtype=zeros[names[0]].dtype, device=zeros[names[0]].device)
        for zero, part in zip((zeros[name] for name in names), eye.split(of, 1), strict=True):
            seeds.append(part.reshape(-1, 1, *zero.shape[1:]).expand(-1, *zero.shape).contiguous())
    readers = [t for t, _ in entering]
    read = [t for t in readers if t is not None]
    moved = iter(stages.pushed(list(zeros), [(t, "z") for t in readers], seeds, [(t, "h") for t in read]))
    gradients, outputs, features = (dict(zip(keys, moved, strict=False)) for keys in (zeros, readers, read))
    for (t, names), of in zip(entering, sizes, strict=True):

        def rows(m: Tensor, names: list[Key] = names, of: list[int] = of) -> dict[Key, Tensor]:
            return dict(zip(names, m[: sum(of)].split(of), strict=True))

        R = {(a, b): rows(gradients[b])[a].flatten(2).transpose(0, 1) for i, a in enumerate(names) for b in names[i:]}
        J = {a: m.flatten(2).permute(1, 2, 0) for a, m in rows(outputs[t]).items()} if t in features else {}
        yield R, J, {a: m.permute(1, 2, 3, 0) for a, m in rows(features[t]).items()} if t in features else {}


def _pairs(
    stages: _Stages, A: dict[Any, Tensor], D: dict[Any, Tensor], slopes: dict[Any, Tensor | None], wanted: Wanted
) -> Iterator[Pair]:
    plan = stages.plan
    groups = [group for group in plan.groups if (group.key, group.key) in A]
    for i, s in enumerate(groups):
        for t in (t for t in groups[i:] if wanted(s, t)):
            both = A[s.key, t.key]
            one = both.new_ones(len(both), 1, 1)
            slope = slopes.get((t.key, s.key)) if s.positions == 1 else None
            d = D.get((t.key, s.key)) if slope is None else None
            yield Pair(
                s,
                t,
                s is t,
                stages.h[s.key] if plan.is_site(s) else one,
                both.view(-1, *s.units.shape, *t.units.shape).permute(1, 2, 0, 3, 4),
                stages.h[t.key] if plan.is_site(t) else one,
                stages.g[t.key] if plan.is_site(t) else one,
                None if d is None else d.permute(3, 0, 1, 2).unflatten(0, s.units.shape),
                slope,
            )


def samples_of_all_stages(plan: Lift) -> int:
    """So many that all pairs of their sites fit the working set."""
    units = plan.directions
    features = sum(site.positions * site.width for site in _sites(plan))
    return max(1, int(WORKING_SET / (units * (units + features) * plan.x[0].element_size() + 3 * plan.saved)))
