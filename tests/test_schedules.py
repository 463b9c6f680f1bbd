"""The laws of schedules, on every schedule, against float64 formulas."""

import keras
import numpy as np
import pytest

from kdiff import schedules
from kdiff.schedules import Marginal, NoiseSchedule
from tests.toys import SCHEDULES, numpy

TIMES = np.linspace(0, 1, 2001).astype("float32")


def marginal(schedule, t):
    return Marginal(*map(numpy, schedule.at(t)))


@pytest.fixture(params=SCHEDULES, ids=repr)
def schedule(request):
    return request.param


def test_every_schedule_is_here():
    ours = {c for c in NoiseSchedule.names().values() if c.__module__.startswith("kdiff.")}
    assert {type(schedule) for schedule in SCHEDULES} == ours


def test_log_snr_decreases_and_time_inverts_it(schedule):
    log_snr = numpy(schedule.log_snr(TIMES))
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(numpy(schedule.time(log_snr)), TIMES, atol=5e-7)


def test_scales_are_finite_and_agree_with_log_snr(schedule):
    m = marginal(schedule, TIMES)
    assert all(np.isfinite(field).all() for field in m)
    assert np.all(m.alpha > 0)
    assert np.all(m.sigma > 0)
    np.testing.assert_allclose(2 * np.log(m.alpha.astype("float64") / m.sigma), m.log_snr, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(numpy(schedule.snr(TIMES)), (m.alpha.astype("float64") / m.sigma) ** 2, rtol=2e-5)
    total = m.alpha + m.sigma if isinstance(schedule, schedules.Rectified) else m.alpha**2 + m.sigma**2
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert m.alpha[0] > 0.999
    assert m.sigma[0] < 0.001


def test_forward_process_has_its_mean_and_variance(schedule):
    x, noise, t = np.full((3, 2, 2, 1), 0.7), np.random.default_rng(0).standard_normal((3, 2, 2, 1)), [0.1, 0.5, 1.0]
    m = marginal(schedule, t)
    expected = m.alpha[:, None, None, None] * x + m.sigma[:, None, None, None] * noise
    np.testing.assert_allclose(numpy(schedule(x, noise, np.array(t))), expected, rtol=1e-5)


def test_posterior_is_bayes_rule(schedule):
    """q(x_then | x_now, x) averaged over q(x_now | x) is q(x_then | x), and it is the Gaussian product formula."""
    now, then = (schedule.at(np.array([t])) for t in (0.7, 0.4))
    zero, one = np.zeros((1, 1), "float32"), np.ones((1, 1), "float32")
    from_x, variance = (numpy(v).item() for v in schedule.posterior(one, zero, now, then))
    kept = numpy(schedule.posterior(zero, one, now, then)[0]).item()
    a_now, s_now, a_then, s_then = (float(v) for m in (now, then) for v in (numpy(m.alpha)[0], numpy(m.sigma)[0]))
    assert from_x + kept * a_now == pytest.approx(a_then, rel=1e-4)
    assert variance + kept**2 * s_now**2 == pytest.approx(s_then**2, rel=1e-4)
    ratio = a_now / a_then
    step = s_now**2 - ratio**2 * s_then**2  # the variance of q(x_now | x_then)
    assert variance == pytest.approx(1 / (1 / s_then**2 + ratio**2 / step), rel=1e-3)


def test_posterior_is_that_of_ddpm():
    """Ho et al. 2020, eqs. 6 and 7, with their discrete indices, in float64."""
    schedule = schedules.LinearBeta()
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    for i in (1, 10, 500, 999):
        now, then = schedule.at(np.float32([(i + 1) / 1000])), schedule.at(np.float32([i / 1000]))
        x, x_t = np.float32([[0.3]]), np.float32([[-1.2]])
        mean, variance = (numpy(v).item() for v in schedule.posterior(x, x_t, now, then))
        rest = 1 - bar[i]
        expected = np.sqrt(bar[i - 1]) * beta[i] / rest * 0.3 + np.sqrt(1 - beta[i]) * (1 - bar[i - 1]) / rest * -1.2
        assert mean == pytest.approx(expected, rel=2e-4, abs=1e-5)
        assert variance == pytest.approx((1 - bar[i - 1]) / rest * beta[i], rel=2e-3)


@pytest.mark.parametrize(
    ("schedule", "bar"),
    [
        (schedules.LinearBeta(100), np.cumprod(1 - np.linspace(1e-4, 0.02, 100))),
        (schedules.ScaledLinearBeta(), np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)),
        (
            schedules.CosineBeta(50, max_beta=1.0 - 1e-9),
            np.cos((np.arange(1, 51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2,
        ),
    ],
    ids=["linear", "scaled linear", "cosine"],
)
def test_tables_are_the_published_formulas(schedule, bar):
    times = np.arange(1, len(bar)) / len(bar)  # the last alpha-bar of the cosine is 0 but for the clipping
    m = marginal(schedule, times)
    np.testing.assert_allclose(m.alpha, np.sqrt(bar[:-1]), rtol=2e-5)
    np.testing.assert_allclose(m.sigma, np.sqrt(1 - bar[:-1]), rtol=2e-5)


def test_cosine_beta_is_clipped():
    assert schedules.CosineBeta().betas.max() == 0.999
    assert schedules.CosineBeta(max_beta=0.5).betas.max() == 0.5


def test_cosine_is_a_cosine_to_the_ends():
    """In float64, near t = 1 too, where tan loses its digits."""
    t = np.array([0.0, 0.001, 0.3, 0.5, 0.9, 0.999, 1.0])
    first, last = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    angle = first + t * (last - first)
    m = marginal(schedules.Cosine(), t)
    np.testing.assert_allclose(m.alpha, np.cos(angle), rtol=1e-5)
    np.testing.assert_allclose(m.sigma, np.sin(angle), rtol=1e-5)
    assert m.log_snr[-1] == pytest.approx(-15, abs=1e-4)
    assert numpy(schedules.Cosine(-4.0, 9.0).log_snr(np.float32([0, 1]))) == pytest.approx([9, -4], abs=1e-4)


def test_rectified_is_a_straight_line():
    m = marginal(schedules.Rectified(), np.array([0.0, 0.25, 0.5, 1.0]))
    np.testing.assert_allclose(m.sigma, [1e-5, 0.25, 0.5, 1 - 1e-5], rtol=1e-4)
    assert marginal(schedules.Rectified(0.01), 0.0).sigma == pytest.approx(0.01, rel=1e-5)


def test_a_schedule_is_a_layer_without_weights(schedule):
    x, noise, t = keras.Input((4, 4, 1)), keras.Input((4, 4, 1)), keras.Input(())
    model = keras.Model([x, noise, t], schedule(x, noise, t))
    assert model.weights == []
    values = [np.ones((2, 4, 4, 1), "float32"), np.ones((2, 4, 4, 1), "float32"), np.float32([0.2, 0.9])]
    np.testing.assert_allclose(model.predict(values, verbose=0), numpy(schedule(*values)), rtol=1e-5)


def test_float32_under_any_policy():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        schedule = schedules.LinearBeta()
        x_t = schedule(np.ones((1, 1), "float32"), np.ones((1, 1), "float32"), np.float32([0.999]))
    finally:
        keras.config.set_dtype_policy("float32")
    assert keras.backend.standardize_dtype(x_t.dtype) == "float32"
    m = marginal(schedules.LinearBeta(), np.float32([0.999]))
    np.testing.assert_allclose(numpy(x_t)[0], m.alpha + m.sigma, rtol=1e-6)


def test_plot(schedule, tmp_path):
    pytest.importorskip("matplotlib")
    figure = schedule.plot(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 0
    lines = figure.axes[0].get_lines()
    np.testing.assert_allclose(lines[0].get_ydata()[-1], numpy(schedule.at(1.0).alpha), rtol=1e-6)
    assert [line.get_label() for line in lines] == ["alpha", "sigma"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.BetaTable([0.1, 0.0, 0.2]), "alpha decreases"),
        (lambda: schedules.BetaTable([0.1, 1.0]), "alpha decreases"),
        (lambda: schedules.BetaTable([0.1, np.nan]), "alpha decreases"),
        (lambda: schedules.BetaTable([]), "betas"),
        (lambda: schedules.BetaTable([[0.1]]), "betas"),
        (lambda: schedules.LinearBeta(0), "num_steps"),
        (lambda: schedules.LinearBeta(10, 0.02, -0.1), "betas"),
        (lambda: schedules.ScaledLinearBeta(10, -0.1), "beta_start"),
        (lambda: schedules.CosineBeta(10, s=-1), "`s`"),
        (lambda: schedules.Cosine(5.0, -5.0), "max_log_snr"),
        (lambda: schedules.Cosine(5.0, 5.0), "max_log_snr"),
        (lambda: schedules.Rectified(0.5), "epsilon"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
