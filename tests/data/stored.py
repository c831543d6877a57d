"""The same few pictures as a folder, as tars and as a table, for the tests of image sources."""

import io
import json
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torchvision.transforms.functional import to_pil_image

from flowdistill.data import named_sets
from flowdistill.utils.images import to_uint8

SOURCES = ("jsonl", "csv", "sidecar", "tar", "table")
TEXTS = ("a red cat", "two birds, and more", "the sea at night")


def few(size=(1, 8, 8), count=7, classes=4):
    """Images (N, C, H, W) whose values are multiples of 1/255, and their labels."""
    levels = torch.randint(256, (count, *size), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255, torch.arange(count) % classes


def caption(label):
    return TEXTS[label % len(TEXTS)]


def name_set(monkeypatch, images, labels):
    """Make them the named set ``few``."""
    monkeypatch.setitem(named_sets.IMAGE_SETS, "few", lambda: (images.clone(), labels.clone()))
    monkeypatch.setitem(named_sets.CAPTIONS, "few", lambda: [caption(label) for label in labels.tolist()])


def png(image):
    content = io.BytesIO()
    to_pil_image(to_uint8(image)).save(content, format="png")
    return content.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write(kind, folder, images, labels):
    """Store them below ``folder`` and return what a method's ``data`` says."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(f"{i:03d}", png(image), caption(label), label)
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))]
    if kind == "tar":
        for number, part in enumerate((rows[:3], rows[3:])):
            with tarfile.open(folder / f"s-{number}.tar", "w") as tar:
                for key, content, text, label in part:
                    add(tar, f"in/{key}.png", content)
                    add(tar, f"in/{key}.txt", text.encode())
                    add(tar, f"in/{key}.cls", str(label).encode())
        return f"{folder}/*.tar"
    if kind == "table":
        table = [{"image": {"bytes": content.hex(), "path": None}, "caption": text, "label": label}
                 for _, content, text, label in rows]
        (folder / "dataset_info.json").write_text(json.dumps(table))
        (folder / "state.json").write_text("{}")
        return str(folder)
    for key, content, text, label in rows:
        place = folder / (f"{label}/{key}.png" if kind == "sidecar" else f"{key}.png")
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
        if kind == "sidecar":
            place.with_suffix(".txt").write_text(f"{text}\n")
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f"{key}.png", "text": text, "label": label}) for key, _, text, label in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    if kind == "csv":
        lines = [f'{key}.png,"{text}",{label}' for key, _, text, label in rows]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text,label", *lines]))
    return str(folder)


class Table:
    """What is used of a table of the package datasets, over rows that :func:`write` has written."""

    def __init__(self, rows, decode=True):
        self.rows, self.decode, self._fingerprint = rows, decode, "1"
        self.features = {name: Image() if name == "image" else SimpleNamespace() for name in rows[0]}

    def cast_column(self, name, kind):
        assert name == "image" and not kind.decode
        return Table(self.rows, False)

    def __len__(self):
        return len(self.rows)

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def iter(self, size):
        for start in range(0, len(self.rows), size):
            column = [picture_in(row["image"]) for row in self.rows[start : start + size]]
            yield SimpleNamespace(column=lambda number, column=column: SimpleNamespace(chunks=[Structs(column)]))

    def __getitem__(self, index):
        if isinstance(index, slice):
            return {name: [row[name] for row in self.rows[index]] for name in self.features}
        assert not self.decode, "only bytes are asked for"
        row = dict(self.rows[index])
        row["image"] = picture_in(row["image"])
        return row

    def select_columns(self, names):
        return Table([{name: row[name] for name in names} for row in self.rows])


def picture_in(value):
    """The bytes of a picture, or its path."""
    return {"bytes": None if value["bytes"] is None else bytes.fromhex(value["bytes"]), "path": value["path"]}


class Structs(list):
    """What is used of an array of pyarrow's."""

    def field(self, name):
        return Structs(row[name] for row in self)

    def is_null(self):
        return Structs(value is None for value in self)

    def to_pylist(self):
        return self


class Image:
    def __init__(self, decode=True):
        self.decode = decode


def load_from_disk(path):
    return Table(json.loads((Path(path) / "dataset_info.json").read_text()))


def load_dataset(name, data_files=None, split=None):
    if data_files is not None:
        return Table(json.loads(Path(data_files[0]).read_text()))
    raise ConnectionError(f"no network\nfor {name}")


def fake_datasets():
    """A module for the place of the package in ``sys.modules``."""
    module = ModuleType("datasets")
    module.Image, module.load_from_disk, module.load_dataset = Image, load_from_disk, load_dataset
    return module
