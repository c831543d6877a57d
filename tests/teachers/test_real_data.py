"""Real images of every source as latents with conditions: the bits of the named set, whatever keeps them."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from flowdistill.conditioning.prompt_lists import equal_prompts
from flowdistill.config import DataOptions
from flowdistill.methods.consistency import Consistency, ConsistencyConfig
from flowdistill.methods.data_flow_map import DataFlowMap, DataFlowMapConfig
from flowdistill.methods.score_distillation import Dmd2, Dmd2Config
from flowdistill.methods.teacher_score_matching import ScoreMatchingConfig, TeacherScoreMatching
from flowdistill.teachers import latent_bank, load_teacher
from flowdistill.teachers.latent_bank import picture_size
from flowdistill.teachers.real_data import RealData
from flowdistill.utils.errors import UserError
from flowdistill.utils.exit import exit_process
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import Draw
from tests.data import stored
from tests.families import FAMILIES, PROMPTS
from tests.processes import environment, ranks
from tests.tiny import tiny_dit_pipeline, tiny_unet_pipeline

TEACHERS = ("pixels", "latents", "prompts", "unconditional")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", stored.fake_datasets())


def teacher_of(kind):
    if kind == "prompts":
        return load_teacher(FAMILIES["sd"].make(), prompts=PROMPTS)
    if kind == "latents":
        return load_teacher(tiny_dit_pipeline(layers=1))
    return load_teacher(tiny_unet_pipeline(num_class_embeds=4 if kind == "pixels" else None))


def same(one, other):
    """Latents and conditions of two draws."""
    if not torch.equal(one[0], other[0]) or (one[1] is None) != (other[1] is None):
        return False
    return one[1] is None or all(torch.equal(value, other[1].tensors[name]) for name, value in one[1].tensors.items())


def draws(data, world=1, steps=3):
    return [data.draw(Draw(5, step, rows=6, rank=rank, world=world)) for step in range(steps) for rank in range(world)]


@pytest.mark.parametrize("kind", TEACHERS)
def test_every_source_and_mode_has_the_bits_of_the_named_set(kind, tmp_path, monkeypatch):
    teacher = teacher_of(kind)
    images, labels = stored.few(picture_size(teacher))
    stored.name_set(monkeypatch, images, labels)
    expected = draws(RealData(teacher, "few"))
    modes = ("memory", "disk", "none", "auto") if kind in ("latents", "prompts") else ("memory", "none", "auto")
    assert {"pixels": "class_labels", "latents": "class_labels", "prompts": "encoder_hidden_states"}.get(kind) in (
        None, *(expected[0][1].tensors if expected[0][1] else ())) or kind == "prompts"
    for source in stored.SOURCES if kind != "unconditional" else ("csv",):
        if source == "sidecar":  # another order; the same pictures, captions and labels
            continue
        written = stored.write(source, tmp_path / source, images, labels)
        for mode in modes if source == "jsonl" else ("disk" if "disk" in modes else "none",):
            data = RealData(teacher, written, options=DataOptions(cache_latents=mode))
            assert all(map(same, draws(data), expected)), (source, mode)
            both = draws(data, world=2, steps=1)
            assert torch.equal(torch.stack([both[0][0], both[1][0]], dim=1).flatten(0, 1), expected[0][0])
    # Of one condition with its picture: a picture's own latent has its own caption or label.
    data = RealData(teacher, written)
    latents, condition = data.draw(Draw(5, 0, rows=6))
    index = Draw(5, 0, rows=6).integers(7, on_cpu=True)
    for place, row in enumerate(index.tolist()):
        assert torch.equal(latents[place], teacher.codec.encode(images[row : row + 1])[0])
    if kind == "prompts":
        own = teacher.encode(prompts=[stored.caption(label) for label in labels[index].tolist()])
        for name, value in own.tensors.items():
            torch.testing.assert_close(condition.tensors[name], value, rtol=0, atol=1e-5)
    elif condition is not None:
        assert torch.equal(condition.tensors["class_labels"], labels[index])


def test_latents_are_made_once(tmp_path, monkeypatch):
    teacher = teacher_of("latents")
    images, labels = stored.few(picture_size(teacher))
    written = stored.write("jsonl", tmp_path / "f", images, labels)
    before = draws(RealData(teacher, written))
    monkeypatch.setattr(latent_bank, "encoded", None)
    assert all(map(same, draws(RealData(teacher, written, options=DataOptions(memory_gb=0))), before))
    files = list((tmp_path / "cache/flowdistill/latents").rglob("*.safetensors"))
    assert len(files) == 1
    files[0].write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(UserError, match="the latents .* are damaged: it is cut short; delete this file, and the same"):
        RealData(teacher, written)


@pytest.mark.parametrize("kind", ["jsonl", "tar", "table"])
def test_pictures_that_have_changed_have_other_latents(tmp_path, kind):
    """Of a table too that has paths in the place of pictures, whose own fingerprint stays."""
    teacher = teacher_of("latents")
    images, labels = stored.few(picture_size(teacher))
    for content in (images, images.flip(0)):
        place = stored.write(kind, tmp_path / "f", content, labels)
        if kind == "table":
            rows = []
            for number, image in enumerate(content):
                (tmp_path / f"{number}.png").write_bytes(stored.png(image))
                rows.append({"image": {"bytes": None, "path": str(tmp_path / f"{number}.png")}, "label": number % 4})
            (tmp_path / "f/dataset_info.json").write_text(json.dumps(rows))
        data = RealData(teacher, place)
        assert torch.equal(data.latents(torch.arange(7)), torch.cat([teacher.codec.encode(one[None]) for one in content]
                                                                    ))


def test_of_several_captions_one_is_drawn(tmp_path):
    """Each as often, the same on any number of processes, and each text is encoded once."""
    teacher = teacher_of("prompts")
    images, _ = stored.few(picture_size(teacher), count=2)
    folder = Path(stored.write("jsonl", tmp_path / "f", images, torch.arange(2)))
    folder.joinpath("metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": ["a", "b", "c"]}\n{"file_name": "001.png", "text": ["b"]}\n')
    data = RealData(teacher, str(folder))
    assert list(data._captions.bank.prompts) == ["a", "b", "c"]
    chosen = []
    monkey = data._captions.bank.examples
    data._captions.bank.examples = lambda places: chosen.append(torch.tensor(places)) or monkey(places)
    data.draw(Draw(0, 0, rows=400))
    for rank in (0, 1):
        data.draw(Draw(0, 0, rows=400, rank=rank, world=2))
    whole, *parts = chosen
    assert torch.equal(torch.stack(parts, dim=1).flatten(), whole)
    first = whole[Draw(0, 0, rows=400).integers(2, on_cpu=True) == 0].bincount()
    assert len(first) == 3 and first.min() > 45


def test_a_list_that_has_the_captions_is_not_encoded_again(tmp_path):
    teacher = teacher_of("prompts")
    images, labels = stored.few(picture_size(teacher))
    teacher.prompts.use(equal_prompts([stored.caption(label) for label in (0, 1, 2)]))
    data = RealData(teacher, stored.write("csv", tmp_path / "f", images, labels))
    assert data._captions.bank is teacher.prompts


def test_own_labels_only(tmp_path):
    teacher = load_teacher(tiny_unet_pipeline(), labels=[3, 1])
    images, labels = stored.few()
    for mode in ("memory", "none"):
        data = RealData(teacher, stored.write("sidecar", tmp_path / "f", images, labels), None,
                        DataOptions(cache_latents=mode))
        assert len(data) == 3 and data.labels.tolist() == [1, 1, 3]
        assert torch.equal(data.latents(torch.tensor([2, 0])), images[[3, 1]] * 2 - 1)


METHODS = {
    "dmd2": (Dmd2, lambda data, options: Dmd2Config(adversarial_weight=1e-2, data=data, data_options=options)),
    "steps": (Dmd2, lambda data, options: Dmd2Config(
        steps=2, step_inputs="data", guidance_scale=2.0, data=data, data_options=options)),
    "consistency": (Consistency, lambda data, options: ConsistencyConfig(states="data", data=data,
                                                                         data_options=options)),
    "flow map": (DataFlowMap, lambda data, options: DataFlowMapConfig(data=data, data_options=options)),
    "score matching": (TeacherScoreMatching, lambda data, options: ScoreMatchingConfig(
        student_size=0.5, data=data, data_options=options)),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_learn_from_pictures_with_captions(name, tmp_path, monkeypatch):
    """The loss and the gradient are those on the named set, to the last bit."""
    teacher, found = teacher_of("prompts"), []
    images, labels = stored.few(picture_size(teacher))
    stored.name_set(monkeypatch, images, labels)
    for data in ("few", stored.write("jsonl", tmp_path / "f", images, labels)):
        torch.manual_seed(0)
        kind, config = METHODS[name]
        method = kind(config(data, DataOptions()), teacher)
        networks = {role: part.network for role, part in method.roles().items()}
        role = "critic" if name == "dmd2" else "student"
        loss, _ = method.loss(role, networks, Draw(0, 1, rows=4))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in networks[role].parameters() if p.grad is not None])
        assert loss.isfinite() and gradient.abs().max() > 0
        found.append((loss.detach(), gradient))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# --- processes and resume


def drawn_digests(folder):
    """Of each source and mode, a hash of this process's rows."""
    digests = {}
    for kind, mode in (("jsonl", "disk"), ("tar", "none"), ("table", "memory")):
        for name in ("latents", "prompts"):
            teacher = teacher_of(name)
            data = RealData(teacher, f"{folder}/{kind}/*.tar" if kind == "tar" else f"{folder}/{kind}",
                            options=DataOptions(cache_latents=mode))
            processes = Processes.current()
            latents, condition = data.draw(Draw(5, 0, rows=8, rank=processes.rank, world=processes.world))
            for row in range(len(latents)):
                digest = hashlib.sha256(latents[row].numpy().tobytes())
                for key in sorted(condition.tensors):
                    digest.update(condition.tensors[key][row].numpy().tobytes())
                place = processes.rank + processes.world * row
                digests[f"{kind} {name} {place}"] = digest.hexdigest()
    return digests


def in_ranks(folder):
    Processes.start()
    sys.modules["datasets"] = stored.fake_datasets()  # this process is the ranks' own
    for key, digest in drawn_digests(folder).items():
        print(key, digest)
    exit_process(0)


def test_two_processes_share_the_work_and_draw_what_one_draws(tmp_path):
    size = picture_size(teacher_of("latents"))
    assert size == (3, 8, 8)
    images, labels = stored.few(size, count=70)
    for kind in ("jsonl", "tar", "table"):
        stored.write(kind, tmp_path / kind, images, labels)
    outs = ranks(2, in_ranks, tmp_path, env=environment(XDG_CACHE_HOME=str(tmp_path / "two")))
    together = dict(line.rsplit(" ", 1) for out in outs for line in out.splitlines() if line.count(" ") == 3)
    assert together == drawn_digests(tmp_path) and len(together) == 48


@pytest.mark.parametrize("kind", ["jsonl", "tar", "table"])
def test_a_resumed_run_is_an_uninterrupted_one(kind, tmp_path, cli, monkeypatch):
    tiny_dit_pipeline(layers=1).save_pretrained(tmp_path / "teacher")
    source = stored.write(kind, tmp_path / kind, *stored.few((3, 8, 8)))
    config = tmp_path / "c.yaml"
    config.write_text(f"""
output_dir: {tmp_path / 'a'}
teacher: {{source: {tmp_path / 'teacher'}}}
method: {{name: data_flow_map, data: "{source}"}}
train: {{steps: 4, batch_size: 4, trackers: [], log_every: 1, num_samples: 4}}
evaluation: {{at_end: false}}
""")
    assert cli("distill", config).code == 0
    whole = ["distill", config, f"output_dir={tmp_path / 'b'}"]
    assert cli(*whole, "train.steps=2").code == 0
    # Where latents are kept may change in between.
    assert cli(*whole, "method.data_options.cache_latents=none").code == 0
    files = [next((tmp_path / run / "student").glob("*.safetensors")).read_bytes() for run in "ab"]
    assert files[0] == files[1]
    os.utime(tmp_path / "teacher")


# --- bad input


@pytest.mark.parametrize("kind,source,options,message", [
    ("pixels", "folder", {}, "has no labels, and the teacher has classes; a folder has them as the names of its"),
    ("prompts", "folder", {}, "has no captions, and the teacher takes prompts; a folder has them in metadata.jsonl"),
    ("prompts", "digits", {}, "method.data 'digits' has class labels and no captions, and the teacher takes prompts"),
    ("pixels", "digits", {"captions": "text"}, "captions is text, which means nothing to the named set digits"),
    ("pixels", "jsonl", {"cache_latents": "disk"}, "cache_latents is disk, but the teacher has no autoencoder"),
    ("pixels", "jsonl", {"classes": ["a"]}, "has the labels 0, 1, 2, 3, which data_options.classes does not name"),
    ("pixels", "many", {}, r"has the label 4 \(.*004.png\), and the teacher has the labels 0 to 3"),
    ("pixels", "nothing", {}, "there are no images 'nothing'"),
])
def test_bad_input_is_one_sentence(kind, source, options, message, tmp_path):
    teacher = teacher_of(kind)
    images, labels = stored.few(picture_size(teacher), classes=5 if source == "many" else 4)
    name = source
    if source in ("folder", "jsonl", "many"):
        name = stored.write("jsonl", tmp_path / "f", images, labels)
    if source == "folder":
        (tmp_path / "f/metadata.jsonl").unlink()
    with pytest.raises(UserError, match=message) as error:
        RealData(teacher, name, options=DataOptions(**options))
    assert "\n" not in str(error.value)


def test_pictures_without_a_caption_or_damaged_are_left_out(tmp_path, caplog):
    teacher = teacher_of("prompts")
    images, labels = stored.few(picture_size(teacher))
    folder = Path(stored.write("sidecar", tmp_path / "f", images, labels))
    (folder / "0/000.txt").unlink()
    (folder / "1/001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="1 of 7 pictures of .* have no caption: .*000.png"):
        RealData(teacher, str(folder))
    data = RealData(teacher, str(folder), options=DataOptions(on_error="skip"))
    assert len(data) == 5 and "1 that cannot be read and 1 without a caption" in caplog.text
    for path in folder.rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="no picture of .* can be used: of 7, 7 cannot be read"):
        RealData(teacher, str(folder), options=DataOptions(on_error="skip"))


@pytest.mark.parametrize("option", [{"captions": "text"}, {"label": "kind"}, {"classes": ["a"]}])
def test_options_that_nothing_looks_at_are_refused(tmp_path, option):
    teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=None))
    with pytest.raises(UserError, match=f"data_options.{next(iter(option))} is .* takes neither prompts nor labels"):
        RealData(teacher, str(tmp_path), options=DataOptions(**option))
