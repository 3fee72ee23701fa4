"""From one checkpoint to another: prune, inspect, convert, export, push."""

from .arguments import json_file, match_classes, move, new_folder, normalisation


def prune(args) -> None:
    from pathlib import Path

    from .. import speed
    from ..hub import load_model
    from ..latency import latency_cost, measure_latency
    from ..pruning import PruningConfig, prune_
    from ..report import plain_console, widths_table

    out = Path(args.out).expanduser() if args.dry_run else new_folder(args.out, args.model)
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
        move(model, args.device)
    shape = {"batch_size": args.batch_size, "seq_len": args.seq_len}
    cost = latency_cost(model, config, **shape) if args.budget == "latency" else None
    table = prune_(model, config, calibration, dry_run=args.dry_run, cost=cost)
    console = plain_console()
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


def _save_beside(model, source: str, out) -> None:
    """Write the whole folder beside `out`, then rename; the preprocessor or tokenizer goes along."""
    from ..hub import save_folder

    save_folder(model.save_pretrained, source, out)


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


def _calibration(args, model, config):
    from ..pruning.importance import NEEDS_DATA

    looking = [name for name in map(config.importance_of, config.targets) if name in NEEDS_DATA]
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {args.samples}.")
    if not looking:
        if args.data or args.samples is not None or args.resize:
            scores = sorted(set(map(config.importance_of, config.targets)))
            raise ValueError(
                f"--data, --samples and --resize are for scores that look at data, which {scores} do not."
            )
        return None
    if not args.data:
        raise ValueError(f"--importance {looking[0]} looks at data: give --data.")
    if model.main_input_name == "input_ids":
        if args.resize:
            raise ValueError("--resize is for images.")
        from transformers import AutoTokenizer

        from ..calibration import text_calibration

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
    from ..training.data import ImageCollator, ImageDataConfig, load_image_data

    data = load_image_data(
        ImageDataConfig(path=args.data, max_train_samples=args.samples or 512, resize=args.resize),
        image_size=model.config.image_size,
        num_channels=model.config.num_channels,
    )
    match_classes(model, args.data, data)
    mean, std = normalisation(args.model, data)
    collate = ImageCollator(data.train, mean=mean, std=std, num_classes=len(data.id2label))
    return [collate(list(range(s, min(s + 64, len(data.train))))) for s in range(0, len(data.train), 64)]


def inspect(args) -> None:
    import json

    from ..export import inspect_model
    from ..report import inspect_tables, plain_console, write_atomic

    file = json_file(args.json)
    found = inspect_model(args.model)
    text = json.dumps(found, indent=1) + "\n"
    if args.json == "-":
        print(text, end="")
        return
    console = plain_console()
    for part in inspect_tables(found):
        console.print(part)
    if file:
        write_atomic(file, text)


def convert(args) -> None:
    from ..convert import convert_checkpoint
    from ..evaluation import count_parameters

    out = new_folder(args.out, args.model)
    model = convert_checkpoint(args.model)
    _save_beside(model, args.model, out)
    print(f"Saved to {args.out}: {count_parameters(model):,} parameters ({model.dtype}).")


def export(args) -> None:
    from ..export import export_checkpoint

    new_folder(args.out, args.model)
    done = export_checkpoint(args.model, args.out, format=args.format, pad=args.pad)
    if done.padded:
        filled = ", ".join(f"{name} {now}" for name, (_, now) in done.padded.items())
        print(f"Filled with zeros to {filled} in every layer: the same function, padding brings")
        for key, what in (("parameters", "parameters"), ("macs_per_token", "MACs a token")):
            was, now = done.before[key], done.after[key]
            print(f"  {what} from {was:,} back to {now:,} ({now / was - 1:+.1%})")
    kind = f"transformers' own {done.model_type}" if done.model_type else "mamba_ssm's format"
    print(f"Saved to {args.out}: {kind}, {done.after['parameters']:,} parameters ({done.dtype}).")


def push(args) -> None:
    from ..hub import push_folder

    print(f"Pushed to {push_folder(args.model, args.repo, private=args.private, message=args.message)}.")
