"""The hand-written table, plain double backward and differences agree, and each is seen to notice a wrong value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import (
    assert_unchanged,
    derivative_by_differences,
    gradient,
    hessian,
    hessian_by_differences,
    matrix,
    relative_error,
    snapshot,
)
from scenarios import (
    SCENARIOS,
    VECTOR_SCENARIOS,
    Scenario,
    by_name,
    dense_gradient,
    dense_hessian,
    flat_function,
    leaves,
    rebuild,
    tensors,
)

ALL = SCENARIOS + VECTOR_SCENARIOS
every_scenario = pytest.mark.parametrize("scenario", ALL, ids=str)


def dense_oracle_gradient(scenario: Scenario) -> torch.Tensor:
    parts = gradient(flat_function(scenario), tensors(scenario.x))
    return torch.cat([part.reshape(*scenario.value.shape, -1) for part in parts], dim=-1)


def dense_oracle_hessian(scenario: Scenario, oracle=hessian) -> torch.Tensor:
    points = tensors(scenario.x)
    return matrix(oracle(flat_function(scenario), points), points)


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_has_the_trees_that_a_user_may_bring():
    found = {type(leaf) for scenario in ALL for leaf in leaves(scenario.x)}
    assert {torch.Tensor, int, str, type(None)} <= found
    shapes = [leaf.shape for scenario in ALL for leaf in tensors(scenario.x)]
    assert torch.Size([]) in shapes and torch.Size([0]) in shapes
    assert any(isinstance(s.x, dict) and list(s.x) != sorted(s.x) for s in ALL)
    assert any(hasattr(s.x, "_fields") for s in ALL) and any(type(s.x) is list for s in ALL)
    assert len(SCENARIOS) >= 14 and len(VECTOR_SCENARIOS) >= 3 and len({s.name for s in ALL}) == len(ALL)


@every_scenario
def test_shapes_of_the_table_are_those_of_its_conventions(scenario):
    points, out_shape = tensors(scenario.x), scenario.value.shape
    assert all(leaf.dtype == torch.float64 for leaf in points)
    assert [d.shape for d in tensors(scenario.gradient)] == [out_shape + p.shape for p in points]
    blocks = [out_shape + p.shape + q.shape for p in points for q in points]
    assert [block.shape for block in tensors(scenario.hessian)] == blocks
    assert scenario.pattern.shape == (scenario.n, scenario.n) and scenario.pattern.dtype == bool


@every_scenario
def test_value_of_the_table_is_the_value_of_the_function(scenario):
    assert relative_error(scenario.f(scenario.x, *scenario.args), scenario.value) < 1e-14


@every_scenario
def test_gradient_of_the_table_is_the_oracle_gradient(scenario):
    assert relative_error(dense_oracle_gradient(scenario), dense_gradient(scenario)) < 1e-13


@every_scenario
def test_hessian_of_the_table_is_the_oracle_hessian(scenario):
    assert relative_error(dense_oracle_hessian(scenario), dense_hessian(scenario)) < 1e-13


@every_scenario
def test_hessian_of_the_table_is_the_difference_of_gradients(scenario):
    assert relative_error(dense_oracle_hessian(scenario, hessian_by_differences), dense_hessian(scenario)) < 1e-9


@every_scenario
def test_gradient_of_the_table_is_the_difference_of_values(scenario):
    for k, (leaf, expected) in enumerate(zip(tensors(scenario.x), tensors(scenario.gradient), strict=True)):

        def value(moved, k=k):
            points = list(tensors(scenario.x))
            points[k] = moved
            return flat_function(scenario)(*points)

        derivative, error = derivative_by_differences(value, leaf)
        assert relative_error(derivative, expected) < 1e-9
        assert float((derivative - expected).abs().max() if leaf.numel() else 0) <= error + 1e-8


@every_scenario
def test_pattern_is_where_the_hessian_differs_from_zero_at_random_points(scenario, rng):
    seen = np.zeros_like(scenario.pattern)
    for _ in range(3):
        moved = iter([leaf * torch.as_tensor(rng.uniform(0.5, 1.5, leaf.shape)) for leaf in tensors(scenario.x)])
        dense = dense_oracle_hessian(replace(scenario, x=rebuild(scenario.x, moved)))
        seen |= (dense.reshape(-1, scenario.n, scenario.n) != 0).any(dim=0).numpy()
    assert (seen == scenario.pattern).all()


@every_scenario
def test_hessian_of_the_table_is_symmetric(scenario):
    dense = dense_hessian(scenario)
    assert relative_error(dense.mT, dense) < 1e-15


def test_leaves_of_a_dict_are_walked_by_sorted_key_and_rebuilt_in_the_order_they_came():
    tree = {"b": (1, None), "a": torch.zeros(2)}
    assert [type(leaf) for leaf in leaves(tree)] == [torch.Tensor, int, type(None)]
    rebuilt = rebuild(tree, iter([torch.ones(2)]))
    assert list(rebuilt) == ["b", "a"] and rebuilt["b"] == (1, None) and bool((rebuilt["a"] == 1).all())


# Each oracle notices a wrong value ------------------------------------------------------------------------------------


class HalfGradient(torch.autograd.Function):
    """x^2 whose derivative is given as x instead of 2x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.saved_tensors[0]


class WrongSecondDerivative(torch.autograd.Function):
    """x^3 whose derivative is right, and loses half of its own derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output * 3 * x * x.detach()


POINT = (torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64),)


def perturbed(scenario: Scenario, field: str) -> Scenario:
    """The scenario with one entry of its gradient or Hessian off by a part in a million."""
    parts = [part.clone() for part in tensors(getattr(scenario, field))]
    part = max(parts, key=lambda part: float(part.abs().max()) if part.numel() else -1.0)
    part.view(-1)[int(part.abs().argmax())] *= 1 + 1e-6
    return replace(scenario, **{field: rebuild(getattr(scenario, field), iter(parts))})


@pytest.mark.parametrize("scenario", [s for s in ALL if s.name != "linear"], ids=str)
def test_one_wrong_entry_of_the_table_is_noticed(scenario):
    assert relative_error(dense_oracle_gradient(scenario), dense_gradient(perturbed(scenario, "gradient"))) > 1e-8
    wrong = dense_hessian(perturbed(scenario, "hessian"))
    assert relative_error(dense_oracle_hessian(scenario), wrong) > 1e-8
    assert relative_error(dense_oracle_hessian(scenario, hessian_by_differences), wrong) > 1e-8


def test_swapped_leaves_are_noticed():
    scenario = by_name("bilinear")
    swapped = {**scenario.gradient, "u": scenario.gradient["v"], "v": scenario.gradient["u"]}
    with pytest.raises(AssertionError, match=r"result\['u'\]"):
        relative_error(swapped, scenario.gradient)


def test_a_hessian_laid_out_column_by_column_is_noticed():
    scenario = by_name("least_squares")
    by_columns = dense_hessian(scenario).reshape(2, 3, 2, 3).permute(1, 0, 3, 2)
    assert relative_error(by_columns, scenario.hessian) > 0.1


def test_differences_of_values_notice_a_wrong_first_derivative():
    def f(x):
        return HalfGradient.apply(x).sum()

    truth, error = derivative_by_differences(f, POINT[0])
    assert relative_error(truth, 2 * POINT[0]) < 1e-11 and error < 1e-9
    assert relative_error(gradient(f, POINT)[0], truth) > 0.4


def test_differences_of_gradients_notice_a_wrong_second_derivative():
    def f(x):
        return WrongSecondDerivative.apply(x).sum()

    truth = hessian_by_differences(f, POINT)[0][0]
    assert relative_error(truth, torch.diag(6 * POINT[0])) < 1e-11
    assert relative_error(hessian(f, POINT)[0][0], truth) > 0.4


def test_differences_of_gradients_are_asymmetric_where_the_gradient_is_wrong():
    def f(x):  # the gradient that autograd sees is (x_1, 0): no function has it
        return x[0] * x[1].detach()

    block = hessian_by_differences(f, POINT)[0][0]
    assert float((block - block.T).abs().max()) > 0.9


def test_differences_report_an_error_at_a_kink():
    x = torch.tensor([0.0005, 3.0], dtype=torch.float64)
    _, error = derivative_by_differences(lambda x: x.abs().sum(), x)
    assert error > 0.1


def test_the_error_estimate_bounds_the_error_of_a_smooth_function():
    derivative, error = derivative_by_differences(lambda x: torch.exp(3 * x).sum(), POINT[0])
    assert float((derivative - 3 * torch.exp(3 * POINT[0])).abs().max()) < error


def test_third_derivatives_are_differences_of_the_oracle_hessian():
    def trace(x):
        return torch.trace(hessian(lambda x: (x**4).sum(), (x,))[0][0])

    derivative, _ = derivative_by_differences(trace, POINT[0])
    assert relative_error(derivative, 24 * POINT[0]) < 1e-11


def test_differences_of_a_tensor_have_the_shape_of_out_then_in():
    x = torch.arange(6, dtype=torch.float64).reshape(2, 3).T  # not contiguous
    derivative, _ = derivative_by_differences(lambda x: x.sum(dim=0) ** 2, x)
    expected = torch.zeros(2, 3, 2, dtype=torch.float64)
    expected[0, :, 0], expected[1, :, 1] = 6.0, 24.0
    assert relative_error(derivative, expected) < 1e-11


def test_oracles_leave_their_inputs_alone():
    scenario = by_name("logistic_regression")
    before = snapshot(scenario.x, scenario.args)
    (
        dense_oracle_gradient(scenario),
        dense_oracle_hessian(scenario),
        dense_oracle_hessian(scenario, hessian_by_differences),
    )
    assert_unchanged(before)


# The measure of error -------------------------------------------------------------------------------------------------


def test_relative_error_is_relative_and_absolute_at_zero():
    one, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert relative_error(1.01 * one, one) == pytest.approx(0.01, rel=1e-5)
    assert relative_error(one, zero) == 5.0 and relative_error(zero, zero) == 0.0
    assert relative_error({"a": one, "b": None}, {"a": one, "b": None}) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_relative_error_of_what_is_not_finite_is_infinite(bad):
    assert relative_error(torch.tensor([1.0, bad]), torch.ones(2)) == float("inf")
    assert relative_error(torch.ones(2), torch.tensor([1.0, bad])) == float("inf")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(1, 2), torch.zeros(2)),
        ((torch.zeros(2),), [torch.zeros(2)]),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        ({"a": torch.zeros(2), "b": None}, {"a": torch.zeros(2)}),
        ((torch.zeros(2),), (torch.zeros(2), torch.zeros(2))),
        (torch.zeros(2), None),
        (None, torch.zeros(2)),
        (0.0, torch.zeros(())),
    ],
)
def test_relative_error_of_trees_that_differ_is_a_failure(actual, expected):
    with pytest.raises(AssertionError, match="result"):
        relative_error(actual, expected)


# Inputs unchanged -----------------------------------------------------------------------------------------------------


def write(x):
    x.add_(1)


def write_and_restore(x):
    x.add_(1).sub_(1)


def demand_gradient(x):
    x.requires_grad_()


def write_under_the_counter(x):
    x.data[0] = 7.0


@pytest.mark.parametrize("harm", [write, write_and_restore, demand_gradient, write_under_the_counter])
def test_a_changed_input_is_noticed(harm):
    x = torch.zeros(3)
    before = snapshot({"x": [x]})
    assert_unchanged(before)
    harm(x)
    with pytest.raises(AssertionError, match="belongs to the caller"):
        assert_unchanged(before)


def test_a_gradient_left_behind_is_noticed():
    x = torch.zeros(3, requires_grad=True)
    before = snapshot(x)
    x.sum().backward()
    with pytest.raises(AssertionError, match=r"given a \.grad"):
        assert_unchanged(before)


def test_watched_inputs_may_hold_nan(inputs_unchanged):
    inputs_unchanged(torch.tensor([float("nan")]), {"empty": torch.zeros(0), "number": 3})
