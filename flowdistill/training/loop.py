"""The loop: any method, any number of networks, one or many processes."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from flowdistill.config import RunConfig
from flowdistill.evaluation.reference import Reference
from flowdistill.students import Student
from flowdistill.training.callbacks import FidCallback, Reporter, save_samples
from flowdistill.training.checkpoint import (
    checkpoints,
    read_state,
    read_tensors,
    remove_leftovers,
    rewrite_state,
    write_checkpoint,
)
from flowdistill.training.fsdp import reshard
from flowdistill.training.meters import Meters
from flowdistill.training.method import Method
from flowdistill.training.optimizer import apply_update, backward, learning_rate, rate_changes, rate_of, set_rate
from flowdistill.training.optimizers import KINDS, forget
from flowdistill.training.precision import resolve_precision
from flowdistill.training.roles import TrainedRole, loss_of, prepare_roles
from flowdistill.training.signals import Interrupts
from flowdistill.training.snapshots import WeightSnapshots
from flowdistill.training.state import assign, assign_optimizer, gather, network_tensors, optimizer_tensors
from flowdistill.training.stopping import Stopping
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import disk_errors, local_path
from flowdistill.utils.processes import Processes
from flowdistill.utils.randomness import Draw, mixed_seed
from flowdistill.utils.text import JsonObject


class TrainingDiverged(UserError):
    """Too many updates in a row had a loss or a gradient that is not finite."""


class Trainer:
    """Trains a method's networks and keeps ``checkpoints/``, ``metrics.jsonl`` and ``samples/`` of a run folder.

    Construction resumes from the newest checkpoint in the folder; that it belongs to this configuration is the
    caller's to check.

    Args:
        method: see :class:`flowdistill.training.method.Method`.
        config: ``train``, ``evaluation``, ``seed`` and ``method.name`` are read.
        output_dir: the run folder; made when missing.
        accelerator: with mixed_precision="no", see ``flowdistill.training.run.make_accelerator``.
        reference: of measurements during training, where it is open already.

    Attributes:
        step: steps done.
        seconds: spent in steps, without measurements and files, over all resumes.
        interrupted: number of the signal that ended ``train`` early, else 0.
        stopping: see :class:`flowdistill.training.stopping.Stopping`; None without ``train.stop_when``.

    Raises:
        UserError: a figure of ``train.stop_when`` that nothing measures, a batch that the processes cannot share, a
            checkpoint that is damaged or does not fit, and what ``prepare_roles`` refuses.
    """

    def __init__(
        self, method: Method, config: RunConfig, output_dir: str | Path, accelerator: Accelerator,
        reference: Reference | None = None,
    ) -> None:
        self.method, self.config, self.settings = method, config, config.train
        self.folder, self.accelerator = local_path(output_dir), accelerator
        self.device, self.world, self.rank = accelerator.device, accelerator.num_processes, accelerator.process_index
        self.main = accelerator.is_main_process
        self.micro_rows = self._micro_rows()
        self.precision = resolve_precision(self.settings.precision, self.device)
        self.roles = prepare_roles(method, self.settings, self.precision, accelerator)
        self.networks = {name: role.call for name, role in self.roles.items()}
        self.meters = Meters(self.device)
        shown = {name: figure for name in self.roles if (figure := method.shown(name)) is not None}
        self.reporter = Reporter(config, self.folder, accelerator, shown)
        self.step, self.seconds, self.interrupted = 0, 0.0, 0
        self._saved = -1
        self._shown = -1  # the last step whose pictures and figures are made, if they were due
        self._lap = (0, 0.0)  # step and seconds of the last logged line
        self._fid: FidCallback | None = None
        wanted = self.settings.stop_when
        self.stopping = None if wanted is None else Stopping(wanted, config.evaluation, reference)
        self._best = WeightSnapshots(self.folder / "best", "step-{:06d}")
        self._reference = reference
        self._resume()

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def completed(self) -> bool:
        """Whether ``train.steps`` are done, or ``train.stop_when`` has ended the run before."""
        return self.step >= self.settings.steps or (self.stopping is not None and self.stopping.exhausted)

    def student(self) -> Student:
        """The user's student around the averaged weights; all processes must call this together."""
        return self.method.student(self.roles["student"].whole())

    def take_best(self) -> None:
        """Put the best student's weights in the place of the averaged ones, where ``train.stop_when`` has kept it.

        For the end: training does not go on from here. All processes must call this together.

        Raises:
            UserError: its file in ``best/`` is missing or damaged.
        """
        if self.stopping is not None and self.stopping.step is not None:
            self._best.read_into(self.stopping.step, self._student_tensors())

    def _student_tensors(self) -> dict[str, Tensor]:
        """What trains of the networks that make a student, averaged where they are, by role and name."""
        tensors: dict[str, Tensor] = {}
        for name in self.method.student_roles:
            network = self.roles[name].network
            average = self.roles[name].average
            found = network_tensors(network if average is None else average.network, network)
            tensors |= {f"{name}.{key}": value for key, value in found.items()}
        return tensors

    def train(self) -> None:
        """Go on to ``train.steps``, to the end that ``train.stop_when`` sets, or until a signal; the state is saved.

        Raises:
            TrainingDiverged: ``train.max_nonfinite_steps`` skipped updates of one role in a row, seen at a logged step.
            UserError: something could not be written, or the figure of ``train.stop_when`` not be measured.
        """
        self.reporter.start(self.step, anew=self._saved < 0)
        try:
            with Interrupts() as interrupts:
                if self._show() and self._saved == self.step:  # a signal had come before it
                    state, folder = self._state(), self.checkpoint_folder
                    Processes.current().on_main(lambda: rewrite_state(folder, self.step, state))
                while not self.completed and not self.interrupted:
                    self._advance(interrupts)
                if self.step != self._saved:
                    self.save()
        finally:
            self.reporter.close()

    def _advance(self, interrupts: Interrupts) -> None:
        """One step and whatever is due after it."""
        settings, began = self.settings, time.perf_counter()
        self.train_step()
        logged = self.step % settings.log_every == 0 or self.completed
        means = self.meters.read(self.world) if logged else {}  # waits for the device
        self.seconds += time.perf_counter() - began
        self.reporter.advance()
        if logged:
            self._log(means)
        checkpoint_due = self._due(settings.checkpoint_every)
        # Asking the other processes waits, which a step on a GPU must not: there a signal counts at the next of these.
        if self.world == 1 or self.device.type == "cpu" or logged or checkpoint_due:
            self.interrupted = interrupts.agreed(self.device, self.world)
        if not self.interrupted or self.completed:  # what is left out here is made up for by the resume
            self._show()
        if checkpoint_due and not self.completed:
            self.save()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _show(self) -> bool:
        """Make the pictures and figures that are due at this step and not made yet; tells whether there were any."""
        pictures = self._shown < self.step and self._due(self.settings.sample_every)
        figures = self._measurement_due()
        if pictures:
            self.reporter.picture("samples", self.save_samples(f"step-{self.step:06d}.png"), self.step)
        if figures:
            self._measure()
        self._shown = self.step
        return pictures or figures

    def _measurement_due(self) -> bool:
        if self.stopping is not None and self.stopping.step is None:
            return True  # what there is to beat, and whether it can be measured at all
        if self._shown == self.step or self.step == 0:
            return False
        ended = self.stopping is not None and self.step >= self.settings.steps
        return ended or self._due(self.settings.evaluate_every)

    def train_step(self) -> None:
        """All updates of one step. Nothing here reads a device's value on the host."""
        # Dropout and the like go on after a resume as if there had been none.
        torch.manual_seed(mixed_seed("step", self.config.seed, self.step, self.rank))
        for name in self.method.begin_step(self.step, self.folder):
            forget(self.roles[name].optimizer, self.roles[name].config)
        for update, name in enumerate(self.method.schedule(self.step)):
            self._update(name, update)
        self.step += 1

    def _update(self, name: str, update: int) -> None:
        role, accumulation = self.roles[name], self.settings.gradient_accumulation
        if self.stopping is not None and name in self.method.student_roles:
            self.stopping.updated = True
        rate = learning_rate(role.config, self.step, self.settings.steps)
        rate *= self.method.learning_rate_factor(name, self.step)
        set_rate(role.optimizer, rate)
        for micro in range(accumulation):
            draw = Draw(self.config.seed, self.step, update, micro, self.micro_rows, self.rank, self.world, self.device)
            with self._communicating(name, last=micro == accumulation - 1):
                loss, figures = loss_of(self.method, name, self.networks, draw)
                backward(loss, role.scaler, accumulation)
            self.meters.add({f"loss/{name}": loss} | {f"{name}/{key}": value for key, value in figures.items()})
        norm, skipped = apply_update(role.optimizer, role.scaler, self.settings.max_grad_norm)
        self.meters.add({f"grad_norm/{name}": norm})
        role.skipped += skipped
        role.consecutive.add_(1.0).mul_(skipped)
        if role.average is not None:
            role.average.update(role.network)
        if self.accelerator.is_fsdp2:
            for each in self.roles.values():
                reshard(each.network)
        self.method.after_update(name)
        # A loss may reach through another role's network: nobody starts with someone else's gradients.
        for other in self.roles.values():
            other.clear_gradients()

    @contextlib.contextmanager
    def _communicating(self, name: str, last: bool) -> Iterator[None]:
        """A block in which the processes average the gradients of role ``name``, and only if this is its ``last``
        micro-batch.

        The other roles' gradients are going to be dropped. DDP is told not to average them; FSDP2 must not be told, for
        it would keep the whole gradients where nobody clears them and add them to that role's own next ones.
        """
        with contextlib.ExitStack() as stack:
            for other, role in self.roles.items():
                if not last if other == name else not self.accelerator.is_fsdp2:
                    stack.enter_context(self.accelerator.no_sync(role.prepared))
            yield

    def save(self) -> None:
        """Write a checkpoint of the present step; all processes must call this together."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, role in self.roles.items():
            parts = {name: network_tensors(role.network)}
            counters = KINDS[role.config.name].counters
            parts[f"{name}.optimizer"] = optimizer_tensors(role.network, role.optimizer, counters)
            if role.average is not None:
                parts[f"{name}.average"] = network_tensors(role.average.network, role.network)
            tensors |= {file: gather(content, keep=self.main) for file, content in parts.items()}
        state, keep = self._state(), self.settings.keep_checkpoints

        def write() -> None:
            write_checkpoint(self.checkpoint_folder, self.step, tensors, state, keep)
            self._forget_worse()

        Processes.current().on_main(write)
        self._saved = self.step

    def _state(self) -> JsonObject:
        """What a checkpoint holds besides tensors, as JSON values; all processes must call this together."""
        roles = {
            name: {
                "average_count": 0 if role.average is None else role.average.count,
                "optimizer": role.config.name,
                "scaler": role.scaler.state_dict(),
                "skipped": int(role.skipped),
                "consecutive": int(role.consecutive),
            }
            for name, role in self.roles.items()
        }
        return {
            "format": 1,
            "step": self.step,
            "planned_steps": self.settings.steps,
            "images": self.step * self.settings.batch_size,
            "seconds": self.seconds,
            "world_size": self.world,
            "roles": roles,
            "meters": self.meters.state(self.world),
            "lap": self._lap,
            "shown": self._shown,
            "stopping": None if self.stopping is None else self.stopping.state_dict(),
            "method": self.method.state_dict(),
        }

    def _forget_worse(self) -> None:
        """Delete the weights of students that were the best once, but for those that a checkpoint goes on from."""
        if self.stopping is None:
            return
        try:
            states = [read_state(path).get("stopping") for _, path in checkpoints(self.checkpoint_folder)]
        except UserError:  # an older checkpoint is damaged: who knows what it was
            return
        steps = [self.stopping.step, *(state["step"] for state in states if state is not None)]
        self._best.keep([step for step in steps if step is not None])

    def _resume(self) -> None:
        def clean() -> None:
            with disk_errors(f"the run folder {self.folder}"):
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.checkpoint_folder)

        Processes.current().on_main(clean)
        found = checkpoints(self.checkpoint_folder)
        if not found:
            return
        step, path = found[-1]
        if step > self.settings.steps:
            raise UserError(
                f"{self.folder} is at step {step} already, beyond train.steps={self.settings.steps}; raise "
                "train.steps or choose another output_dir"
            )
        state = read_state(path, step)
        if state["roles"].keys() != self.roles.keys():
            raise UserError(
                f"{path} does not fit: it holds the roles {', '.join(state['roles'])}, and the method has "
                f"{', '.join(self.roles)}"
            )
        for name, role in self.roles.items():
            self._restore(role, name, path, state["roles"][name])
        self.method.load_state_dict(state["method"])
        self.step, self.seconds, self._saved = step, state["seconds"], step
        self._lap = tuple(state["lap"])
        self._shown = state.get("shown", step)  # older checkpoints do not say it, nor what follows
        if self.stopping is not None and state.get("stopping") is not None:
            self.stopping.load_state_dict(state["stopping"], self.main)
            if self.stopping.step is not None:
                self._best.check(self.stopping.step)
        self.meters.load_state(state["meters"], self.main)
        planned = state.get("planned_steps", self.settings.steps)  # older checkpoints do not say it
        changes = rate_changes({name: role.config for name, role in self.roles.items()}, step, planned,
                               self.settings.steps)
        if changes and self.main and not self.completed:
            warnings.warn(f"train.steps was {planned} and is {self.settings.steps}, so after step {step} the scheduled "
                          f"learning rate goes on elsewhere: {changes}; a run of {self.settings.steps} steps from the "
                          "start, in another output_dir, would have learned otherwise", stacklevel=2)

    def _restore(self, role: TrainedRole, name: str, path: Path, state: JsonObject) -> None:
        former = state.get("optimizer", "adamw")  # older checkpoints had no other one
        if former != role.config.name:
            raise UserError(f"{path} does not fit: the optimiser of the role '{name}' was {former} there and is "
                            f"{role.config.name} here; choose another output_dir, or make them equal to resume")
        assign(network_tensors(role.network), read_tensors(path, name), f"{path}/{name}.safetensors")
        assign_optimizer(role.network, role.optimizer, read_tensors(path, f"{name}.optimizer"))
        if role.average is not None:
            targets = network_tensors(role.average.network, role.network)
            assign(targets, read_tensors(path, f"{name}.average"), f"{path}/{name}.average.safetensors")
            role.average.count = state["average_count"]
        if role.scaler.is_enabled():
            role.scaler.load_state_dict(state["scaler"])
        role.skipped.fill_(state["skipped"])
        role.consecutive.fill_(state["consecutive"])

    def _log(self, means: dict[str, float | None]) -> None:
        steps, seconds = self.step - self._lap[0], self.seconds - self._lap[1]
        self._lap = (self.step, self.seconds)
        total = torch.stack([role.skipped for role in self.roles.values()]).sum()
        consecutive = torch.stack([role.consecutive for role in self.roles.values()])
        line = {
            **self._progress(),
            "images_per_second": round(steps * self.settings.batch_size / max(seconds, 1e-9), 3),
            **{f"lr/{name}": rate_of(role.optimizer) for name, role in self.roles.items()},
            **means,
            "skipped": int(total),
        }
        self.reporter.log(line)
        for name, count in zip(self.roles, consecutive.tolist(), strict=True):
            if count >= self.settings.max_nonfinite_steps:
                raise TrainingDiverged(
                    f"training stopped at step {self.step}: the loss or gradient of the role '{name}' was not finite "
                    f"in {int(count)} updates in a row; lower its learning rate or raise its precision, and the next "
                    f"start resumes from {self._last_checkpoint()}"
                )

    def _progress(self) -> JsonObject:
        return {"step": self.step, "images": self.step * self.settings.batch_size, "seconds": round(self.seconds, 3)}

    def _last_checkpoint(self) -> str:
        found = checkpoints(self.checkpoint_folder)
        return str(found[-1][1]) if found else "the beginning, for there is no checkpoint yet"

    def save_samples(self, name: str) -> Path:
        """Write ``samples/<name>`` and return its path; all processes must call this together."""
        student, path = self.student(), self.folder / "samples" / name
        Processes.current().on_main(lambda: save_samples(student, path, self.settings.num_samples))
        return path

    def _measure(self) -> None:
        self._fid = self._fid or FidCallback(self.config, self.accelerator, self._reference)
        figures = self._fid(self.student())
        if self.stopping is not None:
            if self.stopping.see(self.step, figures):
                tensors = self._student_tensors()
                self._best.write(self.step, tensors, tensors)
            figures = figures | {"best_step": self.stopping.step}
        self.reporter.log(self._progress() | figures)

    def _micro_rows(self) -> int:
        batch, accumulation = self.settings.batch_size, self.settings.gradient_accumulation
        if batch % (accumulation * self.world):
            raise UserError(
                f"train.batch_size is {batch}, but {self.world} processes with train.gradient_accumulation="
                f"{accumulation} need a multiple of {accumulation * self.world}"
            )
        return batch // accumulation
