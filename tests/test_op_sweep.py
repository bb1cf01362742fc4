"""The sweep over operations: its judge, its processes and its counts can be believed; and some of its cases.

What is quick is here: a few operations in every call, and what the judge says to answers that are known to be right, wrong,
refused or undecidable. The whole sweep is one slow test, the same that `python -m sweep.run` runs.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sweep import cases, opinfo, third, worker
from sweep.judge import NoGradient, Truth, compare, truth_of
from sweep.problems import READOUTS, Case, problem_of
from sweep.run import COUNTS, THIRD, THIRD_COUNTS, Died, Outcome, counts, sweep, table, worse
from torch import Tensor

QUICK = "^(mse_loss.mean.|layer_norm|attention|cholesky_inverse of a full matrix|multi_margin_loss p=2.mean.|sort)$"
KEPT, KEPT_OF_THIRD = json.loads(COUNTS.read_text()), json.loads(THIRD_COUNTS.read_text())
README = Path(__file__).parents[1] / "README.md"


# ----------------------------------------------------------------------------------------------------------- the sweep


def test_a_few_operations_are_right_in_every_call():
    lines: list[dict[str, Any]] = []
    for name in filter(re.compile(QUICK).search, cases.names()):
        worker.run(f"own:{name}", set(), lines.append)
    outcomes = [Outcome(line["end"], line["verdict"], line["detail"]) for line in lines if "end" in line]
    ours = [o for o in outcomes if o.call in worker.OURS]
    assert len(ours) == 6 * len(READOUTS) * len(worker.DTYPES) * len(worker.OURS)
    assert [o for o in ours if o.verdict != "right"] == []
    # and the sweep sees what torch alone gets wrong
    assert {o.verdict for o in outcomes if o.call == "torch.func.hessian" and "layer_norm" in o.key} == {"wrong"}


@pytest.mark.slow
def test_the_whole_sweep_has_nothing_wrong_and_is_no_worse_than_it_was():
    outcomes = sweep()
    bad = [o for o in outcomes if o.verdict in ("wrong", "crash") and o.call not in worker.PEERS]
    assert bad == []
    assert worse(counts(outcomes), KEPT) == []


@pytest.mark.slow
def test_third_derivatives_and_mapped_points_have_nothing_wrong_and_are_no_worse_than_they_were():
    outcomes = sweep(**THIRD)
    assert [o for o in outcomes if o.verdict in ("wrong", "crash", "inconclusive")] == []
    assert worse(counts(outcomes), KEPT_OF_THIRD) == []


def test_third_derivatives_of_a_few_operations_are_right():
    lines: list[dict[str, Any]] = []
    for name in filter(re.compile(QUICK).search, cases.names()):
        worker.run(f"third:{name}", set(), lines.append, {"third": cases}, third.judge_case)
    verdicts = [line["verdict"] for line in lines if "end" in line]
    assert verdicts == ["truth", *["right"] * len(third.CALLS)] * 6


def test_the_readme_has_the_counts_that_are_kept():
    assert table(KEPT) in README.read_text()
    assert worse(KEPT, KEPT) == []
    truths = sum(KEPT[source]["-"]["truth"].get(kind, 0) for source in worker.SOURCES for kind in ("truth", "by values"))
    assert f"{truths:,} problems" in README.read_text()
    of_third = counts_of_calls(KEPT_OF_THIRD)
    right, refused = of_third["right"], of_third["refused"]
    assert f"{right:,} of {right + refused:,} answers are right, {refused} refused and none wrong" in README.read_text()
    assert sum(of_third.values()) == right + refused


def counts_of_calls(tree: dict[str, Any]) -> collections.Counter[str]:
    return sum((collections.Counter(row) for row in tree["third"]["float64"].values()), collections.Counter())


def test_the_table_of_the_project_is_large_enough():
    assert len(cases.names()) >= 150


def test_a_case_is_the_same_whenever_it_is_built():
    first, second = (next(cases.cases("gaussian_nll_loss[mean]")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.leaves, second.leaves, strict=True))


# ------------------------------------------------------------------------------------------------------------ the judge


def case(op: Any, *leaves: Any) -> Case:
    return Case("a case", op, tuple(torch.tensor(x, dtype=torch.float64) for x in leaves))


def truth(of: Case, readout: str = "plain") -> Truth:
    return truth_of(*(problem_of(of, readout, dtype) for dtype in (torch.float64, torch.float32)))


def verdict(answer: Any, found: Truth, v: Tensor | None = None) -> str:
    answer = torch.as_tensor(answer, dtype=torch.float64)
    return compare(answer, found, torch.float64, v)[0]


CUBIC = case(lambda x, y: (x**3).sum() * y, [0.25, -1.25], 0.75)
CUBIC_H = torch.tensor([[1.125, 0, 0.1875], [0, -5.625, 4.6875], [0.1875, 4.6875, 0]], dtype=torch.float64)


def test_truth_is_the_hessian():
    found = truth(CUBIC)
    assert bool(found.known.all()) and not found.by_values
    assert (found.H - CUBIC_H).abs().max() < 1e-8


@pytest.mark.parametrize("readout", READOUTS)
def test_both_readouts_have_the_hessian_that_the_chain_rule_gives(readout):
    quadratic = case(lambda x: x[0] * x[1], [0.5, -0.75])
    u, first, second = -0.375, 1.0, 0.0
    if readout == "curved":
        c = 1 + 0.3 * torch.sin(torch.tensor(1.0, dtype=torch.float64))
        angle = torch.tensor(1.1 * u + 0.2, dtype=torch.float64)
        first, second = float(1.1 * c * angle.cos()), float(-1.21 * c * angle.sin())
    g = torch.tensor([-0.75, 0.5], dtype=torch.float64)
    H = second * torch.outer(g, g) + first * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert (truth(quadratic, readout).H - H).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", worker.DTYPES.values())
def test_the_right_hessian_is_right_and_its_product_too(dtype):
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = truth(CUBIC)
    assert compare(CUBIC_H.to(dtype), found, dtype)[0] == "right"
    assert compare((CUBIC_H @ v).to(dtype), found, dtype, v)[0] == "right"
    assert compare(CUBIC_H.diagonal().to(dtype), found.diagonal, dtype)[0] == "right"


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-4), (torch.float32, 1e-2)])
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (2, 1)])
def test_one_wrong_entry_is_wrong(dtype, off, place):
    H = CUBIC_H.clone()
    H[place] += off
    assert compare(H.to(dtype), truth(CUBIC), dtype)[0] == "wrong"


@pytest.mark.parametrize("answer", [CUBIC_H * torch.nan, torch.zeros(3, 3), CUBIC_H[:2], torch.zeros(10, 3)])
def test_a_result_that_is_no_number_or_zero_or_of_another_shape_is_wrong(answer):
    assert verdict(answer, truth(CUBIC)) == "wrong"


def test_a_result_in_another_dtype_is_wrong():
    assert compare(CUBIC_H, truth(CUBIC), torch.float32)[0] == "wrong"


def test_a_wrong_small_block_is_not_hidden_by_a_large_one():
    scales = case(lambda x, y: 1e6 * x**4 + y**4, 1.0, 1.0)
    assert verdict([[12e6, 0], [0, 12.0]], truth(scales)) == "right"
    assert verdict([[12e6, 0], [0, 13.0]], truth(scales)) == "wrong"


@pytest.mark.parametrize(
    ("name", "op", "point"),
    [
        ("kink of f", torch.relu, [0.0, 1.0]),
        ("kink of the gradient", lambda x: torch.relu(x) ** 2, [0.0, 1.0]),
        ("kink nearby", lambda x: (x - 1e-7).abs(), [0.0, 1.0]),
        ("a norm at 0", lambda x: (x**2).sum().sqrt(), [0.0, 0.0]),
        ("singular, flat along the axes", lambda x: (x.prod() ** 2).sqrt(), [0.0, 0.0]),
        ("known along the axes alone", lambda x: torch.linalg.vector_norm(x, -1), [0.0, 0.0]),
        ("infinite gradient", lambda x: x.sqrt(), [0.0, 1.0]),
        ("staircase", lambda x: x.bfloat16() ** 2, [0.25, 1.0]),
    ],
)
@pytest.mark.parametrize("entry", [0.0, 1.0, torch.nan])
def test_at_a_kink_nothing_is_concluded(name, op, point, entry):
    found = truth(case(op, point))
    answer = torch.where(found.known, found.H, entry)
    assert not found.known[0, 0] and verdict(answer, found) == "inconclusive"


def test_a_wrong_entry_is_wrong_where_another_is_unknown():
    found = truth(case(lambda x: x.abs() ** 3 + x.abs(), [0.0, 1.0]))
    assert verdict([[0.0, 0.0], [0.0, 6.0]], found) == "inconclusive"
    assert verdict([[0.0, 0.0], [0.0, 5.0]], found) == "wrong"


def test_kinks_nearby_at_which_two_steps_agree_by_chance_do_not_make_the_truth_wrong():
    def f(x: Tensor) -> Tensor:
        t = (x - 0.5).abs()
        return x**3 + 5 * (torch.relu(t - 4e-4) ** 2 - torch.relu(t - 16e-4) ** 2)  # at steps of 2e-3 and 1e-3 one slope

    found = truth(case(f, [0.5, 0.75]))
    assert verdict([[3.0, 0.0], [0.0, 4.5]], found) == "right"
    assert verdict([[9.0, 0.0], [0.0, 4.5]], found) == "wrong"


def test_terms_that_cancel_lose_digits_in_float32_and_a_wrong_formula_is_seen_beside_them():
    cancels = case(lambda x: (x / x.abs().sqrt() ** 2 * 3 + x.sign() * x).sum(), [0.0078125, -0.015625])
    found = truth(cancels)
    assert found.H.abs().max() < 1e-4 and found.allowed(torch.float32)[1] > 1e-3
    assert compare(torch.full((2, 2), 2e-3), found, torch.float32)[0] == "right"
    assert compare(torch.full((2, 2), 0.5), found, torch.float32)[0] == "wrong"
    assert verdict(torch.full((2, 2), 2e-3), found) == "wrong"


def test_a_gradient_that_is_a_convention_is_not_held_to_values():
    convention = dataclasses.replace(case(lambda x: x**3 + (x**2).detach(), [0.5, 0.75]), by_convention=True)
    found = truth(convention)
    assert not found.by_values and verdict([[3.0, 0.0], [0.0, 4.5]], found) == "right"


class WrongGradient(torch.autograd.Function):
    """x^3, with 2 x^2 for its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x**2 * g


def test_a_wrong_gradient_does_not_make_the_truth_wrong():
    found = truth(case(lambda x: WrongGradient.apply(x), [0.5, 0.75]))
    assert found.by_values
    assert (found.H - torch.tensor([[3.0, 0], [0, 4.5]])).abs().max() < 1e-4
    assert verdict([[2.0, 0], [0, 3.0]], found) == "wrong"  # the derivative of the wrong gradient


@pytest.mark.parametrize("op", [lambda x: torch.ones(2), lambda x: x.detach()])
def test_what_has_no_gradient_makes_no_case(op):
    with pytest.raises((NoGradient, AttributeError)):
        truth(case(op, [0.5, 0.75]))


def third_verdicts(f: Any) -> set[str]:
    problem = problem_of(case(f, [0.5, 0.75]), "plain", torch.float64)
    truths = third.truth_of(problem)
    return {third.judged(call, problem, truths[call])[0] for call in third.CALLS if call != "vmap(hvp) over points"}


class SecondRight(torch.autograd.Function):
    """x^3, of which all but the third derivative is right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: int) -> Tensor:
        return (x**3, 3 * x**2, 6 * x)[order]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.order = inputs[1]

    @staticmethod
    def slope(ctx: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return SecondRight.apply(x, ctx.order + 1) if ctx.order < 2 else torch.full_like(x, 6.001)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return SecondRight.slope(ctx) * g, None

    @staticmethod
    def jvp(ctx: Any, v: Tensor, _: Any) -> Tensor:
        return SecondRight.slope(ctx) * v


def test_a_wrong_third_derivative_is_seen_where_the_second_is_right_and_so_is_a_kink():
    assert third_verdicts(lambda x: (x**3).sum()) == {"right"}
    assert third_verdicts(lambda x: SecondRight.apply(x, 0).sum()) == {"wrong"}
    assert third_verdicts(lambda x: (torch.relu(x - 0.5) ** 2).sum()) == {"inconclusive"}


def test_a_linear_function_has_a_known_hessian_of_zeros():
    found = truth(case(lambda x: 3 * x, [0.5, 0.75]))
    assert verdict(torch.zeros(2, 2), found) == "right"
    assert verdict(torch.full((2, 2), 1e-3), found) == "wrong"


# --------------------------------------------------------------------------------------------------- verdicts on calls


def verdicts(of: Case, calls: Any = worker.OURS) -> dict[str, str]:
    problem = problem_of(of, "plain", torch.float64)
    return {call: worker.judged(call, problem, truth(of))[0] for call in calls}


def test_every_call_is_right_about_a_cubic():
    assert set(verdicts(CUBIC, worker.CALLS).values()) == {"right"}


class Once(torch.autograd.Function):
    """x^2, which may be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * g


def test_what_the_package_refuses_is_refused():
    assert set(verdicts(case(lambda x: Once.apply(x), [0.5, 0.75])).values()) == {"refused"}


def test_any_other_exception_is_a_crash():
    def bad(x: Tensor) -> Tensor:
        if torch._C._functorch.maybe_current_level() is not None:
            raise IndexError("inside a transform")
        return (x**3).sum()

    assert set(verdicts(case(bad, [0.5, 0.75])).values()) == {"crash"}


def test_a_hessian_of_torch_func_that_is_wrong_is_seen_and_ours_is_right():
    norm = case(lambda x, w: (F.layer_norm(x, (3,), w) ** 3).sum(), [[0.3, -1.0, 0.4], [1.2, 0.1, -0.3]], [0.5, 1.5, -1.0])
    found = verdicts(norm, worker.CALLS)
    assert found["torch.func.hessian"] == "wrong" and {found[call] for call in worker.OURS} == {"right"}


# ------------------------------------------------------------------------------------------------------- torch's samples


class FakeOp:
    """Three functions of its inputs, of which one draws and one has nothing to differentiate."""

    def sample_inputs(self, device: str, dtype: torch.dtype, requires_grad: bool) -> Any:
        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, requires_grad=requires_grad)

        def sample(input: Any, *args: Any, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(input=input, args=args, kwargs=kwargs, output_process_fn_grad=lambda out: out)

        yield sample(tensor(2, 3), [tensor(3), 2.0], draw=False)
        yield sample(tensor(0), [tensor(1), 2.0], draw=False)
        yield sample(tensor(500), [tensor(1), 2.0], draw=False)
        yield sample(tensor(3), [tensor(3), 2.0], draw=True)

    def get_op(self) -> Any:
        def op(x: Tensor, rest: Any, draw: bool) -> Tensor:
            y = (x * rest[0]) ** rest[1]
            return y * torch.rand(3, dtype=y.dtype) if draw else y

        return op

    def gradcheck_wrapper(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)


def test_samples_become_cases(monkeypatch):
    monkeypatch.setattr(opinfo, "_database", lambda: {"fake": FakeOp()})
    first, last = opinfo.cases("fake")
    assert [first.name, last.name] == ["fake/0", "fake/3"] and [first.random, last.random] == [False, True]
    assert [tuple(t.shape) for t in first.leaves] == [(2, 3), (3,)]
    x, w = first.leaves
    assert torch.equal(first.op(2 * x, w), (2 * x * w) ** 2)
    again, _ = opinfo.cases("fake")
    assert torch.equal(x, again.leaves[0])


def test_a_random_operation_is_judged_at_one_draw(monkeypatch):
    monkeypatch.setattr(opinfo, "_database", lambda: {"fake": FakeOp()})
    _, random = opinfo.cases("fake")
    assert set(verdicts(random, ("hvp", "hessian", "hessian_rows")).values()) == {"right"}
    found = truth(random)
    assert found.draws and compare(found.H.float(), found, torch.float32)[0] == "inconclusive"


# ----------------------------------------------------------------------------------------------------------- the processes

DEADLY = """
import os, signal
import torch
from sweep import worker
from sweep.problems import Case

class Table:
    names = staticmethod(lambda: ["harmless", "deadly", "harmless too"])

    @staticmethod
    def cases(name):
        exponent = 3.0 if name == "deadly" else 2.0
        yield Case(name, lambda x: (x ** exponent).sum(), (torch.tensor([0.5, 0.75], dtype=torch.float64),))

def hvp(p):
    if p.x[0].dtype is torch.float64 and abs(p.f(*p.x) - (0.5 ** 3 + 0.75 ** 3)) < 1e-9:  # the plain readout of the deadly case
        os.kill(os.getpid(), signal.SIGKILL)
    return right(p)

right = worker.CALLS["hvp"]
worker.SOURCES["own"], worker.CALLS["hvp"] = Table, hvp
worker.serve()
"""


@pytest.mark.slow
def test_a_process_that_is_killed_costs_one_case():
    outcomes = sweep(sources=("own",), workers=1, command=(sys.executable, "-c", DEADLY))
    keys = [o.key for o in outcomes]
    assert len(keys) == len(set(keys)) == 3 * len(READOUTS) * (1 + len(worker.DTYPES) * len(worker.CALLS))
    (crashed,) = [o for o in outcomes if o.verdict == "crash"]
    assert crashed.key == "own:deadly|plain|float64|hvp" and "exit code -9" in crashed.detail
    assert {o.verdict for o in outcomes if o.call in worker.CALLS and o is not crashed} == {"right"}


BAD = """
import json, os, sys, time

def say(**line):
    print(json.dumps(line), flush=True)

say(ready=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "list" in asked:
        say(names=["a", "b", "c"])
        continue
    for call in ("one", "two", "three"):
        key = asked["group"] + "|curved|float64|" + call
        if key not in asked["skip"]:
            say(begin=key)
            if key == "b|curved|float64|two":
                DO
            say(end=key, verdict="right", detail="")
    say(done=asked["group"])
"""


@pytest.mark.parametrize(
    ("do", "told"),
    [("time.sleep(600)", "nothing said for 2 s"), ("os._exit(3)", "exit code 3"), ("raise SystemError", "exit code 1")],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_ends_or_hangs_costs_one_case(do, told, workers):
    command = (sys.executable, "-c", BAD.replace("DO", do))
    outcomes = sweep(sources=("own",), workers=workers, command=command, patience=2.0)
    assert [o.key for o in outcomes] == [f"{g}|curved|float64|{call}" for g in "abc" for call in ("one", "two", "three")]
    (crashed,) = [o for o in outcomes if o.verdict == "crash"]
    assert crashed.key == "b|curved|float64|two" and told in crashed.detail
    assert {o.verdict for o in outcomes if o is not crashed} == {"right"}


def test_a_process_that_never_starts_is_an_error():
    with pytest.raises(Died):
        sweep(sources=("own",), command=(sys.executable, "-c", "raise SystemExit(1)"))


# -------------------------------------------------------------------------------------------------------------- the counts


def outcomes_of(**verdict_of: str) -> list[Outcome]:
    return [Outcome(f"own:a case|plain|float64|{call}", verdict, "") for call, verdict in verdict_of.items()]


def test_counts_and_their_table():
    tree = counts([*outcomes_of(hvp="right", hessian="refused"), Outcome("opinfo:b/0|curved|float32|hvp", "wrong", "")])
    assert tree["own"]["float64"] == {"hvp": {"right": 1}, "hessian": {"refused": 1}}
    assert "| hvp | 1 | 0 | 0 | 1 | 0 |" in table(tree) and "| hessian | 0 | 1 | 0 | 0 | 0 |" in table(tree)


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        (outcomes_of(hvp="refused", hessian="right"), "0 right, were 1"),
        (outcomes_of(hessian="right"), "0 cases, were 1"),
        (outcomes_of(hvp="wrong", hessian="right"), "1 wrong or crashed"),
        (outcomes_of(hvp="right", hessian="right", truth="crash"), "1 wrong or crashed"),
    ],
)
def test_worse_counts_are_noticed(now, complaint):
    before = counts(outcomes_of(hvp="right", hessian="right"))
    assert any(complaint in told for told in worse(counts(now), before))
    assert worse(before, before) == []
    assert worse(counts([*outcomes_of(hvp="right", hessian="right", **{"plain jvp(grad)": "wrong"})]), before) == []
