"""The command line on a random model: final text on stdout, analysis on stderr."""

import io
import json
import shutil

import pytest

from puzzle_jax.config import QWEN3_MOE
from puzzle_jax.generate.__main__ import main
from puzzle_jax.generate.command import _Printer, _prompt
from puzzle_jax.tasks.chat.embedded import write_chat_files
from tests.convert_hf.checkpoints import write_random
from tests.support import small_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model with the embedded parent's tokenizer."""
    directory = write_random(tmp_path_factory.mktemp("cli") / "model", small_config(vocab_size=128), "bf16")
    write_chat_files(directory)
    return directory


def test_an_answer_is_generated_and_its_end_told(model, capsys):
    assert main(["--model", str(model), "--effort", "high", "--max-tokens", "7", "1+1"]) == 0
    assert "(cut off at 7 tokens)" in capsys.readouterr().err


def test_analysis_and_final_text_are_printed_as_they_grow(capsys):
    printer = _Printer()
    for analysis, final in (("1+", ""), ("1+1=2", ""), ("1+1=2", "is \ufffd"), ("1+1=2", "is é")):
        printer.show(analysis, final)
    printer.end()
    said = capsys.readouterr()
    assert said.out == "is é\n" and said.err == "1+1=2\n"


def test_on_a_terminal_the_analysis_is_dimmed(capsys):
    printer = _Printer()
    printer.terminal = True
    for analysis, final in (("one", ""), ("one two", ""), ("one two", "3")):
        printer.show(analysis, final)
    printer.end()
    assert capsys.readouterr().out == "\x1b[2mone\x1b[0m\x1b[2m two\x1b[0m\n3\n"


def test_a_limit_within_thinking_that_the_prompt_has_opened_leaves_no_answer(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "thinking")
    write_chat_files(tmp_path / "thinking", QWEN3_MOE.family)
    template = tmp_path / "thinking" / "chat_template.jinja"
    template.write_text(template.read_text().replace('assistant\\n" }}', 'assistant\\n<think>\\n" }}'))
    assert main(["--model", str(tmp_path / "thinking"), "--max-tokens", "7", "1+1"]) == 0
    said = capsys.readouterr()
    assert said.out == "" and len(said.err) > len("(cut off at 7 tokens)\n") and "(cut off at 7 tokens)" in said.err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--effort", "huge"], "effort is 'huge', but must be one of low, medium, high"),
        (["--max-tokens", "0"], "request 0 has max_tokens 0"),
        (["--max-tokens", "-5"], "request 0 has max_tokens -5"),
        (["--max-tokens", "600"], "but the context of the model is 512 tokens"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--cache-dtype", "int4"], "cache dtype is 'int4'"),
        (["--cache-dtype", "float8_e4m3fn"], "carries no k_scale and v_scale"),
    ],
)
def test_bad_settings_are_one_sentence(model, capsys, arguments, message):
    assert main(["--model", str(model), *arguments, "1+1"]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("prompt", ["", " \n", "2+3=\udce9"])
def test_prompts_that_say_nothing_or_are_no_unicode_are_one_sentence(model, capsys, prompt):
    assert main(["--model", str(model), prompt]) == 2
    said = capsys.readouterr().err
    assert "the prompt is empty" in said or "the prompt is not valid UTF-8" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "the prompt on standard input is empty"),
        (b" \n ", "the prompt on standard input is empty"),
        (b"2+3=\xe9", "the prompt on standard input is not valid UTF-8: unexpected end of data at byte 4"),
        (None, "the prompt on standard input is empty"),
    ],
)
def test_standard_input_that_is_no_prompt_is_one_sentence(model, capsys, monkeypatch, given, message):
    monkeypatch.setattr("sys.stdin", given if given is None else io.TextIOWrapper(io.BytesIO(given)))
    assert main(["--model", str(model)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_prompt_comes_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(" 1+1 = ü?\n".encode()), encoding="ascii"))
    assert _prompt("-") == "1+1 = ü?"
    assert _prompt(" as it is ") == " as it is "


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    printer = _Printer()
    printer.show("", "é!")
    printer.end()
    assert out.buffer.getvalue() == b"?!\n"


def test_bad_models_are_one_sentence(model, tmp_path, capsys):
    assert main(["--model", str(tmp_path / "none"), "1+1"]) == 2
    assert "is not a directory" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["--model", str(copy), "1+1"]) == 2
    assert "never uses reasoning_effort" in capsys.readouterr().err
    (copy / "config.json").write_text(json.dumps({"model_type": "other"}))
    assert main(["--model", str(copy), "1+1"]) == 2
    assert main([]) == 2
