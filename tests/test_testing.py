"""The public checkers: each passes what is right, objects to what is wrong, and says so where it can't tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_unchanged, snapshot
from scenarios import SCENARIOS, VECTOR_SCENARIOS, Scenario, by_name, t
from torch import Tensor, nn
from torch.func import functional_call

from functional_hess import MissingDerivativeError, differences, grad, hvp, linearize, vjp
from functional_hess.testing import LawError, Verdict, check_adjoint, check_derivatives, check_hessian, check_symmetric
from functional_hess.transforms import DependenceError
from functional_hess.tree import Space

named = pytest.mark.parametrize("scenario", SCENARIOS + VECTOR_SCENARIOS, ids=str)
scalar = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


class WrongCube(torch.autograd.Function):
    """x^3 whose backward says 4 x^2 where 3 x^2 is right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 4 * x**2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


class WrongForwardCube(WrongCube):
    """x^3 whose forward-mode rule alone is wrong."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x**2 * tangent


class FrozenSlope(torch.autograd.Function):
    """x^3 with a right first derivative that forgets to depend on x: a wrong second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * cotangent


class RotatedCube(torch.autograd.Function):
    """x^3 with a gradient that is no gradient: its derivative is not symmetric, though it is its own true derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (3 * x**2 + x.roll(1)) * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 0 * tangent  # only the gradient is pushed forward here


class TwoMinds(torch.autograd.Function):
    """The identity that doubles cotangents and not tangents."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


class CubeOfTwoMinds(WrongCube):
    """x^3 with a right gradient, which only forward mode differentiates rightly."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * TwoMinds.apply(x) ** 2 * cotangent


class BackwardOnly(torch.autograd.Function):
    """exp, with a right backward and no forward-mode rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.exp() * cotangent


POINT = t([0.5, -1.0, 2.0])


# ---------------------------------------------------------------------------------------------------- check_derivatives


@named
def test_right_derivatives_are_found_right_to_third_order(scenario: Scenario) -> None:
    verdict = check_derivatives(scenario.f, scenario.x, *scenario.args, argnums=0, order=3)
    assert verdict.status == "right"
    assert verdict.without_rule == ()
    assert max(verdict.errors.values()) < 1e-8


@named
def test_every_argument_is_moved_by_default(scenario: Scenario) -> None:
    assert check_derivatives(scenario.f, scenario.x, *scenario.args).status == "right"


def test_every_law_of_every_order_is_reported() -> None:
    verdict = check_derivatives(lambda x: x.exp().sum(), POINT, order=2)
    first = {"the jvp of f", "the vjp of f", "the grad of f"}
    assert set(verdict.errors) == first | {"the jvp of the derivative of order 1", "the vjp of the derivative of order 1"}


def test_a_wrong_backward_is_found_and_its_leaf_named() -> None:
    def f(x: dict[str, Any]) -> Tensor:
        return WrongCube.apply(x["wrong"][0]).sum() + (x["right"] ** 3).sum()

    with pytest.raises(LawError, match=r"the vjp of f disagrees with central differences .* at x\['wrong'\]\[0\] got") as caught:
        check_derivatives(f, {"right": t([1.0, 2.0]), "wrong": (t([0.5, 3.0]),)}, argnums=0)
    assert "expected" in str(caught.value)
    with pytest.raises(LawError, match=r"at args\[0\]\['wrong'\]"):
        check_derivatives(lambda x: WrongCube.apply(x["wrong"]).sum(), {"wrong": POINT}, order=1)


def numbers(error: LawError) -> tuple[float, float]:
    """Got and expected, as the message tells them."""
    got, expected = (float(str(error).split(f"{word} ")[1].split(" ")[0].rstrip(",;")) for word in ("got", "expected"))
    return got, expected


def test_the_numbers_of_the_message_are_the_derivatives() -> None:
    """At one coordinate the two slopes are to each other as 4 to 3."""
    with pytest.raises(LawError) as caught:
        check_derivatives(lambda x: WrongCube.apply(x), t(2.0), order=1)
    got, expected = numbers(caught.value)
    assert got / expected == pytest.approx(4 / 3, rel=1e-6)


def test_the_numbers_of_the_message_are_those_of_the_worst_entry() -> None:
    with pytest.raises(LawError) as caught:
        check_derivatives(lambda x: torch.cat([x[:1] ** 3, WrongForwardCube.apply(x[1:2]), x[2:] ** 3]), POINT, order=1)
    got, expected = numbers(caught.value)
    assert got / expected == pytest.approx(2 / 3, rel=1e-6)


def test_the_leaf_that_is_most_wrong_is_named() -> None:
    def f(x: list[Tensor]) -> Tensor:
        return WrongCube.apply(x[0]) + 1000 * WrongCube.apply(x[1]) + 2 * WrongCube.apply(x[2])

    with pytest.raises(LawError, match=r"the vjp of f .* at x\[1\] got"):
        check_derivatives(f, [t(1.0), t(1.5), t(2.0)], argnums=0, order=1)
    with pytest.raises(LawError, match=r"at v\[1\] got"):
        check_adjoint(lambda v: v, lambda u: [2 * u[0], 1000 * u[1], 10 * u[2]], [t(1.0)] * 3, [t(1.0)] * 3)


def test_a_wrong_forward_rule_is_found_and_the_output_named() -> None:
    with pytest.raises(LawError, match=r"the jvp of f disagrees .* at f\(x\)\['b'\] got"):
        check_derivatives(lambda x: {"a": x.sin(), "b": WrongForwardCube.apply(x)}, POINT, order=1)


def test_a_wrong_second_derivative_is_found_at_order_two_alone() -> None:
    def f(x: Tensor) -> Tensor:
        return FrozenSlope.apply(x).sum() + x.exp().sum()

    verdict = check_derivatives(f, POINT, order=1)
    assert verdict.status == "right" and verdict.without_rule == ("jvp of f",)
    with pytest.raises(LawError, match="the vjp of the derivative of order 1 disagrees"):
        check_derivatives(f, POINT, order=2)


@pytest.mark.parametrize("wrong", [WrongCube, WrongForwardCube])
def test_wrong_rules_are_found_in_float32_too(wrong: Any) -> None:
    with pytest.raises(LawError):
        check_derivatives(lambda x: wrong.apply(x).sum(), POINT.float())


def test_a_tolerance_decides_what_is_wrong() -> None:
    with pytest.raises(LawError):
        check_derivatives(lambda x: WrongCube.apply(x).sum(), POINT, order=1)
    assert check_derivatives(lambda x: WrongCube.apply(x).sum(), POINT, order=1, rtol=5.0).status == "right"


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(3, dtype=torch.float64)], ids=["float32", "float64"])
def test_a_kink_at_the_point_is_inconclusive(x: Tensor) -> None:
    assert check_derivatives(lambda x: F.relu(x).sum(), x, order=1).status == "inconclusive"
    assert check_derivatives(F.relu, x, order=1).status == "inconclusive"
    assert check_derivatives(torch.abs, x, order=1).status == "inconclusive"


@pytest.mark.parametrize("distance", [-3e-4, -1e-4, 1e-5, 2e-4, 6e-4])
def test_a_kink_within_a_step_is_never_an_alarm(distance: float) -> None:
    check_derivatives(F.relu, t([distance]), order=2)
    check_derivatives(lambda x: (F.relu(x) ** 2).sum(), t([distance]), order=2)


def test_a_kink_far_away_does_not_matter() -> None:
    assert check_derivatives(lambda x: F.relu(x) ** 2, t([0.5, -0.25])).status == "right"


def test_a_wrong_derivative_is_wrong_beside_a_small_kink() -> None:
    with pytest.raises(LawError):
        check_derivatives(lambda x: WrongCube.apply(x[1:]).sum() + 1e-3 * F.relu(x[0]), t([0.0, 3.0, 2.0]), order=1)


def test_a_point_on_the_border_of_the_domain_is_inconclusive() -> None:
    assert check_derivatives(lambda x: (x + 1e-9).log(), torch.zeros((), dtype=torch.float64), order=1).status == "inconclusive"


def test_small_parameters_are_moved_by_small_steps() -> None:
    assert (
        check_derivatives(lambda x: x["variance"].log() + x["mean"] ** 2, {"variance": t(1e-4), "mean": t(0.0)}).status == "right"
    )


def test_a_stationary_point_is_right() -> None:
    assert check_derivatives(lambda x: (x**2).sum() + 1e6, torch.zeros(3, dtype=torch.float64)).status == "right"


def test_rounding_is_no_alarm() -> None:
    """A constant that is computed with an error of 1e-10, which differences magnify."""
    verdict = check_derivatives(lambda x: 1e6 * (x.sin() ** 2 + x.cos() ** 2).sum(), POINT, order=1)
    assert verdict.status == "right"


def test_noise_does_not_make_a_wrong_derivative_right() -> None:
    """In float32 with a large offset small steps drown in rounding, and must not outvote the large one."""
    W = torch.eye(3)
    try:
        status = check_derivatives(lambda x: WrongCube.apply(W @ x).sum() + 1e5, POINT.float(), order=1).status
    except LawError:
        status = "wrong"
    assert status != "right"


@pytest.mark.parametrize("place", torch.linspace(-1.2, 1.2, 41).tolist())
def test_the_doubt_covers_the_error_wherever_a_kink_lies(place: float) -> None:
    h = torch.finfo(torch.float64).eps ** 0.2
    x = t([-place * h])
    (slope,) = differences.slopes_at(lambda x: (F.relu(x),), (x,), (t([1.0]),), 1.0)
    error = abs(float(slope.value) - float(x > 0))
    assert error <= differences.PATIENCE / 4 * slope.anywhere + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_held_to_what_it_can_do(dtype: torch.dtype) -> None:
    assert check_derivatives(lambda x: (x.sin() * x).sum(), POINT.to(dtype)).status == "right"


def test_a_float32_model_that_takes_no_float64_is_checked_in_float32() -> None:
    W = torch.tensor([[1.0, -0.5, 0.25], [0.5, 2.0, -1.0]])
    assert check_derivatives(lambda x: torch.tanh(W @ x).sum(), POINT.float()).status == "right"
    with pytest.raises(LawError):
        check_derivatives(lambda x: WrongCube.apply(W @ x).sum(), POINT.float())


def test_a_mode_without_a_rule_is_reported_and_the_other_checked() -> None:
    verdict = check_derivatives(lambda x: BackwardOnly.apply(x).sum(), POINT)
    assert verdict.without_rule == ("jvp of f", "jvp of the derivative of order 1")
    assert "the vjp of the derivative of order 1" in verdict.errors


def test_no_rule_in_any_mode_is_an_error() -> None:
    class Neither(BackwardOnly):
        generate_vmap_rule = True

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            raise RuntimeError("derivative for neither is not implemented")

    with pytest.raises(MissingDerivativeError, match="check_derivatives"):
        check_derivatives(lambda x: Neither.apply(x).sum(), POINT)


def test_errors_of_the_function_come_out_untouched() -> None:
    class Mine(RuntimeError):
        pass

    def f(x: Tensor) -> Tensor:
        raise Mine("of the user")

    for check in (check_derivatives, check_hessian):
        with pytest.raises(Mine, match="of the user"):
            check(f, POINT)


def test_what_has_no_derivative_is_refused() -> None:
    with pytest.raises(TypeError, match="must return at least one floating tensor"):
        check_derivatives(lambda x: "text", POINT)
    with pytest.raises(ValueError, match="order must be at least 1"):
        check_derivatives(torch.sin, POINT, order=0)
    with pytest.raises(DependenceError):
        check_derivatives(lambda x: x.detach().sum(), POINT)


# ---------------------------------------------------------------------------------------------------- check_hessian


@scalar
def test_right_hessians_are_found_right(scenario: Scenario) -> None:
    verdict = check_hessian(scenario.f, scenario.x, *scenario.args)
    assert verdict.status == "right" and verdict.without_rule == ()
    assert set(verdict.errors) == {"H v", "<u, H v> = <v, H u>", "forward-over-reverse = reverse-over-reverse"}


def test_a_frozen_slope_is_a_wrong_hessian_whose_leaf_is_named() -> None:
    def f(x: dict[str, Tensor]) -> Tensor:
        return FrozenSlope.apply(x["b"]).sum() + (x["a"] ** 3).sum()

    with pytest.raises(LawError, match=r"check_hessian: H v disagrees with central differences .* at x\['b'\] got"):
        check_hessian(f, {"a": POINT, "b": POINT})


def test_an_asymmetric_hessian_is_found() -> None:
    """The differences agree with it: only the symmetry of two products can tell."""
    with pytest.raises(LawError, match=r"<u, H v> = <v, H u> fails .* at x"):
        check_hessian(lambda x: RotatedCube.apply(x).sum(), POINT)


def test_modes_that_disagree_are_found() -> None:
    with pytest.raises(LawError, match=r"forward-over-reverse = reverse-over-reverse fails .* at x got"):
        check_hessian(lambda x: CubeOfTwoMinds.apply(x).sum(), POINT)


def test_a_hessian_at_a_kink_of_the_gradient_is_inconclusive() -> None:
    assert check_hessian(lambda x: F.relu(x).sum() + (x**2).sum(), torch.zeros(3, dtype=torch.float64)).status == "inconclusive"
    assert check_hessian(lambda x: (F.relu(x) ** 2).sum(), torch.zeros(3, dtype=torch.float64)).status == "inconclusive"


def test_a_mode_of_the_hessian_without_a_rule_is_reported() -> None:
    verdict = check_hessian(lambda x: BackwardOnly.apply(x).sum(), POINT)
    assert verdict.status == "right" and verdict.without_rule == ("forward-over-reverse",)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_networks_with_norms_and_kinks_raise_no_alarm(dtype: torch.dtype, generator: torch.Generator) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    x = {k: torch.randn(p.shape, generator=generator, dtype=dtype) for k, p in net.named_parameters()}
    X = torch.randn(10, 4, generator=generator, dtype=dtype)
    y = torch.arange(10) % 3

    def loss(x: dict[str, Tensor], X: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, x, (X,)), y)

    assert check_hessian(loss, x, X).status in ("right", "inconclusive")
    assert check_derivatives(loss, x, X, order=2).status in ("right", "inconclusive")


@pytest.mark.parametrize("seed", range(2))
def test_networks_of_rectifiers_are_right_although_kinks_lie_within_the_first_step(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = {k: torch.randn(s, generator=draw, dtype=torch.float64) for k, s in {"w": (4, 24), "b": (24,), "u": (24, 2)}.items()}
    X, Y = (torch.randn(12, n, generator=draw, dtype=torch.float64) for n in (4, 2))

    def loss(x: dict[str, Tensor]) -> Tensor:
        return ((F.relu(X.to(x["w"]) @ x["w"] + x["b"]) @ x["u"] - Y.to(x["w"])) ** 2).mean()

    def in_float32_alone(x: dict[str, Tensor]) -> Tensor:
        return ((F.relu(X.float() @ x["w"] + x["b"]) @ x["u"] - Y.float()) ** 2).mean()

    for check in (check_hessian, check_derivatives):  # its steps are so large that they cross kinks: no alarm is all one can ask
        assert check(in_float32_alone, {k: p.float() for k, p in x.items()}).status in ("right", "inconclusive")
    for point in (x, {k: p.float() for k, p in x.items()}):
        assert check_hessian(loss, point).status == "right"
        assert check_derivatives(loss, point).status == "right"


def test_a_hessian_needs_a_scalar() -> None:
    with pytest.raises(TypeError, match=r"check_hessian: f must return a scalar tensor"):
        check_hessian(torch.sin, POINT)


# ---------------------------------------------------------------------------------------------------- linear maps


@scalar
def test_hessian_products_are_symmetric_and_their_own_adjoint(scenario: Scenario) -> None:
    def product(v: Any) -> Any:
        return hvp(scenario.f, scenario.x, v, *scenario.args)

    assert check_symmetric(product, scenario.x).status == "right"
    assert check_adjoint(product, product, scenario.x, scenario.x).status == "right"


@named
def test_pushforward_and_pullback_are_adjoint(scenario: Scenario) -> None:
    def f(x: Any) -> Tensor:
        return scenario.f(x, *scenario.args)

    out, pushforward = linearize(f, scenario.x)
    _, pullback = vjp(f, scenario.x)
    verdict = check_adjoint(pushforward, lambda u: pullback(u)[0], scenario.x, out)
    assert verdict.status == "right"
    assert list(verdict.errors) == ["<u, A v> = <A^T u, v>"]


def test_an_asymmetric_map_is_found_and_its_leaf_named() -> None:
    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": 2 * v["a"], "b": v["b"] + v["b"].roll(1)}

    with pytest.raises(LawError, match=r"check_symmetric: <u, A v> = <v, A u> fails .* at v\['b'\] got .* expected"):
        check_symmetric(product, {"b": POINT, "a": t([1.0, 2.0])})


def test_a_block_off_the_diagonal_must_be_mirrored() -> None:
    with pytest.raises(LawError):
        check_symmetric(lambda v: (v[1], 0 * v[0]), (POINT, POINT))
    assert check_symmetric(lambda v: (v[1], v[0]), (POINT, POINT)).status == "right"


@pytest.mark.parametrize("wrong", [0.0, 0.5, -1.0, float("nan")])
def test_a_wrong_adjoint_is_found(wrong: float) -> None:
    A = t([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert check_adjoint(lambda v: A @ v, lambda u: A.T @ u, POINT, POINT[:2]).status == "right"
    with pytest.raises(LawError, match=r"check_adjoint: <u, A v> = <A\^T u, v> fails .* at v got"):
        check_adjoint(lambda v: A @ v, lambda u: wrong * (A.T @ u), POINT, POINT[:2])


def test_a_small_asymmetry_is_found_in_float64_and_pardoned_in_float32() -> None:
    S = torch.eye(3, dtype=torch.float64)
    S[0, 1] = 1e-6
    with pytest.raises(LawError):
        check_symmetric(lambda v: S @ v, POINT)
    assert check_symmetric(lambda v: S.float() @ v, POINT.float()).status == "right"
    with pytest.raises(LawError):
        check_symmetric(lambda v: S.float() @ v, POINT.float(), rtol=1e-8, atol=0.0)


def test_images_in_another_space_are_refused() -> None:
    with pytest.raises(ValueError, match=r"product\(u\) must have shape \(3,\), got \(2,\)"):
        check_symmetric(lambda v: v[:2], POINT)
    with pytest.raises(ValueError, match=r"forward\(v\) must have shape \(2,\), got \(3,\)"):
        check_adjoint(lambda v: v, lambda u: u, POINT, POINT[:2])
    with pytest.raises(ValueError, match=r"transpose\(u\) must have shape \(3,\), got \(2,\)"):
        check_adjoint(lambda v: v[:2], lambda u: u, POINT, POINT[:2])


# ---------------------------------------------------------------------------------------------------- all of them


def every_check(generator: torch.Generator | None) -> list[Verdict]:
    scenario = by_name("lennard_jones_pair")
    f, x, A = scenario.f, scenario.x, t([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 5.0]])
    return [
        check_derivatives(f, x, generator=generator),
        check_hessian(f, x, generator=generator),
        check_symmetric(lambda v: A @ v, POINT, generator=generator),
        check_adjoint(lambda v: A[:2] @ v, lambda u: A[:2].T @ u, POINT, POINT[:2], generator=generator),
    ]


def test_checks_draw_from_their_generator_alone() -> None:
    before = torch.get_rng_state()
    assert every_check(None) == every_check(None)
    seeded = [every_check(torch.Generator().manual_seed(k)) for k in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert torch.equal(before, torch.get_rng_state())


def test_checks_leave_their_inputs_alone() -> None:
    x = {"a": POINT.clone().requires_grad_(), "b": nn.Parameter(t([[1.0, 2.0]]))}
    before = snapshot(x)
    check_derivatives(lambda x: x["a"].exp().sum() * x["b"].prod(), x)
    check_hessian(lambda x: x["a"].exp().sum() * x["b"].prod(), x)
    check_symmetric(lambda v: v, x)
    assert_unchanged(before)


def test_a_verdict_is_frozen() -> None:
    verdict = check_symmetric(lambda v: v, POINT)
    assert verdict == copy.copy(verdict)
    with pytest.raises(AttributeError):
        verdict.status = "wrong"  # type: ignore[misc]


def test_a_law_error_is_an_assertion_error() -> None:
    assert issubclass(LawError, AssertionError)


def test_the_truth_is_independent_of_the_derivative_checked() -> None:
    """grad of the wrong cube is wrong by a third, exactly as the checker says."""
    g = grad(lambda x: WrongCube.apply(x).sum())(POINT)
    assert torch.allclose(g, 4 * POINT**2)
    assert Space.of(POINT).dim == 3
