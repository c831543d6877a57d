"""``flowdistill.evaluate``: a run, a student, a teacher or a pipeline as a table of figures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompts import PromptConditions, PromptList, read_prompts
from flowdistill.config import FEATURES, TeacherConfig, found_again, run_settings, teacher_found_again
from flowdistill.config.run_folder import CONFIG
from flowdistill.data import IMAGE_SETS
from flowdistill.data.pictures import is_picture
from flowdistill.evaluation.evaluator import Evaluator, asked_of, evaluate_models, without_teacher
from flowdistill.evaluation.generation import Sampler, balanced_labels, check_num_images, generators_of
from flowdistill.evaluation.html import write_html
from flowdistill.evaluation.kept_rows import TeacherIdentity
from flowdistill.evaluation.metrics import METRICS
from flowdistill.evaluation.metrics.frechet import figure_of
from flowdistill.evaluation.metrics.prompt_scores import PromptScores
from flowdistill.evaluation.pictures import Strip, drawn_strip
from flowdistill.evaluation.protocols import claim, followed
from flowdistill.evaluation.reference import Reference
from flowdistill.evaluation.report import Report, check_report_place, lines_of
from flowdistill.evaluation.teacher_reference import STEPS, TEACHER, teacher_reference
from flowdistill.features.extractor import FeatureExtractor, load_features
from flowdistill.features.scorers import Scorer, load_scorers, scorer_found_again
from flowdistill.students import Student, is_student_folder
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.teachers.loading import teacher_files
from flowdistill.teachers.pipeline_call import describe_call
from flowdistill.teachers.solvers import network_calls
from flowdistill.teachers.weight_files import check_weights
from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.files import local_path
from flowdistill.utils.html import check_page_place
from flowdistill.utils.logging import say
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import indexed_noise
from flowdistill.utils.seeds import check_seed
from flowdistill.utils.text import JsonObject

DEFAULTS: dict[str, Any] = {
    "protocol": None,
    "num_images": 10_000,
    "reference": None,
    "prompts": None,
    "features": None,
    "teacher_steps": (1, 2, 4, 10, 50),
    "batch_size": 250,
    "solver": "euler",
    "pipeline_steps": (),
    "guidance_scale": None,
    "more_metrics": (),
    "scorers": (),
}
MUCH_WORSE = 1.5
"""Times the pipeline's distance from which on the report says that the teacher's solver is much worse."""


@dataclass
class _Subject:
    """What is evaluated, loaded."""

    name: str
    teacher: Teacher | None = None
    student: Student | None = None
    settings: dict[str, Any] | None = None


def evaluate(
    run_or_model: Any,
    num_images: int | None = None,
    reference: str | os.PathLike | Reference | None = None,
    features: str | os.PathLike | nn.Module | FeatureExtractor | None = None,
    teacher_steps: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    json: str | os.PathLike | None = None,
    teacher_rows: bool = True,
    *,
    teacher: Teacher | None = None,
    solver: str | None = None,
    pipeline_steps: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    device: torch.device | str | None = None,
    weights: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    prompts: str | os.PathLike | None = None,
    more_metrics: Sequence[str] | None = None,
    scorers: Sequence[str | Scorer] | None = None,
    fresh: bool = False,
    html: str | os.PathLike | None = None,
    progress: bool = True,
    protocol: str | None = None,
) -> Report:
    """Measure a teacher at several step counts and its student at each number of calls, on the same noise and labels.

    Under ``accelerate launch`` or ``torchrun`` the processes share the work; each returns the report.

    Args:
        run_or_model: a run folder (teacher and settings from its ``config.yaml``), a student folder, a diffusers
            pipeline (folder or hub id: teacher rows only), or a live teacher or student; or a list of these and of
            folders of images, which are compared in one table: see :mod:`flowdistill.evaluation.compare`.
        num_images, reference, features, teacher_steps, batch_size, solver, pipeline_steps, guidance_scale: None means
            what the run's ``evaluation`` section says, and without a run 10,000, (1, 2, 4, 10, 50), 250, "euler", (),
            and the student's own guidance scale (1.0 for a teacher alone). Without features only speed is measured,
            and without a reference what needs none; the report says what to set.
            ``pipeline_steps`` are rows of the pipeline's own scheduler, with the noise that it adds.
        seed: of the noise, 0 to 2^64 - 1; image i depends on (seed, i) only.
        json: file to write the report to.
        html: file to write a page to, with the table, a figure and some images of each row.
        teacher_rows: False measures the student only.
        teacher: of a live student or of a student folder whose teacher is not where it was.
        device: of the models and features; default: the GPU when there is one, for live objects where they are.
        weights: local Inception weights; see ``load_features``.
        cache_dir: of reference statistics, see ``load_reference``, and of a teacher's rows.
        more_metrics: names of metrics that are not measured else; None: as the run says.
        scorers: of images and prompts, such as "clip:FOLDER", see :mod:`flowdistill.features.scorers`; None: as the run
            says. They need no features and no reference.
        fresh: measure a teacher's rows again, though they are in the cache.
        prompts: of text-to-image models, a file that is gone through in turn; default: what the run says, and the
            prompts of the training.
        protocol: measure as papers do, see :mod:`flowdistill.evaluation.protocols`; None: as the run says; ``"none"``:
            without one though the run has one.

    Returns:
        A report; ``str(report)`` is the table.

    Raises:
        UserError: num_images or a step count below 1, nothing to evaluate at the path, nothing to measure, or ``json``
            or ``html`` cannot be written or is there and is something else (said before anything is measured); what is
            not as the protocol says.
    """
    check_seed(seed)
    given = {
        "num_images": num_images,
        "reference": reference,
        "features": features,
        "teacher_steps": teacher_steps,
        "batch_size": batch_size,
        "solver": solver,
        "pipeline_steps": pipeline_steps,
        "guidance_scale": guidance_scale,
        "more_metrics": more_metrics,
        "scorers": scorers,
        "prompts": prompts,
        "protocol": protocol,
    }
    for key, value in {**given, "json": json, "html": html, "weights": weights, "cache_dir": cache_dir}.items():
        if isinstance(value, str) and not value:
            raise UserError(f"{key} is an empty text; give one, or leave it out")
    processes = Processes.start()
    if json is not None:
        processes.on_main(lambda: check_report_place(json))
    if html is not None:
        processes.on_main(lambda: check_page_place(html))
    strips: list[Strip] | None = None if html is None else []
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = {key: value for key, value in given.items() if value is not None}
    how = {"weights": weights, "cache_dir": cache_dir, "fresh": fresh, "progress": progress}
    if isinstance(run_or_model, (list, tuple)):
        report = _several(run_or_model, teacher, asked, seed, place, teacher_rows, strips, how)
    else:
        needed = teacher_rows or isinstance(reference, str) and reference == TEACHER
        needed = needed or any(METRICS.get(name).needs_teacher for name in more_metrics or ())
        subject = _open(run_or_model, place, with_teacher=needed and teacher is None)
        if teacher is not None:
            subject.teacher = teacher
        report = _evaluate_one(subject, asked, seed, place, teacher_rows, strips, how)
    if json is not None:
        processes.on_main(lambda: report.write_json(json))
    if html is not None:
        processes.on_main(lambda: write_html(report, strips or [], html))
    return report


def _several(
    sources: Sequence[Any], teacher: Teacher | None, asked: dict[str, Any], seed: int, place: torch.device,
    teacher_rows: bool, strips: list[Strip] | None, how: dict[str, Any],
) -> Report:
    from flowdistill.evaluation.compare import evaluate_several

    if len(sources) < 2 or teacher is not None:
        raise UserError("a list of models to compare has at least two, each with a teacher of its own" if sources else
                        "there is nothing to evaluate in an empty list")
    return evaluate_several(sources, asked, seed, place, teacher_rows, strips, **how)


def _evaluate_one(
    subject: _Subject, asked: dict[str, Any], seed: int, place: torch.device, teacher_rows: bool,
    strips: list[Strip] | None, how: dict[str, Any],
) -> Report:
    settings = followed(asked, {**DEFAULTS, **(subject.settings or {})})
    check_num_images(settings["num_images"])
    prompts = None if settings["prompts"] is None else read_prompts(settings["prompts"])
    with prompts_used([subject.teacher, subject.student], prompts):
        return _measured(subject, settings, prompts, seed, place, teacher_rows, strips, how)


def _measured(
    subject: _Subject, settings: dict[str, Any], prompts: PromptList | None, seed: int, place: torch.device,
    teacher_rows: bool, strips: list[Strip] | None, how: dict[str, Any],
) -> Report:
    if settings["guidance_scale"] is None:
        settings["guidance_scale"] = 1.0 if subject.student is None else subject.student.info.guidance_scale
    models = _models(subject, settings if teacher_rows else {**settings, "teacher_steps": (), "pipeline_steps": ()})
    model = subject.student or subject.teacher
    assert model is not None  # else there is nothing to measure
    condition = prompt_conditions(model)
    own = None if model.classes is None else model.classes.own
    claimed: JsonObject = {}
    if settings["protocol"] is not None:
        load = cache(partial(load_features, settings["features"], place, how["weights"]))
        claimed = claim(settings["protocol"], settings["num_images"], settings["reference"],
                        None if prompts is None else prompts.prompts, [(subject.name, model)],
                        [partial(first_image, model, models[0][2])], load).entries()
        settings["features"] = load()
        announce(claimed, how["progress"])
    scorers = open_scorers(settings, model, subject.teacher, place)
    extractor, compared = open_reference(settings["features"], settings["reference"], subject.teacher, settings, place,
                                         **{key: how[key] for key in ("weights", "cache_dir", "progress")})
    paired = open_paired(extractor, subject.teacher, condition, own, settings, seed, how["cache_dir"], how["progress"])
    evaluator = Evaluator(
        extractor,
        compared,
        settings["num_images"],
        seed,
        settings["batch_size"],
        own=own,
        owner=None if subject.student is None else subject.student.class_owner,
        device=place,
        more_metrics=settings["more_metrics"],
        scorers=scorers,
        paired=paired,
        **how,
    )
    report = evaluate_models(
        models,
        tuple(model.shape),
        model.num_classes,
        evaluator,
        condition=condition,
        model=subject.name,
        **claimed,
        solver=settings["solver"] if subject.teacher is not None else None,
        **_teacher_facts(subject.teacher, settings),
        guidance_scale=settings["guidance_scale"],
        noise="float32 unit normal, one CPU generator an image, seeded by (seed, index)",
        labels=_label_rule(model.num_classes, own),
        device=str(model.device),
    )
    note = _solver_note(report)
    if note is not None:
        report.protocol["pipeline_note"] = note
    for row in report.rows:
        if row.model == "student" and subject.student is not None:
            row.stored_parameters, row.active_parameters = student_parameters(subject.student)
    if strips is not None and Processes.current().is_main:
        strips += [drawn_strip(f"{name}, {calls} call{'' if calls == 1 else 's'}", sampler, model, condition, own, seed)
                   for name, calls, sampler in models]
    return report


def announce(claimed: JsonObject, progress: bool = True) -> None:
    """The protocol on standard error, before the work."""
    if progress and Processes.current().is_main:
        say("\n".join(lines_of(claimed)))


@torch.no_grad()
def first_image(model: Teacher | Student, sampler: Sampler) -> Tensor:
    """The first image of a model, (1, C, H, W) on the CPU, as an evaluation will draw it."""
    given = prompt_conditions(model)
    own = None if model.classes is None else model.classes.own
    condition = balanced_labels([0], model.num_classes, own) if given is None else given(range(1))
    return sampler(indexed_noise(tuple(model.shape), 0, [0]), condition).cpu()


def is_teacher(reference: Any, teacher: Teacher | None) -> bool:
    """Whether images are measured against the teacher's samples: asked for, or for want of others where it takes
    prompts."""
    if reference is None:
        return teacher is not None and teacher.prompts is not None
    return isinstance(reference, str) and reference == TEACHER


def open_scorers(
    settings: Mapping[str, Any], model: Teacher | Student, teacher: Teacher | None,
    device: torch.device | str | None = None,
) -> list[Scorer]:
    """The scorers; and whether all that is asked for by name can be measured of the model, before anything is drawn.

    Args:
        settings: ``num_images``, ``features``, ``more_metrics`` and ``scorers``.
        teacher: the model's own, or the model itself.

    Raises:
        UserError: scorers that cannot be opened, or a metric that cannot be measured of the model's images.
    """
    scorers = load_scorers(settings["scorers"], device)
    condition, own = prompt_conditions(model), None if model.classes is None else model.classes.own
    asked = asked_of(settings["num_images"], model.num_classes, own, None if condition is None else condition.prompts)
    kinds = [METRICS.get(name) for name in settings["more_metrics"]] if settings["features"] is not None else []
    for kind in kinds:
        if kind.needs_teacher and teacher is None:
            raise UserError(without_teacher(kind))
    metrics = [kind() for kind in kinds if not (kind is PromptScores and scorers)]
    for metric in [*metrics, *([PromptScores(scorers)] if scorers else [])]:
        metric.check(asked)
    return scorers


def open_reference(
    features: Any,
    reference: Any,
    teacher: Teacher | None,
    settings: Mapping[str, Any],
    device: torch.device | str | None = None,
    weights: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[FeatureExtractor | None, Any]:
    """The features, and what images are measured against: ``reference`` itself, or a teacher's samples.

    Args:
        settings: ``num_images``, ``teacher_steps``, ``solver``, ``guidance_scale`` and ``batch_size``.

    Raises:
        UserError: features that cannot be opened, or a reference ``"teacher"`` without a teacher.
    """
    extractor = None if features is None else load_features(features, device, weights)
    if extractor is None or not is_teacher(reference, teacher):
        return extractor, reference
    if teacher is None:
        raise UserError("the reference 'teacher' is the teacher's own samples, and there is no teacher here; give one, "
                        "or another reference")
    return extractor, teacher_reference(teacher, *_most_steps(teacher, settings), extractor, settings["num_images"],
                                        settings["batch_size"], prompt_conditions(teacher), cache_dir, progress)


def open_paired(
    extractor: FeatureExtractor | None,
    teacher: Teacher | None,
    condition: PromptsInTurn | None,
    own: Sequence[int] | None,
    settings: Mapping[str, Any],
    seed: int,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Reference | None:
    """What the teacher makes of the noise that is measured, at the most steps; None where no metric compares with it.

    Args:
        condition, own: the prompts, or the labels, that the images are measured of.
        settings: as for :func:`open_reference`, and ``more_metrics``.
        seed: of the noise.
    """
    asked = any(METRICS.get(name).needs_teacher for name in settings["more_metrics"])
    if extractor is None or teacher is None or not asked:
        return None
    return teacher_reference(teacher, *_most_steps(teacher, settings), extractor, settings["num_images"],
                             settings["batch_size"], condition, cache_dir, progress, seed, own)


def _most_steps(teacher: Teacher, settings: Mapping[str, Any]) -> tuple[Sampler, str]:
    """The teacher's sampler at the most of its steps, and in words."""
    scale, solver = settings["guidance_scale"], settings["solver"]
    steps = max(settings["teacher_steps"], default=STEPS)
    sampler = TeacherIdentity(teacher).known(teacher_sampler(teacher, steps, solver, scale), "teacher", steps, solver,
                                             scale)
    return sampler, f"{solver}, {network_calls(solver, steps)} calls, guidance {scale:g}"


def student_parameters(student: Student) -> tuple[int, int]:
    """Parameters of all networks, and of the largest one that makes an image."""
    sizes = [sum(p.numel() for p in network.parameters()) for network in student.networks]
    return sum(sizes), max(sizes)


def _label_rule(num_classes: int | None, own: Sequence[int] | None) -> str | None:
    if num_classes is None:
        return None
    return f"index modulo {num_classes}" if own is None else f"{', '.join(map(str, own))} in turn"


def teacher_sampler(teacher: Teacher, steps: int, solver: str = "euler", guidance_scale: float = 1.0) -> Sampler:
    """A sampler for ``generate`` from a teacher's ODE."""

    def sample(noise: Tensor, given: Tensor | Condition | None) -> Tensor:
        condition = _condition(teacher, given)
        noise = noise.to(teacher.device)
        latents = teacher.sample(noise, condition, steps=steps, solver=solver, guidance_scale=guidance_scale)
        return teacher.decode(latents)

    return sample


def pipeline_sampler(teacher: Teacher, steps: int, guidance_scale: float = 1.0) -> Sampler:
    """A sampler for ``generate`` from the pipeline's own scheduler, whose noise is seeded by each sample's own."""

    def sample(noise: Tensor, given: Tensor | Condition | None) -> Tensor:
        condition, generators = _condition(teacher, given), generators_of(noise)
        latents = teacher.pipeline_sample(noise.to(teacher.device), condition, steps, guidance_scale, generators)
        return teacher.decode(latents)

    return sample


def student_sampler(student: Student, guidance_scale: float | None = None, steps: int | None = None) -> Sampler:
    """A sampler for ``generate`` from a student's calls; ``steps``: how many of them, None for all.

    Raises:
        UserError: more steps than the student was trained for.
    """
    student.checked_steps(steps)
    several = {} if steps is None or student.num_steps == 1 else {"steps": steps}

    def sample(noise: Tensor, given: Tensor | Condition | None) -> Tensor:
        condition = _condition(student, given)
        return student.decode(student(noise.to(student.device), condition, guidance_scale, **several))

    return sample


def _condition(model: Teacher | Student, given: Tensor | Condition | None) -> Condition | None:
    return model.encode(labels=given) if isinstance(given, Tensor) else given


@dataclass(frozen=True)
class PromptsInTurn:
    """What ``generate`` takes as ``condition`` of a text-to-image model; ``prompts`` is the list it goes through."""

    condition: Callable[[range], Condition | None]
    prompts: Sequence[str]

    def __call__(self, indices: range) -> Condition | None:
        return self.condition(indices)


def prompt_conditions(model: Teacher | Student) -> PromptsInTurn | None:
    """What ``generate`` takes as ``condition``: the model's prompts in turn; None for a model without prompts.

    Raises:
        UserError: a text-to-image model without a list of prompts.
    """
    texts = model.prompts
    if texts is None:
        return None
    if texts.prompts is None:
        raise UserError("this model takes prompts, and no list of them is known; give prompts (--prompts FILE)")
    return PromptsInTurn(model.examples, texts.prompts)


def _use_prompts(model: Teacher | Student, prompts: PromptList) -> None:
    _taken(model).use(prompts)


def _taken(model: Teacher | Student) -> PromptConditions:
    if model.prompts is None:
        raise UserError("prompts were given, but this model takes none")
    return model.prompts


@contextlib.contextmanager
def prompts_used(models: Sequence[Teacher | Student | None], prompts: PromptList | None) -> Iterator[None]:
    """A block in which the models' lists are ``prompts``, unless that is None.

    Raises:
        UserError: a model that takes no prompts.
    """
    with contextlib.ExitStack() as stack:
        if prompts is not None:
            texts = [_taken(model) for model in models if model is not None]
            for each in {id(text): text for text in texts}.values():
                stack.enter_context(each.using(prompts))
        yield


def _models(subject: _Subject, settings: dict[str, Any]) -> list[tuple[str, int, Sampler]]:
    scale, solver = settings["guidance_scale"], settings["solver"]
    teacher = subject.teacher
    known = None if teacher is None else TeacherIdentity(teacher)
    steps, own = (list(settings[key]) for key in ("teacher_steps", "pipeline_steps"))
    for key, counts in (("teacher_steps", steps), ("pipeline_steps", own)):
        if any(count < 1 for count in counts):
            raise UserError(f"a teacher is sampled with at least 1 step; {key} is {counts}")
    models: list[tuple[str, int, Sampler]] = []
    if teacher is not None and known is not None:
        models += [("teacher", network_calls(solver, count),
                    known.known(teacher_sampler(teacher, count, solver, scale), "teacher", count, solver, scale))
                   for count in steps]
        models += [("pipeline", teacher.pipeline_calls(count),
                    known.known(pipeline_sampler(teacher, count, scale), "pipeline", count, known.scheduler(), scale))
                   for count in own]
    if subject.student is not None:
        models += [("student", calls, student_sampler(subject.student, scale, calls))
                   for calls in subject.student.step_counts]
    if not models:
        raise UserError(f"nothing to measure in {subject.name}: it has no student, and no teacher rows were asked for")
    return models


def _teacher_facts(teacher: Teacher | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What the protocol says of how the teacher is read, and of the pipeline's own rows."""
    remarks = [] if teacher is None else teacher.remarks()
    facts: dict[str, Any] = {"teacher_remarks": remarks} if remarks else {}
    if teacher is not None and settings["pipeline_steps"]:
        facts["pipeline"] = f"{describe_call(teacher)}; its own noise seeded by each sample's start noise"
    return facts


def _solver_note(report: Report) -> str | None:
    """A sentence where the pipeline's own call makes much better images than the deterministic solver ever does."""
    called = report.protocol.get("distance", "FID")
    figure = figure_of(called)
    found = {name: [(row.figures[figure], row.calls) for row in report.rows
                    if row.model == name and row.figures.get(figure) is not None] for name in ("teacher", "pipeline")}
    if not all(found.values()):
        return None
    (best, calls), (own, own_calls) = min(found["teacher"]), min(found["pipeline"])
    if best <= MUCH_WORSE * own:
        return None
    return (f"the deterministic solver is much worse than the pipeline's own call: {called} {best:.3f} at {calls} "
            f"calls, and {own:.3f} at {own_calls}; compare students with the pipeline's row")


def _open(source: Any, device: torch.device, with_teacher: bool) -> _Subject:
    if not isinstance(source, (str, os.PathLike)):
        return _open_live(source, device)
    from flowdistill import load_student
    from flowdistill.students import exported_student

    folder = local_path(source)
    name = str(source)
    if (folder / CONFIG).is_file():
        config = run_settings(folder)
        student = load_student(folder).to(device) if is_student_folder(folder) else None
        settings = {key: value for key, value in (config.get("evaluation") or {}).items() if key in DEFAULTS}
        for key, names in (("reference", (*IMAGE_SETS, TEACHER)), ("features", FEATURES)):
            if isinstance(settings.get(key), str) and settings[key] not in names:
                settings[key] = _found_again(settings[key], folder)
        settings["scorers"] = [scorer_found_again(name, folder) for name in settings.get("scorers") or ()]
        if isinstance(settings.get("prompts"), str):
            settings["prompts"] = found_again(settings["prompts"], folder)
        section = teacher_found_again(config.get("teacher") or {}, folder)
        teacher = _teacher_of(folder, section, device) if with_teacher else None
        return _Subject(name, teacher, student, settings)
    if folder.is_dir() and is_student_folder(folder):
        student = load_student(folder).to(device)
        info = student.info
        lora = {} if info.base_lora is None else {"lora": info.base_lora.source, "lora_scale": info.base_lora.scale}
        vae = {} if info.base_vae is None else {"vae": info.base_vae.source}
        section = teacher_found_again({"source": info.base_model, **lora, **vae}, folder)
        # A student is complete without its teacher: when that has moved, its rows are left out.
        reason = None
        if with_teacher:
            reason = _not_here(section) if info.base_model else "the student does not say which that was"
        if reason is not None and Processes.current().is_main:
            say(f"without rows of the teacher, because {reason}; evaluate the run folder of {name}, whose config.yaml "
                "names its teacher, or give the teacher's pipeline beside the student")
        found = with_teacher and reason is None
        return _Subject(name, _teacher_of(folder, section, device) if found else None, student)
    if (student := exported_student(folder, device)) is not None:
        return _Subject(name, student=student)
    files = [] if (folder / "model_index.json").is_file() or not folder.is_dir() else folder.iterdir()
    if any(is_picture(file) for file in files if file.is_file()):
        raise UserError(f"{name} is a folder of images, of which one alone is no comparison; give a run, a student, a "
                        "pipeline or a second folder of images beside it, or measure it with scripts/evaluate_fid.py")
    return _Subject(name, _load_teacher({"source": name}, device))


def _not_here(section: Mapping[str, Any]) -> str | None:
    """Why the teacher that a student names is not loaded, in words; None where all of it is here."""
    for key, there in (("source", Path.is_dir), ("lora", Path.exists), ("vae", Path.exists)):
        if key in section and not there(local_path(section[key])):
            return (f"{shown(section[key], quoted=False)}, which the student names as its teacher's {key}, is not here "
                    "(nothing is downloaded for a student)")
    return None


def _found_again(source: str, folder: Path) -> str:
    """A run's reference or features as they are reached from here, also statistics behind the name of their mode."""
    found, (mode, colon, rest) = found_again(source, folder), source.partition(":")
    return found if found != source or not colon else f"{mode}:{found_again(rest, folder)}"


def _open_live(source: Any, device: torch.device) -> _Subject:
    name = str(getattr(source, "source", "") or type(source).__name__)
    if hasattr(source, "velocity") and hasattr(source, "sample"):
        return _Subject(name, teacher=source)
    if hasattr(source, "generate") and hasattr(source, "decode"):
        return _Subject(name, student=source)
    if hasattr(source, "save_pretrained") and hasattr(source, "components"):
        return _Subject(name, load_teacher(source, device=device))
    raise UserError(f"a {type(source).__name__} cannot be evaluated; give a run, a student, a teacher or a pipeline")


def _teacher_of(folder: Path, section: dict[str, Any], device: torch.device) -> Teacher:
    """The teacher of the run in a folder, or of the student in a run's.

    Raises:
        UserError: its weights are not those that the run was trained with.
    """
    settings, remedy = _teacher_settings(section), "or leave the teacher out (--no-teacher)"
    Processes.current().on_main(lambda: check_weights(folder, partial(teacher_files, settings), remedy))
    return load_teacher(settings, device=device)


def _load_teacher(section: dict[str, Any], device: torch.device) -> Teacher:
    return load_teacher(_teacher_settings(section), device=device)


def _teacher_settings(section: dict[str, Any]) -> TeacherConfig:
    if not section.get("source"):
        raise UserError("the run's config.yaml names no teacher.source, so its teacher cannot be evaluated")
    known = {item.name for item in fields(TeacherConfig)}
    settings = {key: value for key, value in section.items() if key in known and value is not None}
    # What decides how students are trained says nothing about the teacher.
    return TeacherConfig(**settings | {"start": None})
