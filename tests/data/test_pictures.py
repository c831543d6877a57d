"""Image files: every mode of Pillow through every reader, transparency, EXIF, depth, and which files are pictures."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from flowdistill.data import load_digits
from flowdistill.data.image_sets import FolderImages
from flowdistill.data.pictures import find_pictures, is_picture, open_picture, read_picture, to_eight_bits
from flowdistill.methods.echodistill.concept_images import load_concept_images
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import to_uint8

SIDE = 8
GREY = np.linspace(0, 255, SIDE * SIDE).round().astype(np.uint8).reshape(SIDE, SIDE)  # a ramp of 64 levels
COLOUR = np.stack([GREY, 255 - GREY, np.full_like(GREY, 100)], -1)
DEEP = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}
GREY_MODES = ["1", "L", "LA", "La", *DEEP]
COLOUR_MODES = ["P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
NO_RANGE = ["I", "F"]
MODES = [*GREY_MODES, *COLOUR_MODES, *NO_RANGE]
READERS = {"grey": 1, "rgb": 3, "stored": None, "concept": None}


def image_of(mode: str) -> Image.Image:
    """The ramp, or the coloured one, in a mode; what is deeper than 8 bits has the 8-bit levels times 257."""
    if mode in DEEP:
        return Image.frombytes(mode, (SIDE, SIDE), (GREY.astype(DEEP[mode]) * 257).tobytes())
    if mode == "I":
        return Image.fromarray(GREY.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(GREY.astype(np.float32) / 255)
    if mode in GREY_MODES:
        whole = Image.fromarray(GREY)
        return whole.convert("LA").convert(mode) if mode == "La" else whole.convert(mode)
    whole = Image.fromarray(COLOUR)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(whole, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    if mode in ("PA", "RGBa"):
        return whole.convert({"PA": "P", "RGBa": "RGBA"}[mode]).convert(mode)
    return whole.convert(mode)


def truth(mode: str) -> Image.Image:
    """What a reader must see in ``image_of(mode)``."""
    if mode in DEEP or mode in ("I", "F"):
        return Image.fromarray(GREY)
    made = image_of(mode)
    made = made.convert("LA") if mode == "La" else made
    return made.convert("L" if mode in GREY_MODES else "RGB")


def read(file: Path, reader: str) -> torch.Tensor:
    """uint8 (C, H, W) by a reader of the project."""
    if reader == "concept":
        image = load_concept_images(file.parent, SIDE, "a caption").images[0]
        return (255 * image).round().to(torch.uint8)
    ((_, [image]),) = FolderImages(file.parent).batches(range(1), 1, READERS[reader])
    return image


def as_tensor(image: Image.Image, reader: str) -> torch.Tensor:
    mode = {"grey": "L", "rgb": "RGB", "concept": "RGB", "stored": image.mode}[reader]
    return torch.from_numpy(np.array(image.convert(mode))).reshape(SIDE, SIDE, -1).permute(2, 0, 1)


def save(image: Image.Image, file: Path, **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.save(file, **options)


def test_the_sweep_has_every_mode_of_pillow():
    assert set(MODES) >= set(Image.MODES)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_scaled_to_its_range_or_refused_by_name(mode):
    if mode in NO_RANGE:
        with pytest.raises(ValueError, match=f"mode {mode}, is not known"):
            to_eight_bits(image_of(mode))
        return
    seen = to_eight_bits(image_of(mode))
    assert seen.mode == ("L" if mode in GREY_MODES else "RGB")
    assert np.array_equal(np.array(seen), np.array(truth(mode)))


def plain(opened: Image.Image) -> Image.Image:
    """What Pillow itself makes of an opaque picture of 8 bits."""
    opened = opened.convert("LA") if opened.mode == "La" else opened
    return opened.convert("L" if opened.mode in GREY_MODES else "RGB")


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_file_format_by_every_reader(mode, tmp_path):
    """Every mode and format that Pillow can write and read again: 8 bits as ever, 16 scaled, others refused."""
    Image.init()
    kept = []
    for kind in sorted(set(Image.SAVE) & set(Image.OPEN) - {"EPS", "ICNS"}):
        # The content matters, not the ending; SPIDER has no signature, and registers whatever ending it writes.
        file = tmp_path / kind / ("picture.spi" if kind == "SPIDER" else "picture.tif")
        try:
            save(image_of(mode), file, format=kind)
            with Image.open(file) as opened:
                opened.load()
        except (OSError, ValueError, KeyError):
            continue  # this format does not take this mode
        if mode in (*DEEP, *NO_RANGE) and opened.mode[0] not in "IF":
            continue  # Pillow clipped it when it wrote
        kept.append(kind)
        refused = opened.mode == "F" or opened.mode == "I" and kind not in ("PPM", "PNG")
        wanted = Image.fromarray(GREY) if opened.mode.startswith("I") else None if refused else plain(opened)
        for reader in READERS:
            if refused:
                with pytest.raises(UserError, match=f"picture.* cannot be read .* mode {opened.mode}, is not known"):
                    read(file, reader)
            else:
                assert torch.equal(read(file, reader), as_tensor(wanted, reader)), (kind, reader)
    assert kept or mode in ("La", "I;16N")  # no format takes these; they are swept above, in memory


def png(file: Path, colour: int, bits: int, rows: np.ndarray, transparent: bytes = b"", palette: bytes = b"") -> Path:
    """A PNG with bits and colour types that Pillow does not write; ``rows``: bytes (H, ...) as they lie in the file."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    data = [row.tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", len(data[0]) * 8 // (bits * channels), len(data), bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", palette), (b"tRNS", transparent)]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in data))), (b"IEND", b"")]
    file.parent.mkdir(parents=True, exist_ok=True)
    body = b"".join(chunk(name, content) for name, content in parts if content or name == b"IEND")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return file


def tiff(file: Path, pixels: bytes, size: tuple[int, int], **tags: int) -> Path:
    """An uncompressed little-endian TIFF of one grey channel."""
    width, height = size
    numbers = {256: width, 257: height, 258: tags.get("bits", 16), 259: 1, 262: tags.get("photometric", 1), 273: 8,
               277: 1, 278: height, 279: len(pixels), 339: tags.get("sample_format", 1)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(numbers.items()))
    file.parent.mkdir(parents=True, exist_ok=True)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    file.write_bytes(start + pixels + struct.pack("<H", len(numbers)) + entries + bytes(4))
    return file


VALUES = np.array([[0, 1, 128, 129, 257, 32896, 65406, 65535]] * SIDE)  # of 16 bits
LEVELS = np.array([[0, 0, 0, 1, 1, 128, 254, 255]] * SIDE)  # VALUES / 257, rounded


@pytest.mark.parametrize("reader", READERS)
def test_sixteen_bits_of_every_kind(reader, tmp_path):
    grey = torch.from_numpy(LEVELS.astype(np.uint8))
    channels = 1 if reader in ("grey", "stored") else 3
    ways = {
        "png": png(tmp_path / "png" / "a.png", 0, 16, VALUES.astype(">u2")),
        "tif": tiff(tmp_path / "tif" / "a.tif", VALUES.astype("<u2").tobytes(), (SIDE, SIDE)),
    }
    inverted = (65535 - VALUES).astype("<u2").tobytes()
    ways["white is 0"] = tiff(tmp_path / "white" / "a.tif", inverted, (SIDE, SIDE), photometric=0)
    (tmp_path / "pgm").mkdir()
    ways["pgm"] = tmp_path / "pgm" / "a.pgm"
    ways["pgm"].write_bytes(b"P5 8 8 65535\n" + VALUES.astype(">u2").tobytes())
    for way, file in ways.items():
        assert torch.equal(read(file, reader), grey.expand(channels, -1, -1)), way
    # Of colour Pillow keeps the high byte only: at most one level below.
    opaque = np.full_like(VALUES, 65535)
    for colour, stack in ((2, [VALUES] * 3), (6, [VALUES] * 3 + [opaque]), (4, [VALUES, opaque])):
        file = png(tmp_path / f"colour {colour}" / "a.png", colour, 16, np.stack(stack, -1).astype(">u2"))
        pixels = read(file, reader)
        assert pixels.shape == (1 if reader == "grey" or (reader, colour) == ("stored", 4) else 3, SIDE, SIDE)
        assert (grey.int() - pixels.int()).abs().max() <= 1 and pixels.min() == 0 and pixels.max() == 255


@pytest.mark.parametrize("reader", READERS)
def test_other_depths_are_scaled_and_signed_ones_refused(reader, tmp_path):
    channels = 1 if reader in ("grey", "stored") else 3
    # TIFF packs two pixels of 12 bits into three bytes.
    twelve = np.linspace(0, 4095, SIDE * SIDE).round().astype(int)
    pairs = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in twelve.reshape(-1, 2)]
    file = tiff(tmp_path / "12" / "a.tif", bytes(np.array(pairs, np.uint8)), (SIDE, SIDE), bits=12)
    wanted = torch.from_numpy((twelve * 255 / 4095).round().astype(np.uint8)).reshape(SIDE, SIDE)
    assert torch.equal(read(file, reader), wanted.expand(channels, -1, -1))
    thousand = np.linspace(0, 1000, SIDE * SIDE).round().astype(int).reshape(SIDE, SIDE)
    (tmp_path / "pgm").mkdir()
    (tmp_path / "pgm" / "a.pgm").write_bytes(b"P5 8 8 1000\n" + thousand.astype(">u2").tobytes())
    wanted = torch.from_numpy((thousand * 255 / 1000).round().astype(np.uint8))
    assert torch.equal(read(tmp_path / "pgm" / "a.pgm", reader), wanted.expand(channels, -1, -1))
    for bits in (8, 16):
        file, pixels = tmp_path / f"signed {bits}" / "a.tif", bytes(SIDE * SIDE * bits // 8)
        tiff(file, pixels, (SIDE, SIDE), bits=bits, sample_format=2)
        with pytest.raises(UserError, match=r"a\.tif .*the range of its signed pixels"):
            read(file, reader)


def half_hidden(mode: str, file: Path) -> Path:
    """Left half opaque at level 51, right half transparent above black (or a colour)."""
    whole, alpha = np.full((SIDE, SIDE), 51, np.uint8), np.full((SIDE, SIDE), 255, np.uint8)
    whole[:, 4:], alpha[:, 4:] = 0, 0
    kind, _, depth = mode.partition(" ")
    if depth == "16":
        stack = [whole.astype(int) * 257] * (1 if kind == "LA" else 3) + [alpha.astype(int) * 257]
        return png(file, 4 if kind == "LA" else 6, 16, np.stack(stack, -1).astype(">u2"))
    if depth == "tRNS":
        deep = np.where(alpha > 0, 51 * 257, 0x1234)
        if kind == "RGB;16":
            return png(file, 2, 16, np.stack([deep] * 3, -1).astype(">u2"), struct.pack(">3H", *[0x1234] * 3))
        if kind == "I;16":
            return png(file, 0, 16, deep.astype(">u2"), struct.pack(">H", 0x1234))
        if kind == "P":
            return png(file, 3, 8, (alpha == 0).astype(np.uint8), b"\xff\x00", bytes([51] * 3 + [0, 200, 9]))
        if kind == "RGB":
            return png(file, 2, 8, np.stack([whole] * 3, -1), struct.pack(">3H", 0, 0, 0))
        if kind == "L":
            return png(file, 0, 8, whole, struct.pack(">H", 0))
        bits = int(kind[2:])  # the highest level of few bits is transparent, the lowest is not
        levels = np.where(alpha > 0, 0, 2**bits - 1).reshape(SIDE, -1, 8 // bits)
        packed = sum(levels[..., place] << (8 - bits * (place + 1)) for place in range(8 // bits))
        return png(file, 0, bits, packed.astype(np.uint8), struct.pack(">H", 2**bits - 1))
    grey = Image.merge("LA", [Image.fromarray(whole), Image.fromarray(alpha)])
    image = grey if kind == "LA" else grey.convert("RGBA")
    image = image.convert("RGB").convert("P").convert("PA") if kind == "PA" else image
    if kind == "PA":
        image.putalpha(Image.fromarray(alpha))
    save(image, file)
    return file


HIDDEN = ["LA.png", "RGBA.png", "RGBA.webp", "RGBA.gif", "RGBA.tif", "PA.tif", "LA.tif", "LA 16.png", "RGBA 16.png",
          *(f"{kind} tRNS.png" for kind in ("P", "RGB", "L", "I;16", "RGB;16", "L;1", "L;2", "L;4"))]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HIDDEN)
def test_the_colour_under_transparent_pixels_is_not_read(name, reader, tmp_path):
    file = half_hidden(Path(name).stem, tmp_path / name)
    pixels = read(file, reader)
    left = 0 if name.startswith("L;") else 51
    near = 6 if name.endswith(".webp") else 0  # WebP is lossy, but for its alpha
    assert (pixels[:, :, :3].int() - left).abs().max() <= near
    assert pixels[:, :, 4:].min() == 255
    if reader == "stored":
        assert len(pixels) == (1 if name[0] == "L" or name.startswith("I;") else 3)


def test_half_transparent_is_half_white(tmp_path):
    Image.new("LA", (2, 2), (0, 127)).save(tmp_path / "half.png")
    assert read_picture(tmp_path / "half.png").unique().tolist() == [128]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_their_exif_says(kind, reader, tmp_path):
    """EXIF 2.32: value 6 means that the stored first row is the right-hand side of the picture, and so on."""
    seen = np.zeros((16, 16), np.uint8)
    seen[:8, :8], seen[:8, 8:] = 255, 100  # upper left white, upper right grey, below black
    stored = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.T, 6: np.rot90(seen, 1),
              7: seen[::-1, ::-1].T, 8: np.rot90(seen, -1)}
    for value, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = value
        image = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
        save(image, tmp_path / str(value) / f"a.{kind.lower()}", exif=exif, quality=100)
        if reader == "concept":
            got = 255 * load_concept_images(tmp_path / str(value), 16, "c").images[0]
        else:
            got = read(tmp_path / str(value) / f"a.{kind.lower()}", reader)
        assert (got.float().mean(0) - torch.from_numpy(seen).float()).abs().max() < 12, value


def test_a_damaged_exif_block_leaves_the_picture_as_it_is(tmp_path):
    for number, block in enumerate((b"", b"Exif\0\0", b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\xff\xff\xff\xff",
                                    b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0")):
        file = tmp_path / f"{number}.jpg"
        save(Image.new("RGB", (8, 8), "white"), file)
        data = file.read_bytes()
        file.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read_picture(file).min() == 255


def test_digits_of_8_and_of_16_bits_are_the_same_set(tmp_path):
    for number, image in enumerate(to_uint8(load_digits()[0][:20, 0]).numpy()):
        save(Image.fromarray(image), tmp_path / "8" / f"{number:03}.png")
        save(Image.fromarray(image.astype(np.uint16) * 257), tmp_path / "16" / f"{number:03}.png")
    eight, sixteen = (FolderImages(tmp_path / name).batches(range(20), 20, 1) for name in ("8", "16"))
    assert torch.equal(torch.stack(next(eight)[1]), torch.stack(next(sixteen)[1]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "TGA", "PPM", "JPEG2000", "ICO"])
def test_damaged_files_are_refused_by_name_or_read(kind, tmp_path):
    """Whatever a decoder raises, it ends in one sentence."""
    file = tmp_path / "a.png"
    save(Image.fromarray(np.tile(COLOUR, (4, 4, 1))), file, format=kind)
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for trial in range(40):
        damaged = bytearray(whole)
        if trial % 2:
            damaged = damaged[: random.integers(0, len(whole))]
        else:
            for place in random.integers(0, min(len(whole), 200), 4):
                damaged[place] = random.integers(0, 256)
        file.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                open_picture(file)
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 5


def test_what_is_wrong_with_a_file_is_said(tmp_path, monkeypatch):
    for content, reason in ((b"", "the file is empty"), (b"<html>not found</html>", "cannot identify image file"),
                            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull")):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UserError, match=reason):
            read_picture(tmp_path / "a.png")
    save(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="decompression bomb"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="No such file"):
        read_picture(tmp_path / "absent.png")


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 9).save(file, format="PNG")


@pytest.mark.parametrize("name", [
    ".ipynb_checkpoints/a.png", "cats/.ipynb_checkpoints/a.png", ".git/a.png", "__MACOSX/cats/._a.png", "@eaDir/a.png",
    "cats/@eaDir/a.jpg/thumb.jpg", "$RECYCLE.BIN/a.png", ".hidden.png", "cats/._0000.png", "thumbs.db",
    "cats/Thumbs.db",
])
def test_hidden_names_and_what_systems_leave_behind_do_not_count(name, tmp_path):
    root = tmp_path / ".cache" / "images"  # of the folder itself any name is right
    touch(root / "cats" / "a.png", root / "b.png")
    touch(root / name)
    found = find_pictures(root)
    assert found.pictures == [root / "b.png", root / "cats" / "a.png"] and not found.others
    folder = next((part for part in Path(name).parts[:-1] if part != "cats"), None)
    kind = f"folder {folder}" if folder else "hidden file" if name.endswith("png") else None
    assert found.left_out == ({kind: 1} if kind else {})
    if "/" not in name:
        touch(root / "c" / "b.png", root / "c" / name)
        assert len(load_concept_images(root / "c", 4, "a caption").images) == 1


def test_pictures_are_known_by_content(tmp_path):
    ramp = Image.fromarray(np.tile(COLOUR, (2, 2, 1)))  # an .ico has at least 16 x 16 pixels
    for name, kind in {"a.tif": "TIFF", "b.GIF": "GIF", "c.qoi": "BMP", "d": "PNG", "e.bin": "JPEG", "f.txt": "WEBP",
                       "g.jp2": "JPEG2000", "h.tga": "TGA", "i.ppm": "PPM", "j.ico": "ICO", "k.jfif": "JPEG"}.items():
        save(ramp, tmp_path / name, format=kind)
    texts = {"a.json": "{}", "b.txt": "P3 robot on a table", "c.txt": "BMW is a car", "d.csv": "GIF89a", "e.npz": "PK",
             "g.xpm.txt": "/* XPM */", "h.h5": "\x89HDF\r\n\x1a\n", "i.md": ""}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    for name in ("a.heic", "b.HEIC", "c.svg", "d.dng", "e.tga"):
        (tmp_path / name).write_bytes(b"no picture for Pillow")
    found = find_pictures(tmp_path)
    assert [path.name for path in found.pictures] == ["a.tif", "b.GIF", "c.qoi", "d", "e.bin", "f.txt", "g.jp2",
                                                      "h.tga", "i.ppm", "j.ico", "k.jfif"]
    assert all(read_picture(path, 3).shape[0] == 3 for path in found.pictures)
    assert found.left_out == {".heic": 2, ".svg": 1, ".dng": 1, ".tga": 1}
    assert found.summary() == "1 x .dng, 2 x .heic, 1 x .svg, 1 x .tga"
    assert {path.name for path in found.others} == {*texts, "a.heic", "b.HEIC", "c.svg", "d.dng", "e.tga"}
    # A camera's raw file begins like a TIFF, of its preview.
    save(ramp, tmp_path / "raw.dng", format="TIFF")
    assert not is_picture(tmp_path / "raw.dng")


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    touch(root / "z" / "a.png", elsewhere / "cats" / "b.png", elsewhere / "dogs" / "deep" / "c.png", tmp_path / "d.png")
    for name, target in {"cats": elsewhere / "cats", "dogs": elsewhere / "dogs", "a": root / "z", "self": root,
                         "parent": tmp_path, "b": elsewhere / "cats", "me": root / "me"}.items():
        (root / name).symlink_to(target, target_is_directory=True)
    (elsewhere / "dogs" / "back").symlink_to(root, target_is_directory=True)
    (root / "z" / "file.png").symlink_to(elsewhere / "cats" / "b.png")
    (root / "z" / "gone.png").symlink_to(tmp_path / "gone.png")
    found = find_pictures(root)
    names = [path.relative_to(root).as_posix() for path in found.pictures]
    assert names == ["b/b.png", "dogs/deep/c.png", "z/a.png", "z/file.png"]
    assert found.left_out == {"link to a folder already read": 5, "broken link": 1}
    assert find_pictures(tmp_path / "set", recursive=False).pictures == []


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "a.png", tmp_path / "closed" / "b.png")
    scandir = os.scandir

    def closed(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match="the folder .*closed cannot be read: Permission denied"):
        find_pictures(tmp_path)


def test_a_sample_is_seeded_and_spread_over_the_folder(tmp_path):
    touch(*(tmp_path / f"class {label}" / f"{number}.png" for label in range(4) for number in range(25)))
    whole = FolderImages(tmp_path)
    sample = whole.sample(20, seed=3)
    assert sample.sampled == "20 of 100, drawn with seed 3" and len(set(sample.paths)) == len(sample) == 20
    assert sample.paths == whole.sample(20, seed=3).paths != whole.sample(20, seed=4).paths
    assert len(whole) == 100 and whole.sampled is None
    assert sample.paths == sorted(sample.paths) and len({path.parent for path in sample.paths}) == 4
    with pytest.raises(UserError, match="101 images were asked for, but .* holds 100"):
        whole.sample(101)
