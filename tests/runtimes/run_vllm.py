"""Answers of vLLM in float32 on a CPU. Runs in an environment that has vLLM and the plugin.

python run_vllm.py CHECKPOINT QUESTION.json ANSWER.npz
"""

import json
import os
import sys
from pathlib import Path

# A single process, so that the loaded model can be inspected, and a small cache.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import numpy as np
from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]


def dense(row: dict, vocab: int) -> list[float]:
    return [row[token].logprob for token in range(vocab)]


def kv_scales(model) -> list[list[float]]:
    """Per layer, the scales that attention would use with an FP8 cache (which this CPU may not run)."""
    if not hasattr(model, "kv_scales"):
        return []
    attentions = [model.attention_of(layer) for layer in model.model.layers]
    for attention in attentions:
        attention.kv_cache_dtype = "fp8"
    model.process_weights_after_loading()
    return [[attention._k_scale_float, attention._v_scale_float] for attention in attentions]


def main(checkpoint: str, question: str, answer: str) -> None:
    asked = json.loads(Path(question).read_text())
    vocab = asked["vocab"]
    llm = LLM(
        model=checkpoint,
        dtype="float32",
        max_model_len=asked["context"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_logprobs=vocab,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,
    )
    whole = SamplingParams(temperature=0, max_tokens=1, logprobs=vocab, prompt_logprobs=vocab, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in asked["tokens"]], whole)
    # A token's row holds the logits of the position before it.
    logits = [
        [dense(row, vocab) for row in [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]]
        for output in outputs
    ]
    longer = SamplingParams(temperature=0, max_tokens=asked["steps"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row} for row in asked["prompts"]], longer)
    greedy = [list(output.outputs[0].token_ids) for output in outputs]
    found = {"kv_scales": llm.apply_model(kv_scales)[0], "model_type": llm.model_config.hf_config.model_type}
    np.savez(answer, logits=logits, greedy=greedy, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
