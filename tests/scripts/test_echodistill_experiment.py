"""The experiment that compares EchoDistill with simpler ways: its settings and its table."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowdistill.config import load_config
from flowdistill.data import shapes
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept, held_out_prompts
from flowdistill.features.shapes_networks import load_shapes_classifier
from flowdistill.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


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
    likeness, variety, strict = (perfect.pop(name) for name in ("likeness", "variety", "strict"))
    assert (strict["alone"], strict["in_context"]) == (1.0, 1.0) and strict["distance"] < 0.2 and strict["blur"] == 0
    assert 0.4 < strict["position"] < 1.6 and 0.4 < strict["size"] < 1.6
    assert 0.7 < variety < 1.3
    assert all(value > 0.9 for value in perfect.values()), perfect
    plain = script.measure(lambda prompts, seed: paint(["a red star on a white background"] * len(prompts), False),
                           "striped-star", "<new1> star", share=4)
    assert likeness > 0.5 and plain["likeness"] < 0.4 and plain["alone"] < 0.1 and plain["strict"]["alone"] == 0
    forgetful = script.measure(lambda prompts, seed: paint(prompts, True), "striped-star", "<new1> star", share=4)
    assert forgetful["alone"] > 0.9 and forgetful["in_context"] < 0.1 and forgetful["background"] < 0.1
    assert forgetful["strict"]["alone"] == 1 and forgetful["strict"]["in_context"] == 0


def test_the_strict_table_has_what_was_measured(script):
    strict = {column: 0.5 for column, _, _ in script.STRICT_COLUMNS}
    lines = [{"model": "old"}, {"model": "a", "strict": strict},
             {"model": "a", "strict": {column: 0.25 for column in strict} | {"size": None}},
             {"model": "b", "strict": strict | {"size": None}}]
    rows = script.strict_table(lines).splitlines()
    assert len(rows) == 4 and rows[0].count("|") == rows[1].count("|") == rows[2].count("|")
    assert rows[2].startswith("| a | 2 | 38% (25% to 50%) | 38% (25% to 50%) | 0.4 (0.2 to 0.5) |")
    assert rows[2].endswith("| 0.38 (0.25 to 0.50) | 0.50 |") and rows[3].endswith("| 0.50 | - |")


def test_the_ceiling_is_drawn_as_the_prompts_say(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    (name, sample), = script.ceiling(script.Case("halved-heart", 0, Path("runs/x"), [])).items()
    assert name == "drawn, through the autoencoder"
    prompts = ["a <new1> heart on a cyan background", "a <new1> heart", "a red star on a white background"]
    images = sample(prompts, 3)
    assert images.shape == (3, 3, 32, 32)
    judged = script.judge_concept(images[:2], "halved-heart", ["cyan", None])
    assert judged.passed["pattern"].all() and judged.passed["background"].all()
    assert load_shapes_classifier()(images[2:]).argmax(1).item() == shapes.class_of(prompts[2])


def test_the_table_has_mean_and_range(script):
    each = {"alone": 1.0, "in_context": 0.5, "background": 0.25, "old_prompts": 0.0, "likeness": 0.9, "variety": 0.5}
    lines = [{"model": "a", **each}, {"model": "a", **{key: value / 2 for key, value in each.items()}},
             {"model": "b", **each}]
    rows = script.table(lines).splitlines()
    assert rows[2] == ("| a | 2 | 75 % (50 to 100) | 38 % (25 to 50) | 19 % (12 to 25) | 0 % (0 to 0) | "
                       "0.68 (0.45 to 0.90) | 0.38 (0.25 to 0.50) |")
    assert rows[3] == "| b | 1 | 100 % | 50 % | 25 % | 0 % | 0.90 | 0.50 |"


def test_the_ablation_is_beside_the_whole_method_in_its_own_cases(script, tmp_path, capsys, monkeypatch):
    figures = {"alone": 1.0, "in_context": 0.5, "background": 0.25, "old_prompts": 0.0, "likeness": 0.9, "variety": 0.5}
    models = [("no_echo", "EchoDistill, no echo"), ("no_echo", "EchoDistill, no echo: teacher"), ("echo", "EchoD")]
    lines = [{"model": model, "key": key, "concept": "striped-star", "seed": seed, **figures}
             for key, model in models for seed in range(2)]
    lines.append({"model": "no prior", "key": "no_prior", "concept": "striped-star", "seed": 1, **figures})
    parts = script.compared(lines)
    assert parts["echodistill"] == lines[:-1]
    assert parts["echodistill_ablation"] == [lines[1], lines[-1]]
    kept = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "results.jsonl").write_text(kept + '{"model": "cut sho')
    page = tmp_path / "page.md"
    names = ("echodistill", "echodistill_ablation")
    page.write_text("".join(f"<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in names))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    assert script.main(["--out", str(tmp_path), "--table", "--write-docs", str(page)]) == 0
    assert "| no prior | 1 | 100 % |" in page.read_text() and "| EchoD | 2 | 100 % (100 to 100) |" in page.read_text()
    assert script.main(["--out", str(tmp_path), "--table", "--write-docs", str(tmp_path / "none.md")]) == 2
    assert "none.md does not exist" in capsys.readouterr().err


def test_a_run_that_was_cut_short_goes_on_with_what_is_missing(script, tmp_path, monkeypatch):
    """Killed between the two models of one key: both are measured again."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    made, fail = [], [True]

    def measure(sample, *rest):
        if sample == "teacher" and fail:
            raise KeyboardInterrupt
        made.append(sample)
        return {"alone": 1.0, "in_context": 1.0, "background": 1.0, "old_prompts": 1.0, "likeness": 1.0, "variety": 1.0}

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "show", lambda *rest: None)
    monkeypatch.setitem(script.MODELS, "before", lambda case: {"student": "student", "teacher": "teacher"})
    monkeypatch.setitem(script.MODELS, "word", lambda case: {"word": "word"})
    arguments = ["--out", str(tmp_path / "out"), "--concepts", "ring-circle", "--models", "word", "before"]
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments)
    fail.clear()
    assert script.main(arguments) == 0 and made == ["word", "student", "student", "teacher"]
    assert script.main(arguments) == 0 and len(made) == 4


def test_a_row_of_pictures_shows_every_held_out_place(script, tmp_path):
    asked = []

    def paint(prompts, seed):
        asked.extend(prompts)
        return torch.rand(len(prompts), 3, 32, 32)

    script.show(paint, "<new1> star", tmp_path / "row.png")
    assert asked[:2] == ["a <new1> star"] * 2 and asked[2:] == [text for text, _ in held_out_prompts("<new1> star")]
    assert (tmp_path / "row.png").is_file()


def test_the_picture_has_a_row_a_model_and_a_column_a_case(script, tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        for model in ("a", "b"):
            script.show(lambda prompts, seed: torch.rand(len(prompts), 3, 32, 32), "star", folder / f"{model}.png")
    script.picture(folders, ["a", "b"], tmp_path / "all.png")
    row = Image.open(folders[0] / "a.png")
    assert Image.open(tmp_path / "all.png").size == (2 * row.width, 2 * row.height)
    with pytest.raises(UserError, match=r"c\.png has not been made"):
        script.picture(folders, ["a", "c"], tmp_path / "all.png")
