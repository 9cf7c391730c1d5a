# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""The configurations of heterogeneous children, as vLLM sees them.

They have `block_configs`: {"num_local_experts", "sliding_window"} for each layer, None for full attention. Instances
have the model type of plain checkpoints, by which vLLM selects what else belongs to a family.
"""

import vllm
from transformers import GptOssConfig, Qwen3MoeConfig
from vllm.platforms import current_platform

from puzzle_jax.serve_vllm import puzzle_model_type, release_problem


def accepted(fields):
    """The fields of a config.json that vLLM is to see; raises `ValueError` for a release that is not supported."""
    problem = release_problem(vllm.__version__)
    if problem:
        raise ValueError(problem)
    fields.pop("per_layer_config", None)  # repeats block_configs, for tools that read only this field
    return fields


class GptOssPuzzleConfig(GptOssConfig):
    """gpt-oss; by its model type vLLM also selects the chat format and its MXFP4 experts.

    On CPUs, where those require bfloat16 and AMX, the checkpoint is presented as unpacked; `gpt_oss` unpacks it while
    loading.
    """

    model_type = puzzle_model_type("gpt_oss")

    def __init__(self, **kwargs):
        super().__init__(**accepted(kwargs))
        self.model_type = "gpt_oss"

    def __setattr__(self, name, value):
        if name == "quantization_config" and current_platform.is_cpu():
            return  # vLLM sets it again from the file
        super().__setattr__(name, value)


class Qwen3MoePuzzleConfig(Qwen3MoeConfig):
    """Qwen3-MoE; its layer types are those of the blocks, since vLLM takes a window for every layer's otherwise."""

    model_type = puzzle_model_type("qwen3_moe")

    def __init__(self, **kwargs):
        super().__init__(**accepted(kwargs))
        self.model_type = "qwen3_moe"
        windows = [block["sliding_window"] for block in kwargs.get("block_configs", ())]
        widths = [window for window in windows if window is not None]
        self.use_sliding_window, self.sliding_window = bool(widths), max(widths, default=None)
        self.layer_types = ["full_attention" if window is None else "sliding_attention" for window in windows] or None
