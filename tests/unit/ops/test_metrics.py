"""What is counted on hot paths is shown as any counter is."""

from prometheus_client import CollectorRegistry, generate_latest

from vcproxy.ops.metrics import Tally


def test_a_tally_is_a_counter() -> None:
    registry = CollectorRegistry(auto_describe=True)
    tally = Tally("vcproxy_sent_bytes", "Bytes sent", "message", registry=registry)
    tally.add("delta", 10)
    tally.add("snapshot", 5)
    tally.add("delta", 1)
    assert registry.get_sample_value("vcproxy_sent_bytes_total", {"message": "delta"}) == 11
    shown = generate_latest(registry).decode()
    assert "# TYPE vcproxy_sent_bytes_total counter" in shown
    assert 'vcproxy_sent_bytes_total{message="snapshot"} 5.0' in shown
