"""ControlNet for a model: its network is frozen, and a trainable copy of its encoder follows pictures.

    model = interop.diffusers.load("stable-diffusion-v1-5", ema=0.99)
    control.add(model, edges=networks.ControlNet.of(model.network))
    model.compile(keras.optimizers.Adam(1e-5))
    model.fit({"image": images, "text": captions, "edges": edges})         # only the control is trained and averaged
    model.sample(4, text="a red hat", edges=drawing, guidance=7.5)
    interop.diffusers.save(model.network.controls["edges"], "edges")       # a ControlNetModel of diffusers

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models" (2023). See `kdiff.networks.control`.
"""

import keras
from keras import ops

from kdiff import backend
from kdiff.networks.control import Controlled, ControlNet

__all__ = ["add"]


def add(model: keras.Model, channels: int = 3, **controls: ControlNet) -> None:
    """Replaces the network of a model by `Controlled`, which takes one picture per control, by its name.

    Call it before `compile`. The U-Net is frozen and has no averages: if it had averages that have been updated, they
    become its weights. Existing controls of the model are kept.

    Args:
        model: a `DiffusionModel` with a UNet, built.
        channels: of the pictures, for controls that are not built.
        controls: `ControlNet`s, by the names of their pictures.

    Raises:
        ValueError: if the model is not built, a name is taken, or a control does not fit.
        TypeError: if the network is not a UNet, or a control not a ControlNet.
    """
    if not model.built:
        raise ValueError("control.add: the model has no weights yet; train it, load it, or call `build`")
    old = model.network
    before = old.controls if isinstance(old, Controlled) else {}
    if taken := sorted(before.keys() & controls.keys()):
        raise ValueError(f"control.add: the model already has controls of these names: {taken}")
    pictures = {name: (None, None, None, channels) for name in controls}
    model._check_names([*controls, *(f"{name}_scale" for name in controls)])
    if model.ema_weights and model.ema_weights.moved:
        for weight, average in model.ema_weights.pairs(old):
            weight.assign(ops.convert_to_numpy(average))
    new = Controlled(old.network if before else old, {**before, **controls})
    new.build({"time": (None,), **model.shapes, **pictures})
    with backend.replaced(model, old):
        model.network = new
    model.shapes = {**model.shapes, **pictures}
    model.reset_ema()
    model._forget_graphs()
