// What does one node show, and what does a touch do? The picture with its tree, kept up to date by the server.
import { drawDiamond, drawFrame, drawStroke, drawTree, fit, hatch, prepare } from "./drawing.mjs";
import { nextStrength, paint, readEdits, writeEdits } from "./edits.mjs";
import { say, sayCoded } from "./texts.mjs";
import { drawRegions } from "./regions.mjs";
import { describeLeaf, describeTree, leafAt, neighbour, readTree } from "./tree.mjs";

const ROUTE = "/quadtree_tiled_diffusion/tree";
const SETTINGS = ["detail_budget", "content_threshold", "min_leaf", "max_leaf", "min_denoise", "max_denoise", "metric", "edits"];
const DEBOUNCE_MS = 30;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

let count = 0;

export class Overlay {
  /** node: of the graph. api, app: the host's. timing, regions: of the page's runs. */
  constructor({ node, api, app, timing, regions }) {
    Object.assign(this, { node, api, app, timing, regions });
    this.result = this.tree = this.picture = this.hovered = this.focused = this.stroke = null;
    this.error = this.edits = "";
    this.secondsOfRun = new Map(); // of the graph's present run, by patch node
    this.requests = new AbortController();
    this.build();
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.stage);
    this.show();
  }

  /** Take what the node's run sent: a picture, and the key under which the server knows it. */
  setResult(result) {
    if (!result) return;
    this.result = result;
    const picture = new Image();
    picture.onload = () => {
      this.picture = picture;
      this.draw();
    };
    picture.src = this.api.apiURL(`/view?${new URLSearchParams(result.image)}`);
    this.rememberRuns();
    this.refresh();
  }

  /** Ask for the tree of the settings as they are now: soon, and one question at a time. */
  refresh() {
    this.isStale = true;
    if (!this.result || this.timer || this.isAsking || this.requests.signal.aborted) return this.show();
    this.timer = setTimeout(() => this.ask(), DEBOUNCE_MS);
  }

  /** Stop all that goes on: the node is gone. */
  close() {
    clearTimeout(this.timer);
    this.requests.abort();
    this.sizes.disconnect();
  }

  async ask() {
    this.timer = null;
    this.isStale = false;
    this.isAsking = true;
    const { edits } = this;
    try {
      const body = JSON.stringify({ picture: this.result.picture, ...this.settings() });
      const headers = { "Content-Type": "application/json" };
      const response = await this.api.fetchApi(ROUTE, { method: "POST", headers, body, signal: this.requests.signal });
      const answer = await response.json();
      // What was painted meanwhile is shown already, and the next answer knows it, too.
      if (edits === this.edits) this.take(answer);
    } catch (problem) {
      if (this.requests.signal.aborted) return;
      this.take({ error: say("noAnswer", { problem: problem.message }) });
    } finally {
      this.isAsking = false;
    }
    if (this.isStale) this.refresh();
  }

  take(answer) {
    this.error = answer.error ? sayCoded("errors", answer.code, this.labelled(answer.values), answer.error) : "";
    this.tree = answer.error ? null : readTree(answer);
    const again = (leaf) => (leaf && this.tree ? leafAt(this.tree, leaf.left + leaf.width / 2, leaf.top + leaf.height / 2) : null);
    this.hovered = again(this.hovered);
    this.focused = again(this.focused);
    if (!this.tip.hidden) this.showTip(this.hovered ?? this.focused, ...this.tipPlace);
    this.show();
  }

  /** The values that the node would run with; those of wired inputs are known from its last run. */
  settings() {
    return Object.fromEntries(SETTINGS.map((name) => [name, this.isWired(name) ? this.result.settings[name] : this.widget(name)?.value]));
  }

  widget(name) {
    return this.node.widgets?.find((widget) => widget.name === name);
  }

  /** The values of an error, where a setting is called as it is on the node. */
  labelled(values = {}) {
    return "name" in values ? { ...values, name: this.widget(values.name)?.label ?? values.name } : values;
  }

  /** Take how long a patch node's run took. */
  takeRun(patch, seconds) {
    this.secondsOfRun.set(patch, seconds);
    this.rememberRuns();
    this.showLine();
  }

  /** Remember the runs that had this tree. A result from the host's cache comes after them; until then an older one is here. */
  rememberRuns() {
    const { cost, size } = this.result ?? {};
    for (const patch of size ? this.timing.patchesOf(this.node) : []) {
      const seconds = this.secondsOfRun.get(patch);
      if (seconds !== undefined) this.timing.remember(this.node, patch, { seconds, cost, size: String(size) });
    }
  }

  secondsNow() {
    return this.timing.secondsOf(this.node, this.tree.cost, String([this.tree.width, this.tree.height]));
  }

  isWired(name) {
    const slot = this.node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
    return slot >= 0 && this.node.isInputConnected(slot);
  }

  // Painting

  /** Paint leaves with a strength. */
  paintLeaves(leaves, strength) {
    if (this.isWired("edits")) return this.say(say("wired"));
    const { width, height } = this.tree;
    const before = readEdits(this.edits);
    // Of another size, but of the same aspect: of any other the server would have shown no tree.
    const scale = before ? width / before.size[0] : 1;
    let squares = before ? before.squares.map(([left, top, side, amount]) => [left * scale, top * scale, side * scale, amount]) : [];
    for (const leaf of leaves) {
      squares = paint(squares, [leaf.left, leaf.top, leaf.side, strength]);
      leaf.painted = strength !== null;
      leaf.strength = strength ?? leaf.strength;
      if (leaf.painted) leaf.colour = this.tree.palette.at(strength ? -1 : 0);
    }
    this.draw(); // until the server has answered
    this.setEdits(writeEdits(width, height, squares));
  }

  /** Take what is painted, the value of the node's `edits`. */
  setValue(text) {
    this.edits = String(text ?? "");
    this.refresh();
  }

  /** Change what is painted, as one step of the host's undo. */
  setEdits(text) {
    if (this.edits === text) return;
    this.app.canvas.emitBeforeChange();
    this.widget("edits").value = text;
    this.app.canvas.emitAfterChange();
    this.node.graph?.setDirtyCanvas(true, true);
  }

  // Pointer and keyboard

  onPointerDown(event) {
    if (event.button === 1) return this.isClassic() && this.app.canvas.processMouseDown(event);
    const leaf = this.leafUnder(event);
    if (event.button !== 0 || !leaf) return;
    this.stroke = { leaves: new Set([leaf]), strength: nextStrength(leaf), last: this.pointOf(event) };
    this.top.setPointerCapture(event.pointerId);
    this.drawTop();
  }

  onPointerMove(event) {
    this.hovered = this.leafUnder(event) ?? null;
    if (this.stroke) this.addToStroke(this.pointOf(event));
    const [x, y] = this.placeOf(event);
    this.showTip(this.hovered, x, y);
    this.drawTop();
  }

  /** Take in all leaves on the way from where the pointer was last. */
  addToStroke([x, y]) {
    const [lastX, lastY] = this.stroke.last;
    const steps = Math.max(1, Math.ceil(Math.hypot(x - lastX, y - lastY) / (this.tree.min_leaf / 2)));
    for (let step = 1; step <= steps; step++) {
      const leaf = leafAt(this.tree, lastX + ((x - lastX) * step) / steps, lastY + ((y - lastY) * step) / steps);
      if (leaf) this.stroke.leaves.add(leaf);
    }
    this.stroke.last = [x, y];
  }

  onPointerUp() {
    const stroke = this.stroke;
    this.stroke = null;
    if (stroke && this.tree) this.paintLeaves(stroke.leaves, stroke.strength);
    this.drawTop();
  }

  onPointerGone() {
    this.hovered = this.stroke = null;
    this.showTip(null);
    this.drawTop();
  }

  onKeyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return; // undo is the host's
    if (this.tree && event.key in ARROWS) this.moveFocus(...ARROWS[event.key]);
    else if (this.tree && (event.key === "Enter" || event.key === " ")) this.toggleFocused();
    else if (event.key === "Escape") this.top.blur();
    else return;
    // Else the host moves the canvas.
    event.preventDefault();
    event.stopPropagation();
  }

  moveFocus(dx, dy) {
    this.focused = this.focused ? neighbour(this.tree, this.focused, dx, dy) : this.tree.leaves[0];
    this.tellFocused();
  }

  toggleFocused() {
    const leaf = (this.focused ??= this.tree.leaves[0]);
    const strength = nextStrength(leaf);
    this.paintLeaves([leaf], strength);
    if (!this.isWired("edits")) this.say(say({ 0: "saidKept", 1: "saidRedrawn" }[strength] ?? "saidReleased"));
    this.drawTop();
  }

  tellFocused() {
    const { left, top, scale } = this.view();
    const { focused } = this;
    this.say(describeLeaf(focused, this.tree.steps));
    this.showTip(focused, left + (focused.left + focused.width / 2) * scale, top + (focused.top + focused.height / 2) * scale);
    this.drawTop();
  }

  /** Where the pointer is on the canvas, in its CSS pixels. */
  placeOf(event) {
    // The page may show the canvas scaled, so its size there counts.
    const shown = this.top.getBoundingClientRect();
    const scale = this.top.clientWidth / shown.width;
    return [(event.clientX - shown.left) * scale, (event.clientY - shown.top) * scale];
  }

  /** Where the pointer is on the picture, in its pixels. */
  pointOf(event) {
    const [x, y] = this.placeOf(event);
    const { left, top, scale } = this.view();
    return [(x - left) / scale, (y - top) / scale];
  }

  leafUnder(event) {
    return this.tree ? leafAt(this.tree, ...this.pointOf(event)) : undefined;
  }

  isClassic() {
    return !window.LiteGraph?.vueNodesMode;
  }

  // What is shown

  view() {
    return fit(this.tree.width, this.tree.height, this.top.clientWidth, this.top.clientHeight);
  }

  showLine() {
    this.line.textContent = this.error || (this.tree ? describeTree(this.tree, this.secondsNow()) : say("hint"));
    this.line.classList.toggle("qtd-error", Boolean(this.error));
  }

  show() {
    this.showLine();
    this.wired.hidden = !this.isWired("edits");
    this.top.classList.toggle("qtd-readonly", !this.wired.hidden);
    this.clearButton.disabled = !this.edits || !this.wired.hidden;
    if (this.tree) this.ramp.style.background = `linear-gradient(to right, ${this.tree.palette.join(", ")})`;
    this.element.dataset.leaves = this.tree ? String(this.tree.leaves.length) : "";
    this.showRegions();
    this.draw();
  }

  /** Offer the regions where there are any; the one whose line the cursor is in shows by itself. */
  showRegions() {
    if (!this.node.graph) return;
    const before = JSON.stringify(this.found);
    this.found = this.tree && this.regions.over(this.node);
    this.regionsButton.hidden = !this.found;
    this.element.dataset.regions = this.found ? String(this.found.rects.length) : "";
    this.element.dataset.chosen = String(this.found?.chosen ?? "");
    this.element.dataset.silent = String(this.found?.silent ?? "");
    if (JSON.stringify(this.found) !== before) this.drawTop();
  }

  draw() {
    const context = prepare(this.base);
    if (context && this.tree) drawTree(context, this.view(), this.picture, this.tree);
    this.drawTop();
  }

  drawTop() {
    const context = prepare(this.top);
    if (!context || !this.tree) return;
    const view = this.view();
    if (this.found) drawRegions(context, view, this.tree, this.found, this.regionsButton.ariaPressed === "true");
    if (this.stroke) drawStroke(context, view, this.stroke.leaves, this.stroke.strength);
    const isFocused = this.top.getRootNode().activeElement === this.top;
    for (const leaf of [this.hovered, isFocused ? this.focused : null]) if (leaf) drawFrame(context, view, leaf);
  }

  /** Tell of a leaf, or of none, beside a place on the canvas. */
  showTip(leaf, x, y) {
    this.tip.hidden = !leaf;
    if (!leaf) return;
    this.tipPlace = [x, y];
    this.tip.textContent = describeLeaf(leaf, this.tree.steps);
    // On the side that has room.
    this.tip.style.left = `${x < this.top.clientWidth / 2 ? x + 14 : x - 14 - this.tip.offsetWidth}px`;
    this.tip.style.top = `${y < this.top.clientHeight / 2 ? y + 14 : y - 14 - this.tip.offsetHeight}px`;
  }

  /** Tell a screen reader. */
  say(text) {
    this.live.textContent = text;
  }

  build() {
    const id = `qtd-line-${count++}`;
    this.element = make("div", "qtd");
    this.stage = make("div", "qtd-stage");
    this.base = make("canvas", "qtd-layer", { "aria-hidden": "true" });
    this.top = make("canvas", "qtd-layer qtd-top", {
      tabindex: "0", role: "application", "aria-roledescription": say("role"), "aria-describedby": id, "aria-label": say("aria"),
    });
    this.tip = make("div", "qtd-tip", { role: "tooltip" });
    this.tip.hidden = true;
    this.stage.append(this.base, this.top, this.tip);
    this.line = make("div", "qtd-line", { id, title: say("lineTip") });
    this.wired = make("div", "qtd-wired", { role: "status" }, say("wired"));
    this.live = make("div", "qtd-live", { "aria-live": "polite" });
    this.element.append(this.stage, this.buildLegend(), this.wired, this.line, this.live);
    this.listen();
  }

  buildLegend() {
    const legend = make("div", "qtd-legend");
    this.ramp = make("span", "qtd-ramp", { "aria-hidden": "true" });
    this.clearButton = make("button", "qtd-button", { type: "button", title: say("clearTip") }, say("clear"));
    this.regionsButton = make("button", "qtd-regions", { type: "button", title: say("regionsTip"), "aria-pressed": "false" }, say("regions"));
    this.regionsButton.hidden = true;
    legend.append(
      make("span", "", {}, say("strengthZero")), this.ramp, make("span", "", {}, say("strengthOne")),
      swatch((context) => hatch(context, [0, 0, 14, 14])), make("span", "", {}, say("keptExactly")),
      swatch((context) => drawDiamond(context, [0, 0, 14, 14])), make("span", "", {}, say("painted")),
      this.regionsButton, this.clearButton);
    return legend;
  }

  listen() {
    this.top.addEventListener("pointerdown", (event) => this.onPointerDown(event));
    this.top.addEventListener("pointermove", (event) => this.onPointerMove(event));
    this.top.addEventListener("pointerup", () => this.onPointerUp());
    this.top.addEventListener("pointercancel", () => this.onPointerGone());
    this.top.addEventListener("pointerleave", () => this.stroke || this.onPointerGone());
    this.top.addEventListener("keydown", (event) => this.onKeyDown(event));
    this.top.addEventListener("focus", () => this.drawTop());
    this.top.addEventListener("blur", () => this.onPointerGone());
    // The classic canvas lies under this element and would not hear of the wheel.
    this.element.addEventListener("wheel", (event) => this.isClassic() && this.app.canvas.processMouseWheel(event), { passive: true });
    this.regionsButton.addEventListener("click", () => {
      this.regionsButton.ariaPressed = String(this.regionsButton.ariaPressed !== "true");
      this.drawTop();
    });
    this.clearButton.addEventListener("click", () => this.setEdits(""));
  }
}

function make(tag, className, attributes = {}, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

function swatch(drawOn) {
  const canvas = make("canvas", "qtd-swatch", { "aria-hidden": "true" });
  canvas.width = canvas.height = 14;
  drawOn(canvas.getContext("2d"));
  return canvas;
}
