"""scripts/convert_sit.py against a network with SiT's layers and names, written out here."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowdistill.students import FlowMap, StudentInfo
from flowdistill.teachers import load_teacher
from tests.tiny import POINTER, lively, vae

WIDTH, HEADS, CLASSES, SIZE, PATCH = 16, 2, 5, 8, 2
spec = importlib.util.spec_from_file_location(
    "convert_sit", Path(__file__).resolve().parents[2] / "scripts" / "convert_sit.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def places(count, width):
    """Sines and cosines of column and row, each with frequencies 10000^(-4i / width)."""
    rows, columns = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    parts = []
    for index in (columns, rows):
        angle = index.reshape(-1, 1) * frequencies
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()[None]


class Named(nn.Module):
    """Modules under given names."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class SiT(nn.Module):
    def __init__(self, learn_sigma):
        super().__init__()
        self.channels = 8 if learn_sigma else 4
        linear = nn.Linear
        self.x_embedder = Named(proj=nn.Conv2d(4, WIDTH, PATCH, PATCH))
        self.pos_embed = nn.Parameter(places(SIZE // PATCH, WIDTH), requires_grad=False)
        self.t_embedder = Named(mlp=nn.Sequential(linear(256, WIDTH), nn.SiLU(), linear(WIDTH, WIDTH)))
        self.y_embedder = Named(embedding_table=nn.Embedding(CLASSES + 1, WIDTH))
        self.blocks = nn.ModuleList(
            Named(
                attn=Named(qkv=linear(WIDTH, 3 * WIDTH), proj=linear(WIDTH, WIDTH)),
                mlp=Named(fc1=linear(WIDTH, 4 * WIDTH), fc2=linear(4 * WIDTH, WIDTH)),
                adaLN_modulation=nn.Sequential(nn.SiLU(), linear(WIDTH, 6 * WIDTH)),
            )
            for _ in range(2)
        )
        self.final_layer = Named(linear=linear(WIDTH, PATCH * PATCH * self.channels),
                                 adaLN_modulation=nn.Sequential(nn.SiLU(), linear(WIDTH, 2 * WIDTH)))

    def forward(self, x, t, labels):
        angles = t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        c = c + self.y_embedder.embedding_table(labels)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed

        def shaped(h, shift, scale):
            return F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

        for block in self.blocks:
            a, b, gate, d, e, last = block.adaLN_modulation(c).chunk(6, dim=1)
            q, k, v = block.attn.qkv(shaped(h, a, b)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + gate[:, None] * block.attn.proj(mixed)
            h = h + last[:, None] * block.mlp.fc2(F.gelu(block.mlp.fc1(shaped(h, d, e)), approximate="tanh"))
        h = self.final_layer.linear(shaped(h, *self.final_layer.adaLN_modulation(c).chunk(2, dim=1)))
        h = h.unflatten(1, (SIZE // PATCH, -1)).unflatten(-1, (PATCH, PATCH, self.channels))
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, SIZE, SIZE)[:, :4]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae().save_pretrained(folder)
    return folder


def trained(learn_sigma, variance=False):
    """A network with weights everywhere but, unless ``variance``, in the channels that SiT's loss does not see."""
    torch.manual_seed(0)
    network = SiT(learn_sigma)
    position = network.pos_embed.clone()
    lively(network)
    network.pos_embed.data.copy_(position)
    if learn_sigma and not variance:
        for values in network.final_layer.linear.parameters():
            values.data.reshape(PATCH * PATCH, 8, *values.shape[1:])[:, 4:] = 0
    return network


def run(tmp_path, autoencoder, content, *options):
    torch.save(content, tmp_path / "c.pt")
    arguments = [str(tmp_path / "c.pt"), "--vae", str(autoencoder), "--out", str(tmp_path / "out"), "--heads", "2"]
    return script.main([*arguments, *options])


@pytest.mark.parametrize("time, learn_sigma", [("data", True), ("noise", False)])
def test_the_velocity_is_that_of_the_checkpoint(tmp_path, autoencoder, time, learn_sigma):
    network = trained(learn_sigma)
    state = network.state_dict() | ({"projectors.0.0.weight": torch.zeros(2, 2)} if time == "noise" else {})
    assert run(tmp_path, autoencoder, {"ema": state, "opt": {}}) == 0  # REPA's direction is known by its projectors
    teacher = load_teacher(tmp_path / "out")
    assert (teacher.path.kind, teacher.num_classes, teacher.null_label) == ("flow", CLASSES, CLASSES)
    x, labels = torch.randn(4, 4, SIZE, SIZE), torch.tensor([0, 1, 2, 4])
    for t in (torch.tensor([1.0, 0.9, 0.3, 0.0]), torch.full((4,), 0.55)):
        ours = teacher.velocity(x, t, teacher.encode(labels))
        theirs = network(x, t, labels) if time == "noise" else -network(x, 1 - t, labels)
        assert (ours - theirs).abs().max() < 1e-5 and theirs.std() > 0.1
    student = FlowMap.from_teacher(teacher, StudentInfo())
    assert student.generate(labels=[1]).shape == (1, 3, 16, 16)


def test_the_sinusoids_are_interpolated_to_nine_digits():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]

    def features(t, denominator):
        angles = t * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / denominator)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    for reverse in (False, True):
        got = features(t, 127) @ script.time_features(reverse).T
        assert (got - features(1 - t if reverse else t, 128)).abs().max() < 1e-8


def args(**settings):
    return {"args": argparse.Namespace(**settings)}


SIT, REPA = {"model": "SiT-XL/2"}, {"model": "SiT-XL/2", "path_type": "linear", "prediction": "v"}
DIT = {"model": "DiT-XL/2"}


@pytest.mark.parametrize(
    ("learn_sigma", "variance", "settings", "options", "message"),
    [
        (True, False, {}, [], None),
        (True, True, {}, [], "is a DiT, a diffusion model: its variance channels are trained"),
        (True, True, {}, ["--flow-matching"], None),
        (True, True, args(**DIT), [], "is a DiT, a diffusion model: it is the model DiT-XL/2"),
        (False, False, {}, [], "does not show whether it is a SiT"),
        (False, False, {}, ["--flow-matching"], None),
        (False, False, args(**SIT), [], None),
        (False, False, args(**DIT), [], "is a DiT"),
        (False, False, args(**REPA), [], None),
        (True, False, args(**REPA | {"path_type": "GVP"}), ["--flow-matching"], "on the path 'GVP'"),
        (True, False, args(**REPA | {"prediction": "noise"}), [], "to predict 'noise'"),
    ],
)
def test_a_network_trained_otherwise_is_refused(
    tmp_path, autoencoder, capsys, learn_sigma, variance, settings, options, message
):
    state = trained(learn_sigma, variance).state_dict()
    assert run(tmp_path, autoencoder, {"ema": state} | settings, *options) == (0 if message is None else 2)
    assert (message or "a pipeline folder") in "".join(capsys.readouterr())
    assert (tmp_path / "out").exists() == (message is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, "it has blocks.0.attn.q_norm.weight"),
        ({"decoder_embed.weight": torch.ones(8)}, "it has decoder_embed.weight"),
        ({"blocks.1.mlp.fc2.weight": None}, "it has no blocks.1.mlp.fc2.weight"),
        ({"final_layer.linear.weight": None}, "it has no final_layer.linear.weight"),
        ({"final_layer.linear.weight": torch.zeros(48, WIDTH)}, "returns 48 numbers a patch"),
        ({"pos_embed": torch.zeros(1, 16, WIDTH)}, "pos_embed is not the sinusoidal one"),
        ({"pos_embed": torch.zeros(1, 15, WIDTH)}, "pos_embed is not the sinusoidal one"),
    ],
)
def test_layers_that_do_not_fit_are_named(tmp_path, autoencoder, capsys, change, message):
    state = trained(True).state_dict() | change
    assert run(tmp_path, autoencoder, {name: value for name, value in state.items() if value is not None}) == 2
    assert message in capsys.readouterr().err


def test_bad_checkpoints(tmp_path, autoencoder, capsys):
    rest = ["--vae", str(autoencoder), "--out", str(tmp_path / "out")]
    assert script.main([str(tmp_path / "none.pt"), *rest]) == 2
    assert "does not exist" in capsys.readouterr().err
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    assert script.main([str(tmp_path / "other.pt"), *rest]) == 2
    assert "holds no SiT" in capsys.readouterr().err
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert script.main([str(tmp_path / "text.pt"), *rest]) == 2
    assert "no readable checkpoint" in capsys.readouterr().err
    (tmp_path / "pointer.pt").write_text(POINTER)
    assert script.main([str(tmp_path / "pointer.pt"), *rest]) == 2
    assert "git lfs pull" in capsys.readouterr().err
    torch.save(SiT(True).state_dict(), tmp_path / "s.pt")
    assert script.main([str(tmp_path / "s.pt"), *rest, "--flow-matching"]) == 2
    assert "give --heads" in capsys.readouterr().err
