"""Traces of steps: the files that a viewer opens, and what is refused."""

import gzip
import json

import pytest

from efficient_attn.errors import UserError
from efficient_attn.train import config as configs
from efficient_attn.train.workdir import read_json
from tests.train.test_loop import STEPS, Terminal, compiled_once, experiment, run

__all__ = ["compiled_once"]  # a fixture of every test here


def profiled(profile):
    options = configs.to_dict(experiment(attention="softmax", eval_every=50))
    return configs.resolve(options | {"profile": profile})


def traces(path):
    return sorted((path / "profile").glob("plugins/profile/*"))


def test_a_trace_has_the_steps_asked_for_and_what_is_in_them(tmp_path):
    path = tmp_path / "run"
    _, said = run(profiled("4:5"), path, terminal=Terminal(at="step 6/12"))
    assert f"traced steps 4:5: {path}/profile" in said and "stopped and saved at step 6" in said
    assert "profile" not in read_json(path / "config.json")
    _, said = run(profiled("4:5"), path)
    assert "profile='4:5' is behind, nothing will be traced" in said
    (folder,) = traces(path)
    (xplane,) = folder.glob("*.xplane.pb")
    assert b"train" in xplane.read_bytes() and b"input" in xplane.read_bytes()
    (file,) = folder.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = [e for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})]
    assert [event["args"]["step_num"] for event in steps] == ["4", "5"]
    waits = [event for event in events if event.get("name") == "input"]
    assert len(waits) == 2
    first, second = (event["ts"] for event in steps)
    assert first <= waits[0]["ts"] < second <= waits[1]["ts"]
    assert any("dot" in event.get("name", "") for event in events), "operations of the device"


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ("many", "profile must be steps FIRST:LAST such as '10:15', not 'many'"),
        ("10", "profile must be steps FIRST:LAST such as '10:15', not '10'"),
        ("3:2", "profile='3:2' must be steps of the run in order, from 1 to train.steps .12."),
        ("0:2", "profile='0:2' must be steps of the run"),
        (f"3:{STEPS + 1}", "profile='3:13' must be steps of the run"),
        (5, "config.profile must be str, not 5"),
    ],
)
def test_steps_that_cannot_be_traced_are_refused(profile, says):
    with pytest.raises(UserError, match=says):
        profiled(profile)
