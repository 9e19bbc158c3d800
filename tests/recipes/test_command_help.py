"""The help of every command of every recipe, of every command on trained models, and of reports."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

import pytest
import yaml

from moekit.cli import command, recipes
from moekit.cli.program import REPORTS, STUDIES, SURGERY, main
from moekit.recipes import switch
from moekit.runs.config import RunConfig
from moekit.runs.known import recipe_names
from moekit.runs.plain import as_plain
from moekit.runs.recipe import find_recipe
from moekit.shell import command_line

FRAGMENTS = {"of", "in", "as", "on", "by", "to", "into", "with", "from", "its", "their", "so", "the", "at"}
"""Words with which a text begins that goes on with a thing that is not there."""


def texts(parser: ArgumentParser) -> dict[str, str]:
    """Help texts by option."""
    return {
        "/".join(action.option_strings) or action.dest: action.help or ""
        for action in parser._actions
        if action.help != SUPPRESS
    }


def is_whole(text: str) -> bool:
    words = text.split()
    return len(words) > 1 and words[0] not in FRAGMENTS


@pytest.mark.parametrize("name", recipe_names())
def test_help_texts_of_recipes_are_whole_phrases(name: str) -> None:
    recipe = find_recipe(name, "")
    variant = next(iter(recipe.variants))
    for chosen in recipes.COMMANDS:
        shown = texts(recipes.build_parser(recipe, chosen, variant))
        assert len(shown) > 5
        assert not {option: text for option, text in shown.items() if not is_whole(text)}, chosen


@pytest.mark.parametrize(
    ("name", "chosen"), {**SURGERY, **REPORTS, **STUDIES}.items(), ids=[*SURGERY, *REPORTS, *STUDIES]
)
def test_help_texts_of_commands_on_runs_are_whole_phrases(name: str, chosen: command.Command) -> None:
    shown = texts(command.build_parser(name, chosen))
    assert len(shown) > 1
    assert not {option: text for option, text in shown.items() if not is_whole(text)}


def test_fragments_are_found() -> None:
    assert not is_whole("of attention.")
    assert not is_whole("")
    assert not is_whole("heads")
    assert is_whole("number of attention heads.")


@pytest.mark.parametrize("chosen", ["test", "generate", "serve", "score"])
def test_a_command_shows_only_the_options_that_it_uses(chosen: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = texts(recipes.build_parser(switch.RECIPE, chosen, "tiny"))
    settings = {option for option in shown if "." in option}
    assert settings == {f"--{key}" for key in recipes.COMMANDS[chosen].settings or ()}
    for option in ("--model.dim", "--data.source", "--train.max_steps", "--config"):
        assert recipes.main(switch.RECIPE, [chosen, option, "3"]) == 2
        assert f"unknown option {option}." in capsys.readouterr().err


def test_one_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name in [*recipes.COMMANDS, *SURGERY, *REPORTS, *STUDIES, *recipe_names()]:
        assert f"\n  {name} " in listed
    for arguments, message in (
        (["prunee"], "unknown command 'prunee'. Did you mean 'prune'?"),
        (["run", "swich"], "got 'swich'. Did you mean 'switch'?"),
        (["run", "--variant", "tiny"], f"run needs a recipe: {command_line('run', 'NAME')}"),
        (["test"], "test needs a recipe or --out FOLDER"),
        (["generate", "nowhere"], "generate needs a recipe or the folder of a run: 'nowhere' is neither"),
        (["test", "--out", "nowhere"], "nowhere holds no run"),
        (["compare", "nowhere"], "compare needs two or more runs"),
        (["report", "nowhere"], "nowhere"),
        (["run", "switch", "--model.dimm", "3"], "Did you mean --model.dim?"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("chosen", recipes.COMMANDS)
def test_help_before_a_recipe_is_chosen_lists_them(chosen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([chosen, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: {command_line(chosen)} RECIPE ")
    assert recipes.COMMANDS[chosen].help in shown.out
    assert all(f"\n  {name} " in shown.out for name in recipe_names())
    assert not shown.err


def test_a_recipe_gets_the_same_arguments_by_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, Namespace]] = []
    chosen = command.RecipeCommand("x", lambda parser: None, lambda recipe, config, given: seen.append((config, given)))
    monkeypatch.setitem(recipes.COMMANDS, "plan", chosen)  # type: ignore[arg-type]
    options = ["--variant", "small", "--devices", "2", "--model.dim=64"]
    assert main(["plan", "switch", *options]) == 0
    assert recipes.main(switch.RECIPE, ["plan", *options]) == 0
    (by_program, given), (by_recipe, same) = seen
    assert by_program == by_recipe
    assert given.arguments == same.arguments == ["plan", *options]
    assert by_program != switch.RECIPE.variants["small"].config


def test_settings_of_a_stored_run_that_are_given_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are the run's, but for the devices, which are those of this machine."""
    config = switch.RECIPE.variants["small"].config
    config = config.changed(train={"accelerator": "cpu", "devices": 4}, evaluate={"beam_size": 3, "samples": 7})
    plain = {"recipe": "switch", "variant": "small", **as_plain(config)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    seen: list[RunConfig] = []
    monkeypatch.setattr("moekit.runs.generate.generate", lambda *run, config, **options: seen.append(config))
    given = ["generate", "--out", str(tmp_path)]
    assert main(given) == 0
    assert main([*given, "--evaluate.beam_size", "5", "--train.accelerator=auto"]) == 0
    assert seen[0] == config.changed(train={"devices": 1})
    assert seen[1] == config.changed(train={"devices": 1, "accelerator": "auto"}, evaluate={"beam_size": 5})
