"""``flowdistill report``: one page of one or several runs, with everything in it and nothing from elsewhere."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from flowdistill import __version__
from flowdistill.evaluation import Report, Row
from flowdistill.evaluation.html import DASH, measured, protocol
from flowdistill.training.run_record import Part, RunRecord, Setting, read_run
from flowdistill.utils.charts import Line, chart, legend
from flowdistill.utils.errors import UserError, listed
from flowdistill.utils.files import atomic_write
from flowdistill.utils.html import definitions, document, picture, table
from flowdistill.utils.text import JsonObject

GRIDS = 24
"""Sample grids of a run in a page, at most: the first, the last and others between them at even distances."""
STYLE = """
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem 2rem;
  align-items: start; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 0 1.5rem; }
.charts figure { margin: .5rem 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; list-style: none; padding: 0; margin: .2rem 0; }
.row { display: flex; gap: 1rem; overflow-x: auto; padding-bottom: .5rem; }
.row figure { flex: 0 0 auto; max-width: min(100%, 24rem); margin: 0; }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem 1rem; margin: .5rem 0; }
.slider input { flex: 1 1 12rem; max-width: 24rem; accent-color: var(--link); }
.slider button { font: inherit; color: var(--fg); background: var(--panel); border: 1px solid var(--rule);
  border-radius: .3rem; padding: .15rem .7rem; }
.problem { border-left: 4px solid var(--c1); padding-left: .7rem; }
"""
# Without scripts all grids stand in a row. With them one is shown, chosen by a slider, which moves those of the other
# runs to the step nearest to it.
SCRIPT = """
const grids = [...document.querySelectorAll('.row')].map(row => {
  const shown = [...row.children], steps = shown.map(figure => Number(figure.dataset.step));
  if (shown.length < 2) return null;
  const bar = document.createElement('div'), label = document.createElement('label'),
    input = document.createElement('input'), said = document.createElement('output'),
    button = document.createElement('button');
  bar.className = 'slider'; label.textContent = 'step '; input.type = 'range'; input.min = 0;
  input.max = steps.length - 1; input.setAttribute('aria-label', 'step of the grid of ' + row.dataset.run);
  button.type = 'button'; let all = false;
  const grid = {steps, show(index) {
    input.value = index; said.textContent = steps[index].toLocaleString('en');
    input.setAttribute('aria-valuetext', 'step ' + steps[index]);
    shown.forEach((figure, number) => { figure.hidden = !all && number !== index; });
    button.textContent = all ? 'one at a time' : 'all in a row'; input.disabled = all; }};
  input.addEventListener('input', () => { const step = steps[input.value];
    grids.filter(Boolean).forEach(other => { let best = 0;
      other.steps.forEach((value, index) => {
        if (Math.abs(value - step) < Math.abs(other.steps[best] - step)) best = index; });
      other.show(other === grid ? Number(input.value) : best); }); });
  button.addEventListener('click', () => { all = !all; grid.show(Number(input.value)); });
  bar.append(label, input, said, button); row.before(bar); grid.show(steps.length - 1); return grid; });
"""


def write_report(folders: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Write the page of one or several runs, complete or not at all.

    Args:
        folders: of runs, whatever they have come to.

    Raises:
        UserError: a folder that is no run, or is given twice.
    """
    text = run_page([read_run(folder, name) for folder, name in zip(folders, names(folders), strict=True)])
    with atomic_write(path) as file:
        file.write(text.encode())


def names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What each run is called: the end of its path, from where it differs from those of the others.

    Raises:
        UserError: a folder that is given twice.
    """
    paths = [Path(os.path.abspath(os.path.expanduser(folder))).parts for folder in folders]
    for number, one in enumerate(paths):
        if one in paths[:number]:
            raise UserError(f"{folders[number]} is given twice; give each run once")
    if len(paths) == 1:
        return [paths[0][-1]]
    common = next(number for number, same in enumerate(itertools.zip_longest(*paths)) if len(set(same)) > 1)
    return ["/".join(parts[min(common, len(parts) - 1):]) for parts in paths]


def run_page(runs: Sequence[RunRecord]) -> str:
    """The page as text."""
    title = f"{runs[0].name}: a run of flowdistill" if len(runs) == 1 else f"{len(runs)} runs of flowdistill"
    parts = [f"<h1>{escape(title)}</h1>"]
    sections = {
        "Summary": _summary(runs),
        "Teacher beside student": _ends(runs),
        "Samples over steps": _grids(runs),
        "Measured": _measured(runs),
        "Curves": _curves(runs),
        "Settings": _settings(runs),
        "Commands": _commands(runs),
        "Versions": _versions(runs),
    }
    links = "".join(f'<li><a href="#{_anchor(name)}">{name}</a></li>' for name in sections)
    parts.append(f'<nav aria-label="sections"><ul>{links}</ul></nav><main>')
    parts += [f'<section id="{_anchor(name)}"><h2>{name}</h2>{text}</section>' for name, text in sections.items()]
    parts.append("</main>")
    return document(title, "".join(parts), STYLE, SCRIPT)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


# --- summary


def _summary(runs: Sequence[RunRecord]) -> str:
    facts: dict[str, Callable[[RunRecord], str]] = {
        "state": _state,
        "method": lambda run: str(run.section("method").get("name", DASH)),
        "teacher": lambda run: str(run.section("teacher").get("source", DASH)),
        "steps": lambda run: _steps(run),
        "images seen": lambda run: _sum(part.last.get("images") for part in run.parts),
        "training time": lambda run: _duration(run.seconds),
        "images/s in training": lambda run: ", ".join(
            _named(part, f"{part.rate:,.1f}") for part in run.parts if part.rate is not None) or DASH,
        "seed": lambda run: str(run.values.get("seed", DASH)),
        "folder": lambda run: str(run.folder),
    }
    if len(runs) == 1:
        text = definitions([(name, of(runs[0])) for name, of in facts.items()])
    else:
        text = table(["", *(run.name for run in runs)], [[name, *map(of, runs)] for name, of in facts.items()],
                     "the runs beside each other", "texts")
    text += '<p class="soft">Training time counts the steps alone, without measurements, pictures and files.</p>'
    problems = [f"{run.name}: {problem}" if len(runs) > 1 else problem for run in runs for problem in run.problems]
    return text + "".join(f'<p class="problem">{escape(problem)}</p>' for problem in problems)


def _state(run: RunRecord) -> str:
    best = {part.name: part.last["best_step"] for part in run.parts if part.last.get("best_step") is not None}
    kept = "".join(f"; kept is the student of step {step:,}{f' in {name}' if name else ''}"
                   for name, step in best.items())
    if run.finished:
        return f"finished{kept}"
    times = [part.written for part in run.parts if part.written is not None]
    if not times:
        return "nothing is logged yet"
    return f"has not come to its end; its last line is of {max(times).isoformat(' ', 'minutes')}{kept}"


def _steps(run: RunRecord) -> str:
    if len(run.parts) == 1:
        planned = DASH if run.planned is None else f"{run.planned:,}"
        return f"{run.parts[0].step:,} of {planned}"
    return ", ".join(_named(part, f"{part.step:,}") for part in run.parts)


def _named(part: Part, text: str) -> str:
    return f"{part.name} {text}" if part.name else text


def _sum(values: object) -> str:
    found = [value for value in values if isinstance(value, int)]  # type: ignore[attr-defined]
    return f"{sum(found):,}" if found else DASH


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# --- pictures


def _ends(runs: Sequence[RunRecord]) -> str:
    def shown(run: RunRecord) -> str:
        return "".join(picture(file, f"{name}, of the run {run.name}", name.capitalize())
                       for name, file in run.pictures.items()) or "<p>No picture of its end is there yet.</p>"

    if len(runs) == 1:
        return f'<div class="beside">{shown(runs[0])}</div>'
    return f'<div class="beside">{"".join(f"<div>{_heading(run, runs)}{shown(run)}</div>" for run in runs)}</div>'


def _grids(runs: Sequence[RunRecord]) -> str:
    rows = []
    for run in runs:
        rows.append(f"<div>{_heading(run, runs)}")
        parts = [part for part in run.parts if part.grids]
        if not parts:
            rows.append("<p>No sample grids are there; train.sample_every makes them.</p>")
        for part in parts:
            chosen = _evenly(part.grids, GRIDS)
            called = f"{run.name}/{part.name}" if part.name else run.name
            level = "h4" if len(runs) > 1 else "h3"
            head = f"<{level}>{escape(part.name)}</{level}>" if part.name else ""
            left_out = len(part.grids) - len(chosen)
            note = f'<p class="soft">{left_out} grids between these are left out.</p>' if left_out else ""
            figures = "".join(
                picture(file, f"sample grid of {called} at step {step:,}", f"Step {step:,}", f'data-step="{step}"')
                for step, file in chosen)
            rows.append(f'{head}{note}<div class="row" tabindex="0" role="group" data-run="{escape(called)}" '
                        f'aria-label="sample grids of {escape(called)} by step">{figures}</div>')
        rows.append("</div>")
    return ("<p>All grids of a run are of the same noise and the same labels or prompts.</p>"
            f'<div class="beside">{"".join(rows)}</div>')


def _heading(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    return f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""


def _evenly(grids: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    if len(grids) <= most:
        return list(grids)
    return [grids[round(number * (len(grids) - 1) / (most - 1))] for number in range(most)]


# --- figures


def _measured(runs: Sequence[RunRecord]) -> str:
    found = [(run, run.report) for run in runs if run.report is not None]
    missing = [run.name for run in runs if run.report is None]
    text = ""
    if len(found) > 1 and len({_measured_with(report) for _, report in found}) == 1:
        text = _evaluation(_together(found))
    else:
        if len(found) > 1:
            text = ('<p class="problem">These were measured with different features, references or numbers of images, '
                    "so their figures cannot be compared.</p>")
        for run, report in found:
            text += _heading(run, runs) + _evaluation(report)
    if missing:
        whose = "" if len(runs) == 1 else f" of {', '.join(missing)}"
        text += f"<p>No evaluation{escape(whose)} is there; <code>flowdistill evaluate</code> makes one.</p>"
    return text


def _evaluation(report: Report) -> str:
    return f"{measured(report, 'h3')}<details><summary>Protocol</summary>{protocol(report)}</details>"


def _measured_with(report: Report) -> tuple[object, ...]:
    """What has to agree where figures are compared."""
    facts = report.protocol
    return (report.num_images, report.features, report.reference, facts.get("features_sha256"),
            facts.get("reference_hash"), facts.get("resize"))


def _together(found: Sequence[tuple[RunRecord, Report]]) -> Report:
    """One report with the rows of several that were measured alike; rows that are equal in all of them are there once.

    Of the protocol what is the same for all, and the rest by run.
    """
    alike = all(run.section("teacher") == found[0][0].section("teacher") for run, _ in found)
    rows: list[Row] = []
    for run, report in found:
        for row in report.rows:
            # A student's rows are its run's own; those of a teacher belong to all its students.
            if not (alike and row.model != "student" and _without_rival(row, found)):
                rows.append(Row(**row.to_dict() | {"model": f"{run.name}: {row.model}"}))
            elif not any((row.model, row.calls) == (other.model, other.calls) for other in rows):
                rows.append(row)
    first = found[0][1]
    keys = list(dict.fromkeys(key for _, report in found for key in report.protocol))
    facts: JsonObject = {}
    for key in keys:
        values_of = [report.protocol.get(key) for _, report in found]
        if all(value == values_of[0] for value in values_of):
            facts[key] = values_of[0]
        else:
            facts[key] = {run.name: value for (run, _), value in zip(found, values_of, strict=True)}
    # Sentences under the table are of one report.
    for key in ("teacher_remarks", "pipeline_note", "note", "not_measured", "rows_not_measured_here"):
        if isinstance(facts.get(key), dict):
            facts.pop(key)
    return Report(rows, first.num_images, first.features, first.reference, first.seed, first.fid_floor, facts)


def _without_rival(row: Row, found: Sequence[tuple[RunRecord, Report]]) -> bool:
    """Whether no report has a row of the same name and calls with other figures."""
    return all(other.figures == row.figures for _, report in found for other in report.rows
               if (other.model, other.calls) == (row.model, row.calls))


def _curves(runs: Sequence[RunRecord]) -> str:
    sources = [(run, part) for run in runs for part in run.parts if part.figures]
    if not sources:
        return "<p>Nothing is logged yet.</p>"
    alone = len(sources) == 1
    lines: dict[str, list[Line]] = {}
    for number, (run, part) in enumerate(sources):
        called = "/".join(name for name in (run.name if len(runs) > 1 else "", part.name) if name)
        for figure, points in part.figures.items():
            base, _, call = figure.rpartition("/")
            if alone and base and call.isdigit():  # of each call of a student of several, over each other
                known = lines.setdefault(base, [])
                known.append(Line(f"call {call}", points, len(known)))
            else:
                lines.setdefault(figure, []).append(Line(called or "all", points, number))
    parts = []
    if not alone:
        shown = [Line("/".join(name for name in (run.name if len(runs) > 1 else "", part.name) if name), (), number)
                 for number, (run, part) in enumerate(sources)]
        parts.append(legend(shown))
    for title, kept in _groups(lines).items():
        drawn = "".join(_chart(name, kept[name], alone) for name in sorted(kept, key=_natural))
        if drawn:
            opened = "" if title.startswith("Other") and len(kept) > 6 else " open"
            parts.append(f'<details{opened}><summary>{title}</summary><div class="charts">{drawn}</div></details>')
    return "".join(parts)


def _chart(name: str, lines: Sequence[Line], alone: bool) -> str:
    # In the order of the calls, with the figure of all of them first.
    ordered = sorted(lines, key=lambda line: _natural(line.name)) if alone else list(lines)
    if alone:
        ordered = [Line(line.name, line.points, number) for number, line in enumerate(ordered)]
    drawing = chart(name, ordered)
    names = legend(ordered) if alone and len(ordered) > 1 else ""
    return f"<figure><figcaption>{escape(name)}</figcaption>{drawing}{names}</figure>" if drawing else ""


def _natural(name: str) -> tuple[str, int]:
    """Names with a number behind them in the order of these."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head):] or -1)


def _groups(lines: Mapping[str, list[Line]]) -> dict[str, dict[str, list[Line]]]:
    """Charts by what they are of, in the order of the page."""
    groups: dict[str, dict[str, list[Line]]] = {
        title: {} for title in ("Measured during training", "Losses", "Gradients and learning rates",
                                "Speed and memory", "Other figures of the networks")}
    for name, drawn in lines.items():
        head = name.split("/")[0]
        if name == "skipped" and not any(value for line in drawn for _, value in line.points):
            continue  # no update was
        if name in ("images_per_second", "skipped") or "memory" in name:
            title = "Speed and memory"
        elif head == "loss":
            title = "Losses"
        elif head in ("grad_norm", "lr"):
            title = "Gradients and learning rates"
        else:
            title = "Other figures of the networks" if "/" in name else "Measured during training"
        groups[title][name] = drawn
    return groups


# --- settings, commands, versions


def _settings(runs: Sequence[RunRecord]) -> str:
    keys = list(dict.fromkeys(setting.key for run in runs for setting in run.settings))
    by_key: list[Mapping[str, Setting]] = [{setting.key: setting for setting in run.settings} for run in runs]

    def row(key: str) -> list[str]:
        found = [settings.get(key) for settings in by_key]
        defaults = list(dict.fromkeys(one.default for one in found if one is not None and one.default is not None))
        return [key, *(DASH if one is None else one.value for one in found), " or ".join(defaults) or DASH]

    def differs(key: str) -> bool:
        return len({None if key not in settings else settings[key].value for settings in by_key}) > 1

    def changed(key: str) -> bool:
        return any(key in settings and settings[key].changed for settings in by_key)

    head = ["setting", *(run.name for run in runs), "default"]
    groups = {
        "What differs between these runs": [key for key in keys if differs(key)],
        "What differs from the defaults": [key for key in keys if not differs(key) and changed(key)],
        "Everything else": [key for key in keys if not differs(key) and not changed(key)],
    }
    parts = []
    for title, chosen in groups.items():
        if chosen:
            opened = "" if title == "Everything else" else " open"
            parts.append(f"<details{opened}><summary>{title} ({len(chosen)})</summary>"
                         f"{table(head, [row(key) for key in chosen], title, 'texts')}</details>")
    return "".join(parts)


def _commands(runs: Sequence[RunRecord]) -> str:
    return "".join(_heading(run, runs) + _block(_commands_of(run)) for run in runs)


def _commands_of(run: RunRecord) -> list[tuple[str, str]]:
    start, place, move = run.values.get("started_in"), str(run.folder), ""
    if isinstance(start, str) and start != os.getcwd():  # where the relative paths among its settings begin
        place, move = os.path.abspath(place), f"cd {shlex.quote(start)} && "
    folder, config = shlex.quote(place), shlex.quote(os.path.join(place, "config.yaml"))
    again = f"{move}flowdistill distill {config} output_dir={shlex.quote(f'{place}-again')}"
    commands = [("the same run once more, in another folder", again)]
    if not run.finished:
        commands.append(("to its end, from its last checkpoint", f"{move}flowdistill distill {config}"))
    if run.report is not None:
        commands.append(("its evaluation once more", f"flowdistill evaluate {folder} --num-images "
                         f"{run.report.num_images} --seed {run.report.seed}"))
    else:
        commands.append(("an evaluation", f"flowdistill evaluate {folder}"))
    return [*commands, ("images", f"flowdistill sample {folder} --num-images 40 --out grid.png"),
            ("a pipeline for stock diffusers", f"flowdistill export {folder} exported/")]


def _block(commands: Sequence[tuple[str, str]]) -> str:
    lines = "\n".join(f"# {what}\n{command}" for what, command in commands)
    return f'<pre tabindex="0"><code>{escape(lines)}</code></pre>'


def _versions(runs: Sequence[RunRecord]) -> str:
    told = [(run.name, f"torch {run.report.protocol.get('torch', DASH)} on "
             f"{run.report.protocol.get('device', DASH)}") for run in runs if run.report is not None]
    text = _trained_with(runs) + ("<p>The evaluation was made with:</p>" + definitions(told) if told else "")
    return text + f"<p>This page was written with flowdistill {escape(__version__)}.</p>"


def _trained_with(runs: Sequence[RunRecord]) -> str:
    """A column for each environment that was trained in, and the runs of which it is not known."""
    columns: list[tuple[list[str], dict[str, str]]] = []
    for run in runs:
        own = [(f"{run.name}{part.name and '/'}{part.name}" + (f", from step {start.step:,}" if start.step else ""),
                start.environment) for part in run.parts for start in part.starts]
        if own and all(environment == own[0][1] for _, environment in own):
            own = own[:1] if own[0][0] == run.name else [(run.name, own[0][1])]
        for name, environment in own:
            same = next((names for names, other in columns if other == environment), None)
            if same is None:
                columns.append(([name], environment))
            else:
                same.append(name)
    keys = list(dict.fromkeys(key for _, environment in columns for key in environment))
    rows = [[key, *(environment.get(key, DASH) for _, environment in columns)] for key in keys]
    head = ["trained with", *(listed(names) for names, _ in columns)]
    unknown = [run.name for run in runs if not any(part.starts for part in run.parts)]
    text = table(head, rows, "Versions and devices", "texts") if rows else ""
    return text + (f"<p>What {escape(listed(unknown))} {'was' if len(unknown) == 1 else 'were'} trained with is not "
                   "recorded.</p>" if unknown else "")
