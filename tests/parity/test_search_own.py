"""A search from a model saved by transformers and given answers to a child that transformers loads."""

import json

import numpy as np
import pytest

from puzzle_jax.search.__main__ import main
from puzzle_jax.tasks.chat.embedded import write_chat_files

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=128, hidden_size=48, intermediate_size=40, num_attention_heads=6, num_key_value_heads=3)
LENGTHS = dict(max_position_embeddings=768, sliding_window=16, eos_token_id=1, pad_token_id=0)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Four random layers of 8 experts in bfloat16."""
    out = tmp_path_factory.mktemp("own") / "checkpoint"
    torch.manual_seed(7)
    config = transformers.GptOssConfig(
        **SIZES, **LENGTHS, head_dim=10, num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2
    )
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    write_chat_files(out)
    return out


def test_a_checkpoint_of_transformers_and_answers_of_a_server_end_in_the_table(parent, tmp_path, capsys):
    file, run = tmp_path / "own.jsonl", tmp_path / "run"
    rows = [{"prompt": f"{n}+{n + 3}=", "reasoning": f"{n},{n + 3}", "completion": f"{2 * n + 3}"} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    roofline = ["--costs", "roofline", "--scenario.hardware", "h100", "--evaluate.rounds", "0"]
    with pytest.warns(UserWarning, match="no scenario was given, so it is taken from"):
        assert main(["--parent", str(parent), "--traces.file", str(file), "--run", str(run), *roofline]) == 0
    out = capsys.readouterr().out
    assert "held-out KL" in out and "accuracy was not measured" in out
    found = json.loads((run / "evaluate/evaluation.json").read_text())
    assert found["child"]["expert_bytes"] <= 0.75 * found["parent"]["expert_bytes"]
    assert found["parent"]["heldout"]["kl"] < 1e-6
    child = transformers.AutoModelForCausalLM.from_pretrained(
        run / "child", trust_remote_code=True, dtype=torch.float32
    )
    kept = [layer["num_local_experts"] for layer in found["child"]["layers"]]
    assert [layer.mlp.experts.gate_up_proj.shape[0] for layer in child.model.layers] == kept
    with torch.no_grad():
        assert np.isfinite(child(torch.arange(2, 40)[None]).logits.numpy()).all()
