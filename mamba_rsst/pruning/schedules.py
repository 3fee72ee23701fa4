"""How the penalty grows over its stage: u in [0, 1] is the fraction of the WHOLE stage that has passed."""

import math
from collections.abc import Callable


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda u, p: 1.0,
    "linear": lambda u, p: u,
    "quadratic": lambda u, p: u**2,
    "cubic": lambda u, p: u**3,
    "power": lambda u, p: u**p,
    "exp": lambda u, p: math.expm1(u) / math.expm1(1),
    "exp_power": lambda u, p: math.expm1(u**p) / math.expm1(1),
}
"""Name -> f(u, p), rising from 0 (constant: 1) at u = 0 to 1 at u = 1. p: the exponent of `power` and `exp_power`."""


def schedule_value(schedule: str, u: float, power: float = 4.0) -> float:
    """The penalty's fraction of its full strength at u. Raises ValueError for an unknown name or u outside [0, 1]."""
    if schedule not in SCHEDULES:
        raise ValueError(f"Unknown schedule {schedule!r}; choose from {sorted(SCHEDULES)}.")
    if not 0.0 <= u <= 1.0:
        raise ValueError(f"The schedule runs over [0, 1], got u={u}.")
    return SCHEDULES[schedule](u, power)
