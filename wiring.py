"""Which outputs of a node does the graph that runs take, as far as the host tells?

It tells by the graph in its queue. What nobody takes need not be made. But the host keeps results by a node's settings
alone: once one was left out, a graph that does take it must not be served with what is kept.
"""
from __future__ import annotations

import threading

from aiohttp import web


class Wiring:
    """What is known of the graphs of one server, and which results were left out."""

    def __init__(self, server):
        self._server = server
        self._numbers: dict[str, int] = {}
        self._left_out: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def is_taken(self, node_id: str, output: int) -> bool:
        """Whether an output of a node goes anywhere in the graph that runs; true wherever that is not known."""
        try:
            running, _ = self._server.prompt_queue.get_current_queue_volatile()
            graphs = [item[2] for item in running]
        except (AttributeError, IndexError, TypeError, ValueError):  # a queue of another kind tells nothing
            return True
        # A node that another one has put into the graph while it runs is not in the queue.
        if not graphs or any(node_id not in graph for graph in graphs):
            return True
        return any(_links_to(node.get("inputs"), [node_id, output]) for graph in graphs for node in graph.values())

    def may_leave_out(self, node_id: str, output: int) -> bool:
        """Whether a node need not make an output; if so, it is taken for left out."""
        if self.is_taken(node_id, output):
            return False
        with self._lock:
            self._left_out.add((node_id, self._numbers.get(node_id, 0)))
        return True

    def number(self, node_id: str, output: int) -> int:
        """What belongs to a node's settings for the host: another one if the output is taken, and was left out under the last."""
        is_taken = self.is_taken(node_id, output)
        with self._lock:
            number = self._numbers.get(node_id, 0)
            if is_taken and (node_id, number) in self._left_out:
                self._left_out.discard((node_id, number))  # it only grows, so this one never comes back
                number = self._numbers[node_id] = number + 1
            return number


WIRING = web.AppKey("quadtree_tiled_diffusion_wiring", Wiring)


def _links_to(value, link: list) -> bool:
    if isinstance(value, dict):
        return any(_links_to(part, link) for part in value.values())
    return isinstance(value, (list, tuple)) and (list(value) == link or any(_links_to(part, link) for part in value))
