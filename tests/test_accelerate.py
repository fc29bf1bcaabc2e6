"""The encoder under Accelerate's placement: split over devices, offloaded to memory and to the disk."""

from pathlib import Path

import pytest
import torch
from accelerate import (
    cpu_offload,
    disk_offload,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from accelerate.utils import compute_module_sizes
from builders import random_pixels, relative_error, small_model
from transformers import AutoModel

from image_encoder_vit import ImageEncoderViT, ImageEncoderViTConfig, ImageEncoderViTModel

PLENTY = 1 << 40
MIB = 1 << 20

# Accelerate names a parameter beside modules in the map and then warns of its own entry; it is placed all the same.
pos_embed_apart = pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")


def expected_features(pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return small_model()(pixels).last_hidden_state


def assert_same_output(model: torch.nn.Module) -> None:
    for shape in ((2, 3, 128, 128), (1, 3, 112, 80)):
        pixels = random_pixels(*shape)
        with torch.no_grad():
            assert relative_error(model(pixels).last_hidden_state, expected_features(pixels)) <= 1e-6
        with torch.enable_grad():  # the path of training, which offloaded weights do not record
            assert relative_error(model(pixels).last_hidden_state, expected_features(pixels)) <= 1e-6


@pos_embed_apart
@pytest.mark.parametrize(
    ("share_in_memory", "on_disk"),
    [
        (0.02, {""}),  # nothing fits
        (0.6, {"encoder.blocks", "encoder.neck", "encoder.net_2", "encoder.net_3"}),
        (0.9, {"encoder.blocks.2", "encoder.blocks.3", "encoder.neck", "encoder.net_2", "encoder.net_3"}),
    ],
)
def test_auto_placement_with_too_little_memory(
    share_in_memory: float, on_disk: set[str], model_folder: str, tmp_path: Path
) -> None:
    size = compute_module_sizes(small_model())[""]
    model = AutoModel.from_pretrained(
        model_folder,
        device_map="auto",
        max_memory={"cpu": int(share_in_memory * size), "disk": PLENTY},
        offload_folder=tmp_path,
    )
    assert {name for name, device in model.hf_device_map.items() if device == "disk"} == on_disk
    assert any(weight.is_meta for weight in model.parameters())
    assert_same_output(model)


@pos_embed_apart
@pytest.mark.parametrize("blocks_on_disk", [(), (1, 2), (0, 1, 2, 3)])
def test_an_empty_model_is_filled_and_dispatched(
    blocks_on_disk: tuple[int, ...], model_folder: str, tmp_path: Path
) -> None:
    with init_empty_weights():
        model = ImageEncoderViTModel(ImageEncoderViTConfig.from_pretrained(model_folder))
    assert all(weight.is_meta for weight in model.parameters())
    parts = ["pos_embed", "patch_embed", *(f"blocks.{index}" for index in range(4)), "neck", "net_2", "net_3"]
    disk = {f"blocks.{index}" for index in blocks_on_disk}
    device_map = {f"encoder.{part}": "disk" if part in disk else "cpu" for part in parts}
    model = load_checkpoint_and_dispatch(model, model_folder, device_map=device_map, offload_folder=tmp_path)
    assert {name.split(".")[2] for name, weight in model.named_parameters() if weight.is_meta} == set(
        map(str, blocks_on_disk)
    )
    assert_same_output(model.eval())


def test_offloading_to_memory_and_disk(tmp_path: Path) -> None:
    in_memory = cpu_offload(small_model(), execution_device=torch.device("cpu"))
    on_disk = disk_offload(small_model(), tmp_path, execution_device=torch.device("cpu"))
    for model in (in_memory, on_disk):
        assert all(weight.is_meta for weight in model.parameters())
        assert_same_output(model)
    assert len(list(tmp_path.glob("*.dat"))) == len(list(small_model().parameters()))


@pytest.mark.parametrize("first_mib", range(30, 240, 10))
def test_no_block_is_split_over_devices(first_mib: int) -> None:
    """On paper, for the full-size encoder (365 MiB in float32) and two devices of which the first gets ever more."""
    with torch.device("meta"):
        model = ImageEncoderViTModel(ImageEncoderViTConfig())
    device_map = infer_auto_device_map(
        model,
        max_memory={0: first_mib * MIB, 1: PLENTY, "cpu": PLENTY},
        no_split_module_classes=model._no_split_modules,
    )
    devices: dict[str, set[object]] = {}
    for name, _ in model.named_parameters():
        entries = [key for key in device_map if key in ("", name) or name.startswith(f"{key}.")]
        assert len(entries) == 1, name
        part = ".".join(name.split(".")[1 : 3 if ".blocks." in name else 2])
        devices.setdefault(part, set()).add(device_map[entries[0]])
    assert len(devices) == 17  # pos_embed, patch_embed, 12 blocks, neck, net_2, net_3
    assert all(len(placed) == 1 for placed in devices.values()), devices
    in_order = ["pos_embed", "patch_embed", *(f"blocks.{index}" for index in range(12)), "neck", "net_2", "net_3"]
    numbers = [next(iter(devices[part])) for part in in_order]
    assert numbers == sorted(numbers)  # each device gets one stretch of the encoder
    if first_mib >= 60:
        assert devices["pos_embed"] == devices["patch_embed"] == {0}


def test_auto_placement_may_part_the_positions_from_the_patches() -> None:
    """Why the forward pass moves the positions: a first device that holds them and no more is given them alone."""
    with torch.device("meta"):
        model = ImageEncoderViTModel(ImageEncoderViTConfig())
    sizes = compute_module_sizes(model)
    room = sizes["encoder.pos_embed"] + max(sizes[f"encoder.blocks.{index}"] for index in range(12)) + MIB
    device_map = infer_auto_device_map(
        model, max_memory={0: room, 1: PLENTY, "cpu": PLENTY}, no_split_module_classes=model._no_split_modules
    )
    assert device_map["encoder.pos_embed"] == 0
    assert {device for name, device in device_map.items() if name != "encoder.pos_embed"} == {1}


def test_positions_on_another_device_follow_the_patches() -> None:
    # The meta device stands in for a second one: mixed with the CPU it is an error as two accelerators are.
    with torch.device("meta"):
        encoder = ImageEncoderViT(img_size=128, embed_dim=32, depth=1, num_heads=2, global_attn_indexes=[])
        pixels = torch.empty(1, 3, 112, 80)
    encoder.pos_embed = torch.nn.Parameter(torch.ones(1, 8, 8, 32))
    assert encoder.pos_embed.device.type == "cpu"
    with pytest.raises(RuntimeError, match="device"):
        _ = encoder.patch_embed(pixels) + encoder.pos_embed[:, :7, :5]
    features = encoder(pixels)
    assert features.device.type == "meta"
    assert tuple(features.shape) == (1, 1024, 2, 2)
