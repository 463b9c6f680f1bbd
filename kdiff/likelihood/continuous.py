"""The variational bound in continuous time (Kingma et al. 2021, "VDM", arXiv:2107.00630, eqs. 11 and 18):

    -log p(x)  <=  prior + diffusion + reconstruction

    prior           =  KL( q(x_1 | x) || N(0, sigma_1^2 I) )
    diffusion       =  1/2 integral of SNR E|x_hat - x|^2 dl,   l = log_snr, over those of the schedule
    reconstruction  =  E -log p(x | x_0),   p(x | x_0) proportional to q(x_0 | x)

The integral is a mean over random times, -dl/dt / p(t) SNR |x_hat - x|^2 / 2, t ~ p. The schedule matters by its ends
alone, and by how well its times sample the integral. The weight of the loss is `weightings.Variational`.

With `max_log_snr` both l and x_0 end there, which is a bound too. Of images on 256 levels the reconstruction is nearly
free from 13 on (VDM ends at 13.3), but few networks learn that there are levels, so a schedule that ends later has a
looser bound: `Cosine`, to 15, 4.2 bits per dimension of Fashion-MNIST, and with `max_log_snr=12` 2.8, of one network.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import deprecated, random
from kdiff.base import Configurable, check_integer, check_number
from kdiff.likelihood.bound import prior
from kdiff.likelihood.decoders import Decoder, decoder_of, sum_of_rows
from kdiff.likelihood.report import Curve, Report
from kdiff.likelihood.subject import Subject
from kdiff.times import LogUniform, TimeSampler

__all__ = ["BINS", "EVEN", "BitsPerDim", "continuous_bound"]

BINS = 20  # of a curve
EVEN = LogUniform("stratified")


@deprecated.arguments(averages="ema")
def continuous_bound(
    model: Any,
    data: Any,
    *,
    draws: int = 16,
    times: Any = EVEN,
    decoder: Any = None,
    max_log_snr: float | None = None,
    schedule: Any = None,
    noise: Callable[[int, tuple[int, ...]], Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    ema: bool = True,
) -> Report:
    """The bound of each example in continuous time (see the module).

    Args:
        model: a `DiffusionModel`, or a denoiser, `x_hat = denoise(x, m)`.
        data: as in `bound`.
        draws: the number of times drawn per example, with one call of the network per batch and draw.
        times: the `times.TimeSampler`, with a density, or its name. The default, evenly spread log-SNRs, suits any
            schedule; times concentrated where the integrand is large have a smaller error.
        decoder: a `Decoder` or its name; None: `Levels` for images (the codecs `Pixels` and `Haar`), `Density` for
            other data.
        max_log_snr: where the reconstruction begins, if before the end of the schedule; about 12 suits images.
        schedule: the schedule of a denoiser; a model has its own.
        noise: a function `noise(draw, shape)` for each draw and then the reconstruction, instead of that of the seed.
        seed: the seed of the times and the noise, which are the same on every backend.
        batch_size: the number of examples per batch, for arrays.
        ema: whether to use the averaged (EMA) weights.

    Returns:
        A `Report`, whose curve has 20 bins with equally many of the drawn times.

    Raises:
        ValueError: if there is no data; if it is not of the decoder's levels; if `times` have no density; if
            `max_log_snr` is below the smallest of the schedule.
    """
    check_integer("continuous_bound", "draws", draws)
    subject, times = Subject(model, schedule, ema), TimeSampler.get(times)
    schedule, (decoder, seen) = subject.schedule, decoder_of(decoder, subject.images)
    if not times.has_density:
        raise ValueError(f"continuous_bound: {times!r} does not say its density, which the integrand is divided by")

    def integrand(answer, x, noise, t, given):
        m = schedule.at(t)
        wide = m.like(x)
        error = sum_of_rows((answer(given, wide.alpha * x + wide.sigma * noise, m).x_hat - x) ** 2)
        return 0.5 * ops.exp(m.log_snr) * error, m.log_snr

    asked, key = subject.compiled(("likelihood.continuous", schedule), integrand), random.key_of(seed)
    start, _ = _ends("continuous_bound", schedule, max_log_snr)
    terms: dict[str, list] = {"prior": [], "diffusion": [], "reconstruction": []}
    drawn = []  # (t, log_snr, nats per unit of log-SNR) of all examples
    for number, batch in enumerate(subject.batches(data, batch_size)):
        decoder.check(ops.convert_to_numpy(seen(batch.x)))
        total, shape, x = np.zeros(len(batch.x)), batch.x.shape, ops.convert_to_tensor(batch.x)
        keys = random.Keys(random.fold_in(key, number, random.EVALUATION))
        for draw in range(draws):
            t = times(schedule, len(batch.x), next(keys))
            drawn_noise = random.normal(next(keys), shape) if noise is None else noise(draw, shape)
            nats, log_snr = asked(x, drawn_noise, t, batch.given)
            share = -schedule.slope(t) / times.density(schedule, t)  # 1 / the density over log-SNR
            t, nats, log_snr, share = (ops.convert_to_numpy(v).astype("float64") for v in (t, nats, log_snr, share))
            within = log_snr <= start
            total += np.where(within, nats * share, 0.0) / draws
            drawn.append(np.stack([t, log_snr, nats])[:, : batch.count][:, within[: batch.count]])
        drawn_noise = random.normal(next(keys), shape) if noise is None else noise(draws, shape)
        last = decoder.nats_of_signal(seen(x), seen(ops.convert_to_tensor(drawn_noise)), start)
        terms["prior"].append(prior(schedule, batch.x)[: batch.count])
        terms["diffusion"].append(total[: batch.count])
        terms["reconstruction"].append(ops.convert_to_numpy(last).astype("float64")[: batch.count])
    joined = {name: np.concatenate(parts) for name, parts in terms.items()}
    first = schedule.first_time if max_log_snr is None else float(ops.convert_to_numpy(schedule.time(start)))
    return Report(joined, math.prod(shape[1:]), _curve(np.concatenate(drawn, axis=1)), first)


def _ends(owner: str, schedule: Any, max_log_snr: float | None) -> tuple[float, float]:
    """(largest, smallest) log-SNR of the integral."""
    largest, smallest = (float(ops.convert_to_numpy(end)) for end in schedule.log_snr_ends())
    if max_log_snr is None:
        return largest, smallest
    check_number(owner, "max_log_snr", max_log_snr, smallest)
    return min(largest, max_log_snr), smallest


def _curve(drawn: np.ndarray) -> Curve:
    """Bins of equally many of the drawn times, from noise to data."""
    count = min(BINS, drawn.shape[1])
    if not count:
        return Curve(*np.zeros((4, 0)))
    bins = np.array_split(drawn[:, np.argsort(-drawn[0])], count, axis=1)
    t, log_snr, nats = np.array([part.mean(axis=1) for part in bins]).T
    error = [part[2].std(ddof=1) / math.sqrt(part.shape[1]) if part.shape[1] > 1 else math.nan for part in bins]
    return Curve(t, log_snr, nats, np.array(error))


class BitsPerDim(Configurable, keras.metrics.Metric):
    """The bound in continuous time as a metric, computed from the loss without further calls of the network.

        model.compile("adam", metrics=[likelihood.BitsPerDim()])
        model.fit(images, validation_data=more)["val_bits_per_dim"], model.evaluate(images, return_dict=True)

    It needs the objective `Denoising` and times with a density. In training it uses the current weights, with dropout;
    in validation and `evaluate`, the averages. It is a running mean over the examples, with the standard error
    `standard_error()`; `continuous_bound` draws more times per example.

    Args:
        decoder: a `Decoder` or its name: "levels" for images, "density" for other data; None: by the codec. Unlike
            `bound`, the metric does not check that images are on the levels.
        max_log_snr: as in `continuous_bound`.
        name: the name of the metric.
    """

    def __init__(self, decoder: Any = None, name: str = "bits_per_dim", *, max_log_snr: float | None = None):
        super().__init__(name=name, dtype="float32")
        self.max_log_snr = max_log_snr
        self.decoder = None if decoder is None else Decoder.get(decoder)
        self.count = self.add_variable((), "zeros", name="count")
        self.mean = self.add_variable((), "zeros", name="mean")
        self.rest = self.add_variable((), "zeros", name="rest")  # by which rounding has made the mean too large
        self.spread = self.add_variable((), "zeros", name="spread")  # the sum of squared distances to the mean
        self.squares = self.add_variable((), "zeros", name="squares")  # the sum of squared weights

    def prepare(self, model: Any) -> None:
        """Called by the model's `compile`: takes the numbers that a compiled step cannot read.

        Raises:
            ValueError: if the objective is not of the kind of `Denoising`, or its times do not say their density; for
                `max_log_snr` as `continuous_bound`.
        """
        times = getattr(model.objective, "density", lambda model: None)(model)
        if times is None or not times.has_density:
            raise ValueError(
                "BitsPerDim: it needs the objective Denoising, and times that say their density; received: "
                f"{model.objective!r}, {model.times!r}"
            )
        self._start, self._end = _ends("BitsPerDim", model.schedule, self.max_log_snr)
        self._decoder, self._seen = decoder_of(self.decoder, model.codec.images)

    def update_problem(self, model: Any, problem: Any, sample_weight: Any = None) -> None:
        """Adds a batch.

        Args:
            model: the `DiffusionModel`.
            problem: the `objectives.Problem` made of a batch of its data.
            sample_weight: `(batch,)`, or None.
        """
        x, _, density, m, slope = problem.drawn  # on JAX a schedule has no weights while metrics are computed
        error = sum_of_rows((problem.output - problem.target) ** 2) * model.prediction.gain(m) ** 2
        diffusion = -0.5 * slope / density * ops.exp(m.log_snr) * error
        diffusion = ops.where(m.log_snr <= self._start, diffusion, 0.0)
        end = 0.5 * math.exp(self._end) * sum_of_rows(x**2)
        key = random.fold_in(random.key_of(model.seed), ops.cast(self.count, "int32"), random.EVALUATION)
        noise = random.normal(random.fold_in(key, 0, random.EVALUATION), ops.shape(x))
        nats = end + diffusion + self._decoder.nats_of_signal(self._seen(x), self._seen(noise), self._start)
        self.add(nats / (math.prod(x.shape[1:]) * math.log(2.0)), sample_weight)

    def add(self, values, sample_weight: Any = None) -> None:
        """Adds these numbers to the running mean and spread (Chan et al. 1979), which lie on the device in float32.

        What each addition to the mean rounds off is added by the next (Kahan 1965), so millions of batches are as exact
        as a few.
        """
        weight = ops.ones_like(values) if sample_weight is None else ops.cast(sample_weight, "float32")
        weight = ops.broadcast_to(ops.reshape(weight, (-1,)), ops.shape(values))
        added = ops.sum(weight)
        mean = ops.sum(weight * values) / ops.maximum(added, 1e-30)
        count = self.count + added
        distance = mean - self.mean
        share = added / ops.maximum(count, 1e-30)
        spread = ops.sum(weight * (values - mean) ** 2) + distance**2 * self.count * share
        self.spread.assign(self.spread + spread)
        change = distance * share - self.rest
        mean = self.mean + change
        self.rest.assign((mean - self.mean) - change)
        self.mean.assign(mean)
        self.count.assign(count)
        self.squares.assign(self.squares + ops.sum(weight**2))

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Not called: the model gives `update_problem` all that it needs."""
        raise NotImplementedError("BitsPerDim: a DiffusionModel updates it, where it is one of `compile(metrics=...)`")

    def result(self):
        """The mean, in bits per dimension."""
        return self.mean + 0.0  # a copy: on PyTorch a variable would go on changing

    def standard_error(self) -> float:
        """That of the mean, with n = (sum of w)^2 / sum of w^2 as the number of examples, whatever the scale of w."""
        count, spread, squares = (float(ops.convert_to_numpy(v.value)) for v in (self.count, self.spread, self.squares))
        n = count**2 / squares if squares > 0 else 0.0
        return math.sqrt(spread / count / (n - 1)) if n > 1 else math.nan
