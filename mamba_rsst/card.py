"""The model card: README.md of a finished run, every number in it from the run's results or its recipe."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .report import MISSING, results_markdown


METHODS = {
    "rsst": """The network was trained, its channels were scored, and the lowest were decayed away under a growing
penalty while the rest learned to do without them; then cut out (regularised structured sparsity training, RSST).""",
    "refill": """The network was trained, an unstructured magnitude mask told how many channels each layer needs, the
best ones were kept whole and the others were cut out (refill, Chen et al. 2022).""",
    "prune": """The network was trained, its channels were scored, and the lowest were cut out.""",
    "unstructured": """The network was trained, and the smallest of its single weights were set to zero and kept there
(unstructured magnitude pruning). Its tensors are as large as before: on ordinary hardware it is not faster.""",
}
SCRATCH = """Ordinary training from new weights, of a network as small as pruning would have left it: the control that
a pruned one must beat."""
TARGETS = {"d_inner": "channels of the state-space layers", "intermediate_size": "neurons of the MLPs"}
NOT_PRUNED = "It is not pruned: the baseline that pruned models are compared with."
PRUNED = """It was made smaller by *structured pruning*: whole channels were taken out of its layers. The tensors
really are smaller, so it needs less memory and arithmetic on any hardware, without sparse kernels."""
MASKED = "Single weights of it are zero. It is as large and as fast as it was."


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a task's card says."""

    kind: str
    """What the model is, after "A Mamba"."""
    pipeline: str
    tag: str
    auto_class: str
    use: str
    """Lines of Python that use `pipe`, a pipeline."""
    metrics: tuple[str, ...]
    """Keys of a row; the front matter reports the first that the last row has, which the hub calls alike."""
    limits: str
    """What the quality was measured on, and what it was not."""


WORDS = {
    "image-classification": Words(
        kind="image classifier",
        pipeline="image-classification",
        tag="vision",
        auto_class="AutoModelForImageClassification",
        use='print(pipe("image.png"))',
        metrics=("accuracy",),
        limits="Accuracy is of one run with one seed, measured on {dataset} alone; by class it was not measured.",
    ),
    "causal-lm": Words(
        kind="language model",
        pipeline="text-generation",
        tag="text-generation",
        auto_class="AutoModelForCausalLM",
        use='print(pipe("Once upon a time", max_new_tokens=20))',
        metrics=("accuracy", "perplexity"),
        limits="Quality is of one run with one seed, measured on {dataset} alone; perplexity is by this tokenizer.",
    ),
}


def model_card(
    results: dict, recipe_yaml: str, *, base_model=None, library_name="transformers", repo_hint="your-name/your-model"
) -> str:
    """README.md for the model of the last row. Every number in it comes from `results` or the recipe.

    `base_model` and the dataset enter the front matter only if they can be hub ids; a path shows its last part alone.
    The figures are figures/widths.png if `results` has widths, and figures/training.png unless its `trained` is False.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    words = WORDS[results["task"]]
    row, hub_dataset, dataset = results["rows"][-1], _hub_id(results["dataset"]), Path(results["dataset"]).name
    metric = next((name for name in words.metrics if row.get(name) is not None), words.metrics[-1])
    measured = {"dataset_type": hub_dataset or dataset, "dataset_name": dataset, "task_type": words.pipeline}
    measured |= {"metric_type": metric, "metric_value": row.get(metric)}
    front = ModelCardData(
        library_name=library_name,
        pipeline_tag=words.pipeline,
        tags=["mamba", words.tag, *["pruning"] * (row["name"] != "dense"), "mamba_rsst"],
        datasets=hub_dataset,
        base_model=_hub_id(base_model),
        metrics=[metric],
        model_name=repo_hint.split("/")[-1],
        eval_results=[EvalResult(**measured)] if row.get(metric) is not None else None,
    )
    text = _card_text(results, words, recipe_yaml.strip("\n"), dataset, repo_hint)
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{text}"))  # raises if the hub could not read it


def _card_text(results, words, recipe, dataset, repo) -> str:
    last = results["rows"][-1]["name"]
    figures = "![Channels kept in each layer](figures/widths.png)\n\n" if results.get("widths") else ""
    figures += "![Loss, quality and penalty](figures/training.png)" if results.get("trained", True) else ""
    method = method_of(results)
    done = [METHODS.get(method, f"Method: {method or MISSING}.")]
    done[0] += "\nWhat was left was then trained on to recover.\n" if last == "recovered" else "\n"
    for target, removed in results.get("channel_sparsity", {}).items():
        done.append(f"- {TARGETS.get(target, 'channels')} (`{target}`): {removed:.1%} removed")
    done += [f"- parameters: {results['param_reduction']:.1%} fewer"] if "param_reduction" in results else []
    if "weight_sparsity" in results:
        done.append(f"- weights that are zero: {results['weight_sparsity']:.1%} of those that may be masked")
    if last == "dense":
        done = [SCRATCH if method == "scratch" else "Ordinary training; no channel was removed."]
    done = "\n".join(done)
    minutes = f"{results['seconds'] / 60:.1f}" if "seconds" in results else MISSING
    versions = ", ".join(" ".join(map(str, item)) for item in results.get("versions", {}).items())
    return f"""# {repo.split("/")[-1]}

A Mamba {words.kind} (a state-space model in place of attention) for {dataset}.
{NOT_PRUNED if last == "dense" else MASKED if method == "unstructured" else PRUNED}

{results_markdown(results)}

{figures}

## How to use it

```python
from transformers import {words.auto_class}, pipeline

# without the package: runs the model code kept in this repository
pipe = pipeline("{words.pipeline}", model="{repo}", trust_remote_code=True)
{words.use}

# with it: importing the package registers the architecture, so no remote code has to be trusted
import mamba_rsst

model = {words.auto_class}.from_pretrained("{repo}")
```

## How it was made

{done}

Seed {results.get("seed", MISSING)}, {minutes} minutes, with {versions or MISSING}.

<details><summary>The recipe</summary>

````yaml
{recipe}
````

</details>

## Limitations

- {words.limits.format(dataset=dataset)}
- Speed and memory hold for the device and batch size named; elsewhere the ratios differ.

## Citation

Mamba [arXiv:2312.00752](https://arxiv.org/abs/2312.00752), Vision Mamba [2401.09417](https://arxiv.org/abs/2401.09417),
structured lottery tickets (Chen et al. 2022) [2202.04736](https://arxiv.org/abs/2202.04736).
"""


def method_of(results: dict) -> str | None:
    """The method by the name that METHODS has for it."""
    method = results.get("method")
    if method == "refill" and results.get("allocation") == "scores":
        return "prune"  # Refill without its unstructured mask
    return method


NOT_ON_THE_HUB = ("digits", "induction", "selective_copying")
"""Data sets that a library brings or a program generates."""


def _hub_id(name) -> str | None:
    """The name if it can be on the hub; None for nothing, for a path, and for data that are not from there."""
    known = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name or "")) and not os.path.exists(name)
    return str(name) if known and name not in NOT_ON_THE_HUB else None
