"""YAML files and overrides into a checked :class:`RunConfig`, and back into a file."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from flowdistill.config.checks import (
    Layer,
    check_keys,
    closest,
    found,
    in_words,
    leaf_types,
    raw_value,
    rename_former_keys,
    shown,
    validate,
)
from flowdistill.config.registry import METHODS
from flowdistill.config.schema import MISSING, HostingConfig, RunConfig
from flowdistill.utils.errors import UserError
from flowdistill.utils.objects import is_object, load_object
from flowdistill.utils.shipped import find_config


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and ``key=value`` overrides (``train.steps=500``) into a checked :class:`RunConfig`.

    The file is a path, or the name of a shipped one: ``digits/freeflow`` is ``configs/digits/freeflow.yaml``.

    The result's ``method`` is an instance of the selected method's own ``Config`` dataclass. Relative paths inside stay
    relative to the working directory; only ``defaults_from`` is relative to its file. Raises UserError for a missing or
    malformed file, an unknown key, a wrong type, an impossible value and a missing mandatory value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    layers = _file_layers(find_config(path)) + [_override_layer(text) for text in overrides]
    method = method_config_class(_name(layers, "method", path))
    if issubclass(method, HostingConfig):  # the settings of the other method are a section of its own
        method = method.hosted(_name(layers, "method.host", path))
    for layer in layers:
        rename_former_keys(layer, method)
        check_keys(layer, method)
    try:
        schema = OmegaConf.structured(RunConfig(method=method()))
        merged = OmegaConf.merge(schema, *(layer.values for layer in layers))
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"'{key}' is missing: set it in {path} or add {key}=... to the command")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _value_error(error, layers, dict(leaf_types(RunConfig, method))) from error
    assert isinstance(config, RunConfig)
    validate(config, layers)
    return config


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the configuration as YAML that :func:`load_config` reads back; the file is complete or absent."""
    from omegaconf import OmegaConf

    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def method_config_class(name: str, key: str = "method.name", barred: Sequence[str] = ()) -> type:
    """The settings dataclass of a registered method; for another name (at ``key``) a UserError with the closest one.

    ``barred`` methods have no place at ``key``.
    """
    if is_object(name):
        return _config_of(load_object(name, key), name, key)
    if name in barred or name not in METHODS:
        known = [each for each in METHODS if each not in barred]
        raise UserError(f"'{key}' must be one of {', '.join(known)}, not {name!r}{closest(name, known)}")
    config: type = METHODS.get(name).Config
    return config


def _config_of(method: Any, name: str, key: str) -> type:
    """The settings of a class that a configuration names as ``package.module:Class``, which becomes known so."""
    config = getattr(method, "Config", None)
    if not isinstance(method, type) or not is_dataclass(config):
        raise UserError(f"'{key}' names {name}, which is no method: it needs to be a class with a dataclass 'Config'")
    METHODS.register(name)(method)
    assert isinstance(config, type)
    return config


def accept_former_names(values: dict[Any, Any], method: type) -> None:
    """Give the method and the settings in a saved configuration their present names, in place and without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rename_former_keys(Layer("saved", values), method)
        for section in (values.get("method"), (values.get("method") or {}).get("host")):
            if isinstance(section, dict) and isinstance(section.get("name"), str):
                section["name"] = METHODS.current_name(section["name"])


def _file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The file's values behind those of the files it builds on."""
    if path.resolve() in above:
        circle = " -> ".join(entry.name for entry in (*above, path))
        raise UserError(f"'defaults_from' goes round in a circle: {circle}")
    values = _read_yaml(path, f"the configuration file {path}" if not above else f"{path} ('defaults_from')")
    base = values.pop("defaults_from", None)
    if base is None:
        return [Layer(f"in {path}", values)]
    if not isinstance(base, str):
        raise UserError(f"'defaults_from' must be the path of one YAML file, not {base!r} (in {path})")
    return [*_file_layers(path.parent / base, (*above, path.resolve())), Layer(f"in {path}", values)]


def _read_yaml(path: Path, name: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{name} does not exist{closest(path.name, siblings)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not text in UTF-8, as a YAML file is") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    return _parse(text, name)


def _parse(text: str, name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    expectation = f"{name} must hold sections such as 'teacher:' and 'train:' with 'key: value' lines"
    try:
        values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {_yaml_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{name} is not valid: {_first_line(error)}") from error
    except OSError as error:  # how OmegaConf refuses a document that is a bare number or the like
        raise UserError(expectation) from error
    if not isinstance(values, dict):
        raise UserError(expectation)
    return {str(name): value for name, value in values.items()}


def _override_layer(text: str) -> Layer:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, _ = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError(f"the override {text!r} must have the form key=value, for example train.steps=500")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except YAMLError as error:
        raise UserError(f"the override {text!r} has a value that is not valid YAML: {_yaml_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"the override {text!r} is not valid: {_first_line(error)}") from error
    return Layer(f"in the override {text!r}", values)


def _name(layers: Sequence[Layer], section: str, path: str | os.PathLike[str]) -> str:
    """The last name in a method's section; read before the rest, because it decides what else is allowed."""
    for layer in reversed(layers):
        values = raw_value(layer.values, section)
        if values == MISSING:
            continue
        if not isinstance(values, dict):
            raise UserError(f"'{section}' must be a section with a 'name', not {shown(values)} ({layer.origin})")
        if values.get("name", MISSING) != MISSING:
            values["name"] = METHODS.current_name(str(values["name"]))
            return str(values["name"])
    raise UserError(f"'{section}.name' is missing: set it in {path} to one of {', '.join(METHODS)}")


def _value_error(error: Exception, layers: Sequence[Layer], hints: Mapping[str, Any]) -> UserError:
    """One sentence for what OmegaConf says about one value."""
    from omegaconf.errors import InterpolationResolutionError, InterpolationValidationError, ValidationError

    key = re.sub(r"\[.*", "", str(getattr(error, "full_key", None) or ""))
    unresolved = isinstance(error, InterpolationResolutionError) and not isinstance(error, InterpolationValidationError)
    if key in hints and isinstance(error, ValidationError) and not unresolved:
        values = [value for layer in layers if (value := raw_value(layer.values, key)) != MISSING]
        return UserError(f"'{key}' must be {in_words(hints[key])}, not {shown(values[-1])}{found(layers, key)}")
    return UserError((f"'{key}': " if key else "") + _first_line(error) + found(layers, key))


def _yaml_problem(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or _first_line(error))
    return f"line {mark.line + 1}, {problem}" if mark is not None else problem


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
