"""The check of the protos: clean as they are, and not blind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from protos.check import PROTOS, complaints

BREAKING: dict[str, Callable[[str], str]] = {
    "a field is gone": lambda text: text.replace("  int32 shortfall = 5;\n", ""),
    "a field has another number": lambda text: text.replace("int32 k = 4;", "int32 k = 40;"),
    "a field has another type": lambda text: text.replace("int32 k = 4;", "string k = 4;"),
    "a field has another name": lambda text: text.replace("int32 k = 4;", "int32 count = 4;"),
    "a method is gone": lambda text: text.replace(
        "  rpc EmbedUsers(EmbedUsersRequest) returns (EmbedUsersResponse);\n", ""
    ),
    "an enumerator is gone": lambda text: text.replace("  SOURCE_CONTEXT = 3;\n", ""),
}


def changed(folder: Path, change: Callable[[str], str]) -> Path:
    copy = shutil.copytree(PROTOS, folder / "protos")
    path = copy / "retrieval" / "v1" / "retrieval.proto"
    before = path.read_text(encoding="utf-8")
    path.write_text(change(before), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before
    return copy


def test_the_protos_are_clean_and_break_nobody() -> None:
    assert complaints() == ""


@pytest.mark.parametrize("change", BREAKING)
def test_what_would_break_a_caller_is_refused(tmp_path: Path, change: str) -> None:
    assert "retrieval.proto" in complaints(changed(tmp_path, BREAKING[change]))


def test_what_adds_to_the_interface_is_fine(tmp_path: Path) -> None:
    more = changed(
        tmp_path, lambda text: text.replace("int32 k = 4;", "int32 k = 4;\n\n  // More.\n  int32 more = 99;")
    )
    assert complaints(more) == ""


def test_what_is_against_the_fields_habits_is_refused(tmp_path: Path) -> None:
    odd = changed(tmp_path, lambda text: text.replace("int32 k = 4;", "int32 k = 4;\n  int32 moreOfIt = 99;"))
    assert "moreOfIt" in complaints(odd)
