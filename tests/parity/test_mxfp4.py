"""MXFP4 decoding is bit-identical to that of transformers."""

import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.convert_hf.tensors import mxfp4

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_code_at_every_scale_has_the_same_bits(dtype):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    blocks = np.tile(codes, (1, 255, 1, 1))
    scales = np.tile(np.arange(255, dtype=np.uint8).reshape(1, 255, 1), (1, 1, 16))
    wide, ours_type = {
        "float32": (torch.int32, np.float32),
        "bfloat16": (torch.int16, ml_dtypes.bfloat16),
    }[dtype]
    packed = torch.tensor(blocks), torch.tensor(scales)
    theirs = convert_moe_packed_tensors(*packed, dtype=getattr(torch, dtype)).view(wide).numpy()
    ours = mxfp4.decode(blocks, scales, ours_type)
    assert ours.shape == theirs.shape == (1, 512, 255)
    np.testing.assert_array_equal(ours.view(theirs.dtype), theirs)
