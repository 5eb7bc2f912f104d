"""Every verb has its page, and what a page says is so."""

import shlex

import pytest
from conftest import Command

from spin_reg import cli, errors, grammar, manual, verbs
from spin_reg.errors import ConfigError


def test_every_verb_is_in_the_table_and_only_those() -> None:
    assert list(cli.VERBS) == list(verbs.TABLE)


def test_every_exit_code_has_its_words() -> None:
    kinds = [errors.SpinRegError, *errors.SpinRegError.__subclasses__()]
    assert {0, *(kind.exit_code for kind in kinds)} == set(grammar.EXITS)


@pytest.mark.parametrize("verb", list(verbs.TABLE))
def test_help_says_what_a_verb_does_takes_and_returns(verb: str, command: Command) -> None:
    result = command(verb, "--help")
    assert (result.code, result.err) == (0, "")
    for part in ("NAME", "USAGE", "EXAMPLES", "EXIT CODES"):
        assert f"\n{part}\n" in f"\n{result.out}"
    assert verbs.TABLE[verb].what in result.out and f"spin-reg {verb}" in result.out.split("USAGE")[1]
    assert all(word.name in result.out.split("OPTIONS")[1] for word in verbs.TABLE[verb].words)
    assert ("\nSETTINGS" in result.out) == verbs.TABLE[verb].composed
    assert verb in command("--help").out


@pytest.mark.parametrize("verb", list(verbs.TABLE))
def test_every_example_is_a_line_that_the_verb_takes(verb: str) -> None:
    """Options and arguments; the settings are Hydra's."""
    examples = verbs.TABLE[verb].examples
    assert examples
    for line, what in examples:
        command = shlex.split(line.split(" | ")[-1].split(" > ")[0])
        assert command[:2] == ["spin-reg", verb] and what
        if not verbs.TABLE[verb].settings and verb != "gc":  # whose keep_iterates=... is no option
            manual.parsed(verb, command[2:])


def test_what_a_verb_does_not_take_is_named_with_what_it_does() -> None:
    for words in (["RUN"], ["RUN", "--to", "x", "--what"], ["RUN", "--to", "x", "more"]):
        with pytest.raises(ConfigError) as caught:
            manual.parsed("export", words)
        assert "spin-reg export RUN --to FOLDER" in caught.value.todo
