"""SAM's ViT image encoder for transformers. Importing the package registers its classes with the Auto classes."""

__version__ = "0.1.0"

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import is_torchvision_available

from .configuration_deep_encoder import DeepEncoderConfig
from .configuration_image_encoder_vit import ImageEncoderViTConfig
from .feature_maps import FeatureMap, ImageFeatureMaps, cell_vectors, stitch_tiles
from .image_geometry import cell_to_pixels
from .image_processing_image_encoder_vit import ImageEncoderViTImageProcessor, ImageEncoderViTImageProcessorPil
from .modeling_deep_encoder import DeepEncoder, DeepEncoderModel, DeepEncoderModelOutput
from .modeling_image_encoder_vit import (
    ImageEncoderViT,
    ImageEncoderViTBackbone,
    ImageEncoderViTForImageClassification,
    ImageEncoderViTModel,
    ImageEncoderViTModelOutput,
)

AutoConfig.register(ImageEncoderViTConfig.model_type, ImageEncoderViTConfig)
AutoModel.register(ImageEncoderViTConfig, ImageEncoderViTModel)
AutoModelForImageClassification.register(ImageEncoderViTConfig, ImageEncoderViTForImageClassification)
AutoBackbone.register(ImageEncoderViTConfig, ImageEncoderViTBackbone)
AutoConfig.register(DeepEncoderConfig.model_type, DeepEncoderConfig)
AutoModel.register(DeepEncoderConfig, DeepEncoderModel)
_image_processors: dict[str, type] = {"pil": ImageEncoderViTImageProcessorPil}
if is_torchvision_available():
    _image_processors["torchvision"] = ImageEncoderViTImageProcessor
for _config_class in (ImageEncoderViTConfig, DeepEncoderConfig):
    AutoImageProcessor.register(_config_class, image_processor_classes=_image_processors)

# save_pretrained then writes the code beside the weights, so that they load where this package is not installed.
ImageEncoderViTConfig.register_for_auto_class()
ImageEncoderViTModel.register_for_auto_class("AutoModel")
ImageEncoderViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ImageEncoderViTBackbone.register_for_auto_class("AutoBackbone")
DeepEncoderConfig.register_for_auto_class()
DeepEncoderModel.register_for_auto_class("AutoModel")
ImageEncoderViTImageProcessorPil.register_for_auto_class("AutoImageProcessor")
ImageEncoderViTImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = [
    "DeepEncoder",
    "DeepEncoderConfig",
    "DeepEncoderModel",
    "DeepEncoderModelOutput",
    "FeatureMap",
    "ImageEncoderViT",
    "ImageEncoderViTBackbone",
    "ImageEncoderViTConfig",
    "ImageEncoderViTForImageClassification",
    "ImageEncoderViTImageProcessor",
    "ImageEncoderViTImageProcessorPil",
    "ImageEncoderViTModel",
    "ImageEncoderViTModelOutput",
    "ImageFeatureMaps",
    "__version__",
    "cell_to_pixels",
    "cell_vectors",
    "stitch_tiles",
]
