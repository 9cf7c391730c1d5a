# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOptionalSubscript=false, reportArgumentType=false, reportMissingImports=false, reportAssignmentType=false
"""gpt-oss with a different expert count and attention window in every layer, on transformers' own classes.

Layers are transformers' decoder layers, each built from its own configuration. What differs is the masks: one
per distinct window, all made before the first layer runs, because a mask's size depends on how full the cache
is. Caches of windowed layers all have the largest window's size; the masks narrow them.
"""

import inspect

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssForCausalLM,
    GptOssModel,
    GptOssPreTrainedModel,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
)

from .configuration_gpt_oss_puzzle import GptOssPuzzleConfig

# What forward passes call the cache of keys and values; releases of transformers 5 differ in it.
CACHE = "cache" if "cache" in inspect.signature(GptOssModel.forward).parameters else "past_key_values"


def create_masks(config, inputs_embeds, attention_mask, cache):
    """Attention masks by the name of their window."""
    masks = {}
    for layer_idx, block in enumerate(config.block_configs):
        if mask_name(block.sliding_window) in masks:
            continue
        create = create_causal_mask if block.sliding_window is None else create_sliding_window_causal_mask
        inputs = {
            "config": config.get_gpt_oss_config_for_layer(layer_idx),
            "attention_mask": attention_mask,
            CACHE: cache,
        }
        accepted = inspect.signature(create).parameters  # releases of transformers 5 differ in these two
        inputs["inputs_embeds" if "inputs_embeds" in accepted else "input_embeds"] = inputs_embeds
        if "cache_position" in accepted:
            seen = 0 if cache is None else cache.get_seq_length()
            inputs["cache_position"] = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        masks[mask_name(block.sliding_window)] = create(**inputs)
    return masks


def mask_name(window):
    return "full" if window is None else f"window_{window}"


class GptOssPuzzleDecoderLayer(GptOssDecoderLayer):
    """A decoder layer that takes all masks and uses its own."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        mask = attention_mask[mask_name(self.self_attn.sliding_window)]
        return super().forward(hidden_states, attention_mask=mask, **kwargs)


class GptOssPuzzlePreTrainedModel(GptOssPreTrainedModel):
    config_class = GptOssPuzzleConfig
    _no_split_modules = ("GptOssPuzzleDecoderLayer",)
    # Of an FP8 cache, which is not used here; early releases of transformers 5 want a list.
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.[kv]_scale$"]  # noqa: RUF012


class GptOssPuzzleModel(GptOssPuzzlePreTrainedModel, GptOssModel):
    def __init__(self, config):
        GptOssPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            GptOssPuzzleDecoderLayer(config.get_gpt_oss_config_for_layer(layer_idx), layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = GptOssRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if not isinstance(attention_mask, dict):
            attention_mask = create_masks(self.config, inputs_embeds, attention_mask, cache)
        # The base class hands every layer the mask of its type; each layer here picks its own among all of
        # them.
        return super().forward(
            attention_mask={kind: attention_mask for kind in set(self.config.layer_types)},
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )


class GptOssPuzzleForCausalLM(GptOssPuzzlePreTrainedModel, GptOssForCausalLM, GenerationMixin):
    def __init__(self, config):
        GptOssPreTrainedModel.__init__(self, config)
        self.model = GptOssPuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config, attention_mask, past_key_values=None, inputs_embeds=None, input_embeds=None, cache=None, **kwargs
    ):
        """The masks that generate() prepares in advance for caches of fixed size."""
        embeds = input_embeds if inputs_embeds is None else inputs_embeds
        return create_masks(config, embeds, attention_mask, past_key_values if cache is None else cache)
