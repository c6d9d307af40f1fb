"""The server that the demo, the benchmarks and the tests start, and what it reports of a graph."""
from __future__ import annotations

import pytest
from host_server import HostError, HostServer


def replace_graph(pattern: str) -> dict:
    """A graph of host nodes alone: replaces pattern in 'leaf' and shows the text."""
    inputs = {"string": "leaf", "regex_pattern": pattern, "replace": "r"}
    return {
        "1": {"class_type": "RegexReplace", "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


def test_a_graph_returns_its_outputs_by_node(server):
    assert server.run_graph(replace_graph("l"))["2"]["text"] == ["reaf"]


def test_a_node_that_fails_raises_with_the_hosts_words(server):
    with pytest.raises(HostError, match=r"RegexReplace \(node 1\): .*unterminated subpattern"):
        server.run_graph(replace_graph("("))


def test_a_graph_that_the_host_refuses_raises_with_the_input_at_fault(server):
    graph = replace_graph("l")
    del graph["1"]["inputs"]["regex_pattern"]
    with pytest.raises(HostError, match="400 .*Required input is missing.*regex_pattern"):
        server.run_graph(graph)


def test_a_graph_of_which_the_host_would_run_only_a_part_raises_too(server):
    graph = replace_graph("l")
    graph["3"] = {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}}
    graph["4"] = {"class_type": "RegexReplace", "inputs": {"string": "leaf", "replace": "r"}}
    with pytest.raises(HostError, match="only part of the graph.*Required input is missing.*regex_pattern"):
        server.run_graph(graph)


def test_a_host_that_ends_at_once_raises_with_the_end_of_its_log(comfyui_dir, tmp_path):
    with pytest.raises(HostError, match="(?s)ended with exit code 2.*unrecognized arguments: --no-such-option"):
        with HostServer(comfyui_dir, tmp_path, ("--no-such-option",)):
            pass


def test_the_server_has_ended_when_its_block_is_left(comfyui_dir, tmp_path):
    with HostServer(comfyui_dir, tmp_path) as server:
        assert "system" in server.get("/system_stats")
    assert server.process.poll() is not None
