"""What timm's own PyTorch networks say, recorded, so that the tests need no PyTorch.

    python -m tests.backbones.golden [NAME ...]      (torch, timm 1.0.31, torchvision)

writes `golden.json`: the parameters of every network of ours that timm has, and for those in
`LOGITS` the logits that timm's network gives to `images` with the weights of `synthetic`.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

from efficient_attn.tools.latency import import_timm

FILE = Path(__file__).with_name("golden.json")
LOGITS = {
    "deit_tiny_distilled_patch16_224": 224,
    "efficientformer_l1": 224,
    "levit_128s": 64,
    "efficientvit_b0": 64,
    "mobilenetv2_050": 64,
    "mobilenetv3_small_050": 64,
    "mobilevit_xxs": 128,
    "mobilevitv2_050": 128,
    "poolformer_s12": 72,
    "pvt_v2_b0": 72,
    "pvt_v2_b2_li": 64,
    "regnety_002": 64,
    "resnet50": 64,
    "swin_tiny_patch4_window7_224": 56,
}
"""Of each family one network, the smallest, and the side of its images."""


def synthetic(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers for timm's array of that name, the same ones wherever they are drawn."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_var"):
        drawn = 0.5 + np.abs(drawn)
    elif len(shape) >= 2 and name.endswith("weight"):
        drawn = drawn * np.prod(shape[1:]) ** -0.5
    elif name.endswith(("weight", "gamma")):
        drawn = 1 + 0.1 * drawn
    else:
        drawn = 0.1 * drawn
    return drawn.astype(np.float32)


def images(side: int) -> np.ndarray:
    """[2, side, side, 3]."""
    return np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)


def record(name: str) -> dict:
    """The line of `golden.json` for one of timm's networks."""
    timm, torch = import_timm()
    with torch.device("meta"):
        model = timm.create_model(name)
    line = {"parameters": sum(p.numel() for p in model.parameters())}
    if name in LOGITS:
        side = LOGITS[name]
        fixed = timm.get_pretrained_cfg(name).fixed_input_size
        model = timm.create_model(name, **({"img_size": side} if fixed else {}))
        state = model.state_dict()
        for key, value in state.items():
            if value.is_floating_point():
                state[key] = torch.from_numpy(synthetic(key, tuple(value.shape)))
        model.load_state_dict(state)
        with torch.inference_mode():
            logits = model.eval()(torch.from_numpy(images(side)).permute(0, 3, 1, 2))
        line |= {"image_size": side, "logits": logits[:, :8].double().tolist()}
    return line


if __name__ == "__main__":
    from efficient_attn import backbones

    timm, _ = import_timm()
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in sys.argv[1:] or backbones.names():
        if timm.is_model(name):
            known[name] = record(name)
            print(name, known[name]["parameters"], flush=True)
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
