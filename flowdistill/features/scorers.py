"""How well an image fits its prompt, by networks that were trained on such pairs; from a folder, a file or the hub.

    clip, clip:SOURCE              CLIP score (Hessel et al. 2021, arXiv 2104.08718): 100 times the cosine
    pickscore, pickscore:SOURCE    PickScore (Kirstain et al. 2023, arXiv 2305.01569): the cosine at its own logit scale
    hpsv2:SOURCE                   HPSv2 or v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine
    package.module:function        whatever ``function()`` returns: a Scorer

SOURCE is a folder or a hub id of a ``CLIPModel`` of transformers, or a file of open_clip's weights, as HPSv2's are. Its
tokenizer, its image processor and the sizes of a file's network are those beside it, or those of ``SOURCE:PROCESSOR``,
another folder or hub id; PickScore and HPSv2 come without and take those of the CLIP that they were tuned from.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.config import SCORERS, found_again
from flowdistill.config.checks import closest
from flowdistill.features.extractor import AT_ONCE, precise
from flowdistill.features.open_clip_weights import as_transformers
from flowdistill.features.pretrained import check_source, load_pretrained
from flowdistill.utils.errors import UserError, listed, shown
from flowdistill.utils.files import check_pointer, local_path
from flowdistill.utils.hashing import json_sha256, module_sha256
from flowdistill.utils.objects import is_object, load_object
from flowdistill.utils.text import JsonObject, without_marks

SETTING = "evaluation.scorers"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""What PickScore and HPSv2 were tuned from."""
WEIGHTS = {"clip": "openai/clip-vit-large-patch14", "pickscore": "yuvalkirstain/PickScore_v1"}
PROCESSORS = {"pickscore": CLIP_H, "hpsv2": CLIP_H}
LEGACY_END = 2
"""``eos_token_id`` of configurations older than the field's use: the text is read at its highest token."""


@dataclass
class Scorer:
    """A frozen network that says how well images fit their prompts, higher for better.

    Args:
        figure: name of its mean in reports; with ``_std`` behind it, of that mean's standard deviation.
        title: head of its column.
        score: uint8 images (B, 3, H, W) on ``device`` and B prompts -> scores (B,).
        hash: sha256 of the weights; None when there is nothing to hash (then rows are not kept).
        facts: what one needs to know to get the same scores, for the protocol.
        scale, form: what the mean is multiplied by in a table, and how it is written there.
        least: of the mean; None for no limit.
    """

    figure: str
    title: str
    score: Callable[[Tensor, Sequence[str]], Tensor]
    hash: str | None = None
    facts: JsonObject = field(default_factory=dict)
    scale: float = 1.0
    form: str = ".3f"
    least: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def identity(self) -> list[object]:
        """What decides a score: all but where the files are."""
        known = {name: value for name, value in self.facts.items() if name not in ("source", "processor")}
        return [self.figure, self.hash, known]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, float32 (B,) on the CPU, of uint8 images (B, C, H, W), grey or in colour, each with its prompt.

        Raises:
            UserError: images of other channels, or images or prompts that the network does not read.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts for {images.dtype} images {tuple(images.shape)}")
        if images.shape[1] not in (1, 3):
            raise UserError(f"the scorer {self.title} reads images of 1 or 3 channels, not {images.shape[1]}")
        parts = []
        for start in range(0, len(images), AT_ONCE):
            part = images[start : start + AT_ONCE].to(self.device).expand(-1, 3, -1, -1)
            try:
                with precise(self.device):
                    found = self.score(part, list(prompts[start : start + AT_ONCE])).float().cpu()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise UserError(f"the scorer {self.title} cannot score images of shape {tuple(part.shape[1:])}: "
                                f"{reason}") from error
            parts.append(found.reshape(len(part)))
        return torch.cat(parts)


def load_scorers(names: Sequence[str | Scorer], device: torch.device | str | None = None) -> list[Scorer]:
    """Scorers by name, each of another figure; see the module.

    Args:
        device: default: the GPU of this process when there is one, else the CPU.

    Raises:
        UserError: an unknown name, weights or a processor that are missing, damaged or of another network, or two
            scorers of one figure.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, Scorer] = {}
    for name in names:
        scorer = name if isinstance(name, Scorer) else _named(name, place)
        if scorer.figure in found:
            raise UserError(f"'{SETTING}' names two scorers of one figure, {scorer.figure}; measure one of them at a "
                            "time")
        found[scorer.figure] = scorer
    return list(found.values())


def _named(name: str, device: torch.device) -> Scorer:
    kind, _, source = name.partition(":")
    if kind in SCORERS:
        return _clip(kind, source, device)
    if is_object(name):
        made = load_object(name, SETTING)()
        if not isinstance(made, Scorer):
            raise UserError(f"'{SETTING}' names {name}, which makes a {type(made).__name__} and not a "
                            f"{Scorer.__module__}.Scorer")
        return made
    raise UserError(f"'{SETTING}' has {shown(name)}; a scorer is {listed(SCORERS)}, each with a folder or hub id "
                    f"behind a colon, or package.module:function{closest(kind, SCORERS)}")


def _clip(kind: str, source: str, device: torch.device) -> Scorer:
    """The three scorers that are cosines of a CLIP's embeddings."""
    weights, processor_source = _split(source or WEIGHTS.get(kind, ""))
    if not weights:
        raise UserError(f"'{SETTING}' has {kind} without its weights; write {kind}:FILE, the published .pt, or the "
                        "folder of a CLIPModel of transformers")
    beside = processor_source is None and _has_processor(weights)
    where = processor_source or (weights if beside else PROCESSORS.get(kind, weights))
    file = local_path(weights)
    if file.is_file() and where == weights:
        raise UserError(f"the scorer {kind}: {file} is a file of weights only; write {kind}:{weights}:PROCESSOR, with "
                        "the folder or hub id of a CLIPModel of transformers of the same sizes and its processor")
    for source in (where,) if file.is_file() else (weights, where):
        check_source(source, f"the scorer {kind}")
    processor = _processor(where, kind, weights)
    network: Any = (_of_open_clip(file, where, kind) if file.is_file() else
                    load_pretrained(_model(), weights, f"the scorer {kind}"))
    network = network.to(device)
    _check_tokenizer(network, processor.tokenizer, kind, where)
    size = network.config.vision_config.image_size
    look = _as_hpsv2(size) if kind == "hpsv2" else _as_processed(processor.image_processor)
    cosines = Cosines(network, processor.tokenizer, look)
    scale = float(network.logit_scale.exp())
    factor = {"clip": 100.0, "pickscore": scale, "hpsv2": 1.0}[kind]
    figure, title, written, least = {
        "clip": ("clip_score", "CLIP score", 1.0, 0.0), "pickscore": ("pickscore", "PickScore", 1.0, None),
        "hpsv2": ("hpsv2", "HPSv2 x 100", 100.0, None),
    }[kind]
    formula = {"clip": "max(100 x mean cosine, 0)", "pickscore": f"mean of {scale:.6g} x cosine",
               "hpsv2": "mean cosine"}[kind]
    pictures = (f"float, short side to {size}, torchvision's antialiased bicubic, square in the middle"
                if kind == "hpsv2" else type(processor.image_processor).__name__)
    digest = module_sha256(network)
    tokens = network.config.text_config.max_position_embeddings
    facts = {"source": weights, "weights_sha256": digest, "processor": where,
             "reading_sha256": _reading(processor), "score": formula, "images": pictures,
             "text": f"the prompt as it is, at most {tokens} tokens with the last one kept"}
    return Scorer(figure, title, lambda images, prompts: factor * cosines(images, prompts), digest, facts,
                  scale=written, least=least, device=device)


class Cosines:
    """Cosines of the two embeddings of a ``CLIPModel``.

    Args:
        look: uint8 images (B, 3, H, W) -> what the network reads.
    """

    def __init__(self, network: Any, tokenizer: Any, look: Callable[[Tensor], Tensor]) -> None:
        self.network, self.tokenizer, self.look = network, tokenizer, look

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) in [-1, 1], of uint8 images (B, 3, H, W) and B prompts."""
        network, device = self.network, images.device
        # Not get_image_features: what it returns depends on the version of transformers.
        pooled = network.vision_model(pixel_values=self.look(images).to(device)).pooler_output
        ours = F.normalize(network.visual_projection(pooled), dim=-1)
        distinct = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(distinct, padding=True, truncation=True, return_tensors="pt",
                                max_length=network.config.text_config.max_position_embeddings).to(device)
        pooled = network.text_model(input_ids=tokens["input_ids"],
                                    attention_mask=tokens["attention_mask"]).pooler_output
        texts = F.normalize(network.text_projection(pooled), dim=-1)
        places = {prompt: place for place, prompt in enumerate(distinct)}
        return (ours * texts[[places[prompt] for prompt in prompts]]).sum(dim=-1)


def _as_processed(processor: Any) -> Callable[[Tensor], Tensor]:
    """Images as transformers' processor reads them."""
    return lambda images: processor(images=list(images.cpu()), input_data_format="channels_first",
                                    return_tensors="pt")["pixel_values"]


def _as_hpsv2(size: int) -> Callable[[Tensor], Tensor]:
    """Images as HPSv2's own code reads them with a torchvision since 0.17: resized as floats in [0, 1], which neither
    rounds nor clips. Older ones did not average where tensors shrink, so figures made with them differ."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, normalize, resize

    from flowdistill.features.pretrained import CLIP

    def look(images: Tensor) -> Tensor:
        fitted = resize(images.float() / 255, [size], InterpolationMode.BICUBIC, antialias=True)
        return normalize(center_crop(fitted, [size, size]), *map(list, CLIP))

    return look


def _split(source: str) -> tuple[str, str | None]:
    """Weights, and the processor where another one is named behind a colon; neither of an empty text."""
    if not source or local_path(source).exists():
        return source, None
    weights, colon, processor = source.rpartition(":")
    return (weights, processor) if colon and weights else (source, None)


def scorer_found_again(name: str, folder: str | os.PathLike[str]) -> str:
    """A scorer's name in a run's settings with the paths in it as they are reached from here; see ``found_again``."""
    kind, colon, source = name.partition(":")
    if kind not in SCORERS or not colon:
        return name
    whole = found_again(source, folder)
    if whole != source:
        return f"{kind}:{whole}"
    return ":".join([kind, *(found_again(part, folder) for part in _split(source) if part is not None)])


def _has_processor(weights: str) -> bool:
    """Whether a folder has its own processor; a hub id's is not looked for."""
    folder = local_path(weights)
    return any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def _model() -> type:
    from transformers import CLIPModel

    return CLIPModel


def _processor(source: str, kind: str, weights: str) -> Any:
    from transformers import CLIPProcessor

    folder = local_path(source)
    try:
        return CLIPProcessor.from_pretrained(without_marks(folder) if folder.is_dir() else source)
    except Exception as error:  # transformers raises many unrelated types
        raise UserError(f"the scorer {kind}: there is no tokenizer and image processor of CLIP in {source}; name a "
                        f"folder or hub id that has them, as {kind}:{weights}:PROCESSOR "
                        f"({' '.join(str(error).split())[:120]})") from error


def _check_tokenizer(network: Any, tokenizer: Any, kind: str, where: str) -> None:
    """Refuse a tokenizer whose tokens the network does not know, or whose last one it does not look for."""
    config = network.config.text_config
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"the scorer {kind}: the tokenizer in {where} has {len(tokenizer)} tokens, and the network "
                        f"knows {config.vocab_size}; it is another network's")
    if config.eos_token_id not in (LEGACY_END, tokenizer.eos_token_id):
        raise UserError(f"the scorer {kind}: the tokenizer in {where} ends a text with token {tokenizer.eos_token_id}, "
                        f"and the network looks for {config.eos_token_id}; it is another network's")


def _reading(processor: Any) -> str:
    """The hash of how texts and images are read."""
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(processor.tokenizer.get_vocab().items())
    return json_sha256([words, processor.image_processor.to_json_string()])


def _of_open_clip(file: Path, described: str, kind: str) -> Any:
    """A CLIPModel with weights in the names of open_clip, of the sizes that ``described`` says.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    from transformers import CLIPConfig

    check_pointer(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"the scorer {kind}: {file} is damaged or holds no weights") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"the scorer {kind}: {file} holds no weights by name")
    folder = local_path(described)
    try:
        config = CLIPConfig.from_pretrained(without_marks(folder) if folder.is_dir() else described)
    except Exception as error:  # transformers raises many unrelated types
        raise UserError(f"the scorer {kind}: {described} has no config.json of a CLIPModel") from error
    network = _model()(config)
    given, wanted = as_transformers(state), network.state_dict()
    odd = sorted(name for name in {*given, *wanted}
                 if name not in given or name not in wanted or given[name].shape != wanted[name].shape)
    if odd:
        raise UserError(f"the scorer {kind}: the weights in {file} are not those of the network that {described} "
                        f"describes; they differ in {', '.join(odd[:3])}{' and more' if len(odd) > 3 else ''}")
    network.load_state_dict(given)
    return network.float().eval().requires_grad_(False)
