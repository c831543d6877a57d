"""What the runs of an experiment gave: figures of a run folder, table, figure, docs page (see run_experiment.py)."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowdistill.utils.errors import UserError
from flowdistill.utils.text import read_json_object, read_text

PAIRS, PAIR_STEPS, PAIR_SEED = 256, 50, 1  # the seed differs from the evaluation's
FLOOR = " The two halves are smaller sets than the whole, which makes their FID larger: rows may be below it."
Line = dict[str, Any]


def measure(folder: Path, curve: dict[str, int] | None, threads: int) -> Line:
    """Report, training time, paired error and curve of a finished run folder.

    Args:
        curve: ``num_images`` for the FID of the averaged student of every checkpoint; None: no curve.
        threads: of torch.
    """
    import torch

    from flowdistill import load_student
    from flowdistill.config import TeacherConfig, load_config, teacher_found_again
    from flowdistill.evaluation import Evaluator, prompt_conditions, student_sampler
    from flowdistill.teachers.loading import teacher_files
    from flowdistill.teachers.weight_files import check_weights
    from flowdistill.training.checkpoint import checkpoints, read_state, read_tensors

    torch.set_num_threads(threads)
    config, student = load_config(folder / "config.yaml", []), load_student(folder)
    report = read_json_object(folder / "report.json")
    saved = checkpoints(folder / "checkpoints")
    teacher = teacher_found_again(dataclasses.asdict(config.teacher), folder)
    check_weights(folder, lambda: teacher_files(TeacherConfig(**teacher)), "or train the run again")
    pairs = _pairs(tuple(teacher.items()), student.info.guidance_scale)
    figures = {
        "rows": report["rows"],
        "fid_floor": report["fid_floor"],
        "num_images": report["num_images"],
        "train_seconds": train_seconds(folder),
        "paired_error": paired_error(student, *pairs),
        "curve": [],
    }
    if curve is None:
        return figures
    settings = config.evaluation
    evaluator = Evaluator(settings.features, settings.reference, curve["num_images"], 0, settings.batch_size,
                          metrics=("frechet", "accuracy"), progress=False)
    for step, path in saved:
        if step % curve["every"] and step != saved[-1][0]:
            continue  # where a signal stopped the run; the other seeds have no such point
        odd = student.network.load_state_dict(read_tensors(path, "student.average"), strict=False).unexpected_keys
        if odd:
            raise UserError(f"{path} does not fit the student: {odd[0]} is not in its network")
        row = evaluator.measure(student_sampler(student), student.shape, student.num_classes,
                                condition=prompt_conditions(student))
        point = {"step": step, "seconds": read_state(path)["seconds"], "fid": row.fid, "accuracy": row.accuracy}
        figures["curve"].append(point | {"paired_error": paired_error(student, *pairs)})
    return figures


def train_seconds(folder: Path) -> float:
    """Training time of a run; several students, and what they start from, are runs of their own in the folder."""
    from flowdistill.training.checkpoint import checkpoints, read_state

    found = [checkpoints(part) for part in (folder / "checkpoints", *sorted(folder.glob("*/checkpoints")))]
    return sum(read_state(saved[-1][1])["seconds"] for saved in found if saved)


def paired_error(student: Any, noise: Any, condition: Any, target: Any) -> float:
    """Root mean square of the student's latents minus ``target``, from the same noise."""
    import torch

    with torch.no_grad():
        return float((student(noise, condition) - target).square().mean().sqrt())


@functools.cache
def _pairs(teacher_settings: tuple[Any, ...], guidance_scale: float) -> tuple[Any, Any, Any]:
    """Noise, condition, and where the teacher's ODE takes them; solved once for all runs of a teacher."""
    from flowdistill import load_teacher
    from flowdistill.utils.randomness import indexed_noise

    teacher = load_teacher(**dict(teacher_settings))
    noise = indexed_noise(teacher.shape, PAIR_SEED, range(PAIRS))
    condition = teacher.examples(range(PAIRS))
    return noise, condition, teacher.sample(noise, condition, PAIR_STEPS, guidance_scale=guidance_scale)


def table(labels: Sequence[str], lines: Sequence[Line], speed: bool = False) -> str:
    """Markdown: the teacher's rows once, then a row a label with mean and standard deviation over seeds.

    Precision and recall have columns when a row has them, and images a second with ``speed``.
    """
    rows = [row for line in lines for row in line["rows"]]
    more = [name for name in ("precision", "recall") if any(row.get(name) is not None for row in rows)]
    several = any(row.get("stored_parameters") != row.get("active_parameters") for row in rows)
    sizes = ["parameters: of an image", "of all students"] if several else []
    better = ["FID ↓", *(f"{name} ↑" for name in more), "label accuracy ↑", "paired error ↓"]
    fast = ["images/s ↑"] if speed else []
    head = ["model", "network calls", *better, *fast, "training", *sizes]
    text = [_cells(head), "|" + "---|" * len(head)]
    for row in (row for row in lines[0]["rows"] if row["model"] == "teacher"):
        shares = [_share([row.get(name)]) for name in more]
        accuracy = _percent([row["accuracy"]])
        rate = [_spread([row["images_per_second"]], ".0f")] if speed else []
        empty = [""] * (1 + len(sizes))
        text.append(_cells(["teacher", row["calls"], _fid([row["fid"]]), *shares, accuracy, "", *rate, *empty]))
    for label in labels:
        mine = [line for line in lines if line["label"] == label]
        if not mine:
            continue
        made = [row for line in mine for row in line["rows"] if row["model"] == "student"]
        most = max(row["calls"] for row in made)
        for calls in sorted({row["calls"] for row in made}):
            students = [row for row in made if row["calls"] == calls]
            # The paired error is that of all calls.
            error = _spread([line["paired_error"] for line in mine], ".4f") if calls == most else ""
            minutes = f"{_spread([line['train_seconds'] / 60 for line in mine], '.1f')} min" if calls == most else ""
            fid = _fid([row["fid"] for row in students])
            accuracy = _percent([row["accuracy"] for row in students])
            shares = [_share([row.get(name) for row in students]) for name in more]
            counts = [f"{students[0][key]:,}" for key in ("active_parameters", "stored_parameters")] if several else []
            rate = [_spread([row["images_per_second"] for row in students], ".0f")] if speed else []
            text.append(_cells([label, calls, fid, *shares, accuracy, error, *rate, minutes, *counts]))
    if lines[0]["fid_floor"] is not None:
        floor = ["two random halves of the real images", "", _fid([lines[0]["fid_floor"]])]
        text.append(_cells(floor + [""] * (len(head) - len(floor))))
    seeds = sorted({line["seed"] for line in lines})
    said = f"seeds {', '.join(map(str, seeds))}"
    of_label = {label: sorted(line["seed"] for line in lines if line["label"] == label) for label in labels}
    fewer = [f"{label} {', '.join(map(str, own))} only" for label, own in of_label.items() if own and own != seeds]
    text += ["", f"{lines[0]['num_images']:,} images a row; {'; '.join([said, *fewer])}: mean ± standard deviation. "
             f"Runs at a time: {lines[0]['jobs']}, CPU threads of each: {lines[0]['threads']}. ↓: lower is better, ↑: "
             f"higher.{'' if lines[0]['fid_floor'] is None else FLOOR}"]
    return "\n".join(text) + "\n"


def figure(title: str, labels: Sequence[str], lines: Sequence[Line], path: Path) -> None:
    """Draw FID and paired error against training steps and time, or against time where no curves were asked for.

    Curves are means over seeds with a band of one standard deviation. Without them a run is a small dot and the mean of
    a label a large one; several students have their time together and, beside it, the time of one. Where students were
    measured at several numbers of calls, the first panel has the FID at each, beside the teacher's.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('the figure needs matplotlib: pip install "flowdistill[plots]"') from error

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = any(line["curve"] for line in lines)
    panels = CURVE_PANELS if curves else POINT_PANELS
    by_calls = not curves and any(len(calls_curve(lines, label)) > 1 for label in labels)
    if by_calls:
        panels = (("network calls", "calls", "fid"), *panels[1:])
    drawing, axes = plt.subplots(1, len(panels), figsize=(17, 4.5), layout="constrained")
    colours = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20").colors  # no colour stands for two labels
    for axis, (below, horizontal, vertical) in zip(axes, panels, strict=True):
        axis.set_prop_cycle(color=colours)
        for label in labels:
            mine = [line for line in lines if line["label"] == label]
            if horizontal == "calls":
                _draw_calls(axis, label, calls_curve(lines, label))
            elif curves:
                _draw_curve(axis, label, mine, horizontal, vertical)
            elif mine:
                _draw_points(axis, label, [{**run_figures(line), **line} for line in mine], horizontal, vertical)
        teachers = [row for row in lines[0]["rows"] if row["model"] == "teacher"] if vertical == "fid" else []
        if horizontal == "calls":
            most = max(calls for label in labels for calls in calls_curve(lines, label))
            axis.plot(*zip(*((row["calls"], row["fid"]) for row in teachers if row["calls"] <= most), strict=True),
                      marker=".", color="grey", linestyle=":", label="teacher")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
        for row in teachers[-2:] if horizontal != "calls" else ():
            axis.axhline(row["fid"], color="grey", linestyle=":", linewidth=1)
            axis.annotate(f"teacher, {row['calls']} calls", (0.99, row["fid"]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8, color="grey")  # fmt: skip
        axis.set(xlabel=below, ylabel={"fid": "FID", "paired_error": "paired error"}[vertical])
        low, high = axis.get_ylim()
        if curves or high > 10 * max(low, 0.1):  # the ticks of a logarithmic axis are hard to read within one decade
            axis.set_yscale("log")
    drawing.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    drawing.suptitle(title)
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


CURVE_PANELS = (
    ("training step", "step", "fid"),
    ("training time in seconds", "seconds", "fid"),
    ("training step", "step", "paired_error"),
)
POINT_PANELS = (
    ("training time of one student in seconds", "seconds_each", "fid"),
    ("training time of all students in seconds", "train_seconds", "fid"),
    ("training time of all students in seconds", "train_seconds", "paired_error"),
)


def _draw_curve(axis: Any, label: str, mine: Sequence[Line], horizontal: str, vertical: str) -> None:
    points = list(zip(*(line["curve"] for line in mine), strict=False))
    points = [point for point in points if all(one[vertical] is not None for one in point)]
    x = [statistics.fmean(one[horizontal] for one in point) for point in points]
    y = [statistics.fmean(one[vertical] for one in point) for point in points]
    spread = [statistics.stdev(one[vertical] for one in point) if len(point) > 1 else 0.0 for point in points]
    (drawn,) = axis.plot(x, y, marker=".", label=label)
    # A band that reaches zero has no lower edge on a logarithmic axis.
    lower = [max(mean - width, mean / 10) for mean, width in zip(y, spread, strict=True)]
    upper = [mean + width for mean, width in zip(y, spread, strict=True)]
    axis.fill_between(x, lower, upper, alpha=0.2, color=drawn.get_color(), linewidth=0)


def calls_curve(lines: Sequence[Line], label: str) -> dict[int, list[float]]:
    """FID of a label's runs at each number of calls, where all of them have it."""
    found: dict[int, list[float]] = {}
    mine = [line for line in lines if line["label"] == label]
    for row in (row for line in mine for row in line["rows"]):
        if row["model"] == "student" and row["fid"] is not None:
            found.setdefault(row["calls"], []).append(row["fid"])
    return {calls: values for calls, values in sorted(found.items()) if len(values) == len(mine)}


def _draw_calls(axis: Any, label: str, found: dict[int, list[float]]) -> None:
    means = [statistics.fmean(values) for values in found.values()]
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
    if found:
        axis.errorbar(list(found), means, yerr=spread, marker="o", markersize=4, capsize=3, label=label)


def run_figures(line: Line) -> Line:
    """FID of a run's student at all its calls, and the training time of one student in seconds; several of one size
    share the time."""
    row = max((row for row in line["rows"] if row["model"] == "student"), key=lambda row: row["calls"])
    share = row["active_parameters"] / row["stored_parameters"] if row.get("stored_parameters") else 1.0
    return {"fid": row["fid"], "seconds_each": share * line["train_seconds"]}


def _draw_points(axis: Any, label: str, mine: Sequence[Line], horizontal: str, vertical: str) -> None:
    x, y = ([one[key] for one in mine if one[vertical] is not None] for key in (horizontal, vertical))
    if not x:
        return
    (drawn,) = axis.plot(statistics.fmean(x), statistics.fmean(y), "o", markersize=9, label=label)
    axis.plot(x, y, "o", markersize=4, alpha=0.5, color=drawn.get_color())


def write_docs(page: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of table ``name`` in a page.

    Raises:
        UserError: no page, or no such pair of markers in it.
    """
    if not page.is_file():
        raise UserError(f"{page} does not exist")
    before = read_text(page)
    start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(before):
        raise UserError(f"{page} has no lines '{start}' and '{end}'; the table goes between them")
    page.write_text(pattern.sub(lambda _: f"{start}\n{text}{end}", before), encoding="utf-8")


def _spread(values: Sequence[float | None], form: str) -> str:
    finite = [value for value in values if value is not None]
    if len(finite) < len(values) or not finite:
        return "diverged" if len(finite) < len(values) else "-"
    mean = format(statistics.fmean(finite), form)
    return mean if len(finite) == 1 else f"{mean} ± {format(statistics.stdev(finite), form)}"


def _fid(values: Sequence[float | None]) -> str:
    """With three decimals where two would hide the spread."""
    small = all(value is not None and value < 1 for value in values)
    return _spread(values, ".3f" if small else ".2f")


def _cells(values: Sequence[Any]) -> str:
    return "|" + "|".join(f" {value} " if value != "" else " " for value in values) + "|"


def _share(values: Sequence[float | None]) -> str:
    return "" if None in values else _spread(values, ".3f")


def _percent(shares: Sequence[float | None]) -> str:
    return "" if None in shares else _spread([100 * share for share in shares if share is not None], ".2f") + " %"
