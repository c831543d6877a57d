"""Every configuration that comes with the project is valid, and those of large models can be planned."""

from pathlib import Path

import pytest

from flowdistill.config import load_config
from flowdistill.plan import make_plan
from flowdistill.plan.advice import fits
from flowdistill.plan.meta_teacher import meta_teacher, read_architecture, shipped_architectures
from flowdistill.teachers import load_teacher
from flowdistill.training.run import method_class

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for file in (ROOT / "configs").glob("*/*.yaml")
               if file.parent.name not in ("accelerate", "experiments"))
# Parameters of the network in millions, as its publishers round them. SiT-XL/2 has 675: diffusers' DiT has a time
# embedding and a table of labels in each of the 28 blocks, 2.8 million together, where SiT has one.
LARGE = {"sd15/dmd2": 860, "sdxl/disback": 2567, "sd3/dmd2": 2028, "sit/freeflow": 750, "flux/dmd2": 11901}


# Those of several steps, their times, and the parameters of networks that no file above has.
FEW_STEPS = {
    "sd15/dmd2_4step": ([0.9360, 0.8032, 0.6173, 0.4094], 860),  # the authors' 999, 749, 499, 249
    "sdxl/dmd2_4step": ([0.9360, 0.8032, 0.6173, 0.4094], 2567),
    "sd15/lcm_lora": ([0.9360, 0.8099, 0.6173, 0.4184], 860),  # the authors' 999, 759, 499, 259
    "sdxl/lcm_lora": ([0.9360, 0.8099, 0.6173, 0.4184], 2567),
    "sd3/dmd2_4step": ([1, 0.9, 0.75, 0.5], 2028),
    "flux/dmd2_4step_lora": ([1, 0.9045, 0.7595, 0.5128], 11901),
    "qwen_image/dmd2_4step_lora": ([1, 0.9, 0.75, 0.5], 20430),
    "z_image/dmd2_4step_lora": ([1, 0.9474, 0.8571, 0.6667], 6155),
}


# Flow maps between any two times: their times of four calls, and the parameters.
ANY_STEP = {
    "sd3/flow_map_lora": ([1, 0.9004, 0.7511, 0.5030], 2028),
    "flux/flow_map_lora": ([1, 0.9045, 0.7595, 0.5128], 11901),
    "sit/flow_map_matching": ([1, 0.75, 0.5, 0.25], 750),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_it_is_valid(file):
    assert load_config(file).output_dir.startswith("runs/")


@pytest.mark.parametrize("name", LARGE)
def test_it_can_be_planned(name, monkeypatch):
    """From the descriptions that come with the project: nothing is in the hub's cache, and no folder is here."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert not Path(config.teacher.source).exists()
    config.train.batch_size = config.train.gradient_accumulation  # one row
    plan = make_plan(config)
    teacher, student, critic = (plan.parts[part] for part in ("teacher", "student", "critic"))
    assert round(teacher.parameters / 1e6) == pytest.approx(LARGE[name], rel=0.015)
    assert 1 <= teacher.weights / (2 * teacher.parameters) < 1.03  # bfloat16, and positions
    assert student.weights >= 4 * teacher.parameters and student.average == student.weights
    assert student.optimizer == pytest.approx(2 * student.gradients, rel=1e-5) and student.gradients <= student.weights
    if config.method.name == "disback":
        assert plan.parts["other networks"].weights == teacher.weights
    elif config.method.critic == "lora":
        assert critic.weights < 0.1 * student.weights
    assert set(plan.activations) == {"student", "critic"} and min(plan.activations.values()) > 0
    assert not fits(plan, 8)


@pytest.mark.parametrize("name", FEW_STEPS)
def test_students_of_several_steps_are_built(name, monkeypatch):
    """With the times that the file's remarks say; one step's plans are those above, and K is no memory."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    config, (times, millions) = load_config(ROOT / "configs" / f"{name}.yaml"), FEW_STEPS[name]
    teacher = meta_teacher(config.teacher, read_architecture(config.teacher.source))
    assert round(sum(p.numel() for p in teacher.network.parameters()) / 1e6) == pytest.approx(millions, rel=0.015)
    method = method_class(config.method.name)(config.method, teacher)
    assert method.steps.times == pytest.approx(times, abs=1e-4)
    assert method.calls_without_gradient("student") == (1.5 if "critic" in method.roles() else 0)
    shared = {id(p) for p in teacher.network.parameters()}
    for role, part in method.roles().items():
        own = sum(p.numel() for p in part.network.parameters() if p.requires_grad)
        low_rank = getattr(config.method, role) == "lora"
        assert low_rank == (shared <= {id(p) for p in part.network.parameters()}) and low_rank == (own < 2e5 * millions)


@pytest.mark.parametrize("name", ANY_STEP)
def test_flow_maps_are_built(name, monkeypatch):
    """For each number of calls up to eight its teacher's own times; an embedding of the duration beside the network."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    config, (times, millions) = load_config(ROOT / "configs" / f"{name}.yaml"), ANY_STEP[name]
    teacher = meta_teacher(config.teacher, read_architecture(config.teacher.source))
    assert round(sum(p.numel() for p in teacher.network.parameters()) / 1e6) == pytest.approx(millions, rel=0.015)
    method = method_class(config.method.name)(config.method, teacher)
    assert [len(chain) for chain in method.chains] == list(range(1, 9))
    assert method.chains[3].times == pytest.approx(times, abs=1e-4)
    own = sum(p.numel() for p in method.student().network.parameters() if p.requires_grad)
    assert (own < 2e5 * millions) == name.endswith("lora") and method.roles().keys() == {"student"}


@pytest.mark.parametrize("name", ["sd15/lcm_lora", "sit/flow_map_matching"])
def test_a_student_without_a_critic_can_be_planned(name, monkeypatch):
    """Where its teacher's samples are noised, they are pairs without content."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    config.train.batch_size = config.train.gradient_accumulation
    plan = make_plan(config)
    teacher, student = plan.parts["teacher"], plan.parts["student"]
    assert student.weights == student.average and plan.activations.keys() == {"student"}
    assert (student.weights < 0.5 * teacher.weights) == (config.method.student == "lora")


def test_every_description_is_used():
    used = {load_config(ROOT / "configs" / f"{name}.yaml").teacher.source for name in [*LARGE, *FEW_STEPS]}
    described = shipped_architectures()
    assert used <= described.keys()
    assert {id(described[source]) for source in used} == {id(content) for content in described.values()}
    with pytest.raises(Exception, match="could not be loaded|does not exist|sit-xl-2-repa"):
        load_teacher("sit-xl-2-repa")
