"""Random calls: each is right, or an error that names what is wrong; nothing the caller owns is written to, nothing leaks.

A call is a matter of its number alone: `call(k)` makes it anew, with a tree, a function, layouts, dtypes, options and often a
mistake drawn from `random.Random(k)`. Truth is plain double backward in float64, entry by entry. A failure names the number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import math
import random
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import oracles
import pytest
import scenarios
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import functional_hess as fh

CALLS = 2000
BLOCK = 125
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}
SHAPES = ((), (), (1,), (2,), (3,), (2, 2), (1, 3), (2, 1, 2), (0,), (2, 0))
MODES = ("auto", "auto", "forward-over-reverse", "reverse-over-reverse", "double-backward")
CARRIED = (None, 3, "name", True, torch.tensor([1, 2]), torch.tensor(True))


class Pair(NamedTuple):
    first: Any
    second: Any


# Trees ------------------------------------------------------------------------------------------------------------------


def drawn_tree(rng: random.Random, leaf: Callable[[], Any], depth: int = 2) -> Any:
    kind = rng.choice(("leaf", "dict", "tuple", "list", "pair")) if depth else "leaf"
    below = lambda: drawn_tree(rng, leaf, depth - 1)  # noqa: E731
    if kind == "dict":
        return {key: below() for key in rng.sample(["w", "b", "layer 1", "a"], rng.randint(1, 2))}
    if kind == "pair":
        return Pair(below(), below())
    if kind in ("tuple", "list"):
        items = [below() for _ in range(rng.randint(1, 2))]
        return items if kind == "list" else tuple(items)
    return leaf()


def drawn_tensor(rng: random.Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in a layout of many, with or without requires_grad."""

    def dense(*shape: int) -> Tensor:
        entries = [rng.uniform(-1.5, 1.5) for _ in range(math.prod(shape))]
        return torch.tensor(entries, dtype=torch.float64).reshape(shape).to(dtype)

    layout = rng.choice(("plain", "plain", "transposed", "strided", "expanded", "offset", "negative"))
    if layout == "transposed":
        t = dense(*reversed(shape)).permute(tuple(reversed(range(len(shape)))))
    elif layout == "strided" and shape:
        t = dense(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "expanded":
        t = dense(*(1 if rng.random() < 0.5 and extent else extent for extent in shape)).expand(shape)
    elif layout == "offset":
        t = dense(math.prod(shape) + 1)[1:].view(shape)
    elif layout == "negative" and shape:
        t = dense(*shape).flip(0)
    else:
        t = dense(*shape)
    return t.detach().requires_grad_() if rng.random() < 0.15 else t


def drawn_point(rng: random.Random, dtypes: Sequence[torch.dtype], carried: bool = True) -> Any:
    """A tree with at least one floating tensor, and at most six coordinates to a leaf."""

    def leaf() -> Any:
        if carried and rng.random() < 0.2:
            return rng.choice(CARRIED)
        return drawn_tensor(rng, rng.choice(SHAPES), rng.choice(dtypes))

    while True:
        tree = drawn_tree(rng, leaf)
        if scenarios.tensors(tree) and sum(t.numel() for t in scenarios.tensors(tree)) <= 12:
            return tree


def drawn_like(rng: random.Random, x: Any) -> Any:
    """A tangent at x: other numbers, other layouts; `None` or the leaf itself at carried leaves."""
    fresh = iter([drawn_tensor(rng, t.shape, t.dtype).detach() for t in scenarios.tensors(x)])
    v = scenarios.rebuild(x, fresh)
    return v if rng.random() < 0.5 else mapped(v, lambda leaf: leaf if scenarios.is_differentiated(leaf) else None)


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """The tree with every leaf replaced, `None` counted as one."""
    if isinstance(tree, dict):
        return {key: mapped(child, function) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [mapped(child, function) for child in tree]
        return type(tree)(*items) if isinstance(tree, Pair) else type(tree)(items)
    return function(tree)


# Functions --------------------------------------------------------------------------------------------------------------

UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sin,
    torch.tanh,
    torch.sigmoid,
    torch.square,
    lambda x: x**3,
    lambda x: torch.exp(0.4 * x),
    lambda x: 1 / (2 + x * x),
    lambda x: torch.log1p(x * x),
    lambda x: x * torch.cos(x),
    lambda x: 0.7 * x,
)


def drawn_formula(rng: random.Random, leaves: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """A smooth scalar function of some of the leaves: sums of functions of one, products of sums, neighbors."""
    used = [i for i in range(leaves) if rng.random() < 0.9] or [0]
    alone = [(i, rng.choice(UNARY), rng.uniform(-2, 2)) for i in used]
    pairs = [(rng.choice(used), rng.choice(used), rng.choice(UNARY), rng.choice(UNARY)) for _ in range(rng.randint(0, 3))]
    near = [i for i in used if rng.random() < 0.4]

    def formula(x: Sequence[Tensor]) -> Tensor:
        total = sum((c * phi(x[i])).sum() for i, phi, c in alone)
        for i, j, phi, psi in pairs:
            total = total + phi(x[i]).sum() * psi(x[j]).sum()
        for i in near:
            row = x[i].reshape(-1)
            total = total + (row[:-1] * row[1:].sin()).sum()
        return total

    return formula


@dataclasses.dataclass(frozen=True)
class Function:
    """f(x, y, scale=1): one formula, or several in a tree with something that is no tensor."""

    formulas: tuple[Callable[[Sequence[Tensor]], Tensor], ...]
    scalar: bool
    has_aux: bool

    def __call__(self, x: Any, y: Any, *, scale: float = 1.0) -> Any:
        leaves = [*scenarios.tensors(x), *scenarios.tensors(y)]
        counted = sum(leaf for leaf in scenarios.leaves(x) if isinstance(leaf, int))
        values = [scale * (1 + 0.1 * counted) * formula(leaves) for formula in self.formulas]
        out = values[0] if self.scalar else {"v": torch.stack(values[1:]), "count": 3, "a": (values[0],)}
        return (out, {"first": values[0], "tag": "aux"}) if self.has_aux else out

    def flat(self, *args: Any, **kwargs: Any) -> Tensor:
        """All values as one tensor, in the order of the coordinates of the result."""
        out = self(*args, **kwargs)
        out = out[0] if self.has_aux else out
        return out if self.scalar else torch.cat([out["a"][0].reshape(1), out["v"]])


# Calls ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """`run()` returns the tensors of a result; `expected()` what they are; or `error` tells what must be raised."""

    title: str
    inputs: tuple[Any, ...]
    run: Callable[[], Sequence[Tensor]]
    expected: Callable[[], Sequence[Tensor]]
    tolerance: float
    error: tuple[type[BaseException], str] | None = None
    watched: bool = False
    gradient: Callable[[], Sequence[Tensor]] = list
    poisoned: bool = False


@dataclasses.dataclass
class Setting:
    """What is drawn before the transform is: a function at a point."""

    rng: random.Random
    f: Function
    args: list[Any]
    kwargs: dict[str, Any]
    argnums: int | tuple[int, ...]

    @property
    def chosen(self) -> Any:
        return self.args[self.argnums] if isinstance(self.argnums, int) else tuple(self.args[i] for i in self.argnums)

    def of_leaves(self, *tensors: Tensor) -> Tensor:
        """The values as a function of the chosen coordinates, the other arguments in float64 too."""
        args = [wide(arg) for arg in self.args]
        part = scenarios.rebuild(self.chosen, iter(tensors))
        for i, tree in (
            zip([self.argnums], [part], strict=True) if isinstance(self.argnums, int) else zip(self.argnums, part, strict=True)
        ):
            args[i] = tree
        return self.f.flat(*args, **self.kwargs)

    @property
    def leaves(self) -> list[Tensor]:
        return [t.detach().double() for t in scenarios.tensors(self.chosen)]

    def value(self) -> Tensor:
        return self.of_leaves(*self.leaves).detach()

    def gradient(self) -> list[Tensor]:
        return list(oracles.gradient(self.of_leaves, self.leaves))

    def hessian(self) -> list[list[Tensor]]:
        return [list(row) for row in oracles.hessian(self.of_leaves, self.leaves)]

    def matrix(self) -> Tensor:
        return oracles.matrix(self.hessian(), self.leaves)


def wide(tree: Any) -> Any:
    return mapped(tree, lambda leaf: leaf.detach().double() if scenarios.is_differentiated(leaf) else leaf)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [part.reshape(t.shape) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


def drawn_setting(rng: random.Random, scalar: bool, has_aux: bool, argnums: Any = None, carried: bool = True) -> Setting:
    dtypes = rng.choice([(torch.float64,)] * 3 + [(torch.float32,)] * 2 + [(torch.float64, torch.float32)])
    args = [drawn_point(rng, dtypes, carried), drawn_point(rng, dtypes, carried)]
    count = sum(len(scenarios.tensors(arg)) for arg in args)
    formulas = tuple(drawn_formula(rng, count) for _ in range(1 if scalar else 3))
    kwargs = {"scale": 1.3} if rng.random() < 0.3 else {}
    argnums = rng.choice((0, 0, 1, -1, (0, 1), (1,), (1, 0))) if argnums is None else argnums
    return Setting(rng, Function(formulas, scalar, has_aux), args, kwargs, argnums)


def found(result: Any) -> tuple[Tensor, ...]:
    return scenarios.tensors(result)


def taken(out: Any, has_aux: bool, s: Setting) -> tuple[Tensor, ...]:
    """The tensors of a result, once its aux has been looked at."""
    if not has_aux:
        return found(out)
    result, aux = out
    assert aux["tag"] == "aux" and isinstance(aux["first"], Tensor)
    return found(result)


def first_order(rng: random.Random) -> Iterator[tuple[str, Setting, Callable[[], Any], Callable[[], Any]]]:
    has_aux = rng.random() < 0.3
    scalar, vector = drawn_setting(rng, True, has_aux), drawn_setting(rng, False, has_aux)
    options = {"has_aux": has_aux}
    kind = rng.choice(("grad", "value_and_grad", "jvp", "vjp", "jacfwd", "jacrev", "linearize"))
    if kind == "grad":
        s = scalar
        yield kind, s, lambda: taken(fh.grad(s.f, s.argnums, **options)(*s.args, **s.kwargs), has_aux, s), s.gradient
    elif kind == "value_and_grad":
        s = scalar

        def both() -> Any:
            value, g = fh.value_and_grad(s.f, s.argnums, **options)(*s.args, **s.kwargs)
            return [value[0] if has_aux else value, *found(g)]

        yield kind, s, both, lambda: [s.value(), *s.gradient()]
    elif kind in ("jacfwd", "jacrev"):
        s, chunk = vector, rng.choice((None, 1, 2, 5))
        transform = getattr(fh, kind)

        def jacobian() -> Any:
            return taken(transform(s.f, s.argnums, chunk_size=chunk, **options)(*s.args, **s.kwargs), has_aux, s)

        yield kind, s, jacobian, lambda: blocks_of_outputs(s.gradient())
    else:
        s = drawn_setting(rng, False, has_aux if kind != "linearize" else False, argnums=(0, 1))
        s.kwargs.clear()
        v = tuple(drawn_like(rng, arg) for arg in s.args)

        def pushed() -> Any:
            if kind == "jvp":
                out = fh.jvp(s.f, tuple(s.args), v, **options)
                return [*found(out[0]), *found(out[1])]
            if kind == "linearize":
                out, push = fh.linearize(s.f, *s.args)
                return [*found(out), *found(push(*v))]
            out, pull, *_ = fh.vjp(s.f, *s.args, **options)
            u = mapped(out, lambda leaf: torch.ones_like(leaf) if scenarios.is_differentiated(leaf) else None)
            return [*found(out), *found(pull(u))]

        def truth() -> Any:
            value, rows = s.value(), s.gradient()  # rows[p]: (3, *p.shape)
            if kind == "vjp":
                return [value[0], value[1:], *(row.sum(0) for row in rows)]
            moved = sum(row.reshape(3, -1) @ flat([d]) for row, d in zip(rows, found(v), strict=True))
            return [value[0], value[1:], moved[0], moved[1:]]

        yield kind, s, pushed, truth


def blocks_of_outputs(rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows (3, *p.shape) as the blocks of {"a": (first,), "v": rest}."""
    return [row[0] for row in rows] + [row[1:] for row in rows]


def second_order(rng: random.Random) -> Iterator[tuple[str, Setting, Callable[[], Any], Callable[[], Any]]]:
    has_aux, mode = rng.random() < 0.3, rng.choice(MODES)
    chunk = rng.choice(("auto", None, 1, 2, 3))
    kind = rng.choice(("hvp", "grad_and_hvp", "hessian", "all", "rows", "diagonal", "blocks", "out", "vector", "vmap"))
    options: dict[str, Any] = {"has_aux": has_aux, "mode": mode}
    if kind in ("hvp", "grad_and_hvp"):
        s = drawn_setting(rng, True, has_aux, argnums=0)
        s.kwargs.clear()
        v = drawn_like(rng, s.args[0])

        def product() -> Any:
            out = getattr(fh, kind)(s.f, s.args[0], v, *s.args[1:], **options)
            if kind == "hvp":
                return taken(out, has_aux, s)
            return [*found(out[0][0] if has_aux else out[0]), *found(out[1])]

        def truth() -> Any:
            Hv = split(s.matrix() @ flat(found(v)), s.leaves)
            return Hv if kind == "hvp" else [*s.gradient(), *Hv]

        yield kind, s, product, truth
        return
    s = drawn_setting(rng, kind != "vector", has_aux, carried=kind != "vmap")
    options |= {"chunk_size": chunk}
    if kind == "vmap":
        s = drawn_setting(rng, True, False, argnums=0, carried=False)
        stacked = mapped(s.args[0], lambda t: torch.stack([t.detach(), 0.5 * t.detach()]))
        inner = rng.choice((fh.grad, fh.hessian))
        half = dataclasses.replace(s, args=[mapped(s.args[0], lambda t: 0.5 * t.detach()), s.args[1]])

        def truth() -> Any:
            each = [one.gradient() if inner is fh.grad else [b for row in one.hessian() for b in row] for one in (s, half)]
            return [torch.stack(pair) for pair in zip(*each, strict=True)]

        yield kind, s, lambda: found(fh.vmap(inner(s.f), (0, None))(stacked, s.args[1], **s.kwargs)), truth
    elif kind == "hessian":
        options["symmetric"] = rng.random() < 0.7
        call = lambda: taken(fh.hessian(s.f, s.argnums, **options)(*s.args, **s.kwargs), has_aux, s)  # noqa: E731
        yield kind, s, call, lambda: [block for row in s.hessian() for block in row]
    elif kind == "vector":
        options["mode"] = mode if mode != "double-backward" else "auto"
        call = lambda: taken(fh.hessian(s.f, s.argnums, **options)(*s.args, **s.kwargs), has_aux, s)  # noqa: E731
        yield kind, s, call, lambda: blocks_of_outputs([block for row in s.hessian() for block in row])
    elif kind == "all":

        def everything() -> Any:
            value, g, H = fh.value_grad_and_hessian(s.f, s.argnums, **options)(*s.args, **s.kwargs)
            return [value[0] if has_aux else value, *found(g), *found(H)]

        yield kind, s, everything, lambda: [s.value(), *s.gradient(), *(block for row in s.hessian() for block in row)]
    elif kind == "rows":
        n = sum(t.numel() for t in s.leaves)
        rows = rng.choice((None, range(n), range(0, n, 2), range(n - 1, -1, -1), rng.sample(range(n), rng.randint(0, n))))
        if rng.random() < 0.3:
            options["mode"] = "fastest"

        def stream() -> Any:
            parts = list(fh.hessian_rows(s.f, s.argnums, rows=rows, **options)(*s.args, **s.kwargs))
            assert [i for numbers, _ in parts for i in numbers] == list(range(n) if rows is None else rows)
            return [part for _, part in parts]

        def truth() -> Any:
            wanted = s.matrix()[list(range(n) if rows is None else rows)]
            return [wanted] if len(wanted) else []

        yield kind, s, lambda: [torch.cat(parts)] if (parts := stream()) else [], truth
    elif kind == "diagonal":
        call = lambda: taken(fh.hessian_diagonal(s.f, s.argnums, **options)(*s.args, **s.kwargs), has_aux, s)  # noqa: E731
        yield kind, s, call, lambda: split(s.matrix().diagonal(), s.leaves)
    elif kind == "blocks":
        call = lambda: taken(fh.hessian_blocks(s.f, s.argnums, **options)(*s.args, **s.kwargs), has_aux, s)  # noqa: E731
        yield kind, s, call, lambda: [row[p] for p, row in enumerate(s.hessian())]
    else:
        s.args = [mapped(arg, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf) for arg in s.args]
        space = fh.Space.of(s.chosen)
        out = torch.full((space.dim, space.dim), 7.0, dtype=space.dtype)

        def into() -> Any:
            fh.hessian(s.f, s.argnums, out=out, **options)(*s.args, **s.kwargs)
            return [out]

        yield kind, s, into, lambda: [s.matrix()]


# Mistakes: a call that is wrong in one place, and the error that must come of it ------------------------------------------


def mistaken(rng: random.Random) -> Call:
    s = drawn_setting(rng, True, False, argnums=0)
    s.kwargs.clear()
    x, rest = s.args[0], s.args[1:]
    v = drawn_like(rng, x)
    places: list[Any] = []
    mapped(x, places.append)
    spot = rng.choice([i for i, leaf in enumerate(places) if scenarios.is_differentiated(leaf)])
    dense = fh.hessian if rng.random() < 0.5 else fh.hessian_diagonal

    def at(tree: Any, new: Callable[[Tensor], Any]) -> Any:
        count = itertools.count()
        return mapped(tree, lambda leaf: new(leaf) if next(count) == spot else leaf)

    def product(f: Any = s.f, x: Any = x, v: Any = v, **options: Any) -> Callable[[], Any]:
        verb = rng.choice((fh.hvp, fh.grad_and_hvp))
        return lambda: verb(f, x, v, *rest, **options)

    f = s.f
    mistakes: dict[str, Callable[[], tuple[Callable[[], Any], type[BaseException], str]]] = {
        "shape": lambda: (
            product(v=at(v, lambda t: t.new_ones((*t.shape, 2)))),
            ValueError,
            r"tangent.* must have shape .*, got ",
        ),
        "dtype": lambda: (product(v=at(v, lambda t: t.half())), ValueError, r"tangent.* must have dtype .*, got torch.float16"),
        "no tensor": lambda: (product(v=at(v, lambda t: None)), TypeError, r"tangent.* must be a tensor, got NoneType"),
        "number": lambda: (product(v=at(v, lambda t: 1.5)), TypeError, r"tangent.* must be a tensor, got float"),
        "structure": lambda: (product(v={"other": v}), ValueError, "tangent must have the same structure as the point: "),
        "one more": lambda: (product(v=(v, v)), ValueError, "tangent must have the same structure as the point: "),
        "device": lambda: (product(v=at(v, lambda t: t.to("meta"))), ValueError, "tangent.* must be on cpu, got meta"),
        "complex": lambda: (lambda: fh.grad(f)(at(x, lambda t: t.to(torch.complex64)), *rest), TypeError, "is complex"),
        "sparse": lambda: (lambda: fh.grad(f)(at(x, lambda t: t.to_sparse()), *rest), TypeError, "has layout torch.sparse"),
        "nothing": lambda: (lambda: dense(f)(mapped(x, lambda leaf: 3), *rest), TypeError, "no floating tensor to differentiate"),
        "argnums": lambda: (lambda: dense(f, rng.choice((2, -3, (0, 5))))(*s.args), ValueError, r"argnums must be in range\(2\)"),
        "mode": lambda: (product(mode="sideways"), ValueError, "hvp: mode must be 'auto'.* got 'sideways'"),
        "rows of no mode": lambda: (lambda: dense(f, mode="back")(*s.args), ValueError, "mode must be 'auto'.* got 'back'"),
        "chunk": lambda: (
            lambda: dense(f, chunk_size=rng.choice((0, -1, 2.5, "all")))(*s.args),
            ValueError,
            "chunk_size must be",
        ),
        "limit": lambda: (lambda: dense(f, memory_limit="lots", chunk_size=1)(*s.args), ValueError, "memory_limit must be bytes"),
        "randomness": lambda: (product(randomness="maybe"), ValueError, "randomness must be 'error', 'same' or 'different'"),
        "vector": lambda: (
            product(f=lambda x, y: f(x, y) * torch.ones(2)),
            TypeError,
            r"f must return a scalar .* of shape \(2,\)",
        ),
        "float": lambda: (product(f=lambda x, y: 1.0), TypeError, "f must return a scalar tensor .* got float"),
        "aux": lambda: (product(has_aux=True), TypeError, r"with has_aux=True f must return \(value, aux\)"),
        "broken": lambda: (product(f=lambda x, y: torch.tensor(1.0)), fh.DependenceError, "does not depend on x"),
        "random": lambda: (product(f=lambda x, y: f(x, y) * torch.rand(())), fh.RandomnessError, "f draws random numbers"),
        "no function": lambda: (product(f=3), TypeError, "f must be callable, got int"),
        "of its own": lambda: (product(f=failing), KeyError, "of its own"),
        "row": lambda: (lambda: list(fh.hessian_rows(f, rows=[10_000])(*s.args)), IndexError, "row 10000 is out of range"),
        "pairs": lambda: (
            lambda: fh.hessian_blocks(f, pairs=[("zz*", "*")])(*s.args),
            ValueError,
            r"got 'zz\*', which matches no leaf",
        ),
        "out": lambda: (lambda: fh.hessian(f, out=torch.ones(50, 49))(*s.args), ValueError, "out(= cannot| must have shape)"),
        "cotangent": lambda: (
            lambda: fh.vjp(f, *s.args)[1](torch.ones(3)),
            ValueError,
            r"cotangent must have shape \(\), got \(3,\)",
        ),
    }
    name = rng.choice(sorted(mistakes))
    run, error, message = mistakes[name]()
    return Call(f"mistake: {name}", (x, v, rest), lambda: found(run()), list, 0.0, (error, message))


def failing(x: Any, y: Any) -> Tensor:
    raise KeyError("of its own")


# The generator ------------------------------------------------------------------------------------------------------------


def call(k: int) -> Call:
    rng = random.Random(k)
    if rng.random() < 0.3:
        return mistaken(rng)
    ((title, s, run, expected),) = (first_order if rng.random() < 0.4 else second_order)(rng)
    poison = rng.random() < 0.1
    if poison:
        s.args[:] = [spoiled(rng, arg) for arg in s.args] if title not in ("vmap", "out") else s.args
    every = [t for arg in s.args for t in scenarios.tensors(arg)]
    tolerance = max(TOLERANCE[t.dtype] for t in every)
    watched = any(t.requires_grad for t in every)
    return Call(title, tuple(s.args), run, expected, tolerance, None, watched, s.gradient, poison)


def spoiled(rng: random.Random, tree: Any) -> Any:
    """NaN or an infinity in one entry of some leaves."""

    def spoil(leaf: Any) -> Any:
        if not scenarios.is_differentiated(leaf) or not leaf.numel() or rng.random() < 0.5:
            return leaf
        t = leaf.detach().clone(memory_format=torch.contiguous_format)
        t.view(-1)[rng.randrange(t.numel())] = rng.choice((float("nan"), float("inf"), -float("inf")))
        return t

    return mapped(tree, spoil)


def complaint(k: int) -> str | None:
    """What is wrong with call number k, if anything."""
    c = call(k)
    before = oracles.snapshot(c.inputs)
    state = torch.get_rng_state()
    try:
        got = c.run()
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if c.error is None:
            independent = isinstance(error, fh.DependenceError) and not any(bool(t.count_nonzero()) for t in c.gradient())
            wrong = None if independent else f"raised {told}"
        else:
            wrong = (
                None if isinstance(error, c.error[0]) and re.search(c.error[1], str(error)) else f"raised {told}, not {c.error}"
            )
    else:
        wrong = f"raised nothing, not {c.error}" if c.error else difference(got, c.expected(), c)
    try:
        oracles.assert_unchanged(before)
    except AssertionError as error:
        wrong = f"{wrong or ''}; {error}"
    if not torch.equal(state, torch.get_rng_state()):
        wrong = f"{wrong or ''}; the global random numbers moved on"
    return wrong and f"call({k}), {c.title}: {wrong}"


def difference(got: Sequence[Tensor], expected: Sequence[Tensor], c: Call) -> str | None:
    if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in expected]:
        return f"shapes {[tuple(t.shape) for t in got]}, expected {[tuple(t.shape) for t in expected]}"
    size = max((float(t[t.isfinite()].abs().max()) for t in expected if t.isfinite().any()), default=1.0)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = a.detach().double(), b.double()
        clean = b.isfinite() & (a.isfinite() | (not c.poisoned))  # 0 * NaN spreads, farther or less far than in the truth
        error = (a - b)[clean].abs()
        if error.numel() and not bool((error <= c.tolerance * max(1.0, size)).all()):
            return f"tensor {i} is {a.tolist()}, expected {b.tolist()}"
    if not c.watched and any(t.requires_grad for t in got):
        return "a result carries a graph that nobody asked for"
    strange = [i for i, t in enumerate(got) if t._is_zerotensor() or t.is_neg() or (t.numel() and not t.is_contiguous())]
    return f"tensors {strange} are not plain" if strange and not c.watched else None


@pytest.mark.parametrize("block", range(CALLS // BLOCK))
def test_every_call_is_right_or_a_named_error(block):
    complaints = [told for k in range(BLOCK * block, BLOCK * (block + 1)) if (told := complaint(k))]
    assert not complaints, "\n".join(complaints)


# Nothing is left behind -------------------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Every storage that an operation made while it was active, as long as anything, a graph included, holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, weakref.ref[Any]] = {}
        self.given = {t.untyped_storage()._cdata for t in CARRIED if isinstance(t, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                storage = t.untyped_storage()
                if storage._cdata not in self.given:
                    self.made[storage._cdata] = weakref.ref(storage)
        return out

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.made.values())


def test_five_hundred_calls_leave_no_tensor_and_no_graph_behind():
    for k in range(40):  # what is made once and kept, such as torch's own caches
        attempted(k)
    counted = 0
    for block in range(10):
        with Storages() as storages:
            for k in range(50 * block, 50 * (block + 1)):
                attempted(k)
                counted += 1
        assert len(storages.made) > 100
        assert storages.alive() == 0, f"storages left by calls {50 * block} to {50 * block + 49}"
    assert counted == 500


def attempted(k: int) -> None:
    with contextlib.suppress(Exception):
        call(k).run()


# The checks see what they are there for ---------------------------------------------------------------------------------


def test_storages_are_counted_while_a_graph_holds_them():
    x = torch.ones(3, requires_grad=True)
    with Storages() as storages:
        node = (x.exp() * x.sin()).sum().grad_fn
    assert node is not None and storages.alive() == 2  # what the product has saved
    del node
    assert storages.alive() == 0


def test_random_calls_are_many_and_the_same_each_time():
    calls = [call(k) for k in range(400)]
    titles = [c.title for c in calls]
    assert titles == [call(k).title for k in range(400)]
    assert len({title for title in titles if title.startswith("mistake")}) >= 20
    assert len({title for title in titles if not title.startswith("mistake")}) == 17
    inputs = [t for c in calls for tree in c.inputs for t in scenarios.tensors(tree)]
    assert any(not t.is_contiguous() for t in inputs) and any(0 in t.stride() and t.numel() > 1 for t in inputs)
    assert any(t.requires_grad for t in inputs) and any(t.isnan().any() for t in inputs) and any(t.isinf().any() for t in inputs)
    assert {torch.float32, torch.float64} <= {t.dtype for t in inputs} and any(t.numel() == 0 for t in inputs)


def test_a_wrong_derivative_is_noticed(monkeypatch):
    """Rows of a Hessian that forget the last of the cross terms, and a gradient that is off by a millionth."""
    plain = fh.grad

    def off(f, *options, **more):
        return lambda *args, **kwargs: mapped(
            plain(f, *options, **more)(*args, **kwargs),
            lambda leaf: leaf * (1 + 1e-6) if scenarios.is_differentiated(leaf) else leaf,
        )

    wrong = [k for k in range(300) if call(k).title == "grad" and not call(k).poisoned]
    assert not any(map(complaint, wrong))
    monkeypatch.setattr(fh, "grad", off)
    noticed = [k for k in wrong if (told := complaint(k)) and "expected" in told]
    float64 = [k for k in wrong if call(k).tolerance < 1e-6]
    assert len(noticed) >= 0.8 * len(float64) > 0


def test_an_input_that_is_written_to_is_noticed(monkeypatch):
    plain = fh.hessian_diagonal

    def writing(f, *options, **more):
        def transformed(*args, **kwargs):
            result = plain(f, *options, **more)(*args, **kwargs)
            with torch.no_grad():
                for t in scenarios.tensors(args[0]):
                    if t.numel() and 0 not in t.stride():
                        t.mul_(2)
            return result

        return transformed

    monkeypatch.setattr(fh, "hessian_diagonal", writing)
    told = [complaint(k) for k in range(300) if call(k).title == "diagonal"]
    assert any(t and "belongs to the caller" in t for t in told)


def test_a_graph_that_nobody_asked_for_is_noticed(monkeypatch):
    plain = fh.grad
    monkeypatch.setattr(
        fh,
        "grad",
        lambda f, *options, **more: (
            lambda *args, **kwargs: mapped(
                plain(f, *options, **more)(*args, **kwargs),
                lambda leaf: leaf.detach().requires_grad_() if scenarios.is_differentiated(leaf) else leaf,
            )
        ),
    )
    told = [complaint(k) for k in range(300) if call(k).title == "grad" and not call(k).watched]
    assert any(t and "carries a graph" in t for t in told)
