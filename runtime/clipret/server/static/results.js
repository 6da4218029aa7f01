// The results: lists of images in rows, navigated with the arrow keys.

import { layOut, vertical } from "./grid.js";
import { $, make, say } from "./page.js";

const ratios = new Map(); // aspect ratios by gallery and id, so that the next list does not jump
let shown = new Map(); // list items by gallery and id, so that images that stay are not loaded again
let waiting = false;

/**
 * Show one response of the service, or two to compare. `open(hits, number, gallery)` is called when the user opens an
 * image.
 */
export function show(responses, open) {
  const main = $("results");
  const before = shown;
  shown = new Map();
  const both = responses.length > 1;
  main.classList.toggle("both", both);
  const sections = responses.map((response, side) => {
    const hits = response.results[0].hits;
    const otherRanks = both ? ranks(responses[1 - side].results[0].hits) : null;
    const items = hits.map((hit, at) => {
      const key = `${response.gallery}/${hit.id}`;
      const item = before.get(key) ?? figure(hit, key, side);
      before.delete(key);
      shown.set(key, item);
      describe(item, hit, at, otherRanks, responses[1 - side]?.gallery, hits.length);
      item.firstChild.onclick = () => open(hits, at, response.gallery);
      return item;
    });
    const list = make("ol", {}, ...items);
    const section = make("section", { "aria-label": response.gallery });
    if (both) section.append(make("h2", {}, response.gallery));
    section.append(hits.length ? list : make("p", { className: "empty" }, say("empty")));
    return section;
  });
  const focused = document.activeElement?.closest?.("#results li")?.dataset.key;
  main.replaceChildren(...sections);
  if (focused) (shown.get(focused) ?? main.querySelector("li"))?.firstChild.focus();
  main.querySelectorAll("li").forEach((item, at) => (item.firstChild.tabIndex = at ? -1 : 0));
  arrange();
}

export function clear() {
  $("results").replaceChildren();
  shown = new Map();
}

/** The number of images that both responses have. Images are compared by their paths. */
export function common(responses) {
  const other = ranks(responses[1].results[0].hits);
  return responses[0].results[0].hits.filter((hit) => other.has(hit.path)).length;
}

const ranks = (hits) => new Map(hits.map((hit) => [hit.path, hit.rank]));

function figure(hit, key, side) {
  const image = make("img", { alt: "", decoding: "async", loading: "lazy" });
  image.addEventListener("load", () => {
    const ratio = image.naturalWidth / image.naturalHeight;
    if (Number(item.dataset.ratio) !== ratio) {
      item.dataset.ratio = ratio;
      ratios.set(key, ratio);
      soon();
    }
  });
  image.addEventListener("error", () => (image.alt = say("broken")));
  const size = devicePixelRatio > 1 ? 640 : 320;
  image.src = `${hit.thumbnail}&side=${size}`;
  const caption = make("span", { className: "caption" }, make("span"), make("span"));
  const item = make("li", { "data-key": key, "data-ratio": ratios.get(key) ?? 4 / 3, "data-side": side });
  item.append(make("button", { type: "button" }, image, caption));
  return item;
}

function describe(item, hit, at, otherRanks, name, count) {
  const [first, second] = item.querySelectorAll(".caption > span");
  const score = hit.score.toFixed(3);
  const rank = otherRanks?.get(hit.path);
  first.replaceChildren(make("b", {}, String(at + 1)), ` ${score} `);
  if (otherRanks) first.append(rank ? `· ${say("other", { rank, name })}` : `· ${say("nowhere", { count, name })}`);
  const values = Object.entries(hit.metadata).filter(([, value]) => value !== null);
  second.textContent = [hit.path.split("/").pop(), ...values.map(([, value]) => value)].join(" · ");
  second.title = hit.path;
  item.classList.toggle("only", Boolean(otherRanks) && !rank);
  item.firstChild.setAttribute("aria-label", `${hit.path}, ${say("rank", { rank: at + 1, score })}`);
}

export function arrange() {
  for (const list of document.querySelectorAll("#results ol")) layOut(list);
}

function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    arrange();
  });
}

/** Move the focus between images with the arrow keys, Home and End. */
export function walk(event) {
  const from = event.target.closest("#results li");
  if (!from) return;
  const items = [...from.parentNode.children];
  const at = items.indexOf(from);
  const to = {
    ArrowRight: () => items[at + 1],
    ArrowLeft: () => items[at - 1],
    ArrowDown: () => vertical(items, from, true),
    ArrowUp: () => vertical(items, from, false),
    Home: () => items[0],
    End: () => items[items.length - 1],
  }[event.key]?.();
  if (event.key === "ArrowUp" && !to) $("q").focus();
  if (!to) return;
  event.preventDefault();
  document.querySelectorAll("#results li > button").forEach((button) => (button.tabIndex = -1));
  to.firstChild.tabIndex = 0;
  to.firstChild.focus();
}
