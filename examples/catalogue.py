"""Write examples/catalogue.md: every named object with its arguments, from the objects themselves.

python examples/catalogue.py
"""

import inspect
import itertools
import re
from pathlib import Path

from kdiff import (
    blocks,
    codecs,
    guidance,
    networks,
    objectives,
    operators,
    predictions,
    schedules,
    solvers,
    tangents,
    text,
    times,
    weightings,
)

FAMILIES = {
    "Schedules": schedules.NoiseSchedule,
    "Predictions": predictions.Prediction,
    "Loss weights": weightings.Weighting,
    "Training times": times.TimeSampler,
    "Objectives": objectives.Objective,
    "Objectives: which noise levels are compared": objectives.Pairs,
    "Objectives: derivatives along curves": tangents.Tangent,
    "Sampling grids": times.TimeGrid,
    "Time labels": times.TimeLabel,
    "Solvers": solvers.Solver,
    "Guidance": guidance.Guidance,
    "Operators": operators.Operator,
    "Codecs": codecs.Codec,
    "Tokenizers": text.Tokenizer,
    "Networks": networks.Network,
    "Blocks": blocks.Block,
    "Attention patterns": blocks.Pattern,
    "Relative positions of attention": blocks.RelativePositions,
}
PAGE = Path(__file__).with_name("catalogue.md")


def summary(kind: type) -> str:
    """The first sentence of the docstring, without a following equation."""
    lines = itertools.takewhile(str.strip, inspect.getdoc(kind).splitlines())
    text = " ".join(line.strip() for line in lines)
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z])", text)[0].rstrip(":,").replace("|", "\\|")


def call(kind: type) -> str:
    """The constructor call with its defaults."""
    # For the class itself Python 3.11.2 returns the signature of `__new__` of a base.
    parameters = [] if kind.__init__ is object.__init__ else list(inspect.signature(kind.__init__).parameters.values())
    arguments = [str(p.replace(annotation=p.empty)) for p in parameters[1:]]
    return f"{kind.__name__}({', '.join(arguments)})"


def rows(base: type):
    """The lines of the table of one family."""
    solver = base is solvers.Solver
    yield "| name | object | description |" + (" order | evaluations per step |" if solver else "")
    yield "|---|---|---|" + ("---|---|" if solver else "")
    for name, kind in sorted(base.names().items()):
        if kind.__module__.startswith("kdiff."):
            order = f" {kind().order} | {kind().evaluations} |" if solver else ""
            yield f"| `{name}` | `{call(kind)}` | {summary(kind)} |{order}"


def catalogue() -> str:
    """The whole page."""
    lines = [
        "# Catalogue of named objects",
        "",
        "Written by `examples/catalogue.py` from the objects, and checked by a test. Each can be given by",
        'name, `schedule="cosine"`, or as an object, `schedule=Cosine(min_log_snr=-12.0)`; `object.explain()` prints',
        "its documentation: equation, source, arguments and their limits.",
        "",
        ", ".join(f"[{title}](#{title.lower().replace(':', '').replace(' ', '-')})" for title in FAMILIES) + ".",
    ]
    for title, base in FAMILIES.items():
        lines += ["", f"## {title}", "", *rows(base)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(catalogue(), encoding="utf-8")
    print(f"Wrote {PAGE}")
