// Shared by all parts of the page: elements, language, stored settings, requests.

import { WORDS } from "./words.js";

export const $ = (id) => document.getElementById(id);

/** Create an element with properties, `data-` and `aria-` attributes, and children. */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

let language = "en";

/** A text in the language of the page. */
export function say(name, values = {}) {
  return WORDS[language][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

/** Show all texts of the page in a language; English if it has no other. */
export function speak(code) {
  language = WORDS[code] ? code : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : language;
  $("language").value = language;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", say(node.dataset.label));
}

export const spoken = () => language;

/** Store a setting in this browser, if it allows that. */
export function remember(name, value) {
  try {
    if (value) localStorage.setItem(name, value);
    else localStorage.removeItem(name);
  } catch {
    // this browser stores nothing
  }
}

export function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** Request JSON from the service. Throws an error with a message for the user. */
export async function fetchJson(address, options = {}) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(say("offline"));
  }
  if (response.ok) return response.json();
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error || say("failed", { status: response.status }));
}
