"""PruningConfig: what to remove, how much, and how it is chosen."""

from dataclasses import dataclass

from .groups import check_targets


SCOPES = ("global", "layer")
BUDGETS = ("channels", "parameters", "macs", "latency")
NORMALIZATIONS = ("mean", "max", "none")
ALLOCATIONS = ("scores", "weights")
DT_RANK_METHODS = ("select", "svd")
DEFAULT_IMPORTANCE = {"num_hidden_layers": "leave_one_out"}
"""Target -> its score unless said otherwise; magnitude_l2 for all others."""


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """What to remove and how it is chosen. Raises ValueError for a setting that no model could follow."""

    targets: list[str] | tuple[str, ...] = ("d_inner",)
    """Widths to prune: any of d_inner, intermediate_size, d_state, dt_rank, hidden_size; num_hidden_layers: blocks."""

    sparsity: float | dict[str, float] = 0.5
    """Fraction of the budget removed, in [0, 1). With `budget="channels"` it holds for each target by itself, and may
    be given per target, as {target: fraction}."""

    budget: str = "channels"
    """What `sparsity` is a fraction of: "channels" of each target (or blocks), all "parameters" of the model, its
    "macs" (multiply-accumulates, counted from the widths), or its "latency" as a measured `cost` tells it. To be s
    times faster, or s times cheaper, is to remove 1 - 1/s."""

    scope: str = "global"
    """"global": layers compete, so they end with different widths. "layer": every layer loses the same fraction."""

    importance: str | dict[str, str] | None = None
    """Name of a registered score, or {target: name}; larger = keep. None: magnitude_l2, and leave_one_out for
    num_hidden_layers."""

    normalization: str = "mean"
    """How scores of different layers are made comparable: divided by the layer's "mean" or "max", or "none"."""

    allocation: str = "scores"
    """How many channels each layer keeps: as the "scores" fall under one threshold, or Refill's way, in proportion to
    the "weights" of the layer that survive one global magnitude threshold (arXiv:2202.04736)."""

    fillback_rate: float = 0.0
    """With `allocation="weights"`: this fraction of what a layer would lose is given back before the budget is met."""

    floor: float = 0.1
    """Every layer keeps at least this fraction of its channels, and at least one."""

    round_to: int = 8
    """Kept widths are multiples of this; a layer that loses nothing keeps its width. A number and never "what this
    machine likes": the same call must cut the same model everywhere. Why 8: docs/BENCHMARKS.md, which widths pay."""

    dt_rank_method: str = "select"
    """"select" keeps whole channels of dt_rank by `importance`; "svd" first turns their basis to the singular
    directions of dt_proj x_proj and keeps the largest: the best approximation of that rank, exact where the true rank
    is lower."""

    seed: int = 0
    """For the `random` score."""

    def __post_init__(self):
        object.__setattr__(self, "targets", check_targets(self.targets))
        fractions = self.sparsity.values() if isinstance(self.sparsity, dict) else [self.sparsity]
        if any(isinstance(s, bool) or not isinstance(s, (int, float)) or not 0.0 <= s < 1.0 for s in fractions):
            raise ValueError(f"`sparsity` must be in [0, 1), got {self.sparsity}.")
        if isinstance(self.sparsity, dict):
            if set(self.sparsity) != set(self.targets):
                raise ValueError(f"`sparsity` names {sorted(self.sparsity)} but `targets` is {list(self.targets)}.")
            if self.budget != "channels":
                raise ValueError('`sparsity` per target goes with budget="channels" only.')
        if isinstance(self.importance, dict) and set(self.importance) != set(self.targets):
            raise ValueError(f"`importance` names {sorted(self.importance)} but `targets` is {list(self.targets)}.")
        if self.dt_rank_method == "svd" and "dt_rank" not in self.targets:
            raise ValueError(f'dt_rank_method="svd" needs the target dt_rank; `targets` is {list(self.targets)}.')
        for name, choices in (
            ("scope", SCOPES),
            ("budget", BUDGETS),
            ("normalization", NORMALIZATIONS),
            ("allocation", ALLOCATIONS),
            ("dt_rank_method", DT_RANK_METHODS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}.")
        from .importance import IMPORTANCE, SCORES_ONLY  # the registry grows after this module is loaded

        for target, name in ((target, self.importance_of(target)) for target in self.targets):
            if name not in IMPORTANCE:
                raise ValueError(f"Unknown importance {name!r}; choose from {sorted(IMPORTANCE)}.")
            if target not in SCORES_ONLY.get(name, (target,)):
                raise ValueError(
                    f"Importance {name!r} scores {', '.join(SCORES_ONLY[name])}, not {target!r}: give each target its "
                    "own, importance={target: name}."
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be an integer in [0, 2**32), got {self.seed!r}.")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"`round_to` must be an integer >= 1, got {self.round_to!r}.")
        for name in ("floor", "fillback_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if self.scope == "layer" and self.allocation == "weights":
            raise ValueError('allocation="weights" shares channels out over layers: it needs scope="global".')

    def sparsity_of(self, target: str) -> float:
        return self.sparsity[target] if isinstance(self.sparsity, dict) else self.sparsity

    def importance_of(self, target: str) -> str:
        if isinstance(self.importance, dict):
            return self.importance[target]
        return self.importance or DEFAULT_IMPORTANCE.get(target, "magnitude_l2")
