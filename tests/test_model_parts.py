"""What a model does with the parts that do more than most: learned variances, input scales, times that learn."""

import inspect

import keras
import numpy as np
import pytest
from keras import layers, ops

import kdiff
from kdiff import Sampler, predictions, random, schedules, solvers, times
from kdiff.objectives import variance_bound
from tests.toys import MIXTURE, compiled_model, images, numpy

pytestmark = pytest.mark.eager


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


@pytest.mark.once
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
    step = random.fold_in(random.key_of(5), 0, random.EVALUATION)
    keys = [random.fold_in(step, number) for number in (1, 2)]  # number 0 is the codec's
    t, noise = model.times(model.schedule, 16, keys[0]), random.normal(keys[1], (16, 2))
    m, x_t = model.schedule.at(t), model.schedule(x, noise, t)
    error = np.mean((0.5 * numpy(x_t) - numpy(noise)) ** 2)
    output = ops.concatenate([0.5 * x_t, 0.3 * x_t], axis=-1)
    extra = numpy(variance_bound(prediction, output, ops.convert_to_tensor(x), x_t, model.schedule, m))
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


@pytest.mark.once
def test_a_variance_that_was_not_learned_cannot_be_used():
    model = kdiff.DiffusionModel(dense(2), "cosine_beta", "noise", codec="identity")
    model.build((None, 2))
    with pytest.raises(ValueError, match=r"DDPM\(variance='learned'\) needs the prediction LearnedVariance.*Noise\(\)"):
        model.sample(2, sampler=solvers.DDPM("learned"))


@pytest.mark.once
@pytest.mark.parametrize(("outputs", "prediction", "wanted"), [(2, "learned_variance", 4), (4, "noise", 2)])
def test_a_network_of_the_wrong_width(outputs, prediction, wanted):
    model = kdiff.DiffusionModel(dense(outputs), "cosine_beta", prediction, codec="identity")
    model.compile("sgd")
    with pytest.raises(ValueError, match=rf"must return {wanted} channels.*received: {outputs}"):
        model.fit(MIXTURE.sample(8), verbose=0)


# What is refused when a model is made


def taken():
    """What `sample`, `sample_steps`, `invert`, `fit` and `denoise` take beside conditions."""
    methods = (kdiff.DiffusionModel.sample, kdiff.DiffusionModel.invert, kdiff.DiffusionModel.denoise)
    names = {name for method in methods for name in inspect.signature(method).parameters}
    return sorted(names - {"self", "conditions", "options"} | {"time", "encoded", "sample_weight"})


@pytest.mark.once
@pytest.mark.parametrize("name", taken())
def test_names_that_no_condition_can_have(name):
    """Said by the network, or found in the shapes of the data."""
    network = Scripted(lambda inputs: inputs["image"])
    model = kdiff.DiffusionModel(network, codec="identity")
    if name not in ("image", "encoded"):
        with pytest.raises(ValueError, match=rf"conditions cannot be named \['{name}'\]"):
            model.build({"image": (None, 2), name: (None,)})
    network.conditions = ("label", name)
    with pytest.raises(ValueError, match=rf"conditions cannot be named \['{name}'\].*'steps'"):
        kdiff.DiffusionModel(network)


@pytest.mark.once
def test_names_that_conditions_may_have():
    network = Scripted(lambda inputs: inputs["image"])
    network.conditions = ("label", "text", "style", "t", "class")
    kdiff.DiffusionModel(network)


class _Half(times.TimeSampler):
    """Times below 1/2, of an unknown density."""

    def __call__(self, schedule, batch, key):
        return 0.5 * random.uniform(key, (batch,))


@pytest.mark.once
def test_what_the_objective_needs_stays_when_a_part_is_replaced():
    options = {"weighting": "variational", "time_label": "log_snr", "objective": "learned_schedule"}
    model = compiled_model(schedule=schedules.Learned(), prediction="noise", **options)
    model.build((None, 8, 8, 1))
    learned = model.schedule
    with pytest.raises(ValueError, match=r"must be schedules\.Learned"):
        model.schedule = "cosine"
    assert model.schedule is learned
    model.fit(images(4), verbose=0)
    plain = kdiff.DiffusionModel(kdiff.networks.MLP(8, 1), codec="identity")
    before = plain.objective
    with pytest.raises(ValueError, match="Shortcut: the network must have the input 'interval'"):
        plain.objective = "shortcut"
    assert plain.objective is before
    model.schedule = schedules.Shifted(schedules.Learned(), 1.0)
    assert np.isfinite(model.fit(images(4), verbose=0).history["loss"]).all()


@pytest.mark.once
def test_a_weight_per_log_snr_needs_a_density():
    network = Scripted(lambda inputs: inputs["image"])
    with pytest.raises(ValueError, match=r"Variational\(\) is a weight per log-SNR.*_Half\(\) has none"):
        kdiff.DiffusionModel(network, times=_Half(), weighting="variational")
    kdiff.DiffusionModel(network, times=_Half(), weighting="min_snr")
    kdiff.DiffusionModel(network, times=_Half())
    # This one has times of its own.
    kdiff.DiffusionModel(network, times=_Half(), weighting="variational", objective="loss_aware")
    for name, kind in times.TimeSampler.names().items():
        if kind.__module__.startswith("kdiff."):
            kdiff.DiffusionModel(network, times=name, weighting="variational")
