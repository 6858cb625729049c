"""Counters in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter

from temper.serve.audit import AuditLine

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """What the server counted since it started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int, str]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._latency: Counter[float] = Counter()
        self._seconds = 0.0

    def add(self, line: AuditLine) -> None:
        """Count one finished request."""
        with self._lock:
            self._requests[line.tenant or "", line.status, line.code or ""] += 1
            self._tokens["prompt"] += line.prompt_tokens
            self._tokens["completion"] += line.completion_tokens
            if line.status == 200:
                seconds = line.latency_ms / 1000
                self._seconds += seconds
                self._latency[next((bound for bound in BUCKETS_S if seconds <= bound), float("inf"))] += 1

    def text(self, gauges: dict[str, float], release: str) -> str:
        """Every counter, and `gauges` as they stand now."""
        with self._lock:
            lines = ["# TYPE temper_requests_total counter"]
            lines += [
                f'temper_requests_total{{tenant="{_quoted(tenant)}",status="{status}",code="{code}"}} {count}'
                for (tenant, status, code), count in sorted(self._requests.items())
            ]
            lines += ["# TYPE temper_tokens_total counter"]
            lines += [f'temper_tokens_total{{kind="{kind}"}} {count}' for kind, count in sorted(self._tokens.items())]
            lines += ["# TYPE temper_latency_seconds histogram"]
            total = 0
            for bound in (*BUCKETS_S, float("inf")):
                total += self._latency[bound]
                shown = "+Inf" if bound == float("inf") else f"{bound:g}"
                lines.append(f'temper_latency_seconds_bucket{{le="{shown}"}} {total}')
            lines += [f"temper_latency_seconds_sum {self._seconds:.6f}", f"temper_latency_seconds_count {total}"]
        for name, value in sorted(gauges.items()):
            lines += [f"# TYPE temper_{name} gauge", f"temper_{name} {value:g}"]
        lines += ["# TYPE temper_release_info gauge", f'temper_release_info{{release="{release}"}} 1']
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
