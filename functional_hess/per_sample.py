"""Per-sample gradients of a risk, and their norms.

For a risk R(p) = (1/N) sum_n l(p, X[n], y[n]), these are the gradients of l(., X[n], y[n]), one for each sample. A parameter that
enters at affine sites z_s = W h_s alone (:mod:`functional_hess.sites`) has the gradient

    G_n = sum over sites and positions a of  g[n,a] h[n,a]^T,        g = dl/dz,

so that the norm needs no more than the factors (Goodfellow 2015, for layers whose samples have one position):

    |G_n|^2 = sum over a, b of  (g[n,a] . g[n,b]) (h[n,a] . h[n,b]).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import WORKING_SET
from functional_hess.guards import missing_rule, out_of_memory
from functional_hess.levels import flat_value_and_grad, flat_vmap
from functional_hess.nesting import derived_from
from functional_hess.risk import EmpiricalRisk, Part, bytes_of_a_sample, samples_of
from functional_hess.rows import Options, Problem, look, rows_only
from functional_hess.seeding import Lift
from functional_hess.sites import Discovery, SitesChanged, find_sites

__all__ = ["sample_gradient_norms", "sample_gradients"]

Tree = Any
Tensors = tuple[Tensor, ...]
AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-3}
_agreed: weakref.WeakKeyDictionary[EmpiricalRisk, dict[Any, bool]] = weakref.WeakKeyDictionary()


def sample_gradients(risk: EmpiricalRisk) -> Callable[..., Tree]:
    """The gradient of the loss of every sample: a tree like the parameters, with a first dimension that counts samples.

    Args:
        risk: made by :func:`~functional_hess.risk.empirical_risk`.

    Returns:
        a function of ``(params, *batch)``, whose leaves have shape ``(N, *params[p].shape)`` and ``None`` stands at carried ones.
        They are gradients of the loss of one sample: neither ``reduction`` divides them. Costs about one gradient of the risk;
        beside the result it holds those of a microbatch.

    Raises:
        TypeError: ``risk`` is no risk, or the batch holds no tensors.
        DependenceError: the loss does not depend on the parameters.

    Example:
        Least squares, (x . w - y)^2 with the gradient 2 (x . w - y) x:

        >>> import torch
        >>> from functional_hess import empirical_risk
        >>> risk = empirical_risk(lambda w, x, y: (x @ w - y) ** 2)
        >>> X, y = torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 3.0])
        >>> sample_gradients(risk)(torch.zeros(2), X, y)
        tensor([[ -2.,  -2.],
                [ -6., -12.]])
    """
    _require_risk("sample_gradients", risk)

    @derived_from(risk.sample_loss)
    def transformed(params: Tree, *batch: Any) -> Tree:
        problem = look("sample_gradients", risk, (params, *batch), {}, 0, Options())
        samples = samples_of(batch)
        parts = [_gradients(problem, risk, part) for part in samples.split(_at_once(problem, risk, samples))]
        return problem.space.unpack(list(map(torch.cat, zip(*parts, strict=True))))

    return transformed


def sample_gradient_norms(risk: EmpiricalRisk) -> Callable[..., Tensor]:
    """The Euclidean norm of the gradient of the loss of every sample, over all parameters together.

    Args:
        risk: made by :func:`~functional_hess.risk.empirical_risk`.

    Returns:
        a function of ``(params, *batch)`` that gives a tensor of shape ``(N,)``. Where parameters enter through linear layers,
        matrix products, convolutions or embeddings their gradients are not formed, unless those of a sample take less than its
        positions with each other; costs about one gradient of the risk, and the memory of a microbatch. Under another transform,
        and where an argument requires grad, gradients are formed, a microbatch at a time.

    Raises:
        TypeError: ``risk`` is no risk, or the batch holds no tensors.
        DependenceError: the loss does not depend on the parameters.

    Example:
        >>> import torch
        >>> from functional_hess import empirical_risk
        >>> risk = empirical_risk(lambda w, x, y: (x @ w - y) ** 2)
        >>> X, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 3.0])
        >>> sample_gradient_norms(risk)(torch.zeros(2), X, y)
        tensor([ 2., 12.])
    """
    _require_risk("sample_gradient_norms", risk)

    @derived_from(risk.sample_loss)
    def transformed(params: Tree, *batch: Any) -> Tensor:
        problem = look("sample_gradient_norms", risk, (params, *batch), {}, 0, Options())
        samples = samples_of(batch)
        plan = None if rows_only(problem, (params, *batch)) else _factors(problem, risk, samples)
        if plan is None:
            parts = samples.split(_at_once(problem, risk, samples))
            return torch.cat([_norms_of_gradients(_gradients(problem, risk, part)) for part in parts])
        return torch.cat([_norms_of_factors(plan, part) for part in samples.split(_factors_at_once(plan))])

    return transformed


def _require_risk(verb: str, risk: Any) -> None:
    if not isinstance(risk, EmpiricalRisk):
        raise TypeError(
            f"{verb}: risk must be made by empirical_risk, got {type(risk).__name__}. Write the loss of one sample and pass "
            "empirical_risk(loss)."
        )


# ---------------------------------------------------------------------------------------------------- gradients


def _gradients(problem: Problem, risk: EmpiricalRisk, part: Part) -> Tensors:
    def of_sample(*sample: Tensor) -> Tensors:
        def loss(*x: Tensor) -> tuple[Tensor, None]:
            return risk.sample_loss(problem.space.at(x), *part.rebuild(sample)), None

        return flat_value_and_grad(loss, problem.bound.x, verb=problem.verb)[1]

    return flat_vmap(of_sample)(*part.tensors)


def _at_once(problem: Problem, risk: EmpiricalRisk, samples: Part) -> int:
    x = problem.bound.x
    saved = bytes_of_a_sample(risk, problem.space.at(x), samples)
    return max(1, WORKING_SET // (3 * saved + 2 * sum(t.numel() * t.element_size() for t in x) + 1))


def _norms_of_gradients(gradients: Tensors) -> Tensor:
    dtype = gradients[0].dtype
    for g in gradients[1:]:
        dtype = torch.promote_types(dtype, g.dtype)
    return torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1).to(dtype) for g in gradients]).square().sum(0).sqrt()


# ---------------------------------------------------------------------------------------------------- factors


def _factors(problem: Problem, risk: EmpiricalRisk, samples: Part) -> Lift | None:
    """Where the gradients have factors, or ``None``; at first, norms of two samples are compared with those of gradients."""
    x = problem.bound.x

    def loss(leaves: Sequence[Tensor]) -> Tensor:
        return risk.sample_loss(problem.space.at(leaves), *samples.rebuild([t[0] for t in samples.tensors]))

    try:
        found = find_sites(loss, x)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if out_of_memory(error):
            raise
        return None
    if isinstance(found, str) or not found.sites:
        return None
    saved = bytes_of_a_sample(risk, problem.space.at(x), samples)
    total = dataclasses.replace(risk, reduction="sum")
    plan = Lift(problem, total, problem.space.at, samples, found, 1, False, tuple(found.sites), saved, 0)
    known = _agreed.setdefault(risk, {})
    kind = (samples.kind, found.tracked, found.forbidden, *((t.shape, t.dtype) for t in x))
    if kind not in known:
        known[kind] = _agree(plan)
    return plan if known[kind] else None


def _agree(plan: Lift) -> bool:
    two = plan.samples.holding(tuple(t[:2] for t in plan.samples.tensors))
    truth = _norms_of_gradients(_gradients(plan.problem, plan.risk, two))
    try:
        mine = _norms_of_factors(plan, two)
    except SitesChanged:
        return False
    except RuntimeError as error:
        if not missing_rule(error):
            raise
        return False
    return bool(((mine - truth).abs() <= AGREEMENT[truth.dtype] * truth.max()).all())


def _factors_at_once(plan: Lift) -> int:
    numbers = 2 * sum(plan.x[k].numel() for k in (*plan.found.direct, *_taken_apart(plan.found)))
    for site in plan.found.sites:
        numbers += 2 * site.positions * (site.out + site.width) + 2 * min(site.positions**2, site.out * site.width)
    return max(1, WORKING_SET // (3 * plan.saved + numbers * plan.x[0].element_size()))


def _taken_apart(found: Discovery) -> set[int]:
    """Leaves that are seen in several ways (a weight and its transpose, slices): no single pair of factors is their gradient."""
    first: dict[int, Tensor] = {}
    apart = set()
    for entry in (entry for site in found.sites for entry in site.entries):
        if not entry.index.equal(first.setdefault(entry.leaf, entry.index)):
            apart.add(entry.leaf)
    return apart


def _norms_of_factors(plan: Lift, part: Part) -> Tensor:
    x, found, apart = plan.x, plan.found, _taken_apart(plan.found)
    zeros = {site.key: plan.zeros(site, part) for site in found.sites}
    zeros |= {("leaf", k): x[k].new_zeros(len(part), 1, x[k].numel()) for k in found.direct}

    def loss(*eps: Tensor) -> tuple[Tensor, Any]:
        run = plan.run(part, dict(zip(zeros, eps, strict=True)), apart=True)
        return run.value, run.features

    (_, h), gradient = flat_value_and_grad(loss, tuple(zeros.values()), verb=plan.problem.verb)
    g = dict(zip(zeros, gradient, strict=True))
    factors: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for site in found.sites:
        for features, entry in site.slices():
            factors.setdefault(entry.leaf, []).append((entry.index, g[site.key], h[site.key][..., features]))
    squares = [g["leaf", k].square().sum((1, 2)) for k in found.direct]
    for leaf, several in factors.items():
        if leaf in apart:
            whole = x[leaf].new_zeros(len(part), x[leaf].numel())
            for index, a, b in several:
                whole.index_add_(1, index.flatten(), (a.mT @ b).flatten(1))
            squares.append(whole.square().sum(1))
        else:
            squares.append(_squared(torch.cat([a for _, a, _ in several], 1), torch.cat([b for *_, b in several], 1)))
    return torch.stack(squares).sum(0).clamp(min=0).sqrt()


def _squared(g: Tensor, h: Tensor) -> Tensor:
    """|sum over a of g[n,a] h[n,a]^T|^2, by the products of positions with each other where they are fewer."""
    (_, T, o), J = g.shape, h.shape[2]
    if T == 1:
        return g.square().sum((1, 2)) * h.square().sum((1, 2))
    if T * (o + J) < o * J:
        return ((g @ g.mT) * (h @ h.mT)).sum((1, 2))
    return (g.mT @ h).square().sum((1, 2))
