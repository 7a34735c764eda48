"""Multi30k (arXiv 1605.00459), English to German: Lite Transformer against the plain one.

    python train.py --config=configs/multi30k.py:PATH --workdir=runs/lite
    python train.py --config=configs/multi30k.py:PATH,plain --workdir=runs/plain
    python eval.py --workdir=runs/lite

PATH holds train.en, train.de, val.en, ..., or the same with .gz: data/task1/raw of
github.com/multi30k/dataset. eval.py gives BLEU. "lite" takes 44.6 and "plain" 45.8 million
multiply-adds for a pair of 40 tokens each, the scores of 4,000 tokens included. 453 steps are an
epoch. Expect BLEU 31.6 of "lite" and 28.3 of "plain" on test after 2,000 steps, seed 0, about half
an hour each on two CPU cores.
"""

from ml_collections import ConfigDict

from efficient_attn.train import settings
from efficient_attn.train.config import base

SETTINGS = {
    "lite": (
        {
            "attention": "lsra(conv='lightweight', gate='linear', kernel=(3, 7, 15))",
            "model": {"width": 128, "mlp_ratio": 1.0},
        },
    ),
    "plain": ({"attention": "softmax", "model": {"width": 92, "mlp_ratio": 4.0}},),
}


def get_config(argument: str = "") -> ConfigDict:
    """PATH, then lite (by default) or plain: three blocks and three, equal multiply-adds."""
    path, setting = settings.split(argument, SETTINGS, default="lite")
    config = base()
    config.data.name = "translation"
    config.data.path = path
    config.data.batch_size = 64
    config.data.translation.update(
        {"source": "en", "target": "de", "test": "test_2016_flickr", "max_len": 40, "vocab": 4000}
    )
    config.model = ConfigDict({"name": "encoder_decoder", "depth": 3, "heads": 4, "dropout": 0.1})
    config.train.update({"steps": 3000, "log_every": 100, "eval_every": 500})
    config.train.update({"label_smoothing": 0.1})
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 300, "b2": 0.98})
    settings.apply(config, setting, SETTINGS, where="configs/multi30k.py")
    return config
