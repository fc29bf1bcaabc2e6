"""The path for inference on the CPU differs from PyTorch's own in nothing but time, memory and rounding."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_pixels, relative_error, small_model
from native import sam_twin
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

from image_encoder_vit import ImageEncoderViT, ImageEncoderViTModel, cpu_kernel, modeling_image_encoder_vit
from image_encoder_vit.cpu_inference import INTERFACE, is_watched, openmp_grants_threads, takes_cpu_path
from image_encoder_vit.cpu_kernel import attention_kernel, kernel_attention
from image_encoder_vit.runtimes.drop_in import replace_sam_encoder

# torch.backends.mkldnn.flags says so of itself wherever there is no GPU of Intel's.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN is available for Intel GPUs")
TESTS = Path(__file__).parent
BOUND = 2e-6
needs_kernel = pytest.mark.skipif(
    attention_kernel() is None, reason="the kernel needs Linux, AVX2, and a C compiler when installing"
)


class Watched(nn.Module):
    """A layer with one inside, for hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


class Subclass(Tensor):
    pass


@contextmanager
def hooked(register: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    handle = register(*arguments)
    try:
        yield
    finally:
        handle.remove()


def nothing(*call: Any) -> None:
    return None


MODULE_HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]
GLOBAL_HOOKS = [
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
]


def test_the_path_may_be_taken_where_nothing_speaks_against_it() -> None:
    with torch.no_grad():
        assert takes_cpu_path(torch.ones(2), nn.Parameter(torch.ones(2)), modules=[Watched()])
    with torch.inference_mode():
        assert takes_cpu_path(torch.ones(2))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, device="meta"),
        torch.ones(2).as_subclass(Subclass),
        torch.eye(2).to_sparse(),
    ],
    ids=["elsewhere", "a subclass", "another layout"],
)
def test_it_is_not_taken_for_other_tensors(tensor: Tensor) -> None:
    with torch.no_grad():
        assert not takes_cpu_path(tensor)
        assert not takes_cpu_path(torch.ones(2), tensor)


@pytest.mark.parametrize(
    "context",
    [
        torch.enable_grad,
        forward_ad.dual_level,
        lambda: torch.backends.mkldnn.flags(enabled=False),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["gradients", "forward mode", "oneDNN is off", "autocast"],
)
def test_it_is_not_taken_in_these_contexts(context: Callable[[], AbstractContextManager[Any]]) -> None:
    with torch.no_grad():
        with context():
            assert not takes_cpu_path(torch.ones(2))
        assert takes_cpu_path(torch.ones(2))


def test_autocast_leaves_what_it_would_not_cast() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert takes_cpu_path(torch.ones(2, dtype=torch.bfloat16))
        assert takes_cpu_path(torch.ones(2), calls_layers=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
def test_it_is_not_taken_in_transformations_and_graphs_for_other_runtimes() -> None:
    asked = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(takes_cpu_path(x))
            return x * 2

    ones = torch.ones(3, 2)
    with torch.no_grad():
        torch.vmap(Asks())(ones)
        torch.func.jvp(Asks(), (ones,), (ones,))
        torch.func.grad(lambda x: Asks()(x).sum())(ones)
        torch.export.export(Asks(), (ones,), strict=False)
        torch.jit.trace(Asks(), ones, check_trace=False)
    assert len(asked) == 5
    assert not any(asked)


@pytest.mark.parametrize("name", MODULE_HOOKS)
def test_it_is_not_taken_where_a_module_is_hooked(name: str) -> None:
    module = Watched()
    for watched in (module, module.inner):
        with torch.no_grad():
            with hooked(getattr(watched, name), nothing):
                assert is_watched(module)
                assert not takes_cpu_path(torch.ones(2), modules=[nn.Linear(2, 2), module])
            assert takes_cpu_path(torch.ones(2), modules=[module])


@pytest.mark.parametrize("name", GLOBAL_HOOKS)
@torch.no_grad()
def test_it_is_not_taken_where_all_modules_are_hooked(name: str) -> None:
    with hooked(getattr(torch_module, name), nothing):
        assert not takes_cpu_path(torch.ones(2), modules=[Watched()])


@torch.no_grad()
def test_it_is_not_taken_for_a_module_whose_forward_is_replaced() -> None:
    module = Watched()
    module.inner.forward = module.inner.forward  # type: ignore[method-assign]
    assert not takes_cpu_path(torch.ones(2), modules=[module])


def inner_modules(blocks: nn.Module) -> dict[str, nn.Module]:
    """All modules inside the blocks, but not the blocks."""
    return {name: module for name, module in blocks.named_modules() if name.count(".") >= 1}


def calls_of(blocks: nn.Module, encode: Callable[[], Tensor]) -> tuple[dict[str, list[int]], Tensor]:
    """How many images each module inside the blocks was called with, in each call; and the features."""
    calls: dict[str, list[int]] = {name: [] for name in inner_modules(blocks)}
    handles = [
        module.register_forward_hook(lambda _module, inputs, _output, name=name: calls[name].append(len(inputs[0])))
        for name, module in inner_modules(blocks).items()
    ]
    features = encode()
    for handle in handles:
        handle.remove()
    return calls, features


@torch.inference_mode()
def test_hooks_see_each_call_once_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_image_encoder_vit, "TOKENS_PER_BAND", 24)
    model, pixels = small_model(), random_pixels(2, 3, 128, 176)
    expected = model(pixels).last_hidden_state
    calls, features = calls_of(model.encoder.blocks, lambda: model(pixels).last_hidden_state)
    assert len(calls) == 4 * 8
    assert set(map(tuple, calls.values())) == {(2,)}
    assert relative_error(features, expected) <= BOUND


@torch.inference_mode()
def test_hooks_in_a_model_that_the_drop_in_entered_do_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_image_encoder_vit, "TOKENS_PER_BAND", 24)
    model, pixels = (
        nn.ModuleDict({"encoder": sam_twin(small_model(downsample_channels=[]), "sdpa")}),
        random_pixels(2, 3, 128, 128),
    )
    expected = model["encoder"](pixels).last_hidden_state
    replace_sam_encoder(model)
    calls, features = calls_of(model["encoder"].layers, lambda: model["encoder"](pixels).last_hidden_state)
    assert len(calls) == 4 * 9  # with the activation
    assert set(map(tuple, calls.values())) == {(2,)}
    assert relative_error(features, expected) <= BOUND


@torch.inference_mode()
def test_hooks_for_all_modules_see_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_image_encoder_vit, "TOKENS_PER_BAND", 24)
    model, pixels, called = small_model(), random_pixels(2, 3, 128, 176), []
    with hooked(torch_module.register_module_forward_hook, lambda module, *call: called.append(id(module))):
        model(pixels)
    assert sorted(called) == sorted(id(module) for module in model.modules() if not isinstance(module, nn.ModuleList))


def test_hooks_on_the_gradient_reach_the_layer_before_the_gelu() -> None:
    model, seen = small_model(), []
    model.encoder.blocks[1].mlp.lin1.register_full_backward_pre_hook(lambda *call: seen.append(call[1][0].shape))
    model(random_pixels(2, 3, 128, 128)).last_hidden_state.sum().backward()
    assert seen == [(2, 8, 8, 128)]


@torch.inference_mode()
def test_the_recorders_of_transformers_cost_no_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_image_encoder_vit, "TOKENS_PER_BAND", 24)
    model, pixels = small_model(), random_pixels(1, 3, 128, 128)
    model.set_attn_implementation("eager")
    model(pixels, output_attentions=True)  # Their hooks stay on the attention.
    model.set_attn_implementation("sdpa")
    assert not is_watched(model.encoder.blocks[0].attn)
    model.encoder.blocks[0].attn.register_forward_hook(nothing)
    assert is_watched(model.encoder.blocks[0].attn)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_forward_mode_derivatives_need_no_gradients(implementation: str) -> None:
    model, pixels, tangents = small_model(), random_pixels(1, 3, 128, 128), random_pixels(1, 3, 128, 128, seed=1)
    model.set_attn_implementation(implementation)

    def encode(x: Tensor) -> Tensor:
        return model(x).last_hidden_state

    with torch.no_grad():
        _, derivative = torch.func.jvp(encode, (pixels,), (tangents,))
        step = 1e-3
        exact = small_model().double()
        rise = exact(pixels.double() + step * tangents).last_hidden_state
        fall = exact(pixels.double() - step * tangents).last_hidden_state
    assert relative_error(derivative, (rise - fall) / (2 * step)) <= 1e-4


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@torch.no_grad()
def test_vmap_gives_the_batch() -> None:
    model, pixels = small_model(), random_pixels(3, 3, 128, 176)
    mapped = torch.vmap(lambda image: model(image[None]).last_hidden_state[0])(pixels)
    assert relative_error(mapped, model(pixels).last_hidden_state) <= BOUND


@torch.no_grad()
def test_one_dnn_may_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = small_model(), random_pixels(1, 3, 128, 128)
    expected = model(pixels).last_hidden_state
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    with torch.backends.mkldnn.flags(enabled=False):
        assert relative_error(model(pixels).last_hidden_state, expected) <= BOUND


@torch.no_grad()
def test_flops_are_those_of_the_plain_path() -> None:
    model, pixels = small_model(), random_pixels(2, 3, 128, 176)
    counts = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with FlopCounterMode(display=False) as counter:
            model(pixels)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.full_size
@torch.inference_mode()
def test_the_figure_of_the_documents_is_counted_in_inference() -> None:
    with FlopCounterMode(display=False) as counter:
        ImageEncoderViT()(torch.zeros(1, 3, 512, 512))
    assert counter.get_total_flops() / 1e9 == pytest.approx(200, abs=1)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@torch.no_grad()
def test_dynamic_quantisation_of_pytorch_finds_the_layers() -> None:
    model, pixels = small_model(), random_pixels(1, 3, 128, 128)
    expected = model(pixels).last_hidden_state
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    dynamic = [module for module in quantized.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(dynamic) == 4 * 4
    assert 0 < relative_error(quantized(pixels).last_hidden_state, expected) <= 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="asks the OpenMP library of PyTorch's builds for Linux")
@pytest.mark.parametrize("variables", [{}, {"OMP_THREAD_LIMIT": "1"}], ids=str)
def test_numbers_are_right_whatever_openmp_grants(variables: dict[str, str]) -> None:
    command = [sys.executable, str(TESTS / "openmp_worker.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | variables
    result = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env=environment)
    assert result.returncode == 0, result.stderr
    errors = json.loads(result.stdout)
    assert len(errors) == 6
    assert all(error <= (2e-2 if "bfloat16" in name else 1e-5) for name, error in errors.items()), errors


@pytest.mark.skipif(sys.platform != "linux", reason="asks the OpenMP library of PyTorch's builds for Linux")
def test_openmp_is_asked_each_time() -> None:
    openmp, threads = ctypes.CDLL(torch._C.__file__), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert openmp_grants_threads()
        openmp.omp_set_dynamic(1)
        assert not openmp_grants_threads()
        model, pixels = small_model().to(torch.bfloat16), random_pixels(1, 3, 128, 128)
        with pytest.warns(RuntimeWarning, match="OpenMP grants fewer than the 2 threads"):
            model(pixels)  # With gradients the layers are PyTorch's own.
    finally:
        openmp.omp_set_dynamic(0)
        torch.set_num_threads(threads)
    assert openmp_grants_threads()


def library_of(source: str, folder: Path) -> Path:
    path = folder / cpu_kernel.LIBRARY
    (folder / "library.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", str(folder / "library.c"), "-o", str(path)], check=True)
    return path


@pytest.mark.skipif(
    not cpu_kernel.kernel_names(torch.backends.cpu.get_cpu_capability()), reason="the kernel needs AVX2"
)
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "invalid ELF header|file too short"),
        ("int something_else;", "image_encoder_vit_interface"),
        (f"const int image_encoder_vit_interface = {INTERFACE - 1};", f"version {INTERFACE - 1}, not {INTERFACE}"),
        (f"const int image_encoder_vit_interface = {INTERFACE};", "none of the kernels for this processor"),
    ],
    ids=["no library", "another library", "another version", "without functions"],
)
@torch.no_grad()
def test_a_library_that_cannot_be_used_is_left_aside_with_one_warning(
    source: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is None:
        (tmp_path / cpu_kernel.LIBRARY).write_bytes(b"nothing")
    elif not shutil.which("cc"):
        pytest.skip("no C compiler")
    else:
        library_of(source, tmp_path)
    model, pixels = small_model(), random_pixels(1, 3, 128, 128)
    expected = model(pixels).last_hidden_state
    monkeypatch.setattr(cpu_kernel, "installed_library", lambda: tmp_path / cpu_kernel.LIBRARY)
    attention_kernel.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=reason) as warned:
            features = [model(pixels).last_hidden_state for _ in range(2)]
    finally:
        attention_kernel.cache_clear()
    assert len(warned) == 1
    assert relative_error(features[1], expected) <= BOUND


@needs_kernel
def test_saved_code_takes_the_installed_package_s_library_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "image_encoder_vit"
    bare.mkdir()
    (bare / cpu_kernel.LIBRARY).write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cpu_kernel, "__package__", "transformers_modules.folder")
    found = cpu_kernel.installed_library()
    assert found is not None
    assert not found.is_relative_to(tmp_path)

    def not_installed(name: str) -> Any:
        raise cpu_kernel.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cpu_kernel.metadata, "distribution", not_installed)
    assert cpu_kernel.installed_library() is None


@needs_kernel
@pytest.mark.parametrize(
    "change",
    [
        {"table_h": torch.zeros(4, 8)},
        {"table_w": torch.zeros(5, 6)},
        {"padding": None},
        {"padding": torch.zeros(47)},
        {"num_heads": 4, "table_h": torch.zeros(5, 4), "qkv": torch.zeros(1, 4, 5, 46)},
        {"qkv": torch.zeros(1, 4, 5, 48, dtype=torch.float64)},
        {"window_size": -3},
    ],
    ids=str,
)
def test_the_operator_checks_what_it_is_given(change: dict[str, Any]) -> None:
    operands = {
        "qkv": torch.zeros(1, 4, 5, 48),
        "padding": torch.zeros(48),
        "table_h": torch.zeros(5, 8),
        "table_w": torch.zeros(5, 8),
        "num_heads": 2,
        "window_size": 3,
    }
    assert kernel_attention(**operands).shape == (1, 4, 5, 16)
    with pytest.raises(ValueError, match="The attention kernel cannot take"):
        kernel_attention(**{**operands, **change})


@pytest.mark.parametrize("window_size", [1, 2, 23, 24, 64])
@pytest.mark.parametrize("size_px", [(128, 128), (64, 16), (16, 176)], ids=str)
@torch.no_grad()
def test_windows_of_any_size_give_the_eager_result(window_size: int, size_px: tuple[int, int]) -> None:
    model, pixels = small_model(window_size=window_size), random_pixels(2, 3, *size_px)
    features = model(pixels).last_hidden_state
    model.set_attn_implementation("eager")
    assert relative_error(features, model(pixels).last_hidden_state) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 3, 10, 80, 256])
@torch.no_grad()
def test_heads_of_any_size_give_the_eager_result(head_dim: int, dtype: torch.dtype) -> None:
    def model() -> ImageEncoderViTModel:
        return small_model(
            hidden_size=2 * head_dim, num_attention_heads=2, num_hidden_layers=2, global_attn_indexes=[1]
        )

    pixels = random_pixels(2, 3, 80, 112)
    exact = model().double()(pixels.double()).last_hidden_state
    eager = model().to(dtype)
    eager.set_attn_implementation("eager")
    bound = 1.5 * relative_error(eager(pixels).last_hidden_state, exact) + 1e-6
    assert relative_error(model().to(dtype)(pixels).last_hidden_state, exact) <= bound


@pytest.mark.parametrize("threads", [1, 2, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_any_number_of_threads_gives_the_same(threads: int, dtype: torch.dtype) -> None:
    pixels, before = random_pixels(2, 3, 128, 176), torch.get_num_threads()
    exact = small_model().double()(pixels.double()).last_hidden_state
    torch.set_num_threads(threads)
    try:
        error = relative_error(small_model().to(dtype)(pixels).last_hidden_state, exact)
    finally:
        torch.set_num_threads(before)
    assert error <= (1e-5 if dtype == torch.float32 else 5e-2)


def test_training_compiles_for_one_size_after_another() -> None:
    def model() -> ImageEncoderViTModel:
        return small_model(num_hidden_layers=1, global_attn_indexes=[])

    compiled = torch.compile(model(), dynamic=False, backend="aot_eager")
    for side_px in (64, 96):
        pixels, plain = random_pixels(1, 3, side_px, side_px), model()
        for one in (compiled, plain):
            one.zero_grad()
            one(pixels).last_hidden_state.square().mean().backward()
        pairs = zip(compiled.parameters(), plain.parameters(), strict=True)
        assert max(relative_error(actual.grad, expected.grad) for actual, expected in pairs) <= 1e-4
