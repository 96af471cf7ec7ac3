"""The tables of keys and errors in the documentation say what the code says."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

import me_local
from me_local import errors
from me_local.config import Config, MemberConfig, load_config
from me_local.sampling import Sampling

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models-toml.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()

TABLES = ("ensemble", "sampling", "members")
OTHERS = {"path", "members", "constraint", "presets", "preset", "origin"}
"""Fields of a configuration that are no keys of one of these tables."""
OF_MODELS = 'name = "a"\npath = "a.gguf"\n'


def rows(section: str) -> list[tuple[list[str], str]]:
    """The keys and the default, as it is written, of each row of the tables below a heading."""
    found = re.findall(r"^\| (`\w.*?) \| (.*?) \| .*\|$", section, re.MULTILINE)
    return [(re.findall(r"`(\w+)`", keys), default) for keys, default in found]


def documented() -> dict[str, dict[str, str]]:
    """Table of the file → key → its default as it is written."""
    parts = re.split(r"^## The tables? `\[+(\w+)\]+`$", PAGE, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    return {name: {key: default for keys, default in rows(text) for key in keys} for name, text in sections.items()}


def literal(default: str) -> str | None:
    """The default as TOML, where the page gives a value; None where it describes one."""
    whole = re.fullmatch(r"`([^`]+)`", default)
    return whole[1] if whole else None


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_the_page_has_a_table_for_each_of_the_file() -> None:
    assert tuple(documented()) == TABLES


def test_every_key_is_in_the_tables_and_no_other() -> None:
    page = documented()
    shape = names(Sampling)
    assert set(page["members"]) == names(MemberConfig) - {"sampling"} | shape
    assert set(page["ensemble"]) | set(page["sampling"]) == names(Config) - OTHERS | shape
    assert set(page["ensemble"]) & set(page["sampling"]) == set()


def test_no_key_has_two_rows() -> None:
    keys = [key for keys, _ in rows(PAGE) for key in keys]
    assert len(keys) == sum(map(len, documented().values()))


def written(table: str, key: str, value: str, folder: Path) -> Config:
    """The configuration of one member, with this key where the page has it."""
    line = f"{key} = {value}\n" if key else ""
    texts = {name: line if name == table else "" for name in TABLES}
    path = folder / "models.toml"
    text = f"[ensemble]\n{texts['ensemble']}[sampling]\n{texts['sampling']}[[members]]\n{OF_MODELS}{texts['members']}"
    path.write_text(text)
    return load_config(path)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        (table, key, value)
        for table, keys in documented().items()
        for key, default in keys.items()
        if (value := literal(default)) is not None
    ],
)
def test_a_default_written_out_is_taken_and_changes_nothing(table: str, key: str, value: str, tmp_path: Path) -> None:
    assert written(table, key, value, tmp_path) == written("", "", "", tmp_path)


def test_defaults_that_the_page_describes_are_not_values_in_the_code() -> None:
    fields = [field for kind in (Sampling, MemberConfig, Config) for field in dataclasses.fields(kind)]
    defaults = {field.name: field.default for field in fields}
    inherited = names(Sampling)
    for table, keys in documented().items():
        for key, default in keys.items():
            if literal(default) is None and not (table == "members" and key in inherited):
                assert defaults[key] in (None, (), dataclasses.MISSING), f"{table}.{key} is {defaults[key]}"


def test_the_example_is_a_file_that_loads(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert example
    path = tmp_path / "models.toml"
    path.write_text(example[1])
    assert [member.name for member in load_config(path).members] == ["smollm2", "gemma"]
    assert tomllib.loads(example[1])["members"] == tomllib.loads((ROOT / "models.toml").read_text())["members"]


def test_every_kind_of_error_has_a_row_that_names_its_parent() -> None:
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    found = re.findall(r"^\| `(\w+Error)`(?:, an? `(\w+)`)? \|", PYTHON, re.MULTILINE)
    assert sorted(name for name, _ in found) == sorted(kinds)
    for name, parent in found:
        base = kinds[name].__base__
        assert base is not None
        assert parent == ("" if base in (Exception, errors.MeLocalError) else base.__name__)


def test_the_reference_has_all_that_the_package_exports() -> None:
    shown = re.findall(r"^::: me_local\.(\w+)$", PYTHON, re.MULTILINE)
    assert sorted(shown) == sorted(me_local.__all__)


def test_the_methods_that_the_reference_picks_exist() -> None:
    picked = re.search(r"^::: me_local\.Ensemble\n    options:\n      members: \[(.*)\]$", PYTHON, re.MULTILINE)
    assert picked
    assert all(hasattr(me_local.Ensemble, name) for name in picked[1].split(", "))
