"""Networks that are too large for one device: how their weights are divided among several, on JAX."""

import keras

from kdiff.base import check_choice

__all__ = ["layout_map"]

# Of two dense layers, one after the other, the first is divided by columns and the second by rows: what is between them
# stays where it is made. Heads are columns of the queries, keys and values.
_COLUMNS = (
    r".*/(query|key|value|hidden|gate|context_key|context_value)",
    r".*/(normalization|adaptive_norm(_\d+)?)/dense(_\d+)?",
)
_ROWS = r".*/output"
_CONVOLUTIONS = r".*/conv2d(_\d+)?"


def layout_map(mesh: keras.distribution.DeviceMesh, axes: int = 2) -> keras.distribution.LayoutMap:
    """Where the weights of kdiff's networks lie, for `keras.distribution.ModelParallel` on JAX.

        mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], keras.distribution.list_devices())
        layout = kdiff.networks.layout_map(mesh)
        keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout))
        model = kdiff.DiffusionModel(kdiff.networks.DiT.xl(2))

    Attention is divided by heads and feed-forward layers by hidden channels (Shoeybi et al., "Megatron-LM", 2019,
    section 3), the layers that scale, shift and gate by the channels they give, convolutions by output channels. What
    is left is whole on each device: embeddings, norms, the first and the last layer. Averages and the optimizer's
    variables lie as their weights do, and the results are those of one device.

    Args:
        mesh: of two axes. Batches are divided along the first, weights along the second, whose size must divide the
            channels of the layers that are divided; if it divides the number of heads too, no head lies on two devices.
        axes: of what the convolutions work on: 1 for series, 2 for images, 3 for volumes. Convolutions of another rank
            raise a ValueError when they are built.

    Returns:
        A map from the paths of variables, to which more may be added: `layout[".*/table"] = (None, "model")`.

    Raises:
        TypeError: if `mesh` is no `DeviceMesh`.
        ValueError: if it has another number of axes than two, or no two names for them; for another value of `axes`.
    """
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        raise TypeError(f"layout_map: `mesh` must be a keras.distribution.DeviceMesh; received: {mesh!r}")
    names = list(mesh.axis_names)
    if len(names) != 2 or not all(isinstance(name, str) and name for name in names) or len({*names}) != 2:
        raise ValueError(
            "layout_map: `mesh` must have two axes with different names, the first for batches and the second for "
            f"weights, such as DeviceMesh((2, 4), ['batch', 'model']); received the shape {tuple(mesh.shape)} with the "
            f"names {names}"
        )
    check_choice("layout_map", "axes", axes, (1, 2, 3))  # the path of a kernel, all that a map is given, has no rank
    layout, model = keras.distribution.LayoutMap(mesh), names[-1]
    for path in _COLUMNS:
        layout[f"{path}/kernel"] = (None, model)
        layout[f"{path}/bias"] = (model,)
    layout[f"{_ROWS}/kernel"] = (model, None)
    layout[f"{_CONVOLUTIONS}/kernel"] = (*[None] * (axes + 1), model)
    layout[f"{_CONVOLUTIONS}/bias"] = (model,)
    return layout
