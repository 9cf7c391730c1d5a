"""The sub-blocks of a model as functions, at the shapes in which the generation engine runs them in a scenario.

`measured` times them on the device present, `xla` compiles them for a device that need not be present. Each function is
one chunk of a group of prompts, or one decoding step of the whole batch; the caller counts how often it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.generate.engine import chunk_tokens, group_rows, slot_context
from puzzle_jax.model.cache import LayerCache, decode_attention_block, prefill_attention_block
from puzzle_jax.model.network import embed, head_logits
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import Params

Hidden = Float[Array, "batch seq hidden"]


@dataclass(frozen=True)
class SubBlocks:
    """Sub-blocks of one model in one scenario, whose batch must be given."""

    config: ModelConfig
    scenario: Scenario

    # Shapes ---------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.scenario.given_batch

    @property
    def context(self) -> int:
        """Positions of a slot."""
        return slot_context(self.scenario.context_tokens)

    @property
    def chunk(self) -> int:
        """Tokens of one prompt that are prefilled at once."""
        return chunk_tokens(self.context)

    @property
    def chunks(self) -> int:
        """Chunks of one prompt."""
        return -(-self.scenario.input_tokens // self.chunk)

    @property
    def rows(self) -> int:
        """Prompts of one group, which are prefilled together."""
        return group_rows(self.chunk, self.batch)

    @property
    def groups(self) -> float:
        """Groups of the batch; the last may be smaller than the others, and counts as a fraction."""
        return self.batch / self.rows

    def one_layer(self, block: BlockConfig | None = None) -> ModelConfig:
        """The model cut down to one layer; without a block, to the smallest possible one."""
        return replace(self.config, blocks=(block or BlockConfig(self.config.experts_per_token),))

    def with_window(self, window: int | None) -> ModelConfig:
        """One layer whose attention has that window."""
        return self.one_layer(BlockConfig(self.config.experts_per_token, window))

    # Functions ------------------------------------------------------------------------------------------------------

    def prefill_attention(self, window: int | None) -> Callable[..., tuple[Hidden, LayerCache]]:
        """Returns a function of parameters, hidden states [rows, chunk, hidden], cache, start of the chunk, and lengths
        [rows] of the prompts."""
        config, chunk, context = self.with_window(window), self.chunk, self.context

        def run(
            params: Params, x: Hidden, cache: LayerCache, start: Int[Array, ""], lengths: Int[Array, "rows"]
        ) -> tuple[Hidden, LayerCache]:
            table = rope_table(config.rope, config.head_dim, (start + jnp.arange(chunk))[None])
            return prefill_attention_block(
                params, config, x, cache, start, lengths, table, window=window, context=context
            )

        return run

    def decode_attention(self, window: int | None) -> Callable[..., tuple[Hidden, LayerCache]]:
        """Returns a function of parameters, hidden states [batch, 1, hidden], cache, and the position of all rows."""
        config, batch = self.with_window(window), self.batch

        def run(params: Params, x: Hidden, cache: LayerCache, position: Int[Array, ""]) -> tuple[Hidden, LayerCache]:
            positions = jnp.full(batch, position, jnp.int32)
            table = rope_table(config.rope, config.head_dim, positions[:, None])
            return decode_attention_block(params, config, x, cache, positions, table, window=window)

        return run

    def prefill_rest(self, params: Params, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch vocab"]:
        """Embedding of whole prompts, and the head on each last token."""
        return head_logits(params, self.config, embed(params, tokens)[:, -1])

    def decode_rest(self, params: Params, x: Hidden) -> Hidden:
        """Head, choice of the next token, its embedding; hidden states are [batch, 1, hidden]."""
        token = jnp.argmax(head_logits(params, self.config, x[:, 0]), axis=-1)
        return embed(params, token[:, None])


def without_layers(params: Params) -> Params:
    """Parameters of embedding, final norm and head."""
    return {name: value for name, value in params.items() if name != "layers"}
