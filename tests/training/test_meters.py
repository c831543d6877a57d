"""Figures that some updates have and others do not: of the number of calls of an update, of a term that is off."""

import json

import pytest
import torch

from flowdistill.training.meters import Meters
from flowdistill.utils.processes import Processes
from tests.processes import ranks, run
from tests.toy_method import ToyConfig, make_trainer

CPU = torch.device("cpu")


def tensors(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def lines(folder):
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(text).items() if "/" in name} for text in texts]


def test_the_mean_of_a_figure_is_over_the_updates_that_have_it():
    meters = Meters(CPU)
    meters.add(tensors(loss=1.0, first=5.0))
    meters.add(tensors(loss=2.0, second=7.0))
    meters.add(tensors(loss=6.0, first=8.0))
    assert meters.read() == {"loss": 3.0, "first": 6.5, "second": 7.0}
    meters.add(tensors(loss=2.0, second=float("nan")))
    assert meters.read() == {"loss": 2.0, "second": None}  # first is not there, and not 0
    assert meters.read() == {}


def test_a_resume_goes_on_with_every_kind_of_figure():
    values = [tensors(loss=0.1, first=0.2), tensors(loss=0.3), tensors(loss=0.7, first=0.9), tensors(second=0.4)]
    whole = Meters(CPU)
    for update in values:
        whole.add(update)
    for cut in range(len(values) + 1):
        parts = Meters(CPU)
        for update in values[:cut]:
            parts.add(update)
        again = Meters(CPU)
        again.load_state(json.loads(json.dumps(parts.state())), main=True)
        for update in values[cut:]:
            again.add(update)
        assert again.state() == whole.state()
    assert again.read() == whole.read()


def share(folder):
    """What each of two processes runs: both have the loss, and each a figure of its own."""
    processes = Processes.start()
    meters, rank = Meters(CPU), processes.rank
    meters.add(tensors(loss=1.0 + rank, **{f"own{rank}": 3.0 + rank}))
    meters.add(tensors(loss=5.0))
    state = meters.state(2)
    read = meters.read(2)
    if rank:  # one that has nothing at all
        meters.add(tensors(loss=2.0))
    late = meters.read(2)
    meters.load_state(json.loads(json.dumps(state)), main=processes.is_main)
    (folder / f"{rank}.json").write_text(json.dumps([read, late, meters.read(2)]))
    torch.distributed.destroy_process_group()


def test_processes_need_not_have_the_same_figures(tmp_path):
    ranks(2, share, tmp_path)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    means = {"loss": 3.25, "own0": 3.0, "own1": 4.0}
    assert one == other == [means, {"loss": 2.0}, means]


CALLS = ToyConfig(calls=3)


def test_a_line_has_what_its_updates_had(tmp_path):
    """Three kinds of updates, two in a line: what did not come is missing in the file, for trackers and on the way."""
    trainer = make_trainer(tmp_path / "two", CALLS, steps=12, log_every=2)
    recorded = []
    trainer.accelerator.log = lambda values, step: recorded.append({name for name in values if "size/" in name})
    trainer.train()
    make_trainer(tmp_path / "one", CALLS, steps=12, log_every=1).train()
    single, double = lines(tmp_path / "one"), lines(tmp_path / "two")
    kinds = [{name for name in line if "size/" in name} for line in single]
    assert all(len(kind) == 1 for kind in kinds)
    assert set().union(*kinds) == {f"student/size/{k}" for k in (1, 2, 3)}
    assert [{name for name in line if "size/" in name} for line in double] == recorded
    for number, line in enumerate(double):
        pair = single[2 * number : 2 * number + 2]
        for name in recorded[number]:
            had = [each[name] for each in pair if name in each]
            assert line[name] == pytest.approx(sum(had) / len(had), rel=1e-6)
        assert recorded[number] == {name for each in pair for name in each if "size/" in name}


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resume_within_a_line_is_bit_for_bit(tmp_path, stop):
    settings = {"log_every": 5, "steps": 10}
    make_trainer(tmp_path / "whole", CALLS, **settings).train()
    trainer = make_trainer(tmp_path / "cut", CALLS, **settings, checkpoint_every=stop)
    real = trainer.train_step

    def train_step():
        if trainer.step == stop:
            raise KeyboardInterrupt
        real()

    trainer.train_step = train_step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    make_trainer(tmp_path / "cut", CALLS, **settings).train()
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_two_processes_log_what_one_does(tmp_path):
    options = ("calls=3", "log_every=2", "steps=12")
    run("tests.toy_method", tmp_path / "one", *options)
    ranks(2, "tests.toy_method", tmp_path / "two", *options)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line.keys() for line in one] == [line.keys() for line in two]
    assert len({frozenset(line) for line in one}) > 1
    for mine, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-5)
