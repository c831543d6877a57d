"""The data in front of a model card, in the hub's words, and the sections that a run adds to its text."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, get_session

from flowdistill import __version__
from flowdistill.conditioning.pipeline_lora import FILE
from flowdistill.config.registry import usable_methods
from flowdistill.config.run_folder import CONFIG, found_again, run_settings
from flowdistill.evaluation.metrics import all_metrics
from flowdistill.evaluation.report import Report
from flowdistill.students.student import Student
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path, portable_path
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import JsonObject, dump_yaml, parse_yaml, read_text

CARD = "README.md"
GRID = "samples.png"
"""The samples of a run, beside the card that shows them."""
HERE = "path/to/this/folder"
"""What a card's code calls the folder that it is in; the repository's name once it is on the hub."""
LICENSE_KEYS = ("license", "license_name", "license_link")
OWN_KEYS = ("started_in", "output_dir")
"""Settings of a run that say nothing but where its files are."""
HUB = "https://huggingface.co"
SECONDS = 5.0
FRONT = re.compile(r"\s*---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)
"""The data in front of a card's text."""
NAMED = re.compile(r"(?:file://|[\w-]+:(?!//))(?=[/~])")
"""A path with the name of its reader in front, as feature extractors and scorers have it."""


# --- the teacher


def is_hub_id(source: str) -> bool:
    """Whether a source is no path here and can be the name of a repository."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not source.startswith((".", "~", "path/"))
    return named and not find_path(source).exists()


def card_of(source: str, near: Path | None = None) -> JsonObject:
    """The data of a model's own card: in its folder, in the hub's cache or on the hub; empty where none can be read.

    They are read as they stand there: the hub client's class takes no other keys than the names of variables, and
    fails at values that are not as the hub has them.

    Args:
        source: a folder or a hub id.
        near: a run folder, from which the relative path of a folder may be found again.
    """
    folder = find_path(source if near is None else found_again(source, near))
    if not folder.is_dir() and not is_hub_id(source):
        return {}
    try:
        cached = None if folder.is_dir() else try_to_load_from_cache(source, CARD)
        if folder.is_dir() or isinstance(cached, str):
            text = read_text(cached if isinstance(cached, str) else folder / CARD)
        else:
            text = (_fetched(source) or "").replace("\r\n", "\n")
        front = FRONT.match(text)
        data = parse_yaml(front[1] or "", CARD) if front else None
    except (OSError, UserError, ValueError):  # none there, or none that can be read
        return {}
    return data if isinstance(data, dict) else {}


@functools.cache  # several exports ask for one teacher's: without a network they wait for it once
def _fetched(source: str) -> str | None:
    """A card from the hub; None where there is none, or no way there. The hub's client would try for minutes."""
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/{source}/resolve/main/{CARD}", headers=build_hf_headers(),
                                   timeout=SECONDS, follow_redirects=True)
        answer.raise_for_status()
    except Exception:  # the hub client raises many unrelated types
        return None
    return str(answer.text)


def license_of(source: str, near: Path | None = None) -> dict[str, Any]:
    """What the card of a teacher says about its licence, as a card's data; empty where it says nothing.

    All values are texts in one line, but for ``license``, which is a list where the teacher has several. A link is an
    address: one to a file beside the card of a folder leads nowhere from another card, and is left out.
    """
    data = card_of(source, near) if source else {}
    said: dict[str, Any] = {key: text for key in LICENSE_KEYS if (text := _one_line(data.get(key)))}
    if isinstance(names := data.get("license"), list):
        texts = [_one_line(name) for name in names]
        if texts and all(texts):
            said["license"] = texts if len(texts) > 1 else texts[0]
    link = said.pop("license_link", "")
    if link and ":" not in link and is_hub_id(source):  # a file of its repository
        link = f"{HUB}/{source}/blob/main/{link}"
    if re.fullmatch(r"https?://[^\s()<>]+", link):
        said["license_link"] = link
    return said if "license" in said else {}


def _one_line(value: object) -> str:
    """A text of a card in one line; empty for one of other characters, and for what is no text."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text if text.isprintable() else ""


def about_license(license: Mapping[str, Any], base: str) -> str:
    """The same in words."""
    if not license:
        return (f"\n## Licence\n\nThe licence of `{base}` could not be read from a model card of its own, so none is "
                "named here. It applies to this model too: look it up before you share it.\n")
    names = license.get("license_name", license["license"])
    name = names if isinstance(names, str) else ", ".join(names)
    name = re.sub(r"([\\`*\[\]<>|])", r"\\\1", name)  # somebody else's text stays text in Markdown
    link = f" ({license['license_link']})" if "license_link" in license else ""
    return f"\n## Licence\n\nThat of its teacher, `{base}`: {name}{link}.\n"


# --- the data


def card_data(
    method: str, base: str, *, library: str, pipeline_tag: str, tags: Sequence[str], relation: str = "finetune",
    adapters: Sequence[str] = (), near: Path | None = None, **more: Any,
) -> ModelCardData:
    """A card's data.

    Args:
        method: that it was made with; may be empty.
        base: the teacher's source. It is named as ``base_model`` where it is a hub id: the hub takes any value for one.
        relation: the hub's ``base_model_relation``.
        adapters: LoRAs that were in the teacher's weights.
        near: see :func:`card_of`.
        more: other fields of the hub's.
    """
    bases = [source for source in (base, *adapters) if source and is_hub_id(source)]
    if bases:
        more |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": relation}
    named = [*tags, "flowdistill", "distillation", *([method] if method else [])]
    more |= license_of(base, near)
    return ModelCardData(library_name=library, pipeline_tag=pipeline_tag, tags=named, **more)


def student_data(student: Student, calls: int, library: str, lora: bool = False) -> ModelCardData:
    """The data of the card of a student, or of its export.

    Args:
        calls: of the network for an image.
        lora: whether a LoRA file lies beside it.
    """
    info = student.info
    tags = ["one-step" if calls == 1 else "few-step"] + (["lora"] if lora else [])
    tags += ["class-conditional"] if student.classes is not None else []
    adapters = [] if info.base_lora is None else ["/".join(info.base_lora.source.split("/")[:2])]
    tag = "unconditional-image-generation" if student.prompts is None else "text-to-image"
    return card_data(info.method, info.base_model, library=library, pipeline_tag=tag, tags=tags, adapters=adapters)


def write_card(folder: Path, text: str, student: Student, calls: int, library: str = "diffusers") -> None:
    """Write the card of a student's folder: its data, ``text``, its licence and its method's paper."""
    data = student_data(student, calls, library, (folder / FILE).is_file())
    info = student.info
    license = {key: value for key in LICENSE_KEYS if (value := getattr(data, key, None)) is not None}
    base = portable_path(info.base_model) or "the teacher"
    vae = "" if info.base_vae is None else (
        f"\nThe autoencoder in this folder is `{portable_path(info.base_vae.source)}`, whose licence applies too.\n")
    save_card(folder, data, text + about_license(license, base) + vae + about_paper(info.method) + about_version())


def save_card(folder: Path, data: ModelCardData, text: str) -> None:
    """Write ``README.md`` with ``data`` in front of ``text``."""
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}", encoding="utf-8")


def about_paper(method: str) -> str:
    """The papers of a method, which the method itself names."""
    about = next((getattr(kind, "about", None) for name, kind in usable_methods() if name == method), None)
    papers = str(getattr(about, "paper", ""))  # a method of another package may have none
    return "" if not papers else "\n## Citation\n\n" + "".join(f"- {paper.strip()}\n" for paper in papers.split(";"))


def about_version() -> str:
    return f"\nMade with flowdistill {__version__}.\n"


# --- what a run adds


def add_run(folder: Path, run: Path, calls: int, *commands: str, own: bool = True) -> None:
    """Add what a run knows to the card in ``folder``: samples, figures with their protocol, and how to make it again.

    Args:
        run: the run folder; nothing is added where it is none.
        calls: of the network for an image; the figures are those of so many.
        commands: that come after the run's own, to write this folder.
        own: whether the run's samples and figures are this model's: not of another guidance scale or number of steps.
    """
    if not (run / CONFIG).is_file():
        return
    card = ModelCard.load(folder / CARD)
    data, text = card.data, card.text.lstrip()
    assert isinstance(data, ModelCardData)
    settings = run_settings(run)
    teacher = settings.get("teacher") or {}
    source = str(teacher.get("source", ""))
    # From the run, it is a folder.
    if source and source == data.base_model and local_path(found_again(source, run)).exists():
        data.base_model = None
        data.__dict__.pop("base_model_relation", None)
    if data.license is None and (license := license_of(source, run)):  # of a teacher found from the run only
        for key, value in license.items():
            setattr(data, key, value)
        base = portable_path(source)
        text = text.replace(about_license({}, base), about_license(license, base))
    sections = ""
    grid = run / "samples" / "final.png"
    if own and grid.is_file():
        shutil.copyfile(grid, folder / GRID)
        sections += f"\n## Samples\n\nOf the student at the end of its run, from fixed noise:\n\n![samples]({GRID})\n"
    report = _report(run) if own else None
    if report is not None:
        report = portable_report(report)
    if report is not None:
        sections += about_report(report)
        data.eval_results = eval_results(report, calls) or None
        data.model_name = f"{settings.get('method', {}).get('name', 'student')}, {in_calls(calls)}"
    text = text.replace("\n## Licence", f"{sections}{about_run(settings, commands)}\n## Licence", 1)
    save_card(folder, data, text)


def add_export(
    folder: Path, source: str, student: Student, guidance_scale: float | None = None, steps: int | None = None
) -> None:
    """Add what a run knows to the card of its student's export.

    Args:
        source: the run folder, or the student's in it; nothing is added for others.
        guidance_scale, steps: that the export was asked for.
    """
    place = local_path(source)
    run = next((run for run in (place, place.absolute().parent) if (run / CONFIG).is_file()), place)
    calls = student.checked_steps(steps)
    asked = {"guidance-scale": guidance_scale, "steps": steps}
    options = "".join(f" --{name} {value:g}" for name, value in asked.items() if value is not None)
    own = guidance_scale in (None, student.info.guidance_scale) and calls == student.num_steps
    add_run(folder, run, calls, f"flowdistill export runs/again exported{options}", own=own)


def in_calls(count: int) -> str:
    """A number of network calls, in words."""
    return f"{count} network call{'' if count == 1 else 's'}"


def _report(run: Path) -> Report | None:
    file = run / "report.json"
    try:
        return Report.read_json(file) if file.is_file() else None
    except UserError:  # damaged, or of another version: a card is no place to complain
        return None


def about_report(report: Report) -> str:
    """The table of a report and its remarks, which say how it was measured."""
    head, *lines = report.cells()
    table = [head, ["---"] * len(head), *lines]
    rows = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in table)
    return f"\n## Measured\n\n{rows}\n" + "".join(f"- {remark.strip()}\n" for remark in report.remarks())


def eval_results(report: Report, calls: int) -> list[EvalResult]:
    """The student's figures at so many calls as the hub's ``model-index``; none without features or a reference.

    A Fréchet distance goes by the name FID only where it is one of Inception's features.
    """
    row = next((row for row in report.rows if row.model == "student" and row.calls == calls), None)
    if row is None or report.features is None or report.reference is None:
        return []
    how = (f"{report.num_images} images, features {report.features}, reference {report.reference}, seed {report.seed}, "
           f"{in_calls(calls)}")
    reference = portable_path(report.reference)
    found = []
    for metric in all_metrics():
        for column in metric.shown(report.protocol):
            value = row.figures.get(column.name)
            if not isinstance(value, (int, float)):
                continue
            kind = column.name
            if kind == "fid" and not report.features.startswith("inception"):
                kind = "frechet_distance"
            found.append(EvalResult(
                task_type="image-generation", dataset_type=re.sub(r"\W+", "-", reference).strip("-").lower(),
                dataset_name=reference, metric_type=kind, metric_value=value, metric_name=f"{kind} ({how})"))
    return found


def about_run(settings: dict[str, Any], commands: Sequence[str]) -> str:
    """How to make the model again: the run's settings without what is of its machine, and the commands."""
    plain = {key: value for key, value in portable(settings).items() if key not in OWN_KEYS}
    plain["output_dir"] = "runs/again"
    text = dump_yaml(plain)
    lines = "\n".join(["flowdistill distill config.yaml", *commands])
    return (f"\n## Make it again\n\nWith flowdistill {__version__} and these settings as `config.yaml`:\n\n"
            f"```bash\n{lines}\n```\n\n<details><summary>config.yaml</summary>\n\n```yaml\n{text}```\n\n</details>\n")


def portable_report(report: Report) -> Report:
    """A report in which paths of this machine are such as a file that travels may name, also inside its sentences."""
    paths = {path: portable(path) for path in (report.features, report.reference) if path}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        if isinstance(value, str):
            for path, shown in paths.items():
                value = value.replace(path, shown) if path != shown else value
        return portable(value)

    return Report(report.rows, report.num_images, replaced(report.features), replaced(report.reference), report.seed,
                  report.fid_floor, replaced(report.protocol))


def portable(value: Any) -> Any:
    """Settings in which absolute paths, also behind a name and a colon, are such as a file that travels may name."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    if not isinstance(value, str) or "\n" in value or "\0" in value:
        return value
    named = NAMED.match(value)
    name, path = (named[0], value[named.end():]) if named else ("", value)
    if os.path.isabs(path) or path.startswith("~"):
        return name + portable_path(path)
    return value
