// How long will it take? The time of the last run with a tree, scaled to what the tree costs now.

const PATCH_NODE = "QuadtreeTiledDiffusion";
const PASSES_ON = "QuadtreeAdjust";
const OUTPUT_OF_SUBGRAPH = "-20"; // the host's id for it
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
    if (cost > 0) this.runs.set(this.keyOf(tree, patch), { seconds: seconds / cost, size, made: madeWith(patch) });
  }

  /** The seconds that the tree stands for, at this cost and size; null where no run tells. */
  secondsOf(tree, cost, size) {
    const patches = this.patchesOf(tree);
    const runs = patches.map((patch) => this.runs.get(this.keyOf(tree, patch)));
    const isKnown = runs.length > 0 && runs.every((run, index) => run?.size === size && run.made === madeWith(patches[index]));
    return isKnown ? cost * runs.reduce((sum, run) => sum + run.seconds, 0) : null;
  }

  /** The patch nodes that a tree goes to: by wires, through reroutes and Quadtree Adjust, into and out of subgraphs. */
  patchesOf(tree) {
    const found = new Set();
    const seen = new Set();
    const follow = (node, output) => {
      const key = `${this.pathOf(node)} ${output}`;
      if (seen.has(key)) return;
      seen.add(key);
      for (const link of linksFrom(node, output)) this.arrive(node.graph, link, follow, found);
    };
    follow(tree, 0);
    return [...found];
  }

  arrive(graph, link, follow, found) {
    if (String(link.target_id) === OUTPUT_OF_SUBGRAPH) {
      for (const outer of this.allNodes()) if (outer.subgraph === graph) follow(outer, link.target_slot);
      return;
    }
    const target = graph.getNodeById(link.target_id);
    if (!target) return;
    if (target.subgraph) {
      for (const id of target.subgraph.inputs[link.target_slot]?.linkIds ?? []) {
        const inner = target.subgraph.getLink(id);
        if (inner) this.arrive(target.subgraph, inner, follow, found);
      }
    } else if (target.comfyClass === PATCH_NODE && !IS_OFF.includes(target.mode)) found.add(target);
    else if (target.comfyClass === PASSES_ON || target.isVirtualNode) follow(target, 0);
  }

  allNodes() {
    const root = this.app.rootGraph;
    return [root, ...(root.subgraphs?.values() ?? [])].flatMap((graph) => graph.nodes);
  }

  // Nodes are made anew by undo and by a change of the language; their ids stay.
  keyOf(tree, patch) {
    return `${this.app.rootGraph.id} ${this.pathOf(tree)} ${this.pathOf(patch)}`;
  }

  pathOf(node) {
    return `${node.graph?.id}:${node.id}`;
  }
}

function linksFrom(node, output) {
  return (node.outputs?.[output]?.links ?? []).map((id) => node.graph.getLink(id)).filter(Boolean);
}

/** What a run of this patch node depends on, in one text: the nodes that its model comes from, and how it is sampled. */
function madeWith(patch) {
  const parts = [];
  const seen = new Set();
  const climb = (node) => {
    if (!node || seen.has(node)) return;
    seen.add(node);
    if (node !== patch) parts.push([node.type, node.mode, ...(node.widgets ?? []).map((widget) => widget.value)]);
    node.inputs?.forEach((input, slot) => input.type === "MODEL" && climb(node.getInputNode(slot)));
  };
  climb(patch);
  for (const link of linksFrom(patch, 0)) {
    const sampler = patch.graph.getNodeById(link.target_id);
    parts.push(SAMPLING.map((name) => sampler?.widgets?.find((widget) => widget.name === name)?.value));
  }
  return JSON.stringify(parts);
}
