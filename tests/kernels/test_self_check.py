"""Kernels serve only where they passed their self-check; here they are declared to be for CPUs."""

import json
import os
import subprocess
import sys
import time
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from puzzle_jax.errors import ConfigError, PuzzleWarning
from puzzle_jax.kernels import (
    chunk_attention,
    decode_attention,
    expert_mlp,
    grouped_matmul,
    route,
    self_check,
    window_attention,
)
from puzzle_jax.kernels.dispatch import dispatch, recording
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.platform import lowering_for
from puzzle_jax.kernels.self_check import Trial, without_kernels
from tests.kernels.marks import GPU
from tests.support import normal

ROWS = jnp.arange(12.0).reshape(4, 3) - 3.5


@pytest.fixture(autouse=True)
def verdicts(tmp_path, monkeypatch):
    """Forgets the verdicts of earlier tests and gives each test a verdict file of its own."""
    path = tmp_path / "cache" / "kernels.json"
    monkeypatch.setenv("PUZZLE_KERNEL_VERDICTS", str(path))
    monkeypatch.delenv("PUZZLE_KERNELS", raising=False)
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(self_check, "KERNELS", {"kernel": "cpu", "other": "cpu", "of_gpus": "gpu"})
    monkeypatch.setattr(self_check, "SLOWER", 1e9)  # tests may run on a busy machine
    return path


class Operation:
    """Squares rows by XLA or by a kernel, and counts the kernel's traces."""

    def __init__(self, kernel, differentiable=(0,), shape_class="squares of 4 x 3"):
        self.traced, self.tries, self.kernel = 0, 0, kernel
        self.differentiable, self.shape_class = differentiable, shape_class

    def by_kernel(self, rows):
        self.traced += 1
        return self.kernel(rows)

    def trial(self):
        def arrays():
            self.tries += 1
            return (ROWS,)

        return Trial(self.shape_class, arrays, self, self.differentiable)

    def __call__(self, rows, implementation=None):
        ways = {"kernel": self.by_kernel, "of_gpus": self.by_kernel, "xla": lambda rows: rows * rows}
        return dispatch("square", ways, implementation, rows, trial=self.trial)


def right(rows):
    return jnp.square(rows)


def chosen(operation, rows=ROWS):
    with recording() as choices:
        found = jax.jit(lambda rows: operation(rows))(rows)
    np.testing.assert_array_equal(found, np.square(rows))
    return choices[-1]


def kept(path):
    (entries,) = json.loads(path.read_text()).values()
    return entries["square kernel squares of 4 x 3"]


def test_a_kernel_that_agrees_serves_and_its_verdict_is_kept(verdicts, monkeypatch):
    operation = Operation(right)
    assert chosen(operation) == ("square", "kernel", {})
    assert chosen(operation, ROWS[:2]) == ("square", "kernel", {})
    assert operation.tries == 1
    found = kept(verdicts)
    assert found.pop("error") == found.pop("xla_error") == 0.0
    assert set(found["seconds"]) == set(found["xla_seconds"]) == {"forwards", "with gradients"}
    assert min(*found["seconds"].values(), *found["xla_seconds"].values()) > 0
    assert set(found) == {"seconds", "xla_seconds"}

    monkeypatch.setattr(self_check, "_verdicts", {})  # as in another process
    assert chosen(operation).chosen == "kernel"
    assert operation.tries == 1
    (setup,) = json.loads(verdicts.read_text())
    assert setup.startswith(f"{jax.devices()[0].device_kind} | jax {jax.__version__} | puzzle_jax ")
    monkeypatch.setattr(self_check, "setup", lambda: "another device")
    monkeypatch.setattr(self_check, "_verdicts", {})
    assert chosen(operation).chosen == "kernel"
    assert operation.tries == 2
    assert set(json.loads(verdicts.read_text())) == {setup, "another device"}


def test_another_shape_class_is_tried_again():
    operation = Operation(right)
    chosen(operation)
    operation.shape_class = "squares of more"
    chosen(operation)
    assert operation.tries == 2


def no_kernel(rows):
    raise ValueError("no such layout")


@jax.custom_vjp
def wrong_gradient(rows):
    return jnp.square(rows)


wrong_gradient.defvjp(lambda rows: (jnp.square(rows), rows), lambda rows, d: (rows * d,))

BAD = {
    "does not compile": (no_kernel, r"it does not compile here: ValueError: no such layout"),
    "disagrees": (
        lambda rows: jnp.square(rows) * jnp.array([1.0, 1.0, 1.25]),
        r"result 0 forwards has errors of 0\.25 of a row's largest number, where XLA has 0",
    ),
    "is no number": (
        lambda rows: jnp.square(rows) / (rows != -3.5),
        r"result 0 forwards has 1 numbers that are not finite",
    ),
    "has another gradient": (wrong_gradient, r"result 0 with gradients has errors of 0\.5 of a row's largest"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_kernel_that_fails_is_one_warning_and_xla_serves(verdicts, monkeypatch, case):
    kernel, reason = BAD[case]
    operation = Operation(kernel)
    with pytest.warns(PuzzleWarning, match=f"kernel left out, XLA .* squares of 4 x 3: {reason}") as warned:
        choice = chosen(operation)
    assert len(warned) == 1 and choice.chosen == "xla"
    assert choice.refusals["of_gpus"] == "for a GPU, but this is a CPU"
    monkeypatch.setattr(self_check, "_verdicts", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning was given once
        assert chosen(operation) == choice
    assert operation.tries == 1
    assert kept(verdicts)["reason"] == choice.refusals["kernel"]


def test_gradients_that_nobody_takes_need_not_agree():
    assert chosen(Operation(wrong_gradient, differentiable=())).chosen == "kernel"


def sleeps(rows):
    def work(rows):
        time.sleep(0.05)
        return rows * rows

    return jax.pure_callback(work, jax.ShapeDtypeStruct(rows.shape, rows.dtype), rows)


def test_a_kernel_that_is_slower_leaves_it_to_xla(verdicts, monkeypatch):
    monkeypatch.setattr(self_check, "SLOWER", 1.05)
    monkeypatch.setattr(self_check, "ROUNDS", 1)
    operation = Operation(sleeps, differentiable=())
    choice = chosen(operation)
    assert choice.chosen == "xla"
    assert choice.refusals["kernel"].startswith("forwards it takes ")
    assert choice.refusals["kernel"].endswith(f" times XLA's time on {jax.devices()[0].device_kind}")
    assert kept(verdicts)["seconds"]["forwards"] > 10 * kept(verdicts)["xla_seconds"]["forwards"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # several processes measure, but must choose alike
    assert chosen(operation).chosen == "kernel"


def test_a_kernel_that_refuses_is_no_warning(verdicts):
    def kernel(rows):
        raise NotImplementedError("rows are no multiple of 64")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(Operation(kernel)).refusals["kernel"] == "rows are no multiple of 64"


def test_memory_that_does_not_suffice_is_no_verdict(verdicts, monkeypatch):
    def kernel(rows):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    operation = Operation(kernel)
    with pytest.warns(PuzzleWarning, match="it does not run here: RESOURCE_EXHAUSTED"):
        assert chosen(operation).chosen == "xla"
    assert chosen(operation).chosen == "xla"
    assert operation.tries == 1 and set(json.loads(verdicts.read_text()).popitem()[1]) == set()
    monkeypatch.setattr(self_check, "_verdicts", {})
    assert chosen(Operation(right)).chosen == "kernel"


def test_a_device_that_is_lost_ends_the_run_and_condemns_one_kernel_alone(verdicts, monkeypatch):
    def kernel(rows):
        monkeypatch.setattr(self_check, "_answers", lambda: False)
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")

    with pytest.raises(RuntimeError, match=r"square kernel squares of 4 x 3 .* run the same command again"):
        chosen(Operation(kernel))
    monkeypatch.undo()
    monkeypatch.setenv("PUZZLE_KERNEL_VERDICTS", str(verdicts))
    assert "the device no longer answered" in kept(verdicts)["reason"]
    assert self_check._answers()


DIES = """
import os, jax.numpy as jnp
from puzzle_jax.kernels import self_check
from puzzle_jax.kernels.dispatch import dispatch
self_check.KERNELS = {"kernel": "cpu"}
def dies(rows):
    os._exit(7)
def square(rows, implementation=None):
    trial = lambda: self_check.Trial("squares of 4 x 3", lambda: (rows,), square)
    return dispatch("square", {"kernel": dies, "xla": lambda rows: rows * rows}, implementation, rows, trial=trial)
square(jnp.ones((4, 3)))
"""


def test_a_kernel_that_took_a_process_down_is_not_tried_again(verdicts):
    assert subprocess.run([sys.executable, "-c", DIES]).returncode == 7
    operation = Operation(right)
    with pytest.warns(PuzzleWarning, match="squares of 4 x 3: a process ended while it was tried"):
        assert chosen(operation).chosen == "xla"
    assert operation.tries == 0


def test_what_another_process_tries_is_tried_too(verdicts, monkeypatch):
    chosen(Operation(right))
    monkeypatch.setattr(self_check, "_verdicts", {})
    for trying in (f"{self_check.socket.gethostname()} {os.getpid()}", "elsewhere 1"):
        data = json.loads(verdicts.read_text())
        data[self_check.setup()]["square kernel squares of 4 x 3"] = {"trying": trying}
        verdicts.write_text(json.dumps(data))
        monkeypatch.setattr(self_check, "_verdicts", {})
        operation = Operation(right)
        assert chosen(operation).chosen == "kernel"
        assert operation.tries == 1 and "trying" not in kept(verdicts)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"SETUP": 3}', '{"SETUP": {"square kernel squares of 4 x 3": 3}}'])
def test_a_damaged_file_is_as_none(verdicts, text):
    verdicts.parent.mkdir()
    verdicts.write_text(text.replace("SETUP", self_check.setup()))
    assert chosen(Operation(right)).chosen == "kernel"
    assert kept(verdicts)["error"] == 0.0


def test_a_file_that_cannot_be_written_is_no_error(verdicts):
    verdicts.parent.write_text("a file in the place of the folder")
    operation = Operation(right)
    assert chosen(operation).chosen == "kernel"
    assert operation.tries == 1


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("PUZZLE_KERNELS", "off")
    operation = Operation(right)
    assert chosen(operation).refusals["kernel"] == "PUZZLE_KERNELS is off"
    monkeypatch.setenv("PUZZLE_KERNELS", "other")
    assert chosen(operation).refusals["kernel"] == "PUZZLE_KERNELS is other"
    monkeypatch.setenv("PUZZLE_KERNELS", "kernel")
    assert chosen(operation).chosen == "kernel"
    assert operation.tries == 0  # unchecked
    monkeypatch.setenv("PUZZLE_KERNELS", "fast")
    with pytest.raises(ConfigError, match="PUZZLE_KERNELS is 'fast', but must be auto, off, or one of kernel, other"):
        operation(ROWS)
    monkeypatch.setenv("PUZZLE_KERNELS", "auto")
    with without_kernels():
        assert chosen(operation).refusals["kernel"] == "kernels are left out here"
    with without_kernels():
        assert operation(ROWS, implementation="kernel").shape == (4, 3)


def test_kernels_serve_where_there_is_no_device_to_try_them_on():
    operation = Operation(right)
    with lowering_for("gpu"), recording() as choices:
        jax.eval_shape(lambda rows: operation(rows), ROWS)
    assert choices[-1] == ("square", "of_gpus", {"kernel": "for a CPU, but this is a GPU"})
    assert operation.tries == 0


def test_what_has_no_trial_serves_by_name_only():
    with recording() as choices:
        dispatch("square", {"kernel": right, "xla": right}, None, ROWS)
    assert choices[-1].refusals == {"kernel": "there is nothing to check it by"}


def test_an_operation_made_of_others_is_tried_with_theirs():
    inner = Operation(right)

    def outer(rows, implementation=None):
        def trial():
            return Trial("fourth powers", lambda: (ROWS,), outer, (0,))

        ways = {"kernel": lambda rows: inner(rows) * inner(rows), "xla": lambda rows: rows**4}
        return dispatch("fourth power", ways, implementation, rows, trial=trial)

    with recording() as choices:
        jax.jit(outer)(ROWS)
    assert [choice.operation for choice in choices] == ["square", "square", "fourth power"]
    assert {choice.chosen for choice in choices} == {"kernel"} and inner.tries == 1


def test_it_is_tried_while_something_is_differentiated_and_mapped():
    operation = Operation(right)
    found = jax.jit(jax.grad(lambda rows: jnp.sum(jax.vmap(operation)(rows))))(ROWS)
    np.testing.assert_array_equal(found, 2 * ROWS)
    assert operation.tries == 1 and operation.traced > 2


def test_what_xla_cuts_is_left_to_xla():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.device_put(ROWS, NamedSharding(mesh, PartitionSpec("model")))
    operation = Operation(right)
    with jax.set_mesh(mesh):
        assert chosen(operation, rows).refusals["kernel"] == "XLA cannot cut a kernel over devices"
        cut = PartitionSpec("model")
        by_device = jax.shard_map(operation, in_specs=cut, out_specs=cut, check_vma=False)
        with recording() as choices:
            np.testing.assert_array_equal(jax.jit(by_device)(rows), np.square(ROWS))
    assert choices[-1].chosen == "kernel" and operation.tries == 1


# The kernels' own trials ----------------------------------------------------------------------------------------------


def interpreted(monkeypatch, operation, name, **implementations):
    """Makes the interpreted kernel serve where the real one would."""
    monkeypatch.setattr(self_check, "KERNELS", {name: "cpu"})
    monkeypatch.setattr(self_check, "ROUNDS", 1)
    for api, function in implementations.items():
        table = getattr(operation, api)
        monkeypatch.setitem(table, name, partial(function or table[name], interpret=True))


def agrees(verdict):
    assert verdict.error is not None and verdict.xla_error is not None
    return 0 < verdict.error <= max(2.0**-5, 2 * verdict.xla_error) < 0.1


def served(run, *arrays):
    with warnings.catch_warnings(), recording() as choices:
        warnings.simplefilter("error")
        found = jax.jit(run)(*arrays)
    return found, [choice.chosen for choice in choices][-1]


NAMES = ["mosaic_tpu", pytest.param("mosaic_gpu", marks=GPU)]


@pytest.mark.parametrize("name", [*NAMES, pytest.param("mosaic_gpu_fused", marks=GPU)])
@pytest.mark.parametrize("packed", [False, True])
def test_mixtures(monkeypatch, name, packed):
    monkeypatch.setattr(expert_mlp, "IMPLEMENTATIONS", dict(expert_mlp.IMPLEMENTATIONS))
    interpreted(monkeypatch, expert_mlp, name)
    grouped, of_fused = expert_mlp.grouped, name == "mosaic_gpu_fused"
    run = grouped.fused(interpret=True) if of_fused else grouped.by(name, interpret=True)
    expert_mlp.IMPLEMENTATIONS[name] = run
    count, hidden, inter, tokens = 3, 64, 128, 5
    dtype = jnp.bfloat16
    if packed:
        shapes = ((2 * inter, hidden), (hidden, inter))
        matrices = [
            MXFP4(jnp.full((count, out, of // 2), 0x21, jnp.uint8), jnp.full((count, out, of // 32), 121, jnp.uint8))
            for out, of in shapes
        ]
    else:
        matrices = [jnp.full(shape, 0.01, dtype) for shape in ((count, hidden, 2 * inter), (count, inter, hidden))]
    biases = jnp.ones((count, 2 * inter), dtype), jnp.ones((count, hidden), dtype)
    experts = expert_mlp.Experts(matrices[0], biases[0], matrices[1], biases[1])
    ids = jnp.asarray([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]], jnp.int32)
    _, choice = served(
        lambda x: expert_mlp.expert_outputs(x, ids, experts, limit=7.0), jnp.ones((tokens, hidden), dtype)
    )
    assert choice == name
    (verdict,) = (each for key, each in self_check._verdicts.items() if key.startswith("expert_mlp"))
    assert verdict.reason == "" and agrees(verdict)
    assert set(verdict.seconds) == {"forwards", "with gradients"}


@pytest.mark.parametrize(
    "name,window,segments",
    [
        ("splash", None, True),
        ("splash", 40, False),
        pytest.param("mosaic_gpu", None, True, marks=GPU),
        pytest.param("mosaic_gpu", 40, False, marks=GPU),
        pytest.param("mosaic_gpu_wide", 70, False, marks=GPU),
    ],
)
def test_window_attention(monkeypatch, name, window, segments):
    monkeypatch.setattr(window_attention.mosaic_gpu.mosaic_wide, "MIN_REACH", 70)
    interpreted(monkeypatch, window_attention, name, IMPLEMENTATIONS=None)
    q = jnp.ones((1, 100, 4, 64), jnp.bfloat16)
    k, sinks = q[:, :, :2], jnp.zeros(4)
    ids = jnp.zeros((1, 100), jnp.int32) if segments else None
    _, choice = served(lambda q: window_attention.window_attention(q, k, k, sinks, window=window, segment_ids=ids), q)
    assert choice == name
    ((key, verdict),) = self_check._verdicts.items()
    seen = "all segments" if segments else str(window)
    assert key == f"window_attention {name} bfloat16 2 x 64 tokens 128 window {seen}"
    assert verdict.reason == "" and agrees(verdict)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache,window", [("e4m3", None), ("bfloat16", 128)])
def test_decode_attention(monkeypatch, name, cache, window):
    interpreted(monkeypatch, decode_attention, name, IMPLEMENTATIONS=None)
    dtype = jnp.uint8 if cache == "e4m3" else jnp.bfloat16
    rings = jnp.zeros((2, 2, 64, 128), dtype), jnp.zeros((2, 2, 128, 64), dtype)
    scales = {"k_scale": jnp.float32(1), "v_scale": jnp.float32(1)} if cache == "e4m3" else {}

    def attend(q):
        given = q, *rings, jnp.zeros(4), jnp.asarray([3, 5])
        return decode_attention.decode_attention(*given, window=window, **scales)

    _, choice = served(attend, jnp.ones((2, 4, 64), jnp.bfloat16))
    assert choice == name
    ((key, verdict),) = self_check._verdicts.items()
    assert key == f"decode_attention {name} bfloat16 {cache} 2 x 64 slots 128 window {'all' if window is None else 128}"
    assert verdict.reason == "" and set(verdict.seconds) == {"forwards"}


@GPU
@pytest.mark.parametrize("cache,window,by_row", [("e4m3", None, False), ("bfloat16", 96, True)])
def test_chunk_attention(monkeypatch, cache, window, by_row):
    interpreted(monkeypatch, chunk_attention, "mosaic_gpu", IMPLEMENTATIONS=None)
    dtype = jnp.uint8 if cache == "e4m3" else jnp.bfloat16
    held = [jnp.zeros((2, 1, *shape), dtype) for count in (3, 96) for shape in ((64, count), (count, 64))]
    scales = {"k_scale": jnp.float32(1), "v_scale": jnp.float32(1)} if cache == "e4m3" else {}
    start = jnp.asarray([3, 5] if by_row else 3, jnp.int32)

    def attend(q):
        k, v, k_ring, v_ring = held
        return chunk_attention.chunk_attention(q, k, v, k_ring, v_ring, jnp.zeros(2), start, window=window, **scales)

    _, choice = served(attend, jnp.ones((2, 3, 2, 64), jnp.bfloat16))
    assert choice == "mosaic_gpu"
    ((key, verdict),) = self_check._verdicts.items()
    of_rows, seen = " by row" if by_row else "", "all" if window is None else window
    assert key == f"chunk_attention mosaic_gpu bfloat16 {cache} 2 x 64 tokens 4{of_rows} slots 96 window {seen}"
    assert verdict.reason == "" and agrees(verdict) and set(verdict.seconds) == {"forwards"}


@pytest.mark.parametrize("name", NAMES)
def test_grouped_matmul(monkeypatch, name):
    monkeypatch.setattr(grouped_matmul, "BLOCK_IMPLEMENTATIONS", dict(grouped_matmul.BLOCK_IMPLEMENTATIONS))
    monkeypatch.setattr(self_check, "KERNELS", {name: "cpu"})
    by_name = grouped_matmul.BLOCK_IMPLEMENTATIONS
    by_name[name] = partial(by_name[name], interpret=True)
    rows, weights = jnp.ones((12, 64), jnp.bfloat16), jnp.full((3, 64, 128), 0.01, jnp.bfloat16)
    found, choice = served(lambda rows: grouped_matmul.grouped_matmul(rows, weights, jnp.asarray([5, 0, 7])), rows)
    assert choice == name
    np.testing.assert_allclose(found.astype(jnp.float32), 0.64, rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_routing(monkeypatch, name):
    module = {"mosaic_tpu": route.mosaic_tpu, "mosaic_gpu": route.mosaic_gpu}[name]
    kernel = partial(module.routed, interpret=True)
    monkeypatch.setattr(self_check, "KERNELS", {name: "cpu"})
    monkeypatch.setattr(self_check, "ROUNDS", 1)
    monkeypatch.setitem(route.IMPLEMENTATIONS, name, partial(route.tally.route, kernel))
    monkeypatch.setitem(route.ORDER_IMPLEMENTATIONS, name, partial(route.tally.expert_order, kernel))
    logits = jnp.sin(jnp.arange(5 * 9.0).reshape(5, 9))
    found, choice = served(lambda logits: route.route(logits, 2).ids, logits)
    assert choice == name
    np.testing.assert_array_equal(found, jax.jit(lambda logits: route.top_k_ids(logits, 2))(logits))
    order, choice = served(lambda ids: route.expert_order(ids, 9, 4).slot, found)
    assert choice == name
    np.testing.assert_array_equal(order, jax.jit(lambda ids: route.reference.expert_order(ids, 9, 4).slot)(found))
    keys = [f"route {name} 7 tokens top 2 of 9", f"expert_order {name} 7 tokens top 2 of 9 blocks of 4"]
    assert list(self_check._verdicts) == keys
    assert [verdict.reason for verdict in self_check._verdicts.values()] == ["", ""]

    def misplaced(*args, **options):
        found = kernel(*args, **options)
        return found if found.rank is None else found._replace(rank=found.rank[::-1])

    monkeypatch.setattr(self_check, "_verdicts", {})
    self_check.verdicts_file().unlink()
    monkeypatch.setitem(route.ORDER_IMPLEMENTATIONS, name, partial(route.tally.expert_order, misplaced))
    with pytest.warns(PuzzleWarning, match=f"expert_order {name} .* has errors of .* of a row's largest number"):
        jax.jit(lambda ids: route.expert_order(ids, 9, 4).slot)(found)


def test_attention_is_cut_by_rows_and_heads_where_a_kernel_may_serve(monkeypatch):
    """Results match the reference, and the kernel receives each device's part."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    seen = []

    def kernel(q, *rest, **options):
        seen.append(q.shape)
        return window_attention.reference.window_attention(q, *rest, **options)

    def decoding(q, *rest, **options):
        seen.append(q.shape)
        return decode_attention.reference.decode_attention(q, *rest, **options)

    def chunk(q, *rest, **options):
        seen.append(q.shape)
        return chunk_attention.reference.chunk_attention(q, *rest, **options)

    monkeypatch.setattr(self_check, "KERNELS", {"splash": "cpu", "mosaic_tpu": "cpu", "mosaic_gpu": "cpu"})
    monkeypatch.setitem(chunk_attention.IMPLEMENTATIONS, "mosaic_gpu", chunk)
    monkeypatch.setitem(window_attention.IMPLEMENTATIONS, "splash", kernel)
    monkeypatch.setitem(decode_attention.IMPLEMENTATIONS, "mosaic_tpu", decoding)
    q, k, v = normal(0, (6, 10, 12, 8), (6, 10, 4, 8), (6, 10, 4, 8))
    sinks, segments = jnp.arange(12.0), jnp.asarray(np.cumsum(np.arange(60).reshape(6, 10) % 7 == 0, axis=1))
    for window in (4, jnp.arange(1, 7)):
        by_reference = partial(window_attention.reference.window_attention, window=window, segment_ids=segments)
        expected = jax.jit(by_reference)(q, k, v, sinks)
        for mesh_of in (None, mesh):
            with jax.set_mesh(mesh) if mesh_of else jax.disable_jit(False):
                attend = partial(window_attention.window_attention, window=window, segment_ids=segments, mesh=mesh_of)
                found = jax.jit(attend)(q, k, v, sinks)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            assert seen[-1] == ((3, 10, 6, 8) if mesh_of else (6, 10, 12, 8))
    of_rows = tuple(map(np.asarray, (q, k, v)))
    rings = jnp.asarray(of_rows[1].transpose(0, 2, 3, 1)), jnp.asarray(of_rows[2].transpose(0, 2, 1, 3))
    given = jnp.asarray(of_rows[0][:, 3]), *rings, sinks, jnp.asarray([0, 3, 9, 9, 5, 12])
    scales = {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(2)}
    with jax.set_mesh(mesh):
        attend = partial(decode_attention.decode_attention, window=jnp.arange(2, 8), **scales, mesh=mesh)
        found = jax.jit(attend)(*given)
    assert seen[-1] == (3, 6, 8)
    cache = decode_attention.LayerCache(*rings, **scales)
    by_reference = partial(decode_attention.reference.decode_attention, window=jnp.arange(2, 8))
    expected = jax.jit(by_reference)(given[0], cache, *given[3:])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    new = q[:, :4], rings[0][..., :4], rings[1][:, :, :4]
    by_reference = partial(chunk_attention.reference.chunk_attention, window=jnp.arange(2, 8))
    for start in (jnp.int32(7), jnp.asarray([0, 3, 9, 10, 5, 12])):
        with jax.set_mesh(mesh):
            attend = partial(chunk_attention.chunk_attention, window=jnp.arange(2, 8), **scales, mesh=mesh)
            found = jax.jit(attend)(*new, *rings, sinks, start)
        assert seen[-1] == (3, 4, 6, 8)
        expected = jax.jit(by_reference)(*new, cache, sinks, start)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
