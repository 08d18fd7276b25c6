// The page's behaviour: an image and labels in, scores out. It asks its own server alone and keeps nothing but the
// API key, in this tab's session storage.

const $ = (id) => document.getElementById(id);
const NUMBERS_SHOWN = 12;
const LABELS_SHOWN = 24;
const SCROLL = matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";
const SAMPLE_LABELS = ["red circle", "blue circle", "red square", "green triangle"];

/** What the user has given, and what the server has said. */
const state = {
  image: null, // {name, uri, url}
  sets: [],
  model: null,
  asked: null, // what the scores on show answer
  vector: null,
  key: sessionStorage.getItem("sightline-key"),
  afterKey: null, // what a 401 interrupted
  run: 0,
};

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// --- the server

/** A call of the API: its JSON and the answer's headers. Throws `Refused` with words for the user. */
async function call(path, body) {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response, text;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
    text = await response.text();
  } catch {
    throw new Refused("The server cannot be reached. Is it still running?", 0);
  }
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // A proxy in between, perhaps; what it says is of no use to the user.
  }
  if (!response.ok) throw new Refused(explain(response, answer), response.status);
  if (!answer) throw new Refused("The answer is not from Sightline: something in between answered instead.", response.status);
  return { answer, headers: response.headers };
}

/** A refusal in words. */
function explain(response, answer) {
  const { message: said = "", param } = answer?.error ?? {};
  // The field's name, such as images.0, says nothing on a page with one image.
  const words = said.startsWith(`${param}: `) ? said.slice(param.length + 2) : said;
  const message = words ? words[0].toUpperCase() + words.slice(1) : `The server answered with status ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After"));
  return wait ? `${message.replace(/\.?$/, ".")} Try again in ${wait} s.` : message;
}

/** What the server runs and which label sets it knows. A 401 opens the key's form. */
async function readServer() {
  try {
    const [models, sets] = await Promise.all([call("v1/models"), call("v1/label-sets")]);
    state.model = models.answer.data[0];
    state.sets = sets.answer.data;
    showServer();
    return true;
  } catch (error) {
    if (error.status === 401) askForKey(readServer, error);
    else showError(error.message);
    return false;
  }
}

function showServer() {
  const { id, device, dtype } = state.model;
  $("model").textContent = `${id} on ${device === "cuda" ? "GPU" : device.toUpperCase()}, ${dtype}`;
  $("model").hidden = false;
  $("source").hidden = !state.sets.length;
  $("label-set").replaceChildren(
    ...state.sets.map((set) => new Option(`${set.id} (${set.labels.length})`, set.id)),
  );
  showSource();
}

// --- the API key

function askForKey(then, error) {
  state.afterKey = then;
  $("access").hidden = false;
  $("access-error").textContent = state.key ? error.message : "";
  $("key").focus();
}

$("access-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  state.key = $("key").value.trim();
  try {
    await call("v1/models");
  } catch (error) {
    $("access-error").textContent = error.message;
    $("key").select();
    return;
  }
  sessionStorage.setItem("sightline-key", state.key);
  $("access").hidden = true;
  $("access-error").textContent = "";
  showCurl();
  const then = state.afterKey;
  state.afterKey = null;
  if (!state.model) await readServer();
  if (then && then !== readServer) await then();
  else $("file").focus();
});

// --- the image

async function takeFile(file) {
  showError("");
  if (file.type && !file.type.startsWith("image/")) {
    showError(`${file.name} is not an image. Choose a JPEG, PNG, WebP, GIF, BMP or TIFF.`);
    return;
  }
  let uri;
  try {
    uri = await readDataUri(file);
  } catch {
    showError(`${file.name} could not be read. Was it moved, or is it on a drive that is gone?`);
    return;
  }
  if (state.image) URL.revokeObjectURL(state.image.url);
  state.image = { name: file.name || "image.png", uri, url: URL.createObjectURL(file) };
  const size = file.size < 1e6 ? `${Math.ceil(file.size / 1e3)}\u00a0kB` : `${(file.size / 1e6).toFixed(1)}\u00a0MB`;
  $("drop").classList.add("full");
  document.querySelector(".drop > .drop-empty").hidden = true;
  $("no-preview").hidden = true;
  $("about-image").textContent = `${state.image.name}, ${size}`;
  const preview = $("preview");
  preview.onload = () => {
    $("about-image").textContent = `${state.image.name}, ${preview.naturalWidth}\u00a0×\u00a0${preview.naturalHeight}, ${size}`;
  };
  preview.onerror = () => {
    preview.hidden = true;
    $("no-preview").hidden = false;
  };
  preview.hidden = false;
  preview.alt = `Preview of ${state.image.name}`;
  preview.src = state.image.url;
  showCurl();
  showStale(readQuestionText() !== state.asked);
}

function readDataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(file);
  });
}

/** A red circle on grey: something to try with, for which the checkpoint that ships with Sightline was trained. */
function drawSample() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 256;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#c8c8c8";
  pen.fillRect(0, 0, 256, 256);
  pen.fillStyle = "#dc1e1e";
  pen.beginPath();
  pen.arc(128, 128, 80, 0, 2 * Math.PI);
  pen.fill();
  return new Promise((resolve) => {
    canvas.toBlob((blob) => resolve(new File([blob], "red-circle.png", { type: "image/png" })), "image/png");
  });
}

for (const input of [$("file"), $("camera")]) {
  input.addEventListener("change", () => {
    if (input.files.length) takeFile(input.files[0]);
  });
  // The same file chosen again is a new choice.
  input.addEventListener("click", () => (input.value = ""));
}

$("sample").addEventListener("click", async () => {
  await takeFile(await drawSample());
  if (!readLabels().length) $("labels").value = SAMPLE_LABELS.join(", ");
  showSource();
  await classify();
});

document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (!file) return; // text for the labels, most likely
  event.preventDefault();
  takeFile(file);
});

let entered = 0;
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    entered = kind === "drop" ? 0 : entered + { dragenter: 1, dragleave: -1 }[kind] || 0;
    if (kind === "dragover") entered = Math.max(1, entered);
    $("drop").classList.toggle("over", entered > 0);
    if (kind === "drop" && event.dataTransfer.files.length) takeFile(event.dataTransfer.files[0]);
  });
}

// --- the labels

/** The labels typed, each once, in order. */
function readLabels() {
  return [...new Set($("labels").value.split(/[,\n]/).map((label) => label.trim()).filter(Boolean))];
}

const usesSet = () => state.sets.length > 0 && document.querySelector("[name=source]:checked").value === "set";

function showSource() {
  $("own").hidden = usesSet();
  $("set").hidden = !usesSet();
  const count = readLabels().length;
  $("labels-help").textContent = count ? `${count} ${count === 1 ? "label" : "labels"}` : "Separate them with commas or lines.";
  const set = usesSet() ? state.sets.find((one) => one.id === $("label-set").value) : null;
  $("threshold").placeholder = set?.threshold ? `${set.threshold}, the set’s` : "any";
  $("top-k").placeholder = set?.top_k ? `${set.top_k}, the set’s` : "all labels";
  if (set) {
    const more = set.labels.length - LABELS_SHOWN;
    $("set-labels").textContent = set.labels.slice(0, LABELS_SHOWN).join(", ") + (more > 0 ? `, and ${more} more` : "");
  }
  showCurl();
}

/** Scores on show are those of another question than the one in the form. */
function showStale(stale) {
  $("results").classList.toggle("stale", stale);
}

for (const kind of ["input", "change"]) {
  $("ask").addEventListener(kind, () => {
    showSource();
    showStale(readQuestionText() !== state.asked);
  });
}
$("labels").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});

// --- the question

/** The request's fields but for the image. */
function readQuestion() {
  const question = usesSet() ? { label_set: $("label-set").value } : { labels: readLabels() };
  if ($("threshold").value !== "") question.threshold = Number($("threshold").value);
  if ($("top-k").value !== "") question.top_k = Number($("top-k").value);
  if ($("softmax").checked) question.activation = "softmax";
  return question;
}

/** What tells one question from another, the image included. */
const readQuestionText = () => JSON.stringify([state.image?.url, readQuestion()]);

/** The first field that must be filled before asking makes sense: the element, and words. */
function findMissing() {
  if (!state.image) return [$("file"), "Choose an image first, or try the sample."];
  if (!usesSet() && !readLabels().length) return [$("labels"), "Type at least one label: what might the image show?"];
  if (!$("threshold").validity.valid) return [$("threshold"), "The lowest score is a number from 0 to 1."];
  if (!$("top-k").validity.valid) return [$("top-k"), "“At most” is a whole number from 1 up."];
  return null;
}

async function classify() {
  const missing = findMissing();
  for (const id of ["file", "labels", "threshold", "top-k"]) $(id).removeAttribute("aria-invalid");
  if (missing) {
    const [field, words] = missing;
    field.closest("details")?.setAttribute("open", "");
    field.setAttribute("aria-invalid", "true");
    showError(words);
    field.focus();
    return;
  }
  const run = ++state.run; // an answer that comes after a newer question is of no interest
  setBusy(true);
  showError("");
  try {
    if (!state.model && !(await readServer())) return;
    const image = state.image;
    const question = readQuestion();
    const asked = readQuestionText();
    const started = performance.now();
    const { answer, headers } = await call("v1/classify", { images: [image.uri], ...question });
    const elapsed = performance.now() - started;
    if (run !== state.run) return;
    state.asked = asked;
    showStale(readQuestionText() !== asked);
    showScores(answer.data[0].labels, question, image);
    showTiming(elapsed, headers.get("Server-Timing"));
    // On a phone the scores are below the form, out of sight.
    if ($("results").getBoundingClientRect().top > 0.7 * innerHeight) $("results").scrollIntoView({ behavior: SCROLL });
    const embedded = await call("v1/embeddings", {
      model: state.model.id,
      input: [{ image: image.uri }],
      encoding_format: "float",
    });
    if (run === state.run) showVector(embedded.answer.data[0].embedding);
  } catch (error) {
    if (run !== state.run) return;
    if (error.status === 401) askForKey(classify, error);
    else if (error instanceof Refused) showError(error.message);
    else throw error;
  } finally {
    if (run === state.run) setBusy(false);
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});

// --- what is shown

function setBusy(busy) {
  $("go").setAttribute("aria-disabled", String(busy));
  $("go").textContent = busy ? "Looking…" : "Score the labels";
  $("results").classList.toggle("busy", busy);
}

function showError(words) {
  $("error").textContent = words;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const formatScore = (score) => (score > 0 && score < 0.001 ? "under 0.001" : score.toFixed(3));

function showScores(labels, question, image) {
  $("waiting").hidden = true;
  $("scores").replaceChildren(
    ...labels.map(({ label, score }) => {
      const row = make("li", "score");
      const meter = make("div", "meter");
      const bar = make("span", "");
      meter.setAttribute("role", "meter");
      meter.setAttribute("aria-label", label);
      meter.setAttribute("aria-valuemin", "0");
      meter.setAttribute("aria-valuemax", "1");
      meter.setAttribute("aria-valuenow", score);
      meter.setAttribute("aria-valuetext", formatScore(score));
      meter.append(bar);
      row.append(make("span", "score-label", label), make("span", "score-number", formatScore(score)), meter);
      requestAnimationFrame(() => requestAnimationFrame(() => (bar.style.width = `${100 * score}%`)));
      return row;
    }),
  );
  const note = labels.length
    ? question.activation === "softmax"
      ? "The scores add up to 1 over all labels that were asked."
      : "Each score stands alone. They run low: 0.1 to 0.5 is usual for a right label."
    : "No label reached the lowest score that was asked for.";
  $("scores-note").textContent = note;
  $("scores-note").hidden = false;
  $("status").textContent = labels.length
    ? `${image.name}: ${labels.slice(0, 3).map(({ label, score }) => `${label} ${formatScore(score)}`).join(", ")}`
    : note;
}

/** The round trip as this page saw it, and the server's own account of its part. */
function showTiming(elapsed, serverTiming) {
  const stages = [...(serverTiming ?? "").matchAll(/(\w+);dur=([\d.]+)/g)]
    .filter(([, stage, ms]) => stage !== "total" && ms >= 0.05)
    .map(([, stage, ms]) => `${stage} ${Number(ms).toFixed(1)}\u00a0ms`);
  $("timing").textContent = `${Math.round(elapsed)} ms`;
  $("stages").textContent = stages.length ? `Time on the server: ${stages.join(", ")}.` : "";
}

function showVector(vector) {
  state.vector = vector;
  const first = vector.slice(0, NUMBERS_SHOWN).map((number) => number.toFixed(4));
  $("numbers").textContent = `[${first.join(", ")}, … ${vector.length} in all]`;
  $("embedding").hidden = false;
}

const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** The shell command that asks the same, with the image as a file beside it. */
function showCurl() {
  const question = readQuestion();
  if (question.labels && !question.labels.length) question.labels = SAMPLE_LABELS.slice(0, 2); // an example for now
  const fields = Object.entries(question).flatMap(([name, value]) => [value].flat().map((one) => [name, one]));
  // curl's own quoting inside -F: a ; or , in a file's name would end it.
  const file = `"${(state.image?.name ?? "image.jpg").replace(/[\\"]/g, "\\$&")}"`;
  const parts = [`curl ${quote(new URL("v1/classify", document.baseURI).href)}`];
  if (state.key) parts.push('-H "Authorization: Bearer $SIGHTLINE_API_KEY"');
  parts.push(`-F ${quote(`image=@${/[;,\s"\\]/.test(file.slice(1, -1)) ? file : file.slice(1, -1)}`)}`);
  // Unlike -F, --form-string does not read a value that starts with @ or < as a file's name.
  parts.push(...fields.map(([name, value]) => `--form-string ${quote(`${name}=${value}`)}`));
  $("curl").textContent = parts.join(" \\\n  ");
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers have no clipboard API on pages that came over plain HTTP from another machine.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("the browser refused");
  }
}

for (const button of document.querySelectorAll("[data-copy]")) {
  const words = button.textContent;
  button.addEventListener("click", async () => {
    try {
      await copyText(button.dataset.copy === "vector" ? JSON.stringify(state.vector) : $("curl").textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select it by hand";
    }
    button.focus();
    $("status").textContent = button.textContent;
    setTimeout(() => (button.textContent = words), 2000);
  });
}

showSource();
readServer();
