"""Empirical risks: losses that are a mean, or a sum, over samples,

    R(p; X, y) = (1/N) sum_n l(p, X[n], y[n]).

:func:`empirical_risk` makes an ordinary function of ``(params, *batch)`` from the loss l of one sample, which may be used
wherever a function may. What this floor adds is what a sum over samples allows: samples are evaluated in microbatches, and where
a derivative is taken each microbatch is computed again when it is needed instead of kept. So the memory of a gradient, a
product, rows or a diagonal is that of one microbatch, at every order and under every transform. Batches may also come from a
``DataLoader``; then no more is held than one of them, or the samples that are evaluated at once.

Floors above use more of it: that no sample reads another one lets all samples share their directions
(:mod:`functional_hess.lifting`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functional_hess.chunking import MIB, recomputed, survey, uncounted
from functional_hess.guards import RandomnessError
from functional_hess.levels import constant_where_unused, flat_remat, flat_vmap
from functional_hess.nesting import at_depth, depth, is_outermost, is_watched, outside_transforms, unwatched
from functional_hess.tree import broadcast_prefix, paths, tensors_of, written

__all__ = ["EmpiricalRisk", "Part", "bytes_of_a_sample", "empirical_risk", "loaded_samples", "samples_of"]

Tree = Any
Tensors = tuple[Tensor, ...]
MICROBATCH = 2 * MIB  # bytes of intermediate results: enough for full speed, and dozens of directions of it fit a working set
KEPT = 8 * MIB  # bytes up to which all samples are evaluated at once: nothing is computed again, and several directions fit
REDUCTIONS = ("mean", "sum")
FEW = 32  # samples of a loader that are kept to look at
_per_sample: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()
_loaders: weakref.WeakKeyDictionary[Any, _Facts] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class EmpiricalRisk:
    """A mean or sum over samples, as a function of ``(params, *batch)``; made by :func:`empirical_risk`.

    ``sample_loss(params, *sample)`` is the loss of one sample; ``model`` and ``criterion`` are there where it was given as
    ``criterion(model(params, *inputs), target)``.
    """

    sample_loss: Callable[..., Tensor]
    reduction: str = "mean"
    batch_size: int | str | None = "auto"
    model: Callable[..., Any] | None = None
    criterion: Callable[..., Tensor] | None = None

    def __call__(self, params: Tree, *batch: Any) -> Tensor:
        """The risk at ``params``: of the samples along the leading dimension of ``batch``, or of all batches of a loader."""
        x, rebuild = tensors_of(params)
        loader = _loader_in(batch)
        total, count = _over_tensors(self, rebuild, x, batch) if loader is None else _over_loader(self, rebuild, x, loader)
        return total / count if self.reduction == "mean" else total


def empirical_risk(
    loss: Callable[..., Any],
    criterion: Callable[..., Tensor] | None = None,
    *,
    reduction: str = "mean",
    batch_size: int | str | None = "auto",
) -> EmpiricalRisk:
    """The mean (or sum) of a loss over samples, as a function of ``(params, *batch)`` with bounded memory.

    Args:
        loss: the loss of one sample, ``(params, *sample) -> scalar``; or, with ``criterion``, the model
            ``(params, *inputs) -> output`` of one sample.
        criterion: ``(output, target) -> scalar`` of one sample. The last part of the batch is the target.
        reduction: ``"mean"`` or ``"sum"``.
        batch_size: samples evaluated at once: ``"auto"`` (all whose intermediate results take up to 8 MiB, else about 2 MiB of
            them), an int, or ``None`` for all.

    Returns:
        a callable. ``risk(params, X, y)`` takes trees of tensors whose first dimension counts samples; a leaf that is no tensor
        is handed to every sample as it is. ``risk(params, loader)`` takes one object that gives batches whenever it is iterated,
        such as a ``torch.utils.data.DataLoader``; batches may differ in length, every sample weighs the same. The value costs one
        evaluation; each level of differentiation evaluates once more than otherwise, unless all samples fit one microbatch.

    Raises:
        TypeError: the loss of a sample is no scalar; a module was passed where a function is expected.
        ValueError: parts of the batch differ in length; a loader gives other data from pass to pass.
        RandomnessError: the loss draws random numbers.

    Example:
        Least squares, of which the Hessian is 2 X^T X / N:

        >>> import torch
        >>> from functional_hess import hvp
        >>> risk = empirical_risk(lambda w, x, y: (x @ w - y) ** 2)
        >>> X, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 3.0])
        >>> risk(torch.zeros(2), X, y)
        tensor(5.)
        >>> hvp(risk, torch.zeros(2), torch.ones(2), X, y)
        tensor([1., 4.])
    """
    _require_function("loss", loss)
    if criterion is not None and (not isinstance(criterion, torch.nn.Module) or list(criterion.parameters())):
        _require_function("criterion", criterion)
    if reduction not in REDUCTIONS:
        raise ValueError(f"empirical_risk: reduction must be 'mean' or 'sum', got {reduction!r}.")
    if batch_size is not None and batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"empirical_risk: batch_size must be 'auto', a positive int or None, got {batch_size!r}.")
    if criterion is None:
        return EmpiricalRisk(loss, reduction, batch_size)

    def sample_loss(params: Tree, *sample: Any) -> Tensor:
        return criterion(loss(params, *sample[:-1]), sample[-1])

    return EmpiricalRisk(sample_loss, reduction, batch_size, loss, criterion)


def _require_function(name: str, given: Any) -> None:
    if isinstance(given, torch.nn.Module):
        raise TypeError(
            f"empirical_risk: {name} must be a function of the parameters, got the module {type(given).__name__}. Take apply, "
            "params, buffers = functionalize_module(module), and pass lambda params, x: apply(params, buffers, x)."
        )
    if not callable(given):
        raise TypeError(f"empirical_risk: {name} must be callable, got {type(given).__name__}.")


# ---------------------------------------------------------------------------------------------------- samples


@dataclasses.dataclass(frozen=True)
class Part:
    """Some samples: ``tensors`` have them along their first dimension, ``rebuild`` puts one sample's tensors in their places.

    ``kind`` is what a function may know of a sample without its values: parts of one kind are evaluated by the same operations.
    """

    tensors: Tensors
    rebuild: Callable[[Sequence[Any]], tuple[Any, ...]]
    kind: tuple[Any, ...]

    def __len__(self) -> int:
        return self.tensors[0].shape[0]

    def split(self, size: int) -> Iterator[Part]:
        """The same samples, ``size`` at a time."""
        for tensors in zip(*(t.split(size) for t in self.tensors), strict=True):
            yield self.holding(tensors)

    def first(self) -> Part:
        """The first sample alone."""
        return self.holding(tuple(t[:1] for t in self.tensors))

    def holding(self, tensors: Tensors) -> Part:
        """Other samples of the same kind."""
        return dataclasses.replace(self, tensors=tensors)


def samples_of(batch: tuple[Any, ...], name: str = "batch") -> Part:
    """The samples along the leading dimension of every tensor in ``batch``.

    Raises:
        TypeError: there is no tensor.
        ValueError: the leading dimensions differ, or one is missing, or there is no sample.
    """
    tensors, rebuild = tensors_of(batch)
    if not tensors:
        kinds = ", ".join(type(part).__name__ for part in batch) or "nothing"
        raise TypeError(f"empirical_risk: {name} must hold tensors with samples along their first dimension, got {kinds}.")
    leaves = broadcast_prefix(batch, batch, name)
    named = [where for where, leaf in zip(written(batch, "batch"), leaves, strict=True) if isinstance(leaf, Tensor)]
    scalars = [where for where, t in zip(named, tensors, strict=True) if not t.dim()]
    if scalars:
        raise ValueError(f"empirical_risk: {scalars[0]} has shape (); its first dimension must count the samples.")
    if len({t.shape[0] for t in tensors}) > 1:
        told = ", ".join(f"{where} has {t.shape[0]}" for where, t in zip(named, tensors, strict=True))
        raise ValueError(f"empirical_risk: the parts of a batch must have the same number of samples: {told}.")
    if not tensors[0].shape[0]:
        raise ValueError(f"empirical_risk: {name} holds no samples. Leave empty batches out.")
    kind = tuple((leaf.shape[1:], leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    return Part(tensors, rebuild, (*paths(batch), *kind))


def _sum_of_losses(risk: EmpiricalRisk, rebuild: Rebuild, part: Part, *x: Tensor) -> Tensors:
    """The sum of the losses of the samples of a part, where the tensors of the parameters are x."""

    def of_one(*tensors: Tensor) -> Tensors:
        value = risk.sample_loss(rebuild(x), *part.rebuild(tensors))
        if not (isinstance(value, Tensor) and value.dim() == 0):
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"empirical_risk: the loss of one sample must be a scalar tensor (shape ()), got {got}. Reduce it.")
        return (value,)

    return (_mapped(of_one, part)[0].sum(),)


def _mapped(of_one: Callable[..., Tensors], part: Part) -> Tensors:
    try:
        return flat_vmap(of_one)(*part.tensors)
    except RuntimeError as error:
        if "vmap: called random operation" not in str(error):
            raise
        raise RandomnessError(
            "empirical_risk: the loss of a sample draws random numbers (dropout?), so each derivative would belong to another "
            "function. Switch the module to eval mode, or draw the numbers beforehand and pass them as part of the batch."
        ) from error


def bytes_of_a_sample(risk: EmpiricalRisk, params: Tree, part: Part) -> int:
    """Bytes of what the loss makes of one sample; what it makes of the parameters alone, it makes for all samples once."""
    seen = []

    def of_one(*tensors: Tensor) -> Tensors:
        seen.append(survey(lambda *sample: (risk.sample_loss(params, *part.rebuild(sample)), None), tensors).saved)
        return tensors[:1]

    _mapped(of_one, part.first())
    return seen[0]


# ---------------------------------------------------------------------------------------------------- sums


Terms = Callable[..., Tensors]
Rebuild = Callable[[Sequence[Any]], Tree]


def _over_tensors(risk: EmpiricalRisk, rebuild: Rebuild, x: Tensors, batch: tuple[Any, ...]) -> tuple[Tensor, int]:
    """The sum over the samples of a batch of tensors, and their number."""
    terms, whole = functools.partial(_sum_of_losses, risk, rebuild), samples_of(batch)
    size = _microbatch(risk, rebuild, x, whole, len(whole))
    if size >= len(whole):
        return terms(whole, *x)[0], len(whole)
    closed = _closed(terms, x, [whole.first()], whole.tensors) if _anything_watched() else None
    if closed is None:
        return _plain_sum(terms, whole.split(size), x), len(whole)
    if not any(map(is_watched, closed.data)):
        constants = whole.holding(tuple(map(unwatched, whole.tensors)))
        return flat_remat(closed.terms, lambda: constants.split(size))(*closed.x)[0], len(whole)
    count = len(closed.data)
    of_tensors = flat_remat(lambda _, *tensors: closed.terms(whole.holding(tensors[:count]), *tensors[count:]))
    each = (of_tensors(*part.tensors, *closed.x)[0] for part in whole.holding(closed.data).split(size))
    return functools.reduce(operator.add, each), len(whole)


def _over_loader(risk: EmpiricalRisk, rebuild: Rebuild, x: Tensors, loader: Iterable[Any]) -> tuple[Tensor, int]:
    """The sum over the samples of all batches of a loader, and their number."""
    terms, facts = functools.partial(_sum_of_losses, risk, rebuild), _facts_of(loader)
    size = min(_microbatch(risk, rebuild, x, part, facts.count) for part in facts.kinds)

    def parts() -> Iterator[Part]:
        for batch in _read_again(loader, facts.count, [part.kind for part in facts.kinds]):
            yield from batch.split(size)

    closed = _closed(terms, x, [part.first() for part in facts.kinds]) if _anything_watched() else None
    total = _plain_sum(terms, parts(), x) if closed is None else flat_remat(closed.terms, parts)(*closed.x)[0]
    return total, facts.count


def _anything_watched() -> bool:
    return not is_outermost() or torch.is_grad_enabled()


def _plain_sum(terms: Terms, parts: Iterable[Part], x: Tensors) -> Tensor:
    """Each part at its turn; a graph, if there is one, is kept for all of them."""
    total = torch.zeros(())
    for number, part in enumerate(parts):
        with recomputed():
            value = terms(part, *x)[0]
        total = value if not number else total + value
    return total


def _microbatch(risk: EmpiricalRisk, rebuild: Rebuild, x: Tensors, part: Part, held: int) -> int:
    """How many samples like those of ``part`` at once, where ``held`` of them are in memory."""
    if risk.batch_size is None:
        return held
    if isinstance(risk.batch_size, int):
        return risk.batch_size
    known = _per_sample.setdefault(risk, {})
    key = (part.kind, *((t.shape, t.dtype) for t in x))
    if key not in known:
        with uncounted():
            known[key] = bytes_of_a_sample(risk, rebuild(x), part)
    return held if held * known[key] <= KEPT else max(1, MICROBATCH // max(1, known[key]))


# ---------------------------------------------------------------------------------------------------- what the loss closes over


@dataclasses.dataclass(frozen=True)
class _Closed:
    """``terms(part, *x)``, where x holds the parameters and whatever else is differentiated or mapped in the loss.

    ``data`` are the tensors of the batch, where they may be watched too.
    """

    terms: Terms
    x: Tensors
    data: Tensors


def _closed(terms: Terms, x: Tensors, examples: Sequence[Part], data: Tensors = ()) -> _Closed | None:
    """The sum of losses with its captured tensors as arguments; what the loss does not depend on is a constant among them.

    ``None`` where nothing is watched, or where not all captured tensors can be found: the loss at constants, with constants in
    their place, is watched all the same. A tensor that a transform inside the loss alone meets is such a case.
    """
    with _Captures((*x, *(t for part in examples for t in part.tensors))) as watch:
        values = [terms(part, *x)[0] for part in examples]
    if not any(map(is_watched, values)):
        return None
    found = tuple(watch.captured.values())
    with _Exchanged(found, tuple(map(unwatched, found))):
        for part in examples:
            constant = part.holding(tuple(map(unwatched, part.tensors)))
            if is_watched(terms(constant, *map(unwatched, x))[0]):
                return None

    def closed(part: Part, *tensors: Tensor) -> Tensors:
        with _Exchanged(found, tensors[len(x) :]):
            return terms(part, *tensors[: len(x)])

    arguments = constant_where_unused(values, (*x, *found, *data))
    count = len(x) + len(found)
    return _Closed(closed, arguments[:count], arguments[count:])


class _Captures(TorchFunctionMode):
    """Operands that are watched and were neither given nor computed inside."""

    def __init__(self, known: Tensors) -> None:
        super().__init__()
        self.depth = depth()
        self.known = {id(t): t for t in known}
        self.captured: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        for t in self._outside((tuple(args), kwargs)):
            if id(t) not in self.known and is_watched(t):
                self.captured[id(t)] = t
        out = func(*args, **(kwargs or {}))
        self.known |= {id(t): t for t in self._outside(out)}
        return out

    def _outside(self, tree: Tree) -> list[Tensor]:
        """Tensors as they are outside the transforms that the loss, or the map over samples, has opened."""
        return [at_depth(t, self.depth) for t in tensors_of(tree)[0]]


class _Exchanged(TorchFunctionMode):
    """Inside it, operations on the tensors ``old`` are done on the tensors ``new`` in their place."""

    def __init__(self, old: Tensors, new: Tensors) -> None:
        super().__init__()
        self.old = old  # kept, so that no other tensor takes such an id
        self.new = {id(t): n for t, n in zip(old, new, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        tensors, rebuild = tensors_of((tuple(args), kwargs or {}))
        if any(id(t) in self.new for t in tensors):
            args, kwargs = rebuild([self.new.get(id(t), t) for t in tensors])
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------- loaders


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the first passes through a loader showed: its number of samples, and a few of each kind."""

    count: int
    kinds: tuple[Part, ...]


def _loader_in(batch: tuple[Any, ...]) -> Iterable[Any] | None:
    """The object that gives batches, if that is what was passed."""
    if len(batch) != 1 or tensors_of(batch)[0] or not isinstance(batch[0], Iterable) or isinstance(batch[0], (str, bytes)):
        return None
    if isinstance(batch[0], Iterator):
        raise TypeError(
            f"empirical_risk: {_called(batch[0])} gives its batches only once, but derivatives read them again. Pass an object "
            "that starts anew whenever it is iterated, such as a DataLoader."
        )
    return batch[0]


def _called(loader: Any) -> str:
    return f"the {type(loader).__name__}"


def _read(loader: Iterable[Any]) -> Iterator[Part]:
    """The batches of one pass. Random numbers that the loader draws are its own: the same in every pass of a call."""
    state = torch.get_rng_state()
    iterator: Iterator[Any] | None = None
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(state)
        try:
            with outside_transforms():
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator, _END)
            state = torch.get_rng_state()
        finally:
            torch.set_rng_state(outside)
        if batch is _END:
            return
        yield samples_of(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), "a batch")


_END = object()


def _read_again(loader: Iterable[Any], count: int, kinds: Sequence[Any]) -> Iterator[Part]:
    """The batches of one pass, which must be of the kinds and have as many samples as when the loader was first read."""
    found = 0
    for batch in _read(loader):
        if batch.kind not in kinds:
            raise ValueError(
                f"empirical_risk: {_called(loader)} gave a batch of another kind than when it was first read (shapes, dtypes, or "
                "what is no tensor). Leave it as it is, and make another object for other data."
            )
        found += len(batch)
        yield batch
    if found != count:
        raise ValueError(
            f"empirical_risk: {_called(loader)} gave {found} samples, and {count} when it was first read. Leave it as "
            "it is, and make another object for other data."
        )


@dataclasses.dataclass(frozen=True)
class Loaded(Part):
    """The samples of a loader that are all of one kind, read whenever they are split; ``tensors`` are the first few of them."""

    loader: Any = None
    count: int = 0

    def __len__(self) -> int:
        return self.count

    def split(self, size: int) -> Iterator[Part]:
        """All samples, ``size`` at a time, whatever the length of the batches; so many are held, or a batch."""
        waiting: list[Part] = []
        for batch in _read_again(self.loader, self.count, [self.kind]):
            joined = (torch.cat(pair).detach() for pair in zip(*(part.tensors for part in (*waiting, batch)), strict=True))
            *full, last = self.holding(tuple(joined)).split(size)
            yield from full
            waiting = [last]
        yield from waiting

    def holding(self, tensors: Tensors) -> Part:
        """Other samples of the same kind."""
        return Part(tensors, self.rebuild, self.kind)


def loaded_samples(batch: tuple[Any, ...]) -> Loaded | None:
    """The samples of the loader that ``batch`` is; ``None`` where they are of several kinds."""
    (loader,) = batch
    facts = _facts_of(loader)
    few = facts.kinds[0]
    return None if len(facts.kinds) > 1 else Loaded(few.tensors, few.rebuild, few.kind, loader, facts.count)


def _facts_of(loader: Iterable[Any]) -> _Facts:
    """Read the loader twice, the first time it is met, and compare."""
    try:
        if loader in _loaders:
            return _loaders[loader]
    except TypeError:  # no hash or no weak references
        return _compared(loader)
    _loaders[loader] = _compared(loader)
    return _loaders[loader]


def _compared(loader: Iterable[Any]) -> _Facts:
    """The facts of a loader, once two passes have given the same data.

    Raises:
        ValueError: the data differ.
    """
    kinds: dict[Any, Part] = {}
    with outside_transforms():
        first = []
        for part in _read(loader):
            if part.kind not in kinds:
                kinds[part.kind] = part.holding(tuple(t[:FEW].detach().clone() for t in part.tensors))
            first.append(_digest(part))
        second = [_digest(part) for part in _read(loader)]
    if not first:
        raise ValueError(f"empirical_risk: {_called(loader)} gave no batches. Pass an object that holds some.")
    if first != second:
        if not _same_in_another_order(first, second):
            raise ValueError(
                f"empirical_risk: {_called(loader)} gives other data from pass to pass (random augmentation, or drop_last with "
                "shuffle?), so each derivative would belong to another function. Draw the data once, beforehand."
            )
        warnings.warn(
            f"empirical_risk: {_called(loader)} gives its samples in another order at every pass. Sums over them agree up to "
            "rounding, but not bit for bit; pass shuffle=False for that.",
            stacklevel=2,
        )
    return _Facts(sum(digest[0] for digest in first), tuple(kinds.values()))


Digest = tuple[int, tuple[tuple[float, float], ...]]


def _digest(part: Part) -> Digest:
    """The number of samples; of each tensor the sum of its entries and of their squares."""
    wide = [t.detach().double() for t in part.tensors]
    return len(part), tuple((float(t.sum()), float(t.square().sum())) for t in wide)


def _same_in_another_order(first: Sequence[Digest], second: Sequence[Digest]) -> bool:
    totals = []
    for digests in (first, second):
        sums = torch.tensor([sums for _, sums in digests], dtype=torch.float64).sum(0)
        totals.append((sum(count for count, _ in digests), sums))
    (count, sums), (other, others) = totals
    scale = torch.tensor([sums for _, sums in first], dtype=torch.float64).abs().sum(0)
    return count == other and bool(((sums - others).abs() <= 1e-9 * scale + 1e-300).all())
