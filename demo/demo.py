"""The main job end to end: a photo, a real ComfyUI, and a result in demo/out/.

    python run.py demo [IMAGE]

The photo is enlarged to about a megapixel, which leaves it soft. Its busy leaves are then redrawn by the small model in
demo/models, its flat ones kept exactly.
"""
from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
from host_server import HostServer
from photos import load_photo
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
PIXELS = 1024 * 1024
PHOTO = "coffee"  # held out: the models have never seen it
STEPS = 20


def main() -> None:
    started = time.monotonic()
    picture = enlarge(open_picture(sys.argv[1:]))
    with tempfile.TemporaryDirectory(prefix="quadtree-demo-") as folder:
        base = prepare_base(Path(folder), picture)
        say("starting ComfyUI")
        with HostServer(Path(os.environ["COMFYUI_DIR"]), base) as server:
            say(f"sampling {picture.width} x {picture.height} px in {STEPS} steps")
            outputs = server.run_graph(graph())
            log = server.log()
        collect(base, picture)
        summary = summarize(base, picture, outputs, log, time.monotonic() - started)
    (OUT / "summary.txt").write_text(summary, "utf-8")
    print("\n" + summary)


def say(text: str) -> None:
    print(f"demo: {text} ...", flush=True)


def open_picture(arguments: list[str]) -> Image.Image:
    """The picture that was named, turned as its camera says, or the default photo."""
    if not arguments:
        return load_photo(PHOTO)
    try:
        return ImageOps.exif_transpose(Image.open(arguments[0])).convert("RGB")
    except OSError as error:
        sys.exit(f"demo: {arguments[0]} cannot be read as a picture ({error}). Give the path of a PNG, JPEG or WebP file.")


def enlarge(picture: Image.Image) -> Image.Image:
    """Scaled to about PIXELS, both sides multiples of 16."""
    scale = (PIXELS / (picture.width * picture.height)) ** 0.5
    return picture.resize([max(round(side * scale / 16), 1) * 16 for side in picture.size], Image.Resampling.LANCZOS)


def prepare_base(base: Path, picture: Image.Image) -> Path:
    """The server's folder, with the picture and the models where its loaders look."""
    for folder, name in (("diffusion_models", "denoiser.safetensors"), ("vae", "autoencoder.safetensors")):
        (base / "models" / folder).mkdir(parents=True)
        shutil.copy(HERE / "models" / name, base / "models" / folder / name)
    (base / "input").mkdir()
    picture.save(base / "input" / "photo.png")
    return base


def graph() -> dict:
    """What a user would wire, in the host's API format."""
    nodes = {
        "photo": ("LoadImage", dict(image="photo.png")),
        "tree": ("QuadtreeFromImage", dict(
            image=["photo", 0], detail_budget=0.4, content_threshold=25.0, min_leaf=32, max_leaf=256, min_denoise=0.0, max_denoise=0.28, metric="variance")),
        "model": ("UNETLoader", dict(unet_name="denoiser.safetensors", weight_dtype="default")),
        "vae": ("VAELoader", dict(vae_name="autoencoder.safetensors")),
        "latent": ("VAEEncode", dict(pixels=["photo", 0], vae=["vae", 0])),
        "tiled": ("QuadtreeTiledDiffusion", dict(
            model=["model", 0], quadtree=["tree", 0], method="Mixture of Diffusers", schedule="img2img", tile_overlap=64, tile_batch_size=0,
            skip_diffusion_below=0.0, min_window=256, max_window=512, shift_method="random", seed=0)),
        # The models know no text: they were trained with two tokens of zeros.
        "lotus": ("LotusConditioning", {}),
        "text": ("ConditioningZeroOut", dict(conditioning=["lotus", 0])),
        "sampled": ("KSampler", dict(
            model=["tiled", 0], seed=1, steps=STEPS, cfg=1.0, sampler_name="euler", scheduler="simple", positive=["text", 0], negative=["text", 0],
            latent_image=["latent", 0], denoise=1.0)),
        "decoded": ("VAEDecode", dict(samples=["sampled", 0], vae=["vae", 0])),
        "result": ("QuadtreeComposite", dict(original=["photo", 0], image=["decoded", 0], quadtree=["tree", 0], feather=32)),
        "mask": ("QuadtreeToMask", dict(quadtree=["tree", 0], width=0, height=0)),
        "mask image": ("MaskToImage", dict(mask=["mask", 0])),
        "before": ("SaveLatent", dict(samples=["latent", 0], filename_prefix="before")),
        "after": ("SaveLatent", dict(samples=["sampled", 0], filename_prefix="after")),
    }
    for name, source in (("result", ["result", 0]), ("overlay", ["tree", 1]), ("strengths", ["mask image", 0])):
        nodes[f"save {name}"] = ("SaveImage", dict(images=source, filename_prefix=name))
    return {name: dict(class_type=kind, inputs=inputs) for name, (kind, inputs) in nodes.items()}


def saved(base: Path, prefix: str) -> Path:
    return next((base / "output").glob(f"{prefix}_*"))


def collect(base: Path, picture: Image.Image) -> None:
    """Put the pictures into OUT, with a map of what changed and all of them on one sheet."""
    OUT.mkdir(exist_ok=True)
    picture.save(OUT / "original.png")
    for name in ("result", "overlay"):
        shutil.copy(saved(base, name), OUT / f"{name}.png")
    difference = np.abs(as_array(OUT / "result.png") - as_array(OUT / "original.png"))
    Image.fromarray((difference * 4).clip(0, 255).astype(np.uint8)).save(OUT / "difference.png")
    sheet(difference.mean(-1), [Image.open(OUT / f"{name}.png") for name in ("original", "overlay", "result")]).save(OUT / "sheet.jpg", quality=88)


def sheet(difference: np.ndarray, pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    """The pictures beside each other at a third of their size, and below them the piece of each, at full size, that changed most."""
    width, height = pictures[0].width // 3, pictures[0].height // 3
    top, left = most_changed(difference, height, width)
    canvas = Image.new("RGB", (len(pictures) * (width + gap) - gap, 2 * height + gap), "white")
    for column, picture in enumerate(pictures):
        canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (column * (width + gap), 0))
        canvas.paste(picture.crop((left, top, left + width, top + height)), (column * (width + gap), height + gap))
    return canvas


def most_changed(difference: np.ndarray, height: int, width: int, stride: int = 16) -> tuple[int, int]:
    """Row and column where the window of that size begins that has the greatest mean difference."""
    corners = itertools.product(*(range(0, size - side + 1, stride) for size, side in zip(difference.shape, (height, width))))
    return max(corners, key=lambda corner: difference[corner[0]:corner[0] + height, corner[1]:corner[1] + width].mean())


def as_array(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int16)


def summarize(base: Path, picture: Image.Image, outputs: dict, log: str, seconds: float) -> str:
    """One screen: what was done, and how far the kept parts are from the original."""
    kept = as_array(saved(base, "strengths"))[..., 0] == 0
    changed_px = np.abs(as_array(OUT / "result.png") - as_array(OUT / "original.png"))
    before, after = (safetensors.numpy.load_file(saved(base, name))["latent_tensor"][0] for name in ("before", "after"))
    cell_px = picture.height // before.shape[-2]
    kept_cells = kept[cell_px // 2::cell_px, cell_px // 2::cell_px]
    error = np.abs(after - before)[:, kept_cells].max(initial=0)
    run = re.search(r"\d+ windows .*", log).group()
    return "\n".join([
        f"picture        {picture.width} x {picture.height} px",
        f"run            {run}",
        f"leaves         {outputs['tree']['qtd_tree'][0]['leaves']}; {100 * kept.mean():.0f} % of the picture has strength 0",
        f"latent there   greatest error {error:.1e}",
        f"pixels there   greatest error {changed_px[kept].max(initial=0)} of 255",
        f"elsewhere      mean change {changed_px[~kept].mean() if (~kept).any() else 0:.1f} of 255",
        f"time           {seconds:.0f} s in all",
        f"written        sheet.jpg, result.png, overlay.png, difference.png (times 4), original.png, summary.txt in {OUT}",
        ""])


if __name__ == "__main__":
    main()
