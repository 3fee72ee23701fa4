"""The part of a sharded parameter that this process holds: FSDP2 keeps each parameter as rows of a DTensor.

A DTensor is known by its placements: importing the class would need a torch that is built with torch.distributed.
"""

import torch
from torch import Tensor


def sharded_along(parameter: Tensor) -> tuple[int | None, int]:
    """(axis along which the processes share a parameter out, the first of this process's rows); (None, 0) if whole.

    Rows are dealt as by torch.chunk: ceil(n / processes) to each while they last, so the last ones may hold none.
    """
    shards = [(dim, place.dim) for dim, place in enumerate(_placements(parameter)) if place.is_shard()]
    if not shards:
        return None, 0
    ((dim, axis),) = shards  # tensor parallelism on top would be a second
    mesh, rows = parameter.device_mesh, parameter.shape[axis]
    return axis, min(rows, mesh.get_local_rank(dim) * -(-rows // mesh.size(dim)))


def held(parameter: Tensor) -> Tensor:
    """This process's rows, sharing the parameter's memory; the parameter itself if it is whole."""
    return parameter.to_local() if _placements(parameter) else parameter


def sum_over_shards(values: Tensor, parameter: Tensor) -> Tensor:
    """Sums over the processes of what each has summed over its rows of parameters that are sharded like this one."""
    if sharded_along(parameter)[0] is not None:
        dim = next(dim for dim, place in enumerate(parameter.placements) if place.is_shard())
        torch.distributed.all_reduce(values, group=parameter.device_mesh.get_group(dim))
    return values


def _placements(parameter: Tensor) -> tuple:
    """One a dimension of the DTensor's mesh; () of an ordinary tensor."""
    return getattr(parameter, "placements", ())
