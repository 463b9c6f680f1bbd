"""PyTorch's processes, which train one model, each on some rows of a batch: joining them, and what they exchange.

torchrun has started them, one a device. On the other backends, or if they are not joined, there is one, the first.
"""

import contextlib
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from kdiff.backend.running import BACKEND

__all__ = [
    "check_shares",
    "is_parted",
    "join_processes",
    "mean_of_processes",
    "of_first_process",
    "parting_sampler",
    "process",
    "processes",
    "rows_of_process",
    "rows_of_processes",
    "share_training",
]

_BUCKET = 2**23  # numbers that are added up at once


def join_processes(devices: Sequence[str] | None) -> None:
    """As in `kdiff.distribution.data_parallel` on PyTorch."""
    import torch

    if devices is not None:
        raise ValueError(
            "data_parallel: on PyTorch each process has one device, of its own number; give no `devices`, and have "
            f"`torchrun --nproc-per-node` start as many processes; received: {devices}"
        )
    if torch.distributed.is_initialized():
        return
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError(
            "data_parallel: on PyTorch there is one process a device: start the script with "
            "`torchrun --nproc-per-node 8 train.py`"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")


def processes() -> int:
    """How many processes train one model."""
    if BACKEND != "torch":
        return 1
    import torch

    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def process() -> int:
    """The number of this process."""
    if processes() == 1:
        return 0
    import torch

    return torch.distributed.get_rank()


# Data


def parting_sampler(data: Any) -> Any:
    """The `DistributedSampler` by which a PyTorch `DataLoader` gives each process a part of its own; None if none."""
    if BACKEND != "torch":
        return None
    import torch

    samplers = getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None)
    return next((one for one in samplers if isinstance(one, torch.utils.data.DistributedSampler)), None)


def is_parted(data: Any) -> bool:
    """Whether each of several processes is given a part of its own."""
    return processes() > 1 and parting_sampler(data) is not None


def check_shares(count: int, devices: int, name: str = "a batch") -> None:
    """Raises a ValueError unless so many devices can share so many examples equally."""
    if count % devices:
        raise ValueError(
            f"{devices} devices cannot share {name} of {count} examples equally: choose a batch size that {devices} "
            "divides, and leave out what remains, `dataset.batch(size, drop_remainder=True)`"
        )


def rows_of_process(batch: Any) -> Any:
    """Of a nest of tensors, the rows that this process trains on.

    Raises:
        ValueError: if they cannot be shared out equally.
    """
    if (count := processes()) == 1:
        return batch
    rows = len(next(leaf for leaf in tree.flatten(batch) if leaf is not None))
    check_shares(rows, count)
    first = process() * (size := rows // count)
    return tree.map_structure(lambda leaf: None if leaf is None else leaf[first : first + size], batch)


def rows_of_processes(x: Any) -> Any:
    """The rows of all processes, in their order, of a tensor whose rows in this one are `x`."""
    if processes() == 1:
        return x
    import torch

    parts = [torch.empty_like(x) for _ in range(processes())]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


# Training


def of_first_process(function: Callable[[], Any]) -> Any:
    """What `function` returns or raises in the first process, in each."""
    if processes() == 1:
        return function()
    import torch

    found = [None, None]
    if process() == 0:
        try:
            found[0] = function()
        except Exception as error:  # which the others, that wait, raise too
            found[1] = error
    torch.distributed.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise found[1]
    return found[0]


def mean_of_processes(variables: Sequence[keras.Variable]) -> contextlib.AbstractContextManager:
    """A scope in which the variables, such as the sums and counts of metrics, are their means over the processes."""
    if processes() == 1 or not variables:
        return contextlib.nullcontext()
    means = _means([variable.value.detach().float() for variable in variables])
    return keras.StatelessScope(list(zip(variables, means, strict=True)))


def _means(tensors: list) -> list:
    """The means over the processes of tensors of one kind of numbers, exchanged as one."""
    import torch

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = (flat / processes()).split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def share_training(model: keras.Model, anew: bool = True) -> None:
    """Has the processes train one model: with the values of the first, its random numbers, and mean gradients.

    If not `anew`, only where they do not yet: with this optimizer and these weights.
    """
    if processes() == 1:
        return
    parameters = [variable.value for variable in model.trainable_variables]
    before = model.__dict__.get("_reduction")
    if not anew and before is not None and before.is_of(model.optimizer, parameters):
        return
    import torch

    for variable in (*model.variables, *model.optimizer.variables):
        torch.distributed.broadcast(variable.value.data, 0)
    states = [random.getstate(), np.random.get_state(), torch.get_rng_state()]  # noqa: NPY002
    torch.distributed.broadcast_object_list(states, 0)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    # By itself it would be a part of the model, and saved.
    model.__dict__["_reduction"] = _MeanGradients(model.optimizer, parameters)


class _MeanGradients:
    """When a backward pass ends, the gradients of these parameters become their means over the processes."""

    def __init__(self, optimizer: Any, parameters: list):
        self.optimizer, self.parameters, self.due = optimizer, parameters, False
        for parameter in parameters:
            if hasattr(parameter, "_mean_gradient"):
                parameter._mean_gradient.remove()
            parameter._mean_gradient = parameter.register_post_accumulate_grad_hook(self.note)

    def is_of(self, optimizer: Any, parameters: list) -> bool:
        """Whether it is of this optimizer and these parameters."""
        return optimizer is self.optimizer and list(map(id, parameters)) == list(map(id, self.parameters))

    def note(self, parameter) -> None:
        import torch

        if not self.due:
            self.due = True
            torch.autograd.Variable._execution_engine.queue_callback(self.reduce)

    def reduce(self) -> None:
        """All of one order: that of the parameters."""
        self.due = False
        bucket, size = [], 0
        for gradient in [parameter.grad for parameter in self.parameters if parameter.grad is not None]:
            if bucket and (size + gradient.numel() > _BUCKET or gradient.dtype != bucket[0].dtype):
                self.mean(bucket)
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.numel()
        if bucket:
            self.mean(bucket)

    def mean(self, gradients: list) -> None:
        import torch

        torch._foreach_copy_(gradients, _means(gradients))
