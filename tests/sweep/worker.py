"""One process of the sweep: reads a group of cases a line, writes what it begins and how that ends, a line each.

Lines are JSON, and the first that it writes is ``{"ready": true}``. In: ``{"list": source}`` or ``{"group": name, "skip": [key,
...]}``. Out: ``{"names": [...]}``, or for every (case, dtype, call) ``{"begin": key}`` and then ``{"end": key, "verdict": ...,
"detail": ...}``, and ``{"done": name}``. So whoever reads knows what was under way when the process died, and can go on without
it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import functional_hess as fh
from sweep import cases as own
from sweep import opinfo
from sweep.judge import Truth, compare, truth_of
from sweep.problems import READOUTS, Case, Problem, problem_of

__all__ = ["CALLS", "DTYPES", "OURS", "PEERS", "SOURCES", "attempted", "joined", "judged", "option", "run", "serve", "split"]

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def split(flat: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    return tuple(p.reshape(t.shape) for p, t in zip(flat.split([t.numel() for t in problem.x]), problem.x, strict=True))


def joined(parts: Any) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def _direction(problem: Problem) -> Tensor:
    n = sum(t.numel() for t in problem.x)
    return torch.cos(1.0 + 1.9 * torch.arange(n, dtype=torch.float64)).to(problem.x[0].dtype)


def _matrix(problem: Problem, blocks: Any) -> Tensor:
    sizes = [t.numel() for t in problem.x]
    return torch.cat(
        [torch.cat([b.reshape(p, q) for b, q in zip(row, sizes, strict=True)], 1) for row, p in zip(blocks, sizes, strict=True)]
    )


def option(problem: Problem) -> dict[str, Any]:
    return {} if problem.seed is None else {"randomness": "same"}


def _tupled(problem: Problem) -> Callable[[tuple[Tensor, ...]], Tensor]:
    return lambda x: problem.f(*x)


def _hvp(p: Problem) -> Tensor:
    return joined(fh.hvp(_tupled(p), p.x, split(_direction(p), p), **option(p)))


def _hvp_under_vmap(p: Problem) -> Tensor:
    eye = torch.eye(sum(t.numel() for t in p.x), dtype=p.x[0].dtype)
    return fh.vmap(lambda v: joined(fh.hvp(_tupled(p), p.x, split(v, p), **option(p))), **option(p))(eye).T


def _rows(p: Problem) -> Tensor:
    return torch.cat([rows for _, rows in fh.hessian_rows(_tupled(p), **option(p))(p.x)])


def _hessian(p: Problem) -> Tensor:
    return _matrix(p, fh.hessian(_tupled(p), **option(p))(p.x))


def _diagonal(p: Problem) -> Tensor:
    return joined(fh.hessian_diagonal(_tupled(p), **option(p))(p.x))


def _plain_forward(p: Problem) -> Tensor:
    gradient = torch.func.grad(p.f, tuple(range(len(p.x))))
    return joined(torch.func.jvp(gradient, p.x, split(_direction(p), p))[1])


def _plain_reverse(p: Problem) -> Tensor:
    gradient = torch.func.grad(p.f, tuple(range(len(p.x))))
    return joined(torch.func.vjp(gradient, *p.x)[1](split(_direction(p), p)))


def _plain_hessian(p: Problem) -> Tensor:
    return _matrix(p, torch.func.hessian(p.f, tuple(range(len(p.x))))(*p.x))


OURS: dict[str, Callable[[Problem], Tensor]] = {
    "hvp": _hvp,
    "vmap(hvp)": _hvp_under_vmap,
    "hessian_rows": _rows,
    "hessian": _hessian,
    "hessian_diagonal": _diagonal,
}
PEERS: dict[str, Callable[[Problem], Tensor]] = {
    "plain jvp(grad)": _plain_forward,
    "plain vjp(grad)": _plain_reverse,
    "torch.func.hessian": _plain_hessian,
}
CALLS = {**OURS, **PEERS}
PRODUCTS = ("hvp", "plain jvp(grad)", "plain vjp(grad)")


def judged(call: str, problem: Problem, truth: Truth) -> tuple[str, str]:
    """The verdict on one call, and what there is to say about it."""
    dtype = problem.x[0].dtype
    if problem.seed is not None:
        torch.manual_seed(problem.seed)
    answer = attempted(lambda: CALLS[call](problem), refusals_of_torch=call in PEERS)
    if not isinstance(answer, Tensor):
        return answer
    if call == "hessian_diagonal":
        return compare(answer, truth.diagonal, dtype)
    return compare(answer, truth, dtype, _direction(problem).double() if call in PRODUCTS else None)


def attempted(call: Callable[[], Tensor], *, refusals_of_torch: bool) -> Tensor | tuple[str, str]:
    """The answer, or the verdict and what there is to say where an error is raised."""
    try:
        return call()
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
        refused = refusals_of_torch or _is_refusal(error)
        return "refused" if refused else "crash", text if refused else text + " @ " + _last_frames(error)


def _is_refusal(error: BaseException) -> bool:
    """An error class of the package, or an error about what was asked for that the package itself raises."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    own = isinstance(error, (TypeError, ValueError, NotImplementedError)) and raised_in.startswith(os.path.dirname(fh.__file__))
    return own or type(error).__module__.startswith("functional_hess")


def _last_frames(error: BaseException) -> str:
    return " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:-6:-1])


SOURCES: dict[str, Any] = {"own": own, "opinfo": opinfo}


def run(
    group: str,
    skip: set[str],
    say: Callable[[dict[str, Any]], None],
    sources: Mapping[str, Any] = SOURCES,
    judge: Callable[..., None] | None = None,
) -> None:
    """Judge every case of a group but what ``skip`` names."""
    source, name = group.split(":", 1)
    for number, case in enumerate(sources[source].cases(name)):
        for readout in READOUTS if number == 0 else READOUTS[:1]:
            (judge or _judge_case)(case, readout, f"{source}:{case.name}|{readout}", skip, say)
    say({"done": group})


def _judge_case(case: Case, readout: str, prefix: str, skip: set[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Both dtypes at the point rounded to float32, so that one truth is for both."""
    keys = {f"{prefix}|{dtype}|{call}": (dtype, call) for dtype in DTYPES for call in CALLS}
    left = [key for key in keys if key not in skip]
    key = f"{prefix}|-|truth"
    if not left or (key in skip and len(left) == len(keys)):  # done, or without a truth
        return
    say({"begin": key})
    try:
        problems = {name: problem_of(case, readout, dtype) for name, dtype in DTYPES.items()}
        truth = truth_of(problems["float64"], problems["float32"])
    except Exception as error:
        return say({"end": key, "verdict": "none", "detail": f"{type(error).__name__}: {error}"[:400]})
    detail = f"{truth.lost:.0e} roundings may be lost, {truth.amplified:.0e} relatively"
    say({"end": key, "verdict": "by values" if truth.by_values else "truth", "detail": detail})
    for key in left:
        dtype, call = keys[key]
        say({"begin": key})
        verdict, detail = judged(call, problems[dtype], truth)
        say({"end": key, "verdict": verdict, "detail": detail})


def serve(sources: Mapping[str, Any] = SOURCES, judge: Callable[..., None] | None = None) -> None:
    """Answer lines until there are none."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever torch prints is not an answer
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        if "list" in asked:
            say({"names": [f"{asked['list']}:{name}" for name in sources[asked["list"]].names()]})
        else:
            run(asked["group"], set(asked["skip"]), say, sources, judge)


if __name__ == "__main__":
    serve()
