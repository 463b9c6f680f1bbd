import pytest

from kdiff.sampling import dpm_fast
from kdiff.solvers import DPMSolverFast


@pytest.mark.once
@pytest.mark.parametrize(("rest", "orders"), [(0, [3, 3, 2, 1]), (1, [3, 3, 3, 1]), (2, [3, 3, 3, 2])])
def test_the_orders_of_the_paper(rest, orders):
    """Appendix D of DPM-Solver: of each step, and of runs of one step the last alone."""
    assert DPMSolverFast(rest).orders(4) == orders
    assert DPMSolverFast(rest).orders(1) == orders[-1:]
    assert DPMSolverFast(rest).order == (3 if rest == 2 else 2)


@pytest.mark.once
@pytest.mark.parametrize("evaluations", [2, 3, 4, 9, 10, 11])
def test_the_calls_are_as_many_as_said(evaluations):
    assert sum(dpm_fast(evaluations).solver.orders(evaluations // 3 + 1)) == evaluations
