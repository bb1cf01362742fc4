"""Peak resident memory of one call, each in a process of its own: Linux only, where the kernel keeps the peak.

Growth is the peak during the call less what was resident before it, after imports, the arguments, compilation, a call of the
same kind at a tiny size and one derivative in forward mode.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS
from problems import PROBLEMS

__all__ = ["AVAILABLE", "MIB", "growth_of", "peak_growth"]

MIB = 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
AVAILABLE = STATUS.exists() and RESET.exists()


def peak_growth(problem: str, contender: str, *, returned: bool = False) -> int:
    """Bytes by which the resident set of a fresh process grows at most during one Hessian.

    The system's allocator keeps freed blocks and cuts them to pieces; with ``returned`` it is told (glibc alone listens) to map
    each block larger than 64 KiB by itself and give it back when it is freed, so that the peak is that of the tensors alive.
    """
    paths = os.pathsep.join(filter(None, sys.path))  # the child finds what this process found, installed or not
    environment = {**os.environ, "PYTHONPATH": paths, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if returned else {})}
    command = [sys.executable, __file__, problem, contender]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{contender} on {problem}: exit status {child.returncode}\n{child.stderr}")
    return json.loads(child.stdout)


def _kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))


def _measured(problem: str, contender: str) -> int:
    prepare, chosen = CONTENDERS[contender], PROBLEMS[problem]
    prepare(chosen, chosen.instance(tiny=True))()
    return growth_of(prepare(chosen, chosen.instance()))


def growth_of(run: Callable[[], Any]) -> int:
    """Bytes by which the resident set of this process grows at most while ``run`` runs."""
    torch.func.jvp(torch.tanh, (torch.ones(1),), (torch.ones(1),))  # loads the rules of forward mode, where it has not been met
    gc.collect()
    RESET.write_text("5")  # the peak starts again from what is resident now
    before = _kilobytes("VmRSS")
    kept = run()
    peak = _kilobytes("VmHWM")
    del kept
    return max(0, peak - before) * 1024


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))
