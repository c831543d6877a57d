"""MSD: multi-student distillation (Song et al., arXiv 2410.23274), a partition of conditions over any one-step method.

    V_1 ... V_K = partition(conditions)                     disjoint, of equal size, close conditions together
    start       = the teacher, or a smaller network after teacher score matching (Eq. 8), shared by all students
    for each k, on its own:
        G_k = host(teacher, conditions of V_k, start)       distribution matching; paired regression on ALL pairs
        G_k = host with an adversarial term (optional)      from the last G_k; real images of V_k only
    sample(y) = G_k(noise, y) for the k that owns y

So MSD is no loss: it is K runs of the host, whose teacher draws some of its conditions only. This file makes their
configurations; ``flowdistill.methods.msd.runs`` does the runs.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from flowdistill.config import MISSING, RunConfig, method_config_class, option
from flowdistill.methods.msd.partition import CLASS_RULES, PROMPT_RULES, Partition, split_classes
from flowdistill.methods.score_distillation import HostConfig
from flowdistill.methods.teacher_score_matching import ScoreMatchingConfig
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import mixed_seed

NO_HOSTS = ("msd", "tsm")
"""Methods whose result is not one one-step student."""


@dataclass
class AdversarialStage:
    """A second run of the host, from the student of the first, with DMD2's adversarial term and without regression.

    Its critic starts at the teacher again.
    """

    steps: int = option(0, "training steps; 0: no such stage", at_least=0)
    weight: float = option(5e-3, "of the term for the student", above=0)
    critic_weight: float = option(1e-2, "of the term for the critic (authors of DMD2: 1e-2)", above=0)
    lr: float = option(1e-5, "of student and critic; the authors of DMD2 divide theirs by 4 to 20", above=0)
    data: str = option("digits", "named image set")


@dataclass
class MsdConfig:
    """Settings of MSD. The paper has K = 4, consecutive classes, and quadrants of text embeddings."""

    name: str = "msd"
    num_students: int = option(2, "K; 1 is the host alone", at_least=1)
    partition: str = option("sequential", "classes: sequential, interleaved, random or file; prompts: balanced_kmeans "
                                          "or pca_quadrant", choices=CLASS_RULES + PROMPT_RULES)
    partition_file: str | None = option(None, "of the partition 'file': a YAML or JSON list of lists of labels")
    partition_seed: int = option(0, "of random and of balanced_kmeans", at_least=0)
    student_index: int | None = option(None, "train only this student, from 0, so that K jobs can run on K machines; "
                                             "-1: only the shared start (tsm); null: all, in turn", at_least=-1)
    tsm: ScoreMatchingConfig | None = option(None, "students of another shape, and how they learn to be denoisers first; null: "
                                         "they start as the teacher")
    tsm_steps: int = option(1000, "steps of teacher score matching; 0: such students start at random", at_least=0)
    adversarial: AdversarialStage = option(AdversarialStage, "what follows the host's run")
    host: Any = option(MISSING, "a one-step method with its settings")

    @classmethod
    def hosted(cls, host: str) -> type:
        """This class with the settings of the host's own class in ``host``, for files."""
        if host in NO_HOSTS:
            raise UserError(f"'method.host.name' is '{host}', which makes no one-step student; name a method such as "
                            "dmd2 or freeflow")
        family: Any = cls
        return _hosted(family, method_config_class(host, "method.host.name", barred=NO_HOSTS))

    def validate(self) -> None:
        """UserError for settings that contradict each other."""
        if not is_dataclass(self.host):
            raise UserError("'method.host' must be the settings of a one-step method, with its name")
        if self.student_index is not None and self.student_index >= self.num_students:
            raise UserError(f"method.student_index is {self.student_index}; with {self.num_students} students it is 0 "
                            f"to {self.num_students - 1}")
        if self.student_index == -1 and self.tsm is None:
            raise UserError("method.student_index is -1, the shared start, but method.tsm is null: students start as "
                            "the teacher")
        if (self.partition == "file") != (self.partition_file is not None):
            raise UserError("method.partition_file goes with method.partition 'file', and 'file' needs one; the "
                            f"partition is '{self.partition}' and the file {self.partition_file or 'null'}")
        if self.adversarial.steps and not isinstance(self.host, HostConfig):
            name = getattr(self.host, "name", "")
            raise UserError(f"method.adversarial.steps is {self.adversarial.steps}, but the host '{name}' "
                            "has no adversarial term; set it to 0, or take dmd2, diff_instruct or sid")


@functools.cache
def _hosted(cls: Any, settings: type) -> type:
    return dataclasses.make_dataclass(cls.__name__, [("host", settings, option(settings, "a one-step method"))],
                                      bases=(cls,), namespace={"__module__": cls.__module__})


class Msd:
    """MSD as ``distill`` sees it: not a method that trains, but a plan of several runs."""

    name = "msd"
    Config = MsdConfig

    @staticmethod
    def distill(config: RunConfig) -> Any:
        """Do the runs; see :func:`flowdistill.methods.msd.runs.distill_students`."""
        from flowdistill.methods.msd.runs import distill_students

        return distill_students(config)


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
        if getattr(config.host, "regression_weight", 0) and config.num_students > 1:
            raise UserError("method.host.regression_weight is above 0, but pairs of all prompts are not at hand in a "
                            "run that knows its own ones only; set it to 0")
        prompts = teacher.prompts.prompts or []
        encoded = teacher.prompts.examples(range(len(prompts)))
        return Partition.of_prompts(rule, prompts, teacher.prompts.weights, encoded, config.num_students,
                                    config.partition_seed)
    if teacher.classes is None:
        raise UserError(f"MSD divides the conditions among students, and the teacher {teacher.source} is "
                        "unconditional: there is nothing to divide")
    if teacher.classes.own is not None:
        raise UserError("teacher.labels is set, but MSD divides all classes among its students; set it to null")
    if rule not in CLASS_RULES:
        raise UserError(f"method.partition is '{rule}', which splits prompts, and the teacher takes class labels; "
                        f"choose {', '.join(CLASS_RULES)}")
    file = None if config.partition_file is None else Path(config.partition_file)
    return Partition.of_classes(split_classes(rule, teacher.classes.num_classes, config.num_students,
                                              config.partition_seed, file))


# --- the runs


def tsm_run(config: RunConfig) -> RunConfig | None:
    """The shared start of students of another shape, in ``tsm/``; None: they start as the teacher."""
    if config.method.tsm is None:
        return None
    train = replace(config.train, steps=max(1, config.method.tsm_steps))
    return _run(config, "tsm", config.teacher, config.method.tsm, train, 0)


def student_runs(config: RunConfig, partition: Partition, part: int) -> list[RunConfig]:
    """The runs of one student in their order; the last one is in ``student-<part>/``."""
    method, folder = config.method, Path(config.output_dir)
    teacher = config.teacher
    if method.tsm is not None:
        teacher = replace(teacher, start=str(folder / "tsm"))
    if partition.count > 1:  # otherwise nothing differs from the host's own run
        if partition.prompts is None:
            teacher = replace(teacher, labels=partition.labels(part))
        else:
            teacher = replace(teacher, prompts=str(prompts_file(folder, part)))
    if not method.adversarial.steps:
        return [_run(config, f"student-{part}", teacher, method.host, config.train, part)]
    first = _run(config, f"matching-{part}", teacher, method.host, config.train, part)
    stage, host = method.adversarial, method.host
    host = replace(host, adversarial_weight=stage.weight, adversarial_critic_weight=stage.critic_weight,
                   data=stage.data, regression_weight=0.0, optimizer=replace(host.optimizer, lr=stage.lr),
                   critic_optimizer=replace(host.critic_optimizer, lr=stage.lr))
    train = replace(config.train, steps=stage.steps)
    teacher = replace(teacher, start=first.output_dir)
    return [first, _run(config, f"student-{part}", teacher, host, train, part)]


def prompts_file(folder: Path, part: int) -> Path:
    """The prompts of a part, as ``teacher.prompts`` takes them."""
    return folder / f"prompts-{part}.jsonl"


def _run(config: RunConfig, name: str, teacher: Any, method: Any, train: Any, part: int) -> RunConfig:
    return RunConfig(
        output_dir=str(Path(config.output_dir) / name),
        seed=config.seed if part == 0 else mixed_seed(config.seed, "student", part),
        teacher=teacher,
        method=method,
        train=train,
        evaluation=replace(config.evaluation, at_end=False),
    )
