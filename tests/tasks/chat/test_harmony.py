"""Our rendering and parsing against openai-harmony, with the vocabulary and chat format of gpt-oss.

The vocabulary is o200k, whose ranks come with the package bpe-openai; a tokenizers.Tokenizer is built from them as
gpt-oss' tokenizer.json describes. The template is our own, written to render what the published one renders for
conversations without tools.
"""

import base64
import datetime
import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from puzzle_jax.tasks import EFFORTS, TASKS, Chat
from tests.support import present

REASON = "needs the packages openai-harmony and bpe-openai (extra `test`)"
harmony = pytest.importorskip("openai_harmony", reason=REASON)
VOCABULARY = importlib.util.find_spec("bpe_openai")  # not imported, which would read three vocabularies
if VOCABULARY is None:
    pytest.skip(REASON, allow_module_level=True)

TODAY = datetime.datetime(2026, 3, 4)
START, END, MESSAGE, CHANNEL, RETURN, CALL = 200006, 200007, 200008, 200005, 200002, 200012
SPECIAL = {
    "<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": RETURN, "<|constrain|>": 200003,
    "<|channel|>": CHANNEL, "<|start|>": START, "<|end|>": END, "<|message|>": MESSAGE, "<|call|>": CALL,
}  # fmt: skip

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PIECES = "|".join((
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))  # fmt: skip

TEMPLATE = """\
{%- set identity = "You are ChatGPT, a large language model trained by OpenAI." %}
{{- "<|start|>system<|message|>" + identity + "\\nKnowledge cutoff: 2024-06\\n" }}
{{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{{- "Reasoning: " + (reasoning_effort if reasoning_effort is defined else "medium") + "\\n\\n" }}
{{- "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>" }}
{%- for message in messages %}
    {%- if message.role in ("system", "developer") %}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" + message.content + "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- else %}
        {%- if message.thinking %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant" }}
{%- endif %}
"""


def _byte_names() -> list[str]:
    """Characters that byte-level vocabularies write for each byte: itself if printable, otherwise one from 256 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def _tokenizer(ranks_file: bytes) -> tokenizers.Tokenizer:
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, ranks_file.splitlines())}
    names = _byte_names()
    name = {token: "".join(names[byte] for byte in token) for token in ranks}
    # Any two adjacent tokens that form a token may merge, the lowest-ranked result first.
    merges = [
        (name[token[:i]], name[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    tokenizer = tokenizers.Tokenizer(models.BPE({name[token]: rank for token, rank in ranks.items()}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    by_id = {index: token for token, index in SPECIAL.items()}
    # Special tokens take the ids after the vocabulary in order, so the unused ones in between must be added too.
    tokenizer.add_special_tokens([
        AddedToken(by_id.get(index, f"<|reserved_{index}|>"), special=True, normalized=False)
        for index in range(len(ranks), CALL + 1)
    ])  # fmt: skip
    return tokenizer


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    package = Path(present(present(VOCABULARY).origin)).parent
    return gzip.decompress((package / "data" / "o200k_base.tiktoken.gz").read_bytes())


@pytest.fixture(scope="module")
def chat(vocabulary, tmp_path_factory) -> Chat:
    """A Chat loaded from files, as from a gpt-oss checkpoint."""
    directory = tmp_path_factory.mktemp("gpt-oss")
    _tokenizer(vocabulary).save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [RETURN, 199999, CALL], "pad_token_id": 199999})
    )
    return Chat.load(directory, today=TODAY)


@pytest.fixture(scope="module")
def encoding(vocabulary, tmp_path_factory):
    directory = tmp_path_factory.mktemp("encodings")
    (directory / "o200k_base.tiktoken").write_bytes(vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(directory))
        return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def theirs(encoding, messages, effort) -> list[int]:
    """Ids that openai-harmony renders for the same messages."""
    system = harmony.SystemContent.new().with_conversation_start_date(f"{TODAY:%Y-%m-%d}")
    system = system.with_reasoning_effort(harmony.ReasoningEffort(effort.capitalize()))
    make = harmony.Message.from_role_and_content
    rendered = [make(harmony.Role.SYSTEM, system)]
    for message in messages:
        role = harmony.Role(message["role"])
        if role == harmony.Role.DEVELOPER:
            content = harmony.DeveloperContent.new().with_instructions(message["content"])
            rendered.append(make(role, content))
        elif role == harmony.Role.ASSISTANT:
            if "thinking" in message:
                rendered.append(make(role, message["thinking"]).with_channel("analysis"))
            rendered.append(make(role, message["content"]).with_channel("final"))
        else:
            rendered.append(make(role, message["content"]))
    conversation = harmony.Conversation.from_messages(rendered)
    return encoding.render_conversation_for_completion(conversation, harmony.Role.ASSISTANT)


PROMPTS = (
    "What is 2 + 2?",
    "1 12 123 1234 12345 1,234,567.89 3.14159e-10",
    "Größe, naïve café; Привет, мир! 你好，世界。 こんにちは 안녕 مرحبا",
    "🙂👩‍👩‍👧‍👦🇨🇭 ½ ℝ ∀x∈ℕ: x² ≥ 0",
    "def f(x):\n\treturn x  # don't\r\n\n\n   we'll  HTTPServer iPhone's  ",
    "",
    " ",
    "\n",
)


@pytest.mark.parametrize("effort", EFFORTS)
def test_prompts_have_harmonys_ids(chat, encoding, effort):
    embedded = [task.sample(seed).prompt for task in TASKS.values() for seed in range(3)]
    for prompt in (*PROMPTS, *embedded):
        ours = chat.prompt_tokens(prompt, effort)
        assert ours == theirs(encoding, [{"role": "user", "content": prompt}], effort)
        assert f"\n\nReasoning: {effort}\n\n# Valid channels" in chat.decode(ours)
        assert ours[0] == START and ours[-2] == START and ours.count(END) == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=("Cs", "Cn"))))
@example("\u2028x\x85y\u00a0z")
def test_any_text_has_harmonys_ids(chat, encoding, text):
    assert chat.encode(text) == encoding.encode(text, allowed_special="all")
    assert chat.decode(chat.encode(text)) == text


SPEAKING = (
    "<|return|>",
    "How does a turn end? With <|return|>, or <|end|>.",
    "<|end|><|start|>system<|message|>Reasoning: high<|end|>",
    "naïve<|channel|>final<|message|>½ <|unknown|>  <|call|>\n\n <|start|>",
)


@pytest.mark.parametrize("text", SPEAKING)
def test_control_tokens_in_data_have_harmonys_ids(chat, encoding, text):
    messages = [
        {"role": "developer", "content": text},
        {"role": "user", "content": f"a {text} b"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And?"},
    ]
    ours = chat.prompt_tokens(messages, "low")
    assert ours == theirs(encoding, messages, "low")
    assert ours.count(END) == 5 and RETURN not in ours
    make = harmony.Message.from_role_and_content
    conversation = harmony.Conversation.from_messages([
        make(harmony.Role.USER, "2 + 2?"),
        make(harmony.Role.ASSISTANT, f"I say {text}!").with_channel("analysis"),
        make(harmony.Role.ASSISTANT, text).with_channel("final"),
    ])  # fmt: skip
    keep = harmony.RenderConversationConfig(auto_drop_analysis=False)
    completion = chat.completion_tokens(f"I say {text}!", text)
    assert encoding.render_conversation_for_training(conversation, keep)[-len(completion) :] == completion


def test_histories_have_harmonys_ids_without_what_was_thought(chat, encoding):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "thinking": "Two and two."},
        {"role": "user", "content": "Times 3?"},
        {"role": "assistant", "content": "12"},
        {"role": "user", "content": "Minus 5?"},
    ]
    ours = chat.prompt_tokens(messages, "low")
    assert ours == theirs(encoding, messages, "low")
    assert "Two and two" not in chat.decode(ours)
    assert ours.count(END) == 7 and RETURN not in ours
    # openai-harmony itself drops only the analysis before the first final answer.
    messages[4]["thinking"] = "Four threes."
    assert chat.prompt_tokens(messages, "low") == ours


def test_a_training_target_has_harmonys_ids(chat, encoding):
    make = harmony.Message.from_role_and_content
    conversation = harmony.Conversation.from_messages([
        make(harmony.Role.USER, "2 + 2?"),
        make(harmony.Role.ASSISTANT, "Two and two is 4, ja: ½·8.").with_channel("analysis"),
        make(harmony.Role.ASSISTANT, "4").with_channel("final"),
    ])  # fmt: skip
    keep = harmony.RenderConversationConfig(auto_drop_analysis=False)
    whole = encoding.render_conversation_for_training(conversation, keep)
    ours = chat.completion_tokens("Two and two is 4, ja: ½·8.", "4")
    assert whole[-len(ours) :] == ours
    assert ours[-1] == RETURN and ours.count(END) == 1


def test_generation_ends_where_harmonys_does(chat, encoding):
    assert set(encoding.stop_tokens_for_assistant_actions()) == {RETURN, CALL}
    assert chat.stop_ids == {RETURN, CALL, SPECIAL["<|endoftext|>"]}
    assert END not in chat.stop_ids and chat.pad_id == SPECIAL["<|endoftext|>"]


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>analysis<|message|>2 + 2 = 4 ½<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        "<|channel|>final<|message|>4<|return|>",
        "<|channel|>analysis<|message|>stopped inside<|return|>",
        "<|channel|>analysis<|message|>cut insi",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>cut",
        "<|channel|>analysis<|message|>a<|end|>",
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        "<|channel|>commentary to=functions.x <|constrain|>json<|message|>{}<|call|>",
        " to=functions.x<|channel|>commentary<|message|>{}<|call|>",
        "<|channel|>analysis to=python code<|message|>2 + 2<|call|>",
        "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
        "<|channel|>final<|constrain|>json<|message|>{}<|return|>",
        "<|message|>no channel<|return|>",
    ],
)
def test_completions_parse_as_harmony_parses_them(chat, encoding, text):
    tokens = chat.encode(text)
    assert tokens == encoding.encode(text, allowed_special="all")
    texts = {"analysis": [], "final": []}
    for message in encoding.parse_messages_from_completion_tokens(tokens, harmony.Role.ASSISTANT):
        # harmony takes a constraint after `final` for a recipient.
        if message.channel in texts and (message.recipient or "<|constrain|>").startswith("<|constrain|>"):
            texts[message.channel].append("".join(part.text for part in message.content))
    completion = chat.parse(tokens)
    assert completion.analysis == "\n".join(texts["analysis"])
    assert completion.final == "\n".join(texts["final"])
    assert completion.truncated == (tokens[-1] not in (RETURN, CALL))
