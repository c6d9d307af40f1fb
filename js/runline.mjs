// What did the run do? A line of text on the node that patches the model.

const HINT = "After a run: what it cost, and how much was kept.";

/** Put the line on a node; returns the function that sets it. */
export function addRunLine(node) {
  const element = document.createElement("div");
  element.className = "qtd qtd-run";
  element.setAttribute("role", "status");
  element.textContent = HINT;
  const widget = node.addDOMWidget("qtd_run", "qtd_run", element, { serialize: false, hideOnZoom: false, getMinHeight: () => 60, getMaxHeight: () => 80 });
  widget.serialize = false; // not in the workflow either
  return (text) => {
    element.textContent = text;
  };
}
