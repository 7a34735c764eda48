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


def test_throughputs_stand_beside_the_first_rates():
    found = [
        latency.Throughput("a", 2, 1.0, 0.5, 0.8), latency.Throughput("a", 2, 0.5, 0.25, 0.2),
        latency.Throughput("a", 1, 0.7, 0.5, 0.5),
    ]  # fmt: skip
    lines = latency.rates_table(found).splitlines()
    assert lines[2] == "| `a` | 2 | 1 | 4.0 | 1.00 | 2.5 | 1.00 |"
    assert lines[3] == "| `a` | 2 | 0.5 | 8.0 | 2.00 | 10.0 | 4.00 |"
    assert lines[4] == "| `a` | 1 | 0.7 | 2.0 | 1.00 | 2.0 | 1.00 |"


def test_what_cannot_be_measured_says_why():
    with pytest.raises(UserError, match="--batch 0 must be positive"):
        latency.main(["", "deit_tiny_patch16_224", "--batch", "0"])
    with pytest.raises(UserError, match="did you mean 'deit_tiny_patch16_224'"):
        latency.main(["", "deit_tiny_patch16_22"])
    with pytest.raises(UserError, match="keep_rate"):
        latency.main(["", "deit_tiny_patch16_224", "--keep_rates", "1", "0.5"])
    with pytest.raises(UserError, match="keep_rate must be in"):
        latency.main(["", "evit_small", "--keep_rates", "1.5"])


@pytest.mark.slow
def test_a_network_is_timed(capsys):
    latency.main(["", "deit_tiny_patch16_224", "--batch", "1", "--turns", "1"])
    assert "| `deit_tiny_patch16_224` | 1 | " in capsys.readouterr().out
