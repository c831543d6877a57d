"""``flowdistill demo``: a page on this machine that draws what is asked for, the teacher's images beside the student's.

All of gradio that is used is in :func:`build` and :func:`serve`; :class:`Demo` knows nothing of it.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from flowdistill.conditioning import Condition
from flowdistill.evaluation.comparison import TEACHER_STEPS, calls_in_words
from flowdistill.evaluation.evaluate import _open, student_sampler, teacher_sampler
from flowdistill.evaluation.generation import Sampler, _clock
from flowdistill.students import Student, describe
from flowdistill.teachers import Teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.exit import EndSignals
from flowdistill.utils.images import grid
from flowdistill.utils.randomness import indexed_noise
from flowdistill.utils.seeds import check_seed

ALL_IN_TURN = "all in turn"
MOST = 40
"""Images that can be asked for at once."""
WIDTH = 560
"""Pixels of a picture's width up to which small images are enlarged, each pixel into a square, at most eightfold."""
CSS = "img { image-rendering: pixelated; } footer { display: none !important; }"


@dataclass(frozen=True)
class Drawn:
    """Images of one model as a picture, and how they were made, in words."""

    picture: Image.Image
    words: str


class Demo:
    """A student, and its teacher where it is there, for people who ask for images one click at a time.

    Args:
        student, teacher: on their devices.
        name: what the student is called.
    """

    def __init__(self, student: Student, teacher: Teacher | None, name: str) -> None:
        self.student, self.teacher, self.name = student, teacher, name
        low, high = student.info.guidance_range or (student.info.guidance_scale,) * 2
        self.guidance = (low, high) if low < high else None

    @classmethod
    def open(cls, run: str, device: torch.device, with_teacher: bool = True) -> Demo:
        """The student of a run, a student folder or an exported pipeline of several calls, and the run's teacher.

        Raises:
            UserError: nothing there, or no student.
        """
        subject = _open(run, device, with_teacher)
        if subject.student is None:
            raise UserError(f"{run} has no student to show; give a run that has come to its end, or a student folder")
        return cls(subject.student, subject.teacher, subject.name)

    @property
    def prompts(self) -> Sequence[str] | None:
        """Prompts to begin with, for a student that takes any; None for another."""
        if self.student.prompts is None:
            return None
        return list(self.student.prompts.prompts or [])[:4] or ["a photo of a cat"]

    @property
    def labels(self) -> Sequence[str] | None:
        """What may be chosen of a student that takes class labels; None for another."""
        classes = self.student.classes
        return None if classes is None or self.student.prompts is not None else [ALL_IN_TURN, *map(str, classes.shown)]

    def draw(
        self, count: float = 10, seed: float = 0, prompts: str = "", label: str = ALL_IN_TURN,
        steps: float | None = None, guidance: float | None = None, teacher_steps: float = TEACHER_STEPS,
    ) -> list[Drawn]:
        """Images of the student, and of the teacher from the same noise.

        Args:
            count: of images, 1 to 40.
            seed: of the noise.
            prompts: one a line, gone through in turn.
            label: a class, or all in turn.
            steps: network calls of the student; None for all that it has.
            guidance: of both, where the student takes it; None for the student's own.
            teacher_steps: Euler steps of the teacher.

        Raises:
            UserError: what the student does not take.
        """
        number = int(count)
        if not 1 <= number <= MOST:
            raise UserError(f"the number of images is {number}; it must be 1 to {MOST}")
        if int(teacher_steps) < 1:
            raise UserError(f"the teacher's calls are {int(teacher_steps)}; there must be at least 1")
        calls = self.student.checked_steps(None if steps is None else int(steps))
        given = self._asked(number, prompts, label)
        noise = indexed_noise(self.student.shape, check_seed(int(seed)), range(number))
        scale = self.student.info.guidance_scale if guidance is None else float(guidance)
        sampler = student_sampler(self.student, None if guidance is None else scale, calls)
        columns = number if number <= 4 else 4 if min(self.student.shape[-2:]) > 64 else 5
        drawn = [self._drawn("student", calls, sampler, noise, self.student.encode(**given), columns)]
        if self.teacher is not None:
            guided = scale if self.teacher.can_guide else 1.0
            sampler = teacher_sampler(self.teacher, int(teacher_steps), guidance_scale=guided)
            drawn.append(self._drawn("teacher", int(teacher_steps), sampler, noise, self.teacher.encode(**given),
                                     columns))
        return drawn

    def _asked(self, count: int, prompts: str, label: str) -> dict[str, Any]:
        """The labels or prompts of the images, as ``encode`` takes them."""
        if self.student.prompts is not None:
            listed = [line.strip() for line in prompts.splitlines() if line.strip()]
            if not listed:
                raise UserError("there is no prompt; write one, or several, one a line")
            return {"prompts": [listed[i % len(listed)] for i in range(count)]}
        if self.student.classes is None:
            return {}
        shown = self.student.classes.shown if label == ALL_IN_TURN else [int(label)]
        return {"labels": [shown[i % len(shown)] for i in range(count)]}

    @torch.no_grad()
    def _drawn(
        self, who: str, calls: int, sampler: Sampler, noise: torch.Tensor, condition: Condition | None, columns: int
    ) -> Drawn:
        start = _clock()
        images = sampler(noise, condition)
        milliseconds = 1000 * (_clock() - start) / len(noise)
        words = (f"{who}: {calls_in_words(calls)} of the network, {milliseconds:,.1f} ms an image"
                 + (f" in a batch of {len(noise)}" if len(noise) > 1 else ""))
        picture = grid(images, columns)
        factor = max(1, min(8, WIDTH // picture.width))
        return Drawn(picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST), words)


def build(gradio: Any, demo: Demo) -> Any:
    """The page as gradio's Blocks."""
    with gradio.Blocks(title=f"{demo.name}: flowdistill", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {demo.name}\n\n```text\n{describe(demo.student)}\n```")
        asked: dict[str, Any] = {}
        if demo.prompts is not None:
            asked["prompts"] = gradio.Textbox(value="\n".join(demo.prompts), label="Prompts, one a line", lines=3)
        if demo.labels is not None:
            asked["label"] = gradio.Dropdown(choices=list(demo.labels), value=ALL_IN_TURN, label="Class")
        with gradio.Row():
            asked["count"] = gradio.Slider(minimum=1, maximum=MOST, value=10 if demo.prompts is None else 1, step=1,
                                           label="Images")
            asked["seed"] = gradio.Number(value=0, precision=0, minimum=0, label="Seed")
            if demo.student.num_steps > 1:
                asked["steps"] = gradio.Dropdown(choices=list(demo.student.step_counts), value=demo.student.num_steps,
                                                 label="Calls of the student")
            if demo.guidance is not None:
                low, high = demo.guidance
                asked["guidance"] = gradio.Slider(minimum=low, maximum=high, value=demo.student.info.guidance_scale,
                                                  label="Guidance")
            if demo.teacher is not None:
                asked["teacher_steps"] = gradio.Number(value=TEACHER_STEPS, precision=0, minimum=1,
                                                       label="Calls of the teacher")
        button = gradio.Button("Generate", variant="primary")
        shown = []
        with gradio.Row():
            for who in ("student", *(["teacher"] if demo.teacher is not None else [])):
                with gradio.Column():
                    # Without the button that sends a picture to another server.
                    shown += [gradio.Image(label=who, type="pil", format="png", interactive=False,
                                           buttons=["download", "fullscreen"]), gradio.Markdown()]
        button.click(answer(demo, list(asked), gradio.Error), inputs=list(asked.values()), outputs=shown,
                     api_name="generate", concurrency_limit=1)
    return blocks


def answer(demo: Demo, names: Sequence[str], error: type[Exception]) -> Callable[..., list[Any]]:
    """What a click does: the values of the fields ``names`` to a picture and a line of text for each model; ``error``
    is what the page shows of one that a user can mend."""

    def clicked(*values: Any) -> list[Any]:
        try:
            drawn = demo.draw(**dict(zip(names, values, strict=True)))
        except UserError as problem:
            raise error(str(problem)) from problem
        return [part for one in drawn for part in (one.picture, one.words)]

    # By which gradio names the parameters of the page's API, which would be param_0, param_1, ... else.
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    clicked.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, positional) for name in names])
    return clicked


def gradio_module() -> Any:
    """gradio, told to send nothing about its use.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise UserError("the demo needs gradio, which is not installed; run: "
                        "pip install 'flowdistill[demo]'") from error


def serve(run: str, device: torch.device, host: str = "127.0.0.1", port: int | None = None, with_teacher: bool = True,
          announce: Callable[[str], object] = print) -> int:
    """Show the page until SIGINT or SIGTERM comes, by default to this machine alone; returns the signal's number.

    Pictures that are being made go on being made, by threads that the end of the interpreter would wait for: who calls
    this ends the process by :func:`flowdistill.utils.exit.exit_at_once`.

    Args:
        run: see :meth:`Demo.open`.
        host: address to listen at.
        port: None for the first free one from 7860 on.
        announce: gets the line that says where the page is.

    Raises:
        UserError: gradio is not installed, there is no student, or the port is taken.
    """
    gradio = gradio_module()
    demo = Demo.open(run, device, with_teacher)
    demo.draw(1, prompts="\n".join(demo.prompts or []), teacher_steps=1)  # the first call of a network is slower
    blocks = build(gradio, demo)
    fonts = ["system-ui", "sans-serif"]  # gradio's own come from another server
    theme = gradio.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"])
    # gradio's own waiting ends in ordinary calls, and those in waiting for its server, which waits for pictures.
    with EndSignals() as signals:
        try:
            _, url, _ = blocks.launch(
                server_name=host, server_port=port, share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
                show_error=True, theme=theme, css=CSS, footer_links=[], ssr_mode=False, enable_monitoring=False)
        except OSError as error:
            raise UserError(f"the demo cannot listen at {host}, port {port or '7860 to 7959'}: {error}") from error
        announce(f"{demo.name} is shown at {url} until Ctrl-C")
        return signals.wait()
