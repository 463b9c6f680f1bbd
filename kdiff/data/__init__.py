"""Image pipelines: `kdiff.data.images` makes a `tf.data.Dataset` for `model.fit` on every backend.

    dataset = kdiff.data.images("digits", image_size=16, batch_size=64)
    dataset = kdiff.data.images("cifar10", data_dir="~/tensorflow_datasets", labels=True)
    dataset = kdiff.data.images("photos/", image_size=64, augment=keras.layers.RandomFlip("horizontal"))
    dataset = kdiff.data.images("shapes", image_size=32, text=True, text_encoder=kdiff.text.Bytes(80))

An image is float32 in [-1, 1] with shape `(height, width, channels)`. The core of kdiff does not import this package,
and so does not need TensorFlow; this package needs the extra `data`.
"""

from kdiff.data.pairs import load_pairs, save_pairs
from kdiff.data.pipeline import images
from kdiff.data.shards import write_shards
from kdiff.data.sources import EMBEDDED

__all__ = ["EMBEDDED", "images", "load_pairs", "save_pairs", "write_shards"]
