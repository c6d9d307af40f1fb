"""Decoding only what changed, against decoding all of it and compositing."""
from __future__ import annotations

import functools
import logging
import math
import threading
from dataclasses import replace

import autoencoders
import comfy.model_management
import comfy.ops
import comfy.pixel_space_convert
import comfy.sd
import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_module
from counting import LiveBytes
from qtd_pack import decode, decode_plan, decoders, piecewise
from qtd_pack.compositing import composite
from qtd_pack.decode import decode_changed
from qtd_pack.nodes import QuadtreeDecode
from qtd_pack.placement import strength_raster
from qtd_pack.quadtree import build_quadtree
from qtd_pack.strengths import quadtree_from_mask
from qtd_pack.utils import Rect, block_means
from torch.utils.flop_counter import FlopCounterMode

photos = load_module("qtd_photos", ROOT / "demo" / "photos.py")
SIZES = ((640, 427), (800, 533), (1280, 853), (750, 1000), (1023, 767), (500, 375), (1080, 1350), (1365, 1024), (501, 383), (1000, 750))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def photo(name: str, width: int, height: int) -> torch.Tensor:
    return torch.from_numpy(photos.to_array(photos.load_photo(name).resize((width, height))))[None]


def part_changed(height: int, width: int, *rects: tuple[int, int, int, int], leaf: int = 32):
    """A tree that redraws rectangles, (top, left, bottom, right) in px."""
    mask = torch.zeros(height, width)
    for top, left, bottom, right in rects:
        mask[top:bottom, left:right] = 1
    return quadtree_from_mask(mask, min_leaf=leaf, max_leaf=leaf * 4)


def changed_of(tree, image: torch.Tensor) -> torch.Tensor:
    return strength_raster(tree, *image.shape[1:3]) > 0


def levels(one: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> tuple[float, float]:
    """The mean and the 99th percentile of what two pictures differ by where a mask is set, on the 0..255 scale."""
    differences = (255 * (one - other).abs())[:, where].flatten()
    return float(differences.mean()), float(differences.kthvalue(math.ceil(0.99 * len(differences))).values)


def counted(action) -> tuple[torch.Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = action()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("width, height", SIZES)
def test_kept_pixels_are_the_originals_whatever_its_size(width, height):
    original = photo("coffee", width, height)
    tree = part_changed(height, width, (64, 96, 160, 224))
    vae = autoencoders.demo()
    latent = autoencoders.latent_for(vae, height // 8 * 8, width // 8 * 8)
    result = decode_changed(vae, latent, original, tree)
    kept = ~changed_of(tree, original)
    assert result.shape == original.shape and torch.equal(result[:, kept], original[:, kept])
    assert levels(result, original, ~kept)[0] > 1


def test_kept_pixels_are_the_originals_where_a_cell_has_16_px():
    original, vae = photo("coffee", 1920, 1080), autoencoders.of_kind("FLUX.2")
    tree = part_changed(1080, 1920, (0, 96, 128, 224), leaf=64)
    result = decode_changed(vae, autoencoders.latent_for(vae, 1072, 1920), original, tree)
    kept = ~changed_of(tree, original)
    assert vae.spacial_compression_decode() == 16 and result.shape == original.shape
    assert torch.equal(result[:, kept], original[:, kept]) and levels(result, original, ~kept)[0] > 1


@pytest.mark.parametrize("width, height, feather", [(203, 155, 32), (256, 192, 0), (200, 264, 64)])
def test_the_tiny_autoencoder_gives_what_a_whole_decode_gives(width, height, feather):
    original = photo("astronaut", width, height)
    tree = part_changed(height, width, (0, 0, 64, 64), (96, 64, height, 160), leaf=16)
    vae = autoencoders.demo()
    latent = vae.encode(original)
    result = decode_changed(vae, latent, original, tree, feather=feather, window=64)
    assert (result - composite(original, vae.decode(latent), tree, feather=feather)).abs().max() < 1e-5


def test_what_the_host_brings_of_a_norms_weights_is_given_back(monkeypatch):
    """Each time, to the host that may have brought it by a stream of the device."""
    lent, cast, uncast = [], comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight

    def lend(norm, *args, **options):
        found = cast(norm, *args, **options)
        lent.append(id(norm))
        return found

    def take_back(norm, *args):
        lent.remove(id(norm))
        return uncast(norm, *args)

    norm = autoencoders.fitted().first_stage_model.decoder.norm_out
    moments = piecewise.Moments(torch.zeros(norm.num_groups), torch.ones(norm.num_groups))
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lend)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", take_back)
    x = torch.randn(1, norm.num_channels, 4, 4)
    expected = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert torch.allclose(piecewise.normalised(norm, x, moments), expected, atol=1e-4) and lent == []


@pytest.mark.parametrize("kind", autoencoders.KINDS)
def test_windows_of_every_kind_join_to_the_whole(kind):
    vae, original = autoencoders.of_kind(kind), torch.rand(1, 192, 256, 3)
    tree = part_changed(192, 256, (0, 0, 192, 256))
    latent = autoencoders.latent_for(vae, 192, 256)
    whole = vae.decode(latent).reshape(original.shape)
    result = decode_changed(vae, latent, original, tree, feather=0, window=96)
    assert whole.std() > 0.05
    assert (result - whole).abs().max() < 2e-4


@pytest.mark.parametrize("kind", [kind for kind in autoencoders.KINDS if kind != "FLUX"])  # SD's but for its channels
def test_a_part_of_every_kind_is_that_of_the_whole(kind):
    vae, original = autoencoders.of_kind(kind), torch.rand(1, 320, 384, 3)
    tree = part_changed(320, 384, (64, 0, 256, 224))
    latent = autoencoders.latent_for(vae, 320, 384)
    result = decode_changed(vae, latent, original, tree, window=64)
    expected = composite(original, vae.decode(latent).reshape(original.shape), tree)
    mean, largest = levels(result, expected, changed_of(tree, original))
    if decoders.decoder_of(vae.first_stage_model, 1).has_norms:
        # Weights at random make much of a statistic's last percent, so the measure is what the host's tiles make of it.
        cells = 192 // vae.spacial_compression_decode()
        tiled = vae.decode_tiled(latent, tile_x=cells, tile_y=cells, overlap=cells // 8)
        assert mean < levels(composite(original, tiled, tree), expected, changed_of(tree, original))[0] / 2
    else:
        assert mean < 0.1 and largest < 0.5


@pytest.fixture(scope="module")
def fitted():
    """Photos decoded whole and by the host's tiles, by an autoencoder whose pictures are pictures."""
    vae, found = autoencoders.fitted(), []
    with torch.inference_mode():
        for name, budget in (("coffee", 0.25), ("chelsea", 0.2), ("rocket", 0.25)):
            original = photo(name, 768, 512)
            latent = autoencoders.demo().encode(original)
            tree = build_quadtree(original, detail_budget=budget, min_leaf=32, max_leaf=256)
            whole, operations = counted(lambda latent=latent: vae.decode(latent))
            found.append((original, latent, tree, whole, operations))
    return vae, found


def test_what_changed_is_that_of_a_whole_decode_and_better_than_the_hosts_tiles(fitted):
    vae, found = fitted
    for original, latent, tree, whole, _ in found:
        expected, changed = composite(original, whole, tree), changed_of(tree, original)
        assert 0.2 < changed.float().mean() < 0.8
        mean, largest = levels(decode_changed(vae, latent, original, tree, window=256), expected, changed)
        tiled = composite(original, vae.decode_tiled(latent, tile_x=32, tile_y=32, overlap=8), tree)
        assert mean < 1.5 and largest < 6
        assert mean < levels(tiled, expected, changed)[0] / 3


def test_a_small_part_is_that_of_a_whole_decode_too(fitted):
    vae, found = fitted
    for original, latent, _, whole, _ in (found[0], found[2]):
        tree = build_quadtree(original, detail_budget=0.1, min_leaf=32, max_leaf=256)
        changed = changed_of(tree, original)
        mean, largest = levels(decode_changed(vae, latent, original, tree, window=256), composite(original, whole, tree), changed)
        assert changed.float().mean() < 0.25 and mean < 1.5 and largest < 6


def test_there_is_no_line_where_windows_meet(fitted):
    vae, found = fitted
    original, latent, _, whole, _ = found[0]
    tree = part_changed(512, 768, (0, 0, 512, 384))
    result = decode_changed(vae, latent, original, tree, window=128, feather=0)
    steps = (result - whole)[:, :, :384].diff(dim=2).abs().mean((0, 1, 3))
    at_borders = steps[127::128].mean()
    assert at_borders < 1.1 * steps.median() + 1e-4


def test_operations_follow_the_share_that_changed(fitted):
    vae, found = fitted
    for original, latent, tree, _, operations in found:
        share = float(changed_of(tree, original).float().mean())
        _, here = counted(lambda: decode_changed(vae, latent, original, tree, window=512))
        assert here < 1.4 * share * operations


def test_where_all_changed_it_is_never_more_than_the_hosts_tiled_decode(fitted):
    vae, original = fitted[0], photo("coffee", 384, 256)
    latent = autoencoders.demo().encode(original)
    everything = part_changed(256, 384, (0, 0, 256, 384))
    _, tiled = counted(lambda: vae.decode_tiled(latent, tile_x=16, tile_y=16, overlap=4))
    _, here = counted(lambda: decode_changed(vae, latent, original, everything, window=128))
    assert here < tiled


@pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "moon", "retina", "rocket"])
def test_a_2048_px_photo_with_windows_of_512_costs_at_most_1_4_times_the_share(name):
    picture = photo(name, 2048, 1536)
    for budget in (0.25, 0.4, 1.0):
        changed = changed_of(build_quadtree(picture, detail_budget=budget), picture)
        active = F.max_pool2d(changed[None, None].float(), 8)[0, 0] > 0
        for kind in ("SD", "TAESD"):
            price = decode_plan.Price(full_size(kind), *active.shape)
            plan = decode_plan.plan_decode(price.decoder, active, 64)
            assert price.of_plan(plan) < min(1.4 * float(changed.float().mean()), 1.01 if kind == "SD" else 1.15) * price.whole


def test_the_price_of_a_plan_is_that_of_the_operations_that_are_counted_or_a_little_more(fitted):
    vae, found = fitted
    for original, latent, tree, *_ in found[:2]:
        active = F.max_pool2d(changed_of(tree, original)[None, None].float(), 8)[0, 0] > 0
        decoder = decoders.decoder_of(vae.first_stage_model, 1)
        price, plan = decode_plan.Price(decoder, *active.shape), decode_plan.plan_decode(decoder, active, 32)
        price = replace(price, decoder=replace(decoder, attention=0))  # which is not counted on a CPU
        _, operations = counted(lambda: decode_changed(vae, latent, original, tree, window=256))
        # Samples and windows at the picture's border have less around them than the price says.
        assert plan.samples and 0.9 * price.of_plan(plan) < operations / 2 < 1.01 * price.of_plan(plan)


@functools.lru_cache(maxsize=None)
def full_size(kind: str) -> decoders.Decoder:
    with torch.device("meta"):
        if kind == "TAESD":
            return decoders.decoder_of(decoders.tiny.TAESD(), 1)
        sizes = {**autoencoders.SIZES, "ch": 128, "ch_mult": [1, 2, 4, 4], "z_channels": 4}
        return decoders.decoder_of(comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=sizes, embed_dim=4), 1)


@pytest.mark.parametrize("kind", ["SD", "FLUX.2", "TAESD", "Wan"])
def test_the_price_is_that_of_the_operations_that_are_counted(kind):
    vae = autoencoders.of_kind(kind)
    latent = autoencoders.latent_for(vae, 128, 192)
    decoder = decoders.decoder_of(vae.first_stage_model, 1)
    _, operations = counted(lambda: vae.decode(latent))
    price = replace(decoders_price(decoder, 128, 192), decoder=replace(decoder, attention=0))  # which is not counted on a CPU
    assert price.whole * 2 == pytest.approx(operations, rel=0.05)


def decoders_price(decoder: decoders.Decoder, height: int, width: int) -> decode_plan.Price:
    return decode_plan.Price(decoder, height // decoder.cell_px, width // decoder.cell_px)


def test_windows_hold_all_that_is_active_once_and_nothing_twice():
    torch.manual_seed(3)
    decoder = full_size("SD")
    for height, width, largest in ((61, 90, 16), (33, 40, 64), (8, 128, 24)):
        active = F.max_pool2d((torch.rand(1, 1, height, width) > 0.995).float(), 5, 1, 2)[0, 0] > 0
        covered = torch.zeros(height, width)
        for core in decode_plan.cover(active, decode_plan.Price(decoder, height, width), largest):
            assert 0 < core.height <= largest and 0 < core.width <= largest
            covered[core.top:core.bottom, core.left:core.right] += 1
        assert covered.max() == 1 and bool((covered[active] == 1).all())


def test_weights_give_the_picture_the_features_that_it_has():
    torch.manual_seed(0)
    features = torch.randn(8, 31, 40).cumsum(1).cumsum(2)
    windows = torch.zeros(16, 20, dtype=torch.bool)
    windows[:, :8] = True
    samples, weights = decode_plan.represented(features, windows, 12)
    assert len(set(samples)) == 12 and all(sample.left >= 16 for sample in samples)
    assert int((weights != 0).sum()) == 8 * 16 + 12
    assert float(weights.sum()) == pytest.approx(31 * 40, rel=1e-2)
    told = (block_means(features, decode_plan.BLOCK).double() * weights).sum((1, 2)) / (31 * 40)
    plain = block_means(features, decode_plan.BLOCK).double()[:, :, :8].mean((1, 2))
    exact = features.double().mean((1, 2))
    assert ((told - exact).abs() < 0.1 * (plain - exact).abs() + 0.02 * features.std()).all()


def test_no_convolution_sees_more_than_a_window(fitted):
    vae, found = fitted
    original, latent, tree, *_ = found[0]
    seen, modules = [], [module for module in vae.first_stage_model.decoder.up[0].modules() if isinstance(module, torch.nn.Conv2d)]
    handles = [module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1] * inputs[0].shape[-2])) for module in modules]
    try:
        decode_changed(vae, latent, original, tree, window=128)
    finally:
        for handle in handles:
            handle.remove()
    assert seen and max(seen) <= (128 + 2 * 8) ** 2


def test_no_part_takes_more_memory_than_a_window_and_no_more_of_them_waits_than_there_is_room_for(fitted, monkeypatch):
    vae, found = fitted
    original, latent, tree, *_ = found[0]
    peaks: dict[str, list[int]] = {"begin": [], "made": [], "moments_of": []}

    def counting(name, function):
        def call(*args):
            with LiveBytes() as live:
                result = function(*args)
            peaks[name].append(live.peak)
            return result
        return call

    for name in ("made", "moments_of"):
        monkeypatch.setattr(piecewise, name, counting(name, getattr(piecewise, name)))
    monkeypatch.setattr(decode, "begin", counting("begin", piecewise.begin))
    decode_changed(vae, latent, original, tree, window=256)
    with LiveBytes() as window:  # and what it looks at around it
        vae.first_stage_model.decode(latent[..., 8:8 + 46, 8:8 + 46])
    assert len(peaks["made"]) > 50
    assert max(max(found) for found in peaks.values()) < window.peak


@pytest.mark.parametrize("room", [0, 2e6, 1e9])
def test_what_there_is_no_room_for_waits_elsewhere(fitted, room):
    """On a device without numbers, so that what lies there can be told from what lies here."""
    vae, found = fitted
    _, latent, *_ = found[0]
    decoder, active = decoders.decoder_of(vae.first_stage_model, 1), torch.zeros(64, 96, dtype=torch.bool)
    active[:20, :20] = active[30:50, 40:60] = active[50:, 70:90] = True
    limits = piecewise.Limits(torch.device("cpu"), torch.device("meta"), room)
    walk = piecewise.begin(decoder, decode_plan.plan_decode(decoder, active, 16), latent, limits, lambda cells: None)
    pieces = [piecewise.window_piece(walk, core) for core in walk.together]
    after = piecewise.stepped(walk, pieces, 0, None)
    here = [piece.x.nbytes for piece in after if piece.x.device.type == "cpu"]
    assert not pieces and len(after) == len(walk.together) >= 3
    assert sum(here) <= room and (len(here) == len(after)) == (room == 1e9) and (len(here) == 0) == (room == 0)


def test_the_vae_is_left_as_it_was_and_serves_two_threads_at_once(fitted, models_load_in_turn):
    vae, found = fitted
    original, latent, tree, *_ = found[0]
    modules = {name: (type(module), id(module), dict(module._forward_hooks), dict(module._forward_pre_hooks)) for name, module in vae.first_stage_model.named_modules()}
    alone = decode_changed(vae, latent, original, tree, window=256)
    results: dict = {}

    def work(key, latent):
        with torch.inference_mode():
            results[key] = decode_changed(vae, latent, original, tree, window=256)

    threads = [threading.Thread(target=work, args=(key, value)) for key, value in (("same", latent), ("other", latent.flip(-1)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results["same"], alone) and not torch.equal(results["other"], alone)
    assert modules == {name: (type(module), id(module), dict(module._forward_hooks), dict(module._forward_pre_hooks)) for name, module in vae.first_stage_model.named_modules()}


@pytest.mark.parametrize("enough_for, side", [(1024, 1024), (512, 512), (256, 256), (128, 128), (16, 128)])
def test_a_window_is_the_picture_or_half_of_it_or_a_quarter_until_memory_suffices(monkeypatch, enough_for, side):
    """Down to the least. The host reckons by area, so there is less than twice as much where half a side would do."""
    vae, samples = autoencoders.demo(), torch.zeros(1, 16, 96, 128)
    free = 1.1 * decode._memory(vae, samples, enough_for)
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: free)
    assert decode._load(vae, samples, 0) == (side, decode._memory(vae, samples, side))
    assert decode._load(vae, samples, 512) == (512, decode._memory(vae, samples, 512))


@pytest.mark.parametrize("vae", [autoencoders.demo, autoencoders.fitted], ids=["tiny", "fitted"])
def test_a_window_that_memory_does_not_suffice_for_is_halved(vae, caplog):
    """As a device would: a layer raises the host's own exception for what is too large."""
    vae = vae()
    original = photo("coffee", 256, 256)
    latent = autoencoders.demo().encode(original)
    tree = part_changed(256, 256, (0, 0, 256, 160))
    plenty = decode_changed(vae, latent, original, tree, window=256)

    def refuse(module, inputs):
        if inputs[0].shape[-1] * inputs[0].shape[-2] > 120 * 120:
            raise comfy.model_management.OOM_EXCEPTION("no memory for this")

    last = [module for module in vae.first_stage_model.modules() if isinstance(module, torch.nn.Conv2d) and module.out_channels == 3][-1]
    handle = last.register_forward_pre_hook(refuse)
    try:
        with caplog.at_level(logging.WARNING):
            scarce = decode_changed(vae, latent, original, tree, window=256)
    finally:
        handle.remove()
    assert "halved" in caplog.text
    assert (scarce - plenty).abs().max() < 2e-4


def test_a_batch_of_samples_that_memory_does_not_suffice_for_is_halved(fitted, caplog):
    vae, found = fitted
    original, latent, *_ = found[0]
    tree = part_changed(512, 768, (0, 0, 192, 192))
    plenty = decode_changed(vae, latent, original, tree, window=128)

    def refuse(module, inputs):
        if len(inputs[0]) > 3:
            raise comfy.model_management.OOM_EXCEPTION("no memory for this")

    handle = vae.first_stage_model.decoder.up[1].block[0].conv1.register_forward_pre_hook(refuse)
    try:
        with caplog.at_level(logging.WARNING):
            scarce = decode_changed(vae, latent, original, tree, window=128)
    finally:
        handle.remove()
    assert "halved" in caplog.text and (scarce - plenty).abs().max() < 2e-4


def test_where_there_is_no_memory_for_the_whole_pictures_part_the_host_decodes_everything(fitted, caplog):
    vae, found = fitted
    original, latent, tree, whole, _ = found[0]
    calls = []

    def refuse_once(module, inputs):
        calls.append(module)
        if len(calls) == 1:
            raise comfy.model_management.OOM_EXCEPTION("no memory for this")

    handle = vae.first_stage_model.decoder.mid.block_1.register_forward_pre_hook(refuse_once)
    try:
        with caplog.at_level(logging.WARNING):
            result = decode_changed(vae, latent, original, tree, window=256)
    finally:
        handle.remove()
    assert "The host decodes all of it" in caplog.text and len(calls) == 2
    assert torch.equal(result, composite(original, whole, tree))


@pytest.mark.parametrize("vae, layer", [
    (autoencoders.demo, lambda model: model.taesd_decoder[-1]), (autoencoders.fitted, lambda model: model.decoder.up[0].block[0].conv1),
], ids=["tiny", "fitted"])
def test_an_interrupt_is_honoured_between_windows(vae, layer):
    vae, original = vae(), photo("coffee", 256, 256)
    latent, tree = autoencoders.demo().encode(original), part_changed(256, 256, (0, 0, 256, 160))
    calls = []

    def press_stop(module, inputs):
        calls.append(module)
        comfy.model_management.interrupt_current_processing(True)

    handle = layer(vae.first_stage_model).register_forward_pre_hook(press_stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            decode_changed(vae, latent, original, tree, window=64)
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == 1
    assert torch.isfinite(decode_changed(vae, latent, original, tree, window=64)).all()


@pytest.mark.parametrize("vae", [autoencoders.demo, autoencoders.fitted], ids=["tiny", "fitted"])
def test_progress_is_told_and_ends_at_the_whole(vae):
    original = photo("coffee", 256, 256)
    told = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview=None, **more: told.append((value, total)))
    try:
        decode_changed(vae(), autoencoders.demo().encode(original), original, part_changed(256, 256, (0, 0, 256, 160)), window=64)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    values = [value for value, _ in told]
    assert values == sorted(values) and told[-1][0] == told[-1][1] > 0


def test_each_picture_of_a_batch_is_decoded_for_itself(fitted):
    vae, found = fitted
    latents = torch.cat([latent for _, latent, *_ in found])
    originals = torch.cat([original for original, *_ in found])
    tree = found[0][2]
    together = decode_changed(vae, latents, originals, tree, window=256)
    for number in range(2):
        alone = decode_changed(vae, latents[number:number + 1], originals[number:number + 1], tree, window=256)
        assert torch.equal(together[number:number + 1], alone)


def test_one_original_serves_several_results():
    vae, original = autoencoders.demo(), photo("coffee", 192, 128)
    latents = torch.cat([vae.encode(original), vae.encode(original) + 0.3])
    tree = part_changed(128, 192, (0, 0, 128, 64))
    result = decode_changed(vae, latents, original, tree)
    expected = composite(original.expand(2, -1, -1, -1), vae.decode(latents), tree)
    assert result.shape == (2, 128, 192, 3) and (result - expected).abs().max() < 1e-5


def test_a_decoder_that_is_not_known_is_decoded_whole_and_the_log_says_so(caplog):
    vae, original = comfy.sd.VAE({"pixel_space_vae": torch.ones(1)}), torch.rand(1, 64, 96, 3)
    latent = torch.rand(1, 3, 64, 96) * 2 - 1
    tree = part_changed(64, 96, (0, 0, 64, 32), leaf=16)
    with caplog.at_level(logging.INFO):
        result = decode_changed(vae, latent, original, tree)
    assert torch.equal(result, composite(original, vae.decode(latent), tree))
    assert "PixelspaceConversionVAE" in caplog.text and len([line for line in caplog.messages if "Quadtree Decode" in line]) == 1


def test_a_video_is_decoded_whole_frame_for_frame(caplog):
    vae, original = autoencoders.of_kind("Wan"), torch.rand(5, 64, 96, 3)
    latent = autoencoders.latent_for(vae, 64, 96, frames=2)
    tree = part_changed(64, 96, (0, 0, 64, 32), leaf=16)
    with caplog.at_level(logging.INFO):
        result = decode_changed(vae, latent, original, tree)
    whole = vae.decode(latent).reshape(-1, 64, 96, 3)
    assert torch.equal(result, composite(original, whole, tree)) and "WanVAE is not known to decode a video" in caplog.text


def test_where_nothing_changed_nothing_is_decoded():
    vae, original = autoencoders.demo(), photo("coffee", 203, 155)
    latent, tree = vae.encode(original), quadtree_from_mask(torch.zeros(155, 203))
    result, operations = counted(lambda: decode_changed(vae, latent, original, tree))
    assert torch.equal(result, original) and operations == 0


@pytest.mark.parametrize("vae", [autoencoders.demo, autoencoders.fitted], ids=["tiny", "fitted"])
def test_one_window_over_all_is_the_hosts_own_decode(vae):
    original = photo("coffee", 128, 128)
    latent = autoencoders.demo().encode(original)
    result = decode_changed(vae(), latent, original, part_changed(128, 128, (0, 0, 128, 128)), feather=0)
    assert (result - vae().decode(latent)).abs().max() < 1e-5


def test_half_precision_weights_are_decoded_as_the_host_decodes_them():
    vae, original = comfy.sd.VAE(comfy.utils.load_torch_file(str(ROOT / "demo" / "models" / "autoencoder.safetensors")), dtype=torch.bfloat16), photo("coffee", 192, 128)
    latent, tree = autoencoders.demo().encode(original), part_changed(128, 192, (0, 0, 128, 64))
    result = decode_changed(vae, latent, original, tree, window=64)
    assert levels(result, composite(original, vae.decode(latent), tree), changed_of(tree, original))[0] < 0.5


def refused(message: str, **given):
    original = given.pop("original", torch.rand(1, 128, 192, 3))
    given = {"vae": autoencoders.demo(), "samples": torch.zeros(1, 16, 16, 24), "tree": part_changed(128, 192, (0, 0, 64, 64)), **given}
    calls = []
    handles = [module.register_forward_pre_hook(lambda module, inputs: calls.append(module)) for module in given["vae"].first_stage_model.modules()]
    try:
        with pytest.raises(ValueError, match=message):
            decode_changed(given["vae"], given["samples"], original, given["tree"])
    finally:
        for handle in handles:
            handle.remove()
    assert not calls


def test_a_tree_of_another_aspect_is_refused():
    refused("quadtree: made for a picture of 128 x 128", tree=part_changed(128, 128, (0, 0, 64, 64)))


@pytest.mark.parametrize("height, width", [(64, 96), (256, 384), (120, 192), (128, 168)])
def test_an_original_of_another_size_is_refused_with_the_way_out(height, width):
    refused("original: expected .* 192 x 128", original=torch.rand(1, height, width, 3))


@pytest.mark.parametrize("shape", [(1, 4, 16, 24), (1, 16, 24), (1, 16, 1, 2, 16, 24)])
def test_a_latent_of_another_vae_is_refused(shape):
    refused("samples: expected a latent of this VAE, 16 channels", samples=torch.zeros(shape))


def test_a_latent_of_another_picture_is_refused():
    refused("original: expected .* 128 x 128", samples=torch.zeros(1, 16, 16, 16))


def test_a_latent_with_nan_is_refused_with_the_place():
    samples = torch.zeros(1, 16, 16, 24)
    samples[0, 3, 4:6, 10:13] = math.nan
    refused(r"samples: .*6 of 384 cells, between x 80, y 32 and x 104, y 48 px", samples=samples)


def test_nested_latents_are_refused():
    refused("samples: expected a latent of pictures or a video, got several", samples=torch.nested.nested_tensor([torch.zeros(16, 8, 8), torch.zeros(16, 4, 4)]))


def test_a_vae_for_sound_is_refused():
    from comfy.ldm.audio.autoencoder import AudioOobleckVAE

    sound = autoencoders.loaded(AudioOobleckVAE().state_dict())
    refused("vae: expected one for pictures", vae=sound, samples=torch.zeros(1, 64, 32))


def test_the_node_gives_what_the_function_gives():
    vae, original = autoencoders.demo(), photo("coffee", 192, 128)
    latent, tree = vae.encode(original), part_changed(128, 192, (0, 0, 128, 64))
    (result,) = QuadtreeDecode.execute(vae, {"samples": latent}, original, tree, 32, 0).args
    assert torch.equal(result, decode_changed(vae, latent, original, tree))


def test_windows_that_cannot_all_wait_are_taken_by_themselves(fitted, monkeypatch):
    """The statistics then come from some of them, and from samples of the others."""
    vae, found = fitted
    original, latent, tree, whole, _ = found[0]
    # What a computer with little memory would report.
    monkeypatch.setattr(piecewise, "memory_to_wait_in", lambda: 2e7)
    result = decode_changed(vae, latent, original, tree, window=128)
    mean, largest = levels(result, composite(original, whole, tree), changed_of(tree, original))
    assert mean < 1.5 and largest < 6


def test_what_a_window_covers_shrinks_to_its_core():
    decoder = full_size("SD")
    rects = decode_plan.rects_through(decoder.steps, Rect(32, 32, 64, 64), 128, 128)
    assert rects[-1] == Rect(256, 256, 512, 512) and len(rects) == len(decoder.steps) + 1
    assert rects[0] == Rect(25, 25, 71, 71)
