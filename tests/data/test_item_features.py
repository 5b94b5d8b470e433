import numpy as np
import pyarrow as pa
import pytest

from retrieval.data.item_features import ItemAttribute, ItemFeatures, ItemFeatureSchema, item_features
from retrieval.data.vocabulary import Vocabulary
from retrieval.errors import ConfigError

ITEMS = Vocabulary(
    pa.array([7, 8, 9, 10]),
    {
        "title": pa.array(["The Cat", "the cat!", "Cat the", None]),
        "genres": pa.array(["Drama|War", "War|Drama", "War", None]),
        "tags": pa.array([["a", "b"], ["b"], [], None]),
        "year": pa.array([1990.0, 2000.0, 2010.0, None]),
    },
)

COUNTS = np.array([9, 1, 0, 2])


def of(features: ItemFeatures) -> list[list[int]]:
    ends = zip(features.offsets[:-1], features.offsets[1:], strict=True)
    return [features.features[start:end].tolist() for start, end in ends]


def features_of(name: str, attribute: ItemAttribute) -> list[list[int]]:
    features = item_features(ITEMS, ItemFeatureSchema(attributes={name: attribute}), COUNTS)
    assert features.size == attribute.buckets
    assert all(0 <= place < features.size for places in of(features) for place in places)
    return of(features)


def test_text_is_words_and_pairs_of_words_without_case() -> None:
    found = features_of("title", ItemAttribute(kind="text", buckets=10_000))
    assert [len(places) for places in found] == [3, 3, 3, 0]
    assert found[0] == found[1]
    assert len(set(found[0]) & set(found[2])) == 2


def test_a_set_has_no_order_and_may_be_a_list_or_a_text() -> None:
    found = features_of("genres", ItemAttribute(kind="set"))
    assert found[0] == found[1]
    assert set(found[2]) < set(found[0])
    assert [len(places) for places in features_of("tags", ItemAttribute(kind="set"))] == [2, 1, 0, 0]


def test_a_category_is_one_value() -> None:
    found = features_of("genres", ItemAttribute(kind="category"))
    assert [len(places) for places in found] == [1, 1, 1, 0]
    assert found[0] != found[1]


def test_numbers_go_by_quantiles() -> None:
    assert features_of("year", ItemAttribute(kind="number", buckets=3)) == [[0], [1], [2], []]


def test_attributes_do_not_share_rows() -> None:
    genres, year = ItemAttribute(kind="set", buckets=50), ItemAttribute(kind="number", buckets=3)
    features = item_features(ITEMS, ItemFeatureSchema(attributes={"year": year, "genres": genres}), COUNTS)
    assert features.size == 53
    assert of(features)[0][-1] == 50
    same = item_features(ITEMS, ItemFeatureSchema(attributes={"genres": genres, "year": year}), COUNTS)
    np.testing.assert_array_equal(features.features, same.features)


def test_a_column_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="no attribute 'colour'; it has title, genres, tags, year"):
        features_of("colour", ItemAttribute(kind="category"))
    with pytest.raises(ConfigError, match="'title' is string, not a number"):
        features_of("title", ItemAttribute(kind="number"))


def test_rare_items_share_rows_by_a_hash_of_their_ids() -> None:
    year = ItemAttribute(kind="number", buckets=3)
    features = item_features(ITEMS, ItemFeatureSchema(attributes={"year": year}, min_count=2, overflow=5), COUNTS)
    found = of(features)
    assert features.size == 8
    assert [len(places) for places in found] == [1, 2, 2, 0]
    assert all(3 <= found[item][-1] < 8 for item in (1, 2))
    alone = item_features(ITEMS, ItemFeatureSchema(min_count=2, overflow=5), COUNTS)
    assert [[place + 3 for place in places] for places in of(alone)] == [[], found[1][1:], found[2][1:], []]
