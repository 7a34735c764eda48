"""A small vision transformer on scikit-learn's 8 x 8 handwritten digits: nothing to download.

    python train.py --config=configs/digits.py --workdir=runs/digits

Cost: 1500 steps of 101,000 parameters; 69 s with softmax and 151 s with performer on 2 cores shared
with five other jobs, to be measured again on an idle machine.
Expect: test accuracy 0.969 to 0.992, mean 0.980 (9 runs: softmax, linformer and lsra with seeds 1
and 2, performer with 0 to 2). Test has 359 digits: one more error is 0.003.
"""

from ml_collections import ConfigDict

from efficient_attn.train.config import base


def get_config() -> ConfigDict:
    """16 patches of 2 x 2 pixels, 2 layers of width 64."""
    config = base()
    config.data.name = "digits"
    config.model = ConfigDict(
        {"name": "vit", "patch": 2, "positions": "sincos", "width": 64, "depth": 2, "heads": 2}
    )
    config.train.steps = 1500
    config.train.log_every = 100
    config.train.ema = 0.99
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.3
    return config
