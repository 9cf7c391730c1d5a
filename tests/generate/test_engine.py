from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig, cache_bytes
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.generate import Engine, Request, Sampling, generate, slots
from puzzle_jax.generate.sampling import sample
from puzzle_jax.kernels.platform import lowering_for
from puzzle_jax.model import cache_format
from puzzle_jax.model.cache_format import FLOAT8, CacheFormat, KVScales
from puzzle_jax.model.child import Child, ChildBlock, cut_params
from puzzle_jax.model.network import forward, hidden_states
from puzzle_jax.model.sharding import make_mesh, shard_params
from puzzle_jax.temperature import LEAST_TEMPERATURE
from tests.support import jitted, present, random_params, small_config

STOP = 3
MIXED = (BlockConfig(7, 5), BlockConfig(3, None), BlockConfig(4, 9))
CONFIG = small_config((BlockConfig(7, 5), BlockConfig(7, None)))
PARAMS = random_params(CONFIG)
FLOAT8_CACHE = CacheFormat(FLOAT8, KVScales(jnp.asarray([0.01, 0.02, 0.03]), jnp.asarray([0.04, 0.02, 0.03])))


def compiled_programs():
    return [jitted(program) for program in (slots.prefill, slots.admit, slots.decode)]


def requests(count=7, longest=70):
    """Requests with prompts from 9 tokens to more than one chunk (64)."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(9, longest, count).astype(int)
    return [Request(tuple(rng.integers(0, 97, n).tolist()), 5 + 6 * i, seed=i) for i, n in enumerate(lengths)]


_uncached = jax.jit(forward, static_argnames="config")


def likeliest(params, config, request, tokens, cache=None):
    """The likeliest tokens after the prompt and after each of `tokens` but the last, without a cache."""
    ids = (*request.prompt, *tokens)
    row = np.zeros((1, 128), np.int32)
    row[0, : len(ids)] = ids
    logits = np.asarray(_uncached(params, config=config, tokens=jnp.asarray(row), cache=cache))
    return tuple(logits[0, len(request.prompt) - 1 : len(ids) - 1].argmax(-1).tolist())


@pytest.mark.parametrize("cache,rounded", [(None, 0), (FLOAT8_CACHE, 0), (FLOAT8_CACHE, 9)])
def test_chunked_cached_batched_tokens_equal_the_uncached_pass_for_a_heterogeneous_model(cache, rounded, monkeypatch):
    monkeypatch.setattr(cache_format, "ROUNDED", rounded)
    config = small_config(MIXED)
    params = random_params(config)
    answers = generate(params, config, requests(), stop_ids=[STOP], slots=3, cache=cache)
    for request, answer in zip(requests(), answers, strict=True):
        assert answer.tokens == likeliest(params, config, request, answer.tokens, cache)
        assert STOP not in answer.tokens[:-1] and len(answer.tokens) <= request.max_tokens
        assert answer.tokens[-1] == STOP or len(answer.tokens) == request.max_tokens
        assert answer.truncated == (answer.tokens[-1] != STOP)
    assert len({answer.tokens for answer in answers}) == len(answers)


def test_bfloat16_tokens_are_the_likeliest_of_the_uncached_pass_up_to_rounding():
    config = small_config(MIXED)
    params = random_params(config, dtype=jnp.bfloat16)
    answers = generate(params, config, requests(), stop_ids=(), slots=3)
    behind = []
    for request, answer in zip(requests(), answers, strict=True):
        ids = request.prompt + answer.tokens
        row = np.zeros((1, 128), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(_uncached(params, config=config, tokens=jnp.asarray(row)))[0]
        for index, token in enumerate(answer.tokens, start=len(request.prompt) - 1):
            behind.append(float(logits[index].max() - logits[index, token]))
    assert len(behind) == sum(request.max_tokens for request in requests())
    assert np.mean(np.asarray(behind) == 0) > 0.9 and np.quantile(behind, 0.97) < 0.15


def test_every_program_is_compiled_once():
    """With parameters committed to a device, as a checkpoint's are, states are committed there from the start."""
    loaded, programs = jax.device_put(PARAMS, jax.devices()[0]), compiled_programs()
    for program in programs:
        program.clear_cache()
    generate(loaded, CONFIG, requests(), stop_ids=(), slots=2)
    assert [program._cache_size() for program in programs] == [1, 1, 1]


def test_a_view_generates_what_its_cut_child_does():
    blocks = (ChildBlock((1, 3, 4, 6), 3), ChildBlock((0, 2, 5), 6))
    child = Child(CONFIG, blocks)
    seen = generate(PARAMS, CONFIG, requests(), stop_ids=[STOP], slots=4, view=child.view)
    cut = generate(cut_params(PARAMS, child), child.config, requests(), stop_ids=[STOP], slots=4)
    assert seen == cut != generate(PARAMS, CONFIG, requests(), stop_ids=[STOP], slots=4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.8}], ids=["greedy", "sampled"])
def test_answers_are_the_same_bits_whatever_the_order_and_the_batch_mates(options):
    run = partial(generate, PARAMS, CONFIG, stop_ids=[STOP], slots=3, log_probs=True, **options)
    together = run(requests())
    reverse = run(requests()[::-1])[::-1]
    alone = [run([request])[0] for request in requests()]
    strangers = [Request((5,) * 40, 3), Request((1, 2), 33), Request((7,) * 66, 1)]
    crowd = run([*strangers, *requests(), *strangers])[3:-3]
    assert together == reverse == alone == crowd  # log-probabilities included, bit-identical
    assert all(len(present(answer.log_probs)) == len(answer.tokens) for answer in together)


def test_log_probabilities_and_experts_are_those_of_the_uncached_pass():
    config = small_config(MIXED)
    params = random_params(config)
    answers = generate(
        params, config, requests(), stop_ids=[STOP], slots=3, temperature=1.3, log_probs=True, experts=True
    )
    whole = jax.jit(hidden_states, static_argnames="config")
    for request, answer in zip(requests(), answers, strict=True):
        ids = request.prompt + answer.tokens
        row = np.zeros((1, 128), np.int32)
        row[0, : len(ids)] = ids
        row = jnp.asarray(row)
        logits = np.asarray(_uncached(params, config=config, tokens=row)[0], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = log_probs[np.arange(len(request.prompt) - 1, len(ids) - 1), answer.tokens]
        np.testing.assert_allclose(present(answer.log_probs), expected, atol=3e-5)
        _, auxes = whole(params, config=config, tokens=row)
        assert answer.experts is not None
        assert answer.experts.dtype == np.uint8 and answer.experts.shape == (len(ids) - 1, 3, 2)
        for layer, aux in enumerate(auxes):
            np.testing.assert_array_equal(answer.experts[:, layer], np.asarray(aux.routing.ids)[: len(ids) - 1])


@pytest.mark.parametrize("data,model", [(2, 3), (4, 1), (1, 7)])
def test_a_mesh_gives_the_same_tokens(data, model):
    mesh = make_mesh(data, model)
    sharded = shard_params(PARAMS, CONFIG, mesh)
    apart = generate(sharded, CONFIG, requests(), stop_ids=[STOP], slots=4, mesh=mesh)
    assert apart == generate(PARAMS, CONFIG, requests(), stop_ids=[STOP], slots=4)


def test_sampling_follows_its_seed():
    prompt = requests()[2].prompt
    twice = [Request(prompt, 20, seed=1), Request(prompt, 20, seed=1), Request(prompt, 20, seed=2)]
    first, second, third = generate(PARAMS, CONFIG, twice, stop_ids=[STOP], temperature=1.0, slots=3)
    assert first == second != third


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_sampled_frequencies_are_the_models_probabilities(top_p):
    config = small_config(CONFIG.blocks, vocab_size=11)
    params = random_params(config)
    prompt = (1, 2, 4)
    draws = [Request(prompt, 1, seed=i) for i in range(2000)]
    answers = generate(params, config, draws, stop_ids=[STOP], temperature=0.7, top_p=top_p, slots=500)
    counts = np.bincount([answer.tokens[0] for answer in answers], minlength=11) / 2000
    logits = np.asarray(_uncached(params, config=config, tokens=jnp.asarray([prompt]))[0, -1], np.float64) / 0.7
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probabilities)
    kept = order[: np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1]
    expected = np.zeros(11)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert (len(kept) < 11) == (top_p < 1)
    np.testing.assert_allclose(counts, expected, atol=4 * np.sqrt(0.25 / 2000))
    assert not counts[expected == 0].any()


def test_limits_cut_and_stops_end():
    prompt = requests()[0].prompt
    free, one = generate(PARAMS, CONFIG, [Request(prompt, 9), Request(prompt, 1)], stop_ids=[], slots=3)
    assert len(free.tokens) == 9 and free.truncated
    assert one.tokens == free.tokens[:1] and one.truncated
    (stopped,) = generate(PARAMS, CONFIG, [Request(prompt, 9)], stop_ids=[free.tokens[4]], slots=3)
    first = free.tokens.index(free.tokens[4])
    assert stopped.tokens == free.tokens[: first + 1] and not stopped.truncated


def test_a_stream_tells_every_token_once_and_ends_with_the_completion():
    engine = Engine(PARAMS, CONFIG, stop_ids=[STOP], context=128, slots=4)
    told: dict[int, tuple[int, ...]] = {}
    finished = {}
    for event in engine.stream(requests(5), burst=3):
        assert event.index not in finished and (len(event.tokens) <= 3 or event.finished)
        told[event.index] = told.get(event.index, ()) + event.tokens
        if event.finished:
            finished[event.index] = event.finished
    assert [finished[i] for i in range(5)] == engine.generate(requests(5))
    assert all(told[i] == finished[i].tokens for i in range(5))


def test_who_ends_is_told_before_all_have_ended():
    seen = []
    answers = generate(
        PARAMS, CONFIG, requests(), stop_ids=(), slots=2, on_finish=lambda index, answer: seen.append((index, answer))
    )
    assert sorted(index for index, _ in seen) == list(range(7)) and all(answers[i] == a for i, a in seen)


@pytest.mark.parametrize("form,size", [(CacheFormat(), 4), (CacheFormat("bfloat16"), 2), (FLOAT8_CACHE, 1)])
def test_cache_bytes_held_are_the_formula(form, size, monkeypatch):
    monkeypatch.setattr(cache_format, "ROUNDED", 0)
    engine = Engine(PARAMS, CONFIG, stop_ids=(), context=192, slots=5, cache=form)
    assert engine.cache_bytes() == 5 * cache_bytes(CONFIG, 192, size) == 5 * size * 60 * (5 + 192)
    assert form.cache_bytes(CONFIG, 192, jnp.float32) == cache_bytes(CONFIG, 192, size)
    longer = Engine(PARAMS, small_config((BlockConfig(7, 5),) * 2), stop_ids=(), context=512, slots=5, cache=form)
    assert longer.cache_bytes() == 5 * size * 60 * 2 * 5  # with windows only, the context does not matter


def test_a_small_float8_cache_on_a_cpu_is_of_rounded_numbers_and_its_bytes_are_counted(monkeypatch):
    monkeypatch.setattr(cache_format, "ROUNDED", 191)
    engine = Engine(PARAMS, CONFIG, stop_ids=(), context=192, slots=5, cache=FLOAT8_CACHE)
    assert engine.cache_bytes() == 5 * FLOAT8_CACHE.cache_bytes(CONFIG, 192, jnp.float32) == 5 * 60 * (4 * 5 + 192)
    assert FLOAT8_CACHE.cache_bytes(CONFIG, 192, jnp.bfloat16) == 60 * (2 * 5 + 192)
    with lowering_for("gpu"):
        assert FLOAT8_CACHE.cache_bytes(CONFIG, 192, jnp.bfloat16) == 60 * (5 + 192)


@pytest.mark.parametrize(
    "request_,message",
    [
        (Request((), 3), "request 0 has an empty prompt"),
        (Request((1,), 0), "max_tokens 0"),
        (
            Request((1,) * 500, 13),
            "the prompt takes 500 tokens and the answer up to 13, but the context of the model is 512",
        ),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    with pytest.raises(PuzzleError, match=message):
        generate(PARAMS, CONFIG, [request_], stop_ids=[STOP])


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Sampling(temperature=-0.1), "temperature is -0.1, but must be a finite number of at least 0"),
        (lambda: Sampling(temperature=1e300), "temperature is 1e.300, but must be at most 1e.06"),
        (lambda: Sampling(top_p=0.0), "top_p is 0.0, but must be above 0 and at most 1"),
        (lambda: CacheFormat("int8"), "cache dtype is 'int8', but must be one of compute"),
        (lambda: CacheFormat("bfloat16", FLOAT8_CACHE.scales), "scales were given for dtype bfloat16"),
        (lambda: Engine(PARAMS, CONFIG, stop_ids=(), context=64, slots=0), "slots is 0"),
        (
            lambda: Engine(PARAMS, CONFIG, stop_ids=(), context=513),
            "context is 513, but must be from 1 to the model's 512",
        ),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises((ConfigError, PuzzleError), match=message):
        make()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-38, 1e-30])
def test_temperatures_that_float32_cannot_divide_by_are_greedy(temperature):
    assert Sampling(temperature) == Sampling(0.0)


@pytest.mark.parametrize("sampling", [Sampling(LEAST_TEMPERATURE), Sampling(1e6, 1e-300), Sampling(1.0, 5e-324)])
def test_the_least_numbers_draw_the_likeliest_token(sampling):
    logits = jnp.array([[0.0, -1e4, 1e4, 9999.0], [-jnp.inf, 3.0, 2.0, -5.0]])
    drawn = sample(logits, jnp.arange(2), jnp.zeros(2, jnp.int32), sampling.temperature, sampling.top_p)
    assert drawn.tolist() == [2, 1]


def test_nothing_to_do_is_done():
    assert generate(PARAMS, CONFIG, [], stop_ids=[STOP]) == []


def test_programs_have_one_shape_for_all_requests_of_a_context():
    programs = compiled_programs()
    run = partial(generate, PARAMS, CONFIG, stop_ids=[STOP], slots=3)
    run(requests(2))
    before = [program._cache_size() for program in programs]
    run(requests(5, longest=100))
    run(requests(2), temperature=0.7)
    assert before == [program._cache_size() for program in programs]
