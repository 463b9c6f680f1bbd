"""Networks whose dense layers keep their kernels in 8 bits: a quarter of the memory, for sampling."""

import re
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.blocks.layers import Dense

__all__ = ["Quantizable"]

_MODES = ("int8", "int4")
_LIMIT = 0.015  # of the error of a kernel in 8 bits: that of normal numbers is 0.004 to 0.007
_LEAST = 0.9  # of the bytes of the kernels


class Quantizable:
    """The part of a network that quantizes its dense layers, and finds them so when it is loaded."""

    _quantized: dict[str, Any] | None = None

    @backend.uninterrupted
    def quantize(
        self, mode: str | None = None, config: Any = None, filters: Any = None, activations: bool = False, **options
    ) -> None:
        """Keeps the kernels of the dense layers as whole numbers: kernel = integers / scale, a scale a column.

        Biases, norms, embeddings and convolutions stay as they are. It is for sampling: the kernels are not trained any
        more. Of a `DiffusionModel` call its own `quantize`, which takes the averaged weights.

        In 8 bits, a kernel whose error, |integers / scale - kernel| / |kernel| in the Frobenius norm, is above 1.5 %
        stays in floating point, with a warning; it is where a few numbers are many times as large as the others of
        their column. With smaller errors the outputs of the networks in the tests change by less than 5 % in norm. The
        error of 4 bits, about 10 %, has no limit.

        Args:
            mode: "int8" or "int4", which has a scale for each 128 rows; None for that of the `config`.
            config: a `keras.quantizers.Int8QuantizationConfig` or `Int4QuantizationConfig`; None for Keras' default.
            filters: which layers, as in `keras.Model.quantize`; None for all dense layers.
            activations: whether what the kernels are multiplied with is quantized too, as the `config` says, a scale a
                row: less precise, and faster only where the backend has products of whole numbers.
            options: as in `keras.Model.quantize`.

        Raises:
            ValueError: for another mode; if the network is not built or is quantized already; if it has no dense layer,
                or the filters choose none; in 8 bits, if one of the layers computes in float16, or if less than 90 % of
                the bytes of their kernels have an error below the limit.
        """
        if mode not in _MODES:  # Keras has looked into `config` by now
            raise ValueError(f"quantize: the mode must be one of {_MODES}; received: {mode!r}")
        if self._quantized is not None:
            raise ValueError(f"quantize: {self.name!r} is quantized already, to {self._quantized['mode']}")
        if not activations and config.activation_quantizer is not None:
            config = type(config)(config.weight_quantizer, activation_quantizer=None)
        layers = self._dense_layers()
        chosen = [layer for layer in layers if _passes(layer, filters)]
        if not chosen:
            raise ValueError(
                f"quantize: the network {self.name!r} has {len(layers)} dense layers, of which `filters` choose none. "
                "Convolutions cannot be quantized"
            )
        if mode == "int8":
            chosen = _fit_for_8_bits(chosen, config)
        self._quantize_layers(mode, config, chosen, **options)

    def _check_quantize_args(self, mode, compute_dtype):
        """As Keras, which for float16 would advise float16; `quantize` looks at the precision of each layer."""
        super()._check_quantize_args(mode, None)

    def _quantize_layers(self, mode, config, chosen, **options):
        identities = {id(layer) for layer in chosen}

        def left(layer):  # one that was saved by itself is quantized when it is built
            return id(layer) in identities and layer.quantization_mode is None

        super().quantize(mode, config=config, filters=left, **options)
        self._quantized = {
            "mode": mode,
            "config": keras.saving.serialize_keras_object(config),
            "layers": [index for index, layer in enumerate(self._dense_layers()) if id(layer) in identities],
        }

    def _dense_layers(self) -> list[keras.layers.Layer]:
        return [one for one in self._flatten_layers() if type(one) in (Dense, keras.layers.Dense) and one.built]

    def _low_rank_layers(self) -> list[keras.layers.Layer]:
        return [one for one in self._flatten_layers() if hasattr(one, "disable_lora") and one.built]

    def get_build_config(self) -> dict[str, Any] | None:
        """Keras' own, and, of a quantized network, which layers are quantized and which have LoRA.

        Into kernels that are not quantized, A and B can be merged when they are loaded.
        """
        config = super().get_build_config()
        if self._quantized is None:
            return config
        layers = enumerate(self._low_rank_layers())
        changed = [[index, layer.lora_rank, layer.lora_alpha] for index, layer in layers if layer.lora_enabled]
        return {**config, "quantized": {**self._quantized, "lora": changed}}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds the network as it was saved, with layers that are quantized."""
        super().build_from_config({name: value for name, value in config.items() if name != "quantized"})
        quantized = config.get("quantized")
        if quantized is None or self._quantized is not None:
            return
        layers, low_rank = self._dense_layers(), self._low_rank_layers()
        how = keras.saving.deserialize_keras_object(quantized["config"])
        self._quantize_layers(quantized["mode"], how, [layers[index] for index in quantized["layers"]])
        for index, rank, alpha in quantized.get("lora", ()):
            low_rank[index].enable_lora(rank, alpha)


def _fit_for_8_bits(layers: list, config: Any) -> list:
    """The layers whose kernels have a small error in 8 bits."""
    if half := [layer.name for layer in layers if layer.compute_dtype == "float16"]:
        raise ValueError(
            f"quantize: layers that compute in float16 cannot have kernels of 8 bits, {len(half)} of {len(layers)} "
            f"here; make the network in 'mixed_bfloat16' or 'float32', and load its weights"
        )
    sizes = [int(np.prod(layer._kernel.shape)) for layer in layers]
    fit = [layer.quantization_mode is not None or _error(layer._kernel, config) <= _LIMIT for layer in layers]
    share = sum(size for size, one in zip(sizes, fit, strict=True) if one) / sum(sizes)
    said = (
        f"quantize: 8 bits change the kernels of {fit.count(False)} of {len(fit)} dense layers by more than "
        f"{_LIMIT:.1%} of their norm, for they hold numbers that are much larger than most"
    )
    if share < _LEAST:
        raise ValueError(
            f"{said}. Without them {share:.0%} of the bytes would be quantized, less than {_LEAST:.0%}: choose layers "
            "by `filters`, or keep the network as it is"
        )
    if not all(fit):
        warnings.warn(f"{said}; they stay in floating point", stacklevel=5)
    return [layer for layer, one in zip(layers, fit, strict=True) if one]


def _error(kernel: keras.Variable, config: Any) -> float:
    """|de-quantized - kernel| / |kernel| in the Frobenius norm; 0 for a kernel of zeros."""
    quantizer = config.weight_quantizer or keras.quantizers.AbsMaxQuantizer(axis=0)
    integers, scale = (ops.convert_to_numpy(one).astype("float32") for one in quantizer(kernel, to_numpy=True))
    kernel = ops.convert_to_numpy(kernel).astype("float32")
    norm = np.linalg.norm(kernel)
    return float(np.linalg.norm(integers / scale - kernel) / norm) if norm else 0.0


def _passes(layer: keras.layers.Layer, filters: Any) -> bool:
    """Whether the filters of `keras.Model.quantize` choose a layer."""
    if filters is None or callable(filters):
        return filters is None or filters(layer)
    return any(re.search(one, layer.name) for one in ([filters] if isinstance(filters, str) else filters))
