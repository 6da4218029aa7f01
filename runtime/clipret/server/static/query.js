// The query as a person sees it, as the page's address, and as the service takes it.

import { $ } from "./page.js";

const MINUS = -0.5;

/**
 * A part is an image: of the gallery (`id`, `gallery`) or a person's own (`file`). `weight` is 1, or negative for what is
 * not wanted. `choices` are filters by column.
 */
export const query = { parts: [], choices: new Map() };

const fields = { q: "", minus: "", where: "", k: "40", gallery: "", compare: "" };

/** Fill the form from the page's address. */
export function fromAddress(address) {
  const given = new URLSearchParams(address);
  for (const [name, usual] of Object.entries(fields)) {
    const value = given.get(name) ?? usual;
    if ($(name).tagName === "SELECT" && ![...$(name).options].some((one) => one.value === value)) continue;
    $(name).value = value;
  }
  const gallery = $("gallery").value;
  const images = (name, weight) =>
    given.getAll(name).filter((id) => /^\d+$/.test(id)).map((id) => ({ id: Number(id), gallery, weight }));
  query.parts = [...images("like", 1), ...images("unlike", MINUS)];
  query.choices = new Map();
  for (const [name, value] of given) {
    try {
      if (name.startsWith("is.")) query.choices.set(name.slice(3), JSON.parse(value));
    } catch {
      // an address that somebody changed by hand
    }
  }
}

/** The page's address for the form as it is, without a person's own images. */
export function toAddress() {
  const given = new URLSearchParams();
  for (const [name, usual] of Object.entries(fields)) {
    const value = $(name).value.trim();
    if (value && value !== usual && !(name === "gallery" && $(name).selectedIndex === 0)) given.set(name, value);
  }
  for (const part of query.parts) if (part.id) given.append(part.weight > 0 ? "like" : "unlike", part.id);
  for (const [column, value] of query.choices) given.set(`is.${column}`, JSON.stringify(value));
  const text = given.toString();
  return text ? `?${text}` : location.pathname;
}

export const asksForSomething = () => Boolean($("q").value.trim() || query.parts.length);

/** The filter: what is chosen for columns, and what a person wrote. */
export function where() {
  const name = (text) => `"${text.replaceAll('"', '""')}"`;
  const literal = (value) => (typeof value === "number" ? String(value) : `'${String(value).replaceAll("'", "''")}'`);
  const parts = [...query.choices].map(([column, value]) => `${name(column)} = ${literal(value)}`);
  const written = $("where").value.trim();
  if (written) parts.push(parts.length ? `(${written})` : written);
  return parts.join(" and ");
}

/** The query for one gallery: the options of a request to POST search. */
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
    // Another gallery, perhaps of another model, does not know the image: it is shown it.
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
