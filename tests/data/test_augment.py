"""Images changed at random: what each change is, and that nothing but seed and number decides."""

import itertools

import numpy as np
import pytest

from efficient_attn import data
from efficient_attn.data import Augment, Config, Image, augment, images, loader
from efficient_attn.data.augment import OPERATIONS, Augmented, crop, erase, rand_augment
from efficient_attn.data.sources import Arrays, Items
from efficient_attn.errors import UserError

ALL = Augment(crop=(0.3, 1.0), flip=0.5, operations=2, erase=0.5)


def pictures(count=12, size=16, channels=3):
    random = np.random.RandomState(0)
    return random.randint(0, 256, (count, size, size, channels)).astype(np.uint8)


def kept(options=ALL, channels=3, **image):
    finish = images.finish(Image(**image))
    source = Arrays(pictures(channels=channels), np.arange(12), finish)
    return Augmented(source, (16, 16, channels), options)


def draw(source, indices, numbers, seed=0):
    return source.draw(np.array(indices), numbers=np.array(numbers), seed=seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_seed_and_number_decide_whatever_else_is_in_the_batch(channels):
    source = kept(channels=channels)
    whole = draw(source, [3, 1, 4], [7, 8, 9])
    assert whole["inputs"].shape == (3, 16, 16, channels) and whole["inputs"].dtype == np.float32
    np.testing.assert_array_equal(draw(source, [1], [8])["inputs"][0], whole["inputs"][1])
    np.testing.assert_array_equal(whole["label"], [3, 1, 4])
    for other in (draw(source, [1], [10]), draw(source, [1], [8], seed=1)):
        assert not np.array_equal(other["inputs"][0], whole["inputs"][1])


def test_without_changes_it_is_the_image():
    source = kept(Augment())
    np.testing.assert_array_equal(draw(source, [5], [0])["inputs"], source.gather([5])["inputs"])


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_run_goes_on_where_it_stopped(repeats):
    def stream():
        return loader.train_batches(kept(), batch_size=5, seed=0, repeats=repeats)

    first = stream()
    for _ in range(4):
        next(first)
    state = first.get_state()
    expected = [next(first) for _ in range(3)]
    fresh = stream()
    fresh.set_state(state)
    for batch in expected:
        again = next(fresh)
        for name in batch:
            np.testing.assert_array_equal(again[name], batch[name])


def test_repeats_come_in_a_row_and_differ():
    batches = loader.train_batches(kept(), batch_size=12, seed=0, repeats=3)
    found = list(itertools.islice(batches, 6))
    labels = np.concatenate([batch["label"] for batch in found]).reshape(-1, 3)
    assert (labels == labels[:, :1]).all()
    for epoch in labels[:, 0].reshape(2, 12):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    assert not np.array_equal(found[0]["inputs"][0], found[0]["inputs"][1])


def test_a_crop_has_the_area_and_the_proportions_asked_for():
    random = np.random.RandomState(0)
    pixels = np.zeros((90, 120, 3), np.uint8)
    sizes = np.array([crop(pixels, (0.1, 0.5), random).shape[:2] for _ in range(500)])
    share = sizes.prod(axis=1) / pixels[..., 0].size
    ratio = sizes[:, 1] / sizes[:, 0]
    assert 0.09 < share.min() < 0.13 and 0.45 < share.max() < 0.52
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    strip = crop(np.zeros((10, 200, 1), np.uint8), (0.9, 1.0), random)
    assert strip.shape == (10, 13, 1), "the largest part of such proportions"


def test_half_are_flipped_and_a_flip_is_a_mirror():
    source = kept(Augment(flip=0.5))
    found = draw(source, [0] * 400, range(400))["inputs"]
    plain = source.gather([0])["inputs"][0]
    flipped = np.array([np.array_equal(image, plain[:, ::-1]) for image in found])
    assert 160 < flipped.sum() < 240
    assert all(np.array_equal(image, plain) for image in found[~flipped])


def test_erasing_fills_one_rectangle_with_noise():
    random, found = np.random.RandomState(0), []
    for _ in range(300):
        image = np.full((40, 40, 3), 9.0, np.float32)
        erase(image, random)
        gone = (image != 9).all(axis=-1)
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert gone.sum() == len(rows) * len(columns)
        assert len(rows) == np.ptp(rows) + 1 and len(columns) == np.ptp(columns) + 1
        found.append((gone.mean(), image[gone].mean(), image[gone].std()))
    area, mean, deviation = np.mean(found, axis=0)
    assert min(f[0] for f in found) > 0.015 and max(f[0] for f in found) < 0.35
    assert abs(area - 0.17) < 0.03 and abs(mean) < 0.05 and abs(deviation - 1) < 0.05


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_changes_the_image_and_grows_with_its_strength(name):
    ramp = np.linspace(30, 200, 32).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (32, 1)), np.tile(ramp[:, None], 32), np.eye(32) * 200], -1)
    pixels = pixels.astype(np.uint8)

    def apply(level):
        picture = OPERATIONS[name](augment.to_pil(pixels), level, 1)
        assert picture.size == (32, 32) and picture.mode == "RGB"
        return np.abs(np.asarray(picture).astype(int) - pixels).mean()

    assert apply(1.0) > 0
    if name not in ("autocontrast", "equalize", "invert"):
        assert apply(0.0) <= apply(0.4) <= apply(1.0)
        assert apply(0.0) <= (0.01 if name != "posterize" else 8), "4 bits are its weakest"
    grey = OPERATIONS[name](augment.to_pil(pixels[..., :1]), 0.5, -1)
    assert grey.mode == "L"


def test_rand_augment_applies_half_of_its_operations():
    options, plain = Augment(operations=1, magnitude=10.0, deviation=0.0), pictures(1)[0]
    same = [
        np.array_equal(rand_augment(plain, options, np.random.RandomState(i)), plain)
        for i in range(300)
    ]
    assert 120 < sum(same) < 200, "some operations leave noise as it is"


def test_images_decoded_on_demand_are_cut_before_they_are_resized():
    wide = np.zeros((8, 80, 3), np.uint8)
    wide[:, ::2] = 255
    items = Items(
        lambda i: None if i == 1 else (wide, i), np.zeros(3, np.int32), shape=(8, 8, 3),
        fit=lambda pixels: images.fit(pixels, (8, 8), Image()), finish=images.finish(Image()),
    )  # fmt: skip
    batch = draw(Augmented(items, (8, 8, 3), Augment(crop=(1.0, 1.0))), [0, 1, 2], [0, 1, 2])
    np.testing.assert_array_equal(batch["weight"], [1, 0, 1])
    np.testing.assert_array_equal(batch["label"], [0, 0, 2])
    assert batch["inputs"][0].std() > 0.08, "stripes of one pixel are not averaged over ten"
    assert items.gather([0])["inputs"].std() < 0.03


def test_the_middle_of_an_image_in_its_proportions():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    whole = images.fit(pixels, (16, 16), Image(fit="crop", crop=1.0))
    assert whole.shape == (16, 16, 3) and whole[:, 1:-1].min() > 250
    inner = images.fit(pixels, (16, 16), Image(fit="crop", crop=0.5))
    assert inner.shape == (16, 16, 3) and inner.min() == 255
    assert images.fit(pixels, (16, 16), Image()).mean() < 140


@pytest.mark.parametrize("name", ["imagenet", "half"])
def test_normalised_images(name):
    plain = kept(Augment()).gather([0])["inputs"]
    found = kept(Augment(), normalize=name).gather([0])["inputs"]
    mean, deviation = (np.array(x) for x in images.STATISTICS[name])
    np.testing.assert_allclose(found, (plain - mean) / deviation, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32
    assert kept(Augment(), channels=1, normalize=name).gather([0])["inputs"].shape[-1] == 1


def test_training_alone_is_augmented():
    loaded = data.load(Config(augment=Augment(flip=0.5, repeats=2)))
    assert isinstance(loaded.splits["train"], Augmented)
    assert isinstance(loaded.splits["validation"], Arrays)
    assert isinstance(data.load(Config(augment=Augment(mixup=0.5))).splits["train"], Arrays)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image": {"layout": "pixels"}, "augment": {"flip": 0.5}}, "changes images, and this set"),
        ({"augment": {"operations": 2}}, "256 grey levels, digits has 17"),
    ],
)
def test_what_cannot_be_augmented_is_refused(options, says):
    from efficient_attn.config import build

    with pytest.raises(UserError, match=says):
        data.load(build(Config, options, where="data"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"crop": (0.5,)}, r"crop must be \(\) or \(least, largest\)"),
        ({"crop": (0.5, 0.2)}, "crop must be"),
        ({"flip": 1.5}, r"flip must be in \[0, 1\], not 1.5"),
        ({"magnitude": 11.0}, "magnitude must be"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"mixup": -1.0}, "mixup must be at least 0"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(UserError, match=says):
        Augment(**options)
