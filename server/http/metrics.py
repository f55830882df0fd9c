"""Prometheus metrics: vLLM's names where vLLM has the thing, ``shoal:`` for what it has not.

Owns a registry of its own (nothing global). Gauges and engine totals are read from the engine's
snapshot at scrape time; what concerns text, clients and adapters is counted here. The number of
series is bounded: at most ``ADAPTER_LABELS_MAX`` adapters, and as many tenants, get their own
label.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from shoal.server.engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ADAPTER_LABELS_MAX = 100
OTHER = "_other"

_LABELS = ("model_name",)
# vLLM's buckets; inter-token latency extended below its 10 ms, where small models live.
_TTFT: tuple[float, ...] = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
)
_TTFT += (20, 40, 80, 160, 640, 2560)
_ITL: tuple[float, ...] = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
)
_ITL += (0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_E2E: tuple[float, ...] = (
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
)
_E2E += (480, 960, 1920, 7680)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_STAGE = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)


class Metrics:
    """Counters and histograms of one process."""

    def __init__(self, model_name: str, *, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._model = model_name
        self._adapters: set[str] = set()
        self._tenants: set[str] = set()
        self.registry.register(_EngineCollector(model_name, stats))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, _LABELS, buckets=buckets, registry=self.registry)
            return family.labels(model_name)

        self.time_to_first_token = histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT
        )
        self.inter_token_latency = histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a request.", _ITL
        )
        self.queue_time = histogram(
            "vllm:request_queue_time_seconds", "Arrival to the first step with it.", _E2E
        )
        self.e2e_latency = histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last token.", _E2E
        )
        self.prompt_length = histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request.", _TOKENS
        )
        self.generation_length = histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", _TOKENS
        )
        self.stage_latency = histogram(
            "shoal:adapter_stage_seconds", "Resolve an adapter and pin it in host memory.", _STAGE
        )
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._errors = Counter(
            "shoal:request_errors",
            "Error answers, by HTTP status.",
            (*_LABELS, "status"),
            registry=self.registry,
        )
        self._uploads = Counter(
            "shoal:adapter_uploads",
            "Adapter uploads, by outcome.",
            (*_LABELS, "outcome"),
            registry=self.registry,
        )
        self._adapter_requests = Counter(
            "shoal:adapter_requests",
            "Requests, by adapter (the first hundred; the rest as _other).",
            (*_LABELS, "adapter"),
            registry=self.registry,
        )
        self._adapter_tokens = Counter(
            "shoal:adapter_generation_tokens",
            "Generated tokens, by adapter.",
            (*_LABELS, "adapter"),
            registry=self.registry,
        )
        self._tenant_requests = Counter(
            "shoal:tenant_requests",
            "Requests, by tenant (the first hundred; the rest as _other).",
            (*_LABELS, "tenant"),
            registry=self.registry,
        )
        self._tenant_tokens = Counter(
            "shoal:tenant_generation_tokens",
            "Generated tokens, by tenant.",
            (*_LABELS, "tenant"),
            registry=self.registry,
        )

    def request_ended(
        self, *, reason: str, adapter: str | None, tokens: int, tenant: str = ""
    ) -> None:
        """Count one engine request that ended by itself, by its client (``abort``) or its deadline.

        Args:
            tenant: empty when the server has none.
        """
        self._success.labels(self._model, reason).inc()
        if adapter is not None:
            label = _label(self._adapters, adapter)
            self._adapter_requests.labels(self._model, label).inc()
            self._adapter_tokens.labels(self._model, label).inc(tokens)
        if tenant:
            label = _label(self._tenants, tenant)
            self._tenant_requests.labels(self._model, label).inc()
            self._tenant_tokens.labels(self._model, label).inc(tokens)

    def error(self, status: int) -> None:
        """Count one error answer."""
        self._errors.labels(self._model, str(status)).inc()

    def upload(self, outcome: str) -> None:
        """Count one upload: ``accepted`` or ``refused``."""
        self._uploads.labels(self._model, outcome).inc()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)


def _label(known: set[str], name: str) -> str:
    if name not in known:
        if len(known) >= ADAPTER_LABELS_MAX:
            return OTHER
        known.add(name)
    return name


class _EngineCollector(Collector):
    """Reads the engine's snapshot when scraped."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._labels = [model_name]
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        used = now.kv_blocks_used / now.kv_blocks_total if now.kv_blocks_total else 0.0
        gauges = (
            ("vllm:num_requests_running", "Requests in the batch.", now.running),
            ("vllm:num_requests_waiting", "Accepted requests not in the batch.", now.waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used),
            ("shoal:adapters_resident", "Adapters in device memory.", now.adapters_resident),
            ("shoal:last_step_seconds", "Duration of the latest step.", now.last_step_s),
        )
        counters = (
            ("vllm:prompt_tokens", "Prompt tokens.", now.prompt_tokens_total),
            ("vllm:generation_tokens", "Generated tokens.", now.generation_tokens_total),
            ("vllm:num_preemptions", "Preemptions.", now.preemptions_total),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", now.prefix_cache_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", now.prefix_cache_hits),
            ("shoal:steps", "Forward passes.", now.steps_total),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
