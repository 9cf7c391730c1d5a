# pyright: basic, reportMissingImports=false, reportIncompatibleVariableOverride=false, reportArgumentType=false
"""vLLM's own Qwen3-MoE with each layer's expert count and window taken from `block_configs`.

The stock decoder layer reads the counts and the window that it is given; here each gets a configuration of its own.
Experts are loaded by the layer that holds them, so that nothing else differs. Left out: redundant experts (EPLB), and
quantised checkpoints.
"""

import copy

import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeForCausalLM, Qwen3MoeModel
from vllm.model_executor.models.utils import extract_layer_index, maybe_prefix

from puzzle_jax.serve_vllm.kv_scales import KVScales


def for_block(vllm_config, block):
    """A copy of vLLM's configuration in which all layers are like this one."""
    vllm_config, model_config = copy.copy(vllm_config), copy.copy(vllm_config.model_config)
    config, cache_config = copy.copy(model_config.hf_text_config), copy.copy(vllm_config.cache_config)
    config.num_experts = block["num_local_experts"]
    config.mlp_only_layers, config.decoder_sparse_step = [], 1  # the count alone says which layers are dense
    cache_config.sliding_window = block["sliding_window"]  # attention reads a model's window here
    model_config.hf_text_config = config
    vllm_config.model_config, vllm_config.cache_config = model_config, cache_config
    return vllm_config


class PuzzleDecoderLayer(Qwen3MoeDecoderLayer):
    def __init__(self, vllm_config, prefix=""):
        blocks = vllm_config.model_config.hf_text_config.block_configs
        super().__init__(for_block(vllm_config, blocks[extract_layer_index(prefix)]), prefix)


class Qwen3MoePuzzleForCausalLM(KVScales, Qwen3MoeForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        torch.nn.Module.__init__(self)  # the stock class would build the stock model
        self.config = config = vllm_config.model_config.hf_text_config
        self.quant_config = vllm_config.quant_config
        self.model = Qwen3MoeModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), decoder_layer_type=PuzzleDecoderLayer
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.kv_scales = {}

    def attention_of(self, layer):
        return layer.self_attn.attn

    def load_weights(self, weights):
        return super().load_weights(self.without_kv_scales(weights))
