"""`puzzle generate --model DIR [--effort high] "PROMPT"`: streams an answer to the terminal.

The analysis is dimmed, the final answer is not. Without a prompt, one is read from standard input. If the output is
not a terminal, only the final answer goes to standard output, and the analysis to standard error.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from puzzle_jax.errors import ConfigError
from puzzle_jax.files import is_unicode

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of one answer.

    Attributes:
      model: a checkpoint directory.
      prompt: the user's message; "-" reads it from standard input.
      effort: reasoning effort: low, medium or high; for a model that can only switch its thinking on and off, low is
        off.
      max_tokens: token limit of the answer (by default what the context leaves, up to 4096).
      temperature: sampling temperature; 0 means greedy.
      top_p: share of the probability that is sampled from.
      seed: sampling seed; another seed draws another answer.
      weights: how weights are held: packed, dense, or auto (see `model.weights`).
      cache_dtype: how keys and values are stored: compute, float32, bfloat16, or float8_e4m3fn with the model's scales.
    """

    model: Path
    prompt: str = "-"
    effort: str = "medium"
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    weights: str = "auto"
    cache_dtype: str = "compute"


def run(settings: GenerateSettings) -> None:
    """Prints the answer to standard output.

    Raises PuzzleError for whatever cannot be used, before weights are read.
    """
    from puzzle_jax.convert_hf.describe import describe_checkpoint
    from puzzle_jax.convert_hf.load import cache_scales, load_weights
    from puzzle_jax.convert_hf.token_ids import check_tokenizer
    from puzzle_jax.generate.engine import Engine, Request, check_request
    from puzzle_jax.generate.sampling import Sampling
    from puzzle_jax.model.cache_format import FLOAT8, CacheFormat
    from puzzle_jax.model.weights import check_stored
    from puzzle_jax.tasks import Chat

    sampling = Sampling(settings.temperature, settings.top_p)
    description = describe_checkpoint(settings.model)
    check_stored(settings.weights, description.form == "mxfp4")
    chat = Chat.load(settings.model)
    check_tokenizer(settings.model, chat.tokenizer, description.config.vocab_size)
    scales = cache_scales(description) if settings.cache_dtype == FLOAT8 else None
    if settings.cache_dtype == FLOAT8 and scales is None:
        raise ConfigError(f"cache_dtype is {FLOAT8}, but {settings.model} carries no k_scale and v_scale")
    cache = CacheFormat(settings.cache_dtype, scales)
    prompt = tuple(chat.prompt_tokens(_prompt(settings.prompt), settings.effort))
    context = description.config.max_position
    limit = settings.max_tokens if settings.max_tokens is not None else max(1, min(4096, context - len(prompt)))
    request = Request(prompt, limit, settings.seed)
    check_request(request, 0, context)

    engine = Engine(
        load_weights(description, weights=settings.weights),
        description.config,
        stop_ids=sorted(chat.stop_ids),
        context=len(prompt) + limit,
        slots=1,
        sampling=sampling,
        cache=cache,
    )
    printer = _Printer()
    tokens: tuple[int, ...] = ()
    for event in engine.stream([request], burst=8):
        tokens += event.tokens
        answer = chat.parse(tokens, prompt)
        printer.show(answer.analysis, answer.final)
    printer.end()
    if chat.parse(tokens, prompt).truncated:
        print(f"(cut off at {limit} tokens)", file=sys.stderr)


def _prompt(given: str) -> str:
    """The prompt of the command line, or for "-" the content of standard input.

    Raises:
      ConfigError: it is empty or not valid Unicode.
    """
    where = "the prompt" if given != "-" else "the prompt on standard input"
    text = given if given != "-" else _standard_input(where)
    if not text.strip():
        raise ConfigError(f"{where} is empty, but must say something")
    if not is_unicode(text):  # Bytes of the command line that are not UTF-8 arrive as lone surrogates.
        raise ConfigError(f"{where} is not valid UTF-8, but must be valid Unicode")
    return text


def _standard_input(where: str) -> str:
    if sys.stdin is None:  # It was closed when the program began.
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not valid UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or error}") from None


class _Printer:
    """Prints the new parts of analysis and final text."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        for stream in (sys.stdout, sys.stderr):  # A model may write what the terminal's encoding cannot show.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        self.analysis = self.final = ""

    def show(self, analysis: str, final: str) -> None:
        # A character that is still missing bytes shows as U+FFFD at the end; it is not new text yet.
        analysis, final = analysis.rstrip("\ufffd"), final.rstrip("\ufffd")
        if analysis != self.analysis:
            stream = sys.stdout if self.terminal else sys.stderr
            dim, plain = (_DIM, _PLAIN) if self.terminal else ("", "")
            print(dim + analysis[len(self.analysis) :] + plain, end="", file=stream, flush=True)
            self.analysis = analysis
        if final != self.final:
            if not self.final and self.analysis:
                print(file=sys.stdout if self.terminal else sys.stderr)
            print(final[len(self.final) :], end="", flush=True)
            self.final = final

    def end(self) -> None:
        if self.final or (self.terminal and self.analysis):
            print(flush=True)
