"""Make a StableDiffusionPipeline in the manner of SD-Turbo of a one-step generator.

Its UNet is the generator's as it is, under a scheduler whose one step, at the last timestep, is the generator:

    python scripts/make_shapes_turbo.py runs/shapes-dmd2 --out assets/shapes/turbo

Unlike flowdistill export, which folds the time into the weights, this keeps a UNet that takes any timestep, so the
pipeline may be trained further.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel

from flowdistill import load_student
from flowdistill.paths.native_path import path_from_scheduler
from flowdistill.students.generator import Generator
from flowdistill.utils.errors import UserError
from flowdistill.utils.files import check_writable, local_path
from flowdistill.utils.randomness import indexed_noise

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def turbo(student: Generator) -> StableDiffusionPipeline:
    """The pipeline of a Stable Diffusion student that starts at the last timestep.

    Raises:
        UserError: another kind of student, or one that starts elsewhere.
    """
    if not isinstance(student, Generator) or student.prompts is None:
        raise UserError("only a generator with prompts (of dmd2, sid, diff_instruct, disback) becomes such a pipeline")
    last = path_from_scheduler(student.scheduler).t_max
    if abs(student.t_start - last) > 1e-9:
        raise UserError(f"the student starts at t = {student.t_start:.4f}; a trailing step starts at {last:.4f}")
    backbone = student.network.velocity.backbone
    unet = UNet2DConditionModel.from_config(backbone.config)
    unet.load_state_dict(backbone.state_dict())
    scheduler = EulerDiscreteScheduler(
        **{name: student.scheduler.config[name] for name in SCHEDULE}, timestep_spacing="trailing", steps_offset=1,
    )
    with student.prompts.text.opened(torch.device("cpu")) as text:
        return StableDiffusionPipeline(
            vae=student.codec.vae, text_encoder=text.text_encoder, tokenizer=text.tokenizer, unet=unet.eval(),
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )


@torch.no_grad()
def difference(pipeline: StableDiffusionPipeline, student: Generator, prompts: list[str]) -> float:
    """Largest difference of latents between the pipeline's one step and the student, from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise = indexed_noise(student.shape, 0, range(len(prompts)))
    made = pipeline(prompts, latents=noise, num_inference_steps=1, guidance_scale=0.0, output_type="latent").images
    return (made - student(noise, student.encode(prompts=prompts))).abs().max().item()


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="run folder or student folder")
    parser.add_argument("--out", type=local_path, default=Path("assets/shapes/turbo"), help="pipeline folder to write")
    args = parser.parse_args(arguments)
    try:
        check_writable(args.out / "model_index.json")
        student = load_student(args.run)
        pipeline = turbo(student)
    except UserError as error:
        print(f"make_shapes_turbo: error: {error}", file=sys.stderr)
        return 2
    assert student.prompts is not None and student.prompts.prompts is not None
    prompts = student.prompts.prompts[:100]
    exact = difference(pipeline, student, prompts)
    pipeline.unet.half().float()
    rounded = difference(pipeline, student, prompts)
    # As the teacher is stored: in half precision, except for the text encoder.
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(args.out)
    record = {
        "data": "shapes",
        "method": student.info.method,
        "base_model": student.info.base_model,
        "guidance_scale": student.info.guidance_scale,
        "largest_difference_to_the_student": {"float32": exact, "stored": rounded},
        "command": f"python scripts/make_shapes_turbo.py {args.run} --out {args.out.as_posix()}",
    }
    (args.out / "flowdistill.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.out}; its one step and the student differ by {exact:.1e}, as stored by {rounded:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
