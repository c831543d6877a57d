"""A one-step student that has learned a concept: on disk a LoRA and a word, which stock diffusers loads.

    student/pytorch_lora_weights.safetensors    pipe.load_lora_weights(...)
    student/learned_embeds.safetensors          pipe.load_textual_inversion(...)
    student/comfyui_lora.safetensors            the LoRA under the names that ComfyUI knows
    student/flowdistill.json                    what load_student needs to do both
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from flowdistill.conditioning.components import LOADING_ERRORS
from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompts import PromptList
from flowdistill.config import TeacherConfig, found_again
from flowdistill.export.comfyui import write_lora
from flowdistill.methods.echodistill.adaptation import adapted_tensors
from flowdistill.methods.echodistill.token import TokenEncoder, TokenPrompts
from flowdistill.networks.storage import SIDECAR
from flowdistill.networks.velocity import ExtendedVelocity, VelocityNetwork
from flowdistill.students.generator import Generator, generated
from flowdistill.students.student import Student, StudentInfo
from flowdistill.teachers.autoencoder import BaseVae, checked_autoencoder
from flowdistill.teachers.loading import load_pipeline, load_teacher, pipeline_folder, teacher_files
from flowdistill.teachers.teacher import Teacher
from flowdistill.teachers.weight_files import NamedFiles, check_weights
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_folder, check_weight_file, local_path
from flowdistill.utils.logging import quiet_libraries
from flowdistill.utils.text import JsonObject

EMBEDDINGS = "learned_embeds.safetensors"


def one_step_time(source: Teacher) -> float:
    """The linear time of a pipeline's single step: its schedule's last, or that of the sigma it was exported with."""
    sigma = None if source.scheduler is None else source.scheduler.config.get("sigma_max")
    return source.t_max if sigma is None or source.path.kind != "vp" else sigma / (1 + sigma)


class ConceptStudent(Student):
    """A :class:`Generator` around an adapted network, with the prompts of a :class:`TokenEncoder`, while it trains."""

    kind = "personal"
    prompts: TokenPrompts

    def scalars(self, guidance_scale: Tensor | float | None = None) -> dict[str, Tensor | float]:
        self._guidance(guidance_scale)
        return {}

    def forward(
        self, noise: Tensor, condition: Condition | None = None, guidance_scale: Tensor | float | None = None
    ) -> Tensor:
        """Latents (B, *shape) of unit noise, differentiable, one network call."""
        self._guidance(guidance_scale)
        return generated(self.network, noise, self.t_start, condition)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files and what :meth:`load` needs, replacing ``folder`` in one move."""
        description = {
            "format": 1,
            "kind": self.kind,
            "method": self.info.method,
            "base_model": self.info.base_model,
            "backbone": self.network.velocity.family.backbone_class,
            "token": self.prompts.encoder.token,
            "initializer": self.prompts.encoder.initializer,
            "image_size": list(self.prompts.image_size),
            "prompts": self.prompts.prompts,
            "settings": self.info.settings,
        }
        if self.info.base_vae is not None:
            description["base_vae"] = self.info.base_vae._asdict()
        save_adaptation(local_path(folder), self.network.velocity, self.prompts.encoder, description)

    @classmethod
    def load(cls, folder: Path, description: JsonObject, resident: int | None = None) -> Generator:
        """The student of a folder that :meth:`save` has written: its LoRA becomes part of the weights."""
        recorded = description.get("base_vae")
        vae = None if recorded is None else BaseVae(**recorded)
        place = None if vae is None else found_again(vae.source, folder)
        source = found_again(description["base_model"], folder)
        pipeline = load_adapted_pipeline(source, folder, vae=place)

        def files() -> NamedFiles:
            found = teacher_files(TeacherConfig(source, vae=place))
            found["method.student"] = found.pop("teacher.source")
            return found

        check_weights(folder, files, "for the student consists of changes to it")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        base = load_teacher(pipeline, image_size=description["image_size"])
        info = StudentInfo(description["method"], description["base_model"], settings=description["settings"])
        base.vae = vae
        student = Generator.around(ExtendedVelocity(base.network), base, one_step_time(base), info)
        prompts = description["prompts"]
        if prompts and student.prompts is not None:
            student.prompts.use(PromptList(prompts, [1 / len(prompts)] * len(prompts)))
        return student.requires_grad_(False).eval()


def save_adaptation(
    folder: Path, velocity: VelocityNetwork, encoder: TokenEncoder, description: JsonObject | None = None
) -> None:
    """The LoRA of an adapted network and the word of its encoder as a folder; an older one is replaced at once."""
    family, backbone = velocity.family, velocity.backbone
    with atomic_folder(folder) as partial:
        write_lora(partial, StableDiffusionPipeline, adapted_tensors(backbone),
                   family.pipelines[StableDiffusionPipeline.__name__],
                   family.base_version(backbone, velocity.path.prediction),
                   title=encoder.token, trigger_phrase=encoder.token)
        row = encoder.words.row.detach().cpu()[None].contiguous()  # (1, D): other programs refuse (D,)
        save_file({encoder.token: row}, partial / EMBEDDINGS, metadata={"format": "pt"})
        if description is not None:
            (partial / SIDECAR).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_adapted_pipeline(base: str, folder: Path, dtype: torch.dtype = torch.float32, vae: str | None = None) -> Any:
    """The base pipeline, a Stable Diffusion one, with LoRA and word of ``folder``, by diffusers' own loaders.

    Args:
        vae: the autoencoder in the place of the pipeline's own, a folder or a hub id; None: its own.

    Raises:
        UserError: the base model is not there, or the files do not fit it.
    """
    place = local_path(base)
    if not place.exists() and (base.count("/") != 1 or base.startswith((".", "~"))):
        raise UserError(f"{folder} holds changes to the model {base}, which is not there; run this where it is")
    for file in folder.glob("*.safetensors"):
        check_weight_file(file)
    given: JsonObject = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    source = pipeline_folder(base)
    if vae is not None:
        try:
            given["vae"] = checked_autoencoder(TeacherConfig(base, vae=vae), source).load(dtype)
        except UserError as error:
            raise UserError(f"{folder} was trained with an autoencoder in the place of {base}'s: {error}") from error
    pipeline = load_pipeline(source, dtype, **given)
    try:
        with quiet_libraries():
            pipeline.load_lora_weights(folder)
            pipeline.load_textual_inversion(folder / EMBEDDINGS)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} could not be loaded on top of {base}: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one_step_pipeline(pipeline: Any) -> Any:
    """The pipeline with the scheduler whose single step begins at the schedule's last time."""
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return pipeline
