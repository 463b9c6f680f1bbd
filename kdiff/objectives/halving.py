"""Progressive distillation: a network learns to match two steps of its teacher by one."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from keras import ops

from kdiff import deprecated, random
from kdiff.base import check_integer
from kdiff.objectives.base import Problem
from kdiff.objectives.effective_weight import loss_weight
from kdiff.objectives.taught import (
    Taught,
    check_noisy_end,
    check_simple,
    condition_inputs,
    implied_output,
    joined_jumps,
    noised,
    still,
)
from kdiff.solvers.base import flow_to
from kdiff.times import TimeGrid

__all__ = ["ProgressiveDistillation"]


class ProgressiveDistillation(Taught):
    """Progressive distillation (Salimans and Ho 2022, arXiv:2202.00512, algorithm 2): each of `steps` steps matches
    two steps of a teacher that takes twice as many,

        x_mid  = DDIM(x_now, x_hat_1),    x_hat_1 = teacher(x_now, now),      now, then of the grid of `steps` steps
        x_then = DDIM(x_mid, x_hat_2),    x_hat_2 = teacher(x_mid, mid),      mid of that of 2 `steps` between them
        loss   = w(log_snr) |x_hat(x_now, now) - x_target|^2,                  DDIM(x_now, x_target) = x_then.

    The paper's weight, max(SNR, 1), is `weighting="truncated_snr"`; with None the loss is the unweighted error of the
    output, SNR + 1 for Velocity. The model's `times` are not used. `students.progressive` repeats the distillation from
    many steps to one; a model from `students.student` samples by DDIM with these steps. An input "interval" of the
    network is left out, of the student and the teacher, since the length of a step follows from its time.

        model = students.student(teacher, ProgressiveDistillation(teacher, steps=8))

    Args:
        teacher: the model that takes twice as many steps.
        steps: the number of steps of the student.
        grid: a `TimeGrid` or its name, such that every second time of its 2 `steps` steps is one of its `steps` steps.
        guidance, guidance_input: as in `Taught` (Meng et al. 2023, arXiv:2210.03142, section 3).
        teacher_told: whether a random scale is passed to the teacher too, which was distilled with it, in place of
            guiding the teacher (as above, algorithm 2).

    Raises:
        ValueError: if the grid with twice as many steps does not refine the other.
    """

    formerly = ("kdiff.objectives>Distillation",)

    @deprecated.arguments(steering="guidance_input")
    def __init__(
        self,
        teacher: Any = None,
        steps: int = 8,
        grid="trailing",
        guidance: Any = None,
        guidance_input: str = "timestep_cond",
        teacher_told: bool = False,
    ):
        if teacher is None:
            raise TypeError("ProgressiveDistillation: `teacher` must be a DiffusionModel; received: None")
        super().__init__(teacher, guidance, guidance_input)
        check_integer("ProgressiveDistillation", "steps", steps)
        self.steps, self.grid, self.teacher_told = steps, TimeGrid.get(grid), teacher_told
        if teacher_told and not (isinstance(self.guidance, tuple) and guidance_input in condition_inputs(teacher)):
            raise ValueError(
                f"ProgressiveDistillation: a teacher is told a scale that is drawn, guidance=(low, high), by an input "
                f"{guidance_input!r}; received: guidance={guidance!r}, and a network with "
                f"{sorted(condition_inputs(teacher))}"
            )

    @property
    def sampled_by(self) -> dict[str, Any]:
        """The steps on this grid."""
        return {"solver": "ddim", "grid": self.grid, "steps": self.steps}

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        schedule, batch = model.schedule, ops.shape(x)[0]
        times = ops.convert_to_tensor(self.grid(schedule, 2 * self.steps).astype("float32"))
        i = 2 * ops.cast(self.steps * random.uniform(next(keys), (batch,)), "int32")
        now, mid, then = (schedule.sampled_at(ops.take(times, i + more)) for more in range(3))
        x_t = noised(x, random.normal(next(keys), ops.shape(x)), now)
        scale = self.scales(x, next(keys))
        told = self.told(conditions, scale)
        taught = self.taught(model, told) if self.teacher_told else self.taught(model, conditions, scale)
        output = model.output(x_t, now, told, training, ema=not training)

        def target():
            first = taught(x_t, now)
            x_mid = flow_to(x_t, first, now.like(x), mid.like(x))
            x_hat = joined_jumps(first, taught(x_mid, mid), now, mid, then)
            return implied_output(model.prediction, x_hat, x_t, now)

        weight = loss_weight(schedule, model.prediction, model.weighting, model.times, now)
        return Problem(output, still(target), weight)

    def check(self, model: Any) -> None:
        """Raises a ValueError as in `Taught`, for a learned variance or a weight per log-SNR, for a prediction that
        hardly sees x_hat at t = 1, as of the noise (section 4 of the paper), or for the grid.
        """
        super().check(model)
        check_simple("ProgressiveDistillation", model)
        check_noisy_end("ProgressiveDistillation", model)
        fine, coarse = (self.grid(model.schedule, count) for count in (2 * self.steps, self.steps))
        if not np.allclose(fine[::2], coarse, atol=1e-6):
            raise ValueError(
                f"ProgressiveDistillation: on {model.schedule!r} the {self.steps} steps of {self.grid!r} are not every "
                f"second of its {2 * self.steps}: {np.round(coarse, 4)} and {np.round(fine, 4)}. Use 'trailing', or "
                "another number of steps"
            )
