"""The language model against transformers' own class: prefill, a training step, and decoding token by token.

    python benchmarks/bench_decode.py [--quick] [--device cuda] [--compile] [--threads N]

The shape is that of mamba-130m (24 layers, D 768, N 16, 50,280 tokens), random weights, batch 1. `cut` is ours after
`prune_` has removed half of every layer's d_inner. Times are the best of several runs, alternating between the models
so that the machine's drift hits all alike; ratios are against transformers in fp32. On CUDA a token of ours is also
one replay of a CUDA graph of the whole step, greedy choice included. `compiled` (--compile) is torch.compile's step.
"""

import argparse
import copy
import time

import torch
import transformers

from mamba_rsst import MambaForCausalLM, MambaRsstConfig, PruningConfig, prune_
from mamba_rsst.models.mamba_mixer import FP32_PARAMETERS
from mamba_rsst.speed import cache_name


SHAPE = dict(hidden_size=768, num_hidden_layers=24, vocab_size=50280)
QUICK = dict(hidden_size=256, num_hidden_layers=4, vocab_size=5000)
BASE = "transformers"
KERNELS = ("mamba_ssm", "causal_conv1d")


def make_models(shape, device):
    """Name -> model in eval mode; all but the cut ones hold the same weights."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(**shape)
    stock = transformers.MambaForCausalLM(config)
    ours = MambaForCausalLM(MambaRsstConfig(**shape))
    ours.load_state_dict(stock.state_dict())
    cut = copy.deepcopy(ours)
    prune_(cut, PruningConfig(targets=["d_inner"], sparsity=0.5))
    models = {BASE: stock, "ours": ours, "ours cut": cut}
    for name in list(models):
        models[f"{name} bf16"] = narrow_(copy.deepcopy(models[name]))
    return {name: model.to(device).eval() for name, model in models.items()}


@torch.no_grad()
def narrow_(model):
    """bf16 weights as from_pretrained(dtype=torch.bfloat16) loads them: ours keeps in fp32 what must be."""
    wide = FP32_PARAMETERS if isinstance(model, MambaForCausalLM) else ()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in wide):
            parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    return model


class Prefill:
    def __init__(self, model, length):
        self.model = model
        self.ids = tokens(model, length)

    @torch.no_grad()
    def __call__(self):
        self.model(self.ids, use_cache=True, logits_to_keep=1)


class TrainingStep:
    """Forward and backward; the optimizer is the same for all."""

    def __init__(self, model, length):
        self.model = model
        self.ids = tokens(model, length)

    def __call__(self):
        self.model.train()
        self.model(self.ids, labels=self.ids).loss.backward()
        self.model.zero_grad()
        self.model.eval()


class Decode:
    """`count` greedy tokens after a short prompt."""

    count = 8

    def __init__(self, model, step=None):
        self.model, self.step = model, model if step is None else step
        self.token, name = tokens(model, 1), cache_name(model)
        with torch.no_grad():
            self.cache = {name: model(tokens(model, 16), use_cache=True)[name]}

    @torch.no_grad()
    def one(self):
        logits = self.step(self.token, **self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def __call__(self):
        for _ in range(self.count):
            self.one()


class GraphDecode(Decode):
    """The same with each token as one replay."""

    def __init__(self, model):
        super().__init__(model)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their own things before the capture
            for _ in range(3):
                self.one()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.one()

    def __call__(self):
        for _ in range(self.count):
            self.graph.replay()


def tokens(model, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def best_times(runs, rounds, device):
    """Name -> seconds of the fastest of `rounds` runs, which take turns; the first, untimed, warms up."""

    def seconds(run):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: min(values) for name, values in times.items()}


def report(what, times, calls, tokens):
    """`times`: seconds for `calls` calls, which were of `tokens` tokens together."""
    for name, value in times.items():
        speed = f"{1e3 * value / calls:9.2f} {tokens / value:9.1f} {times[BASE] / value:8.2f}x"
        print(f"{what:<16} {name:<22} {speed}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, few runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also torch.compile's decode step, a minute each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    models = make_models(QUICK if args.quick else SHAPE, device)
    where = torch.cuda.get_device_name() if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}, {args.threads} threads")
    print(f"{'one call':<16} {'model':<22} {'ms':>9} {'tokens/s':>9} {'speed-up':>9}")
    rounds = 3 if args.quick else 10
    for length in (32, 64) if args.quick else (128, 1024):
        runs = {name: Prefill(model, length) for name, model in models.items()}
        report(f"prefill L={length}", best_times(runs, rounds if length < 1024 else 3, device), 1, length)
    length = 32 if args.quick else 128
    runs = {name: TrainingStep(model, length) for name, model in models.items() if "bf16" not in name}
    # The backward of transformers' loop takes seconds at this length.
    report(f"training L={length}", best_times(runs, rounds if cuda else 2, device), 1, length)
    runs = {name: Decode(model) for name, model in models.items()}
    if cuda:
        runs |= {f"{name}, graph": GraphDecode(model) for name, model in models.items() if BASE not in name}
    if args.compile:
        mode = "reduce-overhead" if cuda else "default"
        for name in ("ours", "ours bf16"):
            runs[f"{name}, compiled"] = Decode(models[name], torch.compile(models[name], fullgraph=True, mode=mode))
    report("decode", best_times(runs, rounds, device), Decode.count, Decode.count)
    for name in KERNELS:
        try:
            __import__(name)
        except ImportError:
            print(f"absent, so transformers runs its torch code: {name}")


if __name__ == "__main__":
    main()
