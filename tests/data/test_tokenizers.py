import numpy as np
import pytest

from efficient_attn.data import Config, Text
from efficient_attn.data.tokenizers import Bytes, Chars, Words, create, matrix
from efficient_attn.errors import UserError


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本", "\x00\n\t", "\ufeffmark"])
def test_bytes_are_utf8_plus_one(text):
    ids = Bytes().encode(text, max_len=100)
    np.testing.assert_array_equal(ids - 1, list(text.encode("utf-8")))
    assert ids.min() >= 1 and ids.max() < Bytes.vocab == 257


def test_bytes_are_cut_at_max_len_even_within_a_character():
    np.testing.assert_array_equal(
        Bytes().encode("日本", max_len=4), Bytes().encode("日本", max_len=9)[:4]
    )


def test_an_empty_text_is_one_token():
    np.testing.assert_array_equal(Bytes().encode("", max_len=5), [ord(" ") + 1])
    words = Words(["a"])
    for text in ("", " \n"):
        np.testing.assert_array_equal(words.encode(text, max_len=5), [Words.UNKNOWN])


def test_words_are_ranked_by_count_then_alphabet():
    words = Words.build(["The cat, the dog.", "A dog! a cat? the end"], vocab=100)
    assert list(words.ids) == ["the", "a", "cat", "dog", "!", ",", ".", "?", "end"]
    assert list(words.ids.values()) == list(range(2, 11))
    assert words.vocab == 11
    np.testing.assert_array_equal(words.encode("THE bird end", max_len=9), [2, 1, 10])
    np.testing.assert_array_equal(words.encode("the a cat", max_len=2), [2, 3])


def test_the_vocabulary_is_capped_padding_and_unknown_included():
    words = Words.build(["a a a b b c"], vocab=4)
    assert list(words.ids) == ["a", "b"] and words.vocab == 4
    np.testing.assert_array_equal(words.encode("a b c", max_len=3), [2, 3, 1])


def test_the_vocabulary_does_not_depend_on_the_order_of_the_texts():
    texts = ["b a", "c b", "a d"]
    assert Words.build(texts, vocab=9).ids == Words.build(texts[::-1], vocab=9).ids


def test_a_matrix_is_padded_on_the_right_in_a_small_type():
    rows = matrix(Bytes(), ["ab", "", "abcdef"], max_len=4)
    assert rows.dtype == np.uint16
    np.testing.assert_array_equal(rows, [[98, 99, 0, 0], [33, 0, 0, 0], [98, 99, 100, 101]])
    many = Words([str(n) for n in range(2**16)])
    assert many.vocab > 2**16
    rows = matrix(many, [str(2**16 - 1)], max_len=1)
    assert rows.dtype == np.int32 and rows[0, 0] == 2**16 + 1


def test_characters_are_numbered_by_code_and_the_rare_are_unknown():
    chars = Chars.build(["banana", "né", "𝄞"], vocab=100)
    assert chars.characters[2:] == ("a", "b", "n", "é", "𝄞") and chars.vocab == 7
    np.testing.assert_array_equal(chars.encode("né𝄞z", max_len=9), [4, 5, 6, 1])
    np.testing.assert_array_equal(chars.encode("né𝄞z", max_len=2), [4, 5])
    few = Chars.build(["banana"], vocab=4)
    assert few.characters[2:] == ("a", "n")
    np.testing.assert_array_equal(few.encode("ban", max_len=9), [1, 2, 3])
    np.testing.assert_array_equal(few.encode("", max_len=9), [Chars.UNKNOWN])
    np.testing.assert_array_equal(Chars([]).encode("ab", max_len=9), [1, 1])


def test_ids_come_back_as_text():
    text = "naïve café 日本\n"
    for tokenizer in (Bytes(), Chars.build([text], vocab=99)):
        ids = tokenizer.encode(text, max_len=99)
        assert tokenizer.decode([*ids.tolist(), 0, 0]) == text
    assert Bytes().decode([0xE3 + 1]) == "\N{REPLACEMENT CHARACTER}"
    assert Bytes().decode([ord("a") + 1, 257]) == "a", "ids that are added stand for no text"
    words = Words.build(["a cat"], vocab=9)
    assert words.decode([2, 3, 1, 0]) == "a cat <unknown>"


@pytest.mark.parametrize(
    ("tokenizer", "reserved", "least"), [("chars", 2, 5), ("words", 0, 3), ("bpe", 1, 260)]
)
def test_a_vocabulary_without_room_for_a_token_is_refused(tmp_path, tokenizer, reserved, least):
    def made(vocab):
        options = Text(tokenizer=tokenizer, vocab=vocab)
        return create(options, ["a b"], Config(cache=str(tmp_path)), reserved=reserved)

    assert made(least).vocab == least - reserved
    if least > 3:  # fewer than 3 are refused by `Text`
        says = f"text.vocab={least - 1} is too small for tokenizer='{tokenizer}' here: {least} at"
        with pytest.raises(UserError, match=says):
            made(least - 1)
