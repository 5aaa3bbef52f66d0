"""What the LLaMA Pro paper reports, to stand beside what is measured here."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "LLaMA Pro (arXiv 2401.02415v2)"
BASE, PRO, INSTRUCT = "LLaMA 2 7B", "LLaMA Pro 8.3B", "LLaMA Pro - Instruct"
MODELS = (BASE, PRO, INSTRUCT)


@dataclass(frozen=True)
class Published:
    """One benchmark. names: what a task that asks it may be called. values: as in `MODELS`, in
    percent, or perplexities; None where the paper has none."""

    names: tuple[str, ...]
    metric: str
    shots: int | None
    values: tuple[float | None, ...]


BENCHMARKS = (
    Published(("arc", "arc_challenge"), "acc_norm", 25, (53.07, 54.10, 52.30)),
    Published(("hellaswag",), "acc_norm", 10, (78.59, 77.94, 76.88)),
    Published(("mmlu",), "acc", 5, (46.87, 47.88, 52.57)),
    Published(("truthfulqa", "truthfulqa_mc2"), "acc", 0, (38.76, 39.04, 48.80)),
    Published(("winogrande",), "acc", 5, (74.03, 73.95, 72.53)),
    Published(("gsm8k",), "exact_match,strict-match", 5, (14.48, 17.89, 43.59)),
    Published(("gsm8k_pot",), "exact_match", None, (17.68, 25.42, 55.61)),
    Published(("humaneval",), "pass@1,create_test", 0, (13.05, 28.66, 44.51)),
    Published(("mbpp",), "pass_at_1", 3, (20.09, 33.20, 37.88)),
)
# Over the nine benchmarks, as printed.
AVERAGES = (39.62, 44.23, 53.85)
PERPLEXITIES = (
    Published(("lambada",), "perplexity", None, (3.39, 3.46, None)),
    Published(("stack_python",), "perplexity", None, (9.46, 5.25, None)),
)


def published(name: str, metric: str) -> dict[str, float]:
    """The paper's figures by model for a task or text of this name; empty where it has none."""
    plain = name.lower().replace("-", "_")
    for one in (*BENCHMARKS, *PERPLEXITIES):
        if plain in one.names and metric == one.metric:
            pairs = zip(MODELS, one.values, strict=True)
            return {model: value for model, value in pairs if value is not None}
    return {}
