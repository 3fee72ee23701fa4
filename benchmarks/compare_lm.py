"""Which way of pruning keeps a language model's perplexity? Every method from one dense model, beside a dense half.

    python benchmarks/compare_lm.py OUT [--data DIR] [--tokenizer DIR] [--scale 0.5] [--tasks lambada_local]
        [--task-data DIR] [--text wiki=FILE] [a.b=c ...]

Runs recipes/lm/imdb-30m-*.yaml in one process: the text is tokenised once, and the dense model is trained once and the
others start from it. The table is printed anew after every run, each method against the dense half, and written to
OUT/comparison.json and OUT/comparison.md. What has been finished in OUT already is not run or evaluated again; a run
that was interrupted goes on.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mamba_rsst  # noqa: F401  registers the architecture
from mamba_rsst.evaluation import place_of
from mamba_rsst.lm_evaluation import evaluate_lm, find_tasks, metric_rows
from mamba_rsst.recipe import load_recipe
from mamba_rsst.report import write_atomic
from mamba_rsst.run import RECIPE_FILE, RESULTS_FILE, run_recipe
from mamba_rsst.tasks import TASKS
from mamba_rsst.training.text import TextDataConfig, pack_split
from mamba_rsst.training.text_sources import TextSource


RECIPES = Path(__file__).parents[1] / "recipes" / "lm"
ORDER = ("dense", "half", "rsst-distill", "rsst", "taylor", "magnitude", "refill")
"""The recipes, the two that the others are compared with first."""
EPOCHS = ("num_train_epochs", "rsst_epochs", "recovery_epochs")
LM_EVAL_FILE = "lm_eval.json"
LM_EVAL_BATCH = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder for the runs")
    parser.add_argument("--family", default="imdb-30m", help="recipes/lm/FAMILY-*.yaml")
    parser.add_argument("--only", nargs="+", default=ORDER, help=f"of {list(ORDER)}")
    parser.add_argument("--data", help="data.path of every recipe")
    parser.add_argument("--tokenizer", help="data.tokenizer of every recipe")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the epochs of every stage")
    parser.add_argument("--tasks", default="", help="tasks of lm-eval too, with commas between")
    parser.add_argument("--task-data", metavar="DIR", help="folder of the tasks' data; default: MAMBA_RSST_DATA")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="perplexity on this text too")
    parser.add_argument("overrides", nargs="*", help="section.key=value for every recipe")
    args, rest = parser.parse_known_args()
    args.overrides += rest
    args.tasks = [name for name in args.tasks.split(",") if name]
    if args.tasks:
        find_tasks(args.tasks, data=args.task_data)  # an unknown one is an error now, not after the first run
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data, rows = None, {}
    for name in args.only:
        recipe = _recipe(args, name)
        folder, started = out / name, time.perf_counter()
        if not (folder / RESULTS_FILE).is_file():
            data = data or TASKS[recipe.task].load_data(recipe)
            run_recipe(recipe, resume=(folder / RECIPE_FILE).is_file(), data=data)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        rows[name] = _row(folder, recipe, args.text) | _lm_eval(folder, recipe, args)
        rows[name]["wall_seconds"] = round(time.perf_counter() - started, 1)
        write_atomic(out / "comparison.json", json.dumps(rows, indent=1))
        write_atomic(out / "comparison.md", table := _markdown(rows))
        print(f"\n{table}\n", flush=True)


def _recipe(args, name):
    overrides = [f"training.output_dir={Path(args.out) / name}", *args.overrides]
    overrides += [f"data.path={args.data}"] if args.data else []
    overrides += [f"data.tokenizer={args.tokenizer}"] if args.tokenizer else []
    file = RECIPES / f"{args.family}-{name}.yaml"
    training = load_recipe(file).training
    overrides += [f"training.{key}={training[key] * args.scale}" for key in EPOCHS if training.get(key)]
    if load_recipe(file).model.path is not None:
        overrides = [o for o in overrides if not o.startswith("model.")] + [f"model.path={Path(args.out) / 'dense'}"]
    return load_recipe(file, overrides)


def _row(folder: Path, recipe, texts) -> dict:
    results = json.loads((folder / RESULTS_FILE).read_text())
    rows = {row["name"]: row for row in results["rows"]}
    last = results["rows"][-1]
    row = {"cut": rows.get("cut", {}).get("perplexity"), "perplexity": last["perplexity"]}
    row |= {key: last[key] for key in ("parameters", "macs", "tokens_per_s")} | {
        "seconds": round(results["seconds"], 1)
    }
    if not texts:
        return row
    model = AutoModelForCausalLM.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = TASKS[recipe.task].load_tokenizer(recipe)
    for text in texts:
        name, _, path = text.partition("=")
        config = TextDataConfig(path=path, tokenizer="bytes", block_size=recipe.data.block_size)
        row[name] = perplexity(model, pack_split(config, TextSource(path), "", tokenizer))
    return row


def _lm_eval(folder: Path, recipe, args) -> dict:
    """{"lm_eval": the harness's numbers in windows of the block size}, kept beside the model. {} without tasks."""
    if not args.tasks:
        return {}
    file = folder / LM_EVAL_FILE
    if not file.is_file():
        limits = {"batch_size": LM_EVAL_BATCH, "max_length": recipe.data.block_size}
        results = evaluate_lm(folder, args.tasks, data=args.task_data, **limits)
        write_atomic(file, json.dumps(metric_rows(results), indent=1))
    return {"lm_eval": json.loads(file.read_text())}


@torch.inference_mode()
def perplexity(model, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """exp of the mean loss a token over blocks (M, L), each read by itself."""
    device, total = place_of(model)[0], 0.0
    for part in blocks.split(batch_size):
        ids = part.to(device).long()
        total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(part)
    return float(torch.tensor(total / len(blocks), dtype=torch.float64).exp())


def _markdown(rows: dict) -> str:
    """One line a run, its last perplexity against the dense half's."""
    first = next(iter(rows.values()))
    texts = [key for key in first if key not in _KNOWN]
    scores = [f"{row['task']} {row['metric']}" for row in first.get("lm_eval", ()) if row["metric"] not in _LEFT_OUT]
    titles = ["Run", "Right after the cut", "Perplexity", "against half", *texts, *scores]
    titles += ["Params", "Tokens / s", "Seconds"]
    lines = [titles, [":--", *["--:"] * (len(titles) - 1)]]
    half = rows.get("half", {}).get("perplexity")
    for name, row in rows.items():
        against = f"{row['perplexity'] / half - 1:+.1%}" if half else "–"
        cells = [name, f"{row['cut']:,.2f}" if row["cut"] else "–", f"{row['perplexity']:,.2f}", against]
        cells += [f"{row[key]:,.2f}" for key in texts]
        cells += [_score(score) for score in row.get("lm_eval", ()) if score["metric"] not in _LEFT_OUT]
        lines.append([*cells, f"{row['parameters']:,}", f"{row['tokens_per_s']:,.0f}", f"{row['seconds']:,.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _score(row: dict) -> str:
    def shown(value):
        return f"{value:,.0f}" if value >= 100 else f"{value:.4f}" if value < 10 else f"{value:.2f}"

    return shown(row["value"]) + ("" if row["stderr"] is None else f" ± {shown(row['stderr'])}")


_KNOWN = {"cut", "perplexity", "parameters", "macs", "tokens_per_s", "seconds", "wall_seconds", "lm_eval"}
_LEFT_OUT = {"byte_perplexity"}
"""It is 2 to the power of bits_per_byte."""


if __name__ == "__main__":
    main()
