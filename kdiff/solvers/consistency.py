"""Solvers for distilled networks, which map to the data, or to the next time, in one step.

Their `denoise` is a consistency function: it returns not the posterior mean of x given x_t, but the end point of the
trajectory of the probability flow through x_t. A step maps there, and returns to `then` with fresh noise, so each step
corrects the errors of the previous one, and a single step suffices. More steps do not converge to a limit: `order` is
0. With a denoiser that was not distilled, they blur the samples in few steps.

All of these call the network by `Denoiser.jump`, which passes the target time to a network that has learned to step
between any two times (`objectives.Shortcut`, `objectives.MeanFlow`).
"""

from keras import ops

from kdiff.base import check_number
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, Solver, flow_to

__all__ = ["LCM", "TCD", "Consistency", "FlowMap", "renoised"]


def renoised(x_hat, then: Marginal, noise: Draw, s=None):
    """alpha_then x_hat + s noise, with s = sigma_then by default; without noise at t = 0."""
    s = then.sigma if s is None else s
    return then.alpha * x_hat + ops.where(then.t > 0, s, 0.0) * noise()


class Consistency(Solver):
    """Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1):

        x_hat = f(x_now),    x_then = alpha_then x_hat + sqrt(sigma_then^2 - (alpha_then epsilon)^2) noise,

    where f = `denoise` is a consistency function (see the module). The step to t = 0 adds no noise.

    Args:
        epsilon: the noise level sigma / alpha to which f maps; sigma_min = 0.002 in the paper.
    """

    order = 0
    stochastic = True

    def __init__(self, epsilon: float = 0.0):
        check_number("Consistency", "epsilon", epsilon, 0.0)
        self.epsilon = epsilon

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One jump to the data and back to `then`; arguments and results as in `Solver.step`."""
        estimate = denoise.jump(x, now, schedule.sampled_at(0.0))
        x_hat = estimate.x_hat
        # Factored, so that it is exactly 0 if sigma_then / alpha_then is epsilon.
        least = then.alpha * self.epsilon
        s = ops.sqrt(ops.maximum((then.sigma - least) * (then.sigma + least), 0.0))
        return renoised(x_hat, then, noise, s), estimate, state


class FlowMap(Solver):
    """Jumps along the probability flow, for flow map networks such as shortcut models and MeanFlow:

        x_then = (sigma_then / sigma_now) x_now + alpha_then (1 - e^{l_now - l_then}) x_hat(x_now, now, then)

    On the rectified schedule, with a network that predicts the velocity u, this is x_now - (t_now - t_then) u(x_now,
    now, then): Frans et al. 2024 (shortcut models), arXiv:2410.12557, algorithm 2; Geng et al. 2025 (MeanFlow),
    arXiv:2505.13447, eq. 12. For any other network it is DDIM, so its `order` is 1.
    """

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One jump to `then`; arguments and results as in `Solver.step`."""
        estimate = denoise.jump(x, now, then)
        return flow_to(x, estimate.x_hat, now, then), estimate, state


class LCM(Solver):
    """Latent consistency models (Luo et al. 2023, arXiv:2310.04378, section 4):

        f = c_skip x_now + c_out x_hat,          x_then = alpha_then f + sigma_then noise,
        c_skip = sigma_data^2 / (s^2 + sigma_data^2),    c_out = s / sqrt(s^2 + sigma_data^2),    s = scaling i,

    where i is the index of a discrete process of T steps, t = (i + 1) / T (T = 1000 for a continuous schedule). f is a
    consistency function (see the module) with the boundary condition f(x) = x at i = 0. The step to t = 0 adds no
    noise. The x_hat of a step is f.

    Args:
        sigma_data: the standard deviation of the data in the scalings.
        scaling: the factor on the index, large, so that c_skip is small except at i = 0.
    """

    order = 0
    stochastic = True

    def __init__(self, sigma_data: float = 0.5, scaling: float = 10.0):
        check_number("LCM", "sigma_data", sigma_data, 1e-6)
        check_number("LCM", "scaling", scaling, 0.0)
        self.sigma_data, self.scaling = sigma_data, scaling

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One jump to the data and back to `then`; arguments and results as in `Solver.step`."""
        c_skip, c_out = self.scalings(schedule, now)
        estimate = denoise.jump(x, now, schedule.sampled_at(0.0))
        x_hat = c_skip * x + c_out * estimate.x_hat
        return renoised(x_hat, then, noise), estimate._replace(x_hat=x_hat), state

    def scalings(self, schedule: NoiseSchedule, m: Marginal):
        """(c_skip, c_out) at the marginal `m`."""
        s = self.scaling * ops.maximum((schedule.num_steps or 1000) * m.t - 1.0, 0.0)
        total = s**2 + self.sigma_data**2
        return self.sigma_data**2 / total, s / ops.sqrt(total)


class TCD(Solver):
    """Strategic stochastic sampling from trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159):
    a DDIM step to the time s = (1 - gamma) t_then, followed by fresh noise up to `then`,

        x_s = (sigma_s / sigma_now) x_now + alpha_s (1 - e^{l_now - l_s}) x_hat,
        x_then = (alpha_then / alpha_s) x_s + sqrt(sigma_then^2 - (alpha_then sigma_s / alpha_s)^2) noise.

    With gamma = 0 it is `FlowMap`, or DDIM; with gamma = 1, where s = 0, it is `Consistency`, and `denoise` a
    consistency function (see the module).

    Args:
        gamma: the amount of fresh noise, in [0, 1].
    """

    order = 0

    def __init__(self, gamma: float = 0.3):
        check_number("TCD", "gamma", gamma, 0.0, 1.0)
        self.gamma = gamma
        self.stochastic = gamma > 0
        self.order = 0 if self.stochastic else 1

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step down to s and up to `then`; arguments and results as in `Solver.step`."""
        s = schedule.sampled_at((1.0 - self.gamma) * then.t) if self.stochastic else then
        estimate = denoise.jump(x, now, s)
        x_hat = estimate.x_hat
        if not self.stochastic:
            return flow_to(x, x_hat, now, then), estimate, state
        x_s = flow_to(x, x_hat, now, s)
        # sigma_then sqrt(1 - SNR_then / SNR_s), which does not cancel.
        fresh = then.sigma * ops.sqrt(-ops.expm1(then.log_snr - s.log_snr))
        return then.alpha / s.alpha * x_s + fresh * noise(), estimate, state
