"""`tfds`: any image or text classification set of TensorFlow Datasets, read without TensorFlow."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from efficient_attn.data import images, language, texts
from efficient_attn.data.base import Config, Dataset
from efficient_attn.data.faults import Faults
from efficient_attn.data.progress import track
from efficient_attn.data.sources import Arrays, Items, complete
from efficient_attn.errors import UserError, unknown

Records = dict[str, Sequence[Any]]


def load(config: Config) -> Dataset:
    """The set `config.tfds` out of `config.path` (TFDS's own folder by default); never downloads.

    Its splits "train", "validation" and "test" are used, others are not. Where test comes without
    labels (GLUE) or not at all (ImageNet), validation serves as test. What is then missing is held
    out of train.

    Raises:
        UserError: the set is unknown, not prepared, prepared in a format that only TensorFlow
            reads, or not a classification of images or texts.
    """
    import tensorflow_datasets as tfds

    builder = open_set(config)
    features = builder.info.features
    keys = [key for key in builder.info.supervised_keys or () if isinstance(key, str)]
    label = _feature(features, tfds.features.ClassLabel, keys)
    image = _feature(features, tfds.features.Image, keys)
    text = _feature(features, tfds.features.Text, keys)
    if config.text.predict in ("next", "masked"):
        return _language(builder, text, config)
    if label is None or (image is None and text is None):
        kinds = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
        raise UserError(
            f"TFDS set {config.tfds!r} is no classification of images or texts: it holds {kinds}"
        )
    records = read_splits(builder, config, label=label)
    labels = tuple(features[label].names)
    if image is None or text in keys:
        return texts.dataset(_texts(records, text, label, config), config, labels=labels)
    shape = _shape(features[image], config)
    found: dict[str, Arrays | Items] = {}
    for split, source in records.items():
        items = Items(
            partial(_image, source, image, label),
            np.zeros(len(source), np.int32),
            shape=shape,
            fit=partial(images.fit, size=shape[:2], options=config.image),
            finish=images.finish(config.image),
        )
        found[split] = images.keep(items, config.image, text=f"reading {split} images")
    splits, about = complete(found, config)
    return Dataset(images.info(config.image, shape=shape, labels=labels, about=about), splits)


def open_set(config: Config) -> Any:
    """The builder of the set `config.tfds`.

    Raises:
        UserError: the set is not named, unknown, or cannot be opened.
    """
    import tensorflow_datasets as tfds

    if not config.tfds:
        raise UserError(
            "data.name='tfds' needs the set's name: --config.data.tfds=mnist, for example"
        )
    try:
        return tfds.builder(config.tfds, data_dir=config.path or None)
    except tfds.core.DatasetNotFoundError:
        name = config.tfds.partition("/")[0].partition(":")[0]
        sets = tfds.list_builders(with_community_datasets=False)
        nearest = str(unknown("TFDS set", name, sets)).partition(" known:")[0].rstrip(";")
        folder = f"; nor is there a folder {config.tfds!r}" if "/" in config.tfds else ""
        raise UserError(f"{nearest} (tfds.list_builders() lists all){folder}") from None
    except (ValueError, AssertionError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(" Here are")[0]
        raise UserError(f"TFDS set {config.tfds!r} cannot be opened: {reason}") from error


def _feature(features: Any, kind: type, keys: list[str]) -> str | None:
    """The feature of this kind that the set names as input or label, else the only one."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    named = [name for name in names if name in keys]
    if named:
        return named[0]
    return names[0] if len(names) == 1 else None


def read_splits(builder: Any, config: Config, *, label: str | None = None) -> Records:
    """The splits that can be used, as random-access sequences of examples.

    label: the feature without which, where it is negative, test does not count.

    Raises:
        UserError: the set is not prepared, or only TensorFlow can read it; it has no train split.
    """
    where = f", data_dir={config.path!r}" if config.path else ""
    prepare = (
        'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({config.tfds!r}{where}, file_format='array_record').download_and_prepare()\""
    )
    if not builder.is_prepared():
        raise UserError(
            f"TFDS set {config.tfds!r} is not prepared in {builder.data_dir}; preparing it needs "
            f"TensorFlow and the network, once: {prepare}"
        )
    if "train" not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise UserError(f"TFDS set {config.tfds!r} has no split 'train', only {known}")
    try:
        found = {
            split: builder.as_data_source(split, file_format="array_record")
            for split in ("train", "validation", "test")
            if split in builder.info.splits
        }
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"TFDS set {config.tfds!r} in {builder.data_dir} is stored in a format that only "
            f"TensorFlow reads; move it away and prepare it as array_record: {prepare}"
        ) from error
    if label and "test" in found and int(found["test"][0][label]) < 0:
        del found["test"]
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return found


def _texts(
    records: Records, text: str | None, label: str | None, config: Config
) -> dict[str, texts.Labelled]:
    """The texts that are UTF-8, each with its label, or with 0 where none is asked for."""
    faults = Faults(config.on_error)
    found: dict[str, texts.Labelled] = {}
    for split, source in records.items():
        found[split] = []
        numbers = track(range(len(source)), total=len(source), text=f"reading {split} texts")
        for number in numbers:
            example = source[number]
            raw = example[text]
            try:
                raw = raw.decode("utf-8") if isinstance(raw, bytes) else str(raw)
            except UnicodeDecodeError:
                faults.add(f"{config.tfds} {split} example {number}", "is not UTF-8")
                continue
            found[split].append((raw, int(example[label]) if label else 0))
    faults.report(total=sum(map(len, records.values())), what="texts")
    return found


def _language(builder: Any, text: str | None, config: Config) -> Dataset:
    """The set's texts as documents, whatever labels they have."""
    if text is None:
        names = ", ".join(builder.info.features)
        raise UserError(f"TFDS set {config.tfds!r} has no text that stands out: it holds {names}")
    found = _texts(read_splits(builder, config), text, None, config)
    documents = {split: [raw for raw, _ in pairs] for split, pairs in found.items()}
    return language.dataset(documents, config, task=config.text.predict)


def _shape(feature: Any, config: Config) -> tuple[int, int, int]:
    """(H, W, C) that images of this feature are brought to."""
    height, width, channels = feature.shape
    if feature.np_dtype != np.uint8:
        raise UserError(f"TFDS set {config.tfds!r} has images of {feature.np_dtype}, not of uint8")
    if config.image.size:
        height = width = config.image.size
    elif not height or not width:
        raise UserError(
            f"the images of TFDS set {config.tfds!r} differ in size: name the size to bring them "
            f"to in --config.data.image.size"
        )
    return height, width, 1 if channels == 1 else 3


def _image(source: Sequence[Any], image: str, label: str, number: int) -> tuple[np.ndarray, int]:
    example = source[number]
    return np.asarray(example[image])[..., :3], int(example[label])  # transparency is dropped
