"""Tables by the package datasets itself, whose stand-in the tests of the other sources use."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flowdistill.data.picture_sources import class_numbers
from flowdistill.data.sources import UsablePictures, open_pictures
from tests.data import stored

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def datasets() -> ModuleType:
    import datasets  # a second that other processes of the tests need not spend

    return datasets


@pytest.fixture
def table(datasets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    images, labels = stored.few()
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [{"bytes": stored.png(image), "path": None} for image in images],
            "caption": [stored.caption(label) for label in labels.tolist()], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("kind", ["saved", "parquet", "splits"])
def test_pictures_captions_and_labels(datasets, table, kind, tmp_path):
    place = tmp_path / kind
    if kind == "parquet":
        place = tmp_path / "rows.parquet"
        table.to_parquet(place)
    elif kind == "saved":
        table.save_to_disk(place)
    else:
        datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(place)
    images, labels = stored.few()
    found = open_pictures(str(place))
    read = UsablePictures(found).read(list(range(7)), (8, 8), 1)
    assert torch.equal(read, (images * 255).round().to(torch.uint8))
    assert found.captions(None) == [[stored.caption(label)] for label in labels.tolist()]
    assert class_numbers(found.labels(None), None, 4, "it") == labels.tolist()
    assert len({found.facts(i) for i in range(7)}) == 7
