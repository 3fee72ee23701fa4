"""Checkpoints in and out: what can be loaded, saved and uploaded, with one clear sentence where it cannot."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import cached_file, logging

from .errors import one_line


AUTO_CLASSES = {
    "mamba_rsst": AutoModelForCausalLM,
    "mamba_rsst_vision": AutoModelForImageClassification,
    "mamba": AutoModelForCausalLM,
    "falcon_mamba": AutoModelForCausalLM,
}
"""model_type -> the Auto class that loads it."""


def load_model(path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """A checkpoint from a local folder or the Hub, every weight accounted for; kwargs go to from_pretrained.

    Raises FileNotFoundError or ValueError naming what is wrong: no such folder, no config, an architecture that is not
    a Mamba, missing, extra or ill-fitting weights.
    """
    name = str(path)
    if _is_local(name):
        model_type = read_config(name).get("model_type")
        if not isinstance(model_type, str) or model_type not in AUTO_CLASSES:
            raise ValueError(f"{name!r} has model_type {model_type!r}; supported are {sorted(AUTO_CLASSES)}.")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"Neither a folder nor a model on the Hub that can be reached: {name!r}.") from error
    except Exception as error:  # whatever a config that makes no sense sets off: ValueError, KeyError, AttributeError
        raise ValueError(f"{name!r} has a config.json that describes no model: {one_line(error)}") from error
    if config.model_type not in AUTO_CLASSES:
        raise ValueError(f"{name!r} has model_type {config.model_type!r}; supported are {sorted(AUTO_CLASSES)}.")
    return load_checked(AUTO_CLASSES[config.model_type], name, config=config, **kwargs)


def read_config(name: str) -> dict:
    """config.json of a local folder or of a model on the Hub, as it stands there; {} if it holds no mapping.

    Raises FileNotFoundError or ValueError naming what is wrong.
    """
    if _is_local(name) and not Path(name).is_dir():
        raise FileNotFoundError(f"There is no model folder {name!r}.")
    if _is_local(name) and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name!r} has no config.json: it is not a saved model.")
    try:
        file = Path(cached_file(name, "config.json"))
    except OSError as error:
        raise FileNotFoundError(f"Neither a folder nor a model on the Hub that can be reached: {name!r}.") from error
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name!r} has a config.json that is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def load_checked(loader, name: str, state_dict: dict | None = None, **kwargs) -> PreTrainedModel:
    """`loader.from_pretrained(name)`, or from a state dict that was read from there, every weight accounted for.

    Raises FileNotFoundError or ValueError for weights that are absent, damaged, missing, extra or ill-fitting.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is said once, below
    try:
        source = {"state_dict": state_dict, "pretrained_model_name_or_path": None if state_dict else name}
        model, info = loader.from_pretrained(
            **source, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except OSError as error:
        raise FileNotFoundError(f"{name!r} has no weights that can be read: {one_line(error)}") from error
    except Exception as error:  # damaged files set off what they will: SafetensorError, struct.error, KeyError
        what = "are damaged" if type(error).__name__ == "SafetensorError" else "cannot be loaded"
        raise ValueError(f"The weights of {name!r} {what}: {one_line(error) or type(error).__name__}") from error
    finally:
        logging.set_verbosity(verbosity)
    for kind, what in (
        ("mismatched_keys", "have another shape than its config says"),
        ("missing_keys", "are missing"),
        ("unexpected_keys", "are not part of this architecture"),
    ):
        if info[kind]:
            keys = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info[kind])
            raise ValueError(f"{name!r}: {len(keys)} of its weights {what}, the first is {keys[0]!r}.")
    return model


# What lies beside a model's weights and config and goes wherever they go.
_COMPANIONS = (
    *("preprocessor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*"),
    *("merges.txt", "chat_template*"),
)


def save_folder(write: Callable[[Path], None], source: str, out: Path) -> None:
    """Save a model to the new folder `out`: `write(folder)` beside it, then rename, so that it is whole or not there.

    The tokenizer's and the image processor's files of `source`, the folder or hub id it came from, go along.
    """
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(beside)
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=list(_COMPANIONS)))
        for pattern in _COMPANIONS:
            for file in folder.glob(pattern):
                if file.is_file():
                    shutil.copy2(file, beside)
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def push_folder(folder: str | os.PathLike, repo: str, private: bool = False, message: str | None = None) -> str:
    """Upload a saved model to the Hub, in one commit; the repository is made if it is not there. Returns its address.

    repo: "name" or "user/name".  private: of a repository that is made now.
    What a run keeps for itself (its stages, logs of the trainer, states) stays here.
    Raises FileNotFoundError or ValueError naming what is wrong: no model, no access, no connection.
    """
    from .training.rounds import NOT_UPLOADED

    name, path = str(folder), Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"There is no model folder {name!r}.")
    read_config(str(path))
    if not any(path.glob("*.safetensors")) and not (path / "pytorch_model.bin").is_file():
        raise FileNotFoundError(f"{name!r} has no weights: it is not a saved model.")
    try:
        api = HfApi()
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=path,
            commit_message=message or "Upload model",
            ignore_patterns=NOT_UPLOADED,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"{name!r} could not be pushed to {repo!r}: {one_line(error)}") from error
    return str(made)


def _is_local(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
