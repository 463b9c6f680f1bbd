"""Plot the error of solvers against the number of network evaluations, on data with a known solution.

    KERAS_BACKEND=torch python examples/solver_orders.py          # or jax, or tensorflow; under a minute

The data is a mixture of Gaussians in the plane, whose optimal denoiser is known in closed form and replaces the
network. A deterministic solver is compared with the exact probability flow from the same noise: the slope of its line
is its order. A stochastic solver is compared by the mean and covariance of 20,000 samples, whose sampling error is
about 0.01.
"""

import argparse
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
from keras import ops
from matplotlib.figure import Figure

import kdiff
from kdiff import Sampler, schedules, solvers
from kdiff.denoisers import Denoiser, Given

DATA = kdiff.analytic.GaussianMixture([[-0.8, 0.2], [0.5, -0.6], [0.4, 0.7]], [0.1, 0.04, 0.08], [1.0, 2.0, 1.5])
# Up to log-SNR 8, where the samples are within a hundredth of a standard deviation of the data.
SCHEDULE = schedules.Cosine(-8.0, 8.0)
START = ops.convert_to_numpy(kdiff.random.normal(kdiff.random.key_of(1), (64, 2)))
MANY = kdiff.random.normal(kdiff.random.key_of(0), (20000, 2))
EXACT = DATA.flow(START, SCHEDULE, 1.0, 0.0)
# These go the other way, need a consistency function, or choose the number of evaluations themselves.
OTHERS = (solvers.DDIMInversion, solvers.Consistency, solvers.LCM, solvers.TCD, solvers.Adaptive)
EVALUATIONS = (6, 9, 12, 18, 24, 36, 48, 72, 96)


def panel_of(solver) -> str:
    if solver.stochastic:
        return "Stochastic: mean and covariance"
    return "One evaluation per step" if solver.evaluations == 1 else "Several evaluations per step"


def steps_for(solver, evaluations: int) -> int:
    return max(1, round(evaluations / solver.evaluations))


@cache
def advance(solver):
    """One step of the solver, compiled once for all numbers of steps on JAX and TensorFlow."""
    return kdiff.backend.compiled(partial(Sampler(solver).advance, Denoiser.of(DATA).answer, {}, SCHEDULE))


def sample(solver, evaluations: int, x) -> np.ndarray:
    sampler = Sampler(solver, "uniform_log_snr", steps_for(solver, evaluations))
    for step in sampler.steps_from(x, sampler.times(SCHEDULE), advance(solver), SCHEDULE, Given()):
        x = step.x
    return ops.convert_to_numpy(x)


def flow_error(solver, evaluations: int) -> float:
    """Root mean square distance to the exact flow, over 64 samples."""
    return float(np.sqrt(np.mean((sample(solver, evaluations, START) - EXACT) ** 2)))


def moment_error(solver, evaluations: int) -> float:
    """The largest difference in the mean and covariance of 20,000 samples, in standard deviations and variances."""
    x = sample(solver, evaluations, MANY)
    weights = DATA.weights / DATA.weights.sum()
    mean = weights @ DATA.means
    covariance = np.einsum("k,ki,kj->ij", weights, DATA.means - mean, DATA.means - mean)
    covariance += np.eye(2) * (weights @ DATA.covariances)
    scale = np.trace(covariance) / 2
    return max(np.abs(x.mean(0) - mean).max() / scale**0.5, np.abs(np.cov(x.T) - covariance).max() / scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "solver-orders.png", help="a file, .png or .pdf")
    options = parser.parse_args()
    known = [solver() for solver in solvers.Solver.names().values() if solver.__module__.startswith("kdiff.")]
    known = [solver for solver in known if not isinstance(solver, OTHERS)]
    begun = time.monotonic()
    figure = Figure(figsize=(14, 5), layout="constrained")
    names = sorted({panel_of(solver) for solver in known})
    for panel, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for number, solver in enumerate(one for one in known if panel_of(one) == name):
            error = moment_error if solver.stochastic else flow_error
            counts = [steps_for(solver, n) * solver.evaluations for n in EVALUATIONS]
            errors = [error(solver, n) for n in EVALUATIONS]
            label = type(solver).__name__ + ("" if solver.stochastic else f", order {solver.order}")
            panel.loglog(counts, errors, marker="os^"[number // 7], markersize=4, linewidth=1, label=label)
            print(f"{name:32} {solver!r:32} " + " ".join(f"{e:8.1e}" for e in errors), flush=True)
        panel.set(
            title=name, xlabel="network evaluations", ylabel="error", ylim=None if solver.stochastic else (2e-5, 1)
        )
        panel.set_xticks([6, 12, 24, 48, 96], [6, 12, 24, 48, 96])
        panel.minorticks_off()
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    print(f"{len(known)} solvers in {time.monotonic() - begun:.0f} s: {options.out.resolve()}")


if __name__ == "__main__":
    main()
