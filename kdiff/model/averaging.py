"""When a model computes with the averages of its weights, and what moves them."""

from contextlib import nullcontext

from kdiff import backend
from kdiff.averages import Averages, profiles_of

__all__ = ["Averaging"]


class Averaging:
    """The part of `DiffusionModel` that uses and moves the averages of its weights."""

    def _new_averages(self) -> Averages | None:
        profiles = profiles_of(self.ema)
        if not profiles:
            return None
        averages = Averages(*profiles)
        averages.follow(self.network)
        return averages

    def _weights(self, averages: bool):
        """The scope in which the network computes with the averaged weights, if there are and it is asked for."""
        return self.averages.scope(self.network) if averages and self._averaging and self.averages else nullcontext()

    def reset_averages(self) -> None:
        """Sets the averages to the weights as they are now, as after loading weights into the network.

        If the network has other weights than before, as after `enable_lora`, the averages are new ones.
        """
        if not self.averages:
            return
        if self.averages.fits(self.network):
            self.averages.reset(self.network)
            return
        with backend.strategy_of(self), backend.replaced(self, self.averages):
            self.averages = self._new_averages()
        self._forget_graphs()

    @backend.uninterrupted
    def update_averages(self) -> None:
        """Moves the averages once towards the weights, as `fit` does after each step of the optimizer.

        Call it after each step of a training loop of your own:

            loss.backward(); optimizer.step(); model.update_averages()       # on PyTorch, for instance

        Averages that were never moved are not used: `sample` and `evaluate` compute with the weights themselves.
        """
        if self.averages:
            backend.without_gradients(lambda: self.averages.update(self.network))()
            self._use_averages(True)

    def _follow_averages(self) -> bool:
        """Whether the averages are used, which is so from the first time that they are moved."""
        self._follow_averages_of_others()
        self._use_averages(self.averages is not None and self.averages.moved)
        return self._averaging

    def _follow_averages_of_others(self) -> None:
        """Of the models that are part of this one, as a teacher that its objective asks."""
        for part in self._flatten_layers(include_self=False):
            if isinstance(part, Averaging):
                part._follow_averages()

    def _use_averages(self, used: bool) -> None:
        """Graphs cannot ask: they are traced with an answer, and traced again when it changes."""
        if used != self._averaging:
            self._averaging, self.test_function = used, None
