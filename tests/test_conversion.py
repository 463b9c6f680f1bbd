"""A network of one prediction and schedule as one of another."""

import numpy as np
import pytest

from kdiff import Sampler, schedules
from kdiff.conversion import convert, transfer
from kdiff.predictions import Data, Karras, LearnedVariance, Noise, Score, TrigFlow, Velocity
from kdiff.times import TimeGrid
from tests.test_predictions import EPSILON, PREDICTIONS, SHAPE, columns
from tests.toys import exact_denoiser, numpy

# One of each normalisation, with times that have nothing in common.
NORMALISATIONS = [
    schedules.Cosine(),
    schedules.VarianceExploding(),
    schedules.Rectified(),
    schedules.SubVP(),
    schedules.Shifted(schedules.LinearBeta(), 1.0),
]
every_source = pytest.mark.parametrize("source", PREDICTIONS, ids=repr)
every_trained = pytest.mark.parametrize("trained", NORMALISATIONS, ids=repr)
every_sampled = pytest.mark.parametrize("sampled", NORMALISATIONS, ids=repr)
EXACT = exact_denoiser()
LOG_SNRS = np.float32([6.0, 3.0, 1.0, -2.0, -4.0])


def problem(schedule):
    x, noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype("float32")
    m = schedule.at_log_snr(LOG_SNRS)
    alpha, sigma = (numpy(v)[:, None, None] for v in (m.alpha, m.sigma))
    return x, noise, m, alpha * x + sigma * noise


@every_source
@pytest.mark.parametrize("target", PREDICTIONS, ids=repr)
def test_the_target_of_one_is_the_target_of_the_other(source, target):
    """For all pairs of predictions, within a schedule and between two.

    The error is what float32 rounds off the two terms of y', a few units in the last place of each.
    """
    for trained, sampled in ((0, None), (0, 2), (1, 0), (3, 1), (2, 3)):
        x, noise, m, x_t = problem(NORMALISATIONS[trained])
        there = NORMALISATIONS[trained if sampled is None else sampled]
        other = there.at_log_snr(LOG_SNRS)
        y = numpy(source.target(x, noise, m))
        result = convert(y, x_t, m, source, target, None if sampled is None else there)
        a, b, alpha, sigma = columns(source, m)
        a_new, b_new, _, _ = columns(target, other)
        size = (np.abs(a_new * b) + np.abs(b_new * a)) * np.abs(x_t)
        size = size + (np.abs(b_new * alpha) + np.abs(a_new * sigma)) * np.abs(y)
        bound = 8 * EPSILON * size / np.abs(b * alpha - a * sigma)
        assert np.all(np.abs(numpy(result) - numpy(target.target(x, noise, other))) <= bound)


@every_trained
@every_sampled
def test_the_answer_to_the_rescaled_batch(trained, sampled):
    """What the documentation says of y', at t where alpha and sigma are of one size: x_hat is the same."""
    x, _, m, x_t = problem(trained)
    other = sampled.at_log_snr(m.log_snr)
    rescaled = x_t * numpy(other.like(x).alpha) / numpy(m.like(x).alpha)
    output = np.random.default_rng(1).standard_normal(x.shape).astype("float32")
    for source, target in ((Velocity(), Noise()), (Noise(), Karras()), (TrigFlow(0.7), Data()), (Score(), Velocity())):
        y = convert(output, x_t, m, source, target, sampled)
        x_hat = numpy(source.denoise(output, x_t, m))
        error = numpy(target.denoise(y, rescaled, other)) - x_hat
        assert np.abs(error).max() < 1e-5 * (1 + np.abs(x_hat).max())


@every_source
def test_there_and_back(source):
    x, noise, m, x_t = problem(NORMALISATIONS[0])
    y = numpy(source.target(x, noise, m))
    np.testing.assert_allclose(numpy(convert(y, x_t, m, source, source)), y, rtol=1e-6)


@pytest.mark.once
def test_names_will_do():
    x, noise, m, x_t = problem(NORMALISATIONS[0])
    result = convert(noise, x_t, m, "noise", "velocity", "cosine")
    np.testing.assert_allclose(numpy(result), numpy(Velocity().target(x, noise, m)), rtol=1e-4, atol=1e-5)


def test_a_learned_variance_is_kept_or_dropped():
    _, noise, m, x_t = problem(NORMALISATIONS[0])
    output = np.concatenate([noise, 0.3 + 0 * noise], axis=-1)
    plain = numpy(convert(noise, x_t, m, "noise", "velocity"))
    kept = numpy(convert(output, x_t, m, "learned_variance", LearnedVariance("velocity")))
    np.testing.assert_array_equal(kept, np.concatenate([plain, output[..., 1:]], axis=-1))
    np.testing.assert_array_equal(numpy(convert(output, x_t, m, "learned_variance", "velocity")), plain)
    with pytest.raises(ValueError, match="no learned variance"):
        convert(noise, x_t, m, "noise", "learned_variance")


class _LogSNRs(TimeGrid):
    """Equal steps of the log-SNR, from -4 to 6: of all schedules the same."""

    def __call__(self, schedule, steps):
        return numpy(schedule.time(np.linspace(-4, 6, steps + 1, dtype="float32"))).astype("float64")


@pytest.fixture(scope="module")
def runs():
    """The direct run of each schedule: x / alpha at its end."""
    return {repr(schedule): end(EXACT, schedule) for schedule in NORMALISATIONS}


def end(denoise, schedule):
    x = numpy(Sampler("ddim", grid=_LogSNRs(), steps=8)(denoise, schedule, SHAPE))
    return x / numpy(schedule.at_log_snr(np.float32(6.0)).alpha)


@every_trained
@every_sampled
def test_a_transferred_run_is_the_direct_one(trained, sampled, runs):
    """x / alpha is the same at the end of either run, and the denoiser, which checks, is asked only as it was trained.

    The tolerance is the rounding of t: 6e-8 of it are 1e-5 of log_snr where the slope is 200.
    """

    def checked(x_t, m):
        at_home = trained.at_log_snr(m.log_snr)
        for one, other in zip(m, at_home, strict=True):
            np.testing.assert_allclose(numpy(one), numpy(other), rtol=1e-6)
        return EXACT(x_t, m)

    transferred = end(transfer(checked, trained, sampled), sampled)
    np.testing.assert_allclose(transferred, runs[repr(sampled)], atol=2e-5)
    np.testing.assert_allclose(transferred, runs[repr(trained)], atol=2e-4)


def test_a_transferred_denoiser_takes_a_time_for_each_example():
    trained, sampled = NORMALISATIONS[1], NORMALISATIONS[2]
    x, _, m, x_t = problem(sampled)
    there = trained.at_log_snr(LOG_SNRS)
    x_hat = transfer(lambda x, m: 0.5 * x, trained, sampled)(x_t, m)
    expected = 0.5 * x_t * numpy(there.like(x).alpha) / numpy(m.like(x).alpha)
    np.testing.assert_allclose(numpy(x_hat), expected, rtol=1e-5)


def test_past_the_ends_of_the_trained_schedule_t_is_cut():
    seen = []

    def denoise(x_t, m):
        seen.append(float(numpy(m.t)))
        return x_t

    transferred = transfer(denoise, "variance_exploding", "rectified")
    for t in (1.0, 0.5, 0.0):
        transferred(np.ones((1, 2), "float32"), schedules.Rectified().at(t))
    assert seen[0] == 1.0
    assert 0 < seen[1] < 1
    assert seen[2] == 0.0
