"""DPM-Solver and DPM-Solver++ with noise: solvers of the reverse SDE, and second-order ancestral sampling.

Noise is added in one of two ways, with a strength eta that is 0 for the probability flow:

    SDE         The reverse SDE, whose noise has eta times the strength of that of DDPM in the limit of small steps, is
                solved with x_hat or noise_hat a polynomial in log-SNR: the sums of `solvers.dpm` with (1 + eta) h.
    ancestral   A step of the probability flow to a noise level sigma_down below that of `then`, followed by fresh noise
                sigma_up, as in DDIM and Euler ancestral (k-diffusion). In s = sigma / alpha

                    s_up = eta s_then sqrt(1 - s_then^2 / s_now^2),    s_down^2 = s_then^2 - s_up^2.

With data prediction, eta = 1 and x_hat constant over a step, both sample from the posterior of DDPM.

Sources: Lu et al. 2022, "DPM-Solver++", arXiv:2211.01095, the section on diffusion SDEs; and, for the ancestral and the
singlestep solver and for 3M, K. Crowson's k-diffusion (https://github.com/crowsonkb/k-diffusion, sampling.py), which
has no paper: the formulas are in the docstrings.
"""

from typing import Any, NamedTuple, Self

from keras import ops

from kdiff.base import check_number
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, History, Solver, above_zero, between, flow_to, half_step
from kdiff.solvers.dpm import OfData, OfNoise, _Multistep
from kdiff.times import Trailing

__all__ = [
    "DPMSolverPP2SAncestral",
    "DPMSolverPP3MSDE",
    "DPMSolverPPSDE",
    "DPMSolverPPSinglestepSDE",
    "DPMSolverSDE",
    "Down",
]


class _MultistepSDE(_Multistep):
    """A multistep solver with noise."""

    _highest = 2

    def __init__(self, order: int = 2, variant: str = "midpoint", eta: float = 1.0, lower_final: bool = True):
        super().__init__(order, variant, lower_final)
        check_number(type(self).__name__, "eta", eta, 0.0)
        self.eta = eta
        self.stochastic = eta > 0


class DPMSolverSDE(OfNoise, _MultistepSDE):
    """SDE-DPM-Solver, multistep, noise prediction (Lu et al. 2022, arXiv:2211.01095):

        x_then = (alpha_then / alpha_now) x + (1 + eta) sigma_then sum_k M_k(-h) p_k + spread noise,
        spread = sigma_then sqrt(eta (e^(2h) - 1)).

    Its noise does not vanish with sigma_then, so the step to t = 0 is made without noise. With few steps, a run from
    alpha near zero diverges from the data, so the default grid begins at a log-SNR of -6, and at least 10 steps are
    needed. On `schedules.Laplace`, whose uniform times are far apart in log-SNR at both ends, samples of 50 steps still
    have 1.2 times the spread of the data: use `times.Exponential(0.02, 20.0)` there. `DPMSolverPPSDE` has none of these
    limitations.

    Args:
        order: 1 or 2.
        variant: for order 2, "midpoint" or "heun".
        eta: the strength of the noise; 1 is that of the paper, and 0 gives `DPMSolver`.
        lower_final: whether the last step has order 1.

    Raises:
        ValueError: if `order` or `variant` is invalid, or `eta` is negative.
    """

    grid = Trailing(-6.0)


class DPMSolverPPSDE(OfData, _MultistepSDE):
    """SDE-DPM-Solver++, multistep, data prediction; order 2 is 2M SDE (Lu et al. 2022, arXiv:2211.01095):

        x_then = (sigma_then / sigma_now) e^(-eta h) x + alpha_then sum_k M_k((1 + eta) h) p_k + spread noise,
        spread = sigma_then sqrt(1 - e^(-2 eta h)).

    Args:
        order: 1 (DDPM for eta = 1) or 2.
        variant: for order 2, "midpoint" or "heun".
        eta: the strength of the noise, as in k-diffusion; 1 is that of the paper, and 0 gives `DPMSolverPP`.
        lower_final: whether the last step has order 1.

    Raises:
        ValueError: if `order` or `variant` is invalid, or `eta` is negative.
    """


class DPMSolverPP3MSDE(OfData, _MultistepSDE):
    """DPM-Solver++ 3M SDE, as in k-diffusion: `DPMSolverPPSDE` with p of degree 2, whose p_2 is halved.

    Halving it is a mistake (see `solvers.dpm`), which is kept because the name refers to this method. Despite the name
    the order is 2; the correct p_2 would make it 3 without noise, but not with noise. The step to t = 0 has order 1,
    and otherwise only the first two steps have a lower order.

    Args:
        eta: the strength of the noise; 0 is the probability flow.

    Raises:
        ValueError: if `eta` is negative.
    """

    order = 2
    _curvature = 0.5

    def __init__(self, eta: float = 1.0):
        super().__init__(2, "heun", eta)

    def _length(self) -> int:
        return 2

    def _order(self, then: Marginal, state: History):
        return ops.where(then.t > 0, state.order(3, lower_final=False), 1)


class Down(NamedTuple):
    """A step to sigma_down, on the scale of `then`: x_then = kept x + alpha_then (1 - e^-h) x_hat + spread noise.

    With a = (s_down / s_then)^2 = 1 - eta^2 (1 - e^(-2 h_0)) and h_0 = l_then - l_now,

        kept = (sigma_then / sigma_now) sqrt(a),    h = h_0 - log(a) / 2,
        spread = eta sigma_then sqrt(1 - e^(-2 h_0)).
    """

    kept: Any
    h: Any
    spread: Any
    alpha: Any

    @classmethod
    def of(cls, now: Marginal, then: Marginal, eta: float) -> Self:
        """The step given by the formulas above."""
        h = half_step(now, then)
        a = (1.0 - eta**2) + eta**2 * ops.exp(-2.0 * h)
        spread = eta * then.sigma * ops.sqrt(-ops.expm1(-2.0 * h))
        return cls(then.sigma / now.sigma * ops.sqrt(a), h - 0.5 * ops.log(a), spread, then.alpha)

    def __call__(self, x, x_hat):
        """x_then without the noise."""
        return self.kept * x - self.alpha * ops.expm1(-self.h) * x_hat


class _Ancestral(Solver):
    """A second-order singlestep solver with data prediction and ancestral noise. Its step to t = 0 is DDIM(eta), with
    one call of the denoiser.
    """

    order = 2
    evaluations = 2

    def __init__(self, eta: float = 1.0):
        check_number(type(self).__name__, "eta", eta, 0.0, 1.0)
        self.eta = eta
        self.stochastic = eta > 0


class DPMSolverPP2SAncestral(_Ancestral):
    """DPM-Solver++ 2S ancestral (k-diffusion): 2S on the probability flow to sigma_down, followed by noise,

        z = x / alpha,    s = sigma / alpha,    s_mid = sqrt(s_now s_down)
        z_then = (s_down / s_now) z + (1 - s_down / s_now) x_hat(z_mid, s_mid) + s_up noise,
        z_mid  = (s_mid / s_now) z + (1 - s_mid / s_now) x_hat(z, s_now).

    The step to t = 0 is that of DDIM(eta), with one call of the denoiser.

    Args:
        eta: the amount of noise, in [0, 1]; 0 gives `DPMSolverPPSinglestep(2)`, and 1 the noise of DDPM.

    Raises:
        ValueError: if `eta` is not in [0, 1].
    """

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        x_hat = estimate.x_hat
        down = Down.of(now, then, self.eta)
        # The midpoint of the step to sigma_down in log-SNR, which for eta = 1 is `then` itself.
        mid = schedule.at_log_snr(now.log_snr + down.h)
        x_mid = flow_to(x, x_hat, now, mid)
        x_hat = above_zero(then, lambda: denoise(x_mid, mid).x_hat, x_hat)
        x = down(x, x_hat)
        if self.stochastic:
            x = x + down.spread * noise()
        return x, estimate._replace(x_hat=x_hat), state


class DPMSolverPPSinglestepSDE(_Ancestral):
    """DPM-Solver++ SDE (k-diffusion, r = 1/2): an ancestral step to the midpoint in log-SNR, then one over the whole,

        z_mid  = (s_down / s_now) z + (1 - s_down / s_now) x_hat(z, s_now) + s_up noise_1,            `then` = mid
        z_then = (s_down / s_now) z + (1 - s_down / s_now) x_hat(z_mid, s_mid) + s_up noise_2,

    with z = x / alpha, s = sigma / alpha, s_mid = sqrt(s_now s_then). The step to t = 0 is that of DDIM(eta), with one
    call of the denoiser.

    noise_2 is not independent: it is noise_1, as propagated by the second half of the step, plus fresh noise up to
    variance 1. k-diffusion samples both from one Brownian path, which in the limit of small steps gives the same
    correlation, sqrt(1/2). With independent noises the order would be 1.

    Args:
        eta: the amount of noise, in [0, 1]; 0 gives `DPMSolverPPSinglestep(2)`, and 1 the noise of DDPM.

    Raises:
        ValueError: if `eta` is not in [0, 1].
    """

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        x_hat = estimate.x_hat
        mid = between(schedule, now, then, 0.5)
        half, whole = Down.of(now, mid, self.eta), Down.of(now, then, self.eta)
        x_mid = half(x, x_hat)
        first = half.spread * noise() if self.stochastic else 0.0
        x_hat = above_zero(then, lambda: denoise(x_mid + first, mid).x_hat, x_hat)
        x = whole(x, x_hat)
        if self.stochastic:
            carried = whole.kept / half.kept
            fresh = ops.sqrt(ops.maximum(whole.spread**2 - (carried * half.spread) ** 2, 0.0))
            x = x + carried * first + fresh * noise()
        return x, estimate._replace(x_hat=x_hat), state
