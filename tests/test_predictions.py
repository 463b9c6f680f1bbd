"""The laws of parametrisations and loss weights, on every pair of prediction and schedule."""

import functools

import keras
import numpy as np
import pytest

import kdiff
from kdiff import analytic, predictions, schedules, weightings
from kdiff.predictions import Prediction, check_invertible
from kdiff.schedules import Marginal
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
    with pytest.raises(
        ValueError, match=rf"does not determine the data on Cosine\(\): b alpha - a sigma is.*({value})"
    ):
        check_invertible(prediction, schedules.Cosine())
    with pytest.raises(ValueError, match="does not determine the data"):
        kdiff.DiffusionModel(tiny_network(), prediction=prediction)


def test_learned_variance_passes_the_rest_on():
    x, noise, m, x_t = problem(schedules.LinearBeta(20, 1e-3, 0.3), (0.2, 0.25, 0.3, 0.35, 0.4))
    output = np.concatenate([0.9 * noise, np.random.default_rng(1).uniform(-1, 1, x.shape)], axis=-1).astype("float32")
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
