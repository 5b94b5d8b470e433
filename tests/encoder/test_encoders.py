"""What holds for every encoder behind the protocol."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from retrieval.config import Config
from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.build import build_encoder
from retrieval.encoder.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from retrieval.encoder.config import BERT4RecConfig, EncoderConfig, GRU4RecConfig, HSTUConfig, SASRecConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.hstu_layer import HSTULayer
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.presets import PRESETS
from retrieval.encoder.protocol import UserEncoder
from retrieval.encoder.softmax_attention import softmax_attention
from retrieval.errors import ConfigError
from retrieval.kernels.hstu_attention import plan_attention
from retrieval.types import JaggedBatch
from tests.encoder.test_hstu import batch_of, row
from tests.tolerances import assert_close

SHAPE = {"num_items": 30, "num_actions": 3, "max_length": 12, "width": 16}
HSTU = {**SHAPE, "num_heads": 2, "qk_dim": 5, "v_dim": 7}
CONFIGS: dict[str, EncoderConfig] = {
    "hstu": HSTUConfig(**HSTU),
    "hstu visible": HSTUConfig(**HSTU, normalizer="visible"),
    "hstu softmax": HSTUConfig(**HSTU, attention="softmax"),
    "hstu softmax, no biases": HSTUConfig(**HSTU, attention="softmax", position_bias=False, time_bias=False),
    "sasrec": SASRecConfig(**SHAPE, num_heads=2, hidden=10),
    "bert4rec": BERT4RecConfig(**SHAPE, num_heads=2, hidden=20),
    "gru4rec": GRU4RecConfig(**SHAPE, num_layers=2, hidden=11),
}
CAUSAL = [name for name in CONFIGS if name != "bert4rec"]


def encoder_of(name: str) -> UserEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def tensors(batch: JaggedBatch) -> JaggedTensors:
    return JaggedTensors.of(batch, torch.device("cpu"))


def after_each(encoder: UserEncoder, batch: JaggedBatch) -> Tensor:
    with torch.no_grad():
        out: Tensor = encoder(tensors(batch))
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_have_unit_length_and_do_not_depend_on_batch_mates(name: str) -> None:
    encoder, batch = encoder_of(name), batch_of([5, 1, 12, 12, 3])
    together = embed_users(encoder, batch)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    for index in range(5):
        alone = embed_users(encoder, row(batch, index))
        assert_close(torch.from_numpy(alone[0]), torch.from_numpy(together[index]).double(), "embedding", "forward")
    every = after_each(encoder, batch)
    alone = after_each(encoder, row(batch, 2)).numpy()
    assert_close(torch.from_numpy(alone), every[6:18].double(), "embedding", "forward")


@pytest.mark.parametrize("name", CAUSAL)
def test_nothing_is_seen_of_the_future(name: str) -> None:
    encoder, batch = encoder_of(name), batch_of([8, 6])
    changed = replace(batch, items=batch.items.copy(), actions=batch.actions.copy(), timestamps=batch.timestamps.copy())
    changed.items[5] = (changed.items[5] + 1) % 30
    changed.actions[5] = (changed.actions[5] + 1) % 3
    changed.timestamps[5] += 10**6
    before, after = after_each(encoder, batch), after_each(encoder, changed)
    unmoved = [0, 1, 2, 3, 4, *range(8, 14)]
    assert_close(after[unmoved], before[unmoved].double(), "embedding", "forward")
    assert (before[5:8] - after[5:8]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("name", CAUSAL)
def test_last_is_the_embedding_after_the_last_token(name: str) -> None:
    encoder, batch = encoder_of(name), batch_of([5, 1, 12])
    expected = after_each(encoder, batch)[torch.tensor([4, 5, 17])]
    assert_close(torch.from_numpy(embed_users(encoder, batch)), expected.double(), "embedding", "forward")


def test_bert_answers_at_a_mask_after_the_history() -> None:
    encoder, batch = encoder_of("bert4rec"), batch_of([5, 12])
    by_hand = JaggedBatch(
        offsets=np.array([0, 6, 18]),
        items=np.concatenate([batch.items[:5], [30], batch.items[6:], [30]]),
        actions=np.concatenate([batch.actions[:5], [0], batch.actions[6:], [0]]),
        timestamps=np.zeros(18, np.int64),
        query_times=np.zeros(18, np.int64),
    )
    expected = after_each(encoder, by_hand)[torch.tensor([5, 17])]  # the full row gave up its first event
    assert_close(torch.from_numpy(embed_users(encoder, batch)), expected.double(), "embedding", "forward")


def test_bert_sees_both_ways() -> None:
    encoder, batch = encoder_of("bert4rec"), batch_of([8])
    batch.items[3] = 30
    before = after_each(encoder, batch)
    for neighbour in (1, 6):
        items = batch.items.copy()
        items[neighbour] = (items[neighbour] + 1) % 30
        assert (before[3] - after_each(encoder, replace(batch, items=items))[3]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_every_weight(name: str) -> None:
    encoder, batch = encoder_of(name), batch_of([12, 9, 12])
    if encoder.objective == "cloze":
        batch.items[::4] = 30
    out = encoder.train()(tensors(batch))
    (out * torch.randn_like(out)).sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_batch_and_empty_rows_pass_through(name: str) -> None:
    encoder = encoder_of(name)
    nothing = {name: np.empty(0, np.int64) for name in ("items", "actions", "timestamps", "query_times")}
    assert after_each(encoder, JaggedBatch(offsets=np.zeros(1, np.int64), **nothing)).shape == (0, 16)
    full, with_gap = batch_of([4, 3]), batch_of([4, 3])
    with_gap = replace(with_gap, offsets=np.array([0, 0, 4, 4, 7]))
    assert_close(after_each(encoder, with_gap), after_each(encoder, full).double(), "embedding", "forward")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_gives_the_same_encoder_back(name: str, tmp_path: Path) -> None:
    encoder, batch = encoder_of(name), batch_of([5, 2])
    info = CheckpointInfo(encoder=CONFIGS[name], actions=("", "a", "b"), dataset="d", split={}, training={})
    save_checkpoint(tmp_path, encoder, info)
    again, found = load_checkpoint(tmp_path)
    assert found.encoder == CONFIGS[name]
    assert np.array_equal(embed_users(again, batch), embed_users(encoder, batch))
    assert np.array_equal(item_vectors(again), item_vectors(encoder))


def test_a_checkpoint_of_a_model_that_is_not_known_is_refused(tmp_path: Path) -> None:
    info = CheckpointInfo(encoder=CONFIGS["sasrec"], actions=("",), dataset="d", split={}, training={})
    save_checkpoint(tmp_path, encoder_of("sasrec"), info)
    file = tmp_path / "encoder.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"sasrec"', '"mystery"'), encoding="utf-8")
    with pytest.raises(ConfigError, match="mystery"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_names_no_model_is_refused(tmp_path: Path) -> None:
    info = CheckpointInfo(encoder=CONFIGS["gru4rec"], actions=("",), dataset="d", split={}, training={})
    save_checkpoint(tmp_path, encoder_of("gru4rec"), info)
    file = tmp_path / "encoder.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["encoder"]["model"]
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"encoder\.json: encoder: .*'model'"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("config", [SASRecConfig, BERT4RecConfig])
def test_heads_that_do_not_divide_the_width_are_refused(config: type[Config]) -> None:
    with pytest.raises(ConfigError, match="num_heads 3 does not divide width 16"):
        config.parse({**SHAPE, "num_heads": 3}, "encoder.json")


@pytest.mark.parametrize(("model", "foreign"), [("sasrec", "qk_dim"), ("gru4rec", "num_heads"), ("hstu", "hidden")])
def test_a_key_of_another_model_is_refused(model: str, foreign: str, tmp_path: Path) -> None:
    info = CheckpointInfo(encoder=CONFIGS[model], actions=("",), dataset="d", split={}, training={})
    save_checkpoint(tmp_path, encoder_of(model), info)
    file = tmp_path / "encoder.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["encoder"][foreign] = 4
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{model}\.{foreign}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("normalizer", ["constant", "visible"])
@pytest.mark.parametrize("attention", ["pointwise", "softmax"])
def test_an_hstu_layer_is_its_formula(
    attention: Literal["pointwise", "softmax"], normalizer: Literal["constant", "visible"]
) -> None:
    """A token, a head and a key at a time, with the biases looked up one by one."""
    torch.manual_seed(2)
    config = HSTUConfig(**HSTU, attention=attention, normalizer=normalizer)
    encoder, batch = HSTUEncoder(config).eval(), batch_of([6, 1, 4])
    layer = encoder.layers[0]
    assert isinstance(layer, HSTULayer)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    # Small values: the norm that follows would cancel the normaliser, were it not for its eps.
    layer.uvqk.data[:, 14:28] *= 2e-3
    pos_table, time_table = layer.pos_table, layer.time_table
    assert pos_table is not None
    assert time_table is not None
    x = torch.randn(11, 16)
    where = tensors(batch)
    with torch.no_grad():
        plan = plan_attention(
            where.offsets, where.timestamps, where.query_times, time_bias=attention == "pointwise", backend="cpu"
        )
        out = layer(x, plan)
        normed = functional.layer_norm(x, (16,), eps=1e-6)
        u, v, q, k = functional.silu(normed @ layer.uvqk).split(layer.widths, dim=1)
        attended = torch.zeros(11, 14)
        for begin, end in ((0, 6), (6, 7), (7, 11)):
            for i in range(begin, end):
                seconds = (where.query_times[i] - where.timestamps[begin : i + 1]).clamp(min=1).double()
                bias = pos_table[i - torch.arange(begin, i + 1)]
                bias = bias + time_table[(seconds.log() / 0.301).floor().clamp(max=128).long()]
                for head in range(2):
                    scores = k[begin : i + 1, head * 5 : head * 5 + 5] @ q[i, head * 5 : head * 5 + 5]
                    if attention == "softmax":
                        weights = torch.softmax(scores / 5**0.5 + bias, 0)
                    else:
                        keys = i + 1 - begin if normalizer == "visible" else 12 + 11
                        weights = functional.silu(scores + bias) / keys
                    attended[i, head * 7 : head * 7 + 7] = weights @ v[begin : i + 1, head * 7 : head * 7 + 7]
        expected = x + layer.output(u * functional.layer_norm(attended, (14,), eps=1e-6))
    assert_close(out, expected.double(), "embedding", "forward")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_encoders_of_their_catalogue(preset: str) -> None:
    config = PRESETS[preset](num_items=7, num_actions=2)
    assert isinstance(config, Config)
    encoder = build_encoder(config)
    assert encoder.item_vectors().shape == (7, config.vector_width)


def test_softmax_attention_is_its_formula() -> None:
    """One layer's attention, a row and a head at a time."""
    torch.manual_seed(1)
    offsets, scale = torch.tensor([0, 4, 4, 5, 9]), 6**-0.5
    q, k, v = (torch.randn(9, 2, width, dtype=torch.float64) for width in (6, 6, 3))
    table = torch.randn(9, 9, dtype=torch.float64)
    for causal in (True, False):
        out = softmax_attention(
            q, k, v, offsets, causal=causal, bias=lambda index, _: table[index[:, :, None], index[:, None, :]]
        )
        for begin, end in ((0, 4), (4, 5), (5, 9)):
            for i in range(begin, end):
                seen = slice(begin, i + 1 if causal else end)
                for head in range(2):
                    weights = torch.softmax(k[seen, head] @ q[i, head] * scale + table[i, seen], 0)
                    torch.testing.assert_close(out[i, head], weights @ v[seen, head])


@pytest.mark.parametrize("name", CONFIGS)
def test_popularity_is_added_to_the_score_of_an_item_and_to_nothing_else(name: str, tmp_path: Path) -> None:
    plain, batch = encoder_of(name), batch_of([5, 1, 12])
    config = CONFIGS[name].model_copy(update={"popularity": True})
    encoder = build_encoder(config).eval()
    popularity = torch.linspace(-1, 0, 30)
    encoder.load_state_dict(plain.state_dict() | {"popularity": popularity})
    without = embed_users(plain, batch) @ item_vectors(plain).T
    users, items = embed_users(encoder, batch), item_vectors(encoder)
    assert users.shape[1] == items.shape[1] == config.vector_width == 17
    assert users @ items.T == pytest.approx(without + popularity.numpy(), abs=1e-6)
    info = CheckpointInfo(encoder=config, actions=("",), dataset="d", split={}, training={})
    save_checkpoint(tmp_path, encoder, info)
    assert np.array_equal(item_vectors(load_checkpoint(tmp_path)[0]), items)
