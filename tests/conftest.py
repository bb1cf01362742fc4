"""What every test is held to: few threads, no luck, and the caller's tensors left as they were."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from oracles import Snapshot, assert_unchanged, snapshot
from scenarios import SCENARIOS, VECTOR_SCENARIOS

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def _seed(request: pytest.FixtureRequest) -> int:
    """The test's own seed: a matter of its name, not of what ran before it."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch generator of the test's own."""
    return torch.Generator().manual_seed(_seed(request))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A numpy generator of the test's own."""
    return np.random.default_rng(_seed(request))


@pytest.fixture
def inputs_unchanged() -> Iterator[Callable[..., None]]:
    """Call it with the trees a test hands to the library; when the test is over they must be as they were.

    It replaces nothing: `inputs_unchanged(x, v)` before, then the calls as they are.
    """
    watched: Snapshot = []
    yield lambda *trees: watched.extend(snapshot(*trees))
    assert_unchanged(watched)


@pytest.fixture(autouse=True)
def scenarios_unchanged() -> Iterator[None]:
    """No test writes to the tensors that all tests share."""
    yield
    assert_unchanged(_SHARED)


_SHARED = snapshot(*((s.x, s.args, s.value, s.gradient, s.hessian) for s in SCENARIOS + VECTOR_SCENARIOS))
