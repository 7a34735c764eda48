r"""ImageNet through TFDS (imagenet2012), a published network from scratch by DeiT's recipe.

    python train.py --config=configs/imagenet.py:deit_small_patch16_224 --workdir=runs/deit_small \
        --config.data.path=/data/tensorflow_datasets
    python train.py --config=configs/imagenet.py:deit_small_distilled_patch16_224 \
        --workdir=runs/deit_small_distilled --config.distill.kind=hard \
        --config.distill.teacher=resnet50 --config.distill.weights=resnet50.safetensors

The recipe (arXiv 2012.12877, table 9): 300 epochs of 1,024 images, adamw at 1e-3 (5e-4 for each 512
images), 5 epochs of warm-up, cosine, weight decay 0.05, no clipping, label smoothing 0.1, drop path
0.1, RandAugment 9 / 0.5, erasing 0.25, mixup 0.8, CutMix 1.0, each image three times in a row
(of which an epoch then sees a third); images of 224 x 224, evaluated in the middle of 256. DeiT
resizes bicubically, here it is bilinear.

Expect, as published (top-1 on validation, without distillation): deit_tiny 72.2 %, deit_small 79.9,
deit_base 81.8; with the distillation token 74.5, 81.2 and 83.4, from a RegNetY-16GF of 82.9 %,
which is no network of ours. EViT-DeiT-S at keep_rate 0.7: 79.5, DynamicViT-DeiT-S 79.3, A-ViT-S
78.6; those fine-tune DeiT's weights, for which `backbones.load` is there.

Cost: DeiT-S takes 4.6 GMACs an image forward and three times that to train: 300 epochs of 1,271,167
images are 5.3e18 multiply-adds, two days at a sustained 30e12 a second. Not run here: neither the
images nor such a machine are.

TFDS must have been prepared once, as `array_record` (train.py says how, if it is not). The official
validation set serves as test; `data.validation` holds 10,000 training images out.
"""

from ml_collections import ConfigDict

from efficient_attn.train.config import base

IMAGES, BATCH, EPOCHS = 1_281_167 - 10_000, 1024, 300


def get_config(argument: str = "deit_small_patch16_224") -> ConfigDict:
    """The name of a published network."""
    config = base()
    config.attention = "native"
    config.model = ConfigDict({"name": argument})
    if "deit" in argument or argument.startswith(("vit", "evit", "avit")):
        config.model.drop_path = 0.1
    config.data.update({"name": "tfds", "tfds": "imagenet2012", "batch_size": BATCH})
    config.data.update({"validation": 10_000 / 1_281_167})
    config.data.image.update({"size": 224, "fit": "crop", "normalize": "imagenet"})
    config.data.augment.update({"crop": (0.08, 1.0), "flip": 0.5, "operations": 2})
    config.data.augment.update({"erase": 0.25, "mixup": 0.8, "cutmix": 1.0, "repeats": 3})
    epoch = IMAGES // BATCH
    config.train.update({"steps": EPOCHS * epoch, "eval_every": 5 * epoch, "log_every": 100})
    config.train.update({"dtype": "bfloat16", "label_smoothing": 0.1})
    config.optimizer.update({"learning_rate": 1e-3, "warmup": 5 * epoch, "clip": 0.0})
    config.optimizer.update({"weight_decay": 0.05, "b2": 0.999})
    return config
