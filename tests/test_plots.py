"""Pictures: what is drawn is what was given, on the axis that was given, and nothing else changes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from functional_hess.plots import block_norms, heat_map, pooled, spectrum
from functional_hess.tree import Space

SPACE = Space.of({"w": torch.zeros(2, 3), "b": torch.zeros(2), "empty": torch.zeros(0), "name": "model"})


def drawn(ax):
    """Everything is laid out and drawn once."""
    FigureCanvasAgg(ax.figure).draw()


def symmetric(n, rng):
    A = torch.as_tensor(rng.standard_normal((n, n)))
    return A + A.T


def texts(ax):
    return [text.get_text() for text in ax.texts]


# The matrix reduced to pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "pixels"), [(7, 7), (7, 3), (64, 10), (10, 64), (101, 1)])
def test_pooled_pixel_is_the_entry_of_largest_magnitude(rng, n, pixels):
    H = symmetric(n, rng)
    got, k = pooled(H, pixels), -(-n // pixels)
    assert max(got.shape) <= pixels
    for i in range(got.shape[0]):
        for j in range(got.shape[1]):
            part = H[i * k : (i + 1) * k, j * k : (j + 1) * k].flatten()
            assert got[i, j] == part[part.abs().argmax()]


def test_pooled_keeps_the_single_outlier():
    H = torch.zeros(1000, 1000)
    H[123, 456] = -5.0
    assert pooled(H, 100).min() == -5.0 and int(pooled(H, 100).count_nonzero()) == 1


# The heat map ---------------------------------------------------------------------------------------------------------


def test_heat_map_draws_the_matrix_and_marks_the_blocks(rng):
    ax, H = Figure().subplots(), symmetric(8, rng)
    assert heat_map(ax, H, SPACE) is ax
    drawn(ax)
    assert torch.equal(torch.as_tensor(ax.images[0].get_array().data), H)
    horizontal = {float(line.get_ydata()[0]) for line in ax.get_lines() if len(set(line.get_ydata())) == 1}
    assert horizontal == {2.0}
    assert sorted(set(texts(ax))) == ["b", "w"]


def test_heat_map_colors_are_symmetric_about_zero(rng):
    ax = heat_map(Figure().subplots(), symmetric(8, rng).abs(), SPACE)
    norm = ax.images[0].norm
    assert norm.vmin == -norm.vmax and norm(0.0) == pytest.approx(0.5)


def test_heat_map_of_a_large_matrix_is_reduced(rng):
    space = Space.of((torch.zeros(300), torch.zeros(700)))
    ax = heat_map(Figure().subplots(), symmetric(1000, rng), space, pixels=250)
    drawn(ax)
    assert ax.images[0].get_array().shape == (250, 250)
    assert "4 x 4" in ax.get_title()


@pytest.mark.parametrize("H", [torch.zeros(8, 8), torch.eye(8) * 1e-30, torch.eye(8, dtype=torch.float32) * 1e30])
def test_heat_map_of_extreme_matrices_is_drawn(H):
    drawn(heat_map(Figure().subplots(), H, SPACE))


def test_heat_map_labels_do_not_overlap():
    space = Space.of([torch.zeros(1) for _ in range(15)] + [torch.zeros(985)])
    ax = heat_map(Figure(figsize=(7, 6)).subplots(), torch.eye(1000), space)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    # The text alone: an annotation's own window extent includes its line.
    boxes = [super(type(t), t).get_window_extent(renderer) for t in ax.texts if t.get_rotation() == 0]
    heights = sorted((box.y0, box.y1) for box in boxes)
    assert len(boxes) == 16
    assert all(above[0] >= below[1] - 1 for below, above in itertools.pairwise(heights))


def test_heat_map_refuses_a_matrix_of_another_space():
    with pytest.raises(ValueError, match=r"H must have shape \(8, 8\), got \(3, 3\)"):
        heat_map(Figure().subplots(), torch.eye(3), SPACE)


# Norms of blocks ------------------------------------------------------------------------------------------------------


def test_block_norms_writes_each_norm_into_its_block():
    space = Space.of({"a": torch.zeros(2), "b": torch.zeros(1)})
    ax = block_norms(Figure().subplots(), torch.tensor([[3.0, 0.5], [0.5, 0.0]]), space)
    drawn(ax)
    assert texts(ax) == ["3", "0.5", "0.5", "0"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]


def test_block_norms_of_zero_and_of_many_leaves_are_drawn():
    drawn(block_norms(Figure().subplots(), torch.zeros(1, 1), Space.of(torch.zeros(2))))
    many = Space.of([torch.zeros(1)] * 40)
    ax = block_norms(Figure().subplots(), torch.ones(40, 40), many)
    assert texts(ax) == []
    drawn(ax)


def test_block_norms_refuses_another_shape():
    with pytest.raises(ValueError, match=r"norms must have shape \(3, 3\), got \(2, 2\)"):
        block_norms(Figure().subplots(), torch.eye(2), SPACE)


# The spectrum ---------------------------------------------------------------------------------------------------------


def test_spectrum_tells_negative_zero_and_positive_apart():
    ax = spectrum(Figure().subplots(), torch.tensor([1e-3, 5.0, -2.0, 0.0, -1e-4], dtype=torch.float64))
    drawn(ax)
    parts = {line.get_label().split(",")[0].split(" (")[0]: line for line in ax.get_lines() if "_" not in line.get_label()[:1]}
    assert {name: line.get_ydata().tolist() for name, line in parts.items()} == {
        "2 positive": [5.0, 1e-3],
        "1 zero": [0.0],
        "2 negative": [-1e-4, -2.0],
    }
    assert [line.get_xdata().tolist() for line in parts.values()] == [[1, 2], [3], [4, 5]]
    assert len({line.get_color() for line in parts.values()}) == 3
    assert ax.get_yscale() == "symlog"


def test_spectrum_counts_as_zero_what_it_is_told():
    ax = spectrum(Figure().subplots(), torch.tensor([1.0, 1e-3, -1e-3]), zero=1e-2)
    assert [line.get_label() for line in ax.get_lines()][:2] == ["1 positive, largest 1", "2 zero (at most 0.01)"]


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [-3.0], [1e-20, 1e20], [-1e20, -1e-20], [1.0] * 5])
def test_spectrum_of_extreme_values_is_drawn(values):
    ax = spectrum(Figure().subplots(), torch.tensor(values, dtype=torch.float64))
    drawn(ax)
    low, high = ax.get_ylim()
    assert low < min(0.0, *values) and max(0.0, *values) < high


@pytest.mark.parametrize("values", [torch.ones(2, 2), torch.ones(0)])
def test_spectrum_refuses_what_is_no_vector(values):
    with pytest.raises(ValueError, match=r"eigenvalues must have shape \(n,\)"):
        spectrum(Figure().subplots(), values)


# The world around -----------------------------------------------------------------------------------------------------


def test_a_missing_matplotlib_is_named_with_its_command(monkeypatch):
    ax = Figure().subplots()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: heat_map(ax, torch.eye(8), SPACE), lambda: spectrum(ax, torch.ones(2))):
        with pytest.raises(ImportError, match=r"pip install 'functional_hess\[plot\]'"):
            draw()


def test_drawing_touches_no_pyplot():
    program = (
        "import io, sys, torch\n"
        "import functional_hess.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from matplotlib.figure import Figure\n"
        "from functional_hess.tree import Space\n"
        "left, right = Figure().subplots(1, 2)\n"
        "plots.heat_map(left, torch.eye(2), Space.of(torch.zeros(2)))\n"
        "plots.spectrum(right, torch.ones(2))\n"
        "left.figure.savefig(io.BytesIO())\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
