"""Scorers of images and prompts, with tiny CLIPs on disk."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPModel, CLIPProcessor

from flowdistill.features import scorers
from flowdistill.features.scorers import Scorer, load_scorers, scorer_found_again
from flowdistill.utils.errors import UserError
from tests.features.clips import SIZE, as_open_clip, config, edit_config, save_processor, tiny_clip, without_processor

PROMPTS = ["a red circle", "blue", "a", "x y z", "blue"]


def pictures(count=5, height=24, width=40, channels=3):
    return torch.randint(0, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "clip"
    return tiny_clip(folder), folder


def load(name):
    (scorer,) = load_scorers([name], "cpu")
    return scorer


class Unwrapped(nn.Module):
    """A CLIPModel as torchmetrics 1.9 expects it, of transformers before 5."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config = network, network.config

    def get_image_features(self, pixels):
        return self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)

    def get_text_features(self, ids, mask):
        return self.network.text_projection(self.network.text_model(input_ids=ids, attention_mask=mask).pooler_output)


def test_clip_score_is_torchmetrics(clip):
    network, folder = clip
    images, scorer = pictures(), load(f"clip:{folder}")
    theirs = CLIPScore(lambda: (Unwrapped(network), CLIPProcessor.from_pretrained(folder)))
    for image, prompt, score in zip(images, PROMPTS, scorer(images, PROMPTS), strict=True):
        theirs.reset()
        theirs.update(image, prompt)
        assert score == pytest.approx(float(theirs.score), abs=2e-4)
    theirs.reset()
    theirs.update(images, PROMPTS)
    mean = scorer(images, PROMPTS).mean()
    assert max(float(mean), scorer.least) == pytest.approx(float(theirs.compute()), abs=2e-4)
    assert scorer.facts["weights_sha256"] == scorer.hash and len(scorer.hash) == 64


def test_a_long_prompt_keeps_its_end(clip):
    """Where torchmetrics cuts it off, and then reads the text at another token."""
    long, scorer = "a b c d e f g h i j k l m n o p q r s t u v w", load(f"clip:{clip[1]}")
    cut = scorer(pictures(1), [long])
    assert torch.equal(cut, scorer(pictures(1), ["a b c d e f g h i j k l m n"]))  # 14, and the two ends


def test_pickscore_and_hpsv2_are_the_cosine_at_their_own_scales(clip, tmp_path):
    network, folder = clip
    images = pictures(5, SIZE, SIZE)  # nothing to resize, which is where the two differ from one another
    cosines = load(f"clip:{folder}")(images, PROMPTS) / 100
    pick = load(f"pickscore:{folder}")
    assert torch.allclose(pick(images, PROMPTS), network.logit_scale.exp() * cosines, atol=1e-5)
    assert torch.allclose(load(f"hpsv2:{folder}")(images, PROMPTS), cosines, atol=1e-6)
    bare = tmp_path / "bare"
    network.save_pretrained(bare)
    without_processor(bare)
    assert torch.equal(load(f"pickscore:{bare}:{folder}")(images, PROMPTS), pick(images, PROMPTS))


def test_hpsv2_reads_images_as_its_own_code_does(clip):
    """In floats, short side first: not the whole numbers that an image processor makes."""
    network, folder = clip
    images, scorer = pictures(), load(f"hpsv2:{folder}")
    resized = F.interpolate(images.float() / 255, (SIZE, 26), mode="bicubic", antialias=True)[..., 5:21]
    mean, std = (torch.tensor(values)[:, None, None] for values in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad():
        pooled = network.vision_model(pixel_values=(resized - mean) / std).pooler_output
        ours = F.normalize(network.visual_projection(pooled), dim=-1)
        tokens = CLIPProcessor.from_pretrained(folder).tokenizer(PROMPTS, padding=True, return_tensors="pt")
        texts = F.normalize(network.text_projection(network.text_model(**tokens).pooler_output), dim=-1)
    assert torch.allclose(scorer(images, PROMPTS), (ours * texts).sum(1), atol=1e-6)
    assert not torch.allclose(scorer(images, PROMPTS), load(f"clip:{folder}")(images, PROMPTS) / 100, atol=1e-5)


@pytest.mark.parametrize("form", ["state_dict", "module", "bare", "half"])
def test_hpsv2s_file_is_the_same_network(clip, tmp_path, form):
    network, folder = clip
    state = as_open_clip(network)
    content = {"state_dict": {"epoch": 3, "state_dict": state}, "bare": state,
               "module": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
               "half": {"state_dict": {name: value.half() for name, value in state.items()}}}[form]
    torch.save(content, tmp_path / "HPS_v2.pt")
    scorer, same = load(f"hpsv2:{tmp_path / 'HPS_v2.pt'}:{folder}"), load(f"hpsv2:{folder}")
    assert torch.allclose(scorer(pictures(), PROMPTS), same(pictures(), PROMPTS), atol=5e-3 if form == "half" else 0)
    assert (scorer.hash == same.hash) == (form != "half")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A CLIP that was shown red, green, blue and white, each with its name."""
    folder = tmp_path_factory.mktemp("colours")
    torch.manual_seed(0)
    network, names = CLIPModel(config()), ["red", "green", "blue", "white"]
    save_processor(folder)
    processor = CLIPProcessor.from_pretrained(folder)
    tokens = processor.tokenizer(names, padding=True, return_tensors="pt")
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(60):
        pixels = processor.image_processor(images=list(_coloured(draw)), return_tensors="pt")["pixel_values"]
        loss = network(**tokens, pixel_values=pixels, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval().save_pretrained(folder)
    return folder, names


def _coloured(draw):
    base = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 220]])[..., None, None]
    return (base + torch.randint(-30, 30, (4, 3, SIZE, SIZE), generator=draw)).clamp(0, 255).byte()


@pytest.mark.parametrize("kind", ["clip", "pickscore", "hpsv2"])
def test_images_with_another_ones_prompt_score_less(colours, kind):
    folder, names = colours
    images, scorer = _coloured(torch.Generator().manual_seed(1)), load(f"{kind}:{folder}")
    right = scorer(images, names)
    for shift in (1, 2, 3):
        assert (right > scorer(images, names[shift:] + names[:shift])).all()


def test_scores_are_of_each_pair_alone(clip):
    scorer, images = load(f"clip:{clip[1]}"), pictures(40)
    prompts = [PROMPTS[index % 5] for index in range(40)]
    assert torch.allclose(scorer(images, prompts)[33:35], scorer(images[33:35], prompts[33:35]), atol=1e-3)
    grey = pictures(2, channels=1)
    assert torch.equal(scorer(grey, ["a", "b"]), scorer(grey.expand(-1, 3, -1, -1), ["a", "b"]))
    with pytest.raises(UserError, match="CLIP score reads images of 1 or 3 channels, not 4"):
        scorer(pictures(1, channels=4), ["a"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer(images[:2], ["a", "b"]), scorer(images[:2], ["a", "b"]))
        inside = scorer(images[:2], ["a", "b"])
    assert torch.equal(inside, scorer(images[:2], ["a", "b"]))


REFUSED = {
    "clib:{clip}": "a scorer is clip, pickscore, hpsv2, each with a folder or hub id behind a.*did you mean 'clip'",
    "clip:{place}/torn.pt": "torn.pt is a file of weights only; write clip:.*torn.pt:PROCESSOR",
    "clip:{place}/none": "neither a folder here nor a hub id",
    "clip:{place}/empty": "no tokenizer and image processor of CLIP in .*empty; name .* as clip:.*empty:PROCESSOR",
    "pickscore:{place}/bare:{place}/empty": "no tokenizer and image processor of CLIP in .*empty; name",
    "hpsv2": "hpsv2 without its weights; write hpsv2:FILE",
    "hpsv2:{place}/torn.pt:{clip}": "torn.pt is damaged or holds no weights",
    "hpsv2:{place}/list.pt:{clip}": "list.pt holds no weights by name",
    "hpsv2:{place}/other.pt:{clip}": "other.pt are not those of the network .* differ in logit_scale",
    "hpsv2:{place}/pointer.pt:{clip}": "pointer.pt is a git-lfs pointer",
    "clip:{place}/few": "the tokenizer in .*few has 54 tokens, and the network knows 40; it is another network's",
    "clip:{place}/ends": "ends a text with token 53, and the network looks for 7; it is another network's",
    "builtins:dict": "makes a dict and not a flowdistill.features.scorers.Scorer",
    "no_such_module:scorer": "names no_such_module:scorer, which cannot be imported",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, clip):
    folder = tmp_path_factory.mktemp("place")
    (folder / "empty").mkdir()
    clip[0].save_pretrained(folder / "bare")
    without_processor(folder / "bare")
    (folder / "torn.pt").write_bytes(b"PK\3\4 and no more")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save([1, 2], folder / "list.pt")
    state = as_open_clip(clip[0])
    torch.save({name: value for name, value in state.items() if name != "logit_scale"}, folder / "other.pt")
    tiny_clip(folder / "few", vocab_size=40, eos_token_id=39, bos_token_id=38, pad_token_id=39)
    tiny_clip(folder / "ends")
    edit_config(folder / "ends", eos_token_id=7)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_scorer_is_refused_in_a_sentence(clip, place, name):
    with warnings.catch_warnings(), pytest.raises(UserError, match=REFUSED[name]) as refused:
        warnings.simplefilter("ignore")
        load_scorers([name.format(clip=clip[1], place=place)], "cpu")
    assert "\n" not in str(refused.value)


def brightness():
    return Scorer("brightness", "brightness", lambda images, prompts: images.float().mean((1, 2, 3)))


def test_anybodys_scorer_goes_by_its_name_and_two_of_one_figure_do_not(clip):
    own = load(f"{__name__}:brightness")
    assert torch.allclose(own(pictures(), PROMPTS), pictures().float().mean((1, 2, 3)))
    with pytest.raises(UserError, match="two scorers of one figure, clip_score; measure one of them at a time"):
        load_scorers([f"clip:{clip[1]}", f"clip:{clip[1]}"], "cpu")


def test_without_weights_named_those_of_the_papers_are_asked_for(monkeypatch):
    asked = []

    def refuse(source, *others):
        asked.append(source)
        raise UserError("not here")

    monkeypatch.setattr(scorers, "_processor", refuse)
    for name in ("clip", "pickscore", "clip:owner/name", "pickscore:owner/name", "clip:owner/name:other/name"):
        with pytest.raises(UserError, match="not here"):
            load_scorers([name], "cpu")
    assert asked == ["openai/clip-vit-large-patch14", scorers.CLIP_H, "owner/name", scorers.CLIP_H, "other/name"]


def test_a_runs_scorer_is_found_from_elsewhere(clip, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "reader").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"output_dir": "run", "started_in": str(tmp_path)}))
    monkeypatch.chdir(clip[1])
    for name, found in {
        "clip:weights": f"clip:{tmp_path}/weights", "pickscore:weights:reader": f"pickscore:{tmp_path}/weights:"
        f"{tmp_path}/reader", "clip": "clip", "clip:owner/name": "clip:owner/name", "module:name": "module:name",
    }.items():
        assert scorer_found_again(name, tmp_path / "run") == found
