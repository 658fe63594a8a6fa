"""What a run ran on: enough to understand later why its numbers or its speed differ from another's."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import fastqat

PACKAGES = ("torch", "numpy", "safetensors", "scikit-learn", "pillow", "triton")


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Return versions, machine and backend.

    Args:
        device: of the training.
        processes: that train together.
    """
    versions = {"fastqat": fastqat.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": processes,
        "backend": fastqat.current_backend(device.type),
    }


def _cpu() -> str:
    """Name of the processor, which ``platform`` does not know on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
