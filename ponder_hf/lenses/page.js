"use strict";

const looks = JSON.parse(document.getElementById("data").textContent).looks;
const byId = (id) => document.getElementById(id);

// What a measure is called, how a value is written, and how far it is from 0 (no colour) to 1 (full colour).
const largest = (name) => Math.max(1e-9, ...looks.flatMap((look) => look[name].flat().filter((value) => value !== null)));
const most = { entropy: largest("entropy"), divergence: largest("divergence"), share: largest("share") };
const MEASURES = {
  probability: {
    title: "Probability", about: "of the token that came next", write: (value) => percent(value),
    level: (value) => Math.sqrt(value), low: "0 %", high: "100 %",
  },
  rank: {
    title: "Rank", about: "of the token that came next, 1 is the most probable one", write: (value) => value.toLocaleString("en"),
    level: (value) => Math.max(0, 1 - Math.log10(value) / 4), low: "10,000 and beyond", high: "1",
  },
  entropy: {
    title: "Entropy", about: "of the prediction, in nats", write: (value) => number(value),
    level: (value) => value / most.entropy, low: "0", high: number(most.entropy),
  },
  divergence: {
    title: "Divergence", about: "from the last pass's prediction, KL in nats", write: (value) => number(value),
    level: (value) => Math.sqrt(value / most.divergence), low: "0", high: number(most.divergence),
  },
  share: {
    title: "Share", about: "of pondering in the input of the pass", write: (value) => percent(value),
    level: (value) => value / most.share, low: "0 %", high: percent(most.share),
  },
};
const EXITS = {
  kl: "kl: change by the pass", entropy: "entropy", argmax: "argmax: doubt about one token",
};
const lastPass = Math.max(...looks.map((look) => look.entropy.length - 1));
const state = { measure: "probability", look: 0, token: 0, pass: lastPass, exit: "" };

function number(value) {
  return value === 0 ? "0" : value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value >= 0.01 ? value.toFixed(2) : value.toExponential(0);
}
function percent(value) {
  const share = 100 * value;
  return value === 0 ? "0 %" : share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "<0.1 %";
}
function make(tag, settings = {}, ...children) {
  const { data, ...others } = settings;
  const element = Object.assign(document.createElement(tag), others);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}
// White space that can be seen.
const SHOWN = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
const shown = (text) => (text.trim() === "" ? [...text].map((each) => SHOWN[each] ?? each).join("") : text.replace(/[\n\t\r]/g, (each) => SHOWN[each]));
const string = (look, id) => look.strings[id];
const token = (look, place) => string(look, look.tokens[place]);
const predicted = (look, pass, place) => look.top[pass][place][0];
const isRight = (look, pass, place) => place + 1 < look.tokens.length && predicted(look, pass, place) === look.tokens[place + 1];
const passOf = (look) => Math.min(state.pass, look.entropy.length - 1);

function tint(element, name, value) {
  element.classList.toggle("tinted", value !== null);
  element.style.setProperty("--level", value === null ? 0 : Math.min(1, MEASURES[name].level(value)).toFixed(3));
}

// Where a token would stop, or -1 where no exit is chosen.
function stopOf(look, place) {
  if (!state.exit) return -1;
  const threshold = Number(byId("threshold").value);
  const distances = look.distances[state.exit];
  const pass = distances.findIndex((row) => row[place] !== null && row[place] < threshold);
  return pass < 0 ? distances.length - 1 : pass;
}

// The parts of the page that are made once.

function makeControls() {
  for (const [name, { title, about }] of Object.entries(MEASURES)) {
    const input = make("input", { type: "radio", name: "measure", value: name, checked: name === state.measure });
    input.addEventListener("change", () => { state.measure = name; colour(); });
    byId("measures").append(make("label", { className: "pill", title: about }, input, make("span", {}, title)));
  }
  Object.assign(byId("pass"), { max: lastPass, value: state.pass });
  byId("pass").addEventListener("input", (event) => { state.pass = Number(event.target.value); choose(); });
  byId("exit").append(make("option", { value: "" }, "none"), ...Object.entries(EXITS).map(([value, title]) => make("option", { value }, title)));
  byId("exit").addEventListener("change", (event) => {
    state.exit = event.target.value;
    if (state.exit) byId("threshold").value = looks[0].thresholds[state.exit];
    showExits();
  });
  byId("threshold").addEventListener("input", showExits);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
  });
  byId("fold").addEventListener("click", () => fold(!byId("detail").classList.contains("folded")));
}

// Fold the panel, which lies over the table on narrow screens only.
function fold(isFolded) {
  byId("detail").classList.toggle("folded", isFolded);
  byId("fold").textContent = isFolded ? "Unfold" : "Fold";
  byId("fold").setAttribute("aria-expanded", String(!isFolded));
}

function summary(look, pass) {
  const found = look.probability[pass].filter((value) => value !== null);
  if (!found.length) return "";
  const loss = found.reduce((sum, value) => sum - Math.log(Math.max(value, 1e-300)), 0) / found.length;
  return `${loss.toFixed(2)} nats`;
}

function makeLook(look, index) {
  const count = look.tokens.length, passes = look.entropy.length;
  const facts = [`${count} tokens`, `${passes} ${passes === 1 ? "pass" : "passes"}`];
  if (look.prompt < count) facts.push(`the last ${count - look.prompt} written by the model`);
  if (look.intervention) facts.push(`changed: ${look.intervention}`);
  if (passes - 1 > look.trained) facts.push(`trained with ${look.trained + 1} passes, those beyond were never trained`);
  const text = make("div", { className: "text", ariaHidden: "true" });
  const body = make("tbody");
  for (let place = 0; place < count; place += 1) {
    const written = place >= look.prompt ? "written" : "";
    text.append(make("span", { className: written, data: { look: index, token: place } }, token(look, place)));
    const row = make("tr", { className: written });
    const head = make("th", { scope: "row", title: token(look, place) }, shown(token(look, place)));
    head.setAttribute("role", "rowheader");
    row.append(head);
    for (let pass = 0; pass < passes; pass += 1) {
      const cell = make("td", { tabIndex: -1, data: { look: index, token: place, pass } });
      cell.setAttribute("role", "gridcell");
      cell.append(make("b", {}, shown(string(look, predicted(look, pass, place)))), make("small"));
      cell.classList.toggle("right", isRight(look, pass, place));
      row.append(cell);
    }
    const next = make("td", { className: "next" }, place + 1 < count ? shown(token(look, place + 1)) : "");
    next.setAttribute("role", "gridcell");
    row.append(next);
    body.append(row);
  }
  const header = make("tr", {}, make("th", { scope: "col" }, "token"));
  for (let pass = 0; pass < passes; pass += 1) {
    const note = pass > look.trained ? "untrained" : summary(look, pass);
    header.append(make("th", { scope: "col", data: { pass } }, `pass ${pass}`, make("small", { title: "mean loss" }, note)));
  }
  header.append(make("th", { scope: "col", className: "next" }, "came"));
  const table = make("table", { className: "grid" }, make("thead", {}, header), body);
  table.setAttribute("role", "grid");
  table.setAttribute("aria-label", `${look.name}: tokens by passes`);
  const section = make("section", { className: "look", data: { look: index } });
  section.append(make("h2", {}, look.name), make("p", { className: "soft" }, facts.join(", ")), text, make("div", { className: "scroll" }, table));
  byId("looks").append(section);
}

// What changes.

const cells = (look) => document.querySelectorAll(`td[data-look="${look}"]`);
const cellAt = (look, place, pass) => document.querySelector(`td[data-look="${look}"][data-token="${place}"][data-pass="${pass}"]`);

function describe(look, pass, place) {
  const [id, share] = look.top[pass][place];
  const parts = [`${token(look, place)}, pass ${pass}: predicts ${string(look, id)}, ${percent(share)}`];
  if (place + 1 < look.tokens.length) {
    parts.push(isRight(look, pass, place) ? "which came" : `${token(look, place + 1)} came, rank ${look.rank[pass][place]}`);
  }
  const value = look[state.measure][pass][place];
  if (value !== null) parts.push(`${MEASURES[state.measure].title.toLowerCase()} ${MEASURES[state.measure].write(value)}`);
  return parts.join("; ");
}

function colour() {
  const measure = MEASURES[state.measure];
  looks.forEach((look, index) => {
    for (const cell of cells(index)) {
      const pass = Number(cell.dataset.pass), place = Number(cell.dataset.token);
      const value = look[state.measure][pass][place];
      tint(cell, state.measure, value);
      cell.lastElementChild.textContent = value === null ? "" : measure.write(value);
      cell.setAttribute("aria-label", describe(look, pass, place));
    }
  });
  colourText();
  byId("key-name").textContent = `${measure.title} ${measure.about}:`;
  byId("key-low").textContent = measure.low;
  byId("key-high").textContent = measure.high;
}

function colourText() {
  for (const span of document.querySelectorAll(".text span")) {
    const look = looks[span.dataset.look];
    tint(span, state.measure, look[state.measure][passOf(look)][span.dataset.token]);
  }
}

function showExits() {
  byId("below").hidden = !state.exit;
  const notes = looks.map((look, index) => {
    let used = 0;
    const stops = look.tokens.map((_, place) => stopOf(look, place));
    for (const cell of cells(index)) {
      const pass = Number(cell.dataset.pass), stop = stops[cell.dataset.token];
      cell.classList.toggle("stop", pass === stop);
      cell.classList.toggle("spared", stop >= 0 && pass > stop);
    }
    for (const stop of stops) used += stop + 1;
    return `${(used / look.tokens.length).toFixed(2)} of ${look.entropy.length} passes a token`;
  });
  byId("saved").textContent = state.exit ? notes.join(" | ") : "";
  byId("status").textContent = byId("saved").textContent;
}

// The state's cell, or the one that is pointed at, in the panel.
function showDetail(at) {
  const { look: index, token: place, pass } = at;
  const detail = byId("detail");
  const chosen = looks[index];
  // The other model's view of the same token, where both have read the same up to there.
  const other = looks.findIndex((look, each) => each !== index && isSameUpTo(look, chosen, place));
  const start = Math.max(0, place - 12);
  const before = chosen.tokens.slice(start, place).map((id) => string(chosen, id)).join("");
  const context = make("p", { className: "context" }, `${start ? "…" : ""}${before}`, make("mark", {}, token(chosen, place)));
  detail.replaceChildren(byId("fold"), make("h3", {}, `After token ${place}, pass ${Math.min(pass, chosen.entropy.length - 1)}`), context);
  const order = other < 0 ? [index] : [index, other].sort();
  for (const each of order) detail.append(...detailOf(looks[each], place, Math.min(pass, looks[each].entropy.length - 1), order.length > 1));
}

function isSameUpTo(look, another, place) {
  for (let each = 0; each <= place; each += 1) {
    if (each >= look.tokens.length || token(look, each) !== token(another, each)) return false;
  }
  return true;
}

function detailOf(look, place, pass, isNamed) {
  const came = place + 1 < look.tokens.length ? look.tokens[place + 1] : null;
  const list = make("ol", { className: "bars" });
  const top = look.top[pass][place];
  let isListed = false;
  const bar = (id, share, label) => {
    const item = make("li", {}, make("span", { title: string(look, id) }, label + shown(string(look, id))), make("i"), make("em", {}, percent(share)));
    item.children[1].style.width = `${(100 * share).toFixed(2)}%`;
    if (id === came) { item.className = "came"; item.append(make("span", { className: "hidden" }, "this one came")); isListed = true; }
    list.append(item);
  };
  for (let index = 0; index < top.length; index += 2) bar(top[index], top[index + 1], "");
  if (came !== null && !isListed) bar(came, look.probability[pass][place], `${look.rank[pass][place]}. `);
  const table = make("table", { className: "numbers", ariaLabel: "This token in every pass" }), head = make("tr", {}, make("th", {}, "pass"));
  for (let each = 0; each < look.entropy.length; each += 1) head.append(make("th", { scope: "col", className: each === pass ? "current" : "" }, String(each)));
  table.append(head);
  const rows = Object.entries(MEASURES).map(([name, { title, write }]) => [title, look[name], write]);
  for (const [name, title] of [["kl", "kl exit"], ["argmax", "argmax exit"]]) rows.push([title, look.distances[name], number]);
  for (const [title, values, write] of rows) {
    const row = make("tr", {}, make("th", { scope: "row" }, title));
    values.forEach((each, index) => row.append(make("td", { className: index === pass ? "current" : "" }, each[place] === null ? "–" : write(each[place]))));
    table.append(row);
  }
  const drafts = look.drafts.map((row) => string(look, row[place]));
  const parts = [list, table];
  if (drafts.length) {
    const from = look.from === "heads" ? "trained draft heads" : "the passes themselves";
    const guesses = drafts.map((text, index) => `${shown(text)}${came !== null && look.drafts[index][place] === came ? " ✓" : ""}`);
    parts.push(make("p", { className: "soft" }, `Drafted by ${from}, from pass 0 on: ${guesses.join(" · ")}`));
  }
  return isNamed ? [make("h4", {}, look.name), ...parts] : parts;
}

// Make the state's cell the chosen one, everywhere.
function choose(focus = false) {
  const look = looks[state.look], pass = passOf(look);
  for (const old of document.querySelectorAll(".chosen, .current")) old.classList.remove("chosen", "current");
  for (const old of document.querySelectorAll('td[tabindex="0"]')) old.tabIndex = -1;
  looks.forEach((each, index) => {
    const cell = cellAt(index, Math.min(state.token, each.tokens.length - 1), passOf(each));
    cell.tabIndex = 0;
    if (index === state.look) cell.classList.add("chosen");
  });
  for (const head of document.querySelectorAll(`thead th[data-pass="${pass}"]`)) head.classList.add("current");
  document.querySelector(`.text span[data-look="${state.look}"][data-token="${state.token}"]`).classList.add("chosen");
  byId("pass").value = state.pass;
  byId("pass").setAttribute("aria-valuetext", `pass ${state.pass} of ${lastPass}`);
  byId("pass-shown").textContent = `${state.pass} of ${lastPass}`;
  colourText();
  showDetail({ look: state.look, token: state.token, pass: state.pass });
  if (focus) cellAt(state.look, state.token, pass).focus();
}

function go(look, place, pass, focus) {
  Object.assign(state, { look, token: place, pass });
  choose(focus);
}

const placeOf = (element) => ({ look: Number(element.dataset.look), token: Number(element.dataset.token), pass: Number(element.dataset.pass ?? passOf(looks[element.dataset.look])) });

function listen() {
  const area = byId("looks"), target = "td[data-pass], .text span, thead th[data-pass]";
  area.addEventListener("click", (event) => {
    const element = event.target.closest(target);
    if (!element) return;
    if (element.tagName === "TH") { state.pass = Number(element.dataset.pass); choose(); return; }
    const { look, token: place, pass } = placeOf(element);
    go(look, place, pass, element.tagName === "TD");
    fold(false);
  });
  area.addEventListener("pointerover", (event) => {
    const element = event.target.closest("td[data-pass], .text span");
    if (element && event.pointerType !== "touch") showDetail(placeOf(element));
  });
  area.addEventListener("pointerleave", () => showDetail(state));
  area.addEventListener("focusin", (event) => {
    const element = event.target.closest("td[data-pass]");
    if (!element) return;
    const { look, token: place, pass } = placeOf(element);
    if (look !== state.look || place !== state.token || pass !== passOf(looks[look])) go(look, place, pass, false);
  });
  area.addEventListener("keydown", (event) => {
    const element = event.target.closest("td[data-pass]");
    if (!element || event.altKey || event.metaKey) return;
    let { look, token: place, pass } = placeOf(element);
    const rows = looks[look].tokens.length - 1, columns = looks[look].entropy.length - 1;
    const moves = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0],
      Home: [event.ctrlKey ? -rows : 0, -columns], End: [event.ctrlKey ? rows : 0, columns],
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    place = Math.min(rows, Math.max(0, place + moves[event.key][0]));
    pass = Math.min(columns, Math.max(0, pass + moves[event.key][1]));
    go(look, place, pass, true);
  });
}

makeControls();
looks.forEach(makeLook);
colour();
showExits();
choose();
fold(true);
listen();
