// The page: a form that searches at every change, and the results.

import { $, fetchJson, make, recall, remember, say, speak, spoken } from "./page.js";
import { MINUS, fromAddress, hasQuery, query, request, thumbnail, toAddress } from "./query.js";
import { arrange, clear, common, show, walk } from "./results.js";
import { prepare, view } from "./viewer.js";

const PAUSE = 130; // milliseconds after the last key until the search
const MAX_SIZE = 30; // MB of an image; the service accepts slightly more

let galleries = [];
let last = []; // the responses that are shown
let pending = null;
let timer = 0;

async function search(push = false) {
  clearTimeout(timer);
  pending?.abort();
  const control = (pending = new AbortController());
  history[push ? "pushState" : "replaceState"](null, "", toAddress());
  document.title = $("q").value.trim() ? `${$("q").value.trim()} · clipret` : "clipret";
  if (!hasQuery()) {
    showStart();
    return;
  }
  $("results").setAttribute("aria-busy", "true");
  const began = performance.now();
  const names = [$("gallery").value, $("compare").value].filter((name, at) => at === 0 || name);
  try {
    const responses = await Promise.all(
      names.map(async (name) => fetchJson("search", await request(name, control.signal))),
    );
    if (control !== pending) return;
    last = responses;
    explain(null);
    show(responses, view);
    report(Math.round(performance.now() - began));
  } catch (error) {
    if (control !== pending || error.name === "AbortError") return;
    explain(error.message);
  }
  $("results").removeAttribute("aria-busy");
}

const later = () => {
  clearTimeout(timer);
  timer = setTimeout(search, PAUSE);
};

/** Show how to search, while there is no query. */
function showStart() {
  last = [];
  clear();
  explain(null);
  $("results").removeAttribute("aria-busy");
  const total = galleries.find((gallery) => gallery.name === $("gallery").value)?.images ?? 0;
  const filtered = $("where").value.trim() || query.choices.size;
  $("status").textContent = filtered ? say("startFilter") : say("start", { total: total.toLocaleString(spoken()) });
}

function report(ms) {
  const [left, right] = last;
  const count = left.results[0].hits.length;
  const total = left.images.toLocaleString(spoken());
  if (right) {
    const names = { left: left.gallery, right: right.gallery };
    $("status").textContent = say("foundBoth", { ...names, common: common(last), count });
  } else {
    $("status").textContent = count ? say("found", { count, total, ms }) : say("empty");
  }
}

/** Show an error until the next success. The previous results stay. */
function explain(reason) {
  $("error").hidden = !reason;
  $("error").textContent = reason ?? "";
}

function showChips() {
  $("chips").replaceChildren(
    ...query.parts.map((part, at) => {
      const name = part.name ?? (part.id ? `#${part.id}` : "");
      const text = part.uploaded ? say("uploaded", { name }) : say(part.weight > 0 ? "like" : "unlike", { name });
      const drop = make("button", { type: "button", "aria-label": say("removePart", { name }) }, "×");
      drop.onclick = () => {
        if (part.uploaded) URL.revokeObjectURL(part.address);
        query.parts.splice(at, 1);
        showChips();
        $("q").focus();
        search(true);
      };
      const image = make("img", { alt: "", src: part.address ?? thumbnail(part.id, part.gallery) });
      return make("li", {}, image, make("span", { dir: "auto" }, text), drop);
    }),
  );
}

function add(part) {
  query.parts.push(part);
  showChips();
  search(true);
}

/** Search with an image that was dropped, pasted or selected; it replaces an earlier one. */
function take(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    explain(say("notImage", { name: file.name }));
    return;
  }
  if (file.size > MAX_SIZE * 1e6) {
    explain(say("tooLarge", { name: file.name, size: Math.ceil(file.size / 1e6) }));
    return;
  }
  query.parts = query.parts.filter((part) => !part.uploaded);
  add({ file, uploaded: true, weight: 1, name: file.name, address: URL.createObjectURL(file) });
}

/** "More like this" replaces the query, "less like this" is added to it. */
function like(hit, gallery, weight) {
  const part = { id: hit.id, gallery, weight, name: hit.path.split("/").pop() };
  if (weight > 0) {
    query.parts = [];
    $("q").value = $("minus").value = "";
  }
  query.parts = query.parts.filter((other) => other.id !== hit.id);
  add(part);
  scrollTo({ top: 0 });
}

async function showChoices() {
  const name = $("gallery").value;
  const columns = await fetchJson(`galleries/${encodeURIComponent(name)}/choices`).catch(() => ({}));
  if (name !== $("gallery").value) return;
  $("choices").replaceChildren(
    ...Object.entries(columns).map(([column, values]) => {
      const select = make("select", { "data-column": column });
      select.append(make("option", { value: "" }, say("any")));
      for (const { value, images } of values) {
        select.append(make("option", { value: JSON.stringify(value) }, `${value} (${images})`));
      }
      if (query.choices.has(column)) select.value = JSON.stringify(query.choices.get(column));
      select.onchange = () => {
        if (select.value) query.choices.set(column, JSON.parse(select.value));
        else query.choices.delete(column);
        search(true);
      };
      return make("label", {}, make("span", {}, column), select);
    }),
  );
}

function open(visible) {
  $("options").hidden = !visible;
  $("more").setAttribute("aria-expanded", String(visible));
}

function language(code) {
  speak(code);
  const none = make("option", { value: "" }, say("none"));
  const compared = $("compare").value;
  $("compare").replaceChildren(none, ...galleries.map((gallery) => make("option", { value: gallery.name }, label(gallery))));
  $("compare").value = compared;
  showChips();
  showChoices();
}

const label = (gallery) => `${gallery.name} (${gallery.model})`;

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    search(true);
  });
  for (const name of ["q", "minus", "where"]) {
    // Do not search for unfinished characters of an input method (Chinese).
    $(name).addEventListener("input", (event) => event.isComposing || later());
    $(name).addEventListener("compositionend", later);
  }
  for (const name of ["k", "compare"]) $(name).addEventListener("change", () => search(true));
  $("gallery").addEventListener("change", () => {
    query.choices.clear();
    query.parts = query.parts.filter((part) => part.uploaded);
    showChips();
    showChoices();
    search(true);
  });
  $("file").addEventListener("change", () => {
    take($("file").files[0]);
    $("file").value = "";
  });
  $("more").onclick = () => open($("options").hidden);
  $("language").onchange = () => {
    remember("clipret-language", $("language").value);
    language($("language").value);
    search();
  };
  $("theme").onchange = () => {
    remember("clipret-theme", $("theme").value);
    document.documentElement.dataset.theme = $("theme").value;
  };
  document.addEventListener("keydown", (event) => {
    walk(event);
    if (event.altKey || event.ctrlKey || event.metaKey || event.defaultPrevented || $("viewer").open) return;
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    const item = event.target.closest?.("#results li");
    if (event.key === "/" && !typing) {
      $("q").focus();
      $("q").select();
    } else if (event.key === "ArrowDown" && event.target === $("q")) document.querySelector("#results li > button")?.focus();
    else if (event.key === "Escape" && item) $("q").focus();
    else if ((event.key === "m" || event.key === "M") && item) {
      const response = last[Number(item.dataset.side)];
      like(response.results[0].hits[[...item.parentNode.children].indexOf(item)], response.gallery, 1);
    } else return;
    event.preventDefault();
  });
  let inside = 0; // how many elements the dragged image is over
  const dragged = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragenter", (event) => dragged(event) && ($("drop").hidden = inside++ < 0));
  addEventListener("dragleave", (event) => dragged(event) && ($("drop").hidden = --inside <= 0));
  addEventListener("dragover", (event) => dragged(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!dragged(event)) return;
    event.preventDefault();
    inside = 0;
    $("drop").hidden = true;
    take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((item) => item.type.startsWith("image/"));
    if (file) take(file);
  });
  addEventListener("popstate", restore);
  new ResizeObserver(arrange).observe($("results"));
}

function restore() {
  fromAddress(location.search);
  showChips();
  showChoices();
  search();
}

async function begin() {
  const theme = recall("clipret-theme") ?? "";
  $("theme").value = theme;
  if (theme) document.documentElement.dataset.theme = theme;
  listen();
  prepare(like);
  const parameters = new URLSearchParams(location.search);
  const code = parameters.get("lang") ?? recall("clipret-language") ?? navigator.language.slice(0, 2);
  speak(code);
  try {
    galleries = await fetchJson("galleries");
  } catch (error) {
    explain(error.message);
    return;
  }
  $("gallery").replaceChildren(...galleries.map((gallery) => make("option", { value: gallery.name }, label(gallery))));
  $("galleryField").hidden = $("compareField").hidden = galleries.length < 2;
  language(code);
  restore();
  open(Boolean($("where").value || $("minus").value || query.choices.size || $("compare").value));
  if (matchMedia("(hover: hover)").matches) $("q").focus();
}

begin();
