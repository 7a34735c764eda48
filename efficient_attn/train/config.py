"""The whole of an experiment as frozen dataclasses, and the way there from a config file.

ml_collections stops here: a config file changes the ConfigDict of `base()`, flags change it again,
and `resolve` turns it into an `Experiment`, strictly.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from efficient_attn import config as strict
from efficient_attn.config import at_least, require
from efficient_attn.data import Config as Data


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how exact, how often to look.

    steps: optimizer steps in all.
    log_every: steps between two log lines; a line holds means over the steps since the last one.
    eval_every: steps between two evaluations on validation; each is followed by a checkpoint.
    checkpoint_every: steps between further checkpoints; 0 leaves those of the evaluations.
    keep_last: checkpoints kept, the newest ones; the best on validation is kept as well, by
        accuracy where examples are classified, by loss where tokens are.
    eval_batch_size: examples in an evaluation batch; it does not change the metrics.
    dtype: of the computation; parameters and optimizer state are float32 always.
    accumulate: micro-batches that a batch is cut into, to save memory; same result.
    ema: decay of the moving average of parameters that evaluation uses, such as 0.999; 0 is off.
    label_smoothing: probability spread evenly over all classes, or over the whole vocabulary.
    sharding: parameters whole on each device ("data") or split over the devices ("fsdp").
    diagnostics: steps between two `attention.diagnose` on the batch at hand; 0 is off.
    """

    steps: int = 1000
    log_every: int = 50
    eval_every: int = 250
    checkpoint_every: int = 0
    keep_last: int = 2
    eval_batch_size: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    ema: float = 0.0
    label_smoothing: float = 0.0
    sharding: Literal["data", "fsdp"] = "data"
    diagnostics: int = 0

    def __post_init__(self):
        at_least(self, 1, "steps", "log_every", "eval_every", "keep_last", "eval_batch_size")
        at_least(self, 1, "accumulate")
        at_least(self, 0, "checkpoint_every", "diagnostics")
        require(0 <= self.ema < 1, f"ema must be in [0, 1), not {self.ema}")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, f"label_smoothing must be in [0, 1), not {smoothing}")


@dataclasses.dataclass(frozen=True)
class Distill:
    """Learning from a teacher beside the labels: (1 - weight) * labels' part + weight * teacher's.

    kind: of the teacher's part. "soft": temperature^2 * KL between both distributions at the
        temperature (1503.02531); "hard": cross-entropy with the teacher's prediction (2012.12877);
        "none" has no teacher. A student with a distillation token (pool="distilled", LeViT) learns
        the labels by its first classifier and the teacher by its second, any other both by one.
    teacher: the directory of a run, or the name of a published network; it sees the very images
        that the student does, augmented and normalised as they are.
    weights: safetensors file of a published network.
    checkpoint: of a run: a step, "last", or "best".
    """

    kind: Literal["none", "soft", "hard"] = "none"
    teacher: str = ""
    weights: str = ""
    checkpoint: str = "last"
    temperature: float = 3.0
    weight: float = 0.5

    def __post_init__(self):
        require(
            self.kind == "none" or self.teacher != "",
            f"kind={self.kind!r} needs a teacher: the directory of a run, or a published name",
        )
        require(self.temperature > 0, f"temperature must be positive, not {self.temperature}")
        require(0 <= self.weight <= 1, f"weight must be in [0, 1], not {self.weight}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update: -learning rate * (direction of the optimizer + weight_decay * parameter).

    name: adamw (1711.05101), adafactor (1804.04235), lion (2302.06675) or sgd with momentum.
    learning_rate: the peak; with rsqrt, the number that 1 / sqrt(step) is multiplied with.
    schedule: linear warm-up, then cosine to 0, rsqrt as in Long Range Arena, or constant.
    warmup: steps of warm-up.
    weight_decay: applied to matrices only, never to biases, scales and other vectors.
    clip: largest global norm of the gradient; 0 is off.
    b1, b2: of adamw and lion; momentum: of sgd.
    """

    name: Literal["adamw", "adafactor", "lion", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    momentum: float = 0.9

    def __post_init__(self):
        require(self.learning_rate > 0, f"learning_rate must be positive, not {self.learning_rate}")
        at_least(self, 0, "warmup", "weight_decay", "clip")
        for name in ("b1", "b2", "momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be in [0, 1), not {value}")


def _default_model() -> Mapping[str, Any]:
    return {"name": "vit"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that decides the result of a run, together with the code and the machine.

    seed: of the parameters, the order of the data and the dropout.
    attention: an expression such as 'softmax' or 'performer(features=64)*2 + softmax'; "native" is
        a published network's own.
    backend: of the kernels: auto, xla, pallas or cudnn.
    model: "name" of the backbone, or of a published network, and its options.
    profile: the steps to trace into profile/ of the run's directory, as "FIRST:LAST", both traced,
        such as "10:15"; "" traces none. It decides nothing, and may change when a run goes on.
    """

    seed: int = 0
    attention: str = "softmax"
    backend: Literal["auto", "xla", "pallas", "cudnn"] = "auto"
    data: Data = Data()
    model: Mapping[str, Any] = dataclasses.field(default_factory=_default_model)
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    distill: Distill = Distill()
    profile: str = ""

    def __post_init__(self):
        at_least(self, 0, "seed")
        require(self.seed < 2**32, f"seed must be less than 2**32, not {self.seed}")
        require("name" in self.model, "model needs a name: vit, encoder, ...")
        warmup, steps = self.optimizer.warmup, self.train.steps
        require(
            self.optimizer.schedule != "cosine" or warmup < steps,
            f"optimizer.warmup ({warmup}) must be less than train.steps ({steps})",
        )
        traced(self)


def base() -> ConfigDict:
    """The defaults of everything: what a config file starts from."""
    return ConfigDict(dataclasses.asdict(Experiment()))


def resolve(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """The experiment that a config describes.

    Raises:
        UserError: an unknown key, a value of another type or out of range.
    """
    options = config.to_dict() if isinstance(config, ConfigDict) else config
    return strict.build(Experiment, options, where="config")


def traced(experiment: Experiment) -> range:
    """The steps that `profile` names.

    Raises:
        UserError: it does not name steps of the run.
    """
    text, last = experiment.profile, experiment.train.steps
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    require(found is not None, f"profile must be steps FIRST:LAST such as '10:15', not {text!r}")
    assert found is not None
    steps = range(int(found[1]), int(found[2]) + 1)
    require(
        0 < steps.start < steps.stop <= last + 1,
        f"profile={text!r} must be steps of the run in order, from 1 to train.steps ({last})",
    )
    return steps


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as JSON has it, but for `profile`; `resolve` takes it back."""
    content = json.loads(json.dumps(dataclasses.asdict(experiment)))
    del content["profile"]
    return content


def fingerprint(config: Mapping[str, Any]) -> str:
    """Twelve hex digits that differ between configs that differ."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The dotted keys whose values differ, each with both values; "(none)" where one is missing."""
    a, b = flatten(old), flatten(new)
    return [
        (key, a.get(key, "(none)"), b.get(key, "(none)"))
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "(none)") != b.get(key, "(none)")
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} as {"train.steps": 3}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
