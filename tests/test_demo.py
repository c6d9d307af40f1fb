"""The demo's result is what it promises: kept parts untouched, the rest sharper and still the same photo."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ROOT, load_module
from PIL import Image

measures = load_module("qtd_demo_measures", ROOT / "demo" / "measures.py")
photos = load_module("photos", ROOT / "demo" / "photos.py")
demo = load_module("qtd_demo", ROOT / "demo" / "demo.py")


@pytest.fixture(scope="module")
def out(tmp_path_factory, comfyui_dir):
    """The folder that a run without arguments fills."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("demo") / "out"
        patch.setattr(demo, "OUT", folder)
        patch.setattr("sys.argv", ["demo.py"])
        patch.setenv("COMFYUI_DIR", str(comfyui_dir))
        demo.main()
    return folder


@pytest.fixture(scope="module")
def pictures(out):
    """Name to picture, height x width x 3, 0 to 255."""
    return {name: demo.as_array(out / f"{name}.png") for name in ("original", "result", "overlay", "difference")}


def steepness(picture, where):
    """The step from a pixel to the one below it that only one in a hundred is above."""
    return np.quantile(np.abs(np.diff(picture, axis=0)).mean(-1)[where[:-1]], 0.99)


def test_the_demo_writes_its_pictures_and_one_screen_of_summary(out, pictures):
    assert {path.name for path in out.iterdir()} == {"original.png", "result.png", "overlay.png", "difference.png", "sheet.jpg", "summary.txt"}
    assert {picture.shape for picture in pictures.values()} == {(832, 1248, 3)}
    lines = (out / "summary.txt").read_text("utf-8").splitlines()
    assert len(lines) <= 10
    assert "latent there   greatest error 0.0e+00" in lines
    assert "pixels there   greatest error 0 of 255" in lines


def test_a_part_of_the_photo_is_kept_pixel_by_pixel_and_a_part_is_redrawn(pictures):
    same = (pictures["result"] == pictures["original"]).all(-1)
    assert 0.2 < same.mean() < 0.6


def test_edges_are_sharper_where_the_photo_is_redrawn(pictures):
    changed = (pictures["result"] != pictures["original"]).any(-1)
    assert steepness(pictures["result"], changed) > 1.05 * steepness(pictures["original"], changed)


def test_shrunk_to_the_size_it_came_from_the_result_is_still_the_photo(out):
    photo = photos.load_photo(demo.PHOTO)
    result = Image.open(out / "result.png").resize(photo.size, Image.Resampling.LANCZOS)
    assert measures.psnr(*(torch.from_numpy(photos.to_array(picture)) for picture in (result, photo))) > 27


@pytest.mark.parametrize("content", [b"not a picture", None])
def test_a_file_that_is_no_picture_is_refused_before_anything_is_written(content, tmp_path, monkeypatch):
    file = tmp_path / "file.png"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(demo, "OUT", tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["demo.py", str(file)])
    with pytest.raises(SystemExit, match="file.png cannot be read as a picture .* Give the path of a PNG, JPEG or WebP file"):
        demo.main()
    assert not (tmp_path / "out").exists()
