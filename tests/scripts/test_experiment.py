"""``scripts/run_experiment.py`` and ``scripts/benchmark_step.py``: what they run, resume, compute and refuse."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowdistill.config import load_config
from flowdistill.utils.errors import UserError
from tests.processes import ROOT, Child

BASE = "configs/digits/freeflow.yaml"


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    """The scripts run where the configurations' paths hold, and find each other as scripts do."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def write(path: Path, text: str) -> Path:
    path.write_text(f"name: tiny\nbase: {BASE}\n{text}")
    return path


def line(label: str, seed: int, fid: float, **more):
    rows = [
        {"model": "teacher", "calls": 50, "fid": 8.0, "accuracy": 0.99},
        {"model": "student", "calls": 1, "fid": fid, "accuracy": 0.9 + 0.02 * seed},
    ]
    return {"label": label, "seed": seed, "rows": rows, "fid_floor": 1.5, "num_images": 1000, "train_seconds": 120.0,
            "paired_error": 0.1, "jobs": 1, "threads": 2, "curve": [], **more}  # fmt: skip


def test_shipped_experiments_are_valid():
    from run_experiment import read_experiment

    files = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        assert read_experiment(file).name == file.stem


def test_overrides_of_a_run_win_over_those_of_all(tmp_path):
    from run_experiment import read_experiment

    text = "seeds: [3]\noverrides: [train.steps=5, train.log_every=7]\nruns: {one: [train.steps=6]}\n"
    experiment = read_experiment(write(tmp_path / "a.yaml", text + "curve: {num_images: 10, every: 2}\n"))
    config = load_config(BASE, experiment.settings("one", 3))
    assert (config.train.steps, config.train.log_every, config.seed) == (6, 7, 3)
    assert config.train.checkpoint_every == 2 and config.train.keep_checkpoints > 1000


def test_names_and_labels_are_texts(tmp_path):
    from run_experiment import read_experiment

    text = (f"name: 0010\nbase: {BASE}\nseeds: [0]\noverrides: [train.steps=5]\n"
            "runs: {no: [seed=1], 1e3: [], 2024-11-25: []}\n")
    (tmp_path / "a.yaml").write_text(text + f"bases: {{1e3: {BASE}}}\n")
    experiment = read_experiment(tmp_path / "a.yaml")
    assert experiment.name == "0010" and list(experiment.runs) == ["no", "1e3", "2024-11-25"]
    assert list(experiment.bases) == ["1e3"] and experiment.settings("no", 0) == ["train.steps=5", "seed=1", "seed=0"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seeds: [-1]\n", "a seed must be an integer from 0 to 2**64 - 1"),
        ("seeds: [0, 18446744073709551616]\n", "a seed must be an integer from 0 to 2**64 - 1"),
        ("seeds: [0]\nseed: 3\n", "no others than"),
        ("seeds: 3\n", "seeds must be a list"),
        ("seeds: [0]\nruns: {one: train.steps=3}\n", "must be a list of key=value"),
        ("seeds: [0]\nruns: {../one: []}\n", "names a folder"),
        ("seeds: [0]\nruns: {one: [train.stepz=3]}\n", "train.steps"),
        ("seeds: [0]\ncurve: {every: 0, num_images: 5}\n", "curve must be"),
        ("seeds: [0]\nruns: {one: []}\nbases: {tow: configs/digits/boot.yaml}\n", "the runs are one"),
        ("seeds: [0]\nruns: {one: []}\nfewer_seeds: {one: [1]}\n", "some of the seeds [0]; the runs are one"),
        ("seeds: [0]\nruns: {one: []}\nfewer_seeds: {two: [0]}\n", "some of the seeds [0]; the runs are one"),
        ("seeds: [0]\nruns: {one: []}\nfewer_seeds: {one: 0}\n", "must be {label: [SEED, ...]}"),
        ("seeds: [0]\nruns: {one: []}\nfewer_seeds: {one: []}\n", "must be {label: [SEED, ...]}"),
        ("seeds: [0]\nruns: {one: [method.solver=heun]}\nbases: {}\n", "method.solver"),  # BOOT's, and the base is not
        ("seeds: [0]\nruns: [\n", "is not valid YAML: line"),
    ],
)
def test_bad_files_are_refused_before_anything_runs(tmp_path, capsys, text, part):
    from run_experiment import main

    assert main([str(write(tmp_path / "a.yaml", text)), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_experiment: error: ") and part in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_table_has_the_teacher_once_and_mean_and_spread():
    from experiment_results import table

    lines = [line("one", 0, 10.0), line("one", 1, 12.0), line("two", 0, 20.0)]
    text = table(["one", "two"], lines)
    assert text.count("| teacher |") == 1
    # Sample standard deviations: of 10 and 12 it is the root of 2, of 90 % and 92 % too.
    assert "| one | 1 | 11.00 ± 1.41 | 91.00 ± 1.41 % | 0.1000 ± 0.0000 | 2.0 ± 0.0 min |" in text
    assert "| two | 1 | 20.00 | 90.00 % | 0.1000 | 2.0 min |" in text
    assert "| two random halves of the real images | | 1.50 |" in text and "rows may be below it" in text
    assert "| FID ↓ | label accuracy ↑ | paired error ↓ |" in text and "↓: lower is better, ↑: higher." in text
    for one in lines:
        one["fid_floor"] = None
    assert "halves" not in table(["one", "two"], lines)


def test_precision_and_recall_have_columns_where_they_were_measured():
    from experiment_results import table

    lines = [line("one", 0, 10.0), line("one", 1, 12.0), line("two", 0, 20.0)]
    assert "recall" not in table(["one", "two"], lines)
    for one, recall in zip(lines[:2], (0.5, 0.6), strict=True):
        one["rows"][1] |= {"precision": 0.9, "recall": recall}
    text = table(["one", "two"], lines)
    head = "| model | network calls | FID ↓ | precision ↑ | recall ↑ | label accuracy ↑ | paired error ↓ | training |"
    assert head in text
    assert "| teacher | 50 | 8.00 | | | 99.00 % | | |" in text
    assert "| one | 1 | 11.00 ± 1.41 | 0.900 ± 0.000 | 0.550 ± 0.071 | 91.00 ± 1.41 % | 0.1000 ± 0.0000 |" in text
    assert "| two | 1 | 20.00 | | | 90.00 % | 0.1000 | 2.0 min |" in text
    assert "| two random halves of the real images | | 1.50 | | | | | |" in text


def test_images_a_second_have_a_column_where_they_are_asked_for(tmp_path):
    from experiment_results import table
    from run_experiment import read_experiment

    def timed(label: str, seed: int, rate: float):
        found = line(label, seed, 3.0)
        for row, each in zip(found["rows"], (50.0, rate), strict=True):
            row["images_per_second"] = each
        return found

    lines = [timed("one", 0, 200.0), timed("one", 1, 220.0)]
    text = table(["one"], lines, speed=True)
    assert "| label accuracy ↑ | paired error ↓ | images/s ↑ | training |" in text
    assert "| teacher | 50 | 8.00 | 99.00 % | | 50 | |" in text
    assert "| 0.1000 ± 0.0000 | 210 ± 14 | 2.0 ± 0.0 min |" in text and "| 1.50 | | | | |" in text
    assert "images/s" not in table(["one"], lines)
    assert read_experiment(write(tmp_path / "a.yaml", "seeds: [0]\nspeed: true\n")).speed
    with pytest.raises(UserError, match="speed must be true or false, not 'fast'"):
        read_experiment(write(tmp_path / "a.yaml", "seeds: [0]\nspeed: fast\n"))


def test_a_label_may_run_with_fewer_seeds_than_others(tmp_path, capsys):
    from experiment_results import table
    from run_experiment import main, read_experiment, read_results

    text = "seeds: [0, 1, 2]\nruns: {one: [], two: [], three: []}\nfewer_seeds: {two: [1], three: [2, 0]}\n"
    file = write(tmp_path / "a.yaml", text)
    experiment = read_experiment(file)
    assert experiment.all_runs() == [("one", 0), ("three", 0), ("one", 1), ("two", 1), ("one", 2), ("three", 2)]

    (tmp_path / "two" / "seed-0").mkdir(parents=True)  # as it was run when two had all seeds
    (tmp_path / "two" / "seed-0" / "report.json").write_text("{}")
    (tmp_path / "results.jsonl").write_text(json.dumps(line("two", 0, 9.0, **experiment.asked("two", 0))) + "\n")
    assert read_results(experiment, tmp_path) == {}
    assert main([str(file), "--out", str(tmp_path), "--only", "two", "--seed", "0"]) == 2
    assert "--only two --seed 0: the seeds of two are 1" in capsys.readouterr().err

    lines = [line(label, seed, 10.0 + seed) for label, seed in experiment.all_runs()]
    text = table(list(experiment.runs), lines)
    assert "seeds 0, 1, 2; two 1 only; three 0, 2 only: mean ± standard deviation." in text
    assert "| two | 1 | 11.00 | 92.00 % |" in text and "| three | 1 | 11.00 ± 1.41 |" in text


def test_several_students_have_their_sizes_and_all_their_training_time(tmp_path):
    from experiment_results import table, train_seconds

    lines = [line("one", 0, 10.0), line("two", 0, 20.0)]
    for one, stored in zip(lines, (7000, 14000), strict=True):
        one["rows"][1] |= {"active_parameters": 7000, "stored_parameters": stored}
    text = table(["one", "two"], lines)
    assert "| training | parameters: of an image | of all students |" in text
    assert "| one | 1 | 10.00 | 90.00 % | 0.1000 | 2.0 min | 7,000 | 7,000 |" in text
    assert "| two | 1 | 20.00 | 90.00 % | 0.1000 | 2.0 min | 7,000 | 14,000 |" in text
    for name, steps in (("student-0", {1: 9.0, 2: 20.0}), ("student-1", {2: 22.0}), ("tsm", {5: 3.0})):
        for step, seconds in steps.items():
            folder = tmp_path / name / "checkpoints" / f"step-{step:06d}"
            folder.mkdir(parents=True)
            (folder / "state.json").write_text(json.dumps({"seconds": seconds}))
    assert train_seconds(tmp_path) == 45.0


def test_latency_of_students_is_a_row_each(tmp_path, capsys):
    from student_latency import main

    from flowdistill import load_teacher
    from flowdistill.methods.msd.partition import Partition, split_classes
    from flowdistill.methods.msd.student import RoutedStudent
    from flowdistill.students import Generator, StudentInfo
    from tests.tiny import tiny_unet_pipeline

    one = Generator.from_teacher(load_teacher(tiny_unet_pipeline()), StudentInfo())
    one.save(tmp_path / "one")
    RoutedStudent([one, one], Partition.of_classes(split_classes("sequential", 4, 2))).save(tmp_path / "two")
    assert main([str(tmp_path / "one"), str(tmp_path / "two"), "--repetitions", "2", "--batch", "3"]) == 0
    rows = [text.split("|")[1:-1] for text in capsys.readouterr().out.splitlines()]
    assert rows[0][-1].strip() == "batch of 3, images/s" and len(rows) == 4
    sizes = [[int(cell.replace(",", "")) for cell in row[1:3]] for row in rows[2:]]
    assert sizes[0][0] == sizes[0][1] == sizes[1][0] == sizes[1][1] / 2
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[3:])
    assert main([str(tmp_path / "one"), "--batch", "0"]) == 2


def test_an_experiment_without_curves_has_a_figure_too(tmp_path):
    """Four students that share what they cost: a dot each where one took a quarter of it."""
    from experiment_results import figure, run_figures

    lines = [line("one", 0, 10.0), line("one", 1, 12.0), line("four", 0, 8.0)]
    lines[2]["rows"][-1] |= {"active_parameters": 5, "stored_parameters": 20}
    lines[2]["train_seconds"] = 100.0
    assert run_figures(lines[2]) == {"fid": 8.0, "seconds_each": 25.0}
    assert run_figures(lines[0])["seconds_each"] == lines[0]["train_seconds"]
    for one in lines:
        one["curve"] = []
    figure("name", ["one", "four"], lines, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_students_of_several_calls_have_their_fid_at_each_in_the_figure(tmp_path, monkeypatch):
    """Beside the teacher's at as many; a run that diverged leaves the number of calls out."""
    import matplotlib.axes
    from experiment_results import calls_curve, figure

    lines = [line("maps", 0, 10.0), line("maps", 1, 12.0), line("single", 0, 9.0)]
    for one, fid in zip(lines[:2], (4.0, 6.0), strict=True):
        one["rows"] += [{"model": "student", "calls": 2, "fid": fid, "accuracy": 0.9}]
    lines[0]["rows"] += [{"model": "student", "calls": 4, "fid": None, "accuracy": None}]
    lines[1]["rows"] += [{"model": "student", "calls": 4, "fid": 5.0, "accuracy": 0.9}]
    lines[0]["rows"].insert(0, {"model": "teacher", "calls": 2, "fid": 7.0, "accuracy": 0.9})
    assert calls_curve(lines, "maps") == {1: [10.0, 12.0], 2: [4.0, 6.0]} and calls_curve(lines, "single") == {1: [9.0]}
    drawn, plain = {}, matplotlib.axes.Axes.errorbar

    def noted(self, x, y, **how):
        drawn[how["label"]] = (x, y, how["yerr"])
        return plain(self, x, y, **how)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", noted)
    figure("name", ["maps", "single"], lines, tmp_path / "figure.png")
    assert drawn["maps"] == ([1, 2], [11.0, 5.0], pytest.approx([2**0.5] * 2)) and drawn["single"][:2] == ([1], [9.0])
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_diverged_run_is_not_averaged_away():
    from experiment_results import table

    lines = [line("one", 0, 10.0), line("one", 1, 12.0)]
    lines[1]["rows"][1]["fid"] = None
    assert "| one | 1 | diverged |" in table(["one"], lines)


def test_docs_table_is_replaced_between_its_markers_only(tmp_path):
    from experiment_results import write_docs

    page = tmp_path / "page.md"
    others = "<!-- table:b -->\nkept\n<!-- /table:b -->\nafter\n"
    page.write_text(f"before\n<!-- table:a -->\nold\n<!-- /table:a -->\n{others}")
    write_docs(page, "a", "new \\1\n")
    assert page.read_text() == f"before\n<!-- table:a -->\nnew \\1\n<!-- /table:a -->\n{others}"
    with pytest.raises(UserError, match="table:c"):
        write_docs(page, "c", "new\n")


def start(command, stdout, stderr, env) -> Child:
    """What ``subprocess.Popen`` does with the script's commands, forked."""
    python, dash_m, module, *arguments = command
    assert (python, dash_m, stdout) == (sys.executable, "-m", stderr)
    return Child(module, *arguments, env=env, log=Path(stdout.name))


def test_an_experiment_runs_measures_and_leaves_finished_runs_alone(tmp_path, monkeypatch):
    import experiment_results
    import run_experiment
    from run_experiment import main

    monkeypatch.setattr(experiment_results, "PAIRS", 16)
    monkeypatch.setattr(experiment_results, "PAIR_STEPS", 5)
    monkeypatch.setattr(run_experiment, "subprocess", SimpleNamespace(Popen=start))
    settings = (
        "overrides: [train.steps=2, train.batch_size=4, 'train.trackers=[]', train.num_samples=10, "
        "evaluation.num_images=40, 'evaluation.teacher_steps=[1]']\n"
        "runs: {both: [], slow: [method.optimizer.lr=1.0e-12]}\ncurve: {num_images: 30, every: 1}\n"
    )
    file, out = write(tmp_path / "a.yaml", f"seeds: [0]\n{settings}"), tmp_path / "out"
    command = [str(file), "--out", str(out), "--jobs", "2"]
    assert main(command) == 0
    lines = {one["label"]: one for one in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    both, slow = lines["both"], lines["slow"]
    for one in (both, slow):
        assert [point["step"] for point in one["curve"]] == [1, 2]
        assert 0 < one["curve"][0]["seconds"] < one["curve"][1]["seconds"]
        assert one["curve"][-1]["paired_error"] == pytest.approx(one["paired_error"], abs=1e-6)
        assert 0.05 < one["paired_error"] < 1.0
    # Untrained, the student is its teacher's one Euler step: the same figures up to the learning rate.
    teacher, student = slow["rows"]
    assert (teacher["model"], student["model"]) == ("teacher", "student")
    assert student["fid"] == pytest.approx(teacher["fid"], rel=1e-3)
    assert slow["curve"][0]["paired_error"] == pytest.approx(slow["curve"][1]["paired_error"], abs=1e-6)
    assert both["curve"][0]["paired_error"] != pytest.approx(both["curve"][1]["paired_error"], abs=1e-5)
    assert (out / "figure.png").stat().st_size > 10_000 and "| both | 1 |" in (out / "table.md").read_text()
    assert len(list((out / "both" / "seed-0" / "checkpoints").iterdir())) == 1  # those of the curve are gone

    before = (out / "results.jsonl").read_text()
    shutil.rmtree(out / "slow" / "seed-0" / "checkpoints")
    assert main(command) == 0
    assert (out / "results.jsonl").read_text() == before


def test_only_what_is_missing_is_started_and_a_failure_is_named(tmp_path, capsys, monkeypatch):
    """Training is replaced by a program that says what it was asked and fails."""
    import run_experiment

    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\necho "no space left"\nexit 2\n')
    program.chmod(0o755)
    monkeypatch.setattr(run_experiment.sys, "executable", str(program))
    other = "configs/digits/boot.yaml"
    text = f"seeds: [0, 1]\nruns: {{one: [], two: [train.steps=7, method.solver=heun]}}\nbases: {{two: {other}}}\n"
    file, out = write(tmp_path / "a.yaml", text), tmp_path / "out"
    experiment = run_experiment.read_experiment(file)
    done = [line("one", seed, 10.0, **experiment.asked("one", seed)) for seed in (0, 1)]
    stale = line("two", 0, 99.0, **experiment.asked("two", 0)) | {"base": "another.yaml"}
    for one in (*done, stale):
        folder = out / one["label"] / f"seed-{one['seed']}"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text("{}")
    (out / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (*done, stale)) + '{"label": "tw')

    assert run_experiment.main([str(file), "--out", str(out), "--only", "one"]) == 0
    assert run_experiment.main([str(file), "--out", str(out), "--seed", "2"]) == 2
    assert "--seed 2: the seeds are 0, 1" in capsys.readouterr().err
    assert not (tmp_path / "python.calls").exists()
    assert run_experiment.main([str(file), "--out", str(out), "--seed", "1"]) == 2
    assert "1 of 1 runs failed" in capsys.readouterr().err
    (tmp_path / "python.calls").unlink()
    assert run_experiment.main([str(file), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "two, seed 0: exit code 2" in error and "no space left" in error and "2 of 2 runs failed" in error
    calls = (tmp_path / "python.calls").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == [f"output_dir={out}/two/seed-{seed}" for seed in (0, 1)]
    assert all(f"distill {other} train.steps=7 method.solver=heun seed=" in call for call in calls)
    table = (out / "table.md").read_text()
    assert "| one | 1 | 10.00 ± 0.00 |" in table and "| two |" not in table

    # A line after one that a crash cut short is not lost with it.
    run_experiment.append_line(out / "results.jsonl", line("two", 0, 30.0, **experiment.asked("two", 0)))
    assert run_experiment.read_results(experiment, out).keys() == {("one", 0), ("one", 1), ("two", 0)}


def test_passes_of_a_step_are_those_of_the_method():
    from benchmark_step import needed_passes

    method = load_config(BASE, []).method
    rows = [(network, rows, kind != "forward") for _, network, rows, kind, _ in needed_passes(method, 64)]
    assert sorted(rows) == [("critic", 16, False), ("critic", 64, True), ("student", 64, False), ("student", 64, True),
                            ("student", 96, False), ("teacher", 16, False), ("teacher", 48, False)]  # fmt: skip
    method.prediction_fraction = 1.0
    assert {network for _, network, *_ in needed_passes(method, 64)} == {"student", "teacher"}


@pytest.mark.parametrize(("base", "overrides"), [
    (BASE, []),
    ("configs/digits/boot.yaml", []),
    ("configs/digits/boot.yaml", ["method.solver=heun", "method.boundary_weight=0"]),
    ("configs/digits/dmd2.yaml", ["method.critic_updates=2"]),
    ("configs/digits/consistency.yaml", ["method.pairs=16", "method.pairs_steps=1"]),
    ("configs/digits/consistency.yaml", ["method.derivative=finite_difference", "method.states=student"]),
    ("configs/digits/flow_map_matching.yaml", []),
    ("configs/digits/flow_map_matching.yaml", ["method.objective=eulerian", "method.derivative=discrete"]),
    ("configs/digits/flow_map_matching.yaml", ["method.objective=semigroup"]),
    ("configs/digits/flow_map_matching.yaml", ["method.correction_strength=1"]),
    ("configs/digits/consistency.yaml", ["method.pairs=16", "method.pairs_steps=1", "method.correction_strength=1",
                                         "method.critic_fraction=0.5"]),
    ("configs/digits/sid.yaml", []),
    ("configs/digits/disback.yaml", []),
    ("configs/digits/dmd2_4step.yaml", []),
    ("configs/digits/dmd2_4step.yaml", ["method.step_inputs=data", "method.data=digits"]),
], ids=["freeflow", "boot", "boot heun without boundary", "dmd2", "consistency", "finite differences", "flow map",
        "flow map, discrete", "semigroup", "flow map, corrected", "consistency, corrected",
        "sid", "disback", "dmd2 of four", "from data"])
def test_benchmark_counts_the_networks_calls(tmp_path, base, overrides):
    """The real step makes exactly the passes that its bare sum holds, so the ratio compares like with like."""
    import benchmark_step

    config = load_config(base, ["train.batch_size=8", *overrides])
    benchmark_step.check(config)
    trainer = benchmark_step.make_trainer(config, str(tmp_path))
    calls: list[tuple[str, int, bool]] = []

    def count(name: str):
        def hook(module, args, output):
            calls.append((name, len(args[0]), output[0].requires_grad))

        return hook

    target = trainer.method.teacher.network
    if config.method.name == "disback":  # in stage 2 with a node as the target
        target, own = trainer.method.node.velocity, target
        own.backbone.register_forward_hook(count("the teacher itself"))
    target.backbone.register_forward_hook(count("teacher"))
    for name, role in trainer.roles.items():
        role.network.velocity.backbone.register_forward_hook(count(name))
    needed, states_taken = benchmark_step.needed_passes(config.method, 8), benchmark_step.count_states(trainer.method)
    drawn = {name for name, *_, count in needed if not count}
    seen = set()
    for _ in range(4 if drawn else 1):
        calls.clear()
        trainer.train_step()
        taken = states_taken()
        seen |= {name for name, count in taken.items() if count}
        passes = [(network, rows, kind != "forward") for name, network, rows, kind, n in needed
                  for _ in range(n or taken.get(name, 0))]
        assert sorted(calls) == sorted(passes)
    assert seen == drawn


def test_benchmark_prints_its_ratios_and_refuses_what_it_cannot_count(tmp_path, capsys, monkeypatch):
    import benchmark_step

    monkeypatch.setattr(benchmark_step, "SAMPLING_BATCHES", 1)
    target = tmp_path / "out.json"
    assert benchmark_step.main([BASE, "train.batch_size=8", "--rounds", "2", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert result["step_ratio"] == pytest.approx(result["step"] / result["bare"], rel=0.5)  # medians of two rounds
    assert result["step_ratio"] > result["step_ratio_with_updates"] > 0
    assert "target 1.10" in capsys.readouterr().out
    assert benchmark_step.main(["configs/digits/sid.yaml", "method.regression_weight=1"]) == 2
    assert "without its adversarial and regression terms" in capsys.readouterr().err
    assert benchmark_step.main(["configs/digits/disback.yaml", "method.backtrack=false"]) == 2
    assert "benchmark the host itself" in capsys.readouterr().err
    assert benchmark_step.main([BASE, "method.derivative=jvp"]) == 2
    assert "finite_difference" in capsys.readouterr().err
    boot = "configs/digits/boot.yaml"
    assert benchmark_step.main([boot, "train.batch_size=8", "--rounds", "2"]) == 0
    assert "teacher, boundary: 8 rows, forward" in capsys.readouterr().out
    maps = "configs/digits/flow_map_matching.yaml"
    assert benchmark_step.main([maps, "train.batch_size=8", "method.steps=2", "--rounds", "1", "--processor-time"]) == 0
    assert "student, own states: 5 rows, forward" in capsys.readouterr().out
    assert benchmark_step.main([maps, "method.correction_strength=1", "method.prediction_only_steps=5"]) == 2
    assert "method.prediction_only_steps to 0" in capsys.readouterr().err
    for overrides, part in ((["method.guidance_scale=2"], "without guidance"), (["method.metric=a:b"], "use l2"),
                            (["method.name=data_flow_map", "method.data=digits"],
                             "passes of freeflow, boot, consistency, flow_map_matching, dmd2")):
        assert benchmark_step.main([boot, *overrides]) == 2
        assert part in capsys.readouterr().err
