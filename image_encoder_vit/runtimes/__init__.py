"""The encoder in other models and other runtimes. What a runtime needs is imported when it is called."""

from .drop_in import replace_sam_encoder
from .onnx_export import export_onnx
from .openvino import openvino_encoder
from .transformers_js import export_transformers_js

__all__ = ["export_onnx", "export_transformers_js", "openvino_encoder", "replace_sam_encoder"]
