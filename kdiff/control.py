"""ControlNet for a model: its network is frozen, and a copy of half of it learns to follow pictures.

    model = interop.diffusers.load("stable-diffusion-v1-5", ema=0.99)
    control.add(model, edges=networks.ControlNet.of(model.network))
    model.compile(keras.optimizers.Adam(1e-5))
    model.fit({"image": images, "text": captions, "edges": edges})         # only the control learns, and is averaged
    model.sample(4, text="a red hat", edges=drawing, guidance=7.5)
    interop.diffusers.save(model.network.controls["edges"], "edges")       # diffusers' ControlNetModel

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models" (2023). See `kdiff.networks.control`.
"""

import keras
from keras import ops

from kdiff import backend
from kdiff.networks.control import Controlled, ControlNet

__all__ = ["add"]


def add(model: keras.Model, channels: int = 3, **controls: ControlNet) -> None:
    """Puts `Controlled` in the place of the network of a model, which takes a picture by the name of each control.

    Call it before `compile`. The U-Net is frozen and has no averages: those that it had, if they were moved, are its
    weights from now on. Controls that the model has already stay.

    Args:
        model: a `DiffusionModel` of a UNet, built.
        channels: of the pictures, for a control that is not built.
        controls: a `ControlNet` by the name of each picture.

    Raises:
        ValueError: if the model is not built, a name is taken, or a control does not fit.
        TypeError: if the network is no UNet, or a control no ControlNet.
    """
    if not model.built:
        raise ValueError("control.add: the model has no weights yet; train it, load it, or call `build`")
    old = model.network
    before = old.controls if isinstance(old, Controlled) else {}
    if taken := sorted(before.keys() & controls.keys()):
        raise ValueError(f"control.add: the model has controls of these names already: {taken}")
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
