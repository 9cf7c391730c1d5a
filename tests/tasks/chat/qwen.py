"""A tokenizer and chat templates as Qwen3's models have them, written for these tests."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from puzzle_jax.tasks import Chat

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
MERGES = (("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), (".", "Ċ"), (".", "ĊĊ"), ("Ã", "¶"))
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_MESSAGES = """\
{%- if messages[0].role == "system" %}
    {{- "<|im_start|>system\\n" + messages[0].content + "<|im_end|>\\n" }}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {%- set thought = message.reasoning_content | default("", true) %}
        {%- if "</think>" in content %}
            {%- set thought = content.split("</think>")[0].split("<think>")[-1].strip("\\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.index0 > last.user and THINKS %}
            {{- "<think>\\n" + thought + "\\n</think>\\n\\n" }}
        {%- endif %}
        {{- content + "<|im_end|>\\n" }}
    {%- elif message.role == "user" or not loop.first %}
        {{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
"""
_BEGIN = '{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}'
_OFF = '{{- "<think>\\n\\n</think>\\n\\n" }}'

HYBRID = (
    _MESSAGES.replace("THINKS", "true")
    + _BEGIN
    + "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    + _OFF
    + "{%- endif %}"
)
"""The answer begins with `<think>`, unless `enable_thinking` is false."""
THINKING = _MESSAGES.replace("THINKS", "true") + _BEGIN.replace("assistant\\n", "assistant\\n<think>\\n")
"""The prompt always opens the thinking."""
SWITCHED = (
    _MESSAGES.replace("THINKS", "true")
    + _BEGIN
    + '{%- if add_generation_prompt %}{% if enable_thinking %}{{- "<think>\\n" }}{% else %}'
    + _OFF
    + "{% endif %}{% endif %}"
)
"""The prompt opens the thinking, or leaves it out."""
INSTRUCT = (
    '{%- for message in messages %}{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}'
    "{%- endfor %}" + _BEGIN
)
"""No thinking at all."""
HISTORY = _MESSAGES.replace("THINKS", "false") + _BEGIN
"""No thinking either; it is only dropped from earlier answers."""
EFFORT = '{{- "<|im_start|>system\\nEffort: " + reasoning_effort + "<|im_end|>\\n" }}' + HYBRID
"""The effort itself is rendered."""

TEMPLATES = {
    "hybrid": HYBRID,
    "thinking": THINKING,
    "switched": SWITCHED,
    "instruct": INSTRUCT,
    "history": HISTORY,
    "effort": EFFORT,
}


def build_tokenizer() -> tokenizers.Tokenizer:
    """Bytes with a few merges, pieces as Qwen's tokenizers split text, and their kinds of control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*alphabet, *("".join(pair) for pair in MERGES)))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, list(MERGES)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tokenizer


def write_files(directory: Path, template: str, tokenizer_class: str = "PreTrainedTokenizerFast") -> Path:
    """Writes the chat files of a checkpoint into a directory, which is created."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    config = {
        "tokenizer_class": tokenizer_class,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "add_bos_token": False,
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, pad], "pad_token_id": pad}))
    (directory / "chat_template.jinja").write_text(template)
    return directory


def write_chat(directory: Path, template: str) -> Chat:
    """The chat of the files that `write_files` writes."""
    return Chat.load(write_files(directory, template))
