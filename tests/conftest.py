"""What all tests share: no network, no window, and the command line as a function."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).parent
# Before anything imports the libraries that read them. Nothing in the tests may download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads would stand in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")


LONG = (
    "training/test_sharded.py", "test_clusters.py", "teachers/test_families.py", "plan/test_plan.py",
    "teachers/test_teacher_lora.py", "test_shipped_configs.py", "training/test_processes.py",
    "scripts/test_experiment.py", "networks/test_lora.py", "export/test_few_step_pipelines.py",
    "methods/msd/test_msd.py", "methods/test_disback.py", "test_readme.py", "methods/test_score_distillation.py",
    "paths/test_scheduler_options.py", "test_wheel.py", "methods/test_consistency.py",
    "methods/test_flow_map_matching.py", "test_image_sizes.py", "methods/echodistill/test_echodistill.py",
    "evaluation/test_kept_rows.py", "training/test_stopping.py", "evaluation/test_shipped_rows.py",
    "test_other_device.py", "test_notebooks.py", "test_example_package.py",
)
"""Files that take longest. They come first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(FOLDER).as_posix()
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the tests have imported is there to stay: looking through it for garbage takes a quarter of a second. So do
    the tests' own objects, which are many and short-lived."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Reference statistics are computed afresh, and nothing stays in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A process that is killed loses nothing that it wrote. A machine that stops does, and it ends the tests too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_pictures() -> Iterator[int]:
    """The picture at the end of a run has the teacher at 3 calls. At as many as it has outside the tests, the value, it
    takes longer than a test's training."""
    from flowdistill.evaluation import comparison

    calls = comparison.TEACHER_STEPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "TEACHER_STEPS", 3)
        yield calls


LARGER = (
    "data/test_data.py", "data/test_shapes.py", "evaluation/test_compare.py", "evaluation/test_demo.py",
    "evaluation/test_features.py", "evaluation/test_kept_rows.py", "evaluation/test_protocols.py",
    "evaluation/test_report.py", "evaluation/test_shipped_rows.py", "features/test_named.py",
    "scripts/test_emoji_teacher.py", "scripts/test_evaluate_fid.py", "scripts/test_experiment.py",
    "scripts/test_fashion_classifier.py", "scripts/test_fashion_teacher.py", "scripts/test_shapes_autoencoder.py",
    "test_example_package.py", "test_notebooks.py", "test_readme.py", "training/test_comparison.py",
    "training/test_run_page.py",
)
"""Files whose networks are those that are shipped, Inception's, or as large."""


@pytest.fixture(scope="module", autouse=True)
def quick_networks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny networks take four fifths of their time; see ``quicken`` for what is another then."""
    from tests.quick import quicken

    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr, without_onednn=request.path.relative_to(FOLDER).as_posix() not in LARGER)
        yield


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``cli("distill", "a.yaml")``: the command in this process, with its exit code and what it printed."""
    from flowdistill.cli.commands import main

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code: int | str | None
        try:
            code = main(_texts(arguments))
        except SystemExit as stop:  # argparse: --help, or arguments that do not fit
            code = stop.code
        assert isinstance(code, int)
        return Outcome(code, *capsys.readouterr())

    return run


def _texts(arguments: Sequence[object]) -> list[str]:
    return [str(argument) for argument in arguments]
