"""Memory of a deployment, and the batches that it leaves room for.

    memory = dense bytes x replicas + expert bytes x copies + batch x KV bytes of a request at its end

summed over all devices. Left out: a cache that is shared or paged more finely than by request, so that requests which
are not yet long leave room for others.
"""

from __future__ import annotations

from collections.abc import Sequence

from puzzle_jax.costs.scenario import Scenario


def memory_bytes(scenario: Scenario, *, dense: int, experts: int, kv: int, batch: int) -> int:
    """Bytes on all devices.

    Args:
      scenario: says how often weights are held.
      dense: bytes of what is no expert and no router.
      experts: bytes of experts and routers.
      kv: cache bytes of one request at its end.
      batch: requests on all devices.
    """
    return dense * scenario.replicas + experts * scenario.expert_copies + batch * kv


def largest_batch(scenario: Scenario, *, dense: int, experts: int, kv: int, room: int, at_most: int) -> int:
    """Requests whose caches fit beside the weights into `room` bytes, and no more than `at_most`; 0 where none fits."""
    free = room - memory_bytes(scenario, dense=dense, experts=experts, kv=kv, batch=0)
    return max(0, min(free // kv, at_most))


def candidate_batches(largest: Sequence[int]) -> tuple[int, ...]:
    """Batches worth trying: powers of two and the middles between them up to the largest of `largest`, and those.

    Args:
      largest: what fits, for one or several architectures.
    """
    top = max(largest)
    powers = [2**exponent for exponent in range(top.bit_length())]
    middles = [3 * power // 2 for power in powers if power > 1]
    return tuple(sorted({*largest, *(batch for batch in (*powers, *middles) if batch <= top)} - {0}))
