"""Every text-to-image family against its own pipeline, on tiny random pipelines of real diffusers classes."""

import pytest
import torch

from flowdistill.teacher import load_teacher
from tests.families import FAMILIES, NEGATIVE, PROMPTS, pipeline_latents


def noise(teacher, rows=2):
    return torch.randn(rows, *teacher.shape, generator=torch.Generator().manual_seed(1))


def difference(name: str, scale: float, negative: str | None = None, steps: int = 4) -> float:
    """Largest difference of latents between a teacher's Euler steps and its pipeline's own call."""
    family = FAMILIES[name]
    pipeline = family.make()
    teacher = load_teacher(pipeline)
    n = noise(teacher)
    negatives = None if negative is None else [negative] * len(n)
    condition = teacher.encode(prompts=PROMPTS[: len(n)], negative_prompts=negatives)
    ours = teacher.sample(n, condition, steps=steps, guidance_scale=scale)
    theirs = pipeline_latents(pipeline, family, n, steps, scale, negative)
    assert 0.1 < theirs.std() < 20
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_those_of_the_pipeline(name):
    family = FAMILIES[name]
    assert difference(name, 1.0) < 1e-4
    assert difference(name, family.guidance) < 1e-4
    if family.negative:
        assert difference(name, family.guidance, NEGATIVE) < 1e-4
