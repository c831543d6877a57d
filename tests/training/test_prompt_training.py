"""Training from text-to-image teachers: half-precision teachers, and terms beside the matching gradient."""

import pytest
import torch

from flowdistill.methods.score_distillation import Dmd2, Dmd2Config
from flowdistill.teachers import load_teacher
from flowdistill.utils.errors import UserError
from flowdistill.utils.randomness import Draw
from tests.families import PROMPTS
from tests.teachers.test_families import near, teacher_of
from tests.tiny import tiny_unet_pipeline


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-dev"])
def test_a_half_precision_teacher_trains_float32_masters(name, dtype):
    """Losses are those of a float32 teacher to the type's digits; gradients and weights that train are float32."""
    losses = {}
    for kind in ("float32", dtype):
        torch.manual_seed(0)
        teacher = teacher_of(name, dtype=kind, prompts=PROMPTS)[1]
        method = Dmd2(Dmd2Config(), teacher)
        networks = {role: part.network for role, part in method.roles().items()}
        for role in ("critic", "student"):
            losses[kind, role] = method.loss(role, networks, Draw(0, 1, rows=4))[0]
            losses[kind, role].backward()
        assert {p.dtype for p in teacher.network.parameters()} == {getattr(torch, kind)}
        for network in networks.values():
            assert {(p.dtype, p.grad.dtype) for p in network.parameters() if p.grad is not None} == {
                (torch.float32, torch.float32)}
            assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    digits = 0.05 if dtype == "bfloat16" else 0.01
    assert losses[dtype, "critic"].item() == pytest.approx(losses["float32", "critic"].item(), rel=digits)


def test_the_regression_term_goes_through_the_prompts(tmp_path):
    """Pair i is made for prompt i in turn, and another list of prompts is other pairs."""
    teacher = teacher_of("sd", prompts=PROMPTS)[1]
    method = Dmd2(Dmd2Config(regression_weight=1.0, regression_pairs=10, regression_steps=2), teacher)
    ode = teacher.sample(method.pairs.noise, teacher.encode(prompts=[PROMPTS[i % 3] for i in range(10)]), steps=2)
    assert near(method.pairs.latents, ode)
    networks = {role: part.network for role, part in method.roles().items()}
    loss, metrics = method.loss("student", networks, Draw(0, 1, rows=4))
    assert metrics["regression_error"] > 0 and loss.isfinite()
    file = tmp_path / "p.txt"
    file.write_text("\n".join(PROMPTS))
    other = teacher_of("sd", prompts=PROMPTS[:2])[1]
    of_file = Dmd2Config(regression_weight=1.0, regression_pairs=10, regression_steps=2, regression_prompts=str(file))
    assert torch.equal(Dmd2(of_file, other).pairs.latents, method.pairs.latents)  # which are other prompts than its own
    with pytest.raises(UserError, match="regression_prompts is p.txt, but method.regression_weight is 0"):
        Dmd2(Dmd2Config(regression_prompts="p.txt"), other)
    with pytest.raises(UserError, match="regression_prompts is p.txt, but the teacher takes no prompts"):
        Dmd2(Dmd2Config(regression_weight=1.0, regression_prompts="p.txt"), load_teacher(tiny_unet_pipeline()))
    made = Dmd2(Dmd2Config(regression_weight=1.0, regression_pairs=10, regression_steps=2), other).pairs
    assert torch.equal(made.noise, method.pairs.noise) and not torch.equal(made.latents, method.pairs.latents)
