"""Third derivatives of the project's own table, and second ones mapped over points: ``sweep.run`` with ``--third``.

A case is judged at the curved readout in float64. With fixed vectors u, v and w, and the matrix

    D_ij = d/dx_j (H(x) v)_i,                symmetric, for it is the third derivative along v,

by central differences of the product ``hvp``, which the sweep of second derivatives has found right, ``jvp`` of the product
along u must be D u, and the gradient of <w, H v> must be D w. The truth is (4 D(h/2) - D(h)) / 3, whose error |D(h/2) - D(h)|
bounds from above; where that is too much a smaller h is tried. Mapped calls take the point twice, and both answers are judged.

Called as a program this is a worker of ``sweep.run``, like ``sweep.worker``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import functional_hess as fh
from sweep import cases as own
from sweep import worker
from sweep.judge import Truth, compare
from sweep.problems import Case, Problem, problem_of

__all__ = ["CALLS", "judge_case", "judged", "truth_of"]

STEPS = (4e-3, 4e-4, 4e-5)
U, V, W = (1.9, 0.3), (1.1, 0.8), (2.3, 1.4)  # frequency and phase of the fixed vectors


def _vector(problem: Problem, numbers: tuple[float, float]) -> Tensor:
    n = sum(t.numel() for t in problem.x)
    return torch.cos(numbers[1] + numbers[0] * torch.arange(n, dtype=torch.float64))


def _flat(problem: Problem) -> Tensor:
    return worker.joined(problem.x)


def _product(problem: Problem) -> Callable[[Tensor], Tensor]:
    """x -> H(x) v of flat vectors, the same draws at every x."""
    v = worker.split(_vector(problem, V), problem)

    def product(x: Tensor) -> Tensor:
        return worker.joined(fh.hvp(lambda z: problem.f(*z), worker.split(x, problem), v, **worker.option(problem)))

    return product


def _jvp(p: Problem, x: Tensor) -> Tensor:
    return fh.jvp(_product(p), (x,), (_vector(p, U),))[1]


def _grad(p: Problem, x: Tensor) -> Tensor:
    product, w = _product(p), _vector(p, W)
    return fh.grad(lambda x: product(x) @ w)(x)


def _mapped(call: Callable[[Problem, Tensor], Tensor]) -> Callable[[Problem, Tensor], Tensor]:
    return lambda p, x: fh.vmap(lambda x: call(p, x), **worker.option(p))(torch.stack([x, x]))


CALLS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "jvp(hvp)": _jvp,
    "grad(hvp)": _grad,
    "vmap(hvp) over points": _mapped(lambda p, x: _product(p)(x)),
    "vmap(jvp(hvp)) over points": _mapped(_jvp),
    "vmap(grad(hvp)) over points": _mapped(_grad),
}


def truth_of(problem: Problem) -> dict[str, tuple[Truth, Tensor | None]]:
    """For every call a truth, and the vector by which it is multiplied."""
    product, x = _seeded(problem, _product(problem)), _flat(problem)
    at, value = product(x), _seeded(problem, lambda x: problem.f(*worker.split(x, problem)).detach())(x)
    D, error = _differences(product, x, STEPS[0])
    for h in STEPS[1:]:
        if (error <= 1e-5 * _scale(D, at, value)).all():
            break
        finer, finer_error = _differences(product, x, h)
        better = ~(finer_error >= error)
        D, error = torch.where(better, finer, D), torch.where(better, finer_error, error)
    scale = _scale(D, at, value)
    third = Truth(D, error.nan_to_num(torch.inf), scale)
    largest = torch.full_like(at, float(at.abs().nan_to_num(0.0).max()) + 1e-6 * (1 + float(value.abs())))
    second = Truth(at, torch.where(at.isfinite(), 0.0, torch.inf), largest)
    u, w = _vector(problem, U), _vector(problem, W)
    return {
        call: (second, None) if "grad" not in call and "jvp" not in call else (third, w if "grad" in call else u)
        for call in CALLS
    }


def _seeded(problem: Problem, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def seeded(x: Tensor) -> Tensor:
        if problem.seed is not None:
            torch.manual_seed(problem.seed)
        return function(x)

    return seeded


def _differences(product: Callable[[Tensor], Tensor], x: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """D by the steps h and h/2, and what they differ by; rounding is that of the product, divided by the step."""

    def at_step(h: float) -> Tensor:
        return torch.stack([(product(x + h * e) - product(x - h * e)) / (2 * h) for e in torch.eye(len(x), dtype=x.dtype)], 1)

    coarse, fine = at_step(h), at_step(h / 2)
    return (4 * fine - coarse) / 3, (fine - coarse).abs() + 1e-15 / h * (1 + fine.abs())


def _scale(D: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """sqrt(r_i r_j), r_i the largest entry of row and column i, and not below what the product and the value would make of it."""
    size = D.abs().nan_to_num(0.0, 0.0, 0.0)
    r = torch.maximum(size.amax(0), size.amax(1))
    least = 1e-4 * float(r.max()) + 1e-6 * (1 + float(value.abs()))
    r = torch.maximum(r, 1e-2 * at.abs().nan_to_num(0.0, 0.0, 0.0)).clamp(min=least)
    return (r.unsqueeze(0) * r.unsqueeze(1)).sqrt()


def judged(call: str, problem: Problem, truth: tuple[Truth, Tensor | None]) -> tuple[str, str]:
    """The verdict on one call, the worse of two where it is mapped."""

    def answers() -> Tensor:
        answer = _seeded(problem, lambda x: CALLS[call](problem, x))(_flat(problem))
        return answer if call.startswith("vmap") else answer.unsqueeze(0)

    answer = worker.attempted(answers, refusals_of_torch=False)
    if not isinstance(answer, Tensor):
        return answer
    verdicts = [compare(row, truth[0], torch.float64, truth[1]) for row in answer]
    return max(verdicts, key=lambda verdict: ("right", "inconclusive", "wrong").index(verdict[0]))


def judge_case(case: Case, readout: str, prefix: str, skip: set[str], say: Callable[[dict[str, Any]], None]) -> None:
    """All calls, at the curved readout alone."""
    if readout != "curved":
        return
    keys = {f"{prefix}|float64|{call}": call for call in CALLS}
    left = [key for key in keys if key not in skip]
    key = f"{prefix}|-|truth"
    if not left:
        return
    say({"begin": key})
    try:
        problem = problem_of(case, readout, torch.float64)
        truths = truth_of(problem)
    except Exception as error:
        return say({"end": key, "verdict": "none", "detail": f"{type(error).__name__}: {error}"[:400]})
    say({"end": key, "verdict": "truth", "detail": ""})
    for key in left:
        say({"begin": key})
        verdict, detail = judged(keys[key], problem, truths[keys[key]])
        say({"end": key, "verdict": verdict, "detail": detail})


if __name__ == "__main__":
    worker.serve({"third": own}, judge_case)
