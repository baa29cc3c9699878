"""Recipe files and parameters, also those of people who mean no good."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.recipes.files import (
    MAX_FILE_BYTES,
    MAX_TEXT_LENGTH,
    RecipeError,
    RecipeFile,
    check_parameters,
    read_folder,
    read_recipe,
)
from tests.apps.recipes.rows import TEXT, write_recipe

GIVEN = {"python": "/usr/bin/python3", "run": "counter-1", "checkpoints": "/tmp/c"}


@pytest.fixture
def recipe(tmp_path: Path) -> RecipeFile:
    (tmp_path / "data").mkdir()
    return read_recipe(write_recipe(tmp_path))


def command(recipe: RecipeFile, **given: object) -> list[str]:
    return recipe.command(check_parameters(recipe.parameters, given), GIVEN)


def test_a_good_file_gives_the_command_it_says(recipe: RecipeFile, tmp_path: Path) -> None:
    data = str(tmp_path / "data" / "digits.npz")
    start = ["/usr/bin/python3", "count.py", "--steps"]
    assert command(recipe) == [*start, "100", "--note", "none", data]
    assert command(recipe, steps=5, fast=True)[3:] == ["5", "--note", "none", "--fast", data]
    values = check_parameters(recipe.parameters, {})
    resumed = ["/usr/bin/python3", "count.py", "--resume", "/tmp/c"]
    assert recipe.command(values, GIVEN, resume=True) == resumed


@pytest.mark.parametrize(
    "note", ["; rm -rf /", "$(id)", "`id`", "a b", "'", '"', "{python}", "{{run}}", "&& x | y", "*"]
)
def test_whatever_a_shell_would_do_with_a_text_it_stays_one_argument(
    recipe: RecipeFile, note: str
) -> None:
    items = command(recipe, note=note)
    assert items[5] == note
    assert len(items) == 7


@given(note=st.text(min_size=1, max_size=80))
def test_a_text_is_one_argument_as_it_was_given_or_refused(
    note: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = read_recipe(write_recipe(tmp_path_factory.getbasetemp() / "any"))
    try:
        items = command(recipe, note=note)
    except RecipeError:
        return
    assert items[5] == note
    assert "\0" not in note
    assert not note.startswith("-")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"stepz": 5}, "no parameter 'stepz'"),
        ({"steps": 0}, "must lie in 1…1000"),
        ({"steps": 1001}, "must lie in 1…1000"),
        ({"steps": True}, "a whole number"),
        ({"steps": 5.0}, "a whole number"),
        ({"steps": "5"}, "a whole number"),
        ({"rate": float("nan")}, "a number"),
        ({"rate": 2}, "must lie in any…1"),
        ({"schedule": "step"}, "one of cosine, linear"),
        ({"schedule": ["cosine"]}, "one of cosine, linear"),
        ({"fast": 1}, "true or false"),
        ({"note": "--steps=9"}, "must not begin with a dash"),
        ({"note": "a\0b"}, "control characters"),
        ({"note": "a\nb"}, "control characters"),
        ({"note": "\u202egnp"}, "control characters"),
        ({"note": ""}, "1…500 characters"),
        ({"note": "x" * (MAX_TEXT_LENGTH + 1)}, "1…500 characters"),
        ({"data": "../secrets.json"}, "inside its folder"),
        ({"data": "a/../../b"}, "inside its folder"),
        ({"data": "/etc/passwd"}, "inside its folder"),
        ({"data": "~/x"}, "inside its folder"),
        ({"data": "..\\x"}, "inside its folder"),
    ],
)
def test_a_parameter_that_the_recipe_does_not_allow_is_refused(
    recipe: RecipeFile, given: dict[str, object], why: str
) -> None:
    with pytest.raises(RecipeError, match=why):
        check_parameters(recipe.parameters, given)


def test_a_path_that_leaves_its_folder_by_a_link_is_refused_on_the_host(
    recipe: RecipeFile, tmp_path: Path
) -> None:
    (tmp_path / "data" / "out").symlink_to("/etc")
    with pytest.raises(RecipeError, match="leads out"):
        command(recipe, data="out/passwd")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('argv = ["{python}", "count.py"', 'argv = ["{note}", "count.py"', "choose the program"),
        ("{steps}", "{size}", "names {size}"),
        ("{steps}", "{steps", "belongs to no placeholder"),
        ('"CUDA_VISIBLE_DEVICES"', '"SECRET_KEY"', "may hold a secret"),
        ('"CUDA_VISIBLE_DEVICES"', '"DATABASE_URL"', "may hold a secret"),
        ('"CUDA_VISIBLE_DEVICES"', '"ESPER_KERNEL_KEY_FILE"', "may hold a secret"),
        ('"CUDA_VISIBLE_DEVICES"', '"A B"', "no variable's name"),
        ('name = "Counter"', 'shell = "rm -rf /"', "no member 'shell'"),
        ('type = "integer"', 'type = "command"', "type must be one of"),
        ("default = 100", "default = 5000", "must lie in 1…1000"),
        ("[parameters.steps]", "[parameters.run]", "cannot be a parameter's name"),
        ('under = "data"', "", "a path needs under"),
        ('option = "--fast"', "", "a flag needs option"),
        ('name = "Counter"', 'directory = "not/there"', "there is no"),
        ('name = "Counter"', "grace_seconds = 100000", "grace_seconds must lie"),
        ('name = "Counter"', "name = [", "not valid TOML"),
    ],
)
def test_a_file_that_could_do_harm_or_is_wrong_cannot_be_used(
    tmp_path: Path, old: str, new: str, why: str
) -> None:
    assert old in TEXT
    folder = read_folder(write_recipe(tmp_path, TEXT.replace(old, new)).parent)
    assert folder.recipes == {}
    assert why in folder.problems["counter.toml"]


def test_links_pipes_giants_and_files_that_others_may_write_are_not_read(tmp_path: Path) -> None:
    good = write_recipe(tmp_path / "elsewhere")
    folder = tmp_path / "recipes"
    write_recipe(folder, TEXT, "open.toml").chmod(0o666)
    write_recipe(folder, "#" * (MAX_FILE_BYTES + 1), "giant.toml")
    write_recipe(folder, TEXT, "Bad Name.toml")
    (folder / "link.toml").symlink_to(good)
    os.mkfifo(folder / "pipe.toml")
    found = read_folder(folder)
    assert found.recipes == {}
    assert len(found.problems) == 5


def test_esper_s_own_recipes_can_be_used() -> None:
    found = read_folder(Path(__file__).parents[3] / "recipes")
    assert found.problems == {}
    assert set(found.recipes) == {"digits_cnn", "topics_lm"}
    assert all(recipe.resumable for recipe in found.recipes.values())
