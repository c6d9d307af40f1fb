// How does a tree look? Pure drawing on a 2D context, in CSS pixels.

const LEAF_OPACITY = 0.45;
const HATCH_PX = 7;

/** Where a picture of width x height lies in a box, as large as it fits. */
export function fit(width, height, boxWidth, boxHeight) {
  const scale = Math.min(boxWidth / width, boxHeight / height);
  return { scale, left: (boxWidth - width * scale) / 2, top: (boxHeight - height * scale) / 2 };
}

/** Match a canvas to its size on the page and return its context, in CSS pixels and empty; null while it is hidden. */
export function prepare(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return null;
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

/** The picture with its leaves: colour for strength, hatching for what is kept exactly, a diamond on what was painted. */
export function drawTree(context, view, picture, tree) {
  const box = boxOf(view, { left: 0, top: 0, width: tree.width, height: tree.height });
  if (picture) context.drawImage(picture, ...box);
  for (const leaf of tree.leaves) drawLeaf(context, boxOf(view, leaf), leaf, picture ? LEAF_OPACITY : 1);
  for (const leaf of tree.leaves) if (leaf.painted) drawDiamond(context, boxOf(view, leaf));
}

/** The leaf that the pointer or the keyboard is on: a frame that stands out on dark and on light. */
export function drawFrame(context, view, leaf) {
  const [left, top, width, height] = boxOf(view, leaf);
  for (const [line, colour] of [[4, "#000"], [2, "#fff"]]) {
    context.lineWidth = line;
    context.strokeStyle = colour;
    context.strokeRect(left, top, width, height);
  }
}

/** What a stroke has touched so far, before the server has answered. */
export function drawStroke(context, view, leaves, strength) {
  for (const leaf of leaves) {
    const box = boxOf(view, leaf);
    context.fillStyle = strength === 1 ? "rgb(253 231 37 / 60%)" : "rgb(20 20 20 / 60%)";
    context.fillRect(...box);
    if (strength === 0) hatch(context, box);
    drawDiamond(context, box);
  }
}

export function hatch(context, [left, top, width, height]) {
  context.save();
  context.beginPath();
  context.rect(left, top, width, height);
  context.clip();
  context.beginPath();
  // On lines of the whole picture, so that they go on from leaf to leaf.
  const first = Math.ceil((left + top) / HATCH_PX) * HATCH_PX;
  for (let sum = first; sum < left + width + top + height; sum += HATCH_PX) {
    context.moveTo(sum - top, top);
    context.lineTo(sum - top - height, top + height);
  }
  context.lineWidth = 1;
  context.strokeStyle = "rgb(255 255 255 / 75%)";
  context.stroke();
  context.restore();
}

export function drawDiamond(context, [left, top, width, height]) {
  const radius = Math.max(1.5, Math.min(6, width * 0.3, height * 0.3));
  const x = left + width / 2;
  const y = top + height / 2;
  context.beginPath();
  for (const [dx, dy] of [[0, -radius], [radius, 0], [0, radius], [-radius, 0]]) context.lineTo(x + dx, y + dy);
  context.closePath();
  context.fillStyle = "#fff";
  context.strokeStyle = "#000";
  context.lineWidth = radius > 3 ? 1.5 : 0.5;
  context.fill();
  context.stroke();
}

function boxOf(view, { left, top, width, height }) {
  return [view.left + left * view.scale, view.top + top * view.scale, width * view.scale, height * view.scale];
}

function drawLeaf(context, box, leaf, opacity) {
  context.globalAlpha = opacity;
  context.fillStyle = leaf.colour;
  context.fillRect(...box);
  context.globalAlpha = 1;
  if (leaf.strength === 0) hatch(context, box);
  if (box[2] < 3) return; // borders of leaves this small would cover them
  context.lineWidth = 0.75;
  context.strokeStyle = "rgb(255 255 255 / 60%)";
  context.strokeRect(...box);
}
