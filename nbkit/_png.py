"""Pictures small enough to be committed."""

from __future__ import annotations

import io


def compact(png: bytes, target: int = 40_000) -> bytes:
    """The same picture, packed harder and, above ``target`` bytes, in fewer colours.

    Not below 128 colours, where photos get blotches, so a picture full of photos may stay above the target. A picture
    that is small enough, or was reduced before, comes back as it is.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    if len(png) <= target or image.mode == "P":
        return png
    image = image.convert("RGB")
    for colours in (None, 256, 128):
        out = io.BytesIO()
        (image.quantize(colours) if colours else image).save(out, "png", optimize=True)
        if out.tell() <= target:
            break
    return out.getvalue()


def lighter(png: bytes, above: int = 30_000) -> tuple[str, bytes]:
    """The lightest fair form of a picture and its MIME type.

    Up to ``above`` bytes it stays as it is. A chart goes down to 256 colours, which nobody sees; a figure full of
    photos, which would show bands, becomes a JPEG. The two are told apart by which is smaller.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    if len(png) <= above or image.mode == "P":
        return "image/png", png
    chart, photo = io.BytesIO(), io.BytesIO()
    image = image.convert("RGB")
    image.quantize(256).save(chart, "png", optimize=True)
    # full colour resolution: text and thin lines would fray otherwise
    image.save(photo, "jpeg", quality=70, subsampling=0, optimize=True)
    if photo.tell() < 0.8 * chart.tell():
        return "image/jpeg", photo.getvalue()
    return "image/png", min(png, chart.getvalue(), key=len)
