"""What ablations measure on trained models, against closed forms and the mechanisms themselves."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from efficient_attn import attention, backbones
from efficient_attn.attention import Site
from efficient_attn.backbones import Input
from efficient_attn.errors import UserError
from efficient_attn.tools.ablate import Column, Measuring, Panel, Results, Sweep, at_smoke
from efficient_attn.tools.ablate.picture import _panel
from efficient_attn.tools.ablate.results import Record
from efficient_attn.tools.measures import lra_averages, re_evaluate
from efficient_attn.tools.measures.attention_maps import convolution_maps, reach, softmax_maps
from efficient_attn.tools.measures.state_size import state_bytes
from efficient_attn.train.config import base
from kernels import Mask

SITE = Site(width=16, heads=2, seq=12)


@pytest.mark.parametrize(
    "expression",
    ["softmax", "local(window=4)", "linear", "performer(features=8)", "mamba2(state=4)",
     "gated_delta"],
)  # fmt: skip
def test_state_bytes_are_those_of_the_state(expression):
    mixer = attention.build(expression, SITE, needs={"decode"}, rngs=nnx.Rngs(0))
    state = jax.eval_shape(lambda: mixer.init_state(1, jnp.float32))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert state_bytes(expression, SITE, depth=1, length=12) == held


def test_state_bytes_of_a_pattern_are_the_mean_of_its_layers():
    one, other = (state_bytes(e, SITE, depth=1, length=12) for e in ("linear", "softmax"))
    mixed = state_bytes("linear*3 + softmax", SITE, depth=4, length=12)
    assert mixed == (3 * one + other) / 4
    with pytest.raises(UserError, match="linformer does not decode"):
        state_bytes("linformer", SITE, depth=1, length=12)


def test_reach_of_uniform_weights_and_of_the_diagonal():
    size = 9
    uniform = np.tril(np.ones((size, size)))
    far, near = reach(uniform, near=0)
    assert far == pytest.approx((size - 1) / 4)  # row t looks t / 2 back in the mean
    assert near == pytest.approx(np.mean(1 / np.arange(1, size + 1)))
    assert reach(np.eye(size), near=0) == (0.0, 1.0)


@pytest.fixture(scope="module")
def model():
    lite = "lsra(conv='lightweight', gate='linear', kernel=3)"
    source = Input(kind="text", shape=(10,), classes=11, vocab=11)
    options = {"depth": 2, "width": 16, "heads": 2, "dropout": 0.0}
    return backbones.create("causal_lm", options, attention=lite, source=source, rngs=nnx.Rngs(0))


def test_softmax_maps_are_the_weights_that_mix_the_values(model):
    tokens = jnp.asarray(np.random.RandomState(0).randint(1, 11, (3, 10)))
    mixer = model.stack.blocks[0].mixer.attention
    before = model(tokens)
    weights = softmax_maps(model, tokens)
    assert len(weights) == 2 and all(w.shape == (3, 2, 10, 10) for w in weights)
    for layer in weights:
        np.testing.assert_allclose(layer.sum(axis=-1), 1.0, rtol=1e-5)
        assert not np.triu(np.asarray(layer), 1).any()
    np.testing.assert_allclose(model(tokens), before, rtol=1e-6)
    x = model._embed(tokens, jnp.arange(10)[None])
    half = jnp.split(model.stack.blocks[0].normed("mixer", x), 2, axis=-1)[0]
    q, k, v = mixer.project(half)
    given = mixer.attend(q, k, v, Mask(causal=True), {})
    mixed = jnp.einsum("bhts,bshd->bthd", weights[0], v).reshape(3, 10, 8)
    np.testing.assert_allclose(mixer.out(mixed), given, atol=1e-5)


def test_convolution_maps_have_the_taps_beside_the_diagonal(model):
    kernel = model.stack.blocks[0].mixer.local.kernel
    taps = np.asarray(jax.nn.softmax(kernel.weight[...], axis=-1)).mean(axis=0)
    found = np.asarray(convolution_maps(model, length=6, causal=True)[0])
    expected = sum(np.diag(np.full(6 - back, tap), -back) for back, tap in enumerate(taps[::-1]))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_averages_are_those_of_the_paper_and_of_later_ones(tmp_path):
    transformer = (0.3637, 0.6427, 0.5746, 0.4244, 0.7140)
    both = lra_averages.averages(dict(zip(lra_averages.TASKS, transformer, strict=True)))
    assert both is not None
    assert round(100 * both.five, 2) == 54.39  # table 1 of 2011.04006
    assert round(100 * both.six, 2) == 53.66  # table of S4, 2111.00396
    assert lra_averages.averages({"text": 0.6}) is None
    with pytest.raises(UserError, match="no task of the arena: imdb"):
        lra_averages.averages({"imdb": 0.6})
    with pytest.raises(UserError, match="no results in"):
        lra_averages.gather(tmp_path)


def test_the_arenas_table_joins_tasks_by_mechanism(tmp_path):
    for task, label, values in (
        ("listops", "performer(features=2)", (0.1, 0.3)),
        ("text", "performer(features=256)", (0.5,)),
    ):
        (tmp_path / task).mkdir()
        lines = [json.dumps({"label": label, "metrics": {"accuracy": v}}) for v in values]
        (tmp_path / task / "results.jsonl").write_text("\n".join(lines) + "\n")
    table = lra_averages.render(lra_averages.gather(tmp_path))
    assert "| `performer` | 20.00 | 50.00 | not run | not run | not run |  |  |" in table


def test_a_run_is_read_again_under_each_attention(monkeypatch):
    seen = []

    def evaluate(path, *, attention, limit):
        seen.append((path, attention, limit))
        return {"accuracy": len(seen) / 10}

    monkeypatch.setattr(re_evaluate, "evaluate_run", evaluate)
    found = re_evaluate.re_evaluate(Path("run"), {"a": "linear", "b": "softmax"}, limit=5)
    assert found == {"a": 0.1, "b": 0.2}
    assert seen == [(Path("run"), "linear", 5), (Path("run"), "softmax", 5)]


def test_smoke_shrinks_what_the_config_has():
    config = base()
    config.model = {"name": "encoder", "width": 512}
    at_smoke(config)
    assert config.train.steps == 4 and config.data.probes.train == 64
    assert dict(config.model) == {"name": "encoder", "width": 16}


@pytest.mark.parametrize("points", [True, False])
def test_bars_may_be_points_and_no_legend_covers_one(points):
    rows = [("a", {}), ("b", {})]
    records = [
        Record(label, 0, {}, {"loss": value}, 1.0, "", None, {})
        for (label, _), value in zip(rows, (2.0, 3.0), strict=True)
    ]
    sweep = Sweep(
        title="", source="", rows=rows, runner=Measuring(len), columns=[Column("loss", "loss")],
        published={"a": {"loss": 1.5}},
    )  # fmt: skip
    axes = Figure().subplots()
    _panel(Panel(y="loss", points=points), sweep, Results(rows, records), axes)
    assert len(axes.patches) == (0 if points else 2)
    assert (axes.get_xlim()[0] > 1) == points
    assert axes.get_legend() is None and len(axes.figure.legends) == 1
