"""The configuration of the search: the section `search` of an endpoint's configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SearchConfig(BaseModel):
    """The output that the endpoint searches, and what a search may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str = Field(
        min_length=1,
        description="The folder or s3://, gs:// or az:// prefix of a finished output of `sightline tag`, made by the "
        "endpoint's model. With more than 200,000 images it needs an index: see `sightline index`.",
    )
    refresh_seconds: float = Field(60.0, ge=1, description="Seconds between two looks for new commits of the output.")
    thumbnail_bytes: int = Field(
        8 * 2**20, ge=0, description="Largest sum of the thumbnails in a response, in bytes. The others are null."
    )
