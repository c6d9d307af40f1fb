"""How do the original's pixels come back where nothing was to change? In pixels."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .placement import CELL_SIDES, Span, crop_shift, find_placement, placement_of, simple_scales, strengths_at, way_to_the_tree
from .quadtree import Quadtree
from .utils import check_picture


def composite(original: torch.Tensor, image: torch.Tensor, tree: Quadtree, *, feather: int = 32) -> torch.Tensor:
    """Put the original's pixels back where the strength is 0, bit for bit.

    original, image: (B, H, W, C). image may be what the host's crop to whole cells has left: it is laid where it was taken
    from, and what was cropped off stays the original's. Returns a picture of the original's size for each image; originals
    are repeated or cut to their number. Of two numbers of channels the greater counts; alpha that only one has is taken as
    it is. feather: width in px of the ramp between the two; it lies inside what changed, and is narrowed to half the
    smallest leaf. Raises ValueError for sizes and trees that do not belong together.
    """
    for name, picture in (("original", original), ("image", image)):
        check_picture(picture, name)
    shift = _shift_of_result(original, image)
    alpha = share_of_result(original, image, tree, feather=feather).to(image.device)[:, :, None]
    out = None
    # One by one, so that a video takes no more than itself.
    for number in range(len(image)):
        kept = number % len(original)
        before, laid = _laid_over(original[kept:kept + 1], image[number:number + 1], shift)
        out = laid.new_empty(len(image), *laid.shape[1:]) if out is None else out
        out[number] = torch.where(alpha == 0, before, torch.lerp(before, laid, alpha.to(laid.dtype)))[0]
    return out


def share_of_result(original: torch.Tensor, image: torch.Tensor, tree: Quadtree, *, feather: int = 32) -> torch.Tensor:
    """How much of the result each of the original's pixels takes, (height, width), as composite does; by the pictures' sizes alone."""
    shift = _shift_of_result(original, image)
    spans = _placement_of_pictures(tree, original, image, shift)
    strength = strengths_at(tree, *(span.px(torch.arange(side, dtype=torch.float64) + 0.5) for span, side in zip(spans, original.shape[1:3])))
    changed = torch.zeros_like(strength)
    inside, _ = _common_parts(original, image, shift)
    changed[inside] = (strength[inside] > 0).float()
    radius = min(feather // 2, int(tree.min_leaf * min(span.scale for span in spans)) // 4)
    return _inner_ramp(changed, radius)


def _shift_of_result(original: torch.Tensor, image: torch.Tensor) -> list[int]:
    """Where in the original the result begins, in px. Raises ValueError unless one is the other or its centred crop."""
    size, part = tuple(original.shape[1:3]), tuple(image.shape[1:3])
    shift = [0, 0] if size == part else crop_shift(size, part, 1, CELL_SIDES)
    if shift is None:
        raise ValueError(
            f"original: expected the size of image, {part[1]} x {part[0]} px, or that before the VAE's crop, less than a cell larger, got {size[1]} x {size[0]} px. "
            + _way_to_the_original(size, part))
    return shift


def _way_to_the_original(size: tuple[int, int], part: tuple[int, int]) -> str:
    """What to do about an original of another size than the result's, `part`."""
    if find_placement(size, part) is None:
        return "That is another aspect: connect the picture that went into VAE Encode, after any crop."
    scale = simple_scales(size, part)[0]
    what = f"{scale:g} times as large" if scale > 1 else f"{1 / scale:g} times smaller" if scale < 1 else "of another scale"
    return f"The result is {what}: connect the picture that went into VAE Encode, after all scaling. Only pixels of its scale can be kept exactly."


def _common_parts(original: torch.Tensor, image: torch.Tensor, shift) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """What the two pictures share: in the original and in the image."""
    spans = [(max(start, 0), min(start + part, side), start) for start, part, side in zip(shift, image.shape[1:3], original.shape[1:3])]
    return tuple(slice(first, last) for first, last, _ in spans), tuple(slice(first - start, last - start) for first, last, start in spans)


def _laid_over(original: torch.Tensor, image: torch.Tensor, shift) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with one size, kind and device: an original, and the original with an image laid on it."""
    dtype = torch.promote_types(original.dtype, image.dtype)
    original, image = original.to(image.device, dtype), image.to(dtype)
    only = _only_alpha(original, image)
    original, image = _equal_channels(original, image)
    laid = image
    if original.shape != image.shape:
        there, here = _common_parts(original, image, shift)
        laid = original.clone()
        laid[:, there[0], there[1]] = image[:, here[0], here[1]]
    if only == "original":
        laid[..., -1] = original[..., -1]
    elif only == "image":
        original[..., -1] = laid[..., -1]
    return original, laid


def _only_alpha(original: torch.Tensor, image: torch.Tensor) -> str | None:
    """Which of two pictures alone has an alpha channel."""
    has = {name: picture.shape[-1] in (2, 4) for name, picture in (("original", original), ("image", image))}
    return None if has["original"] == has["image"] else "original" if has["original"] else "image"


def _equal_channels(original: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with as many channels: grey becomes colour, and who has no alpha becomes opaque."""
    counts = [picture.shape[-1] for picture in (original, image)]
    if counts[0] == counts[1]:
        return original, image
    if max(counts) > 4:
        raise ValueError(f"original: expected the channels of image, {counts[1]}, or 1 to 4 in both, got {counts[0]}. Connect pictures in grey or colours.")
    colours = max(count - (count + 1) % 2 for count in counts)
    equal = []
    for picture, count in zip((original, image), counts):
        parts = [picture[..., :count - (count + 1) % 2].expand(*picture.shape[:-1], colours)]
        if any(other in (2, 4) for other in counts):
            parts.append(picture[..., -1:] if count in (2, 4) else torch.ones_like(picture[..., :1]))
        equal.append(torch.cat(parts, -1))
    return equal[0], equal[1]


def _placement_of_pictures(tree: Quadtree, original: torch.Tensor, image: torch.Tensor, shift) -> tuple[Span, Span]:
    """How the original lies over the tree, which may have been made from it or from what the crop has left of it."""
    sizes = [tuple(picture.shape[1:3]) for picture in (original, image)]
    spans = find_placement((tree.height, tree.width), sizes[0])
    if spans is None:
        spans = placement_of(tree, *sizes[1])
        spans = spans and tuple(Span(span.scale, span.shift - start) for span, start in zip(spans, shift))
    if spans is None:
        raise ValueError(
            f"quadtree: made for a picture of {tree.width} x {tree.height} px, but image is {sizes[1][1]} x {sizes[1][0]} and original {sizes[0][1]} x {sizes[0][0]}, "
            f"which is another aspect. Connect the quadtree that was sampled with. {way_to_the_tree(tree)}")
    return spans


def _inner_ramp(changed: torch.Tensor, radius: int) -> torch.Tensor:
    """From 0 on every kept pixel to 1 at 2 * radius px inside the changed ones: shrink, then blur as far."""
    if radius < 1:
        return changed
    side = 2 * radius + 1
    ramp = changed[None, None]
    for kernel, padding in (((side, 1), (radius, 0)), ((1, side), (0, radius))):
        ramp = -F.max_pool2d(-ramp, kernel, 1, padding)
    for kernel, padding in (((side, 1), (radius, 0)), ((1, side), (0, radius))):
        ramp = F.avg_pool2d(ramp, kernel, 1, padding, count_include_pad=False)
    return ramp[0, 0] * changed
