"""What runs inside the engine core: vLLM's CPU worker and loader, reporting how far they are.

Imported by the engine core only (by the names that `engine` gives to vLLM) and by the zygote's
preload. The hooks are vLLM's own: a worker class and a registered load format.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.v1.worker.cpu_worker import CPUWorker

from citadel_supervisor.workers.engine import core_started, one_line, report
from citadel_supervisor.workers.launch import Fatal, Loading

Result = TypeVar("Result")


@register_model_loader("citadel")
class ReportingLoader(DefaultModelLoader):  # type: ignore[misc]
    """The default loader, which says after each hundredth of the bytes how many it has read."""

    def __init__(self, load_config: LoadConfig) -> None:
        load_config.load_format = "auto"
        super().__init__(load_config)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        total = sum(file.stat().st_size for file in Path(model_config.model).glob("*.safetensors"))
        done = reported = 0
        report(Loading("weights", 0, total))
        for name, tensor in super().get_all_weights(model_config, model):
            yield name, tensor
            done += tensor.nbytes
            if done - reported >= total // 100:
                reported = done
                report(Loading("weights", min(done, total), total))
        report(Loading("weights", total, total))


class ReportingCPUWorker(CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker, which reports its phases and why it cannot start."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        core_started()
        super().__init__(*args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        return _reporting_failure(lambda: super(ReportingCPUWorker, self).load_model(*args, **kwargs), True)

    def determine_available_memory(self) -> Any:
        report(Loading("kv_cache"))
        return _reporting_failure(super().determine_available_memory, False)

    def compile_or_warm_up_model(self) -> Any:
        report(Loading("warm_up"))
        return _reporting_failure(super().compile_or_warm_up_model, False)


def _reporting_failure(step: Callable[[], Result], permanent: bool) -> Result:
    """Run `step`; tell the supervisor why it failed. Running out of memory is never permanent."""
    try:
        return step()
    except Exception as error:
        starved = isinstance(error, MemoryError) or "memory" in str(error).lower()
        report(Fatal(one_line(error), permanent=permanent and not starved))
        raise
