"""Pictures of a Hessian, each a function that takes an axis.

Every function here draws on the matplotlib axis that it is given and returns it; making figures, saving and showing them is
the caller's, and pyplot is never touched, so that no global state changes. Values span many decades and have a sign, hence one
scale everywhere: linear up to a threshold t, logarithmic beyond,

    s(v) = sign(v) log10(|v| / t) for |v| > t,

blue below zero and red above. A matrix larger than the picture is reduced first: a pixel shows the entry of largest magnitude
among those it covers, with its sign, so that no outlier is lost.

matplotlib is the extra ``plot``; it is imported when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functional_hess.tree import Space

__all__ = ["block_norms", "heat_map", "pooled", "spectrum"]

Axes = Any  # matplotlib.axes.Axes
PIXELS = 800
MOST_LABELS = 20
DECADES = 5
NEGATIVE, ZERO, POSITIVE = "#2166ac", "#8c8c8c", "#b2182b"


def _matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots: pictures need matplotlib: pip install 'functional_hess[plot]'.") from error


# ---------------------------------------------------------------------------------------------------- the matrix by blocks


def heat_map(ax: Axes, H: Tensor, space: Space, *, pixels: int = PIXELS) -> Axes:
    """Every entry of H as a color, with the blocks of ``space`` marked and named.

    Args:
        ax: a matplotlib axis; a color bar takes a part of its room.
        H: an (n, n) matrix in the coordinates of ``space``.
        space: whose leaves are the blocks.
        pixels: a larger matrix is reduced to at most this many pixels a side, see :func:`pooled`.

    Raises:
        ValueError: H has another shape.
        ImportError: matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> space = Space.of({"b": torch.zeros(1), "w": torch.zeros(2)})
        >>> ax = heat_map(Figure().subplots(), torch.eye(3), space)
        >>> [label.get_text() for label in ax.texts]
        ['b', 'b', 'w', 'w']
    """
    _matplotlib()
    n = space.dim
    if tuple(H.shape) != (n, n):
        raise ValueError(f"heat_map: H must have shape ({n}, {n}), got {tuple(H.shape)}.")
    image = pooled(H, pixels)
    norm = _color_scale(float(image.abs().max()) if image.numel() else 0.0)
    drawn = ax.imshow(image.numpy(), norm=norm, cmap="RdBu_r", extent=(0, n, n, 0), interpolation="nearest", aspect="equal")
    for edge in space.offsets[1:]:
        ax.axhline(edge, color="black", linewidth=0.8)
        ax.axvline(edge, color="black", linewidth=0.8)
    ax.set_xticks([])
    ax.set_yticks([])
    _label_blocks(ax, space)
    k = max(1, math.ceil(n / pixels))
    reduced = "" if k == 1 else f"; a pixel is the largest of {k} x {k} entries"
    ax.set_title(f"Entries of the {n:,} x {n:,} Hessian\n(symmetric logarithmic colors{reduced})", fontsize=10)
    bar = ax.figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03)
    _ticks_of(bar, norm)
    bar.set_label("second derivative (white: 0)")
    return ax


def pooled(H: Tensor, pixels: int = PIXELS) -> Tensor:
    """H reduced to at most ``pixels`` a side: of the entries a pixel covers, the one of largest magnitude, with its sign.

    Example:
        >>> pooled(torch.tensor([[1.0, -3.0, 0.0], [2.0, 0.5, 0.0], [0.0, 0.0, 4.0]]), pixels=2)
        tensor([[-3.,  0.],
                [ 0.,  4.]], dtype=torch.float64)
    """
    k = max(1, math.ceil(max(H.shape) / pixels))
    H = H.detach()
    if k == 1:
        return H.cpu().double()
    return torch.stack([_extreme(rows, k) for rows in H.split(k)]).cpu().double()


def _extreme(rows: Tensor, k: int) -> Tensor:
    """Of every k columns of ``rows``, the entry of largest magnitude."""
    columns = -(-rows.shape[1] // k)
    padding = (0, columns * k - rows.shape[1])
    highest = torch.nn.functional.pad(rows.amax(0), padding).view(columns, k).amax(1)
    lowest = torch.nn.functional.pad(rows.amin(0), padding).view(columns, k).amin(1)
    return torch.where(highest >= -lowest, highest, lowest)


def _color_scale(largest: float) -> Any:
    from matplotlib.colors import SymLogNorm

    top = 10.0 ** math.ceil(math.log10(largest)) if largest > 0 else 1.0
    return SymLogNorm(linthresh=top / 10**DECADES, linscale=0.5, vmin=-top, vmax=top, base=10)


def _ticks_of(bar: Any, norm: Any) -> None:
    powers = [norm.vmax / 10**k for k in range(DECADES + 1)]
    ticks = [-p for p in powers] + [0.0] + powers[::-1]
    bar.set_ticks(ticks, labels=[_power(t) for t in ticks])
    bar.minorticks_off()


def _power(value: float) -> str:
    if value == 0:
        return "0"
    return rf"${'-' if value < 0 else ''}10^{{{round(math.log10(abs(value)))}}}$"


def _label_blocks(ax: Axes, space: Space) -> None:
    """Paths beside the blocks; where blocks are too thin for that, labels move apart and a thin line leads to each."""
    leaves = sorted(sorted((k for k in space.leaves if space.sizes[k]), key=lambda k: -space.sizes[k])[:MOST_LABELS])
    n = space.dim
    centers = [space.offsets[k] + space.sizes[k] / 2 for k in leaves]
    for k, center, place in zip(leaves, centers, _apart(centers, 0.038 * n, n), strict=True):
        name = space.paths[k] or "x"
        _lead(ax, name, (0, center), (-0.05 * n, place), (1, 0.5), ha="right", va="center")
        _lead(ax, name, (center, n), (place, 1.05 * n), (0.5, 1), ha="center", va="top", rotation=90)


def _lead(
    ax: Axes, name: str, tip: tuple[float, float], place: tuple[float, float], end: tuple[float, float], **how: Any
) -> None:
    """Text at ``place`` with a line from ``end``, in units of the text's box, to ``tip``."""
    line = {"arrowstyle": "-", "linewidth": 0.6, "color": "0.3", "shrinkA": 0, "shrinkB": 0, "relpos": end}
    ax.annotate(name, tip, place, fontsize=8, arrowprops=line, annotation_clip=False, **how)


def _apart(centers: Sequence[float], gap: float, n: float) -> list[float]:
    """Places near ``centers``, in the same order and at least ``gap`` apart: pushed down, then back up from the end."""
    places: list[float] = []
    for center in centers:
        places.append(max(center, places[-1] + gap) if places else center)
    end = n
    for k in reversed(range(len(places))):
        places[k] = min(places[k], end)
        end = places[k] - gap
    return places


# ---------------------------------------------------------------------------------------------------- norms of blocks


def block_norms(ax: Axes, norms: Tensor, space: Space) -> Axes:
    """The norm of every block as a number on a color, all blocks the same size.

    Args:
        ax: a matplotlib axis.
        norms: (L, L) for the L leaves of ``space``, not negative.
        space: whose paths name the rows and columns.

    Raises:
        ValueError: ``norms`` has another shape.
        ImportError: matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> space = Space.of({"b": torch.zeros(1), "w": torch.zeros(2)})
        >>> ax = block_norms(Figure().subplots(), torch.tensor([[2.0, 0.0], [0.0, 0.5]]), space)
        >>> [number.get_text() for number in ax.texts]
        ['2', '0', '0', '0.5']
    """
    _matplotlib()
    from matplotlib.colors import LogNorm

    count = len(space.leaves)
    if tuple(norms.shape) != (count, count):
        raise ValueError(f"block_norms: norms must have shape ({count}, {count}), got {tuple(norms.shape)}.")
    values = norms.detach().cpu().double()
    top = float(values.max()) if count and float(values.max()) > 0 else 1.0
    least = float(values[values > 0].min()) if count and float(values.max()) > 0 else 0.0
    norm = LogNorm(vmin=max(top / 10**DECADES, min(least, top / 10)), vmax=top, clip=True)
    drawn = ax.imshow(values.clamp(min=norm.vmin).numpy(), norm=norm, cmap="Reds", aspect="equal")
    names = [path or "x" for path in space.paths]
    ax.set_xticks(range(count), labels=names, rotation=90, fontsize=8)
    ax.set_yticks(range(count), labels=names, fontsize=8)
    if count <= MOST_LABELS // 2:
        for p in range(count):
            for q in range(count):
                dark = float(norm(float(values[p, q]))) > 0.6
                text = f"{float(values[p, q]):.2g}"
                ax.text(q, p, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ax.set_title("Frobenius norm of each block\n(logarithmic colors)", fontsize=10)
    ax.figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03, label="norm of the block")
    return ax


# ---------------------------------------------------------------------------------------------------- eigenvalues


def spectrum(ax: Axes, eigenvalues: Tensor, *, zero: float | None = None) -> Axes:
    """Eigenvalues from the largest to the smallest, on a symmetric logarithmic axis; negative ones stand out.

    Args:
        ax: a matplotlib axis.
        eigenvalues: shape (n,), in any order.
        zero: what is at most this in magnitude counts as zero; by default n eps times the largest magnitude, the
            rounding error of a dense eigenvalue solver.

    Raises:
        ValueError: ``eigenvalues`` is not a vector of at least one number.
        ImportError: matplotlib is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = spectrum(Figure().subplots(), torch.tensor([4.0, -1.0, 0.0]))
        >>> [line.get_label() for line in ax.get_lines() if not line.get_label().startswith("_")]
        ['1 positive, largest 4', '1 zero (at most 1.4e-06)', '1 negative, smallest -1']
    """
    _matplotlib()
    if eigenvalues.dim() != 1 or not len(eigenvalues):
        raise ValueError(f"spectrum: eigenvalues must have shape (n,) with n > 0, got {tuple(eigenvalues.shape)}.")
    n = len(eigenvalues)
    values = eigenvalues.detach().cpu().double().sort(descending=True).values
    largest = float(values.abs().max())
    zero = n * torch.finfo(eigenvalues.dtype).eps * largest if zero is None else zero
    rank = torch.arange(1, n + 1)
    parts = (
        (values > zero, POSITIVE, "o", lambda part: f"{len(part):,} positive, largest {float(part[0]):.4g}"),
        (values.abs() <= zero, ZERO, "x", lambda part: f"{len(part):,} zero (at most {zero:.2g})"),
        (values < -zero, NEGATIVE, "v", lambda part: f"{len(part):,} negative, smallest {float(part[-1]):.4g}"),
    )
    size = min(6.0, max(2.0, 200 / n))
    for chosen, color, marker, label in parts:
        if chosen.any():
            part = values[chosen]
            ax.plot(rank[chosen].numpy(), part.numpy(), marker, color=color, markersize=size, label=label(part))
    below = rank[values < -zero]
    if len(below):
        ax.axvspan(float(below[0]) - 0.5, n + 0.5, color=NEGATIVE, alpha=0.08, linewidth=0)
    threshold = _threshold(values.abs(), zero)
    ax.set_yscale("symlog", linthresh=threshold, linscale=0.5)
    _value_ticks(ax, values, threshold)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.grid(alpha=0.25)
    ax.set_xlim(0.5 - 0.02 * n, n + 0.5 + 0.02 * n)
    ax.set_xlabel("rank, from the largest eigenvalue to the smallest")
    ax.set_ylabel(f"eigenvalue (logarithmic beyond ±{threshold:.0e})")
    ax.set_title(f"Spectrum of the Hessian: {n:,} eigenvalues", fontsize=11)
    ax.legend(loc="upper right", fontsize=9)
    return ax


def _threshold(magnitudes: Tensor, zero: float) -> float:
    """The power of ten below nearly all magnitudes that are not zero, but at most ten decades below the largest."""
    largest = float(magnitudes.max())
    present = magnitudes[magnitudes > max(zero, 1e-10 * largest)]
    if not len(present):
        return 1.0
    return 10.0 ** math.floor(math.log10(float(present.sort().values[len(present) // 50])))


def _value_ticks(ax: Axes, values: Tensor, threshold: float) -> None:
    """Powers of ten on both sides of zero, at most about a dozen."""

    def powers(largest: float) -> list[float]:
        low = round(math.log10(threshold))
        high = max(low, math.floor(math.log10(largest))) if largest > 0 else low - 1
        return [10.0**k for k in range(low, high + 1, 1 + max(0, high - low) // 8)]

    highest, lowest = float(values.max()), float(values.min())
    ticks = [-p for p in reversed(powers(-lowest))] + [0.0] + powers(highest)
    ax.set_yticks(ticks, labels=[_power(t) for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(min(2 * lowest, -0.6 * threshold), max(2 * highest, 0.6 * threshold))
