"""Conditions in K disjoint parts of equal size, and which part a condition belongs to.

Classes are split by a table; prompts by their pooled text embeddings, with a rule that is fitted once and also says
where a prompt belongs that nobody has seen (MSD, Song et al., arXiv 2410.23274, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flowdistill.conditioning.conditions import Condition
from flowdistill.utils.errors import UserError
from flowdistill.utils.text import JsonObject, read_yaml

ROUNDS = 50
"""Most rounds of balanced k-means, which mostly settles in fewer than ten."""

CLASS_RULES = ("sequential", "interleaved", "random", "file")
PROMPT_RULES = ("balanced_kmeans", "pca_quadrant")


class Router(Protocol):
    """A pure function from conditions to parts, with values that JSON holds."""

    @property
    def rule(self) -> str:
        """Its name in the configuration."""

    def route(self, condition: Condition) -> Tensor:
        """Number of the part of each row, int64 (B,), on the CPU."""

    def to_dict(self) -> JsonObject:
        """What :func:`router_from` makes an equal one of."""


# --- classes


@dataclass(frozen=True)
class ClassTable:
    """Class label -> part.

    Attributes:
        owner: part of each label, in order.
    """

    rule: str
    owner: tuple[int, ...]

    def parts(self) -> list[list[int]]:
        """The labels of each part, ascending."""
        return [[label for label, part in enumerate(self.owner) if part == k] for k in range(max(self.owner) + 1)]

    def route(self, condition: Condition) -> Tensor:
        labels = condition.tensors["class_labels"].cpu()
        outside = labels[(labels < 0) | (labels >= len(self.owner))]
        if len(outside):
            raise UserError(f"no student owns the label {int(outside[0])}; there are students for 0 to "
                            f"{len(self.owner) - 1}")
        return torch.tensor(self.owner)[labels]

    def to_dict(self) -> JsonObject:
        return {"rule": self.rule, "parts": self.parts()}


def split_classes(
    rule: str, num_classes: int, parts: int, seed: int = 0, file: Path | None = None
) -> ClassTable:
    """Labels 0 ... C - 1 in K parts.

    Args:
        rule: ``sequential``: label c goes to floor(c K / C); ``interleaved``: to c mod K; ``random``: sequential after
            a permutation by ``seed``; ``file``: as ``file`` says, a YAML or JSON list of K lists of labels.

    Raises:
        UserError: more parts than classes; a file that is missing, of another form, or whose lists overlap or leave a
            class out.
    """
    if parts > num_classes:
        raise UserError(f"method.num_students is {parts}, but the teacher has only {num_classes} classes; each student "
                        "needs at least one")
    if rule == "file":
        return _read_table(file, num_classes, parts)
    labels = np.arange(num_classes)
    if rule == "random":
        labels = np.random.default_rng(seed).permutation(num_classes)
    owner = labels % parts if rule == "interleaved" else labels * parts // num_classes
    return ClassTable(rule, tuple(owner.tolist()))


def _read_table(file: Path | None, num_classes: int, parts: int) -> ClassTable:
    if file is None or not file.is_file():
        raise UserError("method.partition is 'file', so method.partition_file must name a file with a list of labels "
                        f"for each student, not {file or 'nothing'}")
    lists = read_yaml(file, f"the partition file {file}")
    fits = isinstance(lists, list) and all(isinstance(part, list) and part for part in lists)
    if not fits or not all(type(label) is int for part in lists for label in part):
        raise UserError(f"the partition file {file} must be a list of lists of class labels, such as [[0, 1], [2, 3]]")
    if len(lists) != parts:
        raise UserError(f"the partition file {file} has {len(lists)} parts, but method.num_students is {parts}")
    owner: dict[int, int] = {}
    for k, part in enumerate(lists):
        for label in part:
            if label in owner:
                raise UserError(f"the partition file {file} overlaps: class {label} is in it more than once")
            if not 0 <= label < num_classes:
                raise UserError(f"the partition file {file} has the label {label}; the teacher has the classes 0 to "
                                f"{num_classes - 1}")
            owner[label] = k
    missing = [label for label in range(num_classes) if label not in owner]
    if missing:
        raise UserError(f"the partition file {file} leaves out class {missing[0]}; every class needs a student")
    return ClassTable("file", tuple(owner[label] for label in range(num_classes)))


# --- prompts


def pooled(condition: Condition) -> Tensor:
    """Mean over the tokens of each prompt's embeddings, without padding where a mask tells it: float64 (B, D), CPU."""
    embeds = condition.tensors["prompt_embeds"].cpu().double()
    mask = condition.tensors.get("attention_mask")
    if mask is None:
        return embeds.mean(dim=1)
    weight = (mask.cpu() > 0).double()[:, : embeds.shape[1], None]
    return (embeds * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class Cells:
    """Nearest of K centres after an offset each: ||x - c_k||^2 + w_k is smallest in the own cell.

    Attributes:
        centres: (K, D) float64.
        offsets: w (K,) float64; with them the cells of the fitted prompts have equal sizes.
    """

    centres: Tensor
    offsets: Tensor
    rule: str = "balanced_kmeans"

    def route(self, condition: Condition) -> Tensor:
        return self.cell(pooled(condition))

    def cell(self, x: Tensor) -> Tensor:
        """Cells (B,) of points (B, D)."""
        return (_squared_distances(x, self.centres) + self.offsets).argmin(dim=1)

    def to_dict(self) -> JsonObject:
        return {"rule": self.rule, "centres": self.centres.tolist(), "offsets": self.offsets.tolist()}


@dataclass(frozen=True)
class Quadrants:
    """Signs along the principal axes: at depth d the d-th axis, against a threshold of the branch so far.

    Attributes:
        mean: (D,) float64.
        axes: (m, D) float64, for 2^m parts.
        thresholds: 2^m - 1 of them, breadth first.
    """

    mean: Tensor
    axes: Tensor
    thresholds: Tensor
    rule: str = "pca_quadrant"

    def route(self, condition: Condition) -> Tensor:
        return self.cell(pooled(condition))

    def cell(self, x: Tensor) -> Tensor:
        """Parts (B,) of points (B, D)."""
        along, node = (x - self.mean) @ self.axes.T, torch.zeros(len(x), dtype=torch.int64)
        for depth in range(len(self.axes)):
            node = 2 * node + 1 + (along[:, depth] > self.thresholds[node]).long()
        return node - len(self.thresholds)

    def to_dict(self) -> JsonObject:
        values = {name: getattr(self, name).tolist() for name in ("mean", "axes", "thresholds")}
        return {"rule": self.rule} | values


def split_prompts(rule: str, embeddings: Tensor, parts: int, seed: int = 0) -> Cells | Quadrants:
    """Fit a rule under which the prompts fall in K parts whose sizes differ by one at most.

    Args:
        rule: ``balanced_kmeans``, or ``pca_quadrant`` for K a power of two.
        embeddings: pooled (N, D), of different prompts.

    Raises:
        UserError: more parts than prompts, another K than the rule allows, or prompts that cannot be told apart.
    """
    if parts > len(embeddings):
        raise UserError(f"method.num_students is {parts}, but there are only {len(embeddings)} different prompts; each "
                        "student needs at least one")
    router = (_balanced_kmeans if rule == "balanced_kmeans" else _quadrants)(embeddings.double(), parts, seed)
    sizes = torch.bincount(router.cell(embeddings.double()), minlength=parts)
    if sizes.max() - sizes.min() > 1:
        raise UserError(f"the prompts cannot be split into {parts} equal parts: too many of them have the same "
                        f"embedding (sizes {sizes.tolist()}); lower method.num_students")
    return router


def _balanced_kmeans(x: Tensor, parts: int, seed: int) -> Cells:
    """Lloyd's algorithm whose assignment is the cheapest one with equal sizes (Bradley et al. 2000)."""
    from sklearn.cluster import KMeans

    # scikit-learn takes a number of 32 bits, or a generator, which takes any.
    random = seed if seed < 2**32 else np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    start = KMeans(parts, n_init=10, random_state=random).fit(x.numpy()).cluster_centers_
    centres = torch.from_numpy(np.ascontiguousarray(start, dtype=np.float64))
    owner = torch.full((len(x),), -1)
    for _ in range(ROUNDS):
        before, owner = owner, _equal_assignment(_squared_distances(x, centres))
        centres = torch.stack([x[owner == k].mean(dim=0) for k in range(parts)])
        if torch.equal(owner, before):
            break
    owner = _equal_assignment(_squared_distances(x, centres))
    return Cells(centres, _offsets(_squared_distances(x, centres), owner))


def _equal_assignment(cost: Tensor) -> Tensor:
    """Part (N,) of each row for the smallest sum of cost (N, K), sizes floor(N/K) or one more."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix, vstack

    rows, parts = cost.shape
    variables = np.arange(rows * parts)
    once = coo_matrix((np.ones(rows * parts), (variables // parts, variables)))
    filled = coo_matrix((np.ones(rows * parts), (variables % parts, variables)))

    # A transport problem: its vertices are whole numbers.
    low, high = rows // parts, -(-rows // parts)
    found = linprog(
        cost.flatten().numpy(), A_eq=once.tocsr(), b_eq=np.ones(rows), bounds=(0, 1), method="highs",
        A_ub=vstack([filled, -filled]).tocsr(), b_ub=np.concatenate([np.full(parts, high), np.full(parts, -low)]),
    )
    return torch.from_numpy(found.x.reshape(rows, parts)).argmax(dim=1)


def _offsets(cost: Tensor, owner: Tensor) -> Tensor:
    """w (K,) with cost_ik + w_k <= cost_ij + w_j for every i in k and all j; they exist for a cheapest assignment.

    w_k - w_j <= gap_kj is a system of differences: shortest paths to and from every part solve it, and the mean of all
    those solutions lies inside it, away from its faces.
    """
    parts = cost.shape[1]
    gap = torch.stack([(cost[owner == k] - cost[owner == k, k : k + 1]).amin(dim=0) for k in range(parts)])
    for via in range(parts):  # Floyd and Warshall
        gap = torch.minimum(gap, gap[:, via : via + 1] + gap[via])
    # Row k of gap bounds w_k - w_j above: w = gap[:, j] is one solution, w = -gap[j] another.
    solutions = torch.cat([gap.T, -gap])
    solutions = solutions - solutions[:, :1]
    return solutions.mean(dim=0)


def _quadrants(x: Tensor, parts: int, seed: int) -> Quadrants:
    depth = parts.bit_length() - 1
    if 2**depth != parts:
        raise UserError(f"method.partition is 'pca_quadrant', which halves {depth + 1} times or less, so "
                        f"method.num_students must be a power of two, not {parts}; or take balanced_kmeans")
    if depth > min(x.shape):
        raise UserError(f"method.partition is 'pca_quadrant', and {parts} parts need {depth} principal axes, more than "
                        f"the {min(x.shape)} there are")
    from sklearn.decomposition import PCA

    fitted = PCA(max(depth, 1), svd_solver="full").fit(x.numpy())
    mean, axes = torch.from_numpy(fitted.mean_), torch.from_numpy(fitted.components_)[:depth]
    along, thresholds = (x - mean) @ axes.T, torch.zeros(2**depth - 1, dtype=torch.float64)
    node = torch.zeros(len(x), dtype=torch.int64)
    for number in range(2**depth - 1):
        level = (number + 1).bit_length() - 1
        mine = node == number
        values = along[mine, level].sort().values
        half = len(values) // 2
        thresholds[number] = (values[half - 1] + values[half]) / 2
        node[mine] = 2 * number + 1 + (along[mine, level] > thresholds[number]).long()
    return Quadrants(mean, axes, thresholds)


def _squared_distances(x: Tensor, centres: Tensor) -> Tensor:
    return torch.stack([(x - centre).square().sum(dim=1) for centre in centres], dim=1)


# --- conditions and their parts together, on disk


@dataclass(frozen=True)
class Partition:
    """A router and the conditions it was made for.

    Attributes:
        router: what tells every condition's part.
        count: K.
        prompts: the different prompts of a text-to-image teacher; None for classes.
        weights: how often each is drawn, of sum 1.
        owner: part of each prompt.
    """

    router: Router
    count: int
    prompts: list[str] | None = None
    weights: list[float] | None = None
    owner: list[int] | None = None

    @classmethod
    def of_classes(cls, table: ClassTable) -> Partition:
        return cls(table, max(table.owner) + 1)

    @classmethod
    def of_prompts(
        cls,
        rule: str,
        prompts: Sequence[str],
        weights: Sequence[float],
        embeddings: Tensor,
        parts: int,
        seed: int = 0,
    ) -> Partition:
        """A prompt that is listed twice counts once, with both weights.

        Args:
            embeddings: ``pooled`` (N, D), of the prompts encoded by the teacher.
        """
        total: dict[str, float] = {}
        for prompt, weight in zip(prompts, weights, strict=True):
            total[prompt] = total.get(prompt, 0.0) + weight
        first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
        embeddings = embeddings[torch.tensor([first[prompt] for prompt in total])]
        router = split_prompts(rule, embeddings, parts, seed)
        return cls(router, parts, list(total), list(total.values()), router.cell(embeddings).tolist())

    def labels(self, part: int) -> list[int]:
        """The class labels of a part."""
        assert isinstance(self.router, ClassTable)
        return self.router.parts()[part]

    def listed(self, part: int) -> list[tuple[str, float]]:
        """The prompts of a part with their weights."""
        assert self.prompts is not None and self.weights is not None and self.owner is not None
        everything = zip(self.prompts, self.weights, self.owner, strict=True)
        return [(prompt, weight) for prompt, weight, owner in everything if owner == part]

    def to_dict(self) -> JsonObject:
        values: JsonObject = {"count": self.count, **self.router.to_dict()}
        if self.prompts is not None:
            values |= {"prompts": self.prompts, "weights": self.weights, "owner": self.owner}
        return values

    @classmethod
    def from_dict(cls, values: JsonObject) -> Partition:
        """The inverse of ``to_dict``; KeyError, TypeError or ValueError for values that are not of that form."""
        rest = (values.get(name) for name in ("prompts", "weights", "owner"))
        return cls(router_from(values), values["count"], *rest)


def router_from(values: JsonObject) -> Router:
    """The inverse of a router's ``to_dict``."""
    rule = values["rule"]
    if rule in CLASS_RULES:
        owner = {label: k for k, part in enumerate(values["parts"]) for label in part}
        return ClassTable(rule, tuple(owner[label] for label in range(len(owner))))

    def tensor(name: str) -> Tensor:
        return torch.tensor(values[name], dtype=torch.float64)

    if rule == "balanced_kmeans":
        return Cells(tensor("centres"), tensor("offsets"))
    if rule == "pca_quadrant":
        return Quadrants(tensor("mean"), tensor("axes"), tensor("thresholds"))
    raise KeyError(rule)
