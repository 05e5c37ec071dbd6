"use strict";
// Shows traces; computes no plan. What it does compute is whether a trace can be true (judge), and says so.
const $ = (id) => document.getElementById(id);
const traces = JSON.parse($("traces").textContent);
let trace = null, at = 0, timer = null;

const kindOf = (t) => t.state.kind === "ring" ? `ring of ${t.state.block_rows}` : `pages of ${t.state.block_rows}`;
const chunkOf = (t) => t.scenario.chunk >= t.scenario.prompt ? `all ${t.scenario.prompt}` : String(t.scenario.chunk);
const KEYS = { ratio: (t) => String(t.spec.ratio), chunk: chunkOf, drafts: (t) => String(t.scenario.drafts), state: kindOf };
const ORDER = ["ratio", "chunk", "drafts", "state"], PAGES = 12;

// Fill each control with what is left under the choices before it; keep a choice that is still possible.
function choose() {
  let left = traces;
  for (const name of ORDER) {
    const options = [...new Set(left.map(KEYS[name]))], old = $(name).value;
    $(name).replaceChildren(...options.map((o) => new Option(o, o)));
    $(name).value = options.includes(old) ? old : options[0];
    left = left.filter((t) => KEYS[name](t) === $(name).value);
  }
  load(left[0]);
}

function load(t) {
  trace = t; at = 0;
  $("step").max = t.steps.length - 1;
  $("about-state").textContent = `${kindOf(t)} rows, ${t.state.row_bytes} bytes each; a row shows the position it holds`;
  $("about-cache").textContent = `${t.cache.format}, pages of ${t.cache.page_rows} rows, ${t.cache.page_bytes} bytes each; hover or focus a row for its place and bytes`;
  show();
}

// Row -> position before step n, from what the steps before it kept.
function held(t, n) {
  const rows = new Map();
  for (const s of t.steps.slice(0, n)) for (const [position, row] of s.keeps) rows.set(row, position);
  return rows;
}

// Everything that cannot be true of a compressor's steps: [step, sentence].
function judge(t) {
  const found = [], owner = new Map(), r = t.spec.ratio;
  let expected = 0;
  t.steps.forEach((s, n) => {
    const say = (text) => found.push([n, text]), end = s.start + s.tokens, rows = held(t, n);
    if (s.start !== expected) say(`starts at ${s.start}, the step before ended at ${expected}`);
    expected = end - s.drafts + s.accepted;
    const read = new Set();
    for (const [position, row] of s.reads) {
      read.add(position);
      if (rows.get(row) !== position) say(`reads position ${position} from state row ${row}, which holds ${rows.has(row) ? rows.get(row) : "nothing"}`);
    }
    const first = Math.floor(s.start / r), count = Math.floor(end / r) - first;
    if (s.windows.length !== count) say(`emits ${s.windows.length} windows, ${count} end in it`);
    s.windows.forEach(([index, slot, rope], i) => {
      if (index !== first + i) say(`emits window ${index} where ${first + i} ends`);
      if (rope !== index * r) say(`rotates window ${index} at ${rope}, it begins at ${index * r}`);
      for (let p = Math.max((index + 1) * r - t.spec.window, 0); p < (index + 1) * r; p++)
        if (p < s.start ? !read.has(p) : p >= end) say(`window ${index} needs position ${p}, which is neither stored nor in the step`);
      if (owner.has(slot) && owner.get(slot) !== index) say(`cache row ${slot} of window ${owner.get(slot)} is overwritten by window ${index}`);
      owner.set(slot, index);
    });
    const kept = new Set(s.keeps.map(([, row]) => row));
    if (kept.size !== s.keeps.length) say("keeps two tokens in one state row");
    for (const [position] of s.keeps) if (position < s.start || position >= end) say(`keeps position ${position}, which is not in it`);
  });
  return found;
}

function cell(text, classes, title) {
  const b = document.createElement("b");
  b.textContent = text; b.className = classes.filter(Boolean).join(" ");
  if (title) b.title = title;
  return b;
}

function show() {
  const s = trace.steps[at], r = trace.spec.ratio, end = s.start + s.tokens, sure = end - s.drafts;
  const read = new Set(s.reads.map(([p]) => p)), ended = new Map(s.windows.map((w) => [w[0], w]));
  $("step").value = at;
  $("where").textContent = `step ${at + 1} of ${trace.steps.length}`;
  // Tokens, a line for each window, from the oldest that is still read.
  const from = Math.floor(Math.min(s.start, ...read, Math.max(s.start - r, 0)) / r) * r, tokens = [];
  for (let p = from; p < end; p++) {
    if (p % r === 0) { const line = document.createElement("span"); line.textContent = `window ${p / r}${ended.has(p / r) ? `, emitted to cache row ${ended.get(p / r)[1]}` : ""}`; tokens.push(line); }
    const kind = p >= sure ? (p < sure + s.accepted ? "draft" : "lost") : p >= s.start ? "new" : read.has(p) ? "read" : "";
    const half = trace.spec.overlap && ended.has(Math.floor(p / r) + 1) ? "half" : "";
    const b = cell(p, [kind, (p + 1) % r === 0 && p >= s.start && "end", half], half ? "its first channels go to the next window, the last ones to its own" : "");
    b.dataset.position = p;
    tokens.push(b);
  }
  $("tokens").replaceChildren(...tokens);
  // State rows before the step, then what it keeps.
  const rows = held(trace, at), keeps = new Map(s.keeps.map(([p, row]) => [row, p])), readRows = new Set(s.reads.map(([, row]) => row));
  const used = trace.state.kind === "ring" ? [...Array(trace.state.block_rows).keys()]
    : [...new Set([...rows.keys(), ...keeps.keys()].map((x) => Math.floor(x / trace.state.block_rows)))].sort((a, b) => a - b).slice(-4)
      .flatMap((page) => [...Array(trace.state.block_rows).keys()].map((i) => page * trace.state.block_rows + i));
  const state = [];
  for (const row of used) {
    if (trace.state.kind === "paged" && row % trace.state.block_rows === 0) { const line = document.createElement("span"); line.textContent = `page ${row / trace.state.block_rows}`; state.push(line); }
    const p = keeps.has(row) ? keeps.get(row) : rows.get(row);
    const b = cell(p === undefined ? "\u2013" : p, [p === undefined && "empty", keeps.has(row) ? "new" : readRows.has(row) && "read"],
      `state row ${row}${readRows.has(row) ? `, read: position ${rows.get(row)}` : ""}${keeps.has(row) ? `, written: position ${keeps.get(row)}` : ""}`);
    b.dataset.row = row;
    state.push(b);
  }
  $("rows").replaceChildren(...state);
  // The pages that hold rows, in the order of the block table; a cell is a cache row, and below it its window.
  const cached = new Map(), lines = trace.cache.page_rows;
  trace.steps.slice(0, at + 1).forEach((step, n) => step.windows.forEach(([index, slot, rope]) => cached.set(index, { index, slot, rope, now: n === at })));
  const visible = Math.floor((sure + s.accepted) / r);
  const entries = [...new Set([...cached.keys()].map((index) => Math.floor(index / lines)))].slice(-PAGES);
  $("cache").replaceChildren(...entries.flatMap((entry) => {
    const page = Math.floor(cached.get(Math.max(...[...cached.keys()].filter((i) => Math.floor(i / lines) === entry))).slot / lines);
    const line = document.createElement("span");
    line.textContent = `page ${page} (block_table[${entry}]): cache rows ${page * lines} to ${page * lines + lines - 1}`;
    return [line, ...[...Array(lines).keys()].map((i) => {
      const w = cached.get(entry * lines + i), row = page * lines + i;
      if (!w) return cell(row, ["empty"], "not written yet");
      const b = cell(row, [w.index >= visible ? "lost" : w.now && "new"], w.index >= visible ? "ended by a rejected draft: not visible, written again later" : "");
      const small = document.createElement("small");
      small.textContent = `window ${w.index}`;
      b.append(small);
      b.tabIndex = 0;
      b.dataset.slot = w.slot;
      b.onmouseenter = b.onfocus = () => bytes(w);
      return b;
    })];
  }));
  $("bytes").textContent = "";
  $("strip").replaceChildren();
  const say = (text) => { const li = document.createElement("li"); li.textContent = text; return li; };
  const events = [`${s.tokens} token${s.tokens > 1 ? "s" : ""} from position ${s.start}` + (s.drafts ? `, ${s.drafts} of them drafts, ${s.accepted} accepted: goes on at ${sure + s.accepted}` : "")];
  if (s.reads.length) events.push(`reads ${s.reads.length} rows of the state, positions ${s.reads[0][0]} to ${s.reads.at(-1)[0]}`);
  for (const [index, slot, rope] of s.windows) {
    const begin = Math.max((index + 1) * r - trace.spec.window, 0);
    events.push(`window ${index}: pools positions ${begin} to ${(index + 1) * r - 1}, rotated at ${rope}, to cache row ${slot} (page ${Math.floor(slot / lines)}, line ${slot % lines})`);
  }
  if (!s.windows.length) events.push("no window ends: the cache stays as it is");
  if (s.keeps.length) events.push(`keeps ${s.keeps.length} rows, positions ${s.keeps[0][0]} to ${s.keeps.at(-1)[0]}`);
  $("events").replaceChildren(...events.map(say));
  const wrong = judge(trace);
  $("verdict").className = wrong.length ? "wrong" : "";
  $("verdict").textContent = wrong.length
    ? `This plan is wrong in ${wrong.length} place${wrong.length > 1 ? "s" : ""}. Step ${wrong[0][0] + 1}: ${wrong[0][1]}.`
    : "Checked: every row that is read was kept, every window that ends is emitted once, nothing is overwritten too early.";
}

// The bytes of one row: in words, and as places in its page, drawn to scale.
function bytes(w) {
  const page = Math.floor(w.slot / trace.cache.page_rows), row = w.slot % trace.cache.page_rows;
  $("strip").replaceChildren(...trace.cache.row_bytes.flatMap((fields, of) => fields.map(([name, first, last]) => {
    const box = document.createElement("i");
    box.style.left = `${100 * first / trace.cache.page_bytes}%`;
    box.style.width = `${100 * (last - first) / trace.cache.page_bytes}%`;
    box.className = of === row ? "mine" : "";
    box.title = `row ${of}, ${name}: bytes ${first} to ${last - 1} of ${trace.cache.page_bytes}`;
    return box;
  })));
  const fields = trace.cache.row_bytes[row].map(([name, first, last]) => `${name} ${first}..${last - 1}`).join(", ");
  const lines = trace.cache.page_rows, entry = Math.floor(w.index / lines);
  $("bytes").textContent = `window ${w.index}, RoPE at position ${w.rope}: block_table[${w.index} div ${lines} = ${entry}] is page ${page}, `
    + `line ${w.index} mod ${lines} = ${row}, so cache row ${page} * ${lines} + ${row} = ${w.slot}; bytes of the page: ${fields}`;
}

function go(n) { at = Math.min(Math.max(n, 0), trace.steps.length - 1); show(); }
function play() {
  if (timer) { clearInterval(timer); timer = null; } else {
    if (at === trace.steps.length - 1) at = -1;
    timer = setInterval(() => { if (at >= trace.steps.length - 1) play(); else go(at + 1); }, 700);
  }
  $("play").textContent = timer ? "pause" : "play";
}

async function open(file) {
  const before = trace;
  try {
    if (file.size > 1 << 26) throw new Error("the file is larger than 64 MiB");
    const t = JSON.parse(await file.text());
    if (t.schema !== 1 || !t.steps?.length) throw new Error("it is no trace of kvcondense (schema 1)");
    load(t);
  } catch (error) {
    if (trace !== before) load(before);  // it was taken before it turned out not to be one
    $("verdict").className = "wrong";
    $("verdict").textContent = `${file.name} cannot be shown: ${error.message}.`;
  }
}

for (const name of ORDER) $(name).onchange = choose;
$("controls").onsubmit = (event) => event.preventDefault();
$("file").onchange = (event) => event.target.files.length && open(event.target.files[0]);
$("back").onclick = () => go(at - 1);
$("next").onclick = () => go(at + 1);
$("play").onclick = play;
$("step").oninput = () => go(Number($("step").value));
document.onkeydown = (event) => {
  if (["INPUT", "SELECT", "BUTTON"].includes(event.target.tagName)) return;
  const keys = { ArrowRight: () => go(at + 1), ArrowLeft: () => go(at - 1), Home: () => go(0), End: () => go(1e9), " ": play };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
};
choose();
