"""Images of tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

import io
from typing import Any, cast

import numpy as np

from vicreg import source as sources
from vicreg.config import DataConfig
from vicreg.source import Source

# tensorflow-datasets itself fails to ask for the last.
_WITH_TENSORFLOW = "tensorflow tensorflow-datasets importlib_resources"


def open_tfds(config: DataConfig, split: str) -> Source:
    """Opens a split of a data set that was prepared earlier. Decodes no more than one image.

    Args:
      config: `name`, `data_dir` and `canvas` are read.
      split: in the notation of tensorflow-datasets.

    Raises:
      ImportError: tensorflow-datasets is not installed.
      FileNotFoundError: the data set or version isn't there; the message says how to prepare it.
      ValueError: the split isn't there or is empty, it has no labelled images of 8 bits, or is
        stored as only TensorFlow reads it; the message says how to convert it.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError("tensorflow-datasets is missing: pip install 'fourfold[ssl]'") from error
    tfds = cast(Any, tensorflow_datasets)  # its annotations are in the way
    folder = _folder(tfds, config)
    name = f"{config.name.partition(':')[0]}:{folder.name}"
    builder = tfds.builder_from_directory(folder)
    try:
        length = builder.info.splits[split].num_examples
    except ValueError as error:
        raise ValueError(
            f"{name}: {str(error).splitlines()[0]} It has {', '.join(builder.info.splits)}, and "
            "parts of them such as train[:90%]"
        ) from error
    features = dict(builder.info.features.items())
    image: Any = features.get("image")
    classes = getattr(features.get("label"), "num_classes", None)
    if not isinstance(image, tfds.features.Image) or not classes:
        raise ValueError(f"{name} must have an image and a class label; it has {features}")
    if image.np_dtype != np.uint8 or image.shape[-1] not in sources.MODES:
        raise ValueError(f"{name} must have images of uint8 and 1 or 3 channels, found {image}")
    # Images are decoded here like files, and not where labels alone are wanted.
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        records: Any = builder.as_data_source(split, decoders=decoders) if length > 0 else []
    except NotImplementedError as error:
        raise ValueError(
            f"{folder} is stored as {builder.info.file_format.value}, which only TensorFlow reads. "
            f"To convert it once: pip install {_WITH_TENSORFLOW} apache-beam mlcroissant; tfds "
            f"convert_format --dataset_version_dir={folder} --out_file_format=array_record"
        ) from error
    if not records or records[0]["label"] < 0:
        raise ValueError(f"{name}: split {split!r} has no {'labels' if records else 'images'}")

    def fetch(positions: np.ndarray) -> tuple[list[io.BytesIO], np.ndarray]:
        found = records.__getitems__(positions.tolist())
        labels = np.array([record["label"] for record in found], np.int32)
        return [io.BytesIO(record["image"]) for record in found], labels

    name, channels = f"{name}/{split}", image.shape[-1]
    return sources.decoded(name, classes, length, fetch, channels, config.canvas)


def _folder(tfds: Any, config: DataConfig) -> Any:
    """Where the version is, or the newest. `tfds.data_source` would try to download it."""
    root = tfds.core.Path(config.data_dir or tfds.core.constants.DATA_DIR).expanduser()
    dataset, _, wanted = config.name.partition(":")
    folders = {p.parent.name: p.parent for p in (root / dataset).glob("*/dataset_info.json")}
    versions = sorted(filter(tfds.core.Version.is_valid, folders), key=tfds.core.Version)
    if versions and (wanted or versions[-1]) in folders:
        return folders[wanted or versions[-1]]
    # A data set of several configurations, such as emnist/letters, lies one level deeper.
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    there = sorted(f"{p.parent.parent.relative_to(root)}:{p.parent.name}" for p in infos)
    prepare = (
        f"import tensorflow_datasets as tfds; tfds.builder('{config.name}', data_dir='{root}', "
        "file_format='array_record').download_and_prepare()"
    )
    raise FileNotFoundError(
        f"{config.name} is not in {root}, which holds {', '.join(there) or 'no data sets'}. To "
        f'prepare it once: pip install {_WITH_TENSORFLOW}; python -c "{prepare}"'
    )
