"""The laws of parametrisations and loss weights, on every pair of prediction and schedule."""

import numpy as np
import pytest

from kdiff import predictions, weightings
from kdiff.predictions import Prediction
from kdiff.schedules import Marginal
from tests.toys import SCHEDULES, numpy

PREDICTIONS = [predictions.Data(), predictions.Noise(), predictions.Velocity(), predictions.Flow()]
every_pair = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)


def test_every_prediction_is_here():
    assert {type(prediction) for prediction in PREDICTIONS} == set(Prediction.names().values())


def problem(schedule, t):
    generator = np.random.default_rng(0)
    x, noise = generator.standard_normal((2, len(t), 3, 1)).astype("float32")
    m = schedule.at(np.float32(t))
    return x, noise, m, numpy(schedule(x, noise, np.float32(t)))


@every_pair
@every_prediction
def test_denoise_inverts_target(schedule, prediction):
    x, noise, m, x_t = problem(schedule, [0.001, 0.1, 0.5, 0.8])
    x_hat = prediction.denoise(prediction.target(x, noise, m), x_t, m)
    np.testing.assert_allclose(numpy(x_hat), x, rtol=1e-3, atol=2e-4)


@every_pair
@every_prediction
def test_gain_is_the_error_of_x_hat_per_error_of_the_output(schedule, prediction):
    x, noise, m, x_t = problem(schedule, [0.1, 0.5, 0.8])
    target = numpy(prediction.target(x, noise, m))
    error = numpy(prediction.denoise(target + 1.0, x_t, m)) - numpy(prediction.denoise(target, x_t, m))
    gain = numpy(prediction.gain(m))[:, None, None]
    np.testing.assert_allclose(np.abs(error), np.broadcast_to(gain, error.shape), rtol=1e-2, atol=1e-5)


@every_pair
def test_targets_are_the_published_ones(schedule):
    x, noise, m, _ = problem(schedule, [0.2, 0.6])
    alpha, sigma = numpy(m.alpha)[:, None, None], numpy(m.sigma)[:, None, None]
    expected = [x, noise, alpha * noise - sigma * x, noise - x]
    for prediction, target in zip(PREDICTIONS, expected, strict=True):
        np.testing.assert_allclose(numpy(prediction.target(x, noise, m)), target, rtol=1e-5, atol=1e-6)


@every_pair
def test_min_snr_is_the_published_weight_of_the_output(schedule):
    """Hang et al. 2023: min(SNR, g) / SNR for the noise; of the velocity, min(SNR, g) / (SNR + 1)."""
    m = schedule.at(np.float32([0.05, 0.3, 0.6, 0.9]))
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
