"""The differences between families of models in config.json: their names, their fields, and the code that their
heterogeneous children carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.fields import Fields
from puzzle_jax.files import Json

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
"""Names in config.json, by field of `ModelConfig`; a family may have others."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      name: how people call it.
      plain: the `model_type` that runtimes know.
      stem: how transformers' classes for it begin.
      quantization: the one quant_method in which it is published; its name among `Form`s too.
      plain_windows: the windows of a model of the plain model type, in words.
      runtimes: programs that serve its plain model type.
      parse: the model that fields describe; the flag says whether they are those of a heterogeneous child.
      written: the fields of a model that other families name or mean differently, its layers included; on top of a
        base, as plain model type or not.
      is_plain: whether every runtime builds a model from the plain model type.
      replaced: fields of a base that are not kept.
    """

    name: str
    plain: str
    stem: str
    quantization: str
    plain_windows: str
    runtimes: str
    parse: Callable[[Fields, bool], ModelConfig]
    written: Callable[[ModelConfig, Mapping[str, Json], bool], dict[str, Json]]
    is_plain: Callable[[ModelConfig], bool]
    replaced: tuple[str, ...]

    @property
    def puzzle(self) -> str:
        """The `model_type` of a heterogeneous child."""
        return f"{self.plain}_puzzle"

    @property
    def model_file(self) -> str:
        """The file that mlx-lm runs instead of looking for a model type of its own."""
        return f"mlx_{self.puzzle}.py"

    @property
    def remote_code(self) -> tuple[str, ...]:
        """Files of code that heterogeneous children carry."""
        return f"configuration_{self.puzzle}.py", f"modeling_{self.puzzle}.py", self.model_file

    @property
    def auto_map(self) -> dict[str, Json]:
        """The classes of that code, by transformers' class that stands for each."""
        modeling = f"modeling_{self.puzzle}.{self.stem}Puzzle"
        return {
            "AutoConfig": f"configuration_{self.puzzle}.{self.stem}PuzzleConfig",
            "AutoModel": f"{modeling}Model",
            "AutoModelForCausalLM": f"{modeling}ForCausalLM",
        }
