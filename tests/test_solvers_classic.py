"""Runge-Kutta, multistep and adaptive solvers: order, moments, limits, and what they do at t = 0."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, analytic, backend, schedules
from kdiff.denoisers import Denoiser
from kdiff.solvers import DDIM, DDPM, DDIMInversion, Solver
from kdiff.solvers.adaptive import Adaptive
from kdiff.solvers.multistep import DEIS, IPNDM, LMS, PNDM
from kdiff.solvers.runge_kutta import DPM2, RK4, DPM2Ancestral, Euler, EulerAncestral, Heun
from tests.toys import MIXTURE, SCHEDULES, compiled_run, exact_denoiser, measured_order, numpy, solve, walk

DENOISE = Denoiser.of(MIXTURE)
CONTINUOUS = [schedules.Cosine(), schedules.Rectified(), schedules.LinearBeta()]
# What a solver computes is the same on every backend: where each case is a program to compile, there are fewer.
EAGER = keras.backend.backend() == "torch"


def of(cases, *kept):
    """All cases, or these."""
    return cases if EAGER else [cases[i] for i in kept]


CHURN = {"s_churn": 4.0, "s_min": 0.05, "s_max": 20.0}
MULTISTEP = [LMS(), DEIS(), DEIS(4, False), IPNDM(), PNDM(), PNDM("plms")]
DETERMINISTIC = [Euler(), Heun(), DPM2(), RK4(), Adaptive(), Adaptive(order=2), *MULTISTEP]
STOCHASTIC = [
    *(kind(**CHURN) for kind in (Euler, Heun, DPM2, RK4)),
    *(kind(eta) for kind in (EulerAncestral, DPM2Ancestral) for eta in (0.5, 1.0)),
]
# Each order and class, with steps between which it has settled and float32 does not yet matter, and the warm-up of
# `measured_order`. A tolerance that cannot be met makes of `Adaptive` one step of fixed size.
ORDERS = [
    (Euler(), (32, 64), 0),
    (EulerAncestral(0.0), (32, 64), 0),
    (Heun(), (16, 32), 0),
    (DPM2(), (16, 32), 0),
    (DPM2Ancestral(0.0), (16, 32), 0),
    (RK4(), (8, 16), 0),
    (LMS(1), (32, 64), 0),
    (LMS(2), (32, 64), 0),
    (LMS(3), (48, 96), 4),
    (LMS(4), (24, 48), 3),
    (DEIS(1), (32, 64), 0),
    (DEIS(2, lower_final=False), (16, 32), 0),
    (DEIS(3, lower_final=False), (16, 32), 4),
    (DEIS(4, lower_final=False), (8, 16), 3),
    (IPNDM(1), (32, 64), 0),
    (IPNDM(2), (16, 32), 0),
    (IPNDM(3), (32, 64), 0),
    (IPNDM(4), (32, 64), 0),
    (PNDM(), (32, 64), 0),
    (PNDM("plms"), (16, 32), 0),
    (Adaptive(1e-9, 1e-9, 2, max_substeps=1), (16, 32), 0),
    (Adaptive(1e-9, 1e-9, 3, max_substeps=1), (16, 32), 0),
]


class Compiled:
    """A solver whose step is compiled as a whole, for one schedule and denoiser; on PyTorch, the solver.

    Op by op JAX would compile the loops and conditions of `Adaptive` and `PNDM` in every step anew.
    """

    def __init__(self, solver):
        self.solver, self.init, self.program = solver, solver.init, None

    def step(self, denoise, schedule, x, now, then, noise, state):
        def step(x, now, then, drawn, state):
            return self.solver.step(denoise, schedule, x, now, then, lambda: drawn, state)

        self.program = self.program or backend.fused(step)
        return self.program(x, now, then, noise() if noise else ops.zeros_like(x), state)


@pytest.fixture(autouse=True, scope="module")
def exact_flow_once():
    """The exact flow from the same x is computed once, not for every solver."""
    flow, found = MIXTURE.flow, {}

    def remembered(x, schedule, now, then):
        key = (x.tobytes(), repr(schedule), now, then)
        if key not in found:
            found[key] = flow(x, schedule, now, then)
        return found[key]

    MIXTURE.flow = remembered
    yield
    del MIXTURE.flow


@pytest.mark.parametrize("schedule", of(CONTINUOUS, 1), ids=repr)
@pytest.mark.parametrize(("solver", "steps", "warm"), of(ORDERS, 2, 5, 9, 12, 18, 21), ids=str)
def test_measured_order_is_the_declared_one(solver, steps, warm, schedule):
    """On a mixture; within 0.35, because the next order is not yet nothing."""
    orders, _ = measured_order(Compiled(solver), schedule, steps, warm=warm)
    np.testing.assert_allclose(orders[-1], solver.order, atol=0.35)


def test_equal_steps_of_sigma_give_ipndm_its_full_order():
    """There it is Adams and Bashforth's method, as is LMS."""
    log_snrs = -2 * np.log(np.linspace(4.0, 0.5, 12))
    x = np.random.default_rng(0).normal(size=(8, 2))
    for terms in (2, 3, 4) if EAGER else (4,):
        a, b = (solve(Compiled(s), schedules.Cosine(), log_snrs, x) for s in (IPNDM(terms), LMS(terms)))
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_lms_coefficients_are_the_integrals_of_lagrange_polynomials():
    """Against NumPy's exact integration of polynomials, in float64."""
    s = np.array([7.0, 5.5, 3.0, 2.6, 1.1])  # the oldest first; the last is `then`
    schedule = schedules.Cosine()
    marginals = [schedule.at_log_snr(np.float32(-2 * np.log(v))) for v in s]
    past = tuple(m.log_snr for m in marginals[2::-1])
    ours = LMS(4).coefficients(ops.convert_to_tensor(4), marginals[3], marginals[4], past)
    for i, c in zip((2, 1, 0), ours, strict=True):
        others = np.delete(s[:4], i)
        integral = np.polynomial.Polynomial.fromroots(others).integ()
        expected = (integral(s[4]) - integral(s[3])) / np.prod(s[i] - others)
        np.testing.assert_allclose(float(c), expected, rtol=1e-4)


@pytest.mark.parametrize("h", [1e-3, 0.3, 0.999, 1.001, 3.0, 25.0])
def test_deis_moments_are_exact(h):
    """The integral of y^n e^-y from 0 to h, by Gauss and Legendre in float64; the form changes at h = 1."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    y = h / 2 * (nodes + 1)
    for n in (1, 2, 3):
        exact = h / 2 * np.sum(weights * y**n * np.exp(-y))
        ours = float(DEIS().moment(n, ops.convert_to_tensor(h, "float32")))
        np.testing.assert_allclose(ours, exact, rtol=2e-5)


# The moments of a run on Gaussian data, without sampling: the denoiser is affine, so each step is
# x_then = a x + b + B noise, and a batch of unit vectors shows a, b and B.

GAUSSIAN = analytic.Gaussian([0.4, -0.7], [[0.5, 0.3], [0.3, 0.4]])


def moments(solver, schedule, log_snrs):
    """The mean and covariance at the end of a run that begins with the right ones."""
    marginals = [schedule.at_log_snr(np.float32(value)) for value in log_snrs]
    probes, units = (ops.convert_to_tensor(np.eye(5, 2, k).astype("float32")) for k in (-1, -3))
    alpha, sigma = float(marginals[0].alpha), float(marginals[0].sigma)
    mean, covariance = alpha * GAUSSIAN.mean, alpha**2 * GAUSSIAN.covariance + sigma**2 * np.eye(2)
    solver = Compiled(solver)
    state = solver.init(probes, len(marginals) - 1)
    for now, then in itertools.pairwise(marginals):
        x, _, state = solver.step(Denoiser.of(GAUSSIAN), schedule, probes, now, then, lambda: units, state)
        x = numpy(x).astype("float64")
        linear, added = (x[1:3] - x[0]).T, (x[3:] - x[0]).T
        mean, covariance = linear @ mean + x[0], linear @ covariance @ linear.T + added @ added.T
    end = marginals[-1]
    alpha, sigma = float(end.alpha), float(end.sigma)
    return mean - alpha * GAUSSIAN.mean, covariance - alpha**2 * GAUSSIAN.covariance - sigma**2 * np.eye(2)


@pytest.mark.parametrize("schedule", of(CONTINUOUS, 1), ids=repr)
@pytest.mark.parametrize("solver", of(STOCHASTIC, 1, 3, 5, 7), ids=repr)
def test_mean_and_covariance_converge_with_the_declared_order(schedule, solver):
    """Exactly computed. The error falls at least as steps^-order, unless it is at float32's rounding, 1e-5, already."""
    coarse, fine = (moments(solver, schedule, np.linspace(-3, 3, n + 1)) for n in (16, 64))
    for one, other in zip(coarse, fine, strict=True):
        assert np.abs(other).max() < max(np.abs(one).max() / 4 ** (solver.order - 0.35), 1e-5)
        assert np.abs(other).max() < 0.05


def test_noise_is_added_only_between_s_min_and_s_max():
    """And all that is added is right: with churn the covariance is another than without, but where there is none."""
    schedule, log_snrs = schedules.Cosine(), np.linspace(-3, 3, 5)
    plain = moments(Heun(), schedule, log_snrs)[1]
    same = moments(Heun(s_churn=4.0, s_min=5.0), schedule, log_snrs)[1]  # above the run's first ratio, e^1.5
    also = moments(Heun(s_churn=4.0, s_max=0.2), schedule, log_snrs)[1]  # below the last at which a step begins
    other = moments(Heun(s_churn=4.0), schedule, log_snrs)[1]
    np.testing.assert_allclose(same, plain, atol=1e-6)
    np.testing.assert_allclose(also, plain, atol=1e-6)
    assert np.abs(other - plain).max() > 1e-3


def test_churn_is_edm():
    """Karras et al. 2022, algorithm 2, in float64, with sigma / alpha as their sigma and s_noise not 1."""
    schedule, solver = schedules.Cosine(), Heun(s_churn=2.0, s_min=0.3, s_max=3.0, s_noise=1.1)
    s = np.array([4.0, 2.0, 0.8, 0.2, 0.1])
    draws = np.random.default_rng(1).normal(size=(4, 8, 2)).astype("float32")
    marginals = [schedule.at_log_snr(np.float32(-2 * np.log(v))) for v in s]
    start = np.random.default_rng(0).normal(size=(8, 2))
    z, noises = start, iter(draws)
    ours = walk(solver, schedule, marginals, start * float(marginals[0].alpha), noise=lambda: next(noises))

    def slope(z, s):
        return (z - MIXTURE._denoise(np, z, 1.0, s)) / s

    for i, (x, _) in enumerate(ours):
        gamma = min(2.0 / 4, np.sqrt(2) - 1) if 0.3 <= s[i] <= 3.0 else 0.0
        up = s[i] + gamma * s[i]
        z_up = z + np.sqrt(up**2 - s[i] ** 2) * 1.1 * draws[i]
        d = slope(z_up, up)
        euler = z_up + (s[i + 1] - up) * d
        z = z_up + (s[i + 1] - up) * 0.5 * (d + slope(euler, s[i + 1]))
        np.testing.assert_allclose(numpy(x) / float(marginals[i + 1].alpha), z, rtol=2e-4, atol=2e-5)


def run(solver, schedule, steps, shape=(3, 2), denoise=None):
    """The end of a run from t = 1 to 0 in equal steps of t, outside of the sampling loop."""
    generator = np.random.default_rng(0)

    def noise():
        return ops.convert_to_tensor(generator.normal(size=shape).astype("float32"))

    marginals = [schedule.at(np.float32(t)) for t in Sampler(steps=steps).times(schedule)]
    *_, (x, _) = walk(solver, schedule, marginals, marginals[0].sigma * noise(), denoise or exact_denoiser(), noise)
    return numpy(x)


@pytest.mark.parametrize("schedule", of(SCHEDULES, 2), ids=repr)
@pytest.mark.parametrize(
    ("solver", "other"),
    of(
        [
            (Euler(), DDIM()),
            (EulerAncestral(0.0), DDIM()),
            (EulerAncestral(), DDPM()),
            (EulerAncestral(0.3), DDIM(0.3)),
            (DPM2Ancestral(0.0), DPM2()),
            (LMS(1), DDIM()),
            (DEIS(1), DDIM()),
            (IPNDM(1), DDIM()),
        ],
        2,
        3,
        4,
        6,
    ),
    ids=repr,
)
def test_limits(solver, other, schedule):
    """Methods that are another one by another name."""
    a, b = (run(Compiled(one), schedule, 6) for one in (solver, other))
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("kind", of([Euler, Heun, DPM2, RK4], 1))
def test_churn_of_nothing_is_no_churn(kind):
    """s_churn = 0, and s_churn > 0 that is too small to be seen, are the deterministic method."""
    still, hardly, much = (run(Compiled(kind(s_churn=s)), CONTINUOUS[0], 6) for s in (0.0, 1e-9, 2.0))
    np.testing.assert_allclose(hardly, still, atol=2e-4)
    assert np.abs(much - still).max() > 1e-2


POINTS = analytic.Points([[-1.0, 0.5], [1.0, -0.5], [0.2, 1.0], [-0.3, -1.0]])


def a_point_or_four(x, m):
    """Of the first four examples, all data is one point; of the others, `POINTS`."""
    return ops.concatenate([0.0 * x[:4] + 0.25, POINTS(x[4:], m)])


@pytest.mark.parametrize("schedule", of(SCHEDULES, 2), ids=repr)
@pytest.mark.parametrize("solver", [*of(DETERMINISTIC, 1, 3, 4, 6, 8, 9, 10), *of(STOCHASTIC, 1, 7)], ids=repr)
def test_few_steps_to_zero(schedule, solver):
    """Data that is one point is found, because the denoiser says so and the last step arrives there. Else the end is no
    further away from the data than extrapolation goes.

    PNDM's is finite only: in few steps sigma / alpha falls a thousandfold in the first, the correction of the warm-up
    grows with that ratio, and the steps after it extrapolate from there. (So it does in diffusers.)
    """
    sigma, program = numpy(schedule.at(0.0).sigma), Compiled(solver)
    for steps in (1, 2, 3, 4, 5):
        x = run(program, schedule, steps, (12, 2), a_point_or_four)
        np.testing.assert_allclose(x[:4], 0.25, atol=10 * sigma + 1e-5, err_msg=f"{steps} steps")
        assert np.all(np.isfinite(x))
        assert np.abs(x).max() < 4.0 or isinstance(solver, PNDM)


@pytest.mark.parametrize("solver", [Heun(**CHURN), DPM2Ancestral(), PNDM("plms"), DEIS(), Adaptive()], ids=repr)
def test_consecutive_runs_are_independent(solver):
    """The state is a value: what was run before, and with how many steps, does not matter."""
    program = Compiled(solver)
    first = run(program, CONTINUOUS[0], 4)
    run(program, CONTINUOUS[0], 7)
    np.testing.assert_array_equal(run(program, CONTINUOUS[0], 4), first)


@pytest.mark.parametrize("solver", of([Euler(**CHURN), DPM2Ancestral()], 0), ids=repr)
def test_a_run_of_the_loop_has_the_right_moments(solver):
    """To 5 standard errors of 4,000 samples and what is left of the discretisation with 40 steps."""
    x = numpy(Sampler(solver, steps=40)(GAUSSIAN, CONTINUOUS[0], (4000, 2)))
    np.testing.assert_allclose(x.mean(0), GAUSSIAN.mean, atol=5 * np.sqrt(0.5 / 4000) + 0.02)
    np.testing.assert_allclose(np.cov(x.T), GAUSSIAN.covariance, atol=5 * 0.5 * np.sqrt(2 / 4000) + 0.03)


class TestAdaptive:
    SPAN = (-6.0, 0.0, 3.0, 12.0)

    def go(self, solver, schedule=CONTINUOUS[0]):
        """(x, exact, control) of a run over three steps of the grid, the last one long."""
        marginals = [schedule.at_log_snr(np.float32(value)) for value in self.SPAN]
        start = np.random.default_rng(0).normal(size=(16, 2)) * float(marginals[0].sigma)
        *_, (x, state) = walk(Compiled(solver), schedule, marginals, start)
        exact = MIXTURE.flow(start, schedule, float(marginals[0].t), float(marginals[-1].t))
        return numpy(x), exact, state

    @pytest.mark.parametrize("order", [2, 3])
    def test_the_error_follows_the_tolerance(self, order):
        errors, tried = [], []
        for tolerance in (1e-1, 1e-2, 1e-3, 1e-4) if EAGER else (1e-1, 1e-4):
            x, exact, control = self.go(Adaptive(tolerance, tolerance, order))
            errors.append(np.sqrt(np.mean((x - exact) ** 2)))
            tried.append(int(control.tried))
            assert errors[-1] < tolerance
        assert np.all(np.diff(errors) < 0)
        assert np.all(np.diff(tried) > 0)
        # Of order p, the error falls as the number of sub-steps to the power -p, so both fall as the tolerance does.
        assert errors[-1] < errors[0] / 30

    def test_sub_steps_are_bounded_and_the_end_is_reached(self):
        """A tolerance that cannot be met: no more sub-steps than allowed, and about as good as equal steps."""
        x, exact, control = self.go(Adaptive(1e-12, 0.0, max_substeps=8))
        assert int(control.tried) == 3 * 8
        assert np.sqrt(np.mean((x - exact) ** 2)) < 0.05

    def test_the_sub_step_is_carried_across_the_grid(self):
        """Otherwise each step of the grid would begin with `first` again."""
        solver = Compiled(Adaptive(1e-3, 1e-3, first=0.01))
        x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(16, 2)), "float32")
        marginals = [CONTINUOUS[0].at_log_snr(np.float32(value)) for value in (-2.0, 0.0, 2.0)]
        x, _, once = solver.step(DENOISE, CONTINUOUS[0], x, *marginals[:2], None, solver.init(x, 2))
        _, _, twice = solver.step(DENOISE, CONTINUOUS[0], x, *marginals[1:], None, once)
        _, _, again = solver.step(DENOISE, CONTINUOUS[0], x, *marginals[1:], None, solver.init(x, 2))
        assert int(twice.tried) - int(once.tried) < int(again.tried)

    def test_a_denoiser_that_fails_far_away_is_left_out(self):
        """NaN at a stage that went too far only shortens the sub-step."""

        def denoise(x, m):
            return ops.where(m.log_snr > limit[0], np.float32("nan"), 1.0) * MIXTURE(x, m)

        schedule, x = CONTINUOUS[0], ops.convert_to_tensor(np.random.default_rng(0).normal(size=(4, 2)), "float32")
        now, then, limit = schedule.at_log_snr(-2.0), schedule.at_log_snr(4.0), [3.9]
        z, _, control = Adaptive(1e-2, 1e-2, first=2.9).step(
            Denoiser.of(denoise), schedule, x, now, then, None, Adaptive(first=2.9).init(x, 1)
        )
        assert int(control.tried) > 1
        assert np.all(np.isfinite(numpy(z)))


@pytest.mark.parametrize("solver", [PNDM(), Adaptive()], ids=repr)
def test_compiled_steps_are_the_same(solver):
    """A whole run, compiled as `DiffusionModel.sample` compiles it, and op by op."""
    schedule, sampler = CONTINUOUS[2], Sampler(solver, steps=4)
    # Rounding differs, and with few steps the flow on a mixture enlarges it.
    fast, plain = compiled_run(sampler, schedule, (3, 2)), sampler(MIXTURE, schedule, (3, 2))
    np.testing.assert_allclose(numpy(fast), numpy(plain), atol=2e-3)


def test_euler_has_an_inverse_without_churn():
    assert Euler().inverse() == DDIMInversion()
    with pytest.raises(ValueError, match="stochastic"):
        Euler(s_churn=1.0).inverse()
    with pytest.raises(ValueError, match="no inverse"):
        Heun().inverse()


@pytest.mark.parametrize("solver", [*DETERMINISTIC, *STOCHASTIC], ids=repr)
def test_a_solver_is_its_arguments(solver):
    assert Solver.get(solver.__class__.__name__).__class__ is solver.__class__
    assert solver.clone() == solver
    assert solver.stochastic == (solver in STOCHASTIC)


def test_evaluations():
    """How often a step of the middle of a run calls the denoiser."""
    for solver in [*DETERMINISTIC, *STOCHASTIC]:
        calls = []

        def denoise(x, m, calls=calls):
            calls.append(m)
            return 0.0 * x

        x, schedule = ops.zeros((1, 2)), CONTINUOUS[0]
        state = solver.init(x, 4)
        if isinstance(solver, PNDM):
            state = state._replace(made=state.made + 3)
        if isinstance(solver, Adaptive):
            state = state._replace(h=state.h + 100.0)
        now, then = schedule.at(np.float32(0.5)), schedule.at(np.float32(0.4))
        solver.step(Denoiser.of(denoise), schedule, x, now, then, lambda: ops.zeros((1, 2)), state)
        # JAX and TensorFlow's graph trace both branches of a condition.
        if EAGER or not isinstance(solver, (PNDM, Adaptive)):
            assert len(calls) == solver.evaluations, solver


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euler(s_churn=-1.0), "s_churn"),
        (lambda: Heun(s_min=-0.1), "s_min"),
        (lambda: Heun(s_min=2.0, s_max=1.0), r"s_max.*\[2.0, inf\]"),
        (lambda: DPM2(s_noise=-1.0), "s_noise"),
        (lambda: RK4(s_churn="much"), "s_churn"),
        (lambda: EulerAncestral(1.1), "EulerAncestral.*eta"),
        (lambda: DPM2Ancestral(-0.1), "eta"),
        (lambda: LMS(5), "order.*4.*5"),
        (lambda: LMS(0), "order.*1.*0"),
        (lambda: DEIS(5), "order"),
        (lambda: IPNDM(5), "terms"),
        (lambda: PNDM("none"), "warmup.*prk.*plms"),
        (lambda: Adaptive(rtol=-1.0), "rtol"),
        (lambda: Adaptive(atol=-1.0), "atol"),
        (lambda: Adaptive(0.0, 0.0), "above zero"),
        (lambda: Adaptive(order=4), "order"),
        (lambda: Adaptive(max_substeps=0), "max_substeps"),
        (lambda: Adaptive(first=0.0), "first"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
