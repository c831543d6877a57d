"""Running a configuration to a finished run folder."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from flowdistill.conditioning.pipeline_lora import teacher_in_words
from flowdistill.conditioning.prompts import PromptConditions
from flowdistill.config import (
    RunConfig,
    TrainConfig,
    accept_former_names,
    load_config,
    save_config,
    validate,
)
from flowdistill.config.schema import MISSING
from flowdistill.evaluation import Report, evaluate
from flowdistill.evaluation.comparison import save_comparison
from flowdistill.evaluation.evaluate import is_teacher
from flowdistill.evaluation.metrics import ranking_metric
from flowdistill.evaluation.opening import OpenedEvaluation, open_evaluation
from flowdistill.export.card_data import CARD
from flowdistill.export.pipelines import check_exportable
from flowdistill.export.student_cards import write_student_card
from flowdistill.students import Student, describe, is_student_folder, load_student
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.teachers.loading import prompt_files, teacher_files
from flowdistill.teachers.weight_files import FILE as WEIGHTS
from flowdistill.teachers.weight_files import NamedFiles, check_weights, record_weights
from flowdistill.training.callbacks import METRICS, tracker_names
from flowdistill.training.checkpoint import checkpoints, read_state
from flowdistill.training.environment import FILE as ENVIRONMENT
from flowdistill.training.environment import record_start
from flowdistill.training.folder_lock import alone_in, check_is_folder
from flowdistill.training.loop import Trainer
from flowdistill.training.malloc import keep_freed_memory
from flowdistill.training.method import METHODS, Method
from flowdistill.training.optimizers import check_package, optimizers_by_key
from flowdistill.training.precision import resolve_precision
from flowdistill.training.stopping import KEY, Stopping
from flowdistill.utils.devices import usable_device
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.files import check_writable, disk_errors, local_path
from flowdistill.utils.logging import log_once, say
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import seed_torch
from flowdistill.utils.text import read_yaml
from flowdistill.utils.tf32 import tf32

REPORT = "report.json"
FINAL = Path("samples") / "final.png"
COMPARISON = Path("samples") / "comparison.png"
"""Written last of what shows a finished student; gone from the run folder as soon as training goes on."""
FILES = ("config.yaml", WEIGHTS, ENVIRONMENT, METRICS, REPORT, FINAL, COMPARISON, Path("checkpoints") / "state.json",
         Path("student") / "model.safetensors")
"""What a training writes; of folders with many files one of them."""
ADDED_TO = (ENVIRONMENT, METRICS)
FREE = frozenset(
    f"train.{name}"
    for name in (
        "steps log_every sample_every num_samples checkpoint_every keep_checkpoints evaluate_every max_nonfinite_steps "
        "trackers device gradient_checkpointing compile compile_scope keep_freed_memory stop_when ema_device"
    ).split()
) | {f"teacher.{name}" for name in "attention offload prompt_cache prompt_cache_gb text_encoder_device".split()}
"""Settings, and sections, that may change between a run and its resume: they do not decide what is learned, except the
number of steps and the patience with it, which a user may well raise."""
FREE_ANYWHERE = (".data_options.cache_latents", ".data_options.memory_gb")
"""The same of settings that methods have, by their ends."""


@dataclass
class Run:
    """What became of a call of ``distill``.

    Attributes:
        output_dir: the run folder.
        steps: training steps done, over all resumes.
        completed: whether ``train.steps`` was reached, or ``train.stop_when`` ended the run.
        interrupted: number of the signal that ended it early (15 SIGTERM, 2 SIGINT), else 0; the same command resumes.
        report: the evaluation, None when it was switched off or not reached.
        contents: what is in the folder now, in words.
    """

    output_dir: Path
    steps: int
    completed: bool
    interrupted: int = 0
    report: Report | None = None
    contents: str = "student/, samples/, metrics.jsonl, config.yaml"


def distill(config: str | os.PathLike[str] | RunConfig, overrides: Sequence[str] = ()) -> Run:
    """Distil a teacher as a configuration says; goes on by itself where an earlier call stopped.

    Under ``accelerate launch`` or ``torchrun`` all processes call this together and train one model.

    Args:
        config: a YAML file, or a configuration made in Python.
        overrides: ``key=value`` texts for a YAML file, e.g. ``train.steps=500``.

    Raises:
        UserError: bad configuration or teacher, an ``output_dir`` that holds another run or cannot be written, training
            that diverged.
    """
    if isinstance(config, RunConfig):
        if overrides:
            raise UserError("overrides go with a configuration file; change a RunConfig itself before passing it")
        validate(config)
    else:
        config = load_config(config, overrides)
    if config.train.stop_when is not None:
        ranking_metric(config.train.stop_when.metric, KEY)
    for _, optimizer in optimizers_by_key(config.method, "method."):
        check_package(optimizer)
    with tf32(config.train.tf32):
        several = method_class(config.method.name).distill(config)
        return distill_one(config) if several is None else several


def distill_one(config: RunConfig, opened: OpenedEvaluation | None = None, entered: bool = False) -> Run:
    """The run of one student; ``config`` has been checked.

    Args:
        opened: what the caller will measure the student with, where this run does not do it itself.
        entered: the caller is alone in the run folder already.
    """
    accelerator = make_accelerator(config.train, config.output_dir)
    with contextlib.nullcontext() if entered else alone_in(local_path(config.output_dir)):
        return _distill_alone(resolved(config, accelerator), accelerator, opened)


def _distill_alone(config: RunConfig, accelerator: Accelerator, opened: OpenedEvaluation | None) -> Run:
    processes, folder = Processes.current(), local_path(config.output_dir)
    same_evaluation = processes.on_main(lambda: check_folder(folder, config))
    processes.on_main(lambda: check_goes_on(folder))
    processes.on_main(lambda: check_files(folder))
    problem = method_class(config.method.name).check_length(config.method, config.train.steps)
    if problem is not None and accelerator.is_main_process:
        warnings.warn(problem, stacklevel=2)

    settings = config.teacher
    check_begun_with(folder, lambda: {**teacher_files(settings), **prompt_files(settings)})
    teacher = load_teacher(settings, device=accelerator.device, prepare=partial(prepare_prompts, accelerator))
    if teacher.prompts is not None and settings.prompts is None:
        raise UserError(f"the teacher {settings.source} takes prompts; set teacher.prompts to a file with one a line")
    if opened is None and not is_measured(folder, config, same_evaluation):
        opened = open_run_evaluation(config, teacher, accelerator)
    problem = teacher.disagreement()
    if problem is not None and accelerator.is_main_process:
        warnings.warn(f"teacher {settings.source}: {problem}", stacklevel=2)
    for remark in teacher.remarks():
        log_once(f"teacher {settings.source}: {remark}")
    seed_torch(config.seed)  # new layers start alike on every process
    method = method_class(config.method.name)(config.method, teacher)
    check_begun_with(folder, method.files)
    if method.student().num_steps == 1:  # a method of several steps has looked at these itself
        check_exportable(teacher)
    trainer = Trainer(method, config, folder, accelerator, None if opened is None else opened.reference)
    if opened is not None:
        opened.check_student(trainer.student())
    if not trainer.completed:
        method.check_start()
    before = trainer.step
    # The first that is written. Nothing is refused any more: that the files can be written has been looked at.
    processes.on_main(lambda: write_config(folder, config))
    keep_weights(folder, lambda: {**teacher.files(), **prompt_files(settings), **method.files()})
    if not trainer.completed:
        processes.on_main(lambda: withdraw_results(folder))
        processes.on_main(lambda: record_start(folder, before))
    trainer.train()
    run = Run(folder, trainer.step, trainer.completed, trainer.interrupted, contents=method.contents())
    # A run that was killed after its last checkpoint may still have the student of an earlier stop.
    outdated = trainer.step > before or not processes.on_main((folder / FINAL).is_file)
    if run.completed and not processes.on_main(lambda: method.outputs_complete(folder)):
        outdated = True
    if outdated:
        if run.completed:
            method.conclude(trainer.step, folder)
        trainer.take_best()
        save_student(trainer)
        if trainer.stopping is not None and accelerator.is_main_process:
            say(f"{_why_ended(trainer)}; student/ is {trainer.stopping.summary()}")
        if run.completed:
            processes.on_main(lambda: method.write_outputs(folder))
    if run.completed:
        if outdated:
            _save_comparison(trainer, teacher)
            trainer.save_samples(FINAL.name)
        if config.evaluation.at_end:
            chosen = {} if trainer.stopping is None else {
                "student_step": trainer.stopping.step, "student": trainer.stopping.summary()}
            reuse = not outdated and same_evaluation
            run.report = make_report(config, teacher, accelerator, reuse, opened, **chosen)
        if not method.own_cards:
            processes.on_main(lambda: _save_card(trainer, opened is not None))
    return run


def prepare_prompts(accelerator: Accelerator, prompts: PromptConditions) -> None:
    """Encode a run's prompts: those that stay in memory by one process, in whose file the others then find them."""
    if prompts.settings.mode == "auto":
        log_once(prompts.describe_bank())
    # The processes share the work on shards, each without waiting for another, and all load text encoders of their own
    # for what is encoded when it is drawn.
    with accelerator.main_process_first() if prompts.mode == "memory" else contextlib.nullcontext():
        prompts.prepare()


def _why_ended(trainer: Trainer) -> str:
    """Where training has ended and why, for the line that says which student is kept."""
    stopping, end = trainer.stopping, f"training ended at step {trainer.step}"
    if stopping is None or not stopping.exhausted:
        return end
    return f"{end}, after {stopping.waited} measurements without a better {stopping.config.metric} (train.stop_when)"


def open_run_evaluation(
    config: RunConfig, teacher: Teacher, accelerator: Accelerator, parts: Sequence[Sequence[int]] = ()
) -> OpenedEvaluation | None:
    """What a run will be measured with, at its end or while it trains; None where nothing is measured.

    Raises:
        UserError: see :func:`flowdistill.evaluation.opening.open_evaluation`.
    """
    if not config.evaluation.at_end and not config.train.evaluate_every:
        return None
    own = config.evaluation.features is not None and is_teacher(config.evaluation.reference, teacher)
    if config.evaluation.missing is not None and not own:
        log_once(config.evaluation.missing)
    stop = config.train.stop_when
    return open_evaluation(config.evaluation, teacher, accelerator.device, parts,
                           None if stop is None else stop.metric, KEY)


def is_measured(folder: Path, config: RunConfig, same_evaluation: bool) -> bool:
    """Whether a run folder holds a finished run with a report of the same evaluation."""
    return Processes.current().on_main(lambda: same_evaluation and has_ended(config) and (folder / REPORT).is_file())


def resolved(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """The configuration with the precision it comes to here."""
    precision = resolve_precision(config.train.precision, accelerator.device)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def make_accelerator(config: TrainConfig, output_dir: str | os.PathLike[str]) -> Accelerator:
    """The processes and the device of a run, without accelerate's own mixed precision.

    "auto" is a CUDA or XPU device when there is one, else the CPU (Apple's GPU has no float64, which the path's
    coefficients need). On the CPU several processes talk through gloo, whatever started them.

    Raises:
        UserError: a device this machine does not have (of training or of the average), one GPU for several processes,
            or an unknown tracker.
    """
    wanted, output_dir = config.device, local_path(output_dir)
    if wanted == "auto":
        wanted = next((kind for kind in ("cuda", "xpu") if _available(kind)), "cpu")
    kind, _, number = wanted.partition(":")
    if not _available(kind):
        raise UserError(f"train.device is '{config.device}', which this machine does not have; use auto or cpu")
    if number:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"train.device is '{wanted}', but several processes were started; use cuda, and each has its own GPU"
            )
        if int(number) >= torch.cuda.device_count():
            raise UserError(f"train.device is '{wanted}', but this machine has {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(int(number))
    usable_device(config.ema_device, "train.ema_device")
    names = tracker_names(config)
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=kind == "cpu",
        log_with=names or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        # Buffers are not sent round at every pass: that would change them between two passes of one loss.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.device.type != kind:
        raise UserError(f"train.device is '{wanted}', but accelerate was started on {accelerator.device.type}")
    if kind == "cpu" and config.keep_freed_memory:
        keep_freed_memory()
    if accelerator.num_processes > 1:
        # For callers from Python (commands end by leave): nccl complains when it is left open, gloo aborts more often.
        atexit.register(leave_group)
    return accelerator


def leave_group() -> None:
    """Close the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def difference(saved: Mapping[Any, Any], config: Mapping[Any, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that decides what is learned and differs: (key, saved value, value now).

    Settings that the saved configuration does not have do not count here, see :func:`newer_difference`.
    """
    here = dict(_leaves(config))
    # The method's name first: with another one all its settings differ.
    for key, value in sorted(_leaves(saved), key=lambda leaf: leaf[0] != "method.name"):
        if not _is_free(key) and (key not in here or here[key] != value):
            return key, value, here.get(key)
    return None


def newer_difference(
    saved: Mapping[Any, Any], config: Any, usual: Any = None, prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """The first setting that the saved configuration does not have, because an older version wrote it, and that is not
    at its default, which stands for what that version did: (key, default, value now).

    Args:
        config: the settings, or a section of them.
        usual: the section as it is by default; None: as its class has it.
    """
    for item in dataclasses.fields(config):
        key, value, there = prefix + item.name, getattr(config, item.name), saved.get(item.name)
        default = _default(item) if usual is None else getattr(usual, item.name)
        if _is_free(key):
            continue
        if dataclasses.is_dataclass(value) and (isinstance(there, Mapping) or type(default) is type(value)):
            section = there if isinstance(there, Mapping) else {}
            found = newer_difference(section, value, default if type(default) is type(value) else None, f"{key}.")
            if found is not None:
                return found
        elif item.name not in saved and default != MISSING and value != default:
            return key, default, value
    return None


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return MISSING if item.default is dataclasses.MISSING else item.default


def _is_free(key: str) -> bool:
    """Whether a setting may change between a run and its resume."""
    return key.split(".")[0] in ("output_dir", "evaluation", "started_in") or key.endswith(FREE_ANYWHERE) or (
        not FREE.isdisjoint((key, key.rpartition(".")[0])))


def has_begun(folder: Path) -> bool:
    """Whether a run, or one of several in its folder, has saved anything that another configuration would spoil."""
    return any(path for pattern in ("", "*/") for name in ("checkpoints/step-*", "student")
               for path in folder.glob(pattern + name))


def check_folder(folder: Path, config: RunConfig, begun: bool = False) -> bool:
    """UserError unless the run folder is free or holds this run; tells whether its ``evaluation`` is the same.

    Args:
        begun: it is not free, whatever is saved in it: a job that shares it is at work.
    """
    from omegaconf import OmegaConf

    file, same = folder / "config.yaml", False
    check_is_folder(folder)
    if file.is_file() and (begun or has_begun(folder)):
        try:
            saved = read_yaml(file)
        except UserError as error:
            raise UserError(f"{file} is damaged, so it is unknown whether {folder} holds this run; choose another "
                            f"output_dir ({error})") from error
        here = OmegaConf.to_container(OmegaConf.structured(config))
        if isinstance(saved, dict):
            accept_former_names(saved, type(config.method))
        if not isinstance(saved, dict) or not isinstance(here, dict):
            raise UserError(f"{file} is no configuration of a run; choose another output_dir")
        if (found := difference(saved, here) or newer_difference(saved, config)) is not None:
            key, old, new = found
            raise UserError(
                f"{folder} holds another run: {key} is {shown(old, quoted=False)} there and {shown(new, quoted=False)} "
                "here; choose another output_dir, or make them equal to resume"
            )
        same = saved.get("evaluation") == here["evaluation"]
    elif checkpoints(folder / "checkpoints"):
        raise UserError(
            f"{folder} holds checkpoints but no config.yaml, so it is unknown whether they are this run's; "
            "choose another output_dir"
        )
    return same


def check_goes_on(folder: Path) -> None:
    """Refuse a run folder with what an earlier training came to and no checkpoint: it would be trained from the start,
    and replaced.

    A training that has not come so far as its first checkpoint has left none of these files.

    Raises:
        UserError: so.
    """
    if checkpoints(folder / "checkpoints"):
        return
    student = folder / "student"
    found = ["student/"] if student.is_dir() and any(student.iterdir()) else []
    found += [str(name) for name in (FINAL, REPORT) if (folder / name).is_file()]
    if found:
        raise UserError(f"{folder} has {listed(found)} of an earlier training and no checkpoint to go on from, and a "
                        "training from the start would replace them; choose another output_dir, or remove the folder")


def check_files(folder: Path, names: Iterable[str | Path] = FILES) -> None:
    """Refuse a folder in which a run could not write these files, before it writes any of them.

    Raises:
        UserError: so.
    """
    for file in (folder / name for name in names):
        if file.is_dir():
            raise UserError(f"{file} is a folder, and a run has a file of this name; move it away, or choose another "
                            "output_dir")
        check_writable(file)
        if file.name in ADDED_TO and file.exists():
            with disk_errors(str(file)), open(file, "a+b"):
                pass


def check_begun_with(folder: Path, files: Callable[[], NamedFiles]) -> None:
    """UserError where the run in a folder has begun with other files than the settings name now; all processes call
    this together."""
    remedy = "or choose another output_dir"
    Processes.current().on_main(lambda: check_weights(folder, files, remedy) if has_begun(folder) else None)


def keep_weights(folder: Path, files: Callable[[], NamedFiles]) -> None:
    """Record the files that a run begins with, or, of one of an older version, goes on with; all processes call this
    together."""
    def record() -> None:
        if not (folder / WEIGHTS).is_file() or not has_begun(folder):
            record_weights(folder, files())

    Processes.current().on_main(record)


def write_config(folder: Path, config: RunConfig) -> None:
    """Write a run's settings to its folder, with the working directory, which its relative paths are relative to."""
    config = dataclasses.replace(config, started_in=os.getcwd())
    with disk_errors(str(folder / "config.yaml")):
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")


def withdraw_results(folder: Path) -> None:
    """Remove what shows the student of an earlier end: after a kill it must not pass for the new one's."""
    with disk_errors(str(folder)):
        for file in (FINAL, COMPARISON, REPORT):
            (folder / file).unlink(missing_ok=True)


def save_student(trainer: Trainer) -> None:
    student, target = trainer.student(), trainer.folder / "student"

    def save() -> None:
        with disk_errors(str(target)):
            student.save(target)

    Processes.current().on_main(save)


def _save_card(trainer: Trainer, anew: bool) -> None:
    """The student's model card, with the run's figures; one that is there stays unless they are new."""
    student, target = trainer.student(), trainer.folder / "student"
    # A method from elsewhere may have a student of its own kind, of which a card would have nothing to say.
    if isinstance(student, Student) and (anew or not (target / CARD).is_file()):
        with disk_errors(str(target / CARD)):
            write_student_card(target, student, trainer.folder)


def _save_comparison(trainer: Trainer, teacher: Teacher) -> None:
    """Teacher at many calls and at one beside the student at one, from the same noise."""
    student, path = trainer.student(), trainer.folder / COMPARISON

    def save() -> None:
        with disk_errors(str(path)):
            save_comparison(teacher, student, path)

    Processes.current().on_main(save)


def make_report(
    config: RunConfig, teacher: Teacher, accelerator: Accelerator, reuse: bool, opened: OpenedEvaluation | None = None,
    **protocol: object,
) -> Report:
    """Evaluate a finished run, write its report and print it.

    Args:
        reuse: read the report that is there, if it is.
        opened: what it is measured with, as it was opened before training.
        protocol: what its protocol says besides.
    """
    file = local_path(config.output_dir) / REPORT
    if reuse and file.is_file():
        report = Report.read_json(file)
    else:
        found = None if opened is None else opened.reference
        given: dict[str, Any] = {} if found is None else {"reference": found}
        if config.evaluation.features is None:
            # No more at once than training had: a speed is not worth running out of memory for.
            rows = config.train.batch_size // config.train.gradient_accumulation // accelerator.num_processes
            given["batch_size"] = max(1, min(rows, config.evaluation.batch_size))
        report = evaluate(config.output_dir, teacher=teacher, device=accelerator.device, **given)
        report.protocol |= protocol

        def write() -> None:
            with disk_errors(str(file)):
                report.write_json(file)

        Processes.current().on_main(write)
    if accelerator.is_main_process:
        print(report)
    return report


def describe_run(folder: str | os.PathLike[str]) -> str:
    """A run folder in words: how far it is, its teacher, and its student where there is one.

    Raises:
        UserError: its configuration or its student is damaged.
    """
    folder = local_path(folder)
    config = load_config(folder / "config.yaml")
    found, trained = checkpoints(folder / "checkpoints"), is_student_folder(folder)
    state = "" if trained else ", no checkpoint yet"  # several students have theirs in folders of their own
    if found:
        state = f", step {found[-1][0]} of {config.train.steps}, in {found[-1][1]}"
        stopping = stopping_of(config, found[-1][1])
        if stopping is not None:
            state += f"{', stopped by train.stop_when' if stopping.exhausted else ''}; kept is {stopping.summary()}"
    lines = [f"run           {config.method.name}{state}", f"teacher       {teacher_in_words(config.teacher)}"]
    lines.append(describe(load_student(folder)) if trained else
                 "student       none yet; it is written when training stops")
    return "\n".join(lines)


def stopping_of(config: RunConfig, checkpoint: Path) -> Stopping | None:
    """What ``train.stop_when`` has come to at a checkpoint of a run; None without it, or before its first measurement.

    Raises:
        UserError: a damaged checkpoint.
    """
    state = None if config.train.stop_when is None else read_state(checkpoint).get("stopping")
    if config.train.stop_when is None or state is None:
        return None
    stopping = Stopping(config.train.stop_when, config.evaluation)
    stopping.load_state_dict(state, main=False)
    return None if stopping.step is None else stopping


def has_ended(config: RunConfig) -> bool:
    """Whether a run folder holds a run of the loop that has come to the end that ``config.train`` sets."""
    found = checkpoints(local_path(config.output_dir) / "checkpoints")
    if not found:
        return False
    step, path = found[-1]
    if step >= config.train.steps:
        return True
    stopping = stopping_of(config, path)
    return stopping is not None and stopping.exhausted


def method_class(name: str) -> type[Method]:
    """The class of a registered method."""
    return METHODS.get(name)


def _available(kind: str) -> bool:
    if kind in ("cuda", "xpu"):
        return getattr(torch, kind).is_available()
    return kind == "cpu" or torch.backends.mps.is_available()


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
