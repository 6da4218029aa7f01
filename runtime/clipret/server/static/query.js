// The query as a form, as the URL of the page, and as a request to the service.

import { $ } from "./page.js";

const MINUS = -0.5;

/**
 * A part is an image of a gallery (`id`, `gallery`) or an uploaded one (`file`). `weight` is 1, or negative for images to
 * move away from. `choices` are the selected values by column.
 */
export const query = { parts: [], choices: new Map() };

const fields = { q: "", minus: "", where: "", k: "40", gallery: "", compare: "" };

/** Fill in the form from the URL of the page. */
export function fromAddress(address) {
  const parameters = new URLSearchParams(address);
  for (const [name, initial] of Object.entries(fields)) {
    const value = parameters.get(name) ?? initial;
    if ($(name).tagName === "SELECT" && ![...$(name).options].some((option) => option.value === value)) continue;
    $(name).value = value;
  }
  const gallery = $("gallery").value;
  const images = (name, weight) =>
    parameters.getAll(name).filter((id) => /^\d+$/.test(id)).map((id) => ({ id: Number(id), gallery, weight }));
  query.parts = [...images("like", 1), ...images("unlike", MINUS)];
  query.choices = new Map();
  for (const [name, value] of parameters) {
    try {
      if (name.startsWith("is.")) query.choices.set(name.slice(3), JSON.parse(value));
    } catch {
      // a URL that was edited by hand
    }
  }
}

/** The URL of the page for the current form, without uploaded images. */
export function toAddress() {
  const parameters = new URLSearchParams();
  for (const [name, initial] of Object.entries(fields)) {
    const value = $(name).value.trim();
    if (value && value !== initial && !(name === "gallery" && $(name).selectedIndex === 0)) parameters.set(name, value);
  }
  for (const part of query.parts) if (part.id) parameters.append(part.weight > 0 ? "like" : "unlike", part.id);
  for (const [column, value] of query.choices) parameters.set(`is.${column}`, JSON.stringify(value));
  const text = parameters.toString();
  return text ? `?${text}` : location.pathname;
}

export const hasQuery = () => Boolean($("q").value.trim() || query.parts.length);

/** The filter: the selected values of columns, and the expression in the form. */
export function where() {
  const name = (text) => `"${text.replaceAll('"', '""')}"`;
  const literal = (value) => (typeof value === "number" ? String(value) : `'${String(value).replaceAll("'", "''")}'`);
  const parts = [...query.choices].map(([column, value]) => `${name(column)} = ${literal(value)}`);
  const expression = $("where").value.trim();
  if (expression) parts.push(parts.length ? `(${expression})` : expression);
  return parts.join(" and ");
}

/** The query for one gallery, as the options of a request to POST search. */
export async function request(gallery, signal) {
  const files = [];
  const parts = [];
  const text = $("q").value.trim();
  const minus = $("minus").value.trim();
  if (text) parts.push({ text });
  if (minus) parts.push({ text: minus, weight: MINUS });
  for (const part of query.parts) {
    if (part.id && part.gallery === gallery) {
      parts.push({ id: part.id, weight: part.weight });
      continue;
    }
    // Another gallery, perhaps of another model, does not have the image: upload it.
    part.file ??= await (await fetch(image(part.id, part.gallery), { signal })).blob();
    parts.push({ image: files.length, weight: part.weight });
    files.push(part.file);
  }
  const exclude = query.parts.filter((part) => part.id && part.gallery === gallery).map((part) => part.id);
  const search = { queries: [{ parts }], k: Number($("k").value), gallery, where: where() || null, exclude };
  const json = JSON.stringify(search);
  if (!files.length) {
    return { method: "POST", headers: { "Content-Type": "application/json" }, body: json, signal };
  }
  const body = new FormData();
  body.append("search", json);
  for (const file of files) body.append("image", file, "image");
  return { method: "POST", body, signal };
}

export const image = (id, gallery) => `images/${id}?gallery=${encodeURIComponent(gallery)}`;

export const thumbnail = (id, gallery) => `thumbnails/${id}?gallery=${encodeURIComponent(gallery)}&side=160`;

export { MINUS };
