"""The CPU's attention kernel against attention written out in float64, and the encoder with and without it."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import has_instructions, random_pixels, relative_error, small_model
from torch import Tensor

from image_encoder_vit import ImageEncoderViTModel, attention, cpu_inference, cpu_kernel
from image_encoder_vit.attention import (
    eager_attention,
    relative_logits,
    window_partition,
    window_unpartition,
)
from image_encoder_vit.cpu_inference import chunked_attention
from image_encoder_vit.cpu_kernel import (
    attention_kernel,
    has_attention_kernel,
    installed_library,
    kernel_attention,
    kernel_names,
    load_kernel,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import hatch_build  # noqa: E402

needs_kernel = pytest.mark.skipif(
    attention_kernel() is None, reason="the kernel needs Linux, AVX2, and a C compiler when installing"
)
# (batch, height, width, heads, channels per head, window), grids in patches: one tile of keys and several, of a row and
# of several; windows that fit and that stick out; head sizes that fill vectors and that do not.
GRIDS = [
    (1, 14, 14, 2, 64, 0),
    (2, 20, 17, 3, 80, 0),
    (1, 64, 64, 1, 64, 0),
    (1, 1, 300, 2, 8, 0),
    (1, 1, 1, 1, 2, 0),
    (1, 28, 42, 2, 64, 14),
    (2, 33, 40, 2, 64, 14),
    (1, 5, 9, 1, 16, 14),
    (3, 23, 3, 2, 10, 7),
]


def random_inputs(grid: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv, padding and the two tables."""
    batch, height, width, heads, dim, window = grid
    generator = torch.Generator().manual_seed(sum(grid))
    shapes = [
        (batch, height, width, 3 * heads * dim),
        (3 * heads * dim,),
        (2 * (window or height) - 1, dim),
        (2 * (window or width) - 1, dim),
    ]
    qkv, padding, table_h, table_w = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return qkv, padding, table_h, table_w


def written_out(qkv: Tensor, padding: Tensor, table_h: Tensor, table_w: Tensor, heads: int, window: int) -> Tensor:
    grid = qkv.shape[1], qkv.shape[2]
    if window:
        windows = window_partition(qkv, window, padding)
        return window_unpartition(written_out(windows, padding, table_h, table_w, heads, 0), grid)
    query, key, value = qkv.flatten(1, 2).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attended, _ = eager_attention(query, key, value, relative_logits(query, table_h, table_w, grid))
    return attended.transpose(1, 2).flatten(2).unflatten(1, grid)


@pytest.fixture(params=hatch_build.FLAGS_OF_KERNEL)
def kernel_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The precision of one of the kernels that run on this processor, which `kernel_attention` is made to take."""
    path = installed_library()
    if path is None or not has_instructions(request.param):
        pytest.skip("the kernel needs Linux, its instructions, and a C compiler when installing")
    dtype: torch.dtype = getattr(torch, request.param.split("_")[1])
    kernel = load_kernel(path, {dtype: [request.param]})
    monkeypatch.setattr(cpu_kernel, "attention_kernel", lambda: kernel)
    return dtype


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_kernel_computes_attention_with_relative_positions(
    grid: tuple[int, ...], kernel_dtype: torch.dtype
) -> None:
    inputs, (heads, window) = random_inputs(grid, kernel_dtype), (grid[3], grid[5])
    exact = written_out(*(tensor.to(torch.float64) for tensor in inputs), heads, window)
    plain = written_out(*inputs, heads, window)
    # No further from the exact result than PyTorch in the same precision; sums in another order may differ a little.
    assert relative_error(kernel_attention(*inputs, heads, window), exact) <= 1.2 * relative_error(plain, exact) + 1e-7


@pytest.mark.parametrize("logits_per_chunk", [1, 5000, 1 << 21], ids=["a query", "some", "a window"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_chunks_are_attention_with_relative_positions(
    grid: tuple[int, ...], dtype: torch.dtype, logits_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if logits_per_chunk == 1 and grid[1] * grid[2] > 500:
        pytest.skip("thousands of products of a single query")
    monkeypatch.setattr(cpu_inference, "LOGITS_PER_CHUNK", logits_per_chunk)
    inputs, (heads, window) = random_inputs(grid, dtype), (grid[3], grid[5])
    exact = written_out(*(tensor.to(torch.float64) for tensor in inputs), heads, window)
    rounding = relative_error(written_out(*inputs, heads, window), exact)
    slack = 1e-7 if dtype == torch.float32 else 1e-13
    assert relative_error(chunked_attention(*inputs, heads, window), exact) <= 1.2 * rounding + slack


def test_each_kernel_passes_on_what_is_no_number(kernel_dtype: torch.dtype) -> None:
    qkv, padding, table_h, table_w = random_inputs((1, 20, 20, 2, 16, 0), kernel_dtype)
    qkv[0, 3, 4, 16 + 32] = torch.nan  # in the second head's key of one token, which all queries see
    attended = kernel_attention(qkv, padding, table_h, table_w, 2, 0)
    assert attended[..., 16:].isnan().all()
    assert not attended[..., :16].isnan().any()


@pytest.mark.parametrize("factor", [30, 1e4, 1e15])
def test_large_logits_neither_overflow_nor_vanish(factor: float, kernel_dtype: torch.dtype) -> None:
    if kernel_dtype == torch.float16 and factor > 1e4:
        pytest.skip("float16 ends at 65504")
    inputs = [tensor * factor for tensor in random_inputs((1, 20, 20, 2, 16, 0), kernel_dtype)]
    exact = written_out(*(tensor.to(torch.float64) for tensor in inputs), 2, 0)
    assert relative_error(kernel_attention(*inputs, 2, 0), exact) <= {torch.bfloat16: 2e-2}.get(kernel_dtype, 1e-3)


@pytest.mark.parametrize(
    ("queries", "keys", "expected"),
    [
        (1e16, [-1e16, -1e16], 5.0),
        (1e16, [-1e16, -3e16], 1.0),
        (1e16, [0.0, -torch.inf], 1.0),
        (1e16, [-torch.inf, -torch.inf], torch.nan),
        (1e16, [0.0, torch.inf], torch.nan),
    ],
)
def test_logits_at_the_ends_weigh_as_softmax_says(
    queries: float, keys: list[float], expected: float, kernel_dtype: torch.dtype
) -> None:
    if kernel_dtype == torch.float16:
        queries, keys = 1e4, [key if abs(key) == torch.inf else key / 1e12 for key in keys]
    qkv = torch.tensor([[queries, 0, key, 0, value, value] for key, value in zip(keys, (1, 9), strict=True)])
    tables = torch.zeros(1, 2), torch.zeros(3, 2)
    attended = kernel_attention(
        qkv.view(1, 1, 2, 6).to(kernel_dtype), None, *(table.to(kernel_dtype) for table in tables), 1, 0
    )
    assert torch.equal(attended.isnan(), torch.full_like(attended, expected).isnan())
    assert expected != expected or (attended == expected).all()


@needs_kernel
def test_the_kernel_serves_several_threads_at_once() -> None:
    inputs = random_inputs((2, 33, 40, 2, 64, 14), torch.float32)
    expected = kernel_attention(*inputs, 2, 14)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(kernel_attention(*inputs, 2, 14))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(128, 128), (80, 176)], ids=str)
@torch.no_grad()
def test_the_encoder_gives_the_same_without_the_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    exact_model = small_model().double()
    pixels = random_pixels(2, 3, *size)
    exact = exact_model(pixels).last_hidden_state
    model = exact_model.to(dtype)
    with_kernel = relative_error(model(pixels).last_hidden_state, exact)
    monkeypatch.setattr(attention, "has_attention_kernel", lambda dtype: False)
    without = relative_error(model(pixels).last_hidden_state, exact)
    assert max(with_kernel, without) <= {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]


@needs_kernel
@torch.no_grad()
def test_autocast_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []

    def watched(qkv: Tensor, *args: Any) -> Tensor:
        dtypes.append(qkv.dtype)
        return kernel_attention(qkv, *args)

    model, pixels = small_model(), random_pixels(1, 3, 128, 128)
    expected = model(pixels).last_hidden_state
    monkeypatch.setattr(attention, "kernel_attention", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(model(pixels).last_hidden_state.float(), expected) <= 5e-2
    assert set(dtypes) == {torch.bfloat16}


@needs_kernel
@torch.no_grad()
def test_a_compiled_encoder_keeps_the_kernel_in_one_graph() -> None:
    model: ImageEncoderViTModel = small_model()
    pixels = random_pixels(1, 3, 128, 128)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for _ in range(2):
        assert relative_error(compiled(pixels).last_hidden_state, model(pixels).last_hidden_state) <= 1e-6
    assert len(graphs) == 1
    assert "image_encoder_vit.cpu_attention" in graphs[0].code


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc") or not kernel_names(torch.backends.cpu.get_cpu_capability()),
    reason="the kernel needs Linux, AVX2 and a C compiler",
)
def test_installing_compiled_the_kernel() -> None:
    assert has_attention_kernel(torch.float32)


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "kernel.c"
    source.write_text("no C\n")
    for compiler, expected in (("no-such-compiler", OSError), ("false", subprocess.CalledProcessError)):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(expected):
            hatch_build.compile_kernel(source, tmp_path / "kernel.so")
        assert list(tmp_path.iterdir()) == [source]


def test_an_old_compiler_leaves_out_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("the kernel needs Linux and a C compiler")
    old, source, library = tmp_path / "old-cc", tmp_path / "kernel.c", tmp_path / "kernel.so"
    old.write_text('#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1 ;; esac\nexec cc "$@"\n')
    old.chmod(0o755)
    version = f"__attribute__((weak)) const int image_encoder_vit_interface = {cpu_inference.INTERFACE};"
    source.write_text(f"{version}\nint ATTENTION(void) {{ return 0; }}\n")
    monkeypatch.setenv("CC", str(old))
    hatch_build.compile_kernel(source, library)
    names = {torch.bfloat16: ["avx512bf16_bfloat16", "avx512_bfloat16"], torch.float16: ["avx512bf16_bfloat16"]}
    loaded = load_kernel(library, names)
    assert [*loaded.functions] == [torch.bfloat16]
    assert loaded.functions[torch.bfloat16].__name__.endswith("avx512_bfloat16")
    monkeypatch.setenv("CC", "")  # as if it were not set
    hatch_build.compile_kernel(source, library)
