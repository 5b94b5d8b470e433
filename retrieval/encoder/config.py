"""Configuration of the HSTU encoder and the published presets."""

from pydantic import Field

from retrieval.config import Config

__all__ = ["PRESETS", "HSTUConfig", "hstu_demo", "hstu_large_ml1m", "hstu_ml1m"]


class HSTUConfig(Config):
    """Shape and regularisation of an HSTU encoder (arXiv 2402.17152, section 3).

    Attributes:
        num_items: N, rows of the item table.
        num_actions: rows of the action table; 0 leaves actions out of the tokens, as the published tables do.
        max_length: most recent events of a history that are read.
        width: D, width of tokens and embeddings.
        num_layers: HSTU layers.
        num_heads: attention heads of each layer.
        qk_dim: width of one head's queries and keys.
        v_dim: width of one head's values.
        dropout: probability, on the input and inside each layer.
        position_bias: whether attention adds a bias by distance in positions.
        time_bias: whether attention adds a bias by distance in time.
    """

    num_items: int = Field(ge=1)
    num_actions: int = Field(default=0, ge=0)
    max_length: int = Field(default=200, ge=1)
    width: int = Field(default=50, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=1, ge=1)
    qk_dim: int = Field(default=50, ge=1)
    v_dim: int = Field(default=50, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    position_bias: bool = True
    time_bias: bool = True

    @property
    def attention_norm(self) -> float:
        """The constant that attention sums are divided by.

        The published models use their longest row plus 11 (10 spare positions and the target's); the layer norm
        that follows has eps 1e-6, so the scale is not entirely free.
        """
        return float(self.max_length + 11)


def hstu_ml1m(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU on MovieLens-1M: D 50, 2 layers, 1 head (arXiv 2402.17152, table 4 and the public configuration)."""
    return HSTUConfig(num_items=num_items, num_actions=num_actions)


def hstu_large_ml1m(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """HSTU-large on MovieLens-1M: D 50, 8 layers, 2 heads of 25 (same source as `hstu_ml1m`)."""
    return HSTUConfig(num_items=num_items, num_actions=num_actions, num_layers=8, num_heads=2, qk_dim=25, v_dim=25)


def hstu_demo(*, num_items: int, num_actions: int = 0) -> HSTUConfig:
    """A small encoder for the demo: D 48, 2 layers, 2 heads of 24, histories of 100 events."""
    return HSTUConfig(
        num_items=num_items,
        num_actions=num_actions,
        max_length=100,
        width=48,
        num_heads=2,
        qk_dim=24,
        v_dim=24,
        dropout=0.1,
    )


PRESETS = {"demo": hstu_demo, "ml1m": hstu_ml1m, "large-ml1m": hstu_large_ml1m}
