"""The cases that `kernels.py` times: operations at gpt-oss-120b's shapes on a GPU or TPU, smaller ones on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cache_cases import cached, chunks
from case import Case, normal

from puzzle_jax.kernels.expert_mlp import Experts, expert_mlp
from puzzle_jax.kernels.expert_mlp.reference import apply_swiglu
from puzzle_jax.kernels.grouped_matmul import grouped_matmul
from puzzle_jax.kernels.mxfp4 import MXFP4, decode
from puzzle_jax.kernels.route import Routing
from puzzle_jax.kernels.window_attention import window_attention


def _implementations(operation: Callable[..., Any], names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    return {name: lambda *given, name=name: operation(*given, implementation=name, **options) for name in names}


def grouped(small: bool) -> list[Case]:
    """A layer's down projection in training, 327,680 rows: forward, and the gradient of the rows."""
    experts, rows, inputs, outputs = (3, 192, 128, 192) if small else (128, 327_680, 2880, 2880)
    sizes = np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts)).astype(np.int32)
    x, w = normal(0, (rows, inputs)), normal(1, (experts, inputs, outputs), scale=inputs**-0.5)
    some = min(int(sizes[0]), 256)
    names = ("mosaic_gpu", "mosaic_tpu", "tokamax", "ragged_dot", *(["blocked"] if small else []))
    flops = 2.0 * rows * inputs * outputs
    num_bytes = 2.0 * (rows * (inputs + outputs) + experts * inputs * outputs)
    shape = f"{rows} rows, {experts} experts, {inputs} x {outputs}, bf16"
    return [
        Case(
            f"grouped matmul, {shape}",
            (x, w, jnp.asarray(sizes)),
            _implementations(grouped_matmul, names),
            lambda x, w, sizes: x[:some].astype(jnp.float32) @ w[0].astype(jnp.float32),
            lambda out: out[:some],
            flops,
            num_bytes,
        ),
        Case(
            f"grouped matmul, transposed (gradient of the rows), {shape}",
            (normal(2, (rows, outputs)), w, jnp.asarray(sizes)),
            _implementations(grouped_matmul, names, transposed=True),
            lambda x, w, sizes: x[:some].astype(jnp.float32) @ w[0].astype(jnp.float32).T,
            lambda out: out[:some],
            flops,
            num_bytes,
        ),
    ]


def packed(small: bool) -> list[Case]:
    """Both matrices of a layer's experts in MXFP4, 64 tokens at top 4, as in decoding."""
    experts, k, tokens = (5, 2, 6) if small else (128, 4, 64)
    shapes = [(128, 192), (192, 128)] if small else [(2880, 5760), (2880, 2880)]
    source = np.random.default_rng(0)
    chosen = np.stack([source.permutation(experts)[:k] for _ in range(tokens)])
    sizes = np.bincount(chosen.reshape(-1), minlength=experts).astype(np.int32)
    first = int(np.flatnonzero(sizes)[0])
    cases = []
    for inputs, outputs in shapes:
        blocks = source.integers(0, 256, (experts, outputs, inputs // 2), np.uint8)
        scales = source.integers(118, 124, (experts, outputs, inputs // 32)).astype(np.uint8)
        bytes_per_expert = inputs * outputs * 17 / 32
        cases.append(
            Case(
                f"grouped matmul, MXFP4, {tokens} tokens x top {k} of {experts}, {inputs} x {outputs}",
                (normal(3, (tokens * k, inputs)), jnp.asarray(blocks), jnp.asarray(scales), jnp.asarray(sizes)),
                {
                    name: lambda x, b, s, n, name=name: grouped_matmul(x, MXFP4(b, s), n, implementation=name)
                    for name in ("mosaic_gpu", "mosaic_tpu", "ragged_dot", "blocked")
                },
                lambda x, b, s, n, first=first, some=int(sizes[first]): (
                    x[:some].astype(jnp.float32) @ decode(MXFP4(b[first : first + 1], s[first : first + 1]))[0]
                ),
                lambda out, some=int(sizes[first]): out[:some],
                2.0 * tokens * k * inputs * outputs,
                float(np.count_nonzero(sizes)) * bytes_per_expert + 2.0 * tokens * k * (inputs + outputs),
            )
        )
    return cases


def mixture(small: bool) -> list[Case]:
    """A layer's experts in MXFP4 on 64 routed tokens, as in decoding."""
    experts, k, tokens, hidden, inter = (5, 2, 6, 128, 192) if small else (128, 4, 64, 2880, 2880)
    source = np.random.default_rng(0)
    ids = np.stack([source.permutation(experts)[:k] for _ in range(tokens)])
    gates = np.full(ids.shape, 1 / k, np.float32)
    packed = []
    for inputs, outputs in ((hidden, 2 * inter), (inter, hidden)):
        codes = source.integers(0, 256, (experts, outputs, inputs // 2), np.uint8)
        packed += [jnp.asarray(codes), jnp.full((experts, outputs, inputs // 32), 118, jnp.uint8)]
    biases = normal(12, (experts, 2 * inter)), normal(13, (experts, hidden))
    # Only the first tokens and their experts are checked: all experts in float32 take several gigabytes.
    some = min(tokens, 4)
    chosen, of_some = np.unique(ids[:some], return_inverse=True)

    def run(x: Any, *parts: Any, ids: Any = ids, name: str | None) -> jax.Array:
        gate_up, down = MXFP4(*parts[:2]), MXFP4(*parts[2:4])
        layer = Experts(gate_up, parts[4], down, parts[5])
        routing = Routing(jnp.asarray(ids), jnp.asarray(gates[: len(ids)]))
        return expert_mlp(x, routing, layer, limit=7.0, implementation=name)

    def expected(x: Any, *parts: Any) -> jax.Array:
        own = [part[chosen] for part in parts]
        return run(x[:some].astype(jnp.float32), *own, ids=of_some.reshape(some, k), name="reference")

    per_expert = 3 * hidden * inter * 17 / 32
    names = ("mosaic_gpu_fused", "mosaic_gpu", "mosaic_tpu", "capacity", "ragged_dot")
    return [
        Case(
            f"expert MLP, MXFP4, {tokens} tokens x top {k} of {experts}, {hidden} x {inter}",
            (normal(14, (tokens, hidden)), *packed, *biases),
            {name: partial(run, name=name) for name in names},
            expected,
            lambda out: out[:some],
            6.0 * tokens * k * hidden * inter,
            float(len(np.unique(ids))) * per_expert + 4.0 * tokens * hidden,
        )
    ]


def window(small: bool) -> list[Case]:
    """Attention over 65,536 tokens, full and within 128 keys, forward and with gradients."""
    seq, heads, kv_heads, dim = (512, 4, 2, 64) if small else (65_536, 64, 8, 64)
    shapes = ((4, heads), (5, kv_heads), (6, kv_heads))
    arrays = (*(normal(seed, (1, seq, of, dim)) for seed, of in shapes), normal(7, (heads,), jnp.float32))
    cases = []
    for width in (128, None):
        names = (
            "mosaic_gpu",
            "splash",
            "dew_flash_attn",
            *(("banded",) if width else ("mosaic_gpu_wide", "online_blocks")),
        )
        cases += _attention(arrays, width, min(seq, 512), names)
    return cases


def _attention(arrays: tuple[jax.Array, ...], width: int | None, some: int, names: tuple[str, ...]) -> list[Case]:
    """The forward pass, and with gradients; only the first `some` tokens are checked, as they see no later ones."""
    (_, seq, heads, dim), kv_heads = arrays[0].shape, arrays[1].shape[2]

    def forward(*given: Any, name: str) -> jax.Array:
        return window_attention(*given, window=width, implementation=name)

    def gradients(*given: Any, name: str) -> jax.Array:
        def total(*given: Any) -> jax.Array:
            return jnp.sum(forward(*given, name=name).astype(jnp.float32) ** 2)

        of_q, of_k, of_v = jax.grad(total, (0, 1, 2))(*given)
        # Sums of the other gradients, so that these are computed, too.
        sums = [jnp.sum(x.astype(jnp.float32))[None] for x in (of_k, of_v)]
        return jnp.concatenate([of_q[:, :some].astype(jnp.float32).reshape(-1), *sums])

    def head(*given: Any) -> tuple[Any, ...]:
        return (*(x[:, :some].astype(jnp.float32) for x in given[:3]), given[3])

    rows, size = len(arrays[0]), arrays[0].dtype.itemsize
    keys = rows * seq * min(width, seq) if width else rows * seq * (seq + 1) / 2
    flops, num_bytes = 4.0 * heads * dim * keys, 2.0 * rows * seq * dim * size * (heads + kv_heads)
    shape = f"{rows} x {seq} tokens, {heads} heads of {dim} on {kv_heads}, window {width}"
    return [
        Case(
            f"attention, {shape}",
            arrays,
            {name: partial(forward, name=name) for name in names},
            lambda *given: forward(*head(*given), name="reference"),
            lambda out: out[:, :some],
            flops,
            num_bytes,
        ),
        Case(
            f"attention with gradients, {shape}",
            arrays,
            {name: partial(gradients, name=name) for name in names},
            lambda *given: gradients(*head(*given), name="reference")[:-2],
            lambda out: out[:-2],
            3.5 * flops,
            2.5 * num_bytes,
        ),
    ]


# On CPUs --------------------------------------------------------------------------------------------------------------


def experts_on_cpu(small: bool) -> list[Case]:
    """The expert layer of a small model, forward and with all gradients; 64 experts, top 2."""
    tokens, experts, k, hidden, inter = (96, 8, 2, 32, 48) if small else (4096, 64, 2, 64, 96)
    source = np.random.default_rng(0)
    ids = np.stack([source.permutation(experts)[:k] for _ in range(tokens)])
    routing = Routing(jnp.asarray(ids), jnp.asarray(source.dirichlet(np.ones(k), tokens), jnp.float32))
    f32 = jnp.float32
    weights = (
        normal(1, (experts, hidden, 2 * inter), f32, hidden**-0.5),
        normal(2, (experts, 2 * inter), f32),
        normal(3, (experts, inter, hidden), f32, inter**-0.5),
        normal(4, (experts, hidden), f32),
    )
    x, some = normal(0, (tokens, hidden), f32), min(tokens, 256)

    def by_name(name: str | None) -> Callable[..., jax.Array]:
        return lambda x, *w: expert_mlp(x, _first(routing, x), Experts(*w), limit=7.0, implementation=name)

    functions: dict[str, Callable[..., jax.Array]] = {
        "dense": by_name("reference"),
        "ours": by_name(None),
        "buffer": lambda x, *w: _capacity_buffer(x, routing, Experts(*w)),
        "ragged_dot": lambda x, *w: _ragged_mlp(x, routing, Experts(*w)),
    }

    def gradients(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(*given: Any) -> jax.Array:
            of_x, *of_weights = jax.grad(lambda *given: jnp.sum(function(*given) ** 2), range(5))(*given)
            sums = [jnp.sum(leaf)[None] for leaf in of_weights]
            return jnp.concatenate([of_x[:some].reshape(-1), *sums])

        return run

    shape = f"{tokens} tokens, top {k} of {experts} experts, {hidden} x {inter}, float32"
    flops = 6.0 * tokens * k * hidden * inter
    num_bytes = 4.0 * (2 * tokens * hidden + 3 * experts * hidden * inter)
    return [
        Case(
            f"expert layer, {shape}",
            (x, *weights),
            functions,
            lambda x, *w: functions["dense"](x[:some], *w),
            lambda out: out[:some],
            flops,
            num_bytes,
        ),
        Case(
            f"expert layer with gradients, {shape}",
            (x, *weights),
            {name: gradients(function) for name, function in functions.items()},
            lambda x, *w: gradients(functions["dense"])(x[:some], *w)[: some * hidden],
            lambda out: out[: some * hidden],
            3 * flops,
            2.5 * num_bytes,
        ),
    ]


def _first(routing: Routing, x: jax.Array) -> Routing:
    return Routing(routing.ids[: len(x)], routing.gates[: len(x)])


def _capacity_buffer(x: jax.Array, routing: Routing, experts: Experts, factor: float = 1.25) -> jax.Array:
    """The mixture as many trainers implement it: each expert has a fixed capacity, and rows beyond it are dropped."""
    count, (tokens, k) = len(experts.down_bias), routing.ids.shape
    rows = int(factor * tokens * k / count)
    assert isinstance(experts.gate_up, jax.Array) and isinstance(experts.down, jax.Array)
    flat = routing.ids.reshape(-1)
    mine = jax.nn.one_hot(flat, count, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(mine, axis=0) - mine) * mine, axis=1)
    source = jnp.full((count, rows), tokens).at[flat, rank].set(jnp.arange(tokens * k) // k, mode="drop")
    h = jnp.take(x, source, axis=0, mode="fill", fill_value=0) @ experts.gate_up + experts.gate_up_bias[:, None]
    out = apply_swiglu(h, 7.0) @ experts.down + experts.down_bias[:, None]
    pairs = out.at[flat, rank].get(mode="fill", fill_value=0).reshape(tokens, k, -1)
    return jnp.einsum("tkh,tk->th", pairs, routing.gates)


def _ragged_mlp(x: jax.Array, routing: Routing, experts: Experts) -> jax.Array:
    """The mixture by `lax.ragged_dot` over rows sorted by expert."""
    k, count = routing.ids.shape[1], experts.down_bias.shape[0]
    assert isinstance(experts.gate_up, jax.Array) and isinstance(experts.down, jax.Array)
    flat = routing.ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.zeros(count, jnp.int32).at[flat].add(1)
    expert = flat[order]
    h = jax.lax.ragged_dot(x[order // k], experts.gate_up, sizes) + experts.gate_up_bias[expert]
    out = jax.lax.ragged_dot(apply_swiglu(h, 7.0), experts.down, sizes) + experts.down_bias[expert]
    out = jnp.zeros_like(out).at[order].set(out).reshape(*routing.ids.shape, -1)
    return jnp.einsum("tkh,tk->th", out, routing.gates)


def window_on_cpu(small: bool) -> list[Case]:
    """Attention of a small model, full and within 16 keys, and of one long sequence."""
    short, long = ((2, 64), (1, 128)) if small else ((8, 512), (1, 8192))
    cases = (
        (short, 16, ("reference", "square", "banded")),
        (short, None, ("reference", "square", "causal_blocks")),
        (long, None, ("causal_blocks", "online_blocks")),
    )

    def of(rows: int, seq: int, width: int | None, names: tuple[str, ...]) -> list[Case]:
        shapes = ((4, 4), (5, 2), (6, 2))
        arrays = (*(normal(seed, (rows, seq, heads, 32), jnp.float32) for seed, heads in shapes), jnp.zeros(4))
        return _attention(arrays, width, min(seq, 128), names)

    return [case for shape, width, names in cases for case in of(*shape, width, names)]


ON_ACCELERATORS = {
    "grouped": grouped,
    "packed": packed,
    "experts": mixture,
    "window": window,
    "chunk": chunks,
    "decode": cached,
}
ON_CPUS = {"experts": experts_on_cpu, "window": window_on_cpu}
