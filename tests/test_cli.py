import pytest

from puzzle_jax.cli import VERBS, main
from puzzle_jax.commands import guarded
from puzzle_jax.errors import PuzzleError


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in VERBS)
    assert main([]) == 2


def test_an_unknown_verb_is_one_sentence(capsys):
    assert main(["bake"]) == 2
    assert capsys.readouterr().err == f"puzzle: verb is 'bake', but must be one of {', '.join(VERBS)}\n"


def test_an_empty_verb_is_one_sentence_too(capsys):
    assert main(["train", ""]) == 2
    assert capsys.readouterr().err.startswith("puzzle train: verb is '', but must be one of traces, ")
    assert main(["train"]) == 2
    assert capsys.readouterr().out.startswith("usage: puzzle train VERB")


def test_user_errors_end_with_two_interrupts_with_130_and_bugs_with_a_traceback(capsys):
    def fail(error):
        def run():
            raise error

        return run

    assert guarded("x", fail(PuzzleError("no such thing"))) == 2
    assert capsys.readouterr().err == "x: no such thing\n"
    assert guarded("x", fail(KeyboardInterrupt())) == 130
    assert guarded("x", lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        guarded("x", lambda: print(1 / 0))
