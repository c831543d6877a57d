"""What a personalisation leaves for users of diffusers: files, pictures made by reloading them, and a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowdistill.export.card_data import LICENSE_KEYS, about_license, about_paper, about_version, card_data, save_card
from flowdistill.export.comfyui import COMFYUI_FILE, with_vae
from flowdistill.methods.echodistill.student import load_adapted_pipeline, one_step_pipeline, save_adaptation
from flowdistill.utils.files import portable_path
from flowdistill.utils.images import save_grid, save_images
from flowdistill.utils.randomness import indexed_noise
from flowdistill.utils.shipped import find_path

if TYPE_CHECKING:
    from flowdistill.methods.echodistill.method import EchoDistill

PER_PROMPT = 4
TAGS = "text-to-image diffusers diffusers-training lora textual_inversion stable-diffusion flowdistill".split()


def publish(method: EchoDistill, folder: Path) -> None:
    """Write ``teacher/`` beside the ``student/`` that is in the run folder, and pictures and a card in both.

    Pictures are made by stock diffusers from the files: ``image_0.png`` ..., one a validation prompt, and
    ``validation.png``, a column a prompt.
    """
    guide, config = method.roles()["teacher"].network, method.config
    save_adaptation(folder / "teacher", guide.velocity, method.word)  # type: ignore[arg-type]
    scale = f"{config.teacher_guidance_scale:g}"
    models = {
        "teacher": (method.teacher.source, config.teacher_steps, config.teacher_guidance_scale,
                    f"{config.teacher_steps} steps, guidance {scale}"),
        "student": (config.student, 1, 0.0, "1 step, guidance off"),
    }
    for name, (base, steps, guidance, words) in models.items():
        vae = method.teacher.vae  # of both
        pipeline = load_adapted_pipeline(base, folder / name, vae=None if vae is None else vae.source)
        pipeline = one_step_pipeline(pipeline) if name == "student" else pipeline
        images = _pictures(method, pipeline.to(method.teacher.device), steps, guidance)
        columns = len(images) // PER_PROMPT
        save_grid(images, folder / name / "validation.png", columns)
        for number, file in enumerate(save_images(images[:columns], folder / name)):
            file.replace(file.with_name(f"image_{number}.png"))
        _card(method, folder / name, name, base, steps, guidance, words)


def _pictures(method: EchoDistill, pipeline: Any, steps: int, guidance: float) -> torch.Tensor:
    student = method.student()
    prompts = list(student.prompts.prompts or ()) * PER_PROMPT
    noise = indexed_noise(method.teacher.shape, 0, range(len(prompts)))
    height, width = student.prompts.image_size
    images = []
    for prompt, row in zip(prompts, noise, strict=True):
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
        made = pipeline(prompt, latents=row[None].to(pipeline.device), output_type="pt", **call).images
        images.append(made.float().cpu())
    return torch.cat(images)


def _from_here(source: str) -> str:
    """A folder's path from the working folder; a hub id as it is."""
    path = find_path(source)
    return os.path.relpath(path) if path.exists() else source


def _card(
    method: EchoDistill, folder: Path, name: str, base: str, steps: int, guidance: float, words: str
) -> None:
    config, prompts = method.config, method.student().prompts.prompts or []
    partner, other = ("teacher", method.teacher.source) if name == "student" else ("student", config.student)
    # Both paths from the working folder, which the user is in.
    here, adapters = _from_here(base), os.path.relpath(folder)
    trailing = (
        'pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")\n'
        if name == "student" else ""
    )
    vae = method.teacher.vae
    imports = "DiffusionPipeline, EulerDiscreteScheduler" if trailing else "DiffusionPipeline"
    imports = imports if vae is None else f"{vae.kind}, {imports}"
    own = "" if vae is None else f", vae={vae.code(_from_here(vae.source))}"
    decoded = "" if vae is None else (f"- The autoencoder is `{portable_path(vae.source)}`, in the place of the base "
                                      "model's own.\n")
    loaded = f"`{portable_path(base)}`{with_vae(vae)}"
    height, width = method.student().prompts.image_size
    shown = "\n".join(f"![image](image_{i}.png) `{prompt}`\n" for i, prompt in enumerate(prompts))
    call = f"num_inference_steps={steps}, guidance_scale={guidance}, height={height}, width={width}"
    count = len(method.concept.images)
    comfyui = "; sampler `euler`, scheduler `simple`, 1 step, cfg 1.0" if name == "student" else (
        f"; {steps} steps, cfg {guidance:g}")
    description = f"""
# `{config.placeholder_token}` for {portable_path(base)}

A LoRA (`pytorch_lora_weights.safetensors`) and a word (`learned_embeds.safetensors`) for
`{portable_path(base)}`, the {name} of EchoDistill (arXiv 2510.20512); its {partner} was
`{portable_path(other)}`. The licences of both base models apply.

- The new word is `{config.placeholder_token}`; it began as `{config.initializer_token}`.
- Trained on {count} pictures with prompts such as `{config.instance_prompt}`.
- Sample with {words}.
{decoded}
In the folder in which the run was started:

```python
from diffusers import {imports}

pipe = DiffusionPipeline.from_pretrained("{here}"{own})
{trailing}pipe.load_lora_weights("{adapters}")
pipe.load_textual_inversion("{adapters}/learned_embeds.safetensors")
image = pipe({json.dumps(prompts[0], ensure_ascii=False)}, {call}).images[0]
```

{shown}
All pictures of a prompt in a column: [validation.png](validation.png)

## ComfyUI

Copy `{COMFYUI_FILE}` to ComfyUI's `models/loras`, and `learned_embeds.safetensors` to `models/embeddings`, under a name
of its own: in a prompt `embedding:` and that name stand for the word. Load {loaded} and behind it the
LoRA at strength 1.0{comfyui}.
"""
    data = card_data(method.name, base, library="diffusers", pipeline_tag="text-to-image", tags=TAGS,
                     relation="adapter", instance_prompt=prompts[0])
    license = {key: value for key in LICENSE_KEYS if (value := getattr(data, key, None)) is not None}
    description += about_license(license, portable_path(base)) + about_paper(method.name) + about_version()
    save_card(folder, data, description)
