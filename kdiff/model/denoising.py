"""The network of a `DiffusionModel` as a denoiser: its inputs, its output and its estimate of the data."""

from collections.abc import Mapping
from typing import Any

from keras import ops

from kdiff import backend, deprecated, encodings
from kdiff.conversion import moved
from kdiff.denoisers import INTERVAL, Estimate, Given
from kdiff.model.condition_inputs import optional_names
from kdiff.schedules import Marginal, NoiseSchedule

__all__ = ["Denoising"]


class Denoising:
    """The part of `DiffusionModel` that calls the network; it needs `schedule`, `prediction` and `time_label`."""

    def _inputs(self, x_t, m: Marginal, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the network."""
        label = ops.broadcast_to(self.time_label(self.schedule, m), ops.shape(x_t)[:1])
        if INTERVAL in conditions and INTERVAL not in optional_names(self.network):
            conditions = {name: value for name, value in conditions.items() if name != INTERVAL}
        return {"image": self.prediction.input_scale(m.like(x_t)) * x_t, "time": label, **conditions}

    def _checked_output(self, output, x_t):
        """The network's output, float32, after a check of its channels."""
        wanted = self.prediction.factor * x_t.shape[-1]
        if output.shape[-1] != wanted:
            raise ValueError(
                f"{self.prediction!r}: the network must return {wanted} channels (`out_channels={wanted}`), "
                f"{self.prediction.factor} per channel of the data; received: {output.shape[-1]}"
            )
        return ops.cast(output, "float32")

    @deprecated.arguments(averages="ema")
    def output(
        self, x_t: Any, m: Marginal, conditions: Mapping[str, Any], training: bool = False, ema: bool = True
    ) -> Any:
        """The network's output, float32, in the parametrisation `prediction`.

        Args:
            x_t: a noisy batch, with shape `(batch, ...)`.
            m: the marginal of `x_t`, with fields of shape `()` or `(batch,)`.
            conditions: the conditions by name, with one row per example.
            training: whether the network is called in training mode, for example with dropout.
            ema: whether to use the averaged (EMA) weights.
        """
        with self._weights(ema):
            return self._checked_output(self.network(self._inputs(x_t, m, conditions), training=training), x_t)

    def _answer(self, ema: bool, schedule: NoiseSchedule, given: Given, x_t, m: Marginal) -> Estimate:
        """The estimate of a `Denoiser` on `schedule`. It does not call `output`, to save a stack frame per call."""
        x_t, m = moved(x_t, m, schedule, self.schedule)
        with self._weights(ema), encodings.used_by((self, ema)):
            output = self.network(self._inputs(x_t, m, given.conditions), training=False)
        output = self._checked_output(output, x_t)
        return Estimate(self.prediction.denoise(output, x_t, m), self.prediction.share(output))

    @deprecated.arguments(averages="ema")
    def denoise(self, x_t: Any, m: Marginal, ema: bool = True, **conditions: Any) -> Any:
        """The network's estimate of the data, x_hat.

        Args:
            x_t: a noisy batch, with shape `(batch, ...)`.
            m: the marginal of `x_t`, `schedule.at(t)`, with fields of shape `()` or `(batch,)`.
            ema: whether to use the averaged (EMA) weights.
            **conditions: the conditions, with one row per example.

        Returns:
            x_hat, with the shape of `x_t`.

        Raises:
            TypeError: if `m` is not a marginal, for example a time.
        """
        if not isinstance(m, Marginal):
            raise TypeError(f"denoise: `m` must be a marginal, such as `model.schedule.at(t)`; received: {m!r}")
        if ema and self.ema_weights and backend.concrete(self.ema_weights.updates.value) is not None:
            self._follow_ema()  # inside a graph, the caller has already done so
        return self._answer(ema, self.schedule, Given(conditions), x_t, m).x_hat
