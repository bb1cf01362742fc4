"""Times of one Hessian, a group a problem: ``python -m pytest tests/benchmarks``. Nothing is asserted of a time.

Each contender's result is held against the N-call loop first.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from contenders import CONTENDERS, LOOP, relative_error
from problems import PROBLEMS, matrix

ROUNDS = 5


@functools.cache
def _truth(name: str) -> np.ndarray:
    problem, instance = PROBLEMS[name], PROBLEMS[name].instance()
    return matrix(CONTENDERS[LOOP](problem, instance)(), instance)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_hessian(name: str, contender: str, benchmark: Any) -> None:
    problem, instance = PROBLEMS[name], PROBLEMS[name].instance()
    run = CONTENDERS[contender](problem, instance)
    error = relative_error(matrix(run(), instance), _truth(name))
    benchmark.group = problem.title
    benchmark.name = contender
    benchmark.extra_info["relative_error"] = error
    benchmark.pedantic(run, rounds=ROUNDS, iterations=20 if instance.n == 10 else 1)
    assert (error > problem.tolerance) == (contender in problem.wrong), f"relative error {error:.1e}"
