"""ListOps, Long Range Arena's expressions of nested lists (arXiv 2011.04006, section 2.2.1).

    python train.py --config=configs/listops.py --workdir=runs/listops          # short
    python train.py --config=configs/listops.py:paper --workdir=runs/listops    # 500 to 2,000 long

"short" makes about 14 steps a second on two CPU cores, 3,000 in four minutes. Expect, seed 0, on
2,000 test expressions: softmax 48.9 %, linformer 54.9 %, performer 48.5 %, lsra 48.9 %; the
commonest class is 15.8 %. "paper" has the lengths, depth and model of the paper's appendix and the
schedule of the released code; the published accuracies are 36.37 % (Transformer), 35.70 %
(Linformer) and 18.01 % (Performer). It has not been run here.
"""

from ml_collections import ConfigDict

from efficient_attn.errors import unknown
from efficient_attn.train.config import base

SETTINGS = {
    "short": {
        "data": {"min_length": 10, "max_length": 64, "train": 40_000},
        "model": {"width": 64, "depth": 2, "heads": 4, "mlp_ratio": 4.0, "dropout": 0.0},
        "train": {"steps": 3000, "eval_every": 500},
        "optimizer": {"schedule": "cosine", "learning_rate": 1e-3, "warmup": 200},
    },
    "paper": {
        "data": {},
        "model": {"width": 512, "depth": 6, "heads": 8, "mlp_ratio": 4.0, "dropout": 0.1},
        "train": {"steps": 5000, "eval_every": 500},
        "optimizer": {
            "schedule": "rsqrt",
            "learning_rate": 0.05,
            "warmup": 1000,
            "weight_decay": 0.1,
        },
    },
}


def get_config(setting: str = "short") -> ConfigDict:
    """An encoder with a class token, as Long Range Arena has it."""
    if setting not in SETTINGS:
        raise unknown("setting of configs/listops.py", setting, SETTINGS)
    chosen = SETTINGS[setting]
    config = base()
    config.data.name = "listops"
    config.data.listops.update(chosen["data"])
    config.data.batch_size = 32 if setting == "paper" else 64
    config.model = ConfigDict({"name": "encoder", "pool": "cls", **chosen["model"]})
    config.train.update(chosen["train"])
    config.optimizer.update(chosen["optimizer"])
    return config
