"""``flowdistill demo``: what a click draws, and the page, built with a small stand-in for gradio."""

import inspect
import os
import signal
import sys
import types

import numpy as np
import pytest
import torch

from flowdistill.cli.commands import main
from flowdistill.data.assets import asset_path
from flowdistill.evaluation import demo as module
from flowdistill.evaluation.demo import ALL_IN_TURN, Demo, answer, build, serve
from flowdistill.students import FlowMap, Generator, StudentInfo
from flowdistill.students.steps import Steps, teacher_times
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.exit import exit_process
from flowdistill.utils.images import grid
from tests.families import stable_diffusion
from tests.processes import Child
from tests.tiny import tiny_unet_pipeline


class Component:
    """A field of a page, with what it was made with; a block that others stand in."""

    made: list["Component"] = []

    def __init__(self, kind, given, named):
        self.kind, self.given, self.named, self.clicks = kind, given, named, []
        Component.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def click(self, function, **how):
        self.clicks.append((function, how))

    def launch(self, **how):
        self.launched = how
        if how["server_port"] == 1:
            raise OSError("Cannot find empty port in range: 1-1")
        return None, f"http://{how['server_name']}:7860/", None



class Trouble(Exception):
    """What the page shows."""


@pytest.fixture
def gradio():
    """A stand-in with the names that are used of gradio."""
    Component.made = []
    kinds = ("Blocks", "Markdown", "Row", "Column", "Textbox", "Dropdown", "Slider", "Number", "Button", "Image")
    made = {kind: lambda *given, kind=kind, **named: Component(kind, given, named) for kind in kinds}
    themes = types.SimpleNamespace(Base=lambda **named: named)
    return types.SimpleNamespace(**made, Error=Trouble, themes=themes)


def one_call(teacher, **info):
    return FlowMap.from_teacher(teacher, StudentInfo(**info))


@pytest.fixture(scope="module")
def digits():
    teacher = load_teacher(asset_path("digits-flow"))
    return Demo(one_call(teacher), teacher, "digits")


def test_a_click_draws_the_student_beside_the_teacher_from_the_same_noise(digits):
    student, teacher = digits.draw(10, seed=3, teacher_steps=2)
    images = digits.student.generate(num_images=10, seed=3)
    plain = grid(images, 5)
    factor = student.picture.width // plain.width
    assert factor > 1 and (np.asarray(student.picture)[::factor, ::factor] == np.asarray(plain)).all()
    assert student.picture.size == teacher.picture.size and student.picture != teacher.picture
    assert student.words.startswith("student: 1 call of the network, ")
    assert student.words.endswith(" ms an image in a batch of 10")
    assert teacher.words.startswith("teacher: 2 calls of the network, ")
    # An untrained flow map is its teacher's one Euler step, so the two are of the same noise and labels.
    same = digits.draw(4, label="7", teacher_steps=1)
    assert np.abs(np.asarray(same[0].picture, int) - np.asarray(same[1].picture, int)).max() <= 1
    sevens = grid(digits.student.generate(labels=[7], num_images=4), 4)
    assert (np.asarray(same[0].picture.resize(sevens.size, 0)) == np.asarray(sevens)).all()
    assert digits.draw(1)[0].words.endswith("ms an image")


@pytest.mark.parametrize(("given", "sentence"), [
    ({"count": 0}, "must be 1 to 40"), ({"count": 41}, "must be 1 to 40"), ({"teacher_steps": 0}, "at least 1"),
    ({"steps": 2}, "was trained for 1 call"), ({"seed": -1}, "seed"), ({"guidance": 3.0}, "only 1.0"),
    ({"label": "12"}, "label 12 is out of range"),
])
def test_what_a_student_does_not_take_is_shown_on_the_page(digits, given, sentence):
    with pytest.raises(UserError, match=sentence):
        digits.draw(**{"count": 2, "teacher_steps": 1} | given)
    clicked = answer(digits, list(given), Trouble)
    with pytest.raises(Trouble, match=sentence):
        clicked(*given.values())


def fields(gradio, demo):
    """The fields of a page by their labels, and what a click on its button gives for their values."""
    build(gradio, demo)
    button = [one for one in Component.made if one.kind == "Button"][-1]
    (function, how), = button.clicks
    assert [one.kind for one in how["outputs"]] == ["Image", "Markdown"] * (1 if demo.teacher is None else 2)
    return {one.named["label"]: one for one in how["inputs"]}, function(*(one.named["value"] for one in how["inputs"]))


def test_the_page_has_the_fields_that_a_student_takes(digits, gradio, monkeypatch):
    monkeypatch.setattr(module, "TEACHER_STEPS", 2)
    found, drawn = fields(gradio, digits)
    assert list(found) == ["Class", "Images", "Seed", "Calls of the teacher"] and len(drawn) == 4
    assert found["Class"].named["choices"] == [ALL_IN_TURN, *map(str, range(10))]
    blocks = next(one for one in Component.made if one.kind == "Blocks")
    assert blocks.named["analytics_enabled"] is False
    # Nothing sends a picture anywhere.
    assert all("share" not in one.named["buttons"] for one in Component.made if one.kind == "Image")


def test_the_page_of_several_calls_and_of_a_range_of_guidance(gradio):
    teacher = load_teacher(tiny_unet_pipeline())
    times = teacher_times(teacher.path, 3)
    few = Generator.from_teacher(teacher, StudentInfo(), steps=Steps(times, "stochastic", times[0]))
    found, drawn = fields(gradio, Demo(few, None, "few"))
    assert "Calls of the teacher" not in found and found["Calls of the student"].named["choices"] == [1, 2, 3]
    assert len(drawn) == 2 and "3 calls" in drawn[1]
    student = one_call(teacher, guidance_range=(1.0, 3.0), guidance_scale=2.0)
    found, _ = fields(gradio, Demo(student, None, "guided"))
    assert [found["Guidance"].named[name] for name in ("minimum", "maximum", "value")] == [1.0, 3.0, 2.0]


def test_the_page_of_a_student_that_takes_prompts(gradio):
    teacher = load_teacher(stable_diffusion(), prompts=["a cat", "a dog"])
    demo = Demo(one_call(teacher), None, "texts")
    found, drawn = fields(gradio, demo)
    assert list(found) == ["Prompts, one a line", "Images", "Seed"] and demo.labels is None
    assert found["Prompts, one a line"].named["value"] == "a cat\na dog" and len(drawn) == 2
    two = demo.draw(2, prompts=" a dog \n\na cat")[0].picture
    expected = grid(demo.student.generate(prompts=["a dog", "a cat"]), 2)
    assert (np.asarray(two.resize(expected.size, 0)) == np.asarray(expected)).all()
    with pytest.raises(UserError, match="no prompt"):
        demo.draw(1, prompts=" \n")


def test_it_is_for_this_machine_and_says_where(digits, gradio, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "gradio_module", lambda: gradio)
    digits.student.save(tmp_path / "student")
    said, before = [], signal.getsignal(signal.SIGINT)

    def announce(line):
        said.append(line)
        os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        assert serve(str(tmp_path / "student"), torch.device("cpu"), announce=announce) == number
    blocks = next(one for one in Component.made if one.kind == "Blocks")
    assert said == [f"{tmp_path / 'student'} is shown at http://127.0.0.1:7860/ until Ctrl-C"] * 2
    assert blocks.launched["server_name"] == "127.0.0.1" and signal.getsignal(signal.SIGINT) == before
    assert blocks.launched["share"] is False and blocks.launched["footer_links"] == []
    assert blocks.launched["theme"]["font"] == ["system-ui", "sans-serif"]
    with pytest.raises(UserError, match="cannot listen at 127.0.0.1, port 1: Cannot find empty port"):
        serve(str(tmp_path / "student"), torch.device("cpu"), port=1)
    with pytest.raises(UserError, match="has no student to show"):
        serve(str(asset_path("digits-flow")), torch.device("cpu"))


GRADIO = """
import threading, types

class Part:
    def __init__(self, *given, **named):
        self.value = named.get("value")
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def click(self, function, inputs, **how):
        Part.clicked = function, [one.value for one in inputs]
    def launch(self, **how):
        def busy():  # no daemon: the interpreter would wait for it
            function, values = Part.clicked
            while True:
                function(*values)
        threading.Thread(target=busy).start()
        return None, "http://there/", None

Blocks = Markdown = Row = Column = Textbox = Dropdown = Slider = Number = Button = Image = Part
Error = ValueError
themes = types.SimpleNamespace(Base=Part)
"""


def served(folder):
    sys.path.insert(0, folder)
    exit_process(main(["demo", f"{folder}/student"]))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_while_pictures_are_made(tmp_path, number, code):
    (tmp_path / "gradio.py").write_text(GRADIO)
    teacher = load_teacher(stable_diffusion(), prompts=["a cat", "a dog"])
    one_call(teacher).save(tmp_path / "student")
    with Child(served, str(tmp_path)) as child:
        child.line(f"{tmp_path / 'student'} is shown at http://there/ until Ctrl-C")
        os.kill(child.pid, number)
        assert child.wait(30) == code
        assert child.errors.endswith("flowdistill: interrupted\n")


def test_the_pages_interface_has_the_names_of_its_fields(digits):
    """gradio reads them from the signature of what a click calls."""
    names = ["label", "count", "seed", "teacher_steps"]
    assert list(inspect.signature(answer(digits, names, Trouble)).parameters) == names


def test_without_gradio_one_sentence_says_how_to_get_it(cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = cli("demo", tmp_path)
    assert result.code == 2 and "pip install 'flowdistill[demo]'" in result.err and result.err.count("\n") == 1


def test_an_unconditional_student_is_asked_for_noise_alone(gradio):
    teacher = load_teacher(tiny_unet_pipeline(num_class_embeds=None))
    found, drawn = fields(gradio, Demo(one_call(teacher), None, "plain"))
    assert list(found) == ["Images", "Seed"] and len(drawn) == 2
