"""Reflow: pairs of noise and the data that a model generates from it, from which a straighter flow is learned.

Liu et al. 2022, "Flow straight and fast", arXiv:2209.03003, algorithm 1:

    made = pairs(teacher, 50_000, steps=64)                    # {"encoded": x, "noise": z, **conditions}
    model = students.student(teacher, "reflow")                # 2-rectified flow, initialised by the first
    model.compile(keras.optimizers.Adam(1e-4))
    model.fit(made, epochs=20)
    model.sample(16, sampler="euler", steps=1)

`kdiff.data.save_pairs(made, folder)` writes them as a `tf.data` file, and `kdiff.data.load_pairs(folder)` reads it.
"""

from typing import Any

import numpy as np
from keras import ops

from kdiff import deprecated
from kdiff.model import DiffusionModel
from kdiff.sampling import initial_noise
from kdiff.times import Jumps

__all__ = ["pairs"]


@deprecated.arguments(averages="ema")
def pairs(model: DiffusionModel, count: int, *, batch_size: int = 256, **options: Any) -> dict[str, np.ndarray]:
    """Pairs of noise and the data that the model generates from it, for `fit` with the objective `Reflow`.

    Args:
        model: the model that generates the data, by a deterministic sampler.
        count: the number of pairs.
        batch_size: the number of pairs per batch.
        **options: as in `DiffusionModel.sample`: `sampler`, `steps`, `guidance`, `seed`, `ema` and conditions.

    Returns:
        float32 arrays {"encoded": encoded data, "noise": noise}, and the conditions, with one row per pair.

    Raises:
        ValueError: if the sampler is stochastic, or does not begin with noise and end with data; and as in `sample`.
    """
    if given := {"x", "image", "noise", "stop", "known"} & set(options):
        raise ValueError(f"pairs: it begins with noise and ends with data; received: {sorted(given)}")
    run = model._run(count, **options)
    if run.sampler.solver.stochastic or isinstance(run.sampler.grid, Jumps):
        raise ValueError(f"pairs: the sampler must be deterministic, as DDIM and Heun are; received: {run.sampler!r}")
    if not run.sampler.to_zero:
        raise ValueError(f"pairs: the sampler must end with data, to_zero=True; received: {run.sampler!r}")
    noise = ops.convert_to_numpy(initial_noise(run.shape, run.seed))  # which `run` draws too
    conditions = {name: np.array(rows) for name, rows in run.given.conditions.items()}
    return {"encoded": run.ends(model, ops.convert_to_numpy, batch_size), "noise": noise, **conditions}
