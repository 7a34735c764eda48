import functools
import hashlib
import os
import re
import statistics
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from efficient_attn import data
from efficient_attn.data import Config, ListOps, cache, listops
from efficient_attn.errors import UserError

SMALL = ListOps(min_length=10, max_length=60, train=600, validation=100, test=100, processes=1)
SMALL_BYTES, SMALL_KEY = "132a1e7e31d6f331", "ed155d52492f337c"


@functools.cache
def small(seed):
    return listops.generate(SMALL, seed=seed)


def evaluate(text):
    """The value of an expression, by rewriting innermost expressions; shares no code with ours."""
    rules = {
        "MIN": min,
        "MAX": max,
        "MED": lambda values: int(statistics.median(values)),
        "SM": lambda values: sum(values) % 10,
    }
    innermost = re.compile(r"\[(MIN|MAX|MED|SM)((?: \d)+) \]")
    while not text.isdigit():
        text, count = innermost.subn(
            lambda match: str(rules[match[1]]([int(d) for d in match[2].split()])), text
        )
        assert count, f"not an expression: {text}"
    return int(text)


def depth(text):
    """Nodes from the root to the deepest digit."""
    opened = deepest = 0
    for token in text.split():
        opened += token.startswith("[") - (token == "]")
        deepest = max(deepest, opened + token.isdigit())
    return deepest


def rows(source):
    return source.gather(np.arange(len(source)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[SM 9 9 9 ]", 7),
        ("[MED 1 2 ]", 1),
        ("[MED 3 9 ]", 6),
        ("[MED 9 0 4 ]", 4),
        ("[MED 7 1 8 2 ]", 4),
        ("[MIN [SM 5 5 ] 3 ]", 0),
    ],
)
def test_known_expressions(text, value):
    assert evaluate(text) == value
    ids = listops.encode(text)
    assert listops.decode(ids) == text
    assert apply_by_the_generators_rules(text) == value


def apply_by_the_generators_rules(text):
    stack = []
    for token in text.split():
        if token != "]":
            stack.append(int(token) if token.isdigit() else token)
            continue
        values = []
        while isinstance(stack[-1], int):
            values.append(stack.pop())
        stack.append(listops._apply(stack.pop(), values))
    return stack[0]


def test_labels_lengths_and_depths(tmp_path):
    options = replace(SMALL, max_depth=5, max_args=4, max_length=30)
    loaded = data.load(Config(name="listops", cache=str(tmp_path), listops=options))
    assert loaded.info.kind == "tokens" and loaded.info.shape == (30,)
    assert loaded.info.vocab == 16 and loaded.info.labels == tuple("0123456789")
    depths, lengths, arguments = set(), set(), set()
    for split, source in loaded.splits.items():
        assert len(source) == getattr(options, split)
        batch = rows(source)
        assert batch["inputs"].dtype == np.int32 and batch["inputs"].shape[1] == 30
        for ids, label in zip(batch["inputs"], batch["label"], strict=True):
            text = listops.decode(ids)
            assert evaluate(text) == label
            depths.add(depth(text))
            lengths.add(len(text.split()))
            assert np.all(ids[: len(text.split())] > 0) and np.all(ids[len(text.split()) :] == 0)
            arguments |= {len(m.split()) for m in re.findall(r"\[\w+((?: \d)+) \]", text)}
    assert max(depths) == 5
    assert min(lengths) == 10 and max(lengths) == 30
    assert arguments == {2, 3, 4}


def test_all_operators_and_digits_occur_and_brackets_are_kept(tmp_path):
    loaded = data.load(Config(name="listops", cache=str(tmp_path), listops=SMALL))
    tokens = rows(loaded.splits["train"])["inputs"]
    assert set(np.unique(tokens)) == set(range(16))
    opened = np.isin(tokens, [listops.TOKENS.index(t) for t in ("[MIN", "[MAX", "[MED", "[SM")])
    np.testing.assert_array_equal(opened.sum(1), (tokens == listops.CLOSE).sum(1))


def test_a_quarter_of_the_arguments_are_expressions():
    # Only the root's arguments are looked at, in expressions of any length, so nothing is selected.
    options = ListOps(min_length=4, max_length=10**6, max_depth=3, max_args=10, processes=1)
    inner = total = 0
    for ids, _ in listops._shard((options, "0/train/0")):
        opened = 0
        for token in listops.decode(ids).split():
            inner += opened == 1 and token.startswith("[")
            total += opened == 1 and token != "]"
            opened += token.startswith("[") - (token == "]")
    assert total > 1000
    assert abs(inner / total - 0.25) < 0.04


def test_no_expression_occurs_twice():
    tight = replace(SMALL, min_length=4, max_length=6)
    stored = listops.generate(tight, seed=0)
    seen = []
    for split in listops.SPLITS:
        ends = np.cumsum(stored[f"{split}_lengths"])
        seen += [part.tobytes() for part in np.split(stored[f"{split}_tokens"], ends[:-1])]
    assert len(seen) == len(set(seen)) == 800


@pytest.mark.parametrize("processes", [2, 4])
def test_the_bytes_do_not_depend_on_the_number_of_processes(processes):
    one = small(0)
    other = listops.generate(replace(SMALL, processes=processes), seed=0)
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].tobytes() == other[name].tobytes()


def test_the_bytes_are_what_they_always_were():
    stored = small(0)
    joined = b"".join(stored[name].tobytes() for name in sorted(stored))
    assert hashlib.blake2b(joined, digest_size=8).hexdigest() == SMALL_BYTES, (
        "the generator changed: raise listops.VERSION, and then this value"
    )


def test_seeds_give_different_sets():
    one, other = (small(seed)["test_tokens"] for seed in (0, 1))
    assert one.tobytes() != other.tobytes()


def test_the_test_split_does_not_depend_on_the_size_of_the_others():
    # Short expressions repeat often: were train filled first, it would take some away from test.
    tight = replace(SMALL, min_length=4, max_length=6)
    one = listops.generate(tight, seed=0)
    other = listops.generate(replace(tight, train=900, validation=150), seed=0)
    assert one["test_tokens"].tobytes() == other["test_tokens"].tobytes()


def test_the_cache_is_used_and_keyed_by_every_option(tmp_path, monkeypatch):
    config = Config(name="listops", cache=str(tmp_path), listops=SMALL)
    first = rows(data.load(config).splits["train"])
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(listops, "generate", None)
    again = rows(data.load(replace(config, listops=replace(SMALL, processes=3))).splits["train"])
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    changed = [replace(SMALL, **{name: getattr(SMALL, name) + 1}) for name in vars(SMALL)]
    key = partial(cache.key, version=listops.VERSION, shard=listops.SHARD)
    keys = {key(options, seed=0) for options in [SMALL, *changed]}
    assert len(keys) == len(vars(SMALL))  # processes alone does not count
    assert key(SMALL, seed=1) not in keys
    assert file.name == f"listops-{key(SMALL, seed=0)}.npz"
    assert key(SMALL, seed=0) == SMALL_KEY, "what is cached already would be generated anew"


def test_the_cache_folder_comes_from_config_environment_or_default(tmp_path, monkeypatch):
    tiny = replace(SMALL, train=5, validation=5, test=5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EFFICIENT_ATTN_CACHE", raising=False)
    data.load(Config(name="listops", listops=tiny))
    assert len(list((tmp_path / "data_cache").glob("listops-*.npz"))) == 1
    monkeypatch.setenv("EFFICIENT_ATTN_CACHE", str(tmp_path / "elsewhere"))
    data.load(Config(name="listops", listops=tiny))
    assert len(list((tmp_path / "elsewhere").glob("listops-*.npz"))) == 1


def test_what_a_killed_writer_left_goes_after_an_hour(tmp_path):
    path = tmp_path / "x-1.npz"
    old, new = (tmp_path / f".{path.name}.{pid}" for pid in (1, 2))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.stored(Config(cache=str(tmp_path)), "x", "1", lambda _: {"a": np.zeros(1)})
    assert sorted(tmp_path.iterdir()) == [new, path]


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_damaged_cache_is_generated_anew(tmp_path, keep, monkeypatch):
    monkeypatch.setattr(listops, "generate", lambda options, *, seed: small(seed))
    config = Config(name="listops", cache=str(tmp_path), listops=SMALL)
    first = rows(data.load(config).splits["test"])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with pytest.warns(UserWarning, match="damaged"):
        again = rows(data.load(config).splits["test"])
    np.testing.assert_array_equal(first["inputs"], again["inputs"])
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_said_so_and_leaves_nothing(tmp_path, monkeypatch):
    tiny = replace(SMALL, train=5, validation=5, test=5)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache .*--config\.data\.cache"):
        data.load(Config(name="listops", cache=str(blocked), listops=tiny))

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left"):
        data.load(Config(name="listops", cache=str(tmp_path / "cache"), listops=tiny))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_depth": 2, "min_length": 50}, "at most 12 tokens"),
        ({"min_length": 4, "max_length": 4}, "ask for fewer"),
        ({"max_args": 2, "max_depth": 30, "min_length": 5900, "max_length": 6000}, "widen"),
    ],
)
def test_options_that_allow_too_few_expressions_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(listops, "TRIES", 500)
    with pytest.raises(UserError, match=message):
        listops.generate(replace(SMALL, **options), seed=0)


def test_the_defaults_are_long_range_arenas():
    lra = ListOps()
    assert (lra.min_length, lra.max_length) == (501, 1999)  # 500 < length < 2000
    assert (lra.max_depth, lra.max_args) == (10, 10)
    assert (lra.train, lra.validation, lra.test) == (96000, 2000, 2000)
    for ids, value in listops._shard((lra, "0/test/0"))[:20]:
        assert 501 <= len(ids) <= 1999
        assert evaluate(listops.decode(ids)) == value
