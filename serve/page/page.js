// The page: a picture and a model are chosen, the endpoint is asked, its answer or its refusal is shown.
// `endpoint.js` speaks HTTP, `answer.js` draws, `upright.js` turns pictures; this file holds what was chosen.

import { clearAnswer, element, lowestShown, showAnswer, showObjects, spoken } from "./answer.js";
import { hasKey, lines, models, predict, Problem, useKey } from "./endpoint.js";
import { upright } from "./upright.js";

const byId = (id) => document.getElementById(id);
const NO_FILE = "photo.jpg"; // in the lines to copy
const COPIED_MS = 2000;
const SMALL = 200; // pixels; a narrower picture is enlarged without blur

const chosen = { served: [], file: null, shown: null, answer: null, asking: null };

function model() {
  const name = byId("model").value;
  return chosen.served.find((one) => one.name === name && one.version === byId("version").value);
}

// Models

async function loadModels() {
  await attempt("Asking what is served …", loadModels, async (signal) => {
    await renewModels(signal);
    say("");
    if (chosen.file) queueMicrotask(answerPicture);
  });
}

/** Take the list anew; what is chosen stays so where it is still served. */
async function renewModels(signal) {
  const served = await models(signal);
  if (!served.length) throw new Problem("No model is served here yet.");
  const [name, version] = [byId("model").value, byId("version").value];
  const names = [...new Set(served.map((one) => one.name))];
  chosen.served = served;
  fill(byId("model"), names.map((one) => [one, one]), name);
  fillVersions(byId("model").value === name ? version : undefined);
}

function fillVersions(before) {
  const versions = chosen.served.filter((one) => one.name === byId("model").value);
  const named = versions.map(({ version, alias }) => [version, alias ? `${version} (${alias})` : version]);
  fill(byId("version"), named, before);
  showLines();
}

function fill(select, options, before) {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  if (options.some(([value]) => value === before)) select.value = before;
  select.disabled = false;
}

// The picture

function take(file, count = 1) {
  if (!file) return;
  chosen.file = file;
  const more = count > 1 ? ` (the first of ${count})` : "";
  byId("file-name").textContent = `${file.name || "Pasted picture"}, ${size(file.size)}${more}`;
  byId("file-name").hidden = false;
  byId("file-label").textContent = "Choose another picture";
  chosen.shown = showPicture(file);
  if (chosen.served.length) answerPicture();
}

async function showPicture(file) {
  const picture = byId("picture");
  const url = URL.createObjectURL(await upright(file));
  if (chosen.file !== file) return URL.revokeObjectURL(url);
  URL.revokeObjectURL(picture.src);
  picture.src = url;
  const seen = await picture.decode().then(() => true, () => false);
  if (chosen.file !== file) return undefined;
  byId("shown").hidden = !seen;
  byId("drop").classList.toggle("filled", seen);
  if (!seen) byId("file-name").textContent += ". This browser cannot show it.";
  picture.alt = `The chosen picture, ${picture.naturalWidth} by ${picture.naturalHeight} pixels`;
  picture.classList.toggle("small", picture.naturalWidth < SMALL);
  byId("shown").style.setProperty("--width", picture.naturalWidth);
  byId("shown").style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
  return undefined;
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// The answer

async function answerPicture() {
  const [file, asked] = [chosen.file, model()];
  showLines();
  if (!file || !asked) return;
  await attempt(`Asking ${asked.name} …`, answerPicture, async (signal) => {
    const answer = await predict(asked, file, signal).catch(async (problem) => {
      if (problem.isGone) await renewModels(signal);
      throw problem;
    });
    await chosen.shown; // the boxes are drawn on it
    if (signal.aborted) return;
    chosen.answer = answer;
    showAnswer(answer);
    say(spoken(answer), { heard: true });
  });
}

/** Do what asks the endpoint; whatever was asked before is given up, and a refusal is shown. */
async function attempt(sentence, again, ask) {
  chosen.asking?.abort();
  const asking = new AbortController();
  chosen.asking = asking;
  chosen.answer = null;
  clearAnswer();
  showProblem(null);
  say(sentence);
  byId("empty").hidden = true;
  try {
    await ask(asking.signal);
  } catch (error) {
    if (asking.signal.aborted) return;
    say("");
    showProblem(error instanceof Problem ? error : new Problem(`The page failed: ${error.message}`), again);
  }
  if (chosen.asking === asking) byId("empty").hidden = Boolean(chosen.answer) || byId("problem").hasChildNodes();
}

function say(sentence, { heard = false } = {}) {
  byId("status").textContent = sentence;
  byId("status").classList.toggle("unseen", heard);
}

function showProblem(problem, again) {
  const rejected = problem?.status === 401;
  byId("problem").replaceChildren(...(problem ? [element("p", {}, problem.message), ...details(problem)] : []));
  byId("again").hidden = !problem?.mayPass && !problem?.isGone;
  byId("again").onclick = again;
  byId("key-form").hidden = !rejected;
  if (!rejected) return;
  byId("key").setAttribute("aria-invalid", String(hasKey()));
  byId("key").focus();
}

function details({ status, code, requestId, retryS, isGone }) {
  const when = `The endpoint asks to wait ${retryS} ${retryS === 1 ? "second" : "seconds"} before the next try.`;
  const facts = [status ? `HTTP ${status}` : "", code, requestId ? "request " : ""].filter(Boolean).join(" · ");
  return [
    ...(isGone ? [element("p", {}, "The list of models has been renewed; try again.")] : []),
    ...(retryS === null ? [] : [element("p", {}, when)]),
    ...(facts ? [element("p", { class: "note" }, facts, ...(requestId ? [element("code", {}, requestId)] : []))] : []),
  ];
}

// The lines to copy

function showLines() {
  const asked = model();
  byId("code").hidden = !asked;
  if (!asked) return;
  const written = lines(asked, chosen.file?.name ?? NO_FILE, lowestShown());
  byId("curl").textContent = written.curl;
  byId("python").textContent = written.python;
}

async function copy(button) {
  const line = byId(button.dataset.copies);
  try {
    await navigator.clipboard.writeText(line.textContent);
    say("Copied.", { heard: true });
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(line); // without https a browser leaves the clipboard to the keyboard
    say("Selected; copy it with the keyboard.", { heard: true });
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), COPIED_MS);
}

// What people do

byId("file").addEventListener("change", ({ target }) => {
  take(target.files[0]);
  target.value = ""; // so that the same file may be chosen again
});
byId("model").addEventListener("change", () => {
  fillVersions();
  answerPicture();
});
byId("version").addEventListener("change", answerPicture);
byId("score").addEventListener("input", () => {
  if (chosen.answer) showObjects(chosen.answer.predictions);
  showLines();
});
byId("key").addEventListener("input", ({ target }) => {
  const plain = /^[\x21-\x7e]*$/.test(target.value.trim());
  target.setCustomValidity(plain ? "" : "A key has letters, digits and signs, and no spaces.");
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  byId("file").focus(); // the field goes away
  if (chosen.served.length) answerPicture();
  else loadModels();
});
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));

let inside = 0; // how deep a dragged file is in the page's elements
function dragged(event, step) {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  inside = step === 0 ? inside : Math.max(0, inside + step);
  byId("drop").classList.toggle("over", inside > 0);
}
addEventListener("dragenter", (event) => dragged(event, 1));
addEventListener("dragover", (event) => dragged(event, 0));
addEventListener("dragleave", (event) => dragged(event, -1));
addEventListener("drop", (event) => {
  dragged(event, -Infinity);
  take(event.dataTransfer?.files[0], event.dataTransfer?.files.length);
});
addEventListener("paste", ({ clipboardData }) => take(clipboardData?.files[0], clipboardData?.files.length));

loadModels();
