"""The page to click on: what its file holds, and what a browser makes of it."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_pixels
from PIL import Image

from image_encoder_vit.commands import plot
from image_encoder_vit.corpora.explorer import explorer_html, feature_grid, region_similarities
from image_encoder_vit.corpora.pictures import EncodedPage
from image_encoder_vit.weights.layout_head import LayoutHead

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "samples" / "page.png"
MAX_BYTES_A_PAGE = 3_000_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TOLERANCE = 0.02  # Between cosines of features of 8 bits and of the features themselves.


def encoded_page(seed: int, name: str = "a page") -> EncodedPage:
    """A page of 300 x 400 px that a canvas of 256 px shows 192 px wide, with features that no encoder made."""
    stages = {"neck": random_pixels(6, 16, 16, seed=seed), "net_3": random_pixels(9, 4, 4, seed=seed + 1)}
    pixels = (random_pixels(400, 300, 3, seed=seed) * 40 + 128).clamp(0, 255).to(torch.uint8)
    return EncodedPage(name, Image.fromarray(pixels.numpy()), stages, (0, 32, 256, 192), (256, 256))


def embedded(content: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_file_holds_everything_and_asks_nobody() -> None:
    head = LayoutHead(("paper", "text"), torch.eye(2, 6), "neck")
    pages = [encoded_page(0, "</script><b>1</b>"), encoded_page(5)]
    content = explorer_html(
        pages, title="<two> pages", checkpoint="a & b", warning="RANDOM", searchable=["neck", "net_3"], head=head
    )
    assert "{{" not in content
    assert "<title>&lt;two&gt; pages</title>" in content
    assert "a &amp; b" in content
    assert content.count("</script>") == 2  # A page's name ends no script.
    assert "default-src 'none'" in content
    program = re.sub(r"base64,[A-Za-z0-9+/=]+|\"codes\":\"[^\"]+", "", content)
    assert not re.search(r"https?:|[\"']//|@import|fetch\(|XMLHttpRequest|src=", program)
    data = embedded(content)
    assert [page["name"] for page in data["pages"]] == ["</script><b>1</b>", "a page"]
    assert [layer["name"].split()[0] for layer in data["layers"]] == ["layout", "neck", "net_3"]
    assert [(grid["name"], grid["stride"]) for grid in data["grids"]] == [("neck", 16), ("net_3", 64)]
    for grid, channels in zip(data["grids"], (6, 9), strict=True):
        for place in grid["maps"]:
            assert len(base64.b64decode(place["codes"])) == place["rows"] * place["columns"] * channels
    # 192 px from 32 on: cells of 16 px fit, those of 64 px stick out by half a cell on both sides.
    assert {key: data["grids"][0]["maps"][0][key] for key in ("left", "width", "columns")} == {
        "left": 0, "width": 1, "columns": 12,
    }  # fmt: skip
    assert data["grids"][1]["maps"][0]["left"] == pytest.approx(-32 / 192)
    assert data["grids"][1]["maps"][0]["width"] == pytest.approx(256 / 192)


def test_eight_bits_keep_the_cosines() -> None:
    pages = [encoded_page(0), encoded_page(5)]
    for stage in ("neck", "net_3"):
        grid = feature_grid(pages, stage)
        scales = torch.tensor(grid["scales"])
        decoded = [
            torch.frombuffer(bytearray(base64.b64decode(place["codes"])), dtype=torch.int8).view(-1, len(scales))
            * scales
            for place in grid["maps"]
        ]
        exact = region_similarities(pages, stage, 0, (slice(1, 3), slice(0, 2)))
        columns = grid["maps"][0]["columns"]
        query = decoded[0].view(-1, columns, len(scales))[1:3, 0:2].mean(dim=(0, 1))
        for cells, expected in zip(decoded, exact, strict=True):
            actual = torch.nn.functional.cosine_similarity(cells, query[None], dim=1)
            torch.testing.assert_close(actual, expected.flatten(), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample page, and a smaller one, as the command writes them."""
    folder = tmp_path_factory.mktemp("explorer")
    with Image.open(PAGE) as page:
        page.convert("RGB").crop((0, 600, 1240, 1500)).save(folder / "part.png")
    output = folder / "page.html"
    assert plot.main([str(PAGE), str(folder / "part.png"), "--output", str(output)]) == 0
    return output


def test_the_command_writes_one_small_file(explorer: Path) -> None:
    data = embedded(explorer.read_text(encoding="utf-8"))
    assert explorer.stat().st_size < len(data["pages"]) * MAX_BYTES_A_PAGE
    assert [page["name"] for page in data["pages"]] == ["page.png", "part.png"]
    assert {"text", "table", "figure", "photo"} <= {name for name, _ in data["layers"][0]["classes"]}
    assert [grid["stride"] for grid in data["grids"]] == [16, 64]
    assert len(data["layers"]) == 1 + 8  # The layout; stem, four blocks, neck and two convolutions.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="make test-browser installs it")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with its driver here: make test-browser installs both")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1500,1300",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield running
    finally:
        running.quit()


@pytest.fixture
def opened(browser: Any, explorer: Path) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(explorer.as_uri())
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script("return document.body.dataset.ready"))
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def encoded_by_the_model(explorer: Path) -> list[EncodedPage]:
    model, processor = plot.load_model("sample"), plot.load_processor("sample")
    images = [Image.open(PAGE).convert("RGB"), Image.open(explorer.parent / "part.png").convert("RGB")]
    return [plot.encode_page(str(number), image, processor, model) for number, image in enumerate(images)]


def test_the_browser_s_cosines_are_the_model_s(opened: Any, explorer: Path) -> None:
    pages = encoded_by_the_model(explorer)
    box = {"top": 0.3, "bottom": 0.36, "left": 0.2, "right": 0.3}
    for number, stage in enumerate(("neck", "net_3")):
        top, bottom, left, right = opened.execute_script(
            "return cellsOf(grids[arguments[0]].maps[0], arguments[1])", number, box
        )
        expected = region_similarities(pages, stage, 0, (slice(top, bottom + 1), slice(left, right + 1)))
        for page in range(2):
            script = "return Array.from(similarities(arguments[0], arguments[1], 0, arguments[2]))"
            actual = torch.tensor(opened.execute_script(script, number, page, box))
            torch.testing.assert_close(actual, expected[page].flatten(), rtol=0, atol=TOLERANCE)


def test_mouse_keyboard_and_touch_choose_a_region(opened: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    from selenium.webdriver.common.keys import Keys

    canvas = opened.find_elements("css selector", "canvas")[0]

    def shown() -> tuple[str, str]:
        pixels = "return document.querySelectorAll('canvas')[1].toDataURL()"  # The other page answers too.
        return opened.find_element("id", "status").text, opened.execute_script(pixels)

    nothing = shown()
    assert nothing[0] == ""
    ActionChains(opened).move_to_element(canvas).click().perform()
    clicked = shown()
    assert "page.png: 1 cell from row" in clicked[0]
    assert clicked[1] != nothing[1]
    ActionChains(opened).move_to_element(canvas).click_and_hold().move_by_offset(60, 40).release().perform()
    dragged = shown()
    assert re.search(r"page.png: (\d\d|[4-9]) cells from row", dragged[0])
    assert dragged[1] != clicked[1]
    opened.find_element("id", "grid").send_keys("net_3")
    assert shown()[1] != dragged[1]
    opened.save_screenshot(str(tmp_path / "chosen.png"))

    canvas.send_keys(Keys.ESCAPE)
    assert shown() == nothing
    canvas.send_keys(Keys.ARROW_DOWN)
    first = shown()[0]
    assert "1 cell from" in first
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert shown()[0] != first
    canvas.send_keys(Keys.SHIFT + Keys.ARROW_DOWN)
    assert "2 cells from" in shown()[0]
    opened.find_element("id", "clear").click()
    assert shown() == nothing

    touch = ActionBuilder(opened, mouse=PointerInput("touch", "finger"))
    touch.pointer_action.move_to(canvas).pointer_down().pointer_up()
    touch.perform()
    assert "1 cell from" in shown()[0]


def test_stages_change_and_the_dark_scheme_is_dark(opened: Any) -> None:
    canvas = "return document.querySelector('canvas').toDataURL()"
    layout = opened.execute_script(canvas)
    opened.find_element("id", "layer").send_keys("neck")
    assert opened.execute_script(canvas) != layout
    for scheme, is_dark in (("light", False), ("dark", True)):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        color = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", color)[:3])) < 200) == is_dark
