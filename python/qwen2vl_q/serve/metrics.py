"""What /metrics tells, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from qwen2vl_q.engine.answer import Answer
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.serve.admission import Admission

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PREFIX = "qwen2vl_q_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_GAPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Of one server: counters of its own, none of the process's other servers."""

    def __init__(self, model: Qwen2VL, admission: Admission) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(_PREFIX + name, text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, function: object) -> None:
            Gauge(_PREFIX + name, text, registry=registry).set_function(function)  # type: ignore[arg-type]

        self.requests = counter("requests", "Requests that have ended", ["path", "status"])
        self._tokens = counter("tokens", "Tokens: of prompts, of images in them, cached, drawn", ["kind"])
        self._seconds = counter("seconds", "Seconds of encoding, prefill, decoding, queueing", ["stage"])
        self.first_token = histogram("first_token_seconds", "From a request to its first token", _SECONDS)
        self.gap = histogram("token_gap_seconds", "From one piece of a streamed answer to the next", _GAPS)
        self.duration = histogram("request_seconds", "Of completions, waiting included", _SECONDS)
        gauge("running_answers", "Answers that are computed", lambda: admission.running)
        gauge("queued_requests", "Requests that wait for others to end", lambda: admission.queued)
        gauge("held_body_bytes", "Bodies in memory", lambda: admission.held_bytes)
        gauge("cache_bytes", "Pages of the KV cache in use", lambda: model.last_stats.kv_bytes)
        gauge("weight_bytes", "Weights in memory", lambda: model.weight_bytes)

    def count(self, answers: Sequence[Answer], queue_seconds: float) -> None:
        """What a request has taken."""
        self._seconds.labels("queue").inc(queue_seconds)
        for answer in answers:
            stats = answer.stats
            self._tokens.labels("prompt").inc(stats.prompt_tokens)
            self._tokens.labels("image").inc(stats.prompt_image_tokens)
            self._tokens.labels("cached").inc(stats.reused_tokens)
            self._tokens.labels("drawn").inc(stats.generated_tokens)
            self._seconds.labels("encode").inc(stats.encode_seconds)
            self._seconds.labels("prefill").inc(stats.prefill_seconds)
            self._seconds.labels("decode").inc(stats.decode_seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
