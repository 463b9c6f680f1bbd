"""Networks whose dense layers keep their kernels in 8 bits: a quarter of the memory, for sampling."""

import re
from typing import Any

import keras

from kdiff.blocks.layers import Dense

__all__ = ["Quantizable"]

_MODES = ("int8", "int4")


class Quantizable:
    """The part of a network that quantizes its dense layers, and finds them so when it is loaded."""

    _quantized: dict[str, Any] | None = None

    def quantize(
        self, mode: str | None = None, config: Any = None, filters: Any = None, activations: bool = False, **options
    ) -> None:
        """Keeps the kernels of the dense layers as whole numbers: kernel = integers / scale, a scale a column.

        Biases, norms, embeddings and convolutions stay as they are. It is for sampling: the kernels are not trained any
        more. Of a `DiffusionModel` call its own `quantize`, which takes the averaged weights.

        Args:
            mode: "int8" or "int4", which has a scale for each 128 rows; None for that of the `config`.
            config: a `keras.quantizers.Int8QuantizationConfig` or `Int4QuantizationConfig`; None for Keras' default.
            filters: which layers, as in `keras.Model.quantize`; None for all dense layers.
            activations: whether what the kernels are multiplied with is quantized too, as the `config` says, a scale a
                row: less precise, and faster only where the backend has products of whole numbers.
            options: as in `keras.Model.quantize`.

        Raises:
            ValueError: for another mode; if the network is not built or is quantized already; if it has no dense layer,
                or the filters choose none.
        """
        if mode not in _MODES:  # Keras has looked into `config` by now
            raise ValueError(f"quantize: the mode must be one of {_MODES}; received: {mode!r}")
        if self._quantized is not None:
            raise ValueError(f"quantize: {self.name!r} is quantized already, to {self._quantized['mode']}")
        if not activations and config.activation_quantizer is not None:
            config = type(config)(config.weight_quantizer, activation_quantizer=None)
        layers = self._dense_layers()
        chosen = {id(layer) for layer in layers if _passes(layer, filters)}
        if not chosen:
            raise ValueError(
                f"quantize: the network {self.name!r} has {len(layers)} dense layers, of which `filters` choose none. "
                "Convolutions cannot be quantized"
            )

        def left(layer):  # one that was saved by itself is quantized when it is built
            return id(layer) in chosen and layer.quantization_mode is None

        super().quantize(mode, config=config, filters=left, **options)
        self._quantized = {
            "mode": mode,
            "config": keras.saving.serialize_keras_object(config),
            "layers": [index for index, layer in enumerate(layers) if id(layer) in chosen],
        }

    def _dense_layers(self) -> list[keras.layers.Layer]:
        return [one for one in self._flatten_layers() if type(one) in (Dense, keras.layers.Dense) and one.built]

    def get_build_config(self) -> dict[str, Any] | None:
        """Keras' own, and which layers are quantized."""
        config = super().get_build_config()
        return config if self._quantized is None else {**config, "quantized": self._quantized}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the network as it was saved, with layers that are quantized."""
        super().build_from_config({name: value for name, value in config.items() if name != "quantized"})
        quantized = config.get("quantized")
        if quantized is None or self._quantized is not None:
            return
        layers = self._dense_layers()
        chosen = {id(layers[index]) for index in quantized["layers"]}
        how = keras.saving.deserialize_keras_object(quantized["config"])
        only = {"filters": lambda layer: id(layer) in chosen, "activations": how.activation_quantizer is not None}
        self.quantize(quantized["mode"], config=how, **only)


def _passes(layer: keras.layers.Layer, filters: Any) -> bool:
    """Whether the filters of `keras.Model.quantize` choose a layer."""
    if filters is None or callable(filters):
        return filters is None or filters(layer)
    return any(re.search(one, layer.name) for one in ([filters] if isinstance(filters, str) else filters))
