"""Which file belongs to which split and class, from how a folder is laid out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from efficient_attn.errors import UserError

SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}
UNLABELLED = "unsup"  # aclImdb keeps its reviews without a label in train/unsup


@dataclass(frozen=True)
class Listing:
    """Files [(path, label)] of each split found, and the classes' names in label order."""

    splits: dict[str, list[tuple[Path, int]]]
    labels: tuple[str, ...]

    @property
    def total(self) -> int:
        """Number of files in all splits."""
        return sum(map(len, self.splits.values()))


def existing(path: str) -> Path:
    """The folder `path`.

    Raises:
        UserError: it is not given, or is no folder.
    """
    if not path:
        raise UserError(
            "this data set reads your own files: name their folder in --config.data.path"
        )
    if not Path(path).is_dir():
        raise UserError(f"--config.data.path={path!r} is not a folder that exists")
    return Path(path)


def classes(root: Path, *, wanted: Callable[[Path], bool], what: str) -> Listing:
    """The files below `root` that are `wanted`, by class folder, in sorted order.

    Either root/train/<class>/... with test and validation beside train where there are any, or
    root/<class>/... . What is hidden and the folder "unsup" are left out; a class folder may hold
    further folders.

    Raises:
        UserError: no files, a class without any, test without train, or a test class that train
            lacks.
    """
    train = root / "train" if (root / "train").is_dir() else root
    folders = {"train": train}
    for split in ("validation", "test"):
        there = [root / name for name in SPLITS[split] if (root / name).is_dir()]
        if there and train == root:
            raise UserError(
                f"{root} has {there[0].name}/ but no train/: put the classes to train on in "
                f"{root}/train/"
            )
        folders |= {split: there[0]} if there else {}
    files = {split: _by_class(folder, wanted) for split, folder in folders.items()}
    labels = tuple(files["train"])
    if not labels:
        raise UserError(
            f"no {what} in {root}: put them in {root}/train/<class>/ (and test/<class>/), "
            f"or in {root}/<class>/"
        )
    for split, by_class in files.items():
        strange = sorted(set(by_class) - set(labels))
        if strange:
            raise UserError(f"{folders[split]} has a class {strange[0]!r} that {train} has not")
        empty = [name for name, paths in by_class.items() if not paths]
        if empty or not by_class:
            raise UserError(f"{folders[split].joinpath(*empty[:1])} is empty: it holds no {what}")
    numbers = {name: number for number, name in enumerate(labels)}
    splits = {
        split: [(path, numbers[name]) for name, paths in by_class.items() for path in paths]
        for split, by_class in files.items()
    }
    return Listing(splits, labels)


def _by_class(folder: Path, wanted: Callable[[Path], bool]) -> dict[str, list[Path]]:
    found = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not hidden(entry, folder) and entry.name != UNLABELLED:
            files = (p for p in entry.rglob("*") if p.is_file() and not hidden(p, folder))
            found[entry.name] = sorted(p for p in files if wanted(p))
    return found


def hidden(path: Path, root: Path) -> bool:
    """Whether the name of the path, or of a folder between it and `root`, begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)
