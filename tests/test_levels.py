"""What a level of differentiation promises apart from the derivative itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import numbers
from oracles import relative_error
from torch import Tensor

import functional_hess as fh
from functional_hess.levels import plain

X = numbers(3)


# Plain results --------------------------------------------------------------------------------------------------------


def test_a_zero_tensor_is_made_a_tensor_of_zeros():
    (made,) = plain([torch._efficientzerotensor(2, 3, dtype=torch.float64)])
    assert not made._is_zerotensor() and made.dtype == torch.float64 and torch.equal(made, torch.zeros(2, 3).double())
    made += 1  # which a ZeroTensor refuses


def test_views_and_shared_storage_are_made_tensors_of_their_own():
    t = torch.arange(6.0).reshape(2, 3)
    made = plain([t.T, torch.ones(1).expand(4), torch._neg_view(t), t, t])
    assert [torch.equal(*pair) for pair in zip(made, [t.T, torch.ones(4), -t, t, t], strict=True)] == [True] * 5
    assert all(m.is_contiguous() and not m.is_neg() and m.untyped_storage().nbytes() >= 4 * m.numel() for m in made)
    assert made[3].data_ptr() != made[4].data_ptr()


# Compilation ----------------------------------------------------------------------------------------------------------


def f(x: Tensor) -> Tensor:
    return (x.sin() ** 2).sum()


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "grad": lambda x: fh.grad(f)(x),
    "value_and_grad": lambda x: fh.value_and_grad(f)(x)[1],
    "jvp": lambda x: fh.jvp(f, (x,), (x,))[1],
    "vjp": lambda x: fh.vjp(f, x)[1](torch.ones((), dtype=torch.float64))[0],
    "linearize": lambda x: fh.linearize(f, x)[1](x),
    "jacfwd": lambda x: fh.jacfwd(fh.grad(f))(x),
    "jacrev": lambda x: fh.jacrev(fh.grad(f))(x),
    "vmap": lambda x: fh.vmap(torch.sin)(x),
    "hvp": lambda x: fh.hvp(f, x, x),
    "grad_and_hvp": lambda x: fh.grad_and_hvp(f, x, x)[1],
    "hessian": lambda x: fh.hessian(f)(x),
    "hessian_diagonal": lambda x: fh.hessian_diagonal(f)(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_compiled_function_breaks_its_graph_at_a_derivative(call):
    def program(x: Tensor) -> Tensor:
        return call(x * 2) + 1

    torch._dynamo.reset()
    try:
        assert relative_error(torch.compile(program, backend="eager")(X), program(X)) < 1e-15
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_a_whole_graph_with_a_derivative_in_it_is_refused_at_the_line_that_says_so():
    try:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch.compiler.disable\(call\)"):
            torch.compile(lambda x: fh.hvp(f, x, x), backend="eager", fullgraph=True)(X)
    finally:
        torch._dynamo.reset()
