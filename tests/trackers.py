"""Stand-ins for tracking services, with the functions that transformers and calm call."""

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class TrackedRun:
    """What a tracker has recorded of a run."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    logged: list[dict[str, Any]] = field(default_factory=list)
    begun: int = 1
    ends: list[Any] = field(default_factory=list)

    def steps(self, figure: str) -> list[int]:
        return [entry["step"] for entry in self.logged if figure in entry]


class Wandb:
    """Weights & Biases. A run is found again by its id."""

    def __init__(self) -> None:
        self.runs: dict[str, TrackedRun] = {}
        self.run: Any = None
        self.fault: Exception | None = None
        self.config = _Config(self._update)

    def init(self, name: str, id: str, resume: str, project: str | None = None) -> None:
        if self.fault is not None:
            raise self.fault
        assert self.run is None and resume == "allow"
        if id in self.runs:
            self.runs[id].begun += 1
        else:
            self.runs[id] = TrackedRun(name)
        self.run = SimpleNamespace(id=id, summary={}, _label=lambda code: None)

    def _update(self, settings: dict[str, Any], allow_val_change: bool = False) -> None:
        self.runs[self.run.id].settings.update(settings)

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, figures: dict[str, Any]) -> None:
        self.runs[self.run.id].logged.append({**figures, "step": figures["train/global_step"]})

    def finish(self, exit_code: int) -> None:
        self.runs[self.run.id].ends.append(exit_code)
        self.run = None


class Mlflow:
    """MLflow. A run is found again by its tag."""

    __version__ = "3.17.2"

    def __init__(self) -> None:
        self.runs: dict[str, TrackedRun] = {}
        self.experiment = ""
        self.end_fault: Exception | None = None
        self._active: str | None = None
        limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        self.utils = SimpleNamespace(validation=limits)

    def is_tracking_uri_set(self) -> bool:
        return True

    def get_tracking_uri(self) -> str:
        return "sqlite:///mlflow.db"

    def set_experiment(self, name: str) -> None:
        self.experiment = name

    def active_run(self) -> Any:
        return self._active and SimpleNamespace(info=SimpleNamespace(run_id=self._active))

    def search_runs(self, filter_string: str, max_results: int, output_format: str) -> list[Any]:
        run_ids = [id for id in self.runs if filter_string == f"tags.`calm.id` = '{id}'"]
        return [SimpleNamespace(info=SimpleNamespace(run_id=id)) for id in run_ids]

    def start_run(self, run_id: str = "", run_name: str = "", tags: dict[str, str] | None = None) -> None:
        assert self._active is None
        if run_id:
            self.runs[run_id].begun += 1
        else:
            run_id = (tags or {})["calm.id"]
            self.runs[run_id] = TrackedRun(run_name)
        self._active = run_id

    def log_params(self, params: dict[str, Any], synchronous: bool) -> None:
        assert self._active
        self.runs[self._active].settings.update(params)

    def log_metrics(self, metrics: dict[str, float], step: int, synchronous: bool) -> None:
        assert self._active, "after the end of a run, mlflow would begin another"
        self.runs[self._active].logged.append({**metrics, "step": step})

    def end_run(self, status: str) -> None:
        assert self._active
        self.runs[self._active].ends.append(status)
        self._active = None
        if self.end_fault is not None:
            raise self.end_fault


class Trackio:
    """trackio. A run is found again by its name."""

    def __init__(self) -> None:
        self.runs: dict[str, TrackedRun] = {}
        self._current: str | None = None
        current = SimpleNamespace(get=lambda: self._current)
        space = SimpleNamespace(get=lambda: None)
        self.context_vars = SimpleNamespace(current_run=current, current_space_id=space)
        self.config = _Config(lambda settings, **kwargs: self.runs[self._current].settings.update(settings))

    def init(self, project: str, name: str, resume: str, **hub_options: Any) -> None:
        assert resume == "allow" and not any(hub_options.values())
        if name in self.runs:
            self.runs[name].begun += 1
        else:
            self.runs[name] = TrackedRun(name)
        self._current = name

    def log(self, figures: dict[str, Any]) -> None:
        assert self._current
        self.runs[self._current].logged.append({**figures, "step": figures["train/global_step"]})

    def finish(self) -> None:
        assert self._current, "trackio raises if there is no run"
        self.runs[self._current].ends.append(None)
        self._current = None


class _Config(dict):
    """The settings of a run; single ones are assigned as in a dictionary."""

    def __init__(self, update: Any) -> None:
        super().__init__()
        self.update = update  # type: ignore[method-assign]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, service: Any) -> Any:
    """Replace a package by a stand-in, and return the stand-in."""
    names = {"wandb": ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util")}.get(name, (name,))
    for part in names:
        module = ModuleType(part)
        module.__spec__ = ModuleSpec(part, None, origin="a stand-in")
        module.ConfigError = KeyError  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, part, module)
    for attribute in ("__spec__", "__name__"):
        setattr(service, attribute, getattr(sys.modules[name], attribute))
    monkeypatch.setitem(sys.modules, name, service)
    return service
