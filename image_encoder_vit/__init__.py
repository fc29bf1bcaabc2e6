"""SAM's ViT image encoder for transformers. Importing the package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel

from .configuration_image_encoder_vit import ImageEncoderViTConfig
from .modeling_image_encoder_vit import ImageEncoderViT, ImageEncoderViTModel, ImageEncoderViTModelOutput

AutoConfig.register(ImageEncoderViTConfig.model_type, ImageEncoderViTConfig)
AutoModel.register(ImageEncoderViTConfig, ImageEncoderViTModel)
ImageEncoderViTConfig.register_for_auto_class()
ImageEncoderViTModel.register_for_auto_class("AutoModel")
