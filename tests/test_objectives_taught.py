"""Objectives of few steps. On Gaussian data what they learn is known: there each has nothing left to learn.

Flow of N(mean, c^2) from s = sigma / alpha to r, in z = x_t / alpha:

    z_r - mean = (z_s - mean) K_r / K_s,     K^2 = c^2 + s^2,

so that the x_hat of a jump is mean + (z_s - mean) c^2 (s + r) / (K_s (s K_r + r K_s)).
"""

import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import objectives, random, schedules
from kdiff.blocks import Input, Interval, LabelEmbedding, SinusoidalEmbedding, SteeredEmbedding
from kdiff.denoisers import interval
from kdiff.networks import MLP
from kdiff.objectives.taught import implied_output, joined_jumps
from kdiff.predictions import Flow, Karras, Prediction, TrigFlow, Velocity
from kdiff.tangents import Difference, Forward
from kdiff.times import TimeSampler
from tests.toys import mostly_once, numpy

MEAN, C = np.float32([0.3, -0.2]), np.float32([0.5, 0.8])
RECTIFIED, COSINE, EXPLODING = schedules.Rectified(1e-3), schedules.Cosine(), schedules.VarianceExploding(0.01, 20.0)


def jump(x_t, m, distance):
    """The x_hat of the jump over this distance, an angle."""
    m = m.like(x_t)
    s = m.sigma / m.alpha
    r = ops.tan(ops.maximum(ops.arctan2(m.sigma, m.alpha) - distance[:, None], 0.0))
    mean, c = ops.convert_to_tensor(MEAN), ops.convert_to_tensor(C)
    k_s, k_r = ops.sqrt(c**2 + s**2), ops.sqrt(c**2 + r**2)
    return mean + (x_t / m.alpha - mean) * c**2 * (s + r) / (k_s * (s * k_r + r * k_s))


class Exact(keras.layers.Layer):
    """A network that answers as it should, times 1 + gain, plus bias, both 0: the gradient by them is to vanish."""

    def __init__(self, schedule, prediction):
        super().__init__(autocast=False)
        self.condition_inputs = {"interval": Input(None, None, True)}
        self.schedule, self.prediction = schedule, prediction
        self.gain = self.add_weight(shape=(2,), initializer="zeros", name="gain")
        self.bias = self.add_weight(shape=(2,), initializer="zeros", name="bias")
        self.built = True

    def call(self, inputs, training=None):
        m = self.schedule.at(inputs["time"] / 1000.0)
        x_t = inputs["image"] / self.prediction.input_scale(m.like(inputs["image"]))
        distance = inputs.get("interval")
        x_hat = jump(x_t, m, ops.zeros_like(m.t) if distance is None else distance)
        return implied_output(self.prediction, x_hat, x_t, m) * (1.0 + self.gain) + self.bias


class Given(TimeSampler):
    """These times, in turn of the calls."""

    named = False

    def __init__(self, *tables):
        self.tables, self.calls = tables, 0

    def __call__(self, schedule, batch, key):
        self.calls += 1
        return ops.convert_to_tensor(self.tables[(self.calls - 1) % len(self.tables)], "float32")


def exact_model(schedule, prediction, objective="denoising", **options):
    prediction = Prediction.get(prediction)
    model = kdiff.DiffusionModel(
        Exact(schedule, prediction), schedule, prediction, objective=objective, codec="identity", ema=None, **options
    )
    model.build((None, 2))
    return model


def gradient(model, x, loss="mse"):
    """(loss, gradient by gain and bias, which is what one step of SGD takes away)."""
    model.compile(keras.optimizers.SGD(1.0), loss)
    value = float(model.train_on_batch(x))
    return value, -np.concatenate([numpy(model.network.gain), numpy(model.network.bias)])


X = np.random.default_rng(0).normal(MEAN, C, (64, 2)).astype("float32")
TIMES = Given(np.linspace(0.05, 0.95, 64), np.linspace(0.9, 0.1, 64))


# With a teacher that is exact every loss is 0


LAWS = {
    "MeanFlow": (lambda: objectives.MeanFlow(exact_model(RECTIFIED, "flow"), 1.0, "forward", 0.0), RECTIFIED, "flow"),
    "sCD": (
        lambda: objectives.TangentConsistency(exact_model(COSINE, TrigFlow()), "forward", 0, None, 0),
        COSINE,
        TrigFlow(),
    ),
    "CD": (
        lambda: objectives.Consistency(exact_model(EXPLODING, Karras()), objectives.Discretised(1, 300, 300)),
        EXPLODING,
        Karras(),
    ),
    "MeanFlow, differences": (
        lambda: objectives.MeanFlow(exact_model(RECTIFIED, "flow"), 1.0, "difference", 0.0),
        RECTIFIED,
        "flow",
    ),
    "sCD, differences": (
        lambda: objectives.TangentConsistency(exact_model(EXPLODING, TrigFlow()), "difference", 0, None, 0),
        EXPLODING,
        TrigFlow(),
    ),
    "CD, cosine": (
        lambda: objectives.Consistency(exact_model(COSINE, "velocity"), objectives.Discretised(1, 300, 300)),
        COSINE,
        "velocity",
    ),
}


@pytest.mark.parametrize("name", mostly_once(list(LAWS), 3))
def test_a_right_network_has_nothing_to_learn(name):
    """Its loss is 0, and so is the gradient, to the errors of derivatives, of Heun's steps and of float32: 1e-9; that of
    a network that is wrong by 0.1 is not.
    """
    make, schedule, prediction = LAWS[name]
    model = exact_model(schedule, prediction, make(), times=Given(*TIMES.tables))
    loss, slope = gradient(model, X)
    assert loss < 1e-8
    assert np.abs(slope).max() < 5e-5
    model = exact_model(schedule, prediction, make(), times=Given(*TIMES.tables))
    model.network.bias.assign([0.1, -0.1])
    assert gradient(model, X)[0] > 1e-5
