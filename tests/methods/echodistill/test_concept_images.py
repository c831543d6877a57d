"""A folder of a few pictures: what is read, how, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill.methods.echodistill.concept_images import augmented, load_concept_images, load_concept_masks
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw

ORIENTATION = 0x0112


def picture(path, size=(16, 16), colour=(250, 10, 20), **save):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)


def refused(folder, size=16):
    with pytest.raises(UserError) as caught:
        load_concept_images(folder, size, "c")
    return str(caught.value)


def test_pictures_come_in_order_of_name_with_their_captions(tmp_path):
    for name, red in (("b.png", 255), ("a.bmp", 0), ("c.png", 102)):
        picture(tmp_path / name, colour=(red, 0, 0))
    lines = [{"file_name": "b.png", "text": "the second"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    images, captions = load_concept_images(tmp_path, 16, "a <new1>")
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.0, 1.0, 0.4]))
    assert captions == ["a <new1>", "the second", "a <new1>"]


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # the stored upper half is white
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # shown after a quarter turn clockwise: the upper half becomes the right one
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif, quality=100)
    image = load_concept_images(tmp_path, 16, "c").images[0]
    assert image[:, :, 10:].min() > 0.95 and image[:, :, :6].max() < 0.05


def test_wide_pictures_are_cut_to_the_middle_and_shrunk(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert load_concept_images(tmp_path, 16, "c").images.min() > 0.9  # the filter reaches a little over the edge


def test_a_rectangle_is_cut_from_the_middle_and_neither_side_is_enlarged(tmp_path):
    pixels = np.zeros((60, 64, 3), np.uint8)
    pixels[22:38] = 255  # the middle 16 of 60 rows, which 16 x 64 pixels are cut to
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_concept_images(tmp_path, (8, 32), "c").images[0]
    assert image.shape == (3, 8, 32) and image.min() > 0.9
    assert "is 64 x 60 pixels; the model makes 8 x 61" in refused(tmp_path, (61, 8))
    assert "is 64 x 60 pixels; the model makes 65 x 8" in refused(tmp_path, (8, 65))


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (16, 16), 51).save(tmp_path / "grey.png")
    images = load_concept_images(tmp_path, 16, "c").images
    assert images[0].min() == 1 and torch.allclose(images[1], torch.tensor(0.2))


def test_other_files_are_left_out_with_a_warning(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "concept.json").write_text("{}")
    with pytest.warns(UserWarning, match="notes.txt") as caught:
        assert len(load_concept_images(tmp_path, 16, "c").images) == 1
    assert "DS_Store" not in str(caught[0].message) and "json" not in str(caught[0].message)


def test_bad_folders_and_pictures_are_refused_by_name(tmp_path):
    assert "is no folder" in refused(tmp_path / "absent")
    assert "it is empty" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert "it has notes.txt" in refused(tmp_path)
    picture(tmp_path / "small" / "a.png", size=(40, 12))
    assert "40 x 12 pixels; the model makes 16 x 16" in refused(tmp_path / "small")
    picture(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.jpg").write_bytes(b"no picture at all")
    message = refused(tmp_path / "broken")
    assert "b.jpg cannot be read as a picture" in message
    data = (tmp_path / "broken" / "a.png").read_bytes()
    (tmp_path / "broken" / "b.jpg").unlink()
    (tmp_path / "broken" / "a.png").write_bytes(data[: len(data) // 2])
    assert "a.png cannot be read" in refused(tmp_path / "broken")


def test_bad_captions_are_refused_by_line(tmp_path):
    picture(tmp_path / "a.png")
    file = tmp_path / "metadata.jsonl"
    file.write_text('{"file_name": "a.png"}\n')
    assert "line 1 of" in refused(tmp_path) and "must be like" in refused(tmp_path)
    file.write_text('{"file_name": "b.png", "text": "x"}\n')
    assert "names b.png, which is no picture" in refused(tmp_path)


def test_augmentation_mirrors_and_enlarges_within_the_picture():
    images = torch.linspace(0, 1, 8).expand(64, 3, 8, 8).contiguous()  # brighter to the right
    assert augmented(images, Draw(0, 0, rows=64), False, 1.0) is images
    flipped = augmented(images, Draw(0, 0, rows=64), True, 1.0)
    mirrored = flipped[:, 0, 0, 0] > 0.5
    assert 16 < mirrored.sum() < 48
    torch.testing.assert_close(flipped[mirrored], images[mirrored].flip(3))
    torch.testing.assert_close(flipped[~mirrored], images[~mirrored])
    zoomed = augmented(images, Draw(0, 0, rows=64), False, 2.0)
    span = zoomed[:, 0, 0, -1] - zoomed[:, 0, 0, 0]
    assert span.min() > 0.4 and span.max() <= 1 and zoomed.min() >= 0 and zoomed.max() <= 1
    torch.testing.assert_close(augmented(images, Draw(0, 0, rows=64), False, 2.0), zoomed)


# --- masks


def mask(path, size=(16, 16), box=(4, 4, 12, 12)):
    image = Image.new("L", size, 0)
    image.paste(255, box)
    image.save(path)


def refused_masks(folder, size=16):
    with pytest.raises(UserError) as caught:
        load_concept_masks(folder, size)
    return str(caught.value)


def test_masks_lie_beside_the_pictures_and_are_none_themselves(tmp_path):
    for name in ("a.png", "b.jpg"):
        picture(tmp_path / name, size=(32, 16))
    assert load_concept_masks(tmp_path, 16) is None
    mask(tmp_path / "a.mask.png", (32, 16), (8, 0, 16, 16))  # the left half of the middle that is cut out
    mask(tmp_path / "b.mask.png", (32, 16), (0, 0, 16, 16))
    assert len(load_concept_images(tmp_path, 16, "c").images) == 2
    masks = load_concept_masks(tmp_path, 16)
    assert masks.shape == (2, 1, 16, 16) and masks.dtype == torch.float32
    assert masks[:, :, :, :8].min() == 1 and masks[:, :, :, 8:].max() == 0
    (tmp_path / "b.mask.png").unlink()
    assert "1 of 2 pictures" in refused_masks(tmp_path) and "b.jpg has none" in refused_masks(tmp_path)


def test_an_alpha_channel_is_a_mask_and_turns_with_its_picture(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:8, :, 3] = 255  # the stored upper half is the object
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # a quarter turn clockwise: it becomes the right one
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    masks = load_concept_masks(tmp_path, 16)
    assert masks[0, 0, :, 8:].min() == 1 and masks[0, 0, :, :8].max() == 0
    Image.new("RGBA", (16, 16), (9, 9, 9, 255)).save(tmp_path / "a.png")  # opaque all over says nothing
    assert load_concept_masks(tmp_path, 16) is None


def test_masks_that_do_not_fit_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    mask(tmp_path / "b.mask.png")
    assert "b.mask.png is the mask of b, and" in refused_masks(tmp_path) and "has no picture" in refused_masks(tmp_path)
    (tmp_path / "b.mask.png").unlink()
    mask(tmp_path / "a.mask.png", (16, 17))
    assert "is 16 x 17 pixels and a.png 16 x 16" in refused_masks(tmp_path)
    mask(tmp_path / "a.mask.png", box=(0, 0, 0, 0))
    assert "has no object in the part of 16 x 16" in refused_masks(tmp_path)
    mask(tmp_path / "a.mask.png", box=(0, 0, 16, 16))
    assert "has nothing but the object" in refused_masks(tmp_path)
    mask(tmp_path / "a.mask.png")
    picture(tmp_path / "a.jpg")
    assert "has 2 pictures of this name; it needs one" in refused_masks(tmp_path)
