"""EchoDistill: who learns from what, the exact start and target, and resume."""

import json

import pytest
import torch

from flowdistill.config import OptimizerConfig, StopConfig
from flowdistill.methods.echodistill.echo import Pool
from flowdistill.objectives import alignment
from flowdistill.objectives import distribution_matching as dm
from flowdistill.utils.randomness import Draw, indexed_noise
from tests.echo_world import (
    KEPT,
    TOKEN,
    make_method,
    make_trainer,
    student_pipeline,
    teacher_pipeline,
    weights,
)

EVERY = {"teacher_prior_loss_weight": 0.5, "discriminators": ["small:1", "small:2"], "texture": "gram"}


def bare(method):
    return {name: role.network for name, role in method.roles().items()}


def gradients(method, role):
    """Names of the trained weights that the loss of ``role`` reaches."""
    for other in method.roles().values():
        other.network.zero_grad(set_to_none=True)
    loss, figures = method.loss(role, bare(method), Draw(0, 3, rows=2))
    assert loss.isfinite() and loss.ndim == 0 and all(value.ndim == 0 for value in figures.values())
    loss.backward()
    reached: dict[str, list[str]] = {}
    for name, other in method.roles().items():
        for key, p in other.network.named_parameters():
            if p.grad is not None and p.grad.abs().sum() > 0:
                reached.setdefault(name, []).append(key)
    return reached


# --- who learns from what


def test_the_word_and_the_teacher_learn_from_the_teachers_loss_alone(tmp_path):
    method = make_method(tmp_path, **EVERY)
    word = "word.encoder.embeddings.token_embedding.offset"
    reached = gradients(method, "teacher")
    assert set(reached) == {"teacher"} and word in reached["teacher"]
    assert all(".lora_B." in name for name in reached["teacher"] if name != word)  # A's gradient is B, 0 at the start
    reached = gradients(method, "student")
    assert "teacher" not in reached and reached["student"]
    assert method.word.words.offset.grad is None
    assert all(p.grad is None for p in method.roles()["teacher"].network.parameters())
    assert set(gradients(method, "discriminator")) == {"discriminator"}


def test_the_adversarial_term_reaches_the_student_through_the_frozen_networks(tmp_path):
    off = {"latent_weight": 0.0, "identity_weight": 0.0, "texture": "none", "prior_loss_weight": 0.0}
    method = make_method(tmp_path, **off)
    assert gradients(method, "student")["student"]
    assert not make_method(tmp_path, **off, discriminators=[]).roles().get("discriminator")
    assert not gradients(make_method(tmp_path, **off, discriminators=[]), "student")


def test_prompts_without_pictures_are_not_compared_with_pictures(tmp_path):
    """A discriminator that has seen gray and white alone would teach the student never to paint pink."""
    method = make_method(tmp_path)
    captioned, other = method.word.ids([f"a {TOKEN} c", f"a {TOKEN} on b"])
    draws = [Draw(0, step, rows=4) for step in range(8)]
    ids, pictured = (torch.cat(rows) for rows in zip(*(method.concept.draw_prompts(draw, None) for draw in draws),
                                              strict=True))
    assert pictured.tolist() == [torch.equal(row, captioned) for row in ids] and 0 < pictured.sum() < len(ids)
    pool = Pool(torch.rand(1, 3, 16, 16), torch.tensor([method.concept.prompts.index(f"a {TOKEN} on b")]))
    assert all(method.concept.draw_prompts(draw, pool)[1].all() for draw in draws)
    asked = []

    def teacher(state=None, time=None, ids=None, embeds=None):
        asked.append(ids)
        return method.roles()["teacher"].network(ids=ids)

    method.loss("discriminator", bare(method) | {"teacher": teacher}, Draw(0, 2, rows=4))
    assert len(asked) == 1 and torch.equal(asked[0], captioned.expand(4, -1)) and not torch.equal(captioned, other)
    off = {"latent_weight": 0.0, "identity_weight": 0.0, "texture": "none", "prior_loss_weight": 0.0}
    method = make_method(tmp_path, **off)
    method.concept.captions = torch.tensor([-1])  # no prompt has a picture
    assert not gradients(method, "student")


def test_nothing_frozen_moves_in_training(tmp_path):
    method = make_method(tmp_path, echo={"start": 3}, **EVERY,
                         teacher_optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1))
    frozen = {f"teacher {name}": value for name, value in method.teacher.network.state_dict().items()}
    frozen |= {f"student {name}": value for name, value in method.source.network.state_dict().items()}
    frozen |= {f"text {name}": value for name, value in method.word.encoder.state_dict().items()
               if not name.endswith("offset")}
    frozen |= {f"feature_networks {name}": value for name, value in method.feature_networks.state_dict().items()}
    frozen |= {f"vae {name}": value for name, value in method.teacher.codec.state_dict().items()}
    assert "text embeddings.token_embedding.table.weight" in frozen
    before, trained = {name: value.clone() for name, value in frozen.items()}, weights(method)
    make_trainer(tmp_path, method, steps=6).train()
    assert all(torch.equal(before[name], value) for name, value in frozen.items())
    assert all(not torch.equal(value, trained[name]) for name, value in weights(method).items())


def test_the_best_student_is_kept_with_its_word(tmp_path, monkeypatch):
    """The word is a weight of the teacher's network: without it the student of an earlier step is another one."""
    figures = iter([3.0, 1.0, 2.0])  # at the steps 0, 2 and 4
    monkeypatch.setattr("flowdistill.training.loop.FidCallback", lambda *given: lambda student: {"fid": next(figures)})
    early, late = make_method(tmp_path), make_method(tmp_path)
    make_trainer(tmp_path, early, steps=2, name="early").train()
    trainer = make_trainer(tmp_path, late, steps=4, evaluate_every=2, stop_when=StopConfig())
    trainer.train()
    wanted = {name: value for name, value in weights(early).items() if not name.startswith("discriminator")}
    before = weights(late)
    trainer.take_best()
    after = weights(late)
    assert trainer.stopping.step == 2 and any("word" in name for name in wanted)
    for name, value in wanted.items():
        assert torch.equal(after[name], value) and not torch.equal(before[name], value), name


def test_the_steps_order_and_the_roles(tmp_path):
    method = make_method(tmp_path)
    assert method.schedule(0) == ("teacher", "student", "discriminator")
    assert make_method(tmp_path, discriminators=[]).schedule(5) == ("teacher", "student")


# --- the start and the target


@pytest.mark.parametrize("adapter", ["kv_full", "attention", "all"])
@torch.no_grad()
def test_before_training_the_student_is_the_turbo_pipelines_one_step(tmp_path, adapter):
    pipeline = student_pipeline()
    method = make_method(tmp_path, student=pipeline, adapter=adapter)
    noise = indexed_noise((4, 8, 8), 0, range(2))
    student = method.student()
    made = student(noise, student.encode(prompts=KEPT[:2]))
    base = method.source.denoise(student.t_start * noise, student.t_start, method.source.encode(prompts=KEPT[:2]))
    torch.testing.assert_close(made, base, rtol=1e-6, atol=1e-5)  # the adapted networks are equal bit for bit
    pipeline.set_progress_bar_config(disable=True)
    one_step = pipeline(KEPT[:2], latents=noise.clone(), num_inference_steps=1, guidance_scale=0.0,
                        output_type="latent").images
    torch.testing.assert_close(made, one_step, rtol=1e-4, atol=1e-4)
    word = student(noise, student.encode(prompts=[f"a {TOKEN}"] * 2))
    assert torch.equal(word, student(noise, student.encode(prompts=["a c"] * 2)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_is_ddims_guided_original_sample_of_the_noised_student(tmp_path, prediction):
    pipeline = teacher_pipeline(prediction)
    method = make_method(tmp_path, teacher=pipeline, teacher_guidance_scale=7.5)
    index = torch.tensor([250, 700])
    table = pipeline.scheduler.alphas_cumprod.double()
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (table[index].sqrt(), (1 - table[index]).sqrt()))
    time = (sigma / (alpha + sigma)).flatten()
    sample, noise = indexed_noise((4, 8, 8), 5, range(2)), indexed_noise((4, 8, 8), 6, range(2))
    embeds = method.word(method.word.ids(KEPT[:2])).detach()
    with torch.no_grad():
        found = method.align.target(bare(method)["teacher"], sample, noise, time.float(), embeds)
        native = (alpha * sample + sigma * noise).float()
        empty = pipeline.encode_prompt([""] * 2, "cpu", 1, False)[0]
        raw = [pipeline.unet(native, index, encoder_hidden_states=e).sample.double() for e in (embeds, empty)]
    guided = raw[1] + 7.5 * (raw[0] - raw[1])
    clean = (native - sigma * guided) / alpha if prediction == "epsilon" else alpha * native - sigma * guided
    torch.testing.assert_close(found.double(), clean, rtol=2e-4, atol=2e-4)
    assert alignment.signal_share(time).tolist() == pytest.approx(table[index].tolist(), rel=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_teachers_loss_is_the_mean_squared_error_of_its_own_prediction(tmp_path, prediction):
    pipeline = teacher_pipeline(prediction)
    method = make_method(tmp_path, teacher=pipeline)
    loss, _ = method.loss("teacher", bare(method), Draw(4, 1, rows=2))
    draw = Draw(4, 1, rows=2)  # the same numbers once more
    images, ids = method.concept.draw(draw, None)
    noise, time = draw.normal((4, 8, 8)), method.config.time.draw(method.teacher, draw)
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    alpha, sigma = (value.reshape(-1, 1, 1, 1).float() for value in method.teacher.path.alpha_sigma(time))
    timestep = method.teacher.path.coefficients(time).timestep.float()
    target = noise if prediction == "epsilon" else alpha * noise - sigma * latents
    raw = pipeline.unet(alpha * latents + sigma * noise, timestep, encoder_hidden_states=method.word(ids)).sample
    torch.testing.assert_close(loss, (raw - target).square().mean(), rtol=1e-4, atol=1e-5)


def test_the_students_terms_are_their_weights_times_the_objectives(tmp_path):
    method = make_method(tmp_path, latent_weight=2.0, identity_weight=0.3, texture_weight=0.7, adversarial_weight=0.2,
                         prior_loss_weight=0.4)
    _, figures = method.loss("student", bare(method), Draw(0, 1, rows=2))
    draw, config = Draw(0, 1, rows=2), method.config
    noise, (ids, pictured) = draw.normal((4, 8, 8)), method.concept.draw_prompts(draw, None)
    before, other, _, _ = method.kept.draw(draw)
    embeds = method.word(ids).detach()
    with torch.no_grad():
        sample = method.generate(bare(method), noise, embeds)
        time = config.alignment_time.draw(method.teacher, draw)
        share = alignment.signal_share(time)
        target = method.align.target(bare(method)["teacher"], sample, noise, time, embeds)
        pictures, wanted = (method.teacher.codec.pixels(x) for x in (sample, target))
        seen, goal = (method.align.feature_network(x).pooled for x in (pictures, wanted))
        # As the authors: in Lab, of images in [-1, 1]; 16 pixels have three levels with room for a patch.
        texture = alignment.sliced_wasserstein(2 * pictures - 1, 2 * wanted - 1, draw.normal((3, 128, 3, 5, 5)))
        logits = bare(method)["discriminator"]([method.critics[0](pictures).pooled])
    expected = {
        "prior": 0.0,  # nothing has changed yet
        "latent": (2.0 * share * 0.5 * (sample - target).square().mean((1, 2, 3))).mean().item(),
        "identity": (0.3 * share * alignment.identity_distance(seen, goal)).mean().item(),
        "texture": (0.7 * share * texture).mean().item(),
        "adversarial": 0.2 * (pictured * torch.nn.functional.softplus(-logits).sum(1)).mean().item(),
    }
    assert set(figures) == set(expected)
    for name, value in expected.items():
        assert figures[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_prior_terms_measure_the_distance_to_the_untrained_models(tmp_path):
    method = make_method(tmp_path, teacher_prior_loss_weight=0.5, prior_loss_weight=0.5)
    draws = [Draw(0, 1, rows=2) for _ in range(2)]
    for name, draw in zip(("student", "teacher"), draws, strict=True):
        assert method.loss(name, bare(method), draw)[1]["prior"].item() < 1e-9
    with torch.no_grad():
        for value in method.trained().values():
            value.add_(0.05)
    student, _ = bare(method)["student"], draws
    draw = Draw(0, 1, rows=2)
    found = method.loss("student", bare(method), draw)[1]["prior"].item()
    draw = Draw(0, 1, rows=2)
    draw.normal((4, 8, 8)), method.concept.draw_prompts(draw, None)
    before, noise, condition, ids = method.kept.draw(draw)
    assert torch.equal(method.word(ids), condition.tensors["prompt_embeds"])
    with torch.no_grad():
        now = dm.noised(noise, noise, torch.ones(2)) * method.student().t_start
        time = torch.full((2,), method.student().t_start, dtype=torch.float64)
        now = now - method.student().t_start * student(now, time, condition)
    assert found == pytest.approx((0.5 * 0.5 * (now - before).square().mean()).item(), rel=1e-4) and found > 1e-4
    assert method.loss("teacher", bare(method), Draw(0, 1, rows=2))[1]["prior"].item() > 1e-6


# --- the loop


def test_resume_is_bit_for_bit_and_seeds_decide_everything(tmp_path):
    changes = {"echo": {"start": 2, "steps": 2}, **EVERY}
    ways = {"whole": [5], "parts": [1, 3, 4, 5]}  # before the stage, within its round, at the round's end
    found = {}
    for name, stops in ways.items():
        for stop in stops:
            method = make_method(tmp_path, **changes)
            trainer = make_trainer(tmp_path, method, steps=stop, name=name)
            trainer.train()
        found[name] = weights(method), trainer.student().generate(num_images=2, seed=1)
    assert all(torch.equal(value, found["parts"][0][name]) for name, value in found["whole"][0].items())
    assert torch.equal(found["whole"][1], found["parts"][1])
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ways]
    timed = ("seconds", "images_per_second")
    plain = [[{key: value for key, value in line.items() if key not in timed} for line in each] for each in lines]
    assert plain[0] == plain[1]


def test_without_the_echo_stage_all_is_as_before_it(tmp_path):
    runs = {}
    for name, echo in (("none", {}), ("later", {"start": 4, "rate": 0.25})):
        method = make_method(tmp_path, echo=echo)
        trainer = make_trainer(tmp_path, method, steps=6, name=name)
        seen = []
        for _ in range(6):
            trainer.train_step()
            seen.append((weights(method), trainer.roles["student"].optimizer.param_groups[0]["lr"]))
        runs[name] = seen
    equal = [all(torch.equal(one[0][key], other[0][key]) for key in one[0])
             for one, other in zip(runs["none"], runs["later"], strict=True)]
    assert equal == [True] * 4 + [False] * 2
    assert [rate for _, rate in runs["later"]] == [1e-3] * 4 + [2.5e-4] * 2
