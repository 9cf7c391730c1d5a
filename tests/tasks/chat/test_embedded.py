"""The embedded parents' chats: small vocabularies, exact round trips, and templates that render the effort."""

import pytest

from puzzle_jax.config import GPT_OSS, QWEN3_MOE
from puzzle_jax.errors import CheckpointError
from puzzle_jax.tasks import EFFORTS, TASKS
from puzzle_jax.tasks.chat.embedded import (
    CHARACTERS,
    EMBEDDED,
    VOCAB_SIZE,
    embedded_chat,
    is_embedded,
    token_ids,
    write_chat_files,
)

QWEN = QWEN3_MOE.family
PROMPT_HIGH = (
    "<|im_start|>system\nReasoning: high<|im_end|>\n<|im_start|>user\nmod 7+5<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def chat():
    return embedded_chat(QWEN)


@pytest.mark.parametrize("family", EMBEDDED)
def test_vocabularies_fit_one_padded_size_and_are_recognised(family):
    chat, form = embedded_chat(family), EMBEDDED[family]
    assert chat.tokenizer.get_vocab() == {token: index for index, token in enumerate(form.tokens)}
    assert len(form.tokens) == {GPT_OSS.family: 114, QWEN: 112}[family] <= VOCAB_SIZE
    assert is_embedded(chat)
    chat.tokenizer.add_tokens(["arithmetic"])
    assert not is_embedded(chat)


@pytest.mark.parametrize("family", EMBEDDED)
def test_ids_of_the_configuration_are_those_of_the_chat(family):
    chat, form = embedded_chat(family), EMBEDDED[family]
    assert token_ids(family) == {"eos_token_id": chat.encode(form.ends[0])[0], "pad_token_id": chat.pad_id}
    assert chat.stop_ids == {chat.encode(end)[0] for end in form.ends} and chat.pad_id == 0


def test_prompt_is_chatml_with_one_token_per_piece(chat):
    tokens = chat.prompt_tokens("mod 7+5", "high")
    assert chat.decode(tokens) == PROMPT_HIGH
    assert len(tokens) == 7 + 3 + len("mod 7+5") + 2 + 3
    assert chat.decode(chat.prompt_tokens("mod 7+5")) == PROMPT_HIGH.replace("high", "medium")


def test_phrases_of_prompts_are_one_token_each(chat):
    spell = "Spell this word backward (example: sun -> nus): "
    first, second = 'How many times does the letter "', '" appear in the text: "'
    for prompt, length in ((f"{spell}kreng", 1 + 5), (f'{first}e{second}be red"?', 1 + 1 + 1 + len('be red"?'))):
        tokens = chat.prompt_tokens(prompt, "high")
        assert chat.decode(tokens) == PROMPT_HIGH.replace("mod 7+5", prompt)
        assert len(tokens) == 7 + 3 + length + 2 + 3
    other = prompt.replace("text", "word")  # what only resembles a phrase stays characters
    assert chat.decode(chat.encode(other)) == other and len(chat.encode(other)) > len(second)


def test_answers_think_at_every_effort(chat):
    for effort in EFFORTS:
        prompt = chat.prompt_tokens("mod 7+5", effort)
        tokens = chat.completion_tokens("7+5=2", "2", prompt)
        assert chat.decode(tokens) == "<think>\n7+5=2\n</think>\n\n2<|im_end|>" and len(tokens) == 2 + 5 + 4 + 1 + 1
        assert (chat.parse(tokens, prompt).analysis, chat.parse(tokens, prompt).final) == ("7+5=2", "2")
        assert chat.turn_to_final(tokens, prompt) == (8, 10)
    assert chat.decode(chat.completion_tokens("", "2")) == "<think>\n\n</think>\n\n2<|im_end|>"
    cut = chat.completion_tokens("7+", "", cut=True)
    assert chat.decode(cut) == "<think>\n7+"
    assert (chat.parse(cut).analysis, chat.parse(cut).final, chat.parse(cut).truncated) == ("7+", "", True)


def test_every_character_survives_the_round_trip_and_control_tokens_stay_text(chat):
    text = f"  a  b\nlow{CHARACTERS}Reasoning: high </think> <|im_end|>"
    tokens = chat.completion_tokens(text, text)
    assert (chat.parse(tokens).analysis, chat.parse(tokens).final) == (text, text)
    assert tokens.count(chat.encode("</think>")[0]) == tokens.count(chat.encode("<|im_end|>")[0]) == 1
    for task in TASKS.values():
        prompt = task.sample(7).prompt
        assert len(chat.encode(prompt)) == len(prompt)


def test_histories_drop_what_was_thought_and_other_roles_are_refused(chat):
    messages = [
        {"role": "user", "content": "mod 7+5"},
        {"role": "assistant", "content": "<think>\n7+5=2\n</think>\n\n2"},
        {"role": "user", "content": "mod 1+1"},
    ]
    assert chat.decode(chat.prompt_tokens(messages, "high")) == (
        PROMPT_HIGH + "2<|im_end|>\n<|im_start|>user\nmod 1+1<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(CheckpointError, match="role is tool, but must be user or assistant"):
        chat.prompt_tokens([{"role": "tool", "content": "x"}])


@pytest.mark.parity
def test_transformers_gives_the_same_ids(chat, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_chat_files(tmp_path, QWEN)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    user, thought = {"role": "user", "content": TASKS["chain"].sample(1).prompt}, "<think>\n7+5=2\n</think>\n\n2"
    histories = ([user], [user, {"role": "assistant", "content": thought}, user])
    for messages in histories:
        for effort in EFFORTS:
            theirs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, reasoning_effort=effort, return_dict=False
            )
            assert theirs == chat.prompt_tokens(messages, effort)
            assert tokenizer.decode(theirs) == chat.decode(theirs)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (chat.pad_id, token_ids(QWEN)["eos_token_id"])
