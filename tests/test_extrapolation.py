"""Products by differences are as right as they say, say so where it can be seen, and warn where they are not."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import network, numbers
from oracles import relative_error
from sweep import cases
from sweep.judge import compare, truth_of
from sweep.problems import problem_of
from torch import Tensor, nn

import functional_hess as fh
from functional_hess import levels
from functional_hess.extrapolation import ByDifferences, _constant_part, _extrapolated

DIFFERENCE = "finite-difference"
X = numbers(6)
RANDOM = numbers(6, seed=1)
FIRST = torch.eye(6, dtype=torch.float64)[0]


# The estimate is honest -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
    """A function at X; some take X as a constant besides, so that something happens near it."""

    f: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float64
    relative: float = 1e-8  # the estimate may be that large, at most, relative to the product
    exact: Callable[[Tensor], Tensor] | None = None  # the same in float64, where f does not take it


def product_by_double_backward(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(z), z, create_graph=True)
    if not g.requires_grad:
        return torch.zeros_like(x)
    (product,) = torch.autograd.grad(g, z, v, materialize_grads=True)
    return product


def near(shift: float) -> Callable[[Tensor], Tensor]:
    """x + shift - X."""
    return lambda x: x - X.to(x.dtype) + shift


def layered(x: Tensor) -> Tensor:
    return (F.layer_norm(torch.tanh(x.outer(x)), (6,)) ** 4).sum()


def eigen(x: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(x.outer(x) + torch.diag(torch.arange(6.0, dtype=x.dtype))).exp().sum().log()


def single(f: Callable[[Tensor], Tensor]) -> Trial:
    return Trial(f, torch.float32, 1e-5)


def only_single(f: Callable[[Tensor], Tensor]) -> Trial:
    """f, made to take float32 alone."""

    def narrow(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 alone")
        return f(x)

    return Trial(narrow, torch.float32, 1e-3, exact=f)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


TRIALS: dict[str, Trial] = {
    "quartic": Trial(lambda x: (x**4).sum()),
    "quadratic": Trial(lambda x: x.outer(x).sum() + (x**2).sum()),
    "exponential": Trial(lambda x: x.exp().sum() * x[0]),
    "rosenbrock": Trial(rosenbrock),
    "product": Trial(lambda x: x.prod() + x.cos().sum()),
    "softmax": Trial(lambda x: (x.softmax(0) ** 2).sum()),
    "logsumexp": Trial(lambda x: (3 * x).logsumexp(0)),
    "log": Trial(lambda x: (x**2 + 1e-2).log().sum()),
    "reciprocal": Trial(lambda x: (1 / (x**2 + 1e-3)).sum()),
    "layer norm": Trial(layered),
    "eigenvalues": Trial(eigen),
    "above a large constant": Trial(lambda x: 1e8 + (x**3).sum()),
    "with a large slope": Trial(lambda x: (1e4 * x).sum() + (x**3).sum()),
    "with a small curvature": Trial(lambda x: x.sum() + 1e-3 * (x**3).sum()),
    "of wavelength 1/2": Trial(lambda x: (12 * x).sin().sum()),
    "of wavelength 1/20": Trial(lambda x: (120 * x).sin().sum()),
    "of wavelength 1/2000": Trial(lambda x: (12000 * x).sin().sum()),
    "two wavelengths": Trial(lambda x: x.sin().sum() + 1e-4 * (1000 * x).sin().sum(), relative=1e-6),
    "stiff": Trial(lambda x: (torch.logspace(0, 6, 6, dtype=x.dtype) * x**2).sum() + x.cos().prod(), relative=1e-6),
    "stiff and curved": Trial(lambda x: (torch.logspace(0, 3, 6, dtype=x.dtype) * x).sin().sum()),
    "a steep step": Trial(lambda x: torch.sigmoid(50 * x).sum()),
    "a narrow peak": Trial(lambda x: torch.exp(-1e4 * near(-0.003)(x) ** 2).sum()),
    "an end of the domain nearby": Trial(lambda x: near(1e-3)(x).log().sum()),
    "a root nearby": Trial(lambda x: near(1e-2)(x).sqrt().sum()),
    "a kink nearby": Trial(lambda x: (F.relu(near(1e-3)(x)) ** 2).sum()),
    "a kink very near": Trial(lambda x: (F.relu(near(1e-5)(x)) ** 2).sum() + (x**3).sum()),
    "float32": single(lambda x: (x.sin() * x.exp()).sum() ** 2),
    "float32, stiff": single(lambda x: (torch.logspace(0, 3, 6) * x).sin().sum()),
    "float32, a kink nearby": single(lambda x: (F.relu(near(1e-3)(x)) ** 2).sum() + (x**3).sum()),
    "float32 alone": only_single(lambda x: (x.sin() * x.exp()).sum() ** 2),
    "float32 alone, quartic": only_single(lambda x: (x**4).sum()),
    "float32 inside": Trial(lambda x: (x.float() ** 3).sum().double(), relative=1e-3, exact=lambda x: (x**3).sum()),
    "float16 inside": Trial(lambda x: (x.half() ** 3).sum().double(), relative=1.0, exact=lambda x: (x**3).sum()),
    "bfloat16": Trial(lambda x: (x**3).sum(), torch.bfloat16, 1e-2),
}


def estimated(trial: Trial, v: Tensor) -> tuple[float, ByDifferences]:
    """The true error of a product, and the map that has its estimate."""
    x, v = X.to(trial.dtype), v.to(trial.dtype)
    linear = ByDifferences(lambda x: (trial.f(x), None), (x,), (0,), "hvp")
    (product,) = linear({0: v})
    assert product.dtype == trial.dtype
    truth = product_by_double_backward(trial.exact or trial.f, x.double(), v.double())
    return float((product.double() - truth).abs().max()), linear


@pytest.mark.parametrize("v", [RANDOM, FIRST, 1e-3 * RANDOM], ids=["random", "unit", "short"])
@pytest.mark.parametrize("name", TRIALS)
def test_the_true_error_is_below_ten_times_the_estimate_and_the_estimate_is_no_excuse(name: str, v: Tensor) -> None:
    error, linear = estimated(TRIALS[name], v)
    assert linear.worst is not None
    assert error <= 10 * linear.worst.error
    assert linear.worst.relative <= TRIALS[name].relative


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_staircase_of_rounding_no_vanishing_slope_is_believed(dtype: torch.dtype) -> None:
    """Steps of 1e-5 move no number of half precision: differences are 0 and agree."""
    whole = Trial(lambda x: (x.to(dtype) ** 3).sum().double(), exact=lambda x: (x**3).sum())
    partly = Trial(lambda x: (x[1:] ** 3).sum() + x[0].to(dtype).double() ** 3, exact=lambda x: (x**3).sum())
    trials = (whole, partly) if dtype == torch.float16 else (whole,)  # steps of bfloat16 are wider than those taken
    for trial, v in itertools.product(trials, (RANDOM, FIRST, RANDOM.flip(0))):
        error, linear = estimated(trial, v)
        assert linear.worst is not None
        assert error <= 10 * linear.worst.error and linear.worst.excess(linear.rtol) > 1


def test_three_steps_eliminate_two_powers() -> None:
    """Exactly, so that large steps are as good as small ones: D(h) for g = x^6 at 1, and what a kink leaves."""
    h = torch.tensor([1.0, 1 / 4, 1 / 16], dtype=torch.float64)
    D = ((1 + h) ** 6 - (1 - h) ** 6) / (2 * h)
    _, second = _extrapolated([(d,) for d in D])
    assert abs(float(second[0]) - 6) < 1e-12
    assert abs(float(_constant_part([0.5 + 3 * t + 7 * t**3 for t in h])) - 0.5) < 1e-12


@pytest.mark.filterwarnings("ignore::functional_hess.LowPrecisionWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_is_as_accurate_as_its_dtype_and_no_better_than_it_says(dtype: torch.dtype) -> None:
    f, x, v = TRIALS["rosenbrock"].f, X.to(dtype), RANDOM.to(dtype)
    product = fh.hvp(f, x, v, mode=DIFFERENCE)
    truth = product_by_double_backward(f, x.double(), v.double())
    assert product.dtype == dtype
    assert float((product.double() - truth).abs().max() / truth.abs().max()) < max(torch.finfo(dtype).eps, 1e-12)


def test_float32_is_better_than_by_its_own_derivatives() -> None:
    """The gradient is evaluated in float64, constants that f holds included."""
    wide, narrow = (
        network(
            lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)),
            numbers(20, 3).float(),
            dtype=dtype,
        )
        for dtype in (torch.float64, torch.float32)
    )
    v = {name: numbers(*t.shape, seed=7).float() for name, t in narrow.x.items()}
    x64, v64 = ({name: t.double() for name, t in tree.items()} for tree in (narrow.x, v))
    truth = fh.hvp(wide.f, x64, v64, mode="double-backward")
    by_differences, by_derivatives = (fh.hvp(narrow.f, narrow.x, v, mode=mode) for mode in (DIFFERENCE, "auto"))
    assert relative_error(by_differences, truth) < 6e-8 < relative_error(by_derivatives, truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rectified_networks_whose_kinks_are_all_around_give_no_alarm(dtype: torch.dtype) -> None:
    for seed in range(8):
        narrow, wide = (
            network(
                lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)),
                numbers(200, 6, seed=seed).to(dtype).double(),
                loss=lambda out: out.square().mean(),
                dtype=kind,
            )
            for kind in (dtype, torch.float64)
        )
        v = {name: numbers(*t.shape, seed=seed).to(dtype) for name, t in narrow.x.items()}
        x64, v64 = ({name: t.double() for name, t in tree.items()} for tree in (narrow.x, v))
        truth = fh.hvp(wide.f, x64, v64, mode="double-backward")
        assert relative_error(fh.hvp(narrow.f, narrow.x, v, mode=DIFFERENCE), truth) < max(1e-8, torch.finfo(dtype).eps)


def test_a_function_of_another_precision_is_evaluated_in_its_own() -> None:
    """What it returns in float64 is not its value: it has no say."""
    x = X.float()
    linear = ByDifferences(lambda x: (F.gelu(x).sum() if x.dtype == torch.float32 else x.sum(), None), (x,), (0,), "hvp")
    assert not linear.widened and linear.x[0].dtype == torch.float32


# Where the estimate is heard ------------------------------------------------------------------------------------------


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "square of relu": lambda x: (F.relu(near(0.0)(x)) ** 2).sum() + (x**3).sum(),
    "square of relu, seen from its flat side": lambda x: (F.relu(near(0.0)(x)) ** 2)[0] + x.prod(),
    "x |x|, whose central differences all are 0": lambda x: (near(0.0)(x) * near(0.0)(x).abs()).sum(),
    "an inner loop that stops early": lambda x: root_by_bisection(x),
    "noise": lambda x: (x**3).sum() * (1 + 1e-7 * torch.sin(1e9 * x.detach().sum())),
    "an end of the domain": lambda x: near(0.0)(x).sqrt().sum() + (x**3).sum(),
    "float32 inside": TRIALS["float32 inside"].f,
}


def root_by_bisection(x: Tensor) -> Tensor:
    """sum of z^2 with z^3 + z = x, z known to 1e-5 alone."""
    z = torch.zeros_like(x)
    for _ in range(4):
        z = (z - (z**3 + z - x) / (3 * z**2 + 1)).detach()
    z = (z * 1e5).round() / 1e5
    z = z - (z**3 + z - x) / (3 * z**2 + 1).detach()
    return (z**2).sum()


CALLS: dict[str, Callable[..., Any]] = {
    "hvp": lambda f, x: fh.hvp(f, x, RANDOM, mode=DIFFERENCE),
    "grad_and_hvp": lambda f, x: fh.grad_and_hvp(f, x, RANDOM, mode=DIFFERENCE),
    "hessian": lambda f, x: fh.hessian(f, mode=DIFFERENCE)(x),
    "hessian_rows": lambda f, x: [*fh.hessian_rows(f, mode=DIFFERENCE)(x)],
    "hessian_blocks": lambda f, x: fh.hessian_blocks(f, mode=DIFFERENCE)(x),
    "hessian_diagonal": lambda f, x: fh.hessian_diagonal(f, mode=DIFFERENCE)(x),
    "hessian of two outputs": lambda f, x: fh.hessian(lambda x: torch.stack([x.sum(), f(x)]), mode=DIFFERENCE)(x),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.mark.parametrize("name", KINKS)
def test_a_kink_or_noise_is_warned_of_with_the_remedy(name: str) -> None:
    with pytest.warns(
        fh.FiniteDifferenceWarning, match=r"hvp: mode='finite-difference': .*at x, .*kink at x or is rough.*smooth f"
    ):
        fh.hvp(KINKS[name], X, RANDOM, mode=DIFFERENCE)


@every_call
def test_every_call_warns_once_and_what_is_right_is_no_reason(call: Callable[..., Any]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call(KINKS["square of relu"], X)
    assert {w.category for w in told} == {fh.FiniteDifferenceWarning} and Path(told[0].filename) == Path(__file__)
    assert len(told) == 1 or "two outputs" in str(call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(TRIALS["rosenbrock"].f, X)


def test_the_leaf_of_the_kink_is_named() -> None:
    x = {"smooth": X, "kinked": 2 * X}
    v = {"smooth": RANDOM, "kinked": RANDOM}
    with pytest.warns(fh.FiniteDifferenceWarning, match=r"an estimated error of \S+ at x\['kinked'\], more"):
        fh.hvp(lambda x: (x["smooth"] ** 3).sum() + (F.relu(near(0.0)(x["kinked"] / 2)) ** 2).sum(), x, v, mode=DIFFERENCE)


def test_the_estimate_is_logged_and_explained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="functional_hess"):
        fh.hvp(TRIALS["quartic"].f, X, RANDOM, mode=DIFFERENCE)
    assert any("estimated error" in record.message and "7 gradients so far" in record.message for record in caplog.records)
    plan = fh.explain(fh.hessian(TRIALS["quartic"].f, mode=DIFFERENCE), X)
    assert plan.row_error is not None and plan.row_size is not None and plan.row_error < 1e-11 * plan.row_size
    assert abs(plan.row_size - 12 * float(X[0]) ** 2) < 1e-9
    assert "estimated" in str(plan).splitlines()[-1] and "estimated" not in str(fh.explain(fh.hessian(TRIALS["quartic"].f), X))


def test_random_functions_are_refused_as_such() -> None:
    with pytest.raises(fh.RandomnessError):
        fh.hvp(lambda x: F.dropout(x**3, 0.5).sum(), X, RANDOM, mode=DIFFERENCE)


# What it costs --------------------------------------------------------------------------------------------------------


def gradients_of(call: Callable[[Callable[[Tensor], Tensor]], Any], f: Callable[[Tensor], Tensor]) -> int:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return f(x)

    call(counted)
    return len(calls)


def test_a_product_costs_seven_gradients_and_each_further_one_at_the_point_six() -> None:
    smooth = TRIALS["quartic"].f
    assert gradients_of(lambda f: fh.hvp(f, X, RANDOM, mode=DIFFERENCE), smooth) == 7
    assert gradients_of(lambda f: fh.hvp(f, X.float(), RANDOM.float(), mode=DIFFERENCE), smooth) == 8
    rows = gradients_of(lambda f: fh.hessian(f, mode=DIFFERENCE)(X), smooth)
    one = gradients_of(lambda f: [*fh.hessian_rows(f, rows=[0], mode=DIFFERENCE)(X)], smooth)
    assert rows - one == 5 * 6


SMOOTH = [name for name, trial in TRIALS.items() if trial.dtype == torch.float64 and not trial.exact]


def test_a_function_that_varies_fast_costs_two_gradients_a_step_more_and_a_kink_all_steps() -> None:
    cost = {name: gradients_of(lambda f: fh.hvp(f, X, RANDOM, mode=DIFFERENCE), TRIALS[name].f) for name in SMOOTH}
    assert cost["of wavelength 1/20"] == 13
    assert min(cost.values()) == 7 and max(cost.values()) <= 21
    with pytest.warns(fh.FiniteDifferenceWarning):
        assert gradients_of(lambda f: fh.hvp(f, X, RANDOM, mode=DIFFERENCE), KINKS["square of relu"]) == 21


# Where it stands ------------------------------------------------------------------------------------------------------


def test_inside_other_transforms_there_are_three_steps_and_no_estimate() -> None:
    f, xs = TRIALS["product"].f, numbers(4, 6)
    truth = torch.stack([product_by_double_backward(f, x, RANDOM) for x in xs])
    assert relative_error(fh.vmap(lambda x: fh.hvp(f, x, RANDOM, mode=DIFFERENCE))(xs), truth) < 1e-8
    third = fh.grad(lambda x: fh.hvp(lambda x: (x**4).sum(), x, RANDOM, mode=DIFFERENCE).sum())(X)
    assert relative_error(third, 24 * X * RANDOM) < 1e-8
    prepared = fh.prepare(lambda x: fh.hvp(f, x, RANDOM, mode=DIFFERENCE), X)
    assert relative_error(prepared(xs[0]), truth[0]) < 1e-8


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_product_on_a_device_is_that_on_the_host(dtype: torch.dtype) -> None:
    f, x, v = TRIALS["product"].f, X.to(dtype), RANDOM.to(dtype)
    on_the_host, on_the_device = (fh.hvp(f, x.to(d), v.to(d), mode=DIFFERENCE) for d in ("cpu", "cuda"))
    assert on_the_device.is_cuda and relative_error(on_the_device.cpu(), on_the_host) < max(1e-10, torch.finfo(dtype).eps)


def test_a_tangent_of_zeros_and_empty_leaves_have_products_of_zeros() -> None:
    x = {"a": X, "b": torch.zeros(0, dtype=torch.float64)}
    product = fh.hvp(lambda x: (x["a"] ** 3).sum() + x["b"].sum(), x, {"a": 0 * X, "b": x["b"]}, mode=DIFFERENCE)
    assert relative_error(product, {"a": 0 * X, "b": x["b"]}) == 0
    assert (
        relative_error(fh.hvp(lambda x: x.sum() ** 2, torch.zeros(3), torch.ones(3), mode=DIFFERENCE), 6 * torch.ones(3)) < 1e-6
    )


WITHOUT_A_RULE = [
    *(f"{loss}[{reduction}]" for loss in ("multi_margin_loss", "multi_margin_loss p=2") for reduction in ("none", "mean", "sum")),
    *(f"multilabel_margin_loss[{reduction}]" for reduction in ("none", "mean", "sum")),
    *("ctc_loss[mean]", "ctc_loss[sum]", "hardsigmoid", "pdist", "attention", "attention causal"),
    *(f"embedding_bag {kind}" for kind in ("sum", "mean", "max", "weighted")),
    *("cdist", "cdist p=1", "cdist p=3", "cdist p=inf", "segment_reduce sum", "segment_reduce max"),
]


@pytest.mark.parametrize("name", WITHOUT_A_RULE)
def test_where_no_mode_has_a_rule_differences_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "REPAIRS", {})
    monkeypatch.setattr(levels, "FIRST_ORDER_REPAIRS", frozenset())
    case = next(cases.cases(name))
    wide, narrow = (problem_of(case, "curved", dtype) for dtype in (torch.float64, torch.float32))
    truth = truth_of(wide, narrow)
    for problem in (wide, narrow):
        x = problem.x
        v = tuple(numbers(*t.shape, seed=k).to(t.dtype) for k, t in enumerate(x))
        with pytest.raises(fh.MissingDerivativeError):
            fh.hvp(lambda x, f=problem.f: f(*x), x, v)
        product = fh.hvp(lambda x, f=problem.f: f(*x), x, v, mode=DIFFERENCE)
        flat = torch.cat([t.reshape(-1) for t in product])
        along = torch.cat([t.reshape(-1) for t in v]).double()
        verdict, told = compare(flat, truth, flat.dtype, along)
        assert verdict == "right", told


def test_there_are_two_dozen_of_them_and_repairs_leave_few_which_name_the_remedy() -> None:
    left = []
    for name in WITHOUT_A_RULE:
        problem = problem_of(next(cases.cases(name)), "curved", torch.float64)
        try:
            fh.hvp(lambda x, f=problem.f: f(*x), problem.x, problem.x)
        except fh.MissingDerivativeError as error:
            assert "pass mode='finite-difference'" in str(error)
            left.append(name)
    assert len(WITHOUT_A_RULE) >= 24 and len(left) <= 4
