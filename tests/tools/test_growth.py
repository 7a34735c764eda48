"""How work and memory grow with the length, as the README's table has it."""

import functools
import re
from dataclasses import replace

import numpy as np
import pytest

from efficient_attn import attention
from efficient_attn.errors import UserError
from efficient_attn.tools import growth
from tests.conftest import ROOT

QUADRATIC = {"softmax", "synthesizer"}
README = (ROOT / "README.md").read_text()


@functools.cache
def counts(expression):
    return growth.count(expression)


def name(expression):
    return attention.pattern(expression, 1)[0].name


def test_an_exponent_is_that_of_a_power_law():
    lengths = np.array(growth.LENGTHS)
    assert growth.exponent(lengths, 3.0 * lengths**1.5) == pytest.approx(1.5)
    assert growth.exponent(lengths, np.full(6, 7.0)) == pytest.approx(0)


def test_every_mechanism_is_measured():
    assert {name(text) for text in growth.EXPRESSIONS} == set(attention.MIXERS) - set(
        growth.LEFT_OUT
    )


@pytest.mark.parametrize("expression", growth.EXPRESSIONS)
def test_multiply_adds_grow_as_claimed(expression):
    limit = {"softmax": 2.0, "synthesizer": 2.0, "sparse": 1.5}.get(name(expression), 1.1)
    assert growth.exponent(growth.LENGTHS, counts(expression)) <= limit


@pytest.mark.parametrize("expression", growth.EXPRESSIONS)
def test_the_readme_has_the_multiply_adds_of_today(expression):
    (line,) = [
        x for x in README.splitlines() if x.startswith(f"| `{expression}` | ") and " G |" in x
    ]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2] == f"{growth.exponent(growth.LENGTHS, counts(expression)):.2f}"
    assert cells[5] == f"{counts(expression)[-1] / 1e9:,.1f} G"


@pytest.mark.slow
@pytest.mark.parametrize("expression", [e for e in growth.EXPRESSIONS if name(e) not in QUADRATIC])
def test_compiled_memory_grows_linearly(expression):
    lengths = (2048, 4096, 8192)
    found = growth.measure(expression, lengths)
    assert growth.exponent(lengths, found.forward_bytes) <= 1.1
    assert growth.exponent(lengths, found.training_bytes) <= 1.1


def test_the_table_and_the_picture_hold_every_row(tmp_path):
    rows = [growth.measure(text, (256, 512)) for text in ("linear", "softmax")]
    table = growth.render(rows).splitlines()
    assert len(table) == 4 and table[2].startswith("| `linear` | 1.00 | 1.00 |")
    assert re.match(r"\| `softmax` \| 1\.\d\d \|", table[3])
    many = [replace(rows[0], expression=f"number {i}") for i in range(25)]
    growth.draw(many, tmp_path / "growth.svg")
    drawn = (tmp_path / "growth.svg").read_text()
    assert all(f"<!-- number {i} -->" in drawn for i in range(25))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say which two files to write, for example README.md docs/growth.svg"),
        (["nowhere.md", "growth.svg"], "there is no file 'nowhere.md'"),
        (["EMPTY", "growth.svg"], "no <!-- growth --> ... <!-- /growth --> to put the table"),
        (
            [str(ROOT / "README.md"), "nowhere/growth.svg"],
            "there is no directory 'nowhere'; make it",
        ),
    ],
    ids=str,
)
def test_wrong_files_are_refused_before_anything_is_compiled(words, message, tmp_path, monkeypatch):
    empty = tmp_path / "empty.md"
    empty.touch()
    monkeypatch.setattr(growth, "measure", lambda text: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        growth.main(["growth", *(w.replace("EMPTY", str(empty)) for w in words)])
