"""Interrupted work: a file that tells which rows of a Hessian are finished.

A call with ``resume=path`` appends a line to that file for every chunk of rows that is finished; a later call of the same kind
reads it and computes the other rows only. The first line says of which call the rows are: the space, the options, a digest of
every argument, and the product of H with a fixed vector, which tells a function from another although no file can hold one. A
call that differs is refused, with what differs.

Lines bear a checksum, and one that is torn or damaged counts for nothing. Where rows are written into ``out``, a line also bears
their digest, and rows count as finished only while ``out`` still holds what was written:

* *A killed process* loses the chunk that it was at. What it wrote into a mapped file is the system's, and stays.
* *A power loss* loses what the system had not yet brought to the disk, of ``out`` and of this file in any order. Rows that
  ``out`` lost are seen by their digest, and computed again. This file is asked to the disk once a second.
* *Another* ``out``, or one that was changed, holds none of the rows, and they are computed again.

While a call adds to its record it holds a lock on the file, where the system has one (Windows and some network file systems
have none), and a second call on the same record, of another process or of this one, is refused. The lock ends with the call, or
with its process, however that ends, and the processes that it has forked; nothing stays behind that would have to be deleted.

Rows that are handed to the caller (:func:`functional_hess.second_order.hessian_rows`) count as finished as soon as the next ones
are asked for; what became of them is the caller's affair.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from functional_hess.transforms import Bound
from functional_hess.tree import Piece, Space, broadcast_prefix, written

__all__ = ["InPlace", "Record", "digest", "runs_of", "said_of_call"]

Product = Callable[[dict[int, Tensor]], Sequence[Tensor]]
InPlace = Callable[[Sequence[Piece], bool], Iterable[Tensor]]
FORMAT = 1
BEGINNING = b'{"functional_hess": "finished rows"'
SECONDS_UNTIL_SYNCED = 1.0
PLAIN = (bool, int, float, complex, str, bytes, type(None))
TOLD = 4  # differences that an error lists


# ---------------------------------------------------------------------------------------------------- what identifies a call


def digest(tensors: Iterable[Tensor]) -> str:
    """A digest of the numbers of all tensors, bit by bit."""
    found = hashlib.blake2b(digest_size=16)
    for t in tensors:
        t = t.detach().cpu().resolve_conj().resolve_neg().contiguous()
        found.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def said_of_call(bound: Bound, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a record but for the product: what two calls that share rows have in common."""
    space = bound.space
    tree = (tuple(args), dict(kwargs))
    leaves = zip(written(tree[0], "args") + written(tree[1], "kwargs"), broadcast_prefix(tree, tree, "args"), strict=True)
    return {
        "functional_hess": "finished rows",
        "format": FORMAT,
        "verb": bound.verb,
        "n": space.dim,
        "dtype": str(space.dtype),
        "leaves": ", ".join(f"{path}{list(shape)}" for path, shape in zip(space.paths, space.shapes, strict=True)),
        **options,
        "arguments": {name: _said_of(leaf) for name, leaf in leaves},
    }


def _said_of(leaf: Any) -> list[str]:
    """What a leaf of the arguments is, and which; an object that is neither numbers nor text is known by its class alone."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
        return [
            f"{leaf.dtype}{list(leaf.shape)}",
            hashlib.blake2b(np.ascontiguousarray(leaf).tobytes(), digest_size=16).hexdigest(),
        ]
    if isinstance(leaf, Tensor):
        return [f"{leaf.dtype}{list(leaf.shape)}", digest([leaf]) if leaf.layout == torch.strided else str(leaf.layout)]
    return [type(leaf).__qualname__, repr(leaf) if isinstance(leaf, PLAIN) else ""]


def _product_with_fixed_vector(space: Space, product: Product) -> list[float]:
    """``[|H w|, <u, H w>]`` for vectors u and w that are always the same."""
    draw = torch.Generator().manual_seed(0)
    w, u = (torch.randn(space.dim, generator=draw, dtype=torch.float64).split(space.sizes) for _ in range(2))
    like = list(zip(space.shapes, space.dtypes, space.devices, strict=True))
    Hw = product(
        {i: part.reshape(shape).to(device, dtype) for i, (part, (shape, dtype, device)) in enumerate(zip(w, like, strict=True))}
    )
    flat = [t.detach().reshape(-1).double().cpu() for t in Hw]
    squared, inner = (sum(float(a @ b) for a, b in zip(flat, other, strict=True)) for other in (flat, u))
    return [math.sqrt(squared), inner]


# ---------------------------------------------------------------------------------------------------- the file


class Record:
    """The finished rows of one call, read from a file and added to it.

    Args:
        path: the file; it need not exist yet.
        said: what :func:`said_of_call` says of the call.
        space: the coordinates that rows are counted in.
        product: v -> H v, by which the function is known again.
        in_place: what ``out`` holds of the given rows, or columns; without it the rows are the caller's.

    Attributes:
        done: (n,) which rows are finished.
        by_columns: whether they were computed as columns; ``None`` where there are none.

    Raises:
        ValueError: the file is no record, or that of another call.
        OSError: it cannot be read, or, in :meth:`open`, another call adds to it, or did since it was read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        said: Mapping[str, Any],
        space: Space,
        product: Product,
        in_place: InPlace | None = None,
    ) -> None:
        self.path, self.said, self.space, self.product, self.in_place = os.fspath(path), dict(said), space, product, in_place
        self.done = np.zeros(space.dim, dtype=bool)
        self.by_columns: bool | None = None
        self.descriptor, self.synced, self.length = -1, -math.inf, 0
        with self._named_errors():
            text = self._read()
        self.is_new = text == b""
        if not self.is_new:
            first, *others = text.split(b"\n")
            self._require_same_call(first)
            for entry in filter(None, map(_entry, others)):
                self._take_up(entry)

    @property
    def verb(self) -> str:
        return self.said["verb"]

    def _read(self) -> bytes:
        """The file, empty where there is none or only the beginning of a first line."""
        try:
            with open(self.path, "rb") as file:
                text = file.read()
        except FileNotFoundError:
            return b""
        self.length = len(text)
        torn = b"\n" not in text and (BEGINNING.startswith(text) or text.startswith(BEGINNING)) and _entry(text) is None
        return b"" if torn else text

    def _require_same_call(self, first: bytes) -> None:
        header = _entry(first)
        if header is None or not first.startswith(BEGINNING):
            what = "the first line of a record is damaged" if first.startswith(BEGINNING) else "it is no record of finished rows"
            raise ValueError(f"{self.verb}: resume={self.path!r} cannot be taken up: {what}. {_CURE}")
        told = _differences(self.said, header) or _differences_of_products(self._product(), header["product"], self.space)
        if told:
            more = f" and {len(told) - TOLD} more" if len(told) > TOLD else ""
            raise ValueError(
                f"{self.verb}: resume={self.path!r} is the record of another call: {'; '.join(told[:TOLD])}{more}. {_CURE}"
            )

    def _take_up(self, entry: dict[str, Any]) -> None:
        """The rows of a line are finished, if they stand in ``out``."""
        runs, by_columns = [range(*run) for run in entry["rows"]], entry["by_columns"]
        if self.by_columns not in (None, by_columns) or self._digest(runs, by_columns) != entry["digest"]:
            return
        self.by_columns = by_columns
        for run in runs:
            self.done[run.start : run.stop] = True

    def _product(self) -> list[float]:
        return _product_with_fixed_vector(self.space, self.product)

    def missing(self, leaf: int) -> list[Piece]:
        """The rows of a leaf that are not finished."""
        first = self.space.offsets[leaf]
        return [Piece(leaf, range(run.start, run.stop)) for run in runs_of(~self.done[first : first + self.space.sizes[leaf]])]

    def _digest(self, runs: Sequence[range], by_columns: bool) -> str:
        if self.in_place is None:
            return ""
        return digest(self.in_place([piece for run in runs for piece in self.space.pieces(run)], by_columns))

    # ------------------------------------------------------------------------------------------------ writing

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """The file is open for :meth:`add` inside, and no other call's; a new one gets its first line."""
        with self._named_errors():
            self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if not _locked(self.descriptor) or os.fstat(self.descriptor).st_size != self.length:
                raise BlockingIOError(
                    f"{self.verb}: resume={self.path!r} is in use by another call, of this process or another. Call again when "
                    "that has ended (an iterator over rows ends by .close()), or pass another path."
                )
            if self.is_new:
                os.ftruncate(self.descriptor, 0)
                self._write({**self.said, "product": self._product()}, before=b"")
            yield
        finally:
            with contextlib.suppress(OSError):
                os.fsync(self.descriptor)
            os.close(self.descriptor)

    def add(self, rows: Sequence[int], by_columns: bool) -> None:
        """Rows are finished, and written where they belong."""
        mask = np.zeros(self.space.dim, dtype=bool)
        mask[rows] = True
        runs = runs_of(mask)
        stand = self._digest(runs, by_columns)
        self._write({"rows": [[run.start, run.stop] for run in runs], "by_columns": by_columns, "digest": stand})
        self.done |= mask
        if time.monotonic() - self.synced > SECONDS_UNTIL_SYNCED:
            with self._named_errors():
                os.fsync(self.descriptor)
            self.synced = time.monotonic()

    def _write(self, entry: dict[str, Any], before: bytes = b"\n") -> None:
        """One line by one call of the system, so that a killed process leaves it whole or not at all."""
        text = json.dumps(entry).encode()
        with self._named_errors():
            os.write(self.descriptor, before + text + b" %08x" % zlib.crc32(text))

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.verb}: resume={self.path!r} cannot be read and written ({error.strerror}). Pass the path of a file "
                "that is there or can be made."
            ) from error


def _locked(descriptor: int) -> bool:
    """Whether the file is locked for this call now; as good where nothing can be locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


_CURE = "Pass another path, or delete the file to begin anew."


def _entry(line: bytes) -> dict[str, Any] | None:
    """What a line says; nothing if its checksum does not fit."""
    text, _, check = line.rpartition(b" ")
    if check != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def runs_of(mask: np.ndarray) -> list[range]:
    """The runs of entries that are set, in order.

    Example:
        >>> runs_of(np.array([True, True, False, True]))
        [range(0, 2), range(3, 4)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [range(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """What is said of two calls in another way."""
    told = [f"{key} is {now[key]}, was {then.get(key)}" for key in now if key != "arguments" and now[key] != then.get(key)]
    mine, theirs = now["arguments"], then.get("arguments", {})
    for name in dict.fromkeys((*mine, *theirs)):
        (kind, value), (other_kind, other) = mine.get(name, ("absent", "")), theirs.get(name, ("absent", ""))
        if kind != other_kind:
            told.append(f"{name} is {kind}, was {other_kind}")
        elif value != other:
            told.append(f"{name} has other numbers" if "[" in kind else f"{name} is {value}, was {other}")
    return told


def _differences_of_products(now: Sequence[float], then: Sequence[float], space: Space) -> list[str]:
    """Products that differ by more than rounding on another machine; half the digits must agree."""
    within = max(math.sqrt(torch.finfo(dtype).eps) for dtype in space.dtypes) * max(now[0], then[0])
    same = all(a == b or abs(a - b) <= within or (math.isnan(a) and math.isnan(b)) for a, b in zip(now, then, strict=True))
    return [] if same else ["f is another function or draws other numbers, for its Hessian times a fixed vector has changed"]
