"""DPM-Solver and DPM-Solver++: measured orders, exact moments, limits. Other implementations: *_reference.py."""

import itertools

import numpy as np
import pytest
from keras import ops

from kdiff import Sampler, schedules
from kdiff.solvers import DDIM, DDPM, DPM2, RK4, Solver
from kdiff.solvers.dpm import DPMSolver, DPMSolverPP, DPMSolverPPSinglestep, DPMSolverSinglestep
from kdiff.solvers.dpm_sde import (
    DPMSolverPP2SAncestral,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    DPMSolverPPSinglestepSDE,
    DPMSolverSDE,
)
from tests.toys import (
    EAGER,
    GAUSSIAN_DATA,
    MIXTURE,
    Compiled,
    exact_moments,
    measured_order,
    moments,
    numpy,
    solve,
    walk,
    warmed,
)

COSINE = schedules.Cosine()
# Variants; the solvers as their names give them are in test_solvers.py.
MULTISTEP = [
    solver(order, variant, lower_final=False)
    for solver in (DPMSolver, DPMSolverPP)
    for order, variant in [(1, "midpoint"), (2, "heun"), (3, "midpoint")]
]
SINGLESTEP = [
    solver(order, variant, fractions)
    for solver in (DPMSolverSinglestep, DPMSolverPPSinglestep)
    for order, variant, fractions in [
        (1, "midpoint", None),
        (2, "midpoint", (0.3,)),
        (2, "heun", None),
        (3, "midpoint", None),
        (3, "heun", (0.3, 2 / 3)),
    ]
]
SDE = [
    DPMSolverSDE(1),
    DPMSolverSDE(2, eta=0.5),
    DPMSolverSDE(2, "heun"),
    DPMSolverPPSDE(1),
    DPMSolverPPSDE(2, "heun", eta=0.5),
    DPMSolverPP2SAncestral(0.5),
    DPMSolverPPSinglestepSDE(0.5),
]


def here(cases):
    """All, or, where each is a program to compile, one."""
    return cases if EAGER else cases[-1:]


def run(solver, schedule, steps, to_zero=True):
    """A whole run, to t = 0 or to the time before, from pure noise; the noise is NumPy's, quicker than the loop's."""
    generator = np.random.default_rng(0)

    def noise():
        return ops.convert_to_tensor(generator.standard_normal((3, 2)), "float32")

    marginals = [schedule.at(t) for t in Sampler(steps=steps).times(schedule)][: None if to_zero else -1]
    *_, (x, _) = walk(solver, schedule, marginals, marginals[0].sigma * noise(), MIXTURE, noise)
    return numpy(x)


@pytest.mark.once
@pytest.mark.parametrize("solver", here(MULTISTEP), ids=repr)
def test_measured_order_of_multistep(solver):
    """Of a run that is warm; the tolerance is for 16 and 32 steps, the next doubling would halve it."""
    orders, _ = measured_order(Compiled(solver), COSINE, (16, 32), (-2.0, 2.0), warm=(0, 4, 6)[solver.order - 1])
    np.testing.assert_allclose(orders, solver.order, atol=0.2)


@pytest.mark.once
@pytest.mark.parametrize("solver", here(SINGLESTEP), ids=repr)
def test_measured_order_of_singlestep(solver):
    orders, _ = measured_order(Compiled(solver), COSINE, (8, 16), (-3.0, 3.0))
    np.testing.assert_allclose(orders, solver.order, atol=0.15)


@pytest.mark.once
@pytest.mark.parametrize(("order", "other"), [(1, DDIM()), (2, DPM2()), (3, RK4())], ids=repr)
@pytest.mark.parametrize("kind", [DPMSolverSinglestep, DPMSolverPPSinglestep])
def test_singlestep_closes_in_the_angle(kind, order, other):
    """The step to t = 0 is that of a Runge-Kutta method, whose formula is in test_solvers_classic.py."""
    marginals = [COSINE.at(np.float32(t)) for t in (0.4, 0.0)]
    x = np.random.default_rng(0).normal(size=(8, 2))
    (a, _), (b, _) = (next(walk(one, COSINE, marginals, x)) for one in (kind(order), other))
    np.testing.assert_allclose(numpy(a), numpy(b), atol=1e-5)


class _Halved(DPMSolverPP):
    """3M as the authors' code, diffusers and k-diffusion have it."""

    _curvature = 0.5


@pytest.mark.once
def test_the_third_order_of_other_libraries_is_two():
    """With half of the coefficient of u^2. The error of order 2 is small, and is seen in small steps."""
    halved, whole = (
        measured_order(solver(3, lower_final=False), COSINE, (32, 64), (-3.0, 3.0), warm=6)[0]
        for solver in (_Halved, DPMSolverPP)
    )
    assert halved < 2.5
    assert whole > 2.9


def errors_of_moments(solver, schedule, log_snrs):
    marginals = [schedule.at_log_snr(np.float32(value)) for value in log_snrs]
    found, exact = moments(Compiled(solver), schedule, marginals), exact_moments(GAUSSIAN_DATA, marginals[-1])
    return [np.abs(a - b).max() for a, b in zip(found, exact, strict=True)]


@pytest.mark.once
@pytest.mark.parametrize("solver", here(SDE), ids=repr)
def test_measured_order_of_the_covariance(solver):
    """Of a warm run that ends above t = 0. The mean is exact from the start. The tolerance is for these few steps."""
    solver = solver.clone(lower_final=False) if hasattr(solver, "lower_final") else solver
    errors = []
    for steps in (12, 24):
        mean, covariance = errors_of_moments(solver, COSINE, warmed(np.linspace(-1.5, 1.5, steps + 1), 4))
        assert mean < 1e-6
        errors.append(covariance)
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), solver.order, atol=0.3)


WHOLE = [DPMSolverSDE(), DPMSolverPPSDE(), DPMSolverPP3MSDE(), DPMSolverPP2SAncestral(), DPMSolverPPSinglestepSDE()]


@pytest.mark.once
@pytest.mark.parametrize("solver", here(WHOLE), ids=repr)
def test_moments_of_whole_runs(solver):
    """To t = 0, with the first and the last step as they are. The tolerance is for 32 steps; DDPM fails.

    SDE-DPM-Solver cannot begin at pure noise in so few steps: see its docstring.
    """
    schedule = schedules.Rectified()
    log_snrs = numpy(schedule.log_snr(np.linspace(1.0, 0.0, 33).astype("float32")))
    log_snrs = log_snrs[log_snrs > -3.0] if isinstance(solver, DPMSolverSDE) else log_snrs
    mean, covariance = errors_of_moments(solver, schedule, log_snrs)
    assert mean < 1e-5
    assert covariance < 0.05


@pytest.mark.once
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", [solver for solver in SDE if isinstance(solver, DPMSolverSDE)], ids=repr)
def test_data_that_is_one_point_is_found_from_the_middle(solver, steps):
    """SDE-DPM-Solver puts in noise of alpha_then sigma_now / alpha_now, which is too much but in small steps; the last,
    to t = 0, is without noise and may be any."""
    x = np.random.default_rng(0).normal(size=(3, 2))
    draw = ops.convert_to_tensor(np.ones((3, 2), "float32"))
    log_snrs = np.append(np.linspace(-2.0, 2.0, steps), 40.0)
    x = solve(solver, schedules.LinearBeta(), log_snrs, x, lambda x, m: 0.0 * x + 0.25, lambda: draw)
    np.testing.assert_allclose(x, 0.25, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("solver", [DPMSolver, DPMSolverPP, DPMSolverSDE, DPMSolverPPSDE], ids=lambda c: c.__name__)
def test_without_lower_final_the_last_step_is_finite(solver):
    """It extrapolates over a step to a log-SNR of 40, and is good for nothing else."""
    for order, steps in itertools.product((2, 3) if solver in (DPMSolver, DPMSolverPP) else (2,), (1, 3, 9)):
        assert np.all(np.isfinite(run(solver(order, lower_final=False), schedules.LinearBeta(), steps)))


PAIRS = [
    *((solver(1), DDIM()) for solver in (DPMSolver, DPMSolverPP, DPMSolverSinglestep, DPMSolverPPSinglestep)),
    (DPMSolverPPSDE(1), DDPM()),
    *((DPMSolverSDE(2, variant, eta=0.0), DPMSolver(2, variant)) for variant in ("midpoint", "heun")),
    *((DPMSolverPPSDE(2, variant, eta=0.0), DPMSolverPP(2, variant)) for variant in ("midpoint", "heun")),
    (DPMSolverPP2SAncestral(0.0), DPMSolverPPSinglestep(2)),
    (DPMSolverPPSinglestepSDE(0.0), DPMSolverPPSinglestep(2)),
    (DPMSolverPP(2), DPMSolverPP(3)),  # two steps leave no room for order 3
]


@pytest.mark.once
@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_limits(pair):
    """Two names of one thing, with the same noise."""
    steps = 2 if pair == (DPMSolverPP(2), DPMSolverPP(3)) else 5
    # To t = 0 ancestral solvers go by DDIM, others in the angle.
    to_zero = not isinstance(pair[0], (DPMSolverPP2SAncestral, DPMSolverPPSinglestepSDE))
    a, b = (run(solver, schedules.LinearBeta(), steps, to_zero) for solver in pair)
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert pair[0].stochastic == pair[1].stochastic


@pytest.mark.once
@pytest.mark.parametrize("solver", [*MULTISTEP, *SINGLESTEP, *SDE], ids=repr)
def test_solvers_are_their_arguments(solver):
    assert solver.clone() == solver
    assert solver.clone().order == solver.order
    assert eval(repr(solver)) == solver


@pytest.mark.once
def test_names():
    names = {"dpm_solver_pp_3m_sde": DPMSolverPP3MSDE, "dpm_solver_pp_2s_ancestral": DPMSolverPP2SAncestral}
    for name, kind in {**names, "dpm_solver_pp": DPMSolverPP, "dpm_solver_pp_sde": DPMSolverPPSDE}.items():
        assert Solver.get(name) == kind()


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolver(4), "DPMSolver: `order`.*3.*4"),
        (lambda: DPMSolverPP(0), "order"),
        (lambda: DPMSolverPP(2, "euler"), "midpoint.*heun.*euler"),
        (lambda: DPMSolverPPSDE(3), "order.*2.*3"),
        (lambda: DPMSolverSDE(eta=-1.0), "eta"),
        (lambda: DPMSolverPP2SAncestral(1.5), "eta"),
        (lambda: DPMSolverSinglestep(2, "simpson"), "simpson"),
        (lambda: DPMSolverSinglestep(2, fractions=(1.0,)), "between 0 and 1"),
        (lambda: DPMSolverSinglestep(3, fractions=(0.5,)), "2 increasing numbers"),
        (lambda: DPMSolverPPSinglestep(3, "heun", (0.6, 0.3)), "increasing"),
        (lambda: DPMSolverPPSinglestep(3, "heun", (0.3, 0.6)), "2/3"),
        (lambda: DPMSolverPP().inverse(), "DDIM"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
