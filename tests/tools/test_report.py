"""Sweeps gathered into pages and an index."""

import contextlib
import json
import shutil

import pytest

from efficient_attn.errors import UserError
from efficient_attn.tools import report
from efficient_attn.tools.ablate.run import Asked, ablate
from tests.conftest import ROOT

CONFIG = '''
"""A line of three points.

The command, the cost."""
from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Sweep


def height(seed, x):
    if x == 3:
        raise ZeroDivisionError("no third point")
    return {"y": 2.0 * x + seed}


def get_sweep(scale):
    return Sweep(
        title="A line", source="Euclid, book 1", runner=Measuring(height),
        rows=[(f"x={x}", {"x": x}) for x in (1, 2, 3)],
        columns=[Column("y", "height")], panels=[Panel(x="x", y="y")],
        claims=[
            Claim("it rises", lambda r: r.mean("x=2", "y") > r.mean("x=1", "y")),
            Claim("it falls", lambda r: r.mean("x=2", "y") < r.mean("x=1", "y")),
            Claim("it ends", lambda r: r.mean("x=3", "y") > 0),
        ],
    )
'''


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A directory with two ablations, one of them run: two rows that worked, one that failed."""
    path = tmp_path_factory.mktemp("report")
    (path / "configs/ablations").mkdir(parents=True)
    (path / "configs/ablations/line.py").write_text(CONFIG)
    (path / "configs/ablations/curve.py").write_text('"""A curve, never run."""')
    asked = Asked(
        spec="configs/ablations/line.py", scale="small", seeds=2, only="*", processes=0,
        workdir=path / "runs/line-small", dry_run=False, command="ablate line",
    )  # fmt: skip
    with contextlib.chdir(path):
        assert not ablate(asked)
    return path


@pytest.fixture
def ran(sweep, tmp_path, monkeypatch):
    """The sweep's own directory, in a copy of that directory."""
    shutil.copytree(sweep, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/line-small"


def gathered(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_page_has_the_table_the_picture_and_the_records(ran, tmp_path):
    report.main(["report", "runs"])
    out = tmp_path / "docs/results"
    assert set(gathered(out)) == {"index.md"} | {
        f"line-small.{kind}" for kind in ("md", "svg", "json", "jsonl")
    }
    page = (out / "line-small.md").read_text()
    assert "![A line](line-small.svg)" in page and "| `x=3` | failed |" in page
    assert "ZeroDivisionError" in page and "/line-small/rows" not in page
    assert (out / "line-small.jsonl").read_text() == (ran / "results.jsonl").read_text()


def test_the_index_says_what_ran_and_what_did_not(ran, tmp_path):
    report.main(["report", "runs"])
    lines = (tmp_path / "docs/results/index.md").read_text().splitlines()
    (line,) = [line for line in lines if "line-small.md" in line]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:6] == [
        "[A line](line-small.md)", "Euclid, book 1", "small", "2 of 3", "4",
        "1 of 3 (1 not judged)",
    ]  # fmt: skip
    assert all(cells[6:])
    assert any(line.startswith("| A curve, never run. |  | not run |") for line in lines)
    assert "    ablate line" in lines
    text = (tmp_path / "docs/reproduce.md").read_text()
    assert "The command, the cost." in text and "[line-small](results/line-small.md)" in text
    assert "A curve, never run." in text


def test_it_can_be_repeated(ran, tmp_path):
    report.main(["report", "runs"])
    first = gathered(tmp_path / "docs/results")
    report.main(["report", "runs/line-small"])
    report.main(["report"])
    assert gathered(tmp_path / "docs/results") == first


def unended(ran):
    about = json.loads((ran / "sweep.json").read_text())
    del about["claims"]
    (ran / "sweep.json").write_text(json.dumps(about))


def cut(name):
    def damage(ran):
        text = (ran / name).read_text()
        (ran / name).write_text(text[: len(text) - 20])

    return damage


def stripped(ran):
    (ran / "sweep.json").write_text('{"claims": [], "rows": []}')


@pytest.mark.parametrize(
    "damage, words",
    [
        (unended, "has not ended; `ablate line` goes on with it"),
        (cut("sweep.json"), "cannot be read"),
        (cut("results.jsonl"), "line 4 is cut"),
        (stripped, "is damaged"),
        (lambda ran: (ran / "table.md").unlink(), "has no table.md"),
        (lambda ran: (ran / "results.jsonl").unlink(), "has no results.jsonl"),
    ],
)
def test_what_cannot_be_gathered_is_told_in_a_sentence(ran, tmp_path, capsys, damage, words):
    damage(ran)
    with pytest.raises(SystemExit):
        report.main(["report", "runs"])
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
    assert set(gathered(tmp_path / "docs/results")) == {"index.md"}


def test_two_of_one_name_and_nothing_at_all_are_refused(ran, tmp_path):
    twin = tmp_path / "other/line-small"
    twin.mkdir(parents=True)
    (twin / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="have one name"):
        report.main(["report", "runs", "other"])
    with pytest.raises(UserError, match="there is no sweep"):
        report.main(["report", "nowhere"])


def test_the_pages_of_this_repository_are_current(monkeypatch):
    monkeypatch.chdir(ROOT)
    remedy = "run: python -m efficient_attn.tools.report"
    assert (report.OUT / "index.md").read_text() == report.index(report.OUT), remedy
    assert (ROOT / "docs/reproduce.md").read_text() == report.reproduce(report.OUT), remedy
