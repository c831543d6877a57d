"""Partitions of classes and prompts: disjoint, equal, routed by a pure function (MSD, arXiv 2410.23274)."""

import json

import pytest
import torch

from flowdistill.conditioning.conditions import ClassLabels, Condition
from flowdistill.methods.msd.partition import (
    CLASS_RULES,
    Cells,
    ClassTable,
    Quadrants,
    pooled,
    router_from,
    split_classes,
    split_prompts,
)
from flowdistill.utils.errors import UserError


def labels(values):
    return Condition({"class_labels": torch.as_tensor(values)})


# --- classes


@pytest.mark.parametrize("rule", ["sequential", "interleaved", "random"])
@pytest.mark.parametrize(("classes", "parts"), [(10, 1), (10, 2), (10, 3), (10, 10), (1000, 4), (7, 5)])
def test_class_parts_are_disjoint_complete_and_equal(rule, classes, parts):
    table = split_classes(rule, classes, parts, seed=3)
    found = table.parts()
    assert sorted(label for part in found for label in part) == list(range(classes))
    assert len(found) == parts and max(map(len, found)) - min(map(len, found)) <= 1
    assert table.route(labels(range(classes))).tolist() == list(table.owner)


def test_class_rules_are_what_they_are_called(tmp_path):
    assert split_classes("sequential", 1000, 4).parts()[1] == list(range(250, 500))
    assert split_classes("interleaved", 10, 3).parts() == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    shuffled = [split_classes("random", 100, 2, seed).parts()[0] for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2] and shuffled[0] != list(range(50))
    file = tmp_path / "parts.yaml"
    file.write_text("[[3, 1], [0, 2, 4]]")
    assert split_classes("file", 5, 2, file=file).parts() == [[1, 3], [0, 2, 4]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[0, 1], [1, 2, 3]]", "overlaps: class 1 is in it more than once"),
        ("[[0, 1], [3]]", "leaves out class 2"),
        ("[[0, 1], [2, 3, 4]]", "has the label 4; the teacher has the classes 0 to 3"),
        ("[[0, 1, 2, 3]]", "has 1 parts, but method.num_students is 2"),
        ("[[0, 1, 2, 3], []]", "must be a list of lists of class labels"),
        ("[[0, 1], [2, true]]", "must be a list of lists of class labels"),
        ("0: [1]", "must be a list of lists of class labels"),
        ("[[0", "is not valid YAML: line"),
        (None, "method.partition_file must name a file"),
    ],
)
def test_partition_files_that_do_not_fit(tmp_path, text, sentence):
    file = tmp_path / "parts.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        split_classes("file", 4, 2, file=file)


def test_more_parts_than_conditions():
    with pytest.raises(UserError, match="num_students is 5, but the teacher has only 4 classes"):
        split_classes("sequential", 4, 5)
    with pytest.raises(UserError, match="num_students is 5, but there are only 4 different prompts"):
        split_prompts("balanced_kmeans", torch.randn(4, 3), 5)


def test_a_label_that_no_student_owns():
    table = split_classes("sequential", 4, 2)
    for label in (4, -1):
        with pytest.raises(UserError, match=f"no student owns the label {label}; there are students for 0 to 3"):
            table.route(labels([0, label]))


def ring(classes=8):
    angle = torch.arange(classes, dtype=torch.float64) * 2 * torch.pi / classes
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def scatter(table: ClassTable, points):
    """Mean squared distance to the mean of the own part: the L2 optimum of students that do not see the class."""
    parts = [points[part] for part in table.parts()]
    return sum(float((part - part.mean(dim=0)).square().sum()) for part in parts) / len(points)


def test_capacity_model_on_the_unit_circle():
    """Digest, E: consecutive classes help, scattered ones do not."""
    points = ring()
    sequential = [scatter(split_classes("sequential", 8, k), points) for k in (1, 2, 4, 8)]
    assert sequential == pytest.approx([1, 0.57322, 0.14645, 0], abs=1e-5)
    interleaved = [scatter(split_classes("interleaved", 8, k), points) for k in (1, 2, 4, 8)]
    assert interleaved == pytest.approx([1, 1, 1, 0], abs=1e-12)
    for k, expected in ((2, 6 / 7), (4, 4 / 7)):
        random = [scatter(split_classes("random", 8, k, seed), points) for seed in range(2000)]
        assert sum(random) / len(random) == pytest.approx(expected, abs=0.01)


def test_uniform_labels_through_the_router_are_the_classes_of_uniform_sampling():
    table = split_classes("random", 10, 3, seed=1)
    drawn = torch.randint(10, (1000,), generator=torch.Generator().manual_seed(0))
    route, back = table.route(labels(drawn)), torch.empty_like(drawn)
    for k in range(3):
        assert set(drawn[route == k].tolist()) <= set(table.parts()[k])
        back[route == k] = drawn[route == k]
    assert torch.equal(back, drawn)


# --- what a part draws


class Integers:
    """A draw that gives the numbers 0 ... n - 1 and remembers n."""

    def integers(self, high, rows=None, on_cpu=False):
        self.high = high
        return torch.arange(high)

    def placed(self, values):
        return values


def test_a_restricted_teacher_draws_and_shows_its_own_classes():
    classes = ClassLabels(10, 10).restricted([7, 2, 5])
    draw = Integers()
    assert classes.draw(draw).tensors["class_labels"].tolist() == [7, 2, 5] and draw.high == 3
    assert classes.examples(range(5)).tensors["class_labels"].tolist() == [7, 2, 5, 7, 2]
    assert classes.num_classes == 10 and classes.null(labels([7])).tensors["class_labels"].tolist() == [10]
    everything = ClassLabels(10, None)
    assert everything.draw(draw).tensors["class_labels"].tolist() == list(range(10)) and draw.high == 10
    for wrong in ([], [1, 1], [10]):
        with pytest.raises(UserError, match="teacher.labels|out of range"):
            everything.restricted(wrong)


# --- prompts


def clusters(sizes, seed=0, spread=0.1, width=6):
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(len(sizes), width, generator=generator, dtype=torch.float64)
    return torch.cat([
        centre + spread * torch.randn(size, width, generator=generator, dtype=torch.float64)
        for centre, size in zip(centres, sizes, strict=True)
    ])


@pytest.mark.parametrize("rule", ["balanced_kmeans", "pca_quadrant"])
@pytest.mark.parametrize(("sizes", "parts"), [([30, 5, 5], 4), ([9, 9], 2), ([11], 4), ([4], 4), ([6], 1)])
def test_prompt_parts_are_equal_whatever_the_clusters(rule, sizes, parts):
    x = clusters(sizes)
    router = split_prompts(rule, x, parts)
    counts = torch.bincount(router.cell(x), minlength=parts)
    assert counts.sum() == len(x) and counts.max() - counts.min() <= 1


def test_balanced_kmeans_finds_equal_clusters_and_keeps_them_together():
    x = clusters([8, 8, 8])
    found = split_prompts("balanced_kmeans", x, 3).cell(x).reshape(3, 8)
    assert (found == found[:, :1]).all() and sorted(found[:, 0].tolist()) == [0, 1, 2]


def test_balanced_kmeans_is_the_cheapest_equal_assignment():
    from itertools import combinations

    x = clusters([5, 3], spread=1.0)
    cells = split_prompts("balanced_kmeans", x, 2)
    cost = (x[:, None] - cells.centres).square().sum(dim=2)
    best = min(
        sum(float(cost[i, 0] if i in first else cost[i, 1]) for i in range(8)) for first in combinations(range(8), 4)
    )
    owner = cells.cell(x)
    assert float(cost[torch.arange(8), owner].sum()) == pytest.approx(best, rel=1e-9)


def test_quadrants_are_signs_along_the_principal_axes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 1.0], dtype=torch.float64)
    router = split_prompts("pca_quadrant", x, 4)
    assert router.axes.abs().round().tolist() == [[1, 0], [0, 1]]
    part, along = router.cell(x), (x - router.mean) @ router.axes.T
    high = along[:, 0] > along[:, 0].median()
    assert torch.equal(part >= 2, high)
    for side in (True, False):
        values = along[high == side, 1]
        assert torch.equal(part[high == side] % 2 == 1, values > values.median())
    with pytest.raises(UserError, match="power of two, not 3"):
        split_prompts("pca_quadrant", x, 3)


def test_prompts_of_one_embedding_cannot_be_split():
    with pytest.raises(UserError, match="cannot be split into 2 equal parts"):
        split_prompts("pca_quadrant", torch.ones(6, 3), 2)


def test_pooling_leaves_padding_out():
    embeds = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]]])
    assert pooled(Condition({"prompt_embeds": embeds})).flatten().tolist() == pytest.approx([104 / 3, 4])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pooled(Condition({"prompt_embeds": embeds, "attention_mask": mask})).flatten().tolist() == [2, 4]


@pytest.mark.parametrize("rule", [*CLASS_RULES, "balanced_kmeans", "pca_quadrant"])
def test_a_router_is_the_same_after_json(rule, tmp_path):
    x = clusters([10, 4])
    if rule in CLASS_RULES:
        (tmp_path / "parts.json").write_text("[[0, 3, 4], [1, 2]]")
        router, condition = split_classes(rule, 5, 2, 1, tmp_path / "parts.json"), labels(range(5))
    else:
        router, condition = split_prompts(rule, x, 4), Condition({"prompt_embeds": x[:, None]})
    again = router_from(json.loads(json.dumps(router.to_dict())))
    assert type(again) in (ClassTable, Cells, Quadrants) and again.rule == rule
    assert torch.equal(again.route(condition), router.route(condition))
    shuffled = torch.randperm(len(condition), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.route(condition[shuffled]), router.route(condition)[shuffled])  # row by row, no state
