"""Text that only looks like a control token stays text.

A question or an answer may mention `<|return|>`, or be crafted to end a turn that is not its own. Once data and
template are one text, a tokenizer cannot tell them apart. So control tokens in data are passed to the template as
single characters of Unicode's private planes that occur nowhere else in it, and the runs of text in which they come out
are encoded without looking for control tokens. The ids are those that the harmony format has for such content
(openai-harmony), and differ from those of transformers, which by default turns such text into control tokens.
Data without control tokens is encoded as usual, in one piece with its template.
Left out: control tokens that a template itself makes from other data, for example by changing its case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import tokenizers

from puzzle_jax.errors import CheckpointError, ConfigError
from puzzle_jax.tasks.chat.rendering import LONGEST_TEXT

_FIRST, _LAST = 0xF0000, 0x10FFFD


class Marked(NamedTuple):
    """Texts with private characters in place of control tokens, and the control token that each of these stands for."""

    texts: list[str]
    tokens: Mapping[str, str]


class ControlTokens:
    """The control tokens of a tokenizer, as they occur in text: its special tokens, and added tokens of a chat `format`
    (Qwen3's `<think>` is not special)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, format: Collection[str]) -> None:
        self._tokenizer, self._format = tokenizer, frozenset(format)
        added = tokenizer.get_added_tokens_decoder().values()
        special = [token for token in added if token.content and (token.special or token.content in self._format)]
        special.sort(key=lambda token: len(token.content), reverse=True)  # Of those that begin alike, the longest.
        self._tokens = re.compile("|".join(re.escape(token.content) for token in special) or "(?!)")
        # Some tokens absorb the white space beside them.
        space = r"\s*"
        self._spans = re.compile(
            "|".join(
                (space if token.lstrip else "") + re.escape(token.content) + (space if token.rstrip else "")
                for token in special
            )
            or "(?!)"
        )

    def mark(self, texts: Sequence[str], beside: str) -> Marked:
        """Replaces control tokens in `texts` by private characters that occur neither there nor in `beside`.

        Raises:
          CheckpointError: the texts use all private characters, or the tokenizer turns ordinary text into a control
            token of the chat format.
          ConfigError: the texts are longer than any context, so that their tokens would only take memory.
        """
        length = sum(map(len, texts))
        if length > LONGEST_TEXT:
            raise ConfigError(f"a text of {length} characters is longer than any context; {LONGEST_TEXT} is the most")
        written = {token for text in texts for token in self._tokens.findall(text)}
        found = sorted(token for token in written if not self._is_text(token))
        if not found:
            return Marked(list(texts), {})
        taken = set(beside).union(*texts)
        free = (chr(code) for code in range(_FIRST, _LAST) if code & 0xFFFE != 0xFFFE and chr(code) not in taken)
        characters = dict(zip(found, free, strict=False))
        if len(characters) < len(found):
            raise CheckpointError("a text holds all private characters of Unicode, which leaves none to mark it with")
        marked = [self._tokens.sub(lambda match: characters.get(match[0], match[0]), text) for text in texts]
        return Marked(marked, {character: token for token, character in characters.items()})

    def encode(self, text: str, tokens: Mapping[str, str]) -> list[int]:
        """Ids of a text; private characters become the text of the token that they stand for.

        Raises:
          CheckpointError: the tokenizer cannot encode it.
        """
        private = re.compile(f"[{''.join(tokens)}]") if tokens else None
        if private is None or not private.search(text):
            return self._encode(text)
        ids: list[int] = []
        ordinary_from = whole_from = 0
        for start, end in [*(match.span() for match in self._spans.finditer(text)), (len(text), len(text))]:
            run = text[ordinary_from:start]
            if private.search(run):
                ids += self._encode(text[whole_from:ordinary_from])
                ids += self._encode_ordinary(private.sub(lambda match: tokens[match[0]], run))
                whole_from = start
            ordinary_from = end
        return ids + self._encode(text[whole_from:])

    def _is_text(self, token: str) -> bool:
        """Returns whether a special token is an ordinary one as well: some checkpoints pad with the token "!"."""
        ordinary = self._tokenizer.token_to_id(token) in self._encode_ordinary(token)
        if ordinary and token in self._format:
            raise CheckpointError(f"tokenizer.json makes the control token {token} of ordinary text")
        return ordinary

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"tokenizer.json cannot encode a text: {error}") from None

    def _encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text, without looking for special tokens."""
        tokenizer = self._tokenizer
        try:
            if tokenizer.normalizer is not None:
                text = tokenizer.normalizer.normalize_str(text)
            pieces = [text]
            if tokenizer.pre_tokenizer is not None:
                pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
            return [token.id for piece in pieces for token in tokenizer.model.tokenize(piece)]
        except Exception as error:
            raise CheckpointError(f"tokenizer.json cannot encode a text: {error}") from None
