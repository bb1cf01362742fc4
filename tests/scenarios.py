"""The table of functions whose derivatives are known: each value, gradient, Hessian and pattern is written out by hand.

Nothing here differentiates and nothing here is taken from the package, so that a row can judge it. Conventions:

* A tree's coordinates are the entries of its floating-point leaves in the order of `leaves`: the keys of a dict
  sorted, everything else as it stands, each leaf row by row.
* Leaves that are not floating-point tensors (`None`, ints, strings, integer tensors) are carried along: `None` stands
  in their place in the gradient, in the rows of the Hessian (`hessian[p] is None`) and in its columns (`hessian[q][p]
  is None`).
* `hessian[p][q]` has shape `x[p].shape + x[q].shape`; for a vector-valued function `out.shape + x[p].shape +
  x[q].shape`.
* `pattern` is an (n, n) array of booleans: where the Hessian can differ from zero at *some* point (for a
  vector-valued function, in some component of the output). It is wider than the non-zeros at the point only where the
  formula happens to vanish.

Tensors are shared by all tests, and `conftest.py` holds every test to leaving them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "SCENARIOS",
    "VECTOR_SCENARIOS",
    "Scenario",
    "by_name",
    "dense_gradient",
    "dense_hessian",
    "flat_function",
    "leaves",
    "rebuild",
    "tensors",
]

Tree = Any


@dataclass(frozen=True)
class Scenario:
    """A function `f(x, *args)`, a point `x`, and what is true of `f` there."""

    name: str
    f: Callable[..., Tensor]
    x: Tree
    args: tuple
    value: Tensor
    gradient: Tree  # like x; for a vector-valued f the leaves have shape out.shape + leaf.shape
    hessian: Tree  # a tree like x of trees like x
    pattern: np.ndarray  # (n, n), bool

    @property
    def n(self) -> int:
        """The number of coordinates."""
        return sum(leaf.numel() for leaf in tensors(self.x))

    def __str__(self) -> str:
        return self.name


# ----------------------------------------------------------------------------------------------------------------------
# Trees, walked in the order of the coordinates.


def leaves(tree: Tree) -> Iterator[Any]:
    """Every leaf of a tree of dicts, lists, tuples and named tuples, `None` counted as a leaf."""
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from leaves(tree[key])
    elif isinstance(tree, (list, tuple)):
        for child in tree:
            yield from leaves(child)
    else:
        yield tree


def is_differentiated(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def tensors(tree: Tree) -> tuple[Tensor, ...]:
    """The differentiated leaves, in the order of the coordinates."""
    return tuple(leaf for leaf in leaves(tree) if is_differentiated(leaf))


def rebuild(tree: Tree, replacements: Iterator[Tensor]) -> Tree:
    """`tree` with its differentiated leaves replaced in order, the others carried along."""
    if isinstance(tree, dict):
        children = {key: rebuild(tree[key], replacements) for key in sorted(tree)}
        return {key: children[key] for key in tree}
    if isinstance(tree, (list, tuple)):
        items = [rebuild(child, replacements) for child in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return next(replacements) if is_differentiated(tree) else tree


def flat_function(scenario: Scenario) -> Callable[..., Tensor]:
    """`f` as a function of its differentiated leaves alone, given one by one."""
    return lambda *replacements: scenario.f(rebuild(scenario.x, iter(replacements)), *scenario.args)


def dense_gradient(scenario: Scenario) -> Tensor:
    """The hand-written gradient as one tensor of shape out.shape + (n,)."""
    out_shape = scenario.value.shape
    return torch.cat([leaf.reshape(*out_shape, -1) for leaf in tensors(scenario.gradient)], dim=-1)


def dense_hessian(scenario: Scenario) -> Tensor:
    """The hand-written Hessian as one tensor of shape out.shape + (n, n)."""
    out_shape, points = scenario.value.shape, tensors(scenario.x)
    blocks = iter(tensors(scenario.hessian))  # rows outside, columns inside
    rows = [torch.cat([next(blocks).reshape(*out_shape, p.numel(), q.numel()) for q in points], -1) for p in points]
    return torch.cat(rows, dim=-2)


def by_name(name: str) -> Scenario:
    """The scenario of that name, of either table."""
    return next(scenario for scenario in SCENARIOS + VECTOR_SCENARIOS if scenario.name == name)


# ----------------------------------------------------------------------------------------------------------------------
# Words for the formulas below.


def t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def everywhere(n: int) -> np.ndarray:
    return np.ones((n, n), dtype=bool)


def nowhere(n: int) -> np.ndarray:
    return np.zeros((n, n), dtype=bool)


def drawn(*rows: str) -> np.ndarray:
    """A pattern as a picture: `x` where the Hessian may differ from zero."""
    return np.array([[mark == "x" for mark in row.split()] for row in rows], dtype=bool)


# ----------------------------------------------------------------------------------------------------------------------
# Bare tensors.


def quadratic_form() -> Scenario:
    """x'Ax/2 + b'x with an asymmetric A: only its symmetric part S is seen, gradient Sx + b, Hessian S."""
    A, b, x = t([[2.0, 1.0, 0.0], [3.0, -4.0, 6.0], [-1.0, 0.0, 5.0]]), t([1.0, -2.0, 0.5]), t([0.5, -1.0, 2.0])
    S = t([[2.0, 2.0, -0.5], [2.0, -4.0, 3.0], [-0.5, 3.0, 5.0]])
    return Scenario(
        name="quadratic_form",
        f=lambda x: x @ A @ x / 2 + b @ x,
        x=x,
        args=(),
        value=t(4.25),  # Ax = (0, 17.5, 9.5), x'Ax = 1.5, b'x = 3.5
        gradient=t([-1.0, 9.0, 7.25]),
        hessian=S,
        pattern=everywhere(3),
    )


def cubic_sum() -> Scenario:
    """The sum of a_ij x_ij^3: gradient 3 a x^2, Hessian 6 a x on the diagonal."""
    a, x = t([[1.0, -2.0, 0.5], [3.0, 1.5, -1.0]]), t([[1.0, 2.0, -1.0], [0.5, -0.25, 3.0]])
    diagonal = [6.0, -24.0, -3.0, 9.0, -2.25, -18.0]
    return Scenario(
        name="cubic_sum",
        f=lambda x, a: (a * x**3).sum(),
        x=x,
        args=(a,),
        value=t(1.0 - 16.0 - 0.5 + 0.375 - 0.0234375 - 27.0),
        gradient=t([[3.0, -24.0, 1.5], [2.25, 0.28125, -27.0]]),
        hessian=torch.diag(t(diagonal)).reshape(2, 3, 2, 3),
        pattern=np.eye(6, dtype=bool),
    )


def chained_rosenbrock() -> Scenario:
    """The sum of 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2: a tridiagonal Hessian."""
    x = t([-1.2, 1.0, 0.7, -0.3, 0.4])
    head, tail = x[:-1], x[1:]
    gap = tail - head**2
    g = zeros(5)
    g[:-1] += -400 * head * gap - 2 * (1 - head)
    g[1:] += 200 * gap
    diagonal, beside = zeros(5), -400 * head
    diagonal[:-1] += 1200 * head**2 - 400 * tail + 2
    diagonal[1:] += 200
    return Scenario(
        name="chained_rosenbrock",
        f=lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(),
        x=x,
        args=(),
        value=t(100 * (0.44**2 + 0.3**2 + 0.79**2 + 0.31**2) + 2.2**2 + 0.3**2 + 1.3**2),
        gradient=g,
        hessian=torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1),
        pattern=drawn("x x . . .", "x x x . .", ". x x x .", ". . x x x", ". . . x x"),
    )


def log_sum_exp() -> Scenario:
    """log sum exp x: with p = softmax x the gradient is p and the Hessian diag(p) - pp'."""
    x = t([0.3, -1.0, 2.0, 0.0])
    p = x.exp() / x.exp().sum()
    return Scenario(
        name="log_sum_exp",
        f=lambda x: torch.logsumexp(x, 0),
        x=x,
        args=(),
        value=x.exp().sum().log(),
        gradient=p,
        hessian=torch.diag(p) - p[:, None] * p[None, :],
        pattern=everywhere(4),
    )


def lennard_jones_pair() -> Scenario:
    """4 (r^-12 - r^-6) of two atoms in space: K = phi'' uu' + phi'/r (I - uu') on the diagonal, -K beside it."""
    x = t([[0.1, 0.2, -0.3], [1.0, -0.4, 0.6]])
    d = x[0] - x[1]
    r = (d @ d) ** 0.5
    u = d / r
    slope, curvature = -48 * r**-13 + 24 * r**-7, 624 * r**-14 - 168 * r**-8
    along = u[:, None] * u[None, :]
    K = curvature * along + slope / r * (eye(3) - along)
    hessian = zeros(2, 3, 2, 3)
    hessian[0, :, 0], hessian[1, :, 1], hessian[0, :, 1], hessian[1, :, 0] = K, K, -K, -K

    def energy(x: Tensor) -> Tensor:
        inverse_sixth = ((x[0] - x[1]) ** 2).sum() ** -3
        return 4 * (inverse_sixth**2 - inverse_sixth)

    return Scenario(
        name="lennard_jones_pair",
        f=energy,
        x=x,
        args=(),
        value=4 * (r**-12 - r**-6),
        gradient=torch.stack([slope * u, -slope * u]),
        hessian=hessian,
        pattern=everywhere(6),
    )


def least_squares() -> Scenario:
    """||XW - Y||^2 in the matrix W: d2f/dW_ij dW_kl = 2 (X'X)_ik [j = l], and row by row that is 2 X'X (kron) I."""
    X, Y = (
        t([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0], [3.0, 1.0, -2.0], [1.0, 0.0, 1.0]]),
        t([[1.0, 0], [2, -1], [0, 3], [1, 1]]),
    )
    W = t([[0.5, -1.0], [1.0, 0.25], [-0.5, 2.0]])
    gram = t([[11.0, 5.0, -5.0], [5.0, 6.0, -3.0], [-5.0, -3.0, 6.0]])  # X'X
    residual = t([[1.5, -0.5], [-3.5, 2.75], [3.5, -9.75], [-1.0, 0.0]])  # XW - Y
    hessian = zeros(3, 2, 3, 2)
    for i in range(3):
        for k in range(3):
            for j in range(2):
                hessian[i, j, k, j] = 2 * gram[i, k]
    return Scenario(
        name="least_squares",
        f=lambda W, X, Y: ((X @ W - Y) ** 2).sum(),
        x=W,
        args=(X, Y),
        value=t(1.5**2 + 0.5**2 + 3.5**2 + 2.75**2 + 3.5**2 + 9.75**2 + 1.0),
        gradient=2 * X.T @ residual,
        hessian=hessian,
        pattern=drawn("x . x . x .", ". x . x . x", "x . x . x .", ". x . x . x", "x . x . x .", ". x . x . x"),
    )


def arrow() -> Scenario:
    """x_0 times the sum of the squares of the others: a border, a diagonal, and nothing in the corner."""
    x = t([3.0, 1.0, -2.0, 0.5, 4.0])
    hessian = 6 * eye(5)
    hessian[0, :] = hessian[:, 0] = t([0.0, 2.0, -4.0, 1.0, 8.0])
    return Scenario(
        name="arrow",
        f=lambda x: x[0] * (x[1:] ** 2).sum(),
        x=x,
        args=(),
        value=t(63.75),
        gradient=t([21.25, 6.0, -12.0, 3.0, 24.0]),
        hessian=hessian,
        pattern=drawn(". x x x x", "x x . . .", "x . x . .", "x . . x .", "x . . . x"),
    )


def linear() -> Scenario:
    """c'x: its second derivative is zero, and that is the answer."""
    x, c = t([1.0, -2.0, 0.25]), t([2.0, 0.5, -8.0])
    return Scenario(
        name="linear",
        f=lambda x: c @ x,
        x=x,
        args=(),
        value=t(-1.0),
        gradient=c,
        hessian=zeros(3, 3),
        pattern=nowhere(3),
    )


def fourth_power_of_a_number() -> Scenario:
    """x^4 of a 0-d tensor: 4 x^3 and 12 x^2, 0-d as well."""
    return Scenario(
        name="fourth_power_of_a_number",
        f=lambda x: x**4,
        x=t(-1.5),
        args=(),
        value=t(5.0625),
        gradient=t(-13.5),
        hessian=t(27.0),
        pattern=everywhere(1),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Trees.


def bilinear() -> Scenario:
    """u'Wv over an unsorted dict: d2f/du_i dW_kl = [i = k] v_l, d2f/dv_j dW_kl = u_k [j = l], d2f/du dv = W."""
    W, u, v = t([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]]), t([2.0, -1.0]), t([0.5, 1.0, -3.0])
    uW = eye(2)[:, :, None] * v  # (2, 2, 3)
    vW = eye(3)[:, None, :] * u[None, :, None]  # (3, 2, 3)
    return Scenario(
        name="bilinear",
        f=lambda x: x["u"] @ x["w"] @ x["v"],
        x={"w": W, "u": u, "v": v},
        args=(),
        value=t(-10.75),
        gradient={"w": t([[1.0, 2.0, -6.0], [-0.5, -1.0, 3.0]]), "u": t([-3.0, 4.75]), "v": t([-1.0, -4.25, 2.0])},
        hessian={
            "w": {"w": zeros(2, 3, 2, 3), "u": uW.permute(1, 2, 0), "v": vW.permute(1, 2, 0)},
            "u": {"w": uW, "u": zeros(2, 2), "v": W},
            "v": {"w": vW, "u": W.T, "v": zeros(3, 3)},
        },
        pattern=drawn(
            ". . x x x x x x . . .",  # u_0: v, and the first row of W
            ". . x x x . . . x x x",
            "x x . . . x . . x . .",  # v_0: u, and the first column of W
            "x x . . . . x . . x .",
            "x x . . . . . x . . x",
            "x . x . . . . . . . .",  # W_00: u_0 and v_0
            "x . . x . . . . . . .",
            "x . . . x . . . . . .",
            ". x x . . . . . . . .",
            ". x . x . . . . . . .",
            ". x . . x . . . . . .",
        ),
    )


def logistic_regression() -> Scenario:
    """The mean of log(1 + e^z) - y z, z = Xw + b, the data given as arguments: Hessian X' diag(p (1-p)) X / m."""
    X = t([[1.0, 0.5, -1.0], [0.0, 2.0, 1.0], [-1.0, 1.0, 0.5], [2.0, -0.5, 1.5], [0.25, 1.0, -2.0]])
    y, w, b = t([1.0, 0.0, 1.0, 0.0, 1.0]), t([0.4, -0.3, 0.2]), t(0.1)
    z = X @ w + b
    p = 1 / (1 + torch.exp(-z))
    s = p * (1 - p) / 5

    def loss(x: Tree, X: Tensor, y: Tensor) -> Tensor:
        z = X @ x["weight"] + x["bias"]
        return (torch.nn.functional.softplus(z) - y * z).mean()

    return Scenario(
        name="logistic_regression",
        f=loss,
        x={"weight": w, "bias": b},
        args=(X, y),
        value=(torch.log(1 + torch.exp(z)) - y * z).sum() / 5,
        gradient={"weight": X.T @ (p - y) / 5, "bias": (p - y).sum() / 5},
        hessian={
            "weight": {"weight": X.T @ (s[:, None] * X), "bias": X.T @ s},
            "bias": {"weight": X.T @ s, "bias": s.sum()},
        },
        pattern=everywhere(4),
    )


def product_of_leaves() -> Scenario:
    """abc of three 0-d leaves in a nested tuple: nothing on the diagonal."""
    a, b, c = t(2.0), t(-3.0), t(0.5)
    return Scenario(
        name="product_of_leaves",
        f=lambda x: x[0] * x[1][0] * x[1][1][0],
        x=(a, (b, [c])),
        args=(),
        value=t(-3.0),
        gradient=(t(-1.5), (t(1.0), [t(-6.0)])),
        hessian=(
            (t(0.0), (t(0.5), [t(-3.0)])),
            ((t(0.5), (t(0.0), [t(2.0)])), [(t(-3.0), (t(2.0), [t(0.0)]))]),
        ),
        pattern=drawn(". x x", "x . x", "x x ."),
    )


def exponential_of_a_mixed_tree() -> Scenario:
    """exp(c'x) over all leaves: value e, gradient e c, Hessian e cc', with a dict, a list, a tuple and a 0-d leaf."""
    x = {"z": t([0.5, -0.25]), "a": (t(0.75), [t([[0.1, 0.2, -0.3]])])}
    cz, c0, c1 = t([1.0, -2.0]), t(0.5), t([[2.0, -1.0, 3.0]])
    e = torch.exp(t(0.5 + 0.5 + 0.375 + 0.2 - 0.2 - 0.9))

    def f(x: Tree) -> Tensor:
        return torch.exp((cz * x["z"]).sum() + c0 * x["a"][0] + (c1 * x["a"][1][0]).sum())

    def row(c: Tensor) -> Tree:
        """The blocks of the row of a leaf with coefficients c: e times the outer product with each leaf's."""
        return {"z": e * outer(c, cz), "a": (e * outer(c, c0), [e * outer(c, c1)])}

    return Scenario(
        name="exponential_of_a_mixed_tree",
        f=f,
        x=x,
        args=(),
        value=e,
        gradient={"z": e * cz, "a": (e * c0, [e * c1])},
        hessian={"z": row(cz), "a": (row(c0), [row(c1)])},
        pattern=everywhere(6),
    )


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Shape a.shape + b.shape."""
    return a.reshape(a.shape + (1,) * b.ndim) * b


class Oscillator(NamedTuple):
    position: Tensor
    momentum: Tensor
    mass: Tensor


def energy_of_an_oscillator() -> Scenario:
    """p'p / 2m + 3 q'q over a named tuple: d2f/dp dm = -p / m^2 and d2f/dm2 = p'p / m^3."""
    q, p, m = t([1.0, -0.5]), t([3.0, 4.0]), t(2.0)
    return Scenario(
        name="energy_of_an_oscillator",
        f=lambda x: (x.momentum**2).sum() / (2 * x.mass) + 3 * (x.position**2).sum(),
        x=Oscillator(q, p, m),
        args=(),
        value=t(10.0),
        gradient=Oscillator(t([6.0, -3.0]), t([1.5, 2.0]), t(-3.125)),
        hessian=Oscillator(
            position=Oscillator(6 * eye(2), zeros(2, 2), zeros(2)),
            momentum=Oscillator(zeros(2, 2), eye(2) / 2, t([-0.75, -1.0])),
            mass=Oscillator(zeros(2), t([-0.75, -1.0]), t(3.125)),
        ),
        pattern=drawn("x . . . .", ". x . . .", ". . x . x", ". . . x x", ". . x x x"),
    )


def leaves_carried_along() -> Scenario:
    """depth * sum of counts * w^3 among an int, a string, a `None` and an integer tensor, not differentiated."""
    w, counts = t([0.5, -2.0]), torch.tensor([3, 1])
    gone = {"name": None, "depth": None, "nothing": None, "counts": None}
    return Scenario(
        name="leaves_carried_along",
        f=lambda x: x["depth"] * (x["counts"] * x["weights"] ** 3).sum() if x["name"] == "cube" else x["nothing"],
        x={"weights": w, "name": "cube", "depth": 2, "nothing": None, "counts": counts},
        args=(),
        value=t(-15.25),
        gradient={"weights": t([4.5, 24.0]), **gone},
        hessian={"weights": {"weights": t([[18.0, 0.0], [0.0, -24.0]]), **gone}, **gone},
        pattern=drawn("x .", ". x"),
    )


def empty_leaf() -> Scenario:
    """The sum of sin over a tree with a leaf of shape (0,): its blocks are there, and empty."""
    x = t([0.5, 1.0, -2.0])
    return Scenario(
        name="empty_leaf",
        f=lambda x: torch.sin(x["b"]).sum() + torch.sin(x["a"]).sum(),
        x={"b": x, "a": zeros(0)},
        args=(),
        value=x.sin().sum(),
        gradient={"b": x.cos(), "a": zeros(0)},
        hessian={
            "b": {"b": torch.diag(-x.sin()), "a": zeros(3, 0)},
            "a": {"b": zeros(0, 3), "a": zeros(0, 0)},
        },
        pattern=np.eye(3, dtype=bool),
    )


def leaf_without_influence() -> Scenario:
    """x_0^2 x_1 over a list whose second leaf is not used: zeros there, not an error."""
    return Scenario(
        name="leaf_without_influence",
        f=lambda x: x[0][0] ** 2 * x[0][1],
        x=[t([3.0, -2.0]), t([1.0, 5.0, 7.0])],
        args=(),
        value=t(-18.0),
        gradient=[t([-12.0, 9.0]), zeros(3)],
        hessian=[[t([[-4.0, 6.0], [6.0, 0.0]]), zeros(2, 3)], [zeros(3, 2), zeros(3, 3)]],
        pattern=drawn("x x . . .", "x . . . .", ". . . . .", ". . . . .", ". . . . ."),
    )


def gaussian_likelihood() -> Scenario:
    """The sum of s + (y - m)^2 e^-2s / 2 in the mean m and the log scale s, both 0-d, the data given as an argument."""
    y, m, s = t([1.0, 2.0, 4.0, 0.5]), t(1.5), t(-0.5)
    q = torch.exp(t(1.0))  # e^-2s; the residuals are (-0.5, 0.5, 2.5, -1), their sum 1.5 and their squares' 7.75
    return Scenario(
        name="gaussian_likelihood",
        f=lambda x, y: (x["scale"] + (y - x["mean"]) ** 2 * torch.exp(-2 * x["scale"]) / 2).sum(),
        x={"scale": s, "mean": m},
        args=(y,),
        value=-2 + 7.75 * q / 2,
        gradient={"scale": 4 - 7.75 * q, "mean": -1.5 * q},
        hessian={"scale": {"scale": 15.5 * q, "mean": 3 * q}, "mean": {"scale": 3 * q, "mean": 4 * q}},
        pattern=everywhere(2),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Vector-valued functions.


def two_monomials() -> Scenario:
    """(x_0^2 x_1, x_1 x_2^2): one Hessian per component."""
    return Scenario(
        name="two_monomials",
        f=lambda x: torch.stack([x[0] ** 2 * x[1], x[1] * x[2] ** 2]),
        x=t([1.0, -2.0, 3.0]),
        args=(),
        value=t([-2.0, -18.0]),
        gradient=t([[-4.0, 1.0, 0.0], [0.0, 9.0, -12.0]]),
        hessian=t(
            [
                [[-4.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
                [[0.0, 0.0, 0.0], [0.0, 0.0, 6.0], [0.0, 6.0, -4.0]],
            ]
        ),
        pattern=drawn("x x .", "x . x", ". x x"),
    )


def scaled_direction() -> Scenario:
    """c_i b a_0^2 + d_i a_1 in three components, over an unsorted dict with a 0-d leaf."""
    c, d, b, a = t([1.0, -2.0, 0.5]), t([3.0, 0.0, 1.0]), t(2.0), t([0.5, -1.0])
    aa = zeros(3, 2, 2)
    aa[:, 0, 0] = 4 * c  # 2 c b
    ab = torch.stack([c, zeros(3)], dim=1)  # 2 c a_0
    return Scenario(
        name="scaled_direction",
        f=lambda x: c * x["b"] * x["a"][0] ** 2 + d * x["a"][1],
        x={"b": b, "a": a},
        args=(),
        value=t([-2.5, -1.0, -0.75]),
        gradient={"b": c / 4, "a": torch.stack([2 * c, d], dim=1)},
        hessian={"b": {"b": zeros(3), "a": ab}, "a": {"b": ab, "a": aa}},
        pattern=drawn("x . x", ". . .", "x . ."),
    )


def weighted_gram_matrix() -> Scenario:
    """x D x' of a (2, 3) matrix, D diagonal: d2f_ij / dx_ab dx_ce = D_b [b = e] ([i = a][j = c] + [j = a][i = c])."""
    D, x = t([2.0, -1.0, 0.5]), t([[1.0, 2.0, -1.0], [0.5, 0.0, 4.0]])
    jacobian, hessian = zeros(2, 2, 2, 3), zeros(2, 2, 2, 3, 2, 3)
    for i in range(2):
        for j in range(2):
            for b in range(3):
                jacobian[i, j, i, b] += D[b] * x[j, b]
                jacobian[i, j, j, b] += D[b] * x[i, b]
                hessian[i, j, i, b, j, b] += D[b]
                hessian[i, j, j, b, i, b] += D[b]
    return Scenario(
        name="weighted_gram_matrix",
        f=lambda x: (x * D) @ x.T,
        x=x,
        args=(),
        value=t([[-1.5, -1.0], [-1.0, 8.5]]),
        gradient=jacobian,
        hessian=hessian,
        pattern=drawn("x . . x . .", ". x . . x .", ". . x . . x", "x . . x . .", ". x . . x .", ". . x . . x"),
    )


SCENARIOS: tuple[Scenario, ...] = (
    quadratic_form(),
    cubic_sum(),
    chained_rosenbrock(),
    log_sum_exp(),
    lennard_jones_pair(),
    least_squares(),
    arrow(),
    linear(),
    fourth_power_of_a_number(),
    bilinear(),
    logistic_regression(),
    product_of_leaves(),
    exponential_of_a_mixed_tree(),
    energy_of_an_oscillator(),
    leaves_carried_along(),
    empty_leaf(),
    leaf_without_influence(),
    gaussian_likelihood(),
)

VECTOR_SCENARIOS: tuple[Scenario, ...] = (two_monomials(), scaled_direction(), weighted_gram_matrix())
