"""The settings of MSD, and of its stages."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, is_dataclass
from typing import Any

from flowdistill.config import MISSING, HostingConfig, method_config_class, needs, option
from flowdistill.methods.msd.partition import CLASS_RULES, PROMPT_RULES
from flowdistill.methods.score_distillation import HostConfig
from flowdistill.methods.teacher_score_matching import ScoreMatchingConfig
from flowdistill.utils.errors import UserError
from flowdistill.utils.seeds import SEEDS

NO_HOSTS = ("msd", "teacher_score_matching")
"""Methods whose result is not one one-step student."""


@dataclass
class AdversarialStage:
    """A second run of the host, from the student of the first, with DMD2's adversarial term and without regression.

    Its critic starts at the teacher again.
    """

    steps: int = option(0, "training steps; 0: no such stage", at_least=0)
    weight: float = option(5e-3, "weight of the term for the student", above=0, only=needs("steps"))
    critic_weight: float = option(1e-2, "weight of the term for the critic (authors of DMD2: 1e-2)", above=0,
                                  only=needs("steps"))
    lr: float = option(
        1e-5, "learning rate of student and critic; the authors of DMD2 divide theirs by 4 to 20", above=0,
        only=needs("steps"))
    data: str | None = option(None, "images, which such a stage needs: as the host's data, and read as its "
                                    "data_options say", only=needs("steps"))


@dataclass
class MsdConfig(HostingConfig):
    """Settings of MSD. The paper has K = 4, consecutive classes, and quadrants of text embeddings."""

    usual_host = "dmd2"
    name: str = "msd"
    num_students: int = option(2, "K; 1 is the host alone", at_least=1)
    partition: str = option("sequential", "classes: sequential, interleaved, random or file; prompts: balanced_kmeans "
                                          "or pca_quadrant", choices=CLASS_RULES + PROMPT_RULES)
    partition_file: str | None = option(None, "file of the partition 'file': a YAML or JSON list of lists of labels")
    partition_seed: int = option(0, "seed of random and of balanced_kmeans", at_least=0, below=SEEDS,
                                 only=needs("partition", "random", "balanced_kmeans"))
    student_index: int | None = option(None, "train only this student, from 0, so that K jobs can run on K machines; "
                                             "-1: only the shared start; null: all, in turn", at_least=-1)
    score_matching: ScoreMatchingConfig | None = option(
        None, "students of another shape, and how they learn to be denoisers first; null: they start as the teacher",
        was="tsm",
    )
    score_matching_steps: int = option(1000, "steps of teacher score matching; 0: such students start at random",
                                       at_least=0, was="tsm_steps", only=needs("score_matching"))
    adversarial: AdversarialStage = option(AdversarialStage, "second stage, after the host's run")
    host: Any = option(MISSING, "a one-step method with its settings")

    @classmethod
    def hosted(cls, host: str) -> type:
        """This class with the settings of the host's own class in ``host``, for files."""
        if host in NO_HOSTS:
            raise UserError(f"'method.host.name' is '{host}', which makes no one-step student; name a method such as "
                            "dmd2 or freeflow")
        return _hosted(cls, method_config_class(host, "method.host.name", barred=NO_HOSTS))

    def validate(self) -> None:
        """UserError for settings that contradict each other."""
        if not is_dataclass(self.host):
            raise UserError("'method.host' must be the settings of a one-step method, with its name")
        if self.student_index is not None and self.student_index >= self.num_students:
            raise UserError(f"method.student_index is {self.student_index}; with {self.num_students} students it is 0 "
                            f"to {self.num_students - 1}")
        if self.student_index == -1 and self.score_matching is None:
            raise UserError("method.student_index is -1, the shared start, but method.score_matching is null: students "
                            "start as the teacher")
        if (self.partition == "file") != (self.partition_file is not None):
            raise UserError("method.partition_file goes with method.partition 'file', and 'file' needs one; the "
                            f"partition is '{self.partition}' and the file {self.partition_file or 'null'}")
        if self.adversarial.steps and not isinstance(self.host, HostConfig):
            name = getattr(self.host, "name", "")
            raise UserError(f"method.adversarial.steps is {self.adversarial.steps}, but the host '{name}' "
                            "has no adversarial term; set it to 0, or take dmd2, diff_instruct or sid")
        if self.adversarial.steps and self.adversarial.data is None:
            raise UserError(f"method.adversarial.steps is {self.adversarial.steps}, but method.adversarial.data is "
                            "null; name an image set, such as digits")


@functools.cache
def _hosted(cls: type, settings: type) -> type:
    return dataclasses.make_dataclass(cls.__name__, [("host", settings, option(settings, "a one-step method"))],
                                      bases=(cls,), namespace={"__module__": cls.__module__})


