"""The small models shipped with the repository."""

from __future__ import annotations

from pathlib import Path

from flowdistill.errors import UserError

# The package is installed from a clone (pip install -e .), so the assets lie beside it.
ASSETS = Path(__file__).resolve().parents[2] / "assets"

_TEXT_TO_IMAGE = (
    "model_index.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
    "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
)

# What a complete folder holds, and the command that makes it.
_KNOWN: dict[str, tuple[tuple[str, ...], str]] = {
    "digits-classifier": (
        ("config.json", "model.safetensors"),
        "python scripts/train_digits_classifier.py --out assets/digits-classifier",
    ),
    "digits-flow": (
        ("model_index.json", "flowdistill.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        "python scripts/train_digits_teacher.py --path flow --out assets/digits-flow",
    ),
    "digits-ddpm": (
        ("model_index.json", "flowdistill.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        "python scripts/train_digits_teacher.py --path ddpm --out assets/digits-ddpm",
    ),
    "shapes/classifier": (
        ("config.json", "model.safetensors"), "python scripts/train_shapes_networks.py classifier",
    ),
    "shapes/judge": (
        ("config.json", "model.safetensors"),
        "python scripts/train_shapes_networks.py judge --teacher assets/shapes/teacher",
    ),
    "shapes/teacher": (_TEXT_TO_IMAGE, "python scripts/train_shapes_teacher.py --out assets/shapes/teacher"),
    "shapes/turbo": (_TEXT_TO_IMAGE, "python scripts/make_shapes_turbo.py runs/shapes-dmd2 --out assets/shapes/turbo"),
}


def asset_path(name: str) -> Path:
    """The folder of a shipped model: ``digits-classifier``, ``digits-flow``, ``shapes/teacher`` and so on.

    Raises:
        UserError: unknown name, or the folder is not complete; says what is missing and the command that makes it.
    """
    if name not in _KNOWN:
        raise UserError(f"unknown asset {name!r}; the shipped assets are {', '.join(sorted(_KNOWN))}")
    files, command = _KNOWN[name]
    folder = ASSETS / name
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(f"the asset {name!r} lacks {folder / missing[0]}; make it with: {command}")
    return folder
