"""Parameters that ``torch.distributed.fsdp.fully_shard`` shards: whole during a forward and backward pass only.

What a forward pass writes into such a parameter is lost at its end, unless it is written into the shards as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor | None) -> bool:
    """True for a distributed tensor, of which this process has a part."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # not imported: then there is none
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def write_parameter(parameter: Tensor, value: Tensor) -> None:
    """Copy a value, of which all processes have the whole, into a parameter and into the shards that it is made of."""
    shards: list[Any] = [parameter]
    if not is_sharded(parameter):
        parameter.copy_(value)
        shards = list(_shards_of(parameter))
    for shard in shards:
        from torch.distributed.tensor import distribute_tensor

        # Nothing is sent: each process takes its own part.
        shard.copy_(distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None))


def _shards_of(parameter: Tensor) -> Iterator[Any]:
    """The distributed tensor behind a parameter that fully_shard has made whole for a pass, if it is one."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping  # no public way leads there

    for reference in _module_state_mapping.values():
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for held in (held for group in groups if group is not None for held in group.fsdp_params):
            if getattr(held, "_unsharded_param", None) is parameter:
                yield held.sharded_param
