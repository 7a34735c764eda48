"""`kernels.bench.peers`: ours beside PyTorch's, where torch is installed, and without it."""

import json
from pathlib import Path

import pytest

from kernels.bench import peers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(peers, "BATCH", 1)
    monkeypatch.setattr(peers, "HEADS", 2)
    monkeypatch.setattr(peers, "LENGTHS", (64,))
    monkeypatch.setattr(peers, "RANK", 16)


def test_without_torch_it_says_so(tmp_path, capsys, monkeypatch):
    def absent(name):
        raise NotImplementedError(f"{name} is not to be had here")

    monkeypatch.setattr(peers, "package", absent)
    assert peers.main(tmp_path) == 2
    assert "no peers: torch is not to be had" in capsys.readouterr().out


def test_a_peer_that_is_not_there_is_a_row_with_the_reason(tiny, monkeypatch):
    def absent(name):
        raise NotImplementedError(f"{name} is not to be had here")

    monkeypatch.setattr(peers, "package", absent)
    rows = peers.compare(64)
    assert len(rows) == len(peers.PEERS)
    assert all("is not to be had" in row["skipped"] and row["ours_ms"] > 0 for row in rows)


def test_lines_say_who_is_behind():
    row = {"length": 512, "op": "linear_attention", "peer": "idiap elu", "ours_ms": 2.0}
    assert "BEHIND" not in peers.line(row | {"peer_ms": 2.2, "ratio": 1.1})
    assert "BEHIND" in peers.line(row | {"peer_ms": 1.8, "ratio": 0.9})
    softmax = row | {"op": "softmax_attention", "peer": "torch SDPA"}
    assert "BEHIND" not in peers.line(softmax | {"peer_ms": 1.4, "ratio": 0.7})
    assert "BEHIND" in peers.line(softmax | {"peer_ms": 1.2, "ratio": 0.6})
    assert "too much memory" in peers.line(row | {"skipped": "takes too much memory"})


def test_with_torch_softmax_is_the_same_and_timed(tiny, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(
        peers, "PEERS", {n: p for n, p in peers.PEERS.items() if n.startswith("torch")}
    )
    rows = peers.compare(64)
    assert [row["op"] for row in rows] == ["softmax_attention", "softmax_attention causal"]
    assert all(row["off"] < 1e-5 and row["ratio"] > 0 for row in rows)


def test_what_differs_is_not_timed(tiny, monkeypatch):
    torch = pytest.importorskip("torch")

    def make(length):
        return lambda q, k, v: 1.01 * torch.nn.functional.scaled_dot_product_attention(q, k, v)

    wrong = peers.Peer("softmax_attention", make, same=True)
    monkeypatch.setattr(peers, "PEERS", {"wrong": wrong})
    (row,) = peers.compare(64)
    assert "differ" in row["skipped"]
    assert "ratio" not in row


def test_the_readme_shows_the_results_that_are_kept():
    kept = json.loads((ROOT / "results" / "cpu-peers.json").read_text())
    shown = (ROOT / "README.md").read_text().partition("<!-- cpu-peers -->\n")[2]
    assert shown.partition("\n<!-- /cpu-peers -->")[0] == peers.table(kept["rows"])
