"""How many directions at once: memory known beforehand, and bounded.

The memory of k Hessian rows at a time is linear in k. With P the bytes of the parameters, S those that the operations of one
evaluation of f make (of their result and of the largest argument that depends on x, the larger), and D those of the largest
tensor that f holds,

    working(k) <= 2 P (k + 1) + 4 S (k + 1) + k P + D,

which costs one plain evaluation to know (:func:`survey`). On forty functions it was 1.4 to 15 times too large. Where it would
leave too few rows for speed, and in what ``explain`` tells, a few rows are run with a counter of live storages
(:func:`measured`): on the tensors themselves if the bound says that this is a trifle, else on fake tensors, which allocate
nothing. The automatic chunk keeps the working set within max(64 MiB, output / 10), and output and working set together within
60 % of what is available (system, cgroup, RLIMIT_AS, or the accelerator), or within ``memory_limit``. A call that cannot fit is
refused before anything is allocated.

What is predicted is the storages alive. The system's allocator may hold some tens of MB more of what was freed, which a tight
``memory_limit`` should leave room for.

Within memory, the chunk is the one that keeps a typical intermediate result in the cache: smaller chunks are often faster too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from functional_hess.levels import repaired
from functional_hess.nesting import at_depth, depth, derivative_levels
from functional_hess.tree import tensors_of

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = [
    "Estimate",
    "MemoryLimitError",
    "Survey",
    "available_bytes",
    "chunk_for",
    "closed_bound",
    "fits",
    "measured",
    "megabytes",
    "parse_bytes",
    "progress_bar",
    "recomputed",
    "require_room",
    "survey",
    "uncounted",
]

MIB = 2**20
WORKING_SET = 64 * MIB
NOT_WORTH_ASKING = 16 * MIB  # calls smaller than this do not ask the system what is left
SHARE_OF_AVAILABLE = 0.6
NO_LIMIT = 2**60  # the first version of cgroups writes a number near 2**63 where there is none
CACHE_TARGET = 1.0 * MIB  # bytes of one batched intermediate result,
CACHE_TARGET_OF_A_THREAD = 0.5 * MIB  # or so many for each thread
CACHE_TARGET_ACCELERATOR = 64.0 * MIB
ALLOCATOR_SLACK = 2.0  # what the system's allocator may hold beyond the storages alive
FEWEST_FOR_SPEED = 32  # rows below which a better estimate is asked for,
FEWEST_AT_ONCE = 8  # and below which no chunk goes for the sake of the cache
MEASURED_ROWS = (1, 4, 8)  # with few rows the peak is where the graph is built, with more where they run through it
RESULTS_OF_A_DERIVATIVE = 3  # intermediate results of a gradient, for one of the function


class MemoryLimitError(MemoryError):
    """A call would need more memory than there is; nothing has been allocated."""


# ---------------------------------------------------------------------------------------------------- looking at f once


@dataclasses.dataclass(frozen=True)
class Survey:
    """One plain evaluation of f, watched.

    ``order`` lists the leaves as f first uses them; ``saved`` is S, the bytes of its intermediate results, ``calls`` their
    number, ``held`` is D, the bytes of the largest tensor that f holds, and ``forward`` tells that f uses forward mode itself.
    """

    value: Any
    aux: Any
    order: tuple[int, ...]
    saved: int
    calls: int
    held: int
    forward: bool


class _Watch(TorchFunctionMode):
    """Sees the operations of f, and which of their arguments depend on the leaves."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.number = {id(t): i for i, t in reversed(list(enumerate(leaves)))}
        self.order: dict[int, None] = {}
        self.moving = set(self.number)  # ids: one that is used again by another tensor makes the bound larger, not wrong
        self.saved = self.calls = self.held = 0
        self.largest: tuple[int, int] = (0, 0)
        self.depth, self.derivatives = depth(), len(derivative_levels())
        self.forward = False

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        inside = depth() > self.depth  # a transform of f's own, whose tensors are others than those it was given
        out = func(*args, **(kwargs or {}))
        results = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        if not results:  # a shape, a dtype: no use of numbers
            return out
        largest = self._largest_moving((*args, *kwargs.values()) if kwargs else args, inside)
        made = 0
        for t in results:
            if t.is_floating_point():
                if largest:
                    self.moving.add(id(t))
                if not t._is_view():
                    self.calls += 1
                    made += self._bytes(t)
        if made:  # what goes back through a reduction has the size of what came in
            self.saved += max(made, largest) * (self._results_for_one() if inside else 1)
        return out

    def _bytes(self, t: Tensor) -> int:
        return at_depth(t, self.depth).numel() * t.element_size()  # all that a vmap inside f maps over

    def _results_for_one(self) -> int:
        """Intermediate results of the derivatives inside f, for one of the function that they are derivatives of."""
        inside = derivative_levels()[self.derivatives :]
        self.forward = self.forward or "forward" in inside
        return RESULTS_OF_A_DERIVATIVE ** len(inside)

    def _largest_moving(self, args: Sequence[Any], inside: bool) -> int:
        """Bytes of the largest argument that depends on the leaves, as all do inside."""
        largest = 0
        for arg in args:
            if isinstance(arg, Tensor):
                if id(arg) in self.number:
                    self.order.setdefault(self.number[id(arg)])
                if inside or id(arg) in self.moving:
                    largest = max(largest, self._bytes(arg))
                elif arg.is_floating_point():
                    self.held = max(self.held, self._bytes(arg))
            elif isinstance(arg, (tuple, list)):
                largest = max(largest, self._largest_moving(arg, inside))
        return largest


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """What is evaluated inside is computed again for derivatives instead of kept: a survey counts the largest such part alone."""
    watch = _watching()
    before = (watch.saved, watch.calls) if watch else (0, 0)
    yield
    if watch:
        part = (watch.saved - before[0], watch.calls - before[1])
        beyond = max(0, part[0] - watch.largest[0]), max(0, part[1] - watch.largest[1])
        watch.saved, watch.calls = before[0] + beyond[0], before[1] + beyond[1]
        watch.largest = max(part[0], watch.largest[0]), max(part[1], watch.largest[1])


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What is evaluated inside is not of f, and a survey of f counts nothing of it."""
    watch = _watching()
    before = (watch.saved, watch.calls, watch.held) if watch else (0, 0, 0)
    yield
    if watch:
        watch.saved, watch.calls, watch.held = before


def _watching() -> _Watch | None:
    return next((mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Watch)), None)


def survey(f: Callable[..., tuple[Any, Any]], x: Sequence[Tensor]) -> Survey:
    """Evaluate ``f(*x) -> (value, aux)`` once, without derivatives of its own, and watch it.

    Operations are the ones that second derivatives will meet: of the compositions that stand for fused kernels every
    intermediate result counts. What a derivative inside f makes on its way back goes by unseen and is counted at a flat rate.
    """
    aliases = tuple(t.view_as(t) for t in x)  # so that a tensor in two leaves is told apart
    watch = _Watch(aliases)
    with watch, repaired(always=True, fresh=True):
        value, aux = f(*aliases)
    unused = [leaf for leaf in range(len(x)) if leaf not in watch.order]
    return Survey(value, aux, (*watch.order, *unused), watch.saved, max(watch.calls, 1), watch.held, watch.forward)


# ---------------------------------------------------------------------------------------------------- how much memory


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of working memory for k rows at a time: ``fixed + k * per_row``; ``source`` says how it is known.

    No more than ``most`` rows are ever taken at a time, whatever k. Where several groups of rows share a call, the one that needs
    most at k counts.
    """

    fixed: float
    per_row: float
    source: str
    most: float = math.inf
    others: tuple[Estimate, ...] = ()

    def working(self, k: int) -> float:
        return max(self.fixed + min(k, self.most) * self.per_row, *(other.working(k) for other in self.others), 0.0)

    def rows_within(self, amount: float) -> float:
        """The largest k that takes no more than ``amount``; below 1 if none does."""
        k = (amount - self.fixed) // self.per_row
        return min(math.inf if k >= self.most else k, *(other.rows_within(amount) for other in self.others), math.inf)

    def or_else(self, others: Iterable[Estimate]) -> Estimate:
        """The largest of this and ``others`` at every k."""
        return dataclasses.replace(self, others=(*self.others, *others))

    def holding(self, amount: float) -> Estimate:
        """The same with ``amount`` bytes more a row."""
        others = tuple(other.holding(amount) for other in self.others)
        return dataclasses.replace(self, per_row=self.per_row + amount, others=others)


def closed_bound(parameters: int, saved: int, held: int = 0) -> Estimate:
    """The bound of this module's docstring, from P, S and D in bytes.

    Example:
        >>> closed_bound(parameters=1000, saved=5000).working(3)
        91000.0
    """
    return Estimate(2.0 * parameters + 4.0 * saved + held, 3.0 * parameters + 4.0 * saved, "closed bound")


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make and that are alive; what was there before counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        for t in tensors_of((args, kwargs))[0]:
            self.seen.setdefault(t.untyped_storage()._cdata, 0)
        out = func(*args, **(kwargs or {}))
        for t in tensors_of(out)[0]:
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in self.seen:
                self.seen[key] = storage.nbytes()
                self.now += self.seen[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.seen.pop(key, 0)


def measured(
    run: Callable[[Sequence[Tensor], int], Any], x: Sequence[Tensor], rows: int, *, fake: bool, at: Sequence[int] = MEASURED_ROWS
) -> Estimate:
    """Memory of ``run(x, k)`` for k up to ``rows``, from runs ``at`` a few k.

    ``run`` must not use forward mode, which under a dispatch mode can end the process in torch.

    Args:
        fake: run on fake tensors, which allocate nothing but cost a fraction of a second.

    Raises:
        whatever ``run`` raises, as where f branches on a value and the tensors are fake.
    """
    at = sorted({min(k, rows) for k in at})
    peaks = [(_fake_peak if fake else _peak)(run, x, k) for k in at]
    source = "fake run" if fake else "measured rows"
    if len(at) == 1:
        return Estimate(0.0, max(1.0, peaks[0] / at[0]), source, rows)
    first, *others = (_line(*points, source, rows) for points in itertools.pairwise(zip(at, peaks, strict=True)))
    return first.or_else(others)


def _line(low: tuple[int, int], high: tuple[int, int], source: str, rows: int) -> Estimate:
    """Through two points (k, peak). A peak is the largest of straight lines, so every chord bounds it from below elsewhere."""
    slope = max(1.0, (high[1] - low[1]) / (high[0] - low[0]))
    return Estimate(low[1] - slope * low[0], slope, source, rows)


def _peak(run: Callable[[Sequence[Tensor], int], Any], x: Sequence[Tensor], k: int) -> int:
    with _LiveBytes() as live:
        run(x, k)
    return live.peak


def _fake_peak(run: Callable[[Sequence[Tensor], int], Any], x: Sequence[Tensor], k: int) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t.detach()) for t in x]
        return _peak(run, fake, k)


# ---------------------------------------------------------------------------------------------------- what there is


def parse_bytes(amount: int | float | str) -> int:
    """A number of bytes, or a text such as ``"4GiB"``, ``"200 MB"``.

    Example:
        >>> parse_bytes("4GiB"), parse_bytes("1.5 kB"), parse_bytes(1024)
        (4294967296, 1500, 1024)
    """
    if isinstance(amount, (int, float)) and 0 <= amount < math.inf:
        return int(amount)
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kKmMgGtT]?)(i?)[bB]?\s*", str(amount))
    if not match:
        raise ValueError(f"memory_limit must be bytes or a text such as '4GiB', got {amount!r}.")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower() or " ")
    return int(float(number) * (1024 if binary else 1000) ** power)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on ``device``: for the CPU, the least of system, cgroup and address-space limits."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [limit for limit in (_system(), _cgroup(), _address_space()) if limit is not None]
    return max(0, min(limits)) if limits else 4 * 1024 * MIB


def _system() -> int | None:
    available = _entry("/proc/meminfo", "MemAvailable:")
    if available is not None:
        return available * 1024
    with contextlib.suppress(ImportError, ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _cgroup() -> int | None:
    """The tightest limit of the process's own cgroup and its parents, less what is used and cannot be given back."""
    left = []
    for place, (limit_file, used_file, cached) in _cgroup_places(_read("/proc/self/cgroup")):
        limit = _number(f"{place}/{limit_file}")
        if limit is None or limit >= NO_LIMIT:
            continue
        used = _number(f"{place}/{used_file}")
        if used is not None:  # pages of files are given back: those of a memory-mapped out= are among them
            left.append(limit - used + sum(_entry(f"{place}/memory.stat", name) or 0 for name in cached))
    return min(left) if left else None


@functools.cache
def _cgroup_places(cgroups: str) -> tuple[tuple[str, tuple[str, str, tuple[str, ...]]], ...]:
    """The folders that can limit a process whose /proc/self/cgroup says ``cgroups``, with the names of their files."""
    found = []
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
        else:
            continue
        steps = [step for step in path.split("/") if step]
        places = ["/".join([root, *steps[:depth]]) for depth in range(len(steps), -1, -1)]
        found += [(place, names) for place in places if _read(f"{place}/{names[0]}")]
    return tuple(found)


def _address_space() -> int | None:
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return limit - (_entry("/proc/self/status", "VmSize:") or 0) * 1024


def _read(path: str) -> str:
    """A file of the kernel's, empty where there is none; below the layers of ``open``, which cost more than the kernel."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(descriptor, 65536).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _number(path: str) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _entry(path: str, name: str) -> int | None:
    """The number that follows ``name`` at the beginning of a line."""
    match = re.search(rf"^{name}\s+(\d+)", _read(path), re.MULTILINE)
    return int(match[1]) if match else None


# ---------------------------------------------------------------------------------------------------- how many rows


def chunk_for(
    verb: str,
    *,
    rows: int,
    output: int,
    mean_result: float,
    bound: Estimate,
    refine: Callable[[float], Estimate] | None,
    device: torch.device,
    memory_limit: int | float | str | None,
    chunk_size: int | str | None,
) -> tuple[int, Estimate]:
    """The number of rows at once, and the estimate it rests on.

    Args:
        rows: how many rows there are.
        output: bytes that this call allocates for its result.
        mean_result: bytes of a typical intermediate result of f.
        bound: the estimate that costs nothing.
        refine: makes a better estimate within that many bytes, asked for only if the bound does not fit.
        chunk_size: ``"auto"``, an int, or ``None`` for all rows at once.

    Raises:
        MemoryLimitError: not even one row at a time fits, or the given ``chunk_size`` does not.
        ValueError: ``chunk_size`` is no positive int, ``"auto"`` or ``None``.
    """
    if chunk_size is not None and chunk_size != "auto" and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{verb}: chunk_size must be 'auto', a positive int or None, got {chunk_size!r}.")
    wish = rows if chunk_size is None else _wish(rows, mean_result, device) if chunk_size == "auto" else min(chunk_size, rows)
    wish = max(1, wish)
    if memory_limit is None and output + bound.working(wish) <= NOT_WORTH_ASKING:
        return wish, bound  # too little to ask the system about
    total = _total(device, memory_limit)
    room = total - output
    target = min(room, max(WORKING_SET, output / 10))
    estimate = bound
    if chunk_size == "auto":
        k = min(wish, bound.rows_within(target))
        if k < min(wish, FEWEST_FOR_SPEED) and refine is not None and room > 0:
            estimate = refine(min(room, WORKING_SET))
            k = max(k, min(wish, estimate.rows_within(target / ALLOCATOR_SLACK)))
        k = max(1, int(k))
    else:
        if bound.working(wish) > room > 0 and refine is not None:
            estimate = refine(min(room, WORKING_SET))
        k = wish
    if output + estimate.working(k) > total:
        raise MemoryLimitError(_refusal(verb, rows, output, estimate.working(k), k, total, memory_limit))
    return k, estimate


def fits(output: int, device: torch.device) -> bool:
    """Whether a result of so many bytes may be allocated at all."""
    return output <= NOT_WORTH_ASKING or output <= _total(device, None)


def require_room(
    verb: str, what: str, output: int, device: torch.device, memory_limit: int | float | str | None, cure: str
) -> None:
    """Refuse a result that does not fit, before it is allocated.

    Raises:
        MemoryLimitError: ``output`` bytes are more than the limit, or than a share of what is available.
    """
    if memory_limit is None and output <= NOT_WORTH_ASKING:
        return
    total = _total(device, memory_limit)
    if output > total:
        limit = "memory_limit" if memory_limit is not None else f"{SHARE_OF_AVAILABLE:.0%} of the memory available"
        raise MemoryLimitError(f"{verb}: {what} needs {megabytes(output)}, but {limit} is {megabytes(total)}. {cure}")


def _total(device: torch.device, memory_limit: int | float | str | None) -> float:
    available = SHARE_OF_AVAILABLE * available_bytes(device)
    return available if memory_limit is None else min(parse_bytes(memory_limit), available)


def _wish(rows: int, mean_result: float, device: torch.device) -> int:
    on_cpu = max(CACHE_TARGET, CACHE_TARGET_OF_A_THREAD * torch.get_num_threads())
    target = on_cpu if device.type == "cpu" else CACHE_TARGET_ACCELERATOR
    return min(rows, max(FEWEST_AT_ONCE, int(target / max(mean_result, 1.0))))


def _refusal(verb: str, rows: int, output: int, working: float, k: int, total: float, memory_limit: Any) -> str:
    limit = "memory_limit" if memory_limit is not None else f"{SHARE_OF_AVAILABLE:.0%} of the memory available"
    return (
        f"{verb}: {rows:,} rows need {megabytes(output + working)} ({megabytes(output)} of result and {megabytes(working)} to "
        f"work with, {k} row{'s' if k > 1 else ''} at a time), but {limit} is {megabytes(total)}. Stream them with hessian_rows "
        "(rows= takes any part), write into a memory-mapped out=, take hessian_diagonal or hessian_blocks, or use products with "
        "hvp, which need no matrix."
    )


def megabytes(amount: float) -> str:
    """Bytes as a text in MB (10^6 bytes).

    Example:
        >>> megabytes(489_340_000), megabytes(52_000)
        ('489.3 MB', '0.1 MB')
    """
    return f"{amount / 1e6:,.1f} MB"


@contextlib.contextmanager
def progress_bar(verb: str, total: int, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A tqdm bar over ``total`` rows; yields the function that advances it."""
    if not shown:
        yield lambda rows: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(f"{verb}: progress=True needs tqdm: pip install 'functional_hess[progress]'.") from error
    with tqdm(total=total, desc=verb, unit="row") as bar:
        yield bar.update
