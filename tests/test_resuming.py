"""Interrupted work: what is finished is known, kept, and not computed again."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from networks import numbers
from oracles import relative_error
from torch import Tensor

import functional_hess as fh
from functional_hess import resuming, rows
from functional_hess.levels import _FORWARD_MODE
from functional_hess.nesting import is_outermost

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
N = 20
CHUNKS = 7  # of three rows each
OTHERS = 2  # evaluations of f that are no chunk: one to look at it, one for the product by which it is known again
FORWARD = "forward-over-reverse"  # in which every chunk evaluates f once


def energy(p: dict[str, Tensor], scale: float | Tensor = 1.0) -> Tensor:
    """A function that uses w, b and c in this order, which is none of the alphabet."""
    h = torch.tanh(p["w"] @ p["b"])
    return scale * ((h**2).sum() * p["c"].exp().sum() + (p["w"] ** 3).sum())


def point(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"b": numbers(3).to(dtype), "c": numbers(2, seed=1).to(dtype), "w": numbers(5, 3, seed=2).to(dtype)}


def truth(p: dict[str, Tensor]) -> Tensor:
    leaves = [p[name].double() for name in sorted(p)]
    return oracles.matrix(oracles.hessian(lambda *x: energy(dict(zip(sorted(p), x, strict=True))), leaves), leaves)


TRUTH = truth(point())
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def mapped(path: Path, dtype: torch.dtype = torch.float64, n: int = N) -> Tensor:
    return torch.from_file(str(path), shared=True, size=n * n, dtype=dtype).view(n, n)


class Counted:
    """``energy``, whose evaluations are counted; something happens in the midst of one of them."""

    def __init__(self, at: int = 0, happens: Callable[[], Any] = lambda: None) -> None:
        self.calls, self.at, self.happens = 0, at, happens

    def __call__(self, p: dict[str, Tensor], scale: float | Tensor = 1.0) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.happens()
        return energy(p, scale)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(run: Callable[[], Any]) -> bool:
    """Whether a forked process that runs ``run`` was killed on its way."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def call(f: Any, folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Callable[..., Any]:
    given: dict[str, Any] = {"chunk_size": 3, "mode": FORWARD, **options}
    return fh.hessian(f, out=mapped(folder / "out", dtype), resume=folder / "rows", **given)


def raising(error: type[BaseException], *args: Any) -> Callable[[], Any]:
    def happens() -> None:
        raise error(*args)

    return happens


# A killed process -----------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, torch
import functional_hess as fh

last, chunk = map(int, sys.argv[1:])


class Watched(torch.autograd.Function):
    generate_vmap_rule = True
    passes = 0  # backward: one for a gradient, one for a chunk of rows or a product

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, u):
        Watched.passes += 1
        if Watched.passes == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return u.clone()


def f(x):
    x = Watched.apply(x)
    return (x[1:] * x[:-1] ** 2).sum()


x = torch.linspace(-1, 1, 40, dtype=torch.float64)
out = torch.from_file("out.bin", shared=True, size=1600, dtype=torch.float64).view(40, 40)
fh.hessian(f, out=out, resume="out.rows", mode="reverse-over-reverse", chunk_size=chunk)(x)
beside = torch.diag_embed(2 * x[:-1], 1)
print(Watched.passes, torch.equal(out, torch.diag(torch.cat([2 * x[1:], x[:1] * 0])) + beside + beside.T))
"""


def test_a_process_killed_in_mid_run_is_followed_by_one_that_computes_the_other_rows_only(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run(last: int, chunk: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(last), str(chunk)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert run(3 + 7, 4).returncode == -signal.SIGKILL  # 24 rows are finished
    done = run(0, 8)
    assert done.stdout.split() == [str(3 + 2), "True"], done.stderr


@needs_fork
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_whatever_the_moment_of_its_death_the_rows_finished_are_kept_and_the_others_computed(tmp_path, dtype, symmetric):
    p = point(dtype)
    chunks = fh.explain(call(energy, tmp_path, dtype, symmetric=symmetric), p).chunks
    for last in range(1, OTHERS + chunks + 1):
        folder = tmp_path / str(last)
        folder.mkdir()
        assert killed(lambda folder=folder, last=last: call(Counted(last, die), folder, dtype, symmetric=symmetric)(p))
        f = Counted()
        told = fh.explain(call(f, folder, dtype, symmetric=symmetric, chunk_size=5), p)
        assert told.rows == N - sum(len(run) for run in finished_after(last, symmetric))
        f.calls = 0
        H = call(f, folder, dtype, symmetric=symmetric, chunk_size=5)(p)
        assert f.calls == OTHERS + told.chunks
        assert relative_error(mapped(folder / "out", dtype), TRUTH) < TOLERANCE[dtype]
        assert relative_error(fh.Space.of(p).matrix(H), TRUTH) < TOLERANCE[dtype]


def finished_after(last: int, symmetric: bool) -> list[range]:
    """The rows of the chunks before evaluation ``last``: w, then b and c, three at a time."""
    order = [*range(5, 20), *range(5)]
    return [range(row, row + 1) for row in order[: max(0, 3 * (last - OTHERS - 1))]]


@needs_fork
@pytest.mark.parametrize("k", [0, 3, 5, 6])
def test_rows_that_were_written_but_not_recorded_are_computed_again(tmp_path, k, monkeypatch):
    added = []

    def add(*args: Any) -> None:
        added.append(args)
        die() if len(added) > k else write(*args)

    write = resuming.Record.add
    with monkeypatch.context() as patch:
        patch.setattr(resuming.Record, "add", add)
        assert killed(lambda: call(energy, tmp_path)(point()))
    f = Counted()
    call(f, tmp_path)(point())
    assert f.calls == OTHERS + CHUNKS - k and relative_error(mapped(tmp_path / "out"), TRUTH) < 1e-13


@needs_fork
@pytest.mark.parametrize("mode", ["auto", "reverse-over-reverse", "double-backward", "fastest", "finite-difference"])
def test_every_mode_is_taken_up(tmp_path, mode, monkeypatch):
    def add(self: resuming.Record, *args: Any) -> None:
        write(self, *args)
        die()

    write = resuming.Record.add
    with monkeypatch.context() as patch:
        patch.setattr(resuming.Record, "add", add)
        assert killed(lambda: call(energy, tmp_path, mode=mode)(point()))
    assert fh.explain(call(energy, tmp_path, mode=mode), point()).rows == N - 3
    value, g, H = fh.value_grad_and_hessian(energy, mode=mode, out=mapped(tmp_path / "out"), resume=str(tmp_path / "rows"))(
        point()
    )
    within = 1e-6 if mode == "finite-difference" else 1e-13
    assert relative_error(fh.Space.of(point()).matrix(H), TRUTH) < within
    assert relative_error((value, g), fh.value_and_grad(energy)(point())[::1]) < 1e-13


def test_what_is_finished_is_not_computed_again_and_is_returned(tmp_path):
    call(energy, tmp_path)(point())
    f = Counted()
    H = call(f, tmp_path)(point())
    assert f.calls == OTHERS and H["b"]["w"].shape == (3, 5, 3)
    assert relative_error(fh.Space.of(point()).matrix(H), TRUTH) < 1e-13
    assert H["b"]["w"].untyped_storage().filename.endswith("out")


def test_rows_that_out_does_not_hold_are_computed_again(tmp_path):
    """As after a loss of power, or in another file; also in the midst of the rows, and where only a mirror image is gone."""
    call(energy, tmp_path)(point())
    for spoil, recomputed in (
        (lambda out: out[8:11].zero_(), 3),
        (lambda out: out[6].add_(1), 3),
        (lambda out: out[0].zero_(), 3),  # and the mirror images of w's rows
        (lambda out: out[4, 19].zero_(), 0),
        (lambda out: out.zero_(), 20),
    ):
        spoil(mapped(tmp_path / "out"))
        told = fh.explain(call(energy, tmp_path), point())
        call(energy, tmp_path)(point())
        assert relative_error(mapped(tmp_path / "out"), TRUTH) < 1e-13
        assert (told.rows, told.route.split("because")[1]) == (recomputed, " resume= keeps rows")
    os.remove(tmp_path / "out")
    call(energy, tmp_path)(point())
    assert relative_error(mapped(tmp_path / "out"), TRUTH) < 1e-13


def test_out_may_be_memory_of_the_process(tmp_path):
    out = torch.empty(N, N, dtype=torch.float64)
    f = Counted(OTHERS + 4, raising(RuntimeError, "x"))
    hessian = fh.hessian(f, out=out, resume=tmp_path / "rows", chunk_size=3, mode=FORWARD)
    with pytest.raises(RuntimeError):
        hessian(point())
    hessian(point())
    assert f.calls == OTHERS + 4 + OTHERS + CHUNKS - 3 and relative_error(out, TRUTH) < 1e-13


def test_a_file_of_one_leaf_and_a_scalar_leaf_are_as_good(tmp_path):
    for x in (numbers(4), torch.tensor(2.0), {"a": numbers(0), "b": numbers(3)}):
        n = fh.Space.of(x).dim
        folder = tmp_path / str(n)
        folder.mkdir()

        def f(x: Any) -> Tensor:
            leaves = x.values() if isinstance(x, dict) else [x]
            return torch.stack([(t**3).sum() for t in leaves]).sum()

        out = torch.zeros(n, n, dtype=fh.Space.of(x).dtype)
        for _ in range(2):
            fh.hessian(f, out=out, resume=folder / "rows", chunk_size=1)(x)
            assert torch.equal(out, torch.diag(6 * fh.Space.of(x).ravel(x)))


class Forward(torch.autograd.Function):
    """x^2, which goes forward only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        raise RuntimeError("derivative for aten::mine is not implemented")

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * v


class ThirdOf(torch.autograd.Function):
    """x^3 / 3, whose gradient goes forward only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3 / 3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return Forward.apply(ctx.saved_tensors[0]) * u

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return ctx.saved_tensors[0] ** 2 * v


class Unremembered:
    """A function of which no weak reference can be kept, so that every call finds its mode anew."""

    __slots__ = ()

    def __call__(self, p: dict[str, Tensor]) -> Tensor:
        return (p["a"] ** 3).sum() + ThirdOf.apply(p["b"]).sum()


def test_an_asymmetric_matrix_is_not_made_of_rows_and_columns(tmp_path, monkeypatch):
    """The rows of a have a rule by rows, those of b by columns alone: what is refused in one call is refused in two."""
    p = {"a": numbers(12), "b": numbers(40)}
    hessian = fh.hessian(
        Unremembered(), symmetric=False, chunk_size=12, out=torch.zeros(52, 52).double(), resume=tmp_path / "rows"
    )
    for _ in range(2):
        with pytest.raises(fh.MissingDerivativeError) as caught:
            hessian(p)
        assert caught.value.finished_rows == [range(12)]
    assert fh.explain(fh.hessian(Unremembered(), symmetric=False), {"a": p["a"], "b": p["b"]}).route == "dense rows"
    monkeypatch.setattr(rows._Runner, "keep_to", lambda *_: None)
    hessian(p)  # as it would be if columns followed on rows


# Rows that are handed out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen", [None, range(2, 19), range(19, -1, -3), [7, 3, 9, 3, 0, 1, 2]], ids=["all", "some", "down", "any"]
)
def test_rows_come_again_from_those_on_that_the_caller_was_at(tmp_path, chosen):
    stream = fh.hessian_rows(energy, rows=chosen, chunk_size=3, resume=tmp_path / "rows")
    before = stream(point())
    given = list(itertools.islice(before, 3))[:2]  # the third was not worked through
    before.close()
    after = list(stream(point()))
    wanted = list(range(N)) if chosen is None else list(chosen)
    finished = {row for which, _ in given for row in which}
    assert [row for which, _ in after for row in which] == [row for row in wanted if row not in finished]
    for which, part in [*given, *after]:
        assert relative_error(part, TRUTH[list(which)]) < 1e-13
    assert list(stream(point())) == []


def test_rows_finished_are_those_of_every_choice_of_rows(tmp_path):
    f = Counted()
    assert len(list(fh.hessian_rows(f, rows=range(4, 8), resume=tmp_path / "rows", mode=FORWARD)(point()))) == 1
    left = fh.hessian_rows(f, resume=tmp_path / "rows", chunk_size=4, mode=FORWARD)
    assert fh.explain(left, point()).route == "dense rows (4 of 20 finished)"
    f.calls = 0
    assert [list(which) for which, _ in left(point())] == [list(range(4)), *(list(range(k, k + 4)) for k in (8, 12, 16))]
    assert f.calls == OTHERS + 4


@needs_fork
def test_rows_handed_out_by_a_process_that_was_killed_do_not_come_again(tmp_path):
    def run() -> None:
        for k, _ in enumerate(fh.hessian_rows(energy, resume=tmp_path / "rows", chunk_size=4)(point())):
            if k == 2:
                die()

    assert killed(run)
    ((first, _), *_) = fh.hessian_rows(energy, resume=tmp_path / "rows", chunk_size=4)(point())
    assert first == range(5, 9)  # after those of b and c


# Two calls on one record -----------------------------------------------------------------------------------------------

SECOND = """
import sys, time, torch
import functional_hess as fh

x = torch.linspace(-1, 1, 8, dtype=torch.float64)
for _ in fh.hessian_rows(lambda x: (x[1:] * x[:-1] ** 2).sum(), resume="rows", chunk_size=2)(x):
    open("begun", "w").close()
    time.sleep(float(sys.argv[1]))
print("finished")
"""
needs_locks = pytest.mark.skipif(resuming.fcntl is None, reason="the system does not lock files")


def second(folder: Path, seconds_a_chunk: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SECOND, str(seconds_a_chunk)]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_locks
def test_a_second_process_on_one_record_is_refused_until_the_first_has_ended_even_by_a_kill(tmp_path):
    first = second(tmp_path, 60)
    try:
        while not (tmp_path / "begun").exists():
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.01)
        before = (tmp_path / "rows").read_bytes()
        _, told = second(tmp_path, 0).communicate()
        assert "BlockingIOError: hessian_rows: resume='rows' is in use by another call, of this process or another" in told
        assert (tmp_path / "rows").read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    told, complaint = second(tmp_path, 0).communicate()
    assert told == "finished\n", complaint


@needs_locks
@pytest.mark.parametrize("meanwhile", ["at it", "ended"])
def test_a_second_call_of_one_process_is_refused_wherever_the_first_has_got_to(tmp_path, meanwhile, monkeypatch):
    """Also where the first has ended since the second read what there is to do."""
    lock = resuming._locked

    def first_comes_between(descriptor: int) -> bool:
        monkeypatch.setattr(resuming, "_locked", lock)
        stream = fh.hessian_rows(energy, resume=tmp_path / "rows", chunk_size=3)(point())
        next(stream)
        if meanwhile == "ended":
            list(stream)
        held.append(stream)
        return lock(descriptor)

    held: list[Any] = []
    monkeypatch.setattr(resuming, "_locked", first_comes_between)
    second = fh.hessian_rows(energy, resume=tmp_path / "rows", chunk_size=3)(point())
    with pytest.raises(BlockingIOError, match="is in use by another call"):
        list(second)
    assert sum(len(rows) for rows, _ in held[0]) == (N - 3 if meanwhile == "at it" else 0)
    assert list(fh.hessian_rows(energy, resume=tmp_path / "rows", chunk_size=3)(point())) == []


@needs_locks
def test_an_iterator_that_is_closed_or_dropped_leaves_the_record_to_others(tmp_path):
    for end in (lambda stream: stream.close(), lambda stream: None):
        stream = fh.hessian_rows(energy, resume=tmp_path / "rows", chunk_size=3)(point())
        next(stream)
        assert fh.explain(fh.hessian_rows(energy, resume=tmp_path / "rows"), point()).rows == N  # which only reads
        end(stream)
        del stream
    assert len(list(fh.hessian_rows(energy, resume=tmp_path / "rows", chunk_size=3)(point()))) == CHUNKS


def test_where_nothing_can_be_locked_calls_run_as_well(tmp_path, monkeypatch):
    none = raising(OSError, errno.ENOLCK, "No locks available")
    for locks in (None, SimpleNamespace(flock=lambda *_: none(), LOCK_EX=2, LOCK_NB=4)):
        monkeypatch.setattr(resuming, "fcntl", locks)
        call(energy, tmp_path)(point())
        assert relative_error(mapped(tmp_path / "out"), TRUTH) < 1e-13
        (tmp_path / "rows").unlink()


# What is refused ------------------------------------------------------------------------------------------------------


def other(**changed: Any) -> dict[str, Tensor]:
    return {**point(), **changed}


def again(folder: Path, f: Any = energy, **options: Any) -> Callable[..., Any]:
    """A call like the recorded one but for what is given."""
    given: dict[str, Any] = {"out": torch.zeros(N, N, dtype=torch.float64), "resume": folder / "rows", "chunk_size": 3}
    return fh.hessian(f, **{**given, **options})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a point": (lambda d: again(d)(other(w=2 * point()["w"]), 1.0), r"args\[0\]\['w'\] has other numbers\. Pass"),
    "one bit of it": (
        lambda d: again(d)(other(c=point()["c"].nextafter(torch.tensor(9.0).double())), 1.0),
        r"args\[0\]\['c'\] has other numbers\. Pass",
    ),
    "a number": (lambda d: again(d)(point(), 2.0), r"args\[1\] is 2\.0, was 1\.0\. Pass"),
    "data": (lambda d: again(d)(point(), torch.tensor(1.0).double()), r"args\[1\] is torch\.float64\[\], was float\. Pass"),
    "an array": (lambda d: again(d)(point(), np.float64(1.0)), r"args\[1\] is float64, was float\. Pass"),
    "a keyword": (
        lambda d: again(d)(point(), scale=1.0),
        r"kwargs\['scale'\] is float, was absent; args\[1\] is absent, was float",
    ),
    "a dtype": (
        lambda d: again(d, out=torch.zeros(N, N))(point(torch.float32), 1.0),
        r"dtype is torch\.float32, was torch\.float64; args\[0\]\['b'\] is torch\.float32\[3\], was torch\.float64\[3\]",
    ),
    "a shape": (
        lambda d: again(d, out=torch.zeros(19, 19).double())(other(w=numbers(2, 4), b=numbers(4), c=numbers(7)), 1.0),
        r"n is 19, was 20; leaves is b\[4\], c\[7\], w\[2, 4\], was b\[3\], c\[2\], w\[5, 3\]; .* and 1 more\. Pass",
    ),
    "a mode": (lambda d: again(d, mode="double-backward")(point(), 1.0), r"mode is double-backward, was auto\. Pass"),
    "symmetry": (lambda d: again(d, symmetric=False)(point(), 1.0), r"symmetric is False, was True\. Pass"),
    "argnums": (lambda d: again(d, argnums=(0,))(point(), 1.0), r"argnums is \(0,\), was 0"),
    "a verb": (
        lambda d: list(fh.hessian_rows(energy, resume=d / "rows")(point(), 1.0)),
        r"verb is hessian_rows, was hessian; symmetric is False, was True\. Pass",
    ),
    "a function": (
        lambda d: again(d, lambda p, s: 1.01 * energy(p, s))(point(), 1.0),
        r"f is another function or draws other numbers, for its Hessian times a fixed vector has changed\. Pass",
    ),
    "the order of use": (
        lambda d: again(d, lambda p, s: 0 * p["c"].sum() + energy(p, s))(point(), 1.0),
        r"order is c, w, b, was w, b, c\. Pass",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_record_of_another_call_is_refused_and_left(tmp_path, kind):
    again(tmp_path)(point(), 1.0)
    before = (tmp_path / "rows").read_bytes()
    attempt, message = REFUSED[kind]
    with pytest.raises(ValueError, match=f"is the record of another call: .*{message}"):
        attempt(tmp_path)
    assert (tmp_path / "rows").read_bytes() == before


def test_what_makes_no_difference_to_rows_is_not_refused(tmp_path):
    again(tmp_path)(point(), 1.0)
    for options in ({"chunk_size": None}, {"memory_limit": "1GiB"}, {"progress": False}, {"has_aux": True}, {"strict": True}):
        f = Counted()
        aux = bool(options.get("has_aux"))
        again(tmp_path, (lambda p, s, f=f: (f(p, s), "aux")) if aux else f, **options)(point(), 1.0)
        assert f.calls <= OTHERS + 2 + bool(options.get("strict"))  # the zeros in the place of out
    torch.manual_seed(5)
    f = lambda p, s: energy(p, s) + 0 * torch.rand(()) * p["w"].sum()  # noqa: E731
    again(tmp_path, f, randomness="same", resume=tmp_path / "drawn")(point(), 1.0)
    again(tmp_path, f, randomness="same", resume=tmp_path / "drawn")(point(), 1.0)


def test_other_draws_of_a_random_function_are_refused(tmp_path):
    def f(p: dict[str, Tensor], s: float) -> Tensor:
        return energy(p, s) * (1 + torch.rand(()))

    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="draws other numbers") if seed == 6 else contextlib.nullcontext():
            again(tmp_path, f, randomness="same")(point(), 1.0)


def test_a_file_that_is_no_record_is_refused_and_left(tmp_path):
    for text in (b"something else\n", b"\x00" * 4096, b'{"functional_hess": "finished rows", "format": 1} 00000000\n'):
        (tmp_path / "rows").write_bytes(text)
        with pytest.raises(ValueError, match="cannot be taken up"):
            call(energy, tmp_path)(point())
        assert (tmp_path / "rows").read_bytes() == text
    mapped(tmp_path / "out").fill_(1)
    with pytest.raises(ValueError, match="it is no record of finished rows"):
        fh.hessian(energy, out=mapped(tmp_path / "out"), resume=tmp_path / "out")(point())
    assert torch.equal(mapped(tmp_path / "out"), torch.ones(N, N).double())


def test_a_torn_record_is_taken_up_as_far_as_it_is_whole(tmp_path):
    call(energy, tmp_path)(point())
    whole = (tmp_path / "rows").read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")] + [len(whole)]
    for length in sorted({0, 1, 30, *ends, *range(3, len(whole), 97), *(end - 1 for end in ends)}):
        (tmp_path / "rows").write_bytes(whole[:length])
        f = Counted()
        call(f, tmp_path)(point())
        assert f.calls == OTHERS + CHUNKS - max(0, sum(end <= length for end in ends) - 1)
        f.calls = 0
        call(f, tmp_path)(point())
        assert f.calls == OTHERS and relative_error(mapped(tmp_path / "out"), TRUTH) < 1e-13


def test_a_damaged_line_counts_for_nothing_and_a_damaged_beginning_is_refused(tmp_path):
    call(energy, tmp_path)(point())
    whole = (tmp_path / "rows").read_bytes()
    first = whole.index(b"\n")
    for place in range(0, len(whole), 131):
        damaged = bytearray(whole)
        damaged[place] ^= 0x15
        (tmp_path / "rows").write_bytes(damaged)
        if place < first:
            with pytest.raises(
                ValueError, match=r"cannot be taken up: (the first line|it is no record).* delete the file to begin anew"
            ):
                call(energy, tmp_path)(point())
        else:
            f = Counted()
            call(f, tmp_path)(point())
            assert f.calls in (OTHERS + 1, OTHERS + 2)  # two where the end of a line was hit
            assert relative_error(mapped(tmp_path / "out"), TRUTH) < 1e-13


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "rows", Path("/proc/self/none")):
        f = Counted()
        with pytest.raises(OSError, match=r"hessian: resume='.*' cannot be read and written \(.*\)\. Pass the path of a file"):
            again(tmp_path, f, resume=path)(point(), 1.0)
        assert f.calls == 1


def test_a_record_that_cannot_be_gone_on_with_leaves_out_as_it_is(tmp_path, monkeypatch):
    def full(descriptor: int, text: bytes) -> int:
        if b'"rows": [[11' in text:
            raise OSError(28, "No space left on device")
        return write(descriptor, text)

    write = os.write
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device") as caught:
        patch.setattr(os, "write", full)
        call(energy, tmp_path)(point())
    assert caught.value.finished_rows == [range(5, 14)]  # written, though not recorded
    assert relative_error(mapped(tmp_path / "out")[5:14], TRUTH[5:14]) < 1e-13
    f = Counted()
    call(f, tmp_path)(point())
    assert f.calls == OTHERS + CHUNKS - 2 and relative_error(mapped(tmp_path / "out"), TRUTH) < 1e-13


@pytest.mark.parametrize("inside", [fh.vmap, torch.func.vmap], ids=["ours", "torch's"])
def test_it_belongs_to_the_outermost_call(tmp_path, inside):
    x = numbers(2, 3)
    with pytest.raises(ValueError, match="out= cannot carry a graph or a batch"):
        inside(fh.hessian(lambda x: (x**3).sum(), out=torch.zeros(3, 3).double(), resume=tmp_path / "rows"))(x)
    with pytest.raises(ValueError, match="hessian_rows: resume= belongs to the outermost call"):
        inside(lambda x: next(fh.hessian_rows(lambda x: (x**3).sum(), resume=tmp_path / "rows")(x))[1])(x)
    assert not (tmp_path / "rows").exists()


def test_to_explain_a_call_writes_nothing_and_says_that_it_goes_by_rows(tmp_path):
    risk = fh.empirical_risk(lambda w, a: torch.tanh(a @ w).square().sum())
    w, data = numbers(3, 2), numbers(9, 3, seed=1)
    out = torch.zeros(6, 6, dtype=torch.float64)
    assert fh.explain(fh.hessian(risk, out=out), w, data).route == "lifted"
    hessian = fh.hessian(risk, out=out, resume=tmp_path / "rows")
    assert fh.explain(hessian, w, data).route == "dense rows because resume= keeps rows"
    assert not (tmp_path / "rows").exists()
    hessian(w, data)
    assert relative_error(out, fh.hessian(risk)(w, data).reshape(6, 6)) < 1e-13
    assert fh.explain(hessian, w, data).route == "dense rows (6 of 6 finished) because resume= keeps rows"


def test_inside_checked_the_rows_of_the_file_are_verified_too(tmp_path):
    call(energy, tmp_path)(point())
    with fh.checked() as record:
        call(energy, tmp_path)(point())
    assert [c.status for c in record] == ["right"]


# What an interruption leaves behind ------------------------------------------------------------------------------------


class Mine(Exception):
    pass


class Sealed(Exception):
    """An error to which nothing can be added."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):
            raise AttributeError(name)
        super().__setattr__(name, value)


def assert_clean() -> None:
    """Nothing of the library's is active in this thread, and the lock of forward mode is free for another."""
    assert is_outermost() and not torch.overrides._get_current_function_mode_stack()
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    free: list[bool] = []

    def other_thread() -> None:
        free.append(_FORWARD_MODE._lock.acquire(timeout=1))
        if free[0]:
            _FORWARD_MODE._lock.release()

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert free == [True]
    assert relative_error(fh.Space.of(point()).matrix(fh.hessian(energy, mode=FORWARD)(point())), TRUTH) < 1e-13
    assert relative_error(fh.Space.of(point()).matrix(fh.hessian(energy)(point())), TRUTH) < 1e-13


def interrupt() -> None:
    """What Ctrl-C does, also where whoever started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "happens"),
    [
        (KeyboardInterrupt, interrupt),
        (MemoryError, raising(MemoryError, "full")),
        (Mine, raising(Mine, "mine")),
        (RuntimeError, raising(RuntimeError, "derivative for aten::mine is not mine")),
    ],
    ids=["KeyboardInterrupt", "MemoryError", "Mine", "RuntimeError"],
)
@pytest.mark.parametrize("k", [0, 1, 4, 5, 6])
def test_whatever_interrupts_a_call_tells_the_rows_that_out_holds(k, error, happens):
    out = torch.full((N, N), torch.nan, dtype=torch.float64)
    with pytest.raises(error) as caught:
        fh.hessian(Counted(2 + k, happens), out=out, chunk_size=3, mode=FORWARD)(point())
    order = [*range(5, 20), *range(5)]
    finished = sorted(order[: 3 * k])
    assert [row for run in caught.value.finished_rows for row in run] == finished
    assert relative_error(out[finished], TRUTH[finished]) < 1e-13
    if hasattr(BaseException, "add_note"):
        runs = ", ".join(f"{run.start}:{run.stop}" for run in caught.value.finished_rows) or "none"
        assert caught.value.__notes__ == [f"hessian: interrupted; finished rows of out: {runs}."]
    assert_clean()


def test_rows_whose_mirror_images_are_not_whole_are_not_called_finished(tmp_path):
    call(energy, tmp_path)(point())
    out = mapped(tmp_path / "out")
    out[8:11] = torch.nan
    with pytest.raises(Mine) as caught:
        call(Counted(OTHERS + 1, raising(Mine)), tmp_path)(point())
    assert caught.value.finished_rows == [range(5, 8), range(11, 20)]  # and none of b and c, which are columns of w's
    with pytest.raises(Mine) as caught:
        call(Counted(OTHERS + 2, raising(Mine)), tmp_path, chunk_size=2)(point())
    assert caught.value.finished_rows == [range(5, 10), range(11, 20)]


def test_columns_are_called_columns():
    out = torch.full((N, N), torch.nan, dtype=torch.float64)
    with pytest.raises(Mine) as caught:
        fh.hessian(Counted(3, raising(Mine)), out=out, chunk_size=3, mode=FORWARD, symmetric=False)(point())
    assert caught.value.finished_columns == [range(5, 8)] and not hasattr(caught.value, "finished_rows")
    assert relative_error(out[:, 5:8], TRUTH[:, 5:8]) < 1e-13


def test_an_interruption_without_out_and_one_before_the_first_row_are_as_they_were():
    with pytest.raises(Mine) as caught:
        fh.hessian(Counted(3, raising(Mine)), chunk_size=3, mode=FORWARD)(point())
    assert not hasattr(caught.value, "finished_rows") and not hasattr(caught.value, "__notes__")
    with pytest.raises(Mine) as caught:
        fh.hessian(Counted(1, raising(Mine)), out=torch.zeros(N, N).double())(point())
    assert not hasattr(caught.value, "finished_rows")
    with pytest.raises(Sealed):
        fh.hessian(Counted(3, raising(Sealed)), chunk_size=3, mode=FORWARD, out=torch.zeros(N, N).double())(point())


class Tick(torch.autograd.Function):
    """The identity, whose cotangents are counted on their way back."""

    generate_vmap_rule = True
    passed, at = 0, 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        Tick.passed += 1
        if Tick.passed == Tick.at:
            interrupt()
        return u.clone()


@pytest.mark.parametrize("verb", [fh.hessian, fh.value_grad_and_hessian, fh.hessian_diagonal, fh.hessian_blocks, fh.hessian_rows])
@pytest.mark.parametrize("at", range(1, 9, 2))
def test_an_interruption_in_the_midst_of_a_backward_pass_leaves_nothing_behind(verb, at):
    Tick.passed, Tick.at = 0, at

    def f(p: dict[str, Tensor]) -> Tensor:
        return energy({**p, "w": Tick.apply(p["w"])})

    run = verb(f, chunk_size=3, mode="reverse-over-reverse")
    with contextlib.suppress(KeyboardInterrupt):
        result = run(point())
        list(result) if verb is fh.hessian_rows else None
    Tick.at = 0
    assert_clean()


@pytest.mark.parametrize("outer", [None, "vmap", "grad", "jvp"])
def test_an_interruption_under_an_outer_transform_leaves_nothing_behind(outer):
    x = numbers(4)
    calls = [0]

    def f(x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            interrupt()
        return (x.sin() ** 2).sum()

    def trace(x: Tensor) -> Tensor:
        return fh.hessian(f, mode=FORWARD, chunk_size=1)(x).square().sum()

    wrapped: Sequence[Callable[[], Any]] = {
        None: [lambda: trace(x)],
        "vmap": [lambda: fh.vmap(trace)(x[None].expand(3, 4))],
        "grad": [lambda: fh.grad(trace)(x)],
        "jvp": [lambda: fh.jvp(trace, (x,), (x,))],
    }[outer]
    with pytest.raises(KeyboardInterrupt):
        wrapped[0]()
    assert_clean()
