"""Language models through lm-eval (EleutherAI's evaluation harness): a model or a checkpoint in, its own results out.

The harness is an extra, `pip install mamba_rsst[lm]`, and is imported when first needed. It seeds every generator,
switches the model to evaluation and gives the tokenizer a padding token; here all of that is undone afterwards, so
that a model can be evaluated in the middle of a training run, which goes on as if nothing had happened.
"""

import copy
import difflib
import logging
import random
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch

from .errors import one_line
from .evaluation import place_of
from .hub import AUTO_CLASSES, load_model, read_config
from .pruning.importance import evaluation_mode


TASKS = Path(__file__).resolve().parents[1] / "recipes" / "lm" / "tasks"
"""The task files in this project's checkout: lambada_local, wikitext2_local. A wheel does not bring them."""

BATCH_SIZE = 8
BOOTSTRAP = 1000
"""Resamples behind the standard error of a perplexity. The harness's own default is 100,000."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def evaluate_lm(
    model,
    tasks: str | list[str],
    *,
    tokenizer=None,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path=None,
    data: str | None = None,
    device: torch.device | str | None = None,
    bootstrap_iters: int = BOOTSTRAP,
    log_samples: bool = False,
    progress: bool = False,
) -> dict | None:
    """The harness's results of a causal language model: {"results": {task: {"acc,none": ...}}, "configs": ..., ...}.

    model: a causal language model of transformers or of this package, or the folder or hub id of one. A model in
        memory comes back as it was: modes, device, gradients, tokenizer and random numbers.
    tasks: names, which may hold * and ?, of the harness's tasks, of this project's, and of those in `include_path`.
    tokenizer: itself, or its folder or hub id; default: what is saved beside the model.
    batch_size: sequences in one forward.  max_length: tokens the model may see at once; default the tokenizer's
        `model_max_length` where it has one, which may be far more than fits into memory, else the harness's 2048.
    limit: only the first so many documents of each task; below 1, a fraction of them.  num_fewshot: examples in front.
    include_path: folder, or folders, of further task files.
    data: folder that this project's tasks read from; default: the environment variable MAMBA_RSST_DATA.
    device: where to run; default: where the model is, and for a checkpoint cuda where there is one, else cpu.
    bootstrap_iters: resamples behind standard errors that have no formula; 0 = no standard errors at all.
    log_samples: keep what the model said to each document.  progress: show the harness's progress bars.

    In a distributed run every process evaluates by itself, and all but the first of a node return None, as in the
    harness. Raises ImportError without lm_eval; ValueError or FileNotFoundError, naming what is wrong, for an unknown
    task, a missing tokenizer or one that does not fit the model, absent data, or a setting that cannot be.
    """
    manager, names = find_tasks(tasks, include_path=include_path, data=data)
    _check(batch_size=batch_size, max_length=max_length, limit=limit, num_fewshot=num_fewshot)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    in_memory = isinstance(model, torch.nn.Module)
    source = f"The {type(model).__name__}" if in_memory else repr(str(model))
    if tokenizer is None and in_memory:
        raise ValueError(f"{source} in memory comes without its tokenizer: give `tokenizer`.")
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer or model)
    else:
        tokenizer = copy.deepcopy(tokenizer)  # the harness may give it a padding token
    if not in_memory:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(model)
    _check_fits(model, tokenizer, source)

    with ExitStack() as restore:
        restore.enter_context(_same_random_numbers())
        restore.enter_context(evaluation_mode(model))
        restore.enter_context(_quiet(progress))
        if device is not None:
            restore.enter_context(_moved(model, device))
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        return simple_evaluate(
            lm,
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            bootstrap_iters=bootstrap_iters,
            log_samples=log_samples,
        )


def find_tasks(tasks: str | list[str], *, include_path=None, data: str | None = None):
    """(the harness's TaskManager, the task names); patterns are replaced by what they match.

    Raises ImportError without lm_eval, FileNotFoundError for an absent folder, ValueError for an unknown task.
    """
    _require_harness()
    from lm_eval.tasks import TaskManager

    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if not tasks:
        raise ValueError("There is no task to evaluate: name at least one.")
    folders = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or ())
    for folder in folders:
        if not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(f"There is no folder of tasks {str(folder)!r}.")
    folders = [str(Path(folder).expanduser()) for folder in ([TASKS] if TASKS.is_dir() else []) + folders]
    metadata = {} if data is None else {"data": str(data)}
    # Indexing the thousands of tasks that the harness brings takes seconds, so only where they are asked for.
    with _quiet(progress=False):
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        if not all(task in manager.all_subtasks for task in tasks):
            manager = TaskManager(include_path=folders, metadata=metadata)
    names = []
    for task in tasks:
        matches = manager.match_tasks([task])
        if not matches:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5)
            where = "" if near else ", and none of those known has a name like it; give the folder of your own"
            hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else where
            raise ValueError(f"Unknown task {task!r}{hint}.")
        names += [name for name in matches if name not in names]
    return manager, names


def load_tokenizer(path):
    """The tokenizer in a local folder or on the Hub. Raises FileNotFoundError or ValueError where there is none."""
    from transformers import AutoTokenizer

    name = str(path)
    # Without this transformers makes up an empty tokenizer for some architectures.
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"There is no tokenizer in {name!r}: save it beside the model, or give `tokenizer` (--tokenizer)."
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"There is no tokenizer in {name!r} that can be reached: {one_line(error)}") from error
    except Exception as error:  # of the tokenizers library too, which has no class of its own
        raise ValueError(f"The tokenizer in {name!r} cannot be read: {one_line(error)}") from error


def check_language_model(path) -> None:
    """Raise ValueError or FileNotFoundError unless a folder or hub id says that it holds a causal language model."""
    kind = read_config(str(path)).get("model_type")
    if kind not in AUTO_CLASSES or AUTO_CLASSES[kind].__name__ != "AutoModelForCausalLM":
        raise ValueError(f"{str(path)!r} is no causal language model: its model_type is {kind!r}.")


def metric_rows(results: dict) -> list[dict]:
    """The numbers in the harness's results: [{task, metric, filter, value, stderr, higher_is_better, samples}].

    stderr is None where the harness has none; higher_is_better and samples are None where it does not say.
    """
    rows = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {"task": task, "metric": metric, "filter": filtered, "value": value}
                | {"stderr": stderr if isinstance(stderr, (int, float)) else None}
                | {"higher_is_better": results.get("higher_is_better", {}).get(task, {}).get(metric)}
                | {"samples": results.get("n-samples", {}).get(task, {}).get("effective")}
            )
    return rows


# ---- checks ----
def _require_harness():
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(f"This needs lm-eval: pip install mamba_rsst[lm] ({error}).") from error


def _check(*, batch_size, max_length, limit, num_fewshot):
    # A single token is scored from the one before it, so the window holds at least that one.
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"`{name}` must be an integer >= {least}, got {value!r}.")
    if limit is not None and not limit > 0:
        raise ValueError(f"`limit` must be above 0, got {limit!r}.")
    if limit is not None and limit > 1 and limit != int(limit):
        raise ValueError(f"`limit` is a number of documents, or below 1 a fraction of them; got {limit!r}.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"`num_fewshot` must not be negative, got {num_fewshot!r}.")


def _check_fits(model, tokenizer, source):
    """The model takes tokens, has a row for each that the tokenizer can give, and a token to start a text from."""
    if getattr(model, "main_input_name", None) != "input_ids" or not model.can_generate():
        raise ValueError(f"{source} is no causal language model.")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ValueError(f"The tokenizer's ids go up to {largest}, but {source} has a vocabulary of {rows}.")
    if largest < 0:
        raise ValueError(f"The tokenizer for {source} has an empty vocabulary.")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has neither a bos nor an eos token to put before a text's first word.")


# ---- what the harness changes, and who puts it back ----
@contextmanager
def _same_random_numbers():
    """Afterwards the generators of Python, NumPy and torch, on every device, stand where they stood."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def _moved(model, device):
    """The model on `device`, afterwards back where it was."""
    home = place_of(model)[0]
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown device and for a missing one
        raise ValueError(f"The device {str(device)!r} cannot be used: {one_line(error)}") from error
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def _quiet(progress):
    """Without the harness's remarks, such as that the model was passed in; without `progress`, without its bars too.

    It prints, and its bars go to whatever stderr is at the time; what it prints must not get among our own tables.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as streams:
            if not progress:
                streams.enter_context(redirect_stderr(StringIO()))
            streams.enter_context(redirect_stdout(StringIO()))
            yield
    finally:
        logger.setLevel(level)
