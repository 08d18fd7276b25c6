"""`ImageRejected`: an image that cannot be tagged, and every reason that there is for it."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "empty": "the image has no bytes",
    "too_many_bytes": "the encoded image is larger than limits.max_bytes",
    "too_many_pixels": "width x height is over limits.max_pixels; nothing was decoded",
    "not_an_image": "the bytes are not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF (or HEIC, with sightline[heic])",
    "unsupported": "an image of a format or of a variant that is not decoded; the detail names it",
    "truncated": "the image ends early",
    "corrupt": "the decoder gave up on the bytes",
    "out_of_memory": "decoding needs more memory than limits.max_pixels and limits.max_bytes allow, or than there is",
    "decoder_crashed": "the decoder's process died on this image",
    "decoder_timeout": "decoding took longer than limits.max_seconds",
    "missing": "the row holds no image, or the object that it names is not there",
    "changed": "the object was replaced after it was planned, and on_changed is retag: its new version is a row",
    "unreadable": "the object that the row names could not be read",
    "forbidden": "the host of the URL does not allow to have or to use the image, or fetch does not allow its address",
    "host_trouble": "the host of the URL was in trouble: 429, 5xx or no answer; the next run tries the image again",
    "unreachable": "the host of the URL was in trouble at each of fetch.runs runs",
    "truncated_archive": "the tar ends early: images after this point are lost",
    "corrupt_archive": "a part of the tar, or the Parquet file from this point on, cannot be read",
}
"""Every reason that a reject row can have, with its meaning."""

RENAMED = {"unsupported_pixels": "unsupported"}
"""Reasons in the outputs of earlier versions, with their names now."""


class ImageRejected(Exception):
    """An image that cannot be tagged. `reason` is a key of `REASONS`. `detail` is a text for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise KeyError(f"{reason!r} is not a documented reason")
        detail = " ".join(detail.split())  # one line; libheif writes several
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.index: int | None = None
        """The image's index in the list that `sightline.Encoder.images` was called with. None elsewhere."""

    def __str__(self) -> str:
        """One line: the index if it is known, the reason, and the detail if there is one."""
        where = "" if self.index is None else f"image {self.index}: "
        return f"{where}{self.reason}: {self.detail or REASONS[self.reason]}"
