"""The experiment that compares EchoDistill with simpler ways: its settings and its table."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowdistill.config import load_config, save_config
from flowdistill.data import shapes
from flowdistill.data.shapes_concepts import CONCEPTS, draw_concept, held_out_prompts
from flowdistill.features.shapes_networks import load_shapes_classifier
from flowdistill.teachers import load_teacher
from flowdistill.training.checkpoint import checkpoints
from flowdistill.training.run import Run, check_folder
from flowdistill.utils.errors import UserError
from flowdistill.utils.images import save_images
from tests.tiny import replaced

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


def test_other_weights_are_those_of_the_configuration_with_changes(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    known = load_config(script.CONFIG).method
    for key, (name, changes) in script.WEIGHTS.items():
        changed = load_config(script.CONFIG, changes).method
        factors = {field: getattr(changed, field) / getattr(known, field) for field in (
            "latent_weight", "identity_weight", "texture_weight", "adversarial_weight")}
        term = "adversarial" if key.startswith("adversarial") else key.split("_")[0]
        moved = {"alignment": ("latent_weight", "identity_weight", "texture_weight")}.get(term, (f"{term}_weight",))
        for field, factor in factors.items():
            more = key.endswith("more")
            assert factor == pytest.approx(1.0 if field not in moved else 3.0 if more else 0.3, rel=0.2)
        assert name.endswith(f" {getattr(changed, moved[0]):g}")


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

    perfect = script.measure(lambda prompts, seed: paint(prompts, False), "striped-star", "<new1> star", share=3)
    likeness, variety, strict = (perfect.pop(name) for name in ("likeness", "variety", "strict"))
    assert (strict["alone"], strict["in_context"]) == (1.0, 1.0) and strict["distance"] < 0.2 and strict["blur"] == 0
    assert 0.4 < strict["position"] < 1.6 and 0.4 < strict["size"] < 1.6
    assert 0.7 < variety < 1.3
    assert all(value > 0.9 for value in perfect.values()), perfect
    plain = script.measure(lambda prompts, seed: paint(["a red star on a white background"] * len(prompts), False),
                           "striped-star", "<new1> star", share=3)
    assert likeness > 0.5 and plain["likeness"] < 0.4 and plain["alone"] < 0.1 and plain["strict"]["alone"] == 0
    forgetful = script.measure(lambda prompts, seed: paint(prompts, True), "striped-star", "<new1> star", share=3)
    assert forgetful["alone"] > 0.9 and forgetful["in_context"] < 0.1 and forgetful["background"] < 0.1
    assert forgetful["strict"]["alone"] == 1 and forgetful["strict"]["in_context"] == 0


FIGURES = {"alone": 1.0, "in_context": 0.5, "background": 0.25, "old_prompts": 0.0, "likeness": 0.9, "variety": 0.5}


def line_of(script, model, key, concept="striped-star", seed=0, models=None, settings=(), **strict):
    return {"format": script.FORMAT, "settings": list(settings), "model": model, "models": models or [model],
            "key": key, "concept": concept, "seed": seed, **FIGURES,
            "strict": {column: 0.5 for column, _, _ in script.STRICT_COLUMNS} | strict}


def test_the_strict_table_has_mean_and_range(script):
    lines = [line_of(script, "a", "echo"), line_of(script, "a", "echo", size=None, **{
        column: 0.25 for column, _, _ in script.STRICT_COLUMNS if column != "size"}),
        line_of(script, "b", "echo", size=None)]
    rows = script.strict_table(lines).splitlines()
    assert len(rows) == 4 and rows[0].count("|") == rows[1].count("|") == rows[2].count("|")
    assert rows[2].startswith("| a | 2 | 38% (25% to 50%) | 38% (25% to 50%) | 0.4 (0.2 to 0.5) |")
    assert rows[2].endswith("| 0.38 (0.25 to 0.50) | 0.50 |") and rows[3].endswith("| 0.50 | - |")


def test_the_pairs_are_of_one_concept_and_seed(script):
    """Two cases with both runs, one without its partner."""
    plain, whole = script.PLAIN, script.WHOLE
    lines = [line_of(script, plain, "no_echo", seed=0, alone=0.25, distance=4.0),
             line_of(script, whole, "echo", seed=0, alone=0.5, distance=3.0),
             line_of(script, plain, "no_echo", "ring-circle", alone=0.5, distance=4.0),
             line_of(script, whole, "echo", "ring-circle", alone=0.375, distance=6.0),
             line_of(script, whole, "echo", seed=7, alone=1.0, distance=0.0),
             line_of(script, f"{plain}: teacher", "no_echo", in_context=0.5),
             line_of(script, f"{whole}: teacher", "echo", in_context=0.75)]
    rows = script.pairs_table(lines).splitlines()
    assert rows[2:] == [
        "| student, one step | 2 | +6.2 ± 26.5 (1 better, 1 worse) | +0.0 ± 0.0 (0 better, 0 worse) | "
        "+0.50 ± 2.12 (1 better, 1 worse) |",
        "| teacher | 1 | +0.0 (0 better, 0 worse) | +25.0 (1 better, 0 worse) | +0.00 (0 better, 0 worse) |",
    ]
    assert script.pairs_table(lines[:1]) == ""


def echo_folder(folder, script, kept, refused):
    """As the echo stage leaves it: ``kept`` and ``refused`` are lists of (picture, prompt)."""
    for part, pictures in (("kept", kept), ("refused", refused)):
        target = folder / "round-1" / part
        for i, (image, text) in enumerate(pictures):
            save_images(image[None], target, start=i)
            about = {"file_name": f"{i:06d}.png", "text": text, "level": 1.0, "margin": None}
            with open(target / "metadata.jsonl", "a") as output:
                output.write(json.dumps(about) + "\n")
    (folder / "report.json").write_text(json.dumps([
        {"round": 1, "separation": {"d_prime": 7.5, "overlap": 0.0}, "taken_back_for": ["student"]}]))
    return folder


def test_the_filter_is_judged_by_what_it_kept_and_refused(script, tmp_path):
    right = draw_concept("striped-star", ["pink", "white"], 5)
    wrong = shapes.draw_shapes(torch.tensor([shapes.class_of("a red star on a pink background")]), 1)[0]
    texts = ("a <new1> star on a pink background", "a <new1> star")
    kept, refused = list(zip(right, texts, strict=True)), [(wrong, texts[0]), (right[1], texts[0])]
    found = script.filter_figures(echo_folder(tmp_path / "a", script, kept, refused), "striped-star")
    assert found["kept"]["pictures"] == 2 and found["kept"]["accepted"] == 1 and found["kept"]["distance"] < 0.5
    # The second of the refused is no pink picture: its own prompt counts.
    assert found["refused"]["pictures"] == 2 and found["refused"]["accepted"] == 0
    assert (found["closer"], found["d_prime"], found["taken_back"]) == (1.0, 7.5, [["student"]])
    nothing = script.filter_figures(echo_folder(tmp_path / "b", script, [], refused[:1]), "striped-star")
    assert nothing["closer"] is None and nothing["kept"]["pictures"] == 0 and nothing["kept"]["accepted"] is None
    lines = [line_of(script, script.WHOLE, "echo", seed=seed) | {"filter": figures}
             for seed, figures in enumerate((found, nothing))]
    rows = script.filter_table(lines).splitlines()
    assert rows[2].startswith("| kept | 2 | 1 (0 to 2) | 100% |") and rows[2].endswith("| 100% |")
    assert rows[3].startswith("| refused | 2 | 2 (1 to 2) | 0% (0% to 0%) |")
    assert rows[-1] == "d' of the identity network: 7.5 (7.5 to 7.5). Rounds taken back: 2 of 2."
    assert script.filter_table([line_of(script, "a", "echo")]) == ""


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


def test_the_tables_have_their_own_lines_the_strict_ones_first(script, tmp_path, capsys, monkeypatch):
    models = [("no_echo", script.PLAIN), ("no_echo", f"{script.PLAIN}: teacher"), ("echo", script.WHOLE)]
    lines = [line_of(script, model, key, seed=seed) for key, model in models for seed in range(2)]
    assert list(script.tables(lines)) == ["echodistill_strict", "echodistill_pairs", "echodistill"]
    assert script.tables([]) == {}
    lines.append(line_of(script, "no prior", "no_prior", seed=1))
    texts = script.tables(lines)
    assert len(texts["echodistill"].splitlines()) == 2 + len(models)
    beside = [row.split(" | ")[:2] for row in texts["echodistill_ablation"].splitlines()[2:]]
    assert beside == [[f"| {script.PLAIN}", "1"], ["| no prior", "1"]]  # the case of the ablation alone
    assert len(texts["echodistill_ablation_strict"].splitlines()) == 4
    lines.append(line_of(script, script.WEIGHTS["texture_more"][0], "texture_more", seed=0))
    texts = script.tables(lines)  # other weights have a table of their own
    beside = [row.split(" | ")[:2] for row in texts["echodistill_weights"].splitlines()[2:]]
    assert beside == [[f"| {script.PLAIN}", "1"], ["| texture 0.3", "1"]]
    assert len(texts["echodistill_ablation"].splitlines()) == len(texts["echodistill_weights_strict"].splitlines()) == 4
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"model": "cut sho')
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in texts))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    assert script.main(["--out", str(tmp_path), "--table", "--write-docs", str(page)]) == 0
    assert "| no prior | 1 | 100 % |" in page.read_text() and "| EchoDistill | 2 | 50% (50%" in page.read_text()
    assert script.main(["--out", str(tmp_path), "--table", "--write-docs", str(tmp_path / "none.md")]) == 2
    assert "none.md does not exist" in capsys.readouterr().err
    for name in texts:  # every table has its place in the page of the experiment
        assert f"<!-- table:{name} -->" in (ROOT / "docs/experiments/echodistill.md").read_text()
    assert "<!-- table:echodistill_filter -->" in (ROOT / "docs/experiments/echodistill.md").read_text()


def test_lines_that_cannot_be_compared_are_refused(script, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setitem(script.MODELS, "word", lambda case: pytest.fail("it began"))
    file = tmp_path / "results.jsonl"

    def refusal(*arguments):
        assert script.main(["--out", str(tmp_path), "--models", "word", *arguments]) == 2
        return capsys.readouterr().err

    file.write_text(json.dumps({"model": "a", "key": "echo", "concept": "striped-star", "seed": 0, **FIGURES}) + "\n")
    for arguments in ((), ("--table",)):
        assert "lines of an older form" in refusal(*arguments)
    with_set, without = (line_of(script, "a", "echo", settings=settings) for settings in (["train.steps=7"], []))
    file.write_text(json.dumps(with_set) + "\n")
    assert "lines with --set train.steps=7 beside others; give each --set an --out of its own" in refusal()
    assert script.main(["--out", str(tmp_path), "--table"]) == 0  # they need not be told again
    file.write_text(json.dumps(with_set) + "\n" + json.dumps(without) + "\n")
    assert "lines without --set beside others" in refusal("--table")


def test_a_run_that_was_cut_short_goes_on_with_what_is_missing(script, tmp_path, monkeypatch):
    """Killed between the two models of one key: the second alone is measured; no key is made twice."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    made, fail, built = [], [True], []

    def measure(sample, *rest):
        if sample == "teacher" and fail:
            raise KeyboardInterrupt
        made.append(sample)
        return {**FIGURES, "strict": {column: 0.5 for column, _, _ in script.STRICT_COLUMNS}}

    def models(*names):
        return lambda case: built.append(names) or {name: name for name in names}

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "show", lambda *rest: None)
    monkeypatch.setitem(script.MODELS, "before", models("student", "teacher"))
    monkeypatch.setitem(script.MODELS, "word", models("word"))
    arguments = ["--out", str(tmp_path / "out"), "--concepts", "ring-circle", "--models", "word", "before"]
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments)
    fail.clear()
    assert script.main(arguments) == 0 and made == ["word", "student", "teacher"]
    assert script.main(arguments) == 0 and len(made) == 3 and built == [("word",), *2 * [("student", "teacher")]]


def test_what_another_process_has_measured_counts_once(script, tmp_path, capsys, monkeypatch):
    """What it adds to the same results meanwhile is not made again; of two lines of one model the tables take one."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    file = tmp_path / "results.jsonl"

    def write(line):
        with open(file, "a") as output:
            output.write(json.dumps(line) + "\n")

    def build(case):
        write(line_of(script, "word", "word"))
        return {"student": None}

    monkeypatch.setattr(script, "measure", lambda *rest: {
        **FIGURES, "strict": {column: 0.5 for column, _, _ in script.STRICT_COLUMNS}})
    monkeypatch.setattr(script, "show", lambda *rest: None)
    monkeypatch.setitem(script.MODELS, "before", build)
    monkeypatch.setitem(script.MODELS, "word", lambda case: pytest.fail("it was made again"))
    arguments = ["--out", str(tmp_path), "--concepts", "striped-star", "--models", "before", "word"]
    assert script.main(arguments) == 0
    write(line_of(script, "word", "word", alone=0.0))
    capsys.readouterr()
    assert script.main(["--out", str(tmp_path), "--table"]) == 0
    assert "| word | 1 | 50% |" in capsys.readouterr().out


def test_the_run_with_the_stage_begins_where_the_one_without_is_before_it(script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    case = script.Case("ring-circle", 1, tmp_path, ["train.batch_size=2"])
    plain, whole = (case.run_folder(name) for name in (script.PLAIN, script.WHOLE))
    config = load_config(script.CONFIG, case.overrides(script.WHOLE))
    start = config.method.echo.start
    script.fork(case, script.WHOLE, script.PLAIN)
    assert not whole.exists()  # there is nothing to begin at
    for step in (start - 100, start, start + 100):
        checkpoint = plain / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    save_config(load_config(script.CONFIG, [*case.overrides(script.PLAIN), script.NO_ECHO]), plain / "config.yaml")
    script.fork(case, script.WHOLE, script.PLAIN)
    assert [step for step, _ in checkpoints(whole / "checkpoints")] == [start]
    assert json.loads((whole / "checkpoints" / f"step-{start:06d}" / "state.json").read_text()) == {"step": start}
    check_folder(whole, config)  # the run takes the folder for its own
    assert load_config(whole / "config.yaml").method.echo.start == start
    (whole / "mine").touch()
    script.fork(case, script.WHOLE, script.PLAIN)
    assert (whole / "mine").exists()  # what has begun goes on


@pytest.mark.parametrize("kept", [(), (200, 400)])
def test_the_run_with_the_stage_does_not_begin_elsewhere(script, tmp_path, kept, capsys, monkeypatch):
    """Where the checkpoint before the stage is gone, nothing is trained from the start in its place, and nothing
    else before."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(script, "distill", lambda *_: pytest.fail("something was trained"))
    plain = script.Case("ring-circle", 0, tmp_path, []).run_folder(script.PLAIN)
    (plain / "student").mkdir(parents=True)
    for step in kept:
        (plain / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    arguments = ["--out", str(tmp_path), "--concepts", "ring-circle", "--models", "no_echo", "echo"]
    assert script.main(arguments) == 2
    error = capsys.readouterr().err
    named = "step 200, step 400" if kept else "none"
    assert f"begins at step 300 of {plain}, whose checkpoints there are {named}; train that run again" in error
    assert error.count("\n") == 1


def test_a_run_that_a_signal_stopped_is_not_measured(script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(script, "distill", lambda *_: Run(tmp_path, 5, completed=False, interrupted=15))
    with pytest.raises(UserError, match="was stopped at step 5; the same command goes on"):
        script.MODELS["no_echo"](script.Case("ring-circle", 0, tmp_path, []))


def test_a_flow_map_of_the_personalised_teacher(script, tmp_path, monkeypatch):
    """Its teacher has the LoRA in its weights and knows the word; the one student makes one call or four."""
    monkeypatch.chdir(ROOT)
    distill = script.distill
    monkeypatch.setattr(script, "distill", lambda config, overrides: distill(
        config, [*overrides, "train.steps=1", "train.batch_size=2"]))
    case = script.Case("ring-circle", 0, tmp_path, [])
    samplers = script.of_several_calls(case, "map")
    folder = case.run_folder(script.PLAIN) / "teacher"
    source = load_config(script.CONFIG).teacher.source
    adapted = load_teacher(script.load_adapted_pipeline(source, folder))
    fused = load_teacher(str(tmp_path / "ring-circle-0-map-of"))
    noise, t = torch.randn(1, *fused.shape, generator=torch.Generator().manual_seed(0)), torch.full((1,), 0.7)
    prompt = ["a <new1> circle on a cyan background"]
    one, same = (teacher.velocity(noise, t, teacher.encode(prompts=prompt)) for teacher in (fused, adapted))
    torch.testing.assert_close(one, same, atol=1e-5, rtol=1e-4)
    before = load_file(ROOT / source / "unet/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "ring-circle-0-map-of/unet/diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[key]) for key, value in before.items())
    images = {name: sample(prompt, 0) for name, sample in samplers.items()}
    assert list(images) == ["map: one call", "map: four calls"]
    assert not torch.equal(*images.values())
    with (replaced(folder / "pytorch_lora_weights.safetensors"),
          pytest.raises(UserError, match=r"map-of was .*pytorch_lora_weights\.safetensors, of the personalised")):
        script.of_several_calls(case, "map")


def test_a_row_of_pictures_shows_every_held_out_place(script, tmp_path):
    asked = []

    def paint(prompts, seed):
        asked.extend(prompts)
        return torch.rand(len(prompts), 3, 32, 32)

    script.show(paint, "<new1> star", tmp_path / "row.png")
    assert asked[:2] == ["a <new1> star"] * 2 and asked[2:] == [text for text, _ in held_out_prompts("<new1> star")]
    assert (tmp_path / "row.png").is_file()


def test_the_picture_has_the_rows_of_models_that_are_asked_for(script, tmp_path):
    lines = [{"settings": [], "concept": "ring-circle", "seed": 0, "key": key, "model": model}
             for key, model in (("b", "2"), ("a", "1"), ("b", "3"), ("c", "4"), ("b", "2"))]
    (tmp_path / script.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert script.shown(argparse.Namespace(models=["a", "b"], out=tmp_path)) == ["1", "2", "3"]
    assert script.shown(argparse.Namespace(models=script.MAIN, out=tmp_path)) == script.SHOWN


def test_the_picture_has_the_references_and_a_named_row_a_model(script, tmp_path):
    folders = {name: tmp_path / name for name in ("striped-star", "ring-circle")}
    colours = torch.rand(4, 3)
    for i, folder in enumerate(folders.values()):
        for k, model in enumerate(("a", "b")):
            flat = colours[2 * i + k][:, None, None]
            script.show(lambda prompts, seed, flat=flat: flat.expand(len(prompts), 3, 32, 32), "star",
                        folder / f"{model}.png")
    script.picture(folders, ["a", "b"], tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as whole, Image.open(folders["ring-circle"] / "a.png") as row:
        assert whole.height == 6 * 2 * row.height and whole.width > 2 * row.width
        left = whole.width - 2 * row.width
        places = [(1, 0), (2, 1), (4, 2), (5, 3)]  # below the references of each concept
        for place, number in places:
            seen = whole.getpixel((left + row.height, 2 * row.height * place + row.height))
            assert all(abs(value - 255 * wanted) < 1.5 for value, wanted in zip(seen, colours[number], strict=True))
            names = whole.crop((0, 2 * row.height * place, left, 2 * row.height * (place + 1))).getcolors()
            assert len(names) > 1  # the name, black on white
    with pytest.raises(UserError, match=r"c\.png has not been made"):
        script.picture(folders, ["a", "c"], tmp_path / "all.png")
