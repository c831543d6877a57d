"""Text files as the project reads them all: UTF-8 with or without a byte-order mark, whatever ends their lines.

A line ends in LF, CR LF or CR and in nothing else: other characters that Python's ``splitlines`` and YAML 1.1 take for
line breaks (U+0085, U+2028, U+2029, form feed, ...) occur inside prompts, and JSON allows them inside its strings.
"""

from __future__ import annotations

import atexit
import codecs
import csv
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.files import check_replaceable, check_writable, local_path

T = TypeVar("T")
JsonObject = dict[str, Any]
"""An object of a JSON file or a mapping of a YAML one, whose values whoever reads it knows or checks."""

MARK = "\ufeff"
# The mark of UTF-32 begins with that of UTF-16.
_FOREIGN_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)
_BREAKS_OF_YAML = "\x85\u2028\u2029"  # line breaks in YAML 1.1, ordinary characters in YAML 1.2


def read_text(path: str | os.PathLike[str], name: str | None = None, strict: bool = True) -> str:
    r"""Read a text file; every line ends in ``\n``, and byte-order marks are gone from the beginnings of lines.

    Args:
        path: the file.
        name: words for the file in errors, such as "the prompts file a.txt"; default: its path.
        strict: refuse what is no UTF-8; False, for files that a crash may have cut short, puts U+FFFD in its place.

    Raises:
        UserError: the file is missing or cannot be read, or it is not text in UTF-8 (names what it seems to be).
    """
    path = local_path(path)
    name = name or str(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name} does not exist") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    text = _decoded(content, name) if strict else content.decode(errors="replace")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Files with a mark that were joined have one in the middle, too.
    return text.removeprefix(MARK).replace(f"\n{MARK}", "\n")


def read_lines(path: str | os.PathLike[str], name: str | None = None, strict: bool = True) -> list[str]:
    """Read the lines of a text file, without their ends; see :func:`read_text`."""
    lines = read_text(path, name, strict).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def iter_lines(path: str | os.PathLike[str], name: str | None = None) -> Iterator[str]:
    """The lines that :func:`read_lines` reads, one at a time: of a file of any length a block is in memory.

    Raises:
        UserError: as :func:`read_text`, when the damaged place is reached or before.
    """
    path = local_path(path)
    try:
        with open(path, encoding="utf-8") as file:  # LF, CR LF and CR all end a line, which then ends in LF
            for line in file:
                if "\0" in line:
                    raise ValueError("a zero byte")
                yield line.removesuffix("\n").removeprefix(MARK)
    except (OSError, ValueError) as error:
        read_text(path, name)  # says what is the matter
        raise UserError(f"{name or path} cannot be read: {error}") from error


def read_json(path: str | os.PathLike[str], name: str | None = None) -> Any:
    """Read the value of a JSON file.

    Raises:
        UserError: as :func:`read_text`; the text is not JSON (says where).
    """
    text = read_text(path, name)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(f"{name or local_path(path)} is not valid JSON: {reason}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets in brackets
        raise UserError(f"{name or local_path(path)} is not valid JSON: {error}") from error


def read_json_object(path: str | os.PathLike[str], name: str | None = None) -> JsonObject:
    """Read a JSON file that holds an object.

    Raises:
        UserError: as :func:`read_json`; its value is something else.
    """
    value = read_json(path, name)
    if not isinstance(value, dict):
        raise UserError(f"{name or local_path(path)} must hold a JSON object, not {shown(value)}")
    return value


def check_json_place(path: str | os.PathLike[str], keys: Collection[str], what: str) -> None:
    """Refuse a file to write JSON to that could not be written, or that is there and is no object with these keys.

    Args:
        what: words for such a file.

    Raises:
        UserError: so.
    """
    def is_own(file: Path) -> bool:
        with open(file, "rb") as content:  # others may be very large
            if content.read(1) != b"{":
                return False
        try:
            return set(keys) <= read_json_object(file).keys()
        except UserError:
            return False

    check_replaceable(path, is_own, what)


def check_made_place(file: str | os.PathLike[str], script: str) -> None:
    """Refuse a folder to make anew that could not be written, or that holds something else than ``script`` has made.

    Args:
        file: of the folder, with the ``command`` that has made it.
        script: the name of its file.

    Raises:
        UserError: so.
    """
    check_writable(file)
    record = local_path(file)
    if not record.parent.is_dir() or not any(record.parent.iterdir()):
        return
    try:
        own = record.is_file() and script in str(read_json_object(record).get("command"))
    except UserError:
        own = False
    if not own:
        raise UserError(f"{record.parent} is not empty and was not made by {script} ({record.name} there does not say "
                        "so), so it is left as it is; choose another folder, or remove it")


def read_json_lines(
    path: str | os.PathLike[str], record: Callable[[Any], T], form: str, name: str | None = None
) -> list[tuple[int, T]]:
    """All that :func:`iter_json_lines` reads."""
    return list(iter_json_lines(path, record, form, name))


def iter_json_lines(
    path: str | os.PathLike[str], record: Callable[[Any], T], form: str, name: str | None = None
) -> Iterator[tuple[int, T]]:
    """Read a file with one JSON value a line (JSON Lines), a line at a time; empty lines are left out.

    Args:
        path, name: see :func:`read_text`.
        record: makes what is wanted of a value, or raises ValueError, KeyError, TypeError or AttributeError.
        form: what a line must be like, for errors.

    Yields:
        Number of the line, from 1, and what ``record`` made of it.

    Raises:
        UserError: as :func:`read_text`; a line that is not JSON or that ``record`` refuses.
    """
    for number, line in enumerate(iter_lines(path, name), 1):
        if not line.strip():
            continue
        try:
            made = record(json.loads(line))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"line {number} of {local_path(path)} must be like {form}, not "
                            f"{shown(line.strip(), quoted=False)}") from None
        yield number, made


def iter_csv_rows(path: str | os.PathLike[str], name: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """Read the rows of a file of comma-separated values, one at a time; empty lines are left out.

    Yields:
        Number of the line that a row ends in, from 1, and its values.

    Raises:
        UserError: as :func:`read_text`; a quote that is not closed, or text behind a closed one.
    """
    rows = csv.reader((line + "\n" for line in iter_lines(path, name)), strict=True)
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f"line {rows.line_num} of {name or local_path(path)} is no CSV: {error}") from error


def text_of(value: object) -> str:
    r"""``value`` where it is a text that can be written in UTF-8; else ValueError.

    JSON's ``"\ud83d"`` is half of a character, on which tokenizers fail.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    value.encode()  # UnicodeEncodeError is a ValueError
    return value


def read_yaml(path: str | os.PathLike[str], name: str | None = None) -> Any:
    """Read the value of a YAML file, of which every JSON file is one; see :func:`parse_yaml`.

    Raises:
        UserError: as :func:`read_text`; the text is not YAML (says where).
    """
    return parse_yaml(read_text(path, name), name or str(local_path(path)))


def parse_yaml(text: str, name: str, as_written: bool = False) -> Any:
    """The value of a YAML document; the keys of its mappings are texts as they are written.

    Numbers are those of YAML 1.2, and dates and times are texts: ``010`` is the text 010 and no 8, ``12:30:00`` no
    45,000. The words yes, no, on and off stay truth values, as in YAML 1.1. U+0085, U+2028 and U+2029 break no line.

    Args:
        text: the document.
        name: words for it in errors.
        as_written: leave every value a text as it is written, but for null.

    Raises:
        UserError: the text is not YAML (says where), or a key stands in a mapping twice.
    """
    import yaml

    pairs = zip(_BREAKS_OF_YAML, _unused(text), strict=True)
    breaks = {ord(mark): stand_in for mark, stand_in in pairs if mark in text}
    loader = _yaml_loaders()[as_written](text.translate(breaks))
    loader.breaks = str.maketrans({stand_in: chr(mark) for mark, stand_in in breaks.items()})
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {_yaml_problem(error)}") from error
    except (ValueError, RecursionError) as error:  # 1_, an integer of thousands of digits, brackets in brackets
        raise UserError(f"{name} is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def dump_yaml(value: object, compact: bool = False) -> str:
    """Mappings, lists, texts, numbers, truth values and null as YAML that :func:`parse_yaml` and readers of YAML 1.1
    take for the same: texts that either would take for something else are quoted.

    ``compact``: in one line, with lists and mappings in brackets.
    """
    import yaml

    resolvers = _yaml_loaders()[False].yaml_implicit_resolvers

    class Dumper(yaml.SafeDumper):
        pass

    def quoted(dumper: yaml.SafeDumper, text: str) -> object:
        style = None
        if any(mark in text for mark in _BREAKS_OF_YAML):
            style = '"'  # the style that has escapes for them
        elif any(pattern.match(text) for _, pattern in resolvers.get(text[:1], ())):
            style = "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, quoted)
    width = float("inf") if compact else None
    written: str = yaml.dump(value, Dumper=Dumper, allow_unicode=True, sort_keys=False, default_flow_style=compact,
                             width=width)
    return written


def without_marks(folder: Path) -> Path:
    """``folder``, or, where JSON or text files in it begin with a byte-order mark, a stand-in that lasts as long as the
    process: links to the files, and those without their marks.

    For folders whose files other libraries read (diffusers, transformers), which refuse a mark.

    Raises:
        UserError: such a file is not text in UTF-8 (names what it seems to be).
    """
    marked = []
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".json", ".txt") and file.is_file():
            content = file.read_bytes()
            _decoded(content, str(file))
            if content.startswith(codecs.BOM_UTF8):
                marked.append(file)
    if not marked:
        return folder
    clean = Path(tempfile.mkdtemp(prefix="flowdistill-"))
    atexit.register(shutil.rmtree, clean, ignore_errors=True)
    target = clean / folder.resolve().name
    shutil.copytree(folder, target, copy_function=_link)
    for file in marked:
        copy = target / file.relative_to(folder)
        text = read_text(file)
        copy.unlink()
        copy.write_text(text, encoding="utf-8")
    return target


def _link(source: str, target: str) -> None:
    try:
        os.symlink(os.path.abspath(source), target)
    except OSError:  # a system or a user without the right to links
        shutil.copy2(source, target)


def _decoded(content: bytes, name: str) -> str:
    for mark, encoding in _FOREIGN_MARKS:
        if content.startswith(mark):
            raise UserError(f"{name} is not text in UTF-8 but in {encoding}; save it as UTF-8")
    if b"\0" in content:
        raise UserError(f"{name} is not text in UTF-8: it has zero bytes, as UTF-16 without a byte-order mark and "
                        "binary files have; save it as UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", content[: error.start])) + 1
        raise UserError(f"{name} is not text in UTF-8: line {line} has the byte 0x{content[error.start]:02x}, as "
                        "Latin-1, Windows-1252 and other old encodings have; save it as UTF-8") from None


def _unused(text: str) -> list[str]:
    """Characters for private use that are not in ``text``, one for each of YAML's other line breaks."""
    free = (chr(code) for code in range(0x10F000, 0x10FFFE) if chr(code) not in text)
    return [next(free) for _ in _BREAKS_OF_YAML]


@functools.lru_cache(maxsize=1)
def _yaml_loaders() -> tuple[Any, Any]:
    """Loaders of typed values, and of values as they are written."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text_tag, merge_tag, prefix = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:"

    class Typed(base):
        breaks: dict[int, str] = {}

        def construct_scalar(self, node: object) -> object:
            value = super().construct_scalar(node)
            return value.translate(self.breaks) if self.breaks and isinstance(value, str) else value

        def flatten_mapping(self, node: Any) -> None:
            """Take in what ``<<`` names, where the mapping's own keys and the first of several count, and make all
            keys texts. Own: PyYAML's takes the last, and says nothing of a key that is there twice."""
            if getattr(node, "flat", False):
                return
            node.flat = True
            own: dict[object, object] = {}
            merged: list[Any] = []
            for key, value in node.value:
                if key.tag == merge_tag:
                    for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        if not isinstance(source, yaml.MappingNode):
                            raise yaml.constructor.ConstructorError(
                                None, None, "<< must name one or more mappings", source.start_mark)
                        self.flatten_mapping(source)
                        merged += source.value
                    continue
                if isinstance(key, yaml.ScalarNode):
                    key.tag = text_tag
                    if key.value in own:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"found duplicate key {key.value}", key.start_mark)
                own[key.value if isinstance(key, yaml.ScalarNode) else key] = key, value
            for key, value in merged:
                own.setdefault(key.value if isinstance(key, yaml.ScalarNode) else key, (key, value))
            node.value = list(own.values())

    class Written(Typed):
        pass

    def choose(loader: Any, patterns: dict[str, tuple[str, str]]) -> None:
        loader.yaml_implicit_resolvers = {}
        for name, (first, pattern) in patterns.items():
            loader.add_implicit_resolver(prefix + name, re.compile(f"(?:{pattern})\\Z"), ["", *first])

    null = {"null": ("~nN", "~|null|Null|NULL|"), "merge": ("<", "<<")}
    digits = "[0-9]+(?:_[0-9]+)*"
    choose(Written, null)
    choose(Typed, null | {
        "bool": ("yYnNtTfFoO", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"),
        "int": ("-+0123456789", "[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+(?:_[0-9a-fA-F]+)*|"
                                "0b[01]+(?:_[01]+)*)"),
        "float": ("-+0123456789.", rf"[-+]?(?:{digits}\.(?:{digits})?(?:[eE][-+]?[0-9]+)?|{digits}[eE][-+]?[0-9]+"
                                   rf"|\.{digits}(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"),
    })
    return Typed, Written


def _yaml_problem(error: object) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    reason = str(problem or getattr(error, "reason", None) or str(error).split("\n")[0])
    return f"line {mark.line + 1}, {reason}" if mark is not None else reason
