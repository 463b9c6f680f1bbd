"""A page in the browser on which trained models draw, step by step. It needs the extra `demo`, which is gradio.

    python -m kdiff.demo model.keras other.keras stable-diffusion/    # at http://127.0.0.1:7860, for this machine alone

    kdiff.demo.launch({"digits": model})                              # the same from Python, or from a notebook
    kdiff.demo.page({"digits": model})                                # for a gradio application of your own

Each model has a tab, with an input for each condition that its network takes, and one for what a text should not give,
the solvers and guidance rules that kdiff has, an editor in which a picture is changed or a part of it painted anew, and
the equations of what is chosen. A seed gives the pixels that `model.sample` gives. Nothing is asked for from outside
the machine, and nothing is reported.
"""

from kdiff.demo.loading import load
from kdiff.demo.page import launch, page

__all__ = ["launch", "load", "page"]
