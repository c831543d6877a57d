#!/usr/bin/env python
"""What flowdistill adds to the bare networks: one training step of FreeFlow, BOOT or score distillation, and sampling.

    python scripts/benchmark_step.py
    python scripts/benchmark_step.py configs/digits/boot.yaml
    python scripts/benchmark_step.py configs/digits/consistency.yaml
    python scripts/benchmark_step.py configs/digits/freeflow.yaml --rounds 60 --json step.json
    python scripts/benchmark_step.py configs/digits/sid.yaml
    python scripts/benchmark_step.py configs/digits/disback.yaml
    python scripts/benchmark_step.py configs/digits/dmd2_4step.yaml

A training step of the real loop (draws, all losses, backward passes, clipping, optimisers, moving average) against the
sum of the passes it cannot do without, each timed as a bare call of the diffusers network: forward passes without
gradients, and forward and backward passes (of SiD also backward to the input only). Of DisBack it is a step of stage 2
with a node as its target. A student of several steps calls its network up to K - 1 times more for the states before the
step that is trained, and as many are counted as were called; so are those of a correction's paths. ``generate`` against
a loop over the bare network at batch 64. Everything alternates in one run, and the ratios are medians over the rounds,
but other work on the machine still shows: run it alone, or on a CPU with ``--processor-time`` and one thread
(OMP_NUM_THREADS=1), which leaves waiting out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.text import check_json_place

STEP_TARGET, SAMPLING_TARGET = 1.10, 1.05
SAMPLING_BATCH, SAMPLING_BATCHES = 64, 8
FOREVER = 1_000_000
Thunk = Callable[[], Any]


def make_trainer(config: Any, folder: str) -> Any:
    """The loop of ``distill`` for a configuration, in a throw-away folder."""
    from flowdistill import load_teacher
    from flowdistill.training.loop import Trainer
    from flowdistill.training.run import make_accelerator, method_class
    from flowdistill.utils.randomness import seed_torch

    config.train.trackers = []
    if config.method.name == "disback":  # two nodes; the walk stays at the first
        config.method.degradation_steps, config.method.degradation_every = 2, 1
        config.method.interval, config.method.switch = [FOREVER], "interval"
    accelerator = make_accelerator(config.train, folder)
    teacher = load_teacher(config.teacher, device=accelerator.device)
    seed_torch(config.seed)
    trainer = Trainer(method_class(config.method.name)(config.method, teacher), config, folder, accelerator)
    while config.method.name == "disback" and trainer.step < 2:  # stage 1
        trainer.train_step()
    return trainer


def check(config: Any) -> None:
    """Refuse configurations whose step is not the sum counted here."""
    method, train = config.method, config.train
    if method.name not in PASSES:
        raise UserError(f"the benchmark counts the passes of {', '.join(PASSES)}, and method.name is '{method.name}'")
    host = getattr(method, "host", method)
    if method.name == "disback" and not method.backtrack:
        raise UserError("method.backtrack is false, so there is no node to be the target; benchmark the host itself")
    if getattr(host, "critic", "full") != "full":
        raise UserError(f"the benchmark counts a full critic, and method.critic is '{host.critic}'")
    if host.student != "full":
        raise UserError(f"the benchmark counts a full student, and method.student is '{host.student}'")
    if method.name == "freeflow":
        if method.derivative == "jvp":
            raise UserError("method.derivative is 'jvp', which is no plain network pass; use finite_difference")
        if method.regression_weight:
            raise UserError("the benchmark counts no regression term; set method.regression_weight to 0")
    if method.name == "consistency" and (method.derivative == "jvp" or method.target == "ema"):
        raise UserError("the benchmark counts plain passes of teacher and student; set method.derivative to discrete "
                        "or finite_difference, and method.target to online")
    if method.name == "flow_map_matching" and method.derivative == "jvp":
        raise UserError("the benchmark counts plain passes of teacher and student; set method.derivative to discrete "
                        "or finite_difference")
    if getattr(method, "correction_strength", 0) and method.prediction_only_steps:
        raise UserError("the benchmark counts a correction in every step; set method.prediction_only_steps to 0")
    if hasattr(method, "guidance_max"):
        if (method.guidance_min, method.guidance_max) != (1.0, 1.0):
            raise UserError("the benchmark counts passes without guidance; set method.guidance_min and guidance_max "
                            "to 1")
    else:
        if host.guidance_scale != 1:
            raise UserError("the benchmark counts passes without guidance; set method.guidance_scale to 1")
        if method.name == "boot":
            if method.metric != "l2":
                raise UserError(f"method.metric is '{method.metric}', whose passes the benchmark does not count; use "
                                "l2")
        elif host.adversarial_weight or host.regression_weight:
            raise UserError("the benchmark counts score distillation without its adversarial and regression terms")
    if train.gradient_accumulation != 1 or train.precision not in (None, "fp32"):
        raise UserError("the benchmark needs train.gradient_accumulation=1 and train.precision=fp32")


NONE, WEIGHTS, INPUT = "forward", "forward and backward", "forward and backward to the input"
Pass = tuple[str, str, int, str, int]
"""What for, network, rows, one of the three kinds above, how many in one step."""


def host_passes(method: Any, batch: int) -> list[Pass]:
    """Of score distillation, and of DisBack in its second stage; SiD's gradient passes through critic and teacher."""
    host = getattr(method, "host", method)
    updates, matching = host.critic_updates, INPUT if host.weighting == "sid" else NONE
    return [
        ("student, for the critic", "student", batch, NONE, updates),
        ("critic, trained", "critic", batch, WEIGHTS, updates),
        ("target, matching", "teacher", batch, matching, 1),
        ("critic, matching", "critic", batch, matching, 1),
        ("student, trained", "student", batch, WEIGHTS, 1),
    ]


STATES = "student, states of earlier steps"
PATHS, SAMPLES = "student, paths of the correction", "student, the critic's samples"


def count_states(method: Any) -> Callable[[], dict[str, int]]:
    """A function that returns how many calls of the student's network the states before the trained step, and the
    correction's paths, have taken since it was called last; nothing where each step takes the same."""
    host = getattr(method, "host", method)
    taken: dict[str, int] = {}
    draw_step, correction = getattr(host, "draw_step", None), getattr(host, "correction", None)

    def add(name: str, count: int) -> None:
        taken[name] = taken.get(name, 0) + count

    if draw_step is not None and method.calls_without_gradient("student"):

        def remember(draw: Any) -> int:
            k = draw_step(draw)
            add(STATES, k - 1)
            return int(k)

        host.draw_step = remember
    if correction is not None and correction.critic is not None:
        draw_path = correction.draw_path

        def follow(velocity: Any, draw: Any, rows: int, learnt: int | None = None) -> Any:
            path = draw_path(velocity, draw, rows, learnt)
            if learnt is None:
                add(PATHS, len(path.chain) - 1)
            else:
                add(SAMPLES, len(path.chain))
            return path

        correction.draw_path = follow

    def since() -> dict[str, int]:
        found = dict(taken)
        taken.clear()
        return found

    return since


def correction_passes(method: Any, batch: int) -> tuple[int, list[Pass]]:
    """The rows of a batch that are not for the correction, and its passes besides the student's trained one."""
    if not method.correction_strength:
        return batch, []
    corrected = min(round(method.correction_fraction * batch), batch - 1)
    rows = max(1, round(method.critic_fraction * batch))
    return batch - corrected, [
        (PATHS, "student", corrected, NONE, 0),
        ("teacher, correction", "teacher", corrected, NONE, 1),
        ("critic, correction", "critic", corrected, NONE, 1),
        (SAMPLES, "student", rows, NONE, 0),
        ("critic, trained", "critic", rows, WEIGHTS, method.critic_updates),
    ]


def boot_passes(method: Any, batch: int) -> list[Pass]:
    """Of BOOT."""
    bounded = method.boundary_weight > 0
    passes = [
        ("student, a step earlier", "student", batch, NONE, 1),
        ("teacher, target", "teacher", batch, NONE, 2 if method.solver == "heun" else 1),
        ("student, trained", "student", 2 * batch if bounded else batch, WEIGHTS, 1),
        ("teacher, boundary", "teacher", batch, NONE, int(bounded)),
    ]
    return [one for one in passes if one[4]]


def consistency_passes(method: Any, batch: int) -> list[Pass]:
    """Of consistency distillation."""
    discrete = method.derivative == "discrete"
    own, corrected = correction_passes(method, batch)
    passes = [
        ("student, states", "student", own, NONE, method.steps if method.states == "student" else 0),
        ("teacher", "teacher", own, NONE, 2 if discrete and method.solver == "heun" else 1),
        ("student, target or derivative", "student", own if discrete else 2 * own, NONE, 1),
        ("student, trained", "student", batch, WEIGHTS, 1),
    ]
    return [one for one in passes if one[4]] + corrected


def flow_map_passes(method: Any, batch: int) -> list[Pass]:
    """Of flow maps between any two times."""
    own, corrected = correction_passes(method, batch)
    still = min(round(method.velocity_share * own), own - 1)
    later = own - still
    moved = own - round(method.start_fraction * later) if method.states == "own" else 0
    halves = method.objective == "semigroup"
    differences = not halves and method.derivative == "finite_difference"
    passes = [
        ("student, own states", "student", moved, NONE, 1),
        ("student, shorter jumps or derivative", "student", 2 * later if differences else later, NONE, 1 + halves),
        ("teacher", "teacher", still if halves else own, NONE, 1),
        ("student, trained", "student", batch, WEIGHTS, 1),
    ]
    return [one for one in passes if one[2]] + corrected


def freeflow_passes(method: Any, batch: int) -> list[Pass]:
    """Of FreeFlow."""
    predicted = round(method.prediction_fraction * batch)
    corrected = batch - predicted
    rows = max(1, round(method.critic_fraction * batch))
    updates = method.critic_updates if corrected else 0
    derivative = 2 * predicted if method.derivative == "finite_difference" else predicted
    passes = [
        ("student, for the derivative", "student", derivative, NONE, 1),
        ("teacher, prediction", "teacher", predicted, NONE, 1),
        ("teacher, correction", "teacher", corrected, NONE, 1),
        ("critic, correction", "critic", corrected, NONE, 1),
        ("student, for the critic", "student", rows, NONE, updates),
        ("student, trained", "student", batch, WEIGHTS, 1),
        ("critic, trained", "critic", rows, WEIGHTS, updates),
    ]
    return [one for one in passes if one[2] and one[4]]


PASSES: dict[str, Callable[[Any, int], list[Pass]]] = {
    "freeflow": freeflow_passes, "boot": boot_passes, "consistency": consistency_passes,
    "flow_map_matching": flow_map_passes, "dmd2": host_passes,
    "diff_instruct": host_passes, "sid": host_passes, "disback": host_passes,
}


def needed_passes(method: Any, batch: int) -> list[Pass]:
    """Of one step of a method that ``check`` lets through; 0 times: as often as the step that is drawn needs."""
    passes = PASSES[method.name](method, batch)
    host = getattr(method, "host", method)
    if getattr(host, "steps", 1) > 1 and getattr(host, "step_inputs", "") == "simulated":
        passes.append((STATES, "student", batch, NONE, 0))  # as many as the steps that are drawn ask for
    return passes


def bare_pass(trainer: Any, module: Any, rows: int, kind: str) -> Thunk:
    """A call of the diffusers network of ``module``, with the backward pass of a mean square that ``kind`` says."""
    import torch

    backbone, device = module.backbone, trainer.device
    x = torch.randn(rows, *trainer.method.teacher.shape, device=device)
    time = torch.rand(rows, device=device) * 1000
    classes = trainer.method.teacher.classes
    condition = None if classes is None else classes.wrap(torch.randint(classes.num_classes, (rows,), device=device))

    def forward() -> Any:
        return module.family.call(backbone, x, time, condition)

    def without() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        forward().square().mean().backward()

    def through() -> None:
        x.requires_grad_()
        torch.autograd.grad(forward().square().mean(), x)

    return {NONE: without, WEIGHTS: both, INPUT: through}[kind]


def bare_update(trainer: Any, name: str) -> Thunk:
    """Clipping and one fused AdamW step of a copy of the weights, on gradients of noise."""
    import torch

    role = trainer.roles[name]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in role.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(copies, lr=1e-6, fused=True)
    for parameter in copies:
        parameter.grad = torch.randn_like(parameter)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(copies, trainer.settings.max_grad_norm or 1.0)
        optimizer.step()

    return update


def sampling(trainer: Any) -> tuple[Thunk, Thunk]:
    """``generate`` and the loop one would write by hand, both for the same number of images on the CPU."""
    import torch

    student, module = trainer.student(), trainer.method.teacher.network
    shape, device = student.shape, student.device
    count = SAMPLING_BATCH * SAMPLING_BATCHES
    labels = None
    if student.classes is not None:
        labels = student.classes.wrap(torch.arange(SAMPLING_BATCH, device=device) % student.num_classes)

    chains = getattr(student, "chains", ())  # of a flow map between any two times; all its calls are the last
    steps = chains[-1] if chains else student.steps if student.num_steps > 1 else None
    times = (1.0,) if steps is None else steps.times
    fresh = steps is not None and steps.stepping == "stochastic"

    @torch.no_grad()
    def loop() -> Any:
        images = []
        for _ in range(SAMPLING_BATCHES):
            x = torch.randn(SAMPLING_BATCH, *shape, device=device)
            for t, later in zip(times, (*times[1:], 0.0), strict=True):
                time = torch.full((SAMPLING_BATCH,), 1000.0 * t, device=device)
                velocity = module.family.call(module.backbone, x, time, labels)
                x = x - t * velocity if fresh or not later else x + (later - t) * velocity
                if fresh and later:
                    x = (1 - later) * x + later * torch.randn_like(x)
            images.append(student.decode(x).cpu())
        return torch.cat(images)

    return lambda: student.generate(num_images=count, batch_size=SAMPLING_BATCH), loop


def measure(
    tasks: dict[str, Thunk], rounds: int, warmup: int, after: Thunk, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every task in every round; the order turns round, so that no task always follows the same one."""
    import torch

    names, seconds = list(tasks), {name: [] for name in tasks}
    for index in range(-warmup, rounds):
        for name in names if index % 2 else reversed(names):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = clock()
            tasks[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken = clock() - began
            after()
            if index >= 0:
                seconds[name].append(taken)
    return seconds


def benchmark(config: Any, rounds: int, warmup: int = 3, processor: bool = False) -> dict[str, Any]:
    """Medians in seconds, and the two ratios; ``processor``: in seconds of this process on the CPU."""
    clock = time.process_time if processor else time.perf_counter
    check(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, folder)
        passes = needed_passes(config.method, trainer.micro_rows)
        states_taken, taken = count_states(trainer.method), []

        def train_step() -> None:
            trainer.train_step()
            taken.append(states_taken())

        steps: dict[str, Thunk] = {"step": train_step}
        frozen = trainer.method.teacher.network
        # Without the hook that feeds a student's network its duration: what diffusers alone would do.
        bare_networks = {"teacher": frozen, **{name: frozen.trainable_copy() for name in trainer.roles}}
        for name, network, rows, kind, _ in passes:
            steps[name] = bare_pass(trainer, bare_networks[network], rows, kind)
        steps |= {f"update {name}": bare_update(trainer, name) for name in trainer.roles}

        def clear() -> None:
            for network in bare_networks.values():
                network.zero_grad(set_to_none=True)

        timed = measure(steps, rounds, warmup, clear, clock)
        generate, loop = sampling(trainer)
        drawn = measure({"generate": generate, "loop": loop}, rounds, warmup, lambda: None, clock)
    counts = {name: [count] * rounds for name, *_, count in passes}
    for name in counts.keys() & {STATES, PATHS, SAMPLES}:
        counts[name] = [one.get(name, 0) for one in taken[-rounds:]]
    bare = [sum(counts[name][i] * timed[name][i] for name in counts) for i in range(rounds)]
    updates = [sum(timed[f"update {name}"][i] for name in trainer.roles) for i in range(rounds)]
    with_updates = [a + b for a, b in zip(bare, updates, strict=True)]
    median = statistics.median

    def ratio(ours: list[float], theirs: list[float]) -> float:
        return median(a / b for a, b in zip(ours, theirs, strict=True))

    return {
        "passes": [
            {"name": name, "rows": rows, "kind": kind, "count": sum(counts[name]) / rounds,
             "seconds": median(timed[name])}
            for name, _, rows, kind, _ in passes
        ],
        "step": median(timed["step"]), "bare": median(bare), "updates": median(updates),
        "step_ratio": ratio(timed["step"], bare), "step_ratio_with_updates": ratio(timed["step"], with_updates),
        "generate": median(drawn["generate"]), "loop": median(drawn["loop"]),
        "sampling_ratio": ratio(drawn["generate"], drawn["loop"]),
        "rounds": rounds, "load": os.getloadavg()[0],
    }  # fmt: skip


def text(result: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    lines = []
    for one in result["passes"]:
        times = "" if one["count"] == 1 else f", {one['count']:.3g} times"
        name = f"{one['name']}: {one['rows']} rows, {one['kind']}{times}"
        lines.append(f"{name:<64}{1000 * one['seconds']:9.2f} ms")
    for name, key in (("sum of the bare passes", "bare"), ("clipping and AdamW, all networks", "updates"),
                      ("training step", "step")):  # fmt: skip
        lines.append(f"{name:<64}{1000 * result[key]:9.2f} ms")
    lines.append(f"step / bare passes: {result['step_ratio']:.3f} (target {STEP_TARGET:.2f}); "
                 f"step / (bare passes + updates): {result['step_ratio_with_updates']:.3f}")  # fmt: skip
    lines.append(f"generate / bare loop, batch {SAMPLING_BATCH}: {result['sampling_ratio']:.3f} "
                 f"(target {SAMPLING_TARGET:.2f}); {1000 * result['generate']:.1f} and {1000 * result['loop']:.1f} ms")
    lines.append(f"medians of {result['rounds']} rounds, ratios within each; load of the machine {result['load']:.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default="configs/digits/freeflow.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="default: 40")
    parser.add_argument("--processor-time", action="store_true", help="of this process on the CPU, not of the clock")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="also write the figures there")
    options = parser.parse_intermixed_args(arguments)
    from flowdistill.config import load_config

    try:
        if options.rounds < 1:
            raise UserError(f"--rounds is {options.rounds}; it must be at least 1")
        if options.json:
            check_json_place(options.json, ("passes", "step_ratio", "rounds"), "a file of this benchmark")
        result = benchmark(load_config(options.config, options.overrides), options.rounds,
                           processor=options.processor_time)
    except UserError as error:
        print(f"benchmark_step: error: {error}", file=sys.stderr)
        return 2
    print(text(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
