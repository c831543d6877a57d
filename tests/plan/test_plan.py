"""The plan against real runs: bytes of weights, gradients and optimiser exactly, activations within a factor."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from flowdistill.config import load_config
from flowdistill.plan import advice, make_plan, memory
from flowdistill.plan.advice import GIB, RESERVED, advise, fits
from flowdistill.plan.memory import Part, Plan
from flowdistill.plan.meta_teacher import meta_teacher, read_architecture
from flowdistill.plan.report import _gib, passes
from flowdistill.plan.simulation import Live
from flowdistill.teachers import load_teacher
from flowdistill.teachers.codec import VaeCodec
from flowdistill.training import loop, run
from flowdistill.training.run import distill, method_class
from flowdistill.utils import quantized
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.families import FAMILIES, PROMPTS
from tests.measured_memory import BACKWARD, real_peaks
from tests.processes import ROOT
from tests.tiny import tiny_dit_pipeline, vae

TEXT = [name for name, family in FAMILIES.items() if family.prompts]
WITHIN = 1.35
"""The factor within which activations are estimated."""


def written(tmp_path, pipeline, method, train=None, **teacher):
    """A configuration file for a run of a pipeline that is written beside it."""
    pipeline.save_pretrained(tmp_path / "pipeline")
    if "text_encoder" in pipeline.components:
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        teacher["prompts"] = str(tmp_path / "prompts.txt")
    settings = {
        "output_dir": str(tmp_path / "run"), "method": method, "evaluation": {"at_end": False},
        "teacher": {"source": str(tmp_path / "pipeline"), **teacher},
        "train": {"steps": 1, "batch_size": 4, "trackers": [], "num_samples": 2, "device": "cpu"} | (train or {}),
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "a.yaml"


class Counted(loop.Trainer):
    """A trainer that counts what a plan plans, at its first step."""

    def train(self):
        seen = set()

        def own(module):
            tensors = [*module.parameters(), *module.buffers()]
            fresh = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
            total = sum(size for place, size in fresh.items() if place not in seen)
            seen.update(fresh)
            return total

        Counted.real = {"teacher": {"weights": own(self.method.teacher.network)}}
        if list(self.method.teacher.codec.parameters()):
            Counted.real["autoencoder"] = {"weights": own(self.method.teacher.codec)}
        for name, role in self.roles.items():
            Counted.real[name] = {"weights": own(role.network)}
        for name, role in self.roles.items():
            Counted.real[name]["average"] = 0 if role.average is None else own(role.average.network)
        if getattr(self.method, "node", None) is not None:
            Counted.real["other networks"] = {"weights": own(self.method.node)}
        apply = loop.apply_update

        def counting(optimizer, *args):
            (name,) = (name for name, role in self.roles.items() if role.optimizer is optimizer)
            parameters = self.roles[name].network.parameters()
            Counted.gradients[name] = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            return apply(optimizer, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "apply_update", counting)
            super().train()
        for name, role in self.roles.items():
            state = [v for values in role.optimizer.state.values() for v in values.values()]
            tensors = [v for v in state if isinstance(v, torch.Tensor)]
            storages = {v.untyped_storage().data_ptr(): v.nbytes for v in tensors}  # some share a table
            gradients = Counted.gradients.get(name, 0)
            Counted.real[name] |= {"optimizer": sum(storages.values()), "gradients": gradients}


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 is the first that has it")
RUNS = {
    "freeflow": ("dit", {"name": "freeflow", "guidance_max": 2.0}, {}),
    "boot": ("sd3", {"name": "boot"}, {}),
    "consistency": ("sd", {"name": "consistency", "steps": 4, "student": "lora", "lora": {"rank": 2}, "pairs": 6,
                           "pairs_steps": 1, "guidance_min": 2.0, "guidance_max": 4.0}, {"dtype": "bfloat16"}),
    "consistency, averaged target": ("dit", {"name": "consistency", "target": "ema", "pairs": 6, "pairs_steps": 1}, {}),
    "flow_map_matching": ("sd3", {"name": "flow_map_matching", "steps": 2}, {"dtype": "bfloat16"}),
    "flow_map_matching, corrected": ("dit", {"name": "flow_map_matching", "steps": 2, "correction_strength": 1.0,
                                             "guidance_max": 2.0, "states": "pairs", "pairs": 6, "pairs_steps": 1}, {}),
    "dmd2, half teacher": ("sd", {"name": "dmd2", "critic_updates": 2}, {"dtype": "bfloat16"}),
    "sid, no guidance": ("ddim", {"name": "sid"}, {}),
    "lora critic": ("flux-dev", {"name": "freeflow", "critic": "lora", "critic_lora_rank": 2}, {"dtype": "bfloat16"}),
    "lora student": ("dit", {"name": "dmd2", "student": "lora", "critic": "lora", "lora": {"rank": 2}},
                     {"dtype": "bfloat16"}),
    "other optimisers": ("sd", {"name": "dmd2", "optimizer": {"name": "adamw8bit"},
                                "critic_optimizer": {"name": "muon"}}, {}),
    "quantised teacher": ("dit", {"name": "dmd2", "critic": "lora", "lora": {"rank": 2}}, {"quantize": "int8"}),
    "disback": ("dit", {"name": "disback", "degradation_steps": 1, "degradation_every": 1}, {"dtype": "float16"}),
    "disback, more nodes": ("edm", {"name": "disback", "degradation_steps": 2, "degradation_every": 1}, {}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_muon if name == "other optimisers" else ())
                                  for name in RUNS])
def test_bytes_are_those_of_a_run(tmp_path, monkeypatch, name):
    monkeypatch.setattr(quantized, "SMALLEST", 64)
    family, method, teacher = RUNS[name]
    file = written(tmp_path, FAMILIES[family].make(), method, {"steps": 3}, **teacher)
    if FAMILIES[family].image_size:
        file.write_text(file.read_text().replace("teacher:", f"teacher:\n  image_size: {FAMILIES[family].image_size}"))
    plan = make_plan(load_config(file))
    monkeypatch.setattr(run, "Trainer", Counted)
    monkeypatch.setattr(Counted, "gradients", {}, raising=False)
    monkeypatch.setattr(Counted, "real", {}, raising=False)
    monkeypatch.setattr(run, "_save_comparison", lambda *args: None)
    distill(file)
    planned = {
        part: {key: getattr(plan.parts[part], key) for key in figures} for part, figures in Counted.real.items()
    }
    assert plan.activations.keys() == Counted.gradients.keys()  # roles that are updated
    assert planned == Counted.real and plan.parts.keys() == Counted.real.keys()
    assert all(figures["weights"] for part, figures in planned.items())
    assert planned["student"]["gradients"] > 0 and planned["student"]["optimizer"] > 0


def test_storages_are_counted_once_each_however_often_a_shape_comes():
    """What torch has said of some shapes and types is remembered: a new storage for a product, none for a view."""
    x, w = torch.empty(4, 8, device="meta"), torch.empty(8, 8, device="meta")
    with Live() as live:
        a, b = x @ w, x @ w
        views = [a.view(8, 4), b.view(8, 4), b.add_(1), *a.chunk(2), *b.chunk(2)]
        views += [torch.ops.aten._unsafe_view(one, [8, 4]) for one in (a, b)]  # no view by its schema
        numbers = [live.number(one) for one in (a, b, *views)]
        assert numbers == [1, 2, 1, 2, 2, 1, 1, 2, 2, 1, 2] and live.number(x) is None
        norms = [torch.native_layer_norm(x, [8], None, None, 1e-5) for _ in range(2)]  # with a mean and a scale a row
        assert [live.number(part) for norm in norms for part in norm] == [3, 4, 5, 6, 7, 8]
        assert live.events == [*enumerate([128, 128, *[128, 16, 16] * 2], start=1)]
        del a, views
        half = x.to(torch.bfloat16) @ w.to(torch.bfloat16)
        assert live.number(half) == 11 and live.peak() == 128 + 2 * 160 + 64 + 128 + 64
        whole = x.long()
        assert (whole * 2).dtype == torch.int64 and (whole * 2.0).dtype == torch.float32  # although 2 == 2.0


def test_what_was_there_is_not_counted_when_it_is_looked_at():
    """A layer's weight is transposed in its pass: a view of a storage that the plan has among the weights."""
    layer, x = torch.nn.Linear(8, 4, device="meta"), torch.empty(2, 3, 8, device="meta")
    with Live() as live, torch.no_grad():
        out = layer(x)
        x.add_(1)
        view = layer.weight.t()[1:].reshape(-1, 2)
    assert live.number(layer.weight) is live.number(x) is live.number(layer.bias) is None
    assert live.number(out) is not None and live.number(view) is not None
    assert live.peak() == out.nbytes + view.nbytes  # the last one is a copy


WIDE = {"num_attention_heads": 4, "attention_head_dim": 16, "sample_size": 16}
CASES = {
    "float32": ({}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "bf16": ({"precision": "bf16"}, {}),
    "bf16, checkpointing": ({"precision": "bf16", "gradient_checkpointing": True}, {}),
    "math": ({}, {"attention": "math"}),
}


@pytest.mark.parametrize("method", ["freeflow", "dmd2", "sid"])
@pytest.mark.parametrize("case", CASES)
def test_activations_are_near_a_measurement(tmp_path, case, method):
    train, teacher = CASES[case]
    pipeline = tiny_dit_pipeline(layers=4, **WIDE)
    file = written(tmp_path, pipeline, {"name": method}, {"batch_size": 16} | train, **teacher)
    config = load_config(file)
    plan = make_plan(config)
    built = method_class(method)(config.method, load_teacher(config.teacher.source, **teacher))
    roles = {name: role.network for name, role in built.roles().items()}
    calls = dict(roles)
    for name, network in roles.items():
        if config.train.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if config.train.precision == "bf16":
            calls[name] = loop_call(network)
    for role in roles:
        def update():
            loss = built.loss(role, calls, Draw(0, 0, rows=16))[0]  # noqa: B023
            with torch.profiler.record_function(BACKWARD):
                loss.backward()

        update()  # what is made once
        for network in roles.values():
            network.zero_grad()
        (ahead, measured), planned = real_peaks(update), plan.activations[role] + plan.parts[role].gradients
        assert ahead / WITHIN < plan.forward[role] < ahead * WITHIN, (role, plan.forward[role] / ahead)
        print(f"{method}, {case}, {role}: measured {measured / 2**20:.2f} MiB, planned {planned / 2**20:.2f}")
        assert measured / WITHIN < planned < measured * WITHIN, (role, planned / measured)
        for network in roles.values():
            network.zero_grad()


def loop_call(network):
    from flowdistill.training.precision import HalfPrecisionForward

    return HalfPrecisionForward(network, "bf16", torch.device("cpu"))


@pytest.mark.parametrize("name", TEXT)
def test_prompts_have_the_shapes_of_encoded_ones(tmp_path, name):
    family = FAMILIES[name]
    pipeline = family.make()
    encoded = load_teacher(pipeline, image_size=family.image_size).encode(prompts=PROMPTS[:2])
    config = load_config(written(tmp_path, pipeline, {"name": "boot"}))
    config.teacher.image_size = family.image_size
    teacher = meta_teacher(config.teacher, read_architecture(config.teacher.source))
    drawn = teacher.draw_condition(Draw(0, 0, rows=2))
    assert drawn.tensors.keys() == encoded.tensors.keys() and len(drawn) == 2
    for key, value in encoded.tensors.items():
        planned = drawn.tensors[key]
        assert planned.is_meta and planned.is_floating_point() == value.is_floating_point(), key
        if name in ("qwen-image", "z-image") and key in ("prompt_embeds", "attention_mask"):  # as long as the prompt
            assert planned.shape[1] >= value.shape[1] and planned.shape[2:] == value.shape[2:]
        else:
            assert planned.shape == value.shape, key


def test_an_average_in_host_memory_is_none_of_the_device(tmp_path, cli):
    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2"})
    beside, apart = make_plan(load_config(file)), make_plan(load_config(file, ["train.ema_device=cpu"]))
    size = beside.parts["student"].average
    assert (apart.parts["student"].average, apart.parts["student"].average_elsewhere) == (0, size) and size > 0
    assert apart.peak == beside.peak - size
    assert f"average of the student, on cpu{_gib(size):>22}" in cli("plan", file, "train.ema_device=cpu").out


# --- the command


def test_the_command_says_what_fits(tmp_path, cli):
    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2"})
    plan = make_plan(load_config(file))
    out = cli("plan", file)
    assert out.code == 0 and "nothing was loaded" in out.out and "fits in" not in out.out
    assert not (tmp_path / "run").exists()
    for name in ("teacher", "autoencoder", "student", "critic", "update of the student, 4 rows", "peak"):
        assert any(line.startswith(name) for line in out.out.splitlines()), name
    assert f"it fits in 8 GiB, of which {RESERVED:g} GiB" in cli("plan", file, "--gpu-memory", 8).out
    tight = RESERVED + plan.peak * 0.94 / GIB
    out = cli("plan", file, "--gpu-memory", tight).out
    steps = advise(file, [], plan, tight)
    assert "does not fit" in out and steps and fits(steps[-1].plan, tight)
    advised = out.split("it fits with: ")[1].split()
    assert fits(make_plan(load_config(file, advised)), tight)
    assert [step.plan.peak for step in steps] == sorted((step.plan.peak for step in steps), reverse=True)
    assert "a step updates the critic once, the student once, each time in one pass of 4 rows: 2 passes" in out
    none = cli("plan", file, "--gpu-memory", RESERVED + plan.peak * 0.01 / GIB).out
    assert "it still does not" in none and "configs/accelerate/fsdp2.yaml" in none


@pytest.mark.parametrize("method", [{"name": "dmd2"}, {"name": "disback", "degradation_steps": 0}], ids=str)
def test_several_steps_are_time_and_no_memory(tmp_path, method):
    """Of steps 2 to 4 too: the states before them are made without a gradient."""
    def planned(seed=0, **settings):
        host = {"host": settings} if method["name"] == "disback" else settings
        file = written(tmp_path, tiny_dit_pipeline(), {**method, **host}, {"gradient_accumulation": 2})
        return make_plan(load_config(file, [f"seed={seed}"]))

    one, *several = planned(), *(planned(seed, steps=4, critic_updates=5) for seed in (0, 2))
    assert [1 + Draw(seed, 0, rows=2).one(4) for seed in (0, 2)] == [1, 4]  # the steps that are planned
    each = "each time in 2 passes of a micro-batch of 2 rows"
    assert passes(one) == f"a step updates the critic once, the student once, {each}: 4 passes"
    for plan in several:
        assert plan.parts == one.parts and plan.peak == one.peak and plan.activations == one.activations
        assert passes(plan) == (f"a step updates the critic 5 times, the student once, {each}: 12 passes, and on "
                                "average 18 calls of the student without gradients")


@pytest.mark.parametrize("memory", [46, 30, 22, 18, 10, 2])
def test_advice_has_nothing_that_is_not_needed(tmp_path, monkeypatch, memory):
    """Without any of its settings, or with fewer micro-batches, the run would not fit; sizes are made up, in GiB."""

    def plan(config):
        train, method = config.train, config.method
        weights = {"float32": 4, "bfloat16": 2}[config.teacher.dtype]
        weights += {"full": 16, "lora": 1}[method.student] + {"full": 12, "lora": 1}[method.critic]
        rows = 16 // train.gradient_accumulation
        activations = rows * (0.5 if train.gradient_checkpointing else 1) * (0.5 if train.precision == "bf16" else 1)
        return SimpleNamespace(config=config, peak=int((weights + activations) * GIB))

    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2"}, {"batch_size": 16})
    monkeypatch.setattr(advice, "make_plan", plan)
    monkeypatch.setattr(advice, "moved", lambda plan, config: None)
    steps = advise(file, [], plan(load_config(file)), memory)
    given = [text for step in steps for text in step.overrides]
    assert [step.plan.peak for step in steps] == sorted((step.plan.peak for step in steps), reverse=True)
    assert fits(plan(load_config(file, given)), memory) == (memory > 5)
    for text in given if memory > 5 else ():
        key, _, value = text.partition("=")
        others = [other for other in given if other != text]
        fewer = [[*others, f"{key}={int(value) // 2}"]] if key == "train.gradient_accumulation" else []
        for less in (others, *fewer):
            assert not fits(plan(load_config(file, less)), memory), (given, less)


def test_what_rests_on_the_cpu_counts_when_it_is_asked(tmp_path):
    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2"})
    plan = make_plan(load_config(file))
    codec, away = (make_plan(load_config(file, [f"teacher.offload={name}"])) for name in ("codec", "all"))
    assert plan.parts == codec.parts == away.parts and plan.activations == codec.activations == away.activations
    assert codec.peak == plan.peak - plan.parts["autoencoder"].weights  # no loss decodes
    assert replace(codec, decodes=True).peak == plan.peak
    assert codec.peak - plan.parts["teacher"].weights <= away.peak <= codec.peak
    short = replace(away, forward=dict.fromkeys(away.forward, 0))
    assert short.peak == codec.peak - plan.parts["teacher"].weights
    long = replace(away, forward=dict.fromkeys(away.forward, 10**9))
    last = max(plan.parts[role].gradients + size for role, size in plan.activations.items())
    assert long.peak == codec.peak - last + 10**9
    codec = VaeCodec(vae())
    with memory._watched(codec) as asked:
        codec.pixels(torch.zeros(1, 4, 2, 2))
        codec.encode(torch.zeros(1, 3, 4, 4))
    codec.decode(torch.zeros(1, 4, 2, 2))
    assert asked == ["decode", "encode"]


MOVED = ["teacher.offload=codec", "teacher.offload=all", "train.ema_device=cpu", "method.optimizer.name=adamw8bit",
         "method.critic_optimizer.name=lion"]


def test_a_plan_of_things_at_another_place_is_the_same_without_counting(tmp_path):
    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2"})
    plan = make_plan(load_config(file))
    for given in (*([one] for one in MOVED), MOVED[1:]):
        config = load_config(file, given)
        made = memory.moved(plan, config)
        assert made == make_plan(config) != plan and memory.moved(made, plan.config) == plan
        assert made.can_be_cut == (given[0].startswith("teacher") and len(given) == 1 or given == MOVED[-1:])
    for other in ("train.gradient_accumulation=2", "method.critic=lora", "seed=1", "method.guidance_scale=3"):
        assert memory.moved(plan, load_config(file, [other])) is None
    low = make_plan(load_config(file, ["method.critic=lora"]))
    assert memory.moved(low, load_config(file, ["method.critic=lora", "teacher.offload=all"])) is None


def test_adapters_and_a_teacher_that_goes_away_are_refused_as_in_a_run(tmp_path, cli):
    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2", "critic": "lora"})
    out = cli("plan", file, "teacher.offload=all")
    assert out.code == 2 and "set teacher.offload to codec" in out.err and out.err.count("\n") == 1


def test_what_fsdp_cuts_and_gathers():
    file = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    assert yaml.safe_load(file.read_text())["fsdp_config"]["fsdp_min_num_params"] == memory.UNIT
    layers = [torch.nn.Linear(1100, 1100, device="meta") for _ in range(3)]
    network = torch.nn.Sequential(torch.nn.Linear(8, 1100, device="meta"), torch.nn.ModuleList(layers[:1]),
                                  torch.nn.Sequential(*layers[1:]))
    large, small = 4 * (1100 * 1100 + 1100), 4 * (8 * 1100 + 1100)
    assert memory._gathered(network) == small + 3 * large
    parts = {"teacher": Part(1, 1000), "student": Part(1, 400, 40, 80, 400, cut=800, gathered=50)}
    config = SimpleNamespace(teacher=SimpleNamespace(offload="none"))
    plan = Plan(config, None, parts, 1, activations={"student": 7})
    assert plan.peak == 1000 + 400 + 80 + 400 + 40 + 7
    assert replace(plan, gpus=8).peak == 1000 + (800 + 80) // 8 + 50 + 40 // 8 + 7


CARDS = {
    100: (1, []),
    74: (1, ["train.gradient_checkpointing=true"]),
    70: (1, ["train.gradient_checkpointing=true", "teacher.offload=all"]),
    40: (1, ["method.critic=lora", "method.student=lora"]),
    19.5: (8, ["train.gradient_checkpointing=true", "teacher.offload=all", "train.gradient_accumulation=2"]),
    16: (8, ["train.gradient_checkpointing=true", "teacher.offload=all", "method.optimizer.name=ao_adamw8bit",
             "method.critic_optimizer.name=ao_adamw8bit", "train.gradient_accumulation=2"]),
    8: None,
}


@pytest.mark.parametrize("memory_of_a_card", CARDS)
def test_a_card_gets_the_first_remedies_that_are_enough(tmp_path, monkeypatch, memory_of_a_card):
    """Settings that leave what is learned, then adapters, then FSDP2 over as few cards as will do, with moments of 8
    bits where these are needed; made-up sizes."""
    def made(config):
        settings, n = config.method, GIB
        parts = {"teacher": Part(1, 10 * n)}
        for role in ("student", "critic"):
            low = getattr(settings, role) == "lora"
            moments = dict.fromkeys(("adamw", "adamw8bit"), n if low else 16 * n)
            moments["ao_adamw8bit"] = n if low else 4 * n
            parts[role] = Part(1, n if low else 8 * n, n if low else 8 * n, moments["adamw"], moments=moments,
                               cut=10 * n if low else 8 * n, gathered=n)
        held = (4 if config.train.gradient_checkpointing else 20) * n
        return Plan(config, None, parts, 1, activations=dict.fromkeys(("student", "critic"), held), decodes=False,
                    forward=dict.fromkeys(("student", "critic"), 0),
                    settings={"student": "method.optimizer", "critic": "method.critic_optimizer"})

    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2"}, {"batch_size": 16, "gradient_accumulation": 16},
                   dtype="bfloat16")
    monkeypatch.setattr(advice, "make_plan", made)
    base = ["train.precision=bf16"]
    card, = advice.on_cards(file, base, made(load_config(file, base)), [memory_of_a_card])
    wanted = CARDS[memory_of_a_card]
    assert card.fits == (wanted is not None)
    if wanted is not None:
        assert (card.gpus, card.overrides) == wanted


def test_the_command_says_what_fits_on_cards(tmp_path, cli):
    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2"})
    plan = make_plan(load_config(file))
    sizes = [RESERVED + plan.peak * share / GIB for share in (1.01, 0.94, 0.01)]
    out = cli("plan", file, "--cards", ",".join(map(str, sizes)))
    assert out.code == 0 and out.out.startswith("dmd2 of ")
    lines = [line.split() for line in out.out.split("  add\n")[1].splitlines()]
    assert [line[1] for line in lines[:3]] == ["1", "1", "-"]
    assert lines[0][3:] == ["as", "it", "is"] and lines[2][3:] == ["does", "not", "fit"]
    assert fits(make_plan(load_config(file, lines[1][3:])), sizes[1])
    for bad in ("12,x", "12,,24", "0"):
        out = cli("plan", file, "--cards", bad)
        assert out.code == 2 and "argument --cards: must be a number greater than 0" in out.err


def test_a_plan_says_what_a_step_does(tmp_path, cli):
    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2", "critic_updates": 3}, {"batch_size": 16})
    out = cli("plan", file, "train.gradient_accumulation=4").out
    assert "the critic 3 times, the student once, each time in 4 passes of a micro-batch of 4 rows: 16 passes" in out


def test_the_commands_errors_are_a_sentence(tmp_path, cli):
    file = written(tmp_path, tiny_dit_pipeline(), {"name": "dmd2"})
    out = cli("plan", file, "teacher.source=nobody/nothing")
    assert out.code == 2 and "nobody/nothing is no pipeline folder here" in out.err and "sit-xl-2-repa" in out.err
    assert "argument --gpu-memory: must be a number" in cli("plan", file, "--gpu-memory", "much").err
    assert "greater than 0, not '0'" in cli("plan", file, "--gpu-memory", 0).err
    assert cli("plan", file, "method.regression_weight=1").code == 0  # pairs without content
    assert cli("plan", file, "method.adversarial_weight=1", "method.data=/nowhere").code == 0  # and images without any
    (tmp_path / "pipeline" / "transformer" / "config.json").write_text("{")
    out = cli("plan", file)
    assert out.code == 2 and "is not valid JSON" in out.err
    (tmp_path / "pipeline" / "transformer" / "config.json").unlink()
    assert "has no config.json" in cli("plan", file).err


def test_weights_are_not_read(tmp_path):
    """A folder of configurations is enough."""
    file = written(tmp_path, FAMILIES["sd"].make(), {"name": "dmd2"})
    whole = make_plan(load_config(file))
    for weights in (tmp_path / "pipeline").rglob("*.safetensors"):
        weights.unlink()
    (tmp_path / "prompts.txt").unlink()
    bare = make_plan(load_config(file))
    assert bare.parts == whole.parts and bare.activations == whole.activations


def test_a_network_that_reads_values_has_no_estimate(tmp_path, cli):
    file = written(tmp_path, FAMILIES["z-image"].make(), {"name": "dmd2"}, image_size=16)
    plan = make_plan(load_config(file))
    assert not plan.activations and plan.unknown and plan.parts["student"].gradients > 0
    out = cli("plan", file, "--gpu-memory", 1000)
    assert out.code == 0 and "activations: unknown" in out.out and "without activations" in out.out


def test_a_hub_id_needs_its_configurations_in_the_cache(tmp_path, monkeypatch):
    FAMILIES["sd"].make().save_pretrained(tmp_path / "p")
    asked = []

    def cached(repository, file):
        asked.append((repository, file))
        return str(tmp_path / "p" / file) if repository == "some/one" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    found = read_architecture("some/one")
    assert found.pipeline == "StableDiffusionPipeline" and found.components["unet"]["cross_attention_dim"] == 16
    assert asked == [("some/one", "model_index.json")]
    with pytest.raises(UserError, match="some/other is no pipeline folder here"):
        read_architecture("some/other")
