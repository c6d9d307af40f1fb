// What did the run do? A line of text on the node that patches the model.
import { say, sayCoded } from "./texts.mjs";

// In pixels of the node; longer texts can be scrolled.
const ROOM = 76;
const ROOM_FOR_ERROR = 190;

/** Put the line on a node; returns the function that shows what a run tells: {text, values}. */
export function addRunLine(node) {
  const element = document.createElement("div");
  element.className = "qtd qtd-run";
  element.setAttribute("role", "status");
  element.textContent = say("runHint");
  const height = () => (element.classList.contains("qtd-error") ? ROOM_FOR_ERROR : ROOM);
  const widget = node.addDOMWidget("qtd_run", "qtd_run", element, {
    serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight: height, getMaxHeight: () => height() + 20 });
  widget.serialize = false; // not in the workflow either
  return ({ text, values = {} }) => {
    element.textContent = describeRun(text, values);
    element.classList.toggle("qtd-error", Boolean(values.failed));
    node.graph?.setDirtyCanvas(true, true);
  };
}

function describeRun(text, values) {
  if (values.failed) return text;
  if ("done" in values) return sayCoded("run", "step", values, text);
  const rounded = { ...values, cost: values.cost?.toFixed(2), kept: Math.round(100 * values.kept) };
  return sayCoded("run", values.exact ? "end" : "endNotSampled", rounded, text);
}
