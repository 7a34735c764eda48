"""The curves of Pathfinder: where the circles are, what is kept free, what is drawn.

A scene keeps the lines that it drew, so that a label is checked by geometry, not by the generator.
"""

import functools
import hashlib
import itertools
from dataclasses import replace

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from scipy import ndimage

from efficient_attn import data
from efficient_attn.data import Config, Image, Pathfinder, cache, dashes, pathfinder, samples
from efficient_attn.errors import UserError

SMALL = Pathfinder(dashes=6, train=70, validation=20, test=20, processes=1)
SMALL_BYTES = "4a7dbef1b60e1654"


@functools.cache
def scenes(preset, count):
    draw = cache.stream(f"test/{preset}")
    return [pathfinder.compose(pathfinder.PRESETS[preset], draw) for _ in range(count)]


@functools.cache
def small():
    return pathfinder.generate(SMALL, seed=0)


def points(curve):
    return np.concatenate([np.stack(line) for line in curve.lines])


def distance(a, b):
    """The shortest way between two lines, by a fine sampling of both."""
    share = np.linspace(0, 1, 40)[:, None]
    a, b = (start + share * (end - start) for start, end in (a, b))
    return np.linalg.norm(a[:, None] - b[None], axis=-1).min()


@pytest.mark.parametrize(("preset", "count"), [("32", 20), ("128", 6)])
def test_one_curve_joins_the_circles_or_none_does(preset, count):
    """On a drawing of the long curves with their gaps closed, by flood fill."""
    for scene in scenes(preset, count):
        drawn = []
        for curve in scene.long:
            picture = PIL.Image.new("1", (scene.options.size * 8,) * 2)
            line = [(8 * x + 4, 8 * y + 4) for y, x in points(curve)]
            PIL.ImageDraw.Draw(picture).line(line, fill=1, width=3)
            area, pieces = ndimage.label(np.asarray(picture), np.ones((3, 3)))
            assert pieces == 1
            drawn.append(area)
        for label in (0, 1):
            on = [
                [area[round(8 * y + 4), round(8 * x + 4)] > 0 for area in drawn]
                for y, x in scene.marks(label)
            ]
            joined = any(all(seen) for seen in zip(*on, strict=True))
            assert joined == bool(label)
            assert all(any(seen) for seen in on)


@pytest.mark.parametrize(("preset", "count"), [("32", 20), ("128", 6)])
def test_curves_are_as_long_and_as_many_as_asked(preset, count):
    options = pathfinder.PRESETS[preset]
    short = []
    for scene in scenes(preset, count):
        assert [len(curve.lines) for curve in scene.long] == [options.dashes] * 2
        assert {len(curve.lines) for curve in scene.short} <= {options.distractor_dashes}
        short.append(len(scene.short))
        assert scene.gap in options.gaps
        for curve in (*scene.long, *scene.short):
            for start, end in curve.lines:
                assert np.linalg.norm(end - start) == pytest.approx(options.length)
                assert end.min() >= 0 and end.max() < options.size
            for (_, end), (start, _) in itertools.pairwise(curve.lines):
                # Twice the gap straight on, but for rounding to pixels (by up to half a diagonal,
                # twice), and less in a turn.
                assert np.linalg.norm(start - end) < 2 * scene.gap + 1.5
        first, second = (curve.lines[0][0] for curve in scene.long)
        assert np.linalg.norm(first - second) == pytest.approx(options.distance, abs=0.71)
    assert max(short) == options.distractors and np.mean(short) > 0.8 * options.distractors


@pytest.mark.parametrize(("preset", "count", "least"), [("32", 20, 0.5), ("128", 6, 4.0)])
def test_dashes_of_different_curves_never_touch(preset, count, least):
    for scene in scenes(preset, count):
        curves = (*scene.long, *scene.short)
        for one, other in itertools.combinations(curves, 2):
            assert all(distance(a, b) > least for a in one.lines for b in other.lines)


def test_no_distractors_when_none_are_asked_for_and_more_segments_when_more():
    draw = cache.stream("other")
    scene = pathfinder.compose(replace(SMALL, distractors=0, dashes=6), draw)
    assert scene.short == [] and [len(curve.lines) for curve in scene.long] == [6, 6]


def test_continuity_makes_curves_straight():
    def mean_turn(continuity):
        options = replace(pathfinder.PRESETS["64"], dashes=6, continuity=continuity, distractors=0)
        draw = cache.stream("turns")
        turns = []
        for _ in range(4):
            for curve in pathfinder.compose(options, draw).long:
                along = np.array([end - start for start, end in curve.lines])
                angle = np.arctan2(*along.T)
                turns += np.abs((np.diff(angle) + np.pi) % (2 * np.pi) - np.pi).tolist()
        assert max(turns) <= np.pi / 2 / continuity + 0.01
        return np.mean(turns)

    assert mean_turn(2.0) < 0.75 * mean_turn(1.0)


def test_a_picture_holds_the_brightness_asked_for():
    scene = scenes("128", 6)[0]
    reach = dashes.reach(scene.options, scene.gap)
    picture = scene.picture(label=1) / 255
    for y, x in scene.marks(1):
        y, x = round(y), round(x)
        assert (picture[y - 1 : y + 2, x - 1 : x + 2] > 0.95).all()
    for curve in (*scene.long, *scene.short):
        for start, end in curve.lines:
            y, x = np.rint((start + end) / 2).astype(int)
            assert picture[y, x] > 0.3
    ink = scene.ink[reach:-reach, reach:-reach]
    assert ink.max() == pytest.approx(0.9, abs=0.01)
    assert picture[ink == 0].mean() < 0.02


def test_in_pathfinder_32_the_distractors_are_brighter():
    brightness = {"long": [], "short": []}
    for scene in scenes("32", 20):
        reach = dashes.reach(scene.options, scene.gap)
        for kind in brightness:
            for curve in getattr(scene, kind):
                for _, end in curve.lines:
                    y, x = np.rint(end).astype(int) + reach
                    brightness[kind].append(scene.ink[y, x])
    ratio = np.median(brightness["short"]) / np.median(brightness["long"])
    assert ratio == pytest.approx(2 / 1.5, rel=0.05)


@pytest.mark.parametrize("layout", ["image", "pixels"])
def test_what_comes_out(tmp_path, layout):
    config = Config(name="pathfinder", pathfinder=SMALL, cache=str(tmp_path), image=Image(layout))
    loaded = data.load(config)
    (file,) = tmp_path.iterdir()
    assert loaded.info.labels == ("apart", "joined")
    for split, source in loaded.splits.items():
        assert len(source) == getattr(SMALL, split)
        batch = source.gather(np.arange(len(source)))
        assert abs(batch["label"].mean() - 0.5) < 0.51 / len(source)
        if layout == "pixels":
            assert (loaded.info.kind, loaded.info.shape, loaded.info.vocab) == (
                "tokens", (1024,), 257,
            )  # fmt: skip
            assert batch["inputs"].min() == 1 and batch["inputs"].max() == 256
            pictures = batch["inputs"].reshape(-1, 32, 32) - 1
        else:
            assert (loaded.info.kind, loaded.info.shape) == ("image", (32, 32, 1))
            pictures = np.rint(255 * batch["inputs"][..., 0])
        np.testing.assert_array_equal(pictures, small()[split])
    assert file.name.startswith("pathfinder-")
    before = file.stat().st_mtime_ns
    data.load(config)
    assert file.stat().st_mtime_ns == before


def test_the_label_of_a_picture_is_that_of_its_circles(tmp_path):
    config = Config(name="pathfinder", pathfinder=SMALL, cache=str(tmp_path))
    source, draw = data.load(config).splits["train"], cache.stream("0/train/0")
    batch = source.gather(np.arange(6))
    for picture, label in zip(batch["inputs"][..., 0], batch["label"].tolist(), strict=True):
        drawn = pathfinder.compose(SMALL, draw).picture(label=label)
        np.testing.assert_array_equal(np.rint(255 * picture), drawn)


@pytest.mark.parametrize("preset", ["32", "128"])
def test_a_dash_is_drawn_where_it_is_said_to_be(preset):
    options = pathfinder.PRESETS[preset]
    gap, middle = options.gaps[0], dashes.reach(options, options.gaps[0])
    links = dashes.links(options, gap)
    (k,) = np.flatnonzero(links.angle == 0.0)
    assert links.end[k] == gap + options.length
    row = links.ink[k][middle, middle:]
    peak = row.max()
    assert (row[gap : gap + options.length + 1] > 0.6 * peak).all()
    assert row[0] < 0.1 * peak or gap == 1
    assert (row[gap + options.length + 2 :] < 0.1 * peak).all()
    assert links.ink[k][middle - 2 - round(options.thickness)].max() < 0.1 * peak
    assert links.room[k][middle, middle:][gap : gap + options.length + 1].all()


def test_nothing_depends_on_the_number_of_processes_and_splits_are_apart():
    other = pathfinder.generate(replace(SMALL, processes=2), seed=0)
    for split, whole in small().items():
        np.testing.assert_array_equal(other[split], whole)
    fewer = pathfinder.generate(replace(SMALL, train=30), seed=0)
    np.testing.assert_array_equal(fewer["train"], small()["train"][:30])
    seen = [picture.tobytes() for split in small().values() for picture in split]
    assert len(seen) == len(set(seen)) == 110
    assert (pathfinder.generate(replace(SMALL, train=1, validation=1), seed=1)["test"][0]
            != small()["test"][0]).any()  # fmt: skip


def test_the_bytes_are_what_they_always_were():
    joined = b"".join(small()[split].tobytes() for split in pathfinder.SPLITS)
    assert hashlib.blake2b(joined, digest_size=8).hexdigest() == SMALL_BYTES, (
        "the generator changed: raise pathfinder.VERSION, and then this value"
    )


def test_the_parameters_are_those_that_long_range_arena_lists():
    small, large = pathfinder.PRESETS["32"], pathfinder.PRESETS["128"]
    assert small == Pathfinder()
    assert (small.dashes, small.distractors, small.distractor_dashes) == (14, 5, 4)
    assert (small.length, small.thickness, small.gaps, small.radius) == (2, 0.5, (1,), 1.5)
    assert (small.distance, small.padding, small.continuity) == (7, 1, 1.0)
    assert (small.contrast, small.distractor_contrast) == (0.75 * 2, 2.0)
    assert (large.dashes, large.distractors, large.distractor_dashes) == (14, 35 // 4, 14 // 3)
    assert (large.length, large.thickness, large.gaps, large.radius) == (5, 1.5, (2, 3), 3.0)
    assert (large.distance, large.padding, large.continuity) == (20, 1, 1.8)
    assert (small.train, small.validation, small.test) == (160_000, 20_000, 20_000)


def test_a_generation_that_was_killed_goes_on(tmp_path, monkeypatch):
    config = Config(name="pathfinder", pathfinder=SMALL, cache=str(tmp_path))
    compose, drawn = pathfinder.compose, []

    def killed(*arguments):
        drawn.append(arguments)
        if len(drawn) == pathfinder.SHARD + 5:
            raise KeyboardInterrupt
        return compose(*arguments)

    monkeypatch.setattr(pathfinder, "compose", killed)
    with pytest.raises(KeyboardInterrupt):
        data.load(config)
    loaded = data.load(config)
    shards = sum(-(-len(source) // pathfinder.SHARD) for source in loaded.splits.values())
    assert len(drawn) == pathfinder.SHARD * shards + 5
    for split, source in loaded.splits.items():
        np.testing.assert_array_equal(source.inputs[..., 0], small()[split])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_picture_of_samples(tmp_path, capsys):
    samples.main(["--out", str(tmp_path / "x.png"), "--rows", "2"])
    with PIL.Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1024, 256) and picture.getextrema()[1] == 255
    assert "2 rows of 8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        samples.main(["--out", str(tmp_path / "x.png"), "--rows", "0"])
    assert "--rows must be at least 1, not 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 28}, "size=28 leaves no room in the middle .* at least 32"),
        ({"gaps": ()}, "gaps must be 1 or more each"),
        ({"thickness": 0.0}, "thickness must be positive"),
        ({"dashes": 0}, "dashes must be at least 1, not 0"),
    ],
)
def test_options_that_make_no_task(options, message):
    with pytest.raises(UserError, match=message):
        Pathfinder(**options)


def test_curves_that_fit_nowhere_and_another_size_are_refused(monkeypatch):
    monkeypatch.setattr(pathfinder, "GIVE_UP", 20)
    with pytest.raises(UserError, match=r"no two curves of 100 dashes fit .*lower"):
        pathfinder.compose(replace(SMALL, dashes=100), cache.stream("x"))
    with pytest.raises(UserError, match=r"data\.pathfinder\.size=32.*data\.image\.size=64"):
        data.load(Config(name="pathfinder", image=Image(size=64)))
