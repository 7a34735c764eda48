"""Per-class scores against their definitions, the confusion picture, the exported predictions."""

import csv

import numpy as np
import pytest
from PIL import Image

from efficient_attn.evals import report

OUTPUTS = {
    "label": np.array([0, 0, 0, 1, 1, 2]),
    "prediction": np.array([0, 0, 1, 1, 0, 1]),
    "probability": np.array([0.9, 0.8, 0.6, 0.7, 0.5, 0.4]),
}
LABELS = ("cat", "dog", "eel", "fox")


def test_per_class():
    found = report.per_class(OUTPUTS, LABELS)
    assert found["cat"] == {"precision": 2 / 3, "recall": 2 / 3, "f1-score": 2 / 3, "support": 3}
    assert found["dog"]["precision"] == 1 / 3 and found["dog"]["recall"] == 1 / 2
    assert found["eel"] == {"precision": 0, "recall": 0, "f1-score": 0, "support": 1}
    assert found["fox"]["support"] == 0
    assert set(found) == {*LABELS, "macro avg", "weighted avg"}


def test_export(tmp_path):
    report.export_predictions(OUTPUTS, LABELS, tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 6
    expected = {"index": "2", "label": "cat", "prediction": "dog", "probability": "0.600000"}
    assert rows[2] == expected


@pytest.mark.parametrize("count", [2, 10, 100])
def test_confusion_picture(tmp_path, count):
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(count), 5)
    wrong = random.integers(count, size=len(label))
    outputs = {
        "label": label,
        "prediction": np.where(random.random(len(label)) < 0.7, label, wrong),
    }
    labels = [f"class {i}" for i in range(count)]
    report.draw_confusion(outputs, labels, tmp_path / "c.png", title="a title")
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("L"), np.float32)
    assert 400 < picture.shape[0] < 2000
    assert picture.std() > 10, "something is drawn"
