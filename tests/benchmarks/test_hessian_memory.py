"""Peak memory of one Hessian, each call in a process of its own."""

from __future__ import annotations

import pytest
from contenders import OURS, TORCH_FUNC
from memory import AVAILABLE, MIB, peak_growth
from problems import PROBLEMS

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the peak of the resident set is read from /proc")


@pytest.mark.parametrize("name", PROBLEMS)
def test_tensors_alive_take_at_most_the_output_and_the_working_set(name: str) -> None:
    output = PROBLEMS[name].instance().output_bytes
    assert peak_growth(name, OURS, returned=True) <= output + max(64 * MIB, output / 10)


def test_growth_on_a_large_output_is_at_most_a_quarter_of_that_of_torch_func() -> None:
    name = "rosenbrock-4608"
    ours, output = peak_growth(name, OURS), PROBLEMS[name].instance().output_bytes
    assert ours <= 1.1 * output + 64 * MIB
    assert ours <= peak_growth(name, TORCH_FUNC) / 4
