"""torch's own database of operations as cases: a few sample inputs of every operation that it can differentiate."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sweep.problems import Case, float_leaves

__all__ = ["cases", "names"]

SAMPLES = 4  # of one operation
LOOKED_AT = 60  # of its sample inputs, of which those are chosen
LARGEST = (400, 20_000)  # entries of all leaves of a sample; the second where no sample is smaller than the first
BY_CONVENTION = ("nn_functional_embedding",)  # padding rows are constants


@functools.cache
def _database() -> dict[str, Any]:
    # Seconds of import, for processes that need it only.
    from torch.testing._internal.common_methods_invocations import op_db

    return {
        op.formatted_name: op for op in op_db if op.supports_autograd and torch.float64 in op.supported_backward_dtypes("cpu")
    }


def names() -> list[str]:
    return sorted(_database())


def cases(name: str) -> Iterator[Case]:
    """The cases of an operation: samples spread over those that are small enough and have something to differentiate."""
    found = next((f for f in (_found(name, largest) for largest in LARGEST) if f), [])
    wanted = min(SAMPLES, len(found))
    yield from (found[i] for i in sorted({round(i * (len(found) - 1) / max(wanted - 1, 1)) for i in range(wanted)}))


def _found(name: str, largest: int) -> list[Case]:
    op = _database()[name]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, which the samples are drawn with
    torch.manual_seed(0)
    found: list[Case] = []
    for k, sample in enumerate(op.sample_inputs("cpu", torch.float64, requires_grad=True)):
        case = _case(op, f"{name}/{k}", sample, largest)
        if case is not None:
            found.append(case)
        if k >= LOOKED_AT:
            break
    return found


def _case(op: Any, name: str, sample: Any, largest: int) -> Case | None:
    """None where there is nothing to differentiate, or too much, or what is no tensor of its own."""
    tree = (sample.input, tuple(sample.args), dict(sample.kwargs))
    every = _tensors(tree)
    leaves = [t for t in every if t.requires_grad]
    if not 0 < sum(t.numel() for t in leaves) <= largest or any(t.layout is not torch.strided or t.is_complex() for t in leaves):
        return None
    if any(t.untyped_storage().nbytes() > t.numel() * t.element_size() for t in leaves) and "as_strided" in name:
        return None  # it reads what lies outside of its argument
    constants = [t for t in every if not t.requires_grad]
    order = {id(t): i for i, t in enumerate(leaves + constants)}

    def call(*tensors: Tensor) -> Any:
        input, args, kwargs = _rebuilt(tree, lambda t: tensors[order[id(t)]])
        out = op.gradcheck_wrapper(op.get_op(), input, *args, **kwargs)
        return sample.output_process_fn_grad(out)

    state = torch.get_rng_state()
    out = call(*leaves, *constants)
    drawn = not torch.equal(state, torch.get_rng_state()) or _seeds_and_draws(lambda: call(*leaves, *constants))
    torch.set_rng_state(state)
    if not any(y.requires_grad and y.detach().isfinite().any() for y in float_leaves(out)):
        return None
    by_convention = name.split("/")[0] in BY_CONVENTION
    return Case(name, call, tuple(t.detach() for t in leaves), tuple(constants), random=drawn, by_convention=by_convention)


def _seeds_and_draws(call: Callable[[], Any]) -> bool:
    """Whether numbers are drawn at all: a ``vmap`` refuses that, be it from the call's own seed."""

    def alone(one: Tensor) -> Tensor:
        with torch.no_grad():
            call()
        return one

    try:
        torch.func.vmap(alone)(torch.zeros(1))
    except Exception as error:
        return "called random operation" in str(error)
    return False


def _tensors(tree: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def visit(node: Any) -> Any:
        found.setdefault(id(node), node)
        return node

    _rebuilt(tree, visit)
    return list(found.values())


def _rebuilt(node: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return swap(node)
    if isinstance(node, dict):
        return {key: _rebuilt(value, swap) for key, value in node.items()}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(_rebuilt(part, swap) for part in node))
    return type(node)(_rebuilt(part, swap) for part in node) if isinstance(node, (list, tuple)) else node
