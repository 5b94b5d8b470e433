import numpy as np
import pytest
import torch

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.presets import hstu_demo, hstu_large_ml1m, hstu_ml1m
from retrieval.errors import ConfigError
from retrieval.types import JaggedBatch
from tests.tolerances import assert_close


def batch_of(lengths: list[int], seed: int = 0) -> JaggedBatch:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    times = np.concatenate([np.sort(rng.integers(0, 10**7, n)) for n in lengths])
    return JaggedBatch(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=rng.integers(0, 30, total),
        actions=rng.integers(0, 3, total),
        timestamps=times,
        query_times=times + rng.integers(0, 10**5, total),
    )


def row(batch: JaggedBatch, index: int) -> JaggedBatch:
    part = slice(batch.offsets[index], batch.offsets[index + 1])
    fields = {name: getattr(batch, name)[part] for name in ("items", "actions", "timestamps", "query_times")}
    return JaggedBatch(offsets=np.array([0, part.stop - part.start]), **fields)


@pytest.fixture
def encoder() -> HSTUEncoder:
    torch.manual_seed(0)
    config = HSTUConfig(num_items=30, num_actions=3, max_length=40, width=16, num_heads=2, qk_dim=5, v_dim=7)
    encoder = HSTUEncoder(config).eval()
    assert encoder.action_embedding is not None
    torch.nn.init.normal_(encoder.action_embedding.weight, std=0.1)
    return encoder


def test_embeddings_have_unit_length(encoder: HSTUEncoder) -> None:
    np.testing.assert_allclose(np.linalg.norm(embed_users(encoder, batch_of([1, 40, 7])), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(item_vectors(encoder), axis=1), 1, atol=1e-6)


def test_an_embedding_does_not_depend_on_who_shares_the_batch(encoder: HSTUEncoder) -> None:
    batch = batch_of([3, 40, 1, 17, 17, 8])
    together = embed_users(encoder, batch)
    for index in range(len(batch)):
        alone = embed_users(encoder, row(batch, index))
        assert_close(torch.from_numpy(together[index : index + 1]), torch.from_numpy(alone), "embedding", "forward")


def test_training_code_and_inference_give_the_same_embedding(encoder: HSTUEncoder) -> None:
    batch = batch_of([5, 30, 2])
    tokens = encoder(JaggedTensors.of(batch, torch.device("cpu")))
    last = tokens[torch.from_numpy(batch.offsets[1:] - 1)].detach()
    assert_close(last, torch.from_numpy(embed_users(encoder, batch)), "embedding", "forward")


@pytest.mark.parametrize("field", ["items", "actions", "timestamps", "query_times"])
def test_every_input_field_matters(encoder: HSTUEncoder, field: str) -> None:
    batch = batch_of([12])
    changed = getattr(batch, field).copy()
    changed[-1] = changed[-1] + 500_000 if "time" in field else (changed[-1] + 1) % 3
    other = JaggedBatch(
        **{name: getattr(batch, name) for name in JaggedBatch.__dataclass_fields__ if name != field}, **{field: changed}
    )
    assert np.abs(embed_users(encoder, batch) - embed_users(encoder, other)).max() > 1e-4


def test_the_request_time_matters_only_through_the_time_bias() -> None:
    torch.manual_seed(0)
    blind = HSTUEncoder(HSTUConfig(num_items=30, max_length=40, time_bias=False)).eval()
    batch = batch_of([12])
    later = JaggedBatch(
        offsets=batch.offsets,
        items=batch.items,
        actions=batch.actions,
        timestamps=batch.timestamps,
        query_times=batch.query_times + 10**6,
    )
    np.testing.assert_array_equal(embed_users(blind, batch), embed_users(blind, later))


def test_presets_carry_the_published_shapes() -> None:
    base, large = hstu_ml1m(num_items=3706), hstu_large_ml1m(num_items=3706)
    assert (base.width, base.num_layers, base.num_heads, base.qk_dim, base.v_dim) == (50, 2, 1, 50, 50)
    assert (large.width, large.num_layers, large.num_heads, large.qk_dim, large.v_dim) == (50, 8, 2, 25, 25)
    assert base.attention_norm == large.attention_norm == 211
    assert base.max_length == large.max_length == 200
    assert base.dropout == large.dropout == 0.2
    assert hstu_demo(num_items=5).num_items == 5


def test_a_configuration_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.json: widht"):
        HSTUConfig.parse({"num_items": 3, "widht": 5}, "encoder.json")
