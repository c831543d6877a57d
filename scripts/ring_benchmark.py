#!/usr/bin/env python
"""Score distillation with and without backtracking on a ring of eight Gaussians in two dimensions.

    python scripts/ring_benchmark.py configs/experiments/ring.yaml
    python scripts/ring_benchmark.py configs/experiments/ring.yaml --seed 0 --write-docs docs/experiments/ring.md

The methods and the loop are those of ``flowdistill distill``; teacher, generator and critic are a perceptron with EDM's
preconditioning, so that a run takes a fraction of a minute. The file has the keys of ``run_experiment.py``, with
``teacher.source`` learned (the perceptron, trained on the ring first) or exact (the ring's own velocity; generator and
critic start as the learned one). Measured is the averaged generator of every checkpoint: the sliced Wasserstein
distance of ``curve.num_images`` samples to as many of the ring, and the share of samples within four standard
deviations of a mode. Time is the CPU time of the steps on one thread: the wall time of a core that does nothing else.
OUT gets teacher.safetensors, LABEL/seed-S/ (run folders), results.jsonl, table.md and figure.png; the same command
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowdistill.conditioning.conditions import Condition
from flowdistill.config import load_config
from flowdistill.networks.critic import critic_loss
from flowdistill.networks.velocity import per_sample
from flowdistill.paths.native_path import NativePath, path_from_scheduler
from flowdistill.teachers import Teacher
from flowdistill.teachers.exact import MixtureVelocity
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_writable, local_path

MODES, RADIUS, STD = 8, 0.7, 0.05
WIDTH, TEACHER_STEPS, TEACHER_BATCH, TEACHER_LR = 128, 4000, 512, 2e-3
DIRECTIONS = 64
Line = dict[str, Any]


def ring_path() -> NativePath:
    """EDM's, with its usual range; the ring's standard deviation is 0.5 as it stands."""
    return path_from_scheduler(EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5))


def ring_velocity() -> MixtureVelocity:
    """The ring's own velocity field."""
    angle = 2 * math.pi * torch.arange(MODES) / MODES
    return MixtureVelocity(RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1), STD)


def ring_samples(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2) of the ring, the modes in turn."""
    modes = torch.arange(count) % MODES
    return ring_velocity().means[modes] + STD * torch.randn(count, 2, generator=generator)


class RingNetwork(nn.Module):
    """A perceptron with EDM's preconditioning as a velocity on the linear path: x (B, 2), t (B,) -> (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ring_path()
        layers: list[nn.Module] = [nn.Linear(2 + 16, WIDTH), nn.SiLU()]
        for _ in range(3):
            layers += [nn.Linear(WIDTH, WIDTH), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        c = self.path.coefficients(t)
        phase = c.timestep.to(x.dtype)[:, None] * torch.arange(1, 9, device=x.device)
        output = self.layers(torch.cat([x * per_sample(c.input_scale, x), phase.cos(), phase.sin()], dim=1))
        return x * per_sample(c.state, x) + output * per_sample(c.output, x)


def learned_network(file: Path) -> RingNetwork:
    """The perceptron in ``file``, trained first when there is none: flow matching on the ring, in the units of EDM."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = RingNetwork()
    if file.is_file():
        network.load_state_dict(load_file(file))
        return network
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.Adam(network.parameters(), lr=TEACHER_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEACHER_STEPS)
    ends = network.path.t_min, network.path.t_max
    for _ in range(TEACHER_STEPS):
        sample, noise = ring_samples(TEACHER_BATCH, generator), torch.randn(TEACHER_BATCH, 2, generator=generator)
        # Half of the times as EDM draws them, half uniform, which the matching gradient asks for.
        times = torch.cat([torch.sigmoid(1.2 * torch.randn(TEACHER_BATCH // 2, generator=generator) - 1.2),
                           torch.rand(TEACHER_BATCH - TEACHER_BATCH // 2, generator=generator)]).clamp(*ends)
        state = (1 - times[:, None]) * sample + times[:, None] * noise
        loss = critic_loss(network(state, times), sample, noise, times, network.path).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(average.module.state_dict(), file)
    return average.module


def sliced_w2(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein-2 distance of two sets (N, 2): root of the mean over evenly spread directions."""
    angle = math.pi * torch.arange(DIRECTIONS) / DIRECTIONS
    lines = torch.stack([angle.cos(), angle.sin()])
    return float(((x @ lines).sort(dim=0).values - (y @ lines).sort(dim=0).values).square().mean().sqrt())


def figures_of(samples: Tensor) -> Line:
    """``sw2`` to as many samples of the ring, ``on_modes`` and ``modes``: the number with half their share or more."""
    real = ring_samples(len(samples), torch.Generator().manual_seed(1))
    distance, nearest = torch.cdist(samples, ring_velocity().means).min(dim=1)
    near = distance < 4 * STD
    shares = torch.bincount(nearest[near], minlength=MODES) / len(samples)
    return {"sw2": sliced_w2(samples, real), "on_modes": float(near.float().mean()),
            "modes": int((shares >= 0.5 / MODES).sum())}


class Benchmark:
    """Teachers, and the training and measuring of one run."""

    def __init__(self, experiment: Any, out: Path) -> None:
        self.experiment, self.out = experiment, out
        self.network = learned_network(out / "teacher.safetensors")
        self.teachers = {
            "learned": Teacher(copy.deepcopy(self.network), ring_path(), (2,), source="learned"),
            "exact": Teacher(ring_velocity(), ring_path(), (2,), source="exact"),
        }
        self.noise = torch.randn(self.experiment.curve["num_images"], 2, generator=torch.Generator().manual_seed(2))

    def teacher_rows(self) -> list[Line]:
        """Both teachers from the same noise, by 50 steps of Heun's method."""
        samples = {name: teacher.sample(self.noise, steps=50, solver="heun") for name, teacher in self.teachers.items()}
        return [{"name": f"teacher, {name}, 99 calls", **figures_of(value)} for name, value in samples.items()]

    def run(self, label: str, seed: int) -> Line:
        """Train with the project's loop, and measure its checkpoints."""
        from flowdistill.methods.disback import DisBack
        from flowdistill.training.checkpoint import checkpoints, read_tensors
        from flowdistill.training.loop import Trainer
        from flowdistill.training.run import make_accelerator

        folder = self.out / label / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # a run that was cut short begins anew
        settings = [*self.experiment.settings(label, seed), f"output_dir={folder}"]
        config = load_config(self.experiment.base, settings)
        if config.method.name != "disback" or config.teacher.source not in self.teachers:
            raise UserError(f"{label}: the ring needs method.name=disback and teacher.source learned or exact")
        accelerator = make_accelerator(config.train, folder)
        student, critic = (copy.deepcopy(self.network).requires_grad_(True) for _ in range(2))
        method = DisBack(config.method, self.teachers[config.teacher.source], student, critic)
        trainer = Trainer(method, config, folder, accelerator)
        one_step, seconds = trainer.train_step, [0.0]

        def timed() -> None:
            began = time.process_time()
            one_step()
            seconds.append(seconds[-1] + time.process_time() - began)

        trainer.train_step = timed
        curve = [{"step": 0, "seconds": 0.0, **figures_of(method.student()(self.noise).detach())}]
        trainer.train()
        if trainer.interrupted:
            raise KeyboardInterrupt
        generator = trainer.student()
        for step, path in checkpoints(trainer.checkpoint_folder):
            generator.network.load_state_dict(read_tensors(path, "student.average"))
            with torch.no_grad():
                point = figures_of(generator(self.noise))
            curve.append({"step": step, "seconds": seconds[step], **point})
        return {"label": label, "seed": seed, **self.experiment.asked(label, seed), "curve": curve}


def table(experiment: Any, rows: Sequence[Line], lines: Sequence[Line]) -> str:
    """Markdown: the teachers, and mean and standard deviation over the seeds of every run."""
    last = lines[0]["curve"][-1]["step"]
    stations = [point["step"] for point in lines[0]["curve"] if point["step"] in (last // 4, last // 2, last)]
    head = ["run", *(f"at step {step}" for step in stations), "on a mode", "modes", "training"]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        blank = [""] * (len(stations) - 1)
        cells = [row["name"], *blank, f"{row['sw2']:.4f}", f"{100 * row['on_modes']:.1f} %", row["modes"], ""]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    for label in experiment.runs:
        curves = [{point["step"]: point for point in line["curve"]} for line in lines if line["label"] == label]
        if not curves:
            continue
        cells = [label, *(_spread([curve[step]["sw2"] for curve in curves], ".4f") for step in stations)]
        ends = [curve[max(curve)] for curve in curves]
        cells += [_spread([100 * end["on_modes"] for end in ends], ".1f") + " %",
                  ", ".join(str(end["modes"]) for end in ends), _spread([end["seconds"] for end in ends], ".0f") + " s"]
        text.append("| " + " | ".join(cells) + " |")
    seeds = sorted({line["seed"] for line in lines})
    text += ["", f"Sliced W2 of {experiment.curve['num_images']:,} samples; seeds {', '.join(map(str, seeds))}: mean ± "
             "standard deviation. Steps and seconds, which are CPU time on one thread, include stage 1."]
    return "\n".join(text) + "\n"


def figure(experiment: Any, rows: Sequence[Line], lines: Sequence[Line], path: Path) -> None:
    """Sliced W2 against step (above) and wall time (below), a column a group of labels."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('the figure needs matplotlib: pip install "flowdistill[plots]"') from error

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [label for label in experiment.runs if any(line["label"] == label for line in lines)]
    groups = list(dict.fromkeys(label.split("_")[0] for label in labels))
    kinds = list(dict.fromkeys(label.partition("_")[2] for label in labels))
    drawing, axes = plt.subplots(2, len(groups), figsize=(4.2 * len(groups), 7.5), sharey=True, squeeze=False,
                                 layout="constrained")  # fmt: skip
    for column, group in enumerate(groups):
        teacher = rows[group == "exact"]
        for row, (horizontal, below) in enumerate((("step", "training step"), ("seconds", "CPU seconds of training"))):
            axis = axes[row, column]
            for label in (label for label in labels if label.split("_")[0] == group):
                points = list(zip(*(line["curve"] for line in lines if line["label"] == label), strict=True))
                x = [statistics.fmean(one[horizontal] for one in point) for point in points]
                y = [[one["sw2"] for one in point] for point in points]
                kind = label.partition("_")[2]
                (drawn,) = axis.plot(x, [statistics.fmean(values) for values in y], label=kind,
                                     color=f"C{kinds.index(kind)}")  # fmt: skip
                axis.fill_between(x, [min(values) for values in y], [max(values) for values in y], alpha=0.2,
                                  color=drawn.get_color(), linewidth=0)  # fmt: skip
            axis.axhline(teacher["sw2"], color="grey", linestyle=":", linewidth=1, label="teacher, 99 calls")
            axis.set(xlabel=below, yscale="log", title=group if row == 0 else "")
        axes[0, column].legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("sliced W2")
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for bad input, 130 after a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", type=local_path, nargs="?", default=Path("configs/experiments/ring.yaml"))
    parser.add_argument("--out", type=local_path, metavar="DIR", help="default: runs/experiments/NAME")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="start runs of these labels only")
    parser.add_argument("--seed", type=int, metavar="S", help="start runs of this seed only")
    parser.add_argument("--write-docs", type=local_path, metavar="PAGE.md", help="as of run_experiment.py")
    options = parser.parse_args(arguments)
    from experiment_results import write_docs
    from run_experiment import RESULTS, append_line, read_experiment, read_results

    torch.set_num_threads(1)
    try:
        experiment = read_experiment(options.experiment)
        if experiment.curve is None:
            raise UserError(f"{options.experiment} needs the key curve: it is what is measured")
        if unknown := set(options.only or []) - set(experiment.runs):
            raise UserError(f"--only {', '.join(sorted(unknown))}: the runs are {', '.join(experiment.runs)}")
        out = options.out or Path("runs/experiments") / experiment.name
        check_writable(out / "table.md")
        found = read_results(experiment, out, left="checkpoints")
        benchmark = Benchmark(experiment, out)
        rows = benchmark.teacher_rows()
        for label, seed in experiment.all_runs():
            wanted = label in (options.only or experiment.runs) and options.seed in (None, seed)
            if wanted and (label, seed) not in found:
                found[label, seed] = benchmark.run(label, seed)
                append_line(out / RESULTS, found[label, seed])
        lines = [found[label, seed] for label in experiment.runs for seed in experiment.seeds if (label, seed) in found]
        if not lines:
            raise UserError(f"there are no runs with --seed {options.seed}; the seeds are {experiment.seeds}")
        text = table(experiment, rows, lines)
        (out / "table.md").write_text(text, encoding="utf-8")
        figure(experiment, rows, lines, out / "figure.png")
        print(text)
        if options.write_docs:
            write_docs(options.write_docs, experiment.name, text)
    except UserError as error:
        print(f"ring_benchmark: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ring_benchmark: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
