import json
import warnings

import pytest
import torch

from mamba_rsst import RSSTConfig
from mamba_rsst.training.rounds import (
    RunFolder,
    RunState,
    last_complete_checkpoint,
    load_masks,
    plan_stages,
    remove_checkpoints,
    save_masks,
    surviving_blocks,
    survivors,
)


def plan(tmp_path, **arguments):
    with warnings.catch_warnings(action="ignore"):
        return plan_stages(RSSTConfig(output_dir=str(tmp_path), use_cpu=True, **arguments))


def short(stage):
    events = ("select", "decay", "spread", "cut", "rewind", "masked")
    events = [event for event in events if getattr(stage, event)]
    return stage.name, stage.epochs, stage.learning_rate, stage.round, " ".join(events)


TRAIN = ("train", 4.0, 0.1, 0, "")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(method="dense"), [TRAIN]),
        (dict(method="rsst"), [TRAIN, ("rsst-1", 4, 0.1, 1, "select decay cut"), ("recover-1", 4, 0.1, 1, "")]),
        (
            dict(method="rsst", num_rounds=2, rsst_epochs=2, recovery_epochs=3, rsst_learning_rate=0.2),
            [
                TRAIN,
                ("rsst-1", 2, 0.2, 1, "select decay cut"),
                ("recover-1", 3, 0.1, 1, ""),
                ("rsst-2", 2, 0.2, 2, "select decay cut"),
                ("recover-2", 3, 0.1, 2, ""),
            ],
        ),
        (dict(method="rsst", recovery_epochs=0), [TRAIN, ("rsst-1", 4, 0.1, 1, "select decay cut")]),
        (
            dict(method="rsst", num_train_epochs=0, rsst_epochs=2, recovery_learning_rate=0),
            [("train", 0, 0.1, 0, ""), ("rsst-1", 2, 0.1, 1, "select decay cut")],
        ),
        (
            dict(method="prune", num_rounds=2, recovery_epochs=1),
            [
                TRAIN,
                ("prune-1", 0, 0.1, 1, "select cut"),
                ("recover-1", 1, 0.1, 1, ""),
                ("prune-2", 0, 0.1, 2, "select cut"),
                ("recover-2", 1, 0.1, 2, ""),
            ],
        ),
        (
            dict(method="unstructured", rewind="initial"),
            [TRAIN, ("mask-1", 0, 0.1, 1, "select cut rewind"), ("recover-1", 4, 0.1, 1, "masked")],
        ),
        (
            dict(method="rsst", spread_epochs=2, rsst_learning_rate=0.2, recovery_epochs=0),
            [TRAIN, ("spread-1", 2, 0.2, 1, "decay spread"), ("rsst-1", 4, 0.2, 1, "select decay cut")],
        ),
        (
            dict(method="refill", recovery_learning_rate=0.3),
            [TRAIN, ("prune-1", 0, 0.1, 1, "select cut rewind"), ("recover-1", 4, 0.3, 1, "")],
        ),
        (
            dict(method="refill", rewind="none", num_rounds=2, recovery_epochs=1.5),
            [
                TRAIN,
                ("prune-1", 0, 0.1, 1, "select cut"),
                ("recover-1", 1.5, 0.1, 1, ""),
                ("prune-2", 0, 0.1, 2, "select cut"),
                ("recover-2", 1.5, 0.1, 2, ""),
            ],
        ),
        (
            dict(method="refill", rewind="step", rewind_step=2, recovery_epochs=0),
            [TRAIN, ("prune-1", 0, 0.1, 1, "select cut rewind")],
        ),
    ],
)
def test_plan_stages(tmp_path, arguments, expected):
    arguments = {"num_train_epochs": 4, "learning_rate": 0.1, **arguments}
    assert [short(stage) for stage in plan(tmp_path, **arguments)] == expected


def test_a_decaying_stage_without_length_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="`rsst_epochs` must be set when `num_train_epochs` is 0"):
        plan(tmp_path, num_train_epochs=0)


RAMPS = {
    "geometric": {1: [0.875], 3: [0.5, 0.75, 0.875]},  # each round keeps half of what the one before it left
    "linear": {1: [0.875], 5: [0.175, 0.35, 0.525, 0.7, 0.875]},
    "cubic": {1: [0.875], 4: [0.505859375, 0.765625, 0.861328125, 0.875]},  # 0.875 (1 - (1 - i/4)^3)
}


@pytest.mark.parametrize("ramp, rounds", [(ramp, rounds) for ramp, cases in RAMPS.items() for rounds in cases])
def test_the_sparsity_of_the_rounds_is_cumulative_and_ends_at_the_target(tmp_path, ramp, rounds):
    with warnings.catch_warnings(action="ignore"):
        args = RSSTConfig(output_dir=str(tmp_path), use_cpu=True, ramp=ramp, num_rounds=rounds)
    reached = [args.sparsity_after(0.875, i) for i in range(1, rounds + 1)]
    assert reached == pytest.approx(RAMPS[ramp][rounds])


# ---- the folder ----
STATE = dict(stages=["train"], done=1, history=[{"loss": 1.5, "step": 3}], metrics={"train": {"end": {}}})


def test_the_state_comes_back_as_it_was(tmp_path):
    folder, state = RunFolder(tmp_path / "run"), RunState(**STATE, steps=3, epochs=1.0, dense_widths={"a:d_inner": 7})
    assert not folder.exists()
    folder.write(state)
    assert folder.exists() and folder.read(plan(tmp_path, method="dense"), {}) == state
    assert [file.name for file in folder.path.iterdir()] == [RunFolder.STATE]  # nothing left beside it


def test_a_state_that_is_half_written_is_never_seen(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write(RunState(**STATE))
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.write(RunState(["train"], done=0))
    assert folder.read(plan(tmp_path, method="dense"), {}).done == 1


def test_a_run_with_other_stages_is_refused(tmp_path):
    RunFolder(tmp_path).write(RunState(["train", "prune-1", "recover-1"]))
    with pytest.raises(ValueError, match=r"'train', 'prune-1', 'recover-1'\], not \['train', 'rsst-1', 'recover-1'"):
        RunFolder(tmp_path).read(plan(tmp_path, method="rsst"), {})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lambda_max": 2.0}, "lambda_max=1.0, not 2.0"),
        ({}, "lambda_max=1.0, not None"),
        ({"lambda_max": 1.0, "seed": 1}, "seed=None, not 1"),
    ],
)
def test_a_run_with_other_settings_is_refused(tmp_path, settings, message):
    RunFolder(tmp_path).write(RunState(["train"], settings={"lambda_max": 1.0}))
    stages = plan(tmp_path, method="dense")
    assert RunFolder(tmp_path).read(stages, {"lambda_max": 1.0}).settings == {"lambda_max": 1.0}
    with pytest.raises(ValueError, match=f"was started with {message}"):
        RunFolder(tmp_path).read(stages, settings)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"stages": ["train"], "done": 2}', '{"stages": [], "done": -1}', '{"stages": [], "x": 1}'],
)
def test_a_damaged_state_is_named(tmp_path, text):
    (tmp_path / RunFolder.STATE).write_text(text)
    with pytest.raises(ValueError, match="rsst_state.json' is damaged: "):
        RunFolder(tmp_path).read(plan(tmp_path, method="dense"), {})


def test_a_setting_that_was_not_written_down_is_not_compared(tmp_path):
    """The shipped recipes have `dataloader_drop_last: true`; states that do not say so are theirs too."""
    stages, folder = plan(tmp_path, method="dense"), RunFolder(tmp_path)
    folder.write(RunState(["train"], settings={"lambda_max": 1.0}))
    settings = {"lambda_max": 1.0, "dataloader_drop_last": True, "data_seed": 3}
    assert folder.read(stages, settings).settings == {"lambda_max": 1.0}
    folder.write(RunState(["train"], settings={**settings, "data_seed": None}))
    with pytest.raises(ValueError, match="was started with data_seed=None, not 3"):
        folder.read(stages, settings)


def test_a_setting_that_came_after_the_run_has_its_default(tmp_path):
    RunFolder(tmp_path).write(RunState(["train"], settings={"lambda_max": 1.0}))
    stages, folder = plan(tmp_path, method="dense"), RunFolder(tmp_path)
    settings = {"lambda_max": 1.0, "distillation_hidden_weight": 0.0, "schedule": "exp_power"}
    assert folder.read(stages, settings).settings == {"lambda_max": 1.0}
    with pytest.raises(ValueError, match="was started with schedule='exp_power', not 'linear'"):
        folder.read(stages, {**settings, "schedule": "linear"})


def test_where_a_stage_starts_and_what_it_rewinds_to(tmp_path):
    stages = plan(tmp_path, method="refill", num_rounds=2)
    folder = RunFolder(tmp_path)
    names = [folder.model(i, stages).relative_to(tmp_path).as_posix() for i in range(len(stages) + 1)]
    assert names == ["start"] + [f"stages/{i}-{stage.name}/model" for i, stage in enumerate(stages)]
    assert folder.rewind_point(1, stages) == folder.start
    with pytest.raises(ValueError, match="has lost the weights of the step"):
        folder.rewind_point(1, stages, from_step=True)
    for index, after in ((0, [1, 2, 3]), (1, [2, 3])):  # the weights at a step, then what the first round cut of them
        point = folder.stage(index, stages[index]) / "rewind"
        point.mkdir(parents=True)
        assert {folder.rewind_point(i, stages) for i in after} == {point}


def test_masks_come_back_as_they_were(tmp_path):
    masks = {"backbone.layers.0.mixer:d_inner": torch.tensor([True, False, True]), "b": torch.ones(1, dtype=bool)}
    save_masks(masks, tmp_path / "deep" / "masks.safetensors")
    loaded = load_masks(tmp_path / "deep" / "masks.safetensors")
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert loaded[name].dtype == torch.bool and torch.equal(loaded[name], mask)


def checkpoint(folder, step, state="{}", random_numbers=("rng_state.pth",), weights=("optimizer.pt",)):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in (*random_numbers, *weights):
        (path / name).touch()
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return str(path)


def test_the_newest_whole_checkpoint_counts(tmp_path):
    assert last_complete_checkpoint(tmp_path / "absent") is None
    checkpoints = {step: checkpoint(tmp_path, step) for step in (2, 10, 9)}
    assert last_complete_checkpoint(tmp_path) == checkpoints[10]  # by number, not by spelling
    checkpoint(tmp_path, 11, state=None)  # killed before its state was written
    checkpoint(tmp_path, 12, state='{"global_st')  # or while it was
    checkpoint(tmp_path, 13, random_numbers=())
    checkpoint(tmp_path, 14, weights=("optimizer.bin",))  # of FSDP
    assert last_complete_checkpoint(tmp_path, files=("optimizer.bin",)) == str(tmp_path / "checkpoint-14")
    assert last_complete_checkpoint(tmp_path) == checkpoints[10]
    (tmp_path / "model").mkdir()
    remove_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_of_several_processes_is_whole_when_all_have_written(tmp_path):
    whole = checkpoint(tmp_path, 1, random_numbers=("rng_state_0.pth", "rng_state_1.pth"))
    checkpoint(tmp_path, 2, random_numbers=("rng_state_0.pth",))
    assert last_complete_checkpoint(tmp_path, 2) == whole
    assert last_complete_checkpoint(tmp_path) is None  # the random numbers of one process are not those of two


def test_blocks_are_called_by_their_place_in_the_dense_model():
    def removes(*keep):
        return {"layers.0.mixer:d_inner": torch.tensor([True]), "model:num_hidden_layers": torch.tensor(keep).bool()}

    assert (
        surviving_blocks([]) is None and surviving_blocks([{"layers.0.mixer:d_inner": torch.tensor([True])}]) is None
    )
    assert surviving_blocks([removes(0, 1, 1, 0, 1)]) == [1, 2, 4]
    assert surviving_blocks([removes(0, 1, 1, 0, 1), {}, removes(1, 0, 1)]) == [1, 4]


def test_channels_of_the_stream_are_called_by_their_place_in_the_dense_model():
    cuts = [{"model:hidden_size": torch.tensor(keep).bool()} for keep in ([1, 0, 1, 1, 1], [1, 1, 0, 1])]
    assert survivors(cuts, "hidden_size") == [0, 2, 4]
    assert survivors(cuts, "num_hidden_layers") is None
