"""The config of a training at scale "smoke": it shows that the sweep runs, and nothing else."""

from typing import Any

TINY = {"depth": 1, "width": 16, "heads": 2}
EXAMPLES = {"train": 64, "validation": 16, "test": 16}


def at_smoke(config: Any) -> Any:
    """Change the config to 4 steps of 8 examples and, of a model with these options, one layer of
    width 16 with 2 heads; what is generated, to 96 examples. Returns the config."""
    config.data.batch_size = 8
    for generated in ("listops", "probes", "pathfinder"):
        config.data[generated].update(EXAMPLES)
    config.model.update({name: size for name, size in TINY.items() if name in config.model})
    config.train.update({"steps": 4, "eval_every": 4, "log_every": 2, "eval_batch_size": 16})
    config.optimizer.warmup = 1
    return config


def drawn_at_smoke(config: Any, *, size: int) -> Any:
    """`at_smoke`, and the images are Pathfinder's, drawn on the spot, `size` pixels wide, not
    augmented: nothing to download. Returns the config."""
    at_smoke(config)
    config.data.update({"name": "pathfinder", "path": "", "tfds": ""})
    config.data.pathfinder.update({"size": size, "processes": 1})
    config.data.image.update({"size": 0, "fit": "stretch"})
    config.data.augment.update(
        {"crop": (), "flip": 0.0, "operations": 0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    )
    config.data.augment.repeats = 1
    config.train.dtype = "float32"
    return config
