"""`kernels.bench` and what it stands on: counts, checks, clocks, the file and the picture."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import shapes
from kernels.bench import device_time, proof, rivals, run
from kernels.shapes import Case

LINEAR = Case(op="linear_attention", batch=1, length=8192, heads=96, dim=128, causal=True)
SMALL = Case(op="linear_attention", batch=1, length=64, heads=2, dim=8, causal=True)


def test_counts_of_linear_attention_are_those_of_the_published_tables():
    tokens = 8192 * 96
    assert shapes.work(LINEAR, "forward") == 98_304 * tokens
    assert shapes.work(LINEAR, "training") == (98_304 + 262_144) * tokens
    assert shapes.traffic(LINEAR, "forward") == 1024 * tokens
    assert shapes.traffic(LINEAR, "training") == (1024 + 2560) * tokens


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [0, 4])
@pytest.mark.parametrize("op", ["softmax_attention", "window_attention"])
def test_pairs_are_those_of_the_mask(op, causal, segments):
    case = Case(op=op, batch=2, length=48, heads=3, dim=8, causal=causal, window=5,
                segments=segments)  # fmt: skip
    t = np.arange(48)
    ahead = t[:, None] - t[None]
    seen = ahead >= 0 if causal else np.ones_like(ahead, bool)
    if op == "window_attention":
        seen &= (ahead <= 5) & (ahead >= -5)
    if segments:
        owner = t * segments // 48
        seen &= owner[:, None] == owner[None]
    assert shapes.pairs(case) == 2 * 3 * seen.sum()


def test_fewer_key_heads_and_projected_keys_are_less_to_read():
    softmax = Case(op="softmax_attention", batch=1, length=1024, heads=8, dim=64)
    array = 1024 * 8 * 64 * 2
    assert shapes.traffic(softmax, "forward") == 4 * array
    assert shapes.traffic(dataclasses.replace(softmax, groups=2), "forward") == 2.5 * array
    linformer = dataclasses.replace(softmax, op="linformer_attention", rank=256)
    assert shapes.traffic(linformer, "forward") == 2.5 * array
    assert shapes.pairs(linformer) == 8 * 1024 * 256


def test_names_tell_cases_apart():
    for cases in (shapes.SHIPPED, shapes.MEASURED, shapes.QUICK):
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("case", shapes.QUICK, ids=lambda case: case.op)
def test_a_case_is_a_function_of_its_arrays(case):
    case = dataclasses.replace(case, length=32, heads=2, dim=8, segments=0)
    out, *grads = jax.eval_shape(
        shapes.gradient(case, "xla"), *shapes.arguments(case).values(), shapes.arguments(case)["q"]
    )
    assert out.shape == shapes.arguments(case)["q"].shape
    more = {"gated_linear_attention": 1, "gated_delta_rule": 2}
    assert len(grads) == 3 + more.get(case.op, 0)


def test_an_op_that_is_not_there_is_refused():
    with pytest.raises(NotImplementedError, match="no op 'hyena'"):
        shapes.function(dataclasses.replace(SMALL, op="hyena"))


def small(dtype="float32"):
    case = dataclasses.replace(SMALL, dtype=dtype)
    given = run.inputs(dataclasses.replace(case, length=64))[:2]
    return case, given, run.truth(case, given[0])


def test_what_is_right_is_timed_and_rated():
    case, given, expected = small()
    clock = device_time.timer()
    rows = run.measure("xla", case, given, expected, clock)
    assert [row["pass"] for row in rows] == ["forward", "training"]
    ceilings = {"bytes_per_second": 1e9, "flops_per_second": 1e12}
    row = run.rated(case, rows[0], ceilings)
    assert row["low"] <= row["ms"] <= row["high"]
    assert row["error_forward"] < 1e-5
    assert row["bound_ms"] == pytest.approx(1e3 * shapes.traffic(case, "forward") / 1e9)
    assert row["of_bound"] == pytest.approx(row["bound_ms"] / row["ms"])
    assert "of the bound" in run.line(row)


@pytest.mark.parametrize("place", [0, 2])
def test_what_is_wrong_is_not_timed(monkeypatch, place):
    case, given, expected = small()
    forward, right = shapes.function(case, "xla"), shapes.gradient(case, "xla")

    def off(*arrays):
        made = list(right(*arrays))
        made[place] = made[place] * 1.01
        return tuple(made)

    monkeypatch.setattr(run, "candidate", lambda name, case: (forward, off, False))
    (row,) = run.measure("xla", case, given, expected, device_time.timer())
    assert "ms" not in row
    assert row["skipped"].startswith("wrong: " + ("output", "gradient")[place > 0])


def test_nan_is_wrong():
    x = jnp.ones(4)
    assert run.wrong(SMALL, (x * jnp.nan, x), (x, x))[0]
    assert run.wrong(SMALL, (x, x * jnp.nan), (x, x))[0]
    assert run.wrong(SMALL, (x, x), (x, x))[0] is None


def test_what_fails_says_why():
    case, given, expected = small()
    (row,) = run.measure("pallas", case, given, expected, device_time.timer())
    assert "pallas" in row["skipped"]


def test_a_rival_that_is_not_installed_is_named():
    with pytest.raises(NotImplementedError, match="no_such_package is not to be had"):
        rivals.package("no_such_package.part")
    assert rivals.of(SMALL) == ["fla"]
    assert rivals.of(dataclasses.replace(SMALL, op="favor_attention")) == []


TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(C)"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Ops"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 7, "args": {"name": "Stream fan"}},
        {"ph": "X", "pid": 1, "tid": 7, "ts": 100.0, "dur": 50.0, "name": "kernel"},
        {"ph": "X", "pid": 1, "tid": 7, "ts": 140.0, "dur": 20.0, "name": "beside it"},
        {"ph": "X", "pid": 1, "tid": 7, "ts": 200.0, "dur": 5.0, "name": "kernel"},
        {"ph": "X", "pid": 1, "tid": 8, "ts": 0.0, "dur": 900.0, "name": "the same again"},
        {"ph": "X", "pid": 2, "tid": 7, "ts": 0.0, "dur": 900.0, "name": "host"},
    ]
}


def test_a_device_is_busy_while_anything_runs_on_it():
    assert device_time.busy_seconds(TRACE, "Stream") == pytest.approx(65e-6)
    assert device_time.busy_seconds({"traceEvents": TRACE["traceEvents"][:5]}, "Stream") == 0


def test_jaxs_profiler_still_writes_such_a_trace(tmp_path):
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(tmp_path), profiler_options=options)
    jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(8)))
    jax.profiler.stop_trace()
    (found,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "process_name" for event in events)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "commit", lambda: "abc1234")
    monkeypatch.setattr(run, "ceilings", lambda clock: {"bytes_per_second": 1e9,
                                                          "flops_per_second": 1e9})  # fmt: skip
    times = iter([{"ms": 1.0, "low": 1.0, "high": 1.0, "timer": "clock"}] * 2)
    monkeypatch.setattr(device_time.Timer, "__call__", lambda *_, torch: next(times))
    assert run.run([SMALL], tmp_path, 1e-9)[0] == 3
    assert run.run([dataclasses.replace(SMALL, dtype="float32")], tmp_path, 1.0)[0] == 0
    (path,) = tmp_path.glob("bench-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["by"] for row in rows] == ["pallas", "xla", "xla", "fla"]
    assert run.run([dataclasses.replace(SMALL, dtype="float32")], tmp_path, 1.0)[0] == 0
    assert json.loads(path.read_text())["rows"] == rows
    assert "run again" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert path.with_suffix(".png").stat().st_size > 1000


LONG = dataclasses.replace(SMALL, length=512)
WINDOW = Case(op="window_attention", batch=1, length=64, heads=2, dim=8, causal=True, window=8)


def timed(case, by, forward, training):
    each = zip(shapes.PASSES, (forward, training), strict=True)
    return [{"case": case.name, "by": by, "pass": name, "ms": ms} for name, ms in each]


def skipped(case, by, **more):
    return [{"case": case.name, "by": by, "skipped": "why"} | more]


KERNEL = timed(SMALL, "pallas", 1.0, 2.0)
XLA = timed(SMALL, "xla", 3.0, 3.0)


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        (KERNEL + XLA, {"least": 1.5, "most": 3.0}),
        (KERNEL + skipped(SMALL, "xla"), "nothing to compare"),
        (KERNEL, "not run yet"),
        (skipped(SMALL, "pallas", refused=True) + XLA, "nothing to compare"),
        (skipped(SMALL, "pallas") + XLA, "why"),
        (KERNEL + timed(SMALL, "xla", 3.0, 1.9), "training: 0.95 times as fast as XLA"),
    ],
)
def test_a_kernel_is_proven_that_was_right_and_faster_in_every_case(rows, verdict):
    for cases, known in (([SMALL], rows), ([LONG, SMALL], timed(LONG, "pallas", 1, 1)
                                           + timed(LONG, "xla", 2, 2) + rows)):  # fmt: skip
        found = proof.judge(cases, known)
        assert found["linear_attention"] == found["causal_linear_attention"]
        if isinstance(verdict, dict):
            assert found["linear_attention"] == verdict
        elif verdict != "nothing to compare":
            assert SMALL.name in found["linear_attention"]
            assert verdict in found["linear_attention"]
        else:
            expected = verdict if len(cases) == 1 else {"least": 2.0, "most": 2.0}
            assert found["linear_attention"] == expected


def test_what_is_proven_is_kept_by_device_and_taken_back_when_it_no_longer_holds(tmp_path, capsys):
    table = tmp_path / "proven.json"
    kept = {"device": "a chip", "commit": "abc", "versions": {"jax": "1.2"}, "rows": KERNEL + XLA}
    linear = {"table": table, "cases": [SMALL]}
    proof.prove({"linear_attention"}, kept, **linear)
    entry = {"least": 1.5, "most": 3.0, "commit": "abc", "jax": "1.2"}
    ops = {"linear_attention": entry, "causal_linear_attention": entry}
    assert json.loads(table.read_text()) == {"a chip": ops}
    other = kept | {"device": "another", "rows": timed(WINDOW, "pallas", 2, 2)
                    + timed(WINDOW, "xla", 1, 1)}  # fmt: skip
    proof.prove({"window_attention"}, other, table=table, cases=[SMALL, WINDOW])
    assert json.loads(table.read_text()) == {"a chip": ops}
    assert "not proven: window_attention: window_attention causal B1 T64" in capsys.readouterr().out
    proof.prove({"linear_attention"}, kept | {"rows": KERNEL}, **linear)
    assert json.loads(table.read_text()) == {}


def test_one_case_of_an_op_proves_nothing(tmp_path, capsys):
    kept = {"device": "a chip", "commit": "abc", "versions": {"jax": "1.2"}, "rows": KERNEL + XLA}
    proof.prove({"linear_attention"}, kept, table=tmp_path / "proven.json")
    assert json.loads((tmp_path / "proven.json").read_text()) == {}
    assert "not run yet" in capsys.readouterr().out
