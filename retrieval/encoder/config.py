"""Configuration of the encoders. Presets are in `presets.py`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from retrieval.config import Config

__all__ = ["BERT4RecConfig", "EncoderConfig", "GRU4RecConfig", "HSTUConfig", "Layout", "SASRecConfig"]

Layout = Literal["joined", "interleaved"]


class _SequenceConfig(Config):
    """What all encoders have.

    Attributes:
        title: the model's name in reports.
        num_items: N, rows of the item table.
        num_actions: rows of the action table; 0 leaves actions out of the tokens, as the published tables do.
        query_actions: whether a request may name the action that is to follow; training asks each position for its
            target's.
        layout: "joined": an event is one token, of its item and its action. "interleaved": it is two, the item and then
            the action.
        kinds: rows of the table of each kind of tokens beside the main series (`types.TokenKind`); empty: items alone.
        max_length: most recent tokens of a history that are read, among them one set aside for each kind; an event
            counts once in either layout.
        read_length: tokens of a row that are read outside training, where long rows are costly; None: all of it.
        read: which these are: the "latest", or "spread", one half the latest and the other evenly spaced older ones.
        width: D, width of tokens and embeddings.
        num_layers: layers.
        dropout: probability, on the input and inside each layer.
        popularity: whether an item's score has a part for how popular it is of late: see `vector_width`.
    """

    num_items: int = Field(ge=1)
    num_actions: int = Field(default=0, ge=0)
    query_actions: bool = False
    layout: Layout = "joined"
    kinds: tuple[Annotated[int, Field(ge=1)], ...] = ()
    max_length: int = Field(default=200, ge=1)
    read_length: int | None = Field(default=None, ge=1)
    read: Literal["latest", "spread"] = "latest"
    width: int = Field(default=50, ge=1)
    num_layers: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    popularity: bool = False

    @property
    def vector_width(self) -> int:
        """Numbers of a vector that is served: D, and with `popularity` one more: an item's popularity, a user's 1."""
        return self.width + self.popularity

    @model_validator(mode="after")
    def _features_fit(self) -> Self:
        if self.query_actions and not self.num_actions:
            raise ValueError("query_actions: there are no actions to ask for (num_actions is 0)")
        if self.layout == "interleaved" and not self.num_actions:
            raise ValueError("layout: there are no actions to interleave items with (num_actions is 0)")
        if len(self.kinds) >= self.max_length:
            raise ValueError(f"max_length {self.max_length} leaves no token beside those of {len(self.kinds)} kinds")
        if self.read_length is not None and len(self.kinds) >= self.read_length:
            raise ValueError(f"read_length {self.read_length} leaves no token beside those of {len(self.kinds)} kinds")
        return self

    @property
    def positions(self) -> int:
        """Places of the longest row, once events are laid out."""
        return self.max_length * (2 if self.layout == "interleaved" else 1)


class HSTUConfig(_SequenceConfig):
    """Shape and regularisation of an HSTU encoder (arXiv 2402.17152, section 3).

    Attributes:
        num_heads: attention heads of each layer.
        qk_dim: width of one head's queries and keys.
        v_dim: width of one head's values.
        position_bias: whether attention adds a bias by distance in positions.
        time_bias: whether attention adds a bias by distance in time.
        attention: "pointwise", SiLU of each score by itself, or, for the ablation, "softmax" over what a token sees.
        normalizer: what pointwise sums are divided by: a "constant", or the number of "visible" keys.
    """

    title: ClassVar[str] = "HSTU"

    model: Literal["hstu"] = "hstu"
    num_heads: int = Field(default=1, ge=1)
    qk_dim: int = Field(default=50, ge=1)
    v_dim: int = Field(default=50, ge=1)
    position_bias: bool = True
    time_bias: bool = True
    attention: Literal["pointwise", "softmax"] = "pointwise"
    normalizer: Literal["constant", "visible"] = "constant"

    @property
    def attention_norm(self) -> float | None:
        """The constant that pointwise sums are divided by; None for the number of visible keys.

        The published models use their longest row plus 11 (10 spare positions and the target's); the layer norm
        that follows has eps 1e-6, so the scale is not entirely free.
        """
        return float(self.positions + 11) if self.normalizer == "constant" else None


class _TransformerConfig(_SequenceConfig):
    """What encoders of Transformer blocks have beside.

    Attributes:
        num_heads: attention heads of each layer; they divide the width.
        hidden: width inside the feed-forward networks.
    """

    num_heads: int = Field(default=1, ge=1)
    hidden: int = Field(default=50, ge=1)

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        return self


class SASRecConfig(_TransformerConfig):
    """Shape of a SASRec encoder (Kang, McAuley: "Self-attentive sequential recommendation", ICDM 2018)."""

    title: ClassVar[str] = "SASRec"

    model: Literal["sasrec"] = "sasrec"


class BERT4RecConfig(_TransformerConfig):
    """Shape of a BERT4Rec encoder (Sun et al.: "BERT4Rec", CIKM 2019)."""

    title: ClassVar[str] = "BERT4Rec"

    model: Literal["bert4rec"] = "bert4rec"
    num_heads: int = Field(default=2, ge=1)
    hidden: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _reads_items_alone(self) -> Self:
        if self.kinds or self.query_actions or self.layout != "joined":
            raise ValueError("bert4rec reads items and actions alone, joined; it has no kinds and no query_actions")
        return self


class GRU4RecConfig(_SequenceConfig):
    """Shape of a GRU4Rec encoder (Hidasi et al.: "Session-based recommendations with recurrent networks", ICLR 2016).

    Attributes:
        hidden: width of the recurrent state.
    """

    title: ClassVar[str] = "GRU4Rec"

    model: Literal["gru4rec"] = "gru4rec"
    num_layers: int = Field(default=1, ge=1)
    hidden: int = Field(default=128, ge=1)


EncoderConfig = Annotated[HSTUConfig | SASRecConfig | BERT4RecConfig | GRU4RecConfig, Field(discriminator="model")]
