"""The diagonal of a chain of sites, stage by stage: exact whatever lies between two sites, and only where there is a chain."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from networks import numbers
from oracles import relative_error
from test_lifting import ARCHITECTURES, Architecture, N, X, ce, every_architecture, params
from torch.overrides import TorchFunctionMode

import functional_hess as fh
from functional_hess import Space, elimination, empirical_risk, lifting
from functional_hess.sites import Lifted, find_sites

NO_CHAIN = {
    "shared and transposed", "residual", "two weights in one sum", "recurrent", "attention", "tied embedding", "used in two ways",
}  # fmt: skip
DEEP = params(a=(5, 7), ab=(7,), b=(7, 6), bb=(6,), c=(6, 8), cb=(8,), d=(8, 3))
ORDERS = torch.stack([torch.arange(6), *(torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(N - 1))])


def deep(act, p, x, y):
    h = act(x @ p["a"] + p["ab"])
    h = act(h @ p["b"] + p["bb"])
    return ce(act(h @ p["c"] + p["cb"]) @ p["d"], y)


def gained(p, x, y):
    """A gain enters at every site, a temperature in the loss."""
    h = torch.tanh((x * p["scale"]) @ p["a"] + p["ab"])
    h = torch.tanh((h * p["gain"] ** 2) @ p["b"])
    return ce(h @ p["d"] * p["t"].exp(), y) + p["t"].sin()


def ordered(p, x, y):
    """Units are multiplied in an order that each sample brings along: for the first it is that of the units themselves."""
    h = torch.tanh(x[:5] @ p["e"] + p["b"])
    return ce(h * h[x[5:].long()] @ p["o"], y)


def added(p, x, y):
    """What is added to the output of a site depends on the one before it."""
    h = torch.tanh(x @ p["e"])
    return ce(torch.addmv(h[:4].sin(), p["w"], h).cos() @ p["o"], y)


def images(p, x, y):
    h = F.avg_pool2d(torch.tanh(F.conv2d(x, p["c1"], p["a1"], padding=1)), 2)
    h = F.max_pool2d(torch.tanh(F.conv2d(h, p["c2"])), 2)
    return ce(h.flatten() @ p["w"], y)


ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "layer_norm": lambda h: F.layer_norm(h, h.shape),
    "softmax": lambda h: torch.softmax(h, 0),
    "sorted": lambda h: torch.tanh(h).sort().values,
}
NETS = [
    *(Architecture(f"deep, {name}", functools.partial(deep, act), DEEP, X, 0) for name, act in ACTIVATIONS.items()),
    Architecture("gains", gained, params(scale=(5,), a=(5, 7), ab=(7,), gain=(7,), b=(7, 8), d=(8, 3), t=()), X, 0),
    Architecture("orders", ordered, params(e=(5, 6), b=(6,), o=(6, 3)), torch.cat([X, ORDERS.double()], 1), 0),
    Architecture("added", added, params(e=(5, 6), w=(4, 6), o=(4, 3)), X, 0),
    Architecture("images", images, params(c1=(2, 1, 3, 3), a1=(2,), c2=(3, 2, 3, 3), w=(3, 3)), numbers(N, 1, 8, 8), 0),
    Architecture("one site", lambda p, x, y: ce(torch.tanh(x @ p["e"]), y), params(e=(5, 3)), X, 0),
    Architecture("an indefinite loss", lambda p, x, y: (torch.tanh(torch.tanh(x @ p["e"]) @ p["w"]).sin().sum() * (y - 1)) ** 3,
                 params(e=(5, 6), w=(6, 4)), X, 0),
]  # fmt: skip


@pytest.fixture
def routes(monkeypatch):
    """Which plans went by stages, where none of them is held to products."""
    taken = []
    chained = elimination.chained
    monkeypatch.setattr(lifting, "chained", lambda plan: taken.append(chained(plan)) or taken[-1])
    monkeypatch.setattr(lifting, "_entries_agree", lambda plan: True)
    monkeypatch.setattr(lifting, "_pairs_agree", lambda plan: True)
    return taken


def hessian(net):
    return Space.of(net.p).matrix(fh.hessian(empirical_risk(net.loss))(net.p, net.X, net.y))


def diagonal(net):
    return Space.of(net.p).ravel(fh.hessian_diagonal(empirical_risk(net.loss))(net.p, net.X, net.y))


@every_architecture
def test_a_chain_is_told_from_other_graphs(net, routes):
    assert relative_error(diagonal(net), net.truth().diagonal()) < 1e-12
    assert relative_error(hessian(net), net.truth()) < 1e-12
    assert set(routes) == {net.name not in NO_CHAIN}


@pytest.mark.parametrize("net", NETS, ids=str)
def test_hessian_and_diagonal_are_exact_whatever_lies_between_two_sites(net, routes):
    assert relative_error(diagonal(net), net.truth().diagonal()) < 1e-12
    assert relative_error(hessian(net), net.truth()) < 1e-12
    assert set(routes) == {True}


@pytest.mark.parametrize("net", NETS, ids=str)
def test_samples_and_directions_may_come_in_any_portions(net, routes, monkeypatch):
    monkeypatch.setattr(elimination, "WORKING_SET", 20_000)
    assert relative_error(diagonal(net), net.truth().diagonal()) < 1e-12
    assert relative_error(hessian(net), net.truth()) < 1e-12


def test_a_plain_function_of_a_batch_goes_by_stages_too(routes, monkeypatch):
    monkeypatch.setattr(lifting, "WORTH_A_PROOF", 0)
    net = NETS[0]

    def mean(p):
        return deep(torch.tanh, p, X, net.y)

    assert relative_error(Space.of(net.p).ravel(fh.hessian_diagonal(mean)(net.p)), net.truth().diagonal()) < 1e-12
    assert routes == [True]


def test_a_residual_that_is_not_diagonal_is_seen_in_any_sample(routes, monkeypatch):
    """Without the random directions the product of two units would pass for a square."""
    net = next(net for net in NETS if net.name == "orders")
    monkeypatch.setattr(elimination, "_probes", lambda zero: torch.ones(2, *zero.shape).to(zero))
    assert relative_error(diagonal(net), net.truth().diagonal()) > 1e-3


@pytest.mark.parametrize("many", [0, 100])
def test_terms_may_be_united_early_or_late(many, routes, monkeypatch):
    monkeypatch.setattr(elimination, "MANY_COLUMNS", many)
    for net in (net for net in NETS if net.name in ("deep, tanh", "deep, softmax", "gains")):
        assert relative_error(diagonal(net), net.truth().diagonal()) < 1e-12


@pytest.mark.parametrize("core", [(4, 3), (4, 3, 3)], ids=["diagonal", "full"])
@pytest.mark.parametrize("columns", [(3, 4, 5), (3, 1, 5), None], ids=["of each sample", "shared", "unit matrix"])
def test_a_term_is_the_product_that_it_stands_for(core, columns, generator):
    core = torch.randn(core, generator=generator, dtype=torch.float64)
    core = core + core.mT if core.dim() == 3 else core
    V = None if columns is None else torch.randn(columns, generator=generator, dtype=torch.float64)
    scale = torch.randn(4, 5, generator=generator, dtype=torch.float64) if columns == (3, 1, 5) else None
    term = elimination.Term(V, core, scale)
    full = (
        torch.eye(3, dtype=torch.float64).expand(4, 3, 3) if V is None else (V * (1 if scale is None else scale)).transpose(0, 1)
    )
    truth = full.mT @ (core if core.dim() == 3 else torch.diag_embed(core)) @ full
    assert relative_error(term.dense(), truth) < 1e-14
    assert relative_error(term.diagonal(), truth.diagonal(dim1=1, dim2=2)) < 1e-14


def slopes_seen(monkeypatch):
    seen, honest = [], elimination._slope
    monkeypatch.setattr(elimination, "_slope", lambda *args: seen.append(honest(*args)) or seen[-1])
    return seen


def test_only_where_features_are_functions_of_one_unit_each_no_column_is_differentiated(routes, monkeypatch):
    seen = slopes_seen(monkeypatch)
    acts_by_unit = {"tanh": True, "relu": True, "gelu": True, "layer_norm": False, "softmax": False, "sorted": False}
    for name, expected in acts_by_unit.items():
        diagonal(next(net for net in NETS if net.name == f"deep, {name}"))
        assert [slope is not None for slope in seen] == [expected] * 3
        seen.clear()


def test_a_slope_that_passes_for_diagonal_would_be_wrong(routes, monkeypatch):
    """The random directions are what tells a softmax from a function of each unit."""
    net = next(net for net in NETS if net.name == "deep, softmax")
    monkeypatch.setattr(elimination, "_slope", lambda along, seed: along[0, :, : seed.shape[-1]])
    assert relative_error(diagonal(net), net.truth().diagonal()) > 1e-3


def test_a_product_that_nobody_asks_for_is_not_computed():
    class Count(TorchFunctionMode):
        products = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.products += func is torch.Tensor.matmul or getattr(func, "__name__", "") == "__matmul__"
            return func(*args, **(kwargs or {}))

    net = NETS[0]
    names, leaves = sorted(net.p), [net.p[name] for name in sorted(net.p)]

    def loss(x):
        return net.loss(dict(zip(names, x, strict=True)), net.X[0], net.y[0])

    found = find_sites(loss, leaves)
    assert not isinstance(found, str)
    severed = {site.key: torch.zeros(site.units.shape, dtype=torch.float64) for site in found.sites}
    expected = {(): 0, (found.sites[1].key,): 1, tuple(severed): len(severed)}
    for outputs, products in expected.items():
        with Count() as count, Lifted(leaves, found, {}, severed, outputs=outputs, features=[found.sites[0].key]) as run:
            loss(leaves)
        assert count.products == products
        assert {key for key, parts in run.features.items() if parts} >= {found.sites[0].key}
        assert tuple(run.kept) == outputs


def test_the_first_pairs_are_held_to_the_product_of_the_sites(monkeypatch):
    net, honest = NETS[0], elimination.pairs_by_stages

    def spoiled(*args):
        yield from (dataclasses.replace(pair, A=pair.A if pair.same else -pair.A) for pair in honest(*args))

    monkeypatch.setattr(lifting, "pairs_by_stages", spoiled)
    assert relative_error(hessian(net), net.truth()) < 1e-12


def test_a_graph_that_is_no_chain_goes_by_rows_where_its_directions_cost_more(monkeypatch):
    net = next(net for net in ARCHITECTURES if net.name == "attention")
    monkeypatch.setattr(lifting, "COSTLY", 0)
    route = fh.explain(fh.hessian(empirical_risk(net.loss)), net.p, net.X, net.y).route
    assert route == "dense rows because 63 directions through the whole function for 138 rows do not pay"
    assert relative_error(hessian(net), net.truth()) < 1e-12


def test_the_first_result_is_held_to_products(monkeypatch):
    net, calls = NETS[0], []
    honest = elimination.diagonal_by_stages

    def spoiled(plan, samples):
        calls.append(len(samples))
        yield from ((entry, 1.001 * values) for entry, values in honest(plan, samples))

    monkeypatch.setattr(lifting, "diagonal_by_stages", spoiled)
    risk, space = empirical_risk(net.loss), Space.of(net.p)
    for _ in range(2):
        assert relative_error(space.ravel(fh.hessian_diagonal(risk)(net.p, net.X, net.y)), net.truth().diagonal()) < 1e-12
    assert calls == [N]


def test_pairs_of_neighbors_take_one_slope_for_each_unit_where_no_other_moves_its_feature(monkeypatch):
    """A sort leaves the units of some samples where they are: every sample is looked at."""
    acts_by_unit = {"tanh": True, "relu": True, "layer_norm": False, "softmax": False, "sorted": False}
    pairs, taken = elimination.pairs_by_stages, []

    def watched(plan, samples, wanted):
        for pair in pairs(plan, samples, wanted):
            taken.append(pair.slope is not None)
            yield pair

    monkeypatch.setattr(lifting, "pairs_by_stages", watched)
    for net in NETS:
        taken.clear()
        H = Space.of(net.p).matrix(fh.hessian(empirical_risk(net.loss))(net.p, net.X, net.y))
        assert relative_error(H, net.truth()) < 1e-12
        kind = net.name.removeprefix("deep, ")
        if kind in acts_by_unit:
            assert (any(taken), len(taken) > 0) == (acts_by_unit[kind], True)
