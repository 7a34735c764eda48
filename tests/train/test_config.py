"""The config: what is refused, and the way through JSON and back."""

import pytest

from efficient_attn.errors import UserError
from efficient_attn.train import config as configs


def changed(**changes):
    config = configs.base().to_dict()
    for key, value in changes.items():
        node, names = config, key.split("__")
        for name in names[:-1]:
            node = node[name]
        node[names[-1]] = value
    return config


def test_json_and_back_is_the_same_experiment():
    import json

    config = changed(model={"name": "vit", "heads": 2, "sizes": [1, 2]}, train__ema=0.5)
    experiment = configs.resolve(config)
    text = json.dumps(configs.to_dict(experiment))
    assert configs.to_dict(configs.resolve(json.loads(text))) == configs.to_dict(experiment)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train__stepz": 3}, "unknown option of config.train 'stepz'; did you mean 'steps'?"),
        ({"train__steps": "many"}, "config.train.steps must be int, not 'many'"),
        ({"train__steps": True}, "config.train.steps must be int, not True"),
        ({"train__steps": 0}, "steps must be at least 1, not 0"),
        ({"train__ema": 1.0}, "ema must be in [0, 1), not 1.0"),
        ({"train__dtype": "float16"}, "one of 'float32', 'bfloat16'"),
        ({"optimizer__name": "adam"}, "one of 'adamw', 'adafactor', 'lion', 'sgd'"),
        ({"optimizer__learning_rate": -1.0}, "learning_rate must be positive, not -1.0"),
        ({"optimizer__warmup": 2000}, "optimizer.warmup (2000) must be less than train.steps"),
        ({"model": {"heads": 3}}, "model needs a name"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"data__batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"atention": "softmax"}, "did you mean 'attention'?"),
    ],
)
def test_a_mistake_is_one_sentence(change, says):
    with pytest.raises(UserError) as raised:
        configs.resolve(changed(**change))
    assert says in str(raised.value)


def test_differences_and_fingerprint():
    old = configs.to_dict(configs.resolve(changed()))
    new = configs.to_dict(configs.resolve(changed(seed=3, model={"name": "vit", "heads": 2})))
    assert configs.differences(old, old) == []
    assert configs.differences(old, new) == [("model.heads", "(none)", 2), ("seed", 0, 3)]
    assert configs.fingerprint(old) != configs.fingerprint(new)
    assert configs.fingerprint(new) == configs.fingerprint(dict(reversed(new.items())))
