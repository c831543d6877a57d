"""Prompts as conditions: encoded once by the pipeline's own text encoders, kept on disk, drawn in training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import cache_folder, in_cache, write_cache
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.randomness import Draw
from flowdistill.utils.shipped import find_path
from flowdistill.utils.text import JsonObject, read_json_lines, read_lines, text_of

ENCODED_AT_ONCE = 16
ENCODING = 2
"""Part of every cached file's name; 1 filled the gaps of incomplete text encoders with random weights."""


class PromptList(NamedTuple):
    """Prompts and how often each is drawn (weights of sum 1)."""

    prompts: list[str]
    weights: list[float]


def read_prompts(path: str | os.PathLike[str]) -> PromptList:
    """A text file with a prompt a line, or ``.jsonl`` with ``{"prompt": ..., "weight": ...}`` (weight 1 if absent).

    UTF-8 with or without a byte-order mark; lines end in LF, CR LF or CR only. Empty lines are left out.

    Raises:
        UserError: no such file, no prompt in it, or a line that is not as it should be.
    """
    file = find_path(path)
    name = f"the prompts file {file}"
    if file.suffix.lower() == ".jsonl":
        form = '{"prompt": "a cat", "weight": 2}, with a weight of at least 0'
        pairs = [pair for _, pair in read_json_lines(file, _record, form, name)]
    else:
        pairs = [(line.strip(), 1.0) for line in read_lines(file, name) if line.strip()]
    total = sum(weight for _, weight in pairs)
    if total <= 0:
        raise UserError(f"the prompts file {file} has no prompt" + (" with a weight above 0" if pairs else ""))
    return PromptList([prompt for prompt, _ in pairs], [weight / total for _, weight in pairs])


def _record(record: JsonObject) -> tuple[str, float]:
    prompt, weight = text_of(record["prompt"]), float(record.get("weight", 1.0))
    if not 0 <= weight < float("inf"):
        raise ValueError(f"{weight} is no weight")
    return prompt, weight


class PromptEncoder(Protocol):
    """What turns prompts into tensors: a backbone's family, see :mod:`flowdistill.networks.backbones.base`."""

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]: ...

    def encode_negative(
        self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]
    ) -> dict[str, Tensor]: ...

    def encode_null(
        self, pipeline: Pipeline, negative: str | None, image_size: tuple[int, int]
    ) -> dict[str, Tensor]: ...


class PromptConditions:
    """How prompts become a :class:`Condition`.

    What is encoded stays on the CPU, also on disk under a hash of text encoders, tokenizers and prompts; text encoders
    are loaded for the encoding and dropped after it.

    Args:
        text: the text encoders.
        family: of the backbone's family.
        image_size: (height, width) in pixels, for networks that are told.
        negative: the negative prompt of guidance; None for what the pipeline takes where none is given.
    """

    def __init__(
        self, text: TextEncoders, family: PromptEncoder, image_size: tuple[int, int], negative: str | None = None
    ) -> None:
        self.text, self.family, self.image_size, self.negative = text, family, image_size, negative
        self.device = torch.device("cpu")  # where text encoders run
        self.prompts: list[str] | None = None
        self.weights: list[float] = []
        self._null: dict[torch.device, Condition] = {}

    def use(self, prompts: PromptList) -> None:
        """Set the list that :meth:`draw` and :meth:`examples` draw from."""
        self.prompts, self.weights = list(prompts.prompts), list(prompts.weights)
        self.__dict__.pop("_bank", None)

    @contextlib.contextmanager
    def using(self, prompts: PromptList) -> Iterator[None]:
        """A block in which the list is another one."""
        before = {name: value for name, value in vars(self).items() if name in ("prompts", "weights", "_bank")}
        self.use(prompts)
        try:
            yield
        finally:
            self.__dict__.pop("_bank", None)
            vars(self).update(before)

    @cached_property
    def _bank(self) -> tuple[Condition, Tensor]:
        cumulative = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
        return self._encoded(self.prompts), cumulative / cumulative[-1]

    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Condition:
        """Prompts (B) as a condition on the CPU, with their own negative prompts where these are given."""
        if isinstance(prompts, str) or not prompts:
            raise UserError("prompts must be a list of at least one text")
        if negatives is not None and (isinstance(negatives, str) or len(negatives) != len(prompts)):
            raise UserError(f"negative_prompts must be a list of {len(prompts)} texts, one a prompt")
        negative = None if negatives is None else self._encoded(negatives, negative=True)
        return Condition(self._encoded(prompts).tensors, negative)

    def null(self, condition: Condition) -> Condition:
        """The other side of guidance, in as many rows as ``condition`` and on its device."""
        device = next(iter(condition.tensors.values())).device
        if device not in self._null:
            self._null[device] = self._encoded(None).to(device)
        return self._null[device].expand(len(condition))

    def draw(self, draw: Draw, rows: int | None = None) -> Condition:
        """Random rows of the list, by weight, on the CPU; see :meth:`Teacher.draw_condition`."""
        if self.prompts is None:
            raise UserError("this teacher takes prompts; set teacher.prompts to a file with one prompt a line")
        bank, cumulative = self._bank
        return bank[draw.choice(cumulative, rows)]

    def examples(self, indices: Sequence[int]) -> Condition:
        """The prompts of the list in turn, on the CPU; the empty or negative prompt where there is no list."""
        if self.prompts is None:
            return self._encoded(None).expand(len(indices))
        return self._bank[0][torch.tensor([i % len(self.prompts) for i in indices])]

    def prepare(self) -> None:
        """Encode the list and the null condition now, so that nothing loads a text encoder later."""
        if self.prompts is not None:
            _ = self._bank
        self.null(self.examples([0]))

    def describe(self) -> str:
        listed = "" if self.prompts is None else f", {len(self.prompts)} in the list"
        return f"{' and '.join(self.text.encoder_classes)}{listed}"

    # --- encoding

    def _encoded(self, prompts: Sequence[str] | None, negative: bool = False) -> Condition:
        """The prompts, or one row for the null condition (None), on the CPU; from disk where they are there."""
        wanted = None if prompts is None else list(prompts)
        # The versions count: a tokenizer's or an encoder's code may change what a text becomes.
        parts = [self.text.fingerprint, self.text.pipeline_class, str(self.text.dtype), self.image_size, self.negative,
                 wanted, negative, diffusers.__version__, transformers.__version__, ENCODING]
        file = cache_folder("prompts") / f"{json_sha256(parts)}.safetensors"
        if in_cache(file):
            with contextlib.suppress(Exception):  # a damaged file is made again
                return Condition(load_file(file))
        made = self._encode(wanted, negative)
        content = save({name: tensor.contiguous() for name, tensor in made.tensors.items()})
        write_cache(file, content, "encoded prompts")
        return made

    @torch.no_grad()
    def _encode(self, prompts: list[str] | None, negative: bool) -> Condition:
        one = self.family.encode_negative if negative else self.family.encode
        with self.text.opened(self.device) as pipeline:
            if prompts is None:
                parts = [self.family.encode_null(pipeline, self.negative, self.image_size)]
            else:
                parts = [
                    one(pipeline, prompts[start : start + ENCODED_AT_ONCE], self.image_size)
                    for start in range(0, len(prompts), ENCODED_AT_ONCE)
                ]
            return Condition.cat([Condition(part).to("cpu") for part in parts])


def encode(
    classes: ClassLabels | None,
    texts: PromptConditions | None,
    labels: Sequence[int] | Tensor | None,
    prompts: Sequence[str] | None,
    negatives: Sequence[str] | None,
    device: torch.device,
) -> Condition | None:
    """What a model takes, labels or prompts, as a condition; UserError for what it does not take."""
    if texts is not None:
        if labels is not None or prompts is None:
            raise UserError("this model needs prompts" + ("" if labels is None else ", and takes no labels"))
        texts.device = device
        return texts.encode(prompts, negatives)
    if prompts is not None or negatives is not None:
        takes = "nothing" if classes is None else f"class labels 0 to {classes.num_classes - 1}"
        raise UserError(f"prompts were given, but this model takes {takes}")
    if classes is None:
        if labels is not None:
            raise UserError("labels were given, but this model takes none")
        return None
    if labels is None:
        raise UserError(f"this model needs labels, 0 to {classes.num_classes - 1}")
    return classes.encode(labels)
