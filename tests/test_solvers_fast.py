import numpy as np
import pytest
from keras import ops

from kdiff.denoisers import Denoiser
from kdiff.sampling import dpm_fast
from kdiff.schedules import Cosine
from kdiff.solvers import DPMSolverFast
from tests.toys import exact_denoiser


@pytest.mark.once
@pytest.mark.parametrize(("rest", "orders"), [(0, [3, 3, 2, 1]), (1, [3, 3, 3, 1]), (2, [3, 3, 3, 2])])
def test_the_orders_of_the_paper(rest, orders):
    """Appendix D of DPM-Solver: of each step, and of runs of one step the last alone."""
    assert DPMSolverFast(rest).orders(4) == orders
    assert DPMSolverFast(rest).orders(1) == orders[-1:]
    assert DPMSolverFast(rest).order == (3 if rest == 2 else 2)


@pytest.mark.once  # PyTorch runs one branch of a condition; compiled code traces all
@pytest.mark.parametrize("evaluations", [2, 3, 4, 9, 10, 11])
def test_the_calls_are_as_many_as_said(evaluations):
    solver, steps = dpm_fast(evaluations).solver, evaluations // 3 + 1
    calls = []

    def denoise(x, m):
        calls.append(m)
        return exact_denoiser()(x, m)

    x, state = ops.ones((2, 2)), solver.init(None, steps)
    marginals = [Cosine().at_log_snr(np.float32(value)) for value in np.linspace(-3, 3, steps + 1)]
    for i, order in enumerate(solver.orders(steps)):
        before = len(calls)
        now, then = marginals[i : i + 2]
        x, _, state = solver.step(Denoiser.of(denoise), Cosine(), x, now, then, None, state)
        assert len(calls) - before == order
    assert len(calls) == evaluations
