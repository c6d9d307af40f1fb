// How is the tree drawn and touched? Puts the overlay on the node that builds a tree.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Overlay } from "./overlay.mjs";
import { addRunLine } from "./runline.mjs";

const TREE_NODE = "QuadtreeFromImage";
const PATCH_NODE = "QuadtreeTiledDiffusion";
const RESULT = "qtd_tree";
const RUN_EVENT = "quadtree_tiled_diffusion.run";

const overlays = new WeakMap();
const runLines = new WeakMap();

function addOverlay(node) {
  const overlay = new Overlay({ node, api, app });
  const widget = node.addDOMWidget("qtd_overlay", "qtd_overlay", overlay.element, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getMinHeight: () => 300,
  });
  widget.serialize = false; // not in the workflow
  overlays.set(node, overlay);
  chain(node, "onExecuted", (result) => overlay.setResult(result?.[RESULT]?.[0]));
  chain(node, "onConfigure", () => overlay.refresh());
  chain(node, "onConnectionsChange", () => overlay.refresh());
  chain(node, "onRemoved", () => overlay.close());
  for (const setting of node.widgets) if (setting !== widget) chain(setting, "callback", () => overlay.refresh());
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, 360), Math.max(height, node.size[1])]);
}

/** Call `more` after the method that the object has already. */
function chain(object, name, more) {
  const before = object[name];
  object[name] = function (...given) {
    const answer = before?.apply(this, given);
    more(...given);
    return answer;
  };
}

/** The nodes of the graph and of all its subgraphs. */
function allNodes(graph) {
  return [graph, ...(graph.subgraphs?.values() ?? [])].flatMap((part) => part.nodes);
}

/** The key of a node among the host's results: its id, after that of the subgraph it lies in. */
function resultKey(node) {
  return node.graph === app.rootGraph ? String(node.id) : `${node.graph.id}:${node.id}`;
}

/** The node that a run names: its id, after those of the subgraphs around it. */
function nodeOfRun(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph;
  for (const part of path.slice(0, -1)) graph = graph?.getNodeById(part)?.subgraph;
  return graph?.getNodeById(path.at(-1));
}

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./quadtree.css", import.meta.url).href;
  document.head.append(link);
}

app.registerExtension({
  name: "quadtreetileddiffusion.overlay",
  init: addStyle,
  setup() {
    api.addEventListener(RUN_EVENT, ({ detail }) => {
      const node = nodeOfRun(detail.node);
      if (node) runLines.get(node)?.(detail.text);
    });
  },
  nodeCreated(node) {
    if (node.constructor.comfyClass === TREE_NODE) addOverlay(node);
    if (node.constructor.comfyClass === PATCH_NODE) runLines.set(node, addRunLine(node));
  },
  // The results of a workflow whose tab is shown again.
  onNodeOutputsUpdated(results) {
    for (const node of allNodes(app.rootGraph)) {
      const result = results[resultKey(node)]?.[RESULT]?.[0];
      if (result) overlays.get(node)?.setResult(result);
    }
  },
});
