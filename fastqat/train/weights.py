"""Weights of a network in a file: safetensors out; safetensors or what torch.save writes in, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastqat.train.extras import import_extra

SHOWN_KEYS = 3
SAFETENSORS = ".safetensors"


def to_safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return named tensors in the safetensors format, dense and each with memory of its own.

    Args:
        tensors: of any device and strides.
        metadata: kept beside them.
    """
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        memory = dense.untyped_storage().data_ptr()
        kept[name] = dense.clone() if memory in seen else dense  # tied weights: the format refuses shared memory
        seen.add(memory)
    return import_extra("safetensors.torch").save(kept, metadata)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a checkpoint into a network; the prefix "module." of its keys is dropped.

    Args:
        model: the network to fill; it is left as it was when the weights do not fit.
        path: a .safetensors file, or one that ``torch.load(weights_only=True)`` reads as a state_dict or as a
            dictionary that holds one as "state_dict".

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
    safe = import_extra("safetensors.torch") if path.suffix == SAFETENSORS else None
    with path.open("rb") as file:
        try:
            content: Any = safe.load(file.read()) if safe else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on the first bytes, and torch's text advises to unpickle them
            wanted = f"weights written by {'safetensors' if safe else 'torch.save'}"
            got = f"{path.stat().st_size} bytes that are none, or more than weights"
            raise ValueError(f"checkpoint {path}: wanted {wanted}; got {got}") from error
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f'checkpoint {path}: wanted a state_dict, or {{"state_dict": ...}}; got something else')
    return content
