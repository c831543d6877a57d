"""The settings of a run, with the help text and the allowed range of each."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, NamedTuple

from flowdistill.utils.errors import UserError, shown
from flowdistill.utils.numbers import MOST_CALLS
from flowdistill.utils.seeds import SEEDS

MISSING: Any = "???"  # OmegaConf's mark for "mandatory, no default"


def option(
    default: object,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    length: int | None = None,
    pattern: str | None = None,
    was: str | None = None,
    rule: Callable[[Any], str] | None = None,
    only: Needs | None = None,
    blank: bool = False,
) -> Any:
    """A dataclass field with its help text and range, for the settings here and for the methods' own ``Config``.

    ``default`` may be a list, a dict or a dataclass instance or type: every configuration gets its own copy. Bounds,
    ``choices`` and ``pattern`` (a regular expression for the whole text) hold for each element of a list and never for
    None; ``length`` fixes the number of elements. Floats must be finite numbers of float32, and integers those of 64
    bits, whether or not a bound is given. ``was`` is the name the setting had in an older version, which is still read,
    with a warning. ``rule`` is for settings of no simple type: value -> what is allowed, in words, where the value is
    not; it never sees None. ``only`` is for settings that have an effect with another only, see :func:`needs`: a
    warning says so where somebody has set one to another value than its default and has not changed the other setting
    over that. ``blank``: an empty text means something of its own; elsewhere it is refused, for an empty path is the
    working folder, and so is one in a list.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    words = {"help": help, "choices": choices, "length": length, "pattern": pattern, "was": was, "rule": rule,
             "only": only, "blank": blank or default == "" or None}
    metadata: dict[str, Any] = words | limits
    metadata = {name: value for name, value in metadata.items() if value is not None}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)) or is_dataclass(default):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Needs(NamedTuple):
    """A setting that others need to have an effect; see :func:`needs`."""

    name: str
    values: tuple[object, ...]

    def reason(self, section: Any) -> str:
        """Why what needs it has no effect in ``section``, and what would help; empty where it has one."""
        value = getattr(section, self.name)
        if value in self.values if self.values else bool(value):
            return ""
        written = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        wanted = f"set it to {' or '.join(map(str, self.values))}" if self.values else "set that too"
        return f"{self.name} is {written}; {wanted}"


def needs(name: str, *values: object) -> Needs:
    """For ``only`` of :func:`option`: an effect where the section's setting ``name`` has one of ``values``; without
    values, where it is neither null, 0, false nor empty."""
    return Needs(name, values)


class HostingConfig(ABC):
    """What the settings of a method over another one, the host, inherit: the host's own settings are a section.

    Attributes:
        usual_host: the host whose settings are shown where none is named.
    """

    usual_host = ""  # without an annotation, which would make it a setting's type

    @classmethod
    @abstractmethod
    def hosted(cls, host: str) -> type:
        """This class with the settings of the host's own class in ``host``.

        Raises:
            UserError: a method that cannot be the host.
        """


def size_rule(value: Any) -> str:
    """What a size in pixels may be, in words; empty for the side of a square and for [height, width]."""
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 2**31 for side in sides):
        return ""
    return "the side of a square in pixels, such as 1024, or [height, width], such as [832, 1216]"


ATTENTION = ("auto", "sdpa", "xformers", "math", "native", "_native_cudnn", "_native_efficient", "_native_flash",
             "_native_math", "flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "flex", "sage", "sage_varlen")
"""Kernels of attention: ours, and those of diffusers' names that download nothing."""
QUANTIZED = ("int8", "fp8", "nf4")
"""Schemes of :mod:`flowdistill.utils.quantized`."""


@dataclass
class TeacherConfig:
    """The frozen model to distil."""

    source: str = option(MISSING, "pipeline folder or hub id")
    null_label: int | None = option(None, "class label that means 'unconditional'; null: detected", at_least=0)
    t_max: float | None = option(None, "start of the path; null: the scheduler's last time, or the last that works "
                                        "for an epsilon teacher (said)", above=0, at_most=1)
    prompts: str | None = option(None, "text to image: file of prompts, one a line, or .jsonl, .csv or .parquet with a "
                                       "column prompt, and maybe weight; or a folder, or tars, of pictures with "
                                       "captions")
    prompt_column: str | None = option(None, "column of the prompts in a .jsonl, .csv or .parquet; null: prompt; of "
                                             "captions as data_options.captions")
    prompt_cache: str = option(
        "auto", "where encoded prompts come from: memory; disk, of which a draw reads its rows; live, encoded when "
        "drawn, by text encoders that stay loaded; auto: memory up to prompt_cache_gb, else disk",
        choices=("auto", "memory", "disk", "live"),
    )
    prompt_cache_gb: float = option(2.0, "auto: the most that is held in memory, 10^9 bytes", at_least=0,
                                    only=needs("prompt_cache", "auto"))
    prompts_at_once: int = option(16, "prompts of the list that a text encoder reads together, in every mode; decides "
                                      "their last digits. live encodes as many for each row drawn: take 1", at_least=1)
    text_encoder_device: str | None = option(None, "cpu, cuda, cuda:N, mps or xpu; null: as train.device",
                                             pattern=r"cpu|mps|xpu|cuda(:\d+)?")
    text_encoder_dtype: str | None = option(None, "precision of the text encoders; null: as dtype",
                                            choices=("float32", "bfloat16", "float16"))
    negative_prompt: str | None = option(None, "text to image: other side of guidance; null: the pipeline's default",
                                      blank=True)
    guidance_norm: str | None = option(
        None, "norm of the guided prediction: none: as it comes; per_sample: at most the conditional one's; last_dim: "
        "the conditional one's, token by token or row by row; null: as the pipeline does it",
        choices=("none", "per_sample", "last_dim"),
    )
    # An integer or a list of two: OmegaConf knows no union with a list.
    image_size: Any = option(None, "text to image: pixels of a square's side, or [height, width]; null: the pipeline's",
                             rule=size_rule)
    text_encoder_quantize: str | None = option(None, "as quantize, for the text encoders", choices=QUANTIZED)
    dtype: str = option("float32", "precision of the frozen weights", choices=("float32", "bfloat16", "float16"))
    quantize: str | None = option(None, "keep the weights of the network's blocks in int8, fp8 or nf4, and compute in "
                                        "dtype; null: in dtype. Full students and critics start from the weights "
                                        "before, adapters stand on those after it", choices=QUANTIZED)
    attention: str = option("auto", "kernels of its attention and of the networks copied from it; auto: xformers where "
                                    "it is installed and runs, else sdpa; math alone has a forward-mode rule (jvp); "
                                    "native, flash, _flash_3, sage, flex and so on are diffusers' own names",
                            choices=ATTENTION)
    offload: str = option("none", "frozen parts kept in CPU memory while they are not called: none, codec (the "
                                  "autoencoder) or all (the network too)", choices=("none", "codec", "all"))
    labels: list[int] | None = option(None, "class labels to draw from in training; null: all", at_least=0)
    variant: str | None = option(None, "weight files such as fp16, where a model has them; null: those without a "
                                       "variant, or a model's only one", pattern=r"[A-Za-z0-9_-]+")
    vae: str | None = option(None, "autoencoder in the place of the pipeline's own: a folder or hub id (with or "
                                   "without subfolder vae), such as stabilityai/sd-vae-ft-mse or "
                                   "madebyollin/sdxl-vae-fp16-fix; null: the pipeline's own")
    start: str | None = option(None, "student (run or folder) whose network students start as; null: the teacher's own")
    lora: str | None = option(None, "text to image: LoRA that is made part of the weights, so that the teacher is a "
                                    "fine-tune: a .safetensors file, a folder or a hub id")
    lora_scale: float = option(1.0, "how much of it")

    def __post_init__(self) -> None:
        size = list(self.image_size) if isinstance(self.image_size, (list, tuple)) else self.image_size
        # A square is the same setting however it is written: the same run, and the same caches.
        self.image_size = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size

    def validate(self) -> None:
        """UserError for a size that is none, for a scale of no LoRA, and for a column of no file."""
        if self.image_size is not None and (allowed := size_rule(self.image_size)):
            raise UserError(f"teacher.image_size must be {allowed}, not {shown(self.image_size)}")
        if self.prompt_column is not None and self.prompts is None:
            raise UserError(f"teacher.prompt_column is {self.prompt_column}, but teacher.prompts is null; set the file "
                            "too")
        if self.lora is None and self.lora_scale != 1:
            raise UserError(f"teacher.lora_scale is {self.lora_scale:g}, but teacher.lora is null; set the LoRA's file "
                            "too")


@dataclass
class DataOptions:
    """How a method reads the images that its ``data`` names; see ``flowdistill.data.sources``."""

    captions: str | None = option(None, "teachers that take prompts: column or key of the captions; sidecar: of "
                                        "1.png in 1.txt; null: found")
    label: str | None = option(None, "teachers of classes: column or key of the labels; folder: names of the "
                                     "subfolders; null: found")
    classes: list[str] | None = option(None, "names of the labels 0, 1, ...; null: names that are numbers are labels, "
                                             "others stand in the order of the alphabet")
    image: str | None = option(None, "column of the pictures in a table; null: found")
    split: str = option("train", "of a table with several splits")
    on_error: str = option("error", "pictures that cannot be read, or have no caption or label: error ends the run "
                                    "before it begins, skip leaves them out and says how many",
                           choices=("error", "skip"))
    cache_latents: str = option(
        "auto", "what an autoencoder makes of the images: memory, from files that are made once; disk, of which a draw "
        "reads its rows; none, made when drawn; auto: memory up to memory_gb, else disk. Of a teacher of pixels, whose "
        "pictures are in memory or read when drawn: memory, none or auto", choices=("auto", "memory", "disk", "none"),
    )
    memory_gb: float = option(2.0, "auto: the most that is held in memory, 10^9 bytes", at_least=0,
                              only=needs("cache_latents", "auto"))


OPTIMIZERS = {
    "adamw": (),
    "adamw8bit": (),
    "paged_adamw8bit": (),
    "ao_adamw8bit": (),
    "adafactor": ("betas", "eps"),
    "muon": (),
    "lion": ("eps",),
    "prodigy": (),
}
"""Names of optimisers, and the settings that each has not; see :mod:`flowdistill.training.optimizers`."""
BETAS, EPS = (0.9, 0.99), 1e-8


@dataclass
class OptimizerConfig:
    """The optimiser and the learning rate schedule of one trained network."""

    name: str = option("adamw", "optimiser: adamw; adamw8bit, paged_adamw8bit or, with FSDP too, ao_adamw8bit, with "
                                "moments of 8 bits; adafactor; muon for linear layers, with adamw for the rest; lion; "
                                "prodigy, with lr: 1",
                       choices=tuple(OPTIMIZERS))
    lr: float = option(1e-4, "peak learning rate; of adafactor as a share of a weight's size, of prodigy a factor of "
                             "the rate that it finds", above=0)
    betas: list[float] | None = option(list(BETAS), "decay of the two gradient moments; null for an optimiser without "
                                                    "them", length=2, at_least=0, below=1)
    weight_decay: float = option(0.0, "decoupled weight decay", at_least=0)
    eps: float | None = option(EPS, "added to the root of the second moment; null for an optimiser without it", above=0)
    schedule: str = option("constant", "learning rate after the warm-up", choices=("constant", "cosine", "linear"))
    warmup_steps: int = option(0, "steps of linear growth from 0 to lr", at_least=0)
    final_lr_fraction: float = option(0.0, "cosine, linear: last lr as a fraction of lr", at_least=0, at_most=1,
                                      only=needs("schedule", "cosine", "linear"))

    @property
    def chosen_betas(self) -> Sequence[float]:
        """``betas``, or the default in the place of null."""
        return BETAS if self.betas is None else self.betas

    @property
    def chosen_eps(self) -> float:
        """``eps``, or the default in the place of null."""
        return EPS if self.eps is None else self.eps

    def validate_at(self, prefix: str, given: Mapping[str, str]) -> None:
        """Refuse settings that the optimiser has not; those that nobody set become null.

        Raises:
            UserError: so.
        """
        defaults = {"betas": list(BETAS), "eps": EPS}
        for key in OPTIMIZERS[self.name]:
            value = getattr(self, key)
            if value is not None and (key in given or value != defaults[key]):
                raise UserError(f"'{prefix}{key}' is {shown(value)}, but the optimiser {self.name} has no {key}; set "
                                f"it to null{given.get(key, '')}")
            setattr(self, key, None)


@dataclass
class StopConfig:
    """Early stopping, and which student is kept."""

    metric: str = option("fid", "figure of the measurements that train.evaluate_every makes: fid, kid, accuracy, "
                                "precision, recall, or that of a metric of yours")
    patience: int = option(5, "measurements in a row without a better figure after which training ends", at_least=1)
    min_delta: float = option(0.0, "by more than this a figure must be better to count for patience; the student kept "
                                   "is the best by whatever it is", at_least=0)


TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")


@dataclass
class TrainConfig:
    """The loop, the same for every method."""

    steps: int = option(1000, "training steps", at_least=1)
    batch_size: int = option(64, "samples of one optimiser step, over all processes and accumulation", at_least=1)
    gradient_accumulation: int = option(1, "micro-batches of one optimiser step", at_least=1)
    precision: str | None = option(
        None,
        "autocast of the trained networks, whose weights stay float32; null: as accelerate launch says, else fp32",
        choices=("fp32", "bf16", "fp16"),
    )
    max_grad_norm: float = option(1.0, "norm to which a network's gradient is clipped; 0: off", at_least=0)
    ema_decay: float = option(0.999, "decay of the averaged student", at_least=0, below=1)
    ema_warmup: bool = option(True, "let the decay grow from 0, so that early steps are forgotten sooner",
                              only=needs("ema_decay"))
    ema_device: str | None = option(None, "where the averaged student rests: cpu, cuda, cuda:N or xpu; null: beside "
                                          "the trained one", pattern=r"cpu|xpu|cuda(:\d+)?", only=needs("ema_decay"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = option(False, "torch.compile the trained networks")
    compile_scope: str = option("network", "what is compiled: each trained network; or blocks, those that repeat, the "
                                           "teacher's too, which takes far less time", choices=("network", "blocks"))
    tf32: bool | None = option(None, "CUDA: products of float32 with 10 bits of mantissa, in matrix products and "
                                     "convolutions; null: torch's own choice, convolutions only")
    log_every: int = option(20, "steps between lines of metrics.jsonl", at_least=1)
    sample_every: int = option(0, "steps between sample grids, the first before the first step; 0: at the end only",
                               at_least=0)
    num_samples: int = option(40, "images in a sample grid; of a student of several calls, most in the row for each "
                                  "number of them", at_least=1)
    checkpoint_every: int = option(500, "steps between checkpoints; 0: at the end only", at_least=0)
    keep_checkpoints: int = option(2, "newest checkpoints kept", at_least=1)
    evaluate_every: int = option(0, "steps between FID measurements; 0: at the end only", at_least=0)
    stop_when: StopConfig | None = option(None, "end training when a figure has not got better for a while, and keep "
                                                "the best student; null: train all steps and keep the last one")
    max_nonfinite_steps: int = option(10, "skipped steps in a row (loss or gradient not finite) to stop at", at_least=1)
    trackers: list[str] | None = option(None, "accelerate's trackers; null: tensorboard if installed", choices=TRACKERS)
    keep_freed_memory: bool = option(True, "on the CPU, keep what a step frees for the next one: 5 to 9 % faster steps "
                                           "of several networks, at the price of the process keeping its peak")
    device: str = option("auto", "auto, cpu, cuda, cuda:N, mps or xpu", pattern=r"auto|cpu|mps|xpu|cuda(:\d+)?")

    def validate(self) -> None:
        """UserError when the batch of an optimiser step does not divide into its micro-batches, or when training is to
        stop by a figure that nothing measures."""
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"'train.batch_size' ({self.batch_size}) must be a multiple of 'train.gradient_accumulation' "
                f"({self.gradient_accumulation}), because it is the batch of a whole optimiser step"
            )
        if self.compile_scope != "network" and not self.compile:
            raise UserError(f"'train.compile_scope' is {self.compile_scope}, but 'train.compile' is false, so nothing "
                            "is compiled; set it to true")
        if self.stop_when is not None and not self.evaluate_every:
            raise UserError("'train.stop_when' goes by what is measured during training; set 'train.evaluate_every' to "
                            "the steps between measurements")


FEATURES = ("digits", "fashion", "shapes", "inception", "inception-legacy", "inception-256", "inception-512", "dinov2",
            "clip", "lite0")
"""Names of feature extractors, ``dinov2`` and ``clip`` also with a folder or hub id behind a colon; every other text is
a path. They are here so that a command's help has them without torch."""
SCORERS = ("clip", "pickscore", "hpsv2")
"""Names of scorers of images and prompts, each also with weights behind a colon."""
PROTOCOLS = {
    "coco30k-256": (30_000, "inception-256"),
    "coco10k-512": (10_000, "inception-512"),
    "imagenet-adm": (50_000, "inception-legacy"),
}
"""Number of images and features of each protocol that papers share; see :mod:`flowdistill.evaluation.protocols`."""


@dataclass
class EvaluationConfig:
    """What is measured, against what."""

    protocol: str | None = option(None, "measure as papers do, which fixes the features, and num_images where that is "
                                        "not set: coco30k-256, coco10k-512 or imagenet-adm", choices=tuple(PROTOCOLS))
    num_images: int = option(10_000, "images of every measured model", at_least=2)
    features: str | None = option(None, f"feature extractor: {', '.join(FEATURES)} or a path; null: speed is "
                                        "measured only, and what scorers say")
    reference: str | None = option(None, "real images: a name, an image folder or a statistics file (.npz); or "
                                         "teacher: its own samples; null: those of a teacher that takes prompts, else "
                                         "what needs none is measured")
    prompts: str | None = option(None, "text to image: file of prompts to measure with; null: those of the training")
    teacher_steps: list[int] = option([1, 2, 4, 10, 50], "step counts of the teacher's rows; []: none", at_least=1,
                                      at_most=MOST_CALLS)
    solver: str = option("euler", "the teacher's ODE solver: euler; heun, which averages velocities in t; or "
                                  "edm_heun, which averages in sigma, as EDM's own",
                         choices=("euler", "heun", "edm_heun"))
    pipeline_steps: list[int] = option([], "step counts of rows by the pipeline's own scheduler, with the noise that "
                                           "it adds; []: none", at_least=1, at_most=MOST_CALLS)
    batch_size: int = option(250, "images of one forward pass", at_least=1)
    guidance_scale: float | None = option(None, "classifier-free guidance; null: the student's own", at_least=0)
    more_metrics: list[str] = option([], "metrics that are measured only when they are asked for: "
                                         "density_coverage, diversity, frechet_at_infinity, paired_distance")
    scorers: list[str] = option([], "how well images fit their prompts, by networks that were trained on such pairs: "
                                    f"{', '.join(SCORERS)}, each with a folder or hub id behind a colon")
    at_end: bool = option(True, "measure when training ends and write report.json")

    def __post_init__(self) -> None:
        if self.protocol in PROTOCOLS and self.features is None:
            self.features = PROTOCOLS[self.protocol][1]

    def validate(self) -> None:
        """UserError for features that are not those of the protocol."""
        if self.protocol is not None:
            check_protocol_features(self.protocol, self.features)

    @property
    def missing(self) -> str | None:
        """See :func:`what_is_missing`."""
        return what_is_missing(self.features is None, self.reference is None, bool(self.scorers))


def check_protocol_features(protocol: str, features: object) -> None:
    """Refuse features that are not those of a protocol; None stands for the protocol's own.

    Raises:
        UserError: so.
    """
    own = PROTOCOLS[protocol][1]
    if features not in (None, own):
        raise UserError(f"the protocol {protocol} is measured with the features {own!r}, not {shown(features)}; leave "
                        "evaluation.features (--features) out, or the protocol")


def what_is_missing(features: bool, reference: bool, scorers: bool = False) -> str | None:
    """A sentence that says what is not measured without features or without a reference, and what to set.

    Args:
        features, reference: whether they are missing.
        scorers: whether there are any, which need neither.
    """
    if not features and not reference:
        return None
    if not features:
        return ("nothing is compared with real images: set evaluation.reference (--reference) to a folder of them, an "
                ".npz file or a named set")
    both = "evaluation.features (--features)" + " and evaluation.reference (--reference)" * reference
    measured = "speed and what the scorers say" if scorers else "speed"
    return (f"nothing but {measured} is measured: set {both}, such as inception and a folder of real images, or both "
            "to digits for the digits")


@dataclass
class RunConfig:
    """Everything that decides a run; ``config.yaml`` of a run folder holds it resolved."""

    output_dir: str = option(MISSING, "run folder; training resumes when it already holds this run")
    seed: int = option(0, "seed of every random draw", at_least=0, below=SEEDS)
    teacher: TeacherConfig = option(TeacherConfig, "the frozen model")
    method: Any = option(MISSING, "settings of the method that 'method.name' selects: an instance of its Config")
    train: TrainConfig = option(TrainConfig, "the training loop")
    evaluation: EvaluationConfig = option(EvaluationConfig, "FID and its companions")
    started_in: str | None = option(None, "written by distill: the folder that the run's relative paths begin in")

    def validate(self) -> None:
        """UserError for measurements during training without anything to measure with."""
        if self.train.evaluate_every and self.evaluation.missing is not None:
            raise UserError(f"train.evaluate_every is {self.train.evaluate_every}, but {self.evaluation.missing}")
        if self.train.evaluate_every and self.evaluation.reference == "teacher" and (
            self.evaluation.guidance_scale is None
        ):
            raise UserError(f"train.evaluate_every is {self.train.evaluate_every} and evaluation.reference is teacher: "
                            "set evaluation.guidance_scale as well, at which the teacher's samples are drawn")
