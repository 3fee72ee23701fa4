"""The command line, one function a command. Bad input: one sentence, exit 2."""

import argparse
import os
import sys


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
        type=_fraction,
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
    prune.add_argument("--seq-len", type=int, default=256, help="tokens of a sequence (default 256)")
    prune.add_argument("--batch-size", type=int, default=1, help="of the latency that is measured (default 1)")
    prune.add_argument("--device", help="where scores and latency are computed (default cpu)")
    prune.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    prune.set_defaults(run=_prune)

    inspect = commands.add_parser("inspect", help="widths and costs of a checkpoint, and where it runs")
    inspect.add_argument("model", help="folder or hub id")
    inspect.add_argument("--json", metavar="FILE", help="write it there too; -: to stdout, and nothing else")
    inspect.set_defaults(run=_inspect)

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
    evaluate.set_defaults(run=_eval)

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
    bench.set_defaults(run=_bench)

    page = commands.add_parser("report", help="one HTML page about a run, or about several compared")
    page.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or not")
    page.add_argument("--out", metavar="FILE", help="default: RUN/report.html; of several runs, ./report.html")
    page.set_defaults(run=_report)

    convert = commands.add_parser("convert", help="a Mamba checkpoint of transformers or mamba_ssm as this package's")
    convert.add_argument("model", help="folder or hub id")
    convert.add_argument("out", help="folder for the converted model; must not exist")
    convert.set_defaults(run=_convert)

    export = commands.add_parser("export", help="a language model as transformers' own Mamba, or for mamba_ssm")
    export.add_argument("model", help="folder or hub id")
    export.add_argument("out", help="folder for the exported model; must not exist")
    export.add_argument("--format", default="transformers", help="transformers (default) or mamba_ssm")
    export.add_argument("--pad", action="store_true", help="fill uneven layers with zeros up to the widest")
    export.set_defaults(run=_export)

    push = commands.add_parser("push", help="upload a saved model to the Hub")
    push.add_argument("model", help="folder")
    push.add_argument("repo", help="name or user/name; made if it is not there")
    push.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    push.add_argument("--message", help="of the commit")
    push.set_defaults(run=_push)
    return parser


def _train(args) -> None:
    from .recipe import load_recipe
    from .run import run_recipe

    run_recipe(load_recipe(args.recipe, args.overrides), resume=args.resume)


def _sweep(args) -> None:
    from .sweep import load_sweep, print_plan

    sweep = load_sweep(args.sweep, args.overrides)
    if args.dry_run:
        print_plan(sweep)
        return
    from .sweep_report import print_table
    from .sweep_run import run_sweep

    results = run_sweep(sweep, resume=args.resume)
    print_table(results)
    print(f"\nSaved to {sweep.output_dir}: results.md, results.json and figures/sweep.png.")
    failed = [run["folder"] for run in results["runs"] if run["status"] == "failed"]
    if failed:
        raise ValueError(f"{len(failed)} of {len(results['runs'])} runs failed: {', '.join(failed)}.")


def _fraction(word: str):
    """0.5 -> 0.5, d_inner=0.5 -> ("d_inner", 0.5)."""
    target, equals, number = word.rpartition("=")
    try:
        return (target, float(number)) if equals else float(number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a fraction nor TARGET=FRACTION") from error


def _prune(args) -> None:
    from pathlib import Path

    from rich.console import Console

    from . import speed
    from .hub import load_model
    from .latency import latency_cost, measure_latency
    from .pruning import PruningConfig, prune_
    from .report import widths_table

    out = Path(args.out).expanduser() if args.dry_run else _new_folder(args.out, args.model)
    settings = {
        "targets": args.target,
        "sparsity": _sparsity(args),
        "budget": args.budget,
        "importance": args.importance,
        "floor": args.floor,
        "round_to": args.round_to,
        "dt_rank_method": args.dt_rank_method,
        "seed": args.seed,
    }
    PruningConfig(**settings, **({"scope": args.scope} if args.scope else {}))  # before a long load
    speed.check_settings(batch_sizes=[args.batch_size], seq_len=args.seq_len)
    model = load_model(args.model)
    scope = args.scope or ("global" if hasattr(model.config, "set_widths") else "layer")
    config = PruningConfig(**settings, scope=scope)
    calibration = _calibration(args, model, config)
    if args.device is not None:
        _move(model, args.device)
    shape = {"batch_size": args.batch_size, "seq_len": args.seq_len}
    cost = latency_cost(model, config, **shape) if args.budget == "latency" else None
    table = prune_(model, config, calibration, dry_run=args.dry_run, cost=cost)
    console = Console()
    console.print(widths_table(table))
    console.print(
        f"parameters {table.parameters_before:,} -> {table.parameters_after:,} ({table.param_reduction:.1%} fewer)"
    )
    console.print(f"MACs {table.macs_before:,} -> {table.macs_after:,} ({table.mac_reduction:.1%} fewer)")
    if cost is not None and not args.dry_run:
        before, after = cost.measured, measure_latency(model, **shape)
        what = f"batch {args.batch_size}" + ("" if model.main_input_name == "pixel_values" else f" of {args.seq_len}")
        console.print(
            f"latency {before.ms:.3g} ms -> {after.ms:.3g} ms, {before.ms / after.ms:.2f} times faster, asked for "
            f"{1 / (1 - config.sparsity):.2f} ({what}, {str(model.dtype).removeprefix('torch.')}, "
            f"{speed.device_name(model.device)})"
        )
    if not args.dry_run:
        _save_beside(model, args.model, out)
        console.print(f"Saved to {args.out}. It has not been trained since the cut.")


def _sparsity(args):
    """The config's sparsity: one fraction, or {target: fraction}."""
    if args.speedup is not None:
        if args.budget != "latency":
            raise ValueError(f"--speedup is for --budget latency, not {args.budget}; give --sparsity.")
        if not 1 <= args.speedup < float("inf"):
            raise ValueError(f"--speedup must be at least 1 and finite, got {args.speedup}.")
        return 1 - 1 / args.speedup
    named = dict(value for value in args.sparsity if isinstance(value, tuple))
    if not named and len(args.sparsity) == 1:
        return args.sparsity[0]
    if len(named) != len(args.sparsity):
        raise ValueError("--sparsity is one fraction, or TARGET=FRACTION once for each target.")
    return named


def _report(args) -> None:
    from pathlib import Path

    from .html_report import write_report
    from .report import check_writable

    if args.out is not None:
        check_writable(Path(args.out).expanduser(), args.out)
    out = write_report([Path(run).expanduser() for run in args.runs], args.out and Path(args.out).expanduser())
    print(f"Written to {out}; it needs no other file.")


def _move(model, device: str) -> None:
    import torch

    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("nothing can be computed there")
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown device and for a missing one
        raise ValueError(f"--device {device!r} cannot be used: {error}") from error


def _convert(args) -> None:
    from .convert import convert_checkpoint
    from .evaluation import count_parameters

    out = _new_folder(args.out, args.model)
    model = convert_checkpoint(args.model)
    _save_beside(model, args.model, out)
    print(f"Saved to {args.out}: {count_parameters(model):,} parameters ({model.dtype}).")


def _new_folder(name: str, source: str):
    """The path of a folder to write, which must not exist, nor lie inside the folder that is read."""
    from pathlib import Path

    from .report import check_writable

    out = Path(name).expanduser()
    if not name.strip():
        raise ValueError("The output folder has no name.")
    if out.exists():
        raise ValueError(f"{name!r} exists; choose a new folder.")
    if Path(source).is_dir() and Path(source).resolve() in out.absolute().resolve().parents:
        raise ValueError(f"{name!r} lies inside {source!r}, which is being read; choose a folder beside it.")
    return check_writable(out, name)


def _json_file(name: str | None):
    """The path of --json's file, None where it was not given; said to be unwritable before any work is done."""
    from pathlib import Path

    from .report import check_writable

    if name is None or name == "-":
        return None
    file = Path(name).expanduser()
    if file.is_dir():
        raise ValueError(f"--json {name!r} is a folder.")
    return check_writable(file, name)


def _save_beside(model, source: str, out) -> None:
    """Write the whole folder beside `out`, then rename; the preprocessor or tokenizer goes along."""
    from .hub import save_folder

    save_folder(model.save_pretrained, source, out)


def _export(args) -> None:
    from .export import export_checkpoint

    _new_folder(args.out, args.model)
    done = export_checkpoint(args.model, args.out, format=args.format, pad=args.pad)
    if done.padded:
        filled = ", ".join(f"{name} {now}" for name, (_, now) in done.padded.items())
        print(f"Filled with zeros to {filled} in every layer: the same function, padding brings")
        for key, what in (("parameters", "parameters"), ("macs_per_token", "MACs a token")):
            was, now = done.before[key], done.after[key]
            print(f"  {what} from {was:,} back to {now:,} ({now / was - 1:+.1%})")
    kind = f"transformers' own {done.model_type}" if done.model_type else "mamba_ssm's format"
    print(f"Saved to {args.out}: {kind}, {done.after['parameters']:,} parameters ({done.dtype}).")


def _push(args) -> None:
    from .hub import push_folder

    print(f"Pushed to {push_folder(args.model, args.repo, private=args.private, message=args.message)}.")


def _calibration(args, model, config):
    from .pruning.importance import NEEDS_DATA

    looking = [name for name in map(config.importance_of, config.targets) if name in NEEDS_DATA]
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {args.samples}.")
    if not looking:
        if args.data or args.samples is not None:
            scores = sorted(set(map(config.importance_of, config.targets)))
            raise ValueError(f"--data and --samples are for scores that look at data, which {scores} do not.")
        return None
    if not args.data:
        raise ValueError(f"--importance {looking[0]} looks at data: give --data.")
    if model.main_input_name == "input_ids":
        from transformers import AutoTokenizer

        from .calibration import text_calibration

        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{args.model!r} holds no tokenizer that --data could be read with: {error}") from error
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"The tokenizer of {args.model!r} has {len(tokenizer)} tokens, the model {model.config.vocab_size}."
            )
        if args.seq_len < 2:
            raise ValueError(f"--seq-len must be at least 2 for a loss to score by, got {args.seq_len}.")
        return text_calibration(args.data, tokenizer, args.seq_len, args.samples or 64)
    from .training.data import ImageCollator, ImageDataConfig, load_image_data

    data = load_image_data(
        ImageDataConfig(path=args.data, max_train_samples=args.samples or 512),
        image_size=model.config.image_size,
        num_channels=model.config.num_channels,
    )
    _check_classes(model, args.data, data)
    collate = ImageCollator(data.train, mean=data.mean, std=data.std, num_classes=len(data.id2label))
    return [collate(list(range(s, min(s + 64, len(data.train))))) for s in range(0, len(data.train), 64)]


def _inspect(args) -> None:
    import json

    from rich.console import Console

    from .export import inspect_model
    from .report import inspect_tables, write_atomic

    file = _json_file(args.json)
    found = inspect_model(args.model)
    text = json.dumps(found, indent=1) + "\n"
    if args.json == "-":
        print(text, end="")
        return
    console = Console()
    for part in inspect_tables(found):
        console.print(part)
    if file:
        write_atomic(file, text)


_IMAGE_OPTIONS = ("split", "max_samples")
_LANGUAGE_OPTIONS = ("against", "tokenizer", "include_path", "limit", "num_fewshot", "max_length", "json")


def _eval(args) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}.")
    of_the_other = _LANGUAGE_OPTIONS if args.tasks is None else _IMAGE_OPTIONS
    if given := [name for name in of_the_other if getattr(args, name) is not None]:
        option = f"--{given[0].replace('_', '-')}"
        why = "is for language models: give --tasks" if args.tasks is None else "is for images, --tasks for language"
        raise ValueError(f"{option} {why}.")
    (_eval_images if args.tasks is None else _eval_language)(args)


def _eval_language(args) -> None:
    import json

    import torch
    from rich.console import Console

    from . import report, speed
    from .evaluation import count_parameters
    from .hub import load_model
    from .lm_evaluation import BATCH_SIZE, check_language_model, evaluate_lm, find_tasks, load_tokenizer, metric_rows

    file = _json_file(args.json)
    paths = _short_names([args.against, args.model] if args.against else [args.model])
    tasks = [name for name in (word.strip() for word in args.tasks.split(",")) if name]
    find_tasks(tasks, include_path=args.include_path, data=args.data)
    for path in paths.values():  # before the first of two long evaluations
        check_language_model(path)
    tokenizers = {name: load_tokenizer(args.tokenizer or path) for name, path in paths.items()}
    results = {"models": [], "versions": speed.versions()}
    for name, path in paths.items():
        model = load_model(path)
        scores = evaluate_lm(
            model,
            tasks,
            tokenizer=tokenizers[name],
            batch_size=args.batch_size or BATCH_SIZE,
            max_length=args.max_length,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            include_path=args.include_path,
            data=args.data,
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            progress=sys.stderr.isatty(),
        )
        entry = {"name": name, "path": path, "parameters": count_parameters(model), "results": scores}
        results["models"].append(entry)
        del model  # one at a time in memory
    rows = {model["name"]: metric_rows(model["results"]) for model in results["models"]}
    version = results["models"][0]["results"].get("lm_eval_version", "")
    Console().print(report.lm_table(results["models"], rows, version))
    if file:
        report.write_atomic(file, json.dumps(results, indent=1, default=str) + "\n")


def _eval_images(args) -> None:
    from dataclasses import replace
    from pathlib import Path

    import torch
    from rich.console import Console
    from rich.table import Table

    from . import evaluation, speed
    from .hub import load_model
    from .recipe import load_recipe
    from .run import RECIPE_FILE
    from .training.data import ImageDataConfig, load_image_data

    batch_size = args.batch_size or 64
    model = load_model(args.model)
    if model.main_input_name != "pixel_values":
        raise ValueError(f"{args.model!r} is no image classifier; a language model is evaluated on --tasks.")
    recipe = Path(args.model) / RECIPE_FILE
    config = load_recipe(recipe).data if recipe.is_file() else None
    if args.data is not None or config is None:
        if args.data is None:
            raise ValueError(f"{args.model!r} holds no {RECIPE_FILE} that names its data: give --data.")
        config = ImageDataConfig(path=args.data)
    changes = {"eval_split": args.split, "max_eval_samples": args.max_samples}
    config = replace(config, max_train_samples=None, **{k: v for k, v in changes.items() if v is not None})
    c = model.config
    data = load_image_data(config, image_size=c.image_size, num_channels=c.num_channels)
    _check_classes(model, config.path, data)
    mean, std = _normalisation(args.model, data)
    _move(model, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device = model.device
    scores = evaluation.evaluate_images(
        model, data.eval.images, data.eval.labels, mean=mean, std=std, batch_size=batch_size, progress=True
    )
    batch_size = min(batch_size, max(64, scores["num_samples"]))  # no larger one was asked of the model above
    inputs = {"pixel_values": torch.randn(batch_size, c.num_channels, c.image_size, c.image_size, device=device)}
    timing = speed.measure_throughput(model, inputs)
    memory = speed.measure_peak_memory(model, inputs)
    table = Table("", "", title=f"{args.model} on {config.path} ({config.eval_split})", show_header=False)
    for name, value in (
        ("accuracy", f"{scores['accuracy']:.2%} of {scores['num_samples']:,} images"),
        ("loss", f"{scores['loss']:.4f}"),
        ("parameters", f"{evaluation.count_parameters(model):,}"),
        ("MACs an image", f"{evaluation.count_macs_per_item(model, inputs):,}"),
        ("images/s", f"{timing.items_per_s:,.1f} ({timing.low:,.1f}–{timing.high:,.1f}), batch {batch_size}"),
        ("peak memory", "n/a" if memory is None else f"{memory / 2**20:,.0f} MiB"),
    ):
        table.add_row(name, value)
    Console().print(table)


def _bench(args) -> None:
    import json

    import torch
    from rich.console import Console

    from . import report, speed
    from .evaluation import count_parameters

    seq_len = 256 if args.seq_len is None else args.seq_len
    speed.check_settings(batch_sizes=args.batch_size, seq_len=seq_len, rounds=args.rounds)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    devices = ["cpu", "cuda"] if args.device == "both" else [args.device or default]
    if "cuda" in devices and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: there is no CUDA device here.")
    if args.graph and "cuda" not in devices:
        raise ValueError("--graph needs a CUDA device.")
    file = _json_file(args.json)
    paths = _short_names([args.against, args.model] if args.against else [args.model])
    models = {name: _load_for_speed(path, getattr(torch, args.dtype)) for name, path in paths.items()}
    images = models[list(models)[-1]].main_input_name == "pixel_values"
    if images and args.seq_len is not None:
        raise ValueError("--seq-len is for language models; an image classifier's length follows from its images.")
    autocast = images and args.dtype != "float32"
    results = {
        "models": [{"name": n, "path": paths[n], "parameters": count_parameters(m)} for n, m in models.items()],
        "dtype": args.dtype + (" autocast" if autocast else ""),
        "compiled": args.compile,
        "seq_len": None if images else seq_len,
        "rounds": args.rounds,
        "versions": speed.versions(),
        "devices": [],
    }
    console = Console()
    for place in devices:
        graph = args.graph and place == "cuda"
        rows = speed.benchmark(
            models,
            device=place,
            batch_sizes=args.batch_size,
            seq_len=seq_len,
            rounds=args.rounds,
            autocast_dtype=getattr(torch, args.dtype) if autocast else None,
            compiled=args.compile,
            graph=graph,
        )
        name = speed.device_name(torch.device(place))
        results["devices"].append({"device": place, "name": name, "graph": graph, "rows": rows})
        console.print(report.speed_table(results, results["devices"][-1]))
    if file:
        report.write_atomic(file, json.dumps(results, indent=1) + "\n")


def _short_names(paths: list[str]) -> dict[str, str]:
    """{a name for the table: path}; the whole path where short ones are alike."""
    from pathlib import Path

    if len(set(paths)) < len(paths):
        raise ValueError(f"There is nothing to compare: both models are {paths[0]!r}.")
    folders = {path: Path(path).expanduser().resolve() for path in paths}
    # A run keeps the models of its stages in folders like stages/0-train/model.
    short = {f.parent.name if f.name == "model" else f.name: path for path, f in folders.items()}
    return short if len(short) == len(paths) else {path: path for path in paths}


def _load_for_speed(path: str, dtype):
    """A language model with weights of `dtype`; an image classifier in fp32, since autocast casts what it runs."""
    import torch

    from .hub import load_model

    model = load_model(path, dtype=dtype)
    if model.main_input_name == "pixel_values" and dtype != torch.float32:
        model = load_model(path, dtype=torch.float32)
    return model


def _check_classes(model, path: str, data) -> None:
    if len(data.id2label) != model.config.num_labels:
        raise ValueError(f"{path!r} has {len(data.id2label)} classes, the model {model.config.num_labels}.")


def _normalisation(model_path: str, data):
    """The mean and deviation the model was trained with, from its preprocessor; else the data's own."""
    import json
    from pathlib import Path

    file = Path(model_path) / "preprocessor_config.json"
    if file.is_file():
        saved = json.loads(file.read_text())
        if "image_mean" in saved and "image_std" in saved:
            return saved["image_mean"], saved["image_std"]
    return data.mean, data.std
