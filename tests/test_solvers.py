"""Solvers on data whose denoiser is known exactly: order, moments and limits."""

import numpy as np
import pytest

from kdiff import Sampler, schedules
from kdiff.solvers import DDIM, DDPM, Solver
from tests.toys import GAUSSIAN, SCHEDULES, exact_denoiser, numpy

CONTINUOUS = [schedules.Cosine(), schedules.Rectified(), schedules.LinearBeta()]
STOCHASTIC = [DDPM(), DDPM("large"), DDIM(0.5), DDIM(1.0)]


def test_every_solver_is_here():
    ours = {name for name, solver in Solver.names().items() if solver.__module__.startswith("kdiff.")}
    assert {"ddpm", "ddim"} <= ours
    assert not DDIM().stochastic
    assert all(solver.stochastic for solver in STOCHASTIC)


def flow_of_a_gaussian(schedule, x, start, mean, std):
    """The exact solution at t = 0 of the probability flow from x at `start`: a Gaussian's standard score is kept."""
    m = schedule.at(np.float32(start))
    spread = np.sqrt((numpy(m.alpha) * std) ** 2 + numpy(m.sigma) ** 2)
    end = schedule.at(np.float32(0.0))
    spread_end = np.sqrt((numpy(end.alpha) * std) ** 2 + numpy(end.sigma) ** 2)
    return numpy(end.alpha) * mean + spread_end * (x - numpy(m.alpha) * mean) / spread


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
def test_measured_order_is_the_declared_one(schedule):
    """The error at t = 0 falls as steps^-order."""
    solver, denoise = DDIM(), exact_denoiser()
    errors = []
    for steps in (25, 50, 100):
        run = list(Sampler(solver, steps=steps).steps_of(denoise, schedule, (8, 4)))
        start = Sampler(solver, steps=steps).times(schedule)[0]
        first = numpy(initial(schedule, (8, 4)))
        exact = flow_of_a_gaussian(schedule, first, start, GAUSSIAN["mean"], GAUSSIAN["std"])
        errors.append(np.sqrt(np.mean((numpy(run[-1].x) - exact) ** 2)))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, solver.order, atol=0.15)


def initial(schedule, shape, seed=0):
    from kdiff import random

    key = random.fold(random.key_of(seed), 0, random.INITIAL)
    return schedule.at(np.float32(1.0)).sigma * random.normal(key, shape)


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
def test_stochastic_solvers_have_the_right_mean_and_variance(schedule, solver):
    """To 5 standard errors of 8,000 samples, with what is left of the discretisation: it falls as 1 / steps."""
    std = {}
    for steps in (20, 160):
        x = numpy(Sampler(solver, steps=steps)(exact_denoiser(), schedule, (2000, 4)))
        std[steps] = x.std() - GAUSSIAN["std"]
        noise = 5 * GAUSSIAN["std"] / np.sqrt(x.size)
        assert abs(x.mean() - GAUSSIAN["mean"]) < noise + 1.0 / steps
    assert abs(std[160]) < noise + 2.0 / 160
    assert abs(std[160]) < abs(std[20]) + noise


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("solver", [DDIM(), *STOCHASTIC], ids=repr)
@pytest.mark.parametrize("steps", [1, 5])
def test_data_that_is_one_point_is_found(schedule, solver, steps):
    """If the data is one point the denoiser says so, and the last step, to t = 0, arrives there."""
    x = numpy(Sampler(solver, steps=steps)(lambda x, m: 0.0 * x + 0.25, schedule, (3, 2)))
    sigma = numpy(schedule.at(0.0).sigma)
    np.testing.assert_allclose(x, 0.25, atol=10 * sigma + 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_eta_one_is_ddpm(schedule):
    """Song et al. 2021, section 4.1."""
    a, b = (numpy(Sampler(s, steps=10)(exact_denoiser(), schedule, (4, 4))) for s in (DDPM(), DDIM(1.0)))
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_ddpm_is_ho_et_al():
    """Every step of algorithm 2, in float64 with their discrete indices, from the same noise."""
    from kdiff import random

    steps = 20
    schedule, denoise = schedules.LinearBeta(steps, 1e-3, 0.3), exact_denoiser()
    beta = np.linspace(1e-3, 0.3, steps)
    bar = np.cumprod(1 - beta)
    for variance in ("small", "large"):
        run = list(Sampler(DDPM(variance), "all").steps_of(denoise, schedule, (5, 3), seed=4))
        x = numpy(initial(schedule, (5, 3), seed=4)).astype("float64")
        for i, step in zip(range(steps - 1, -1, -1), run, strict=True):
            previous = bar[i - 1] if i else 1.0
            gain = np.sqrt(bar[i]) * 0.25 / (bar[i] * 0.25 + 1 - bar[i])
            x_hat = 0.3 + gain * (x - np.sqrt(bar[i]) * 0.3)
            mean = np.sqrt(previous) * beta[i] / (1 - bar[i]) * x_hat
            mean += np.sqrt(1 - beta[i]) * (1 - previous) / (1 - bar[i]) * x
            spread = beta[i] if variance == "large" else (1 - previous) / (1 - bar[i]) * beta[i]
            key = random.fold(random.key_of(4), step.index - 1, random.STEPS)
            x = mean + (np.sqrt(spread) * numpy(random.normal(key, (5, 3))) if i else 0)
            np.testing.assert_allclose(numpy(step.x), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPM("medium"), "small.*large.*medium"),
        (lambda: DDIM(1.5), "eta"),
        (lambda: DDIM(-0.1), "eta"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
