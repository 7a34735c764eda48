"""The two ways a row gets its numbers: a training run, or a call of a function."""

import inspect
import json
import statistics
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from efficient_attn import data
from efficient_attn.config import require
from efficient_attn.tools.ablate.sweep import Cost, Metrics
from efficient_attn.train import config as configs
from efficient_attn.train.config import Experiment
from efficient_attn.train.workdir import Workdir, read_lines


class Training:
    """Rows are runs of `train.py`: `base` with dotted keys overridden, {"model.width": 64}.

    The data set of a row is kept for the next one, which mostly has the same.

    after: called with the directory of the finished run; what it returns joins the metrics.
    count: add "multiply_adds", of the forward pass of one example.

    Metrics: those of test ("accuracy", "loss", ...) and of validation ("validation_accuracy", ...),
    "parameters", "steps", "seconds", and the median "steps_per_second" of the log lines.
    """

    def __init__(
        self,
        base: ConfigDict,
        *,
        after: Callable[[Path], Metrics] | None = None,
        count: bool = False,
    ):
        self.base, self.after, self.count = base, after, count
        self._load, self._outline = lru_cache(1)(data.load), lru_cache(1)(data.outline)

    def experiment(self, overrides: Mapping[str, Any], *, seed: int = 0) -> Experiment:
        """The experiment of a row; seed is added to the config's own.

        Raises:
            UserError: an override that the config does not have, or does not take.
        """
        config: Any = self.base.copy_and_resolve_references()
        for key, value in overrides.items():
            *sections, name = key.split(".")
            node: Any = config
            for section in sections:
                require(section in node, f"a row overrides {key!r}, but there is no {section!r}")
                node = node[section]
            node[name] = ConfigDict(value) if isinstance(value, Mapping) else value
        config.seed += seed
        return configs.resolve(config)

    def identity(self, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
        """The whole config."""
        return configs.to_dict(self.experiment(overrides))

    def cost(self, overrides: Mapping[str, Any]) -> Cost:
        """Parameters, and three forward passes for every example of every step."""
        experiment = self.experiment(overrides)
        parameters, adds = _count(experiment, self._outline(experiment.data))
        return Cost(parameters, 3 * adds * experiment.data.batch_size * experiment.train.steps)

    def __call__(self, overrides: Mapping[str, Any], *, seed: int, path: Path) -> Metrics | None:
        """Train, or go on training, in `path`."""
        from efficient_attn.train.loop import train

        experiment = self.experiment(overrides, seed=seed)
        dataset = self._load(experiment.data)
        result = train(experiment, path, dataset=dataset)
        if result is None:
            return None
        found = {name: result[name] for name in ("parameters", "steps", "seconds")}
        for split, prefix in (("validation", "validation_"), ("test", "")):
            found |= {prefix + name: value for name, value in (result[split] or {}).items()}
        lines = read_lines(Workdir(path).metrics)
        speeds = [line["steps_per_second"] for line in lines if "steps_per_second" in line]
        if speeds:
            found["steps_per_second"] = statistics.median(speeds)
        if self.count:
            found["multiply_adds"] = _count(experiment, dataset)[1]
        return found | dict(self.after(path) if self.after else {})


def _count(experiment: Experiment, dataset: data.Dataset) -> tuple[int, int]:
    """Parameters, and multiply-adds of the forward pass of one example."""
    import jax
    from flax import nnx

    from efficient_attn.layers.rngs import make_rngs
    from efficient_attn.tools.count import multiply_adds
    from efficient_attn.train.program import complete, creator
    from kernels.target import use

    create = creator(complete(experiment), dataset.info)
    graph, state = nnx.split(nnx.eval_shape(lambda: create(make_rngs(0))))
    inputs = dataset.splits["train"].gather([0])["inputs"]
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    with use("gpu"):  # as multiply-adds are told: no tiles, convolutions as such
        adds = multiply_adds(lambda s, x: nnx.merge(graph, s)(x, rngs=None), state, inputs)
    parameters = jax.tree.leaves(nnx.filter_state(state, nnx.Param))
    return sum(leaf.size for leaf in parameters), adds


class Measuring:
    """Rows are calls `function(seed=..., **options)`, options being `base` and the overrides.

    The function stands at the top of a module and returns numbers by name.
    """

    def __init__(self, function: Callable[..., Metrics], base: Mapping[str, Any] | None = None):
        self.function, self.base = function, dict(base or {})

    def options(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """What the function is called with beside the seed.

        Raises:
            UserError: an option that the function does not have.
        """
        known = set(inspect.signature(self.function).parameters) - {"seed"}
        options = self.base | dict(overrides)
        strange = sorted(set(options) - known)
        require(
            not strange,
            f"{self.function.__name__} has no option {', '.join(strange)}; "
            f"known: {', '.join(sorted(known))}",
        )
        return options

    def identity(self, overrides: Mapping[str, Any]) -> Mapping[str, Any]:
        """The function's name and its options."""
        named = f"{self.function.__module__}.{self.function.__qualname__}"
        return json.loads(json.dumps({"function": named, "options": self.options(overrides)}))

    def cost(self, overrides: Mapping[str, Any]) -> None:
        """Not known before."""
        return None

    def __call__(self, overrides: Mapping[str, Any], *, seed: int, path: Path) -> Metrics:
        """Call the function; it writes no files."""
        return self.function(seed=seed, **self.options(overrides))
