"""Expressions: what they mean, and the one sentence that each mistake gets."""

import pytest

from efficient_attn import attention
from efficient_attn.errors import UserError
from tests.support import EXPRESSIONS


def names(text, depth):
    return [str(choice) for choice in attention.pattern(text, depth)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("softmax", ["softmax"] * 4),
        ("performer*2 + softmax", ["performer", "performer", "softmax", "performer"]),
        ("2*performer + softmax", ["performer", "performer", "softmax", "performer"]),
        ("(performer + softmax)*2", ["performer", "softmax"] * 2),
        (" linformer(rank=8) ", ["linformer(rank=8)"] * 4),
        ("linformer(rank=None)", ["linformer"] * 4),
        ("performer(features=64,feature_map='relu')",
         ["performer(features=64, feature_map='relu')"] * 4),
        ("lsra(attention=linformer(rank=8), kernel=[3, 5])",
         ["lsra(attention=linformer(rank=8), kernel=(3, 5))"] * 4),
        ("lsra(attention=softmax)", ["lsra"] * 4),
        ("lsra(attention=lsra)", ["lsra(attention=lsra)"] * 4),
    ],
)  # fmt: skip
def test_what_an_expression_means(text, expected):
    assert names(text, 4) == expected


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_the_label_means_what_the_text_means(text):
    (choice,) = attention.pattern(text, 1)
    assert attention.pattern(str(choice), 1) == (choice,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perfomer", "unknown attention 'perfomer'; did you mean 'performer'"),
        ("hyena", "known: .*linformer, .*lsra, .*performer, .*softmax"),
        ("linformer(rnak=8)", "unknown option of linformer 'rnak'; did you mean 'rank'"),
        ("linformer(rank='8')", "linformer.rank must be int or None, not '8'"),
        ("linformer(rank=True)", "linformer.rank must be int or None, not True"),
        ("linformer(rank=8.0)", "linformer.rank must be int or None, not 8.0"),
        ("linformer(rank=0)", "rank=0 must be positive"),
        ("linformer(sharing='all')", "sharing must be one of 'none', 'headwise'"),
        ("linformer(8)", r"written by name: linformer\(option=8\)"),
        ("linformer(**x)", r"`\*\*` has no place"),
        ("performer(feature_map='positive', projection='none')", "needs a projection"),
        ("performer(features=-1)", "features=-1 must be positive"),
        ("performer(redraw=-1)", "redraw=-1"),
        ("performer(epsilon=-1)", "epsilon=-1.* must not be negative"),
        ("softmax(kv_heads=0)", "kv_heads=0 must be positive"),
        ("softmax(logit_cap=0)", "logit_cap=0.* must be positive"),
        ("lsra(kernel=())", "must be positive"),
        ("lsra(kernel=(3, 0))", "must be positive"),
        ("lsra(weight_dropout=1)", r"weight_dropout=1.* is not in \[0, 1\)"),
        ("lsra(attention=3)", "lsra.attention must be a mechanism, not 3"),
        ("lsra(attention=perfomer)", "unknown attention 'perfomer'"),
        ("softmax*0", "a mechanism and a positive number"),
        ("softmax*1.5", "a mechanism and a positive number"),
        ("softmax*True", "a mechanism and a positive number"),
        ("softmax*performer", "a mechanism and a positive number"),
        ("softmax - performer", "names no mechanism"),
        ("softmax.core", "names no mechanism"),
        ("3", "names no mechanism"),
        ("softmax(", "cannot read the attention"),
        ("", "cannot read the attention"),
        ("__import__('os').system('false')", "names no mechanism"),
        ("linformer(rank=open('x'))", "unknown attention 'open'"),
        ("softmax*5", r"names 5 layers, the model has 4"),
        ("linformer(rank=-8)", "rank=-8 must be positive"),
        ("softmax(kv_heads=1, kv_heads=2)", "kv_heads twice"),
        ("softmax\x00", "cannot read"),
        ("softmax*10000000000000", "makes more than 10000 layers"),
        ("(softmax*5000)*5000", "makes more than 10000 layers"),
        ("linformer(rank={[]})", "names no mechanism"),
        ("linformer(rank=" + "-" * 5000 + "1)", "an attention of 5017 signs.* is too deep"),
        ("softmax" + "+softmax" * 5000, "is too deep; write"),
        ("softmax(logit_cap=1e999)", "softmax.logit_cap must be a finite number, not inf"),
        ("performer(epsilon=1e999)", "performer.epsilon must be a finite number, not inf"),
    ],
)
def test_a_mistake_gets_one_sentence(text, message):
    with pytest.raises(UserError, match=message) as error:
        attention.pattern(text, 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["1 + x", "[x for x in y]", "f'{1}'", "lambda: 0", "-softmax"])
def test_values_are_literals_or_mechanisms(value):
    with pytest.raises(UserError):
        attention.pattern(f"linformer(rank={value})", 1)


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [("reformer(buckets", 4, 2.0), ("longformer(window", 8, "x"), ("longformer(window", 8, True),
     ("synthesizer(mixture", "dense", "vanila")],
)  # fmt: skip
def test_every_element_of_a_tuple_is_checked_every_time(option, good, bad):
    for index in range(3):
        values = (good,) * index + (bad,) + (good,) * (2 - index)
        for _ in range(20):
            with pytest.raises(UserError, match="must be .*a tuple of .*, not"):
                attention.pattern(f"{option}={values})", 1)
