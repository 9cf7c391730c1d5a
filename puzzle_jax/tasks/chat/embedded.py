"""The tokenizer and chat template of the embedded parent: characters, in harmony's format.

There is one token per printable ASCII character and newline, one per word of the chat format (so that its overhead is
small), and one per special token of harmony. Decoding is exact: the text comes back as it went in.
Left out: merges (a parent of a million parameters reads characters), characters outside ASCII (one unknown token).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from puzzle_jax.tasks.chat.chat import Chat

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|return|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|call|>",
    "<|unknown|>",
)
WORDS = (
    "Reasoning: ", "commentary", "assistant", "analysis", "system", "medium", "final", "user", "high", "low",
)  # fmt: skip
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))

VOCAB_SIZE = 128
"""Number of tokens rounded up to a multiple of 32: the size of embedding and head."""

_PAD, _RETURN, _CALL = "<|endoftext|>", "<|return|>", "<|call|>"

_TEMPLATE = """\
{%- if reasoning_effort is not defined %}
    {%- set reasoning_effort = "medium" %}
{%- endif %}
{{- "<|start|>system<|message|>Reasoning: " + reasoning_effort + "<|end|>" }}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- else %}
        {{- raise_exception("role is " + message.role + ", but must be user or assistant") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant" }}
{%- endif %}
"""


def build_tokenizer() -> tokenizers.Tokenizer:
    """The embedded parent's tokenizer; ids follow the order special tokens, words, characters."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS, *CHARACTERS))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join((*WORDS, r"[\s\S]"))), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def chat_files() -> dict[str, bytes]:
    """The chat files by name: tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
    generation_config.json."""
    tokenizer = build_tokenizer()
    names = {"eos_token": _RETURN, "pad_token": _PAD, "unk_token": "<|unknown|>"}
    tokenizer_config = {
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {
        "do_sample": True,
        "eos_token_id": [tokenizer.token_to_id(token) for token in (_RETURN, _PAD, _CALL)],
        "pad_token_id": tokenizer.token_to_id(_PAD),
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json_bytes(tokenizer_config),
        "special_tokens_map.json": _json_bytes(names),
        "generation_config.json": _json_bytes(generation_config),
        "chat_template.jinja": _TEMPLATE.encode(),
    }


def write_chat_files(directory: str | Path) -> None:
    """Writes `chat_files` into an existing directory."""
    for name, content in chat_files().items():
        (Path(directory) / name).write_bytes(content)


def embedded_chat() -> Chat:
    """The embedded parent's chat without a checkpoint: what pretraining starts from."""
    with tempfile.TemporaryDirectory() as directory:
        write_chat_files(directory)
        return Chat.load(directory)


def is_embedded(chat: Chat) -> bool:
    """Returns whether a chat has the embedded parent's tokenizer, as its children have."""
    sizes = chat.tokenizer.get_vocab_size(), len((*SPECIAL_TOKENS, *WORDS, *CHARACTERS))
    return sizes[0] == sizes[1] and chat.tokenizer.get_vocab() == build_tokenizer().get_vocab()


def _json_bytes(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
