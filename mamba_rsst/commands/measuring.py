"""What a model is worth: eval, bench."""

import sys

from .arguments import json_file, match_classes, move, normalisation, short_names


_IMAGE_OPTIONS = ("split", "max_samples", "resize")
_LANGUAGE_OPTIONS = ("against", "tokenizer", "include_path", "limit", "num_fewshot", "max_length", "json")


def evaluate(args) -> None:
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

    from .. import report, speed
    from ..evaluation import count_parameters
    from ..hub import load_model
    from ..lm_evaluation import BATCH_SIZE, check_language_model, evaluate_lm, find_tasks, load_tokenizer, metric_rows

    file = json_file(args.json)
    paths = short_names([args.against, args.model] if args.against else [args.model])
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
    report.plain_console().print(report.lm_table(results["models"], rows, version))
    if file:
        report.write_atomic(file, json.dumps(results, indent=1, default=str) + "\n")


def _eval_images(args) -> None:
    from dataclasses import replace
    from pathlib import Path

    import torch
    from rich.table import Table

    from .. import evaluation, report, speed
    from ..hub import load_model
    from ..recipe import load_recipe
    from ..run import RECIPE_FILE
    from ..training.data import ImageDataConfig, load_image_data

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
    changes = {"eval_split": args.split, "max_eval_samples": args.max_samples, "resize": args.resize}
    config = replace(config, max_train_samples=None, **{k: v for k, v in changes.items() if v is not None})
    c = model.config
    data = load_image_data(config, image_size=c.image_size, num_channels=c.num_channels)
    match_classes(model, config.path, data)
    mean, std = normalisation(args.model, data)
    move(model, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
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
        ("peak memory", "n/a" if memory is None else f"{memory / 2**20:,.1f} MiB"),
    ):
        table.add_row(name, value)
    report.plain_console().print(table)


def bench(args) -> None:
    import json

    import torch

    from .. import report, speed
    from ..evaluation import count_parameters

    seq_len = 256 if args.seq_len is None else args.seq_len
    speed.check_settings(batch_sizes=args.batch_size, seq_len=seq_len, rounds=args.rounds)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    devices = ["cpu", "cuda"] if args.device == "both" else [args.device or default]
    if "cuda" in devices and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: there is no CUDA device here.")
    if args.graph and "cuda" not in devices:
        raise ValueError("--graph needs a CUDA device.")
    file = json_file(args.json)
    paths = short_names([args.against, args.model] if args.against else [args.model])
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
    console = report.plain_console()
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


def _load_for_speed(path: str, dtype):
    """A language model with weights of `dtype`; an image classifier in fp32, since autocast casts what it runs."""
    import torch

    from ..hub import load_model

    model = load_model(path, dtype=dtype)
    if model.main_input_name == "pixel_values" and dtype != torch.float32:
        model = load_model(path, dtype=torch.float32)
    return model
