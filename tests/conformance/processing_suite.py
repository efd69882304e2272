"""transformers' common tests of image processors, tokenizers, processors and pipelines, with the tiny model's."""

import tempfile
import unittest
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import visualglm_hf
from tests import test_pipeline_mixin, test_processing_common
from tests.paths import ROOT
from tests.test_image_processing_common import ImageProcessingTestMixin, prepare_image_inputs
from tests.test_tokenization_common import TokenizerTesterMixin
from visualglm_hf import (
    ChatGLMTokenizer,
    VisualGLMConfig,
    VisualGLMForConditionalGeneration,
    VisualGLMImageProcessor,
    VisualGLMProcessor,
)


TINY_MODEL = str(ROOT / "models" / "visualglm-tiny")
PICTURES = [str(path) for path in sorted((ROOT / "tests" / "golden" / "images").iterdir())]
TRANSFORMERS = Path(test_pipeline_mixin.__file__).parents[1]

visualglm_hf.register()


class VisualGLMImageProcessingTester:
    image_processing_classes = {"pil": VisualGLMImageProcessor}
    batch_size = 7
    num_channels = 3
    size = {"height": 20, "width": 20}

    def __init__(self, parent):
        self.parent = parent

    def prepare_image_processor_dict(self) -> dict:
        return {"size": self.size}

    def expected_output_image_shape(self, images) -> tuple[int, int, int]:
        return self.num_channels, self.size["height"], self.size["width"]

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False) -> list:
        return prepare_image_inputs(
            batch_size=self.batch_size,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=400,
            equal_resolution=equal_resolution,
            numpify=numpify,
            torchify=torchify,
        )


class VisualGLMImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = VisualGLMImageProcessingTester
    test_cast_dtype = True

    @unittest.skip("The model sees RGB: pictures of four channels lose their alpha, whatever is asked for.")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip("PIL alone gives the original's pictures bit for bit.")
    def test_new_models_require_torchvision_backend(self):
        pass

    @unittest.skip("Looks for the module of a model inside transformers; this one is outside.")
    def test_pil_can_load_without_torchvision(self):
        pass

    @unittest.skip("Looks for the class in another process by its name, which only transformers' own have there.")
    def test_pil_can_run_without_torchvision(self):
        pass

    def setUp(self):
        # What the mixin's own setUp does since 5.20; before, each class did it.
        self.image_processor_tester = self.image_processor_tester_class(self)


class ChatGLMTokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = ChatGLMTokenizer
    from_pretrained_id = [TINY_MODEL]
    test_tokenizer_from_extractor = False
    test_seq2seq = False


class VisualGLMProcessorTest(test_processing_common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VisualGLMProcessor
    model_id = TINY_MODEL

    def setUp(self):
        # The mixin's pictures are downloads.
        self.enterContext(patch.dict(test_processing_common.MODALITY_INPUT_DATA, {"images": PICTURES[:2]}))
        self.enterContext(patch.object(test_processing_common, "url_to_local_path", lambda url: PICTURES[0]))

    @unittest.skip("The positions of characters in a text are known to tokenizers in Rust only.")
    def test_apply_chat_template_assistant_mask(self):
        pass


class VisualGLMPipelineTest(test_pipeline_mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"image-text-to-text": VisualGLMForConditionalGeneration}

    def setUp(self):
        """Let the mixin find our classes among its own, and the tiny model in a folder as its script writes them."""
        name = VisualGLMForConditionalGeneration.__name__
        models = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (models / VisualGLMConfig.model_type).mkdir()
        (models / VisualGLMConfig.model_type / name).symlink_to(TINY_MODEL)
        summary = {
            "tokenizer_classes": [ChatGLMTokenizer.__name__],
            "processor_classes": [VisualGLMImageProcessor.__name__],
        }
        found = patch.multiple(
            test_pipeline_mixin,
            TRANSFORMERS_TINY_MODEL_PATH=str(models),
            tiny_model_summary={name: summary},
            PROCESSOR_MAPPING_NAMES={VisualGLMConfig.model_type: VisualGLMProcessor.__name__},
            transformers_module=visualglm_hf,
        )
        self.enterContext(found)
        self.enterContext(chdir(TRANSFORMERS))  # where the mixin has its pictures
