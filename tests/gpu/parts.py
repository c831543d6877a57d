"""The parts of the acceptance, in the order in which they run: the cheapest and the most telling first."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowdistill.config import OptimizerConfig, load_config
from flowdistill.config.schema import ATTENTION, QUANTIZED
from flowdistill.networks.compilation import HOW, compile_blocks
from flowdistill.networks.critic import make_critic
from flowdistill.plan import make_plan
from flowdistill.plan.meta_teacher import meta_teacher, read_architecture
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import Teacher, load_teacher
from flowdistill.training.loop import Trainer
from flowdistill.training.optimizers import KINDS, check_package
from flowdistill.training.run import make_accelerator, method_class
from flowdistill.utils.errors import UserError
from flowdistill.utils.logging import quiet_libraries
from flowdistill.utils.randomness import seed_torch
from flowdistill.utils.tf32 import tf32
from tests.every_method import CASES
from tests.families import FAMILIES, PROMPTS, pipeline_latents
from tests.gpu.bench import DTYPES, Bench, NotHere, Part, distance, expect
from tests.gpu.beside import fastgen_dmd2, lcm_script
from tests.measured_memory import real_peak
from tests.tiny import tiny_dit_pipeline
from tests.toy_method import weights

ROOT = Path(__file__).resolve().parents[2]
LONG_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROUNDING = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 3e-3}
"""Of results, as a share of the largest value: what a few dozen operations in that type leave."""
SAME = 0.2
"""Above what a pipeline's own call in half precision is from that in float32, the two have not had the same noise."""
FEW = ("dit", "sd")
"""Families on the CPU."""


# --- the machine


def the_machine(bench: Bench) -> None:
    """A product and a convolution in each type, and their gradients."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(bench.device)
    exact = x.double() @ x.double()
    for name, dtype in DTYPES.items():
        bench.figures[f"product in {name}"] = error = distance(x.to(dtype) @ x.to(dtype), exact)
        expect(error < ROUNDING[name], f"a product in {name} is off by {error:.2g}")
    if bench.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(bench.device)
        bench.figures |= {"free memory (GiB)": free / 2**30, "memory (GiB)": total / 2**30,
                          "devices": torch.cuda.device_count(), "bf16": torch.cuda.is_bf16_supported(False)}


# --- teachers


def drawn_in_float32(
    draw: Callable[..., Tensor], *arguments: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> Tensor:
    """What ``draw`` draws in float32, rounded to ``dtype``."""
    return draw(*arguments, dtype=torch.float32, **options).to(dtype)


def own_call_and_ours(name: str, bench: Bench, dtype: str) -> tuple[Tensor | None, Tensor]:
    """What a family's pipeline makes of two noises by its own call, None where that call mixes types (as that of the
    oldest ones does in half precision), and what its teacher does."""
    family = FAMILIES[name]
    torch.manual_seed(0)  # some have random frequencies
    with quiet_libraries():
        pipeline = family.make().to(bench.device, DTYPES[dtype])
    teacher = load_teacher(pipeline, bench.device, image_size=family.image_size, null_label=family.null_label,
                           dtype=LONG_NAMES[dtype])
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1)).to(bench.device)
    condition = teacher.encode(prompts=PROMPTS[:2]) if family.prompts else teacher.encode(family.labels)
    scale = family.guidance if family.prompts or family.labels else 1.0
    ours = teacher.sample(noise * family.start(teacher), condition, steps=4, guidance_scale=scale)
    theirs: Tensor | None = None
    # In half precision a generator draws other numbers: the same noise needs to be drawn in float32.
    drawn = getattr(sys.modules[type(pipeline).__module__], "randn_tensor", None)
    same = {"randn_tensor": partial(drawn_in_float32, drawn)} if drawn is not None else {}
    try:
        with mock.patch.multiple(sys.modules[type(pipeline).__module__], **same) if same else nullcontext():
            theirs = pipeline_latents(pipeline, family, noise.to(DTYPES[dtype]), 4, scale)
    except RuntimeError:
        if dtype == "fp32":
            raise
    return theirs, ours if family.prompts else teacher.decode(ours)


def families(bench: Bench, dtype: str, fast: bool = False) -> None:
    """Ours may be as far from the pipeline's own call in float32 as twice the pipeline's own call in that type."""
    for name in FEW if bench.small else FAMILIES:
        with tf32(False):
            exact, ours = own_call_and_ours(name, bench, "fp32")
        theirs = exact
        assert exact is not None
        if dtype != "fp32" or fast:
            with tf32(fast):
                theirs, ours = own_call_and_ours(name, bench, dtype)
        own, error = 0.0 if theirs is None else distance(theirs, exact), distance(ours, exact)
        its = "it does not run" if theirs is None else f"{own:.2g}"
        bench.figures[f"{name}: ours, its own"] = f"{error:.2g}, {its}"
        limit = 2 * own + (2e-3 if fast else ROUNDING[dtype]) if theirs is not None else 1.0
        expect(own < SAME, f"{name}'s own call in {dtype} is {own:.2g} from that in float32: not of the same noise")
        expect(error <= limit, f"{name} is {error:.2g} from its own call in float32, and that call in {dtype} is "
                               f"{own:.2g} from it")


# --- methods

NOTHING_YET = {"freeflow": "loss/student", "freeflow, jvp": "loss/student", "diff_instruct": "grad_norm/student",
               "dmd2, lora": "grad_norm/student"}
"""Figures of a first step that are made of a difference of two equal networks, critic and teacher: of rounding."""


def first_figures(bench: Bench, case: str, precision: str) -> dict[str, float | None]:
    """Of the first step, in fp16 at the largest of a few scales at which its gradients are finite."""
    skipped: list[str] = []
    for scale in (512.0, 16.0, 0.5) if precision == "fp16" else (1.0,):
        trainer = bench.trainer(case, f"{case} {precision} {scale}", precision=precision)
        if precision == "fp16":
            for role in trainer.roles.values():
                role.scaler = torch.amp.GradScaler(bench.device.type, init_scale=scale)
        trainer.train_step()
        skipped = [name for name, role in trainer.roles.items() if role.skipped > 0]
        if not skipped:
            return trainer.meters.read()
    raise AssertionError(f"{case} in {precision}: the first update of {', '.join(skipped)} is not finite")


ROUGH = ("freeflow", "freeflow, jvp")
"""Cases whose first gradient is in part that of such a difference: to 1 % in fp16 and 3 % in bf16 on the CPU by finite
differences, 4 % and 6 % by JVPs."""


def methods(bench: Bench, precision: str) -> None:
    """The figures of a first step; all cases are gone through before one fails."""
    wrong = []
    for case in ("boot", "dmd2") if bench.small else CASES:
        exact, half = first_figures(bench, case, "fp32"), first_figures(bench, case, precision)
        expect(exact.keys() == half.keys(), f"{case} has other figures in {precision}")
        errors = {key: abs(half[key] - value) / max(abs(value), 1e-3)  # type: ignore[operator]
                  for key, value in exact.items() if value is not None and key != NOTHING_YET.get(case)
                  and key.startswith(("loss/", "grad_norm/"))}
        worst = max(errors, key=lambda key: errors[key])
        bench.figures[case] = f"{worst} off by {errors[worst]:.2g}"
        if not errors[worst] < (0.1 if case in ROUGH or precision == "bf16" else 0.02):
            wrong.append(f"{case}: {worst} in {precision} is off by {errors[worst]:.2g} of float32's")
    expect(not wrong, "; ".join(wrong))


def no_waits(bench: Bench) -> None:
    """By CUDA's own watch: any wait of the host is an error."""
    for case in CASES:
        trainer = bench.trainer(case, case)
        for _ in range(1 + CASES[case].steps):
            trainer.train_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step()
        except RuntimeError as error:
            raise AssertionError(f"{case}: {str(error).splitlines()[0]}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
        bench.figures[case] = "no wait"


def resume(bench: Bench) -> None:
    """Four steps, and two, a checkpoint, and two, to the last bit."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for precision in ("fp32",) if bench.small else ("fp32", "bf16", "fp16"):
            whole = bench.trainer("dmd2", f"whole {precision}", precision=precision)
            for _ in range(4):
                whole.train_step()
            first = bench.trainer("dmd2", f"parts {precision}", precision=precision)
            for _ in range(2):
                first.train_step()
            first.save()
            second = bench.trainer("dmd2", f"parts {precision}", precision=precision)
            expect(second.step == 2, "the checkpoint was not found")
            for _ in range(2):
                second.train_step()
            one, other = weights(whole), weights(second)
            odd = [name for name in one if not torch.equal(one[name], other[name])]
            bench.figures[precision] = f"{len(one)} tensors, {len(odd)} of them differ"
            expect(not odd, f"in {precision} {len(odd)} of {len(one)} tensors differ after a resume, first {odd[:1]}")
    finally:
        torch.use_deterministic_algorithms(False)


def optimizers(bench: Bench) -> None:
    """Three finite steps each, which move the weights."""
    for name in KINDS:
        config = OptimizerConfig(name=name, lr=1e-3)
        config.validate_at("", {})
        try:
            check_package(config)
        except UserError as error:
            bench.figures[name] = f"not here: {error}"
            continue
        trainer = bench.trainer("boot", name, {"optimizer": config})
        role, before = trainer.roles["student"], weights(trainer)
        for _ in range(3):
            trainer.train_step()
        after = weights(trainer)
        moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
        expect(int(role.skipped) == 0 and bool(moved), f"{name}: {int(role.skipped)} updates skipped, {len(moved)} "
                                                      "tensors moved")
        bench.figures[name] = f"{len(moved)} of {len(before)} tensors moved"


def quantized(bench: Bench) -> None:
    """Velocities of teachers in codes against those in float32, and the gradient through them."""
    tiny_dit_pipeline(num_attention_heads=4, attention_head_dim=32).save_pretrained(bench.folder / "dit")
    exact = load_teacher(bench.folder / "dit", bench.device)
    noise = torch.randn(8, *exact.shape, generator=torch.Generator().manual_seed(0)).to(bench.device)
    condition, limits = exact.encode([0, 1, 2, 3] * 2), {"int8": 0.03, "fp8": 0.08, "nf4": 0.3}
    wanted = exact.velocity(noise, 0.5, condition)
    for scheme in QUANTIZED:
        try:
            teacher = load_teacher(bench.folder / "dit", bench.device, quantize=scheme, dtype="bfloat16")
        except UserError as error:
            bench.figures[scheme] = f"not here: {error}"
            continue
        x = noise.clone().requires_grad_()
        made = teacher.velocity(x, 0.5, condition)
        made.square().sum().backward()
        error = ((made - wanted).norm() / wanted.norm()).item()
        bench.figures[scheme] = error
        expect(error < limits[scheme], f"{scheme}: the velocity is off by {error:.2g} of its norm")
        expect(x.grad is not None and bool(x.grad.isfinite().all()), f"{scheme}: no finite gradient to the input")


# --- kernels


def attention(bench: Bench) -> None:
    """torch's kernels against the formula, then every name of ``teacher.attention`` in real networks."""
    half = torch.bfloat16 if bench.small else torch.float16
    shape = (1, 2, 16, 8) if bench.small else (2, 8, 1024, 64)
    base = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(bench.device) for i in range(3)]

    def both(kernel: SDPBackend, dtype: torch.dtype) -> list[Tensor]:
        rows = [value.to(dtype, copy=True).requires_grad_() for value in base]
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(*rows)
            out.float().square().sum().backward()
        return [out, *(row.grad for row in rows if row.grad is not None)]

    exact = both(SDPBackend.MATH, torch.float32)
    for kernel in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION,
                   SDPBackend.CUDNN_ATTENTION):
        try:
            made = both(kernel, half)
        except RuntimeError as error:
            bench.figures[f"torch's {kernel.name}"] = f"refused: {str(error).splitlines()[0][:120]}"
            continue
        errors = [distance(one, other) for one, other in zip(made, exact, strict=True)]
        bench.figures[f"torch's {kernel.name}"] = max(errors)
        expect(max(errors) < 3e-2, f"torch's {kernel.name} is off by {max(errors):.2g}")
    for name in ("sd",) if bench.small else ("sd", "dit", "flux-dev", "sd3"):
        wanted = kernel_velocity(bench, name, "math")[1]
        ours, dispatched = ATTENTION[:4], name == "flux-dev"  # diffusers' own are for networks whose attention it picks
        for kernel in ("sdpa", "xformers") if bench.small else ATTENTION if dispatched else ours:
            chosen, made = kernel_velocity(bench, name, kernel)
            error = distance(made, wanted)
            bench.figures[f"{name}, {kernel}"] = f"{chosen}, off by {error:.2g}"
            expect(error < 3e-2, f"{name}: the attention {kernel} (taken: {chosen}) is off by {error:.2g}")


def kernel_velocity(bench: Bench, name: str, kernel: str) -> tuple[str, Tensor]:
    """The kernel that was taken, and a velocity of it."""
    family = FAMILIES[name]
    with quiet_libraries():
        teacher = load_teacher(family.make().to(bench.device), bench.device, attention=kernel,
                               image_size=family.image_size, dtype="bfloat16" if bench.small else "float16")
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1)).to(bench.device)
    condition = teacher.encode(prompts=PROMPTS[:2]) if family.prompts else teacher.encode(family.labels)
    with torch.no_grad():
        return teacher.network.attention, teacher.velocity(noise, 0.5, condition)


def forward_mode(bench: Bench) -> None:
    """The derivative of a student along its time, by a JVP and by central differences."""
    for name in ("dit",) if bench.small else ("dit", "sd", "edm-class", "sd3", "pixart-sigma"):
        family = FAMILIES[name]
        teacher = load_teacher(family.make().to(bench.device), bench.device, image_size=family.image_size,
                               attention="math")
        noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1)).to(bench.device)
        condition = teacher.encode(prompts=PROMPTS[:2]) if family.prompts else teacher.encode(family.labels)
        t, step = torch.full((2,), 0.5, device=bench.device, dtype=torch.float64), 1e-4

        def velocity(time: Tensor) -> Tensor:
            return teacher.network(noise, time, condition)  # noqa: B023

        with torch.no_grad(), tf32(False):
            _, slope = torch.func.jvp(velocity, (t,), (torch.ones_like(t),))
            difference = (velocity(t + step) - velocity(t - step)) / (2 * step)
        error = ((slope - difference).norm() / difference.norm()).item()
        bench.figures[name] = error
        expect(error < 5e-2, f"{name}: the JVP is {error:.2g} from a central difference")


# --- compilation


def networks_of(name: str, bench: Bench) -> tuple[Teacher, dict[str, Callable[[Tensor], Tensor]]]:
    """A teacher, and its network, a student's and a critic's as functions of the time (B,)."""
    family = FAMILIES[name]
    teacher = load_teacher(family.make().to(bench.device), bench.device, image_size=family.image_size,
                           null_label=family.null_label)
    student = FlowMap.from_teacher(teacher, StudentInfo("made up", name, (1.0, 2.0) if teacher.can_guide else None))
    critic = make_critic(teacher.network, None, ())
    networks = {"teacher": teacher.network, "student": student.network, "critic": critic}
    noise = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1)).to(bench.device)
    condition = teacher.encode(prompts=PROMPTS[:2]) if family.prompts else teacher.encode(family.labels)
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for role, network in networks.items():
        network.to(bench.device)
        scalars = {key: torch.full((2,), 0.3, device=bench.device) for key in getattr(network, "embeddings", ())}
        calls[role] = partial(_asked, network, noise, condition, scalars)
    return teacher, calls


def _asked(network: Any, noise: Tensor, condition: Any, scalars: dict[str, Tensor], t: Tensor) -> Tensor:
    return network(noise, t, condition, **scalars)


def compiled(bench: Bench, name: str) -> None:
    """Blocks compiled by themselves: the numbers stay, and after two passes nothing is compiled again."""
    if bench.small:
        HOW["backend"] = "eager"
    torch._dynamo.reset()
    try:
        _, calls = networks_of(name, bench)
        times = [torch.full((2,), 0.2 + 0.1 * k, device=bench.device) for k in range(5)]

        def outputs(call: Callable[[Tensor], Tensor], train: bool) -> Iterator[Tensor]:
            for index, t in enumerate(times):
                with torch._dynamo.config.patch(error_on_recompile=index > 1), torch.set_grad_enabled(train):
                    out = call(t)
                    if train:
                        out.square().mean().backward()
                yield out.detach()

        for role, call in calls.items():
            train, network = role != "teacher", call.args[0]  # type: ignore[attr-defined]
            plain = list(outputs(call, train))
            count = compile_blocks(network)
            expect(count > 0, f"{name}: no block of the {role} repeats")
            errors = [distance(one, other) for one, other in zip(outputs(call, train), plain, strict=True)]
            bench.figures[role] = f"{count} blocks, off by {max(errors):.2g}"
            expect(max(errors) < 1e-3, f"{name}: the compiled {role} is off by {max(errors):.2g}")
    finally:
        HOW.pop("backend", None)
        torch._dynamo.reset()


def graph_breaks(bench: Bench) -> None:
    """How often torch's compiler has to leave a whole network (``train.compile_scope: network``): never, as on the CPU.

    On the CPU one network, to be cheap: all of them were counted there (docs/gpu.md).
    """
    for name in ("dit",) if bench.small else ("dit", "sd", "sdxl", "sd3", "flux-dev", "pixart-sigma", "sana"):
        _, calls = networks_of(name, bench)
        for role, call in calls.items():
            torch._dynamo.reset()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch._dynamo.explain(call)(torch.full((2,), 0.5, device=bench.device))
            count, reasons = found.graph_break_count, [str(one.reason).splitlines()[0] for one in found.break_reasons]
            bench.figures[f"{name}, {role}"] = f"{count} breaks"
            expect(count == 0, f"{name}'s {role} breaks in {count} places: {'; '.join(reasons[:2])}")
    torch._dynamo.reset()


# --- memory and speed

SIZES = {
    "SD 1.5": ("sd15/dmd2", ["train.batch_size=4"]),
    "SDXL": ("sdxl/dmd2_4step", ["train.batch_size=1", "method.student=lora", "method.critic=lora"]),
    "SiT-XL": ("sit/freeflow", ["train.batch_size=16"]),
}
EXACT, ACTIVATIONS = 0.01, 1.35
"""Within which share what lasts is planned, and within which factor what an update takes besides."""


def random_teacher(config: Any, device: torch.device) -> Teacher:
    """A teacher of the architecture that a configuration names, with random weights on the device."""
    teacher = meta_teacher(config.teacher, read_architecture(config.teacher.source))
    generator = torch.Generator(device).manual_seed(0)
    for module in (teacher.network, teacher.codec):
        module.to_empty(device=device)
        with torch.no_grad():
            for tensor in itertools.chain(module.parameters(), module.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02, generator=generator)
                else:
                    tensor.zero_()
    teacher._anchor = torch.zeros(0, device=device)
    return teacher


def memory(bench: Bench, config: Any) -> None:
    """A run of random weights against its plan: what lasts, and the worst moment."""
    plan = make_plan(config)
    lasting = sum(part.lasting for part in plan.parts.values())
    if bench.device.type == "cuda":
        total = torch.cuda.get_device_properties(bench.device).total_memory
        if plan.peak > total - 2**30:
            raise NotHere(f"it takes {plan.peak / 2**30:.1f} GiB by its plan; this device has {total / 2**30:.1f}")
        x = torch.ones(64, 64, device=bench.device, requires_grad=True)
        (x @ x).sum().backward()  # the library's workspaces, one of the backward pass's thread, are not the run's
        x.grad = None
        torch.cuda.synchronize(bench.device)
        before = bytes_on(bench.device)
    seed_torch(config.seed)
    method = method_class(config.method.name)(config.method, random_teacher(config, bench.device))
    trainer = Trainer(method, config, bench.folder / "run", make_accelerator(config.train, bench.folder / "run"))
    trainer.train_step()
    gc.collect()
    if bench.device.type == "cuda":
        stays, blocks = (now - then for now, then in zip(bytes_on(bench.device), before, strict=True))
        bench.figures["what lasts in the allocator's blocks (GiB)"] = blocks / 2**30
        torch.cuda.reset_peak_memory_stats(bench.device)
        trainer.train_step()
        peak = bytes_on(bench.device, "peak")[0] - before[0]
    else:  # torch counts nothing there: what lasts is the tensors themselves, and a profiler sees an update
        stays = bytes_of(trainer)
        peak = stays + real_peak(trainer.train_step)
    bench.figures |= {
        "lasting: measured, planned (GiB)": f"{stays / 2**30:.4f}, {lasting / 2**30:.4f}",
        "peak: measured, planned (GiB)": f"{peak / 2**30:.4f}, {plan.peak / 2**30:.4f}",
        "what an update takes besides, planned / measured": (plan.peak - lasting) / max(1, peak - stays),
    }
    expect(abs(stays - lasting) <= EXACT * lasting,
           f"{stays / 2**30:.3f} GiB last, and {lasting / 2**30:.3f} are planned")
    ratio = (plan.peak - lasting) / max(1, peak - stays)
    expect(1 / ACTIVATIONS < ratio < ACTIVATIONS, f"an update takes {(peak - stays) / 2**30:.3f} GiB besides, and "
                                                  f"{(plan.peak - lasting) / 2**30:.3f} are planned")


def bytes_on(device: torch.device, moment: str = "current") -> tuple[int, int]:
    """Of a GPU's memory: those of the tensors, which are planned, and of the blocks that they lie in, of which each may
    be up to 1 MiB larger than its tensor."""
    found = torch.cuda.memory_stats(device)
    return found[f"requested_bytes.all.{moment}"], found[f"allocated_bytes.all.{moment}"]


def bytes_of(trainer: Trainer) -> int:
    """Of the tensors that a run keeps from step to step."""
    teacher, roles = trainer.method.teacher, trainer.roles.values()
    averages = [role.average.network for role in roles if role.average is not None]
    modules = [teacher.network, teacher.codec, *(role.network for role in roles), *averages]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [value for role in roles for state in role.optimizer.state.values() for value in state.values()]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def memory_of(bench: Bench, size: str) -> None:
    name, overrides = SIZES[size]
    memory(bench, load_config(ROOT / "configs" / f"{name}.yaml", [
        *overrides, "train.gradient_accumulation=1", f"train.device={bench.device}", f"output_dir={bench.folder}/run",
        "train.trackers=[]", "train.sample_every=0"]))


def memory_of_a_small_one(bench: Bench) -> None:
    """The code of the three below, at a size for any device."""
    memory(bench, small_run(bench, ["train.batch_size=16"], layers=4, num_attention_heads=4, attention_head_dim=32))


def small_run(bench: Bench, overrides: list[str], **dit: Any) -> Any:
    """A configuration of DMD2 on a random DiT that is written to the part's folder."""
    tiny_dit_pipeline(**dit).save_pretrained(bench.folder / "teacher")
    (bench.folder / "run.yaml").write_text(json.dumps({
        "output_dir": str(bench.folder / "run"), "teacher": {"source": str(bench.folder / "teacher")},
        "method": {"name": "dmd2"}, "evaluation": {"at_end": False},
        "train": {"steps": 100, "batch_size": 4, "trackers": [], "device": str(bench.device), "precision": "fp32"},
    }))
    return load_config(bench.folder / "run.yaml", overrides)


def throughput(bench: Bench) -> None:
    """A step of DMD2 against the passes that it cannot do without, by scripts/benchmark_step.py."""
    from scripts import benchmark_step

    size = {"layers": 2} if bench.small else {"layers": 12, "num_attention_heads": 12, "attention_head_dim": 64,
                                              "sample_size": 32}
    config = small_run(bench, [f"train.batch_size={4 if bench.small else 64}"], **size)
    result = benchmark_step.benchmark(config, 3 if bench.small else 20)
    rows = config.train.batch_size
    bench.figures |= {
        "step (ms)": 1000 * result["step"], "bare passes (ms)": 1000 * result["bare"],
        "updates (ms)": 1000 * result["updates"], "step / bare passes": result["step_ratio"],
        "step / (bare passes + updates)": result["step_ratio_with_updates"], "images a second": rows / result["step"],
        "generate / bare loop": result["sampling_ratio"],
    }
    if not bench.small:
        ratio = result["step_ratio_with_updates"]
        expect(ratio < 1.2, f"a step takes {ratio:.2f} times its bare passes and updates")


def ways(bench: Bench) -> None:
    """Each way in which a step does its work against the other one, by scripts/benchmark_parts.py."""
    from scripts import benchmark_parts

    sizes = {"CHANNELS": (32, 32), "SIDE": 8} if bench.small else {}
    with mock.patch.multiple(benchmark_parts, **sizes):
        for name, (one, other) in benchmark_parts.pairs(bench.device).items():
            ours, theirs, ratio = benchmark_parts.measure(one, other, bench.device, 1 if bench.small else 30)
            bench.figures[f"{name} (ms, ms, ratio)"] = f"{1000 * ours:.3f}, {1000 * theirs:.3f}, {ratio:.2f}"


def cuda_graphs(bench: Bench) -> None:
    """A small student's pass, forward and backward: as it is, compiled, and compiled with CUDA graphs."""
    from scripts import benchmark_step

    # The CPU has no graphs to compare with: there it is only whether this runs.
    how: dict[str, Any] = {"backend": "eager"} if bench.small else {}
    graphs = how or {"mode": "reduce-overhead"}
    for name in ("dit",) if bench.small else ("dit", "sd", "pixart-sigma"):
        call, t = networks_of(name, bench)[1]["student"], torch.full((2,), 0.5, device=bench.device)

        def plain(t: Tensor, call: Callable[[Tensor], Tensor] = call) -> Tensor:
            return call(t)

        def step(run: Callable[[Tensor], Tensor], t: Tensor = t) -> None:
            torch.compiler.cudagraph_mark_step_begin()
            run(t).square().mean().backward()

        runs = {"as it is": plain, "compiled": torch.compile(plain, **how), "graphs": torch.compile(plain, **graphs)}
        outputs = {key: run(t).detach().clone() for key, run in runs.items()}
        timed = benchmark_step.measure({key: partial(step, run) for key, run in runs.items()},
                                       1 if bench.small else 30, 1 if bench.small else 5, lambda: None)
        error = distance(outputs["graphs"], outputs["as it is"])
        bench.figures[f"{name} (ms: as it is, compiled, with CUDA graphs)"] = ", ".join(
            f"{1000 * statistics.median(seconds):.3f}" for seconds in timed.values())
        expect(error < 1e-3, f"{name} with CUDA graphs is off by {error:.2g}")
    torch._dynamo.reset()


def copies(bench: Bench) -> None:
    """Batches to the device from ordinary memory, which the host waits for, and from pinned memory."""
    batch, times = torch.randn(64, 4, 64, 64), {"ordinary": [], "pinned": []}  # type: ignore[var-annotated]
    for _ in range(30):
        for kind, taken in times.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            if kind == "pinned":
                batch.pin_memory().to(bench.device, non_blocking=True)
            else:
                batch.to(bench.device)
            end.record()
            bench.wait()
            taken.append(start.elapsed_time(end))
    bench.figures |= {f"{kind} (ms)": statistics.median(taken[5:]) for kind, taken in times.items()}


def two_processes(bench: Bench) -> None:
    """Two processes on two devices train the student that one trains."""
    if bench.device.type == "cuda" and torch.cuda.device_count() < 2:
        raise NotHere(f"it needs two CUDA devices; this machine has {torch.cuda.device_count()}")
    small_run(bench, [])
    students = {}
    for count in (1, 2):
        out = bench.folder / f"of {count}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        overrides = [f"output_dir={out}", "train.steps=4", f"train.device={bench.device.type}"]
        done = subprocess.run([*launcher, "-m", "flowdistill", "distill", str(bench.folder / "run.yaml"), *overrides],
                              cwd=ROOT, capture_output=True, text=True, timeout=110)
        expect(done.returncode == 0, f"{count} processes ended with {done.returncode}: "
                                     f"{(done.stderr.strip().splitlines() or [''])[-1][:200]}")
        students[count] = {file.name: load_file(file) for file in sorted((out / "student").rglob("*.safetensors"))}
    errors = [distance(value, students[1][file][key]) for file, tensors in students[2].items()
              for key, value in tensors.items()]
    bench.figures["largest difference of a student's weights"] = max(errors)
    expect(max(errors) < 1e-3, f"two processes' student is {max(errors):.2g} from one process's")


def _parts() -> dict[str, Part]:
    parts = {
        "machine": Part("the device computes in float32, bf16 and fp16", the_machine),
        "families-fp32": Part("every family's teacher makes what its pipeline's own call makes", partial(
            families, dtype="fp32")),
        "families-tf32": Part("the same with TF32", partial(families, dtype="fp32", fast=True), on_cpu=False),
        "families-bf16": Part("the same in bf16", partial(families, dtype="bf16")),
        "families-fp16": Part("the same in fp16", partial(families, dtype="fp16"), on_cpu=False),
        "methods-bf16": Part("a step of every method in bf16 against float32", partial(methods, precision="bf16")),
        "methods-fp16": Part("a step of every method in fp16 against float32", partial(methods, precision="fp16")),
        "no-waits": Part("no step waits for the device (torch's sync debug mode)", no_waits, on_cpu=False),
        "resume": Part("a resumed run is the uninterrupted one, to the last bit", resume),
        "attention": Part("torch's, xformers' and diffusers' kernels against the formula", attention),
        "forward-mode": Part("JVPs against central differences", forward_mode),
        "optimizers": Part("every optimiser that is installed steps", optimizers),
        "quantized": Part("teachers in int8, fp8 and nf4 against float32", quantized),
    }
    for name in ("dit", "sd", "sd3", "flux-dev"):
        parts[f"compile-{name}"] = Part("compiled blocks: the same numbers, nothing compiled again", partial(
            compiled, name=name), on_cpu=name == "dit")
    parts["graph-breaks"] = Part("breaks of networks compiled whole, counted", graph_breaks)
    parts["memory-small"] = Part("a small run against its plan", memory_of_a_small_one)
    for size in SIZES:
        key = f"memory-{size.lower().replace(' ', '-')}"
        parts[key] = Part(f"a run of {size}'s size against its plan", partial(memory_of, size=size), on_cpu=False)
    parts["throughput"] = Part("a step of DMD2 against its bare passes", throughput)
    parts["ways"] = Part("each way in which a step does its work, timed against the other", ways)
    parts["cuda-graphs"] = Part("a small student with CUDA graphs, timed", cuda_graphs)
    parts["beside-fastgen"] = Part("a step of DMD2 against FastGen's", fastgen_dmd2)
    parts["beside-lcm-script"] = Part("a step of latent consistency against diffusers' script", lcm_script)
    parts["copies"] = Part("copies from pinned memory, timed", copies, on_cpu=False)
    parts["two-processes"] = Part("two processes train what one trains", two_processes)
    return parts


PARTS = _parts()
"""By name."""
