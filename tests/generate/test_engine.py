import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate import Request, generate
from puzzle_jax.model.child import Child, ChildBlock, cut_params
from puzzle_jax.model.network import forward
from tests.support import random_params, small_config

STOP = 3


def requests(count=7):
    rng = np.random.default_rng(0)
    return [Request(tuple(rng.integers(0, 97, 9 + 11 * i).tolist()), 5 + 6 * i, seed=i) for i in range(count)]


def greedy(params, config, request):
    """One token at a time, no cache."""
    tokens, out = list(request.prompt), []
    while len(out) < request.max_tokens and STOP not in out:
        padded = jnp.zeros((1, 128), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
        out.append(int(forward(params, config, padded)[0, len(tokens) - 1].argmax()))
        tokens.append(out[-1])
    return tuple(out)


def test_batched_cached_generation_equals_the_uncached_pass_for_a_heterogeneous_model():
    config = small_config(tuple(BlockConfig(c, w) for c, w in ((7, 5), (3, None), (4, 9), (2, None))))
    params = random_params(config)
    answers = generate(params, config, requests(), stop_ids=[STOP], batch_size=3)
    for request, answer in zip(requests(), answers, strict=True):
        assert answer.tokens == greedy(params, config, request)
        assert answer.truncated == (answer.tokens[-1] != STOP)
    assert len({answer.tokens for answer in answers}) == len(answers)


def test_a_view_generates_what_its_cut_child_does():
    config = small_config()
    params = random_params(config)
    blocks = (ChildBlock((1, 3, 4, 6), 3), ChildBlock((0, 2, 5), 6), ChildBlock((0, 1), 5), ChildBlock((2, 4), None))
    child = Child(config, blocks)
    seen = generate(params, config, requests(), stop_ids=[STOP], batch_size=4, view=child.view)
    cut = generate(cut_params(params, child), child.config, requests(), stop_ids=[STOP], batch_size=4)
    assert seen == cut != generate(params, config, requests(), stop_ids=[STOP], batch_size=4)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_do_not_depend_on_order_or_batch_mates(temperature):
    config = small_config()
    params = random_params(config)
    options = dict(stop_ids=[STOP], temperature=temperature, batch_size=3)
    together = generate(params, config, requests(), **options)
    reverse = generate(params, config, requests()[::-1], **options)[::-1]
    alone = [generate(params, config, [request], **options)[0] for request in requests()]
    assert together == reverse == alone


def test_sampling_follows_its_seed():
    config = small_config()
    params = random_params(config)
    prompt = requests()[2].prompt
    twice = [Request(prompt, 20, seed=1), Request(prompt, 20, seed=1), Request(prompt, 20, seed=2)]
    first, second, third = generate(params, config, twice, stop_ids=[STOP], temperature=1.0)
    assert first == second != third


def test_sampled_frequencies_are_the_models_probabilities():
    config = small_config(vocab_size=11)
    params = random_params(config)
    prompt = (1, 2, 4)
    draws = [Request(prompt, 1, seed=i) for i in range(2000)]
    answers = generate(params, config, draws, stop_ids=[STOP], temperature=1.0, batch_size=500)
    counts = np.bincount([answer.tokens[0] for answer in answers], minlength=11) / 2000
    logits = np.asarray(forward(params, config, jnp.asarray([prompt]))[0, -1], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(counts, probabilities, atol=4 * np.sqrt(0.25 / 2000))


def test_limits_cut_and_stops_end():
    config = small_config()
    params = random_params(config)
    prompt = requests()[0].prompt
    (free,) = generate(params, config, [Request(prompt, 9)], stop_ids=[96])
    (one,) = generate(params, config, [Request(prompt, 1)], stop_ids=[96])
    assert len(free.tokens) == 9 and free.truncated
    assert one.tokens == free.tokens[:1] and one.truncated
    (stopped,) = generate(params, config, [Request(prompt, 9)], stop_ids=[free.tokens[4]])
    first = free.tokens.index(free.tokens[4])
    assert stopped.tokens == free.tokens[: first + 1] and not stopped.truncated


@pytest.mark.parametrize(
    "request_,message",
    [
        (Request((), 3), "request 0 has an empty prompt"),
        (Request((1,), 0), "max_tokens 0"),
        (Request((1,) * 500, 13), "needs 500 prompt and 13 new tokens, but the model's context is 512"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    config = small_config()
    with pytest.raises(PuzzleError, match=message):
        generate(random_params(config), config, [request_], stop_ids=[STOP])


def test_nothing_to_stop_on_is_refused_and_nothing_to_do_is_done():
    config = small_config()
    with pytest.raises(PuzzleError, match="stop_ids is empty"):
        generate(random_params(config), config, requests(), stop_ids=[])
    assert generate(random_params(config), config, [], stop_ids=[STOP]) == []
