"""Which implementation reduces a shard of the logits."""

import logging
import subprocess
import sys

import pytest
import torch

from megatron_opdlm import triton_support as kernel_support
from megatron_opdlm.rollout import shard_statistics
from megatron_opdlm.rollout.sampler import Sampling, most_logits
from megatron_opdlm.rollout.shard_statistics import statistics_on, torch_statistics
from megatron_opdlm.triton_support import log_once, why_no_triton


@pytest.fixture
def fresh_choice():
    log_once.cache_clear()
    why_no_triton.cache_clear()
    yield
    why_no_triton.cache_clear()


def test_the_kernel_runs_on_cuda(fresh_choice, caplog):
    pytest.importorskip("triton", reason="needs Triton")
    from megatron_opdlm.rollout.sampling_kernel import kernel_statistics

    with caplog.at_level(logging.INFO, logger=shard_statistics.__name__):
        for _ in range(3):
            assert statistics_on("cuda") is kernel_statistics
            assert statistics_on("cpu") is torch_statistics
    assert [r.getMessage() for r in caplog.records] == ["sampling with the Triton kernel"]


def test_the_kernel_takes_more_logits_at_once(fresh_choice):
    pytest.importorskip("triton", reason="needs Triton")
    filtered = Sampling(temperature=1.0, top_k=5)
    assert most_logits(Sampling(), "cuda") > most_logits(Sampling(), "cpu")
    assert most_logits(filtered, "cuda") == most_logits(filtered, "cpu")


def test_without_triton_the_reference_runs(fresh_choice, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for _ in range(3):
        assert statistics_on("cuda") is torch_statistics
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "install triton" in record.getMessage()


@pytest.mark.parametrize(
    "error", [RuntimeError("no driver"), OSError("bad\nELF"), ImportError("x")]
)
def test_a_broken_triton_is_a_missing_one(error, fresh_choice, caplog, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(kernel_support.importlib, "import_module", fail)
    assert statistics_on("cuda") is torch_statistics
    (record,) = caplog.records
    text = f"({type(error).__name__}: {' '.join(str(error).split())}); reinstall triton"
    assert record.getMessage().endswith(text) and "\n" not in record.getMessage()


def test_a_triton_that_interprets_is_a_missing_one_on_a_gpu(fresh_choice, caplog, monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    assert why_no_triton() is None  # interpreted here, where there is no GPU
    why_no_triton.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert statistics_on("cuda") is torch_statistics
    assert caplog.messages[0].endswith("unset TRITON_INTERPRET")


def test_the_package_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from megatron_opdlm.rollout.sampler import Sampling, sample_tokens
logits = torch.zeros(2, 9)
logits[:, 4] = 30.0
draws = sample_tokens(logits, Sampling(temperature=1.0), keys=torch.arange(2), mask_token_id=0,
                      vocab_size=9)
print(draws.tokens.tolist())
"""
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert output.stdout.strip() == "[4, 4]"
