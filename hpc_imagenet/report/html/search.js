"use strict";
// The searches: one line a trial across the axes of its settings, the rungs, and the importance of the settings.

const AXES = { width: 1000, height: 260, top: 34, bottom: 26, side: 90 };

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// An axis: where a value lies on it, from 0 (bottom) to 1, and the labels of its ends or choices.
function searchAxis(setting) {
  if (setting.choices) {
    const last = Math.max(1, setting.choices.length - 1);
    const at = (value) => (setting.choices.length === 1 ? 0.5 : setting.choices.indexOf(value) / last);
    return { name: setting.name, at, labels: setting.choices.map((choice) => [at(choice), choice]) };
  }
  const scale = setting.log ? Math.log : (value) => value, low = scale(setting.low), high = scale(setting.high);
  const at = (value) => (scale(Number(value)) - low) / (high - low || 1);
  return { name: setting.name + (setting.log ? " (log)" : ""), at, labels: [[0, short(setting.low)], [1, short(setting.high)]] };
}

function parallelCoordinates(study) {
  const measured = study.trials.filter((trial) => isNumber(trial.top1)).reverse(); // the best is drawn last
  if (!measured.length) return el("p", { class: "empty" }, "No trial has been validated yet.");
  const tops = measured.map((trial) => 100 * trial.top1), low = Math.min(...tops), high = Math.max(...tops);
  const accuracy = { name: "top-1 %", at: (value) => (value - low) / (high - low || 1), labels: [[0, low.toFixed(1)], [1, high.toFixed(1)]] };
  const axes = [...study.settings.map(searchAxis), accuracy];
  const x = (index) => AXES.side + (index * (AXES.width - 2 * AXES.side)) / Math.max(1, axes.length - 1);
  const y = (share) => AXES.height - AXES.bottom - share * (AXES.height - AXES.top - AXES.bottom);
  const drawing = svg("svg", { viewBox: `0 0 ${AXES.width} ${AXES.height}`, class: "parallel", role: "img", "aria-label": `trials of ${study.name}` });
  for (const trial of measured) {
    const values = [...trial.values, 100 * trial.top1];
    const points = values.map((value, index) => `${x(index).toFixed(1)},${y(axes[index].at(value)).toFixed(1)}`).join(" ");
    const share = accuracy.at(100 * trial.top1);
    const line = svg("polyline", { points, class: `trial-${trial.state}`, "stroke-opacity": (0.15 + 0.85 * share ** 2).toFixed(2) });
    const lines = [`trial ${trial.trial} · ${percent(trial.top1)} % · ${trial.state}`, ...study.settings.map((setting, index) => `${setting.name}=${trial.values[index]}`), trial.run];
    line.addEventListener("mousemove", (event) => showTip(event, lines));
    line.addEventListener("mouseleave", hideTip);
    drawing.append(line);
  }
  axes.forEach((axis, index) => {
    const right = index === axes.length - 1;
    drawing.append(svg("line", { x1: x(index), x2: x(index), y1: y(0), y2: y(1), class: "axis-line" }));
    drawing.append(svg("text", { x: x(index), y: 14, "text-anchor": "middle" }, axis.name));
    for (const [share, label] of axis.labels) {
      drawing.append(svg("text", { x: x(index) + (right ? 6 : -6), y: y(share) + 4, "text-anchor": right ? "start" : "end", class: "tick" }, label));
    }
  });
  return drawing;
}

function searchDetails(study) {
  const count = (name) => study.trials.filter((trial) => trial.state === name).length;
  const states = ["running", "finished", "pruned", "failed", "skipped"].filter(count).map((name) => `${number(count(name))} ${name}`);
  const importance = Object.entries(study.importance).filter((pair) => isNumber(pair[1]));
  const bars = importance.map(([name, share]) => {
    const bar = el("div", { class: "importance" }, el("div", {}));
    bar.firstChild.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
    return el("tr", {}, el("td", {}, name), el("td", {}, bar), el("td", { class: "n" }, percent(share, 0)));
  });
  const rungs = study.rungs.filter((rung) => rung.trials).map((rung) => el("tr", {}, el("td", { class: "n" }, number(rung.epochs)),
    el("td", { class: "n" }, number(rung.trials)), ...["low", "median", "high"].map((key) => el("td", { class: "n" }, percent(rung[key])))));
  const table = (heads, rows) => el("table", {}, el("thead", {}, el("tr", {}, heads.map((head) => el("th", { class: head === "setting" ? "" : "n" }, head)))), el("tbody", {}, rows));
  return el("div", {},
    el("h3", {}, `${study.name} · ${study.algorithm}`),
    el("p", { class: "muted" }, `${states.join(", ") || "no trial yet"} of ${number(study.target)} trials · ${short(study.hours)} GPU-hours, or process-hours without GPUs`),
    parallelCoordinates(study),
    el("div", { class: "two-columns" },
      el("div", {}, el("h3", {}, "Rungs"), rungs.length ? table(["epochs", "trials", "lowest %", "median %", "highest %"], rungs) : el("p", { class: "muted" }, "No trial has reached one.")),
      el("div", {}, el("h3", {}, "Importance of the settings (PED-ANOVA)"), bars.length ? table(["setting", "", "%"], bars) : el("p", { class: "muted" }, "Known once some trials have finished."))));
}

function drawSearches(searches) {
  $("searches").hidden = !searches.length;
  document.querySelector('nav a[href="#searches"]').hidden = !searches.length;
  $("searches-body").replaceChildren(...searches.map(searchDetails));
}
