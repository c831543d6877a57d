"""Other projects' training steps beside ours, where their code is on this machine: on the same random U-Net of Stable
Diffusion's kind, with the same batch and precision, in turns.

Their code is called, as it is, from a checkout that an environment variable names; none of it is here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from flowdistill.config import load_config
from flowdistill.plan.meta_teacher import read_architecture
from flowdistill.training.loop import Trainer
from scripts import benchmark_step
from tests.families import PROMPTS, clip_tokenizer, condition_unet
from tests.gpu.bench import Bench, NotHere, expect
from tests.tiny import VP, lively, vae

TOKENS = 77
CRITIC_UPDATES = 4
FULL_SIZE = 76 * 2**30
"""Bytes of memory from which on both projects' networks of SD 1.5's own width are held at once."""


@dataclass(frozen=True)
class Project:
    """Another project's code.

    Attributes:
        name: as people call it.
        variable: of the environment; names a checkout.
        address: where it comes from.
        file: in the checkout, by which it is known.
    """

    name: str
    variable: str
    address: str
    file: str


FASTGEN = Project("FastGen", "FLOWDISTILL_FASTGEN", "https://github.com/NVlabs/FastGen",
                  "fastgen/methods/distribution_matching/dmd2.py")
LCM_SCRIPT = Project("diffusers' LCM script", "FLOWDISTILL_DIFFUSERS", "https://github.com/huggingface/diffusers",
                     "examples/consistency_distillation/train_lcm_distill_sd_wds.py")


def checkout(project: Project) -> tuple[Path, str]:
    """The folder of a project's code, and its commit.

    Raises:
        NotHere: no folder is named.
        AssertionError: the folder is not the project's.
    """
    text = os.environ.get(project.variable)
    if not text:
        raise NotHere(f"{project.name} is not installed beside: git clone {project.address}, install what it imports, "
                      f"and set {project.variable} to the folder")
    folder = Path(text).resolve()
    expect((folder / project.file).is_file(), f"{project.variable} is {text}, which has no {project.file}")
    asked = subprocess.run(["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"], capture_output=True,
                           text=True, check=False)
    lines = asked.stdout.split()
    own = asked.returncode == 0 and Path(lines[0]).resolve() == folder
    return folder, lines[1] if own else "unknown, no git checkout"


@contextlib.contextmanager
def their_imports(project: Project) -> Iterator[None]:
    """A block that imports a project's code: what that lacks is a reason not to run, and no failure."""
    try:
        yield
    except ImportError as error:
        raise NotHere(f"{project.name} does not import here: {error}") from error


def random_pipeline(bench: Bench) -> tuple[Path, UNet2DConditionModel]:
    """A StableDiffusionPipeline with random weights in the part's folder: SD 1.5's U-Net, of half the channels where
    there is too little memory for all networks; text encoder and autoencoder are tiny, so that a step is the U-Net's.
    """
    if bench.small:
        unet = condition_unet()
    else:
        config = dict(read_architecture("stable-diffusion-v1-5/stable-diffusion-v1-5").components["unet"])
        if torch.cuda.get_device_properties(bench.device).total_memory < FULL_SIZE:
            config["block_out_channels"] = [width // 2 for width in config["block_out_channels"]]
        with bench.device:
            unet = UNet2DConditionModel.from_config(config)
    width = unet.config.cross_attention_dim
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=width, bos_token_id=52, eos_token_id=53, pad_token_id=53))
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = TOKENS
    pipeline = StableDiffusionPipeline(
        vae=vae(), text_encoder=lively(text), tokenizer=tokenizer, unet=unet, safety_checker=None,
        scheduler=DDIMScheduler(**VP, clip_sample=False, steps_offset=1), feature_extractor=None,
        requires_safety_checker=False)
    pipeline.save_pretrained(bench.folder / "pipeline")
    return bench.folder / "pipeline", unet


def our_trainer(bench: Bench, pipeline: Path, batch: int, method: dict[str, Any], **train: Any) -> Trainer:
    """Our loop on that pipeline in bf16."""
    (bench.folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    (bench.folder / "beside.yaml").write_text(json.dumps({
        "output_dir": str(bench.folder / "ours"), "method": method, "evaluation": {"at_end": False},
        "teacher": {"source": str(pipeline), "prompts": str(bench.folder / "prompts.txt"), "dtype": "bfloat16"},
        "train": {"steps": 1000, "batch_size": batch, "trackers": [], "device": str(bench.device), "precision": "bf16",
                  **train},
    }), encoding="utf-8")
    config = load_config(bench.folder / "beside.yaml")
    trainer: Trainer = benchmark_step.make_trainer(config, config.output_dir)
    return trainer


def clock_of(bench: Bench) -> Callable[[], float]:
    """Of the wall; on the CPU, where other work waits for the same cores, of this process on the processor."""
    return time.process_time if bench.small else time.perf_counter


def shape_in_words(unet: UNet2DConditionModel, batch: int) -> str:
    """What both sides train, for the report."""
    side, millions = unet.config.sample_size, sum(p.numel() for p in unet.parameters()) / 1e6
    return f"{millions:.3g} M parameters, {batch} latents of 4 x {side} x {side}, {TOKENS} tokens, bf16"


def compare(bench: Bench, name: str, theirs: list[float], ours: list[float], batch: int) -> None:
    """Write down seconds of each round and what they say."""
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    bench.figures |= {
        f"{name} (s a step)": statistics.median(theirs), "flowdistill (s a step)": statistics.median(ours),
        f"{name} / flowdistill": ratio, "flowdistill: images a second": batch / statistics.median(ours),
        "rounds": len(ours),
    }


# --- FastGen


def fastgen_dmd2(bench: Bench) -> None:
    """DMD2 without its adversarial term, guidance 1.75: a student update and four of the critic.

    FastGen makes them in five iterations of its trainer, with its clipping and its average; its U-Net always recomputes
    activations, so ours does here.
    """
    folder, commit = checkout(FASTGEN)
    pipeline, unet = random_pipeline(bench)
    batch, side = 2 if bench.small else 8, unet.config.sample_size
    settings = {"HF_HOME": str(bench.folder), "LOCAL_FILES_ONLY": "true", "WANDB_MODE": "disabled",
                "FASTGEN_OUTPUT_ROOT": str(bench.folder / "fastgen")}
    with mock.patch.dict(os.environ, settings), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        with their_imports(FASTGEN):
            recipe = importlib.import_module("fastgen.configs.experiments.SD15.config_dmd2")
            callbacks = importlib.import_module("fastgen.configs.callbacks")
            trainers = importlib.import_module("fastgen.trainer")
            utilities = importlib.import_module("fastgen.utils")
            networks = importlib.import_module("fastgen.networks.SD15.network")
            methods = importlib.import_module("fastgen.methods")
            schedules = importlib.import_module("fastgen.networks.noise_schedule")
            importlib.import_module("loguru").logger.disable("fastgen")
        config = recipe.create_config()
        config.trainer.callbacks = callbacks.GradClip_CALLBACK | callbacks.EMA_CALLBACK
        config.trainer.tf32_enabled = False
        model_config = config.model
        model_config.net = utilities.LazyCall(networks.StableDiffusion15)(model_id=str(pipeline))
        model_config.input_shape, model_config.device = [4, side, side], str(bench.device)
        model_config.gan_loss_weight_gen, model_config.use_ema = 0.0, True
        model_config.student_update_freq, model_config.enable_preprocessors = CRITIC_UPDATES + 1, False
        # It asks the hub for Stable Diffusion's noise levels, which are those of the pipeline here.
        levels = mock.Mock(from_pretrained=lambda *_, **__: DDIMScheduler(**VP))
        with mock.patch.object(schedules, "DDIMScheduler", levels):
            model = methods.DMD2Model(model_config)
        their_step = _their_dmd2(bench, trainers.Trainer(config), model, batch, unet)
        adamw = {"lr": 1e-5, "weight_decay": 0.01}
        method = {"name": "dmd2", "guidance_scale": 1.75, "critic_updates": CRITIC_UPDATES, "optimizer": adamw,
                  "critic_optimizer": adamw}
        ours = our_trainer(bench, pipeline, batch, method, gradient_checkpointing=True, max_grad_norm=10.0)
        rounds, warmup = (3, 1) if bench.small else (8, 2)
        timed = benchmark_step.measure({"theirs": their_step, "ours": ours.train_step}, rounds, warmup, lambda: None,
                                       clock_of(bench))
    bench.figures |= {"FastGen's commit": commit, "size": shape_in_words(unet, batch)}
    compare(bench, "FastGen", timed["theirs"], timed["ours"], batch)


def _their_dmd2(
    bench: Bench, trainer: Any, model: Any, batch: int, unet: UNet2DConditionModel
) -> Callable[[], None]:
    """What FastGen's own loop does around ``train_step``, for one student update and those of the critic."""
    trainer.callbacks.on_model_init_start(model)
    model.on_train_begin(is_fsdp=False)
    trainer.callbacks.on_model_init_end(model)
    trainer.callbacks.on_optimizer_init_start(model)
    model.init_optimizers()
    trainer.callbacks.on_optimizer_init_end(model)
    trainer.callbacks.on_train_begin(model, iteration=0)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(bench.device)

    words = [(noise(batch, TOKENS, width), torch.ones(batch, TOKENS, device=bench.device)) for _ in range(2)]
    batch_of = {"real": noise(batch, 4, side, side), "condition": words[0], "neg_condition": words[1]}
    iteration = 0

    def step() -> None:
        nonlocal iteration
        for _ in range(CRITIC_UPDATES + 1):
            iteration += 1
            data = dict(batch_of)
            trainer.callbacks.on_training_step_begin(model, iteration=iteration)
            losses, outputs = trainer.train_step(model, model, data, iteration, 0)
            trainer.callbacks.on_training_step_end(model=model, data_batch=data, output_batch=outputs,
                                                   loss_dict=losses, iteration=iteration)
        expect(math.isfinite(losses["total_loss"].item()), "FastGen's loss is not finite")

    return step


# --- diffusers' LCM script


class Enough(Exception):
    """Ends the other project's loop."""


def lcm_script(bench: Bench) -> None:
    """A step of latent consistency distillation of all weights: pass with gradient, target network, teacher with
    guidance.

    The script's own loop runs, and where it moves its progress bar, ours makes a step. Reading pictures is left out: it
    gets the same batch each time. It encodes them and the texts at each step, with encoders that are tiny here.
    """
    folder, commit = checkout(LCM_SCRIPT)
    pipeline, unet = random_pipeline(bench)
    batch, side = 2 if bench.small else 8, unet.config.sample_size
    rounds, warmup = (3, 1) if bench.small else (12, 3)
    method = {"name": "consistency", "steps": 4, "points": 48, "solver": "euler", "loss": "l2", "target": "ema",
              "guidance_min": 6.0, "guidance_max": 16.0, "pairs": batch, "pairs_steps": 1,
              "optimizer": {"lr": 1e-4, "weight_decay": 0.01}}
    ours = our_trainer(bench, pipeline, batch, method, max_grad_norm=1.0)
    AcceleratorState._reset_state()  # of which a process has one, and the script's has another precision
    theirs, own = [], []
    clock = clock_of(bench)

    class Bar:
        """In the place of the script's progress bar."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.began: float | None = None

        def update(self, _: int) -> None:
            bench.wait()
            now = clock()
            if self.began is not None:
                theirs.append(now - self.began)
            ours.train_step()
            bench.wait()
            own.append(clock() - now)
            if len(theirs) == rounds + warmup:
                raise Enough
            self.began = clock()

        def set_postfix(self, **logs: float) -> None:
            expect(math.isfinite(logs["loss"]), "the script's loss is not finite")

    class Batches:
        """In the place of the script's data set."""

        num_batches = 10**6

        def __init__(self, **_: Any) -> None:
            self.train_dataloader = self

        def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
            factor = 2  # of the tiny autoencoder
            images = torch.rand(batch, 3, factor * side, factor * side) * 2 - 1
            while True:
                yield images, (PROMPTS * batch)[:batch]

    with their_imports(LCM_SCRIPT):
        script = _their_script(folder / LCM_SCRIPT.file)
    command = ["script", "--pretrained_teacher_model", str(pipeline), "--output_dir", str(bench.folder / "theirs"),
               "--train_batch_size", str(batch), "--max_train_steps", "1000", "--max_train_samples", "1000",
               "--mixed_precision", "bf16", "--train_shards_path_or_url", "none", "--checkpointing_steps", "100000",
               "--validation_steps", "100000"]
    handlers, level, said = logging.root.handlers[:], logging.root.level, diffusers.utils.logging.get_verbosity()
    try:
        with mock.patch.object(sys, "argv", command):
            arguments = script.parse_args()
        arguments.report_to = None
        with mock.patch.multiple(script, tqdm=Bar, SDText2ImageDataset=Batches), contextlib.suppress(Enough):
            script.main(arguments)
    finally:
        logging.root.handlers[:], logging.root.level = handlers, level
        diffusers.utils.logging.set_verbosity(said)
        AcceleratorState._reset_state()
    expect(len(theirs) == rounds + warmup, f"the script ended after {len(theirs)} steps")
    bench.figures |= {"diffusers' commit": commit, "size": shape_in_words(unet, batch)}
    compare(bench, "the LCM script", theirs[warmup:], own[warmup + 1:], batch)


def _their_script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("their_lcm_script", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
