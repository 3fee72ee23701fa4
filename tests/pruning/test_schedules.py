import math

import pytest

from mamba_rsst.pruning import SCHEDULES
from mamba_rsst.pruning.schedules import schedule_value


HALF = {
    "constant": 1.0,
    "linear": 0.5,
    "quadratic": 0.25,
    "cubic": 0.125,
    "power": 0.5**4,
    "exp": (math.exp(0.5) - 1) / (math.e - 1),
    "exp_power": (math.exp(0.5**4) - 1) / (math.e - 1),
}


def test_all_schedules_are_tested():
    assert set(HALF) == set(SCHEDULES)


@pytest.mark.parametrize("name", HALF)
def test_values(name):
    assert schedule_value(name, 0.0) == (1.0 if name == "constant" else 0.0)
    assert schedule_value(name, 1.0) == pytest.approx(1.0, abs=1e-15)
    assert schedule_value(name, 0.5) == pytest.approx(HALF[name], rel=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", HALF)
def test_rises_all_the_way(name, power):
    """Over the whole stage: an earlier implementation started again every epoch."""
    values = [schedule_value(name, t / 200, power) for t in range(201)]
    assert all(0.0 <= v <= 1.0 for v in values)
    steps = [b - a for a, b in zip(values, values[1:])]
    assert all(step > 0 for step in steps) if name != "constant" else not any(steps)


@pytest.mark.parametrize("name, value", [("power", 0.5**2), ("exp_power", math.expm1(0.5**2) / math.expm1(1))])
def test_the_exponent(name, value):
    assert schedule_value(name, 0.5, 2.0) == pytest.approx(value, rel=1e-12)
    assert schedule_value(name, 0.5) == schedule_value(name, 0.5, 4.0) != schedule_value(name, 0.5, 2.0)


@pytest.mark.parametrize("name", ["constant", "linear", "quadratic", "cubic", "exp"])
def test_the_others_have_none(name):
    assert schedule_value(name, 0.3, 2.0) == schedule_value(name, 0.3, 7.0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="Unknown schedule 'exponential'; choose from .*'exp', 'exp_power'"):
        schedule_value("exponential", 0.5)
    for u in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"The schedule runs over \[0, 1\], got u="):
            schedule_value("linear", u)
