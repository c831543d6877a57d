"""The small models shipped with the repository."""

from __future__ import annotations

from pathlib import Path

from flowdistill.errors import UserError

# The package is installed from a clone (pip install -e .), so the assets lie beside it.
ASSETS = Path(__file__).resolve().parents[2] / "assets"

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
}


def asset_path(name: str) -> Path:
    """The folder of a shipped model: ``digits-classifier``, ``digits-flow`` or ``digits-ddpm``.

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
