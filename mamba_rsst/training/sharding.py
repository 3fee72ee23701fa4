"""FSDP: what RSSTTrainer can do under it, and the way from a whole model to a sharded one and back.

Between stages the model is whole on every process: there it is scored, cut, evaluated and saved. A stage trains a
copy, which accelerate shards in place (`fully_shard`); then its weights go back into the whole model, which waited on
the CPU.
"""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, StateDictType
from torch.distributed.tensor import DTensor

from .arguments import RSSTConfig


def check_sharding(plugin, model: nn.Module, args: RSSTConfig) -> None:
    """Raises ValueError for settings of FSDP (accelerate's plugin) under which a run could not be right."""
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP 1 flattens the weights, and no channel can be found in them: use `fsdp_version: 2` "
            "(accelerate launch --fsdp_version 2)."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Every process scores and cuts a whole model, so each must load one: set `cpu_ram_efficient_loading: "
            "false` (accelerate launch --fsdp_cpu_ram_efficient_loading false)."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("FSDP's `cpu_offload` is not supported; use more processes, or `gradient_checkpointing`.")
    if args.method == "unstructured":
        raise ValueError("method='unstructured' masks whole weights in every step; under FSDP choose another method.")
    if args.ema_decay > 0:
        raise ValueError("`ema_decay` averages whole weights in every step; under FSDP it must be 0.")
    if args.method == "rsst" and args.penalty == "group_lasso":
        raise ValueError("penalty='group_lasso' needs whole weights in its loss; under FSDP choose 'growing_l2'.")
    if args.load_best_model_at_end and plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        # Trainer notes a best checkpoint if its folder is there, which before sharded state is written is a race.
        raise ValueError(
            "`load_best_model_at_end` needs checkpoints of whole weights: set `state_dict_type: FULL_STATE_DICT` "
            "(accelerate launch --fsdp_state_dict_type FULL_STATE_DICT)."
        )
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    if len(dtypes) > 1:
        raise ValueError(
            f"FSDP shards weights of one dtype, this model has {dtypes}; load it with dtype=torch.float32."
        )


def checkpoint_files(plugin) -> tuple[str, ...]:
    """Files by which a checkpoint of this kind of FSDP state is known, as accelerate writes them."""
    if plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
        return ("pytorch_model_fsdp.bin", "optimizer.bin")
    return ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata")


def copy_to_shard(model: nn.Module) -> nn.Module:
    """A copy of a model that FSDP may take apart, with the marks on its parameters, which deepcopy forgets."""
    copied = copy.deepcopy(model)
    copy_marks(model, copied)
    return copied


def copy_marks(source: nn.Module, target: nn.Module) -> None:
    """requires_grad and attributes such as `_no_weight_decay`, parameter by parameter of the same name."""
    given = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(given[name].requires_grad)
        parameter.__dict__.update(given[name].__dict__)


def reshard_(model: nn.Module) -> None:
    """Free whole parameters that a forward pass without a backward one (an evaluation) has left behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gather_(whole: nn.Module, sharded: nn.Module) -> nn.Module:
    """Copy a sharded model's weights and buffers into a whole one, one after the other; all processes must call it."""
    from accelerate.utils import fsdp2_canonicalize_names  # here: accelerate has FSDP 2 only since 1.6

    reshard_(sharded)
    targets = dict(whole.named_parameters()) | dict(whole.named_buffers())
    sources = fsdp2_canonicalize_names(dict(sharded.named_parameters()) | dict(sharded.named_buffers()))
    assert sources.keys() == targets.keys(), sorted(sources.keys() ^ targets.keys())
    for name, value in sources.items():
        targets[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)
    return whole
