"""Networks that are too large for one device: how their weights are divided among several, on JAX."""

import keras

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
        mesh: of two axes. Batches are divided along the first, weights along the last, whose size must divide the
            number of heads and the channels.
        axes: of what the convolutions work on: 1 for series, 2 for images, 3 for volumes.

    Returns:
        A map from the paths of variables, to which more may be added: `layout[".*/table"] = (None, "model")`.
    """
    layout, model = keras.distribution.LayoutMap(mesh), mesh.axis_names[-1]
    for path in _COLUMNS:
        layout[f"{path}/kernel"] = (None, model)
        layout[f"{path}/bias"] = (model,)
    layout[f"{_ROWS}/kernel"] = (model, None)
    layout[f"{_CONVOLUTIONS}/kernel"] = (*[None] * (axes + 1), model)
    layout[f"{_CONVOLUTIONS}/bias"] = (model,)
    return layout
