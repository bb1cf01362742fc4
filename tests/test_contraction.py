"""Blocks between two sites, from random perturbations of their outputs, against the sums that define them, term by term."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from functional_hess.contraction import ENOUGH, Pair, product_of, put_pair
from functional_hess.sites import Entry, Site

STEPS = ("rows", "columns", "scattered")  # how a weight matrix (out, in) lies in its leaf


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def site(key: int, leaf: int, positions: int, out: int, features: int, lies: str) -> Site:
    """A weight and a bias, which is the leaf after it."""
    index = torch.arange(out * features)
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))] if lies == "scattered" else index
    index = index.view(features, out).T if lies == "columns" else index.view(out, features)
    entries = (Entry(leaf, index, False), Entry(leaf + 1, torch.arange(out)[:, None], True))
    return Site(("call", key), torch.arange(positions * out).view(positions, out), entries)


def of_itself(N: int, positions: int, out: int, features: int, lies: str) -> Pair:
    s = site(0, 0, positions, out, features, lies)
    A = random(positions, out, N, positions, out)
    h = random(N, positions, features + 1)
    return Pair(s, s, True, h, A + A.permute(3, 4, 2, 0, 1), h, random(N, positions, out), None)


def of_two(N: int, positions: tuple[int, int], out: tuple[int, int], features: tuple[int, int], lies: str) -> Pair:
    s, t = (site(2 * i, 2 * i, positions[i], out[i], features[i], lies) for i in (0, 1))
    (S, T), (o, q), (J, P) = positions, out, (f + 1 for f in features)
    D = random(S, o, N, T, P)
    return Pair(s, t, False, random(N, S, J), random(S, o, N, T, q), random(N, T, P), random(N, T, q), D)


def truth(pair: Pair, sizes: list[int]) -> Tensor:
    values = torch.einsum("naj,ainbk,nbp->ijkp", pair.hs, pair.A, pair.ht)
    if pair.D is not None:
        values = values + torch.einsum("naj,nbk,ainbp->ijkp", pair.hs, pair.g, pair.D)
    offsets = [sum(sizes[:leaf]) for leaf in range(len(sizes))]
    H = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for (sa, a), (sb, b) in itertools.product(pair.s.slices(), pair.t.slices()):
        for i, k in itertools.product(range(pair.s.out), range(pair.t.out)):
            rows, columns = (offsets[e.leaf] + e.index[u] for e, u in ((a, i), (b, k)))
            H[rows[:, None], columns] += values[i, sa, k, sb]
    return H if pair.same else H + H.T


def result(pair: Pair, sizes: list[int], start: Tensor | None = None) -> Tensor:
    """Every entry written once, or added to ``start``."""
    n = sum(sizes)
    H = torch.full((n, n), torch.nan, dtype=torch.float64) if start is None else start.clone()
    blocks = {(p, q): block for p, rows in enumerate(H.split(sizes)) for q, block in enumerate(rows.split(sizes, 1))}
    met = put_pair(blocks, pair, add=start is not None)
    assert met == {(p, q) for (p, q), block in blocks.items() if not block.isnan().all()} or start is not None
    return H


def agree(mine: Tensor, theirs: Tensor) -> bool:
    return float((mine - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lies", STEPS)
@pytest.mark.parametrize("N", [3, ENOUGH])
@pytest.mark.parametrize(("positions", "out", "features"), [(1, 4, 5), (1, 1, 7), (1, 2, 40), (1, 1, 1), (3, 2, 4), (2, 1, 3)])
def test_a_site_with_itself_gives_the_sum_over_samples_and_positions(N, positions, out, features, lies, monkeypatch):
    pair, sizes = of_itself(N, positions, out, features, lies), [out * features, out]
    assert agree(result(pair, sizes), truth(pair, sizes))
    monkeypatch.setattr("functional_hess.contraction.MIB", 0)
    for panel, working_set in ((10_000, 50_000), (1000, 50_000), (1000, 1000)):  # in parts of features or units, and of samples
        monkeypatch.setattr("functional_hess.contraction.PANEL", panel)
        monkeypatch.setattr("functional_hess.contraction.WORKING_SET", working_set)
        assert agree(result(pair, sizes), truth(pair, sizes))


@pytest.mark.parametrize("lies", STEPS)
@pytest.mark.parametrize(
    ("positions", "out", "features"),
    [
        ((1, 1), (3, 4), (5, 3)),
        ((1, 1), (1, 1), (30, 2)),
        ((4, 1), (2, 3), (3, 5)),
        ((3, 3), (2, 2), (4, 2)),
        ((1, 2), (3, 2), (2, 3)),
    ],
)
def test_two_sites_give_both_sums_and_their_mirror_image(positions, out, features, lies, monkeypatch):
    pair = of_two(3, positions, out, features, lies)
    sizes = [out[0] * features[0], out[0], out[1] * features[1], out[1]]
    start = random(sum(sizes), sum(sizes))
    for working_set in (2**26, 3000):
        monkeypatch.setattr("functional_hess.contraction.WORKING_SET", working_set)
        H = truth(pair, sizes)
        assert agree(result(pair, sizes, start) - start, H)
        assert agree(result(pair, sizes).nan_to_num(0), H)


@pytest.mark.parametrize("lies", STEPS)
@pytest.mark.parametrize(("out", "features"), [((3, 4), (5, 3)), ((2, 3), (4, 6)), ((4, 1), (1, 3))])
def test_a_unit_that_moves_one_feature_alone_gives_what_all_slopes_give(out, features, lies, monkeypatch):
    """The last bias takes the place of a weight too: four units, and three features beside it."""
    whole = of_two(5, (1, 1), out, features, lies)
    slope = random(5, out[0])
    D = torch.zeros(1, out[0], 5, 1, features[1] + 1, dtype=torch.float64)
    for i in range(out[0]):
        D[0, i, :, 0, i] = slope[:, i]
    dense, few = dataclasses.replace(whole, D=D), dataclasses.replace(whole, D=None, slope=slope)
    sizes = [out[0] * features[0], out[0], out[1] * features[1], out[1]]
    start = random(sum(sizes), sum(sizes))
    for working_set in (2**26, 300):
        monkeypatch.setattr("functional_hess.contraction.WORKING_SET", working_set)
        assert agree(result(few, sizes, start) - start, truth(dense, sizes))
        assert agree(result(few, sizes).nan_to_num(0), truth(dense, sizes))
    v = [random(o, f + 1) for o, f in zip(out, features, strict=True)]
    for mine, theirs in zip(product_of(few, *v), product_of(dense, *v), strict=True):
        assert agree(mine, theirs)


# Places ---------------------------------------------------------------------------------------------------------------


def test_a_matrix_its_transpose_and_parts_of_them_are_lattices():
    places = torch.arange(12).view(3, 4)
    assert Entry(0, places, False).lattice == (0, 4, 1)
    assert Entry(0, places.T, False).lattice == (0, 1, 4)
    assert Entry(0, places[1:, ::2], False).lattice == (4, 4, 2)
    assert Entry(0, places[2:, 1:2], False).lattice == (9, 1, 1)


def test_places_that_meet_twice_or_lie_irregularly_are_no_lattice():
    assert Entry(0, torch.tensor([[0, 1, 2], [1, 2, 3]]), False).lattice is None
    assert Entry(0, torch.tensor([[0, 1], [0, 1]]), False).lattice is None
    assert Entry(0, torch.tensor([[0, 2], [1, 4]]), False).lattice is None
    assert Entry(0, torch.tensor([[3, 2], [1, 0]]), False).lattice is None
