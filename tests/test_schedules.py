"""The laws of schedules, on every schedule, against float64 formulas."""

import sys

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import schedules
from kdiff.schedules import Marginal, NoiseSchedule
from tests.toys import SCHEDULES, numpy

EVERY = [
    *(s for s in SCHEDULES if type(s) in (schedules.LinearBeta, schedules.ScaledLinearBeta, schedules.CosineBeta)),
    schedules.SigmoidBeta(),
    schedules.BetaTable(np.linspace(1e-3, 0.2, 40)),
    schedules.AlphaBarTable(np.linspace(0.999, 0.01, 30)),
    schedules.Cosine(),
    schedules.Trigonometric(),
    schedules.Laplace(),
    schedules.Laplace(1.0, 2.0, -12.0, 14.0),
    schedules.Learned(),
    schedules.LinearVP(),
    schedules.SubVP(),
    schedules.VarianceExploding(),
    schedules.Rectified(),
    schedules.SigmoidAlphaBar(),
    schedules.SigmoidAlphaBar(-1.0, 3.0, 0.1, 1e-4),
    schedules.CosineAlphaBar(0.0, 1.0, 2.0),
    schedules.CosineAlphaBar(0.2, 0.9, 0.5),
    schedules.Shifted(schedules.Rectified(), -2.0),
    schedules.Shifted(schedules.LinearBeta(), 1.5),
    schedules.ZeroTerminalSNR(schedules.LinearBeta()),
    schedules.ZeroTerminalSNR(schedules.Cosine()),
    schedules.ZeroTerminalSNR(schedules.Rectified()),
]
TIMES = np.linspace(0, 1, 2001).astype("float32")


def marginal(schedule, t):
    return Marginal(*map(numpy, schedule.at(t)))


@pytest.fixture(params=EVERY, ids=repr)
def schedule(request):
    return request.param


@pytest.mark.once
def test_every_schedule_is_here():
    ours = {c for c in NoiseSchedule.names().values() if c.__module__.startswith("kdiff.")}
    assert {type(schedule) for schedule in EVERY} == ours


def test_log_snr_decreases_and_time_inverts_it(schedule):
    log_snr = numpy(schedule.log_snr(TIMES))
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(numpy(schedule.time(log_snr)), TIMES, atol=5e-7)


NORMALISATIONS = {
    schedules.Rectified: lambda alpha, sigma: alpha + sigma,
    schedules.SubVP: lambda alpha, sigma: alpha**2 + sigma,
    schedules.VarianceExploding: lambda alpha, sigma: alpha,
}


def test_scales_are_finite_and_agree_with_log_snr(schedule):
    m = marginal(schedule, TIMES)
    assert all(np.isfinite(field).all() for field in m)
    assert np.all(m.alpha > 0)
    assert np.all(m.sigma > 0)
    np.testing.assert_allclose(2 * np.log(m.alpha.astype("float64") / m.sigma), m.log_snr, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(numpy(schedule.snr(TIMES)), (m.alpha.astype("float64") / m.sigma) ** 2, rtol=2e-5)
    inner = getattr(schedule, "schedule", schedule)
    total = NORMALISATIONS.get(type(inner), lambda alpha, sigma: alpha**2 + sigma**2)(m.alpha, m.sigma)
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert m.alpha[0] > 0.998
    assert m.sigma[0] < 0.02


# The formulas of the papers in float64, where u is in [0, 1]; they know nothing of a log-SNR.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def trigonometric(u):
    return np.cos(np.pi / 2 * u), np.sin(np.pi / 2 * u)


def linear_vp(u):
    integral = 0.1 * u + 19.9 * u**2 / 2
    return np.exp(-integral / 2), np.sqrt(-np.expm1(-integral))


def log_linear(t):
    """VDM's before training."""
    log_snr = 13.3 - 18.3 * t
    return np.sqrt(sigmoid(log_snr)), np.sqrt(sigmoid(-log_snr))


def sub_vp(u):
    integral = 0.1 * u + 19.9 * u**2 / 2
    return np.exp(-integral / 2), -np.expm1(-integral)


def chen_sigmoid(start, end, tau):
    def scales(u):
        value, first, last = (sigmoid((start + (end - start) * v) / tau) for v in (u, 0.0, 1.0))
        gone = sigmoid(-(start + (end - start) * u) / tau) - sigmoid(-end / tau)  # last - value, with all its digits
        return np.sqrt(gone / (last - first)), np.sqrt((value - first) / (last - first))

    return scales


def chen_cosine(start, end, tau):
    def scales(u):
        value, first, last = (np.cos((start + (end - start) * v) * np.pi / 2) ** (2 * tau) for v in (u, 0.0, 1.0))
        return np.sqrt((last - value) / (last - first)), np.sqrt((value - first) / (last - first))

    return scales


def laplace(mu, b, low, high):
    """The truncated distribution by SciPy: log_snr is its quantile from above."""
    stats = pytest.importorskip("scipy.stats")

    def scales(t):
        first, last = stats.laplace.sf(high, mu, b), stats.laplace.cdf(low, mu, b)
        # From the nearer end, where the probability has its digits.
        above = stats.laplace.isf(np.minimum(first + (1 - first - last) * t, 0.6), mu, b)
        below = stats.laplace.ppf(np.minimum(last + (1 - first - last) * (1 - t), 0.6), mu, b)
        log_snr = np.where(t < 0.5, above, below)
        return np.sqrt(sigmoid(log_snr)), np.sqrt(sigmoid(-log_snr))

    return scales


def zero_terminal(scales):
    """Lin et al. 2024, algorithm 1, on a function that is variance preserving."""

    def rescaled(t):
        alpha, first, last = scales(t)[0], scales(0.0)[0], scales(1.0)[0]
        new = (alpha - last) * first / (first - last)
        return np.maximum(new, 2e-9), np.sqrt(1 - new**2)

    return rescaled


def shortened(scales, epsilon):
    return lambda t: scales(epsilon + (1 - 2 * epsilon) * t)


def cosine(t):
    first, last = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    angle = first + t * (last - first)
    return np.cos(angle), np.sin(angle)


def shifted_line(t):
    """Rectified, t' = k t / (1 + (k - 1) t), k = e (Esser et al. 2024, eq. 23)."""
    u = 1e-5 + (1 - 2e-5) * t
    return (1 - u) / (1 + (np.e - 1) * u), np.e * u / (1 + (np.e - 1) * u)


REFERENCES = [
    (schedules.Cosine(), cosine),
    (schedules.Trigonometric(), shortened(trigonometric, 1e-5)),
    (schedules.Laplace(), laplace(0.0, 0.5, -15.0, 15.0)),
    (schedules.Laplace(1.0, 2.0, -12.0, 14.0), laplace(1.0, 2.0, -12.0, 14.0)),
    (schedules.Learned(), log_linear),
    (schedules.LinearVP(), lambda t: linear_vp(1e-5 + (1 - 1e-5) * t)),
    (schedules.SubVP(), lambda t: sub_vp(1e-5 + (1 - 1e-5) * t)),
    (schedules.VarianceExploding(), lambda t: (np.ones_like(t), 0.002 * (80 / 0.002) ** t)),
    (schedules.Rectified(), shortened(lambda u: (1 - u, u), 1e-5)),
    (schedules.SigmoidAlphaBar(), shortened(chen_sigmoid(-3, 3, 1), 1e-6)),
    (schedules.SigmoidAlphaBar(-1.0, 3.0, 0.1, 1e-4), shortened(chen_sigmoid(-1, 3, 0.1), 1e-4)),
    (schedules.CosineAlphaBar(), shortened(trigonometric, 1e-5)),
    (schedules.CosineAlphaBar(0.0, 1.0, 2.0), shortened(chen_cosine(0, 1, 2), 1e-5)),
    (schedules.CosineAlphaBar(0.2, 0.9, 0.5), shortened(chen_cosine(0.2, 0.9, 0.5), 1e-5)),
    (schedules.Shifted(schedules.Rectified(), -2.0), shifted_line),
    (schedules.ZeroTerminalSNR(schedules.Cosine()), zero_terminal(cosine)),
]
every_formula = pytest.mark.parametrize(
    ("schedule", "formula"), REFERENCES, ids=lambda v: repr(v) if v in EVERY else ""
)
CLOSE = np.float32([0, 1e-7, 1e-5, 1e-3, 0.02, 0.3, 0.499, 0.5, 0.501, 0.7, 0.98, 0.999, 1 - 1e-5, 1 - 2**-23, 1])


@pytest.mark.once
def test_every_continuous_schedule_has_a_formula():
    continuous = {type(schedule) for schedule in EVERY if schedule.num_steps is None}
    assert {type(schedule) for schedule, _ in REFERENCES} == continuous


@every_formula
def test_formulas_to_the_ends(schedule, formula):
    """To a few units in the last place of log_snr, and of alpha and sigma to the same relative error."""
    m = marginal(schedule, CLOSE)
    alpha, sigma = formula(CLOSE.astype("float64"))
    tolerance = 2e-6 + 2e-7 * np.abs(m.log_snr)
    if isinstance(schedule, schedules.ZeroTerminalSNR):
        # Algorithm 1 subtracts alpha(1) from alpha, and what float32 has lost of them stays.
        tolerance = tolerance * (1 + cosine(CLOSE.astype("float64"))[0] / alpha)
    assert np.all(np.abs(m.alpha / alpha - 1) < tolerance)
    assert np.all(np.abs(m.sigma / sigma - 1) < tolerance)


@every_formula
def test_slope_is_the_derivative(schedule, formula):
    """Of the float64 formula, by a central difference that is good to 1e-5 at these times."""
    t, h = np.float32([1e-3, 0.02, 0.3, 0.45, 0.55, 0.7, 0.98, 0.999]), 1e-6
    after, before = (2 * np.log(np.divide(*formula(t.astype("float64") + d))) for d in (h, -h))
    np.testing.assert_allclose(numpy(schedule.slope(t)), (after - before) / (2 * h), rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["LinearVP", "SubVP", "Rectified", "SigmoidAlphaBar", "CosineAlphaBar", "Trigonometric"]
)
def test_slope_where_much_is_cut_off(kind):
    """With an epsilon that is not lost in the tolerance: a central difference over 0.02, to its third derivative."""
    schedule, t = getattr(schedules, kind)(epsilon=0.08), np.linspace(0.3, 0.6, 15, dtype="float32")  # as CLOSE
    difference = (numpy(schedule.log_snr(t + 0.01)) - numpy(schedule.log_snr(t - 0.01))) / 0.02
    np.testing.assert_allclose(numpy(schedule.slope(t)), difference, rtol=2e-3)


def test_the_ends_of_what_is_trained(schedule):
    first = 1.0 / schedule.num_steps if schedule.num_steps else 0.0
    assert schedule.first_time == first
    expected = numpy(schedule.log_snr(np.float32([first, 1.0])))
    assert [float(numpy(end)) for end in schedule.log_snr_ends()] == pytest.approx(expected.tolist())


def test_times_of_any_shape(schedule):
    t = np.linspace(0.05, 0.95, 15, dtype="float32")
    log_snr, slope = numpy(schedule.log_snr(t)), numpy(schedule.slope(t))
    for shape, some in (((3, 5), slice(None)), ((), 7)):
        shaped = numpy(schedule.log_snr(t[some].reshape(shape)))
        np.testing.assert_allclose(shaped, log_snr[some].reshape(shape), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(numpy(schedule.time(shaped)), t[some].reshape(shape), atol=5e-7)
        np.testing.assert_allclose(numpy(schedule.slope(t[some].reshape(shape))), slope[some].reshape(shape), rtol=1e-5)


def test_nearest_time_that_the_process_has():
    table, continuous = schedules.LinearBeta(10), schedules.Cosine()
    nearest = {0: 0, 0.01: 0.1, 0.14: 0.1, 0.16: 0.2, 0.5: 0.5, 0.96: 1.0, 1.0: 1.0}
    assert {t: table.nearest(t) for t in nearest} == nearest
    assert {t: continuous.nearest(t) for t in nearest} == {t: t for t in nearest}


def test_slope_to_the_ends(schedule):
    slope = numpy(schedule.slope(TIMES))
    assert slope.shape == TIMES.shape
    assert np.isfinite(slope).all()
    assert np.all(slope < 0)


@pytest.mark.once
def test_slope_of_the_cosine_near_its_ends():
    """In float32 too, where sin(2 u) near pi / 2 would lose its digits."""
    t = np.float32([0.0, 1e-5, 1.0 - 2.0**-17, 1.0])
    first, rest = np.arctan(np.exp(-10.0)), np.arctan(np.exp(-10.0))
    span = np.pi / 2 - first - rest
    wanted = -4.0 * span / np.sin(2.0 * (first + span * np.minimum(t, 1.0 - t.astype("float64"))))
    np.testing.assert_allclose(numpy(schedules.Cosine(-20.0, 20.0).slope(t)), wanted, rtol=1e-5)


def some(num_steps):
    """15 of the steps 1 ... T, both ends among them: the shape of CLOSE, so that JAX compiles nothing new."""
    return np.linspace(1, num_steps, 15).astype(int)


@pytest.mark.parametrize("schedule", [s for s in EVERY if s.num_steps], ids=repr)
def test_slope_of_a_table_is_the_difference_of_its_steps(schedule):
    """At a step, and within the interval before it; float32 log-SNRs leave an error of 1e-6 T."""
    steps = schedule.num_steps
    later = np.maximum(some(steps), 2)  # the first interval has the slope of the second
    difference = steps * (numpy(schedule.log_snr(later / steps)) - numpy(schedule.log_snr((later - 1) / steps)))
    for part in (0.0, 0.5, 0.97):
        slope = numpy(schedule.slope((some(steps) - part) / steps))
        np.testing.assert_allclose(slope, difference, rtol=1e-3, atol=4e-6 * steps)
    assert numpy(schedule.slope(0.0)) == pytest.approx(difference[0], rel=1e-3)


def test_slope_at_every_step():
    """At a time whose product with T is rounded up, too: of those there are some."""
    schedule = schedules.LinearBeta()
    steps = np.arange(2, 1001)
    t = (steps / 1000).astype("float32")
    assert np.any(t * np.float32(1000) > steps)
    np.testing.assert_allclose(numpy(schedule.slope(t)), 1000 * np.diff(schedule.log_snrs)[1:], rtol=3e-4)


class _Plain(NoiseSchedule):
    def log_snr(self, t):
        return 5.0 - 12.0 * t**2

    def time(self, log_snr):
        return ops.sqrt((5.0 - log_snr) / 12.0)


def test_slope_of_a_schedule_of_your_own():
    """The base's central difference: of a parabola exact, but for rounding and for the ends, where it is one-sided."""
    t = np.float32([0.0, 0.25, 0.6, 1.0])
    np.testing.assert_allclose(numpy(_Plain().slope(t)), -24 * t + [-0.012, 0, 0, 0.012], atol=2e-3)
    assert numpy(_Plain().slope(0.5)).shape == ()


def test_a_table_of_one_step():
    schedule = schedules.BetaTable([0.5])
    assert numpy(schedule.slope(1.0)) == pytest.approx(-40.0)
    assert numpy(schedule.at(1.0).alpha) == pytest.approx(0.5**0.5)


def test_tables_against_their_betas():
    """alpha_bar by multiplication, in float64."""
    sigmoid_betas = 1e-4 + sigmoid(np.linspace(-6, 6, 1000)) * (0.02 - 1e-4)
    bars = np.linspace(0.999, 0.01, 30)
    for schedule, bar in [
        (schedules.SigmoidBeta(), np.cumprod(1 - sigmoid_betas)),
        (schedules.AlphaBarTable(bars), bars),
        (schedules.BetaTable(np.linspace(1e-3, 0.2, 40)), np.cumprod(1 - np.linspace(1e-3, 0.2, 40))),
    ]:
        steps = some(len(bar))
        m = marginal(schedule, steps / len(bar))
        np.testing.assert_allclose(m.alpha, np.sqrt(bar[steps - 1]), rtol=1e-5)
        np.testing.assert_allclose(m.sigma, np.sqrt(1 - bar[steps - 1]), rtol=1e-5)


def test_betas_and_alpha_bars_are_one():
    betas = schedules.LinearBeta(50)
    bars = schedules.AlphaBarTable(np.cumprod(1 - betas.betas))
    np.testing.assert_allclose(bars.log_snrs, betas.log_snrs, rtol=1e-12)


def test_linear_vp_is_the_limit_of_linear_beta():
    """log(1 - beta) is -beta - beta^2 / 2: log(alpha) of the table is less by sum beta^2 / 4, at most 0.034."""
    table = schedules.LinearBeta(1000, 1e-4, 0.02)
    t = some(1000) / 1000
    difference = np.log(marginal(table, t).alpha) - np.log(marginal(schedules.LinearVP(epsilon=1e-8), t).alpha)
    assert np.all(np.abs(difference) < 0.034)


def test_cosine_of_chen_is_the_trigonometric_path():
    chen, path = schedules.CosineAlphaBar(), schedules.Trigonometric()
    np.testing.assert_allclose(numpy(chen.log_snr(TIMES)), numpy(path.log_snr(TIMES)), rtol=1e-5, atol=1e-5)


def test_shift_of_sd3():
    """Esser et al. 2024, eq. 23: t -> k t / (1 + (k - 1) t), with k = 3; epsilon is 1e-8 of the data."""
    shifted = schedules.Shifted.by_factor(schedules.Rectified(1e-8), 3.0)
    t = np.linspace(0.01, 0.99, 9)
    np.testing.assert_allclose(marginal(shifted, t).sigma, 3 * t / (1 + 2 * t), rtol=1e-5)


def test_shift_of_simple_diffusion():
    """An image of 256 x 256, averaged over 4 x 4, has the log-SNR of the schedule that was made for 64 x 64."""
    shifted = schedules.Shifted.for_resolution("cosine", 256)
    averaged = numpy(shifted.log_snr(TIMES)) + np.log(16)
    np.testing.assert_allclose(averaged, numpy(schedules.Cosine().log_snr(TIMES)), atol=4e-6)
    assert schedules.Shifted.for_resolution("cosine", 32, base=32).shift == 0


def test_shift_by_tokens():
    """At 256 and 4,096 tokens mu is given, and half way half of each; the factor of sigma / alpha is e^mu."""
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        schedule = schedules.Shifted.for_tokens("rectified", tokens)
        factor = marginal(schedule, 0.5).sigma / marginal(schedule, 0.5).alpha
        assert factor == pytest.approx(np.exp(mu), rel=1e-5)


def test_shifts_add_up():
    twice = schedules.Shifted(schedules.Shifted("cosine", 1.0), 2.0)
    np.testing.assert_allclose(numpy(twice.log_snr(TIMES)), numpy(schedules.Cosine().log_snr(TIMES)) + 3, rtol=1e-6)


@pytest.mark.parametrize(
    "inner", [schedules.LinearBeta(), schedules.ScaledLinearBeta(), schedules.LinearBeta(40, 1e-3, 0.2)]
)
def test_zero_terminal_snr_of_a_table_is_algorithm_1(inner):
    """In float64, on their betas; the first alpha stays and the last is zero."""
    alpha = np.sqrt(np.cumprod(1 - inner.betas))
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    schedule = schedules.ZeroTerminalSNR(inner)
    steps = some(inner.num_steps)
    m, expected = marginal(schedule, steps / inner.num_steps), expected[steps - 1]
    np.testing.assert_allclose(m.alpha[:-1], expected[:-1], rtol=1e-5)
    np.testing.assert_allclose(m.sigma, np.sqrt(1 - expected**2), rtol=1e-5)
    assert m.log_snr[-1] == -40
    # Before the end the difference of two alphas is small, and the table is made in float64.
    steps = inner.num_steps - 1
    before = (alpha[-2] - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    assert marginal(schedule, steps / inner.num_steps).alpha == pytest.approx(before, rel=1e-5)
    assert marginal(schedule, 0.0).log_snr == schedules.CLEAN_LOG_SNR


@pytest.mark.once
@pytest.mark.parametrize("steps", [2, 40, 4000])
def test_zero_terminal_snr_of_any_table(steps):
    """It prints, compares and has a hash, and so have its parts, which compiling a model asks; alpha falls to the end.

    The alphas of 4,000 steps nearly vanish before the last.
    """
    schedule = schedules.ZeroTerminalSNR(schedules.LinearBeta(steps))
    assert repr(schedule._rescaled)
    assert hash(schedule) == hash(schedule.clone())
    assert schedule._rescaled == schedule.clone()._rescaled
    alpha = marginal(schedule, np.arange(1, steps + 1) / steps).alpha
    assert np.all(np.diff(alpha) < 0)
    assert 0 < alpha[-1] < 1e-8


def test_zero_terminal_snr_ends():
    schedule = schedules.ZeroTerminalSNR(schedules.Rectified(), min_log_snr=-30.0)
    m = marginal(schedule, np.float32([0.0, 1.0]))
    assert m.log_snr[1] == -30
    np.testing.assert_allclose(m.sigma[1], 1, rtol=1e-6)
    np.testing.assert_allclose(m.log_snr[0], numpy(schedules.Rectified().log_snr(0.0)), rtol=1e-6)


def test_wrappers_keep_the_number_of_steps():
    for wrap in (lambda s: schedules.Shifted(s, -1.0), schedules.ZeroTerminalSNR):
        assert wrap(schedules.LinearBeta(40)).num_steps == 40
        assert wrap(schedules.Cosine()).num_steps is None
    both = schedules.ZeroTerminalSNR(schedules.Shifted(schedules.LinearBeta(40), -1.0))
    assert both.num_steps == 40
    assert np.all(np.diff(numpy(both.log_snr(some(40) / 40))) < 0)


@pytest.mark.once
def test_copies_are_equal(schedule):
    numpy(schedule.log_snr(0.5))
    copy = type(schedule).from_config(schedule.get_config())
    again = NoiseSchedule.get(keras.saving.serialize_keras_object(schedule))
    assert {copy == schedule, again == schedule} == {not schedule.weights}  # which are not copied
    np.testing.assert_array_equal(numpy(copy.log_snr(CLOSE)), numpy(schedule.log_snr(CLOSE)))


# With an end that is lost where 1 - t is not kept as it is: compilers simplify.
TINY = [schedules.Rectified(1e-8), schedules.SigmoidAlphaBar(epsilon=1e-8)]
COMPILED = [*{type(schedule): schedule for schedule in EVERY if not schedule.num_steps}.values(), EVERY[0], *TINY]


class _Everything(keras.layers.Layer):
    """All that schedules compute, in one layer, so that a model compiles it at once."""

    def call(self, t):
        return [[*s.at(t), s.slope(t), s.time(s.log_snr(t))] for s in COMPILED]


def test_compiled_is_eager():
    """To the ends. An end of 1e-8 is less than the distance of t = 1 from the float32 before it."""
    t = np.float32([0.0, 0.31, 0.75, 1.0])
    layer, inputs = _Everything(), keras.Input(())
    compiled = keras.Model(inputs, layer(inputs)).predict(t, verbose=0)
    for schedule, values, expected in zip(COMPILED, compiled, layer(ops.convert_to_tensor(t)), strict=True):
        for value, one in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, numpy(one), rtol=2e-5, atol=1e-6, err_msg=repr(schedule))


@pytest.mark.once
def test_forward_process_has_its_mean_and_variance(schedule):
    x, noise, t = np.full((3, 2, 2, 1), 0.7), np.random.default_rng(0).standard_normal((3, 2, 2, 1)), [0.1, 0.5, 1.0]
    m = marginal(schedule, t)
    expected = m.alpha[:, None, None, None] * x + m.sigma[:, None, None, None] * noise
    for time in (np.array(t), t):
        np.testing.assert_allclose(numpy(schedule(x, noise, time)), expected, rtol=1e-5)


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
        (schedules.LinearBeta(40), np.cumprod(1 - np.linspace(1e-4, 0.02, 40))),
        (schedules.ScaledLinearBeta(), np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)),
        (
            schedules.CosineBeta(40, max_beta=1.0 - 1e-9),
            np.cos((np.arange(1, 41) / 40 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2,
        ),
    ],
    ids=["linear", "scaled linear", "cosine"],
)
def test_tables_are_the_published_formulas(schedule, bar):
    steps = some(len(bar) - 1)  # the last alpha-bar of the cosine is 0 but for the clipping
    m = marginal(schedule, steps / len(bar))
    np.testing.assert_allclose(m.alpha, np.sqrt(bar[steps - 1]), rtol=2e-5)
    np.testing.assert_allclose(m.sigma, np.sqrt(1 - bar[steps - 1]), rtol=2e-5)


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


def test_a_schedule_is_a_layer_without_weights():
    x, noise, t = keras.Input((4, 4, 1)), keras.Input((4, 4, 1)), keras.Input(())
    few = [schedules.LinearBeta(), schedules.Shifted("cosine", 1.0)]
    model = keras.Model([x, noise, t], [schedule(x, noise, t) for schedule in few])
    assert model.weights == []
    values = [np.full((2, 4, 4, 1), v, "float32") for v in (0.5, -1.5)] + [np.float32([0.2, 0.9])]
    for schedule, x_t in zip(few, model.predict(values, verbose=0), strict=True):
        np.testing.assert_allclose(x_t, numpy(schedule(*values)), rtol=2e-5, atol=2e-6, err_msg=repr(schedule))


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


@pytest.mark.once
def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"kdiff\[plot\]"):
        schedules.Cosine().plot()


@pytest.mark.once
@pytest.mark.parametrize("schedule", [schedules.CosineBeta(), schedules.VarianceExploding()], ids=repr)
def test_plot(schedule, tmp_path):
    pytest.importorskip("matplotlib")
    figure = schedule.plot(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 0
    lines = figure.axes[0].get_lines()
    np.testing.assert_allclose(lines[0].get_ydata()[-1], numpy(schedule.at(1.0).alpha), rtol=1e-6)
    assert [line.get_label() for line in lines] == ["alpha", "sigma"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.BetaTable([1e-3, 1e-12]), "float32"),
        (lambda: schedules.AlphaBarTable([0.9, 0.9]), "decrease"),
        (lambda: schedules.AlphaBarTable([0.9, 0.0]), "decrease"),
        (lambda: schedules.AlphaBarTable([1.0, 0.5]), "decrease"),
        (lambda: schedules.AlphaBarTable([0.9, np.nan]), "decrease"),
        (lambda: schedules.AlphaBarTable([]), "alpha_bars"),
        (lambda: schedules.SigmoidBeta(0), "num_steps"),
        (lambda: schedules.SigmoidBeta(10, 0.1, 1.5), "betas"),
        (lambda: schedules.Trigonometric(0.5), "epsilon"),
        (lambda: schedules.Laplace(b=0.0), "`b`"),
        (lambda: schedules.Laplace(mu=20.0), "mu"),
        (lambda: schedules.Laplace(min_log_snr=3.0, max_log_snr=3.0), "max_log_snr"),
        (lambda: schedules.Learned(5.0, -5.0), "max_log_snr"),
        (lambda: schedules.Learned(parts=1), "parts"),
        (lambda: schedules.Learned(floor=0.0), "floor"),
        (lambda: schedules.Learned(rate=2.0), "rate"),
        (lambda: schedules.LinearVP(0.0), "beta_min"),
        (lambda: schedules.LinearVP(1.0, 0.5), "beta_max"),
        (lambda: schedules.LinearVP(beta_max=1e4), "beta_max"),
        (lambda: schedules.SubVP(-1.0), "SubVP: `beta_min`"),
        (lambda: schedules.SubVP(epsilon=0.0), "epsilon"),
        (lambda: schedules.VarianceExploding(0.0), "sigma_min"),
        (lambda: schedules.VarianceExploding(2.0, 1.0), "sigma_max"),
        (lambda: schedules.VarianceExploding(2.0, 2.0), "sigma_max"),
        (lambda: schedules.SigmoidAlphaBar(tau=0.0), "tau"),
        (lambda: schedules.SigmoidAlphaBar(3.0, -3.0), "end"),
        (lambda: schedules.SigmoidAlphaBar(-3.0, 3.0, 0.01), "start"),
        (lambda: schedules.CosineAlphaBar(tau=0.0), "tau"),
        (lambda: schedules.CosineAlphaBar(-0.1), "start"),
        (lambda: schedules.CosineAlphaBar(0.5, 0.5), "end"),
        (lambda: schedules.CosineAlphaBar(epsilon=1e-9), "epsilon"),
        (lambda: schedules.Shifted("cosine", np.nan), "shift"),
        (lambda: schedules.Shifted("cosine", np.inf), "shift"),
        (lambda: schedules.Shifted("cosin", 1.0), "Did you mean 'cosine'"),
        (lambda: schedules.Shifted.by_factor("cosine", 0.0), "factor"),
        (lambda: schedules.Shifted.for_resolution("cosine", 0), "resolution"),
        (lambda: schedules.Shifted.for_tokens("cosine", 0), "tokens"),
        (lambda: schedules.Shifted.for_tokens("cosine", 100, 256, 256), "max_tokens"),
        (lambda: schedules.ZeroTerminalSNR("variance_exploding"), "without bound"),
        (lambda: schedules.ZeroTerminalSNR("linear_beta", -5.0), "min_log_snr"),
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
        (lambda: schedules.LinearBeta(1000, 1e-4, 0.5), r"LinearBeta: log-SNR.*underflows float32.*-307"),
        (lambda: schedules.AlphaBarTable([0.9, 1e-80]), "underflows"),
        (lambda: schedules.Shifted("cosine", 70.0), "underflows"),
        (lambda: schedules.ZeroTerminalSNR(schedules.BetaTable([0.1])), "of one step"),
        (lambda: schedules.LinearBeta(10**12), "at most 1000000"),
        (lambda: schedules.LinearBeta().at(500), r"t = 500.*t = \(i \+ 1\) / T; here T is 1000.*Index"),
        (lambda: schedules.Cosine().at(ops.convert_to_tensor([0.5, -2.0])), "t = -2.*continuous"),
        (lambda: schedules.LinearBeta().snr(np.nan), "t = nan"),
        (lambda: schedules.LinearBeta()(np.zeros((2, 2)), np.zeros((2, 2)), t=[10, 20]), "t = 10"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.once
def test_defaults_are_the_published_ones():
    """Of the tables those of the papers and of diffusers; EDM's sigmas; Song et al. 2021, appendix C; Chen 2023."""
    published = {
        schedules.LinearBeta: {"num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
        schedules.ScaledLinearBeta: {"num_steps": 1000, "beta_start": 0.00085, "beta_end": 0.012},
        schedules.CosineBeta: {"num_steps": 1000, "s": 0.008, "max_beta": 0.999, "min_beta": 0.0},
        schedules.SigmoidBeta: {"num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
        schedules.Cosine: {"min_log_snr": -15.0, "max_log_snr": 15.0},
        schedules.Laplace: {"mu": 0.0, "b": 0.5, "min_log_snr": -15.0, "max_log_snr": 15.0},
        schedules.LinearVP: {"beta_min": 0.1, "beta_max": 20.0, "epsilon": 1e-5},
        schedules.SubVP: {"beta_min": 0.1, "beta_max": 20.0, "epsilon": 1e-5},
        schedules.VarianceExploding: {"sigma_min": 0.002, "sigma_max": 80.0},
        schedules.SigmoidAlphaBar: {"start": -3.0, "end": 3.0, "tau": 1.0, "epsilon": 1e-6},
        schedules.CosineAlphaBar: {"start": 0.0, "end": 1.0, "tau": 1.0, "epsilon": 1e-5},
    }
    for kind, arguments in published.items():
        assert kind().get_config() == arguments
