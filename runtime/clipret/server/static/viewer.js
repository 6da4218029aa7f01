// The dialog with one large image and its metadata.

import { $, make, say } from "./page.js";
import { image } from "./query.js";

let hits = [];
let at = 0;
let gallery = "";
let choose = () => {};

/** Call `select(hit, gallery, weight)` when the user asks for more, or less, like an image. */
export function prepare(select) {
  choose = select;
  $("close").onclick = () => $("viewer").close();
  $("previous").onclick = () => turn(-1);
  $("next").onclick = () => turn(1);
  $("similar").onclick = () => leave(1);
  $("without").onclick = () => leave(-0.5);
  $("viewer").addEventListener("click", (event) => {
    if (event.target === $("viewer")) $("viewer").close(); // outside the image
  });
  $("viewer").addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") turn(-1);
    else if (event.key === "ArrowRight") turn(1);
    else if (event.key === "m" || event.key === "M") leave(1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  $("viewer").addEventListener("close", () => {
    $("large").removeAttribute("src");
    const key = `${gallery}/${hits[at]?.id}`;
    [...document.querySelectorAll("#results li")].find((item) => item.dataset.key === key)?.firstChild.focus();
  });
}

/** Open the dialog with one of the hits of a gallery. */
export function view(results, number, name) {
  [hits, at, gallery] = [results, number, name];
  fill();
  $("viewer").showModal();
  $("similar").focus();
}

function turn(step) {
  if (!hits[at + step]) return;
  at += step;
  fill();
}

function leave(weight) {
  const hit = hits[at];
  $("viewer").close();
  choose(hit, gallery, weight);
}

function fill() {
  const hit = hits[at];
  $("large").src = `${hit.thumbnail}&side=1600`;
  $("large").alt = hit.path;
  $("viewerName").textContent = hit.path;
  $("viewerScore").textContent = say("score", { score: hit.score.toFixed(4), rank: at + 1 });
  const facts = Object.entries(hit.metadata).filter(([, value]) => value !== null);
  $("viewerFacts").replaceChildren(
    ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", { dir: "auto" }, String(value))]),
  );
  $("original").href = image(hit.id, gallery);
  $("previous").disabled = at === 0;
  $("next").disabled = at === hits.length - 1;
}
