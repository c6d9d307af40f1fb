"""Masks that patches of other packs hold: with its part of them, a window is what its crop is by itself."""
from __future__ import annotations

import types

import comfy.hooks
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from foreign_patches import BLOCKS, KINDS, SeveralAttentions, attend, embeds, for_tokens, hooked, with_closures, with_regional_attention, with_several
from seen import denoised
from tiny_controls import picture
from tiny_models import drawer, load

from qtd_pack.canvas import Canvas
from qtd_pack.masks import empty_caches
from qtd_pack.patches import WINDOWS, cut_patches
from qtd_pack.strengths import quadtree_from_mask
from qtd_pack.tiled_diffusion import TiledDiffusion
from qtd_pack.utils import Rect

# Cells are 32 x 48.
HEIGHT_PX, WIDTH_PX = 256, 384
# The mask's size: the picture's, the latent's, half of that, and twice the picture's.
SIZES = [(256, 384), (32, 48), (16, 24), (512, 768)]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_size = pytest.mark.parametrize("size", SIZES)


def mask_of(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return picture(height, width, batch, seed=11)[..., 0].contiguous()


def tree():
    """A large part to redraw and a spot in a corner: with windows of 64 and 128 px and an overlap both are used."""
    mask = torch.zeros(1, HEIGHT_PX, WIDTH_PX)
    mask[:, 64:192, 128:256] = mask[:, -64:, :64] = 1
    return quadtree_from_mask(mask, min_leaf=64, max_leaf=64)


def tiled(patcher, **settings):
    return TiledDiffusion(tree(), **dict(method="MultiDiffusion", min_window=64, max_window=128, tile_overlap=0) | settings).patched(patcher)


def outputs(patcher, latent, conds, noise, cfg) -> list:
    """What the model was given and gave at one step: (windows, cond_or_uncond, x, denoised)."""
    clone, found = patcher.clone(), []

    def beside(executor, x, *args, **kwargs):
        out = executor(x, *args, **kwargs)
        options = args[4]
        found.append((options.get(WINDOWS, ((None,), None))[0], options["cond_or_uncond"], x.clone(), out.clone()))
        return out

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "outputs", beside)
    denoised(clone, latent, *conds, cfg=cfg, percents=(0.3,), noise=noise)
    return found


def assert_windows_are_their_crops(model, put_on, conds_of, *, batch=1, cfg=3.0, **settings) -> list:
    """put_on(patcher, part), conds_of(part): the patch and the conditionings for a part (rect in cells; None: the whole)."""
    latent = model.latent(HEIGHT_PX, WIDTH_PX, batch)
    noise, found = drawer(5)(*latent.shape), []
    for rects, chunks, x, out in outputs(tiled(put_on(model.patcher, None), **settings), latent, conds_of(None), noise, cfg):
        whole = out.unflatten(0, (len(chunks), len(rects), batch))
        for index, rect in enumerate(rects):
            cells = ..., slice(rect.top, rect.bottom), slice(rect.left, rect.right)
            for _, alone_chunks, alone_x, alone in outputs(put_on(model.patcher, rect), latent[cells], conds_of(rect), noise[cells], cfg):
                for place, chunk in enumerate(alone_chunks):
                    if chunk in chunks:
                        assert torch.equal(x.unflatten(0, whole.shape[:3])[chunks.index(chunk), index], alone_x.chunk(len(alone_chunks))[place])
                        assert (whole[chunks.index(chunk), index] - alone.chunk(len(alone_chunks))[place]).abs().max() < 5e-6
                        found.append((rect.height, chunk))
    return found


def part_of(mask: torch.Tensor, rect) -> torch.Tensor:
    """A mask's part for a window of cells."""
    if rect is None:
        return mask
    ratio = mask.shape[-1] / 48
    top, bottom, left, right = (int(edge * ratio) for edge in (rect.top, rect.bottom, rect.left, rect.right))
    return mask[..., top:bottom, left:right].contiguous()


def assert_masks_are_cut(kind: str, mask, **options) -> set[int]:
    """Returns the sizes of the windows."""
    name, put_on = KINDS[kind]
    model = load(name)
    conds = model.positive(HEIGHT_PX, WIDTH_PX), model.negative(HEIGHT_PX, WIDTH_PX)
    found = assert_windows_are_their_crops(model, lambda patcher, rect: put_on(patcher, part_of(mask, rect)), lambda rect: conds, **options)
    assert {chunk for _, chunk in found} == ({0, 1} if options.get("cfg", 3.0) > 1 else {0})
    return {side for side, _ in found}


@every_size
@every_kind
def test_a_window_is_its_crop_with_the_mask_cropped(kind, size):
    assert_masks_are_cut(kind, mask_of(*size))


@every_kind
def test_windows_of_two_sizes(kind):
    assert len(assert_masks_are_cut(kind, mask_of(256, 384), tile_overlap=8)) == 2


@pytest.mark.parametrize("batch, masks", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("tile_batch_size", [1, 4])
@every_kind
def test_with_images_of_a_batch_one_window_at_a_time_or_several(kind, tile_batch_size, batch, masks):
    assert_masks_are_cut(kind, mask_of(256, 384, masks), tile_batch_size=tile_batch_size, batch=batch)


@every_kind
def test_without_guidance(kind):
    assert_masks_are_cut(kind, mask_of(32, 48), cfg=1.0, batch=2)


@every_kind
def test_the_masks_effect_is_large_and_depends_on_its_place(kind):
    name, put_on = KINDS[kind]
    model, mask = load(name), mask_of(256, 384)
    conds = model.positive(HEIGHT_PX, WIDTH_PX), model.negative(HEIGHT_PX, WIDTH_PX)
    latent = model.latent(HEIGHT_PX, WIDTH_PX)
    one, other = (denoised(put_on(model.patcher, part), latent, *conds, cfg=3.0, percents=(0.3,)) for part in (mask, mask.flip(-1)))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("tile_batch_size", [1, 4])
def test_a_mask_between_tokens_is_cut_to_those_of_the_window(tile_batch_size):
    model, mask = load("flux_dev"), mask_of(32, 48)
    conds = model.positive(HEIGHT_PX, WIDTH_PX), model.negative(HEIGHT_PX, WIDTH_PX)

    def put_on(patcher, rect):
        return with_regional_attention(patcher, part_of(mask, rect))

    found = assert_windows_are_their_crops(model, put_on, lambda rect: conds, batch=2, tile_batch_size=tile_batch_size)
    assert set(found) == {(8, 0), (8, 1), (16, 0), (16, 1)}
    latent = model.latent(HEIGHT_PX, WIDTH_PX)
    plain, masked = (denoised(patcher, latent, *conds, percents=(0.3,)) for patcher in (model.patcher, put_on(model.patcher, None)))
    assert (plain - masked).abs().max() > 1e-3


@pytest.mark.parametrize("scope", [comfy.hooks.EnumHookScope.HookedOnly, comfy.hooks.EnumHookScope.AllConditioning])
@pytest.mark.parametrize("tile_batch_size", [1, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_that_a_conditioning_brings_by_a_hook(batch, tile_batch_size, scope):
    model, mask = load("sd15"), mask_of(256, 384)

    def conds_of(rect):
        return hooked(model.positive(HEIGHT_PX, WIDTH_PX), part_of(mask, rect), scope), model.negative(HEIGHT_PX, WIDTH_PX)

    found = assert_windows_are_their_crops(model, lambda patcher, rect: patcher, conds_of, batch=batch, tile_batch_size=tile_batch_size)
    assert {chunk for _, chunk in found} == {0, 1}


def seen_options(patcher, *conds, **settings) -> list[dict]:
    """The transformer_options of each call of a run of two steps."""
    clone, found = tiled(patcher, **settings), []

    def beside(executor, *args, **kwargs):
        found.append(args[5])
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "options", beside)
    model = load("sd15")
    conds = conds or (model.positive(HEIGHT_PX, WIDTH_PX), model.negative(HEIGHT_PX, WIDTH_PX))
    denoised(clone, model.latent(HEIGHT_PX, WIDTH_PX), *conds)
    return found


def test_a_dictionary_of_a_pack_in_the_options_is_cut_too():
    model, mask = load("sd15"), mask_of(256, 384)
    positive = hooked(model.positive(HEIGHT_PX, WIDTH_PX), mask, comfy.hooks.EnumHookScope.HookedOnly)
    for options in seen_options(model.patcher, positive, positive):
        (rect,) = options[WINDOWS][0]
        assert torch.equal(options["a_pack"]["mask"], part_of(mask, rect))
        assert options["a_pack"]["conds"][0].shape == (1, 32, 48)


def test_copies_are_made_once_for_each_window_and_what_they_keep_survives_the_steps():
    class Counting(SeveralAttentions):
        steps = 0

        def __call__(self, *args):
            self.steps += 1
            seen.append((self, self.steps))
            return super().__call__(*args)

    seen, patcher = [], load("sd15").patcher.clone()
    patch = Counting(attend, cond=embeds(), weight=1.0, mask=mask_of(256, 384))
    patcher.set_model_attn2_replace(patch, *BLOCKS[0])
    calls = seen_options(patcher)
    copies = {id(copy) for copy, _ in seen}
    assert len(seen) == len(calls) == 2 * len(copies) and id(patch) not in copies
    assert [steps for _, steps in seen] == [1] * len(copies) + [2] * len(copies)
    assert "steps" not in vars(patch) and patch.kwargs[0]["mask"].shape == (1, 256, 384)


def test_windows_do_not_share_what_a_patch_caches_by_its_size():
    """Windows of one size would get each other's mask; and what a plain run has left is that of another place."""
    class Caching:
        def __init__(self, mask):
            self.mask, self.calls, self.by_tokens, self.cached_mask = mask, [], {}, None

        def __call__(self, out, extra_options):
            key = (out.shape[1], extra_options["block"])
            if key not in self.by_tokens:
                self.by_tokens[key] = for_tokens(self.mask, out.shape[1])
            if self.cached_mask is None:
                self.cached_mask = self.mask.mean()
            self.calls.append(key)
            return out * (1 + self.by_tokens[key]) * self.cached_mask

    def put_on(patcher, rect):
        patcher, patch = patcher.clone(), whole if rect is None else Caching(part_of(mask, rect))
        patcher.set_model_attn2_output_patch(patch)
        return patcher

    mask, model = mask_of(256, 384), load("sd15")
    whole, conds = Caching(mask), (model.positive(HEIGHT_PX, WIDTH_PX), model.negative(HEIGHT_PX, WIDTH_PX))
    denoised(put_on(model.patcher, None), model.latent(128, 192), *conds)
    before = dict(whole.by_tokens), len(whole.calls)
    assert_windows_are_their_crops(model, put_on, lambda rect: conds)
    assert whole.by_tokens == before[0] and len(whole.calls) > before[1]


def test_what_a_patch_counts_goes_on_in_windows_that_begin_later():
    """As in plain sampling, where the patch is called at every step."""
    class Counting:
        def __init__(self):
            self.mask, self.steps = mask_of(256, 384), 0

        def __call__(self, out, extra_options):
            self.steps += 1
            seen.append((float(extra_options["sigmas"][0]), self.steps))
            return out

    seen, patcher, patch = [], load("sd15").patcher.clone(), Counting()
    patcher.set_model_attn2_output_patch(patch)
    mask = torch.zeros(1, HEIGHT_PX, WIDTH_PX)
    mask[:, 64:192, 64:320] = 0.5
    mask[:, 128:192, 128:256] = 1
    percents = (0.1, 0.3, 0.5, 0.7)
    tiles = TiledDiffusion(quadtree_from_mask(mask, min_leaf=64, max_leaf=64), method="MultiDiffusion", min_window=64, max_window=64, tile_overlap=0)
    model = load("sd15")
    denoised(tiles.patched(patcher), model.latent(HEIGHT_PX, WIDTH_PX), model.positive(HEIGHT_PX, WIDTH_PX), percents=percents)
    places, steps = 3, sorted({sigma for sigma, _ in seen}, reverse=True)  # three attention layers are one step
    counts = [{-(-count // places) for sigma, count in seen if sigma == step} for step in steps]
    assert counts == [{1}, {2}, {3}, {4}]
    assert [sum(sigma == step for sigma, _ in seen) // places for step in steps] == [2, 2, 8, 8]
    assert patch.steps == 0


def test_embeddings_keys_and_noise_levels_are_the_users_own():
    for options in seen_options(with_several(load("sd15").patcher, mask_of(256, 384))):
        for patch in options["patches_replace"]["attn2"].values():
            plain, masked = patch.kwargs
            assert plain["cond"].shape == masked["cond"].shape == (1, 32, 48) and masked["sigmas"].shape == (32, 48)
            assert plain["mask"] is None and plain["mask_type"] == "a word" and masked["mask"].shape[-2:] != (256, 384)


def test_windows_that_share_a_batch_are_said_to_be_run_one_at_a_time(caplog):
    caplog.set_level("INFO")
    calls = seen_options(with_closures(load("sd15").patcher, mask_of(256, 384)))
    assert {len(options[WINDOWS][0]) for options in calls} == {1}
    line = "a patch that holds a mask of the picture may take the windows of a batch for images: they are run one at a time"
    assert [record.getMessage() for record in caplog.records].count(line) == 1


def test_masks_in_numpy_and_in_dataclasses_are_cut_and_counts_and_words_are_not():
    from dataclasses import make_dataclass
    kept = make_dataclass("Kept", ["mask", "mask_blur", "mask_mode", "masks"])(mask_of(32, 48)[0].numpy(), 4, "soft", {"a": [mask_of(32, 48) > 0.5]})

    def patch(out, extra_options):
        rect = extra_options[WINDOWS][0][0]
        assert kept.mask.shape == (rect.height, rect.width) and kept.mask_blur == 4 and kept.mask_mode == "soft"
        assert torch.equal(torch.from_numpy(kept.mask), part_of(mask_of(32, 48), rect)[0]) and kept.masks["a"][0].dtype == torch.bool
        return out

    patcher = load("sd15").patcher.clone()
    patcher.set_model_attn1_output_patch(patch)
    assert len(seen_options(patcher)) > 2
    assert kept.mask.shape == (32, 48)


MASK = mask_of(256, 384)


def of_module(out, extra_options):
    return out + 0 * MASK.mean()


class Generated:
    def __init__(self):
        self.masks = (part for part in [mask_of(256, 384)])

    def __call__(self, out, extra_options):
        return out


class Pictured:
    """Holds no mask, but a picture."""

    def __init__(self):
        self.image, self.latent, self.embeds, self.weights = picture(HEIGHT_PX, WIDTH_PX), torch.rand(1, 4, 32, 48), torch.rand(1, 32, 48), torch.rand(4, 4)

    def __call__(self, out, extra_options):
        return out


class Stretched(Generated):
    def __init__(self):
        self.mask = torch.rand(1, 100, 50)


@pytest.mark.parametrize("patch, named", [
    (of_module, ["mask MASK of the module of of_module"]),
    (Generated(), ["what Generated.masks (generator) holds"]),
    (Pictured(), ["picture Pictured.image, (1, 256, 384, 3),", "picture Pictured.latent, (1, 4, 32, 48),"]),
    (Stretched(), ["mask Stretched.mask, (1, 100, 50),"]),
])
def test_what_cannot_be_cut_is_named_once_in_a_run(patch, named, caplog):
    caplog.set_level("INFO")
    patcher = load("sd15").patcher.clone()
    patcher.set_model_attn2_output_patch(patch)
    seen_options(patcher)
    said = [record.getMessage() for record in caplog.records if "every window sees the whole of it" in record.getMessage()]
    assert said == [f"{what} is not known to belong to a part of the picture: every window sees the whole of it" for what in named]


@pytest.mark.parametrize("kind", [list, tuple])
def test_in_a_list_masks_are_cut_and_what_lies_beside_them_is_passed_on(kind):
    """What holds no mask at all stays the object that it is."""
    mask, weights = mask_of(32, 48), kind([0.5, "weight"])
    canvas = Canvas(load("sd15").patcher.model, (1, 4, 32, 48), torch.device("cpu"), 8, {}, {})
    given = {"theirs": {"regional_masks": kind([mask, 0.5, None]), "weights": weights}}
    found = cut_patches(given, [Rect(8, 16, 24, 40)], canvas)["theirs"]
    assert type(found["regional_masks"]) is kind and torch.equal(found["regional_masks"][0], mask[:, 8:24, 16:40])
    assert found["regional_masks"][1:] == kind([0.5, None]) and found["weights"] is weights


def test_of_what_is_called_a_cache_only_what_holds_tensors_is_forgotten():
    """A tuple of settings, a name and a number are no cache, whatever they are called; an original says that what it is named after was made."""
    part, mask = types.SimpleNamespace(), torch.ones(4, 4)
    vars(part).update(
        cache_size=(64, 64), cache_name="both", cached=3, cache_of_masks=(mask, 1), cache_of_lists=[[mask], 2], cache_of_numbers=[1, 2], cache={"a": mask},
        mask=mask, mask_original=mask, by_size={(8, 8): mask}, weight=mask)
    empty_caches(part, ())
    expected = dict(
        cache_size=(64, 64), cache_name="both", cached=3, cache_of_masks=None, cache_of_lists=[], cache_of_numbers=[1, 2], cache={}, mask=None, by_size={})
    assert {name: getattr(part, name) for name in expected} == expected and part.mask_original is mask and part.weight is mask
