"""``scripts/ring_benchmark.py``: its ring, its distance, its network, and a whole small comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from flowdistill.teachers import Teacher

ROOT = Path(__file__).resolve().parents[2]
FILE = """name: tiny
base: configs/ring/disback.yaml
seeds: [0, 1]
overrides: [train.steps=6, train.batch_size=8,
  method.degradation_steps=2, method.degradation_every=1, "method.interval=[2]"]
runs: {even_disback: [], even_host: [method.degradation_steps=0], exact_disback: [teacher.source=exact]}
curve: {num_images: 64, every: 3}
"""


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    """The script runs where the configuration's path holds, and finds the others as scripts do."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_sliced_distance_of_a_shift_and_of_a_scale():
    from ring_benchmark import ring_samples, sliced_w2

    x = ring_samples(4000, torch.Generator().manual_seed(0))
    assert sliced_w2(x, x[torch.randperm(len(x))]) == 0
    assert sliced_w2(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(0.5 / math.sqrt(2), rel=1e-4)
    # Sorted projections of x and 2 x differ by the projections themselves: the root mean square over both axes.
    assert sliced_w2(x, 2 * x) == pytest.approx(float(x.square().mean().sqrt()), rel=1e-3)


def test_the_exact_teacher_samples_the_ring():
    from ring_benchmark import figures_of, ring_path, ring_samples, ring_velocity

    teacher = Teacher(ring_velocity(), ring_path(), (2,))
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    found = figures_of(teacher.sample(noise, steps=30, solver="heun"))
    assert found["sw2"] < 0.03 and found["on_modes"] > 0.99 and found["modes"] == 8
    assert figures_of(0.01 * noise)["on_modes"] == 0
    half = ring_samples(4000, torch.Generator().manual_seed(2))[::2]  # every other mode
    assert figures_of(half)["modes"] == 4


def test_the_network_has_edms_preconditioning():
    """Without its last layer D = sigma_data^2 / (sigma^2 + sigma_data^2) x: Karras et al. 2022, Table 1."""
    from ring_benchmark import RingNetwork, ring_path

    network = RingNetwork()
    for parameter in network.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    sigma, native = torch.tensor([0.1, 1.0, 10.0]), torch.randn(3, 2)
    time = sigma / (1 + sigma)
    denoised = Teacher(network, ring_path(), (2,)).denoise(native / (1 + sigma[:, None]), time)
    assert torch.allclose(denoised, native * (0.25 / (0.25 + sigma**2))[:, None], atol=1e-5)


def test_a_small_comparison(tmp_path, monkeypatch, capsys):
    import ring_benchmark

    monkeypatch.setattr(ring_benchmark, "TEACHER_STEPS", 5)
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(FILE)
    page = tmp_path / "page.md"
    page.write_text("<!-- table:tiny -->\n<!-- /table:tiny -->\n")
    command = [str(file), "--out", str(out)]
    assert ring_benchmark.main([*command, "--seed", "1", "--only", "even_host", "exact_disback"]) == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(line["label"], line["seed"]) for line in lines] == [("even_host", 1), ("exact_disback", 1)]
    for line in lines:
        assert [point["step"] for point in line["curve"]] == [0, 3, 6]
        assert 0 < line["curve"][1]["seconds"] < line["curve"][2]["seconds"]
    assert lines[0]["curve"][0]["sw2"] == lines[1]["curve"][0]["sw2"] != lines[0]["curve"][2]["sw2"]
    assert sorted(path.name for path in (out / "exact_disback" / "seed-1" / "path").iterdir()) == [
        "node-001.safetensors", "node-002.safetensors"]  # fmt: skip

    with monkeypatch.context() as patch:  # a signal during a run: nothing of it counts
        patch.setattr("flowdistill.training.signals.Interrupts.agreed", lambda *arguments: 15)
        assert ring_benchmark.main(command) == 130
    assert len((out / "results.jsonl").read_text().splitlines()) == 2

    assert ring_benchmark.main([*command, "--write-docs", str(page)]) == 0
    again = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert again[:2] == lines and len(again) == 6
    text = page.read_text()
    assert "| teacher, exact, 99 calls |" in text and text.count("| even_host |") == 1 and "seeds 0, 1:" in text
    assert (out / "table.md").read_text() in text and (out / "figure.png").stat().st_size > 10_000
    capsys.readouterr()
    assert ring_benchmark.main([*command, "--only", "host"]) == 2
    assert "--only host: the runs are even_disback" in capsys.readouterr().err
    file.write_text(FILE.replace("=exact", "=ring"))
    assert ring_benchmark.main(command) == 2
    assert "teacher.source learned or exact" in capsys.readouterr().err
