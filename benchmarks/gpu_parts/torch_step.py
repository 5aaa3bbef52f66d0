"""`transformers` + PyTorch on one GPU, with the same blocks trained, in its fastest setting.

It is given every advantage that keeps the work the same: weights in bfloat16, those that train with
float32 masters in a fused AdamW, gradients summed over microbatches in bfloat16, both of PyTorch's
fused attentions, compiled layers, and gradient checkpointing only where a gradient passes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import transformers

from benchmarks import torch_model
from benchmarks.gpu_parts.common import (
    GIB,
    OPTIMIZER,
    Results,
    Task,
    architecture,
    require_gpu,
    task_of_process,
    time_steps,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    task = task_of_process()
    require_gpu(task, DEVICE == "cuda")
    results = Results(task)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    results.put(version=versions)
    step = Step(task)
    results.put(trained=step.trained)
    for setting in settings(task, results):
        results.add(step.measure(setting, again=task.setting is not None))


def settings(task: Task, results: Results) -> Iterator[dict[str, Any]]:
    """One choice after the other, each with the best of those before it."""
    if task.setting is not None:
        yield task.setting
        return
    rows, half = task.rows, max(1, task.rows // 2)
    plain = {"attention": "flash", "compiled": False, "checkpointing": False}
    kernels, compiled = ["flash", "cudnn"], [True]
    if DEVICE == "cpu":
        plain["attention"], kernels, compiled = "default", ["default"], []
    yield {**plain, "microbatch": half}
    if task.quick:
        return
    choices: list[tuple[str, list[Any]]] = [
        ("attention", kernels[1:]),
        ("compiled", compiled),
        ("microbatch", [rows, max(1, half // 2)]),
    ]
    for name, values in choices:
        best = (results.best() or {"setting": {**plain, "microbatch": half}})["setting"]
        for value in values:
            if best[name] != value and results.time_for_another():
                yield {**best, name: value}
    best = (results.best() or {"setting": {**plain, "microbatch": half}})["setting"]
    for microbatch in sorted({rows, half}, reverse=True):
        if results.time_for_another():
            yield {**best, "checkpointing": True, "microbatch": microbatch}


class Step:
    """The model and its optimizer, and steps of it in any setting."""

    def __init__(self, task: Task) -> None:
        self._task = task
        config, plan = architecture(task.tiny)
        self._vocabulary = config.vocab_size
        with torch.device(DEVICE):
            self._model = torch_model.build(config, plan, "bfloat16")
        self._layers = self._model.model.layers
        self._first = plan.new_depths[0]
        self._weights = [p for p in self._model.parameters() if p.requires_grad]
        self._masters = [p.detach().float() for p in self._weights]
        self.trained = sum(p.numel() for p in self._weights)
        self._optimizer = torch_model.adamw(self._masters, OPTIMIZER, fused=True)
        shape = (task.rows, task.length)
        self._tokens = torch.randint(self._vocabulary, shape, device=DEVICE)

    def _set(self, setting: dict[str, Any]) -> None:
        torch._dynamo.reset()
        if setting["attention"] != "default":
            torch.backends.cuda.enable_flash_sdp(setting["attention"] == "flash")
            torch.backends.cuda.enable_cudnn_sdp(setting["attention"] == "cudnn")
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_math_sdp(False)
        self._model.train()
        if setting["checkpointing"]:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self._model.gradient_checkpointing_disable()
        for depth, layer in enumerate(self._layers):
            if depth < self._first:
                layer.gradient_checkpointing = False
            # Layers of one kind share what was compiled.
            layer._compiled_call_impl = None
            if setting["compiled"]:
                layer.compile()

    def measure(self, setting: dict[str, Any], again: bool) -> dict[str, Any]:
        """A row for `Results`. again: time it longer, it is the one that counts."""
        began = time.perf_counter()
        loss = torch.zeros(())

        def take() -> None:
            nonlocal loss
            loss = self._take(setting["microbatch"])

        try:
            self._set(setting)
            reset_memory()
            time_steps(take, wait, 2, 1)
            ready = time.perf_counter() - began
            steps = 1 if self._task.tiny else 3
            seconds = time_steps(take, wait, steps, 3 if again else 1)
        except torch.OutOfMemoryError:
            return {"setting": setting, "problem": "out of memory"}
        except Exception as error:  # What does not compile or has no kernel is out of the race.
            problem = f"failed: {type(error).__name__}: {str(error)[:300]}"
            return {"setting": setting, "problem": problem}
        finally:
            for weight in self._weights:
                weight.grad = None
        return {
            "setting": setting,
            "memory_gib": torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0,
            "total_seconds": time.perf_counter() - began,
            "ready_seconds": ready,
            "seconds": seconds,
            "loss": float(loss),
        }

    def _take(self, microbatch: int) -> torch.Tensor:
        """One update. Nothing waits for the device."""
        parts = self._tokens.split(microbatch)
        total = torch.zeros((), device=DEVICE)
        for part in parts:
            loss = self._model(part, labels=part).loss / len(parts)
            loss.backward()
            total += loss.detach()
        for master, weight in zip(self._masters, self._weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, OPTIMIZER.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._masters)
        return total


def reset_memory() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
