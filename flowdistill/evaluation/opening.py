"""What a run will be measured with, opened before its training: nothing of it fails after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flowdistill.conditioning.prompts import PromptList, read_prompts
from flowdistill.config import EvaluationConfig
from flowdistill.evaluation.evaluate import (
    first_image,
    is_teacher,
    open_reference,
    open_scorers,
    prompt_conditions,
    prompts_used,
    student_sampler,
    teacher_sampler,
)
from flowdistill.evaluation.evaluator import Evaluator
from flowdistill.evaluation.generation import Sampler
from flowdistill.evaluation.metrics import METRICS, ranking_metric
from flowdistill.evaluation.protocols import claim
from flowdistill.evaluation.reference import Reference
from flowdistill.evaluation.report import lines_of
from flowdistill.features.extractor import load_features
from flowdistill.students import Student
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.logging import log_once


@dataclass(frozen=True)
class OpenedEvaluation:
    """An ``evaluation`` section that was found to work with a teacher.

    Attributes:
        settings: the section.
        reference: its statistics, so that nobody computes them again; None where none is set, or where the teacher's
            samples are drawn later.
        image: one of the teacher's, (1, C, H, W).
    """

    settings: EvaluationConfig
    reference: Reference | None
    image: Tensor

    def check_student(self, student: Student) -> None:
        """Draw one image as the evaluation of a student will, trained or not.

        Raises:
            UserError: the student cannot be sampled at ``evaluation.guidance_scale``, or makes other images.
        """
        made = first_image(student, student_sampler(student, self.settings.guidance_scale))
        if made.shape != self.image.shape:
            raise UserError(f"the student makes images of shape {tuple(made.shape[1:])}, and its teacher of shape "
                            f"{tuple(self.image.shape[1:])}")


def open_evaluation(
    settings: EvaluationConfig,
    teacher: Teacher,
    device: torch.device | str | None = None,
    parts: Iterable[Sequence[int]] = (),
    ranking: str | None = None,
    key: str = "",
) -> OpenedEvaluation:
    """Open features, reference, scorers and metrics, and draw and look at one image as the evaluation will.

    All processes must call it together. The feature network is freed again; the reference's statistics are made here
    where no cache has them.

    Args:
        parts: class labels of each student that will be measured alone, against images of these only.
        ranking: a figure that students will be ranked by, and ``key`` the setting that names it.

    Raises:
        UserError: a part that is unknown, missing, damaged or does not fit another one.
    """
    scale = 1.0 if settings.guidance_scale is None else settings.guidance_scale
    sampler = teacher_sampler(teacher, 1, settings.solver, scale)
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    used = prompts
    if prompts is not None and not is_teacher(settings.reference, teacher):
        # One is enough to draw an image; the others are encoded when they are measured.
        used = PromptList(prompts.prompts[:1], [1.0])
    with prompts_used([teacher], used):
        if settings.protocol is not None and settings.features is not None:  # a protocol has features
            found = claim(settings.protocol, settings.num_images, settings.reference,
                          None if prompts is None else prompts.prompts, [("the teacher", teacher)],
                          [partial(first_image, teacher, sampler)],
                          partial(load_features, settings.features, device))
            for line in lines_of(found.entries()):
                log_once(line)
        return _opened(settings, teacher, sampler, scale, device, parts, ranking, key)


def _opened(
    settings: EvaluationConfig, teacher: Teacher, sampler: Sampler, scale: float,
    device: torch.device | str | None, parts: Iterable[Sequence[int]], ranking: str | None, key: str,
) -> OpenedEvaluation:
    # Its own samples are drawn at the student's guidance scale, which may be known when there is a student only.
    scorers = open_scorers(vars(settings), teacher, teacher, device)
    later = settings.guidance_scale is None and is_teacher(settings.reference, teacher)
    extractor, reference = open_reference(settings.features, None if later else settings.reference,
                                          None if later else teacher, vars(settings), device)
    # What it makes of the noise that is measured is not drawn yet: nothing else of it can be missing.
    ranks = [] if ranking is None else [ranking_metric(ranking, key).name]
    names = [name for name in (*settings.more_metrics, *ranks) if not METRICS.get(name).needs_teacher]
    evaluator = Evaluator(extractor, reference, settings.num_images, 0, settings.batch_size,
                          more_metrics=names, scorers=scorers, device=device, progress=False)
    image = first_image(teacher, sampler)
    prompts = prompt_conditions(teacher)
    evaluator.check_image(image, None if prompts is None else prompts.prompts[0])
    if ranking is not None:
        given = evaluator.given(METRICS.get(ranks[0]), image, teacher.num_classes,
                                None if prompts is None else prompts.prompts)
        if ranking not in given:
            instead = f"; these have {listed(given)}" if given else ""
            raise UserError(f"'{key}' is {ranking}, which {settings.num_images:,} images of this teacher's student do "
                            f"not have with the features {settings.features} and the reference {settings.reference}"
                            f"{instead}; choose another figure, or other ones of these")
    for count in settings.pipeline_steps:
        teacher.pipeline_calls(count)
    own = None if teacher.classes is None else teacher.classes.own
    if evaluator.reference is not None:
        for labels in [*parts, *([] if own is None else [own])]:
            evaluator.reference.of(labels)
    return OpenedEvaluation(settings, evaluator.reference, image)


