"""Toys of objectives of few steps: on Gaussian data what they learn is known.

Flow of N(mean, c^2) from s = sigma / alpha to r, in z = x_t / alpha:

    z_r - mean = (z_s - mean) K_r / K_s,     K^2 = c^2 + s^2,

so that the x_hat of a jump is mean + (z_s - mean) c^2 (s + r) / (K_s (s K_r + r K_s)).
"""

import keras
import numpy as np
from keras import ops

import kdiff
from kdiff import schedules
from kdiff.blocks import GuidanceEmbedding, Input, Interval, LabelEmbedding, SinusoidalEmbedding
from kdiff.networks import MLP
from kdiff.objectives.taught import implied_output
from kdiff.predictions import Prediction
from kdiff.times import Scaled, TimeSampler
from tests.toys import draw_weights, numpy

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
        m = self.schedule.at(inputs["time"] / 10.0)
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
    options = {"objective": objective, "codec": "identity", "time_label": Scaled(10.0), "ema": None, **options}
    model = kdiff.DiffusionModel(Exact(schedule, prediction), schedule, prediction, **options)
    model.build((None, 2))
    return model


def gradient(model, x, loss="mse"):
    """(loss, gradient by gain and bias, which is what one step of SGD takes away)."""
    model.compile(keras.optimizers.SGD(1.0), loss)
    value = float(model.train_on_batch(x))
    return value, -np.concatenate([numpy(model.network.gain), numpy(model.network.bias)])


X = np.random.default_rng(0).normal(MEAN, C, (64, 2)).astype("float32")
TIMES = Given(np.linspace(0.05, 0.95, 64), np.linspace(0.9, 0.1, 64))
LABELS = np.arange(64) % 2


def product(values):
    """Two-point quadrature of x = mean +- c and noise = +-1, in both coordinates: 16 points, exact for degree 3."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1).T.astype("float32")
    x, noise = np.tile(MEAN + C * signs[:, :2], (values, 1)), np.tile(signs[:, 2:], (values, 1))
    return x, ops.convert_to_tensor(noise)


def network(**conditions):
    made = MLP(16, 1, conditions={"interval": Interval(8), **conditions})
    made.build({"image": (None, 2), "time": (None,), **({"label": (None,)} if conditions else {})})
    return draw_weights(made)


def diffusion(schedule="cosine", prediction="velocity", **options):
    """A model whose averages differ from its weights."""
    options = {"codec": "identity", "time_label": Scaled(10.0), "ema": 0.9, **options}
    model = kdiff.DiffusionModel(network(), schedule, prediction, **options)
    model.build((None, 2))
    draw_weights(model.network, 1)
    model.update_ema()
    return model


TABLE = schedules.ScaledLinearBeta(100)


def labelled(steering=False):
    """A model of two classes, its embedding steered or not, trained for a step."""
    waves = SinusoidalEmbedding(8)
    embedding = GuidanceEmbedding(waves, "timestep_cond", 8, 16) if steering else None
    made = MLP(16, 1, embedding=embedding, conditions={"label": LabelEmbedding(2, dropout=0.1)})
    made.build(
        {"image": (None, 2), "time": (None,), "label": (None,), **({"timestep_cond": (None,)} if steering else {})}
    )
    model = kdiff.DiffusionModel(draw_weights(made), TABLE, "velocity", codec="identity", ema=0.9)
    model.build({"image": (None, 2), "label": (None,)})
    return model
