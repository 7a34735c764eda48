r"""A character language model on a text of yours.

    python train.py --config=configs/lm.py:input.txt --workdir=runs/lm
    python train.py --config=configs/lm.py:input.txt --workdir=runs/lm --config.attention=retention
    python train.py --config=configs/lm.py:novels/ --workdir=runs/bpe \
        --config.data.text.tokenizer=bpe --config.data.text.vocab=4096

PATH is a UTF-8 file, or a folder of .txt files. The last fifth of it is test, the last tenth of the
rest validation, unless a folder has train.txt, valid.txt and test.txt.

Expect of softmax on tinyshakespeare, seed 0: 2.30 bits per character on validation after 2,700
steps, ten minutes on two CPU cores; the README has other mechanisms beside it.
"""

from ml_collections import ConfigDict

from efficient_attn.train.config import base


def get_config(path: str = "") -> ConfigDict:
    """Contexts of 128 characters; 4 layers of width 128."""
    config = base()
    config.data.name = "text_files"
    config.data.path = path
    config.data.batch_size = 16
    config.data.text.update({"predict": "next", "tokenizer": "chars", "max_len": 128})
    config.model = ConfigDict(
        {"name": "causal_lm", "width": 128, "depth": 4, "heads": 4, "dropout": 0.1}
    )
    config.train.update({"steps": 3000, "log_every": 100, "eval_every": 500})
    config.train.update({"eval_batch_size": 64})
    config.optimizer.update({"learning_rate": 2e-3, "weight_decay": 0.1, "b2": 0.99})
    return config
