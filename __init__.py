"""Quadtree Tiled Diffusion, a pack of custom nodes for ComfyUI."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """What the host calls to find the nodes; importing the pack does nothing."""
    from .nodes import QuadtreeExtension

    return QuadtreeExtension()
