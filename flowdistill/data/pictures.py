"""Image files: which files of a folder are pictures, and their pixels as eight-bit grey or RGB.

Everything that opens an image file goes through here, so that one file means the same picture to the FID, to training
and to a concept.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import is_clutter, local_path

# Formats that the first bytes of a file give away: a file with one of their endings is taken for a picture without a
# look into it, and a file with any other ending is one if it starts like one of these.
_BY_CONTENT = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "GIF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "PSD", "QOI",
               "DDS")
# Formats that Pillow knows by name but does not decode, or only with another program.
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
# Endings of pictures that Pillow alone does not read, or of which it would read a preview (the raw formats of cameras
# are TIFF files whose first image is a thumbnail). They are not opened, and counted.
_NOT_READ = frozenset(
    ".ai .arw .bpg .cr2 .cr3 .dng .emf .eps .exr .hdr .heic .heif .hif .jxl .jxr .kra .nef .orf .pef .psb .raf .raw "
    ".rw2 .srw .svg .svgz .wmf .xcf".split()
)
_LFS_POINTER = b"version https://git-lfs"

ENDINGS = frozenset(".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm .avif .jp2 .qoi".split())
"""Endings of the pictures in an archive, whose members are not looked into to find out."""
_MODES = {1: "L", 3: "RGB"}
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_GREY = ("1", "L", "LA", "La")
# EXIF 2.32, tag 0x0112: how the stored rows and columns lie in the picture as it is meant to be seen.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# PNG's transparent colour (tRNS) is given in the bits of the file, and Pillow's pixels are scaled to 8: the scale, by
# raw mode.
_TRANSPARENT_SCALE = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}


@dataclass(frozen=True)
class FoundPictures:
    """The files of a folder, each list in the order of their relative paths.

    ``pictures``: what is read. ``others``: files that are no pictures, or none that can be read, without clutter.
    ``left_out``: what looks like pictures and is not read, by kind (``".heic"``, ``"hidden file"``, ``"folder
    @eaDir"``, ``"broken link"``, ``"link to a folder already read"``).
    """

    pictures: list[Path]
    others: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str | None:
        """What was left out, in words for a protocol; None when that is nothing."""
        kinds = [f"{count} x {kind}" for kind, count in sorted(self.left_out.items())]
        shown = kinds[:8] + ([f"{len(kinds) - 8} kinds more"] if len(kinds) > 8 else [])
        return ", ".join(shown) or None


def find_pictures(folder: str | os.PathLike[str], recursive: bool = True) -> FoundPictures:
    """The pictures in a folder, by content: what Pillow can decode, whatever its name ends in.

    Hidden names and what systems leave behind (``is_clutter``) are left out at every depth, with all that is below
    them; the folder itself may have any name. Symbolic links to folders are followed. Each folder is read once, at its
    own place if that is below ``folder``, however many links lead to it, so links in a circle come to an end.

    A file whose ending says picture counts as one even if it is damaged: reading it says so.

    Raises:
        UserError: ``folder`` or one below it is no folder or cannot be read.
    """
    root = local_path(folder)
    if not root.is_dir():
        raise UserError(f"the image folder {root} does not exist")
    found: dict[bool, list[Path]] = {True: [], False: []}
    left_out: Counter[str] = Counter()
    above = {_identity(parent) for parent in root.resolve().parents}
    read: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        # Links last: a folder that is also below the root keeps its own path.
        place = folders.pop() if folders else links.pop(links.index(min(links)))
        identity = _identity(place)
        if identity in read or identity in above:
            left_out["link to a folder already read"] += 1
            continue
        read.add(identity)
        for entry in _entries(place):
            path = Path(entry.path)
            kind = _kind_of(entry)
            if is_clutter(entry.name):
                if kind == "folder" and recursive:
                    left_out[f"folder {entry.name}"] += 1
                elif kind == "file" and named_like_a_picture(path):
                    left_out["hidden file"] += 1
            elif kind == "folder":
                if recursive:
                    (links if entry.is_symlink() else folders).append(path)
            elif kind == "file":
                is_one = is_picture(path)
                found[is_one].append(path)
                if not is_one and named_like_a_picture(path):
                    left_out[path.suffix.lower()] += 1
            elif entry.is_symlink() and named_like_a_picture(path):
                found[False].append(path)
                left_out["broken link"] += 1
    for paths in found.values():
        paths.sort(key=lambda path: path.relative_to(root).as_posix())
    return FoundPictures(found[True], found[False], left_out)


def check_without_pictures(folder: str | os.PathLike[str], name: str) -> None:
    """Refuse a folder to write pictures to that has some already, in it or below: whoever reads it would take all for
    one set.

    Args:
        name: words for it, such as the option that names it.

    Raises:
        UserError: so.
    """
    root = local_path(folder)
    for place, below, files in os.walk(root):
        below[:] = [each for each in below if not is_clutter(each)]
        for file in files:
            if Path(file).suffix.lower() in ENDINGS and not is_clutter(file):
                raise UserError(f"{name} {root} has pictures already, such as {Path(place, file).relative_to(root)}, "
                                "and new ones would be mixed with them; choose another folder, or remove it")


def is_picture(path: Path) -> bool:
    """Whether a file is a picture: by its ending where that is one of a common format, else by its first bytes."""
    owner = _format_named(path)
    if owner in _BY_CONTENT:
        return True
    if owner is None and path.suffix.lower() in _NOT_READ:
        return False
    formats = [kind for kind in (*_BY_CONTENT, owner) if kind in Image.OPEN]
    try:
        with Image.open(path, formats=formats):
            return True
    except Exception:  # what Pillow's parsers raise on bytes that only begin like theirs is not a fixed set
        return False


def read_picture(path: str | os.PathLike[str], channels: int | None = None) -> Tensor:
    """The pixels of an image file, uint8 (C, H, W) in [0, 255]; see :func:`open_picture`.

    Args:
        channels: 1 for grey, 3 for RGB; any other number, and None, for whichever of the two it is stored in.

    Raises:
        UserError: see :func:`open_picture`.
    """
    return to_tensor(open_picture(path), channels)


def to_tensor(picture: Image.Image, channels: int | None = None) -> Tensor:
    """The pixels of a picture that is grey or RGB; see :func:`read_picture`."""
    return pil_to_tensor(picture.convert(_MODES.get(channels or 0, picture.mode)))


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """An image file as it is meant to be seen: mode "L" if it is stored in grey, else "RGB".

    Turned as its EXIF says, what is transparent put on white, other ranges scaled to 8 bits (:func:`to_eight_bits`); of
    several frames the first. Colours are Pillow's: profiles (ICC) are not applied.

    Raises:
        UserError: the file is missing, damaged or no picture, or its range of values is not known.
    """
    path = local_path(path)
    try:
        return _decoded(path)
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise UserError(f"{path} cannot be read as a picture ({_reason(path, error)}); replace or remove it") from error


def decode_picture(content: bytes, name: str) -> Image.Image:
    """The same for what an image file has in it.

    Args:
        name: words for the place it stands in, for errors.

    Raises:
        UserError: see :func:`open_picture`.
    """
    try:
        return _decoded(io.BytesIO(content))
    except Exception as error:
        # What Pillow calls the file is the address of an object.
        reason = "it is empty" if not content else "it is no picture" if isinstance(
            error, UnidentifiedImageError) else " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} cannot be read as a picture ({reason}); replace or remove it") from error


def fitted(picture: Image.Image, size: tuple[int, int], channels: int) -> Tensor:
    """A picture at another size: the largest part of these proportions around its middle, resized with Lanczos' filter
    and antialiasing; one of the same size stays as it is.

    Args:
        size: (height, width) in pixels.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 (C, H, W).
    """
    picture = picture.convert(_MODES[channels])
    if picture.size != (size[1], size[0]):
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    return pil_to_tensor(picture)


def _decoded(file: Path | io.BytesIO) -> Image.Image:
    with Image.open(file) as image:
        stored = image.tile[0][3] if image.format == "PNG" and image.tile else None
        image.load()
        picture = to_eight_bits(image, stored if isinstance(stored, str) else "")
        turn = _UPRIGHT.get(_orientation(image))
    return picture if turn is None else picture.transpose(turn)


def to_eight_bits(image: Image.Image, stored: str = "") -> Image.Image:
    """An image of any of Pillow's modes in mode "L" (grey) or "RGB", its range scaled to [0, 255], on white.

    8 bits stay as they are. Grey of 16 bits (12 in TIFF) is scaled and rounded to the nearest level, where Pillow's own
    conversion clips; colour of 16 bits has become 8 when Pillow opens it, by the high byte, which is at most one level
    lower. Transparent pixels become white in proportion to their transparency.

    Args:
        stored: the pixels' format in the file (Pillow's raw mode), where it is known.

    Raises:
        ValueError: values without a known range: 32-bit integers, signed integers, floating point.
    """
    tags = getattr(image, "tag_v2", {})
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2 or image.format == "FITS" and image.mode != "L"
    # PNG of 16 bits in older versions of Pillow, and PGM with a range beyond 255, which Pillow has scaled to 16 bits.
    sixteen = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode == "F" or signed or image.mode == "I" and not sixteen:
        kind = "floating-point" if image.mode == "F" else "signed" if signed else "32-bit"
        raise ValueError(f"the range of its {kind} pixels, mode {image.mode}, is not known: save it with 8 or 16 "
                         "unsigned bits")
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        top = 2 ** tags[_BITS][0] - 1 if _BITS in tags else 65535
        levels = (values * 255 + top // 2) // top
        # Pillow turns "min is white" around for all depths but this one.
        levels = 255 - levels if tags.get(_PHOTOMETRIC) == 0 else levels
        if transparent is not None:
            levels[values == transparent] = 255
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode not in _EIGHT_BITS:
        raise ValueError(f"mode {image.mode} is not supported; save it as 8-bit grey or RGB")
    grey = image.mode in _GREY or stored == "LA;16B"
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        if stored in _TRANSPARENT_SCALE and transparent is not None:
            image = image.copy()
            scaled = np.floor(np.multiply(transparent, _TRANSPARENT_SCALE[stored])).astype(int)
            image.info["transparency"] = tuple(scaled.tolist()) if scaled.ndim else int(scaled)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF 6.0


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of a loaded image, 1 to 8; 1, upright, where there is none or its block is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels are whole: a damaged block of descriptions does not make the picture unreadable
        return 1


def _reason(path: Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as missing:
        return str(missing.strerror)
    if not start:
        return "the file is empty"
    if start == _LFS_POINTER:
        return "it is a pointer of git-lfs: run 'git lfs pull'"
    return " ".join(str(error).split()) or type(error).__name__


def _format_named(path: Path) -> str | None:
    """The format that a file's ending stands for; None unless it is one that Pillow decodes."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind if kind in Image.OPEN and kind not in _NOT_DECODED else None


def named_like_a_picture(path: Path) -> bool:
    """Whether a file's ending is one of a picture, be it one that is read or not."""
    return path.suffix.lower() in _NOT_READ or _format_named(path) is not None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error


def _kind_of(entry: os.DirEntry[str]) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link to itself
        return "other"


def _identity(folder: Path) -> tuple[int, int]:
    try:
        stat = folder.stat()
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error
    return stat.st_dev, stat.st_ino
