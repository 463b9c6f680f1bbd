"""Laws over all solvers, on data whose denoiser is known exactly. A new solver is under them as soon as it has a name.

Formulas of one family are in test_solvers_*.py, other implementations in test_solvers_*_reference.py.
"""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, analytic, backend, random, schedules, solvers
from kdiff.denoisers import Denoiser
from kdiff.sampling import initial_noise
from kdiff.solvers import DDIM, DDPM, Solver
from tests.toys import (
    EAGER,
    GAUSSIAN,
    GAUSSIAN_DATA,
    MIXTURE,
    SCHEDULES,
    Compiled,
    compiled_run,
    exact_denoiser,
    exact_moments,
    measured_order,
    moments,
    numpy,
    walk,
    warmed,
)

COSINE, RECTIFIED, LINEAR = schedules.Cosine(), schedules.Rectified(), schedules.LinearBeta()
NAMED = [kind() for kind in Solver.names().values() if kind.__module__.startswith("kdiff.")]
FORWARD = [solver for solver in NAMED if not isinstance(solver, solvers.DDIMInversion)]
# What a solver computes is the same on every backend: where each is a program to compile, one of every file is run.
KEPT = (
    solvers.DDPM,
    solvers.Heun,
    solvers.PNDM,
    solvers.Adaptive,
    solvers.DPMSolverPPSinglestep,
    solvers.DPMSolverPPSinglestepSDE,
    solvers.UniPC,
    solvers.SASolver,
    solvers.TCD,
)


def here(cases):
    return [solver for solver in cases if EAGER or isinstance(solver, KEPT)]


def free(solver):
    """The solver without what hides its order: the lower orders at the end of a run, and steps that it chooses."""
    if isinstance(solver, solvers.Adaptive):  # a tolerance that cannot be met makes of it one step of fixed size
        return solver.clone(rtol=1e-9, atol=1e-9, max_substeps=1)
    return solver.clone(lower_final=False) if "lower_final" in solver._argument_defaults() else solver


@pytest.mark.once
@pytest.mark.parametrize("solver", here([s for s in FORWARD if not s.stochastic]), ids=repr)
def test_the_measured_order_is_the_declared_one(solver):
    """On a mixture, to an eighth, because the next order is not yet nothing."""
    solver = free(solver)
    steps, warm = ((8, 16), 0) if solver.evaluations > 1 else ((16, 32), 4)
    (order,), _ = measured_order(Compiled(solver), COSINE, steps, warm=warm)
    np.testing.assert_allclose(order, solver.order, rtol=0.125)


@pytest.mark.once
@pytest.mark.parametrize("solver", here([s for s in FORWARD if s.stochastic]), ids=repr)
def test_the_measured_order_of_mean_and_covariance_is_the_declared_one(solver):
    """Without any sampling error. The mean of a Gaussian is exact in any number of steps; also of solvers of order 0.

    3M has small errors of order 2 under some of order 3, SA-Solver of both signs: they take more steps.
    """
    steps = {solvers.DPMSolverPP3MSDE: 24, solvers.SASolver: 64}.get(type(solver), 16)
    solver, errors = free(solver), []
    for count in (steps, 2 * steps):
        marginals = [COSINE.at_log_snr(np.float32(value)) for value in warmed(np.linspace(-3, 3, count + 1), 4)]
        mean, covariance = moments(Compiled(solver), COSINE, marginals)
        exact_mean, exact_covariance = exact_moments(GAUSSIAN_DATA, marginals[-1])
        np.testing.assert_allclose(mean, exact_mean, atol=2e-6)
        errors.append(np.abs(covariance - exact_covariance).max())
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), solver.order, atol=0.35)


# No worse than Euler's method with as many calls of the denoiser

NARROW = analytic.Gaussian([0.3, 0.3], 0.25)
EULER = DDIM()
# `Adaptive` finds itself how many calls it needs; the last steps of `DPMSolverFast` are low, for it is to end above 0.
OF_OTHER_RUNS = (solvers.Adaptive, solvers.DPMSolverFast)
AT_LEAST_EULER = [s for s in FORWARD if s.order > 1 and not s.stochastic and not isinstance(s, OF_OTHER_RUNS)]
AMONG = [
    *(schedule for schedule in SCHEDULES if schedule != LINEAR),
    *(schedules.NoiseSchedule.get(name) for name in ("laplace", "sub_vp", "variance_exploding")),
]


def narrow_and_mixed(x, m):
    """Half of the examples are of a Gaussian, half of a mixture."""
    return ops.concatenate([NARROW(x[:8], m), MIXTURE(x[8:], m)])


def errors(solver, schedule, steps, exact):
    """Root mean square errors at the end of a run, on both."""
    marginals = [schedule.at(t) for t in Sampler(steps=steps).times(schedule).astype("float32")]
    x = marginals[0].sigma * initial_noise((16, 2))
    *_, (x, _) = walk(solver, schedule, marginals, x, narrow_and_mixed)
    return np.sqrt(np.mean(np.reshape((numpy(x) - exact) ** 2, (2, -1)), axis=1))


@pytest.mark.once
@pytest.mark.parametrize("schedule", AMONG if EAGER else [RECTIFIED], ids=repr)
def test_no_solver_is_worse_than_eulers_method_with_as_many_evaluations(schedule):
    """On the default grid, on a Gaussian and on a mixture.

    The one that may be, by up to 2.2: DPM-Solver-2 of the noise, whose errors grow as e^h, in 4 steps on an exploding
    schedule, where sigma falls 14 times in each.
    """
    x = numpy(schedule.at(np.float32(1.0)).sigma * initial_noise((16, 2)))
    exact = [data.flow(x[half], schedule, 1.0, 0.0) for data, half in ((NARROW, slice(8)), (MIXTURE, slice(8, 16)))]
    exact, program = np.concatenate(exact), {solver: Compiled(solver) for solver in [EULER, *here(AT_LEAST_EULER)]}
    # 50, which is the easiest, on one schedule.
    for evaluations in (8, 20, 50) if schedule == RECTIFIED else (8, 20):
        limits = errors(program[EULER], schedule, evaluations, exact)
        for solver in here(AT_LEAST_EULER):
            allowed = 1.0
            if isinstance(solver, solvers.DPMSolverSinglestep) and schedule == AMONG[-1] and evaluations == 8:
                allowed = 2.2
            found = errors(program[solver], schedule, evaluations // solver.evaluations, exact)
            assert np.all(found <= allowed * limits), (solver, evaluations, found, limits)


@pytest.mark.once
@pytest.mark.parametrize("schedule", [RECTIFIED, schedules.VarianceExploding()], ids=repr)
def test_the_covariance_by_sa_solver_is_no_worse_than_by_eulers_method(schedule):
    """Without any sampling error; with as many evaluations, on the default grid."""
    two = solvers.SASolver(), solvers.SASolver(1.0, 2, 3), solvers.SASolver(solvers.Within(), 2, 0)
    for evaluations, family in {8: two, 20: (*two, solvers.SASolver(1.0, 3, 3)), 50: two[:1]}.items():
        limit = covariance_error(EULER, schedule, evaluations)
        for solver in family:
            assert covariance_error(solver, schedule, evaluations) <= limit, (solver, evaluations)


def covariance_error(solver, schedule, steps):
    marginals = [schedule.at(t) for t in Sampler(steps=steps).times(schedule).astype("float32")]
    return np.abs(moments(solver, schedule, marginals)[1] - GAUSSIAN_DATA.covariance).max()


# What a step asks for


@pytest.mark.once
@pytest.mark.parametrize("solver", NAMED, ids=repr)
def test_a_step_asks_as_it_says(solver):
    """In the middle of a run: the denoiser `evaluations` times, between the two times; noise if it is stochastic."""
    asked, drawn = [], []
    now, then = (COSINE.at_log_snr(np.float32(value)) for value in (-1.0, 0.5))
    x = ops.ones((2, 2))

    def denoise(x, m):
        asked.append(m)
        return exact_denoiser()(x, m)

    def noise():
        drawn.append(x)
        return x

    state = solver.init(x, 8)
    if isinstance(solver, solvers.PNDM):
        state = state._replace(made=state.made + 3)
    if isinstance(solver, solvers.Adaptive):
        state = state._replace(h=state.h + 100.0)
    _, estimate, _ = solver.step(Denoiser.of(denoise), COSINE, x, now, then, noise, state)
    assert tuple(estimate.x_hat.shape) == (2, 2)
    assert bool(drawn) == solver.stochastic
    # JAX and TensorFlow's graph trace both branches of a condition.
    if EAGER or not isinstance(solver, (solvers.PNDM, solvers.Adaptive)):
        assert len(asked) == solver.evaluations
        assert all(-1.0001 < float(m.log_snr) < 0.5001 for m in asked)


# A step to t = 0 takes as many calls of the denoiser as any other, except for these.
TO_ZERO = {
    solvers.RK4(): 3,
    solvers.Heun("ratio"): 1,
    solvers.DPM2("ratio"): 1,
    solvers.DPM2Ancestral(): 1,
    solvers.DPMSolverPP2SAncestral(): 1,
    solvers.DPMSolverPPSinglestepSDE(): 1,
    solvers.DPMSolverFast(): 1,
}
# The three steps before it, if not `evaluations` each: of solvers whose conditions JAX and TensorFlow trace.
BEFORE = {solvers.PNDM(): [4, 4, 4], solvers.DPMSolverFast(): [3, 3, 2]}
# `Adaptive` finds itself how many calls it needs, and those of a rejected substep tell it only to take a shorter one.
COUNTED = [s for s in FORWARD if not isinstance(s, solvers.Adaptive)] + [solvers.Heun("ratio"), solvers.DPM2("ratio")]


@pytest.mark.once
@pytest.mark.parametrize("solver", [s for s in COUNTED if EAGER or s not in BEFORE], ids=repr)
def test_a_run_takes_as_many_calls_as_it_says_and_each_of_them_matters(solver):
    """On the default grid. Call k is wrong for example k alone: if it is of use, that example ends elsewhere than the
    last one, for which no call is wrong."""
    calls, made, x = [], [], numpy(initial_noise((1, 2))) * np.ones((20, 1), "float32")

    def denoise(x, m):
        wrong = np.float32(np.arange(20) == len(calls))[:, None]
        calls.append(m)
        return exact_denoiser()(x, m) + ops.convert_to_tensor(wrong)

    steps = Sampler(solver, steps=4).steps_of(denoise, COSINE, x.shape, x=x, noise=lambda step, shape: 0.1 * x)
    for step in steps:
        made.append(len(calls))
        changes = np.abs(numpy(step.x) - numpy(step.x)[-1]).max(axis=1)
    assert changes[: len(calls)].min() > 0
    before, last = BEFORE.get(solver, [solver.evaluations] * 3), TO_ZERO.get(solver, solver.evaluations)
    np.testing.assert_array_equal(np.diff(made, prepend=0), [*before, last])


@pytest.mark.parametrize(
    "solver", [solvers.RK4(), pytest.param(solvers.DPM2Ancestral(), marks=pytest.mark.once)], ids=repr
)
def test_a_compiled_step_to_zero_makes_no_other_calls(solver):
    """Counted as they are computed, not as they are traced."""
    calls = []

    def count(x):
        calls.append(x)
        return np.zeros((len(x), 1), "float32")

    compiled_run(
        Sampler(solver, steps=2), COSINE, (2, 2), lambda x, m: MIXTURE(x, m) + backend.by_numpy(count, x, (1,))
    )
    assert len(calls) == solver.evaluations + TO_ZERO[solver]


class _Difference(Solver):
    """The difference of two draws of one step."""

    stochastic = True

    def step(self, denoise, schedule, x, now, then, noise, state):
        return noise() - noise(), denoise(x, now), state


@pytest.mark.once
def test_the_draws_of_a_run_are_independent():
    """Those of one step, and of two: standard normal, so that the difference of two has variance 2, and no two steps
    are correlated. To 5 standard errors of 4,000 numbers."""
    steps = [numpy(step.x).ravel() for step in Sampler(_Difference(), steps=3).steps_of(MIXTURE, COSINE, (2000, 2))]
    np.testing.assert_allclose(np.cov(steps), 2.0 * np.eye(3), atol=5 * 2.0 * np.sqrt(2 / 4000))


# Whole runs to t = 0

POINTS = analytic.Points([[-1.0, 0.5], [1.0, -0.5], [0.2, 1.0], [-0.3, -1.0]])


def a_point_or_four(x, m):
    """Of the first four examples, all data is one point; of the others, `POINTS`."""
    return ops.concatenate([0.0 * x[:4] + 0.25, POINTS(x[4:], m)])


@pytest.mark.parametrize("schedule", SCHEDULES if EAGER else [LINEAR], ids=repr)
@pytest.mark.parametrize("solver", here(FORWARD), ids=repr)
def test_few_steps_to_zero(schedule, solver):
    """Data that is one point is found, because the denoiser says so and the last step arrives there. Else the end is no
    further away from the data than extrapolation goes.

    LCM keeps c_skip x, by its nature: 5e-5 x here. SDE-DPM-Solver puts in noise of alpha_then sigma_now / alpha_now,
    which in few steps is too much (see its docstring): it is finite.
    """
    sigma, program = numpy(schedule.at(0.0).sigma), Compiled(solver)
    draws = iter(np.random.default_rng(0).normal(size=(20, 12, 2)))

    def noise():
        return ops.convert_to_tensor(next(draws), "float32")

    for steps in (1, 2, 5):
        marginals = [schedule.at(np.float32(t)) for t in Sampler(steps=steps).times(schedule)]
        *_, (x, _) = walk(program, schedule, marginals, marginals[0].sigma * noise(), a_point_or_four, noise)
        x = numpy(x)
        assert np.all(np.isfinite(x))
        if not isinstance(solver, solvers.DPMSolverSDE):
            tolerance = 1e-4 if isinstance(solver, solvers.LCM) else 1e-5
            np.testing.assert_allclose(x[:4], 0.25, atol=10 * sigma + tolerance, err_msg=f"{steps} steps")
            assert np.abs(x).max() < 4.0


@pytest.mark.parametrize("solver", here(FORWARD), ids=repr)
def test_runs_are_independent_and_compiled_ones_the_same(solver):
    """The state is a value: what was run before, and with how many steps, does not matter. And a run compiled as
    `DiffusionModel.sample` compiles it is the run op by op, but for rounding, which the flow on a mixture enlarges."""
    four = Sampler(solver, steps=4)
    before = numpy(four(MIXTURE, LINEAR, (3, 2)))
    if EAGER:
        four.replaced(steps=5)(MIXTURE, LINEAR, (3, 2))
        np.testing.assert_array_equal(numpy(four(MIXTURE, LINEAR, (3, 2))), before)
    np.testing.assert_allclose(numpy(compiled_run(four, LINEAR, (3, 2))), before, atol=2e-3)


@pytest.mark.once
@pytest.mark.parametrize("solver", NAMED, ids=repr)
def test_a_solver_is_its_arguments(solver):
    assert Solver.get(type(solver).__name__) == solver
    assert Solver.get(keras.saving.serialize_keras_object(solver)) == solver
    assert eval(repr(solver), vars(solvers)) == solver
    assert (solver.clone().order, solver.clone().stochastic) == (solver.order, solver.stochastic)


@pytest.mark.once
@pytest.mark.parametrize(
    "schedule", [COSINE, RECTIFIED, schedules.VarianceExploding()] if EAGER else [LINEAR], ids=repr
)
@pytest.mark.parametrize("solver", here([s for s in FORWARD if s.stochastic]), ids=repr)
def test_a_solver_named_alone_draws_the_data(schedule, solver):
    """On the grid that it has when none is named, in 20 steps: the deviation of the data, but for what few steps lose.
    (For the deterministic ones more is tested above.) Those for distilled networks, of order 0, blur this one's."""
    x = numpy(compiled_run(Sampler(solver, steps=20), schedule, (300, 2)))
    assert (0.7 if solver.order else 0.6) < x.std() / MIXTURE.sample(2000).std() < 1.4


# DDPM and DDIM


@pytest.mark.once
@pytest.mark.parametrize("schedule", [COSINE, RECTIFIED, LINEAR] if EAGER else [COSINE], ids=repr)
@pytest.mark.parametrize("solver", [DDPM(), DDPM("large"), DDIM(0.5)], ids=repr)
def test_samples_have_the_right_mean_and_variance(schedule, solver):
    """In the sampling loop, to 5 standard errors of 4,000 numbers, and what is left of the discretisation in 50 steps:
    it falls as 1 / steps."""
    x = numpy(Sampler(solver, steps=50)(exact_denoiser(), schedule, (1000, 4)))
    error = 5 * GAUSSIAN["std"] / np.sqrt(x.size)
    np.testing.assert_allclose((x.mean(), x.std()), (GAUSSIAN["mean"], GAUSSIAN["std"]), atol=error + 1.0 / 50)


@pytest.mark.once
@pytest.mark.parametrize("schedule", SCHEDULES if EAGER else [LINEAR], ids=repr)
def test_eta_one_is_ddpm(schedule):
    """Song et al. 2021, section 4.1."""
    a, b = (numpy(Sampler(s, steps=6)(exact_denoiser(), schedule, (4, 4))) for s in (DDPM(), DDIM(1.0)))
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.once
def test_ddpm_is_ho_et_al():
    """Every step of algorithm 2, in float64 with their discrete indices, from the same noise."""
    steps = 20
    schedule, denoise = schedules.LinearBeta(steps, 1e-3, 0.3), exact_denoiser()
    beta = np.linspace(1e-3, 0.3, steps)
    bar = np.cumprod(1 - beta)
    for variance in ("small", "large"):
        run = list(Sampler(DDPM(variance), "all").steps_of(denoise, schedule, (5, 3), seed=4))
        x = numpy(schedule.at(np.float32(1.0)).sigma * initial_noise((5, 3), 4)).astype("float64")
        for i, step in zip(range(steps - 1, -1, -1), run, strict=True):
            previous = bar[i - 1] if i else 1.0
            gain = np.sqrt(bar[i]) * 0.25 / (bar[i] * 0.25 + 1 - bar[i])
            x_hat = 0.3 + gain * (x - np.sqrt(bar[i]) * 0.3)
            mean = np.sqrt(previous) * beta[i] / (1 - bar[i]) * x_hat
            mean += np.sqrt(1 - beta[i]) * (1 - previous) / (1 - bar[i]) * x
            spread = beta[i] if variance == "large" else (1 - previous) / (1 - bar[i]) * beta[i]
            key = random.fold_in(random.key_of(4), step.index - 1, random.STEPS)
            x = mean + (np.sqrt(spread) * numpy(random.normal(key, (5, 3))) if i else 0)
            np.testing.assert_allclose(numpy(step.x), x, rtol=1e-4, atol=1e-5)


@pytest.mark.once
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
