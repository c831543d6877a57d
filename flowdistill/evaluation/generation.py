"""Seeded generation: image i of a seed is the same for any batch size and any number of processes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowdistill.conditioning import Condition
from flowdistill.data.image_sets import batches_of
from flowdistill.utils.errors import UserError
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import generator_of, indexed_noise, row_digests
from flowdistill.utils.seeds import check_seed

# (noise, labels or condition) -> images in [0, 1]
Sampler = Callable[[Tensor, Tensor | Condition | None], Tensor]


@dataclass(frozen=True)
class Batch:
    """Images with consecutive indices, as generated.

    ``images`` (B, C, H, W) in [0, 1]; ``labels`` int64 (B,) on the CPU, or None; ``seconds`` the sampler took.
    """

    indices: range
    labels: Tensor | None
    images: Tensor
    seconds: float


def sample_generators(indices: Sequence[int], seed: int) -> list[torch.Generator]:
    """One CPU generator a sample, for samplers that draw their own noise (diffusers pipelines).

    torch's CPU generator keeps 32 bits of its seed: an offset and the index never meet within a set, where a hash of
    (seed, index) would give some of 50,000 images the same noise. Seeds of 2^32 and more get all bits of the state.
    """
    if check_seed(seed) >= 2**32:
        return [generator_of(seed, index) for index in indices]
    offset = int.from_bytes(hashlib.sha256(f"flowdistill generators {seed}".encode()).digest()[:4], "little")
    return [torch.Generator().manual_seed((offset + index) & 0xFFFFFFFF) for index in indices]


def generators_of(noise: Tensor) -> list[torch.Generator]:
    """One CPU generator a sample, seeded by the sample's own noise (B, ...): for a sampler that draws more of it.

    So the images stay a function of noise and labels, row by row, whatever the batch.
    """
    return [torch.Generator().manual_seed(digest) for digest in row_digests(noise, 4)]


def balanced_labels(
    indices: Sequence[int], num_classes: int | None, own: Sequence[int] | None = None
) -> Tensor | None:
    """Label ``i % num_classes`` of sample i, int64 (len(indices),); None for a model without classes.

    ``own``: the labels to go through instead, of a model that makes some classes only.
    """
    if num_classes is None:
        return None
    numbers = torch.tensor(list(indices), dtype=torch.int64)
    return numbers % num_classes if own is None else torch.tensor(own)[numbers % len(own)]


def prompt_groups(indices: Sequence[int], prompts: Sequence[str]) -> Tensor:
    """Number of the prompt of each sample of a list that is gone through in turn, int64 (len(indices),); a prompt that
    is listed twice has one number."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    turn = torch.tensor([numbers[prompt] for prompt in prompts])
    return turn[torch.tensor(list(indices), dtype=torch.int64) % len(turn)]


def check_num_images(num_images: int) -> None:
    """Raise UserError unless ``num_images`` is a positive number of images."""
    if num_images < 1:
        raise UserError(f"num_images must be at least 1, not {num_images}")


@torch.no_grad()
def generate(
    sampler: Sampler,
    shape: Sequence[int],
    num_images: int,
    seed: int = 0,
    batch_size: int = 250,
    rank: int | None = None,
    world: int | None = None,
    *,
    num_classes: int | None = None,
    own: Sequence[int] | None = None,
    condition: Callable[[range], Condition | None] | None = None,
    whole_batches: bool = False,
    description: str = "images",
    progress: bool = True,
) -> Iterator[Batch]:
    """Generate this process's share of the images 0..num_images-1, in index order.

    Args:
        sampler: ``sampler(noise, labels)``, a deterministic function of its arguments, row by row: unit normal noise,
            float32 (B, *shape) on the CPU, and labels int64 (B,) on the CPU (None without classes), to images
            (B, C, H, W) in [0, 1] on any device.
        shape: of one sample's noise.
        num_images: of the whole set, over all processes, at least 1.
        seed: 0 to 2^64 - 1; each gives other noise.
        rank, world: which share; default: this process of torch.distributed.
        num_classes, own: see :func:`balanced_labels`.
        condition: what the sampler gets as its second argument for a range of indices, instead of labels.
        whole_batches: share the images out in whole batches: then the batches are the same for any number of processes,
            and so is the last bit of every image.
        progress: a progress bar on rank 0 (of its own share), on a terminal.

    Raises:
        UserError: num_images or batch_size below 1, or a seed out of range.
    """
    check_num_images(num_images)
    check_seed(seed)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    here = Processes.current()
    here = Processes(here.rank if rank is None else rank, here.world if world is None else world)
    span = here.span(num_images, batch_size if whole_batches else 1)
    # None: no bar either where standard error is no terminal, as its redrawing would fill a log file.
    hidden = None if progress and here.is_main else True
    bar = tqdm(total=len(span), desc=description, unit="img", disable=hidden, leave=False)
    with bar:
        for indices in batches_of(span, batch_size):
            labels = balanced_labels(indices, num_classes, own)
            noise = indexed_noise(tuple(shape), seed, indices)
            given = labels if condition is None else condition(indices)
            start = _clock()
            images = sampler(noise, given)
            seconds = _clock() - start
            if images.ndim != 4 or len(images) != len(indices):
                raise ValueError(f"the sampler returned {tuple(images.shape)} for {len(indices)} samples")
            yield Batch(indices, labels, images, seconds)
            bar.update(len(indices))


def _clock() -> float:
    """Seconds, after everything queued on the GPU is done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
