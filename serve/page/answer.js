// An answer as a person sees it: rows with bars, boxes on the picture, where the time went.
// What a server or a file is called is only ever set as text.

const HUES = 8; // as in page.css
const MANY = 25; // boxes; beyond, only the marked one has its tag
const TAG_REM = 1.3; // the height of a tag
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

/** A new element with attributes and children; strings become text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Show all of an answer; what was marked before is forgotten. */
export function showAnswer(answer) {
  const { model, predictions } = answer;
  byId("result").hidden = false;
  byId("result-model").replaceChildren(...origin(model), element("br"), "Request ", element("code", {}, answer.request_id));
  const detects = model.task === "detection";
  byId("filter").hidden = !detects;
  byId("labels").classList.toggle("found", detects);
  if (detects) showObjects(predictions);
  else showClasses(predictions);
  showTime(answer);
}

/** Take the answer away, boxes included. */
export function clearAnswer() {
  byId("result").hidden = true;
  byId("boxes").replaceChildren();
  byId("tags").replaceChildren();
}

/** The objects that score at least what the slider says; the answer holds more. */
export function showObjects(predictions) {
  const least = lowestShown();
  const shown = predictions.filter((one) => one.score >= least);
  const count = `${shown.length} of ${predictions.length} ${predictions.length === 1 ? "object" : "objects"}`;
  byId("score-value").textContent = least.toFixed(2);
  byId("score").setAttribute("aria-valuetext", `${least.toFixed(2)}, ${count}`);
  byId("score-note").textContent = shown.length || !predictions.length ? count : `${count}; move the slider to see more`;
  byId("result-title").textContent = shown.length ? `${shown.length} ${shown.length === 1 ? "object" : "objects"}` : "No object";
  byId("labels-caption").textContent = "Objects, best first; a row marks its box on the picture";
  byId("rows").replaceChildren(...shown.map(objectRow));
  drawBoxes(shown);
}

/** What the slider says, in [0, 1]. */
export function lowestShown() {
  return byId("score").valueAsNumber / 100;
}

/** The answer in one sentence, for who hears it. */
export function spoken({ model, predictions, roundTripMs }) {
  const said = predictions.slice(0, 3).map((one) => `${one.class_name} ${one.score.toFixed(2)}`).join(", ");
  const found = predictions.filter((one) => one.score >= lowestShown()).length;
  const what = model.task === "detection" ? `${found} objects found` : said;
  return `${model.name} version ${model.version}: ${what}. Answered in ${milliseconds(roundTripMs)}.`;
}

function origin({ name, version, alias, run_url: url }) {
  const what = `${name}, version ${version}${alias ? ` (${alias})` : ""}`;
  if (!["http://", "https://"].some((start) => url?.startsWith(start))) return [what];
  const attributes = { href: url, target: "_blank", rel: "noopener noreferrer" };
  return [what, " · ", element("a", attributes, "MLflow run", element("span", { class: "unseen" }, " (opens in a new tab)"))];
}

function showClasses(predictions) {
  byId("result-title").textContent = predictions[0]?.class_name ?? "No class";
  byId("labels-caption").textContent = "Classes, best first";
  byId("rows").replaceChildren(...predictions.map((one) => row(one, [one.class_name])));
}

function objectRow(one, index) {
  const [left, top, right, bottom] = one.box.map((value) => value.toFixed(0));
  const button = element("button", { type: "button", "aria-pressed": "false" }, one.class_name);
  const where = element("span", { class: "where" }, element("span", {}, `x ${left}–${right}`), element("span", {}, `y ${top}–${bottom}`));
  const swatch = element("span", { class: `swatch hue-${one.label % HUES}` });
  const made = row(one, [element("span", { class: "named" }, swatch, element("span", {}, button, where))]);
  button.addEventListener("click", () => pin(button));
  made.addEventListener("mouseenter", () => mark(index));
  made.addEventListener("mouseleave", () => mark(pinned()));
  button.addEventListener("focus", () => mark(index));
  button.addEventListener("blur", () => mark(pinned()));
  return made;
}

function row(one, named) {
  const fill = element("span", { class: "fill" });
  fill.style.width = `${100 * Math.min(1, Math.max(0, one.score))}%`;
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, ...named),
    element("td", { class: "bar", "aria-hidden": "true" }, element("span", { class: "track" }, fill)),
    element("td", { class: "score" }, one.score < 0.0005 ? "<0.001" : one.score.toFixed(3)),
  );
}

/** Keep a row's box marked, or no longer. */
function pin(button) {
  const was = button.getAttribute("aria-pressed") === "true";
  for (const other of byId("rows").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", String(!was));
}

function pinned() {
  return [...byId("rows").querySelectorAll("button")].findIndex((one) => one.getAttribute("aria-pressed") === "true");
}

function mark(index) {
  const marked = index >= 0;
  for (const layer of [byId("boxes"), byId("tags"), byId("rows")]) {
    layer.classList.toggle("marking", marked);
    [...layer.children].forEach((child, at) => child.classList.toggle("on", at === index));
  }
}

function drawBoxes(shown) {
  const { naturalWidth: width, naturalHeight: height } = byId("picture");
  const [boxes, tags] = [byId("boxes"), byId("tags")];
  boxes.setAttribute("viewBox", `0 0 ${width || 1} ${height || 1}`);
  boxes.replaceChildren(...shown.map(drawnBox));
  tags.replaceChildren(...shown.map((one, index) => tag(one, width, height, shown.length - index)));
  tags.classList.toggle("many", shown.length > MANY);
  mark(-1);
}

/** In pixels of the upright picture, as the overlay's viewBox; a dark line under the coloured one keeps it legible. */
function drawnBox(one) {
  const [left, top, right, bottom] = one.box;
  const group = document.createElementNS(SVG, "g");
  for (const kind of ["halo", `hue-${one.label % HUES}`]) {
    const rect = document.createElementNS(SVG, "rect");
    const attributes = { class: kind, x: left, y: top, width: right - left, height: bottom - top };
    for (const [key, value] of Object.entries(attributes)) rect.setAttribute(key, value);
    group.append(rect);
  }
  return group;
}

/** Above its box, but within the picture; it hangs on the side with more room. The best lie on top. */
function tag(one, width, height, depth) {
  const [left, top, right] = one.box;
  const made = element("span", { class: `tag hue-${one.label % HUES}` }, `${one.class_name} ${one.score.toFixed(2)}`);
  made.style.zIndex = depth;
  made.style.top = `max(${(100 * top) / height}%, ${TAG_REM}rem)`;
  if (left + right < width) made.style.left = `${(100 * left) / width}%`;
  else made.style.right = `${100 - (100 * right) / width}%`;
  return made;
}

function showTime({ timing_ms: timing, roundTripMs }) {
  const rest = Math.max(0, roundTripMs - timing.decode - timing.queue - timing.infer);
  const parts = { Decode: timing.decode, Queue: timing.queue, Inference: timing.infer, "Network and the rest": rest };
  const bar = Object.values(parts).map((value, at) => {
    const part = element("span", { class: `time-${at}` });
    part.style.flexGrow = value;
    return part;
  });
  byId("time-bar").replaceChildren(...bar);
  const rows = Object.entries({ ...parts, "Round trip": roundTripMs }).map(([name, value], at) =>
    element("div", {}, element("dt", {}, element("span", { class: `swatch time-${at}` }), name), element("dd", {}, milliseconds(value))),
  );
  byId("times").replaceChildren(...rows);
}

function milliseconds(value) {
  return `${value.toFixed(value < 100 ? 1 : 0)} ms`;
}
