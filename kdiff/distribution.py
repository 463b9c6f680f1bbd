"""One model on several devices: each computes a part of every batch, with the weights whole on each.

    kdiff.distribution.data_parallel()       # before the model is made
    model = kdiff.DiffusionModel(...)

The losses, the weights and the samples are those of one device, to rounding, for noise belongs to rows and not to
devices. What differs is said here: dropout (not that of conditions) draws on TensorFlow and PyTorch the same for the
first row of each device, and objectives that treat a share of a batch in another way, `Shortcut` and `MeanFlow`, take
the share of each device's rows.

Choose a batch size that the number of devices divides, and drop what is left over. A model too large for a device is
laid out over several on JAX: `networks.layout_map`.
"""

from collections.abc import Sequence

from kdiff import backend

__all__ = ["data_parallel", "is_first"]


def data_parallel(devices: Sequence[str] | None = None) -> None:
    """Has models that are made from now on train, and `sample`, on several devices.

    - JAX: all devices of the process, or of all processes after `keras.distribution.initialize`, by
      `keras.distribution.DataParallel`.
    - TensorFlow: all GPUs of this machine, or else its logical CPUs, by `tf.distribute.MirroredStrategy`. Strategies of
      several machines are refused.
    - PyTorch: as many processes as `torchrun` has started, on one machine or many, by `torch.distributed`, each with
      the GPU of its number. Each is given the same whole batches and computes its rows; or a `DataLoader` with a
      `DistributedSampler`, each with its part, in an order that `fit` renews in each epoch. All of them call the same
      functions, `fit`, `evaluate`, `sample`, in the same order; `sample` gives all samples to each.

    Args:
        devices: names of devices, such as `["gpu:0", "gpu:1"]`; None for all. Not on PyTorch.

    Raises:
        RuntimeError: on PyTorch, if the script was not started by `torchrun`.
        TypeError: if `devices` is no list.
        ValueError: if there are no such devices, or they are not of one kind.
    """
    backend.data_parallel(devices)


def is_first() -> bool:
    """Whether this is the process, of several that train one model, that should write files."""
    return backend.is_first_process()
