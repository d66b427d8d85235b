"use strict";
// One run in detail, the timeline, the data, and the sources.

function runDetails(run, data) {
  const best = isNumber(run.top1) ? `${percent(run.top1)} %` : "";
  const published = isNumber(run.published_top1)
    ? `${percent(run.published_top1)} % (${run.published_protocol}; ${run.published_same_protocol ? "the same protocol" : "another protocol"})` : "";
  const wait = run.bottleneck.waiting;
  const bottleneck = isNumber(wait)
    ? `${run.bottleneck.bottleneck === "input_bound" ? "input-bound" : "compute-bound"}: waits for data ${percent(wait, 0)} % of the time`
      + (run.bottleneck.suggestion ? `; ${run.bottleneck.suggestion} would fix it` : "") : "";
  const settings = Object.entries(run.config);
  return [
    el("h3", {}, run.run),
    el("div", { class: "two-columns" },
      el("div", {}, facts([
        ["state", el("span", {}, el("b", {}, stateText(run)), run.reason && !run.diagnosis?.text ? `: ${run.reason}` : "")],
        ["diagnosis", run.diagnosis?.text], ["remedy", run.diagnosis?.command], ["advice", run.advice],
        ["top-1", best], ["published", published], ["top-5", isNumber(run.top5) ? `${percent(run.top5)} %` : ""],
        ["val loss", short(run.loss)], ["datastore", run.datastore], ["seed", run.seed], ["epochs", run.epochs],
        ["parameters", number(run.parameters)], ["GPU-hours", run.gpu_hours ? number(run.gpu_hours, 2) : ""],
        ["GPU-hours per point of top-1", short(run.gpu_hours_per_point)],
        ["energy", isNumber(run.kwh) ? `${short(run.kwh)} kWh of its ${run.energy_of}` : ""], ["kWh per point of top-1", short(run.kwh_per_point)],
        ["running for", duration(3600 * run.hours)], ["images/s", number(run.images_per_second)], ["bottleneck", bottleneck],
        ["sweep", run.sweeps.join(", ")], ["created", run.created], ["folder", run.dir],
      ])),
      el("div", {},
        el("h3", {}, "Settings that differ from most trainings"),
        settings.length ? el("table", { class: "plain" },
          el("thead", {}, el("tr", {}, el("th", {}, "setting"), el("th", {}, "here"), el("th", {}, "most frequent"))),
          el("tbody", {}, settings.map(([name, value]) =>
            el("tr", {}, el("td", {}, name), el("td", {}, value), el("td", { class: "muted" }, data.shared[name])))))
          : el("p", { class: "muted" }, "None."))),
    el("h3", {}, "Attempts"),
    attemptTable(run.attempts),
    ...evaluationDetails(run),
    ...badBatch(run),
    ...classDetails(run, data),
  ];
}

function attemptTable(attempts) {
  const rows = attempts.map((attempt) => {
    const spent = (kinds) => attempt.parts.filter((part) => kinds.includes(part[0])).reduce((sum, part) => sum + part[2] - part[1], 0);
    const requeues = attempt.parts.filter((part) => part[0] === "requeued").length;
    return el("tr", {}, el("td", {}, String(attempt.number)),
      el("td", {}, el("span", { class: `state-${attempt.state}` }, attempt.state), attempt.reason ? el("span", { class: "sub" }, attempt.reason) : null),
      el("td", {}, [attempt.executor, attempt.job].filter(Boolean).join(" ")), el("td", {}, attempt.hosts.join(", ")),
      el("td", {}, duration(spent(["queued", "requeued"]))), el("td", {}, duration(spent(["running"]))), el("td", {}, requeues ? String(requeues) : ""),
      el("td", {}, attempt.code));
  });
  const heads = ["attempt", "state", "job", "nodes", "queued", "running", "requeues", "code"];
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", {}, head)))), el("tbody", {}, rows)));
}

function badBatch(run) {
  if (!run.bad_batch?.images.length) return [];
  const { images, total, note } = run.bad_batch;
  return [el("h3", {}, `Images of the step whose loss was not finite: ${images.length < total ? `${images.length} of ${total}` : total}`),
    note ? el("p", { class: "muted" }, note) : null,
    el("div", { class: "named-images" }, images.map(([name, uri]) => el("figure", {},
      uri ? el("img", { src: uri, alt: name, loading: "lazy" }) : null, el("figcaption", {}, name))))].filter(Boolean);
}

function evaluationDetails(run) {
  if (!run.evaluations.length) return [];
  const rows = run.evaluations.map((each) => el("tr", {}, el("td", {}, each.name), el("td", {}, each.datastore), el("td", {}, each.checkpoint), el("td", { class: "n" }, number(each.step)),
    el("td", {}, el("span", { class: `state-${each.state}` }, each.state), each.reason ? el("span", { class: "sub" }, each.reason) : null),
    el("td", { class: "n" }, percent(each.top1)), el("td", { class: "n" }, percent(each.top5)), el("td", { class: "n" }, short(each.loss)), el("td", {}, each.run)));
  const heads = ["evaluated on", "datastore", "checkpoint", "step", "state", "top-1 %", "top-5 %", "loss", "run"];
  return [el("h3", {}, "Evaluations"), el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { class: /%|loss|step/.test(head) && "n" }, head)))), el("tbody", {}, rows)))];
}

function classDetails(run, data) {
  if (!run.classes) return [];
  const store = data.datastores[run.datastore] || {}, names = store.names || [], thumbnails = store.thumbnails || {};
  const className = (label) => (names[label] ? names[label][1] || names[label][0] : `class ${label}`);
  const images = (label) => (thumbnails[label] || []).map((uri) => el("img", { src: uri, alt: `val image of ${className(label)}`, loading: "lazy" }));
  const most = Math.max(1, ...run.classes.histogram), bins = run.classes.histogram.length;
  const bars = run.classes.histogram.map((count, bin) => {
    const bar = el("div", { title: `${count} classes from ${(100 * bin) / bins} to ${(100 * (bin + 1)) / bins} %` });
    bar.style.height = `${(100 * count) / most}%`;
    return bar;
  });
  const cards = run.classes.worst.map(([label, top1, total, confused]) => el("div", { class: "class" },
    el("h4", {}, `${className(label)} · ${percent(top1, 0)} %`),
    el("p", { class: "muted" }, `${names[label] ? names[label][0] : ""} · ${total} val images`),
    el("div", { class: "thumbs" }, images(label)),
    confused.length ? el("p", {}, "confused with ", confused.map(([other, count], index) =>
      `${index ? " · " : ""}${className(other)} (${count}${total ? `, ${Math.round((100 * count) / total)} %` : ""})`)) : el("p", { class: "muted" }, "confused classes: not recorded"),
    confused.length ? el("div", { class: "thumbs" }, images(confused[0][0])) : null));
  return [
    el("h3", {}, "Accuracy per class"),
    el("div", { class: "bars", role: "img", "aria-label": "number of classes by accuracy, from 0 to 100 %" }, bars),
    el("div", { class: "axis" }, el("span", {}, "0 %"), el("span", {}, "number of classes by top-1"), el("span", {}, "100 %")),
    el("h3", {}, "Worst classes, with val images of each and of the class most often predicted instead"),
    cards.length ? el("div", { class: "classes" }, cards) : el("p", { class: "muted" }, "None: every class is at 100 %."),
    run.classes.top1 ? allClasses(run, names) : null,
  ].filter(Boolean);
}

function allClasses(run, names) {
  const details = el("details", { class: "no-print" }, el("summary", {}, `All ${run.classes.top1.length} classes`));
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const rows = run.classes.top1.map((top1, label) => [top1, label]).sort((a, b) => (a[0] ?? 1e9) - (b[0] ?? 1e9));
    details.append(el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, ["top-1 %", "label", "id", "names"].map((head) => el("th", {}, head)))),
      el("tbody", {}, rows.map(([top1, label]) => el("tr", {}, el("td", {}, top1 === null ? "" : (top1 / 10).toFixed(1)),
        el("td", {}, String(label)), el("td", {}, names[label]?.[0]), el("td", {}, names[label]?.[1])))))));
  });
  return details;
}

const PART_NAMES = [["queued", "queued"], ["running", "running"], ["requeued", "in the queue again"],
  ["finished", "ran and finished"], ["failed", "ran and failed"], ["cancelled", "ran and was cancelled"], ["pruned", "ran and was pruned"]];

// Rows of {name, attempts}; the last running part has the colour of the attempt's end.
function timeline(rows, onOpen) {
  const parts = rows.flatMap((row) => row.attempts.flatMap((attempt) => attempt.parts));
  if (!parts.length) return el("p", { class: "empty" }, "No attempt has been recorded.");
  const from = Math.min(...parts.map((part) => part[1])), to = Math.max(from + 1, ...parts.map((part) => part[2]));
  const lanes = rows.flatMap((row) => {
    const lane = el("div", { class: "lane" });
    for (const attempt of row.attempts) {
      attempt.parts.forEach((part, index) => {
        const last = part[0] === "running" && index === attempt.parts.length - 1;
        const kind = last && ["finished", "failed", "cancelled", "pruned"].includes(attempt.state) ? attempt.state : part[0];
        const bar = el("div", { class: `part-${kind}` });
        bar.style.left = `${(100 * (part[1] - from)) / (to - from)}%`;
        bar.style.width = `${(100 * (part[2] - part[1])) / (to - from)}%`;
        const lines = [`${row.name}, attempt ${attempt.number}: ${kind}`, `${moment(part[1])} to ${moment(part[2])}, ${duration(part[2] - part[1])}`, attempt.hosts.join(", "), last ? attempt.reason : ""];
        bar.addEventListener("mousemove", (event) => showTip(event, lines.filter(Boolean)));
        bar.addEventListener("mouseleave", hideTip);
        lane.append(bar);
      });
    }
    const who = row.run ? el("button", { class: "name", type: "button", onclick: () => onOpen(row.run) }, row.name) : row.name;
    return [el("div", { class: "who", title: row.name }, who), lane];
  });
  return el("div", {}, el("div", { class: "lanes" }, lanes, el("span", {}), el("div", { class: "axis" }, el("span", {}, moment(from)), el("span", {}, moment(to)))));
}

function dataDetails(name, store) {
  const certificate = store.certificate;
  const parts = [el("h3", {}, name)];
  if (store.note) parts.push(el("p", { class: "state-failed" }, store.note));
  const splits = Object.keys(store.images || {});
  const range = (values) => (Array.isArray(values) ? values.map((value) => number(value)).join(" · ") : "");
  const rows = [["images", (split) => number(store.images[split])]];
  if (certificate) {
    rows.push(["bytes", (split) => number(certificate.bytes?.[split])],
      ["images of a class: minimum · median · maximum", (split) => range(certificate.per_class?.[split])],
      ["width, px", (split) => range(certificate.sizes?.[split]?.width)],
      ["height, px", (split) => range(certificate.sizes?.[split]?.height)],
      ["bytes of an image", (split) => range(certificate.sizes?.[split]?.bytes)]);
    const flags = [...new Set(splits.flatMap((split) => Object.keys(certificate.oddities?.[split] || {})))];
    for (const flag of flags) rows.push([`unusual: ${flag}`, (split) => number(certificate.oddities[split]?.[flag] || 0)]);
  }
  if (splits.length) {
    parts.push(el("div", { class: "scroll" }, el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, el("th", {}, ""), splits.map((split) => el("th", { class: "n" }, split)))),
      el("tbody", {}, rows.map(([label, value]) => el("tr", {}, el("td", { class: "muted" }, label), splits.map((split) => el("td", { class: "n" }, value(split)))))))));
  }
  const settings = (values) => Object.entries(values || {}).map(([key, value]) => `${key} ${value}`).join(", ");
  parts.push(facts([
    ["stored at", store.url], ["version", store.version], ["created", store.created], ["classes", number(store.classes)],
    ["content", certificate?.content], ["source", certificate?.source],
    ...Object.entries(certificate?.archives || {}).map(([file, md5]) => [`MD5 of ${file}`, md5]),
    ["processed with", settings(certificate?.process)], ["tools", settings(certificate?.tools)], ["files", number(certificate?.files)],
    ["corrupt images left out", certificate?.skipped_images ? `${certificate.skipped_images}: ${certificate.skipped.join(", ")}` : ""],
  ]));
  if (!certificate && !store.note) parts.push(el("p", { class: "muted" }, "This version has no certificate."));
  return el("div", {}, parts);
}

function sources(runs) {
  const used = new Map();
  for (const run of runs) if (run.citation) used.set(`${run.model}|${run.published_protocol}`, run);
  if (!used.size) return el("p", { class: "muted" }, "No training here has a published counterpart: they are listed for ImageNet, from random weights.");
  const rows = [...used.values()].sort((a, b) => a.model.localeCompare(b.model));
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ["model", "top-1 %", "published by", "source"].map((head) => el("th", {}, head)))),
    el("tbody", {}, rows.map((run) => el("tr", {}, el("td", {}, run.model), el("td", {}, percent(run.published_top1)), el("td", {}, run.published_protocol),
      el("td", {}, el("a", { href: run.citation, rel: "noreferrer" }, run.citation)))))));
}
