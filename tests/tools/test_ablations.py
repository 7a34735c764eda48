"""Every ablation runs at smoke scale and says what the paper says."""

import ast
import json

import pytest

from efficient_attn.tools.ablate.load import load
from efficient_attn.tools.ablate.run import Asked, ablate
from efficient_attn.tools.ablate.sweep import SCALES
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "ablations"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("ablation", NAMES)
def test_it_runs_at_smoke_scale(ablation, tmp_path):
    path = FOLDER / f"{ablation}.py"
    asked = Asked(
        spec=str(path), scale="smoke", seeds=1, only="*", workdir=tmp_path, processes=0,
        dry_run=False, command="ablate",
    )  # fmt: skip
    assert ablate(asked)
    sweep = load(str(path), "smoke")
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["label"] for record in records] == [label for label, _ in sweep.rows]
    found = {name for record in records for name in record["metrics"]}
    assert {column.metric for column in sweep.columns} <= found
    table = (tmp_path / "table.md").read_text()
    assert all(f"| `{label}` |" in table for label, _ in sweep.rows)
    assert "| not run" not in table
    if sweep.panels:
        assert "has no" not in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize("ablation", NAMES)
def test_it_says_its_source_its_command_and_its_scales(ablation):
    path = FOLDER / f"{ablation}.py"
    about = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config=configs/ablations/{path.name}" in about
    sweeps = [load(str(path), scale) for scale in SCALES]
    assert len({sweep.title for sweep in sweeps}) == 1
    assert all(sweep.claims or sweep.published for sweep in sweeps if sweep != sweeps[0])
    for sweep in sweeps:
        for label, overrides in sweep.rows:
            assert sweep.runner.identity(overrides), label
