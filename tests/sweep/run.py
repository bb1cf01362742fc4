"""Runs the sweep and prints it as a table: ``PYTHONPATH=tests python -m sweep.run``.

This is the whole sweep, and the slow test runs the same: every operation of torch's database that is differentiable, up to four
sample inputs each, and every case of the project's own table. Groups of cases are dealt to worker processes. A process that
dies or hangs costs the one (case, dtype, call) that was under way, which counts as a crash; another process goes on with the
rest of the group. With ``--keep`` the counts are written to ``counts.json``, with which ``tests/test_op_sweep.py`` compares; the
README has their table.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweep.judge import VERDICTS
from sweep.worker import OURS, PEERS

__all__ = ["COUNTS", "THIRD", "THIRD_COUNTS", "Died", "Outcome", "counts", "sweep", "table", "worse"]

COUNTS, THIRD_COUNTS = (Path(__file__).with_name(name) for name in ("counts.json", "counts_third.json"))
THIRD: dict[str, Any] = {"sources": ("third",), "command": (sys.executable, "-m", "sweep.third")}  # the sweep of `sweep.third`
TESTS = Path(__file__).resolve().parents[1]
PATIENCE = 120.0  # seconds without a line after which a process counts as hung,
START = 300.0  # and those in which a new one must be ready


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``key`` is ``source:case|readout|dtype|call``; a call ``truth`` tells what the case is judged by."""

    key: str
    verdict: str
    detail: str

    @property
    def source(self) -> str:
        return self.key.split(":", 1)[0]

    @property
    def dtype(self) -> str:
        return self.key.rsplit("|", 2)[1]

    @property
    def call(self) -> str:
        return self.key.rsplit("|", 1)[1]


class Died(Exception):
    """A worker ended, or said nothing for too long."""


class _Worker:
    """One process, asked a line at a time."""

    def __init__(self, command: Sequence[str], patience: float) -> None:
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        self.patience = patience
        self.buffer = b""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self.answer(START)

    def ask(self, question: Mapping[str, Any]) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Died(f"exit code {self.process.wait()}") from error

    def answer(self, patience: float | None = None) -> dict[str, Any]:
        assert self.process.stdout
        patience = patience or self.patience
        deadline = time.monotonic() + patience
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise Died(f"nothing said for {patience:.0f} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                code = self.process.wait()
                self.close()
                raise Died(f"exit code {code}")
            self.buffer += more
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # a line that nobody reads any more
                    pipe.close()


def sweep(
    pattern: str = "",
    *,
    sources: Sequence[str] = ("own", "opinfo"),
    workers: int = 2,
    say: Callable[[str], None] = lambda _: None,
    command: Sequence[str] = (sys.executable, "-m", "sweep.worker"),
    patience: float = PATIENCE,
) -> list[Outcome]:
    """Every outcome, in the order of the groups; only groups whose name matches ``pattern``."""
    first = _Worker(command, patience)
    groups: list[str] = []
    for source in sources:
        first.ask({"list": source})
        groups += [name for name in first.answer()["names"] if re.search(pattern, name)]
    idle = [first]
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for group in groups:
        waiting.put(group)
    found: dict[str, list[Outcome]] = {}
    failures: list[BaseException] = []

    def work() -> None:
        worker = idle.pop() if idle else None
        try:
            while not failures:
                group = waiting.get_nowait()
                found[group], worker = _run_group(group, worker, lambda: _Worker(command, patience))
                say(f"{len(found)} of {len(groups)}: {group} {_bad(found[group])}")
        except queue.Empty:
            pass
        except BaseException as error:  # told to the caller below
            failures.append(error)
        finally:
            if worker:
                worker.close()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(groups)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in idle:
        worker.close()
    if failures:
        raise failures[0]
    return [outcome for group in groups for outcome in found[group]]


def _run_group(group: str, worker: _Worker | None, start: Callable[[], _Worker]) -> tuple[list[Outcome], _Worker]:
    """All outcomes of a group, with as many processes as it takes."""
    outcomes: list[Outcome] = []
    while True:
        worker = worker or start()
        under_way = f"{group}|-|-|load"
        begun = {o.key for o in outcomes}
        try:
            worker.ask({"group": group, "skip": sorted(begun)})
            while "done" not in (line := worker.answer()):
                if "begin" in line:
                    under_way = line["begin"]
                else:
                    outcomes.append(Outcome(line["end"], line["verdict"], line["detail"]))
            return _once(outcomes), worker
        except Died as death:
            worker.close()
            worker = None
            if under_way in begun:
                raise RuntimeError(f"{group}: a process ends outside its cases, after {under_way}") from death
            outcomes.append(Outcome(under_way, "crash", f"the process ended: {death}"))
            if under_way.endswith("|load"):
                return _once(outcomes), start()


def _once(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """A truth that was found again after a crash is told once."""
    return list({o.key: o for o in outcomes}.values())


def _bad(outcomes: Sequence[Outcome]) -> str:
    bad = collections.Counter(
        f"{o.verdict} {o.call}" for o in outcomes if o.verdict in ("wrong", "crash") and o.call not in PEERS
    )
    return ", ".join(f"{n} {what}" for what, n in bad.items())


def counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """``{source: {dtype: {call: {verdict: number}}}}``, and cases without a gradient under ``"truth"``."""
    tree: dict[str, Any] = {}
    for o in outcomes:
        row = tree.setdefault(o.source, {}).setdefault(o.dtype, {}).setdefault(o.call, {})
        row[o.verdict] = row.get(o.verdict, 0) + 1
    return tree


def worse(now: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """What is worse than it was kept, for the calls of the package: cases lost, fewer right, any wrong or crashed."""
    complaints = []
    for source, dtypes in kept.items():
        for dtype, calls in dtypes.items():
            for call, before in calls.items():
                row = now.get(source, {}).get(dtype, {}).get(call, {})
                where = f"{source}, {dtype}, {call}"
                if call in (*PEERS, "truth"):
                    continue
                if row.get("right", 0) < before.get("right", 0):
                    complaints.append(f"{where}: {row.get('right', 0)} right, were {before['right']}")
                if sum(row.values()) < sum(before.values()):
                    complaints.append(f"{where}: {sum(row.values())} cases, were {sum(before.values())}")
    for source, dtypes in now.items():
        for dtype, calls in dtypes.items():
            bad = {call: row.get("wrong", 0) + row.get("crash", 0) for call, row in calls.items() if call not in PEERS}
            complaints += [f"{source}, {dtype}, {call}: {n} wrong or crashed" for call, n in bad.items() if n]
    return complaints


def table(tree: Mapping[str, Any]) -> str:
    """The counts by call, those of the package first, sources and dtypes together, as markdown."""
    total: dict[str, collections.Counter[str]] = {}
    for dtypes in tree.values():
        for calls in dtypes.values():
            for call, row in calls.items():
                if call not in ("truth", "load"):
                    total.setdefault(call, collections.Counter()).update(row)
    lines = [f"|  | {' | '.join(VERDICTS)} |", "| --- |" + " --- |" * len(VERDICTS)]
    lines += [f"| {call} | {' | '.join(f'{row[v]:,}' for v in VERDICTS)} |" for call, row in sorted(total.items(), key=_place)]
    return "\n".join(lines)


def _place(item: tuple[str, Any]) -> int:
    known = [*OURS, *PEERS]
    return known.index(item[0]) if item[0] in known else len(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="a regular expression that names of groups are searched with")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log", type=Path, help="where to write every outcome, a line of JSON each")
    parser.add_argument("--keep", action="store_true", help=f"write the counts to {COUNTS.name} or {THIRD_COUNTS.name}")
    parser.add_argument("--third", action="store_true", help="third derivatives, and mapped points, of the project's own table")
    options = parser.parse_args()
    what = THIRD if options.third else {}
    outcomes = sweep(options.pattern, workers=options.workers, say=lambda line: print(line, file=sys.stderr, flush=True), **what)
    if options.log:
        options.log.write_text("".join(json.dumps(dataclasses.asdict(o)) + "\n" for o in outcomes))
    tree = counts(outcomes)
    if options.keep:
        (THIRD_COUNTS if options.third else COUNTS).write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")
    print(table(tree))


if __name__ == "__main__":
    main()
