// What did the server say? Its answer as objects, and which leaf lies where.
import { say } from "./texts.mjs";

/** Unpack the server's answer (see `describe` in preview.py). */
export function readTree(answer) {
  const leaves = answer.leaves.map(([left, top, side, detail, index, painted]) => {
    const [strength, colour, steps] = answer.strengths[index];
    const width = Math.min(side, answer.width - left);
    const height = Math.min(side, answer.height - top);
    return { left, top, width, height, side, detail, strength, colour, steps, painted: painted === 1 };
  });
  return { ...answer, leaves, grid: gridOf(answer, leaves) };
}

/** The leaf over a point of the picture, or undefined outside of it. */
export function leafAt(tree, x, y) {
  if (x < 0 || y < 0 || x >= tree.width || y >= tree.height) return undefined;
  return tree.leaves[tree.grid.leaves[Math.floor(y / tree.min_leaf) * tree.grid.columns + Math.floor(x / tree.min_leaf)]];
}

/** The leaf beside a leaf in the direction (dx, dy), or the leaf itself at the border. */
export function neighbour(tree, leaf, dx, dy) {
  const x = leaf.left + leaf.width / 2 + dx * (leaf.width / 2 + 0.5);
  const y = leaf.top + leaf.height / 2 + dy * (leaf.height / 2 + 0.5);
  return leafAt(tree, x, y) ?? leaf;
}

/** A leaf in words. */
export function describeLeaf(leaf, steps) {
  const isCut = leaf.width !== leaf.side || leaf.height !== leaf.side;
  const size = say(isCut ? "leafCut" : "leaf", { ...leaf, detail: leaf.detail.toFixed(1) });
  return `${size}\n${describeStrength(leaf, steps)}${leaf.painted ? `\n${say("leafPainted")}` : ""}`;
}

/** The tree in words. seconds: what it will take, or null. */
export function describeTree(tree, seconds) {
  const values = { leaves: tree.leaves.length, kept: Math.round(tree.kept_share * 100), cost: Math.round(tree.cost * 100) };
  return seconds === null ? say("tree", values) : say("treeTime", { ...values, time: describeTime(seconds) });
}

function describeTime(seconds) {
  if (seconds < 10) return say("seconds", { seconds: seconds.toFixed(1) });
  const whole = Math.round(seconds);
  return whole < 120 ? say("seconds", { seconds: whole }) : say("minutes", { minutes: Math.floor(whole / 60), seconds: whole % 60 });
}

function describeStrength({ strength, steps: active }, steps) {
  if (strength === 0) return say("leafKept");
  const key = active === 0 ? "leafNone" : active === steps ? "leafAll" : "leafLast";
  return say(key, { strength: strength.toFixed(2), active, steps });
}

/** The index of the leaf over each smallest cell. */
function gridOf({ width, height, min_leaf: cell }, leaves) {
  const columns = Math.ceil(width / cell);
  const grid = new Uint32Array(columns * Math.ceil(height / cell));
  leaves.forEach((leaf, index) => {
    const left = leaf.left / cell;
    const right = Math.ceil((leaf.left + leaf.width) / cell);
    for (let row = leaf.top / cell; row < (leaf.top + leaf.height) / cell; row++) {
      grid.fill(index, row * columns + left, row * columns + right);
    }
  });
  return { columns, leaves: grid };
}
