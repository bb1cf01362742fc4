"""Which columns of a sparse matrix may be multiplied together: colorings, and how entries are read off again.

A product of a matrix A with the sum of several unit vectors is the sum of several columns. Where no row meets two of them, every
entry is there to be read. Colors say which columns go together: with S the (n, k) matrix of the k sums, B = A S is all that is
computed, and each entry of A is one entry of B,

    symmetric A:    a_ij = B[i, c_j]  or  B[j, c_i]        star coloring of the graph of A
    its diagonal:   a_ii = B[i, c_i]                       distance-1 coloring
    any A:          a_ij = B[i, c_j]                       column coloring; of A^T, row coloring; or some of both (bidirectional)

so that recovery copies and loses nothing. A column that no entry is read from is neutral: its color is -1, nothing multiplies it.
Colorings are greedy: over a good order of the vertices they are near the best, which is NP-hard to find. For a full band and
for full blocks the best is known in closed form and taken.

Integers only: this module knows numpy and no derivatives. :func:`violation` judges a coloring by the definition, entry by entry,
and shares nothing with the code that makes it.

Sources: Gebremedhin, Manne and Pothen (2005), What color is your Jacobian?; Gebremedhin, Tarafdar, Manne and Pothen (2007), New
acyclic and star coloring algorithms with application to computing Hessians; Montoison, Dalle and Gebremedhin (2025), Revisiting
sparse matrix coloring and bicoloring.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from functional_hess.patterns import SparsityPattern, banded

__all__ = [
    "ORDERS",
    "Coloring",
    "bidirectional_coloring",
    "column_coloring",
    "distance_1_coloring",
    "ordered",
    "recovery",
    "recovery_of_diagonal",
    "row_coloring",
    "star_coloring",
    "violation",
]

NEUTRAL = -1
ORDERS = ("natural", "largest-first", "smallest-last")
ENOUGH_WORK = 500_000  # entries visited after which no further order is tried: about a second
TABLE = 50_000_000  # entries of a table of counts; larger ones are counted by sorting


# ---------------------------------------------------------------------------------------------------- colorings


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coloring:
    """Colors of columns, of rows, or of both: 0, 1, ... or -1 for what is multiplied with nothing.

    ``kind`` is ``"star"``, ``"distance-1"``, ``"column"``, ``"row"`` or ``"bidirectional"``.
    """

    kind: str
    columns: np.ndarray  # (n,), or (0,) where only rows are colored
    rows: np.ndarray  # (m,), or (0,) where only columns are colored

    def __post_init__(self) -> None:
        for array in (self.columns, self.rows):
            array.setflags(write=False)

    @property
    def column_colors(self) -> int:
        """How many products with A."""
        return int(self.columns.max(initial=NEUTRAL)) + 1

    @property
    def row_colors(self) -> int:
        """How many products with the transpose of A."""
        return int(self.rows.max(initial=NEUTRAL)) + 1

    @property
    def count(self) -> int:
        """How many products in all."""
        return self.column_colors + self.row_colors

    def __repr__(self) -> str:
        return f"{self.kind} coloring with {self.count} color{'' if self.count == 1 else 's'}"


_NOTHING = np.empty(0, dtype=np.int64)
Greedy = Callable[[SparsityPattern, np.ndarray], np.ndarray]


def ordered(pattern: SparsityPattern, order: str) -> np.ndarray:
    """The columns of a square pattern as vertices of its graph, in a greedy order.

    ``"natural"`` as they are; ``"largest-first"`` those with most neighbors first (Welsh and Powell 1967); ``"smallest-last"`` so
    that each has the fewest neighbors among those up to it (Matula and Beck 1983).
    """
    n = pattern.shape[0]
    if order == "natural":
        return np.arange(n)
    degree = np.diff(pattern.indptr)
    if order == "largest-first":
        return np.argsort(-degree, kind="stable")
    if order == "smallest-last":
        return _smallest_last(pattern, degree.tolist())
    raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}.")


def _smallest_last(pattern: SparsityPattern, degree: list[int]) -> np.ndarray:
    indptr, indices = pattern.indptr.tolist(), pattern.indices.tolist()
    buckets: list[list[int]] = [[] for _ in range(max(degree, default=0) + 1)]
    for v, d in enumerate(degree):
        buckets[d].append(v)
    removed, order, smallest = [False] * len(degree), [], 0
    while len(order) < len(degree):
        while not buckets[smallest]:
            smallest += 1
        v = buckets[smallest].pop()
        if removed[v] or degree[v] != smallest:
            continue  # an entry of a degree that v has no more
        removed[v] = True
        order.append(v)
        for w in indices[indptr[v] : indptr[v + 1]]:
            if not removed[w] and w != v:
                degree[w] -= 1
                buckets[degree[w]].append(w)
                smallest = min(smallest, degree[w])
    return np.array(order[::-1], dtype=np.int64)


def _best(pattern: SparsityPattern, greedy: Greedy, orders: Sequence[str], fewest: int) -> np.ndarray:
    """The coloring with fewest colors over several orders, as many as there is patience for."""
    best, work = None, 0
    for order in orders:
        colors = greedy(pattern, ordered(pattern, order))
        if best is None or colors.max(initial=0) < best.max(initial=0):
            best = colors
        work += pattern.nonzeros
        if best.max(initial=0) < fewest or work > ENOUGH_WORK:
            break
    assert best is not None
    return best


def _require_symmetric(pattern: SparsityPattern, what: str) -> None:
    if not pattern.is_symmetric:
        raise ValueError(f"{what}: the pattern must be symmetric; take pattern | pattern.transpose, or color its columns.")


def _full_band(pattern: SparsityPattern) -> int | None:
    """The half-width r if the pattern is every (i, j) with |i - j| <= r; otherwise nothing."""
    n = pattern.shape[0]
    r = int(np.abs(pattern.rows - pattern.indices).max(initial=0))
    return r if pattern.nonzeros == n * (2 * r + 1) - r * (r + 1) else None


def _place_in_clique(pattern: SparsityPattern) -> np.ndarray | None:
    """The number of each vertex within its clique if the pattern is full blocks, in whatever order; otherwise nothing."""
    degree = np.diff(pattern.indptr)
    if not degree.all():
        return None
    block = pattern.indices[pattern.indptr[:-1]]  # named by its first vertex
    size = np.bincount(block, minlength=len(block))
    if (block[pattern.rows] != block[pattern.indices]).any() or (degree != size[block]).any():
        return None
    order = np.argsort(block, kind="stable")
    place = np.empty_like(block)
    place[order] = np.arange(len(block)) - np.repeat(np.cumsum(size) - size, size)
    return place


def _in_closed_form(pattern: SparsityPattern, width: Callable[[int], int]) -> np.ndarray | None:
    """Colors of full blocks, and of a full band, of half-width r, i mod width(r)."""
    place = _place_in_clique(pattern)
    if place is not None:
        return place
    r = _full_band(pattern)
    return None if r is None else np.arange(pattern.shape[0]) % width(r)


def star_coloring(pattern: SparsityPattern, orders: Sequence[str] = ORDERS) -> Coloring:
    """Colors such that every entry of a symmetric matrix can be read from its products with the sums of columns of a color.

    Neighbors differ in color and no path of four vertices has only two colors; colors that no entry is read from are made
    neutral. Greedy over each of ``orders``, the best is kept; a full band of half-width r gets its 2r + 1 colors directly, full
    blocks as many as the largest has columns.

    Raises:
        ValueError: the pattern is not symmetric.

    Source:
        Gebremedhin, Tarafdar, Manne and Pothen (2007), algorithm 4.1; the star number of a band: Gebremedhin, Manne and Pothen
        (2005), section 4.

    Example:
        An arrow, whose tip shares a row with everything, needs two colors:

        >>> arrow = SparsityPattern.of_matrix(np.eye(5) + np.eye(1, 5).T @ np.ones((1, 5)) + np.ones((5, 1)) @ np.eye(1, 5))
        >>> star_coloring(arrow).columns.tolist()
        [0, 1, 1, 1, 1]
    """
    _require_symmetric(pattern, "star_coloring")
    colors = _in_closed_form(pattern, lambda r: 2 * r + 1)
    if colors is None:
        colors = _best(pattern, _star_greedy, orders, fewest=2)
    return Coloring("star", _without_useless(pattern, colors), _NOTHING)


def _star_greedy(pattern: SparsityPattern, order: np.ndarray) -> np.ndarray:
    """First color that makes no path of four vertices with two colors.

    A vertex with two neighbors of one color is their hub. For a new vertex v beside w, the path v - w - x - y has two colors
    exactly if v takes the color of an x that is a hub of w's color; and q - v - w - x, with q and w of one color, exactly if v
    takes a color that q or w already sees. Both are kept by vertex, so that a hub with many spokes is not walked through.
    """
    n = pattern.shape[0]
    indptr, indices = pattern.indptr.tolist(), pattern.indices.tolist()
    bit = [0] * n  # by vertex: 1 << its color, 0 before it has one; sets of colors are sums of these
    around = [0] * n  # by vertex: the colors of its neighbors
    hubs = [0] * n  # by vertex: the colors of the neighbors that are hubs of its own color
    first: list[dict[int, int]] = [{}] * n  # by vertex: color -> the first neighbor that has it
    for v in order.tolist():
        near = [w for w in indices[indptr[v] : indptr[v + 1]] if bit[w]]
        seen: dict[int, int] = {}
        mine = forbidden = 0
        for w in near:
            mine |= bit[w]
            forbidden |= hubs[w]
            q = seen.setdefault(bit[w], w)
            if q != w:
                forbidden |= around[q] | around[w]
        around[v], first[v] = mine, seen
        free = ~(mine | forbidden)
        bit[v] = new = free & -free  # the lowest
        for w in near:
            if seen[bit[w]] != w:
                hubs[w] |= new
                hubs[seen[bit[w]]] |= new
            other = first[w].setdefault(new, v)
            if other != v:
                hubs[v] |= bit[w]
                hubs[other] |= bit[w]
            around[w] |= new
    return np.array([b.bit_length() - 1 for b in bit], dtype=np.int64)


def distance_1_coloring(pattern: SparsityPattern, orders: Sequence[str] = ORDERS) -> Coloring:
    """Colors such that the diagonal of a symmetric matrix can be read: neighbors differ, no more.

    Raises:
        ValueError: the pattern is not symmetric.

    Example:
        >>> distance_1_coloring(banded(1)(5)).columns.tolist()
        [0, 1, 0, 1, 0]
    """
    _require_symmetric(pattern, "distance_1_coloring")
    colors = _in_closed_form(pattern, lambda r: r + 1)
    if colors is None:
        colors = _best(pattern, _distance_1_greedy, orders, fewest=2)
    return Coloring("distance-1", colors, _NOTHING)


def _distance_1_greedy(pattern: SparsityPattern, order: np.ndarray) -> np.ndarray:
    indptr, indices = pattern.indptr.tolist(), pattern.indices.tolist()
    color = [NEUTRAL] * pattern.shape[0]
    for v in order.tolist():
        forbidden = {color[w] for w in indices[indptr[v] : indptr[v + 1]]}
        mine = 0
        while mine in forbidden:
            mine += 1
        color[v] = mine
    return np.array(color, dtype=np.int64)


def column_coloring(pattern: SparsityPattern) -> Coloring:
    """Colors of columns such that no row meets two columns of one color.

    Greedy in the natural order and by falling number of entries. Never fewer than the longest row has entries.

    Source:
        Curtis, Powell and Reid (1974); Coleman and Moré (1983).

    Example:
        >>> column_coloring(SparsityPattern.of_entries([0, 0, 1], [0, 1, 2], (2, 3))).columns.tolist()
        [0, 1, 0]
    """
    longest = int(np.diff(pattern.indptr).max(initial=0))
    by_length = np.argsort(-np.diff(pattern.transpose.indptr), kind="stable")
    best = _orthogonal_greedy(pattern, np.arange(pattern.shape[1]))
    if best.max(initial=0) + 1 > longest and pattern.nonzeros <= ENOUGH_WORK:
        best = min(best, _orthogonal_greedy(pattern, by_length), key=lambda colors: colors.max(initial=0))
    empty = np.diff(pattern.transpose.indptr) == 0
    return Coloring("column", _renumbered(np.where(empty, NEUTRAL, best)), _NOTHING)


def _orthogonal_greedy(pattern: SparsityPattern, order: np.ndarray) -> np.ndarray:
    indptr, indices = pattern.transpose.indptr.tolist(), pattern.transpose.indices.tolist()
    met: list[set[int]] = [set() for _ in range(pattern.shape[0])]  # by row: the colors that it meets
    color = [0] * pattern.shape[1]
    for j in order.tolist():
        rows = indices[indptr[j] : indptr[j + 1]]
        forbidden = set().union(*(met[i] for i in rows))
        mine = 0
        while mine in forbidden:
            mine += 1
        color[j] = mine
        for i in rows:
            met[i].add(mine)
    return np.array(color, dtype=np.int64)


def row_coloring(pattern: SparsityPattern) -> Coloring:
    """Colors of rows such that no column meets two rows of one color: a column coloring of the transpose."""
    return Coloring("row", _NOTHING, column_coloring(pattern.transpose).columns)


def bidirectional_coloring(pattern: SparsityPattern) -> Coloring:
    """Colors of rows and columns such that every entry can be read from a product with A or with its transpose.

    The longest rows are read from products with the transpose and leave the columns free of them, or the longest columns from
    products with A: what counts as long is tried at every power of two, columns alone and rows alone among them, and the fewest
    products win. An arrow, with a full row and a full column, takes three where columns or rows alone take n.

    Source:
        Coleman and Verma (1998), The efficient computation of sparse Jacobian matrices using automatic differentiation; neutral
        colors as in Gebremedhin, Manne and Pothen (2005), section 6.

    Example:
        >>> arrow = np.eye(6)
        >>> arrow[0] = arrow[:, 0] = 1
        >>> bidirectional_coloring(SparsityPattern.of_matrix(arrow))
        bidirectional coloring with 3 colors
    """
    by_rows = [Coloring("bidirectional", columns, rows) for rows, columns in _splits(pattern)]
    by_columns = [Coloring("bidirectional", columns, rows) for columns, rows in _splits(pattern.transpose)]
    return min([*by_rows, *by_columns], key=lambda coloring: coloring.count)


def _splits(pattern: SparsityPattern) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Colors of the rows longer than 1, 2, 4, ..., the others neutral, and of the columns of what is left."""
    m, n = pattern.shape
    length = np.diff(pattern.indptr)
    for longest in [0, *(2**e for e in range(int(length.max(initial=0)).bit_length()))]:
        long = length > longest
        inside = long[pattern.rows]
        parts = [SparsityPattern.of_entries(pattern.rows[k], pattern.indices[k], (m, n)) for k in (inside, ~inside)]
        yield row_coloring(parts[0]).rows, column_coloring(parts[1]).columns


def _renumbered(colors: np.ndarray) -> np.ndarray:
    """The colors as 0, 1, ... without gaps; neutral ones stay."""
    used = np.unique(colors[colors >= 0])
    return np.where(colors >= 0, np.searchsorted(used, colors), NEUTRAL)


def _without_useless(pattern: SparsityPattern, colors: np.ndarray) -> np.ndarray:
    """A star coloring in which each color is neutral that every entry can do without."""
    k = int(colors.max(initial=NEUTRAL)) + 1
    needed = set(np.unique(colors[pattern.rows[pattern.rows == pattern.indices]]).tolist())  # a_ii stands in one place only
    if len(needed) == k:
        return colors
    above = pattern.rows < pattern.indices
    one, other = (np.where(option.readable, option.color, NEUTRAL)[above] for option in _star_options(pattern, colors))
    keys = np.unique(np.minimum(one, other) * k + np.maximum(one, other))
    pairs = [(key // k, key % k) for key in keys.tolist()]  # colors that serve some entry; -1, and the only one that does
    needed |= {b for a, b in pairs if a in (NEUTRAL, b)}
    left = [pair for pair in pairs if needed.isdisjoint(pair)]
    while left:  # entries with two colors to choose from: the color that serves most of them first
        ends = list(itertools.chain.from_iterable(left))
        best = max(sorted(set(ends)), key=ends.count)
        needed.add(best)
        left = [pair for pair in left if best not in pair]
    return _renumbered(np.where(np.isin(colors, list(needed)), colors, NEUTRAL))


# ---------------------------------------------------------------------------------------------------- recovery


@dataclasses.dataclass(frozen=True)
class _Option:
    """A place where each entry might be read: a color, a coordinate, and whether the entry stands there alone."""

    color: np.ndarray
    coordinate: np.ndarray
    readable: np.ndarray


def _alone(rows: np.ndarray, colors: np.ndarray, ask_rows: np.ndarray, ask_colors: np.ndarray, m: int) -> np.ndarray:
    """Whether row ``ask_rows`` meets color ``ask_colors`` in exactly one of the entries ``(rows, colors)``."""
    k = int(colors.max(initial=0)) + 1
    kept = colors >= 0
    keys = rows[kept] * k + colors[kept]
    asked = ask_rows * k + np.maximum(ask_colors, 0)
    if m * k <= TABLE:
        once = np.bincount(keys, minlength=m * k)[asked] == 1
    else:
        different, counts = np.unique(keys, return_counts=True)
        place = np.minimum(np.searchsorted(different, asked), max(len(different) - 1, 0))
        once = (different[place] == asked) & (counts[place] == 1)
    return once & (ask_colors >= 0)


def _star_options(pattern: SparsityPattern, colors: np.ndarray) -> tuple[_Option, _Option]:
    """For the entry (i, j): row min(i, j) of the color of the other, and the other way round; the same for (j, i)."""
    low, high = np.minimum(pattern.rows, pattern.indices), np.maximum(pattern.rows, pattern.indices)
    met = colors[pattern.indices]
    return tuple(
        _Option(colors[other], at, _alone(pattern.rows, met, at, colors[other], pattern.shape[0]))
        for at, other in ((low, high), (high, low))
    )  # type: ignore[return-value]


def recovery(pattern: SparsityPattern, coloring: Coloring) -> np.ndarray:
    """For each entry of the pattern, row by row, where it stands among the products.

    With ``column_colors`` products A s of length m and ``row_colors`` products A^T s of length n, all laid end to end, entry e is
    number ``recovery[e]``. For a star coloring A is symmetric, and (i, j) and (j, i) are read from the same place.

    Raises:
        ValueError: some entry stands nowhere alone: the coloring does not belong to the pattern.

    Example:
        >>> recovery(banded(0)(3), Coloring("star", np.zeros(3, dtype=np.int64), np.empty(0, dtype=np.int64))).tolist()
        [0, 1, 2]
    """
    m, n = pattern.shape
    rows, columns = pattern.rows, pattern.indices
    if coloring.kind == "star":
        first, second = _star_options(pattern, coloring.columns)
        color = np.where(first.readable, first.color, second.color)
        places, readable = color * m + np.where(first.readable, first.coordinate, second.coordinate), (first, second)
        return _checked(places, readable[0].readable | readable[1].readable, pattern)
    places, found = np.zeros(pattern.nonzeros, dtype=np.int64), np.zeros(pattern.nonzeros, dtype=bool)
    if coloring.rows.size:
        color = coloring.rows[rows]
        found = _alone(columns, color, columns, color, n)
        places = coloring.column_colors * m + color * n + columns
    if coloring.columns.size:
        color = coloring.columns[columns]
        by_column = _alone(rows, color, rows, color, m)
        places, found = np.where(by_column, color * m + rows, places), found | by_column
    return _checked(places, found, pattern)


def recovery_of_diagonal(pattern: SparsityPattern, coloring: Coloring) -> np.ndarray:
    """For each i, where the diagonal entry a_ii stands among the products, as in :func:`recovery`."""
    color = coloring.columns[pattern.indices]
    every = np.arange(pattern.shape[0])
    rows, met = np.append(pattern.rows, every), np.append(color, coloring.columns)  # a_ii counts, whether stored or not
    stored = pattern.rows == pattern.indices
    kept = np.append(~stored, np.ones(len(every), dtype=bool))
    readable = _alone(rows[kept], met[kept], every, coloring.columns, pattern.shape[0])
    return _checked(coloring.columns * pattern.shape[0] + every, readable, banded(0)(pattern.shape[0]))


def _checked(places: np.ndarray, readable: np.ndarray, pattern: SparsityPattern) -> np.ndarray:
    if not readable.all():
        entry = int(np.argmin(readable))
        where = f"({pattern.rows[entry]}, {pattern.indices[entry]})"
        raise ValueError(
            f"the coloring does not belong to the pattern: entry {where} cannot be read from any product. Color this pattern."
        )
    return places


# ---------------------------------------------------------------------------------------------------- an independent judge


def violation(pattern: SparsityPattern, coloring: Coloring) -> str | None:
    """What is wrong with a coloring, by the definition, entry by entry; ``None`` if nothing is.

    An entry a_ij can be read from the products with columns if column j alone among those of its color has an entry in row i;
    from the products with rows if row i alone among those of its color has an entry in column j. A star coloring may also read
    the mirrored a_ji; a distance-1 coloring has only diagonal entries to read. Slow, and independent of the rest of this module.

    Example:
        >>> violation(banded(1)(3), Coloring("star", np.array([0, 1, 0]), np.empty(0, dtype=np.int64)))
        >>> violation(banded(1)(3), Coloring("star", np.array([0, 0, 1]), np.empty(0, dtype=np.int64)))
        'entry (0, 0) shares its color with column 1'
    """
    m, n = pattern.shape
    in_row: list[set[int]] = [set(map(int, pattern.indices[pattern.indptr[i] : pattern.indptr[i + 1]])) for i in range(m)]
    in_column: list[set[int]] = [set() for _ in range(n)]
    for i, columns in enumerate(in_row):
        for j in columns:
            in_column[j].add(i)

    def beside(i: int, j: int) -> str | None:
        """Why a_ij cannot be read from a product with columns."""
        color = int(coloring.columns[j]) if coloring.columns.size else NEUTRAL
        others = sorted(k for k in in_row[i] if k != j and coloring.columns[k] == color) if color >= 0 else []
        return f"shares its color with column {others[0]}" if others else None if color >= 0 else "has no color"

    def below(i: int, j: int) -> str | None:
        """Why a_ij cannot be read from a product with rows."""
        color = int(coloring.rows[i]) if coloring.rows.size else NEUTRAL
        others = sorted(k for k in in_column[j] if k != i and coloring.rows[k] == color) if color >= 0 else []
        return f"shares its color with row {others[0]}" if others else None if color >= 0 else "has no color"

    wanted: Iterable[tuple[int, int]] = ((i, j) for i in range(m) for j in sorted(in_row[i]))
    if coloring.kind == "distance-1":
        wanted = ((i, i) for i in range(n))
    ways = {
        "star": lambda i, j: (beside(i, j), beside(j, i)),
        "distance-1": lambda i, j: (beside(i, j),),
        "column": lambda i, j: (beside(i, j),),
        "row": lambda i, j: (below(i, j),),
        "bidirectional": lambda i, j: (beside(i, j), below(i, j)),
    }[coloring.kind]
    for i, j in wanted:
        reasons = ways(i, j)
        if all(reasons):
            return f"entry ({i}, {j}) {reasons[0]}"
    return None
