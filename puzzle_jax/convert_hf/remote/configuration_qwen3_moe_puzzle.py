# pyright: basic, reportOptionalIterable=false, reportMissingImports=false
"""Configuration of a Qwen3-MoE model whose layers differ in expert count and attention window."""

import copy

from transformers import Qwen3MoeConfig


class BlockConfig(dict):
    """One layer's {"num_local_experts", "sliding_window"}, as attributes too.

    No experts make the layer dense; a window of None is full attention.
    """

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Qwen3MoePuzzleConfig(Qwen3MoeConfig):
    """`Qwen3MoeConfig` with one block per layer; its own expert count and window are any layer's largest."""

    model_type = "qwen3_moe_puzzle"

    def __init__(self, block_configs=None, per_layer_config=None, **kwargs):
        # per_layer_config says the same for tools that know no block_configs; transformers would take the
        # attributes it names away from the whole, and build no Qwen3-MoE from it.
        super().__init__(**kwargs)
        if block_configs is None:
            block = {"num_local_experts": self.num_experts, "sliding_window": self.sliding_window}
            block_configs = [block] * self.num_hidden_layers
        if len(block_configs) != self.num_hidden_layers:
            raise ValueError(f"{len(block_configs)} block_configs for {self.num_hidden_layers} layers")
        self.block_configs = [BlockConfig(block) for block in block_configs]
        windows = [block.sliding_window for block in self.block_configs]
        widths = [window for window in windows if window is not None]
        # By these three transformers chooses the caches, which Qwen3-MoE otherwise has alike in all layers.
        self.layer_types = ["full_attention" if window is None else "sliding_attention" for window in windows]
        self.use_sliding_window, self.sliding_window = bool(widths), max(widths, default=None)

    def get_qwen3_moe_config_for_layer(self, layer_idx):
        """The configuration that a plain Qwen3-MoE layer is built from."""
        block = self.block_configs[layer_idx]
        config = copy.copy(self)
        config.num_experts = block.num_local_experts
        config.mlp_only_layers, config.decoder_sparse_step = [], 1  # the count alone says which layers are dense
        config.sliding_window = block.sliding_window
        return config
