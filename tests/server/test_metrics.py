"""Metrics: vLLM's names, the engine's numbers at scrape time, a bounded number of series."""

from prometheus_client.parser import text_string_to_metric_families

from shoal.server.engine.stats import EngineStats
from shoal.server.http.metrics import ADAPTER_LABELS_MAX, OTHER, Metrics

STATS = EngineStats(
    running=3,
    waiting=2,
    kv_blocks_used=25,
    kv_blocks_total=100,
    adapters_resident=7,
    prefix_cache_queries=50,
    prefix_cache_hits=20,
    preemptions_total=1,
    prompt_tokens_total=500,
    generation_tokens_total=900,
)


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        sample.name + "".join(f"|{v}" for k, v in sample.labels.items() if k != "model_name"): (
            sample.value
        )
        for family in families
        for sample in family.samples
        if sample.labels["model_name"] == "base"
    }


def test_the_engines_numbers_have_vllms_names() -> None:
    seen = samples(Metrics("base", stats=lambda: STATS))
    assert seen["vllm:num_requests_running"] == 3
    assert seen["vllm:num_requests_waiting"] == 2
    assert seen["vllm:kv_cache_usage_perc"] == 0.25
    assert seen["vllm:prompt_tokens_total"] == 500
    assert seen["vllm:generation_tokens_total"] == 900
    assert seen["vllm:num_preemptions_total"] == 1
    assert seen["vllm:prefix_cache_queries_total"] == 50
    assert seen["vllm:prefix_cache_hits_total"] == 20
    assert seen["shoal:adapters_resident"] == 7
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert f"vllm:{name}_seconds_count" in seen
    assert "vllm:inter_token_latency_seconds_bucket|0.001" in seen


def test_gauges_are_read_when_scraped() -> None:
    running = [1]
    metrics = Metrics("base", stats=lambda: EngineStats(running=running[0]))
    assert samples(metrics)["vllm:num_requests_running"] == 1
    running[0] = 5
    assert samples(metrics)["vllm:num_requests_running"] == 5


def test_adapters_beyond_the_limit_share_one_series() -> None:
    metrics = Metrics("base", stats=EngineStats)
    for index in range(ADAPTER_LABELS_MAX + 50):
        metrics.request_ended(reason="stop", adapter=f"a{index}", tokens=2)
    metrics.request_ended(reason="length", adapter="a0", tokens=3)
    metrics.request_ended(reason="abort", adapter=None, tokens=1)
    seen = samples(metrics)
    assert seen["shoal:adapter_requests_total|a0"] == 2
    assert seen["shoal:adapter_generation_tokens_total|a0"] == 5
    assert seen[f"shoal:adapter_requests_total|{OTHER}"] == 50
    series = [name for name in seen if name.startswith("shoal:adapter_requests_total|")]
    assert len(series) == ADAPTER_LABELS_MAX + 1
    assert seen["vllm:request_success_total|stop"] == ADAPTER_LABELS_MAX + 50
    assert seen["vllm:request_success_total|abort"] == 1


def test_tenants_beyond_the_first_hundred_share_a_label() -> None:
    metrics = Metrics("base", stats=EngineStats)
    for index in range(ADAPTER_LABELS_MAX + 50):
        metrics.request_ended(reason="stop", adapter=None, tokens=2, tenant=f"t{index}")
    metrics.request_ended(reason="deadline", adapter=None, tokens=3, tenant="t0")
    metrics.request_ended(reason="stop", adapter=None, tokens=3)  # of no tenant
    seen = samples(metrics)
    assert seen["shoal:tenant_requests_total|t0"] == 2
    assert seen["shoal:tenant_generation_tokens_total|t0"] == 5
    assert seen[f"shoal:tenant_requests_total|{OTHER}"] == 50
    series = [name for name in seen if name.startswith("shoal:tenant_requests_total|")]
    assert len(series) == ADAPTER_LABELS_MAX + 1
    assert seen["vllm:request_success_total|deadline"] == 1


def test_two_of_them_do_not_share_anything() -> None:
    one, two = (Metrics("base", stats=EngineStats) for _ in range(2))
    one.error(400)
    assert "shoal:request_errors_total|400" in samples(one)
    assert "shoal:request_errors_total|400" not in samples(two)
