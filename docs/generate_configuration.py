"""Writes docs/configuration.md from the dataclasses: `python docs/generate_configuration.py`."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

from llamapro_jax.config import MAY_CHANGE_ON_RESUME, RunConfig
from llamapro_jax.data.preparation.config import PrepareConfig
from llamapro_jax.typed_yaml import OptionRow, option_rows

TARGET = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration of a training run, and of prepared data

Generated from the dataclasses of `llamapro_jax/config.py` and
`llamapro_jax/data/preparation/config.py` by `python docs/generate_configuration.py`. The last
section is that of `llamapro prepare`.

A run is described by a YAML file, and each setting can be changed on the command line:

```
llamapro train configs/llama2_7b_pro.yaml optimizer.learning_rate=3e-4 data.sources.0.weight=2 \\
    trainable=[new,norms] output=runs/second
```

- Relative paths are relative to the directory in which the command runs.
- An override reads its value as YAML does: `null`, `[a, b]`, `{name: a, path: b}`. `N` below
  counts the items of a list from 0; an override changes items that the file has, and
  `data.eval=[]` replaces a whole list.
- A key that does not exist, a key given twice, a missing key, or a value of the wrong type stops
  the run before anything is loaded; all problems are listed at once with file and line.
- The resolved configuration, defaults included, is saved in the run directory as `config.yaml`.
"""

RESUME = """
A resumed run must have the settings it began with, except for these, which change no weight:
"""

PREPARE = """
## `llamapro prepare`

A YAML file of its own, with the same rules for overrides, paths and unknown keys. Each source
becomes the data set `output/NAME`; see [data.md](data.md#preparing-a-data-set).
"""

TABLE_HEAD = "\n| key | value | default | meaning |\n|---|---|---|---|\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def configuration_markdown() -> str:
    """The whole page."""
    rows = list(option_rows(RunConfig))
    hints = typing.get_type_hints(RunConfig)
    sections = [f.name for f in dataclasses.fields(RunConfig) if is_section(hints[f.name])]
    parts = [HEAD]
    for section in ("", *sections):
        if section:
            parts.append(f"\n## `{section}`\n\n{hints[section].__doc__}\n")
        else:
            parts.append("\n## Top level\n")
        parts.append(TABLE_HEAD)
        for row in rows:
            top = row.path.partition(".")[0]
            if (top if top in sections else "") == section:
                parts.append(table_row(row))
    parts.append("\n## What may change on resume\n" + RESUME)
    parts.append(", ".join(f"`{name}`" for name in MAY_CHANGE_ON_RESUME) + ".\n")
    parts += [PREPARE, TABLE_HEAD, *map(table_row, option_rows(PrepareConfig))]
    return "".join(parts)


def table_row(row: OptionRow) -> str:
    cells = (f"`{row.path}`", cell(row.kind), f"`{row.default}`", cell(row.doc))
    return f"| {' | '.join(cells)} |\n".replace("`required`", "required")


def is_section(kind: object) -> bool:
    return dataclasses.is_dataclass(kind)


if __name__ == "__main__":
    TARGET.write_text(configuration_markdown(), encoding="utf-8")
    print(f"wrote {TARGET}")
