// The page's behaviour: takes an image and labels, shows scores. It connects to its own server only.

import { drawSample, image, setImage, watchImageInputs } from "./image.js";
import { findMissing, identifyQuery, readQuery, setLabelSets, showQuery, suggestLabels, writeCommand } from "./query.js";
import { showBusy, showScores, showStale, showTiming, showVector, vector } from "./results.js";
import { showSearch } from "./search.js";
import { ApiError, call, hasKey, keepKey, setKey } from "./server.js";

const $ = (id) => document.getElementById(id);

let model = null; // the server's model, from GET /v1/models
let shownQuery = null; // identifies the query whose scores are shown
let latestRun = 0;
let retry = null; // what to repeat after the user has entered an API key

const showError = (message) => ($("error").textContent = message);

/** Update everything that depends on the form. */
function refresh() {
  showQuery();
  $("curl").textContent = writeCommand(hasKey());
  showStale(identifyQuery() !== shownQuery);
}

/** Read the server's model and label sets. Returns whether that succeeded. */
async function readServer() {
  try {
    const [models, sets] = await Promise.all([call("v1/models"), call("v1/label-sets")]);
    model = models.body.data[0];
    setLabelSets(sets.body.data);
    showSearch(model.search, explainError);
  } catch (error) {
    explainError(error, readServer);
    return false;
  }
  const device = model.device === "cuda" ? "GPU" : model.device.toUpperCase();
  $("model").textContent = `${model.id} on ${device}, ${model.dtype}`;
  $("model").hidden = false;
  refresh();
  return true;
}

/** Send the form's query, and show the scores and the embedding. */
async function classify() {
  for (const id of ["file", "labels", "threshold", "top-k"]) $(id).removeAttribute("aria-invalid");
  const missing = findMissing();
  if (missing) {
    const [field, message] = missing;
    field.closest("details")?.setAttribute("open", "");
    field.setAttribute("aria-invalid", "true");
    field.focus();
    showError(message);
    return;
  }
  const run = ++latestRun; // a response that arrives after a newer query was sent is ignored
  showError("");
  showBusy(true);
  try {
    if (!model && !(await readServer())) return;
    const [query, identity, { name, uri }] = [readQuery(), identifyQuery(), image];
    const started = performance.now();
    const { body, headers } = await call("v1/classify", { images: [uri], ...query });
    if (run !== latestRun) return;
    showTiming(performance.now() - started, headers.get("Server-Timing"));
    showScores(body.data[0].labels, name, query.activation === "softmax");
    shownQuery = identity;
    refresh();
    const input = [{ image: uri }];
    const embedded = await call("v1/embeddings", { model: model.id, input, encoding_format: "float" });
    if (run === latestRun) showVector(embedded.body.data[0].embedding);
  } catch (error) {
    if (run === latestRun) explainError(error, classify);
  } finally {
    if (run === latestRun) showBusy(false);
  }
}

/** Show an error. If the API key is missing or unknown, ask for a key, and call `then` after the server accepted it. */
function explainError(error, then) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status !== 401) {
    showError(error.message);
    return;
  }
  retry = then;
  $("access").hidden = false;
  $("access-error").textContent = hasKey() ? error.message : "";
  $("key").focus();
}

$("access-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  try {
    await call("v1/models");
  } catch (error) {
    $("access-error").textContent = error.message;
    $("key").select();
    return;
  }
  keepKey();
  $("access").hidden = true;
  $("key").value = "";
  $("file").focus();
  refresh();
  await retry();
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
for (const kind of ["input", "change"]) $("ask").addEventListener(kind, refresh);

$("labels").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});

$("sample").addEventListener("click", async () => {
  await setImage(await drawSample());
  suggestLabels();
  refresh();
  await classify();
});

watchImageInputs(() => {
  showError("");
  refresh();
}, showError);

for (const button of document.querySelectorAll("[data-copy]")) {
  const title = button.textContent;
  button.addEventListener("click", async () => {
    const text = button.dataset.copy === "vector" ? JSON.stringify(vector) : $("curl").textContent;
    button.textContent = (await copyText(text)) ? "Copied" : "Select and copy it yourself";
    button.focus();
    $("status").textContent = button.textContent;
    setTimeout(() => (button.textContent = title), 2000);
  });
}

/** Copy a text to the clipboard. Returns whether that succeeded. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers have no clipboard API on pages that another machine served over plain HTTP.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

refresh();
readServer();
