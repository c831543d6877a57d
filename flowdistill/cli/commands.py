"""The ``flowdistill`` command. Nothing heavy is imported before a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flowdistill import __version__
from flowdistill.cli import completion, environment, looking, settings, starting, tables
from flowdistill.cli.arguments import (
    SETTING,
    Parser,
    at_least,
    guidance,
    image_size,
    integers,
    positive,
    positives,
    seed_number,
    texts,
)
from flowdistill.config import FEATURES, SCORERS
from flowdistill.utils.errors import UserError, one_line, sentence_of
from flowdistill.utils.exit import exit_process
from flowdistill.utils.numbers import MOST_CALLS

if TYPE_CHECKING:
    import torch

    from flowdistill.evaluation.generation import Sampler
    from flowdistill.students import Student
    from flowdistill.teachers import Teacher

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE = 141  # 128 + SIGPIPE
VARIANT = "of a pipeline's weight files, such as fp16 (default: none, or the only one)"
IMAGE_SIZE = "of a text-to-image pipeline: side of a square, or HEIGHTxWIDTH (default: the pipeline's own)"
WIDEST_ROW = 20  # a grid gets a column a label up to this many

# What a full, read-only or mistyped place gives: a user's problem, not a bug.
PLACE_ERRORS = frozenset(
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP".split()
    if hasattr(errno, name)
)


def command() -> NoReturn:
    """What the installed ``flowdistill`` runs: ``main``, then the end of the process."""
    warnings.formatwarning = format_warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an arrow or an accent is no reason to lose a table
    exit_process(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Bad input: one sentence on standard error and 2."""
    args = make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("flowdistill: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would complain once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        sentence = _place_problem(error, args)
        if sentence is None:
            raise
        return _fail(sentence)


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None,
    python: Callable[..., str] = warnings.formatwarning,
) -> str:
    """One line for a warning of this package; those of others as Python shows them."""
    own = Path(filename).is_relative_to(Path(__file__).parents[1])
    if own:
        return f"flowdistill: warning: {one_line(str(message))}\n"
    return python(message, category, filename, lineno, line)


def _fail(sentence: str) -> int:
    print(f"flowdistill: error: {sentence_of(sentence)}", file=sys.stderr)
    return 2


def _place_problem(error: Exception, args: argparse.Namespace) -> str | None:
    """A sentence for an error that comes from where something is written, else None."""
    number = error.errno if isinstance(error, OSError) else None
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors passes such errors on as text
        number = int(match[1])
    if number is None or number not in PLACE_ERRORS:
        return None
    path = getattr(error, "filename", None) or args.target(args)
    folder, name = os.path.split(os.fsdecode(path))
    # Files are written under a passing name; the user knows the final one.
    name = re.sub(r"^\.(.+)\.[^.]+\.(tmp|partial)$", r"\1", name)
    return f"{os.path.join(folder, name)}: {os.strerror(number)}"


# --- the commands


def _distill(args: argparse.Namespace) -> int:
    from flowdistill.training.run import distill

    run = distill(args.config, args.overrides)
    if run.interrupted:
        if _is_main():
            print(f"flowdistill: stopped by a signal after step {run.steps}; the same command goes on", file=sys.stderr)
        return 128 + run.interrupted
    if _is_main():
        print(f"the run is in {run.output_dir}: {run.contents}", end="")
        print("" if run.report is None else " and report.json")
        from flowdistill.training.closing import closing

        print(closing(run.output_dir))
    return 0


def _output_dir(args: argparse.Namespace) -> str:
    from flowdistill.config import load_config

    try:
        return load_config(args.config, args.overrides).output_dir
    except UserError:
        return str(args.config)


def _sample(args: argparse.Namespace) -> int:
    from flowdistill.utils.files import local_path

    if args.suite is not None:
        return _sample_suite(args)
    out = local_path(args.out)
    is_grid = out.suffix.lower() == ".png"
    if is_grid and out.is_dir() or not is_grid and (_names_a_file(out) or out.exists() and not out.is_dir()):
        raise UserError(f"--out {out} must be a .png file for one grid, or a folder for one file an image")
    import torch

    from flowdistill.evaluation.generation import generate
    from flowdistill.utils.files import check_writable
    from flowdistill.utils.images import save_grid, save_images
    from flowdistill.utils.processes import Processes

    processes = Processes.start()
    if is_grid and not processes.is_main:
        return 0  # one file needs one process; a folder's files are shared among all
    check_writable(out if is_grid else out / "000000.png")
    if not is_grid:
        from flowdistill.data.pictures import check_without_pictures

        processes.on_main(lambda: check_without_pictures(out, "--out"))
    model, sampler = _model_and_sampler(args)
    labels, prompts = args.labels, args.prompt
    if args.prompts is not None:
        from flowdistill.conditioning.prompts import read_prompts

        prompts = read_prompts(args.prompts).prompts
    elif labels is None and prompts is None and model.classes is not None:
        labels = list(model.classes.shown)
    elif prompts is None and model.prompts is not None and model.prompts.prompts is None:
        raise UserError(f"{args.model} takes prompts; give --prompt TEXT, or --prompts FILE with one a line")
    # Encoded before anything is made: refuses a label out of range, and text encoders are loaded once.
    listed = None
    if labels is not None or prompts is not None:
        listed = model.encode(labels, prompts)
    count = args.num_images or (1 if listed is None else len(listed))
    share = Processes() if is_grid else processes
    batches = generate(
        sampler,
        model.shape,
        count,
        args.seed,
        args.batch_size,
        share.rank,
        share.world,
        condition=lambda indices: (
            model.examples(indices)
            if listed is None
            else listed[torch.tensor([i % len(listed) for i in indices], device=model.device)]
        ),
    )
    if is_grid:
        columns = len(listed) if listed is not None and 1 < len(listed) <= min(WIDEST_ROW, count) else None
        save_grid(torch.cat([batch.images.cpu() for batch in batches]), out, columns)
    else:
        for batch in batches:
            save_images(batch.images, out, start=batch.indices.start)
    if processes.is_main:
        print(f"{count} image{'' if count == 1 else 's'} in {out}")
    return 0


def _sample_suite(args: argparse.Namespace) -> int:
    """The images of a benchmark, in the layout that its program reads."""
    for name in ("num_images", "labels", "prompt"):
        if getattr(args, name) is not None:
            raise UserError(f"--suite {args.suite} decides how many images are made of what, so it goes without "
                            f"--{name.replace('_', '-')}")
    from flowdistill.evaluation.suites import SUITES, read_suite, record_of, write_suite
    from flowdistill.utils.files import check_place, check_writable, local_path
    from flowdistill.utils.processes import Processes

    if args.prompts is None:
        raise UserError(f"--suite {args.suite} reads {SUITES[args.suite].bring}: give it with --prompts")
    processes, out = Processes.start(), local_path(args.out)
    if _names_a_file(out):
        raise UserError(f"--out {out} must be a folder")
    check_place(out, f"--out {out}")
    prompts = read_suite(args.suite, args.prompts)
    check_writable(record_of(out.absolute()))
    model, sampler = _model_and_sampler(args)
    how = {"steps": args.steps, "guidance_scale": args.guidance_scale}
    count = write_suite(args.suite, prompts, model, sampler, out, args.seed, args.batch_size, how)
    if processes.is_main:
        print(f"{count:,} images of {len(prompts):,} prompts in {out}, as {args.suite} reads them")
    return 0


def _names_a_file(path: Path) -> bool:
    """Whether a path that does not exist yet ends like an image or another file that Pillow writes."""
    from PIL import Image

    return not path.exists() and path.suffix.lower() in Image.registered_extensions()


def _model_and_sampler(args: argparse.Namespace) -> tuple[Teacher | Student, Sampler]:
    """The student or the teacher at ``args.model``, and how it makes images."""
    from flowdistill.evaluation import student_sampler, teacher_sampler
    from flowdistill.students import exported_student, is_student_folder, load_student
    from flowdistill.teachers import load_teacher
    from flowdistill.teachers.loading import read_record
    from flowdistill.utils.files import local_path

    device = _device(args.device)
    # A run folder without a student is a run all the same: load_student says what is the matter with it.
    if is_student_folder(args.model) or (local_path(args.model) / "config.yaml").is_file():
        _only_for_pipelines(args, "variant", "image_size")
        student = load_student(args.model, device=device)
        model: Teacher | Student = student
        sampler = student_sampler(student, args.guidance_scale, args.steps)
    elif (exported := exported_student(args.model, device)) is not None:
        _only_for_pipelines(args, "variant", "image_size")
        model, sampler = exported, student_sampler(exported, args.guidance_scale, args.steps)
    else:
        if "call" in read_record(local_path(args.model)):
            raise UserError(f"{args.model} is the exported pipeline of a one-step student, whose network knows one "
                            "time only; call it as its README.md says, or give the run or student folder it is of")
        model = load_teacher(args.model, device=device, variant=args.variant, image_size=args.image_size)
        scale = 1.0 if args.guidance_scale is None else args.guidance_scale
        sampler = teacher_sampler(model, args.steps or 50, guidance_scale=scale)
    asked = "--prompts" if args.prompts is not None else "--prompt" if args.prompt is not None else None
    if asked is not None and model.prompts is None:
        takes = "nothing" if model.num_classes is None else f"class labels 0 to {model.num_classes - 1} (--labels)"
        raise UserError(f"{asked} needs a text-to-image model, and {args.model} takes {takes}")
    return model, sampler


def _only_for_pipelines(args: argparse.Namespace, *names: str) -> None:
    """UserError where an option that is for pipelines was given for a run or a student."""
    from flowdistill.utils.files import local_path

    for name in names:
        if getattr(args, name) is not None:
            kind = "run" if (local_path(args.model) / "config.yaml").is_file() else "student"
            raise UserError(f"--{name.replace('_', '-')} is for pipelines, and {args.model} is a {kind}")


def _evaluate(args: argparse.Namespace) -> int:
    from flowdistill.evaluation import evaluate

    models: list[str | Teacher] = list(args.model)
    if args.variant is not None or args.image_size is not None:
        from flowdistill.students import is_student_folder
        from flowdistill.teachers import load_teacher
        from flowdistill.utils.files import local_path

        for number, model in enumerate(args.model):
            if is_student_folder(model) or (local_path(model) / "config.yaml").is_file():
                own = argparse.Namespace(model=model, variant=args.variant, image_size=args.image_size)
                _only_for_pipelines(own, "variant", "image_size")
            models[number] = load_teacher(model, device=_device(args.device), variant=args.variant,
                                          image_size=args.image_size)
    report = evaluate(
        models if len(models) > 1 else models[0],
        num_images=args.num_images,
        reference=args.reference,
        features=args.features,
        teacher_steps=args.teacher_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        json=args.json,
        teacher_rows=not args.no_teacher,
        solver=args.solver,
        pipeline_steps=args.pipeline_steps,
        guidance_scale=args.guidance_scale,
        device=_device(args.device),
        weights=args.weights,
        prompts=args.prompts,
        more_metrics=args.more_metrics,
        scorers=args.scorers,
        fresh=args.fresh,
        html=args.html,
        protocol=args.protocol,
    )
    if _is_main():
        print(report)
    return 0


def _export(args: argparse.Namespace) -> int:
    import shutil

    from flowdistill.utils.files import check_place, local_path

    target = local_path(args.out_dir)
    check_place(target)
    if target.is_symlink():
        target = target.resolve()  # the pipeline goes where the link leads
    occupied = target.is_dir() and any(target.iterdir()) or target.exists() and not target.is_dir()
    if occupied and not args.overwrite:
        raise UserError(f"{target} exists and is not empty; choose a new folder or add --overwrite")
    from flowdistill.export import export
    from flowdistill.export.card_data import add_export
    from flowdistill.export.overwriting import check_overwritable
    from flowdistill.students import load_student
    from flowdistill.utils.files import check_writable
    from flowdistill.utils.text import read_json_object

    if occupied:
        check_overwritable(target, args.run_folder)
    check_writable(target / "model_index.json")
    student = load_student(args.run_folder)
    # Beside the target, so that an older pipeline stays until the new one is complete.
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        export(student, partial, guidance_scale=args.guidance_scale, steps=args.steps)
        add_export(partial, args.run_folder, student, args.guidance_scale, args.steps)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if (target / "manifest.json").is_file():
        each = "student" if "partition" in read_json_object(target / "manifest.json") else "class"
        print(f"{target}: a diffusers pipeline for each {each}; manifest.json says which conditions are whose.\n"
              "Its first one:\n")
        target = min(folder for folder in target.iterdir() if folder.is_dir())
    else:
        print(f"{target}: a diffusers pipeline\n")
    print(_usage(target))
    print("# README.md is its model card; to upload both: flowdistill push "
          f"{shlex.quote(str(local_path(args.out_dir)))} owner/name")
    return 0


def _usage(pipeline: Path) -> str:
    """The lines of Python by which the card of an exported pipeline loads and calls it, for the folder it is in."""
    from flowdistill.utils.text import read_text

    code = read_text(pipeline / "README.md").split("```python\n")[1].split("```")[0]
    # JSON's texts are Python's, with the quotes that the card has.
    return re.sub('"path/to/this/folder(/[^"]*)?"', lambda found: json.dumps(f"{pipeline}{found[1] or ''}"),
                  code).strip()


def _push(args: argparse.Namespace) -> int:
    from flowdistill.export.hub import push

    push(args.folder, args.repository, args.private, args.revision, args.message, args.dry_run)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from flowdistill.students import describe, exported_student, is_student_folder, load_student
    from flowdistill.utils.files import local_path

    is_run = (local_path(args.model) / "config.yaml").is_file()
    of_pipelines = ("null_label", "variant", "sample", "prompt", "guidance_scale")
    if args.sample is None and (args.prompt is not None or args.guidance_scale is not None):
        raise UserError("--prompt and --guidance-scale are for the picture that --sample FILE.png draws")
    if is_run or is_student_folder(args.model):
        _only_for_pipelines(args, *of_pipelines)
        if not is_run:
            print(describe(load_student(args.model)))
            return 0
        from flowdistill.training.run import describe_run

        print(describe_run(args.model))
        return 0
    if (student := exported_student(args.model)) is not None:
        _only_for_pipelines(args, *of_pipelines)
        print(describe(student))
        return 0
    from flowdistill.teachers import load_teacher
    from flowdistill.utils.files import check_writable

    if args.sample is not None:
        if local_path(args.sample).suffix.lower() != ".png":
            raise UserError(f"--sample {args.sample} must be a .png file")
        check_writable(args.sample)
        from flowdistill.evaluation.comparison import check_prompts, save_teacher_calls
        from flowdistill.plan.meta_teacher import takes_prompts

        check_prompts(args.prompt, takes_prompts(args.model, args.variant), args.model)
    teacher = load_teacher(args.model, null_label=args.null_label, variant=args.variant)
    print(teacher.describe(), flush=True)
    if args.sample is not None:
        scale = 1.0 if args.guidance_scale is None else args.guidance_scale
        lines = save_teacher_calls(teacher.to(_device(None)), args.sample, args.prompt, scale)
        print(f"\n{args.sample}", *lines, sep="\n  ")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from flowdistill.plan.report import report

    for part in report(args.config, args.overrides, args.gpu_memory, args.cards or ()):
        print(part, flush=True)
    return 0


def _cache(args: argparse.Namespace) -> int:
    from flowdistill.plan.caching import cache_inputs

    said = cache_inputs(args.config, args.overrides)
    if _is_main():
        print(*said, sep="\n")
    return 0


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _is_main() -> bool:
    """Whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


# --- the arguments


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="flowdistill", description="Distil a diffusers pipeline into a one-step generator.")
    parser.add_argument("--version", action="version", version=f"flowdistill {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    commands.type = str  # what follows a command is for the command's own parser to read

    def command(
        name: str, run: Callable[[argparse.Namespace], int], target: object, help: str, description: str,
        examples: Sequence[str],
    ) -> Parser:
        epilog = "examples:\n" + "\n".join(f"  flowdistill {name} {example}" for example in examples)
        form = argparse.RawDescriptionHelpFormatter
        added = commands.add_parser(name, help=help, description=description, epilog=epilog, formatter_class=form)
        added.set_defaults(run=run, target=target)
        return added

    distill = command(
        "distill", _distill, _output_dir, "train a student",
        "Train the student that a YAML file describes. When its output_dir already holds the run, training goes on\n"
        "there. Works under 'accelerate launch -m flowdistill distill ...' on several GPUs.",
        ["configs/digits/freeflow.yaml", "configs/digits/freeflow.yaml train.steps=500 output_dir=runs/short"],
    )
    distill.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    distill.add_argument("overrides", metavar=SETTING, nargs="*", help="settings that replace the file's")

    plan = command(
        "plan", _plan, lambda args: args.config, "say how much memory a run takes",
        "Count the memory of a run's weights, gradients, optimiser and average for one process, and estimate that of\n"
        "activations, from the pipeline's configurations alone. With --gpu-memory, say which settings make it fit.",
        ["configs/sd15/dmd2.yaml --gpu-memory 24", "configs/sdxl/dmd2_4step.yaml --cards 12,16,24,48,80",
         "configs/digits/freeflow.yaml train.batch_size=256"],
    )
    plan.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    plan.add_argument("overrides", metavar=SETTING, nargs="*", help="settings that replace the file's")
    plan.add_argument("--gpu-memory", metavar="GIB", type=positive, help="memory of the GPU in GiB")
    plan.add_argument("--cards", metavar="GIB,GIB,...", type=positives,
                      help="memory of GPUs of several sizes, such as 12,16,24,48,80: for each what makes the run fit "
                           "on one or, with FSDP2, on up to 8 of them")

    cache = command(
        "cache", _cache, lambda args: args.config, "encode the prompts and images of a run beforehand",
        "Encode the list of prompts (teacher.prompts) and the images that the method names, with their captions, as\n"
        "the run would, without loading its network, and keep them where the run looks for them. What an earlier\n"
        "call has encoded stays, also of one that was killed. The processes of\n"
        "'accelerate launch -m flowdistill cache ...' share the work.",
        ["configs/sdxl/dmd2_4step.yaml teacher.prompt_cache=disk"],
    )
    cache.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    cache.add_argument("overrides", metavar=SETTING, nargs="*", help="settings that replace the file's")

    sample = command(
        "sample", _sample, lambda args: args.out, "generate images",
        "Generate images with a student (one network call each) or with a pipeline. Image i depends on the seed,\n"
        "i and its label only.",
        ["runs/digits-freeflow --num-images 100 --out grid.png", "runs/digits-freeflow --num-images 5000 --out images/",
         "runs/digits-freeflow --labels 3,7,9 --out grid.png",
         "runs/my-run --suite geneval --prompts evaluation_metadata.jsonl --out geneval/",
         "assets/digits-flow --steps 10 --num-images 30 --out grid.png"],
    )
    sample.add_argument("model", metavar="RUN_OR_MODEL", help="run, student folder or pipeline (folder, hub id)")
    sample.add_argument("--num-images", metavar="N", type=at_least(1),
                        help="images to make (default: one for each label or prompt)")
    sample.add_argument("--out", metavar="PATH", required=True,
                        help="a .png file for one grid, or a folder without pictures")
    what = sample.add_mutually_exclusive_group()
    what.add_argument("--labels", metavar="0,1,2", type=integers(0), help="labels to cycle through (default: all)")
    what.add_argument("--prompt", metavar="TEXT", type=str, action="append",
                      help="text-to-image models; may come several times")
    what.add_argument("--prompts", metavar="FILE", help="the same from a file: a prompt a line, or .jsonl")
    sample.add_argument("--suite", choices=("geneval", "dpg", "hps", "drawbench"),
                        help="the images of a benchmark, as its program reads them in the folder --out; --prompts is "
                             "the benchmark's own file or folder. The same command goes on where it was stopped")
    sample.add_argument("--seed", type=seed_number(), default=0, help="seed of the noise (default: 0)")
    sample.add_argument("--steps", metavar="N", type=at_least(1, MOST_CALLS),
                        help="steps of a pipeline (default: 50), or calls of a student (default: all it has)")
    sample.add_argument("--guidance-scale", metavar="G", type=guidance, help="default: the student's own, or 1")
    sample.add_argument("--batch-size", metavar="N", type=at_least(1), default=64, help="images a call (default: 64)")
    sample.add_argument("--variant", metavar="NAME", help=VARIANT)
    sample.add_argument("--image-size", metavar="PIXELS", type=image_size, help=IMAGE_SIZE)
    sample.add_argument("--device", help="default: the GPU when there is one")

    evaluate = command(
        "evaluate", _evaluate, lambda args: args.json or args.html or args.model[0], "measure FID and speed",
        "Measure a student at one call and its teacher at several step counts: FID, KID, accuracy and images/s. What\n"
        "is not given comes from the run's own configuration. The processes of 'accelerate launch' share the work.\n"
        "Several runs, students, pipelines and folders of images are compared in one table.",
        ["runs/digits-freeflow --json report.json",
         "assets/digits-flow --features digits --reference digits --teacher-steps 1,4,50",
         "runs/my-run --features inception --weights inception.pt --reference images/",
         "runs/my-run --protocol imagenet-adm --reference VIRTUAL_imagenet256_labeled.npz",
         "runs/one runs/two images/ --json comparison.json --html comparison.html"],
    )
    evaluate.add_argument("model", metavar="RUN_OR_MODEL", nargs="+",
                          help="run, student folder or pipeline (folder, hub id); of several also folders of images")
    evaluate.add_argument("--protocol", metavar="NAME",
                          help="as papers measure: coco30k-256, coco10k-512 or imagenet-adm, with --reference and, of "
                               "the first two, --prompts; none: without the run's own (default: the run's)")
    evaluate.add_argument("--num-images", metavar="N", type=at_least(2), help="images of each model (default: 10000)")
    evaluate.add_argument("--reference", metavar="NAME|DIR|FILE.npz",
                          help="real images; or teacher, its own samples (default: the run's)")
    evaluate.add_argument("--features", metavar="NAME|PATH",
                          help=f"feature extractor: {', '.join(FEATURES)} or a path; dinov2 and clip also with a "
                               "folder or hub id behind a colon (default: the run's)")
    evaluate.add_argument("--weights", metavar="FILE",
                          help="local weights of the feature extractors 'inception' and 'inception-legacy'")
    evaluate.add_argument("--teacher-steps", metavar="1,2,4", type=integers(1, MOST_CALLS),
                          help="default: 1,2,4,10,50")
    evaluate.add_argument("--no-teacher", action="store_true", help="measure the student only")
    evaluate.add_argument("--solver", choices=("euler", "heun", "edm_heun"),
                          help="the teacher's ODE solver; heun averages velocities in t, edm_heun in sigma, as EDM's "
                               "own (default: euler)")
    evaluate.add_argument("--pipeline-steps", metavar="50,1000", type=integers(1, MOST_CALLS),
                          help="also measure the pipeline's own scheduler, with the noise that it adds (default: none)")
    evaluate.add_argument("--prompts", metavar="FILE", help="text to image: prompts to go through (default: the run's)")
    evaluate.add_argument("--guidance-scale", metavar="G", type=guidance, help="default: the run's or student's own")
    evaluate.add_argument("--seed", type=seed_number(), default=0, help="seed of the noise (default: 0)")
    evaluate.add_argument("--batch-size", metavar="N", type=at_least(1), help="images a call (default: 250)")
    evaluate.add_argument("--more-metrics", metavar="NAME,NAME", type=texts,
                          help="measured only when asked for: density_coverage, diversity, frechet_at_infinity and "
                               "paired_distance (default: the run's)")
    evaluate.add_argument("--scorers", metavar="NAME:PATH,...", type=texts,
                          help=f"text to image: how well images fit their prompts, by {', '.join(SCORERS)}, each with "
                               "a folder or hub id behind a colon (default: the run's)")
    evaluate.add_argument("--fresh", action="store_true", help="measure the teacher again, though its rows are known")
    evaluate.add_argument("--variant", metavar="NAME", help=VARIANT)
    evaluate.add_argument("--image-size", metavar="PIXELS", type=image_size, help=IMAGE_SIZE)
    evaluate.add_argument("--device", help="default: the GPU when there is one")
    evaluate.add_argument("--json", metavar="FILE", help="also write the report there")
    evaluate.add_argument("--html", metavar="FILE", help="also write a page with the table, a figure and images there")

    export = command(
        "export", _export, lambda args: args.out_dir, "write a stock diffusers pipeline",
        "Write a student as a pipeline folder that DiffusionPipeline.from_pretrained loads without flowdistill.",
        ["runs/digits-freeflow exported/", "runs/my-run exported/ --guidance-scale 1.5 --overwrite",
         "runs/digits-flow-map-matching exported/ --steps 4"],
    )
    export.add_argument("run_folder", metavar="RUN", help="run folder or student folder")
    export.add_argument("out_dir", metavar="OUT_DIR", help="new folder")
    export.add_argument("--guidance-scale", metavar="G", type=guidance, help="to fix (default: the student's own)")
    export.add_argument("--steps", metavar="N", type=at_least(1, MOST_CALLS),
                        help="calls of the pipeline, of a flow map between any times (default: all that it has)")
    export.add_argument("--overwrite", action="store_true", help="replace an export that is already there")

    push = command(
        "push", _push, lambda args: args.folder, "upload an exported pipeline or a student to the Hugging Face hub",
        "Show what is in an exported pipeline, or in a run's student, and upload it with its model card. What is no\n"
        "part of it is refused. After an interruption the same command goes on: what is there is not sent again.",
        ["exported/ me/one-step-digits --dry-run", "exported/ me/one-step-digits --private",
         "runs/my-run me/my-student --revision v2 --message 'Train for longer'"],
    )
    push.add_argument("folder", metavar="EXPORT", help="folder of an export, or run or student folder")
    push.add_argument("repository", metavar="OWNER/NAME", help="of a model on the hub; created where it is new")
    push.add_argument("--private", action="store_true", help="nobody else sees it; refuses a repository that is public")
    push.add_argument("--revision", metavar="BRANCH", help="created where it is new (default: main)")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument("--dry-run", action="store_true", help="check and show what would be uploaded, and stop")

    inspect = command(
        "inspect", _inspect, lambda args: args.model, "say what was detected in a pipeline, a run or a student",
        "Say in words how flowdistill reads a pipeline: backbone, path, prediction, times, conditions, and whether\n"
        "network and scheduler agree. Of a run: how far it is, and what its student takes.",
        ["assets/digits-flow", "google/ddpm-cifar10-32", "runs/digits-freeflow",
         "assets/digits-flow --sample grid.png"],
    )
    inspect.add_argument("model", metavar="MODEL", help="pipeline (folder, hub id), run or student folder")
    inspect.add_argument("--null-label", metavar="K", type=at_least(0), help="label that means 'no class'")
    inspect.add_argument("--variant", metavar="NAME", help=VARIANT)
    inspect.add_argument("--sample", metavar="FILE.png",
                         help="draw a pipeline at 1, 4 and 50 calls there, beside its own call of 50 steps")
    inspect.add_argument("--prompt", metavar="TEXT", type=str, action="append",
                         help="of that picture; may come several times")
    inspect.add_argument("--guidance-scale", metavar="G", type=guidance, help="of that picture (default: 1)")

    for module in (starting, settings, tables, looking, environment, completion):
        module.add(command)
    return parser
