"""Settings that are texts keep their text; another method in an upper layer; sentences of a readable length."""

from __future__ import annotations

import dataclasses
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from flowdistill.config import (
    METHODS,
    MISSING,
    HostingConfig,
    OptimizerConfig,
    load_config,
    method_config_class,
    option,
    save_config,
)
from flowdistill.config.checks import is_textual, leaf_types
from flowdistill.config.schema import RunConfig
from flowdistill.utils.errors import NAMES, UserError, listed, sentence_of, shown
from flowdistill.utils.registry import Registry

GOOD = "output_dir: runs/a\nteacher: {source: some/folder}\n"


@dataclass
class ToyConfig:
    name: str = "toy"
    word: str = "x"
    maybe: str | None = None
    words: list[str] = option([], "texts")
    table: dict[str, str] = option({}, "texts by name")
    anything: dict[str, Any] = option({}, "what YAML says")
    kind: str = option("flat", "one of its own", choices=("flat", "deep"))
    damping: float = 1.0
    count: int = 1
    flag: bool = False
    optimizer: OptimizerConfig = option(OptimizerConfig(lr=3e-4), "of the student")
    critic_optimizer: OptimizerConfig | None = None


@dataclass
class OtherConfig:
    name: str = "other"
    sharpness: int = 3
    kind: str = option("round", "one of its own", choices=("round", "deep"))
    optimizer: OptimizerConfig = option(OptimizerConfig(lr=1e-3), "of the student")
    damping: float = option(2.0, "a number", was="friction")


@dataclass
class HostConfig(HostingConfig):
    name: str = "host"
    parts: int = 2
    host: Any = option(MISSING, "another method")

    @classmethod
    def hosted(cls, host: str) -> type:
        settings = method_config_class(host, "method.host.name", barred=["host"])
        return dataclasses.make_dataclass("HostConfig", [("host", settings, option(settings, "x"))], bases=(cls,),
                                          namespace={"__module__": cls.__module__})


@pytest.fixture(autouse=True)
def toy_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("no_methods")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "no_methods", package)
    registry: Registry[Any] = Registry("method", package="no_methods", group="no methods")
    for config in (ToyConfig, OtherConfig, HostConfig):
        former = ("another",) if config is OtherConfig else ()
        registry.register(config().name, *former)(type("Method", (), {"Config": config}))
    monkeypatch.setattr("flowdistill.config.loading.METHODS", registry)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "method: {name: toy}\n")
    return path


def sentence(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- texts


WRITTEN = ["2024_11_25", "0010", "1e3", "1.10", "0x10", "0b1", "0o17", "+5", ".5", ".inf", ".nan", "1_000", "12:30:00",
           "190:20:30.15", "2024-11-25", "2024-11-25 10:00:00", "no", "yes", "on", "off", "No", "TRUE", "false", "y",
           "n", "~/runs/a", "a=b", "1.0.0", "007", "-1", "1.", "café", "<new1>", "a b"]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_text_keeps_its_text(tmp_path: Path, good: Path, text: str) -> None:
    """However it comes: in an override, in a file or in its base, alone, in a list, in a mapping, and saved again."""
    texts = f"[{text}, '{text}', x]"
    overrides = [f"output_dir={text}", f"teacher.negative_prompt={text}", f"teacher.prompts={text}",
                 f"method.word={text}", f"method.words={texts}", f"method.table={{k: {text}}}"]
    base = tmp_path / "base.yaml"
    base.write_text(
        f"output_dir: {text}\nteacher:\n  source: s\n  negative_prompt: {text} # a remark\n  prompts: {text}\n"
        f"method:\n  name: toy\n  word: {text}\n  words: {texts}\n  table: {{k: {text}}}\n", encoding="utf-8")
    (tmp_path / "top.yaml").write_text("defaults_from: base.yaml\n")
    for config in (load_config(good, overrides), load_config(tmp_path / "top.yaml")):
        method = config.method
        assert (config.output_dir, config.teacher.negative_prompt, config.teacher.prompts) == (text,) * 3
        assert (method.word, method.words, method.table) == (text, [text, text, "x"], {"k": text})
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("text", [
    "blurry, #ugly", "a: b", "[V]", "[V] dog", "{a", "*x", "&x", "!x", "%x", "@x", "`x", "- x", "> x", "| x",
    "x: {y: [", "a # b", "? x", "it's", 'say "hi"', "a\tb", "a\u2028b"])
def test_an_override_needs_no_quotes(good: Path, text: str) -> None:
    config = load_config(good, [f"teacher.negative_prompt={text}", f"method.word= {text} "])
    assert (config.teacher.negative_prompt, config.method.word) == (text, text)


@pytest.mark.parametrize(("written", "text"), [
    ("'no'", "no"), ('"null"', "null"), ("'~'", "~"), ('""', ""), ("' x '", " x "), ('"a\\tb"', "a\tb"),
    ("'it''s'", "it's")])
def test_quotes_around_an_override_are_yamls(good: Path, written: str, text: str) -> None:
    assert load_config(good, [f"teacher.negative_prompt={written}"]).teacher.negative_prompt == text


def text_settings(config: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(key, whether null is allowed) of the settings that are one text of any kind."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, limits = getattr(config, item.name), item.metadata.keys()
        if dataclasses.is_dataclass(value):
            yield from text_settings(value, f"{prefix}{item.name}.")
        elif hints[item.name] in (str, str | None) and "help" in limits and limits.isdisjoint(("choices", "pattern")):
            yield prefix + item.name, hints[item.name] is not str


@pytest.mark.parametrize("method", ["dmd2", "echodistill", "data_flow_map"])
def test_no_setting_takes_the_working_folder_for_nothing(tmp_path: Path, method: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty path is the working folder, and nobody means that by writing nothing."""
    monkeypatch.setattr("flowdistill.config.loading.METHODS", METHODS)
    file = tmp_path / "run.yaml"
    file.write_text(GOOD + f"method: {{name: {method}}}\n")
    settings = method_config_class(method)
    filled = [f"method.{item.name}=x" for item in dataclasses.fields(settings) if item.default == MISSING]
    keys = dict(text_settings(RunConfig(method=settings())))
    assert {"output_dir", "teacher.source", "teacher.vae", "teacher.lora", "teacher.start", "teacher.prompts",
            "evaluation.reference", "evaluation.features", "teacher.negative_prompt"} <= keys.keys()
    for key, nullable in keys.items():
        override = f"{key}=''"
        if key == "teacher.negative_prompt":
            assert load_config(file, [*filled, override]).teacher.negative_prompt == ""
            continue
        instead = ", or set it to null" if nullable else ""
        said = sentence(file, *filled, override)
        assert said == f"'{key}' is an empty text; give one{instead} (in the override \"{override}\")"


def list_settings(config: Any, prefix: str = "") -> Iterator[str]:
    """Keys of the settings that are a list of texts of any kind."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, limits = getattr(config, item.name), item.metadata.keys()
        if dataclasses.is_dataclass(value):
            yield from list_settings(value, f"{prefix}{item.name}.")
        elif hints[item.name] in (list[str], list[str] | None) and limits.isdisjoint(("choices", "pattern")):
            yield prefix + item.name


@pytest.mark.parametrize("method", ["dmd2", "echodistill", "data_flow_map"])
def test_no_list_has_nothing_among_its_texts(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.config.loading.METHODS", METHODS)
    file = tmp_path / "run.yaml"
    file.write_text(GOOD + f"method: {{name: {method}}}\n")
    settings = method_config_class(method)
    filled = [f"method.{item.name}=x" for item in dataclasses.fields(settings) if item.default == MISSING]
    keys = list(list_settings(RunConfig(method=settings())))
    own = {"dmd2": "method.data_options.classes", "echodistill": "method.discriminators"}.get(method, keys[0])
    assert {"evaluation.more_metrics", "evaluation.scorers", own} <= set(keys)
    for key in keys:
        override = f"{key}=[a, '']"
        assert sentence(file, *filled, override) == (
            f"'{key}' has an empty text in it; leave that out (in the override \"{override}\")")


def test_null_is_no_text(good: Path, tmp_path: Path) -> None:
    for written in ("null", "~", "", "Null", "NULL"):
        assert load_config(good, ["method.maybe=x", f"method.maybe={written}"]).method.maybe is None
        assert "'method.word' must be text, not null" in sentence(good, f"method.word={written}")
        (tmp_path / "c.yaml").write_text(GOOD + f"method: {{name: toy, maybe: {written}}}\n")
        assert load_config(tmp_path / "c.yaml").method.maybe is None
    assert "'method.words' must be a list of texts, not ['a', None]" in sentence(good, "method.words=[a, ~]")


@pytest.mark.parametrize("override", [
    "method.words=a", "method.words=[a", "method.words=[[a]]", "method.words=[a: b]", "method.word='a' b",
    "method.word='a", "method.word=${nothing}"])
def test_what_is_no_such_text_is_refused(good: Path, override: str) -> None:
    text = sentence(good, override)
    assert f"'{override.split('=')[0]}'" in text or "is not valid YAML" in text


def test_what_is_no_text_is_what_yaml_says(good: Path) -> None:
    config = load_config(good, ["method.anything={a: no, b: 010, c: 1e3, d: 12:30, e: x}", "method.flag=yes",
                                "method.count=0010", "method.damping=1e-3", "seed=1_000"])
    assert config.method.anything == {"a": False, "b": "010", "c": 1000.0, "d": "12:30", "e": "x"}
    assert (config.method.flag, config.method.count, config.method.damping, config.seed) == (True, 10, 0.001, 1000)
    for override in ("method.count=12:30", "method.damping=1:30", "method.count=1e3", "method.count=no"):
        assert f"'{override.split('=')[0]}' must be" in sentence(good, override)


def test_names_of_methods_and_bases_are_texts(tmp_path: Path, good: Path) -> None:
    assert "'method.name' must be one of host, other, toy, not 'no'" in sentence(good, "method.name=no")
    (tmp_path / "0010").write_text(GOOD + "method: {name: toy}\n")
    (tmp_path / "top.yaml").write_text("defaults_from: 0010\nseed: 3\n")
    assert load_config(tmp_path / "top.yaml").seed == 3


def test_interpolation_goes_on_in_texts(good: Path) -> None:
    config = load_config(good, ["output_dir=runs/${method.name}-${seed}", "seed=4", "method.words=['${seed}', no]"])
    assert config.output_dir == "runs/toy-4" and config.method.words == ["4", "no"]


def test_every_text_of_every_method_is_known_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next text setting of another type (a union, a tuple, ...) must not slip through."""
    monkeypatch.undo()
    for name in METHODS:
        config = METHODS.get(name).Config
        if issubclass(config, HostingConfig):
            config = config.hosted("dmd2")
        for key, hint in leaf_types(RunConfig, config):
            assert is_textual(hint) == ("str" in str(hint) and "Any" not in str(hint)), (key, hint)


# --- another method above


def left_out(path: Path, *overrides: str) -> tuple[RunConfig, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = load_config(path, overrides)
    return config, [str(warning.message) for warning in said]


def test_settings_of_a_method_below_that_the_new_one_does_not_have_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "method:\n  name: toy\n  word: w\n  damping: 5\n  kind: flat\n"
                           "  optimizer: {lr: 0.5, eps: 1.0e-6}\n  critic_optimizer: {lr: 0.1}\n")
    config, said = left_out(path, "method.name=other", "method.sharpness=9")
    assert config.method == OtherConfig(sharpness=9, damping=5.0, optimizer=OptimizerConfig(lr=0.5, eps=1e-6))
    assert said == ["method.name is other (in the override 'method.name=other'), no longer toy; left out, because "
                    "other has none: method.word, method.kind, method.critic_optimizer"]
    assert left_out(path, "method.name=toy") == (load_config(path), [])


def test_the_same_in_files_that_build_on_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD + "method: {name: toy, word: w, damping: 3}\n")
    (tmp_path / "b.yaml").write_text("defaults_from: a.yaml\n"
                                     "method: {name: other, sharpness: 7, optimizer: {lr: 0.25}}\n")
    (tmp_path / "c.yaml").write_text("defaults_from: b.yaml\nmethod: {name: toy, words: [x]}\n")
    (tmp_path / "d.yaml").write_text("defaults_from: c.yaml\nmethod: {count: 4}\n")
    config, said = left_out(tmp_path / "b.yaml")
    assert (config.method.name, config.method.damping, config.method.sharpness) == ("other", 3.0, 7) and len(said) == 1
    assert f"(in {tmp_path / 'b.yaml'})" in said[0] and said[0].endswith("has none: method.word")
    config, said = left_out(tmp_path / "d.yaml")
    assert (config.method.word, config.method.words, config.method.count) == ("w", ["x"], 4)
    assert config.method.optimizer.lr == 0.25 and said[0].endswith("method.sharpness") and len(said) == 1


def test_what_stands_beside_or_above_the_name_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "method: {name: toy, word: w}\n")
    for overrides in (["method.name=other", "method.word=x"], ["method.word=x", "method.name=other"]):
        assert "unknown key 'method.word' (in the override 'method.word=x')" in sentence(path, *overrides)
    (tmp_path / "top.yaml").write_text("defaults_from: run.yaml\nmethod: {name: other, word: w}\n")
    assert f"unknown key 'method.word' (in {tmp_path / 'top.yaml'})" in sentence(tmp_path / "top.yaml")
    path.write_text(GOOD + "method: {word: w}\n")  # no method below to belong to
    assert f"unknown key 'method.word' (in {path})" in sentence(path, "method.name=other")


def test_the_same_for_the_method_of_a_method(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "method:\n  name: host\n  parts: 3\n  host: {name: toy, word: w, damping: 4}\n")
    config, said = left_out(path, "method.host.name=other")
    assert (config.method.parts, config.method.host) == (3, OtherConfig(damping=4.0))
    assert said[0].startswith("method.host.name is other") and said[0].endswith("method.host.word")
    config, said = left_out(path, "method.name=toy", "method.count=2")
    assert config.method == ToyConfig(count=2) and said[0].endswith("has none: method.parts, method.host")
    path.write_text(GOOD + "method: {name: toy, word: w, damping: 4}\n")
    config, said = left_out(path, "method.name=host", "method.host.name=toy", "method.host.damping=6")
    assert config.method.host == ToyConfig(damping=6.0) and said[0].endswith("method.word, method.damping")


def test_former_names_of_a_method_and_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "method: {name: another, friction: 5, sharpness: 1}\n")
    config, said = left_out(path, "method.name=other")
    assert (config.method.damping, config.method.sharpness) == (5.0, 1) and not any("left out" in text for text in said)
    path.write_text(GOOD + "method: {name: toy, word: w}\n")
    config, said = left_out(path, "method.name=another", "method.friction=3")
    assert config.method == OtherConfig(damping=3.0) and any(text.endswith("method.word") for text in said)


def test_the_shipped_files_take_every_other_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for file in ("digits/freeflow", "digits/boot", "digits/dmd2", "digits/disback"):
        for method in ("freeflow", "boot", "sid", "disback"):
            config, _ = left_out(Path(file), f"method.name={method}")
            assert config.method.name == method


# --- length


LONG = "x" * 5000


@pytest.mark.parametrize("override", [
    f"train.precision={LONG}", f"train.steps={LONG}", f"method.name={LONG}", f"{LONG}=3", f"train.{LONG}=3", LONG,
    f"train.trackers=[{LONG}]", f"train.device={LONG}", f"evaluation.solver={LONG}", f"method.words=[{LONG}",
    f"train.steps={'1' * 5000}", f"train.steps=[{', '.join('1' * 2000)}]", f"teacher.labels=[{LONG}]",
    f"seed={'9' * 4000}",
    f"teacher.dtype={'a b ' * 1000}", f"train={LONG}", f"method.optimizer.betas=[{', '.join('1' * 999)}]",
    f"output_dir=${{{LONG}}}", f"method.kind={LONG}", f"train.steps={{a: {LONG}}}",
])
def test_a_long_mistake_is_a_short_sentence(good: Path, override: str) -> None:
    assert len(sentence(good, override)) < 700


def test_a_long_path_is_a_short_sentence(cli) -> None:
    for arguments in (
        ["distill", LONG], ["distill", f"a/{LONG}.yaml"], ["inspect", LONG], ["evaluate", LONG], ["export", LONG, "x"],
        ["sample", LONG, "--out", "x.png"], ["sample", "x", "--out", "x.png", "--labels", LONG], [LONG],
        ["sample", "x", "--out", "y", "--seed", LONG], ["sample", "x", "--out", LONG], ["sample", "x", f"--{LONG}"],
        ["evaluate", "x", "--num-images", LONG], ["inspect", "x", LONG],
    ):
        result = cli(*arguments)
        assert result.code == 2 and result.err.count("\n") == 1 and len(result.err) < 800, result.err[:1000]


def test_many_allowed_keys_are_listed_in_part() -> None:
    assert listed(range(NAMES)) == ", ".join(map(str, range(NAMES)))
    assert listed(range(1000)) == f"{listed(range(NAMES))} and 984 more"
    assert len(listed([LONG] * 50)) < 2000
    assert shown("a") == "'a'" and shown("a" * 100, quoted=False).endswith(" (100 characters)")
    path = "/".join(["folder"] * 50)
    assert sentence_of(f"{path} is no folder") == f"{path} is no folder"
    assert str(UserError(f"{LONG} and {LONG} are two")).count("(5,000 characters)") == 2
    assert UserError(*UserError(LONG).args).args == UserError(LONG).args  # as processes send it to each other


def test_a_key_with_nothing_near_names_some_of_many(good: Path) -> None:
    text = sentence(good, "train.qqqqqq=1")
    assert "allowed in 'train': steps, batch_size" in text and text.endswith(" more (see 'flowdistill config toy')")
    near = sentence(good, "train.batch_sise=1")
    assert near.endswith("did you mean 'train.batch_size'? (see 'flowdistill config toy')")
