import pytest
import torch
import torch.nn.functional as F
from tiny import BIDIRECTIONAL, STOCK, TINY, perturb_
from transformers import MambaConfig, MambaForCausalLM

from mamba_rsst import MambaMixer, MambaRsstConfig, MambaRsstVisionConfig
from mamba_rsst.models.mamba_mixer import init_mixer_


def make_mixer(bidirectional="v2", layer_idx=0, **overrides):
    config = MambaRsstVisionConfig(**{**TINY, "num_hidden_layers": 1, "bidirectional": bidirectional, **overrides})
    mixer = MambaMixer(config, layer_idx)
    init_mixer_(mixer, config)
    return perturb_(mixer)


def one_direction(p, x, suffix, decay, conv_suffix=None):
    """x (B, L, E) through convolution, projections and scan, a step at a time; parameters by name."""
    s = suffix if conv_suffix is None else conv_suffix
    E, N = p[decay].shape
    K = p[f"conv1d{s}.weight"].shape[-1]
    R = p[f"dt_proj{s}.weight"].shape[1]
    padded = torch.cat([x.new_zeros(x.shape[0], K - 1, E), x], dim=1)
    h, ys = x.new_zeros(x.shape[0], E, N), []
    for t in range(x.shape[1]):
        u = torch.einsum("bke,ek->be", padded[:, t : t + K], p[f"conv1d{s}.weight"][:, 0])
        u = F.silu(u + p.get(f"conv1d{s}.bias", 0.0))
        projected = u @ p[f"x_proj{s}.weight"].T
        low, B, C = projected[:, :R], projected[:, R : R + N], projected[:, R + N :]
        dt = F.softplus(low @ p[f"dt_proj{s}.weight"].T + p[f"dt_proj{s}.bias"])
        h = h * torch.exp(-dt[:, :, None] * p[decay].exp()) + (dt * u)[:, :, None] * B[:, None]
        ys.append((h * C[:, None]).sum(-1) + p[f"D{s}"] * u)
    return torch.stack(ys, dim=1)


def vim(p, x, bidirectional, divide):
    """Vim's mixer as its paper and code state it: the reverse direction sees the flipped sequence."""
    x = F.linear(x, p["in_proj.weight"], p.get("in_proj.bias"))
    x, gate = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    y = one_direction(p, x, "", "A_log") * F.silu(gate)
    if bidirectional == "v1":  # the scan alone is reversed: it reads the forward convolution's output
        y = y + v1_reverse(p, x, gate)
    if bidirectional == "v2":
        y = y + (one_direction(p, x.flip(1), "_b", "A_b_log") * F.silu(gate.flip(1))).flip(1)
    if divide and bidirectional != "none":
        y = y / 2
    return F.linear(y, p["out_proj.weight"], p.get("out_proj.bias"))


def v1_reverse(p, x, gate):
    K, (E, N), R = p["conv1d.weight"].shape[-1], p["A_b_log"].shape, p["dt_proj.weight"].shape[1]
    padded = torch.cat([x.new_zeros(x.shape[0], K - 1, E), x], dim=1)
    taps = [padded[:, k : k + x.shape[1]] * p["conv1d.weight"][:, 0, k] for k in range(K)]
    u = F.silu(sum(taps) + p.get("conv1d.bias", 0.0))
    low, B, C = (u @ p["x_proj.weight"].T).split([R, N, N], dim=-1)
    dt = F.softplus(low @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    h, ys = x.new_zeros(x.shape[0], E, N), []
    for t in reversed(range(x.shape[1])):
        h = h * torch.exp(-dt[:, t, :, None] * p["A_b_log"].exp()) + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.insert(0, (h * C[:, t, None]).sum(-1) + p["D"] * u[:, t])
    return torch.stack(ys, dim=1) * F.silu(gate)


@pytest.mark.parametrize("length", [1, 2, 17, 40])
@pytest.mark.parametrize("divide_out", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("bidirectional", BIDIRECTIONAL)
def test_equals_vim(bidirectional, biases, divide_out, length):
    mixer = make_mixer(bidirectional, use_bias=biases, use_conv_bias=biases, divide_out=divide_out)
    x = torch.randn(2, length, TINY["hidden_size"], requires_grad=True)
    p = dict(mixer.named_parameters())
    out, expected = mixer(x), vim(p, x, bidirectional, divide_out)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(out)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *p.values()])
    for name, a, b in zip(["x", *p], torch.autograd.grad((out * weights).sum(), [x, *p.values()]), wanted):
        torch.testing.assert_close(a, b, atol=3e-5 * max(1.0, b.abs().max().item()), rtol=0, msg=name)


@pytest.mark.parametrize("biases", [True, False])
def test_one_direction_equals_transformers(biases):
    """Weights move over by name; the language config sizes the mixer as the stock config does."""
    options = dict(use_bias=biases, use_conv_bias=biases)
    stock = perturb_(MambaForCausalLM(MambaConfig(**{**STOCK, **options}))).eval()
    config = MambaRsstConfig(**TINY, num_hidden_layers=2, **options)
    for i, layer in enumerate(stock.backbone.layers):
        mixer = MambaMixer(config, i)
        mixer.load_state_dict(layer.mixer.state_dict(), strict=True)
        x = torch.randn(3, 23, TINY["hidden_size"])
        torch.testing.assert_close(mixer(x), layer.mixer(x), atol=1e-5, rtol=1e-5)


V2 = {"conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias", "A_b_log", "D_b"}
ONE = {"in_proj.weight", "out_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight"}
ONE |= {"dt_proj.weight", "dt_proj.bias", "A_log", "D"}


@pytest.mark.parametrize("bidirectional, names", [("none", ONE), ("v1", ONE | {"A_b_log"}), ("v2", ONE | V2)])
def test_parameter_names_are_those_of_the_checkpoints(bidirectional, names):
    assert set(make_mixer(bidirectional).state_dict()) == names


def test_shapes_follow_the_layer():
    lists = dict(d_inner=[46, 31], d_state=[7, 4], dt_rank=[5, 3])
    mixer = make_mixer("v2", layer_idx=1, num_hidden_layers=2, use_bias=True, **lists)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    for s, decay in (("", "A_log"), ("_b", "A_b_log")):
        assert shapes[f"conv1d{s}.weight"] == (31, 1, 3)
        assert shapes[f"x_proj{s}.weight"] == (3 + 2 * 4, 31)
        assert shapes[f"dt_proj{s}.weight"] == (31, 3)
        assert shapes[decay] == (31, 4)
    assert shapes["in_proj.weight"] == (62, 20) and shapes["out_proj.weight"] == (20, 31)
    assert mixer(torch.randn(2, 9, 20)).shape == (2, 9, 20)


@pytest.mark.parametrize("bidirectional", BIDIRECTIONAL)
def test_reference_scan_gives_the_same(bidirectional):
    mixer = make_mixer(bidirectional)
    x = torch.randn(2, 17, 20)
    fast = mixer(x)
    mixer.scan_implementation = "reference"
    torch.testing.assert_close(mixer(x), fast, atol=1e-5, rtol=1e-5)


def test_unknown_scan_in_the_config_is_named():
    with pytest.raises(ValueError, match="Unknown selective scan 'quick'; choose from"):
        make_mixer(scan_implementation="quick")(torch.randn(1, 3, 20))
