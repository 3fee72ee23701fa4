import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mamba_rsst.models import cpu_linear
from mamba_rsst.models.cpu_linear import CpuLinear


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what goes to oneDNN."""
    seen = []
    if cpu_linear._ONEDNN is None:
        pytest.skip("torch was built without MKL or oneDNN")
    product = cpu_linear._ONEDNN

    def counted(x, *args):
        seen.append(tuple(x.shape))
        return product(x, *args)

    monkeypatch.setattr(cpu_linear, "_ONEDNN", counted)
    return seen


@pytest.fixture(scope="module", params=[True, False])
def layer(request):
    return CpuLinear(300, 450, bias=request.param)


@pytest.mark.parametrize("shape", [(1, 300), (5, 300), (1, 1, 300), (32, 1, 300), (3, 7, 300)])
def test_large_products_are_onednns(layer, calls, shape):
    x = torch.randn(shape)
    with torch.no_grad():
        out = layer(x)
    assert calls == [shape] and out.shape == (*shape[:-1], 450)
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_any_strides(layer, calls):
    """The last position of many, and weights stored the other way round."""
    x = torch.randn(3, 7, 300)
    for given in (x[:, -1:], x[:, -1], torch.randn(300, 3).t()):
        torch.testing.assert_close(layer(given), F.linear(given, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    turned = CpuLinear(300, 450, bias=False)
    turned.weight.data = layer.weight.t().contiguous().t()
    torch.testing.assert_close(turned(x[:, 0]), F.linear(x[:, 0], layer.weight), atol=1e-5, rtol=1e-5)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "shape, grad, dtype",
    [((300,), False, None)] + [((0, 300), False, None), ((1, 300), True, None), ((1, 300), False, torch.float64)],
)
def test_all_else_is_torchs(layer, calls, shape, grad, dtype):
    layer = layer.double() if dtype else layer.float()
    x = torch.randn(shape, dtype=dtype)
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.float()
    assert calls == []


@torch.no_grad()
def test_small_layers_and_autocast_and_compiled_code_are_torchs(layer, calls):
    small, x = CpuLinear(30, 45), torch.randn(1, 300)
    assert torch.equal(small(x[:, :30]), F.linear(x[:, :30], small.weight, small.bias))
    small(torch.randn(800, 30))  # few weights, but enough rows
    assert calls == [(800, 30)]
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    assert calls == []


@torch.no_grad()
def test_without_onednn(layer, monkeypatch):
    monkeypatch.setattr(cpu_linear, "_ONEDNN", None)
    x = torch.randn(1, 300)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@torch.no_grad()
def test_flops_are_counted_alike(layer, calls):
    x = torch.randn(3, 7, 300)
    counts = []
    for function in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        with FlopCounterMode(display=False) as counter:
            function(x)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 21 * 300 * 450] * 2 and calls
