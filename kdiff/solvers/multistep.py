"""Linear multistep methods: LMS, DEIS, IPNDM, PNDM, with one call of the denoiser per step.

In z = x / alpha and s = sigma / alpha the probability flow of every schedule is dz / ds = d, d = noise_hat, so

    z_then = z + integral of d ds, from s to s_then.

A multistep method replaces d by the polynomial through its last values, d_0 = d, d_1, ... All are written as

    z_then = x_hat + s_then d + sum_i c_i (d_i - d),

the step of DDIM plus a correction, so that nothing cancels at s_then = 0. The first steps, for which there are no past
values, have a lower order.
"""

from keras import ops

from kdiff.base import check_choice
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, History, Solver, check_order, half_step
from kdiff.solvers.exponential import integrals, weights
from kdiff.solvers.runge_kutta import RungeKutta
from kdiff.solvers.stages import Line, ratio

__all__ = ["DEIS", "IPNDM", "LMS", "PNDM", "adams_bashforth"]


def adams_bashforth(places: list, count) -> list:
    """The weights of the differences of slopes, for `count` past values at these negative fractions of the step (Adams
    and Bashforth 1883): the integrals of the Lagrange polynomials from 0 to 1.
    """
    return integrals(places, [1.0 / (n + 1) for n in range(len(places) + 1)], count)


class _Multistep(Solver):
    """A linear multistep method. A new one defines `coefficients`, and `terms`, the number of values it combines."""

    terms = 1
    lower_final = False

    def init(self, x, steps: int) -> History:
        """An empty history."""
        return History.empty(x, self.terms - 1, steps)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        line = Line.at(denoise, x, now)
        return self._look_back(line, then, state), line.estimate, state.add(line.noise_hat, now)

    def coefficients(self, order, now: Marginal, then: Marginal, past: History) -> list:
        """c_1, c_2, ..., scalars, for this order (a tensor) and these past values."""
        raise NotImplementedError

    def _look_back(self, line: Line, then: Marginal, past: History):
        order = past.order(self.terms, self.lower_final)
        coefficients = self.coefficients(order, line.now, then, past)
        changes = (c * (d - line.noise_hat) for c, d in zip(coefficients, past.values, strict=True))
        return line.reach(then, then.alpha * sum(changes))


class LMS(_Multistep):
    """The linear multistep method of Adams and Bashforth (1883) with variable steps in s = sigma / alpha; `sample_lms`
    of k-diffusion:

        z_then = z + sum_i c_i d_i,    c_i = integral of prod_(j != i) (s - s_j) / (s_i - s_j) ds, from s to s_then.

    The integral is exact.

    Args:
        order: 1 (DDIM) to 4, the number of values of d that are combined.

    Raises:
        ValueError: if `order` is not one of these.
    """

    def __init__(self, order: int = 4):
        check_order(self, order, 4)
        self.order = self.terms = order

    def coefficients(self, order, now: Marginal, then: Marginal, past: History) -> list:
        """(s_then - s) w_i, with the values at (s_i - s) / (s_then - s)."""
        step = ops.expm1(-half_step(now, then))  # (s_then - s) / s
        places = [ops.expm1(0.5 * (now.log_snr - log_snr)) / step for log_snr in past.log_snrs]
        return [ratio(now) * step * w for w in adams_bashforth(places, order - 1)]


class DEIS(_Multistep):
    """Diffusion exponential integrator sampler (Zhang and Chen 2022, arXiv:2204.13902), with the polynomial in log s,
    as `logrho` in diffusers:

        z_then = z + sum_i c_i d_i,    c_i = integral of prod_(j != i) log(s / s_j) / log(s_i / s_j) ds.

    The integral is exact, that of `solvers.exponential` for the noise. `DPMSolver` is the same with M_0 / 2 for M_1.

    Args:
        order: 1 (DDIM) to 4, the number of values of d that are combined.
        lower_final: whether the order decreases to 1 towards the end of the run, which is more stable with few steps.
            (diffusers does this in runs of fewer than 15 steps.)

    Raises:
        ValueError: if `order` is not one of these.
    """

    def __init__(self, order: int = 3, lower_final: bool = True):
        check_order(self, order, 4)
        self.order = self.terms = order
        self.lower_final = lower_final

    def coefficients(self, order, now: Marginal, then: Marginal, past: History) -> list:
        """s_then w_i."""
        return [ratio(then) * w for w in weights(-half_step(now, then), past.places(now, then), order - 1)]


class IPNDM(_Multistep):
    """Improved pseudo numerical methods, iPNDM (Zhang and Chen 2022, arXiv:2204.13902): the Adams-Bashforth weights b_i
    for equal steps, on any grid, with lower orders at the start instead of a warm-up:

        z_then = z + (s_then - s) sum_i b_i d_i.

    Its order is 1 with one term and 2 with more, because the steps in s are not equal. On a grid that is uniform in s
    it is `LMS`, and its order is the number of terms.

    Args:
        terms: 1 (DDIM) to 4, the number of values of d that are combined.

    Raises:
        ValueError: if `terms` is not one of these.
    """

    def __init__(self, terms: int = 4):
        check_choice(type(self).__name__, "terms", terms, (1, 2, 3, 4))
        self.terms = terms
        self.order = min(terms, 2)

    def coefficients(self, order, now: Marginal, then: Marginal, past: History) -> list:
        """(s_then - s) b_i, with the values at -1, -2, ..."""
        places = [-1.0 * i for i in range(1, self.terms)]
        return [(ratio(then) - ratio(now)) * b for b in adams_bashforth(places, order - 1)]


class PNDM(IPNDM):
    """Pseudo numerical methods for diffusion models (Liu et al. 2022, arXiv:2202.09778, algorithm 2): `IPNDM` with four
    terms after a warm-up.

    Its order is 2, as the authors find, because the steps in s are not equal.

    Args:
        warmup: the Runge-Kutta method of the first steps, without churn, or its name. A step to t = 0 always uses the
            multistep formula. The method of the authors is `interop.solvers.PseudoRungeKutta`.
        warm: the number of warm-up steps: 3, after which there are four values; or fewer, after which the number of
            terms grows (Stable Diffusion's PLMS sampler, `skip_prk_steps` in diffusers, is `PNDM(Heun("ratio"), 1)`).

    Raises:
        ValueError: if `warmup` is not such a method, or `warm` is not one of 1, 2, 3.
    """

    branches = True

    def __init__(self, warmup="rk4", warm: int = 3):
        check_choice("PNDM", "warm", warm, (1, 2, 3))
        super().__init__()
        self.warmup, self.warm = RungeKutta.get(warmup), warm
        if self.warmup.stochastic:
            raise ValueError(f"PNDM: `warmup` must have no churn; received: {self.warmup!r}")

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        line = Line.at(denoise, x, now)
        # `cond` runs only one branch; running both would cost four times as much.
        x = ops.cond(
            ops.logical_and(state.made < self.warm, then.t > 0),
            lambda: self.warmup.go(denoise, schedule, line, then),
            lambda: self._look_back(line, then, state),
        )
        return x, line.estimate, state.add(line.noise_hat, now)
