"""Programs of many layers hold one layer's intermediate values at a time."""

import jax
import jax.numpy as jnp
import pytest

from puzzle_jax.model.network import attention_block
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.schedule import LayersProgram, compiler_options, jit_layers
from puzzle_jax.model.spec import attention_specs, is_spec
from tests.support import small_config


def test_rematerialised_layers_do_not_lie_side_by_side():
    """Recomputation needs only the layers' inputs, which are all present, so XLA could recompute all layers at once."""
    config = small_config()
    of_layer = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), attention_specs(config), is_leaf=is_spec
    )
    table = rope_table(config.rope, config.head_dim, jnp.arange(128)[None])

    @jax.checkpoint
    def layer(x, params):
        return attention_block(params, config, x, table, window=None)[0]

    def loss(params, x):
        for each in params:
            x = layer(x, each)
        return jnp.sum(x**2)

    def temporaries(layers):
        gradients = jax.jit(jax.grad(loss), compiler_options=compiler_options())
        x = jax.ShapeDtypeStruct((2, 128, config.hidden_size), jnp.float32)
        found = gradients.lower([of_layer] * layers, x).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    assert temporaries(4) < 1.2 * temporaries(2)  # 1.6 times as much in XLA's default order


def test_a_program_of_layers_is_jitted_once_with_its_options():
    traced = []

    @jit_layers(static_argnames="times")
    def program(x, times):
        traced.append(times)
        return times * x

    assert isinstance(program, LayersProgram)
    assert float(program(jnp.ones(()), times=3)) == float(program(jnp.ones(()), times=3)) == 3.0
    assert traced == [3] and program._cache_size() == 1
    program.clear_cache()
    assert program._cache_size() == 0
    assert program.function(2.0, 5) == 10.0


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_only_cpus_are_told_how_to_schedule(monkeypatch, platform):
    assert list(compiler_options()) == ["xla_cpu_scheduler_type"]
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert compiler_options() == {}
