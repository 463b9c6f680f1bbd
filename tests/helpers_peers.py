"""Makes torchvision importable, which torch-fidelity and pytorch-fid need."""

from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch")

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
