"use strict";
// Charts with BokehJS: scatter plots of all trainings, and learning curves of the chosen ones.

const charts = { scatter: [], curves: [], printing: false };
const CHART_HEIGHT = 260;
const HAS_PLOTS = typeof Bokeh !== "undefined"; // false where the page was written without the package bokeh
const PLOTS_MISSING = "No plots: this page was written without Bokeh. pip install -c constraints.txt -e '.[report]'";

function chartWidth(holder) {
  return Math.max(220, holder.clientWidth);
}

function destroyAll(list) {
  for (const chart of list) {
    chart.ended = true;
    chart.view?.remove();
  }
  list.length = 0;
}

function chartBox(holder, title) {
  const box = el("div", { class: "chart" }, el("h3", {}, title));
  holder.append(box);
  // Bokeh's events have no place on the page, which the tip needs.
  box.addEventListener("pointermove", (event) => { box.at = { pageX: event.pageX, pageY: event.pageY }; }, true);
  box.addEventListener("mouseleave", hideTip);
  return box;
}

// An empty figure in the colours of the theme: drag enlarges, a double click resets.
function figure(box, height, options) {
  const plot = Bokeh.Plotting.figure({
    width: chartWidth(box), height, tools: "box_zoom,reset", toolbar_location: null, background_fill_color: null,
    border_fill_color: null, outline_line_color: css("--grid"), min_border_right: 12, lod_threshold: null, ...options,
  });
  const text = { axis_label_text_color: css("--muted"), major_label_text_color: css("--muted") };
  const font = { axis_label_text_font_size: "11px", axis_label_text_font_style: "normal", major_label_text_font_size: "11px" };
  const lines = { axis_line_color: css("--grid"), major_tick_line_color: css("--grid"), minor_tick_line_color: null };
  for (const axis of [...plot.below, ...plot.left]) axis.setv({ ...text, ...font, ...lines });
  for (const grid of plot.center) if ("grid_line_color" in grid) grid.setv({ grid_line_color: css("--grid") });
  plot.on_event("doubletap", () => plot.reset.emit());
  return plot;
}

// Ticks of a logarithmic axis: 1, 2 and 5 times the powers of ten; over many decades fewer.
function logTicker({ start, end }) {
  const factors = end / start > 300 ? [1] : end / start > 30 ? [1, 3] : [1, 2, 5], ticks = [];
  for (let power = Math.floor(Math.log10(start)); power <= Math.log10(end); power++) {
    for (const factor of factors) ticks.push(Number((factor * 10 ** power).toPrecision(1)));
  }
  return new Bokeh.FixedTicker({ ticks });
}

// Draw a figure. `list` holds it until destroyAll; drawing goes on after this function has returned.
function show(list, box, plot) {
  const chart = { plot, box, ended: false, view: null };
  list.push(chart);
  chart.drawn = Bokeh.Plotting.show(plot, box).then((view) => {
    chart.view = view;
    if (chart.ended) view.remove();
  });
}

// When all charts have been drawn.
const allDrawn = () => Promise.all([...charts.scatter, ...charts.curves].map((chart) => chart.drawn));

// One point a run: x is a positive number on a logarithmic axis, y the top-1 in percent.
// `published`: points of the publications, drawn as rings, [{x, y, label}].
function scatterPlot(holder, title, xLabel, points, published, families, onOpen) {
  const box = chartBox(holder, title), all = [...points, ...published];
  if (!points.length) return void box.append(el("p", { class: "empty" }, "No finished training has both values."));
  if (!HAS_PLOTS) return void box.append(el("p", { class: "empty" }, PLOTS_MISSING));
  const xs = all.map((point) => point.x), ys = all.map((point) => point.y);
  const bottom = Math.min(...ys), top = Math.max(...ys), room = Math.max(1, 0.06 * (top - bottom));
  // A little room, so that no point is cut off.
  const plot = figure(box, CHART_HEIGHT + 40, {
    x_axis_type: "log", x_axis_label: xLabel, y_axis_label: "top-1, %",
    x_range: [Math.min(...xs) / 1.35, Math.max(...xs) * 1.35], y_range: [Math.max(0, bottom - room), Math.min(102, top + room)],
  });
  const ticker = logTicker(plot.x_range);
  plot.below[0].setv({ ticker, formatter: new Bokeh.BasicTickFormatter({ use_scientific: false }) });
  plot.center[0].setv({ ticker });
  families.forEach((name, index) => {
    const group = points.filter((point) => point.family === name);
    plot.scatter(group.map((point) => point.x), group.map((point) => point.y), { size: 8, color: colour(index) });
  });
  plot.scatter(published.map((point) => point.x), published.map((point) => point.y), { size: 10, line_width: 2, line_color: css("--muted"), fill_color: null });
  show(charts.scatter, box, plot);
  const nearest = (event) => {
    const { x_range: xr, y_range: yr } = plot;
    const px = plot.inner_width / Math.log(xr.end / xr.start), py = plot.inner_height / (yr.end - yr.start);
    let best = null, bestDistance = 24 ** 2;
    for (const point of all) {
      const distance = (px * Math.log(point.x / event.x)) ** 2 + (py * (point.y - event.y)) ** 2;
      if (distance < bestDistance) [best, bestDistance] = [point, distance];
    }
    return best;
  };
  plot.on_event("mousemove", (event) => showTip(box.at, nearest(event)?.lines));
  plot.on_event("tap", (event) => { const point = nearest(event); if (point?.run) onOpen(point.run); });
}

// Curves of several runs against the epoch. `curves`: [{name, x, y, colour, dash}].
function curvePlot(holder, title, yLabel, curves, scale = {}) {
  const kept = curves.filter((curve) => curve.y && curve.y.some(isNumber));
  if (!kept.length) return;
  const box = chartBox(holder, title);
  if (!HAS_PLOTS) return void box.append(el("p", { class: "empty" }, PLOTS_MISSING));
  const values = kept.flatMap((curve) => curve.y.filter(isNumber)), highest = Math.max(...values);
  const plot = figure(box, CHART_HEIGHT, {
    x_axis_label: "epoch", y_axis_label: yLabel, x_range: [0, Math.max(...kept.flatMap((curve) => curve.x)) || 1],
    ...(scale.fromZero ? { y_range: [0, Math.max(scale.least || 0, 1.08 * highest) || 1] } : {}),
  });
  for (const curve of kept) {
    const known = curve.x.map((x, index) => [x, curve.y[index]]).filter((pair) => isNumber(pair[1]));
    const [x, y] = [known.map((pair) => pair[0]), known.map((pair) => pair[1])];
    plot.line(x, y, { line_color: colour(curve.colour), line_width: 1.5, line_dash: curve.dash || [] });
    if (x.length < 2) plot.scatter(x, y, { size: 6, color: colour(curve.colour) });
  }
  // All curves are enlarged together.
  plot.x_range.change.connect(() => {
    const { start, end } = plot.x_range;
    for (const other of charts.curves) if (other.plot !== plot) other.plot.x_range.setv({ start, end });
  });
  show(charts.curves, box, plot);
  plot.on_event("mousemove", (event) => {
    const lines = kept.map((curve) => {
      let at = curve.x.findLastIndex((x, index) => x <= event.x && isNumber(curve.y[index]));
      if (at < 0) at = curve.y.findIndex(isNumber);
      return [curve.y[at], `${curve.name}: ${short(curve.y[at])}`];
    }).sort((a, b) => b[0] - a[0]).map((pair) => pair[1]);
    showTip(box.at, [`epoch ${short(Math.max(0, event.x))}`, ...lines.slice(0, 12)]);
  });
}

// Put copies of the charts beside them for the printer: Bokeh draws later than a printed page is made.
// On paper the theme is light; the style sheet inverts copies of charts in dark colours.
function copyForPrint(dark) {
  for (const chart of [...charts.scatter, ...charts.curves]) {
    const copy = chart.view?.export("png", true).canvas;
    if (!copy) continue;
    copy.setAttribute("class", dark ? "for-print inverted" : "for-print");
    copy.removeAttribute("style");
    chart.box.append(copy);
  }
}

function resizeCharts() {
  for (const chart of [...charts.scatter, ...charts.curves]) chart.plot.width = chartWidth(chart.box);
}
