# pyright: basic, reportOptionalIterable=false, reportMissingImports=false
"""Configuration of a gpt-oss model whose layers differ in expert count and attention window."""

import copy

from transformers import GptOssConfig


class BlockConfig(dict):
    """One layer's {"num_local_experts", "sliding_window"}, as attributes too; None is full attention."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class GptOssPuzzleConfig(GptOssConfig):
    """`GptOssConfig` with one block per layer; its own expert count and window are any layer's largest."""

    model_type = "gpt_oss_puzzle"

    def __init__(self, block_configs=None, per_layer_config=None, **kwargs):
        # per_layer_config says the same for tools that know no block_configs; transformers would take the
        # attributes it names away from the whole, and build no gpt-oss from it.
        super().__init__(**kwargs)
        if block_configs is None:
            windows = [self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types]
            block_configs = [{"num_local_experts": self.num_local_experts, "sliding_window": w} for w in windows]
        if len(block_configs) != self.num_hidden_layers:
            raise ValueError(f"{len(block_configs)} block_configs for {self.num_hidden_layers} layers")
        self.block_configs = [BlockConfig(block) for block in block_configs]

    def get_gpt_oss_config_for_layer(self, layer_idx):
        """The configuration that a plain gpt-oss layer is built from."""
        block = self.block_configs[layer_idx]
        config = copy.copy(self)
        config.num_local_experts = block.num_local_experts
        config.sliding_window = block.sliding_window
        return config
