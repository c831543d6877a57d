"""The teacher: a frozen pipeline as a guided velocity field on the linear path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.pipeline_lora import BaseLora
from flowdistill.conditioning.prompts import PromptConditions, encode
from flowdistill.networks.backbones import BackboneFamily
from flowdistill.networks.lora import LoraSettings
from flowdistill.networks.velocity import VelocityNetwork, per_sample
from flowdistill.paths.native_path import NativePath
from flowdistill.paths.scheduler_protocol import Scheduler
from flowdistill.teachers.autoencoder import BaseVae
from flowdistill.teachers.codec import PixelCodec, VaeCodec
from flowdistill.teachers.offload import OffloadHook
from flowdistill.teachers.pipeline_call import describe_call, not_measured, pipeline_sample, pipeline_scheduler
from flowdistill.teachers.solvers import integrate
from flowdistill.teachers.weight_files import NamedFiles
from flowdistill.utils.devices import as_tensor
from flowdistill.utils.errors import UserError
from flowdistill.utils.numbers import LARGEST
from flowdistill.utils.quantized import parameter_count, quantized_layers
from flowdistill.utils.randomness import Draw, generator_of


class Teacher:
    """A frozen velocity field with its conditions and its codec.

    Attributes:
        network: module ``(x (B, *shape), t (B,), condition) -> velocity``; frozen, in evaluation mode.
        path: the native path (ranges, sampling times, coefficients).
        shape: shape of one latent, e.g. (C, H, W).
        codec: latents <-> images.
        classes: how labels become conditions; None for a teacher without classes.
        prompts: how prompts become conditions; None for a teacher without prompts.
        source: where it was loaded from, for messages and for the student's config.
        scheduler: the diffusers scheduler it came with; None for an exact teacher.
        offload: which parts :meth:`to` leaves on the CPU while they are not called, one of
            ``flowdistill.teachers.offload.PARTS``.
        guidance_norm: what happens to the norm of a guided prediction, one of
            ``flowdistill.objectives.guidance.NORMS``; None: what the pipeline does.
        start: a velocity network that students start as instead of this one, maybe of another architecture.
        lora: the LoRA of a user's that is part of the weights; None where there is none.
        vae: the record of the autoencoder in the place of the pipeline's own, ``codec``'s; None: it is its own.
        own_codec: with ``vae``, loads the pipeline's own autoencoder.
        files: finds what was read, by the setting that names it; nothing of a live pipeline.
    """

    def __init__(
        self,
        network: nn.Module,
        path: NativePath,
        shape: tuple[int, ...],
        codec: PixelCodec | VaeCodec | None = None,
        classes: ClassLabels | None = None,
        source: str = "",
        scheduler: Scheduler | None = None,
        prompts: PromptConditions | None = None,
        start: VelocityNetwork | None = None,
    ) -> None:
        self.network: Any = network.requires_grad_(False).eval()
        self.start = start
        self.path = path
        self.shape = tuple(shape)
        self.codec = (codec or PixelCodec()).requires_grad_(False).eval()
        self.classes = classes
        self.source = source
        self.scheduler = scheduler
        self.prompts = prompts
        self.guidance_norm: str | None = None
        self.offload = "none"
        self.lora: BaseLora | None = None
        self.vae: BaseVae | None = None
        self.own_codec: Callable[[], VaeCodec] | None = None
        self.quantize: str | None = None
        self.files: Callable[[], NamedFiles] = dict
        self._anchor = torch.zeros(0)  # remembers the device when the network has no parameters, or is elsewhere
        self.offload_hook: OffloadHook | None = None

    @property
    def t_min(self) -> float:
        return self.path.t_min

    @property
    def t_max(self) -> float:
        return self.path.t_max

    @property
    def num_classes(self) -> int | None:
        return None if self.classes is None else self.classes.num_classes

    @property
    def null_label(self) -> int | None:
        return None if self.classes is None else self.classes.null_label

    @property
    def device(self) -> torch.device:
        if self.offload_hook is not None:
            return self._anchor.device
        return next((p.device for p in self.network.parameters()), self._anchor.device)

    def to(self, device: torch.device | str) -> Teacher:
        """Move to ``device``; what :attr:`offload` names goes there by itself when it is called."""
        self._anchor = self._anchor.to(device)
        if self.offload_hook is not None:
            self.offload_hook.remove()
            self.offload_hook = None
        if self.offload == "all":
            self.offload_hook = OffloadHook(self.network, device)
        else:
            self.network.to(device)
        if isinstance(self.codec, VaeCodec) and self.offload != "none":
            self.codec.offload_to(device)
        else:
            self.codec.to(device)
        return self

    def take_autoencoder(self, other: Teacher) -> None:
        """Put the autoencoder of ``other``, a teacher with the same latents, in the place of one's own; both share it.
        """
        self.codec, self.vae, self.own_codec = other.codec, other.vae, None

    def release(self) -> None:
        """Free the device of a network that only visits it; nothing may want a gradient through it any more."""
        if self.offload_hook is not None:
            self.offload_hook.offload()

    @property
    def _velocity_network(self) -> VelocityNetwork | None:
        """The network of a backbone, also within one that knows further conditions; None for an exact teacher."""
        network = getattr(self.network, "velocity", self.network)
        return network if isinstance(network, VelocityNetwork) else None

    @property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is an input of the network: guidance then costs no second pass."""
        network = self._velocity_network
        return network is not None and network.family.takes_guidance(network.backbone)

    @property
    def can_guide(self) -> bool:
        """Whether a guidance scale other than 1 is possible."""
        return self.null_label is not None or self.prompts is not None or self.takes_guidance

    def student_copy(self, lora: LoraSettings | None = None) -> VelocityNetwork:
        """The velocity network that a student starts as: a float32 copy of ``start``, or of this one's; or, with
        ``lora``, adapters on its own weights."""
        if self.start is None:
            return self.network.trainable_copy(lora=lora)
        return self.start.trainable_copy(self.path, lora)

    def encode(
        self,
        labels: Sequence[int] | Tensor | None = None,
        prompts: Sequence[str] | None = None,
        negative_prompts: Sequence[str] | None = None,
    ) -> Condition | None:
        """Labels (B,) or prompts (B) as a condition on the teacher's device.

        Args:
            negative_prompts: the other side of guidance, one a prompt; None: the teacher's one negative prompt.

        Raises:
            UserError: a label is out of range, or what is given is not what the model takes.
        """
        condition = encode(self.classes, self.prompts, labels, prompts, negative_prompts, self.device)
        return None if condition is None else condition.to(self.device)

    def null(self, condition: Condition) -> Condition:
        """The other side of guidance for the rows of ``condition``."""
        if condition.negative is not None:
            return condition.negative
        if self.prompts is not None:
            return self.prompts.null(condition)
        if self.classes is None:
            raise UserError("guidance_scale other than 1 needs a conditional teacher, and this one is unconditional")
        return self.classes.null(condition)

    def examples(self, indices: Sequence[int]) -> Condition | None:
        """Conditions of samples with these indices: the classes, or the list of prompts, in turn."""
        if self.prompts is not None:
            return self.prompts.examples(indices).to(self.device)
        return None if self.classes is None else self.classes.examples(indices).to(self.device)

    def draw_condition(self, draw: Draw, rows: int | None = None) -> Condition | None:
        """Conditions of a training batch; None for an unconditional teacher.

        Uniform over the classes (those of ``teacher.labels``), or prompts of ``teacher.prompts`` by their weights.

        Args:
            draw: the source of randomness, a :class:`flowdistill.utils.randomness.Draw`.
            rows: over all processes; all of the draw's by default.
        """
        if self.prompts is not None:
            return self.prompts.draw(draw, rows).to(self.device)
        return None if self.classes is None else self.classes.draw(draw, rows)

    def velocity(
        self,
        x: Tensor,
        t: Tensor | float,
        condition: Condition | None = None,
        guidance_scale: Tensor | float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Guided velocity v = v_null + g (v_cond - v_null), conditional and null parts in one batched forward.

        A network with guidance as an input is asked once, with g. Where the pipeline's scheduler clips the denoised
        estimate D, this is (x - D) / t of the guided and then clipped one. Gradients pass through the clipping as it
        is: none where an element is clipped.

        Args:
            x: states on the linear path (B, *shape).
            t: times in [t_min, t_max], (B,) or one float. Times below t_min use the network at t_min.
            guidance_scale: g, (B,) or one float; 1 means no guidance and costs one pass instead of two.
            guidance_interval: (low, high): guidance acts only where low <= t <= high (Kynkäänniemi et al. 2024);
                elsewhere g = 1.

        Returns:
            (B, *shape), in x's dtype.
        """
        return self._clipped(self._velocity(x, t, condition, guidance_scale, guidance_interval), x, t)

    def sides(
        self, x: Tensor, t: Tensor, condition: Condition, guidance_scale: float
    ) -> tuple[Tensor, Tensor]:
        """:meth:`velocity` at guidance 1 and at ``guidance_scale``, (B, *shape) each, of one forward on both sides.

        For a network without guidance as an input, which has no other side.
        """
        conditional, null = self._both(x, t, condition)
        scale = torch.full((len(x),), guidance_scale, dtype=x.dtype, device=x.device)
        guided = self._guided(x, t, conditional, null, scale)
        return self._clipped(conditional, x, t), self._clipped(guided, x, t)

    def _clipped(self, velocity: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """(x - D) / t of the estimate D of a velocity at x, clipped."""
        if self.path.clipping is None:
            return velocity
        # Below t_min, where the network is asked at t_min, so is the estimate; 1e-6 is for networks that know t = 0.
        floor = max(self.t_min, 1e-6)
        time = per_sample(t.clamp(min=floor), x) if isinstance(t, Tensor) else max(float(t), floor)
        clean = x - time * velocity
        return velocity + (clean - self.path.clipping(clean)) / time

    def _velocity(
        self,
        x: Tensor,
        t: Tensor | float,
        condition: Condition | None,
        guidance_scale: Tensor | float,
        guidance_interval: tuple[float, float] | None,
        **how: bool,
    ) -> Tensor:
        """:meth:`velocity` without clipping: that of the network, which gets ``how`` as further arguments."""
        each = isinstance(t, Tensor)  # a time for each sample
        times = t if isinstance(t, Tensor) else torch.full((len(x),), float(t), dtype=torch.float64, device=x.device)
        if not isinstance(guidance_scale, Tensor):
            inside = guidance_interval is None or each or guidance_interval[0] <= t <= guidance_interval[1]
            if guidance_scale == 1 or not inside:
                return self.network(x, times, condition, **how)
        if condition is None:
            raise UserError("guidance_scale other than 1 needs a conditional teacher, and this one is unconditional")
        scale = as_tensor(guidance_scale, x.dtype, x.device).expand(x.shape[0])
        if guidance_interval is not None:
            low, high = guidance_interval
            scale = torch.where((times >= low) & (times <= high), scale, torch.ones_like(scale))
        if self.takes_guidance:
            return self.network(x, times, condition.replace(guidance=scale), **how)
        conditional, null = self._both(x, times, condition, **how)
        return self._guided(x, times, conditional, null, scale, **how)

    def _both(self, x: Tensor, times: Tensor, condition: Condition, **how: bool) -> tuple[Tensor, Tensor]:
        """What the network says with the condition, and on the other side of guidance."""
        both = Condition.cat([condition, self.null(condition)])
        conditional, null = self.network(torch.cat([x, x]), torch.cat([times, times]), both, **how).chunk(2)
        return conditional, null

    def _guided(
        self, x: Tensor, times: Tensor, conditional: Tensor, null: Tensor, scale: Tensor, native: bool = False
    ) -> Tensor:
        """Guidance of velocities, or of ``native`` predictions, at ``scale`` (B,).

        Plain guidance is the same in both, for it is affine. The norm is that of what the network predicts.
        """
        network, scale = self._velocity_network, per_sample(scale, x)
        family = BackboneFamily if network is None else network.family
        if self.guidance_norm is None or native:  # the pipeline's own call knows no such setting
            return family.guide(conditional, null, scale)
        guided = null + scale * (conditional - null)
        if self.guidance_norm == "none":
            return guided
        c = self.path.coefficients(times)
        state, output = x * per_sample(c.state, x), per_sample(c.output, x)
        # v = state + output * prediction, turned round and applied again.
        return state + output * family.keep_norm(
            (guided - state) / output, (conditional - state) / output, self.guidance_norm)

    def denoise(
        self,
        x: Tensor,
        t: Tensor | float,
        condition: Condition | None = None,
        guidance_scale: Tensor | float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """E[x_0 | x_t = x] = x - t v(x, t), clipped as the pipeline's scheduler does; arguments and shapes as for
        :meth:`velocity`."""
        v = self._velocity(x, t, condition, guidance_scale, guidance_interval)
        clean = x - (per_sample(t, x) if isinstance(t, Tensor) else t) * v
        return clean if self.path.clipping is None else self.path.clipping(clean)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        condition: Condition | None = None,
        steps: int = 50,
        solver: str = "euler",
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        times: Sequence[float] | None = None,
    ) -> Tensor:
        """Solve the probability-flow ODE from unit noise to latents.

        Args:
            noise: unit normal (B, *shape); the start state is ``t_max * noise`` (alpha_T is dropped, see the design).
            steps: steps on the teacher's own time grid; ``steps`` network calls with Euler, ``2 steps - 1`` with the
                Heun solvers.
            solver: one of ``flowdistill.teachers.solvers.SOLVERS``. Euler steps are the scheduler's own also where it
                clips and goes on with the noise of the estimate before clipping (DDIM), which is a step of no ODE.
            guidance_scale: 0 or more; see :meth:`velocity`.
            times: explicit decreasing times from t_max to 0 instead of ``steps``.

        Returns:
            Latents (B, *shape).

        Raises:
            UserError: a guidance scale that is negative or not finite.
        """
        if not 0 <= guidance_scale < math.inf:
            raise UserError(f"guidance_scale is {guidance_scale}; it must be a number of at least 0")
        if guidance_scale > LARGEST:
            raise UserError(f"guidance_scale is {guidance_scale}; float32 has numbers up to {LARGEST:.1e}")
        grid = self.path.time_grid(steps).tolist() if times is None else list(times)
        clipping = self.path.clipping
        if solver == "euler" and clipping is not None and clipping.keeps_noise:
            x = grid[0] * noise
            for now, after in itertools.pairwise(grid):
                velocity = self._velocity(x, now, condition, guidance_scale, guidance_interval)
                x = (1 - after) * clipping(x - now * velocity) + after * (x + (1 - now) * velocity)
            return x

        def field(x: Tensor, t: float) -> Tensor:
            return self.velocity(x, t, condition, guidance_scale, guidance_interval)

        return integrate(field, grid[0] * noise, grid, solver)

    def prediction(
        self, native: Tensor, timestep: float, condition: Condition | None = None, guidance_scale: float = 1.0
    ) -> Tensor:
        """What the backbone itself says (B, *shape) of its own input (B, *shape) at its own timestep, guided."""
        return self._velocity(native, timestep, condition, guidance_scale, None, native=True)

    def pipeline_sample(
        self,
        noise: Tensor,
        condition: Condition | None = None,
        steps: int = 50,
        guidance_scale: float = 1.0,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Latents as the pipeline's own call makes them, by its scheduler: see
        :func:`flowdistill.teachers.pipeline_call.pipeline_sample`."""
        return pipeline_sample(self, noise, condition, steps, guidance_scale, generators)

    def pipeline_calls(self, steps: int) -> int:
        """Network calls of :meth:`pipeline_sample`; more than ``steps`` with a scheduler of higher order."""
        return len(pipeline_scheduler(self, steps).timesteps)

    def remarks(self) -> list[str]:
        """What a user should know about how this teacher is read, a sentence each."""
        found = [self.path.start] if self.path.start else []
        if self.path.clipping is not None:
            latents = ", though latents have no such range" if isinstance(self.codec, VaeCodec) else ""
            found.append(f"{self.path.clipping}, as the pipeline's {self.path.scheduler_name} does{latents}; the "
                         "students' networks do not clip, and learn from velocities that are clipped")
        return found

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *shape) to images (B, C, H, W) in [0, 1]."""
        return self.codec.decode(latents)

    @torch.no_grad()
    def disagreement(self, seed: int = 0, batch_size: int | None = None) -> str | None:
        """A sentence when the network and the scheduler seem to disagree (wrong prediction type or schedule).

        At high noise a denoiser that reads its network rightly returns something of the data's size that is not the
        noise turned round. Reading epsilon as v or flow as epsilon breaks one of the two.
        """
        generator = generator_of(seed)
        count = batch_size or (32 if self.prompts is None else 2)  # text-to-image networks are large
        noise = torch.randn(count, *self.shape, generator=generator).to(self.device)
        t = min(self.t_max, 0.9)
        x = t * noise  # not through denoise: what is clipped has the data's size whatever the network says
        clean = (x - t * self._velocity(x, t, self.examples(range(count)), 1.0, None)).float()
        size = clean.std().item()
        alignment = torch.nn.functional.cosine_similarity(clean.flatten(1), noise.flatten(1)).mean().item()
        if size > 3.0 or alignment < -0.5:
            return (f"the network and its scheduler seem to disagree: at t = {t:.2f} the denoised estimate has "
                    f"standard deviation {size:.2f} and cosine {alignment:.2f} to the noise; check the scheduler's "
                    f"prediction_type ({self.path.prediction}) and schedule")
        return None

    @staticmethod
    def _describe_codes(network: nn.Module) -> list[str]:
        layers = quantized_layers(network)
        return [f"quantised     {layers[0].scheme}, {len(layers)} linear layers"] if layers else []

    def describe(self) -> str:
        """What was detected, in words."""
        path, network = self.path, self.network
        network = network.backbone if isinstance(network, VelocityNetwork) else network
        kinds = {"vp": "variance-preserving (DDPM)", "edm": "variance-exploding (EDM)",
                 "ve": "variance-exploding (score)", "flow": "flow matching"}
        parameters = parameter_count(network)
        sample = " x ".join(map(str, self.shape))
        latents = "latents of an autoencoder" if isinstance(self.codec, VaeCodec) else "pixels in [-1, 1]"
        lines = [
            f"source        {self.source or 'in memory'}",
            f"backbone      {type(network).__name__}, {parameters / 1e6:.2f} M parameters, "
            f"{next((p.dtype for p in network.parameters()), torch.float32)}".replace("torch.", ""),
            *self._describe_codes(network),
            *([] if self.lora is None else [f"LoRA          {self.lora}, part of the weights"]),
            f"sample        {sample}, {latents}",
            *([] if self.vae is None else [f"autoencoder   {self.vae.source}, in the place of the pipeline's own"]),
            f"path          {kinds.get(path.kind, path.kind)}, predicts {path.prediction}, from {path.scheduler_name}",
            f"times         t = sigma / (alpha + sigma) from {path.t_max:.4f} (prior) to {path.t_min:.4f} (data)",
            "timesteps     continuous: the network's sinusoidal embedding takes non-integer timesteps",
        ]
        if self.prompts is not None:
            guidance = "guidance is an input of the network" if self.takes_guidance else "classifier-free guidance"
            lines.append(f"conditions    prompts, by {self.prompts.describe()}; {guidance}")
        elif self.classes is None:
            lines.append("conditions    none (unconditional); guidance is not possible")
        else:
            guidance = "no null label, so no classifier-free guidance"
            if self.classes.null_label is not None:
                guidance = f"null label {self.classes.null_label}, classifier-free guidance possible"
            lines.append(f"conditions    class labels 0 to {self.classes.num_classes - 1}; {guidance}")
        if self.guidance_norm is not None:
            lines[-1] += f", the norm kept: {self.guidance_norm}"
        if isinstance(self.network, VelocityNetwork):
            lines.append(f"attention     {self.network.attention}")
        if self.scheduler is not None:
            reason = not_measured(self)
            measured = "evaluate --pipeline-steps N measures it" if reason is None else f"not measured: {reason}"
            lines.append(f"pipeline      samples by {describe_call(self)}; {measured}")
        lines += [f"note          {remark}" for remark in self.remarks()]
        problem = self.disagreement()
        lines.append(f"check         {problem or 'the denoised estimate at high noise is plausible'}")
        return "\n".join(lines)
