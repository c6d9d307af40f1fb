// What was painted: the value of the `edits` widget, as quadtree.py reads it.

/** The painted squares [left, top, side, strength] of a widget's text; none if it holds anything else. */
export function readEdits(text) {
  try {
    const edits = JSON.parse(text);
    const fine = Array.isArray(edits.size) && Array.isArray(edits.squares) && edits.squares.every(Array.isArray);
    return fine ? edits : null;
  } catch {
    return null;
  }
}

/** The text for squares on a picture of this size; empty without squares. */
export function writeEdits(width, height, squares) {
  return squares.length ? JSON.stringify({ size: [width, height], squares }) : "";
}

/** The squares with one more painted over them; strength null takes back what lies under it. */
export function paint(squares, [left, top, side, strength]) {
  const inside = ([l, t, s]) => l >= left && t >= top && l + s <= left + side && t + s <= top + side;
  const touches = ([l, t, s]) => l < left + side && t < top + side && l + s > left && t + s > top;
  const others = squares.filter((square) => !inside(square));
  return strength === null && !others.some(touches) ? others : [...others, [left, top, side, strength]];
}

/** What a touch makes of a leaf: keep it, redraw it fully, leave it to the tree again. */
export function nextStrength(leaf) {
  if (!leaf.painted) return 0;
  return leaf.strength === 0 ? 1 : null;
}
