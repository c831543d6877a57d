"""Several runs that belong together: the students of MSD, their shared start, and the manifest that makes them one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from flowdistill.conditioning.prompt_lists import in_parts
from flowdistill.config import RunConfig, TeacherConfig, TrainConfig
from flowdistill.evaluation import Report
from flowdistill.evaluation.comparison import save_comparison
from flowdistill.evaluation.opening import OpenedEvaluation
from flowdistill.export.card_data import CARD
from flowdistill.export.student_cards import write_student_card
from flowdistill.methods.msd.partition import CLASS_RULES, PROMPT_RULES, Partition, pooled, split_classes
from flowdistill.methods.msd.settings import MsdConfig
from flowdistill.methods.msd.student import write_manifest
from flowdistill.methods.teacher_score_matching import TeacherScoreMatching
from flowdistill.students import is_student_folder, load_student
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.teachers.loading import prompt_files, teacher_files
from flowdistill.teachers.weight_files import FILE as WEIGHTS
from flowdistill.teachers.weight_files import NamedFiles
from flowdistill.training.callbacks import save_samples
from flowdistill.training.checkpoint import checkpoints
from flowdistill.training.folder_lock import alone_in, in_turn, is_in_use
from flowdistill.training.run import (
    COMPARISON,
    FINAL,
    REPORT,
    Run,
    check_begun_with,
    check_files,
    check_folder,
    check_goes_on,
    distill_one,
    has_begun,
    has_ended,
    keep_weights,
    make_accelerator,
    make_report,
    open_run_evaluation,
    resolved,
    withdraw_results,
    write_config,
)
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, disk_errors, local_path
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import mixed_seed, seed_torch
from flowdistill.utils.text import read_json_object

PARTITION = "partition.json"
START = "tsm"
"""The run folder of the shared start."""
FILES = ("config.yaml", WEIGHTS, PARTITION, REPORT, FINAL, COMPARISON)
"""What all students together have."""
AT_ONCE = 4096
"""Prompts whose embeddings are in memory together."""


def distill_students(config: RunConfig) -> Run:
    """Train all students of a checked MSD configuration in turn, or one, and finish when all are there.

    Each is an ordinary run folder ``student-<k>``; whatever is complete is passed over, so the same command goes on at
    the student and step where it stopped. Once every student is complete, by whatever jobs, the manifest, the samples
    and the report are written.

    Raises:
        UserError: as ``distill``; a shared start that is not there when one student alone is asked for.
    """
    accelerator = make_accelerator(config.train, config.output_dir)
    folder = local_path(config.output_dir)
    with contextlib.ExitStack() as work:
        beginning = work.enter_context(contextlib.ExitStack())
        beginning.enter_context(in_turn(folder))
        return _distill_in_turn(resolved(config, accelerator), accelerator, beginning, work)


def _distill_in_turn(
    config: RunConfig, accelerator: Accelerator, beginning: contextlib.ExitStack, work: contextlib.ExitStack
) -> Run:
    """What :func:`distill_students` does, of which no other job of the folder does the first part at the same time.

    Args:
        beginning: closed as soon as another job may begin: when all that they share is written.
        work: closed when this job has ended.
    """
    folder, processes, only = local_path(config.output_dir), Processes.current(), config.method.student_index
    # Which student a job trains is no property of the run: K jobs share its folder.
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, student_index=None))
    # Before it has saved anything, another job holds the folder to its settings by being at work.
    begun = processes.on_main(lambda: has_begun(folder) or any(map(is_in_use, [folder, *_folders_of_jobs(folder)])))
    same_evaluation = processes.on_main(lambda: check_folder(folder, config, begun))
    processes.on_main(lambda: check_files(folder, FILES))

    def files() -> NamedFiles:
        return {**teacher_files(config.teacher), **prompt_files(config.teacher)}

    check_begun_with(folder, files)
    partition = processes.on_main(lambda: _partition(config, folder, accelerator.device, begun))
    start, runs = score_matching_run(config), [student_runs(config, partition, k) for k in range(partition.count)]
    # Entered before the others may begin, and for as long as the job takes, whatever other folders its stages have.
    own = folder
    if only is not None:
        own = local_path(runs[only][-1].output_dir if start is None or only >= 0 else start.output_dir)
    work.enter_context(alone_in(own))

    def complete(run: RunConfig) -> bool:
        return processes.on_main(lambda: is_complete(run))

    if start is not None and only is not None and only >= 0 and not complete(start):
        raise UserError(f"{start.output_dir}, the students' shared start, is not complete; train it first, with "
                        "method.student_index=-1")
    # -1: the start only.
    chosen = range(partition.count) if only is None else [] if only < 0 else [only]
    plan = [] if start is None else [("the students' shared start", start)]
    plan += [(f"student {k} of {partition.count}", run) for k in chosen for run in runs[k]]
    for _, run in plan:
        if not complete(run):
            processes.on_main(partial(check_goes_on, local_path(run.output_dir)))
    opened = None
    measured = same_evaluation and processes.on_main((folder / REPORT).is_file)
    if not measured or not all([complete(run) for mine in runs for run in mine]):
        opened = _open_evaluation(config, partition, accelerator)
    processes.on_main(lambda: _write(config, folder, partition))
    keep_weights(folder, files)
    beginning.close()
    steps, trained = 0, False
    for name, run in plan:
        if complete(run):
            steps += _steps_done(run)
            continue
        if accelerator.is_main_process:
            print(f"{name}: {run.output_dir}", flush=True)
        if run is start and config.method.score_matching_steps == 0:
            _save_untrained(run)
            continue
        processes.on_main(lambda: withdraw_results(folder))
        done = distill_one(run, None if run is start else opened, entered=local_path(run.output_dir) == own)
        steps, trained = steps + done.steps, True
        if not done.completed:
            return Run(folder, steps, False, done.interrupted)
    missing = [str(k) for k, mine in enumerate(runs) if not all([complete(one) for one in mine])]
    if missing:
        contents = f"the students asked for; the manifest follows when {' and '.join(missing)} are there too"
        return Run(folder, steps, False, contents=contents)
    reuse = same_evaluation and not trained
    contents = f"flowdistill.json (the manifest), {partition.count} students, samples/, config.yaml"
    report = _finish(config, partition, accelerator, reuse, opened)
    return Run(folder, steps, True, report=report, contents=contents)


def _open_evaluation(config: RunConfig, partition: Partition, accelerator: Accelerator) -> OpenedEvaluation | None:
    """What all students together will be measured with, and each alone while it trains."""
    if not config.evaluation.at_end and not config.train.evaluate_every:
        return None
    alone = config.train.evaluate_every > 0 and partition.prompts is None and partition.count > 1
    parts = [partition.labels(part) for part in range(partition.count)] if alone else []
    return open_run_evaluation(config, load_teacher(config.teacher, device=accelerator.device), accelerator, parts)


def is_complete(run: RunConfig) -> bool:
    """Whether a run folder holds a student whose training has ended (or that was never to be trained)."""
    folder = local_path(run.output_dir)
    if not is_student_folder(folder):
        return False
    if not checkpoints(folder / "checkpoints"):
        return run.method.name == TeacherScoreMatching.name
    return has_ended(run) and (folder / FINAL).is_file()


def _steps_done(run: RunConfig) -> int:
    """Training steps of a run that is complete; those it was to have where it has kept no checkpoint."""
    found = checkpoints(local_path(run.output_dir) / "checkpoints")
    return found[-1][0] if found else run.train.steps


def _folders_of_jobs(folder: Path) -> list[Path]:
    """The run folders by which jobs of one student each, or of the shared start, are seen to be at work."""
    return [folder / START, *sorted(folder.glob("student-*"))]


def _partition(config: RunConfig, folder: Path, device: torch.device, begun: bool) -> Partition:
    """The partition that the students there are trained with, or a new one where none has begun."""
    file = folder / PARTITION
    if file.is_file() and begun:
        try:
            partition = Partition.from_dict(read_json_object(file))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error!r}); put it back, or start anew elsewhere") from error
        return partition
    teacher = load_teacher(config.teacher, device=device)
    if teacher.prompts is not None and config.teacher.prompts is None:
        raise UserError(f"the teacher {config.teacher.source} takes prompts; set teacher.prompts to a file with one a "
                        "line")
    return make_partition(config.method, teacher)


def _write(config: RunConfig, folder: Path, partition: Partition) -> None:
    write_config(folder, config)
    with disk_errors(str(folder / PARTITION)):
        if partition.prompts is not None:
            for k in range(partition.count):
                lines = [json.dumps({"prompt": prompt, "weight": weight}) for prompt, weight in partition.listed(k)]
                with atomic_write(prompts_file(folder, k)) as output:
                    output.write(("\n".join(lines) + "\n").encode())
            with atomic_write(folder / ALL_PROMPTS) as output:
                output.write("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in partition.prompts).encode())
        with atomic_write(folder / PARTITION) as output:
            output.write((json.dumps(partition.to_dict(), indent=1) + "\n").encode())


def _save_untrained(run: RunConfig) -> None:
    """The shared start without its training: a random network of the wanted shape."""
    teacher = load_teacher(run.teacher)
    seed_torch(run.seed)
    student = TeacherScoreMatching(run.method, teacher).student()
    folder = local_path(run.output_dir)

    def save() -> None:
        write_config(folder, run)
        with disk_errors(str(folder / "student")):
            student.save(folder / "student")

    Processes.current().on_main(save)


def _finish(
    config: RunConfig, partition: Partition, accelerator: Accelerator, reuse: bool, opened: OpenedEvaluation | None
) -> Report | None:
    """Manifest, samples and report of all students."""
    folder, processes = local_path(config.output_dir), Processes.current()
    device = accelerator.device

    def manifest() -> None:
        with disk_errors(f"the manifest in {folder}"):
            write_manifest(folder, partition, [f"student-{k}/student" for k in range(partition.count)])

    processes.on_main(manifest)
    teacher = load_teacher(config.teacher, device=device)
    pictures = folder / "samples"
    if not reuse or not (folder / FINAL).is_file():
        student = load_student(folder, device)

        def draw() -> None:
            with disk_errors(str(pictures / "comparison.png")):
                save_comparison(teacher, student, pictures / "comparison.png")
            save_samples(student, folder / FINAL, config.train.num_samples)

        processes.on_main(draw)
    report = make_report(config, teacher, accelerator, reuse, opened) if config.evaluation.at_end else None
    if not reuse or not (folder / CARD).is_file():
        processes.on_main(lambda: write_student_card(folder, load_student(folder), folder))
    return report


# --- their configurations


def make_partition(config: MsdConfig, teacher: Teacher) -> Partition:
    """The parts of a teacher's conditions.

    Raises:
        UserError: an unconditional teacher, a rule for other conditions than it takes, a teacher with labels of its
            own, and what ``split_classes`` and ``split_prompts`` refuse.
    """
    rule = config.partition
    if teacher.prompts is not None:
        if rule not in PROMPT_RULES:
            raise UserError(f"method.partition is '{rule}', which splits classes, and the teacher takes prompts; "
                            f"choose {' or '.join(PROMPT_RULES)}")
        prompts = teacher.prompts.prompts or []
        # Not all at once: the list may be on disk because it is larger than memory.
        embeddings = torch.cat([pooled(teacher.prompts.examples(part)) for part in in_parts(len(prompts), AT_ONCE)])
        return Partition.of_prompts(rule, prompts, teacher.prompts.weights, embeddings, config.num_students,
                                    config.partition_seed)
    if teacher.classes is None:
        raise UserError(f"MSD divides the conditions among students, and the teacher {teacher.source} is "
                        "unconditional: there is nothing to divide")
    if teacher.classes.own is not None:
        raise UserError("teacher.labels is set, but MSD divides all classes among its students; set it to null")
    if rule not in CLASS_RULES:
        raise UserError(f"method.partition is '{rule}', which splits prompts, and the teacher takes class labels; "
                        f"choose {', '.join(CLASS_RULES)}")
    file = None if config.partition_file is None else local_path(config.partition_file)
    return Partition.of_classes(split_classes(rule, teacher.classes.num_classes, config.num_students,
                                              config.partition_seed, file))


def score_matching_run(config: RunConfig) -> RunConfig | None:
    """The shared start of students of another shape, in ``tsm/``; None: they start as the teacher."""
    if config.method.score_matching is None:
        return None
    # What it learns is a teacher of another shape, which one call of it says little of.
    train = replace(config.train, steps=max(1, config.method.score_matching_steps), stop_when=None)
    return _run(config, START, config.teacher, config.method.score_matching, train, 0)


def host_run(config: RunConfig) -> RunConfig:
    """The host's run as it would be without MSD."""
    return replace(config, method=config.method.host)


def student_runs(config: RunConfig, partition: Partition, part: int) -> list[RunConfig]:
    """The runs of one student in their order; the last one is in ``student-<part>/``."""
    method, folder = config.method, Path(config.output_dir)
    teacher, host = config.teacher, method.host
    if method.score_matching is not None:
        teacher = replace(teacher, start=str(folder / START))
    if partition.count > 1:  # otherwise nothing differs from the host's own run
        if partition.prompts is None:
            teacher = replace(teacher, labels=partition.labels(part))
        else:
            teacher = replace(teacher, prompts=str(prompts_file(folder, part)), prompt_column=None)
            if getattr(host, "regression_weight", 0) and not host.regression_own:
                host = replace(host, regression_prompts=host.regression_prompts or str(folder / ALL_PROMPTS))
    if not method.adversarial.steps:
        return [_run(config, f"student-{part}", teacher, host, config.train, part)]
    first = _run(config, f"matching-{part}", teacher, host, config.train, part)
    stage = method.adversarial
    host = replace(host, adversarial_weight=stage.weight, adversarial_critic_weight=stage.critic_weight,
                   data=stage.data, regression_weight=0.0, regression_prompts=None,
                   optimizer=replace(host.optimizer, lr=stage.lr),
                   critic_optimizer=replace(host.critic_optimizer, lr=stage.lr))
    train = replace(config.train, steps=stage.steps)
    teacher = replace(teacher, start=first.output_dir)
    return [first, _run(config, f"student-{part}", teacher, host, train, part)]


ALL_PROMPTS = "prompts.jsonl"
"""Each prompt once, for pairs of all of them."""


def prompts_file(folder: Path, part: int) -> Path:
    """The prompts of a part, as ``teacher.prompts`` takes them."""
    return folder / f"prompts-{part}.jsonl"


def _run(
    config: RunConfig, name: str, teacher: TeacherConfig, method: object, train: TrainConfig, part: int
) -> RunConfig:
    return RunConfig(
        output_dir=str(Path(config.output_dir) / name),
        seed=config.seed if part == 0 else mixed_seed(config.seed, "student", part),
        teacher=teacher,
        method=method,
        train=train,
        evaluation=replace(config.evaluation, at_end=False),
    )
