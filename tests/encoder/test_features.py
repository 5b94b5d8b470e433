"""Encoders that read kinds beside the main series and are asked for an action: no leak, and the leak check itself."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval.data.sequences import TrainingBatch, gather_training
from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import BERT4RecConfig, EncoderConfig, GRU4RecConfig, HSTUConfig, SASRecConfig
from retrieval.encoder.inference import embed_users
from retrieval.encoder.protocol import UserEncoder
from retrieval.encoder.sasrec import SASRecEncoder
from retrieval.encoder.transformer import TransformerBlock
from retrieval.errors import ConfigError
from retrieval.types import EventColumns, JaggedBatch, SideRows
from tests.leaks import Leak, assert_no_leak
from tests.tolerances import assert_close

ITEMS = 20
SHAPE = {"num_items": ITEMS, "num_actions": 3, "query_actions": True, "kinds": (4, 3, 5), "max_length": 40, "width": 16}
CONFIGS: dict[str, EncoderConfig] = {
    "hstu": HSTUConfig(**SHAPE, num_heads=2, qk_dim=5, v_dim=7),
    "hstu softmax": HSTUConfig(**SHAPE, num_heads=2, qk_dim=5, v_dim=7, attention="softmax"),
    "sasrec": SASRecConfig(**SHAPE, num_heads=2, hidden=10),
    "gru4rec": GRU4RecConfig(**SHAPE, hidden=11),
    "hstu interleaved": HSTUConfig(**SHAPE, layout="interleaved", num_heads=2, qk_dim=5, v_dim=7),
    "sasrec interleaved": SASRecConfig(**SHAPE, layout="interleaved", num_heads=2, hidden=10),
    "gru4rec interleaved": GRU4RecConfig(**SHAPE, layout="interleaved", hidden=11),
}
EVENTS = EventColumns(
    items=np.array([3, 7, 3, 11, 2, 19, 4], np.int32),
    actions=np.array([1, 2, 1, 1, 0, 2, 1], np.uint8),
    timestamps=np.array([100, 200, 200, 300, 400, 500, 600], np.int64),
)
SIDE = SideRows(
    num_kinds=3,
    context=np.array([[2]]),
    kinds=np.array([2, 3, 2, 3, 3]),
    values=np.array([1, 0, 0, 1, 0]),
    timestamps=np.array([50, 200, 300, 400, 450]),
    starts=np.zeros(1, np.int64),
    ends=np.array([5]),
)


def encoder_of(config: EncoderConfig) -> UserEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def gather(events: EventColumns, side: SideRows | None) -> TrainingBatch:
    starts, ends = np.zeros(1, np.int64), np.array([len(events.items)])
    return gather_training(events, starts, ends, np.array([0, 1, 1], np.float32), 40, side)


def encode_with(encoder: UserEncoder) -> Callable[[TrainingBatch], Tensor]:
    def encode(batch: TrainingBatch) -> Tensor:
        with torch.no_grad():
            out: Tensor = encoder(JaggedTensors.of(batch.inputs, torch.device("cpu")))
        return out

    return encode


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", [SIDE, None], ids=["kinds", "items"])
def test_no_target_leaks(name: str, side: SideRows | None) -> None:
    config = CONFIGS[name] if side is not None else CONFIGS[name].model_copy(update={"kinds": ()})
    assert_no_leak(encode_with(encoder_of(config)), gather, EVENTS, side, ITEMS)


def test_interleaved_an_event_is_its_item_and_then_its_action() -> None:
    batch = gather(EVENTS, SIDE).inputs
    tokens, last = JaggedTensors.of(batch, torch.device("cpu")).interleaved()
    assert tokens.is_action is not None
    assert tokens.kinds is not None
    assert tokens.query_actions is not None
    actions = zip(tokens.is_action, tokens.kinds, tokens.items, tokens.actions, strict=True)
    read = ["a%d" % a if is_action else f"{kind}:{item}" for is_action, kind, item, a in actions]  # noqa: UP031
    assert read == (
        "1:2 2:1 0:3 a1 0:7 a2 0:3 a1 3:0 0:11 a1 2:0 0:2 a0 3:1 3:0 0:19 a2".split()  # noqa: SIM905
    )
    # What asks for an item stands where it did; an item asks for nothing but its action, at its own time.
    assert tokens.offsets.tolist() == [0, 18]
    assert tokens.query_times[last].tolist() == batch.query_times.tolist()
    assert tokens.query_actions[last].tolist() == batch.query_actions.tolist()  # type: ignore[union-attr]
    at_items = (~tokens.is_action & (tokens.kinds == 0)).nonzero().flatten()
    assert tokens.query_times[at_items].tolist() == tokens.timestamps[at_items].tolist()
    assert not tokens.query_actions[at_items].any()
    assert last.tolist() == [0, 1, 3, 5, 7, 8, 10, 11, 13, 14, 15, 17]


def test_interleaved_without_kinds_every_token_becomes_two() -> None:
    tokens, last = JaggedTensors.of(gather(EVENTS, None).inputs, torch.device("cpu")).interleaved()
    assert tokens.offsets.tolist() == [0, 12]
    assert last.tolist() == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("name", [name for name in CONFIGS if "interleaved" in name])
def test_interleaved_an_item_knows_itself_and_not_yet_what_was_done_with_it(name: str) -> None:
    encoder, batch = encoder_of(CONFIGS[name]), gather(EVENTS, SIDE).inputs

    def after_items(batch: JaggedBatch) -> Tensor:
        tokens, last = JaggedTensors.of(batch, torch.device("cpu")).interleaved()
        with torch.no_grad():
            return encoder.outputs(tokens)[last[torch.from_numpy(batch.main)] - 1]

    before, place = after_items(batch), int(np.flatnonzero(batch.main)[3])
    items, actions = batch.items.copy(), batch.actions.copy()
    actions[place] = 2
    moved = (after_items(replace(batch, actions=actions)) - before).abs().amax(1) > 1e-5
    assert moved.tolist() == [False] * 4 + [True] * 2
    items[place] = 17
    moved = (after_items(replace(batch, items=items)) - before).abs().amax(1) > 1e-5
    assert moved.tolist() == [False] * 3 + [True] * 3


def test_a_model_that_is_fed_its_own_target_is_caught() -> None:
    encode = encode_with(encoder_of(CONFIGS["hstu"]))

    def peek(batch: TrainingBatch) -> Tensor:
        items = np.where(batch.inputs.main, batch.targets, batch.inputs.items)
        return encode(replace(batch, inputs=replace(batch.inputs, items=items)))

    with pytest.raises(Leak, match="token 2 sees event 1"):
        assert_no_leak(peek, gather, EVENTS, SIDE, ITEMS)


def test_a_model_that_sees_both_ways_is_caught() -> None:
    encoder = encoder_of(CONFIGS["sasrec"])
    assert isinstance(encoder, SASRecEncoder)
    for block in encoder.blocks:
        assert isinstance(block, TransformerBlock)
        block.causal = False
    with pytest.raises(Leak):
        assert_no_leak(encode_with(encoder), gather, EVENTS, SIDE, ITEMS)


def test_series_that_are_known_before_the_event_that_they_are_recorded_with_are_caught() -> None:
    def early(events: EventColumns, side: SideRows | None) -> TrainingBatch:
        assert side is not None
        return gather(events, replace(side, timestamps=side.timestamps - 1))

    with pytest.raises(Leak, match=r"sees event [01]"):
        assert_no_leak(encode_with(encoder_of(CONFIGS["hstu"])), early, EVENTS, SIDE, ITEMS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_number_means_another_thing_in_another_kind(name: str) -> None:
    encoder, batch = encoder_of(CONFIGS[name]), gather(EVENTS, SIDE).inputs
    assert batch.kinds is not None
    tables = {0: encoder.item_embedding.weight.detach()}
    assert encoder.side_embedding is not None
    tables |= dict(enumerate(encoder.side_embedding.weight.detach().split([4, 3, 5]), 1))
    expected = torch.stack([tables[kind][row] for kind, row in zip(batch.kinds, batch.items, strict=True)])
    torch.testing.assert_close(encoder._look_up(JaggedTensors.of(batch, torch.device("cpu"))), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_reach_the_rows_that_were_read_and_no_others(name: str) -> None:
    encoder, batch = encoder_of(CONFIGS[name]).train(), gather(EVENTS, SIDE).inputs
    (encoder(JaggedTensors.of(batch, torch.device("cpu"))) * torch.randn(len(batch.items), 16)).sum().backward()
    assert encoder.side_embedding is not None
    grad = encoder.side_embedding.weight.grad
    assert grad is not None
    # Kind 1 has rows 0–3, kind 2 rows 4–6, kind 3 rows 7–11.
    assert grad.abs().sum(1).nonzero().flatten().tolist() == [2, 4, 5, 7, 8]
    grad = encoder.item_embedding.weight.grad
    assert grad is not None
    assert grad.abs().sum(1).nonzero().flatten().tolist() == [2, 3, 7, 11, 19]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_request_asks_for_an_action_as_training_does(name: str) -> None:
    """At the last token of a training row the query is what a server makes of the request's action."""
    encoder, batch = encoder_of(CONFIGS[name]), gather(EVENTS, SIDE).inputs
    with torch.no_grad():
        trained = encoder(JaggedTensors.of(batch, torch.device("cpu")))[-1:]
    assert_close(torch.from_numpy(embed_users(encoder, batch)), trained.double(), "embedding", "forward")
    assert batch.query_actions is not None
    other = batch.query_actions.copy()
    other[-1] = 2
    assert np.abs(embed_users(encoder, replace(batch, query_actions=other)) - trained.numpy()).max() > 1e-3


def test_what_was_never_trained_starts_without_effect() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(CONFIGS["hstu"])
    assert encoder.side_embedding is not None
    assert encoder.query_embedding is not None
    assert not encoder.side_embedding.weight[[0, 4, 7]].any()
    assert encoder.side_embedding.weight.any(1).sum() == 9
    assert not encoder.query_embedding.weight.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_actions": 0, "query_actions": True}, "no actions to ask for"),
        ({"kinds": (3, 3), "max_length": 2}, "max_length 2 leaves no token"),
        ({"kinds": (0,)}, r"kinds\.0"),
        ({"layout": "interleaved"}, "no actions to interleave items with"),
    ],
)
def test_shapes_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HSTUConfig.parse({"num_items": 5, **values}, "encoder.json")


@pytest.mark.parametrize("values", [{"kinds": (3,)}, {"query_actions": True}, {"layout": "interleaved"}])
def test_bert_reads_items_and_actions_alone(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="bert4rec reads items and actions alone"):
        BERT4RecConfig.parse({"num_items": 5, "num_actions": 2, **values}, "encoder.json")
