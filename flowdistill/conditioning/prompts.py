"""Prompts as conditions: encoded by the pipeline's own text encoders, kept in memory or on disk, drawn in training."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Protocol

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.conditioning.prompt_bank import DiskBank, Groups, LiveBank, MemoryBank, PromptBank, Tensors
from flowdistill.conditioning.prompt_lists import Numbers, PromptList, Texts, in_parts
from flowdistill.conditioning.prompt_lists import read_prompts as read_prompts
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.conditioning.text_pipeline import Pipeline
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import cache_folder, in_cache, write_cache
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.logging import cut_prompts_said_once
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import Draw
from flowdistill.utils.text import read_json_object
from flowdistill.utils.tf32 import as_torch_has_it

MASK = "attention_mask"
ENCODED_AT_ONCE = 16
ENCODING = 2
"""Part of every cached file's name; 1 filled the gaps of incomplete text encoders with random weights."""
LISTED = ("prompts", "weights", "_bank", "_cumulative")
"""What belongs to a list, of the attributes of PromptConditions."""
MODES = ("auto", "memory", "disk", "live")
SPELT_OUT = 50_000
"""Prompts up to which a list is part of a hash one by one."""
UNKNOWN_ROW = 1 << 20
"""Bytes of an encoded prompt of a family that cannot tell: of other packages."""


class BankSettings(NamedTuple):
    """Where the encoded list is kept, and what encodes it.

    Attributes:
        mode: one of ``MODES``; ``auto``: ``memory`` up to ``memory_gb``, ``disk`` above it.
        memory_gb: 10^9 bytes.
        at_once: prompts that a text encoder reads together, in every mode.
        device: of the text encoders; None: that of the model.
    """

    mode: str = "auto"
    memory_gb: float = 2.0
    at_once: int = ENCODED_AT_ONCE
    device: torch.device | None = None


class PromptEncoder(Protocol):
    """What turns prompts into tensors: a backbone's family, see :mod:`flowdistill.networks.backbones.base`."""

    ragged: bool

    def encode(self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]: ...

    def encode_negative(
        self, pipeline: Pipeline, prompts: list[str], image_size: tuple[int, int]
    ) -> dict[str, Tensor]: ...

    def encode_null(
        self, pipeline: Pipeline, negative: str | None, image_size: tuple[int, int]
    ) -> dict[str, Tensor]: ...


class PromptConditions:
    """How prompts become a :class:`Condition`.

    What is encoded goes to the CPU, and to disk under a hash of text encoders, tokenizers and prompts; the rows of a
    list stay there or are encoded when they are drawn, as ``settings`` say. Text encoders are loaded for the encoding
    and dropped after it, but for those that encode when rows are drawn.

    Args:
        text: the text encoders.
        family: of the backbone's family.
        image_size: (height, width) in pixels, for networks that are told.
        negative: the negative prompt of guidance; None for what the pipeline takes where none is given.
        shapes: of one encoded prompt, by name, the longest where they differ; None where they are not known.
    """

    def __init__(
        self, text: TextEncoders, family: PromptEncoder, image_size: tuple[int, int], negative: str | None = None,
        settings: BankSettings | None = None, shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.text, self.family, self.image_size, self.negative = text, family, image_size, negative
        self.settings, self.shapes = settings or BankSettings(), shapes
        self.device = torch.device("cpu")  # where text encoders run
        self.prompts: Sequence[str] | None = None
        self.weights: Sequence[float] = []
        self._null: dict[torch.device, Condition] = {}
        self._loaded: Pipeline | None = None

    def use(self, prompts: PromptList) -> None:
        """Set the list that :meth:`draw` and :meth:`examples` draw from."""
        self.prompts, self.weights = prompts.prompts, prompts.weights
        for name in ("_bank", "_cumulative"):
            vars(self).pop(name, None)

    def beside(self, prompts: PromptList) -> PromptConditions:
        """The same text encoders and settings with another list."""
        other = copy.copy(self)
        other.use(prompts)
        return other

    def shared(self) -> PromptConditions:
        """The same with its list encoded, which all processes do together: for memory one of them does, and the others
        find what it has written."""
        if self.prompts is not None:
            if self.mode == "memory":
                Processes.current().on_main(self._fill)
            self._fill()
        return self

    def _fill(self) -> None:
        _ = self._bank

    @contextlib.contextmanager
    def using(self, prompts: PromptList) -> Iterator[None]:
        """A block in which the list is another one."""
        before = {name: value for name, value in vars(self).items() if name in LISTED}
        self.use(prompts)
        try:
            yield
        finally:
            for name in LISTED:
                vars(self).pop(name, None)
            vars(self).update(before)

    @cached_property
    def _bank(self) -> PromptBank:
        assert self.prompts is not None
        if self.mode == "memory":
            return MemoryBank(self._encoded(self.prompts))
        if self.mode == "disk":
            bank = self.disk_bank()
            bank.fill(self._encoding(), Processes.current())
            return bank.prepare()
        if self._loaded is None:
            self._opened = self.text.opened(self._encoder_device)  # never closed: what is loaded goes with this object
            self._loaded = self._opened.__enter__()
        lengths = self._longest() if self.family.ragged else {}
        return LiveBank(_texts(self.prompts), self.groups, self._encoder(self._loaded), lengths)

    @cached_property
    def _cumulative(self) -> Tensor:
        values = self.weights.values if isinstance(self.weights, Numbers) else self.weights
        cumulative = torch.as_tensor(values, dtype=torch.float64).cumsum(0)
        return cumulative / cumulative[-1]

    @property
    def groups(self) -> Groups:
        """How the list is cut."""
        return Groups(self.settings.at_once, self.row_bytes or UNKNOWN_ROW, self.family.ragged)

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one encoded prompt, of the longest where they differ; None where that is not known."""
        if self.shapes is None:
            return None
        return sum(math.prod(shape) * (8 if name == MASK else self.text.dtype.itemsize)
                   for name, shape in self.shapes.items())

    @property
    def mode(self) -> str:
        """Where the list's rows come from: ``memory``, ``disk`` or ``live``."""
        if self.settings.mode != "auto":
            return self.settings.mode
        size = len(self.prompts or ()) * (self.row_bytes or 0)
        return "disk" if size > self.settings.memory_gb * 1e9 else "memory"

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
        return self._bank.rows(draw.choice(self._cumulative, rows))

    def examples(self, indices: Sequence[int]) -> Condition:
        """The prompts of the list in turn, on the CPU; the empty or negative prompt where there is no list."""
        if self.prompts is None:
            return self._encoded(None).expand(len(indices))
        return self._bank.rows(torch.tensor([i % len(self.prompts) for i in indices], dtype=torch.int64))

    def prepare(self) -> None:
        """Encode the list and the null condition now, so that nothing loads a text encoder later."""
        if self.prompts is not None:
            _ = self._bank
        self.null(self.examples([0]))

    def describe(self) -> str:
        listed = "" if self.prompts is None else f", {len(self.prompts)} in the list"
        return f"{' and '.join(self.text.encoder_classes)}{listed}"

    def describe_bank(self) -> str:
        """Where the list's rows come from, and why, in words."""
        count = len(self.prompts or ())
        words = f"{count:,} prompt{'' if count == 1 else 's'}"
        if self.row_bytes is not None:
            most = "up to " if self.family.ragged else ""
            words += f" of {most}{in_bytes(self.row_bytes)}, {most}{in_bytes(count * self.row_bytes)} encoded"
        auto = ""
        if self.settings.mode == "auto":
            auto = f" (auto: memory up to {self.settings.memory_gb:g} GB, else disk)"
        return f"{words}; teacher.prompt_cache is {self.mode}{auto}"

    def list_facts(self) -> list[str]:
        """The list for a hash: its prompts, or, of a long one, a hash of theirs."""
        listed = self.prompts or ()
        return list(listed) if len(listed) <= SPELT_OUT else [_texts(listed).digest()]

    # --- encoding

    def _facts(self) -> list[object]:
        """What decides what a text becomes, for hashes, but for the negative prompt."""
        # The versions count: a tokenizer's or an encoder's code may change it.
        facts: list[object] = [self.text.fingerprint, self.text.pipeline_class, str(self.text.dtype), self.image_size]
        facts += [diffusers.__version__, transformers.__version__, ENCODING]
        return facts + ([] if self.settings.at_once == ENCODED_AT_ONCE else [self.settings.at_once])

    def _encoded(self, prompts: Sequence[str] | None, negative: bool = False) -> Condition:
        """The prompts, or one row for the null condition (None), on the CPU; from disk where they are there."""
        wanted = None if prompts is None else list(prompts)
        facts = self._facts()
        file = cache_folder("prompts") / f"{json_sha256([*facts[:4], self.negative, wanted, negative, *facts[4:]])}"
        file = file.with_suffix(".safetensors")
        if in_cache(file):
            with contextlib.suppress(Exception):  # a damaged file is made again
                return Condition(load_file(file))
        made = self._encode(wanted, negative)
        content = save({name: tensor.contiguous() for name, tensor in made.tensors.items()})
        write_cache(file, content, "encoded prompts")
        return made

    def _encode(self, prompts: list[str] | None, negative: bool) -> Condition:
        with self._encoding(negative) as encode:
            if prompts is None:
                return Condition(encode(None))
            return Condition.cat([Condition(encode(prompts[part.start : part.stop]))
                                  for part in in_parts(len(prompts), self.settings.at_once)])

    @contextlib.contextmanager
    def _encoding(self, negative: bool = False) -> Iterator[Callable[[list[str] | None], Tensors]]:
        """What encodes prompts, or the null condition (None), while the text encoders are loaded."""
        with self._pipeline() as pipeline:
            yield self._encoder(pipeline, negative)

    @property
    def _encoder_device(self) -> torch.device:
        return self.settings.device or self.device

    def _pipeline(self) -> contextlib.AbstractContextManager[Pipeline]:
        """The text encoders: those that stay loaded, or for a while."""
        return contextlib.nullcontext(self._loaded) if self._loaded else self.text.opened(self._encoder_device)

    def _encoder(self, pipeline: Pipeline, negative: bool = False) -> Callable[[list[str] | None], Tensors]:
        one = self.family.encode_negative if negative else self.family.encode
        kind = self._encoder_device.type

        @torch.no_grad()
        def encode(prompts: list[str] | None) -> Tensors:
            # Rows may be drawn while a network is in autocast, and are kept for runs with other settings.
            with torch.autocast(kind, enabled=False), as_torch_has_it(), cut_prompts_said_once():
                if prompts is None:
                    made = self.family.encode_null(pipeline, self.negative, self.image_size)
                else:
                    made = one(pipeline, prompts, self.image_size)
                return {name: tensor.to("cpu") for name, tensor in made.items()}

        return encode

    @property
    def folder(self) -> Path:
        """Where the rows of lists are kept in the mode ``disk``."""
        return cache_folder("prompts") / json_sha256(self._facts())

    def disk_bank(self) -> DiskBank:
        """The list's rows on disk, which may not be there yet."""
        assert self.prompts is not None
        return DiskBank(self.folder, _texts(self.prompts), self.groups)

    def _longest(self) -> dict[str, int]:
        """Lengths of the longest row of the list, by name, by its tokens alone; kept on disk."""
        assert self.prompts is not None
        texts = _texts(self.prompts)
        file = self.folder / f"lengths-{texts.digest()[:32]}.json"
        if in_cache(file):
            with contextlib.suppress(UserError, ValueError):
                return {name: int(length) for name, length in read_json_object(file).items()}
        longest: dict[str, int] = {}
        with self._pipeline() as pipeline:
            tokens = _without_encoder(pipeline)
            for part in tqdm(list(in_parts(len(texts), self.settings.at_once)), desc="the longest prompt", leave=False,
                             disable=None):
                with torch.no_grad():
                    made = self.family.encode(tokens, texts[part.start : part.stop], self.image_size)
                for name, values in made.items():
                    if values.ndim > 1:
                        longest[name] = max(longest.get(name, 0), values.shape[1])
        write_cache(file, json.dumps(longest).encode(), "lengths of the prompts")
        return longest


class _NoEncoder(torch.nn.Module):
    """A text encoder whose output has no width."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype

    def forward(self, input_ids: Tensor, **how: object) -> SimpleNamespace:
        states = torch.zeros(*input_ids.shape, 1, device=self.device, dtype=self.dtype)
        return SimpleNamespace(hidden_states=(states, states), last_hidden_state=states)


def _without_encoder(pipeline: Pipeline) -> Pipeline:
    """The pipeline with its own tokenizer, whose text encoder does nothing."""
    bare = copy.copy(pipeline)
    encoder = pipeline.text_encoder
    vars(bare)["text_encoder"] = _NoEncoder(encoder.device, encoder.dtype)
    return bare


def _texts(prompts: Sequence[str]) -> Texts:
    return prompts if isinstance(prompts, Texts) else Texts(prompts)


def in_bytes(count: float) -> str:
    """Bytes in GB, MB or kB of 10^9, 10^6 or 10^3."""
    unit = next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB")) if count >= size), (1e3, "kB"))
    return f"{count / unit[0]:,.3g} {unit[1]}" if count < 1000 * unit[0] else f"{count / unit[0]:,.0f} {unit[1]}"


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
