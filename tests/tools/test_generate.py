"""A language model that was trained continues a text, out of its run's directory."""

import pytest

from efficient_attn.backbones import Sampling
from efficient_attn.backbones.sampling import GREEDY
from efficient_attn.data.tokenizers import Bytes, Chars, Words
from efficient_attn.errors import UserError
from efficient_attn.tools import generate
from efficient_attn.train.config import resolve
from tests.train.test_loop import run

SONG = "do re mi fa sol la ti "
MODEL = {"name": "causal_lm", "depth": 1, "width": 32, "heads": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    """A model of characters that has learnt a song of seven words."""
    path = tmp_path_factory.mktemp("generate")
    (path / "song.txt").write_text(SONG * 200)
    data = {"name": "text_files", "path": str(path / "song.txt"), "batch_size": 8}
    text = {"max_len": 32, "tokenizer": "chars"}
    config = resolve(
        {
            "attention": "softmax", "model": MODEL, "data": data | {"text": text},
            "train": {"steps": 150, "eval_every": 150, "eval_batch_size": 8},
            "optimizer": {"learning_rate": 1e-2, "warmup": 5},
        }
    )  # fmt: skip
    run(config, path / "run")
    return path / "run"


def test_it_goes_on_as_the_text_does(song, capsys):
    expected = SONG + SONG[:6]
    assert generate.continue_text(song, SONG[:4], max_tokens=24, sampling=GREEDY) == expected[:28]
    generate.main(["x", f"--workdir={song}", f"--prompt={SONG[:4]}", "--max_tokens=24"])
    assert capsys.readouterr().out == expected[:28] + "\n"
    drawn = [
        generate.continue_text(
            song, "do re", max_tokens=12, sampling=Sampling(temperature=3.0, top_p=0.99), seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(text.startswith("do re") for text in drawn)


def test_what_stands_between_tokens_stands_between_prompt_and_answer():
    for tokenizer, told in (
        (Words.build(["to be or not"], vocab=9), "To be or not"),
        (Chars.build(["to be or not"], vocab=99), "To be or not"),
        (Bytes(), "To be or not"),
    ):
        ids = tokenizer.encode("To be", max_len=99)
        written = tokenizer.encode("to be or not", max_len=99)[len(ids) :]
        assert generate.append(tokenizer, "To be", ids, written) == told
        assert generate.append(tokenizer, "", ids[:0], written).strip() == "or not"


def test_it_writes_what_fits_unless_it_is_told_how_much(song):
    text = generate.continue_text(song, SONG[:4], sampling=GREEDY)
    assert text == (SONG * 2)[:31]  # and the beginning of a document: 32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say which run"),
        (["--workdir=nowhere"], "nowhere holds no run"),
        (["--workdir=RUN", "--max_tokens=40"], "a prompt of 1 tokens and max_tokens=40 make more"),
        (
            ["--workdir=RUN", f"--prompt={SONG * 3}"],
            "a prompt of 67 tokens and max_to",
        ),
        (["--workdir=RUN", "--top_p=2"], r"top_p=2.0 is not in \(0, 1\]"),
        (["--workdir=RUN", "--step=7"], "there is no checkpoint --step=7"),
        (["--workdir=RUN", "prompt"], "'prompt' is not a flag"),
    ],
    ids=str,
)
def test_what_cannot_be_said_says_why(song, flags, message):
    with pytest.raises(UserError, match=message):
        generate.main(["x", *(flag.replace("RUN", str(song)) for flag in flags)])
