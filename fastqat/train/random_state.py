"""State of the random numbers that a network may draw: torch's on CPU and GPU, NumPy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the global generators, as JSON can hold it.

    Args:
        device: whose generator counts, besides that of the CPU.
    """
    kind, keys, *position = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    state = {
        "cpu": _to_text(torch.get_rng_state()),
        "numpy": [kind, np.asarray(keys).tolist(), *position],
        "python": [version, list(words), gauss],
    }
    if device.type == "cuda":
        state["cuda"] = _to_text(torch.cuda.get_rng_state(device))
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the global generators to a state of :func:`random_state`; one that it does not hold stays as it is."""
    torch.set_rng_state(_to_tensor(state["cpu"]))
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *position))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_to_tensor(state["cuda"]), device)


def seed_random(seed: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _to_text(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _to_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
