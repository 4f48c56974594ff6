// The viewer's one script: the heat map, its panel, the charts, and small conveniences.
// Text of tokens reaches the page through textContent and attributes alone, never as markup.
// A module without imports or exports: a static sample takes it as a plain script, since browsers load no
// module from a folder.
"use strict";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/** An element of a drawing. */
function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** An address with values in place of {names}. */
const expand = (address, values) => address.replace(/\{(\w+)\}/g, (all, name) => values[name]);

/** A token's text, which moves nothing around it. */
const token = (text) => make("bdi", { className: "tok", textContent: text });

/** An element with attributes, properties (className, textContent, onclick) and children. */
function make(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const say = (text) => { $("#said").textContent = text; };

/** A piece of a static sample: a script, because a page from a folder may fetch nothing. */
const loadPiece = (src) => new Promise((found, failed) => {
  const script = make("script", { src });
  script.onload = () => { script.remove(); found(script.piece); };
  script.onerror = () => { script.remove(); failed(new Error("A file of this static sample is missing.")); };
  document.head.append(script);
});
window.logitstorePiece = (data) => { document.currentScript.piece = data; };

async function fetchJson(address) {
  if (address.endsWith(".js")) return loadPiece(address);
  const answer = await fetch(address, { headers: { Accept: "application/json" } });
  const body = await answer.json().catch(() => ({ title: `HTTP ${answer.status}`, kind: "" }));
  if (!answer.ok) throw new Error(`${body.title} [${body.kind}]`);
  return body;
}

function shown(value, digits) {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
const probability = (value) =>
  value === null ? "–" : value === 0 ? "0" : value >= 0.001 ? value.toFixed(3) : value.toExponential(1);

// ---- theme, copying, keyboard list ---------------------------------------------------------

const root = document.documentElement;
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : darkSystem.matches);
const redraws = [];

function labelTheme() {
  $("#theme").textContent = isDark() ? "Light" : "Dark";
  redraws.forEach((redraw) => redraw());
}

// A reader may forbid both.
function recall(name) { try { return localStorage.getItem(name); } catch { return null; } }
function keep(name, value) { try { localStorage.setItem(name, value); } catch { /* this page only */ } }

/** What a static page cannot know: the reader's choice, from the cookie that pages of a server read;
    pages from a folder have none. */
function recallTheme() {
  const chosen = document.cookie.match(/(?:^|; )logitstore-theme=(light|dark)/)?.[1] ?? recall("logitstore-theme");
  if (["light", "dark"].includes(chosen)) root.dataset.theme = chosen;
}

function switchTheme() {
  root.dataset.theme = isDark() ? "light" : "dark";
  document.cookie = `logitstore-theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=strict`;
  keep("logitstore-theme", root.dataset.theme);
  labelTheme();
}

function startPage() {
  const theme = $("#theme");
  recallTheme();
  theme.hidden = $("#keys-open").hidden = false;
  theme.onclick = switchTheme;
  darkSystem.addEventListener("change", labelTheme);
  labelTheme();
  $("#keys-open").onclick = () => $("#keys").showModal();
  for (const button of $$(".copy")) {
    if (!navigator.clipboard) break;
    button.hidden = false;
    button.onclick = async () => {
      await navigator.clipboard.writeText(button.dataset.copy);
      say("Copied");
      const before = button.textContent;
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = before; }, 1200);
    };
  }
  const single = $("#single-keys");
  single.checked = recall("logitstore-keys") !== "off";
  single.onchange = () => keep("logitstore-keys", single.checked ? "on" : "off");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !single.checked) return;
    if (event.target.closest("input:not([type=radio]), select, textarea, dialog")) return;
    const follow = (rel) => $(`main a[rel=${rel}]`)?.click();
    if (event.key === "?") $("#keys").showModal();
    else if (event.key === "t") switchTheme();
    else if (event.key === "n") follow("next");
    else if (event.key === "p") follow("prev");
    else return;
    event.preventDefault();
  });
}

// ---- a sample: of one store, or of two side by side ------------------------------------------

const BLOCK = 128; // tokens that are put into the page and taken out of it together
const PIECE = 1024; // tokens of one request
const KEPT = 64; // positions of one request for what is kept
const TOP = 16; // ids of a position that are shown at first
const MOST = 1024; // ids of a position that are ever shown
const SIDE_BY_SIDE = 10; // ids of a position of each of two stores

class Sample {
  constructor() {
    // tokens: address of pieces of text; sides: name, signal and address of each store's entries.
    Object.assign(this, JSON.parse($("#sample-data").textContent));
    const asked = new URLSearchParams(location.search);
    if (this.measures.some((measure) => measure.name === asked.get("measure"))) this.measure = asked.get("measure");
    if (/^\d+$/.test(asked.get("position") ?? "")) this.position = Math.min(Number(asked.get("position")), this.positions - 1);
    this.pieces = new Map();
    this.kept = new Map();
    this.panel = $("#panel");
    this.heat = $("#heat");
  }

  scale(name = this.measure) { return this.measures.find((measure) => measure.name === name); }

  piece(position) {
    const from = Math.floor(position / PIECE) * PIECE;
    if (!this.pieces.has(from)) {
      this.pieces.set(from, fetchJson(expand(this.tokens, { from, count: PIECE })));
    }
    return this.pieces.get(from);
  }

  async keptAt(position, side) {
    const from = Math.floor(position / KEPT) * KEPT;
    const address = expand(side.kept, { from, count: KEPT, top: TOP });
    if (!this.kept.has(address)) this.kept.set(address, fetchJson(address));
    return (await this.kept.get(address)).positions[position - from];
  }

  level(value, scale) {
    if (value === null || value === undefined) return -1;
    const sign = scale.rising ? 1 : -1;
    return scale.breaks.filter((limit) => sign * value >= sign * limit).length;
  }

  remember() {
    const query = new URLSearchParams(location.search);
    query.set("measure", this.measure);
    query.set("position", this.position);
    // A page from a folder may not always change its address.
    try { history.replaceState(null, "", `${location.pathname}?${query}`); } catch { /* as it was */ }
  }

  start() {
    if (this.kind !== "sequence") { this.show(0); return; }
    this.drawLegend();
    for (const radio of $$("input[name=measure]")) {
      radio.onchange = () => this.choose(radio.value);
    }
    this.blocks = [];
    const watcher = new IntersectionObserver((changes) => {
      for (const change of changes) {
        if (change.isIntersecting) this.fill(change.target);
        else this.empty(change.target);
      }
    }, { rootMargin: "500px 0px" });
    for (let from = 0; from < this.positions; from += BLOCK) {
      const until = Math.min(from + BLOCK, this.positions) - 1;
      const block = make("div", { className: "block", role: "group", "aria-label": `positions ${from} to ${until}` });
      block.dataset.from = from;
      block.style.minHeight = "15rem";
      this.blocks.push(block);
    }
    this.heat.append(...this.blocks);
    this.blocks.forEach((block) => watcher.observe(block));
    this.heat.addEventListener("pointerover", (event) => this.preview(event));
    this.heat.addEventListener("pointerleave", () => this.show(this.position));
    this.heat.addEventListener("click", (event) => {
      const token = event.target.closest(".tk");
      if (token) this.go(Number(token.dataset.p));
    });
    this.heat.addEventListener("focusin", (event) => {
      const token = event.target.closest(".tk");
      if (token && Number(token.dataset.p) !== this.position) this.take(Number(token.dataset.p));
    });
    this.heat.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("keydown", (event) => this.anywhere(event));
    this.select();
    const linked = new URLSearchParams(location.search).has("position");
    if (linked) this.go(this.position, false);
    else this.show(this.position);
  }

  drawLegend() {
    const scale = this.scale();
    const edges = scale.breaks;
    const parts = edges.map((limit, i) => {
      if (i > 0 && limit === edges[i - 1]) return null;
      const text = i === 0 ? `${scale.rising ? "<" : ">"} ${limit}` : `${edges[i - 1]}`;
      return make("span", { className: `l${i}`, textContent: text });
    }).filter(Boolean);
    parts.push(make("span", { className: `l${edges.length}`, textContent: `${scale.rising ? "≥" : "≤"} ${edges.at(-1)}` }));
    $("#legend").replaceChildren(make("em", { textContent: this.sides.length > 1 ? "agree" : "sure" }), ...parts, make("em", { textContent: `${this.sides.length > 1 ? "disagree" : "unsure"}${scale.unit ? ` · ${scale.unit}` : ""}` }));
  }

  choose(name) {
    this.measure = name;
    this.select();
    this.drawLegend();
    for (const block of this.blocks) if (block.childElementCount) this.colour(block);
    this.remember();
  }

  /** Say which measure is shown. */
  select() {
    const scale = this.scale();
    $("#measure-how").textContent = `${scale.title}, ${scale.source}: ${scale.how}`;
    $(`input[name=measure][value=${this.measure}]`).checked = true;
  }

  async fill(block) {
    block.wanted = true;
    if (block.childElementCount) return;
    const from = Number(block.dataset.from);
    let piece;
    try { piece = await this.piece(from); } catch (error) { this.fail(error); return; }
    if (!block.wanted || block.childElementCount) return;
    const parts = [];
    for (let p = from; p < Math.min(from + BLOCK, this.positions); p += 1) {
      const i = p - piece.from;
      const token = make("span", { role: "option", textContent: piece.text[i], tabIndex: p === this.position ? 0 : -1, "aria-selected": String(p === this.position) });
      token.dataset.p = p;
      token.base = `tk ${piece.kind[i]}${i > 0 && piece.segment.length && piece.segment[i] !== piece.segment[i - 1] ? " cut" : ""}`;
      parts.push(token);
      if (piece.kind[i] === "newline") parts.push(document.createElement("br"));
    }
    block.replaceChildren(...parts);
    block.piece = piece;
    block.style.minHeight = "";
    this.colour(block);
  }

  empty(block) {
    block.wanted = false;
    const from = Number(block.dataset.from);
    // The block that holds the current token stays, so that Tab always finds it.
    if (!block.childElementCount || (this.position >= from && this.position < from + BLOCK)) return;
    block.style.minHeight = `${block.offsetHeight}px`;
    block.replaceChildren();
  }

  colour(block) {
    const scale = this.scale();
    const values = block.piece.measures[scale.name];
    for (const token of $$(".tk, [role=option]", block)) {
      const p = Number(token.dataset.p);
      const value = values ? values[p - block.piece.from] : null;
      const level = this.level(value, scale);
      const mark = p === this.position ? " now" : p === this.position + 1 ? " next" : "";
      token.className = `${token.base} ${level < 0 ? "none" : `l${level}`}${mark}`;
      token.setAttribute("aria-label", `${token.textContent}, position ${p}, ${scale.title} ${shown(value, scale.digits)}`);
    }
  }

  token(position) { return $(`[data-p="${position}"]`, this.heat); }

  /** Make a token the current one; its block must be in the page. */
  take(position) {
    const before = [this.position, this.position + 1];
    this.position = position;
    for (const p of [...before, position, position + 1]) {
      const token = this.token(p);
      if (!token) continue;
      token.classList.toggle("now", p === position);
      token.classList.toggle("next", p === position + 1);
      token.tabIndex = p === position ? 0 : -1;
      token.setAttribute("aria-selected", String(p === position));
    }
    this.remember();
    this.show(position);
  }

  async go(position, focus = true) {
    position = Math.min(Math.max(position, 0), this.positions - 1);
    const block = this.blocks[Math.floor(position / BLOCK)];
    if (!block.childElementCount) {
      block.scrollIntoView({ block: "center" });
      await this.fill(block);
    }
    const token = this.token(position);
    if (!token) return;
    this.take(position);
    if (focus) token.focus({ preventScroll: true });
    token.scrollIntoView({ block: focus ? "nearest" : "center" });
  }

  preview(event) {
    const token = event.target.closest(".tk");
    if (!token) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.show(Number(token.dataset.p)), 40);
  }

  key(event) {
    const moves = { ArrowRight: 1, ArrowLeft: -1 };
    let to = null;
    if (event.key in moves) to = this.position + moves[event.key];
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = this.positions - 1;
    else if (event.key === "PageDown") to = this.position + BLOCK;
    else if (event.key === "PageUp") to = this.position - BLOCK;
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") to = this.line(event.key === "ArrowDown" ? 1 : -1);
    if (to === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.go(to);
  }

  /** The token below or above the current one. */
  line(step) {
    const here = this.token(this.position)?.getClientRects()[0];
    if (!here) return this.position;
    let best = null;
    for (let p = this.position + step; p >= 0 && p < this.positions; p += step) {
      const box = this.token(p)?.getClientRects()[0];
      if (!box) return best ?? p;
      const away = step * (box.top - here.top);
      if (away < here.height / 2) continue;
      if (best !== null && Math.abs(box.top - this.token(best).getClientRects()[0].top) > here.height / 2) break;
      if (best === null || Math.abs(box.left - here.left) < Math.abs(this.token(best).getClientRects()[0].left - here.left)) best = p;
    }
    return best ?? this.position;
  }

  async anywhere(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !$("#single-keys").checked) return;
    if (event.target.closest("input:not([type=radio]), select, textarea, dialog")) return;
    const number = Number(event.key);
    if (number >= 1 && number <= this.measures.length) this.choose(this.measures[number - 1].name);
    else if (event.key === "u" || event.key === "U") await this.unsure(event.key === "u" ? 1 : -1);
    else return;
    event.preventDefault();
  }

  /** Go to the next token of the three strongest colours. */
  async unsure(step) {
    const scale = this.scale();
    for (let p = this.position + step; p >= 0 && p < this.positions; p += step) {
      const piece = await this.piece(p);
      const value = piece.measures[scale.name]?.[p - piece.from];
      if (this.level(value, scale) >= scale.breaks.length - 2) { await this.go(p); return; }
    }
    say("No further unsure token");
  }

  fail(error) {
    this.panel.replaceChildren(make("p", { className: "problem", textContent: error.message }));
  }

  async show(position) {
    this.showing = position;
    try {
      const [piece, ...kept] = await Promise.all([this.piece(position), ...this.sides.map((side) => this.keptAt(position, side))]);
      if (this.showing === position) this.draw(kept, piece);
    } catch (error) { this.fail(error); }
  }

  draw(sides, piece) {
    const kept = sides[0];
    const i = kept.position - piece.from;
    const parts = [];
    if (this.kind === "sequence") {
      parts.push(make("h2", {}, "after ", token(piece.text[i]), make("span", { className: "muted", textContent: `  id ${piece.ids[i]}, position ${shown(kept.position, 0)}` })));
    } else parts.push(make("h2", { textContent: "The teacher's answer" }));
    const label = kept.label;
    if (label) {
      const told = [label.value === null ? null : `p ${probability(label.value)}`, label.rank === null ? null : `rank ${shown(label.rank, 0)}`, label.kept ? null : "not among the stored ids"].filter(Boolean);
      parts.push(make("p", { className: "came" }, this.kind === "sequence" ? "came " : "label ", make("b", {}, token(label.text)), make("span", { className: "muted", textContent: ` id ${label.id}${told.length ? ` · ${told.join(" · ")}` : ""}` })));
    } else if (this.kind === "sequence") {
      parts.push(make("p", { className: "came muted", textContent: "The segment ends here: nothing is predicted." }));
    }
    if (this.kind === "sequence") {
      const rows = this.measures.filter((measure) => piece.measures[measure.name]).map((measure) =>
        make("div", {}, make("dt", { textContent: measure.title }), make("dd", { textContent: shown(piece.measures[measure.name][i], measure.digits) })));
      if (rows.length) parts.push(make("dl", { className: "values" }, ...rows));
    }
    if (sides.length === 1) parts.push(...this.told(kept, this.sides[0], piece));
    else {
      parts.push(make("div", { className: "two" }, ...sides.map((one, n) =>
        make("section", {}, make("h3", {}, `${"AB"[n]} `, make("bdi", { textContent: this.sides[n].name })), ...this.told(one, this.sides[n], piece)))));
    }
    this.panel.replaceChildren(...parts);
    this.panel.dataset.position = kept.position;
    const first = kept.entries.slice(0, 3).map((entry) => `${entry.text} ${probability(entry.value)}`).join(", ");
    if (this.heat?.contains(document.activeElement)) say(first ? `Expected: ${first}` : "");
  }

  /** What one store keeps of a position. */
  told(kept, side, piece) {
    const parts = [];
    const two = this.sides.length > 1;
    const most = two ? SIDE_BY_SIDE : kept.entries.length;
    const few = { ...kept, entries: kept.entries.slice(0, most) };
    if (kept.entries.length) parts.push(this.bars(few, side));
    else parts.push(make("p", { className: "muted", textContent: "This signal keeps no ids of a position." }));
    if (kept.kept > few.entries.length) {
      const count = `Showing ${few.entries.length} of ${shown(kept.kept, 0)} ids`;
      const more = make("button", { type: "button", className: "quiet", textContent: `${count}: show more` });
      more.onclick = async () => {
        const all = await fetchJson(expand(side.kept, { from: kept.position, count: 1, top: MOST }));
        this.draw([all.positions[0]], piece);
        this.panel.focus();
      };
      if (this.live && !two && few.entries.length < MOST) parts.push(more);
      else parts.push(make("p", { className: "muted small", textContent: `${count}.` }));
    }
    if (kept.mass && !two) parts.push(...this.curve(kept.mass));
    if (kept.outside) {
      const where = kept.heads === null ? "outside the stored ids" : "outside the exact head";
      const mass = kept.outside.mass === null ? kept.outside.kind : `${probability(kept.outside.mass)} (${kept.outside.kind})`;
      parts.push(make("p", { className: "outside" }, "Mass ", where, ": ", make("b", { textContent: mass }), two ? "" : ` – ${kept.outside.how}.`));
    }
    if (kept.always?.length && !two) parts.push(make("p", { className: "outside" }, "Always stored: ", ...kept.always.flatMap((one) => [token(one.text), ` ${probability(one.value)}  `])));
    return parts;
  }

  /** Mass of the k most probable ids, over log k, and how many hold 90, 95 and 99 %. */
  curve(mass) {
    const wide = Math.log2(mass.ranked) || 1;
    const points = mass.ks.map((k, i) => `${((100 * Math.log2(k)) / wide).toFixed(2)},${(40 * (1 - mass.mass[i])).toFixed(2)}`);
    const picture = svg("svg", { class: "curve", viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": "Cumulative mass over rank, logarithmic" },
      svg("line", { x1: 0, x2: 100, y1: 4, y2: 4 }),
      svg("polyline", { points: points.length > 1 ? points.join(" ") : `0,${40 * (1 - mass.mass[0])} 100,${40 * (1 - mass.mass[0])}` }));
    const facts = Object.entries(mass.needed).map(([level, k]) =>
      make("div", {}, make("dt", { textContent: `${Math.round(100 * level)} %` }), make("dd", { textContent: k === null ? `> ${shown(mass.ranked, 0)}` : shown(k, 0) })));
    return [make("div", { className: "mass" },
      make("p", { className: "muted small" }, "Cumulative mass of the ranked ids; ids needed for"),
      picture, make("dl", { className: "values" }, ...facts))];
  }

  bars(kept, side) {
    const scores = kept.outside.kind === "undefined";
    const values = kept.entries.map((entry) => entry.value);
    const low = scores ? Math.min(...values, 0) : 0;
    const span = scores ? Math.max(...values) - low || 1 : 1;
    const items = [];
    kept.entries.forEach((entry, slot) => {
      if (kept.heads !== null && slot === kept.heads) {
        items.push(make("li", { className: "sep", textContent: `${kept.kept - kept.heads} drawn ids (${side.signal}): each stands for an equal part of the tail` }));
      }
      const fill = make("div", { className: "fill" });
      fill.style.width = `${Math.max(0, Math.min(1, (entry.value - low) / span)) * 100}%`;
      const facts = [`id ${entry.id}`];
      if (entry.logprob !== null) facts.push(`log-prob ${shown(entry.logprob, 3)}`);
      if (entry.rank !== null) facts.push(`rank ${entry.rank}`);
      if (entry.count !== null) facts.push(`drawn ${entry.count} ×`);
      if (!entry.exact) facts.push(entry.count === null ? "weight, estimated" : "estimated");
      if (entry.label) facts.push(this.kind === "sequence" ? "✓ came next" : "✓ label");
      items.push(make("li", { className: `${entry.label ? "label" : ""} ${entry.exact ? "" : "drawn"}` },
        make("bdi", { className: "tok", textContent: entry.text, title: entry.text }),
        make("span", { textContent: scores ? shown(entry.value, 3) : probability(entry.value) }),
        make("div", { className: "track" }, fill),
        make("span", { className: "more", textContent: facts.join(" · ") })));
    });
    return make("ol", { className: "top-k" }, ...items);
  }
}

// ---- charts of the store page --------------------------------------------------------------

function chart(figure) {
  const plot = $(".plot", figure);
  const data = JSON.parse($(".chart-data", figure).textContent);
  const says = make("p", { className: "plot-says" });
  plot.after(says);
  let drawn = null;
  const draw = () => {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 }, font: "11px system-ui, sans-serif", size: 36 };
    const bars = { fill: colour("--bar"), stroke: colour("--bar"), width: 0, paths: uPlot.paths.bars({ size: [0.94, 100], align: 0 }), points: { show: false } };
    const { series, columns, axes, scales, text } = shape(plot.dataset.chart, data, bars, colour);
    drawn?.destroy();
    drawn = new uPlot({
      width: plot.clientWidth, height: 190, series: [{}, ...series], scales,
      axes: [{ ...axis, size: 30, ...axes?.[0] }, { ...axis, size: 52, ...axes?.[1] }],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { show: false }, y: false },
      hooks: { setCursor: [(self) => { says.textContent = self.cursor.idx == null ? "" : text(self.cursor.idx); }] },
    }, columns, plot);
  };
  draw();
  redraws.push(draw);
  new ResizeObserver(() => drawn.setSize({ width: plot.clientWidth, height: 190 })).observe(plot);
}

/** What uPlot needs for a chart of this name. */
function shape(name, data, bars, colour) {
  const percent = (self, values) => values.map((value) => `${+(100 * value).toFixed(1)} %`);
  if (name === "reliability") {
    const used = data.bins.map((bin) => (bin.from + bin.to) / 2);
    return {
      series: [bars, { stroke: colour("--bar-label"), width: 1.5, dash: [4, 4], points: { show: false } }],
      columns: [used, data.bins.map((bin) => bin.accuracy), used],
      scales: { x: { time: false, range: [0, 1] }, y: { range: [0, 1] } },
      text: (i) => { const bin = data.bins[i]; return `confidence ${shown(bin.confidence, 3)}, accuracy ${shown(bin.accuracy, 3)}, ${shown(bin.count, 0)} positions`; },
    };
  }
  if (name === "mass") {
    return {
      series: [{ stroke: colour("--bar"), width: 2, points: { show: true, size: 5, fill: colour("--bar") } }],
      columns: [data.ks, data.mass],
      scales: { x: { time: false, distr: 3, log: 2 }, y: { range: [0, 1] } },
      text: (i) => `k = ${data.ks[i]}: ${shown(100 * data.mass[i], 2)} %`,
    };
  }
  const centres = data.bins.map((bin) => (bin.from + bin.to) / 2);
  return {
    series: [bars],
    columns: [centres, data.bins.map((bin) => bin.share)],
    scales: { x: { time: false, range: [data.bins[0].from, data.bins.at(-1).to] }, y: { range: (self, low, high) => [0, high * 1.08] } },
    axes: [{}, { values: percent }],
    text: (i) => { const bin = data.bins[i]; return `${shown(bin.from, 2)} – ${shown(bin.to, 2)}: ${shown(bin.count, 0)} positions, ${shown(100 * bin.share, 2)} %`; },
  };
}

startPage();
if ($("#sample-data")) new Sample().start();
if (window.uPlot) $$(".chart").forEach(chart);
