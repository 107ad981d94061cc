"""What tests of this folder need of a machine; elsewhere they are skipped and say why."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_transformer_engine = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="needs the package transformer-engine"
)
