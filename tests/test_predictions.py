"""The laws of parametrisations and loss weights, on every pair of prediction and schedule."""

import functools

import keras
import numpy as np
import pytest

import kdiff
from kdiff import analytic, predictions, schedules, weightings
from kdiff.objectives import variance_bound
from kdiff.predictions import Prediction, check_invertible
from kdiff.schedules import Marginal
from tests.helpers_gradients import value_and_gradients
from tests.test_schedules import EVERY
from tests.toys import SCHEDULES, numpy, tiny_network

PREDICTIONS = [
    predictions.Data(),
    predictions.Noise(),
    predictions.Velocity(),
    predictions.Flow(),
    predictions.Score(),
    predictions.Karras(),
    predictions.TrigFlow(0.7),
]
LEARNED = predictions.LearnedVariance()
every_schedule = pytest.mark.parametrize("schedule", EVERY, ids=repr)
every_pair = pytest.mark.parametrize("schedule", [SCHEDULES[0], *SCHEDULES[-2:]], ids=repr)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
EPSILON = 2.0**-23


@pytest.mark.once
def test_every_prediction_is_here():
    ours = {p for p in Prediction.names().values() if p.__module__.startswith("kdiff.")}
    assert {type(prediction) for prediction in [*PREDICTIONS, LEARNED]} == ours


SHAPE = (5, 6, 1)  # of most batches here, so that JAX compiles each operation once


@functools.cache
def problem(schedule, t=(0.0, 0.001, 0.5, 0.8, 1.0)):
    """(x, noise, m, x_t) at five times."""
    x, noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype("float32")
    t = np.float32(t)
    return x, noise, schedule.at(t), numpy(schedule(x, noise, t))


def columns(prediction, m, rank=3):
    """a, b, alpha and sigma in float64, with shape (batch, 1, 1)."""
    numbers = (*prediction.coefficients(m), m.alpha, m.sigma)
    shape = (-1, *[1] * (rank - 1))
    return [np.reshape(np.broadcast_to(numpy(v).astype("float64"), numpy(m.t).shape), shape) for v in numbers]


@every_schedule
@every_prediction
def test_denoise_inverts_target(schedule, prediction):
    """From t = 0 to t = 1. x_hat is a difference, of b x_t and sigma y over b alpha - a sigma: what float32 rounds off
    these two, a few units in the last place, is multiplied by what the division makes of them. Near t = 1 that is all
    that is left of x in the noise, or the score: its test there is the next.
    """
    x, noise, m, x_t = problem(schedule)
    y = prediction.target(x, noise, m)
    a, b, alpha, sigma = columns(prediction, m)
    size = (np.abs(b * x_t) + np.abs(sigma * numpy(y))) / np.abs(b * alpha - a * sigma)
    error = np.abs(numpy(prediction.denoise(y, x_t, m)) - x)
    assert np.isfinite(error).all()
    assert np.all(error <= 8 * EPSILON * size + 1e-6)


@pytest.mark.parametrize("schedule", [EVERY[0], EVERY[11], EVERY[12], EVERY[13], EVERY[-1]], ids=repr)
@every_prediction
def test_formulas_in_float64(schedule, prediction):
    """target and denoise from the same float32 x_t and m, with nothing but rounding between."""
    x, noise, m, x_t = problem(schedule)
    a, b, alpha, sigma = columns(prediction, m)
    target = a * x + b * noise
    size = np.abs(a * x) + np.abs(b * noise)
    assert np.all(np.abs(numpy(prediction.target(x, noise, m)) - target) <= 4 * EPSILON * size)
    y = np.float32(target)
    size = (np.abs(b * x_t) + np.abs(sigma * y)) / np.abs(b * alpha - a * sigma)
    x_hat = (b * x_t - sigma * y.astype("float64")) / (b * alpha - a * sigma)
    assert np.all(np.abs(numpy(prediction.denoise(y, x_t, m)) - x_hat) <= 8 * EPSILON * size)
    np.testing.assert_allclose(
        numpy(prediction.gain(m)), (sigma / np.abs(b * alpha - a * sigma)).ravel(), rtol=8 * EPSILON
    )


@pytest.mark.once
@every_pair
@every_prediction
def test_gain_is_the_error_of_x_hat_per_error_of_the_output(schedule, prediction):
    x, noise, m, x_t = problem(schedule, (0.1, 0.3, 0.5, 0.6, 0.8))
    target = numpy(prediction.target(x, noise, m))
    error = numpy(prediction.denoise(target + 1.0, x_t, m)) - numpy(prediction.denoise(target, x_t, m))
    gain = numpy(prediction.gain(m))[:, None, None]
    np.testing.assert_allclose(np.abs(error), np.broadcast_to(gain, error.shape), rtol=1e-2, atol=1e-5)


@every_pair
def test_targets_are_the_published_ones(schedule):
    x, noise, m, x_t = problem(schedule, (0.1, 0.2, 0.4, 0.6, 0.8))
    alpha, sigma = (numpy(v).astype("float64")[:, None, None] for v in (m.alpha, m.sigma))
    s, z = sigma / alpha, x_t / alpha
    skip, out = 0.25 / (s**2 + 0.25), 0.5 * s / np.sqrt(s**2 + 0.25)
    u = np.arctan(s / 0.7)
    trigflow = np.cos(u) * noise - np.sin(u) * x / 0.7
    expected = [x, noise, alpha * noise - sigma * x, noise - x, -noise / sigma, (x - skip * z) / out, trigflow]
    for prediction, target in zip(PREDICTIONS, expected, strict=True):
        np.testing.assert_allclose(numpy(prediction.target(x, noise, m)), target, rtol=2e-5, atol=2e-5)


@pytest.mark.once
def test_karras_is_table_1_of_edm():
    """c_skip, c_out and c_in on their schedule, in float64; the noise level is sigma, alpha being 1."""
    schedule, prediction = schedules.VarianceExploding(), predictions.Karras(0.5)
    x, _, m, x_t = problem(schedule)
    s = numpy(m.sigma).astype("float64")[:, None, None]
    total = s**2 + 0.5**2
    output = np.random.default_rng(1).standard_normal(x.shape)
    x_hat = 0.5**2 / total * x_t + s * 0.5 / np.sqrt(total) * output
    np.testing.assert_allclose(numpy(prediction.denoise(output, x_t, m)), x_hat, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numpy(prediction.input_scale(m)), (1 / np.sqrt(total)).ravel(), rtol=1e-6)
    weight = (total / (s * 0.5) ** 2).ravel()
    np.testing.assert_allclose(weight * numpy(prediction.gain(m)) ** 2, 1, rtol=1e-5)


@pytest.mark.once
@every_schedule
@pytest.mark.parametrize("prediction", [predictions.Karras(0.8), predictions.TrigFlow(0.3)], ids=repr)
def test_input_and_target_have_unit_variance(schedule, prediction):
    """EDM, appendix B.6: of data with the standard deviation sigma_data."""
    _, _, m, _ = problem(schedule)
    a, b, alpha, sigma = (v.ravel() for v in columns(prediction, m))
    spread = prediction.sigma_data
    scale = numpy(prediction.input_scale(m))
    np.testing.assert_allclose(scale**2 * (alpha**2 * spread**2 + sigma**2), 1, rtol=2e-6)
    np.testing.assert_allclose(a**2 * spread**2 + b**2, 1, rtol=2e-6)


def test_trigflow_on_its_own_schedule_is_velocity():
    x, noise, m, _ = problem(schedules.Trigonometric())
    one, other = (p.target(x, noise, m) for p in (predictions.TrigFlow(1.0), predictions.Velocity()))
    np.testing.assert_allclose(numpy(one), numpy(other), rtol=1e-5, atol=1e-6)


def test_trigflow_is_the_negative_of_karras():
    x, noise, m, _ = problem(schedules.Rectified())
    one, other = (p.target(x, noise, m) for p in (predictions.TrigFlow(0.6), predictions.Karras(0.6)))
    np.testing.assert_array_equal(numpy(one), -numpy(other))


@every_pair
def test_the_score_denoises(schedule):
    """Tweedie's formula, on data whose score and whose E[x | x_t] are known."""
    data = analytic.GaussianMixture([[-0.8, 0.2], [0.5, -0.6]], [0.3, 0.2])
    m = schedule.at(np.float32([0.1, 0.4, 0.5, 0.7, 0.8]))
    x_t = np.float32([[0.3, -0.2], [0.9, 0.1], [-1.1, 0.5], [0.0, 2.0], [1.0, 1.0]])
    x_hat = predictions.Score().denoise(data.score(x_t, m), x_t, m)
    np.testing.assert_allclose(numpy(x_hat), numpy(data(x_t, m)), rtol=1e-3, atol=1e-4)


@every_prediction
def test_what_most_predictions_leave_alone(prediction):
    m, output = schedules.Cosine().at(0.2), np.ones((5, 6, 2), "float32")
    assert prediction.factor == 1
    assert prediction.value(output) is output
    assert prediction.share(output) is None
    if not isinstance(prediction, predictions.Karras):
        assert prediction.input_scale(m) == 1.0


@every_pair
def test_min_snr_is_the_published_weight_of_the_output(schedule):
    """Hang et al. 2023: min(SNR, g) / SNR for the noise; of the velocity, min(SNR, g) / (SNR + 1)."""
    _, _, m, _ = problem(schedule, (0.05, 0.1, 0.3, 0.6, 0.9))
    snr = np.exp(numpy(m.log_snr).astype("float64"))
    weight = numpy(weightings.MinSNR(5.0)(m.log_snr))
    of_noise = weight * numpy(predictions.Noise().gain(m)) ** 2
    np.testing.assert_allclose(of_noise, np.minimum(snr, 5) / snr, rtol=1e-3)
    np.testing.assert_allclose(weight * numpy(predictions.Data().gain(m)) ** 2, np.minimum(snr, 5), rtol=1e-3)
    if abs(numpy(m.alpha)[0] ** 2 + numpy(m.sigma)[0] ** 2 - 1) < 1e-5:
        of_velocity = weight * numpy(predictions.Velocity().gain(m)) ** 2
        np.testing.assert_allclose(of_velocity, np.minimum(snr, 5) / (snr + 1), rtol=1e-3)


def test_gamma():
    log_snr = np.float32([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(numpy(weightings.MinSNR(1.0)(log_snr)), [np.exp(-2), 1, 1], rtol=1e-6)
    with pytest.raises(ValueError, match="gamma"):
        weightings.MinSNR(-1.0)


def test_scalar_times_broadcast():
    m = SCHEDULES[0].at(0.5)
    x = np.ones((2, 4, 4, 1), "float32")
    for prediction in PREDICTIONS:
        assert numpy(prediction.denoise(x, x, m)).shape == x.shape
    assert Marginal(*map(numpy, m)).alpha.shape == ()


# Predictions that do not fix the data


@every_schedule
def test_every_prediction_fixes_the_data(schedule):
    for prediction in [*PREDICTIONS, LEARNED]:
        check_invertible(prediction, schedule)


class _Mixture(Prediction):
    """Any a and b."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def coefficients(self, m):
        return self.a(m), self.b(m)


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        (lambda m: m.alpha, lambda m: m.sigma, "0 at t = 0"),  # x_t itself
        (
            lambda m: 1.0,
            lambda m: 1.0,
            r"0\.99\d* at t = 0",
        ),  # alpha - sigma, which changes its sign where they are equal
        (lambda m: 0.0, lambda m: 0.0, "0 at t = 0"),
        (lambda m: 0.0, lambda m: 1.0 / (m.t - m.t), "nan|inf"),
    ],
    ids=["x_t", "crossing", "nothing", "infinite"],
)
def test_predictions_that_do_not_fix_the_data(a, b, value):
    prediction = _Mixture(a, b)
    with pytest.raises(ValueError, match=rf"does not fix the data on Cosine\(\): b alpha - a sigma is.*({value})"):
        check_invertible(prediction, schedules.Cosine())
    with pytest.raises(ValueError, match="does not fix the data"):
        kdiff.DiffusionModel(tiny_network(), prediction=prediction)


# The learned variance


def ddpm(steps):
    """Betas, alpha-bars, posterior variances and their clipped logarithms, as Nichol and Dhariwal have them."""
    beta = np.linspace(1e-3, 0.3, steps)
    bar = np.cumprod(1 - beta)
    previous = np.append(1.0, bar[:-1])
    posterior = beta * (1 - previous) / (1 - bar)
    return beta, bar, previous, posterior, np.log(np.append(posterior[1], posterior[1:]))


def hybrid(output, x, x_t, i, steps):
    """T L of eq. 16 for a network that predicts the noise: eqs. 8 to 11 of DDPM, 15 of improved DDPM; float64."""
    norm = pytest.importorskip("scipy.stats").norm
    beta, bar, previous, posterior, log_posterior = ddpm(steps)
    noise, v = np.split(output.astype("float64"), 2, axis=-1)
    share = (v + 1) / 2
    log_variance = share * np.log(beta[i]) + (1 - share) * log_posterior[i]
    from_x = np.sqrt(previous[i]) * beta[i] / (1 - bar[i])
    from_x_t = np.sqrt(1 - beta[i]) * (1 - previous[i]) / (1 - bar[i])
    mean = from_x * (x_t - np.sqrt(1 - bar[i]) * noise) / np.sqrt(bar[i]) + from_x_t * x_t
    if i > 0:
        true = from_x * x + from_x_t * x_t
        ratio = posterior[i] / np.exp(log_variance)
        term = 0.5 * (-np.log(ratio) + ratio + (true - mean) ** 2 / np.exp(log_variance) - 1)
    else:
        std = np.exp(0.5 * log_variance)
        upper, lower = (x - mean + 1 / 255) / std, (x - mean - 1 / 255) / std
        # The mass of a bin, on the side where both numbers are small.
        inside = np.where(lower > 0, norm.sf(lower) - norm.sf(upper), norm.cdf(upper) - norm.cdf(lower))
        with np.errstate(divide="ignore"):
            inside = np.log(inside)
        term = -np.where(x < -0.999, norm.logcdf(upper), np.where(x > 0.999, norm.logsf(lower), inside))
    return steps * term.reshape(len(x), -1).mean(axis=1)


def learned_problem(steps, indices, seed=0):
    """8-bit data with both ends among it, and an output that is the noise, not quite."""
    generator = np.random.default_rng(seed)
    shape = SHAPE
    x = generator.integers(0, 256, shape)
    x[:, 0], x[:, 1] = 0, 255
    x = (x / 127.5 - 1).astype("float32")
    noise = generator.standard_normal(shape).astype("float32")
    schedule = schedules.LinearBeta(steps, 1e-3, 0.3)
    m = schedule.at(np.float32((np.array(indices) + 1) / steps))
    x_t = numpy(schedule(x, noise, m.t))
    output = np.concatenate([noise + 0.3 * generator.standard_normal(shape), generator.uniform(-1, 1, shape)], axis=-1)
    return schedule, m, x, x_t, output.astype("float32")


def test_learned_variance_is_that_of_improved_ddpm():
    """All terms of the bound, the first, a likelihood, too; there the deviation of a bin is 0.03 or more."""
    steps, indices = 20, [0, 1, 2, 10, 19]
    schedule, m, x, x_t, output = learned_problem(steps, indices)
    loss = numpy(variance_bound(predictions.LearnedVariance("noise", weight=1.0), output, x, x_t, schedule, m))
    assert loss.shape == (5,)
    for n, i in enumerate(indices):
        expected = hybrid(output[n : n + 1], x[n : n + 1], x_t[n : n + 1], i, steps)[0]
        assert loss[n] == pytest.approx(expected, rel=1e-3), i
    default = numpy(variance_bound(LEARNED, output, x, x_t, schedule, m))
    np.testing.assert_allclose(default, 0.001 * loss, rtol=1e-5)


def test_learned_variance_trains_the_variance_alone():
    """No gradient reaches the first half; that of the second half is a difference quotient of the float64 formula."""
    steps, indices = 20, [0, 1, 4, 12, 19]
    schedule, m, x, x_t, output = learned_problem(steps, indices)
    learned = predictions.LearnedVariance("noise", weight=1.0)

    class Network(keras.layers.Layer):
        def build(self, shape):
            self.output_ = self.add_weight(shape=output.shape, initializer="zeros", name="output")

        def call(self, x_t):
            return variance_bound(learned, self.output_.value, x, x_t, schedule, m)

    layer = Network()
    layer.build(None)
    layer.output_.assign(output)
    _, gradients = value_and_gradients(layer, x_t)
    gradient = next(iter(gradients.values()))
    np.testing.assert_array_equal(gradient[..., 0], 0)
    weights = np.random.default_rng(1).standard_normal(5).astype("float32")  # those of value_and_gradients
    for n, i in enumerate(indices):
        change = np.float64([0.0, 1e-5])
        before, after = (
            hybrid(output[n : n + 1] + d, x[n : n + 1], x_t[n : n + 1], i, steps) for d in (-change, change)
        )
        expected = weights[n] * (after - before)[0] / 2e-5
        assert gradient[n, ..., 1].sum() == pytest.approx(expected, rel=2e-3, abs=1e-4)


@every_schedule
def test_learned_bound_is_zero_where_the_network_is_right(schedule):
    """With the true noise and the posterior's variance, v = -1, the divergence is 0; with v = 1 it is that of two
    Gaussians of one mean, (log(q) + 1 / q - 1) / 2, q = beta / beta_tilde = sigma_now^2 / sigma_then^2.
    """
    x, noise, m, x_t = problem(schedule, (0.2, 0.3, 0.4, 0.6, 0.8))
    learned = predictions.LearnedVariance("velocity", weight=1.0)
    target = numpy(learned.target(x, noise, m))
    steps = schedule.num_steps or 1000
    then = schedule.at(numpy(m.t) - np.float32(1 / steps))
    q = (numpy(m.sigma).astype("float64") / numpy(then.sigma)) ** 2
    for v, expected in ((-1.0, 0 * q), (1.0, 0.5 * (np.log(q) + 1 / q - 1))):
        output = np.concatenate([target, np.full_like(target, v)], axis=-1)
        loss = numpy(variance_bound(learned, output, x, x_t, schedule, m)) / steps
        # A rounding of log_snr, 1e-6, against a step of 1 / T of it.
        np.testing.assert_allclose(loss, expected, atol=2e-4 * np.max(0.5 * (np.log(q) + 1 / q - 1)) + 1e-5)


@pytest.mark.parametrize("schedule", [schedules.Cosine(), schedules.VarianceExploding(0.02)], ids=repr)
def test_learned_variance_on_continuous_schedules(schedule):
    """In float64, from `schedule.posterior`, T = 100: between two steps, and within the last of them."""
    norm = pytest.importorskip("scipy.stats").norm
    x, noise, m, x_t = problem(schedule, (0.005, 0.02, 0.3428, 0.6, 1.0))
    x = np.clip(x, -0.9, 0.9)
    v = np.random.default_rng(2).uniform(-1, 1, x.shape)
    loss = variance_bound(
        predictions.LearnedVariance("noise", num_steps=100, weight=1.0),
        np.concatenate([noise, v], axis=-1),
        x,
        x_t,
        schedule,
        m,
    )
    then = schedule.at(np.maximum(numpy(m.t) - np.float32(0.01), 0))
    x_hat = predictions.Noise().denoise(noise, x_t, m)
    (true, small), (mean, _) = (schedule.posterior(v, x_t, m, then) for v in (x, x_hat))
    true, small, mean = (numpy(v).astype("float64") for v in (true, small, mean))
    large = small * (numpy(m.sigma) / numpy(then.sigma))[:, None, None].astype("float64") ** 2
    clipped = schedule.posterior(x, x_t, schedule.at(np.float32([0.02] * 5)), schedule.at(np.float32([0.01] * 5)))[1]
    small[0] = numpy(clipped)[0]
    variance = small ** ((1 - v) / 2) * large ** ((1 + v) / 2)
    terms = 0.5 * (np.log(variance / small) + small / variance - 1 + (true - mean) ** 2 / variance)
    std = np.sqrt(variance)
    mass = norm.cdf((x - mean + 1 / 255) / std) - norm.cdf((x - mean - 1 / 255) / std)
    terms[0] = -np.log(mass[0])
    np.testing.assert_allclose(numpy(loss), 100 * terms.mean(axis=(1, 2)), rtol=2e-3)


def test_learned_variance_is_finite_everywhere():
    """From an output far off, at the first and the last times of every schedule, between two steps too."""
    for schedule in EVERY:
        x, noise, m, x_t = problem(schedule, (1e-7, 0.0004, 0.0013, 0.5, 1.0))
        for size in (0.0, 30.0):
            output = np.concatenate([size * noise, np.full_like(x, size)], axis=-1)
            assert np.isfinite(
                numpy(variance_bound(predictions.LearnedVariance("velocity"), output, x, x_t, schedule, m))
            ).all()


def test_learned_variance_passes_the_rest_on():
    _, m, x, x_t, output = learned_problem(20, [3, 4, 5, 6, 7])
    learned, plain = predictions.LearnedVariance(predictions.Karras(0.6)), predictions.Karras(0.6)
    assert learned.factor == 2
    np.testing.assert_array_equal(numpy(learned.value(output)), output[..., :1])
    np.testing.assert_allclose(numpy(learned.share(output)), (output[..., 1:] + 1) / 2)
    np.testing.assert_array_equal(numpy(learned.input_scale(m)), numpy(plain.input_scale(m)))
    np.testing.assert_array_equal(numpy(learned.gain(m)), numpy(plain.gain(m)))
    np.testing.assert_array_equal(numpy(learned.target(x, x, m)), numpy(plain.target(x, x, m)))
    expected = plain.denoise(output[..., :1], x_t, m)
    np.testing.assert_array_equal(numpy(learned.denoise(output, x_t, m)), numpy(expected))
    assert Prediction.get(keras.saving.serialize_keras_object(learned)) == learned


def test_the_last_step_may_be_rounded_up():
    schedule, m, x, x_t, output = learned_problem(20, [0] * 5)
    above = schedule.at(np.nextafter(numpy(m.t), np.float32(1)))
    assert np.all(numpy(above.t) * 20 > 1)
    one, other = (numpy(variance_bound(LEARNED, output, x, x_t, schedule, v)) for v in (m, above))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_learned_variance_with_one_time_for_all():
    schedule, _, x, x_t, output = learned_problem(20, [7] * 5)
    single = variance_bound(LEARNED, output, x, x_t, schedule, schedule.at(0.4))
    several = variance_bound(LEARNED, output, x, x_t, schedule, schedule.at(np.float32([0.4] * 5)))
    np.testing.assert_allclose(numpy(single), numpy(several), rtol=1e-6)


def test_number_of_steps():
    """Its own, else the schedule's, else 1000. L, of a step of 1 / T, falls about as 1 / T^2, and T L as 1 / T."""
    x, noise, m, x_t = problem(schedules.Cosine(), (0.2, 0.3, 0.35, 0.4, 0.5))
    output = np.concatenate([noise, np.ones_like(noise)], axis=-1)
    loss = [
        numpy(variance_bound(predictions.LearnedVariance(num_steps=steps), output, x, x_t, schedules.Cosine(), m))
        for steps in (None, 1000, 100)
    ]
    np.testing.assert_array_equal(loss[0], loss[1])
    np.testing.assert_allclose(loss[2], 10 * loss[0], rtol=0.1)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: predictions.Karras(0.0), "sigma_data"),
        (lambda: predictions.TrigFlow(-1.0), "TrigFlow: `sigma_data`"),
        (lambda: predictions.LearnedVariance(num_steps=1), "num_steps"),
        (lambda: predictions.LearnedVariance(weight=-1.0), "weight"),
        (lambda: predictions.LearnedVariance(LEARNED), "one output a channel"),
        (lambda: predictions.LearnedVariance("nois"), "Did you mean 'noise'"),
        (lambda: LEARNED.value(np.ones((1, 3))), "even number of channels"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
