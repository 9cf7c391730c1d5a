# pyright: basic, reportMissingImports=false
"""A plugin with which stock vLLM serves children whose layers differ in experts and windows.

vLLM finds `register` by the entry point group `vllm.general_plugins` wherever this package is installed beside it, and
calls it in each of its processes; `vllm serve DIRECTORY` then takes a `gpt_oss_puzzle` or `qwen3_moe_puzzle` checkpoint
like any other. Nothing here imports JAX. The classes rely on private hooks of vLLM, so one release is supported; under
another, such a checkpoint is refused in one sentence, and other models are served as usual.

Without the plugin and with trust_remote_code, vLLM runs these checkpoints through its transformers backend, which gives
every windowed layer the same window: answers are then wrong, without an error.
"""

VLLM_RELEASE = "0.32"
FAMILIES = {"gpt_oss": "GptOss", "qwen3_moe": "Qwen3Moe"}
"""How names of classes begin, in vLLM as here, by the model type of plain checkpoints; it also names a module here."""


def puzzle_model_type(family: str) -> str:
    """The model type of a family's heterogeneous checkpoints."""
    return f"{family}_puzzle"


def puzzle_architecture(family: str) -> str:
    """The architecture of a family's heterogeneous checkpoints, which is a class in the family's module."""
    return f"{FAMILIES[family]}PuzzleForCausalLM"


def release_problem(version: str) -> str | None:
    """The reason why a version of vLLM cannot be used, in one sentence; None if it is supported."""
    if version.startswith(f"{VLLM_RELEASE}."):
        return None
    return f"puzzle_jax serves heterogeneous children in vLLM {VLLM_RELEASE}, but vLLM {version} is installed"


def register() -> None:
    """Registers configurations and models with vLLM; may be called repeatedly."""
    import vllm
    from transformers import AutoConfig

    from puzzle_jax.serve_vllm import config

    # A registered class comes before a checkpoint's own code, trusted or not, so a wrong release is always refused.
    for family, prefix in FAMILIES.items():
        AutoConfig.register(puzzle_model_type(family), getattr(config, f"{prefix}PuzzleConfig"), exist_ok=True)
    if release_problem(vllm.__version__) is not None:
        return

    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family, prefix in FAMILIES.items():
        stock, own = f"{prefix}ForCausalLM", puzzle_architecture(family)
        if stock in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[own] = MODELS_CONFIG_MAP[stock]
        ModelRegistry.register_model(own, f"puzzle_jax.serve_vllm.{family}:{own}")
