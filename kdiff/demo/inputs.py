"""The inputs of the page for the conditions of a network, and the pictures that are given to it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdiff import pictures
from kdiff.blocks import LabelEmbedding
from kdiff.encoders import PicturePrompt
from kdiff.model import DiffusionModel
from kdiff.model.condition_inputs import condition_layers, condition_nulls, optional_names
from kdiff.text import is_text

__all__ = ["CANVAS", "NONE", "Field", "edited", "enlarged", "fields", "resized"]

NONE = "none"  # of the classes
CANVAS = 320  # pixels of a picture in the editor, at least


class Field(NamedTuple):
    """A condition on the page.

    Attributes:
        name: of the condition.
        kind: the class of gradio's component.
        options: of the component, the label included.
        value: makes the condition of what the component holds; None is no condition.
        optional: whether the condition is left out where it is None.
        negative: whether it is a text that guidance may also lead away from.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    value: Callable[[Any], Any]
    optional: bool
    negative: bool = False


def fields(model: DiffusionModel, classes: Mapping[str, Sequence[str]] | None = None) -> list[Field]:
    """The conditions that the network takes, as its own layers describe them.

    A label is chosen from a list, a text and a few numbers are written, and a picture is put in.

    Args:
        model: a built model.
        classes: the names of labels, in their order, by the name of the condition.

    Raises:
        ValueError: if there is a condition that the page has no input for; if there are not as many names as labels.
    """
    layers, nulls, optional = (of(model.network) for of in (condition_layers, condition_nulls, optional_names))
    found = []
    for name, (_, *shape) in model.shapes.items():
        layer = layers.get(name)
        if name == "image" or hasattr(layer, "default"):
            continue
        described = _described(name, layer, tuple(shape), name in nulls, (classes or {}).get(name))
        if described is not None:
            found.append(Field(name, *described, name in optional, name in nulls and _takes_text(layer)))
        elif name not in nulls and name not in optional:
            raise ValueError(f"the page has no input for the condition {name!r}, of the shape {tuple(shape)}")
    for name, (low, _) in model.drawn_inputs.items():
        if name in optional and name not in model.shapes:
            found.append(Field(name, "Number", {"label": name, "value": low}, lambda value: value, True))
    return found


def _described(name: str, layer: Any, shape: tuple, absent: bool, classes: Sequence[str] | None):
    """The component, its options, and what makes the condition of its value; None if there is none."""
    label = f"{name} (may be empty)" if absent else name
    if isinstance(layer, LabelEmbedding):
        names = [str(i) for i in range(layer.num_classes)] if classes is None else list(classes)
        if len(names) != layer.num_classes:
            raise ValueError(f"`{name}` has {layer.num_classes} labels, and these are {len(names)} names: {names}")
        choices = [*([(NONE, NONE)] if absent else []), *zip(names, range(len(names)), strict=True)]
        options = {"choices": choices, "value": 0, "label": name}
        return "Dropdown", options, lambda value: None if value == NONE else value
    if _takes_text(layer):
        return "Textbox", {"label": label, "lines": 2}, lambda value: value if value or not absent else None
    if isinstance(layer, PicturePrompt):
        return "Image", {"label": label, "type": "numpy"}, lambda value: value
    if len(shape) == 3 and shape[-1] in (1, 3, 4):
        return "Image", {"label": label, "type": "numpy"}, lambda value: _unit(resized(value, shape))
    if shape == () and not absent:
        return "Number", {"label": name, "value": 0}, lambda value: value
    if len(shape) < 2:
        what = f"{shape[0]} numbers, commas between" if shape else "a number"
        return "Textbox", {"label": f"{label}: {what}"}, lambda value: _numbers(name, value, shape)
    return None


def _takes_text(layer: Any) -> bool:
    return hasattr(layer, "prepare") and not is_text(layer.prepare(np.array([""])))


def _numbers(name: str, text: str | None, shape: tuple) -> np.ndarray | None:
    if not text or not text.strip():
        return None
    try:
        return np.array([float(part) for part in text.split(",")], "float32").reshape(shape)
    except ValueError as error:
        count = shape[0] if shape else 1
        raise ValueError(f"`{name}` must be so many numbers, commas between: {count}; received: {text!r}") from error


def _unit(picture: np.ndarray | None) -> np.ndarray | None:
    return None if picture is None else picture.astype("float32") / 127.5 - 1.0


def resized(picture: np.ndarray | None, shape: Sequence[int | None]) -> np.ndarray | None:
    """A picture of any size, uint8, cut and brought to this shape, (height, width, channels).

    A size that is None is that of the picture.
    """
    if picture is None:
        return None
    pil, (height, width, channels) = pictures.pillow(), shape
    picture = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
    image = pil.fromarray(picture).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    size = (width or image.width, height or image.height)
    # The largest part in the middle that has the wanted proportions; the mean over a pixel of the result.
    scale = min(image.width / size[0], image.height / size[1])
    left, top = ((whole - scale * part) / 2 for whole, part in zip(image.size, size, strict=True))
    box = (left, top, left + scale * size[0], top + scale * size[1])
    image = image.resize(size, pil.Resampling.BOX if scale >= 1 else pil.Resampling.BICUBIC, box)
    return np.asarray(image).reshape(*size[::-1], channels)


def enlarged(picture: np.ndarray) -> np.ndarray:
    """A small picture, each pixel a square, large enough to paint on."""
    scale = max(1, CANVAS // max(picture.shape[:2]))
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    return picture.repeat(3, axis=-1) if picture.shape[-1] == 1 else picture


def edited(value: Mapping[str, Any] | None, shape: Sequence[int | None]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The picture in the editor, and the mask: 1 in each pixel that was painted on; None where there is none."""
    if value is None or value["background"] is None:
        return None, None
    picture = value["background"]
    painted = np.zeros(picture.shape[:2], bool)
    for layer in value["layers"]:
        painted |= layer[..., -1] > 0
    if not painted.any():
        return resized(picture, shape), None
    mask = resized(255 * painted.astype("uint8"), (*shape[:2], 1))[..., 0]
    return resized(picture, shape), (mask > 0).astype("float32")
