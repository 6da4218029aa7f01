// What all parts of the page share: its elements, its language, what it remembers.

import { WORDS } from "./words.js";

export const $ = (id) => document.getElementById(id);

/** An element with properties, `data-` and `aria-` attributes, and children. */
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

/** A text in the page's language. */
export function say(name, values = {}) {
  return WORDS[language][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

export function speak(wanted) {
  language = WORDS[wanted] ? wanted : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : language;
  $("language").value = language;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", say(node.dataset.label));
}

export const spoken = () => language;

/** Kept in this browser, where it lets us. */
export function remember(name, value) {
  try {
    if (value) localStorage.setItem(name, value);
    else localStorage.removeItem(name);
  } catch {
    // a browser that keeps nothing
  }
}

export function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** JSON from the service, or an error whose message is for the person. */
export async function ask(address, options = {}) {
  let reply;
  try {
    reply = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(say("offline"));
  }
  if (reply.ok) return reply.json();
  const reason = await reply.json().catch(() => ({}));
  throw new Error(reason.error || say("failed", { status: reply.status }));
}
