"""When a model computes with the averages of its weights, and what moves them."""

from contextlib import nullcontext

from kdiff import backend, deprecated
from kdiff.ema import EMA, profiles_of

__all__ = ["Averaging"]


class Averaging:
    """The part of `DiffusionModel` that uses and moves the averages of its weights."""

    averages = deprecated.member("averages", "ema_weights")
    reset_averages = deprecated.member("reset_averages", "reset_ema")
    update_averages = deprecated.member("update_averages", "update_ema")

    def __dir__(self):
        """Without the old names: Keras reads every attribute that is listed here when it saves a model."""
        return [name for name in super().__dir__() if name not in ("averages", "reset_averages", "update_averages")]

    def _new_ema(self) -> EMA | None:
        profiles = profiles_of(self.ema)
        if not profiles:
            return None
        ema = EMA(*profiles)
        ema.follow(self.network)
        return ema

    def _weights(self, ema: bool):
        """The scope in which the network computes with the averaged weights, if there are and it is asked for."""
        return self.ema_weights.scope(self.network) if ema and self._averaging and self.ema_weights else nullcontext()

    def reset_ema(self) -> None:
        """Sets the averages to the weights as they are now, as after loading weights into the network.

        If the network has other weights than before, as after `enable_lora`, the averages are new ones.
        """
        if not self.ema_weights:
            return
        if self.ema_weights.fits(self.network):
            self.ema_weights.reset(self.network)
            return
        with backend.strategy_of(self), backend.replaced(self, self.ema_weights):
            self.ema_weights = self._new_ema()
        self._forget_graphs()

    @backend.uninterrupted
    def update_ema(self) -> None:
        """Moves the averages once towards the weights, as `fit` does after each step of the optimizer.

        Call it after each step of a training loop of your own:

            loss.backward(); optimizer.step(); model.update_ema()       # on PyTorch, for instance

        Averages that were never moved are not used: `sample` and `evaluate` compute with the weights themselves.
        """
        if self.ema_weights:
            backend.without_gradients(lambda: self.ema_weights.update(self.network))()
            self._use_ema(True)

    def _follow_ema(self) -> bool:
        """Whether the averages are used, which is so from the first time that they are moved."""
        self._follow_ema_of_others()
        self._use_ema(self.ema_weights is not None and self.ema_weights.moved)
        return self._averaging

    def _follow_ema_of_others(self) -> None:
        """Of the models that are part of this one, as a teacher that its objective asks."""
        for part in self._flatten_layers(include_self=False):
            if isinstance(part, Averaging):
                part._follow_ema()

    def _use_ema(self, used: bool) -> None:
        """Graphs cannot ask: they are traced with an answer, and traced again when it changes."""
        if used != self._averaging:
            self._averaging, self.test_function = used, None
