"""YAML files and overrides into a checked :class:`RunConfig`, and back into a file."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill.config.checks import (
    Layer,
    check_keys,
    closest,
    found,
    in_words,
    is_text,
    leaf_types,
    pruned,
    raw_value,
    rename_former_keys,
    replaced,
    section_type,
    shown,
    validate,
    with_texts,
)
from flowdistill.config.registry import METHODS
from flowdistill.config.schema import MISSING, PROTOCOLS, HostingConfig, RunConfig
from flowdistill.utils.errors import UserError, listed, shortened
from flowdistill.utils.files import local_path
from flowdistill.utils.objects import is_object, load_object
from flowdistill.utils.shipped import find_config
from flowdistill.utils.text import JsonObject, dump_yaml, parse_yaml, read_text

if TYPE_CHECKING:
    from omegaconf import DictConfig


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and ``key=value`` overrides (``train.steps=500``) into a checked :class:`RunConfig`.

    The file is a path, or the name of a shipped one: ``digits/freeflow`` is ``configs/digits/freeflow.yaml``.

    The result's ``method`` is an instance of the selected method's own ``Config`` dataclass. A setting that is a text
    keeps the text that was written, whatever YAML would make of it (``0010``, ``no``, ``12:30``); on the command line
    nothing in it needs quotes. Relative paths inside stay relative to the working directory; only ``defaults_from`` is
    relative to its file. Where an upper file or an override names another method than the files below it, settings of
    theirs that it does not have are left out, with a warning that names them.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, an impossible value, or a mandatory value
            that is missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    files = [layer._replace(group=group) for group, layer in enumerate(_file_layers(find_config(path)))]
    method = method_config_class(_name(files, overrides, "method", path))
    named = {"method": method}
    if issubclass(method, HostingConfig):  # the settings of the other method are a section of its own
        method = method.hosted(_name(files, overrides, "method.host", path))
        named = {"method": method, "method.host": section_type(method, "host")}
    hints = dict(leaf_types(RunConfig, method))
    layers = files + [_override_layer(text, hints)._replace(group=len(files)) for text in overrides]
    for layer in layers:
        rename_former_keys(layer, method)
    layers = [layer._replace(values=with_texts(layer.values, layer.texts, hints)) for layer in layers]
    for section, schema in named.items():
        layers = _without_former(_with_present_names(layers, section), section, schema)
    for layer in layers:
        check_keys(layer, method)
    try:
        merged = OmegaConf.merge(_defaults(method), *(layer.values for layer in layers))
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"'{key}' is missing: set it in {path} or add {key}=... to the command")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _value_error(error, layers, hints) from error
    assert isinstance(config, RunConfig)
    protocol, number = config.evaluation.protocol, "evaluation.num_images"
    if protocol in PROTOCOLS and all(raw_value(layer.values, number) == MISSING for layer in layers):
        config.evaluation.num_images = PROTOCOLS[protocol][0]
    validate(config, layers)
    return config


@functools.cache
def _defaults(method: type) -> DictConfig:
    """A run's settings before any is given. Checking them against their types takes OmegaConf half the time of reading
    a configuration, and a process reads many with one method: a search for what fits a card, a batch of runs. For
    ``OmegaConf.merge`` alone, which copies it."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(RunConfig(method=method()))


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the configuration as YAML that :func:`load_config` reads back; the file is complete or absent."""
    from omegaconf import OmegaConf

    target = local_path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(dump_yaml(OmegaConf.to_container(OmegaConf.structured(config))), encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def method_config_class(name: str, key: str = "method.name", barred: Sequence[str] = ()) -> type:
    """The settings dataclass of a registered method; for another name (at ``key``) a UserError with the closest one.

    ``barred`` methods have no place at ``key``.
    """
    if is_object(name):
        method = load_object(name, key)
        config = _config_of(method, name, key)
        METHODS.register(name)(method)  # it becomes known so
        return config
    if name in barred or name not in METHODS:
        known = [each for each in METHODS if each not in barred]
        raise UserError(f"'{key}' must be one of {listed(known)}, not {shown(name)}{closest(name, known)}")
    return _config_of(METHODS.get(name), name, key)


def _config_of(method: object, name: str, key: str) -> type:
    """The settings of a class that a configuration names, or that another package has under a name."""
    config = getattr(method, "Config", None)
    if not isinstance(method, type) or not isinstance(config, type) or not is_dataclass(config):
        raise UserError(f"'{key}' names {name}, which is no method: it needs to be a class with a dataclass 'Config'")
    return config


def accept_former_names(values: JsonObject, method: type) -> None:
    """Give the method and the settings in a saved configuration their present names, in place and without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rename_former_keys(Layer("saved", values, {}, 0), method)
        for section in (values.get("method"), (values.get("method") or {}).get("host")):
            if isinstance(section, dict) and isinstance(section.get("name"), str):
                section["name"] = METHODS.current_name(section["name"])


def _file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The file's values behind those of the files it builds on."""
    own_place = Path(os.path.realpath(path))  # of a loop of links too, where Path.resolve fails
    if own_place in above:
        circle = " -> ".join(entry.name for entry in (*above, path))
        raise UserError(f"'defaults_from' goes round in a circle: {circle}")
    values, texts = _read(path, f"the configuration file {path}" if not above else f"{path} ('defaults_from')")
    values.pop("defaults_from", None)
    base = texts.pop("defaults_from", None)
    own = Layer(f"in {path}", values, texts, 0)
    if base is None:
        return [own]
    if not isinstance(base, str):
        raise UserError(f"'defaults_from' must be the path of one YAML file, not {shown(base)} (in {path})")
    return [*_file_layers(path.parent / local_path(base), (*above, own_place)), own]


def _read(path: Path, name: str) -> tuple[JsonObject, JsonObject]:
    """The values and the texts of a file; see :class:`Layer`."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{name} is a symbolic link that leads nowhere, to {os.readlink(path)}")
    if path.parent.is_dir() and not path.exists():
        siblings = [entry.name for entry in path.parent.glob("*.y*ml")]
        raise UserError(f"{name} does not exist{closest(path.name, siblings)}")
    text = read_text(path, name)
    values, texts = (parse_yaml(text, name, as_written) for as_written in (False, True))
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(f"{name} must hold sections such as 'teacher:' and 'train:' with 'key: value' lines")
    _check_interpolations(values, name)
    return values, texts


def _check_interpolations(values: JsonObject, name: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.create(values)
    except OmegaConfBaseException as error:
        raise UserError(f"{name} is not valid: {_first_line(error)}") from error
    except RecursionError:
        raise UserError(f"{name} is not valid: it contains itself") from None


def _override_layer(text: str, hints: Mapping[str, object]) -> Layer:
    """A ``key=value`` text; the value of a setting that is a text is taken as it stands, that of others is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError(f"the override {shown(text)} must have the form key=value, for example train.steps=500")
    name, written = f"the override {shown(text)}", value.strip()
    if key not in hints or not is_text(hints[key]) or written in NULLS:
        typed, as_text = (parse_yaml(value, f"{name} has a value that", as_written) for as_written in (False, True))
    else:
        as_text = parse_yaml(value, f"{name} has a value that", True) if written[0] in "'\"" else written
        typed = as_text
    values, texts = typed, as_text
    for part in reversed(key.split(".")):
        values, texts = {part: values}, {part: texts}
    _check_interpolations(values, name)
    return Layer(f"in the override {shown(text)}", values, texts, 0)


NULLS = ("", "~", "null", "Null", "NULL")


def given_method(overrides: Sequence[str], section: str = "method") -> str | None:
    """The method that overrides name in ``section``, by its present name; None where they name none.

    Raises:
        UserError: a malformed override of the name, or a plain value in the place of the section.
    """
    return _given_name((), overrides, section)


def given_settings(overrides: Sequence[str], method: type) -> JsonObject:
    """What overrides set, by dotted key, as :func:`load_config` takes it; whether values are possible is not looked at.

    Args:
        overrides: ``key=value`` each; of several for one key the last one counts.
        method: the settings dataclass of the run's method.

    Raises:
        UserError: a malformed override, or an unknown key.
    """
    hints = dict(leaf_types(RunConfig, method))

    def leaves(values: JsonObject, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping) and f"{prefix}{name}" not in hints:
                yield from leaves(dict(value), f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    given: JsonObject = {}
    for layer in [_override_layer(text, hints) for text in overrides]:
        rename_former_keys(layer, method)
        check_keys(layer, method)
        given |= leaves(with_texts(layer.values, layer.texts, hints), "")
    return given


def _name(files: Sequence[Layer], overrides: Sequence[str], section: str, path: str | os.PathLike[str]) -> str:
    """The last name in a method's section; read before the rest, because it decides what else is allowed."""
    name = _given_name(files, overrides, section)
    if name is None:
        raise UserError(f"'{section}.name' is missing: set it in {path} to one of {listed(METHODS)}")
    return name


def _given_name(files: Sequence[Layer], overrides: Sequence[str], section: str) -> str | None:
    key = f"{section}.name"
    sections = [".".join(section.split(".")[: end + 1]) for end in range(section.count(".") + 1)]
    texts = [text for text in overrides if text.partition("=")[0] in (*sections, key)]
    for layer in reversed([*files, *(_override_layer(text, {key: str}) for text in texts)]):
        values = raw_value(layer.texts, section)
        if values == MISSING:
            continue
        if not isinstance(values, Mapping):
            where = f"'{section}' must be a section with a 'name'"
            raise UserError(f"{where}, not {shown(raw_value(layer.values, section))} ({layer.origin})")
        if values.get("name", MISSING) is None:
            raise UserError(f"'{key}' is missing, for it is null; set it to one of {listed(METHODS)} ({layer.origin})")
        if values.get("name", MISSING) != MISSING:
            return METHODS.current_name(str(values["name"]))
    return None


def _with_present_names(layers: Sequence[Layer], section: str) -> list[Layer]:
    """The layers with the present name of a method in ``section`` where they have one that it had before."""
    key, made = f"{section}.name", []
    for layer in layers:
        if isinstance(name := raw_value(layer.texts, key), str) and name != MISSING:
            now, path = METHODS.current_name(name), key.split(".")
            layer = layer._replace(values=replaced(layer.values, path, now), texts=replaced(layer.texts, path, now))
        made.append(layer)
    return made


def _without_former(layers: Sequence[Layer], section: str, schema: type) -> list[Layer]:
    """The layers without those settings of methods that an upper layer replaces by another one, and which that one does
    not have; says which these are.

    Args:
        section: ``method``, or ``method.host`` of a method over another one.
        schema: the settings of the method that is named last.
    """
    names = [raw_value(layer.texts, f"{section}.name") for layer in layers]
    by_group = {layer.group: name for layer, name in zip(layers, names, strict=True) if name != MISSING}
    if len(set(by_group.values())) < 2:
        return list(layers)
    final = by_group[max(by_group)]
    place = next(layer.origin for layer, name in reversed(list(zip(layers, names, strict=True))) if name != MISSING)
    kept, former, dropped = [], [], []
    for layer in layers:
        name = next((by_group[group] for group in range(layer.group, -1, -1) if group in by_group), final)
        values = raw_value(layer.values, section)
        if name != final and isinstance(values, Mapping):
            left, gone = pruned(values, schema, f"{section}.")
            layer = layer._replace(values=replaced(layer.values, section.split("."), left))
            former += [name] if gone else []
            dropped += gone
        kept.append(layer)
    if dropped and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"{section}.name is {final} ({place}), no longer {' or '.join(dict.fromkeys(former))}; left out, "
                      f"because {final} has none: {', '.join(dict.fromkeys(dropped))}", stacklevel=1)
    return kept


def _value_error(error: Exception, layers: Sequence[Layer], hints: Mapping[str, object]) -> UserError:
    """One sentence for what OmegaConf says about one value."""
    from omegaconf.errors import InterpolationResolutionError, InterpolationValidationError, ValidationError

    key = re.sub(r"\[.*", "", str(getattr(error, "full_key", None) or ""))
    unresolved = isinstance(error, InterpolationResolutionError) and not isinstance(error, InterpolationValidationError)
    if key in hints and isinstance(error, ValidationError) and not unresolved:
        values = [value for layer in layers if (value := raw_value(layer.values, key)) != MISSING]
        return UserError(f"'{key}' must be {in_words(hints[key])}, not {shown(values[-1])}{found(layers, key)}")
    return UserError((f"'{key}': " if key else "") + _first_line(error) + found(layers, key))


def _first_line(error: Exception) -> str:
    return shortened(str(error).split("\n")[0], 300)
