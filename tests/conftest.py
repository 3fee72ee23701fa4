import gc
import os

import pytest


if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side, and those they start, must not each take all cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """accelerate collects garbage whenever a stage of training begins. Once transformers, datasets and lm-eval are all
    loaded that takes longer than a tiny stage itself, unless what is there already is left out."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """Every test draws the same random numbers, and no scan is forced from outside."""
    monkeypatch.delenv("MAMBA_RSST_SCAN", raising=False)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """(folder, what was printed): the tiny recipe by the command line, once for all tests."""
    from tiny_runs import run_to_the_end

    return run_to_the_end(tmp_path_factory.mktemp("finished"))
