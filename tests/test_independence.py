"""Plain functions of a batch: samples that are proved not to read each other share their directions; others never do."""

from __future__ import annotations

import dataclasses
import functools
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

import functional_hess as fh
from functional_hess import Space, contraction, elimination, explain, lifting, seeding
from functional_hess.independence import independent_parts
from functional_hess.sites import find_sites

N = 6
ce = F.cross_entropy
Y = torch.arange(N) % 3
X = numbers(N, 5, seed=50)
SEQUENCES = numbers(N, 3, 4, seed=51)
IMAGES = numbers(N, 2, 4, 4, seed=52)
IDS = torch.randint(0, 8, (N, 3), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def everything_is_worth_a_proof(monkeypatch):
    monkeypatch.setattr(lifting, "WORTH_A_PROOF", 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss of a whole batch, how many parts its positions fall into, and how many directions serve for its Hessian."""

    name: str
    f: Callable[[dict[str, Tensor]], Tensor]
    p: dict[str, Tensor]
    parts: int
    directions: int

    def __str__(self) -> str:
        return self.name

    @functools.cache  # noqa: B019
    def truth(self) -> Tensor:
        """By double backward, entry by entry."""
        points = [self.p[name] for name in sorted(self.p)]
        return matrix(oracle_hessian(lambda *t: self.f(dict(zip(sorted(self.p), t, strict=True))), points), points)


def params(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: 0.5 * numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def of_module(make: Callable[[], nn.Module], x: Tensor) -> tuple[Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().double()
    p = {name: t.detach().clone() for name, t in net.named_parameters()}
    return lambda p: ce(functional_call(net, p, (x,)), Y), p


def attention(p: dict[str, Tensor]) -> Tensor:
    q, k, v = (SEQUENCES @ p["qkv"]).chunk(3, -1)
    h = SEQUENCES + torch.softmax(q @ k.mT / 2, -1) @ v @ p["o"]
    return ce(h.mean(1) @ p["head"], Y)


def recurrent(p: dict[str, Tensor]) -> Tensor:
    h = SEQUENCES.new_zeros(N, 4)
    for k in range(3):
        h = torch.tanh(SEQUENCES[:, k] @ p["wx"] + h @ p["wh"] + p["b"])
    return ce(h @ p["o"], Y)


def contrastive(p: dict[str, Tensor]) -> Tensor:
    """Every sample is compared with every other."""
    h = torch.tanh(X @ p["e"])
    return ce((h @ h.T)[:, :3], Y)


def hardly_mixed(p: dict[str, Tensor]) -> Tensor:
    """Samples meet in a term that no certificate could see."""
    h = torch.tanh(X @ p["e"] + p["b"])
    return ce(h @ p["o"], Y) + 1e-15 * h.mean() ** 2


def gathered(p: dict[str, Tensor]) -> Tensor:
    """Each sample reads the one before it."""
    h = torch.tanh(X @ p["e"] + p["b"])
    return ce(h[torch.arange(N) - 1] * h @ p["o"], Y)


def paired(p: dict[str, Tensor]) -> Tensor:
    """Samples in pairs."""
    h = torch.tanh(X @ p["e"] + p["b"]).unflatten(0, (N // 2, 2))
    return ce((h * h.flip(1)).flatten(0, 1) @ p["o"], Y)


def batch_normed(p: dict[str, Tensor]) -> Tensor:
    return ce(torch.tanh(F.batch_norm(X @ p["e"], None, None, p["g"], p["b"], training=True)) @ p["o"], Y)


A = numbers(40, 5, seed=53)
MLP = params(e=(5, 6), b=(6,), o=(6, 3), c=(3,))
CONV, CONV_P = of_module(
    lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), IMAGES
)
NORMED, NORMED_P = of_module(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Linear(6, 3)), X)
TABLE, TABLE_P = of_module(
    lambda: nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)), IDS
)

LOSSES = [
    Loss("network", lambda p: ce(torch.tanh(X @ p["e"] + p["b"]) @ p["o"] + p["c"], Y), MLP, N, 9),
    Loss("samples in columns", lambda p: ce((p["o"].T @ torch.tanh(p["e"].T @ X.T + p["b"][:, None])).T, Y), MLP, N, 9),
    Loss("a sum", lambda p: F.mse_loss(torch.tanh(X @ p["e"]) @ p["o"], X, reduction="sum"), params(e=(5, 6), o=(6, 5)), N, 11),
    Loss("tokens", lambda p: torch.tanh(torch.tanh(SEQUENCES @ p["e"]) @ p["o"]).sum(), params(e=(4, 6), o=(6, 3)), 3 * N, 9),
    Loss("attention", attention, params(qkv=(4, 12), o=(4, 4), head=(4, 3)), N, 3 * (12 + 4) + 3),
    Loss("recurrent", recurrent, params(wx=(4, 4), wh=(4, 4), b=(4,), o=(4, 3)), N, 15),
    Loss("convolution", CONV, CONV_P, N, 12 + 3),
    Loss("normalized", NORMED, NORMED_P, N, 6 + 12 + 3),
    Loss("embedding", TABLE, TABLE_P, N, 12 + 4 + 3),
    Loss("logistic regression", lambda p: F.softplus(A @ p["w"]).mean(), params(w=(5,)), 40, 1),
    Loss("least squares", lambda p: ((A @ p["w"] - 1) ** 2).sum() + (p["r"] ** 3).sum(), params(w=(5,), r=(1,)), 40, 2),
    Loss("pairs", paired, params(e=(5, 6), b=(6,), o=(6, 3)), N // 2, 2 * 9),
]
MIXED = [
    Loss("contrastive", contrastive, params(e=(5, 6)), 1, 0),
    Loss("hardly mixed", hardly_mixed, params(e=(5, 6), b=(6,), o=(6, 3)), 1, 0),
    Loss("gathered", gathered, params(e=(5, 6), b=(6,), o=(6, 3)), 1, 0),
    Loss("batch norm", batch_normed, params(e=(5, 6), g=(6,), b=(6,), o=(6, 3)), 1, 0),
]


def parts_of(loss: Loss) -> int:
    names = sorted(loss.p)
    x = tuple(loss.p[name] for name in names)

    def f(leaves):
        return loss.f(dict(zip(names, leaves, strict=True)))

    found = find_sites(f, x)
    assert not isinstance(found, str)
    return independent_parts(f, x, found)


@pytest.mark.parametrize("loss", [*LOSSES, *MIXED], ids=str)
def test_the_parts_are_the_samples_that_do_not_read_each_other(loss):
    assert parts_of(loss) == loss.parts


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_hessian_blocks_and_diagonal_are_exact_from_few_directions(loss, inputs_unchanged):
    inputs_unchanged(loss.p)
    space, H = Space.of(loss.p), loss.truth()
    told = explain(fh.hessian(loss.f), loss.p)
    assert (told.route, told.rows) == ("lifted", loss.directions)
    assert relative_error(space.matrix(fh.hessian(loss.f)(loss.p)), H) < 1e-12
    assert relative_error(space.ravel(fh.hessian_diagonal(loss.f)(loss.p)), H.diagonal()) < 1e-12
    for p, block in fh.hessian_blocks(loss.f)(loss.p).items():
        i = space.paths.index(p)
        rows = H[space.offsets[i] :, space.offsets[i] :][: space.sizes[i], : space.sizes[i]]
        assert float((block.reshape(rows.shape) - rows).abs().max()) < 1e-12


def test_single_precision_is_lifted_too():
    loss = LOSSES[0]

    def f(p, X):
        return ce(torch.tanh(X @ p["e"] + p["b"]) @ p["o"] + p["c"], Y)

    arguments = {name: t.float() for name, t in loss.p.items()}, X.float()
    assert explain(fh.hessian(f), *arguments).route == "lifted"
    assert relative_error(Space.of(arguments[0]).matrix(fh.hessian(f)(*arguments)), loss.truth()) < 1e-5


@pytest.mark.parametrize("loss", MIXED, ids=str)
def test_samples_that_meet_are_computed_by_rows(loss):
    assert explain(fh.hessian(loss.f), loss.p).route.startswith("dense rows because")
    assert relative_error(Space.of(loss.p).matrix(fh.hessian(loss.f)(loss.p)), loss.truth()) < 1e-12


@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("name", ["network", "attention", "normalized", "convolution"])
def test_directions_and_samples_may_come_in_any_portions(name, directions, monkeypatch):
    loss = next(each for each in LOSSES if each.name == name)
    monkeypatch.setattr(seeding, "DIRECTIONS", directions)
    for working_set in (2**26, 20_000):
        for module in (lifting, seeding, contraction, elimination):
            monkeypatch.setattr(module, "WORKING_SET", working_set)
        monkeypatch.setattr(lifting, "PROOF", 0)
        space = Space.of(loss.p)
        assert relative_error(space.matrix(fh.hessian(loss.f)(loss.p)), loss.truth()) < 1e-12
        assert relative_error(space.ravel(fh.hessian_diagonal(loss.f)(loss.p)), loss.truth().diagonal()) < 1e-12


def test_a_batch_that_comes_to_be_mixed_is_seen():
    """Nothing is believed of an earlier call: every call proves anew."""
    order = [torch.arange(N)]

    def f(p):
        h = torch.tanh(X @ p["e"] + p["b"])
        return ce(h[order[-1]] * h @ p["o"], Y)

    p = params(e=(5, 6), b=(6,), o=(6, 3))
    points = [p[name] for name in sorted(p)]

    def truth():
        return matrix(oracle_hessian(lambda *t: f(dict(zip(sorted(p), t, strict=True))), points), points)

    assert explain(fh.hessian(f), p).route == "lifted"
    assert relative_error(Space.of(p).matrix(fh.hessian(f)(p)), truth()) < 1e-12
    order.append(torch.arange(N) - 1)
    assert explain(fh.hessian(f), p).route.startswith("dense rows because")
    assert relative_error(Space.of(p).matrix(fh.hessian(f)(p)), truth()) < 1e-12


def test_a_branch_is_that_of_the_point():
    def f(p):
        h = torch.tanh(X @ p["e"])
        return ce((h if h.sum() > 0 else h.mean() * h) @ p["o"], Y)

    for sign, parts in ((1, N), (-1, 1)):
        p = {"e": sign * X.sum(0)[:, None] * torch.ones(6, dtype=torch.float64), "o": params(o=(6, 3))["o"]}
        loss = Loss("asks", f, p, parts, 0)
        assert parts_of(loss) == parts
        assert relative_error(Space.of(p).matrix(fh.hessian(f)(p)), loss.truth()) < 1e-12


def test_arguments_aux_and_tuples_of_argnums_come_along():
    loss, space = LOSSES[0], Space.of(LOSSES[0].p)

    def f(scale, p, X, y):
        return scale * ce(torch.tanh(X @ p["e"] + p["b"]) @ p["o"] + p["c"], y), "aux"

    H, aux = fh.hessian(f, argnums=1, has_aux=True)(2.0, loss.p, X, Y)
    assert aux == "aux" and relative_error(space.matrix(H), 2 * loss.truth()) < 1e-12
    scale = torch.tensor(2.0, dtype=torch.float64)
    both = Space.of((scale, loss.p)).matrix(fh.hessian(f, argnums=(0, 1), has_aux=True)(scale, loss.p, X, Y)[0])
    assert relative_error(both[1:, 1:], 2 * loss.truth()) < 1e-12 and abs(float(both[0, 0])) < 1e-14


def test_small_problems_are_not_asked(monkeypatch):
    monkeypatch.undo()
    assert explain(fh.hessian(LOSSES[0].f), LOSSES[0].p).route == "dense rows"


def test_no_proof_is_made_that_would_take_more_memory_than_the_result(monkeypatch):
    monkeypatch.setattr(lifting, "PROOF", 1e6)
    assert "would take more memory" in explain(fh.hessian(LOSSES[0].f), LOSSES[0].p).route
