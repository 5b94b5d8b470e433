"""`--index`: given, or chosen by measurement and kept with the run."""

import json
from pathlib import Path

import pytest

from retrieval.cli.main import main
from retrieval.jobs import index_choice
from tests.support import cyclic_histories, write_dataset


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_dataset(folder / "data", cyclic_histories(users=40, items=20, length=8), range(20))
    assert main(["train", f"{folder}/data", "--preset", "demo", "--epochs", "1", "--out", f"{folder}/run"]) == 0
    return folder


def test_a_choice_is_reported_and_kept(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"publish {work}/data {work}/run --registry {work}/registry --index auto --index-recall 0.9"
    assert main(command.split()) == 0
    assert "chosen: Flat" in capsys.readouterr().err
    report = json.loads(next((work / "registry").glob("*/report.json")).read_text())
    (measured, chosen) = report["index_choice"]
    assert measured["spec"] == chosen["spec"] == {"factory": "Flat", "search": {}}
    assert chosen["reaches"]
    assert chosen["items"] == 20

    def never(*args: object, **options: object) -> None:
        raise AssertionError("was chosen before")

    monkeypatch.setattr(index_choice, "choose_index", never)
    assert main(command.split()) == 0
    with pytest.raises(AssertionError, match="was chosen before"):
        main(f"evaluate {work}/data {work}/run --index auto".split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--index auto --search nprobe=3", "--search: is chosen too with --index auto"),
        ("--index-recall 0.9", "--index-recall: says what --index auto must reach; the index is given"),
        ("--index auto --index-recall 1.5", "--index-recall: recall"),
    ],
)
def test_options_that_exclude_each_other(
    work: Path, capsys: pytest.CaptureFixture[str], options: str, sentence: str
) -> None:
    assert main(f"publish {work}/data {work}/run --registry {work}/other {options}".split()) == 2
    assert sentence in capsys.readouterr().err
    assert not (work / "other").exists()
