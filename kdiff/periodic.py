"""What happens again and again while a model trains: each few epochs or steps, also in a run that goes on."""

from collections.abc import Iterator
from typing import Any

import keras

from kdiff.base import check_choice, check_integer

__all__ = ["DIGITS", "Periodic", "Skipping"]

DIGITS = {"epoch": 4, "step": 8}  # of numbers in file names, so that they sort


class Periodic(keras.callbacks.Callback):
    """The base of callbacks that do something each `every` epochs or steps. A new one defines `act`.

    Training that is resumed goes on with the numbers: a step is one of all runs, of which the optimizer counts the
    updates.

    Args:
        every: how many epochs or steps lie between two.
        unit: "epoch", or "step" for batches.

    Raises:
        ValueError: for an `every` that is no whole number of at least 1, or another unit.
    """

    def __init__(self, every: int, unit: str):
        super().__init__()
        check_integer(type(self).__name__, "every", every)
        check_choice(type(self).__name__, "unit", unit, ("epoch", "step"))
        self.every, self.unit = every, unit
        self._step: int | None = None
        self._epoch_start = 0

    def act(self, number: int) -> None:
        """It is time: so many epochs or steps were made."""
        raise NotImplementedError

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Forgets the steps of the last run."""
        self._step = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Notes how many steps there were before this epoch: in a resumed run, those that the optimizer counted."""
        skipped = 0
        if self._step is None:  # not in on_train_begin: other callbacks restore the model there
            optimizer = self.model.optimizer  # which counts updates
            self._step = int(optimizer.iterations) * (getattr(optimizer, "gradient_accumulation_steps", None) or 1)
            skipped = _skipped(self.model)
        self._epoch_start = self._step - skipped

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Acts if the unit is "step" and it is time."""
        before, self._step = self._step, max(self._step, self._epoch_start + batch + 1)
        if self.unit == "step" and self._step // self.every > before // self.every:
            self.act(self._step)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Acts if the unit is "epoch" and it is time."""
        if self.unit == "epoch" and (epoch + 1) % self.every == 0:
            self.act(epoch + 1)


class Skipping:
    """A train function that only reads the batches of a run's first steps: they were trained on before."""

    def __init__(self, model: keras.Model, steps: int):
        self.model, self.steps, self.history = model, steps, model.history
        self.train, self.done, self.logs = model.train_function, 0, {}

    def __call__(self, *arguments: Any) -> Any:
        if self.done >= self.steps or self.history is not self.model.history:  # of another run, if this was broken off
            self.model.train_function = self.train
            return self.train(*arguments)
        *state, data = arguments  # on JAX two, else one
        for _ in range(self.model.steps_per_execution if isinstance(data, Iterator) else 0):  # else it is the batches
            next(data, None)
        self.done += self.model.steps_per_execution
        return (self.logs, *state) if state else self.logs


def _skipped(model: keras.Model) -> int:
    """The steps at the begin of this run that were done before."""
    train = model.train_function
    return train.steps if isinstance(train, Skipping) and train.history is model.history else 0
