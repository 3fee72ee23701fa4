import copy
import re
from pathlib import Path

import pytest
import yaml
from tiny_runs import RECIPE, write_recipe

from mamba_rsst.recipe import RecipeError, build_recipe, coerce, load_recipe


ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "sweeps")


def content(**sections):
    recipe = copy.deepcopy(RECIPE)
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
    return recipe


# ---- the recipes that ship ----
def test_recipes_ship():
    assert {"digits-rsst70.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_comes_back_from_its_resolved_form(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert recipe.training["output_dir"] == f"runs/{path.stem}"
    given = yaml.safe_load(path.read_text())
    resolved = recipe.to_dict()
    for section in set(given) - {"task"}:  # what the file says is what will be run
        for key, value in given[section].items():
            assert resolved[section][key] == (float(value) if re.fullmatch(r"\d+e-\d+", str(value)) else value), key
    if given["training"].get("method", "rsst") == "dense":
        assert "pruning" not in given


def test_the_baseline_warms_up_for_20_of_its_300_epochs(tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "vision" / "cifar10-baseline.yaml", ["training.use_cpu=true"])
    args, epoch = recipe.training_arguments(), 50_000 // 128
    assert args.optim.startswith("adamw_torch") and (args.weight_decay, args.num_train_epochs) == (0.05, 300)
    assert 20 * epoch <= args.get_warmup_steps(300 * epoch) <= 20 * epoch + 5


# ---- the round trip ----
@pytest.mark.parametrize(
    "sections",
    [
        {},
        dict(augmentation=None, pruning=dict(sparsity={"d_inner": 0.5, "intermediate_size": 0.25})),
        dict(augmentation=dict(mixup=0.2, cutmix=0.0), data=dict(mean=[0.5], std=[0.25], name="ü")),
        dict(model=dict(d_inner=[7, 9], dt_rank="auto", expand=1.5, bidirectional="v1")),
        dict(training=dict(save_strategy="no", lr_scheduler_kwargs={"num_cycles": 2}, report_to=["none"])),
        dict(training=dict(method="dense"), pruning=None),
        dict(model=None, task="image-classification"),
    ],
)
def test_to_yaml_loads_to_an_equal_recipe(tmp_path, sections):
    if "model" in sections and sections["model"] is None:
        sections["model"], recipe = {"path": "some/folder"}, content()
        recipe["model"] = sections["model"]
    else:
        recipe = {k: v for k, v in content(**sections).items() if v is not None}
    first = build_recipe(recipe)
    (tmp_path / "again.yaml").write_text(first.to_yaml())
    second = load_recipe(tmp_path / "again.yaml")
    assert second == first and second.to_yaml() == first.to_yaml()


def test_the_output_folder_defaults_to_the_recipes_name(tmp_path):
    path = write_recipe(tmp_path / "mine.yaml")
    assert load_recipe(path).training["output_dir"] == "runs/mine"
    assert load_recipe(path, ["training.output_dir="]).training["output_dir"] == "runs/mine"
    assert load_recipe(path, ["training.output_dir=x/y"]).training_arguments().output_dir == "x/y"


def test_the_arguments_are_those_of_the_recipe(tmp_path):
    args = load_recipe(write_recipe(tmp_path / "r.yaml", training=dict(learning_rate="1e-3"))).training_arguments()
    assert (args.learning_rate, args.num_train_epochs, args.method, args.use_cpu) == (1e-3, 1.0, "rsst", True)


# ---- types ----
@pytest.mark.parametrize(
    "section, key, given, read",
    [
        ("training", "learning_rate", "1e-3", 1e-3),  # YAML 1.1 reads it as text
        ("training", "learning_rate", 1, 1.0),
        ("training", "weight_decay", "5e-2", 0.05),
        ("training", "lambda_max", "1e2", 100.0),
        ("training", "lambda_max", None, None),
        ("training", "num_rounds", 2.0, 2),
        ("training", "save_strategy", False, "no"),  # YAML 1.1 reads no as false
        ("training", "eval_strategy", "epoch", "epoch"),
        ("training", "lr_scheduler_type", "cosine", "cosine"),
        ("training", "warmup_steps", 0.1, 0.1),
        ("pruning", "sparsity", "7e-1", 0.7),
        (
            "pruning",
            "sparsity",
            {"d_inner": "5e-1", "intermediate_size": 0},
            {"d_inner": 0.5, "intermediate_size": 0.0},
        ),
        ("pruning", "targets", ["d_inner"], ("d_inner",)),
        ("data", "max_train_samples", None, None),
        ("augmentation", "mixup", "2e-1", 0.2),
        ("model", "layer_norm_epsilon", "1e-6", 1e-6),
        ("model", "d_inner", [8, 16], [8, 16]),
    ],
)
def test_values_are_read_as_their_annotated_type(section, key, given, read):
    recipe = build_recipe(content(**{section: {key: given}}))
    place = {
        "training": recipe.training,
        "model": recipe.model.overrides,
        "pruning": vars(recipe.pruning),
        "data": vars(recipe.data),
        "augmentation": vars(recipe.augmentation) if recipe.augmentation else {},
    }[section]
    assert place[key] == read and type(place[key]) is type(read)


@pytest.mark.parametrize(
    "section, key, value, must_be",
    [
        ("training", "learning_rate", "fast", "a number"),
        ("training", "learning_rate", True, "a number"),
        ("training", "num_rounds", 1.5, "an integer"),
        ("training", "num_rounds", "2", "an integer"),
        ("training", "method", 3, "text"),
        ("training", "use_cpu", "yes please", "true or false"),
        ("training", "use_cpu", 1, "true or false"),
        ("training", "save_strategy", "epok", r"one of \['no', 'steps', 'epoch', 'best'\]"),
        ("training", "lr_scheduler_type", "cosin", r"one of \[.*'cosine'.*\]"),
        ("training", "optim", "adam", r"one of \[.*'adamw_torch'.*\]"),
        ("model", "hidden_size", "16", "an integer"),
        ("model", "hidden_size", [16, 16], "an integer"),
        ("model", "norm", None, "text"),
        ("data", "resize", "no way", "true or false"),
        ("data", "max_train_samples", 9.5, "an integer"),
        ("data", "mean", 0.5, r"list\[float\]"),
        ("augmentation", "flip", [0.5], "a number"),
        ("pruning", "targets", "d_inner", "list"),
        ("pruning", "round_to", "4", "an integer"),
        ("pruning", "sparsity", "much", "a number"),
        ("pruning", "sparsity", {"d_inner": "much"}, "a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(section, key, value, must_be):
    with pytest.raises(RecipeError, match=f"`{section}.{key}` must be .*({must_be}).*got {re.escape(repr(value))}"):
        build_recipe(content(**{section: {key: value}}))


@pytest.mark.parametrize("value", [False, [], 0])
def test_a_section_that_is_none_is_named(value):
    with pytest.raises(RecipeError, match="`data` must be a section with keys below it, got"):
        build_recipe(content() | {"data": value})


def test_coerce_quotes_a_nested_key():
    with pytest.raises(RecipeError, match="`a.b` must be a number, got 'x'"):
        coerce({"b": "x"}, dict[str, float], "a")


# ---- keys ----
@pytest.mark.parametrize(
    "section, key, hint",
    [
        ("model", "hiden_size", "hidden_size"),
        ("model", "prset", "preset"),
        ("data", "paht", "path"),
        ("augmentation", "mixupp", "mixup"),
        ("pruning", "sparsty", "sparsity"),
        ("training", "num_round", "num_rounds"),
        ("training", "learning_rat", "learning_rate"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(section, key, hint):
    with pytest.raises(RecipeError, match=f"Unknown key `{section}.{key}` .did you mean '{hint}'"):
        build_recipe(content(**{section: {key: 1}}))


def test_a_key_like_no_other_gets_the_choices():
    with pytest.raises(RecipeError, match=r"Unknown key `pruning.zzz`; choose from \[.*'sparsity'.*'targets'\]"):
        build_recipe(content(pruning={"zzz": 1}))
    with pytest.raises(RecipeError, match=r"Unknown key `prunning` .did you mean 'pruning'.*; choose from .*'task'"):
        build_recipe({**content(), "prunning": {}})
    with pytest.raises(RecipeError, match="Unknown key `model.num_labels`"):  # the data says so
        build_recipe(content(model={"num_labels": 3}))


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(task=None), r"`task` must be one of \['image-classification', 'causal-lm'\], got None"),
        (dict(task="detection"), "`task` must be one of .*'detection'"),
        (dict(model=None), "needs a section `model`"),
        (dict(training=None), "needs a section `training`"),
        (dict(training=["a"]), "needs a section `training`"),
        (dict(pruning=None), "needs a section `pruning` for training.method=rsst"),
        (
            dict(training=dict(method="prune", round_rate=0.2), pruning=dict(sparsity=0.5)),
            "pruning: `round_rate` 0.2 removes 0.2000 .* 0.5: give it that number",
        ),
        (
            dict(training=dict(method="unstructured"), pruning=dict(importance="taylor")),
            r"pruning: Single weights are scored by one of \['magnitude_l1', 'random'\], not by 'taylor'",
        ),
        (
            dict(training=dict(method="scratch"), pruning=dict(budget="latency")),
            r"budget='latency', .* choose from \['channels', 'parameters', 'macs'\]",
        ),
        (dict(pruning=0.7), "`pruning` must be a section with keys below it, got 0.7"),
        (dict(augmentation="strong"), "`augmentation` must be a section"),
        (dict(data=["digits"]), "`data` must be a section"),
        (dict(model=dict(preset="mamba_big")), r"model: `preset` must be one of \['mamba_base'.*got 'mamba_big'"),
        (dict(model=dict(preset=None)), "model: needs either `preset` or `path`"),
        (dict(model=dict(path="x")), "model: needs either `preset` or `path`"),
        (dict(model=dict(preset=None, path="x")), "model: `path` brings its own config; .*'hidden_size'"),
        (dict(model=dict(patch_size=3)), "model: `patch_size` 3 does not divide `image_size` 8"),
        (dict(model=dict(d_inner=[1, 2, 3])), "model: `d_inner` has 3 entries but `num_hidden_layers` is 2"),
        (dict(model=dict(drop_path_rate=1.5)), r"model: `drop_path_rate` must be a number in \[0, 0.999\]"),
        (dict(data=dict(max_train_samples=0)), "data: `max_train_samples` must be"),
        (dict(augmentation=dict(flip=2)), "augmentation: `flip` must be"),
        (dict(pruning=dict(sparsity=1.0)), r"pruning: `sparsity` must be in \[0, 1\), got 1.0"),
        (dict(pruning=dict(targets=["d_iner"])), "pruning: Unknown target 'd_iner'; choose from .*'d_inner'"),
        (dict(pruning=dict(importance="tailor")), "pruning: Unknown importance 'tailor'; choose from .*'taylor'"),
        (dict(pruning=dict(sparsity={"d_inner": 0.5})), "pruning: `sparsity` names .*d_inner.* but `targets`"),
        (dict(training=dict(method="rst")), "training: `method` must be one of .*'rst'"),
        (dict(training=dict(max_steps=3)), "training: `max_steps`"),
        (dict(training=dict(learning_rate=-1.0)), "training: `learning_rate` must be >= 0.*got -1.0"),
    ],
)
def test_a_recipe_that_cannot_be_run(sections, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build_recipe(content(**sections))
    assert "\n" not in str(caught.value)


def test_arguments_that_only_this_machine_refuses_are_recipe_errors_too():
    recipe = build_recipe(content(training=dict(deepspeed="absent.json")))  # not installed, or no such file
    with pytest.raises(RecipeError, match="^training: "):
        recipe.training_arguments()


def test_reading_a_recipe_claims_no_device(tmp_path):
    """The first TrainingArguments of a process decide about its devices and its process group."""
    from accelerate.state import PartialState

    PartialState._reset_state()
    load_recipe(write_recipe(tmp_path / "r.yaml"))
    assert PartialState._shared_state == {}


# ---- files ----
@pytest.mark.parametrize(
    "text, message",
    [
        (b"task: [image", "is not valid YAML: .*line 1"),
        (b"a: b: c", "is not valid YAML"),
        (b"[" * 3000 + b"]" * 3000, "is not valid YAML: it is nested too deeply"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- a\n- b", "must hold the sections .*'task'.* got list"),
        (b"just text", "must hold the sections .* got str"),
        (b"", "must hold the sections .* got NoneType"),
        (b"task: image-classification\nmodel: {preset: mamba_tiny}\nmodel: {}\n", "`model` stands twice"),
        (b"training:\n  seed: 1\n  seed: 2\n", "`seed` stands twice.*line 3"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "odd.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="There is no recipe"):
        load_recipe(tmp_path / name)


# ---- overrides ----
def overridden(tmp_path, *overrides, **sections):
    return load_recipe(write_recipe(tmp_path / "r.yaml", **sections), list(overrides))


def test_overrides_replace_and_add(tmp_path):
    recipe = overridden(
        tmp_path,
        "training.learning_rate=1e-4",
        "training.recovery_epochs=2",
        "model.hidden_size=24",
        "model.d_inner=[40, 41]",
        "pruning.targets=[d_inner]",
        "data.max_eval_samples=null",
        "augmentation.mixup=0.5",  # a section that the file lacks
        "task=image-classification",
    )
    assert recipe.training["learning_rate"] == 1e-4 and recipe.training["recovery_epochs"] == 2.0
    assert recipe.model.overrides["hidden_size"] == 24 and recipe.model.overrides["d_inner"] == [40, 41]
    assert recipe.pruning.targets == ("d_inner",)
    assert recipe.data.max_eval_samples is None and recipe.data.max_train_samples == 96
    assert recipe.augmentation.mixup == 0.5


def test_the_last_of_two_overrides_counts(tmp_path):
    assert overridden(tmp_path, "training.seed=1", "training.seed=2").training["seed"] == 2


def test_overrides_reach_one_level_deeper(tmp_path):
    both = overridden(tmp_path, "pruning.sparsity.d_inner=0.5", "pruning.sparsity.intermediate_size=2.5e-1")
    assert both.pruning.sparsity == {"d_inner": 0.5, "intermediate_size": 0.25}
    per_target = dict(sparsity={"d_inner": 0.1, "intermediate_size": 0.2})
    one = overridden(tmp_path, "pruning.sparsity.d_inner=0.5", pruning=per_target)
    assert one.pruning.sparsity == {"d_inner": 0.5, "intermediate_size": 0.2}
    with pytest.raises(RecipeError, match="`sparsity` names .'d_inner'. but `targets`"):
        overridden(tmp_path, "pruning.sparsity.d_inner=0.5")  # of a number nothing is left for the other target


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.seed", "An override is `section.key=value`, got 'training.seed'"),
        ("seed=3", "An override is `section.key=value`, got 'seed=3'"),
        ("trainign.seed=3", "Unknown key `trainign` .did you mean 'training'"),
        ("training.sed=3", "Unknown key `training.sed` .did you mean 'seed'"),
        ("training.seed=[1", "The value of the override 'training.seed=.1' is not valid YAML"),
        ("training.seed=three", "`training.seed` must be an integer, got 'three'"),
        ("training.seed=true", "`training.seed` must be an integer, got True"),
        ("training.save_total_limit=true", "`training.save_total_limit` must be an integer, got True"),
        ("task.name=x", "`task` holds no keys"),
        ("model.hidden_size.x=3", "`model.hidden_size` must be an integer, got {'x': 3}"),
        ("training.=3", "Unknown key `training.`"),
    ],
)
def test_an_override_that_cannot_be_applied(tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        overridden(tmp_path, override)
