"""Each precision on each processor that can be had or emulated here: in float32 where it has no products for it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_pixels, relative_error, small_model
from torch import Tensor

from image_encoder_vit import attention, cpu_inference
from image_encoder_vit.cpu_kernel import attention_kernel

TESTS = Path(__file__).parent
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
PROCESSORS = {
    "as it is": {},
    "AVX2": AVX2,
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}
needs_native = pytest.mark.skipif(
    importlib.util.find_spec("transformers.models.unlimited_ocr") is None, reason="transformers is too old for the peer"
)


@needs_native
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the variables that emulate are for x86")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_low_precision_is_as_exact_as_transformers_whatever_the_processor_multiplies(processor: str) -> None:
    command = [sys.executable, str(TESTS / "precision_worker.py")]
    environment = os.environ | PROCESSORS[processor]
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env=environment)
    assert result.returncode == 0, result.stderr
    measured: dict[str, Any] = json.loads(result.stdout)
    assert "torch.float16" in measured["in float32"]
    assert "torch.float32" not in measured["in float32"]
    if processor != "as it is":
        assert "torch.bfloat16" in measured["in float32"]
    if attention_kernel() is not None:
        assert len(measured["kernel"]) == len(measured["errors"])
    for dtype, (with_kernel, without, theirs) in measured["errors"].items():
        bound = {"torch.float32": 1e-5}.get(dtype, 1.05 * theirs)
        assert max(with_kernel, without) <= bound, (dtype, with_kernel, without, theirs)


@pytest.fixture
def product_dtypes(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """The dtypes that each step of the CPU's path is computed in, by the step's name, as they come."""
    seen: dict[str, set[torch.dtype]] = {}

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)
        dtypes = seen[name] = set()

        def watched(input: Tensor, *args: Any, **kwargs: Any) -> Any:
            dtypes.add(input.dtype)
            return original(input, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(cpu_inference, "_float32_or_native")
    watch(cpu_inference, "_attend_window")
    watch(attention, "kernel_attention")
    watch(torch.nn.functional, "conv2d")
    return seen


@pytest.mark.parametrize("has_kernel", [True, False], ids=["kernel", "chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_without_products_weights_and_features_stay_and_sums_are_of_float32(
    dtype: torch.dtype,
    has_kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
    product_dtypes: dict[str, set[torch.dtype]],
) -> None:
    monkeypatch.setattr(cpu_inference, "has_products", lambda asked: False)
    if not has_kernel:
        monkeypatch.setattr(attention, "has_attention_kernel", lambda asked: False)
    elif attention_kernel() is None:
        pytest.skip("the kernel does not run here")
    model, pixels = small_model().to(dtype), random_pixels(2, 3, 128, 176)
    features = model(pixels).last_hidden_state
    assert features.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert product_dtypes["_float32_or_native"] == product_dtypes["conv2d"] == {torch.float32}
    # The kernel reads the features as they are.
    assert product_dtypes["kernel_attention"] == ({dtype} if has_kernel else set())
    assert product_dtypes["_attend_window"] == (set() if has_kernel else {torch.float32})
    exact = small_model().double()(pixels.double()).last_hidden_state
    assert relative_error(features, exact) <= {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@torch.inference_mode()
def test_without_products_a_compiled_encoder_sums_in_float32_too(
    monkeypatch: pytest.MonkeyPatch, product_dtypes: dict[str, set[torch.dtype]]
) -> None:
    monkeypatch.setattr(cpu_inference, "has_products", lambda asked: False)
    monkeypatch.setattr(attention, "has_attention_kernel", lambda asked: False)
    model, pixels = small_model().to(torch.bfloat16), random_pixels(1, 3, 128, 176)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    features = compiled(pixels).last_hidden_state
    assert product_dtypes["_attend_window"] == product_dtypes["_float32_or_native"] == {torch.float32}
    assert relative_error(features, model(pixels).last_hidden_state) <= 1e-2
