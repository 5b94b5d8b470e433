"""The synthetic world: what it promises of its logs, and that the oracle's probabilities are the true ones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from retrieval.data.synthetic import (
    POSITIVE_ACTIONS,
    World,
    WorldConfig,
    generate_world,
    large,
    nano,
    possible_recall,
    small,
)
from retrieval.data.synthetic_catalogue import CONTINUE, DAY, FIRST, SKIP, START, Catalogue, _slots, mixtures
from retrieval.data.synthetic_oracle import ask_oracle, distribution, slate_shares
from retrieval.data.synthetic_users import Block, _interests, simulate_block
from retrieval.errors import ConfigError, DataError


@dataclass(frozen=True)
class Log:
    """A world read back from its files, by user and then by time."""

    world: World
    user: NDArray[np.int64]
    item: NDArray[np.int64]
    time: NDArray[np.int64]
    positive: NDArray[np.bool_]
    category: NDArray[np.int64]
    published: NDArray[np.int64]
    target_user: NDArray[np.int64]
    target_item: NDArray[np.int64]
    target_time: NDArray[np.int64]

    @property
    def trains(self) -> NDArray[np.bool_]:
        """Events before the user's target."""
        limit = np.full(self.world.config.users, np.iinfo(np.int64).max)
        limit[self.target_user] = self.target_time
        return self.time < limit[self.user]

    def recall(self, scores: NDArray[np.float64], k: int) -> float:
        """Share of targets among the k best unseen items; scores `[users, items]` or `[items]`."""
        shape = (self.world.config.users, self.world.config.items)
        scores = np.broadcast_to(scores, shape).copy()
        scores[self.user[self.trains], self.item[self.trains]] = -np.inf
        scores = scores[self.target_user]
        own = scores[np.arange(len(scores)), self.target_item][:, None]
        return float(((scores > own).sum(1) < k).mean())


def read(world: World) -> Log:
    def numbers(column: list[str]) -> NDArray[np.int64]:
        return np.array([int(label[1:]) for label in column])

    events = pq.read_table(world.events_folder)
    items = pq.read_table(world.items_file)
    targets = pq.read_table(world.folder / "oracle.parquet")
    user, time = numbers(events["user_id"].to_pylist()), events["timestamp"].to_numpy()
    order = np.lexsort((time, user))
    assert numbers(items["item_id"].to_pylist()).tolist() == list(range(world.config.items))
    return Log(
        world=world,
        user=user[order],
        item=numbers(events["item_id"].to_pylist())[order],
        time=time[order],
        positive=np.isin(events["action"].to_pylist(), POSITIVE_ACTIONS)[order],
        category=np.unique(items["category"].to_pylist(), return_inverse=True)[1],
        published=items["published"].to_numpy(),
        target_user=numbers(targets["user_id"].to_pylist()),
        target_item=numbers(targets["item_id"].to_pylist()),
        target_time=targets["timestamp"].to_numpy(),
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return read(generate_world(small(seed=5), tmp_path_factory.mktemp("worlds") / "small"))


def z_score(hits: NDArray[np.bool_], probability: NDArray[np.float64]) -> float:
    """Standard errors between hits and what independent events of these probabilities give."""
    return float((hits - probability).sum() / np.sqrt((probability * (1 - probability)).sum()))


def test_ranking_by_the_oracles_distribution_hits_as_often_as_it_says(log: Log) -> None:
    oracle = pq.read_table(log.world.folder / "oracle.parquet")
    rank = oracle["oracle_rank"].to_numpy()
    assert len(rank) == log.world.config.users
    for k in (10, 50, 200):
        possible = oracle[f"possible_{k}"].to_numpy()
        assert abs(z_score(rank <= k, possible)) < 3.5
        assert abs((rank <= k).mean() - possible.mean()) < 0.03


def test_events_fall_on_each_item_as_often_as_the_true_distribution_says() -> None:
    # Stronger than hits in the top K: sums, over users, the whole distribution of an event in mid-log.
    config = WorldConfig(users=4000, items=60, categories=4, days=14, events_per_user=14, skip=0.3)
    catalogue = Catalogue.build(config)
    block = simulate_block(config, catalogue, 0)
    events = block.offsets[:-1] + 4
    expected = np.zeros(60)
    variance = np.zeros(60)
    for user, event in enumerate(events.tolist()):
        earlier = np.arange(block.offsets[user], event)
        before = int(earlier[block.kinds[earlier] != SKIP][-1])
        q = distribution(catalogue, block, slate_shares(catalogue, int(block.days[event])), user, event, before)
        p = q / q.sum()
        expected += p
        variance += p * (1 - p)
    counts = np.bincount(block.items[events], minlength=60)
    common = expected > 10
    z = (counts - expected)[common] / np.sqrt(variance[common])
    assert common.sum() > 30
    assert np.abs(z).max() < 4
    assert 0.6 < np.mean(z**2) < 1.5
    assert counts[expected == 0].sum() == 0


def tiny_case() -> tuple[Catalogue, Block]:
    """Items 0–3 of category 0 and 4–5 of category 1; item 3 is dead; the user saw 0 (liked) and 4 (skipped)."""
    slate = np.array([[[0] * 8 + [1] * 4 + [2] * 4, [4] * 12 + [5] * 4]], np.int32)
    mixture = np.repeat(np.arange(4, dtype=np.uint8), (128, 64, 32, 32))
    catalogue = Catalogue(
        category=np.array([0, 0, 0, 0, 1, 1]),
        birth=np.zeros(6, np.int64),
        alive=np.array([[True, True, True, False, True, True]]),
        slate=slate,
        trend=np.repeat([0, 1], (64, 192))[None],
        sequels=np.tile(np.array([1, 1, 1, 1, 5, 5, 3, 0], np.int32), (6, 1)),
        mixtures=np.tile(mixture, (4, 1)),
    )
    block = Block(
        first_user=0,
        epoch_days=10,
        offsets=np.array([0, 3]),
        interests=np.repeat([0, 1], (4, 12))[None, None],
        kinds=np.array([FIRST, SKIP, CONTINUE], np.uint8),
        days=np.zeros(3, np.int64),
        timestamps=np.array([0, 10, 20]),
        items=np.array([0, 4, 5], np.int32),
        actions=np.array([2, 0, 1], np.uint8),
    )
    return catalogue, block


def test_the_true_distribution_agrees_with_one_worked_out_by_hand() -> None:
    catalogue, block = tiny_case()
    q = distribution(catalogue, block, slate_shares(catalogue, 0), user=0, event=2, before=0)
    # Category 0: stay ¼ + interest ⅛·¼ + trend ⅛·¼ = 5/16; category 1: interest ⅛·¾ + trend ⅛·¾ = 3/16.
    # Sequels with ½: item 1 has 4 of 8 slots, item 5 two; item 3 is dead, items 0 and 4 were seen.
    assert q == pytest.approx([0, 5 / 64 + 1 / 4, 5 / 64, 0, 0, 3 / 64 + 1 / 8])
    # Out of 21 + 5 + 11 = 37 sixty-fourths; the user took item 5, the second likeliest.
    rows = ask_oracle(catalogue, block, np.array([0]))
    assert rows.events.tolist() == [2]
    assert rows.rank.tolist() == [2]
    assert rows.possible == pytest.approx(np.ones((1, 3)))


def test_possible_recall_adds_up_the_likeliest_items() -> None:
    catalogue, _ = tiny_case()
    wide = Catalogue(
        category=np.zeros(16, np.int64),
        birth=np.zeros(16, np.int64),
        alive=np.ones((1, 16), np.bool_),
        slate=np.repeat(np.arange(16, dtype=np.int32), (17,) + (1,) * 15)[None, None],
        trend=np.zeros((1, 256), np.int64),
        sequels=np.zeros((16, 8), np.int32),
        mixtures=catalogue.mixtures,
    )
    first = Block(
        first_user=0,
        epoch_days=10,
        offsets=np.array([0, 1]),
        interests=np.zeros((1, 1, 16), np.int64),
        kinds=np.zeros(1, np.uint8),
        days=np.zeros(1, np.int64),
        timestamps=np.zeros(1, np.int64),
        items=np.array([7], np.int32),
        actions=np.ones(1, np.uint8),
    )
    rows = ask_oracle(wide, first, np.array([0]))
    assert rows.possible[0] == pytest.approx([26 / 32, 1, 1])  # item 0 with 17 of 32 slots and nine with one
    assert rows.rank.tolist() == [8]  # ties go by number


def test_systematic_slots_keep_shares_and_never_offer_weight_zero() -> None:
    weights = np.array([0.0, 3.0, 1.0, 0.0, 2.0, 0.0, 0.0])
    table = _slots(weights, np.array([0, 4]), 8, np.array([0.5, 0.999]))
    assert table.tolist() == [[1] * 6 + [2] * 2, [4] * 8]
    # One tenth of 4 slots: in the long run 0.4 of them, whatever its neighbours.
    shifts = (np.arange(1000) + 0.5) / 1000
    rare = [(_slots(np.array([0.1, 0.9]), np.array([0]), 4, np.array([s])) == 0).sum() for s in shifts]
    assert np.mean(rare) == pytest.approx(0.4, abs=1e-3)


def test_mixtures_follow_the_configuration_to_a_256th() -> None:
    config = nano()
    shares = [np.bincount(row, minlength=4) / 256 for row in mixtures(config)]
    rest = 1 - config.sequel - config.stay - config.explore
    assert shares[CONTINUE] == pytest.approx([config.sequel, config.stay, rest, config.explore], abs=1 / 256)
    assert shares[FIRST][:2].tolist() == [0, 0]  # a log's first event has nothing to follow


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    names = ["events/part-00000.parquet", "items.parquet", "oracle.parquet", "world.json"]
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        generate_world(nano(seed=seed), folder)
    for name in names:
        one, two, other = ((folder / name).read_bytes() for folder in folders)
        assert one == two
        assert one != other


def test_a_world_of_several_blocks_has_everybody_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("retrieval.data.synthetic_catalogue._BLOCK_EVENTS", 7_500)
    calls: list[tuple[int, int]] = []
    world = generate_world(
        nano().model_copy(update={"oracle_users": 30}), tmp_path / "w", lambda done, of: calls.append((done, of))
    )
    parts = sorted(world.events_folder.iterdir())
    assert len(parts) == len(calls) == 4
    assert calls[-1] == (400, 400)
    users = [set(pq.read_table(part)["user_id"].to_pylist()) for part in parts]
    assert sorted(u for part in users for u in part) == [f"u{n:06d}" for n in range(400)]
    assert pq.read_table(world.folder / "oracle.parquet").num_rows == 30
    assert sum(pq.read_metadata(part).num_rows for part in parts) == world.events
    for part in parts:
        assert (np.diff(pq.read_table(part)["timestamp"].to_numpy()) >= 0).all()


def test_files_hold_plain_strings_and_seconds(log: Log) -> None:
    schema = pq.read_schema(log.world.events_folder / "part-00000.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        "user_id": "string",
        "item_id": "string",
        "timestamp": "int64",
        "action": "string",
    }
    item = pq.read_table(log.world.items_file).slice(0, 1).to_pylist()[0]
    assert list(item) == ["item_id", "title", "category", "published"]
    assert item["category"] in item["title"]


def test_the_target_is_each_users_last_positive_event(log: Log) -> None:
    user, item, time = log.user[log.positive], log.item[log.positive], log.time[log.positive]
    last = np.flatnonzero(np.append(np.diff(user) > 0, True))
    order = np.argsort(log.target_user)
    assert (user[last] == log.target_user[order]).all()
    assert (item[last] == log.target_item[order]).all()
    assert (time[last] == log.target_time[order]).all()


def test_nobody_sees_an_item_twice(log: Log) -> None:
    pairs = log.user * log.world.config.items + log.item
    assert len(np.unique(pairs)) == len(pairs)


def test_no_item_is_seen_before_it_is_published(log: Log) -> None:
    assert (log.time >= log.published[log.item]).all()
    assert log.published.max() > START + 50 * DAY


def test_items_peak_and_die(log: Log) -> None:
    age = (log.time - log.published[log.item]) // DAY
    born_inside = (log.published >= START) & (log.published < START + 20 * DAY)
    counts = np.bincount(age[born_inside[log.item]], minlength=40)
    assert counts[2:7].sum() > counts[0:2].sum() * 2  # rises over its first days
    assert counts[3:10].sum() > 1.5 * counts[33:40].sum()  # all of these items could be seen at both ages


def test_categories_come_into_and_go_out_of_fashion(log: Log) -> None:
    week = np.minimum((log.time - START) // (10 * DAY), 5)
    table = np.zeros((6, log.world.config.categories))
    np.add.at(table, (week, log.category[log.item]), 1)
    table /= table.sum(1, keepdims=True)
    assert np.median(table.max(0) / table.min(0)) > 1.5


def test_popularity_is_skewed(log: Log) -> None:
    counts = np.sort(np.bincount(log.item, minlength=log.world.config.items))[::-1]
    assert counts[: len(counts) // 10].sum() > 0.35 * counts.sum()
    assert np.median(counts) < 0.7 * counts.mean()


def test_events_come_in_sessions(log: Log) -> None:
    gaps = np.diff(log.time)[np.diff(log.user) == 0]
    assert gaps.min() >= 3
    assert (gaps < 300).mean() > 0.8  # seven of eight events go on with a session
    assert (gaps >= 3600).mean() > 0.1
    assert ((gaps >= 300) & (gaps < 3600)).mean() < 0.02


def test_evenings_are_busier_than_mornings(log: Log) -> None:
    hours = np.bincount(log.time // 3600 % 24, minlength=24)
    assert hours[18:23].sum() > 3 * hours[6:11].sum()


def test_skips_fall_mostly_outside_a_users_interests() -> None:
    config = small()
    catalogue = Catalogue.build(config)
    block = simulate_block(config, catalogue, 0)
    user = np.arange(config.users).repeat(np.diff(block.offsets))
    wishes = block.interests[user, block.days // config.epoch_days]
    inside = (wishes == catalogue.category[block.items][:, None]).any(1)
    skipped = block.actions == 0
    assert skipped.mean() == pytest.approx(config.skip, abs=0.01)
    assert skipped[inside].mean() < 0.1
    assert skipped[~inside].mean() > 0.3


def test_users_have_several_interests_and_these_drift(log: Log) -> None:
    config = log.world.config
    table = _interests(config, Catalogue.build(config), np.random.default_rng(0), 500)
    held = np.array([len(np.unique(row)) for row in table[:, 0]])
    assert held.max() <= 4
    assert (held >= 2).mean() > 0.7
    # In the log: a user's first third differs more from the last than from the middle one. Without drift it would
    # not, however much sessions stick to a category.
    near, far = [], []
    for mine in np.split(log.category[log.item], np.flatnonzero(np.diff(log.user)) + 1):
        if len(mine) >= 60:
            third = len(mine) // 3
            parts = (mine[:third], mine[third : 2 * third], mine[2 * third : 3 * third])
            shares = [np.bincount(part, minlength=config.categories) / third for part in parts]
            near.append(np.abs(shares[0] - shares[1]).sum() / 2)
            far.append(np.abs(shares[0] - shares[2]).sum() / 2)
    assert len(near) > 500
    assert np.mean(far) > 1.1 * np.mean(near)


def test_the_previous_item_tells_far_more_than_popularity(log: Log) -> None:
    n_items, n_users = log.world.config.items, log.world.config.users
    known = log.trains & log.positive
    popularity = np.bincount(log.item[known], minlength=n_items).astype(float)
    user, item = log.user[known], log.item[known]
    follows = np.zeros((n_items, n_items))
    same = user[1:] == user[:-1]
    np.add.at(follows, (item[:-1][same], item[1:][same]), 1)
    last = np.zeros(n_users, np.int64)
    last[user] = item  # events go by time: the last one stays
    by_popularity = log.recall(popularity, 10)
    by_previous = log.recall(follows[last] + popularity / popularity.sum(), 10)
    possible = possible_recall(log.world.folder, [10])[10]
    assert 0.01 < by_popularity < 0.1
    assert by_previous > 5 * by_popularity
    assert by_previous < possible


def test_cold_items_have_almost_no_events_and_are_asked_for(log: Log) -> None:
    last_day = START + (log.world.config.days - 1) * DAY
    cold = log.published >= last_day
    assert cold.sum() == 30  # 1.5% of 2000
    assert log.time[cold[log.item]].min() >= last_day
    in_training = np.bincount(log.item[log.trains], minlength=len(cold))
    assert np.median(in_training[cold]) < 0.3 * np.median(in_training[~cold])
    assert cold[log.target_item].sum() >= 10


def test_presets_have_their_sizes(log: Log, tmp_path: Path) -> None:
    assert 12_000 < generate_world(nano(), tmp_path / "nano").events < 18_000
    assert 180_000 < log.world.events < 220_000
    assert large().users * large().events_per_user == pytest.approx(10_000_000, rel=0.02)
    assert large(seed=3).seed == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequel": 0.9, "stay": 0.2}, "sequel \\+ stay \\+ explore"),
        ({"resume": 1.0}, "resume \\+ explore"),
        ({"items": 30}, "too few for 8 categories"),
        ({"users": 0}, "users"),
        ({"colour": 1}, "colour"),
        ({"cold_days": 20}, "cold_days"),
    ],
)
def test_impossible_configurations_are_refused_by_name(change: dict[str, float], message: str) -> None:
    values = nano().model_dump() | change
    with pytest.raises(ValidationError, match=message):
        WorldConfig(**values)
    with pytest.raises(ConfigError, match=message):
        WorldConfig.parse(values, "world.toml")


def test_a_catalogue_that_could_run_out_is_refused() -> None:
    # Appeal so steep that slates hold a few items only, while a user may see a quarter of the 200.
    with pytest.raises(ConfigError, match=r"only \d+ are on offer, but a user may see 50"):
        Catalogue.build(nano().model_copy(update={"zipf": 2.0}))


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(DataError, match="not a synthetic world"):
        generate_world(nano(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "text"
    world = generate_world(nano(), tmp_path / "world")
    again = generate_world(nano(seed=1), tmp_path / "world")
    assert again.config.seed == 1
    assert again.folder == world.folder


def test_possible_recall_names_what_it_lacks(log: Log, tmp_path: Path) -> None:
    recall = possible_recall(log.world.folder, [50, 10])
    assert 0.3 < recall[10] < recall[50] < 1
    with pytest.raises(ConfigError, match="not at 20"):
        possible_recall(log.world.folder, [20])
    with pytest.raises(DataError, match="holds no synthetic world"):
        possible_recall(tmp_path, [10])
