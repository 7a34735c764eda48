"""`--adopt`: rows that another sweep has run."""

import json
import shutil

import pytest

from efficient_attn.errors import UserError
from tests.tools.sweeps import calls, records, run, write


def test_what_another_sweep_has_run_is_not_run_again(tmp_path):
    published = write(tmp_path)
    run(published)
    theirs = [record | {"commit": "theirs"} for record in records(tmp_path / "out")]
    assert len(theirs) == len(calls(published)) == 4
    other = theirs[0] | {"overrides": {"x": 1, "slope": 5}}, theirs[1] | {"label": "gone"}
    shutil.copy(tmp_path / "out" / "sweep.json", tmp_path / "published.json")
    path = tmp_path / "published.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (*other, *theirs[2:])))

    (tmp_path / "mine").mkdir()
    file = write(tmp_path / "mine")
    complete, said = run(file, seeds=2, adopt=[path])
    assert complete and "2 of 4 runs taken from" in said and "2 of 8 runs are finished" in said
    assert len(calls(file)) == 6
    here = records(tmp_path / "mine" / "out")
    assert len(here) == 8 and [r for r in here if r["commit"] == "theirs"] == theirs[2:]
    complete, said = run(file, seeds=2, adopt=[path])
    assert complete and "0 of 4 runs taken from" in said and len(calls(file)) == 6


def test_rows_that_two_work_directories_divided_come_together(tmp_path):
    file = write(tmp_path)
    for part, only in (("one", "x=1*"), ("two", "x=2*")):
        run(file, workdir=tmp_path / part, only=only)
    made = calls(file)
    parts = [tmp_path / part / "results.jsonl" for part in ("one", "two")]
    complete, said = run(file, adopt=parts)
    assert complete and said.count("runs taken from") == 2 and calls(file) == made
    assert len(records(tmp_path / "out")) == 4


def test_what_is_of_another_sweep_is_refused(tmp_path):
    file = write(tmp_path)
    run(file)
    mine = {"workdir": tmp_path / "mine", "adopt": [tmp_path / "out" / "results.jsonl"]}
    with pytest.raises(UserError, match="is of --scale=small, not smoke"):
        run(file, scale="smoke", **mine)
    with pytest.raises(UserError, match=r"is of --config=.*lines.py, not .*lines.py:other"):
        run(file, spec=f"{file}:other,/some/data", **mine)
    about = tmp_path / "out" / "sweep.json"
    kept = about.read_text()
    about.write_text("{}")
    with pytest.raises(UserError, match=r"sweep.json is damaged: it has no spec and scale"):
        run(file, **mine)
    about.unlink()
    with pytest.raises(UserError, match=r"sweep.json is missing, which says what"):
        run(file, **mine)
    about.write_text(kept)
    assert not (tmp_path / "mine").exists()
    assert run(file, spec=f"{file}:/some/data", **mine)[0] and len(calls(file)) == 4
