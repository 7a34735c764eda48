"""What the loop costs beside a step written by hand."""

import functools
import io
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_attn import backbones, data
from efficient_attn.train import config as configs
from efficient_attn.train import loop as loops
from efficient_attn.train.program import build
from efficient_attn.train.workdir import read_lines
from tests.train.test_loop import experiment, run

LAP, LAPS = 25, 12


class ByHand:
    """The same model and optimizer in a loop of nothing but a jitted step."""

    def __init__(self, config, batch):
        options = {k: v for k, v in config.model.items() if k != "name"}
        source = backbones.Input(kind="image", shape=(8, 8, 1), classes=10)
        model = backbones.create(
            config.model["name"], options, attention="softmax", source=source, rngs=nnx.Rngs(0)
        )
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        self.params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        self.opt, self.number = optimizer.init(self.params), jnp.int32(0)
        self.batch, self.order, self.times = batch, np.random.default_rng(0), []

        @jax.jit
        def step(params, opt, number, inputs, label):
            def loss(params):
                rngs = nnx.Rngs(dropout=jax.random.fold_in(jax.random.key(0), number))
                logits = nnx.merge(graphdef, params, rest)(inputs, rngs=rngs)
                return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, opt = optimizer.update(grads, opt, params)
            return optax.apply_updates(params, updates), opt, number + 1, value

        self.step = step

    def lap(self):
        inputs, label = self.batch["inputs"], self.batch["label"]
        began = time.perf_counter()
        for _ in range(LAP):
            chosen = self.order.choice(len(label), 64, replace=False)
            self.params, self.opt, self.number, value = self.step(
                self.params, self.opt, self.number, inputs[chosen], label[chosen]
            )
        float(value)
        self.times.append((time.perf_counter() - began) / LAP)


class Laps(io.StringIO):
    """Where the run prints: each log line gives the step by hand a lap, outside the run's time."""

    def __init__(self, by_hand):
        super().__init__()
        self.by_hand = by_hand

    def write(self, text):
        if "steps/s" in text:
            self.by_hand.lap()
        return super().write(text)


@pytest.mark.slow
def test_a_step_costs_less_than_a_tenth_more_than_one_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "build", functools.partial(build, devices=1))
    options = configs.base().to_dict()
    options["model"] = {"name": "vit", "patch": 2, "width": 64, "depth": 4, "heads": 4}
    options["train"] |= {"steps": LAP * LAPS, "log_every": LAP, "eval_every": 10_000}
    options["train"]["eval_batch_size"] = 64
    options["optimizer"]["warmup"] = 2
    config = configs.resolve(options)
    source = data.load(config.data).splits["train"]
    by_hand = ByHand(config, source.gather(np.arange(len(source))))
    by_hand.lap()
    by_hand.times.clear()
    run(config, tmp_path / "run", terminal=Laps(by_hand))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    loop = 1 / max(line["steps_per_second"] for line in lines if "steps_per_second" in line)
    ratio = loop / min(by_hand.times)
    print(f"by hand {1e3 * min(by_hand.times):.2f} ms, loop {1e3 * loop:.2f} ms, {ratio:.3f}x")
    assert ratio < 1.1


class Step:
    """What is known of a step's result."""

    def __init__(self, done):
        self.done = done

    def is_ready(self):
        return self.done


@pytest.mark.parametrize(("newest", "lost"), [(None, 1), (Step(True), 1), (Step(False), 0)])
def test_the_wait_for_a_batch_is_lost_unless_a_step_runs(newest, lost):
    def slowly():
        time.sleep(0.02)
        yield {}

    loop = object.__new__(loops.Loop)
    loop.batches, loop._waited, loop._newest = slowly(), 0.0, newest
    assert loop._next_batch() == {}
    assert loop._waited >= 0.02 * lost and bool(loop._waited) == bool(lost)


def test_nothing_is_compiled_after_the_first_step_evaluation_and_diagnosis(tmp_path, monkeypatch):
    """Validation (144 examples) and test (359) end with batches of 64 that are not full."""
    at, compiled = [0], []

    class Tracer(loops.Tracer):
        def step(self, number):
            at[0] = number
            return super().step(number)

    def listen(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append((at[0], about["fun_name"]))

    monkeypatch.setattr(loops, "Tracer", Tracer)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        config = experiment(steps=13, eval_every=4, checkpoint_every=5, diagnostics=3)
        result, _ = run(config, tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert result["steps"] == 13
    own = ("jit(init)", "jit(step)", "jit(predict)")
    found = [(step, name) for step, name in compiled if name in own]
    assert found == [(0, "jit(init)"), (1, "jit(step)"), (4, "jit(predict)")]
    # step 3 is the first that is diagnosed, step 4 the first that is evaluated and saved, for
    # which orbax cuts arrays into slices
    assert {step for step, _ in compiled} == {0, 1, 3, 4}, compiled
