# pyright: basic, reportMissingImports=false, reportIncompatibleVariableOverride=false, reportArgumentType=false
"""vLLM's own gpt-oss with each layer's expert count and window taken from `block_configs`.

The stock classes build every layer from one configuration and give windows to even layers. Here each sub-block reads
its own entry; weights are loaded layer by layer, because vLLM reshapes and slices experts by one count; and the scales
of an FP8 cache are set after vLLM has reset them to 1. Left out: LoRA on experts, redundant experts (EPLB), and
checkpoints of other quantisations.
"""

import copy
import re
from itertools import groupby

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.gpt_oss import (
    GptOssForCausalLM,
    GptOssModel,
    MLPBlock,
    OAIAttention,
    TransformerBlock,
)
from vllm.model_executor.models.utils import maybe_prefix

from puzzle_jax.serve_vllm.kv_scales import KVScales

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def with_experts(config, num_experts):
    """A copy of a configuration with one expert count."""
    config = copy.copy(config)
    config.num_local_experts = num_experts
    return config


def layer_of(name):
    """The index of a weight's layer, None outside the layers."""
    match = re.search(r"layers\.(\d+)\.", name)
    return None if match is None else int(match[1])


def unpack_mxfp4(blocks, scales):
    """Packed experts [experts, out, in / 32, 16] and [experts, out, in / 32] as bfloat16 [experts, in, out]."""
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=torch.float32)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    exponents = scales.to(torch.int32).unsqueeze(-1) - 127
    return torch.ldexp(values[codes.int()], exponents).flatten(-2).transpose(1, 2).to(torch.bfloat16)


def unpacked(weights):
    """Weights with packed experts replaced by bfloat16 ones; blocks and scales may come in either order."""
    waiting = {}
    for name, weight in weights:
        stem, _, part = name.rpartition("_")
        if part not in ("blocks", "scales") or ".experts." not in name:
            yield name, weight
            continue
        pair = waiting.setdefault(stem, {})
        pair[part] = weight
        if len(pair) == 2:
            yield stem, unpack_mxfp4(**waiting.pop(stem))


class PuzzleAttention(OAIAttention):
    """Attention with the layer's own window."""

    def _build_attention(self, config, cache_config, quant_config, prefix):
        return Attention(
            self.num_local_attention_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_local_key_value_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.block_configs[self.layer_idx]["sliding_window"],
            prefix=f"{prefix}.attn",
            sinks=self.sinks,
        )


class PuzzleMLP(MLPBlock):
    """Experts with the layer's own count."""

    def __init__(self, vllm_config, layer_idx, prefix=""):
        config = vllm_config.model_config.hf_config
        vllm_config, model_config = copy.copy(vllm_config), copy.copy(vllm_config.model_config)
        model_config.hf_config = with_experts(config, config.block_configs[layer_idx]["num_local_experts"])
        vllm_config.model_config = model_config
        super().__init__(vllm_config, layer_idx, prefix)


class PuzzleBlock(TransformerBlock):
    attention_cls = PuzzleAttention
    mlp_cls = PuzzleMLP


class PuzzleModel(GptOssModel):
    block_cls = PuzzleBlock

    def load_weights(self, weights):
        whole, loaded = self.config, set()
        try:
            for layer, group in groupby(weights, key=lambda item: layer_of(item[0])):
                if layer is not None:
                    self.config = with_experts(whole, whole.block_configs[layer]["num_local_experts"])
                loaded |= super().load_weights(group)
        finally:
            self.config = whole
        return loaded


class GptOssPuzzleForCausalLM(KVScales, GptOssForCausalLM):
    def __init__(self, vllm_config, prefix=""):
        torch.nn.Module.__init__(self)  # the stock class would build the stock model
        self.vllm_config = vllm_config
        self.config = vllm_config.model_config.hf_config
        self.model = PuzzleModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.kv_scales = {}

    def attention_of(self, layer):
        return layer.attn.attn

    def load_weights(self, weights):
        if getattr(self.config, "quantization_config", None) is None:
            weights = unpacked(weights)
        return super().load_weights(self.without_kv_scales(weights))
