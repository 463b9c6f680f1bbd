"""A schedule that is learned: monotone whatever it learns, the same bound with less variance, saved with the model."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import likelihood, objectives, schedules
from kdiff.schedules import Learned, Shifted
from tests.toys import exact_denoiser, numpy, tiny_network

STD = 0.5
TIMES = np.linspace(0, 1, 1001).astype("float32")


def bent(seed=0, **options):
    """A schedule that has learned anything."""
    schedule = Learned(**options)
    schedule.moments.assign(np.exp(3.0 * np.random.default_rng(seed).normal(size=schedule.parts)))
    schedule.known.assign(np.ones(schedule.parts))
    schedule.settle()
    return schedule


def ideal(schedule):
    """p_k for data N(0, STD^2) and the exact denoiser: h = SNR (x_hat - x)^2 / 2, and x_hat - x is normal, of variance
    s^2 / (1 + SNR s^2); so sqrt(E[h^2]) is in proportion to sigmoid(log_snr + 2 log s)."""
    edges = schedule.max_log_snr - schedule.width * np.arange(schedule.parts + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    size = 1 / (1 + np.exp(-(middle + 2 * math.log(STD))))
    return (1 - schedule.floor) * size / size.sum() + schedule.floor / schedule.parts


class Exact(keras.Model):
    """The best noise_hat for data N(0, STD^2), told of the log-SNR; with a weight that is 0."""

    conditions = ()

    def build(self, shapes):
        self.offset = self.add_weight(shape=(), initializer="zeros", name="offset")

    def call(self, inputs, training=None):
        log_snr = -8.0 * inputs["time"][:, None]
        alpha, sigma = ops.sqrt(ops.sigmoid(log_snr)), ops.sqrt(ops.sigmoid(-log_snr))
        return inputs["image"] * sigma / (alpha**2 * STD**2 + sigma**2) + 0.0 * self.offset


def likelihood_model(schedule, network=None, **options):
    options = {"weighting": "variational", "time_label": "log_snr", "objective": "learned_schedule"} | options
    return kdiff.DiffusionModel(network or Exact(), schedule, "noise", codec="identity", ema=None, **options)


def test_it_falls_and_has_an_inverse_whatever_it_has_learned():
    for schedule in (bent(), bent(1, parts=2, floor=1e-3), Shifted(bent(2, parts=7), 1.0)):
        log_snr = numpy(schedule.log_snr(TIMES))
        assert np.all(np.diff(log_snr) < 0)
        np.testing.assert_allclose(numpy(schedule.time(log_snr)), TIMES, atol=2e-6)
        learned = getattr(schedule, "schedule", schedule)
        ends = np.array([learned.max_log_snr, learned.min_log_snr]) + getattr(schedule, "shift", 0.0)
        np.testing.assert_allclose(log_snr[[0, -1]], ends, atol=1e-4)
        assert numpy(learned.p).min() >= learned.floor / learned.parts * 0.999


def test_the_slope_is_the_derivative():
    schedule, t, h = bent(), np.float32([0.06, 0.31, 0.502, 0.77, 0.93]), 1e-4
    difference = (numpy(schedule.log_snr(t + h)) - numpy(schedule.log_snr(t - h))) / (2 * h)
    np.testing.assert_allclose(numpy(schedule.slope(t)), difference, rtol=5e-3)
    steps = np.diff(numpy(schedule.log_snr(TIMES))) * 1000
    edges = np.abs(steps[:, None] - numpy(schedule.slope((TIMES[1:] + TIMES[:-1]) / 2))[:, None]).ravel()
    assert np.mean(edges > 1e-2 * np.abs(steps)) < 0.1  # but for those with an edge between


@pytest.mark.once
def test_slope_by_differentiation():
    torch = pytest.importorskip("torch")
    t = torch.linspace(0.01, 0.99, 50, requires_grad=True)
    schedule = bent()
    (gradient,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    np.testing.assert_allclose(gradient.numpy(), numpy(schedule.slope(t)), rtol=1e-5)


def test_what_is_learned_are_the_moments_of_the_losses():
    """Against running means in NumPy; a part without losses has the mean of the others; what is not finite is not."""
    schedule = Learned(-2.0, 2.0, parts=4, floor=0.1, rate=0.5)
    np.testing.assert_allclose(numpy(schedule.best()), 0.25, atol=1e-6)  # without losses all parts are alike
    schedule.learn(np.float32([0.1, 0.2, 0.6, 0.3]), np.float32([4.0, 8.0, 12.0, np.inf]))
    first, third = 0.75 * (1.0**2 + 2.0**2) / 2, 0.5 * 3.0**2  # of p_k losses, p_k = 1 / 4
    np.testing.assert_allclose(numpy(schedule.moments), [first, 0, third, 0], rtol=1e-6)
    np.testing.assert_allclose(numpy(schedule.known), [0.75, 0, 0.5, 0], rtol=1e-6)
    mean = (first + third) / 1.25
    size = np.sqrt([first / 0.75, mean, third / 0.5, mean])
    np.testing.assert_allclose(numpy(schedule.log_snr([0.25, 0.75])), [1.0, -1.0], atol=1e-6)  # as it was
    schedule.settle()
    np.testing.assert_allclose(numpy(schedule.p), 0.9 * size / size.sum() + 0.025, rtol=1e-6)
    np.testing.assert_allclose(numpy(schedule.log_snr(schedule.p[0])), 1.0, atol=1e-6)


def test_the_integral_of_the_bound_does_not_depend_on_the_interior():
    """That of SNR v / 2 over log-SNR, v = s^2 / (1 + SNR s^2), is log((1 + SNR_0 s^2) / (1 + SNR_1 s^2)) / 2."""
    t = (np.arange(1, 40_000, 2) / 40_000).astype("float32")
    exact = 0.5 * np.log((1 + np.exp(13.3) * STD**2) / (1 + np.exp(-5) * STD**2))
    for schedule in (Learned(), bent(), bent(1)):
        size = np.exp(numpy(schedule.log_snr(t)).astype("float64")) * STD**2
        rate = -numpy(schedule.slope(t)).astype("float64")
        assert np.mean(0.5 * size / (1 + size) * rate) == pytest.approx(exact, rel=1e-3)


@pytest.mark.once
def test_the_bound_does_not_depend_on_the_interior():
    """0.73909 nats a dimension of N(0, 1/4) on log-SNRs from 13.3 to -5, 0.0133 above the entropy, by any times."""
    x = STD * np.random.default_rng(0).normal(size=(2000, 64)).astype("float32")
    x *= STD / np.sqrt(np.mean(x**2))

    def denoise(x_t, m):
        return exact_denoiser(0.0, STD)(x_t, m.like(x_t))

    for schedule in (Learned(), bent(), bent(1)):
        for times in (likelihood.continuous.EVEN, "stratified"):
            options = {"times": times, "draws": 4, "batch_size": 1000, "decoder": "density"}
            report = likelihood.continuous_bound(denoise, x, schedule=schedule, **options)
            error = report.standard_error / 64
            assert error < 0.2
            assert report.mean / 64 == pytest.approx(0.73909, abs=4 * error)


def test_the_estimate_varies_less_after_training():
    """It comes near the best there is, which is known, and the loss stays what it is in the mean."""
    x = STD * np.random.default_rng(0).normal(size=(4096, 16)).astype("float32")
    model = likelihood_model(Learned(parts=16, rate=0.005))
    model.compile(keras.optimizers.SGD(0.0))
    model.build(x.shape)
    before = losses(model, x)
    assert model.trainable_variables == [model.network.offset]
    model.fit(x, epochs=8, batch_size=256, verbose=0)
    after = losses(model, x)
    best = ideal(model.schedule)
    np.testing.assert_allclose(numpy(model.schedule.p), best, rtol=0.25, atol=0.003)
    assert after.std() < 0.9 * before.std()
    error = math.hypot(before.std(), after.std()) / math.sqrt(len(x))
    assert after.mean() == pytest.approx(before.mean(), abs=4 * error)


def losses(model, x):
    """Of each example, in nats a dimension, as in training, at uniform times."""
    t = np.random.default_rng(1).uniform(size=len(x)).astype("float32")
    noise = np.random.default_rng(2).normal(size=x.shape).astype("float32")
    m = model.schedule.at(t)
    answer = numpy(model.denoise(model.schedule(x, noise, t), m))
    weight = 0.5 * np.exp(numpy(m.log_snr)) * -numpy(model.schedule.slope(t))
    return weight * np.mean((answer - x) ** 2, axis=1)


def test_it_is_saved_with_the_model(tmp_path):
    """And a compiled sampler takes the weights as they are, of its own schedule and of another's."""
    model = likelihood_model(Shifted(bent(), 0.5), tiny_network((4, 4, 1)))
    model.compile("adam")
    model.fit(np.zeros((8, 4, 4, 1), "float32"), batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(twin.schedule.log_snr(TIMES)), numpy(model.schedule.log_snr(TIMES)))
    samples = model.sample(1, steps=2)
    np.testing.assert_allclose(twin.sample(1, steps=2), samples, atol=1e-6)
    model.schedule.schedule.p.assign(np.arange(1.0, 33.0) / 560.0)
    changed = model.sample(1, steps=2)
    assert np.abs(changed - samples).max() > 1e-4
    np.testing.assert_allclose(twin.sample(1, steps=2, schedule=model.schedule), changed, atol=1e-5)
    model.schedule.schedule.p.assign(np.arange(33.0, 1.0, -1.0) / 560.0)
    again = twin.sample(1, steps=2, schedule=model.schedule)
    assert np.abs(again - changed).max() > 1e-4


def test_bits_per_dim_are_of_the_schedule_that_a_step_began_with():
    """The metric is the loss, in nats a dimension, and the two other terms, also in a step that changes much."""
    x = STD * np.random.default_rng(0).normal(size=(64, 16)).astype("float32")
    model = likelihood_model(Learned(rate=1.0))
    model.compile(keras.optimizers.SGD(0.0), metrics=[likelihood.BitsPerDim()])
    for _ in range(2):
        history = model.fit(x, batch_size=64, verbose=0).history
        rest = 0.5 * math.exp(-5.0) * np.mean(x**2) + 0.5 * (1.0 + math.log(2.0 * math.pi) - 13.3)
        bits = (history["loss"][0] + rest) / math.log(2.0)
        assert history["bits_per_dim"][0] == pytest.approx(bits, abs=1e-3)


def test_half_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = likelihood_model(Learned(), tiny_network((4, 4, 1)))
        model.compile("adam")
        history = model.fit(np.zeros((8, 4, 4, 1), "float32"), batch_size=4, verbose=0).history
    finally:
        keras.config.set_dtype_policy(before)
    assert np.isfinite(history["loss"]).all()
    assert numpy(model.schedule.known).max() > 0
    assert "float32" in str(model.schedule.moments.dtype)


@pytest.mark.once
def test_other_objectives_leave_it_alone():
    model = likelihood_model(bent(), tiny_network((4, 4, 1)), objective="denoising", weighting=None)
    model.compile("adam")
    before = numpy(model.schedule.moments).copy()
    model.fit(np.zeros((8, 4, 4, 1), "float32"), batch_size=4, verbose=0)
    np.testing.assert_array_equal(numpy(model.schedule.moments), before)


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weighting": None}, "per log-SNR"),
        ({"weighting": "min_snr"}, "per log-SNR"),
        ({"times": "logit_normal"}, "uniform"),
        ({"time_label": "scaled"}, "time_label='log_snr'"),
    ],
)
def test_what_does_not_go_together(change, words):
    with pytest.raises(ValueError, match=words):
        likelihood_model(Learned(), tiny_network((4, 4, 1)), **change)


@pytest.mark.once
def test_a_schedule_that_does_not_learn():
    with pytest.raises(ValueError, match=r"Learned\(\)"):
        likelihood_model(schedules.Cosine(), tiny_network((4, 4, 1)))
    assert objectives.Objective.get("learned_schedule").get_config() == {}


@pytest.mark.once
def test_two_that_have_learned_are_not_one():
    one, other = Learned(), Learned()
    assert one == one
    assert one != other
    assert Shifted(one, 1.0) != Shifted(one, 1.0)
    assert hash(one) == hash(other)
