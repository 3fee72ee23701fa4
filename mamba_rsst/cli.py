"""The command line, one function a command. The longer ones are in `commands`. Bad input: one sentence, exit 2."""

import argparse
import os
import sys

from .commands import checkpoints, measuring
from .commands.arguments import fraction


DEBUG_VARIABLE = "MAMBA_RSST_DEBUG"


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command in ("train", "sweep") and all("=" in word and not word.startswith("-") for word in rest):
        args.overrides += rest  # argparse takes no positional arguments behind an option: train RECIPE --resume a.b=c
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading and writing weights; those of training and evaluation stay
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"mamba-rsst {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; go on with --resume" if args.command in ("train", "sweep") else ""
        print(f"\nmamba-rsst {args.command}: interrupted{hint}.", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mamba-rsst",
        description="Make Mamba models really smaller and really faster.",
        epilog=f"Set {DEBUG_VARIABLE}=1 to see where an error comes from.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train and prune as a recipe says")
    train.add_argument("recipe", help="YAML file, see recipes/")
    train.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="changes to the recipe")
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run, same recipe")
    train.set_defaults(run=_train)

    sweep = commands.add_parser("sweep", help="many runs from one file, gathered into one table and one figure")
    sweep.add_argument("sweep", help="YAML file, see recipes/sweeps/")
    sweep.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="changes to every run; runs.NAME.section.key=value to one; output_dir=FOLDER to the sweep",
    )
    sweep.add_argument("--resume", action="store_true", help="go on with a sweep, or join one that is going on")
    sweep.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="RUN",
        help="make only the runs of this name or title, or pattern such as '*seed 0'; may be repeated, in this order",
    )
    sweep.add_argument("--dry-run", action="store_true", help="print the runs, write nothing")
    sweep.set_defaults(run=_sweep)

    prune = commands.add_parser("prune", help="cut a checkpoint in one shot, without training")
    prune.add_argument("model", help="folder or hub id")
    prune.add_argument("out", help="folder for the smaller model; must not exist")
    prune.add_argument("--target", action="append", required=True, help="width to prune; may be repeated")
    amount = prune.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--sparsity",
        action="append",
        metavar="FRACTION",
        type=fraction,
        help="fraction to remove, in [0, 1); TARGET=FRACTION, repeated, for one of each target",
    )
    amount.add_argument("--speedup", type=float, help="with --budget latency: how many times faster, such as 1.5")
    prune.add_argument(
        "--budget", default="channels", help="of what: channels (default), parameters, macs, latency measured here"
    )
    prune.add_argument("--scope", help="global or layer; default: global where the architecture allows it")
    prune.add_argument(
        "--importance", help="score of a channel; default magnitude_l2, for num_hidden_layers leave_one_out"
    )
    prune.add_argument("--floor", type=float, default=0.1, help="fraction each layer keeps at least (default 0.1)")
    prune.add_argument("--round-to", type=int, default=8, help="kept widths are multiples of this (default 8)")
    prune.add_argument(
        "--dt-rank-method", default="select", help="select channels of dt_rank (default), or svd: singular directions"
    )
    prune.add_argument("--seed", type=int, default=0, help="of the random score")
    prune.add_argument(
        "--data",
        help="for scores that look at data. Images: digits, a folder or a hub id; text: a .txt, .jsonl or .parquet "
        "file, or a folder of them",
    )
    prune.add_argument("--samples", type=int, help="images or sequences of it (default 512 or 64)")
    prune.add_argument("--resize", action="store_true", help="scale and centre-crop images of other sizes")
    prune.add_argument("--seq-len", type=int, default=256, help="tokens of a sequence (default 256)")
    prune.add_argument("--batch-size", type=int, default=1, help="of the latency that is measured (default 1)")
    prune.add_argument("--device", help="where scores and latency are computed (default cpu)")
    prune.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    prune.set_defaults(run=checkpoints.prune)

    inspect = commands.add_parser("inspect", help="widths and costs of a checkpoint, and where it runs")
    inspect.add_argument("model", help="folder or hub id")
    inspect.add_argument("--json", metavar="FILE", help="write it there too; -: to stdout, and nothing else")
    inspect.set_defaults(run=checkpoints.inspect)

    evaluate = commands.add_parser(
        "eval", help="accuracy and cost of an image classifier; with --tasks, a language model through lm-eval"
    )
    evaluate.add_argument("model", help="folder or hub id")
    evaluate.add_argument("--batch-size", type=int, help="default 64 images, or 8 texts")
    evaluate.add_argument("--device", help="default: cuda where there is one, else cpu")
    evaluate.add_argument(
        "--data",
        help="images: digits, a folder or a hub id, default what the model was trained on; with --tasks: the folder "
        "of the local tasks' data, default MAMBA_RSST_DATA in the environment",
    )
    images = evaluate.add_argument_group("image classifiers")
    images.add_argument("--split", help="split to evaluate (default: the recipe's, or test)")
    images.add_argument("--max-samples", type=int, help="only the first so many images")
    images.add_argument(
        "--resize", action="store_true", default=None, help="scale and centre-crop those of other sizes"
    )
    words = evaluate.add_argument_group("language models")
    words.add_argument("--tasks", help="tasks of lm-eval, with commas between: lambada_local,wikitext2_local")
    words.add_argument("--against", metavar="DENSE", help="model to compare with, in the same table")
    words.add_argument("--tokenizer", help="folder or hub id; default: what is saved beside the model")
    words.add_argument("--include-path", action="append", metavar="FOLDER", help="more task files; may be repeated")
    words.add_argument("--limit", type=float, help="only the first so many documents of a task; below 1, a fraction")
    words.add_argument("--num-fewshot", type=int, help="examples in front of each question")
    words.add_argument(
        "--max-length", type=int, help="tokens the model may see at once (default: what the tokenizer says, else 2048)"
    )
    words.add_argument("--json", metavar="FILE", help="write lm-eval's whole results there too")
    evaluate.set_defaults(run=measuring.evaluate)

    bench = commands.add_parser("bench", help="speed, latency and memory of a model, against another if given")
    bench.add_argument("model", help="folder or hub id: image classifier or causal language model")
    bench.add_argument("--against", metavar="DENSE", help="model to compare with; the two take turns")
    bench.add_argument("--device", choices=("cpu", "cuda", "both"), help="default: cuda where there is one, else cpu")
    bench.add_argument("--batch-size", type=int, nargs="+", help="one or several; default: what keeps the device busy")
    bench.add_argument("--seq-len", type=int, help="tokens of a language model's prompt (default 256)")
    bench.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: autocast for images, weights for language models",
    )
    bench.add_argument("--compile", action="store_true", help="torch.compile each block")
    bench.add_argument("--graph", action=argparse.BooleanOptionalAction, default=False, help="replay CUDA graphs")
    bench.add_argument("--rounds", type=int, default=10, help="turns of each model (default 10)")
    bench.add_argument("--json", metavar="FILE", help="write the figures there too")
    bench.set_defaults(run=measuring.bench)

    page = commands.add_parser("report", help="one HTML page about a run, or about several compared")
    page.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or not")
    page.add_argument("--out", metavar="FILE", help="default: RUN/report.html; of several runs, ./report.html")
    page.set_defaults(run=_report)

    convert = commands.add_parser("convert", help="a Mamba checkpoint of transformers or mamba_ssm as this package's")
    convert.add_argument("model", help="folder or hub id")
    convert.add_argument("out", help="folder for the converted model; must not exist")
    convert.set_defaults(run=checkpoints.convert)

    export = commands.add_parser("export", help="a language model as transformers' own Mamba, or for mamba_ssm")
    export.add_argument("model", help="folder or hub id")
    export.add_argument("out", help="folder for the exported model; must not exist")
    export.add_argument("--format", default="transformers", help="transformers (default) or mamba_ssm")
    export.add_argument("--pad", action="store_true", help="fill uneven layers with zeros up to the widest")
    export.set_defaults(run=checkpoints.export)

    push = commands.add_parser("push", help="upload a saved model to the Hub")
    push.add_argument("model", help="folder")
    push.add_argument("repo", help="name or user/name; made if it is not there")
    push.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    push.add_argument("--message", help="of the commit")
    push.set_defaults(run=checkpoints.push)
    return parser


def _train(args) -> None:
    from .recipe import load_recipe
    from .run import run_recipe

    run_recipe(load_recipe(args.recipe, args.overrides), resume=args.resume)


def _sweep(args) -> None:
    from .sweep import choose_runs, load_sweep, print_plan

    sweep = load_sweep(args.sweep, args.overrides)
    runs = choose_runs(sweep, args.only)
    if args.dry_run:
        print_plan(sweep, runs)
        return
    from .sweep_report import print_table
    from .sweep_run import run_sweep

    results = run_sweep(sweep, args.resume, runs)
    print_table(results)
    drawn = " and figures/sweep.png" if any(run["status"] == "finished" for run in results["runs"]) else ""
    print(f"\nSaved to {sweep.output_dir}: results.md, results.json{drawn}.")
    asked = {run.folder.name for run in runs}
    failed = [run["folder"] for run in results["runs"] if run["status"] == "failed" and run["folder"] in asked]
    if failed:
        raise ValueError(f"{len(failed)} of {len(asked)} runs failed: {', '.join(failed)}.")


def _report(args) -> None:
    from pathlib import Path

    from .html_report import write_report
    from .report import check_writable

    if args.out is not None:
        check_writable(Path(args.out).expanduser(), args.out)
    out = write_report([Path(run).expanduser() for run in args.runs], args.out and Path(args.out).expanduser())
    print(f"Written to {out}; it needs no other file.")
