"""`kernels.static`: what it reads out of the compilers' words, and the compilers themselves."""

import json
import subprocess
from pathlib import Path

import jax
import pytest

from kernels import shapes, tune
from kernels.bench import __main__ as bench
from kernels.static import __main__ as static
from kernels.static import ahead, budget, reports

PTXAS = """\
ptxas warning : Registers are spilled to local memory in function 'body_mosaic_gpu_kernel', \
4 bytes spill stores, 8 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : (C7519) Potential Performance Loss: warpgroup.arrive is injected in function 'body'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 8 bytes cumulative stack size, 1 bytes smem
"""
SASS = """\
 /*0a10*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;
 /*0a20*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24 ;
 /*0a30*/  STL [R1], R2 ;
 /*0a40*/  LDL R2, [R1] ;
 /*0a50*/  LDL.LU R3, [R1+0x4] ;
 /*0a60*/  UTMALDG.3D [UR16], [UR4] ;
"""
LAUNCH = """\
      %3 = gpu.launch async [%1] blocks(%4) in (%5 = %6) dynamic_shared_memory_size %7 {
      %3 = gpu.launch async [%1] blocks(%4) in (%5 = %c2) dynamic_shared_memory_size %c147456_i32 {
      %3 = gpu.launch async [%1] blocks(%4) in (%5 = %c2) dynamic_shared_memory_size %c147456_i32 {
"""
PROFILE = """\
hlo_op_estimate {
  hlo_op_name: "f.1"
  estimated_cycles: 65982
  num_equivalent_hlos: 1
}
hlo_op_estimate {
  hlo_op_name: "fusion"
  estimated_cycles: 13262
}
"""
BUNDLES = """\
// Bundle listing:
LB: loop body
     0   :  { %s1 = sadd.s32 1, %s0 }
   0x1   :  {} /* Start region 0 */
   0x2 LB: > { %s13 = sadd.s32 1, %s16 }
   0x3   : > {  %v1 = vadd %v0, %v0 }
   0x4 LB: >> { %v2 = vadd %v1, %v1 }
   0x5   : >> { %p9 = scmp.ge.s32.totalorder %s9, 8 /* loop exit test */ }
   0x6 PF: > { %v3 = vadd %v1, %v1 }
   0x7   : > { %p10_p8 = scmp.ge.s32.totalorder %s13_s16, 66 /* loop exit test */  ;; %s10 = s }
   0x8   :  {}
"""
HLO = """\
ENTRY %main.2 (a.1: bf16[1,4]) -> bf16[1,4] {
  %fusion = bf16[4] fusion(%a.1), kind=kLoop, calls=%f, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"7"}]}
  ROOT %call.1 = bf16[1,4]{1,0:T(8,128)S(1)} custom-call(%x, %y), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz"},"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"532992"}]}
}
"""  # noqa: E501


@pytest.mark.parametrize(("pattern", "reason"), [("*", "no regular"), ("nope", "none of")])
@pytest.mark.parametrize(
    ("main", "order"),
    [
        (static.main, ["--target", "v6e", "--only"]),
        (tune.main, ["--target", "v6e", "--only"]),
        (bench.main, ["--quick", "--ops"]),
    ],
)
def test_a_pattern_that_chooses_nothing_is_refused(main, order, pattern, reason, capsys, tmp_path):
    out = ["--out", str(tmp_path)] if main is bench.main else []
    with pytest.raises(SystemExit):
        main([*order, pattern, *out])
    said = capsys.readouterr().err
    assert f"error: '{pattern}' is " in said and reason in said


def test_what_ptxas_says():
    expected = {"registers": 168, "spill": 12, "warnings": ["C7511", "C7519"]}
    assert reports.read_ptxas(PTXAS) == expected


def test_what_is_not_ptxas_is_refused():
    with pytest.raises(ValueError, match="not ptxas's report"):
        reports.read_ptxas("ptxas fatal : memory allocation failure")


def test_a_disassembly_is_counted():
    assert reports.read_sass(SASS) == {"hgmma": 2, "local": 3}


def test_cycles_by_instruction():
    assert reports.read_profile(PROFILE) == {"f.1": 65982, "fusion": 13262}


def test_an_estimate_counts_for_all_that_equal_it():
    twice = PROFILE.replace("hlos: 1", "hlos: 2")
    assert reports.read_profile(twice)["f.1"] == 2 * 65982


def test_bundles_count_as_often_as_their_loops_turn():
    """An empty bundle is listed outside of all loops; it is in that of the bundle before it."""
    assert reports.read_bundles(BUNDLES) == {"issued": 2 + 66 * (5 + 2 * 8), "endless": 0}


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    unknown = BUNDLES.replace(", 8 /*", ", %s7 /*")
    assert reports.read_bundles(unknown) == {"issued": 2 + 66 * (5 + 2), "endless": 1}


def test_memory_of_the_pallas_calls_alone():
    assert reports.read_calls(HLO) == {"call.1": 532992}


def test_a_gpu_kernel_is_put_together_from_its_dumps(tmp_path):
    (tmp_path / "body_0.ptxas").write_text(PTXAS)
    (tmp_path / "body_0.sass_ctrl").write_text(SASS)
    (tmp_path / "body_0.mlir-passes.log").write_text(LAUNCH)
    report = reports.gpu_figures(tmp_path)
    assert list(report) == ["body_0"]
    assert report["body_0"]["shared"] == 147456
    assert report["body_0"]["hgmma"] == 2


def test_a_tpu_program_is_put_together_from_its_dumps(tmp_path):
    (tmp_path / "x_static_llo_profile.textproto").write_text(PROFILE.replace("f.1", "call.1"))
    report = reports.tpu_figures(tmp_path, HLO)
    assert report["call.1"] == {"vmem": 532992, "cycles": 65982}
    assert report[""] == {"cycles": 65982 + 13262, "outside": 13262}


def test_where_the_estimator_gave_up_bundles_are_counted(tmp_path):
    (tmp_path / "1795-call.1-72-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "1795-call.1-71-schedule-analysis_final_bundles.txt").write_text("Schedule")
    (tmp_path / "1796-fusion-66-final_bundles.txt").write_text(BUNDLES)
    report = reports.tpu_figures(tmp_path, HLO)
    issued = 2 + 66 * 21
    assert report["call.1"] == {"vmem": 532992, "issued": issued, "endless": 0}
    assert report[""] == {"issued": 2 * issued, "outside": issued}


KERNEL = {"registers": 168, "spill": 0, "warnings": ["C7519"], "hgmma": 28, "shared": 147456}


def said(**changes):
    return {"kernels": {"body_0": KERNEL | changes}}


BUDGET = {"case": {"body_0": KERNEL}}


def test_nothing_to_complain_of():
    assert budget.complaints("case", said(), BUDGET) == []
    assert budget.complaints("case", said(hgmma=20), BUDGET) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill": 12}, "body_0: 12 bytes spilled"),
        ({"warnings": ["C7511"]}, "wgmma is serialised"),
        ({"shared": 147457}, "shared 147,457, the budget is 147,456"),
        ({"hgmma": 29}, "hgmma 29, the budget is 28"),
    ],
)
def test_what_is_worse_than_the_budget_is_named(changes, words):
    first, *_ = budget.complaints("case", said(**changes), BUDGET)
    assert words in first


def test_a_spill_is_wrong_though_the_budget_has_it():
    spilled = {"case": {"body_0": KERNEL | {"spill": 12}}}
    assert budget.complaints("case", said(spill=12), spilled)
    assert budget.complaints("case", said(spill=12), None)


def test_estimates_have_leeway_and_no_more():
    least = {"case": {"f": {"cycles": 1000}}}
    assert not budget.complaints("case", {"kernels": {"f": {"cycles": 1020}}}, least)
    assert budget.complaints("case", {"kernels": {"f": {"cycles": 1021}}}, least)


def test_what_fails_is_refused_or_comes_and_goes_is_named():
    assert budget.complaints("case", {"failed": "VMEM"}, None) == ["case: VMEM"]
    assert "now refused" in budget.complaints("case", {"refused": "too long"}, BUDGET)[0]
    assert budget.complaints("new", {"refused": "too long"}, BUDGET) == []
    assert "not in the budget" in budget.complaints("new", said(), BUDGET)[0]
    other = {"kernels": {"body_0": KERNEL, "body_1": KERNEL}}
    assert "body_1" in budget.complaints("case", other, BUDGET)[0]


def test_a_compiler_that_is_missing_is_said_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    assert static.main(["--target", "v6e"]) == 2
    assert 'pip install "jax[tpu]' in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """What child processes are asked, and with which dump; the estimator aborts on windows."""
    made = []

    def run(order, env, **_):
        folder, dump = Path(order[-1]), env.get("LIBTPU_INIT_ARGS", "")
        estimate = "static_llo_profile" in dump
        request = json.loads((folder / "request.json").read_text())
        made.append((request["case"]["op"], request["run"], request["trial"], estimate))
        if estimate and request["case"]["op"] == "window_attention":
            return subprocess.CompletedProcess(order, -6, "", "LLO_CHECK AnalyzeBundles")
        (folder / "report.json").write_text(json.dumps({"kernels": {}}))
        return subprocess.CompletedProcess(order, 0, "", "")

    monkeypatch.setattr(ahead.subprocess, "run", run)
    return made


def test_bundles_are_counted_where_the_estimator_gives_up(asked):
    cases = {case.op: case for case in reversed(shapes.SHIPPED)}
    trial = {"a": {"chunk": 1}}
    for op in ("softmax_attention", "window_attention", "linear_attention"):
        assert ahead.examine("v6e", cases[op], "training", trial=trial) == {"kernels": {}}
    assert ahead.examine("v6e", cases["linear_attention"], "forward") == {"kernels": {}}
    assert asked == [
        ("softmax_attention", "training", trial, True),
        ("window_attention", "training", trial, True),
        ("window_attention", "training", trial, False),
        ("linear_attention", "training", trial, False),
        ("linear_attention", "forward", None, True),
    ]


def test_an_estimate_of_nothing_is_none(asked, monkeypatch):
    """The estimator says 0 of a body that is too long for it."""
    case, own = shapes.SHIPPED[0], ahead.subprocess.run

    def run(order, env, **how):
        done = own(order, env, **how)
        unit = "cycles" if asked[-1][-1] else "issued"
        report = {"kernels": {"body": {unit: 7 * (unit == "issued")}}}
        (Path(order[-1]) / "report.json").write_text(json.dumps(report))
        return done

    monkeypatch.setattr(ahead.subprocess, "run", run)
    assert ahead.examine("v6e", case, "forward") == {"kernels": {"body": {"issued": 7}}}
    assert [row[-1] for row in asked] == [True, False]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compilers that say the same of every case, and a budget of their own."""
    monkeypatch.setattr(ahead, "missing", lambda chip: None)
    monkeypatch.setattr(budget, "BUDGET", tmp_path / "budget.json")
    figures = dict(KERNEL)
    report = {"kernels": {"body_0": figures, "": {"temporary": 7}}}
    monkeypatch.setattr(ahead, "examine", lambda name, case, run: report)
    return figures


def test_written_figures_are_kept_and_a_later_spill_or_growth_fails(compiled, capsys):
    only = ["--target", "h200", "--only", "^linformer_attention"]
    assert static.main([*only, "--check"]) == 0
    assert "spills alone" in capsys.readouterr().out
    assert static.main([*only, "--write", "--jobs", "2"]) == 0
    assert static.main([*only, "--check"]) == 0
    assert "2 compiled, nothing to complain of" in capsys.readouterr().out
    compiled["shared"] += 1
    assert static.main([*only, "--check"]) == 1
    assert "shared 147,457, the budget is 147,456" in capsys.readouterr().out
    compiled["spill"] = 4
    assert static.main([*only, "--write", "--check"]) == 1
    assert "4 bytes spilled" in capsys.readouterr().out


def test_the_budget_has_no_spill_and_knows_its_cases():
    kept = json.loads(budget.BUDGET.read_text())
    known = {f"{case.name}, {run}" for case in shapes.SHIPPED for run in shapes.PASSES}
    for versions in kept.values():
        for cases in versions.values():
            assert set(cases) <= known
            for report in cases.values():
                assert all(not figures.get("spill") for figures in report.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", shapes.SHIPPED, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ahead.CHIPS)
def test_shipped_kernels_keep_to_their_budget(name, case, capsys):
    """In the passes that budget.json has of it; without figures of this jax, for spills alone."""
    if why := ahead.missing(ahead.CHIPS[name]):
        pytest.skip(why)
    version = f"jax {jax.__version__}"
    known = budget.read().get(name, {}).get(version, {})
    passes = [run for run in shapes.PASSES if f"{case.name}, {run}" in known]
    if known and not passes:
        pytest.skip(f"budget.json has no figures of it with {version}: add them by --write")
    order = ["--target", name, "--only", f"^{case.name}$", "--check"]
    status = static.main([*order, "--passes", *(passes or ["training"])])
    assert status == 0, capsys.readouterr().out
