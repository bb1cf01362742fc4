"""Small networks as functions of their parameters, and the same as functions of one vector for the oracles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Network", "network", "numbers"]


@dataclasses.dataclass(frozen=True)
class Network:
    """``f(x)`` is the loss where the parameters are ``x``, a dict of tensors whose coordinates are those of sorted names."""

    f: Callable[[dict[str, Tensor]], Tensor]
    x: dict[str, Tensor]

    @property
    def vector(self) -> Tensor:
        """The parameters as the oracles take them: float64, the names sorted, each leaf row by row."""
        return torch.cat([self.x[name].detach().double().reshape(-1) for name in sorted(self.x)])

    def of_vector(self, vector: Tensor) -> Tensor:
        """f at the coordinates of a vector."""
        return self.f(self.tree(vector))

    def tree(self, vector: Tensor) -> dict[str, Tensor]:
        """The leaves whose coordinates are those of a vector."""
        parts = vector.split([self.x[name].numel() for name in sorted(self.x)])
        leaves = {name: part.reshape(self.x[name].shape) for name, part in zip(sorted(self.x), parts, strict=True)}
        return {name: leaves[name] for name in self.x}


def network(
    make: Callable[[], nn.Module],
    *inputs: Tensor,
    loss: Callable[[Any], Tensor] = lambda out: torch.sin(1.3 * out + 0.4).sum(),
    dtype: torch.dtype = torch.float64,
    train: bool = True,
    **call: Any,
) -> Network:
    """A network with its own parameters, at inputs of its dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().to(dtype).train(train)
    given = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
    generator = torch.Generator().manual_seed(1)

    def moved(p: Tensor) -> Tensor:  # weights of one and biases of zero would hide mistakes
        return p.detach() + 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)

    def f(x: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(net, x, given, call))

    return Network(f, {name: moved(p) for name, p in net.named_parameters()})


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal float64 numbers of that shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
