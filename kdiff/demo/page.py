"""The page itself, in gradio."""

import inspect
import os
import random as py_random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdiff.base import needs
from kdiff.demo.drawing import OWN, RULES, chosen_sampler, equations, frames
from kdiff.demo.inputs import CANVAS, Field, edited, enlarged, fields
from kdiff.demo.loading import check_model
from kdiff.model import DiffusionModel
from kdiff.model.condition_inputs import condition_nulls
from kdiff.solvers import DDIMInversion, Solver

__all__ = ["CSS", "TITLE", "launch", "page"]

TITLE = "# kdiff\nNoise becomes pictures, step by step: `x_t = alpha x + sigma noise`, from `t = 1` to `t = 0`."
CSS = """
.kdiff-pixels .image-container { padding-top: 2rem; }  /* below the label */
.kdiff-pixels .image-frame { width: 100%; }
.kdiff-pixels .image-frame img { width: 100%; max-height: 75vh; object-fit: contain; image-rendering: pixelated; }
.kdiff-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
.kdiff-cards section { border: 1px solid var(--border-color-primary); border-radius: 0.5rem; padding: 0.75rem 1rem; }
.kdiff-cards h4 { margin: 0; color: var(--color-accent); }
.kdiff-cards p, .kdiff-cards pre { margin: 0.5rem 0; white-space: pre-wrap; }
.kdiff-cards pre, .kdiff-cards code { font-size: 0.85em; }
"""


def launch(
    models: Mapping[str, DiffusionModel] | DiffusionModel,
    classes: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> Any:
    """Shows the page at 127.0.0.1, and waits for Ctrl-C.

    Args:
        models: a model, or several by name.
        classes: the names of labels, in their order, by the name of the condition: `{"label": ["cat", "dog"]}`.
        options: of gradio's `Blocks.launch`, such as `server_port`, or `prevent_thread_lock=True`, not to wait.

    Returns:
        What gradio's `launch` returns.

    Raises:
        ImportError: if gradio is not installed.
        ValueError: as in `page`.
    """
    blocks = page(models, classes)
    theme = _gradio().themes.Default(primary_hue="indigo", neutral_hue="slate")
    plain = {
        "server_name": "127.0.0.1",
        "share": False,
        "theme": theme,
        "css": CSS,
        "footer_links": [],
        "show_error": True,
    }
    return blocks.launch(**{**plain, **options})


def page(
    models: Mapping[str, DiffusionModel] | DiffusionModel, classes: Mapping[str, Sequence[str]] | None = None
) -> Any:
    """The page as gradio's `Blocks`: a tab for each model, with the function "/draw", or "/draw_1" and so on.

    Args:
        models: a model, or several by name.
        classes: the names of labels, in their order, by the name of the condition: `{"label": ["cat", "dog"]}`.

    Raises:
        ImportError: if gradio is not installed.
        ValueError: if a model is not one of pictures, or has a condition that the page has no input for.
    """
    gradio = _gradio()
    models = {"model": models} if isinstance(models, DiffusionModel) else dict(models)
    for name, model in models.items():
        check_model(name, model)
    with gradio.Blocks(title="kdiff", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.Markdown(TITLE)
        with gradio.Tabs():
            for index, (name, model) in enumerate(models.items()):
                with gradio.Tab(name):
                    _panel(gradio, model, fields(model, classes), f"draw_{index}" if index else "draw")
    return blocks


def _gradio() -> Any:
    """gradio, imported where it is used, which reports nothing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with needs("demo", "The page needs gradio"):
        import gradio
    return gradio


def _panel(gradio: Any, model: DiffusionModel, found: Sequence[Field], api_name: str) -> None:
    """What belongs to one model. The inputs have the names of the arguments of `sample`."""
    pixels = {"elem_classes": "kdiff-pixels", "format": "png", "interactive": False, "buttons": ["download"]}
    with gradio.Row():
        with gradio.Column(scale=2, min_width=320):
            gradio.Markdown(_summary(model))
            inputs = {field.name: getattr(gradio, field.kind)(**field.options) for field in found}
            for field in found:
                if field.negative:
                    inputs[_negative(field)] = gradio.Textbox(
                        label=f"negative {field.name}: what guidance leads away from (may be empty)"
                    )
            texts = [one for one in inputs.values() if isinstance(one, gradio.Textbox)]
            inputs |= _run_inputs(gradio, model)
            with gradio.Row():
                draw = gradio.Button("Draw", variant="primary")
                stop = gradio.Button("Stop")
            with gradio.Accordion("From a picture", open=False):
                gradio.Markdown("All of it is changed, by as much as `strength` says; or what is painted over, alone.")
                take = gradio.Button("Take the first sample")
                brush = gradio.Brush(default_size=CANVAS // 8, colors=["#6366f1"], color_mode="fixed")
                inputs["image"] = gradio.ImageEditor(
                    label="picture", brush=brush, layers=False, canvas_size=(CANVAS, CANVAS), format="png"
                )
                inputs["strength"] = gradio.Slider(0, 1, 0.75, label="strength")
        with gradio.Column(scale=3):
            with gradio.Row():
                noisy = gradio.Image(label="x_t, noisy", **pixels)
                estimate = gradio.Image(label="x_hat, the estimate of the data", **pixels)
            words = gradio.Markdown()
            film = gradio.Image(label="the first sample: x_t above x_hat", **pixels)
    with gradio.Accordion("The equations"):
        cards = gradio.HTML(equations(model, model.sampler))
    first = gradio.State()

    def drawn(*values: Any) -> Iterator[tuple]:
        try:
            for frame in frames(model, **_options(model, found, dict(zip(inputs, values, strict=True)))):
                grey = frame.first.shape[-1] == 1  # of which gradio wants no axis of channels
                shown = (one[..., 0] if grey else one for one in (frame.estimate, frame.noisy, frame.film))
                yield *shown, frame.words, frame.first
        except (TypeError, ValueError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    drawn.__signature__ = inspect.Signature(  # its inputs have names, and may be left out, for a client too
        [inspect.Parameter(name, kind, default=one.value) for name, one in inputs.items()]
    )
    outputs = [estimate, noisy, film, words, first]
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "draw", "show_progress": "hidden"}
    triggers = [draw.click, *(text.submit for text in texts)]
    running = gradio.on(triggers, drawn, list(inputs.values()), outputs, api_name=api_name, **one_at_a_time)
    stop.click(None, cancels=[running], api_visibility="private")
    take.click(lambda picture: picture if picture is None else enlarged(picture), first, inputs["image"])

    choices = [inputs[name] for name in ("sampler", "rule", "guidance") if name in inputs]
    described = {"fn": lambda *chosen: equations(model, chosen_sampler(model, *chosen)), "api_visibility": "private"}
    gradio.on([one.change for one in choices], inputs=choices, outputs=cards, show_progress="hidden", **described)


def _negative(field: Field) -> str:
    """The name of the input for the negative of a text."""
    return f"negative_{field.name}"


def _summary(model: DiffusionModel) -> str:
    """What this model is, in a line."""
    network, size = type(model.network).__name__, " x ".join("any" if n is None else str(n) for n in model.example)
    return f"{network} with {model.network.count_params():,} weights, pictures of {size}, {model.codec!r}"


def _run_inputs(gradio: Any, model: DiffusionModel) -> dict[str, Any]:
    """The inputs of any run."""
    sampler, inputs = model.sampler, {}
    steps = sampler.steps or sampler.grid.default_steps(model.schedule)
    solvers = [name for name, one in Solver.names().items() if one is not DDIMInversion]
    with gradio.Row():
        choices = [(f"{type(sampler.solver).__name__} (own)", OWN), *solvers]
        inputs["sampler"] = gradio.Dropdown(choices, value=OWN, label="solver")
        inputs["steps"] = gradio.Slider(1, max(100, steps), steps, step=1, label="steps")
    if condition_nulls(model.network):
        scale = next((one.scale for one in sampler.guidance if isinstance(one, tuple(RULES.values()))), 1.0)
        scale = float(np.ravel(scale)[0])  # there may be one for each sample
        with gradio.Row():
            inputs["rule"] = gradio.Dropdown(list(RULES), value=next(iter(RULES)), label="guidance")
            inputs["guidance"] = gradio.Slider(0, max(15, scale), scale, step=0.1, label="scale, 1 is off")
    with gradio.Row():
        inputs["num_samples"] = gradio.Slider(1, 16, 4, step=1, label="samples")
        with gradio.Column(min_width=120):
            inputs["seed"] = gradio.Number(0, precision=0, label="seed")
            another = gradio.Button("Another seed", size="sm")
    another.click(lambda: py_random.randrange(2**31), outputs=inputs["seed"], api_visibility="private")
    if None in model.example[:2]:
        with gradio.Row():
            inputs |= {name: gradio.Number(64, precision=0, label=name) for name in ("height", "width")}
    return inputs


def _options(model: DiffusionModel, found: Sequence[Field], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `frames`: those of `sample`.

    Raises:
        ValueError: if a number is missing.
    """
    if missing := [name for name in ("steps", "num_samples", "seed", "strength") if given[name] is None]:
        raise ValueError(f"the page needs a number for each of {missing}")
    conditions = {field.name: field.value(given[field.name]) for field in found}
    absent = {field.name for field in found if field.optional and conditions[field.name] is None}
    conditions = {name: value for name, value in conditions.items() if name not in absent}
    negative = {field.name: given[_negative(field)] for field in found if field.negative and given[_negative(field)]}
    chosen = (given[name] for name in ("sampler", "rule", "guidance") if name in given)
    sampler = chosen_sampler(model, *chosen, negative=negative)
    size = {name: given[name] for name in ("height", "width") if name in given}
    picture, mask = edited(given["image"], (*(size.values() or model.example[:2]), model.example[-1]))
    options = {"count": given["num_samples"], "sampler": sampler, "steps": given["steps"], "seed": given["seed"]}
    if picture is not None:
        options |= {"image": picture, "strength": given["strength"]}
    if mask is not None:
        options |= {"known": picture, "mask": mask}
    return {**options, **size, **conditions}
