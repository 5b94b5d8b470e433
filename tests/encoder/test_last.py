"""The path that serves: the last layer for the last position alone."""

import pytest
import torch

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import embed_users
from tests.encoder.test_hstu import batch_of
from tests.tolerances import assert_close

SHAPES = {
    "two layers": HSTUConfig(num_items=30, num_actions=3, max_length=40, width=16, num_heads=2, qk_dim=5, v_dim=7),
    "one layer": HSTUConfig(num_items=30, max_length=40, width=16, num_layers=1, qk_dim=8, v_dim=8),
    "no biases": HSTUConfig(num_items=30, max_length=40, width=16, position_bias=False, time_bias=False),
    "interleaved": HSTUConfig(num_items=30, num_actions=3, max_length=40, width=16, qk_dim=8, layout="interleaved"),
    "one layer, no time": HSTUConfig(num_items=30, max_length=40, width=16, num_layers=1, time_bias=False),
}


def encoder_of(config: HSTUConfig) -> HSTUEncoder:
    torch.manual_seed(0)
    encoder = HSTUEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.layers.parameters():
            # Large enough that attention, and not the residual, makes the output.
            parameter.mul_(5)
    return encoder


@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_the_last_position_of_the_full_forward(name: str) -> None:
    encoder = encoder_of(SHAPES[name])
    numpy_batch = batch_of([3, 40, 1, 17, 17, 8])
    batch = JaggedTensors.of(numpy_batch, torch.device("cpu"))
    with torch.no_grad():
        full = encoder(batch)[batch.offsets[1:] - 1]
        assert_close(encoder.last(batch), full, "embedding", "forward")
    assert_close(torch.from_numpy(embed_users(encoder, numpy_batch)), full, "embedding", "forward")


def test_triton_gives_the_same_embeddings() -> None:
    pytest.importorskip("triton")
    config, device = SHAPES["two layers"], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, fused = encoder_of(config), encoder_of(config)
    fused.backend = "triton"
    batch = batch_of([3, 20, 1])
    expected = embed_users(plain, batch)
    assert_close(
        torch.from_numpy(embed_users(fused.to(device), batch)), torch.from_numpy(expected), "embedding", "forward"
    )


def test_it_refuses_to_run_where_a_gradient_would_be_lost() -> None:
    encoder = encoder_of(SHAPES["two layers"])
    with pytest.raises(ValueError, match="has no gradient"):
        encoder.last(JaggedTensors.of(batch_of([3]), torch.device("cpu")))
