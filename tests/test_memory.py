"""Memory as the system counts it, each case in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process holds")
MIB = 2**20

PROGRAM = """
import json, threading, torch
import functional_hess as fh

torch.set_num_threads(2)


def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


class Peak:
    '''Growth of resident and of anonymous memory while the block runs, in bytes.'''

    def watch(self):
        while not self.done.wait(0.0005):
            self.look()

    def look(self):
        for name in self.start:
            self.most[name] = max(self.most[name], status(name))

    def __enter__(self):
        self.start = {name: status(name) for name in ("VmRSS", "RssAnon")}
        self.most, self.done = dict(self.start), threading.Event()
        try:  # the system's own high-water mark, from here on
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.marked = True
        except OSError:
            self.marked = False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.look()
        self.done.set()
        self.thread.join()
        if self.marked:
            self.most["VmRSS"] = max(self.most["VmRSS"], status("VmHWM"))
        self.resident, self.anonymous = (self.most[name] - self.start[name] for name in ("VmRSS", "RssAnon"))


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def by_hand(x, i):
    row = torch.zeros_like(x)
    if i > 0:
        row[i] += 200
        row[i - 1] -= 400 * x[i - 1]
    if i + 1 < len(x):
        row[i] += 1200 * x[i] ** 2 - 400 * x[i + 1] + 2
        row[i + 1] -= 400 * x[i]
    return row


def right(H, x):
    return all(torch.allclose(H[i], by_hand(x, i), rtol=1e-12, atol=1e-10) for i in range(0, len(x), 97))


def point(n):
    return torch.linspace(-1.5, 1.5, n, dtype=torch.float64)


fh.hessian(rosenbrock)(point(64))  # what torch loads on its first derivative is not the call's
"""


def answer(program: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", PROGRAM + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


DENSE = """
x = point({n})
with Peak() as peak:
    H = fh.hessian(rosenbrock)(x)
print(json.dumps(dict(resident=peak.resident, anonymous=peak.anonymous, right=right(H, x))))
"""


def test_the_tools_of_this_file_see_what_is_allocated_for_a_moment():
    seen = answer("with Peak() as peak:\n    torch.ones(2**24)\nprint(json.dumps(dict(r=peak.resident, a=peak.anonymous)))")
    assert 60 * MIB < seen["r"] < 80 * MIB and seen["a"] < 80 * MIB


@pytest.mark.parametrize("n", [1500, pytest.param(4608, marks=pytest.mark.slow)])
def test_a_hessian_needs_little_more_than_its_output(n):
    got = answer(DENSE.format(n=n))
    assert got["right"] and got["resident"] <= 1.1 * n * n * 8 + 64 * MIB


@pytest.mark.slow
def test_a_hessian_of_eight_thousand_parameters_fits_in_a_gibibyte():
    got = answer(DENSE.format(n=8000))
    assert got["right"] and got["resident"] <= 2**30


MAPPED = """
x = point({n})
out = torch.from_file({path!r}, shared=True, size={n} * {n}, dtype=torch.float64).view({n}, {n})
with Peak() as peak:
    fh.hessian(rosenbrock, out=out, memory_limit="{limit}")(x)
print(json.dumps(dict(anonymous=peak.anonymous, right=right(out, x))))
"""


@pytest.mark.parametrize(("n", "limit"), [(3000, 64), pytest.param(8000, 200, marks=pytest.mark.slow)], ids=["64 MiB", "200 MiB"])
def test_a_hessian_larger_than_the_limit_goes_to_a_mapped_file(n, limit, tmp_path):
    got = answer(MAPPED.format(n=n, limit=f"{limit}MiB", path=str(tmp_path / "hessian.bin")))
    assert got["right"] and got["anonymous"] < limit * MIB


def test_an_impossible_hessian_is_refused_before_anything_is_allocated():
    got = answer(
        """
x = point(2_000_000)
with Peak() as peak:
    try:
        fh.hessian(rosenbrock)(x)
    except fh.MemoryLimitError as error:
        text = str(error)
print(json.dumps(dict(resident=peak.resident, text=text)))
"""
    )
    assert got["resident"] < 256 * MIB  # f itself, once
    assert "(32,000,000.0 MB of result and " in got["text"] and "hessian_rows" in got["text"]


@pytest.mark.slow
def test_a_stream_of_rows_holds_a_chunk_at_a_time():
    got = answer(
        """
x = point(3000)
with Peak() as peak:
    fine = all(torch.allclose(part[0], by_hand(x, rows[0])) for rows, part in fh.hessian_rows(rosenbrock, chunk_size=16)(x))
print(json.dumps(dict(resident=peak.resident, right=fine)))
"""
    )
    assert got["right"] and got["resident"] < 48 * MIB  # the matrix would be 69


@pytest.mark.slow
def test_hundreds_of_products_leave_nothing_behind():
    got = answer(
        """
x = point(20_000)
v = torch.ones_like(x)
for mode in ("forward-over-reverse", "reverse-over-reverse", "double-backward"):
    fh.hvp(rosenbrock, x, v, mode=mode)
with Peak() as peak:
    for mode in ("forward-over-reverse", "reverse-over-reverse", "double-backward"):
        for _ in range(100):
            fh.hvp(rosenbrock, x, v, mode=mode)
print(json.dumps(dict(anonymous=peak.anonymous)))
"""
    )
    assert got["anonymous"] < 24 * MIB  # 300 products are 46 MiB


LIMITED = """
import resource

A = torch.randn(128, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(x):
    return torch.tanh(torch.tanh(A @ x[:4096].view(64, 64)) @ x[4096:].view(64, 8)).square().sum()


def coupled(x):
    return x.sum().sin() * x.square().sum()


x = point(4608)
f = dict(rosenbrock=rosenbrock, network=network, coupled=coupled)[{f!r}]
expected = fh.hvp(f, x, torch.ones_like(x), mode="reverse-over-reverse")
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + {extra} * 2**20,) * 2)
try:
    H = fh.hessian(f)(x)
    outcome = "right" if torch.allclose(H.sum(1), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())) else "wrong"
except fh.MemoryLimitError as error:
    outcome = str(error)
print(json.dumps(outcome))
"""


@pytest.mark.slow
@pytest.mark.parametrize("extra", [4, 60, 250, 320, 1000])  # MiB; the result takes 162
@pytest.mark.parametrize("f", ["rosenbrock", "network", "coupled"])  # by colors, by units, by rows
def test_under_a_limit_of_the_address_space_a_hessian_fits_its_chunk_or_is_refused(f, extra):
    outcome = answer(LIMITED.format(f=f, extra=extra))  # which fails if the process dies, or raises anything else
    if outcome != "right":
        assert outcome.startswith("hessian: 4,608 rows need 17") and "60% of the memory available is" in outcome
    assert (outcome == "right") == (extra >= 320)
