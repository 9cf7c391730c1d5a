# pyright: basic, reportMissingImports=false
"""Scales of an FP8 cache, which a child's checkpoint carries per layer, set after vLLM has reset them to 1."""

import re
from typing import Any

from vllm.platforms import current_platform

KV_SCALE = re.compile(r"model\.layers\.(\d+)\.self_attn\.([kv])_scale")
FP8_CACHES = ("fp8", "fp8_e4m3")


class KVScales:
    """For a causal model of vLLM; the model sets `kv_scales` to {} before it loads, and says where attention is."""

    kv_scales: dict
    model: Any

    def attention_of(self, layer):
        """vLLM's `Attention` of a layer."""
        raise NotImplementedError

    def without_kv_scales(self, weights):
        """The weights that vLLM loads; the cache's scales are kept for later."""
        for name, weight in weights:
            match = KV_SCALE.fullmatch(name)
            if match is None:
                yield name, weight
            else:
                self.kv_scales[int(match[1]), match[2]] = float(weight)

    def process_weights_after_loading(self):
        """Sets the cache's scales where the cache is FP8; vLLM calls this last."""
        number = 2.0 if current_platform.is_fp8_fnuz() else 1.0  # that type's numbers are half as large
        for (layer, kind), scale in self.kv_scales.items():
            if not self.model.start_layer <= layer < self.model.end_layer:
                continue
            attention = self.attention_of(self.model.layers[layer])
            if attention.kv_cache_dtype in FP8_CACHES:
                getattr(attention, f"_{kind}_scale").fill_(scale * number)
                getattr(attention, f"_{kind}_scale_cpu").fill_(scale * number)
                setattr(attention, f"_{kind}_scale_float", scale * number)
