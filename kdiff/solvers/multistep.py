"""Linear multistep methods, which look back: LMS, DEIS, IPNDM, PNDM. One call of the denoiser a step.

In z = x / alpha and s = sigma / alpha the probability flow of every schedule is dz / ds = d, d = noise_hat, so

    z_then = z + integral of d ds, from s to s_then.

A multistep method puts the polynomial through the last values of d, d_0 = d now, d_1, ..., in its place. All are
written

    z_then = x_hat + s_then d + sum_i c_i (d_i - d),

DDIM's step and a correction, so that nothing cancels at s_then = 0. The first steps, which have no past to look at, are
of lower order.

In Newton's form of the polynomial, in a variable in which the values lie at 0 < p_1 < p_2 < ... behind the present and
y runs ahead of it, the term of degree k is

    (-1)^(k+1) s  D_k  integral of y (y + p_1) ... (y + p_(k-1)) w(y) dy,

with D_k the divided difference of d_0 ... d_k and s w(y) dy = -ds. All of the integral's parts are positive.
"""

import math

from keras import ops

from kdiff.base import check_choice
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, History, Solver, check_order, choose, half_step
from kdiff.solvers.runge_kutta import Line, RungeKutta, ratio

# The weights of equal steps (Adams and Bashforth 1883), the newest first.
ADAMS_BASHFORTH = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


class _Multistep(Solver):
    """A linear multistep method. A new one defines `coefficients` and, as `terms`, how many values it combines."""

    terms = 1
    lower_final = False

    @property
    def least_steps(self) -> int:
        """As many as there are terms."""
        return self.terms

    def init(self, x, steps: int) -> History:
        """An empty history."""
        return History.empty(x, self.terms - 1, steps)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        line = Line.at(denoise, x, now)
        return self._look_back(line, then, state), line.estimate, state.add(line.noise_hat, now)

    def coefficients(self, order, now: Marginal, then: Marginal, log_snrs: tuple) -> list:
        """c_1, c_2, ..., scalars, for this order, a tensor, and past values at these log-SNRs."""
        raise NotImplementedError

    def _look_back(self, line: Line, then: Marginal, past: History):
        order = past.order(self.terms, self.lower_final)
        coefficients = self.coefficients(order, line.now, then, past.log_snrs)
        changes = (c * (d - line.noise_hat) for c, d in zip(coefficients, past.values, strict=True))
        return line.reach(then, then.alpha * sum(changes))


class _Newton(_Multistep):
    """A multistep method in Newton's form. A new one defines `place` and `moment`."""

    def coefficients(self, order, now: Marginal, then: Marginal, log_snrs: tuple) -> list:
        """The sum over k < order of (-1)^(k+1) s P_k w_ki, w_ki the weight of d_i in D_k."""
        moments = [self.moment(n, half_step(now, then)) for n in range(1, self.terms)]
        # A place without a value yet must not coincide with another, nor be infinite: -1, -2, ...
        places = [self.place(0.5 * (now.log_snr - log_snr)) for log_snr in log_snrs]
        places = [0.0, *(ops.where(order > i, p, -1.0 * i) for i, p in enumerate(places, start=1))]
        totals = [0.0] * (self.terms - 1)
        product = [1.0]  # (y + p_1) ... (y + p_(k-1)), the coefficient of y^0 first
        for k in range(1, self.terms):
            integral = sum(a * b for a, b in zip(product, moments, strict=False))
            term = ops.where(order > k, (-1.0) ** (k + 1) * ratio(now) * integral, 0.0)
            for i in range(1, k + 1):
                totals[i - 1] = totals[i - 1] + term / math.prod(places[i] - places[j] for j in range(k + 1) if j != i)
            product = [a + b for a, b in zip([places[k] * a for a in product] + [0.0], [0.0, *product], strict=True)]
        return totals

    def place(self, back):
        """p of a value that lies this far back in l = log_snr / 2."""
        raise NotImplementedError

    def moment(self, n: int, h):
        """The integral of y^n w(y) dy over a step of h in l."""
        raise NotImplementedError


class LMS(_Newton):
    """The linear multistep method of Adams and Bashforth (1883) for unequal steps in s = sigma / alpha; k-diffusion's
    `sample_lms`:

        z_then = z + sum_i c_i d_i,    c_i = integral of prod_(j != i) (s - s_j) / (s_i - s_j) ds, from s to s_then.

    The integral is exact (y = 1 - s' / s, w = 1).

    Args:
        order: 1 (DDIM) to 4: how many values of d are combined.

    Raises:
        ValueError: if `order` is not one of these.
    """

    def __init__(self, order: int = 4):
        check_order(self, order, 4)
        self.order = self.terms = order

    def place(self, back):
        """s_i / s - 1."""
        return ops.expm1(back)

    def moment(self, n: int, h):
        """q^(n+1) / (n+1), q = 1 - s_then / s."""
        return (-ops.expm1(-h)) ** (n + 1) / (n + 1)


class DEIS(_Newton):
    """Diffusion exponential integrator sampler (Zhang and Chen 2022, arXiv:2204.13902), with the polynomial in log s,
    as diffusers' `logrho`:

        z_then = z + sum_i c_i d_i,    c_i = integral of prod_(j != i) log(s / s_j) / log(s_i / s_j) ds.

    The integral is exact (y = log(s_now / s), w = e^-y).

    Args:
        order: 1 (DDIM) to 4: how many values of d are combined.
        lower_final: whether the order falls to 1 towards the end of the run, which is steadier with few steps.
            (diffusers does so in runs of fewer than 15 steps.)

    Raises:
        ValueError: if `order` is not one of these.
    """

    def __init__(self, order: int = 3, lower_final: bool = True):
        check_order(self, order, 4)
        self.order = self.terms = order
        self.lower_final = lower_final

    def place(self, back):
        """log(s_i / s)."""
        return back

    def moment(self, n: int, h):
        """The integral of y^n e^-y from 0 to h: the incomplete gamma function, which cancels in closed form at h < 1.

        n! (1 - e^-h sum_(k <= n) h^k / k!)  =  h^(n+1) e^-h sum_k h^k / ((n+1) ... (n+1+k)).
        """
        closed = math.factorial(n) * (1.0 - ops.exp(-h) * sum(h**k / math.factorial(k) for k in range(n + 1)))
        near = ops.minimum(h, 1.0)
        series = sum(near**k * (math.factorial(n) / math.factorial(n + 1 + k)) for k in range(10))
        return ops.where(h < 1.0, near ** (n + 1) * ops.exp(-near) * series, closed)


class IPNDM(_Multistep):
    """Improved pseudo numerical method (Zhang and Chen 2022, arXiv:2204.13902, iPNDM): Adams and Bashforth's
    weights b_i for equal steps, whatever the steps are, and lower orders at the start instead of a warm-up:

        z_then = z + (s_then - s) sum_i b_i d_i.

    Its order is 1 with one term and 2 with more: the steps of s are not equal. On a grid that is uniform in s it is
    `LMS`, and its order the number of terms.

    Args:
        terms: 1 (DDIM) to 4: how many values of d are combined.

    Raises:
        ValueError: if `terms` is not one of these.
    """

    def __init__(self, terms: int = 4):
        check_choice(type(self).__name__, "terms", terms, (1, 2, 3, 4))
        self.terms = terms
        self.order = min(terms, 2)

    def coefficients(self, order, now: Marginal, then: Marginal, log_snrs: tuple) -> list:
        """(s_then - s) b_i."""
        weights = choose(order, ADAMS_BASHFORTH[: self.terms])
        return [(ratio(then) - ratio(now)) * b for b in weights[1:]]


class PNDM(IPNDM):
    """Pseudo numerical methods for diffusion models (Liu et al. 2022, arXiv:2202.09778, algorithm 2): `IPNDM` of four
    terms after a warm-up.

    Its order is 2, as the authors find, because the steps of s are not equal.

    Args:
        warmup: the Runge-Kutta method, without churn, of the first steps, or its name. A step to t = 0 is made by
            looking back, even at the start. The authors' is `interop.grids.PseudoRungeKutta`, whose middle is in t.
        warm: how many steps it makes: 3, after which there are four values; or 1, after which the number of terms grows
            (Stable Diffusion's PLMS sampler, diffusers' `skip_prk_steps`, is `PNDM(Heun("ratio"), 1)`).

    Raises:
        ValueError: if `warmup` is no such method, or `warm` is not one of 1, 2, 3.
    """

    def __init__(self, warmup="rk4", warm: int = 3):
        check_choice("PNDM", "warm", warm, (1, 2, 3))
        super().__init__()
        self.warmup, self.warm = RungeKutta.get(warmup), warm
        if self.warmup.stochastic:
            raise ValueError(f"PNDM: `warmup` must have no churn; received: {self.warmup!r}")

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        line = Line.at(denoise, x, now)
        # `cond` runs one of the two. Where both would run, a run would cost four times what it need.
        x = ops.cond(
            ops.logical_and(state.made < self.warm, then.t > 0),
            lambda: self.warmup.go(denoise, schedule, line, then),
            lambda: self._look_back(line, then, state),
        )
        return x, line.estimate, state.add(line.noise_hat, now)
