// What did the server say? Its answer as objects, and which leaf lies where.

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
  const size = leaf.width === leaf.side && leaf.height === leaf.side ? `${leaf.side} px` : `${leaf.side} px, here ${leaf.width} x ${leaf.height}`;
  const strength = leaf.strength === 0 ? "strength 0, kept exactly" : `strength ${leaf.strength.toFixed(2)}, ${describeSteps(leaf.steps, steps)}`;
  return `${size}, detail ${leaf.detail.toFixed(1)}\n${strength}${leaf.painted ? "\npainted by you" : ""}`;
}

/** The tree in words. */
export function describeTree(tree) {
  const percent = (share) => `${Math.round(share * 100)} %`;
  return `${tree.leaves.length} leaves, ${percent(tree.kept_share)} kept exactly. Estimated cost: ${percent(tree.cost)} of sampling everything.`;
}

function describeSteps(active, steps) {
  if (active === 0) return `not sampled within ${steps} steps`;
  return active === steps ? `all of ${steps} steps` : `last ${active} of ${steps} steps`;
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
