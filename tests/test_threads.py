"""Threads, forked processes and workers of loaders: every product right, whatever the others are at.

torch's forward mode keeps one state for the whole process; what protects it must be free where nobody is in it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import numbers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import functional_hess as fh
from functional_hess.levels import _FORWARD_MODE
from functional_hess.nesting import is_outermost

FORWARD = "forward-over-reverse"
THREADS = 8
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that nobody leaves is an error in this file, not a wait."""
    monkeypatch.setattr("functional_hess.levels.FORWARD_MODE_TIMEOUT", 20.0)


def f(x: Tensor) -> Tensor:
    """Of which everything is known: sum sin^2 has the Hessian diag(2 cos 2x)."""
    return (x.sin() ** 2).sum()


def second(x: Tensor) -> Tensor:
    return 2 * torch.cos(2 * x)


def third(x: Tensor) -> Tensor:
    return -4 * torch.sin(2 * x)


def products(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Calls that take forward mode, each with what it is by hand."""
    one, batch = torch.ones_like(x), x.expand(2, *x.shape)
    hessian = fh.hessian(f, mode=FORWARD, chunk_size=2)
    return {
        "jvp": (fh.jvp(torch.sin, (x,), (one,))[1], x.cos()),
        "hvp": (fh.hvp(f, x, x), second(x) * x),
        "hessian": (hessian(x), torch.diag(second(x))),
        "vmap of hessian": (fh.vmap(hessian)(batch), torch.diag(second(x)).expand(2, len(x), len(x))),
        "torch's vmap": (torch.func.vmap(lambda v: fh.hvp(f, x, v))(batch), (second(x) * x).expand(2, len(x))),
        "jvp of hessian": (fh.jvp(hessian, (x,), (one,))[1], torch.diag(third(x))),
        "grad of hessian": (fh.grad(lambda x: hessian(x).sum())(x), third(x)),
        "rows": (torch.cat([part for _, part in fh.hessian_rows(f, mode=FORWARD, chunk_size=1)(x)]), torch.diag(second(x))),
    }


def wrong(x: Tensor) -> list[str]:
    """The names of the calls whose numbers are not right, and of what is left behind."""
    found = [name for name, (got, expected) in products(x).items() if not torch.allclose(got, expected, rtol=1e-12, atol=1e-12)]
    if not is_outermost() or torch.overrides._get_current_function_mode_stack():
        found.append("something is left active")
    return found


def forked(run: Callable[[], Any]) -> Any:
    """What ``run`` returns in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        answer: Any = "no answer"
        try:
            answer = run()
        except BaseException as error:
            answer = repr(error)
        with contextlib.suppress(BaseException), os.fdopen(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pickle.load(pipe)
    os.waitpid(child, 0)
    return answer


@contextlib.contextmanager
def another_thread_in_forward_mode() -> Iterator[None]:
    """While it is open another thread stands inside a product, inside ``vmap`` and two levels of forward mode."""
    inside, go = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        inside.set()
        assert go.wait(60)
        return f(x)

    def run() -> None:
        fh.vmap(lambda x: fh.jvp(lambda x: fh.hvp(slow, x, x, mode=FORWARD), (x,), (x,))[1])(numbers(2, 3))

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(60)
    try:
        yield
    finally:
        go.set()
        thread.join()


# Threads --------------------------------------------------------------------------------------------------------------


def test_products_of_many_threads_are_right():
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(wrong, [numbers(3, seed=seed) for seed in range(THREADS)]))
    assert found == [[]] * THREADS


class Mine(Exception):
    pass


def test_a_thread_that_fails_in_the_midst_leaves_the_others_right():
    def fails(x: Tensor) -> Tensor:
        raise Mine

    def work(seed: int) -> list[str]:
        x = numbers(3, seed=seed)
        for run in (
            lambda: fh.jvp(fails, (x,), (x,)),
            lambda: fh.hvp(fails, x, x),
            lambda: fh.vmap(fh.hessian(fails, mode=FORWARD))(x.expand(2, 3)),
            lambda: fh.jvp(lambda x: fh.hvp(fails, x, x), (x,), (x,)),
        ):
            with pytest.raises(Mine):
                run()
        return wrong(x)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [[]] * THREADS


def test_reverse_over_reverse_waits_for_nobody(monkeypatch):
    monkeypatch.setattr("functional_hess.levels.FORWARD_MODE_TIMEOUT", 0.01)
    x = numbers(3)
    with another_thread_in_forward_mode():
        assert torch.allclose(fh.hessian(f)(x), torch.diag(second(x)))
        with pytest.raises(RuntimeError, match="waited 0 s for another thread"):
            fh.hvp(f, x, x, mode=FORWARD)
    assert wrong(x) == []


# Forks ----------------------------------------------------------------------------------------------------------------


@needs_fork
def test_a_forked_process_is_right():
    assert wrong(numbers(3)) == []
    assert forked(lambda: wrong(numbers(3))) == []


@needs_fork
def test_a_process_forked_while_another_thread_is_in_forward_mode_is_right():
    with another_thread_in_forward_mode():
        for _ in range(2):
            assert forked(lambda: wrong(numbers(3))) == []
    assert wrong(numbers(3)) == []


@needs_fork
def test_a_process_forked_within_a_product_goes_on_with_it():
    """The child of f returns through the regions that it was forked in, and leaves them."""
    x = numbers(3)
    parent, answers = os.getpid(), []

    def forks(x: Tensor) -> Tensor:
        if os.getpid() == parent and not answers:
            answers.append(os.fork())
        return f(x)

    try:
        right = torch.allclose(fh.hvp(forks, x, x, mode=FORWARD), second(x) * x) and wrong(x) == []
        free = forked_lock_is_free()
    finally:
        if os.getpid() != parent:
            os._exit(0 if right and free else 1)
    assert right and free and os.waitstatus_to_exitcode(os.waitpid(answers[0], 0)[1]) == 0


def forked_lock_is_free() -> bool:
    """Whether another thread gets the lock."""
    found: list[bool] = []

    def take() -> None:
        found.append(_FORWARD_MODE._lock.acquire(timeout=1))
        if found[0]:
            _FORWARD_MODE._lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


# Workers of loaders ---------------------------------------------------------------------------------------------------


class Differentiated(Dataset):
    """Samples that are derivatives: [x, H x, diag H] of f at numbers of their own."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, int]:
        x = numbers(3, seed=i)
        return x, fh.hvp(f, x, x, mode=FORWARD), fh.hessian(f, mode=FORWARD)(x), len(wrong(x))


def assert_right(batches: Any) -> None:
    seen = 0
    for x, product, hessian, mistakes in batches:
        assert torch.allclose(product, second(x) * x, rtol=1e-12) and mistakes.sum() == 0
        assert torch.allclose(hessian, torch.diag_embed(second(x)), rtol=1e-12)
        seen += len(x)
    assert seen == len(Differentiated())


@needs_fork
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_workers_that_are_forked_differentiate(busy):
    with another_thread_in_forward_mode() if busy else contextlib.nullcontext():
        assert_right(DataLoader(Differentiated(), batch_size=2, num_workers=2, multiprocessing_context="fork"))


@pytest.mark.slow
def test_workers_that_are_spawned_differentiate():
    assert_right(DataLoader(Differentiated(), batch_size=3, num_workers=1, multiprocessing_context="spawn"))


@needs_fork
@pytest.mark.parametrize("mode", [FORWARD, "reverse-over-reverse"])
def test_a_risk_takes_its_batches_from_workers_that_are_forked_within_a_derivative(mode):
    data, w = numbers(12, 3), numbers(3, seed=1)
    risk = fh.empirical_risk(lambda w, a: f(a * w))
    loader = DataLoader(torch.utils.data.TensorDataset(data), batch_size=4, num_workers=1, multiprocessing_context="fork")
    expected = (second(data * w) * data**2).mean(0)
    assert torch.allclose(fh.hvp(risk, w, torch.ones(3).double(), loader, mode=mode), expected, rtol=1e-12)
