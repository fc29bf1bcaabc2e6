"""Times the encoder, or the whole DeepEncoder, side by side with other implementations, on the same weights and pixels.

Every contender must agree with transformers' class first; one that does not, or that fails, gets a reason in place of
its numbers, and the status is 1. Rounds are interleaved, so that all contenders see the same machine; the ratio is the
median of the rounds' ratios. --grid measures the images and batches that fine-tuning and retrieval use.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

from .. import (
    DeepEncoder,
    DeepEncoderConfig,
    DeepEncoderModel,
    ImageEncoderViT,
    ImageEncoderViTConfig,
    ImageEncoderViTModel,
)
from ..attention import resize_pos_embed, resize_rel_pos
from ..runtimes.drop_in import replace_sam_encoder
from ..runtimes.fixed_size import FixedSizeEncoder, export_program, without_exporters_warnings
from ..runtimes.onnx_export import relative_error
from ..runtimes.openvino import compile_for_openvino
from ..storage.atomic_file import atomic_file
from ..support.text import message_of
from ..weights.naming import TRANSFORMERS
from ..weights.native_folder import native_config
from .benchmark_training import compare_training, measure_step
from .frame import run_command
from .options import command_parser

BASELINE = "transformers sdpa"
OURS = "image-encoder-vit"
DROP_IN = "transformers with drop-in"
ENCODER, DEEP_ENCODER = MODELS = ("encoder", "deep-encoder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = ("float32", "bfloat16")
# Small images, and the batches that take about as long as one of 1024 x 1024 px: (px, batch).
GRID = ((224, 1), (224, 16), (384, 1), (384, 8), (512, 1), (512, 4), (640, 1))
FLOAT32_BOUND = 1e-5  # relative error against the baseline
BFLOAT16_FACTOR = 1.15  # error of a low precision against float32, over the baseline's
GEMM_SHAPE = (4096, 768, 3072)  # lin1 at 1024 x 1024 px
SEED = 0
MODULE = "image_encoder_vit.commands.benchmark"  # To be started again, for a measure in a process of its own.
# A short pause lets the threads of one runtime stop spinning before another one's are timed.
PAUSE_S = 0.05

Run = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """One row of the table: an image size in px, a batch, a precision, and which of `MODELS`."""

    height_px: int
    width_px: int
    batch: int
    dtype: str
    model: str = ENCODER

    @property
    def pixels(self) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        pixels = torch.rand(self.batch, 3, self.height_px, self.width_px, generator=generator) * 2 - 1
        return pixels.to(DTYPES[self.dtype])

    def __str__(self) -> str:
        model = "" if self.model == ENCODER else f"{self.model}, "
        return f"{model}{self.height_px} x {self.width_px} px, batch {self.batch}, {self.dtype}"

    @property
    def contenders(self) -> "dict[str, Callable[[Case, Path | None], Run]]":
        return CONTENDERS if self.model == ENCODER else DEEP_CONTENDERS


class Result(NamedTuple):
    """What was measured of one contender in one case."""

    contender: str
    median_s: float
    spread: float
    ratio: float | None  # none without a baseline
    error: float
    gflop_per_s: float
    share_of_gemm: float
    extra_memory_mb: float | None


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(compare, parse_arguments(argv), after_interrupt="what was printed stands")


def compare(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory:
        print(measure_memory(arguments.measure_memory, arguments.cases[0], arguments.deepseek_file))
        return 0
    if arguments.measure_training:
        contender, is_checkpointed = json.loads(arguments.measure_training)
        step = measure_step(TRAINED[contender], is_checkpointed, arguments.cases[0])
        print(json.dumps(step))
        return 0
    print(describe_machine(), flush=True)
    report: dict[str, Any] = {"machine": describe_machine(), "cases": []}
    for entry in measured(arguments):
        report["cases"].append(entry)
        if arguments.json:
            with atomic_file(arguments.json) as path:
                path.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.grid:
        print_grid(report["cases"])
    if arguments.plot:
        plot(report, arguments.plot)
    return 1 if any(entry.get("refused") for entry in report["cases"]) else 0


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the report says of each case, as it comes."""
    if arguments.train:
        yield from compare_training(arguments.cases, TRAINED, arguments.rounds, arguments.threads, MODULE)
        return
    for case in arguments.cases:
        print(f"\n{case}", flush=True)
        results, refused = benchmark(case, arguments)
        print_table(results, refused)
        yield {"case": case._asdict(), "results": [result._asdict() for result in results], "refused": refused}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmark", __doc__)
    parser.add_argument("--sizes", nargs="+", default=["1024x1024"], metavar="HxW", help="image sizes in px")
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES], default=[*DEFAULT_DTYPES])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--part", choices=MODELS, default=ENCODER, help="what is timed; default: encoder")
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS, DROP_IN], default=[BASELINE, OURS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--grid", action="store_true", help="small images in batches, in place of --sizes, --batches")
    parser.add_argument(
        "--deepseek-file", type=Path, help="DeepSeek-OCR's deepencoder.py or sam_vary_sdpa.py, for 'deepseek'"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory unmeasured")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="draw the medians there (needs matplotlib)")
    parser.add_argument("--train", action="store_true", help="memory and time of a training step beside transformers'")
    parser.add_argument("--measure-training", help=argparse.SUPPRESS)
    parser.add_argument("--measure-memory", choices=[*CONTENDERS, DROP_IN], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("grid", "plot"):
        if arguments.train and getattr(arguments, name):
            parser.error(f"--train does not go with --{name}")
    sizes = [[int(side) for side in size.split("x")] for size in arguments.sizes]
    cases = [(height, width, batch) for height, width in sizes for batch in arguments.batches]
    if arguments.grid:
        cases = [(side, side, batch) for side, batch in GRID]
    arguments.cases = [Case(*case, dtype, arguments.part) for case in cases for dtype in arguments.dtypes]
    arguments.memory &= not arguments.grid
    return arguments


def describe_machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        model = names[0].strip() if names else model
    return (
        f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def random_encoder(dtype: str) -> ImageEncoderViTModel:
    """The full-size model with seeded weights, none of them zero, positions as large as a trained model's."""
    torch.manual_seed(SEED)
    model = ImageEncoderViTModel(ImageEncoderViTConfig()).eval()
    fill(model)
    return model.to(DTYPES[dtype])


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Gives every parameter a random value of a trained model's size."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "pos" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif "pos" in name:
            parameter.normal_(std=0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def random_deep_encoder() -> DeepEncoderModel:
    """The full-size DeepEncoder in float32, likewise."""
    torch.manual_seed(SEED)
    model = DeepEncoderModel(DeepEncoderConfig()).eval()
    fill(model)
    return model


def build_transformers(case: Case, attn_implementation: str) -> "FirstOutput":
    """The class of the same encoder in transformers, with the same weights."""
    module = importlib.import_module("transformers.models.unlimited_ocr.modeling_unlimited_ocr")
    config = module.UnlimitedOcrSamVisionConfig()
    native = module.UnlimitedOcrSamVisionEncoder._from_config(config, attn_implementation=attn_implementation).eval()
    weights = random_encoder("float32").encoder.state_dict()
    native.load_state_dict({TRANSFORMERS.from_published(name): weight for name, weight in weights.items()})
    return FirstOutput(native.to(DTYPES[case.dtype]))


class FirstOutput(nn.Module):
    """A transformers model as a module from pixels to features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).last_hidden_state


def train_ours() -> nn.Module:
    return FirstOutput(random_encoder("float32"))


def train_transformers() -> nn.Module:
    return build_transformers(Case(1024, 1024, 1, "float32"), "sdpa")


TRAINED = {OURS: train_ours, "transformers": train_transformers}


def run_transformers_sdpa(case: Case, deepseek_file: Path | None) -> Run:
    return build_transformers(case, "sdpa")


def run_transformers_eager(case: Case, deepseek_file: Path | None) -> Run:
    return build_transformers(case, "eager")


def run_ours(case: Case, deepseek_file: Path | None) -> Run:
    return FirstOutput(random_encoder(case.dtype))


def run_ours_compiled(case: Case, deepseek_file: Path | None) -> Run:
    model = random_encoder(case.dtype)
    for block in model.encoder.blocks:
        block.compile()
    return FirstOutput(model)


def run_deepseek(case: Case, deepseek_file: Path | None) -> Run:
    """DeepSeek's own file, which holds `build_sam_vit_b`."""
    if deepseek_file is None:
        raise ImportError("give the path of DeepSeek-OCR's deepencoder.py or sam_vary_sdpa.py with --deepseek-file")
    spec = importlib.util.spec_from_file_location("deepencoder", deepseek_file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with stand_in_for("flash_attn"):
        spec.loader.exec_module(module)
    encoder = module.build_sam_vit_b(checkpoint=None).eval()
    encoder.load_state_dict(random_encoder("float32").encoder.state_dict())
    return encoder.to(DTYPES[case.dtype])


@contextmanager
def stand_in_for(name: str) -> Iterator[None]:
    """A module that has every name and none that works, for code that imports one which it does not use."""
    if importlib.util.find_spec(name) is not None:
        yield
        return
    stand_in = ModuleType(name)
    stand_in.__getattr__ = lambda attribute: None  # type: ignore[method-assign]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


def run_segment_anything(case: Case, deepseek_file: Path | None) -> Run:
    """The original package's encoder up to the neck, then this package's two convolutions."""
    if case.height_px != case.width_px:
        raise ImportError("it takes square images only")
    module = importlib.import_module("segment_anything.modeling.image_encoder")
    normalization = functools.partial(nn.LayerNorm, eps=1e-6)
    theirs = module.ImageEncoderViT(
        img_size=case.height_px,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(2, 5, 8, 11),
        norm_layer=normalization,
    )
    return with_convolutions(theirs, case, rename=lambda name: name)


def run_timm(case: Case, deepseek_file: Path | None) -> Run:
    """
    The encoder of timm up to the neck, then this package's two convolutions. Its norms have SAM's epsilon only when
    told so: by default the blocks' is 1e-5.
    """
    timm = importlib.import_module("timm")
    size = case.height_px, case.width_px
    normalization = functools.partial(nn.LayerNorm, eps=1e-6)
    theirs = timm.create_model(
        "samvit_base_patch16", img_size=size, num_classes=0, global_pool="", norm_layer=normalization
    )
    return with_convolutions(theirs, case, rename=lambda name: name.replace("mlp.lin", "mlp.fc"))


def with_convolutions(theirs: nn.Module, case: Case, rename: Callable[[str], str]) -> Run:
    """A peer that ends with the neck, with this package's weights and the convolutions that follow it."""
    ours = with_baked_positions(random_encoder("float32").encoder, case)
    grid = case.height_px // ours.patch_size, case.width_px // ours.patch_size
    weights = {rename(name): weight for name, weight in ours.state_dict().items() if not name.startswith("net_")}
    for name, table in theirs.state_dict().items():
        for side, length in zip(("rel_pos_h", "rel_pos_w"), grid, strict=True):
            if name.endswith(side) and table.shape != weights[name].shape:
                weights[name] = resize_rel_pos(weights[name], length)
    theirs.load_state_dict(weights)
    return nn.Sequential(theirs, ours.net_2, ours.net_3).eval().to(DTYPES[case.dtype])


def run_openvino(case: Case, deepseek_file: Path | None) -> Run:
    """The class of transformers, converted by OpenVINO."""
    native = build_transformers(case._replace(dtype="float32"), "sdpa")
    with_baked_positions(native.model, case)
    with torch.no_grad(), without_exporters_warnings():
        program = torch.export.export(native, (case._replace(dtype="float32").pixels,), strict=False)
    return in_openvino(program, case)


def run_openvino_ours(case: Case, deepseek_file: Path | None) -> Run:
    """The encoder of this package, as `openvino_encoder` runs it."""
    encoder = FixedSizeEncoder(random_encoder("float32"), (case.height_px, case.width_px), chunked=False)
    return in_openvino(export_program(encoder), case)


def with_baked_positions(encoder: Any, case: Case) -> Any:
    """The encoder with `pos_embed` resized for the case: exporters have no antialiased bicubic resize."""
    grid = case.height_px // 16, case.width_px // 16
    encoder.pos_embed = nn.Parameter(resize_pos_embed(encoder.pos_embed.detach(), grid))
    return encoder


def in_openvino(program: ExportedProgram, case: Case) -> Run:
    """A graph whose first output is the feature map, run by OpenVINO in the precision of the case."""
    if case.dtype == "float16":
        raise ImportError("it takes float32 and bfloat16 here")
    precision = {"float32": "fp32", "bfloat16": "bf16"}[case.dtype]
    shape = (case.batch, 3, case.height_px, case.width_px)
    compiled = compile_for_openvino(program, shape, precision, torch.get_num_threads())
    return lambda pixels: torch.from_numpy(compiled([pixels.to(torch.float32).numpy()])[0])


def run_onnxruntime(case: Case, deepseek_file: Path | None) -> Run:
    """The class of transformers, exported to ONNX, in ONNX Runtime; float32 only."""
    if case.dtype != "float32":
        raise ImportError("its CPU kernels take float32 only")
    onnxruntime = importlib.import_module("onnxruntime")
    pixels = case.pixels
    native = build_transformers(case, "sdpa")
    with_baked_positions(native.model, case)
    with torch.no_grad():
        program = torch.onnx.export(native, (pixels,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    name = session.get_inputs()[0].name
    return lambda pixels: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0])


CONTENDERS: dict[str, Callable[[Case, Path | None], Run]] = {
    BASELINE: run_transformers_sdpa,
    "transformers eager": run_transformers_eager,
    OURS: run_ours,
    f"{OURS} compiled": run_ours_compiled,
    "deepseek": run_deepseek,
    "segment-anything": run_segment_anything,
    "timm": run_timm,
    "openvino": run_openvino,
    f"openvino of {OURS}": run_openvino_ours,
    "onnxruntime": run_onnxruntime,
}


class Cells(nn.Module):
    """A whole vision model as a module from pixels to the projected cells (B, h * w, 1280): ours, or transformers'."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.model, DeepEncoderModel):
            return self.model(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
        return self.model.multi_modal_projector(self.model.vision_tower(pixel_values).last_hidden_state)


def build_native_deep_encoder(case: Case) -> Any:
    """Unlimited-OCR of transformers without its decoder, with the weights of `random_deep_encoder`."""
    ours = random_deep_encoder()
    module = importlib.import_module("transformers.models.unlimited_ocr")
    config = module.UnlimitedOcrConfig(**native_config(ours.config))
    native = module.UnlimitedOcrModel._from_config(config, attn_implementation="sdpa").eval()
    parts = {
        native.vision_tower.sam_encoder: {
            TRANSFORMERS.from_published(n): w for n, w in ours.sam_model.state_dict().items()
        },
        native.vision_tower.vision_encoder: dict(split_queries_keys_and_values(ours.vision_model.state_dict())),
        native.multi_modal_projector: ours.projector.layers.state_dict(),
    }
    for part, weights in parts.items():
        part.load_state_dict(weights)
    return native.to(DTYPES[case.dtype])


def split_queries_keys_and_values(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """CLIP's weights by the names that transformers has in memory."""
    for name, weight in weights.items():
        native = name.replace("transformer.", "encoder.")
        if ".qkv_proj." not in native:
            yield native, weight
            continue
        for part, rows in zip("qkv", weight.chunk(3), strict=True):
            yield native.replace("qkv_proj", f"{part}_proj"), rows


def run_deep_transformers(case: Case, deepseek_file: Path | None) -> Run:
    return Cells(build_native_deep_encoder(case))


def run_deep_drop_in(case: Case, deepseek_file: Path | None) -> Run:
    """The same with this package's blocks and linear layers put in."""
    native = build_native_deep_encoder(case)
    replace_sam_encoder(native)
    return Cells(native)


def run_deep_ours(case: Case, deepseek_file: Path | None) -> Run:
    return Cells(random_deep_encoder().to(DTYPES[case.dtype]))


DEEP_CONTENDERS: dict[str, Callable[[Case, Path | None], Run]] = {
    BASELINE: run_deep_transformers,
    DROP_IN: run_deep_drop_in,
    OURS: run_deep_ours,
}


@torch.inference_mode()
def benchmark(case: Case, arguments: argparse.Namespace) -> tuple[list[Result], dict[str, str]]:
    """Results of the contenders that agree with the baseline; the reasons of those that cannot be timed."""
    names = list(dict.fromkeys([BASELINE, *arguments.contenders]))
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    exact = None
    for name in names:
        if name not in case.contenders:
            print(f"  {name}: not available: it is none of {case.model}")
            continue
        try:
            if exact is None:
                in_float32 = case._replace(dtype="float32")
                exact = case.contenders[BASELINE](in_float32, None)(case.pixels.to(torch.float32))
            run = case.contenders[name](case, arguments.deepseek_file)
            errors[name] = relative_error(run(case.pixels), exact)
        except Exception as error:  # Whatever a peer's code raises costs its own row only.
            refused[name] = reason_of(error)
            continue
        bound = FLOAT32_BOUND if case.dtype == "float32" else BFLOAT16_FACTOR * errors.get(BASELINE, torch.inf)
        if errors[name] <= bound:
            runs[name] = run
        else:
            refused[name] = f"error {errors[name]:.1e} exceeds {bound:.1e}"

    times: dict[str, list[float]] = {name: [] for name in runs}
    gemm_rates = []
    for _ in range(arguments.rounds):
        gemm_rates.append(gemm_gflop_per_s(DTYPES[case.dtype]))
        for name, run in list(runs.items()):
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            try:
                run(case.pixels)
            except Exception as error:
                refused[name] = reason_of(error)
                del runs[name]
                continue
            times[name].append(time.perf_counter() - start)
    gemm_rate = statistics.median(gemm_rates)
    gflop = count_gflop(case)
    results = []
    for name in runs:
        seconds, theirs = times[name], times.get(BASELINE) if BASELINE in runs else None
        median_s = statistics.median(seconds)
        memory_mb = None
        if arguments.memory:
            try:
                memory_mb = memory_of(name, case, arguments)
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                refused[f"memory of {name}"] = reason_of(error)
        results.append(
            Result(
                contender=name,
                median_s=median_s,
                spread=(max(seconds) - min(seconds)) / median_s,
                ratio=statistics.median(a / b for a, b in zip(theirs, seconds, strict=True)) if theirs else None,
                error=errors[name],
                gflop_per_s=gflop / median_s,
                share_of_gemm=gflop / median_s / gemm_rate,
                extra_memory_mb=memory_mb,
            )
        )
    return results, refused


def reason_of(error: Exception) -> str:
    """In one line why a contender has no numbers."""
    if isinstance(error, subprocess.CalledProcessError):
        return message_of(RuntimeError((error.stderr or "").strip().rpartition("\n")[2] or str(error)))
    prefix = "not available: " if isinstance(error, ImportError) else f"{type(error).__name__}: "
    return prefix + message_of(error)


def count_gflop(case: Case) -> float:
    """What one forward pass must compute: projections of real tokens only, attention of whole windows."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = ImageEncoderViT() if case.model == ENCODER else DeepEncoder()
        model(torch.empty(case.batch, 3, case.height_px, case.width_px), attn_implementation="eager")
    return counter.get_total_flops() / 1e9


def gemm_gflop_per_s(dtype: torch.dtype) -> float:
    """The machine's matrix rate: the better of PyTorch's linear layer and oneDNN's 1 x 1 convolution."""
    rows, inner, columns = GEMM_SHAPE
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    image = left.view(1, 64, 64, inner).permute(0, 3, 1, 2)
    rates = []
    for multiply in (lambda: F.linear(left, right), lambda: F.conv2d(image, right[:, :, None, None])):
        multiply()
        start = time.perf_counter()
        multiply()
        rates.append(2 * rows * inner * columns / 1e9 / (time.perf_counter() - start))
    return max(rates)


def memory_of(name: str, case: Case, arguments: argparse.Namespace) -> float | None:
    """Peak memory in MB beyond what is held before the forward pass, in a process of its own; Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [
        sys.executable,
        "-m",
        MODULE,
        "--measure-memory",
        name,
        "--threads",
        str(arguments.threads),
        "--part",
        case.model,
    ]
    command += ["--sizes", f"{case.height_px}x{case.width_px}", "--batches", str(case.batch), "--dtypes", case.dtype]
    if arguments.deepseek_file:
        command += ["--deepseek-file", str(arguments.deepseek_file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(result.stdout.strip().splitlines()[-1])


@torch.inference_mode()
def measure_memory(name: str, case: Case, deepseek_file: Path | None) -> float:
    run = case.contenders[name](case, deepseek_file)
    pixels = case.pixels
    # A small image first, where the size is free: libraries allocate on first use.
    if not name.startswith(("openvino", "onnxruntime", "segment-anything", "timm")):
        run(case._replace(height_px=64, width_px=64).pixels)
    before_kb = memory_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run(pixels)
    return (memory_kb("VmHWM") - before_kb) * 1024 / 1e6


def memory_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}.")


def print_table(results: Sequence[Result], refused: dict[str, str]) -> None:
    header = ["contender", "median s", "spread", "x baseline", "error", "GFLOP/s", "of GEMM", "extra MB"]
    rows = [
        [
            r.contender,
            f"{r.median_s:.2f}",
            f"{r.spread:.0%}",
            "-" if r.ratio is None else f"{r.ratio:.2f}",
            f"{r.error:.1e}",
            f"{r.gflop_per_s:.0f}",
            f"{r.share_of_gemm:.0%}",
            "-" if r.extra_memory_mb is None else f"{r.extra_memory_mb:.0f}",
        ]
        for r in results
    ]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    for name, reason in refused.items():
        print(f"refused: {name}: {reason}")
    sys.stdout.flush()


def print_grid(cases: Sequence[dict[str, Any]]) -> None:
    """The table of `--grid`: milliseconds for an image and the ratio to the baseline, a row for each size and batch."""
    dtypes = list(dict.fromkeys(entry["case"]["dtype"] for entry in cases))
    columns = [f"{dtype}, {what}" for dtype in dtypes for what in ("ms an image", "x baseline")]
    print("\n| px | batch | " + " | ".join(columns) + " |\n|" + "---|" * (2 + len(columns)))
    rows: dict[tuple[int, int], list[str]] = {}
    for entry in cases:
        side, batch = entry["case"]["height_px"], entry["case"]["batch"]
        ours = next((result for result in entry["results"] if result["contender"] == OURS), None)
        cells = ["-", "-"]
        if ours is not None:
            cells = [f"{ours['median_s'] / batch * 1e3:.0f}", "-" if ours["ratio"] is None else f"{ours['ratio']:.2f}"]
        rows.setdefault((side, batch), []).extend(cells)
    for (side, batch), cells in rows.items():
        print(f"| {side} | {batch} | " + " | ".join(cells) + " |")
    sys.stdout.flush()


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the medians, a group for each case; from three sizes or batches on, how time and memory grow."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    cases = report["cases"]
    if len({case_megapixels(entry) for entry in cases}) >= 3:
        figure = plot_growth(pyplot, cases)
    else:
        figure, axes = pyplot.subplots(1, len(cases), figsize=(4 * len(cases), 4), squeeze=False, layout="constrained")
        for axis, entry in zip(axes[0], cases, strict=True):
            names = [result["contender"] for result in entry["results"]]
            bars = axis.barh(names[::-1], [result["median_s"] for result in entry["results"]][::-1])
            axis.bar_label(bars, [figures_of(result) for result in entry["results"]][::-1], fontsize=7, padding=2)
            axis.margins(x=0.35)
            axis.set_title(str(Case(**entry["case"])), fontsize=8)
            axis.set_xlabel("median s")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def figures_of(result: dict[str, Any]) -> str:
    """What a bar is labelled with: "2.39 s, 3.14 x" the baseline's speed."""
    ratio = "" if result["ratio"] is None else f", {result['ratio']:.2f} x"
    return f"{result['median_s']:.2f} s{ratio}"


def plot_growth(pyplot: Any, cases: Sequence[dict[str, Any]]) -> Any:
    """Time and memory against the megapixels of a batch, a line for each contender and precision."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    lines: dict[str, list[tuple[float, float, float | None]]] = {}
    for entry in cases:
        for result in entry["results"]:
            label = f"{result['contender']}, {entry['case']['dtype']}"
            measured = case_megapixels(entry), result["median_s"], result["extra_memory_mb"]
            lines.setdefault(label, []).append(measured)
    for label, points in lines.items():
        megapixels, seconds, memory_mb = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        axes[0].plot(megapixels, seconds, marker="o", label=label)
        if None not in memory_mb:
            axes[1].plot(megapixels, memory_mb, marker="o", label=label)
    sizes = sorted({case_megapixels(entry) for entry in cases})
    for axis, unit in zip(axes, ("median s", "MB beyond the weights"), strict=True):
        axis.set(xlabel="megapixels in the batch", ylabel=unit, xscale="log", yscale="log")
        axis.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
        axis.set_xticks([], minor=True)
    axes[0].legend(fontsize=7)
    return figure


def case_megapixels(entry: dict[str, Any]) -> float:
    case = Case(**entry["case"])
    return case.batch * case.height_px * case.width_px / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
