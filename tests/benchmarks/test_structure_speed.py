"""Every way of a case agrees with ours, at sizes for trying out; then times: ``python tests/benchmarks/structure.py``."""

from __future__ import annotations

import pytest
from structure import CASES, agree, prepared_ways, vector


@pytest.mark.filterwarnings("ignore:Full backward hook")  # BackPACK, at inputs without gradients
@pytest.mark.parametrize("name", CASES)
def test_the_ways_agree(name: str) -> None:
    case = CASES[name]
    (_, first), *others = prepared_ways(case, True)
    truth = vector(first())
    for way, run in others:
        assert agree(run(), truth) <= case.tolerance, way.name
