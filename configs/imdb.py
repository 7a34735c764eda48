"""IMDb reviews read byte by byte: Long Range Arena's Text task (arXiv 2011.04006, section 2.2.2).

    python train.py --config=configs/imdb.py --workdir=runs/imdb                 # by TFDS
    python train.py --config=configs/imdb.py:PATH/aclImdb --workdir=runs/imdb    # from files

PATH/aclImdb holds train/pos, train/neg and, if you have it, test/pos, test/neg.
"""

from ml_collections import ConfigDict

from efficient_attn.train.config import base


def get_config(path: str = "") -> ConfigDict:
    """The first 1,000 bytes, a model a quarter as wide as the paper's."""
    config = base()
    config.data.name = "text_folder" if path else "tfds"
    config.data.path = path
    config.data.tfds = "" if path else "imdb_reviews/plain_text"
    config.data.text.max_len = 1000
    config.data.batch_size = 32
    config.model = ConfigDict(
        {"name": "encoder", "width": 128, "depth": 2, "heads": 4, "dropout": 0.1}
    )
    config.train.update({"steps": 5000, "eval_every": 500, "eval_batch_size": 64})
    config.optimizer.update({"learning_rate": 5e-4, "warmup": 200})
    return config
