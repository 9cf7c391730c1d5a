"""The tokenizers and chat templates of the small embedded parents: characters, in the format of a family.

There is one token per printable ASCII character and newline, one per word of the chat format (so that its overhead is
small), in ChatML also one per phrase that all prompts of a reasoning-gym family share (half of the characters of
letter_counting's prompts, five sixths of spell_backward's), and one per control token. Decoding is exact: the text
comes back as it went in. Both templates render the effort as a system message, from which a parent learns it: gpt-oss's
do so too; Qwen3's have no efforts.
Left out: merges (a parent of a million parameters reads characters), characters outside ASCII (one unknown token).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from puzzle_jax.config import GPT_OSS, QWEN3_MOE
from puzzle_jax.tasks.chat.chat import Chat

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))

VOCAB_SIZE = 128
"""Number of tokens rounded up to a multiple of 32: the size of embedding and head, for every family."""

_PAD, _UNKNOWN = "<|endoftext|>", "<|unknown|>"


@dataclass(frozen=True)
class EmbeddedFormat:
    """The contents of an embedded parent's chat in a family's format.

    Attributes:
      special, added: control tokens, special ones and (as in the family's own tokenizers) merely added ones.
      words: words of the format.
      ends: tokens that end an answer, the usual one first.
      template: the chat template.
    """

    special: tuple[str, ...]
    added: tuple[str, ...]
    words: tuple[str, ...]
    ends: tuple[str, ...]
    template: str

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens in the order of their ids."""
        return (*self.special, *self.added, *self.words, *CHARACTERS)


HARMONY = EmbeddedFormat(
    special=(_PAD, "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", _UNKNOWN),
    added=(),
    words=(
        "Reasoning: ", "commentary", "assistant", "analysis", "system", "medium", "final", "user", "high", "low",
    ),
    ends=("<|return|>", _PAD, "<|call|>"),
    template="""\
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
""",
)  # fmt: skip

CHATML = EmbeddedFormat(
    special=(_PAD, "<|im_start|>", "<|im_end|>", _UNKNOWN),
    added=("<think>", "</think>"),
    words=(
        *("Reasoning: ", "assistant", "system", "medium", "user", "high", "low"),
        'How many times does the letter "',
        '" appear in the text: "',
        "Spell this word backward (example: sun -> nus): ",
    ),
    ends=("<|im_end|>", _PAD),
    template="""\
{%- if reasoning_effort is not defined %}
    {%- set reasoning_effort = "medium" %}
{%- endif %}
{{- "<|im_start|>system\\nReasoning: " + reasoning_effort + "<|im_end|>\\n" }}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" + message.content.split("</think>")[-1].lstrip("\\n") + "<|im_end|>\\n" }}
    {%- elif message.role == "user" %}
        {{- "<|im_start|>user\\n" + message.content + "<|im_end|>\\n" }}
    {%- else %}
        {{- raise_exception("role is " + message.role + ", but must be user or assistant") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
""",
)

EMBEDDED: Mapping[str, EmbeddedFormat] = {GPT_OSS.family: HARMONY, QWEN3_MOE.family: CHATML}
"""The embedded formats by family."""


def build_tokenizer(family: str = GPT_OSS.family) -> tokenizers.Tokenizer:
    """The tokenizer of a family's embedded parent; ids follow the order control tokens, words, characters."""
    form = EMBEDDED[family]
    vocabulary = {token: index for index, token in enumerate(form.tokens)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    pattern = Regex("|".join((*map(re.escape, form.words), r"[\s\S]")))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in form.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in form.added])
    return tokenizer


def token_ids(family: str = GPT_OSS.family) -> dict[str, int]:
    """The ids by which a config.json names the token that ends an answer and the one that pads rows."""
    form = EMBEDDED[family]
    return {"eos_token_id": form.tokens.index(form.ends[0]), "pad_token_id": form.tokens.index(_PAD)}


def chat_files(family: str = GPT_OSS.family) -> dict[str, bytes]:
    """The chat files by name: tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and
    generation_config.json."""
    form, tokenizer = EMBEDDED[family], build_tokenizer(family)
    names = {"eos_token": form.ends[0], "pad_token": _PAD, "unk_token": _UNKNOWN}
    tokenizer_config = {
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {
        "do_sample": True,
        "eos_token_id": [tokenizer.token_to_id(token) for token in form.ends],
        "pad_token_id": tokenizer.token_to_id(_PAD),
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json_bytes(tokenizer_config),
        "special_tokens_map.json": _json_bytes(names),
        "generation_config.json": _json_bytes(generation_config),
        "chat_template.jinja": form.template.encode(),
    }


def write_chat_files(directory: str | Path, family: str = GPT_OSS.family) -> None:
    """Writes `chat_files` into an existing directory."""
    for name, content in chat_files(family).items():
        (Path(directory) / name).write_bytes(content)


def embedded_chat(family: str = GPT_OSS.family) -> Chat:
    """The chat of a family's embedded parent without a checkpoint: what pretraining starts from."""
    with tempfile.TemporaryDirectory() as directory:
        write_chat_files(directory, family)
        return Chat.load(directory)


def is_embedded(chat: Chat) -> bool:
    """Returns whether a chat has the tokenizer of an embedded parent, as its children have."""
    own = chat.tokenizer.get_vocab_size()
    return any(
        own == len(form.tokens) and chat.tokenizer.get_vocab() == build_tokenizer(family).get_vocab()
        for family, form in EMBEDDED.items()
    )


def _json_bytes(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
