# pyright: basic, reportMissingImports=false
"""gpt-oss with a different expert count and attention window in every layer, for mlx-lm.

mlx-lm runs this file for the key `model_file` of config.json when remote code is trusted. Layers are mlx-lm's own, each
built with its expert count; masks and caches follow each layer's window. Experts load packed in MXFP4 or in bfloat16.
mlx-lm always rounds YaRN's correction range; where `truncate` is false, as in gpt-oss, the frequencies are put right.
Left out: FP8 caches, whose scales are dropped.
"""

import math
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gpt_oss
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache


@dataclass
class ModelArgs(gpt_oss.ModelArgs):
    block_configs: list | None = None


def yarn_divisors(args):
    """What positions are divided by to give angles, [head_dim / 2]; the correction range is not rounded."""
    scaling, dims, base = args.rope_scaling, args.head_dim, args.rope_theta

    def dimension(rotations):
        ratio = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dims * math.log(ratio) / (2 * math.log(base))

    low, high = max(dimension(scaling["beta_fast"]), 0), min(dimension(scaling["beta_slow"]), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2) - low) / (high - low or 0.001), 0, 1)
    own = base ** (mx.arange(0, dims, 2) / dims)
    return 1 / (ramp / (scaling["factor"] * own) + (1 - ramp) / own)


class GptOssPuzzleModel(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [
            gpt_oss.TransformerBlock(replace(args, num_local_experts=block["num_local_experts"]))
            for block in args.block_configs
        ]
        if not args.rope_scaling.get("truncate", True):
            for layer in self.layers:
                layer.self_attn.rope._freqs = yarn_divisors(args)
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


class Model(gpt_oss.Model):
    def __init__(self, args):
        nn.Module.__init__(self)
        self.args = args
        self.model_type = args.model_type
        self.model = GptOssPuzzleModel(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def sanitize(self, weights):
        prepared = {}
        for name, value in weights.items():
            if name.endswith((".k_scale", ".v_scale")):
                continue
            if name.endswith((".gate_up_proj", ".down_proj")):  # bfloat16 experts are stored [experts, in, out]
                name, value = f"{name}.weight", value.swapaxes(-1, -2)
            prepared[name] = value
        return super().sanitize(prepared)

    def make_cache(self):
        return [KVCache() if window is None else RotatingKVCache(max_size=window) for window in self.model.windows]
