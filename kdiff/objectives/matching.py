"""Distribution matching: a generator is led by the difference of two scores, that of data and that of what it makes."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
from keras import ops

from kdiff import random
from kdiff.base import check_integer, check_number
from kdiff.denoisers import leading
from kdiff.objectives.base import Problem
from kdiff.objectives.taught import Taught, check_simple, noised, rows, still
from kdiff.times import TimeGrid, TimeSampler

__all__ = ["DistributionMatching"]


class DistributionMatching(Taught):
    """DMD2, improved distribution matching distillation (Yin et al. 2024, arXiv:2405.14867, sections 4.1 to 4.4). A
    generator y = x_hat(x_now, now), now one of the `steps` times by which it is sampled, and a second model, `fake`,
    which is trained at the same time to denoise what the generator makes, in one sum of losses:

        loss  = g [|y - sg(y - d)|^2 - adversarial log D(y_t)] + loss of `fake` on sg(y) + adversarial loss of D
        d     = (fake(y_t, t) - teacher(y_t, t)) / mean |y - teacher(y_t, t)|,    y_t = alpha y + sigma noise

    d is the difference of the scores of what is made and of data, in units of x_hat (Yin et al. 2024, DMD,
    arXiv:2311.18828, eqs. 7 and 8). Each player gets the gradient of its own loss. g is 1 in every `every`-th step and
    0 in the others: the paper's two time scales, by which `fake` keeps up with the generator; the optimizer's moments
    run on in between. x_now is noised data, and pure noise for the first step of the run.

        fake = students.student(teacher, "denoising", ema=None)
        model = students.student(teacher, objectives.DistributionMatching(teacher, fake))
        model.sample(16, steps=1)

    Compile it with the loss "mse". The fake model's `times` and `weighting` are of its own loss.

    Args:
        teacher: a `DiffusionModel`, of the data.
        fake: a `DiffusionModel`, built, with the teacher's codec; not averaged.
        steps: of a run.
        grid: a `TimeGrid` or its name: the times of a run.
        times: a `TimeSampler` or its name: t.
        every: how many steps of `fake` there are to one of the generator, 5 in the paper.
        discriminator: D, a built Keras model of noisy data, `(batch, ...)`, to numbers of any shape, high where it
            looks real, such as `autoencoding.PatchDiscriminator()`; None for none. Real and made data have the same t.
        adversarial: the weight of both losses of D, which are softplus(-D) and softplus(D).
        guidance, guidance_input: as in `Taught`; they apply to the teacher, not to `fake`.
    """

    def __init__(
        self,
        teacher: Any = None,
        fake: Any = None,
        steps: int = 1,
        grid="trailing",
        times="uniform",
        every: int = 5,
        discriminator: Any = None,
        adversarial: float = 1e-3,
        guidance: Any = None,
        guidance_input: str = "timestep_cond",
    ):
        super().__init__(teacher, guidance, guidance_input)
        for argument, one in {"teacher": teacher, "fake": fake}.items():
            if not hasattr(one, "denoiser_in_step") or not one.built:
                raise TypeError(f"DistributionMatching: `{argument}` must be a built DiffusionModel; received: {one!r}")
        if fake is teacher:
            raise ValueError(
                "DistributionMatching: `fake` is trained and the teacher is not: give it a model of its own, "
                "students.student(teacher, 'denoising', ema=None)"
            )
        if not fake.trainable_variables:
            raise ValueError("DistributionMatching: `fake` is trained, but it is frozen: was it a teacher?")
        check_integer("DistributionMatching", "steps", steps)
        check_integer("DistributionMatching", "every", every)
        check_number("DistributionMatching", "adversarial", adversarial, 0.0)
        if discriminator is not None and not discriminator.built:
            raise ValueError("DistributionMatching: the discriminator has no weights yet; call its `build`")
        self.fake, self.steps, self.grid, self.times = fake, steps, TimeGrid.get(grid), TimeSampler.get(times)
        self.every, self.discriminator, self.adversarial = every, discriminator, adversarial

    @property
    def sampled_by(self) -> dict[str, Any]:
        """These steps of this grid."""
        return {"solver": "consistency", "grid": self.grid, "steps": self.steps}

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        schedule, batch = model.schedule, ops.shape(x)[0]
        table = ops.convert_to_tensor(self.grid(schedule, self.steps)[:-1].astype("float32"))
        i = ops.cast(self.steps * random.uniform(next(keys), (batch,)), "int32")
        now = schedule.sampled_at(ops.take(table, i))
        noise = random.normal(next(keys), ops.shape(x))
        start = ops.where(rows(i, x) == 0, now.like(x).sigma * noise, noised(x, noise, now))
        scale = self.scales(x, next(keys))
        told = self.told(conditions, scale)
        output = model.output(start, now, leading(told, now), training, ema=not training)
        y = model.prediction.denoise(output, start, now)
        m = schedule.at(ops.maximum(self.times(schedule, batch, next(keys)), schedule.first_time))
        fresh = random.normal(next(keys), ops.shape(x))

        def target():
            y_t = noised(y, fresh, m)
            real = self.taught(model, conditions, scale)(y_t, m)
            made = self.fake.denoiser_in_step(ema=False, schedule=schedule, **conditions)(y_t, m).x_hat
            size = ops.mean(ops.abs(y - real), axis=tuple(range(1, len(x.shape))), keepdims=True)
            return y - (made - real) / (size + 1e-6)

        turn = ops.cast(model.step.value % self.every == 0, "float32") if training else 1.0
        extra = self._error(ops.stop_gradient(y), conditions, keys, training)
        if self.discriminator is not None:
            extra = extra + self.adversarial * self._judged(x, y, fresh, m, turn, training)
        return Problem(y, still(target), turn * ops.ones_like(now.t), extra)

    def _error(self, y, conditions, keys, training):
        """The loss of the fake model on what is made, `(batch,)`."""
        own = self.fake.objective.problem(self.fake, y, conditions, keys, training)
        error = ops.mean(ops.square(own.output - own.target), axis=tuple(range(1, len(y.shape))))
        return error if own.weight is None else own.weight * error

    def _judged(self, x, y, noise, m, turn, training):
        """The losses of the generator, by a discriminator that is constant, and of the discriminator, `(batch,)`."""

        def judged(data):
            answer = ops.cast(self.discriminator(noised(data, noise, m), training=training), "float32")
            return ops.reshape(answer, (ops.shape(x)[0], -1))

        with keras.StatelessScope([(v, ops.stop_gradient(v.value)) for v in self.discriminator.variables]):
            judgement = ops.softplus(-judged(y))
        own = ops.softplus(-judged(x)) + ops.softplus(judged(ops.stop_gradient(y)))
        return ops.mean(turn * judgement + own, axis=-1)

    def check(self, model: Any) -> None:
        """Raises a ValueError as in `Taught`, and for a learned variance or a weighting."""
        super().check(model)
        check_simple("DistributionMatching", model)
        if model.weighting is not None:
            raise ValueError(
                f"DistributionMatching: it has a weight of its own; received: weighting={model.weighting!r}. That of "
                "the fake model is of its own loss"
            )
