// How long will it take? The time of the last run with a tree, scaled to what the tree costs now.

const PATCH_NODE = "QuadtreeTiledDiffusion";
const PASSES_ON = "QuadtreeAdjust";
const INPUT_OF_SUBGRAPH = "-10"; // the host's id for it
const IS_OFF = [2, 4]; // muted, bypassed
// What decides about the time beside the model, on the nodes that get it.
const SAMPLING = ["steps", "cfg", "sampler_name", "scheduler", "denoise"];

/** The times of runs, by what was run: known until the page is left. */
export class Timing {
  constructor(app) {
    this.app = app;
    this.runs = new Map();
  }

  /** Remember a run of a patch node, beside what its tree was estimated to cost for a picture of this size. */
  remember(tree, patch, { seconds, cost, size }) {
    if (cost > 0) this.runs.set(this.keyOf(tree, patch), { seconds: seconds / cost, size, made: this.madeWith(patch) });
  }

  /** The seconds that the tree stands for, at this cost and size; null where no run tells. */
  secondsOf(tree, cost, size) {
    const patches = this.patchesOf(tree);
    const runs = patches.map((patch) => this.runs.get(this.keyOf(tree, patch)));
    const isKnown = runs.length > 0 && runs.every((run, index) => run?.size === size && run.made === this.madeWith(patches[index]));
    return isKnown ? cost * runs.reduce((sum, run) => sum + run.seconds, 0) : null;
  }

  /** The patch nodes that a tree goes to: by wires, through reroutes and Quadtree Adjust, into and out of subgraphs. */
  patchesOf(tree) {
    return this.allNodes().filter((node) => node.constructor.comfyClass === PATCH_NODE && !IS_OFF.includes(node.mode) && this.hasTree(node, "quadtree", tree));
  }

  hasTree(node, slotName, tree, seen = new Set()) {
    if (seen.has(node)) return false;
    seen.add(node);
    const slot = node.isVirtualNode ? 0 : node.inputs.findIndex((input) => input.name === slotName);
    const passesOn = (source) => source.constructor.comfyClass === PASSES_ON || source.isVirtualNode;
    return this.sourcesOf(node, slot).some((source) => source === tree || (passesOn(source) && this.hasTree(source, slotName, tree, seen)));
  }

  /** The nodes whose output an input gets, across the borders of subgraphs: one, or one for each use of the subgraph. */
  sourcesOf(node, slot) {
    // A node that holds a subgraph has a method of this name that answers another question.
    const link = slot < 0 ? null : window.LiteGraph.LGraphNode.prototype.getInputLink.call(node, slot);
    return link ? this.originsOf(node.graph, link) : [];
  }

  originsOf(graph, link) {
    if (String(link.origin_id) === INPUT_OF_SUBGRAPH) {
      return this.allNodes().filter((outer) => outer.subgraph === graph).flatMap((outer) => this.sourcesOf(outer, link.origin_slot));
    }
    const origin = graph.getNodeById(link.origin_id);
    if (!origin?.subgraph) return origin ? [origin] : [];
    const inside = (origin.subgraph.outputs[link.origin_slot]?.linkIds ?? []).map((id) => origin.subgraph.getLink(id));
    return inside.filter(Boolean).flatMap((inner) => this.originsOf(origin.subgraph, inner));
  }

  /** What a run of a patch node depends on, in one text: the nodes that its model comes from, and how it is sampled. */
  madeWith(patch) {
    const parts = [];
    const seen = new Set();
    const climb = (node) => {
      if (seen.has(node)) return;
      seen.add(node);
      if (node !== patch) parts.push([node.type, node.mode, ...(node.widgets ?? []).map((widget) => widget.value)]);
      node.inputs?.forEach((input, slot) => input.type === "MODEL" && this.sourcesOf(node, slot).forEach(climb));
    };
    climb(patch);
    for (const sampler of patch.getOutputNodes(0) ?? []) {
      parts.push(SAMPLING.map((name) => sampler.widgets?.find((widget) => widget.name === name)?.value));
    }
    return JSON.stringify(parts);
  }

  allNodes() {
    const root = this.app.rootGraph;
    return [root, ...(root.subgraphs?.values() ?? [])].flatMap((graph) => graph.nodes);
  }

  // By paths and not by the nodes, which undo and a change of the language make anew.
  keyOf(tree, patch) {
    return `${this.pathOf(tree)} ${this.pathOf(patch)}`;
  }

  /** Where a node is: in which workflow, in which of its graphs, under which id. */
  pathOf(node) {
    return `${this.app.rootGraph.id} ${node.graph?.id}:${node.id}`;
  }
}
