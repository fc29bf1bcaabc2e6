"""
transformers' own common suites against this package's classes. `suites_not_applicable.py` lists the tests that do not
apply; `suite_outcomes.py` holds every test to that list.
"""

import contextlib
import functools
import os
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
import transformers
import transformers_suites
from builders import random_pixels
from suites_not_applicable import NOT_APPLICABLE
from torch import nn
from transformers import pipeline
from transformers.utils import is_torchvision_available

from image_encoder_vit import (
    ImageEncoderViTBackbone,
    ImageEncoderViTConfig,
    ImageEncoderViTForImageClassification,
    ImageEncoderViTImageProcessor,
    ImageEncoderViTImageProcessorPil,
    ImageEncoderViTModel,
)

try:
    SUITES = transformers_suites.load()
except transformers_suites.SuitesUnavailable as unavailable:
    # A CI that cannot fetch them has to say so; a laptop without a network has not.
    if os.environ.get("CI") == "true" and transformers.__version__ == transformers_suites.PINNED:
        raise
    pytest.skip(str(unavailable), allow_module_level=True)

# The suites are written for a run without warnings as errors, and warn of themselves.
pytestmark = pytest.mark.filterwarnings("default")

# Two blocks, one of each kind, as the suites ask for. The suites know one length of sequences, so a window has as many
# patches as a row of the grid, 4; the grid of 3 x 4 patches ends within a window.
SMALLEST = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "output_channels": 16,
    "downsample_channels": [24, 32],
    "window_size": 2,
    "global_attn_indexes": [1],
}


# Tests that load checkpoints without all the weights, which takes `strict=False` here.
LENIENT = ("test_can_init_all_missing_weights", "test_model_weights_reload_no_missing_tied_weights")


class EncoderTester:
    """What the suites ask of a model's test: small configurations, and inputs for them."""

    is_training = True
    batch_size = 3
    seq_length = 4

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        for name, value in SMALLEST.items():
            setattr(self, name, value)

    def get_config(self) -> ImageEncoderViTConfig:
        return ImageEncoderViTConfig(**SMALLEST)

    def prepare_config_and_inputs_for_common(self) -> tuple[ImageEncoderViTConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {"pixel_values": random_pixels(self.batch_size, 3, 48, 64)}


class SuiteTestCase(unittest.TestCase):
    """A failure or skip within a subtest is the test's own, so that each test has one outcome."""

    def subTest(self, *_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Model(SUITES["modeling_common"].ModelTesterMixin, SuiteTestCase):
    all_model_classes = (ImageEncoderViTModel, ImageEncoderViTForImageClassification, ImageEncoderViTBackbone)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = EncoderTester(self)
        if self._testMethodName in LENIENT:
            for model_class in self.all_model_classes:
                lenient = functools.partial(model_class.from_pretrained, strict=False)
                self.enterContext(patch.object(model_class, "from_pretrained", lenient))
        # The suite tells by transformers' lists of its own classes which ones have a loss and take which labels.
        kinds = {"MODEL": "Model", "MODEL_FOR_IMAGE_CLASSIFICATION": "ForImageClassification"}
        kinds["MODEL_FOR_BACKBONE"] = "Backbone"
        for kind, suffix in kinds.items():
            listed = {ImageEncoderViTConfig.model_type: f"ImageEncoderViT{suffix}"}
            self.enterContext(patch.object(SUITES["modeling_common"], f"{kind}_MAPPING_NAMES", listed))


class Backbone(SUITES["backbone_common"].BackboneTesterMixin, SuiteTestCase):
    all_model_classes = (ImageEncoderViTBackbone,)
    config_class = ImageEncoderViTConfig

    def setUp(self) -> None:
        self.model_tester = EncoderTester(self)


def config_test(name: str) -> Any:
    def test(self: "Config") -> None:
        getattr(self.config_tester, name)()

    return test


class Config(SuiteTestCase):
    """Each check of ConfigTester as a test of its own."""

    def setUp(self) -> None:
        self.model_tester = EncoderTester(self)
        tester_class = SUITES["configuration_common"].ConfigTester
        self.config_tester = tester_class(self, config_class=ImageEncoderViTConfig, has_text_modality=False, **SMALLEST)

    for _name in dir(SUITES["configuration_common"].ConfigTester):
        if _name.startswith(("create_and_test_", "check_")):
            locals()[f"test_{_name}"] = config_test(_name)


class ImageProcessorTester(SUITES["image_processing_common"].ImageProcessingTester):
    """Small images for the processors, and what they have to make of them."""

    def __init__(self, parent: unittest.TestCase) -> None:
        super().__init__(parent, size={"height": 64, "width": 64}, do_normalize=True, image_mean=[0.5, 0.5, 0.5])

    def _get_image_processing_classes(self) -> dict[str, type]:
        backends = {"pil": ImageEncoderViTImageProcessorPil}
        return backends | ({"torchvision": ImageEncoderViTImageProcessor} if is_torchvision_available() else {})


class ImageProcessing(SUITES["image_processing_common"].ImageProcessingTestMixin, SuiteTestCase):
    image_processor_tester_class = ImageProcessorTester


class ImageFeatureExtractionPipelineTests:
    """
    Stands for transformers' test of the pipeline, which the archive lacks: features as the model returns them, pooled
    on request, from every kind of input.
    """

    def get_test_pipeline(self, model: nn.Module, tokenizer: None, image_processor: Any, dtype: str) -> tuple[Any, Any]:
        extract = pipeline("image-feature-extraction", model=model, image_processor=image_processor, dtype=dtype)
        page = Path(transformers_suites.ROOT / "samples" / "page.png")
        return extract, [str(page), image_processor.fetch_images(str(page))]

    def run_pipeline_test(self, extract: Any, examples: list[Any]) -> None:
        expected = extract.model(**extract.image_processor(examples[0], return_tensors="pt").to(extract.model.dtype))
        for example in examples:
            torch.testing.assert_close(torch.tensor(extract(example)), expected.last_hidden_state.float())
            torch.testing.assert_close(torch.tensor(extract(example, pool=True)), expected.pooler_output.float())
        assert len(extract(examples)) == len(examples)


class ImageClassificationPipelineTests:
    """The same for labels: those of the configuration, the likeliest first, with the model's own probabilities."""

    def get_test_pipeline(self, model: nn.Module, tokenizer: None, image_processor: Any, dtype: str) -> tuple[Any, Any]:
        classify = pipeline("image-classification", model=model, image_processor=image_processor, dtype=dtype)
        page = Path(transformers_suites.ROOT / "samples" / "page.png")
        return classify, [str(page), image_processor.fetch_images(str(page))]

    def run_pipeline_test(self, classify: Any, examples: list[Any]) -> None:
        inputs = classify.image_processor(examples[0], return_tensors="pt").to(classify.model.dtype)
        scores = classify.model(**inputs).logits[0].float().softmax(-1)
        order = scores.argsort(descending=True).tolist()
        for example in examples:
            found = classify(example)
            assert [entry["label"] for entry in found] == [classify.model.config.id2label[index] for index in order]
            torch.testing.assert_close(torch.tensor([entry["score"] for entry in found]), scores[order])
        assert len(classify(examples, top_k=1)) == len(examples)


class Pipeline(SUITES["pipeline_mixin"].PipelineTesterMixin, SuiteTestCase):
    pipeline_model_mapping: ClassVar = {
        "image-feature-extraction": ImageEncoderViTModel,
        "image-classification": ImageEncoderViTForImageClassification,
    }

    def setUp(self) -> None:
        # The suite loads models and processors by name out of such a folder, and transformers.
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        processor = "ImageEncoderViTImageProcessorPil"
        for model_class in self.pipeline_model_mapping.values():
            saved = folder / ImageEncoderViTConfig.model_type / model_class.__name__
            model_class(EncoderTester(self).get_config()).save_pretrained(saved)
            ImageEncoderViTImageProcessorPil(size=64).save_pretrained(saved)
        tests = (ImageFeatureExtractionPipelineTests, ImageClassificationPipelineTests)
        self.enterContext(
            patch.multiple(
                SUITES["pipeline_mixin"],
                TRANSFORMERS_TINY_MODEL_PATH=str(folder),
                tiny_model_summary={
                    model_class.__name__: {"tokenizer_classes": [], "processor_classes": [processor]}
                    for model_class in self.pipeline_model_mapping.values()
                },
                transformers_module=SimpleNamespace(**{processor: ImageEncoderViTImageProcessorPil}),
                pipeline_test_mapping={
                    task: {"test": f"{__name__}.{test.__name__}"}
                    for task, test in zip(self.pipeline_model_mapping, tests, strict=True)
                },
            )
        )


class Training(SUITES["training_mixin"].TrainingTesterMixin, SuiteTestCase):
    """The suite makes batches for language models only and would refuse images, so it is handed a batch of them."""

    model_tester: ClassVar = None
    all_model_classes = (ImageEncoderViTForImageClassification,)
    training_overfit_steps = 60

    def setUp(self) -> None:
        tester = EncoderTester(self)
        config = tester.get_config()
        config.vocab_size = 0  # Read for the batch of text, and not used here.
        tester.get_config = lambda: config
        self.enterContext(patch.object(type(self), "model_tester", tester))

    def _get_model_modality(self) -> str:
        return "text"

    def _create_text_training_batch(self, batch_size: int, **_: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": random_pixels(batch_size, 3, 64, 64), "labels": torch.arange(batch_size) % 2}


ALL_SUITES = {suite.__name__: suite for suite in (Model, Backbone, Config, ImageProcessing, Pipeline, Training)}


def test_the_list_of_tests_that_do_not_apply_names_tests_once() -> None:
    assert NOT_APPLICABLE.keys() <= ALL_SUITES.keys()
    for suite, reasons in NOT_APPLICABLE.items():
        names = [name for listed in reasons.values() for name in listed]
        assert len(names) == len(set(names))
        assert set(names) <= set(unittest.TestLoader().getTestCaseNames(ALL_SUITES[suite]))


def test_the_documentation_has_the_counts() -> None:
    total = sum(unittest.TestLoader().loadTestsFromTestCase(suite).countTestCases() for suite in ALL_SUITES.values())
    listed = sum(len(names) for reasons in NOT_APPLICABLE.values() for names in reasons.values())
    page = " ".join((transformers_suites.ROOT / "docs" / "measurements.md").read_text().split())
    assert f"{total - listed} tests pass, {listed} do not apply" in page
