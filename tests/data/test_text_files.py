"""`text_files`: what is read, what is held out, what each id stands for."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from efficient_attn import data
from efficient_attn.data import Config, Text, language
from efficient_attn.errors import UserError
from tests.data.test_rows import everything

PACKS = Path(__file__).parents[2].parent / "shared" / "data"
STORY = "".join(f"line {n} of the story\n" for n in range(50))


def load(path, *, cache="", test=0.2, validation=0.1, **text):
    options = {"max_len": 16, "vocab": 300} | text
    return data.load(
        Config(
            name="text_files", path=str(path), cache=str(cache), test=test, validation=validation,
            text=Text(**options),
        )
    )  # fmt: skip


def text_of(loaded, split):
    """The tokens that a split tells, as text."""
    told = everything(loaded.splits[split])
    return loaded.info.tokenizer.decode(told["label"][told["weight"] > 0])


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, newline="")
    return root


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe"])
def test_a_file_is_cut_into_three_and_told_once_and_whole(tmp_path, tokenizer):
    path = write(tmp_path, {"a.txt": "naïve café\n" + STORY}) / "a.txt"
    loaded = load(path, tokenizer=tokenizer, cache=tmp_path)
    told = [text_of(loaded, split) for split in ("train", "validation", "test")]
    assert "".join(told) == "naïve café\n" + STORY
    total = len(STORY) + 11
    assert [len(t) for t in told] == [pytest.approx(total * s, abs=1) for s in (0.72, 0.08, 0.2)]
    assert "validation: the last 10% of train, in one piece" in loaded.info.about
    info = loaded.info
    assert info.kind == "text" and info.per_token and info.shape == (16,) and info.labels == ()
    assert info.classes == info.vocab == info.units.shape[0]
    labels = everything(loaded.splits["train"])["label"]
    size = info.units[labels].sum()
    assert size == len(told[0].encode() if info.unit == "byte" else told[0])
    assert info.unit == ("character" if tokenizer == "chars" else "byte")
    assert info.units_per_token == pytest.approx(size / (np.sum(labels > 0) + 1))


def test_a_vocabulary_is_built_from_train_alone(tmp_path):
    path = write(tmp_path, {"a.txt": "abc" * 100 + "xyz" * 50}) / "a.txt"
    loaded = load(path, tokenizer="chars", test=0.1)
    assert loaded.info.tokenizer.characters[2:] == ("a", "b", "c", "x", "y", "z")
    loaded = load(path, tokenizer="chars", test=0.33)
    assert loaded.info.tokenizer.characters[2:] == ("a", "b", "c")
    assert set(text_of(loaded, "test")) == {"\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("wiki.train.txt", "wiki.validation.txt", "wiki.test.txt"),
        ("train/a.txt", "val/deep/b.txt", "test/c.txt"),
    ],
)
def test_a_folder_brings_its_own_splits(tmp_path, names):
    texts = ["to train", "to validate", "to test"]
    write(tmp_path, dict(zip(names, texts, strict=True)) | {"notes.txt": "not read"})
    write(tmp_path, {"train/.ipynb_checkpoints/a.txt": "hidden"})
    loaded = load(tmp_path, tokenizer="bytes")
    assert [text_of(loaded, s) for s in ("train", "validation", "test")] == texts
    assert "test: the set's own" in loaded.info.about
    assert "1 files are of no split" in loaded.info.about


def test_a_validation_file_alone_is_text_like_any_other(tmp_path):
    loaded = load(write(tmp_path, {"valid.txt": STORY}), tokenizer="bytes")
    assert "".join(text_of(loaded, s) for s in ("train", "validation", "test")) == STORY


def test_held_out_parts_run_through_documents():
    first, last = language.part(["abcd", "efgh", "ij"], 0.5)
    assert (first, last) == (["abcd", "e"], ["fgh", "ij"])
    assert language.part(["abcd"], 0.0) == (["abcd"], [])


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("files", ["one\ntwo\n\n \nthree\n", "four"]),
        ("paragraphs", ["one\ntwo", "three", "four"]),
        ("lines", ["one", "two", "three", "four"]),
    ],
)
@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_documents(tmp_path, documents, expected, packing):
    write(tmp_path, {"train/a.txt": "one\ntwo\n\n \nthree\n", "train/b.txt": "four"})
    write(tmp_path, {"val.txt": "x", "val/c.txt": "x", "test/d.txt": "x"})
    loaded = load(tmp_path, documents=documents, packing=packing, max_len=40)
    told = everything(loaded.splits["train"])["label"]
    told = told[told > 0]
    ends = np.flatnonzero(told == loaded.info.end)
    pieces = np.split(told, ends)
    found = sorted(t for t in map(loaded.info.tokenizer.decode, pieces) if t)
    assert found == sorted(expected)
    assert len(ends) == len(expected)
    assert loaded.info.units[told].sum() == sum(map(len, expected)), "an end is no byte"


def test_words_have_no_unit_and_masks_no_bits(tmp_path):
    path = write(tmp_path, {"a.txt": STORY}) / "a.txt"
    assert load(path, tokenizer="words").info.unit is None
    masked = load(path, tokenizer="words", predict="masked")
    assert masked.info.kind == "masked" and masked.info.unit is None
    assert masked.info.vocab == masked.info.tokenizer.vocab + 2 <= 300
    assert masked.splits["train"].mask == masked.info.vocab - 1
    bpe = load(path, tokenizer="bpe", predict="masked", cache=tmp_path)
    assert bpe.info.vocab == bpe.info.tokenizer.vocab + 1 <= 300 and bpe.info.end == 1


@pytest.mark.parametrize(
    ("files", "text", "says"),
    [
        ({"a.md": "x"}, {}, "no .txt file in"),
        ({"train.txt": "", "test.txt": "x"}, {}, "the train split holds no text"),
        ({"a.txt": "x"}, {"predict": "label"}, "text_files has no labels"),
    ],
)
def test_what_cannot_be_read(tmp_path, files, text, says):
    with pytest.raises(UserError, match=says):
        load(write(tmp_path, files), **text)


def test_paths_and_options_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="name a file or folder in data.path"):
        load("")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        load(tmp_path / "none")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt: is not UTF-8 \(byte 0xe9 at 3\)"):
        load(tmp_path)
    with pytest.raises(UserError, match="packing must be 'pad' or 'stream', not 'pack'"):
        Text(predict="masked", packing="pack")
    with pytest.raises(UserError, match="is for data.name 'text_files' and 'tfds'"):
        data.load(Config(name="text_folder", path=str(tmp_path), text=Text(predict="next")))


@pytest.mark.skipif(not (PACKS / "lm_text.tar.xz").exists(), reason="shared/data is not here")
def test_tiny_shakespeare(tmp_path):
    with tarfile.open(PACKS / "lm_text.tar.xz") as pack:
        member = "tinyshakespeare/data/tinyshakespeare/input.txt"
        pack.extract(member, tmp_path, filter="data")
    loaded = load(tmp_path, tokenizer="chars", max_len=256)
    assert loaded.info.vocab == 68, "65 characters, padding, unknown, end"
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [3138, 349, 872]
    assert text_of(loaded, "train").startswith("First Citizen:\nBefore we proceed any further")
