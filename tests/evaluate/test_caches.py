"""Three caches side by side on a small random model with the embedded parent's tokenizer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.evaluate.__main__ import main
from puzzle_jax.evaluate.accuracy import QuestionSet
from puzzle_jax.evaluate.caches import CALIBRATED, REFERENCE, UNCALIBRATED, amplify, compare_caches
from puzzle_jax.tasks.chat.embedded import embedded_chat, write_chat_files
from tests.convert_hf.checkpoints import write_random
from tests.support import model_logits, random_params, random_tokens, small_config

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(7, None)), vocab_size=128)


def test_amplified_keys_and_values_leave_the_function_alone():
    params = random_params(CONFIG)
    large = amplify(params, 9)
    np.testing.assert_array_equal(
        large["layers"][1]["attention"]["k_bias"], params["layers"][1]["attention"]["k_bias"] * 512
    )
    tokens = random_tokens(CONFIG, 2, 19)
    np.testing.assert_allclose(model_logits(large, CONFIG, tokens), model_logits(params, CONFIG, tokens), atol=2e-5)


@pytest.mark.slow
def test_calibrated_scales_keep_what_an_overflowing_cache_loses():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), amplify(random_params(CONFIG), 12))
    results, scales = compare_caches(
        params,
        CONFIG,
        embedded_chat(),
        calibration=QuestionSet(("chain",), ("low",), 3, "calibration"),
        questions=QuestionSet(("chain", "add"), ("low", "high"), 2, "evaluation"),
        max_tokens={"low": 5, "high": 7},
        slots=4,
    )
    assert list(results) == [REFERENCE, CALIBRATED, UNCALIBRATED]
    assert results[REFERENCE].kl == 0 and results[REFERENCE].agreement == pytest.approx(1)
    assert 0 < results[CALIBRATED].kl < results[UNCALIBRATED].kl / 5
    assert scales.k.shape == scales.v.shape == (2,) and float(scales.k.min()) > 1
    for result in results.values():
        assert set(result.accuracy) == set(result.change) == {"low", "high"}


def test_what_cannot_be_asked_is_one_sentence_and_writes_nothing(tmp_path, capsys):
    directory = write_random(tmp_path / "model", CONFIG, "bf16")
    write_chat_files(directory)
    out = tmp_path / "out"
    for arguments, message in (
        (["--tasks", "sums"], "sums"),
        (["--efforts", "none"], "effort is 'none'"),
        (["--model", str(tmp_path / "no")], "is not a directory"),
    ):
        assert main(["caches", "--model", str(directory), "--out", str(out), *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not out.exists()
    out.write_text(json.dumps({}))
    assert main(["caches", "--model", str(directory), "--out", str(out)]) == 2
    assert "which is a file" in capsys.readouterr().err
