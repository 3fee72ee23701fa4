import math
import re
import warnings

import pytest

from mamba_rsst import RSSTConfig
from mamba_rsst.pruning import SCHEDULES


def config(tmp_path, **arguments):
    return RSSTConfig(output_dir=str(tmp_path), use_cpu=True, **arguments)


@pytest.mark.parametrize("method", ["rsst", "refill", "dense"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_method_and_schedule_is_accepted(tmp_path, method, schedule):
    with warnings.catch_warnings(action="ignore"):
        args = config(tmp_path, method=method, schedule=schedule)
    assert (args.method, args.schedule) == (method, schedule)


@pytest.mark.parametrize(
    "arguments, names",
    [
        (dict(method="rst"), ["`method`", "'rst'", "'rsst'", "'refill'", "'dense'"]),
        (dict(penalty="l2"), ["`penalty`", "'l2'", "growing_l2", "group_lasso"]),
        (dict(penalty_scope="every", penalty="group_lasso"), ["`penalty_scope`", "'every'", "'leaving'", "'all'"]),
        (dict(schedule="exp_custom"), ["`schedule`", "'exp_custom'", "exp_power"]),
        (dict(rewind="epoch"), ["`rewind`", "'epoch'", "'initial'", "'step'"]),
        (dict(num_train_epochs=-1), ["`num_train_epochs`", "-1"]),
        (dict(num_rounds=0), ["`num_rounds`", "0"]),
        (dict(calibration_batches=0), ["`calibration_batches`", "0"]),
        (dict(per_device_train_batch_size=0), ["`per_device_train_batch_size`", "0"]),
        (dict(gradient_accumulation_steps=0), ["`gradient_accumulation_steps`", "0"]),
        (dict(learning_rate=-1e-3), ["`learning_rate`", "-0.001"]),
        (dict(learning_rate=float("nan")), ["`learning_rate`", "nan"]),
        (dict(rsst_epochs=-0.5), ["`rsst_epochs`", "-0.5"]),
        (dict(rsst_epochs=0), ["`rsst_epochs`"]),
        (dict(recovery_epochs=-2), ["`recovery_epochs`", "-2"]),
        (dict(rsst_learning_rate=-1), ["`rsst_learning_rate`", "-1"]),
        (dict(recovery_learning_rate=-1), ["`recovery_learning_rate`", "-1"]),
        (dict(lambda_max=-0.1), ["`lambda_max`", "-0.1"]),
        (dict(residual=0.0), ["`residual`", "0.0"]),
        (dict(residual=1.0), ["`residual`", "1.0"]),
        (dict(ema_decay=1.0), ["`ema_decay`", "1.0"]),
        (dict(ema_decay=-0.1), ["`ema_decay`", "-0.1"]),
        (dict(ema_decay=0.9, optim="schedule_free_adamw"), ["`ema_decay`", "'schedule_free_adamw'"]),
        (dict(distillation_weight=1.1), ["`distillation_weight`", "1.1"]),
        (dict(distillation_weight=-0.1), ["`distillation_weight`", "-0.1"]),
        (dict(distillation_temperature=0), ["`distillation_temperature`", "0"]),
        (dict(distillation_hidden_weight=-1), ["`distillation_hidden_weight`", "-1"]),
        (dict(distillation_hidden_weight=None), ["`distillation_hidden_weight`", "None"]),
        (dict(distillation_hidden_weight=1e39), ["`distillation_hidden_weight`", "at most 1e+06"]),
        (dict(distillation_temperature=math.nan), ["`distillation_temperature`", "[0.01, 1000.0]", "nan"]),
        (dict(distillation_temperature=1e-300), ["`distillation_temperature`", "1e-300"]),
        (dict(schedule_power=math.nan), ["`schedule_power`", "nan"]),
        (dict(torch_compile=True), ["`torch_compile`", "`compile_blocks`"]),
        (dict(train_sampling_strategy="foo"), ["`train_sampling_strategy`", "'foo'", "'sequential'"]),
        (dict(log_level="foo"), ["`log_level`", "'foo'", "'warning'"]),
        (dict(eval_accumulation_steps=0), ["`eval_accumulation_steps`", "0"]),
        (dict(logging_steps=-2), ["`logging_steps`", "-2"]),
        (dict(save_steps=-1), ["`save_steps`", "-1"]),
        (dict(adam_beta1=2.0), ["`adam_beta1`", "[0, 1)", "2.0"]),
        (dict(adam_beta2=math.nan), ["`adam_beta2`", "nan"]),
        (dict(adam_epsilon=-1.0), ["`adam_epsilon`", "-1.0"]),
        (dict(weight_decay=math.nan), ["`weight_decay`", "nan"]),
        (dict(weight_decay=-5.0), ["`weight_decay`", "-5.0"]),
        (dict(max_grad_norm=math.nan), ["`max_grad_norm`", "nan"]),
        (dict(warmup_steps=math.nan), ["`warmup_steps`", "nan"]),
        (dict(parallelism_config=5), ["`parallelism_config`", "5"]),
        (dict(penalty_scope="all"), ["`penalty_scope", "group_lasso"]),
        (dict(method="refill", rewind="step"), ["`rewind_step`"]),
        (dict(ramp="square"), ["`ramp`", "'square'", "'cubic'"]),
        (dict(round_rate=1.0), ["`round_rate`", "(0, 1)"]),
        (dict(round_rate=0.2, num_rounds=2, ramp="linear"), ["`round_rate`", "'linear'"]),
        (dict(spread_epochs=-1), ["`spread_epochs`"]),
        (dict(spread_epochs=1, spread_residual=1.0), ["`spread_residual`"]),
        (dict(method="unstructured", spread_epochs=1), ["`spread_epochs`", "unstructured"]),
        (
            dict(spread_epochs=1, lambda_max=1.0, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch"),
            ["`spread_epochs`", "`rsst_lr_scheduler_type`", "'reduce_lr_on_plateau'"],
        ),
        (dict(method="refill", rewind="step", rewind_step=5, num_train_epochs=0), ["`rewind_step`", "first stage"]),
        (dict(max_steps=10), ["`max_steps`"]),
        (dict(save_only_model=True), ["`save_only_model`"]),
        (dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch"), ["`lambda_max`", "reduce_lr"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_the_choices(tmp_path, arguments, names):
    with pytest.raises(ValueError) as caught:
        config(tmp_path, **arguments)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_train_epochs=0, rsst_epochs=1),
        dict(num_train_epochs=0.5),
        dict(recovery_epochs=0),
        dict(lambda_max=0.0),
        dict(penalty="group_lasso", penalty_scope="all"),
        dict(method="refill", rsst_epochs=None),
        dict(method="refill", rewind="step", rewind_step=1),
        dict(method="rsst", rewind="none"),
        dict(method="prune", num_rounds=3, ramp="cubic"),
        dict(method="rsst", num_rounds=3, round_rate=0.2),
        dict(method="prune", spread_epochs=1, spread_residual=0.9),
        dict(distillation_weight=1.0),
        dict(num_train_epochs=0, rsst_epochs=2, recovery_epochs=1, ema_decay=0.99),
        dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch", lambda_max=1.0),
        dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch", penalty="group_lasso"),
    ],
)
def test_the_edges_of_the_ranges_are_allowed_without_a_word(tmp_path, arguments):
    with warnings.catch_warnings(action="error"):
        config(tmp_path, **arguments)


@pytest.mark.parametrize(
    "arguments, ignored",
    [
        (dict(method="dense", rewind="initial"), ["rewind"]),
        (dict(method="rsst", ramp="linear"), ["ramp"]),
        (dict(method="rsst", spread_residual=0.1), ["spread_residual"]),
        (dict(method="rsst", rewind="initial", rewind_step=3), ["rewind_step"]),
        (dict(method="rsst", lambda_max=1.0, residual=0.1), ["residual"]),
        (dict(method="rsst", penalty="group_lasso", residual=0.1), ["residual"]),
        (dict(method="refill", rsst_epochs=2, lambda_max=3.0), ["rsst_epochs", "lambda_max"]),
        (dict(method="rsst", schedule="linear", schedule_power=2.0), ["schedule_power"]),
        (dict(method="rsst", distillation_temperature=4.0), ["distillation_temperature"]),
        (dict(method="refill", rewind_step=3), ["rewind_step"]),
        (dict(method="dense", num_rounds=2, distillation_weight=0.5), ["num_rounds", "distillation_weight"]),
        (dict(method="dense", recovery_epochs=2), ["recovery_epochs"]),
        (dict(method="dense", distillation_hidden_weight=2.0), ["distillation_hidden_weight"]),
        (dict(method="rsst", distillation_hidden_fade=True), ["distillation_hidden_fade"]),
        (
            dict(
                method="rsst",
                rsst_epochs=1,
                recovery_epochs=0,
                **{f"distillation_hidden_{k}": 1 for k in ("weight", "fade")},
            ),
            ["distillation_hidden_fade"],
        ),
        (
            dict(method="prune", recovery_epochs=0, distillation_weight=0.5, distillation_hidden_weight=2.0),
            ["distillation_weight", "distillation_hidden_weight"],
        ),
        (
            dict(method="scratch", recovery_epochs=0, distillation_hidden_weight=2.0),
            ["distillation_hidden_weight", "recovery_epochs"],
        ),
        (dict(num_train_epochs=0, rsst_epochs=2, ema_decay=0.99), ["ema_decay"]),
    ],
)
def test_a_setting_that_will_be_ignored_is_a_warning(tmp_path, arguments, ignored):
    with pytest.warns(UserWarning, match=re.escape(f"{ignored} is ignored")):
        config(tmp_path, **arguments)
