"""Small things that the tests share: networks, data, and denoisers that are known exactly."""

import keras
import numpy as np
from keras import layers, ops

import kdiff
from kdiff import schedules

SCHEDULES = [
    schedules.LinearBeta(),
    schedules.ScaledLinearBeta(),
    schedules.CosineBeta(),
    schedules.BetaTable(np.linspace(1e-3, 0.2, 40)),
    schedules.Cosine(),
    schedules.Rectified(),
]
GAUSSIAN = {"mean": 0.3, "std": 0.5}


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def exact_denoiser(mean=GAUSSIAN["mean"], std=GAUSSIAN["std"]):
    """E[x | x_t] for data N(mean, std^2 I)."""

    def denoise(x_t, m):
        gain = m.alpha * std**2 / (m.alpha**2 * std**2 + m.sigma**2)
        return mean + gain * (x_t - m.alpha * mean)

    return denoise


def tiny_network(shape=(8, 8, 1), classes=None, dropout=0.0):
    """A functional network: two convolutions and a time embedding, with weights drawn by NumPy."""
    image, time = keras.Input(shape, name="image"), keras.Input((), name="time")
    inputs = {"image": image, "time": time}
    embedding = layers.Dense(8, "silu")(ops.expand_dims(time, -1) / 1000.0)
    if classes:
        inputs["label"] = keras.Input((), dtype="int32", name="label")
        embedding = embedding + layers.Embedding(classes, 8)(inputs["label"])
    x = layers.Conv2D(8, 3, padding="same")(image)
    x = ops.silu(x + embedding[:, None, None, :])
    x = layers.Dropout(dropout, seed=1)(x)
    return draw_weights(keras.Model(inputs, layers.Conv2D(shape[-1], 3, padding="same")(x)))


def draw_weights(layer, seed=0, scale=0.2):
    """Overwrites every floating-point weight: no zero-initialised head makes a test pass for nothing."""
    generator = np.random.default_rng(seed)
    for weight in layer.weights:
        if "float" in weight.dtype:
            weight.assign(scale * generator.standard_normal(weight.shape))
    return layer


def images(count=32, shape=(8, 8, 1), seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype("float32")


def compiled_model(network=None, optimizer=None, loss="mse", metrics=None, jit="auto", **options):
    model = kdiff.DiffusionModel(network or tiny_network(), **options)
    model.compile(optimizer or keras.optimizers.Adam(1e-2), loss, metrics=metrics, jit_compile=jit)
    return model
