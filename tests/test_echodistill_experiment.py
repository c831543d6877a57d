"""The experiment that compares EchoDistill with simpler ways: its settings and its table."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from flowdistill.config import load_config
from flowdistill.data import shapes
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept, held_out_prompts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("echodistill_experiment", ROOT / "scripts/echodistill_experiment.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("concept", CONCEPTS)
def test_every_case_is_a_valid_configuration(script, concept, monkeypatch):
    monkeypatch.chdir(ROOT)
    case = script.Case(concept, 3, Path("runs/x"), ["train.steps=7"])
    config = load_config(script.CONFIG, case.overrides("echo"))
    method, word = config.method, CONCEPTS[concept].word
    assert (config.seed, config.train.steps, config.output_dir) == (3, 7, f"runs/x/{concept}-3-echo")
    assert method.instance_prompt == f"a <new1> {word}" and method.initializer_token == word
    assert Path(method.instance_data_dir).is_dir()
    assert all(word in prompt for prompt in [*method.validation_prompts, *method.student_prompts])
    assert len(method.student_prompts) == 1 + len(shapes.BACKGROUNDS)


def test_the_figures_know_the_concept_its_place_and_old_prompts(script):
    """A perfect painter, and one who forgets the background."""
    places = dict(held_out_prompts("<new1> star"))

    def paint(prompts, forgetful):
        images = []
        for i, prompt in enumerate(prompts):
            if "<new1>" not in prompt:
                images.append(shapes.draw_shapes(torch.tensor([shapes.class_of(prompt)]), i))
            else:
                background = "white" if forgetful else places.get(prompt, "white")
                images.append(draw_concept("striped-star", [background], i))
        return torch.cat(images)

    perfect = script.measure(lambda prompts, seed: paint(prompts, False), "striped-star", "<new1> star", share=4)
    assert all(value > 0.9 for value in perfect.values()), perfect
    forgetful = script.measure(lambda prompts, seed: paint(prompts, True), "striped-star", "<new1> star", share=4)
    assert forgetful["alone"] > 0.9 and forgetful["in_context"] < 0.1 and forgetful["background"] < 0.1


def test_the_table_has_mean_and_range(script):
    each = {"alone": 1.0, "in_context": 0.5, "background": 0.25, "old_prompts": 0.0, "likeness": 0.9}
    lines = [{"model": "a", **each}, {"model": "a", **{key: value / 2 for key, value in each.items()}},
             {"model": "b", **each}]
    rows = script.table(lines).splitlines()
    assert rows[2] == ("| a | 2 | 75 % (50 to 100) | 38 % (25 to 50) | 19 % (12 to 25) | 0 % (0 to 0) | "
                       "0.68 (0.45 to 0.90) |")
    assert rows[3] == "| b | 1 | 100 % | 50 % | 25 % | 0 % | 0.90 |"
