"""What a model does with the parts that do more than most: learned variances, input scales, times that learn."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import kdiff
from kdiff import Sampler, predictions, random, schedules, solvers, times
from tests.toys import MIXTURE, numpy


class Scripted(keras.layers.Layer):
    """A network that answers with what a function makes of its inputs, plus a weight that is zero."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.bias = self.add_weight(shape=(), initializer="zeros", name="bias")
        self.built = True

    def call(self, inputs, training=None):
        return self.answer(inputs) + self.bias


def dense(outputs):
    point, time = keras.Input((2,), name="image"), keras.Input((), name="time")
    x = ops.concatenate([point, ops.expand_dims(time, -1) / 1000.0], axis=-1)
    return keras.Model({"image": point, "time": time}, layers.Dense(outputs)(layers.Dense(16, "silu")(x)))


def test_the_input_is_scaled_as_the_prediction_says():
    seen = []

    def answer(inputs):
        seen.append(inputs["image"])
        return 0.0 * inputs["image"]

    model = kdiff.DiffusionModel(Scripted(answer), schedules.VarianceExploding(), "karras", codec="identity", ema=None)
    model.build((None, 2))
    x_t = ops.convert_to_tensor(80.0 * MIXTURE.sample(4))
    m = model.schedule.at(np.array([0.2, 0.5, 0.8, 1.0], "float32"))
    model.denoise(x_t, m)
    sigma = numpy(m.sigma)[:, None]
    np.testing.assert_allclose(numpy(seen[-1]), numpy(x_t) / np.sqrt(sigma**2 + 0.25), rtol=1e-5)


def test_the_learned_variance_is_part_of_the_loss():
    """loss = MSE + the prediction's own term; the hybrid loss of improved DDPM, arXiv:2102.09672, eq. 16."""
    x = MIXTURE.sample(16)
    prediction = predictions.LearnedVariance("noise", weight=0.1)

    def answer(inputs):
        return ops.concatenate([0.5 * inputs["image"], 0.3 * inputs["image"]], axis=-1)

    model = kdiff.DiffusionModel(
        Scripted(answer), "cosine_beta", prediction, times="discrete", codec="identity", ema=None, seed=5
    )
    model.compile("sgd")
    loss = model.evaluate(x, batch_size=16, verbose=0)
    keys = numpy(random.fold(random.key_of(5), np.arange(2), random.EVALUATION))
    t, noise = model.times(model.schedule, 16, keys[0]), random.normal(keys[1], (16, 2))
    m, x_t = model.schedule.at(t), model.schedule(x, noise, t)
    error = np.mean((0.5 * numpy(x_t) - numpy(noise)) ** 2)
    output = ops.concatenate([0.5 * x_t, 0.3 * x_t], axis=-1)
    extra = numpy(prediction.extra_loss(output, ops.convert_to_tensor(x), x_t, model.schedule, m))
    assert extra.mean() > 0.01 * error
    np.testing.assert_allclose(loss, error + extra.mean(), rtol=1e-4)


def test_a_learned_variance_is_trained_and_sampled():
    prediction = predictions.LearnedVariance("velocity")  # after three epochs, one of the noise would still diverge
    model = kdiff.DiffusionModel(dense(4), "cosine_beta", prediction, times="discrete", codec="identity")
    model.compile(keras.optimizers.Adam(1e-2))
    before = numpy(model.network.weights[-1]).copy()
    losses = model.fit(MIXTURE.sample(256), batch_size=64, epochs=3, verbose=0).history["loss"]
    after = numpy(model.network.weights[-1])
    assert np.all(np.isfinite(losses))
    assert np.all(after != before)  # the biases of the variance too
    learned = model.sample(64, sampler=Sampler(solvers.DDPM("learned"), steps=10))
    small = model.sample(64, sampler=Sampler(solvers.DDPM("small"), steps=10))
    assert np.all(np.isfinite(learned))
    assert np.any(np.abs(learned - small) > 1e-3)


def test_a_variance_that_was_not_learned_cannot_be_used():
    model = kdiff.DiffusionModel(dense(2), "cosine_beta", "noise", codec="identity")
    model.build((None, 2))
    with pytest.raises(ValueError, match=r"DDPM\(variance='learned'\) needs the prediction LearnedVariance.*Noise\(\)"):
        model.sample(2, sampler=solvers.DDPM("learned"))


@pytest.mark.parametrize(("outputs", "prediction", "wanted"), [(2, "learned_variance", 4), (4, "noise", 2)])
def test_a_network_of_the_wrong_width(outputs, prediction, wanted):
    model = kdiff.DiffusionModel(dense(outputs), "cosine_beta", prediction, codec="identity")
    model.compile("sgd")
    with pytest.raises(ValueError, match=rf"must return {wanted} channels.*received: {outputs}"):
        model.fit(MIXTURE.sample(8), verbose=0)


def test_loss_aware_times_learn_where_the_loss_is():
    """Once every step has its history, steps are drawn as the root of their mean squared loss; and all is saved."""

    def answer(inputs):  # of the noise: the error is larger for larger t
        return inputs["image"] * 0.0 + 3.0 * inputs["time"][:, None] / 1000.0

    sampler = times.LossAware(4)
    model = kdiff.DiffusionModel(
        Scripted(answer), schedules.LinearBeta(4, 0.1, 0.5), "noise", times=sampler, codec="identity"
    )
    model.compile(keras.optimizers.SGD(0.0))
    model.fit(MIXTURE.sample(512), batch_size=64, epochs=4, verbose=0)
    t = numpy(sampler(model.schedule, 20000, random.key_of(0)))
    share = np.array([np.mean(np.isclose(t, (i + 1) / 4)) for i in range(4)])
    expected = 1.0 + 9.0 * (np.arange(1, 5) / 4) ** 2  # E|noise - 3 t|^2, in each of the two coordinates
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.05)
    factor = numpy(sampler.importance(model.schedule, (np.arange(4, dtype="float32") + 1) / 4))
    np.testing.assert_allclose(factor * share * 4, 1.0, atol=0.1)


def test_loss_aware_times_are_saved(tmp_path):
    model = kdiff.DiffusionModel(
        dense(2), schedules.LinearBeta(4, 0.1, 0.5), "noise", times=times.LossAware(4), codec="identity"
    )
    model.compile("adam")
    model.fit(MIXTURE.sample(512), batch_size=64, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for mine, theirs in zip(model.times.weights, loaded.times.weights, strict=True):
        assert numpy(mine).any()
        np.testing.assert_array_equal(numpy(mine), numpy(theirs))
