"""One new word for a frozen text encoder (textual inversion), the only thing in it that trains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompt_bank import MemoryBank
from flowdistill.conditioning.prompts import ENCODED_AT_ONCE, PromptConditions
from flowdistill.utils.errors import UserError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class WordEmbedding(nn.Module):
    """A frozen embedding table with one more row, which is a parameter of its own: row = initial + step * offset.

    No optimiser ever sees the table, so no other row can move, not even by weight decay. An Adam update of ``offset``
    moves the row ``step`` times as far, which gives the word its own learning rate.
    """

    initial: Tensor

    def __init__(self, table: nn.Embedding, token: int, initializer: int, step: float = 1.0) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.token, self.step = token, step
        self.register_buffer("initial", table.weight[initializer].detach().float().clone(), persistent=False)
        self.offset = nn.Parameter(torch.zeros_like(self.initial))

    @property
    def row(self) -> Tensor:
        """The word's embedding (D,), float32."""
        return self.initial + self.step * self.offset

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        return torch.where((ids == self.token)[..., None], self.row.to(rows.dtype), rows)


class TokenEncoder(nn.Module):
    """A copy of a Stable Diffusion text encoder and its tokenizer that know ``token``.

    ``forward(ids (B, L))`` gives the prompt embeddings (B, L, D) as the pipeline's ``encode_prompt`` does; gradients
    reach the new row only.

    Args:
        token: the new word.
        initializer: a word that the tokenizer has as one token; the new row starts equal to its row.
        step: see :class:`WordEmbedding`.

    Raises:
        UserError: a token that exists, an initializer of several tokens, or one that the tokenizer does not know.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, token: str, initializer: str,
        step: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokenizer, self.token, self.initializer = copy.deepcopy(tokenizer), token, initializer
        start = _initializer_id(self.tokenizer, initializer)
        self.token_id = _add_token(self.tokenizer, token)
        self.encoder = copy.deepcopy(text_encoder).requires_grad_(False).eval()
        self.words = WordEmbedding(self.encoder.get_input_embeddings(), self.token_id, start, step)
        self.encoder.set_input_embeddings(self.words)

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Prompts (B) as padded token ids (B, L), on the CPU."""
        length = self.tokenizer.model_max_length
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids)[0]

    def replaced(self, prompt: str) -> str:
        """The prompt with the initializer in the place of the token."""
        return prompt.replace(self.token, self.initializer)

    def check(self, prompt: str, what: str) -> None:
        """UserError unless ``prompt``, named ``what``, has the token within the length that the encoder reads."""
        if self.token not in prompt:
            raise UserError(f"{what} is {shown(prompt)}, which does not have the word '{self.token}' "
                            "(method.placeholder_token) in it")
        if not (self.ids([prompt]) == self.token_id).any():
            raise UserError(f"{what} is {shown(prompt)}, in which '{self.token}' lies beyond the "
                            f"{self.tokenizer.model_max_length} tokens that the text encoder reads, or is glued to "
                            "another word")


class TokenPrompts(PromptConditions):
    """Prompts encoded by a :class:`TokenEncoder` as it stands now: nothing is kept, for its word still changes."""

    def __init__(self, encoder: TokenEncoder, like: PromptConditions) -> None:
        super().__init__(like.text, like.family, like.image_size, like.negative)
        self.encoder = encoder

    @property
    def _bank(self) -> MemoryBank:
        return MemoryBank(self._encoded(self.prompts))

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str] | None, negative: bool = False) -> Condition:
        ids = self.encoder.ids([self.negative or ""] if prompts is None else prompts)
        device = self.encoder.words.offset.device
        parts = [self.encoder(part.to(device)).cpu() for part in ids.split(ENCODED_AT_ONCE)]
        return Condition({"prompt_embeds": torch.cat(parts)})


def _initializer_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) or "nothing"
        raise UserError(f"method.initializer_token is {shown(word)}, which the tokenizer reads as {len(ids)} tokens "
                        f"({pieces}); give one common word that is one token")
    if ids[0] == tokenizer.unk_token_id:
        raise UserError(f"method.initializer_token is {shown(word)}, which the tokenizer does not know; give a word "
                        "it has")
    return ids[0]


def _add_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    if word != word.strip() or not word or " " in word:
        raise UserError(f"method.placeholder_token is {shown(word)}; it must be one word without spaces, such as "
                        "<new1>")
    known = tokenizer.encode(word, add_special_tokens=False)
    single = len(known) == 1 and known[0] != tokenizer.unk_token_id
    if word in tokenizer.get_vocab() or single:
        raise UserError(f"method.placeholder_token is {shown(word)}, which the tokenizer has already; choose a word "
                        "that does not exist, such as <new1>")
    tokenizer.add_tokens(word)
    number = tokenizer.convert_tokens_to_ids(word)
    assert isinstance(number, int)  # of one word, not of a list
    return number
