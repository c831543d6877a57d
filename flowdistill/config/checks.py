"""What may stand in a configuration, and the one sentence that says so when something else does."""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING as MISSING_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin
from typing import get_type_hints as evaluated_hints

from flowdistill.config.registry import METHODS, usable_methods
from flowdistill.config.schema import MISSING, RunConfig
from flowdistill.utils import errors
from flowdistill.utils.errors import NAMES, UserError, listed, shortened
from flowdistill.utils.numbers import LARGEST, LARGEST_INTEGER
from flowdistill.utils.text import JsonObject

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# A class's hints are evaluated from their texts, and one configuration asks for those of each section ten times.
get_type_hints = functools.cache(evaluated_hints)

Values = Mapping[str, Any]
"""A section's, as YAML takes them or as they are written."""
Limits = Mapping[str, Any]
"""What a setting may be, as :func:`flowdistill.config.option` has it in a field's metadata."""


class Layer(NamedTuple):
    """Raw values from one file or override.

    Attributes:
        origin: the words that name this place in an error.
        values: as YAML takes them.
        texts: the same as they are written: a tree of texts (and of null), for the settings that are texts.
        group: layers of one group were written together; an upper group has a higher number.
    """

    origin: str
    values: JsonObject
    texts: JsonObject
    group: int


def check_keys(layer: Layer, method: type) -> None:
    """UserError for a key that does not exist and for a plain value where a section belongs."""
    _check_keys(layer.values, RunConfig, "", layer.origin, method)


def rename_former_keys(layer: Layer, method: type) -> None:
    """Give settings under a name of an older version their present one, in place, with a warning for each."""
    _rename(layer.values, RunConfig, "", layer.origin, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _rename(layer.texts, RunConfig, "", layer.origin, method)


def _rename(values: JsonObject, schema: type, prefix: str, origin: str, method: type) -> None:
    sections = dict(sections_of(schema, method))
    former = {item.metadata["was"]: item.name for item in fields(schema) if "was" in item.metadata}
    for name in [name for name in values if name in former]:
        if former[name] in values:
            raise UserError(f"'{prefix}{name}' and '{prefix}{former[name]}' are the same setting; set the second only "
                            f"({origin})")
        warnings.warn(f"'{prefix}{name}' is called '{prefix}{former[name]}' now ({origin})", stacklevel=2)
        values[former[name]] = values.pop(name)
    for name, value in values.items():
        if name in sections and isinstance(value, dict):
            _rename(value, sections[name][0], f"{prefix}{name}.", origin, method)


def validate(config: DataclassInstance, layers: Sequence[Layer] = (), prefix: str = "") -> None:
    """Check every range of a configuration and call the ``validate()`` of every section that has one.

    ``config`` is a RunConfig or one section of it; ``prefix`` is the section's path with a dot behind it. ``layers``
    let the error name the file or the override that holds the value. A section that wants to know its place and which
    of its settings somebody has set has ``validate_at(prefix, given)`` instead, with the words for the place of each.
    """
    check_texts(config, layers, prefix)
    for item in fields(config):
        key, value = prefix + item.name, getattr(config, item.name)
        elements = value if isinstance(value, (list, tuple)) else [value]
        length = item.metadata.get("length")
        if value is not None and length is not None and len(elements) != length:
            raise UserError(f"'{key}' must have {length} values, not {len(elements)}{found(layers, key)}")
        if value is not None and "rule" in item.metadata and (allowed := item.metadata["rule"](value)):
            raise UserError(f"'{key}' must be {allowed}, not {shown(value)}{found(layers, key)}")
        for element in elements:
            if is_dataclass(element) and not isinstance(element, type):
                validate(element, layers, f"{key}.")
            elif element is not None and (allowed := _violation(element, item.metadata)):
                every = "every value of " if elements is value else ""
                hint = closest(element, item.metadata.get("choices", ()))
                raise UserError(f"{every}'{key}' must be {allowed}, not {shown(element)}{hint}{found(layers, key)}")
    for item in fields(config):
        only, key = item.metadata.get("only"), prefix + item.name
        if only is None or _is_default(config, item) or not (place := found(layers, key)):
            continue
        # Over a file that sets both, an override of the one it needs is meant: 'method.regression_weight=0'.
        if (reason := only.reason(config)) and _group(layers, prefix + only.name) <= _group(layers, key):
            warnings.warn(f"'{prefix}{item.name}' has no effect, because {prefix}{reason}{place}", stacklevel=2)
    if hasattr(config, "validate"):
        config.validate()
    if hasattr(config, "validate_at"):
        places = {item.name: found(layers, prefix + item.name) for item in fields(config)}
        config.validate_at(prefix, {name: place for name, place in places.items() if place})


def check_texts(config: DataclassInstance, layers: Sequence[Layer] = (), prefix: str = "") -> None:
    """Refuse empty texts, alone and in lists, where they mean nothing of their own: of a path it would be the working
    folder. Sections in ``config`` are not looked into; the arguments are those of :func:`validate`.

    Raises:
        UserError: so.
    """
    hints = get_type_hints(type(config))
    for item in fields(config):
        key, value, hint = prefix + item.name, getattr(config, item.name), hints[item.name]
        if _may_be_empty(item, hint):
            continue
        if value == "":
            instead = ", or set it to null" if type(None) in type_alternatives(hint) else ""
            raise UserError(f"'{key}' is an empty text; give one{instead}{found(layers, key)}")
        if isinstance(value, (list, tuple)) and "" in value and not is_text(hint):
            raise UserError(f"'{key}' has an empty text in it; leave that out{found(layers, key)}")


def _may_be_empty(item: Field[Any], hint: object) -> bool:
    """Whether a setting may be an empty text or have one in it; True as well where its choices or its pattern speak of
    that."""
    return item.metadata.get("blank", "help" not in item.metadata) or not is_textual(hint) or (
        not item.metadata.keys().isdisjoint(("choices", "pattern", "rule")))


def _is_default(config: DataclassInstance, item: Field[Any]) -> bool:
    """Whether a setting has its class's own default."""
    value = getattr(config, item.name)
    return bool(value == (item.default if item.default_factory is MISSING_DEFAULT else item.default_factory()))


def leaf_types(schema: type, method: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(full key, type) of everything below ``schema`` that is not a section."""
    sections = dict(sections_of(schema, method))
    for name, hint in get_type_hints(schema).items():
        if name in sections:
            yield from leaf_types(sections[name][0], method, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def is_text(hint: object) -> bool:
    """Whether a setting of this type is a text or null."""
    return set(type_alternatives(hint)) <= {str, type(None)}


def is_textual(hint: object) -> bool:
    """Whether a setting of this type holds texts and nothing else: one, a list of them, or a mapping to them."""
    if get_origin(hint) in (list, tuple):
        return all(is_textual(part) for part in get_args(hint) if part is not Ellipsis)
    if get_origin(hint) is dict:
        return is_textual(get_args(hint)[1])
    parts = type_alternatives(hint)
    return is_text(hint) or (len(parts) > 1 and all(part is type(None) or is_textual(part) for part in parts))


def in_words(hint: object) -> str:
    """A type in words: ``list[int] | None`` is 'a list of integers or null'."""
    if get_origin(hint) in (list, tuple):
        many = {int: "integers", float: "numbers", str: "texts"}
        count = f"{len(get_args(hint))} " if _is_fixed(hint) else ""
        return f"a list of {count}{many.get(get_args(hint)[0], 'values')}"
    if len(type_alternatives(hint)) > 1:
        return " or ".join(in_words(part) for part in type_alternatives(hint))
    one: dict[object, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text",
                              type(None): "null"}
    return one.get(hint, "a mapping" if get_origin(hint) is dict else f"a {getattr(hint, '__name__', hint)}")


def with_texts(values: JsonObject, texts: JsonObject, hints: Mapping[str, object]) -> JsonObject:
    """A copy of ``values`` in which the settings that are texts are as ``texts`` has them, the same tree as written."""
    result = dict(values)
    for key, hint in hints.items():
        if is_textual(hint) and (text := raw_value(texts, key)) != MISSING:
            result = replaced(result, key.split("."), text)
    return result


def replaced(values: JsonObject, path: Sequence[str], value: object) -> JsonObject:
    """A copy of nested mappings with another value at ``path``, which is there already."""
    return {**values, path[0]: replaced(values[path[0]], path[1:], value) if len(path) > 1 else value}


def section_type(schema: type, name: str) -> type:
    """The dataclass of a section of ``schema``."""
    return dict(sections_of(schema, schema))[name][0]


def raw_value(values: JsonObject, key: str) -> Any:
    """The value at a dotted key of nested mappings, or MISSING."""
    node: object = values
    for part in key.split("."):
        node = node.get(part, MISSING) if isinstance(node, Mapping) else MISSING
    return node


def found(layers: Sequence[Layer], key: str) -> str:
    """The place that set ``key`` last, in brackets; an empty string for a default."""
    origins = [layer.origin for layer in layers if raw_value(layer.values, key) != MISSING]
    return f" ({origins[-1]})" if origins else ""


def _group(layers: Sequence[Layer], key: str) -> int:
    """The group of the layer that set ``key`` last; -1 for a default."""
    return max((layer.group for layer in layers if raw_value(layer.values, key) != MISSING), default=-1)


def closest(name: object, valid: Iterable[str], prefix: str = "") -> str:
    """``; did you mean 'x'?`` with the nearest valid name, or an empty string when none is near."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{matches[0]}'?" if matches else ""


def shown(value: object) -> str:
    """A value as YAML users write it, shortened."""
    text = errors.shown(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def pruned(values: Values, schema: type, prefix: str) -> tuple[JsonObject, list[str]]:
    """What of ``values`` the section ``schema`` has a place for, and the keys of the rest.

    A value goes as well where the section wants another kind of value (keys below it or none) or does not list it among
    the choices.
    """
    kept: JsonObject = {}
    dropped: list[str] = []
    sections, hints = dict(sections_of(schema, schema)), get_type_hints(schema)
    limits = {item.name: item.metadata for item in fields(schema)}
    for name, value in values.items():
        if name in sections and isinstance(value, Mapping):
            kept[name], below = pruned(value, sections[name][0], f"{prefix}{name}.")
            dropped += below
        elif name not in limits or not _has_place(value, name in sections, hints[name], limits[name]):
            dropped.append(f"{prefix}{name}")
        else:
            kept[name] = value
    return kept, dropped


def _has_place(value: object, is_section: bool, hint: object, limits: Limits) -> bool:
    if is_section or isinstance(value, Mapping):
        return value is None if is_section else hint is Any or get_origin(hint) is dict
    elements = value if isinstance(value, list) else [value]
    return all(element is None or element in limits.get("choices", elements) for element in elements)


def _check_keys(values: Values, schema: type, prefix: str, origin: str, method: type) -> None:
    sections, hints = dict(sections_of(schema, method)), get_type_hints(schema)
    names = [item.name for item in fields(schema)]
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in names:
            owner = f"'{prefix[:-1]}'" if prefix else "the top level"
            if schema is method:
                owner += f" with the name {schema().name!r}"
            inner = [f"'{key[: -len(name)]}{section}.{name}'" for section, (kind, _) in sections.items()
                     if name in {item.name for item in fields(kind)}]
            hint = f"; did you mean {listed(inner)}?" if inner else (
                _of_others(name, schema) or closest(name, names, prefix))
            allowed = f" allowed in {owner}: {listed(names)}" if not hint or len(names) <= NAMES else ""
            see = f" (see 'flowdistill config {method.name}')" if hasattr(method, "name") else ""
            raise UserError(f"unknown key '{shortened(key)}' ({origin}){hint or ';'}{allowed}{see}")
        if name not in sections:
            if isinstance(value, Mapping) and hints[name] is not Any and get_origin(hints[name]) is not dict:
                raise UserError(f"'{key}' must be {in_words(hints[name])}, not keys below it ({origin})")
            nested = isinstance(value, list) and any(isinstance(element, (list, Mapping)) for element in value)
            if nested and is_textual(hints[name]):
                raise UserError(f"'{key}' must be {in_words(hints[name])}, not {shown(value)} ({origin})")
            if isinstance(value, list) and _is_fixed(hints[name]) and len(value) != len(get_args(hints[name])):
                raise UserError(f"'{key}' must be {in_words(hints[name])}, not {shown(value)} ({origin})")
            continue
        section, nullable = sections[name]
        if isinstance(value, Mapping):
            _check_keys(value, section, f"{key}.", origin, method)
        elif not (value is None and nullable):
            raise UserError(f"'{key}' must be a section with keys of its own, not {shown(value)} ({origin})")


def _of_others(name: str, schema: type) -> str:
    """That a setting which a method has not is one of others, in words; empty where it is of none, or ``schema`` is no
    method's."""
    own = getattr(schema, "name", None)
    if own not in METHODS:
        return ""
    others = [each for each, method in usable_methods() if name in {item.name for item in fields(method.Config)}]
    return f"; it is a setting of {listed(others)}, not of {own}" if others else ""


def sections_of(schema: type, method: type) -> Iterator[tuple[str, tuple[type, bool]]]:
    """The fields of ``schema`` that are sections: (name, (dataclass, whether null is allowed))."""
    for name, hint in get_type_hints(schema).items():
        alternatives = type_alternatives(method if schema is RunConfig and name == "method" else hint)
        for candidate in alternatives:
            if isinstance(candidate, type) and is_dataclass(candidate):
                yield name, (candidate, type(None) in alternatives)


def _is_fixed(hint: object) -> bool:
    """Whether a type is a tuple of a fixed number of values."""
    return get_origin(hint) is tuple and Ellipsis not in get_args(hint)


def type_alternatives(hint: object) -> tuple[object, ...]:
    """What a union is of; of another type, that type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _violation(value: Any, limits: Limits) -> str:
    """What would be allowed, in words, when ``value`` is not; else an empty string."""
    if "choices" in limits and value not in limits["choices"]:
        return f"one of {listed(limits['choices'])}"
    if "pattern" in limits and not re.fullmatch(limits["pattern"], value):
        return str(limits["help"])
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if limits.keys().isdisjoint(("at_most", "below")):  # these say more
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            return "an integer from -2**63 + 1 to 2**63 - 1"
        if isinstance(value, float) and abs(value) > LARGEST:
            return f"a number of at most {LARGEST:.1e} or at least {-LARGEST:.1e}, as float32 has them"
    tests = {
        "at_least": ("at least", lambda limit: value >= limit),
        "above": ("greater than", lambda limit: value > limit),
        "at_most": ("at most", lambda limit: value <= limit),
        "below": ("below", lambda limit: value < limit),
    }
    active = [(words, limits[name], test(limits[name])) for name, (words, test) in tests.items() if name in limits]
    if all(passed for *_, passed in active):
        return ""
    return " and ".join(f"{words} {limit}" for words, limit, _ in active)
