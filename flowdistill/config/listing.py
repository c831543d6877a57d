"""Every setting with its help text, its default and what it may be: as YAML to start from, as a table, by a word."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, get_origin

from flowdistill.config.checks import Limits, get_type_hints, in_words, sections_of, type_alternatives
from flowdistill.config.loading import method_config_class
from flowdistill.config.registry import usable_methods
from flowdistill.config.schema import MISSING, HostingConfig, RunConfig
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.text import dump_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WIDTH = 100
"""Columns of a comment's text, without what it is indented by."""
PUBLISHED = re.compile(r" ?\(((?:paper|authors|NVIDIA)[^():]*: [^()]*)\)")
"""A published value in a help text: who has it, a colon, the value."""
NAME = "the method"
"""Help text of a field ``name``, which methods' settings have without one."""


@dataclass
class NoSettings:
    """Stands for a method's settings where there is no method."""


class Setting(NamedTuple):
    """A setting, or a section of settings.

    Attributes:
        key: its dotted path, such as ``method.optimizer.lr``.
        help: what it is.
        default: MISSING where one has to be given.
        allowed: its type and range, in words; empty for what has no simple type.
        section: the dataclass of a section; None for a setting.
        inside: the help texts of the sections around it, without a full stop.
        active: whether the sections around it are there by default.
        former: the name it had, or an empty text.
    """

    key: str
    help: str
    default: Any
    allowed: str
    section: type | None
    inside: tuple[str, ...]
    active: bool
    former: str

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def depth(self) -> int:
        """Sections around it."""
        return self.key.count(".")

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return isinstance(self.default, str) and self.default == MISSING

    @property
    def value(self) -> str:
        """The default as YAML has it, in one line."""
        return as_yaml_value(self.default)


def method_settings(name: str, host: str | None = None) -> type:
    """The settings dataclass of a method, that of a method over another one with the host's own settings in ``host``.

    Args:
        name: as in ``method.name``.
        host: the other method; None: the usual one.

    Raises:
        UserError: no such method, a method that can be no host, or a host for a method that has none.
    """
    config = method_config_class(name, "METHOD")
    if issubclass(config, HostingConfig):
        return config.hosted(host or config.usual_host)
    if host is not None:
        raise UserError(f"--host {host} is for a method over another one, and {name} is none")
    return config


def run_settings_of(method: type | None) -> list[Setting]:
    """Every setting of a run with a method's settings; None: those that no method decides."""
    schema = method or NoSettings
    found = settings_of(RunConfig(method=schema()), schema)
    return [each for each in found if method is not None or each.key != "method"]


def settings_of(
    config: DataclassInstance, method: type, prefix: str = "", inside: tuple[str, ...] = (), active: bool = True
) -> Iterator[Setting]:
    """The settings of ``config`` in their order, each section before what is in it; their values are the defaults."""
    schema = type(config)
    sections, hints = dict(sections_of(schema, method)), get_type_hints(schema)
    for item in sorted(fields(config), key=lambda item: item.name != "name"):  # the name says what the rest is of
        key, value = prefix + item.name, getattr(config, item.name)
        help = item.metadata.get("help", NAME if item.name == "name" else "")
        kind, nullable = sections.get(item.name, (None, False))
        allowed = allowed_in_words(hints[item.name], item.metadata)
        if kind is not None:
            allowed = "a section or null" if nullable else "a section"
        yield Setting(key, help, value, allowed, kind, inside, active, item.metadata.get("was", ""))
        if kind is not None:
            there = kind() if value is None else value
            yield from settings_of(there, method, f"{key}.", (*inside, help), active and value is not None)


def allowed_in_words(hint: object, limits: Limits) -> str:
    """Type and range of a setting, such as ``a number of at least 0 and below 1, or null``; empty for any value."""
    if hint is Any:
        return ""
    kinds = [kind for kind in type_alternatives(hint) if kind is not type(None)]
    null = ", or null" if type(None) in type_alternatives(hint) else ""
    many = any(get_origin(kind) in (list, tuple) for kind in kinds)
    if choices := limits.get("choices"):
        return ("a list with any of " if many else "one of ") + ", ".join(map(str, choices)) + null
    text = " or ".join(map(in_words, kinds))
    if many and "length" in limits:
        text = text.replace("a list of ", f"a list of {limits['length']} ")
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    bounds = " and ".join(f"{word} {_number(limits[name])}" for name, word in words.items() if name in limits)
    if "at_least" in limits and "at_most" in limits:
        bounds = f"from {_number(limits['at_least'])} to {_number(limits['at_most'])}"
    if bounds:
        text += f", each {bounds}" if many else f" {bounds}" if bounds.startswith("from") else f", {bounds}"
    return text + null


def _number(value: float) -> str:
    if isinstance(value, int) and value > 2**32 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:,}"


def as_yaml_value(value: object) -> str:
    """A setting's value as YAML that :func:`flowdistill.config.load_config` reads back, in one line."""
    if isinstance(value, tuple):
        value = list(value)
    return dump_yaml([value], compact=True).rstrip("\n")[1:-1]  # in a list, for a plain value gets a mark behind it


# --- as a file


def as_yaml(settings: Iterable[Setting], values: Mapping[str, object] | None = None) -> str:
    """The settings as a configuration file in which every one has its default and its help text as a comment.

    A section that is null by default follows in comments, to be taken out of them. ``values`` stand in the place of
    the defaults of their keys.
    """
    lines: list[str] = []
    for each in settings:
        off = "" if each.active else "# "
        left = "  " * each.depth
        comments = [each.help] if each.help else []
        if each.section is None and each.allowed:
            comments.append(each.allowed + ("; has to be set" if each.required else ""))
        if each.former:
            comments.append(f"before: {each.former}")
        if not each.depth and lines:
            lines.append("")
        own = []
        for text in comments:
            own += [f"# {line}" for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)]
        if each.section is None:
            chosen = each.default if values is None else values.get(each.key, each.default)
            own.append(f"{each.name}: {as_yaml_value(chosen)}")
        elif each.default is None:
            own += [f"{each.name}: null", f"# {each.name}:"]
        else:
            own.append(f"{each.name}:")
        lines += [f"{left}{off}{line}" for line in own]
    return "\n".join(lines) + "\n"


# --- as a table


def as_markdown(settings: Sequence[Setting], prefix: str = "method.") -> str:
    """A table in Markdown of the settings below ``prefix``, whose keys stand without it.

    A section of a kind that an earlier one has is one row, which names the earlier one and the defaults that differ.
    Published values have a column where there are any.
    """
    rows: list[tuple[str, str, str, str, str]] = []
    first: dict[type, str] = {}
    below = [each for each in settings if each.key.startswith(prefix) and each.key != "method.name"]
    skipped: tuple[str, ...] = ()
    for each in below:
        if each.key.startswith(skipped) and skipped:
            continue
        key, (published, help) = each.key.removeprefix(prefix), _published(each.help)
        if each.section is None:
            default = "**required**" if each.required else f"`{each.value}`"
            rows.append((f"`{key}`", default, _range(each), help, published))
        elif each.section in first:
            earlier, skipped = first[each.section], (*skipped, f"{each.key}.")
            different = "`null`" if each.default is None else _differences(below, each.key, earlier)
            rows.append((f"`{key}.*`", different, "",
                         f"{help}: as `{earlier.removeprefix(prefix)}.*`", published))
        else:
            first[each.section] = each.key
            rows.append((f"`{key}`", "`null`" if each.default is None else "", each.allowed, help, published))
    columns = ("Setting", "Default", "May be", "What it is", "Published")
    shown_columns = columns if any(row[-1] for row in rows) else columns[:-1]
    lines = [shown_columns, tuple("---" for _ in shown_columns), *(row[: len(shown_columns)] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
                     for line in lines) + "\n"


def _published(help: str) -> tuple[str, str]:
    """The published values in a help text, and the text without them."""
    return "; ".join(PUBLISHED.findall(help)), PUBLISHED.sub("", help)


def _range(setting: Setting) -> str:
    if not setting.allowed.startswith(("one of ", "a list with any of ")):
        return setting.allowed
    start = "" if setting.allowed.startswith("one of ") else "any of "
    choices, _, null = setting.allowed.removeprefix("one of ").removeprefix("a list with any of ").partition(", or ")
    return start + ", ".join(f"`{choice}`" for choice in [*choices.split(", "), *([null] if null else [])])


def _differences(settings: Sequence[Setting], section: str, earlier: str) -> str:
    """The defaults in a section that are not those of an earlier one of its kind."""
    known = {each.key: each for each in settings}
    different = [each for each in settings if each.key.startswith(f"{section}.") and each.section is None
                 and each.default != known[earlier + each.key.removeprefix(section)].default]
    return ", ".join(f"`{each.key.removeprefix(section + '.')}: {each.value}`" for each in different)


# --- by a word


@dataclass
class Found:
    """A setting that a search has found, and the methods that have it; none for a setting that no method decides."""

    setting: Setting
    methods: list[str]


def search(
    words: Sequence[str], methods: Sequence[str] | None = None, section: str | None = None
) -> list[Found]:
    """The settings in whose key, help text or sections' help texts every word occurs.

    Args:
        words: of letters in either case; ``critic's`` is read as ``critic``.
        methods: those whose settings are looked through beside those of every run; None: all.
        section: the only section that is looked through; None: all.

    Raises:
        UserError: no setting has them all.
    """
    wanted = [word.lower().removesuffix("'s") for text in words for word in text.split()]
    found: dict[tuple[str, str, str], Found] = {}
    for name in (None, *([each for each, _ in usable_methods()] if methods is None else methods)):
        for each in run_settings_of(None if name is None else method_settings(name)):
            top = each.key.partition(".")[0]
            if name is not None and top != "method" or section not in (None, top):
                continue
            text = " ".join((each.key, each.help, *each.inside)).lower().replace("_", " ")
            text += f" {each.key.lower()}"
            if each.section is None and all(word.replace("_", " ") in text or word in text for word in wanted):
                entry = found.setdefault((each.key, each.help, each.value), Found(each, []))
                entry.methods += [] if name is None else [name]
    if not found:
        where = "" if methods is None else f" of {listed(methods)}"
        raise UserError(f"no setting{where} has {shown(' '.join(words))} in its name or its help text; try fewer words")
    return list(found.values())


def as_found(found: Sequence[Found], methods: bool) -> str:
    """The settings of a search, one a paragraph; ``methods``: with the names of the methods that have each."""
    parts = []
    for entry in found:
        each = entry.setting
        value = "(has to be set)" if each.required else f"= {each.value}"
        lines = [f"{each.key} {value}"]
        around = f" ({each.inside[-1]})" if len(each.inside) > 1 else ""
        texts = [each.help + around, each.allowed, f"methods: {', '.join(entry.methods)}" if methods else ""]
        for text in texts[: 3 if entry.methods else 2]:
            lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ",
                                   break_long_words=False, break_on_hyphens=False)
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
