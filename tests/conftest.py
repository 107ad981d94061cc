"""Process-wide set-up: one compute thread, Triton's interpreter where there is no GPU, and heavy
imports before any rank is forked."""

import importlib.util
import os
import signal
import warnings

import hypothesis
import pytest
import torch

# Before any fork: the parent's OpenMP pool does not survive into a forked child, which then hangs.
torch.set_num_threads(1)

# A case takes milliseconds, but on a busy machine any of them may take seconds.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Triton reads this when it is imported, which megatron-core does. Where there is a GPU kernels are
# compiled, and tests/gpu holds them against the same oracles.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("megatron") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns about absent GPU packages
        import megatron.core  # noqa: F401  (imported here so that forked ranks inherit it)


@pytest.fixture
def hang_up():
    """SIGHUP has its default, which it has not under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
