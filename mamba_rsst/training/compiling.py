"""torch.compile for a model's repeated blocks, in training and in inference alike."""

import torch


def compile_blocks_(model) -> None:
    """Compile the model's repeated blocks one by one: blocks of the same widths share their compiled code.

    The first batch size gets code of its own, the second code for any batch size. The model's class says which its
    blocks are (`_no_split_modules`); ValueError where it does not.
    """
    blocks = _blocks_of(model)
    if not blocks:
        raise ValueError(f"`compile_blocks`: {type(model).__name__} does not say which modules are its blocks.")
    # Past torch's limit blocks silently run uncompiled; each may have its own widths, in training and evaluating.
    limits = torch._dynamo.config
    for name, old_name, times in (  # old names: before torch 2.7
        ("recompile_limit", "cache_size_limit", 8),
        ("accumulated_recompile_limit", "accumulated_cache_size_limit", 64),
    ):
        name = name if hasattr(limits, name) else old_name
        setattr(limits, name, max(getattr(limits, name), times * len(blocks)))
    for block in blocks:
        block.compile()


def uncompile_blocks_(model) -> None:
    """Run the blocks as they are again: compiled ones would be compiled anew for each width they are cut to."""
    for block in _blocks_of(model):
        block._compiled_call_impl = None


def few_shapes(model, most: int | None) -> bool:
    """Whether the blocks have at most `most` different shapes, each of which would be compiled; None: always."""
    shapes = {tuple(tuple(p.shape) for p in block.parameters()) for block in _blocks_of(model)}
    return most is None or len(shapes) <= most


def _blocks_of(model) -> list:
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]
