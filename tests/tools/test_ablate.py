"""The sweeps of `ablate`, rows run in this process: what they leave, say and refuse."""

import io
import json

import pytest
from rich.console import Console

from efficient_attn.errors import UserError
from efficient_attn.tools.ablate import display as displays
from efficient_attn.tools.ablate import dry_run
from efficient_attn.tools.ablate.__main__ import main
from efficient_attn.tools.ablate.display import Display
from efficient_attn.tools.ablate.load import load
from efficient_attn.tools.ablate.results import Missing, Place, Results
from efficient_attn.tools.ablate.runners import Measuring
from efficient_attn.tools.ablate.table import short
from efficient_attn.tools.ablate.worker import Outcome
from tests.tools.sweeps import TRAINED, calls, records, run, write

FAULTS = """
ROWS = [("good", {"x": 1}), ("user", {"x": 3, "fault": "user"}), ("bug", {"x": 2, "fault": "bug"}),
        ("last", {"x": 4})]
CLAIMS = []
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A sweep over two seeds: (its file, its directory, what it said)."""
    file = write(tmp_path_factory.mktemp("sweep"))
    complete, said = run(file, seeds=2)
    assert complete
    return file, file.parent / "out", said


def table_rows(place):
    """The cells of table.md by the first one."""
    lines = (place / "table.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return {row[0].strip("`"): [c.strip() for c in row[1:]] for row in cells}


def test_the_table_has_means_deviations_published_numbers_and_differences(done):
    rows = table_rows(done[1])
    assert rows["row"] == ["height %", "paper", "difference", "twice"]
    # y = 2 x + seed: seeds 0 and 1 give 2 and 3, of which 2.5 +- 0.7071
    assert rows["x=1, slope=2"] == ["250 ± 71", "150", "+100", "2"]
    assert rows["x=2, slope=1"] == ["250 ± 71", "", "", "4"]


def test_claims_hold_or_not_or_cannot_be_judged(done):
    rows = table_rows(done[1])
    assert rows["more is higher"] == ["holds"]
    assert rows["one is highest"] == ["does not hold"]
    assert rows["the third"] == ["not judged: x=1, slope=1 has no z"]
    for text, verdict in [("more is higher", "holds"), ("one is highest", "does not hold")]:
        assert f"{text}: {verdict}" in done[2]
    kept = json.loads((done[1] / "sweep.json").read_text())["claims"]
    assert [claim["holds"] for claim in kept] == [True, False, None]


def test_the_grid_has_one_option_over_the_other(done):
    rows = table_rows(done[1])
    assert rows["height % by slope and x"] == ["1", "2"]
    assert rows["1"] == ["150 ± 71", "250 ± 71"]
    assert rows["2"] == ["250 ± 71 (150)", "450 ± 71"]


def test_the_table_says_where_its_numbers_come_from(done):
    text = (done[1] / "table.md").read_text()
    assert text.startswith("# Lines\n\nNobody, arXiv 0000.00000, table 1. Scale: small.\n")
    assert "    ablate --all\n" in text and "A note." in text
    assert "2 seeds; 8 runs" in text and "x cpu, jax " in text
    found = records(done[1])
    assert len(found) == 8 and {r["seed"] for r in found} == {0, 1}
    one = next(r for r in found if r["label"] == "x=2, slope=1" and r["seed"] == 1)
    assert one["metrics"] == {"y": 3, "twice": 4.0, "curve": [2, 3]}
    assert one["overrides"] == {"x": 2, "slope": 1} and one["commit"] and one["versions"]["jax"]


def test_a_commit_is_short_and_keeps_what_is_said_of_changes():
    assert short("0123456789abcdef+changes") == "0123456789ab+changes"
    assert short("0123456789abcdef") == "0123456789ab" and short(None) == "no commit"


def test_finished_rows_are_not_run_again_and_more_seeds_are_only_added(done):
    file, place, _ = done
    before = calls(file)
    assert len(before) == 8
    complete, said = run(file, seeds=2)
    assert complete and "8 of 8 runs are finished already" in said and calls(file) == before
    complete, said = run(file, seeds=1)
    assert complete and len(records(place)) == 8, "seed 1 is still in the table"
    complete, said = run(file, seeds=3, only="x=2*")
    assert complete and "4 of 6 runs are finished already" in said
    assert calls(file)[8:] == ["2 1 2", "2 2 2"]
    assert len(records(place)) == 10
    assert "2 to 3 seeds a row; 10 runs" in (place / "table.md").read_text()


def test_only_chosen_rows_are_run_and_the_others_say_so(tmp_path):
    file = write(tmp_path)
    complete, said = run(file, only="*slope=1")
    assert complete and calls(file) == ["1 1 0", "2 1 0"]
    rows = table_rows(tmp_path / "out")
    assert rows["x=1, slope=2"] == ["not run", "150", "", "not run"]
    assert rows["x=1, slope=1"] == ["100", "", "", "2"], "one seed has no deviation"
    assert rows["more is higher"] == ["not judged: x=2, slope=2 has no y"]
    assert "1/2 x=1, slope=1, seed 0: height % 100 after 0 s" in said


BROKEN = """
whole = rows

def rows():
    return [(name, o | {"fault": "bug"} if o == {"x": 2, "slope": 1} else o) for name, o in whole()]
"""


def test_a_failed_cell_of_a_grid_says_so(tmp_path):
    file = write(tmp_path, more=BROKEN)
    assert not run(file)[0]
    assert table_rows(tmp_path / "out")["1"] == ["100", "failed"]


def test_each_row_is_resolved_once_in_a_sweep(tmp_path, monkeypatch):
    resolved = []
    true = Measuring.identity

    def identity(runner, overrides):
        resolved.append(overrides["x"])
        return true(runner, overrides)

    monkeypatch.setattr(Measuring, "identity", identity)
    run(write(tmp_path, more="ROWS = [(str(x), {'x': x}) for x in (3, 4)]\nCLAIMS = []"), seeds=2)
    assert resolved == [3, 4]


def test_a_changed_row_is_another_one_and_the_old_one_is_kept(tmp_path):
    file = write(tmp_path, more='ROWS = [("a", {"x": 1})]\nCLAIMS = []')
    run(file)
    write(tmp_path, more='ROWS = [("a", {"x": 5})]\nCLAIMS = []')
    run(file)
    assert calls(file) == ["1 2 0", "5 2 0"]
    assert [r["metrics"]["y"] for r in records(tmp_path / "out")] == [10]
    assert len(list((tmp_path / "out" / "rows").glob("a-*"))) == 2
    write(tmp_path, more='ROWS = [("a", {"x": 1})]\nCLAIMS = []')
    run(file)
    assert [r["metrics"]["y"] for r in records(tmp_path / "out")] == [2] and len(calls(file)) == 2


def test_a_failing_row_leaves_the_others_running_and_is_run_by_the_next_call(tmp_path):
    file = write(tmp_path, more=FAULTS)
    complete, said = run(file)
    assert not complete and calls(file) == ["1 2 0", "3 2 0", "2 2 0", "4 2 0"]
    assert "failed: user: x=3 is too much; lower it" in said
    assert "failed: bug: ZeroDivisionError: divided by nothing" in said
    assert [r["label"] for r in records(tmp_path / "out")] == ["good", "last"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Failed:\n\n- `user`: x=3" in text and "- `bug`: ZeroDivisionError: divided by" in text
    rows = table_rows(tmp_path / "out")
    assert rows["bug"] == ["failed", "failed"] and rows["good"] == ["200", "2"]
    complete, said = run(file, only="last")
    assert complete and "failed: bug: ZeroDivisionError" in said, "as another command found"
    assert table_rows(tmp_path / "out")["bug"] == ["failed", "failed"]
    (tmp_path / "mended").touch()
    complete, said = run(file)
    assert complete and calls(file)[4:] == ["3 2 0", "2 2 0"]
    assert "ailed" not in (tmp_path / "out" / "table.md").read_text()


def test_at_smoke_scale_no_claim_is_judged(tmp_path):
    _, said = run(write(tmp_path), scale="smoke")
    assert said.count("not judged: smoke only shows that it runs") == 3


def test_two_sweeps_in_one_directory_are_refused(tmp_path):
    file = write(tmp_path)
    place = Place(tmp_path / "out", load(str(file), "small"))
    with place.hold(), pytest.raises(UserError, match="another process runs the sweep in"):
        run(file)
    assert calls(file) == []
    run(file, only="x=1*")
    with pytest.raises(UserError, match="holds a sweep of --scale=small, not paper; choose anothe"):
        run(file, scale="paper")
    other = tmp_path / "other.py"
    other.write_text(file.read_text())
    with pytest.raises(UserError, match=r"holds a sweep of --config=.*lines.py, not .*other.py"):
        run(other, workdir=tmp_path / "out")


def sizes(**changes):
    lines = [f"{name} = {value!r}" for name, value in changes.items()]
    return "\n".join(lines)


WIDE = ("wide", {"model.width": 32})
ODD = ("odd", {"attention": "perfromer"})


def test_a_dry_run_tells_costs_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "_speed", lambda: 1e9)
    file = write(tmp_path, TRAINED, sizes(ROWS=[("softmax", {}), WIDE, ODD]))
    complete, said = run(file, dry_run=True, seeds=2)
    assert complete and not (tmp_path / "out").exists()
    rows = {line.split(" | ")[0].strip("| `"): line for line in said.splitlines()}
    softmax = load(str(file), "small").runner.cost({})
    seconds = round(2 * 2 * softmax.multiply_adds / (0.25 * 1e9))
    assert f"| {softmax.parameters:,} | " in rows["softmax"] and 0 < seconds < 60
    assert rows["softmax"].endswith(f"| 0:00:{seconds:02d} |")
    assert f"{2 * softmax.multiply_adds:.2g}" in rows["softmax"]
    assert "will not run" in rows["odd"] and "performer" in rows["odd"]
    assert "3 rows, 2 seeds: 0:0" in said and "a guess from this machine's matrix" in said


def test_a_dry_run_of_measurements_says_that_it_cannot_know(tmp_path):
    file = write(tmp_path)
    run(file, only="x=1, slope=1")
    _, said = run(file, dry_run=True)
    assert "| `x=1, slope=1` |  |  | finished |" in said
    assert "| `x=2, slope=2` |  |  | unknown |" in said
    assert "4 rows, 1 seed: 0:00:00 in one process" in said and "and 3 rows of unknown time" in said


def test_rows_of_another_size_are_refused_where_equal_parameters_are_asked_for(tmp_path):
    rows = [("softmax", {}), WIDE, ODD]
    file = write(tmp_path, TRAINED, sizes(ROWS=rows, EQUAL=0.1))
    complete, said = run(file, only="[wo]*")
    assert not complete
    assert "refused: wide: its 1" in said and "parameters differ by +" in said
    assert "of softmax; 10 % are allowed" in said
    assert "refused: odd: unknown attention 'perfromer'" in said
    assert not list((tmp_path / "out").glob("rows/*"))
    found = table_rows(tmp_path / "out")
    assert found["wide"][0] == found["odd"][0] == "refused" and found["softmax"][0] == "not run"
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Refused:\n\n- `" in text and "- `wide`: its 1" in text and "Failed" not in text
    file = write(tmp_path / "b", TRAINED, sizes(ROWS=[ODD, WIDE], EQUAL=0.1))
    with pytest.raises(UserError, match="row odd, whose size others are to have"):
        run(file)


def test_a_row_that_overrides_what_there_is_not_is_named(tmp_path):
    file = write(tmp_path, TRAINED, sizes(ROWS=[("a", {"trian.steps": 3})]))
    with pytest.raises(UserError, match="row a: a row overrides 'trian.steps', but there is no"):
        run(file)
    file = write(tmp_path, TRAINED, sizes(ROWS=[("a", {"train.stepz": 3})]))
    with pytest.raises(UserError, match="row a: unknown option of config.train 'stepz'"):
        run(file)
    file = write(tmp_path, more='ROWS = [("a", {"z": 1})]')
    with pytest.raises(UserError, match="row a: line has no option z; known: fault, slope, wait"):
        run(file)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("ROWS = [('a', {}), ('a', {'x': 2})]", "has several rows a"),
        ("def get_sweep(scale): return 5", "must return a Sweep, not 5"),
        ("del get_sweep", "has no get_sweep"),
        ("def get_sweep(scale): 1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name", "fails: ModuleNotFoundError"),
    ],
)
def test_a_config_that_fails_is_a_sentence(more, says, tmp_path):
    with pytest.raises(UserError, match=says):
        run(write(tmp_path, more=more))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--scale=smal"], "unknown scale 'smal'; did you mean 'small'"),
        (["--only=y*"], "--only='y.' matches none of the rows: x=1, slope=1, x=2"),
        (
            ["--config=configs/ablations/x.py"],
            "there is no ablation 'configs/ablations/x.py'; he",
        ),
        (["--config=configs/ablations/mqar.py:5"], "mqar.py takes no argument; leave out ':5'"),
        (["--workdir=/dev/null/x"], "--workdir=/dev/null/x cannot be made"),
        (["--seeds=0"], "--seeds must be at least 1, not 0"),
        (["--processes=-1"], "--processes=-1 must be 0 or more"),
        (["--adopt=no.jsonl"], "has no no.jsonl; run its sweep again"),
        (["--adopt=README.md"], "README.md: line 1 is cut"),
        (["--sedes=3"], "unknown flag --sedes=3"),
        (["--seeds=many"], "argument --seeds: invalid int value: 'many'"),
        (["--config="], "name an ablation with --config=FILE"),
    ],
)
def test_a_mistake_on_the_command_line_is_a_sentence(flags, says, tmp_path):
    with pytest.raises(UserError, match=says):
        main(["ablate", f"--config={write(tmp_path)}", f"--workdir={tmp_path}/out", *flags])
    assert not (tmp_path / "out").exists()


def test_help_lists_the_ablations(capsys):
    with pytest.raises(SystemExit) as left:
        main(["ablate", "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "configs/ablations/mqar.py: Recall against the size of the state" in said
    assert "--scale=smoke|small|paper" in said and "--dry_run" in said


def test_exit_code_1_says_that_a_row_failed(tmp_path, capsys):
    file = write(tmp_path, more=FAULTS)
    with pytest.raises(SystemExit) as left:
        main(["ablate", f"--config={file}", f"--workdir={tmp_path}/out", "--processes=0"])
    assert left.value.code == 1
    assert "failed: bug: ZeroDivisionError" in capsys.readouterr().out


def test_results_are_means_and_say_what_is_missing(done):
    file, place, _ = done
    sweep = load(str(file), "small")
    results = Results(sweep.rows, Place(place, sweep).gather())
    assert results.mean("x=1, slope=1", "y") == 1.5
    assert list(results.mean("x=1, slope=1", "curve")) == [1, 2]
    x, y = results.curve("x", "y", {"slope": 1})
    assert list(x) == [1, 2] and y[0] == 1.5
    assert list(results.each("twice", {"x": 2})) == ["x=2, slope=1", "x=2, slope=2"]
    with pytest.raises(Missing):
        results.mean("x=1, slope=1", "z")


def test_the_time_left_is_by_the_work_of_this_command(tmp_path, monkeypatch):
    file = write(tmp_path, more="ROWS = [(str(i), {'x': i}) for i in range(10)]")
    place = Place(tmp_path / "out", load(str(file), "small"))
    clock = [0.0]
    monkeypatch.setattr(displays.time, "perf_counter", lambda: clock[0])
    shares = {0: 0.5, 1: 0.0}
    monkeypatch.setattr(displays, "_share", lambda path: shares[int(path.parent.name[0])])
    terminal = io.StringIO()
    console = Console(file=terminal, width=200, force_terminal=True)
    shown = Display(place, total=10, done=2, console=console)
    shown.tick([((0, 0), 0.0), ((1, 0), 0.0)])
    assert shown._left() == "", "half of row 0 was done before, nothing since"
    clock[0], shares[0], shares[1] = 60.0, 0.75, 0.25
    shown.tick([((0, 0), 0.0), ((1, 0), 0.0)])
    assert shown._left() == "eta 0:14:00", "half a row in a minute; seven rows are left"
    clock[0] = 90.0
    shown.ended((0, 0), Outcome("done"))
    # 0.5 of row 0 and 0.25 of row 1 in 90 s; 6.75 rows are left
    assert shown._left() == "eta 0:13:30"
