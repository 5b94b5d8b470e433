import math

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


def vectors_of(*values: list[float] | None, type_: pa.DataType | None = None) -> ItemFeatures:
    column = pa.array(values, type_ or pa.list_(pa.float32()))
    schema = ItemFeatureSchema(attributes={"v": ItemAttribute(kind="vector")})
    return item_features(Vocabulary(pa.array(range(len(values))), {"v": column}), schema, np.ones(len(values), int))


@pytest.mark.parametrize(
    "type_",
    [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16(), 2), pa.list_(pa.int8())],
    ids=str,
)
def test_vectors_are_scaled_to_length_one_and_missing_ones_are_zero(type_: pa.DataType) -> None:
    features = vectors_of([3, 4], None, [0, 0], [0, -2], type_=type_)
    np.testing.assert_allclose(features.vectors, [[0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [0.0, -1.0]], rtol=1e-6)
    assert features.vectors.dtype == np.float32
    assert features.size == 0


def test_an_empty_list_is_a_missing_vector_and_large_numbers_do_not_overflow() -> None:
    np.testing.assert_allclose(
        vectors_of([], [3e38, 3e38]).vectors, [[0.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)]], rtol=1e-6
    )


def test_vectors_of_several_attributes_stand_side_by_side_in_the_order_of_their_names() -> None:
    columns = {"b": pa.array([[2.0]]), "a": pa.array([[0.0, 5.0]])}
    schema = ItemFeatureSchema(attributes={name: ItemAttribute(kind="vector") for name in columns})
    features = item_features(Vocabulary(pa.array([1]), columns), schema, np.ones(1, int))
    assert features.vectors.tolist() == [[0, 1, 1]]


def test_vectors_that_are_none_are_named() -> None:
    with pytest.raises(ConfigError, match="'v' has vectors of 2 numbers, and of 3 in row 2"):
        vectors_of([1, 2], None, [1, 2, 3])
    with pytest.raises(ConfigError, match="'v' holds what is not a finite number in row 2"):
        vectors_of([1, 2], None, [1, float("nan")])
    with pytest.raises(ConfigError, match="no item has a vector in attribute 'v'"):
        vectors_of(None, [])
    with pytest.raises(ConfigError, match="'title' is string, not lists of numbers"):
        features_of("title", ItemAttribute(kind="vector"))


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
