// The images found: lists of figures, laid out in rows, walked through with the arrow keys.

import { layOut, vertical } from "./grid.js";
import { $, make, say } from "./page.js";

const ratios = new Map(); // of images seen, by gallery and id: the next list does not jump
let shown = new Map(); // list items by gallery and id: an image that stays is not loaded again
let waiting = false;

/**
 * Show what was found: `results` holds one answer of the service, or two to be compared. `open(hits, at)` is called for a
 * image that a person chooses.
 */
export function show(results, open) {
  const main = $("found");
  const before = shown;
  shown = new Map();
  const both = results.length > 1;
  main.classList.toggle("both", both);
  const sections = results.map((result, side) => {
    const hits = result.results[0].hits;
    const other = both ? places(results[1 - side].results[0].hits) : null;
    const items = hits.map((hit, at) => {
      const key = `${result.gallery}/${hit.id}`;
      const item = before.get(key) ?? figure(hit, key, side);
      before.delete(key);
      shown.set(key, item);
      describe(item, hit, at, other, results[1 - side]?.gallery, hits.length);
      item.firstChild.onclick = () => open(hits, at, result.gallery);
      return item;
    });
    const list = make("ol", {}, ...items);
    const section = make("section", { "aria-label": result.gallery });
    if (both) section.append(make("h2", {}, result.gallery));
    section.append(hits.length ? list : make("p", { className: "empty" }, say("empty")));
    return section;
  });
  const focused = document.activeElement?.closest?.("#found li")?.dataset.key;
  main.replaceChildren(...sections);
  if (focused) (shown.get(focused) ?? main.querySelector("li"))?.firstChild.focus();
  main.querySelectorAll("li").forEach((item, at) => (item.firstChild.tabIndex = at ? -1 : 0));
  arrange();
}

export function clear() {
  $("found").replaceChildren();
  shown = new Map();
}

/** How many of the first list's images the second holds too. Galleries are compared by their images' paths. */
export function common(results) {
  const other = places(results[1].results[0].hits);
  return results[0].results[0].hits.filter((hit) => other.has(hit.path)).length;
}

const places = (hits) => new Map(hits.map((hit) => [hit.path, hit.rank]));

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

function describe(item, hit, at, other, name, count) {
  const [first, second] = item.querySelectorAll(".caption > span");
  const score = hit.score.toFixed(3);
  const place = other?.get(hit.path);
  first.replaceChildren(make("b", {}, String(at + 1)), ` ${score} `);
  if (other) first.append(place ? `· ${say("other", { rank: place, name })}` : `· ${say("nowhere", { count, name })}`);
  const values = Object.entries(hit.metadata).filter(([, value]) => value !== null);
  second.textContent = [hit.path.split("/").pop(), ...values.map(([, value]) => value)].join(" · ");
  second.title = hit.path;
  item.classList.toggle("only", Boolean(other) && !place);
  item.firstChild.setAttribute("aria-label", `${hit.path}, ${say("rank", { rank: at + 1, score })}`);
}

export function arrange() {
  for (const list of document.querySelectorAll("#found ol")) layOut(list);
}

function soon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    arrange();
  });
}

/** Arrow keys, Home and End, from image to image. */
export function walk(event) {
  const from = event.target.closest("#found li");
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
  document.querySelectorAll("#found li > button").forEach((button) => (button.tabIndex = -1));
  to.firstChild.tabIndex = 0;
  to.firstChild.focus();
}
