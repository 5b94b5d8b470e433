"""An encoder learns the same whichever kernels it runs on."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.types import JaggedBatch
from tests.kernels.device import DEVICE

pytest.importorskip("triton")

CONFIG = HSTUConfig(num_items=12, max_length=8, width=8, num_heads=2, qk_dim=5, v_dim=3, dropout=0.0)
STEPS = 4


def losses(backend: Any, device: torch.device) -> list[float]:
    rng = np.random.default_rng(0)
    lengths = [8, 1, 5]
    times = np.concatenate([np.sort(rng.integers(0, 10**7, n)) for n in lengths])
    batch = JaggedBatch(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=rng.integers(0, 12, sum(lengths)),
        actions=np.zeros(sum(lengths), dtype=np.int64),
        timestamps=times,
        query_times=times + rng.integers(0, 10**5, sum(lengths)),
    )
    targets = torch.from_numpy(rng.integers(0, 12, sum(lengths))).to(device)
    torch.manual_seed(0)
    encoder = HSTUEncoder(CONFIG, backend=backend).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03)
    curve = []
    for _ in range(STEPS):
        logits = encoder(JaggedTensors.of(batch, device)) @ encoder.item_vectors().T / 0.05
        loss = functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_loss_curve_is_that_of_the_cpu_backend(backend: str) -> None:
    expected = losses("cpu", torch.device("cpu"))
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses(backend, DEVICE), expected, rtol=1e-4)


def test_the_backend_is_no_part_of_the_model() -> None:
    encoder = HSTUEncoder(CONFIG, backend="reference")
    assert encoder.state_dict().keys() == HSTUEncoder(CONFIG).state_dict().keys()
    assert "backend" not in encoder.config.model_dump()
