"""A teacher's pipeline as its own call samples: its scheduler with every setting, noise of its own included."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.networks.backbones import BackboneFamily
from flowdistill.networks.velocity import VelocityNetwork
from flowdistill.paths.native_path import FLOW_SCHEDULERS, SPACINGS
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.utils.errors import UserError

if TYPE_CHECKING:
    from flowdistill.teachers.teacher import Teacher

# Classes that place noise levels between the ends of their table; the others between those of their timesteps.
WHOLE_TABLE = ("MultistepScheduler", "SinglestepScheduler")
ADDS_NOISE = (
    "DDPMParallelScheduler", "DDPMScheduler", "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler", "KDPM2AncestralDiscreteScheduler", "KarrasVeScheduler", "LCMScheduler",
)


def scheduler_at(
    scheduler: Scheduler, family: BackboneFamily, steps: int, shape: Sequence[int], kind: Any = None
) -> Scheduler:
    """A copy of ``scheduler``, or one of class ``kind`` with its settings, set to ``steps`` as the family's pipeline
    does for latents of ``shape``.

    A single time is not stretched to ``shift_terminal``: diffusers divides 0 by 0 there, and its pipelines draw black.
    """
    single = {"shift_terminal": None} if steps == 1 and scheduler.config.get("shift_terminal") else {}
    copy = (kind or type(scheduler)).from_config(scheduler.config, **single)
    family.set_timesteps(copy, steps, shape)
    return copy


def pipeline_scheduler(teacher: Teacher, steps: int) -> Scheduler:
    """The scheduler that the pipeline's call goes through, set to ``steps``; ``timesteps`` has one entry a call.

    Raises:
        UserError: a teacher without a pipeline, or one whose call is no loop over a scheduler that can be seeded.
    """
    reason = not_measured(teacher)
    if reason is not None:
        raise UserError(f"{reason}, so the pipeline's own call cannot be measured; leave evaluation.pipeline_steps "
                        "empty")
    assert teacher.scheduler is not None
    try:
        return scheduler_at(teacher.scheduler, teacher.network.family, steps, teacher.shape)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the pipeline's own call with {steps} steps is refused by its {teacher.path.scheduler_name}: "
                        f"{reason}") from error


def not_measured(teacher: Teacher) -> str | None:
    """Why the pipeline's own call cannot be measured; None where it can."""
    scheduler, name, network = teacher.scheduler, teacher.path.scheduler_name, teacher.network
    if scheduler is None or not isinstance(network, VelocityNetwork):
        return f"the teacher {teacher.source or 'in memory'} has no pipeline"
    if teacher.path.kind == "ve":
        return "KarrasVePipeline takes two calls a step, which is no loop over its scheduler's steps"
    if name == "DPMSolverSDEScheduler":
        return f"the {name} draws noise that no generator seeds"
    learned = str(scheduler.config.get("variance_type") or "").startswith("learned")
    if learned and network.family.learned_variance_channels(network.backbone):
        return (f"the {name} steps with a variance that the network learned (variance_type "
                f"'{scheduler.config.variance_type}'), which flowdistill drops")
    return None


@torch.no_grad()
def pipeline_sample(
    teacher: Teacher,
    noise: Tensor,
    condition: Condition | None = None,
    steps: int = 50,
    guidance_scale: float = 1.0,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Latents (B, *shape) as the pipeline's own call makes them of unit noise (B, *shape).

    The loop that diffusers' pipelines share: scale the input, ask the network, guide, step. ``teacher.t_max`` plays no
    part in it; eta is 0, as in the pipelines.

    Args:
        generators: one a sample, of the noise that the scheduler adds; None: torch's own.

    Raises:
        UserError: the scheduler refuses so many steps, or fails in one.
    """
    scheduler = pipeline_scheduler(teacher, steps)
    accepted = inspect.signature(scheduler.step).parameters
    given: dict[str, object] = {"eta": 0.0} if "eta" in accepted else {}
    if "generator" in accepted and generators is not None:
        given["generator"] = list(generators)
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        native = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        output = teacher.prediction(native, float(timestep), condition, guidance_scale)
        try:
            x = scheduler.step(output, timestep, x, **given).prev_sample
        except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            # A scheduler finds out here what it does not support: a prediction type, a table of another length.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the pipeline's own call with {steps} steps fails in a step of its "
                            f"{teacher.path.scheduler_name}: {reason}") from error
    return x


def adds_noise(scheduler: Scheduler) -> bool:
    """Whether the pipeline's own call draws noise at its steps."""
    config = scheduler.config
    return (type(scheduler).__name__ in ADDS_NOISE or str(config.get("algorithm_type")).startswith("sde")
            or bool(config.get("stochastic_sampling")))


def describe_call(teacher: Teacher) -> str:
    """How the pipeline's own call samples, and in what ``teacher.sample`` differs, in one line."""
    scheduler, path = teacher.scheduler, teacher.path
    assert scheduler is not None
    config = scheduler.config
    facts = ["adds noise at its steps"] if adds_noise(scheduler) else []
    placed = next((key for key in SPACINGS if config.get(key)), None)
    spacing = config.get("timestep_spacing")
    if path.kind == "vp" and placed is None and spacing not in (None, "trailing"):
        facts.append(f"its timesteps are '{spacing}' (here 'trailing')")
    if path.kind == "vp" and placed is not None and not path.scheduler_name.endswith(WHOLE_TABLE) and (
            spacing != "linspace"):
        facts.append(f"its noise levels end at that of its last '{spacing}' timestep (here at the smallest)")
    if path.kind == "flow" and placed is not None and path.scheduler_name not in FLOW_SCHEDULERS:
        facts.append(f"its noise levels are those of {placed} (here even)")
    if config.get("use_dynamic_shifting") and not teacher.network.family.pipelines:
        facts.append("its shift depends on the image size by a rule of the pipeline (here not at all)")
    end = _end(scheduler, path.kind)
    if end:
        facts.append(f"its last step ends at t = {end:.4f} (here at 0)")
    return f"{path.scheduler_name}{': ' if facts else ''}{'; '.join(facts)}"


def _end(scheduler: Scheduler, kind: str) -> float:
    """The linear time at which the pipeline's own call ends."""
    config = scheduler.config
    early = config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min"
    if kind == "vp" and (early or type(scheduler).__name__ == "DEISMultistepScheduler"):
        first = scheduler.alphas_cumprod[0].double().item()
        sigma = math.sqrt((1 - first) / first)
        return sigma / (1 + sigma)
    if kind == "edm" and config.get("final_sigmas_type") == "sigma_min":
        return config.sigma_min / (1 + config.sigma_min)
    return 0.0
