"""Latent consistency models: a guided discrete diffusion model, distilled to a consistency model."""

from collections.abc import Iterator, Mapping
from typing import Any

from keras import ops

from kdiff import deprecated, random, solvers
from kdiff.base import check_integer
from kdiff.denoisers import leading
from kdiff.objectives.base import Problem
from kdiff.objectives.taught import Taught, check_simple, noised, rows, still
from kdiff.solvers.base import flow_to
from kdiff.times import Distilled

__all__ = ["LCM"]


class LCM(Taught):
    """Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378, algorithm 1), for a process of T steps:

        x_r  = DDIM(x_t, guided x_hat of the teacher),    t = (i + 1) / steps,  r = max(i / steps, 1 / T)
        loss = d(f(x_t, t), f^-(x_r, r)),                 i = 0 ... steps - 1
        f    = c_skip x_t + c_out x_hat,                  of `solvers.LCM`, by which it is sampled

    where f^-, a constant, uses the averaged weights (with the paper's decay, `ema=0.95`) and d is the loss, "mse" or
    `losses.PseudoHuber(0.001, whole=False)`. A randomly drawn guidance scale is passed to the network as the input
    `guidance_input`, as in `blocks.GuidanceEmbedding`, which published latent consistency models have. If 1 is no
    guidance, the paper draws it from 6 to 16:

        model = students.student(teacher, LCM(teacher, guidance=(6.0, 16.0)), network=..., ema=0.95)
        model.sample(4, text="a red hat", timestep_cond=8.0)          # at times that it has learned: times.Distilled

    With `lora.enable(model, rank=64)` before `compile`, a LoRA is trained (LCM-LoRA, Luo et al. 2023,
    arXiv:2311.05556), without this input and with a fixed number as `guidance`. For r = 1 / T, c_skip is 1, and f^- is
    x_r itself.

    Args:
        teacher: a `DiffusionModel` on a discrete schedule.
        steps: the number of steps of the teacher's solver, 50 of 1000 in the paper; it must divide T.
        guidance, guidance_input: as in `Taught`.
        solver: the `solvers.LCM` whose scalings are used.
    """

    @deprecated.arguments(steering="guidance_input")
    def __init__(
        self,
        teacher: Any = None,
        steps: int = 50,
        guidance: Any = None,
        guidance_input: str = "timestep_cond",
        solver: Any = "lcm",
    ):
        if teacher is None:
            raise TypeError("LCM: `teacher` must be a DiffusionModel; received: None")
        super().__init__(teacher, guidance, guidance_input)
        check_integer("LCM", "steps", steps)
        self.steps, self.solver = steps, solvers.Solver.get(solver)
        if not isinstance(self.solver, solvers.LCM):
            raise ValueError(f"LCM: `solver` must be solvers.LCM(), whose scalings are learned; received: {solver!r}")

    @property
    def sampled_by(self) -> dict[str, Any]:
        """Four of its times."""
        return {"solver": "lcm", "grid": Distilled(self.steps), "steps": min(4, self.steps)}

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        schedule, batch = model.schedule, ops.shape(x)[0]
        i = ops.floor(self.steps * random.uniform(next(keys), (batch,)))
        now, then = (schedule.at(ops.maximum((i + more) / self.steps, schedule.first_time)) for more in (1.0, 0.0))
        x_t = noised(x, random.normal(next(keys), ops.shape(x)), now)
        scale = self.scales(x, next(keys))
        told = self.told(conditions, scale)

        def f(at, m, training, ema):
            x_hat = model.prediction.denoise(model.output(at, m, leading(told, m), training, ema), at, m)
            c_skip, c_out = (rows(value, at) for value in self.solver.scalings(schedule, m))
            return c_skip * at + c_out * x_hat

        def target():
            x_r = flow_to(x_t, self.taught(model, conditions, scale)(x_t, now), now.like(x), then.like(x))
            return f(x_r, then, False, True)

        weight = None if model.weighting is None else model.weighting(now.log_snr)
        return Problem(f(x_t, now, training, not training), still(target), weight)

    def check(self, model: Any) -> None:
        """Raises a ValueError for a continuous schedule, or one whose number of steps is not a multiple of `steps`."""
        super().check(model)
        check_simple("LCM", model)
        if model.schedule.num_steps is None or model.schedule.num_steps % self.steps:
            raise ValueError(
                f"LCM: the schedule must be discrete, with a multiple of {self.steps} steps, as ScaledLinearBeta(); "
                f"received: {model.schedule!r}. On a continuous schedule use Consistency"
            )
