"""The stopwatch of image models: what it is given, what it says."""

import pytest

from efficient_attn.errors import UserError
from efficient_attn.tools import latency


def test_ratios_are_ours_over_theirs():
    found = [
        latency.Latency("a", 1, 0.002, 0.004), latency.Latency("b", 16, 0.0305, None),
    ]  # fmt: skip
    lines = latency.table(found).splitlines()
    assert lines[2] == "| `a` | 1 | 2.0 | 4.0 | 0.50 |"
    assert lines[3] == "| `b` | 16 | 30.5 |  |  |"


def test_what_cannot_be_measured_says_why():
    with pytest.raises(UserError, match="--batch 0 must be positive"):
        latency.main(["", "deit_tiny_patch16_224", "--batch", "0"])
    with pytest.raises(UserError, match="did you mean 'deit_tiny_patch16_224'"):
        latency.main(["", "deit_tiny_patch16_22"])


@pytest.mark.slow
def test_a_network_is_timed(capsys):
    latency.main(["", "deit_tiny_patch16_224", "--batch", "1", "--turns", "1"])
    assert "| `deit_tiny_patch16_224` | 1 | " in capsys.readouterr().out
