"""The language model against transformers' own class: prefill and a training step, in one run.

    python benchmarks/bench_lm.py [--batch 8] [--seq-len 256] [--hidden-size 128] [--layers 4] [--skip stock]

The same random weights in every row, and their logits are compared first. `prefill`: a forward without gradients that
leaves a cache, as generation starts. `step`: forward and backward in training mode, without the optimizer; `forward`
and `backward` are its two halves. Rows take turns; transformers' backward on a CPU takes most of a minute, so
`--stock-steps` says how many are timed (1). The vocabulary is small, so that the head, which is the same everywhere,
does not hide the blocks. `mambapy`: transformers' class with `use_mambapy`, which it takes in training alone.
"""

import argparse
import statistics
import time

import torch
from transformers import MambaConfig
from transformers import MambaForCausalLM as StockMambaForCausalLM
from transformers.utils.import_utils import is_mambapy_available

from mamba_rsst import MambaForCausalLM
from mamba_rsst.models.configuration_mamba_rsst import config_from_transformers
from mamba_rsst.speed import compare_throughput, device_name, versions


STOCK, MAMBAPY, OURS = "transformers", "transformers, mambapy", "mamba_rsst"


def make_models(args):
    """{name: model} with the same weights."""
    sizes = dict(vocab_size=args.vocab_size, hidden_size=args.hidden_size, num_hidden_layers=args.layers)
    torch.manual_seed(0)
    stock = StockMambaForCausalLM(MambaConfig(**sizes))
    models = {STOCK: stock}
    if is_mambapy_available():
        models[MAMBAPY] = StockMambaForCausalLM(MambaConfig(**sizes, use_mambapy=True))
    models[OURS] = MambaForCausalLM(config_from_transformers(stock.config.to_dict()))
    for model in list(models.values())[1:]:
        model.load_state_dict(stock.state_dict())
    return {name: model.to(args.device) for name, model in models.items() if name not in args.skip}


@torch.no_grad()
def check_equal(models, ids):
    """Raise AssertionError where the models' logits differ."""
    expected, *others = (model.eval()(ids[:2, :64], use_cache=False).logits for model in models.values())
    for logits in others:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def time_steps(models, ids, counts):
    """{name: (forward s, backward s, both s)}: medians of `counts[name]` steps, taking turns, after one of each other
    model than transformers', whose step is too long to throw one away; its forward alone warms it up."""

    def synchronise():
        if ids.device.type == "cuda":
            torch.cuda.synchronize()

    def step(model, backward=True):
        synchronise()
        start = time.perf_counter()
        loss = model(ids, labels=ids, use_cache=False).loss
        synchronise()
        middle = time.perf_counter()
        if backward:
            loss.backward()
            synchronise()
        end = time.perf_counter()
        model.zero_grad()
        return middle - start, end - middle, end - start

    times = {name: [] for name in models}
    for name, model in models.items():
        model.train()
        step(model, backward=name != STOCK)
    for turn in range(max(counts.values())):
        for name, model in models.items():
            if turn < counts[name]:
                times[name].append(step(model))
    return {name: tuple(map(statistics.median, zip(*runs))) for name, runs in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="turns of prefill; steps of all but transformers")
    parser.add_argument("--stock-steps", type=int, default=1, help="timed training steps of transformers' class")
    parser.add_argument("--skip", nargs="+", default=[], choices=(STOCK, MAMBAPY), help="rows to leave out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()

    models = make_models(args)
    ids = torch.randint(args.vocab_size, (args.batch, args.seq_len), device=args.device)
    check_equal(models, ids)
    print(f"hidden {args.hidden_size}, {args.layers} layers, vocabulary {args.vocab_size}, fp32", end=", ")
    print(f"batch {args.batch}, length {args.seq_len}, {device_name(torch.device(args.device))}")
    print(", ".join(" ".join(item) for item in versions().items()), end="\n\n")

    prefill = compare_throughput(
        models, {"input_ids": ids, "use_cache": True}, items_each=args.seq_len, rounds=args.rounds, warmup=1
    )
    counts = {name: args.stock_steps if name == STOCK else args.rounds for name in models}
    steps = time_steps(models, ids, counts)
    tokens = args.batch * args.seq_len
    rows = {name: (tokens / prefill[name].items_per_s, *steps[name]) for name in models}
    print(f"{'':<22}" + "".join(f"{title + ', ms':>22}" for title in ("prefill", "forward", "backward", "step")))
    first = next(iter(rows.values()))
    for name, seconds in rows.items():
        cells = (f"{1e3 * s:,.1f} ({base / s:.1f}x)" for s, base in zip(seconds, first))
        print(f"{name:<22}" + "".join(f"{cell:>22}" for cell in cells))
    if not is_mambapy_available():
        print(f"{MAMBAPY:<22}" + f"{'absent':>22}")
    counted = "; ".join(f"{name}: {count}" for name, count in counts.items())
    print(f"\nIn brackets: times faster than the first row. Steps timed: {counted}.")


if __name__ == "__main__":
    main()
