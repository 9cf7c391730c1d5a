"""Matrices in FP8 and stacked experts, against loops over single values and against NumPy's own stacking."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.convert_hf.tensors.composed import ScaledTensor, StackedExperts, slices_of
from puzzle_jax.convert_hf.tensors.files import StoredTensor, open_tensors
from puzzle_jax.errors import CheckpointError
from tests.convert_hf.qwen import BF16, E4M3, write_all

ROWS, COLUMNS = 131, 259  # one block of 128 and 3 rows more, two and 3 columns more


def stored(directory: Path, **tensors: np.ndarray) -> dict[str, StoredTensor]:
    directory.mkdir(exist_ok=True)
    write_all(directory, tensors)
    return open_tensors(directory).tensors


@pytest.fixture(scope="module", params=[BF16, np.dtype(np.float32)], ids=["bf16 scales", "f32 scales"])
def scaled(request, tmp_path_factory) -> tuple[ScaledTensor, np.ndarray]:
    """A matrix of random codes, and its values computed one by one."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (ROWS, COLUMNS)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # the two codes without a value
    scales = rng.uniform(1e-3, 2, (2, 3)).astype(request.param)
    found = stored(tmp_path_factory.mktemp("scaled"), w=codes.view(E4M3), s=scales)
    values = np.empty((ROWS, COLUMNS), np.float32)
    for row, column in np.ndindex(ROWS, COLUMNS):
        code = int(codes[row, column])
        exponent, mantissa = (code >> 3) & 15, code & 7
        magnitude = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        scale = np.float32(scales[row // 128, column // 128])
        values[row, column] = np.float32(-magnitude if code >> 7 else magnitude) * scale
    return ScaledTensor(found["w"], found["s"]), values


@pytest.mark.parametrize(
    "index",
    [(), (slice(5, 9),), (slice(120, 131), slice(127, 129)), (slice(None), slice(255, 259)), (slice(3, 3),)],
)
def test_values_are_codes_times_scales_in_float32(scaled, index):
    tensor, values = scaled
    np.testing.assert_array_equal(tensor.read(index, weights=True), values[index])
    rounded = tensor.rounded().read(index)
    assert rounded.dtype == BF16 and tensor.rounded().dtype == "BF16"
    np.testing.assert_array_equal(rounded, values[index].astype(BF16))


def test_bytes_are_those_of_codes_and_scales(scaled):
    tensor, _ = scaled
    codes, scales = (source.read().tobytes() for source in tensor.sources)
    whole = codes + scales
    assert tensor.nbytes == len(whole) and b"".join(map(bytes, tensor.chunks())) == whole
    places = [(0, 4), (len(codes) - 3, 5), (len(whole) - 2, 2), (10, len(codes))]
    assert [bytes(piece) for piece in tensor.bytes_at(places)] == [whole[a : a + n] for a, n in places]
    assert tensor.equals(tensor) and not tensor.equals(tensor.codes) and not tensor.codes.equals(tensor)


def test_a_code_or_a_scale_without_a_value_is_refused_by_name(tmp_path):
    codes = np.ones((4, 130), E4M3)
    good = np.ones((1, 2), np.float32)
    bad = {
        "w holds values that are not finite": (np.where(np.arange(130) == 129, np.array(np.nan, E4M3), codes), good),
        "s holds values that are not finite": (codes, np.array([[1, np.nan]], np.float32)),
        "w times its scales holds values that are not finite": (np.full((4, 130), 240, E4M3), good * np.float32(3e38)),
    }
    for message, (w, s) in bad.items():
        found = stored(tmp_path, w=w.astype(E4M3), s=s)
        tensor = ScaledTensor(found["w"], found["s"])
        tensor.read()
        with pytest.raises(CheckpointError, match=message):
            tensor.read(weights=True)
        if "times" not in message:
            with pytest.raises(CheckpointError, match=message):
                list(tensor.chunks(weights=True))


EXPERTS, INPUTS, OUTPUTS = 5, 11, 7
SLICES = [
    (),
    (slice(1, 4),),
    (slice(None), slice(2, 9)),
    (slice(2, 3), slice(0, 5), slice(3, 4)),
    (slice(0, 5), slice(None), slice(5, 12)),
    (slice(None), slice(None), slice(4, 4)),
    (slice(0, 1), slice(10, 11), slice(0, 14)),
]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory) -> tuple[StackedExperts, StackedExperts, np.ndarray]:
    """Gate and up projections of five experts, one by one and fused, and the tensor that they make up."""
    rng = np.random.default_rng(1)
    gate, up = rng.standard_normal((2, EXPERTS, OUTPUTS, INPUTS)).astype(np.float32).astype(BF16)
    directory = tmp_path_factory.mktemp("stacked")
    single = {f"{part}{e}": one[e] for part, one in (("gate", gate), ("up", up)) for e in range(EXPERTS)}
    found = stored(directory, fused=np.concatenate([gate, up], axis=1), **single)
    cut = slices_of(found["fused"], (OUTPUTS, INPUTS), 2 * EXPERTS)
    whole = np.empty((EXPERTS, INPUTS, 2 * OUTPUTS), BF16)
    whole[..., 0::2], whole[..., 1::2] = gate.swapaxes(1, 2), up.swapaxes(1, 2)
    one_by_one = StackedExperts("x", tuple((found[f"gate{e}"], found[f"up{e}"]) for e in range(EXPERTS)))
    return one_by_one, StackedExperts("x", tuple(zip(cut[0::2], cut[1::2], strict=True)), fused=True), whole


@pytest.mark.parametrize("index", SLICES)
def test_blocks_of_stacked_experts(stacked, index):
    one_by_one, fused, whole = stacked
    assert one_by_one.shape == fused.shape == whole.shape and one_by_one.dtype == "BF16"
    for tensor in (one_by_one, fused):
        np.testing.assert_array_equal(tensor.read(index, weights=True), whole[index])


def test_the_fused_form_has_the_bytes_of_the_other(stacked):
    one_by_one, fused, _ = stacked
    assert one_by_one.equals(fused) and fused.equals(one_by_one)
    assert (
        b"".join(map(bytes, fused.chunks()))
        == fused.sources[0].file.read_bytes()[fused.sources[0].offset :][: fused.nbytes]
    )
    others = StackedExperts("x", one_by_one.matrices[::-1])
    assert others.shape == fused.shape and not others.equals(fused)
    assert not StackedExperts("x", one_by_one.matrices[:3]).equals(fused)


def test_only_the_bytes_of_a_block_are_read(tmp_path):
    """Compares the bytes read through system calls, as the kernel counts them."""
    big = np.zeros((64, 8192), BF16)
    found = stored(tmp_path, **{f"e{e}": big for e in range(8)})
    tensor = StackedExperts("x", tuple((found[f"e{e}"],) for e in range(8)))

    def bytes_read(index):
        before = int(Path("/proc/self/io").read_text().split()[1])
        tensor.read(index)
        return int(Path("/proc/self/io").read_text().split()[1]) - before

    for index in ((slice(2, 3),), (slice(6, 8), slice(0, 4096)), (slice(None), slice(None), slice(8, 16))):
        wanted = 2 * np.empty(tensor.shape, bool)[index].size
        assert wanted <= bytes_read(index) < wanted + 8192


def test_experts_in_fp8_are_read_as_numbers(scaled):
    tensor, values = scaled
    both = StackedExperts("x", ((tensor, tensor),))
    assert both.dtype == "F32" and both.rounded().dtype == "BF16" and both.shape == (1, COLUMNS, 2 * ROWS)
    np.testing.assert_array_equal(both.read()[0, :, 1::2], values.T)
    np.testing.assert_array_equal(both.rounded().read()[0, :, 0::2], values.T.astype(ml_dtypes.bfloat16))
