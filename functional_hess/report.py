"""The model report: the exact Hessian of a loss, its spectrum, and how far it can be believed.

:func:`model_report` takes a :class:`Problem` (a function, a point), computes the whole Hessian H and its eigenvalues, checks it
three ways, and writes a folder with ``report.json``, ``blocks.png`` and ``spectrum.png``. The checks share as little as possible
with the computation of H, whose mirrored blocks are symmetric by construction and so prove nothing. With u, v, r random,

    symmetry      |<u, Hv> - <v, Hu>| / (|u| |Hv|)     two products forward-over-reverse, no matrix
    product       |H r - Hr| / |Hr|                    the matrix against such a product
    certificate   |H r - D| / |D|                      the matrix against first derivatives alone

where D = (8 (g(x+hr) - g(x-hr)) - (g(x+2hr) - g(x-2hr))) / 12h is the central difference quotient of the gradient g at steps h
and 2h, extrapolated. Of a ladder of h the one is taken at which D changes least from step to step; that change is its resolution.

:func:`digits_problem` trains a small classifier to report on; :func:`load_problem` finds a problem of the user's by name.
What a user can have got wrong is a :class:`ReportError` of one sentence; an exception of the user's own code passes untouched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pkgutil
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_hess.chunking import MIB, SHARE_OF_AVAILABLE, MemoryLimitError, available_bytes, parse_bytes
from functional_hess.explanation import explain
from functional_hess.guards import missing_rule
from functional_hess.plots import block_norms, heat_map, spectrum
from functional_hess.products import hvp
from functional_hess.second_order import hessian
from functional_hess.transforms import grad, value_and_grad
from functional_hess.tree import Space, add, norm, scale, tree_map

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["Problem", "ReportError", "as_table", "digits_problem", "load_problem", "model_report", "require_extras"]

Tree = Any
BATCH = 256
EXTREMES = 10  # eigenvalues shown at either end
MOST_LEAVES = 30  # rows of the table of blocks
PIXELS = 480  # of a side of the heat map
PROBES = 3  # random directions for each check
STEPS = 5  # lengths of step among which a difference quotient chooses
LEAST_RESOLUTION = 1e-2  # a difference quotient known less well than this says nothing


class ReportError(Exception):
    """The report cannot be made as asked; the message says why in one sentence."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A scalar function ``f(params, *args)`` and the point at which to report; ``facts`` go into the report as they are."""

    name: str
    f: Callable[..., Any]
    params: Tree
    args: tuple[Any, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- where problems come from


def require_extras(*names: str) -> None:
    """Raise now what would otherwise be raised after minutes of work.

    Raises:
        ReportError: a package is missing; the message holds the command that installs it.
    """
    for name in names:
        if sys.modules.get(name, sys) is None or (name not in sys.modules and importlib.util.find_spec(name) is None):
            package = {"sklearn": "scikit-learn"}.get(name, name)
            raise ReportError(f"the report needs {package}, which is not installed: pip install 'functional_hess[report]'.")


def load_problem(spec: str) -> Problem:
    """The problem that ``"package.module:problem"`` names: a callable that returns ``(f, params)`` or ``(f, params, args)``.

    Raises:
        ReportError: the text is not of that form, there is no such module or attribute, or it returns something else.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", spec):
        raise ReportError(f"a problem is named as package.module:problem, got {spec!r}.")
    path, _, attribute = spec.partition(":")
    try:
        found = pkgutil.resolve_name(f"{path}:")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # an import of that module's own has failed
        raise ReportError(
            f"{spec!r} must name a module that can be imported, but there is no module {error.name!r}, looked for from "
            f"{os.getcwd()} on. Run the command where the module is, or install it."
        ) from None
    for step in attribute.split("."):
        if not hasattr(found, step):
            raise ReportError(
                f"{spec!r} must name a function of the module, but {getattr(found, '__name__', attribute)!r} has no attribute "
                f"{step!r}. Write it as package.module:problem."
            )
        found = getattr(found, step)
    if not callable(found):
        raise ReportError(f"{spec!r} must be a function that returns (f, params), but is of type {type(found).__name__}.")
    return _problem_of(spec, found())


def _problem_of(spec: str, made: Any) -> Problem:
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise ReportError(f"{spec!r} must return (f, params) or (f, params, args), got {got}.")
    f, params, *rest = made
    args = rest[0] if rest else ()
    if not callable(f):
        raise ReportError(f"the f that {spec!r} returns must be callable, got {type(f).__name__}.")
    if not isinstance(args, (tuple, list)):
        raise ReportError(f"the args that {spec!r} returns must be a tuple, got {type(args).__name__}.")
    return Problem(spec, f, params, tuple(args))


def digits_problem(
    *, hidden: int = 16, steps: int = 300, weight_decay: float = 1e-4, seed: int = 0, progress: bool = True
) -> Problem:
    """A classifier of 8 x 8 images of handwritten digits, trained by stochastic gradient descent with momentum.

    affine (64 to ``hidden``), LayerNorm, GELU, affine (to 10); mean cross-entropy + ``weight_decay``/2 |params|^2; float64. Every
    fifth of the 1,797 images is kept for testing. ``seed`` is that of the initial weights and of the split.
    """
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    shuffled = torch.randperm(len(images), generator=generator)
    held_out = torch.arange(len(images)) % 5 == 0
    test, train = shuffled[held_out], shuffled[~held_out]
    X, y = images.double() / 16, labels.long()
    start = _initial_parameters(hidden, generator)

    def f(params: Tree, X: Tensor, y: Tensor) -> Tensor:
        decay = sum(((leaf**2).sum() for layer in params.values() for leaf in layer.values()), torch.zeros((), dtype=X.dtype))
        return torch.nn.functional.cross_entropy(_logits(params, X), y) + weight_decay / 2 * decay

    begun = time.perf_counter()
    end = _descend(f, start, (X[train], y[train]), steps, generator, progress)
    facts: dict[str, Any] = {
        "data": f"scikit-learn's digits: {len(train):,} images to train on, {len(test):,} to test on",
        "model": f"64 - {hidden} - LayerNorm - GELU - 10, weight decay {weight_decay:g}",
        "training": f"{steps} steps of gradient descent with momentum on {BATCH} images each",
        "training_seconds": time.perf_counter() - begun,
    }
    for when, params in (("before", start), ("after", end)):
        facts[f"training_loss_{when}"] = float(f(params, X[train], y[train]))
        facts[f"training_accuracy_{when}"] = _accuracy(params, X[train], y[train])
        facts[f"test_accuracy_{when}"] = _accuracy(params, X[test], y[test])
    return Problem("digits", f, end, (X[train], y[train]), facts)


def _initial_parameters(hidden: int, generator: torch.Generator) -> Tree:
    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)

    def constant(size: int, value: float) -> Tensor:
        return torch.full((size,), value, dtype=torch.float64)

    return {
        "hidden": {"weight": normal(hidden, 64), "bias": constant(hidden, 0)},
        "norm": {"weight": constant(hidden, 1), "bias": constant(hidden, 0)},
        "output": {"weight": normal(10, hidden), "bias": constant(10, 0)},
    }


def _logits(params: Tree, X: Tensor) -> Tensor:
    first, scaling, last = params["hidden"], params["norm"], params["output"]
    h = X @ first["weight"].T + first["bias"]
    h = torch.nn.functional.gelu(torch.nn.functional.layer_norm(h, h.shape[-1:], scaling["weight"], scaling["bias"]))
    return h @ last["weight"].T + last["bias"]


def _accuracy(params: Tree, X: Tensor, y: Tensor) -> float:
    return float((_logits(params, X).argmax(1) == y).double().mean())


def _descend(
    f: Callable[..., Tensor], params: Tree, data: tuple[Tensor, ...], steps: int, generator: torch.Generator, progress: bool
) -> Tree:
    """Gradient descent with momentum; the rate falls linearly to zero, so that it ends near a minimum."""
    rate, momentum = 0.15, 0.9
    velocity = tree_map(torch.zeros_like, params)
    with _bar("training", steps, progress, "step") as advance:
        for step in range(steps):
            batch = torch.randint(len(data[0]), (BATCH,), generator=generator)
            _, gradient = value_and_grad(f)(params, *(part[batch] for part in data))
            velocity = add(scale(momentum, velocity), scale(-rate * (1 - step / steps), gradient))
            params = add(params, velocity)
            advance(1)
    return params


@contextlib.contextmanager
def _bar(name: str, total: int, shown: bool, unit: str) -> Iterator[Callable[[int], Any]]:
    if not shown:
        yield lambda done: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit=unit) as bar:
        yield bar.update


# ---------------------------------------------------------------------------------------------------- the report


def model_report(
    problem: Problem,
    folder: str | Path,
    *,
    mode: str = "auto",
    chunk_size: int | str | None = "auto",
    memory_limit: int | float | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write ``report.json``, ``blocks.png`` and ``spectrum.png`` into ``folder``; returns what the JSON holds.

    Costs n Hessian-vector products, an eigenvalue decomposition without vectors of a dense n x n matrix in float64, and the
    memory of two such matrices.

    Args:
        problem: the function and the point.
        folder: made if it is not there.
        mode, chunk_size, memory_limit, progress: as for ``hessian``.
        seed: of the random directions of the checks.

    Raises:
        ReportError: f is no finite scalar, ``params`` holds no floating tensor, H is not finite, or the folder cannot be written.
        MemoryLimitError: the matrix or its eigenvalues do not fit; nothing of that size has been allocated.
    """
    require_extras("matplotlib", *(["tqdm"] if progress else []))
    folder = _writable(folder)
    space, value = _look(problem)
    options = {"mode": mode, "chunk_size": chunk_size, "memory_limit": memory_limit}
    with torch.no_grad():  # leaves that require grad would otherwise make every row keep a graph
        plan = explain(hessian(problem.f, **options), problem.params, *problem.args)
        _require_memory(space.dim, memory_limit)
        H, costs = _timed_hessian(problem, space, options, progress)
        checks = _checks(problem, space, H, seed)
    begun = time.perf_counter()
    eigenvalues = torch.linalg.eigvalsh(H)
    facts: dict[str, Any] = {
        "problem": problem.name,
        **problem.facts,
        "value": value,
        "n": space.dim,
        "dtype": str(space.dtype).removeprefix("torch."),
        "device": str(space.device),
        "mode": plan.mode,
        "repairs": list(plan.repairs),
        "chunk_size": plan.chunk_size,
        "chunks": plan.chunks,
        **costs,
        "predicted_bytes": round(plan.output_bytes + plan.working_bytes),
        **checks,
        **_spectral_facts(eigenvalues, torch.finfo(space.dtype).eps),
        "eigenvalue_seconds": time.perf_counter() - begun,
        **_block_facts(H, space),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
        },
    }
    _draw(folder, problem, space, H, eigenvalues, facts)
    (folder / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


_OTHER_FOLDER = "Pass another one, as in --out=DIR."


def _writable(folder: str | Path) -> Path:
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"cannot make the folder {folder} ({error.strerror or error}). {_OTHER_FOLDER}") from None
    if not os.access(folder, os.W_OK):
        raise ReportError(f"cannot write into the folder {folder}. {_OTHER_FOLDER}")
    return folder


def _look(problem: Problem) -> tuple[Space, float]:
    """The space of the parameters, and f at the point."""
    try:
        space = Space.of(problem.params, "params")
    except TypeError as error:
        raise ReportError(str(error)) from error
    if not space.dim:
        kind = type(problem.params).__name__
        raise ReportError(
            f"params holds no floating tensor with entries, but must be a tree of tensors (got {kind}), such as "
            "dict(module.named_parameters())."
        )
    value = problem.f(problem.params, *problem.args)
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        got = f"one of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ReportError(f"f must return a scalar, a floating tensor of shape (), got {got}.")
    if not torch.isfinite(value):
        raise ReportError(f"f must be finite at params, got {float(value.detach())}. Choose params at which it is.")
    return space, float(value.detach())


def _require_memory(n: int, memory_limit: int | float | str | None) -> None:
    """Two float64 matrices: the Hessian and what the eigenvalue solver makes of it."""
    need, room = 16 * n**2, SHARE_OF_AVAILABLE * available_bytes(torch.device("cpu"))
    room = room if memory_limit is None else min(room, parse_bytes(memory_limit))
    if need > room:
        raise MemoryLimitError(
            f"report: {n:,} eigenvalues need {need / MIB:,.0f} MB, but {room / MIB:,.0f} MB may be taken. Raise --memory-limit, "
            "or take fewer parameters."
        )


def _timed_hessian(problem: Problem, space: Space, options: dict[str, Any], progress: bool) -> tuple[Tensor, dict[str, Any]]:
    """H in float64 on the host, and what it cost."""
    _settle(space)
    before, begun = _peak_bytes(space), time.perf_counter()
    blocks = hessian(problem.f, **options, progress=progress)(problem.params, *problem.args)
    _settle(space)
    seconds, after = time.perf_counter() - begun, _peak_bytes(space)
    grown = None if before is None or after is None else after - before
    costs = {"seconds": seconds, "rows_per_second": space.dim / seconds, "peak_memory_growth_bytes": grown}
    H = space.matrix(blocks).cpu().double()
    _require_finite(H, space)
    return H, costs


def _settle(space: Space) -> None:
    if space.device.type == "cuda":
        torch.cuda.synchronize(space.device)


def _peak_bytes(space: Space) -> int | None:
    """The high-water mark so far: of the device's allocator, or of the resident memory of the process."""
    if space.device.type == "cuda":
        return torch.cuda.max_memory_allocated(space.device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _require_finite(H: Tensor, space: Space) -> None:
    bad = (~torch.isfinite(H)).nonzero()
    if len(bad):
        p, q = (space.paths[space.leaf_of(int(i))] or "params" for i in bad[0])
        raise ReportError(
            f"the Hessian has {len(bad):,} entries that are not finite, the first in the block {p} x {q}. Choose params at which "
            "f has second derivatives."
        )


def _checks(problem: Problem, space: Space, H: Tensor, seed: int) -> dict[str, Any]:
    """The largest of each error over random directions, relative; whether they are what rounding explains."""
    generator = torch.Generator().manual_seed(seed)
    tolerance = torch.finfo(space.dtype).eps ** 0.4

    def product(v: Tree) -> Tensor:
        return space.ravel(hvp(problem.f, problem.params, v, *problem.args)).cpu().double()

    symmetry, products, directions = [], [], []
    for _ in range(PROBES):
        u, v = space.random(generator), space.random(generator)
        U, V = (space.ravel(w).cpu().double() for w in (u, v))
        HU, HV = product(u), product(v)
        symmetry.append(_ratio((U @ HV - V @ HU).abs(), max(U.norm() * HV.norm(), V.norm() * HU.norm())))
        products.append(_ratio((H @ V - HV).norm(), HV.norm()))
        directions.append(v)
    errors = {"symmetry_error": _largest(symmetry), "product_error": _largest(products)}
    errors |= _certificates(problem, space, H, directions, tolerance)
    within = all(error is not None and error <= tolerance for error in (errors["symmetry_error"], errors["product_error"]))
    certificate, resolution = errors["certificate_error"], errors["certificate_resolution"]
    # H may differ from differences by what they are uncertain of; differences that do not settle confirm nothing.
    settled = agrees = False
    if certificate is not None and resolution is not None:
        settled = resolution <= max(tolerance, LEAST_RESOLUTION)
        agrees = settled and certificate <= max(tolerance, 10 * resolution)
    return {**errors, "tolerance": tolerance, "differences_settle": settled, "confirmed": within and agrees}


def _certificates(problem: Problem, space: Space, H: Tensor, directions: list[Tree], tolerance: float) -> dict[str, Any]:
    try:
        steepness = float(norm(grad(problem.f)(problem.params, *problem.args)))
    except RuntimeError as error:
        if not missing_rule(error):
            raise
        return dict.fromkeys(("gradient_norm", "certificate_error", "certificate_resolution"))  # no difference of gradients
    certificates, resolutions = [], []
    for r in directions:
        D, resolution = _difference_quotient(problem, space, r)
        size = max(float(D.norm()), tolerance * steepness)  # curvature far below the gradient is lost in its rounding
        certificates.append(_ratio((H @ space.ravel(r).cpu().double() - D).norm(), size))
        resolutions.append(_ratio(resolution, size))
    found = {"certificate_error": _largest(certificates), "certificate_resolution": _largest(resolutions)}
    return {"gradient_norm": steepness, **found}


def _difference_quotient(problem: Problem, space: Space, r: Tree) -> tuple[Tensor, Tensor]:
    """D of this module's docstring along r, and how much it changed from the step before."""
    x, direction = space.pack(problem.params, "params"), space.pack(r, "r")
    gradient = grad(problem.f)

    def quotient(h: float) -> Tensor:
        def g(m: int) -> Tensor:
            moved = [t + m * h * d for t, d in zip(x, direction, strict=True)]
            return space.ravel(gradient(space.at(moved), *problem.args)).cpu().double()

        return (8 * (g(1) - g(-1)) - (g(2) - g(-2))) / (12 * h)

    lengths = [max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0) for tensors in (x, direction)]
    h = torch.finfo(space.dtype).eps ** 0.2 * max(1.0, lengths[0]) / lengths[1]
    ladder = [quotient(h / 4**k) for k in range(STEPS)]
    changes = torch.stack([(fine - coarse).norm() for coarse, fine in itertools.pairwise(ladder)])
    best = int(changes.nan_to_num(nan=torch.inf).argmin())
    return ladder[best + 1], changes[best]


def _largest(errors: list[float]) -> float | None:
    """The largest, or None if one is not finite (JSON has no NaN)."""
    return max(errors) if all(map(math.isfinite, errors)) else None


def _ratio(error: Tensor, size: Tensor | float) -> float:
    return float(error) / float(size) if float(error) else 0.0


def _spectral_facts(eigenvalues: Tensor, eps: float) -> dict[str, Any]:
    zero = len(eigenvalues) * eps * float(eigenvalues.abs().max())
    descending = eigenvalues.flip(0).tolist()
    return {
        "top_eigenvalues": descending[:EXTREMES],
        "bottom_eigenvalues": descending[::-1][:EXTREMES],
        "zero_is_at_most": zero,
        "positive_eigenvalues": int((eigenvalues > zero).sum()),
        "zero_eigenvalues": int((eigenvalues.abs() <= zero).sum()),
        "negative_eigenvalues": int((eigenvalues < -zero).sum()),
        "eigenvalues": descending,
    }


def _block_facts(H: Tensor, space: Space) -> dict[str, Any]:
    inside = [slice(o, o + s) for o, s in zip(space.offsets, space.sizes, strict=True)]
    return {
        "trace": float(H.trace()),
        "frobenius_norm": float(H.norm()),
        "paths": [path or "params" for path in space.paths],
        "shapes": [list(shape) for shape in space.shapes],
        "block_traces": [float(H[p, p].trace()) for p in inside],
        "block_norms": [[float(H[p, q].norm()) for q in inside] for p in inside],
    }


def _draw(folder: Path, problem: Problem, space: Space, H: Tensor, eigenvalues: Tensor, facts: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    # A figure of its own, not one of pyplot's: nothing global changes.
    pair = Figure(figsize=(14.5, 6.6), layout="constrained")
    left, right = pair.subplots(1, 2)
    heat_map(left, H, space, pixels=PIXELS)
    block_norms(right, torch.tensor(facts["block_norms"]), space)
    pair.suptitle(f"Hessian of {problem.name} by parameter block", fontsize=13)
    pair.savefig(folder / "blocks.png", dpi=110)
    single = Figure(figsize=(9, 5.4), layout="constrained")
    spectrum(single.subplots(), eigenvalues, zero=facts["zero_is_at_most"])
    single.suptitle(problem.name, fontsize=13)
    single.savefig(folder / "spectrum.png", dpi=110)


# ---------------------------------------------------------------------------------------------------- the table


def as_table(facts: dict[str, Any]) -> str:
    """What :func:`model_report` returns, for reading."""
    lines = [(name, text) for name, text in _headline(facts) if text]
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join([*(f"{name:<{width}}{text}" for name, text in lines), "", *_block_lines(facts)])


def _headline(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    grown = facts["peak_memory_growth_bytes"]
    memory = "not known here" if grown is None else f"grew by {grown / MIB:,.1f} MB"
    yield "problem", facts["problem"]
    for name in ("data", "model", "training"):
        yield name, facts.get(name, "")
    if "training_seconds" in facts:
        yield "training time", f"{facts['training_seconds']:.2f} s"
        for name in ("training_loss", "training_accuracy", "test_accuracy"):
            yield name.replace("_", " "), f"{facts[name + '_before']:.4f} before, {facts[name + '_after']:.4f} after"
    steepness = facts["gradient_norm"]
    yield "f, |grad f|", f"{facts['value']:.6g}, " + ("not known" if steepness is None else f"{steepness:.3g}")
    yield "n", f"{facts['n']:,} coordinates in {len(facts['paths'])} lea{'ves' if len(facts['paths']) > 1 else 'f'}"
    yield "dtype", f"{facts['dtype']} on {facts['device']}"
    yield "mode", facts["mode"] + (f", repaired: {', '.join(facts['repairs'])}" if facts["repairs"] else "")
    yield "chunk", f"{facts['chunk_size']:,} rows at a time, {facts['chunks']:,} chunks"
    rate, solving = f"{facts['rows_per_second']:,.0f} rows/s", f"{facts['eigenvalue_seconds']:.2f} s for its eigenvalues"
    yield "time", f"{facts['seconds']:.2f} s for H ({rate}), {solving}"
    yield "peak memory", f"{memory}, allocator's reserve included; predicted in use: {facts['predicted_bytes'] / MIB:,.1f} MB"
    for name, meaning in MEANINGS.items():
        error = facts[name.replace(" ", "_")]
        yield name, f"{'none' if error is None else f'{error:.1e}':<12}{meaning}"
    yield "verdict", _verdict(facts)
    counts = (f"{facts[f'{sign}_eigenvalues']:,} {sign}" for sign in ("positive", "zero", "negative"))
    yield "eigenvalues", f"{', '.join(counts)} (zero: at most {facts['zero_is_at_most']:.1e})"
    yield "top eigenvalues", _numbers(facts["top_eigenvalues"][:6])
    yield "lowest eigenvalues", _numbers(facts["bottom_eigenvalues"][:6])
    yield "trace", f"{facts['trace']:.6g}"
    yield "Frobenius norm", f"{facts['frobenius_norm']:.6g}"


MEANINGS = {
    "symmetry error": "|<u,Hv> - <v,Hu>| / |u||Hv|, of two independent products",
    "product error": "|H r - hvp(r)| / |hvp(r)|, the matrix against a product",
    "certificate error": "|H r - D| / |D|, the matrix against differences D of the gradient at two steps",
    "certificate resolution": "how well D itself is known: its relative change when the steps are quartered",
}


def _verdict(facts: dict[str, Any]) -> str:
    if facts["confirmed"]:
        return f"confirmed: each error is within {facts['tolerance']:.1e}, or within the resolution of the differences"
    if not facts["differences_settle"]:
        return "not confirmed: differences of the gradient say nothing here (f is not smooth, or needs float64)"
    return "NOT CONFIRMED: H is not what the checks say; f is not smooth here, or a derivative of one of its ops is wrong"


def _numbers(values: list[float]) -> str:
    return "  ".join(f"{value:.4g}" for value in values)


def _block_lines(facts: dict[str, Any]) -> Iterator[str]:
    norms = torch.tensor(facts["block_norms"], dtype=torch.float64)
    coupling = (norms.square().sum(1) - norms.diagonal().square()).clamp(min=0).sqrt()
    order = sorted(range(len(norms)), key=lambda k: -float(norms[k, k]))[:MOST_LEAVES]
    width = max(len("block"), *(len(facts["paths"][k]) for k in order)) + 2
    yield f"{'block':<{width}}{'shape':>14}{'trace':>14}{'norm':>14}{'off-diagonal':>14}"
    for k in sorted(order):
        shape = " x ".join(map(str, facts["shapes"][k])) or "scalar"
        numbers = (facts["block_traces"][k], float(norms[k, k]), float(coupling[k]))
        yield f"{facts['paths'][k]:<{width}}{shape:>14}" + "".join(f"{number:>14.4g}" for number in numbers)
    if len(norms) > len(order):
        yield f"and {len(norms) - len(order)} blocks of smaller norm; report.json has them all"
