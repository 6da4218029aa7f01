// A justified grid: rows of images of equal height that fill the width.

const GAP = 8;
const CAPTION = 40;

/** The `[width, height]` of images with these aspect ratios, in order, in rows. The last row is not stretched. */
export function rows(ratios, width, height) {
  const sizes = [];
  let row = [];
  let sum = 0;
  for (const ratio of ratios) {
    row.push(ratio);
    sum += ratio;
    const free = width - GAP * (row.length - 1);
    if (sum * height >= free) {
      // End the row before or after this image, whichever brings its height closer to `height`.
      const without = (free + GAP) / (sum - ratio);
      if (row.length > 1 && without / height < height / (free / sum)) {
        row.pop();
        sizes.push(row.map((aspect) => [aspect * without, without]));
        row = [ratio];
        sum = ratio;
      } else {
        sizes.push(row.map((aspect) => [(aspect * free) / sum, free / sum]));
        row = [];
        sum = 0;
      }
    }
  }
  if (row.length) {
    const last = Math.min(height, (width - GAP * (row.length - 1)) / sum);
    sizes.push(row.map((aspect) => [aspect * last, last]));
  }
  return sizes.flat();
}

/** Lay out the items of a list by the aspect ratios of their images, `data-ratio`. */
export function layOut(list) {
  const width = Math.floor(list.clientWidth) - 0.5;
  if (width <= 0) return;
  const narrow = width < 520;
  const height = narrow ? 128 : Math.max(170, Math.min(300, width / 6));
  const items = [...list.children];
  // Very wide and very tall images are padded instead of filling a row or a column.
  const ratios = items.map((item) => Math.min(2.4, Math.max(0.6, Number(item.dataset.ratio) || 1.33)));
  rows(ratios, width, height).forEach(([across, down], at) => {
    items[at].style.width = `${Math.floor(across * 10) / 10}px`;
    items[at].style.setProperty("--down", `${Math.round(down)}px`);
  });
}

/** The item in the row above or below whose center is closest to that of `from`. */
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
