"""Pictures of one's own: what names them, their captions and labels, and the look at each before a run."""

import gzip
import json
import os
import re
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

from flowdistill.conditioning.prompt_lists import Texts
from flowdistill.config import DataOptions
from flowdistill.data import picture_index
from flowdistill.data.captions import read_prompts_or_captions
from flowdistill.data.folder_pictures import FolderPictures
from flowdistill.data.picture_sources import Labels, class_numbers
from flowdistill.data.pictures import fitted, open_picture
from flowdistill.data.sources import SourceImages, UsablePictures, open_pictures
from flowdistill.data.tar_pictures import TarPictures
from flowdistill.evaluation.reference import open_images
from flowdistill.utils.errors import UserError
from tests.data import stored
from tests.processes import TIMEOUT, Child, environment


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", stored.fake_datasets())


@pytest.fixture
def made(tmp_path):
    return lambda kind, count=7: stored.write(kind, tmp_path / kind, *stored.few(count=count))


# --- what is in a source


@pytest.mark.parametrize("kind", stored.SOURCES)
def test_every_source_has_the_pictures_captions_and_labels(made, datasets, kind):
    images, labels = stored.few()
    found = open_pictures(made(kind))
    order = torch.arange(7)
    if kind == "sidecar":  # folders of classes come one after the other
        order = torch.cat([torch.arange(7)[labels == label] for label in range(4)])
    usable = UsablePictures(found)
    read = usable.read(list(range(7)), (8, 8), 1)
    assert torch.equal(read, (images[order] * 255).round().to(torch.uint8))
    assert found.captions(None) == [[stored.caption(label)] for label in labels[order].tolist()]
    assert class_numbers(found.labels(None), None, 4, "it") == labels[order].tolist()
    # The same set for the FID.
    indices, first = next(iter(SourceImages(found).batches(range(7), 5, 1)))
    assert indices == range(5) and torch.equal(torch.stack(first), read[:5])
    assert len({found.facts(i) for i in range(7)}) == len({found.title(i) for i in range(7)}) == 7


def test_a_column_that_holds_something_else_than_pictures(made, datasets, monkeypatch):
    place = made("table")

    def cast(table, name, kind):
        raise NotImplementedError("Unsupported cast from int64 to struct")  # as pyarrow says it

    monkeypatch.setattr(stored.Table, "cast_column", cast)
    with pytest.raises(UserError, match="the column label of .*/table holds no pictures, but SimpleNamespace; name an"):
        open_pictures(place, DataOptions(image="label"))


@pytest.mark.parametrize("ending", ["txt", "TXT", "Txt"])
def test_a_caption_beside_a_picture_may_have_any_case(tmp_path, ending):
    for name in ("1.png", "2.PNG"):
        (tmp_path / name).write_bytes(stored.png(stored.few()[0][0]))
        (tmp_path / name).with_suffix(f".{ending}").write_text(name)
    assert open_pictures(tmp_path).captions(None) == [["1.png"], ["2.PNG"]]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "METADATA.CSV"])
def test_tables_in_folders_below_are_read_too(tmp_path, name):
    """Each names pictures from where it is."""
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a/b"):
        folder.mkdir(exist_ok=True)
        (folder / "1.png").write_bytes(stored.png(stored.few()[0][0]))
    for folder in (tmp_path / "a", tmp_path):
        row = {"file_name": "b/1.png" if folder.name == "a" else "a/1.png", "text": folder.name[:1]}
        table = json.dumps(row) if name.endswith("l") else "\n".join(map(",".join, (row, row.values())))
        (folder / name).write_text(table)
    assert open_pictures(tmp_path).captions(None) == [[], [tmp_path.name[:1]], ["a"]]
    (tmp_path / "a/metadata.parquet").touch()
    with pytest.raises(UserError, match=f"the folder {tmp_path}/a has .* and .*; keep one"):
        open_pictures(tmp_path)


@pytest.mark.parametrize("kind", ["tar", "table", "jsonl"])
def test_references_take_the_same_sources(made, datasets, kind):
    images = open_images(source := made(kind))
    assert len(images) == 7 and len(list(images.batches(range(7), 7, 1))[0][1]) == 7
    assert images.hash() == open_images(source).hash()


def test_named_columns_lists_and_keys(tmp_path, made):
    folder = made("jsonl", 3)
    rows = [{"file_name": f"00{i}.png", "kind": name} | ({"short": ["a", " b "][:i]} if i else {})
            for i, name in enumerate(["dog", "cat", "dog"])]
    (tmp_path / "jsonl/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_pictures(folder)
    assert found.captions("short") == [[], ["a"], ["a", "b"]] and found.captions(None) is None
    assert found.labels("kind").values == ["dog", "cat", "dog"] and found.labels(None) is None
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, row in enumerate(rows):
            stored.add(tar, f"{i}.a.png", stored.png(stored.few()[0][i]))  # the key ends at the first dot
            stored.add(tar, f"{i}.json", json.dumps(row).encode())
    assert "x.tar holds no pictures (" in _refused(lambda: TarPictures(str(tmp_path / "x.tar")))
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        for i, row in enumerate(rows):
            stored.add(tar, f"{i}.PNG", stored.png(stored.few()[0][i]))
            stored.add(tar, f"{i}.json", json.dumps(row).encode())
    found = TarPictures(str(tmp_path / "y.tar"))
    assert found.captions("short") == [[], ["a"], ["a", "b"]] and found.labels("kind").values == ["dog", "cat", "dog"]
    assert found.captions(None) is None and found.labels(None) is None
    message = _refused(lambda: found.captions("long"))
    assert "has no column 'long', but file_name, kind, short; name one in data_options.captions" in message


def _refused(call):
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


def test_pictures_are_cut_around_the_middle_and_smoothed(tmp_path):
    """A stripe of one pixel is still seen at a quarter of the size, and what is cut off is the same on both sides."""
    picture = torch.zeros(1, 32, 64, dtype=torch.uint8)
    picture[:, :, 31:33] = 255
    picture[:, :, :16] = picture[:, :, 48:] = 100
    path = tmp_path / "a.png"
    path.write_bytes(stored.png(picture.float() / 255))
    small = fitted(open_picture(path), (8, 8), 3)
    assert small.shape == (3, 8, 8) and torch.equal(small, small.flip(-1))
    assert 10 < small.float().mean() < 25 and small[0, 0, 3] > 50 and small[0, 0, 0] < 10
    assert torch.equal(fitted(open_picture(path), (32, 64), 1), picture)
    assert fitted(open_picture(path), (16, 8), 1).shape == (1, 16, 8)


@pytest.mark.parametrize("values,names,classes,count,expected", [
    ([2, 0, None], None, None, 3, [2, 0, -1]),
    (["2", "0"], None, None, 3, [2, 0]),
    (["dog", "cat", "dog"], None, None, 2, [1, 0, 1]),
    (["dog", "cat"], None, ["dog", "cat", "cow"], 3, [0, 1]),
    ([1, 0], ["cat", "dog"], None, 2, [1, 0]),
    ([1, 0], ["cat", "dog"], ["dog", "cat"], 2, [0, 1]),
    ([3], None, None, 3, "it has the label 3 .picture 0., and the teacher has the labels 0 to 2"),
    (["dog"], None, ["cat"], 1, "it has the labels dog, which data_options.classes does not name"),
    (["dog", "cat"], None, None, 3, r"it has 2 classes \(cat, dog\), and the teacher 3; name all of them in"),
    ([-1], None, None, 3, "has the label -1"),
    # Whole numbers however they are written: pandas writes 1.0 in a column with gaps.
    ([f"{i}.0" for i in range(12)], None, None, 12, list(range(12))),
    (["10", " 1", "+2", "3.", 4, "1e1", None], None, None, 11, [10, 1, 2, 3, 4, 10, -1]),
    (["-1", "0"], None, None, 2, r"it has the label -1 \(picture 0\), and the teacher has the labels 0 to 1"),
    (["0", "0.5"], None, None, 2, r"it has the label 0.5 \(picture 1\), and the teacher has"),
    (["0", "1e999"], None, None, 2, r"it has the label 1e999 \(picture 1\), and the teacher has"),
    (["1", "cat"], None, None, 2, r"the label 1 \(picture 0\), a number, and the label cat \(picture 1\), a name; use"),
    (["1", "\N{SUPERSCRIPT TWO}"], None, None, 2, "a number, and the label \N{SUPERSCRIPT TWO} .*, a name"),
    (["cat", 1], None, None, 2, r"the label 1 \(picture 1\), a number, and the label cat \(picture 0\), a name"),
    (["nan", "inf"], None, None, 2, [1, 0]),
    (["1", "cat"], None, ["cat", "1"], 2, [1, 0]),
    # The hub's -1 is no label; an index past the end has no name.
    ([1, -1], ["cat", "dog"], ["dog", "cat"], 2, [0, -1]),
    ([1, -1], ["cat", "dog"], None, 2, [1, -1]),
    ([0, 2], ["cat", "dog"], ["dog", "cat"], 2, r"has the label 2 \(picture 1\), and its own labels are 0 to 1"),
    ([0, -2], ["cat", "dog"], None, 2, r"has the label -2 \(picture 1\), and its own labels are 0 to 1"),
    (["cat"], None, ["cat", "dog", "cat"], 3, "data_options.classes names cat more than once"),
    (["cat"], None, ["cat", "dog", "cow"], 2, "data_options.classes has 3 names, and the teacher 2 classes"),
    ([0], ["cat", "dog"], None, 3, r"it has 2 classes \(cat, dog\), and the teacher 3; name all of the teacher's"),
])
def test_labels_become_those_of_the_teacher(values, names, classes, count, expected):
    if isinstance(expected, list):
        assert class_numbers(Labels(values, names), classes, count, "it") == expected
    else:
        with pytest.raises(UserError, match=expected):
            class_numbers(Labels(values, names), classes, count, "it", "picture {}".format)


# --- the look at each picture


def test_a_second_start_opens_nothing_and_a_change_is_seen(made, monkeypatch):
    folder, opened = made("jsonl"), []
    real = FolderPictures.open
    monkeypatch.setattr(FolderPictures, "open", lambda self, i: opened.append(i) or real(self, i))
    UsablePictures(open_pictures(folder))
    assert sorted(opened) == list(range(7))
    opened.clear()
    assert len(UsablePictures(open_pictures(folder))) == 7 and not opened
    images, _ = stored.few()
    path = os.path.join(folder, "002.png")
    with open(path, "wb") as file:
        file.write(stored.png(images[5]))
    os.utime(path, ns=(1, 1))
    UsablePictures(open_pictures(folder))
    assert opened == [2]
    for name in os.listdir(index := os.path.join(os.environ["XDG_CACHE_HOME"], "flowdistill/images")):
        with open(os.path.join(index, name), "wb") as file:
            file.write(b"\x93NUMPY")
    opened.clear()
    UsablePictures(open_pictures(folder))
    assert len(opened) == 7


def test_tars_are_gone_through_once(made, monkeypatch):
    pattern = made("tar")
    assert len(TarPictures(pattern)) == 7
    monkeypatch.setattr(tarfile, "open", None)
    assert TarPictures(pattern).captions(None)[6] == [stored.caption(2)]


def tar_of(path, *names, **link):
    """A tar of pictures and captions, and of one link (name, target) of a kind of tarfile."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            stored.add(tar, name, stored.png(stored.few()[0][number]) if name.endswith("png") else name.encode())
        for kind, (name, target) in link.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = getattr(tarfile, kind), target
            tar.addfile(member)
    return path


def damage(kind, path):
    """Three pictures, members of 1,024 bytes each, in a tar that tarfile reads to an end without a word."""
    content = bytearray(tar_of(path, "1.png", "2.png", "3.png").read_bytes())
    assert content[1024:1029] == b"2.png"
    if kind == "bad header":
        content[1024 + 150] ^= 1  # in the header's sum
    elif kind == "zeroed header":
        content[1024:1536] = bytes(512)
    elif kind == "last header":
        content[2048:2560] = bytes(512)
    elif kind == "two":
        content = content + content
    path.write_bytes({"boundary": content[:2048], "in a header": content[:2048 + 100], "one block": content[:3584]}.get(
        kind, content))


@pytest.mark.parametrize("kind,message", [
    ("bad header", "is damaged, or several tars in one: from byte 1,024 on"),
    ("zeroed header", "is damaged, or several tars in one: from byte 1,024 on"),
    ("last header", "is damaged, or several tars in one: from byte 2,048 on"),
    ("two", "is damaged, or several tars in one: from byte 3,072 on"),
    ("boundary", "is cut short: its 2,048 bytes do not end in the two empty blocks"),
    ("in a header", "is cut short: its 2,148 bytes do not end in the two empty blocks"),
    ("one block", "is cut short: its 3,584 bytes do not end in the two empty blocks"),
])
def test_a_damaged_tar_loses_no_picture_in_silence(tmp_path, kind, message):
    damage(kind, tmp_path / "a.tar")
    for _ in range(2):  # nothing of it is kept for the second time
        text = _refused(lambda: TarPictures(str(tmp_path / "a.tar")))
        assert text.startswith(f"{tmp_path}/a.tar {message}") and "\n" not in text


@pytest.mark.parametrize("kind,link,read", [
    ("LNKTYPE", ("d/2.png", "d/1.png"), True),
    ("SYMTYPE", ("d/2.png", "1.png"), True),
    ("SYMTYPE", ("e/2.png", "../d/1.png"), True),
    ("SYMTYPE", ("d/2.png", "2.png"), False),
    ("SYMTYPE", ("d/2.png", "/elsewhere/1.png"), False),
    ("LNKTYPE", ("d/2.png", "1.png"), False),
])
def test_links_in_a_tar_are_read_or_counted(tmp_path, kind, link, read):
    path = str(tar_of(tmp_path / "a.tar", "d/1.png", **{kind: link}))
    for _ in range(2):  # the second time from what is kept
        found = TarPictures(path)
        assert list(found.names) == ["d/1.png", link[0]][: 1 + read]
        assert found.left_out == (None if read else "1 x link to what is not in the tar, or sparse file")
        if read:
            assert found.open(0).tobytes() == found.open(1).tobytes()


def test_what_looks_like_a_picture_in_a_tar_and_is_none_is_counted(tmp_path):
    tar_of(tmp_path / "a.tar", "1.png", "._1.png", "v1.0_0001.png", "v1.0_0002.png", "2.heic", "2.txt")
    tar_of(tmp_path / "b.tar", "v2.0_0001.png")
    found = TarPictures(f"{tmp_path}/*.tar")
    assert list(found.names) == ["1.png"] and found.left_out == (
        "1 x .heic, 1 x hidden file, "
        "3 x picture whose key ends at the first of several dots in its name, such as v1.0_0001.png")
    assert "left out: 1 x picture whose key ends" in _refused(lambda: TarPictures(str(tmp_path / "b.tar")))


def look_slowly(folder):
    real = FolderPictures.open

    def slow(self, index):
        time.sleep(0.02)
        return real(self, index)

    FolderPictures.open = slow
    picture_index.AT_ONCE, picture_index.SAVED_EVERY = 4, 0.0
    UsablePictures(open_pictures(folder))


def test_a_killed_look_goes_on(made, monkeypatch, tmp_path):
    folder = made("jsonl", 200)
    index = tmp_path / "cache/flowdistill/images"
    with Child(look_slowly, folder, env=environment(XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"])) as child:
        end = time.monotonic() + TIMEOUT
        while not list(index.glob("index-*.npy")) and time.monotonic() < end:
            time.sleep(0.005)
        child.kill()
    opened = []
    real = FolderPictures.open
    monkeypatch.setattr(FolderPictures, "open", lambda self, i: opened.append(i) or real(self, i))
    assert len(UsablePictures(open_pictures(folder))) == 200
    assert 0 < len(opened) < 200


def test_damaged_pictures_are_named_or_left_out(made, caplog):
    folder = made("jsonl")
    for name in ("001.png", "004.png"):
        path = os.path.join(folder, name)
        with open(path, "r+b") as file:
            file.truncate(60)
    message = _refused(lambda: UsablePictures(open_pictures(folder)))
    assert "2 of 7 pictures" in message and "001.png cannot be read" in message and "004.png cannot be read" in message
    assert "data_options.on_error=skip" in message and "\n" not in message
    usable = UsablePictures(open_pictures(folder), skip=True)
    assert usable.places.tolist() == [0, 2, 3, 5, 6]
    assert "left out of the 7 pictures" in caplog.text and "2 that cannot be read" in caplog.text


# --- bad input


def broken(name):
    """A folder, tar or table with one thing wrong, and how it is opened."""

    def jsonl(folder, rows):
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(tmp_path):
        folder = tmp_path / "jsonl"
        source = stored.write("jsonl", folder, *stored.few(count=3))
        rows = [{"file_name": f"00{i}.png", "text": "a"} for i in range(3)]
        options = {}
        if name == "empty":
            source = str(tmp_path / "nothing")
            (tmp_path / "nothing").mkdir()
        elif name == "tars":
            (tmp_path / "tars").mkdir()
            (tmp_path / "tars/a.tar").write_bytes(b"x" * 600)
            source = str(tmp_path / "tars")
        elif name == "twice":
            jsonl(folder, [*rows, rows[1]])
        elif name == "dot":
            jsonl(folder, [*rows, {"file_name": "./001.png", "text": "b"}])
        elif name == "stranger":
            jsonl(folder, [*rows, {"file_name": "9.png", "text": "b"}])
        elif name == "nameless":
            jsonl(folder, [{"text": "a"}])
        elif name == "number":
            jsonl(folder, [*rows[:2], {"file_name": "002.png", "text": 3}])
        elif name == "two tables":
            (folder / "metadata.csv").write_text("file_name,text\n")
        elif name == "rowless":
            (folder / "metadata.jsonl").write_text("\n")
        elif name == "column":
            options["captions"] = "words"
        elif name == "no table":
            (folder / "metadata.jsonl").unlink()
            options["captions"] = "words"
        elif name == "short row":
            (folder / "metadata.jsonl").unlink()
            (folder / "metadata.csv").write_text("file_name,text\n000.png,a,b\n")
        elif name == "missing":
            jsonl(folder, rows[:2])
        elif name == "blank":
            jsonl(folder, [*rows[:2], {"file_name": "002.png", "text": "  "}])
        elif name == "split":
            options["split"] = "test"
        elif name == "unknown":
            source = "fewer"
        elif name == "hub":
            source = "owner/name"
        elif name == "parquet":
            source = str(tmp_path / "none-*.parquet")
        elif name == "no tar":
            source = str(tmp_path / "none-*.tar")
        elif name in ("gzip", "cut", "text", "same"):
            source = str(tmp_path / "a.tar")
            with tarfile.open(source, "w") as tar:
                stored.add(tar, "1.png", stored.png(stored.few()[0][0]))
                stored.add(tar, "1.png" if name == "same" else "1.txt", b"\xff" if name == "text" else b"a")
                stored.add(tar, "2.png", bytes(3000))
            content = (tmp_path / "a.tar").read_bytes()
            (tmp_path / "a.tar").write_bytes(gzip.compress(content) if name == "gzip" else
                                             content[:3500] if name == "cut" else content)
        return source, options

    return make


@pytest.mark.parametrize("name,message", [
    ("empty", "holds no images that can be read"),
    ("tars", r"holds no images that can be read; its tars are named as .*/tars/\*.tar"),
    ("twice", "line 4 of .*metadata.jsonl names 001.png, which line 2 of .* has named already"),
    ("dot", "line 4 of .* names 001.png, which line 2 of .* has named already"),
    ("stranger", "line 4 of .*metadata.jsonl names 9.png, which is no picture in "),
    ("nameless", "has no column file_name, which says whose row it is"),
    ("number", "line 3 of .* has 3 for a caption; it must be a text, or a list of texts"),
    ("two tables", "has metadata.csv and metadata.jsonl; keep one"),
    ("rowless", "metadata.jsonl has no rows"),
    ("column", "has no column 'words', but text, label; name one in data_options.captions"),
    ("no table", "data_options.captions is words, but .* has no table with columns"),
    ("short row", "line 2 of .*metadata.csv has 3 columns, and its first line has 2"),
    ("missing", "1 of 3 pictures of .* have no caption: .*002.png.*; add what is missing, or leave such pictures out"),
    ("blank", "1 of 3 pictures of .* have no caption: .*002.png"),
    ("split", "data_options.split is test, which means nothing to .*; leave it out"),
    ("unknown", r"there are no images 'fewer' \(did you mean 'few'\?\); what can be named is a named set"),
    ("hub", "owner/name is no set of images here and could not be fetched from the hub: no network for owner/name"),
    ("parquet", "there is no file .*none"),
    ("no tar", "there is no tar file .*none"),
    ("gzip", "a.tar is damaged, compressed or no tar file"),
    ("cut", "a.tar is (cut short|damaged)"),
    ("text", "a text beside 1.png in .*a.tar is not UTF-8"),
    ("same", "a.tar has 1.png twice; each needs a name of its own"),
])
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, datasets, name, message):
    stored.name_set(monkeypatch, *stored.few())
    source, options = broken(name)(tmp_path)

    def use():
        found = open_pictures(source, DataOptions(**options))
        captions = found.captions(options.get("captions"))
        UsablePictures(found, (np.array([bool(texts) for texts in captions]), "caption"))

    text = _refused(use)
    assert re.search(message, text), text
    assert "\n" not in text


def test_without_the_package_a_table_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"is a table that the package datasets reads, .* install flowdistill\[data\]"):
        open_pictures(str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match=r"there is no folder own/photoz here, and a hub id is what the package datase"):
        open_pictures("own/photoz")


# --- captions as a list of prompts


def test_captions_are_a_list_of_prompts(made, datasets, tmp_path):
    for kind in stored.SOURCES:
        found = read_prompts_or_captions(made(kind))
        assert sorted(found.prompts) == sorted(stored.TEXTS) and sum(found.weights) == pytest.approx(1)
        assert dict(zip(found.prompts, found.weights, strict=True))[stored.TEXTS[0]] == pytest.approx(3 / 7)
    (tmp_path / "p.txt").write_text("a\nb")
    assert read_prompts_or_captions(tmp_path / "p.txt").prompts == ["a", "b"]
    (tmp_path / "jsonl/metadata.jsonl").unlink()
    with pytest.raises(UserError, match="teacher.prompts is .*, whose pictures have no captions"):
        read_prompts_or_captions(tmp_path / "jsonl")


def test_a_tars_pictures_have_each_its_own_caption(tmp_path):
    """A text file beside one picture takes no caption from another one's object."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, image in enumerate(stored.few()[0][:2]):
            stored.add(tar, f"{number}.png", stored.png(image))
        stored.add(tar, "0.json", json.dumps({"caption": "of json", "label": 3}).encode())
        stored.add(tar, "1.txt", b"of text")
        stored.add(tar, "1.cls", b"5")
    found = TarPictures(str(tmp_path / "a.tar"))
    assert found.captions(None) == [["of json"], ["of text"]] and found.labels(None).values == [3, "5"]


def test_names_that_are_not_in_utf8(tmp_path):
    """A file of another system's name is a picture like others."""
    os.makedirs(tmp_path / "images")
    with open(os.fsencode(tmp_path / "images") + b"/caf\xe9.png", "wb") as file:
        file.write(stored.png(stored.few()[0][0]))
    pictures = open_pictures(str(tmp_path / "images"), DataOptions())
    assert len(pictures) == 1 and list(Texts(["caf\udce9", "é"])) == ["caf\udce9", "é"]


def test_columns_of_a_csv_are_known_by_their_words_and_once(tmp_path):
    for image, name in zip(stored.few()[0][:2], ("0.png", "1.png"), strict=True):
        (tmp_path / name).write_bytes(stored.png(image))
    (tmp_path / "metadata.csv").write_text("file_name, text\n0.png,a\n1.png,b\n")
    assert FolderPictures(tmp_path).captions(None) == [["a"], ["b"]]
    (tmp_path / "metadata.csv").write_text("file_name,text,text\n0.png,a,c\n1.png,b,d\n")
    with pytest.raises(UserError, match="metadata.csv has more than one column text; keep one of each name"):
        FolderPictures(tmp_path).captions(None)
