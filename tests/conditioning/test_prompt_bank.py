"""The prompt bank: the same rows from memory, from disk and live, whatever processes and crashes there were before."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from flowdistill.conditioning import prompt_bank
from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompt_bank import DiskBank, Groups
from flowdistill.conditioning.prompt_lists import Texts, equal_prompts
from flowdistill.conditioning.prompts import BankSettings, PromptConditions
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.networks.backbones import family_of
from flowdistill.students import FlowMap, StudentInfo, load_student, storage
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import Draw
from tests.families import FAMILIES, PROMPTS, stable_diffusion
from tests.processes import Child, ranks

MODES = ("memory", "disk", "live")
TEXT = ("sd", "sdxl", "sd3", "flux-dev", "pixart-sigma", "pixart-alpha", "sana", "lumina2", "qwen-image", "z-image")
LIST = [*PROMPTS, "", *(f"{text} {'and a bird ' * (i % 3)}{chr(97 + i)}" for i in range(5) for text in PROMPTS)]
"""19 prompts of several lengths: a group and a shorter one."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prompt_bank, "SHARD_ROWS", 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "pipeline"
    stable_diffusion().save_pretrained(path)
    return path


def conditions(pipeline, mode, prompts=LIST, dtype=torch.float32, **settings):
    """The prompts' side of a teacher, without the rest of it."""
    backbone = getattr(pipeline, "transformer", None) or pipeline.unet
    family = family_of(backbone)
    text = TextEncoders(pipeline, dtype)
    shapes = family.known_shapes(backbone, text.pipeline_class, text.clip_tokens)
    made = PromptConditions(text, family, (16, 16), None, BankSettings(mode, **settings), shapes)
    made.use(equal_prompts(prompts))
    return made


def equal(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    return all(torch.equal(value, other.tensors[name]) and value.dtype == other.tensors[name].dtype
               for name, value in one.tensors.items())


# --- the same bits


@pytest.mark.parametrize("name", TEXT)
def test_three_modes_have_the_same_rows(name):
    """Those of groups of 16, which is what a run has had before there were modes, padded to the list's longest."""
    pipeline = FAMILIES[name].make()
    # Sana reads a page of instructions before each prompt.
    prompts, size = (LIST[:3], 2) if name == "sana" else (LIST, 16)
    banks = {mode: conditions(pipeline, mode, prompts, at_once=size) for mode in MODES}
    family, rows = banks["memory"].family, []
    with torch.no_grad():
        for part in (prompts[:size], prompts[size:]):
            rows.append(Condition(family.encode(pipeline, list(part), (16, 16))).to("cpu"))
    whole = Condition.cat(rows)
    for mode, bank in banks.items():
        assert bank.mode == mode and equal(bank.examples(range(len(prompts))), whole), mode
        drawn = [bank.draw(Draw(3, step, rows=4, rank=rank, world=2), rows=6) for step in (0, 1) for rank in (0, 1)]
        index = [Draw(3, step, rows=4, rank=rank, world=2).choice(bank._cumulative, 6) for step in (0, 1)
                 for rank in (0, 1)]
        assert all(equal(one, whole[rows]) for one, rows in zip(drawn, index, strict=True)), mode
        assert len(bank.draw(Draw(3, 0), rows=0)) == 0
    disk = banks["disk"]._bank
    stored = sum(len(disk._shard(number).row(row)["prompt_embeds"]) for number, part in enumerate(disk.parts)
                 for row in range(len(part)))
    width = whole.tensors["prompt_embeds"].shape[1]
    assert stored == (whole.tensors["attention_mask"].sum() if family.ragged else len(prompts) * width)


@pytest.mark.parametrize("mode", MODES)
def test_other_groups_are_other_rows_on_disk(mode):
    """Each prompt alone; neither mode finds what was encoded in groups of 16."""
    pipeline = FAMILIES["qwen-image"].make()
    conditions(pipeline, mode).examples([0])
    alone = conditions(pipeline, mode, at_once=1)
    with torch.no_grad():
        rows = [Condition(alone.family.encode(pipeline, [text], (16, 16))).to("cpu") for text in LIST]
    assert equal(alone.examples(range(19)), Condition.cat(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype):
    pipeline = stable_diffusion()
    pipeline.text_encoder.to(dtype)
    found = [conditions(pipeline, mode, dtype=dtype).examples(range(19)) for mode in MODES]
    assert found[0].tensors["prompt_embeds"].dtype == dtype and equal(found[0], found[1]) and equal(found[0], found[2])


def test_zeros_are_left_out_and_minus_zeros_are_not(tmp_path):
    """Also numbers, rows of zeros only, and rows of no length."""
    rows = {"a": torch.tensor([[[1.0], [0.0], [0.0]], [[0.0], [-0.0], [0.0]], [[0.0]] * 3, [[0.0], [0.0], [2.0]]]),
            "b": torch.tensor([3, 0, -1, 7]), "c": torch.zeros(4, 0, 2), "d": torch.tensor([[True, False]] * 4)}
    bank = DiskBank(tmp_path, Texts("abcd"), Groups(4, 1, False))
    bank.fill(contextlib.nullcontext(lambda prompts: rows), Processes())
    found = bank.prepare().rows(torch.tensor([3, 2, 1, 0, 1]))
    assert equal(found, Condition(rows)[torch.tensor([3, 2, 1, 0, 1])])
    assert found.tensors["a"][2].signbit().any()
    assert [len(bank._shard(0).row(row)["a"]) for row in range(4)] == [1, 2, 0, 3]


# --- filling


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.rglob("shard-*.safetensors"))}


def write_config(path, folder, prompts, **teacher):
    path.mkdir(exist_ok=True, parents=True)
    (path / "p.txt").write_text("\n".join(prompts))
    settings = {"source": str(folder), "prompts": str(path / "p.txt"), "prompt_cache": "disk"} | teacher
    file = path / "c.yaml"
    file.write_text(json.dumps({
        "output_dir": str(path / "run"), "teacher": settings, "method": {"name": "boot"},
        "train": {"steps": 4, "batch_size": 4, "num_samples": 2, "device": "cpu", "trackers": [],
                  "checkpoint_every": 2},
        "evaluation": {"at_end": False},
    }))
    return file


MANY = [f"{text} {chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(30) for text in PROMPTS]


def fill_slowly(config):
    """``flowdistill cache`` in shards of 16 prompts, with a wait after each."""
    from flowdistill.cli.commands import main

    prompt_bank.SHARD_ROWS = 16
    write = DiskBank._write

    def waiting(*arguments):
        write(*arguments)
        time.sleep(0.5)

    DiskBank._write = waiting
    sys.exit(main(["cache", str(config)]))


def test_a_killed_filling_goes_on(folder, tmp_path, monkeypatch, cli):
    """The same command completes it, and the files are those of a filling that was not killed."""
    config, broken, whole = write_config(tmp_path, folder, MANY), tmp_path / "broken", tmp_path / "whole"
    from tests.processes import environment

    with Child(fill_slowly, config, env=environment(XDG_CACHE_HOME=str(broken))) as child:
        while len(contents(broken)) < 2:
            assert child.returncode is None, child.errors
            time.sleep(0.02)
        child.kill()
    first = contents(broken)
    assert 2 <= len(first) < 6
    (next(broken.rglob("shard-*.safetensors")).parent / ".shard-x.safetensors.y.tmp").write_bytes(b"half")
    monkeypatch.setattr(prompt_bank, "STALE", -1.0)
    encoded, original = [], DiskBank._write
    monkeypatch.setattr(DiskBank, "_write", lambda bank, number, *rest: (encoded.append(number),
                                                                         original(bank, number, *rest)))
    for cache in (broken, whole):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        result = cli("cache", config)
        assert result.code == 0 and "90 prompts of 1.02 kB, 92.2 kB encoded; teacher.prompt_cache is disk" in result.out
    assert len(encoded) == 6 - len(first) + 6
    assert contents(broken) == contents(whole) and len(contents(whole)) == 6
    assert contents(broken).items() >= first.items() and not list(broken.rglob("*.tmp"))


def drawn_digests(folder, prompts):
    for mode in MODES:
        teacher = load_teacher(folder, prompts=prompts, prompt_cache=mode)
        world = Processes.start()
        for step in range(3):
            drawn = teacher.draw_condition(Draw(0, step, rows=4, rank=world.rank, world=world.world))
            print(mode, step, [row.double().sum().item().hex() for row in drawn.tensors["prompt_embeds"]])


def in_ranks(folder, prompts):
    Processes.start()
    prompt_bank.SHARD_ROWS = 16
    drawn_digests(folder, prompts)


def test_two_processes_fill_together_and_draw_what_one_draws(folder, tmp_path, capsys):
    from tests.processes import environment

    outs = ranks(2, in_ranks, folder, MANY, env=environment(XDG_CACHE_HOME=str(tmp_path / "two")))
    drawn_digests(folder, MANY)
    alone = capsys.readouterr().out.splitlines()
    both = [[json.loads(line.split(" ", 2)[2].replace("'", '"')) for line in out.splitlines()] for out in outs]
    for number, line in enumerate(alone):
        rows = json.loads(line.split(" ", 2)[2].replace("'", '"'))
        assert rows[0::2] == both[0][number] and rows[1::2] == both[1][number], line
    assert contents(tmp_path / "two") == contents(tmp_path / "cache")


@pytest.mark.parametrize("first", [0, 1])
def test_processes_share_the_work_and_none_waits(tmp_path, first):
    """Whichever comes first, each begins with its own part, and does what the other has not done."""
    texts, groups = Texts(MANY), Groups(16, 1, False)

    def encode(prompts):
        return {"a": torch.tensor([[len(text)] for text in prompts])}

    order = []

    class Seen(DiskBank):
        def _write(self, number, encode, bar):
            order.append(number)
            super()._write(number, encode, bar)
            if len(order) == 1:  # as if the other had been as fast
                other = Processes(1 - first, 2)
                Seen(tmp_path, texts, groups)._part(other.rank, encode)

        def _part(self, rank, encode):
            from unittest.mock import MagicMock

            super()._write(rank, encode, MagicMock())

    bank = Seen(tmp_path, texts, groups)
    bank.fill(contextlib.nullcontext(encode), Processes(first, 2))
    assert order == [[0, 2, 4, 3, 5], [1, 3, 5, 2, 4]][first]
    bank.prepare()
    assert bank.rows(torch.arange(90)).tensors["a"][:, 0].tolist() == [len(text) for text in MANY]


def test_appended_prompts_encode_nothing_again():
    made = conditions(stable_diffusion(), "disk", MANY[:40])
    before = made.disk_bank()
    before.fill(made._encoding(), Processes())
    made.use(equal_prompts(MANY))
    after = made.disk_bank()
    assert after.missing() == [2, 3, 4, 5] and before.files[:2] == after.files[:2]


def test_too_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 3e9}))
    bank = DiskBank(tmp_path, Texts(MANY), Groups(16, 10**8, False))
    with pytest.raises(UserError, match="90 encoded prompts take 9.0 GB, and the disk of .* has 3.0 GB left"):
        bank.fill(contextlib.nullcontext(None), Processes())


# --- damage


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def cut_to_nothing(file):
    file.write_bytes(b"")


def lengthen(file):
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def of_another(file):
    other = next(path for path in file.parent.glob("shard-*") if path.stat().st_size != file.stat().st_size)
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [cut, cut_to_nothing, lengthen, flip, of_another, Path.unlink],
                         ids=lambda damage: damage.__name__)
def test_a_damaged_shard_is_named(folder, damage, monkeypatch):
    """Cut or foreign ones before anything is drawn, changed bits when their row is."""
    teacher = load_teacher(folder, prompts=LIST, prompt_cache="disk")
    bank = teacher.prompts.disk_bank()
    file = bank.files[0]
    damage(file)
    with pytest.raises(UserError, match=f"the encoded prompts {file} are (damaged: .*; delete this file|gone)"):
        bank.prepare()
        assert damage in (flip, Path.unlink)
        bank.rows(torch.arange(16))
    file.unlink(missing_ok=True)
    again = load_teacher(folder, prompts=LIST, prompt_cache="disk")
    assert equal(again.prompts.examples(range(19)), load_teacher(folder, prompts=LIST).prompts.examples(range(19)))


def test_the_command_names_a_damaged_shard(folder, tmp_path, cli):
    config = write_config(tmp_path, folder, LIST)
    assert cli("cache", config).code == 0
    file = sorted(tmp_path.rglob("shard-*.safetensors"))[0]
    cut(file)
    for command in ("cache", "distill"):
        result = cli(command, config)
        assert result.code == 2 and str(file) in result.err and result.err.count("\n") <= 2, result.err
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- runs


def test_a_cached_run_loads_no_text_encoder(folder, tmp_path, cli, monkeypatch):
    """Nor does the command that fills the cache load a network, whether the list stays in memory or not."""
    for mode in ("memory", "disk"):
        config = write_config(tmp_path / mode, folder, LIST, prompt_cache=mode)
        with monkeypatch.context() as patch:
            patch.setattr("flowdistill.teachers.loading._load_pipeline", None)
            result = cli("cache", config)
            assert result.code == 0 and f"teacher.prompt_cache is {mode}" in result.out, result.err
        with monkeypatch.context() as patch:
            patch.setattr(TextEncoders, "opened", None)
            load_teacher(folder, prompts=config.parent / "p.txt", prompt_cache=mode).draw_condition(Draw(0, 0, rows=2))


def test_a_run_may_change_its_mode(folder, tmp_path, cli):
    """Bit for bit: from memory alone, or two steps from disk and two more live."""
    students = []
    for name, starts in (("a", [("memory", 4)]), ("b", [("disk", 2), ("live", 4)])):
        config = write_config(tmp_path / name, folder, LIST)
        for mode, steps in starts:
            result = cli("distill", config, f"teacher.prompt_cache={mode}", f"train.steps={steps}")
            assert result.code == 0, result.err
        students.append((tmp_path / name / "run" / "student" / "model.safetensors").read_bytes())
        assert (tmp_path / name / "run" / "checkpoints" / "step-000004").is_dir()
    assert students[0] == students[1]


def test_auto_goes_by_size(folder, tmp_path, cli, caplog):
    config = write_config(tmp_path, folder, LIST, prompt_cache="auto")
    for limit, mode in ((2.0, "memory"), (1e-5, "disk")):
        teacher = load_teacher(folder, prompts=tmp_path / "p.txt", prompt_cache_gb=limit)
        assert teacher.prompts.mode == mode
        said = f"18 prompts of 1.02 kB, 18.4 kB encoded; teacher.prompt_cache is {mode} (auto: memory up to {limit:g}"
        assert said in teacher.prompts.describe_bank()
        assert cli("cache", config, f"teacher.prompt_cache_gb={limit}").code == 0 and said in caplog.text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["teacher.prompt_cache=ram"], "'teacher.prompt_cache' must be one of auto, memory, disk, live"),
        (["teacher.prompt_cache=live"], "there is nothing to encode beforehand: teacher.prompt_cache is live"),
        (["teacher.prompts=null"], "there is nothing to encode: teacher.prompts is null"),
        (["teacher.prompts=null", "teacher.prompt_column=text"], "teacher.prompt_column is text, but teacher.prompts"),
        (["teacher.prompt_column=text"], "has lines and no columns"),
        (["teacher.prompts_at_once=0"], "'teacher.prompts_at_once' must be at least 1"),
        (["teacher.text_encoder_device=xpu"], "teacher.text_encoder_device is xpu, which cannot be used here"),
        (["teacher.text_encoder_device=tpu"], "'teacher.text_encoder_device' must be cpu, cuda"),
        (["teacher.text_encoder_dtype=int8"], "'teacher.text_encoder_dtype' must be one of float32"),
        (["teacher.source=assets/digits-flow"], "are for text-to-image pipelines"),
    ],
)
def test_bad_settings(folder, tmp_path, cli, overrides, message):
    result = cli("cache", write_config(tmp_path, folder, LIST), *overrides)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err


def test_settings_that_a_live_pipeline_or_labels_have_no_use_for():
    for setting in ({"text_encoder_dtype": "bfloat16"}, {"text_encoder_device": "cpu"}):
        with pytest.raises(UserError, match=f"teacher.{next(iter(setting))} is for a pipeline folder"):
            load_teacher(stable_diffusion(), **setting)


def test_text_encoders_of_another_type(folder):
    teacher = load_teacher(folder, prompts=LIST, text_encoder_dtype="bfloat16", text_encoder_device="cpu")
    assert teacher.draw_condition(Draw(0, 0, rows=2)).tensors["prompt_embeds"].dtype == torch.bfloat16
    assert next(teacher.network.parameters()).dtype == torch.float32


def test_a_student_carries_the_beginning_of_a_long_list(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CARRIED", 16)
    teacher = load_teacher(folder, prompts=LIST, prompts_at_once=4, prompt_cache="disk")
    FlowMap.from_teacher(teacher, StudentInfo()).save(tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert again.prompts.prompts == LIST[:16] and again.prompts.settings.at_once == 4
    assert equal(again.prompts.examples(range(16)), teacher.prompts.examples(range(16)))


def test_plans_count_each_mode(folder, tmp_path, cli):
    config = write_config(tmp_path, folder, LIST)
    encoder = sum(p.numel() for p in stable_diffusion().text_encoder.parameters()) * 4
    for mode, words in (("memory", "18.4 kB of host memory and 18.4 kB of disk"),
                        ("disk", "0.432 kB of host memory and 18.4 kB of disk"),
                        ("live", "33.6 MB of host memory, none of disk, and text encoders of")):
        result = cli("plan", config, f"teacher.prompt_cache={mode}")
        assert result.code == 0 and f"in the mode {mode} (teacher.prompt_cache): {words}" in result.out, result.out
        assert ("\ntext encoders" in result.out) == (mode == "live")
        from flowdistill.config import load_config
        from flowdistill.plan.memory import make_plan

        plan = make_plan(load_config(config, [f"teacher.prompt_cache={mode}"]))
        assert plan.prompts.encoders == (encoder if mode == "live" else 0)
    (tmp_path / "p.txt").unlink()
    assert "prompts: their file is not here; encoded, they take 1.02 kB each" in cli("plan", config).out
