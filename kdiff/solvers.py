"""Solvers: one step from a noisy x_now to a less noisy x_then.

A solver knows a denoiser, `x_hat = denoise(x, now)`, and two marginals, `now` and `then`, `then.t < now.t`. It knows
neither the network nor what it predicts, neither the schedule nor the grid. Its state is a value that the loop
carries: `state = init(x)`, then `x, state = step(denoise, x, now, then, noise, state)` once a step. `noise` is
standard normal, fresh at each step, and None where the solver is not stochastic.

In all of them r = SNR_now / SNR_then < 1, and 1 - r is written -expm1(log r), which does not cancel near t = 0.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from kdiff.base import Value, check_choice, check_number
from kdiff.schedules import Marginal, bridge

Denoise = Callable[[Any, Marginal], Any]


class Solver(Value):
    """The base of all solvers. A new one defines `step`, its `order` and whether it is `stochastic`.

    Attributes:
        order: the error of a run falls as steps^-order.
        stochastic: whether `step` uses `noise`.
    """

    order: int = 1
    stochastic: bool = False

    def init(self, x) -> Any:
        """The state before the first step: a tuple of tensors."""
        return ()

    def step(self, denoise: Denoise, x, now: Marginal, then: Marginal, noise, state):
        """One step.

        Args:
            denoise: x_hat = denoise(x, now).
            x: the noisy batch, with shape `(batch, ...)`.
            now: the marginal that `x` is at; its fields have shape `()`.
            then: the marginal to go to.
            noise: standard normal noise with the shape of `x`; None if the solver is not stochastic.
            state: what `init` or the last step returned.

        Returns:
            `(x, x_hat, state)`: the batch at `then`, the estimate of the data that led there, and the new state.
        """
        raise NotImplementedError


class DDPM(Solver):
    """Ancestral sampling (Ho et al. 2020, algorithm 2): x_then from the posterior q(x_then | x_now, x = x_hat).

        x_then = kept x_now + alpha_then (1 - r) x_hat + s noise,
        kept = (alpha_now sigma_then^2) / (alpha_then sigma_now^2).

    It may take every step of the process or, as any grid says, some of them.

    Args:
        variance: "small" is the posterior's own, s^2 = sigma_then^2 (1 - r), right if the data were one point;
            "large" is the forward process's, s^2 = sigma_now^2 (1 - r), right if the data were standard normal
            (section 3.2); no noise is then added in the step to t = 0.
        clip: clip x_hat to [-1, 1], as DDPM's code does for images.
    """

    stochastic = True

    def __init__(self, variance: str = "small", clip: bool = False):
        check_choice("DDPM", "variance", variance, ("small", "large"))
        self.variance, self.clip = variance, clip

    def step(self, denoise: Denoise, x, now: Marginal, then: Marginal, noise, state):
        """One ancestral step; arguments and results as in `Solver.step`."""
        x_hat = _clipped(denoise(x, now), self.clip)
        kept, fresh = bridge(now, then)
        sigma = then.sigma if self.variance == "small" else ops.where(then.t > 0, now.sigma, 0.0)
        return kept * x + then.alpha * fresh * x_hat + sigma * ops.sqrt(fresh) * noise, x_hat, state


class DDIM(Solver):
    """Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16):

        x_then = alpha_then x_hat + sqrt(sigma_then^2 - s^2) noise_hat + s noise,
        noise_hat = (x_now - alpha_now x_hat) / sigma_now,    s = eta sigma_then sqrt(1 - r).

    Args:
        eta: 0 is deterministic, an ODE solver of order 1; 1 is DDPM with the small variance; any number in [0, 1].
        clip: clip x_hat to [-1, 1]; noise_hat then follows the clipped x_hat.
    """

    def __init__(self, eta: float = 0.0, clip: bool = False):
        check_number("DDIM", "eta", eta, 0.0, 1.0)
        self.eta, self.clip = eta, clip
        self.stochastic = eta > 0

    def step(self, denoise: Denoise, x, now: Marginal, then: Marginal, noise, state):
        """One implicit step; arguments and results as in `Solver.step`."""
        x_hat = _clipped(denoise(x, now), self.clip)
        noise_hat = (x - now.alpha * x_hat) / now.sigma
        _, fresh = bridge(now, then)
        x = then.alpha * x_hat + then.sigma * ops.sqrt(1.0 - self.eta**2 * fresh) * noise_hat
        if self.stochastic:
            x = x + self.eta * then.sigma * ops.sqrt(fresh) * noise
        return x, x_hat, state


def _clipped(x_hat, clip: bool):
    return ops.clip(x_hat, -1.0, 1.0) if clip else x_hat
