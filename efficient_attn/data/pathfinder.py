"""`pathfinder`: are the two circles joined by a dashed curve? (Linsley et al. 2018, 1805.08315.)

The task as Long Range Arena has it (2011.04006, section 2.2.5), by a generator of our own from the
parameters that its code lists: Pathfinder-32 (the defaults), 64, 128 (Path-X) and 256, `PRESETS`.
`python -m efficient_attn.data.samples --out samples.png` draws some.

Two long curves begin near the middle of the image, `distance` apart, and grow in turn, dash by
dash. From the point `gap` beyond its last dash a curve goes on in one of the directions in which
the next dash has room, drawn in proportion to cos(min(continuity * turn, pi / 2))^2. Where there is
none, the image is begun anew. Then come short curves, the distractors, each given up after five
attempts, so that a full image may have fewer. One circle marks the beginning of a long curve, the
other the end of the same curve (label 1) or of the other one (label 0).

A core makes 1,000 images of 32 x 32 in 13 s, of 128 x 128 in 110 s. What is drawn is kept: a
run that was killed goes on where it stopped.

Different from the released generator (github.com/drewlinsley/pathfinder): a direction with room is
found if there is one (there within three draws); a dash never touches that of another curve (the
released code does not look at the latest dash of the other long curve, nor distractors at the last
dash of the first one); directions are rounded to the nearest pixel, not down; labels alternate
rather than being tossed, so that every split is balanced.

Traps, kept because published numbers have them: in Pathfinder-32 the distractors are brighter than
the long curves (2 against 1.5); and curves may cross where both, or one, have a gap, as they do in
about a fifth of its images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from efficient_attn.data import cache, dashes, images
from efficient_attn.data.base import Config, Dataset, Info
from efficient_attn.data.options import Pathfinder
from efficient_attn.data.progress import track
from efficient_attn.data.sources import Arrays
from efficient_attn.errors import UserError

VERSION = 1  # of the generator: part of the cache's key
SHARD = 64  # images drawn from one seed
ATTEMPTS = 5  # at a distractor
GIVE_UP = 10_000  # images begun in vain before the options are taken to allow none
SPLITS = ("train", "validation", "test")
EDGE = -1  # owner of what lies outside

PRESETS = {
    "32": Pathfinder(),
    "64": Pathfinder(
        size=64, length=5, thickness=1.0, distance=12, radius=2.5, continuity=1.8,
        contrast=0.8, distractor_contrast=0.8,
    ),
    "128": Pathfinder(
        size=128, distractors=8, length=5, thickness=1.5, gaps=(2, 3), distance=20, radius=3.0,
        continuity=1.8, contrast=0.9, distractor_contrast=0.9,
    ),
    "256": Pathfinder(
        size=256, distractors=7, length=5, thickness=2.0, gaps=(3,), distance=27, radius=5.0,
        padding=22, continuity=1.8, contrast=1.0, distractor_contrast=1.0,
    ),
}  # fmt: skip
"""What Long Range Arena's code lists for its four sizes; 128 is Path-X."""

Draw = Callable[[], float]
Point = tuple[int, int]  # y, x


def load(config: Config) -> Dataset:
    """The set as `config.pathfinder` and `config.seed` describe it, generated on first use.

    Raises:
        UserError: options that leave no room for the curves, another `config.image.size`, or a
            cache that cannot be written.
    """
    info, options = describe(config), config.pathfinder
    found = cache.stored(
        config,
        "pathfinder",
        cache.key(options, seed=config.seed, version=VERSION, shard=SHARD),
        lambda parts: generate(options, seed=config.seed, parts=parts),
    )
    finish = images.finish(config.image)
    splits = {
        split: Arrays(found[split][..., None], np.arange(len(found[split])) % 2, finish)
        for split in SPLITS
    }
    return Dataset(info, splits)


def describe(config: Config) -> Info:
    """The description of the set, which need not be generated for it.

    Raises:
        UserError: another `config.image.size`.
    """
    options = config.pathfinder
    if config.image.size not in (0, options.size):
        raise UserError(
            f"pathfinder is drawn at data.pathfinder.size={options.size}: set that rather than "
            f"data.image.size={config.image.size}"
        )
    shape = (options.size, options.size, 1)
    about = f"Pathfinder of {options.size} x {options.size}, generated with seed {config.seed}"
    return images.info(config.image, shape=shape, labels=("apart", "joined"), about=about)


def generate(options: Pathfinder, *, seed: int, parts: Path | None = None) -> dict[str, np.ndarray]:
    """The images of every split, bytes [N, H, W]; those of odd number have label 1.

    parts: the folder in which shards are kept, and from which they are taken.
    """
    result = {}
    shards = {split: math.ceil(getattr(options, split) / SHARD) for split in SPLITS}
    with cache.workers(options.processes, jobs=sum(shards.values()) / 8) as run:
        for split, count in shards.items():
            jobs = [
                (options, f"{seed}/{split}/{n}", parts and parts / f"{split}-{n}.npz")
                for n in range(count)
            ]
            done = track(run(_shard, jobs), total=count, text=f"generating pathfinder {split}")
            size = (getattr(options, split), options.size, options.size)
            result[split] = whole = np.empty(size, np.uint8)
            for number, part in enumerate(done):
                rows = whole[number * SHARD : (number + 1) * SHARD]
                rows[:] = part[: len(rows)]
    return result


def _shard(job: tuple[Pathfinder, str, Path | None]) -> np.ndarray:
    options, stream, path = job

    def make() -> np.ndarray:
        draw = cache.stream(stream)
        return np.stack([compose(options, draw).picture(label=i % 2) for i in range(SHARD)])

    return cache.part(path, make) if path else make()


@dataclass
class Curve:
    """A growing curve.

    owner: the number of its last dash. pivot: the point beyond the last dash, from which it goes
    on in a direction near `angle`. lines: (y, x) of both ends of each dash.
    """

    owner: int
    pivot: Point
    angle: float
    lines: list[tuple[np.ndarray, np.ndarray]]


@dataclass
class Scene:
    """Curves on a canvas: `ink` and `owner` [H + 2R, W + 2R], R the reach of a dash.

    owner: 0 where there is room, else the number of a dash, or EDGE.
    """

    options: Pathfinder
    gap: int
    ink: np.ndarray
    owner: np.ndarray
    count: int = 0
    long: list[Curve] = field(default_factory=list)
    short: list[Curve] = field(default_factory=list)
    first: int = 0

    def marks(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the circles are, (y, x) each: a beginning, and the end of the same or other."""
        last = self.first if label else 1 - self.first
        return self.long[self.first].lines[0][0], self.long[last].lines[-1][1]

    def picture(self, *, label: int) -> np.ndarray:
        """Bytes [H, W], the brightest pixel 255."""
        reach, image = dashes.reach(self.options, self.gap), self.ink.copy()
        for place in self.marks(label):
            spot = _window(image, _pixel(place), reach)
            np.maximum(spot, dashes.circle(self.options, self.gap), out=spot)
        image = image[reach:-reach, reach:-reach]
        return np.rint(255 / image.max() * image).astype(np.uint8)


def compose(options: Pathfinder, draw: Draw) -> Scene:
    """Two long curves of `options.dashes` each, and the distractors that find room.

    Raises:
        UserError: there is no room for the long curves.
    """
    for _ in range(GIVE_UP):
        scene = _two_curves(options, options.gaps[int(draw() * len(options.gaps))], draw)
        if scene is not None:
            break
    else:
        raise UserError(
            f"pathfinder: no two curves of {options.dashes} dashes fit an image of "
            f"{options.size} x {options.size}: lower data.pathfinder.dashes or raise size"
        )
    for _ in range(options.distractors):
        for _ in range(ATTEMPTS):
            before = replace(scene, ink=scene.ink.copy(), owner=scene.owner.copy())
            if _distract(scene, draw):
                break
            scene = before
    scene.first = int(draw() * 2)
    return scene


def _two_curves(options: Pathfinder, gap: int, draw: Draw) -> Scene | None:
    reach, size, distance = dashes.reach(options, gap), options.size, options.distance
    canvas = np.zeros((size + 2 * reach, size + 2 * reach))
    scene = Scene(options, gap, ink=canvas, owner=canvas.astype(np.int16))
    middle = _framed(scene, 2 * distance)
    scene.owner = _framed(scene, options.padding)
    first = _begin(scene, draw, busy=middle)
    if first is None:
        return None
    bearing = 2 * math.pi * draw()
    y, x = first.lines[0][0] + distance * np.array([math.sin(bearing), math.cos(bearing)])
    seeds = dashes.beginnings(options, gap)
    k = int(draw() * len(seeds.angle))
    at = (round(y), round(x))
    if (_window(scene.owner, at, reach)[seeds.room[k]] != 0).any():
        return None
    scene.long = [first, _place(scene, seeds, k, at, contrast=options.contrast)]
    for _ in range(options.dashes - 1):
        for curve in scene.long:
            if not _extend(scene, curve, draw, contrast=options.contrast):
                return None
    return scene


def _distract(scene: Scene, draw: Draw) -> bool:
    contrast = scene.options.distractor_contrast
    curve = _begin(scene, draw, busy=scene.owner, contrast=contrast)
    if curve is None:
        return False
    for _ in range(scene.options.distractor_dashes - 1):
        if not _extend(scene, curve, draw, contrast=contrast):
            return False
    scene.short = [*scene.short, curve]
    return True


def _begin(
    scene: Scene, draw: Draw, *, busy: np.ndarray, contrast: float | None = None
) -> Curve | None:
    """A first dash in any direction, anywhere where nothing is busy; None if there is no room."""
    size, seeds = scene.options.size, dashes.beginnings(scene.options, scene.gap)
    k = int(draw() * len(seeds.angle))
    taken = np.zeros((size, size), bool)
    for y, x in zip(*np.nonzero(seeds.room[k]), strict=True):
        taken |= busy[y : y + size, x : x + size] != 0
    places = np.flatnonzero(~taken)
    if not len(places):
        return None
    at = divmod(int(places[int(draw() * len(places))]), size)
    contrast = scene.options.contrast if contrast is None else contrast
    return _place(scene, seeds, k, at, contrast=contrast)


def _extend(scene: Scene, curve: Curve, draw: Draw, *, contrast: float) -> bool:
    """One more dash, or False where no direction has room."""
    options, links = scene.options, dashes.links(scene.options, scene.gap)
    if not all(0 <= z < options.size for z in curve.pivot):
        return False
    window = _window(scene.owner, curve.pivot, dashes.reach(options, scene.gap))
    busy = (window != 0) & (window != curve.owner)
    blocked = links.clear @ busy.ravel().astype(np.float32) > 0.5
    turn = np.abs((links.angle - curve.angle + math.pi) % (2 * math.pi) - math.pi)
    weight = np.cos(np.minimum(options.continuity * turn, math.pi / 2)) ** 2
    total = np.cumsum(np.where(blocked, 0.0, weight))
    if total[-1] < 1e-4:
        return False
    k = int(np.searchsorted(total, draw() * total[-1], side="right"))
    grown = _place(scene, links, k, curve.pivot, contrast=contrast)
    curve.owner, curve.pivot, curve.angle = grown.owner, grown.pivot, grown.angle
    curve.lines += grown.lines
    return True


def _place(scene: Scene, dash: dashes.Dash, k: int, at: Point, *, contrast: float) -> Curve:
    """The dash in its direction k, seen from `at`, as a curve of its own."""
    reach, length = dashes.reach(scene.options, scene.gap), scene.options.length
    ink, owner = _window(scene.ink, at, reach), _window(scene.owner, at, reach)
    scene.count += 1
    np.maximum(ink, contrast * dash.ink[k], out=ink)
    owner[dash.room[k]] = scene.count
    angle = float(dash.angle[k])
    along = np.array([math.sin(angle), math.cos(angle)])
    end = at + dash.end[k] * along
    start = end - length * along
    pivot = _pixel(at + (dash.end[k] + scene.gap) * along)
    return Curve(scene.count, pivot, angle, [(start, end)])


def _pixel(place: np.ndarray) -> Point:
    y, x = np.rint(place).astype(int).tolist()
    return y, x


def _window(canvas: np.ndarray, at: Point, reach: int) -> np.ndarray:
    """The square around `at` as a view of the canvas, whose own border is as wide."""
    return canvas[at[0] : at[0] + 2 * reach + 1, at[1] : at[1] + 2 * reach + 1]


def _framed(scene: Scene, margin: int) -> np.ndarray:
    """The owners of an empty canvas: EDGE outside the image and up to `margin` within it."""
    owner = np.full_like(scene.owner, EDGE)
    border = dashes.reach(scene.options, scene.gap) + margin
    owner[border:-border, border:-border] = 0
    return owner
