"""Sampling of score-based models as in diffusers: predictor-corrector (variance exploding), and variance preserving."""

import numpy as np
from keras import ops

from kdiff.base import check_integer, check_number
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers import Denoise, Draw, Solver
from kdiff.solvers.base import noise_of
from kdiff.times import TimeGrid

__all__ = ["DownTo", "EulerMaruyama", "PredictorCorrector", "norm"]


class DownTo(TimeGrid):
    """Equally spaced times from 1 to a last one above 0, then 0.

    Args:
        last: the last time above 0.
    """

    named = False

    def __init__(self, last: float = 1e-5):
        check_number("DownTo", "last", last, 0, 1)
        self.last = last

    def __call__(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """(steps + 1,) times."""
        return np.append(np.linspace(1.0, self.last, steps), 0.0)


class PredictorCorrector(Solver):
    """A step of the reverse SDE after steps of Langevin dynamics (Song et al. 2021, arXiv:2011.13456, algorithms 2
    and 4), with the score g = (x_hat - x) / sigma^2:

        corrector    x + 2 r g + 2 sqrt(r) z,                          r = (snr |z| / |g|)^2, from means over the batch
        predictor    x + (s^2 - s'^2) g + sqrt(s^2 - s'^2) z,          without z in the last step

    where s and s' (0 in the last step) are the current and next sigma on a grid from 1 to 0: on `DownTo(epsilon)`,
    where the network in diffusers receives a slightly higher noise level.

    Args:
        snr: the signal-to-noise ratio of each corrector step.
        corrections: the number of corrector steps.
        epsilon: the last time of the grid above 0.
    """

    named = False
    order = 1
    stochastic = True

    def __init__(self, snr: float = 0.15, corrections: int = 1, epsilon: float = 1e-5):
        check_number("PredictorCorrector", "snr", snr, 0)
        check_integer("PredictorCorrector", "corrections", corrections, 0)
        check_number("PredictorCorrector", "epsilon", epsilon, 0, 1)
        self.snr, self.corrections, self.epsilon = snr, corrections, epsilon
        self.evaluations = 1 + corrections

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """The corrections, then the prediction; arguments and results as in `Solver.step`."""
        for _ in range(self.corrections):
            g, z = self._score(denoise(x, now).x_hat, x, now), noise()
            r = ops.square(self.snr * norm(z) / norm(g))
            x = x + 2.0 * r * g + 2.0 * ops.sqrt(r) * z
        estimate = denoise(x, now)
        s, s_then = self._sigma(schedule, now), ops.where(then.t > 0, self._sigma(schedule, then), 0.0)
        step = (s - s_then) * (s + s_then)
        x = x + step * self._score(estimate.x_hat, x, now)
        return x + ops.where(then.t > 0, ops.sqrt(step), 0.0) * noise(), estimate, state

    @staticmethod
    def _score(x_hat, x, m):
        return (x_hat - x) / ops.square(m.sigma)

    def _sigma(self, schedule, m):
        t = ops.maximum((m.t - self.epsilon) / (1.0 - self.epsilon), 0.0)
        return schedule.at(t).sigma


class EulerMaruyama(Solver):
    """A step of the reverse variance preserving SDE (Song et al. 2021, arXiv:2011.13456, algorithm 3), with the
    score g = -noise_hat / sigma:

        x + beta / N (x / 2 + g) + sqrt(beta / N) z,    without z in the last step.

    As in diffusers, each step has length 1 / N, with N the number of steps of the run, whatever the grid.
    """

    named = False
    order = 1
    stochastic = True

    def init(self, x, steps: int):
        """1 / N."""
        return ops.convert_to_tensor(np.float32(1.0 / steps))

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        beta = -schedule.slope(now.t) * ops.square(now.sigma) * state
        x = x + beta * (0.5 * x - noise_of(x, estimate.x_hat, now) / now.sigma)
        return x + ops.where(then.t > 0, ops.sqrt(beta), 0.0) * noise(), estimate, state


def norm(x):
    """The mean norm over the batch."""
    return ops.mean(ops.sqrt(ops.sum(ops.square(x), axis=tuple(range(1, len(x.shape))))))
