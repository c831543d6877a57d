"""Which stock scheduler, and which call of a stock pipeline, take exactly the steps of a student of several calls.

Nothing folds here: K calls have K time embeddings. The network stays as it is, and a scheduler of its own kind takes
the student's steps (:mod:`flowdistill.students.steps`), natively:

    stochastic       VP: LCM's, whose boundary condition vanishes at a large ``timestep_scaling``; flow matching:
                     Euler's with ``stochastic_sampling``, x' = (1 - t') (x - t v) + t' n
    deterministic    VP: Euler's or DDIM's; flow matching: Euler's or that of flow maps; EDM: its Euler's

Each of these has settings by which it takes other steps without a word: so what is found here has been run, on random
numbers, beside the student's own rule.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from flowdistill.export.prompt_pipelines import stock_pipeline
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.paths.native_path import NativePath
from flowdistill.students.steps import MOST_STEPS, STEPPINGS, Steps, start_scale, teacher_times
from flowdistill.students.student import Student
from flowdistill.teachers.teacher import Teacher
from flowdistill.utils.errors import listed

EXACT = 1e-5
"""Of a scheduler's states, relative to their size: it computes in float32."""
SAME_TIME = 5e-4
"""Of a timestep, which schedulers have in float32."""
BOUNDARY = 1e6
"""LCM's timestep_scaling: c_skip of timestep 19 is 7e-16, and 7e-6 with the scheduler's own 10."""
TABLES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Beta schedules that the schedulers here know by name; others are given as a list."""
GUESSES = 20
"""Rounds in which a shift and the end of its list, which depend on one another, are found."""
MOST_FOLDERS = 100
"""Pipelines that one student may become, one a class; each has the whole network."""


@dataclass(frozen=True)
class Loop:
    """How a stock pipeline goes through its scheduler.

    Attributes:
        pipeline: its class name.
        scaled_noise: whether it starts at ``init_noise_sigma`` times the noise.
        scaled_first: whether it does so before it sets the timesteps.
        scales_input: whether it needs a scheduler with ``scale_model_input``.
        keeps_scaled: whether it goes on with the scaled input.
        even_times: whether it gives its scheduler evenly spaced times, 1 to 1 / K.
        seeded: whether its ``generator`` is that of the scheduler's noise too.
        rounded: whether it rounds the timestep to the latents' type.
    """

    pipeline: str
    scaled_noise: bool = False
    scaled_first: bool = False
    scales_input: bool = False
    keeps_scaled: bool = False
    even_times: bool = False
    seeded: bool = False
    rounded: bool = False

    def takes(self, argument: str) -> bool:
        """Whether its call has this argument."""
        return argument in inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters


PIXEL_LOOPS = {
    "ConsistencyModelPipeline": Loop(
        "ConsistencyModelPipeline", scaled_noise=True, scaled_first=True, scales_input=True, seeded=True
    ),
    "DDPMPipeline": Loop("DDPMPipeline", seeded=True),
    "DiTPipeline": Loop("DiTPipeline", scales_input=True, keeps_scaled=True),
}
"""Of the pipelines without prompts; the others' are in the facts of their backbone's family."""


@dataclass(frozen=True)
class StockSteps:
    """A scheduler and the arguments of a call that take a student's steps.

    Attributes:
        loop: of the pipeline.
        kind, settings: class of the scheduler, and what differs from its defaults.
        arguments: of the pipeline's call: ``num_inference_steps``, or a list of times.
    """

    loop: Loop
    kind: type[Any]
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def scheduler(self) -> Any:
        return self.kind(**self.settings)

    @property
    def takes_labels(self) -> bool:
        """Whether the pipeline's call has class labels."""
        return self.loop.takes("class_labels")

    @property
    def code(self) -> str | None:
        """The scheduler in Python; None where a list of betas makes that too long."""
        if "trained_betas" in self.settings:
            return None
        return f"{self.kind.__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    @property
    def written_arguments(self) -> str:
        """The arguments as Python writes them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())


def few_step_problem(model: Teacher | Student, velocity: VelocityNetwork, steps: Steps) -> str | None:
    """Why no stock pipeline makes what a student of these steps makes; None where one does, and for a single call.

    Args:
        model: the teacher, before its student trains, or the student.
        velocity: its network.
    """
    if len(steps) == 1:
        return None
    loop, path = loop_of(model, velocity), velocity.path
    if loop is None or model.scheduler is None:
        return (f"students of several steps of a {velocity.family.backbone_class} "
                f"{'without a scheduler ' if model.scheduler is None else ''}cannot be exported: no stock pipeline of "
                "them is known")
    if stock_steps(model, velocity, steps) is not None:
        count = 1 if model.classes is None or loop.takes("class_labels") else len(model.classes.shown)
        return None if count <= MOST_FOLDERS else (
            f"students of several steps from this teacher cannot be exported: a {loop.pipeline} passes no class labels "
            f"on, so that each class becomes a pipeline of its own, and {count} classes are more than {MOST_FOLDERS}")
    other = STEPPINGS[1 - STEPPINGS.index(steps.stepping)]
    scale = start_scale(path, steps.times, other, model.prompts is not None)
    found = stock_steps(model, velocity, replace(steps, stepping=other, start_scale=scale))
    hint = "" if found is None else f"; with {other} steps they can be"
    if found is None and path.kind == "vp":
        counts = [count for count in range(2, MOST_STEPS + 1) if _own_steps(model, velocity, count, steps.stepping)]
        hint = f"; of the teacher's own times, those of {listed(counts)} steps can be" if counts else ""
    return (f"students of {len(steps)} {steps.stepping} steps from this teacher cannot be exported: "
            f"{_reason(loop, path, steps)}{hint}")


def _own_steps(model: Teacher | Student, velocity: VelocityNetwork, count: int, stepping: str) -> bool:
    """Whether ``count`` of the teacher's own times can be exported."""
    times = teacher_times(velocity.path, count)
    scale = start_scale(velocity.path, times, stepping, model.prompts is not None)
    return stock_steps(model, velocity, Steps(times, stepping, scale)) is not None


def stock_steps(model: Teacher | Student, velocity: VelocityNetwork, steps: Steps) -> StockSteps | None:
    """The first scheduler and call that take these steps; None where none does.

    Args:
        model, velocity: see :func:`few_step_problem`.
    """
    loop, path = loop_of(model, velocity), velocity.path
    makers = {"vp": _vp, "edm": _edm, "flow": _flow}
    if path.kind not in makers or model.scheduler is None or loop is None:
        return None
    candidates = makers[path.kind](loop, path, model.scheduler, steps)
    return next((found for found in candidates if takes_the_steps(found, path, steps)), None)


def loop_of(model: Teacher | Student, velocity: VelocityNetwork) -> Loop | None:
    """The loop of the pipeline that a student of several calls becomes; None where it is not known.

    Of the two for pixels, only DDPMPipeline does without what flow matching's schedulers lack, and draws rectangles.
    """
    if model.prompts is not None:
        name, facts = stock_pipeline(model.prompts, velocity.family)
        return Loop(name, facts.scaled_noise, scales_input=facts.scaled_noise, even_times=facts.even_times,
                    seeded=facts.seeded_steps, rounded=facts.rounded_times)
    name = velocity.family.student_pipeline
    if name == "ConsistencyModelPipeline" and (velocity.path.kind == "flow" or model.shape[1] != model.shape[2]):
        name = "DDPMPipeline"
    return PIXEL_LOOPS.get(name)


# --- candidates, best first


def _vp(loop: Loop, path: NativePath, native: Any, steps: Steps) -> Iterator[StockSteps]:
    """Stochastic: LCM's; deterministic: Euler's where the pipeline scales, else DDIM's. All in native coordinates."""
    timesteps = native_times(path, steps)
    whole = [round(timestep) for timestep in timesteps]
    table = _table(native, whole[0])
    if table is None:
        return
    count = {"num_inference_steps": len(steps)}
    listed = _listed(loop, [timestep if abs(timestep - near) > SAME_TIME else near
                            for timestep, near in zip(timesteps, whole, strict=True)])
    if steps.stepping == "stochastic":
        lcm = table | {"timestep_scaling": BOUNDARY}
        for original in (len(steps), whole[0] + 1):  # of its own steps, of which it takes every so many
            yield StockSteps(loop, LCMScheduler, lcm | {"original_inference_steps": original}, count)
        if listed is not None:
            yield StockSteps(loop, LCMScheduler, lcm | {"original_inference_steps": whole[0] + 1}, listed)
        return
    trailing = table | {"timestep_spacing": "trailing"}
    if loop.scaled_noise:
        yield StockSteps(loop, EulerDiscreteScheduler, trailing, count)
    yield StockSteps(loop, DDIMScheduler, trailing | {"clip_sample": False}, count)
    if loop.scaled_noise and listed is not None:
        # At sigma n; and, with a spacing that the list overrides, at sqrt(sigma^2 + 1) n, which is unit native noise.
        for spacing in ("trailing", "leading"):
            yield StockSteps(loop, EulerDiscreteScheduler, table | {"timestep_spacing": spacing}, listed)


def _edm(loop: Loop, path: NativePath, native: Any, steps: Steps) -> Iterator[StockSteps]:
    """Its schedule between the first and the last of the times: a part of such a schedule is one."""
    if steps.stepping == "stochastic" or not loop.scaled_noise:
        return
    sigmas = [t / (1 - t) for t in (steps.times[0], steps.times[-1])]
    named = ("sigma_data", "prediction_type", "rho", "sigma_schedule")
    settings = {name: native.config[name] for name in named if native.config.get(name) is not None}
    yield StockSteps(loop, EDMEulerScheduler, settings | {"sigma_max": sigmas[0], "sigma_min": sigmas[1]},
                     {"num_inference_steps": len(steps)})


def _flow(loop: Loop, path: NativePath, native: Any, steps: Steps) -> Iterator[StockSteps]:
    """Times in the scheduler where a shift and its stretching make them, else in the call."""
    train = native.config.get("num_train_timesteps", 1000)
    common: dict[str, Any] = {} if train == 1000 else {"num_train_timesteps": train}
    count = {"num_inference_steps": len(steps)}
    if loop.scales_input:
        if steps.stepping == "deterministic" and not loop.scaled_noise:  # it has no init_noise_sigma
            yield StockSteps(loop, FlowMapEulerDiscreteScheduler, common | _pure_shift(steps.times), count)
        return
    if steps.stepping == "stochastic":
        common["stochastic_sampling"] = True
    if loop.even_times:
        yield StockSteps(loop, FlowMatchEulerDiscreteScheduler, common | _pure_shift(steps.times), count)
    if (shift := _stretched_shift(steps.times, None if loop.even_times else train)) is not None:
        yield StockSteps(loop, FlowMatchEulerDiscreteScheduler, common | shift, count)
    if loop.takes("sigmas"):
        yield StockSteps(loop, FlowMatchEulerDiscreteScheduler, common, {"sigmas": list(steps.times)})


def _listed(loop: Loop, timesteps: Sequence[float]) -> dict[str, Any] | None:
    """The arguments of a call with these timesteps; None where it takes no such list."""
    if not loop.takes("timesteps"):
        return None
    # ConsistencyModelPipeline asks for one of the two, and its own number of steps is 1.
    unset = {"num_inference_steps": None} if loop.pipeline == "ConsistencyModelPipeline" else {}
    return unset | {"timesteps": list(timesteps)}


def _table(native: Any, last: int) -> dict[str, Any] | None:
    """Settings of the betas of ``native`` up to index ``last``: schedulers start where their table ends."""
    config, length = native.config, len(native.alphas_cumprod)
    if not 0 <= last < length:
        return None
    settings: dict[str, Any] = {"prediction_type": config.get("prediction_type", "epsilon"), "steps_offset": 1}
    if last == length - 1 and config.get("trained_betas") is None and config.get("beta_schedule") in TABLES:
        settings |= {name: config[name] for name in ("beta_start", "beta_end", "beta_schedule")}
        if config.get("rescale_betas_zero_snr"):
            settings["rescale_betas_zero_snr"] = True
    else:
        settings["trained_betas"] = native.betas[: last + 1].tolist()
    return settings | ({} if last == 999 else {"num_train_timesteps": last + 1})


def _pure_shift(times: Sequence[float]) -> dict[str, Any]:
    """The shift s that makes the last of ``times`` s u / (1 + (s - 1) u) of u = 1 / K."""
    u, t = 1 / len(times), times[-1]
    return _shift(t * (1 - u) / (u * (1 - t)))


def _stretched_shift(times: Sequence[float], train_timesteps: int | None) -> dict[str, Any] | None:
    """Shift s and the last time, to which the scheduler stretches what the shift makes of its evenly spaced u.

    1 - t_i = c w_i / (s - (s - 1) w_i), w_i = 1 - u_i, so that w_i / (1 - t_i) is a line in w_i, which gives s; what
    it is at the last time is for ``shift_terminal``.

    Args:
        train_timesteps: of a scheduler whose u ends at its own smallest time, which depends on s; None for 1 / K.
    """
    count, shift = len(times), 1.0
    for _ in range(1 if train_timesteps is None else GUESSES):
        low = 1 / count if train_timesteps is None else shift / (train_timesteps + shift - 1)
        w = [(1 - low) * i / (count - 1) for i in (1, count - 1)]
        if count > 2:
            first, last = (x / (1 - t) for x, t in zip(w, (times[1], times[-1]), strict=True))
            slope = (last - first) / (w[1] - w[0])
            offset = first - slope * w[0]
            if offset <= 0 or offset + slope <= 0:
                return None
            shift = offset / (offset + slope)
    return _shift(shift) | {"shift_terminal": times[-1]}


def _shift(value: float) -> dict[str, Any]:
    """Without the digits that come from times in float32: 2.9999998 is 3; nothing for 1, the default."""
    near = round(value, 4)
    value = near if abs(value - near) < 1e-6 * value else value
    return {} if value == 1 else {"shift": value}


# --- what a scheduler does, beside the student's rule


def takes_the_steps(found: StockSteps, path: NativePath, steps: Steps) -> bool:
    """Whether the pipeline's loop over the scheduler asks the network what the student asks it, and ends where it ends.

    Both are run on the same random start, network outputs and noises.
    """
    generator = torch.Generator().manual_seed(1)
    noise, *outputs = torch.randn(1 + len(steps), 2, 64, generator=generator)
    stock = _stock_states(found, noise, outputs)
    own = _own_states(path, steps, noise, outputs)
    if len(stock) != len(own):
        return False
    for (state, timestep), (expected, wanted) in zip(stock, own, strict=True):
        size = max(1.0, expected.abs().max().item())
        if abs(timestep - wanted) > SAME_TIME or not (state.double() - expected).abs().max().item() <= EXACT * size:
            return False
    return True


def _stock_states(found: StockSteps, noise: Tensor, outputs: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
    """(input of the network, timestep) of each call, and (sample, 0), by the pipeline's loop over the scheduler."""
    loop, scheduler, seen = found.loop, found.scheduler(), []
    scale = scheduler.init_noise_sigma if loop.scaled_first else 1.0
    scheduler.set_timesteps(**_setting(found))
    if loop.scaled_noise and not loop.scaled_first:
        scale = scheduler.init_noise_sigma
    sample = noise * scale
    accepted = inspect.signature(scheduler.step).parameters
    seeded = {"generator": torch.Generator().manual_seed(2)} if "generator" in accepted else {}
    for output, timestep in zip(outputs, scheduler.timesteps, strict=False):
        scaled = scheduler.scale_model_input(sample, timestep) if loop.scales_input else sample
        seen.append((scaled, float(timestep)))
        before = scaled if loop.keeps_scaled else sample
        sample = scheduler.step(output, timestep, before, **seeded, return_dict=False)[0]
    seen += [(sample, 0.0)] if len(scheduler.timesteps) == len(outputs) else []
    return seen


def _setting(found: StockSteps) -> dict[str, Any]:
    """What the pipeline's call gives ``set_timesteps``."""
    given = {name: value for name, value in found.arguments.items() if value is not None}
    count = given.get("num_inference_steps")
    if found.loop.even_times and count is not None:
        return {"sigmas": np.linspace(1.0, 1 / count, count)}
    return given


def _own_states(path: NativePath, steps: Steps, noise: Tensor, outputs: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
    """The same by the student's rule, in float64."""
    generator = torch.Generator().manual_seed(2)
    noises = [torch.randn(noise.shape, generator=generator).double() for _ in steps.times]
    state, seen, last = steps.start(noise.double()), [], len(steps)
    for k, (t, output) in enumerate(zip(steps.times, outputs, strict=True), start=1):
        c = path.coefficients(torch.tensor(t, dtype=torch.float64))
        seen.append((c.input_scale * state, c.timestep.item()))
        velocity = c.state * state + c.output * output.double()
        state = state - t * velocity if k == last else steps.after(k, state, velocity, lambda k: noises[k - 2])
    return [*seen, (state, 0.0)]


# --- words


def _reason(loop: Loop, path: NativePath, steps: Steps) -> str:
    if path.kind == "ve":
        return "no stock pipeline of several calls moves a network's input to pixels in [0, 1]"
    if path.kind == "edm":
        return _edm_reason(loop, steps)
    if path.kind == "flow":
        return _flow_reason(loop, steps)
    off = next((i for i, value in enumerate(native_times(path, steps)) if abs(value - round(value)) > SAME_TIME), None)
    timesteps = ", ".join(f"{timestep:.4g}" for timestep in native_times(path, steps))
    if off is not None:
        near = round(native_times(path, steps)[off])
        t = path.native_to_linear(torch.tensor(float(near), dtype=torch.float64)).item()
        return (f"stock schedulers call its network at whole timesteps, and t = {steps.times[off]:.4f} is timestep "
                f"{native_times(path, steps)[off]:.2f} (timestep {near} is t = {t:.6f})")
    if not loop.takes("timesteps"):
        return (f"a {loop.pipeline} takes no list of timesteps, and no scheduler makes {timesteps} of "
                f"{len(steps)} steps")
    return f"no stock scheduler of a {loop.pipeline} takes these steps exactly, at timesteps {timesteps}"


def _edm_reason(loop: Loop, steps: Steps) -> str:
    if steps.stepping == "stochastic":
        return "no stock scheduler of EDM networks makes new noise of all the noise between its steps"
    if not loop.scaled_noise:
        return f"a {loop.pipeline} does not scale its noise as EDM's schedulers need it"
    return "EDM's scheduler spaces the times between the first and the last in its own way, and these are others"


def _flow_reason(loop: Loop, steps: Steps) -> str:
    if steps.start_scale != 1 or steps.times[0] != 1:
        return (f"a {loop.pipeline} starts at the noise itself, which is t = 1, and the first of these steps is at t = "
                f"{steps.times[0]:.4f}")
    if loop.scales_input and steps.stepping == "stochastic":
        return (f"no scheduler that a {loop.pipeline} can call adds noise between the steps of a flow-matching "
                "network")
    return (f"a {loop.pipeline} takes no list of times, and no shift of evenly spaced ones makes "
            f"{', '.join(f'{t:.4f}' for t in steps.times)}")


def native_times(path: NativePath, steps: Steps) -> list[float]:
    """The timesteps of the steps, as the network is told them."""
    return path.coefficients(torch.tensor(steps.times, dtype=torch.float64)).timestep.tolist()


def rounded_times(native: Sequence[float], dtype: torch.dtype) -> list[tuple[float, float]]:
    """The timesteps that change where they are rounded to ``dtype``, each with what it becomes."""
    pairs = [(value, torch.tensor(value, dtype=torch.float32).to(dtype).item()) for value in native]
    return [(value, rounded) for value, rounded in pairs if not math.isclose(value, rounded, rel_tol=1e-6)]
