import itertools
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from efficient_attn import data
from efficient_attn.data import Config, Text
from efficient_attn.errors import UserError

PACKS = Path(__file__).parents[2].parent / "shared" / "data"


def write(root, counts, *, words="film"):
    """{"train/pos": 10, ...} files, each of its own text."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            (root / folder / f"{n}.txt").write_text(f"{words} {folder} {n}", encoding="utf-8")


def load(root, **options):
    return data.load(Config(name="text_folder", path=str(root), **options))


def texts(source):
    inputs = source.gather(np.arange(len(source)))["inputs"]
    return [bytes((row[row > 0] - 1).astype(np.uint8)).decode() for row in inputs]


def test_the_layout_of_aclimdb(tmp_path):
    write(tmp_path, {"train/pos": 20, "train/neg": 20, "test/pos": 3, "test/neg": 2})
    write(tmp_path, {"train/unsup": 5})
    (tmp_path / "train" / "urls_pos.txt").write_text("beside the classes")
    (tmp_path / "train" / "pos" / ".hidden").write_text("hidden")
    write(tmp_path, {"train/pos/.ipynb_checkpoints/deep": 3})
    loaded = load(tmp_path, text=Text(max_len=30))
    assert loaded.info.kind == "tokens" and loaded.info.shape == (30,)
    assert loaded.info.labels == ("neg", "pos") and loaded.info.vocab == 257
    assert {split: len(source) for split, source in loaded.splits.items()} == {
        "train": 36,
        "validation": 4,
        "test": 5,
    }
    for split, source in loaded.splits.items():
        for n, text in enumerate(texts(source)):
            folder = "test" if split == "test" else "train"
            assert text.startswith(f"film {folder}/{loaded.info.labels[source[n]['label']]} ")
    assert len({text for source in loaded.splits.values() for text in texts(source)}) == 45


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path, {"a": 3, "b": 3}, words="\ufefffilm")
    assert {text[:5] for text in texts(load(tmp_path).splits["train"])} == {"film "}


@pytest.mark.parametrize("name", ["test", "val"])
def test_splits_without_train_are_no_classes(tmp_path, name):
    write(tmp_path, {f"{name}/a": 3, f"{name}/b": 3, "training/a": 3})
    with pytest.raises(UserError, match=f"has {name}/ but no train/: put the classes to train on"):
        load(tmp_path)


def test_without_a_test_folder_test_comes_out_of_train_and_info_says_so(tmp_path):
    write(tmp_path, {"train/a": 50, "train/b": 50})
    loaded = load(tmp_path)
    sets = [set(texts(source)) for source in loaded.splits.values()]
    assert sorted(map(len, sets)) == [8, 20, 72]
    assert len(set.union(*sets)) == 100
    assert "test: 20% held out of train by a fixed seed" in loaded.info.about
    other = load(tmp_path, seed=1)
    assert texts(other.splits["test"]) == texts(loaded.splits["test"])
    assert texts(other.splits["validation"]) != texts(loaded.splits["validation"])


def test_class_folders_alone(tmp_path):
    write(tmp_path, {"a": 10, "b": 10, "c/deeper": 10})
    loaded = load(tmp_path)
    assert loaded.info.labels == ("a", "b", "c")
    assert sum(map(len, loaded.splits.values())) == 30


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_a_validation_folder_is_used(tmp_path, name):
    write(tmp_path, {"train/a": 10, f"{name}/a": 3, "test/a": 2})
    loaded = load(tmp_path)
    assert all(text.startswith(f"film {name}/a") for text in texts(loaded.splits["validation"]))
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [10, 3, 2]


def test_words_are_those_of_train_alone(tmp_path):
    write(tmp_path, {"train/a": 20}, words="known")
    write(tmp_path, {"test/a": 5}, words="strange")
    loaded = load(tmp_path, validation=0.5, text=Text(tokenizer="words", max_len=9))
    # "known", "train", "/", "a" and the 10 numbers that stayed in train, padding and unknown.
    assert loaded.info.vocab == 16
    test = loaded.splits["test"].gather([0])["inputs"][0]
    assert test[0] == 1 and test[1] == 1 and test[2] > 1
    validation = loaded.splits["validation"].gather(np.arange(10))["inputs"]
    np.testing.assert_array_equal(validation[:, 4], 1)


def test_an_empty_file_is_one_token(tmp_path):
    write(tmp_path, {"train/a": 1, "test/a": 1})
    (tmp_path / "train" / "a" / "0.txt").write_text("")
    loaded = load(tmp_path)
    np.testing.assert_array_equal(loaded.splits["train"].gather([0])["inputs"][0, :2], [33, 0])


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path, {"train/a": 4})
    (tmp_path / "train" / "a" / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(
        UserError, match=r"bad\.txt: is not UTF-8 \(byte 0xe9 at 3\).*on_error=skip"
    ):
        load(tmp_path)


def test_or_left_out_counted_and_told_once(tmp_path):
    write(tmp_path, {"train/a": 20})
    for n in range(7):
        (tmp_path / "train" / "a" / f"bad{n}.txt").write_bytes(b"caf\xe9")
    with pytest.warns(UserWarning) as caught:
        loaded = load(tmp_path, on_error="skip")
    (warning,) = caught
    assert "left out 7 of 27 files" in str(warning.message)
    assert "bad0.txt" in str(warning.message) and "and 2 more" in str(warning.message)
    assert "bad5.txt" not in str(warning.message)
    assert sum(map(len, loaded.splits.values())) == 20


def test_no_warning_when_nothing_is_left_out(tmp_path):
    write(tmp_path, {"train/a": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, on_error="skip")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, r"no text files in .*: put them in .*/train/<class>/"),
        ({"train": 0}, "no text files"),
        ({"train/a": 3, "train/b": 0}, "train/b is empty"),
        ({"train/a": 3, "test": 0}, "test is empty"),
        ({"train/a": 3, "test/z": 1}, "has a class 'z' that .*train has not"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, folders, message):
    write(tmp_path, folders)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_folder_that_is_missing_or_not_given(tmp_path):
    with pytest.raises(UserError, match="is not a folder that exists"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="data.path"):
        data.load(Config(name="text_folder"))


def test_texts_that_are_all_unreadable(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "bad.txt").write_bytes(b"\xff")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no text of the train split"):
        load(tmp_path, on_error="skip")


@pytest.mark.skipif(not (PACKS / "imdb_train.tar.xz").exists(), reason="shared/data is not here")
def test_imdb_as_it_unpacks(tmp_path):
    with tarfile.open(PACKS / "imdb_train.tar.xz") as pack:
        # Its first files are all of one class: to save time the other is made up.
        for member in itertools.islice(pack, 301):
            pack.extract(member, tmp_path, filter="data")
    write(tmp_path / "aclImdb", {"train/neg": 300})
    loaded = load(tmp_path / "aclImdb", text=Text(max_len=1000))
    assert loaded.info.labels == ("neg", "pos")
    assert sum(map(len, loaded.splits.values())) == 600
