"""The variational bound of a run of T steps (Sohl-Dickstein et al. 2015, arXiv:1503.03585; Ho et al. 2020, eq. 5):

    -log p(x)  <=  L_T + sum of L_(then) + L_0            ("prior", "diffusion", "reconstruction")

    L_T    = KL( q(x_1 | x) || N(0, sigma_1^2 I) )  =  alpha_1^2 |x|^2 / (2 sigma_1^2),  t = 1, or where the grid begins
    L_then = E KL( q(x_then | x_now, x) || p(x_then | x_now) )                   at each step of the run but the last
    L_0    = E -log p(x | x_then)                                                the last step, to t = 0

p(x_then | x_now) has the mean of q(x_then | x_now, x) with x replaced by x_hat, and one of the `variances`. The
expectations over q(x_now | x) are estimated with one draw of the noise per example and step.

For Gaussian data, an exact denoiser and exact reverse variance, the bound equals the entropy of the data for any T.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from kdiff import deprecated, random
from kdiff.base import check_integer
from kdiff.codecs import Pixels
from kdiff.gaussian import kl_divergence
from kdiff.likelihood.decoders import decoder_of, sum_of_rows
from kdiff.likelihood.report import Curve, Report
from kdiff.likelihood.subject import Batch, Subject
from kdiff.likelihood.variances import Known, Learned, Place, Small, Variance
from kdiff.schedules import Marginal, NoiseSchedule, bridge
from kdiff.times import TimeGrid

__all__ = ["bound", "prior"]


@deprecated.arguments(averages="ema")
def bound(
    model: Any,
    data: Any,
    *,
    steps: int | None = None,
    grid: Any = "trailing",
    variance: Any = None,
    decoder: Any = None,
    clip: bool = False,
    schedule: Any = None,
    noise: Callable[[int, tuple[int, ...]], Any] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    ema: bool = True,
) -> Report:
    """The variational bound of each example, term by term (see the module).

    Args:
        model: a `DiffusionModel`, or a denoiser, `x_hat = denoise(x, m)`.
        data: examples `(n, ...)`; a dictionary of examples, "image", and conditions; a pair of examples and labels; or
            an iterable of such batches, such as a `tf.data.Dataset`.
        steps: T, the number of steps, at least 2, with one call of the network per batch and step. None: all steps of
            the schedule, or 1000.
        grid: the `times.TimeGrid` of the run, or its name.
        variance: a `Variance`, its name, or a function as in `Known`. None: `Learned` if the network predicts it, else
            `Small`.
        decoder: a `Decoder` or its name; None: `Levels` for images (the codecs `Pixels` and `Haar`), `Density` for
            other data.
        clip: whether to clip x_hat to [-1, 1], as in the evaluation of improved DDPM. It improves the bound for images,
            and is meaningless for other data.
        schedule: the schedule of a denoiser; a model has its own.
        noise: a function `noise(step, shape)` for steps 0, 1, ... of the run, instead of the noise of the seed.
        seed: the seed of the noise, which is the same on every backend.
        batch_size: the number of examples per batch, for arrays.
        ema: whether to use the averaged (EMA) weights.

    Returns:
        A `Report`, whose curve has one value per step.

    Raises:
        ValueError: if there is no data; if it is not of the decoder's levels; if `steps` is below 2, or more than the
            schedule has; if `variance` is to be learned and the denoiser says none.
    """
    subject = Subject(model, schedule, ema)
    schedule, variance = subject.schedule, _variance(variance, subject)
    decoder, seen = decoder_of(decoder, subject.images)
    steps = (schedule.num_steps or 1000) if steps is None else steps
    check_integer("bound", "steps", steps, minimum=2)  # the last step reads its variance at the one before
    times = TimeGrid.get(grid)(schedule, steps)
    transformed = decoder.of_images and subject.images is not None and not isinstance(subject.codec, Pixels)
    key = ("likelihood.bound", schedule, variance, decoder, clip)

    def diffusion(answer, x, noise, given, places):
        now, then = (schedule.sampled_at(t) for t in places[:2])
        place = Place(now, then, now, then, False)
        estimate, _, fresh, log_variance = _step(answer, variance, clip, x, noise, given, place)
        error = then.alpha * fresh * (x - estimate.x_hat)
        log_true = place.log_small + ops.zeros_like(x)
        return sum_of_rows(kl_divergence(error, log_true, log_variance))

    def reconstruction(answer, x, noise, given, places):
        now, then, *read = (schedule.sampled_at(t) for t in places)
        place = Place(now, then, *read, True)
        estimate, x_t, fresh, log_variance = _step(answer, variance, clip, x, noise, given, place)
        mean = bridge(now, then)[0] * x_t + then.alpha * fresh * estimate.x_hat
        if transformed and math.prod(ops.shape(log_variance)[1:]) > 1:
            raise ValueError(
                f"bound: the levels of images that {subject.codec!r} transforms need a variance that is the same for "
                f"all numbers of an example, such as 'small'; received: {variance!r}. Or give `decoder='density'`"
            )
        x, mean = seen(x), seen(mean)
        return decoder.nats(x, mean, log_variance + ops.zeros_like(x))

    functions = (subject.compiled((key, "diffusion"), diffusion), subject.compiled((key, "last"), reconstruction))
    terms: dict[str, list] = {"prior": [], "diffusion": [], "reconstruction": []}
    moments = np.zeros((2, steps))
    for batch in subject.batches(data, batch_size):
        decoder.check(ops.convert_to_numpy(seen(batch.x)))
        terms["prior"].append(prior(schedule, batch.x, float(times[0]))[: batch.count])
        nats = np.stack(list(_by_step(functions, times, batch, seed, noise)))[:, : batch.count]
        terms["diffusion"].append(nats[:-1].sum(axis=0))
        terms["reconstruction"].append(nats[-1])
        moments += nats.sum(axis=1), (nats**2).sum(axis=1)
    joined = {name: np.concatenate(parts) for name, parts in terms.items()}
    count = len(joined["prior"])
    mean = moments[0] / count
    error = np.sqrt(np.maximum(moments[1] / count - mean**2, 0.0) / max(count - 1, 1))
    log_snr = ops.convert_to_numpy(schedule.at(times[:-1].astype("float32")).log_snr)
    return Report(joined, int(np.prod(batch.x.shape[1:])), Curve(times[:-1], log_snr, mean, error), float(times[-2]))


def _variance(variance: Any, subject: Subject) -> Variance:
    if variance is None:
        return Learned() if subject.model is not None and subject.model.prediction.factor > 1 else Small()
    if callable(variance) and not isinstance(variance, (Variance, type)):
        return Known(variance)
    return Variance.get(variance)


def _by_step(functions: tuple, times: np.ndarray, batch: Batch, seed: int, draw: Callable | None):
    """The nats of each step of the run, float64, with shape `(batch,)`: KL divergences, and the last a likelihood."""
    key, last, times = random.key_of(seed), len(times) - 2, times.astype("float32")
    x = ops.convert_to_tensor(batch.x)
    for step in range(last + 1):
        now, then = times[step], times[step + 1]
        read = (times[max(step - 1, 0)], now) if step == last else (now, then)
        if draw is None:
            noise = random.normal(random.fold_in(key, step, random.STEPS), batch.x.shape, batch.first)
        else:
            noise = ops.convert_to_tensor(draw(step, batch.x.shape), "float32")
        nats = functions[step == last](x, noise, batch.given, (now, then, *read))
        yield ops.convert_to_numpy(nats).astype("float64")


def _step(answer, variance: Variance, clip: bool, x, noise, given, place: Place):
    """(estimate, x_t, 1 - r, log-variance) of the step at `place`."""
    now, then = place.now, place.then
    x_t = now.alpha * x + now.sigma * noise
    estimate = answer(given, x_t, now)
    if clip:
        estimate = estimate._replace(x_hat=ops.clip(estimate.x_hat, -1.0, 1.0))
    return estimate, x_t, bridge(now, then)[1], variance.log(place, estimate)


def prior(schedule: NoiseSchedule, x: np.ndarray, t: float = 1.0) -> np.ndarray:
    """KL( q(x_t | x) || N(0, sigma_t^2 I) ) of each row, in nats, float64; `t` is where the run begins."""
    end = Marginal(*(float(ops.convert_to_numpy(field)) for field in schedule.at(np.float32(t))))
    x = np.asarray(x, "float64").reshape(len(x), -1)
    return 0.5 * np.exp(end.log_snr) * np.sum(x**2, axis=1)
