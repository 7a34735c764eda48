"""What is special to the vision transformer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import backbones
from efficient_attn.backbones import Input
from efficient_attn.errors import UserError
from tests.backbones.test_contract import IMAGE, SMALL, TOKENS, batch, logits, model


def create(source=IMAGE, attention="softmax", **options):
    return backbones.create(
        "vit", SMALL | {"patch": 4} | options, attention=attention, source=source, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 5}, "patches of 5 do not tile images of 16 x 16; change model.patch"),
        ({"patch": 0}, "patch=0 must be positive"),
        ({"patch": 5, "stem": 8}, "patch=5 must be even behind a stem"),
        ({"stem": -1}, "stem=-1 is negative"),
        ({"branch_scale": 0.0}, "branch_scale=0.0 must be positive"),
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"width": 18, "positions": "sincos"}, "needs a width that 4 divides, not 18"),
        ({"source": TOKENS}, "reads images, not tokens"),
        ({"attention": "linformer(rank=17)"}, "rank=17 exceeds the sequence length 16"),
    ],
    ids=str,
)
def test_what_cannot_be_built_says_why(options, message):
    with pytest.raises(UserError, match=message):
        create(**options)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(
        ValueError, match=r"\(16, 20, 1\), but the model was built for \(16, 16, 1\)"
    ):
        model("vit", "softmax")(jnp.ones((1, 16, 20, 1)), rngs=None)


def test_a_patch_is_a_square_of_the_image():
    """One pixel moves one patch: the embedding of that one alone changes."""
    made = create(positions="sincos")
    image = np.zeros((1, 16, 16, 1), np.float32)
    image[0, 5, 10, 0] = 1.0  # patch row 1, column 2 of 4; pixel (1, 2) of its 4 x 4
    kernel = np.asarray(made.embed.kernel[...])
    seen = {}
    made.stack = lambda x, mask, rngs: seen.setdefault("x", x)  # what the stack is given
    made(jnp.asarray(image), rngs=None)
    rest = np.asarray(seen["x"][0]) - np.asarray(made._positions())
    expected = np.zeros_like(rest)
    expected[1 * 4 + 2] = kernel[1 * 4 + 2]
    np.testing.assert_allclose(rest, expected, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_images_that_are_not_square_and_have_colours(positions):
    source = Input(kind="image", shape=(8, 12, 3), classes=2)
    made = create(source, positions=positions, pool="cls")
    images, _ = batch(source, size=2)
    assert logits(made, images).shape == (2, 2)
    swapped = jnp.concatenate([images[:, 4:], images[:, :4]], axis=1)
    assert np.abs(logits(made, images) - logits(made, swapped)).max() > 1e-4
