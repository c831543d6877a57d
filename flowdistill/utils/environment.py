"""Where something happened: the versions of packages, the platform and the devices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

from flowdistill import __version__

PACKAGES = ("torch", "torchvision", "diffusers", "accelerate", "transformers", "peft", "safetensors", "huggingface-hub",
            "omegaconf", "numpy", "scipy", "scikit-learn", "torchmetrics", "clean-fid", "pillow")
"""What flowdistill needs, by the names of distributions."""
OPTIONAL = ("xformers", "triton", "bitsandbytes", "torchao", "pytorch-optimizer", "datasets", "pyarrow", "tensorboard",
            "wandb", "matplotlib")
"""What it uses where it is there."""
VARIABLES = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS", "HF_HOME",
             "HF_HUB_OFFLINE", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "XDG_CACHE_HOME")
"""Of the environment, where they are set; none of them is secret."""


def collected() -> dict[str, str]:
    """Name -> version or description. Of all packages torch alone is imported, which knows the devices."""
    found = {"flowdistill": __version__, "Python": platform.python_version(),
             "platform": platform.platform(), "CPUs": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
             if hasattr(os, "sched_getaffinity") else str(os.cpu_count())}
    for name in PACKAGES:
        found[name] = version(name) or "not installed"
    found |= {name: there for name in OPTIONAL if (there := version(name)) is not None}
    found |= devices()
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def version(distribution: str) -> str | None:
    """The version of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> dict[str, str]:
    """What torch was built for, and the devices that it sees; or that it cannot be imported."""
    if importlib.util.find_spec("torch") is None:
        return {"devices": "unknown without torch"}
    try:
        import torch
    except Exception as error:  # a broken installation is what a report is about
        return {"devices": f"torch cannot be imported: {error!r}"}
    built = torch.version.cuda and f"CUDA {torch.version.cuda}" or torch.version.hip and f"ROCm {torch.version.hip}"
    found = {"torch is built for": built or "the CPU", "threads of torch": str(torch.get_num_threads())}
    if built and torch.backends.cudnn.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
    found["devices"] = "the CPU alone"
    if torch.cuda.is_available():
        names = [f"{each.name}, {each.total_memory / 2**30:.1f} GiB, compute capability {each.major}.{each.minor}"
                 for each in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]
        found["devices"] = "; ".join(f"cuda:{number} {name}" for number, name in enumerate(names))
        found["bfloat16"] = "yes" if torch.cuda.is_bf16_supported() else "no"
    elif torch.backends.mps.is_available():
        found["devices"] = "mps"
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        found["devices"] = f"{torch.xpu.device_count()} xpu"
    return found
