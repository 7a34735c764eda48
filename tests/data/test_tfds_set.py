"""Sets are built here without TensorFlow, which works for array_record and encoded images."""

import importlib
import json
import shutil
import sys
import textwrap

import numpy as np
import pytest

from efficient_attn import data
from efficient_attn.data import Config, Image, Text
from efficient_attn.data.sources import Arrays, Items
from efficient_attn.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

# TFDS wants a builder to live in a package.
BUILDERS = """
import io
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

F = tfds.features


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    COUNTS = {}
    FEATURES = {}
    KEYS = None

    def _info(self):
        return self.dataset_info_from_configs(
            features=F.FeaturesDict(self.FEATURES), supervised_keys=self.KEYS
        )

    def _split_generators(self, manager):
        return {split: self._generate_examples(split, n) for split, n in self.COUNTS.items()}

    def _generate_examples(self, split, count):
        for n in range(count):
            yield n, self.example(split, n)


class TinyImages(Tiny):
    COUNTS = {"train": 30, "test": 6}
    FEATURES = {
        "image": F.Image(shape=(5, 4, 1)),
        "label": F.ClassLabel(names=["cat", "dog", "eel"]),
        "id": F.Text(),
    }
    KEYS = ("image", "label")

    def example(self, split, n):
        pixels = np.full((5, 4), 7 * n, np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "png")
        file.seek(0)
        return {"image": file, "label": n % 3, "id": f"{split}{n}"}


class TinyAnySize(TinyImages):
    COUNTS = {"train": 20}
    FEATURES = {"picture": F.Image(shape=(None, None, 3)), "kind": F.ClassLabel(num_classes=2)}
    KEYS = None

    def example(self, split, n):
        file = io.BytesIO()
        PIL.Image.fromarray(np.full((4 + n, 6, 3), n, np.uint8)).save(file, "png")
        file.seek(0)
        return {"picture": file, "kind": n % 2}


class TinyTexts(Tiny):
    COUNTS = {"train": 20, "validation": 5, "test": 4}
    FEATURES = {"text": F.Text(), "label": F.ClassLabel(names=["no", "yes"])}
    KEYS = ("text", "label")

    def example(self, split, n):
        return {"text": f"{split} number {n} caf\\u00e9", "label": n % 2}


class TinyUnlabelled(TinyTexts):
    def example(self, split, n):
        return {"text": f"{split} number {n}", "label": -1 if split == "test" else n % 2}


class TinyBroken(TinyTexts):
    def example(self, split, n):
        return {"text": b"caf\\xe9" if n == 3 else f"{split} {n}".encode(), "label": n % 2}


class TinyNumbers(Tiny):
    COUNTS = {"train": 2}
    FEATURES = {"x": F.Scalar(np.int64), "label": F.ClassLabel(num_classes=2)}

    def example(self, split, n):
        return {"x": n, "label": n % 2}


class TinyTestOnly(TinyTexts):
    COUNTS = {"test": 4}
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Every set of BUILDERS, prepared in one folder; its path."""
    root = tmp_path_factory.mktemp("tfds")
    package = root / "package" / "tiny_sets"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "builders.py").write_text(textwrap.dedent(BUILDERS))
    sys.path.insert(0, str(package.parent))
    try:
        builders = importlib.import_module("tiny_sets.builders")
    finally:
        sys.path.pop(0)
    folder = root / "data"
    for name, kind in vars(builders).items():
        if name.startswith("Tiny") and name != "Tiny":
            kind(data_dir=folder, file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    return str(folder)


def load(sets, name, **options):
    return data.load(Config(name="tfds", tfds=name, path=sets, **options))


def everything(source):
    return source.gather(np.arange(len(source)))


@pytest.mark.parametrize(("memory_mb", "kind"), [(512, Arrays), (0, Items)])
def test_images(sets, memory_mb, kind):
    loaded = load(sets, "tiny_images", image=Image(memory_mb=memory_mb))
    assert loaded.info.kind == "image" and loaded.info.shape == (5, 4, 1)
    assert loaded.info.labels == ("cat", "dog", "eel")
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [27, 3, 6]
    assert isinstance(loaded.splits["train"], kind)
    seen = [everything(loaded.splits[s]) for s in ("train", "validation")]
    values = np.concatenate([batch["inputs"][:, 0, 0, 0] * 255 for batch in seen])
    labels = np.concatenate([batch["label"] for batch in seen])
    number = np.rint(values / 7).astype(int)
    np.testing.assert_array_equal(np.sort(number), np.arange(30))
    np.testing.assert_array_equal(labels, number % 3)
    assert "tensorflow" not in sys.modules


def test_images_as_pixels(sets):
    loaded = load(sets, "tiny_images", image=Image(layout="pixels"))
    assert loaded.info.shape == (20,) and loaded.info.vocab == 257
    tokens = everything(loaded.splits["test"])["inputs"]
    np.testing.assert_array_equal(np.unique(tokens), 7 * np.arange(6) + 1)


def test_images_of_many_sizes_need_one(sets):
    with pytest.raises(UserError, match=r"differ in size.*data\.image\.size"):
        load(sets, "tiny_any_size")
    loaded = load(sets, "tiny_any_size", image=Image(size=6))
    assert loaded.info.shape == (6, 6, 3) and loaded.info.labels == ("0", "1")
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [14, 2, 4]
    batch = everything(loaded.splits["train"])
    np.testing.assert_array_equal(np.rint(batch["inputs"][:, 0, 0, 0] * 255) % 2, batch["label"])


def test_texts(sets):
    loaded = load(sets, "tiny_texts", text=Text(max_len=40))
    assert loaded.info.kind == "tokens" and loaded.info.labels == ("no", "yes")
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [20, 5, 4]
    for split, source in loaded.splits.items():
        batch = everything(source)
        for ids, label in zip(batch["inputs"], batch["label"], strict=True):
            text = bytes((ids[ids > 0] - 1).astype(np.uint8)).decode()
            assert text.startswith(split) and text.endswith("café")
            assert int(text.split()[2]) % 2 == label


def test_words(sets):
    loaded = load(sets, "tiny_texts", text=Text(max_len=9, tokenizer="words"))
    assert loaded.info.vocab == 2 + 3 + 20  # train, number, café and 20 numbers


def test_an_unlabelled_test_split_is_replaced_by_validation(sets):
    loaded = load(sets, "tiny_unlabelled")
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [18, 2, 5]
    assert min(everything(source)["label"].min() for source in loaded.splits.values()) == 0


def test_texts_as_documents_of_a_language_model(sets):
    """Every split's texts, the test split's too where it has no labels; each told whole."""
    options = Text(predict="next", packing="pad", max_len=50)
    loaded = load(sets, "tiny_unlabelled", text=options)
    assert loaded.info.kind == "text" and loaded.info.about.count("the set's own") == 2
    for split, count in (("train", 20), ("validation", 5), ("test", 4)):
        labels = everything(loaded.splits[split])["label"]
        found = {loaded.info.tokenizer.decode(row) for row in labels}
        assert found == {f"{split} number {n}" for n in range(count)}
    masked = load(sets, "tiny_texts", text=Text(predict="masked", max_len=50))
    assert masked.info.kind == "masked"
    with pytest.raises(UserError, match="has no text that stands out: it holds x, label"):
        load(sets, "tiny_numbers", text=options)


def test_a_text_that_is_not_utf8(sets):
    with pytest.raises(UserError, match=r"tiny_broken train example \d+: is not UTF-8"):
        load(sets, "tiny_broken")
    with pytest.warns(UserWarning, match="left out 3 of 29 texts"):
        loaded = load(sets, "tiny_broken", on_error="skip")
    assert sum(map(len, loaded.splits.values())) == 26


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"needs the set's name: --config\.data\.tfds=mnist"),
        ("mnits", "unknown TFDS set 'mnits'; did you mean 'mnist'"),
        ("nmist/x", "mnist.*; nor is there a folder 'nmist/x'"),
        ("mnist/strange", "'mnist/strange' cannot be opened"),
        ("mnist:9.9.9", "'mnist:9.9.9' cannot be opened: .*only: "),
        ("tiny_numbers", "no classification of images or texts: it holds x .Scalar"),
        ("tiny_test_only", "has no split 'train', only test"),
    ],
)
def test_sets_that_cannot_be_used(sets, name, message):
    with pytest.raises(UserError, match=message):
        load(sets, name)


def test_an_error_without_words_is_named(sets, monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(tfds, "builder", fail)
    with pytest.raises(UserError, match="'mnist' cannot be opened: AssertionError"):
        load(sets, "mnist")


def test_a_set_that_is_not_prepared_is_told_with_the_command(tmp_path):
    with pytest.raises(UserError) as caught:
        load(str(tmp_path), "mnist")
    message = str(caught.value)
    assert "not prepared" in message and "TensorFlow" in message and "\n" not in message
    command = f"tfds.builder('mnist', data_dir='{tmp_path}', file_format='array_record')"
    assert (
        f'pip install tensorflow && python -c "import tensorflow_datasets as tfds; {command}'
        in (message)
    )
    assert list(tmp_path.iterdir()) == []


def test_a_set_prepared_for_tensorflow_alone_is_told_so(tmp_path, sets):
    shutil.copytree(f"{sets}/tiny_texts", tmp_path / "tiny_texts")
    (facts,) = tmp_path.rglob("dataset_info.json")
    facts.write_text(
        json.dumps(json.loads(facts.read_text()) | {"fileFormat": "tfrecord"}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="only TensorFlow reads; move it away and prepare it"):
        load(str(tmp_path), "tiny_texts")
