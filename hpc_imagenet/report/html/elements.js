"use strict";
// Small functions that every part of the page uses. All text is inserted as text, never as HTML.

const $ = (id) => document.getElementById(id);

// el("td", {class: "n"}, "text", otherElement): text from runs can only become a text node.
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const number = (value, digits = 0) =>
  isNumber(value) ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : "";
const percent = (value, digits = 2) => (isNumber(value) ? (100 * value).toFixed(digits) : "");
const short = (value) => {
  if (!isNumber(value)) return "";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(1);
  return size >= 100 ? number(value) : String(Number(value.toPrecision(3)));
};

function duration(seconds) {
  if (!isNumber(seconds)) return "";
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

function moment(seconds) {
  const date = new Date(1000 * seconds);
  const two = (value) => String(value).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}`;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const COLOURS = 10;
const colour = (index) => css(`--c${index % COLOURS}`);

// resnet18 and resnet50 are one family, as are mobilenet_v2 and mobilenet_v3_small.
const family = (model) => (String(model).match(/^(wide_resnet|[a-z]+)/) || ["", "other"])[1];

function facts(rows) {
  const kept = rows.filter((row) => row && row[1] !== "" && row[1] !== null && row[1] !== undefined);
  return el("table", { class: "plain" }, el("tbody", {}, kept.map(([name, value]) =>
    el("tr", {}, el("td", { class: "muted" }, name), el("td", {}, value instanceof Node ? value : String(value))))));
}

function showTip(event, lines) {
  const tip = $("tip");
  if (!lines || !lines.length) return void (tip.hidden = true);
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const left = Math.min(event.pageX + 14, window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${event.pageY + 14}px`;
}
const hideTip = () => { $("tip").hidden = true; };
