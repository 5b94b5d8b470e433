"""Item embeddings in a run's folder: block by block, kept for a second attempt, gone with other weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.encoder import inference
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import item_vectors
from retrieval.jobs import embedded
from retrieval.jobs.embedded import embed_items

ITEMS = 50


@pytest.mark.parametrize("popularity", [False, True])
def test_embeddings_in_files_are_those_of_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, popularity: bool
) -> None:
    monkeypatch.setattr(inference, "_BLOCK", 7)
    config = HSTUConfig(num_items=ITEMS, num_actions=0, width=8, num_layers=1, num_heads=1, popularity=popularity)
    torch.manual_seed(0)
    encoder = HSTUEncoder(config).eval()
    if encoder.popularity is not None:
        encoder.popularity.normal_()
    served = np.arange(ITEMS) % 3 > 0
    whole, some = (embed_items(encoder, "w", mask, tmp_path) for mask in (np.ones(ITEMS, bool), served))
    assert whole.answers is whole.items
    for found, rows in ((whole.items, slice(None)), (some.items, slice(None)), (some.answers, served)):
        assert isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, item_vectors(encoder)[rows])
    assert not whole.folder.exists(), "what is served has changed"
    monkeypatch.setattr(embedded, "item_blocks", lambda *_: pytest.fail("was embedded already"))
    np.testing.assert_array_equal(embed_items(encoder, "w", served, tmp_path).answers, some.answers)
    some.remove()
    assert not some.folder.exists()
    assert np.isfinite(some.items).all(), "stays readable"
