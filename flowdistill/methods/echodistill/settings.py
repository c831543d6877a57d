"""The settings of EchoDistill, with the names of diffusers' DreamBooth and textual inversion scripts where they fit."""

from __future__ import annotations

from dataclasses import dataclass

from flowdistill.config import OptimizerConfig, needs, option
from flowdistill.config.schema import MISSING
from flowdistill.methods.echodistill.adaptation import TARGETS
from flowdistill.methods.echodistill.echo import EchoConfig
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.utils.numbers import MOST_CALLS


@dataclass
class EchoDistillConfig:
    """Settings of EchoDistill. "(authors: ...)" marks a value of the published code; every other default is ours."""

    name: str = "echodistill"
    student: str = option(MISSING, "the one-step student: a pipeline folder or a hub id")
    instance_data_dir: str = option(MISSING, "folder with a few pictures of the concept; metadata.jsonl in it may give "
                                             "each a text")
    instance_prompt: str = option(MISSING, "caption, with the placeholder token, of pictures without one of their own")
    placeholder_token: str = option("<new1>", "the new word")
    initializer_token: str = option(MISSING, "one known word that the new one starts as")
    student_prompts: list[str] = option([], "further prompts with the new word, on which the student is aligned")
    validation_prompts: list[str] = option([], "shown in sample grids and at the end; []: the instance prompt")
    adapter: str = option("attention", "layers trained in both networks: LoRA on the cross-attention's keys and "
                                       "values (kv), on all attention, with the feed-forward layers or on all; or "
                                       "those keys and values freely (authors: kv_full)", choices=tuple(TARGETS))
    rank: int = option(4, "rank of the LoRA", at_least=1,
                       only=needs("adapter", *(name for name in TARGETS if name != "kv_full")))
    random_flip: bool = option(False, "mirror half of the pictures (authors: true)")
    zoom: float = option(1.0, "enlarge each picture up to this much at a random place; 1: never", at_least=1)
    prior_loss_weight: float = option(1.0, "hold the student at what it was for teacher.prompts; 0: do not (authors: "
                                           "0)", at_least=0)
    teacher_prior_loss_weight: float = option(0.0, "weight of the same term for the teacher (authors: 0)", at_least=0)
    teacher_guidance_scale: float = option(
        7.5, "guidance of the teacher's denoising that the student follows (authors: 7.5)", at_least=0,
    )
    latent_weight: float = option(1.0, "alignment of latents (authors: 1)", at_least=0)
    identity_weight: float = option(1.0, "alignment of identity features (authors: 1)", at_least=0)
    identity: str = option("small", "the frozen network whose features these are: small, timm:NAME=FILE, "
                                    "transformers:FOLDER or package.module:function")
    texture: str = option("swd", "alignment of texture: sliced Wasserstein distance of patches, Gram matrices of the "
                                 "identity network's features, or none", choices=("swd", "gram", "none"))
    texture_weight: float = option(0.1, "weight of the texture term (authors: 0.1)", at_least=0,
                                   only=needs("texture", "swd", "gram"))
    discriminators: list[str] = option(["small:1"], "frozen networks under the discriminators' heads, as for identity; "
                                                    "[]: no adversarial term")
    adversarial_weight: float = option(1.0, "weight of each discriminator for the student (authors: 1)", at_least=0)
    time: NoiseLevels = option(NoiseLevels("timestep"), "noise levels of the teacher's loss")
    alignment_time: NoiseLevels = option(NoiseLevels("timestep"), "noise levels of the alignment")
    token_lr: float | None = option(None, "learning rate of the new word; null: the teacher's", above=0)
    optimizer: OptimizerConfig = option(OptimizerConfig(lr=2e-5), "optimiser of the student (authors: lr 2e-5)")
    teacher_optimizer: OptimizerConfig = option(OptimizerConfig(lr=1e-5), "optimiser of the teacher (authors: lr 1e-5)")
    discriminator_optimizer: OptimizerConfig = option(
        OptimizerConfig(lr=1e-4), "optimiser of the heads (authors: lr 1e-4)",
    )
    teacher_steps: int = option(25, "steps of the teacher's own pictures (authors: 25)", at_least=1, at_most=MOST_CALLS)
    echo: EchoConfig = option(EchoConfig, "the echo stage")
