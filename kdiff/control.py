"""ControlNet for a model: its network is frozen, and a trainable copy of its encoder follows pictures.

    model = interop.diffusers.load("stable-diffusion-v1-5", ema=0.99)
    control.add(model, edges=networks.ControlNet.of(model.network))
    model.compile(keras.optimizers.Adam(1e-5))
    model.fit({"image": images, "text": captions, "edges": edges})         # only the control is trained and averaged
    model.sample(4, text="a red hat", edges=drawing, guidance=7.5)
    interop.diffusers.save(model.network.controls["edges"], "edges")       # a ControlNetModel of diffusers
    control.remove(model)                                                  # the U-Net alone again, and trainable

Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models" (2023). See `kdiff.networks.control`.
"""

import keras

from kdiff import backend
from kdiff.networks.control import Controlled, ControlNet

__all__ = ["add", "remove"]


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
    if model.ema_weights:
        model.ema_weights.apply(model.network)
    network = Controlled(old.network if before else old, {**before, **controls})
    network.build({"time": (None,), **model.shapes, **pictures})
    _replace(model, network, {**model.shapes, **pictures})


def remove(model: keras.Model, *names: str) -> None:
    """Removes the controls of these names from a model, or without names all: then the U-Net is trainable again.

    Call it before `compile`. If the remaining controls have averages that have been updated, they become their weights.

    Raises:
        ValueError: if the model has no control of a name, or the U-Net LoRA, without which all of it would be trained.
    """
    old = model.network
    before = old.controls if isinstance(old, Controlled) else {}
    if missing := [name for name in names if name not in before]:
        raise ValueError(f"control.remove: the model has no controls of the names {missing}, only {sorted(before)}")
    kept = {name: one for name, one in before.items() if names and name not in names}
    if kept == before:
        return
    if not kept and any(getattr(weight, "adapts", False) for weight in old.network.weights):
        raise ValueError("control.remove: the U-Net has LoRA or trained tokens; end them first, as by `lora.merge`")
    if model.ema_weights:
        model.ema_weights.apply(model.network)
    if kept:
        network = Controlled(old.network, kept)
        network.build({"time": (None,), **model.shapes})
    else:
        network = old.network
        old.release()
    removed = before.keys() - kept.keys()
    _replace(model, network, {name: shape for name, shape in model.shapes.items() if name not in removed})


def _replace(model: keras.Model, network: keras.layers.Layer, shapes: dict) -> None:
    """Gives a model another network that has the weights of the present one."""
    with backend.replaced(model, model.network):
        model.network = network
    model.shapes = shapes
    model.reset_ema()
    model._forget_graphs()
