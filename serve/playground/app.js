// The page's behaviour: an image and labels in, scores out. It asks its own server alone.

import { drawSample, picture, takePicture, watchPicture } from "./picture.js";
import { findMissing, identifyQuestion, readQuestion, setLabelSets, showQuestion, suggestLabels, writeCommand } from "./question.js";
import { showBusy, showScores, showStale, showTiming, showVector, vector } from "./results.js";
import { Refused, call, hasKey, keepKey, setKey } from "./server.js";

const $ = (id) => document.getElementById(id);

let model = null; // the server's, of GET /v1/models
let asked = null; // the question that the scores on show answer
let runs = 0;
let afterKey = null; // what a 401 interrupted

const showError = (words) => ($("error").textContent = words);

/** Everything that depends on the form. */
function refresh() {
  showQuestion();
  $("curl").textContent = writeCommand(hasKey());
  showStale(identifyQuestion() !== asked);
}

/** What the server runs and which label sets it knows. Whether it told. */
async function readServer() {
  try {
    const [models, sets] = await Promise.all([call("v1/models"), call("v1/label-sets")]);
    model = models.answer.data[0];
    setLabelSets(sets.answer.data);
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

/** Send the question in the form, and show the answer. */
async function classify() {
  for (const id of ["file", "labels", "threshold", "top-k"]) $(id).removeAttribute("aria-invalid");
  const missing = findMissing();
  if (missing) {
    const [field, words] = missing;
    field.closest("details")?.setAttribute("open", "");
    field.setAttribute("aria-invalid", "true");
    field.focus();
    showError(words);
    return;
  }
  const run = ++runs; // an answer that comes after a newer question is of no interest
  showError("");
  showBusy(true);
  try {
    if (!model && !(await readServer())) return;
    const [question, identity, { name, uri }] = [readQuestion(), identifyQuestion(), picture];
    const started = performance.now();
    const { answer, headers } = await call("v1/classify", { images: [uri], ...question });
    if (run !== runs) return;
    showTiming(performance.now() - started, headers.get("Server-Timing"));
    showScores(answer.data[0].labels, name, question.activation === "softmax");
    asked = identity;
    refresh();
    const input = [{ image: uri }];
    const embedded = await call("v1/embeddings", { model: model.id, input, encoding_format: "float" });
    if (run === runs) showVector(embedded.answer.data[0].embedding);
  } catch (error) {
    if (run === runs) explainError(error, classify);
  } finally {
    if (run === runs) showBusy(false);
  }
}

/** Show what went wrong; for a missing key, ask for it, and do `then` when it is there. */
function explainError(error, then) {
  if (!(error instanceof Refused)) throw error;
  if (error.status !== 401) {
    showError(error.message);
    return;
  }
  afterKey = then;
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
  await afterKey();
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
  await takePicture(await drawSample());
  suggestLabels();
  refresh();
  await classify();
});

watchPicture(() => {
  showError("");
  refresh();
}, showError);

for (const button of document.querySelectorAll("[data-copy]")) {
  const words = button.textContent;
  button.addEventListener("click", async () => {
    const text = button.dataset.copy === "vector" ? JSON.stringify(vector) : $("curl").textContent;
    button.textContent = (await copyText(text)) ? "Copied" : "Select it by hand";
    button.focus();
    $("status").textContent = button.textContent;
    setTimeout(() => (button.textContent = words), 2000);
  });
}

/** Whether it could be copied. Browsers have no clipboard API on pages that came over plain HTTP from afar. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
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
