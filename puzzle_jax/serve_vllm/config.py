# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""The configuration of a heterogeneous child, as vLLM sees it."""

import vllm
from transformers import GptOssConfig
from vllm.platforms import current_platform

from puzzle_jax.serve_vllm import MODEL_TYPE, release_problem


class GptOssPuzzleConfig(GptOssConfig):
    """gpt-oss with `block_configs`: {"num_local_experts", "sliding_window"} for each layer, None for full attention.

    Instances have the model type gpt_oss, by which vLLM selects the chat format and its MXFP4 experts. On CPUs, where
    those require bfloat16 and AMX, the checkpoint is presented as unpacked; `model` unpacks it while loading.
    """

    model_type = MODEL_TYPE

    def __init__(self, **kwargs):
        problem = release_problem(vllm.__version__)
        if problem:
            raise ValueError(problem)
        kwargs.pop("per_layer_config", None)  # repeats block_configs, for tools that read only this field
        super().__init__(**kwargs)
        self.model_type = "gpt_oss"

    def __setattr__(self, name, value):
        if name == "quantization_config" and current_platform.is_cpu():
            return  # vLLM sets it again from the file
        super().__setattr__(name, value)
