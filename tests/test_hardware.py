"""Measured rates of arithmetic and memory, the gain of mixed precision, and fast float32 products."""

import pytest
import torch
from transformers import LlamaConfig, MptConfig, PreTrainedConfig

from calm import hardware
from calm.hardware import fast_float32, matrix_rate, mixed_precision_gain, read_rate, thread_gain, width_of
from calm.models.configuration import CalmConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _clear_caches():
    for rate in (matrix_rate, mixed_precision_gain, read_rate, thread_gain):
        rate.cache_clear()
    yield
    for rate in (matrix_rate, mixed_precision_gain, read_rate, thread_gain):
        rate.cache_clear()


def test_rates_are_work_divided_by_seconds(monkeypatch):
    monkeypatch.setattr(hardware, "_quickest", lambda run, times: 0.5)
    monkeypatch.setattr(hardware, "_EMULATED", 0)
    assert matrix_rate(CPU, torch.float32) == 2 * 1024**3 / 0.5
    assert read_rate(CPU) == 2**28 / 0.5
    assert thread_gain() == 1


def test_emulated_dtypes_are_timed_on_small_matrices_only(monkeypatch):
    sizes = []
    monkeypatch.setattr(hardware, "_EMULATED", float("inf"))
    real = torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *shape, **kwargs: sizes.append(shape[0]) or real(*shape, **kwargs)
    )
    assert matrix_rate(CPU, torch.float16) > 0
    assert sizes == [128]


def test_gain_is_the_median_ratio_of_times(monkeypatch):
    seconds = iter([9.0, 9.0, 3.0, 1.0, 2.0, 2.0, 3.0, 1.0, 8.0, 1.0, 1.0, 4.0])
    monkeypatch.setattr(hardware, "_quickest", lambda run, times: run() and next(seconds))
    assert mixed_precision_gain(CPU, 16) == 3  # The median of 3, 1, 3, 8 and 1/4, after a warm-up.


def test_measuring_leaves_random_numbers_and_threads_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.no_grad():
        assert mixed_precision_gain(CPU, 8) > 0
    assert torch.equal(torch.rand(3), expected)
    torch.set_num_threads(2)
    assert thread_gain() > 0
    assert torch.get_num_threads() == 2


def test_fast_float32_is_as_precise_as_float32():
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 64, 64), (48, 96, 200), (700, 256, 512), (3000, 64, 4096)):
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        with fast_float32(CPU, 128):
            product = left @ right
        error = (product - left.double() @ right.double()).abs().max()
        assert error < 1e-5 * inner**0.5  # In bfloat16 it would be 1e-2.


@pytest.mark.parametrize(
    ("is_faster", "device", "width"),
    [(True, "cpu", 128), (True, "cpu", 127), (False, "cpu", 128), (True, "cuda", 128)],
)
def test_fast_float32_restores_the_setting(monkeypatch, is_faster, device, width):
    monkeypatch.setattr(hardware, "_has_faster_float32", lambda: is_faster)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), fast_float32(torch.device(device), width):
        assert torch.get_float32_matmul_precision() == (
            "medium" if (is_faster, device, width) == (True, "cpu", 128) else before
        )
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_precision_set_for_one_backend_is_left_alone(monkeypatch):
    monkeypatch.setattr(hardware, "_has_faster_float32", lambda: True)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with fast_float32(CPU, 128):
            assert matmul.fp32_precision == "bf16"
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    torch.get_float32_matmul_precision()  # Raises if the settings are inconsistent.


@pytest.fixture
def amd(monkeypatch, tmp_path):
    """An AMD processor with AVX-512."""
    file = tmp_path / "cpuinfo"
    file.write_text("vendor_id : AuthenticAMD\n")
    monkeypatch.setattr(hardware, "Path", lambda _: file)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(hardware, "_is_exact", lambda rows: True)
    hardware._has_faster_float32.cache_clear()
    yield file
    hardware._has_faster_float32.cache_clear()


def test_float32_is_only_faster_on_amd_with_avx512_and_exact_products(amd, monkeypatch):
    def is_faster():
        hardware._has_faster_float32.cache_clear()
        return hardware._has_faster_float32()

    before = torch.get_float32_matmul_precision()
    assert is_faster()
    monkeypatch.setattr(hardware, "_is_exact", lambda rows: rows < 4096)
    assert not is_faster()
    assert torch.get_float32_matmul_precision() == before
    monkeypatch.setattr(hardware, "_is_exact", lambda rows: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not is_faster()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    amd.write_text("vendor_id : GenuineIntel\n")
    assert not is_faster()
    amd.unlink()
    assert not is_faster()


def test_rounding_to_bfloat16_is_detected(monkeypatch):
    assert hardware._is_exact(64)
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: real(a.bfloat16(), b.bfloat16()).float())
    assert not hardware._is_exact(64)


def test_width_of_a_model_is_0_if_unknown():
    assert width_of(LlamaConfig(hidden_size=96)) == 96
    assert width_of(CalmConfig(backbone_config={"hidden_size": 128})) == 128
    assert width_of(MptConfig(d_model=256)) == 256
    assert width_of(PreTrainedConfig()) == 0
