#!/usr/bin/env python
"""FID, KID, precision and recall of a folder of images, or of what a pipeline, a run or a student generates.

    python scripts/evaluate_fid.py IMAGES --reference digits --features digits
    python scripts/evaluate_fid.py PIPELINE --reference REAL_IMAGES --features inception --num-images 50000 --steps 50
    torchrun --nproc_per_node 2 scripts/evaluate_fid.py RUN --reference statistics.npz --features inception

Also under ``accelerate launch``. A run or a student is measured at its one call; any diffusers pipeline is called as it
is, with its own scheduler, one generator an image. The protocol comes with the figures.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill.cli.arguments import guidance
from flowdistill.config import FEATURES, SCORERS

if TYPE_CHECKING:
    from torch import Tensor

    from flowdistill.evaluation import Evaluator, Report

IMAGENET = 1000  # the null label that diffusers' DiTPipeline has, whatever its network was trained on


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; argparse itself exits with code 2 when it is wrong."""
    from flowdistill.cli.arguments import seed_number

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Nothing is downloaded but a pipeline named by its hub id.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", help="folder of images, diffusers pipeline (folder or hub id), run folder or student folder")
    add("--reference", required=True, help="named set (digits, fashion, shapes), folder of images, .npz statistics of "
        "ours, or MODE:FILE.npz of others (clean:cifar10.npz)")
    add("--features", help=f"what measures: {', '.join(FEATURES)}, or a TorchScript file; must be given")
    add("--weights", metavar="PATH", help="inception-2015-12-05.pt or its folder (default: $FLOWDISTILL_WEIGHTS)")
    add("--num-images", type=int, metavar="N", help="images to generate (default: 10000) or draw from a folder (all)")
    add("--seed", type=seed_number(), default=0, help="image i depends on the seed and i only (default: 0)")
    add("--batch-size", type=int, default=250, metavar="B", help="images of one call (default: 250)")
    add("--steps", type=int, metavar="S", help="num_inference_steps of a pipeline (default: as its "
        "flowdistill.json says, else its own)")
    add("--guidance-scale", type=guidance, metavar="G", help="of a pipeline or student (default: its own)")
    add("--num-classes", type=int, metavar="K", help="labels a pipeline is asked for: 0 to K-1 in turn (default: all, "
        "but not the null label where a flowdistill.json beside it names one)")
    add("--prompts", metavar="FILE", help="one prompt a line, used in turn, for a text-to-image pipeline")
    add("--variant", metavar="NAME", help="of a pipeline's weight files, such as fp16 (default: none, or the only one)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of a pipeline's weights")
    add("--device", help="default: the GPU of each process when there is one, else the CPU")
    add("--cache", metavar="DIR", help="where reference statistics are kept (default: ~/.cache/flowdistill/statistics)")
    add("--save-reference", metavar="FILE.npz", help="also write the reference's statistics")
    add("--json", metavar="FILE", help="also write the report")
    add("--more-metrics", default="", metavar="NAME,NAME", help="that are measured only when they are asked for, such "
        "as frechet_at_infinity and diversity")
    add("--scorers", default="", metavar="NAME:PATH,...", help="how well images fit their prompts: "
        f"{', '.join(SCORERS)}, each with a folder or hub id behind a colon")
    add("--no-kid", action="store_true", help="FID only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; returns the exit code: 0, or 2 for input that cannot be used."""
    options = parse(arguments)
    from flowdistill.utils.errors import UserError

    try:
        report = run(options)
    except (UserError, OSError) as error:
        # Every process of several has found the same; one says so.
        if os.environ.get("RANK", "0") == "0":
            print(f"evaluate_fid: error: {error}", file=sys.stderr)
        return 2
    if report is not None:
        print(report, report.protocol_text(), sep="\n\n")
    return 0


def run(options: argparse.Namespace) -> Report | None:
    """Measure what the options name; the report on the main process, None on the others."""
    import torch

    from flowdistill.evaluation import Evaluator
    from flowdistill.evaluation.reference import check_reference_place
    from flowdistill.evaluation.report import check_report_place
    from flowdistill.utils.errors import UserError
    from flowdistill.utils.files import local_path
    from flowdistill.utils.processes import Processes

    num_images = 10_000 if options.num_images is None else options.num_images
    if num_images < 1:
        raise UserError(f"--num-images must be at least 1, not {num_images}")
    if options.features is None:
        raise UserError("--features is not given: digits or shapes for images like the shipped sets, inception for "
            "natural images, or a TorchScript file")
    processes = Processes.start()
    if options.json:
        processes.on_main(lambda: check_report_place(options.json))
    if options.save_reference:
        processes.on_main(lambda: check_reference_place(options.save_reference))
    if options.device is None:
        # With several processes, "cuda" is the one that Processes.start has given to this process.
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluator = Evaluator(
        options.features,
        options.reference,
        num_images,
        options.seed,
        options.batch_size,
        metrics=("frechet", "accuracy", "frechet_by_class") if options.no_kid else None,
        more_metrics=[name for name in options.more_metrics.split(",") if name],
        scorers=[name for name in options.scorers.split(",") if name],
        device=options.device,
        weights=options.weights,
        cache_dir=options.cache,
    )
    if options.save_reference:
        processes.on_main(lambda: evaluator.reference.save(options.save_reference))
    source = local_path(options.source)
    described = any((source / name).is_file() for name in ("config.yaml", "flowdistill.json", "model_index.json"))
    if source.is_dir() and not described:
        report = of_folder(evaluator, options)
    else:
        report = of_model(evaluator, options)
    if options.json:
        processes.on_main(lambda: report.write_json(options.json))
    return report if processes.is_main else None


def of_folder(evaluator: Evaluator, options: argparse.Namespace) -> Report:
    """Stored images against the reference."""
    from flowdistill.data.image_sets import FolderImages
    from flowdistill.utils.errors import UserError

    try:
        images = FolderImages(options.source)
    except UserError as error:
        raise UserError(
            f"{options.source} is neither a folder of images nor a pipeline, a run or a student: {error}"
        ) from error
    if options.num_images is not None:
        images = images.sample(options.num_images, options.seed)
    row = evaluator.measure_images(images, name=images.folder.name)
    facts = {"images_drawn": images.sampled} if images.sampled else {}
    facts |= {"images_left_out": images.left_out, "images_hash": images.hash()}
    return evaluator.report([row], len(images), model=options.source, **facts)


def of_model(evaluator: Evaluator, options: argparse.Namespace) -> Report:
    """Generated images against the reference."""
    from flowdistill.conditioning.prompts import read_prompts
    from flowdistill.evaluation import PromptsInTurn, prompt_conditions, student_sampler, teacher_sampler
    from flowdistill.students import is_student_folder, load_student
    from flowdistill.utils.errors import UserError
    from flowdistill.utils.files import local_path

    facts: dict[str, Any] = {"model": options.source, "device": options.device}
    if is_student_folder(options.source):
        student = load_student(options.source).to(options.device)
        if options.prompts and student.prompts is not None:
            student.prompts.use(read_prompts(options.prompts))
        restrict(evaluator, None if student.classes is None else student.classes.own)
        scale = student.info.guidance_scale if options.guidance_scale is None else options.guidance_scale
        row = evaluator.measure(student_sampler(student, scale), student.shape, student.num_classes, "student",
                                student.num_steps,
                                condition=prompt_conditions(student))
        return evaluator.report([row], **facts, guidance_scale=scale)
    if (local_path(options.source) / "config.yaml").is_file():
        raise UserError(f"the run {options.source} has no student yet; let it reach a checkpoint first")
    folder, loaded = load_pipeline(options)
    if labels_out_of_reach(loaded):
        # Stock DDPM and DDIM pipelines cannot pass labels on to the network that needs them.
        from flowdistill import load_teacher

        # Where K classes are asked for and the network has one label more, that one means "no class".
        labels, count = loaded.unet.config.num_class_embeds, options.num_classes
        null_label = count if count is not None and labels == count + 1 else None
        teacher = load_teacher(folder, options.device, null_label=null_label, dtype=options.dtype,
                               variant=options.variant)
        classes = teacher.num_classes if count is None else count
        steps, scale = options.steps or 50, 1.0 if options.guidance_scale is None else options.guidance_scale
        sampler = teacher_sampler(teacher, steps, "euler", scale)
        row = evaluator.measure(sampler, teacher.shape, classes, "pipeline", steps)
        how = f"{type(loaded).__name__} takes no labels: flowdistill's Euler steps"
        return evaluator.report([row], **facts, sampler=how, guidance_scale=scale, dtype=options.dtype, classes=classes)
    sampler = PipelineSampler(loaded, options, folder)
    restrict(evaluator, sampler.own)
    lists = [sampler.arguments.get(name) for name in ("timesteps", "sigmas")]
    steps = next((len(times) for times in lists if times), sampler.arguments.get("num_inference_steps"))
    condition = sampler.condition if sampler.prompts is None else PromptsInTurn(sampler.condition, sampler.prompts)
    row = evaluator.measure(sampler, (1,), sampler.num_classes, "pipeline", steps, condition=condition)
    facts |= {
        "sampler": f"{type(loaded).__name__} with {sampler.scheduler}",
        "arguments": json.dumps(sampler.arguments),
    }
    facts |= {"prompts": options.prompts, "classes": sampler.num_classes, "dtype": options.dtype}
    facts |= {"classes_are": sampler.classes_are}
    return evaluator.report([row], **facts)


def labels_out_of_reach(pipeline: Any) -> bool:
    """Whether the pipeline's network needs class labels that the pipeline's call does not take."""
    config = getattr(getattr(pipeline, "unet", None), "config", {})
    return config.get("num_class_embeds") is not None and "class_labels" not in call_arguments(pipeline)


def call_arguments(pipeline: Any) -> set[str]:
    """Names of what the pipeline's call takes."""
    return set(inspect.signature(pipeline.__call__).parameters)


class PipelineSampler:
    """A diffusers pipeline as a sampler: it draws its own noise, so each image gets a generator of its own.

    Args:
        folder: of the pipeline, where a flowdistill.json may say which class labels are classes and how it is called.

    Raises:
        UserError: an argument that the pipeline does not take, or prompts that it needs and were not given.
    """

    def __init__(self, pipeline: Any, options: argparse.Namespace, folder: Path | None = None) -> None:
        from flowdistill.conditioning.prompts import read_prompts
        from flowdistill.teachers.loading import read_record
        from flowdistill.utils.errors import UserError

        self.pipeline, self.seed = pipeline, options.seed
        self.scheduler = type(getattr(pipeline, "scheduler", None)).__name__
        accepted, kind = call_arguments(pipeline), type(pipeline).__name__
        wanted = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        recorded = {} if folder is None else read_record(folder).get("call", {})
        self.arguments = recorded | {name: value for name, value in wanted.items() if value is not None}
        for name in ["generator", *self.arguments]:
            if name not in accepted:
                raise UserError(
                    f"a {kind} takes no {name}" + ", so its images cannot be seeded" * (name == "generator")
                )
        labels = getattr(getattr(pipeline, "transformer", None), "config", {}).get("num_embeds_ada_norm")
        if kind == "DiTPipeline" and labels != IMAGENET and self.arguments.get("guidance_scale") != 1:
            raise UserError(f"a DiTPipeline takes label {IMAGENET} for the one that means 'no class', and this network "
                            f"has {labels} classes; give --guidance-scale 1")
        self.batched = "batch_size" in accepted
        self.num_classes: int | None = None
        self.classes_are: str | None = None
        self.own: list[int] | None = None  # class labels that a student was trained for, where these are not all
        if "class_labels" in accepted:
            self.num_classes, self.classes_are = self._classes(options, folder)
        self.prompts: list[str] | None = None
        if "prompt" in accepted:
            if not options.prompts:
                raise UserError(f"a {kind} needs prompts: give --prompts FILE")
            self.prompts = read_prompts(options.prompts).prompts

    def _classes(self, options: argparse.Namespace, folder: Path | None) -> tuple[int | None, str | None]:
        """How many classes to draw from, and how that is known: as asked, else as the folder records, else assumed."""
        from flowdistill.teachers.loading import read_record

        if options.num_classes is not None:
            return options.num_classes, "--num-classes"
        recorded = {} if folder is None else read_record(folder)
        if recorded.get("num_classes") is not None:
            self.own = recorded.get("labels")
            return recorded["num_classes"], "flowdistill.json"
        network = getattr(self.pipeline, "transformer", None) or self.pipeline.unet
        if (count := network.config.get("num_embeds_ada_norm")) is not None:
            how = f"assumed: labels 0 to {count - 1}, a {type(network).__name__} has its null label beside them"
        elif (count := network.config.get("num_class_embeds")) is None:
            return None, None
        elif recorded.get("null_label") == count - 1:
            return count - 1, "flowdistill.json"
        else:
            how = (f"assumed: all {count} labels of the {type(network).__name__}; where the last one means 'no class', "
                   f"give --num-classes {count - 1}")
        if os.environ.get("RANK", "0") == "0":
            print(f"evaluate_fid: classes are {how}", file=sys.stderr)
        return count, how

    def condition(self, indices: range) -> tuple[range, list | None]:
        """Indices with their prompts or labels."""
        if self.prompts is not None:
            return indices, [self.prompts[index % len(self.prompts)] for index in indices]
        labels = self.own or (None if self.num_classes is None else range(self.num_classes))
        return indices, None if labels is None else [labels[index % len(labels)] for index in indices]

    def __call__(self, noise: Tensor, condition: tuple[range, list | None]) -> Tensor:
        import torch

        from flowdistill.evaluation.generation import sample_generators

        indices, given = condition
        arguments = {"generator": sample_generators(indices, self.seed), "output_type": "np", **self.arguments}
        if given is not None:
            arguments["prompt" if self.prompts is not None else "class_labels"] = given
        if self.batched:
            arguments["batch_size"] = len(indices)
        # Some pipelines take the noise between their steps from the global generator.
        torch.manual_seed(arguments["generator"][0].initial_seed())
        with float_arrays():
            images = torch.from_numpy(self.pipeline(**arguments).images)
        return images.permute(0, 3, 1, 2).float()


def float_arrays() -> Any:
    """A context in which tensors of bfloat16, a type that numpy does not have, become arrays of float32.

    Stock pipelines of pixel models make arrays of their images in the type of their network.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class FloatArrays(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.numpy and args[0].dtype == torch.bfloat16:
                args = (args[0].float(), *args[1:])
            return func(*args, **(kwargs or {}))

    return FloatArrays()


def load_pipeline(options: argparse.Namespace) -> tuple[Path, Any]:
    """The pipeline's folder, and the pipeline, quiet and on its device."""
    import torch
    from diffusers.utils import logging

    from flowdistill.teachers.loading import load_pipeline, pipeline_folder

    logging.disable_progress_bar()
    folder = pipeline_folder(options.source, options.variant, what="the pipeline")
    pipeline = load_pipeline(folder, getattr(torch, options.dtype), options.variant)
    pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline.to(options.device)


def restrict(evaluator: Evaluator, labels: list[int] | tuple[int, ...] | None) -> None:
    """Measure these class labels only, of images and of the reference, where a model makes no others."""
    if labels is not None:
        evaluator.own, evaluator.reference = list(labels), evaluator.reference.of(labels)


if __name__ == "__main__":
    from flowdistill.utils.exit import exit_process

    exit_process(main())
