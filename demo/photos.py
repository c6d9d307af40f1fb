"""The pictures the demo's models are trained on, the ones held out, and textures made from nothing.

Photos are those that scikit-image and scikit-learn carry inside their wheels; nothing is downloaded.
"""
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HELD_OUT = ("astronaut", "camera", "coffee")
TRAINING = (
    "china", "flower", "chelsea", "rocket", "motorcycle_left", "motorcycle_right", "retina", "hubble_deep_field",
    "moon", "brick", "grass", "gravel", "coins", "ihc",
)
WEIGHTS = (5, 5, 4, 3, 3, 2, 1, 1, 0.5, 1, 1.5, 1, 0.5, 0.5)
SCIKIT_LEARN = ("china", "flower")
SYNTHETIC_SIDE = 384


def photo_path(name):
    """File of one photo inside the installed wheel, found without importing the library."""
    package, folder = ("sklearn", "datasets/images") if name in SCIKIT_LEARN else ("skimage", "data")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f"photo {name!r} is in the {package} wheel, which is not installed: pip install scikit-image scikit-learn")
    root = Path(spec.origin).parent / folder
    return next(path for path in (root / f"{name}.png", root / f"{name}.jpg") if path.exists())


def load_photo(name):
    return Image.open(photo_path(name)).convert("RGB")


def held_out_photos():
    """Name to picture, each cropped at the right and bottom to multiples of 16 px."""
    photos = {name: load_photo(name) for name in HELD_OUT}
    return {name: photo.crop((0, 0, photo.width // 16 * 16, photo.height // 16 * 16)) for name, photo in photos.items()}


def to_array(picture):
    """Picture to float32, height x width x 3, 0 to 1."""
    return np.asarray(picture, dtype=np.float32) / 255


def to_picture(array):
    return Image.fromarray((np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8))


def gaussian_field(rng, side, exponent):
    """Noise with a power-law spectrum, zero mean and unit deviation, side x side."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * frequency ** -exponent
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(side, side))
    return field / field.std()


def fractal(rng, side, palette):
    """Cloudy to grainy noise: one shared field and a weaker one per channel, around a photo's colour."""
    exponent = rng.uniform(0.6, 2.0)
    shared = gaussian_field(rng, side, exponent)
    channels = np.stack([shared + rng.uniform(0, 0.5) * gaussian_field(rng, side, exponent) for _ in range(3)], -1)
    return np.clip(draw_colour(rng, palette) + channels * rng.uniform(0.05, 0.2), 0, 1)


def grating(rng, side, palette):
    """A warped sinusoid or square wave of a random period between two colours."""
    rows, columns = np.mgrid[:side, :side]
    angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(3), np.log(48)))
    phase = (rows * np.sin(angle) + columns * np.cos(angle)) / period
    phase = phase + rng.uniform(0, 1) * gaussian_field(rng, side, 2.0)
    wave = np.clip(np.sin(2 * np.pi * phase) * rng.choice([1, 1, 4]), -1, 1)[..., None] / 2 + 0.5
    return draw_colour(rng, palette) * wave + draw_colour(rng, palette) * (1 - wave)


def gradient(rng, side, palette):
    rows, columns = np.mgrid[:side, :side] / side
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (rows - 0.5) * np.sin(angle) + (columns - 0.5) * np.cos(angle)
    ramp = np.clip(0.5 + ramp * rng.uniform(0.5, 2), 0, 1)[..., None] ** rng.uniform(0.5, 2)
    return draw_colour(rng, palette) * ramp + draw_colour(rng, palette) * (1 - ramp)


def draw_colour(rng, palette):
    """A colour that occurs in a photo, made a little brighter or darker."""
    return np.clip(palette[rng.integers(len(palette))] * rng.uniform(0.7, 1.3), 0, 1)


def ellipse_or_polygon(rng, centre, radius):
    """Corner points of a leaf: an ellipse seen as 24 points, or 3 to 7 random corners."""
    round_leaf = rng.random() < 0.5
    count = 24 if round_leaf else rng.integers(3, 8)
    angles = np.sort(rng.uniform(0, 2 * np.pi, count)) if not round_leaf else np.linspace(0, 2 * np.pi, count)
    stretch, turn = rng.uniform(0.4, 1), rng.uniform(0, np.pi)
    points = np.stack([np.cos(angles), stretch * np.sin(angles)], -1) * radius
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return [tuple(point) for point in points @ rotation + centre]


def dead_leaves(rng, side, palette, fills):
    """Opaque leaves with radii of density r^-3 falling on each other: occlusion edges as photos have them."""
    large = side * 2
    canvas = fills[rng.integers(len(fills))].resize((large, large))
    smallest = np.exp(rng.uniform(np.log(4), np.log(24)))
    for _ in range(int(rng.integers(150, 600))):
        radius = smallest / np.sqrt(1 - rng.random() * (1 - (smallest / large * 2) ** 2))
        mask = Image.new("L", (int(2 * radius) + 2,) * 2)
        ImageDraw.Draw(mask).polygon(ellipse_or_polygon(rng, radius + 1, radius), fill=255)
        fill = leaf_fill(rng, mask.size, palette, fills)
        corner = (int(rng.uniform(-radius, large - radius)), int(rng.uniform(-radius, large - radius)))
        canvas.paste(fill, corner, mask)
    return to_array(canvas.resize((side, side), Image.LANCZOS))


def leaf_fill(rng, size, palette, fills):
    """A flat colour, or a piece of a texture or photo."""
    if rng.random() < 0.5:
        return Image.new("RGB", size, tuple(int(value * 255) for value in draw_colour(rng, palette)))
    source = fills[rng.integers(len(fills))]
    extent = min(source.width, source.height, max(8, int(size[0] * rng.uniform(0.5, 1.5))))
    left, top = rng.integers(source.width - extent + 1), rng.integers(source.height - extent + 1)
    return source.resize(size, Image.BILINEAR, box=(left, top, left + extent, top + extent))


def strokes(rng, side, palette, fills):
    """Curves, lines and outlines of many widths: hair, twigs, wires and something like writing."""
    large = side * 2
    canvas = fills[rng.integers(len(fills))].resize((large, large), Image.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    length, width = rng.uniform(10, 120), rng.uniform(1, 8)
    for _ in range(int(rng.integers(40, 500))):
        colour = tuple(int(value * 255) for value in draw_colour(rng, palette))
        heading = np.cumsum(np.concatenate([rng.uniform(0, 2 * np.pi, 1), rng.normal(0, 0.6, 5)]))
        steps = np.stack([np.cos(heading), np.sin(heading)], -1) * length * rng.uniform(0.3, 1)
        points = rng.uniform(0, large, 2) + np.cumsum(steps, 0)
        draw.line([tuple(point) for point in points], fill=colour, width=int(np.ceil(width * rng.uniform(0.5, 1.5))), joint="curve")
    return to_array(canvas.resize((side, side), Image.LANCZOS))


def synthesise(rng, count, photos):
    """Textures in equal parts: fractal noise, gratings and gradients, strokes, and twice as many dead leaves."""
    pixels = np.concatenate([to_array(photo.resize((48, 48))).reshape(-1, 3) for photo in photos])
    side = SYNTHETIC_SIDE
    plain = [to_picture(maker(rng, side, pixels)) for maker in (fractal, fractal, grating, gradient) for _ in range(6)]
    fills = plain + photos
    makers = (
        lambda: fractal(rng, side, pixels), lambda: grating(rng, side, pixels), lambda: gradient(rng, side, pixels),
        lambda: strokes(rng, side, pixels, fills), *[lambda: dead_leaves(rng, side, pixels, fills)] * 2,
    )
    return [to_picture(makers[index % len(makers)]()) for index in range(count)]


def mirrored(picture, height, width):
    """The picture, continued by its mirror image at the bottom and right where it is smaller than asked for."""
    missing = max(0, height - picture.height), max(0, width - picture.width)
    if not any(missing):
        return picture
    return Image.fromarray(np.pad(np.asarray(picture), ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric"))


def recolour(rng, crop):
    """Small changes of contrast and channel balance; now and then channels swapped, or grey."""
    kind = rng.random()
    if kind < 0.12:
        crop = crop[..., rng.permutation(3)]
    elif kind < 0.18:
        crop = np.repeat(crop @ np.float32([[0.299], [0.587], [0.114]]), 3, -1)
    gain = rng.uniform(0.8, 1.2) * rng.uniform(0.9, 1.1, 3)
    return np.clip((crop - 0.5) * gain.astype(np.float32) + 0.5 + np.float32(rng.uniform(-0.1, 0.1)), 0, 1)


def enlarged(crop, times):
    """The crop, height x width x 3, as it looks when it was enlarged that many times."""
    picture = to_picture(crop)
    small = picture.resize([max(1, round(side / times)) for side in picture.size], Image.LANCZOS)
    return to_array(small.resize(picture.size, Image.LANCZOS))


class Crops:
    """Endless random crops of training photos and synthetic textures.

    Scale is source pixels per crop pixel: above 1 shrinks, which makes a photo crisp at pixel level; below 1 enlarges,
    which is what an upscaled picture looks like.
    """

    def __init__(self, seed, synthetic_count=180, synthetic_share=0.3):
        self.rng = np.random.default_rng(seed)
        self.photos = [load_photo(name) for name in TRAINING]
        self.textures = synthesise(self.rng, synthetic_count, self.photos)
        self.synthetic_share = synthetic_share

    def source(self):
        if self.rng.random() < self.synthetic_share:
            return self.textures[self.rng.integers(len(self.textures))]
        weights = np.array(WEIGHTS)
        return self.photos[self.rng.choice(len(self.photos), p=weights / weights.sum())]

    def crop(self, height, width, smallest_scale, largest_scale):
        """One crop, height x width x 3, 0 to 1."""
        scale = np.exp(self.rng.uniform(np.log(smallest_scale), np.log(largest_scale)))
        box_height, box_width = height * scale, width * scale
        photo = mirrored(self.source(), int(np.ceil(box_height)), int(np.ceil(box_width)))
        top, left = self.rng.uniform(0, photo.height - box_height), self.rng.uniform(0, photo.width - box_width)
        piece = photo.resize((width, height), Image.LANCZOS, box=(left, top, left + box_width, top + box_height))
        crop = recolour(self.rng, to_array(piece))
        return crop[:, ::-1] if self.rng.random() < 0.5 else crop

    def batch(self, count, height, width, smallest_scale=1.0, largest_scale=2.5):
        """Crops as one array, count x 3 x height x width, turned upside down or on their side now and then."""
        crops = np.stack([self.crop(height, width, smallest_scale, largest_scale) for _ in range(count)])
        crops = crops[:, ::-1] if self.rng.random() < 0.2 else crops
        turned = height == width and self.rng.random() < 0.3
        return np.ascontiguousarray(crops.transpose(0, 3, 2, 1) if turned else crops.transpose(0, 3, 1, 2))
