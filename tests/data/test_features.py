from pathlib import Path

import pytest

from retrieval.data.features import FeatureSchema, SideColumn
from retrieval.errors import ConfigError


def test_one_file_declares_items_context_and_series(tmp_path: Path) -> None:
    (tmp_path / "features.toml").write_text(
        '[items.attributes.genres]\nkind = "set"\n[context.age]\n[auxiliary.region]\nmin_count = 3\nmax_values = 9\n'
    )
    schema = FeatureSchema.load(tmp_path / "features.toml")
    assert schema.items is not None
    assert schema.items.attributes["genres"].kind == "set"
    assert schema.context == {"age": SideColumn()}
    assert schema.auxiliary == {"region": SideColumn(min_count=3, max_values=9)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[items]\nattributes = {}", r"features\.toml: items: .*neither attributes nor overflow rows"),
        ('[items.attributes.genres]\nkind = "bag"', r"features\.toml: items\.attributes\.genres\.kind"),
        ('[items.attributes.genres]\nkind = "set"\ncolour = 1', r"features\.toml: items\.attributes\.genres\.colour"),
        ("[context.age]\nmax_values = 0", r"features\.toml: context\.age\.max_values"),
        ("[series.region]", r"features\.toml: series"),
        ("[items", r"features\.toml: cannot be read as TOML"),
    ],
)
def test_a_schema_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "features.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        FeatureSchema.load(tmp_path / "features.toml")
