"""Settings that have no effect beside the others are named, whichever they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from flowdistill.config import METHODS, RunConfig, load_config
from flowdistill.config.listing import method_settings
from flowdistill.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def changed(item: Field[Any], default: Any) -> str:
    """Another value that a setting may have, as an override writes it."""
    limits = item.metadata
    if "choices" in limits and not isinstance(default, list):
        return next(choice for choice in limits["choices"] if choice != default)
    if isinstance(default, bool):
        return str(not default).lower()
    if isinstance(default, list):
        return "[text]" if "str" in str(item.type) else "[3]"
    if isinstance(default, int):
        return str(default + 1)
    if isinstance(default, float):
        return str(default * 0.9 if default else 0.5)
    return "cpu" if "pattern" in limits else "0.5"


def conditional(config: Any, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """(key, override, whether it has an effect by default) of all settings in ``config`` that need others."""
    for item in fields(config):
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        if "only" in item.metadata:
            inner = None
            if is_dataclass(value):
                inner = next(each for each in fields(value) if "choices" in each.metadata)
                override = f"{key}.{inner.name}={changed(inner, getattr(value, inner.name))}"
            else:
                override = f"{key}={changed(item, value)}"
            yield key, override, item.metadata["only"].reason(config) == ""
        if is_dataclass(value):
            yield from conditional(value, f"{key}.")


def said(file: Path, overrides: list[str]) -> list[str]:
    """The warnings of loading; of a refusal, that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            load_config(file, overrides)
        except UserError as error:
            return [*(str(each.message) for each in caught), str(error)]
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("name", METHODS.names())
def test_no_setting_is_without_effect_in_silence(name: str, tmp_path: Path) -> None:
    file, schema = tmp_path / "run.yaml", method_settings(name)
    config = RunConfig(method=schema())
    host = [f"method.host.name={schema.usual_host}"] if hasattr(schema, "usual_host") else []
    required = [f"method.{item.name}=digits" for item in fields(schema) if item.default == "???"]
    file.write_text(f"output_dir: x\nteacher: {{source: y}}\nmethod: {{name: {name}}}\n")
    found = list(conditional(config))
    assert {"train.ema_warmup", "teacher.prompt_cache_gb"} <= {key for key, *_ in found}
    for key, override, works in found:
        texts = said(file, [*host, *required, override])
        about = [text for text in texts if f"'{key}' has no effect, because " in text]
        assert works != bool(about), (override, texts)


def test_the_sentence_says_what_would_help_and_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: x\nteacher: {source: y}\nmethod:\n  name: dmd2\n  optimizer: "
                    "{final_lr_fraction: 0.1}\n")
    assert said(file, []) == [
        "'method.optimizer.final_lr_fraction' has no effect, because method.optimizer.schedule is constant; set it to "
        f"cosine or linear (in {file})"]
    assert said(file, ["method.optimizer.schedule=cosine"]) == []
    assert said(file, ["method.optimizer.final_lr_fraction=0.0"]) == []
    text, = said(file, ["method.optimizer.final_lr_fraction=0", "method.regression_pairs=5"])
    # What a file sets for a feature that an override takes away is no mistake of anybody's.
    file.write_text(file.read_text().replace("final_lr_fraction: 0.1", "schedule: cosine, final_lr_fraction: 0.1"))
    assert said(file, []) == said(file, ["method.optimizer.schedule=constant"]) == []
    assert len(said(file, ["method.optimizer.final_lr_fraction=0.2", "method.optimizer.schedule=constant"])) == 1
    file.write_text(file.read_text().replace("schedule: cosine, ", ""))
    text, = said(file, ["method.optimizer.final_lr_fraction=0", "method.regression_pairs=5"])
    assert "regression_weight is 0.0; set that too (in the override" in text


@pytest.mark.parametrize("setting", ["lora.rank=4", "lora.alpha=8", "lora.target_modules=[to_q]", "critic_lora_rank=8"])
def test_adapters_that_nothing_has(setting: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: x\nteacher: {source: y}\nmethod: {name: dmd2}\n")
    text, = said(file, [f"method.{setting}"])
    assert "has no effect, because" in text and said(file, [f"method.{setting}", "method.critic=lora"]) == []


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_have_no_such_setting(file: Path) -> None:
    if not {"method", "defaults_from"} & {line.partition(":")[0] for line in file.read_text().splitlines()}:
        assert file.parent.name in ("accelerate", "experiments")
        return
    assert not [text for text in said(file, []) if "no effect" in text]
