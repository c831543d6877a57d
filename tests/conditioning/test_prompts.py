"""Prompts: files, encoding once, drawing by weight, students that carry their text encoders."""

import io
import logging as python_logging

import pytest
import torch

from flowdistill.conditioning.conditions import Condition
from flowdistill.conditioning.prompts import read_prompts
from flowdistill.conditioning.text_encoders import TextEncoders
from flowdistill.students import FlowMap, StudentInfo, load_student
from flowdistill.teachers import load_teacher
from flowdistill.utils import logging
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.families import FAMILIES, PROMPTS, sdxl, stable_diffusion


@pytest.fixture(autouse=True)
def no_embeddings_of_other_tests(tmp_path, monkeypatch):
    """What counts as encoded must not depend on which tests came before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "pipeline"
    stable_diffusion().save_pretrained(path)
    return path


@pytest.fixture
def opened(monkeypatch):
    """Counts how often text encoders are loaded or used."""
    calls, original = [], TextEncoders.opened

    def counting(self, device):
        calls.append(self.folder)
        return original(self, device)

    monkeypatch.setattr(TextEncoders, "opened", counting)
    return calls


# --- files


def test_prompts_files(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a cat\n\n  a dog \n")
    assert read_prompts(text) == (["a cat", "a dog"], [0.5, 0.5])
    lines.write_text('{"prompt": "a cat", "weight": 3}\n{"prompt": ""}\n')
    assert read_prompts(lines) == (["a cat", ""], [0.75, 0.25])


@pytest.mark.parametrize(
    "content, message",
    [("", "has no prompt"), ('{"prompt": 3}', "line 1 of .*must be like"), ('{"prompt": "a", "weight": -1}', "line 1"),
     ('{"prompt": "a", "weight": 0}', "no prompt with a weight above 0"), ("a cat", "line 1"), ("[1]", "line 1")],
)
def test_bad_prompts_files(tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(file)
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


# --- conditions


def test_rows_carry_their_negatives():
    condition = Condition({"a": torch.arange(3.0)}, Condition({"a": -torch.arange(3.0)}))
    assert condition[1:].negative.tensors["a"].tolist() == [-1, -2]
    both = Condition.cat([condition, condition[:1]])
    assert both.negative.tensors["a"].tolist() == [0, -1, -2, 0]
    assert Condition.cat([condition, condition.negative]).negative is None
    assert condition.replace(b=torch.zeros(3)).tensors.keys() == {"a", "b"}


def test_a_folder_and_a_live_pipeline_give_the_same_condition(folder, opened):
    live, stored = load_teacher(stable_diffusion()), load_teacher(folder)
    a, b = live.encode(prompts=PROMPTS), stored.encode(prompts=PROMPTS)
    assert torch.equal(a.tensors["prompt_embeds"], b.tensors["prompt_embeds"])
    assert not torch.equal(a.tensors["prompt_embeds"][0], a.tensors["prompt_embeds"][1])
    count = len(opened)
    load_teacher(folder).encode(prompts=PROMPTS)
    assert len(opened) == count  # from the cache, without loading a text encoder
    load_teacher(folder).encode(prompts=PROMPTS[:1])
    assert len(opened) == count + 1


def test_text_encoders_are_told_apart_by_content(folder):
    a, b = TextEncoders(stable_diffusion(), torch.float32), TextEncoders(stable_diffusion(), torch.float32)
    assert a.fingerprint == b.fingerprint
    other = stable_diffusion()
    with torch.no_grad():
        next(other.text_encoder.parameters()).view(-1)[0] += 1
    assert TextEncoders(other, torch.float32).fingerprint != a.fingerprint
    assert TextEncoders(folder, torch.float32).fingerprint == TextEncoders(folder, torch.float32).fingerprint


def test_a_teacher_from_a_folder_holds_no_text_encoder(folder):
    import gc

    from transformers import CLIPTextModel

    def alive():
        gc.collect()
        return {id(o) for o in gc.get_referrers(CLIPTextModel) if isinstance(o, CLIPTextModel)}

    others = alive()  # of tests before
    teacher = load_teacher(folder, prompts=PROMPTS)
    teacher.draw_condition(Draw(0, 0, rows=4))
    assert teacher.prompts.text.live is None and alive() <= others


def test_sdxl_null_condition_is_zero_or_the_empty_prompt():
    prompt = PROMPTS[:1]
    zeros = load_teacher(sdxl()).null(load_teacher(sdxl()).encode(prompts=prompt))
    assert zeros.tensors["prompt_embeds"].abs().max() == 0 and zeros.tensors["pooled_embeds"].abs().max() == 0
    assert zeros.tensors["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    for teacher in (load_teacher(sdxl(zeros=False)), load_teacher(sdxl(), negative_prompt="")):
        null, empty = teacher.null(teacher.encode(prompts=prompt)), teacher.encode(prompts=[""])
        assert torch.equal(null.tensors["prompt_embeds"], empty.tensors["prompt_embeds"])


def test_draws_follow_the_weights(tmp_path, folder):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a red cat", "weight": 3}\n{"prompt": "two birds", "weight": 1}\n')
    teacher = load_teacher(folder, prompts=file)
    drawn = teacher.draw_condition(Draw(0, 0, rows=400)).tensors["prompt_embeds"]
    first = (drawn == teacher.encode(prompts=PROMPTS[:1]).tensors["prompt_embeds"]).flatten(1).all(1)
    second = (drawn == teacher.encode(prompts=PROMPTS[1:2]).tensors["prompt_embeds"]).flatten(1).all(1)
    assert (first ^ second).all() and 270 < first.sum() < 330
    parts = [teacher.draw_condition(Draw(0, 0, rows=8, rank=r, world=2)).tensors["prompt_embeds"] for r in (0, 1)]
    whole = teacher.draw_condition(Draw(0, 0, rows=8)).tensors["prompt_embeds"]
    assert torch.equal(whole[0::2], parts[0]) and torch.equal(whole[1::2], parts[1])


def test_bad_requests(folder, tmp_path):
    from tests.tiny import tiny_unet_pipeline

    teacher = load_teacher(folder)
    with pytest.raises(UserError, match="needs prompts, and takes no labels"):
        teacher.encode(labels=[1])
    with pytest.raises(UserError, match="needs prompts"):
        teacher.encode()
    with pytest.raises(UserError, match="prompts must be a list"):
        teacher.encode(prompts="a cat")
    with pytest.raises(UserError, match="negative_prompts must be a list of 1 texts"):
        teacher.encode(prompts=["a"], negative_prompts=["b", "c"])
    with pytest.raises(UserError, match="set teacher.prompts"):
        teacher.draw_condition(Draw(0, 0, rows=2))
    with pytest.raises(UserError, match="takes class labels 0 to 3"):
        load_teacher(tiny_unet_pipeline()).encode(prompts=["a"])
    with pytest.raises(UserError, match="are for text-to-image"):
        load_teacher(tiny_unet_pipeline(), prompts=["a"])
    with pytest.raises(UserError, match="image_size is 15.*multiple of 2"):
        load_teacher(folder, image_size=15)
    assert load_teacher(folder, image_size=32).shape == (4, 16, 16)


# --- students


def test_evaluation_goes_through_the_prompts(folder, tmp_path):
    from flowdistill.evaluation import prompt_conditions, student_sampler, teacher_sampler
    from flowdistill.evaluation.generation import generate

    teacher = load_teacher(folder, prompts=PROMPTS)
    student = FlowMap.from_teacher(teacher, StudentInfo())
    made = [
        torch.cat([batch.images for batch in generate(
            sampler, model.shape, 5, seed=3, batch_size=2, condition=prompt_conditions(model), progress=False)])
        for model, sampler in ((student, student_sampler(student)), (teacher, teacher_sampler(teacher, 1)))
    ]
    assert torch.allclose(made[0], student.generate(num_images=5, seed=3), atol=1e-5)
    assert torch.allclose(*made, atol=1e-5)
    with pytest.raises(UserError, match="needs prompts"):
        FlowMap.from_teacher(load_teacher(folder), StudentInfo()).generate(num_images=1)


def test_student_carries_its_text_encoders(folder, tmp_path):
    teacher = load_teacher(folder, prompts=PROMPTS, negative_prompt="ugly")
    student = FlowMap.from_teacher(teacher, StudentInfo("freeflow"))
    expected = student.generate(prompts=["a blue dog"], num_images=3, seed=2)
    student.save(tmp_path / "s")
    again = load_student(tmp_path / "s")
    assert again.prompts.text.fingerprint == teacher.prompts.text.fingerprint
    assert torch.equal(again.generate(prompts=["a blue dog"], num_images=3, seed=2), expected)
    assert torch.equal(again.generate(num_images=3, seed=2), student.generate(prompts=PROMPTS, seed=2))
    assert again.prompts.prompts == PROMPTS and again.prompts.negative == "ugly"
    live = FlowMap.from_teacher(load_teacher(stable_diffusion()), StudentInfo())
    live.save(tmp_path / "live")
    assert torch.equal(load_student(tmp_path / "live").generate(prompts=PROMPTS), live.generate(prompts=PROMPTS))


def test_a_run_from_prompts_to_pictures(folder, tmp_path, cli):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    config = tmp_path / "c.yaml"
    config.write_text(f"""
output_dir: {tmp_path / "run"}
teacher: {{source: {folder}, prompts: {tmp_path / "p.txt"}}}
method: {{name: freeflow, guidance_max: 3.0}}
train: {{steps: 2, batch_size: 4, num_samples: 4, device: cpu}}
evaluation: {{at_end: false}}
""")
    result = cli("distill", config)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "samples" / "final.png").is_file()
    for model in (tmp_path / "run", folder):
        steps = [] if model != folder else ["--steps", 2]
        out = tmp_path / f"{model.name}.png"
        arguments = ["sample", model, "--num-images", 4, "--prompts", tmp_path / "p.txt", "--out", out, *steps]
        result = cli(*arguments)
        assert result.code == 0 and out.is_file(), result.err
    result = cli("distill", config, "teacher.prompts=null", f"output_dir={tmp_path / 'other'}")
    assert result.code == 2 and "set teacher.prompts to a file" in result.err
    for command in (["sample", folder, "--num-images", 2, "--out", tmp_path / "x.png"],
                    ["evaluate", folder, "--num-images", 4, "--teacher-steps", 1, "--reference", "digits",
                     "--features", "digits"]):
        result = cli(*command)
        assert result.code == 2 and "--prompts FILE" in result.err
    result = cli("inspect", folder)
    assert "prompts, by CLIPTextModel; classifier-free guidance" in result.out


def test_prompts_that_are_too_long_are_said_once(tmp_path, monkeypatch, caplog):
    """Not one by one, in as many lines as there are prompts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(logging._cut_prompts, "said", False)
    heard = io.StringIO()  # what the libraries' own handlers show
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(python_logging.getLogger(name), "handlers", [python_logging.StreamHandler(heard)])
    teacher = load_teacher(FAMILIES["sd"].make())
    for prompts in (["cat " * 40, "dog " * 40], ["sea " * 40]):
        teacher.encode(prompts=prompts)
    assert "truncated" not in heard.getvalue() and "Token indices" not in heard.getvalue()
    assert caplog.text.count("prompts are too long for a text encoder and lose their ends: it reads 16 tokens") == 1
    FAMILIES["sd"].make()("cat " * 40, num_inference_steps=1)  # nobody else's words are taken
    assert "was truncated" in heard.getvalue()
