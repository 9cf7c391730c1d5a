"""Qwen3's chat format: prompts and answers in every kind of template, by what their prompts begin, and bad input."""

import functools
import json
import pickle
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle_jax.errors import CheckpointError, ConfigError, PuzzleError, PuzzleWarning
from puzzle_jax.tasks import EFFORTS, Chat
from puzzle_jax.tasks.chat.formats import alike
from tests.support import present
from tests.tasks.chat.qwen import ADDED, HISTORY, INSTRUCT, SPECIAL, TEMPLATES, THINKING, write_chat, write_files

USER, ANSWER, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))
CONVERSATIONS = (
    [{**USER, "content": "What is 2 + 2?"}],
    [{**SYSTEM, "content": "Be brief.\n\n"}, {**USER, "content": "Größe, 你好. \n\n\n the end's 12\n"}],
    [{**USER, "content": "a"}, {**ANSWER, "content": "b"}, {**USER, "content": " c"}],
    [{**USER, "content": "a"}, {**ANSWER, "content": "<think>\nthe\n\n</think>\n\nb"}, {**USER, "content": "c"}],
    [{**USER, "content": "a"}, {**ANSWER, "content": "the.\n</think>\n\nb"}, {**USER, "content": "c"}],
)
OFF, ON = "<think>\n\n</think>\n\n", "<think>\n"
BEGUN = {
    "hybrid": (OFF, "", ""), "thinking": (ON, ON, ON), "switched": (OFF, ON, ON), "instruct": ("", "", ""),
    "history": ("", "", ""), "effort": ("", "", ""),
}  # fmt: skip
"""How each template begins the answer at low, medium and high effort."""
WITH_THINKING = [(name, effort) for name, begun in BEGUN.items() for effort, begins in zip(EFFORTS, begun, strict=True)
                 if begins != OFF and name != "instruct"]  # fmt: skip
WITHOUT = [(name, effort) for name in BEGUN for effort in EFFORTS if (name, effort) not in WITH_THINKING]
texts = st.lists(st.sampled_from((*SPECIAL, *ADDED, "a", " ", "<|im", "\n", ".", "ö")), max_size=7).map("".join)


@functools.cache
def chat(name: str) -> Chat:
    with tempfile.TemporaryDirectory() as directory:
        return write_chat(Path(directory), TEMPLATES[name])


def ids(*tokens: str) -> list[int]:
    return [present(chat("hybrid").tokenizer.token_to_id(token)) for token in tokens]


@pytest.mark.parametrize("name", TEMPLATES)
def test_efforts_switch_the_thinking_or_are_rendered_or_change_nothing(name):
    for effort, begun in zip(EFFORTS, BEGUN[name], strict=True):
        text = chat(name).decode(chat(name).prompt_tokens("the 2", effort))
        system = f"<|im_start|>system\nEffort: {effort}<|im_end|>\n" if name == "effort" else ""
        assert text == f"{system}<|im_start|>user\nthe 2<|im_end|>\n<|im_start|>assistant\n{begun}"


def test_what_a_template_only_comments_on_changes_nothing(tmp_path):
    comment = "{#- Unlike with enable_thinking or\nreasoning_effort, there is no <think>. -#}\n"
    commented = write_chat(tmp_path, comment + INSTRUCT)
    assert commented.format.variables("low") == {} and commented.format.in_history == ()
    assert commented.prompt_tokens("the 2", "low") == chat("instruct").prompt_tokens("the 2", "low")
    assert commented.completion_tokens("", "4") == chat("instruct").completion_tokens("", "4")


def test_efforts_that_differ_in_nothing_are_found():
    limits = {"low": 5, "medium": 5, "high": 5}
    assert [alike(chat(name).format, limits) for name in ("hybrid", "thinking", "instruct", "effort")] == [
        [["medium", "high"]], [list(EFFORTS)], [list(EFFORTS)], []
    ]  # fmt: skip
    assert alike(chat("hybrid").format, {"low": 5, "medium": 5, "high": 6}) == []
    assert alike(chat("thinking").format, {"low": 5, "medium": 6, "high": 5}) == [["low", "high"]]


@pytest.mark.parametrize(
    ("name", "effort", "analysis", "final", "cut", "text"),
    [
        ("hybrid", "high", "2+2", "4", False, "<think>\n2+2\n</think>\n\n4<|im_end|>"),
        ("hybrid", "high", "", "4", False, "<think>\n\n</think>\n\n4<|im_end|>"),
        ("hybrid", "high", "2+", "", True, "<think>\n2+"),
        ("hybrid", "high", "2+2", "4", True, "<think>\n2+2\n</think>\n\n4"),
        ("hybrid", "high", "", "", True, ""),
        ("hybrid", "low", "", "4", False, "4<|im_end|>"),
        ("hybrid", "low", "", "4", True, "4"),
        ("thinking", "low", "2+2", "4", False, "2+2\n</think>\n\n4<|im_end|>"),
        ("thinking", "low", "", "4", False, "\n</think>\n\n4<|im_end|>"),
        ("thinking", "low", "2+", "", True, "2+"),
        ("switched", "low", "", "4", False, "4<|im_end|>"),
        ("switched", "medium", "2+2", "4", False, "2+2\n</think>\n\n4<|im_end|>"),
        ("instruct", "high", "", "4", False, "4<|im_end|>"),
        ("history", "high", "", "4", False, "4<|im_end|>"),
        ("history", "high", "2+2", "4", False, "<think>\n2+2\n</think>\n\n4<|im_end|>"),
        ("effort", "low", "", "4", False, "<think>\n\n</think>\n\n4<|im_end|>"),
        ("effort", "low", "2+2", "4", False, "<think>\n2+2\n</think>\n\n4<|im_end|>"),
    ],
)
def test_an_answer_is_what_its_prompt_leaves_to_write(name, effort, analysis, final, cut, text):
    prompt = chat(name).prompt_tokens("?", effort)
    tokens = chat(name).completion_tokens(analysis, final, prompt, cut=cut)
    assert chat(name).decode(tokens) == text
    completion = chat(name).parse(tokens, prompt)
    assert (completion.analysis, completion.final, completion.truncated) == (analysis, final, cut)


def test_without_a_prompt_answers_are_those_at_medium_effort():
    for name in TEMPLATES:
        prompt, analysis = chat(name).prompt_tokens("the 2"), "" if name == "instruct" else "the"
        tokens = chat(name).completion_tokens(analysis, "4")
        assert tokens == chat(name).completion_tokens(analysis, "4", prompt)
        assert chat(name).parse(tokens[:1]) == chat(name).parse(tokens[:1], prompt)
        assert chat(name).turn_to_final(tokens) == chat(name).turn_to_final(tokens, prompt)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(WITH_THINKING), texts, texts, st.booleans())
def test_answers_parse_to_what_was_written(of, analysis, final, cut):
    """Control tokens that are written out in them stay text."""
    name, effort = of
    prompt = chat(name).prompt_tokens("?", effort)
    tokens = chat(name).completion_tokens(analysis, final, prompt, cut=cut)
    back = chat(name).parse(tokens, prompt)
    assert (back.analysis, back.final, back.truncated) == (analysis, final, cut)
    assert [i for i, token in enumerate(tokens) if token in chat(name).stop_ids] == ([] if cut else [len(tokens) - 1])


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(WITHOUT), texts, st.booleans())
def test_answers_without_thinking_are_all_final(of, final, cut):
    name, effort = of
    prompt = chat(name).prompt_tokens("?", effort)
    tokens = chat(name).completion_tokens("", final, prompt, cut=cut)
    back = chat(name).parse(tokens, prompt)
    assert (back.analysis, back.final, back.truncated) == ("", final, cut)


@pytest.mark.parametrize(
    ("name", "effort", "text", "analysis", "final"),
    [
        ("hybrid", "medium", "<think>\nthe</think>4", "the", "4"),
        ("hybrid", "medium", "\n<think>the\n\n</think>\n4", "the\n", "4"),
        ("hybrid", "medium", "<think>\na</think>\n\nb</think>c<think>", "a", "b</think>c<think>"),
        ("hybrid", "medium", "the</think>4", "the", "4"),
        ("hybrid", "medium", "the 4", "", "the 4"),
        ("hybrid", "medium", "the <think> 4", "", "the <think> 4"),
        ("hybrid", "medium", "<think>\nthe\n", "the\n", ""),
        ("hybrid", "medium", "<think>\nthe\n</think>", "the", ""),
        ("hybrid", "medium", "<think>\nthe\n</think>\n\n\n\n4", "the", "\n\n4"),
        ("hybrid", "low", "4 </think> 5", "", "4 </think> 5"),
        ("hybrid", "low", "<think>\nthe\n</think>\n\n4", "the", "4"),
        ("thinking", "low", "the", "the", ""),
        ("thinking", "low", "<think>\nthe\n</think>\n\n4", "the", "4"),
        ("thinking", "low", "a</think>\n\nb</think>c", "a", "b</think>c"),
        ("instruct", "low", "<think>\na\n</think>\n\nb", "", "<think>\na\n</think>\n\nb"),
        ("history", "low", "a </think> b", "", "a </think> b"),
        ("history", "low", "<think>\na\n</think>\n\nb", "a", "b"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|endoftext|>the"])
def test_what_counts_as_thinking_and_as_final(name, effort, text, analysis, final, end):
    """A limit that ends the answer within its thinking leaves no final text."""
    completion = chat(name).parse(chat(name).encode(text + end), chat(name).prompt_tokens("?", effort))
    assert (completion.analysis, completion.final, completion.truncated) == (analysis, final, not end)


@pytest.mark.parametrize("name", ["hybrid", "thinking", "effort"])
def test_the_turn_to_the_final_text_is_the_end_of_the_thinking(name):
    prompt = chat(name).prompt_tokens("?", "high")
    tokens = chat(name).completion_tokens("the.\n\nthe", "4\n\n</think>", prompt)
    first, last = present(chat(name).turn_to_final(tokens, prompt))
    assert chat(name).decode(tokens[first : last + 1]) == "</think>\n\n" and last == first + 1
    assert chat(name).decode(tokens[last + 1 :]) == "4\n\n</think><|im_end|>"
    cut = chat(name).completion_tokens("the", "", prompt, cut=True)
    assert chat(name).turn_to_final(cut, prompt) is None


def test_without_thinking_there_is_no_turn():
    for name, effort in (("hybrid", "low"), ("instruct", "high"), ("history", "high")):
        tokens = chat(name).encode("the </think>\n\n 4<|im_end|>")
        assert chat(name).turn_to_final(tokens, chat(name).prompt_tokens("?", effort)) is None


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a <think>\nb</think> c", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>"]
)
def test_a_question_that_writes_control_tokens_is_text(name, text):
    if name == "instruct" and "<|im" not in text:
        return  # Where nothing is written between them, the two are words of the vocabulary like others.
    made, plain = chat(name).prompt_tokens(text, "low"), chat(name).prompt_tokens("x", "low")
    at = plain.index(present(chat(name).tokenizer.token_to_id("x")))
    assert made[:at] == plain[:at] and made[at - len(plain) + 1 :] == plain[at + 1 :]
    data = made[at : at + len(made) - len(plain) + 1]
    assert chat(name).decode(data) == text
    control = ids(*SPECIAL, *(() if name == "instruct" else ("<think>", "</think>")))
    assert not set(control) & set(data)


def test_only_earlier_answers_have_thinking_for_the_template_to_drop():
    messages = [
        {**USER, "content": "a </think> b"},
        {**ANSWER, "content": "<think>\nlong\n</think>\n\nc <|im_end|>"},
        {**USER, "content": "d"},
    ]
    made = chat("hybrid").prompt_tokens(messages, "high")
    assert chat("hybrid").decode(made) == (
        "<|im_start|>user\na </think> b<|im_end|>\n<|im_start|>assistant\nc <|im_end|><|im_end|>\n"
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n"
    )
    start, end, end_think = ids("<|im_start|>", "<|im_end|>", "</think>")
    assert (made.count(start), made.count(end), made.count(end_think)) == (4, 3, 0)


@pytest.mark.parametrize(
    ("name", "effort", "text", "cut", "expected"),
    [
        ("hybrid", "high", "<think>\nthe\n</think>\n\n4", False, ("the", "4")),
        ("hybrid", "high", " <think>the", True, ("the", "")),
        ("hybrid", "high", "the </think> 4", False, ("", "the </think> 4")),
        ("hybrid", "low", "<think>\n\n</think>\n\n4", False, ("", "4")),
        ("thinking", "high", "the\n</think>\n\n4", False, ("the", "4")),
        ("thinking", "high", "the", True, ("the", "")),
        ("thinking", "high", "4", False, ("", "4")),
        ("instruct", "high", "<think>the</think>4", False, ("", "<think>the</think>4")),
    ],
)
def test_answers_that_came_as_one_text(name, effort, text, cut, expected):
    assert chat(name).split_text(text, chat(name).prompt_tokens("?", effort), cut=cut) == expected


def test_an_answer_cannot_think_where_its_prompt_leaves_no_room():
    with pytest.raises(ConfigError, match=r"has thinking, but the chat template .*chat_template\.jinja has none"):
        chat("instruct").completion_tokens("the", "4")
    for name in ("hybrid", "switched"):
        with pytest.raises(ConfigError, match="switches it off for this question, as it does at low effort"):
            chat(name).completion_tokens("the", "4", chat(name).prompt_tokens("?", "low"))
    with pytest.raises(PuzzleError, match="effort is 'none', but must be one of low, medium, high"):
        chat("hybrid").prompt_tokens("?", "none")
    with pytest.raises(PuzzleError, match="final text of the answer holds half a surrogate pair"):
        chat("hybrid").completion_tokens("", "\ud83d")


def test_a_chat_survives_pickling():
    again = pickle.loads(pickle.dumps(chat("thinking")))
    assert again.prompt_tokens("a", "low") == chat("thinking").prompt_tokens("a", "low")
    assert again.parse(ids("Ġthe")) == chat("thinking").parse(ids("Ġthe")) and again.parse(ids("Ġthe")).final == ""


def test_answers_end_at_the_format_s_token_though_the_checkpoint_does_not_name_it(tmp_path):
    assert chat("hybrid").stop_ids == set(ids("<|im_end|>", "<|endoftext|>"))
    assert [chat("hybrid").pad_id] == ids("<|endoftext|>")
    (pad,) = ids("<|endoftext|>")
    files = write_files(tmp_path, HISTORY)
    (files / "generation_config.json").write_text(json.dumps({"eos_token_id": pad}))
    with pytest.warns(PuzzleWarning, match=r"lacks <\|im_end\|>, where answers of the ChatML format end"):
        assert Chat.load(files).stop_ids == chat("hybrid").stop_ids


@pytest.mark.parametrize(
    ("template", "changes", "message"),
    [
        (
            INSTRUCT,
            {"<|im_start|>": "<|im_begin|>"},
            r"tokenizer\.json has no token <\|start\|>, which the harmony format needs, and no token <\|im_start\|>, "
            "which the ChatML format needs",
        ),
        (
            THINKING,
            {"</think>": "</thought>"},
            r"writes <think> and </think>, but tokenizer\.json has no token </think>",
        ),
        ("{{ messages[0].content }}{% if %}", {}, "is no valid Jinja"),
    ],
)
def test_damaged_files_are_named(tmp_path, template, changes, message):
    path = write_files(tmp_path, template) / "tokenizer.json"
    text = path.read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Chat.load(tmp_path).prompt_tokens("?")


def test_of_two_formats_the_template_s_is_chosen(tmp_path):
    path = write_files(tmp_path, INSTRUCT) / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(token["id"] for token in content["added_tokens"])
    for index, token in enumerate(("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), last + 1):
        content["added_tokens"].append({**content["added_tokens"][0], "id": index, "content": token})
    path.write_text(json.dumps(content))
    assert Chat.load(tmp_path).format.name == "ChatML"
    (tmp_path / "chat_template.jinja").write_text("<|start|>{{ reasoning_effort }}")
    with pytest.warns(PuzzleWarning, match="lacks <|return|>, where answers of the harmony format end"):
        assert Chat.load(tmp_path).format.name == "harmony"
    (tmp_path / "chat_template.jinja").write_text("<|start|>")
    with pytest.raises(CheckpointError, match="never uses reasoning_effort"):
        Chat.load(tmp_path)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def options(name, effort):
    """What the table of `puzzle_jax.tasks.chat.formats` gives the template at an effort."""
    variables = {
        "hybrid": {"enable_thinking": effort != "low"}, "switched": {"enable_thinking": effort != "low"},
        "effort": {"reasoning_effort": effort},
    }  # fmt: skip
    return {"return_dict": False, **variables.get(name, {})}


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_have_the_ids_of_transformers(transformers, tmp_path, name, kind):
    theirs = transformers.AutoTokenizer.from_pretrained(write_files(tmp_path, TEMPLATES[name], kind))
    assert type(theirs).__name__ != "PreTrainedTokenizerFast" or kind == "PreTrainedTokenizerFast"
    for messages in CONVERSATIONS:
        for effort in EFFORTS:
            rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, **options(name, effort))
            assert chat(name).prompt_tokens(messages, effort) == rendered
    assert theirs.pad_token_id == chat(name).pad_id and theirs.eos_token_id in chat(name).stop_ids


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_have_the_ids_of_transformers(transformers, tmp_path, name):
    """A prompt with its answer is the conversation as the template renders it; what it writes last is a newline."""
    theirs = transformers.AutoTokenizer.from_pretrained(write_files(tmp_path, TEMPLATES[name]))
    for effort, begun in zip(EFFORTS, BEGUN[name], strict=True):
        thinks = name not in ("instruct", "history") and begun != OFF
        for analysis in ("the.\n\nThe 2 + 2", *(("",) if begun != ON else ())) if thinks else ("",):
            messages = [
                {**USER, "content": "Größe. 2 + 2?"},
                {**ANSWER, "content": "**4**.\n\nthe", "reasoning_content": analysis},
            ]
            rendered = theirs.apply_chat_template(messages, **options(name, effort))
            prompt = chat(name).prompt_tokens(messages[:1], effort)
            completion = chat(name).completion_tokens(analysis, "**4**.\n\nthe", prompt)
            assert [*prompt, *completion, *ids("Ċ")] == rendered
