"""ControlNet: a copy of a U-Net's encoder sees a picture, such as edges, and adds to the skip connections of the U-Net.

    control = ControlNet.of(network)                              # initialised from its weights; no effect initially
    controlled = Controlled(network, {"edges": control})          # the network is frozen, `control` is trained
    model = DiffusionModel(controlled, prediction="noise")
    model.fit({"image": images, "text": captions, "edges": edges})
    model.sample(4, text="a red hat", edges=drawing, edges_scale=0.8)

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models" (2023), section 3, as in diffusers:

    x = stem(x_t) + hint(picture),    y_1 ... y_n, y = encoder(x), middle(y_n)
    skip_i + scale zero_i(y_i),    middle + scale zero(y),    each zero a 1x1 convolution initialised to zero
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import (
    Block,
    ConfigurableLayer,
    Tokens,
    build_layer,
    copy_layer,
    get_layer,
    kernel_initializer,
    over_positions,
)
from kdiff.blocks.conditions import Encoded, Input
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.resampling import Downsample
from kdiff.networks.base import joined
from kdiff.networks.levels import Level
from kdiff.networks.unet import UNet, UNetEncoder

__all__ = ["GIVEN", "ControlNet", "Controlled", "Hint"]


class Hint(Block):
    """Convolutions from a picture to the size and width of the output of a U-Net's stem.

    Zhang et al. (2023), section 3.2, with the widths and activations of diffusers. The last convolution is initialised
    to zero.

    Args:
        widths: of the convolutions; each but the first halves the size. Use (8,) for pixel models; the default is for
            latents that are smaller than images by a factor of 8.
        width: of the output; set by the `ControlNet`.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 96, 256), width: int | None = None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        for one in widths:
            check_integer("Hint", "widths", one)
        if not widths or width is not None:
            check_integer("Hint", "width", width)
        self.widths = tuple(widths)
        self.width = width
        options = {"padding": "same", "dtype": self.dtype_policy}
        plain = {"kernel_initializer": kernel_initializer(), **options}
        self.layers = [Conv2D(self.widths[0], 3, name="first", **plain)]
        for i, (before, after) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            self.layers.append(Conv2D(before, 3, name=f"convolution_{i}", **plain))
            halved = {"padding": "symmetric", "dtype": self.dtype_policy, "name": f"downsample_{i}"}
            self.layers.append(Downsample(width=after, **halved))
        self.last = Conv2D(width or self.widths[-1], 3, kernel_initializer="zeros", name="last", **options)

    @property
    def factor(self) -> int:
        """The ratio of the size of the picture to that of the output."""
        return 2 ** (len(self.widths) - 1)

    def build(self, x_shape):
        """Builds the layers."""
        for layer in (*self.layers, self.last):
            x_shape = build_layer(layer, x_shape)

    def call(self, x, embed=None, context=None, training=None):
        """Maps pictures, integers in 0 ... 255 or floats in [-1, 1], to (batch, height / factor, ..., width)."""
        whole = "int" in str(x.dtype)
        x = ops.cast(x, "float32")
        x = ops.cast(x / 255.0 if whole else 0.5 * (x + 1.0), self.compute_dtype)
        for layer in self.layers:
            x = ops.silu(layer(x))
        return self.last(x)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, height / factor, ..., width)."""
        sizes = [None if size is None else size // self.factor for size in x_shape[1:-1]]
        return (x_shape[0], *sizes, self.last.filters)

    def check(self, values) -> None:
        """Raises a ValueError if the values are out of range."""
        low, high = float(np.min(values)), float(np.max(values))
        whole = np.issubdtype(values.dtype, np.integer)
        if (low < 0 or high > 255) if whole else max(-low, high) > 1.001:
            raise ValueError(
                "ControlNet: a picture must be integers in 0..255, or floats in [-1, 1], where black is -1; "
                f"received {low:.4g} to {high:.4g}"
            )


class ControlNet(UNetEncoder):
    """The encoder and middle of a U-Net, with a picture as additional input; its outputs are added to those of a U-Net.

        control({"image": x_t, "time": ..., "hint": picture, "tokens": context, ...}) -> [map, ..., map]

    It returns one map for each skip connection of a U-Net of these levels, in the order of the encoder, and one for the
    output of the middle, all initially zero. `Controlled` combines the two networks. Conditions for which the control
    has no layer are passed as the U-Net encoded them: "tokens" (batch, tokens, dim), their "mask" (batch, tokens), and
    "vector" (batch, dim), which is added to `embed`; all three are optional.

    Args:
        levels, middle, embedding, remat, seed, stem_width: as in `UNet`.
        conditions: a layer for each condition that the control encodes itself.
        hint: the layer from the picture to the size of x_t, with an argument `width`, which is set.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: as in `UNet`; if the ratio of the sizes of picture and x_t is not the factor of `hint`.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        middle: Level | None = None,
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        hint: Any = "hint",
        remat: bool = False,
        seed: int = 0,
        stem_width: int | None = None,
        **kwargs,
    ):
        super().__init__(levels, middle, embedding, conditions, stem_width, remat=remat, seed=seed, **kwargs)
        options = {"name": "hint", "dtype": self.dtype_policy}
        self.hint = copy_layer(get_layer(hint), width=self.stem.filters, **options)

    @property
    def condition_inputs(self) -> dict[str, Input]:
        """The picture, the encoded conditions of the U-Net, and the inputs of the control's own conditions."""
        given = {name: Input(None, None, optional=True) for name in GIVEN}
        return {**super().condition_inputs, "hint": Input(None, self.hint), **given}

    def _checked(self, shapes):
        factor = getattr(self.hint, "factor", 1)
        given = super()._checked(shapes)
        small, large = given["image"][1:-1], given["hint"][1:-1]
        pairs = zip(small, large, strict=True) if len(small) == len(large) else [(1, 0)]
        if any(None not in pair and factor * pair[0] != pair[1] for pair in pairs):
            raise ValueError(
                f"{self.name}: a picture must be {factor} times the size of x_t, {tuple(small)}; received: "
                f"{tuple(large)}"
            )
        return given

    def build(self, input_shape):
        """Builds every layer, from the shapes of the inputs by name."""
        shapes = self._checked({name: tuple(shape) for name, shape in input_shape.items()})
        time, encoded = self.encoded_shapes(shapes)
        given = [Encoded(tokens=shapes["tokens"])] if shapes.get("tokens") else []
        embed, context = self._steering_shapes(time, {**encoded, "given": given[0]} if given else encoded)
        x, kept = self._build_down(shapes["image"], embed, context)
        build_layer(self.hint, shapes["hint"])
        initial = {"kernel_initializer": "zeros", "dtype": self.dtype_policy}
        self.outlets = [Conv2D(y[-1], 1, name=f"outlet_{i}", **initial) for i, y in enumerate((*kept, x))]
        for layer, y in zip(self.outlets, (*kept, x), strict=True):
            layer.build(y)

    def call(self, inputs, training=None):
        """Maps the dictionary of inputs (see the class) to a list of maps in the compute precision."""
        time, encoded = self.encoded(inputs, training)
        tokens = inputs.get("tokens")
        given = [] if tokens is None else [Encoded(tokens=tokens, mask=inputs.get("mask"))]
        vector = Encoded(vector=inputs.get("vector"))
        embed, context = self._steering(time, [vector, *given, *encoded.values()])
        x = self.stem(ops.cast(inputs["image"], self.compute_dtype))
        x = x + ops.cast(self.hint(inputs["hint"]), x.dtype)
        x, kept = self._run_down(x, embed, context, training)
        return [layer(y) for layer, y in zip(self.outlets, (*kept, x), strict=True)]

    def compute_output_spec(self, inputs, training=None):
        """Not supported; see `Controlled`."""
        raise NotImplementedError(
            f"{self.name}: it can only be called with tensors; `Controlled` also accepts symbolic inputs"
        )

    @classmethod
    def of(cls, network: UNet, hint: Any = "hint", channels: int = 3, **options: Any) -> Self:
        """A control for a built U-Net, initialised with copies of its weights, without effect before training.

        It copies the layers of those conditions that give only vectors, such as a class; the others are passed encoded.

        Args:
            network: the U-Net, or a model that holds it; maps concatenated to x_t are left out.
            hint: as in `ControlNet`; `Hint((8,))` for a pixel model.
            channels: of the pictures.
            options: arguments that replace those of the U-Net, such as `remat`.
        """
        while not isinstance(network, UNet) and hasattr(network, "network"):
            network = network.network
        if type(network) is not UNet or not network.built:
            raise ValueError(f"ControlNet.of: `network` must be a built UNet; received: {network!r}")
        shapes = network.get_build_config()["input_shape"]
        _, encoded = network.encoded_shapes({name: tuple(shape) for name, shape in shapes.items()})
        own = [name for name, one in encoded.items() if one.tokens is None and one.map is None]
        parts = {name: getattr(network, name) for name in ("levels", "middle", "remat", "seed", "stem_width")}
        conditions = {name: copy_layer(network.conditions[name]) for name in own}
        embedding = copy_layer(network.embedding)
        options = {**parts, "dtype": network.dtype_policy, **options}
        control = cls(embedding=embedding, conditions=conditions, hint=hint, **options)
        control.build(_shapes_of(control, network, {**shapes, "hint": (None, None, None, channels)}, "hint"))
        pairs = [(embedding, network.embedding), *zip(control.down, network.down, strict=True)]
        pairs += [(control.bridge, network.bridge), *((conditions[name], network.conditions[name]) for name in own)]
        for ours, theirs in pairs:
            _copy_weights(ours, theirs)
        control.stem.kernel.assign(ops.convert_to_numpy(network.stem.kernel)[..., : control.stem.kernel.shape[-2], :])
        control.stem.bias.assign(ops.convert_to_numpy(network.stem.bias))
        return control


class Controlled(ConfigurableLayer, keras.Model):
    """A U-Net with ControlNets, each with a picture as a condition: the network of a `DiffusionModel`.

        network({"image": x_t, "time": ..., "edges": picture, "edges_scale": numbers, **conditions})

    The U-Net is frozen, not averaged, and runs in inference mode except for the dropout of conditions. Outside
    training, pictures are optional, and the control of a missing picture is not run. "edges_scale", (batch,), or
    (batch, maps) for one scale per map, multiplies the output of the control; the default is 1. `guidance.Control`
    limits a control to a part of the run.

    The "guess mode" of diffusers, in which a picture replaces the text, is

        ramp = np.tile(np.logspace(-1, 0, 13), (4, 1))                    # 13 maps of Stable Diffusion 1 and 2
        free = ClassifierFree(4.0, negative={"edges_scale": 0 * ramp})    # the unconditional call has no control
        model.sample(4, text="", edges=drawing, edges_scale=ramp, guidance=free)

    Args:
        network: the U-Net.
        controls: `ControlNet`s, by the names of their pictures.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: if the levels of a control and the U-Net differ, or its name is that of another input.
    """

    def __init__(self, network: UNet, controls: Mapping[str, ControlNet], **kwargs):
        if not isinstance(network, UNet):
            raise TypeError(f"Controlled: `network` must be a UNet; received: {network!r}")
        super().__init__(autocast=False, **{"dtype": network.dtype_policy, **kwargs})
        if not controls or not all(isinstance(one, ControlNet) for one in controls.values()):
            raise TypeError(
                f"Controlled: `controls` must be a non-empty mapping of names to ControlNets; received: {controls!r}"
            )
        self.network = network
        self.controls = dict(controls)
        taken = {"image", "time", *network.condition_inputs}
        for name, control in self.controls.items():
            if {name, f"{name}_scale"} & taken:
                raise ValueError(f"Controlled: {name!r} is already an input of the U-Net, which has: {sorted(taken)}")
            if _plan(control) != _plan(network):
                raise ValueError(
                    f"Controlled: the control {name!r} must have the levels of the U-Net, with widths and depths "
                    f"{_plan(network)}; received: {_plan(control)}"
                )
        self._freeze()

    @property
    def conditions(self) -> dict[str, keras.layers.Layer]:
        """The conditions of the U-Net."""
        return self.network.conditions

    def encoder(self) -> UNet:
        """As in `Network`: the U-Net."""
        return self.network

    @property
    def condition_inputs(self) -> dict[str, Input]:
        """The inputs of the U-Net, the pictures and their scales."""
        own = {name: Input(None, control.hint, optional=True) for name, control in self.controls.items()}
        scales = {f"{name}_scale": Input(None, None, optional=True) for name in self.controls}
        return {**self.network.condition_inputs, **own, **scales}

    def build(self, input_shape):
        """Builds the U-Net and the controls, from the shapes of the inputs by name."""
        shapes = {name: tuple(shape) for name, shape in input_shape.items()}
        if not self.network.built:
            self.network.build(self._plain(shapes))
        for name, control in self.controls.items():
            if not control.built:
                if name not in shapes:
                    raise ValueError(f"{self.name}: the shape of {name!r} is missing; received: {sorted(shapes)}")
                control.build(_shapes_of(control, self.network, shapes, name))
        self._freeze()

    def _freeze(self) -> None:
        """Freezes each weight, not the layers, since a non-trainable layer could not have LoRA."""
        for weight in self.network.weights:
            weight.free = getattr(weight, "free", (weight.trainable, getattr(weight, "averaged", True)))
            weight.trainable = weight.averaged = False

    def release(self) -> None:
        """Makes the weights of the U-Net trainable and averaged again, as far as they were."""
        for weight in self.network.weights:
            weight.trainable, weight.averaged = vars(weight).pop("free")

    def _plain(self, values: Mapping[str, Any]) -> dict[str, Any]:
        own = {*self.controls, *(f"{name}_scale" for name in self.controls)}
        return {name: value for name, value in values.items() if name not in own}

    def call(self, inputs, training=None):
        """As in the U-Net."""
        plain, given = self._plain(inputs), [name for name in self.controls if name in inputs]
        if training and not given:
            raise ValueError(
                f"{self.name}: training needs at least one of the pictures {list(self.controls)}; received none"
            )
        encoded = self.network.encoded(plain, training)
        maps = [self._scaled(name, self._asked(name, inputs, encoded, training), inputs) for name in given]
        *skips, middle = [functools.reduce(operator.add, some) for some in zip(*maps, strict=True)] or [None]
        return self.network(plain, training=False, skips=skips or None, middle=middle, encoded=encoded)

    def _asked(self, name, inputs, encoded, training):
        """The scaled output maps of one control."""
        control, (_, conditions) = self.controls[name], encoded
        given = {one: inputs[one] for one in control.condition_inputs if one in inputs and one not in GIVEN}
        others = [one for key, one in conditions.items() if key not in control.conditions]
        context = joined([one for one in others if one.tokens is not None])
        if isinstance(context, Tokens):
            given["mask"], context = context.mask, context.values
        vectors = [ops.cast(one.vector, "float32") for one in others if one.vector is not None]
        given |= {} if context is None else {"tokens": context}
        given |= {"vector": functools.reduce(operator.add, vectors)} if vectors else {}
        given |= {"image": inputs["image"], "time": inputs["time"], "hint": inputs[name]}
        return control(given, training=training)

    def _scaled(self, name, maps, inputs):
        scale = inputs.get(f"{name}_scale")
        if scale is None:
            return maps
        if len(scale.shape) == 2 and scale.shape[1] != len(maps):
            raise ValueError(
                f"{self.name}: `{name}_scale` must be one number, or {len(maps)}, one per map, per sample; received "
                f"the shape: {tuple(scale.shape)}"
            )
        numbers = [scale] * len(maps) if len(scale.shape) == 1 else ops.unstack(scale, axis=1)
        return [ops.cast(over_positions(n[:, None], y), y.dtype) * y for n, y in zip(numbers, maps, strict=True)]

    def compute_output_spec(self, inputs, training=None):
        """The specification of the output of the U-Net."""
        return self.network.compute_output_spec(self._plain(inputs), training)


# Conditions that a control receives as encoded by the U-Net.
GIVEN = ("tokens", "mask", "vector")


def _plan(network: UNetEncoder) -> list:
    return [network.stem.filters, *((level.width, level.depth) for level in network.levels)]


def _shapes_of(control: ControlNet, network: UNet, shapes: Mapping[str, Any], name: str) -> dict[str, tuple]:
    """The shapes of the inputs of a control, from those of a built U-Net; `name` is that of the picture."""
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    _, encoded = network.encoded_shapes({"time": (None,), **shapes})
    tokens = [one.tokens for key, one in encoded.items() if key not in control.conditions and one.tokens is not None]
    context = {"tokens": network._joined(tokens)} if tokens else {}
    own = {key: shapes[key] for key in control.condition_inputs if key in shapes and key not in (*GIVEN, "hint")}
    return {**own, "image": shapes["image"], "time": shapes.get("time", (None,)), "hint": shapes[name], **context}


def _copy_weights(ours: keras.layers.Layer, theirs: keras.layers.Layer) -> None:
    if [tuple(weight.shape) for weight in ours.weights] != [tuple(weight.shape) for weight in theirs.weights]:
        raise ValueError(
            f"ControlNet.of: the layer {theirs.name!r} has other weights than a new layer of its type; end LoRA first, "
            "by `lora.merge`"
        )
    for weight, other in zip(ours.weights, theirs.weights, strict=True):
        weight.assign(ops.convert_to_numpy(other))
