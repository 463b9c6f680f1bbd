"""Small things that the tests share: networks, data, and denoisers that are known exactly."""

import itertools
from functools import partial

import keras
import numpy as np
import pytest
from keras import layers, ops

import kdiff
from kdiff import analytic, backend, schedules
from kdiff.denoisers import Denoiser, Given
from kdiff.sampling import initial_noise

SCHEDULES = [
    schedules.LinearBeta(),
    schedules.ScaledLinearBeta(),
    schedules.CosineBeta(),
    schedules.BetaTable(np.linspace(1e-3, 0.2, 40)),
    schedules.Cosine(),
    schedules.Rectified(),
]
GAUSSIAN = {"mean": 0.3, "std": 0.5}


def mostly_once(cases, everywhere=1):
    """Cases of `parametrize`: so many, or those so named, run on every backend, the rest by default on one alone."""
    kept = [i < everywhere if isinstance(everywhere, int) else case in everywhere for i, case in enumerate(cases)]
    return [
        case if keep else pytest.param(case, marks=pytest.mark.once) for case, keep in zip(cases, kept, strict=True)
    ]


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
    # float32, as the last layer of kdiff's networks: PyTorch's float16 convolution to one channel has no gradient on
    # some CPUs ("slow_conv2d: grad_weight must be contiguous").
    return draw_weights(keras.Model(inputs, layers.Conv2D(shape[-1], 3, padding="same", dtype="float32")(x)))


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


MIXTURE = analytic.GaussianMixture([[-0.8, 0.2], [0.5, -0.6], [0.4, 0.7]], [0.3, 0.2, 0.25], [1.0, 2.0, 1.5])


def walk(solver, schedule, marginals, x, data=MIXTURE, noise=None, steps=None):
    """(x, state) after each step of `solver` along these marginals from `x`, outside of the sampling loop.

    `steps` is how many the solver is told of, if more than there are.
    """
    x, denoise = ops.convert_to_tensor(x, "float32"), Denoiser.of(data)
    state = solver.init(x, steps or len(marginals) - 1)
    for now, then in itertools.pairwise(marginals):
        x, _, state = solver.step(denoise, schedule, x, now, then, noise, state)
        yield x, state


def solve(solver, schedule, log_snrs, x, data=MIXTURE, noise=None):
    """The last x of a run of `solver` along these log-SNRs."""
    *_, (x, _) = walk(solver, schedule, [schedule.at_log_snr(np.float32(value)) for value in log_snrs], x, data, noise)
    return numpy(x)


def compiled_run(sampler, schedule, shape, data=MIXTURE):
    """The last x of a run whose step the backend compiles, as `DiffusionModel.sample` does."""
    advance = backend.compiled(partial(sampler.advance, Denoiser.of(data).answer, {}, schedule))
    times = sampler.times(schedule)
    x = schedule.at(times[0]).sigma * initial_noise(shape)
    *_, step = sampler.steps_from(x, times, advance, schedule, Given())
    return step.x


# A solver's step is affine in x and in its noise if the data is Gaussian, so the mean and covariance of a run are known
# without a random number: one example of the batch has no noise, and every other one 1 in one place of one draw.
GAUSSIAN_DATA = analytic.Gaussian([0.5, -0.3], [[0.5, 0.2], [0.2, 0.3]])


def moments(solver, schedule, marginals, data=GAUSSIAN_DATA, denoise=None, draws=2):
    """The mean and covariance at the end of a run, from the exact ones at its start; at most `draws` draws a step."""
    rows = 3 + 2 * draws * (len(marginals) - 1)
    mean, covariance = exact_moments(data, marginals[0])
    x = np.tile(mean, (rows, 1))
    x[1:3] += np.linalg.cholesky(covariance).T
    places = iter(range(3, rows, 2))

    def noise():
        return ops.convert_to_tensor(np.eye(rows, 2, -next(places)), "float32")

    *_, (x, _) = walk(solver, schedule, marginals, x, denoise or data, noise)
    x = numpy(x).astype("float64")
    deviations = x[1:] - x[0]
    return x[0], deviations.T @ deviations


def exact_moments(data, m):
    """Those of x_t."""
    alpha, sigma = float(m.alpha), float(m.sigma)
    return alpha * data.mean, alpha**2 * data.covariance + sigma**2 * np.eye(2)


def warmed(log_snrs, pieces):
    """The grid with its first step cut into so many pieces more, each four times as long as the one before."""
    first = log_snrs[0] + (log_snrs[1] - log_snrs[0]) * 4.0 ** -np.arange(pieces, 0, -1)
    return np.concatenate([log_snrs[:1], first, log_snrs[1:]])


EAGER = keras.backend.backend() == "torch"


class Compiled:
    """A solver whose step is compiled as a whole, for one schedule and denoiser; on PyTorch, the solver.

    Op by op JAX would compile the loops and conditions of `Adaptive` and `PNDM` in every step anew.
    """

    def __init__(self, solver):
        self.solver, self.init, self.program = solver, solver.init, None

    def __getattr__(self, name):
        return getattr(self.solver, name)

    def step(self, denoise, schedule, x, now, then, noise, state):
        drawn = [noise(), noise()] if self.stochastic else []  # as many as any step takes

        def step(x, now, then, drawn, state):
            return self.solver.step(denoise, schedule, x, now, then, iter(drawn).__next__, state)

        self.program = self.program or backend.fused(step)
        return self.program(x, now, then, drawn, state)


def measured_order(solver, schedule, steps=(8, 16, 32), span=(-3.0, 3.0), warm=0):
    """log2 of how the error of a deterministic solver falls when the steps are doubled, once for each doubling.

    The grid is uniform in log-SNR. A multistep solver begins at order 1, and the error of that one step would stay:
    `warm` is the pieces of `warmed`.
    """
    x = np.random.default_rng(0).normal(size=(32, 2))
    m = schedule.at_log_snr(np.float32(span[0]))
    x = (float(m.alpha) * 0.5 + float(m.sigma)) * x
    exact = MIXTURE.flow(x, schedule, float(m.t), float(schedule.time(np.float32(span[1]))))
    errors = []
    for count in steps:
        log_snrs = warmed(np.linspace(*span, count + 1), warm)
        errors.append(np.sqrt(np.mean((solve(solver, schedule, log_snrs, x) - exact) ** 2)))
    return np.log2(np.array(errors[:-1]) / errors[1:]), np.array(errors)
