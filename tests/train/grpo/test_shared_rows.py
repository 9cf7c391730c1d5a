"""Rows whose answers share a prompt: their layout, and that an update learns the same from them."""

import jax
import numpy as np
import optax
import pytest

from puzzle_jax.kernels.prefix_attention import Layout
from puzzle_jax.model.sharding import make_training_mesh
from puzzle_jax.train.distill.objectives import Fixed
from puzzle_jax.train.grpo.policy import Policy, replayed
from puzzle_jax.train.grpo.policy_update import PolicyUpdate
from puzzle_jax.train.grpo.shared_rows import RowShape, layout_of, row_shapes, shared_rows, strip_of
from puzzle_jax.train.losses.policy_settings import PolicySettings
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Example, pack
from puzzle_jax.train.step import Shardings, init_state
from tests.support import random_params
from tests.train.grpo.test_policy import CHUNKS, CONFIG, STUDENT, K
from tests.train.toy_student import close, jit, random_master_weights

PAD = 96
SHAPE = RowShape(2, Layout(prefix=7, strip=6))
PROMPTS = ((11, 12, 13, 14, 15), (21, 22))
ANSWERS = ((0, (31, 32, 33, 34)), (0, (41, 42)), (0, (51, 52, 53, 54, 55)), (0, (61, 62, 63)), (1, (71, 72, 73)))


def example(number, prompt, answer):
    tokens, start = (*PROMPTS[prompt], *answer), len(PROMPTS[prompt])
    rng = np.random.default_rng(30 + number)

    def at_targets(value):
        row = np.zeros(len(tokens), np.float32)
        row[start - 1 : -1] = value
        return row

    chosen = np.random.default_rng(40 + prompt)  # the same for all answers to a prompt, as the sampler's are
    experts = [rng.permutation(5)[:K] for _ in range((len(answer) - 1) * 3)]
    of_prompt = [chosen.permutation(5)[:K] for _ in range(start * 3)]
    experts = np.asarray([*of_prompt, *experts], np.uint8).reshape(len(tokens) - 1, 3, K)
    extras = {
        "coefficients": at_targets(0.1 + 0.05 * number),
        "shares": at_targets(1 / sum(len(answer) for _, answer in ANSWERS)),
        "advantages": at_targets((0.75, -1.5, 0.5, -0.25, 2.0)[number]),
        "sampler": at_targets(-1.0 - rng.random(len(answer))),
        "experts": replayed(experts, len(tokens)),
    }
    return Example(tokens, start, extras)


@pytest.fixture(scope="module")
def examples():
    return [example(number, *given) for number, given in enumerate(ANSWERS)]


def test_a_prompt_is_there_once_with_its_last_token_before_every_answer(examples):
    (batch,) = shared_rows(examples, [SHAPE], PAD)
    assert batch.tokens.shape == (2, 25)
    # The longest answers come first; each strip takes what fits.
    answers = [15, 51, 52, 53, 54, 0, 15, 31, 32, 33, 15, 41, 15, 61, 62, 0, 0, 0]
    targets = [51, 52, 53, 54, 55, 0, 31, 32, 33, 34, 41, 42, 61, 62, 63, 0, 0, 0]
    segments = [2] * 5 + [0] + [3] * 4 + [4] * 2 + [5] * 3 + [0] * 3
    assert np.where(batch.segment_ids[0] > 0, batch.tokens[0], 0).tolist() == [0, 0, 0, 11, 12, 13, 14, *answers]
    assert np.where(batch.weights[0] > 0, batch.targets[0], 0).tolist() == [0] * 7 + targets
    assert batch.segment_ids[0].tolist() == [0, 0, 0, 1, 1, 1, 1, *segments]
    assert batch.positions[0, 3:17].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 4, 5, 6, 7]
    assert batch.segment_ids[1].tolist() == [0] * 6 + [1] + [2] * 3 + [0] * 15
    assert batch.tokens[1, 6:10].tolist() == [21, 22, 71, 72]
    np.testing.assert_array_equal(batch.extras["sampler"][1, 7:10], examples[4].extras["sampler"][1:4])
    np.testing.assert_array_equal(batch.extras["experts"][0, 13:17], examples[0].extras["experts"][4:8])


def test_answers_beyond_a_row_go_into_another_with_the_prompt(examples):
    shape = RowShape(2, Layout(prefix=4, strip=5))
    first, second = shared_rows(examples * 2, [shape], PAD)
    found = np.concatenate([first.tokens, second.tokens])
    filled = np.concatenate([first.segment_ids, second.segment_ids])
    assert found.shape == (4, 19) and (filled[:, 3] == 1).tolist() == [True, True, True, False]
    assert found[:2, :4].tolist() == [[11, 12, 13, 14]] * 2 and found[2, 3] == 21
    assert filled.max(axis=1).tolist() == [4, 6, 3, 0]  # 5 | 5 | 4, then 4 | 3 2 | 3 2, then 3 | 3


@pytest.mark.parametrize(("name", "replays"), [("dapo", True), ("gspo", False)])
def test_losses_gradients_and_metrics_are_those_of_packed_rows(examples, name, replays):
    def without(found):
        kept = {extra: values for extra, values in found.extras.items() if replays or extra != "experts"}
        return Example(found.tokens, found.prompt_length, kept)

    given = [without(found) for found in examples]
    base = STUDENT.stacked(random_params(CONFIG))
    masters = random_master_weights(STUDENT, base)
    settings = PolicySettings(name=name, kl=0.0).resolved
    packed_rows = pack([given[:3], given[3:]], 28, PAD)
    (shared,) = shared_rows(given, [SHAPE], PAD)

    def learnt(policy, batch):
        run = jit(jax.value_and_grad(lambda trained: policy(trained, Fixed(base), batch)[::2], has_aux=True))
        return run(masters)

    (total, terms), gradients = learnt(Policy(STUDENT, settings, **CHUNKS, strip=6), shared)
    (expected, others), plain = learnt(Policy(STUDENT, settings, **CHUNKS), packed_rows)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert terms.keys() == others.keys()
    for metric in terms:
        np.testing.assert_allclose(terms[metric], others[metric], rtol=2e-4, atol=1e-5, err_msg=metric)
    close(gradients, plain, 1e-4)


def test_scores_are_those_of_packed_rows(examples):
    base = STUDENT.stacked(random_params(CONFIG))
    masters, settings = random_master_weights(STUDENT, base), PolicySettings(name="dapo").resolved
    (shared,) = shared_rows(examples, [SHAPE], PAD)

    def scored(policy, batch):
        scores = jit(lambda m: policy.score(m, Fixed(base), batch, old=True, reference=True))(masters)
        return [np.sort(np.asarray(values)[batch.weights > 0]) for values in scores]

    mine = scored(Policy(STUDENT, settings, **CHUNKS, strip=6), shared)
    theirs = scored(Policy(STUDENT, settings, **CHUNKS), pack([examples[:3], examples[3:]], 28, PAD))
    np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert np.abs(mine[0] - mine[1]).max() > 0.1


def test_on_a_mesh_the_update_is_that_of_one_device(examples):
    (rows,) = shared_rows(examples, [SHAPE], PAD)
    base, optimizer = STUDENT.stacked(random_params(CONFIG)), optax.sgd(0.5)
    objective = Policy(STUDENT, PolicySettings(name="dapo").resolved, **CHUNKS, strip=6)

    def fresh():
        return init_state(random_master_weights(STUDENT, base), optimizer, jax.random.key(0))

    expected, metrics = PolicyUpdate(objective, optimizer)(fresh(), Fixed(base), [rows])
    mesh = make_training_mesh(2, 1, 3)
    placement = Placement(mesh)
    shardings = placement.master_weights(fresh())
    update = PolicyUpdate(objective, optimizer, Shardings(shardings), mesh)
    state = jax.device_put(fresh(), shardings)
    found, on_mesh = update(state, Fixed(placement.base(base, CONFIG)), [placement.rows(rows)])
    close(found.params, expected.params, 1e-4)
    for name in metrics:
        np.testing.assert_allclose(on_mesh[name], metrics[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_shapes_hold_every_prompt_in_few_lengths():
    assert strip_of(128) == 128 and strip_of(33) == 64
    assert row_shapes(512, 128, 2048) == (RowShape(4, Layout(64, 128)), RowShape(2, Layout(512, 128)))
    assert row_shapes(40, 9, 100) == (RowShape(1, Layout(40, 32)),)
    assert [shape.rows for shape in row_shapes(512, 128, 2048, parts=3)] == [3, 3]
    assert all(layout_of(shape.length, 128) == shape.layout for shape in row_shapes(512, 128, 2048))
