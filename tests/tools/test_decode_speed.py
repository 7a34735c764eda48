"""The measurement of generation: its bytes are exact, its table holds every row."""

import pytest

from efficient_attn.tools import decode_speed
from efficient_attn.train import flags


def test_a_recurrence_carries_the_same_whatever_the_length_and_a_cache_does_not():
    short, long = (
        decode_speed.measure(["softmax", "linear"], prompt=n, tokens=4, turns=1) for n in (4, 12)
    )
    cache = 2 * 4 * 4 * 256  # keys and values, four layers, float32
    assert [s.state_bytes for s in (short[0], long[0])] == [cache * 8, cache * 16]
    assert short[1].state_bytes == long[1].state_bytes == 4 * 4 * 4 * (64 * 65 + 1)
    assert all(s.first_seconds > 0 for s in short + long)
    table = decode_speed.render(short).splitlines()
    assert len(table) == 4 and table[2].startswith("| `softmax` |") and "| 1.00 |" in table[2]


def test_a_mechanism_that_does_not_decode_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["decode_speed", "linformer"])
    with pytest.raises(SystemExit, match="2"):
        flags.run(decode_speed.main)
    assert "error: linformer does not support causal" in capsys.readouterr().err
