import gzip
import tarfile
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from efficient_attn import data
from efficient_attn.data import Config, Image, images, loader
from efficient_attn.data.sources import Arrays, Items
from efficient_attn.errors import UserError

PACKS = Path(__file__).parents[2].parent / "shared" / "data"
RNG = np.random.RandomState(0)


def write(root, counts, *, shape=(6, 6, 3), suffix=".png"):
    """{"train/cat": 10, ...} images of noise; returns the pixels by file."""
    pixels = {}
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            path = root / folder / f"{n:03}{suffix}"
            pixels[path] = RNG.randint(0, 256, shape).astype(np.uint8)
            PIL.Image.fromarray(pixels[path]).save(path)
    return pixels


def load(root, **options):
    return data.load(Config(name="image_folder", path=str(root), **options))


def everything(source):
    return source.gather(np.arange(len(source)))


@pytest.mark.parametrize(("memory_mb", "kind"), [(512, Arrays), (0, Items)])
def test_class_folders_in_memory_and_on_demand(tmp_path, memory_mb, kind):
    pixels = write(tmp_path, {"train/cat": 10, "train/dog": 10, "test/cat": 3, "test/dog": 2})
    loaded = load(tmp_path, image=Image(memory_mb=memory_mb))
    assert loaded.info.kind == "image" and loaded.info.shape == (6, 6, 3)
    assert loaded.info.labels == ("cat", "dog") and loaded.info.vocab is None
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [18, 2, 5]
    assert all(isinstance(source, kind) for source in loaded.splits.values())
    batch = everything(loaded.splits["test"])
    assert batch["inputs"].dtype == np.float32
    expected = [pixels[path] for path in sorted(pixels) if "test" in path.parts]
    np.testing.assert_array_equal(batch["inputs"], np.stack(expected).astype(np.float32) / 255)
    np.testing.assert_array_equal(batch["label"], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(batch["weight"], 1)
    rest = [everything(loaded.splits[s])["inputs"] for s in ("train", "validation")]
    assert len({image.tobytes() for images in rest for image in images}) == 20


def test_both_ways_give_the_same_batches(tmp_path):
    write(tmp_path, {"a": 20, "b": 20})
    ways = [load(tmp_path, image=Image(memory_mb=mb)).splits["train"] for mb in (0, 512)]
    streams = [loader.train_batches(source, batch_size=8, seed=0) for source in ways]
    for _ in range(6):
        lazy, kept = (next(stream) for stream in streams)
        for name in lazy:
            np.testing.assert_array_equal(lazy[name], kept[name])
            assert lazy[name].dtype == kept[name].dtype


def test_grey_files_give_one_channel_and_a_mixture_three(tmp_path):
    grey = write(tmp_path, {"train/a": 4, "test/a": 2}, shape=(6, 6))
    loaded = load(tmp_path)
    assert loaded.info.shape == (6, 6, 1)
    first = grey[tmp_path / "test" / "a" / "000.png"]
    np.testing.assert_array_equal(loaded.splits["test"][0]["inputs"][..., 0] * 255, first)
    write(tmp_path, {"train/b": 4})
    mixed = load(tmp_path)
    assert mixed.info.shape == (6, 6, 3)
    np.testing.assert_array_equal(
        mixed.splits["test"][0]["inputs"] * 255, np.repeat(first[..., None], 3, -1)
    )


def test_transparency_and_palettes_become_colours(tmp_path):
    write(tmp_path, {"train/a": 2, "test/a": 1})
    extra = tmp_path / "test" / "a"
    PIL.Image.fromarray(RNG.randint(0, 256, (6, 6, 4)).astype(np.uint8)).save(extra / "x.png")
    PIL.Image.new("P", (6, 6)).save(extra / "y.png")
    assert everything(load(tmp_path).splits["test"])["inputs"].shape == (3, 6, 6, 3)


def test_pixels_of_colour_images_are_their_grey_values_plus_one(tmp_path):
    pixels = write(tmp_path, {"train/a": 2, "test/a": 1})
    loaded = load(tmp_path, image=Image(layout="pixels"))
    assert loaded.info.kind == "tokens" and loaded.info.shape == (36,) and loaded.info.vocab == 257
    grey = PIL.Image.fromarray(pixels[tmp_path / "test" / "a" / "000.png"]).convert("L")
    tokens = loaded.splits["test"][0]["inputs"]
    assert tokens.dtype == np.int32 and tokens.min() >= 1
    np.testing.assert_allclose(tokens - 1, np.asarray(grey).reshape(-1), atol=1)


def test_black_is_not_padding(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        PIL.Image.new("L", (4, 4)).save(tmp_path / split / "a" / "black.png")
    loaded = load(tmp_path, image=Image(layout="pixels"))
    np.testing.assert_array_equal(everything(loaded.splits["train"])["inputs"], 1)


def test_images_are_resized_to_the_size_asked_for(tmp_path):
    write(tmp_path, {"train/a": 2, "test/a": 1}, shape=(6, 9, 3), suffix=".jpg")
    write(tmp_path, {"train/b": 2}, shape=(12, 12, 3), suffix=".JPEG")
    with pytest.raises(UserError, match=r"6 x 9.*12 x 12.*data\.image\.size"):
        load(tmp_path)
    loaded = load(tmp_path, image=Image(size=8))
    assert loaded.info.shape == (8, 8, 3)
    assert everything(loaded.splits["train"])["inputs"].shape == (4, 8, 8, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_stand_upright_as_the_camera_was_held(tmp_path, suffix, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :4] = 255  # the left quarter is white
    path = tmp_path / f"a{suffix}"
    PIL.Image.fromarray(pixels).save(path, exif=exif)
    height, width, _ = images.header(path)
    assert (height, width) == ((16, 8) if orientation == 6 else (8, 16))
    white = images.decode(path, 1)[..., 0] > 127
    assert white.shape == (height, width)
    side = {1: white[:, :4], 3: white[:, -4:], 6: white[:4]}[orientation]
    assert side.all() and white.sum() == side.size


def test_a_plain_image_stays_plain_when_resized(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        PIL.Image.new("RGB", (5, 7), (10, 20, 30)).save(tmp_path / split / "a" / "0.png")
    inputs = load(tmp_path, image=Image(size=3)).splits["test"][0]["inputs"]
    np.testing.assert_allclose(inputs * 255, np.broadcast_to([10, 20, 30], (3, 3, 3)), atol=1e-4)


def test_class_folders_alone_and_files_of_other_kinds(tmp_path):
    write(tmp_path, {"a/images": 10, "b": 10})
    (tmp_path / "a" / "boxes.txt").write_text("0 0 1 1")
    loaded = load(tmp_path)
    assert loaded.info.labels == ("a", "b")
    assert sum(map(len, loaded.splits.values())) == 20
    assert "test: 20% held out" in loaded.info.about


def damage(path, how):
    whole = path.read_bytes()
    path.write_bytes(
        {"header": b"not an image", "empty": b"", "cut": whole[: len(whole) // 2]}[how]
    )


@pytest.mark.parametrize("how", ["header", "empty", "cut"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_unreadable_image_is_named(tmp_path, how, suffix):
    write(tmp_path, {"train/a": 6, "test/a": 2}, shape=(32, 32, 3), suffix=suffix)
    damage(tmp_path / "train" / "a" / f"003{suffix}", how)
    with pytest.raises(UserError, match=rf"train/a/003{suffix}: is not an image.*on_error=skip"):
        load(tmp_path)


@pytest.mark.parametrize("how", ["header", "empty", "cut"])
def test_or_left_out_counted_and_told_once(tmp_path, how):
    write(tmp_path, {"train/a": 12, "test/a": 2}, shape=(32, 32, 3))
    for n in (3, 5):
        damage(tmp_path / "train" / "a" / f"{n:03}.png", how)
    with pytest.warns(UserWarning) as caught:
        loaded = load(tmp_path, on_error="skip", validation=0.0)
    (warning,) = caught
    assert "left out 2 of 14 files" in str(warning.message)
    assert "003.png" in str(warning.message) and "005.png" in str(warning.message)
    assert len(loaded.splits["train"]) == 10 and len(loaded.splits["test"]) == 2


def test_one_that_turns_out_damaged_when_decoded_on_demand(tmp_path):
    write(tmp_path, {"train/a": 4, "test/a": 1}, shape=(32, 32, 3))
    damage(tmp_path / "train" / "a" / "002.png", "cut")
    options = {"image": Image(memory_mb=0), "validation": 0.0}
    strict = load(tmp_path, **options).splits["train"]
    with pytest.raises(UserError, match=r"002\.png"):
        next(loader.train_batches(strict, batch_size=4, seed=0))
    lenient = load(tmp_path, on_error="skip", **options).splits["train"]
    with pytest.warns(UserWarning, match=r"left out .*002\.png"):
        batch = everything(lenient)
    np.testing.assert_array_equal(batch["weight"], [1, 1, 0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything(lenient)


def test_sixteen_bit_images_are_refused_not_clipped(tmp_path):
    write(tmp_path, {"train/a": 2, "test/a": 1}, shape=(6, 6))
    deep = PIL.Image.fromarray(np.full((6, 6), 40000, np.uint16))
    deep.save(tmp_path / "train" / "a" / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png: .*more than 8 bits"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, r"no images in .*: put them in .*/train/<class>/"),
        ({"train/a": 3, "train/b": 0}, "train/b is empty"),
        ({"train/a": 3, "test/z": 1}, "has a class 'z'"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, folders, message):
    write(tmp_path, folders)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_split_without_one_readable_image(tmp_path):
    write(tmp_path, {"train/a": 2, "test/a": 1})
    damage(tmp_path / "test" / "a" / "000.png", "header")
    with pytest.raises(UserError, match="none of the 1 test images"):
        load(tmp_path, on_error="skip")


# IDX files


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    raw = head + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture(params=["", ".gz"])
def mnist(request, tmp_path):
    for name, count in (("train", 40), ("t10k", 10)):
        images = RNG.randint(0, 256, (count, 5, 4)).astype(np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{request.param}", images)
        labels = (np.arange(count) % 4).astype(np.uint8)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{request.param}", labels)
    return tmp_path, request.param, images


def test_idx_files(mnist):
    folder, _, images = mnist
    loaded = load(folder)
    assert loaded.info.shape == (5, 4, 1) and loaded.info.labels == ("0", "1", "2", "3")
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [36, 4, 10]
    batch = everything(loaded.splits["test"])
    np.testing.assert_array_equal(batch["inputs"][..., 0] * 255, images)
    np.testing.assert_array_equal(batch["label"], np.arange(10) % 4)
    assert load(folder, image=Image(size=8)).splits["test"][0]["inputs"].shape == (8, 8, 1)
    assert load(folder, image=Image(layout="pixels")).info.shape == (20,)


def test_idx_train_and_test_of_two_sizes(mnist):
    folder, suffix, _ = mnist
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", np.zeros((10, 6, 6), np.uint8))
    with pytest.raises(UserError, match=r"differ in size.*data\.image\.size"):
        load(folder)
    assert load(folder, image=Image(size=4)).info.shape == (4, 4, 1)


def test_idx_train_alone_gives_a_test_split(mnist):
    folder, suffix, _ = mnist
    for kind in ("images-idx3", "labels-idx1"):
        (folder / f"t10k-{kind}-ubyte{suffix}").unlink()
    loaded = load(folder)
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [29, 3, 8]


def test_idx_files_that_are_cut_short_are_named(mnist):
    folder, suffix, _ = mnist
    path = folder / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="train-images-idx3-ubyte.* (cut short|cannot be read)"):
        load(folder)


def test_idx_files_that_do_not_belong_together(mnist):
    folder, suffix, _ = mnist
    labels = folder / f"t10k-labels-idx1-ubyte{suffix}"
    write_idx(labels, np.zeros(3, np.uint8))
    with pytest.raises(UserError, match="do not go together"):
        load(folder)
    labels.unlink()
    with pytest.raises(UserError, match="not the labels that go with it"):
        load(folder)
    labels.write_bytes(b"hello")
    with pytest.raises(UserError, match="is not an IDX file"):
        load(folder)


def test_idx_without_train_files(mnist):
    folder, suffix, _ = mnist
    for kind in ("images-idx3", "labels-idx1"):
        (folder / f"train-{kind}-ubyte{suffix}").unlink()
    with pytest.raises(UserError, match="but no train-images-idx3-ubyte"):
        load(folder)


@pytest.mark.skipif(not (PACKS / "mnist.tar").exists(), reason="shared/data is not here")
def test_mnist_as_it_unpacks(tmp_path):
    with tarfile.open(PACKS / "mnist.tar") as pack:
        pack.extractall(tmp_path, filter="data")
    loaded = load(tmp_path / "mnist_idx")
    assert loaded.info.shape == (28, 28, 1) and loaded.info.labels == tuple("0123456789")
    assert [len(loaded.splits[s]) for s in ("train", "validation", "test")] == [54000, 6000, 10000]
    np.testing.assert_array_equal(
        loaded.splits["test"].gather(np.arange(10))["label"], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    )
