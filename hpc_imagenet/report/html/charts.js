"use strict";
// Charts with uPlot: scatter plots of all trainings, and learning curves of the chosen ones.

const charts = { scatter: [], curves: [], printing: false };
const CHART_HEIGHT = 260;

function chartWidth(holder) {
  return charts.printing ? 330 : Math.max(220, holder.clientWidth);
}

function axis(label, values, size) {
  return {
    label, values, size, labelSize: 18, font: "11px system-ui, sans-serif", labelFont: "11px system-ui, sans-serif",
    stroke: () => css("--muted"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: { stroke: () => css("--grid"), width: 1 },
  };
}
const tickLabels = (_, splits) => splits.map((value) => (value === null ? "" : short(value)));

// Labels of a logarithmic axis: 1, 2 and 5 times the powers of ten; over many decades only the powers.
function logSplits(_, __, min, max) {
  const factors = max / min > 300 ? [1] : max / min > 30 ? [1, 3] : [1, 2, 5], splits = [];
  for (let power = Math.floor(Math.log10(min)); power <= Math.log10(max); power++) {
    for (const factor of factors) splits.push(Number((factor * 10 ** power).toPrecision(1)));
  }
  const inside = splits.filter((value) => value >= min && value <= max);
  return inside.length > 1 ? inside : [min, Math.sqrt(min * max), max];
}

function destroyAll(list) {
  for (const chart of list) chart.destroy();
  list.length = 0;
}

function chartBox(holder, title) {
  const box = el("div", { class: "chart" }, el("h3", {}, title));
  holder.append(box);
  return box;
}

// One point a run: x is a positive number on a logarithmic axis, y the top-1 in percent.
// `published`: points of the publications, drawn as rings, [{x, y, label}].
function scatterPlot(holder, title, xLabel, points, published, families, onOpen) {
  const box = chartBox(holder, title);
  if (!points.length) return void box.append(el("p", { class: "empty" }, "No finished training has both values."));
  const all = [...points, ...published].sort((a, b) => a.x - b.x);
  const xs = all.map((point) => point.x);
  const groups = [...families, null];
  const data = [xs, ...groups.map((name) => all.map((point) => ((point.family ?? null) === name ? point.y : null)))];
  const series = groups.map((name, index) => ({
    label: name ?? "published",
    paths: () => null,
    points: {
      show: true, size: name === null ? 9 : 7, width: name === null ? 2 : 1,
      stroke: name === null ? css("--muted") : colour(index), fill: name === null ? "transparent" : colour(index),
    },
  }));
  // A little room, so that no point is cut off.
  const low = xs[0] / 1.35, high = xs[xs.length - 1] * 1.35;
  const ys = all.map((point) => point.y), bottom = Math.min(...ys), top = Math.max(...ys);
  const room = Math.max(1, 0.06 * (top - bottom));
  const chart = new uPlot({
    width: chartWidth(box), height: CHART_HEIGHT + 40, series: [{}, ...series],
    legend: { show: false }, cursor: { points: { show: false }, drag: { x: true, y: true, uni: 20 } },
    scales: { x: { time: false, distr: 3, log: 10, range: (_, min, max) => (min === xs[0] && max === xs[xs.length - 1] ? [low, high] : [min, max]) },
      y: { range: (_, min, max) => (min === bottom && max === top ? [Math.max(0, bottom - room), Math.min(100, top + room)] : [min, max]) } },
    axes: [{ ...axis(xLabel, tickLabels, 36), splits: logSplits, filter: (_, splits) => splits }, axis("top-1, %", tickLabels, 44)],
  }, data, box);
  charts.scatter.push(chart);
  const nearest = (event) => {
    const left = event.offsetX, up = event.offsetY;
    let best = null, bestDistance = 24 ** 2;
    for (const point of all) {
      const distance = (chart.valToPos(point.x, "x") - left) ** 2 + (chart.valToPos(point.y, "y") - up) ** 2;
      if (distance < bestDistance) [best, bestDistance] = [point, distance];
    }
    return best;
  };
  chart.over.addEventListener("mousemove", (event) => showTip(event, nearest(event)?.lines));
  chart.over.addEventListener("mouseleave", hideTip);
  chart.over.addEventListener("click", (event) => { const point = nearest(event); if (point?.run) onOpen(point.run); });
}

// Curves of several runs against the epoch. `curves`: [{name, x, y, colour, dash}].
function curvePlot(holder, title, yLabel, curves, scale = {}) {
  const kept = curves.filter((curve) => curve.y && curve.y.some(isNumber));
  if (!kept.length) return;
  const box = chartBox(holder, title);
  const data = uPlot.join(kept.map((curve) => [curve.x, curve.y]));
  const single = Math.max(...kept.map((curve) => curve.x.length)) < 2;
  const chart = new uPlot({
    width: chartWidth(box), height: CHART_HEIGHT, legend: { show: false },
    series: [{}, ...kept.map((curve) => ({
      label: curve.name, stroke: colour(curve.colour), width: 1.5, dash: curve.dash, spanGaps: true,
      points: { show: single, size: 5 },
    }))],
    cursor: { sync: { key: "epochs", scales: ["x", null] }, points: { size: 5 } },
    scales: { x: { time: false }, y: scale },
    axes: [axis("epoch", tickLabels, 36), axis(yLabel, tickLabels, 50)],
  }, data, box);
  charts.curves.push(chart);
  chart.over.addEventListener("mousemove", (event) => {
    const at = chart.cursor.idx;
    if (at === null || at === undefined) return hideTip();
    const lines = kept.map((curve, index) => {
      const values = chart.data[index + 1];
      let near = at; // the other runs have points at other epochs
      while (near > 0 && !isNumber(values[near])) near--;
      return isNumber(values[near]) ? [values[near], `${curve.name}: ${short(values[near])}`] : null;
    }).filter(Boolean).sort((a, b) => b[0] - a[0]).map((pair) => pair[1]);
    showTip(event, [`epoch ${short(chart.data[0][at])}`, ...lines.slice(0, 12)]);
  });
  chart.over.addEventListener("mouseleave", hideTip);
}

function resizeCharts() {
  for (const chart of [...charts.scatter, ...charts.curves]) {
    chart.setSize({ width: chartWidth(chart.root.parentElement), height: chart.height });
  }
}
