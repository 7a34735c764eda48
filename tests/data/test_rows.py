"""Rows of tokens: each token told once, after the one before it; the same again when resumed."""

import itertools
import tracemalloc

import numpy as np
import pytest

from efficient_attn.data import loader
from efficient_attn.data.masking import Masked
from efficient_attn.data.next_token import Next, Packed
from efficient_attn.data.rows import Padded, Stream

END, MASK = 1, 99
LENGTHS = (7, 3, 25, 1, 12)


def documents(lengths=LENGTHS):
    """Tokens 2, 3, 4, ... through all documents: no two are alike."""
    borders = np.cumsum([2, *lengths])
    return [np.arange(a, b) for a, b in itertools.pairwise(borders)]


def everything(source):
    return source.gather(np.arange(len(source)))


def stream(length=8):
    return Next(Stream(documents(), length=length, end=END))


def masked(rate=0.15, length=20, count=200):
    ordinary = np.arange(100) >= 2
    ordinary[MASK] = False
    rows = Padded([np.arange(2, 2 + n % 20 + 1) for n in range(count)], length=length + 1, end=END)
    return Masked(rows, rate=rate, ordinary=ordinary, mask=MASK)


@pytest.mark.parametrize("length", [1, 5, 8, 48, 52, 53, 100])
def test_a_stream_tells_each_token_once_from_the_one_before(length):
    whole = np.concatenate([np.append(END, d) for d in documents()])
    batch = everything(stream(length))
    counts = batch["weight"] > 0
    np.testing.assert_array_equal(batch["label"][counts], whole[1:])
    np.testing.assert_array_equal(batch["inputs"][counts], whole[:-1])
    np.testing.assert_array_equal(batch["inputs"][~counts], 0)
    assert batch["inputs"].shape == (-(-(len(whole) - 1) // length), length)
    assert batch["inputs"].dtype == batch["label"].dtype == np.int32


def test_a_stream_takes_two_bytes_a_token_while_it_is_made():
    ids = [np.full(1000, 7, np.uint16)] * 1000
    tracemalloc.start()
    made = Stream(ids, length=8, end=END)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.tokens.nbytes < peak < 1.2 * made.tokens.nbytes


def test_each_epoch_cuts_the_stream_elsewhere_and_tells_all_tokens_but_one():
    source, whole = stream(), np.concatenate([np.append(END, d) for d in documents()])
    after = dict(zip(whole[1:], whole[:-1], strict=True)) | {END: None}
    firsts = []
    for epoch in range(6):
        numbers = np.arange(len(source)) + epoch * len(source)
        batch = source.draw(np.arange(len(source)), numbers=numbers, seed=3)
        counts = batch["weight"] > 0
        told = batch["label"][counts]
        assert len(told) == len(whole) - 1
        assert np.all(np.bincount(told, minlength=51)[2:] <= 1)
        for label, given in zip(told, batch["inputs"][counts], strict=True):
            assert label == END or given == after[label]
        firsts.append(int(batch["inputs"][0, 0]))
    assert len(set(firsts)) > 3


@pytest.mark.parametrize("length", [4, 8, 30])
def test_padded_documents_stand_in_rows_of_their_own(length):
    batch = everything(Next(Padded(documents(), length=length, end=END)))
    told = batch["label"][batch["weight"] > 0]
    np.testing.assert_array_equal(told, np.concatenate([np.append(d, END) for d in documents()]))
    assert len(batch["label"]) == sum(-(-(n + 1) // length) for n in LENGTHS)


@pytest.mark.parametrize("length", [8, 30])
def test_packed_documents_are_whole_apart_and_told_once(length):
    source = Packed(documents(), length=length, end=END)
    batch = everything(source)
    inputs, label, counts = batch["inputs"], batch["label"], batch["weight"] > 0
    assert set(inputs) == {"tokens", "segments", "positions"}
    assert all(x.dtype == np.int32 for x in (*inputs.values(), label))
    np.testing.assert_array_equal(counts, inputs["segments"] > 0)
    pieces = []
    for row in range(len(source)):
        for segment in range(1, inputs["segments"][row].max() + 1):
            at = np.flatnonzero(inputs["segments"][row] == segment)
            assert np.all(np.diff(at) == 1), "runs of neighbours"
            np.testing.assert_array_equal(inputs["positions"][row, at], np.arange(len(at)))
            tokens, told = inputs["tokens"][row, at], label[row, at]
            np.testing.assert_array_equal(tokens[1:], told[:-1])
            pieces.append((tokens[0], told))
    told = np.concatenate([piece for _, piece in pieces])
    expected = np.concatenate([np.append(d, END) for d in documents()])
    np.testing.assert_array_equal(np.sort(told), np.sort(expected))
    starts = sum(first == END for first, _ in pieces)
    assert starts == len(LENGTHS), "each document begins after an end"
    assert len(source) < sum(-(-(n + 1) // length) for n in LENGTHS), "fewer rows than padded"


def test_packing_leaves_little_padding():
    lengths = np.random.RandomState(0).randint(1, 60, 500).tolist()
    source = Packed([np.full(n, 5) for n in lengths], length=64, end=END)
    assert everything(source)["weight"].mean() > 0.9


@pytest.mark.parametrize(
    "source", [Packed([], length=4, end=END), Next(Stream([], length=4, end=END))]
)
def test_a_split_without_text_has_no_rows(source):
    assert len(source) == 0


def test_masks_are_berts():
    """15 % of each row, at least one; 80 % hidden, 10 % replaced, 10 % kept (200 rows)."""
    source = masked()
    tokens = source.rows.fixed(np.arange(len(source)))[:, 1:]
    fates = np.zeros(3)
    numbers = np.arange(len(source))
    for epoch in range(40):
        batch = source.draw(numbers, numbers=numbers + epoch * len(source), seed=0)
        chosen = batch["weight"] > 0
        candidates = np.sum(tokens > END, axis=1)
        np.testing.assert_array_equal(
            chosen.sum(1), [max(1, round(0.15 * n)) for n in candidates.tolist()]
        )
        assert not np.any(chosen & (tokens <= END)), "neither ends nor padding"
        np.testing.assert_array_equal(batch["label"], np.where(chosen, tokens, 0))
        np.testing.assert_array_equal(batch["inputs"][~chosen], tokens[~chosen])
        given, asked = batch["inputs"][chosen], tokens[chosen]
        hidden, same = given == MASK, given == asked
        assert np.all(given > END)
        fates += [hidden.sum(), (~hidden & ~same).sum(), same.sum()]
    total = fates.sum()
    chance = np.array([0.8, 0.1 * 96 / 97, 0.1 + 0.1 / 97])  # a random token may be the same
    deviation = np.sqrt(total * chance * (1 - chance))
    assert np.all(np.abs(fates - total * chance) < 4 * deviation), fates / total


def test_masks_differ_between_epochs_and_are_fixed_in_evaluation():
    source, numbers = masked(rate=0.4), np.arange(200)
    first = source.draw(numbers, numbers=numbers, seed=0)
    again = source.draw(numbers, numbers=numbers, seed=0)
    other = source.draw(numbers, numbers=numbers + 200, seed=0)
    reseeded = source.draw(numbers, numbers=numbers, seed=1)
    np.testing.assert_array_equal(first["inputs"], again["inputs"])
    for batch in (other, reseeded, everything(source)):
        assert np.mean(batch["weight"] != first["weight"]) > 0.2
    part = source.gather([5, 3])
    np.testing.assert_array_equal(part["inputs"], everything(source)["inputs"][[5, 3]])


@pytest.mark.parametrize("make", [stream, masked])
def test_training_goes_on_with_the_same_cut_and_masks(make):
    """Through several epochs, from a position saved in the middle of one."""
    source = make()
    batches = loader.train_batches(source, batch_size=5, seed=4)
    seen = [next(batches) for _ in range(7)]
    state = batches.get_state()
    expected = [next(batches) for _ in range(6)]
    fresh = loader.train_batches(make(), batch_size=5, seed=4)
    fresh.set_state(state)
    for batch in expected:
        found = next(fresh)
        for name, value in batch.items():
            np.testing.assert_array_equal(found[name], value)
    assert not np.array_equal(seen[0]["inputs"], expected[0]["inputs"])


def test_masks_of_an_example_change_from_epoch_to_epoch_in_training():
    source = masked(rate=0.4, count=6)
    batches = loader.train_batches(source, batch_size=6, seed=0)
    tokens = source.rows.fixed(np.arange(6))[:, 1:]
    seen = []
    for _ in range(3):
        batch = next(batches)
        shown = np.where(batch["weight"] > 0, batch["label"], batch["inputs"])
        order = [int(np.flatnonzero((tokens == row).all(1))[0]) for row in shown]
        seen.append(batch["weight"][np.argsort(order)])
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])
