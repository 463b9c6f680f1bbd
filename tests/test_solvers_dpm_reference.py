"""DPM-Solver and DPM-Solver++, step by step, against diffusers and against the formulas of k-diffusion in float64.

Both see the exact denoiser of a mixture, the same grid and the same noise. diffusers and k-diffusion compute in
s = sigma / alpha; their s = 0 is a log-SNR of 40 here.
"""

import itertools

import numpy as np
import pytest
from keras import ops

from kdiff import schedules
from kdiff.solvers.dpm import DPMSolver, DPMSolverPP, DPMSolverPPSinglestep, DPMSolverSinglestep
from kdiff.solvers.dpm_sde import (
    DPMSolverPP2SAncestral,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    DPMSolverPPSinglestepSDE,
    DPMSolverSDE,
)
from tests.toys import MIXTURE, numpy, walk

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.reference, pytest.mark.once]

SCHEDULE = schedules.LinearBeta()
NORMAL = np.random.default_rng(0).standard_normal((2, 40, 16, 2))
START, NOISE = NORMAL[0, 0], NORMAL[1]


def data(z, s):
    """E[x | z], z = x + s noise, in float64."""
    return MIXTURE._denoise(np, z, 1.0, s)


def log_snrs_of(s):
    return [-2.0 * np.log(value) if value > 0 else 40.0 for value in np.asarray(s, "float64")]


def ours(solver, s, x, noise=None):
    """x after each step of `solver` along s = sigma / alpha."""
    marginals = [SCHEDULE.at_log_snr(np.float32(log_snr)) for log_snr in log_snrs_of(s)]
    draws = iter(() if noise is None else noise)

    def draw():
        return ops.convert_to_tensor(next(draws), "float32")

    return [numpy(x) for x, _ in walk(solver, SCHEDULE, marginals, x, noise=draw)]


def theirs(scheduler, x, noise=None):
    """x after each step of a scheduler of diffusers."""
    scheduler.set_begin_index(0)
    x, path = torch.tensor(x, dtype=torch.float32), []
    for i, t in enumerate(scheduler.timesteps):
        s = float(scheduler.sigmas[i])
        alpha = (1 + s**2) ** -0.5
        x_hat = data(x.numpy() / alpha, s)
        eps = (x.numpy() - alpha * x_hat) / (s * alpha)
        output = {"epsilon": eps, "sample": x_hat, "v_prediction": alpha * eps - s * alpha * x_hat}
        output = torch.tensor(output[scheduler.config.prediction_type], dtype=torch.float32)
        options = {} if noise is None else {"variance_noise": torch.tensor(noise[i], dtype=torch.float32)}
        x = scheduler.step(output, t, x, **options).prev_sample
        path.append(x.numpy())
    return path


def difference(a, b):
    """The largest difference of two paths, relative to the size of x."""
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in zip(a, b, strict=True))


def multistep(steps=8, last="zero", **options):
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, 1e-4, 0.02, final_sigmas_type=last, **options)
    scheduler.set_timesteps(steps)
    return scheduler


class _HalvedPP(DPMSolverPP):
    """As diffusers has the third order: the coefficient of u^2 is half of what it must be (see `solvers.dpm`)."""

    _curvature = 0.5


class _Halved(DPMSolver):
    """As diffusers has the third order."""

    _curvature = 0.5


GRIDS = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
]


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize(("order", "variant"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpm_solver_pp_is_that_of_diffusers(order, variant, grid):
    scheduler = multistep(solver_order=order, solver_type=variant, **grid)
    solver = (_HalvedPP if order == 3 else DPMSolverPP)(order, variant)
    assert difference(ours(solver, scheduler.sigmas, START), theirs(scheduler, START)) < 1e-4


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("lower_final", [True, False])
def test_other_predictions_and_ends(prediction, lower_final):
    options = {"prediction_type": prediction, "lower_order_final": lower_final, "timestep_spacing": "trailing"}
    for solver, name in ((_HalvedPP, "dpmsolver++"), (_Halved, "dpmsolver")):
        scheduler = multistep(7, "sigma_min", solver_order=3, algorithm_type=name, **options)
        path = ours(solver(3, lower_final=lower_final), scheduler.sigmas, START)
        assert difference(path, theirs(scheduler, START)) < 1e-4


@pytest.mark.parametrize("grid", GRIDS[:3], ids=repr)
@pytest.mark.parametrize(("order", "variant"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpm_solver_is_that_of_diffusers(order, variant, grid):
    """diffusers ends it at the smallest noise of the table, above zero."""
    scheduler = multistep(last="sigma_min", algorithm_type="dpmsolver", solver_order=order, solver_type=variant, **grid)
    solver = (_Halved if order == 3 else DPMSolver)(order, variant)
    assert difference(ours(solver, scheduler.sigmas, START), theirs(scheduler, START)) < 1e-4


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize(("order", "variant"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
def test_sde_dpm_solver_pp_is_that_of_diffusers(order, variant, grid):
    """diffusers has an order 3 too, with a wrong sign: of (1 - e^-H - H) / H^2 - 1/2 the 1/2 must be added."""
    scheduler = multistep(algorithm_type="sde-dpmsolver++", solver_order=order, solver_type=variant, **grid)
    path = ours(DPMSolverPPSDE(order, variant), scheduler.sigmas, START, NOISE)
    assert difference(path, theirs(scheduler, START, NOISE)) < 1e-4


@pytest.mark.parametrize("grid", GRIDS[:3], ids=repr)
@pytest.mark.parametrize(("order", "variant"), [(1, "midpoint"), (2, "midpoint"), (2, "heun")])
def test_sde_dpm_solver_is_that_of_diffusers(order, variant, grid):
    options = {"algorithm_type": "sde-dpmsolver", "solver_order": order, "solver_type": variant}
    scheduler = multistep(last="sigma_min", **options, **grid)
    path = ours(DPMSolverSDE(order, variant), scheduler.sigmas, START, NOISE)
    assert difference(path, theirs(scheduler, START, NOISE)) < 1e-4


def singlestep(order, variant, algorithm, steps=4):
    """A scheduler of diffusers on a grid whose every `order`-th node is a step here, the others its fractions."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        1000,
        1e-4,
        0.02,
        algorithm_type=algorithm,
        solver_order=order,
        solver_type=variant,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(order * steps)
    scheduler.sigmas = torch.tensor(np.geomspace(100.0, 0.01, order * steps + 1), dtype=torch.float32)
    scheduler.order_list = [*range(1, order + 1)] * steps
    return scheduler


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(("order", "variant"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "heun")])
def test_singlestep_is_that_of_diffusers(order, variant, algorithm):
    """Not order 3 of "midpoint": diffusers finds the value at 2/3 as order 2 of "midpoint" would, where algorithm 2 of
    the paper takes the full line. That one is compared with the paper, below."""
    scheduler = singlestep(order, variant, algorithm)
    solver = DPMSolverSinglestep if algorithm == "dpmsolver" else DPMSolverPPSinglestep
    path = ours(solver(order, variant), scheduler.sigmas[::order], START)
    assert difference(path, theirs(scheduler, START)[order - 1 :: order]) < 1e-4


def in_vp(s):
    return (1 + s**2) ** -0.5, s * (1 + s**2) ** -0.5


def paper_3(x, s, t, noise_form, r1=1 / 3, r2=2 / 3):
    """Algorithm 2 of arXiv:2206.00927 for the noise, and its counterpart for the data, from s to t, in float64."""
    h = np.log(s / t)
    s1, s2 = s * np.exp(-r1 * h), s * np.exp(-r2 * h)
    alpha, sigma = in_vp(s)

    def model(x, s):
        alpha, sigma = in_vp(s)
        x_hat = data(x / alpha, s)
        return (x - alpha * x_hat) / sigma if noise_form else x_hat

    def go(x, to, factor, value, slope):
        """From s to `to`, `factor` of the way; `slope` is D times its factor."""
        alpha_to, sigma_to = in_vp(to)
        if noise_form:
            phi = np.expm1(factor * h) / (factor * h) - 1
            return alpha_to / alpha * x - sigma_to * np.expm1(factor * h) * value - sigma_to * phi * slope
        phi = np.expm1(-factor * h) / (factor * h) + 1
        return sigma_to / sigma * x - alpha_to * np.expm1(-factor * h) * value + alpha_to * phi * slope

    value = model(x, s)
    first = model(go(x, s1, r1, value, 0.0), s1) - value
    second = model(go(x, s2, r2, value, r2 / r1 * first), s2) - value
    return go(x, t, 1.0, value, second / r2)


@pytest.mark.parametrize("solver", [DPMSolverSinglestep(3), DPMSolverPPSinglestep(3)], ids=repr)
def test_singlestep_of_order_3_is_that_of_the_paper(solver):
    s, x, path = np.geomspace(100.0, 0.01, 8), START, []
    for now, then in itertools.pairwise(s):
        x = paper_3(x, now, then, isinstance(solver, DPMSolverSinglestep))
        path.append(x)
    assert difference(ours(solver, s, START), path) < 1e-4


# The samplers of k-diffusion, in float64. They work on z = x / alpha; `noise` has what they draw, in order.


def ancestral(s, t, eta):
    up = min(t, eta * np.sqrt(t**2 * (s**2 - t**2) / s**2))
    return np.sqrt(t**2 - up**2), up


def k_2m(z, sigmas, noise):
    last, path = None, []
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        x_hat = data(z, s)
        if last is None or t == 0:
            z = x_hat if t == 0 else t / s * z - np.expm1(-np.log(s / t)) * x_hat
        else:
            h = np.log(s / t)
            r = np.log(sigmas[i - 1] / s) / h
            z = t / s * z - np.expm1(-h) * ((1 + 1 / (2 * r)) * x_hat - 1 / (2 * r) * last)
        last = x_hat
        path.append(z)
    return path


def k_2m_sde(z, sigmas, noise, eta, variant):
    last, path = None, []
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        x_hat = data(z, s)
        if t == 0:
            z = x_hat
        else:
            h = np.log(s / t)
            z = t / s * np.exp(-eta * h) * z - np.expm1(-h - eta * h) * x_hat
            if last is not None:
                change = (x_hat - last) * h / np.log(sigmas[i - 1] / s)
                slope = -np.expm1(-h - eta * h) / (-h - eta * h) + 1
                z = z + (slope if variant == "heun" else -0.5 * np.expm1(-h - eta * h)) * change
            z = z + noise[i] * t * np.sqrt(-np.expm1(-2 * eta * h))
        last = x_hat
        path.append(z)
    return path


def k_3m_sde(z, sigmas, noise, eta):
    old, steps, path = [], [], []
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        x_hat = data(z, s)
        if t == 0:
            z = x_hat
        else:
            h = np.log(s / t)
            longer = h * (eta + 1)
            z = np.exp(-longer) * z - np.expm1(-longer) * x_hat
            phi_2 = np.expm1(-longer) / longer + 1
            if len(old) == 1:
                z = z + phi_2 * (x_hat - old[0]) * h / steps[0]
            elif len(old) > 1:
                r0, r1 = steps[0] / h, steps[1] / h
                d1_0, d1_1 = (x_hat - old[0]) / r0, (old[0] - old[1]) / r1
                d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
                z = z + phi_2 * d1 - (phi_2 / longer - 0.5) * d2
            z = z + noise[i] * t * np.sqrt(-np.expm1(-2 * h * eta))
            steps = [h, *steps]
        old = [x_hat, *old]
        path.append(z)
    return path


def k_2s_ancestral(z, sigmas, noise, eta):
    path = []
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        x_hat = data(z, s)
        down, up = ancestral(s, t, eta)
        if down == 0:
            z = x_hat
        else:
            h = np.log(s / down)
            mid = s * np.exp(-0.5 * h)
            x_hat = data(mid / s * z - np.expm1(-0.5 * h) * x_hat, mid)
            z = down / s * z - np.expm1(-h) * x_hat + noise[i] * up
        path.append(z)
    return path


def k_sde(z, sigmas, noise, eta):
    path = []
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        x_hat = data(z, s)
        if t == 0:
            z = x_hat
        else:
            mid = np.sqrt(s * t)
            down, up = ancestral(s, mid, eta)
            x_hat = data(down / s * z + (1 - down / s) * x_hat + noise[2 * i] * up, mid)
            down, up = ancestral(s, t, eta)
            z = down / s * z + (1 - down / s) * x_hat + noise[2 * i + 1] * up
        path.append(z)
    return path


def continued(sigmas, noise, eta):
    """The second noise of each step from two independent ones: the first, as the rest of the step carries it on."""
    drawn = np.array(noise)
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        if t > 0 and eta > 0:
            (half, half_up), (whole, whole_up) = ancestral(s, np.sqrt(s * t), eta), ancestral(s, t, eta)
            shared = whole / half * half_up / whole_up
            drawn[2 * i + 1] = shared * noise[2 * i] + np.sqrt(1 - shared**2) * noise[2 * i + 1]
    return drawn


KARRAS = np.append(np.linspace(80.0 ** (1 / 7), 0.02 ** (1 / 7), 9) ** 7, 0.0)
K_DIFFUSION = [
    (DPMSolverPP(2), k_2m),
    *(
        (DPMSolverPPSDE(2, v, eta), lambda *a, v=v, eta=eta: k_2m_sde(*a, eta, v))
        for v, eta in [("midpoint", 1.0), ("heun", 0.6)]
    ),
    *((DPMSolverPP3MSDE(eta), lambda *a, eta=eta: k_3m_sde(*a, eta)) for eta in (0.0, 0.6, 1.0)),
    *((DPMSolverPP2SAncestral(eta), lambda *a, eta=eta: k_2s_ancestral(*a, eta)) for eta in (0.0, 0.6, 1.0)),
    *((DPMSolverPPSinglestepSDE(eta), lambda *a, eta=eta: k_sde(*a, eta)) for eta in (0.0, 0.6, 1.0)),
]


@pytest.mark.parametrize(("solver", "formula"), K_DIFFUSION, ids=[repr(solver) for solver, _ in K_DIFFUSION])
def test_k_diffusion(solver, formula):
    """k-diffusion draws the two noises of its SDE solver from a Brownian path; here they are given."""
    drawn = continued(KARRAS, NOISE, solver.eta) if isinstance(solver, DPMSolverPPSinglestepSDE) else NOISE
    path = formula(START / in_vp(KARRAS[0])[0], KARRAS, drawn)
    path = [in_vp(s)[0] * z for s, z in zip(KARRAS[1:], path, strict=True)]
    assert difference(ours(solver, KARRAS, START, NOISE), path) < 1e-4


def test_the_noises_of_a_step_are_correlated_as_one_path_is():
    """k-diffusion's path is Brownian in s: sqrt((s - s_mid) / (s - s_then)), the same in the limit of small steps."""
    for ratio, tolerance in ((0.9, 0.05), (0.999, 1e-3)):
        s, t = 1.0, ratio
        (half, half_up), (whole, whole_up) = ancestral(s, np.sqrt(s * t), 1.0), ancestral(s, t, 1.0)
        shared = whole / half * half_up / whole_up
        np.testing.assert_allclose(shared, np.sqrt((s - np.sqrt(s * t)) / (s - t)), atol=tolerance)
