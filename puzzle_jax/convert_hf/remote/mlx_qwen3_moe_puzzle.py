# pyright: basic, reportMissingImports=false
"""Qwen3-MoE with a different expert count and attention window in every layer, for mlx-lm.

mlx-lm runs this file for the key `model_file` of config.json when remote code is trusted. Layers are mlx-lm's own, each
built with its expert count; one without experts is dense. Masks and caches follow each layer's window. mlx-lm's
Qwen3-MoE ignores `rope_scaling`; here it is honoured, with YaRN's correction range rounded, as transformers does by
default. Left out: models that are split over devices by layers, and FP8 caches, whose scales are dropped.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_moe
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import initialize_rope


@dataclass
class ModelArgs(qwen3_moe.ModelArgs):
    block_configs: list | None = None

    def for_layer(self, layer):
        """The arguments that a plain Qwen3-MoE layer is built from."""
        assert self.block_configs is not None
        count = self.block_configs[layer]["num_local_experts"]
        # The count alone says which layers are dense.
        return replace(self, num_experts=count, mlp_only_layers=[], decoder_sparse_step=1)


class Qwen3MoePuzzleModel(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [
            qwen3_moe.Qwen3MoeDecoderLayer(args.for_layer(layer), layer) for layer in range(args.num_hidden_layers)
        ]
        if args.rope_scaling:
            for layer in self.layers:
                layer.self_attn.rope = initialize_rope(
                    args.head_dim, args.rope_theta, False, args.rope_scaling, args.max_position_embeddings
                )
        self.norm = nn.RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.windows = tuple(block["sliding_window"] for block in args.block_configs)

    def __call__(self, inputs, cache=None, input_embeddings=None):
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        cache = [None] * len(self.layers) if cache is None else cache
        masks = {}  # one per distinct window, all made before the first layer fills its cache
        for window, layer_cache in zip(self.windows, cache, strict=True):
            if window not in masks:
                masks[window] = create_attention_mask(x, layer_cache, window_size=window)
        for layer, window, layer_cache in zip(self.layers, self.windows, cache, strict=True):
            x = layer(x, masks[window], layer_cache)
        return self.norm(x)


class Model(qwen3_moe.Model):
    def __init__(self, args):
        nn.Module.__init__(self)
        self.args = args
        self.model_type = args.model_type
        self.model = Qwen3MoePuzzleModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def sanitize(self, weights):
        """Stacks each layer's experts; those that mlx-lm has saved are stacked already."""
        prepared = {name: value for name, value in weights.items() if not name.endswith((".k_scale", ".v_scale"))}
        if self.args.tie_word_embeddings:
            prepared.pop("lm_head.weight", None)
        for layer, block in enumerate(self.args.block_configs):
            mlp = f"model.layers.{layer}.mlp"
            for kind in ("gate_proj", "up_proj", "down_proj"):
                names = [f"{mlp}.experts.{expert}.{kind}.weight" for expert in range(block["num_local_experts"])]
                if names and names[0] in prepared:
                    prepared[f"{mlp}.switch_mlp.{kind}.weight"] = mx.stack([prepared.pop(name) for name in names])
        return prepared

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        return [KVCache() if window is None else RotatingKVCache(max_size=window) for window in self.model.windows]
