// In which language, and in which words? English stands here; locales/*/main.json has the others, which the host serves.

const NAME = "quadtreeTiledDiffusion";
const ENGLISH = {
  hint: "Run the graph once to see the tree. From then on it follows the settings at once, and you can paint on it.",
  tree: "{leaves} leaves, {kept} % kept exactly. Estimated cost: {cost} % of sampling everything.",
  treeTime: "{leaves} leaves, {kept} % kept exactly. Estimated cost: {cost} % of sampling everything, about {time}.",
  seconds: "{seconds} s",
  minutes: "{minutes} min {seconds} s",
  lineTip: "The cost is for a picture of this size, windows of the default sizes and 20 steps. The time is that of the last run, scaled to this cost.",
  strengthZero: "strength 0",
  strengthOne: "1",
  keptExactly: "kept exactly",
  painted: "painted",
  clear: "Clear",
  clearTip: "Take back all that was painted",
  wired: "edits is wired: what is painted comes from there.",
  role: "quadtree",
  aria: "Leaves of the picture. Arrow keys go from leaf to leaf, Enter keeps, redraws or releases a leaf, Control Z undoes, Escape leaves.",
  leaf: "{side} px, detail {detail}",
  leafCut: "{side} px, here {width} x {height}, detail {detail}",
  leafKept: "strength 0, kept exactly",
  leafNone: "strength {strength}, not sampled within {steps} steps",
  leafAll: "strength {strength}, all of {steps} steps",
  leafLast: "strength {strength}, last {active} of {steps} steps",
  leafPainted: "painted by you",
  saidKept: "Kept exactly.",
  saidRedrawn: "Redrawn fully.",
  saidReleased: "Left to the tree again.",
  noAnswer: "The server did not answer ({problem}).",
  regions: "Regions",
  regionsTip: "Show the regions of the last run and their numbers",
  regionSilent: "no line",
  regionCaption: "caption",
  runHint: "After a run: what it cost, and how much was kept.",
};

let translations = {};
let tagNow = () => "en";

/** Get the translations from the host. api, app: the host's. Without them all is said in English. */
export async function loadTexts(api, app) {
  // Asked anew for each text: the host builds the nodes anew when the language changes, and no page is loaded.
  tagNow = () => app.extensionManager.setting.get("Comfy.Locale") || "en";
  try {
    translations = await (await api.fetchApi("/i18n")).json();
  } catch (problem) {
    console.warn("quadtree tiled diffusion: no translations,", problem.message);
  }
}

/** A text with its values, in the language of the page, else of its family (zh-TW: zh), else in English. */
export function say(key, values = {}) {
  return fill(translated(key) ?? ENGLISH[key], values);
}

/** What the server says with a code and values, in the language of the page; its own English sentence where there is no translation. */
export function sayCoded(group, code, values, sentence) {
  const text = code && translated(group)?.[code];
  return text ? fill(text, values) : sentence;
}

function translated(key) {
  const tag = tagNow();
  const language = tag.split("-")[0];
  return language === "en" ? undefined : translations[tag]?.[NAME]?.[key] ?? translations[language]?.[NAME]?.[key];
}

// The braces of vue-i18n, since the host keeps these texts beside its own.
function fill(text, values) {
  return text.replace(/{(\w+)}/g, (braced, name) => values[name] ?? braced);
}
