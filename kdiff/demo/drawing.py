"""What the page shows: the steps of `model.sample_steps` as pictures, and the equations of a run's objects."""

import html
import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff import pictures
from kdiff.base import Configurable
from kdiff.guidance import AdaptiveProjected, CFGPlusPlus, CFGZeroStar, ClassifierFree
from kdiff.model import DiffusionModel
from kdiff.sampling import Sampler
from kdiff.solvers import Solver

__all__ = ["FILM", "OWN", "RULES", "SHOWN", "THUMBNAIL", "Frame", "chosen_sampler", "equations", "frames"]

OWN = "own"  # the model's own solver
RULES = {
    "classifier_free": ClassifierFree,
    "adaptive_projected": AdaptiveProjected,
    "cfg_plus_plus": CFGPlusPlus,
    "cfg_zero_star": CFGZeroStar,
}
FILM = 8  # moments in a film
SHOWN = 50  # steps of a run, at most
THUMBNAIL = 96  # the most pixels of a picture in a film, each way


class Frame(NamedTuple):
    """A step of a run.

    Attributes:
        estimate: the grid of x_hat, at the end of the samples themselves.
        noisy: the grid of x_t, made no brighter than pictures are.
        film: the way of the first sample so far, x_t above x_hat.
        words: where the run is.
        first: the first sample, uint8.
    """

    estimate: np.ndarray
    noisy: np.ndarray
    film: np.ndarray
    words: str
    first: np.ndarray


def chosen_sampler(
    model: DiffusionModel,
    solver: str = OWN,
    rule: str | None = None,
    scale: float = 1.0,
    negative: Mapping[str, Any] | None = None,
) -> Sampler:
    """The model's sampler with another solver, and with this rule of guidance in place of its own of that kind.

    Negative conditions, by name, replace those of the model's own rule, if there are any. The grid is that of the
    model, or, if that is the default of its solver, the default of the new one.
    """
    own = model.sampler
    if solver != OWN:
        own = own.replaced(solver=Solver.get(solver), grid=None if own.grid == own.solver.grid else own.grid)
    if rule is None:
        return own
    kept = [one for one in own.guidance if type(one) is RULES[rule]] or [RULES[rule]()]
    others = [one for one in own.guidance if type(one) not in RULES.values()]
    changes = {"scale": scale, "negative": negative} if negative else {"scale": scale}
    return own.replaced(guidance=[kept[0].clone(**changes), *others])


def frames(model: DiffusionModel, count: int, **options: Any) -> Iterator[Frame]:
    """The steps of `model.sample_steps(count, **options)`, all or `SHOWN` of them; the last ends at the samples."""
    noisy_film, film = [], []
    for step in model._run(count, **options).steps():  # not decoded, which clips x_t
        in_film, shown = (step.index in _moments(step.total, most) for most in (FILM, SHOWN))
        if not in_film and not shown:
            continue
        m = model.schedule.sampled_at(step.t)
        alpha, sigma = float(m.alpha), float(m.sigma)
        made = (step.x / max(1.0, math.hypot(alpha, sigma)), step.x if step.index == step.total else step.x_hat)
        noisy, estimate = (ops.convert_to_numpy(model.decode(x)) for x in made)
        if in_film:
            noisy_film.append(_thumbnail(noisy))
            film.append(_thumbnail(estimate))
        if not shown:
            continue
        blank = [np.full_like(film[0], 255)] * (min(FILM, step.total) - len(film))
        images = pictures.to_uint8(estimate)
        yield Frame(
            _grid(images),
            _grid(noisy),
            pictures.grid(np.stack([*noisy_film, *blank, *film, *blank]), len(film) + len(blank)),
            f"**Step {step.index} of {step.total}** · t = {step.t:.3f} · x_t = {alpha:.3f} x + {sigma:.3f} noise",
            images[0],
        )


def _moments(total: int, count: int) -> set[int]:
    """So many of the steps 1 ... total, or all, evenly; the last is one."""
    return set(np.linspace(total, 1, min(count, total)).round().astype(int).tolist())


def _grid(images: Any) -> np.ndarray:
    return pictures.grid(images, padding=0 if len(images) == 1 else None)


def _thumbnail(images: np.ndarray) -> np.ndarray:
    stride = math.ceil(max(images.shape[1:3]) / THUMBNAIL)
    return pictures.to_uint8(images[0, ::stride, ::stride])


def equations(model: DiffusionModel, sampler: Sampler) -> str:
    """HTML: a card for each object of a run, with what `explain` says of it."""
    kinds = {"Schedule": model.schedule, "Prediction": model.prediction, "Solver": sampler.solver}
    active = [(f"Guidance {i + 1}" if i else "Guidance", one) for i, one in enumerate(sampler.active)]
    cards = [_card(kind, one) for kind, one in [*kinds.items(), *active]]
    return f'<div class="kdiff-cards">{"".join(cards)}</div>'


def _card(kind: str, one: Configurable) -> str:
    text, *arguments = (inspect.getdoc(type(one)) or "").split("\n\nArgs:\n", 1)
    body = "".join(map(_block, text.split("\n\n")))
    more = "".join(f"<details><summary>Arguments</summary><pre>{html.escape(one)}</pre></details>" for one in arguments)
    return f"<section><h4>{kind}</h4><code>{html.escape(repr(one))}</code>{body}{more}</section>"


def _block(text: str) -> str:
    """A paragraph, or an equation, which is indented."""
    if text.startswith("    "):
        return f"<pre>{html.escape(textwrap.dedent(text))}</pre>"
    text = html.escape(" ".join(text.split()))
    return "<p>" + re.sub("`([^`]+)`", r"<code>\1</code>", text) + "</p>"
