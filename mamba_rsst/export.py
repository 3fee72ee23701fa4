"""Getting out: a model of this package as transformers' own Mamba or in mamba_ssm's format, and where a model runs."""

import copy
import json
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .convert import config_to_mamba_ssm, convert_checkpoint
from .evaluation import count_macs_per_item, count_parameters, language_model_costs
from .hub import load_model, read_config, save_folder
from .models import MambaForCausalLM, MambaRsstConfig, config_from_transformers, config_to_transformers
from .models.configuration_mamba_rsst import TRANSFORMERS_TYPES
from .pruning import find_groups, pad_


_CONFIG_TO = {"transformers": config_to_transformers, "mamba_ssm": config_to_mamba_ssm}
FORMATS = tuple(_CONFIG_TO)
MIXER_WIDTHS = ("d_inner", "d_state", "dt_rank")


@dataclass(frozen=True)
class Export:
    """What was written: `model_type` (None in mamba_ssm's format, which has no such field), `dtype`, and `after`, the
    costs of the written model; with padding, `padded` (width -> (one int a layer, the width now)) and the costs
    `before` it. Costs are those of `language_model_costs`."""

    model_type: str | None
    dtype: str
    after: dict[str, int]
    before: dict[str, int]
    padded: dict[str, tuple[list[int], int]]


def export_checkpoint(
    path: str | os.PathLike, out: str | os.PathLike, format: str = "transformers", pad: bool = False
) -> Export:
    """Write a checkpoint to the new folder `out` in a format of others, with its generation config and tokenizer.

    path: a folder or hub id of this package's language model, or of any that `convert_checkpoint` reads.
    format: "transformers": model type mamba, or falcon_mamba for a model with mixer norms; loads with
        `AutoModelForCausalLM.from_pretrained` without this package or remote code. "mamba_ssm": config.json and
        pytorch_model.bin for that library's MambaLMHeadModel.
    pad: fill layers of different widths with zeros up to the widest, see `pad_`.
    Raises FileNotFoundError or ValueError, with nothing written, for what cannot be read or the format cannot express.
    """
    name, out = str(path), Path(out).expanduser()
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; choose from {list(FORMATS)}.")
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; choose a new folder.")
    model_type = read_config(name).get("model_type")
    if model_type in TRANSFORMERS_TYPES and format == "transformers":
        raise ValueError(f"{name!r} is transformers' own {model_type} already.")
    if model_type == "mamba_rsst_vision":
        raise ValueError(
            f"{name!r} is an image classifier, for which {format} has no architecture; it runs with this package or, "
            "in transformers, with trust_remote_code=True."
        )
    model = load_model(name) if model_type == "mamba_rsst" else convert_checkpoint(name)
    uneven = uneven_widths(model.config)
    try:
        content = _CONFIG_TO[format](_evened(model.config))
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be exported to {format}: {error}") from error
    if uneven and not pad:
        raise ValueError(
            f"The layers of {name!r} differ in {_list_widths(uneven)}, and {format} has one width for all: fill them "
            "with zeros up to the widest (--pad), or keep the model as it is, which runs with this package or with "
            "trust_remote_code=True."
        )
    before = language_model_costs(model.config, model.dtype)
    if uneven:
        pad_(model, {target: max(widths) for target, widths in uneven.items()})
    after = language_model_costs(model.config, model.dtype)
    if format == "transformers":
        save_folder(to_transformers(model).save_pretrained, name, out)
    else:
        save_folder(lambda folder: _write_mamba_ssm(model, content, folder), name, out)
    padded = {target: (widths, max(widths)) for target, widths in uneven.items()}
    return Export(content.get("model_type"), str(model.dtype).removeprefix("torch."), after, before, padded)


def to_transformers(model: MambaForCausalLM) -> PreTrainedModel:
    """The model as transformers' own MambaForCausalLM or FalconMambaForCausalLM, sharing its tensors.

    Raises ValueError for what those classes do not have: MLPs, layer norms, layers of different widths.
    """
    config = AutoConfig.for_model(**config_to_transformers(model.config))
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    stock.load_state_dict(model.state_dict(), assign=True)  # strict: a name or a shape that does not fit is an error
    stock.tie_weights()
    for module in stock.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Not in any checkpoint: the ones that FalconMamba hands to kernels as the weights of its weightless norms.
            setattr(module, name, torch.ones(buffer.shape, dtype=model.dtype, device=model.device))
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.train(model.training)


def _write_mamba_ssm(model: MambaForCausalLM, content: dict, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    weights = {k.replace("backbone.embeddings.", "backbone.embedding."): v for k, v in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")


def uneven_widths(config: MambaRsstConfig) -> dict[str, list[int]]:
    """The mixer's widths that differ between layers: name -> one int a layer."""
    return {name: config.widths(name) for name in MIXER_WIDTHS if len(set(config.widths(name))) > 1}


def _evened(config: MambaRsstConfig) -> MambaRsstConfig:
    """The config after padding."""
    config = copy.deepcopy(config)
    for name, widths in uneven_widths(config).items():
        config.set_widths(name, max(widths))
    return config


def _list_widths(uneven: dict[str, list[int]]) -> str:
    def values(widths):
        return str(widths) if len(widths) <= 12 else f"({min(widths)} to {max(widths)})"

    return ", ".join(f"{name} {values(widths)}" for name, widths in uneven.items())


# ---- what a model is, and where it runs ----
def inspect_model(path: str | os.PathLike) -> dict:
    """{path, class, model_type, dtype, layers: [{target: width}], hidden_size, prunable, parameters,
    runs_in: [Place as a dict]}, and "macs_per_image" of an image classifier; "macs_per_token", "state_bytes" and
    "tied_embeddings" of a language model. Raises what `load_model` raises."""
    name = str(path)
    model = load_model(name)
    groups = find_groups(model)
    per_layer = [group for group in groups if group.layer is not None]
    layers = [{} for _ in range(1 + max(group.layer for group in per_layer))]
    for group in per_layer:
        layers[group.layer][group.target] = group.size
    found = {
        "path": name,
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "prunable": list(dict.fromkeys(group.target for group in groups)),
        "layers": layers,
        "hidden_size": model.config.hidden_size,
        "parameters": count_parameters(model),
    }
    if model.main_input_name == "pixel_values":
        c = model.config
        image = {"pixel_values": torch.zeros(1, c.num_channels, c.image_size, c.image_size)}
        found["macs_per_image"] = count_macs_per_item(model, image)
    else:
        # Counted on this package's class for all, so that the two classes of one model have one figure.
        costs = language_model_costs(_as_ours(model.config), model.dtype)
        found |= {key: costs[key] for key in ("macs_per_token", "state_bytes")}
        found["tied_embeddings"] = model.config.tie_word_embeddings
    return {**found, "runs_in": [asdict(place) for place in where_it_runs(name, model.config)]}


def _as_ours(config) -> MambaRsstConfig:
    return config_from_transformers(config.to_dict()) if config.model_type in TRANSFORMERS_TYPES else config


@dataclass(frozen=True)
class Place:
    """A program, whether it runs the folder as it is, why or why not, and the command that would make it so."""

    where: str
    runs: bool
    why: str
    command: str | None = None


def where_it_runs(name: str, config) -> list[Place]:
    """The programs that can or cannot run the checkpoint `name`, whose config was loaded, as it is.

    Of programs that are not installed here this says what their code reads and refuses, not what was run.
    """
    if config.model_type == "mamba_rsst_vision":
        return [
            Place("mamba_rsst", True, "its own class"),
            _remote_code(name, "AutoModelForImageClassification"),
            *(Place(p, False, "it has no such image classifier") for p in ("transformers", "vLLM", "llama.cpp")),
        ]
    stock = config.model_type in TRANSFORMERS_TYPES
    ours = _as_ours(config)
    reason, command = (None, None) if stock else _way_to_transformers(name, ours)
    places = [Place("mamba_rsst", True, "read by name" if stock else "its own class")]
    if not stock:
        places.append(_remote_code(name, "AutoModelForCausalLM"))
    places.append(Place("transformers", stock, reason or f"model type {config.model_type}", command))
    for program, objection, fits in (
        ("vLLM", _vllm_objection(ours), "its MambaForCausalLM takes all widths from config.json"),
        ("llama.cpp", _llama_cpp_objection(ours), _llama_cpp_fits(ours)),
    ):
        if stock:
            places.append(Place(program, objection is None, objection or fits))
        elif objection or command is None:
            places.append(Place(program, False, objection or reason))
        else:
            places.append(Place(program, False, "it reads transformers' own Mamba", command))
    places.append(_mamba_ssm(name, ours))
    return places


def _way_to_transformers(name, config) -> tuple[str, str | None]:
    """Why transformers' own classes do not take this model, and the command that makes one that they take."""
    try:
        config_to_transformers(_evened(config))
    except ValueError as error:
        return str(error).rstrip("."), None
    if uneven := uneven_widths(config):
        return f"its layers differ in {_list_widths(uneven)}", f"mamba-rsst export {shlex.quote(name)} OUT --pad"
    return "it is in the format of this package", f"mamba-rsst export {shlex.quote(name)} OUT"


def _remote_code(name, auto_class) -> Place:
    where = "transformers, trust_remote_code=True"
    places = read_config(name).get("auto_map")
    place = places.get(auto_class) if isinstance(places, dict) else None
    file = str(place or "").rpartition("--")[2].partition(".")[0] + ".py"
    if file == ".py" or (Path(name).is_dir() and not (Path(name) / file).is_file()):
        return Place(where, False, "the model's code is not beside its weights: load it and save it again")
    return Place(where, True, f"{auto_class}, with the code beside the weights")


def _vllm_objection(config) -> str | None:
    # vllm-project/vllm, vllm/model_executor/models/mamba.py: one MambaDecoderLayer from config.intermediate_size,
    # state_size, time_step_rank, conv_kernel, use_bias, use_conv_bias, with the B/C/dt norms where model_type is
    # falcon_mamba. Its kernel (csrc/mamba/mamba_ssm/selective_scan_fwd.cu) checks dstate <= 256.
    return f"d_state is {config.d_state}, above its kernel's 256" if max(config.widths("d_state")) > 256 else None


def _llama_cpp_objection(config) -> str | None:
    # ggml-org/llama.cpp, conversion/mamba.py: assert d_inner == 2 * d_model. src/models/mamba.cpp: "only an expansion
    # factor of 2 is supported for now"; the convolution's bias is required, in_proj and out_proj have none.
    if max(config.widths("d_inner")) != 2 * config.hidden_size:
        width, twice = max(config.widths("d_inner")), 2 * config.hidden_size
        return f"it requires d_inner = 2 × hidden_size = {twice}, here {width}"
    if config.use_bias:
        return "its Mamba has no biases in in_proj and out_proj"
    if not config.use_conv_bias:
        return "its Mamba requires the convolution's bias"
    return None


def _llama_cpp_fits(config) -> str:
    fits = "d_inner is 2 × hidden_size, as its Mamba requires"
    if config.mixer_rms_eps in (None, config.layer_norm_epsilon):
        return fits
    # src/models/mamba-base.cpp calls build_norm for B, C and dt, which knows one epsilon: layer_norm_epsilon.
    return f"{fits}; its norms of B, C and dt have the epsilon {config.layer_norm_epsilon}, not {config.mixer_rms_eps}"


def _mamba_ssm(name, config) -> Place:
    try:
        config_to_mamba_ssm(_evened(config))
    except ValueError as error:
        return Place("mamba_ssm", False, str(error).rstrip("."))
    command, uneven = f"mamba-rsst export {shlex.quote(name)} OUT --format mamba_ssm", uneven_widths(config)
    why = f"its layers differ in {_list_widths(uneven)}" if uneven else "it reads its own format"
    return Place("mamba_ssm", False, why, command + (" --pad" if uneven else ""))
