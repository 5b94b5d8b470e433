"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.device import DEVICE
from tests.kernels.test_jagged import AWKWARD, check

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "shape", "max_length"), AWKWARD)
def test_batches_equal_the_reference_bit_for_bit(
    lengths: list[int], shape: tuple[int, ...], max_length: int, dtype: torch.dtype
) -> None:
    check(lengths, shape, max_length, "triton", DEVICE, dtype)
