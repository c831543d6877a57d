#!/usr/bin/env python
"""How well identity networks tell the concepts of the shapes world from ordinary pictures: d' as in the echo stage.

    python scripts/measure_identity.py
    python scripts/measure_identity.py --write-docs docs/experiments/echodistill.md

A column a way to compare: the whole picture or its patches, without masks and with those of the drawing code. Nothing
trains; a concept's ordinary pictures are the untrained student's of its plain word.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowdistill.config import load_config
from flowdistill.data import shapes
from flowdistill.data.shapes_concepts import CONCEPTS, CONTEXTS, place_concept, references
from flowdistill.features.shapes_identity import load_shapes_identity
from flowdistill.features.vision import Vision, load_vision
from flowdistill.methods.echodistill.judge import Judge
from flowdistill.students import generated
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import local_path
from flowdistill.utils.randomness import indexed_noise

CONFIG = "configs/shapes/echodistill.yaml"
EACH = 4  # ordinary pictures of a prompt, as in a run
WAYS = {"whole picture": (False, False), "with masks": (False, True), "patches": (True, False),
        "patches with masks": (True, True)}


class IdentityMap(nn.Module):
    """The identity network's last map (B, D, 4, 4), before the linear layer that was trained to compare."""

    def __init__(self) -> None:
        super().__init__()
        layers = load_shapes_identity().trunk
        self.layers = nn.Sequential(*(layer for layer in layers if not isinstance(layer, (nn.Flatten, nn.Linear))))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(2 * images - 1)


NETWORKS = {
    "`small`, random weights": "small",
    "classifier": "flowdistill.features.shapes_networks:load_shapes_classifier",
    "identity network": "flowdistill.features.shapes_identity:load_shapes_identity",
    "its last map": f"{__name__}:IdentityMap",
}


def drawn(concept: str) -> tuple[Tensor, Tensor]:
    """The references (N, 3, H, W) and where they show the object (N, 1, H, W)."""
    images, backgrounds = references(concept)
    scenes = place_concept(concept, backgrounds, list(CONCEPTS).index(concept))  # the references' own
    return images, shapes.coverage(scenes)[0]


def separations(
    teacher: Teacher, network: Vision, images: Tensor, masks: Tensor, ordinary: Tensor, prompts: Sequence[str]
) -> dict[str, float | None]:
    """d' by each of ``WAYS``; None where the network has no places."""
    found: dict[str, float | None] = {}
    for way, (patches, masked) in WAYS.items():
        if patches and network.num_places == 1:
            found[way] = None
        else:
            judge = Judge(teacher, network, images, ordinary, prompts, masks if masked else None, patches)
            found[way] = judge.separation.d_prime
    return found


def table(rows: Mapping[tuple[str, str], Mapping[str, float | None]]) -> str:
    """Markdown of (network, concept) -> d' by way."""
    text = [f"| identity network | concept | {' | '.join(WAYS)} |", "|" + "---|" * (2 + len(WAYS))]
    for (network, concept), found in rows.items():
        cells = ("-" if found[way] is None else f"{found[way]:.2f}" for way in WAYS)
        text.append(f"| {network} | {concept} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


@torch.no_grad()
def measured() -> dict[tuple[str, str], dict[str, float | None]]:
    config, rows = load_config(CONFIG), {}
    teacher, student = load_teacher(config.teacher, prompts=None), load_teacher(config.method.student)
    networks = {title: load_vision(name, "NETWORKS") for title, name in NETWORKS.items()}
    for concept, about in CONCEPTS.items():
        prompts = [f"a {about.word}", *(CONTEXTS[0].format(about.word, ground) for ground in shapes.BACKGROUNDS)]
        texts = prompts * EACH
        noise = indexed_noise(teacher.shape, 0, range(len(texts)))
        made = generated(student.network, noise, student.t_max, student.encode(prompts=texts))
        for title, network in networks.items():
            rows[title, concept] = separations(teacher, network, *drawn(concept), teacher.decode(made), prompts)
    return {key: rows[key] for key in sorted(rows, key=lambda key: list(NETWORKS).index(key[0]))}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write-docs", type=local_path, metavar="PAGE", help="put the table between its markers")
    args = parser.parse_args(arguments)
    from experiment_results import write_docs

    try:
        text = table(measured())
        print(text, end="")
        if args.write_docs:
            write_docs(args.write_docs, "echodistill_features", text)
    except UserError as error:
        print(f"measure_identity: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
