// A justified grid: rows of images of one height that fill the width from side to side.

const GAP = 8;
const CAPTION = 40;

/** Rows of `[width, height]` for images of these ratios, in their order. The last row is not stretched. */
export function rows(ratios, width, height) {
  const made = [];
  let row = [];
  let sum = 0;
  for (const ratio of ratios) {
    row.push(ratio);
    sum += ratio;
    const free = width - GAP * (row.length - 1);
    if (sum * height >= free) {
      // With or without its last image, whichever leaves the row nearer to the height that is wanted.
      const without = (free + GAP) / (sum - ratio);
      if (row.length > 1 && without / height < height / (free / sum)) {
        row.pop();
        made.push(row.map((one) => [one * without, without]));
        row = [ratio];
        sum = ratio;
      } else {
        made.push(row.map((one) => [(one * free) / sum, free / sum]));
        row = [];
        sum = 0;
      }
    }
  }
  if (row.length) {
    const last = Math.min(height, (width - GAP * (row.length - 1)) / sum);
    made.push(row.map((one) => [one * last, last]));
  }
  return made.flat();
}

/** Lay out the figures of a list; each holds its image's ratio in `data-ratio`. */
export function layOut(list) {
  const width = Math.floor(list.clientWidth) - 0.5;
  if (width <= 0) return;
  const narrow = width < 520;
  const height = narrow ? 128 : Math.max(170, Math.min(300, width / 6));
  const items = [...list.children];
  // Panoramas and pillars get bars at their sides instead of a row of their own.
  const ratios = items.map((item) => Math.min(2.4, Math.max(0.6, Number(item.dataset.ratio) || 1.33)));
  rows(ratios, width, height).forEach(([across, down], at) => {
    items[at].style.width = `${Math.floor(across * 10) / 10}px`;
    items[at].style.setProperty("--down", `${Math.round(down)}px`);
  });
}

/** The item above or below another one, the one whose middle is nearest. */
export function vertical(items, from, down) {
  const middle = (item) => item.offsetLeft + item.offsetWidth / 2;
  const beyond = items.filter((item) => (down ? item.offsetTop > from.offsetTop : item.offsetTop < from.offsetTop));
  if (!beyond.length) return null;
  const line = down ? beyond[0].offsetTop : beyond[beyond.length - 1].offsetTop;
  const row = beyond.filter((item) => item.offsetTop === line);
  const distance = (item) => Math.abs(middle(item) - middle(from));
  return row.reduce((best, item) => (distance(item) < distance(best) ? item : best));
}

export { CAPTION, GAP };
