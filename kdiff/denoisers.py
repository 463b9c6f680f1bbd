"""Denoisers: what a sampling run asks, and what it is answered.

    estimate = denoise(x, m)             x at the marginal m -> Estimate(x_hat, share, memory)

A solver asks about a noisy batch, a guidance asks for it under other conditions, a network answers. All of them meet
here, in two values:

    Given       what is known of the samples: their conditions, and what each guidance holds and remembers of them
    Estimate    what is answered: the data, how large the variance of a step is, and what is to be remembered

Both are nests of tensors with one row a sample. To ask several questions in one batch is therefore to repeat the rows
of the one (`Denoiser.batched`) and to split those of the other.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from keras import ops, tree

from kdiff import backend, deprecated
from kdiff.schedules import Marginal

__all__ = ["INTERVAL", "Denoise", "Denoiser", "Estimate", "Given", "interval"]

INTERVAL = "interval"  # the input by which a network is told where its answer is to lead; see `Denoiser.jump`


class Estimate(NamedTuple):
    """The answer to a question.

    Attributes:
        x_hat: the estimate of the data, of the shape of the batch asked about.
        share: where the variance of a step lies between its bounds (`predictions.LearnedVariance`), of the same shape;
            None if that is not learned.
        memory: what each guidance on the way remembers, the innermost first, one row a sample.
    """

    x_hat: Any
    share: Any = None
    memory: tuple = ()

    def guided(self, x_hat, remember: Any = ()) -> Self:
        """The answer of a guidance that was given this one.

        Args:
            x_hat: what it makes of `x_hat`.
            remember: what it is to be told the next time, a nest of tensors with one row a sample.
        """
        return Estimate(x_hat, self.share, (*self.memory, remember))


class Given(NamedTuple):
    """What is known of the samples of a batch: nests of tensors with one row a sample.

    Attributes:
        conditions: those of the network, by name.
        rows: of each guidance, its arrays, by name, the innermost first.
        memory: of each guidance, what it remembers.
    """

    conditions: Mapping[str, Any] = {}
    rows: tuple = ()
    memory: tuple = ()


Denoise = Callable[[Any, Marginal], Estimate]


def interval(now: Marginal, then: Marginal | None = None):
    """How far it is from one noise level to a lower one, or to data: u_now - u_then, tan(u) = sigma / alpha.

    It is the same on every schedule, in [0, pi / 2], and 0 where the two are one.
    """
    u = ops.arctan2(now.sigma, now.alpha)
    return u if then is None else u - ops.arctan2(then.sigma, then.alpha)


class Denoiser(functools.partial):
    """estimate = denoise(x, m): x a noisy batch `(batch, ...)`, at the marginal m, of fields `()` or `(batch,)`.

    It is the function `answer` with its first argument filled in, what is given.

    Args:
        answer: `answer(given, x, m)` gives the `Estimate`.
        given: what is known of the samples.
        nulls: the row that stands for no condition, by the name of each condition that has one.
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
        """The denoiser itself, or a plain function `x_hat = denoise(x, m)` as one without conditions."""
        return denoise if isinstance(denoise, Denoiser) else cls(lambda given, x, m: Estimate(denoise(x, m)))

    @property
    def conditions(self) -> Mapping[str, Any]:
        """The conditions that are given."""
        return self.given.conditions

    def batched(self, x, m: Marginal, *conditions: Mapping[str, Any]) -> list[Estimate]:
        """The estimates under each of these conditions, asked in one batch.

        Raises:
            ValueError: if one has conditions that another has not.
        """
        count = len(conditions)
        if alone := {name for some in conditions for name in some.keys() ^ conditions[0].keys()}:
            raise ValueError(f"Guidance: {sorted(alone)} must be given to all questions of a batch, or to none")

        def repeated(rows):
            return ops.concatenate([rows] * count)

        joined = {name: ops.concatenate([some[name] for some in conditions]) for name in conditions[0]}
        rows, memory = tree.map_structure(repeated, (self.given.rows, self.given.memory))
        m = Marginal(*(repeated(field) if len(field.shape) else field for field in m))
        estimate = self.answer(Given(joined, rows, memory), repeated(x), m)
        share = (None,) * count if estimate.share is None else ops.split(estimate.share, count)
        memories = [
            tree.map_structure(lambda rows, i=i: ops.split(rows, count)[i], estimate.memory) for i in range(count)
        ]
        return [Estimate(*parts) for parts in zip(ops.split(estimate.x_hat, count), share, memories, strict=True)]

    def jump(self, x, now: Marginal, then: Marginal) -> Estimate:
        """The answer that leads from `now` to `then`, lower, in one step, if the network knows one.

        A network that has an input "interval" (`blocks.Interval`) is told how far it is to go, and its x_hat is the one
        with which DDIM's step ends where the probability flow leads,

            x_then = (sigma_then / sigma_now) x_now + alpha_then (1 - e^{l_now - l_then}) x_hat,   l = log(alpha/sigma).

        With `then` = `now` it is the mean of the data, what `denoise(x, now)` asks for, and with `then` = 0 the data
        itself, a consistency function. Any other network answers as to `denoise(x, now)`.

        Args:
            x: the noisy batch, with shape `(batch, ...)`.
            now: the marginal that it is at; fields of shape `()` or `(batch,)`.
            then: the marginal to go to.
        """
        rows = ops.broadcast_to(interval(now, then), ops.shape(x)[:1])
        given = self.given._replace(conditions={**self.given.conditions, INTERVAL: rows})
        return self.answer(given, x, now)

    each = deprecated.member("each", "batched")
    linearised = deprecated.member("linearised", "vjp")
    without = deprecated.member("without", "unconditional")

    def vjp(self, x, m: Marginal, often: bool = False) -> tuple[Estimate, Callable]:
        """(estimate, pull): `pull(v)`, of the shape of `x`, is (d x_hat / d x)^T v. No gradient flows through it.

        It is to be called once, unless `often`.
        """

        def parts(x):
            x_hat, *rest = self(x, m)
            return x_hat, rest

        x_hat, pull, rest = backend.vjp(parts, x, often)
        return Estimate(x_hat, *rest), pull

    def unconditional(
        self, names: Sequence[str] | None = None, instead: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The conditions without some of them: their null rows in their place.

        Args:
            names: which; None for all that have a null.
            instead: other values, one row a sample, for some of them.

        Raises:
            ValueError: if one of `names` has no null, or nothing has.
        """
        names, instead = self.nulls if names is None else names, instead or {}
        unknown = [name for name in names if name not in self.nulls and name not in instead]
        if unknown or not (names or instead):
            raise ValueError(
                f"Guidance: the conditions {unknown or list(self.conditions)} cannot be left out, for nothing stands "
                f"for none of them: give their layers a `dropout` above 0, such as LabelEmbedding(10, dropout=0.1). "
                f"Those that can: {sorted(self.nulls)}"
            )
        nulls = {name: _rows_like(self.nulls[name], self.conditions[name]) for name in names if name not in instead}
        return {**self.conditions, **nulls, **instead}


def _rows_like(row, rows):
    return ops.broadcast_to(ops.cast(ops.convert_to_tensor(row), rows.dtype), ops.shape(rows))
