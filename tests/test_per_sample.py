"""Per-sample gradients and their norms: those of a loop over samples, whatever the architecture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import numbers
from oracles import relative_error
from test_lifting import ARCHITECTURES, Alive, N, every_architecture, params
from torch import Tensor

import functional_hess as fh
from functional_hess import Space, empirical_risk, per_sample


def by_loop(net, p=None) -> Tensor:
    """(N, n), by plain autograd, one sample after the other."""
    rows = []
    for n in range(N):
        leaves = {name: t.clone().requires_grad_() for name, t in net.leaves.items()}
        value = net.loss({**net.p, **leaves}, net.X[n], net.y[n])
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for g, t in zip(found, leaves.values(), strict=True)])
        )
    return torch.stack(rows)


def as_rows(net, gradients) -> Tensor:
    return torch.cat([gradients[name].flatten(1) for name in net.leaves], 1)


@pytest.fixture
def ways(monkeypatch):
    """Which way norms were taken."""
    taken = []
    for name in ("_norms_of_factors", "_norms_of_gradients"):
        honest = getattr(per_sample, name)
        monkeypatch.setattr(per_sample, name, lambda *a, name=name, honest=honest: taken.append(name) or honest(*a))
    return taken


@every_architecture
def test_gradients_and_norms_are_those_of_a_loop(net, ways, inputs_unchanged):
    inputs_unchanged(net.p, net.X)
    risk, truth = empirical_risk(net.loss), by_loop(net)
    found = fh.sample_gradients(risk)(net.p, net.X, net.y)
    assert relative_error(as_rows(net, found), truth) < 1e-13
    assert all(found[name].shape == (N, *t.shape) for name, t in net.leaves.items())
    assert all(found[name] is None for name in net.p.keys() - net.leaves.keys())
    norms = fh.sample_gradient_norms(risk)(net.p, net.X, net.y)
    assert norms.shape == (N,) and relative_error(norms, truth.norm(dim=1)) < 1e-12
    assert ways[-1] == "_norms_of_factors"
    fh.sample_gradient_norms(risk)(net.p, net.X, net.y)
    assert ways.count("_norms_of_gradients") == 1  # the first time alone


@pytest.mark.parametrize("working_set", [1, 20_000])
def test_samples_may_come_in_any_portions(working_set, monkeypatch):
    monkeypatch.setattr(per_sample, "WORKING_SET", working_set)
    for net in ARCHITECTURES[7], ARCHITECTURES[13]:
        risk, truth = empirical_risk(net.loss, reduction="sum"), by_loop(net)
        assert relative_error(as_rows(net, fh.sample_gradients(risk)(net.p, net.X, net.y)), truth) < 1e-13
        assert relative_error(fh.sample_gradient_norms(risk)(net.p, net.X, net.y), truth.norm(dim=1)) < 1e-12


def test_the_mean_of_the_gradients_is_the_gradient_of_the_risk():
    net = ARCHITECTURES[0]
    risk, space = empirical_risk(net.loss), Space.of(net.p)
    mean = {name: t.mean(0) for name, t in fh.sample_gradients(risk)(net.p, net.X, net.y).items()}
    assert relative_error(space.ravel(mean), space.ravel(fh.grad(risk)(net.p, net.X, net.y))) < 1e-13


def test_norms_do_not_form_the_gradients_of_affine_leaves():
    p = {"a": numbers(40, 300, seed=1), "c": numbers(300, 3, seed=2)}
    risk = empirical_risk(lambda p, x, y: F.cross_entropy(torch.tanh(x @ p["a"] / 6) @ p["c"] / 17, y))
    batch = numbers(64, 40), torch.arange(64) % 3
    expected = torch.stack([t.flatten(1).norm(dim=1) for t in fh.sample_gradients(risk)(p, *batch).values()]).norm(dim=0)
    fh.sample_gradient_norms(risk)(p, *batch)
    with Alive() as alive:
        norms = fh.sample_gradient_norms(risk)(p, *batch)
    assert relative_error(norms, expected) < 1e-12
    assert alive.peak < 64 * 40 * 300 * 8 / 2


def test_what_has_no_sites_is_computed_from_gradients(ways):
    risk = empirical_risk(lambda w, x: (w**3 * x).sum())
    w, X = numbers(4), numbers(N, 4, seed=3)
    truth = (3 * w**2 * X).norm(dim=1)
    assert relative_error(fh.sample_gradient_norms(risk)(w, X), truth) < 1e-14
    assert ways == ["_norms_of_gradients"]


def test_a_wrong_site_is_seen_by_the_first_norms(monkeypatch, ways):
    net, honest = ARCHITECTURES[0], per_sample._squared
    monkeypatch.setattr(per_sample, "_squared", lambda g, h: 1.001 * honest(g, h))
    norms = fh.sample_gradient_norms(empirical_risk(net.loss))(net.p, net.X, net.y)
    assert relative_error(norms, by_loop(net).norm(dim=1)) < 1e-12 and ways[-1] == "_norms_of_gradients"


def test_they_nest_and_carry_a_graph():
    net = ARCHITECTURES[0]
    risk = empirical_risk(net.loss)
    one, step = torch.ones((), dtype=torch.float64), 1e-5

    def norms(s):
        return fh.sample_gradient_norms(risk)({**net.p, "b": s * net.p["b"]}, net.X, net.y).sum()

    differences = (norms(one + step) - norms(one - step)) / (2 * step)
    assert abs(float(fh.grad(norms)(one) - differences)) < 1e-8
    watched = one.clone().requires_grad_()
    (slope,) = torch.autograd.grad(norms(watched), watched)
    assert abs(float(slope - differences)) < 1e-8
    several = fh.vmap(lambda s: fh.sample_gradients(risk)({**net.p, "b": s * net.p["b"]}, net.X, net.y)["b"])(
        torch.stack([one, one])
    )
    assert relative_error(several[1], fh.sample_gradients(risk)(net.p, net.X, net.y)["b"]) < 1e-13


def test_single_precision():
    net = ARCHITECTURES[0]
    p = {name: t.float() for name, t in net.p.items()}
    norms = fh.sample_gradient_norms(empirical_risk(net.loss))(p, net.X.float(), net.y)
    assert norms.dtype == torch.float32 and relative_error(norms, by_loop(net).norm(dim=1)) < 1e-5


def test_direct_and_shared_leaves_count_once():
    """A gain used three times, a weight and its transpose."""
    p = params(e=(5, 6), w=(6, 6), g=(6,))
    loss = lambda p, x: (torch.tanh(torch.tanh(x @ p["e"]) * p["g"] @ p["w"] * p["g"]) @ p["w"].T * p["g"]).sum()  # noqa: E731
    X = numbers(N, 5)
    rows = torch.stack([torch.cat([g.flatten() for g in torch.func.grad(loss)(p, x).values()]) for x in X])
    assert relative_error(fh.sample_gradient_norms(empirical_risk(loss))(p, X), rows.norm(dim=1)) < 1e-12
