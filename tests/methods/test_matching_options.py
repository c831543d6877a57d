"""Score distillation's options: guidance at levels of its own, other divergences, the penalty on the discriminator's
slope, and the critic that follows the generator. Closed forms in float64, and real backbones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flowdistill.conditioning.conditions import ClassLabels
from flowdistill.config import OptimizerConfig, RunConfig, TeacherConfig, TrainConfig
from flowdistill.methods.disback import DisBack, DisBackConfig
from flowdistill.methods.score_distillation import DiffInstruct, Dmd2, Dmd2Config, HostConfig, ScoreDistillation, Sid
from flowdistill.networks.lora import LoraSettings
from flowdistill.objectives import adversarial
from flowdistill.objectives import distribution_matching as dm
from flowdistill.teachers import load_teacher
from flowdistill.teachers.exact import GaussianVelocity, linear_path
from flowdistill.teachers.noise_levels import NoiseLevels
from flowdistill.teachers.teacher import Teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from flowdistill.utils.errors import UserError
from tests.families import FAMILIES, PROMPTS
from tests.methods.test_few_step import StepwiseStudent
from tests.methods.test_score_distillation import DoubleDraw, Draw, adversarial_method
from tests.tiny import tiny_unet_pipeline
from tests.toy_method import weights

TIMES, SCALE = (1.0, 0.6, 0.3), 3.0
OTHERS = [name for name in adversarial.DIVERGENCES if name != "rkl"]


def gaussian(mean, std):
    return GaussianVelocity(torch.tensor(mean, dtype=torch.float64), std)


class TwoSided(nn.Module):
    """A class of its own law, and another law without a class (label 1); counts the rows that it is asked for."""

    def __init__(self):
        super().__init__()
        self.sides, self.rows = [gaussian([1.0, -0.5], 0.4), gaussian([0.2, 0.1], 0.9)], []

    def forward(self, x, t, condition=None):
        self.rows.append(len(x))
        null = condition.tensors["class_labels"].bool()[:, None]
        return torch.where(null, self.sides[1](x, t), self.sides[0](x, t))


class Judge(nn.Module):
    """A critic of a given law whose logits are a given function of (x, t)."""

    def __init__(self, velocity, logits=None):
        super().__init__()
        self.law, self.logits, self.asked = [velocity], [logits], []

    def forward(self, x, t, condition=None, logits=False):
        self.asked.append(logits)
        velocity = self.law[0](x, t)
        return (velocity, self.logits[0](x, t)) if logits else velocity


CRITIC = gaussian([0.6, 0.3], 0.5)


def two_sided(times=TIMES, **settings):
    teacher = Teacher(TwoSided(), linear_path(), (2,), classes=ClassLabels(1, null_label=1), source="exact")
    config = HostConfig(guidance_scale=SCALE, steps=len(times), step_times=list(times), **settings)
    student = StepwiseStudent(times, [0.5] * len(times))
    return ScoreDistillation(config, teacher, student, Judge(CRITIC))


def samples(rows=64):
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradient_of(method, k=1, critic=None, rows=64, draw=None):
    condition = method.teacher.encode([0] * rows)
    return method.matching_gradient(samples(rows), condition, critic or method.critic,
                                    draw or DoubleDraw(0, 0, rows=rows), k)


# --- guidance at levels of its own


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("weighting", ["dmd", "diff_instruct"])
def test_guidance_is_drawn_below_the_call_and_matching_everywhere(weighting, k):
    method = two_sided(weighting=weighting, decoupled_guidance=True)
    got = gradient_of(method, k)
    assert method.teacher.network.rows == [128, 128] and method.critic.asked == [False]  # each pass on both sides
    draw, x = DoubleDraw(0, 0, rows=64), samples()
    t, n = NoiseLevels(low=0.02, high=0.98).draw(method.teacher, draw), draw.normal((2,))
    s = 0.02 + (min(TIMES[k - 1], 0.98) - 0.02) * draw.uniform()
    assert s.max() < TIMES[k - 1] and s.max() > 0.9 * min(TIMES[k - 1], 0.98) and t.max() > 0.9
    (own, null), column = method.teacher.network.sides, lambda value: value[:, None]
    state, lower = dm.noised(x, n, t), dm.noised(x, n, s)
    matching = -column(t) * (CRITIC(state, t) - own(state, t))  # as estimates of the data
    augmentation = -column(s) * (SCALE - 1) * (own(lower, s) - null(lower, s))
    error = null(state, t) + SCALE * (own(state, t) - null(state, t)) - (n - x)
    size = 1.0 if weighting == "diff_instruct" else (column(t) * error).abs().mean(dim=1, keepdim=True)
    assert torch.allclose(got, (matching - augmentation) / size, rtol=1e-10, atol=1e-12)


def test_without_guidance_there_is_no_second_pass():
    """What DisBack's node_guidance may come to: plain matching, bit for bit, and no further draw."""
    plain, decoupled = two_sided(), two_sided(decoupled_guidance=True)
    found = []
    for method in (plain, decoupled):
        method.guidance_scale, draw = 1.0, DoubleDraw(0, 0, rows=64)
        found.append((gradient_of(method, draw=draw), draw.normal((2,))))
        assert method.teacher.network.rows == [64]
    assert all(map(torch.equal, *found))
    guided = gradient_of(two_sided())
    assert (guided - gradient_of(two_sided(decoupled_guidance=True))).abs().mean() > 0.1


def test_guidance_pushes_a_matched_student_further():
    """With a critic that is the conditional teacher, descent goes from the null mean to the class's and beyond it."""
    method = two_sided(decoupled_guidance=True)
    law = method.teacher.network.sides[0]
    step = -gradient_of(method, 2, Judge(law), 4096).mean(0)
    assert step[0] > 0.1 and step[1] < -0.1  # from (0.2, 0.1) towards (1.0, -0.5)


LEVELS = {
    "uniform": NoiseLevels(low=0.1),
    "timestep": NoiseLevels("timestep", low=0.1),
    "logit_normal": NoiseLevels("logit_normal"),
    "karras": NoiseLevels("karras"),
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_below_are_the_same_distribution_cut_off(name):
    from diffusers import DDPMScheduler

    teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler()), null_label=3)
    levels, most = LEVELS[name], 0.5
    whole, cut = (levels.draw(teacher, Draw(0, 0, rows=20_000), below=below).double() for below in (None, most))
    assert whole.max() > 0.7 and cut.max() <= most and cut.dtype == torch.float64
    expected = whole[whole <= most]
    for share in (0.1, 0.5, 0.9):
        assert cut.quantile(share).item() == pytest.approx(expected.quantile(share).item(), abs=0.012)
    free = levels.draw(teacher, Draw(0, 0, rows=20_000), below=teacher.t_max).double()
    assert free.quantile(0.5).item() == pytest.approx(whole.quantile(0.5).item(), abs=0.012)
    assert levels.reaches_below(teacher, most) and not replace(levels, low=0.9).reaches_below(teacher, 0.01)


@pytest.mark.parametrize("kind", [DiffInstruct, Dmd2])
@pytest.mark.parametrize("path", ["flow", "epsilon", "text"])
def test_decoupled_training_on_real_backbones(path, kind):
    from diffusers import DDPMScheduler

    if path == "text":
        teacher = load_teacher(FAMILIES["sd3"].make(), prompts=PROMPTS)
    else:
        teacher = load_teacher(tiny_unet_pipeline(DDPMScheduler() if path == "epsilon" else None), null_label=3)
    method = kind(kind.Config(guidance_scale=3.0, decoupled_guidance=True, steps=2), teacher)
    networks = {name: role.network for name, role in method.roles().items()}
    for step in range(2):
        loss, _ = method.loss("student", networks, Draw(0, step, rows=4))
        loss.backward()
        assert loss.isfinite() and all(p.grad is None for p in networks["critic"].parameters())
    assert any(p.grad.abs().max() > 0 for p in networks["student"].parameters() if p.grad is not None)


# --- other divergences


def toy_judge(logits):
    method = two_sided(times=(1.0,))
    return method, Judge(CRITIC, logits)


def with_divergence(method, name, **settings):
    method.config = replace(method.config, divergence=name, **settings)
    return method


def linear_logits(x, t):
    return 0.8 * x[:, 0] - 0.3 * t


def test_the_default_never_asks_for_logits():
    method, judge = toy_judge(linear_logits)
    assert torch.equal(gradient_of(method, critic=judge), gradient_of(method)) and judge.asked == [False]


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_each_samples_gradient_is_weighted_by_its_ratio(name, decoupled):
    """Against the logits at the very state of matching, and by one pass of the critic."""
    method, judge = toy_judge(linear_logits)
    method.config = replace(method.config, decoupled_guidance=decoupled)
    plain = gradient_of(method, critic=judge)
    judge.asked.clear()
    got = gradient_of(with_divergence(method, name), critic=judge)
    assert judge.asked == [True]
    draw = DoubleDraw(0, 0, rows=64)
    t, n = method.config.time.draw(method.teacher, draw), draw.normal((2,))
    h = adversarial.divergence_weight(name, linear_logits(dm.noised(samples(), n, t), t))
    assert torch.allclose(got, (h / h.mean())[:, None] * plain, rtol=1e-12)
    assert not torch.allclose(got, plain, rtol=0.1)
    equal = Judge(CRITIC, lambda x, t: torch.full_like(t, 0.4))
    assert torch.allclose(gradient_of(method, critic=equal), plain, rtol=2e-15, atol=0)


def test_the_mean_of_the_weights_is_that_of_all_processes():
    class Other(DoubleDraw):
        def mean(self, x):
            return super().mean(x) * 2  # as if the other process had three times as much

    method, judge = toy_judge(linear_logits)
    with_divergence(method, "kl")
    one, two = (gradient_of(method, critic=judge, draw=kind(0, 0, rows=64)) for kind in (DoubleDraw, Other))
    assert torch.allclose(two, one / 2, rtol=1e-14)


@pytest.mark.parametrize("name", ["rkl", "js"])
def test_divergences_on_a_real_backbone(name):
    method, networks = adversarial_method(divergence=name, steps=2, critic_told_step=name == "js")
    with torch.no_grad():
        method.score.velocity.backbone.conv_out.bias.add_(0.1)
    loss, metrics = method.loss("student", networks, Draw(0, 0, rows=8))
    loss.backward()
    assert loss.isfinite() and metrics["gradient_size"] > 0
    assert all(p.grad is None for p in networks["critic"].parameters())


# --- the penalty on the discriminator's slope


def recorded(method, networks, logits=None):
    """The critic's loss, and what the critic was asked; ``logits`` (3 B,) instead of its own."""
    seen = []

    def critic(x, t, condition, logits=False):
        velocity, own = networks["critic"](x, t, condition, logits=True)
        seen.append((x, t, condition, own))
        return velocity, own

    loss, metrics = method.loss("critic", networks | {"critic": critic}, Draw(0, 0, rows=8))
    assert len(seen) == 1  # one pass
    return loss, metrics, seen[0]


def test_noised_real_samples_are_perturbed():
    plain, penalised = (adversarial_method(adversarial_critic_weight=0.5, **settings)
                        for settings in ({}, {"r1_weight": 3e4, "r1_scale": 0.05}))
    without, _, (states, *_) = recorded(*plain)
    loss, metrics, (x, t, condition, logits) = recorded(*penalised)
    assert x.shape[0] == 24 and torch.equal(x[:16], states)  # all other draws are the same
    fake, real, moved = x.chunk(3)
    change = (moved - real) / 0.05
    assert change.mean().item() == pytest.approx(0, abs=0.2) and change.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(t[:8], t[8:16]) and torch.equal(t[:8], t[16:])
    labels = condition.tensors["class_labels"]
    assert torch.equal(labels[8:16], labels[16:])
    penalty = (logits[8:16] - logits[16:]).square().mean()
    assert metrics["slope_penalty"].item() == pytest.approx(penalty.item(), rel=1e-6) and penalty > 0
    assert (loss - without).item() == pytest.approx(0.5 * 3e4 * penalty.item(), rel=1e-3)


def test_the_penalty_flattens_the_discriminator():
    slopes = []
    for weight in (0.0, 1e4):
        method, networks = adversarial_method(adversarial_critic_weight=1.0, r1_weight=weight)
        optimizer = torch.optim.AdamW(networks["critic"].head.parameters(), lr=1e-2)
        for step in range(12):
            optimizer.zero_grad()
            method.loss("critic", networks, Draw(0, step, rows=8))[0].backward()
            optimizer.step()
        method.config = replace(method.config, r1_weight=1.0)
        slopes.append(method.loss("critic", networks, Draw(1, 0, rows=64))[1]["slope_penalty"].item())
    assert slopes[1] < 0.3 * slopes[0]


# --- a critic that follows


def trainer_of(folder, length, **settings):
    teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=11), null_label=10)
    rates = {key: OptimizerConfig(lr=1e-3) for key in ("optimizer", "critic_optimizer")}
    config = RunConfig(output_dir=str(folder), teacher=TeacherConfig(source="tiny"), method=None, train=TrainConfig(
        steps=length, batch_size=8, log_every=1, num_samples=4, trackers=[], device="cpu", precision="fp32"))
    torch.manual_seed(0)
    method = Dmd2(Dmd2Config(**rates, **settings), teacher)
    config.method = method.config
    return Trainer(method, config, Path(folder), make_accelerator(config.train, folder))


def named(network):
    return {name: value.detach().clone() for name, value in network.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"adversarial_weight": 0.1, "data": "digits", "steps": 2,
                                           "critic_told_step": True}])
def test_the_critic_takes_its_share_after_each_generator_step(settings, tmp_path):
    trainer = trainer_of(tmp_path, 1, critic_follow=0.25, critic_updates=2, **settings)
    method, before = trainer.method, {}
    update = type(method).after_update

    def watched(role):
        student, critic = named(method.roles()["student"].network), named(method.roles()["critic"].network)
        update(method, role)
        after = named(method.roles()["critic"].network)
        if role == "critic":
            assert all(torch.equal(after[name], value) for name, value in critic.items())
            return
        before.update(critic)
        inside = "critic." if settings else ""
        for name, value in critic.items():
            theirs = student.get(name.removeprefix(inside))
            if theirs is None:
                assert name.startswith(("head.", "critic.embeddings.")) and torch.equal(after[name], value)
            else:
                assert torch.allclose(after[name], 0.75 * value + 0.25 * theirs, rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(after[name], value) for name, value in critic.items())
        assert all(torch.equal(value, student[name])
                   for name, value in named(method.roles()["student"].network).items())

    method.after_update = watched
    trainer.train_step()
    assert before


def test_a_resumed_run_that_follows_equals_an_uninterrupted_one(tmp_path):
    found = {}
    for name, lengths, share in (("whole", [2], 0.1), ("parts", [1, 2], 0.1), ("plain", [2], 0.0)):
        for length in lengths:
            trainer = trainer_of(tmp_path / name, length, critic_follow=share)
            assert trainer.step == (length - 1 if name == "parts" else 0)
            trainer.train()
        found[name] = weights(trainer)
    assert all(torch.equal(value, found["parts"][name]) for name, value in found["whole"].items())
    assert not all(torch.equal(value, found["plain"][name]) for name, value in found["whole"].items())


def test_disbacks_critic_follows_in_its_second_stage_only(monkeypatch):
    teacher = load_teacher(tiny_unet_pipeline(), null_label=3)
    method = DisBack(DisBackConfig(degradation_steps=2, degradation_every=1, interval=[9],
                                   host=HostConfig(critic_follow=1.0)), teacher)
    with torch.no_grad():
        next(method.roles()["student"].network.parameters()).add_(1)
    start = named(method.host.score)
    for role in method.schedule(0):
        method.after_update(role)
    assert all(torch.equal(value, start[name]) for name, value in named(method.host.score).items())
    for role in method.schedule(2):
        method.after_update(role)
    student = named(method.roles()["student"].network)
    assert all(torch.equal(value, student[name]) for name, value in named(method.host.score).items())


# --- refusals


def guided(**settings):
    return lambda: Dmd2(Dmd2Config(**settings), load_teacher(tiny_unet_pipeline(), null_label=3))


REFUSED = {
    "no guidance": (guided(decoupled_guidance=True), "guidance_scale is 1, which is no guidance"),
    "sid": (lambda: Sid(Sid.Config(decoupled_guidance=True, guidance_scale=2.0), None),
            "method.decoupled_guidance is true, but the weighting sid is no weight of one difference"),
    "sid divergence": (lambda: Sid(Sid.Config(divergence="js", adversarial_weight=0.1, data="digits"), None),
                       "method.divergence is js, but the weighting sid"),
    "unconditional": (
        lambda: Dmd2(Dmd2Config(decoupled_guidance=True, guidance_scale=2.0),
                     load_teacher(tiny_unet_pipeline(num_class_embeds=None))), "the teacher has no null label"),
    "embedded": (
        lambda: Dmd2(Dmd2Config(decoupled_guidance=True, guidance_scale=2.0),
                     load_teacher(FAMILIES["flux-dev"].make(), image_size=16, prompts=PROMPTS)),
        "guidance is an input of the teacher's network, which makes one prediction"),
    "too low": (guided(decoupled_guidance=True, guidance_scale=2.0, steps=2, step_times=[1.0, 0.01]),
                "the last call is at t = 0.0100, below which method.time has no noise level"),
    "divergence": (guided(divergence="kl"), "method.divergence is kl, which needs the discriminator"),
    "unknown": (guided(divergence="chi2"), "'method.divergence' must be one of"),
    "slope": (guided(r1_weight=1.0), r"method.r1_weight is 1.0, which needs the discriminator"),
    "share": (guided(critic_follow=1.5), "'method.critic_follow' must be at least 0 and at most 1"),
    "adapters": (guided(critic_follow=0.1, student="lora", critic="lora", lora=LoraSettings(2)),
                 "the mean of two adapters' factors is not that of what they add; set it to 0"),
    "one adapter": (guided(critic_follow=0.1, critic="lora", lora=LoraSettings(2)), "full copies of one network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_in_one_sentence(name):
    make, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_smaller_generator_is_not_followed():
    teacher = load_teacher(tiny_unet_pipeline(), null_label=3)
    teacher.start = load_teacher(tiny_unet_pipeline(), null_label=3).network
    teacher.start.backbone.conv_out = nn.Conv2d(8, 1, 1)
    with pytest.raises(UserError, match="their networks differ in shape; set it to 0"):
        Dmd2(Dmd2Config(critic_follow=0.1), teacher)
