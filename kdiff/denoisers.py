"""Denoisers: the interface between solvers, guidance and networks in a sampling run.

    estimate = denoise(x, m)             x at the marginal m -> Estimate(x_hat, share, memory)

A solver calls a denoiser for a noisy batch, guidance calls it under several conditions, and a network implements it.
All of them exchange two values:

    Given       the inputs known for the samples: conditions, and the arrays and the memory of each guidance
    Estimate    the result: the estimate of the data, a learned variance, and the new memory of each guidance

Both are nested structures of tensors with one row per sample. Several conditions can therefore be evaluated in one
batch by repeating the rows of `Given` and splitting those of `Estimate` (`Denoiser.batched`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from keras import ops, tree

from kdiff import backend, deprecated, encodings, reuse
from kdiff.schedules import Marginal

__all__ = ["INTERVAL", "Denoise", "Denoiser", "Estimate", "Given", "interval", "leading", "only_if", "rows_like"]

INTERVAL = "interval"  # the network input with the distance to the target noise level; see `Denoiser.jump`


class Estimate(NamedTuple):
    """The result of a denoiser.

    Attributes:
        x_hat: the estimate of the data, with the shape of the noisy batch.
        share: the interpolation of the variance of a step between its bounds (`predictions.LearnedVariance`), with the
            same shape; None if it is not learned.
        memory: the memory of each guidance, the innermost first, with one row per sample.
    """

    x_hat: Any
    share: Any = None
    memory: tuple = ()

    def guided(self, x_hat, remember: Any = ()) -> Self:
        """The result of a guidance that modifies this estimate.

        Args:
            x_hat: the guided estimate of the data.
            remember: the memory of the guidance for its next call, a nested structure with one row per sample.
        """
        return Estimate(x_hat, self.share, (*self.memory, remember))


class Given(NamedTuple):
    """The inputs known for the samples of a batch: nested structures of tensors with one row per sample.

    Attributes:
        conditions: the conditions of the network, by name.
        rows: the arrays of each guidance, by name, the innermost guidance first.
        memory: the memory of each guidance, in the same order.
        encoded: what layers return for the conditions, at the start of a step; see `kdiff.encodings`.
    """

    conditions: Mapping[str, Any] = {}
    rows: tuple = ()
    memory: tuple = ()
    encoded: Any = ()

    def sets(self) -> list[Mapping[str, Any]]:
        """The conditions, and those that each guidance with "negative" conditions evaluates instead."""
        negative = [rows["negative"] for rows in self.rows if isinstance(rows, Mapping) and "negative" in rows]
        return [self.conditions, *({**self.conditions, **one} for one in negative)]


Denoise = Callable[[Any, Marginal], Estimate]


def interval(now: Marginal, then: Marginal | None = None):
    """The distance from one noise level to a lower one, or to data: u_now - u_then, with tan(u) = sigma / alpha.

    It does not depend on the schedule, is in [0, pi / 2], and is 0 if the two noise levels are equal.
    """
    u = ops.arctan2(now.sigma, now.alpha)
    return u if then is None else u - ops.arctan2(then.sigma, then.alpha)


def leading(conditions: Mapping[str, Any], now: Marginal, then: Marginal | None = None) -> dict[str, Any]:
    """The conditions of a network that is asked to lead from `now` to `then`, lower, or to data, in one step."""
    return {**conditions, INTERVAL: interval(now, then)}


def only_if(needed: Any, full: Callable[[], Any], less: Callable[[], Any]) -> Any:
    """`full()` in the steps that need it, else `less()`, which calls the network less; only one of them is computed.

    With `Reuse` it is always `full()`, because what layers keep for later steps cannot leave a branch of a compiled
    step.

    Args:
        needed: a scalar tensor, bool.
        full: a function without arguments, which returns nested tensors; its result is right in every step.
        less: the same for steps that do not need it.
    """
    if reuse.is_on():
        return full()
    known = backend.concrete(needed)
    if known is None:  # in a compiled step
        return ops.cond(needed, full, less)
    return full() if known else less()


class Denoiser(functools.partial):
    """estimate = denoise(x, m), for a noisy batch x `(batch, ...)` at the marginal m, with fields `()` or `(batch,)`.

    It is the function `answer` with its first argument bound to `given`.

    Args:
        answer: a function `answer(given, x, m)` that returns the `Estimate`.
        given: the inputs known for the samples.
        nulls: the row of the null condition, by the name of each condition that has one.
    """

    def __new__(
        cls,
        answer: Callable[[Given, Any, Marginal], Estimate],
        given: Given | None = None,
        nulls: Mapping[str, Any] | None = None,
    ) -> Self:
        """The denoiser."""
        given = given or Given()
        self = super().__new__(cls, answer, given)
        self.answer, self.given, self.nulls = answer, given, dict(nulls or {})
        return self

    @classmethod
    def of(cls, denoise: Any) -> Self:
        """The denoiser itself, or a function `x_hat = denoise(x, m)` as a denoiser without conditions."""
        return denoise if isinstance(denoise, Denoiser) else cls(lambda given, x, m: Estimate(denoise(x, m)))

    @property
    def conditions(self) -> Mapping[str, Any]:
        """The conditions that are given."""
        return self.given.conditions

    def batched(self, x, m: Marginal, *conditions: Mapping[str, Any]) -> list[Estimate]:
        """The estimates under each of these conditions, computed in one batch.

        Raises:
            ValueError: if they do not all have the same names.
        """
        count = len(conditions)
        if alone := {name for some in conditions for name in some.keys() ^ conditions[0].keys()}:
            raise ValueError(f"Guidance: {sorted(alone)} must be given in all sets of conditions, or in none")

        def repeated(rows):
            return ops.concatenate([rows] * count)

        joined = {name: ops.concatenate([some[name] for some in conditions]) for name in conditions[0]}
        if (kept := encodings.current()) is not None:
            kept.join(conditions, joined)
        rows, memory = tree.map_structure(repeated, (self.given.rows, self.given.memory))
        m = Marginal(*(repeated(field) if len(field.shape) else field for field in m))
        estimate = self.answer(Given(joined, rows, memory), repeated(x), m)
        share = (None,) * count if estimate.share is None else ops.split(estimate.share, count)
        memories = [
            tree.map_structure(lambda rows, i=i: ops.split(rows, count)[i], estimate.memory) for i in range(count)
        ]
        return [Estimate(*parts) for parts in zip(ops.split(estimate.x_hat, count), share, memories, strict=True)]

    def jump(self, x, now: Marginal, then: Marginal) -> Estimate:
        """The estimate that leads from `now` to the lower noise level `then` in one step, for a flow map network.

        A network with an input "interval" (`blocks.Interval`) receives the distance, and returns the x_hat with which
        the step of DDIM ends on the trajectory of the probability flow:

            x_then = (sigma_then / sigma_now) x_now + alpha_then (1 - e^{l_now - l_then}) x_hat,   l = log(alpha/sigma).

        For `then` = `now` this x_hat is the posterior mean of the data, as in `denoise(x, now)`, and for `then` at
        data it is the endpoint of the trajectory, as in a consistency model. For any other network the result is that
        of `denoise(x, now)`.

        Args:
            x: the noisy batch, with shape `(batch, ...)`.
            now: the marginal of `x`, with fields of shape `()` or `(batch,)`.
            then: the marginal to step to.
        """
        rows = ops.broadcast_to(interval(now, then), ops.shape(x)[:1])
        given = self.given._replace(conditions={**self.given.conditions, INTERVAL: rows})
        return self.answer(given, x, now)

    def vjp(self, x, m: Marginal, often: bool = False) -> tuple[Estimate, Callable]:
        """(estimate, pull), where `pull(v)` is the vector-Jacobian product (d x_hat / d x)^T v, with the shape of `x`.

        No gradient flows through it. `pull` may be called only once, unless `often` is true.

        Raises:
            ValueError: in a run with `Reuse`.
        """
        if reuse.is_on():
            raise ValueError(
                "Reuse: the guidance differentiates the network, as DPS does, and what is computed inside a derivative "
                "cannot be kept for later steps. Sample without `reuse`, or with a guidance without derivatives, such "
                "as Inpaint for a known part"
            )

        def parts(x):
            x_hat, *rest = self(x, m)
            return x_hat, rest

        x_hat, pull, rest = backend.vjp(parts, x, often)
        return Estimate(x_hat, *rest), pull

    def unconditional(
        self, names: Sequence[str] | None = None, instead: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The conditions, with some of them replaced by their null rows, as in classifier-free guidance.

        Args:
            names: the conditions to replace; None: all that have a null row.
            instead: other values for some of them, with one row per sample, such as a negative prompt.

        Raises:
            ValueError: if one of `names` has no null row, or no condition has one.
        """
        names, instead = self.nulls if names is None else names, instead or {}
        unknown = [name for name in names if name not in self.nulls and name not in instead]
        if unknown or not (names or instead):
            raise ValueError(
                f"Guidance: the conditions {unknown or list(self.conditions)} cannot be left out, because they have no "
                f"null row: give their layers a `dropout` above 0, such as LabelEmbedding(10, dropout=0.1). "
                f"Conditions that can be left out: {sorted(self.nulls)}"
            )
        nulls = {name: rows_like(self.nulls[name], self.conditions[name]) for name in names if name not in instead}
        conditions = {**self.conditions, **nulls, **instead}
        if (kept := encodings.current()) is not None:
            kept.drop(list(nulls), conditions)
        return conditions

    each = deprecated.member("each", "batched")
    linearised = deprecated.member("linearised", "vjp")
    without = deprecated.member("without", "unconditional")


def rows_like(row: Any, rows: Any) -> Any:
    """One row, repeated to the shape and with the type of `rows`."""
    return ops.broadcast_to(ops.cast(ops.convert_to_tensor(row), rows.dtype), ops.shape(rows))
