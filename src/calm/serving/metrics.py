"""Metrics for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from calm.serving.engine import Engine


class Metrics:
    """Counters of one server.

    Args:
        engine: Its engine, whose counts are read at each scrape.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "calm_requests", "Requests answered.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "calm_request_seconds", "From request to the end of its answer.", ["path"], registry=self.registry
        )
        self.prompt_tokens = Counter("calm_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.registry.register(_EngineCollector(engine))


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The engine's current counts."""
        counts = self._engine.statistics
        yield GaugeMetricFamily("calm_texts_writing", "Texts in the batch.", self._engine.num_rows)
        yield GaugeMetricFamily("calm_texts_waiting", "Texts in the queue.", self._engine.num_waiting)
        yield CounterMetricFamily("calm_steps", "Steps of the batch.", counts.steps)
        yield CounterMetricFamily("calm_chunks", "Chunks written.", counts.chunks)
        yield CounterMetricFamily("calm_tokens", "Tokens written.", counts.tokens)
        yield CounterMetricFamily("calm_draws", "Draws of the head.", counts.draws)
        yield CounterMetricFamily("calm_step_seconds", "Time of all steps.", counts.seconds)
