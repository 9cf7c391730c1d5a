"""The mixture on a mesh of virtual devices equals the mixture on one device."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from puzzle_jax.kernels.expert_mlp import Experts, expert_loop, expert_mlp, expert_outputs
from puzzle_jax.kernels.expert_mlp.parallel import WAYS, mixture, way_for
from puzzle_jax.kernels.mxfp4 import MXFP4, decode
from puzzle_jax.kernels.platform import lowering_for
from puzzle_jax.kernels.route import Routing
from puzzle_jax.model.sharding import make_mesh, make_training_mesh, rows_sharding
from tests.kernels.marks import MIXTURES_ON_CPU
from tests.support import normal

EXPERTS, HIDDEN, INTER, TOKENS, LIMIT = 8, 32, 96, 21, 1.5


@pytest.fixture(autouse=True)
def loops_over_small_experts(monkeypatch):
    monkeypatch.setattr(expert_loop, "MIN_EXPERT_BYTES", 0)


@cache
def experts_of(dtype=jnp.float32) -> Experts:
    shapes = (EXPERTS, HIDDEN, 2 * INTER), (EXPERTS, 2 * INTER), (EXPERTS, INTER, HIDDEN), (EXPERTS, HIDDEN)
    values = zip(normal(0, *shapes), (0.5, 1.0, 0.3, 1.0), strict=True)
    return Experts(*(jnp.asarray((scale * np.asarray(x)).astype(dtype)) for x, scale in values))


ROUTES = {
    "mixed": np.stack([np.random.default_rng(n).permutation(EXPERTS)[:3] for n in range(TOKENS)]),
    "all on one device": np.asarray([[6, 7]] * TOKENS),
    "one token": np.asarray([[5, 0]]),
}


def given(route, dtype=jnp.float32):
    ids = jnp.asarray(ROUTES[route])
    gates = np.exp(normal(2, ids.shape)[0])
    gates = jnp.asarray(gates / gates.sum(axis=-1, keepdims=True))
    return normal(1, (len(ids), HIDDEN), dtype=dtype)[0], Routing(ids, gates)


# On one device, jitted: one program compiles faster than the operations one by one.
alone = jax.jit(partial(expert_mlp, limit=LIMIT, implementation="reference"))
outputs_alone = jax.jit(partial(expert_outputs, limit=LIMIT, implementation="reference"))


def on_mesh(mesh, implementation, way):
    return jax.jit(
        lambda x, routing, experts: expert_mlp(
            x, routing, experts, limit=LIMIT, implementation=implementation, mesh=mesh, way=way
        )
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "route,implementation", [*((route, None) for route in ROUTES), *(("mixed", name) for name in MIXTURES_ON_CPU)]
)
def test_every_way_gives_what_one_device_gives(way, route, implementation):
    x, routing = given(route)
    expected = alone(x, routing, experts_of())
    found = on_mesh(make_mesh(2, 4), implementation, way)(x, routing, experts_of())
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("route", ROUTES)
def test_every_expert_s_own_output_is_that_of_one_device(route):
    x, routing = given(route)
    expected = outputs_alone(x, routing.ids, experts_of())
    apart = jax.jit(lambda x, ids, experts: expert_outputs(x, ids, experts, limit=LIMIT, mesh=make_mesh(2, 4)))
    found = apart(x, routing.ids, experts_of())
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * float(np.abs(expected).max()))


def gradients(mesh, way):
    x, routing = given("mixed")

    def run(x, gates, experts):
        out = expert_mlp(x, Routing(routing.ids, gates), experts, limit=LIMIT, mesh=mesh, way=way)
        return jnp.sum(jnp.sin(out))

    return jax.tree.leaves(jax.jit(jax.grad(run, (0, 1, 2)))(x, routing.gates, experts_of()))


@pytest.fixture(scope="module")
def gradients_alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_loop, "MIN_EXPERT_BYTES", 0)
        return gradients(None, None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("data,model", [(1, 8), (4, 2)])
def test_gradients_are_those_of_one_device(gradients_alone, way, data, model):
    for found, expected in zip(gradients(make_mesh(data, model), way), gradients_alone, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("way", WAYS)
def test_packed_experts_in_bfloat16(way):
    source = np.random.default_rng(3)

    def packed(outputs, inputs):
        codes = source.integers(0, 256, (EXPERTS, outputs, inputs // 2)).astype(np.uint8)
        scales = source.integers(118, 124, (EXPERTS, outputs, inputs // 32)).astype(np.uint8)
        return MXFP4(jnp.asarray(codes), jnp.asarray(scales))

    x, routing = given("mixed", jnp.bfloat16)
    gate_up, down = packed(2 * INTER, HIDDEN), packed(HIDDEN, INTER)
    experts = experts_of(jnp.bfloat16)._replace(gate_up=gate_up, down=down)
    dense = experts._replace(gate_up=jax.jit(decode)(gate_up), down=jax.jit(decode)(down))
    expected = alone(x.astype(jnp.float32), routing, dense)
    found = on_mesh(make_mesh(2, 4), None, way)(x, routing, experts)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.02 * float(np.abs(expected).max()))


@pytest.mark.parametrize("way", WAYS)
def test_weights_stay_where_they_are(way):
    """No collective carries experts; what is gathered or summed is at most as large as the tokens."""
    mesh = make_mesh(1, 8)
    x, routing = given("mixed")
    placed = jax.device_put(experts_of(), NamedSharding(mesh, PartitionSpec("model")))
    text = on_mesh(mesh, None, way).lower(x, routing, placed).compile().as_text() or ""
    collectives = [
        line
        for line in text.splitlines()
        if any(f" {name}(" in line or f" {name}-start(" in line for name in ("all-gather", "all-reduce", "all-to-all"))
    ]
    assert collectives
    for line in collectives:
        assert f",{2 * INTER}]" not in line and f"{INTER},{HIDDEN}]" not in line, line


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_off_cpus_only_rows_that_are_there_travel(platform):
    """Lowered with gradients for 8 absent devices, only ragged exchanges and small tables are communicated."""
    x, routing = given("mixed")

    def loss(x, experts):
        return jnp.sum(jnp.sin(expert_mlp(x, routing, experts, limit=LIMIT, mesh=make_mesh(1, 8), way="all_to_all")))

    with lowering_for(platform):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, experts_of())
    text = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else "tpu",)).as_text()
    # Rows and ids go out and outputs come back; their gradients (of outputs and rows) go the opposite way.
    assert text.count("@ragged_all_to_all(") == 5
    gathered = [line for line in text.splitlines() if "all_gather" in line and "tensor<" in line]
    assert gathered and all("xf32>" not in line for line in gathered)


ROWS = (4, 8)


def in_rows(x, routing):
    """Repeats tokens to fill the batch [rows, positions, hidden], and their routing row by row."""
    turn = np.arange(ROWS[0] * ROWS[1]) % len(x)
    rows = np.asarray(x)[turn].reshape(*ROWS, HIDDEN) * np.linspace(0.5, 1.5, ROWS[1], dtype=np.float32)[:, None]
    return jnp.asarray(rows), jax.tree.map(lambda part: jnp.asarray(np.asarray(part)[turn]), routing)


def outputs_and_gradients(x, routing, mesh=None, way=None):
    def loss(x, gates, experts):
        out = expert_mlp(x, Routing(routing.ids, gates), experts, limit=LIMIT, mesh=mesh, way=way)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, out), gradients = run(x, routing.gates, experts_of())
    return jax.tree.leaves((out, gradients))


@pytest.mark.parametrize(
    "form,places",
    [
        # Rows sharded along positions stay in place; a list of tokens (21 here) is sharded over both data axes.
        ("rows", [((2, 2, 2), "replicate"), ((2, 2, 2), "all_to_all"), ((2, 4, 1), None)]),
        ("list", [((2, 2, 2), "all_to_all")]),
    ],
)
def test_several_data_axes(form, places):
    x, routing = in_rows(*given("mixed")) if form == "rows" else given("mixed")
    expected = outputs_and_gradients(x, routing)
    for sizes, way in places:
        mesh = make_training_mesh(*sizes)
        placed = jax.device_put(x, rows_sharding(mesh)) if form == "rows" else x
        for one, other in zip(outputs_and_gradients(placed, routing, mesh, way), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(other).max())))


def test_rows_cut_along_positions_are_not_gathered():
    mesh = make_training_mesh(2, 2, 2)
    x, routing = in_rows(*given("mixed"))
    run = on_mesh(mesh, None, "replicate")
    text = run.lower(jax.device_put(x, rows_sharding(mesh)), routing, experts_of()).compile().as_text() or ""
    assert " all-reduce(" in text and " all-gather(" not in text and " all-to-all(" not in text


def test_ways_by_size():
    # 4 experts per token: with 8 devices all_to_all sends half of replicate's bytes in exchanges, half to gather.
    assert way_for(100_000, 4, 16) == "all_to_all" and way_for(100_000, 4, 8) == "replicate"
    assert way_for(16 * 256, 4, 16) == "all_to_all" and way_for(16 * 256 - 1, 4, 16) == "replicate"


def test_what_cannot_be_cut_is_refused_or_left_to_xla():
    x, routing = given("mixed")
    few = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[:6]), experts_of())
    clipped = Routing(jnp.asarray(np.asarray(routing.ids) % 6), routing.gates)
    with pytest.raises(ValueError, match="6 experts cannot be cut for 4 devices of the axis 'model'"):
        mixture(x, clipped, few, lambda *_: x, lambda a, _: a, mesh=make_mesh(2, 4))
    with pytest.raises(ValueError, match="way is 'ring', but must be one of replicate, all_to_all"):
        expert_mlp(x, routing, experts_of(), limit=LIMIT, mesh=make_mesh(2, 4), way="ring")
    expected = jax.jit(partial(expert_mlp, limit=LIMIT))(x, clipped, few)
    np.testing.assert_allclose(
        on_mesh(make_mesh(2, 4), None, None)(x, clipped, few),
        expected,
        rtol=2e-5,
        atol=1e-5 * float(np.abs(expected).max()),
    )
