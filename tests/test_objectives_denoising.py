"""The variational bound of a step, against the formulas in float64, and what it trains."""

import keras
import numpy as np
import pytest

from kdiff import predictions, schedules
from kdiff.objectives import variance_bound
from tests.helpers_gradients import value_and_gradients
from tests.test_predictions import LEARNED, SHAPE, every_schedule, problem
from tests.test_schedules import EVERY
from tests.toys import numpy


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


@pytest.mark.once
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


@pytest.mark.once
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


@pytest.mark.once
def test_learned_variance_is_finite_everywhere():
    """From an output far off, at the first and the last times of every schedule, between two steps too."""
    for schedule in EVERY:
        x, noise, m, x_t = problem(schedule, (1e-7, 0.0004, 0.0013, 0.5, 1.0))
        for size in (0.0, 30.0):
            output = np.concatenate([size * noise, np.full_like(x, size)], axis=-1)
            assert np.isfinite(
                numpy(variance_bound(predictions.LearnedVariance("velocity"), output, x, x_t, schedule, m))
            ).all()


@pytest.mark.once
def test_the_last_step_may_be_rounded_up():
    schedule, m, x, x_t, output = learned_problem(20, [0] * 5)
    above = schedule.at(np.nextafter(numpy(m.t), np.float32(1)))
    assert np.all(numpy(above.t) * 20 > 1)
    one, other = (numpy(variance_bound(LEARNED, output, x, x_t, schedule, v)) for v in (m, above))
    np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.once
def test_learned_variance_with_one_time_for_all():
    schedule, _, x, x_t, output = learned_problem(20, [7] * 5)
    single = variance_bound(LEARNED, output, x, x_t, schedule, schedule.at(0.4))
    several = variance_bound(LEARNED, output, x, x_t, schedule, schedule.at(np.float32([0.4] * 5)))
    np.testing.assert_allclose(numpy(single), numpy(several), rtol=1e-6)


@pytest.mark.once
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
        (lambda: predictions.LearnedVariance(LEARNED), "one output per channel"),
        (lambda: predictions.LearnedVariance("nois"), "Did you mean 'noise'"),
        (lambda: LEARNED.value(np.ones((1, 3))), "even number of channels"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
