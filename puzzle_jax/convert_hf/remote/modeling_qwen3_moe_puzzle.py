# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOptionalSubscript=false, reportArgumentType=false, reportMissingImports=false, reportAssignmentType=false
"""Qwen3-MoE with a different expert count and attention window in every layer, on transformers' own classes.

Layers are transformers' decoder layers, each built from its own configuration; one without experts is dense. What
differs is the masks: one per distinct window, all made before the first layer runs, because a mask's size depends on
how full the cache is. Caches of windowed layers all have the largest window's size; the masks narrow them.
"""

import inspect

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)

from .configuration_qwen3_moe_puzzle import Qwen3MoePuzzleConfig

try:
    from transformers import conversion_mapping
except ImportError:  # transformers 4 keeps experts apart, as they are stored
    pass
else:  # transformers 5 stacks a layer's experts, however many it finds, but in other people's classes only if told
    stacking = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    conversion_mapping.register_checkpoint_conversion_mapping(Qwen3MoePuzzleConfig.model_type, stacking, overwrite=True)

# What forward passes call the cache of keys and values; releases of transformers differ in it.
CACHE = "cache" if "cache" in inspect.signature(Qwen3MoeModel.forward).parameters else "past_key_values"


def create_masks(config, inputs_embeds, attention_mask, cache, position_ids=None):
    """Attention masks by the name of their window."""
    masks = {}
    for layer_idx, block in enumerate(config.block_configs):
        if mask_name(block.sliding_window) in masks:
            continue
        create = create_causal_mask if block.sliding_window is None else create_sliding_window_causal_mask
        inputs = {
            "config": config.get_qwen3_moe_config_for_layer(layer_idx),
            "attention_mask": attention_mask,
            "position_ids": position_ids,  # by which packed sequences are told apart
            CACHE: cache,
        }
        accepted = inspect.signature(create).parameters  # releases of transformers differ in these two
        inputs["inputs_embeds" if "inputs_embeds" in accepted else "input_embeds"] = inputs_embeds
        if "cache_position" in accepted:
            seen = 0 if cache is None else cache.get_seq_length()
            inputs["cache_position"] = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
        masks[mask_name(block.sliding_window)] = create(**inputs)
    return masks


def mask_name(window):
    return "full" if window is None else f"window_{window}"


class Qwen3MoePuzzleDecoderLayer(Qwen3MoeDecoderLayer):
    """A decoder layer that takes all masks and uses its own."""

    def __init__(self, config, layer_idx):
        super().__init__(config.get_qwen3_moe_config_for_layer(layer_idx), layer_idx)
        self.self_attn.config = config  # from here on it says how attention is computed

    def forward(self, hidden_states, attention_mask=None, masks=None, **kwargs):
        return super().forward(hidden_states, attention_mask=masks[mask_name(self.self_attn.sliding_window)], **kwargs)


class Qwen3MoePuzzlePreTrainedModel(Qwen3MoePreTrainedModel):
    config_class = Qwen3MoePuzzleConfig
    _no_split_modules = ("Qwen3MoePuzzleDecoderLayer",)
    # Of an FP8 cache, which is not used here; early releases of transformers 5 want a list.
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.[kv]_scale$"]  # noqa: RUF012

    @classmethod
    def _can_set_experts_implementation(cls):
        """As for the stock model, whose experts these are; transformers would look for a decorator in this file."""
        return Qwen3MoePreTrainedModel._can_set_experts_implementation()

    def set_experts_implementation(self, *args, **kwargs):
        super().set_experts_implementation(*args, **kwargs)
        for layer in self.modules():
            experts = getattr(layer.mlp, "experts", None) if isinstance(layer, Qwen3MoePuzzleDecoderLayer) else None
            if experts is not None:
                experts.config._experts_implementation = self.config._experts_implementation


class Qwen3MoePuzzleModel(Qwen3MoePuzzlePreTrainedModel, Qwen3MoeModel):
    def __init__(self, config):
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(Qwen3MoePuzzleDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)
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
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_masks(self.config, inputs_embeds, attention_mask, cache, position_ids)
        # The base class would make one mask for all layers, but hands on what has four dimensions already.
        return super().forward(
            attention_mask=inputs_embeds.new_zeros(1, 1, 1, 1),
            masks=masks,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )


class Qwen3MoePuzzleForCausalLM(Qwen3MoePuzzlePreTrainedModel, Qwen3MoeForCausalLM, GenerationMixin):
    def __init__(self, config):
        Qwen3MoePreTrainedModel.__init__(self, config)
        self.model = Qwen3MoePuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config,
        attention_mask,
        past_key_values=None,
        inputs_embeds=None,
        input_embeds=None,
        cache=None,
        position_ids=None,
        **kwargs,
    ):
        """The masks that generate() prepares in advance for caches of fixed size."""
        embeds = input_embeds if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        return create_masks(config, embeds, attention_mask, cache, position_ids)
