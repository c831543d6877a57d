"""Flow maps and consistency students in two real processes, with the correction: they train what one process trains."""

import torch

from flowdistill.config import OptimizerConfig, RunConfig, TeacherConfig, TrainConfig
from flowdistill.methods.consistency import Consistency, ConsistencyConfig
from flowdistill.methods.flow_map_matching import FlowMapMatching, FlowMapMatchingConfig
from flowdistill.teachers import load_teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.run import make_accelerator
from tests.processes import ranks
from tests.tiny import tiny_unet_pipeline
from tests.toy_method import figures, weights

# A large eps: otherwise AdamW makes a whole step of a gradient that is rounding and nothing else.
COMMON = {"steps": 2, "correction_strength": 1.0, "guidance_max": 2.0,
          **{key: OptimizerConfig(lr=1e-2, eps=1e-2) for key in ("optimizer", "critic_optimizer")}}
SHARES = {"velocity_fraction": 0.5, "start_fraction": 1 / 3}  # of 12 rows, and of 6, whole numbers
METHODS = {
    "maps": lambda teacher: FlowMapMatching(FlowMapMatchingConfig(**COMMON, **SHARES), teacher),
    "consistency": lambda teacher: Consistency(
        ConsistencyConfig(**COMMON, states="student", points=6, loss="l2", target="ema"), teacher),
}


def trainer_of(name, folder, steps):
    config = RunConfig(output_dir=str(folder), teacher=TeacherConfig(source="tiny"), method=None, train=TrainConfig(
        steps=steps, batch_size=16, log_every=1, checkpoint_every=1, trackers=[], device="cpu", precision="fp32",
        ema_decay=0.5))
    accelerator = make_accelerator(config.train, folder)
    torch.manual_seed(0)
    method = METHODS[name](load_teacher(tiny_unet_pipeline(num_class_embeds=11), null_label=10))
    config.method = method.config
    return Trainer(method, config, folder, accelerator)


def train(folder, *lengths):
    """Each of them to each of these numbers of steps, by a trainer of its own that goes on where the last one ended."""
    for name in METHODS:
        for steps in lengths:
            trainer = trainer_of(name, folder / name, steps)
            trainer.train()
            print(name, "rank", trainer.rank, "of", trainer.world, "at", trainer.step, flush=True)


def test_two_processes_that_stop_and_go_on_train_as_one(tmp_path):
    train(tmp_path / "one", 3)
    outs = ranks(2, train, tmp_path / "two", 2, 3)
    assert all(f"{name} rank {rank} of 2 at 3" in out for rank, out in enumerate(outs) for name in METHODS)
    for name in METHODS:
        one, two = (trainer_of(name, tmp_path / folder / name, 3) for folder in ("one", "two"))
        assert one.step == two.step == 3
        expected, found = weights(one), weights(two)
        assert expected.keys() == found.keys() and any(key.startswith("critic.") for key in found)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
        losses = [torch.tensor(figures(tmp_path / folder / name)) for folder in ("one", "two")]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-5)
