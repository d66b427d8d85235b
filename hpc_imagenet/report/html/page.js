"use strict";
// State of the page: data, filter, sorting, chosen runs; and what is drawn from it.

const FIRST_ROWS = 100, FIRST_LANES = 40, DEFAULT_CURVES = 5, MAX_CURVES = 20, POLL_SECONDS = 10;
const state = { data: null, rows: [], shown: [], sort: { key: "top1", down: true }, allRows: false, allLanes: false, chosen: null, open: null };

const difference = (run) => (isNumber(run.top1) && isNumber(run.published_top1) && run.published_same_protocol ? run.top1 - run.published_top1 : null);
// Evaluations are listed oldest first.
const lastEvaluation = (run) => run.evaluations.filter((each) => isNumber(each.top1)).at(-1);
// A training whose accuracy is that of chance has finished, but is no success.
const stateText = (run) => (run.learned === false
  ? el("span", { class: "state-failed", title: run.advice }, `${run.state}, at chance`)
  : el("span", { class: `state-${run.state}`, title: run.reason }, run.state));
// Model, seed and datastore have columns of their own.
const settingsText = (run) => Object.entries(run.config).filter(([name]) => !/^(model\.name|seed|datastore\..*)$/.test(name)).map(([name, value]) => `${name}=${value}`).join(" · ");

// Columns of the leaderboard: key, heading, class, value to sort by, cell.
const COLUMNS = [
  { key: "pick", head: "curves", class: "pick", cell: pickCell },
  { key: "model", head: "model", value: (run) => run.model, cell: (run) => [el("button", { class: "name", type: "button" }, run.model), el("span", { class: "sub" }, run.run.slice(0, 8), el("span", { class: "narrow" }, " ", stateText(run)))] },
  { key: "state", head: "state", class: "wide", value: (run) => run.state, cell: stateText },
  { key: "top1", head: "top-1 %", class: "n", value: (run) => run.top1, cell: (run) => percent(run.top1) },
  { key: "published", head: "published %", class: "n", value: (run) => run.published_top1, cell: publishedCell, optional: true },
  { key: "difference", head: "difference", class: "n", value: difference, cell: differenceCell, optional: true },
  { key: "evaluated", head: "evaluated %", class: "n", value: (run) => lastEvaluation(run)?.top1 ?? null, cell: evaluatedCell, optional: true },
  { key: "top5", head: "top-5 %", class: "n wide", value: (run) => run.top5, cell: (run) => percent(run.top5) },
  { key: "parameters", head: "parameters, M", class: "n wide", value: (run) => run.parameters, cell: (run) => (isNumber(run.parameters) ? (run.parameters / 1e6).toFixed(2) : "") },
  { key: "gpu_hours", head: "GPU-hours", class: "n", value: (run) => run.gpu_hours || null, cell: (run) => (run.gpu_hours ? short(run.gpu_hours) : ""), optional: true },
  { key: "gpu_hours_per_point", head: "GPU-h / point", class: "n wide", value: (run) => run.gpu_hours_per_point, cell: (run) => short(run.gpu_hours_per_point), optional: true },
  { key: "kwh", head: "kWh", class: "n", value: (run) => run.kwh, cell: (run) => short(run.kwh), optional: true },
  { key: "kwh_per_point", head: "kWh / point", class: "n wide", value: (run) => run.kwh_per_point, cell: (run) => short(run.kwh_per_point), optional: true },
  { key: "hours", head: "time", class: "n wide", value: (run) => run.hours || null, cell: (run) => (run.hours ? duration(3600 * run.hours) : "") },
  { key: "images_per_second", head: "images/s", class: "n wide", value: (run) => run.images_per_second, cell: (run) => number(run.images_per_second) },
  { key: "epochs", head: "epochs", class: "n wide", value: (run) => run.epochs, cell: (run) => number(run.epochs), ifDifferent: true },
  { key: "seed", head: "seed", class: "n wide", value: (run) => run.seed, cell: (run) => String(run.seed ?? ""), ifDifferent: true },
  { key: "datastore", head: "datastore", class: "wide", value: (run) => run.datastore, cell: (run) => run.datastore, ifDifferent: true },
  { key: "settings", head: "settings that differ", class: "wide", ifDifferent: true, value: settingsText, cell: (run) => el("div", { class: "settings", title: settingsText(run) }, settingsText(run)) },
];

function pickCell(run) {
  const box = el("input", { type: "checkbox", "aria-label": `curves of ${run.run}` });
  box.checked = chosenRuns().includes(run);
  box.addEventListener("click", (event) => event.stopPropagation());
  box.addEventListener("change", () => {
    const chosen = new Set(chosenRuns());
    if (box.checked) chosen.add(run); else chosen.delete(run);
    state.chosen = [...chosen].slice(-MAX_CURVES).map((each) => each.run);
    drawTable();
    drawCurves();
  });
  return box;
}

function publishedCell(run) {
  if (!isNumber(run.published_top1)) return "";
  const epochs = (run.published_protocol.match(/\d+ epochs/) || [""])[0];
  return [percent(run.published_top1), el("span", { class: "sub", title: run.published_protocol }, run.published_same_protocol ? epochs : `≠ ${epochs || "protocol"}`)];
}

function differenceCell(run) {
  const value = difference(run);
  if (value === null) return "";
  return el("span", { class: value >= 0 ? "up" : "down" }, `${value >= 0 ? "+" : "−"}${percent(Math.abs(value))}`);
}

function evaluatedCell(run) {
  const last = lastEvaluation(run);
  if (!last) return "";
  const others = run.evaluations.length - 1;
  return [percent(last.top1), el("span", { class: "sub", title: `${last.checkpoint}${last.step ? ` of step ${last.step}` : ""} on ${last.split} of ${last.datastore}` }, `${last.name}${others ? ` +${others}` : ""}`)];
}

// The runs whose curves are drawn: those chosen by hand, else the best of the filter.
function chosenRuns() {
  if (state.chosen) return state.chosen.map((id) => state.rows.find((run) => run.run === id)).filter(Boolean);
  return state.shown.filter((run) => run.curves.val || run.curves.steps).slice(0, DEFAULT_CURVES);
}

// Whether a part was drawn from the same value before. A live page then leaves it, with its zoom, as it is.
let drawn = {};
function unchanged(part, value) {
  const key = JSON.stringify(value), same = drawn[part] === key;
  drawn[part] = key;
  return same;
}

function load(data) {
  state.data = data;
  state.rows = data.runs;
  for (const run of state.rows) {
    run.text = [run.run, run.model, run.state, run.learned === false ? "at chance" : "", run.reason, run.datastore, ...run.sweeps, settingsText(run)].join(" ").toLowerCase();
  }
  document.title = `Trainings in ${data.workspace}`;
  const { live } = document.documentElement.dataset;
  $("subtitle").textContent = `${data.workspace} · ${live ? "live, " : ""}as of ${moment(Date.parse(data.generated) / 1000)}`;
  $("footer").textContent = `Made by hpc_imagenet ${data.version}. ${live ? "" : "This page loads nothing from the network. "}${HAS_PLOTS ? `Plots: Bokeh ${Bokeh.version} (BSD).` : ""}`;
  fillSelect("state", state.rows.map((run) => run.state));
  fillSelect("model", state.rows.map((run) => run.model));
  fillSelect("datastore", state.rows.map((run) => run.datastore));
  fillSelect("sweep", state.rows.flatMap((run) => run.sweeps));
  drawTiles();
  filter();
  $("data-body").replaceChildren(...Object.entries(data.datastores).map(([name, store]) => dataDetails(name, store)));
  if (!Object.keys(data.datastores).length) $("data-body").replaceChildren(el("p", { class: "empty" }, "No training names a datastore."));
  if (!unchanged("shared", data.shared)) {
    const summary = el("summary", {}, `${Object.keys(data.shared).length} settings`);
    $("settings-body").replaceChildren(el("details", {}, summary, facts(Object.entries(data.shared))));
  }
  $("sources-body").replaceChildren(sources(state.rows));
  if (!unchanged("searches", data.searches)) drawSearches(data.searches || []);
}

function fillSelect(id, values) {
  const select = $(id), before = select.value, names = [...new Set(values.filter(Boolean).map(String))].sort();
  select.replaceChildren(el("option", { value: "" }, "all"), ...names.map((name) => el("option", { value: name }, name)));
  select.value = names.includes(before) ? before : "";
  select.parentElement.hidden = names.length < 2;
}

function drawTiles() {
  const count = (name) => state.rows.filter((run) => run.state === name).length;
  const best = state.rows.filter((run) => isNumber(run.top1)).sort((a, b) => b.top1 - a.top1)[0];
  const gpuHours = state.rows.reduce((sum, run) => sum + (run.gpu_hours || 0), 0), hours = state.rows.reduce((sum, run) => sum + run.hours, 0);
  const kwh = state.rows.reduce((sum, run) => sum + (run.kwh || 0), 0);
  const tile = (value, text) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, text));
  $("tiles").replaceChildren(
    tile(number(state.rows.length), "trainings"), tile(number(count("finished")), "finished"),
    tile(number(count("running") + count("queued")), "running or queued"), tile(number(count("failed") + count("cancelled")), "failed or cancelled"),
    ...(count("pruned") ? [tile(number(count("pruned")), "pruned by a search")] : []),
    tile(best ? `${percent(best.top1)} %` : "–", best ? `best top-1: ${best.model}` : "best top-1"),
    ...(kwh ? [tile(short(kwh), "kWh, where it was measured")] : []),
    gpuHours ? tile(short(gpuHours), "GPU-hours") : tile(duration(3600 * hours) || "–", "of training, without GPUs"));
}

function filter() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = ["state", "model", "datastore"].map((key) => [key, $(key).value]).filter((pair) => pair[1]);
  const sweep = $("sweep").value;
  const { value } = COLUMNS.find((column) => column.key === state.sort.key), sign = state.sort.down ? -1 : 1;
  const missing = (entry) => entry === null || entry === undefined || entry === "";
  state.shown = state.rows
    .filter((run) => words.every((word) => run.text.includes(word)) && wanted.every(([key, text]) => String(run[key]) === text) && (!sweep || run.sweeps.includes(sweep)))
    .map((run) => [value(run), run])
    .sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b); // unknown values are last either way
      return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    })
    .map((pair) => pair[1]);
  if (!state.rows.some((run) => run.run === state.open)) state.open = null;
  drawTable();
  drawScatter();
  drawCurves();
  drawRun();
  drawTimeline();
}

function drawTable() {
  const columns = COLUMNS.filter((column) => {
    if (!column.optional && !column.ifDifferent) return true;
    const values = new Set(state.rows.map(column.value).filter((value) => value !== null && value !== undefined));
    return values.size > (column.ifDifferent ? 1 : 0);
  });
  $("count").textContent = state.shown.length === state.rows.length ? `${number(state.rows.length)} trainings` : `${number(state.shown.length)} of ${number(state.rows.length)} trainings`;
  if (state.rows.some((run) => run.published_same_protocol === false)) $("count").textContent += "; ≠: published with another length or size, or of a pruned trial";
  const heads = columns.map((column) => {
    const { sort } = state;
    if (!column.value) return el("th", { class: column.class }, column.head);
    const order = sort.key !== column.key ? "none" : sort.down ? "descending" : "ascending";
    return el("th", { class: column.class, "aria-sort": order }, el("button", { type: "button", onclick: () => sortBy(column.key) }, column.head));
  });
  const rows = (state.allRows ? state.shown : state.shown.slice(0, FIRST_ROWS)).map((run) =>
    el("tr", { class: run.run === state.open && "open", onclick: () => openRun(run) },
      columns.map((column) => el("td", { class: column.class }, column.cell(run)))));
  if (!rows.length) rows.push(el("tr", {}, el("td", { colspan: columns.length, class: "empty" }, state.rows.length ? "No training matches the filter." : "No trainings in this workspace.")));
  document.querySelector("#table thead").replaceChildren(el("tr", {}, heads));
  document.querySelector("#table tbody").replaceChildren(...rows);
  $("more").hidden = state.allRows || state.shown.length <= FIRST_ROWS;
  $("more").textContent = `Show all ${number(state.shown.length)}`;
}

function sortBy(key) {
  // The first click on a column of numbers shows the highest first.
  const isText = ["model", "datastore", "state", "settings"].includes(key);
  state.sort = { key, down: state.sort.key === key ? !state.sort.down : !isText };
  filter();
  [...document.querySelectorAll("#table th")].find((head) => head.getAttribute("aria-sort") !== "none" && head.hasAttribute("aria-sort"))?.firstChild.focus();
}

function drawScatter() {
  const holder = $("scatter"), measured = state.shown.filter((run) => isNumber(run.top1));
  if (unchanged("scatter", measured.map((run) => [run.run, run.top1, run.hours]))) return;
  destroyAll(charts.scatter);
  holder.replaceChildren();
  const families = [...new Set(measured.map((run) => family(run.model)))].sort();
  const withGpus = measured.some((run) => run.gpu_hours > 0);
  const cost = (run) => (withGpus ? run.gpu_hours : run.hours);
  const point = (run, x, unit) => ({ x, y: 100 * run.top1, run, family: family(run.model), lines: [`${run.model} · ${percent(run.top1)} %`, run.run, `${short(x)} ${unit}`, settingsText(run)].filter(Boolean) });
  const rings = new Map();
  for (const run of measured) {
    if (isNumber(run.published_top1) && isNumber(run.parameters)) {
      rings.set(`${run.model}${run.published_protocol}`, { x: run.parameters / 1e6, y: 100 * run.published_top1, lines: [`${run.model}, published: ${percent(run.published_top1)} %`, run.published_protocol] });
    }
  }
  scatterPlot(holder, withGpus ? "GPU-hours" : "Hours of training", withGpus ? "GPU-hours of all attempts" : "hours of all attempts", measured.filter((run) => cost(run) > 0).map((run) => point(run, cost(run), withGpus ? "GPU-hours" : "hours")), [], families, openRun);
  scatterPlot(holder, "Parameters", "parameters, millions", measured.filter((run) => run.parameters > 0).map((run) => point(run, run.parameters / 1e6, "million parameters")), [...rings.values()], families, openRun);
  const swatch = (name, index) => { const mark = el("i"); mark.style.background = colour(index); return el("span", {}, mark, name); };
  $("scatter-legend").replaceChildren(...families.map(swatch), ...(rings.size ? [el("span", {}, el("i", { class: "ring" }), "published")] : []));
  $("accuracy-note").textContent = measured.length ? `${number(measured.length)} finished trainings. Click a point to open its run; drag to enlarge, double-click to reset.` : "";
}

function drawCurves() {
  const holder = $("curve-charts"), runs = chosenRuns();
  if (unchanged("curves", [state.chosen, runs.map((run) => [run.run, run.curves])])) return;
  destroyAll(charts.curves);
  holder.replaceChildren();
  const dash = (index) => (index >= COLOURS ? [6, 4] : undefined);
  const label = (run) => `${run.model} ${run.run.slice(0, 8)}`;
  const curves = (kind, key, factor = 1) => runs.map((run, index) => {
    const curve = run.curves[kind];
    return curve && curve[key] ? { name: label(run), x: curve.x, y: curve[key].map((value) => (isNumber(value) ? factor * value : null)), colour: index, dash: dash(index) } : {};
  });
  curvePlot(holder, "Top-1 on val", "%", curves("val", "top1", 100));
  curvePlot(holder, "Loss on train", "cross-entropy", curves("steps", "train_loss"));
  curvePlot(holder, "Loss on val", "cross-entropy", curves("val", "val_loss"));
  curvePlot(holder, "Learning rate", "", curves("steps", "lr"));
  curvePlot(holder, "Throughput", "images/s", curves("speed", "rate"), { fromZero: true });
  curvePlot(holder, "Waiting for data", "% of the epoch", curves("speed", "wait", 100), { fromZero: true, least: 5 });
  if (!charts.curves.length) holder.append(el("p", { class: "empty" }, "No curves have been recorded yet."));
  $("curves-legend").replaceChildren(...runs.map((run, index) => {
    const mark = el("i");
    mark.style.background = colour(index);
    return el("span", { title: settingsText(run) }, mark, label(run));
  }));
  $("curves-note").textContent = runs.length ? `${state.chosen ? "The chosen" : "The best"} ${runs.length === 1 ? "training" : `${runs.length} trainings`}; the boxes of the leaderboard choose others. Drag to enlarge, double-click to reset.` : "";
}

function openRun(run) {
  state.open = run.run;
  history.replaceState(null, "", `#${encodeURIComponent(run.run)}`);
  drawTable();
  drawRun();
  $("run").scrollIntoView({ behavior: "smooth", block: "start" });
}

function drawRun() {
  const run = state.rows.find((each) => each.run === state.open) || state.shown[0];
  if (unchanged("run", [state.open, run, run && state.data.datastores[run.datastore]])) return;
  $("run-body").replaceChildren(...(run ? [
    el("p", { class: "muted no-print" }, state.open ? "" : "The first of the leaderboard; click a row for another."), ...runDetails(run, state.data)]
    : [el("p", { class: "empty" }, "No training to show.")]));
}

function drawTimeline() {
  const began = (row) => Math.max(0, ...row.attempts.flatMap((attempt) => attempt.parts.map((part) => part[2])));
  const rows = state.shown.map((run) => ({ name: `${run.model} ${run.run.slice(0, 8)}`, run, attempts: run.attempts }));
  if (state.shown.length === state.rows.length) rows.push(...state.data.other_jobs.map((job) => ({ name: `${job.stage} ${job.run.slice(0, 8)}`, attempts: job.attempts })));
  const sorted = rows.filter((row) => row.attempts.some((attempt) => attempt.parts.length)).sort((a, b) => began(b) - began(a));
  $("timeline-legend").replaceChildren(...PART_NAMES.map(([kind, text]) => el("span", {}, el("i", { class: `part-${kind}` }), text)));
  $("timeline-body").replaceChildren(timeline(state.allLanes ? sorted : sorted.slice(0, FIRST_LANES), openRun));
  $("timeline-more").hidden = state.allLanes || sorted.length <= FIRST_LANES;
  $("timeline-more").textContent = `Show all ${number(sorted.length)}, newest first`;
}

const THEMES = ["auto", "light", "dark"];
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
function applyTheme() {
  const dark = !charts.printing && (theme === "dark" || (theme === "auto" && darkSystem.matches));
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = `Theme: ${theme}`;
}
function redraw() {
  applyTheme();
  drawn = { ...drawn, scatter: null, curves: null };
  if (state.data) { drawScatter(); drawCurves(); }
}

function start() {
  try { theme = localStorage.getItem("theme") || "auto"; } catch { /* a page opened as a file may have no storage */ }
  if (!THEMES.includes(theme)) theme = "auto";
  applyTheme();
  $("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try { localStorage.setItem("theme", theme); } catch { /* as above */ }
    redraw();
  });
  darkSystem.addEventListener("change", redraw);
  const printing = (now) => {
    if (charts.printing === now) return;
    charts.printing = now;
    if (now) copyForPrint(document.documentElement.dataset.theme === "dark");
    else for (const copy of document.querySelectorAll(".for-print")) copy.remove();
    applyTheme();
  };
  window.addEventListener("beforeprint", () => printing(true));
  window.addEventListener("afterprint", () => printing(false));
  let resizing, typing;
  window.addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => { if (!charts.printing) resizeCharts(); }, 100); });
  const restart = () => { state.chosen = null; state.allRows = false; filter(); };
  $("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(restart, 120); });
  for (const id of ["state", "model", "datastore", "sweep"]) $(id).addEventListener("change", restart);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("reset", () => setTimeout(restart));
  $("more").addEventListener("click", () => { state.allRows = true; drawTable(); });
  $("timeline-more").addEventListener("click", () => { state.allLanes = true; drawTimeline(); });
  const data = JSON.parse($("page-data").textContent);
  const hash = location.hash.slice(1);
  if (data.runs.some((run) => encodeURIComponent(run.run) === hash)) state.open = decodeURIComponent(hash);
  load(data);
  if (document.documentElement.dataset.live) setInterval(poll, 1000 * POLL_SECONDS);
  // When everything has been drawn, in ms since the page was requested; for the benchmark and the tests.
  allDrawn().then(() => requestAnimationFrame(() => setTimeout(() => { document.documentElement.dataset.drawn = String(Math.round(performance.now())); })));
}

let version = "";
async function poll() {
  if (document.hidden) return;
  try {
    const answer = await fetch(document.documentElement.dataset.live, { cache: "no-store", headers: version ? { "If-None-Match": version } : {} });
    if (answer.status !== 200) return;
    version = answer.headers.get("ETag") || "";
    load(await answer.json());
  } catch { /* the server has ended, or the tunnel is closed: the page stays as it is */ }
}

start();
