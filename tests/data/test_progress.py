import sys

from efficient_attn.data import progress


def test_a_log_gets_nothing_from_what_is_fast(capsys):
    assert list(progress.track(range(5), total=5, text="reading")) == list(range(5))
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track(iter("abcdefgh"), total=8, text="reading")) == list("abcdefgh")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading: 3/8", "reading: 6/8"]


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.track(range(50), total=50, text="reading")) == list(range(50))
    assert "reading" in capsys.readouterr().err
