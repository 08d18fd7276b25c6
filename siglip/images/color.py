"""From the modes of Pillow to opaque 8-bit RGB, as SigLIP's own preprocessing would get it."""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from siglip.images.formats.tiff import GreyScale
from siglip.images.rejection import ImageRejected

_GREY_16_BIT = GreyScale()


def to_rgb(image: Image.Image, scale: GreyScale = _GREY_16_BIT, *, sure_of_alpha: bool = True) -> Image.Image:
    """Return a loaded image as opaque 8-bit RGB: transparency is composited on white, 16-bit grey is scaled by `scale`.

    If not `sure_of_alpha`, an alpha channel that is zero everywhere is none: see `promises_alpha`. Raises
    `ImageRejected` for samples without a defined range.
    """
    if image.mode in ("I", "F"):
        raise ImageRejected("unsupported", f"32-bit or signed samples, which have no defined range (mode {image.mode})")
    if image.mode.startswith("I;16"):
        image = _rescale_16_bit(image, scale)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "RGBA" and not sure_of_alpha and image.getchannel("A").getbbox() is None:
        return Image.merge("RGB", image.split()[:3])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def promises_alpha(image: Image.Image) -> bool:
    """Whether an image's alpha is alpha even where it is zero everywhere. `image` is one that Pillow has opened.

    Many programs write a BMP's fourth channel without a meaning. A TIFF may not say what its fourth channel is.
    """
    if isinstance(image, TiffImageFile):
        extra = image.tag_v2.get(338, ())
        return extra in (1, 2) or (isinstance(extra, tuple) and extra[:1] in ((1,), (2,)))
    return image.format != "BMP"


def _rescale_16_bit(image: Image.Image, scale: GreyScale) -> Image.Image:
    """16-bit grey to 8 bits. Pillow's own conversion clips instead of scaling: bright images come out white."""
    samples = np.asarray(image).astype(np.uint32)
    if samples.max(initial=0) > scale.white:
        raise ImageRejected("unsupported", f"TIFF with samples over its MaxSampleValue of {scale.white}")
    grey = ((samples * 255 + scale.white // 2) // scale.white).astype(np.uint8)
    shown = Image.fromarray(255 - grey if scale.inverted else grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        return Image.merge("LA", (shown, Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8))))
    return shown
