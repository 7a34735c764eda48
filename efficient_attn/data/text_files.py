"""`text_files`: plain text in one file or many, for models that tell tokens."""

from dataclasses import replace
from pathlib import Path

from efficient_attn.data import language, texts
from efficient_attn.data.base import Config, Dataset
from efficient_attn.data.faults import Faults
from efficient_attn.data.folders import SPLITS, hidden
from efficient_attn.errors import UserError


def load(config: Config) -> Dataset:
    """The file `config.path`, or the .txt files below that folder, in sorted order.

    Hidden files, and those in hidden folders, are left out.

    A folder brings splits of its own where files are named train.txt, valid.txt, test.txt or
    wiki.train.txt and so on, or stand in folders train, validation and test; other files are then
    not read. Otherwise the last parts of the text are held out.

    Raises:
        UserError: no such file or folder, no text in it, a file not in UTF-8 (see
            `config.on_error`), or `text.predict` asks for labels.
    """
    task = "next" if config.text.predict == "auto" else config.text.predict
    if task == "label":
        raise UserError(
            "text_files has no labels: set data.text.predict to 'next' or 'masked', or "
            "data.name='text_folder'"
        )
    found, unread = _find(config.path)
    faults = Faults(config.on_error)
    read = {
        split: [text for path in paths if (text := texts.read(path, faults)) is not None]
        for split, paths in found.items()
    }
    faults.report(total=sum(map(len, found.values())))
    loaded = language.dataset(read, config, task=task)
    if unread:
        about = f"{loaded.info.about}; {unread} files are of no split and were not read"
        loaded = replace(loaded, info=replace(loaded.info, about=about))
    return loaded


def _find(name: str) -> tuple[dict[str, list[Path]], int]:
    """The files of each split, and how many belong to none."""
    if not name:
        raise UserError("text_files reads your own text: name a file or folder in data.path")
    path = Path(name)
    if path.is_file():
        return {"train": [path]}, 0
    if not path.is_dir():
        raise UserError(f"data.path={name!r} is neither a file nor a folder")
    files = [p for p in sorted(path.rglob("*.txt")) if p.is_file() and not hidden(p, path)]
    if not files:
        raise UserError(f"no .txt file in {path}: put text there, or name a file in data.path")
    found: dict[str, list[Path]] = {}
    for file in files:
        split = _split(file.relative_to(path))
        if split:
            found.setdefault(split, []).append(file)
    if "train" not in found:
        return {"train": files}, 0
    return found, len(files) - sum(map(len, found.values()))


def _split(file: Path) -> str | None:
    """What the name says: test/a.txt, test.txt and wiki.test.txt belong to test."""
    own = file.parts[0] if len(file.parts) > 1 else file.stem.rpartition(".")[2]
    return next((split for split, names in SPLITS.items() if own in names), None)
