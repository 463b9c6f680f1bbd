"""The averaged (EMA) weights of a model: when they are used and when they are updated."""

from contextlib import nullcontext
from typing import Any

from kdiff import backend, deprecated
from kdiff.ema import EMA, profiles_of

__all__ = ["Averaging"]


class Averaging:
    """The part of `DiffusionModel` that uses and updates its averaged weights."""

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

    @property
    def _averaging(self) -> bool:
        """Whether the averages are used: see `_follow_ema`."""
        return self.ema_weights is not None and self.ema_weights.used

    def _weights(self, ema: bool):
        """A scope in which the network uses the averaged weights, if `ema` is true and there are any."""
        return self.ema_weights.scope(self.network) if ema and self._averaging else nullcontext()

    def reset_ema(self) -> None:
        """Resets the averages to the current weights, for example after loading weights into the network.

        If the network has other weights than before, as after `kdiff.lora.enable`, new averages are created.
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
    def quantize(self, mode: str | None = None, config: Any = None, filters: Any = None, **options: Any) -> None:
        """Quantizes the network, by its averaged weights if there are: less memory, for `sample`; see `Network`.

        The model then has no averages, and no optimizer: what has trained it, save before. Arguments and errors as in
        `networks.Network.quantize`.
        """
        averaged = self._follow_ema()
        try:
            if averaged:
                self.ema_weights.exchange(self.network)
            self.network.quantize(mode, config=config, filters=filters, **options)
        except Exception:
            if averaged:
                self.ema_weights.exchange(self.network)
            raise
        if self.ema_weights:
            with backend.replaced(self, self.ema_weights):
                self.ema_weights = None
        self.ema, self.optimizer, self.compiled = None, None, False
        self._forget_graphs()

    @backend.uninterrupted
    def update_ema(self) -> None:
        """Updates the averages once, as `fit` does after each step of the optimizer.

        Call it after each step of a custom training loop:

            loss.backward(); optimizer.step(); model.update_ema()       # for example on PyTorch

        Before the first update the averages are not used: `sample` and `evaluate` use the weights themselves.
        """
        if self.ema_weights:
            backend.without_gradients(lambda: self.ema_weights.update(self.network))()
            self._use_ema(True)

    def _follow_ema(self) -> bool:
        """Whether the averages are used, which is the case from their first update."""
        self._follow_ema_of_others()
        self._use_ema(self.ema_weights is not None and self.ema_weights.moved)
        return self._averaging

    def _follow_ema_of_others(self) -> None:
        """The same for the models that are parts of this one, such as the teacher of its objective."""
        for part in self._flatten_layers(include_self=False):
            if isinstance(part, Averaging):
                part._follow_ema()

    def _use_ema(self, used: bool) -> None:
        """Graphs are traced for one of the two cases, and traced again when it changes."""
        if self.ema_weights is not None and used != self._averaging:
            self.ema_weights.used, self.test_function = used, None
