"""Attention of several answers to one prompt, whose keys they share: the prompt is run once, not once per answer.

A row holds a prompt and answers to it:

    | padding, prompt | strip | strip | ...        prompt right-aligned in `Layout.prefix` positions; answers packed
                                                   into strips of `Layout.strip`, each wholly in one of them

Positions of the prompt attend as in `window_attention`. Those of an answer see the prompt and the answer up to
themselves, but of both only what lies within the window by positions in the conversation, which are data. Sharing a
prefix between the sequences of a batch in this way is the idea of arXiv 2402.05099 (Hydragen) and, for training on
several continuations, of arXiv 2506.05433 (prefix grouper).

Implementations: `strips`, plain XLA for every platform, and `reference`, the whole square of logits. Left out: kernels,
and windows that are data. So the logits of answers against prompts, [batch, heads, answers, prefix], are held in memory
on every platform, which bounds how long both can be.
"""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh

from puzzle_jax.kernels import checks
from puzzle_jax.kernels.prefix_attention import reference, strips
from puzzle_jax.kernels.prefix_attention.layout import PROMPT, Layout
from puzzle_jax.kernels.shapes import Array, Int, Keys, Queries, Sinks
from puzzle_jax.kernels.sinks import given_or_weightless

__all__ = ["PROMPT", "Layout", "prefix_attention"]


def prefix_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    sinks: Sinks | None,
    *,
    layout: Layout,
    window: int | None,
    segment_ids: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    implementation: str = "strips",
    mesh: Mesh | AbstractMesh | None = None,
) -> Queries:
    """Attention within a row of one prompt and answers to it.

    Args:
      q, k, v, sinks: as in `window_attention`.
      window: number of positions that a query sees, itself included; None means all.
      segment_ids: `PROMPT` for the prompt, larger ones for answers, 0 for padding, whose output is arbitrary.
      positions: positions in the conversation; those of an answer continue where the prompt ends.
      implementation: "strips" or "reference".
      mesh: as in `window_attention`; used for the prompt's part.

    Differentiable in all float arrays. Raises ValueError for shapes that do not fit, NotImplementedError for rows with
    more logits than may be held at a time.
    """
    (batch, seq, heads, dim), kv_heads = q.shape, k.shape[2]
    sinks = given_or_weightless(sinks, heads)
    checks.floating(q=q, k=k, v=v, sinks=sinks)
    checks.heads(q, heads, "k", k, kv_heads)
    checks.shapes(
        f"q of shape {q.shape}",
        {
            "k": (k, (batch, seq, kv_heads, dim)),
            "v": (v, k.shape),
            "sinks": (sinks, (heads,)),
            "segment_ids": (segment_ids, (batch, seq)),
            "positions": (positions, (batch, seq)),
        },
    )
    checks.window(window, batch)
    if not 1 <= layout.prefix < seq or layout.strip < 1 or (seq - layout.prefix) % layout.strip:
        raise ValueError(
            f"layout has a prefix of {layout.prefix} and strips of {layout.strip}, which do not make rows of {seq}"
        )
    options = {"layout": layout, "window": window, "segment_ids": segment_ids, "positions": positions}
    if implementation not in ("strips", "reference"):
        raise ValueError(f"implementation is {implementation!r}, but must be strips or reference")
    if implementation == "reference":
        return reference.prefix_attention(q, k, v, sinks, **options)
    return strips.prefix_attention(q, k, v, sinks, mesh=mesh, **options)
