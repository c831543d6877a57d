"""Every accepted seed, 0 to 2^64 - 1, is another seed, for whatever takes one; the others are refused in a sentence."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flowdistill.config import load_config
from flowdistill.data import shapes, split_halves
from flowdistill.evaluation import evaluate
from flowdistill.evaluation.generation import generate, sample_generators
from flowdistill.evaluation.metrics.kernel import kernel_distance
from flowdistill.evaluation.metrics.precision_recall import precision_recall
from flowdistill.features.vision import load_vision
from flowdistill.methods.msd.partition import split_classes, split_prompts
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw, generator_of, indexed_noise, seed_torch
from flowdistill.utils.seeds import SEEDS, check_seed
from tests.tiny import tiny_unet_pipeline

ROOT = Path(__file__).resolve().parents[2]
OLD = [0, 1, 2, 77, 2**31 - 1, 2**31, 2**32 - 1]  # what torch's CPU generator tells apart
ALL = [*OLD, 2**32, 2**32 + 1, 2**32 + 77, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]


def draws(seed: int) -> torch.Tensor:
    draw = Draw(seed, 3, rows=4)
    return torch.cat([draw.normal((2,)).flatten(), draw.uniform(), draw.integers(2**40).double()])


def globally(seed: int) -> torch.Tensor:
    with torch.random.fork_rng():
        seed_torch(seed)
        return torch.randn(8)


def student() -> Any:
    return FlowMap.from_teacher(load_teacher(tiny_unet_pipeline(), null_label=3), StudentInfo("freeflow"))


STUDENT: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    STUDENT[:] = [student()]


FEATURES = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 2
TAKERS: dict[str, Callable[[int], Any]] = {
    "noise": lambda seed: indexed_noise((4,), seed, range(3)),
    "generators of pipelines": lambda seed: torch.stack(
        [torch.randn(4, generator=generator) for generator in sample_generators(range(3), seed)]),
    "one generator": lambda seed: torch.randn(8, generator=generator_of(seed)),
    "global generators": globally,
    "training": draws,
    "pictures of a student": lambda seed: STUDENT[0].generate(labels=[0, 1], seed=seed),
    "an evaluation": lambda seed: next(generate(lambda noise, _: noise, (1, 2, 2), 3, seed, progress=False)).images,
    "splits": lambda seed: torch.cat(split_halves(LABELS, seed)),
    "drawn shapes": lambda seed: shapes.make_shapes(2, seed)[0],
    "vision": lambda seed: load_vision(f"small:{seed}", "x").network.layers[0].weight,
    "classes at random": lambda seed: torch.tensor(split_classes("random", 40, 2, seed).owner),
}
REPEATING = {  # few values are possible, so that two seeds may agree
    "kernel distance": lambda seed: kernel_distance(FEATURES, FEATURES[:50] + 1, seed),
    "precision and recall": lambda seed: precision_recall(FEATURES, FEATURES + 0.5, seed=seed),
    "prompts in parts": lambda seed: sorted(split_prompts("balanced_kmeans", FEATURES, 3, seed).offsets.tolist()),
}


@pytest.mark.parametrize("name", TAKERS)
def test_every_seed_is_another_one(name):
    found = [TAKERS[name](seed) for seed in ALL]
    for (i, one), (j, other) in itertools.combinations(enumerate(found), 2):
        assert not torch.equal(one, other), (ALL[i], ALL[j])
    assert all(torch.equal(TAKERS[name](seed), one) for seed, one in zip(ALL, found, strict=True))


@pytest.mark.parametrize("name", REPEATING)
def test_every_seed_is_taken(name):
    assert all(REPEATING[name](seed) == REPEATING[name](seed) is not None for seed in (0, 2**32, SEEDS - 1))


def test_images_of_a_seed_differ_from_each_other():
    for seed in (0, 2**40):
        rows = indexed_noise((4,), seed, range(2000))
        assert len(rows.unique(dim=0)) == 2000 and abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.02
        assert torch.equal(indexed_noise((4,), seed, [7, 1999]), rows[[7, 1999]])


def test_seeds_that_torch_tells_apart_give_what_they_always_gave():
    for seed in OLD:
        for index, row in enumerate(indexed_noise((5, 4), seed, range(3))):
            mixed = ((seed + 1) * 0x9E3779B97F4A7C15 + index) & (2**63 - 1)
            assert torch.equal(row, torch.randn(5, 4, generator=torch.Generator().manual_seed(mixed)))
        offset = int.from_bytes(hashlib.sha256(f"flowdistill generators {seed}".encode()).digest()[:4], "little")
        for index, generator in enumerate(sample_generators(range(3), seed)):
            assert generator.initial_seed() == (offset + index) % 2**32
        same = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.randn(4, generator=generator_of(seed)), same)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert torch.equal(torch.randn(8), globally(seed))


def test_torchs_own_generator_keeps_32_bits_of_a_seed():
    """Why there is more to it; were this to fail, torch would do the work."""
    one, other = (torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 2**32 + 5))
    assert torch.equal(one, other)


def test_a_state_made_of_words_is_the_state_that_torch_makes_of_them(monkeypatch):
    """The layout of a state is torch's own: its words in a state of ours must give its numbers."""
    seed = 2**31 + 5  # of the first word only the highest bit counts, which is set in all of ours
    words = np.random.RandomState(seed).get_state()[1]  # the words that torch, too, makes of a seed of 32 bits

    class Sequence(NamedTuple):
        seed: int
        spawn_key: tuple[int, ...]

        def generate_state(self, count: int) -> Any:
            assert (self.seed, self.spawn_key, count) == (2**32, (), len(words))
            return words.copy()

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "SeedSequence", Sequence)
        ours = generator_of(2**32)
    theirs = torch.Generator().manual_seed(seed)
    for _ in range(3):
        assert torch.equal(torch.randn(700, generator=ours), torch.randn(700, generator=theirs))
        assert torch.equal(torch.randint(9, (5,), generator=ours), torch.randint(9, (5,), generator=theirs))


@pytest.mark.parametrize("key", [(), (0,), (7, 2**40)])
def test_the_words_of_a_long_seed_are_numpys(key: tuple[int, ...]) -> None:
    twister = np.random.MT19937(np.random.SeedSequence(2**63 + 9, spawn_key=key))
    ours = generator_of(2**63 + 9, *key).get_state().view(torch.int64)
    assert ours[3 : 3 + 624].tolist() == twister.state["state"]["key"].tolist()


WRONG = [-1, SEEDS, 2**70, 1.5, "3", None]


@pytest.mark.parametrize("seed", WRONG)
def test_what_is_no_seed_is_refused(seed):
    for take in (check_seed, lambda seed: indexed_noise((2,), seed, [0]), lambda seed: sample_generators([0], seed),
                 lambda seed: STUDENT[0].generate(labels=[0], seed=seed), seed_torch,
                 lambda seed: next(generate(lambda noise, _: noise, (1, 2, 2), 3, seed)),
                 lambda seed: evaluate("no such model", seed=seed)):
        with pytest.raises(UserError, match="the seed must be an integer"):
            take(seed)
    assert check_seed(np.int64(3)) == 3 and type(check_seed(np.uint64(2**64 - 1))) is int


@pytest.mark.parametrize("seed", [-1, SEEDS, "1.5", "x", "9" * 5000])
def test_commands_and_settings_refuse_it_before_the_work(tmp_path, cli, seed, monkeypatch, capsys):
    for command in (["sample", "no/such/model", "--out", tmp_path / "x.png"], ["evaluate", "no/such/model"]):
        result = cli(*command, "--seed", seed)
        assert result.code == 2 and result.err.count("\n") == 1
        assert "argument --seed: must be an integer from 0 to 2**64 - 1" in result.err and len(result.err) < 400
    file = ROOT / "configs" / "digits" / "freeflow.yaml"
    result = cli("distill", file, f"seed={seed}", f"output_dir={tmp_path / 'run'}")
    assert result.code == 2 and ("'seed'" in result.err or "not valid YAML" in result.err)
    assert not (tmp_path / "run").exists()
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import evaluate_fid

    with pytest.raises(SystemExit) as stop:
        evaluate_fid.main(["images", "--reference", "digits", "--seed", str(seed)])
    assert stop.value.code == 2 and "must be an integer from 0 to" in capsys.readouterr().err


def test_settings_take_the_largest_one():
    overrides = [f"seed={SEEDS - 1}", f"method.partition_seed={SEEDS - 1}"]
    config = load_config(ROOT / "configs" / "digits" / "msd.yaml", overrides)
    assert config.seed == config.method.partition_seed == SEEDS - 1
    with pytest.raises(UserError, match="'method.partition_seed' must be at least 0 and below"):
        load_config(ROOT / "configs" / "digits" / "msd.yaml", [f"method.partition_seed={SEEDS}"])
    with pytest.raises(UserError, match="the seed in 'method.identity' must be an integer from 0"):
        load_vision(f"small:{SEEDS}", "method.identity")
