"""Colorings, against the definition, exhaustive search, closed forms and the figures of the literature."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse

from functional_hess.coloring import (
    ORDERS,
    Coloring,
    bidirectional_coloring,
    column_coloring,
    distance_1_coloring,
    ordered,
    recovery,
    recovery_of_diagonal,
    row_coloring,
    star_coloring,
    violation,
)
from functional_hess.patterns import SparsityPattern, banded, blocks

NOTHING = np.empty(0, dtype=np.int64)


def drawn(*rows: str) -> SparsityPattern:
    return SparsityPattern.of_matrix(np.array([[int(mark) for mark in row.split()] for row in rows]))


def grid(high: int, wide: int) -> SparsityPattern:
    """The five-point stencil on a grid."""
    place = [(i, j) for i in range(high) for j in range(wide)]
    return SparsityPattern.of_matrix(np.array([[abs(i - k) + abs(j - m) <= 1 for k, m in place] for i, j in place]))


def arrow(n: int) -> SparsityPattern:
    matrix = np.eye(n)
    matrix[0] = matrix[:, 0] = 1
    return SparsityPattern.of_matrix(matrix)


def graph(n: int, *edges: tuple[int, int]) -> SparsityPattern:
    matrix = np.eye(n)
    for i, j in edges:
        matrix[i, j] = matrix[j, i] = 1
    return SparsityPattern.of_matrix(matrix)


def cycle(n: int) -> SparsityPattern:
    return graph(n, *((i, (i + 1) % n) for i in range(n)))


def complete_bipartite(a: int, b: int) -> SparsityPattern:
    return graph(a + b, *itertools.product(range(a), range(a, a + b)))


def random_symmetric(rng: np.random.Generator, diagonal: bool) -> SparsityPattern:
    n = int(rng.integers(1, 15))
    matrix = rng.random((n, n)) < rng.random() / 2
    matrix |= matrix.T
    if diagonal:
        matrix |= np.eye(n, dtype=bool)
    return SparsityPattern.of_matrix(matrix)


def random_pattern(rng: np.random.Generator) -> SparsityPattern:
    m, n = rng.integers(1, 15, size=2)
    return SparsityPattern.of_matrix(rng.random((m, n)) < rng.random() / 2)


def is_star_by_paths(pattern: SparsityPattern, colors: np.ndarray) -> bool:
    """The graph-theoretic definition: neighbors differ, and a path of four vertices has at least three colors."""
    dense, n = pattern.dense(), pattern.shape[0]
    beside = [[j for j in range(n) if dense[i, j] and i != j] for i in range(n)]
    if any(colors[i] == colors[j] for i in range(n) for j in beside[i]):
        return False
    paths = (
        (a, b, c, d) for b in range(n) for c in beside[b] for a in beside[b] for d in beside[c] if a != c and d not in (a, b)
    )
    return all(len({colors[v] for v in path}) >= 3 for path in paths)


def star_number(pattern: SparsityPattern) -> int:
    """The fewest colors of any star coloring, by trying all."""
    n = pattern.shape[0]
    for k in range(1, n + 1):
        for rest in itertools.product(range(k), repeat=n - 1):
            if is_star_by_paths(pattern, np.array((0, *rest))):
                return k
    raise AssertionError


def products(matrix: np.ndarray, coloring: Coloring) -> np.ndarray:
    """All products that a coloring asks for, end to end."""
    with_columns = [matrix @ (coloring.columns == c) for c in range(coloring.column_colors)]
    with_rows = [matrix.T @ (coloring.rows == c) for c in range(coloring.row_colors)]
    return np.concatenate([*with_columns, *with_rows, NOTHING])


# ---------------------------------------------------------------------------------------------------- patterns


def test_pattern_is_the_matrix_it_was_made_of(rng):
    dense = rng.random((5, 8)) < 0.3
    pattern = SparsityPattern.of_matrix(dense)
    assert np.array_equal(pattern.dense(), dense) and pattern.nonzeros == dense.sum()
    assert np.array_equal(pattern.transpose.dense(), dense.T) and pattern.transpose.transpose == pattern
    shuffled = rng.permutation(pattern.nonzeros)
    again = SparsityPattern.of_entries(pattern.rows[shuffled].repeat(2), pattern.indices[shuffled].repeat(2), (5, 8))
    assert again == pattern and hash(again) == hash(pattern)


def test_pattern_of_a_scipy_matrix_holds_its_stored_entries():
    matrix = scipy.sparse.csc_matrix((np.array([0.0, 1.0]), (np.array([0, 1]), np.array([1, 0]))), shape=(2, 2))
    assert SparsityPattern.of_matrix(matrix) == drawn("0 1", "1 0")


def test_intersection_and_union_of_patterns(rng):
    one, other = (SparsityPattern.of_matrix(rng.random((6, 4)) < 0.5) for _ in range(2))
    assert np.array_equal((one & other).dense(), one.dense() & other.dense())
    assert np.array_equal((one | other).dense(), one.dense() | other.dense())


@pytest.mark.parametrize(("n", "r"), [(1, 0), (5, 0), (5, 1), (7, 3), (3, 9), (0, 1)])
def test_band_has_the_entries_near_the_diagonal(n, r):
    i = np.arange(n)
    assert np.array_equal(banded(r)(n).dense(), abs(i[:, None] - i) <= r)


def test_blocks_are_full_and_apart():
    truth = np.zeros((6, 6), dtype=bool)
    truth[:2, :2] = truth[2:3, 2:3] = truth[3:, 3:] = True
    assert np.array_equal(blocks([2, 1, 0, 3])(6).dense(), truth)
    assert blocks([3, 3])(6) == SparsityPattern.of_matrix(np.kron(np.eye(2), np.ones((3, 3))))
    assert SparsityPattern.full(2, 3) == drawn("1 1 1", "1 1 1")


def test_pattern_is_drawn():
    assert arrow(3).picture() == "x x x\nx x .\nx . x"
    large = banded(0)(400).picture().split("\n")
    assert len(large) == 20 and all(len(row) == 40 for row in large)
    assert [row.count("x") for row in large] == [2] * 20 and large[0].startswith("xx..") and large[-1].endswith("..xx")
    assert set(SparsityPattern.full(50, 50).picture()) == {"#", "\n"}
    assert SparsityPattern.full(0, 3).picture() == ""


def test_patterns_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        banded(1)(3).indices[0] = 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: SparsityPattern.of_entries([0, 3], [0, 0], (3, 3)),
            r"rows must be in range\(3\), for the shape is \(3, 3\), got 3",
        ),
        (
            lambda: SparsityPattern.of_entries([0], [-1], (3, 3)),
            r"columns must be in range\(3\), for the shape is \(3, 3\), got -1",
        ),
        (lambda: SparsityPattern.of_matrix(np.ones(3)), r"two dimensions, got an array of shape \(3,\)"),
        (lambda: banded(-1), "half_width must be at least 0, got -1"),
        (lambda: blocks([2, 2])(5), "add up to 5, got 4"),
        (lambda: star_coloring(drawn("1 1", "0 1")), r"star_coloring: the pattern must be symmetric; take pattern \| "),
        (lambda: distance_1_coloring(drawn("1 1 0", "1 1 0")), "distance_1_coloring: the pattern must be symmetric"),
        (lambda: ordered(arrow(3), "best"), "order must be one of 'natural', 'largest-first', 'smallest-last', got 'best'"),
        (
            lambda: recovery(arrow(3), Coloring("star", np.zeros(3, dtype=np.int64), NOTHING)),
            r"the coloring does not belong to the pattern: entry \(0, 0\) cannot be read",
        ),
        (
            lambda: recovery_of_diagonal(arrow(3), Coloring("distance-1", np.array([0, 1, 0]), NOTHING)),
            r"entry \(0, 0\) cannot be read",
        ),
    ],
)
def test_wrong_arguments_are_told(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# ---------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("order", ORDERS)
def test_order_is_a_permutation(order, rng):
    pattern = random_symmetric(rng, diagonal=True)
    assert sorted(ordered(pattern, order).tolist()) == list(range(pattern.shape[0]))


def test_largest_first_goes_by_degree():
    assert ordered(graph(5, (1, 3), (3, 4), (3, 2), (2, 4)), "largest-first").tolist() == [3, 2, 4, 1, 0]


def test_smallest_last_leaves_few_neighbors_before_each_vertex(rng):
    """By definition each vertex has the fewest neighbors in the graph of the vertices up to it."""
    for _ in range(20):
        pattern = random_symmetric(rng, diagonal=True)
        order, dense = ordered(pattern, "smallest-last"), pattern.dense() & ~np.eye(pattern.shape[0], dtype=bool)
        for k in range(len(order)):
            part = dense[np.ix_(order[: k + 1], order[: k + 1])]
            assert part[k].sum() == part.sum(1).min()


# ---------------------------------------------------------------------------------------------------- star colorings


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "holes"])
def test_star_coloring_reads_every_entry(order, diagonal, rng):
    for _ in range(60):
        pattern = random_symmetric(rng, diagonal)
        coloring = star_coloring(pattern, (order,))
        assert violation(pattern, coloring) is None
        if diagonal:
            assert is_star_by_paths(pattern, coloring.columns)
        matrix = rng.standard_normal(pattern.shape) * pattern.dense()
        matrix = matrix + matrix.T
        values = products(matrix, coloring)[recovery(pattern, coloring)]
        assert np.allclose(values, matrix[pattern.rows, pattern.indices], rtol=1e-12, atol=1e-12)


def test_judge_and_graph_theory_agree_on_what_a_star_coloring_is(rng):
    """With a full diagonal: symmetrically structurally orthogonal partitions are star colorings (Coleman and More 1984)."""
    verdicts = []
    for _ in range(300):
        pattern = random_symmetric(rng, diagonal=True)
        colors = rng.integers(0, pattern.shape[0], pattern.shape[0])
        coloring = Coloring("star", colors, NOTHING)
        verdicts.append(violation(pattern, coloring) is None)
        assert verdicts[-1] == is_star_by_paths(pattern, colors)
        if verdicts[-1]:
            recovery(pattern, coloring)
        else:
            with pytest.raises(ValueError, match="does not belong"):
                recovery(pattern, coloring)
    assert 20 < sum(verdicts) < 280


@pytest.mark.parametrize("r", range(7))
def test_star_number_of_a_band_is_twice_its_half_width_and_one(r):
    for n in (2 * r + 1, 5 * r + 7, 200):
        coloring = star_coloring(banded(r)(n))
        assert coloring.count == 2 * r + 1 and violation(banded(r)(n), coloring) is None
    assert distance_1_coloring(banded(r)(200)).count == r + 1


@pytest.mark.parametrize(
    ("pattern", "number"),
    [
        (banded(1)(7), 3),
        (banded(2)(7), 5),
        (graph(1), 1),
        (graph(3), 1),
        (cycle(3), 3),
        (cycle(4), 3),
        (cycle(5), 4),
        (cycle(7), 3),
        (arrow(7), 2),
        (complete_bipartite(2, 4), 3),
        (complete_bipartite(3, 3), 4),
        (SparsityPattern.full(5, 5), 5),
        (blocks([3, 1, 2])(6), 3),
        (grid(2, 3), 4),
        (grid(3, 3), 4),
    ],
    ids=lambda argument: str(argument) if isinstance(argument, int) else f"{argument.shape[0]} vertices",
)
def test_star_coloring_is_the_best_on_small_graphs(pattern, number):
    """Star numbers of cycles, complete bipartite graphs and grids: Fertin, Raspaud and Reed (2004), Star coloring of graphs."""
    assert star_number(pattern) == number == star_coloring(pattern).count


def test_star_coloring_is_the_best_on_large_graphs_of_known_number():
    assert star_coloring(grid(20, 20)).count == 5  # the star number of grids of at least 4 x 4
    assert distance_1_coloring(grid(20, 20)).count == 2
    assert star_coloring(arrow(500)).count == 2
    assert star_coloring(blocks([5, 9, 2])(16)).count == 9
    assert star_coloring(complete_bipartite(4, 30)).count == 5
    shuffled = np.random.default_rng(0).permutation(12)
    permuted = blocks([3, 4, 5])(12).dense()[np.ix_(shuffled, shuffled)]
    assert star_coloring(SparsityPattern.of_matrix(permuted)).count == 5


def test_figure_4_1_of_what_color_is_your_jacobian():
    """Gebremedhin, Manne and Pothen (2005): a matrix of six columns in three symmetrically orthogonal groups."""
    pattern = drawn("1 1 0 0 0 0", "1 1 1 0 1 1", "0 1 1 1 0 0", "0 0 1 1 0 1", "0 1 0 0 1 0", "0 1 0 1 0 1")
    figure = Coloring("star", np.array([0, 1, 0, 2, 0, 0]), NOTHING)
    assert violation(pattern, figure) is None and is_star_by_paths(pattern, figure.columns)
    assert star_number(pattern) == 3 == star_coloring(pattern).count
    matrix = np.where(pattern.dense(), np.arange(1.0, 37.0).reshape(6, 6), 0.0)
    matrix += matrix.T
    assert np.array_equal(products(matrix, figure)[recovery(pattern, figure)], matrix[pattern.rows, pattern.indices])


def test_figure_6_1_of_what_color_is_your_jacobian():
    """The figure's three colors serve recovery by substitution; to read entries directly takes more."""
    pattern = drawn(
        "1 1 0 0 0 0 1 0 0 0",
        "1 1 1 0 1 0 0 0 0 0",
        "0 1 1 1 0 1 0 0 0 0",
        "0 0 1 1 0 0 0 0 0 1",
        "0 1 0 0 1 1 0 1 0 0",
        "0 0 1 0 1 1 0 0 1 0",
        "1 0 0 0 0 0 1 1 0 0",
        "0 0 0 0 1 0 1 1 1 0",
        "0 0 0 0 0 1 0 1 1 1",
        "0 0 0 1 0 0 0 0 1 1",
    )
    acyclic = np.array([0, 1, 0, 1, 0, 2, 1, 2, 1, 2])
    assert violation(pattern, Coloring("distance-1", acyclic, NOTHING)) is None
    for a, b in itertools.combinations(range(3), 2):  # each two colors induce a forest: fewer edges than vertices, everywhere
        inside = np.isin(acyclic, [a, b])
        part = (pattern.dense() & ~np.eye(10, dtype=bool))[np.ix_(inside, inside)].astype(float)
        laplacian = np.diag(part.sum(1)) - part
        trees = len(part) - np.linalg.matrix_rank(laplacian)
        assert part.sum() / 2 == len(part) - trees
    assert violation(pattern, Coloring("star", acyclic, NOTHING)) is not None
    assert not is_star_by_paths(pattern, acyclic)
    # Gebremedhin, Pothen, Tarafdar and Walther (2009), figure 1: the same matrix with a star coloring of five colors
    five = np.array([0, 1, 0, 2, 0, 3, 2, 4, 0, 1])
    assert violation(pattern, Coloring("star", five, NOTHING)) is None
    assert star_coloring(pattern).count <= 5 and violation(pattern, star_coloring(pattern)) is None


def test_useless_colors_are_neutral():
    """Without diagonal entries the spokes of a star are read from its hub alone."""
    spokes = SparsityPattern.of_matrix(arrow(6).dense() & ~np.eye(6, dtype=bool))
    coloring = star_coloring(spokes)
    assert coloring.columns.tolist() == [0, -1, -1, -1, -1, -1] and violation(spokes, coloring) is None
    assert star_coloring(SparsityPattern.of_entries([], [], (4, 4))).count == 0
    assert star_coloring(SparsityPattern.of_entries([], [], (0, 0))).count == 0


# ---------------------------------------------------------------------------------------------------- other colorings


@pytest.mark.parametrize("order", ORDERS)
def test_distance_1_coloring_reads_the_diagonal(order, rng):
    for diagonal in (True, False) * 30:
        pattern = random_symmetric(rng, diagonal)
        coloring = distance_1_coloring(pattern, (order,))
        assert violation(pattern, coloring) is None
        matrix = rng.standard_normal(pattern.shape) * pattern.dense()
        matrix = matrix + matrix.T
        assert np.allclose(products(matrix, coloring)[recovery_of_diagonal(pattern, coloring)], np.diagonal(matrix))


@pytest.mark.parametrize("color", [column_coloring, row_coloring, bidirectional_coloring])
def test_coloring_of_a_rectangular_matrix_reads_every_entry(color, rng):
    for _ in range(60):
        pattern = random_pattern(rng)
        coloring = color(pattern)
        assert violation(pattern, coloring) is None
        matrix = rng.standard_normal(pattern.shape) * pattern.dense()
        values = products(matrix, coloring)[recovery(pattern, coloring)]
        assert np.allclose(values, matrix[pattern.rows, pattern.indices], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", range(4))
def test_columns_of_a_band_need_as_many_colors_as_a_row_has_entries(r):
    assert column_coloring(banded(r)(40)).count == row_coloring(banded(r)(40)).count == 2 * r + 1


def test_each_kind_of_coloring_wins_somewhere():
    full_row = SparsityPattern.of_matrix(np.vstack([np.ones(9), np.eye(9)]))
    assert (column_coloring(full_row).count, row_coloring(full_row).count) == (9, 2)
    assert (column_coloring(full_row.transpose).count, row_coloring(full_row.transpose).count) == (2, 9)
    assert (column_coloring(arrow(9)).count, row_coloring(arrow(9)).count, bidirectional_coloring(arrow(9)).count) == (9, 9, 3)
    for pattern in (full_row, full_row.transpose, banded(1)(9)):
        alone = min(column_coloring(pattern).count, row_coloring(pattern).count)
        assert bidirectional_coloring(pattern).count <= alone


def test_empty_columns_are_neutral():
    assert column_coloring(drawn("1 0 1", "0 0 1")).columns.tolist() == [0, -1, 1]


def test_counting_by_table_and_by_sorting_agree(rng, monkeypatch):
    pattern = random_symmetric(rng, diagonal=True)
    coloring = star_coloring(pattern, ("natural",))
    by_table = recovery(pattern, coloring)
    monkeypatch.setattr("functional_hess.coloring.TABLE", 0)
    assert np.array_equal(recovery(pattern, coloring), by_table)


# ---------------------------------------------------------------------------------------------------- the judge


@pytest.mark.parametrize(
    ("pattern", "coloring", "complaint"),
    [
        (banded(1)(3), Coloring("star", np.array([0, 0, 1]), NOTHING), "entry (0, 0) shares its color with column 1"),
        (banded(1)(4), Coloring("star", np.array([0, 1, 0, 1]), NOTHING), "entry (1, 2) shares its color with column 0"),
        (banded(1)(3), Coloring("star", np.array([0, 1, -1]), NOTHING), "entry (2, 2) has no color"),
        (banded(1)(3), Coloring("distance-1", np.array([0, 1, 1]), NOTHING), "entry (1, 1) shares its color with column 2"),
        (
            drawn("1 0 1", "0 1 0"),
            Coloring("column", np.array([0, 1, 0]), NOTHING),
            "entry (0, 0) shares its color with column 2",
        ),
        (drawn("1 0", "1 0"), Coloring("row", NOTHING, np.array([0, 0])), "entry (0, 0) shares its color with row 1"),
        (
            drawn("1 1", "1 0"),
            Coloring("bidirectional", np.array([0, 0]), np.array([0, 0])),
            "entry (0, 0) shares its color with",
        ),
        (drawn("1 1", "1 0"), Coloring("bidirectional", np.array([0, -1]), np.array([-1, -1])), "entry (0, 1) has no color"),
    ],
    ids=lambda argument: argument if isinstance(argument, str) else "",
)
def test_judge_names_the_first_entry_that_cannot_be_read(pattern, coloring, complaint):
    told = violation(pattern, coloring)
    assert told is not None and told.startswith(complaint)


def test_judge_passes_what_can_be_read():
    assert violation(drawn("1 1", "1 0"), Coloring("bidirectional", np.array([0, -1]), np.array([0, -1]))) is None
    assert violation(banded(1)(5), Coloring("distance-1", np.array([0, 1, 0, 1, 0]), NOTHING)) is None
