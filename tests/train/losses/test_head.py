"""Chunked losses against `losses` on whole logits, and their gradients against autodiff of those."""

from functools import cache, partial
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.model.network import head_logits
from puzzle_jax.train.losses import definitions as losses
from puzzle_jax.train.losses import head_sum
from puzzle_jax.train.losses.definitions import TopK
from puzzle_jax.train.losses.head import Head, head_losses
from puzzle_jax.train.losses.head_sum import head_loss_sum
from tests.support import present, small_config

TOKENS, HIDDEN, TEACHER_HIDDEN, K = 24, 40, 28, 6


class Chunks(TypedDict):
    token_chunk: int
    vocab_chunk: int


CHUNKS: Chunks = {"token_chunk": 5, "vocab_chunk": 19}  # 5 groups of up to 5 for 24 tokens; 6 slices for 97 words
CONFIG = small_config()
VOCAB, EPS = CONFIG.vocab_size, CONFIG.rms_norm_eps
KINDS = ("forward_kl", "reverse_kl", "jsd", "next_token", "top_k_kl", "entropy")


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def head(seed, hidden):
    return Head(1 + 0.5 * draw(seed, hidden), 2 * hidden**-0.5 * draw(seed + 1, hidden, VOCAB))


STUDENT, TEACHER = head(0, HIDDEN), head(2, TEACHER_HIDDEN)
X, Y = draw(4, TOKENS, HIDDEN), draw(5, TOKENS, TEACHER_HIDDEN)
WEIGHTS = jnp.asarray(np.random.default_rng(6).uniform(0.1, 2.0, TOKENS), jnp.float32).at[jnp.asarray([3, 11])].set(0.0)
TARGETS = (
    jnp.asarray(np.random.default_rng(7).integers(0, VOCAB, TOKENS), jnp.int32)
    .at[:3]
    .set(
        jnp.asarray([0, VOCAB - 1, VOCAB - 19])  # the ends of the vocabulary and of the last slice
    )
)


def logits(head, x):
    return head_logits({"final_norm": head.norm, "head": head.weight}, CONFIG, x)


def top_k_of(teacher, k, temperature):
    values, ids = jax.lax.top_k(teacher, k)
    return TopK(ids, values, jax.nn.logsumexp(teacher / temperature, axis=-1))


def whole(kind, student, x, y, weights, temperature):
    """The definition on whole logits."""
    student, teacher = logits(student, x), logits(TEACHER, y)
    per_token = {
        "forward_kl": lambda: losses.forward_kl(teacher, student, temperature),
        "reverse_kl": lambda: losses.reverse_kl(teacher, student, temperature),
        "jsd": lambda: losses.jsd(teacher, student, temperature, 0.3),
        "next_token": lambda: losses.next_token(student, TARGETS, temperature),
        "top_k_kl": lambda: losses.top_k_kl(top_k_of(teacher, K, temperature), student, temperature),
        "entropy": lambda: losses.entropy(student, temperature),
    }[kind]()
    return jnp.sum(weights * per_token)


def head_loss(kind, student, x, weights, **options):
    """The weighted sum of the module's losses without tokens of weight 0, as objectives compute it."""
    live = weights != 0
    per_token = head_losses(kind, student, jnp.where(live[:, None], x, 0), **options)
    return jnp.sum(jnp.where(live, weights * per_token, 0.0))


def chunked(kind, student, x, y, weights, temperature, k=K, **chunks):
    return head_loss(
        kind,
        student,
        x,
        weights,
        eps=EPS,
        teacher=TEACHER,
        y=y,
        targets=TARGETS,
        top_k=top_k_of(logits(TEACHER, y), k, temperature),
        temperature=temperature,
        beta=0.3,
        **(chunks or CHUNKS),
    )


@cache
def definitions(temperature, kinds=KINDS):
    """Maps (student, x, y, weights) to value and gradients in student and x by kind, in one program for all kinds."""

    def run(*arguments):
        return {
            kind: jax.value_and_grad(partial(whole, kind, temperature=temperature), (0, 1))(*arguments)
            for kind in kinds
        }

    return jax.jit(run)


@cache
def program(kind, temperature=1.0, k=K, **chunks):
    """The same for one kind, in chunks."""
    return jax.jit(jax.value_and_grad(partial(chunked, kind, temperature=temperature, k=k, **chunks), argnums=(0, 1)))


def assert_close(found, expected, tolerance=1e-5):
    """Compares relative to each array's largest entry, since small entries are differences of larger ones."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_in_four_matmuls_has_the_same_values_and_gradients(kind, monkeypatch):
    monkeypatch.setattr(head_sum, "MOST_LOGITS", 7 * VOCAB)  # 4 groups of 6 for 24 tokens

    def run(student, x, y, weights):
        # A token of weight 0 may hold anything, and a loss may be scaled before it is differentiated.
        x = jnp.where(weights[:, None] != 0, x, jnp.nan)
        return 3 * head_loss_sum(
            kind,
            student,
            x,
            weights,
            eps=EPS,
            teacher=TEACHER,
            y=y,
            targets=TARGETS,
            top_k=top_k_of(logits(TEACHER, y), K, 2.0),
            temperature=2.0,
            beta=0.3,
            token_chunk=100,
        )

    arguments = (STUDENT, X, Y, WEIGHTS)
    value, gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(*arguments)
    expected = definitions(2.0)(*arguments)[kind]
    assert_close((value, gradients), jax.tree.map(lambda array: 3 * array, expected))
    np.testing.assert_allclose(jax.jit(run)(*arguments), value, rtol=1e-5)
    with pytest.raises(ValueError, match=r"weights has shape \(23,\), but x of shape \(24, 40\) needs \(24,\)"):
        head_loss_sum("entropy", STUDENT, X, WEIGHTS[1:], eps=EPS)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_whole_logits(kind, temperature):
    arguments = (STUDENT, X, Y, WEIGHTS)
    expected = definitions(temperature)(*arguments)[kind]
    assert_close(program(kind, temperature)(*arguments), expected)
    assert float(expected[0]) > 1.0  # large enough for the comparison to mean something


@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_apart(kind):
    """Without running maxima sums would overflow, and many probabilities are 0 in float32.

    The remaining gradients are small compared with the rounding of logits of several hundred.
    """
    arguments = (STUDENT._replace(weight=40 * STUDENT.weight), X, Y, WEIGHTS)
    found = program(kind)(*arguments)
    assert_close(found, definitions(1.0)(*arguments)[kind], tolerance=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("chunks", [(24, 97), (1, 31), (4096, 4096)])
@pytest.mark.parametrize("kind", ["forward_kl", "entropy"])
def test_chunks_change_nothing(kind, chunks):
    token_chunk, vocab_chunk = chunks
    arguments = (STUDENT, X, Y, WEIGHTS)
    found = program(kind, token_chunk=token_chunk, vocab_chunk=vocab_chunk)(*arguments)
    assert_close(found, program(kind)(*arguments))


def test_entropy_of_certain_and_of_undecided_students():
    """Logits of +-10,000 that favour one word, half of the words or all of them; and one with a single logit of 1."""
    certain = jnp.full((3, VOCAB), -1e4).at[0, 50].set(1e4).at[1, ::2].set(1e4).at[2].set(1e4)
    words = jnp.concatenate([certain, jnp.eye(VOCAB)[:1]])  # each row of the head is one token's logits
    x = jnp.eye(4)
    scaled = Head(jnp.full(4, (0.25 + EPS) ** 0.5), words)  # cancels the norm's scaling of a unit vector

    @jax.jit
    def run(student):
        def loss(student, x):
            per_token = head_losses("entropy", student, x, eps=EPS, temperature=1.0, **CHUNKS)
            return jnp.sum(per_token), per_token

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(student, x)

    (_, found), gradients = run(scaled)
    assert found[0] == 0.0
    np.testing.assert_allclose(found[1:3], np.log([49, VOCAB]), rtol=1e-5)
    np.testing.assert_allclose(found[3], np.log(np.e + VOCAB - 1) - np.e / (np.e + VOCAB - 1), rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[0].weight[0], 0.0)
    np.testing.assert_allclose(gradients[0].weight[1:3], 0.0, atol=1e-6)


def test_top_k_of_the_whole_vocabulary_is_the_forward_kl():
    arguments = (STUDENT, X, Y, WEIGHTS)
    expected = program("forward_kl")(*arguments)
    assert_close(program("top_k_kl", k=VOCAB)(*arguments), expected)
    assert program("top_k_kl")(*arguments)[0] < expected[0]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_weight_zero_add_nothing_whatever_they_hold(kind):
    run = program(kind)
    expected = run(STUDENT, X, Y, WEIGHTS)
    skipped = np.flatnonzero(np.asarray(WEIGHTS) == 0)
    np.testing.assert_array_equal(expected[1][1][skipped], 0.0)
    for garbage in (1e20, jnp.nan):
        found = run(STUDENT, X.at[skipped].set(garbage), Y.at[skipped].set(garbage), WEIGHTS)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert float(run(STUDENT, X, Y, jnp.zeros(TOKENS))[0]) == 0.0


def test_a_model_is_its_own_teacher():
    """With shared arrays there is no divergence and no gradient, and none flows through the teacher."""

    @jax.jit
    @jax.value_and_grad
    def loss(student, scale):
        return head_loss("jsd", student, X, WEIGHTS, eps=EPS, teacher=student, y=scale * X, **CHUNKS)

    value, gradient = loss(STUDENT, 1.0)
    assert abs(float(value)) < 1e-5
    assert max(float(jnp.abs(leaf).max()) for leaf in gradient) < 1e-5


def test_losses_per_token():
    run = jax.jit(lambda x: head_losses("next_token", STUDENT, x, eps=EPS, targets=TARGETS, temperature=2.0, **CHUNKS))
    assert_close(run(X), losses.next_token(logits(STUDENT, X), TARGETS, 2.0))


def test_in_bfloat16_logits_are_those_of_the_model():
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), (STUDENT, X, Y))
    expected = definitions(1.0, ("forward_kl",))(*half, WEIGHTS)["forward_kl"]
    value, gradients = program("forward_kl")(*half, WEIGHTS)
    assert value.dtype == jnp.float32
    assert_close(value, expected[0])
    assert_close(gradients, expected[1], tolerance=0.02)  # two roundings of 2^-8 on either side


def test_no_tokens():
    def loss(student):
        return head_loss("forward_kl", student, X[:0], WEIGHTS[:0], eps=EPS, teacher=TEACHER, y=Y[:0])

    value, gradients = jax.value_and_grad(loss)(STUDENT)
    assert float(value) == 0.0
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), gradients)


def test_on_devices_that_share_the_tokens():
    """In shard_map each device has its own tokens and the whole head; gradients of the head are summed once."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut, same = jax.P("data"), jax.P()

    def local(student, x, y, weights):
        loss = head_loss("reverse_kl", student, x, weights, eps=EPS, teacher=TEACHER, y=y, **CHUNKS)
        return jax.lax.psum(loss, "data")

    shared = jax.shard_map(local, mesh=mesh, in_specs=(same, cut, cut, cut), out_specs=same, check_vma=False)
    found = jax.jit(jax.value_and_grad(shared, argnums=(0, 1)))(STUDENT, X, Y, WEIGHTS)
    assert_close(found, definitions(1.0)(STUDENT, X, Y, WEIGHTS)["reverse_kl"])


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    tokens, hidden = 512, 16

    def temporary_bytes(vocab):
        def of(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        def loss(student, x, teacher, y, weights):
            return head_loss(
                "forward_kl", student, x, weights, eps=EPS, teacher=teacher, y=y, token_chunk=64, vocab_chunk=256
            )

        head = Head(of(hidden), of(hidden, vocab))  # pyright: ignore[reportArgumentType]
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
            head, of(tokens, hidden), head, of(tokens, hidden), of(tokens)
        )
        return present(lowered.compile().memory_analysis()).temp_size_in_bytes

    small, large = 5_003, 20_011
    of_gradient = 4 * hidden * (large - small)
    grown = temporary_bytes(large) - temporary_bytes(small)
    assert grown <= of_gradient < 4 * tokens * (large - small) / 10


BAD = {
    "kind": ({"kind": "kl"}, "kind is 'kl', but must be one of forward_kl, reverse_kl"),
    "no teacher": ({"teacher": None}, "'forward_kl' needs teacher and y, but teacher is None"),
    "no y": ({"y": None}, "but y is None"),
    "no targets": ({"kind": "next_token", "targets": None}, "'next_token' needs targets, but targets is None"),
    "no top_k": ({"kind": "top_k_kl", "top_k": None}, "needs top_k, but top_k is None"),
    "y": ({"y": Y[:9]}, r"y has shape \(9, 28\), but x of shape \(24, 40\) needs \(24, 28\)"),
    "norm": ({"student": TEACHER}, r"student.norm has shape \(28,\), but x of shape \(24, 40\) needs \(40,\)"),
    "teacher": ({"teacher": STUDENT}, r"teacher.norm has shape \(40,\), but y of shape \(24, 28\)"),
    "vocabulary": (
        {"teacher": TEACHER._replace(weight=TEACHER.weight[:, :90])},
        r"teacher.weight has shape \(28, 90\), but .* of 97 words needs \(28, 97\)",
    ),
    "targets": ({"kind": "next_token", "targets": TARGETS[:9]}, r"targets has shape \(9,\), .* needs \(24,\)"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0, but must be above 0"),
    "beta": ({"beta": 1.0}, "beta is 1.0, but must be between 0 and 1"),
    "chunk": ({"vocab_chunk": 0}, "vocab_chunk is 0, but must be at least 1"),
    "top_k": (
        {"kind": "top_k_kl", "top_k": TopK(jnp.zeros((9, 2), jnp.int32), jnp.zeros((9, 2)), jnp.zeros(9))},
        r"top_k.ids has shape \(9, 2\), but x of shape \(24, 40\) needs \(24, 2\)",
    ),
    "k": (
        {"kind": "top_k_kl", "top_k": TopK(jnp.zeros((24, 98), jnp.int32), jnp.zeros((24, 98)), jnp.zeros(24))},
        "top_k has 98 tokens per row, but must have from 1 to the 97",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_both_sides(name):
    changes, message = BAD[name]
    good = {
        "kind": "forward_kl",
        "student": STUDENT,
        "x": X,
        "eps": EPS,
        "teacher": TEACHER,
        "y": Y,
    }
    with pytest.raises(ValueError, match=message):
        head_losses(**{**good, **changes})
