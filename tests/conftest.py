"""What several tests share: outputs of the original code (`tests/golden/`) and the tiny checkpoint they came from; the
trained tiny model, an engine with it, its HTTP API and its page.
"""

import contextlib
import gc
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything loads from folders
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread costs more than it gives
# Remote code is copied and imported from one place per process, and not from the user's.
MODULES = tempfile.TemporaryDirectory(prefix="visualglm-modules-")  # until this process ends
os.environ["HF_MODULES_CACHE"] = MODULES.name
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis"))

gc.disable()  # until all is imported and collected: nearly all of that stays


def pytest_collection_finish() -> None:
    """From here on garbage is looked for among what tests make, not among the millions of objects of what is imported.

    Each run of a trainer asks for a search by itself.
    """
    gc.freeze()
    gc.enable()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes share the files; but nothing runs beside what is watched (-s) or may measure (-m gpu, -m slow)."""
    is_usual = config.option.markexpr.startswith("not gpu")
    return 2 if is_usual and config.option.capture != "no" else 0


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder with golden.json, golden.npz, the input pictures and the tiny original checkpoint."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir) -> dict:
    """What the original code computed: structure, ids and texts; strings name arrays of `arrays`."""
    return json.loads((golden_dir / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def arrays(golden_dir):
    """What the original code computed: arrays by name, each read when it is asked for."""
    with np.load(golden_dir / "golden.npz") as file:
        yield file


@pytest.fixture(scope="session")
def tiny_original(golden_dir) -> Path:
    """A tiny VisualGLM checkpoint as the original code writes it."""
    return golden_dir / "tiny-original"


@pytest.fixture(scope="session")
def tiny_int4(golden_dir) -> Path:
    """The tiny checkpoint as the original code writes it after `.half().quantize(4)`."""
    return golden_dir / "tiny-original-int4"


@pytest.fixture(scope="session")
def tokenizer(tiny_original):
    """The tokenizer of the tiny checkpoint; shared, so tests that change one load their own."""
    from visualglm_hf.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(tiny_original)


@pytest.fixture(scope="session")
def model(tiny_original):
    """The tiny checkpoint in float32; shared, so tests that change one load their own."""
    from tests.helpers import load_float32

    return load_float32(tiny_original)


@pytest.fixture(scope="session")
def half_model(tiny_original):
    """The tiny checkpoint in float16, as it is stored."""
    import torch

    from visualglm_hf import VisualGLMForConditionalGeneration

    return VisualGLMForConditionalGeneration.from_pretrained(tiny_original, dtype=torch.float16).eval()


@pytest.fixture(scope="session")
def processor(tokenizer):
    """The processor of the tiny checkpoint."""
    from visualglm_hf import VisualGLMImageProcessor, VisualGLMProcessor

    return VisualGLMProcessor(VisualGLMImageProcessor(), tokenizer)


@pytest.fixture(scope="session")
def pictures(golden_dir):
    """The golden input pictures, as users have them."""
    from PIL import Image

    return [Image.open(path) for path in sorted((golden_dir / "images").iterdir())]


@pytest.fixture(scope="session")
def prompt(golden):
    """A golden prompt in words, [1, S], and a token of the answer."""
    import torch

    case = next(case for case in golden["prompts"] if not case["image"])
    return torch.tensor([[*case["input_ids"], 700]])


@pytest.fixture(scope="session")
def described(processor, pictures) -> dict:
    """A prompt with the first picture, as the model takes it."""
    text = f"<img>{processor.image_token}</img>问：描述这张图片。\n答："
    return dict(processor(text=text, images=pictures[0], return_tensors="pt"))


@pytest.fixture(scope="session")
def pixel_values(golden, arrays, processor):
    """The golden input pictures as the model takes them, [5, 3, 224, 224]; resized by the original."""
    resized = [arrays[image["resized_u8"]] for image in golden["images"]]
    return processor.image_processor(resized, return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="session")
def small_star():
    """A white star on a sixteenth of a large picture of the night: too small to be seen in the whole."""
    import numpy as np
    from PIL import Image

    from tools.tiny import world

    side = world.IMAGE_SIZE
    picture, night = Image.new("RGB", (4 * side, 4 * side)), world.draw_background("night", np.random.default_rng(1))
    for x in range(4):
        for y in range(4):
            picture.paste(night, (x * side, y * side))
    picture.paste(world.draw(world.make_scene("star", "white", "night", "middle", (3, 5))), (2 * side, side))
    return picture


@pytest.fixture(scope="session")
def trained():
    """The trained tiny model in float32 and its tokenizer, by this package's own classes."""
    from tests.helpers import load_float32
    from tests.paths import TINY
    from visualglm_hf import ChatGLMTokenizer

    return load_float32(TINY), ChatGLMTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def loaded():
    """The trained tiny model in float32 and its tokenizer, as servers load them; what a test changes it undoes."""
    from tests.paths import TINY
    from visualglm_tools.checkpoints.loading import load_model

    return load_model(TINY, "cpu", "float32")


@pytest.fixture(scope="session")
def engine(loaded):
    """An engine with the usual limits; shared, so tests that close one or want other limits make their own."""
    from visualglm_tools.serving.engine.engine import Engine

    with Engine(*loaded) as engine:
        yield engine


@pytest.fixture(scope="session")
def url(engine):
    """The address of the HTTP API on the shared engine."""
    from tests.serving_helpers import serve

    with serve(engine) as url:
        yield url


@pytest.fixture(scope="session")
def page_url(engine):
    """The address of the page on the shared engine."""
    from tests.paths import PICTURES
    from tests.serving_helpers import free_port
    from visualglm_tools.serving.page import page as web

    page, port = web.create_page(engine, PICTURES), free_port()
    web.launch(page, "127.0.0.1", port, engine.limits.max_picture_bytes)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture(scope="session")
def browser():
    """A real Chromium, without which the test is skipped."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    pytest.importorskip("selenium", reason="the page is tested through selenium")
    from tests.browser import start_browser

    with start_browser() as browser:
        yield browser


@pytest.fixture
def open_tab(browser, page_url):
    """Opens the page in a tab, in the language of a browser; it is closed when the test ends."""
    from tests.browser import Tab

    with contextlib.ExitStack() as tabs:

        def open_one(language: str = "zh-CN") -> Tab:
            tab = Tab(browser, page_url, language)
            tabs.callback(lambda: tab.handle in browser.window_handles and tab.close())
            return tab

        yield open_one


@pytest.fixture(autouse=True)
def undo_what_doors_set_for_their_process():
    """Doors run in-process by a test quieten transformers, and converting marks our classes as remote code."""
    from transformers.utils import logging

    import visualglm_hf

    classes = [getattr(visualglm_hf, name) for name in visualglm_hf.__all__ if name != "register"]
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    for cls in classes:  # whoever marked them: a fixture of a module did it before this one could look
        if cls.__dict__.get("_auto_class") is not None:
            cls._auto_class = None


@pytest.fixture
def batch_door(loaded, tmp_path, monkeypatch, capfd):
    """Runs `visualglm batch` in an empty folder, the model being loaded already; returns exit code, stdout, stderr."""
    from tests.commands import batch
    from visualglm_tools.serving.engine.engine import Engine

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "load", classmethod(lambda cls, folder, limits, **options: cls(*loaded, limits)))

    def run(*options) -> tuple[int, str, str]:
        code = batch(*options, "--device", "cpu", "--temperature", "0")
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def torch_operators(monkeypatch):
    """Low-bit products on the CPU as they are where llvmlite is not installed."""
    from visualglm_hf.cpu_many_rows import CPU_MANY_ROWS
    from visualglm_hf.cpu_products import CPU_PRODUCTS
    from visualglm_hf.cpu_several_rows import CPU_SEVERAL_ROWS
    from visualglm_hf.kernel_choice import NoKernelsError

    def make(device):
        raise NoKernelsError("llvmlite is not installed")

    for user in (CPU_PRODUCTS, CPU_SEVERAL_ROWS, CPU_MANY_ROWS):
        monkeypatch.setattr(user, "found", {})
        monkeypatch.setattr(user, "make", make)


@pytest.fixture
def with_kernels():
    """Our kernels for this CPU, without which the test is skipped."""
    from visualglm_hf.cpu_products import CPU_PRODUCTS

    if CPU_PRODUCTS.kernels is None:
        pytest.skip("no kernels here")


@pytest.fixture
def without_several_rows(monkeypatch):
    """Products of several rows on the CPU as they are on a processor that the kernels for them were not measured on."""
    from visualglm_hf import cpu_several_rows

    monkeypatch.setattr(cpu_several_rows, "MEASURED_ON", ("none",))


@pytest.fixture
def renew_products(monkeypatch):
    """Makes what multiplies low-bit matrices on a CPU anew."""
    from visualglm_hf import cpu_many_rows, cpu_several_rows, lowbit_products
    from visualglm_hf.cpu_many_rows import CpuManyRows
    from visualglm_hf.cpu_products import CpuProducts
    from visualglm_hf.cpu_several_rows import CpuSeveralRows

    def make() -> CpuProducts:
        products = CpuProducts()
        monkeypatch.setattr(lowbit_products, "CPU_PRODUCTS", products)
        monkeypatch.setattr(cpu_many_rows, "CPU_MANY_ROWS", CpuManyRows())
        monkeypatch.setattr(cpu_several_rows, "CPU_SEVERAL_ROWS", CpuSeveralRows())
        return products

    return make
