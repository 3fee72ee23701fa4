"""Recipes: one strict YAML file is one reproducible run. A wrong key or type is an error that names the choices."""

import dataclasses
import difflib
import enum
import types
import typing
from pathlib import Path

import yaml

from .models.configuration_mamba_rsst import MambaRsstBaseConfig
from .pruning import PruningConfig
from .tasks import TASKS, Task
from .training.arguments import RSSTConfig
from .training.augmentation import AugmentationConfig
from .training.data import ImageDataConfig
from .training.prunable import check_agreement, removed_by
from .training.text import TextDataConfig


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key and the choices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """`preset`, a shape by name, or `path`, a checkpoint to start from; other keys override the preset's config."""

    preset: str | None = None
    path: str | None = None
    overrides: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if (self.preset is None) == (self.path is None):
            raise ValueError("needs either `preset` or `path`")
        if self.path is not None and self.overrides:
            raise ValueError(f"`path` brings its own config; {sorted(self.overrides)} cannot be changed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe. `training` holds RSSTConfig's arguments by name."""

    task: str
    model: ModelSection
    data: ImageDataConfig | TextDataConfig
    augmentation: AugmentationConfig | None
    pruning: PruningConfig | None
    training: dict

    def training_arguments(self) -> RSSTConfig:
        """Raises RecipeError for settings that this machine or installation cannot follow."""
        try:
            return RSSTConfig(**self.training)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise RecipeError(f"training: {error}") from error

    def to_yaml(self) -> str:
        """The resolved recipe: loads to an equal Recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def to_dict(self) -> dict:
        start = {k: getattr(self.model, k) for k in ("preset", "path") if getattr(self.model, k) is not None}
        sections = {
            "task": self.task,
            "model": {**start, **self.model.overrides},
            "data": dataclasses.asdict(self.data),
            "augmentation": self.augmentation and dataclasses.asdict(self.augmentation),
            "pruning": self.pruning and {**dataclasses.asdict(self.pruning), "targets": list(self.pruning.targets)},
            "training": self.training,
        }
        return {k: v for k, v in sections.items() if v is not None}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's own loader lets the last of two equal keys win."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a YAML file, apply `section.key=value` overrides and validate. Raises RecipeError or FileNotFoundError."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise RecipeError(f"{str(path)!r} must hold the sections {SECTIONS}, got {type(content).__name__}.")
    for override in overrides:
        set_key(content, *parse_override(override))
    return build_recipe(content, default_output=f"runs/{Path(path).stem}")


def read_yaml(path: str | Path):
    """What a YAML file holds; a key that stands twice is an error. Raises RecipeError or FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {str(path)!r}.")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except RecursionError:
        raise RecipeError(f"{str(path)!r} is not valid YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that is not UTF-8, a date that does not exist
        raise RecipeError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error


def build_recipe(content: dict, default_output: str = "runs/run") -> Recipe:
    """A Recipe from nested dicts, as YAML reads them. Raises RecipeError."""
    check_keys(content, SECTIONS, "")
    if not isinstance(content.get("task"), str) or content["task"] not in TASKS:
        raise RecipeError(f"`task` must be one of {list(TASKS)}, got {content.get('task')!r}.")
    task = TASKS[content["task"]]
    for section in ("model", "training"):
        if not isinstance(content.get(section), dict):
            raise RecipeError(f"The recipe needs a section `{section}` with keys below it.")
    fields = _field_types(RSSTConfig)
    check_keys(content["training"], fields, "training.")
    training = {k: coerce(v, fields[k], f"training.{k}") for k, v in content["training"].items()}
    training["output_dir"] = training.get("output_dir") or default_output
    try:
        RSSTConfig.check(**training)
    except ValueError as error:
        raise RecipeError(f"training: {error}") from error
    if training.get("method") == "scratch" and content["model"].get("path") is not None:
        raise RecipeError("training.method=scratch builds a new model: it needs `model.preset`, not `model.path`.")
    pruning = _section(PruningConfig, _with_rate(content.get("pruning"), training), "pruning")
    method = training.get("method", "rsst")
    if pruning is None and method != "dense":
        raise RecipeError(f"The recipe needs a section `pruning` for training.method={method}.")
    if pruning is not None:
        try:
            rounds = {name: training[name] for name in ("round_rate", "num_rounds") if name in training}
            check_agreement(method, pruning, **rounds)
        except ValueError as error:
            raise RecipeError(f"pruning: {error}") from error
    if content.get("augmentation") is not None and not task.augments:
        raise RecipeError(f"`augmentation` does not go with task={task.name}.")
    return Recipe(
        task=task.name,
        model=_model_section(content["model"], task),
        data=_section(task.data_config, {} if content.get("data") is None else content["data"], "data"),
        augmentation=_section(AugmentationConfig, content.get("augmentation"), "augmentation"),
        pruning=pruning,
        training=training,
    )


def _with_rate(pruning, training: dict):
    """The section `pruning` with the sparsity that training.round_rate comes to, unless it names one itself."""
    if isinstance(pruning, dict) and "sparsity" not in pruning and training.get("round_rate") is not None:
        return {**pruning, "sparsity": removed_by(training["round_rate"], training.get("num_rounds", 1))}
    return pruning


SECTIONS = [f.name for f in dataclasses.fields(Recipe)]


def _model_section(content: dict, task: Task) -> ModelSection:
    # Only the configs' own fields: the many that PreTrainedConfig brings are no shapes of a model.
    fields = {
        **{k: v for k, v in _field_types(ModelSection).items() if k != "overrides"},
        **MambaRsstBaseConfig.__annotations__,
        **task.config_class.__annotations__,
    }
    check_keys(content, fields, "model.")
    values = {k: coerce(v, fields[k], f"model.{k}") for k, v in content.items()}
    start = {k: values.pop(k) for k in ("preset", "path") if k in values}
    try:
        section = ModelSection(**start, overrides=values)
        if section.preset is not None:
            if section.preset not in task.presets:
                raise ValueError(f"`preset` must be one of {sorted(task.presets)}, got {section.preset!r}")
            task.config_class.preset(section.preset, **values)
        return section
    except ValueError as error:
        raise RecipeError(f"model: {error}") from error


def _section(cls, content, name):
    if content is None:
        return None
    if not isinstance(content, dict):
        raise RecipeError(f"`{name}` must be a section with keys below it, got {content!r}.")
    fields = _field_types(cls)
    check_keys(content, fields, f"{name}.")
    try:
        return cls(**{k: coerce(v, fields[k], f"{name}.{k}") for k, v in content.items()})
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error


def _field_types(cls) -> dict[str, object]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}


def check_keys(content: dict, known, prefix: str) -> None:
    """Raises RecipeError for the first unknown key, with the one that it may have been meant for."""
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            choices = f"; choose from {sorted(known)}" if len(known) < 30 else ""
            raise RecipeError(f"Unknown key `{prefix}{key}`{hint}{choices}.")


def coerce(value, kind, name: str):
    """`value` as the annotated type; the one conversion made is to numbers, since YAML reads 1e-3 as a string."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if choices := [a for a in options if isinstance(a, type) and issubclass(a, enum.Enum)]:
            options = choices  # transformers writes `IntervalStrategy | str` where only the strategies will do
        failed = None
        # The more particular types first, so that "1e-3" becomes a number where one is allowed.
        for option in sorted(options, key=_particularity):
            try:
                return coerce(value, option, name)
            except RecipeError as error:
                failed = error
        if len(options) == 1:
            raise failed
        raise RecipeError(f"`{name}` must be {_spell(kind)}, got {value!r}.")
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return [coerce(v, args[0], name) if args else v for v in value]
    if origin is dict and isinstance(value, dict):
        return {k: coerce(v, args[1], f"{name}.{k}") if args else v for k, v in value.items()}
    if kind is float and not isinstance(value, bool):
        if isinstance(value, (int, float, str)):
            try:
                return float(value)
            except ValueError:
                pass
    elif kind is int and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        text = "no" if value is False else value  # as YAML reads a bare no
        if text in [choice.value for choice in kind]:
            return text
    elif isinstance(kind, type) and origin is None and isinstance(value, kind) and kind not in (int, float):
        return value  # true is an int to Python, and no number here
    elif isinstance(kind, type) and origin is None and kind not in (str, bool, int, float, list, dict):
        return value  # a config object: its own class checks it
    raise RecipeError(f"`{name}` must be {_spell(kind)}, got {value!r}.")


def _particularity(kind) -> int:
    order = [bool, int, float, list, dict, str]
    return order.index(kind) if kind in order else len(order) - 1


def _spell(kind) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_spell(a) for a in args)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {[choice.value for choice in kind]}"
    names = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        dict: "keys and values",
    }
    return names.get(typing.get_origin(kind) or kind) or str(kind).replace("typing.", "")


def parse_override(text: str) -> tuple[str, object]:
    """`section.key=value` -> the key and the value as YAML reads it."""
    key, equals, value = text.partition("=")
    if not equals or ("." not in key and key != "task"):
        raise RecipeError(f"An override is `section.key=value`, got {text!r}.")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"The value of the override {text!r} is not valid YAML.") from error


def set_key(content: dict, key: str, value) -> None:
    """Put a value in the place of `section.key` in a recipe's nested dicts. Raises RecipeError."""
    section, dot, name = key.partition(".")
    if key == "task":
        content["task"] = value
        return
    check_keys({section: None}, SECTIONS, "")
    if not dot:
        raise RecipeError(f"A change to a recipe names `section.key`, got {key!r}.")
    if content.get(section) is None:
        content[section] = {}
    if not isinstance(content[section], dict):
        raise RecipeError(f"`{section}` holds no keys: {key!r} has nowhere to go.")
    name, dot, inner = name.partition(".")
    if dot:  # one level more: pruning.sparsity.d_inner=0.5
        if not isinstance(content[section].get(name), dict):
            content[section][name] = {}
        content[section][name][inner] = value
    else:
        content[section][name] = value
