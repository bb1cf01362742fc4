"""Lifting: the exact Hessian of any architecture from its affine sites, what a certificate catches, and when rows are taken."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import numbers
from oracles import hessian as oracle_hessian
from oracles import matrix, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import functional_hess as fh
from functional_hess import Space, contraction, elimination, empirical_risk, explain, lifting, second_order, seeding, sites

N = 5
ce = F.cross_entropy


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """A loss of one sample, its parameters, the samples, and how many directions serve for its Hessian."""

    name: str
    loss: Callable[..., Tensor]
    p: dict[str, Any]
    X: Tensor
    directions: int

    def __str__(self) -> str:
        return self.name

    @property
    def y(self) -> Tensor:
        return torch.arange(N) % 3

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in sorted(self.p.items()) if isinstance(t, Tensor) and t.is_floating_point()}

    @functools.cache  # noqa: B019
    def truth(self) -> Tensor:
        """By double backward, entry by entry, of the mean written as a loop."""

        def mean(*tensors: Tensor) -> Tensor:
            p = {**self.p, **dict(zip(self.leaves, tensors, strict=True))}
            return sum(self.loss(p, self.X[n], self.y[n]) for n in range(N)) / N

        points = list(self.leaves.values())
        return matrix(oracle_hessian(mean, points), points)


def params(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: 0.5 * numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def recurrent(p, x, y):
    h = torch.zeros(4, dtype=x.dtype)
    for k in range(3):
        h = torch.tanh(x[k] @ p["wx"] + h @ p["wh"] + p["b"])
    return ce(h @ p["o"], y)


def attention(p, x, y):
    h = F.layer_norm(x, (4,), 1 + p["g"], p["s"])
    q, k, v = (h @ p["qkv"]).chunk(3, -1)
    x = x + torch.softmax(q @ k.T / 2, -1) @ v @ p["o"]
    x = x + F.gelu(x @ p["f1"] + p["fb1"]) @ p["f2"]
    return ce(x.mean(0) @ p["head"], y)


def residual(p, x, y):
    h = x @ p["e"]
    for _ in range(2):
        h = h + torch.tanh(h @ p["w"] + p["b"])
    return ce(h @ p["o"], y)


def in_place(p, x, y):
    z = F.linear(x, p["a"], p["ab"])
    return ce(F.linear(z.mul_(1.5).tanh_(), p["c"], p["cb"]), y)


def of_module(make: Callable[[], nn.Module], to_logits: Callable[[Tensor], Tensor] = lambda out: out) -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double()
    p = {name: t.detach().clone() for name, t in net.named_parameters()}
    return lambda p, x, y: ce(to_logits(functional_call(net, p, (x,))), y), p


X = numbers(N, 5, seed=50)
IDS = torch.randint(0, 8, (N, 3), generator=torch.Generator().manual_seed(0))
LINEAR = params(a=(6, 5), ab=(6,), c=(3, 6), cb=(3,))
SHARED = params(e=(5, 6), w=(6, 6), b=(6,), o=(6, 3))
CONV, CONV_P = of_module(
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(0), nn.Linear(12, 3)),
)
DILATED, DILATED_P = of_module(
    lambda: nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2, padding="same", bias=False), nn.Tanh(), nn.Flatten(0), nn.Linear(16, 3))
)
CUBIC, CUBIC_P = of_module(lambda: nn.Sequential(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.Flatten(0), nn.Linear(2, 3)))
DEPTHWISE, DEPTHWISE_P = of_module(
    lambda: nn.Sequential(nn.Conv1d(4, 4, 2, groups=4), nn.Tanh(), nn.Flatten(0), nn.Linear(12, 3))
)
NORMED, NORMED_P = of_module(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Linear(6, 3)))
TABLE, TABLE_P = of_module(lambda: nn.Sequential(nn.Embedding(8, 4), nn.Flatten(0), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)))


def tied(p, x, y):
    return ce((torch.tanh(F.embedding(x, p["E"]).sum(0) @ p["w"] + p["b"]) @ p["E"].T + p["c"])[:3], y)


ARCHITECTURES = [
    Architecture(
        "x @ W", lambda p, x, y: ce(torch.tanh(x @ p["e"] + p["b"]) @ p["o"], y), params(e=(5, 6), b=(6,), o=(6, 3)), X, 9
    ),
    Architecture("x @ W.T", lambda p, x, y: ce(torch.tanh(x @ p["a"].T + p["ab"]) @ p["c"].mT + p["cb"], y), LINEAR, X, 9),
    Architecture(
        "linear", lambda p, x, y: ce(F.linear(torch.tanh(F.linear(x, p["a"], p["ab"])), p["c"], bias=p["cb"]), y), LINEAR, X, 9
    ),
    Architecture("W @ x", lambda p, x, y: ce(p["cb"] + p["c"] @ torch.tanh(torch.mv(p["a"], x) + p["ab"]), y), LINEAR, X, 9),
    Architecture(
        "addmm",
        lambda p, x, y: ce(torch.addmm(p["cb"], torch.tanh(torch.addmm(p["ab"], x[None], p["a"].t())), p["c"].t())[0], y),
        LINEAR,
        X,
        9,
    ),
    Architecture(
        "einsum",
        lambda p, x, y: ce(torch.einsum("oi,i->o", p["c"], torch.tanh(torch.einsum("i,oi->o", x, p["a"]) + p["ab"])), y),
        params(a=(6, 5), ab=(6,), c=(3, 6)),
        X,
        9,
    ),
    Architecture("in place", in_place, LINEAR, X, 9),
    Architecture(
        "shared and transposed",
        lambda p, x, y: ce(torch.tanh(torch.tanh(torch.tanh(x @ p["e"]) @ p["w"] + p["b"]) @ p["w"].T + p["b"]) @ p["o"], y),
        SHARED,
        X,
        21,
    ),
    Architecture("residual", residual, SHARED, X, 21),
    Architecture(
        "two weights in one sum",
        lambda p, x, y: (lambda h: ce(torch.tanh(h @ p["w"] + h @ p["w"].T + p["b"] + h) @ p["o"], y))(torch.tanh(x @ p["e"])),
        SHARED,
        X,
        15,
    ),
    Architecture(
        "z read twice",
        lambda p, x, y: (lambda z: ce(torch.tanh(z + p["b"]) @ p["o"] + z[:3], y))(torch.tanh(x @ p["e"]) @ p["w"]),
        SHARED,
        X,
        21,
    ),
    Architecture(
        "bias after a write",
        lambda p, x, y: ce(((x @ p["e"]).tanh_() + p["b"]) @ p["w"] @ p["o"], y),
        SHARED,
        X,
        15 + 6,
    ),
    Architecture("recurrent", recurrent, params(wx=(3, 4), wh=(4, 4), b=(4,), o=(4, 3)), numbers(N, 3, 3), 15),
    Architecture(
        "attention",
        attention,
        params(g=(4,), s=(4,), qkv=(4, 12), o=(4, 4), f1=(4, 6), fb1=(6,), f2=(6, 4), head=(4, 3)),
        numbers(N, 2, 4),
        4 + 4 + 24 + 8 + 12 + 8 + 3,
    ),
    Architecture("embedding", TABLE, TABLE_P, IDS, 12 + 4 + 3),
    Architecture("tied embedding", tied, params(E=(8, 4), w=(4, 4), b=(4,), c=(8,)), IDS, 12 + 4 + 8),
    Architecture("convolution", CONV, CONV_P, numbers(N, 2, 4, 4), 12 + 3),
    Architecture("dilated convolution", DILATED, DILATED_P, numbers(N, 3, 4), 16 + 3),
    Architecture("convolution in space", CUBIC, CUBIC_P, numbers(N, 2, 2, 2, 2), 2 + 3),
    Architecture("depthwise convolution", DEPTHWISE, DEPTHWISE_P, numbers(N, 4, 4), 8 + 4 + 3),
    Architecture("normalized", NORMED, NORMED_P, X, 6 + 6 + 6 + 3),
    Architecture(
        "used in two ways",
        lambda p, x, y: ce(torch.tanh(x @ p["e"]) @ p["w"] @ p["o"], y) + (p["w"] ** 3).sum() * x.sum().cos(),
        params(e=(5, 6), w=(6, 2), o=(2, 3)),
        X,
        6 + 12 + 3,
    ),
    Architecture("an unused leaf", lambda p, x, y: ce(torch.tanh(x @ p["e"]) @ p["o"], y), SHARED, X, 9),
    Architecture(
        "a product of leaves",
        lambda p, x, y: ce(torch.tanh(x @ p["e"]) @ (p["w"] @ p["o"]), y),
        params(e=(5, 6), w=(6, 2), o=(2, 3)),
        X,
        6 + 12 + 6,
    ),
    Architecture(
        "slices",
        lambda p, x, y: ce(torch.tanh(torch.tanh(x @ p["e"]) @ p["w"][:, 2:5] + p["b"][2:5]) @ p["o"][:3], y),
        SHARED,
        X,
        12,
    ),
    Architecture("a vector of weights", lambda p, x, y: (torch.tanh(torch.tanh(x @ p["e"]) @ p["b"]) - y) ** 2, SHARED, X, 7),
    Architecture(
        "carried leaves",
        lambda p, x, y: p["scale"] * ce(torch.tanh(x @ p["e"])[p["ids"]] @ p["o"], y),
        {**params(e=(5, 6), o=(4, 3)), "scale": 2, "ids": torch.tensor([0, 2, 3, 5]), "none": None},
        X,
        9,
    ),
]
every_architecture = pytest.mark.parametrize("net", ARCHITECTURES, ids=str)


@every_architecture
def test_hessian_blocks_and_diagonal_are_exact_from_few_directions(net, inputs_unchanged):
    inputs_unchanged(net.p, net.X)
    risk, space, H = empirical_risk(net.loss), Space.of(net.p), net.truth()
    arguments = (net.p, net.X, net.y)
    told = explain(fh.hessian(risk), *arguments)
    assert (told.route, told.rows) == ("lifted", net.directions)
    assert relative_error(space.matrix(fh.hessian(risk)(*arguments)), H) < 1e-12
    assert explain(fh.hessian_diagonal(risk), *arguments).route == "lifted"
    assert relative_error(space.ravel(fh.hessian_diagonal(risk)(*arguments)), H.diagonal()) < 1e-12
    for (p, q), block in fh.hessian_blocks(risk, pairs=[("*", "*")])(*arguments).items():
        i, j = space.paths.index(p), space.paths.index(q)
        rows = H[space.offsets[i] :][: space.sizes[i], space.offsets[j] :][:, : space.sizes[j]]
        assert float((block.reshape(rows.shape) - rows).abs().max()) < 1e-13 and block.is_contiguous()


@every_architecture
def test_single_precision_is_lifted_too(net):
    p = {name: t.float() if name in net.leaves else t for name, t in net.p.items()}
    X = net.X.float() if net.X.is_floating_point() else net.X
    if net.name == "recurrent":
        p, X = net.p, net.X  # its state is of the dtype of x
    H = Space.of(p).matrix(fh.hessian(empirical_risk(net.loss))(p, X, net.y))
    assert relative_error(H, net.truth()) < 1e-5


def test_value_and_gradient_come_along():
    net = ARCHITECTURES[0]
    risk = empirical_risk(net.loss, reduction="sum")
    value, g, H = fh.value_grad_and_hessian(risk)(net.p, net.X, net.y)
    assert relative_error(value, risk(net.p, net.X, net.y)) < 1e-14
    assert relative_error(g, fh.grad(risk)(net.p, net.X, net.y)) < 1e-14
    assert relative_error(Space.of(net.p).matrix(H), N * net.truth()) < 1e-12


def test_out_is_written():
    net = ARCHITECTURES[7]
    out = torch.full((90, 90), torch.nan, dtype=torch.float64)
    H = fh.hessian(empirical_risk(net.loss), out=out)(net.p, net.X, net.y)
    assert (
        relative_error(out, net.truth()) < 1e-12 and H["w"]["e"].untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    )


def test_a_tuple_of_argnums_is_lifted():
    net = ARCHITECTURES[0]
    H = fh.hessian(empirical_risk(net.loss), argnums=(0,))(net.p, net.X, net.y)
    assert relative_error(Space.of((net.p,)).matrix(H), net.truth()) < 1e-12


# Loaders ---------------------------------------------------------------------------------------------------------------


class Passes(list):
    """Batches, and how many times they were read."""

    count = 0

    def __iter__(self):
        self.count += 1
        return super().__iter__()

    __hash__ = object.__hash__  # type: ignore[assignment]


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["x @ W", "shared and transposed", "embedding", "convolution", "used in two ways"])
def test_batches_of_any_length_are_lifted_together(name, length, monkeypatch):
    net = next(n for n in ARCHITECTURES if n.name == name)
    space, H = Space.of(net.p), net.truth()
    for working_set in (2**26, 20_000):
        for module in (lifting, seeding, contraction, elimination):
            monkeypatch.setattr(module, "WORKING_SET", working_set)
        loader = DataLoader(TensorDataset(net.X, net.y), batch_size=length)
        mean, total = empirical_risk(net.loss), empirical_risk(net.loss, reduction="sum")
        told = explain(fh.hessian(mean), net.p, loader)
        assert (told.route, told.rows) == ("lifted", net.directions)
        assert relative_error(space.matrix(fh.hessian(mean)(net.p, loader)), H) < 1e-12
        assert relative_error(space.matrix(fh.hessian(total)(net.p, loader)), N * H) < 1e-12
        assert relative_error(space.ravel(fh.hessian_diagonal(mean)(net.p, loader)), H.diagonal()) < 1e-12


def test_a_loader_is_read_twice_a_call():
    """For the value, which is looked at first, and for the Hessian."""
    net = ARCHITECTURES[0]
    batches, risk = Passes(zip(net.X.split(2), net.y.split(2), strict=True)), empirical_risk(net.loss)
    fh.hessian(risk)(net.p, batches)
    batches.count = 0
    fh.hessian(risk)(net.p, batches)
    assert batches.count == 2


def test_samples_of_a_loader_are_constants():
    net = ARCHITECTURES[0]
    batches = Passes([(net.X.clone().requires_grad_(), net.y)])
    H = Space.of(net.p).matrix(fh.hessian(empirical_risk(net.loss))(net.p, batches))
    assert relative_error(H, net.truth()) < 1e-12 and not H.requires_grad


# Prepared --------------------------------------------------------------------------------------------------------------


PREPARED = ("x @ W", "shared and transposed", "attention", "tied embedding", "convolution", "used in two ways", "carried leaves")


@pytest.mark.parametrize(
    "net", [n if n.name in PREPARED else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES], ids=str
)
def test_a_risk_is_prepared_as_it_is_lifted_and_right_at_other_numbers(net, monkeypatch):
    monkeypatch.setattr(second_order, "evaluate", _no_rows)
    risk, space = empirical_risk(net.loss), Space.of(net.p)
    moved = {**net.p, **{name: t.cos() for name, t in net.leaves.items()}}
    other = dataclasses.replace(net, p=moved, X=net.X.flip(0, 1))
    H = fh.prepare(fh.hessian(risk), net.p, net.X, net.y)
    assert relative_error(space.matrix(H(net.p, net.X, net.y)), net.truth()) < 1e-12
    assert relative_error(space.matrix(H(other.p, other.X, other.y)), other.truth()) < 1e-12
    diagonal = fh.prepare(fh.hessian_diagonal(risk), net.p, net.X, net.y)
    assert relative_error(space.ravel(diagonal(other.p, other.X, other.y)), other.truth().diagonal()) < 1e-12


def _no_rows(plan: Any) -> Any:
    raise AssertionError("rows were computed")


def test_a_trace_of_a_risk_that_was_never_called_goes_by_rows():
    net = ARCHITECTURES[0]
    called = torch.fx.experimental.proxy_tensor.make_fx(lambda p: fh.hessian(empirical_risk(net.loss))(p, net.X, net.y))(net.p)
    assert relative_error(Space.of(net.p).matrix(called(net.p)), net.truth()) < 1e-12
    prepared = fh.prepare(lambda p: fh.hessian(empirical_risk(net.loss))(p, net.X, net.y), net.p)
    assert relative_error(Space.of(net.p).matrix(prepared(net.p)), net.truth()) < 1e-12


# Any cut ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [2, 7])
@pytest.mark.parametrize("name", ["shared and transposed", "tied embedding", "convolution", "used in two ways"])
def test_directions_and_samples_may_come_in_any_portions(name, directions, monkeypatch):
    net = next(n for n in ARCHITECTURES if n.name == name)
    monkeypatch.setattr(seeding, "DIRECTIONS", directions)
    H, space = net.truth(), Space.of(net.p)
    for working_set in (2**26, 20_000):
        for module in (lifting, seeding, contraction, elimination):
            monkeypatch.setattr(module, "WORKING_SET", working_set)
        risk = empirical_risk(net.loss)
        assert relative_error(space.matrix(fh.hessian(risk)(net.p, net.X, net.y)), H) < 1e-12
        assert relative_error(space.ravel(fh.hessian_diagonal(risk)(net.p, net.X, net.y)), H.diagonal()) < 1e-12


class Alive(TorchDispatchMode):
    """The bytes of storages alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self.seen:
                size = t.untyped_storage().nbytes()
                self.seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("verb", [fh.hessian, fh.hessian_diagonal])
def test_memory_does_not_grow_with_the_samples(verb, monkeypatch):
    for module in (lifting, seeding, contraction, elimination):
        monkeypatch.setattr(module, "WORKING_SET", 2**20)
    p = params(a=(6, 12), b=(12, 12), c=(12, 3))
    risk = empirical_risk(lambda p, x, y: ce(torch.tanh(torch.tanh(x @ p["a"]) @ p["b"]) @ p["c"], y), batch_size=64)
    peaks = []
    for n in (512, 2048):
        batch = numbers(n, 6), torch.arange(n) % 3
        verb(risk)(p, *batch)
        with Alive() as alive:
            verb(risk)(p, *batch)
        peaks.append(alive.peak - sum(t.nbytes for t in batch))
    output = Space.of(p).dim ** 2 * 8 if verb is fh.hessian else 0
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < output + 3 * 2**20


# The certificate --------------------------------------------------------------------------------------------------------


def padded(p, x, y):
    return ce(torch.tanh(F.embedding(x, p["E"], padding_idx=0).sum(0) @ p["w"] + p["b"]) @ p["o"], y)


def unwatched(p, x, y):
    with torch.no_grad():
        gate = torch.sigmoid(x @ p["e"])
    return ce(torch.tanh(x @ p["e"] * gate + p["b"]) @ p["o"], y)


def test_a_function_whose_derivative_is_asymmetric_is_not_lifted():
    """torch gives the padded row of an embedding no gradient, but lets it move; ``no_grad`` does the same to its inside."""
    p = params(E=(8, 4), w=(4, 6), b=(6,), o=(6, 3))
    route = explain(fh.hessian(empirical_risk(padded)), p, IDS % 2, torch.arange(N) % 3).route
    assert route.startswith("dense rows because the certificate failed: H v is off by")
    p = params(e=(5, 6), b=(6,), o=(6, 3))
    route = explain(fh.hessian(empirical_risk(unwatched)), p, X, torch.arange(N) % 3).route
    assert route.startswith("dense rows because the certificate failed: H v is off by")


def wrong_places(found):
    site = found.sites[0]
    entries = (dataclasses.replace(site.entries[0], index=site.entries[0].index.flip(1)), *site.entries[1:])
    return dataclasses.replace(found, sites=(dataclasses.replace(site, entries=entries), *found.sites[1:]))


def one_site_forgotten(found):
    return dataclasses.replace(found, sites=found.sites[1:])


def entries_swapped(found):
    site = found.sites[1]
    return dataclasses.replace(
        found, sites=(found.sites[0], dataclasses.replace(site, entries=site.entries[::-1]), *found.sites[2:])
    )


def units_turned(found):
    site = found.sites[0]
    return dataclasses.replace(
        found,
        sites=(dataclasses.replace(site, units=site.units.flip(1)), *found.sites[1:]),
        every={**found.every, site.key: dataclasses.replace(site, units=site.units.flip(1))},
    )


@pytest.mark.parametrize("spoiled", [wrong_places, one_site_forgotten, entries_swapped, units_turned])
def test_the_certificate_catches_a_wrong_lift(spoiled, monkeypatch):
    net = next(n for n in ARCHITECTURES if n.name == "shared and transposed")
    honest = sites.find_sites
    monkeypatch.setattr(lifting, "find_sites", lambda *args: spoiled(honest(*args)))
    risk = empirical_risk(net.loss)
    route = explain(fh.hessian(risk), net.p, net.X, net.y).route
    assert route.startswith("dense rows because the certificate failed")
    assert relative_error(Space.of(net.p).matrix(fh.hessian(risk)(net.p, net.X, net.y)), net.truth()) < 1e-12


def test_an_output_read_elsewhere_that_was_absorbed_is_caught(monkeypatch):
    net = next(n for n in ARCHITECTURES if n.name == "z read twice")
    honest = sites.reached_variables

    def blind(outputs, until=()):
        return honest(outputs, until) - {id(t) for t in BLIND}

    BLIND: list[Tensor] = []
    place = sites._Discover.place

    def placed(self, site, z, features):
        out = place(self, site, z, features)
        BLIND.extend(probe for key, probe in self.probes.items() if key in self.absorbed)
        return out

    monkeypatch.setattr(sites._Discover, "place", placed)
    monkeypatch.setattr(sites, "reached_variables", blind)
    route = explain(fh.hessian(empirical_risk(net.loss)), net.p, net.X, net.y).route
    assert route.startswith("dense rows because the certificate failed")


def test_a_use_that_appears_later_is_seen():
    """The sites are found anew in every call: nothing of a function's past is believed."""
    net, squared = ARCHITECTURES[0], []

    def loss(p, x, y):
        return net.loss(p, x, y) + (sum((t**2).sum() for t in p.values()) if squared else 0)

    risk, space = empirical_risk(loss), Space.of(net.p)
    assert relative_error(space.matrix(fh.hessian(risk)(net.p, net.X, net.y)), net.truth()) < 1e-12
    squared.append(True)
    assert relative_error(space.matrix(fh.hessian(risk)(net.p, net.X, net.y)), net.truth() + 2 * torch.eye(54)) < 1e-12


# Where rows are taken ----------------------------------------------------------------------------------------------------


def physics(p, x, y):
    return torch.func.grad(lambda u: torch.tanh(torch.tanh(u @ p["e"] + p["b"]) @ p["o"]).sum())(x).square().sum()


def test_a_loss_with_transforms_inside_goes_by_rows():
    net = Architecture("physics", physics, params(e=(5, 6), b=(6,), o=(6, 3)), X, 0)
    risk = empirical_risk(physics)
    assert explain(fh.hessian(risk), net.p, X, net.y).route == "dense rows because no leaf enters through affine sites alone"
    assert relative_error(Space.of(net.p).matrix(fh.hessian(risk)(net.p, X, net.y)), net.truth()) < 1e-12


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda r, n: explain(fh.hessian(r, argnums=1), n.p, n.X, n.y), "other arguments than the parameters are differentiated"),
        (lambda r, n: explain(fh.hessian(r, mode="reverse-over-reverse"), n.p, n.X, n.y), "an option says how rows are computed"),
        (lambda r, n: explain(fh.hessian(r, chunk_size=3), n.p, n.X, n.y), "an option says how rows are computed"),
        (lambda r, n: explain(fh.hessian(r), _watched(n.p), n.X, n.y), "an argument requires grad"),
        (lambda r, n: explain(fh.hessian(r), {**n.p, "b": n.p["b"].float()}, n.X, n.y), "the leaves differ in dtype or device"),
        (
            lambda r, n: explain(fh.hessian(r), n.p, DataLoader([(n.X, n.y), (n.X, n.y.int())], None)),
            "the batches of the loader are of several kinds",
        ),
    ],
)
def test_explain_says_why_rows_are_taken(call, reason):
    net = ARCHITECTURES[0]
    assert call(empirical_risk(net.loss), net).route.startswith(f"dense rows because {reason}")


@pytest.mark.parametrize(
    ("room", "reason"), [(-1, "the result would not fit"), (0, "lifting would work with ")], ids=["none", "rows"]
)
def test_what_does_not_fit_lifted_goes_by_rows(monkeypatch, room, reason):
    net = ARCHITECTURES[0]
    risk, output = empirical_risk(net.loss), Space.of(net.p).dim ** 2 * 8
    monkeypatch.setattr(lifting, "fits", lambda amount, _: amount <= output + room)
    assert explain(fh.hessian(risk), net.p, net.X, net.y).route.startswith(f"dense rows because {reason}")
    assert relative_error(Space.of(net.p).matrix(fh.hessian(risk)(net.p, net.X, net.y)), net.truth()) < 1e-12


def _watched(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone().requires_grad_() for name, t in p.items()}


def test_a_captured_tensor_that_requires_grad_keeps_its_graph():
    net, weight = ARCHITECTURES[0], torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    risk = empirical_risk(lambda p, x, y: weight * net.loss(p, x, y))
    assert "closes over a tensor that requires grad" in explain(fh.hessian(risk), net.p, net.X, net.y).route
    H = Space.of(net.p).matrix(fh.hessian(risk)(net.p, net.X, net.y))
    (slope,) = torch.autograd.grad(H.trace(), weight)
    assert relative_error(slope, net.truth().trace()) < 1e-12


def test_a_function_that_mixes_samples_is_no_risk_and_goes_by_rows():
    p = params(e=(5, 6), g=(6,), b=(6,), o=(6, 3))
    y = torch.arange(N) % 3

    def loss(p):
        return ce(torch.tanh(F.batch_norm(X @ p["e"], None, None, p["g"], p["b"], training=True)) @ p["o"], y)

    points = [p[name] for name in sorted(p)]
    truth = matrix(oracle_hessian(lambda *t: loss(dict(zip(sorted(p), t, strict=True))), points), points)
    assert explain(fh.hessian(loss), p).route == "dense rows"
    assert relative_error(Space.of(p).matrix(fh.hessian(loss)(p)), truth) < 1e-11


def test_transforms_outside_are_obeyed():
    """Under a transform rows are taken, and every composition is that of the risk."""
    net = ARCHITECTURES[0]
    risk, space, H = empirical_risk(net.loss), Space.of(net.p), net.truth()
    stacked = fh.vmap(lambda s: fh.hessian(risk)({**net.p, "b": s * net.p["b"]}, net.X, net.y))(
        torch.ones(2, dtype=torch.float64)
    )
    assert relative_error(stacked["e"]["o"][1], fh.hessian(risk)(net.p, net.X, net.y)["e"]["o"]) < 1e-12
    third = fh.grad(lambda s: space.ravel(fh.hessian_diagonal(risk)({**net.p, "b": s * net.p["b"]}, net.X, net.y)).sum())
    one = torch.ones((), dtype=torch.float64)
    step = 1e-5
    differences = [
        space.ravel(fh.hessian_diagonal(risk)({**net.p, "b": s * net.p["b"]}, net.X, net.y)).sum() for s in (1 + step, 1 - step)
    ]
    assert abs(float(third(one) - (differences[0] - differences[1]) / (2 * step))) < 1e-8
    _, moved = fh.jvp(lambda s: fh.hessian(risk)({**net.p, "b": s * net.p["b"]}, net.X, net.y)["o"]["o"].sum(), (one,), (one,))
    assert torch.isfinite(moved)
    assert relative_error(space.matrix(fh.hessian(risk)(net.p, net.X, net.y)), H) < 1e-12
