"""What does the user wire to give parts of a picture prompts of their own? Three nodes; each is a schema and a call."""
from __future__ import annotations

import logging

from comfy_api.latest import io

from .prompts import region_conditioning
from .regions import numbered_picture, plan_regions, region_images, region_masks, region_texts

CATEGORY = "quadtree tiled diffusion"
TREE = io.Custom("QUADTREE")

PER_WINDOW, PER_CELL = "per window", "per cell"

# What to do where a list is connected to an input that takes one value.
TEXTS, VALUES = "A list of texts, one for each region, belongs to `captions`", "Connect a single value"

log = logging.getLogger(__name__)


class QuadtreeRegions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeRegions", display_name="Quadtree Regions", category=CATEGORY,
            description="Divides what a quadtree redraws into regions that can have prompts of their own: their pictures, to be captioned, and their masks.",
            search_aliases=["regional prompt", "tile prompts", "caption tiles"],
            inputs=[
                TREE.Input("quadtree", tooltip="The tree that is sampled with. There is a region wherever it redraws something."),
                io.Image.Input("image", tooltip="The picture that the tree was made for, or an upscale of it."),
                io.Int.Input("region_size", default=512, min=64, max=8192, step=8, tooltip="Side of a region in pixels of image. About the size of a window, or larger."),
                io.Int.Input("overlap", default=64, min=0, max=1024, step=8, tooltip="How far in pixels a region passes softly into its neighbours, and how much of its surroundings its picture shows."),
            ],
            outputs=[
                io.Image.Output("images", is_output_list=True, tooltip="The picture of each region, for a captioner."),
                io.Mask.Output("masks", is_output_list=True, tooltip="The mask of each region, of the size of image. Where the tree redraws something they add up to 1."),
                io.Image.Output("numbered", tooltip="The picture with the regions' borders and numbers."),
            ],
            # Without it the host sends nothing to a browser that reloads while the node's result is cached.
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, quadtree, image, region_size, overlap) -> io.NodeOutput:
        height, width = image.shape[1:3]
        places = plan_regions(quadtree, height, width, region_size)
        if not places:
            log.info("Quadtree Regions: the tree redraws nothing, so there is no region; what is given out is the whole picture, and a mask of 0")
        shown = {"size": [width, height], "rects": [[rect.left, rect.top, rect.width, rect.height] for rect in places]}
        return io.NodeOutput(
            region_images(image, places, overlap), region_masks(places, height, width, overlap), numbered_picture(image, places), ui={"qtd_regions": [shown]})


class QuadtreeRegionText(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeRegionText", display_name="Quadtree Region Text", category=CATEGORY,
            description="The prompt of each region: what all share, then your line for it or, where you wrote none, its caption. Goes into any text encoder.",
            inputs=[
                io.Image.Input("regions", tooltip="The images of Quadtree Regions: how many regions there are."),
                io.String.Input("text", default="", multiline=True, tooltip="What all regions share. It is put in front and costs nothing."),
                io.String.Input("lines", default="", multiline=True, placeholder="3: a lighthouse\n4-6, 9: wet stones", tooltip="A line for a region, or for several: '3: a lighthouse', '2-5: wet stones', '1, 7: sky'. It wins over a caption."),
                io.String.Input("captions", optional=True, force_input=True, tooltip="A caption for each region, from a captioner that was given the images of Quadtree Regions."),
            ],
            outputs=[io.String.Output("texts", is_output_list=True, tooltip="The text of each region.")],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, regions, text, lines, captions=()) -> io.NodeOutput:
        return io.NodeOutput(region_texts(len(regions), _single("text", text, TEXTS), _single("lines", lines, TEXTS), captions))


class QuadtreeRegionPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadtreeRegionPrompts", display_name="Quadtree Region Prompts", category=CATEGORY,
            description="Puts the prompts of regions into one conditioning. With Quadtree Tiled Diffusion each window gets the prompt of its region, for the cost of one prompt.",
            search_aliases=["regional prompt", "conditioning mask", "tile prompts"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt of the whole picture, for where no region lies."),
                io.Conditioning.Input("regions", tooltip="The encoded text of each region, in their order."),
                io.Mask.Input("masks", tooltip="The masks of Quadtree Regions, or others: one for each region."),
                io.Combo.Input("mode", options=[PER_WINDOW, PER_CELL], default=PER_WINDOW, tooltip="per window: a window gets the prompt of the region that covers most of what it redraws, and costs what one prompt costs. per cell: exactly as the masks are; a window costs a prompt for each region in it."),
                io.Float.Input("share", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip="How much the prompt of the whole picture counts within regions. Above 0 it costs a second prompt in every window; what all regions share is cheaper in the text of Quadtree Region Text."),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="For any sampler, as its positive or negative. Connect ControlNets after this node, so that all regions share them.")],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, conditioning, regions, masks, mode, share) -> io.NodeOutput:
        if len(conditioning) != 1:
            raise ValueError(f"conditioning: expected the prompt of the whole picture, got a list of {len(conditioning)}. The list of the regions' prompts belongs to `regions`.")
        per_window = _single("mode", mode, VALUES) == PER_WINDOW
        return io.NodeOutput(region_conditioning(conditioning[0], regions, masks, per_window=per_window, share=_single("share", share, VALUES)))


def _single(name: str, values: list, what_to_do: str):
    """The one value of an input, which the host gives as a list beside inputs that are lists."""
    if len(values) != 1:
        raise ValueError(f"{name}: expected one for all regions, got a list of {len(values)}. {what_to_do}.")
    return values[0]
