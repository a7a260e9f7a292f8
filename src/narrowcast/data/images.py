"""Pictures to model inputs: read, resize, crop, normalise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from narrowcast.errors import DataError
from narrowcast.models.reference import ImageSpec

__all__ = ["load_image", "normalise", "to_input"]


def load_image(path: Path, channels: int) -> Image.Image:
    """Return a picture in RGB (3 channels) or grey (1).

    Raises:
        DataError: The file is no picture, or is damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(
            f"picture {path} cannot be read: {error}", allowed="PNG, JPEG, BMP, WebP, TIFF", next_step="remove the file"
        ) from error


def normalise(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """Return a picture of the right size as FP32 ``[C, H, W]``, normalised."""
    pixels = np.asarray(image, np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (spec.mean, spec.std))
    return ((pixels - mean) / std).astype(np.float32)


def to_input(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    """Return the centre crop of a picture, resized so that the crop keeps ``spec.crop`` of the shorter side."""
    height, width = spec.size
    side_w, side_h = image.size
    scale = min(side_w / width, side_h / height) * spec.crop
    crop_w, crop_h = width * scale, height * scale
    left, top = (side_w - crop_w) / 2, (side_h - crop_h) / 2
    box = (left, top, left + crop_w, top + crop_h)
    return normalise(image.resize((width, height), Image.Resampling.BICUBIC, box=box), spec)
