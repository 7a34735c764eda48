"""Pairs of texts: only what the two have in common tells, and no film is in two splits."""

from collections import Counter

import numpy as np
import pytest

from efficient_attn import data
from efficient_attn.data import Config, Matching
from efficient_attn.data.base import Text
from efficient_attn.data.matching import Review, pair
from efficient_attn.errors import UserError

WORD = "film {film} number {number} {sentiment}"


def write(root, *, films=40, folder="train", first=0, seed=0):
    """An aclImdb of films with one to seven reviews each, each review saying which one it is of."""
    random = np.random.RandomState(seed)
    lines = {"neg": [], "pos": []}
    for film in range(first, first + films):
        for _ in range(random.randint(1, 8)):
            sentiment = "pos" if random.rand() < (0.8 if film % 2 else 0.2) else "neg"
            number = len(lines[sentiment])
            lines[sentiment].append(f"http://film/{film}")
            path = root / folder / sentiment / f"{number}_{random.randint(1, 11)}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(WORD.format(film=film, number=number, sentiment=sentiment))
    for sentiment, films_of in lines.items():
        (root / folder / f"urls_{sentiment}.txt").write_text("\n".join(films_of) + "\n")


def load(root, **options):
    text = Text(max_len=60)
    return data.load(Config(**{"name": "matching", "path": str(root), "text": text} | options))


def read(source):
    """[(film, film, sentiment, sentiment, label)] and the two texts of each pair."""
    batch = source.gather(np.arange(len(source)))
    facts, both = [], []
    for ids, label in zip(batch["inputs"], batch["label"], strict=True):
        texts = [bytes((row[row > 0] - 1).astype(np.uint8)).decode() for row in ids]
        one, other = (text.split() for text in texts)
        facts.append((int(one[1]), int(other[1]), one[4], other[4], int(label)))
        both.append(texts)
    return facts, both


@pytest.mark.parametrize("own_test", [False, True])
def test_a_pair_belongs_together_when_the_film_is_the_same(tmp_path, own_test):
    write(tmp_path)
    if own_test:
        write(tmp_path, folder="test", first=100, films=20, seed=1)
    loaded = load(tmp_path)
    assert (loaded.info.kind, loaded.info.shape, loaded.info.vocab) == ("pair", (60,), 257)
    assert loaded.info.labels == ("different", "same")
    films = {}
    for split, source in loaded.splits.items():
        batch = source.gather([0, 1, 2])
        assert batch["inputs"].shape == (3, 2, 60) and batch["inputs"].dtype == np.int32
        assert batch["label"].dtype == np.int32 and batch["weight"].tolist() == [1.0] * 3
        facts, texts = read(source)
        films[split] = {film for fact in facts for film in fact[:2]}
        assert all((a == b) == bool(label) for a, b, *_, label in facts)
        assert all(one != other for one, other in texts)
        assert sum(fact[-1] for fact in facts) * 2 == len(facts)
    assert sum(map(len, films.values())) == len(set.union(*films.values()))
    assert (min(films["test"]) >= 100) == own_test


def test_neither_sentiment_nor_a_single_review_tells(tmp_path):
    write(tmp_path, films=80)
    facts, texts = read(load(tmp_path).splits["train"])
    for seen in (
        [fact[2:4] for fact in facts],
        [one for one, _ in texts],
        [other for _, other in texts],
    ):
        same, apart = (
            Counter(x for x, fact in zip(seen, facts, strict=True) if fact[-1] == label)
            for label in (1, 0)
        )
        assert same == apart
    assert len({fact[2:4] for fact in facts}) == 4


@pytest.mark.parametrize(("partners", "met"), [(1, 6), (2, 12), (3, 15), (100, 15)])
def test_each_review_comes_first_with_so_many_others_of_its_film(partners, met):
    reviews = [Review(film, 0, f"{film}{i}") for film in "ab" for i in range(6)]
    reviews += [Review(f"alone {i}", 0, f"c{i}") for i in range(3)]
    made = pair(reviews, partners=partners, seed=0, split="train")
    same = made.pairs[made.labels == 1].tolist()
    assert len(same) == len({frozenset(row) for row in same}) == 2 * met
    if partners < 3:
        assert set(Counter(first for first, _ in same).values()) == {partners}
    assert (made.labels == [1, 0] * (2 * met)).all()


def test_seeds_move_validation_but_not_test(tmp_path):
    write(tmp_path, films=60)
    first, again, other = (load(tmp_path, seed=seed).splits for seed in (0, 0, 1))
    for split in first:
        assert read(first[split]) == read(again[split])
    assert read(first["test"]) == read(other["test"])
    assert read(first["validation"]) != read(other["validation"])


def test_partners_are_an_option_and_repeated_texts_are_dropped(tmp_path):
    write(tmp_path, films=60)
    few, many = (
        len(load(tmp_path, matching=Matching(partners=partners)).splits["train"])
        for partners in (1, 4)
    )
    assert few < many
    for path in (tmp_path / "train" / "pos").iterdir():
        path.write_text("film 1 number 0 pos")
    facts, _ = read(load(tmp_path).splits["train"])
    assert {fact[2:4] for fact in facts} == {("neg", "neg")}


def test_words_are_built_from_the_texts_of_train(tmp_path):
    write(tmp_path)
    loaded = load(tmp_path, text=Text(max_len=5, tokenizer="words", vocab=500))
    assert loaded.splits["test"].gather([0])["inputs"].shape == (1, 2, 5)
    assert 10 < loaded.info.vocab < 200


def test_nothing_may_be_held_out_for_validation(tmp_path):
    write(tmp_path)
    splits = load(tmp_path, validation=0.0).splits
    assert len(splits["validation"]) == 0 < len(splits["train"])
    assert splits["validation"].gather(np.arange(0))["inputs"].shape == (0, 2, 60)


@pytest.mark.parametrize("predict", ["next", "masked"])
def test_tokens_are_not_told_of_pairs(tmp_path, predict):
    write(tmp_path)
    with pytest.raises(UserError, match=f"predict='{predict}' is for .*, not 'matching'"):
        load(tmp_path, text=Text(predict=predict))


def test_a_line_that_is_not_utf8_stops_or_is_left_out(tmp_path):
    for split in ("train", "eval", "test"):
        raw = ("\ufeff" + "".join(lines(split))).encode()
        (tmp_path / f"x.{split}.tsv").write_bytes(raw.replace(b'"three" eval', b"\xff"))
    with pytest.raises(UserError, match=r"x\.eval\.tsv line 2: is not UTF-8; mend it"):
        load(tmp_path)
    with pytest.warns(UserWarning, match="left out 1 of 9 pairs .*line 2: is not UTF-8"):
        made = load(tmp_path, on_error="skip")
    assert [len(made.splits[split]) for split in ("train", "validation", "test")] == [3, 2, 3]


def lines(split):
    return [
        f"1.0\t{split}-1\t{split}-2\tone {split}\ttwo {split}\n",
        f'0.0\t{split}-1\t{split}-3\tone {split}\t"three" {split}\n',
        f"1\t{split}-3\t{split}-2\t\ttwo {split}\n",
    ]


def test_long_range_arenas_files(tmp_path):
    for split in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_text("".join(lines(split)))
    loaded = load(tmp_path)
    for split, name in (("train", "train"), ("validation", "eval"), ("test", "test")):
        batch = loaded.splits[split].gather([0, 1, 2])
        assert batch["label"].tolist() == [1, 0, 1]
        texts = [
            ["".join(chr(i - 1) for i in row if i) for row in both] for both in batch["inputs"]
        ]
        assert texts[0] == [f"one {name}", f"two {name}"]
        assert texts[1] == [f"one {name}", f'"three" {name}']
        assert texts[2] == [f'"three" {name}', f"two {name}"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no pairs: neither \*\.train\.tsv"),
        ({"x.train.tsv": lines("a")}, r"no \*\.eval\.tsv beside it"),
        ({"x.train.tsv": ["1\ta\tb\tc\n"]}, r"x\.train\.tsv, line 1: not label"),
        ({"x.train.tsv": [*lines("a"), "2\ta\tb\tc\td\n"]}, "line 4: not label"),
        ({"x.train.tsv": []}, "is empty"),
        ({"train/urls_pos.txt": ["f\n"]}, r"urls_neg\.txt is missing: line N names the film"),
        ({"train/urls_pos.txt": ["f\n"], "train/urls_neg.txt": []}, "there are too few films"),
        (
            {"train/urls_pos.txt": ["f\n"], "train/urls_neg.txt": [], "train/pos/7_1.txt": ["x"]},
            r"7_1\.txt: .*urls_pos\.txt has no line 7",
        ),
        (
            {
                "train/urls_pos.txt": ["f\n"] * 3,
                "train/urls_neg.txt": [],
                **{f"train/pos/{i}_1.txt": [f"x{i}"] for i in range(3)},
            },
            "the train split has too few films",
        ),
    ],
)
def test_what_cannot_be_used_says_why(tmp_path, files, message):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(content))
    with pytest.raises(UserError, match=message):
        load(tmp_path, validation=0.0, test=0.01)
