"""Load the weights of a public checkpoint into a network: all of them, or none and a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHOWN_KEYS = 3


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state_dict, or a dictionary that holds one as "state_dict"; the prefix "module." of its keys is dropped.

    Args:
        model: the network to fill; it is left as it was when the checkpoint does not fit.
        path: a file that ``torch.load(weights_only=True)`` reads.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or those of another network; the message names the first keys that differ.
    """
    given = {key.removeprefix("module."): value for key, value in _read(path).items()}
    wanted = model.state_dict()
    # Checkpoints older than torch 0.4.1 have no batch counters; BN does not need them.
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in wanted]
    shapes = [
        f"{key} (wanted {list(wanted[key].shape)}, got {list(value.shape)})"
        for key, value in given.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    differences = [
        f"{len(keys)} {kind}: {', '.join(keys[:SHOWN_KEYS])}{', ...' if len(keys) > SHOWN_KEYS else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if differences:
        raise ValueError(
            f"checkpoint {path}: wanted the weights of {type(model).__name__}; got {'; '.join(differences)}"
        )
    model.load_state_dict(given)


def _read(path: Path) -> dict[str, Tensor]:
    """Read the state_dict of a file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path}: wanted a file; got {'a folder' if path.is_dir() else 'nothing there'}"
        )
    with path.open("rb") as file:
        try:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on the first bytes, and its text advises to unpickle them
            got = f"{path.stat().st_size} bytes that are none, or more than weights"
            raise ValueError(f"checkpoint {path}: wanted weights written by torch.save; got {got}") from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f'checkpoint {path}: wanted a state_dict, or {{"state_dict": ...}}; got something else')
    return content
