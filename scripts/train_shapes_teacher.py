"""Train a text-to-image teacher of the shapes world from nothing and save it as a StableDiffusionPipeline folder.

First the autoencoder, on scenes and on objects in random colours and patterns, so that it can also encode what no
caption describes; then UNet and text encoder together on the latents of captioned scenes (v-prediction, Stable
Diffusion's schedule). One caption in ten is empty, for classifier-free guidance.

--minutes ends the command early; the same command then goes on where it stopped, from the state in --work. It may name
another number of steps or rate; flowdistill.json records from which step on which were planned.
"""

from __future__ import annotations

import argparse
import json
import math
import string
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from flowdistill.cli.arguments import seed_number
from flowdistill.data import shapes
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_writable, local_path

MAX_TOKENS = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Further words of a prompt that users may write; each is one token, as those of the captions are.
MORE_WORDS = ("image rendering drawing small large nice good close up cropped bright dark one two my his her object "
              "thing striped toy cat dog left right above below at to for it this that are there")
CAPTION_DROPOUT = 0.1
SHORT_CAPTIONS = 0.15  # share of captions that leave words out
EMA_DECAY = 0.999
KL_WEIGHT = 2e-4


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the captions is one token; others are spelt."""
    words = set(MORE_WORDS.split())
    for phrasing in range(len(shapes.CAPTIONS + shapes.SHORT_CAPTIONS)):
        for label in range(shapes.NUM_CLASSES):
            words.update(shapes.caption(label, phrasing).replace(",", " ").split())
    letters = string.ascii_lowercase + string.digits + string.punctuation
    order = sorted(words, key=lambda word: (-len(word), word))
    merges = word_merges(order)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), BOS, EOS]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    while True:
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=word_merges(order), model_max_length=MAX_TOKENS)
        # A word falls apart when another word's merge of its inner letters comes first: "re" of "red" splits "green".
        split = [word for word in order if len(tokenizer.tokenize(word)) > 1]
        if not split:
            return tokenizer
        order = [*split, *(word for word in order if word not in split)]


def word_merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges that put each word together from its first letter on, in the order of the words."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    return list(merges)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = 64) -> CLIPTextModel:
    """A text encoder of ``width`` numbers a token; that it ends at the tokenizer's last token is in its settings."""
    end = tokenizer.convert_tokens_to_ids(EOS)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS), eos_token_id=end, pad_token_id=end,
    ))


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 24, 32), layers_per_block=1,
        norm_num_groups=8, sample_size=shapes.SIZE, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, cross_attention_dim=64, attention_head_dim=4,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        timestep_spacing="trailing",
    )


def strange_shapes(count: int, seed: int, named_grounds: float = 0.0) -> Tensor:
    """Objects of any two colours in any pattern on any colour (count, 3, SIZE, SIZE), for the autoencoder only.

    The share ``named_grounds`` of them is on the backgrounds that captions name, some of which hardly come up among any
    colours: white is in a corner of those.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randint(len(shapes.SHAPES), (count,), generator=generator)
    pattern = torch.randint(4, (count,), generator=generator)
    colours = [255.0 * torch.rand(count, 3, generator=generator) for _ in range(3)]
    if named_grounds:
        named = torch.rand(count, generator=generator) < named_grounds
        ground = torch.randint(len(shapes.BACKGROUNDS), (count,), generator=generator)
        colours[2] = torch.where(named[:, None], shapes.palette(shapes.BACKGROUNDS)[ground], colours[2])
    return shapes.render(shapes.place(shape, pattern, *colours, seed + 1))


class Training:
    """A resumable loop: modules, their average, one AdamW with a cosine rate, randomness that belongs to the step.

    With ``limit``, in seconds, it also ends when they are over, and the rate falls by the time where that is further.
    """

    def __init__(
        self, name: str, modules: nn.ModuleDict, lr: float, steps: int, args: argparse.Namespace,
        limit: float = math.inf,
    ) -> None:
        self.limit = limit
        self.name, self.modules, self.lr, self.steps, self.seed = name, modules, lr, steps, args.seed
        self.file = args.work / f"{name}.pt"
        self.average = {key: value.detach().clone() for key, value in modules.named_parameters()}
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
        self.step, self.seconds = 0, 0.0
        self.plans = [[0, steps, lr]]  # from which step on: at which step the rate ends, and where it started
        if self.file.is_file():
            state = torch.load(self.file, weights_only=True, map_location=next(modules.parameters()).device)
            modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
            self.plans = state["plans"]
            if self.plans[-1][1:] != [steps, lr]:
                self.plans.append([self.step, steps, lr])

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "average": self.average, "step": self.step, "seconds": self.seconds, "plans": self.plans}
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.file)

    def run(self, loss_of: Callable[[torch.Generator], Tensor], deadline: float) -> bool:
        """Train until ``steps``, ``limit`` or the deadline; whether one of the first two was reached."""
        started = time.monotonic()
        running: Tensor | float = 0.0
        before = self.seconds
        while not self.done and time.monotonic() < deadline:
            generator = torch.Generator().manual_seed(self.seed * 10_000_019 + self.step)
            torch.manual_seed(self.seed * 10_000_019 + self.step)  # the autoencoder draws from the global generator
            progress = max(self.step / self.steps, self.seconds / self.limit)
            rate = self.lr * min(1.0, (self.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(generator)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            # Warmed up, so that the average of a short run does not remember the initial weights.
            keep = min(EMA_DECAY, (1.0 + self.step) / (10.0 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.modules.parameters()), 1.0 - keep)
            running += loss.detach()  # read once in a while: that waits for the device
            self.seconds = before + time.monotonic() - started
            if self.step % 100 == 0:
                print(f"{self.name} {self.step}/{self.steps} loss {running / 100:.5f} {self.seconds:.0f} s", flush=True)
                running = 0.0
            if self.step % 500 == 0:
                self.save()
        self.save()
        return self.done

    @property
    def done(self) -> bool:
        return self.step >= self.steps or self.seconds >= self.limit

    def averaged(self) -> nn.ModuleDict:
        self.modules.load_state_dict({**self.modules.state_dict(), **self.average})
        return self.modules.eval().requires_grad_(False)


def train_autoencoder(args: argparse.Namespace, deadline: float) -> AutoencoderKL | None:
    half = args.images // 2
    images = torch.cat([shapes.make_shapes(half, args.seed)[0], strange_shapes(half, args.seed + 1)]).mul_(2).sub_(1)
    torch.manual_seed(args.seed)
    training = Training("vae", nn.ModuleDict({"vae": build_autoencoder()}), 2e-3, args.vae_steps, args)
    vae = training.modules["vae"]

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = images[torch.randint(len(images), (args.vae_batch_size,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        # The absolute error keeps edges sharp, where the squared one alone would blur them.
        return error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * posterior.kl().mean() / 256

    if not training.run(loss_of, deadline):
        return None
    vae = training.averaged()["vae"]
    latents = encode(vae, images[:2000])
    vae.register_to_config(scaling_factor=1.0 / latents.std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean latents (N, 4, 8, 8) of images (N, 3, SIZE, SIZE) in [-1, 1], not scaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(250)])


def train_denoiser(args: argparse.Namespace, vae: AutoencoderKL, deadline: float) -> nn.ModuleDict | None:
    pictures, classes = shapes.make_shapes(args.images, args.seed)
    latents = vae.config.scaling_factor * encode(vae, 2.0 * pictures - 1.0)
    del pictures
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    full, every = len(shapes.CAPTIONS), len(shapes.CAPTIONS + shapes.SHORT_CAPTIONS)
    captions = [shapes.caption(label, p) for label in range(shapes.NUM_CLASSES) for p in range(every)]
    tokens = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    torch.manual_seed(args.seed)
    parts = {"unet": build_unet(), "text": build_text_encoder(tokenizer)}
    training = Training("denoiser", nn.ModuleDict(parts), args.lr, args.steps, args)
    unet, text = training.modules["unet"], training.modules["text"]

    def loss_of(generator: torch.Generator) -> Tensor:
        count = args.batch_size
        rows = torch.randint(len(latents), (count,), generator=generator)
        short = torch.rand(count, generator=generator) < SHORT_CAPTIONS
        phrasing = torch.where(short, torch.randint(full, every, (count,), generator=generator),
                               torch.randint(full, (count,), generator=generator))
        dropped = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        caption = torch.where(dropped, len(captions), classes[rows] * every + phrasing)
        # Stratified times: one from each of ``count`` equal parts.
        times = ((torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000).long().clamp(max=999)
        noise = torch.randn(count, *latents.shape[1:], generator=generator)
        data = latents[rows]
        output = unet(scheduler.add_noise(data, noise, times), times, text(tokens[caption])[0]).sample
        return F.mse_loss(output, scheduler.get_velocity(data, noise, times))

    return training.averaged() if training.run(loss_of, deadline) else None


def save(args: argparse.Namespace, vae: AutoencoderKL, parts: nn.ModuleDict) -> None:
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=parts["text"], tokenizer=build_tokenizer(), unet=parts["unet"],
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    # Stored in half precision, except for the text encoder: its own type is the one of the embeddings in a pipeline.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(args.out)
    command = (
        f"python scripts/train_shapes_teacher.py --out {args.out.as_posix()} --images {args.images} "
        f"--vae-steps {args.vae_steps} --vae-batch-size {args.vae_batch_size} --steps {args.steps} "
        f"--batch-size {args.batch_size} --lr {args.lr} --seed {args.seed} --threads {args.threads}"
    )
    states = {name: torch.load(args.work / f"{name}.pt", weights_only=True) for name in ("vae", "denoiser")}
    record = {
        "data": "shapes",
        "parameters": {name: sum(p.numel() for p in getattr(pipeline, name).parameters())
                       for name in ("unet", "vae", "text_encoder")},
        "command": command,
        "planned_steps": {name: state["plans"] for name, state in states.items()},
        "training_seconds": {name: round(state["seconds"]) for name, state in states.items()},
        "torch": torch.__version__,
    }
    (args.out / "flowdistill.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    out, work = Path("assets/shapes/teacher"), Path("runs/shapes-teacher")
    parser.add_argument("--out", type=local_path, default=out, help="pipeline folder to write")
    parser.add_argument("--work", type=local_path, default=work, help="folder of its state, to go on")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--vae-batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=seed_number(2**32), default=0)
    parser.add_argument("--threads", type=int, default=2, help="fixed, because sums depend on it in the last bit")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the same command goes on")
    args = parser.parse_args()
    try:
        for file in (args.work / "vae.pt", args.out / "model_index.json"):
            check_writable(file)
    except UserError as error:
        parser.error(str(error))
    deadline = time.monotonic() + 60.0 * args.minutes
    torch.set_num_threads(args.threads)
    vae = train_autoencoder(args, deadline)
    parts = None if vae is None else train_denoiser(args, vae, deadline)
    if vae is None or parts is None:
        print("stopped; the same command goes on")
        return
    save(args, vae, parts)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
