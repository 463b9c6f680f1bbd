"""Makes other packages' scores importable, from the folder PEERS if it is set, with torchvision, which they need."""

import os
import sys
from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch")
if "PEERS" in os.environ:
    sys.path.append(os.environ["PEERS"])  # at the end, for one of them has a package `tests` too

# Its wheel is built with CUDA. Beside a PyTorch for CPUs its compiled operations do not load, and its import then fails
# on two that it takes for granted. Nothing here calls them.
DECLARED = []
if find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        DECLARED.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
