"""DDPM and DDIM: the solvers derived from the exact posterior q(x_then | x_now, x).

In both, r = SNR_now / SNR_then < 1, and 1 - r is computed as -expm1(log r), which does not cancel near t = 0.
"""

import numpy as np
from keras import ops

from kdiff.base import check_choice, check_integer, check_number
from kdiff.schedules import Marginal, NoiseSchedule, bridge
from kdiff.solvers.base import Denoise, Draw, Solver, noise_of

__all__ = ["DDIM", "DDPM", "DDIMInversion"]


class DDPM(Solver):
    """Ancestral sampling from q(x_then | x_now, x = x_hat) (Ho et al. 2020, arXiv:2006.11239, algorithm 2):

        x_then = (alpha_now sigma_then^2) / (alpha_then sigma_now^2) x_now + alpha_then (1 - r) x_hat + s noise.

    Args:
        variance: "small" is the posterior variance, s^2 = sigma_then^2 (1 - r), optimal for data at a single point;
            "large" is the variance of the forward process, s^2 = sigma_now^2 (1 - r), optimal for standard normal data
            (section 3.2); "learned" interpolates between their logarithms as predicted by the network (improved DDPM,
            arXiv:2102.09672, eq. 15), and needs the prediction `LearnedVariance`. With "large" and "learned" the step
            to t = 0 adds no noise.
    """

    stochastic = True

    def __init__(self, variance: str = "small"):
        check_choice("DDPM", "variance", variance, ("small", "large", "learned"))
        self.variance = variance
        self.learned = variance == "learned"

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One ancestral step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        kept, fresh = bridge(now, then)
        s = self._sigma(now, then, estimate.share) * ops.sqrt(fresh)
        return kept * x + then.alpha * fresh * estimate.x_hat + s * noise(), estimate, state

    def _sigma(self, now: Marginal, then: Marginal, share):
        if self.variance == "small":
            return then.sigma
        large = now.sigma
        if self.learned:
            large = then.sigma * (now.sigma / then.sigma) ** share
        return ops.where(then.t > 0, large, 0.0)


class DDIM(Solver):
    """Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16):

        x_then = alpha_then x_hat + sqrt(sigma_then^2 - s^2) noise_hat + s noise,
        noise_hat = (x_now - alpha_now x_hat) / sigma_now,    s = eta sigma_then sqrt(1 - r).

    With eta = 0 it is Euler's method, both in sigma / alpha as in EDM and in t for rectified flow; with eta = 1 it is
    DDPM with the small variance, and the ancestral Euler method.

    Args:
        eta: the amount of noise, in [0, 1]; 0 is deterministic, an ODE solver of order 1, and 1 is DDPM.
    """

    def __init__(self, eta: float = 0.0):
        check_number(type(self).__name__, "eta", eta, 0.0, 1.0)
        self.eta = eta
        self.stochastic = eta > 0

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One implicit step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        x_hat = estimate.x_hat
        noise_hat = noise_of(x, x_hat, now)
        if not self.stochastic:
            return then.alpha * x_hat + then.sigma * noise_hat, estimate, state
        _, fresh = bridge(now, then)
        kept, s = then.sigma * ops.sqrt(1.0 - self.eta**2 * fresh), self.eta * then.sigma * ops.sqrt(fresh)
        return then.alpha * x_hat + kept * noise_hat + s * noise(), estimate, state

    def inverse(self, iterations: int = 1) -> Solver:
        """`DDIMInversion(iterations)`, if eta is 0."""
        return super().inverse() if self.stochastic else DDIMInversion(iterations)


class DDIMInversion(Solver):
    """DDIM inversion, from data to noise: here `then` is noisier than `now`. The exact inverse of a DDIM step solves

        x_then = x_now + (alpha_then - alpha_now) x_hat(x_then) + (sigma_then - sigma_now) noise_hat(x_then),

    by a fixed-point iteration from x_now. One iteration uses the estimates at (x_now, t_then) (Song et al. 2021,
    section 4.3); Garibi et al. 2024, "ReNoise", arXiv:2403.14602, use several. In this form, each iteration reduces the
    error by about the number of steps, at any noise level. Eliminating x_hat by alpha_now x_hat + sigma_now noise_hat =
    x_now instead would give an iteration that stalls where alpha_then is small.

    If x_hat changes fast, the plain iteration does not converge. When the residual of a sample increases, the iteration
    therefore returns to the best x_then and halves the step size.

    Args:
        iterations: the number of calls of the network per step.
    """

    inverts = True

    def __init__(self, iterations: int = 1):
        check_integer("DDIMInversion", "iterations", iterations)
        self.iterations = iterations
        self.evaluations = iterations

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step towards noise; arguments and results as in `Solver.step`."""
        x_then, best, way, least, share = x, x, x, np.inf, 1.0
        for _ in range(self.iterations):
            estimate = denoise(x_then, then)
            noise_hat = noise_of(x_then, estimate.x_hat, then)
            missed = x + (then.alpha - now.alpha) * estimate.x_hat + (then.sigma - now.sigma) * noise_hat - x_then
            size = ops.sum(missed**2, axis=tuple(range(1, len(x.shape))), keepdims=True)
            worse = size > least
            best, way = ops.where(worse, best, x_then), ops.where(worse, way, missed)
            least, share = ops.minimum(size, least), ops.where(worse, share / 2.0, share)
            x_then = best + share * way
        return x_then, estimate, state

    def inverse(self, iterations: int = 1) -> Solver:
        """`DDIM()`."""
        return DDIM()
