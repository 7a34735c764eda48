"""The compiled functions of an experiment: first state, training step, prediction, diagnosis.

The model is taken apart once. The state is a plain pytree of arrays:

    params, rest   the model: what is trained, and what is carried along (`attention.Buffer`, the
                   running statistics of batch norm)
    opt, ema       optimizer state; moving average of params and running statistics, {} when off
    step           updates made
    first_bad      number of the step whose loss or gradient was not finite, -1 until then
    tally          sums of the metrics since the last log line

Everything in it goes into a checkpoint, so a restored run is the run left alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from efficient_attn import attention, backbones
from efficient_attn.data import Dataset, Info, Source
from efficient_attn.data.loader import check
from efficient_attn.errors import UserError
from efficient_attn.layers.rngs import make_rngs
from efficient_attn.train import optimizers, sharding
from efficient_attn.train.config import Experiment
from efficient_attn.train.objective import Teacher, make_gradient, take_apart
from efficient_attn.train.task import CrossEntropy

State = dict[str, Any]
Batch = dict[str, Any]
Create = Callable[[nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run needs of its model. `step` consumes the state it is given.

    abstract: the state as shapes, types and shardings.
    init: () -> state
    step: (state, batch) -> (state, metrics); metrics are means since the last log line
    trace: the step's arguments -> None; the first step of such shapes then has no more to trace
    predict: (state, batch) -> {"loss", "accuracy", "prediction", "probability"}, each of the
        label's shape
    diagnose: (state, batch) -> {name: number}
    evaluated: state -> the model with the parameters that evaluation uses
    """

    mesh: Mesh
    abstract: State
    init: Callable[[], State]
    step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    trace: Callable[[State, Batch], Any]
    predict: Callable[[State, Batch], dict[str, jax.Array]]
    diagnose: Callable[[State, Batch], dict[str, float]]
    evaluated: Callable[[State], Any]

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract["params"]))


def complete(experiment: Experiment) -> Experiment:
    """The same experiment with every option of its backbone written out.

    Raises:
        UserError: an unknown backbone, or an option that it does not have.
    """
    options = dict(experiment.model)
    name = options.pop("name")
    model = {"name": name, **dataclasses.asdict(backbones.configure(name, options))}
    return dataclasses.replace(experiment, model=model)


def build(
    experiment: Experiment,
    dataset: Dataset,
    *,
    devices: int | None = None,
    teacher: Teacher | None = None,
) -> Program:
    """The program of an experiment on the first `devices` local devices, all by default.

    teacher: whom `experiment.distill` names (`teacher.load`).

    Raises:
        UserError: whatever the backbone, the mechanism or its backend refuses; a batch that cannot
            be split; no examples to train on.
    """
    create = creator(experiment, dataset.info)
    program = compile_for(create, experiment, devices=devices, teacher=teacher)
    _try_out(program, experiment, dataset.splits["train"])
    return program


def creator(experiment: Experiment, info: Info) -> Create:
    """What makes the model of an experiment, given what there is to know of its data."""
    options = dict(experiment.model)
    name = options.pop("name")
    source = backbones.Input(
        kind=info.kind, shape=info.shape, classes=info.classes, vocab=info.vocab
    )

    def create(rngs: nnx.Rngs) -> nnx.Module:
        return backbones.create(
            name,
            options,
            attention=experiment.attention,
            source=source,
            backend=experiment.backend,
            dtype=jnp.dtype(experiment.train.dtype),
            rngs=rngs,
        )

    return create


def _try_out(program: Program, experiment: Experiment, source: Source) -> None:
    """Trace a step, which is kept for the first one, so that nothing is refused later on."""
    check(source)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((experiment.data.batch_size, *x.shape[1:]), x.dtype),
        source.gather([0]),
    )
    try:
        program.trace(program.abstract, batch)
    except NotImplementedError as error:
        said = f"config.backend={experiment.backend!r}, train.dtype={experiment.train.dtype!r}"
        raise UserError(f"{said}: {error}") from error


def compile_for(
    create: Create,
    experiment: Experiment,
    *,
    devices: int | None = None,
    teacher: Teacher | None = None,
) -> Program:
    """`build` for any model: `create(rngs)` makes it, `model(inputs, rngs=...)` gives logits."""
    train, mesh = experiment.train, sharding.make_mesh(devices)
    batch = {"mesh": mesh, "accumulate": train.accumulate, "where": "data.batch_size"}
    sharding.check_batch(experiment.data.batch_size, **batch)
    batch |= {"accumulate": 1, "where": "train.eval_batch_size"}
    sharding.check_batch(train.eval_batch_size, **batch)

    optimizer = optimizers.create(experiment.optimizer, steps=train.steps)
    graphdef, _, _ = nnx.split(nnx.eval_shape(lambda: create(make_rngs(0))), nnx.Param, ...)

    init = _make_init(create, optimizer, experiment)
    abstract = jax.eval_shape(init)
    layout = sharding.of_state(abstract, mesh=mesh, mode=train.sharding)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        layout,
    )
    rows, whole = sharding.over_batch(mesh), jax.sharding.NamedSharding(mesh, jax.P())
    divided = sharding.of_kernels(mesh)
    known = jax.device_put(teacher.arrays, whole) if teacher else {}
    step = jax.jit(
        divided(_make_step(graphdef, optimizer, experiment, teacher and teacher.graphdef)),
        in_shardings=(layout, rows, whole),
        out_shardings=(layout, whole),
        donate_argnums=0,
    )
    return Program(
        mesh=mesh,
        abstract=abstract,
        # It runs once, so compiling it is all that it costs: four times less without optimizing.
        init=jax.jit(
            init, out_shardings=layout, compiler_options={"xla_backend_optimization_level": 0}
        ),
        step=lambda state, batch: step(state, batch, known),
        trace=lambda state, batch: step.trace(state, batch, known),
        predict=jax.jit(
            divided(_make_predict(graphdef)), in_shardings=(layout, rows), out_shardings=whole
        ),
        diagnose=divided(_make_diagnose(graphdef)),
        evaluated=functools.partial(_evaluated, graphdef),
    )


def _make_init(
    create: Create, optimizer: optax.GradientTransformation, experiment: Experiment
) -> Callable[[], State]:
    def init() -> State:
        model = create(make_rngs(experiment.seed))
        params, rest = take_apart(model)
        averaged = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
        return {
            "params": params,
            "rest": rest,
            "opt": optimizer.init(params),
            "ema": jax.tree.map(jnp.copy, averaged) if experiment.train.ema else {},
            "step": jnp.int32(0),
            "first_bad": jnp.int32(-1),
            "tally": {"loss": jnp.float32(0), "accuracy": jnp.float32(0), "steps": jnp.int32(0)},
        }

    return init


def _make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    experiment: Experiment,
    teacher: nnx.GraphDef | None,
) -> Callable[[State, Batch, Any], tuple[State, dict]]:
    train = experiment.train
    gradient = make_gradient(graphdef, experiment, teacher)
    rate = optimizers.schedule(experiment.optimizer, steps=train.steps)

    def step(state: State, batch: Batch, known: Any) -> tuple[State, dict]:
        model = nnx.merge(graphdef, state["params"], state["rest"])
        attention.refresh(model, state["step"])
        _, rest = take_apart(model)
        key = jax.random.fold_in(jax.random.key(experiment.seed), state["step"])
        grads, rest, metrics = gradient(state["params"], rest, batch, key, known)

        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params: Any = optax.apply_updates(state["params"], updates)
        ema = state["ema"]
        if train.ema:
            t = state["step"].astype(jnp.float32)
            decay = jnp.minimum(train.ema, (1 + t) / (10 + t))
            ema = optax.incremental_update(_within(_over(rest, params), ema), ema, 1 - decay)

        norm = optax.tree.norm(grads)
        bad = ~(jnp.isfinite(metrics["objective"]) & jnp.isfinite(norm))
        first_bad = jnp.where((state["first_bad"] < 0) & bad, state["step"] + 1, state["first_bad"])
        fresh = state["step"] % train.log_every == 0
        tally = {
            "loss": jnp.where(fresh, 0, state["tally"]["loss"]) + metrics["loss"],
            "accuracy": jnp.where(fresh, 0, state["tally"]["accuracy"]) + metrics["accuracy"],
            "steps": jnp.where(fresh, 0, state["tally"]["steps"]) + 1,
        }
        new = {
            "params": params,
            "rest": rest,
            "opt": opt,
            "ema": ema,
            "step": state["step"] + 1,
            "first_bad": first_bad,
            "tally": tally,
        }
        kept = state | {"first_bad": first_bad}
        new = jax.tree.map(lambda n, o: jnp.where(first_bad < 0, n, o), new, kept)
        return new, {
            "loss": tally["loss"] / tally["steps"],
            "accuracy": tally["accuracy"] / tally["steps"],
            "grad_norm": norm,
            "learning_rate": rate(state["step"]),
            "first_bad": first_bad,
        }

    return step


def _evaluated(graphdef: nnx.GraphDef, state: State) -> Any:
    return nnx.merge(graphdef, _over(state["rest"], state["ema"] or state["params"]))


def _over(under: dict, over: dict) -> dict:
    """Both trees as one; where both have a leaf it is that of `over`."""
    both = {k: _over(under[k], over[k]) for k in under.keys() & over.keys() if _deep(over[k])}
    return under | over | both


def _within(whole: dict, part: dict) -> dict:
    """The leaves of `whole` that `part` has too."""
    return {k: _within(whole[k], v) if _deep(v) else whole[k] for k, v in part.items()}


def _deep(tree: Any) -> bool:
    return isinstance(tree, dict)


def _make_predict(graphdef: nnx.GraphDef) -> Callable[[State, Batch], dict[str, jax.Array]]:
    task = CrossEntropy()

    def predict(state: State, batch: Batch) -> dict[str, jax.Array]:
        logits = _evaluated(graphdef, state)(batch["inputs"], rngs=None)
        return task.metrics(logits, batch["label"]) | {
            "prediction": logits.argmax(-1),
            "probability": jax.nn.softmax(logits).max(-1),
        }

    return predict


def _make_diagnose(graphdef: nnx.GraphDef) -> Callable[[State, Batch], dict[str, float]]:
    def diagnose(state: State, batch: Batch) -> dict[str, float]:
        model = nnx.merge(graphdef, state["params"], state["rest"])
        return attention.diagnose(model, jax.tree.map(jnp.asarray, batch["inputs"]))

    return diagnose


def to_host(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """The numbers of a metrics dictionary; waits for the device."""
    return {name: np.asarray(value).item() for name, value in jax.device_get(metrics).items()}
