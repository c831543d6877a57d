"""The contract between a method and the loop that trains it: neither knows more of the other than what stands here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flowdistill.config import METHODS, MISSING, OptimizerConfig, RunConfig, register_method
from flowdistill.students import Student
from flowdistill.teachers import Teacher
from flowdistill.teachers.weight_files import NamedFiles
from flowdistill.utils.randomness import Draw
from flowdistill.utils.text import JsonObject

if TYPE_CHECKING:
    from flowdistill.training.run import Run

__all__ = ["METHODS", "About", "Draw", "Figures", "Method", "Networks", "Role", "SingleStudentMethod", "Suggestion",
           "facts_of", "guidance_for", "register_method", "start_before_noise"]

NetworkCall = Callable[..., Any]
"""A network as it is called; it returns what its ``forward`` does."""
Networks = Mapping[str, NetworkCall]
"""A method's networks by role name, called as the bare networks are; they run under the chosen precision, distributed,
and return float32."""
Figures = dict[str, Tensor]
"""What is logged beside a loss, by name: 0-d, detached, never read on the host by the method."""


@dataclass
class Role:
    """A network that trains.

    Attributes:
        network: float32; its parameters with ``requires_grad`` are trained, the others belong to the teacher or are
            rebuilt by the method and are not saved.
        optimizer: its optimiser and learning rate.
        ema: whether a moving average of the weights is kept.
    """

    network: nn.Module
    optimizer: OptimizerConfig
    ema: bool = False


@dataclass(frozen=True)
class About:
    """What a table of the methods says of one; see :func:`facts_of` for what stands in the place of an empty text.

    Attributes:
        sentence: what it does.
        paper: where it was published.
        data: whether it needs images: no, optional or yes.
        calls: of the student for an image.
        networks: what trains beside the student; "none" where nothing does.
        usual: why it is taken for a teacher for which nobody has named a method; empty: it is not.
    """

    sentence: str = ""
    paper: str = ""
    data: str = ""
    calls: str = ""
    networks: str = ""
    usual: str = ""


class Suggestion(NamedTuple):
    """A setting for a certain teacher, and why."""

    key: str
    value: Any
    reason: str


class Method(ABC):
    """A distillation method: which networks train, in which order, on which loss.

    It is built as ``Class(config.method, teacher)`` right after ``torch.manual_seed``, and registered with
    ``@register_method(name)`` or, by another distribution, as an entry point of the group ``flowdistill.methods``. What
    is abstract must be written; everything else has a default that means "nothing of the kind".

    Attributes:
        name: its ``method.name``.
        Config: the dataclass of its settings, with the field ``name``.
        shards: whether its networks may be sharded (FSDP).
        student_roles: the roles whose networks make a student; what is kept of the best one (``train.stop_when``).
        about: what a table says of it.
        own_cards: whether :meth:`write_outputs` writes the student's model card.
        teacher: what it distils.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    shards: ClassVar[bool] = True
    student_roles: ClassVar[Sequence[str]] = ("student",)
    about: ClassVar[About] = About()
    own_cards: ClassVar[bool] = False
    teacher: Teacher

    TOGETHER: ClassVar[tuple[tuple[str, str], ...]] = (("state_dict", "load_state_dict"),)
    """Methods of which one alone is a mistake: state that is saved and not restored is lost on resume."""

    def __init_subclass__(cls, **settings: object) -> None:
        """Check a class when it is defined.

        Raises:
            TypeError: one of two methods that belong together stands alone, or ``Config`` is no dataclass with a
                ``name``.
        """
        super().__init_subclass__(**settings)
        for one, other in cls.TOGETHER:
            changed = [getattr(cls, name) is not getattr(Method, name) for name in (one, other)]
            if changed[0] != changed[1]:
                has, lacks = (one, other) if changed[0] else (other, one)
                raise TypeError(f"{cls.__name__} has {has} without {lacks}: what one saves the other must restore")
        config = cls.__dict__.get("Config")
        if config is not None and not (is_dataclass(config) and "name" in {item.name for item in fields(config)}):
            raise TypeError(f"{cls.__name__}.Config must be a dataclass with a field 'name: str'")

    @abstractmethod
    def __init__(self, config: Any, teacher: Teacher) -> None: ...

    # --- what every method says

    @abstractmethod
    def roles(self) -> Mapping[str, Role]:
        """The networks that train, by name, always the same objects. One is named ``"student"``.

        The loop decides neither train() nor eval(): the networks stay as the method leaves them.
        """

    @abstractmethod
    def loss(self, role: str, networks: Networks, draw: Draw) -> tuple[Tensor, Figures]:
        """The loss of ``role`` on one micro-batch.

        Args:
            role: whose weights are about to be updated. Gradients that reach another role's weights are dropped.
            networks: see :data:`Networks`.
            draw: every random number comes from here; ``draw.rows`` rows over all processes.

        Returns:
            The mean loss over the local rows, 0-d and float32, and figures to log.
        """

    @abstractmethod
    def student(self, network: nn.Module | None = None) -> Student:
        """The user's student around ``network``, a copy of the role "student"; None: around the trained one."""

    # --- what some say besides

    def files(self) -> NamedFiles:
        """The files of weights that its own settings name, by the whole name of the setting: other ones in their place
        are noticed when the run is resumed."""
        return {}

    def schedule(self, step: int) -> Sequence[str]:
        """Names of the roles to update at ``step`` (from 0), in order; a name may come more than once."""
        return ("student",)

    def calls_without_gradient(self, role: str) -> float:
        """How often, on average, an update of ``role`` calls the student for states before the call that it learns
        from: time that a plan names, and no memory."""
        return 0.0

    def shown(self, role: str) -> str | None:
        """The figure of ``role`` that a run's progress shows in place of its loss: for a loss whose gradient alone is
        meant. None: the loss."""
        return None

    def to(self, device: torch.device | str) -> Method:
        """Move the frozen parts and the networks to ``device``."""
        self.teacher.to(device)  # and the codec with it, which the student has too
        for role in self.roles().values():
            role.network.to(device)
        return self

    def check_start(self) -> None:  # noqa: B027
        """Refuse what the first update would refuse, before anything is in the run folder; called by all processes
        together where there is something left to train, with the networks in their places and as they go on.

        Raises:
            UserError: so.
        """

    def begin_step(self, step: int, folder: Path) -> Sequence[str]:
        """Whatever is due before the updates of ``step`` (from 0); called by all processes together.

        The same step may begin twice: once before a crash and once after the resume, with the same networks.

        Args:
            folder: the run folder, for files of the method's own.

        Returns:
            The roles whose optimisers start anew, without moments and count.
        """
        return ()

    def after_update(self, role: str) -> None:  # noqa: B027
        """What follows from an update of ``role`` and is no update: a change of another role's weights, in place.

        It comes right after the optimiser's step and the average, without gradients; called by all processes together,
        and each does the same to its share of the weights, which is what parameters are here under FSDP2. A step that
        was skipped comes here too.
        """

    def learning_rate_factor(self, role: str, step: int) -> float:
        """What the scheduled learning rate of ``role`` at ``step`` is multiplied by."""
        return 1.0

    def state_dict(self) -> JsonObject:
        """State besides the networks, as JSON values, the same on every process."""
        return {}

    def load_state_dict(self, state: JsonObject) -> None:  # noqa: B027
        """Go on from what :meth:`state_dict` gave; the next call is :meth:`begin_step`."""

    def conclude(self, step: int, folder: Path) -> None:  # noqa: B027
        """The end of training, after the last update; called by all processes, before the student is saved."""

    def write_outputs(self, folder: Path) -> None:  # noqa: B027
        """Files beside the ``student/`` that is in the run folder now; called by the main process only."""

    def outputs_complete(self, folder: Path) -> bool:
        """Whether :meth:`write_outputs` has come to its end in this run folder."""
        return True

    def contents(self) -> str:
        """What a finished run folder holds, in words, for the last line of the command."""
        return "student/, samples/, metrics.jsonl, config.yaml"

    # --- what is asked of the class, before any network is made

    @classmethod
    def check_length(cls, config: Any, steps: int) -> str | None:
        """A warning about a run of ``steps`` with these settings, or None.

        Raises:
            UserError: a run of that length is useless.
        """
        return None

    @classmethod
    def suggest(cls, teacher: Teacher, guidance: float | None = None) -> list[Suggestion]:
        """Settings that a first configuration for this teacher should have beside the defaults.

        Args:
            teacher: perhaps on the meta device: its path, its conditions and its shape may be looked at.
            guidance: the guidance scale that its pipeline has by default; None where it has none.
        """
        return guidance_for(cls.Config, teacher, guidance)

    @classmethod
    def distill(cls, config: RunConfig) -> Run | None:
        """Do the runs of a method that is a plan of several runs; None for a method of one run of the loop."""
        return None

    @classmethod
    def representative_run(cls, config: RunConfig) -> RunConfig:
        """The run whose memory is that of the whole: ``config`` itself, or the largest of several runs."""
        return config


class SingleStudentMethod(Method):
    """A method whose student trains at every step, with an average of its weights.

    A subclass sets ``teacher``, ``config`` (with ``optimizer``) and ``_student``; one with more networks extends
    :meth:`roles` and :meth:`schedule`.
    """

    config: Any
    _student: Student

    def roles(self) -> dict[str, Role]:
        return {"student": Role(self._student.network, self.config.optimizer, ema=True)}

    def student(self, network: nn.Module | None = None) -> Student:
        return self._student if network is None else self._student.with_network(network)


# --- what is asked of a class, before there is a run


def facts_of(method: type[Method]) -> About:
    """What a table says of a method: its ``about``, and what follows from its class where that is silent.

    The sentence is the first one of the class's docstring; images are needed as ``Config.data`` is mandatory, may be
    null or is not there; calls are 1, or up to what bounds ``Config.steps``; and a network trains for each
    ``<name>_optimizer`` of ``Config``.
    """
    about: About = getattr(method, "about", About())
    settings = {item.name: item for item in fields(method.Config)}
    sentence = (method.__doc__ or "").strip().split("\n\n")[0]
    data = "no"
    if "data" in settings:
        data = "yes" if settings["data"].default == MISSING else "optional"
    most = settings["steps"].metadata.get("at_most", 1) if "steps" in settings else 1
    others = [name.removesuffix("_optimizer") for name in settings if name.endswith("_optimizer")]
    return replace(
        about,
        sentence=about.sentence or " ".join(sentence.split()),
        data=about.data or data,
        calls=about.calls or ("1" if most == 1 else f"1 to {most}"),
        networks=about.networks or ", ".join(others) or "none",
    )


def guidance_for(
    settings: type, teacher: Teacher, guidance: float | None, section: str = "method."
) -> list[Suggestion]:
    """The settings of guidance that a class of settings has, for a teacher that can be guided.

    Args:
        guidance: its pipeline's own scale; None: it has none.
        section: the path of these settings, with a dot behind it.
    """
    names = {item.name for item in fields(settings)}
    if not teacher.can_guide:
        return []
    scale = 1.0 if guidance is None else float(guidance)
    whose = "1: without guidance; this teacher can be guided, which makes samples more typical and less varied"
    if guidance is not None:
        whose = "guidance of the teacher that the student learns; this is the pipeline's own default"
    found = [Suggestion(f"{section}guidance_scale", scale, whose)] if "guidance_scale" in names else []
    if {"guidance_min", "guidance_max"} <= names:
        found.append(Suggestion(f"{section}guidance_min", scale, whose))
        found.append(Suggestion(f"{section}guidance_max", scale, "above guidance_min: the student learns the range"))
    return found


LATEST_START = 0.97
"""See :func:`start_before_noise`."""


def start_before_noise(teacher: Teacher) -> list[Suggestion]:
    """For a map along the teacher's trajectory: a start a little before pure noise, where the teacher predicts epsilon.

    At the end of a DDPM's schedule an error of the prediction is multiplied by 1 / (1 - t), 157 with the usual one, in
    the denoised estimate; at t = 0.97 by 33, and the state there is noise for all practical purposes.
    """
    if teacher.path.prediction != "epsilon" or teacher.path.kind != "vp" or teacher.t_max <= LATEST_START:
        return []
    factor = 1 / (1 - teacher.t_max)
    return [Suggestion("teacher.t_max", LATEST_START,
                       f"the teacher predicts epsilon, and at its last time, {teacher.t_max:.4f}, errors of the "
                       f"denoised estimate are multiplied by {factor:.0f}; at 0.97 by 33, and that is still noise")]
