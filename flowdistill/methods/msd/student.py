"""K students as one: every condition goes to the student that owns it (MSD, arXiv 2410.23274).

On disk they are a manifest, ``flowdistill.json`` with the partition and the checksums of every student's files, and one
student folder each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompts import PromptList
from flowdistill.export import export
from flowdistill.export.card_data import CARD, GRID, HERE, write_card
from flowdistill.export.cards import origin
from flowdistill.methods.msd.partition import ClassTable, Partition
from flowdistill.networks.storage import SIDECAR
from flowdistill.students import load_student
from flowdistill.students.student import Student
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import atomic_write, check_place, local_path
from flowdistill.utils.hashing import checksums
from flowdistill.utils.randomness import indexed_noise
from flowdistill.utils.seeds import check_seed
from flowdistill.utils.text import JsonObject, read_text

KIND = "routed"
FORMAT = 1
ABOUT = (CARD, GRID)
"""What lies in a student's folder and is no part of it."""


class RoutedStudent(Student):
    """Used as one student is; a batch is split by student and put together again in its order.

    Args:
        students: of one method and one teacher, in the order of the parts.
        partition: whose conditions go where.
        resident: how many of the networks may be on the device at a time, the last used ones; the others wait on the
            CPU. None: all.

    Raises:
        UserError: fewer students than parts, or ``resident`` below 1.
    """

    kind = KIND

    def __init__(self, students: Sequence[Student], partition: Partition, resident: int | None = None) -> None:
        if len(students) != partition.count:
            raise UserError(f"there are {len(students)} students for {partition.count} parts")
        if resident is not None and resident < 1:
            raise UserError(f"resident is {resident}; at least 1 student must be on the device")
        first = students[0]
        classes, prompts = first.classes, first.prompts
        if classes is not None:
            classes = replace(classes, own=None)
        if prompts is not None and partition.prompts is not None and partition.weights is not None:
            prompts.use(PromptList(partition.prompts, partition.weights))
        networks = nn.ModuleList([student.network for student in students])
        super().__init__(networks, first.shape, first.t_start, first.codec, classes, first.info, first.scheduler,
                         prompts)
        for student in students:
            student.codec = first.codec  # once in memory
        self.students, self.partition, self.resident = list(students), partition, resident
        self._device = first.device
        self.on_device = [] if resident is not None else list(range(len(students)))  # last used at the end

    @property
    def device(self) -> torch.device:
        return self._device

    def to(self, device: torch.device | str) -> RoutedStudent:  # type: ignore[override]
        self._device = torch.device(device)
        self.codec.to(self._device)
        if self.resident is None:
            self.network.to(self._device)
        else:
            self.network.to("cpu")
            self.on_device = []
        return self

    def scalars(self, guidance_scale: Tensor | float | None = None) -> dict[str, Tensor | float]:
        return self.students[0].scalars(guidance_scale)

    def student(self, part: int) -> Student:
        """The student of a part, its network on the device."""
        if self.resident is not None:
            if part in self.on_device:
                self.on_device.remove(part)
            elif len(self.on_device) == self.resident:
                self.students[self.on_device.pop(0)].network.to("cpu")
            self.students[part].network.to(self._device)
            self.on_device.append(part)
        return self.students[part]

    def route(self, condition: Condition) -> Tensor:
        """Part of each row of ``condition``, int64 (B,), on the CPU."""
        return self.partition.router.route(condition)

    @staticmethod
    def _needed(condition: Condition | None) -> Condition:
        if condition is None:
            raise UserError("these students need conditions: each makes its own ones only")
        return condition

    def forward(
        self, noise: Tensor, condition: Condition | None = None, guidance_scale: Tensor | float | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Call each student's own ``forward``, differentiable; its network calls a row, a batch a student."""
        self.checked_steps(steps)
        condition = self._needed(condition)
        route = self.route(condition)
        parts = route.unique().tolist()
        if len(parts) == 1:
            return self._made(parts[0], noise, condition, guidance_scale, steps)
        made, order = [], []
        for part in parts:
            rows = (route == part).nonzero().flatten()
            here = rows.to(noise.device)
            each = isinstance(guidance_scale, Tensor) and guidance_scale.ndim > 0
            scale = guidance_scale[here] if each else guidance_scale  # type: ignore[index]
            made.append(self._made(part, noise[here], condition[here], scale, steps))
            order.append(here)
        return torch.cat(made)[torch.cat(order).argsort()]

    def _made(
        self, part: int, noise: Tensor, condition: Condition, scale: Tensor | float | None, steps: int | None
    ) -> Tensor:
        student = self.student(part)
        several = {} if self.num_steps == 1 else {"steps": steps}
        return student(noise, condition, scale, **several)

    @torch.no_grad()
    def generate(
        self,
        labels: Sequence[int] | None = None,
        num_images: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        guidance_scale: float | None = None,
        prompts: Sequence[str] | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Generate as :meth:`Student.generate` does, one student after the other, each placed once."""
        check_seed(seed)
        count, conditions = self.plan(labels, num_images, batch_size, prompts)
        spans = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        route = torch.cat([self.route(self._needed(conditions(span))) for span in spans])
        images: Tensor | None = None
        for part in route.unique().tolist():
            sample = self.student(part).sampler(guidance_scale, steps)
            for rows in (route == part).nonzero().flatten().split(batch_size):
                noise = indexed_noise(self.shape, seed, rows.tolist()).to(self.device)
                made = self.decode(sample(noise, conditions(rows.tolist()))).cpu()
                images = made.new_empty(count, *made.shape[1:]) if images is None else images
                images[rows] = made
        assert images is not None
        return images

    @property
    def num_steps(self) -> int:
        return self.students[0].num_steps

    @property
    def step_counts(self) -> Sequence[int]:
        return self.students[0].step_counts

    def calls_in_words(self) -> str:
        return self.students[0].calls_in_words()

    @property
    def networks(self) -> Sequence[nn.Module]:
        return [student.network for student in self.students]

    @property
    def class_owner(self) -> Sequence[int] | None:
        router = self.partition.router
        return router.owner if isinstance(router, ClassTable) else None

    @classmethod
    def load(cls, folder: Path, description: JsonObject, resident: int | None = None) -> RoutedStudent:
        students, partition = _load_students(folder, description)
        return cls(students, partition, resident)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a student folder each, and then the manifest."""
        folder = local_path(folder)
        for part, student in enumerate(self.students):
            student.save(folder / f"student-{part}")
        write_manifest(folder, self.partition, [f"student-{part}" for part in range(len(self.students))])


# --- on disk


def write_manifest(folder: Path, partition: Partition, students: Sequence[str]) -> None:
    """Write ``flowdistill.json`` for ``students``, folders relative to ``folder``; complete or not at all."""
    content = {
        "format": FORMAT,
        "kind": KIND,
        "partition": partition.to_dict(),
        "students": [{"folder": name, "sha256": _checksums(folder / name)} for name in students],
    }
    with atomic_write(folder / SIDECAR) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _checksums(folder: Path) -> dict[str, str]:
    """Of a student's files, without those that are about it: a card may be written anew."""
    return {name: value for name, value in checksums(folder).items() if name not in ABOUT}


def _load_students(folder: Path, manifest: JsonObject) -> tuple[list[Student], Partition]:
    """The students of a manifest, and whose conditions are whose.

    Raises:
        UserError: a newer format, a damaged manifest, or a student that is missing or is not as it was written.
    """
    if manifest["format"] > FORMAT:
        raise UserError(f"{folder / SIDECAR} has the format {manifest['format']}; this version loads up to {FORMAT}")
    try:
        partition = Partition.from_dict(manifest["partition"])
        listed = [(folder / entry["folder"], dict(entry["sha256"])) for entry in manifest["students"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / SIDECAR} is damaged: {error!r}") from error
    for number, (path, expected) in enumerate(listed):
        if not path.is_dir():
            raise UserError(f"student {number} of {folder} is missing: there is no folder {path}")
        found = _checksums(path)
        expected = {name: value for name, value in expected.items() if name not in ABOUT}
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if odd:
            what = "is missing" if odd[0] not in found else "was added" if odd[0] not in expected else "was altered"
            raise UserError(f"student {number} of {folder} is not the one of the manifest: {path / odd[0]} {what}; put "
                            "it back, or train that student again")
    return [load_student(path) for path, _ in listed], partition


@export.register
def export_routed(
    student: RoutedStudent, folder: str | os.PathLike[str], guidance_scale: float | None = None,
    steps: int | None = None,
) -> Path:
    """A stock pipeline each, ``student-0`` ..., with ``manifest.json`` that says which conditions each makes.

    Raises:
        UserError: see :func:`flowdistill.export.pipelines.export`.
    """
    target = local_path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; give a new folder for the exported pipelines")
    check_place(target)
    names = [f"student-{part}" for part in range(len(student.students))]
    for part, name in enumerate(names):
        export(student.student(part), target / name, guidance_scale, steps)
    manifest = {"partition": student.partition.to_dict(),
                "pipelines": [{"folder": name, "sha256": checksums(target / name)} for name in names]}
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    how = "`parts` in manifest.json lists the class labels of each pipeline."
    if student.partition.prompts is not None:
        how = ("A prompt's embedding is the mean of its text encoder's output over the tokens (those of the attention "
               "mask where the pipeline has one). With balanced_kmeans it belongs to the pipeline whose squared "
               "distance to `centres` plus `offsets` is smallest; with pca_quadrant the tree of `thresholds` is walked "
               "from its root, at depth d by the projection of (embedding - `mean`) on `axes` d, to the right above "
               "the threshold.")
    count = steps or student.num_steps
    kind = "one-step" if count == 1 else f"{count}-step"
    first = read_text(target / names[0] / CARD).split("```python\n")[1].split("```")[0]
    write_card(
        target, f"# {len(names)} {kind} generators\n\n{origin(student)} Each folder is a diffusers pipeline that makes "
        f"its own conditions only. {how} The README.md in each folder says how it is called; the first is\n\n"
        f"```python\n{first.replace(HERE, f'{HERE}/{names[0]}')}```\n", student, count)
    return target
