"""Risks: the value by hand, derivatives that do not depend on the microbatch, loaders, memory, and what is refused."""

from __future__ import annotations

import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import numbers
from oracles import hessian as oracle_hessian
from oracles import matrix, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import functional_hess as fh
from functional_hess import DependenceError, RandomnessError, Space, empirical_risk, explain
from functional_hess.risk import Part, samples_of

SIZES: tuple[Any, ...] = (1, 2, 3, 7, None, "auto")
every_size = pytest.mark.parametrize("batch_size", SIZES)

X, Y = numbers(7, 4, seed=1), torch.tensor([0, 2, 1, 1, 0, 2, 2])
P = {"w": 0.5 * numbers(4, 5, seed=2), "v": 0.5 * numbers(5, 3, seed=3), "b": numbers(3, seed=4), "steps": 2}
V = {"w": numbers(4, 5, seed=5), "v": numbers(5, 3, seed=6), "b": numbers(3, seed=7), "steps": None}


def sample_loss(p: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(x @ p["w"]) @ p["v"] + p["b"], y) * p["steps"]


def by_loop(p: dict[str, Any], X: Tensor = X, Y: Tensor = Y) -> Tensor:
    """The mean as one would write it without the library."""
    return sum(sample_loss(p, X[n], Y[n]) for n in range(len(X))) / len(X)


def truth() -> Tensor:
    """The Hessian, in the order of sorted names."""
    leaves = [P["b"], P["v"], P["w"]]
    return matrix(oracle_hessian(lambda b, v, w: by_loop({"b": b, "v": v, "w": w, "steps": 2}), leaves), leaves)


class Batches:
    """Starts anew whenever it is iterated."""

    def __init__(self, size: int = 3, X: Tensor = X, Y: Tensor = Y) -> None:
        self.size, self.X, self.Y, self.passes = size, X, Y, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return zip(self.X.split(self.size), self.Y.split(self.size), strict=True)


# The value ------------------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_risk_is_the_mean_and_the_sum_over_samples(batch_size, dtype):
    w, X, y = torch.tensor([1, -2], dtype=dtype), torch.tensor([[1, 0], [2, 1], [0, 3]], dtype=dtype), torch.ones(3, dtype=dtype)
    squares = [0.0, 1.0, 49.0]
    for reduction, expected in (("mean", sum(squares) / 3), ("sum", sum(squares))):
        risk = empirical_risk(lambda w, x, y: (x @ w - y) ** 2, reduction=reduction, batch_size=batch_size)
        value = risk(w, X, y)
        assert value.dtype == dtype and value.shape == () and abs(value.item() - expected) < 1e-5


def test_a_model_and_a_criterion_make_a_risk():
    risk = empirical_risk(lambda w, x: x @ w, lambda out, y: (out - y) ** 2)
    modules = empirical_risk(lambda w, x: x @ w, torch.nn.MSELoss())
    w, X, y = numbers(4), numbers(6, 4, seed=1), numbers(6, seed=2)
    assert relative_error(risk(w, X, y), ((X @ w - y) ** 2).mean()) < 1e-14
    assert relative_error(modules(w, X, y), ((X @ w - y) ** 2).mean()) < 1e-14
    assert risk.model is not None and risk.criterion is not None


def test_batches_are_trees_and_carry_what_is_no_tensor():
    def loss(p, sample, power):
        return (p * sample["x"]).sum() ** power + sample["y"][0]

    p, x, y = numbers(2), numbers(5, 2, seed=1), numbers(5, seed=2)
    for batch_size in SIZES:
        risk = empirical_risk(loss, batch_size=batch_size)
        assert relative_error(risk(p, {"x": x, "y": (y,)}, 2), ((x @ p) ** 2 + y).mean()) < 1e-14


# Derivatives ----------------------------------------------------------------------------------------------------------


@every_size
def test_every_derivative_is_that_of_the_mean_whatever_the_microbatch(batch_size, inputs_unchanged):
    inputs_unchanged(P, V, X, Y)
    risk, space, H = empirical_risk(sample_loss, batch_size=batch_size), Space.of(P), truth()
    assert relative_error(space.matrix(fh.hessian(risk)(P, X, Y)), H) < 1e-12
    assert relative_error(space.ravel(fh.hvp(risk, P, V, X, Y)), H @ space.ravel(V)) < 1e-12
    assert relative_error(space.ravel(fh.hessian_diagonal(risk)(P, X, Y)), H.diagonal()) < 1e-12
    assert relative_error(torch.cat([rows for _, rows in fh.hessian_rows(risk)(P, X, Y)]), H) < 1e-12


@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse", "double-backward"])
@pytest.mark.parametrize("batch_size", [2, None])
def test_hessian_is_right_in_every_mode(mode, batch_size):
    H = Space.of(P).matrix(fh.hessian(empirical_risk(sample_loss, batch_size=batch_size), mode=mode)(P, X, Y))
    assert relative_error(H, truth()) < 1e-12


W = 0.4 * numbers(3, 2, seed=8)
D = numbers(5, 3, seed=9)
U, STACK, TANGENTS = numbers(3, 2, seed=10), numbers(4, 3, 2, seed=11), numbers(6, 3, 2, seed=12)


def quartic(w: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return scale * torch.tanh(x @ w).sin().sum() ** 2 + w[0, 0] ** 3


def nested(f: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Callable[[], Any]]:
    """Ways to use a function of ``(w, scale)`` under transforms, the library's, torch.func's and plain autograd's."""
    one, t = torch.tensor(1.3, dtype=torch.float64), torch.func

    def of_w(w: Tensor) -> Tensor:
        return f(w, one)

    def rows(w: Tensor) -> Tensor:
        return t.vmap(t.vjp(t.grad(of_w), w)[1])(TANGENTS)[0]

    def backward_twice() -> Any:
        w, scale = W.clone().requires_grad_(), one.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(w, scale), w, create_graph=True)
        return torch.autograd.grad((g * U).sum(), (w, scale))

    def backward_of_grad() -> Any:
        w, scale = W.clone().requires_grad_(), one.clone().requires_grad_()
        return torch.autograd.grad((fh.grad(f)(w, scale) * U).sum(), (w, scale))

    return {
        "value": lambda: of_w(W),
        "grad": lambda: fh.grad(of_w)(W),
        "jvp": lambda: fh.jvp(of_w, (W,), (U,)),
        "hvp": lambda: fh.hvp(of_w, W, U),
        "rows": lambda: rows(W),
        "vmap of products": lambda: t.vmap(lambda u: fh.hvp(of_w, W, u))(TANGENTS),
        "vmap of grad": lambda: fh.vmap(fh.grad(of_w))(STACK),
        "vmap of hessian": lambda: fh.vmap(fh.hessian(of_w))(STACK),
        "vmap of diagonal": lambda: fh.vmap(fh.hessian_diagonal(of_w))(STACK),
        "grad of hvp": lambda: fh.grad(lambda w: (fh.hvp(of_w, w, U) ** 2).sum())(W),
        "grad of rows": lambda: t.grad(lambda w: (rows(w) ** 2).sum())(W),
        "grad of hessian": lambda: fh.grad(lambda w: (fh.hessian(of_w)(w) ** 2).sum())(W),
        "jvp of jvp": lambda: fh.jvp(lambda w: fh.jvp(of_w, (w,), (U,))[1], (W,), (U,)),
        "grad of jvp": lambda: fh.grad(lambda w: fh.jvp(of_w, (w,), (U,))[1])(W),
        "jacfwd of jacfwd": lambda: t.jacfwd(t.jacfwd(of_w))(W),
        "backward twice": backward_twice,
        "backward of grad": backward_of_grad,
        "grad of what the loss closes over": lambda: fh.grad(lambda s: f(W, s.exp()))(one),
        "grad twice of what the loss closes over": lambda: fh.grad(fh.grad(lambda s: f(W, s.exp())))(one),
        "mixed derivative": lambda: fh.grad(lambda s: (fh.grad(f)(W, s * s) * U).sum())(one),
        "vmap over what the loss closes over": lambda: fh.vmap(lambda s: fh.grad(f)(W, s))(torch.stack([one, -one])),
    }


WAYS = tuple(nested(lambda w, s: w.sum() * s))


def same(actual: Any, expected: Any, tolerance: float = 1e-11) -> None:
    for a, e in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        assert relative_error(a, e) < tolerance


@pytest.mark.parametrize("way", WAYS)
def test_risk_nests_under_every_transform(way):
    def plain(w: Tensor, scale: Tensor) -> Tensor:
        return sum(quartic(w, x, scale) for x in D) / len(D)

    def microbatched(w: Tensor, scale: Tensor) -> Tensor:
        return empirical_risk(lambda w, x: quartic(w, x, scale), batch_size=2)(w, D)

    batches = Loader(D, 3)

    def loaded(w: Tensor, scale: Tensor) -> Tensor:
        return empirical_risk(lambda w, x: quartic(w, x, scale), batch_size=2)(w, batches)

    expected = nested(plain)[way]()
    same(nested(microbatched)[way](), expected)
    same(nested(loaded)[way](), expected)


class Loader:
    def __init__(self, data: Tensor, size: int) -> None:
        self.data, self.size = data, size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.data.split(self.size))


def test_the_batch_can_be_differentiated_and_mapped_too():
    scale = torch.tensor(1.3, dtype=torch.float64)
    risk = empirical_risk(lambda w, x: quartic(w, x, scale), batch_size=2)

    def plain(w: Tensor, X: Tensor) -> Tensor:
        return sum(quartic(w, x, scale) for x in X) / len(X)

    for f, g in ((risk, plain),):
        same(fh.grad(f, argnums=1)(W, D), fh.grad(g, argnums=1)(W, D))
        same(fh.hessian(f, argnums=(0, 1))(W, D), fh.hessian(g, argnums=(0, 1))(W, D))
        same(fh.vmap(fh.grad(f), (None, 0))(W, torch.stack([D, 2 * D])), torch.stack([fh.grad(g)(W, D), fh.grad(g)(W, 2 * D)]))


def test_a_tensor_that_only_an_inner_transform_meets_is_differentiated():
    """It is met as a tangent, where no operation shows it, so nothing can be computed again: slower, and right."""

    def loss_along(v: Tensor, f: Any) -> Callable[..., Tensor]:
        return lambda w, x: torch.func.jvp(lambda x: torch.tanh(x @ w).sum(), (x,), (v,))[1] ** 2

    def total(v: Tensor) -> Tensor:
        return empirical_risk(loss_along(v, None), batch_size=2)(W, D)

    def plain(v: Tensor) -> Tensor:
        return sum(loss_along(v, None)(W, x) for x in D) / len(D)

    v = numbers(3, seed=13)
    same(fh.grad(total)(v), fh.grad(plain)(v))


def test_normalization_is_repaired_inside_a_risk():
    p = {"g": 1 + 0.3 * numbers(5, seed=1), "w": numbers(4, 5, seed=2)}

    def loss(p, x, y):
        return F.cross_entropy(torch.tanh(F.layer_norm(x @ p["w"], (5,), p["g"])), y)

    def of_leaves(g, w):
        return sum(loss({"g": g, "w": w}, X[n], Y[n]) for n in range(len(X))) / len(X)

    leaves = [p["g"], p["w"]]
    expected = matrix(oracle_hessian(of_leaves, leaves), leaves)
    for batch_size in (2, None):
        H = Space.of(p).matrix(fh.hessian(empirical_risk(loss, batch_size=batch_size))(p, X, Y))
        assert relative_error(H, expected) < 1e-10


# Loaders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, None, "auto"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 10])
def test_batches_of_a_loader_weigh_by_their_samples(batch_size, length):
    loader = DataLoader(TensorDataset(X, Y), batch_size=length)
    for reduction, factor in (("mean", 1), ("sum", 7)):
        risk = empirical_risk(sample_loss, batch_size=batch_size, reduction=reduction)
        assert relative_error(risk(P, loader), factor * by_loop(P)) < 1e-13
        assert relative_error(Space.of(P).matrix(fh.hessian(risk)(P, loader)), factor * truth()) < 1e-12


def test_a_loader_gives_every_derivative():
    risk, space, H = empirical_risk(sample_loss, batch_size=2), Space.of(P), truth()
    for loader in (Batches(), DataLoader(TensorDataset(X, Y), batch_size=4), DataLoader([(X[:5], Y[:5]), (X[5:], Y[5:])], None)):
        assert relative_error(fh.grad(risk)(P, loader), fh.grad(by_loop)(P)) < 1e-12
        assert relative_error(space.ravel(fh.hvp(risk, P, V, loader)), H @ space.ravel(V)) < 1e-12
        assert relative_error(space.ravel(fh.hessian_diagonal(risk)(P, loader)), H.diagonal()) < 1e-12


def test_a_loader_is_compared_with_itself_once():
    batches, risk = Batches(), empirical_risk(sample_loss)
    risk(P, batches)
    assert batches.passes == 3
    risk(P, batches)
    assert batches.passes == 4


def test_a_shuffled_loader_leaves_the_random_numbers_of_the_caller_alone():
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)
    state = torch.get_rng_state()
    for _ in range(2):
        same(Space.of(P).matrix(fh.hessian(empirical_risk(sample_loss, batch_size=2))(P, loader)), truth())
        same(fh.vmap(lambda s: empirical_risk(sample_loss)({**P, "b": s * P["b"]}, loader))(torch.ones(2)), by_loop(P).expand(2))
    assert torch.equal(state, torch.get_rng_state())


def test_another_order_at_every_pass_is_said_once():
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0))
    risk = empirical_risk(sample_loss)
    with pytest.warns(UserWarning, match=r"the DataLoader gives its samples in another order at every pass.*shuffle=False"):
        assert relative_error(risk(P, loader), by_loop(P)) < 1e-13
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        risk(P, loader)


class Augmented:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X * random.random(), Y)])


class Shrinking(Batches):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = 7 if self.passes < 2 else 6
        self.passes += 1
        return iter([(X[:left], Y[:left])])


class Empty:
    def __iter__(self) -> Iterator[Any]:
        return iter([])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (Augmented(), "the Augmented gives other data from pass to pass"),
        (Shrinking(), "the Shrinking gave 6 samples, and 7 when it was first read"),
        (Empty(), "the Empty gave no batches"),
    ],
)
def test_a_loader_that_cannot_be_read_again_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        empirical_risk(sample_loss)(P, loader)


def test_an_iterator_is_refused():
    with pytest.raises(TypeError, match="the list_iterator gives its batches only once"):
        empirical_risk(sample_loss)(P, iter([(X, Y)]))


def test_batches_of_several_kinds_may_use_different_leaves():
    """A leaf that the first batch does not use is not taken for a constant."""

    class Mixed:
        def __iter__(self):
            return iter([(X[:3], "a"), (X[3:], "b")])

    p = {"a": numbers(4, seed=1), "b": numbers(4, seed=2)}
    risk = empirical_risk(lambda p, x, name: torch.sin(x @ p[name]), reduction="sum", batch_size=2)
    g = fh.grad(risk)(p, Mixed())
    same(g, {"a": torch.cos(X[:3] @ p["a"]) @ X[:3], "b": torch.cos(X[3:] @ p["b"]) @ X[3:]})


# Memory ---------------------------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """The bytes of storages alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in self.seen:
                size = t.untyped_storage().nbytes()
                self.seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


WIDE = {"a": 0.3 * numbers(4, 50, seed=1), "b": 0.3 * numbers(50, 3, seed=2)}


def wide_loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(x @ p["a"]).sin().cos() @ p["b"], y)


TAKEN: dict[str, Callable[..., Any]] = {
    "grad": lambda f, *batch: fh.grad(f)(WIDE, *batch),
    "hvp": lambda f, *batch: fh.hvp(f, WIDE, WIDE, *batch, mode="reverse-over-reverse"),
    "rows": lambda f, *batch: next(fh.hessian_rows(f, rows=range(3), mode="reverse-over-reverse")(WIDE, *batch)),
    "backward": lambda f, *batch: _backward(f, *batch),
}


def _backward(f: Callable[..., Tensor], *batch: Any) -> None:
    p = {name: t.clone().requires_grad_() for name, t in WIDE.items()}
    g = torch.autograd.grad(f(p, *batch), list(p.values()), create_graph=True)
    torch.autograd.grad(sum((t**2).sum() for t in g), list(p.values()))


def peak(take: Callable[..., Any], batch_size: Any, *batch: Any) -> int:
    risk = empirical_risk(wide_loss, batch_size=batch_size)
    take(risk, *batch)  # what is remembered of a function is remembered now
    with Alive() as alive:
        take(risk, *batch)
    return alive.peak


@pytest.mark.parametrize("taken", TAKEN)
def test_memory_is_that_of_a_microbatch(taken):
    few, many = ((numbers(n, 4), torch.zeros(n, dtype=torch.long)) for n in (64, 64 * 6))
    data = sum(t.nbytes for t in many)
    whole, small, large = (peak(TAKEN[taken], *case) for case in ((None, *many), (32, *few), (32, *many)))
    assert large < 1.1 * small + data < whole / 3
    assert peak(TAKEN[taken], 32, Batches(64, *many)) < 1.1 * small + data


def test_a_loader_without_microbatches_gives_whole_batches():
    sizes = []
    risk = empirical_risk(lambda p, x, y: (x * p).sum(), batch_size=None)
    original = Part.split
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Part, "split", lambda part, size: (sizes.append(len(p)) or p for p in original(part, size)))
        risk(numbers(4), Batches(3))
    assert sizes == [3, 3, 1]


def test_the_automatic_microbatch_holds_two_mebibytes():
    n = 10_000
    batch = numbers(n, 4), torch.zeros(n, dtype=torch.long)
    assert peak(TAKEN["grad"], "auto", *batch) < 8 * 2**20 < peak(TAKEN["grad"], None, *batch) / 4


def test_samples_that_take_little_are_evaluated_once():
    """As many evaluations as without microbatches, so nothing is computed again; many samples are computed again."""

    def evaluations(samples: int, batch_size: Any) -> int:
        seen = []
        risk = empirical_risk(lambda p, x, y: seen.append(0) or wide_loss(p, x, y), batch_size=batch_size)
        batch = numbers(samples, 4), torch.zeros(samples, dtype=torch.long)
        risk(WIDE, *batch)
        seen.clear()
        fh.grad(risk)(WIDE, *batch)
        return len(seen)

    assert evaluations(4000, "auto") == evaluations(4000, None) == 1 < evaluations(8000, "auto")


@pytest.mark.parametrize("batch_size", ["auto", 2, 7])
def test_leaves_are_ordered_as_the_loss_uses_them_whatever_the_microbatch(batch_size):
    """So that rows of the last layers run through no others; the first call plans as any later one."""
    risk = empirical_risk(lambda p, x: (torch.tanh(x @ p["z"]).sin() @ p["a"]).square().sum(), batch_size=batch_size)
    p = {"a": numbers(5, 3, seed=1), "z": numbers(4, 5, seed=2)}
    first, second = (fh.hessian(risk, mode="reverse-over-reverse").planned(p, X) for _ in range(2))
    assert first.problem.seen.order == second.problem.seen.order == (1, 0)
    assert first.problem.seen.calls == second.problem.seen.calls and first.chunk == second.chunk


def test_the_memory_of_rows_is_predicted_for_a_microbatch():
    batch = numbers(4096, 4), torch.zeros(4096, dtype=torch.long)
    small, large = (explain(fh.hessian_rows(empirical_risk(wide_loss, batch_size=b)), WIDE, *batch) for b in (64, None))
    assert small.chunk_size > 20 * large.chunk_size


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((X, Y[:5]), ValueError, r"must have the same number of samples: batch\[0\] has 7, batch\[1\] has 5"),
        ((X, torch.tensor(1)), ValueError, r"batch\[1\] has shape \(\); its first dimension must count the samples"),
        ((X[:0], Y[:0]), ValueError, "batch holds no samples"),
        ((), TypeError, "batch must hold tensors with samples along their first dimension, got nothing"),
        ((3, "a"), TypeError, "batch must hold tensors .* got int, str"),
    ],
)
def test_a_batch_without_common_samples_is_refused(batch, error, message):
    with pytest.raises(error, match=message):
        empirical_risk(sample_loss)(P, *batch)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: empirical_risk(torch.nn.Linear(2, 2)),
            TypeError,
            "loss must be a function of the parameters, got the module Li",
        ),
        (lambda: empirical_risk(sample_loss, torch.nn.Linear(2, 2)), TypeError, "criterion must be a function"),
        (lambda: empirical_risk(3), TypeError, "loss must be callable, got int"),
        (lambda: empirical_risk(sample_loss, 3), TypeError, "criterion must be callable, got int"),
        (lambda: empirical_risk(sample_loss, reduction="none"), ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        (
            lambda: empirical_risk(sample_loss, batch_size=0),
            ValueError,
            "batch_size must be 'auto', a positive int or None, got 0",
        ),
    ],
)
def test_a_wrong_call_says_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()


@every_size
def test_a_loss_that_is_no_scalar_is_refused(batch_size):
    with pytest.raises(
        TypeError, match=r"the loss of one sample must be a scalar tensor \(shape \(\)\), got a tensor of shape \(4,\)"
    ):
        empirical_risk(lambda p, x: x * p["b"][0], batch_size=batch_size)(P, X)
    with pytest.raises(TypeError, match="got float"):
        empirical_risk(lambda p, x: 1.0, batch_size=batch_size)(P, X)


@every_size
def test_a_random_loss_is_refused_by_name(batch_size):
    risk = empirical_risk(lambda w, x: F.dropout(x * w, 0.5).sum(), batch_size=batch_size)
    with pytest.raises(RandomnessError, match=r"draws random numbers.*eval mode"):
        fh.grad(risk)(numbers(4), X)


@pytest.mark.parametrize("batch_size", [2, None])
@pytest.mark.parametrize("loader", [False, True])
def test_a_broken_graph_is_an_error_and_not_a_zero(batch_size, loader):
    risk = empirical_risk(lambda p, x, y: sample_loss({**p, **{k: p[k].detach() for k in "bvw"}}, x, y), batch_size=batch_size)
    batch = (Batches(),) if loader else (X, Y)
    with pytest.raises(DependenceError):
        fh.grad(risk)(P, *batch)
    with pytest.raises(DependenceError):
        fh.hessian(risk)(P, *batch)
    with pytest.raises(DependenceError):
        fh.jvp(lambda p: risk(p, *batch), (P,), (V,))
    with pytest.raises(DependenceError, match=r"x\['b'\]"):
        fh.grad(empirical_risk(lambda p, x, y: sample_loss({**p, "b": 0}, x, y), batch_size=batch_size), strict=True)(P, *batch)
    if not loader:
        with pytest.raises(DependenceError):
            fh.grad(empirical_risk(lambda w, x: x.detach() @ w, batch_size=batch_size), argnums=1)(numbers(4), X)


class Once(torch.autograd.Function):
    """x^3, with a backward that cannot be differentiated again, and no forward rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u):
        return 3 * ctx.saved_tensors[0] ** 2 * u


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_backward_that_is_differentiable_once_gives_an_error_and_not_a_zero(batch_size):
    risk = empirical_risk(lambda w, x: Once.apply(x @ w), batch_size=batch_size)
    same(fh.grad(risk)(numbers(4), X), (3 * (X @ numbers(4)) ** 2) @ X / 7)
    for mode in ("auto", "reverse-over-reverse", "double-backward"):
        with pytest.raises(fh.MissingDerivativeError):
            fh.hvp(risk, numbers(4), numbers(4), X, mode=mode)


def test_samples_are_counted_and_cut():
    part = samples_of((X, {"y": Y}, 5))
    assert len(part) == 7 and [len(p) for p in part.split(3)] == [3, 3, 1] and len(part.first()) == 1
    x, y, five = part.rebuild(part.first().tensors)
    assert torch.equal(x, X[:1]) and torch.equal(y["y"], Y[:1]) and five == 5
