"""Writes docs/two_stacks.svg from the paper's own plan: `python docs/generate_drawing.py`.

Nothing stands behind the drawing, and each colour can be told from a white page and from a dark
one, so that it needs no second version.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from llamapro_jax.expansion import ExpansionPlan, spread

TARGET = Path(__file__).with_name("two_stacks.svg")

# tests/test_docs_drawing.py holds their contrast to both pages, and to the text on the boxes.
BASE, NEW, TEXT, ON_BOX = "#5d666f", "#c2410c", "#727a83", "#ffffff"

WIDTH, HEIGHT = 880, 384
LEFT, PITCH, BOX = 136, 18.4, 16
BASE_Y, RUN_Y, NEW_Y, BLOCK_Y = 14, 86, 178, 288
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def text(x: float, y: float, words: str, size: int = 13, **attributes: str) -> str:
    rest = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    fill = "" if "fill" in attributes else f' fill="{TEXT}"'
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{fill}{rest}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, words: str, size: int) -> str:
    """A filled box with words in its middle."""
    middle = text(
        x + width / 2, y + height / 2 + size * 0.36, words, size, fill=ON_BOX, text_anchor="middle"
    )
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>'
        + middle
    )


def line(points: list[tuple[float, float]], colour: str, arrow: bool = False) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"{end}/>'


def stacks(plan: ExpansionPlan) -> list[str]:
    """Each block where it runs, and above or below it the row of its stack."""
    parts = [
        text(8, BASE_Y + 11, "base", font_weight="bold"),
        text(8, BASE_Y + 27, f"{plan.base_blocks} blocks, frozen"),
        text(8, RUN_Y + 11, "as they run", font_weight="bold"),
        text(8, RUN_Y + 27, f"{plan.num_blocks} blocks"),
        text(8, NEW_Y + 11, "new", font_weight="bold"),
        text(8, NEW_Y + 27, f"{plan.num_new} blocks, train"),
    ]
    for block in plan.blocks:
        x = LEFT + block.depth * PITCH
        colour, y = (BASE, BASE_Y) if block.stack == "base" else (NEW, NEW_Y)
        ends = (BASE_Y + 24, RUN_Y - 3) if block.stack == "base" else (NEW_Y, RUN_Y + 29)
        parts.append(box(x, y, BOX, 24, colour, str(block.stack_index), 9))
        parts.append(line([(x + BOX / 2, end) for end in ends], colour))
        parts.append(box(x, RUN_Y, BOX, 26, colour, str(block.depth), 9))
    return parts


def segments(plan: ExpansionPlan) -> list[str]:
    """A bracket below each group of blocks that runs as one turn of a scan."""
    parts = []
    group = 0
    y = RUN_Y + 33
    for segment in plan.segments:
        width = segment.new + segment.base
        for repeat in range(segment.repeats):
            depths = segment.depths[repeat * width : (repeat + 1) * width]
            left, right = LEFT + depths[0] * PITCH, LEFT + depths[-1] * PITCH + BOX
            parts.append(line([(left, y), (left, y + 6), (right, y + 6), (right, y)], TEXT))
            group += bool(segment.new)
            words = f"group {group}" if segment.new else "prefix"
            if segment.base:  # the last new block alone has no room for words
                middle = (left + right) / 2 + 6 * bool(segment.new)
                parts.append(text(middle, y + 22, words, 12, text_anchor="middle"))
    return parts


def new_block() -> list[str]:
    """The inside of a new block before its first step."""
    y, middle = BLOCK_Y, BLOCK_Y + 15
    halves = [
        (150, ("norm", "attention", "o = 0")),
        (510, ("norm", "gate, up", "down = 0")),
    ]
    widths = (46, 88, 74)
    parts = [
        text(8, middle - 20, "a new block", font_weight="bold"),
        text(8, middle - 4, "before its"),
        text(8, middle + 12, "first step"),
        text(8, middle + 62, "x goes in, x comes out: what both halves add is zero, so that the "
             "grown model is the base, to the bit."),
        line([(112, middle), (146, middle)], TEXT, arrow=True),
        text(98, middle + 5, "x", 15, font_style="italic"),
    ]  # fmt: skip
    for left, names in halves:
        x = float(left)
        split = x - 16
        for name, width in zip(names, widths, strict=True):
            zero = name.endswith("= 0")
            parts.append(box(x, y, width, 30, NEW if zero else BASE, name, 13))
            if not zero:
                parts.append(line([(x + width, middle), (x + width + 12, middle)], TEXT, True))
            x += width + 16
        plus = x + 34
        parts += [
            line([(x - 16, middle), (plus - 12, middle)], NEW, True),
            text(x + 2, middle - 8, "0", 13, fill=NEW, text_anchor="middle", font_weight="bold"),
            line([(split, middle), (split, y - 18), (plus, y - 18), (plus, middle - 12)], TEXT,
                 True),
            text((split + plus) / 2, y - 24, "x", 13, font_style="italic", text_anchor="middle"),
            f'<circle cx="{plus:g}" cy="{middle:g}" r="9" fill="none" stroke="{TEXT}" '
            'stroke-width="1.4"/>',
            text(plus, middle + 5, "+", 15, text_anchor="middle"),
        ]  # fmt: skip
        after = left + 360 - 4 if left < 500 else plus + 34
        parts.append(line([(plus + 9, middle), (after, middle)], TEXT, True))
    parts.append(text(after + 7, middle + 5, "x", 15, font_style="italic"))
    return parts


def drawing() -> str:
    """The whole SVG."""
    plan = ExpansionPlan(32).expand(spread(32, 8))
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="{FONT}">',
        "<title>The two stacks of LLaMA2-7B with 8 new blocks</title>",
        "<desc>32 frozen base blocks and 8 new blocks, interleaved: 4 base blocks first, then "
        "seven times a new block and 4 base blocks, and a new block at the end. Inside a new "
        "block the output projections of attention and feed-forward are zero at first, so that "
        "both halves add nothing.</desc>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{TEXT}"/></marker>',
        "</defs>",
    ]
    return "\n".join([*head, *segments(plan), *stacks(plan), *new_block(), "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
    print(f"wrote {TARGET}")
