// How is the tree drawn and touched? Puts the overlay on the node that builds a tree.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Overlay } from "./overlay.mjs";
import { Regions } from "./regions.mjs";
import { addRunLine } from "./runline.mjs";
import { loadTexts } from "./texts.mjs";
import { Timing } from "./timing.mjs";

const TREE_NODE = "QuadtreeFromImage";
const PATCH_NODE = "QuadtreeTiledDiffusion";
const RESULT = "qtd_tree";
const REGIONS_RESULT = "qtd_regions";
const RUN_EVENT = "quadtree_tiled_diffusion.run";

const timing = new Timing(app);
const regions = new Regions(timing, () => eachOverlay((overlay) => overlay.showRegions()));
const overlays = new WeakMap();
const runLines = new WeakMap();
// What runs told last, by the path of their node: nodes are made anew by undo and by a change of the language, their paths stay.
const lastTold = new Map();

/** The widget of `edits`: the overlay, whose value is what is painted. */
function addOverlay(node, name) {
  const overlay = new Overlay({ node, api, app, timing, regions });
  const widget = node.addDOMWidget(name, "qtd_edits", overlay.element, {
    hideOnZoom: false,
    hideInPanel: true, // the element is on the node, and there is only one
    getMinHeight: () => 300,
    getValue: () => overlay.edits,
    setValue: (text) => overlay.setValue(text),
  });
  // The host hides elements whose input is wired (the second is of its newer pages); the tree stays worth seeing.
  for (const name of ["computedDisabled", "connectionSuppressed"]) Object.defineProperty(widget, name, { get: () => false, set() {} });
  overlays.set(node, overlay);
  return widget;
}

function connectOverlay(node) {
  const overlay = overlays.get(node);
  const update = () => {
    offerThreshold(node, overlay);
    overlay.refresh();
  };
  chain(node, "onExecuted", (result) => overlay.setResult(result?.[RESULT]?.[0]));
  chain(node, "onConfigure", update);
  chain(node, "onConnectionsChange", update);
  chain(node, "onRemoved", () => overlay.close());
  for (const setting of node.widgets) if (setting.name !== "edits") chain(setting, "callback", update);
  offerThreshold(node, overlay);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, 360), Math.max(height, node.size[1])]);
}

/** Offer content_threshold only where it counts, while detail_budget is 0 or comes by a wire, and where it has a wire itself. */
function offerThreshold(node, overlay) {
  const [budget, threshold] = ["detail_budget", "content_threshold"].map((name) => overlay.widget(name));
  const hidden = budget.value > 0 && !overlay.isWired(budget.name) && !overlay.isWired(threshold.name);
  if (Boolean(threshold.hidden) === hidden) return;
  threshold.hidden = threshold.options.hidden = hidden;
  if (hidden) threshold.y = -1e4; // or its socket would stay, under the next widget's
  // Nodes 2.0 looks again when the list changes.
  if (window.LiteGraph?.vueNodesMode) node.widgets = [...node.widgets];
  node.graph?.setDirtyCanvas(true, true);
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

function connectRunLine(node) {
  const show = addRunLine(node);
  runLines.set(node, show);
  chain(node, "onConfigure", () => lastTold.has(timing.pathOf(node)) && show(lastTold.get(timing.pathOf(node))));
}

function takeRun(detail) {
  const node = nodeOfRun(detail.node);
  if (!node) return;
  lastTold.set(timing.pathOf(node), detail);
  runLines.get(node)?.(detail);
  const seconds = detail.values?.seconds;
  if (seconds !== undefined) eachOverlay((overlay) => overlay.takeRun(node, seconds));
}

function eachOverlay(visit) {
  for (const node of allNodes(app.rootGraph)) if (overlays.has(node)) visit(overlays.get(node));
}

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./quadtree.css", import.meta.url).href;
  document.head.append(link);
}

app.registerExtension({
  name: "quadtreetileddiffusion.overlay",
  async init() {
    addStyle();
    await loadTexts(api, app);
  },
  setup() {
    api.addEventListener(RUN_EVENT, ({ detail }) => takeRun(detail));
    api.addEventListener("execution_start", () => eachOverlay((overlay) => overlay.secondsOfRun.clear()));
    // Another model, or other steps: the time of the last run may no longer be known.
    api.addEventListener("graphChanged", () => eachOverlay((overlay) => overlay.showLine()));
  },
  getCustomWidgets: () => ({ QTD_EDITS: (node, name) => ({ widget: addOverlay(node, name) }) }),
  nodeCreated(node) {
    if (node.constructor.comfyClass === TREE_NODE) connectOverlay(node);
    if (node.constructor.comfyClass === PATCH_NODE) connectRunLine(node);
    if (regions.isOf(node)) chain(node, "onExecuted", (result) => regions.take(node, result?.[REGIONS_RESULT]?.[0]));
  },
  // The results of a workflow whose tab is shown again.
  onNodeOutputsUpdated(results) {
    for (const node of allNodes(app.rootGraph)) {
      const result = results[resultKey(node)];
      if (result?.[RESULT]) overlays.get(node)?.setResult(result[RESULT][0]);
      if (regions.isOf(node)) regions.take(node, result?.[REGIONS_RESULT]?.[0]);
    }
  },
});
