// Which regions lie over a tree, what is said of each, and how does that look?
import { say } from "./texts.mjs";

const REGIONS_NODE = "QuadtreeRegions";
const TEXT_NODE = "QuadtreeRegionText";
const LINE = /^\s*(\d+(?:\s*-\s*\d+)?(?:\s*,\s*\d+(?:\s*-\s*\d+)?)*)\s*:/; // as in regions.py

/** The regions of the graph's last runs, and the one whose line the cursor is in. */
export class Regions {
  /** timing: knows the graph's wires. changed: is called when something else is to be shown. */
  constructor(timing, changed) {
    Object.assign(this, { timing, changed });
    this.results = new Map(); // by path: undo makes nodes anew
    this.cursor = null;
    for (const event of ["selectionchange", "focusin", "focusout", "input"]) document.addEventListener(event, () => this.follow());
  }

  isOf(node) {
    return node.constructor.comfyClass === REGIONS_NODE;
  }

  /** Take what the run of a node sent: the size of its picture, and [left, top, width, height] of each region. */
  take(node, result) {
    if (!result) return;
    this.results.set(this.timing.pathOf(node), result);
    this.changed();
  }

  /** What to show over the tree of a node: its regions, the numbers under the cursor, and those without a line; null where there are none. */
  over(tree) {
    const node = this.nodes(REGIONS_NODE).find((one) => this.results.has(this.timing.pathOf(one)) && this.timing.hasTree(one, "quadtree", tree));
    if (!node) return null;
    const result = this.results.get(this.timing.pathOf(node));
    const texts = this.nodes(TEXT_NODE).filter((text) => this.timing.hasTree(text, "regions", node));
    const chosen = texts.includes(this.cursor?.node) ? this.cursor.numbers : [];
    return { ...result, chosen, silent: silentOf(texts, result.rects.length), note: say(texts.some((text) => isWired(text, "captions")) ? "regionCaption" : "regionSilent") };
  }

  /** Look where the cursor is, and let that be shown. */
  follow() {
    const found = this.cursorNow();
    if (!found && !this.cursor) return;
    this.cursor = found;
    this.changed();
  }

  cursorNow() {
    const field = document.activeElement;
    const node = field?.tagName === "TEXTAREA" ? this.nodes(TEXT_NODE).find((text) => isLinesOf(text, field)) : null;
    if (!node) return null;
    const start = field.value.lastIndexOf("\n", field.selectionStart - 1) + 1;
    return { node, numbers: numbersOf(field.value.slice(field.selectionStart ? start : 0).split("\n", 1)[0]) };
  }

  nodes(kind) {
    return this.timing.allNodes().filter((node) => node.constructor.comfyClass === kind);
  }
}

/** Draw the regions that are chosen, or all of them, with their numbers; those without a line say so. */
export function drawRegions(context, view, tree, { rects, size, chosen, silent, note }, all) {
  const scale = (view.scale * tree.width) / size[0];
  context.textAlign = "center";
  context.textBaseline = "middle";
  rects.forEach(([left, top, width, height], index) => {
    const number = index + 1;
    const isChosen = chosen.includes(number);
    if (!all && !isChosen) return;
    const box = [view.left + left * scale, view.top + top * scale, width * scale, height * scale];
    for (const [line, colour] of [[isChosen ? 6 : 3, "#000"], [isChosen ? 3 : 1, "#fff"]]) {
      context.lineWidth = line;
      context.strokeStyle = colour;
      context.strokeRect(...box);
    }
    write(context, box, String(number), silent.includes(number) ? note : "");
  });
}

/** The numbers that a line of the node's names, as a list. */
export function numbersOf(line) {
  const parts = LINE.exec(line)?.[1].split(",") ?? [];
  return parts.flatMap((part) => {
    const [first, last = first] = part.split("-").map(Number);
    return Array.from({ length: Math.min(Math.max(last - first + 1, 0), 10000) }, (_, index) => first + index);
  });
}

/** The regions that no line is for; none where a node's lines come by a wire. */
function silentOf(texts, amount) {
  if (!texts.length || texts.some((text) => isWired(text, "lines"))) return [];
  const lines = texts.flatMap((text) => String(widgetOf(text, "lines")?.value ?? "").split("\n"));
  const said = new Set(lines.flatMap(numbersOf));
  return Array.from({ length: amount }, (_, index) => index + 1).filter((number) => !said.has(number));
}

function isLinesOf(node, field) {
  const element = widgetOf(node, "lines")?.element;
  if (element === field || element?.contains(field)) return true;
  // Nodes 2.0 has fields of its own, in the widgets' order.
  const shown = field.closest("[data-node-id]");
  return shown?.dataset.nodeId === String(node.id) && [...shown.querySelectorAll("textarea")].at(-1) === field;
}

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

function isWired(node, name) {
  return (node.inputs ?? []).some((input) => input.name === name && input.link != null);
}

function write(context, [left, top, width, height], number, note) {
  const size = Math.max(10, Math.min(28, width / 3, height / 3));
  const [x, y] = [left + width / 2, top + height / 2];
  context.strokeStyle = "#000";
  context.fillStyle = "#fff";
  for (const [text, px, place] of [[number, size, note ? y - size / 3 : y], [note, Math.max(9, size * 0.45), y + size * 0.5]]) {
    context.font = `bold ${px}px sans-serif`;
    context.lineWidth = 3;
    context.strokeText(text, x, place, width);
    context.fillText(text, x, place, width);
  }
}
