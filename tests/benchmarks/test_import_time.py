"""What importing the package adds to importing torch, in fresh processes. Nothing is asserted of a time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import Any

ROUNDS = 5
PROGRAM = "import time, torch; start = time.process_time(); import functional_hess; print(time.process_time() - start)"


def test_import(benchmark: Any) -> None:
    """The time to read is the one printed, in seconds of the processor; that of the whole process holds torch's own import."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    seconds: list[float] = []

    def import_afresh() -> None:
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout))

    benchmark.group = "import"
    benchmark.pedantic(import_afresh, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["seconds added to torch"] = added = statistics.median(seconds)
    print(f"\nimport functional_hess after torch: {added:.3f} s, median of {len(seconds)}")
