"""A first configuration for a pipeline: what it is, what a method wants of it, and what fits the card, with reasons."""

from __future__ import annotations

import inspect
import re
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch

from flowdistill.config import METHODS, RunConfig, TeacherConfig, load_config
from flowdistill.config.listing import as_yaml_value, method_settings, run_settings_of
from flowdistill.config.loading import given_method, given_settings
from flowdistill.config.registry import usable_methods
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.plan.advice import GIB, RESERVED, advise, fits
from flowdistill.plan.memory import make_plan
from flowdistill.plan.meta_teacher import Architecture, meta_teacher, read_architecture
from flowdistill.teachers import Teacher
from flowdistill.training.method import About, Method, Suggestion, facts_of
from flowdistill.training.optimizers import optimizers_by_key
from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.logging import quiet_libraries
from flowdistill.utils.quantized import parameter_count
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import dump_yaml, parse_yaml

LARGE = 100e6
"""Parameters from which a network is trained in half precision, with small rates and for long."""
WIDTH = 100
T = TypeVar("T")


@dataclass
class Start:
    """A first configuration.

    Attributes:
        settings: in the order in which they are written.
        missing: the keys that have to be set by hand, with their help texts.
        remarks: what was found, in words, for the top of the file.
    """

    settings: list[Suggestion]
    missing: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """By key."""
        return {each.key: each.value for each in self.settings}

    def set(self, key: str, value: object, reason: str) -> None:
        """Give a setting a value, in the place that it has, or behind the others of its section. It replaces the
        section that it is in or that it stands for."""
        self.settings = [each for each in self.settings
                         if not each.key.startswith(f"{key}.") and not key.startswith(f"{each.key}.")]
        for number, each in enumerate(self.settings):
            if each.key == key:
                self.settings[number] = Suggestion(key, value, reason)
                return
        self.settings.append(Suggestion(key, value, reason))

    def text(self, title: str) -> str:
        """The file, with ``title`` as its first line."""
        lines = [f"# {_one_line(title)}"]
        for remark in self.remarks:
            lines += [f"# {line}" for line in textwrap.wrap(_one_line(remark), WIDTH, break_on_hyphens=False)]
        tree: dict[str, Any] = {}
        for each in self.settings:
            node, *parts = tree, *each.key.split(".")
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = each
        return "\n".join([*lines, "", *_lines(tree, 0)]) + "\n"


def _one_line(text: str) -> str:
    """A text that stays inside one comment of YAML: names of files have line breaks and control characters too."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in " ".join(text.split()))


def _lines(tree: dict[str, Any], depth: int) -> list[str]:
    lines, left = [], "  " * depth
    for name, node in tree.items():
        if isinstance(node, dict):
            lines += [f"{left}{name}:", *_lines(node, depth + 1)]
            continue
        lines += [f"{left}# {line}" for line in textwrap.wrap(_one_line(node.reason), WIDTH, break_on_hyphens=False)]
        lines.append(f"{left}{name}: {as_yaml_value(_whole(node.value))}")
    return lines


def _whole(value: object) -> object:
    """Numbers that are whole as they are written by hand: 399 for 399.0."""
    if isinstance(value, (list, tuple)):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def start(
    source: str, method: str | None = None, gpu_memory: float | None = None, overrides: Sequence[str] = ()
) -> Start:
    """A first configuration for the pipeline at ``source``.

    Args:
        source: a pipeline folder, a hub id, of which the configurations alone are downloaded, or one of those of which
            flowdistill has a description.
        method: its name; None: the usual one.
        gpu_memory: GiB of the card that it is to fit; None: of the first one here, if there is one.
        overrides: settings, ``key=value``, that are given; they are written in the place of what would be chosen.

    Raises:
        UserError: no pipeline there, one that cannot be a teacher, no such method, or an override that is malformed,
            that a run would refuse, or that contradicts ``source`` or ``method``.
    """
    name, kind, why = _method(_asked(method, overrides))
    host = given_method(overrides, "method.host")
    given = given_settings(overrides, method_settings(name, host))
    if given.setdefault("teacher.source", source) != source:
        raise UserError(f"the configuration is for {source}, and an override sets teacher.source to "
                        f"{shown(given['teacher.source'])}; give that as TEACHER")
    architecture = configurations(source)
    with quiet_libraries():
        teacher = meta_teacher(_teacher_settings(source, overrides), architecture, listed=False)
    found = Start([Suggestion("output_dir", f"runs/{_short(source)}-{name}", "where the run is kept; the same command "
                                                                            "resumes there")])
    found.remarks += [_in_words(teacher, architecture), why]
    sentence = _of_method(name, lambda: facts_of(kind)).sentence
    found.settings.append(Suggestion("seed", 0, ""))
    suggested = _suggested(name, kind, teacher, architecture)
    large = parameter_count(_backbone(teacher)) >= LARGE
    found.settings += _teacher(source, teacher, large)
    found.settings += [each for each in suggested if each.key.startswith("teacher.")]
    found.settings.append(Suggestion("method.name", name, sentence))
    found.settings += [each for each in suggested if each.key.startswith("method.")]
    host = host or (str(found.values["method.host.name"]) if "method.host.name" in found.values else None)
    _add_missing(found, name, host, given)
    _add_training(found, method_settings(name, host), large)
    _check(found, overrides)
    for key, value in given.items():
        if key not in ("teacher.source", "method.name"):
            found.set(key, value, "given")
    _in_sections(found)
    _fit(found, gpu_memory, given)
    return found


def configurations(source: str) -> Architecture:
    """What a pipeline is made of; of a hub id that is not in the cache the configurations are downloaded, no weights.

    Raises:
        UserError: it is neither here nor there.
    """
    try:
        return read_architecture(source)
    except UserError:
        if find_path(source).exists() or source.count("/") != 1:
            raise
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(source, allow_patterns=["*.json"])
        except Exception as error:  # no network, no such repository, a gate: each has a class of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"teacher source {source} is no pipeline folder here, and the hub does not give its "
                            f"configurations: {reason}") from error
        return read_architecture(source)


def _asked(method: str | None, overrides: Sequence[str]) -> str | None:
    """The method that was asked for, by the option or an override."""
    named = given_method(overrides)
    if method is not None and named is not None and METHODS.current_name(method) != named:
        raise UserError(f"--method {method} and the override of method.name to {named} name two methods; give one")
    return method if named is None else named


def _teacher_settings(source: str, overrides: Sequence[str]) -> TeacherConfig:
    """The teacher's settings with those overrides that are of them, checked."""
    own = [text for text in overrides if re.match(r"teacher\s*[.=]", text)]
    return _loaded({"teacher": {"source": source}, "method": {"name": _method(None)[0]}}, own).teacher


def _loaded(values: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """The run of a configuration with these values."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump_yaml({"output_dir": "runs/first", **values}), encoding="utf-8")
        return load_config(file, overrides)


def _check(found: Start, overrides: Sequence[str]) -> None:
    """Refuse overrides that a run with the settings would refuse; what is missing yet may be."""
    values: dict[str, Any] = {}
    for each in found.settings:
        node, *parts = values, *each.key.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = list(each.value) if isinstance(each.value, tuple) else each.value
    try:
        _loaded(values, overrides)
    except UserError as error:
        if not any(str(error).startswith(f"'{key}' is missing") for key in found.missing):
            raise


def _suggested(name: str, kind: type, teacher: Teacher, architecture: Architecture) -> list[Suggestion]:
    """What a method says of its settings for a teacher."""
    if not issubclass(kind, Method):
        return []
    guidance = _usual_guidance(teacher, architecture)
    return _of_method(name, lambda: [Suggestion(*each) for each in kind.suggest(teacher, guidance)])


def _of_method(name: str, told: Callable[[], T]) -> T:
    """What a method tells of itself, or that it fails at that."""
    try:
        return told()
    except UserError:
        raise
    except Exception as error:  # a method may come from anywhere
        raise UserError(f"the method {name} fails at saying what it is or what it suggests ({type(error).__name__}: "
                        f"{error}); its author has to mend that, and 'flowdistill config {name}' lists its settings"
                        ) from error


def _in_sections(found: Start) -> None:
    """Bring the settings into the order of their sections."""
    order = ("output_dir", "seed", "teacher", "method", "train", "evaluation")
    found.settings.sort(key=lambda each: (*order, each.key.partition(".")[0]).index(each.key.partition(".")[0]))


def _method(name: str | None) -> tuple[str, type, str]:
    """The name and the class of a method, and why it is this one."""
    if name is not None:
        method_settings(name)  # says which there are
        return name, METHODS.get(name), f"The method {name} was asked for; 'flowdistill methods' lists the others."
    for each, kind in usable_methods():
        if isinstance(about := getattr(kind, "about", None), About) and (usual := about.usual):
            return each, kind, (f"The method {each} was chosen, because {usual}; 'flowdistill methods' lists the "
                                "others, and --method takes one.")
    raise UserError("no method is the usual one here; name one with --method, as 'flowdistill methods' lists them")


def _short(source: str) -> str:
    """The last part of a path or hub id, fit for the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.rstrip("/\\")).name).strip("-.") or "teacher"


def _backbone(teacher: Teacher) -> torch.nn.Module:
    network = teacher.network
    return network.backbone if isinstance(network, VelocityNetwork) else network


def _in_words(teacher: Teacher, architecture: Architecture) -> str:
    """The pipeline in one sentence."""
    count = parameter_count(_backbone(teacher)) / 1e6
    told = "takes neither labels nor prompts"
    if teacher.prompts is not None:
        told = "takes prompts"
    elif teacher.classes is not None:
        null = "no null label" if teacher.null_label is None else f"null label {teacher.null_label}"
        told = f"takes class labels 0 to {teacher.classes.num_classes - 1}, {null}"
    return (f"The teacher is a {architecture.pipeline} with a {type(_backbone(teacher)).__name__} of "
            f"{count:,.{0 if count >= 100 else 2}f} M parameters; it predicts {teacher.path.prediction} "
            f"({teacher.path.scheduler_name}), makes samples of {' x '.join(map(str, teacher.shape))} and {told}.")


def _usual_guidance(teacher: Teacher, architecture: Architecture) -> float | None:
    """The guidance scale of the pipeline's own call, 1 being none; None where it has none that is known."""
    network = teacher.network
    pipeline = getattr(diffusers, architecture.pipeline, None)
    if teacher.prompts is None or pipeline is None or not isinstance(network, VelocityNetwork):
        return None
    facts = network.family.pipelines.get(architecture.pipeline)
    off = "" if facts is None else facts.no_guidance
    argument, _, none = (off or "guidance_scale=1").partition("=")
    parameter = inspect.signature(pipeline.__call__).parameters.get(argument)
    if parameter is None or not isinstance(parameter.default, (int, float)):
        return None
    return float(parameter.default) + 1 - float(none)


def _teacher(source: str, teacher: Teacher, large: bool) -> list[Suggestion]:
    found = [Suggestion("teacher.source", source, "")]
    if teacher.prompts is not None:
        found.append(Suggestion("teacher.prompts", "prompts.txt",
                                "the prompts that the student learns, one a line; a .jsonl, .csv or .parquet file or "
                                "a folder of pictures with captions will do too"))
    if teacher.classes is not None and teacher.null_label is None:
        found.append(Suggestion("teacher.null_label", None,
                                "the label that means 'no class', where the teacher was trained with one: without it "
                                "there is no guidance"))
    if large:
        found.append(Suggestion("teacher.dtype", "bfloat16", "precision of the frozen weights"))
    return found


def _add_missing(found: Start, name: str, host: str | None, given: dict[str, object]) -> None:
    """Write settings without a default, which nobody has set, for the user to fill in."""
    for each in run_settings_of(method_settings(name, host)):
        if each.required and each.active and each.key not in found.values and each.section is None:
            if each.key not in given:
                found.missing[each.key] = each.help
                found.settings.append(Suggestion(each.key, each.default, f"{each.help}; has to be set"))


def _add_training(found: Start, method: type, large: bool) -> None:
    steps, rows = (10_000, 32) if large else (2000, 64)
    found.settings += [
        Suggestion("train.steps", steps, "a start: the pictures in the run folder's samples/ say whether more help"),
        Suggestion("train.batch_size", rows, "of one optimiser step, over all processes and accumulation"),
    ]
    if large:
        found.settings.append(Suggestion("train.precision", "bf16", "of the networks' passes; weights stay float32"))
        for key, _ in _optimizers(method):
            found.settings.append(Suggestion(f"{key}.lr", 1e-5, "peak learning rate for a network of this size; for "
                                                                "adapters (LoRA) 5e-5"))
    found.settings += [
        Suggestion("train.sample_every", 250, "steps between grids of samples"),
        Suggestion("train.checkpoint_every", 500, "steps between the places at which a run resumes"),
        Suggestion("evaluation.at_end", False,
                   "true measures the student when it is done; set evaluation.features and evaluation.reference too, "
                   "such as inception and a folder of images"),
    ]


def _optimizers(method: type) -> list[tuple[str, object]]:
    """Keys and settings of the optimisers; a section that is null by default has none."""
    return list(optimizers_by_key(method(), "method."))


def _fit(found: Start, gpu_memory: float | None, given: dict[str, object]) -> None:
    """Add what a plan advises for the card, or say why none was made."""
    whose = f"{gpu_memory:g} GiB" if gpu_memory is not None else ""
    if gpu_memory is None:
        if not torch.cuda.is_available():
            found.remarks.append("Whether it fits a card was not looked at: --gpu-memory GIB asks for that, as does "
                                 "'flowdistill plan'.")
            return
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / GIB
        whose = f"{gpu_memory:.0f} GiB, this machine's card"
    if found.missing:
        found.remarks.append(f"Whether it fits {whose} was not looked at, for {', '.join(found.missing)} must be set "
                             f"first; then run 'flowdistill plan' with --gpu-memory {gpu_memory:.0f}.")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(found.text("a plan"), encoding="utf-8")
        with quiet_libraries():
            plan = make_plan(load_config(file))
            steps = [] if fits(plan, gpu_memory) else advise(file, (), plan, gpu_memory)
    last = steps[-1].plan if steps else plan
    for step in steps:
        for text in step.overrides:
            key, _, value = text.partition("=")
            if key not in given:
                found.set(key, parse_yaml(value, f"the advice {text}"), f"{step.words}, to fit {gpu_memory:.0f} GiB")
    for key in [key for key, value in found.values.items() if value == "lora"]:  # of a student or a critic
        rate = f"{key.rpartition('.')[0]}.{'critic_' if key.endswith('.critic') else ''}optimizer.lr"
        if rate in found.values and rate not in given:
            found.set(rate, 5e-5, "peak learning rate for adapters (authors of DMD2 for SDXL: 5e-5)")
    _in_sections(found)
    peak = f"The peak is estimated as {last.peak / GIB:.2f} GiB, and {RESERVED:g} more goes to driver and allocator"
    if fits(last, gpu_memory):
        found.remarks.append(f"{peak}: it fits {whose}.")
    else:
        found.remarks.append(f"{peak}: it does not fit {whose} with all that helps; 'flowdistill plan' with --cards "
                             "says what would do on several cards.")
