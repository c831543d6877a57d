"""The pictures of a run: during training, and at its end."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from flowdistill.data.assets import asset_path
from flowdistill.evaluation.comparison import save_comparison, save_teacher_calls
from flowdistill.methods.msd.partition import ClassTable, Partition
from flowdistill.methods.msd.student import RoutedStudent
from flowdistill.students import FlowMap, Generator, StudentInfo
from flowdistill.students.steps import Steps, teacher_times
from flowdistill.teachers import load_teacher
from flowdistill.training.callbacks import save_samples
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import to_uint8
from flowdistill.utils.randomness import indexed_noise
from tests.families import stable_diffusion
from tests.tiny import tiny_unet

CELL = 32 + 2  # 8x8 digits are drawn at 32 pixels, 2 between them


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(asset_path("digits-flow"))


def student_of(teacher, calls, stepping="stochastic"):
    times = teacher_times(teacher.path, calls)
    return Generator.from_teacher(teacher, StudentInfo(), steps=Steps(times, stepping, times[0]))


def read_rows(path, count, columns):
    """Digits (count, columns, 8, 8), uint8, of a picture of ``count`` titled rows, and the titles."""
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[1] == columns * CELL + 2 and pixels.shape[0] % count == 0
    parts = np.split(pixels, count)
    band = parts[0].shape[0] - CELL - 2
    digits = [[part[band + 2 : band + 34 : 4, 2 + CELL * i : 34 + CELL * i : 4] for i in range(columns)]
              for part in parts]
    return torch.from_numpy(np.array(digits)), [part[:band] for part in parts]


@pytest.mark.parametrize("stepping", ["stochastic", "deterministic"])
def test_a_student_of_several_calls_is_beside_the_teacher_at_as_many(tmp_path, teacher, stepping):
    student = student_of(teacher, 3, stepping)
    save_comparison(teacher, student, tmp_path / "c.png", teacher_steps=(2, 3), columns=5)
    found, titles = read_rows(tmp_path / "c.png", 5, 5)
    noise, condition = indexed_noise((1, 8, 8), 0, range(5)), teacher.encode(labels=range(5))
    made = [teacher.decode(teacher.sample(noise, condition, steps=steps)) for steps in (2, 3)]
    made += [student.decode(student(noise, condition, steps=k)) for k in (1, 2, 3)]
    assert (found - to_uint8(torch.stack(made))[:, :, 0].int()).abs().max() <= 1
    assert all((a != b).any() for i, a in enumerate(titles) for b in titles[:i])
    # Untrained, its Euler steps to the last call are the teacher's own.
    assert torch.equal(found[1], found[4]) == (stepping == "deterministic")


def test_the_teacher_is_shown_at_as_many_calls_as_the_student_has(tmp_path, teacher, monkeypatch, short_pictures):
    monkeypatch.setattr("flowdistill.evaluation.comparison.TEACHER_STEPS", short_pictures)
    asked = []
    real = teacher.sample
    monkeypatch.setattr(teacher, "sample", lambda *args, steps: asked.append(steps) or real(*args, steps=1))
    for calls, rows in ((1, 3), (4, 1)):
        save_comparison(teacher, student_of(teacher, calls), tmp_path / "c.png", columns=2)
        assert asked == [50, calls]
        blocks = 2 + calls
        height = Image.open(tmp_path / "c.png").height
        assert height % blocks == 0 and rows * CELL < height // blocks < (rows + 1) * CELL
        asked.clear()


@pytest.mark.parametrize("count, columns", [(40, 10), (4, 4)])
def test_a_grid_has_a_row_for_each_number_of_calls_from_the_same_noise(tmp_path, teacher, count, columns):
    student = student_of(teacher, 3)
    save_samples(student, tmp_path / "s.png", count)
    found, titles = read_rows(tmp_path / "s.png", 3, columns)
    noise, condition = indexed_noise((1, 8, 8), 0, range(columns)), student.examples(range(columns))
    made = torch.stack([student.decode(student(noise, condition, steps=k)) for k in (1, 2, 3)])
    assert (found - to_uint8(made)[:, :, 0].int()).abs().max() <= 1
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()
    assert (titles[0] != titles[1]).any() and (titles[1] != titles[2]).any()


def test_several_students_of_several_calls_have_the_same_rows(tmp_path, teacher):
    one = student_of(teacher, 2)
    parts = Partition.of_classes(ClassTable("sequential", (0,) * 3 + (1,) * 7))
    save_samples(one, tmp_path / "one.png", 20)
    save_samples(RoutedStudent([one, one], parts), tmp_path / "all.png", 20)
    first, second = (read_rows(tmp_path / f"{name}.png", 2, 10)[0] for name in ("one", "all"))
    assert (first.int() - second.int()).abs().max() <= 1


def test_blocks_start_from_the_same_noise(tmp_path, teacher):
    """An untrained student is the teacher's single Euler step, so the last two blocks are equal."""
    student = FlowMap.from_teacher(teacher, StudentInfo())
    save_comparison(teacher, student, tmp_path / "c.png", teacher_steps=(4, 1), rows_each=2, columns=5)
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("L")).astype(int)
    assert pixels.shape[1] == 5 * CELL + 2 and pixels.shape[0] % 3 == 0
    parts = np.split(pixels, 3)
    titles, blocks = zip(*((part[: -2 * CELL - 2], part[-2 * CELL - 2 :]) for part in parts), strict=True)
    assert (blocks[1] == blocks[2]).all()
    assert np.abs(blocks[0] - blocks[1]).mean() > 5
    # Black letters on white; "teacher, 4 calls", "teacher, 1 call" and "student, 1 call" are three different texts.
    assert all((title == 255).mean() > 0.5 and title.min() < 64 for title in titles)
    assert all((titles[a] != titles[b]).any() for a, b in ((0, 1), (1, 2), (0, 2)))


def test_a_teacher_by_its_calls_of_prompts_and_without_conditions(tmp_path, monkeypatch):
    monkeypatch.setattr("flowdistill.evaluation.comparison.TEACHER_STEPS", 5)  # the test beside this one takes all 50
    texts = load_teacher(stable_diffusion())
    said = save_teacher_calls(texts, tmp_path / "texts.png", ["a cat", "a dog"], guidance_scale=2.0)
    assert said[-1] == "from left to right: a cat; a dog"
    assert "the pipeline's own call" in said[0] and (tmp_path / "texts.png").is_file()
    with pytest.raises(UserError, match="takes prompts; give --prompt"):
        save_teacher_calls(texts, tmp_path / "none.png")
    plain = load_teacher(DDPMPipeline(tiny_unet(num_class_embeds=None), DDPMScheduler()))
    with pytest.raises(UserError, match="DDPMPipeline takes no prompts"):
        save_teacher_calls(plain, tmp_path / "none.png", ["a cat"])
    # Where its own call is no loop that can be seeded, the other rows are there and the reason is said.
    monkeypatch.setattr("flowdistill.evaluation.comparison.not_measured", lambda teacher: "it draws noise of its own")
    said = save_teacher_calls(plain, tmp_path / "short.png")
    assert said[1] == "without the pipeline's own call: it draws noise of its own" and "own call" not in said[0]
    with Image.open(tmp_path / "short.png") as short:
        assert short.size[0] == 10 * CELL + 2
    assert len(said) == 2 and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(("scheduler", "reason"), [
    (DDPMScheduler(prediction_type="flow_prediction"), "fails in a step of its DDPMScheduler: prediction_type given"),
    (DDPMScheduler(num_train_timesteps=2), "steps is refused by its DDPMScheduler"),
])
def test_a_call_that_fails_is_left_out_with_its_reason(tmp_path, scheduler, reason):
    lines = save_teacher_calls(load_teacher(DDPMPipeline(tiny_unet(), scheduler)), tmp_path / "short.png")
    assert lines[0].endswith("calls of the teacher")
    assert lines[1].startswith("without the pipeline's own call: ") and reason in lines[1]
    read_rows(tmp_path / "short.png", 3, 10)
