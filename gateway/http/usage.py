"""How many tokens a request has read and written, as OpenAI counts them.

Knows the usage of each choice. The choices of one prompt share it, so it counts once.
"""

from dataclasses import dataclass, field

from gateway.requests import Chunk


@dataclass(slots=True)
class UsageCount:
    """`prompt_tokens` of all prompts together; the rest adds up as chunks come."""

    prompt_tokens: int
    completion_tokens: int = 0
    _cached: dict[int, int] = field(default_factory=dict)  # by prompt

    def add(self, prompt: int, chunk: Chunk) -> None:
        self.completion_tokens += len(chunk.token_ids)
        if chunk.usage is not None:
            known = self._cached.get(prompt, 0)
            self._cached[prompt] = max(known, chunk.usage.cached_tokens)

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }
