"""UniPC, SA-Solver and the solvers of distilled networks: order, exact moments, limits."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, schedules
from kdiff.schedules import Marginal
from kdiff.solvers import DDIM, DDPM, Solver
from kdiff.solvers.consistency import LCM, TCD, Consistency
from kdiff.solvers.sa import SASolver, Tau, Within
from kdiff.solvers.unipc import UniPC
from tests.toys import GAUSSIAN_DATA, Compiled, exact_denoiser, measured_order, moments, numpy, solve, walk

CONTINUOUS = [schedules.Cosine(), schedules.Rectified(), schedules.LinearBeta()]
GRID = np.linspace(-3, 3, 7)


# Orders


@pytest.mark.once
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (UniPC(1, lower_final=False), 2),
        (UniPC(3, lower_final=False), 4),
        (UniPC(1, corrector=False), 1),
        (UniPC(2, corrector=False, lower_final=False), 2),
        (UniPC(3, corrector=False, lower_final=False), 3),
        (UniPC(2, "bh1", lower_final=False), 3),
        (UniPC(2, predicts="noise", lower_final=False), 3),
        (UniPC(3, "bh1", corrector=False, predicts="noise", lower_final=False), 3),
        (UniPC(3), 2),
        (SASolver(0.0, 3, 1), 1),
        (SASolver(0.0, 1, 3, lower_final=False), 2),
        (SASolver(0.0, 2, 3, lower_final=False), 3),
        (SASolver(0.0, 3, 0, lower_final=False), 3),
    ],
    ids=repr,
)
def test_order_of_the_variants(solver, order):
    """UniPC-p has order p + 1. Of order 4 an error of 4e-6 is left, where float32 is felt: hence 0.35."""
    assert solver.order == order
    orders, _ = measured_order(Compiled(solver), schedules.Cosine(), steps=(16, 32), warm=4)
    np.testing.assert_allclose(orders[-1], order, atol=0.35)


# Mean and covariance without any sampling error


@pytest.mark.once
@pytest.mark.parametrize(
    ("solver", "schedule"),
    [
        (SASolver(1.0, 1, 0), schedules.Cosine()),
        (SASolver(0.5, 2, 0, lower_final=False, variant="bh1"), schedules.Rectified()),
        (SASolver(1.0, 2, 2), schedules.LinearBeta()),
        (SASolver(1.0, 2, 2, variant="bh1"), schedules.LinearBeta()),
        (SASolver(1.0, 2, 2), schedules.Rectified()),
        (SASolver(Within(1.0, 0.3, 0.7), 1, 2), schedules.Cosine()),
        (SASolver(0.3, 3, 3), schedules.Cosine()),
    ],
    ids=repr,
)
def test_sa_solver_has_the_right_mean_and_covariance(solver, schedule):
    """The mean of a Gaussian is exact in any number of steps; the covariance converges at the declared order.

    More may be measured where a term of higher order, or its sign, still matters: the bound is from below.
    """
    errors = []
    for steps in (16, 32):
        marginals = [schedule.at_log_snr(np.float32(log_snr)) for log_snr in np.linspace(-3, 3, steps + 1)]
        mean, covariance = moments(Compiled(solver), schedule, marginals)
        alpha, sigma = float(marginals[-1].alpha), float(marginals[-1].sigma)
        np.testing.assert_allclose(mean, alpha * GAUSSIAN_DATA.mean, atol=2e-6)
        errors.append(np.abs(covariance - alpha**2 * GAUSSIAN_DATA.covariance - sigma**2 * np.eye(2)).max())
    assert np.log2(errors[0] / errors[1]) > solver.order - 0.25
    assert errors[1] < 0.06


def consistency_function(x, m: Marginal, end=0.0):
    """Where the flow of `GAUSSIAN_DATA` leads from x: to data, or to the noise level sigma / alpha = `end`."""
    values, axes = np.linalg.eigh(GAUSSIAN_DATA.covariance)
    axes, values = ops.convert_to_tensor(axes, "float32"), ops.convert_to_tensor(values, "float32")
    mean = ops.convert_to_tensor(GAUSSIAN_DATA.mean, "float32")
    kept = ops.sqrt((values + end**2) / (m.alpha**2 * values + m.sigma**2))
    return mean + ops.matmul(kept * ops.matmul(x - m.alpha * mean, axes), ops.transpose(axes))


@pytest.mark.once
@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("solver", [Consistency(), TCD(1.0), LCM(scaling=1e4)], ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_consistency_function_gives_the_data_in_any_number_of_steps(solver, schedule, steps):
    """Mean and covariance are exact, but for the noise that TCD leaves at t = 0, of size sigma: 5.5e-4 on Cosine."""
    marginals = [schedule.at(np.float32(t)) for t in np.linspace(0.9, 0.0, steps + 1)]
    mean, covariance = moments(solver, schedule, marginals, denoise=consistency_function)
    np.testing.assert_allclose(mean, GAUSSIAN_DATA.mean, atol=2e-5)
    sigma = float(marginals[-1].sigma) if isinstance(solver, TCD) else 0.0
    np.testing.assert_allclose(covariance, GAUSSIAN_DATA.covariance, atol=3e-5 + 2 * sigma)


@pytest.mark.once
def test_a_consistency_function_that_ends_above_zero():
    """As in the paper: it leads to x at noise level epsilon, and re-noising takes account of it at every level."""
    schedule, epsilon = schedules.Cosine(), 0.3
    solver = Consistency(epsilon)
    marginals = [schedule.at_log_snr(np.float32(log_snr)) for log_snr in (-5.0, -2.0, 0.0, -2.0 * np.log(epsilon))]
    mean, covariance = moments(solver, schedule, marginals, denoise=lambda x, m: consistency_function(x, m, epsilon))
    alpha = float(marginals[-1].alpha)
    np.testing.assert_allclose(mean, alpha * GAUSSIAN_DATA.mean, atol=1e-6)
    np.testing.assert_allclose(covariance, alpha**2 * (GAUSSIAN_DATA.covariance + epsilon**2 * np.eye(2)), atol=1e-5)


# Limits


def noises(seed=0):
    """A function that draws the same noise in every run."""
    generator = np.random.default_rng(seed)
    return lambda: ops.convert_to_tensor(generator.normal(size=(4, 2)), "float32")


START = np.random.default_rng(5).normal(size=(4, 2))


@pytest.mark.once
@pytest.mark.parametrize("schedule", [schedules.Cosine(), schedules.Rectified()], ids=repr)
@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        (UniPC(1, corrector=False), DDIM()),
        (UniPC(1, corrector=False, predicts="noise"), DDIM()),
        (SASolver(0.0, 1, 0), DDIM()),
        (SASolver(1.0, 1, 0), DDPM()),
        (SASolver(0.0, 2, 3), UniPC(2)),
        (SASolver(0.0, 1, 2, variant="bh1"), UniPC(1, "bh1")),
        (SASolver(Within(0.7, 0.0, 1.0)), SASolver(0.7)),
        (SASolver(Within(0.7, 0.999, 1.0), 3, 3), SASolver(0.0, 3, 3)),
        (TCD(0.0), DDIM()),
        (TCD(1.0), Consistency()),
        (TCD(1e-6), TCD(0.0)),
        (LCM(scaling=1e6), Consistency()),
        (Consistency(1e-5), Consistency()),
    ],
    ids=repr,
)
def test_limits(solver, limit, schedule):
    """To float32's rounding. TCD adds noise of size sqrt(gamma) and, with gamma = 1, keeps what is left at t = 0."""
    a, b = (solve(s, schedule, GRID, START, noise=noises()) for s in (solver, limit))
    left = {TCD(1e-6): 5e-3, TCD(1.0): 3 * float(schedule.at(0.0).sigma)}
    np.testing.assert_allclose(a, b, atol=1e-5 + left.get(solver, 0.0))


@pytest.mark.once
def test_without_noise_none_is_drawn():
    """`solve` gives None for the function that draws."""
    for solver in (UniPC(3), SASolver(0.0, 3, 3), TCD(0.0)):
        assert not solver.stochastic
        assert np.all(np.isfinite(solve(solver, schedules.Cosine(), GRID, START)))
    assert all(s.stochastic for s in (SASolver(0.1), SASolver(Within()), TCD(0.1), LCM(), Consistency()))


@pytest.mark.once
def test_tau_is_that_of_the_steps_own_time():
    """A tau that is 1 below t = 0.5 alone changes nothing before the step that begins there."""
    schedule = schedules.Rectified()
    times = np.float32([0.9, 0.6, 0.4, 0.2, 0.1])
    log_snrs = numpy(schedule.log_snr(times))
    for count in (2, 3, 4, 5):
        a, b = (
            solve(SASolver(tau, 2, 2, lower_final=False), schedule, log_snrs[:count], START, noise=noises())
            for tau in (Within(1.0, 0.0, 0.5), 0.0)
        )
        assert np.allclose(a, b, atol=1e-5) == (count < 4)


@pytest.mark.once
@pytest.mark.parametrize("schedule", [schedules.LinearBeta(), schedules.Cosine()], ids=repr)
@pytest.mark.parametrize(
    "solver", [UniPC(1), UniPC(3), SASolver(Within(), 3, 3), SASolver(0.4, 2, 1, lower_final=False)], ids=repr
)
def test_the_step_to_zero_is_stable(solver, schedule):
    """Float32 and float64 agree to the last step: the mean of data N(0.3, 0.5^2) is followed in 1, 2, 3 steps.

    The mean of an affine denoiser is kept: with x = alpha 0.3 at the start, x = 0.3 at the end, whatever the order.
    """
    for steps in (1, 2, 3):
        marginals = [schedule.at(np.float32(t)) for t in Sampler(steps=steps).times(schedule)]
        x = marginals[0].alpha * 0.3 * ops.ones((1, 2))
        *_, (x, _) = walk(solver, schedule, marginals, x, exact_denoiser(), lambda: ops.zeros((1, 2)))
        np.testing.assert_allclose(numpy(x), 0.3, atol=2e-5)


@pytest.mark.once
def test_values():
    """Names, configurations and equality."""
    for name, made in {"unipc": UniPC(), "sa_solver": SASolver(), "lcm": LCM(), "tcd": TCD()}.items():
        assert Solver.get(name) == made
    solver = SASolver(Within(0.5, 0.1, 0.9), 3, 1, lower_final=False)
    assert Solver.get(keras.saving.serialize_keras_object(solver)) == solver
    assert solver != SASolver(Within(0.5, 0.1, 0.8), 3, 1, lower_final=False)
    assert Tau.get("within") == Within()
    assert repr(solver) == (
        "SASolver(tau=Within(value=0.5, low=0.1, high=0.9), predictor_order=3, corrector_order=1, lower_final=False)"
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniPC(4), "predictor_order.*4"),
        (lambda: UniPC(variant="bh3"), "bh1.*bh2.*bh3"),
        (lambda: UniPC(predicts="v"), "data.*noise.*'v'"),
        (lambda: SASolver(-1.0), "tau"),
        (lambda: SASolver("often"), "tau.*often"),
        (lambda: SASolver(predictor_order=0), "predictor_order.*0"),
        (lambda: SASolver(corrector_order=4), "corrector_order.*4"),
        (lambda: SASolver(variant="bh3"), "bh1.*bh2.*bh3"),
        (lambda: Within(low=0.8, high=0.2), "high.*0.2"),
        (lambda: TCD(1.1), "gamma.*1.1"),
        (lambda: LCM(sigma_data=0.0), "sigma_data"),
        (lambda: Consistency(-0.1), "epsilon"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
