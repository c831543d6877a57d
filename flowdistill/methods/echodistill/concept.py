"""What EchoDistill draws its batches from: the concept's pictures and prompts, and the prompts that must stay."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.methods.echodistill.concept_images import augmented, load_concept_images, load_concept_masks
from flowdistill.methods.echodistill.echo import Pool
from flowdistill.methods.echodistill.settings import EchoDistillConfig
from flowdistill.methods.echodistill.token import TokenEncoder
from flowdistill.students.generator import generated
from flowdistill.teachers import Teacher
from flowdistill.utils.devices import sent
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw


class Concept:
    """The pictures, and every prompt with the new word under a number.

    Attributes:
        images: (N, 3, *size) in [0, 1].
        masks: (N, 1, *size) in [0, 1], where they show the object; None without masks.
        prompts: all of them, each once.
        echo: numbers of those of the echo stage.

    Raises:
        UserError: see ``load_concept_images`` and ``load_concept_masks``; a prompt without the new word.
    """

    def __init__(self, config: EchoDistillConfig, word: TokenEncoder, size: tuple[int, int]) -> None:
        self.config = config
        word.check(config.instance_prompt, "method.instance_prompt")
        self.images, captions = load_concept_images(config.instance_data_dir, size, config.instance_prompt)
        self.masks = load_concept_masks(config.instance_data_dir, size)
        trained = [*captions, *config.student_prompts]
        echoed = list(dict.fromkeys(config.echo.prompts or trained))
        for texts, what in (
            (captions, f"a caption in {config.instance_data_dir}"),
            (config.student_prompts, "one of method.student_prompts"),
            (config.echo.prompts, "one of method.echo.prompts"),
        ):
            for text in texts:
                word.check(text, what)
        self.prompts = list(dict.fromkeys([*trained, *echoed]))
        number = {text: i for i, text in enumerate(self.prompts)}
        self.captions, self._trained, self.echo = (
            torch.tensor([number[text] for text in texts]) for texts in (captions, trained, echoed)
        )
        self.ids = word.ids(self.prompts)

    def to(self, device: torch.device | str) -> None:
        for name in ("images", "captions", "_trained", "echo", "ids"):
            setattr(self, name, getattr(self, name).to(device))
        self.masks = None if self.masks is None else self.masks.to(device)

    def draw_prompts(self, draw: Draw, pool: Pool | None) -> tuple[Tensor, Tensor]:
        """Ids (B, L) of what the student is trained on, captions and ``student_prompts`` evenly, and which of them (B,)
        have pictures. A discriminator's pictures say nothing about the other prompts."""
        numbers = self._trained[draw.integers(len(self._trained))]
        pictured = torch.isin(numbers, self.captions)
        if pool is not None:
            pictured |= torch.isin(numbers, sent(pool.prompts, numbers.device))
        return self.ids[numbers], pictured

    def draw(self, draw: Draw, pool: Pool | None) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) and ids (B, L); with a pool some are the student's own."""
        index = draw.integers(len(self.images))
        images = augmented(self.images[index], draw, self.config.random_flip, self.config.zoom)
        numbers = self.captions[index]
        if pool is not None:
            echoed = draw.uniform() >= self.config.echo.real_fraction
            chosen = draw.integers(len(pool.images), on_cpu=True)
            own, own_numbers = (draw.placed(values[chosen]) for values in pool)
            images = torch.where(echoed[:, None, None, None], own, images)
            numbers = torch.where(echoed, own_numbers, numbers)
        return images, self.ids[numbers]


class KeptPrompts:
    """The prompts that must go on working, and what the student made of them before.

    Raises:
        UserError: no such prompts, or one with the new word.
    """

    def __init__(self, teacher: Teacher, source: Teacher, start: float, word: TokenEncoder) -> None:
        texts = teacher.prompts
        if texts is None or texts.prompts is None:
            raise UserError("echodistill needs teacher.prompts, a file with the prompts that must go on working")
        if any(word.token in text for text in texts.prompts):
            raise UserError(f"teacher.prompts has the new word '{word.token}' in it; it lists the prompts that must go "
                            "on working without it")
        self.teacher, self.source, self.start = teacher, source, start
        self.ids = word.ids(texts.prompts)
        condition = teacher.examples(range(len(texts.prompts)))
        assert condition is not None
        self.condition = condition
        cumulative = torch.tensor(texts.weights, dtype=torch.float64).cumsum(0)
        self._cumulative = cumulative / cumulative[-1]

    def to(self, device: torch.device | str) -> None:
        self.ids, self.condition = self.ids.to(device), self.condition.to(device)

    @torch.no_grad()
    def draw(self, draw: Draw) -> tuple[Tensor, Tensor, Condition, Tensor]:
        """Latents of the untrained student, the noise they are made of, their condition and its ids."""
        rows = draw.placed(draw.choice(self._cumulative))
        condition, noise = self.condition[rows], draw.normal(self.teacher.shape)
        return generated(self.source.network, noise, self.start, condition), noise, condition, self.ids[rows]
