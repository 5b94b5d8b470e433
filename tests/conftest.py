"""Fixtures and switches for the whole suite."""

import os

# Before torch and faiss start their thread pools: tests share few cores with servers of their own.
os.environ.setdefault("OMP_NUM_THREADS", "2")

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported: kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.9 warns unless this is decided, one way or the other.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture
def datasets() -> Path:
    """Folder of real data sets, named by RETRIEVAL_DATASETS."""
    named = os.environ.get("RETRIEVAL_DATASETS")
    if not named:
        pytest.skip("RETRIEVAL_DATASETS does not name a folder of real data sets")
    return Path(named)


@pytest.fixture(autouse=True)
def _needs_gpu(request: pytest.FixtureRequest) -> None:
    """Skip tests marked `gpu` where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
