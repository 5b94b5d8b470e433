"""Exact search where the items are on a device; runs on a GPU where there is one, else in Triton's interpreter."""

import numpy as np
import pyarrow as pa
import pytest

from retrieval.index.attributes import Attributes
from retrieval.index.device_backend import DeviceBackend
from retrieval.index.filter import Compare
from retrieval.index.partial import PartialBackend
from retrieval.index.planner import Costs
from retrieval.index.searcher import Searcher
from retrieval.kernels.backend import Backend
from retrieval.snapshot.device_items import DeviceItems
from retrieval.types import Plan
from tests.kernels.device import DEVICE

COUNT, WIDTH = 260, 12
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(COUNT, WIDTH)).astype(np.float32)
QUERIES = RNG.normal(size=(3, WIDTH)).astype(np.float32)
# Whatever is filtered is given to the device as a bitmap.
SELECTOR = Costs(search=1, candidate=0, restricted=1e-9, gather=1, score=1)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.02])
def test_answers_are_full_eligible_and_exact(backend: Backend, share: float) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    place = RNG.permutation(COUNT)
    expired = np.flatnonzero(place % 7 == 0)
    rows = np.flatnonzero(place % 7 > 0)
    device = DeviceBackend(DeviceItems(VECTORS[rows], DEVICE, backend), VECTORS[rows])
    searcher = Searcher(
        PartialBackend(device, VECTORS, rows),
        np.arange(COUNT),
        attributes=Attributes({"place": pa.array(place)}, COUNT),
        retired=expired,
        costs=SELECTOR,
    )
    limit = int(share * COUNT)
    filter_ = Compare("place", "<", limit) if share < 1 else None
    excluded = [rows[:9]] * len(QUERIES)
    eligible = np.setdiff1d(np.flatnonzero((place % 7 > 0) & (place < limit)), rows[:9])
    found = searcher.search(QUERIES, [40] * len(QUERIES), excluded, [filter_] * len(QUERIES))
    wanted = min(40, len(eligible))
    truth = np.sort(QUERIES @ VECTORS[eligible].T, axis=1)[:, ::-1][:, :wanted]
    np.testing.assert_allclose(found.scores[:, :wanted], truth, atol=1e-5)
    assert np.isin(found.rows[:, :wanted], eligible).all()
    assert (found.rows[:, wanted:] == -1).all()
    assert set(found.plans.tolist()) == {Plan.INDEX if filter_ is None else Plan.SELECTOR}
