"""The picture at the end of a run."""

import numpy as np
from PIL import Image

from flowdistill.data.assets import asset_path
from flowdistill.evaluation.comparison import save_comparison
from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import load_teacher


def test_blocks_start_from_the_same_noise(tmp_path):
    """An untrained student is the teacher's single Euler step, so the last two blocks are equal."""
    teacher = load_teacher(asset_path("digits-flow"))
    student = FlowMap.from_teacher(teacher, StudentInfo())
    save_comparison(teacher, student, tmp_path / "c.png", teacher_steps=(4, 1), rows_each=2, columns=5)
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("L")).astype(int)
    cell = 32 + 2  # 8x8 digits are drawn at 32 pixels, 2 between them
    assert pixels.shape[1] == 5 * cell + 2 and pixels.shape[0] % 3 == 0
    parts = np.split(pixels, 3)
    titles, blocks = zip(*((part[: -2 * cell - 2], part[-2 * cell - 2 :]) for part in parts), strict=True)
    assert (blocks[1] == blocks[2]).all()
    assert np.abs(blocks[0] - blocks[1]).mean() > 5
    # Black letters on white; "teacher, 4 calls", "teacher, 1 call" and "student, 1 call" are three different texts.
    assert all((title == 255).mean() > 0.5 and title.min() < 64 for title in titles)
    assert all((titles[a] != titles[b]).any() for a, b in ((0, 1), (1, 2), (0, 2)))
