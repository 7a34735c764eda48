"""Pairs of sentences: how they are read, encoded, shifted, shortened, and what is refused."""

import gzip

import numpy as np
import pytest

from efficient_attn import data
from efficient_attn.data import Config, bpe
from efficient_attn.data.base import Translation
from efficient_attn.data.loader import eval_batches, train_batches
from efficient_attn.errors import UserError

WORDS = ["a dog", "two cats", "the red house", "one man sings", "a \u2028 sign", "many small birds"]
WORTE = ["ein Hund", "zwei Katzen", "das rote Haus", "ein Mann singt", "ein Ü", "viele Vögel"]
COUNTS = {"train": 60, "val": 6, "test_2016": 7}


def write(root, counts=COUNTS, zipped=(), end="\n"):
    for split, count in counts.items():
        for language, words in (("en", WORDS), ("de", WORTE)):
            lines = [f"{words[n % 6]} {n} {split}" for n in range(count)]
            raw = "".join(line + end for line in lines).encode()
            path = root / f"{split}.{language}"
            if path.name in zipped:
                path = path.with_name(f"{path.name}.gz")
            path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return root


def config(root, options=None, **others):
    options = {"max_len": 24, "vocab": 320} | (options or {})
    given = {"path": str(root), "cache": str(root / "cache")} | others
    return Config(name="translation", translation=Translation(**options), **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return data.load(config(write(tmp_path_factory.mktemp("pairs"), zipped=("train.de",))))


def test_the_splits_are_the_files_line_by_line(made):
    assert {split: len(source) for split, source in made.splits.items()} == {
        "train": 60, "validation": 6, "test": 7,
    }  # fmt: skip
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test_2016")):
        source = made.splits[split]
        for n in range(len(source)):
            expected = tuple(f"{words[n % 6]} {n} {name}" for words in (WORDS, WORTE))
            assert source.texts(n) == expected


def test_the_info_says_what_a_model_reads(made):
    info = made.info
    assert (info.kind, info.shape, info.labels) == ("translation", (24, 24), ())
    assert info.classes == info.vocab == made.splits["train"].tokenizer.vocab
    assert info.per_token
    assert info.tokenizer is made.splits["train"].tokenizer
    assert "en-de; 0 of 60 training pairs longer than 24 were left out" in info.about


def test_a_batch_has_the_target_shifted_and_ends_told(made):
    source = made.splits["test"]
    batch = source.gather(np.array([3, 0]))
    assert {k: (v.shape, v.dtype) for k, v in batch["inputs"].items()} == {
        "source": ((2, 24), np.int32), "target": ((2, 24), np.int32),
    }  # fmt: skip
    assert (batch["label"].dtype, batch["weight"].dtype) == (np.int32, np.float32)
    for row, n in enumerate((3, 0)):
        x, y = (source.tokenizer.encode_all([text])[0] for text in source.texts(n))
        pad = [bpe.PAD] * 24
        assert batch["inputs"]["source"][row].tolist() == [*x, bpe.END, *pad][:24]
        assert batch["inputs"]["target"][row].tolist() == [bpe.START, *y, *pad][:24]
        assert batch["label"][row].tolist() == [*y, bpe.END, *pad][:24]
        assert batch["weight"][row].tolist() == [1.0] * (len(y) + 1) + [0.0] * (23 - len(y))


def test_the_loaders_take_it(made):
    batch = next(train_batches(made.splits["train"], batch_size=4, seed=0))
    assert batch["inputs"]["target"].shape == (4, 24)
    last = list(eval_batches(made.splits["test"], batch_size=4))[-1]
    assert last["weight"][:3].sum() > 0
    assert last["weight"][3:].sum() == 0


def test_the_vocabulary_is_learned_from_train_alone_and_once(made, tmp_path):
    write(tmp_path)
    for language in ("en", "de"):
        (tmp_path / f"val.{language}").write_text("qqq qqq qqq qqq\n" * 50)
    other = data.load(config(tmp_path))
    tokenizer = other.splits["validation"].tokenizer
    assert tokenizer.serialized == made.splits["train"].tokenizer.serialized
    assert len(tokenizer.encode_all(["qqq"])[0]) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_missing_splits_are_held_out_of_train(tmp_path):
    made = data.load(config(write(tmp_path, {"train": 60}), validation=0.1, test=0.2))
    sizes = [len(made.splits[split]) for split in ("train", "validation", "test")]
    assert sizes == [43, 5, 12]
    texts = {source.texts(n) for source in made.splits.values() for n in range(len(source))}
    assert len(texts) == 60


def test_too_long_pairs_are_counted_and_left_out_or_cut_in_train_alone(tmp_path):
    write(tmp_path)
    for name in ("train", "val"):
        for language in ("en", "de"):
            with (tmp_path / f"{name}.{language}").open("a") as file:
                file.write("lang " * 30 + "\n" if language == "de" else "long\n")
    dropped = data.load(config(tmp_path))
    assert [len(dropped.splits[s]) for s in ("train", "validation")] == [60, 7]
    assert "left out, 1 validation and 0 test pairs cut" in dropped.info.about
    assert "1 of 61 training pairs longer than 24 were left out" in dropped.info.about
    assert dropped.splits["train"].texts(59)[0] == f"{WORDS[5]} 59 train"
    assert dropped.splits["validation"].texts(6) == ("long", "lang " * 30)
    cut = data.load(config(tmp_path, {"too_long": "cut"}))
    assert "1 of 61 training pairs longer than 24 were cut" in cut.info.about
    batch = cut.splits["train"].gather([60])
    assert batch["weight"].sum() == 24
    assert bpe.END not in batch["label"]
    np.testing.assert_array_equal(batch["inputs"]["target"][0, 1:], batch["label"][0, :-1])
    with pytest.raises(UserError, match="all 61 training pairs are longer than .*max_len=2"):
        data.load(config(tmp_path, {"max_len": 2}))


def test_empty_sides_leave_train_and_stay_in_test(tmp_path):
    write(tmp_path)
    for name in ("train", "test_2016"):
        for language in ("en", "de"):
            with (tmp_path / f"{name}.{language}").open("a") as file:
                file.write(" \n" if language == "en" else "etwas\n")
    made = data.load(config(tmp_path))
    assert [len(made.splits[s]) for s in ("train", "test")] == [60, 8]
    batch = made.splits["test"].gather([7])
    assert batch["inputs"]["source"][0, :3].tolist() != [0, 0, 0]


def test_windows_line_ends_and_a_missing_last_one_are_no_text(tmp_path):
    write(tmp_path, end="\r\n")
    path = tmp_path / "test_2016.en"
    path.write_bytes(path.read_bytes().removesuffix(b"\r\n"))
    made = data.load(config(tmp_path))
    assert made.splits["test"].texts(6) == ("a dog 6 test_2016", "ein Hund 6 test_2016")


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path)
    path = tmp_path / "test_2016.en"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert data.load(config(tmp_path)).splits["test"].texts(0)[0] == "a dog 0 test_2016"


def test_a_test_split_may_be_empty(tmp_path):
    write(tmp_path, COUNTS | {"test_2016": 0})
    assert len(data.load(config(tmp_path)).splits["test"]) == 0


def test_several_test_sets_want_a_choice(tmp_path):
    write(tmp_path, COUNTS | {"test_2017": 3})
    with pytest.raises(UserError, match=r"several test sets \(test_2016, test_2017\): choose"):
        data.load(config(tmp_path))
    assert len(data.load(config(tmp_path, {"test": "test_2017"})).splits["test"]) == 3
    with pytest.raises(UserError, match="has no test_2018.en and test_2018.de"):
        data.load(config(tmp_path, {"test": "test_2018"}))


def test_a_line_that_is_not_utf8_stops_or_is_left_out_with_its_pair(tmp_path):
    write(tmp_path)
    path = tmp_path / "train.de"
    path.write_bytes(path.read_bytes().replace(b"Katzen 1 ", b"\xff 1 "))
    with pytest.raises(UserError, match=r"train.de line 2: is not UTF-8; mend it, or"):
        data.load(config(tmp_path))
    with pytest.warns(UserWarning, match="left out 1 of 73 pairs .*train.de line 2: is not UTF-8"):
        made = data.load(config(tmp_path, on_error="skip"))
    assert made.splits["train"].texts(1) == (f"{WORDS[2]} 2 train", f"{WORTE[2]} 2 train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train.de").unlink(), r"train.en is there, but not .*train.de \(or"),
        (lambda root: (root / "val.en").unlink(), r"val.de is there, but not .*val.en \(or"),
        (lambda root: [(root / f"train.{x}").unlink() for x in ("en", "de")], "has no train.en an"),
        (lambda root: (root / "val.de").write_text("x\n"), "val.en has 6 lines, but .*de has 1: "),
        (lambda root: (root / "train.en").rename(root / "train.en.gz"), "cannot be read"),
        (lambda root: [(root / f"train.{x}").write_text("") for x in ("en", "de")], "no pair of"),
    ],
)
def test_what_is_wrong_with_the_files_is_told(tmp_path, spoil, message):
    spoil(write(tmp_path))
    with pytest.raises(UserError, match=message):
        data.load(config(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 258}, "vocab must be at least 259"),
        ({"max_len": 1}, "max_len must be at least 2"),
        ({"source": "de"}, "source and target are both 'de'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Translation(**options)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="--config.data.path"):
        data.load(config(tmp_path, path=""))
