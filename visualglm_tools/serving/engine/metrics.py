"""What an engine counts, for Prometheus. Each engine has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one engine; `as_text` is the Prometheus exposition."""

    def __init__(self):
        self.registry = CollectorRegistry()
        registry = {"registry": self.registry}
        self.requests = Counter(
            "visualglm_requests",
            "Answers asked for, by how they ended: stop, length, cancelled, timeout, error, refused (full queue)",
            ["outcome"],
            **registry,
        )
        self.waiting = Gauge("visualglm_queue_length", "Requests that wait for the model", **registry)
        self.running = Gauge("visualglm_running", "Requests that are being answered", **registry)
        self.prompts = Counter("visualglm_read_prompts", "Prompts read; the same again are not", **registry)
        self.prompt_tokens = Counter("visualglm_prompt_tokens", "Tokens of prompts, pictures included", **registry)
        self.completion_tokens = Counter("visualglm_completion_tokens", "Tokens of answers", **registry)
        self.pictures = Counter("visualglm_encoded_pictures", "Pictures that the image encoder has seen", **registry)
        self.seconds = Histogram(
            "visualglm_request_seconds", "From the request to the end of its answer", buckets=SECONDS, **registry
        )
        self.first_token_seconds = Histogram(
            "visualglm_first_token_seconds", "From the request to its first token", buckets=SECONDS, **registry
        )

    def as_text(self) -> bytes:
        return generate_latest(self.registry)
