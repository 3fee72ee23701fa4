"""Width pruning through one table of coupled slices. Knows slices, not model classes."""

from .align import align_
from .budget import BudgetError, Cost
from .config import PruningConfig
from .groups import TARGETS, Group, Layout, Slice, find_groups
from .importance import IMPORTANCE, register_importance, score_channels
from .masks import Masks, apply_masks_
from .pad import pad_
from .penalty import PENALTIES, leaving_share
from .prune import PruningTable, prune_, select_channels
from .schedules import SCHEDULES
from .shrink import shrink_
from .weight_masks import apply_weight_masks_, choose_weights, extract_weight_masks, weight_sparsity


__all__ = [
    "IMPORTANCE",
    "PENALTIES",
    "SCHEDULES",
    "TARGETS",
    "BudgetError",
    "Cost",
    "Group",
    "Layout",
    "Masks",
    "PruningConfig",
    "PruningTable",
    "Slice",
    "align_",
    "apply_masks_",
    "apply_weight_masks_",
    "choose_weights",
    "extract_weight_masks",
    "find_groups",
    "leaving_share",
    "pad_",
    "prune_",
    "register_importance",
    "score_channels",
    "select_channels",
    "shrink_",
    "weight_sparsity",
]
