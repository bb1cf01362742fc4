"""Where the pattern and the coloring of a plan come from: from the user, in many forms, or from a file.

A pattern is whatever tells where a matrix may differ from zero, a coloring what is multiplied together
(:mod:`functional_hess.coloring`); here they are brought into one form, and refused by name where they do not fit. A file holds
both, and a header that says of what, as plain arrays: nothing in it can run when it is read, and a sum over it tells damage.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_hess.coloring import (
    Coloring,
    bidirectional_coloring,
    column_coloring,
    recovery,
    row_coloring,
    star_coloring,
)
from functional_hess.patterns import SparsityPattern, banded

__all__ = ["given_coloring", "given_pattern", "read_structure", "write_structure"]

NAMED_PATTERNS: dict[str, Callable[[int], SparsityPattern]] = {"diagonal": banded(0), "tridiagonal": banded(1)}
COLORINGS: dict[str, Callable[[SparsityPattern], Coloring]] = {
    "column": column_coloring,
    "row": row_coloring,
    "bidirectional": bidirectional_coloring,
}
MANY_COLORS = 16  # of a Jacobian, from which on rows and columns are tried together
FORMAT = "functional_hess plan 1"
ARRAYS: tuple[str, ...] = ("indptr", "indices", "columns", "rows")


# ---------------------------------------------------------------------------------------------------- from the user


def given_pattern(verb: str, pattern: Any, shape: tuple[int, int], *, symmetric: bool) -> SparsityPattern:
    """Whatever a user may call a pattern, as one of the shape of the matrix.

    Raises:
        ValueError: it has another shape, or is not symmetric where it must be.
        TypeError: it is no pattern.
    """
    found = pattern
    if isinstance(pattern, str):
        if pattern not in NAMED_PATTERNS:
            names = ", ".join(map(repr, NAMED_PATTERNS))
            raise ValueError(f"{verb}: pattern must be one of {names}, a matrix, banded(r) or blocks(sizes), got {pattern!r}.")
        found = NAMED_PATTERNS[pattern]
    if callable(found):
        found = found(shape[1])
    if isinstance(found, Tensor):
        found = _pattern_of_tensor(found)
    elif not isinstance(found, SparsityPattern):
        try:
            found = SparsityPattern.of_matrix(found)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{verb}: pattern must be a scipy matrix, a tensor, 'tridiagonal', banded(r), blocks(sizes) or a "
                f"SparsityPattern, got {type(pattern).__name__}."
            ) from error
    if found.shape != shape:
        raise ValueError(f"{verb}: pattern must have shape {shape}, got {found.shape}.")
    if symmetric and not found.is_symmetric:
        raise ValueError(f"{verb}: pattern must be symmetric. Pass p | p.transpose of p = SparsityPattern.of_matrix(pattern).")
    return found


def _pattern_of_tensor(t: Tensor) -> SparsityPattern:
    if t.layout == torch.strided:
        return SparsityPattern.of_matrix(t.detach().cpu().numpy())
    entries = t.detach().to_sparse_coo().coalesce().indices().cpu().numpy()
    return SparsityPattern.of_entries(entries[0], entries[1], tuple(t.shape))  # type: ignore[arg-type]


def given_coloring(verb: str, pattern: SparsityPattern, coloring: str | Coloring | None, *, symmetric: bool) -> Coloring:
    """The coloring that was given, or named, or the one with fewest products, for a pattern.

    Raises:
        ValueError: it is of another kind, or does not belong to the pattern.
    """
    kinds = ("star",) if symmetric else tuple(COLORINGS)
    if coloring is None:
        return star_coloring(pattern) if symmetric else _fewest(pattern)
    if isinstance(coloring, str) and coloring in kinds:
        return star_coloring(pattern) if coloring == "star" else COLORINGS[coloring](pattern)
    if not (isinstance(coloring, Coloring) and coloring.kind in kinds):
        names = ", ".join(map(repr, kinds))
        got = repr(coloring) if isinstance(coloring, (str, Coloring)) else type(coloring).__name__
        raise ValueError(f"{verb}: coloring must be a Coloring of kind {names}, or that name, got {got}.")
    m, n = pattern.shape
    if len(coloring.columns) not in (0, n) or len(coloring.rows) not in (0, m) or not len(coloring.columns) + len(coloring.rows):
        raise ValueError(
            f"{verb}: coloring must have {n} columns or {m} rows, got {len(coloring.columns)} columns and "
            f"{len(coloring.rows)} rows."
        )
    recovery(pattern, coloring)
    return coloring


def _fewest(pattern: SparsityPattern) -> Coloring:
    """Columns or rows, whichever takes fewer products; both together where that is many."""
    found = min(column_coloring(pattern), row_coloring(pattern), key=lambda coloring: coloring.count)
    if found.count <= MANY_COLORS:
        return found
    return min(found, bidirectional_coloring(pattern), key=lambda coloring: coloring.count)


# ---------------------------------------------------------------------------------------------------- files


def write_structure(path: str | Path, pattern: SparsityPattern, coloring: Coloring, header: dict[str, Any]) -> None:
    """A zip of plain arrays: the pattern, the coloring, a header of texts and numbers, and a sum over all of them."""
    arrays = dict(zip(ARRAYS, (pattern.indptr, pattern.indices, coloring.columns, coloring.rows), strict=True))
    text = json.dumps({"format": FORMAT, "shape": pattern.shape, "kind": coloring.kind, **header}, sort_keys=True)
    with open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, header=np.array(text), digest=np.array(_digest(text, arrays)), **arrays)


def read_structure(verb: str, path: str | Path) -> tuple[SparsityPattern, Coloring, dict[str, Any]]:
    """What :func:`write_structure` wrote.

    Raises:
        ValueError: the file is something else, is damaged, or its coloring does not belong to its pattern.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
            text, digest = str(file["header"]), str(file["digest"])
        header = json.loads(text)
        known = header["format"] == FORMAT
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{verb}: {path} is no plan: it must be a file that plan.save wrote ({error}).") from error
    if not known or digest != _digest(text, arrays):
        told = "is damaged: its contents and their sum differ" if known else f"is of another version, {header['format']!r}"
        raise ValueError(f"{verb}: {path} {told}. Make the plan anew.")
    indptr, indices, columns, rows = (arrays[name] for name in ARRAYS)
    m, n = header["shape"]
    pattern, coloring = SparsityPattern((m, n), indptr, indices), Coloring(header["kind"], columns, rows)
    recovery(pattern, coloring)
    return pattern, coloring, header


def _digest(text: str, arrays: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256(text.encode())
    for name in ARRAYS:
        total.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()
