"""Prints the comparison as markdown tables, all of it measured in one run: ``python tests/benchmarks/table.py``.

Every Hessian is compared with that of the N-call loop before anything is timed. Contenders take turns in an order that is
drawn anew for each round, so that whatever else the machine does hits all alike; a time is the median over the rounds. Memory
is measured afterwards, in fresh processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from contenders import CONTENDERS, LOOP, OURS, relative_error
from memory import AVAILABLE, MIB, peak_growth
from problems import PROBLEMS, Instance, Problem, jax, matrix

SHORTEST = 0.02  # seconds that one measurement lasts at least, by repeating the call


@dataclasses.dataclass
class Measured:
    """One contender on one problem: seconds a call in every round, relative error, bytes of peak growth."""

    seconds: list[float]
    error: float
    bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def checked_errors(problem: Problem, instance: Instance, runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The relative error of each contender against the loop.

    Raises:
        ValueError: one is wrong that is not known to be, or right though it is known to be wrong.
    """
    truth = matrix(runs[LOOP](), instance)
    errors = {name: relative_error(matrix(run(), instance), truth) for name, run in runs.items()}
    for name, error in errors.items():
        if (error > problem.tolerance) != (name in problem.wrong):
            known = "wrong" if name in problem.wrong else f"right to {problem.tolerance}"
            raise ValueError(f"{name} on {problem.title}: relative error {error:.1e}, expected to be {known}.")
    return errors


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Seconds for one call, averaged over ``repeats`` of them."""
    gc.collect()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def timed(name: str, rounds: int) -> dict[str, Measured]:
    """All contenders on one problem, in turns; in no fixed order, because a call is slower after some others than after some."""
    problem, instance = PROBLEMS[name], PROBLEMS[name].instance()
    say(f"{name}: preparing and comparing the results")
    runs = {contender: prepare(problem, instance) for contender, prepare in CONTENDERS.items()}
    measured = {contender: Measured([], error) for contender, error in checked_errors(problem, instance, runs).items()}
    repeats = {contender: max(1, round(SHORTEST / seconds_of(run, 1))) for contender, run in runs.items()}
    shuffled = random.Random(0)
    for turn in range(rounds):
        say(f"{name}: round {turn + 1} of {rounds}")
        for contender in shuffled.sample(list(runs), len(runs)):
            measured[contender].seconds.append(seconds_of(runs[contender], repeats[contender]))
    say(f"{name}: " + "; ".join(f"{c} {time_cell(measured, c, c in problem.wrong)}" for c in measured))
    return measured


def table(corner: str, rows: Sequence[str], cell: Callable[[str, str], str]) -> str:
    """A markdown table of problems by contenders."""
    lines = [(corner, *CONTENDERS), (":---", *("---:" for _ in CONTENDERS))]
    lines += [(PROBLEMS[row].title, *(cell(row, contender) for contender in CONTENDERS)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def digits(number: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def time_cell(all_of: Mapping[str, Measured], contender: str, wrong: bool) -> str:
    one, ours = all_of[contender], all_of[OURS]
    ratio = "" if contender == OURS else f" ({digits(one.median / ours.median)}x)"
    return f"{digits(1e3 * one.median)} ms{ratio}" + (f", **wrong** by {one.error:.1%}" if wrong else "")


def memory_cell(one: Measured, output: int) -> str:
    if one.bytes is None:
        return ""
    return f"{one.bytes / MIB:,.0f} MB" + (f" ({one.bytes / output:.1f}x)" if output > MIB else "")


def machine(rounds: int) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"torch {torch.__version__}, jax {jax.__version__ if jax is not None else 'not installed'}"
    threads = f"{cores} cores, {torch.get_num_threads()} threads in torch"
    return f"{versions}, Python {platform.python_version()}, {platform.machine()}, {threads}, medians of {rounds} rounds."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = list(PROBLEMS)
    parser.add_argument("--problems", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--rounds", type=int, default=7, help="medians are over so many (default 7)")
    parser.add_argument("--no-memory", action="store_true", help="only the times")
    parser.add_argument("--threads", type=int, help="bind everybody to so many cores (Linux; default all)")
    chosen = parser.parse_args()
    if chosen.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.threads])  # JAX counts these when it starts
        torch.set_num_threads(chosen.threads)

    found = {name: timed(name, chosen.rounds) for name in chosen.problems}
    print(machine(chosen.rounds) + "\n")
    print(f"Time of a call, and how many times that of {OURS} it is:\n")
    print(table("", chosen.problems, lambda row, c: time_cell(found[row], c, c in PROBLEMS[row].wrong)), flush=True)
    if chosen.no_memory or not AVAILABLE:
        return
    for name in chosen.problems:
        for contender in CONTENDERS:
            say(f"{name}: memory of {contender}")
            found[name][contender].bytes = peak_growth(name, contender)
    output = {name: PROBLEMS[name].instance().output_bytes for name in chosen.problems}
    print("\nPeak growth of the resident memory, and how many times the Hessian itself that is where this exceeds 1 MB:\n")
    print(table("", chosen.problems, lambda row, c: memory_cell(found[row][c], output[row])), flush=True)


if __name__ == "__main__":
    main()
