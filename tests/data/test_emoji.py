import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowdistill.data import emoji, load_images
from flowdistill.data.named_sets import load_captions
from flowdistill.utils.errors import UserError
from tests.data.emoji import FOLDER_VARIABLE, write_emoji


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "emoji"))
    return write_emoji(tmp_path / "emoji")


def test_pictures_lie_on_white_in_the_order_of_the_keyboard(folder):
    images, labels = load_images("emoji")
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.float32
    assert [emoji.CATEGORIES[label] for label in labels.tolist()] == [
        "People & Body", "People & Body", "People & Body", "Activities", "Symbols", "Flags"
    ]
    assert torch.equal(images[..., 16:], torch.ones(6, 3, 32, 16))  # whatever colour the transparent pixels have
    assert torch.allclose(images[:, 0, 3, 3], torch.arange(6) * 40 / 255) and (images[:, 1, :, :16] == 1).all()
    full = load_images("emoji64")[0]
    assert full.shape == (6, 3, 64, 64) and torch.equal(full[:, :, ::2, ::2], images)
    images.zero_()
    assert load_images("emoji")[0].max() == 1


def test_a_smaller_picture_is_the_mean_over_squares(folder):
    Image.new("RGBA", (64, 64), "black").save(folder / "img/google/64/wave.png")
    with Image.open(folder / "img/google/64/wave.png") as picture:
        picture.putpixel((3, 1), (255, 255, 255, 255))
        picture.putpixel((9, 9), (255, 0, 0, 51))
        picture.save(folder / "img/google/64/wave.png")
    first = load_images("emoji")[0][0]
    assert first[:, 0, 1].tolist() == [0.25] * 3 and first[:, 1, 0].tolist() == [0, 0, 0]
    # A fifth of red on white, in one pixel of four.
    assert first[:, 4, 4].tolist() == pytest.approx([0.25, 0.2, 0.2], abs=0.002)


def test_captions_are_what_people_say(folder):
    assert load_captions("emoji") == load_captions("emoji64") == [
        "waving hand", "waving hand, light skin tone", "waving hand, medium-light and medium-dark skin tone", "pinata",
        "ideograph discount", "flag of aland islands",
    ]


def test_without_the_package_the_error_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=f"{FOLDER_VARIABLE} names, has no emoji.json; get them with 'npm install "
                                        "emoji-datasource-google', or set"):
        load_images("emoji")
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="where npm puts the package, has no emoji.json"):
        load_captions("emoji64")


@pytest.mark.parametrize(("content", "words"), [
    (b"", "not valid JSON"), (b"[", "not valid JSON"), (b"\xff", "not.* UTF-8"), (b"{}", "lists no picture"),
    (b"[1]", "is damaged or not that of emoji-datasource"), (b'[{"name": "A"}]', "KeyError: 'sort_order'"),
], ids=repr)
def test_a_damaged_list_is_named(folder, content, words):
    (folder / "emoji.json").write_bytes(content)
    with pytest.raises(UserError, match=f"emoji.json.*{words}"):
        load_captions("emoji")


@pytest.mark.parametrize(("change", "words"), [
    (lambda tones: tones.update({"1F9D1": {"image": "a.png", "has_img_google": True}}), "KeyError: '1F9D1'"),
    (lambda tones: tones["1F3FB"].pop("image"), "KeyError: 'image'"),
])
def test_an_unknown_entry_is_named(folder, change, words):
    entries = json.loads((folder / "emoji.json").read_text())
    change(entries[1]["skin_variations"])
    (folder / "emoji.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=words):
        load_captions("emoji")


def test_a_damaged_picture_is_named(folder):
    file = folder / "img/google/64/pinata.png"
    whole = file.read_bytes()
    for content, words in ((whole[:-40], "missing or damaged"), (b"", "missing or damaged"), (None, "missing or dam")):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=f"pinata.png is {words}.*install emoji-datasource-google again"):
            load_images("emoji")
        file.touch()
    Image.new("RGBA", (32, 64)).save(file)
    with pytest.raises(UserError, match="pinata.png has 32x64 pixels, not 64x64"):
        load_images("emoji")
