"""The settings for fetching the http(s) URLs of lists."""

from __future__ import annotations

from pydantic import Field, field_validator

from storage.web.client import USER_AGENT
from storage.web.guard import GuardConfig


class FetchConfig(GuardConfig):
    """Settings for fetching the http(s) URLs of lists: whether, how many at once, and what to honour."""

    enabled: bool = Field(
        False,
        description="Fetch the http(s) URLs of lists. If false, a list with such a URL is refused before any work.",
    )
    connections: int = Field(
        256, gt=0, description="Requests at the same time, of all readers together; at least one for each reader."
    )
    host_connections: int = Field(
        8,
        gt=0,
        description="Requests to one host at the same time, of all readers together; at least one for each reader.",
    )
    runs: int = Field(
        5,
        gt=0,
        description="Runs that try an image whose host is in trouble (429, 5xx, no answer). After that many it is "
        "rejected as unreachable.",
    )
    user_agent: str = Field(
        USER_AGENT,
        description="The User-Agent of requests. Some hosts require one with a way to contact you, and answer 403 "
        "otherwise.",
    )
    robots_tags: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex"),
        description="An image whose host answers with one of these in X-Robots-Tag is rejected as forbidden; [] is "
        "none.",
    )

    @field_validator("user_agent")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not value.strip() or not value.isascii() or not value.isprintable():
            raise ValueError("user_agent is one line of ASCII text, such as 'my-job/1.0 (me@example.org)'")
        return value.strip()

    @field_validator("robots_tags")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(tag.strip().lower() for tag in value)

    def for_reader(self, readers: int) -> FetchConfig:
        """Return the settings of one of `readers` readers, which share the numbers of connections."""
        share = {name: max(1, getattr(self, name) // readers) for name in ("connections", "host_connections")}
        return self.model_copy(update=share)
