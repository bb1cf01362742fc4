"""What structure saves, all of a case measured in one run: ``python tests/benchmarks/structure.py``.

A case is one result, computed in several ways that take turns: the whole Hessian by lifting, its diagonal, a sparse Hessian, a
prepared one. Every way is compared with the first before anything is timed. JAX, asdex and BackPACK take part where they are
installed. The table gives medians; a ratio above 1 says how many times longer that way takes than ours. With ``--memory`` each
way runs once more in a process of its own, after a tiny call, for the peak growth of its resident memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from memory import MIB, growth_of
from problems import jax
from torch import Tensor, nn
from torch.nn import functional as F

import functional_hess as fh

try:
    import asdex
except ImportError:  # everything else is still measured
    asdex = None
try:
    import backpack
    from backpack.extensions import DiagHessian
except ImportError:
    backpack = DiagHessian = None

__all__ = ["CASES", "Case", "Way", "agree", "prepared_ways", "vector"]

jnp = jax.numpy if jax is not None else None
Call = Callable[[], Any]
ROWS = "reverse-over-reverse"  # a mode asked for by name: no structure is looked for
SHORTEST = 0.02  # seconds that one measurement lasts at least, by repeating the call


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to a result. ``make`` prepares the call that is timed; ``slow`` ones run fewer rounds."""

    name: str
    make: Callable[[], Call]
    slow: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """The first way is ours; ``ways(tiny)`` lists them at full size or at one for trying out."""

    title: str
    ways: Callable[[bool], list[Way]]
    tolerance: float = 1e-10


def vector(result: Any) -> np.ndarray:
    """Any result as one vector of numbers: leaves in the order of sorted keys, blocks row by row."""
    if isinstance(result, dict):
        return np.concatenate([vector(result[key]) for key in sorted(result)])
    if isinstance(result, (list, tuple)):
        return np.concatenate([vector(part) for part in result])
    if isinstance(result, Tensor) and result.layout != torch.strided:
        return vector(result.to_dense())
    if hasattr(result, "todense"):
        return vector(result.todense())
    return np.asarray(result.detach() if isinstance(result, Tensor) else result).reshape(-1)


def agree(result: Any, truth: np.ndarray) -> float:
    """The largest difference of an entry, as a part of the largest entry."""
    return float(np.abs(vector(result) - truth).max() / np.abs(truth).max())


def prepared_ways(case: Case, tiny: bool) -> Iterator[tuple[Way, Call]]:
    for way in case.ways(tiny):
        yield way, way.make()


def only(installed: Any, way: Way) -> list[Way]:
    return [way] if installed is not None else []


# ---------------------------------------------------------------------------------------------------- dense networks


def _classifier(widths: tuple[int, ...], samples: int, dtype: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x: dict[str, np.ndarray] = {}
    for layer, (rows, columns) in enumerate(itertools.pairwise(widths), 1):
        x[f"w{layer}"] = (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(dtype)
        x[f"b{layer}"] = (0.1 * rng.standard_normal(columns)).astype(dtype)
    return x, rng.standard_normal((samples, widths[0])).astype(dtype), rng.integers(0, widths[-1], samples)


def _network(tanh: Any, w: dict[str, Any], h: Any) -> Any:
    depth = len(w) // 2
    for layer in range(1, depth + 1):
        h = h @ w[f"w{layer}"] + w[f"b{layer}"]
        h = tanh(h) if layer < depth else h
    return h


def _loss(w: dict[str, Tensor], X: Tensor, y: Tensor) -> Tensor:
    """Of one sample or of many."""
    return F.cross_entropy(_network(torch.tanh, w, X), y)


def _jax_loss(w: Any, X: Any, y: Any) -> Any:
    return -jnp.take_along_axis(jax.nn.log_softmax(_network(jnp.tanh, w, X)), y[:, None], 1).mean()


def _tensors(arrays: Any) -> Any:
    return {k: torch.from_numpy(v) for k, v in arrays.items()} if isinstance(arrays, dict) else torch.from_numpy(arrays)


def _jax_compiled(hessian: Callable[..., Any], *arrays: Any) -> Call:
    arguments = jax.tree.map(jnp.asarray, arrays)
    compiled = jax.jit(hessian).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def dense(widths: tuple[int, ...], samples: int, dtype: Any, tiny: bool) -> list[Way]:
    arrays = _classifier((3, 2, 2) if tiny else widths, 5 if tiny else samples, dtype)
    args = tuple(map(_tensors, arrays))
    risk = fh.empirical_risk(_loss)
    return [
        Way("lifted", lambda: lambda: fh.hessian(risk)(*args)),
        Way("lifted, prepared", lambda: functools.partial(fh.prepare(fh.hessian(risk), *args), *args)),
        Way("rows", lambda: lambda: fh.hessian(_loss, mode=ROWS)(*args)),
        Way("torch.func.hessian", lambda: lambda: torch.func.hessian(_loss)(*args), slow=True),
        *only(jax, Way("jax.hessian, compiled", lambda: _jax_compiled(jax.hessian(_jax_loss), *arrays))),
    ]


def diagonal(widths: tuple[int, ...], samples: int, tiny: bool, *, rows: bool = True) -> list[Way]:
    arrays = _classifier((3, 2, 2) if tiny else widths, 5 if tiny else samples, np.float32)
    args = tuple(map(_tensors, arrays))
    risk = fh.empirical_risk(_loss)
    by_rows = Way("rows", lambda: lambda: fh.hessian_diagonal(_loss, mode=ROWS)(*args), slow=True)
    return [
        Way("lifted", lambda: lambda: fh.hessian_diagonal(risk)(*args)),
        *([by_rows] if rows or tiny else []),
        *only(backpack, Way("BackPACK DiagHessian", lambda: _backpack(*args))),
    ]


def _backpack(w: dict[str, Tensor], X: Tensor, y: Tensor) -> Call:
    depth = len(w) // 2
    layers: list[nn.Module] = []
    for layer in range(1, depth + 1):
        linear = nn.Linear(*w[f"w{layer}"].shape)
        linear.load_state_dict({"weight": w[f"w{layer}"].T, "bias": w[f"b{layer}"]})
        layers += [linear, *([nn.Tanh()] if layer < depth else [])]
    net = backpack.extend(nn.Sequential(*layers))
    criterion = backpack.extend(nn.CrossEntropyLoss())

    def run() -> dict[str, Tensor]:
        with backpack.backpack(DiagHessian()):
            criterion(net(X), y).backward()
        linears = net[::2]
        found = {f"w{i}": linear.weight.diag_h.T for i, linear in enumerate(linears, 1)}
        return {**found, **{f"b{i}": linear.bias.diag_h for i, linear in enumerate(linears, 1)}}

    return run


# ---------------------------------------------------------------------------------------------------- other architectures


def _convolutional(w: dict[str, Tensor], image: Tensor, y: Tensor) -> Tensor:
    """LeNet's shape, on 12 x 12."""
    h = F.avg_pool2d(torch.tanh(F.conv2d(image, w["c1"], w["a1"], padding=1)), 2)
    h = F.avg_pool2d(torch.tanh(F.conv2d(h, w["c2"], w["a2"])), 2)
    return F.cross_entropy(torch.tanh(h.flatten() @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"], y)


def _convolutional_arguments(tiny: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    channels, units, samples = ((1, 2), 3, 3) if tiny else ((4, 8), 32, 64)
    shapes = {
        "c1": (channels[0], 1, 3, 3), "a1": (channels[0],), "c2": (channels[1], channels[0], 3, 3), "a2": (channels[1],),
        "w1": (4 * channels[1], units), "b1": (units,), "w2": (units, 10), "b2": (10,),
    }  # fmt: skip
    w = {name: 0.3 * torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    image = torch.randn(samples, 1, 12, 12, generator=g, dtype=torch.float64)
    return w, image, torch.randint(10, (samples,), generator=g)


def _transformer(w: dict[str, Tensor], tokens: Tensor, y: Tensor) -> Tensor:
    """Two blocks of one-headed attention with LayerNorm, over the tokens of one sample."""
    h = tokens
    for block in ("1", "2"):
        n = F.layer_norm(h, h.shape[-1:], w["g" + block], w["s" + block])
        q, k, v = (n @ w[name + block] for name in "qkv")
        h = h + torch.softmax(q @ k.mT / h.shape[-1] ** 0.5, -1) @ v @ w["o" + block]
        n = F.layer_norm(h, h.shape[-1:], w["p" + block], w["r" + block])
        h = h + F.gelu(n @ w["u" + block] + w["b" + block]) @ w["d" + block]
    return F.cross_entropy(h.mean(0) @ w["head"], y)


def _transformer_arguments(tiny: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    d, length, samples = (2, 2, 3) if tiny else (8, 6, 64)

    def normal(*shape: int) -> Tensor:
        return 0.4 * torch.randn(shape, generator=g, dtype=torch.float64)

    w = {"head": normal(d, 3)}
    for block in ("1", "2"):
        w |= {name + block: normal(d, d) for name in "qkvo"} | {name + block: 1 + normal(d) for name in "gp"}
        w |= {name + block: normal(d) for name in "sr"}
        w |= {"u" + block: normal(d, 2 * d), "b" + block: normal(2 * d), "d" + block: normal(2 * d, d)}
    tokens = torch.randn(samples, length, d, generator=g, dtype=torch.float64)
    return w, tokens, torch.randint(3, (samples,), generator=g)


def against_rows(
    verb: Callable[..., Any], sample_loss: Callable[..., Tensor], make: Callable[[bool], Any], tiny: bool
) -> list[Way]:
    w, *batch = make(tiny)
    risk = fh.empirical_risk(sample_loss)
    mapped = torch.func.vmap(sample_loss, (None, 0, 0))

    def mean(w: dict[str, Tensor], *batch: Tensor) -> Tensor:
        return mapped(w, *batch).mean()

    return [
        Way("lifted", lambda: lambda: verb(risk)(w, *batch)),
        Way("rows", lambda: lambda: verb(mean, mode=ROWS)(w, *batch), slow=True),
    ]


def logistic(tiny: bool) -> list[Way]:
    rng = np.random.default_rng(0)
    samples, n = (7, 3) if tiny else (2000, 500)
    X, y = rng.standard_normal((samples, n)), rng.integers(0, 2, samples).astype(np.float64)
    w = rng.standard_normal(n) / np.sqrt(n)
    args = tuple(map(torch.from_numpy, (w, X, y)))

    def f(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(X @ w, y)

    def by_jax(w: Any, X: Any, y: Any) -> Any:
        z = X @ w
        return (jnp.logaddexp(0, z) - y * z).mean()

    risk = fh.empirical_risk(f)
    return [
        Way("affine prefix", lambda: lambda: fh.hessian(f)(*args)),
        Way("lifted risk", lambda: lambda: fh.hessian(risk)(*args)),
        Way("torch.func.hessian", lambda: lambda: torch.func.hessian(f)(*args)),
        *only(jax, Way("jax.hessian, compiled", lambda: _jax_compiled(jax.hessian(by_jax), w, X, y))),
    ]


# ---------------------------------------------------------------------------------------------------- sparse, and prepared


def rosenbrock(x: Any) -> Any:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def sparse(n: int, tiny: bool, *, first: bool = False) -> list[Way]:
    """Repeated evaluation of a plan, or with ``first`` detection, coloring and one evaluation together; values only."""
    x = np.random.default_rng(0).standard_normal(6 if tiny else n)
    point = torch.from_numpy(x)

    def ours(backend: str = "graph") -> Call:
        plan = fh.sparse_hessian(rosenbrock, point, backend=backend)
        return lambda: plan(point).values()

    def peer() -> Call:
        at = jnp.asarray(x)
        compiled = jax.jit(asdex.hessian_from_coloring(rosenbrock, asdex.hessian_coloring(rosenbrock, at)))
        return lambda: jax.block_until_ready(compiled(at)).data

    if first:
        return [
            Way("sparse_hessian", lambda: lambda: ours()()),
            *only(asdex, Way("asdex", lambda: lambda: peer()(), slow=True)),
        ]
    return [
        Way("sparse_hessian", ours),
        Way("sparse_hessian, inductor", lambda: ours("inductor")),
        *([Way("dense rows", lambda: lambda: _band(fh.hessian(rosenbrock)(point)))] if n <= 2000 or tiny else []),
        *only(asdex, Way("asdex, compiled", peer)),
    ]


def _band(H: Tensor) -> Tensor:
    """The entries of a tridiagonal matrix, row by row."""
    i = torch.arange(len(H))
    near = (i[:, None] - i).abs() <= 1
    return H[near]


def many_small(tiny: bool) -> list[Way]:
    xs = np.random.default_rng(0).standard_normal((2, 3) if tiny else (1000, 6))
    points = torch.from_numpy(xs)
    ours = fh.vmap(fh.hessian(rosenbrock))

    def called(prepared: Callable[..., Any]) -> Call:
        return lambda: prepared(points)

    return [
        Way("prepared", lambda: called(fh.prepare(ours, points))),
        Way("prepared, inductor", lambda: called(fh.prepare(ours, points, backend="inductor"))),
        Way("vmap(hessian)", lambda: lambda: ours(points)),
        Way("vmap(torch.func.hessian)", lambda: lambda: torch.func.vmap(torch.func.hessian(rosenbrock))(points)),
        *only(jax, Way("jax, compiled", lambda: _jax_compiled(jax.vmap(jax.hessian(rosenbrock)), xs))),
    ]


def lennard_jones(tiny: bool) -> list[Way]:
    sides = (1, 1, 3) if tiny else (5, 5, 4)
    lattice = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1).reshape(-1, 3)
    x = 1.12 * lattice + 0.05 * np.random.default_rng(0).standard_normal(lattice.shape)
    i, j = np.triu_indices(len(x), 1)
    args = tuple(map(torch.from_numpy, (x, i, j)))

    def energy(x: Any, i: Any, j: Any) -> Any:
        r6 = ((x[i] - x[j]) ** 2).sum(-1) ** -3
        return 4 * (r6**2 - r6).sum()

    def called(prepared: Callable[..., Any]) -> Call:
        return lambda: prepared(*args)

    return [
        Way("prepared", lambda: called(fh.prepare(fh.hessian(energy), *args))),
        Way("prepared, inductor", lambda: called(fh.prepare(fh.hessian(energy), *args, backend="inductor"))),
        Way("hessian", lambda: lambda: fh.hessian(energy)(*args)),
        Way("torch.func.hessian", lambda: lambda: torch.func.hessian(energy)(*args)),
        *only(jax, Way("jax.hessian, compiled", lambda: _jax_compiled(jax.hessian(energy), x, i, j))),
    ]


CASES: dict[str, Case] = {
    "mlp": Case(
        "exact Hessian, MLP 64-20-20-10, 512 samples, float32",
        functools.partial(dense, (64, 20, 20, 10), 512, np.float32),
        1e-4,
    ),
    "mlp64": Case(
        "exact Hessian, MLP 10-48-48-2, 64 samples, float64",
        functools.partial(dense, (10, 48, 48, 2), 64, np.float64),
    ),
    "diagonal": Case(
        "exact diagonal, MLP 784-128-10 (101,770 entries), 256 samples, float32",
        functools.partial(diagonal, (784, 128, 10), 256),
        1e-4,
    ),
    "diagonal-deep": Case(
        "exact diagonal, MLP 784-128-128-128-10, 256 samples, float32",
        functools.partial(diagonal, (784, 128, 128, 128, 10), 256, rows=False),
        1e-4,
    ),
    "convolution": Case(
        "exact Hessian, LeNet-like, 64 samples, float64",
        functools.partial(against_rows, fh.hessian, _convolutional, _convolutional_arguments),
    ),
    "convolution-diagonal": Case(
        "exact diagonal, LeNet-like, 64 samples, float64",
        functools.partial(against_rows, fh.hessian_diagonal, _convolutional, _convolutional_arguments),
    ),
    "transformer": Case(
        "exact Hessian, two transformer blocks, 64 samples, float64",
        functools.partial(against_rows, fh.hessian, _transformer, _transformer_arguments),
    ),
    "transformer-diagonal": Case(
        "exact diagonal, two transformer blocks, 64 samples, float64",
        functools.partial(against_rows, fh.hessian_diagonal, _transformer, _transformer_arguments),
    ),
    "logistic": Case("logistic regression, 2,000 x 500, float64", logistic),
    "sparse-1000": Case("sparse Rosenbrock, n = 1,000, repeated", functools.partial(sparse, 1000)),
    "sparse-100000": Case("sparse Rosenbrock, n = 100,000, repeated", functools.partial(sparse, 100_000)),
    "sparse-first": Case("sparse Rosenbrock, n = 100,000, first call", functools.partial(sparse, 100_000, first=True)),
    "many-small": Case("1,000 Hessians of size 6, repeated", many_small),
    "lennard-jones": Case("Lennard-Jones, 100 atoms, repeated", lennard_jones),
}


# ---------------------------------------------------------------------------------------------------- the table


def seconds_of(run: Call, repeats: int) -> float:
    gc.collect()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def timed(case: Case, rounds: int) -> dict[str, float]:
    """The median seconds of every way, taking turns; those that are slow run three rounds at most."""
    calls = list(prepared_ways(case, False))
    truth = vector(calls[0][1]())
    for way, run in calls[1:]:
        error = agree(run(), truth)
        if not error <= case.tolerance:
            raise ValueError(f"{case.title}: {way.name} differs by {error:.1e}.")
    repeats = {way.name: max(1, round(SHORTEST / seconds_of(run, 1))) for way, run in calls}
    seconds: dict[str, list[float]] = {way.name: [] for way, _ in calls}
    shuffled = random.Random(0)
    for turn in range(rounds):
        for way, run in shuffled.sample(calls, len(calls)):
            if not way.slow or turn < 3:
                seconds[way.name].append(seconds_of(run, repeats[way.name]))
    return {name: statistics.median(each) for name, each in seconds.items()}


def growth(case: str, way: str) -> int:
    """Bytes by which the resident set of a fresh process grows at most during one call, after a tiny one of the same kind."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--grow", case, way], capture_output=True, text=True, check=True
    )
    return int(child.stdout)


def _grown(case: str, way: str) -> int:
    tiny = {one.name: make for one, make in prepared_ways(CASES[case], True)}
    tiny[way]()
    run = next(one.make() for one in CASES[case].ways(False) if one.name == way)
    return growth_of(run)


def line(name: str, seconds: dict[str, float], memory: bool) -> str:
    case, ours = CASES[name], next(iter(seconds.values()))
    cells = [
        f"{way} {1e3 * each:,.3g} ms" + ("" if i == 0 else f" ({each / ours:.3g}x)")
        + (f", {growth(name, way) / MIB:,.0f} MB" if memory else "")
        for i, (way, each) in enumerate(seconds.items())
    ]  # fmt: skip
    return f"| {case.title} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="medians are over so many (default 7)")
    parser.add_argument("--memory", action="store_true", help="peak growth of resident memory too (Linux)")
    parser.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.grow:
        print(_grown(*chosen.grow))
        return
    for name in chosen.cases:
        print(f"[{time.strftime('%H:%M:%S')}] {name}", file=sys.stderr, flush=True)
        print(line(name, timed(CASES[name], chosen.rounds), chosen.memory), flush=True)


if __name__ == "__main__":
    main()
