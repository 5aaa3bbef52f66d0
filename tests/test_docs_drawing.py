"""docs/two_stacks.svg is what its script draws, and can be seen on a white and on a dark page."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

from llamapro_jax.expansion import ExpansionPlan, spread

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "generate_drawing.py"
SVG = "{http://www.w3.org/2000/svg}"
PAGES = ("#ffffff", "#0d1117")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_drawing", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def luminance(colour: str) -> float:
    """As WCAG 2.1 has it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_drawing_is_up_to_date(script: ModuleType) -> None:
    assert script.TARGET.read_text() == script.drawing(), "run: python docs/generate_drawing.py"


def test_every_colour_is_seen_on_both_pages(script: ModuleType) -> None:
    root = ElementTree.fromstring(script.drawing())
    used = {e.get(key) for e in root.iter() for key in ("fill", "stroke")} - {None, "none"}
    assert used == {script.BASE, script.NEW, script.TEXT, script.ON_BOX}
    for page in PAGES:
        assert contrast(script.BASE, page) >= 3 and contrast(script.NEW, page) >= 3
        assert contrast(script.TEXT, page) >= 4
    for box in (script.BASE, script.NEW):
        assert contrast(script.ON_BOX, box) >= 4.5


def test_each_block_of_the_plan_is_drawn_within_the_page(script: ModuleType) -> None:
    root = ElementTree.fromstring(script.drawing())
    boxes = list(root.iter(f"{SVG}rect"))
    running = [b for b in boxes if float(b.get("y", 0)) == script.RUN_Y]
    running.sort(key=lambda b: float(b.get("x", 0)))
    plan = ExpansionPlan(32).expand(spread(32, 8))
    new = [depth for depth, box in enumerate(running) if box.get("fill") == script.NEW]
    assert len(running) == 40 and tuple(new) == plan.new_depths
    for box in boxes:
        assert float(box.get("x", 0)) + float(box.get("width", 0)) <= script.WIDTH
        assert float(box.get("y", 0)) + float(box.get("height", 0)) <= script.HEIGHT
