"""`kernels.tuned` and `kernels.tune`: the table of sizes, who reads it, and how it is made."""

import json
from typing import NamedTuple

import jax
import pytest

from kernels import shapes, target, tune, tuned
from tests.kernels.simulated import SIMULATOR, pallas


class Two(NamedTuple):
    chunk: int = 512
    parts: int = 4


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of our own; its file."""
    file = tmp_path / "tuned.json"
    found = {"sizes": {"chunk": 256}, "how": "estimated"}
    file.write_text(json.dumps({"v6e": {"a": found, "b": found | {"how": tune.DESIGNED}}}))
    monkeypatch.setattr(tuned, "TABLE", file)
    tuned.table.cache_clear()
    yield file
    tuned.table.cache_clear()


def test_the_tables_sizes_are_taken_on_its_chip_and_the_rule_elsewhere(table):
    assert tuned.sizes("a", Two()) == Two()  # a CPU
    with tuned.use("v6e"):
        assert tuned.sizes("a", Two()) == Two(chunk=256)
        assert tuned.sizes("b", Two()) == Two()  # only designed
        assert tuned.sizes("c", Two()) == Two()
    with tuned.use("v5e"):
        assert tuned.sizes("a", Two()) == Two()


def test_a_trial_is_in_the_place_of_the_table(table):
    with tuned.use("v6e", {"c": {"parts": 1}}):
        assert tuned.sizes("c", Two()) == Two(parts=1)
        assert tuned.sizes("a", Two()) == Two()
    with tuned.use("v6e", {}):
        assert tuned.sizes("a", Two()) == Two()


def test_a_size_that_the_kernel_does_not_have_is_an_error():
    with tuned.use(None, {"a": {"colour": 3}}), pytest.raises(ValueError, match="colour"):
        tuned.sizes("a", Two())


@pytest.mark.parametrize("kind", ["TPU v6 lite", "TPU v5e", "NVIDIA H200", "cpu", "NVIDIA H100"])
def test_chips_are_known_by_what_jax_calls_them(kind, monkeypatch):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    known = {"TPU v6 lite": "v6e", "TPU v5e": "v5e", "NVIDIA H200": "h200"}
    assert tuned.chip.__wrapped__() == known.get(kind)


def cost_of(seconds):
    """By the sizes of a trial, twice as long with backward; chunks of 512 do not compile."""

    def cost(case, trial):
        ((_, sizes),) = trial.items()
        if sizes["chunk"] == 512:
            raise NotImplementedError("VMEM")
        return {run: seconds(sizes) * (1.0 + (run == "training")) for run in shapes.PASSES}

    return cost


def test_the_best_sizes_are_found_one_after_the_other():
    search = tune.TPU["linear R128 D128"]
    seconds = lambda s: abs(s["chunk"] - 200) + abs(s["beside"] - 2)  # noqa: E731
    sizes, least, first = tune.best("linear R128 D128", search, cost_of(seconds))
    assert sizes == {"chunk": 256, "parts": 4, "beside": 2}
    assert least == {"forward": 56, "training": 112}
    assert first == {"forward": 74, "training": 148}


def test_less_than_noise_is_no_gain():
    search = tune.TPU["linear R128 D128"]
    sizes, _, _ = tune.best("linear R128 D128", search, cost_of(lambda s: 1 - s["chunk"] / 1e6))
    assert sizes == {"chunk": 128, "parts": 4, "beside": 4}


def test_what_is_found_is_written_down(table, monkeypatch):
    monkeypatch.setattr(tune.ahead, "missing", lambda chip: None)
    monkeypatch.setattr(tune, "Estimates", lambda name: cost_of(lambda s: 64e-6 * s["parts"]))
    assert tune.main(["--target", "v6e", "--only", "^linear R64"]) == 0
    entry = json.loads(table.read_text())["v6e"]["linear R64 D64"]
    assert entry["sizes"] == {"chunk": 128, "parts": 1}
    assert (entry["how"], entry["jax"]) == ("estimated", jax.__version__)
    assert entry["microseconds"] == {"forward": 64.0, "training": 128.0}
    assert entry["by the rule"] == {"forward": 256.0, "training": 512.0}
    with tuned.use("v6e"):
        assert tuned.sizes("linear R64 D64", Two()).parts == 1


def test_measuring_needs_the_chip(capsys):
    assert tune.main(["--target", "h200", "--measure"]) == 2
    assert "no h200" in capsys.readouterr().err


def test_an_estimate_in_other_units_is_not_compared(monkeypatch):
    said = iter([{"": {"cycles": 1750}}, {"": {"cycles": 3500}}, {"": {"issued": 10}}])
    monkeypatch.setattr(
        tune.ahead, "examine", lambda name, case, run, *, trial, bundles: {"kernels": next(said)}
    )
    cost, case = tune.Estimates("v6e"), shapes.SHIPPED[0]
    assert list(cost(case, {}).values()) == pytest.approx([1e-6, 2e-6])
    with pytest.raises(NotImplementedError, match="estimated otherwise"):
        cost(case, {})


def test_entries_are_of_kernels_that_are_searched_and_have_such_sizes():
    for chip, kernels in json.loads(tuned.TABLE.read_text()).items():
        for kernel, entry in kernels.items():
            search = tune.SEARCHES[tune.ahead.CHIPS[chip].family][kernel]
            assert set(entry["sizes"]) == set(search.candidates)
            assert entry["how"] in ("estimated", "measured", tune.DESIGNED)
            assert entry["how"] == tune.DESIGNED or entry["jax"]


@pallas
@pytest.mark.parametrize("dim", [64, 128])
def test_what_is_designed_is_the_rule(dim):
    """People read it, kernels do not; after a change: python -m kernels.tune --target h200."""
    kernel = f"softmax D{dim}"
    entry = json.loads(tuned.TABLE.read_text())["h200"][kernel]
    assert entry["how"] != tune.DESIGNED or entry["sizes"] == tune.rule(kernel)


@pallas
@pytest.mark.parametrize("kernel", tune.TPU)
def test_kernels_ask_for_their_sizes_by_these_names(kernel, monkeypatch):
    asked, own = {}, tuned.sizes
    monkeypatch.setattr(tuned, "sizes", lambda k, rule: asked.setdefault(k, own(k, rule)))
    cases = {case.name: case for case in shapes.SHIPPED}
    with target.use("tpu", SIMULATOR):
        for name in tune.TPU[kernel].cases:
            call = shapes.function(cases[name], "pallas")
            jax.eval_shape(call, *shapes.arguments(cases[name]).values())
    assert asked[kernel]._asdict() == tune.rule(kernel)
    assert set(tune.TPU[kernel].candidates) <= set(tune.rule(kernel))


@pallas
def test_plans_go_by_the_sizes():
    from kernels.pallas_tpu import linear, linear_plan, softmax_plan

    q = jax.ShapeDtypeStruct((1, 4096, 4, 128), "bfloat16")
    window = {"causal": True, "window": (512, 0), "resident": False}
    assert softmax_plan.tiles(q, q, **window) == (512, 512)
    sizes = {"linear R128 D128": {"chunk": 256, "beside": 2}}
    with tuned.use(None, sizes | {"softmax window 512 D128": {"queries": 256}}):
        assert linear.chunk_length(4096, rank=128, dim=128) == 256
        assert linear_plan.beside(4, (q, q, q)) == 2
        assert linear_plan.plan_of((q, q, q), None, 256).parts == 4
        assert softmax_plan.tiles(q, q, **window) == (256, 256)
    assert linear.chunk_length(4096, rank=128, dim=128) == 128
    assert [linear_plan.plan_of((q, q, q), None, c).parts for c in (128, 4096)] == [2, 1]
