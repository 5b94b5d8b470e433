"""Hyperparameters of a training run."""

from typing import Annotated, Literal

from pydantic import Field

from retrieval.config import Config
from retrieval.data.item_features import ItemFeatureSchema
from retrieval.training.loss import LogQ
from retrieval.training.negatives import NegativeKind
from retrieval.training.schedule import Schedule

__all__ = ["Precision", "TrainConfig"]

Precision = Literal["float32", "bfloat16"]


class TrainConfig(Config):
    """Hyperparameters; defaults are those of the public tables, but for negatives that a batch shares.

    Attributes:
        epochs: passes over the users.
        batch_size: rows per step, of a user each or of a window.
        visit_order: how an epoch visits users: at "random", or by the "time" of each one's last training event. Targets
            of a step are then of about one time, and so are negatives that are drawn from them.
        windows: what an epoch reads of a history longer than the encoder's `max_length`: its "last" events alone, as
            the public tables do, or "all" of it, in windows whose cuts lie elsewhere in every epoch.
        learning_rate: highest rate of AdamW with betas (0.9, 0.98).
        schedule: what becomes of the rate after the warm-up: see `training.schedule`.
        warmup_steps: steps over which the rate rises from 0.
        weight_decay: of AdamW.
        clip_norm: longest that a step's gradient may be; None leaves gradients as they are.
        negatives: what a step contrasts with: see `training.negatives`. Uniform draws of as many items as there are,
            or more, become the full softmax.
        num_negatives: draws of a step, or of a position if they are not shared.
        shared_negatives: whether the positions of a step share their negatives.
        log_q: correction for how negatives are drawn: see `training.loss`.
        temperature: τ of the softmax.
        stochastic_length: α of `data.stochastic_length`; None reads histories whole.
        mask_share: share of a history's tokens that a cloze encoder has to fill in.
        action_weights: weight of a target by its action, of positive actions; 1 where none is given. A step's loss is
            the mean by weight.
        query_action_share: of positions that are asked for their target's action, by encoders with `query_actions`;
            the others are asked for any, as requests are that name none.
        item_features: attributes that item embeddings are made of beside the id; None: the id alone.
        sparse_items: whether a step reads and updates only the rows of the item table that it names: see
            `training.optimizer`. "auto": with sampled negatives and more than 100,000 items.
        precision: of products in the encoder and the loss; weights and sums stay float32.
        ema_decay: the weights that are evaluated and kept are a running mean, w̄ ← d·w̄ + (1 − d)·w after every step;
            None keeps the last weights.
        validate_every: epochs between validations.
        patience: the run ends after so many validations without a better one; None runs all epochs.
        seed: determines initial weights, order, negatives and dropout; on a CPU, the run bit for bit.
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=128, ge=1)
    visit_order: Literal["random", "time"] = "random"
    windows: Literal["last", "all"] = "last"
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    schedule: Schedule = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    negatives: NegativeKind = "uniform"
    num_negatives: int = Field(default=512, ge=1)
    shared_negatives: bool = True
    log_q: LogQ = "none"
    temperature: float = Field(default=0.05, gt=0)
    stochastic_length: float | None = Field(default=None, gt=1, le=2)
    mask_share: float = Field(default=0.2, gt=0, lt=1)
    action_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    query_action_share: float = Field(default=0.5, gt=0, lt=1)
    item_features: ItemFeatureSchema | None = None
    sparse_items: bool | Literal["auto"] = "auto"
    precision: Precision = "float32"
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    validate_every: int = Field(default=1, ge=1)
    patience: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
