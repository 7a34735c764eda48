"""The directory of a run."""

import subprocess
import sys

import pytest

from efficient_attn.errors import UserError
from efficient_attn.train.workdir import Workdir
from tests.conftest import ROOT


def test_replace_moves_the_run_and_nothing_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    moved = Workdir(tmp_path).start({"seed": 0}, replace=True)
    assert moved == tmp_path / "replaced-1"
    assert sorted(path.name for path in moved.iterdir()) == ["checkpoints", "result.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "replaced-1", "thesis.tex",
    ]  # fmt: skip


def test_only_one_process_trains_in_a_directory(tmp_path):
    code = (
        "import sys; from efficient_attn.train.workdir import Workdir\n"
        f"with Workdir({str(tmp_path)!r}).hold(): print('held')"
    )
    other = [sys.executable, "-c", code]
    with Workdir(tmp_path).hold():
        done = subprocess.run(other, capture_output=True, text=True, cwd=ROOT, check=False)
        assert f"another process is training in {tmp_path}" in done.stderr
    done = subprocess.run(other, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "held\n", done.stderr


def test_a_directory_that_cannot_be_made_is_told():
    with (
        pytest.raises(UserError, match="--workdir=/proc/nothing cannot be made"),
        Workdir("/proc/nothing").hold(),
    ):
        pass
