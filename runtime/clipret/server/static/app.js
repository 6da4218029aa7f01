// The page: a form whose every change is a search, and the images that it finds.

import { $, ask, make, recall, remember, say, speak, spoken } from "./page.js";
import { MINUS, asksForSomething, fromAddress, query, request, thumbnail, toAddress } from "./query.js";
import { arrange, clear, common, show, walk } from "./results.js";
import { prepare, view } from "./viewer.js";

const PAUSE = 130; // milliseconds without a key after which a text is searched for
const MOST = 30; // MB of an image; the service takes a little more

let galleries = [];
let last = []; // the answers that are shown
let underWay = null;
let timer = 0;

async function search(push = false) {
  clearTimeout(timer);
  underWay?.abort();
  const control = (underWay = new AbortController());
  history[push ? "pushState" : "replaceState"](null, "", toAddress());
  document.title = $("q").value.trim() ? `${$("q").value.trim()} · clipret` : "clipret";
  if (!asksForSomething()) {
    rest();
    return;
  }
  $("found").setAttribute("aria-busy", "true");
  const began = performance.now();
  const names = [$("gallery").value, $("compare").value].filter((name, at) => at === 0 || name);
  try {
    const answers = await Promise.all(
      names.map(async (name) => ask("search", await request(name, control.signal))),
    );
    if (control !== underWay) return;
    last = answers;
    explain(null);
    show(answers, view);
    report(Math.round(performance.now() - began));
  } catch (error) {
    if (control !== underWay || error.name === "AbortError") return;
    explain(error.message);
  }
  $("found").removeAttribute("aria-busy");
}

const later = () => {
  clearTimeout(timer);
  timer = setTimeout(search, PAUSE);
};

/** Nothing is asked: say what could be. */
function rest() {
  last = [];
  clear();
  explain(null);
  $("found").removeAttribute("aria-busy");
  const total = galleries.find((one) => one.name === $("gallery").value)?.images ?? 0;
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

/** What went wrong, until something goes right. What was found before stays. */
function explain(reason) {
  $("error").hidden = !reason;
  $("error").textContent = reason ?? "";
}

function showChips() {
  $("chips").replaceChildren(
    ...query.parts.map((part, at) => {
      const name = part.name ?? (part.id ? `#${part.id}` : "");
      const text = part.own ? say("uploaded", { name }) : say(part.weight > 0 ? "like" : "unlike", { name });
      const drop = make("button", { type: "button", "aria-label": say("removePart", { name }) }, "×");
      drop.onclick = () => {
        if (part.own) URL.revokeObjectURL(part.address);
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

/** A person's own image, dropped, pasted or picked, in the place of an earlier one. */
function take(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    explain(say("notImage", { name: file.name }));
    return;
  }
  if (file.size > MOST * 1e6) {
    explain(say("tooLarge", { name: file.name, size: Math.ceil(file.size / 1e6) }));
    return;
  }
  query.parts = query.parts.filter((part) => !part.own);
  add({ file, own: true, weight: 1, name: file.name, address: URL.createObjectURL(file) });
}

/** More like an image of a gallery replaces the query; less like it joins it. */
function like(hit, gallery, weight) {
  const part = { id: hit.id, gallery, weight, name: hit.path.split("/").pop() };
  if (weight > 0) {
    query.parts = [];
    $("q").value = $("minus").value = "";
  }
  query.parts = query.parts.filter((one) => one.id !== hit.id);
  add(part);
  scrollTo({ top: 0 });
}

async function showChoices() {
  const name = $("gallery").value;
  const columns = await ask(`galleries/${encodeURIComponent(name)}/choices`).catch(() => ({}));
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

function open(wanted) {
  $("options").hidden = !wanted;
  $("more").setAttribute("aria-expanded", String(wanted));
}

function language(wanted) {
  speak(wanted);
  const none = make("option", { value: "" }, say("none"));
  const chosen = $("compare").value;
  $("compare").replaceChildren(none, ...galleries.map((one) => make("option", { value: one.name }, title(one))));
  $("compare").value = chosen;
  showChips();
  showChoices();
}

const title = (one) => `${one.name} (${one.model})`;

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    search(true);
  });
  for (const name of ["q", "minus", "where"]) {
    // While characters are composed (Chinese input) the text is not yet what is meant.
    $(name).addEventListener("input", (event) => event.isComposing || later());
    $(name).addEventListener("compositionend", later);
  }
  for (const name of ["k", "compare"]) $(name).addEventListener("change", () => search(true));
  $("gallery").addEventListener("change", () => {
    query.choices.clear();
    query.parts = query.parts.filter((part) => part.own);
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
    const item = event.target.closest?.("#found li");
    if (event.key === "/" && !typing) {
      $("q").focus();
      $("q").select();
    } else if (event.key === "ArrowDown" && event.target === $("q")) document.querySelector("#found li > button")?.focus();
    else if (event.key === "Escape" && item) $("q").focus();
    else if ((event.key === "m" || event.key === "M") && item) {
      const answer = last[Number(item.dataset.side)];
      like(answer.results[0].hits[[...item.parentNode.children].indexOf(item)], answer.gallery, 1);
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
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) take(file);
  });
  addEventListener("popstate", restore);
  new ResizeObserver(arrange).observe($("found"));
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
  const given = new URLSearchParams(location.search);
  const wanted = given.get("lang") ?? recall("clipret-language") ?? navigator.language.slice(0, 2);
  speak(wanted);
  try {
    galleries = await ask("galleries");
  } catch (error) {
    explain(error.message);
    return;
  }
  $("gallery").replaceChildren(...galleries.map((one) => make("option", { value: one.name }, title(one))));
  $("galleryField").hidden = $("compareField").hidden = galleries.length < 2;
  language(wanted);
  restore();
  open(Boolean($("where").value || $("minus").value || query.choices.size || $("compare").value));
  if (matchMedia("(hover: hover)").matches) $("q").focus();
}

begin();
