"""Generation pixel by pixel: the Linear Transformer against softmax with and without a cache.

Katharopoulos et al. 2020 (arXiv 2006.16236), tables 1 and 2, and 4 and 5 of the supplement.

    python -m efficient_attn.tools.ablate --config=configs/ablations/generation.py --scale=small

Two CPU minutes at small: 4 layers; "paper" has the paper's 8 for MNIST and 16 for CIFAR-10.

Trap: the famous 317 and 4,462 times more images a second are over softmax that reads all pixels
again for each new one. Over softmax that keeps its keys and values ("stateful" in the supplement)
the paper has 19 and 56 times at a GPU's largest batch, and 1.6 times for one image on a CPU.
"""

from efficient_attn.tools.ablate import Claim, Column, Measuring, Panel, Results, Scale, Sweep
from efficient_attn.tools.ablate.claims import above, below
from efficient_attn.tools.measures.generation import measure

PIXELS = {"MNIST": 784, "CIFAR-10": 3072}
DEPTHS = {"MNIST": 8, "CIFAR-10": 16}
ROWS = (("softmax", False), ("softmax", True), ("linear", True), ("gated_delta", True))
LATENCY = {("softmax", False): 8651.4, ("softmax", True): 71.9, ("linear", True): 45.1}
"""Seconds for one CIFAR-10 image on a CPU (table 5)."""


def name(expression: str, carry: bool, image: str) -> str:
    """The label of a row."""
    return f"{expression}, {'cached' if carry else 'no cache'}, {image}"


def get_sweep(scale: Scale) -> Sweep:
    """Four ways to generate the two kinds of image."""
    images, shape = PIXELS, {"width": 256, "heads": 8, "turns": 2}
    kinds = ROWS
    if scale == "smoke":
        images, shape = {"MNIST": 8}, {"width": 16, "heads": 2, "turns": 1}
        kinds = ROWS[:1] + ROWS[2:3]
    rows = [
        (
            name(expression, carry, image),
            {
                "expression": expression, "carry": carry, "length": pixels,
                "depth": DEPTHS[image] if scale == "paper" else 4 if scale == "small" else 1,
            },
        )
        for image, pixels in images.items()
        for expression, carry in kinds
    ]  # fmt: skip
    published = {name(*row, "CIFAR-10"): {"image_seconds": s} for row, s in LATENCY.items()}
    if scale != "smoke":
        ratio = LATENCY["softmax", True] / LATENCY["linear", True]
        published[name("linear", True, "CIFAR-10")]["times_cached"] = ratio
    return Sweep(
        title="Generation: a state against a cache",
        source="Linear Transformer, arXiv 2006.16236, tables 1, 2, 4 and 5",
        rows=rows,
        runner=Measuring(measure, shape),
        columns=[
            Column("times_cached", "images a second over cached softmax", digits=3),
            Column("image_seconds", "seconds an image", digits=3),
            Column("state_bytes", "bytes kept"),
            Column("multiply_adds", "multiply-adds an image, G", 1e-9),
        ],
        published={} if scale == "smoke" else published,
        claims=CLAIMS,
        panels=[
            Panel(y="multiply_adds", log="x", ylabel="multiply-adds an image"),
            Panel(y="image_seconds", log="x", ylabel="seconds an image, batch 1"),
        ],
        note=(
            "The paper's seconds are for one CIFAR-10 image on a CPU of its own, 16 layers (table "
            "5); ours have the layers that the scale says and untrained weights, which take as "
            "long. At a GPU's largest batch the paper generates 142.8 MNIST images a second with "
            "linear attention, 7.56 with cached and 0.45 with uncached softmax; of CIFAR-10 17.85, "
            "0.32 and 0.004 (table 4). Rows without a cache are counted, not run. Our cache has "
            "the length of the image from the first pixel on, and each step reads all of it."
        ),
    )


def adds(results: Results, expression: str, carry: bool, image: str) -> float:
    """Multiply-adds of an image."""
    return results.mean(name(expression, carry, image), "multiply_adds")


CLAIMS = [
    Claim(
        "what linear attention keeps is the same for both images; a cache grows with the pixels",
        lambda r: (
            r.mean(name("linear", True, "MNIST"), "state_bytes")
            == r.mean(name("linear", True, "CIFAR-10"), "state_bytes")
            and r.mean(name("softmax", True, "CIFAR-10"), "state_bytes")
            == r.mean(name("softmax", True, "MNIST"), "state_bytes") * 3072 / 784
        ),
    ),
    Claim(
        "multiply-adds a pixel: linear needs less than cached softmax, cached less than uncached",
        lambda r: all(
            below("multiply_adds", *(name(*row, image) for row in (*ROWS[2:0:-1], ROWS[0])))(r)
            for image in PIXELS
        ),
    ),
    Claim(
        "the cache is most of the gain: over cached softmax less than 10 times fewer multiply-adds "
        "for CIFAR-10, over uncached more than 1,000 times",
        lambda r: (
            adds(r, "softmax", True, "CIFAR-10") < 10 * adds(r, "linear", True, "CIFAR-10")
            and adds(r, "softmax", False, "CIFAR-10") > 1000 * adds(r, "linear", True, "CIFAR-10")
        ),
    ),
    Claim(
        "linear generates CIFAR-10 faster than cached softmax, in turns on one machine",
        lambda r: r.mean(name("linear", True, "CIFAR-10"), "times_cached") > 1,
    ),
    Claim(
        "the longer the image, the greater linear attention's gain over the cache",
        above("times_cached", *(name("linear", True, image) for image in ("CIFAR-10", "MNIST"))),
    ),
]
