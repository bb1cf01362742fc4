"""How many rows at once: what is predicted, what there is, what is refused before anything is allocated."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import network, numbers
from oracles import relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functional_hess import MemoryLimitError, Space, chunking, explain, hessian, hessian_blocks, hessian_diagonal, hessian_rows
from functional_hess.chunking import Estimate, available_bytes, chunk_for, closed_bound, measured, parse_bytes, survey, uncounted

MIB = 2**20
CPU = torch.device("cpu")


def squares(x: Tensor) -> Tensor:
    return (x[1:] * x[:-1]).square().sum()


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the memory that there is, in bytes."""
    return lambda amount: monkeypatch.setattr("functional_hess.chunking.available_bytes", lambda device: amount)


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (1024, 1024),
        (2.5e3, 2500),
        ("17", 17),
        ("1B", 1),
        ("4GiB", 4 * 2**30),
        ("200MiB", 200 * MIB),
        ("200 MB", 200 * 10**6),
        ("1.5 kB", 1500),
        ("1.5KiB", 1536),
        ("2k", 2000),
        ("3g", 3 * 10**9),
        ("1 TiB", 2**40),
        (" 5 mib ", 5 * MIB),
    ],
)
def test_bytes_are_a_number_or_a_text(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "lots", "4 GiBs", "GiB", "-1GiB", "1e9", "1,000", "4PB", "1.2.3MB", ".", -1, float("inf"), float("nan")]
)
def test_a_text_that_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match="memory_limit must be bytes or a text such as '4GiB', got"):
        parse_bytes(text)


def test_a_wrong_amount_is_refused_by_the_call():
    with pytest.raises(ValueError, match="memory_limit must be bytes"):
        hessian(squares, memory_limit="much")(numbers(3))


# Prediction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("P", "S", "k"), [(1000, 5000, 1), (8, 0, 3), (0, 16, 100), (123, 456, 7)])
def test_the_closed_bound_is_its_formula(P, S, k):
    assert closed_bound(P, S).working(k) == 2 * P * (k + 1) + 4 * S * (k + 1) + k * P
    assert closed_bound(P, S, 77).working(k) == closed_bound(P, S).working(k) + 77


def test_a_survey_sees_the_value_the_order_of_use_and_what_is_saved():
    def f(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, str]:
        return (torch.exp(b) * a).sum(), "aux"

    a, b, c = (numbers(4, seed=i) for i in range(3))
    seen = survey(f, (a, b, c))
    assert seen.aux == "aux" and torch.equal(seen.value, (b.exp() * a).sum())
    assert seen.order == (1, 0, 2) and seen.saved == 3 * 32 and seen.calls == 3  # the sum makes 8 bytes of 32


def test_a_survey_tells_one_tensor_in_two_leaves_apart():
    a = numbers(2)
    assert survey(lambda p, q: ((q * 2 + p).sum(), None), (a, a)).order == (1, 0)


def test_asking_for_a_shape_is_no_use_of_a_leaf():
    def f(a: Tensor, b: Tensor) -> tuple[Tensor, None]:
        assert a.shape == a.size() and a.dtype == torch.float64 and not a.requires_grad and a.stride() == (1,)
        return (torch.exp(b) * a).sum(), None

    assert survey(f, (numbers(4), numbers(4, seed=1))).order == (1, 0)


def test_a_survey_counts_nothing_of_what_is_said_not_to_be_of_f():
    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(torch.exp(x), (4,)).sum()

    def g(x: Tensor) -> tuple[Tensor, None]:
        with uncounted():
            inside.append(survey(lambda x: (f(x), None), (x,)))
        return f(x), None

    inside: list[Any] = []
    alone, around = survey(lambda x: (f(x), None), (numbers(4),)), survey(g, (numbers(4),))
    assert alone.saved == around.saved == inside[0].saved and alone.calls == around.calls == inside[0].calls


@pytest.mark.parametrize("k", [1, 2, 8, 32])
@pytest.mark.parametrize("fake", [True, False])
def test_a_run_measures_what_is_alive_at_once(k, fake):
    x = (numbers(1000),)

    def run(x: Any, k: int) -> Any:
        batch = x[0].expand(k, 1000) + 1.0  # k vectors
        return (batch * 2.0).sum()  # and k more beside them

    estimate = measured(run, x, 64, fake=fake)
    assert estimate.source == ("fake run" if fake else "measured rows")
    assert estimate.working(k) == pytest.approx(2 * k * 8000, rel=0.02)


def test_a_fake_run_allocates_nothing_and_leaves_its_input(inputs_unchanged):
    x = numbers(8)
    inputs_unchanged(x)
    made = []
    measured(lambda x, k: made.append(x[0].new_zeros(k, 2**40)) or made[-1].sum(), (x,), 9, fake=True)  # k times 8 TiB
    assert [t.shape[0] for t in made] == [1, 4, 8]


def test_a_fake_run_passes_on_what_f_raises():
    with pytest.raises(Exception, match=r".+"):
        measured(lambda x, k: float(x[0].sum()), (numbers(3),), 5, fake=True)


# What there is --------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Files as the kernel would show them, in the place of its own."""
    shown = {"/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n"}
    chunking._cgroup_places.cache_clear()
    monkeypatch.setattr(chunking, "_read", lambda path: shown.get(path, ""))
    if chunking.resource is not None:
        unlimited = (chunking.resource.RLIM_INFINITY,) * 2
        monkeypatch.setattr(chunking.resource, "getrlimit", lambda which: unlimited)
    yield shown
    chunking._cgroup_places.cache_clear()


def test_the_system_says_what_is_available(files):
    assert available_bytes(CPU) == 8_000_000 * 1024


def test_a_limit_of_the_cgroup_is_a_limit(files):
    files["/proc/self/cgroup"] = "0::/jobs/one\n"
    files["/sys/fs/cgroup/jobs/one/memory.max"] = f"{300 * MIB}\n"
    files["/sys/fs/cgroup/jobs/one/memory.current"] = f"{100 * MIB}\n"
    assert available_bytes(CPU) == 200 * MIB


def test_the_tightest_limit_of_the_parents_of_a_cgroup_counts(files):
    files["/proc/self/cgroup"] = "0::/jobs/one\n"
    files["/sys/fs/cgroup/jobs/one/memory.max"] = "max\n"
    files["/sys/fs/cgroup/jobs/one/memory.current"] = f"{100 * MIB}\n"
    files["/sys/fs/cgroup/jobs/memory.max"] = f"{500 * MIB}\n"
    files["/sys/fs/cgroup/jobs/memory.current"] = f"{350 * MIB}\n"
    files["/sys/fs/cgroup/memory.max"] = f"{900 * MIB}\n"
    files["/sys/fs/cgroup/memory.current"] = f"{400 * MIB}\n"
    assert available_bytes(CPU) == 150 * MIB


def test_a_cgroup_without_a_limit_is_none(files):
    files["/proc/self/cgroup"] = "0::/\n"
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    files["/sys/fs/cgroup/memory.current"] = "5\n"
    assert available_bytes(CPU) == 8_000_000 * 1024


def test_a_cgroup_of_the_first_version_is_a_limit_too(files):
    files["/proc/self/cgroup"] = "11:cpu,cpuacct:/a\n4:memory:/b\n0::/\n"
    files["/sys/fs/cgroup/memory/b/memory.limit_in_bytes"] = f"{64 * MIB}\n"
    files["/sys/fs/cgroup/memory/b/memory.usage_in_bytes"] = f"{60 * MIB}\n"
    assert available_bytes(CPU) == 4 * MIB


def test_a_cgroup_of_the_first_version_without_a_limit_is_none(files):
    files["/proc/self/cgroup"] = "4:memory:/b\n"
    files["/sys/fs/cgroup/memory/b/memory.limit_in_bytes"] = "9223372036854771712\n"
    files["/sys/fs/cgroup/memory/b/memory.usage_in_bytes"] = f"{60 * MIB}\n"
    assert available_bytes(CPU) == 8_000_000 * 1024


@pytest.mark.parametrize("version", [1, 2])
def test_pages_of_files_that_a_cgroup_can_give_back_are_available(files, version):
    """What was written through a memory-mapped out= is counted as used until somebody needs the memory."""
    stat = f"anon 5\ninactive_file {30 * MIB}\nactive_file {20 * MIB}\n"
    if version == 1:
        files["/proc/self/cgroup"] = "4:memory:/b\n"
        names, stat = (
            ("memory/b/memory.limit_in_bytes", "memory/b/memory.usage_in_bytes", "memory/b/memory.stat"),
            (f"inactive_file 1\nactive_file 1\ntotal_inactive_file {30 * MIB}\ntotal_active_file {20 * MIB}\n"),
        )
    else:
        files["/proc/self/cgroup"] = "0::/b\n"
        names = ("b/memory.max", "b/memory.current", "b/memory.stat")
    for name, text in zip(names, (f"{100 * MIB}\n", f"{90 * MIB}\n", stat), strict=True):
        files[f"/sys/fs/cgroup/{name}"] = text
    assert available_bytes(CPU) == 60 * MIB


def test_the_folders_of_a_cgroup_are_looked_for_once_and_its_numbers_each_time(files, monkeypatch):
    files["/proc/self/cgroup"] = "0::/a/b/c\n"
    files["/sys/fs/cgroup/a/memory.max"] = f"{300 * MIB}\n"
    files["/sys/fs/cgroup/a/memory.current"] = f"{100 * MIB}\n"
    assert available_bytes(CPU) == 200 * MIB
    files["/sys/fs/cgroup/a/memory.max"] = f"{150 * MIB}\n"
    read: list[str] = []
    monkeypatch.setattr(chunking, "_read", lambda path: (read.append(path), files.get(path, ""))[1])
    assert available_bytes(CPU) == 50 * MIB
    assert len(read) <= 6 and not any("/b" in path for path in read)


def test_a_cgroup_seen_from_inside_its_own_namespace_is_found_at_the_root(files):
    """In a container the path may name folders that are not mounted; the root is what it has."""
    files["/proc/self/cgroup"] = "0::/../../other\n"
    files["/sys/fs/cgroup/memory.max"] = f"{50 * MIB}\n"
    files["/sys/fs/cgroup/memory.current"] = f"{20 * MIB}\n"
    assert available_bytes(CPU) == 30 * MIB


def test_a_limit_that_is_passed_leaves_nothing(files):
    files["/proc/self/cgroup"] = "0::/\n"
    files["/sys/fs/cgroup/memory.max"] = "100\n"
    files["/sys/fs/cgroup/memory.current"] = "200\n"
    assert available_bytes(CPU) == 0


def test_without_any_file_there_is_an_answer_still(files):
    files.clear()
    assert available_bytes(CPU) > 0


def test_a_limit_of_the_address_space_is_a_limit():
    program = (
        "import resource, torch\n"
        "from functional_hess.chunking import available_bytes, _address_space\n"
        "used = next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmSize:'))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))\n"
        "print(available_bytes(torch.device('cpu')))\n"
    ).replace(", _address_space", "")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 250 * MIB < int(done.stdout) <= 300 * MIB


def test_a_call_under_a_limit_of_the_address_space_is_refused_not_killed():
    program = (
        "import resource, torch, functional_hess as fh\n"
        "f = lambda x: (x[1:] * x[:-1]).square().sum()\n"
        "fh.hessian(f)(torch.ones(50))\n"
        "used = next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('VmSize:'))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    fh.hessian(f)(torch.ones(20_000))\n"
        "except fh.MemoryLimitError as error:\n"
        "    print(error)\n"
        "print(len(fh.hessian(f)(torch.ones(1_000))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "hessian: 20,000 rows need" in done.stdout and done.stdout.split()[-1] == "1000"


# How many rows --------------------------------------------------------------------------------------------------------


def choose(**options: Any) -> tuple[int, Estimate]:
    given: dict[str, Any] = {
        "rows": 1000,
        "output": 8 * MIB,
        "mean_result": 100.0,
        "bound": Estimate(0.0, 1.0 * MIB, "closed bound"),
        "refine": None,
        "device": CPU,
        "memory_limit": None,
        "chunk_size": "auto",
    }
    return chunk_for("hessian", **{**given, **options})


def test_the_automatic_chunk_keeps_the_working_set_small(available):
    available(10**12)
    assert choose()[0] == 64  # MiB of working set
    assert choose(output=2000 * MIB)[0] == 200  # a tenth of the result
    assert choose(bound=Estimate(60.0 * MIB, 1.0 * MIB, ""))[0] == 4
    assert choose(bound=Estimate(0.0, 1.0, ""))[0] == 1000


def test_the_automatic_chunk_keeps_to_a_share_of_what_is_available(available):
    available(100 * MIB)  # of which 60 may be taken: 8 for the result, 52 to work with
    assert choose()[0] == 52
    assert choose(memory_limit=20 * MIB)[0] == 12
    assert choose(memory_limit="20 MiB")[0] == 12
    assert choose(memory_limit="20 GiB")[0] == 52


def test_one_row_at_a_time_is_the_least(available):
    available(10**12)
    k, estimate = choose(bound=Estimate(0.0, 100.0 * MIB, "x"))  # more than the working set wants, less than there is
    assert k == 1 and estimate.working(1) == 100 * MIB


def test_a_chunk_given_is_taken_up_to_the_rows_there_are(available):
    available(10**12)
    assert choose(chunk_size=7)[0] == 7 and choose(chunk_size=10**6)[0] == 1000 and choose(chunk_size=None)[0] == 1000
    assert choose(chunk_size=None, rows=0)[0] == 1


def test_the_better_estimate_is_asked_for_only_where_the_bound_does_not_fit(available):
    available(10**12)
    asked = []

    def refine(spare: float) -> Estimate:
        asked.append(spare)
        return Estimate(0.0, 0.25 * MIB, "fake run")

    assert choose(bound=Estimate(0.0, 1.0, "closed bound"), refine=refine) == (1000, Estimate(0.0, 1.0, "closed bound"))
    assert not asked
    assert choose(refine=refine)[0] == 64 and not asked  # 64 rows are enough for speed
    k, estimate = choose(bound=Estimate(0.0, 4.0 * MIB, "closed bound"), refine=refine)
    assert k == 128 and estimate.source == "fake run" and asked == [64 * MIB]  # half of 64 MiB: the allocator's slack


def test_what_does_not_fit_is_refused_in_megabytes_with_the_ways_out(available):
    available(100 * MIB)
    for options in ({"output": 70 * MIB}, {"chunk_size": 100}, {"chunk_size": None}, {"bound": Estimate(0.0, 70.0 * MIB, "")}):
        with pytest.raises(
            MemoryLimitError, match=r"hessian: 1,000 rows need [\d,.]+ MB .* 60% of the memory available is 62.9 MB"
        ):
            choose(**options)
    with pytest.raises(MemoryLimitError, match=r"memory_limit is 5\.2 MB") as caught:
        choose(memory_limit="5MiB")
    for way_out in ("hessian_rows", "rows=", "out=", "hessian_diagonal", "hessian_blocks", "hvp"):
        assert way_out in str(caught.value)
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("chunk_size", [0, -1, "all", 2.0, "", b"auto"])
def test_a_chunk_that_is_no_number_of_rows_is_refused(chunk_size):
    with pytest.raises(ValueError, match="hessian: chunk_size must be 'auto', a positive int or None, got"):
        choose(chunk_size=chunk_size)


class Watched(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and not isinstance(t, FakeTensor):  # those hold nothing
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("chunk_size", ["auto", 1, 50, None])
def test_a_refused_call_has_allocated_nothing(available, chunk_size):
    available(100 * MIB)
    with Watched() as watched, pytest.raises(MemoryLimitError, match=r"hessian: 3,000 rows need [\d,.]+ MB \(72.0 MB of result"):
        hessian(squares, chunk_size=chunk_size)(numbers(3000))
    assert 0 < watched.numel <= 3000


def test_an_impossible_call_is_refused_at_once():
    with Watched() as watched, pytest.raises(MemoryLimitError, match=r"hessian: 2,000,000 rows need 32,000,\d\d\d.\d MB"):
        hessian(squares)(torch.ones(2_000_000, dtype=torch.float64))
    assert 0 < watched.numel <= 2_000_000


def test_what_is_refused_whole_is_granted_in_parts(available):
    available(70 * MIB)
    x = numbers(2400)
    with pytest.raises(MemoryLimitError, match=r"60% of the memory available is 44\.0 MB"):
        hessian(squares)(x)
    out = torch.empty(2400, 2400, dtype=torch.float64)  # what is there already does not count
    hessian(squares, out=out)(x)
    for rows, part in hessian_rows(squares, rows=range(700, 760))(x):
        assert relative_error(part, out[rows.start : rows.stop]) < 1e-13
    assert relative_error(hessian_diagonal(squares)(x), out.diagonal()) < 1e-13


def test_a_limit_given_narrows_the_chunk():
    x = numbers(2000)
    wide, narrow = (explain(hessian(squares, memory_limit=limit, mode="reverse-over-reverse"), x) for limit in (None, "33MiB"))
    assert wide.chunk_size > narrow.chunk_size >= 1 and wide.output_bytes == narrow.output_bytes == 2000 * 2000 * 8
    assert narrow.output_bytes + narrow.working_bytes <= 33 * MIB
    with pytest.raises(MemoryLimitError, match=r"memory_limit is 31\.5 MB"):
        hessian(squares, memory_limit=30 * MIB)(x)


@pytest.mark.parametrize("verb", [hessian, hessian_rows, hessian_diagonal, hessian_blocks])
def test_every_call_that_loops_over_chunks_heeds_the_limit(verb):
    with pytest.raises(MemoryLimitError, match=rf"{verb.__name__}: 2,000 rows need"):
        verb(squares, memory_limit="20kB")(numbers(2000))


def test_what_a_vector_valued_function_needs_is_counted_for_each_output():
    with pytest.raises(MemoryLimitError, match=r"hessian: 200 rows need [\d.]+ MB \(64.0 MB of result"):
        hessian(lambda x: x**3, memory_limit="50MiB")(numbers(200))


def test_the_working_set_of_a_vector_valued_function_grows_with_its_outputs():
    few, many = (explain(hessian(lambda x, m=m: (x**3)[:m], chunk_size=2), numbers(50)).working_bytes for m in (2, 40))
    assert many > 10 * few


def test_memory_is_the_outermost_calls_affair():
    x = numbers(2, 30)
    with pytest.raises(MemoryLimitError):
        hessian(squares, memory_limit=100)(x[0])
    assert torch.func.vmap(hessian(squares, memory_limit=100))(x).shape == (2, 30, 30)


NETS: dict[str, Callable[[], nn.Module]] = {
    "deep": lambda: nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Tanh())]),
    "normed": lambda: nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 4)),
    "wide": lambda: nn.Sequential(nn.Linear(16, 60), nn.ReLU(), nn.Linear(60, 4)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_prediction_is_of_the_size_of_what_is_alive(name):
    """Rows are run where the bound says that they are a trifle, else fake ones."""
    of = network(NETS[name], numbers(64, 16))
    n = Space.of(of.x).dim
    runs = [(8 * MIB, "measured rows"), (MIB // 4, "fake run")]
    for spare, source in runs[: 1 if name == "wide" else 2]:  # of which even the bound of eight rows is smaller than that
        told = explain(hessian(of.f, memory_limit=n * n * 8 + spare), of.x)
        assert told.estimate == source and 1 <= told.chunk_size <= n
        assert told.output_bytes + told.working_bytes <= n * n * 8 + spare


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.heads(x, x, x, need_weights=False)[0])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4, track_running_stats=False) for _ in range(2)])
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + self.norms[1](self.inner[1](torch.relu(self.norms[0](self.inner[0](x)))))
        return self.last(torch.relu(x).mean((2, 3)))


def convolutional() -> nn.Module:
    convolutions = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(96, 5))


PREDICTED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)), numbers(64, 12)),
    "CNN": (convolutional, numbers(16, 1, 8, 8)),
    "LayerNorm MLP": (
        lambda: nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 4)),
        numbers(64, 12),
    ),
    "attention": (Attention, numbers(8, 10, 8)),
    "ResNet-like": (Residual, numbers(6, 1, 8, 8)),
    "LSTM": (lambda: nn.LSTM(5, 8, batch_first=True), numbers(8, 10, 5)),
}


class Alive(TorchDispatchMode):
    """The most bytes that storages made inside took at one time."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.storages.update(t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self.storages:
                self.storages.add(key)
                size = t.untyped_storage().nbytes()
                self.now += size
                weakref.finalize(t.untyped_storage(), self.freed, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size


def test_what_is_alive_is_counted():
    x = torch.ones(1000)
    with Alive(x) as alive:
        y = (x + 1).exp_()  # 4000 bytes
        z = (y * 2, y * 3)  # 8000 more
        del z
        y = y.view(10, 100).sum() + x[0]  # a number and another, and no more than before
    assert alive.peak == 12_000 and alive.now == 4


@pytest.mark.parametrize("limit", [None, pytest.param("8 GiB", marks=pytest.mark.slow)], ids=["run", "fake"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "ResNet-like" else pytest.mark.slow) for name in PREDICTED]
)
def test_predicted_memory_is_what_is_measured(name, limit):
    """Within 0.9 to 1.3 at five chunk sizes, predicted from eight rows or fewer; ``pytest -m slow -rP`` shows the table.

    With a limit, rows are run for the prediction only where they need no more than the call itself; else they are fake.
    """
    make, data = PREDICTED[name]
    net = network(make, data, loss=lambda out: torch.sin(1.3 * (out[0] if isinstance(out, tuple) else out) + 0.4).sum())
    n = Space.of(net.x).dim
    out = torch.zeros(n, n, dtype=torch.float64)
    ratios = {}
    for k in (1, 4) if limit else (1, 4, 16, 64, 256):
        call = hessian(net.f, chunk_size=k, memory_limit=limit, out=out)
        told = explain(call, net.x)
        assert told.chunk_size == k and told.estimate == ("fake run" if limit else "measured rows")
        with Alive(out) as alive:
            call(net.x)
        ratios[k] = told.working_bytes / alive.peak
    sys.stdout.write(f"{name:14} n={n}  " + "  ".join(f"{k}: {ratio:.2f}" for k, ratio in ratios.items()) + "\n")
    assert all(0.9 <= ratio <= 1.3 for ratio in ratios.values()), ratios


def branching(x: Tensor) -> Tensor:
    """A function that fake tensors cannot run."""
    return (x.sin() * x.roll(1)).sum() if float(x.detach().sum()) > -1e9 else x.sum()


def test_a_function_that_branches_on_a_value_is_measured_on_two_rows_of_its_own():
    x = numbers(300)
    told = explain(hessian(branching, memory_limit=300 * 300 * 8 + 120_000, mode="reverse-over-reverse"), x)
    assert told.estimate == "measured rows" and told.working_bytes <= 120_000


@pytest.mark.parametrize("mode", ["forward-over-reverse", "double-backward"])
def test_forward_mode_is_never_run_under_a_counter(mode):
    """Under a dispatch mode it can end the process; the bound is what there is."""
    x = numbers(300)
    told = explain(hessian(branching, memory_limit=300 * 300 * 8 + 300_000, mode=mode), x)
    assert told.estimate == "closed bound"

    def f(x: Tensor) -> Tensor:
        inner = torch.func.grad(lambda z: torch.ldexp(z.sin(), torch.tensor(3)).sum())
        return torch.func.jvp(inner, (x,), (x,))[1].square().sum()

    assert survey(lambda x: (f(x), None), (x,)).forward
    told = explain(hessian(f, memory_limit=300 * 300 * 8 + 2_000_000, chunk_size=1), x)
    assert told.estimate == "closed bound"


def test_a_survey_counts_what_a_composition_makes_of_a_fused_kernel():
    """An LSTM is one operation in Python; second derivatives run its composition, which keeps every gate of every step."""
    saved = []
    for steps in (5, 50):
        net = network(lambda: nn.LSTM(3, 4, batch_first=True), numbers(2, steps, 3), loss=lambda out: out[0].sum())
        space = Space.of(net.x)
        saved.append(survey(lambda *x, net=net, space=space: (net.f(space.at(x)), None), space.pack(net.x)).saved)
    assert saved[0] > 5 * 4 * 2 * 4 * 8 and 8 < saved[1] / saved[0] < 12  # 4 gates, 2 samples, 4 units


def test_a_survey_counts_all_that_a_vmap_inside_f_maps_over():
    data = numbers(20, 6)

    def f(x: Tensor) -> tuple[Tensor, None]:
        return torch.func.vmap(lambda row: torch.sin(row * x).sum())(data).sum(), None

    assert survey(f, (numbers(6),)).saved >= 2 * 20 * 6 * 8


def test_a_survey_counts_derivatives_inside_f_at_a_flat_rate():
    def f(x: Tensor) -> Tensor:
        return torch.sin(x * x).sum()

    plain = survey(lambda x: (f(x), None), (numbers(10),)).saved
    assert survey(lambda x: (torch.func.grad(f)(x).sum(), None), (numbers(10),)).saved >= 3 * plain


def test_a_survey_tells_the_largest_tensor_that_f_holds():
    data = numbers(30, 6)
    assert survey(lambda x: ((data @ x).sum(), None), (numbers(6),)).held == 30 * 6 * 8
