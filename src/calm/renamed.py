"""Modules of version 0.1 that have moved: for one version, importing one fails with its new name."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "calm.data.kept": "calm.data.caching",
    "calm.evaluation.readers": "calm.models.readers",
    "calm.evaluation.samplers": "calm.evaluation.scorers",
    "calm.models.batching": "calm.models.generation.batching",
    "calm.models.generation_arguments": "calm.models.generation.arguments",
    "calm.models.heads.adaln": "calm.models.heads.step_network",
    "calm.models.heads.base": "calm.models.heads.contract, .fields and .registry",
    "calm.models.heads.mean_flow": "examples/a_head_of_your_own.py",
    "calm.models.heads.place_network": "calm.models.heads.chunk_network",
    "calm.models.heads.scores": "calm.models.heads.logits",
    "calm.models.lessons": "calm.models.distillation",
    "calm.models.sampling": "calm.models.generation.sampling",
    "calm.models.stepping": "calm.models.generation.steps",
    "calm.models.stopping": "calm.models.generation.stopping",
    "calm.models.writing": "calm.models.generation",
    "calm.serving.answers": "calm.serving.request_texts",
    "calm.serving.requests": "calm.serving.endpoint and calm.serving.formats",
    "calm.training.collating": "calm.training.batches",
    "calm.training.configurations": "calm.training.check and calm.training.build",
    "calm.verbs": "calm.commands",
}


class _Moved(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if (new_name := MOVED.get(fullname)) is not None:
            raise ModuleNotFoundError(f"{fullname} is now {new_name}.", name=fullname)
        return None


def install() -> None:
    """Make importing a moved module fail with its new name."""
    sys.meta_path.insert(0, _Moved())  # First, or an empty folder left behind would be imported.
