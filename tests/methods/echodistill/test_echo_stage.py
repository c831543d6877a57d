"""The echo stage: which pictures are kept, gated and mixed, and how a round is taken back."""

import json
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from flowdistill.data.pictures import read_picture
from flowdistill.features.vision import load_vision
from flowdistill.methods.echodistill.echo import EchoConfig, EchoStage, Pool, Scores
from flowdistill.methods.echodistill.judge import PLAIN, Judge, Separation
from flowdistill.methods.echodistill.method import EchoDistill
from flowdistill.methods.echodistill.settings import EchoDistillConfig
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.echo_world import make_method, make_trainer, teacher_pipeline, weights
from tests.families import lively


class Scripted:
    """A judge that reads its scores off the pictures: the level in the first value, the margin in the second."""

    separation = Separation(9.0, 0.0)

    def levels(self, images):
        return images[:, 0, 0, 0].clone()

    def margins(self, latents, prompts):
        return latents[:, 0, 0, 0].clone()


def stage(tmp_path, levels, margins, tensors=None, **config):
    """A stage whose models paint pictures of these scores, one list a call of sample (the last one again and again)."""
    settings = {"start": 2, "steps": 2, "num_samples": len(levels[0]), "num_validation": 2} | config
    calls = []

    def sample(model, numbers, seed):
        calls.append((model, seed, numbers.tolist()))
        turn = min(len(calls) - 1, len(levels) - 1)
        images, latents = torch.zeros(len(numbers), 3, 4, 4), torch.zeros(len(numbers), 4, 2, 2)
        images[:, 0, 0, 0] = torch.tensor(levels[turn])[: len(numbers)]
        latents[:, 0, 0, 0] = torch.tensor(margins[turn])[: len(numbers)]
        return latents, images

    made = EchoStage(EchoConfig(**settings), Scripted, sample, lambda: tensors or {"w": torch.zeros(1)},
                     torch.tensor([3, 5]), [f"prompt {i}" for i in range(6)])
    return made, calls


def test_a_picture_is_kept_for_its_level_and_its_own_prompt(tmp_path):
    levels, margins = [0.9, 0.4, 0.8, 0.7, 0.6, 0.95], [1.0, 1.0, -1.0, 1.0, 1.0, 2.0]
    made, _ = stage(tmp_path, [levels], [margins], keep_fraction=0.5)
    scores = Scores(torch.tensor(levels), torch.tensor(margins))
    one_prompt = torch.zeros(6, dtype=torch.int64)
    kept, figures = made.choose(scores, one_prompt)
    assert kept.tolist() == [5, 0, 3]  # 1 is no concept, 2 fits another prompt; the best three of the rest
    assert figures == {"samples": 6, "reached_level": 5, "fit_their_prompt": 5, "kept": 3}
    made.config.keep_fraction = 1.0
    assert made.choose(scores, one_prompt)[0].tolist() == [5, 0, 3, 4]
    made.config.min_level = 2.0  # the best of a bad lot is not good
    assert len(made.choose(scores, one_prompt)[0]) == 0


def test_each_prompt_keeps_its_own_best(tmp_path):
    """Prompt 5's pictures are all more alike than prompt 3's, which would have none among the best half of all."""
    levels, which = [0.9, 0.55, 0.8, 0.6, 0.85, 0.65], torch.tensor([5, 3, 5, 3, 5, 3])
    made, _ = stage(tmp_path, [levels], [[1.0] * 6], keep_fraction=0.5)
    kept, figures = made.choose(Scores(torch.tensor(levels), torch.ones(6)), which)
    assert kept.tolist() == [0, 5] and figures["kept"] == 2  # half of three, rounded down, the best first
    made.config.keep_fraction = 0.34  # two of all, and one at least of each
    assert made.choose(Scores(torch.tensor(levels), torch.ones(6)), which)[0].tolist() == [0, 5]
    made.config.keep_fraction = 0.1  # one of all
    assert made.choose(Scores(torch.tensor(levels), torch.ones(6)), which)[0].tolist() == [0]
    made.config.keep_fraction = 0.5  # a prompt for each picture: the share is that of all
    assert made.choose(Scores(torch.tensor(levels), torch.ones(6)), torch.arange(6))[0].tolist() == [0, 4, 2]
    made.config.min_level = 0.7
    assert made.choose(Scores(torch.tensor(levels), torch.ones(6)), which)[0].tolist() == [0]


def test_rounds_begin_and_end_when_they_should(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "separation", Separation(math.inf, 0.0))
    made, calls = stage(tmp_path, [[1.0, 1.0]], [[1.0, 1.0]], rounds=2)
    seen = []
    for step in range(8):
        before = len(calls)
        assert made.begin(step, tmp_path) is False
        seen.append([model for model, *_ in calls[before:]])
    measured, painted = ["student", "teacher"], ["student"]
    assert seen == [[], [], measured + painted, [], measured + measured + painted, [], measured, []]
    assert [call[1] for call in calls].count(88_001) == 1 and [call[1] for call in calls].count(88_002) == 1
    assert all(set(numbers) <= {3, 5} for *_, numbers in calls)
    assert [entry["round"] for entry in made.history] == [1, 2] and all("after" in entry for entry in made.history)
    assert all(entry["separation"] == {"d_prime": None, "overlap": 0.0} for entry in made.history)
    assert json.loads((tmp_path / "echo" / "report.json").read_text()) == made.history
    assert [made.rate(step) for step in (0, 1, 2, 9)] == [1.0, 1.0, 0.5, 0.5]


def test_a_stage_that_never_starts_does_nothing(tmp_path):
    made, calls = stage(tmp_path, [[1.0]], [[1.0]], start=None)
    assert not any(made.begin(step, tmp_path) for step in range(5)) and not calls and made.rate(4) == 1.0
    made.conclude(5, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("steps", "echo", "words"), [
    (10, {"start": 300}, "train.steps is 10, which ends before the echo stage begins (method.echo.start is 300)"),
    (400, {"start": 400}, "ends before the echo stage begins (method.echo.start is 400), so it is left out; raise "
                          "train.steps to 700"),
    (310, {"start": 300, "steps": 5, "rounds": 5}, "ends in round 2 of the echo stage, whose end is step 325"),
    (311, {"start": 300, "steps": 5, "rounds": 5}, "ends in round 3 of the echo stage"),
    (599, {"start": 300}, "ends in round 1 of the echo stage, whose end is step 600"),
    (600, {"start": 300}, None),
    (1, {}, None),
])
def test_a_run_that_ends_before_the_stage_does_is_said(steps, echo, words):
    said = EchoDistill.check_length(EchoDistillConfig(echo=EchoConfig(**echo)), steps)
    assert said is None if words is None else words in said


def test_a_stage_that_has_not_begun_leaves_nothing_to_name(tmp_path):
    method = make_method(tmp_path, echo={"start": 5})
    assert "echo/" not in method.contents()
    method.load_state_dict({"echo": [{"round": 1}]})
    assert "student/ and teacher/ with their cards, echo/, " in method.contents()


def test_a_rounds_pictures_are_left_with_their_scores(tmp_path):
    """The most alike first, in files that hold what was painted, for the prompt it was painted for."""
    made, _ = stage(tmp_path, [[0.75, 0.25, 1.0, 0.5]], [[1.0, 2.0, math.inf, -1.0]], keep_fraction=1.0, min_level=0.7)
    made.begin(2, tmp_path)
    found = {}
    for part in ("kept", "refused"):
        folder = tmp_path / "echo" / "round-1" / part
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert {file.name for file in folder.glob("*.png")} == {line["file_name"] for line in lines}
        for line in lines:  # the scripted level is the first value of the picture
            assert abs(read_picture(folder / line["file_name"], 3)[0, 0, 0].item() / 255 - line["level"]) < 0.01
        found[part] = [(line["level"], line["margin"], line["text"]) for line in lines]
    assert found == {"kept": [(1.0, None, "prompt 3"), (0.75, 1.0, "prompt 3")],
                     "refused": [(0.5, -1.0, "prompt 5"), (0.25, 2.0, "prompt 5")]}
    assert sorted(file.name for file in (tmp_path / "echo").iterdir()) == [
        "node-000.safetensors", "report.json", "round-1", "round-1.png", "round-1.safetensors"]


def test_a_run_with_the_stage_is_the_one_without_until_it_starts(tmp_path):
    """Bit for bit: what a comparison of both may train once."""
    start = 2
    plain = make_trainer(tmp_path, make_method(tmp_path), steps=start, name="plain")
    for _ in range(start):
        plain.train_step()
    plain.save()
    shutil.copytree(tmp_path / "plain" / "checkpoints", tmp_path / "forked" / "checkpoints")
    methods = {}
    for name in ("forked", "whole"):
        methods[name] = make_method(tmp_path, echo={"start": start})
        trainer = make_trainer(tmp_path, methods[name], steps=start + 1, name=name)
        assert trainer.step == (start if name == "forked" else 0)
        while not trainer.completed:
            trainer.train_step()
    forked, whole = (weights(method) for method in methods.values())
    assert all(torch.equal(forked[name], value) for name, value in whole.items())
    pools = [method.echo.pool for method in methods.values()]
    assert all(torch.equal(one, other) for one, other in zip(*pools, strict=True))


def test_a_round_that_keeps_nothing_trains_on_the_concepts_own_pictures(tmp_path):
    made, _ = stage(tmp_path, [[0.1, 0.2]], [[1.0, 1.0]])
    made.begin(2, tmp_path)
    assert made.pool is None and made.history[0]["kept"] == 0
    assert not (tmp_path / "echo" / "round-1.png").exists()
    assert [part.name for part in (tmp_path / "echo" / "round-1").iterdir()] == ["refused"]


def test_a_round_that_made_things_worse_is_taken_back(tmp_path):
    good, bad = [1.0, 1.0], [0.0, 0.0]
    weight = torch.zeros(3)
    # before: both good; painting; after: the student is worse.
    made, _ = stage(tmp_path, [good, good, good, bad, good], [good] * 5, {"w": weight}, tolerance=0.1)
    made.begin(2, tmp_path)
    weight += 5
    assert made.begin(4, tmp_path) is True and weight.tolist() == [0.0] * 3
    assert made.history[0]["taken_back_for"] == ["student"]
    assert made.history[0]["before"]["student"]["score"] == 1.0 and made.history[0]["after"]["student"]["score"] == 0.5
    made, _ = stage(tmp_path, [good, good, good, good, bad], [good] * 5, {"w": weight}, tolerance=0.1)
    made.begin(2, tmp_path)
    weight += 5
    made.conclude(3, tmp_path)  # training ends within the round
    assert made.history[0]["taken_back_for"] == ["teacher"] and weight.tolist() == [0.0] * 3
    made, _ = stage(tmp_path, [good, good, good, bad, bad], [good] * 5, {"w": weight}, tolerance=None)
    made.begin(2, tmp_path)
    weight += 5
    assert made.begin(4, tmp_path) is False and weight.tolist() == [5.0] * 3
    assert made.history[0]["taken_back_for"] == []


def test_a_lost_or_damaged_round_stops_a_resume(tmp_path):
    made, _ = stage(tmp_path, [[1.0, 1.0]], [[1.0, 1.0]])
    made.begin(2, tmp_path)
    (tmp_path / "echo" / "round-1.safetensors").write_bytes(b"x")
    again, _ = stage(tmp_path, [[1.0, 1.0]], [[1.0, 1.0]])
    with pytest.raises(UserError, match="round-1.safetensors is missing or damaged"):
        again.begin(3, tmp_path)


def test_taking_back_restores_every_role_and_forgets_the_moments(tmp_path):
    method = make_method(tmp_path, echo={"start": 2, "tolerance": 0.0, "steps": 2})
    trainer = make_trainer(tmp_path, method, steps=5)
    scores = iter([1.0, 0.5, 1.0])
    method.echo.measure = lambda: {"student": {"score": next(scores)}}
    for _ in range(2):
        trainer.train_step()
    before = weights(method)
    for _ in range(2):
        trainer.train_step()
    assert any(not torch.equal(before[name], value) for name, value in weights(method).items())
    restarted = method.begin_step(4, trainer.folder)
    assert set(restarted) == set(method.roles())
    assert all(torch.equal(before[name], value) for name, value in weights(method).items())


# --- mixing


def test_the_batches_of_the_stage_are_mixed_as_asked(tmp_path):
    method = make_method(tmp_path)
    images = torch.full((3, 3, 16, 16), 2.0)  # no picture has such values
    pool = Pool(images, torch.tensor([1, 1, 1]))
    for share in (0.0, 0.25, 1.0):
        method.config.echo.real_fraction = share
        pictures, ids = method.concept.draw(Draw(0, 0, rows=400), pool)
        own = (pictures == 2).flatten(1).all(1)
        assert abs(own.float().mean().item() - (1 - share)) < (0.08 if 0 < share < 1 else 1e-9)
        assert torch.equal((ids == method.concept.ids[1]).all(1), own)
    pictures, _ = method.concept.draw(Draw(0, 0, rows=8), None)
    assert all(any(torch.equal(picture, mine) for mine in method.concept.images) for picture in pictures)


# --- the judge


class MeanColour(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Pixels(nn.Module):
    """Each pixel's colour is the feature of its place."""

    def forward(self, x):
        return x


def judge_of(references, ordinary, prompts=("a cat", "a dog"), masks=None, patches=False):
    kind = "Pixels" if patches else "MeanColour"
    feature_network = load_vision(f"python:tests.methods.echodistill.test_echo_stage:{kind}", "x")
    return Judge(load_teacher(teacher_pipeline()), feature_network, references, ordinary, prompts, masks, patches)


def flat(*colours):
    return torch.tensor(colours)[:, :, None, None].expand(-1, 3, 4, 4)


def test_levels_are_cosines_between_ordinary_pictures_and_the_references_own():
    # References 60 degrees apart have cosine 0.5 among themselves; ordinary pictures have 0 to both.
    references = flat((1.0, 0.0, 0.0), (0.5, 0.75**0.5, 0.0))
    judge = judge_of(references, flat((0.0, 0.0, 1.0), (0.0, 0.0, 3.0)))
    assert (judge.low, judge.high) == (pytest.approx(0, abs=1e-6), pytest.approx(0.5, abs=1e-6))
    made = flat((0.0, 0.0, 2.0), (0.75**0.5, 0.5, 0.0), (1.0, 0.0, 0.0))
    wanted = [0.0, (0.75**0.5) / 0.5, 0.75 / 0.5]
    assert judge.levels(made).tolist() == pytest.approx(wanted, abs=1e-5)
    blind = judge_of(references, references)
    assert blind.levels(made).tolist() == [-torch.inf] * 3


def test_separation_is_d_prime_and_the_share_of_pairs_in_the_wrong_order():
    own, ordinary = torch.tensor([0.9, 0.7, 0.8]), torch.tensor([0.1, 0.7, 0.75, 0.25])
    found = Separation.of(own, ordinary)
    spread = math.sqrt((np.var([0.9, 0.7, 0.8], ddof=1) + np.var([0.1, 0.7, 0.75, 0.25], ddof=1)) / 2)
    assert found.d_prime == pytest.approx((0.8 - 0.45) / spread, rel=1e-6)
    assert found.overlap == pytest.approx((1 + 0.5) / 12)  # 0.75 above 0.7, and 0.7 as high as 0.7
    assert Separation.of(ordinary, own).d_prime == pytest.approx(-found.d_prime)
    assert Separation.of(torch.ones(3), torch.zeros(2)) == Separation(math.inf, 0.0)
    assert Separation.of(torch.ones(3), torch.ones(2)) == Separation(0.0, 0.5)
    assert all(math.isnan(value) for value in asdict(Separation.of(torch.ones(1), torch.zeros(2))).values())


def test_the_judge_leaves_each_reference_out_in_its_turn():
    """Two of three references alike: the third has 0 to both, and each of the two 1 to one of the two others."""
    references = flat((1.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    ordinary = flat((0.0, 0.0, 1.0), (0.0, 1.0, 0.0))
    wanted = Separation.of(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 1 / 3]))
    found = judge_of(references, ordinary).separation
    assert (found.d_prime, found.overlap) == (pytest.approx(wanted.d_prime, rel=1e-5), pytest.approx(wanted.overlap))


def test_masks_take_the_background_out_of_the_references():
    """A red object in a quarter of a green, a blue and a gray picture, beside the same places without it."""
    grounds = flat((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.3, 0.3, 0.3)).clone()
    mask = torch.zeros(3, 1, 4, 4)
    mask[:, :, :2, :2] = 1
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    references = mask * red + (1 - mask) * grounds
    without, masked = judge_of(references, grounds), judge_of(references, grounds, masks=mask)
    assert masked.separation.d_prime > 1.5 * without.separation.d_prime
    # The features are those of the object on grays and on the three colours around the objects.
    around = torch.cat([torch.tensor(PLAIN)[:, None].expand(-1, 3), grounds[:, :, 0, 0]])
    seen = torch.nn.functional.normalize((red[:, 0, 0] + 3 * around) / 4, dim=1).sum(0)
    expected = torch.nn.functional.normalize(seen, dim=0).expand(3, 1, 3)
    torch.testing.assert_close(masked.references.cpu(), expected)


def object_in(ground, object_colours, at):
    """A picture (3, 4, 4) of this ground with pixels of these colours at these places."""
    picture = torch.tensor(ground)[:, None, None].repeat(1, 4, 4)
    for colour, (row, column) in zip(object_colours, at, strict=True):
        picture[:, row, column] = torch.tensor(colour)
    return picture


RED, GREEN, BLUE, GRAY = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0.5, 0.5, 0.5)


def test_patches_find_the_object_in_another_place_on_another_ground():
    """An object of a red and a green pixel; half of it is half as alike, whatever is around, and the whole is 1."""
    places = [[(0, 0), (0, 1)], [(3, 2), (1, 1)]]
    references = torch.stack([object_in(BLUE, (RED, GREEN), places[0]), object_in(GRAY, (RED, GREEN), places[1])])
    masks = torch.zeros(2, 1, 4, 4)
    for mask, ((row, column), (below, right)) in zip(masks, places, strict=True):
        mask[:, row, column] = mask[:, below, right] = 1
    ordinary = torch.stack([object_in(BLUE, (), ()), object_in(BLUE, (BLUE,), [(0, 0)])])
    judge = judge_of(references, ordinary, masks=masks, patches=True)
    assert judge.shares.sum(1).tolist() == [1, 1] and ((judge.shares > 0).sum(1) == 2).all()
    assert (judge.low, judge.high) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    elsewhere = [(2, 0), (0, 3)]
    made = torch.stack([object_in(BLUE, (GREEN, RED), elsewhere), object_in(BLUE, (GREEN,), elsewhere[:1]),
                        object_in(BLUE, (), ())])
    assert judge.levels(made).tolist() == pytest.approx([1, 0.5, 0], abs=1e-6)
    assert judge.separation.d_prime > 1e3 and judge.separation.overlap == 0
    # The mean colour of the whole picture, of the same references and masks, does not see the object.
    assert judge_of(references, ordinary, masks=masks).separation.d_prime < 3
    # Without masks every place counts: of the first reference 14 of 16 are blue, which the plain picture has.
    unmasked = judge_of(references, ordinary, patches=True)
    assert unmasked.low == pytest.approx((14 / 16 + 14 / 16 / 3**0.5) / 2, abs=1e-6)


def test_the_cosine_of_patches_is_the_mean_of_the_best_of_each_place():
    generator = torch.Generator().manual_seed(0)
    references, ordinary = torch.rand(3, 3, 4, 4, generator=generator), torch.rand(2, 3, 4, 4, generator=generator)
    masks = torch.rand(3, 1, 4, 4, generator=generator)
    judge = judge_of(references, ordinary, masks=masks, patches=True)
    around = ((1 - masks) * references).sum((2, 3)) / (1 - masks).sum((2, 3))
    grounds = torch.cat([torch.tensor(PLAIN)[:, None].expand(-1, 3), around])

    def unit(picture):
        return torch.nn.functional.normalize(picture.flatten(1).T, dim=1)

    for n in range(3):
        own = sum(unit(masks[n] * references[n] + (1 - masks[n]) * ground[:, None, None]) for ground in grounds)
        own = torch.nn.functional.normalize(own, dim=1)
        for b in range(2):
            best = (own @ unit(ordinary[b]).T).amax(1)
            wanted = (best * masks[n].flatten()).sum() / masks[n].sum()
            assert judge._alike(ordinary)[b, n].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_patches_need_a_network_that_has_places(tmp_path):
    whole = "python:tests.methods.echodistill.test_echo_stage:MeanColour"
    make_method(tmp_path, identity=whole, discriminators=[], echo={"start": 2})
    make_method(tmp_path, identity=whole, discriminators=[], echo={"features": "patches"})  # no stage, no question
    with pytest.raises(UserError, match="features is patches, but method.identity .*sees the whole picture only"):
        make_method(tmp_path, identity=whole, discriminators=[], echo={"start": 2, "features": "patches"})


def test_the_stage_may_look_with_a_network_that_trains_nothing(tmp_path):
    """``echo.identity`` is the judge's, ``identity`` the losses'; without a stage it is not even loaded."""
    module = "python:tests.methods.echodistill.test_echo_stage"
    own, other = f"{module}:MeanColour", f"{module}:Pixels"
    method = make_method(tmp_path, identity=own, discriminators=[], echo={"start": 2, "identity": other})
    assert method.judging is not method.align.feature_network
    assert method.echo.judge.feature_network is method.judging
    same = make_method(tmp_path, identity=own, discriminators=[], echo={"start": 2})
    assert same.judging is same.align.feature_network
    make_method(tmp_path, identity=own, discriminators=[], echo={"identity": "transformers:nowhere"})
    with pytest.raises(UserError, match="'method.echo.identity' names .*nowhere"):
        make_method(tmp_path, identity=own, discriminators=[], echo={"start": 2, "identity": "transformers:nowhere"})
    with pytest.raises(UserError, match="features is patches, but method.echo.identity .*sees the whole picture only"):
        make_method(tmp_path, identity=other, echo={"start": 2, "features": "patches", "identity": own})


def test_the_stage_runs_on_the_patches_of_a_vision_transformer(tmp_path):
    model = lively(ViTModel(ViTConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=16,
                                      num_hidden_layers=2, num_attention_heads=2)))
    model.save_pretrained(tmp_path / "vit")
    method = make_method(tmp_path, identity=f"transformers:{tmp_path / 'vit'}",
                         echo={"start": 1, "features": "patches"})
    judge = method.echo.judge
    assert judge.references.shape == (4, 4, 16) and judge.shares.tolist() == [[0.25] * 4] * 4
    trainer = make_trainer(tmp_path, method, steps=2)
    while not trainer.completed:
        trainer.train_step()
    assert method.echo.history[0]["separation"]["d_prime"] == pytest.approx(judge.separation.d_prime)
    with pytest.raises(UserError, match="would choose by chance"):
        make_method(tmp_path, identity=f"transformers:{tmp_path / 'vit'}", echo={
            "start": 1, "features": "patches", "min_separation": 1e6}).echo.begin(0, tmp_path)


@pytest.mark.parametrize("separation, words", [
    (Separation(0.26, 0.36), r"d' 0.26, 36 % of pairs .* asks for d' 1.5.*method.identity, masks .*more pictures"),
    (Separation(math.nan, math.nan), "one picture of the concept cannot be compared"),
])  # fmt: skip
def test_a_stage_that_would_choose_by_chance_is_refused_before_the_first_step(tmp_path, monkeypatch, separation, words):
    monkeypatch.setattr(Scripted, "separation", separation)
    made, calls = stage(tmp_path, [[1.0]], [[1.0]], start=20)
    with pytest.raises(UserError, match=words):
        made.begin(0, tmp_path)
    assert not calls and not list(tmp_path.iterdir())
    made, _ = stage(tmp_path, [[1.0]], [[1.0]], start=20, min_separation=None)
    assert made.begin(0, tmp_path) is False
    made, _ = stage(tmp_path, [[1.0]], [[1.0]], start=None)
    assert made.begin(0, tmp_path) is False


def test_the_check_says_what_it_found_once(tmp_path, capsys):
    made, _ = stage(tmp_path, [[1.0]], [[1.0]], start=20)
    made.begin(0, tmp_path)
    made.begin(1, tmp_path)
    assert capsys.readouterr().err.count("d' 9.00, 0 % of pairs") == 1


def test_a_run_with_a_blind_network_is_refused_without_a_step(tmp_path):
    method = make_method(tmp_path, echo={"start": 2, "min_separation": 50.0})
    trainer = make_trainer(tmp_path, method, steps=5)
    before = weights(method)
    for start in (method.check_start, trainer.train_step):  # the first before the run folder is written
        with pytest.raises(UserError, match="the echo stage would choose by chance"):
            start()
    assert all(torch.equal(before[name], value) for name, value in weights(method).items())


def test_margins_say_which_prompt_denoises_a_picture_best():
    judge = judge_of(flat((1.0, 0, 0)), flat((0, 1.0, 0)), ("a cat", "a dog", "the sea"))
    latents, own = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2] * 2)
    found = judge.margins(latents, own)
    errors = torch.stack([judge.error(latents, noise_of(6), torch.full((6,), i)) for i in range(3)], 1)
    others = torch.stack([errors[i, [k for k in range(3) if k != own[i]]].min() for i in range(6)])
    torch.testing.assert_close(found, others - errors[torch.arange(6), own])
    assert (found > 0).any() and (found < 0).any()
    same = judge_of(flat((1.0, 0, 0)), flat((0, 1.0, 0)), ("a cat", "a cat"))
    assert same.margins(latents, torch.zeros(6, dtype=torch.int64)).tolist() == [torch.inf] * 6


def noise_of(rows):
    from flowdistill.utils.randomness import indexed_noise

    return indexed_noise((4, 8, 8), 1, range(rows))
