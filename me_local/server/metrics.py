"""The server's figures, as Prometheus reads them. No text of a prompt or a reply is ever in them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from me_local.decoding.reply import Reply

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts requests, replies, pieces and tokens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("me_local_requests", "Requests", ["route", "status"], registry=self.registry)
        self._replies = Counter("me_local_replies", "Replies", ["finish_reason"], registry=self.registry)
        self._pieces = Counter("me_local_pieces", "Pieces written", ["member"], registry=self.registry)
        self._tokens = Counter(
            "me_local_tokens", "Tokens: of prompts, and of replies", ["member", "kind"], registry=self.registry
        )
        self._seconds = Histogram(
            "me_local_reply_seconds", "Time of a reply, without waiting", buckets=_SECONDS, registry=self.registry
        )
        self.waited = Histogram(
            "me_local_wait_seconds", "Time that a reply waited for its turn", buckets=_SECONDS, registry=self.registry
        )

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Show a value as it is when it is asked for."""
        Gauge(f"me_local_{name}", help_text, registry=self.registry).set_function(value)

    def count(self, reply: Reply) -> None:
        """Count a reply that has ended."""
        self._replies.labels(reply.finish_reason).inc()
        self._seconds.observe(reply.seconds)
        for usage in reply.usage:
            self._pieces.labels(usage.member).inc(usage.pieces)
            self._tokens.labels(usage.member, "prompt_evaluated").inc(usage.prompt_evaluated)
            self._tokens.labels(usage.member, "prompt_cached").inc(usage.prompt_cached)
            self._tokens.labels(usage.member, "text_evaluated").inc(usage.text_evaluated)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
