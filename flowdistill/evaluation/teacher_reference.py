"""A teacher's own samples as the reference: what distillation lost, with no data and with whatever the teacher draws.

Distances to real images mix two things, how far the teacher is from them and how far the student is from its teacher;
these are of the second only. The samples have other noise than those that are measured, so that the teacher's own row
at the same number of steps is the floor: what two sets of samples of one model are apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.evaluation.collect import collect, kept_rows
from flowdistill.evaluation.generation import Sampler, balanced_labels, generate, prompt_groups
from flowdistill.evaluation.kept_rows import KnownSampler
from flowdistill.evaluation.reference import VERSION, Reference, _write_cache, read_npz
from flowdistill.features.extractor import FeatureExtractor
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import cache_folder, in_cache, local_path
from flowdistill.utils.hashing import json_sha256
from flowdistill.utils.images import to_uint8
from flowdistill.utils.logging import on_terminal, say
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import mixed_seed

TEACHER = "teacher"
"""Name of the reference; a folder of this name is ``./teacher``."""
STEPS = 50
"""Steps of the samples where a run asks for no rows of its teacher."""
SEED = mixed_seed("a teacher's samples as a reference")


def teacher_reference(
    teacher: Teacher,
    sampler: Sampler,
    how: str,
    extractor: FeatureExtractor,
    num_images: int,
    batch_size: int,
    condition: Callable[[range], Condition | None] | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    seed: int | None = None,
    own: Sequence[int] | None = None,
) -> Reference:
    """Statistics of ``num_images`` of a teacher's samples. All processes must call it together.

    They are cached by what decides them, where ``sampler`` has an identity and the features have a hash.

    Args:
        sampler: draws them; ``how``: in words.
        condition: the teacher's prompts, as ``generate`` takes them; without any, its class labels in turn.
        seed: of the noise, that of images which are compared one by one with these; None: of noise that no others have.
        own: the labels to go through, see ``generate``.

    Raises:
        UserError: fewer than two images, or the teacher's samples are not finite.
    """
    if num_images < 2:
        raise UserError(f"the reference 'teacher' needs at least 2 images, and num_images is {num_images}")
    processes, source = Processes.current(), None
    prompts = getattr(condition, "prompts", None)
    if isinstance(sampler, KnownSampler) and extractor.hash is not None:
        facts: list[object] = [VERSION, sampler.identity(), num_images, SEED if seed is None else seed,
                               list(teacher.shape), teacher.num_classes]
        facts += [] if seed is None else ["paired", prompts, own]
        source = json_sha256(facts)
    name = f"teacher, {how}, {num_images:,} samples of {'other' if seed is None else 'the same'} noise"
    path = None
    if source is not None:
        key = json_sha256([source, extractor.hash, extractor.resize, extractor.channels])[:24]
        path = local_path(cache_dir or cache_folder("statistics")) / f"teacher-{key}.npz"
    kept = processes.on_main(lambda: _kept(path))
    if kept is not None:
        return replace(kept, name=name, groups=_groups(kept, num_images, extractor, prompts))
    if progress and processes.is_main and not on_terminal():
        say(f"drawing the reference: {name}")
    made = generate(sampler, tuple(teacher.shape), num_images, SEED if seed is None else seed, batch_size,
                    num_classes=teacher.num_classes, own=own, condition=condition, whole_batches=True,
                    description="the teacher as reference", progress=progress)

    def pixels(images: Tensor) -> Tensor:
        if not images.isfinite().all():
            raise UserError("the teacher's samples are not finite, so they are no reference")
        return to_uint8(images)

    collected = collect(((batch.indices, pixels(batch.images), None) for batch in made), extractor, num_images,
                        processes)
    labels = balanced_labels(range(num_images), teacher.num_classes, own)
    spatial = collected.spatial
    found = Reference(
        name=name,
        mean=collected.moments.mean,
        covariance=collected.moments.covariance,
        count=num_images,
        features=collected.features,
        labels=None if labels is None else labels[collected.indices],
        source_hash=source,
        feature_hash=extractor.hash,
        spatial_mean=None if spatial is None else spatial.mean,
        spatial_covariance=None if spatial is None else spatial.covariance,
    )
    if path is not None and processes.is_main:
        _write_cache(found, path)
    return replace(found, groups=_groups(found, num_images, extractor, prompts))


def _groups(
    found: Reference, num_images: int, extractor: FeatureExtractor, prompts: Sequence[str] | None
) -> Tensor | None:
    """The prompts of the samples whose features were kept."""
    if not prompts or found.features is None:
        return None
    rows = kept_rows(num_images, found.features.shape[1], extractor.keeps)
    return prompt_groups(rows.tolist(), prompts)


def _kept(path: Path | None) -> Reference | None:
    if path is None or not in_cache(path):
        return None
    try:
        return read_npz(path)
    except UserError:  # damaged: it is made again
        return None
