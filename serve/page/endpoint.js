// The endpoint over HTTP: which models there are, what one says of a picture, and why it does not.
// Addresses are relative to the page, so that it also stands behind a path of a proxy. Nothing here touches the document.

const LONGEST_TEXT = 200; // of what is no JSON: refusals in front of the application
const LARGE_BYTES = 4 * 2 ** 20;
const LOWEST_SCORE = 0.05; // of a detector; the slider begins there

let key = "";

/** Why there is no answer: a sentence, and what helps to find it in the log or to try again. */
export class Problem extends Error {
  constructor(sentence, { status = 0, code = "", requestId = "", retryS = null } = {}) {
    super(sentence);
    Object.assign(this, { status, code, requestId, retryS });
  }

  /** Whether the same request may be answered later. */
  get mayPass() {
    return [0, 408, 429, 500, 502, 503, 504].includes(this.status);
  }

  /** Whether what was asked is no longer served, so that the list it was chosen from is out of date. */
  get isGone() {
    return this.status === 404 && ["unknown_model", "unknown_version"].includes(this.code);
  }
}

/** Send this key from now on; it is kept in memory only. */
export function useKey(text) {
  key = text;
}

/** Whether a key has been given. */
export function hasKey() {
  return key !== "";
}

/** What is served: [{name, version, alias, task, num_classes, engine, run_url}]. */
export async function models(signal) {
  const { models } = await ask("models", { method: "GET", signal });
  return models.flatMap((model) => model.versions);
}

/** What a model says of a picture, and `roundTripMs` beside it. */
export async function predict(model, file, signal) {
  const began = performance.now();
  // A picture as it is, whatever its name makes the browser believe.
  const headers = { "Content-Type": "application/octet-stream" };
  const asked = model.task === "detection" ? { score_threshold: LOWEST_SCORE } : {};
  const answer = await ask(path(model, asked), { method: "POST", body: file, headers, signal }, file.size);
  // An answer names the version alone; what it is for and where it comes from is known from the list.
  return { ...answer, model: { ...model, ...answer.model }, roundTripMs: performance.now() - began };
}

/** The lines that ask a model about a file, for a shell and for Python; no key is written into them. */
export function lines(model, fileName, scoreThreshold) {
  const asked = model.task === "detection" ? { score_threshold: scoreThreshold } : {};
  const url = new URL(path(model, asked), document.baseURI).href;
  const name = /^[\p{L}\p{N}_][\p{L}\p{N}._ ()+-]*$/u.test(fileName) ? fileName : "photo.jpg";
  const header = hasKey() ? '-H "Authorization: Bearer $VENTRAL_KEY" ' : "";
  const imports = hasKey() ? "import os, requests" : "import requests";
  const headers = hasKey() ? 'headers={"Authorization": "Bearer " + os.environ["VENTRAL_KEY"]}, ' : "";
  const read = `data=open(${JSON.stringify(name)}, "rb")`;
  return {
    curl: `curl ${header}--data-binary ${quoted("@" + name)} ${quoted(url)}`,
    python: `${imports}; print(requests.post(${JSON.stringify(url)}, ${read}, ${headers}timeout=60).json())`,
  };
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function path(model, asked) {
  const query = new URLSearchParams(asked).toString();
  const [name, version] = [model.name, model.version].map(encodeURIComponent);
  return `predict/${name}/versions/${version}${query && "?"}${query}`;
}

async function ask(address, options, sentBytes = 0) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  try {
    const response = await fetch(address, { ...options, headers, cache: "no-store" });
    const text = await response.text();
    return response.ok ? JSON.parse(text) : refuse(response, text);
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw new Problem("The answer is not one of Ventral's: it is no JSON.");
    const size = `${(sentBytes / 1e6).toFixed(1)} MB`;
    const large = `The connection broke while ${size} were sent; the endpoint may not take so much.`;
    const away = "The endpoint does not answer. The server may be down, or the network.";
    throw new Problem(sentBytes > LARGE_BYTES ? large : away, { code: "network" });
  }
}

function refuse(response, text) {
  const said = objectOf(text);
  const plain = text.trim().slice(0, LONGEST_TEXT) || response.statusText || "no reason was given";
  throw new Problem(typeof said.error === "string" ? said.error : `The server refused: ${plain}`, {
    status: response.status,
    code: String(said.code ?? ""),
    requestId: String(said.request_id ?? response.headers.get("x-request-id") ?? ""),
    retryS: secondsOf(response.headers.get("retry-after")),
  });
}

function objectOf(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {};
  }
}

/** Seconds of a Retry-After header, which may be a date; null without. */
function secondsOf(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}
