"""What flowdistill uses of a diffusers text-to-image pipeline, whose classes have no common one that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flowdistill.utils.text import JsonObject


class Pipeline(Protocol):
    """The text side of a pipeline.

    Attributes:
        config: the pipeline's own settings.
        encode_prompt: prompts (B) to tensors, or lists of them; how many, and after which arguments, depends on the
            class.
    """

    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    encode_prompt: Callable[..., tuple[Any, ...]]
    __call__: Callable[..., object]

    @property
    def config(self) -> JsonObject: ...


class TwoEncoderPipeline(Pipeline, Protocol):
    """The same of a pipeline with two text encoders."""

    text_encoder_2: PreTrainedModel
