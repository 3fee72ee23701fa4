import pytest
import torch
from tiny import make

from mamba_rsst import PruningConfig, find_groups, latency, prune_, select_channels
from mamba_rsst.latency import latency_cost, measure_latency
from mamba_rsst.speed import Latency


@pytest.fixture
def clock(monkeypatch):
    """A clock that reads the shapes: all takes two milliseconds a parameter. Nothing drifts."""
    timed = []

    def compare(models, inputs, **options):
        timed.append(list(models))
        out = {}
        for name, model in models.items():
            given = inputs(model) if callable(inputs) else inputs
            with torch.no_grad():
                model(**given)
            ms = 2.0 * sum(p.numel() for p in model.parameters())
            out[name] = Latency(ms=ms, low=ms, high=ms, device="cpu")
        return out

    monkeypatch.setattr(latency, "compare_latency", compare)
    return timed


@pytest.mark.parametrize("targets", [["d_inner"], ["d_inner", "d_state"], ["hidden_size"], ["num_hidden_layers"]])
@pytest.mark.parametrize("kind", ["lm", "lm_mlp", "v2", "mamba"])
def test_the_table_knows_what_was_timed(kind, targets, clock):
    """Where time is linear in each width, what is interpolated is exact: the solver meets the budget in the model."""
    model = make(kind, num_hidden_layers=3, tie_word_embeddings=False) if kind != "v2" else make(kind)
    scope = "layer" if kind == "mamba" else "global"
    config = PruningConfig(
        targets=targets, sparsity=0.25, budget="latency", round_to=2, scope=scope, floor=0.2, importance="magnitude_l2"
    )
    cost = latency_cost(model, config, seq_len=8)
    before = sum(p.numel() for p in model.parameters())
    assert cost.measured.ms == 2 * before and cost({}) == pytest.approx(2 * before)
    if targets != ["num_hidden_layers"]:
        assert len({name for name in clock[0] if name != "model"}) >= 3
    masks = select_channels(model, config, cost=cost)
    predicted = cost(masks)
    prune_(model, config, cost=cost)
    after = measure_latency(model, seq_len=8).ms
    assert predicted <= 0.75 * 2 * before
    assert after == pytest.approx(predicted, rel=0.06)  # hidden_size enters twice; a tenth of all is the rest


def test_blocks_of_one_kind_share_their_table(clock):
    model = make("v2", num_hidden_layers=4, intermediate_size=[33, 0, 33, 0], d_inner=[46, 46, 30, 20])
    cost = latency_cost(model, PruningConfig(budget="latency", round_to=2), seq_len=8)
    assert len(cost.tables) == 2 and [cost.kinds[0], cost.kinds[1]] == [cost.kinds[2], cost.kinds[3]]
    assert [max(table.axes["d_inner"]) for table in cost.tables.values()] == [46, 46]


def test_a_real_clock():
    model = make("lm", d_inner=256, hidden_size=64)
    config = PruningConfig(sparsity=1 - 1 / 1.05, budget="latency")
    cost = latency_cost(model, config, seq_len=64, rounds=3, run_seconds=0.01)
    narrow = {g.name: torch.arange(g.size) < 32 for g in find_groups(model, ["d_inner"])}
    assert cost({}) == pytest.approx(cost.measured.low) and 0 < cost(narrow) < cost({})
